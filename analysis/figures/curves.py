"""Curves over the steps of training: of the best conditions, and the lowest over all learning rates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from analysis.comparisons import ranked_by
from analysis.figures.axes import axis_label, set_count_ticks, set_log_x
from analysis.figures.engine import FigureKind
from analysis.figures.footnote import Footnote
from analysis.figures.labels import label_end
from analysis.figures.multiples import (
    draw_multiples,
    grid_of,
    groups_of,
    multiples_height,
    multiples_remarks,
    shown_in,
)
from analysis.figures.panels import Panel, PlottedCell
from analysis.figures.style import COLOURS, LINES, MARKERS, RANK_COLOURS, in_turn

MAX_CURVES = 8

# Steps, and a value at each.
Curve = tuple[list[float], list[float]]


def _draw_training(subfigure: SubFigure, panel: Panel, footnote: Footnote) -> None:
    """Losses above scores; of scores at a single step nothing."""
    groups = _curve_groups(panel)
    shown = shown_in(groups)
    names = [_loss(panel)]
    if any(len(panel.seed_curve(cell, panel.val).steps) > 1 for cell in shown):
        names.append(panel.val)
    parts = subfigure.subfigures(len(names), squeeze=False)[:, 0]
    drawn = []
    for part, name in zip(parts, names, strict=True):
        is_last = name == names[-1]
        draw = partial(_draw_curves, panel=panel, name=name, is_labelled=is_last)
        drawn += draw_multiples(part, groups, draw)
        if not is_last and len(groups) == 1:
            drawn[0].tick_params(labelbottom=False)
    # The axes of a part share theirs.
    firsts = drawn[:: len(groups)]
    ends = [end for axes in firsts for end in axes.get_xlim()]
    for axes in firsts:
        axes.set_xlim(min(ends), max(ends))
    footnote.account_for([cell for cell in panel.best if not cell.num_finished], shown, panel.val)
    if any(panel.seed_curve(cell, name).num_runs > 1 for cell in shown for name in names):
        footnote.remarks.append("band: from the lowest to the highest seed")
    if len(groups) > 1:
        footnote.remarks += multiples_remarks(groups, _curve_cells(panel))
    remark = _curve_remark([panel])
    footnote.remarks += [remark.strip(" ()")] if remark else []


def _draw_curves(
    axes: Axes,
    cells: Sequence[PlottedCell],
    label: Callable[[PlottedCell], str],
    *,
    panel: Panel,
    name: str,
    is_labelled: bool,
) -> None:
    for number, cell in enumerate(cells):
        colour = "black" if cell.is_full else in_turn(COLOURS, number)
        curve = panel.seed_curve(cell, name)
        is_score = name == panel.val
        look: dict[str, Any] = {"color": colour, "linestyle": in_turn(LINES, number), "label": cell.label}
        if is_score:
            look |= {"marker": in_turn(MARKERS, number) if len(curve.steps) <= 20 else "", "markersize": 3}
        else:
            look |= {"alpha": 0.6, "linewidth": 0.7}
        axes.plot(curve.steps, curve.means, **look)
        if curve.num_runs > 1:
            # Not `fill_between`, which fits the limits of all axes of the grid again each time.
            outline = [*curve.steps, *reversed(curve.steps)], [*curve.lows, *reversed(curve.highs)]
            axes.fill(*outline, facecolor=colour, alpha=0.15, linewidth=0)
        if curve.steps and is_labelled:
            label_end(axes, label(cell), (curve.steps[-1], curve.means[-1]), colour)
    axes.set(xlabel="step" if is_labelled else "", ylabel=axis_label(name, "y"))


def _curve_groups(panel: Panel) -> list[tuple[str, list[PlottedCell]]]:
    """The best few in one pair of axes, or small multiples of all that are more than that can hold."""
    cells = _curve_cells(panel)
    groups = groups_of(panel, cells)
    return groups if len(groups) > 1 else [("", cells[:MAX_CURVES])]


def _curve_cells(panel: Panel) -> list[PlottedCell]:
    """The conditions with curves, the best by val first."""
    loss = _loss(panel)
    cells = [cell for cell in panel.with_metrics(panel.val) if len(panel.seed_curve(cell, loss).steps) > 1]
    return [cells[index] for index in ranked_by([cell.row for cell in cells], panel.val)]


def _curve_remark(panels: Sequence[Panel]) -> str:
    more = any(len(_curve_cells(panel)) > MAX_CURVES and len(_curve_groups(panel)) == 1 for panel in panels)
    return f" (the {MAX_CURVES} conditions that are best on val)" if more else ""


def _loss(panel: Panel) -> str:
    return "train_mse" if any(cell.value("train_mse") is not None for cell in panel.best) else "train_nll"


TRAINING_CURVES = FigureKind(
    "training_curves",
    "Training curves",
    is_drawn_for=lambda panel: bool(_curve_cells(panel)),
    draw=_draw_training,
    height=lambda panel: max(3.4, 2 * multiples_height(_curve_groups(panel), 1.7)),
    is_wide=lambda panel: len(_curve_groups(panel)) > 1,
    remark=_curve_remark,
)

# ---------------------------------------------------------------- lowest over learning rates


def _draw_lowest_curves(subfigure: SubFigure, panel: Panel, footnote: Footnote) -> None:
    found = _lowest_curves(panel)
    families = [[cell for cell in members if cell in found] for members in panel.families().values()]
    families = [members for members in families if members]
    num_rows, num_columns = grid_of(len(families))
    grid = subfigure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    used, unused = grid.ravel()[: len(families)], grid.ravel()[len(families) :]
    ranks = sorted({cell.displayed("rank") for members in families for cell in members})
    for axes, members in zip(used, families, strict=True):
        full = [cell for cell in found if not cell.rank and cell.row["recipe_id"] == members[0].row["recipe_id"]]
        _draw_family(axes, {cell: found[cell] for cell in [*full, *members]}, ranks)
        if len(families) > 1:
            axes.set_title(members[0].family)
    for axes in unused:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(axis_label(_lowest_name(panel), "y"))
    _limit_to_late_steps(grid[0, 0], [*found.values()], footnote)
    for axes in used:
        set_count_ticks(axes, "num_steps")
    for axes in used[max(0, len(families) - num_columns) :]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("step")
    tuned = {cell.row["condition_id"] for cell in found}
    behind = [cell for cell in panel.tried if cell.row["condition_id"] in tuned and cell.num_finished]
    footnote.account_for([], behind, panel.val)
    if len(families) == 1:
        footnote.remarks.append(f"{footnote.where}{families[0][0].family}")
    footnote.remarks.append("at every step the lowest of the mean curves of all finished learning rates")


def _draw_family(axes: Axes, curves: Mapping[PlottedCell, Curve], ranks: Sequence[float]) -> None:
    """The curves of a placement, one for each rank, and of full fine-tuning."""
    set_log_x(axes)
    for cell, (steps, values) in curves.items():
        number = ranks.index(cell.rank) if cell.rank else 0
        # Ranks have an order, and so have these colours.
        colour: Any = RANK_COLOURS(0.8 * number / max(1, len(ranks) - 1)) if cell.rank else "black"
        style = in_turn(LINES[1:], number) if cell.rank else "-"
        text = f"r{cell.rank:g}" if cell.rank else cell.label
        axes.plot(steps, values, color=colour, linestyle=style, label=text)
        label_end(axes, text, (steps[-1], values[-1]), colour)


def _limit_to_late_steps(axes: Axes, curves: Sequence[Curve], footnote: Footnote) -> None:
    """What comes before the first twentieth of the training is steep and would flatten all that differs."""
    last = max(steps[-1] for steps, _ in curves)
    points = [point for steps, values in curves for point in zip(steps, values, strict=True)]
    late = [value for step, value in points if step >= last / 20]
    room = 0.05 * (max(late) - min(late)) or 0.01
    axes.set_ylim(min(late) - room, max(late) + room)
    if any(value > max(late) for _, value in points):
        footnote.remarks.append("what lies above the axis comes before a twentieth of the steps")


def _lowest_curves(panel: Panel) -> dict[PlottedCell, Curve]:
    """By condition, at every step the lowest nll of any learning rate: placements with several ranks, and full."""
    ranks_tried, name = panel.tuned_ranks(), _lowest_name(panel)
    cells = [*ranks_tried, *panel.tuned_full(ranks_tried).values()]
    found = {cell: _lowest_curve(panel, cell, name) for cell in cells}
    found = {cell: curve for cell, curve in found.items() if len(curve[0]) > 1}
    ranks = Counter(cell.family for cell in found if cell.rank)
    return {cell: curve for cell, curve in found.items() if not cell.rank or ranks[cell.family] > 1}


def _lowest_name(panel: Panel) -> str:
    """The nll on val, or on train where val was scored at the end alone."""
    on_val = [_lowest_curve(panel, cell, "val_nll")[0] for cell in panel.tuned_ranks()]
    return "val_nll" if on_val and all(len(steps) > 1 for steps in on_val) else "train_nll"


def _lowest_curve(panel: Panel, condition: PlottedCell, name: str) -> Curve:
    lowest: dict[float, float] = {}
    for cell in panel.tried:
        if cell.num_finished and cell.row["condition_id"] == condition.row["condition_id"]:
            curve = panel.seed_curve(cell, name)
            for step, value in zip(curve.steps, curve.means, strict=True):
                lowest[step] = min(value, lowest.get(step, math.inf))
    steps = sorted(step for step in lowest if step > 0)  # a logarithmic axis has no 0
    return steps, [lowest[step] for step in steps]


# Language models are judged by these, and they fall together.
_NLL_LIKE = {"val_nll", "val_perplexity", "val_bits_per_byte"}


def _num_placements(panel: Panel) -> int:
    return len({cell.family for cell in _lowest_curves(panel) if cell.rank})


def _has_lowest_curves(panel: Panel) -> bool:
    return panel.val in _NLL_LIKE and any(cell.rank for cell in _lowest_curves(panel))


LOWEST_CURVES = FigureKind(
    "lowest_curves",
    "Lowest negative log-likelihood over learning rates at every step",
    is_drawn_for=_has_lowest_curves,
    draw=_draw_lowest_curves,
    height=lambda panel: 0.3 + 2.2 * grid_of(_num_placements(panel))[0],
    is_wide=lambda panel: _num_placements(panel) > 1,
)
