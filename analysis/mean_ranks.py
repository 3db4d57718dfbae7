"""Methods over several datasets: mean ranks, whether they differ at all, and which pairs do.

Demsar 2006 (JMLR 7, 1-30) with the pairs of Benavoli, Corani and Mangili 2016 (JMLR 17, 1-10): Friedman's test over
all methods, then Wilcoxon's signed-rank test of each pair over the datasets, with Holm's correction for the number of
pairs.
Beside them the interquartile mean, which keeps how far apart the scores are.
Below five datasets there is no statement: mean ranks over three datasets show nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from analysis.axes import axes_of
from analysis.comparisons import CONFIDENCE, Cell, holm, share_of_scale
from analysis.interquartile import InterquartileMean, interquartile_mean
from analysis.metrics import metric
from analysis.select import score
from harness.results.metrics import Direction

MIN_DATASETS = 5

# What was run on each dataset, by its name.
Line = dict[str, Cell]


@dataclass(frozen=True)
class MeanRanks:
    """The methods of one model that have a score on each of at least five datasets.

    Attributes:
        model: its name.
        datasets: their names.
        lines: of each method its cells, the best mean rank first.
        ranks: mean over the datasets of its rank by the test score, 1 the best, equal scores sharing theirs.
        interquartile: by method, the interquartile mean of its scores on test as parts of their scales; None where a
            score has no scale, or the datasets have different numbers of runs.
        friedman: p of Friedman's test that no method differs from another; None for two methods.
        pairs: by positions of two methods, p of Wilcoxon's test after Holm's correction over all pairs.
    """

    model: str
    datasets: tuple[str, ...]
    lines: list[Line]
    ranks: list[float]
    interquartile: list[InterquartileMean | None]
    friedman: float | None
    pairs: Mapping[tuple[int, int], float]

    def groups(self) -> list[tuple[int, int]]:
        """First and last position of the longest stretches in which no pair differs at 5 %, those of one left out.

        As Benavoli et al.: only pairs count, and only after Friedman's test has found a difference.
        """
        last = len(self.lines) - 1
        if self.friedman is not None and self.friedman >= 1 - CONFIDENCE:
            return [(0, last)]
        ends = [max(end for end in range(start, last + 1) if self._is_alike(start, end)) for start in range(last + 1)]
        found = [(start, end) for start, end in enumerate(ends) if end > start]
        return [one for one in found if not any(other[0] < one[0] and other[1] >= one[1] for other in found)]

    def _is_alike(self, start: int, end: int) -> bool:
        return all(self.pairs[pair] >= 1 - CONFIDENCE for pair in combinations(range(start, end + 1), 2))


def lines_of(cells: Sequence[Cell]) -> list[Line]:
    """The cells of one model, method, rank, placement, own axes and recipe; of several on one dataset the first."""
    lines: dict[tuple[Any, ...], Line] = {}
    for row in cells:
        axes = tuple(row[axis.setting] for axis in axes_of(row))
        key = (row["model"], row["method"], row["rank"], row["target_layers"], *axes, row["differs"])
        lines.setdefault(key, {}).setdefault(row["dataset"], row)
    return list(lines.values())


def mean_ranks(cells: Sequence[Cell]) -> list[MeanRanks]:
    """The mean ranks of each model that allows them: two methods or more with scores on five datasets or more."""
    found = []
    for model in dict.fromkeys(row["model"] for row in cells):
        lines = lines_of([row for row in cells if row["model"] == model])
        # The datasets on which the most methods can be ranked, and of these the most.
        kinds = {_scored(line) for line in lines if len(_scored(line)) >= MIN_DATASETS}
        datasets = max(
            kinds, key=lambda kind: (len(_having(lines, kind)), len(kind), sorted(kind)), default=frozenset()
        )
        complete = _having(lines, datasets)
        if len(datasets) >= MIN_DATASETS and len(complete) > 1:
            ordered = [dataset for dataset in dict.fromkeys(row["dataset"] for row in cells) if dataset in datasets]
            found.append(_mean_ranks(model, tuple(ordered), complete))
    return found


def _scored(line: Line) -> frozenset[str]:
    return frozenset(dataset for dataset, row in line.items() if row.get(f"{score(row, 'test')}_n", 0))


def _having(lines: Sequence[Line], datasets: frozenset[str]) -> list[Line]:
    return [line for line in lines if datasets <= _scored(line)]


def _value(row: Cell) -> float:
    """The test score of a cell, the more the better."""
    name = score(row, "test")
    return -float(row[name]) if metric(name).direction is Direction.LOWER else float(row[name])


def _interquartile(line: Line, datasets: Sequence[str]) -> InterquartileMean | None:
    shares: list[list[float]] = []
    for row in (line[dataset] for dataset in datasets):
        name = score(row, "test")
        found = [share_of_scale(name, value) for value in row["by_seed"][name].values()]
        shares.append([share for share in found if share is not None])
    return interquartile_mean(shares) if all(shares) else None


def _mean_ranks(model: str, datasets: tuple[str, ...], lines: Sequence[Line]) -> MeanRanks:
    from scipy import stats  # late, because it takes a second

    values = [[_value(line[dataset]) for dataset in datasets] for line in lines]
    by_dataset = [stats.rankdata([-row[place] for row in values]) for place in range(len(datasets))]
    means = [float(sum(ranks[index] for ranks in by_dataset)) / len(datasets) for index in range(len(lines))]
    order = sorted(range(len(lines)), key=means.__getitem__)
    ordered = [values[index] for index in order]
    pairs = list(combinations(range(len(lines)), 2))
    return MeanRanks(
        model=model,
        datasets=datasets,
        lines=[lines[index] for index in order],
        ranks=[means[index] for index in order],
        interquartile=[_interquartile(lines[index], datasets) for index in order],
        friedman=_friedman(ordered) if len(lines) > 2 else None,
        pairs=dict(zip(pairs, holm([_wilcoxon(ordered[one], ordered[other]) for one, other in pairs]), strict=True)),
    )


def _friedman(values: Sequence[Sequence[float]]) -> float:
    if all(row == values[0] for row in values):
        return 1.0  # the statistic divides by the spread of the ranks
    from scipy import stats

    return float(stats.friedmanchisquare(*values).pvalue)


def _wilcoxon(first: Sequence[float], second: Sequence[float]) -> float:
    differences = [one - other for one, other in zip(first, second, strict=True)]
    if not any(differences):
        return 1.0
    from scipy import stats

    return float(stats.wilcoxon(differences).pvalue)
