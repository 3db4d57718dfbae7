"""The interquartile mean over runs and datasets, with a stratified bootstrap (Agarwal et al. 2021, arXiv 2108.13264).

A mean over datasets follows its outliers, a median ignores half of the datasets; the mean of the middle half does
neither. The interval says how much other seeds on the same datasets would change it, and nothing of other datasets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.comparisons import CONFIDENCE

NUM_RESAMPLES = 2_000
_TRIMMED = 0.25


@dataclass(frozen=True)
class InterquartileMean:
    """The mean of the middle half of all scores, and its 95 % interval; None with one run on each dataset."""

    mean: float
    interval: tuple[float, float] | None


def interquartile_mean(scores: Sequence[Sequence[float]]) -> InterquartileMean | None:
    """The interquartile mean of normalised scores, with percentiles of resamples of the runs within each dataset.

    Args:
        scores: by dataset, those of its runs.

    Returns:
        None where the datasets have different numbers of runs: those with more would count for more.
    """
    if len(set(map(len, scores))) != 1:
        return None
    from scipy import stats  # late, because it takes a second

    values = np.array(scores)
    num_datasets, num_runs = values.shape
    mean = float(stats.trim_mean(values.ravel(), _TRIMMED))
    if num_runs == 1:
        return InterquartileMean(mean, None)
    drawn = np.random.default_rng(0).integers(num_runs, size=(NUM_RESAMPLES, num_datasets, num_runs))
    resamples = np.take_along_axis(values[None], drawn, axis=2).reshape(NUM_RESAMPLES, -1)
    means = stats.trim_mean(resamples, _TRIMMED, axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return InterquartileMean(mean, (float(low), float(high)))
