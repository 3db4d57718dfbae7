"""Work that takes long halved with a second process, where the system can fork one: what is read or drawn is here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


def context_of_forks() -> Any | None:
    """The context that forks processes; None where the system cannot, or has no second core for one."""
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        return None
    return get_context("fork")


def in_halves(work: Callable[[Sequence[_Item]], _Found], items: Sequence[_Item], *, least: int) -> list[_Found]:
    """What `work` finds in the items: of the first half here and of the second half in a process beside.

    Args:
        work: of items in their order; its answer can be pickled.
        items: of all.
        least: fewer are no work for two.

    Returns:
        An answer for each part, in the order of the items: two of them, or one of all.
    """
    context = context_of_forks() if len(items) >= least else None
    if context is None:
        return [work(items)]
    middle = len(items) // 2
    receiver, sender = context.Pipe(duplex=False)
    other = context.Process(target=_send, args=(work, items[middle:], sender), daemon=True)
    other.start()
    sender.close()
    try:
        first = work(items[:middle])
        try:
            second: _Found = receiver.recv()
        except (EOFError, OSError):  # it died: what it had no memory for may fit here, or its error is raised
            second = work(items[middle:])
    finally:
        other.kill()
        other.join()
    return [first, second]


def _send(work: Callable[[Sequence[_Item]], _Found], items: Sequence[_Item], sender: Connection) -> None:
    sender.send(work(items))
    sender.close()
