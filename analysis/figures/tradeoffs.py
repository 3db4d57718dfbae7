"""Scores against costs: adapter parameters, memory, compute and the time of a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from analysis.figures.axes import (
    axis_label,
    draw_behind,
    draw_families,
    draw_points,
    draw_references,
    draw_without_rank,
    is_outlier,
    limits,
    name_points,
    of_same_recipe,
    outlier_text,
    set_count_ticks,
    set_log_x,
    without_rank,
)
from analysis.figures.engine import FigureKind
from analysis.figures.footnote import Footnote
from analysis.figures.labels import label_point
from analysis.figures.multiples import (
    MAX_IN_ONE,
    draw_multiples,
    groups_of,
    multiples_height,
    multiples_remarks,
    shown_in,
)
from analysis.figures.panels import Panel, PlottedCell
from analysis.figures.style import GREY, INK
from analysis.metrics import is_better


def _draw_by_params(subfigure: SubFigure, panel: Panel, footnote: Footnote) -> None:
    groups = _adapter_groups(panel)
    shown = shown_in(groups)
    references = of_same_recipe(without_rank(panel), shown)

    def draw_one(axes: Axes, cells: Sequence[PlottedCell], _: Callable[[PlottedCell], str]) -> None:
        draw_behind(axes, panel, "num_adapter_params", [cell for cell in shown if cell not in cells])
        draw_families(axes, panel, "num_adapter_params", cells)
        set_log_x(axes)
        name_points(axes, cells, "num_adapter_params", panel.test, footnote)
        draw_references(axes, panel, references, footnote)
        axes.set(xlabel=axis_label("num_adapter_params", "x"), ylabel=axis_label(panel.test, "y"))

    for axes in draw_multiples(subfigure, groups, draw_one):
        set_count_ticks(axes, "num_adapter_params")
    left_out = [cell for cell in without_rank(panel) if cell not in references]
    measured = [*_with_adapter(panel), *references]
    footnote.account_for([cell for cell in panel.best if cell not in left_out], measured, panel.test)
    footnote.remarks += ["faint: the others"] if len(groups) > 1 else []
    footnote.remarks += multiples_remarks(groups, _with_adapter(panel))


def _adapter_groups(panel: Panel) -> list[tuple[str, list[PlottedCell]]]:
    return groups_of(panel, _with_adapter(panel), by_line=True)


def _with_adapter(panel: Panel) -> list[PlottedCell]:
    return [cell for cell in _with_positive(panel, "num_adapter_params") if cell.rank]


def _with_positive(panel: Panel, cost: str) -> list[PlottedCell]:
    """The conditions with a score that have a place on a logarithmic axis of the cost."""
    return [cell for cell in panel.with_metrics(cost, panel.test) if cell.displayed(cost) > 0]


SCORE_BY_PARAMS = FigureKind(
    "score_by_params",
    "Score on test against the number of adapter parameters",
    is_drawn_for=lambda panel: len(_with_adapter(panel)) > 1,
    draw=_draw_by_params,
    height=lambda panel: multiples_height(_adapter_groups(panel), 2.5),
    is_wide=lambda panel: len(_adapter_groups(panel)) > 1,
    has_intervals=True,
)


# ---------------------------------------------------------------- memory and time: Pareto fronts


def pareto_front(costs: Sequence[float], scores: Sequence[float], name: str) -> list[int]:
    """Indices, by cost, of the points that no other beats: none costs less without scoring worse by metric `name`."""

    def beaten(index: int) -> bool:
        return any(
            (cost < costs[index] and not is_better(name, scores[index], value))
            or (cost == costs[index] and is_better(name, value, scores[index]))
            for cost, value in zip(costs, scores, strict=True)
        )

    return sorted((index for index in range(len(costs)) if not beaten(index)), key=lambda index: costs[index])


def _draw_front(subfigure: SubFigure, panel: Panel, footnote: Footnote, *, cost: str) -> None:
    """All conditions, what another beats hollow, and the stairs along the others."""
    axes = subfigure.subplots()
    cells = panel.with_metrics(cost, panel.test)
    costs, scores = ([cell.displayed(name) for cell in cells] for name in (cost, panel.test))
    front = pareto_front(costs, scores, panel.test)
    beaten: defaultdict[str, list[PlottedCell]] = defaultdict(list)
    for index, cell in enumerate(cells):
        look = panel.look_of(cell) | {"linestyle": "none"}
        if index in front:
            draw_points(axes, [cell], cost, panel.test, cell.label, **look)
        else:
            beaten[look["marker"]].append(cell)
    hollow: dict[str, Any] = {
        "color": GREY,
        "markerfacecolor": "white",
        "markersize": 3.5,
        "linestyle": "none",
        "zorder": 1,
    }
    is_crowded = _is_crowded(panel)
    for marker, members in beaten.items():
        if is_crowded:
            at_means = [(cell.displayed(cost), cell.displayed(panel.test)) for cell in members]
            axes.plot(*zip(*at_means, strict=True), label="beaten", marker=marker, **hollow)
        else:
            draw_points(axes, members, cost, panel.test, "beaten", marker=marker, **hollow)
    at = [(costs[index], scores[index]) for index in front]
    corners = [corner for (x, y), (right, up) in pairwise(at) for corner in ((x, y), (right, y), (right, up))] or at
    axes.plot(*zip(*corners, strict=True), color=INK, linewidth=0.7, zorder=0.5, label="front")
    axes.margins(0.12)
    near = [cell for cell in cells if not is_outlier(cell, cells, panel.test)]
    axes.set_ylim(*limits(near, panel.test))
    # What everything is compared with has its name also where it is beaten.
    for index in [*front, *(index for index, cell in enumerate(cells) if cell.is_full and index not in front)]:
        low, high = axes.get_ylim()
        away = " ↓" if scores[index] < low else " ↑" if scores[index] > high else ""
        label_point(axes, cells[index].label + away, costs[index], min(max(scores[index], low), high))
    footnote.account_for(panel.best, cells, panel.test)
    footnote.remarks += [outlier_text(cell, panel.test, footnote) for cell in cells if cell not in near]
    without = ", without its noise" if is_crowded and beaten else ""
    footnote.remarks.append(f"line: what nothing beats in both; hollow: beaten{without}")
    footnote.remarks += ["time: median and range"] if f"{cost}_min" in cells[0].row else []
    axes.set(xlabel=axis_label(cost, "x"), ylabel=axis_label(panel.test, "y"))


def _can_draw_front(panel: Panel, *, cost: str) -> bool:
    return len(panel.with_metrics(cost, panel.test)) > 1


def _is_crowded(panel: Panel) -> bool:
    """Whether the names along a front need the width of the page."""
    return len(panel.with_metrics(panel.test)) > MAX_IN_ONE


SCORE_BY_MEMORY = FigureKind(
    "score_by_memory",
    "Score on test against peak memory",
    is_drawn_for=partial(_can_draw_front, cost="peak_memory_bytes"),
    draw=partial(_draw_front, cost="peak_memory_bytes"),
    is_wide=_is_crowded,
    has_intervals=True,
)
SCORE_BY_STEP_TIME = FigureKind(
    "score_by_step_time",
    "Score on test against the time of a step",
    is_drawn_for=partial(_can_draw_front, cost="step_seconds_median"),
    draw=partial(_draw_front, cost="step_seconds_median"),
    is_wide=_is_crowded,
    has_intervals=True,
)


# ---------------------------------------------------------------- compute


def _draw_by_compute(subfigure: SubFigure, panel: Panel, footnote: Footnote) -> None:
    axes = subfigure.subplots()
    cells = _with_positive(panel, "train_flops")
    shown = [cell for cell in cells if not is_outlier(cell, cells, panel.test)]
    draw_families(axes, panel, "train_flops", shown)
    draw_without_rank(axes, panel, shown, "train_flops", panel.test)
    set_log_x(axes)
    axes.margins(0.1)
    set_count_ticks(axes, "train_flops")
    name_points(axes, shown, "train_flops", panel.test, footnote)
    footnote.remarks += [outlier_text(cell, panel.test, footnote) for cell in cells if cell not in shown]
    footnote.account_for(panel.best, cells, panel.test)
    axes.set(xlabel=axis_label("train_flops", "x", stored=True), ylabel=axis_label(panel.test, "y"))


SCORE_BY_COMPUTE = FigureKind(
    "score_by_compute",
    "Score on test against training compute",
    is_drawn_for=lambda panel: len(_with_positive(panel, "train_flops")) > 1,
    draw=_draw_by_compute,
    has_intervals=True,
)
