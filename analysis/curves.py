"""Curves over the steps of training: of the seeds of a cell their mean, and the lowest and highest at every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Curves = Mapping[str, Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class SeedCurve:
    """A metric at the steps that all runs of a cell have.

    Attributes:
        steps: ascending.
        means: over the runs, at each step.
        lows: of the lowest run, at each step.
        highs: of the highest run, at each step.
        num_runs: how many runs are behind it.
    """

    steps: list[float]
    means: list[float]
    lows: list[float]
    highs: list[float]
    num_runs: int


def seed_curve(curves: Curves, run_ids: Iterable[str], name: str) -> SeedCurve:
    """The curve of a metric over those runs; a run that stopped before the others is left out.

    Args:
        curves: the records of a run's `metrics.jsonl`, by run id.
        run_ids: the runs of a cell.
        name: a metric; a step at which any run has no finite value of it is left out.
    """
    rows = [curves[run_id] for run_id in run_ids if curves.get(run_id)]
    last = max((row["step"] for run in rows for row in run), default=0)
    runs = [
        {row["step"]: row[name] for row in run if row.get(name) is not None and math.isfinite(row[name])}
        for run in rows
        if max(row["step"] for row in run) == last
    ]
    steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    values = [[run[step] for run in runs] for step in steps]
    means = [math.fsum(at_step) / len(runs) for at_step in values]
    return SeedCurve(steps, means, [*map(min, values)], [*map(max, values)], len(runs))
