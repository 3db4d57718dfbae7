"""Files of rows as they are written: every line becomes a row, is counted in a note, or is an error that names it.

A table keeps where its rows stand: its index holds line numbers as an editor shows them, or positions where a format
has no lines, and the name of the index says of which file. A row that is selected, held out or reordered keeps its
place, so that a message about a row can name it (`place`, `counted_rows`).
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet


@dataclass(frozen=True)
class ReadRows:
    """The rows of one file; `notes` says what was skipped or could be misread, one sentence each."""

    table: pd.DataFrame
    notes: list[str] = field(default_factory=list)


def read_rows(path: Path, *, line_separator: str | None = None, line_columns: Sequence[str] = ()) -> ReadRows:
    """Reads a file by its ending, one of `ENDINGS`.

    Lines of a .txt file are rows of one column `text`, or of `line_columns` between `line_separator`. Everything in
    .csv, .tsv, .tab and .txt is text: a label "NA" or "007" stays what it is.

    Raises `ValueError` for a file that is not what its ending says, naming the line, and `OSError`.
    """
    if path.suffix == ".txt":
        return _read_lines(path, line_separator, line_columns)
    try:
        return _READERS[path.suffix](path)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def place(rows: pd.Index, position: int) -> str:
    """Where a row stands, as `rows.csv line 7`."""
    return f"{rows.name} {rows[position]}"


def counted_rows(rows: pd.Index) -> str:
    """How many rows, and where the first of them stand."""
    shown = ", ".join(str(row) for row in rows[:5])
    return f"{len(rows)} rows ({rows.name} {shown}{', ...' if len(rows) > 5 else ''})"


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, or a number that is none."""
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)


