"""Trackio, as a mirror of the local files, in its own process (`harness.tracking.mirror`)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.tracking.mirror import FILES_SECONDS, RESULT_PREFIX, Mirrored, MirrorTracker, TrackingError, run_mirror

MIRRORED = Mirrored("Trackio", __name__, "tracking.trackio=true", "tracking.trackio=false")


def open_trackio(directory: Path, job: Mapping[str, Any]) -> MirrorTracker:
    """Starts mirroring a run to Trackio.

    Its records are those of `metrics.jsonl`, with their step; the last one holds the metrics of the result and its
    `status`, each under `result/`. They go where Trackio keeps all runs of a project: its own database in the home
    directory, or what TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL name. A run of the same name is replaced.

    Args:
        directory: of the mirror's log; emptied first.
        job: `project`, `name`, `group` and `config` of the run.

    Raises:
        OSError: `directory` cannot be written or the process cannot be started.
    """
    return MirrorTracker(directory, job, mirrored=MIRRORED, end_seconds=FILES_SECONDS, environment={})


def mirror() -> None:
    """Body of the mirror process."""
    run_mirror(_TrackioWriter)


class _TrackioWriter:
    """What `trackio.init` made of a job."""

    def __init__(self, job: dict[str, Any]) -> None:
        import trackio

        # Trackio warns where it could not keep something, and says nothing else.
        warnings.simplefilter("always")
        warnings.showwarning = self._complain
        self._complaints: list[str] = []
        self._last_step = 0
        with contextlib.suppress(ValueError):  # no such project yet
            for earlier in trackio.Api().runs(job["project"]):
                if earlier.name == job["name"]:
                    earlier.delete()
        # What a machine does beside the run is no number of the run.
        self._run = trackio.init(**job, embed=False, auto_log_gpu=False, auto_log_cpu=False)

    def _complain(self, message: Warning | str, category: type[Warning], *_: Any) -> None:
        if not issubclass(category, DeprecationWarning):
            self._complaints.append(str(message))

    def log(self, record: dict[str, Any]) -> None:
        self._last_step = record.pop("step")
        self._run.log(record, step=self._last_step)

    def finish(self, summary: Mapping[str, Any], *, exit_code: int) -> None:
        if summary:
            values = {f"{RESULT_PREFIX}{name}": value for name, value in summary.items()}
            self._run.log(values, step=self._last_step)
        self._run.finish()
        if self._complaints:
            raise TrackingError(self._complaints[0])
