"""Scores by rank and placement: curves and a heat map."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.patches import Rectangle
from matplotlib.transforms import ScaledTranslation

from analysis.figures.axes import (
    axis_label,
    draw_behind,
    draw_families,
    draw_references,
    of_same_recipe,
    set_log_x,
    set_ticks,
    without_rank,
)
from analysis.figures.engine import FigureKind
from analysis.figures.footnote import Footnote
from analysis.figures.multiples import draw_multiples, groups_of, multiples_height, multiples_remarks, shown_in
from analysis.figures.panels import Panel, PlottedCell
from analysis.figures.style import GREY, TEXT
from analysis.metrics import format_value, metric
from harness.results.metrics import Direction


def _draw_rank_curves(subfigure: SubFigure, panel: Panel, footnote: Footnote) -> None:
    groups = _rank_groups(panel)
    shown = shown_in(groups)
    full = of_same_recipe([cell for cell in without_rank(panel) if cell.is_full], shown)

    def draw_one(axes: Axes, cells: Sequence[PlottedCell], _: Callable[[PlottedCell], str]) -> None:
        set_log_x(axes, base=2)
        draw_behind(axes, panel, "rank", [cell for cell in shown if cell not in cells])
        _move_apart(axes, draw_families(axes, panel, "rank", cells))
        draw_references(axes, panel, full, footnote)
        axes.set(xlabel="rank", ylabel=axis_label(panel.test, "y"))

    for axes in draw_multiples(subfigure, groups, draw_one):
        set_ticks(axes, [cell.displayed("rank") for cell in shown], lambda value: f"{value:g}")
    compared = [cell for cell in panel.best if cell.rank or cell in full or not cell.num_finished]
    compared = [cell for cell in compared if cell.rank or cell.is_full]
    footnote.account_for(compared, [*_ranked(panel), *full], panel.test)
    footnote.remarks += ["faint: the others"] if len(groups) > 1 else []
    footnote.remarks += multiples_remarks(groups, _ranked(panel))


def _ranked(panel: Panel) -> list[PlottedCell]:
    return [cell for cell in panel.with_metrics(panel.test) if cell.rank]


def _rank_groups(panel: Panel) -> list[tuple[str, list[PlottedCell]]]:
    return groups_of(panel, _ranked(panel), by_line=True)


def _move_apart(axes: Axes, families: Sequence[Sequence[Artist]]) -> None:
    """Moves the families a little aside: the intervals of all placements would lie on one another."""
    for number, artists in enumerate(families):
        points = (number - (len(families) - 1) / 2) * 2.5
        aside = ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)
        for artist in artists:
            artist.set_transform(artist.get_transform() + aside)


def _has_rank_curve(panel: Panel) -> bool:
    families = panel.families().values()
    scored = panel.with_metrics(panel.test)
    return any(len({cell.rank for cell in family if cell in scored}) > 1 for family in families)


RANK_CURVES = FigureKind(
    "rank_curves",
    "Score on test against the rank",
    is_drawn_for=_has_rank_curve,
    draw=_draw_rank_curves,
    height=lambda panel: multiples_height(_rank_groups(panel), 2.5),
    is_wide=lambda panel: len(_rank_groups(panel)) > 1,
    has_intervals=True,
)


# ---------------------------------------------------------------- heat map


def _draw_heat_map(subfigure: SubFigure, panel: Panel, footnote: Footnote) -> None:
    axes = subfigure.subplots()
    families, ranks = list(panel.families()), panel.ranks()
    cells = {
        (ranks.index(cell.rank), families.index(cell.family)): cell for cell in panel.best if cell.rank is not None
    }
    _draw_squares(axes, panel.test, cells, (len(ranks), len(families)))
    axes.set_yticks(np.arange(len(ranks)) + 0.5, [f"{rank:g}" for rank in ranks])
    long = max(map(len, families)) > 8
    axes.set_xticks(np.arange(len(families)) + 0.5, families, rotation=30 * long, ha="right" if long else "center")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(ylabel="rank", xlabel=f"placement (in the cells: {axis_label(panel.test, 'y').partition(',')[0]})")
    scored = panel.with_metrics(panel.test)
    footnote.account_for([*cells.values()], [cell for cell in cells.values() if cell in scored], panel.test)
    footnote.remarks.append("lighter is better")


def _draw_squares(axes: Axes, name: str, cells: Mapping[tuple[int, int], PlottedCell], shape: tuple[int, int]) -> None:
    """A coloured square with its number for each cell, by row and column; one without a number is hatched."""
    scores = np.full(shape, math.nan)
    for at, cell in cells.items():
        value = cell.value(name)
        scores[at] = math.nan if value is None else value
    palette = "cividis_r" if metric(name).direction is Direction.LOWER else "cividis"
    mesh = axes.pcolormesh(np.ma.masked_invalid(scores), cmap=palette, edgecolors="white", linewidth=1.5)
    for (row, column), cell in cells.items():
        value, text, look = cell.value(name), cell.status or "not measured", {**TEXT, "ha": "center"}
        if value is None:
            frame = Rectangle((column + 0.03, row + 0.04), 0.94, 0.92, hatch="////", fill=False, ec=GREY, linewidth=0)
            axes.add_patch(frame)
            look["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        else:
            dark = np.dot(mesh.to_rgba(np.asarray(value))[:3], (0.2126, 0.7152, 0.0722)) < 0.45
            look["color"], text = "white" if dark else "black", format_value(name, value)
        # Inside its square, so that the layout need not ask each for its size.
        axes.text(column + 0.5, row + 0.5, textwrap.fill(text, 9), in_layout=False, **look)


def _has_heat_map(panel: Panel) -> bool:
    scored = any(cell.rank for cell in panel.with_metrics(panel.test))
    return scored and len(panel.ranks()) > 1 and len(panel.families()) > 1


RANK_BY_PLACEMENT = FigureKind(
    "rank_by_placement",
    "Score on test by rank and placement",
    is_drawn_for=_has_heat_map,
    draw=_draw_heat_map,
    height=lambda panel: 0.9 + 0.3 * len(panel.ranks()),
    is_wide=lambda panel: len(panel.families()) > 6,
)
