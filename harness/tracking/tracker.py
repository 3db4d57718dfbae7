"""Where the numbers of a run go while it runs: the file of curves, and W&B where it is wanted.

Names and values are the same everywhere. The local files are the truth; W&B is their mirror.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from harness.config.schema import TrackingConfig, WandbMode
from harness.results.files import CURVE_FILE, WANDB_DIR
from harness.results.schema import RunResult
from harness.tracking.curves import JsonlTracker
from harness.tracking.wandb_mirror import TAG_LENGTH, WandbTracker, lost_message

logger = logging.getLogger("harness")


class Tracker(Protocol):
    """Something that receives the curve of one run and then how it ended."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values`, by metric name, as they were after optimizer step `step`."""

    def finish(self, result: RunResult) -> None:
        """Records how the run ended; nothing can be logged after it."""

    def close(self) -> None:
        """Ends tracking for a run that leaves without a result; does nothing after `finish`."""


def open_tracker(
    config: TrackingConfig,
    *,
    run_dir: Path,
    run_id: str,
    cell_id: str,
    job_type: str,
    sweep: str | None,
    run_config: Mapping[str, Any],
) -> Tracker:
    """Starts tracking one run.

    The curve of an earlier attempt in `run_dir` is replaced, and so are its W&B files if W&B is on.

    Args:
        config: Which trackers to use; `metrics.jsonl` is always written.
        run_dir: Existing directory of the run.
        run_id: Id and name of the run on W&B.
        cell_id: Group of the run on W&B.
        job_type: Job type of the run on W&B: the name of the method.
        sweep: Name of the sweep, a tag on W&B; None outside sweeps.
        run_config: The validated config as JSON values, mirrored verbatim.
    """
    trackers: list[Tracker] = [JsonlTracker(run_dir / CURVE_FILE)]
    if config.wandb is not WandbMode.disabled:
        job = {
            "mode": config.wandb,
            "project": config.project,
            "entity": config.entity,
            "id": run_id,
            "name": run_id,
            "group": cell_id,
            "job_type": job_type,
            "tags": [] if sweep is None else [sweep[:TAG_LENGTH]],
            "config": run_config,
        }
        try:
            trackers.append(WandbTracker(run_dir.absolute() / WANDB_DIR, job))
        except OSError as error:
            logger.warning("%s", lost_message(config.wandb, f"its process could not be started ({error})"))
    return Trackers(trackers)


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values` in every tracker."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def finish(self, result: RunResult) -> None:
        """Tells every tracker how the run ended."""
        for tracker in self._trackers:
            tracker.finish(result)

    def close(self) -> None:
        """Closes every tracker."""
        for tracker in self._trackers:
            tracker.close()
