"""Texts with a label: from a `DatasetConfig` to tokenised splits.

Everything is tokenised once per dataset and tokenizer and kept in the cache folder; subsets, the validation split and
the order of examples are drawn from the cached rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pandas as pd
import torch

from harness.config.schema import BadRows, DatasetConfig, Task, TooLong
from harness.content.assets import cache_dir
from harness.content.errors import DataError
from harness.data.batches import Batch
from harness.data.readers import place
from harness.data.row_checks import (
    equal_rows_notes,
    label_faults,
    label_text,
    look_alike_labels,
    number,
    number_faults,
    text_faults,
    without_faults,
)
from harness.data.sources import Rows, Source, column_problems, digest, open_source
from harness.data.splits import SPLITS, choose_rows, hold_out_rows
from harness.processes.preparation import once

logger = logging.getLogger(__name__)

# Part of the cache key: raise it when the rows made from the same files change.
_FORMAT = 4

# What a folder of tokenised rows says of them; written last.
_DESCRIPTION = "described.json"

# Columns of tokenised rows that no batch holds: what stands for a row's text, whether it was truncated, and where the
# row stands in its source.
_TEXT_DIGEST, _IS_CUT, _SOURCE_ROW = "text_digest", "is_cut", "source_row"


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    pad_token_id: int
    model_input_names: list[str]

    def __call__(self, *texts: Any, **options: Any) -> Any:
        """Tokenises one or two lists of texts."""


def _column(rows: datasets.Dataset, name: str) -> np.ndarray:
    """A column of numbers at once; without a format, datasets goes through it row by row."""
    return np.asarray(rows.with_format("numpy", columns=[name])[:][name])


class Split:
    """The tokenised examples of one split, in a fixed order.

    `source` and `source_rows` say where each stands: "test.csv line" and the numbers of the lines.
    """

    def __init__(self, rows: datasets.Dataset, *, pad_token_id: int, task: Task, source: str) -> None:
        self._rows = rows
        self.source = source
        self.source_rows = _column(rows, _SOURCE_ROW)
        self._pad_token_id = pad_token_id
        self._label_dtype = torch.float32 if task is Task.regression else torch.int64
        self.labels = _column(rows, "label")
        self.lengths = _column(rows, "length").astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The examples at `indices` as one batch, padded to the longest of them."""
        columns = self._rows[[int(index) for index in indices]]
        lengths = self.lengths[np.asarray(indices)]
        width = int(lengths.max())
        inputs = {}
        for name in self._rows.column_names:
            if name in ("label", "length", _TEXT_DIGEST, _IS_CUT, _SOURCE_ROW):
                continue
            fill = self._pad_token_id if name == "input_ids" else 0
            padded = np.full((len(lengths), width), fill, dtype=np.int64)
            for row, values in enumerate(columns[name]):
                padded[row, : len(values)] = values
            inputs[name] = torch.from_numpy(padded)
        inputs["attention_mask"] = torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64))
        labels = torch.tensor(columns["label"], dtype=self._label_dtype)
        return Batch(inputs, labels, num_tokens=int(lengths.sum()), num_targets=len(lengths))

    @property
    def scoring_order(self) -> np.ndarray:
        """The numbers of the examples in the order of `batches`."""
        return np.argsort(-self.lengths, kind="stable")

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every example once, longest first: padding is least, and a batch that is too large fails at once."""
        order = self.scoring_order
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size])


@dataclass(frozen=True)
class TextData:
    """A dataset ready for training. `label_names` is empty for regression, and `test` None where it was not to be read.

    `notes` says what was skipped, left out, truncated or looks wrong, one sentence each.
    """

    train: Split
    val: Split
    test: Split | None
    label_names: list[str]
    fingerprint: str
    notes: list[str]
    positive_class: int | None = None
    """Of two classes, the one of which F1 is the score; None for any other number."""

    @property
    def num_labels(self) -> int:
        """Outputs of the head."""
        return len(self.label_names) or 1


def load_data(config: DatasetConfig, tokenizer: Tokenizer, *, with_test: bool = True) -> TextData:
    """Reads, checks, tokenises (once) and splits a dataset. Without test, a test split of the data is not opened.

    Raises:
        DataError: files or columns that do not exist, rows with empty text, labels that training has not, too few
            classes or rows; each counted and shown.
    """
    source = open_source(config, with_test=with_test)
    key = digest(source.fingerprint, tokenizer_text(tokenizer), _tokenising_settings(config, tokenizer))[:16]
    folder = cache_dir() / "tokenised" / f"{config.name}-{key}"
    if not (folder / _DESCRIPTION).is_file():
        once(lambda: _tokenise(source, config, tokenizer, folder))
    rows = {name: datasets.load_from_disk(str(folder / name)) for name in SPLITS if (folder / name).is_dir()}
    described = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
    rows, notes = _fitting(rows, config)
    splits = _split(rows, config, with_test=with_test)

    def split(name: str) -> Split:
        # What was held out of train stands where train does.
        source = described["sources"][name if name in rows else "train"]
        return Split(splits[name], pad_token_id=tokenizer.pad_token_id, task=config.task, source=source)

    label_names = described["label_names"]
    return TextData(
        split("train"),
        split("val"),
        split("test") if with_test else None,
        label_names,
        source.fingerprint,
        [*described["notes"], *notes, *_split_notes(splits, config)],
        _positive_class(label_names, config),
    )


def _positive_class(label_names: list[str], config: DatasetConfig) -> int | None:
    named = config.positive_label
    if named is None:
        return 1 if len(label_names) == 2 else None
    if len(label_names) != 2:
        raise DataError(
            f"dataset.positive_label={named!r}: {config.name} has {len(label_names)} classes, over which f1 is the "
            "mean; set it to null."
        )
    if named not in label_names:
        raise DataError(
            f"dataset.positive_label={named!r}: the classes of {config.name} are {', '.join(map(repr, label_names))}."
        )
    return label_names.index(named)


def _fitting(rows: dict[str, datasets.Dataset], config: DatasetConfig) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """The rows that `too_long` lets through, and a sentence for each split that lost some. Raises `DataError`."""
    is_cut = {name: _column(table, _IS_CUT).astype(bool) for name, table in rows.items()}
    counts = {name: int(cut.sum()) for name, cut in is_cut.items() if cut.any()}
    if config.too_long is TooLong.truncate or not counts:
        return rows, []
    found = [
        f"dataset={config.name}, {name}: {count} of {len(rows[name])} texts are longer than "
        f"dataset.max_length={config.max_length} tokens"
        for name, count in counts.items()
    ]
    if config.too_long is TooLong.error:
        raise DataError(
            "\n".join(f"{what}; give a larger one, or dataset.too_long=truncate or drop." for what in found)
        )
    kept = {name: table.select(np.flatnonzero(~is_cut[name])) for name, table in rows.items()}
    empty = [name for name, table in kept.items() if not len(table)]
    if empty:
        raise DataError(f"dataset={config.name}: dataset.too_long=drop leaves no rows in {' and '.join(empty)}.")
    return kept, [f"{what} and are left out (dataset.too_long=drop)." for what in found]


def _split_notes(splits: dict[str, datasets.Dataset], config: DatasetConfig) -> list[str]:
    """Which texts are truncated, and which are in two splits."""
    cut = {name: int(_column(rows, _IS_CUT).sum()) for name, rows in splits.items()}
    notes = [
        f"dataset={config.name}, {name}: {cut[name]} of {len(rows)} texts are longer than "
        f"dataset.max_length={config.max_length} tokens and are truncated."
        for name, rows in splits.items()
        if cut[name]
    ]
    keys = {
        name: (_column(rows, _TEXT_DIGEST).tolist(), _column(rows, "label").tolist()) for name, rows in splits.items()
    }
    return [*notes, *equal_rows_notes(config.name, keys, what="text")]


def _split(rows: dict[str, datasets.Dataset], config: DatasetConfig, *, with_test: bool) -> dict[str, datasets.Dataset]:
    """The rows of train, val and test. Raises `DataError`."""
    labels = _column(rows["train"], "label")
    stratify = config.task is Task.classification

    def hold_out(numbers: np.ndarray, fraction: float, name: str) -> np.ndarray:
        return hold_out_rows(labels[numbers], fraction, name, config, stratify=stratify)

    groups = {name: np.arange(len(table)) for name, table in rows.items()}
    chosen = choose_rows(groups, config, hold_out=hold_out, keep_order=False, with_test=with_test)
    splits = {name: rows[table].select(numbers) for name, (table, numbers) in chosen.items()}
    if stratify and len(np.unique(_column(splits["train"], "label"))) < 2:
        raise DataError(
            f"dataset={config.name}: the {len(splits['train'])} training rows are all of one class; "
            "take more rows (dataset.num_train_examples) or another dataset.subset_seed."
        )
    return splits


def tokenizer_text(tokenizer: Any) -> str:
    """A text that changes whenever the tokenizer would truncate a text differently."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        described = json.loads(backend.to_str())
        # Left behind by the previous call; we truncate by dataset.max_length and pad batch by batch.
        del described["truncation"], described["padding"]
        return json.dumps(described)
    return repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs))


