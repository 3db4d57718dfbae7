"""Sizes, colours, markers and line styles of the figures, and the settings that they are drawn with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib

from analysis.figures.font import families

COLUMN_INCHES = 3.4
PAGE_INCHES = 6.8
DPI = 200
SMALL = 6.5  # points, of text inside the axes and under a figure

INK, GREY = "#222222", "#8A8A8A"
TEXT: dict[str, Any] = {"va": "center", "fontsize": SMALL, "color": INK}
# Okabe and Ito's palette, readable with every kind of colour blindness, less its yellow; black is full fine-tuning's.
COLOURS: tuple[Any, ...] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS: tuple[Any, ...] = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 3)), (0, (8, 2)))
RANK_COLOURS = matplotlib.colormaps["viridis"]
# Colour, marker and line of methods without a rank.
LOOK_OF_FULL: tuple[str, str, Any] = ("black", "*", "-")
LOOK_WITHOUT_RANK: tuple[str, str, Any] = ("#666666", "X", "--")


def in_turn(kinds: Sequence[Any], number: int) -> Any:
    """The kind of that number; after the last one the first again."""
    return kinds[number % len(kinds)]


_SETTINGS: dict[Any, Any] = {
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


@contextmanager
def our_settings() -> Iterator[None]:
    """Our settings on top of the library's own defaults, whatever those of the user are, which come back after."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS | {"font.family": families()})
        yield
