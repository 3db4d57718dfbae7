"""Curves of a run in `metrics.jsonl`, which is always written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.results.schema import RunResult


def curve_record(step: int, values: Mapping[str, float]) -> dict[str, Any]:
    """Returns one record of the curve. JSON has no NaN: such a value is left out and its name listed."""
    record = {"step": step, **{name: value for name, value in values.items() if math.isfinite(value)}}
    non_finite = [name for name, value in values.items() if not math.isfinite(value)]
    return {**record, "non_finite": non_finite} if non_finite else record


class JsonlTracker:
    """Writes the curve to a file, one JSON object a line: `{"step": 10, "train_nll": 0.5}`.

    Every line is handed to the operating system at once, so that a killed run keeps its curve. Where a value is not
    finite its key is absent and `non_finite` lists its name: `{"step": 20, "non_finite": ["train_nll"]}`.
    """

    def __init__(self, path: Path) -> None:
        # A new file: a process that has lost the run may still write into the old one.
        path.unlink(missing_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line."""
        self._file.write(json.dumps(curve_record(step, values), allow_nan=False) + "\n")
        self._file.flush()

    def finish(self, result: RunResult) -> None:
        """Closes the file; the result has its own file."""
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
