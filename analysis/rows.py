"""What the tables are put together from: cells as rows, their columns as text, and the notes underneath."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import pandas as pd

from analysis.formats import Column, as_code
from analysis.select import (
    BY_DEVICE,
    BY_MEDIAN,
    COLLAPSED_ABOVE,
    FORGETTING,
    LARGEST,
    best_beyond_noise,
    is_score,
    metric,
    num_status,
    records,
)
from harness.results.metrics import Direction
from harness.results.schema import Status

Cell = dict[Hashable, Any]


EN_DASH = "\N{EN DASH}"


MISSING = EN_DASH


TIMES = "\N{MULTIPLICATION SIGN}"


COLLAPSED_MARK = "†"


EDGE_MARK = "§"


QUOTED_MARK = "‡"


ARROWS = {Direction.HIGHER: " ↑", Direction.LOWER: " ↓", Direction.NEUTRAL: ""}


def as_rows(table: pd.DataFrame) -> list[Cell]:
    """The cells of a table, each a dict."""
    return records(table)


def title(name: str) -> str:
    """A metric as the title of a column: label, unit, arrow to the better side."""
    about = metric(name)
    return f"{about.label}{f' ({about.display_unit})' if about.display_unit else ''}{ARROWS[about.direction]}"


def format_value(name: str, value: float) -> str:
    """A value of a metric, in its stored unit, as text in its display unit, without the unit."""
    return _as_digits(value / metric(name).display_divisor, metric(name).format)


def format_spread(name: str, value: float) -> str:
    """A deviation of a metric as text in its display unit: without the sign that a difference always has."""
    return _as_digits(value / metric(name).display_divisor, metric(name).format.removeprefix("+"))


def _as_digits(shown: float, how: str) -> str:
    # Nothing measures so much; of what is there all the same nobody reads a hundred digits.
    return f"{shown:{how if abs(shown) < 1e15 else '.4g'}}"


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
        # A cost that is the same for every seed is exact, and a "± 0" adds nothing; of a score it tells something.
        text += f" ± {format_spread(name, cell[f'{name}_sd'])}"
    if num_values != cell[num_status(Status.FINISHED)]:
        text += f" (n={num_values})"
    return f"{text}{COLLAPSED_MARK}" if cell["num_collapsed"] and is_score(name) else text


def metric_column(rows: Sequence[Cell], name: str, *, bold: frozenset[int] = frozenset()) -> Column:
    """A metric of every row, with its spread."""
    values = [float(row[name]) if row.get(f"{name}_n", 0) else None for row in rows]
    return Column(title(name), [show_metric(row, name) for row in rows], values, bold)


def key_columns(rows: Sequence[Cell]) -> list[Column]:
    """What names a row: model and dataset where they differ, method, rank, target layers."""
    columns = [
        Column(name, [row[name] for row in rows])
        for name in ("model", "dataset")
        if len({row[name] for row in rows}) > 1
    ]
    return [
        *columns,
        Column("method", [row["method"] + recipe_mark(row) for row in rows]),
        Column("rank", [MISSING if row["rank"] is None else str(row["rank"]) for row in rows], ranks_of(rows)),
        Column("target layers", [row["target_layers"] or MISSING for row in rows]),
    ]


def ranks_of(rows: Sequence[Cell]) -> list[float | None]:
    """What to sort the ranks by."""
    return [None if row["rank"] is None else float(row["rank"]) for row in rows]


def learning_rate_column(rows: Sequence[Cell], heading: str = "learning rate") -> Column:
    """The chosen rates, marked where they lie at the edge of their grid."""
    return Column(heading, [chosen_rate(row) for row in rows], [_rate_value(row) for row in rows])


def chosen_rate(row: Cell) -> str:
    """The chosen rate as text; nothing was chosen where several were tried and none finished."""
    if len(row["tried"]) > 1 and not row["is_chosen"]:
        return MISSING
    return show_rate(row["learning_rate"]) + edge_mark(row)


def edge_mark(row: Cell) -> str:
    """The mark of a rate beyond which nothing was tried, or nothing that finished as often."""
    return EDGE_MARK if row["edge"] or row["bounded"] else ""


def _rate_value(row: Cell) -> float | None:
    return None if len(row["tried"]) > 1 and not row["is_chosen"] else float(row["learning_rate"])


def comparison_of(row: Cell) -> tuple[str, str, str]:
    """What rows must share to be compared as methods, ranks or placements: model, dataset and recipe."""
    return row["model"], row["dataset"], row["recipe_id"]


def full_of(rows: Sequence[Cell]) -> dict[tuple[str, str, str], Cell]:
    """The finished full fine-tuning to compare with, by `comparison_of`; of several the one that departs in nothing."""
    found: dict[tuple[str, str, str], Cell] = {}
    for row in sorted(filter(is_full, rows), key=lambda row: row["recipe"] is not None):
        if row[num_status(Status.FINISHED)]:
            found.setdefault(comparison_of(row), row)
    return found


def show_rate(rate: float) -> str:
    """A learning rate, as short as it is exact."""
    return f"{rate:g}"


def recipe_mark(row: Cell) -> str:
    """The number under which a row's departures are told, in brackets."""
    return "" if row["recipe"] is None else f" [{row['recipe']}]"


