"""What the files in a run's folder say about the run, before anything is computed. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from harness.results.claims import current_owner
from harness.results.files import CHECKPOINT_FILE, RESULT_FILE
from harness.results.schema import ResultError, read_result

# Beside the statuses of a result.
RUNNING = "running"
UNREADABLE = "unreadable"
STOPPED = "stopped"
NEW = "new"


def run_state(run_dir: Path, *, ended: str | None = None) -> str:
    """`running`, or the status of the run's result, `unreadable`, `stopped` (it has a checkpoint) or `new`.

    Args:
        run_dir: the run's folder, which need not exist.
        ended: the status of its result, or `unreadable`, where the caller has read it already.
    """
    if current_owner(run_dir) is not None:  # also of one with a result: it is rerun
        return RUNNING
    if ended is not None:
        return ended
    if (run_dir / RESULT_FILE).is_file():
        try:
            return str(read_result(run_dir / RESULT_FILE).status)
        except ResultError:
            return UNREADABLE
    return STOPPED if (run_dir / CHECKPOINT_FILE).is_file() else NEW
