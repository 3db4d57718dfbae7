"""The notes under a table: what its numbers are, what its marks mean, and which runs gave none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from analysis.axes import axes_of
from analysis.code_spans import as_code
from analysis.comparisons import Cell
from analysis.methods import method_label, uses_rank
from analysis.metrics import FORGETTING, format_value
from analysis.select import num_status, score
from analysis.tables.cells import (
    COLLAPSED_MARK,
    EDGE_MARK,
    EN_DASH,
    TIMES,
    cell_name,
    comparison_name,
    recipe_mark,
    same_everywhere,
    show_metric,
    show_rate,
)
from analysis.tables.comparable import by_dataset, comparison_of
from harness.results.metrics import COLLAPSED_ABOVE
from harness.results.schema import Status

# From such a ratio of learning rates on, the heads of two rows are not trained alike: a step of a search.
_FAR_APART = 3.0
NOTE_N = "n: finished runs, one per seed; only they give numbers. ±: sample standard deviation over them."


def setting_note(rows: Sequence[Cell], scores: str) -> str:
    """Where a table's numbers are from, for those that stand alone."""
    same = same_everywhere(rows, ("model", "dataset"))
    rule = f"{selection_rule(best_metrics_of(rows), scores)}."
    return f"{same}: {rule}" if same else f"{rule[0].upper()}{rule[1:]}"


def axes_notes(rows: Sequence[Cell]) -> Iterator[str]:
    """Which settings stand in the columns of own axes, and what that means for the comparisons."""
    axes = axes_of(rows[0])
    if not axes:
        return
    yield f"Columns: {', '.join(f'{axis.name} is {as_code(axis.setting)}' for axis in axes)}."
    shared = [axis.name for axis in axes if not axis.is_of_method]
    own = [axis.name for axis in axes if axis.is_of_method]
    if shared:
        yield f"Rows are compared with each other, and with full fine-tuning, at equal {_listed(shared)}."
    if own:
        yield f"A method's own settings, compared as ranks are: {_listed(own)}."


def _listed(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), names[-1]])


def best_metrics_of(rows: Sequence[Cell]) -> str:
    """By what the rows' datasets are judged, in words."""
    return " or ".join(dict.fromkeys(row["best_metric"] for row in rows))


def selection_rule(best_metrics: str, scores: str = "best") -> str:
    """From which split and which step the scores come, in words."""
    if scores == "last":
        return "scores of the last step; learning rate chosen on val only; test used for no choice"
    return f"best step chosen on val only, by {best_metrics}; test evaluated after training, and used for no choice"


def count_note(rows: Sequence[Cell]) -> str:
    """How many seeds stand behind the numbers of a table that has no column for it."""
    counts = sorted({row[num_status(Status.FINISHED)] for row in rows})
    shown = str(counts[-1]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}, fewer where runs failed"
    return f"Finished runs behind each number, one per seed: {shown}. ±: sample standard deviation over them."


# ---------------------------------------------------------------- comparisons

NOTE_BOLD = (
    "Bold: better than every other row of its model, dataset and recipe that has two runs, by two-sided t-tests with "
    "Holm's correction for their number, p < 0.05, paired by seed where both have the same seeds, else Welch's."
)


NOTE_RATIO = (
    "ratio to full fine-tuning of the same model, dataset and recipe (every setting but the learning rate and those of "
    f"the method), for times also on the same device; {EN_DASH} where that was not run; below 1{TIMES} is less."
)


def bold_notes(rows: Sequence[Cell], names: Sequence[str], *, any_bold: bool) -> Iterator[str]:
    """What bold means here, or why there is none."""
    if any_bold:
        yield NOTE_BOLD
    elif any(row.get(f"{name}_n", 0) > 1 for row in rows for name in names):
        yield (
            "Nothing is bold: no row is better than every other by two-sided t-tests with Holm's correction, p < 0.05, "
            "paired by seed where both have the same seeds, else Welch's."
        )
    elif any(row.get(f"{name}_n", 0) for row in rows for name in names):
        yield "One seed: no row can be told from another beyond noise, so nothing is bold."


