"""Names beside what they name: labels at the ends of lines and beside points, placed so that none covers another."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.collections import LineCollection
from matplotlib.patches import Patch
from matplotlib.path import Path
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from analysis.figures.style import GREY, TEXT

_NO_BOX = {"boxstyle": "square,pad=0", "facecolor": "none", "edgecolor": "none"}  # where the line to a label stops
_END, _POINT = "label at the right edge", "label beside a point"


def leader(
    label: tuple[float, float],
    point: tuple[float, float],
    *,
    patchA: Patch | None,  # the names that the library calls it with
    patchB: None,
    shrinkA: float,
    shrinkB: float,
) -> Path:
    """A line from the border of a label's box, around its middle, to a point, less so many pixels at each end.

    What the library's own style finds by bisection, in a tenth of the time.
    """
    start, end = np.array(label), np.array(point)
    line = end - start
    length = float(np.hypot(*line))
    inside = 0.0
    if patchA is not None and length:
        box = patchA.get_window_extent()
        with np.errstate(divide="ignore"):
            inside = float(np.min(np.array([box.width, box.height]) / 2 / np.abs(line))) * length
    left = length - inside - shrinkA - shrinkB
    if left <= 0:  # the label touches its point
        return Path(np.array([end, end]))
    return Path(np.array([start + line * (inside + shrinkA) / length, end - line * shrinkB / length]))


_LEADER: dict[str, Any] = {"arrowstyle": "-", "connectionstyle": leader, "shrinkB": 2}


def label_end(axes: Axes, text: str, point: tuple[float, float], colour: str, coordinates: Any = "data") -> None:
    """Names a line to the right of the axes, or at its end where that is far from there; see `place_labels`."""
    arrow = {**_LEADER, "color": colour, "linewidth": 0.5, "linestyle": ":", "shrinkA": 1}
    axes.annotate(text, point, (1.04, 0.5), coordinates, "axes fraction", arrow, False, gid=_END, **TEXT)


def label_point(axes: Axes, text: str, x: float, y: float) -> None:
    """Names a point, on the side on which there is room; see `place_labels`."""
    arrow = {**_LEADER, "color": GREY, "linewidth": 0.4, "shrinkA": 0}
    label = axes.annotate(
        text, (x, y), (0, 0), "data", "offset points", arrow, ha="center", gid=_POINT, bbox=_NO_BOX, **TEXT
    )
    label.set_in_layout(False)


def _labels(axes: Axes, kind: str) -> list[Annotation]:
    return [text for text in axes.texts if isinstance(text, Annotation) and text.get_gid() == kind]


def _target(axes: Axes, label: Annotation) -> tuple[float, float]:
    """Where in pixels the labelled point lies."""
    x, y = label.xy
    if isinstance(label.xycoords, tuple):
        return float(axes.transAxes.transform((x, 0))[0]), float(axes.transData.transform((0, y))[1])
    across, up = axes.transData.transform((x, y))
    return float(across), float(up)


def place_labels(axes: Axes, renderer: RendererAgg) -> None:
    """Places all labels, once it is known where everything else is."""
    _keep_near_ends(axes, renderer)
    _spread_end_labels(axes, renderer)
    _place_point_labels(axes, renderer)


def _keep_near_ends(axes: Axes, renderer: RendererAgg) -> None:
    """Makes point labels of those whose lines end far from the right edge: a leader across looks like data."""
    frame = axes.get_window_extent(renderer)
    for label in _labels(axes, _END):
        if _target(axes, label)[0] < frame.x1 - _FAR * frame.width:
            label.set_gid(_POINT)
            label.set_horizontalalignment("center")
            label.set_anncoords("offset points")
            label.set_bbox(_NO_BOX)


# Of the width of the axes.
_FAR = 0.25


def _spread_end_labels(axes: Axes, renderer: RendererAgg) -> None:
    """Moves the labels at the right edge as little as possible so that none covers another."""
    labels = sorted(_labels(axes, _END), key=lambda label: _target(axes, label)[1])
    if not labels:
        return
    frame = axes.get_window_extent(renderer)
    step = max(Text.get_window_extent(label, renderer).height for label in labels) * 1.05
    # Without the steps between them the heights only have to rise: neighbours in the wrong order share their mean.
    pools: list[list[float]] = []
    for number, label in enumerate(labels):
        pools.append([_target(axes, label)[1] - number * step])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    heights = [float(np.mean(pool)) for pool in pools for _ in pool]
    highest = frame.y1 - (len(labels) - 1) * step
    for number, (label, height) in enumerate(zip(labels, heights, strict=True)):
        fitting = min(max(height, frame.y0), max(highest, frame.y0)) + number * step
        label.set_position((1.04, (fitting - frame.y0) / frame.height))


def _place_point_labels(axes: Axes, renderer: RendererAgg) -> None:
    """Puts each label where it covers least of the lines, the points and the other labels, and near its point."""
    (ink_x, ink_y), frame = _ink(axes).T, axes.get_window_extent(renderer)
    pixels = axes.figure.dpi / 72
    placed: list[Bbox] = []
    for label in _labels(axes, _POINT):
        x, y = _target(axes, label)
        size = Text.get_window_extent(label, renderer)
        choices: list[tuple[float, int, tuple[float, float], Bbox]] = []
        for distance, (right, up) in product(_DISTANCES, _SIDES):
            offset = right * (distance + size.width / 2 / pixels), up * (distance + size.height / 2 / pixels)
            left, bottom = x + offset[0] * pixels - size.width / 2, y + offset[1] * pixels - size.height / 2
            box = Bbox.from_bounds(left, bottom, size.width, size.height)
            inside = (ink_x > box.x0) & (ink_x < box.x1) & (ink_y > box.y0) & (ink_y < box.y1)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            cost = (
                np.count_nonzero(inside) + 100 * sum(box.overlaps(other) for other in placed) + 400 * outside + distance
            )
            choices.append((float(cost), len(choices), offset, box))
        _, _, best, box = min(choices, key=lambda choice: choice[:2])
        label.set_position(best)
        placed.append(box.padded(2 * pixels, 0))  # or two names side by side would read as one


# In points. The far ones are for a long name in a crowd: a thin line leads to its point.
_DISTANCES = (4.0, 8.0, 13.0, 22.0, 34.0)
_SIDES = ((0, 1), (1, 0), (0, -1), (-1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7))


def _ink(axes: Axes) -> np.ndarray[Any, Any]:
    """Pixels along everything drawn, about every fourth of a line and nine of each marker."""
    paths = [line.get_transform().transform(line.get_xydata()) for line in axes.lines]
    for collection in axes.collections:
        if isinstance(collection, LineCollection):
            paths += [collection.get_transform().transform(segment) for segment in collection.get_segments()]
    paths = [path for path in paths if len(path)]
    if not paths:
        return np.empty((0, 2))
    points = np.concatenate(paths)
    found = [(points[:, None] + _MARKER_STEPS).reshape(-1, 2)]
    for path in paths:
        for start, end in pairwise(path):
            found.append(np.linspace(start, end, max(2, int(np.hypot(*(end - start)) / 4))))
    return np.concatenate(found)


_MARKER_STEPS = 4 * np.array([*product((-1, 0, 1), (-1, 0, 1))])