def _tokenising_settings(config: DatasetConfig, tokenizer: Tokenizer) -> str:
    # The inputs too: BERT and DistilBERT split texts alike, and only one of them takes token types.
    inputs = tokenizer.model_input_names
    chosen = [config.task, config.text_columns, config.label_column, config.max_length, config.bad_rows]
    return json.dumps([_FORMAT, *chosen, inputs])


def _tokenise(source: Source, config: DatasetConfig, tokenizer: Tokenizer, folder: Path) -> None:
    started = time.perf_counter()
    rows = source.read()
    tables, label_names, notes = _checked_rows(rows, config, source)
    sources = {name: table.index.name for name, table in tables.items()}
    described = {"label_names": label_names, "notes": notes, "sources": sources}
    columns = {name: _tokenised_columns(table, config, tokenizer, label_names) for name, table in tables.items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-", ignore_cleanup_errors=True) as scratch,
            _no_progress_bars(),
        ):
            # One level down, because a temporary directory is closed to other users and its mode survives a rename.
            building = Path(scratch) / folder.name
            for name in tables:
                datasets.Dataset.from_dict(columns[name]).save_to_disk(str(building / name))
            (building / _DESCRIPTION).write_text(json.dumps(described), encoding="utf-8")
            try:
                os.rename(building, folder)
            except OSError:
                # Another process tokenised the same in the meantime: its folder is as good as ours.
                if not (folder / _DESCRIPTION).is_file():
                    raise
    except OSError as error:
        raise DataError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror or error}); set LORA_HARNESS_CACHE "
            "to another one."
        ) from error
    num_rows = sum(len(table) for table in tables.values())
    logger.info("tokenised %s: %d rows in %.1f s", config.name, num_rows, time.perf_counter() - started)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _tokenised_columns(
    table: pd.DataFrame, config: DatasetConfig, tokenizer: Tokenizer, label_names: list[str]
) -> dict[str, list[Any]]:
    texts = [table[column].tolist() for column in config.text_columns]
    encoded = tokenizer(*texts, truncation=True, max_length=config.max_length)
    columns = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
    # Rebuilt from the lengths when a batch is padded.
    columns.pop("attention_mask", None)
    columns["length"] = [len(ids) for ids in encoded["input_ids"]]
    columns[_IS_CUT] = _are_cut(encoded, texts, config, tokenizer)
    columns[_TEXT_DIGEST] = [_text_digest(row) for row in zip(*texts, strict=True)]
    columns[_SOURCE_ROW] = table.index.tolist()
    if config.task is Task.regression:
        columns["label"] = [number(label) for label in table[config.label_column]]
    else:
        index = {name: position for position, name in enumerate(label_names)}
        columns["label"] = [index[label] for label in table[config.label_column]]
    return columns


