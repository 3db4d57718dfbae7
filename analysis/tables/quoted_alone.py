"""Tables that papers print and none of ours has the form of: quoted rows, under the measured ones of the same data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pandas as pd

from analysis.comparisons import Cell
from analysis.metrics import title
from analysis.papers import Paper, QuotedRow, QuotedTable
from analysis.select import records
from analysis.tables.cells import MISSING, QUOTED_MARK, recipe_mark, show_metric
from analysis.tables.columns import axis_columns, cell_names, methods_of, run_ids_of, with_spread
from analysis.tables.notes import NOTE_N, recipe_notes
from analysis.tables.published import quoted_tables
from analysis.tables.quoted import rule_before_quoted, table_notes
from analysis.tables.structure import Column, PaperTable, text_table

_PARAMS = "num_adapter_params"


def quoted_alone(best: pd.DataFrame) -> Iterator[PaperTable]:
    """The printed tables whose datasets are among those of the sweep."""
    cells = records(best)
    for paper, table in quoted_tables("own"):
        rows = [row for row in cells if row["dataset"] in table.datasets]
        if rows:
            yield _table(best, rows, paper, table)


def _table(best: pd.DataFrame, rows: Sequence[Cell], paper: Paper, table: QuotedTable) -> PaperTable:
    below = table.rows
    keys = [
        _text("model", rows, below, [f"{row.model} ({QUOTED_MARK} quoted)" for row in below]),
        _text("dataset", rows, below, [row.dataset or MISSING for row in below]),
        Column("method", [*(row["method"] + recipe_mark(row) for row in rows), *(row.method for row in below)]),
        Column("target layers", [*(row["target_layers"] or MISSING for row in rows), *_or_missing(below)]),
        _ranks(rows, below),
        *_axes(rows, below),
    ]
    scores = list(dict.fromkeys(name for row in below for name in row.scores))
    text = text_table(
        [*keys, *_counts(rows, below), *(_scores(name, rows, table) for name in scores)],
        num_key_columns=len(keys),
        rules=rule_before_quoted(len(rows), below),
    )
    shown = [name for name in (_PARAMS, *table.measured.values()) if name in best]
    is_shown = best["cell_id"].isin([row["cell_id"] for row in rows])
    return PaperTable(
        name=f"published_{paper.path.stem}_{re.sub('[^a-z0-9]+', '_', table.table.lower())}",
        caption=f"What {paper.paper} prints, under what was measured: {table.table}.",
        text=text,
        numbers=best.loc[is_shown, [*cell_names(best), *with_spread(best, shown)]],
        notes=[NOTE_N, *recipe_notes(rows), *table_notes(paper, table), *_units_note(table)],
        run_ids=[*run_ids_of(rows), *[()] * len(below)],
        methods=[*methods_of(rows), *[""] * len(below)],
    )


def _units_note(table: QuotedTable) -> Iterator[str]:
    if table.measured:
        measured = ", ".join(f"{name}: {title(metric)}" for name, metric in table.measured.items())
        yield f"Measured in the columns of scores, each in its own unit: {measured}."


def _text(name: str, rows: Sequence[Cell], below: Sequence[QuotedRow], texts: Sequence[str]) -> Column:
    return Column(name, [*(row[name] for row in rows), *texts])


def _or_missing(below: Sequence[QuotedRow]) -> list[str]:
    return [row.target_layers or MISSING for row in below]


def _ranks(rows: Sequence[Cell], below: Sequence[QuotedRow]) -> Column:
    ranks = [*(row["rank"] for row in rows), *(row.rank for row in below)]
    texts = [MISSING if rank is None else str(rank) for rank in ranks]
    return Column("rank", texts, [None if rank is None else float(rank) for rank in ranks])


def _axes(rows: Sequence[Cell], below: Sequence[QuotedRow]) -> list[Column]:
    """What else tells rows apart: the sweep's own axes, and those of the paper."""
    measured = {column.title: column for column in axis_columns(rows)}
    titles = dict.fromkeys([*measured, *(name for row in below for name in row.axes)])
    columns = []
    for name in titles:
        own = measured[name].texts if name in measured else [MISSING] * len(rows)
        columns.append(Column(name, [*own, *(row.axes.get(name, MISSING) for row in below)]))
    return columns


def _counts(rows: Sequence[Cell], below: Sequence[QuotedRow]) -> list[Column]:
    """Our count, measured or by the formula; what is printed; and the difference, where it is more than rounding."""
    ours: list[int | None] = [row.get(_PARAMS) for row in rows]
    ours += [None if row.count is None else row.count.formula for row in below]
    printed = [row.params or (MISSING if row.count is None else row.count.printed.text) for row in below]
    if all(text == MISSING for text in printed):
        printed, off = [], []
    else:
        off = [MISSING if row.count is None or row.count.off is None else f"{row.count.off:+.1%}" for row in below]
    texts = [MISSING if count is None or count != count else f"{count:,.0f}" for count in ours]
    none = [MISSING] * len(rows)
    columns = [Column(title(_PARAMS), texts, [None if count is None else float(count) for count in ours])]
    if printed:
        columns += [
            Column(f"printed {QUOTED_MARK}", [*none, *printed], [None] * len(texts)),
            Column("formula / printed", [*none, *off], [None] * len(texts)),
        ]
    return columns


def _scores(name: str, rows: Sequence[Cell], table: QuotedTable) -> Column:
    metric = table.measured.get(name)
    has = [metric is not None and bool(row.get(f"{metric}_n", 0)) for row in rows]
    texts = [show_metric(row, metric) if there and metric else MISSING for row, there in zip(rows, has, strict=True)]
    values = [float(row[metric]) if there and metric else None for row, there in zip(rows, has, strict=True)]
    quoted = [row.scores.get(name, MISSING) for row in table.rows]
    return Column(name, [*texts, *quoted], [*values, *[None] * len(quoted)])
