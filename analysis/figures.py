"""Figures for the paper: each drawn from cells and curves, a panel for each model and dataset, as PDF and PNG.

    cells, curves --paper_figures--> list of Figure --write_figures--> <name>.pdf and <name>.png

Every figure but `learning_rates` and `lowest_curves` shows a condition at the learning rate that was best on val. Only
finished runs give numbers; what has none is named under the figure. Colour never stands alone: markers, line styles,
hatches and labels say the same. Names from configs are printed as they are and never read as formulas.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from analysis.comparisons import ranked_by
from analysis.labels import GREY, INK, SMALL, TEXT, label_end, label_point, place_point_labels, spread_end_labels
from analysis.metrics import FORGETTING, LEARNED, format_value, is_better, metric
from analysis.select import best_cells, num_status, records
from harness.results.files import write_atomically
from harness.results.metrics import Direction
from harness.results.schema import Status

COLUMN_INCHES = 3.4
PAGE_INCHES = 6.8
DPI = 200
MAX_CURVES = 8
MAX_NAMED = 40  # points; more names than that would cover each other
MAX_NAMED_APART = 12  # where points lie in both directions as they come

# Okabe and Ito's palette, readable with every kind of colour blindness, less its yellow; black is full fine-tuning's.
_COLOURS: tuple[Any, ...] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS: tuple[Any, ...] = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 3)), (0, (8, 2)))
_RANK_COLOURS = matplotlib.colormaps["viridis"]
_PLAIN: dict[str, tuple[str, str, Any]] = {"full": ("black", "*", "-"), "head_only": ("#666666", "X", "--")}
_PARTS = {
    "weights_bytes": ("#0072B2", ""),
    "gradients_bytes": ("#E69F00", "xxxxx"),
    "optimizer_bytes": ("#009E73", "/////"),
    "activations_bytes": ("#CC79A7", "....."),
}
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "figure.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.0,
    "lines.markersize": 4,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,
    "text.parse_math": False,
}

_Row = dict[Hashable, Any]
Curves = Mapping[str, Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class Figure:
    """A figure of the paper: `name` is that of its files, `title` one for its caption, `draw` makes it."""

    name: str
    title: str
    draw: Callable[[], matplotlib.figure.Figure]


def paper_figures(cells: pd.DataFrame, curves: Curves) -> list[Figure]:
    """The figures that the data allow, always in the same order.

    Args:
        cells: As `select.cells` makes them, at all learning rates.
        curves: By run id, the rows of its `metrics.jsonl`; may be empty.
    """
    panels = _panels(cells, curves)
    figures = []
    for plan in _PLANS:
        shown = [panel for panel in panels if plan.shows(panel)]
        if shown:
            figures.append(Figure(plan.name, plan.title + plan.remark(shown), partial(_draw, plan, shown)))
    return figures


def write_figures(figures: Sequence[Figure], directory: Path) -> list[Path]:
    """Writes `<name>.pdf` and `<name>.png` of each, atomically, and returns the paths.

    The same figures give the same bytes again: no file says when or by what it was written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in figures:
        drawn = figure.draw()
        for suffix, metadata in (("pdf", {"CreationDate": None, "Title": figure.title}), ("png", {"Software": None})):
            content = io.BytesIO()
            with _style():
                drawn.savefig(content, format=suffix, dpi=DPI, metadata=metadata)
            paths.append(directory / f"{figure.name}.{suffix}")
            write_atomically(paths[-1], content.getvalue())
    return paths