def _text_digest(texts: Sequence[str]) -> int:
    """A number of 63 bits that stands for the texts of a row."""
    hashed = hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") >> 1


def _are_cut(encoded: Any, texts: list[list[str]], config: DatasetConfig, tokenizer: Tokenizer) -> list[bool]:
    if getattr(encoded, "encodings", None):
        return [bool(encoding.overflowing) for encoding in encoded.encodings]
    # A tokenizer without the fast backend does not say what it truncated.
    full = [at for at, ids in enumerate(encoded["input_ids"]) if len(ids) == config.max_length]
    whole = tokenizer(*([column[at] for at in full] for column in texts))["input_ids"] if full else []
    cut = {at for at, ids in zip(full, whole, strict=True) if len(ids) > config.max_length}
    return [at in cut for at in range(len(encoded["input_ids"]))]


def _checked_rows(
    rows: Rows, config: DatasetConfig, source: Source
) -> tuple[dict[str, pd.DataFrame], list[str], list[str]]:
    """The usable rows of each split with labels as names, the names of the classes, and what was left out.

    The classes are in the order that the source gives them; where it gives none, they are the sorted labels of train.
    Raises one `DataError` for all problems of all rows.
    """
    problems: list[str] = []
    notes = list(rows.notes)
    tables = {}
    for name, table in rows.tables.items():
        where = f"dataset={config.name}, {name} rows of {source.description}"
        if table.empty:
            problems.append(f"{where}: no rows.")
            continue
        absent = column_problems(
            table,
            (*config.text_columns, config.label_column),
            where=where,
            setting="dataset.text_columns (one or two) and dataset.label_column",
        )
        if absent:
            problems += absent
            continue
        check_labels = number_faults if config.task is Task.regression else label_faults
        checked = [
            *(text_faults(table, column, where=where) for column in config.text_columns),
            check_labels(table, config.label_column, where=where),
        ]
        for _, found in checked:
            problems += found
        faults = {what: where_found for found, _ in checked for what, where_found in found.items()}
        drop = config.bad_rows is BadRows.drop
        tables[name], found = without_faults(table, faults, where=where, drop=drop, notes=notes)
        problems += found
    if problems:
        raise DataError("\n".join(problems))
    if config.task is Task.regression:
        return tables, [], notes
    tables = {
        name: table.assign(**{config.label_column: pd.Series(map(label_text, table[config.label_column]), table.index)})
        for name, table in tables.items()
    }
    names = rows.label_names or _sorted_labels(tables["train"][config.label_column])
    problems = _label_problems(tables, config, names, notes)
    if problems:
        raise DataError("\n".join(problems))
    return tables, names, notes


