"""Where rows come from: files of several formats, assets, the hub. A table per split, and what names their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd

from harness.config.schema import DatasetConfig
from harness.content.digests import file_digest
from harness.content.errors import DataError
from harness.content.files import data_files
from harness.content.hub import is_offline
from harness.data.readers import ENDINGS, ReadRows, is_missing, read_rows


@dataclass(frozen=True)
class Rows:
    """The rows of each split as they were read.

    The index of a table says where its rows stand (`harness.data.readers`). `label_names` are the classes in their
    order where the data have one, else empty. `notes` says what was skipped or could be misread, one sentence each.
    """

    tables: dict[str, pd.DataFrame]
    label_names: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Source:
    """Rows that are not read yet: the fingerprint is enough to find them in the cache of tokenised data."""

    description: str
    fingerprint: str
    read: Callable[[], Rows]


def open_source(config: DatasetConfig, *, with_test: bool = True) -> Source:
    """Finds the rows that a config names, without reading them where possible. Raises `DataError`.

    Without test, a test split that lies by itself is not opened, and is in neither rows nor fingerprint.
    """
    if config.hub_id is not None and config.path is None:
        return _open_hub(config, with_test=with_test)
    return _open_files(config, with_test=with_test)


def _open_files(config: DatasetConfig, *, with_test: bool) -> Source:
    files = data_files(config, with_test=with_test)
    for split, path in files.items():
        if path.suffix not in ENDINGS:
            raise DataError(f"dataset.{split}_file={path.name}: known endings are {', '.join(ENDINGS)}.")

    def read() -> Rows:
        found = {split: _read_file(path, config) for split, path in files.items()}
        # One file may be several splits.
        notes = list(dict.fromkeys(note for rows in found.values() for note in rows.notes))
        return Rows({split: rows.table for split, rows in found.items()}, [], notes)

    hashes = {split: file_digest(path) for split, path in files.items()}
    # The same bytes are other rows under another ending. The .tab files of assets keep the fingerprints that stand in
    # earlier results.
    if config.task.is_language or any(path.suffix != ".tab" for path in files.values()):
        hashes |= {f"{split}_ending": path.suffix for split, path in files.items()}
    if any(path.suffix == ".txt" for path in files.values()) and config.line_separator is not None:
        hashes["lines"] = json.dumps([config.line_separator, config.line_columns])
    description = ", ".join(path.name for path in files.values())
    return Source(description, digest(json.dumps(hashes)), read)


def _open_hub(config: DatasetConfig, *, with_test: bool) -> Source:
    wanted = {"train": config.train_split, "val": config.val_split, "test": config.test_split if with_test else None}
    names = {split: name for split, name in wanted.items() if name is not None}
    if is_offline():
        datasets.config.HF_HUB_OFFLINE = True

    def load(name: str) -> datasets.Dataset:
        try:
            return datasets.load_dataset(config.hub_id, config.subset, split=name, revision=config.revision)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"dataset={config.name}: split {name} of {config.hub_id} could not be loaded "
                f"({_first_line(error)}). Without network, save the rows as CSV, JSON lines or Parquet and use "
                "dataset=local dataset.train_file=... (and test_file)."
            ) from error

    # A pinned revision names the content. Without one, only the loaded rows can say what they are.
    pinned = config.revision is not None and len(config.revision) == 40
    loaded = {} if pinned else {split: load(name) for split, name in names.items()}
    content = config.revision if pinned else {split: rows._fingerprint for split, rows in loaded.items()}

    def read() -> Rows:
        tables, label_names = {}, []
        for split, name in names.items():
            rows = loaded.get(split) or load(name)
            feature = rows.features.get(config.label_column)
            # Whole numbers beside nulls stay whole.
            table = rows.with_format("arrow")[:].to_pandas(ignore_metadata=True, integer_object_nulls=True)
            table.index = pd.RangeIndex(len(table), name=f"{name} row index")
            if isinstance(feature, datasets.ClassLabel):
                # Their order counts: F1 is that of class 1, in MRPC `equivalent` and not the first of the alphabet.
                label_names = feature.names
                table[config.label_column] = [_class_name(feature, label) for label in table[config.label_column]]
            tables[split] = table
        return Rows(tables, label_names, [])

    fingerprint = digest(json.dumps([config.hub_id, config.subset, content, names], sort_keys=True))
    return Source(f"{config.hub_id} {config.subset or ''}".strip(), fingerprint, read)


def _class_name(feature: datasets.ClassLabel, label: Any) -> str | None:
    if is_missing(label):
        return None
    # GLUE marks hidden labels with -1: they must not become a class.
    return str(feature.int2str(int(label))) if label >= 0 else f"hidden ({label})"


def _read_file(path: Path, config: DatasetConfig) -> ReadRows:
    try:
        return read_rows(path, line_separator=config.line_separator, line_columns=config.line_columns)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({_first_bad_line(path)}); save it as UTF-8.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as {path.suffix} ({_first_line(error)}).") from error


def read_column(path: Path, column: str) -> list[str]:
    """The texts of one column of a file of rows. Raises `DataError`."""
    table = _read_file(path, DatasetConfig()).table
    problems = column_problems(table, [column], where=path.name, setting="model.scratch.column")
    if problems:
        raise DataError("\n".join(problems))
    return [text for text in table[column] if isinstance(text, str)]


def column_problems(table: pd.DataFrame, columns: Sequence[str], *, where: str, setting: str) -> list[str]:
    """What is wrong where a table does not have these columns; `setting` is what names them."""
    absent = [column for column in columns if column not in table.columns]
    if not absent:
        return []
    problem = (
        f"{where}: no column {', '.join(absent)}; it has {', '.join(map(str, table.columns)) or 'none'}. Set {setting}."
    )
    lists = [str(name) for name in table.columns if isinstance(table[name].iloc[0], list)] if len(table) == 1 else []
    if lists:
        problem += (
            f" The whole file is one object: if its list {' or '.join(lists)} holds the rows, save that list alone, as "
            "an array or as one object per line."
        )
    return [problem]


def _first_bad_line(path: Path) -> str:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            return f"line {number}: {line[max(0, error.start - 20) : error.start + 20]!r}"
    raise AssertionError(f"{path} is UTF-8")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def digest(*parts: str) -> str:
    """64 hex digits that name these texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