def reference_notes(every: Sequence[Cell], rows: Sequence[Cell]) -> Iterator[str]:
    """The methods without a rank, in the recipes of a table's rows, all of which have one."""
    shown = set(map(comparison_of, rows))
    for row in every:
        if uses_rank(row) or not row[num_status(Status.FINISHED)] or comparison_of(row) not in shown:
            continue
        texts = [f"{split} {show_metric(row, score(row, split))}" for split in ("val", "test")]
        yield (
            f"For comparison, {method_label(row)}{recipe_mark(row)} of "
            f"{comparison_name(row, every)}: {', '.join(texts)} (n={row[num_status(Status.FINISHED)]})."
        )


# ---------------------------------------------------------------- marks


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
    at_edge += [f"{named(row)}, the {row['search_edge']}est of its search" for row in rows if row["search_edge"]]
    if at_edge:
        yield f"{EDGE_MARK} at the edge of the rates that were tried, so a better one may lie outside: " + (
            f"{first_of(at_edge)}."
        )
    bounded = [
        f"{named(row)} at {show_rate(row['learning_rate'])}: {row['bounded']}" for row in tuned if row["bounded"]
    ]
    if bounded:
        yield f"{EDGE_MARK} the last rate with as many finished runs: {first_of(bounded)}."
    yield from _head_notes(rows)


def _head_notes(rows: Sequence[Cell]) -> Iterator[str]:
    """That heads have the rates of their rows, where those are far apart."""
    rates = [row["learning_rate"] for row in rows if row.get("num_head_params", 0) > 0 and pd.isna(row["head_rate"])]
    if rates and max(rates) >= _FAR_APART * min(rates):
        yield (
            "The head learns at the rate of its row, and a low one may hold it back: "
            "`trainer.learning_rate_head` gives it one rate in all rows."
        )


def first_of(texts: Sequence[str]) -> str:
    """Texts one after the other; of very many the first, and how many more."""
    more = f"; and {len(texts) - _NUM_NAMED} more" if len(texts) > _NUM_NAMED else ""
    return "; ".join(texts[:_NUM_NAMED]) + more


def warning_notes(rows: Sequence[Cell], frame: pd.DataFrame) -> Iterator[str]:
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


def collapsed_notes(rows: Sequence[Cell]) -> Iterator[str]:
    """The meaning of the mark, where a table shows one."""
    if any(row["num_collapsed"] for row in rows):
        yield (
            f"{COLLAPSED_MARK} a run behind it collapsed: one class received more than {COLLAPSED_ABOVE:.1%} of its "
            "predictions."
        )


def recipe_notes(rows: Sequence[Cell]) -> list[str]:
    """What the numbers in brackets stand for."""
    departures = {row["recipe"]: row["differs"] for row in rows if row["recipe"] is not None}
    notes = []
    for number, differs in sorted(departures.items()):
        settings = "; ".join(as_code(difference) for difference in differs)
        notes.append(f"[{number}] differs in recipe or environment: {settings}.")
    return notes


# ---------------------------------------------------------------- forgetting


def forgetting_notes(rows: Sequence[Cell]) -> Iterator[str]:
    """On which set forgetting was measured, and what the models knew before they were trained."""
    measured = [row for row in rows if row.get(f"{FORGETTING}_n", 0)]
    if measured:
        sets = " or ".join(dict.fromkeys(as_code(row.get("base_domain") or "unknown") for row in measured))
        yield (
            f"Forgetting: nll on the base model's own domain ({sets}), after training minus before; 0 is none, below 0 "
            "the model got better there."
        )
    for members in by_dataset(rows):
        texts = [
            f"{name} {_range_of(members, before)}"
            for before, name in _BEFORE.items()
            if any(row.get(f"{before}_n", 0) for row in members)
        ]
        if texts:
            yield f"Before training, {members[0]['model']} on {members[0]['dataset']}: {', '.join(texts)}."


_BEFORE = {"val_nll_before": "val nll", "test_nll_before": "test nll", "base_domain_nll_before": "base domain nll"}


def _range_of(rows: Sequence[Cell], name: str) -> str:
    """The metric of all rows, which is one number where all begin with the same model."""
    texts = [format_value(name, value) for value in sorted(row[name] for row in rows if row.get(f"{name}_n", 0))]
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]}{EN_DASH}{texts[-1]}"


# ---------------------------------------------------------------- runs by name

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