def groups_of(rows: Sequence[Cell]) -> list[list[int]]:
    """Indices of the rows that may be compared: those of one model on one dataset, in one recipe."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((row["model"], row["dataset"], row["recipe"]), []).append(index)
    return list(groups.values())


def best_rows(rows: Sequence[Cell], name: str) -> frozenset[int]:
    """In each group the row that is best beyond noise."""
    found = set()
    for indices in groups_of(rows):
        best = best_beyond_noise([rows[index] for index in indices], name)
        if best is not None:
            found.add(indices[best])
    return frozenset(found)


def is_full(row: Cell) -> bool:
    """Whether a row is full fine-tuning."""
    return bool(row["method"] == "full")


def is_lora(row: Cell) -> bool:
    """Whether a row is LoRA."""
    return bool(row["method"] == "lora")


def cell_name(row: Cell) -> str:
    """A cell in a sentence."""
    parts = [row["method"], f"rank {row['rank']}" if row["rank"] is not None else None, row["target_layers"]]
    return " ".join(part for part in parts if part)


def same_everywhere(rows: Sequence[Cell], names: Sequence[str]) -> str:
    """Those of the settings that all rows share, in words."""
    same = [f"{name.replace('_', ' ')} {rows[0][name]}" for name in names if len({row[name] for row in rows}) == 1]
    return ", ".join(same)


def run_ids_of(rows: Sequence[Cell]) -> list[tuple[str, ...]]:
    """For each row, the runs behind it."""
    return [row["run_ids"] for row in rows]


def methods_of(rows: Sequence[Cell]) -> list[str]:
    """For each row, its method."""
    return [row["method"] for row in rows]


NOTE_N = "n: finished runs, one per seed; only they give numbers. ±: sample standard deviation over them."


NOTE_BOLD = (
    "Bold: better than the runner-up of its model, dataset and recipe by a two-sided t-test, p < 0.05, paired by seed "
    "where both have the same seeds, else Welch's; not corrected for the number of rows."
)


def bold_note(rows: Sequence[Cell], names: Sequence[str], *, any_bold: bool) -> Iterator[str]:
    """What bold means here, or why there is none."""
    if any_bold:
        yield NOTE_BOLD
    elif any(row.get(f"{name}_n", 0) > 1 for row in rows for name in names):
        yield (
            "Nothing is bold: no row is better than its runner-up by a two-sided t-test, p < 0.05, paired by seed "
            "where both have the same seeds, else Welch's."
        )
    elif any(row.get(f"{name}_n", 0) for row in rows for name in names):
        yield "One seed: no row can be told from another beyond noise, so nothing is bold."


def best_metrics_of(rows: Sequence[Cell]) -> str:
    """By what the rows' datasets are judged, in words."""
    return " or ".join(dict.fromkeys(row["best_metric"] for row in rows))


