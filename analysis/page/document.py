"""The page as HTML: its sections, the styles and scripts inside it, and the policy that forbids everything else."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import pandas as pd
from plotly.offline import get_plotlyjs

from analysis.code_spans import with_code
from analysis.page.data import axis_choices, bands_data, cells_data, detailed_runs, runs_data, tasks_of
from analysis.recipes import show_value
from analysis.select import best_cells
from analysis.tables import Choice

# Beyond these a list is cut, or folded away.
MAX_VALUES_SHOWN = 12
MAX_LINES_OPEN = 20
MAX_CHOICES_OPEN = 6

# Together one script, in this order; all but the last only define what those after them use.
_SCRIPTS = ("state.js", "tables.js", "plots.js", "keyboard.js", "figures.js", "details.js", "start.js")

_BARS = '<span data-when="bars">Bars: sample standard deviation.</span>'


def _dashed(conditions: str) -> str:
    return f'<span data-when="levels">Dashed: conditions {conditions}.</span>'


# Id and title of each figure, and what its marks are. `figures.js` draws them by id, and hides those without data and
# sentences about marks that are not there.
_FIGURES = (
    (
        "memory",
        "Score and memory",
        "Dotted: the Pareto front, conditions that no other shown one beats or equals in both. Large: best on "
        f"val. {_BARS}",
    ),
    ("params", "Score and adapter size", f"{_dashed('without an adapter')} {_BARS}"),
    ("compute", "Score and training compute", _dashed("whose compute is not known")),
    (
        "forgetting",
        "Learning and forgetting",
        f"Right: learned more; down: forgot less. Lines join the ranks of a placement in their order. {_BARS}",
    ),
    ("rank", "Score and rank", f"{_dashed('without a rank')} {_BARS}"),
    ("axis", "Score along an axis of the sweep", f"Lines join what differs in this setting alone. {_BARS}"),
    ("rate", "Learning rates", "Score on val at every learning rate tried; filled: the chosen one."),
    ("parts", "Where the memory goes", "Mean over the runs of a cell, at the peak of a training step."),
    (
        "curves",
        "Training curves",
        "Mean over the seeds of each chosen cell; band: from the lowest to the highest seed.",
    ),
)


@dataclass(frozen=True)
class PageTable:
    """A table of the page.

    Attributes:
        name: its heading.
        caption: what it shows.
        html: a finished, escaped `<table>` with `<thead>` and `<tbody>`. A number carries `data-value` for sorting; a
            row may carry `data-run-ids` (separated by spaces), which open its details, and `data-method`.
        notes: sentences below it.
    """

    name: str
    caption: str
    html: str
    notes: list[str]


def page(
    *,
    title: str,
    summary: Sequence[str],
    tables: Sequence[PageTable],
    cells: pd.DataFrame,
    frame: pd.DataFrame,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    environment: Sequence[str],
    failures: Sequence[str],
    figures: Iterable[tuple[str, str, bytes]] = (),
    choices: Sequence[Choice] = (),
) -> str:
    """The whole page.

    Args:
        title: its heading.
        summary: sentences at its head. In these, as in notes, `environment` and `failures`, `code` spans are marked by
            backticks and everything else is plain text.
        tables: shown in this order.
        cells: as `analysis.select.cells` makes them from `frame`.
        frame: a row per run.
        curves: the records of a run's `metrics.jsonl`, by run id.
        environment: sentences about where the runs ran.
        failures: sentences about runs that did not finish.
        figures: name, title and PNG bytes of the static figures; asked for when all else is made.
        choices: which conditions are best on val and what cannot be told from them, before the summary.
    """
    best = best_cells(cells)
    detailed = detailed_runs(frame, best)
    leading = {choice.best["cell_id"] for choice in choices}
    found = cells_data(cells, best, leading) | runs_data(detailed, curves) | bands_data(cells, best, curves)
    data = json.dumps(found, allow_nan=False, separators=(",", ":"))
    sections = [
        ("figures", "Figures", _figures_html(len(detailed), len(frame))),
        ("tables", "Tables", "".join(map(_table_html, tables))),
        ("failures", "Failures", _listing(failures)),
        ("environment", "Environment", _listing(environment)),
        ("differences", "What differs between runs", _differences_html(frame)),
        ("paper", "Paper figures", "".join(_paper_figure(*figure) for figure in figures)),
    ]
    sections = [section for section in sections if section[2]]
    scripts = [_as_hashed(get_plotlyjs()), _own_script()]
    text = Template(_read("page.html")).substitute(
        policy=_policy(scripts),
        title=escape(title),
        style=_read("page.css"),
        choices=_choices_html(choices),
        summary=_listing(summary),
        navigation=_navigation([(name, heading) for name, heading, _ in sections], cells),
        sections="\n".join(
            f'<section id="{name}"><h2>{heading}</h2>\n{html}</section>' for name, heading, html in sections
        ),
        data=_escape_json(data),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )
    # Half a surrogate pair, which JSON can smuggle into a name, cannot be written to a file.
    return text.encode("utf-8", "replace").decode("utf-8")


# ---------------------------------------------------------------- sections


def _navigation(sections: Iterable[tuple[str, str]], cells: pd.DataFrame) -> str:
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading in sections)
    methods = "".join(_option(str(name), str(name)) for name in cells["method"].unique())
    tasks = "".join(_option(str(i), name) for i, name in enumerate(tasks_of(cells)))
    only = ' data-only="true"' if len(tasks_of(cells)) < 2 else ""
    axes = "".join(
        f'<label>{escape(name)} <select class="axis"><option value="">all</option>'
        f"{''.join(_option(value, value) for value in values)}</select></label>"
        for name, values in axis_choices(cells).items()
    )
    return (
        f'<nav aria-label="Sections"><div class="links">{links}</div><div class="filters">'
        '<label>Rows with <input id="filter" type="search" placeholder="text in tables" autocomplete="off"></label>'
        f'<label>Method <select id="method"><option value="">all</option>{methods}</select></label>{axes}'
        f'<label{only}>Figures for <select id="task">{tasks}</select></label>'
        '<output id="shown" aria-live="polite"></output></div></nav>'
    )


def _option(value: str, text: str) -> str:
    return f'<option value="{escape(value)}">{escape(text)}</option>'


def _choices_html(choices: Sequence[Choice]) -> str:
    """The first few in sight, the others folded away below them."""
    items = [f"<li>{_prose(one.verdict)}<p>{_prose(one.tests)}</p></li>" for one in choices]
    shown, others = "".join(items[:MAX_CHOICES_OPEN]), items[MAX_CHOICES_OPEN:]
    folded = f'<details><summary>{len(others):,} more</summary><ul class="choices">{"".join(others)}</ul></details>'
    return (f'<ul class="choices">{shown}</ul>' if shown else "") + (folded if others else "")


def _table_html(table: PageTable) -> str:
    return (
        f'<div class="table"><h3>{escape(table.name)}</h3><p class="caption">{_prose(table.caption)}</p>'
        f'<div class="scroll">{table.html}</div>{_notes_html(table.notes)}</div>\n'
    )


def _notes_html(notes: Sequence[str]) -> str:
    """The notes of a table folded away; they unfold in print."""
    if not notes:
        return ""
    num = f"{len(notes)} note{'s' * (len(notes) > 1)}"
    return f'<details class="notes"><summary>{num}</summary>{_list(notes, "notes")}</details>'


def _figures_html(num_detailed: int, num_runs: int) -> str:
    hint = (
        "Point at a mark for its cell; click it, or a row of a table, for its runs; click a legend entry to hide it. "
        "From the keyboard: Tab to a figure, arrow keys for its marks, Enter for the runs."
    )
    if num_detailed < num_runs:
        hint += (
            f" Settings, metrics and curves of {num_detailed:,} of {num_runs:,} runs are in this page, "
            "those of the chosen cells first; the others are in their run folders."
        )
    boxes = "".join(
        f'<figure id="figure-{name}"><h3>{title}</h3><div class="plot"></div>'
        f"<figcaption>{caption}</figcaption></figure>\n"
        for name, title, caption in _FIGURES
    )
    return (
        f'<p class="caption">{hint} Score: mean over finished runs, at the learning rate chosen on val.</p>'
        "<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>"
        '<p id="no-figures" hidden>No finished run of this choice to draw.</p>'
        f'<div class="grid">{boxes}</div>'
    )


def _differences_html(frame: pd.DataFrame) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(setting)}</code></td><td>{escape(', '.join(values))}</td></tr>"
        for setting, values in _differences(frame)
    )
    head = "<thead><tr><th>setting</th><th>values (number of runs)</th></tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>' if rows else ""


def _differences(frame: pd.DataFrame) -> Iterator[tuple[str, list[str]]]:
    """Each setting with more than one value, and its values with the number of runs, the most frequent first."""
    for column in frame.columns:
        if not column.startswith("config."):
            continue
        # Values as text only once each: among 10,000 runs most are equal.
        values = frame[column].tolist()
        counts: Counter[str] = Counter()
        for (_, value), num in Counter(zip(map(type, values), values, strict=True)).items():
            counts[show_value(value)] += num
        if len(counts) > 1:
            shown = [f"{value} ({num:,})" for value, num in counts.most_common(MAX_VALUES_SHOWN)]
            more = len(counts) - len(shown)
            yield column.removeprefix("config."), shown + ([f"and {more:,} more"] if more else [])


def _paper_figure(name: str, title: str, png: bytes) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return (
        f'<figure class="paper"><img loading="lazy" decoding="async" alt="{escape(title)}" src="{source}">'
        f"<figcaption>{escape(title)} <code>{escape(name)}</code></figcaption></figure>\n"
    )


# ---------------------------------------------------------------- sentences


def _listing(lines: Sequence[str], kind: str = "lines") -> str:
    if not lines:
        return ""
    html = _list(lines, kind)
    return html if len(lines) <= MAX_LINES_OPEN else f"<details><summary>{len(lines):,} lines</summary>{html}</details>"


def _list(lines: Sequence[str], kind: str) -> str:
    return f'<ul class="{kind}">' + "".join(f"<li>{_item(line)}</li>" for line in lines) + "</ul>"


def _item(line: str) -> str:
    """A sentence; indented lines below it become a list in it."""
    first, *rest = line.split("\n  - ")
    return _prose(first) + ("<ul>" + "".join(f"<li>{_prose(part)}</li>" for part in rest) + "</ul>" if rest else "")


def _prose(text: str) -> str:
    """Escaped text, its backtick spans as code."""
    return with_code(text, escape, lambda code: f"<code>{escape(code)}</code>")


# ---------------------------------------------------------------- safety


def _policy(scripts: Sequence[str]) -> str:
    """A content security policy that allows these scripts alone and no request at all."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _escape_json(text: str) -> str:
    """JSON, already ASCII, in which no character can end its `<script>` element."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _own_script() -> str:
    """The page's scripts as one, whose names nothing else on the page sees."""
    parts = "\n".join(_read(f"scripts/{name}") for name in _SCRIPTS)
    return f'"use strict";\n(() => {{\n{_as_hashed(parts)}}})();\n'


def _as_hashed(script: str) -> str:
    """A script with line ends as the browser reads, and so hashes, them."""
    return script.replace("\r\n", "\n")


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
