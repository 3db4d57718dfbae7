"""The report as one HTML file: tables to sort, figures to point at, and every run behind a number.

    tables, cells, runs, curves --page--> str

It opens from disk without a network: the plotting library, styles and scripts are inside, and its content security
policy forbids every request and every other script. Names, settings, errors and logs are text that anybody may have
written: here they are escaped into HTML and JSON, and `page.js` shows them as text. The same input gives the same
bytes. Numbers become text here, by the METRICS registry; `page.js` draws and formats nothing but axes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from plotly.offline import get_plotlyjs

from analysis.code_spans import with_code
from analysis.comparisons import Cell
from analysis.metrics import FORGETTING, LEARNED, format_spread, format_value, metric
from analysis.recipes import show_value
from analysis.select import best_cells, generation_scores, num_status, records, score
from analysis.tables.cells import recipe_mark
from harness.results.metrics import METRICS, Direction
from harness.results.schema import Status

# Beyond these the page would be slow to open. `runs.csv` and the run folders hold everything.
MAX_DETAILED_RUNS = 2_000
MAX_CURVE_POINTS = 200
MAX_CURVE_POINTS_ALTOGETHER = 200_000
MAX_VALUES_SHOWN = 12
MAX_LINES_OPEN = 20

MEMORY_PARTS = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes")

# What a run records during training that says how good its model is.
_CURVES = tuple(
    name
    for name in METRICS
    if name in {"train_nll", "train_mse"}
    or (name.startswith("val_") and not name.endswith(("_last", "_before", "_majority_share")))
)

# Id and title of each figure, and what its marks are. `page.js` draws them by id and hides those without data.
_FIGURES = (
    ("params", "Score and adapter size", "Dashed: conditions without an adapter. Bars: sample standard deviation."),
    (
        "memory",
        "Score and memory",
        "Dotted: the Pareto front, conditions that no other shown one beats or equals in both.",
    ),
    ("compute", "Score and training compute", "Dashed: conditions whose compute is not known."),
    (
        "forgetting",
        "Learning and forgetting",
        "Right: learned more; down: forgot less. Lines join the ranks of a placement in their order.",
    ),
    ("rank", "Score and rank", "Dashed: conditions without a rank. Bars: sample standard deviation."),
    ("rate", "Learning rates", "Score on val at every learning rate tried; filled: the chosen one."),
    ("parts", "Where the memory goes", "Mean over the runs of a cell, at the peak of a training step."),
    ("curves", "Training curves", "One line per run of the chosen cells."),
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
    figures: Sequence[tuple[str, str, bytes]] = (),
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
        figures: name, title and PNG bytes of the static figures.
    """
    best = best_cells(cells)
    detailed = _detailed_runs(frame, best)
    sections = [
        ("tables", "Tables", "".join(map(_table_html, tables))),
        ("figures", "Figures", _figures_html(len(detailed), len(frame))),
        ("failures", "Failures", _listing(failures)),
        ("environment", "Environment", _listing(environment)),
        ("differences", "What differs between runs", _differences_html(frame)),
        ("paper", "Paper figures", "".join(_paper_figure(*figure) for figure in figures)),
    ]
    sections = [section for section in sections if section[2]]
    # Line ends as the browser reads, and so hashes, them.
    scripts = [script.replace("\r\n", "\n") for script in (get_plotlyjs(), _read("page.js"))]
    data = json.dumps(_cells_data(cells, best) | _runs_data(detailed, curves), allow_nan=False, separators=(",", ":"))
    body = (
        f"<header><h1>{escape(title)}</h1>{_listing(summary)}</header>\n"
        + _navigation([(name, heading) for name, heading, _ in sections], cells)
        + "<main>\n"
        + "".join(f'<section id="{name}"><h2>{heading}</h2>\n{html}</section>\n' for name, heading, html in sections)
        + "</main>\n"
        + '<aside id="details" aria-label="Details" tabindex="-1" hidden></aside>\n'
        + f'<script type="application/json" id="data">{_escape_json(data)}</script>\n'
        + "".join(f"<script>{script}</script>\n" for script in scripts)
    )
    text = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_read('page.css')}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
    # Half a surrogate pair, which JSON can smuggle into a name, cannot be written to a file.
    return text.encode("utf-8", "replace").decode("utf-8")


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


def _item(line: str) -> str:
    """A sentence; lines of its own below it are a list in it."""
    first, *rest = line.split("\n  - ")
    return _prose(first) + ("<ul>" + "".join(f"<li>{_prose(part)}</li>" for part in rest) + "</ul>" if rest else "")


def _prose(text: str) -> str:
    """Escaped text, its backtick spans as code."""
    return with_code(text, escape, lambda code: f"<code>{escape(code)}</code>")


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