def setting_note(rows: Sequence[Cell], scores: str) -> str:
    """Where a table's numbers are from, for those that stand alone."""
    same = same_everywhere(rows, ("model", "dataset"))
    rule = f"{selection_rule(best_metrics_of(rows), scores)}."
    return f"{same}: {rule}" if same else f"{rule[0].upper()}{rule[1:]}"


def count_note(rows: Sequence[Cell]) -> str:
    """How many seeds stand behind the numbers of a table that has no column for it."""
    counts = sorted({row[num_status(Status.FINISHED)] for row in rows})
    shown = str(counts[-1]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}, fewer where runs failed"
    return f"Finished runs behind each number, one per seed: {shown}. ±: sample standard deviation over them."


def selection_rule(best_metrics: str, scores: str = "best") -> str:
    """From which split and which step the scores come, in words."""
    if scores == "last":
        return "scores of the last step; learning rate chosen on val only; test used for no choice"
    return f"best step chosen on val only, by {best_metrics}; test evaluated after training, and used for no choice"


def edge_notes(rows: Sequence[Cell]) -> Iterator[str]:
    """How the learning rates were chosen, and which lie at the edge of their grid."""
    tuned = [row for row in rows if len(row["tried"]) > 1]
    if tuned:
        yield (
            "Learning rate: the best of those tried for the row that have the most finished runs, by the mean over "
            "seeds on val only."
        )
    several = len({(row["model"], row["dataset"]) for row in rows}) > 1

    def named(row: Cell) -> str:
        return (f"{row['model']} on {row['dataset']}, " if several else "") + cell_name(row) + recipe_mark(row)

    at_edge = [f"{named(row)}, tried {', '.join(map(show_rate, row['tried']))}" for row in tuned if row["edge"]]
    if at_edge:
        yield f"{EDGE_MARK} at the edge of the rates that were tried, so a better one may lie outside: " + (
            f"{'; '.join(at_edge)}."
        )
    bounded = [
        f"{named(row)} at {show_rate(row['learning_rate'])}: {row['bounded']}" for row in tuned if row["bounded"]
    ]
    if bounded:
        yield f"{EDGE_MARK} the last rate with as many finished runs: {'; '.join(bounded)}."


def warnings(rows: Sequence[Cell], frame: pd.DataFrame) -> Iterator[str]:
    """Collapsed runs and departing recipes of the rows."""
    shown = {run_id for row in rows for run_id in row["run_ids"]}
    shares = frame[["val_majority_share", "test_majority_share"]]
    is_collapsed = (shares > COLLAPSED_ABOVE).any(axis="columns") & (frame["status"] == Status.FINISHED.value)
    collapsed = [run_id for run_id in frame.loc[is_collapsed, "run_id"] if run_id in shown]
    if collapsed:
        yield (
            f"{COLLAPSED_MARK} collapsed: one class received more than {COLLAPSED_ABOVE:.1%} of the predictions on val "
            f"or test. Counted in all the same: {listed(collapsed)}."
        )
    yield from recipe_notes(rows)


def collapsed_note(rows: Sequence[Cell]) -> Iterator[str]:
    """The meaning of the mark, where a table shows one."""
    if any(row["num_collapsed"] for row in rows):
        yield (
            f"{COLLAPSED_MARK} a run behind it collapsed: one class received more than {COLLAPSED_ABOVE:.1%} of its "
            "predictions."
        )


def forgetting_notes(rows: Sequence[Cell]) -> Iterator[str]:
    """On which set forgetting was measured, and what the models knew before they were trained."""
    having = [row for row in rows if row.get(f"{FORGETTING}_n", 0)]
    if having:
        sets = " or ".join(dict.fromkeys(as_code(row.get("base_domain") or "unknown") for row in having))
        yield (
            f"Forgetting: nll on the base model's own domain ({sets}), after training minus before; 0 is none, below 0 "
            "the model got better there."
        )
    groups: dict[tuple[str, str], list[Cell]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["dataset"]), []).append(row)
    for (model, dataset), members in groups.items():
        texts = [
            f"{name} {_range_of(members, before)}"
            for before, name in _BEFORE.items()
            if any(row.get(f"{before}_n", 0) for row in members)
        ]
        if texts:
            yield f"Before training, {model} on {dataset}: {', '.join(texts)}."


