"""Where the numbers of a run go while it runs: the file of curves, and the trackers that are wanted.

Names and values are the same everywhere. The local files are the truth; a tracker is their mirror.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from harness.config.schema import TrackingConfig, WandbMode
from harness.config.validation import ConfigError
from harness.results.files import CURVE_FILE, TENSORBOARD_DIR, TRACKIO_DIR, WANDB_DIR
from harness.results.schema import RunResult
from harness.tracking import tensorboard_mirror, trackio_mirror, wandb_mirror
from harness.tracking.curves import JsonlTracker

logger = logging.getLogger("harness")


class Tracker(Protocol):
    """Something that receives the curve of one run and then how it ended."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values`, by metric name, as they were after optimizer step `step`."""

    def finish(self, result: RunResult) -> None:
        """Records how the run ended; nothing can be logged after it."""

    def close(self) -> None:
        """Ends tracking for a run that leaves without a result; does nothing after `finish`."""


def require_trackers(config: TrackingConfig) -> None:
    """Raises `ConfigError` for a tracker whose package is not installed, with the extra of this project that it is in.

    W&B is no extra; a process that lacks a package all the same loses its tracker, and not the run.
    """
    wanted = {"trackio": config.trackio, "tensorboard": config.tensorboard}
    problems = [
        f"tracking.{name}=true: needs {name}; pip install 'lora-harness[{name}]'."
        for name, is_wanted in wanted.items()
        if is_wanted and importlib.util.find_spec(name) is None
    ]
    if problems:
        raise ConfigError(problems)


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

    The curve of an earlier attempt in `run_dir` is replaced, and so is what the trackers that are on have of it.

    Args:
        config: Which trackers to use; `metrics.jsonl` is always written.
        run_dir: Existing directory of the run.
        run_id: Id and name of the run.
        cell_id: Group of the run on W&B and Trackio.
        job_type: Job type of the run on W&B: the name of the method.
        sweep: Name of the sweep, a tag on W&B; None outside sweeps.
        run_config: The validated config as JSON values, mirrored verbatim.
    """
    trackers: list[Tracker] = [JsonlTracker(run_dir / CURVE_FILE)]
    of_run = {"project": config.project, "name": run_id, "group": cell_id, "config": run_config}
    tags = [] if sweep is None else [sweep[: wandb_mirror.TAG_LENGTH]]
    of_wandb = {"mode": config.wandb, "entity": config.entity, "id": run_id, "job_type": job_type, "tags": tags}
    wandb = wandb_mirror.mirrored(config.wandb)
    for is_on, mirrored, start, folder, job in (
        (config.wandb is not WandbMode.disabled, wandb, wandb_mirror.open_wandb, WANDB_DIR, of_run | of_wandb),
        (config.trackio, trackio_mirror.MIRRORED, trackio_mirror.open_trackio, TRACKIO_DIR, of_run),
        (
            config.tensorboard,
            tensorboard_mirror.MIRRORED,
            tensorboard_mirror.open_tensorboard,
            TENSORBOARD_DIR,
            {"config": run_config},
        ),
    ):
        if is_on:
            try:
                trackers.append(start(run_dir.absolute() / folder, job))
            except OSError as error:
                logger.warning("%s", mirrored.lost(f"its process could not be started ({error})"))
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
