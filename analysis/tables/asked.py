"""Tables as a person asks for them: any axes as rows and columns with any metrics inside, or chosen columns of all.

    report --rows method,rank --columns epochs --value test_accuracy        rows_by_columns
    report --columns method,rank,epochs,test_accuracy,peak_memory_bytes     chosen_columns

An axis is named by its title in the tables ("epochs"), or by its setting ("trainer.num_epochs"); a metric by its name
in the registry, with `/full` behind it for the ratio to full fine-tuning. Rows are conditions at the rate that is best
on val, with means over seeds, as in every table; where the learning rate is one of the axes they are cells at every
rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.axes import axes_of, axis_number, axis_text
from analysis.comparisons import Cell
from analysis.load import LoadError
from analysis.metrics import DERIVED, is_score, metric, title
from analysis.select import num_status, records, score
from analysis.tables.cells import MISSING, TIMES, edge_mark, recipe_mark, show_metric, show_rate, show_status
from analysis.tables.columns import (
    cell_names,
    learning_rate_column,
    metric_column,
    num_finished_column,
    run_ids_of,
    with_spread,
)
from analysis.tables.comparable import best_rows, comparison_of, full_of, ratio_to
from analysis.tables.notes import (
    NOTE_RATIO,
    bold_notes,
    collapsed_notes,
    count_note,
    edge_notes,
    recipe_notes,
)
from analysis.tables.structure import Column, PaperTable, text_table
from harness.results.metrics import METRICS
from harness.results.schema import Status


@dataclass(frozen=True)
class Asked:
    """What a person asks for.

    Attributes:
        rows: axes; none for chosen columns of the table of all conditions.
        columns: axes, or of chosen columns axes and metrics.
        values: metrics; none for the score on test by which each dataset is judged.
    """

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    values: tuple[str, ...] = ()


def asked_table(asked: Asked, table: pd.DataFrame, best: pd.DataFrame, frame: pd.DataFrame) -> PaperTable:
    """The table that was asked for.

    Args:
        asked: rows, columns, values.
        table: a row per cell, from `select.cells`.
        best: a row per condition, from `select.best_cells`.
        frame: a row per run, for settings that are no axes of their own.

    Raises:
        LoadError: a name that is no axis and no metric here, or rows without columns.
    """
    if (asked.rows or asked.values) and not (asked.rows and asked.columns):
        missing = "--columns" if asked.rows else "--rows" if asked.columns else "--rows and --columns"
        given = "--rows" if asked.rows else "--value"
        raise LoadError(f"{given}: needs {missing} besides, as in --rows rank --columns epochs --value test_accuracy")
    if not asked.rows:
        return _chosen_columns(asked.columns, best, frame)
    return _rows_by_columns(asked, table, best, frame)


# ---------------------------------------------------------------- axes by name


@dataclass(frozen=True)
class _Key:
    """An axis by which cells are told apart: its title, its value of a cell, and that as text."""

    name: str
    of: Callable[[Cell], Any]
    text: Callable[[Cell], str]


def _keys(table: pd.DataFrame) -> list[_Key]:
    """What names the cells of a table, beside their learning rate."""
    return [
        *(_key(name, lambda row, name=name: row[name]) for name in ("model", "dataset", "method", "rank")),  # type: ignore[misc]
        _key("target layers", lambda row: row["target_layers"]),
        *(_key(axis.name, lambda row, axis=axis: row[axis.setting]) for axis in axes_of(table.columns)),  # type: ignore[misc]
    ]


def _key(name: str, of: Callable[[Cell], Any]) -> _Key:
    def text(row: Cell) -> str:
        value = of(row)
        return MISSING if value is None else value if isinstance(value, str) else axis_text(value)

    return _Key(name, of, text)


_RATE = "learning rate"


def _rate_key() -> _Key:
    return _Key(_RATE, lambda row: row["learning_rate"], lambda row: show_rate(row["learning_rate"]))


def _find_key(asked: str, option: str, table: pd.DataFrame, frame: pd.DataFrame) -> _Key | None:
    """The axis of that name: one of the cells' own, or any setting of the runs' configs."""
    asked = asked.strip().removeprefix("config.")
    wanted = _plain(asked)
    by_name = {key.name.lower(): key for key in (*_keys(table), _rate_key())}
    by_name |= {"placement": by_name["target layers"], "rate": by_name["learning rate"], "lr": by_name["learning rate"]}
    by_name |= {_plain(axis.setting): by_name[axis.name.lower()] for axis in axes_of(table.columns)}
    if wanted in by_name:
        return by_name[wanted]
    # A group stands for its name: `variant` for `variant.name`.
    setting = f"config.{asked}" if f"config.{asked}.name" not in frame else f"config.{asked}.name"
    if setting == "config.seed":
        raise LoadError(
            f"{option} {asked}: means are taken over seeds, so that a seed is no row; runs.csv has each run"
        )
    if setting in frame and setting != "config.trainer.learning_rate":
        values = dict(zip(frame["run_id"], frame[setting], strict=True))
        return _key(setting.removeprefix("config."), lambda row: values[row["run_ids"][0]])
    return _rate_key() if setting == "config.trainer.learning_rate" else None


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _axis_names(table: pd.DataFrame) -> list[str]:
    return [key.name for key in (*_keys(table), _rate_key())]


# ---------------------------------------------------------------- metrics by name


@dataclass(frozen=True)
class _Value:
    """A metric, or its ratio to full fine-tuning; without a name the score on test of each dataset."""

    name: str | None
    is_ratio: bool = False

    def metric_of(self, row: Cell) -> str:
        return score(row, "test") if self.name is None else self.name

    def title_of(self, row: Cell) -> str:
        name = self.metric_of(row)
        return f"{metric(name).label} / full" if self.is_ratio else title(name)


def _find_value(asked: str, table: pd.DataFrame) -> _Value | None:
    name, slash, rest = asked.strip().partition("/")
    if (slash and rest.strip() != "full") or name.strip() not in _metric_names(table):
        return None
    return _Value(name.strip(), bool(slash))


def _metric_names(table: pd.DataFrame) -> list[str]:
    return [name for name in (*METRICS, *DERIVED) if name in table and table[f"{name}_n"].any()]


# ---------------------------------------------------------------- rows by columns


@dataclass(frozen=True)
class _Entry:
    """One number of the table: of which cell, and which row and column it stands in."""

    cell: Cell
    value: _Value
    line: tuple[Hashable, ...]
    heading: tuple[str, ...]


def _rows_by_columns(asked: Asked, table: pd.DataFrame, best: pd.DataFrame, frame: pd.DataFrame) -> PaperTable:
    row_keys = [_required_key(name, "--rows", table, frame) for name in asked.rows]
    column_keys = [_required_key(name, "--columns", table, frame) for name in asked.columns]
    twice = [name for name, count in Counter(key.name for key in (*row_keys, *column_keys)).items() if count > 1]
    if twice:
        raise LoadError(
            f"--rows and --columns: {twice[0]} is named twice, and an axis is one or the other. Leave one out"
        )
    values = [_required_value(name, "--value", table) for name in asked.values] or [_Value(None)]
    at_every_rate = any(key.name == _RATE for key in (*row_keys, *column_keys))
    cells = [{**row, "edge": None, "bounded": None} for row in records(table)] if at_every_rate else records(best)
    added = _added_keys(cells, row_keys, column_keys, _keys(table))
    keys = [*added, *row_keys]
    entries = list(_entries(cells, keys, column_keys, values))
    lines = _lines(entries, keys, values)
    full = full_of(records(best))
    texts = {(entry.line, entry.heading): (*_value_text(entry, full), entry) for entry in entries}
    # Among all rates the best on test would be chosen by test.
    bold = set() if at_every_rate else _bold(cells, entries)
    columns = _line_columns(lines, keys)
    num_keys = len(columns)
    for heading in _headings(entries, column_keys):
        found = [texts.get((line[0].line, heading)) for line in lines]
        columns.append(
            Column(
                ", ".join(f"{key.name} {text}" for key, text in zip(column_keys, heading, strict=True)),
                [MISSING if one is None else one[0] for one in found],
                [None if one is None else one[1] for one in found],
                frozenset(index for index, line in enumerate(lines) if (line[0].line, heading) in bold),
            )
        )
    titles = list(dict.fromkeys(entry.value.title_of(entry.cell) for entry in entries))
    names = [entry.value.metric_of(entry.cell) for entry in entries if not entry.value.is_ratio]
    scores = [name for name in dict.fromkeys(names) if is_score(name)]
    return PaperTable(
        name="rows_by_columns",
        caption=f"{_upper(' and '.join(titles))} by {_listed(row_keys)} (rows) and {_listed(column_keys)} (columns).",
        text=text_table(columns, num_key_columns=num_keys),
        numbers=pd.DataFrame([_number_line(*texts[entry.line, entry.heading]) for entry in entries], dtype=object),
        notes=[
            *([f"Rows differ besides in {_listed(added)}."] if added else []),
            *(["Cells at every learning rate that was tried; none was chosen."] if at_every_rate else []),
            *([f"/ full: {NOTE_RATIO}"] if any(value.is_ratio for value in values) else []),
            count_note(cells),
            *([] if at_every_rate else _choice_notes(cells, scores, any_bold=bool(bold))),
            *collapsed_notes(cells),
            *recipe_notes(cells),
        ],
        run_ids=[tuple(run_id for entry in line for run_id in entry.cell["run_ids"]) for line in lines],
        methods=[_only([entry.cell["method"] for entry in line]) for line in lines],
    )


def _choice_notes(cells: Sequence[Cell], scores: Sequence[str], *, any_bold: bool) -> Iterator[str]:
    yield from (note.replace("row", "cell") for note in bold_notes(cells, scores, any_bold=any_bold))
    yield from edge_notes(cells)


def _added_keys(
    cells: Sequence[Cell], row_keys: Sequence[_Key], column_keys: Sequence[_Key], keys: Sequence[_Key]
) -> list[_Key]:
    """What rows have to be told apart by besides, so that no number stands for two: first of all the method."""
    named = {key.name for key in (*row_keys, *column_keys)}
    added: list[_Key] = []
    for key in keys:
        if key.name in named:
            continue
        places: dict[tuple[str, ...], set[str]] = {}
        for cell in cells:
            at = () if key.name in _ALWAYS else tuple(k.text(cell) for k in (*added, *row_keys, *column_keys))
            places.setdefault(at, set()).add(key.text(cell))
        if any(len(found) > 1 for found in places.values()):
            added.append(key)
    return added


# A row that is one of these and does not say which would mean nothing.
_ALWAYS = ("model", "dataset", "method")


def _entries(
    cells: Sequence[Cell], keys: Sequence[_Key], column_keys: Sequence[_Key], values: Sequence[_Value]
) -> Iterator[_Entry]:
    taken: Counter[tuple[Any, ...]] = Counter()
    for value in values:
        for cell in cells:
            line = (*(key.text(cell) for key in keys), value.title_of(cell))
            heading = tuple(key.text(cell) for key in column_keys)
            taken[line, heading] += 1  # two recipes, or one condition under two ids
            yield _Entry(cell, value, (*line, taken[line, heading]), heading)


def _lines(entries: Sequence[_Entry], keys: Sequence[_Key], values: Sequence[_Value]) -> list[list[_Entry]]:
    """The entries of each row, the rows by their keys: numbers by size, names as they appear, then metric by metric."""
    lines: dict[tuple[Hashable, ...], list[_Entry]] = {}
    for entry in entries:
        lines.setdefault(entry.line, []).append(entry)
    places = [_places(key, [entry.cell for entry in entries]) for key in keys]

    def place(line: Sequence[_Entry]) -> tuple[int, ...]:
        cell, value = line[0].cell, line[0].value
        at = (found[key.text(cell)] for key, found in zip(keys, places, strict=True))
        return (*at, values.index(value))

    return sorted(lines.values(), key=place)


def _headings(entries: Sequence[_Entry], keys: Sequence[_Key]) -> list[tuple[str, ...]]:
    places = [_places(key, [entry.cell for entry in entries]) for key in keys]
    found = dict.fromkeys(entry.heading for entry in entries)
    return sorted(found, key=lambda heading: [place[text] for place, text in zip(places, heading, strict=True)])


def _places(key: _Key, cells: Sequence[Cell]) -> dict[str, int]:
    """The order of an axis' values, by their texts: numbers by size, names as they appear, what is missing last."""
    values = {key.text(cell): key.of(cell) for cell in cells}
    ordered = sorted(values, key=lambda text: (values[text] is None, axis_number(values[text]) or 0.0))
    return {text: place for place, text in enumerate(ordered)}