_BEFORE = {"val_nll_before": "val nll", "test_nll_before": "test nll", "base_domain_nll_before": "base domain nll"}


def _range_of(rows: Sequence[Cell], name: str) -> str:
    """The metric of all rows, which is one number where all begin with the same model."""
    texts = [format_value(name, value) for value in sorted(row[name] for row in rows if row.get(f"{name}_n", 0))]
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]}{EN_DASH}{texts[-1]}"


# So many runs are named; a page holds them all, a table's footnote need not.
_NUM_NAMED = 20


def listed(run_ids: Sequence[str]) -> str:
    """Names as code; of very many the first, and how many more."""
    text = ", ".join(map(as_code, run_ids[:_NUM_NAMED]))
    return text if len(run_ids) <= _NUM_NAMED else f"{text} and {len(run_ids) - _NUM_NAMED} more"


def failures(frame: pd.DataFrame) -> list[str]:
    """Every run that did not finish, with its status and the first line of its message."""
    failed = frame[frame["status"] != Status.FINISHED.value]
    runs = zip(failed["run_id"], failed["status"], failed["error"], strict=True)
    return [f"{as_code(run_id)}: {status}: {_first_line(error)}" for run_id, status, error in runs]


def failure_notes(frame: pd.DataFrame) -> Iterator[str]:
    """Every run that gave no numbers, in one note."""
    failed = failures(frame)
    if failed:
        lines = failed[:_NUM_NAMED]
        if len(failed) > _NUM_NAMED:
            lines.append(f"and {len(failed) - _NUM_NAMED} more, see runs.csv")
        yield "\n  - ".join([f"Not finished, so without numbers: {len(failed)} of {len(frame)} runs:", *lines])


def _first_line(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return as_code(lines[0]) if lines else "no message"


def ratio_to(row: Cell, reference: Cell | None, name: str) -> float | None:
    """A row's metric over that of a reference, where both have it; of times only where the device is the same."""
    if reference is None or not row.get(f"{name}_n", 0) or not reference.get(f"{name}_n", 0) or not reference[name]:
        return None
    if name in BY_DEVICE and _device_departures(row) != _device_departures(reference):
        return None
    ratio = float(row[name]) / float(reference[name])
    return ratio if abs(ratio) < LARGEST else None


def _device_departures(row: Cell) -> set[str]:
    facts = ("environment.device_", "environment.num_threads", "environment.num_processes")
    return {text for text in row["differs"] or () if text.startswith(facts)}


def num_finished_column(rows: Sequence[Cell]) -> Column:
    """How many runs gave the numbers of each row."""
    counts = [row[num_status(Status.FINISHED)] for row in rows]
    return Column("n", [str(count) for count in counts], [float(count) for count in counts])


def show_status(row: Cell) -> str:
    """The runs of a row by status."""
    counts = [(status, row[num_status(status)]) for status in Status]
    return ", ".join(f"{count} {status}" for status, count in counts if count)


CELL_NAMES = ["model", "dataset", "method", "rank", "target_layers", "learning_rate"]


def with_spread(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """The columns that a table of cells has about the metrics."""
    endings = ("", "_sd", "_min", "_max", "_n", "_ci")
    return [f"{name}{ending}" for name in names for ending in endings if f"{name}{ending}" in table]


def recipe_notes(rows: Sequence[Cell]) -> list[str]:
    """What the numbers in brackets stand for."""
    departures = {row["recipe"]: row["differs"] for row in rows if row["recipe"] is not None}
    notes = []
    for number, differs in sorted(departures.items()):
        settings = "; ".join(as_code(difference) for difference in differs)
        notes.append(f"[{number}] differs in recipe or environment: {settings}.")
    return notes
