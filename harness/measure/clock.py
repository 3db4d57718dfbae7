"""Clocks: the time of training steps, without waiting for the device at each of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor


class DeviceQueue(Protocol):
    """How the time of a device is taken. Work is queued: on CUDA a launch returns before its kernel has run."""

    lag: int
    """Steps whose numbers stay unread while the next one is queued, so that the device never waits for the host."""

    def mark(self) -> Any:
        """Puts a point in time behind the work that is queued."""
        ...

    def fetch(self, values: Tensor) -> Tensor:
        """Starts a copy to the host; it can be read when a later mark was reached."""
        ...

    def seconds(self, began: Any, ended: Any) -> float:
        """Waits until the device has reached `ended`; the seconds between the two marks."""
        ...


class HostQueue:
    """CPU and MPS: wait for the device, then read the host's clock."""

    lag = 0

    def __init__(self, synchronize: Callable[[], None], *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._synchronize = synchronize
        self._clock = clock

    def mark(self) -> float:
        """The time at which all queued work is done."""
        self._synchronize()
        return self._clock()

    def fetch(self, values: Tensor) -> Tensor:
        """The copy itself."""
        return values.cpu()

    def seconds(self, began: float, ended: float) -> float:
        """Both are in the past."""
        return ended - began


class CudaQueue:
    """Events in the queue of a CUDA device, and copies into pinned memory: nothing waits before the step after next."""

    lag = 1

    def __init__(self, device: torch.device, *, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda

    def mark(self) -> Any:
        """A timed event."""
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self._device))
        return event

    def fetch(self, values: Tensor) -> Tensor:
        """Copies beside the host."""
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

    def seconds(self, began: Any, ended: Any) -> float:
        """By the device's own clock."""
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3  # it says milliseconds


def device_queue(device: torch.device) -> DeviceQueue:
    """How to take the time of a device. Raises `ValueError` for one of another type than cpu, cuda or mps."""
    match device.type:
        case "cpu":
            return HostQueue(lambda: None)
        case "cuda":
            return CudaQueue(device)
        case "mps":
            return HostQueue(torch.mps.synchronize)
    raise ValueError(f"device={str(device)!r}: its clock is not known; must be of type cpu, cuda or mps")


Note = TypeVar("Note")


@dataclass(frozen=True)
class MeteredStep(Generic[Note]):
    """A step that the device has finished. `note` is what its `end` was given."""

    seconds: float
    values: list[float]
    note: Note


class StepMeter(Generic[Note]):
    """Seconds of each step, and the few numbers that it left on the device, read without holding the device up.

        meter.begin()
        loss = step()
        meter.end(loss, note)
        for step in meter.finished():
            step.seconds, step.values, step.note

    What happens between `end` and the next `begin` is in no step's seconds: collation, evaluation, checkpoints. On
    CUDA `finished` stays one step behind, unless `behind=False` asks for all of them: the queue of the device then
    never runs empty because a number is read, and the host never runs more than one step ahead.
    """

    def __init__(self, queue: DeviceQueue) -> None:
        self._queue = queue
        self._began: Any = None
        self._open: deque[tuple[Any, Any, Tensor, Note]] = deque()

    def begin(self) -> None:
        """Lets time count."""
        self._began = self._queue.mark()

    def end(self, values: Tensor, note: Note) -> None:
        """Ends the step. `values` has one dimension. Raises `RuntimeError` without a `begin`."""
        if self._began is None:
            raise RuntimeError("StepMeter.end: no step is open; call begin() first")
        fetched = self._queue.fetch(values)
        self._open.append((self._began, self._queue.mark(), fetched, note))
        self._began = None

    def finished(self, *, behind: bool = True) -> Iterator[MeteredStep[Note]]:
        """The steps that were not handed out yet, in order: all but those in the queue, or all, waiting for them."""
        while len(self._open) > (self._queue.lag if behind else 0):
            began, ended, values, note = self._open.popleft()
            seconds = self._queue.seconds(began, ended)
            yield MeteredStep(seconds, values.tolist(), note)
