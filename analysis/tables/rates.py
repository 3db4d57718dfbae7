"""The table of learning rates: scores at every rate, and the best rate as a ratio to that of full fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis.comparisons import Cell
from analysis.metrics import title
from analysis.select import num_status, records, score
from analysis.tables.cells import MISSING, TIMES, show_metric, show_rate, show_status
from analysis.tables.columns import key_columns, learning_rate_column, methods_of, scores_by_split
from analysis.tables.comparable import comparison_of, full_of
from analysis.tables.notes import collapsed_notes, count_note, edge_notes, recipe_notes
from analysis.tables.structure import Column, PaperTable, text_table
from harness.results.schema import Status

NOTE_BEST_OF_FULL = (
    "best / full's: ratio to the best rate of full fine-tuning of the same model, dataset and recipe; none where that "
    "was not run."
)


def learning_rates(table: pd.DataFrame, best: pd.DataFrame) -> PaperTable | None:
    """Val scores at every learning rate (columns) of every condition, its best rate, and its ratio to that of full."""
    rows = [row for row in records(best) if len(row["tried"]) > 1]
    if not rows:
        return None
    conditions: dict[str, dict[float, Cell]] = {}
    for cell in records(table):
        conditions.setdefault(cell["condition_id"], {})[cell["learning_rate"]] = cell
    tried = [conditions[row["condition_id"]] for row in rows]
    shown = [cell for cells in tried for cell in cells.values()]
    has_full, ratios = bool(full_of(rows)), _ratios_to_full(rows)
    keys = key_columns(rows)
    columns = [
        *keys,
        *(_rate_column(rate, rows, tried) for rate in sorted({rate for row in rows for rate in row["tried"]})),
        learning_rate_column(rows, "best"),
    ]
    if has_full:
        texts = [MISSING if ratio is None else f"{ratio:.3g}{TIMES}" for ratio in ratios]
        columns.append(Column("best / full's", texts, ratios))
    names = sorted({score(row, "val") for row in rows})
    return PaperTable(
        name="learning_rates",
        caption=f"Learning rates: {' or '.join(title(name) for name in names)} at every rate.",
        text=text_table(columns, num_key_columns=len(keys)),
        numbers=_numbers(rows, shown, ratios),
        notes=[
            f"{count_note(shown)} (n=...): fewer than at other rates of the row, which are then preferred.",
            "Bold: the chosen rate of the row; this marks the choice and is no test of a difference.",
            *([NOTE_BEST_OF_FULL] if has_full else []),
            *collapsed_notes(shown),
            *edge_notes(rows),
            *recipe_notes(rows),
        ],
        run_ids=[tuple(run_id for cell in cells.values() for run_id in cell["run_ids"]) for cells in tried],
        methods=methods_of(rows),
    )


def _ratios_to_full(rows: Sequence[Cell]) -> list[float | None]:
    """The best rate of each row over that of full fine-tuning of its recipe, where both were chosen."""
    full = full_of(rows)
    return [
        row["learning_rate"] / full[comparison_of(row)]["learning_rate"]
        if comparison_of(row) in full and row["is_chosen"]
        else None
        for row in rows
    ]


def _numbers(rows: Sequence[Cell], shown: Sequence[Cell], ratios: Sequence[float | None]) -> pd.DataFrame:
    """The scores at all rates, and which rates were chosen, so that a line can be fitted through the best ones."""
    numbers = scores_by_split([{**cell, "edge": None, "bounded": None} for cell in shown])
    chosen = {
        row["cell_id"]: (row["edge"], row["bounded"], ratio)
        for row, ratio in zip(rows, ratios, strict=True)
        if row["is_chosen"]
    }
    choices = [
        {"edge": edge, "bounded": bounded, "chosen": cell["cell_id"] in chosen, "ratio_to_full": ratio}
        for cell in shown
        for edge, bounded, ratio in [chosen.get(cell["cell_id"], (None, None, None))] * 2  # on val and on test
    ]
    return pd.concat([numbers.drop(columns=["edge", "bounded"]), pd.DataFrame(choices, dtype=object)], axis="columns")


def _rate_column(rate: float, rows: Sequence[Cell], tried: Sequence[dict[float, Cell]]) -> Column:
    """The val score of each row at one rate, bold where it is the chosen one."""
    texts: list[str] = []
    values: list[float | None] = []
    bold: set[int] = set()
    for index, (row, cells) in enumerate(zip(rows, tried, strict=True)):
        name, cell = score(row, "val"), cells.get(rate)
        has_value = cell is not None and bool(cell.get(f"{name}_n", 0))
        texts.append(MISSING if cell is None else _rate_text(cell, name, row.get(f"{name}_n", 0)))
        values.append(float(cell[name]) if cell is not None and has_value else None)
        if has_value and row["is_chosen"] and rate == row["learning_rate"]:
            bold.add(index)
    return Column(show_rate(rate), texts, values, frozenset(bold))


def _rate_text(cell: Cell, name: str, num_chosen: int) -> str:
    """A score with the number of runs behind it where fewer than at the chosen rate, or how the runs ended."""
    num_values = cell.get(f"{name}_n", 0)
    if not num_values:
        return show_status(cell)
    text = show_metric(cell, name) + (f" (n={num_values})" if num_values < num_chosen else "")
    num_failed = sum(cell[num_status(status)] for status in Status if status is not Status.FINISHED)
    return f"{text} ({num_failed} failed)" if num_failed else text
