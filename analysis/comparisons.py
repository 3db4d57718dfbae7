"""Whether cells differ: intervals of a mean, t-tests, equivalence within a margin, the best cell beyond noise."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import special  # scipy.stats takes a second to import, which most reports need not wait for

from analysis.metrics import metric
from harness.results.metrics import Direction

# A row of `select.cells`, or of `select.best_cells`.
Cell = dict[Hashable, Any]

CONFIDENCE = 0.95


def half_interval(sd: float, num: int) -> float:
    """Half the width of the 95 % interval of a mean over `num` runs with sample standard deviation `sd`."""
    return float(special.stdtrit(num - 1, (1 + CONFIDENCE) / 2)) * sd / math.sqrt(num)


def _upper_tail(t: float, degrees: float) -> float:
    """The probability that Student's t is larger."""
    return float(special.stdtr(degrees, -t))


# ---------------------------------------------------------------- equivalence and difference

# How much of a metric's scale a difference may be and still not matter: half a point of accuracy.
MARGIN = 0.005
# Scales other than that from 0 to 1; of an nll in nats the margin is half a percent of the perplexity.
_SCALES = {"bleu": 100.0, "chrf": 100.0, "nist": 10.0}
# Of these the margin is a part of the value that is compared with.
_RELATIVE = ("perplexity", "bits_per_byte", "mse")


def equivalence_margin(name: str, reference: float, fraction: float = MARGIN) -> float:
    """The difference in a score that does not matter, in its stored unit: `fraction` of its scale.

    The scale of shares and correlations is 1, of an nll 1 nat, of BLEU and chrF 100, of NIST 10; of perplexity, bits
    per byte and mse it is the value that is compared with, `reference`.
    """
    kind = name.removeprefix("val_").removeprefix("test_")
    return fraction * (abs(reference) if kind in _RELATIVE else _SCALES.get(kind, 1.0))


def share_of_scale(name: str, value: float) -> float | None:
    """A score as a part of its scale: 0.31 for a BLEU of 31. None where less is better, as of an nll: it has no end."""
    if metric(name).direction is Direction.LOWER:
        return None
    return value / _SCALES.get(name.removeprefix("val_").removeprefix("test_"), 1.0)


def p_value(first: Cell, second: Cell, name: str) -> float | None:
    """A t-test, two-sided, that two cells have the same mean of a metric: paired by seed where seeds match, else Welch.

    None where it does not exist: fewer than two runs in either, or no spread.
    """
    found = _difference(first, second, name)
    if found is None or found.error == 0:  # the test divides by the spread
        return None
    return 2 * _upper_tail(abs(found.mean) / found.error, found.degrees)


def equivalence_p_value(first: Cell, second: Cell, name: str, margin: float) -> float | None:
    """Two one-sided t-tests (Schuirmann 1987, doi 10.1007/BF01068419) that two means differ by `margin` or more.

    The larger of both: below 5 % the 90 % interval of the difference lies inside the margin. None with fewer than two
    runs in either cell: that nothing was found shows nothing.
    """
    found = _difference(first, second, name)
    if found is None:
        return None
    room = margin - abs(found.mean)
    return _upper_tail(room / found.error, found.degrees) if found.error else float(room <= 0)


def non_inferiority_p_value(first: Cell, second: Cell, name: str, margin: float) -> float | None:
    """A one-sided t-test that the mean of the first cell is worse than that of the second by `margin` or more.

    Below 5 % the first is as good or better. None with fewer than two runs in either cell.
    """
    found = _difference(first, second, name)
    if found is None:
        return None
    gain = -found.mean if metric(name).direction is Direction.LOWER else found.mean
    room = margin + gain
    return _upper_tail(room / found.error, found.degrees) if found.error else float(room <= 0)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values after Holm's correction (1979, Scand. J. Statist. 6, 65-70), in their order.

    Whoever calls those below 5 % differences is wrong in any of them with a probability of at most 5 %.

    >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class _Difference:
    """Of the mean of one cell less that of another: the value, its standard error and its degrees of freedom."""

    mean: float
    error: float
    degrees: float


def _difference(first: Cell, second: Cell, name: str) -> _Difference | None:
    if min(cell.get(f"{name}_n", 0) for cell in (first, second)) < 2:
        return None
    pairs = _paired(first, second, name)
    if pairs:
        # Scaled, so that the squares of what is very large or small exist.
        mean, scale = math.fsum(pairs) / len(pairs), max(map(abs, pairs))
        squares = math.fsum(((value - mean) / scale) ** 2 for value in pairs) if scale else 0.0
        if squares > _ROUNDING:  # pairs that all differ by the same say nothing of their noise
            error = scale * math.sqrt(squares / (len(pairs) - 1) / len(pairs))
            return _Difference(mean, error, len(pairs) - 1)
    (mean, sd, num), (other_mean, other_sd, other_num) = (
        (cell[name], cell[f"{name}_sd"], cell[f"{name}_n"]) for cell in (first, second)
    )
    scale = max(sd, other_sd)
    if scale == 0:
        return _Difference(mean - other_mean, 0.0, num + other_num - 2)
    variance, other_variance = (sd / scale) ** 2 / num, (other_sd / scale) ** 2 / other_num
    both = variance + other_variance
    degrees = both**2 / (variance**2 / (num - 1) + other_variance**2 / (other_num - 1))
    return _Difference(mean - other_mean, scale * math.sqrt(both), degrees)


_ROUNDING = 1e-20


def _paired(first: Cell, second: Cell, name: str) -> list[float]:
    """The differences seed by seed where both have the same seeds, of which each gives them the same order and head."""
    if any(first[key] != second[key] for key in ("model", "dataset", "recipe_id")):
        return []
    values, others = (cell["by_seed"].get(name, {}) for cell in (first, second))
    return [values[seed] - others[seed] for seed in values] if values.keys() == others.keys() else []


# ---------------------------------------------------------------- order


def best_beyond_noise(rows: Sequence[Cell], name: str) -> int | None:
    """Index of the best row by a metric, if it differs from every other by `p_value` at 5 %; else None.

    With Holm's correction for the number of rows that can be tested, the runner-up among them: of a row with one run
    nothing is said. A row of which a run collapsed to one class is never the best.
    """
    ranked = ranked_by(rows, name)
    if len(ranked) < 2 or rows[ranked[0]]["num_collapsed"]:
        return None
    found = [p_value(rows[ranked[0]], rows[other], name) for other in ranked[1:]]
    if found[0] is None:
        return None
    corrected = holm([probability for probability in found if probability is not None])
    return ranked[0] if max(corrected) < 1 - CONFIDENCE else None


def ranked_by(rows: Sequence[Cell], name: str) -> list[int]:
    """Indices of the rows that have a metric, the best first; equal ones keep their order."""
    having = [index for index, row in enumerate(rows) if row.get(f"{name}_n", 0)]
    sign = 1 if metric(name).direction is Direction.LOWER else -1
    return sorted(having, key=lambda index: sign * rows[index][name])