# ---------------------------------------------------------------- the parts in HTML


def _navigation(sections: Iterable[tuple[str, str]], cells: pd.DataFrame) -> str:
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading in sections)
    methods = "".join(_option(str(name), str(name)) for name in cells["method"].unique())
    tasks = "".join(_option(str(i), name) for i, name in enumerate(_tasks(cells)))
    only = ' data-only="true"' if len(_tasks(cells)) < 2 else ""
    return (
        f'<nav aria-label="Sections"><div class="links">{links}</div><div class="filters">'
        '<label>Rows with <input id="filter" type="search" placeholder="text in tables" autocomplete="off"></label>'
        f'<label>Method <select id="method"><option value="">all</option>{methods}</select></label>'
        f'<label{only}>Figures for <select id="task">{tasks}</select></label>'
        '<output id="shown" aria-live="polite"></output></div></nav>\n'
    )


def _option(value: str, text: str) -> str:
    return f'<option value="{escape(value)}">{escape(text)}</option>'


def _table_html(table: PageTable) -> str:
    return (
        f'<div class="table"><h3>{escape(table.name)}</h3><p class="caption">{_prose(table.caption)}</p>'
        f'<div class="scroll">{table.html}</div>{_listing(table.notes, "notes")}</div>\n'
    )


def _figures_html(num_detailed: int, num_runs: int) -> str:
    hint = "Point at a mark for its cell; click it, or a row of a table, for its runs; click a legend entry to hide it."
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


def _listing(lines: Sequence[str], kind: str = "lines") -> str:
    if not lines:
        return ""
    html = f'<ul class="{kind}">' + "".join(f"<li>{_item(line)}</li>" for line in lines) + "</ul>"
    return html if len(lines) <= MAX_LINES_OPEN else f"<details><summary>{len(lines):,} lines</summary>{html}</details>"


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


# ---------------------------------------------------------------- the data of the script


def _cells_data(cells: pd.DataFrame, best: pd.DataFrame) -> dict[str, Any]:
    tasks, chosen, rows = _tasks(cells), set(best["cell_id"]), records(cells)
    series = list(dict.fromkeys(map(_series, rows)))
    generated = generation_scores(cells)
    return {
        "tasks": [_task(table.iloc[0]) for table in tasks.values()],
        "series": series,
        "memory": _axis("peak_memory_bytes"),
        "parts": [_axis(name) for name in MEMORY_PARTS],
        "params": _axis("num_adapter_params"),
        "compute": f"{metric('train_flops').label} ({metric('train_flops').unit})",
        "learned": metric(LEARNED).label,
        "forgetting": metric(FORGETTING).label,
        "cells": [
            _cell(cell, generated)
            | {
                "task": list(tasks).index(_task_name(cell)),
                "series": series.index(_series(cell)),
                "best": cell["cell_id"] in chosen,
            }
            for cell in rows
        ],
    }


