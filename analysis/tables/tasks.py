"""The table of methods on several tasks, as the LoRA paper prints it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pandas as pd

from analysis.mean_ranks import MIN_DATASETS, Line, lines_of, mean_ranks
from analysis.metrics import ARROWS, format_value, metric, title
from analysis.select import records, score
from analysis.tables.cells import MISSING, QUOTED_MARK, edge_mark, recipe_mark, show_metric
from analysis.tables.columns import axis_columns, methods_of, metric_column, rank_values, scores_by_split
from analysis.tables.comparable import best_rows
from analysis.tables.notes import bold_notes, collapsed_notes, count_note, edge_notes, recipe_notes
from analysis.tables.published import Published, quoted_rows
from analysis.tables.quoted import QuotedCell, quoted, quoted_notes, rule_before_quoted, with_quoted
from analysis.tables.structure import Column, PaperTable, text_table
from harness.results.metrics import Direction


def tasks_by_methods(best: pd.DataFrame, *, published: bool = False) -> PaperTable | None:
    """Test scores of every method (rows) on every dataset (columns) and their mean: the LoRA paper's Table 2."""
    cells = records(best)
    datasets = list(dict.fromkeys(row["dataset"] for row in cells))
    if len(datasets) < 2:
        return None
    lines = lines_of(cells)
    first = [next(iter(line.values())) for line in lines]
    below = quoted_rows("tasks_by_methods") if published else []
    key_columns = [
        Column("model", [row["model"] for row in first]),
        Column("method", [row["method"] + recipe_mark(row) for row in first]),
        Column("rank", [MISSING if row["rank"] is None else str(row["rank"]) for row in first], rank_values(first)),
        Column("target layers", [row["target_layers"] or MISSING for row in first]),
        *axis_columns(first),
    ]
    task_columns = {dataset: _task_column(dataset, lines) for dataset in datasets}
    columns = [
        *key_columns,
        metric_column(first, "num_trainable_params"),
        *task_columns.values(),
        _average_column(datasets, lines),
    ]
    titles = {dataset: column.title for dataset, column in task_columns.items()}
    text = text_table(
        with_quoted(columns, below, _quoted_cells({**titles, "mean": "mean"})),
        num_key_columns=len(key_columns),
        rules=rule_before_quoted(len(first), below),
    )
    return PaperTable(
        name="tasks_by_methods",
        caption="Methods on every task, by each task's metric on test, and their mean.",
        text=text,
        numbers=scores_by_split([row for line in lines for row in line.values()]),
        notes=[
            f"{count_note(cells)} Mean: of the tasks' means, whatever their metrics, only where all have one and "
            "more is better in all; it is not tested.",
            *([] if mean_ranks(cells) else [_refusal(lines)]),
            *bold_notes(cells, [score(row, "test") for row in cells], any_bold=bool(text.bold)),
            *collapsed_notes(cells),
            *edge_notes(cells),
            *recipe_notes(cells),
            *quoted_notes("tasks_by_methods", published),
        ],
        run_ids=[
            *(tuple(run_id for row in line.values() for run_id in row["run_ids"]) for line in lines),
            *[()] * len(below),
        ],
        methods=[*methods_of(first), *[""] * len(below)],
    )


def _refusal(lines: Sequence[Line]) -> str:
    most = max(len(line) for line in lines)
    return (
        f"No mean ranks and no interquartile mean: they need two methods with scores on the same {MIN_DATASETS} "
        f"datasets or more, and here a method has {most} at most."
    )


def _quoted_cells(titles: dict[str, str]) -> dict[str, Callable[[Published], QuotedCell]]:
    """What quoted rows show in the columns, by title; `titles` are those of the scores, by dataset."""
    scores = {
        heading: quoted(lambda row, dataset=dataset: row.scores.get(dataset, MISSING))  # type: ignore[misc]
        for dataset, heading in titles.items()
    }
    return {
        "model": quoted(lambda row: row.model),
        "method": quoted(lambda row: f"{row.method} ({QUOTED_MARK} quoted)"),
        "rank": quoted(lambda row: str(row.rank or MISSING)),
        "target layers": quoted(lambda row: row.target_layers or MISSING),
        title("num_trainable_params"): quoted(lambda row: row.params),
        **scores,
    }


def _task_column(dataset: str, lines: Sequence[Line]) -> Column:
    present = {index: line[dataset] for index, line in enumerate(lines) if dataset in line}
    name = score(next(iter(present.values())), "test")
    bold: set[int] = set()
    for model in {row["model"] for row in present.values()}:
        indices = [index for index, row in present.items() if row["model"] == model]
        bold |= {indices[best] for best in best_rows([present[index] for index in indices], name)}
    found = [line.get(dataset) for line in lines]
    return Column(
        f"{dataset} ({metric(name).label.removeprefix('test ')}){ARROWS[metric(name).direction]}",
        [MISSING if row is None else show_metric(row, name) + edge_mark(row) for row in found],
        [None if row is None or not row.get(f"{name}_n", 0) else float(row[name]) for row in found],
        frozenset(bold),
    )


def _average_column(datasets: Sequence[str], lines: Sequence[Line]) -> Column:
    values = [_average(datasets, line) for line in lines]
    texts = [
        MISSING if value is None else _average_text(value, line) for value, line in zip(values, lines, strict=True)
    ]
    return Column("mean", texts, values)


def _average_text(value: float, line: Line) -> str:
    """The mean in the unit of the scores, if that is one of percent."""
    names = {score(row, "test") for row in line.values()}
    is_percent = all(metric(name).display_unit == "%" for name in names)
    return format_value(min(names), value) if is_percent else f"{value:.4f}"


def _average(datasets: Sequence[str], line: Line) -> float | None:
    """The mean of the test scores, where every dataset has one and more is better in all."""
    names = {dataset: score(row, "test") for dataset, row in line.items()}
    if any(metric(name).direction is not Direction.HIGHER for name in names.values()):
        return None
    found = [
        float(line[dataset][names[dataset]])
        for dataset in datasets
        if dataset in line and line[dataset].get(f"{names[dataset]}_n", 0)
    ]
    return math.fsum(found) / len(found) if len(found) == len(datasets) else None