def _physical_lines(path: Path) -> list[str]:
    """The lines of a file with their ends. A carriage return ends a line only where there is no line feed."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        text = file.read()
    end = "\n" if "\n" in text else "\r"
    lines = [line + end for line in text.split(end)]
    lines[-1] = lines[-1].removesuffix(end)
    return lines if lines[-1] else lines[:-1]


def _bare(line: str) -> str:
    """A line without its end."""
    return line.removesuffix("\n").removesuffix("\r")


def _table(path: Path, names: Sequence[str], rows: list[list[str]], numbers: list[int]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(names), index=_index(path, "line", numbers), dtype=object)


def _index(path: Path, unit: str, numbers: Sequence[int] | range) -> pd.Index:
    return pd.Index(numbers, name=f"{path.name} {unit}", dtype="int64")


def _header(names: Sequence[str]) -> list[str]:
    """The names of the columns; those without one get a name that no setting asks for by accident."""
    named = [name or f"Unnamed: {position}" for position, name in enumerate(names)]
    repeated = [name for name, count in Counter(named).items() if count > 1]
    if repeated:
        raise ValueError(f"the header names {', '.join(map(repr, repeated))} more than once; rename one of them")
    return named


def _require_lengths(rows: Sequence[Sequence[str]], numbers: Sequence[int], names: Sequence[str], hint: str) -> None:
    odd = [
        (number, len(row), row[0] if row else "")
        for number, row in zip(numbers, rows, strict=True)
        if len(row) != len(names)
    ]
    if odd:
        shown = ", ".join(f"line {number} has {count}" for number, count, _ in odd[:3])
        more = ", ..." if len(odd) > 3 else ""
        raise ValueError(
            f"{len(odd)} rows do not have the {len(names)} columns {', '.join(names)}: {shown}{more}; {hint}. The "
            f"first begins with {odd[0][2][:60]!r}"
        )


def _skipped_blank_lines(path: Path, numbers: Sequence[int], last: int) -> list[str]:
    """Blank lines between rows; those after the last row say nothing."""
    numbers = [number for number in numbers if number < last]
    if not numbers:
        return []
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return [f"{path.name}: {len(numbers)} blank lines are skipped (line {shown})."]


def _read_lines(path: Path, separator: str | None, names: Sequence[str]) -> ReadRows:
    """A row for each line that is not blank: one column `text`, or the parts between `separator`."""
    lines = [_bare(line) for line in _physical_lines(path)]
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
    blank = [number for number, line in enumerate(lines, start=1) if not line.strip()]
    notes = _skipped_blank_lines(path, blank, max(numbers, default=0))
    if separator is None:
        return ReadRows(_table(path, ["text"], [[lines[number - 1]] for number in numbers], numbers), notes)
    rows = [lines[number - 1].split(separator) for number in numbers]
    _require_lengths(rows, numbers, names, f"they are what stands between {separator!r}")
    return ReadRows(_table(path, names, rows, numbers), notes)


def _read_csv(path: Path) -> ReadRows:
    lines = _physical_lines(path)
    rows, numbers, blank = _quoted_rows(lines, ",")
    if not rows:
        raise ValueError("no header line: the file is empty")
    names, rows, header, numbers = _header(rows[0]), rows[1:], numbers[0], numbers[1:]
    _require_lengths(rows, numbers, names, "a field that holds a comma needs quotation marks")
    notes = _skipped_blank_lines(path, blank, max([header, *numbers]))
    return ReadRows(
        _table(path, names, rows, numbers), [*notes, *_rows_over_several_lines(path, lines, numbers, len(names), ",")]
    )


def _quoted_rows(lines: list[str], delimiter: str) -> tuple[list[list[str]], list[int], list[int]]:
    """Rows by RFC 4180, the line at which each begins, and blank lines. Raises `ValueError` for a stray quote."""
    rows: list[list[str]] = []
    numbers: list[int] = []
    blank: list[int] = []
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(2**31 - 1)
    start = 1
    try:
        for row in reader:
            # A line of spaces is no row where a row has several columns.
            if not row or (len(row) == 1 and not row[0].strip() and rows and len(rows[0]) > 1):
                blank.append(start)
            else:
                rows.append(row)
                numbers.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise ValueError(
                f"line {start}: a quotation mark opens a field that nothing closes before the file ends; double it "
                f"inside a quoted field, or take it out: {_bare(lines[start - 1])[:60]}"
            ) from error
        at = f"line {start}" if start == reader.line_num else f"line {start} to {reader.line_num}"
        raise ValueError(
            f"{at}: {error}; a field that holds quotation marks is quoted, and they are doubled inside it: "
            f"{_bare(lines[start - 1])[:60]}"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return rows, numbers, blank


def _rows_over_several_lines(
    path: Path, lines: list[str], numbers: list[int], num_columns: int, delimiter: str
) -> list[str]:
    """Says how many rows hold line breaks, and of which each line looks like a row: one quotation mark too few?"""
    ends = [*numbers[1:], len(lines) + 1][: len(numbers)]
    spans: list[tuple[int, int]] = []
    for start, end in zip(numbers, ends, strict=True):
        while end - 1 > start and not lines[end - 2].strip():
            end -= 1  # blank lines after the row
        if end - start > 1:
            spans.append((start, end - 1))
    if not spans:
        return []
    notes = [
        f"{path.name}: {len(spans)} rows go over several lines, inside quotation marks (line {spans[0][0]} to "
        f"{spans[0][1]}{', ...' if len(spans) > 1 else ''})."
    ]
    suspicious = [
        (start, end)
        for start, end in spans
        if all(lines[number - 1].count(delimiter) == num_columns - 1 for number in range(start, end + 1))
    ]
    if suspicious:
        start, end = suspicious[0]
        notes.append(
            f"{path.name}: in {len(suspicious)} of these rows every line has as many fields as a row (line {start} to "
            f"{end}{', ...' if len(suspicious) > 1 else ''}); see whether a quotation mark is missing there."
        )
    return notes


_QUOTED_FIELD = re.compile(r'"(?:[^"]|"")*"', re.DOTALL)


def _read_tsv(path: Path) -> ReadRows:
    """Tab-separated rows: a line each, quotation marks being text, unless the file quotes its fields consistently.

    GLUE's files and most others are written without quoting, and a text that begins with a quotation mark would swallow
    lines up to the next one. What pandas, R and spreadsheets write is quoted where it must be, or throughout.
    """
    lines = _physical_lines(path)
    found = [(number, _bare(line)) for number, line in enumerate(lines, start=1)]
    blank = [number for number, line in found if not line.strip(" ")]
    kept = [(number, line.split("\t")) for number, line in found if line.strip(" ")]
    if not kept:
        raise ValueError("no header line: the file is empty")
    numbers, rows = [number for number, _ in kept], [row for _, row in kept]
    marked = [number for number, row in kept[1:] if any(value.startswith('"') for value in row)]
    ragged = any(len(row) != len(rows[0]) for row in rows)
    notes: list[str] = []
    quoted = bool(marked or '"' in lines[0]) and (_quoted_over_lines(lines) if ragged else _is_quoted(rows))
    if quoted:
        rows, numbers, blank = _quoted_rows(lines, "\t")
        notes += _rows_over_several_lines(path, lines, numbers[1:], len(rows[0]), "\t")
    elif marked:
        index = _index(path, "line", marked)
        notes.append(
            f"{path.name}: in {counted_rows(index)} a field begins with a quotation mark, which is kept as text, "
            "because the file does not quote its fields throughout."
        )
    names = _header(rows[0])
    _require_lengths(rows[1:], numbers[1:], names, "fields are what stands between tabs")
    notes = [*_skipped_blank_lines(path, blank, max(numbers)), *notes]
    return ReadRows(_table(path, names, rows[1:], numbers[1:]), notes)


def _is_quoted(rows: list[list[str]]) -> bool:
    """Whether fields that begin with a quotation mark are quoted: each well formed, and quoted for a reason.

    The reason is a doubled quotation mark inside, or that the whole column is quoted but for its numbers.
    """
    any_quoted = False
    for column in zip(*rows[1:], strict=True):
        marked = [value for value in column if value.startswith('"')]
        if not marked:
            continue
        any_quoted = True
        if not all(_QUOTED_FIELD.fullmatch(value) for value in marked):
            return False
        needed = all('""' in value[1:-1] for value in marked)
        throughout = all(value.startswith('"') or _is_number_or_empty(value) for value in column)
        if not needed and not throughout:
            return False
    return any_quoted or all(_QUOTED_FIELD.fullmatch(name) for name in rows[0])


def _is_number_or_empty(value: str) -> bool:
    return re.fullmatch(r"\s*([+-]?\d+(\.\d*)?([eE][+-]?\d+)?)?\s*", value) is not None


def _quoted_over_lines(lines: list[str]) -> bool:
    """Whether a file whose lines are no rows has rows once quoted fields may hold tabs and line breaks."""
    try:
        rows, _, _ = _quoted_rows(lines, "\t")
    except ValueError:
        return False
    return all(len(row) == len(rows[0]) for row in rows)


def _read_orange_tab(path: Path) -> ReadRows:
    """Orange's tab-separated format: three header lines (names, types, flags), then rows; nothing is quoted."""
    lines = [_bare(line) for line in _physical_lines(path)]
    if len(lines) < 3:
        raise ValueError("three header lines are needed: names, types and flags of the columns")
    names = _header(lines[0].split("\t"))
    numbers = [number for number, line in enumerate(lines[3:], start=4) if line.strip()]
    # Orange itself leaves a blank line under its header.
    blank = [number for number in range(min(numbers, default=4), len(lines) + 1) if not lines[number - 1].strip()]
    rows = [lines[number - 1].split("\t") for number in numbers]
    _require_lengths(rows, numbers, names, "fields are what stands between tabs")
    return ReadRows(_table(path, names, rows, numbers), _skipped_blank_lines(path, blank, max(numbers, default=0)))


