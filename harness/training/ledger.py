"""Results and costs of the phases of a run beside its steps: nothing that is on disk is computed again.

    {"of": "start", "phase": "score val before training", "value": {"nll": 5.1}, "spent": {"wall_seconds": 7.5}}

`of` names the state that the phase was computed from, so that nothing is taken over from another training.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from harness.measure.device import device_peaks, peak_rss_bytes
from harness.processes.preparation import Preparation

logger = logging.getLogger("harness")

# In what a next attempt resumes: `Spending.packed`, and 0 where a process was shared before training alone.
_PACKED = "packed"
_OF_THE_GPU = "cuda_"


class Spending:
    """What a run has taken over all its attempts: seconds are summed, of peaks the highest counts.

    Of an attempt that was killed, what it took after its last checkpoint or phase is not known.

    Args:
        started: when this attempt began, by `time.perf_counter`.
        device: whose peaks count.
        preparation: what is timed apart.
        num_packed: gives how many runs have trained together so far, in a process that is shared with others.
    """

    def __init__(
        self,
        started: float,
        device: torch.device,
        preparation: Preparation,
        *,
        num_packed: Callable[[], int] | None = None,
    ) -> None:
        self._started = started
        self._device = device
        self._preparation = preparation
        self._num_packed = num_packed
        self._trained_before: int | None = None
        self._was_shared = num_packed is not None
        self._earlier: dict[str, float] = {}
        self._is_training = False

    def resume(self, earlier: dict[str, float], *, has_trained: bool = False) -> None:
        """Adds what earlier attempts took, as `so_far` gave it; of several reports the latest counts.

        `has_trained`: whether this attempt continues their training.
        """
        if earlier.get("wall_seconds", 0.0) >= self._earlier.get("wall_seconds", 0.0):
            self._earlier = {name: value for name, value in earlier.items() if name != _PACKED}
        if _PACKED in earlier:
            self._was_shared = True
            if has_trained and earlier[_PACKED]:
                self._trained_before = max(self._trained_before or 0, round(earlier[_PACKED]))

    def begin_training(self) -> None:
        """From here on the peaks of the device are those of training."""
        self._is_training = True

    def end_training(self) -> None:
        """Keeps the peaks of the device as they are: what comes after is not training."""
        if self._is_training:
            self._earlier |= {name: value for name, value in self._of_all().items() if name.startswith(_OF_THE_GPU)}
            self._is_training = False

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is done inside is timed as preparation: later runs find it done."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._preparation.seconds += time.perf_counter() - began

    @property
    def packed(self) -> int | None:
        """The most runs that trained together; None where no step was made in a process that others shared."""
        now = None if self._num_packed is None else self._num_packed()
        return max((packed for packed in (now, self._trained_before) if packed is not None), default=None)

    def so_far(self) -> dict[str, float]:
        """What a next attempt is to `resume`."""
        return self._of_all() | ({_PACKED: self.packed or 0} if self._was_shared else {})

    def total(self) -> dict[str, float]:
        """Metrics by name, but those that a clock or the system gives of a whole process, where others shared it."""
        left_out = ("wall_seconds", "peak_rss_bytes") if self._was_shared else ()
        return {
            name: value
            for name, value in self._of_all().items()
            if name not in left_out and not (name.startswith(_OF_THE_GPU) and self.packed is not None)
        }

    def _of_all(self) -> dict[str, float]:
        """Metrics by name, those of a process that others shared included."""
        total = dict(self._earlier)
        seconds = {
            "wall_seconds": time.perf_counter() - self._started - self._preparation.seconds,
            "preparation_seconds": self._preparation.seconds,
        }
        peaks: dict[str, float] = {} if self._preparation.is_in_peak_rss else {"peak_rss_bytes": peak_rss_bytes()}
        if self._is_training:
            peaks |= device_peaks(self._device)
        total |= {name: value + total.get(name, 0.0) for name, value in seconds.items()}
        return total | {name: max(value, total.get(name, 0)) for name, value in peaks.items()}


class Ledger:
    """The phases that are done.

    Args:
        path: the file; a line that a killed process left half-written does not count.
        spending: what the run has taken so far: kept with each line, and resumed from the last one.
        is_writer: of several processes, one writes; the others know only what was there when they were started.
    """

    def __init__(self, path: Path, spending: Spending, *, is_writer: bool = True) -> None:
        self._path = path
        self._spending = spending
        self._is_writer = is_writer
        self._values: dict[tuple[str, str], Any] = {}
        self._read()

    def find(self, of: str, phase: str) -> Any | None:
        """The result of a phase, or None when it is not done."""
        return self._values.get((of, phase))

    def add(self, of: str, phase: str, value: Any) -> None:
        """Keeps the result of a phase: JSON values, not null."""
        self._values[of, phase] = value
        if not self._is_writer:
            return
        entry = {"of": of, "phase": phase, "value": value, "spent": self._spending.so_far()}
        try:
            with self._path.open("a+b") as file:
                # After a line that was cut off, its rest must not swallow this one.
                ends_well = file.tell() == 0 or (file.seek(-1, os.SEEK_END), file.read(1))[1] == b"\n"
                file.write((b"" if ends_well else b"\n") + json.dumps(entry, allow_nan=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # the run may still finish without
            logger.warning("%s cannot be written (%s): a next attempt would compute this again", self._path, error)

    def once(self, of: str, phase: str, compute: Callable[[], Any]) -> Any:
        """The result of a phase: from an earlier attempt, or computed now and kept."""
        if self.find(of, phase) is None:
            self.add(of, phase, compute())
        return self.find(of, phase)

    def _read(self) -> None:
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                entry = json.loads(line)
                self._values[entry["of"], entry["phase"]] = entry["value"]
                self._spending.resume(dict(entry["spent"]))
            except (ValueError, KeyError, TypeError):
                continue
