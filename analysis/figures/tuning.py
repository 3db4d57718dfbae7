"""Best score on val against the number of trials, for each method: what tuning costs before it pays."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import MaxNLocator

from analysis.comparisons import ranked_by
from analysis.figures.axes import axis_label
from analysis.figures.engine import FigureKind
from analysis.figures.footnote import Footnote
from analysis.figures.labels import label_end
from analysis.figures.panels import Panel, PlottedCell
from analysis.metrics import metric
from analysis.tuning import best_so_far, tuning_curve
from harness.results.metrics import Direction

# With fewer the band is wider than all scores together.
MIN_RATES = 5


def _shown(panel: Panel) -> list[tuple[PlottedCell, list[float | None], bool]]:
    """Of each method the condition that is best on val, its trials' scores, and whether a search made them in order.

    A score is a mean over seeds in the unit of the axis; None where a trial gave none.
    """
    divisor = metric(panel.val).display_divisor
    found = []
    for method in dict.fromkeys(cell.row["method"] for cell in panel.best):
        cells = [cell for cell in panel.best if cell.row["method"] == method]
        for place in ranked_by([cell.row for cell in cells], panel.val):
            cell = cells[place]
            tried = panel.searches.in_order(cell.row["run_ids"]) if panel.searches is not None else None
            if tried is not None:
                scores = [None if point.score is None else point.score / divisor for point in tried]
            else:
                rates = [one for one in panel.tried if one.row["condition_id"] == cell.row["condition_id"]]
                scores = [None if one.value(panel.val) is None else one.displayed(panel.val) for one in rates]
            if len(scores) >= (2 if tried is not None else MIN_RATES):
                found.append((cell, scores, tried is not None))
                break
    return found


def _draw(subfigure: SubFigure, panel: Panel, footnote: Footnote) -> None:
    axes = subfigure.subplots()
    shown = _shown(panel)
    for cell, scores, is_search in shown:
        _draw_one(axes, panel, cell, scores, is_search=is_search)
    axes.margins(y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trials", ylabel=f"best {axis_label(panel.val, 'y')}")
    footnote.remarks.append(
        f"of each method the best on val of its conditions with {MIN_RATES} rates or a search; means over seeds"
    )
    if not all(is_search for *_, is_search in shown):
        footnote.remarks.append(
            "grids: median of the best of n random trials, estimated as if the rates of the grid had been drawn at "
            "random from its range (log-uniform); band: 95 %, simultaneous (DKW), clipped where nothing bounds it. "
            "Rates of a grid are not drawn: where they are evenly spaced and the score has one peak they lie nearer "
            "to that distribution than drawn ones would, elsewhere the band promises nothing"
        )
    if any(is_search for *_, is_search in shown):
        footnote.remarks.append(
            "steps: best so far of the trials of a search in the order of its plan; each is chosen by those before, "
            "so there is no band, and no comparison with the curve of a grid"
        )


def _draw_one(axes: Axes, panel: Panel, cell: PlottedCell, scores: Sequence[float | None], *, is_search: bool) -> None:
    # The statistics take more for better.
    sign = -1 if metric(panel.val).direction is Direction.LOWER else 1
    better = [None if score is None else sign * score for score in scores]
    look = panel.look_by_rank(cell)
    if is_search:
        found = best_so_far(better)
        points = [(n, sign * best) for n, best in enumerate(found, start=1) if best is not None]
        axes.plot(*zip(*points, strict=True), drawstyle="steps-post", label=cell.label, **look)
    else:
        curve = tuning_curve(better)
        points = [(n, sign * best) for n, best in enumerate(curve.median, start=1) if best is not None]
        axes.plot(*zip(*points, strict=True), label=cell.label, **look)
        ends = list(zip(curve.low, curve.high, strict=True))
        known = [value for value in better if value is not None]
        # What nothing bounds leaves the frame, which the scores alone decide.
        room = 10 * ((max(known) - min(known)) or abs(max(known)) or 1.0)
        low = [sign * (min(known) - room if end is None else end) for end, _ in ends]
        high = [sign * (max(known) + room if end is None else end) for _, end in ends]
        limits = axes.dataLim.frozen()
        axes.fill_between(range(1, len(ends) + 1), low, high, color=look["color"], alpha=0.12, linewidth=0)
        axes.dataLim.set(limits)
        axes.update_datalim([(1, sign * value) for value in known])
    label_end(axes, cell.label, points[-1], look["color"])


TUNING_CURVES = FigureKind(
    "tuning_curves",
    "Best score on val against the number of trials",
    is_drawn_for=lambda panel: bool(_shown(panel)),
    draw=_draw,
)