def _line_columns(lines: Sequence[Sequence[_Entry]], keys: Sequence[_Key]) -> list[Column]:
    """What names the rows, and the metric where there are several."""
    firsts = [line[0] for line in lines]
    columns = []
    for key in keys:
        numbers = [axis_number(key.of(entry.cell)) for entry in firsts]
        texts = [key.text(entry.cell) for entry in firsts]
        columns.append(Column(key.name, texts, numbers if any(number is not None for number in numbers) else None))
    titles = [entry.value.title_of(entry.cell) for entry in firsts]
    return [*columns, *([Column("metric", titles)] if len(set(titles)) > 1 else [])]


def _value_text(entry: _Entry, full: Mapping[tuple[str, str, str], Cell]) -> tuple[str, float | None]:
    row, name = entry.cell, entry.value.metric_of(entry.cell)
    if entry.value.is_ratio:
        ratio = ratio_to(row, full.get(comparison_of(row)), name)
        return (MISSING, None) if ratio is None else (f"{ratio:.2f}{TIMES}", ratio)
    if row.get(f"{name}_n", 0):
        return show_metric(row, name) + (edge_mark(row) if is_score(name) else "") + recipe_mark(row), float(row[name])
    return (MISSING if row[num_status(Status.FINISHED)] else show_status(row)), None


