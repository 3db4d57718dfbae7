"""Which rows of test a run has right, from its saved predictions, and whether two conditions differ on those rows.

On the same rows two models differ by much less noise than the size of the split suggests: most rows both have right.
What is found holds for the models that were trained; of other seeds the tables of means speak.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.comparisons import CONFIDENCE
from harness.results.files import PREDICTIONS_DIR

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]

NUM_RESAMPLES = 10_000


class PredictionsError(Exception):
    """A file of predictions that cannot be read."""


@dataclass(frozen=True)
class Answers:
    """What a classifier has right on test.

    Attributes:
        rows: a digest of which rows these are, by source, row there and label, in their order.
        right: by row, whether the class that was predicted is its label.
    """

    rows: str
    right: BoolArray


def read_answers(runs_dir: Path, run_id: str) -> Answers | None:
    """The answers of a run on test; None where it saved none, or is a regression.

    Raises:
        PredictionsError: the file is no table of predictions.
    """
    path = runs_dir / run_id / PREDICTIONS_DIR / "test.parquet"
    if not path.is_file():
        return None
    try:
        table = pd.read_parquet(path, columns=["source", "source_row", "label", "predicted"])
    except (OSError, ValueError) as error:
        raise PredictionsError(f"{path}: {str(error).splitlines()[0]}") from error
    if table.empty or pd.api.types.is_numeric_dtype(table["label"]):
        return None
    names = table[["source", "source_row", "label"]].astype({"source": object, "label": object})
    digest = hashlib.sha256(pd.util.hash_pandas_object(names, index=False).to_numpy().tobytes())
    return Answers(digest.hexdigest(), (table["label"] == table["predicted"]).to_numpy(dtype=bool))


@dataclass(frozen=True)
class PairedRows:
    """Two conditions on the same rows, each trained with the same seeds.

    Attributes:
        difference: of the accuracies, first less second, the mean over seeds.
        interval: of it, at 95 %.
        p_value: that no pair of models differs.
        only_first: by seed, the rows that the first alone has right.
        only_second: likewise.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    only_first: tuple[int, ...]
    only_second: tuple[int, ...]


def paired_rows(first: Sequence[BoolArray], second: Sequence[BoolArray]) -> PairedRows:
    """Compares what two conditions have right, seed by seed in the same order, on the same rows.

    The interval is a percentile bootstrap over rows: a row that is drawn is drawn for both, and for all seeds.
    """
    of_first, of_second = np.stack(first), np.stack(second)
    num_seeds, num_rows = of_first.shape
    # By row the sum over seeds, which has few values: a resample is how often each of them is drawn.
    values, counts = np.unique(of_first.sum(0) - of_second.sum(0), return_counts=True)
    draws = np.random.default_rng(0).multinomial(num_rows, counts / num_rows, size=NUM_RESAMPLES)
    low, high = np.quantile(draws @ values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]) / num_rows / num_seeds
    only_first, only_second = (of_first & ~of_second).sum(1).tolist(), (~of_first & of_second).sum(1).tolist()
    return PairedRows(
        difference=float(counts @ values) / num_rows / num_seeds,
        interval=(float(low), float(high)),
        p_value=mcnemar_p_value(only_first, only_second),
        only_first=tuple(only_first),
        only_second=tuple(only_second),
    )


def mcnemar_p_value(only_first: Sequence[int], only_second: Sequence[int]) -> float:
    """McNemar's exact test, two-sided, that no pair of models differs, of which there is one for each seed.

    The p-values of several seeds depend on each other through the rows. They are combined by twice their mean, which
    holds under any dependence (Vovk and Wang 2020, Biometrika 107, 791-808): for each direction by itself, and the
    smaller of both twice, so that seeds that contradict each other find nothing.

    Args:
        only_first: by seed, the rows that the first alone has right.
        only_second: likewise.
    """
    from scipy import stats  # late, because it takes a second

    discordant = np.add(only_first, only_second)
    sides = [float(stats.binom.cdf(only, discordant, 0.5).mean()) for only in (only_first, only_second)]
    return min(1.0, 2 * min(sides) * (2 if len(only_first) > 1 else 1))
