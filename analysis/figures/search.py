"""What a search tried: the score on val at every value of the setting, by condition, and the chosen one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from analysis.axes import axes_of
from analysis.figures.axes import axis_label, rate_text, set_ticks
from analysis.figures.engine import FigureKind
from analysis.figures.footnote import Footnote
from analysis.figures.labels import label_end
from analysis.figures.multiples import draw_multiples, groups_of, multiples_height, multiples_remarks
from analysis.figures.panels import Panel, PlottedCell
from analysis.metrics import metric
from analysis.trials import Tried

# Lines that fall off to the same score end in the same place, and more of them leave no room for their names.
_MAX_IN_ONE = 6


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
    heights = [_height(panel, cells) for cells in searched.values()]
    rows = subfigure.subfigures(len(searched), squeeze=False, height_ratios=heights)[:, 0]
    for row, (setting, cells) in zip(rows, searched.items(), strict=True):
        footnote.remarks += _draw_setting(row, panel, setting, cells)
    footnote.remarks.append("whole runs of the search, whose seeds no other figure has; ring: the chosen value")
    if any(point.score is None for cells in searched.values() for _, points in cells for point in points):
        footnote.remarks.append("\N{MULTIPLICATION SIGN}: diverged or without a score")


def _draw_setting(
    subfigure: SubFigure, panel: Panel, setting: str, cells: list[tuple[PlottedCell, list[Tried]]]
) -> list[str]:
    """Draws what was tried of a setting, and gives what the footnote says of it."""
    values = [point.values[0] for _, points in cells for point in points]
    points_of = dict(cells)
    title = "learning rate" if setting == "trainer.learning_rate" else axes_of([setting])[0].name

    def draw_one(axes: Axes, members: Sequence[PlottedCell], name: Callable[[PlottedCell], str]) -> None:
        if min(values) > 0:
            axes.set_xscale("log")
        for cell in members:
            _draw_cell(axes, panel, cell, points_of[cell], name(cell))
        axes.margins(y=0.08)
        axes.set(xlabel=f"{title} tried", ylabel=axis_label(panel.val, "y"))

    groups = _groups(panel, cells)
    for axes in draw_multiples(subfigure, groups, draw_one):
        set_ticks(axes, values, rate_text)
    return multiples_remarks(groups, [*points_of])


def _draw_cell(axes: Axes, panel: Panel, cell: PlottedCell, points: Sequence[Tried], name: str) -> None:
    divisor = metric(panel.val).display_divisor
    look = panel.look_by_rank(cell)
    scored = [(point.values[0], point.score / divisor) for point in points if point.score is not None]
    if scored:
        axes.plot(*zip(*scored, strict=True), label=cell.label, **look)
        label_end(axes, name, scored[-1], look["color"])
    chosen = panel.searches.chosen(cell.row["run_ids"]) if panel.searches is not None else None
    for value, height in scored:
        if chosen is not None and value == chosen[0]:
            axes.plot(value, height, "o", ms=7, mfc="none", mec=look["color"], mew=0.7, label="chosen")
    for point in points:
        if point.score is None:
            style = {"color": look["color"], "clip_on": False, "label": f"{cell.label}: {point.status}"}
            axes.plot(point.values[0], 0.02, "x", transform=axes.get_xaxis_transform(), **style)


def _height(panel: Panel, cells: list[tuple[PlottedCell, list[Tried]]]) -> float:
    return multiples_height(_groups(panel, cells), 2.5)


def _groups(panel: Panel, cells: list[tuple[PlottedCell, list[Tried]]]) -> list[tuple[str, list[PlottedCell]]]:
    return groups_of(panel, [cell for cell, _ in cells], most=_MAX_IN_ONE)


SEARCHED_VALUES = FigureKind(
    "search",
    "What the search tried",
    is_drawn_for=lambda panel: bool(_searched(panel)),
    draw=_draw,
    height=lambda panel: sum(_height(panel, cells) for cells in _searched(panel).values()),
    is_wide=lambda panel: any(len(_groups(panel, cells)) > 1 for cells in _searched(panel).values()),
)
