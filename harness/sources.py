"""Where rows come from: files of several formats, assets, the hub. A table per split, and what names their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import pandas as pd

from harness.assets import asset_dir
from harness.config import DatasetConfig


class DataError(ValueError):
    """Data that cannot be used; the message counts what is wrong, shows some of it, and names the setting."""


@dataclass(frozen=True)
class Source:
    """Rows that are not read yet: the fingerprint is enough to find them in the cache of tokenised data.

    `read` returns a table for each split, and the names of the classes in their order where the data have one.
    """

    description: str
    fingerprint: str
    read: Callable[[], tuple[dict[str, pd.DataFrame], list[str]]]


def open_source(config: DatasetConfig) -> Source:
    """Finds the rows that a config names, without reading them where possible. Raises `DataError`."""
    if config.hub_id is not None and config.path is None:
        return _open_hub(config)
    return _open_files(config)


def _open_files(config: DatasetConfig) -> Source:
    folder, given = None, {"train": config.train_file, "val": config.val_file, "test": config.test_file}
    if config.path is not None:
        folder = Path(config.path).expanduser()
        if folder.is_file() and config.train_file is None:
            folder, given["train"] = folder.parent, folder.name
        elif not folder.is_dir():
            raise DataError(f"dataset.path={config.path}: no such folder. Give the folder that holds {_named(given)}.")
    elif config.asset is not None:
        folder = asset_dir(config.asset)
    files: dict[str, Path] = {}
    for split, name in given.items():
        if name is None:
            continue
        path = (folder / name) if folder is not None else Path(name).expanduser()
        if not path.is_file():
            raise DataError(f"dataset.{split}_file={name}: no file {path}. There: {_listing(path.parent)}.")
        if path.suffix not in (*_READERS, ".txt"):
            raise DataError(f"dataset.{split}_file={name}: known endings are {', '.join(_READERS)}, .txt.")
        files[split] = path
    if "train" not in files:
        there = f" In {folder}: {_listing(folder)}." if folder is not None else ""
        raise DataError(f"dataset.train_file: not set. Name the file with the training rows.{there}")

    def read() -> tuple[dict[str, pd.DataFrame], list[str]]:
        return {split: _read_file(path, config) for split, path in files.items()}, []

    hashes = {split: file_digest(path) for split, path in files.items()}
    if config.task.is_language:  # the same bytes are other rows under another ending
        hashes |= {f"{split}_ending": path.suffix for split, path in files.items()}
    if any(path.suffix == ".txt" for path in files.values()) and config.line_separator is not None:
        hashes["lines"] = json.dumps([config.line_separator, config.line_columns])
    description = ", ".join(path.name for path in files.values())
    return Source(description, digest(json.dumps(hashes)), read)


def _named(given: dict[str, str | None]) -> str:
    return ", ".join(name for name in given.values() if name is not None) or "dataset.train_file"


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return (", ".join(names[:10]) + (", ..." if len(names) > 10 else "")) or "nothing"


def file_digest(path: Path) -> str:
    """The sha256 of a file's content, 64 hex digits. Raises `DataError` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def _open_hub(config: DatasetConfig) -> Source:
    wanted = {"train": config.train_split, "val": config.val_split, "test": config.test_split}
    names = {split: name for split, name in wanted.items() if name is not None}

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

    def read() -> tuple[dict[str, pd.DataFrame], list[str]]:
        tables, label_names = {}, []
        for split, name in names.items():
            rows = loaded.get(split) or load(name)
            feature = rows.features.get(config.label_column)
            table = rows.to_pandas()
            if isinstance(feature, datasets.ClassLabel):
                # Their order counts: F1 is that of class 1, in MRPC `equivalent` and not the first of the alphabet.
                label_names = feature.names
                # GLUE marks hidden labels with -1: they must not become a class.
                table[config.label_column] = [
                    feature.int2str(int(label)) if label >= 0 else f"hidden ({label})"
                    for label in table[config.label_column]
                ]
            tables[split] = table
        return tables, label_names

    fingerprint = digest(json.dumps([config.hub_id, config.subset, content, names], sort_keys=True))
    return Source(f"{config.hub_id} {config.subset or ''}".strip(), fingerprint, read)


def _read_file(path: Path, config: DatasetConfig) -> pd.DataFrame:
    try:
        if path.suffix == ".txt":
            return _read_lines(path, config)
        return _READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({_first_bad_line(path)}); save it as UTF-8.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as {path.suffix} ({_first_line(error)}).") from error


def read_column(path: Path, column: str) -> list[str]:
    """The texts of one column of a file of rows. Raises `DataError`."""
    table = _read_file(path, DatasetConfig())
    if column not in table.columns:
        raise DataError(f"{path.name}: no column {column}; it has {', '.join(map(str, table.columns))}.")
    return [text for text in table[column] if isinstance(text, str)]


def _first_bad_line(path: Path) -> str:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            return f"line {number}: {line[max(0, error.start - 20) : error.start + 20]!r}"
    raise AssertionError(f"{path} is UTF-8")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _read_lines(path: Path, config: DatasetConfig) -> pd.DataFrame:
    """A row for each line that is not blank: one column `text`, or the parts between `line_separator`."""
    lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    if config.line_separator is None:
        return pd.DataFrame({"text": lines})
    names = config.line_columns
    rows = [line.split(config.line_separator) for line in lines]
    odd = [number for number, row in enumerate(rows, start=1) if len(row) != len(names)]
    if odd:
        raise ValueError(
            f"{len(odd)} lines have not the {len(names)} parts {', '.join(names)} between {config.line_separator!r}, "
            f"the first is number {odd[0]} of those that are not blank: {lines[odd[0] - 1][:60]}"
        )
    return pd.DataFrame(rows, columns=names)


def _read_csv(path: Path) -> pd.DataFrame:
    # Everything as text: a label "NA" or "007" stays what it is.
    table = pd.read_csv(path, dtype=str, keep_default_na=False, sep="\t" if path.suffix == ".tsv" else ",")
    if not isinstance(table.index, pd.RangeIndex):
        # pandas would take the first field for the row's name and shift the others.
        raise ValueError(f"the rows have more fields than the header's {len(table.columns)}")
    return table


def _read_json_lines(path: Path) -> pd.DataFrame:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"line {number}: {error.msg} at character {error.pos + 1}: {line.strip()[:60]}"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object; one object per line: {line.strip()[:60]}")
            rows.append(row)
    return pd.DataFrame(rows)


def _read_parquet(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path)


def _read_orange_tab(path: Path) -> pd.DataFrame:
    """Orange's tab-separated format: three header lines (names, types, flags), then rows; blank rows are skipped."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    if len(lines) < 4:
        raise ValueError("three header lines are needed: names, types and flags of the columns")
    names = lines[0].split("\t")
    rows = [line.split("\t") for line in lines[3:] if line.strip()]
    odd = [row for row in rows if len(row) != len(names)]
    if odd:
        raise ValueError(f"{len(odd)} rows have not the {len(names)} columns {', '.join(names)}")
    return pd.DataFrame(rows, columns=names)


_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
    ".tab": _read_orange_tab,
}


def counted_rows(rows: pd.Index) -> str:
    """How many rows, and the first of them."""
    shown = ", ".join(str(row) for row in rows[:5])
    return f"{len(rows)} rows (counted from 0): {shown}{', ...' if len(rows) > 5 else ''}"


def digest(*parts: str) -> str:
    """64 hex digits that name these texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
