"""The table of a search: every value that was tried of what was searched, with its score on val, and the chosen one."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from analysis.comparisons import Cell
from analysis.metrics import NUM_TRIALS, TUNING_FLOPS, format_value, title
from analysis.select import records, score
from analysis.tables.cells import MISSING, cell_name
from analysis.tables.columns import cell_names, key_columns, methods_of, metric_column
from analysis.tables.notes import best_metrics_of
from analysis.tables.structure import Column, PaperTable, text_table
from analysis.trials import Searches, Tried
from harness.results.launches import SearchedCell


def search(best: pd.DataFrame, searches: Searches) -> PaperTable | None:
    """What was tried for every condition that a search chose the values of."""
    found = [(row, *tried) for row in records(best) if (tried := searches.of(row["run_ids"])) is not None]
    if not found:
        return None
    rows = [row for row, _, _ in found]
    names = list(dict.fromkeys(" and ".join(cell.axes) for _, cell, _ in found))
    costs = [NUM_TRIALS, *([TUNING_FLOPS] if best.get(f"{TUNING_FLOPS}_n", pd.Series()).any() else [])]
    columns = [
        *key_columns(rows),
        *(metric_column(rows, name) for name in costs),
        Column("chosen", [_values_text(searches.chosen(row["run_ids"])) for row in rows]),
        Column("tried: score on val", [_tried_text(row, points) for row, _, points in found]),
    ]
    return PaperTable(
        name="search",
        caption=f"What was tried of {' or '.join(names)}, with {' or '.join(map(title, _names(rows)))}.",
        text=text_table(columns, num_key_columns=len(key_columns(rows))),
        numbers=_numbers(found, searches),
        notes=[
            f"Every trial is a whole run, judged on val by {best_metrics_of(rows)}; no other table has its seed.",
            *(
                ["Tuning compute: training steps of all trials of the row; missing where one recorded none."]
                if TUNING_FLOPS in costs
                else []
            ),
            *_edge_notes(found),
        ],
        run_ids=[tuple(cell.trials) for _, cell, _ in found],
        methods=methods_of(rows),
    )


def _edge_notes(found: list[tuple[Cell, SearchedCell, list[Tried]]]) -> Iterator[str]:
    for row, cell, _ in found:
        for setting, side in cell.edges.items():
            yield f"{cell_name(row)}: the chosen {setting} is the {side}est tried, so a better one may lie outside."


def _names(rows: list[Cell]) -> list[str]:
    return list(dict.fromkeys(score(row, "val") for row in rows))


def _values_text(values: tuple[float, ...] | None) -> str:
    return MISSING if values is None else ", ".join(f"{value:g}" for value in values)


def _tried_text(row: Cell, points: list[Tried]) -> str:
    name = score(row, "val")
    return "; ".join(
        f"{_values_text(point.values)}: {point.status if point.score is None else format_value(name, point.score)}"
        for point in points
    )


def _numbers(found: list[tuple[Cell, SearchedCell, list[Tried]]], searches: Searches) -> pd.DataFrame:
    lines = []
    for row, cell, points in found:
        chosen = searches.chosen(row["run_ids"])
        for point in points:
            lines.append(
                {
                    **{name: row[name] for name in cell_names(row) if name != "learning_rate"},
                    **dict(zip(cell.axes, point.values, strict=True)),
                    "metric": score(row, "val"),
                    "mean": point.score,
                    "n": point.num_runs,
                    "status": point.status,
                    "chosen": point.values == chosen,
                }
            )
    return pd.DataFrame(lines, dtype=object)
