"""Rows that papers print, underneath measured ones: as text, marked as quoted, and in no statistic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from analysis.comparisons import Cell
from analysis.papers import Paper, QuotedTable
from analysis.tables.cells import MISSING, QUOTED_MARK
from analysis.tables.published import Published, quoted_tables, source_of
from analysis.tables.structure import Column

# What a quoted row shows in a column: a text, and where it can be sorted by, its value.
QuotedCell = tuple[str, float | None]


def quoted(text: Callable[[Published], str]) -> Callable[[Published], QuotedCell]:
    """A quoted cell that is text alone."""
    return lambda row: (text(row), None)


def with_quoted(
    columns: Sequence[Column],
    rows: Sequence[Published],
    cells: Mapping[str, Callable[[Published], QuotedCell]],
) -> list[Column]:
    """The columns of a table, longer by the quoted rows: `cells` by title, where a column says anything of them."""
    return [_extended(column, [cells.get(column.title, _missing)(row) for row in rows]) for column in columns]


def _missing(row: Published) -> QuotedCell:
    return MISSING, None


def _extended(column: Column, cells: Sequence[QuotedCell]) -> Column:
    values = None if column.values is None else [*column.values, *(value for _, value in cells)]
    return Column(column.title, [*column.texts, *(text for text, _ in cells)], values, column.bold)


def naming_columns(rows: Sequence[Cell], quoted_below: Sequence[Published]) -> list[Column]:
    """Columns for model and dataset, where rows differ in them or quoted ones follow, and for the method likewise."""
    names = []
    if quoted_below or len({(row["model"], row["dataset"]) for row in rows}) > 1:
        names += ["model", "dataset"]
    if len({row["method"] for row in rows}) > 1:
        names.append("method")
    return [Column(name, [row[name] for row in rows]) for name in names]


QUOTED_NAMES: dict[str, Callable[[Published], QuotedCell]] = {
    "model": quoted(lambda row: f"{row.model} ({QUOTED_MARK} quoted)"),
    "dataset": quoted(lambda row: row.dataset),
    "method": quoted(lambda row: row.method),
    "target layers": quoted(lambda row: row.target_layers),
}


def rule_before_quoted(num_measured: int, rows: Sequence[object]) -> frozenset[int]:
    """The row under which a line separates measured from quoted ones."""
    return frozenset([num_measured - 1]) if rows else frozenset()


def quoted_notes(form: str, published: bool) -> Iterator[str]:
    """Where the quoted rows of a form come from, and what is known to be wrong with them."""
    if published:
        for paper, table in quoted_tables(form):
            yield from table_notes(paper, table)


def table_notes(paper: Paper, table: QuotedTable) -> Iterator[str]:
    """Where the rows of a printed table come from, and what is known to be wrong with them."""
    yield f"{QUOTED_MARK} quoted, not measured here and in no statistic: {source_of(paper, table)}."
    for note in [*table.notes, *table.count_notes]:
        yield f"{QUOTED_MARK} {note}."