def _bold(cells: Sequence[Cell], entries: Sequence[_Entry]) -> set[tuple[tuple[Hashable, ...], tuple[str, ...]]]:
    """Where scores stand that are best beyond noise among those that they can be compared with."""
    scored = [entry for entry in entries if not entry.value.is_ratio and is_score(entry.value.metric_of(entry.cell))]
    names = dict.fromkeys(entry.value.metric_of(entry.cell) for entry in scored)
    winners = {name: {cells[index]["cell_id"] for index in best_rows(cells, name)} for name in names}
    return {
        (entry.line, entry.heading)
        for entry in scored
        if entry.cell["cell_id"] in winners[entry.value.metric_of(entry.cell)]
    }


def _number_line(text: str, number: float | None, entry: _Entry) -> dict[str, Any]:
    """A line of the CSV."""
    row, name = entry.cell, entry.value.metric_of(entry.cell)
    if entry.value.is_ratio:
        measured = {"mean": number}
    else:
        measured = {"mean": row.get(name), "sd": row.get(f"{name}_sd"), "ci": row.get(f"{name}_ci")}
    return {
        **{key: row[key] for key in cell_names(row)},
        "metric": f"{name}/full" if entry.value.is_ratio else name,
        **{"mean": None, "sd": None, "ci": None, **measured},
        "n": row.get(f"{name}_n", 0),
        "edge": row["edge"],
        "bounded": row["bounded"],
    }


