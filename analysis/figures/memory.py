"""The parts of the memory peak."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import SubFigure

from analysis.figures.axes import axis_label
from analysis.figures.engine import FigureKind
from analysis.figures.footnote import Footnote
from analysis.figures.panels import Panel, PlottedCell
from analysis.figures.style import TEXT
from analysis.metrics import MEMORY_PARTS, format_value, metric

# Colour and hatch of each part, in the order of `MEMORY_PARTS`.
_LOOKS = (("#0072B2", ""), ("#E69F00", "xxxxx"), ("#009E73", "/////"), ("#CC79A7", "....."))
# More bars than a page is high are not read.
MOST_BARS = 40


def _shown(panel: Panel) -> list[PlottedCell]:
    """The cells that get a bar: all, or of very many so many from the least memory to the most, in their order."""
    cells = panel.with_metrics(*MEMORY_PARTS)
    if len(cells) <= MOST_BARS:
        return cells
    by_peak = sorted(range(len(cells)), key=lambda at: sum(cells[at].displayed(name) for name in MEMORY_PARTS))
    picked = {by_peak[int(at)] for at in np.linspace(0, len(cells) - 1, MOST_BARS)}
    return [cell for at, cell in enumerate(cells) if at in picked]


def _draw_memory(subfigure: SubFigure, panel: Panel, footnote: Footnote) -> None:
    axes = subfigure.subplots()
    cells = _shown(panel)
    starts = np.zeros(len(cells))
    for name, (colour, hatch) in zip(MEMORY_PARTS, _LOOKS, strict=True):
        widths = np.array([cell.displayed(name) for cell in cells])
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
    axes.set(xlabel=axis_label("peak_memory_bytes", "x"))
    measured = panel.with_metrics(*MEMORY_PARTS)
    if len(measured) > len(cells):
        footnote.remarks.append(
            f"{footnote.where}{len(cells)} of {len(measured)}, from the least peak memory to the most; the table of "
            "costs has all"
        )
    footnote.account_for(panel.best, measured)


MEMORY = FigureKind(
    "memory_parts",
    "Parts of the peak memory",
    is_drawn_for=lambda panel: bool(panel.with_metrics(*MEMORY_PARTS)),
    draw=_draw_memory,
    height=lambda panel: 0.9 + 0.17 * len(_shown(panel)),
    is_wide=lambda panel: True,
)
