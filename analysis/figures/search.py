"""What a search tried: the score on val at every value of the setting, by condition, and the chosen one."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from analysis.axes import axes_of
from analysis.figures.axes import axis_label, rate_text, set_ticks
from analysis.figures.engine import FigureKind
from analysis.figures.footnote import Footnote
from analysis.figures.labels import label_end
from analysis.figures.panels import Panel, PlottedCell
from analysis.metrics import metric
from analysis.trials import Tried


def _searched(panel: Panel) -> dict[str, list[tuple[PlottedCell, list[Tried]]]]:
    """By the one setting that was searched, the conditions with their points; two at once have no line."""
    found: dict[str, list[tuple[PlottedCell, list[Tried]]]] = {}
    for cell in panel.best:
        tried = panel.searches.of(cell.row["run_ids"]) if panel.searches is not None else None
        if tried is not None and len(tried[0].axes) == 1:
            found.setdefault(tried[0].axes[0], []).append((cell, tried[1]))
    return found


def _draw(subfigure: SubFigure, panel: Panel, footnote: Footnote) -> None:
    searched = _searched(panel)
    rows = subfigure.subplots(len(searched), squeeze=False)[:, 0]
    for axes, (setting, cells) in zip(rows, searched.items(), strict=True):
        _draw_setting(axes, panel, setting, cells)
    footnote.remarks.append("whole runs of the search, whose seeds no other figure has; ring: the chosen value")
    if any(point.score is None for cells in searched.values() for _, points in cells for point in points):
        footnote.remarks.append("\N{MULTIPLICATION SIGN}: diverged or without a score")


def _draw_setting(axes: Axes, panel: Panel, setting: str, cells: list[tuple[PlottedCell, list[Tried]]]) -> None:
    divisor = metric(panel.val).display_divisor
    values = [point.values[0] for _, points in cells for point in points]
    if min(values) > 0:
        axes.set_xscale("log")
    for cell, points in cells:
        look = panel.look_by_rank(cell)
        scored = [(point.values[0], point.score / divisor) for point in points if point.score is not None]
        if scored:
            axes.plot(*zip(*scored, strict=True), label=cell.label, **look)
            label_end(axes, cell.label, scored[-1], look["color"])
        chosen = panel.searches.chosen(cell.row["run_ids"]) if panel.searches is not None else None
        for value, height in scored:
            if chosen is not None and value == chosen[0]:
                axes.plot(value, height, "o", ms=7, mfc="none", mec=look["color"], mew=0.7, label="chosen")
        for point in points:
            if point.score is None:
                style = {"color": look["color"], "clip_on": False, "label": f"{cell.label}: {point.status}"}
                axes.plot(point.values[0], 0.02, "x", transform=axes.get_xaxis_transform(), **style)
    axes.margins(y=0.08)
    set_ticks(axes, values, rate_text)
    name = "learning rate" if setting == "trainer.learning_rate" else axes_of([setting])[0].name
    axes.set(xlabel=f"{name} tried", ylabel=axis_label(panel.val, "y"))


SEARCHED_VALUES = FigureKind(
    "search",
    "What the search tried",
    is_drawn_for=lambda panel: bool(_searched(panel)),
    draw=_draw,
    height=lambda panel: 2.5 * max(1, len(_searched(panel))),
)
