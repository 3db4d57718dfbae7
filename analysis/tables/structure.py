"""What a table is made of: columns of text, laid out as rows, with caption, notes and the numbers behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd


@dataclass(frozen=True)
class Column:
    """One column before it is laid out: a title, a text per row, and what to sort by where the text is a number."""

    title: str
    texts: list[str]
    values: list[float | None] | None = None
    bold: frozenset[int] = frozenset()

    @property
    def is_number(self) -> bool:
        """Whether it is set right."""
        return self.values is not None


@dataclass(frozen=True)
class TextTable:
    """Strings ready to be laid out; the first `num_key_columns` columns name the row, numbers are set right.

    Attributes:
        bold: (row, column) of what stands out.
        values: what to sort by, parallel to `rows`; None for a text or what is missing.
        rules: rows under which a line is drawn.
    """

    titles: list[str]
    rows: list[list[str]]
    is_number: list[bool]
    num_key_columns: int
    bold: frozenset[tuple[int, int]] = frozenset()
    values: list[list[float | None]] = field(default_factory=list)
    rules: frozenset[int] = frozenset()


@dataclass(frozen=True)
class PaperTable:
    """One table of a report.

    Attributes:
        name: of its files.
        caption: a sentence above it.
        text: what people read.
        numbers: what the CSV holds: unrounded, in the stored units.
        notes: sentences underneath; text in backticks is set as code.
        run_ids: for each row, the runs behind it; none behind a quoted one.
        methods: for each row, its method; empty for a quoted one.
    """

    name: str
    caption: str
    text: TextTable
    numbers: pd.DataFrame
    notes: list[str]
    run_ids: list[tuple[str, ...]] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)


def text_table(columns: Sequence[Column], *, num_key_columns: int, rules: frozenset[int] = frozenset()) -> TextTable:
    """Columns side by side."""
    num_rows = len(columns[0].texts)
    return TextTable(
        titles=[column.title for column in columns],
        rows=[[column.texts[row] for column in columns] for row in range(num_rows)],
        is_number=[column.is_number for column in columns],
        num_key_columns=num_key_columns,
        bold=frozenset((row, index) for index, column in enumerate(columns) for row in column.bold),
        values=[[column.values[row] if column.values else None for column in columns] for row in range(num_rows)],
        rules=rules,
    )