def _read_json(path: Path) -> ReadRows:
    """Objects: one a line, one after the other over several lines, or all in one array."""
    with path.open(encoding="utf-8-sig") as file:
        text = file.read()
    at = _skip_space(text, 0)
    if text[at : at + 1] == "[":
        return _objects(path, _array_values(text, at), [])
    lines = text.split("\n")
    if lines and not lines[-1].strip():
        lines.pop()
    values: list[tuple[int, Any]] = []
    blank: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            blank.append(number)
            continue
        try:
            values.append((number, _DECODER.decode(line)))
        except json.JSONDecodeError as error:
            if not values and not line.strip().endswith("}"):  # the first object goes over several lines
                return _objects(path, _following_values(text), [])
            raise ValueError(f"line {number}: {error.msg} at character {error.pos + 1}: {line.strip()[:60]}") from error
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return _objects(path, iter(values), _skipped_blank_lines(path, blank, max((n for n, _ in values), default=0)))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"an object names {repeated!r} more than once")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def _objects(path: Path, values: Iterator[tuple[int, Any]], notes: list[str]) -> ReadRows:
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    for number, value in values:
        if not isinstance(value, dict):
            shown = json.dumps(value, ensure_ascii=False)[:60]
            raise ValueError(f"line {number} is no JSON object; a row is one object, and here stands {shown}")
        rows.append(value)
        numbers.append(number)
    # As objects: a number beside a missing one would become another number (1 as 1.0).
    return ReadRows(pd.DataFrame(rows, index=_index(path, "line", numbers), dtype=object), notes)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\n\r":
        at += 1
    return at


