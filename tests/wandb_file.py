"""Reads the `.wandb` file of a run, what `wandb sync` would upload, without wandb's own (private) reader.

The file is a 7-byte header and then a LevelDB log: blocks of 32 KiB, in them records of 4 bytes CRC-32 (of type and
data), 2 bytes length, 1 byte type, data. A record that crosses a block is split into parts. The joined data is one
`wandb_internal.Record` protobuf message. Keys that start with an underscore are W&B's own and left out.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_MAGIC = b":W&B"
_FILE_HEADER_BYTES = 7
_BLOCK_BYTES = 32 * 1024
_RECORD_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class WandbRun:
    """One run as W&B will show it. `exit_code` is None as long as the run has not ended."""

    project: str = ""
    entity: str = ""
    run_id: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def read_wandb_file(path: Path) -> WandbRun:
    """Reads a whole file; raises `ValueError` for one that is damaged or not written to its end."""
    run = WandbRun()
    for data in _read_records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.project, run.entity = record.run.project, record.run.entity
            run.run_id, run.name = record.run.run_id, record.run.display_name
            run.group, run.job_type = record.run.run_group, record.run.job_type
            run.tags = list(record.run.tags)
            _update(run.config, record.run.config)
        elif kind == "config":
            _update(run.config, record.config)
        elif kind == "history":
            run.history.append(dict(_items(record.history.item)))
        elif kind == "summary":
            _update(run.summary, record.summary)
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _read_records(content: bytes) -> Iterator[bytes]:
    if not content.startswith(_MAGIC):
        raise ValueError(f"not a .wandb file: it starts with {content[:4]!r}")
    position, joined, is_split = _FILE_HEADER_BYTES, b"", False
    while position < len(content):
        room = _BLOCK_BYTES - position % _BLOCK_BYTES
        if room < _RECORD_HEADER.size:
            position += room
            continue
        checksum, length, kind = _RECORD_HEADER.unpack_from(content, position)
        start = position + _RECORD_HEADER.size
        data = content[start : start + length]
        if len(data) < length or checksum != zlib.crc32(data, zlib.crc32(bytes([kind]))):
            raise ValueError(f"the record at byte {position} is damaged")
        if is_split != (kind in (_MIDDLE, _LAST)):
            raise ValueError(f"the record at byte {position} has type {kind}, which cannot follow what is before it")
        joined, is_split = joined + data, kind in (_FIRST, _MIDDLE)
        if not is_split:
            yield joined
            joined = b""
        position = start + length
    if is_split:
        raise ValueError("the last record is incomplete")


def _update(values: dict[str, Any], record: Any) -> None:
    values.update(_items(record.update))
    for item in record.remove:
        values.pop(item.key, None)


def _items(items: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for item in items:
        name, *inner = [item.key] if item.key else item.nested_key
        if name.startswith("_"):
            continue
        if inner:
            raise ValueError(f"{'.'.join([name, *inner])}: a value inside a value is nothing that the harness logs")
        yield name, json.loads(item.value_json)


def read_artifacts(path: Path) -> list[tuple[str, str, set[str]]]:
    """Name, type and file names of every artifact that a run logs."""
    found = []
    for data in _read_records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        for artifact in (record.artifact, record.request.log_artifact.artifact):
            if artifact.name:
                files = {entry.path for entry in artifact.manifest.contents}
                found.append((artifact.name, artifact.type, files))
    return found