def _label_problems(
    tables: dict[str, pd.DataFrame], config: DatasetConfig, names: list[str], notes: list[str]
) -> list[str]:
    column = config.label_column
    alike, in_case = look_alike_labels({split: table[column] for split, table in tables.items()})
    notes += [f"dataset={config.name}: labels differ in case alone: {', '.join(group)}." for group in in_case]
    if alike:
        return [
            f"dataset={config.name}: labels in column {column} look alike and would be different classes: "
            f"{', '.join(group)}. Write them alike in the file."
            for group in alike
        ]
    problems = []
    if len(names) < 2:
        problems.append(
            f"dataset={config.name}: column {column} has {len(names)} class(es) in train ({', '.join(names)}); at "
            "least 2 are needed."
        )
    for split, table in tables.items():
        is_unknown = ~table[column].isin(names).to_numpy()
        if is_unknown.any():
            shown = ", ".join(
                f"{label!r} ({count})" for label, count in Counter(table[column][is_unknown]).most_common(5)
            )
            problems.append(
                f"dataset={config.name}: {is_unknown.sum()} {split} rows have labels that are not among the "
                f"{len(names)} of train: {shown}; the first is {place(table.index, int(is_unknown.argmax()))}."
            )
    return problems


def _sorted_labels(column: pd.Series) -> list[str]:
    names = sorted(set(column))
    return sorted(names, key=int) if all(re.fullmatch(r"-?\d+", name) for name in names) else names
