"""The table of conditions compared on the same rows of test, from the predictions that their runs saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from analysis.comparisons import Cell, holm, ranked_by
from analysis.metrics import format_spread
from analysis.predictions import NUM_RESAMPLES, Answers, PairedRows, PredictionsError, paired_rows, read_answers
from analysis.select import num_status, records, score
from analysis.tables.cells import cell_name, comparison_name, recipe_mark
from analysis.tables.columns import cell_names, key_columns, methods_of
from analysis.tables.comparable import comparison_of, full_of
from analysis.tables.notes import first_of, recipe_notes
from analysis.tables.structure import Column, PaperTable, text_table
from harness.results.schema import Status

_MINUS = "\N{MINUS SIGN}"
_ACCURACY = "test_accuracy"


@dataclass(frozen=True)
class _Line:
    row: Cell
    other: Cell
    against: str
    seeds: tuple[int, ...]
    num_rows: int
    found: PairedRows


@dataclass(frozen=True)
class _Saved:
    """The answers of finished runs, by seed, each file read once; and what cannot be compared, in words."""

    runs_dir: Path
    seeds: dict[str, int]
    accuracies: dict[str, float]
    by_cell: dict[str, dict[int, Answers]] = field(default_factory=dict)
    problems: dict[str, None] = field(default_factory=dict)

    def of(self, row: Cell) -> dict[int, Answers]:
        if row["cell_id"] not in self.by_cell:
            found = {self.seeds[run_id]: self._read(run_id) for run_id in row["run_ids"] if run_id in self.seeds}
            self.by_cell[row["cell_id"]] = {seed: answers for seed, answers in found.items() if answers is not None}
        return self.by_cell[row["cell_id"]]

    def _read(self, run_id: str) -> Answers | None:
        try:
            answers = read_answers(self.runs_dir, run_id)
        except PredictionsError as error:
            self.problems[f"cannot be read: {error}"] = None
            return None
        recorded = self.accuracies[run_id]
        # NaN, of what records no accuracy, contradicts nothing.
        if answers is not None and abs(answers.right.mean() - recorded) * len(answers.right) > 0.5:
            self.problems[
                f"{run_id}: its predictions have an accuracy of {answers.right.mean():.4f}, its result {recorded:.4f}"
            ] = None
            return None
        return answers


def paired_predictions(best: pd.DataFrame, frame: pd.DataFrame, runs_dir: Path) -> PaperTable | None:
    """Each condition against the best on val, and against full fine-tuning, of its model, dataset and recipe.

    Args:
        best: a row per condition, from `select.best_cells`.
        frame: a row per run, from `load_runs`.
        runs_dir: where the runs lie, with their predictions.
    """
    finished = frame[frame["status"] == Status.FINISHED.value]
    saved = _Saved(
        runs_dir,
        dict(zip(finished["run_id"], finished["config.seed"], strict=True)),
        dict(zip(finished["run_id"], finished[_ACCURACY], strict=True)),
    )
    rows = records(best)
    lines = [line for row, other, why in _pairs(rows) if (line := _line(rows, row, other, why, saved)) is not None]
    if not lines:
        return None
    shown = [line.row for line in lines]
    corrected = holm([line.found.p_value for line in lines])
    keys = key_columns(shown)
    columns = [
        *keys,
        Column("against", [line.against for line in lines]),
        Column(
            "difference", [_signed(line.found.difference) for line in lines], [line.found.difference for line in lines]
        ),
        Column(
            "95 % interval",
            [f"{_signed(low)} to {_signed(high)}" for low, high in (line.found.interval for line in lines)],
        ),
        Column("p (Holm)", list(map(_p_text, corrected)), [*corrected]),
        Column("seeds", [str(len(line.seeds)) for line in lines], [float(len(line.seeds)) for line in lines]),
        Column("test rows", [f"{line.num_rows:,}" for line in lines], [float(line.num_rows) for line in lines]),
    ]
    return PaperTable(
        name="paired_predictions",
        caption="The same rows of test: accuracy of a condition less that of another.",
        text=text_table(columns, num_key_columns=len(keys) + 1),
        numbers=pd.DataFrame(list(map(_numbers, lines, corrected)), dtype=object),
        notes=[*_notes(lines), *_problem_notes(saved), *recipe_notes([*shown, *(line.other for line in lines)])],
        run_ids=[(*line.row["run_ids"], *line.other["run_ids"]) for line in lines],
        methods=methods_of(shown),
    )


def _pairs(rows: Sequence[Cell]) -> Iterator[tuple[Cell, Cell, str]]:
    """Every condition with those that it is compared with, and in words why with the first; no two twice."""
    references = full_of(rows)
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for row in rows:
        groups.setdefault(comparison_of(row), []).append(row)
    for comparison, members in groups.items():
        # Of those with the most finished runs: what is left of a condition that half failed is not its quality.
        most = max(row[num_status(Status.FINISHED)] for row in members)
        complete = [row for row in members if row[num_status(Status.FINISHED)] == most]
        ranked = ranked_by(complete, score(members[0], "val"))
        best, full = complete[ranked[0]] if ranked else None, references.get(comparison)
        for row in members:
            if best is not None and row is not best and row is not full:
                yield row, best, " (best on val)"
            if full is not None and full is not best and row is not full:
                yield row, full, ""


def _line(rows: Sequence[Cell], row: Cell, other: Cell, why: str, saved: _Saved) -> _Line | None:
    of_row, of_other = saved.of(row), saved.of(other)
    seeds = tuple(sorted(of_row.keys() & of_other.keys()))
    if not seeds:
        return None
    if len({answers[seed].rows for answers in (of_row, of_other) for seed in seeds}) > 1:
        name = f"{cell_name(row)} and {cell_name(other)} of {comparison_name(row, rows)}"
        saved.problems[f"{name} were scored on different rows of test"] = None
        return None
    found = paired_rows(*([answers[seed].right for seed in seeds] for answers in (of_row, of_other)))
    against = cell_name(other) + recipe_mark(other) + why
    return _Line(row, other, against, seeds, len(of_row[seeds[0]].right), found)


def _signed(value: float) -> str:
    return f"{_MINUS if value < 0 else '+'}{format_spread(_ACCURACY, abs(value))}"


def _p_text(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _notes(lines: Sequence[_Line]) -> Iterator[str]:
    yield (
        "Difference: accuracy of the row less that of the condition against which it stands, runs of the same seed on "
        f"the same rows; over several seeds the mean. 95 % interval: percentiles of {NUM_RESAMPLES:,} bootstrap "
        "resamples of the rows, each drawn for both sides and all seeds. Both hold for the models that were trained: "
        "how much other seeds would change is not in them."
    )
    several = "; over several seeds twice the mean of theirs in the same direction (Vovk and Wang 2020), twice"
    yield (
        f"p: McNemar's exact test{several if any(len(line.seeds) > 1 for line in lines) else ''}; with Holm's "
        f"correction for the {len(lines)} row{'s' * (len(lines) != 1)} of this table."
    )


def _problem_notes(saved: _Saved) -> Iterator[str]:
    if saved.problems:
        yield f"Not compared: {first_of(list(saved.problems))}."


def _numbers(line: _Line, corrected: float) -> dict[str, object]:
    names = cell_names(line.row)
    return {
        **{name: line.row[name] for name in names},
        **{f"other_{name}": line.other[name] for name in names if name not in ("model", "dataset")},
        "metric": _ACCURACY,
        "difference": line.found.difference,
        "low": line.found.interval[0],
        "high": line.found.interval[1],
        "p": line.found.p_value,
        "p_holm": corrected,
        "num_rows": line.num_rows,
        "seeds": line.seeds,
        "only_row_right": line.found.only_first,
        "only_other_right": line.found.only_second,
    }
