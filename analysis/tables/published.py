"""Rows that papers print, to stand beside measured ones: quoted as text, and never part of a statistic.

`published.csv` holds a line per printed figure, with its source; where a printed parameter count is known to be wrong
or cannot be reproduced, its note says what arithmetic gives.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

DATA_FILE = Path(__file__).with_name("published.csv")


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
        note: what is known to be wrong with the row.
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
    note: str = ""


@cache
def _figures() -> list[dict[str, str]]:
    with DATA_FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def quoted_rows(form: str) -> list[Published]:
    """The quoted rows of a table's form, by the name of our table; none where nothing is quoted for it."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for figure in _figures():
        if figure["form"] == form:
            groups.setdefault(_row_key(form, figure), []).append(figure)
    return [_row(form, figures) for figures in groups.values()]


# What is one row of a form: figures that agree in these.
_ROW_KEYS = {
    "rank_by_target_layers": ("source", "model", "dataset", "method", "target_layers"),
    "target_layers_at_budget": ("source", "model", "dataset", "method", "target_layers"),
    "rank_sweep": ("source", "model", "dataset", "method", "rank"),
    "tasks_by_methods": ("source", "model", "method", "rank"),
}


def _row_key(form: str, figure: dict[str, str]) -> tuple[str, ...]:
    return tuple(figure[name] for name in _ROW_KEYS[form])


def _row(form: str, figures: list[dict[str, str]]) -> Published:
    first = figures[0]
    row = Published(
        source=first["source"],
        model=first["model"],
        dataset=first["dataset"],
        method=first["method"],
        rank=int(first["rank"]) if first["rank"] else None,
        target_layers=first["target_layers"],
        params=first["params"],
        metric=first["metric"],
        text=_text(figures[-1]),
        note=". ".join(figure["note"] for figure in figures if figure["note"]),
    )
    for figure in figures:
        if form == "rank_by_target_layers":
            row.by_rank[int(figure["rank"])] = (_text(figure), None)
        else:
            row.scores[figure["dataset"] if form == "tasks_by_methods" else figure["metric"]] = _text(figure)
    return row


def _text(figure: dict[str, str]) -> str:
    return f"{figure['value']} ± {figure['spread']}" if figure["spread"] else figure["value"]
