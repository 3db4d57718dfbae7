"""Scores along an own axis of the runs, as epochs or alpha: a figure for each axis that lines can be drawn along."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from analysis.axes import Axis, axes_of, axis_number, axis_order, axis_text
from analysis.comparisons import ranked_by
from analysis.curves import Curves
from analysis.figures.axes import axis_label, draw_means, draw_references, of_same_recipe, set_ticks, without_rank
from analysis.figures.engine import Figure, FigureKind, figures_of
from analysis.figures.footnote import Footnote
from analysis.figures.labels import label_end
from analysis.figures.panels import Panel, PlottedCell, panels_of

MAX_LINES = 12


def own_axis_figures(cells: pd.DataFrame, curves: Curves) -> list[Figure]:
    """The score on test along each own axis, from a table of `select.cells`."""
    return [
        figure
        for axis in axes_of(cells.columns)
        for figure in figures_of([_kind(axis)], panels_of(cells, curves, along=axis))
    ]


def _kind(axis: Axis) -> FigureKind:
    return FigureKind(
        f"score_by_{re.sub('[^a-z0-9]+', '_', axis.name.lower()).strip('_')}",
        f"Score on test against {axis.name}",
        is_drawn_for=lambda panel: bool(_lines(panel, axis)),
        draw=partial(_draw, axis=axis),
        height=lambda panel: max(2.5, 0.8 + 0.14 * min(len(_lines(panel, axis)), MAX_LINES)),
        has_intervals=True,
        remark=_remark,
    )


def _remark(panels: Sequence[Panel]) -> str:
    is_more = any(panel.along and len(_lines(panel, panel.along)) > MAX_LINES for panel in panels)
    return f" (the {MAX_LINES} conditions that are best on val)" if is_more else ""


def _lines(panel: Panel, axis: Axis) -> list[list[PlottedCell]]:
    """Cells that differ in the axis alone, in its order; those whose best one is best on val first."""
    found: dict[str, list[PlottedCell]] = {}
    for cell in panel.with_metrics(panel.test):
        if cell.row[axis.setting] is not None:
            found.setdefault(cell.label, []).append(cell)
    several = [members for members in found.values() if len(members) > 1]
    cells = [cell for members in several for cell in members]
    places: dict[str, int] = {}
    for place, index in enumerate(ranked_by([cell.row for cell in cells], panel.val)):
        places.setdefault(cells[index].label, place)
    for members in several:
        members.sort(key=lambda cell: axis_order(cell.row[axis.setting]))
    return sorted(several, key=lambda members: places.get(members[0].label, len(cells)))


def _draw(subfigure: SubFigure, panel: Panel, footnote: Footnote, *, axis: Axis) -> None:
    axes = subfigure.subplots()
    lines = _lines(panel, axis)
    shown = lines[:MAX_LINES]
    places = _places(axes, [cell for members in shown for cell in members], axis)
    for members in shown:
        look = panel.look_by_rank(members[0])
        xs = [places[cell.row[axis.setting]] for cell in members]
        draw_means(axes, members, xs, panel.test, members[0].label, **look)
        label_end(axes, members[0].label, (xs[-1], members[-1].displayed(panel.test)), look["color"])
    drawn = [cell for members in shown for cell in members]
    if axis.is_of_method:  # which full fine-tuning does not have
        full = of_same_recipe([cell for cell in without_rank(panel) if cell.is_full], drawn)
        draw_references(axes, panel, full, footnote)
        drawn += full
    footnote.account_for([cell for cell in panel.best if not cell.num_finished], drawn, panel.test)
    if len(lines) > len(shown):
        footnote.remarks.append(f"the {MAX_LINES} conditions that are best on val, of {len(lines)}")
    axes.set(xlabel=axis.name, ylabel=axis_label(panel.test, "y"))


def _places(axes: Axes, cells: Sequence[PlottedCell], axis: Axis) -> dict[object, float]:
    """Where the values of the axis lie: numbers by their size, words side by side. Sets scale and ticks."""
    values = sorted({cell.row[axis.setting] for cell in cells}, key=axis_order)
    numbers = [number for value in values if (number := axis_number(value)) is not None]
    if len(numbers) < len(values):
        axes.set_xticks(range(len(values)), [axis_text(value) for value in values])
        axes.set_xlim(-0.5, len(values) - 0.5)
        return {value: float(place) for place, value in enumerate(values)}
    if numbers[0] > 0:
        axes.set_xscale("log")
        room = max((high / low for low, high in pairwise(numbers)), default=2.0) ** 0.25
        axes.set_xlim(numbers[0] / room, numbers[-1] * room)
        set_ticks(axes, numbers, axis_text)
    else:
        axes.set_xticks(numbers, [axis_text(number) for number in numbers])
    return dict(zip(values, numbers, strict=True))
