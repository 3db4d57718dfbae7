"""What several figures draw in their axes: families of points with intervals, references, ticks and titles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from analysis.figures.footnote import Footnote
from analysis.figures.labels import label_end, label_point
from analysis.figures.panels import Panel, PlottedCell
from analysis.figures.style import GREY
from analysis.metrics import format_value, metric
from harness.results.metrics import Direction

MAX_NAMED = 40  # points; more names than that would cover each other


# ---------------------------------------------------------------- marks


def draw_points(axes: Axes, cells: Sequence[PlottedCell], x: str, y: str, label: str, **look: Any) -> list[Artist]:
    """Means of two metrics, joined if `look` has a line style, with their noise; see `draw_means`."""
    xs = [cell.displayed(x) for cell in cells]
    ranges = np.zeros((2, len(cells)))
    if f"{x}_min" in cells[0].row:
        ends = np.array([[cell.row[f"{x}_{end}"] for cell in cells] for end in ("min", "max")], dtype=float)
        ranges = np.abs(ends / metric(x).display_divisor - np.array(xs))
    if any(cell.interval(x) for cell in cells):
        ranges = np.array([[cell.interval(x) for cell in cells]] * 2)
    seeds = [cell.two_seeds(x) or (at, at) for cell, at in zip(cells, xs, strict=True)]
    return draw_means(axes, cells, xs, y, label, seeds_at=seeds, ranges=ranges if ranges.any() else None, **look)


def draw_means(
    axes: Axes,
    cells: Sequence[PlottedCell],
    xs: Sequence[float],
    y: str,
    label: str,
    *,
    seeds_at: Sequence[tuple[float, float]] | None = None,
    ranges: np.ndarray[Any, Any] | None = None,
    **look: Any,
) -> list[Artist]:
    """Means with their 95 % interval from three seeds on, and with the seeds as small points where there are two.

    Args:
        axes: where.
        cells: what is drawn.
        xs: where each lies on the x axis.
        y: a metric.
        label: of the means.
        seeds_at: where the two seeds of each lie on the x axis; at its mean by default.
        ranges: on the x axis, how far each reaches below and above.
        look: colour, marker and line style.
    """
    ys = [cell.displayed(y) for cell in cells]
    reaches = np.abs(np.array([cell.ends(y) for cell in cells]).T - np.array(ys))
    bars: dict[str, Any] = {"yerr": reaches if reaches.any() else None, "xerr": ranges}
    artists = [*axes.errorbar(xs, ys, **bars, elinewidth=0.7, capsize=1.5, label=label, **look).get_children()]
    both = seeds_at or [(x, x) for x in xs]
    points = [pair for cell, at in zip(cells, both, strict=True) for pair in zip(at, cell.two_seeds(y), strict=False)]
    if points:
        small: dict[str, Any] = {"color": look["color"], "marker": "o", "markersize": 1.8, "markeredgewidth": 0}
        artists += axes.plot(*zip(*points, strict=True), linestyle="none", zorder=1.5, label=f"{label}: seeds", **small)
    return artists


def draw_behind(axes: Axes, panel: Panel, x: str, cells: Sequence[PlottedCell]) -> None:
    """What other small multiples show, as faint lines to compare with."""
    for members in panel.families().values():
        points = [(cell.displayed(x), cell.displayed(panel.test)) for cell in members if cell in cells]
        if points:
            axes.plot(*zip(*points, strict=True), color=GREY, alpha=0.35, linewidth=0.6, zorder=0.5, label="behind")


def draw_families(
    axes: Axes, panel: Panel, x: str, shown: Sequence[PlottedCell], y: str | None = None
) -> list[list[Artist]]:
    """The score on test, or `y`, against `x`: a line for each family in order of rank, named at its end."""
    y, drawn = y or panel.test, []
    for family, members in panel.families().items():
        if cells := [cell for cell in members if cell in shown]:
            look = panel.look_of(cells[0])
            drawn.append(draw_points(axes, cells, x, y, family, **look))
            label_end(axes, family, (cells[-1].displayed(x), cells[-1].displayed(y)), look["color"])
    return drawn


def draw_without_rank(axes: Axes, panel: Panel, cells: Sequence[PlottedCell], x: str, y: str) -> None:
    """A point for each cell without a rank, which belongs to no family."""
    for cell in cells:
        if not cell.rank:
            draw_points(axes, [cell], x, y, cell.label, **panel.look_of(cell) | {"linestyle": "none"})


def name_points(axes: Axes, cells: Sequence[PlottedCell], x: str, y: str, footnote: Footnote) -> None:
    """The rank of each cell beside its point, or its name where it has no rank.

    Of too many only the range of ranks stands in the footnote, of several with the same rank that one.
    """
    ranks = [cell.rank for cell in cells if cell.rank]
    is_many = len(ranks) > MAX_NAMED or (len(ranks) > 1 and min(ranks) == max(ranks))
    if is_many:
        to = f" to {max(ranks):g}" if max(ranks) > min(ranks) else ""
        footnote.remarks.append(f"rank{'s' if to else ''} {min(ranks):g}{to}")
    for cell in cells:
        if not cell.rank or not is_many:
            label_point(axes, f"r{cell.rank:g}" if cell.rank else cell.label, cell.displayed(x), cell.displayed(y))


def draw_references(axes: Axes, panel: Panel, cells: Sequence[PlottedCell], footnote: Footnote) -> None:
    """A line across for each, with its interval as a band or two seeds as thin lines.

    What would flatten all others stands in the footnote.
    """
    for cell in cells:
        if is_outlier(cell, panel.with_metrics(panel.test), panel.test):
            footnote.remarks.append(outlier_text(cell, panel.test, footnote))
            continue
        y = cell.displayed(panel.test)
        look = {key: value for key, value in panel.look_of(cell).items() if key != "marker"}
        axes.axhline(y, label=cell.label, zorder=1, **look)
        if cell.interval(panel.test):
            axes.axhspan(*cell.ends(panel.test), facecolor=look["color"], alpha=0.15, linewidth=0)
        for seed in cell.two_seeds(panel.test):
            axes.axhline(seed, label=f"{cell.label}: seeds", color=look["color"], linewidth=0.35, alpha=0.6, zorder=1)
        label_end(axes, cell.label, (1, y), look["color"], coordinates=("axes fraction", "data"))


def of_same_recipe(references: Sequence[PlottedCell], shown: Sequence[PlottedCell]) -> list[PlottedCell]:
    """The references in a recipe of the cells shown: a line across says that both can be compared."""
    recipes = {cell.row["recipe_id"] for cell in shown}
    return [cell for cell in references if cell.row["recipe_id"] in recipes]


def without_rank(panel: Panel) -> list[PlottedCell]:
    """The conditions of methods without a rank that have the score on test."""
    return [cell for cell in panel.with_metrics(panel.test) if not cell.rank]


# ---------------------------------------------------------------- what lies far off


def is_outlier(cell: PlottedCell, cells: Sequence[PlottedCell], name: str) -> bool:
    """Whether a method without rank, full fine-tuning excepted, lies so far off that the axis would show only that."""
    if cell.rank or cell.is_full or len(cells) <= 3:
        return False
    others = [other.displayed(name) for other in cells if other is not cell]
    low, high, value = min(others), max(others), cell.displayed(name)
    return max(low - value, value - high) > 2 * (high - low)


def outlier_text(cell: PlottedCell, name: str, footnote: Footnote) -> str:
    """What stands in the footnote instead of an outlier's point."""
    return f"beyond the axis: {footnote.where}{cell.label} at {format_value(name, cell.row[name])}"