def _only(methods: Sequence[str]) -> str:
    return methods[0] if len(set(methods)) == 1 else ""


def _listed(keys: Sequence[_Key]) -> str:
    return " and ".join(key.name for key in keys)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------- chosen columns


def _chosen_columns(names: Sequence[str], best: pd.DataFrame, frame: pd.DataFrame) -> PaperTable:
    rows = records(best)
    found = [(name, _find_key(name, "--columns", best, frame), _find_value(name, best)) for name in names]
    unknown = [name for name, key, value in found if key is None and value is None and name != "n"]
    if unknown:
        raise LoadError(_unknown("--columns", unknown[0], "axis and no metric", [*_axis_names(best), "n"], best))
    # What tells the rows apart and was not asked for stands before the rest, or two rows could look alike.
    named = {key.name for _, key, _ in found if key is not None}
    added = [key for key in _keys(best) if key.name not in named and len({key.text(row) for row in rows}) > 1]
    columns = [_key_column(key, rows) for key in added]
    for _, key, value in found:
        if key is not None:
            columns.append(_key_column(key, rows))
        elif value is None:
            columns.append(num_finished_column(rows))
        else:
            columns.append(_value_column(value, rows))
    marks = [recipe_mark(row) for row in rows]
    if any(marks):
        texts = [text + mark for text, mark in zip(columns[0].texts, marks, strict=True)]
        columns[0] = replace(columns[0], texts=texts)
    values = [value for _, _, value in found if value is not None]
    metrics = [value.name for value in values if value.name is not None and not value.is_ratio]
    scores = [name for name in metrics if is_score(name)]
    any_bold = any(column.bold for column in columns)
    num_leading = next((index for index, (_, key, _) in enumerate(found) if key is None), len(found))
    return PaperTable(
        name="chosen_columns",
        caption="Chosen columns.",
        text=text_table(columns, num_key_columns=max(1, len(added) + num_leading)),
        numbers=best[[*cell_names(best), *with_spread(best, metrics)]],
        notes=[
            count_note(rows),
            *([f"/ full: {NOTE_RATIO}"] if any(value.is_ratio for value in values) else []),
            *bold_notes(rows, scores, any_bold=any_bold),
            *collapsed_notes(rows),
            *edge_notes(rows),
            *recipe_notes(rows),
        ],
        run_ids=run_ids_of(rows),
        methods=[str(row["method"]) for row in rows],
    )