def _runs_data(detailed: pd.DataFrame, curves: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Settings that all runs share are stored once, the others and the metrics as a list per run."""
    names = [name for name in detailed.columns if name.startswith(("config.", "environment."))]
    settings = {name: [show_value(value) for value in detailed[name]] for name in names}
    varying = [name for name in names if len(set(settings[name])) > 1]
    measured = [name for name in METRICS if detailed[name].notna().any()]
    metrics = {name: [_with_unit(name, value) for value in detailed[name]] for name in measured}
    max_points = max(20, min(MAX_CURVE_POINTS, MAX_CURVE_POINTS_ALTOGETHER // max(1, len(detailed))))
    runs, found = {}, {}
    for i, (run_id, status, error) in enumerate(
        zip(detailed["run_id"], detailed["status"], detailed["error"], strict=True)
    ):
        runs[run_id] = {
            "status": status,
            "error": error or "",
            "settings": [settings[name][i] for name in varying],
            "metrics": [metrics[name][i] for name in measured],
        }
        if thinned := _thinned(curves.get(run_id, ()), max_points):
            found[run_id] = thinned
    return {
        "settings": {name: settings[name][0] for name in names if name not in varying and settings[name]},
        "varying": varying,
        "metrics": [METRICS[name].label for name in measured],
        "runs": runs,
        "curve_labels": {name: METRICS[name].label for name in _CURVES},
        "curves": found,
    }


def _detailed_runs(frame: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """The runs whose settings, metrics and curves the page holds, those of the best cells before the others."""
    if len(frame) <= MAX_DETAILED_RUNS:
        return frame
    preferred = {run_id for run_ids in best["run_ids"] for run_id in run_ids}
    later = (~frame["run_id"].isin(preferred)).to_numpy()
    return frame.iloc[np.argsort(later, kind="stable")[:MAX_DETAILED_RUNS]]


def _tasks(cells: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The cells by model and dataset, whose scores can be compared with each other."""
    groups = (group for _, group in cells.groupby(["model", "dataset"], sort=False))
    return {_task_name(group.iloc[0]): group for group in groups}


def _task_name(cell: pd.Series[Any] | Cell) -> str:
    return f"{cell['model']} on {cell['dataset']}"


def _task(cell: pd.Series[Any]) -> dict[str, Any]:
    val, test = (metric(score(cell, split)) for split in ("val", "test"))
    return {"higher": test.direction is not Direction.LOWER, "val": val.label, "test": test.label}


def _series(cell: Cell) -> str:
    """What shares a colour: a method with a placement."""
    return ", ".join(str(part) for part in (cell["method"], cell["target_layers"]) if part is not None)


def _cell(cell: Cell, generated: Sequence[str]) -> dict[str, Any]:
    val, test = score(cell, "val"), score(cell, "test")
    return {
        "method": str(cell["method"]),
        "name": _name(cell),
        "condition": cell["condition_id"],
        "rank": _number(cell["rank"]),
        "rate": _number(cell["learning_rate"]),
        "test": _number(cell.get(test)),
        "test_sd": _number(cell.get(f"{test}_sd")),
        "val": _number(cell.get(val)),
        "val_sd": _number(cell.get(f"{val}_sd")),
        "params": _displayed("num_adapter_params", cell.get("num_adapter_params")),
        "memory": _displayed("peak_memory_bytes", cell.get("peak_memory_bytes")),
        "parts": [_displayed(name, cell.get(name)) for name in MEMORY_PARTS],
        # In the stored unit, to which the axis adds its own prefix.
        "compute": _number(cell.get("train_flops")),
        "learned": _number(cell.get(LEARNED)),
        "learned_sd": _number(cell.get(f"{LEARNED}_sd")),
        "forgetting": _number(cell.get(FORGETTING)),
        "forgetting_sd": _number(cell.get(f"{FORGETTING}_sd")),
        "runs": list(cell["run_ids"]),
        "lines": list(_lines(cell, (test, val, *generated, FORGETTING))),
    }


def _name(cell: Cell) -> str:
    rank = None if cell["rank"] is None else f"rank {cell['rank']}"
    parts = (cell["method"], rank, cell["target_layers"])
    return ", ".join(str(part) for part in parts if part is not None) + recipe_mark(cell)


def _lines(cell: Cell, scores: Iterable[str]) -> Iterator[str]:
    """What is said about a cell where one points at it, below its name."""
    yield f"learning rate {show_value(cell['learning_rate'])}"
    for name in (*scores, "peak_memory_bytes", "num_adapter_params"):
        text = _with_unit(name, cell.get(name))
        if text is None:
            continue
        sd, num = _number(cell.get(f"{name}_sd")), cell.get(f"{name}_n")
        spread = f" ± {format_spread(name, sd)} (n={num})" if sd is not None else f" (n={num})"
        yield f"{metric(name).label} {text}" + (spread if name in scores else "")
    counts = [f"{cell[num_status(status)]} {status}" for status in Status if cell[num_status(status)]]
    yield f"runs: {', '.join(counts)}"


# ---------------------------------------------------------------- numbers


def _number(value: Any) -> float | None:
    """A finite number, or None: JSON has no NaN."""
    value = value.item() if isinstance(value, np.generic) else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def _displayed(name: str, value: Any) -> float | None:
    number = _number(value)
    return None if number is None else number / metric(name).display_divisor


def _with_unit(name: str, value: Any) -> str | None:
    number, meaning = _number(value), metric(name)
    return None if number is None else f"{format_value(name, number)} {meaning.display_unit}".rstrip()


def _axis(name: str) -> str:
    meaning = metric(name)
    return f"{meaning.label} ({meaning.display_unit})" if meaning.display_unit else meaning.label


def _thinned(
    records: Sequence[Mapping[str, float]], max_points: int
) -> dict[str, tuple[list[float], list[float | None]]]:
    """By metric, steps and values of at most `max_points` records, the first and the last among them."""
    found = {}
    for name in _CURVES:
        steps = ((_number(record.get("step")), record[name]) for record in records if name in record)
        points = [(step, _rounded(value)) for step, value in steps if step is not None]
        points.sort(key=lambda point: point[0])  # a resumed run goes back a few steps
        if len(points) > max_points:
            points = [points[round(i * (len(points) - 1) / (max_points - 1))] for i in range(max_points)]
        if len(points) > 1:
            found[name] = ([step for step, _ in points], [value for _, value in points])
    return found


def _rounded(value: Any) -> float | None:
    number = _number(value)
    return None if number is None else float(f"{number:.5g}")