@contextmanager
def _style() -> Iterator[None]:
    """Our settings on top of the library's own defaults, whatever those of the user are, which come back after."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def pareto_front(costs: Sequence[float], scores: Sequence[float], name: str) -> list[int]:
    """Indices, by cost, of the points that no other beats: none costs less without scoring worse by metric `name`."""

    def beaten(index: int) -> bool:
        return any(
            (cost < costs[index] and not is_better(name, scores[index], value))
            or (cost == costs[index] and is_better(name, value, scores[index]))
            for cost, value in zip(costs, scores, strict=True)
        )

    return sorted((index for index in range(len(costs)) if not beaten(index)), key=lambda index: costs[index])


# ---------------------------------------------------------------- what is shown


@dataclass(frozen=True, eq=False)
class _Cell:
    """A cell and its names in a figure: `label` ("lora r8 qv") and `family`, what it shares with other ranks ("qv")."""

    row: _Row
    label: str
    family: str

    def value(self, name: str) -> float | None:
        """Its mean of a metric; None if no run finished or none measured it."""
        value = self.row.get(name)
        return None if not self.finished or value is None or math.isnan(value) else float(value)

    def shown(self, name: str) -> float:
        """Such a mean that it has, in the unit in which it is shown; of "rank" the rank."""
        value = self.rank if name == "rank" else self.value(name)
        assert value is not None, name
        return value if name == "rank" else value / metric(name).display_divisor

    def interval(self, name: str) -> float:
        """Half the width of the 95 % interval; 0 where one seed gives none."""
        half = self.row.get(f"{name}_ci")
        return 0.0 if half is None or math.isnan(half) else float(half)

    def deviation(self, name: str) -> float:
        """Standard deviation over seeds; 0 where there is one."""
        sd = self.row.get(f"{name}_sd")
        return 0.0 if sd is None or math.isnan(sd) else float(sd)

    @property
    def rank(self) -> float | None:
        return None if pd.isna(self.row["rank"]) else float(self.row["rank"])

    @property
    def finished(self) -> int:
        return int(self.row[num_status(Status.FINISHED)])

    @property
    def status(self) -> str:
        ended = [status for status in Status if status is not Status.FINISHED and self.row[num_status(status)]]
        return " and ".join(status.value.replace("_", " ") for status in ended)


@dataclass(frozen=True)
class _Panel:
    """What is shown of one model on one dataset.

    `tried` holds the cells of all learning rates, `best` one per condition; `index` numbers the families of the whole
    sweep, so that a placement looks alike in all panels.
    """

    name: str
    best: list[_Cell]
    tried: list[_Cell]
    curves: Curves
    test: str
    val: str
    index: Mapping[str, int]

    def having(self, *names: str) -> list[_Cell]:
        return [cell for cell in self.best if all(cell.value(name) is not None for name in names)]

    def families(self) -> dict[str, list[_Cell]]:
        """The conditions with a rank by family, in order of rank."""
        found = defaultdict(list)
        for cell in sorted((cell for cell in self.best if cell.rank), key=lambda cell: cell.shown("rank")):
            found[cell.family].append(cell)
        return dict(sorted(found.items(), key=lambda item: self.index[item[0]]))

    def look(self, cell: _Cell) -> dict[str, Any]:
        """Colour, marker and line style of a family; full fine-tuning is black, whatever else has no rank grey."""
        colour, marker, line = _PLAIN.get(cell.row["method"], _PLAIN["head_only"])
        if cell.rank:
            number = self.index[cell.family]
            colour, marker, line = (_nth(kinds, number) for kinds in (_COLOURS, _MARKERS, _LINES))
        return {"color": colour, "marker": marker, "linestyle": line}


def _nth(kinds: Sequence[Any], number: int) -> Any:
    """The kinds in turn."""
    return kinds[number % len(kinds)]


@dataclass
class _Notes:
    """What stands under a figure: numbers of seeds behind the means, what is not shown and why, how to read it.

    `where` stands before the names of cells, to tell panels apart.
    """

    where: str = ""
    seeds: set[int] = field(default_factory=set)
    absent: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    remarks: list[str] = field(default_factory=list)

    def tell(self, cells: Sequence[_Cell], shown: Sequence[_Cell], name: str | None = None) -> None:
        """Says how many seeds are behind metric `name` of those shown, and which of all the cells are not."""
        self.seeds |= {int(cell.row[f"{name}_n"]) for cell in shown if name}
        for cell in cells:
            if not cell.finished:
                self.absent["not finished"].append(f"{self.where}{cell.label} ({cell.status})")
            elif cell not in shown:
                self.absent["not measured"].append(self.where + cell.label)

    def text(self, *, interval: bool) -> str:
        parts = []
        if self.seeds:
            low, high = min(self.seeds), max(self.seeds)
            several = f"mean of {high} seeds" if low == high else f"mean of {low} to {high} seeds"
            several += (", 95 % interval" + (" (none for one seed)" if low == 1 else "")) if interval else ""
            parts.append(several if high > 1 else "one seed: no interval")
        parts += dict.fromkeys(self.remarks)
        for reason, names in self.absent.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{reason}: {', '.join(names[:3])}{more}")
        return "; ".join(parts)


def _panels(cells: pd.DataFrame, curves: Curves) -> list[_Panel]:
    best = best_cells(cells)
    groups: defaultdict[tuple[Any, ...], list[_Row]] = defaultdict(list)
    for row in records(best):
        groups[row["model"], row["dataset"], row["best_metric"]].append(row)
    one_method = best.loc[best["rank"].notna(), "method"].nunique() == 1
    index: dict[str, int] = {}
    panels: list[_Panel] = []
    for (model, dataset, score), rows in groups.items():
        chosen = {cell.row["condition_id"]: cell for cell in _named(rows, one_method=one_method)}
        for cell in chosen.values():
            if cell.rank:
                index.setdefault(cell.family, len(index))
        tried = [
            _Cell(row, chosen[row["condition_id"]].label, chosen[row["condition_id"]].family)
            for row in records(cells)
            if row["condition_id"] in chosen
        ]
        name = f"{_clean(model)}, {_clean(dataset)}"
        alike = sum(panel.name.partition(" #")[0] == name for panel in panels)
        name += f" #{alike + 1}" if alike else ""
        panels.append(_Panel(name, [*chosen.values()], tried, curves, f"test_{score}", f"val_{score}", index))
    return panels


def _named(rows: Sequence[_Row], *, one_method: bool) -> list[_Cell]:
    """The rows with their names; where recipes differ, those that depart from the usual one are numbered: "(2)"."""
    variants = _variants(rows)
    taken: Counter[str] = Counter()
    cells = []
    for row in rows:
        number = variants.index(_departures(row)) + 1
        variant = [f"({number})"] if number > 1 else []
        method = _clean(row["method"])
        placement = [_clean(row["target_layers"])] if isinstance(row["target_layers"], str) else []
        rank: list[str] = [] if pd.isna(row["rank"]) else [f"r{row['rank']:g}"]
        label = " ".join([method, *rank, *placement, *variant])
        family = " ".join([*([] if one_method and rank else [method]), *placement, *variant]) or method
        taken[label] += 1
        again = f" #{taken[label]}" if taken[label] > 1 else ""
        cells.append(_Cell(row, label + again, family + again))
    return cells


def _variants(rows: Sequence[_Row]) -> list[tuple[str, ...]]:
    """The ways in which recipes depart from the usual one, that one first if there is any."""
    return sorted(dict.fromkeys(map(_departures, rows)), key=bool)


def _departures(row: _Row) -> tuple[str, ...]:
    return tuple(text for text in row["differs"] or () if not text.startswith("environment."))


def _clean(value: Any, length: int = 20) -> str:
    """A name from a config on one line, shortened in its middle; what the font has no glyph for as its code point."""
    text = "".join(letter if _has_glyph(letter) else f"U+{ord(letter):04X}" for letter in str(value)).strip() or "?"
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length // 2 - 1) :]}"


@lru_cache(maxsize=4096)
def _has_glyph(letter: str) -> bool:
    """Whether the font that every figure is set in, the one that comes with matplotlib, has a letter."""
    font = font_manager.get_font(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")))
    return letter.isprintable() and font.get_char_index(ord(letter)) != 0


# ---------------------------------------------------------------- a figure


@dataclass(frozen=True)
class _Plan:
    """How a figure is made: for which panels, by which function, how high and wide each is."""

    name: str
    title: str
    shows: Callable[[_Panel], bool]
    draw: Callable[[SubFigure, _Panel, _Notes], None]
    height: Callable[[_Panel], float] = lambda panel: 2.5
    wide: Callable[[_Panel], bool] = lambda panel: False
    interval: bool = False
    remark: Callable[[Sequence[_Panel]], str] = lambda panels: ""


def _draw(plan: _Plan, panels: Sequence[_Panel]) -> matplotlib.figure.Figure:
    wide = any(map(plan.wide, panels))
    columns = 2 if len(panels) > 1 and not wide else 1
    by_row = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(map(plan.height, row)) for row in by_row]
    width = PAGE_INCHES if wide or columns == 2 else COLUMN_INCHES
    notes = _Notes()
    with _style():
        figure = matplotlib.figure.Figure(figsize=(width, sum(heights) + 0.2), dpi=DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        places = figure.subfigures(len(by_row), columns, squeeze=False, height_ratios=heights).ravel()
        for place, panel in zip(places, panels, strict=False):
            place.suptitle(panel.name)
            notes.where = f"{panel.name}: " if len(panels) > 1 else ""
            plan.draw(place, panel, notes)
            notes.remarks += [
                f"{notes.where}({number}): {_clean(', '.join(departures), 60)}"
                for number, departures in enumerate(_variants([cell.row for cell in panel.best]), 1)
                if number > 1
            ]
        footnote = textwrap.fill(notes.text(interval=plan.interval), round(width * 19.5))
        figure.supxlabel(footnote, x=0.01, ha="left", fontsize=SMALL, color=INK)
        # Labels need to know where everything is, and must not move it again.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        renderer: RendererAgg = canvas.get_renderer()  # type: ignore[no-untyped-call]
        for axes in figure.axes:
            spread_end_labels(axes, renderer)
            place_point_labels(axes, renderer)
    return figure


def _axis_label(name: str, axis: str, *, stored: bool = False) -> str:
    """As "test accuracy, ↑ better": label and unit of a metric, and which way is better on the x or y axis."""
    meaning = metric(name)
    unit = (not stored and meaning.display_unit) or (meaning.unit if meaning.unit != "1" else "")
    arrow = {Direction.HIGHER: {"x": "→", "y": "↑"}, Direction.LOWER: {"x": "←", "y": "↓"}}.get(meaning.direction)
    return meaning.label + (f" ({unit})" if unit else "") + (f", {arrow[axis]} better" if arrow else "")


def _draw_points(axes: Axes, cells: Sequence[_Cell], x: str, y: str, label: str, **look: Any) -> None:
    """Means, joined if `look` has a line style, with the 95 % intervals of scores and for medians the range."""
    xs, ys = ([cell.shown(name) for cell in cells] for name in (x, y))
    halves, ranges = [cell.interval(y) for cell in cells], np.zeros((2, len(cells)))
    if f"{x}_min" in cells[0].row:
        ends = np.array([[cell.row[f"{x}_{end}"] for cell in cells] for end in ("min", "max")], dtype=float)
        ranges = np.abs(ends / metric(x).display_divisor - np.array(xs))
    if any(cell.interval(x) for cell in cells):
        ranges = np.array([[cell.interval(x) for cell in cells]] * 2)
    bars: dict[str, Any] = {"yerr": halves if any(halves) else None, "xerr": ranges if ranges.any() else None}
    axes.errorbar(xs, ys, **bars, elinewidth=0.7, capsize=1.5, label=label, **look)


def _draw_families(axes: Axes, panel: _Panel, x: str, shown: Sequence[_Cell], y: str | None = None) -> None:
    """The score on test, or `y`, against `x`: a line for each family in order of rank, named at its end."""
    y = y or panel.test
    for family, members in panel.families().items():
        if cells := [cell for cell in members if cell in shown]:
            look = panel.look(cells[0])
            _draw_points(axes, cells, x, y, family, **look)
            label_end(axes, family, (cells[-1].shown(x), cells[-1].shown(y)), look["color"])


def _name_points(axes: Axes, cells: Sequence[_Cell], x: str, y: str, notes: _Notes) -> None:
    """The rank of each cell beside its point, or its name where it has no rank; of too many only the range of ranks."""
    ranks = [cell.rank for cell in cells if cell.rank]
    is_many = len(ranks) > MAX_NAMED
    if is_many:
        notes.remarks.append(f"ranks {min(ranks):g} to {max(ranks):g}")
    for cell in cells:
        if not cell.rank or not is_many:
            label_point(axes, f"r{cell.rank:g}" if cell.rank else cell.label, cell.shown(x), cell.shown(y))


def _is_far(cell: _Cell, cells: Sequence[_Cell], name: str) -> bool:
    """Whether a method without rank, full fine-tuning excepted, lies so far off that the axis would show only that."""
    others = [other.shown(name) for other in cells if other is not cell]
    if cell.rank or cell.row["method"] == "full" or len(others) < 3:
        return False
    low, high, value = min(others), max(others), cell.shown(name)
    return max(low - value, value - high) > 2 * (high - low)


def _far_text(cell: _Cell, name: str, notes: _Notes) -> str:
    return f"beyond the axis: {notes.where}{cell.label} at {format_value(name, cell.row[name])}"


def _draw_references(axes: Axes, panel: _Panel, cells: Sequence[_Cell], notes: _Notes) -> None:
    """A line across for each, with its interval as a band; what would flatten everything else is told in words."""
    for cell in cells:
        if _is_far(cell, panel.having(panel.test), panel.test):
            notes.remarks.append(_far_text(cell, panel.test, notes))
            continue
        y, half = cell.shown(panel.test), cell.interval(panel.test)
        look = {key: value for key, value in panel.look(cell).items() if key != "marker"}
        axes.axhline(y, label=cell.label, zorder=1, **look)
        if half:
            axes.axhspan(y - half, y + half, facecolor=look["color"], alpha=0.15, linewidth=0)
        label_end(axes, cell.label, (1, y), look["color"], coordinates=("axes fraction", "data"))


# ---------------------------------------------------------------- ticks and labels


def _set_ticks(axes: Axes, values: Sequence[float], text: Callable[[float], str], *, on: str = "x") -> None:
    """Ticks of a logarithmic axis at the values themselves, those left out that would run into the last one."""
    kept: list[float] = []
    axis = {"x": axes.xaxis, "y": axes.yaxis}[on]
    low, high = (math.log(limit) for limit in axis.get_view_interval())
    for value in sorted(set(values)):
        room = 0.028 * (1 + len(text(value))) if on == "x" else 0.06
        if not kept or (math.log(value) - math.log(kept[-1])) / (high - low) > room:
            kept.append(value)
    axis.set_ticks(kept, [text(value) for value in kept])
    axis.set_minor_locator(NullLocator())


def _rate_text(value: float) -> str:
    """A learning rate as "2e-4"."""
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _set_count_ticks(axes: Axes, name: str) -> None:
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


# ---------------------------------------------------------------- the figures


def _draw_by_params(place: SubFigure, panel: _Panel, notes: _Notes) -> None:
    axes = place.subplots()
    shown = _with_adapter(panel)
    references = _alike(_without_rank(panel), shown)
    _draw_families(axes, panel, "num_adapter_params", shown)
    axes.set_xscale("log")
    _set_count_ticks(axes, "num_adapter_params")
    _name_points(axes, shown, "num_adapter_params", panel.test, notes)
    _draw_references(axes, panel, references, notes)
    left_out = [cell for cell in _without_rank(panel) if cell not in references]
    notes.tell([cell for cell in panel.best if cell not in left_out], [*shown, *references], panel.test)
    axes.set(xlabel=_axis_label("num_adapter_params", "x"), ylabel=_axis_label(panel.test, "y"))


def _with_adapter(panel: _Panel) -> list[_Cell]:
    having = panel.having("num_adapter_params", panel.test)
    return [cell for cell in having if cell.rank and cell.value("num_adapter_params")]


def _without_rank(panel: _Panel) -> list[_Cell]:
    return [cell for cell in panel.having(panel.test) if not cell.rank]


def _alike(references: Sequence[_Cell], shown: Sequence[_Cell]) -> list[_Cell]:
    """The references in a recipe of the cells shown: a line across says that both can be compared."""
    recipes = {cell.row["recipe_id"] for cell in shown}
    return [cell for cell in references if cell.row["recipe_id"] in recipes]


def _draw_front(place: SubFigure, panel: _Panel, notes: _Notes, *, cost: str) -> None:
    axes = place.subplots()
    cells = panel.having(cost, panel.test)
    front = pareto_front([cell.shown(cost) for cell in cells], [cell.shown(panel.test) for cell in cells], panel.test)
    for index, cell in enumerate(cells):
        beaten = {"color": GREY, "markerfacecolor": "white", "markersize": 3.5, "zorder": 1}
        look = panel.look(cell) | {"linestyle": "none"} | ({} if index in front else beaten)
        _draw_points(axes, [cell], cost, panel.test, cell.label, **look)
    at = [(cells[index].shown(cost), cells[index].shown(panel.test)) for index in front]
    corners = [corner for (x, y), (right, up) in pairwise(at) for corner in ((x, y), (right, y), (right, up))] or at
    axes.plot(*zip(*corners, strict=True), color=INK, linewidth=0.7, zorder=0.5, label="front")
    axes.margins(0.12)
    near = [cell for cell in cells if not _is_far(cell, cells, panel.test)]
    axes.set_ylim(*_limits(near, panel.test, notes))
    for index, (x, y) in zip(front, at, strict=True):
        low, high = axes.get_ylim()
        away = " ↓" if y < low else " ↑" if y > high else ""
        label_point(axes, cells[index].label + away, x, min(max(y, low), high))
    notes.tell(panel.best, cells, panel.test)
    notes.remarks += [_far_text(cell, panel.test, notes) for cell in cells if cell not in near]
    notes.remarks.append("line: what nothing beats in both; hollow: beaten")
    notes.remarks += ["time: median and range"] if f"{cost}_min" in cells[0].row else []
    axes.set(xlabel=_axis_label(cost, "x"), ylabel=_axis_label(panel.test, "y"))


def _limits(cells: Sequence[_Cell], name: str, notes: _Notes, also: Sequence[float] = ()) -> tuple[float, float]:
    """From the lowest to the highest mean and further values, with room for the noise and around them."""
    # The interval of two seeds is thirteen times their deviation and would press all means onto one line.
    reach = [min(cell.interval(name), 2 * cell.deviation(name)) for cell in cells]
    spread = [
        *also,
        *(cell.shown(name) + side * half for cell, half in zip(cells, reach, strict=True) for side in (-1, 1)),
    ]
    if any(cell.interval(name) > half for cell, half in zip(cells, reach, strict=True)):
        notes.remarks.append("intervals of few seeds reach beyond the axis")
    room = 0.12 * (max(spread) - min(spread)) or 0.01
    return min(spread) - room, max(spread) + room


def _draw_by_compute(place: SubFigure, panel: _Panel, notes: _Notes) -> None:
    axes = place.subplots()
    cells = panel.having("train_flops", panel.test)
    shown = [cell for cell in cells if not _is_far(cell, cells, panel.test)]
    _draw_families(axes, panel, "train_flops", shown)
    for cell in shown:
        if not cell.rank:
            _draw_points(
                axes, [cell], "train_flops", panel.test, cell.label, **panel.look(cell) | {"linestyle": "none"}
            )
    axes.set_xscale("log")
    axes.margins(0.1)
    _set_count_ticks(axes, "train_flops")
    _name_points(axes, shown, "train_flops", panel.test, notes)
    notes.remarks += [_far_text(cell, panel.test, notes) for cell in cells if cell not in shown]
    notes.tell(panel.best, cells, panel.test)
    axes.set(xlabel=_axis_label("train_flops", "x", stored=True), ylabel=_axis_label(panel.test, "y"))


def _draw_forgetting(place: SubFigure, panel: _Panel, notes: _Notes) -> None:
    axes = place.subplots()
    shown = panel.having(LEARNED, FORGETTING)
    _draw_families(axes, panel, LEARNED, shown, FORGETTING)
    for cell in shown:
        if not cell.rank:
            _draw_points(axes, [cell], LEARNED, FORGETTING, cell.label, **panel.look(cell) | {"linestyle": "none"})
    for bars in axes.containers:
        for lines in bars.get_children()[1:]:
            lines.set_alpha(0.4)  # they cross each other in both directions
    _name_points(axes, _without_inner_ranks(panel, shown, notes), LEARNED, FORGETTING, notes)
    values = [[cell.shown(name) for cell in shown] for name in (LEARNED, FORGETTING)]
    # From far off it would press all others together.
    is_far = any(map(_is_far_from_zero, values))
    axes.set_xlim(*_limits(shown, LEARNED, notes, [] if is_far else [0.0]))
    axes.set_ylim(*_limits(shown, FORGETTING, notes, [] if is_far else [0.0]))
    _draw_base_model(axes, notes)
    sets = dict.fromkeys(_clean(cell.row.get("base_domain")) for cell in shown)
    notes.tell(panel.best, shown, FORGETTING)
    notes.remarks.append(f"forgetting: nll on {' or '.join(sets)} after training minus before")
    axes.set(xlabel=_axis_label(LEARNED, "x"), ylabel=_axis_label(FORGETTING, "y"))


def _without_inner_ranks(panel: _Panel, shown: Sequence[_Cell], notes: _Notes) -> list[_Cell]:
    """The cells to be named: of many points those at the ends of the lines, which join the ranks in their order."""
    families = [[cell for cell in members if cell in shown] for members in panel.families().values()]
    if sum(map(len, families)) <= MAX_NAMED_APART:
        return [*shown]
    ranks = sorted({cell.shown("rank") for members in families for cell in members})
    notes.remarks.append(f"joined in order of rank: {', '.join(f'{rank:g}' for rank in ranks)}")
    ends = [cell for members in families if members for cell in (members[0], members[-1])]
    return [cell for cell in shown if cell in ends or not cell.rank]


def _draw_base_model(axes: Axes, notes: _Notes) -> None:
    """The model before training, which has learned and forgotten nothing: at 0 or where the axes end towards it."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    x, y = min(max(0.0, left), right), min(max(0.0, low), high)
    if low < 0 < high:
        axes.axhline(0, color=GREY, linewidth=0.5, zorder=0.5, label="nothing forgotten")
    look: dict[str, Any] = {"color": GREY, "markeredgecolor": INK, "markeredgewidth": 0.5, "clip_on": False}
    axes.plot(x, y, "P", markersize=5, label="base model", **look)
    label_point(axes, "base model", x, y)
    if (x, y) != (0, 0):
        notes.remarks.append("base model: beyond the axes, at 0 and 0")


