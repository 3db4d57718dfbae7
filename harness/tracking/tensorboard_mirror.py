"""TensorBoard event files, as a mirror of the local files, written in their own process (`harness.tracking.mirror`)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.tracking.mirror import FILES_SECONDS, RESULT_PREFIX, Mirrored, MirrorTracker, run_mirror

MIRRORED = Mirrored("TensorBoard", __name__, "tracking.tensorboard=true", "tracking.tensorboard=false")


def open_tensorboard(directory: Path, job: Mapping[str, Any]) -> MirrorTracker:
    """Starts mirroring a run to an event file, which `tensorboard --logdir runs` reads with those of other runs.

    Scalars have the names of `metrics.jsonl`, and the metrics of the result the same under `result/` at the last step,
    all in double precision; the config and the status are texts, `config` and `result/status`.

    Args:
        directory: of the event file; emptied first.
        job: `directory` and `config` of the run.

    Raises:
        OSError: `directory` cannot be written or the process cannot be started.
    """
    job = {**job, "directory": str(directory)}
    return MirrorTracker(directory, job, mirrored=MIRRORED, end_seconds=FILES_SECONDS, environment={})


def mirror() -> None:
    """Body of the mirror process."""
    run_mirror(_EventWriter)


class _EventWriter:
    """An event file in the format that torch.utils.tensorboard writes, without importing torch for it."""

    def __init__(self, job: dict[str, Any]) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._last_step = 0
        self._file = EventFileWriter(job["directory"])
        self._text("config", f"```json\n{json.dumps(job['config'], indent=2)}\n```")

    def log(self, record: dict[str, Any]) -> None:
        self._last_step = record.pop("step")
        for name, value in record.items():
            if name == "non_finite":
                self._text(name, ", ".join(value))
            else:
                self._scalar(name, value)

    def finish(self, summary: Mapping[str, Any], *, exit_code: int) -> None:
        for name, value in summary.items():
            write = self._text if isinstance(value, str) else self._scalar
            write(f"{RESULT_PREFIX}{name}", value)
        self._file.close()

    def _scalar(self, tag: str, value: float) -> None:
        self._add(tag, "scalars", {"dtype": "DT_DOUBLE", "double_val": [value]})

    def _text(self, tag: str, text: str) -> None:
        self._add(tag, "text", {"dtype": "DT_STRING", "string_val": [text.encode()]})

    def _add(self, tag: str, plugin: str, tensor: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto

        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin))
        value = Summary.Value(tag=tag, metadata=metadata, tensor=TensorProto(**tensor))
        self._file.add_event(Event(step=self._last_step, wall_time=time.time(), summary=Summary(value=[value])))
        # A run that is killed, and with it this process, leaves what was logged; and a page that is open follows.
        self._file.flush()
