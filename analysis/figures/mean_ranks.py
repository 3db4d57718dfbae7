"""The critical-difference figure: mean ranks over datasets on a line, methods that do not differ under one bar."""

from __future__ import annotations

import textwrap
from functools import partial

import matplotlib.figure
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from analysis.axes import axes_texts, varied
from analysis.figures.engine import Figure
from analysis.figures.panels import short_name
from analysis.figures.style import DPI, INK, PAGE_INCHES, SMALL, TEXT, our_settings
from analysis.mean_ranks import MeanRanks, mean_ranks
from analysis.select import best_cells, records


def mean_rank_figures(cells: pd.DataFrame) -> list[Figure]:
    """A figure for each model with scores on five datasets or more, from a table of `select.cells`."""
    found = mean_ranks(records(best_cells(cells)))
    return [
        Figure(
            "mean_ranks" if len(found) == 1 else f"mean_ranks_{number}",
            f"Mean ranks over {len(one.datasets)} datasets, {one.model}",
            partial(_draw, one),
        )
        for number, one in enumerate(found, start=1)
    ]


_LINE_INCHES = 0.19
_BAR_INCHES = 0.09


def _draw(ranks: MeanRanks) -> matplotlib.figure.Figure:
    """The axis above, under it a bar for each group, and below each method with a line up to its rank."""
    num_left = (len(ranks.lines) + 1) // 2
    bars, rows = ranks.groups(), max(num_left, len(ranks.lines) - num_left)
    depth = _BAR_INCHES * (len(bars) + 1) + _LINE_INCHES * rows
    with our_settings():
        figure = matplotlib.figure.Figure(figsize=(PAGE_INCHES, depth + 0.9), dpi=DPI)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.3, 0.35 / (depth + 0.9), 0.4, depth / (depth + 0.9)))
        low, high = 1, len(ranks.lines)
        axes.set(xlim=(low, high), ylim=(depth, 0))
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.spines["top"].set_visible(True)
        axes.xaxis.tick_top()
        axes.set_yticks([])
        axes.set_xticks(range(low, high + 1, max(1, high // 10)))
        figure.suptitle(f"{short_name(ranks.model)}: mean rank over {len(ranks.datasets)} datasets, ← better")
        for number, (start, end) in enumerate(bars, start=1):
            height = _BAR_INCHES * number
            axes.plot([ranks.ranks[start], ranks.ranks[end]], [height] * 2, color=INK, linewidth=2.2, label="alike")
        for place, rank in enumerate(ranks.ranks):
            is_left = place < num_left
            row = place if is_left else len(ranks.lines) - 1 - place
            height = _BAR_INCHES * (len(bars) + 1) + _LINE_INCHES * (row + 0.5)
            _draw_method(axes, f"{_name(ranks, place)} ({rank:.2f})", rank, height, is_left=is_left)
        text = textwrap.fill(_footnote(ranks), round(PAGE_INCHES * 19.5))
        figure.text(0.01, 0.02, text, ha="left", va="bottom", fontsize=SMALL, color=INK)
    return figure


def _draw_method(axes: Axes, text: str, rank: float, height: float, *, is_left: bool) -> None:
    low, high = axes.get_xlim()
    end = low if is_left else high
    axes.plot([rank, rank, end], [0, height, height], color=INK, linewidth=0.6, label=text)
    offset, side = ((-3, 0), "right") if is_left else ((3, 0), "left")
    axes.annotate(text, (end, height), offset, textcoords="offset points", ha=side, annotation_clip=False, **TEXT)


def _name(ranks: MeanRanks, place: int) -> str:
    rows = [next(iter(line.values())) for line in ranks.lines]
    row = rows[place]
    rank = [] if row["rank"] is None else [f"r{row['rank']:g}"]
    placement = [] if row["target_layers"] is None else [short_name(row["target_layers"])]
    own = [short_name(text, 40) for text in axes_texts(row, varied(rows))]
    mark = [] if row["recipe"] is None else [f"[{row['recipe']}]"]
    return " ".join([short_name(row["method"]), *rank, *placement, *own, *mark])


def _footnote(ranks: MeanRanks) -> str:
    friedman = "" if ranks.friedman is None else f"Friedman: p = {ranks.friedman:.3g}; "
    pairs = f"Wilcoxon over datasets, Holm for {len(ranks.pairs)} pairs"
    return f"{friedman}bar: no pair under it differs at 5 % ({pairs}), which does not show that they are equal"