def _is_far_from_zero(values: Sequence[float]) -> bool:
    low, high = min(values), max(values)
    return len(values) > 2 and max(low, -high) > 2 * (high - low) > 0


def _draw_rank_curves(place: SubFigure, panel: _Panel, notes: _Notes) -> None:
    axes = place.subplots()
    shown = [cell for cell in panel.having(panel.test) if cell.rank]
    full = _alike([cell for cell in _without_rank(panel) if cell.row["method"] == "full"], shown)
    axes.set_xscale("log", base=2)
    _draw_families(axes, panel, "rank", shown)
    # A little aside, or the intervals of all placements would lie on one another.
    for number, bars in enumerate(axes.containers):
        points = (number - (len(axes.containers) - 1) / 2) * 2.5
        for artist in bars.get_children():
            artist.set_transform(
                artist.get_transform() + ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)
            )
    _set_ticks(axes, [cell.shown("rank") for cell in shown], lambda value: f"{value:g}")
    _draw_references(axes, panel, full, notes)
    compared = [cell for cell in panel.best if cell.rank or cell in full or not cell.finished]
    compared = [cell for cell in compared if cell.rank or cell.row["method"] == "full"]
    notes.tell(compared, [*shown, *full], panel.test)
    axes.set(xlabel="rank", ylabel=_axis_label(panel.test, "y"))


