"""A table of text in every format in which people read it: Markdown, LaTeX, HTML, terminal; and its numbers as CSV.

What comes from configs and logs is escaped in each of them; nothing in a cell or a note can be markup or a command.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from analysis.code_spans import as_code, with_code
from analysis.tables.structure import PaperTable, TextTable

# ---------------------------------------------------------------- Markdown


def to_markdown(table: TextTable) -> str:
    """A GitHub table, padded so that it reads as plain text too."""
    rows = [
        [f"**{text}**" if (row, column) in table.bold else text for column, text in enumerate(texts)]
        for row, texts in enumerate(table.rows)
    ]
    cells = [[_in_markdown(text) for text in row] for row in (table.titles, *rows)]
    widths = [max(3, *(cell_len(row[i]) for row in cells)) for i in range(len(table.titles))]
    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, table.is_number, strict=True)]
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        padded = [
            " " * (width - cell_len(text)) + text if right else text + " " * (width - cell_len(text))
            for text, width, right in zip(row, widths, table.is_number, strict=True)
        ]
        lines.append(f"| {' | '.join(padded)} |\n")
    return "".join(lines)


def _in_markdown(text: str) -> str:
    # GitHub and notebooks take HTML in Markdown; a cell is one line.
    return _without_markup(" ".join(text.split())).replace("|", "\\|")


def note_in_markdown(note: str) -> str:
    """A note in which only its code spans and its own list are markup."""
    return "\n  - ".join(with_code(line, _without_markup, as_code) for line in note.split("\n  - "))


def _without_markup(text: str) -> str:
    # No HTML, no link, no image, no code. Emphasis can do no harm, and names are full of underscores.
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("`", "'")
    return text.replace("](", "]\\(").replace("![", "!\\[")


# ---------------------------------------------------------------- LaTeX

_LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "[": "{[}",  # at the beginning of a row LaTeX would take them for arguments of the row's end
    "*": "{*}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"{\char34}",
    "\N{EN DASH}": "--",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{MINUS SIGN}": "$-$",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "†": r"\textdagger{}",
    "‡": r"\textdaggerdbl{}",
    "§": r"\S{}",
    "¶": r"\P{}",
}


def in_latex(text: str) -> str:
    """Text in which LaTeX finds no command. What pdfLaTeX has no letter for becomes its code point."""
    return "".join(_latex_character(character) for character in " ".join(text.split()))


def _latex_character(character: str) -> str:
    if character in _LATEX_ESCAPES:
        return _LATEX_ESCAPES[character]
    if " " <= character <= "~" or "\N{INVERTED EXCLAMATION MARK}" <= character <= "ÿ":
        return character
    return f"(U+{ord(character):04X})" if character.isprintable() else ""


def to_latex(table: PaperTable, *, label: str, small_spread: bool = False) -> str:
    """A floating table for `booktabs` and `graphicx`, shrunk to the line where it is wider.

    With `small_spread` deviations are set as subscripts, as papers do.
    """
    text = table.text
    alignment = "".join("r" if right else "l" for right in text.is_number)
    lines = [
        "% \\usepackage{booktabs,graphicx}",
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{_note_in_latex(table.caption)}}}",
        rf"\label{{tab:{re.sub('[^A-Za-z0-9-]+', '-', label)}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{@{{}}{alignment}@{{}}}}",
        r"\toprule",
        " & ".join(_latex_titles(text)) + r" \\",
        r"\midrule",
    ]
    for row, cells in enumerate(text.rows):
        shown = [_small_spread(in_latex(cell)) if small_spread else in_latex(cell) for cell in cells]
        written = [rf"\textbf{{{cell}}}" if (row, column) in text.bold else cell for column, cell in enumerate(shown)]
        lines.append(" & ".join(written) + r" \\")
        if row in text.rules and row + 1 < len(text.rows):
            lines.append(r"\midrule")
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if table.notes:
        notes = r" \par ".join(_note_in_latex(note) for note in table.notes)
        lines.append(
            rf"\par\smallskip\begin{{minipage}}{{\linewidth}}\footnotesize\raggedright {notes}\end{{minipage}}"
        )
    lines.append(r"\end{table}")
    return "\n".join(lines) + "\n"


def _small_spread(text: str) -> str:
    """A deviation behind a number as its subscript."""
    return re.sub(r"(?<=\d) \$\\pm\$ ([\d.,]+)", r"$_{\\pm \1}$", text)


def _latex_titles(table: TextTable) -> list[str]:
    """The titles, folded to the width of their columns: a table of many numbers would not fit a page otherwise."""
    folded = [
        _fold_title(title, max((len(row[column]) for row in table.rows), default=0))
        for column, title in enumerate(table.titles)
    ]
    return [_stacked(title, "r" if right else "l") for title, right in zip(folded, table.is_number, strict=True)]


def _stacked(text: str, side: str) -> str:
    lines = [in_latex(line) for line in text.split("\n")]
    joined = r" \\ ".join(lines)
    return joined if len(lines) == 1 else rf"\shortstack[{side}]{{{joined}}}"


def _note_in_latex(note: str) -> str:
    return with_code(note.replace(":\n  - ", ": ").replace("\n  - ", "; "), _spaced_latex, _code_in_latex)


def _code_in_latex(text: str) -> str:
    # A long name may break at its hyphens, slashes and dots, or it would run out of the page.
    breakable = re.sub(r"([-/.=])", r"\1\\allowbreak{}", in_latex(text))
    return rf"\texttt{{{breakable}}}"


def _spaced_latex(text: str) -> str:
    """`in_latex` that keeps the spaces at both ends, which touch a code span."""
    left = " " if text[:1].isspace() else ""
    right = " " if len(text) > 1 and text[-1:].isspace() else ""
    return left + in_latex(text) + right


# ---------------------------------------------------------------- HTML


def to_html(table: PaperTable) -> str:
    """A `<table>` whose cells carry what to sort by, and whose rows say which runs they are made of."""
    text = table.text
    heads = "".join(
        f'<th scope="col"{_NUMBER_CLASS if right else ""}>{html.escape(title)}</th>'
        for title, right in zip(text.titles, text.is_number, strict=True)
    )
    lines = ["<table>", f"<thead><tr>{heads}</tr></thead>", "<tbody>"]
    lines += [_html_row(table, row) for row in range(len(text.rows))]
    lines += ["</tbody>", "</table>"]
    return "\n".join(lines)


_NUMBER_CLASS = ' class="number"'


def _html_row(table: PaperTable, row: int) -> str:
    attributes = ""
    if table.run_ids and table.run_ids[row]:
        attributes += f' data-run-ids="{html.escape(" ".join(table.run_ids[row]))}"'
    if table.methods and table.methods[row]:
        attributes += f' data-method="{html.escape(table.methods[row])}"'
    cells = []
    for column, text in enumerate(table.text.rows[row]):
        shown = html.escape(text)
        if (row, column) in table.text.bold:
            shown = f"<b>{shown}</b>"
        if not table.text.is_number[column]:
            cells.append(f"<td>{shown}</td>")
            continue
        value = table.text.values[row][column] if table.text.values else None
        sort_by = "" if value is None or math.isnan(value) else f' data-value="{value!r}"'
        cells.append(f"<td{_NUMBER_CLASS}{sort_by}>{shown}</td>")
    return f"<tr{attributes}>{''.join(cells)}</tr>"


# ---------------------------------------------------------------- CSV


def to_csv(frame: pd.DataFrame) -> str:
    """Full precision, stored units, an empty cell for what is missing; lists as JSON."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(frame.columns)
    writer.writerows(zip(*(_csv_column(frame.iloc[:, place]) for place in range(frame.shape[1])), strict=True))
    return text.getvalue()


