"""The search inside a cell: which values of a setting to try next, from the scores of those that were tried.

Pure functions of finished results: the same trials follow from the same scores, in whatever order and by whatever
process they were computed. Cells know nothing of each other. No run is truncated, and none ends because another leads.

On a log scale (or a linear one) three values are tried, a factor apart. While the best is the first or last of all, the
next one outside is tried. Then the vertex of the parabola through the best and its neighbours, and halfway to the
neighbour on the other side: a curve that is flat below its best and steep above has it on the side that a parabola does
not expect. The second of them is left out where the vertex was better and the cell has had its number of trials. A run
that diverged or ran out of memory counts as the worst of all values. One that has learned nothing is a cliff: where it
lies says nothing of the shape of the top, so that no parabola goes through it, and the search looks away from it first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

LEARNING_RATE = "trainer.learning_rate"
# Positions nearer than this to one that was tried teach nothing that noise does not hide: a factor of 1.25 at 3.
_NEAREST = 0.2

Point = tuple[float, ...]
"""A value of each axis."""


@dataclass(frozen=True, order=True)
class Score:
    """How good a point is on val, more is better: the dataset's metric, and minus the nll where that is equal.

    `has_learned` is False where nearly all predictions are one class, or the loss is above that before training.
    """

    objective: float
    minus_loss: float = -math.inf
    has_learned: bool = field(default=True, compare=False)

    @property
    def height(self) -> float:
        """What a parabola goes through; not finite where none may."""
        return self.objective if self.has_learned else -math.inf


WORST = Score(-math.inf)


@dataclass(frozen=True)
class Axis:
    """A setting that is searched: positions 0, 1, -1, ... are `start`, and values a factor (or a step) apart.

    `lowest` and `highest` are the values that are allowed; `is_whole`: whole numbers alone.
    """

    name: str
    start: float
    factor: float | None = 3.0
    step: float | None = None
    lowest: float = -math.inf
    highest: float = math.inf
    is_whole: bool = False

    def value(self, position: float) -> float:
        """The value at a position: three significant digits are enough for a rate, and name a run shortly.

        >>> [Axis("trainer.learning_rate", 2e-3).value(position) for position in (-1, 0, 0.5, 1)]
        [0.000667, 0.002, 0.00346, 0.006]
        """
        raw = (
            self.start + position * self.step if self.step is not None else self.start * (self.factor or 1) ** position
        )
        raw = min(max(raw, self.lowest), self.highest)
        return float(round(raw)) if self.is_whole else float(f"{raw:.3g}")

    def text(self, value: float) -> str:
        """A value as an override has it."""
        return str(int(value)) if self.is_whole else f"{value:g}"

    @property
    def is_rate(self) -> bool:
        """Whether low values are the safe ones: where all diverge, the search goes down."""
        return self.name.endswith("learning_rate")


@dataclass(frozen=True)
class Budget:
    """`trials`: values tried in every cell, one of them at a vertex at least. `max_trials`: no cell tries more.

    More than `trials` are tried while the best lies at an edge, and on its other side where the first look beside it
    was no better.
    """

    trials: int = 5
    max_trials: int = 6


@dataclass(frozen=True)
class Line:
    """What is known of one axis: the values tried, those to be tried next, and at the end the best.

    `edge` is "low" or "high" when the best is still the first or last of all, else None. `num_rounds` counts the
    batches that the tried and wanted values came in.
    """

    tried: tuple[float, ...]
    wanted: tuple[float, ...]
    best: float | None
    edge: str | None
    num_rounds: int


def search_line(axis: Axis, budget: Budget, score_at: Callable[[float], Score | None]) -> Line:
    """Where the search along one axis stands; `score_at` is the score of a value, None where it is not known yet."""
    scored: dict[float, Score] = {}  # by position
    wanted = _new((-1.0, 0.0, 1.0), scored, axis)
    num_rounds = 0
    looks: tuple[float, ...] = ()  # the first one beside a bracketed best, and the one on its other side
    while wanted and len(scored) < budget.max_trials:
        wanted = wanted[: budget.max_trials - len(scored)]
        num_rounds += 1
        found = {position: score_at(axis.value(position)) for position in wanted}
        unknown = [position for position, score in found.items() if score is None]
        if unknown:
            return Line(
                _values(scored, axis), tuple(axis.value(position) for position in unknown), None, None, num_rounds
            )
        scored |= {position: score for position, score in found.items() if score is not None}
        wanted = _new(_outside(scored, axis), scored, axis)
        if wanted:
            continue
        if len(scored) < budget.trials or _best(scored) not in looks[:1]:
            wanted = _new(looks[1:], scored, axis)
        if not wanted and (not looks or len(scored) < budget.trials):
            looks = _refined(scored)
            wanted = _new(looks[:1], scored, axis)
    best = _best(scored)
    is_known = scored[best] > WORST
    edge = None
    if is_known and (outside := _new(_outside(scored, axis), scored, axis)):
        edge = "low" if outside[0] < best else "high"
    return Line(_values(scored, axis), (), axis.value(best) if is_known else None, edge, num_rounds)


def _values(scored: Mapping[float, Score], axis: Axis) -> tuple[float, ...]:
    return tuple(axis.value(position) for position in scored)


def _best(scored: Mapping[float, Score]) -> float:
    """The position of the best score; of equal ones that nearest to the start, of these the lowest."""
    return max(scored, key=lambda position: (scored[position], -abs(position), -position))


def _new(positions: Sequence[float], scored: Mapping[float, Score], axis: Axis) -> tuple[float, ...]:
    """Those positions whose values were not tried."""
    values = {axis.value(position) for position in scored}
    new: list[float] = []
    for position in positions:
        if axis.value(position) not in values:
            new.append(position)
            values.add(axis.value(position))
    return tuple(new)


def _outside(scored: Mapping[float, Score], axis: Axis) -> tuple[float, ...]:
    """The position beyond the best where that is the first or last of all; none where it is bracketed."""
    best = _best(scored)
    if scored[best] == WORST:  # nothing finished
        return (min(scored) - 1,) if axis.is_rate else ()
    if best == min(scored):
        return (best - 1,)
    return (best + 1,) if best == max(scored) else ()


def _refined(scored: Mapping[float, Score]) -> tuple[float, ...]:
    """New positions beside a bracketed best: the vertex, else halfway to a neighbour; and one on the other side."""
    ordered = sorted(scored)
    best = _best(scored)
    at = ordered.index(best)
    if scored[best] == WORST or not 0 < at < len(ordered) - 1:  # nothing to bracket, or at the end of what is allowed
        return ()
    low, high = ordered[at - 1], ordered[at + 1]
    below, above = (low + best) / 2, (best + high) / 2
    vertex = _vertex({position: scored[position].height for position in (low, best, high)})
    if vertex is None:  # away from the cliff first
        candidates = [below, above] if math.isfinite(scored[low].height) else [above, below]
    elif vertex > best or (vertex == best and scored[high] > scored[low]):
        candidates = [vertex, above, below]
    else:
        candidates = [vertex, below, above]
    new = [position for position in candidates if not _is_near(position, scored)]
    other_side = [position for position in new[1:] if (position > best) != (new[0] > best)]
    return (*new[:1], *other_side[:1])


def _is_near(position: float, scored: Mapping[float, Score]) -> bool:
    return any(abs(position - other) < _NEAREST for other in scored)


def _vertex(heights: Mapping[float, float]) -> float | None:
    """The position of the top of the parabola through three points whose middle one is the highest.

    None where a height is not finite.
    """
    (x1, y1), (x2, y2), (x3, y3) = sorted(heights.items())
    if not all(map(math.isfinite, (y1, y2, y3))):
        return None
    rise, fall = (y2 - y1) / (x2 - x1), (y3 - y2) / (x3 - x2)
    if rise == fall:  # three equal heights
        return x2
    curvature = (fall - rise) / (x3 - x1)
    vertex = (x1 + x2) / 2 - rise / (2 * curvature)
    return min(max(vertex, (x1 + x2) / 2), (x2 + x3) / 2)


@dataclass(frozen=True)
class Search:
    """Where the search of one cell stands.

    `tried` and `wanted` are points; `chosen` is the best once nothing is wanted, None also where nothing finished.
    `edges` names the axes at whose edge it lies, each with the side.
    """

    tried: tuple[Point, ...]
    wanted: tuple[Point, ...]
    chosen: Point | None
    edges: Mapping[str, str]
    num_rounds: int

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to try."""
        return not self.wanted


