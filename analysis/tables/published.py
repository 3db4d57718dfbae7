"""Rows that papers print, to stand beside measured ones: quoted as text, and never part of a statistic.

They come from `analysis.papers`; where a printed parameter count is known to be wrong or cannot be reproduced, the cell
says what the formula gives and a note why.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from analysis.papers import Paper, QuotedRow, QuotedTable, shipped_papers
from analysis.tables.cells import MISSING


@dataclass(frozen=True)
class Published:
    """One quoted row. Figures are text as printed, with their printed spread.

    Attributes:
        source: paper and table.
        rank: None where the method has none.
        params: the parameter count, printed or by arithmetic.
        metric: of `text`.
        text: the row's figure, where it has one.
        scores: by dataset or metric name, where it has several.
        by_rank: (figure, None) by rank, for the form rank x target layers.
    """

    source: str
    model: str
    dataset: str
    method: str
    rank: int | None
    target_layers: str
    params: str
    metric: str
    text: str = ""
    scores: dict[str, str] = field(default_factory=dict)
    by_rank: dict[int, tuple[str, float | None]] = field(default_factory=dict)


def quoted_tables(form: str) -> list[tuple[Paper, QuotedTable]]:
    """The tables of papers that are quoted under a table of ours, by its name."""
    return [(paper, table) for paper in shipped_papers() for table in paper.tables if table.form == form]


def quoted_rows(form: str) -> list[Published]:
    """The quoted rows of a table's form, by the name of our table; none where nothing is quoted for it."""
    return [_published(source_of(paper, table), row) for paper, table in quoted_tables(form) for row in table.rows]


def source_of(paper: Paper, table: QuotedTable) -> str:
    """Paper and table, for a note."""
    return f"{paper.source}, {table.table}"


def params_of(row: QuotedRow) -> str:
    """The parameter count as printed, with what the formula gives."""
    return row.params or (MISSING if row.count is None else row.count.shown)


def _published(source: str, row: QuotedRow) -> Published:
    metric, text = next(iter(row.scores.items()), (row.metric, ""))
    return Published(
        source=source,
        model=row.model,
        dataset=row.dataset,
        method=row.method,
        rank=row.rank,
        target_layers=row.target_layers,
        params=params_of(row),
        metric=row.metric or metric,
        text=text,
        scores=dict(row.scores),
        by_rank={rank: (figure, None) for rank, figure in row.by_rank.items()},
    )