def _csv_column(column: pd.Series[Any]) -> list[Any]:
    values = column.tolist()
    # By the column and not by the cell: a column of thousands of runs has few kinds of values, and few texts.
    if pd.api.types.is_float_dtype(column.dtype):
        return list(map(_csv_number, values))
    kinds = set(map(type, values))
    if kinds <= _AS_THEY_ARE:
        return values
    if kinds <= _AS_THEY_ARE | {str}:
        texts = {value: _csv_cell(value) for value in set(values) if isinstance(value, str)}
        return [texts.get(value, value) if type(value) is str else value for value in values]
    return list(map(_csv_cell, values))


_AS_THEY_ARE = {int, bool, type(None)}


def _csv_number(value: float) -> float | int | None:
    # Counts and bytes are whole numbers in a float column.
    return None if math.isnan(value) else int(value) if value.is_integer() else value


def _csv_cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@")):
        return f"'{value}"  # a spreadsheet would take it for a formula
    if isinstance(value, tuple):
        return json.dumps(value)
    if isinstance(value, float):
        return _csv_number(value)
    return value


# ---------------------------------------------------------------- terminal


def to_rich(table: TextTable, *, width: int) -> list[Table]:
    """The table for a terminal of this width: as many tables as it takes, each with the columns that name the row."""
    indices = range(len(table.titles))
    texts = [[row[i] for row in table.rows] for i in indices]
    keys, rest = indices[: table.num_key_columns], indices[table.num_key_columns :]
    for i in rest:
        if not table.is_number[i]:
            texts[i] = [text.replace(", ", ",\n") for text in texts[i]]
    titles = [_fold_title(title, _width(texts[i])) for i, title in enumerate(table.titles)]
    widths = [_width([titles[i], *texts[i]]) for i in indices]
    blocks = _pack(keys, rest, widths, width)
    # The narrowest of the ways with as few tables, so that the last is not a single column.
    for narrower in range(width - 1, 0, -1):
        tighter = _pack(keys, rest, widths, narrower)
        if len(tighter) > len(blocks):
            break
        blocks = tighter
    return [_rich_block([(titles[i], table.is_number[i], texts[i]) for i in (*keys, *block)]) for block in blocks]


def _pack(keys: Sequence[int], rest: Sequence[int], widths: Sequence[int], width: int) -> list[list[int]]:
    """Deals the columns in their order onto tables that begin with the key columns, two spaces between columns."""
    blocks: list[list[int]] = []
    for i in rest:
        if not blocks or sum(widths[j] + 2 for j in (*keys, *blocks[-1], i)) - 2 > width:
            blocks.append([])
        blocks[-1].append(i)
    return blocks


def _width(texts: Sequence[str]) -> int:
    return max(cell_len(line) for text in texts for line in text.split("\n"))


def _fold_title(title: str, width: int) -> str:
    """The title in lines no longer than the column's values, or than its own longest word; the arrow stays with one."""
    words = title.split(" ")
    if words[-1] in ("↑", "↓"):
        words[-2:] = ["\N{NO-BREAK SPACE}".join(words[-2:])]
    lines = textwrap.wrap(" ".join(words), max(width, *map(cell_len, words)), break_long_words=False)
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def _rich_block(columns: Sequence[tuple[str, bool, list[str]]]) -> Table:
    block = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    height = max(title.count("\n") for title, _, _ in columns)
    for title, is_number, _ in columns:
        # Text, not str: rich would read a [1] as markup. Titles stand on the rule, as in print.
        lowered = "\n" * (height - title.count("\n")) + title
        block.add_column(Text(lowered), justify="right" if is_number else "left", no_wrap=True)
    for row in zip(*(texts for _, _, texts in columns), strict=True):
        block.add_row(*map(Text, row))
    return block
