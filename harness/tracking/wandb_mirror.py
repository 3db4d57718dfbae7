"""W&B, as a mirror of the local files, in its own process (`harness.tracking.mirror`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.schema import WandbMode
from harness.results.files import WANDB_DIR
from harness.tracking.mirror import (
    FILES_SECONDS,
    Mirrored,
    MirrorTracker,
    TrackingError,
    describe,
    report,
    run_mirror,
)

if TYPE_CHECKING:
    import wandb

# How long the end of a run may wait, in seconds, for a server that does not answer the start and for what is not
# uploaded yet.
ONLINE_START_SECONDS = 10.0
UPLOAD_SECONDS = 15.0

# W&B refuses longer tags.
TAG_LENGTH = 64


def mirrored(mode: WandbMode) -> Mirrored:
    """What is mirrored with this mode of W&B."""
    return Mirrored("W&B", __name__, f"tracking.wandb={mode}", "tracking.wandb=disabled")


def open_wandb(directory: Path, job: Mapping[str, Any]) -> MirrorTracker:
    """Starts mirroring a run to W&B.

    The history on W&B is `metrics.jsonl` row for row, the x axis is its `step`, and the summary is
    `RunResult.metrics` plus `status` and nothing derived from the curve. A run that is not finished ends with exit
    code 1. All files are below `directory`; `wandb sync` uploads those of an offline run.

    Args:
        directory: emptied first.
        job: arguments of `wandb.init`.

    Raises:
        OSError: `directory` cannot be written or the process cannot be started.
    """
    online = job["mode"] is WandbMode.online
    limits = {"start_seconds": ONLINE_START_SECONDS, "upload_seconds": UPLOAD_SECONDS}
    return MirrorTracker(
        directory,
        {**job, "dir": str(directory.parent), **limits},
        mirrored=mirrored(job["mode"]),
        end_seconds=FILES_SECONDS + (ONLINE_START_SECONDS + UPLOAD_SECONDS if online else 0.0),
        environment={
            # An offline run makes no connection at all, so W&B's own telemetry is off.
            "WANDB_ERROR_REPORTING": "false",
            # wandb-core logs into its cache, which would otherwise grow by one file a run in the home directory, or
            # print its log where there is no home directory.
            "WANDB_CACHE_DIR": str(directory / "cache"),
        },
    )


def mirror() -> None:
    """Body of the mirror process."""
    run_mirror(_WandbWriter)


class _WandbWriter:
    """What `wandb.init` made of a job."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._run = _start_wandb_run(job)

    def log(self, record: dict[str, Any]) -> None:
        self._run.log(record)

    def finish(self, summary: Mapping[str, Any], *, exit_code: int) -> None:
        import wandb

        self._run.summary.update(summary)
        self._run.finish(exit_code=exit_code)
        wandb.teardown()


def _start_wandb_run(job: dict[str, Any]) -> wandb.Run:
    """Starts the W&B run of `job`, offline where it was to be online and W&B does not let it."""
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=job.pop("start_seconds"),
        finish_timeout=job.pop("upload_seconds"),
        finish_timeout_raises=True,
        # The run records its own environment in result.json. These cost time and send facts of the machine to W&B.
        disable_git=True,
        save_code=False,
        symlink=False,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    mode = job.pop("mode")
    try:
        run = wandb.init(mode=mode, settings=settings, **job)
    except Exception as error:  # no key, no network, no such project: offline needs none of them
        if mode == WandbMode.offline:
            raise
        directory = Path(job["dir"], WANDB_DIR)
        report(
            f"tracking.wandb={mode}: {describe(error)}. W&B files are written offline instead; upload them later "
            f"with: wandb sync {directory}/offline-run-*"
        )
        # The service would still hold the run id, and the directory an online run without content.
        wandb.teardown()
        for failed_dir in directory.glob("run-*"):
            shutil.rmtree(failed_dir)
        run = wandb.init(mode="offline", settings=settings, **job)
    # Without these W&B counts calls on the x axis and fills the summary with the last values of the curve.
    run.define_metric("step", summary="none")
    run.define_metric("*", step_metric="step", summary="none")
    return run


def log_report(report_dir: Path, *, sweep: str, mode: WandbMode, project: str, entity: str | None = None) -> None:
    """Makes a W&B run of job type `report` that carries a sweep's report folder as an artifact.

    The W&B files lie in `report_dir/wandb`, which is emptied first; `wandb sync` uploads those of an offline run.
    Called where no run is being measured, so in this process.

    Raises:
        TrackingError: W&B did not take it; the message says why. The report itself is complete.
    """
    directory = report_dir / WANDB_DIR
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir()
    # Copies of the files wait here for the upload, and not in the home directory.
    for variable, folder in (("WANDB_CACHE_DIR", "cache"), ("WANDB_DATA_DIR", "data")):
        os.environ[variable] = str(directory / folder)
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    try:
        import wandb

        job = {"mode": str(mode), "dir": str(report_dir), "project": project, "entity": entity, "group": sweep}
        limits = {"start_seconds": ONLINE_START_SECONDS, "upload_seconds": UPLOAD_SECONDS}
        run = _start_wandb_run({**job, **limits, "job_type": "report", "name": f"{sweep} report"})
        artifact = wandb.Artifact(f"{sweep}-report", type="report")
        for path in sorted(report_dir.rglob("*")):
            if path.is_file() and directory not in path.parents:
                artifact.add_file(str(path), name=path.relative_to(report_dir).as_posix())
        run.log_artifact(artifact)
        run.finish()
        wandb.teardown()
    except (Exception, SystemExit) as error:  # as in the mirror
        raise TrackingError(
            f"wandb={mode}: {describe(error)}. The report in {report_dir} is complete; only W&B has not got it."
        ) from error
