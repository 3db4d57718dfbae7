"""What rows may hold: texts that are text, labels that are one label each, and no row of test in train unsaid."""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from harness.data.readers import counted_rows, is_missing, place

# The kinds of row that can be left out (`dataset.bad_rows`), by what is said of them: where they stand in a table.
Faults = dict[str, list[bool]]


def text_faults(
    table: pd.DataFrame, column: str, *, where: str, may_be_empty: bool = False
) -> tuple[Faults, list[str]]:
    """Rows whose text is missing, empty or broken, and what is wrong whatever is left out: values that are not text."""
    values = table[column].tolist()
    faults = {
        f"column {column} is empty": [
            is_missing(value) or (isinstance(value, str) and not may_be_empty and not value.strip()) for value in values
        ],
        f"column {column} holds half of a surrogate pair, which is no character,": [*map(is_broken, values)],
    }
    other = [at for at, value in enumerate(values) if not isinstance(value, str) and not is_missing(value)]
    if not other:
        return faults, []
    shown = ", ".join(f"{values[at]!r:.40}" for at in other[:3])
    return faults, [
        f"{where}: column {column} has {len(other)} values that are not text: {shown} (the first at "
        f"{place(table.index, other[0])})."
    ]


def is_broken(text: Any) -> bool:
    """Whether a text has half of a surrogate pair: JSON can write one, and no file or tokenizer can take it."""
    if not isinstance(text, str) or text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def without_faults(
    table: pd.DataFrame, faults: Faults, *, where: str, drop: bool, notes: list[str]
) -> tuple[pd.DataFrame, list[str]]:
    """Leaves faulty rows out and counts them in `notes`, or says what is wrong: the rows that stay, the problems."""
    kept = np.ones(len(table), dtype=bool)
    problems = []
    for what, rows in faults.items():
        found = np.asarray(rows, dtype=bool)
        if not found.any():
            continue
        kept &= ~found
        said = f"{where}: {what} in {counted_rows(table.index[found])}"
        if drop and not found.all():
            notes.append(f"{said}; they are left out.")
        elif drop:
            problems.append(f"{where}: {what} in all {len(table)} rows.")
        else:
            problems.append(f"{said}; fix them, or leave them out with dataset.bad_rows=drop.")
    if drop and not problems and not kept.any():
        problems.append(f"{where}: no row is left once those are taken out: {', '.join(faults)}.")
    return table[kept] if drop else table, problems


def label_text(value: Any) -> str | None:
    """The name of a class, or None for what is no label (a list, an object, an infinite number).

    Numbers that are equal are one class, however a file writes them: 1.0 is named 1.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_ | int | np.integer):
        return str(value)
    if isinstance(value, float | np.floating) and math.isfinite(value):
        return str(int(value)) if float(value).is_integer() else str(float(value))
    return None


def label_faults(table: pd.DataFrame, column: str, *, where: str) -> tuple[Faults, list[str]]:
    """Rows without a label or with a broken one, and what is wrong whatever is left out: values that are no label."""
    values = table[column].tolist()
    faults = {
        f"column {column} has no label": [
            is_missing(value) or (isinstance(value, str) and not _visible(value)) for value in values
        ],
        f"column {column} holds half of a surrogate pair, which is no character,": [*map(is_broken, values)],
    }
    wrong = [at for at, value in enumerate(values) if not is_missing(value) and label_text(value) is None]
    if not wrong:
        return faults, []
    return faults, [
        f"{where}: column {column} holds {values[wrong[0]]!r:.40} in {counted_rows(table.index[wrong])}; a row has one "
        "label, which is a text, a number or a truth value."
    ]


def number_faults(table: pd.DataFrame, column: str, *, where: str) -> tuple[Faults, list[str]]:
    """Rows without a value to predict, and what is wrong whatever is left out: values that are no finite number."""
    values = table[column].tolist()
    missing = [is_missing(value) or (isinstance(value, str) and not value.strip()) for value in values]
    wrong = [at for at, value in enumerate(values) if not missing[at] and number(value) is None]
    if not wrong:
        return {f"column {column} has no number": missing}, []
    shown = ", ".join(f"{values[at]!r:.40}" for at in wrong[:5])
    return {f"column {column} has no number": missing}, [
        f"{where}: task=regression, but column {column} is no number in {counted_rows(table.index[wrong])}: {shown}."
    ]


def number(value: Any) -> float | None:
    """A finite number, or None; truth values are none, and texts are read as in a table (no 1_000, no nan)."""
    if isinstance(value, bool | np.bool_):
        return None
    if isinstance(value, str):
        if re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", value, re.ASCII) is None:
            return None
    elif not isinstance(value, int | float | np.integer | np.floating):
        return None
    found = float(value)
    return found if math.isfinite(found) else None


def look_alike_labels(columns: Mapping[str, pd.Series]) -> tuple[list[list[str]], list[list[str]]]:
    """Labels that look alike to a reader, and those that differ in the case of letters alone; described, in groups.

    Not distinguished are spaces at the ends, kinds and numbers of spaces, characters without a width, composed and
    decomposed accents, and 1.0 beside 1.

    Args:
        columns: names of classes by split; the index says where a row stands.
    """
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for column in columns.values():
        for at, label in enumerate(column):
            counts[label] += 1
            if label not in first:
                first[label] = place(column.index, at)
    described = {label: f"{label!a} ({count} rows, first {first[label]})" for label, count in counts.items()}

    def groups(key: Any, labels: Sequence[str]) -> list[list[str]]:
        found = defaultdict(list)
        for label in labels:
            found[key(label)].append(label)
        return [group for group in found.values() if len(group) > 1]

    alike = groups(_visible, list(counts))
    in_case = groups(
        lambda label: _visible(label).casefold(), list({_visible(label): label for label in counts}.values())
    )
    return [[described[label] for label in group] for group in alike], [
        [described[label] for label in group] for group in in_case
    ]


@functools.lru_cache(maxsize=4096)
def _visible(label: str) -> str:
    """What of a label is seen: without characters that have no width, accents composed, one space for any number."""
    composed = unicodedata.normalize("NFC", label)
    seen = "".join(
        character
        for character in composed
        if unicodedata.category(character) != "Cf" and not "\ufe00" <= character <= "\ufe0f"
    )
    seen = " ".join(seen.split())
    return seen.partition(".")[0] if re.fullmatch(r"[+-]?\d+\.0*", seen) else seen


def equal_rows_notes(
    name: str, splits: Mapping[str, tuple[Sequence[Hashable], Sequence[Hashable]]], *, what: str
) -> list[str]:
    """Says how many rows of a split have the text of a row of another one, and how many of these another label.

    Args:
        name: of the dataset.
        splits: of train, val and where it was read test, what stands for the text of each row, and its label or target.
        what: what the text is called.
    """
    notes = []
    for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
        if one not in splits or other not in splits:
            continue
        known: defaultdict[Hashable, set[Hashable]] = defaultdict(set)
        for text, label in zip(*splits[one], strict=True):
            known[text].add(label)
        equal = [(text, label) for text, label in zip(*splits[other], strict=True) if text in known]
        if not equal:
            continue
        differing = sum(label not in known[text] for text, label in equal)
        notes.append(
            f"dataset={name}: {len(equal)} of {len(splits[other][0])} {other} rows have the {what} of a row of {one}"
            f"{f', {differing} of them with another label or target' if differing else ''}."
        )
    return notes
