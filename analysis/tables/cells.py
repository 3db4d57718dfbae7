"""A cell of a sweep as text: its numbers with their spread, its name, and the marks that say what must be known."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.axes import axes_of, axes_texts, varied
from analysis.comparisons import Cell
from analysis.metrics import BY_MEDIAN, format_spread, format_value, is_score
from analysis.select import num_status
from harness.results.schema import Status

EN_DASH = "\N{EN DASH}"
MISSING = EN_DASH
TIMES = "\N{MULTIPLICATION SIGN}"
COLLAPSED_MARK = "†"
EDGE_MARK = "§"
QUOTED_MARK = "‡"


def show_metric(cell: Cell, name: str) -> str:
    """A cell's number with its spread, and what must be known about it."""
    num_values = cell.get(f"{name}_n", 0)
    if not num_values:
        return MISSING
    text = format_value(name, cell[name])
    if name in BY_MEDIAN:
        low, high = format_value(name, cell[f"{name}_min"]), format_value(name, cell[f"{name}_max"])
        text += f" ({low}{EN_DASH}{high})" if low != high else ""
    elif num_values > 1 and (cell[f"{name}_sd"] > 0 or is_score(name)):
        # A cost that is the same for every seed is exact, and a "± 0" adds nothing; of a score it says something.
        text += f" ± {format_spread(name, cell[f'{name}_sd'])}"
    if num_values != cell[num_status(Status.FINISHED)]:
        text += f" (n={num_values})"
    return f"{text}{COLLAPSED_MARK}" if cell["num_collapsed"] and is_score(name) else text


def show_rate(rate: float) -> str:
    """A learning rate, as short as it is exact."""
    return f"{rate:g}"


def chosen_rate(row: Cell) -> str:
    """The chosen rate as text; nothing was chosen where several were tried and none finished."""
    if len(row["tried"]) > 1 and not row["is_chosen"]:
        return MISSING
    return show_rate(row["learning_rate"]) + edge_mark(row)


def edge_mark(row: Cell) -> str:
    """The mark of a rate beyond which nothing was tried, or nothing that finished as often."""
    return EDGE_MARK if row["edge"] or row["bounded"] else ""


def recipe_mark(row: Cell) -> str:
    """The number under which a row's departures are listed, in brackets."""
    return "" if row["recipe"] is None else f" [{row['recipe']}]"


def cell_name(row: Cell, *, with_shared: bool = True) -> str:
    """A cell in a sentence; without the own axes that all methods have where the sentence has named them."""
    axes = [axis for axis in axes_of(row) if with_shared or axis.is_of_method]
    parts = [row["method"], f"rank {row['rank']}" if row["rank"] is not None else None, row["target_layers"]]
    return ", ".join([" ".join(part for part in parts if part), *axes_texts(row, axes)])


def comparison_name(row: Cell, rows: Sequence[Cell]) -> str:
    """What a row shares with those of the table that it is compared with: model, dataset, own axes of all methods."""
    shared = [axis for axis in varied(_of_dataset(row, rows)) if not axis.is_of_method]
    return ", ".join([f"{row['model']} on {row['dataset']}", *axes_texts(row, shared)])


def facet_texts(row: Cell, rows: Sequence[Cell]) -> list[str]:
    """The values of a row on the own axes in which the rows of its model and dataset differ, in words."""
    return axes_texts(row, varied(_of_dataset(row, rows)))


def _of_dataset(row: Cell, rows: Sequence[Cell]) -> list[Cell]:
    return [other for other in rows if (other["model"], other["dataset"]) == (row["model"], row["dataset"])]


def show_status(row: Cell) -> str:
    """The runs of a row by status."""
    counts = [(status, row[num_status(status)]) for status in Status]
    return ", ".join(f"{count} {status}" for status, count in counts if count)


def same_everywhere(rows: Sequence[Cell], names: Sequence[str]) -> str:
    """Those of the settings that all rows share, in words."""
    same = [f"{name.replace('_', ' ')} {rows[0][name]}" for name in names if len({row[name] for row in rows}) == 1]
    return ", ".join(same)
