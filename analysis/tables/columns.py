"""The columns that tables share: what names a row, a metric, the learning rate, how many runs stand behind a row."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import pandas as pd

from analysis.axes import axes_of, axis_number, axis_text, is_axis, varied
from analysis.comparisons import Cell
from analysis.metrics import title
from analysis.select import num_status, score
from analysis.tables.cells import MISSING, chosen_rate, edge_mark, recipe_mark, show_metric
from analysis.tables.structure import Column
from harness.results.schema import Status


def key_columns(rows: Sequence[Cell]) -> list[Column]:
    """What names a row: model and dataset where they differ, method, rank, target layers, own axes."""
    columns = [
        Column(name, [row[name] for row in rows])
        for name in ("model", "dataset")
        if len({row[name] for row in rows}) > 1
    ]
    return [
        *columns,
        Column("method", [row["method"] + recipe_mark(row) for row in rows]),
        Column("rank", [MISSING if row["rank"] is None else str(row["rank"]) for row in rows], rank_values(rows)),
        Column("target layers", [row["target_layers"] or MISSING for row in rows]),
        *axis_columns(rows),
    ]


def axis_columns(rows: Sequence[Cell]) -> list[Column]:
    """The own axes in which any two of the rows differ."""
    columns = []
    for axis in varied(rows):
        values = [row[axis.setting] for row in rows]
        texts = [MISSING if value is None else axis_text(value) for value in values]
        numbers = [axis_number(value) for value in values]
        columns.append(Column(axis.name, texts, numbers if any(n is not None for n in numbers) else None))
    return columns


def rank_values(rows: Sequence[Cell]) -> list[float | None]:
    """What to sort the ranks by."""
    return [None if row["rank"] is None else float(row["rank"]) for row in rows]


def metric_column(rows: Sequence[Cell], name: str, *, bold: frozenset[int] = frozenset()) -> Column:
    """A metric of every row, with its spread."""
    values = [float(row[name]) if row.get(f"{name}_n", 0) else None for row in rows]
    return Column(title(name), [show_metric(row, name) for row in rows], values, bold)


def learning_rate_column(rows: Sequence[Cell], heading: str = "learning rate") -> Column:
    """The chosen rates, marked where they lie at the edge of their grid."""
    return Column(heading, [chosen_rate(row) for row in rows], [_rate_value(row) for row in rows])


def _rate_value(row: Cell) -> float | None:
    return None if len(row["tried"]) > 1 and not row["is_chosen"] else float(row["learning_rate"])


def learning_rate_columns(rows: Sequence[Cell]) -> list[Column]:
    """The chosen rates, where rows differ in them or one lies at the edge of its grid, and what else was searched."""
    searched = [_searched_column(rows, setting) for setting, _ in rows[0]["searched"]]
    if len({row["learning_rate"] for row in rows}) == 1 and not any(map(edge_mark, rows)):
        return searched
    return [learning_rate_column(rows), *searched]


def _searched_column(rows: Sequence[Cell], setting: str) -> Column:
    values = [dict(row["searched"])[setting] for row in rows]
    (axis,) = axes_of([setting])
    texts = [MISSING if value is None else axis_text(value) for value in values]
    return Column(f"{axis.name} (searched)", texts, [axis_number(value) for value in values])


def num_finished_column(rows: Sequence[Cell]) -> Column:
    """How many runs gave the numbers of each row."""
    counts = [row[num_status(Status.FINISHED)] for row in rows]
    return Column("n", [str(count) for count in counts], [float(count) for count in counts])


def run_ids_of(rows: Sequence[Cell]) -> list[tuple[str, ...]]:
    """For each row, the runs behind it."""
    return [row["run_ids"] for row in rows]


def methods_of(rows: Sequence[Cell]) -> list[str]:
    """For each row, its method."""
    return [row["method"] for row in rows]


# ---------------------------------------------------------------- numbers

_CELL_NAMES = ("model", "dataset", "method", "rank", "target_layers", "learning_rate")


def cell_names(columns: Iterable[Hashable]) -> list[str]:
    """What names a cell, of the columns of a table of cells or the keys of a row."""
    return [*_CELL_NAMES, *(str(column) for column in columns if is_axis(column))]


def with_spread(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """The columns that a table of cells has about the metrics."""
    endings = ("", "_sd", "_min", "_max", "_n", "_ci")
    return [f"{name}{ending}" for name in names for ending in endings if f"{name}{ending}" in table]


def scores_by_split(rows: Sequence[Cell]) -> pd.DataFrame:
    """A line for each cell and split with the score that its dataset is judged by."""
    lines = []
    for row in rows:
        for split in ("val", "test"):
            name = score(row, split)
            lines.append(
                {
                    **{key: row[key] for key in cell_names(row)},
                    "num_adapter_params": row.get("num_adapter_params"),
                    "metric": name,
                    "mean": row.get(name),
                    "sd": row.get(f"{name}_sd"),
                    "ci": row.get(f"{name}_ci"),
                    "n": row.get(f"{name}_n", 0),
                    "edge": row["edge"],
                    "bounded": row["bounded"],
                }
            )
    return pd.DataFrame(lines, dtype=object)
