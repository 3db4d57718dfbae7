"""How good the search inside a cell is: its choice against the best of a full grid of the same cell, and its cost.

    python -m harness -m sweeps=search_audit_grid
    python -m harness -m sweeps=search_audit
    python benchmarks/search_against_grid.py search_audit search_audit_grid

Prints a row per cell. Regret: the grid's best score on val less that of the search's choice, both on the seed of the
search, in standard deviations over the seeds of the reported runs. Cost: the search's trials over those of the grid.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.load import load_runs
from analysis.trials import searches_of, tried_points
from harness.results.launches import read_launches
from harness.results.metrics import METRICS, Direction
from harness.results.schema import Status

KEYS = ("model.name", "dataset.name", "method.name", "rank.rank", "target_layers.name")


@dataclass(frozen=True)
class Audited:
    """A cell that was searched and of which there is a full grid; scores are on val, higher is better."""

    name: str
    chosen: float
    score: float
    best_rate: float
    best: float
    deviation: float | None
    num_trials: int
    num_grid: int

    @property
    def regret(self) -> float | None:
        """In standard deviations; negative where the search found a better rate than any of the grid."""
        return None if not self.deviation else (self.best - self.score) / self.deviation


def audit(runs_dir: Path, sweep: str, grid: str) -> Iterator[Audited]:
    """Every cell of a searched sweep of which the other sweep has a grid."""
    runs = load_runs(runs_dir, sweep=sweep)
    grids = dict(list(_grid_trials(runs_dir, grid).groupby("key", sort=False)))
    searches = searches_of(runs.launches, runs.trials)
    # Of the last launch: one before it may have searched otherwise, and reported at other rates.
    is_last = runs.frame["run_id"].isin(runs.launches[-1].run_ids)
    frame = runs.frame[is_last & (runs.frame["status"] == Status.FINISHED.value)]
    for key, rows in frame.groupby([_key(row) for _, row in frame.iterrows()], sort=False):
        found = searches.of([rows["run_id"].iloc[0]])
        if found is None or key not in grids:
            continue
        cell, _ = found
        metric = f"val_{rows['config.dataset.best_metric'].iloc[0]}"
        sign = 1.0 if METRICS[metric].direction is Direction.HIGHER else -1.0
        points = tried_points(cell, runs.trials)
        tried = {point.values[0]: sign * point.score for point in points if point.score is not None}
        assert cell.chosen is not None  # it has runs
        (chosen,) = cell.chosen
        on_grid = grids[key].set_index("rate")["score"] * sign
        yield Audited(
            name=" ".join(str(part) for part in json.loads(str(key)) if part is not None),
            chosen=chosen,
            score=tried[chosen],
            best_rate=float(on_grid.idxmax()),
            best=float(on_grid.max()),
            deviation=float(rows[metric].std()) if len(rows) > 1 else None,
            num_trials=len(points),
            num_grid=len(on_grid),
        )


def _grid_trials(runs_dir: Path, sweep: str) -> pd.DataFrame:
    """Key, rate and score of every trial of a grid; one that did not finish has no score."""
    launched = read_launches(runs_dir, sweep)
    if launched is None:
        raise SystemExit(f"sweep={sweep}: not launched in {runs_dir}")
    found = load_runs(runs_dir).trials
    trials = found[found["run_id"].isin(launched.run_ids)]
    return pd.DataFrame(
        {
            "key": [_key(row) for _, row in trials.iterrows()],
            "rate": trials["config.trainer.learning_rate"].astype(float),
            "score": [
                row[f"val_{row['config.dataset.best_metric']}"] if row["status"] == Status.FINISHED.value else None
                for _, row in trials.iterrows()
            ],
        }
    )


def _key(row: pd.Series[Any]) -> Hashable:
    values = [row.get(f"config.{name}") for name in KEYS]
    return json.dumps([None if pd.isna(value) else value for value in values])


def main() -> None:
    """Prints the table and how many cells are within 0.2 standard deviations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep")
    parser.add_argument("grid")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    options = parser.parse_args()
    found = list(audit(options.runs_dir, options.sweep, options.grid))
    print("| cell | chosen | val | best of grid | val | sd over seeds | regret (sd) | trials / grid |")
    print("|---|---|---|---|---|---|---|---|")
    for one in found:
        deviation = "none" if one.deviation is None else f"{one.deviation:.4f}"
        regret = "none" if one.regret is None else f"{one.regret:+.2f}"
        print(
            f"| {one.name} | {one.chosen:g} | {one.score:.4f} | {one.best_rate:g} | {one.best:.4f} | "
            f"{deviation} | {regret} | {one.num_trials} / {one.num_grid} |"
        )
    good = sum(one.regret is not None and one.regret <= 0.2 for one in found)
    cost = sum(one.num_trials for one in found) / max(1, sum(one.num_grid for one in found))
    print(f"\n{good} of {len(found)} cells within 0.2 sd, {cost:.0%} of the grid's runs")


if __name__ == "__main__":
    main()