def _value_at(text: str, at: int, line: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {error.lineno}: {error.msg} at character {error.colno}: {text.split(chr(10))[error.lineno - 1][:60]}"
        ) from error
    except ValueError as error:
        raise ValueError(f"line {line}: {error}") from error


def _following_values(text: str) -> Iterator[tuple[int, Any]]:
    """Values one after the other, each with the line at which it begins."""
    at, counted, line = _skip_space(text, 0), 0, 1
    while at < len(text):
        line, counted = line + text.count("\n", counted, at), at
        value, at = _value_at(text, at, line)
        yield line, value
        at = _skip_space(text, at)


def _array_values(text: str, at: int) -> Iterator[tuple[int, Any]]:
    """The values of the one array that begins at `at`, each with the line at which it begins."""
    at, counted, line = _skip_space(text, at + 1), 0, 1
    closed = at < len(text) and text[at] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        value, at = _value_at(text, at, line)
        yield line, value
        at = _skip_space(text, at)
        closed = text[at : at + 1] == "]"
        if not closed and text[at : at + 1] != ",":
            number = text.count("\n", 0, at) + 1
            raise ValueError(f"line {number}: after an object of the array, ',' or ']' is expected")
        at = _skip_space(text, at + 1) if not closed else at
    at = _skip_space(text, at + 1)
    if at < len(text):
        number = text.count("\n", 0, at) + 1
        raise ValueError(f"line {number}: something follows the array that holds the rows: {text[at : at + 60]}")


def _read_parquet(path: Path) -> ReadRows:
    # Without pandas' metadata a column that was an index is a column; whole numbers beside nulls stay whole.
    table = pyarrow.parquet.read_table(path)
    try:
        rows = table.to_pandas(ignore_metadata=True, integer_object_nulls=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"a text is not UTF-8: {error}") from error
    rows.index = _index(path, "row index", np.arange(len(rows)))
    return ReadRows(rows)


_READERS: dict[str, Callable[[Path], ReadRows]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".tab": _read_orange_tab,
}
ENDINGS = (*_READERS, ".txt")
"""The endings of files that can be read."""
