"""The folder of a run, `<runs_dir>/<run_id>/`: what lies in it, and what that says about the run. Needs no torch."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from harness.claims import current_owner
from harness.config import Rerun, RunConfig, run_id
from harness.results import RESULT_FILE, ResultError, RunResult, Status, read_result

CONFIG_FILE = "config.yaml"
LOG_FILE = "log.txt"
CHECKPOINT_FILE = "checkpoint.safetensors"

logger = logging.getLogger("harness")


class OutputError(OSError):
    """The runs folder cannot be written."""


def require_writable(runs_dir: str) -> None:
    """Makes the runs folder and writes into it. Raises `OutputError`."""
    folder = Path(runs_dir)
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"runs_dir={runs_dir}: cannot be written ({error.strerror}); give another folder with runs_dir=DIR."
        ) from error


def run_dir(config: RunConfig) -> Path:
    """Where a run lies."""
    return Path(config.runs_dir) / run_id(config)


def kept_result(config: RunConfig) -> RunResult | None:
    """The result of an earlier run that `config.rerun` lets stand, if there is one.

    `never`: any. `failed`: one that finished or diverged; a run that failed or ran out of memory is tried again.
    `all`: none.
    """
    path = run_dir(config) / RESULT_FILE
    if config.rerun is Rerun.all or not path.is_file():
        return None
    try:
        result = read_result(path)
    except ResultError as error:
        logger.warning("%s; the run is made again", error)
        return None
    stands = config.rerun is Rerun.never or result.status in (Status.FINISHED, Status.DIVERGED)
    return result if stands else None


def run_state(config: RunConfig) -> str:
    """The status of a run's result, or `running`, `stopped` (it has a checkpoint), `new`, `unreadable`."""
    folder = run_dir(config)
    if (folder / RESULT_FILE).is_file():
        try:
            return str(read_result(folder / RESULT_FILE).status)
        except ResultError:
            return "unreadable"
    if current_owner(folder) is not None:
        return "running"
    return "stopped" if (folder / CHECKPOINT_FILE).is_file() else "new"