def limits(cells: Sequence[PlottedCell], name: str, also: Sequence[float] = ()) -> tuple[float, float]:
    """From the lowest to the highest mean with its noise, and `also`, with room around them."""
    ends = [*also, *(end for cell in cells for end in cell.two_seeds(name))]
    for cell in cells:
        ends += cell.ends(name)
    room = 0.12 * (max(ends) - min(ends)) or 0.01
    return min(ends) - room, max(ends) + room


# ---------------------------------------------------------------- titles and ticks


def axis_label(name: str, axis: str, *, stored: bool = False) -> str:
    """As "test accuracy, ↑ better": label and unit of a metric, and which way is better on the x or y axis."""
    meaning = metric(name)
    unit = (not stored and meaning.display_unit) or (meaning.unit if meaning.unit != "1" else "")
    arrow = {Direction.HIGHER: {"x": "→", "y": "↑"}, Direction.LOWER: {"x": "←", "y": "↓"}}.get(meaning.direction)
    return meaning.label + (f" ({unit})" if unit else "") + (f", {arrow[axis]} better" if arrow else "")


def set_ticks(axes: Axes, values: Sequence[float], text: Callable[[float], str], *, on: str = "x") -> None:
    """Ticks of a logarithmic axis at the values themselves, leaving out those that would run into the one before."""
    kept: list[float] = []
    axis = {"x": axes.xaxis, "y": axes.yaxis}[on]
    low, high = (math.log(limit) for limit in axis.get_view_interval())
    inches = axes.bbox.width / axes.figure.dpi
    for value in sorted(set(values)):
        room = 0.074 * (1 + len(text(value))) / inches if on == "x" else 0.06
        if not kept or (math.log(value) - math.log(kept[-1])) / (high - low) > room:
            kept.append(value)
    axis.set_ticks(kept, [text(value) for value in kept])
    axis.set_minor_locator(NullLocator())


def set_log_x(axes: Axes, *, base: float = 10) -> None:
    """A logarithmic x axis, unless axes that share it have made it one: each change is one of all of them."""
    if axes.get_xscale() != "log":
        axes.set_xscale("log", base=base)


def rate_text(value: float) -> str:
    """A learning rate as "2e-4"."""
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def set_count_ticks(axes: Axes, name: str) -> None:
    """Ticks of a logarithmic x axis as "10k", "1M", in the stored unit of the metric on it."""
    low, high = axes.get_xlim()
    if high / low > 4:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if math.log10(high / low) > 2 else (1.0, 2.0, 5.0)))
    else:  # there may be none of those
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_minor_locator(NullLocator())
    engineering, divisor = EngFormatter(sep=""), metric(name).display_divisor
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: engineering(value * divisor)))
    axes.xaxis.set_minor_formatter(NullFormatter())
