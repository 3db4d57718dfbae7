"""From a kind of figure and its panels to a drawing with a footnote, and to PDF and PNG."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import SubFigure
from matplotlib.text import Text

from analysis.figures.footnote import Footnote
from analysis.figures.labels import place_labels
from analysis.figures.panels import Panel
from analysis.figures.style import COLUMN_INCHES, DPI, INK, PAGE_INCHES, SMALL, our_settings
from harness.results.files import write_atomically


@dataclass(frozen=True)
class FigureKind:
    """A kind of figure.

    Attributes:
        name: of its files.
        title: for its caption.
        is_drawn_for: whether a panel has what it shows.
        draw: draws a panel and says in the footnote what it shows and what not.
        height: of a panel, in inches.
        is_wide: whether a panel needs the width of the page; else two lie side by side.
        has_intervals: whether the footnote has to say what the intervals are.
        remark: what is added to the title for these panels.
    """

    name: str
    title: str
    is_drawn_for: Callable[[Panel], bool]
    draw: Callable[[SubFigure, Panel, Footnote], None]
    height: Callable[[Panel], float] = lambda panel: 2.5
    is_wide: Callable[[Panel], bool] = lambda panel: False
    has_intervals: bool = False
    remark: Callable[[Sequence[Panel]], str] = lambda panels: ""


@dataclass(frozen=True)
class Figure:
    """A figure of the paper: `name` is that of its files, `title` one for its caption, `draw` makes it.

    Of a large one `inches`, its width times its height, say how long that takes beside others.
    """

    name: str
    title: str
    draw: Callable[[], matplotlib.figure.Figure]
    inches: float = 0.0


def figures_of(kinds: Sequence[FigureKind], panels: Sequence[Panel]) -> list[Figure]:
    """The figures of those kinds that any panel has the data for."""
    figures = []
    for kind in kinds:
        shown = [panel for panel in panels if kind.is_drawn_for(panel)]
        if shown:
            size = _size(kind, shown)
            draw = partial(_draw, kind, shown, size)
            figures.append(Figure(kind.name, kind.title + kind.remark(shown), draw, size.width * sum(size.heights)))
    return figures


class _Size(NamedTuple):
    """Of a figure: its width and the height of each row of panels, in inches, and how many panels lie side by side."""

    width: float
    heights: list[float]
    num_columns: int


def _size(kind: FigureKind, panels: Sequence[Panel]) -> _Size:
    is_wide = any(map(kind.is_wide, panels))
    num_columns = 2 if len(panels) > 1 and not is_wide else 1
    by_row = [panels[start : start + num_columns] for start in range(0, len(panels), num_columns)]
    width = PAGE_INCHES if is_wide or num_columns == 2 else COLUMN_INCHES
    return _Size(width, [max(map(kind.height, row)) for row in by_row], num_columns)


def _draw(kind: FigureKind, panels: Sequence[Panel], size: _Size) -> matplotlib.figure.Figure:
    width, heights, num_columns = size
    footnote = Footnote()
    with our_settings():
        figure = matplotlib.figure.Figure(figsize=(width, sum(heights) + 0.2), dpi=DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        subfigures = figure.subfigures(len(heights), num_columns, squeeze=False, height_ratios=heights).ravel()
        for subfigure, panel in zip(subfigures, panels, strict=False):
            subfigure.suptitle(panel.name)
            footnote.where = f"{panel.name}: " if len(panels) > 1 else ""
            kind.draw(subfigure, panel, footnote)
            footnote.explain_variants(panel, partial(_texts_in, subfigure))
        text = textwrap.fill(footnote.text(has_intervals=kind.has_intervals), round(width * 19.5))
        figure.supxlabel(text, x=0.01, ha="left", fontsize=SMALL, color=INK)
        # Labels need to know where everything is, and must not move it again.
        engine = figure.get_layout_engine()
        assert engine is not None
        engine.execute(figure)
        figure.set_layout_engine(None)  # with a placeholder every format would be drawn twice
        renderer: RendererAgg = canvas.get_renderer()  # type: ignore[no-untyped-call]
        for axes in figure.axes:
            place_labels(axes, renderer)
    return figure


def _texts_in(subfigure: SubFigure) -> list[str]:
    return [text.get_text() for text in subfigure.findobj(Text)]


def write_figures(figures: Sequence[Figure], directory: Path) -> list[Path]:
    """Writes `<name>.pdf` and `<name>.png` of each, atomically, and returns the paths.

    The same figures give the same bytes again: no file says when or by what it was written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in figures:
        drawn = figure.draw()
        formats: dict[str, dict[str, Any]] = {
            "pdf": {"metadata": {"CreationDate": None, "Title": figure.title}},
            "png": {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 3}},  # 6 % larger, a third sooner
        }
        for suffix, options in formats.items():
            content = io.BytesIO()
            with our_settings():
                drawn.savefig(content, format=suffix, dpi=DPI, **options)
            paths.append(directory / f"{figure.name}.{suffix}")
            write_atomically(paths[-1], content.getvalue())
    return paths
