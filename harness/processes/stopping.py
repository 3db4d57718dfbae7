"""A request to stop a run, made by a signal and checked between two batches, tokens or steps, in every phase."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from accelerate import Accelerator

from harness.processes.distributed import all_reduce_sum

# What clusters send before they take a machine away: SLURM and Kubernetes the first, submitit the second.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

Item = TypeVar("Item")


class PreemptedError(RuntimeError):
    """The run was asked to stop. What it has computed is on disk; starting it again resumes there."""


class _Interrupted(BaseException):
    """Raised wherever a signal arrives; no library takes it for one of its own errors."""


class StopRequest:
    """Whether the run was asked to stop.

    Of several processes the main one decides, and all of them must ask at the same points of the run.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._interrupts = False
        self._accelerator: Accelerator | None = None

    def ask(self) -> None:
        """Asks the run to stop at the next point where it can."""
        self._is_asked = True

    def share(self, accelerator: Accelerator) -> None:
        """From here on all processes stop together."""
        # Of one process it would only keep the last run of a pack in memory: an accelerator has its model.
        self._accelerator = accelerator if accelerator.num_processes > 1 else None

    @property
    def was_heard(self) -> bool:
        """Whether this process was asked to stop, whatever the others were."""
        return self._is_asked

    def is_asked(self) -> bool:
        """Whether to stop now, for all processes alike: all of them must ask at once."""
        if self._accelerator is None:
            return self._is_asked
        asked = self._is_asked and self._accelerator.is_main_process
        return any(all_reduce_sum([asked], self._accelerator))

    def check(self, phase: str) -> None:
        """Raises `PreemptedError` when the run was asked to stop. `phase` says what is being done."""
        if self.is_asked():
            raise PreemptedError(f"stopped while {phase}; start the run again to resume.")

    def between(self, items: Iterable[Item], phase: str) -> Iterator[Item]:
        """The items, as long as nobody asks to stop: see `check`."""
        for item in items:
            self.check(phase)
            yield item

    @contextmanager
    def signals(self) -> Iterator[None]:
        """While inside, a stop signal asks instead of killing; so does a first Ctrl-C, where that would interrupt.

        Python lets only the main thread hear signals.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        heard = (*STOP_SIGNALS, *((signal.SIGINT,) if interrupts else ()))
        before = {number: signal.signal(number, self._hear) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def interrupting(self, phase: str) -> Iterator[None]:
        """While inside, a stop signal ends the phase at once, wherever it is: there is nothing to be kept yet."""
        self._interrupts = True
        try:
            self.check(phase)
            yield
        except _Interrupted:
            raise PreemptedError(f"stopped while {phase}; start the run again.") from None
        finally:
            self._interrupts = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self._is_asked or self._interrupts):
            raise KeyboardInterrupt
        self.ask()
        if self._interrupts:
            self._interrupts = False  # a second signal does not disturb the way out
            raise _Interrupted
