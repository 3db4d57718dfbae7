"""The trials of a search: which stand behind which run, what they cost, and their scores at every value tried.

A trial (`trial=true`) chose on val and is no row of any table; a run that is reported was chosen by the trials that the
launch of its sweep names (`harness.results.launches`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.metrics import NUM_TRIALS, TUNING_FLOPS
from harness.results.launches import Launch, SearchedCell
from harness.results.schema import Status

# Of a run: the settings that were searched for it, a tuple; None where nothing was.
SEARCHED = "searched"
# Of a run: "low" or "high" where its learning rate is the first or last of those that its search tried.
SEARCH_EDGE = "search_edge"


@dataclass(frozen=True)
class Tried:
    """A point of a search.

    Attributes:
        values: of the settings that were searched, in their order.
        score: the mean over seeds of what the dataset is judged by, on val; None where a seed gave none.
        num_runs: trials behind it, one for each seed.
        status: how those ended that did not finish, in words; empty where all finished.
    """

    values: tuple[float, ...]
    score: float | None
    num_runs: int
    status: str


@dataclass(frozen=True)
class Searches:
    """The searches of a sweep.

    Attributes:
        by_run: by the id of a run that is reported, the search that chose its values.
        trials: a row per trial (`Runs.trials`).
    """

    by_run: Mapping[str, SearchedCell]
    trials: pd.DataFrame

    def of(self, run_ids: Sequence[str]) -> tuple[SearchedCell, list[Tried]] | None:
        """The search that chose the first of these runs, and its points in order; None where none did."""
        cell = self.by_run.get(run_ids[0])
        return None if cell is None else (cell, tried_points(cell, self.trials))

    def in_order(self, run_ids: Sequence[str]) -> list[Tried] | None:
        """The points of the search that chose the first of these runs, as they were planned; None where none did."""
        cell = self.by_run.get(run_ids[0])
        return None if cell is None else _points(cell, self.trials)

    def chosen(self, run_ids: Sequence[str]) -> tuple[float, ...] | None:
        """The values that a search chose for the first of these runs."""
        cell = self.by_run.get(run_ids[0])
        return None if cell is None or cell.chosen is None else tuple(cell.chosen)


def searches_of(launches: Sequence[Launch], trials: pd.DataFrame) -> Searches:
    """The searches that a sweep's launches name; of several launches the last one says it."""
    by_run = {run: cell for launch in launches for cell in launch.searched for run in cell.runs or ()}
    return Searches(by_run, trials)


def with_search_costs(frame: pd.DataFrame, trials: pd.DataFrame, launches: Sequence[Launch]) -> pd.DataFrame:
    """The runs with the settings that were searched for them, the number of values tried, and the compute of that.

    The compute is missing where a trial recorded none, as one that diverged. Without a search the frame is as it was.
    """
    found = searches_of(launches, trials).by_run
    if not any(run_id in found for run_id in frame["run_id"]):
        return frame
    flops = dict(zip(trials["run_id"], trials["train_flops"], strict=True))
    cells = dict(zip(trials["run_id"], trials["cell_id"], strict=True))
    columns: dict[str, list[Any]] = {SEARCHED: [], SEARCH_EDGE: [], NUM_TRIALS: [], TUNING_FLOPS: []}
    for run_id in frame["run_id"]:
        cell = found.get(run_id)
        own = [trial for trial in cell.trials if trial in cells] if cell is not None else []
        columns[SEARCHED].append(None if cell is None else tuple(cell.axes))
        columns[SEARCH_EDGE].append(None if cell is None else cell.edges.get("trainer.learning_rate"))
        # A value that was tried with several seeds is one.
        columns[NUM_TRIALS].append(float(len({cells[trial] for trial in own})) if cell is not None else math.nan)
        columns[TUNING_FLOPS].append(math.fsum(flops[trial] for trial in own) if own else math.nan)
    # As objects: a column of texts and None would have NaN in the place of None.
    words = pd.DataFrame({name: columns.pop(name) for name in (SEARCHED, SEARCH_EDGE)}, frame.index, dtype=object)
    return pd.concat([frame, words, pd.DataFrame(columns, index=frame.index)], axis="columns")


def searched_settings(frame: pd.DataFrame) -> tuple[str, ...]:
    """The settings that were searched for any of the runs."""
    named: Iterable[tuple[str, ...] | None] = frame.get(SEARCHED, ())
    return tuple(dict.fromkeys(name for names in named if names is not None for name in names))


def tried_points(cell: SearchedCell, trials: pd.DataFrame) -> list[Tried]:
    """The points of a search in the order of their values.

    Args:
        cell: the search.
        trials: a row per trial (`Runs.trials`).
    """
    return sorted(_points(cell, trials), key=lambda point: point.values)


def _points(cell: SearchedCell, trials: pd.DataFrame) -> list[Tried]:
    """The points of a search in the order of its plan."""
    planned = {run_id: place for place, run_id in enumerate(cell.trials)}
    own = trials[trials["run_id"].isin(planned)].sort_values("run_id", key=lambda run_ids: run_ids.map(planned))
    points = []
    for _, runs in own.groupby("cell_id", sort=False):
        first = runs.iloc[0]
        scores = runs[f"val_{first['config.dataset.best_metric']}"]
        unfinished = runs.loc[runs["status"] != Status.FINISHED.value, "status"]
        points.append(
            Tried(
                tuple(float(first[f"config.{axis}"]) for axis in cell.axes),
                float(scores.mean()) if unfinished.empty and scores.notna().all() else None,
                len(runs),
                " and ".join(dict.fromkeys(status.replace("_", " ") for status in unfinished)),
            )
        )
    return points
