"""Best score against the number of trials: what a grid says about a random search, and what a search found.

Lourie, Cho and He 2023 (arXiv 2311.09480): the best of n random trials is below y with probability F(y)^n, so its
median is the quantile of F at 0.5^(1/n), and a band around F that holds everywhere at once gives one around the curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.comparisons import CONFIDENCE


@dataclass(frozen=True)
class TuningCurve:
    """The best score after 1, 2, ... trials, less being worse; None where it has no score yet, or no end is known.

    Attributes:
        median: of the best score.
        low: the lower end of its band.
        high: the upper end.
    """

    median: list[float | None]
    low: list[float | None]
    high: list[float | None]


def tuning_curve(scores: Sequence[float | None]) -> TuningCurve:
    """The curve of a random search of which these are the trials, with a simultaneous 95 % band.

    The band is that of Dvoretzky, Kiefer and Wolfowitz with Massart's constant (1990, Ann. Probab. 18, 1269-1283): the
    distribution lies within sqrt(ln(2 / 0.05) / 2k) of that of k trials.

    Args:
        scores: of each trial, the more the better; None where it gave none, which is worse than any score.
    """
    ordered = [None] * sum(score is None for score in scores) + sorted(score for score in scores if score is not None)
    num = len(ordered)
    width = math.sqrt(math.log(2 / (1 - CONFIDENCE)) / 2 / num)

    def at(quantile: float) -> float | None:
        # The smallest score that at least so many of the trials do not exceed; rounding must not add one.
        place = math.ceil(quantile * num - 1e-9)
        return ordered[place - 1] if 1 <= place <= num else None

    quantiles = [0.5 ** (1 / trials) for trials in range(1, num + 1)]
    return TuningCurve(
        [at(quantile) for quantile in quantiles],
        [at(quantile - width) for quantile in quantiles],
        [at(quantile + width) for quantile in quantiles],
    )


def best_so_far(scores: Sequence[float | None]) -> list[float | None]:
    """The best score after each trial, the more the better.

    >>> best_so_far([None, 0.7, 0.9, 0.8])
    [None, 0.7, 0.9, 0.9]
    """
    found: list[float | None] = []
    for score in scores:
        known = [value for value in (score, *found[-1:]) if value is not None]
        found.append(max(known, default=None))
    return found