def _draw_heat_map(place: SubFigure, panel: _Panel, notes: _Notes) -> None:
    axes = place.subplots()
    families, ranks = list(panel.families()), _ranks(panel)
    cells = {(ranks.index(cell.rank), families.index(cell.family)): cell for cell in panel.best if cell.rank}
    scores = np.full((len(ranks), len(families)), math.nan)
    for at, cell in cells.items():
        value = cell.value(panel.test)
        scores[at] = math.nan if value is None else value
    palette = "cividis_r" if metric(panel.test).direction is Direction.LOWER else "cividis"
    mesh = axes.pcolormesh(np.ma.masked_invalid(scores), cmap=palette, edgecolors="white", linewidth=1.5)
    for (row, column), cell in cells.items():
        value, text, look = cell.value(panel.test), cell.status or "not measured", {**TEXT, "ha": "center"}
        if value is None:
            frame = Rectangle((column + 0.03, row + 0.04), 0.94, 0.92, hatch="////", fill=False, ec=GREY, linewidth=0)
            axes.add_patch(frame)
            look["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        else:
            dark = np.dot(mesh.to_rgba(np.asarray(value))[:3], (0.2126, 0.7152, 0.0722)) < 0.45
            look["color"], text = "white" if dark else "black", format_value(panel.test, value)
        axes.text(column + 0.5, row + 0.5, textwrap.fill(text, 9), **look)
    axes.set_yticks(np.arange(len(ranks)) + 0.5, [f"{rank:g}" for rank in ranks])
    long = max(map(len, families)) > 8
    axes.set_xticks(np.arange(len(families)) + 0.5, families, rotation=30 * long, ha="right" if long else "center")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(ylabel="rank", xlabel=f"placement (in the cells: {_axis_label(panel.test, 'y').partition(',')[0]})")
    notes.tell([*cells.values()], [cell for cell in cells.values() if cell in panel.having(panel.test)], panel.test)
    notes.remarks.append("lighter is better")


def _ranks(panel: _Panel) -> list[Any]:
    return sorted({cell.rank for cell in panel.best if cell.rank}, key=float)


def _draw_learning_rates(place: SubFigure, panel: _Panel, notes: _Notes) -> None:
    axes = place.subplots()
    axes.set_xscale("log")
    ranks, fallen = _ranks(panel), []
    for chosen in (cell for cell in panel.best if len(cell.row["tried"]) > 1):
        rates = [cell for cell in panel.tried if cell.row["condition_id"] == chosen.row["condition_id"]]
        rates.sort(key=lambda cell: float(cell.row["learning_rate"]))
        look = panel.look(chosen)
        if chosen.rank:
            look |= {
                "marker": _nth(_MARKERS, ranks.index(chosen.rank)),
                "linestyle": _nth(_LINES, ranks.index(chosen.rank)),
            }
        scored = [cell for cell in rates if cell.value(panel.val) is not None]
        if scored:
            points = [(cell.row["learning_rate"], cell.shown(panel.val)) for cell in scored]
            axes.plot(*zip(*points, strict=True), label=chosen.label, **look)
            label_end(axes, chosen.label, points[-1], look["color"])
        if chosen.value(panel.val) is not None:
            best = (chosen.row["learning_rate"], chosen.shown(panel.val))
            axes.plot(*best, "o", ms=7, mfc="none", mec=look["color"], mew=0.7, label="best")
        fallen += [(cell, look["color"]) for cell in rates if not cell.finished]
        notes.tell([], scored, panel.val)
    axes.margins(y=0.08)
    _draw_fallen(axes, fallen, notes)
    _set_ticks(axes, [rate for cell in panel.best if len(rates := cell.row["tried"]) > 1 for rate in rates], _rate_text)
    notes.remarks.append("ring: the chosen rate")
    axes.set(xlabel="learning rate", ylabel=_axis_label(panel.val, "y"))


def _draw_best_rates(place: SubFigure, panel: _Panel, notes: _Notes) -> None:
    axes = place.subplots()
    shown = _tuned_ranks(panel)
    full = _tuned_full(panel, shown)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    drawn = [[cell for cell in members if cell in shown] for members in panel.families().values()]
    drawn = [cells for cells in drawn if cells]
    named: set[tuple[float, float, float]] = set()
    for number, cells in enumerate(drawn):
        look, points = panel.look(cells[0]), [(cell.shown("rank"), cell.row["learning_rate"]) for cell in cells]
        # A little aside: grids are coarse, and the best rates of several placements one and the same.
        points_aside = (number - (len(drawn) - 1) / 2) * min(4, 14 / len(drawn))
        aside = ScaledTranslation(points_aside / 72, 0, axes.figure.dpi_scale_trans)
        (line,) = axes.plot(*zip(*points, strict=True), label=cells[0].family, **look)
        line.set_transform(line.get_transform() + aside)
        for cell, point in zip(cells, points, strict=True):
            if cell.row["edge"]:
                (hollow,) = axes.plot(*point, marker=look["marker"], mec=look["color"], mfc="white", label="edge")
                hollow.set_transform(hollow.get_transform() + aside)
            reference = full.get(cell.row["recipe_id"])
            ratio = None if reference is None else point[1] / reference.row["learning_rate"]
            if ratio is not None and (*point, ratio) not in named and len(shown) <= MAX_NAMED:
                named.add((*point, ratio))
                label_point(axes, f"{ratio:.3g}\N{MULTIPLICATION SIGN}", *point)
        label_end(axes, cells[0].family, points[-1], look["color"])
    for reference in full.values():
        rate = reference.row["learning_rate"]
        axes.axhline(rate, color="black", label=reference.label, zorder=1)
        label_end(axes, reference.label, (1, rate), "black", coordinates=("axes fraction", "data"))
        notes.remarks.append("\N{MULTIPLICATION SIGN}: ratio to the best rate of full of the same recipe")
        if reference.row["edge"]:
            edge = f"at the {reference.row['edge']} edge of its grid"
            notes.remarks.append(f"{notes.where}the rate of {reference.label} is {edge}")
    if any(cell.row["edge"] for cell in shown):
        notes.remarks.append("hollow: at the edge of its grid, so a better rate may lie outside")
    axes.margins(0.1)
    _set_ticks(axes, [cell.shown("rank") for cell in shown], lambda value: f"{value:g}")
    _set_ticks(axes, [rate for cell in [*shown, *full.values()] for rate in cell.row["tried"]], _rate_text, on="y")
    compared = [cell for cell in panel.best if cell.rank and len(cell.row["tried"]) > 1]
    notes.tell(compared, shown, panel.val)
    axes.set(xlabel="rank", ylabel="learning rate that is best on val")


def _tuned_ranks(panel: _Panel) -> list[_Cell]:
    """The conditions of which several learning rates were tried, in placements that have several such ranks."""
    tuned = [cell for cell in panel.having(panel.val) if cell.rank and len(cell.row["tried"]) > 1]
    ranks = defaultdict(set)
    for cell in tuned:
        ranks[cell.family].add(cell.rank)
    return [cell for cell in tuned if len(ranks[cell.family]) > 1]


def _tuned_full(panel: _Panel, shown: Sequence[_Cell]) -> dict[str, _Cell]:
    """By the recipes of the cells shown, full fine-tuning with several learning rates, of several the usual one."""
    full = [cell for cell in panel.having(panel.val) if cell.row["method"] == "full" and len(cell.row["tried"]) > 1]
    found: dict[str, _Cell] = {}
    for cell in sorted(full, key=lambda cell: bool(_departures(cell.row))):
        if any(cell.row["recipe_id"] == other.row["recipe_id"] for other in shown):
            found.setdefault(cell.row["recipe_id"], cell)
    return found


def _draw_fallen(axes: Axes, fallen: Sequence[tuple[_Cell, str]], notes: _Notes) -> None:
    """An x for each cell without a finished run, stacked in a strip below the scores."""
    (low, high), most = (
        axes.get_ylim(),
        max(Counter(cell.row["learning_rate"] for cell, _ in fallen).values(), default=0),
    )
    step = min(0.045, 0.4 / max(most, 1))
    axes.set_ylim(low - (high - low) * step * most / (1 - step * most))
    stacked: Counter[float] = Counter()
    for cell, colour in fallen:
        rate = cell.row["learning_rate"]
        look: dict[str, Any] = {"color": colour, "clip_on": False, "label": f"{cell.label}: {cell.status}"}
        axes.plot(rate, 0.02 + step * stacked[rate], "x", transform=axes.get_xaxis_transform(), **look)
        stacked[rate] += 1
        where = f"{notes.where}{cell.label} at {_rate_text(rate)}"
        notes.absent["x: not finished"].append(f"{where} ({cell.status})")


def _draw_training(place: SubFigure, panel: _Panel, notes: _Notes) -> None:
    upper, lower = place.subplots(2, 1, sharex=True)
    shown, loss = _curve_cells(panel)[:MAX_CURVES], _loss(panel)
    for number, cell in enumerate(shown):
        colour = "black" if cell.row["method"] == "full" else _nth(_COLOURS, number)
        look = {"color": colour, "linestyle": _nth(_LINES, number), "label": cell.label}
        losses, scores = (_mean_curve(panel, cell, name) for name in (loss, panel.val))
        upper.plot(*losses, **look, alpha=0.6, linewidth=0.7)
        lower.plot(*scores, **look, marker=_nth(_MARKERS, number) if len(scores[0]) <= 20 else "", markersize=3)
        if scores[0]:
            label_end(lower, cell.label, (scores[0][-1], scores[1][-1]), colour)
    upper.set(ylabel=_axis_label(loss, "y"))
    lower.set(xlabel="step", ylabel=_axis_label(panel.val, "y"))
    notes.tell([cell for cell in panel.best if not cell.finished], shown, panel.val)
    notes.remarks += [_curve_remark([panel]).strip(" ()")] if _curve_remark([panel]) else []


def _curve_cells(panel: _Panel) -> list[_Cell]:
    """The conditions with curves, the best by val first."""
    having = [cell for cell in panel.having(panel.val) if len(_mean_curve(panel, cell, _loss(panel))[0]) > 1]
    return [having[index] for index in ranked_by([cell.row for cell in having], panel.val)]


def _curve_remark(panels: Sequence[_Panel]) -> str:
    more = any(len(_curve_cells(panel)) > MAX_CURVES for panel in panels)
    return f" (the {MAX_CURVES} conditions that are best on val)" if more else ""


def _loss(panel: _Panel) -> str:
    return "train_mse" if any(cell.value("train_mse") is not None for cell in panel.best) else "train_nll"


def _mean_curve(panel: _Panel, cell: _Cell, name: str) -> tuple[list[float], list[float]]:
    """Steps and means over the runs, at the steps that all have; a run that stopped before the others is left out."""
    rows = [panel.curves[run_id] for run_id in cell.row["run_ids"] if panel.curves.get(run_id)]
    last = max((row["step"] for run in rows for row in run), default=0)
    runs = [
        {row["step"]: row[name] for row in run if row.get(name) is not None}
        for run in rows
        if max(row["step"] for row in run) == last
    ]
    steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    return steps, [math.fsum(run[step] for run in runs) / len(runs) for step in steps]


def _draw_lowest_curves(place: SubFigure, panel: _Panel, notes: _Notes) -> None:
    found, name = _lowest_curves(panel), _lowest_name(panel)
    full = [cell for cell in found if not cell.rank]
    families = [[cell for cell in members if cell in found] for members in panel.families().values()]
    families = [members for members in families if members]
    rows, columns = _grid_of(len(families))
    grid = place.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    ranks = sorted({cell.shown("rank") for members in families for cell in members})
    for axes, members in zip(grid.ravel(), families, strict=False):
        axes.set_xscale("log")
        alike = [cell for cell in full if cell.row["recipe_id"] == members[0].row["recipe_id"]]
        for cell in [*alike, *members]:
            number = ranks.index(cell.shown("rank")) if cell.rank else 0
            # Ranks have an order, and so have these colours.
            colour: Any = _RANK_COLOURS(0.8 * number / max(1, len(ranks) - 1)) if cell.rank else "black"
            style = _nth(_LINES[1:], number) if cell.rank else "-"
            steps, values = found[cell]
            text = f"r{cell.rank:g}" if cell.rank else cell.label
            axes.plot(steps, values, color=colour, linestyle=style, label=text)
            label_end(axes, text, (steps[-1], values[-1]), colour)
        if len(families) > 1:
            axes.set_title(members[0].family)
    for axes in grid.ravel()[len(families) :]:
        axes.set_visible(False)
    # What comes before the first twentieth of the training is steep and would flatten all that differs.
    last = max(steps[-1] for steps, _ in found.values())
    late = [
        value
        for steps, values in found.values()
        for step, value in zip(steps, values, strict=True)
        if step >= last / 20
    ]
    room = 0.05 * (max(late) - min(late)) or 0.01
    grid[0, 0].set_ylim(min(late) - room, max(late) + room)
    for axes in grid[:, 0]:
        axes.set_ylabel(_axis_label(name, "y"))
    if any(value > max(late) for _, values in found.values() for value in values):
        notes.remarks.append("what lies above the axis comes before a twentieth of the steps")
    for axes in grid.ravel()[: len(families)]:
        _set_count_ticks(axes, "num_steps")
    for axes in grid.ravel()[max(0, len(families) - columns) : len(families)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("step")
    tuned = {cell.row["condition_id"] for cell in found}
    notes.tell([], [cell for cell in panel.tried if cell.row["condition_id"] in tuned and cell.finished], panel.val)
    if len(families) == 1:
        notes.remarks.append(f"{notes.where}{families[0][0].family}")
    notes.remarks.append("at every step the lowest of the mean curves of all finished learning rates")


def _grid_of(number: int) -> tuple[int, int]:
    """Rows and columns for so many axes, at most three side by side."""
    columns = 2 if number == 4 else min(3, number)
    return -(-number // columns), columns


def _lowest_curves(panel: _Panel) -> dict[_Cell, tuple[list[float], list[float]]]:
    """By condition, at every step the lowest nll of any learning rate: placements with several ranks, and full."""
    ranks_tried, name = _tuned_ranks(panel), _lowest_name(panel)
    cells = [*ranks_tried, *_tuned_full(panel, ranks_tried).values()]
    found = {cell: _lowest_curve(panel, cell, name) for cell in cells}
    found = {cell: curve for cell, curve in found.items() if len(curve[0]) > 1}
    ranks = Counter(cell.family for cell in found if cell.rank)
    return {cell: curve for cell, curve in found.items() if not cell.rank or ranks[cell.family] > 1}


def _lowest_name(panel: _Panel) -> str:
    """The nll on val, or on train where val was scored at the end alone."""
    on_val = [_lowest_curve(panel, cell, "val_nll")[0] for cell in _tuned_ranks(panel)]
    return "val_nll" if on_val and all(len(steps) > 1 for steps in on_val) else "train_nll"


def _lowest_curve(panel: _Panel, condition: _Cell, name: str) -> tuple[list[float], list[float]]:
    lowest: dict[float, float] = {}
    for cell in panel.tried:
        if cell.finished and cell.row["condition_id"] == condition.row["condition_id"]:
            for step, value in zip(*_mean_curve(panel, cell, name), strict=True):
                lowest[step] = min(value, lowest.get(step, math.inf))
    steps = sorted(step for step in lowest if step > 0)  # a logarithmic axis has no 0
    return steps, [lowest[step] for step in steps]


def _num_placements(panel: _Panel) -> int:
    return len({cell.family for cell in _lowest_curves(panel) if cell.rank})


def _has_lowest_curves(panel: _Panel) -> bool:
    return panel.val in _NLL_LIKE and any(cell.rank for cell in _lowest_curves(panel))


# Language models are judged by these, and they fall together.
_NLL_LIKE = {"val_nll", "val_perplexity", "val_bits_per_byte"}


def _draw_memory(place: SubFigure, panel: _Panel, notes: _Notes) -> None:
    axes = place.subplots()
    cells = panel.having(*_PARTS)
    starts = np.zeros(len(cells))
    for name, (colour, hatch) in _PARTS.items():
        widths = np.array([cell.shown(name) for cell in cells])
        look: dict[str, Any] = {"facecolor": colour, "edgecolor": "white", "hatch": hatch, "linewidth": 0.4}
        axes.barh(range(len(cells)), widths, 0.7, starts, label=metric(name).label, **look)
        starts += widths
    for number, total in enumerate(starts):
        text = f"{format_value('peak_memory_bytes', total * metric('peak_memory_bytes').display_divisor)} MiB"
        axes.annotate(text, (total, number), (2, 0), textcoords="offset points", **TEXT)
    axes.set_yticks(range(len(cells)), [cell.label for cell in cells])
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, handlelength=1.6, borderpad=0)
    axes.set(xlabel=_axis_label("peak_memory_bytes", "x"))
    notes.tell(panel.best, cells)


def _has_rank_curve(panel: _Panel) -> bool:
    families = panel.families().values()
    return any(len({cell.rank for cell in family if cell in panel.having(panel.test)}) > 1 for family in families)


def _has_heat_map(panel: _Panel) -> bool:
    scored = any(cell.rank for cell in panel.having(panel.test))
    return scored and len(_ranks(panel)) > 1 and len(panel.families()) > 1


def _has_rates(panel: _Panel) -> bool:
    return bool(panel.having(panel.val)) and any(len(cell.row["tried"]) > 1 for cell in panel.best)


def _can_draw_front(panel: _Panel, *, cost: str) -> bool:
    return len(panel.having(cost, panel.test)) > 1


_PLANS = (
    _Plan(
        "score_by_params",
        "Score on test against the number of adapter parameters",
        shows=lambda panel: len(_with_adapter(panel)) > 1,
        draw=_draw_by_params,
        interval=True,
    ),
    _Plan(
        "score_by_memory",
        "Score on test against peak memory",
        shows=partial(_can_draw_front, cost="peak_memory_bytes"),
        draw=partial(_draw_front, cost="peak_memory_bytes"),
        interval=True,
    ),
    _Plan(
        "score_by_compute",
        "Score on test against training compute",
        shows=partial(_can_draw_front, cost="train_flops"),
        draw=_draw_by_compute,
        interval=True,
    ),
    _Plan(
        "forgetting",
        "Learning against forgetting",
        shows=lambda panel: bool(panel.having(LEARNED, FORGETTING)),
        draw=_draw_forgetting,
        height=lambda panel: 3.0,
        interval=True,
    ),
    _Plan("rank_curves", "Score on test against the rank", _has_rank_curve, _draw_rank_curves, interval=True),
    _Plan(
        "rank_by_placement",
        "Score on test by rank and placement",
        shows=_has_heat_map,
        draw=_draw_heat_map,
        height=lambda panel: 0.9 + 0.3 * len(_ranks(panel)),
        wide=lambda panel: len(panel.families()) > 6,
    ),
    _Plan(
        "learning_rates",
        "Score on val against the learning rate",
        shows=_has_rates,
        draw=_draw_learning_rates,
        height=lambda panel: max(2.5, 0.8 + 0.12 * len(panel.best)),
    ),
    _Plan(
        "best_rates",
        "Best learning rate against the rank",
        shows=lambda panel: bool(_tuned_ranks(panel)),
        draw=_draw_best_rates,
    ),
    _Plan(
        "lowest_curves",
        "Lowest negative log-likelihood over learning rates at every step",
        shows=_has_lowest_curves,
        draw=_draw_lowest_curves,
        height=lambda panel: 0.3 + 2.2 * _grid_of(_num_placements(panel))[0],
        wide=lambda panel: _num_placements(panel) > 1,
    ),
    _Plan(
        "training_curves",
        "Training curves",
        shows=lambda panel: bool(_curve_cells(panel)),
        draw=_draw_training,
        height=lambda panel: 3.4,
        remark=_curve_remark,
    ),
    _Plan(
        "memory_parts",
        "Parts of the peak memory",
        shows=lambda panel: bool(panel.having(*_PARTS)),
        draw=_draw_memory,
        height=lambda panel: 0.9 + 0.17 * len(panel.having(*_PARTS)),
        wide=lambda panel: True,
    ),
    _Plan(
        "score_by_step_time",
        "Score on test against the time of a step",
        shows=partial(_can_draw_front, cost="step_seconds_median"),
        draw=partial(_draw_front, cost="step_seconds_median"),
        interval=True,
    ),
)
