"""The table of earlier tasks: what runs that continue others still know of each task before them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.comparisons import Cell
from analysis.metrics import FORGETTING_SCORE, format_spread, format_value, metric
from analysis.select import records
from analysis.tables.cells import MISSING
from analysis.tables.columns import cell_names, key_columns, methods_of, run_ids_of
from analysis.tables.notes import count_note, recipe_notes
from analysis.tables.structure import Column, PaperTable, text_table
from harness.results.metrics import METRICS, Direction
from harness.results.schema import Status

_TASK = re.compile(r"environment\.earlier_tasks\.(.+)\.metric")


@dataclass(frozen=True)
class _Kept:
    """What the finished runs of a cell know of one earlier task: `score` on test, before and after, run by run."""

    row: Cell
    task: str
    score: str
    before: list[float]
    after: list[float]

    @property
    def forgotten(self) -> list[float]:
        sign = -1.0 if metric(self.score).direction is Direction.LOWER else 1.0
        return [sign * (before - after) for before, after in zip(self.before, self.after, strict=True)]


def earlier_tasks(best: pd.DataFrame, frame: pd.DataFrame) -> PaperTable | None:
    """A row for each condition and task before it: the score when it had been trained, now, and what is lost."""
    # Of thousands of runs most sweeps have none that continues another.
    has_tasks = any(map(_TASK.fullmatch, frame.columns))
    found = [kept for row in records(best) for kept in _of_cell(row, frame)] if has_tasks else []
    if not found:
        return None
    rows = [kept.row for kept in found]
    keys = [*key_columns(rows), Column("earlier task", [kept.task for kept in found])]
    columns = [
        *keys,
        Column("score", [metric(kept.score).label for kept in found]),
        _column("before", [(kept.score, kept.before) for kept in found]),
        _column("after", [(kept.score, kept.after) for kept in found]),
        _column("forgotten ↓", [(FORGETTING_SCORE, kept.forgotten) for kept in found]),
    ]
    return PaperTable(
        name="earlier_tasks",
        caption="What is left of earlier tasks.",
        text=text_table(columns, num_key_columns=len(keys)),
        numbers=pd.DataFrame([_numbers(kept) for kept in found], dtype=object),
        notes=[
            "Before: the score of the run that was trained on the earlier task. After: of the runs of this row, at "
            "their best step, on the same rows and with the head that the earlier run had. Forgotten: by how much it "
            "is worse, run by run.",
            count_note(rows),
            *recipe_notes(rows),
        ],
        run_ids=run_ids_of(rows),
        methods=methods_of(rows),
    )


def _of_cell(row: Cell, frame: pd.DataFrame) -> Iterator[_Kept]:
    runs = frame[frame["run_id"].isin(row["run_ids"]) & (frame["status"] == Status.FINISHED.value)]
    for column in frame.columns:
        match = _TASK.fullmatch(column)
        names = [] if match is None else [f"test_{name}" for name in dict.fromkeys(runs[column].dropna())]
        for name in names:
            assert match is not None
            moments = [f"environment.earlier_tasks.{match[1]}.{moment}.{name}" for moment in ("before", "after")]
            if name not in METRICS or not set(moments) <= set(frame.columns):
                continue
            pairs = runs[moments].dropna()
            if len(pairs):
                yield _Kept(row, match[1], name, *(pairs[moment].astype(float).tolist() for moment in moments))


def _column(heading: str, cells: Sequence[tuple[str, list[float]]]) -> Column:
    return Column(heading, [_text(*cell) for cell in cells], [statistics.fmean(values) for _, values in cells])


def _text(name: str, values: Sequence[float]) -> str:
    text = format_value(name, statistics.fmean(values)) if values else MISSING
    return f"{text} ± {format_spread(name, statistics.stdev(values))}" if len(values) > 1 else text


def _numbers(kept: _Kept) -> dict[str, object]:
    line: dict[str, object] = {key: kept.row[key] for key in cell_names(kept.row)}
    line |= {"earlier_task": kept.task, "metric": kept.score, "n": len(kept.before)}
    for moment, values in (("before", kept.before), ("after", kept.after), ("forgotten", kept.forgotten)):
        line[moment] = statistics.fmean(values)
        line[f"{moment}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return line