def search_cell(axes: Sequence[Axis], budget: Budget, score_of: Callable[[Point], Score | None]) -> Search:
    """Where the search of a cell stands; `score_of` is the score of a point, None where it is not known yet.

    Several axes are searched one after the other, each at the best values of the others; then those before the last
    once more, where a later one has moved.
    """
    at = [axis.value(0) for axis in axes]
    tried: dict[Point, None] = {}
    edges: dict[str, str] = {}
    num_rounds = 0
    searched_at: dict[int, tuple[float, ...]] = {}
    for index in [*range(len(axes)), *range(len(axes) - 1)]:
        others = tuple(value for number, value in enumerate(at) if number != index)
        if searched_at.get(index) == others:  # nothing has moved since
            continue
        searched_at[index] = others

        def point(value: float, index: int = index) -> Point:
            return tuple(value if number == index else at[number] for number in range(len(axes)))

        line = search_line(axes[index], budget, lambda value: score_of(point(value)))
        num_rounds += line.num_rounds
        tried |= dict.fromkeys(map(point, line.tried))
        edges.pop(axes[index].name, None)
        if line.wanted:
            return Search(tuple(tried), tuple(map(point, line.wanted)), None, {}, num_rounds)
        if line.best is None:
            return Search(tuple(tried), (), None, {}, num_rounds)
        at[index] = line.best
        if line.edge is not None:
            edges[axes[index].name] = line.edge
    return Search(tuple(tried), (), tuple(at), edges, num_rounds)
