"""Learning rates: scores at each, and the best one against the rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.transforms import ScaledTranslation, Transform

from analysis.figures.axes import MAX_NAMED, axis_label, rate_text, set_log_x, set_ticks
from analysis.figures.engine import FigureKind
from analysis.figures.footnote import Footnote
from analysis.figures.labels import label_end, label_point
from analysis.figures.multiples import draw_multiples, groups_of, multiples_height, multiples_remarks
from analysis.figures.panels import Panel, PlottedCell


def _draw_learning_rates(subfigure: SubFigure, panel: Panel, footnote: Footnote) -> None:
    tuned = _tuned(panel)
    groups = groups_of(panel, tuned)
    unfinished: dict[Axes, list[tuple[PlottedCell, str]]] = {}

    def draw_one(axes: Axes, cells: Sequence[PlottedCell], name: Callable[[PlottedCell], str]) -> None:
        unfinished[axes] = _draw_rates_of(axes, panel, cells, name, footnote)
        axes.set(xlabel="learning rate", ylabel=axis_label(panel.val, "y"))

    drawn = draw_multiples(subfigure, groups, draw_one)
    _draw_unfinished(unfinished, footnote)
    for axes in drawn:
        set_ticks(axes, [rate for cell in tuned for rate in cell.row["tried"]], rate_text)
    footnote.remarks += ["ring: the chosen rate", *multiples_remarks(groups, tuned)]


def _tuned(panel: Panel) -> list[PlottedCell]:
    return [cell for cell in panel.best if len(cell.row["tried"]) > 1]


def _draw_rates_of(
    axes: Axes,
    panel: Panel,
    tuned: Sequence[PlottedCell],
    name: Callable[[PlottedCell], str],
    footnote: Footnote,
) -> list[tuple[PlottedCell, str]]:
    """A line for each condition; gives the cells without a finished run, each with the colour of its line."""
    set_log_x(axes)
    unfinished = []
    for chosen in tuned:
        look = panel.look_by_rank(chosen)
        rates = [cell for cell in panel.tried if cell.row["condition_id"] == chosen.row["condition_id"]]
        rates.sort(key=lambda cell: float(cell.row["learning_rate"]))
        scored = [cell for cell in rates if cell.value(panel.val) is not None]
        if scored:
            points = [(cell.row["learning_rate"], cell.displayed(panel.val)) for cell in scored]
            axes.plot(*zip(*points, strict=True), label=chosen.label, **look)
            label_end(axes, name(chosen), points[-1], look["color"])
        if chosen.value(panel.val) is not None:
            best = (chosen.row["learning_rate"], chosen.displayed(panel.val))
            axes.plot(*best, "o", ms=7, mfc="none", mec=look["color"], mew=0.7, label="best")
        unfinished += [(cell, look["color"]) for cell in rates if not cell.num_finished]
        footnote.account_for([], scored, panel.val)
    axes.margins(y=0.08)
    return unfinished


def _has_rates(panel: Panel) -> bool:
    return bool(panel.with_metrics(panel.val)) and any(len(cell.row["tried"]) > 1 for cell in panel.best)


def _draw_unfinished(unfinished: Mapping[Axes, Sequence[tuple[PlottedCell, str]]], footnote: Footnote) -> None:
    """An x for each cell without a finished run, stacked in a strip below the scores of all axes."""
    most = max(
        (count for cells in unfinished.values() for count in Counter(_rate(cell) for cell, _ in cells).values()),
        default=0,
    )
    step = min(0.045, 0.4 / max(most, 1))
    first = next(iter(unfinished))  # whose scale is that of all
    low, high = first.get_ylim()
    first.set_ylim(low - (high - low) * step * most / (1 - step * most))
    for axes, cells in unfinished.items():
        stacked: Counter[float] = Counter()
        for cell, colour in cells:
            rate = _rate(cell)
            look: dict[str, Any] = {"color": colour, "clip_on": False, "label": f"{cell.label}: {cell.status}"}
            axes.plot(rate, 0.02 + step * stacked[rate], "x", transform=axes.get_xaxis_transform(), **look)
            stacked[rate] += 1
            where = f"{footnote.where}{cell.label} at {rate_text(rate)}"
            footnote.absent["x: not finished"].append(f"{where} ({cell.status})")


def _rate(cell: PlottedCell) -> float:
    return float(cell.row["learning_rate"])


LEARNING_RATES = FigureKind(
    "learning_rates",
    "Score on val against the learning rate",
    is_drawn_for=_has_rates,
    draw=_draw_learning_rates,
    height=lambda panel: multiples_height(groups_of(panel, _tuned(panel)), max(2.5, 0.8 + 0.12 * len(panel.best))),
    is_wide=lambda panel: len(groups_of(panel, _tuned(panel))) > 1,
)


# ---------------------------------------------------------------- the best rates


def _draw_best_rates(subfigure: SubFigure, panel: Panel, footnote: Footnote) -> None:
    axes = subfigure.subplots()
    shown = panel.tuned_ranks()
    full = panel.tuned_full(shown)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    families = [[cell for cell in members if cell in shown] for members in panel.families().values()]
    families = [cells for cells in families if cells]
    named: set[tuple[float, float, float]] = set()
    for number, cells in enumerate(families):
        # A little aside: grids are coarse, and the best rates of several placements one and the same.
        points_aside = (number - (len(families) - 1) / 2) * min(4, 14 / len(families))
        aside = ScaledTranslation(points_aside / 72, 0, axes.figure.dpi_scale_trans)
        _draw_best_rates_of(axes, panel, cells, aside)
        if len(shown) <= MAX_NAMED:
            _name_ratios(axes, cells, full, named)
        label_end(axes, cells[0].family, _rate_point(cells[-1]), panel.look_of(cells[0])["color"])
    _draw_rates_of_full(axes, [*full.values()], footnote)
    if any(cell.row["edge"] for cell in shown):
        footnote.remarks.append("hollow: at the edge of its grid, so a better rate may lie outside")
    axes.margins(0.1)
    set_ticks(axes, [cell.displayed("rank") for cell in shown], lambda value: f"{value:g}")
    set_ticks(axes, [rate for cell in [*shown, *full.values()] for rate in cell.row["tried"]], rate_text, on="y")
    compared = [cell for cell in panel.best if cell.rank and len(cell.row["tried"]) > 1]
    footnote.account_for(compared, shown, panel.val)
    axes.set(xlabel="rank", ylabel="learning rate that is best on val")


def _rate_point(cell: PlottedCell) -> tuple[float, float]:
    return cell.displayed("rank"), _rate(cell)


def _draw_best_rates_of(axes: Axes, panel: Panel, cells: Sequence[PlottedCell], aside: Transform) -> None:
    """The line of a family, hollow where the best rate lies at the edge of its grid."""
    look = panel.look_of(cells[0])
    (line,) = axes.plot(*zip(*map(_rate_point, cells), strict=True), label=cells[0].family, **look)
    line.set_transform(line.get_transform() + aside)
    for cell in cells:
        if cell.row["edge"]:
            (hollow,) = axes.plot(
                *_rate_point(cell), marker=look["marker"], mec=look["color"], mfc="white", label="edge"
            )
            hollow.set_transform(hollow.get_transform() + aside)


def _name_ratios(
    axes: Axes,
    cells: Sequence[PlottedCell],
    full: Mapping[str, PlottedCell],
    named: set[tuple[float, float, float]],
) -> None:
    """The ratio of each rate to that of full fine-tuning, once where families share it; adds to `named`."""
    for cell in cells:
        reference = full.get(cell.row["recipe_id"])
        if reference is None:
            continue
        rank, rate = _rate_point(cell)
        ratio = rate / reference.row["learning_rate"]
        if (rank, rate, ratio) not in named:
            named.add((rank, rate, ratio))
            label_point(axes, f"{ratio:.3g}\N{MULTIPLICATION SIGN}", rank, rate)


def _draw_rates_of_full(axes: Axes, references: Sequence[PlottedCell], footnote: Footnote) -> None:
    for reference in references:
        rate = reference.row["learning_rate"]
        axes.axhline(rate, color="black", label=reference.label, zorder=1)
        label_end(axes, reference.label, (1, rate), "black", coordinates=("axes fraction", "data"))
        footnote.remarks.append("\N{MULTIPLICATION SIGN}: ratio to the best rate of full of the same recipe")
        if reference.row["edge"]:
            edge = f"at the {reference.row['edge']} edge of its grid"
            footnote.remarks.append(f"{footnote.where}the rate of {reference.label} is {edge}")


BEST_RATES = FigureKind(
    "best_rates",
    "Best learning rate against the rank",
    is_drawn_for=lambda panel: bool(panel.tuned_ranks()),
    draw=_draw_best_rates,
)