def _key_column(key: _Key, rows: Sequence[Cell]) -> Column:
    if key.name == _RATE:
        return learning_rate_column(rows)
    numbers = [axis_number(key.of(row)) for row in rows]
    has_numbers = any(number is not None for number in numbers)
    return Column(key.name, [key.text(row) for row in rows], numbers if has_numbers else None)


def _value_column(value: _Value, rows: Sequence[Cell]) -> Column:
    assert value.name is not None
    if not value.is_ratio:
        bold = best_rows(rows, value.name) if is_score(value.name) else frozenset()
        return metric_column(rows, value.name, bold=bold)
    full = full_of(rows)
    ratios = [ratio_to(row, full.get(comparison_of(row)), value.name) for row in rows]
    texts = [MISSING if ratio is None else f"{ratio:.2f}{TIMES}" for ratio in ratios]
    return Column(value.title_of(rows[0]), texts, ratios)


# ---------------------------------------------------------------- messages


def _required_key(name: str, option: str, table: pd.DataFrame, frame: pd.DataFrame) -> _Key:
    key = _find_key(name, option, table, frame)
    if key is None:
        raise LoadError(_unknown(option, name, "axis", _axis_names(table), None))
    return key


def _required_value(name: str, option: str, table: pd.DataFrame) -> _Value:
    value = _find_value(name, table)
    if value is None:
        raise LoadError(_unknown(option, name, "metric", [], table))
    return value


def _unknown(option: str, name: str, what: str, axes: Sequence[str], table: pd.DataFrame | None) -> str:
    allowed = [f"Axes: {', '.join(axes)}, and every setting by its dotted name, as trainer.num_epochs."] if axes else []
    if table is not None:
        allowed.append(f"Metrics: {', '.join(_metric_names(table))}, each also with /full behind it for the ratio.")
    return f"{option} {name!r}: no {what} of these runs. {' '.join(allowed)}"
