"""What was learned against what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from analysis.figures.axes import axis_label, draw_families, draw_without_rank, limits, name_points
from analysis.figures.engine import FigureKind
from analysis.figures.footnote import Footnote
from analysis.figures.labels import label_point
from analysis.figures.panels import Panel, PlottedCell, short_name
from analysis.figures.style import GREY, INK
from analysis.metrics import FORGETTING, LEARNED

MAX_NAMED_APART = 12  # where points lie in both directions as they come


def _draw_forgetting(subfigure: SubFigure, panel: Panel, footnote: Footnote) -> None:
    axes = subfigure.subplots()
    shown = panel.with_metrics(LEARNED, FORGETTING)
    draw_families(axes, panel, LEARNED, shown, FORGETTING)
    draw_without_rank(axes, panel, shown, LEARNED, FORGETTING)
    for bars in axes.containers:
        for lines in bars.get_children()[1:]:
            lines.set_alpha(0.4)  # they cross each other in both directions
    name_points(axes, _without_inner_ranks(panel, shown, footnote), LEARNED, FORGETTING, footnote)
    values = [[cell.displayed(name) for cell in shown] for name in (LEARNED, FORGETTING)]
    # From far off it would press all others together.
    is_far = any(map(_is_far_from_zero, values))
    axes.set_xlim(*limits(shown, LEARNED, [] if is_far else [0.0]))
    axes.set_ylim(*limits(shown, FORGETTING, [] if is_far else [0.0]))
    _draw_base_model(axes, footnote)
    sets = dict.fromkeys(short_name(cell.row.get("base_domain")) for cell in shown)
    footnote.account_for(panel.best, shown, FORGETTING)
    footnote.remarks.append(f"forgetting: nll on {' or '.join(sets)} after training minus before")
    axes.set(xlabel=axis_label(LEARNED, "x"), ylabel=axis_label(FORGETTING, "y"))


def _without_inner_ranks(panel: Panel, shown: Sequence[PlottedCell], footnote: Footnote) -> list[PlottedCell]:
    """The cells to be named: of many points those at the ends of the lines, which join the ranks in their order."""
    families = [[cell for cell in members if cell in shown] for members in panel.families().values()]
    if sum(map(len, families)) <= MAX_NAMED_APART:
        return [*shown]
    ranks = sorted({cell.displayed("rank") for members in families for cell in members})
    footnote.remarks.append(f"joined in order of rank: {', '.join(f'{rank:g}' for rank in ranks)}")
    ends = [cell for members in families if members for cell in (members[0], members[-1])]
    return [cell for cell in shown if cell in ends or not cell.rank]


def _draw_base_model(axes: Axes, footnote: Footnote) -> None:
    """The model before training, which has learned and forgotten nothing: at 0 or where the axes end towards it."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    x, y = min(max(0.0, left), right), min(max(0.0, low), high)
    if low < 0 < high:
        axes.axhline(0, color=GREY, linewidth=0.5, zorder=0.5, label="nothing forgotten")
    look: dict[str, Any] = {"color": GREY, "markeredgecolor": INK, "markeredgewidth": 0.5, "clip_on": False}
    axes.plot(x, y, "P", markersize=5, label="base model", **look)
    label_point(axes, "base model", x, y)
    if (x, y) != (0, 0):
        footnote.remarks.append("base model: beyond the axes, at 0 and 0")


def _is_far_from_zero(values: Sequence[float]) -> bool:
    low, high = min(values), max(values)
    return len(values) > 2 and max(low, -high) > 2 * (high - low) > 0


FORGETTING_BY_LEARNING = FigureKind(
    "forgetting",
    "Learning against forgetting",
    is_drawn_for=lambda panel: bool(panel.with_metrics(LEARNED, FORGETTING)),
    draw=_draw_forgetting,
    height=lambda panel: 3.0,
    has_intervals=True,
)
