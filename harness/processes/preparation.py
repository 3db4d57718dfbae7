"""What the first run does for all after it: fetching assets, learning a vocabulary, tokenising a dataset.

The results lie in the cache folder, and later runs find them there. So that the first run of a sweep can be compared
with the others, neither the time nor the memory of this work is in its own numbers: the time is recorded apart
(`preparation_seconds`), and the work is done in a child process.
"""

from __future__ import annotations

import multiprocessing.util
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


class PreparationError(RuntimeError):
    """The process that prepares ended without a word."""


@dataclass
class Preparation:
    """What a run prepared for all: how long that took, and whether the peak of its memory may be one of that work."""

    seconds: float = 0.0
    is_in_peak_rss: bool = False


_CURRENT: ContextVar[Preparation | None] = ContextVar("preparation", default=None)


@contextmanager
def preparation_of_a_run() -> Iterator[Preparation]:
    """Collects what is done `once` inside."""
    preparation = Preparation()
    token = _CURRENT.set(preparation)
    try:
        yield preparation
    finally:
        _CURRENT.reset(token)


def once(work: Callable[[], object]) -> None:
    """Does work that later runs find done; what it returns is lost, what it raises is raised.

    Within `preparation_of_a_run` it is timed apart, and done in a forked process where that is safe (Linux). Work
    inside other such work is a part of it.
    """
    preparation = _CURRENT.get()
    if preparation is None:
        work()
        return
    token = _CURRENT.set(None)
    started = time.perf_counter()
    try:
        if sys.platform == "linux":
            _in_child(work)
        else:
            preparation.is_in_peak_rss = True
            work()
    finally:
        _CURRENT.reset(token)
        preparation.seconds += time.perf_counter() - started


def _in_child(work: Callable[[], object]) -> None:
    # Forked and not spawned: the child has everything imported already. Nothing that is prepared computes with PyTorch,
    # whose threads a fork does not have. Not by multiprocessing, which lets no worker of a launcher have children.
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork beside a thread
        parent = os.getpid()
        child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _work_and_report(work, parent, writer)
        finally:
            os._exit(1)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            message = pipe.read()
    except BaseException:  # interrupted: nobody waits for the child any more
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not message:
        raise PreparationError(
            f"preparing the data or the tokenizer ended with exit code {code} and no message"
            f"{', most likely for want of memory' if code == -signal.SIGKILL else ''}; start the run again, with more "
            "memory or fewer rows."
        )
    error: BaseException | None = pickle.loads(message)
    if error is not None:
        raise error


def _work_and_report(work: Callable[[], object], parent: int, writer: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # what the parent does about them is not for this process
        signal.signal(number, signal.SIG_DFL)

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    error: BaseException | None = None
    try:
        work()
    except BaseException as raised:
        error = raised
    try:
        message = pickle.dumps(error)
        pickle.loads(message)  # some errors cannot be unpickled
    except Exception:
        message = pickle.dumps(RuntimeError("".join(traceback.format_exception(error))))
    with open(writer, "wb") as pipe:
        pipe.write(message)
    # Gives up what this process alone has made, a progress bar's lock among it, whose leak would be said at the end.
    multiprocessing.util._run_finalizers()  # type: ignore[attr-defined]
    os._exit(0)
