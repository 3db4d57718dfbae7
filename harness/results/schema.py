"""The one results schema: what a run leaves behind, and what its numbers mean.

`runs/<run_id>/result.json` is written once, atomically, at the end of a run: its existence means that the run ended.
Everything downstream (the analysis package, W&B, the launcher that skips finished work) reads this file and never
parses a name, a path or a log.

A measurement that could not be made is a key that is absent from `metrics`: never 0, -1 or NaN.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from harness.results.files import RESULT_FILE, write_json_atomically
from harness.results.metrics import METRICS, check_metrics

SCHEMA_VERSION = 1


class Status(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out_of_memory"
    FAILED = "failed"


class ResultError(ValueError):
    """A result file that cannot be read as one of ours; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class RunResult:
    """One ended run. Fields as in the results contract; `config` is the validated config, verbatim.

    Raises `TypeError` for a field of another type, and `ValueError` for a metric that the registry does not know or
    whose value is not a finite number: a missing measurement is a missing key.
    """

    run_id: str
    cell_id: str
    sweep: str | None
    status: Status
    config: dict[str, Any]
    target_modules: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name, kind in _FIELD_TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected {kind}, got {value!r:.60}")
        if not all(isinstance(name, str) for name in self.target_modules):
            raise TypeError("target_modules: expected a list of names")
        check_metrics(self.metrics)

    @property
    def headline(self) -> str:
        """The numbers that a reader of a sweep waits for, in one line: scores, size, memory."""
        best = self.config.get("dataset", {}).get("best_metric", "")
        names = (f"val_{best}", f"test_{best}", "num_adapter_params", "peak_memory_bytes")
        return "  ".join(METRICS[name].text(self.metrics[name]) for name in names if name in self.metrics)


_FIELD_TYPES: dict[str, Any] = {
    "run_id": str,
    "cell_id": str,
    "sweep": str | None,
    "status": Status,
    "config": dict,
    "target_modules": list,
    "metrics": dict,
    "environment": dict,
    "error": str,
}


def write_result(run_dir: Path, result: RunResult) -> Path:
    """Writes `result` to `run_dir/result.json` atomically and returns its path."""
    path = run_dir / RESULT_FILE
    write_json_atomically(path, asdict(result))
    return path


def read_result(path: Path) -> RunResult:
    """Reads one result file.

    Raises `ResultError` when the file is not JSON, not of this schema version, or holds unknown fields or metrics.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ResultError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ResultError(f"{path}: schema_version {version!r}, this code reads {SCHEMA_VERSION}")
    try:
        return RunResult(**{**raw, "status": Status(raw["status"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ResultError(f"{path}: {error}") from error
