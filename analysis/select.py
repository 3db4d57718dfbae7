"""From runs to cells to what a table shows: means over seeds, their noise, the best learning rate of each condition.

    frame of runs --cells--> a row per cell --best_cells--> a row per condition, at its best learning rate

A cell is a run without its seed; a condition is a cell without its learning rate. Only finished runs give numbers, but
a cell without any is a row all the same. Nothing here ever chooses by a test metric.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.axes import is_axis, own_axes, value_for
from analysis.comparisons import Cell, half_interval, ranked_by
from analysis.load import with_dtypes
from analysis.methods import method_name
from analysis.metrics import BY_MEDIAN, GENERATION_SCORES, LEARNED, NUM_TRIALS, TRAINABLE_SHARE, TUNING_FLOPS, is_score
from analysis.names import with_names
from analysis.recipes import conditions_and_recipes, recipe_differences
from analysis.trials import SEARCH_EDGE, searched_settings
from harness.results.metrics import COLLAPSED_ABOVE, LANGUAGE_TASKS, METRICS
from harness.results.schema import Status

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

# What lies above is no measurement, and its square no number.
LARGEST = 1e150
# In `cells` also when no run has them: what every table of results is expected to say.
ALWAYS = ("num_adapter_params", "peak_memory_bytes", "step_seconds_median", "checkpoint_bytes")
# Columns of `cells` that name a cell and keep their type, as own axes do; the others are numbers.
CELL_COLUMNS = (
    "cell_id",
    "condition_id",
    "recipe_id",
    "model",
    "dataset",
    "method",
    "rank",
    "target_layers",
    "learning_rate",
    "head_rate",
    "best_metric",
    "base_domain",
    "run_ids",
    "searched",
    "search_edge",
    "differs",
    "recipe",
    "by_seed",
    "tried",
    "edge",
    "bounded",
    "is_chosen",
)


def at_last_step(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs with the scores of their last step in place of those of the step that was best on val."""
    changed = frame.copy()
    for name in METRICS:
        if name.endswith("_last"):
            changed[name.removesuffix("_last")] = frame[name]
    return changed


# ---------------------------------------------------------------- cells


def cells(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per cell, in the order in which the cells appear in the frame of runs.

    Columns: what names the cell (`cell_id`, `condition_id`, `recipe_id`, `model`, `dataset`, `method`, `rank`,
    `target_layers`, `learning_rate`, `head_rate` where the head has a rate for itself, `best_metric`, `run_ids` of
    all its runs, and where any run has one the `base_domain`), `model`, `dataset` and `target_layers` as
    `analysis.names` calls them; its value of each own axis of the runs (`analysis.axes`) under the name of the
    setting, as `trainer.num_epochs`; in `searched` its value of each setting but the learning rate that was
    searched, each with its name, and in `search_edge` "low" or "high" where its rate is the first or last that its
    search tried; its runs by status (`num_finished`, `num_diverged`, ...) and how many of the finished ones
    collapsed (`num_collapsed`); in `differs`
    the settings in which its recipe departs from that of most others, and in `recipe` a number for each such way; in
    `by_seed` the scores of its finished runs, by metric and seed. Then, for each metric that any run has, over the
    cell's finished runs: `<metric>` (mean; for the step time the median), `<metric>_sd` (sample standard deviation,
    from two runs on; for the step time `_min` and `_max`), `<metric>_n` (number of runs), and for scores `<metric>_ci`,
    the half width of the 95 % interval of the mean by Student's t. Units are the stored ones; what does not exist is
    None or NaN.
    """
    frame = with_names(frame.reset_index(drop=True))
    # As lists here and below: a look into an array or a frame of so many columns takes longer than all that follows.
    values = {name: column.tolist() for name, column in _measured(frame).items()}
    finished = (frame["status"] == Status.FINISHED.value).to_numpy()
    shares = frame[["val_majority_share", "test_majority_share"]]
    collapsed = (shares > COLLAPSED_ABOVE).any(axis="columns").to_numpy() & finished
    axes = own_axes(frame)
    searched = [name for name in searched_settings(frame) if name != "trainer.learning_rate"]
    differences = recipe_differences(frame, axes=(*axes.settings, *searched), following=axes.following)
    conditions, recipes = conditions_and_recipes(frame, searched=searched)
    statuses, seeds, run_ids = frame["status"].to_numpy(), frame["config.seed"].tolist(), frame["run_id"].tolist()
    methods = frame["config.method.name"].tolist()
    on_axes = {
        setting: [value_for(setting, *run) for run in zip(methods, frame[f"config.{setting}"].tolist(), strict=True)]
        for setting in axes.settings
    }
    values_of_searched = {name: frame[f"config.{name}"].tolist() for name in searched}
    search_edges = frame[SEARCH_EDGE].tolist() if SEARCH_EDGE in frame else [None] * len(frame)
    rows: list[dict[str, Any]] = []
    runs_of_cells = frame.groupby("cell_id", sort=False).indices
    firsts = records(frame.iloc[[index[0] for index in runs_of_cells.values()]])
    for (cell_id, index), first in zip(runs_of_cells.items(), firsts, strict=True):
        runs = np.asarray(index)
        used = runs[finished[runs]].tolist()
        rows.append(
            {
                **_name(first),
                **{setting: values_of_runs[runs[0]] for setting, values_of_runs in on_axes.items()},
                "search_edge": search_edges[runs[0]],
                "searched": tuple(
                    (name, values_of_runs[runs[0]]) for name, values_of_runs in values_of_searched.items()
                ),
                "condition_id": conditions[str(cell_id)],
                "recipe_id": recipes[str(cell_id)],
                "run_ids": tuple(run_ids[run] for run in runs),
                **{num_status(status): int((statuses[runs] == status.value).sum()) for status in Status},
                "num_collapsed": int(collapsed[runs].sum()),
                "differs": differences.get(str(cell_id)),
                **_summaries({name: _by_seed(column, used, seeds) for name, column in values.items()}),
            }
        )
    departures = dict.fromkeys(row["differs"] for row in rows if row["differs"] is not None)
    marks = {differs: number for number, differs in enumerate(departures, start=1)}
    for row in rows:
        row["recipe"] = marks.get(row["differs"])
    # What names a cell stays an object: a rank 8 stays 8 beside a missing one, which stays None.
    table = pd.DataFrame(rows, dtype=object)
    numbers = [column for column in table.columns if not _names_a_cell(column)]
    return with_dtypes(table, {column: pd.to_numeric(table[column]).dtype for column in numbers})


def _names_a_cell(column: str) -> bool:
    return column in CELL_COLUMNS or is_axis(column)


def _measured(frame: pd.DataFrame) -> dict[str, FloatArray]:
    """The values of every metric that any run has, those that are computed from others among them."""
    best_metrics = frame["config.dataset.best_metric"].unique()
    always = {*ALWAYS, *(f"{split}_{name}" for name in best_metrics for split in ("val", "test"))}
    names = [name for name in METRICS if name in always or frame[name].notna().any()]
    values = {name: frame[name].to_numpy(dtype=float) for name in names}
    totals = frame["num_total_params"].where(frame["num_total_params"] > 0)
    shares = (frame["num_trainable_params"] / totals).to_numpy(dtype=float)
    values[TRAINABLE_SHARE] = np.where(np.abs(shares) < LARGEST, shares, math.nan)
    values |= {name: frame[name].to_numpy(dtype=float) for name in (NUM_TRIALS, TUNING_FLOPS) if name in frame}
    learned = frame["test_nll_before"] - frame["test_nll"]
    if learned.notna().any():
        values[LEARNED] = learned.to_numpy(dtype=float)
    return values


def _by_seed(column: Sequence[float], runs: Sequence[int], seeds: Sequence[int]) -> dict[int, float]:
    """A metric of those runs that have it, by their seeds."""
    return {seeds[run]: value for run in runs if not math.isnan(value := column[run])}


def _summaries(by_seed: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """The summaries of all metrics of a cell, and in `by_seed` the values of its scores."""
    row: dict[str, Any] = {"by_seed": {name: values for name, values in by_seed.items() if is_score(name)}}
    for name, values in by_seed.items():
        row |= _summary(name, list(values.values()))
    return row


def records(table: pd.DataFrame) -> list[Cell]:
    """The rows of a table, each a dict: as `to_dict("records")`, which takes ten times as long for so many columns."""
    names = list(table.columns)
    return [dict(zip(names, values, strict=True)) for values in table.astype(object).to_numpy().tolist()]


def num_status(status: Status) -> str:
    """The column of `cells` that counts the runs of a status."""
    return f"num_{status.value}"


def score(cell: pd.Series[Any] | Cell, split: str) -> str:
    """The metric by which the cell's dataset is judged, on a split."""
    return f"{split}_{cell['best_metric']}"


def score_columns(table: pd.DataFrame) -> list[str]:
    """Those metrics of all datasets in a table of cells, val before test."""
    best_metrics = table["best_metric"].unique()
    return [f"{split}_{name}" for name in best_metrics for split in ("val", "test")]


def additional_scores(frame: pd.DataFrame) -> list[str]:
    """On test, what the datasets of language models name beside the metric they are judged by, where any run has it."""
    settings = [f"config.dataset.{name}" for name in ("task", "metrics", "best_metric")]
    if not set(settings) <= set(frame.columns):
        return []
    names: dict[str, None] = {}
    for task, metrics, best_metric in frame[settings].itertuples(index=False):
        if task in LANGUAGE_TASKS and isinstance(metrics, tuple):
            names |= {f"test_{name}": None for name in metrics if name != best_metric}
    return [name for name in names if name in METRICS and frame[name].notna().any()]


def generation_scores(table: pd.DataFrame) -> list[str]:
    """The scores of generated texts that any cell of a table has."""
    names = [f"test_{name}" for name in GENERATION_SCORES]
    return [name for name in names if name in table and table[f"{name}_n"].any()]


def _name(run: Cell) -> dict[str, Any]:
    return {
        "cell_id": run["cell_id"],
        "model": run["model"],
        "dataset": run["dataset"],
        "method": method_name(run),
        "rank": run.get("config.rank.rank"),
        "target_layers": run["target_layers"],
        "learning_rate": run["config.trainer.learning_rate"],
        "head_rate": run.get("config.trainer.learning_rate_head"),
        "best_metric": run["config.dataset.best_metric"],
        **({"base_domain": run["base_domain"]} if "base_domain" in run else {}),
    }


def _summary(name: str, values: Sequence[float]) -> dict[str, float | int | None]:
    num = len(values)
    if name in BY_MEDIAN:
        return {
            name: statistics.median(values) if values else None,
            f"{name}_min": min(values, default=None),
            f"{name}_max": max(values, default=None),
            f"{name}_n": num,
        }
    # Seeds that agree have a deviation of 0 and not of rounding.
    agree = num > 0 and min(values) == max(values)
    center = None if not num else values[0] if agree else math.fsum(values) / num
    sd = None
    if num > 1:
        assert center is not None
        sd = 0.0 if agree else math.sqrt(math.fsum([(value - center) ** 2 for value in values]) / (num - 1))
    row: dict[str, float | int | None] = {name: center, f"{name}_sd": sd, f"{name}_n": num}
    if is_score(name):
        row[f"{name}_ci"] = None if sd is None else half_interval(sd, num)
    return row


# ---------------------------------------------------------------- the best learning rate


def best_cells(table: pd.DataFrame) -> pd.DataFrame:
    """The cells at the best learning rate of their condition, a row per condition, in the order of `cells`.

    Chosen by the mean of the dataset's metric on val, among the rates with the most finished runs (a rate at which
    seeds failed is not chosen for the luck of the others); among equals the lowest rate. Where no rate finished, the
    first stands for all, with the runs of all of them. Added columns: `tried`, all its learning rates in order;
    `is_chosen`, whether there was anything to choose by; `edge`, "low" or "high" when the best of several is the first
    or last of all that were tried, so that a better one may lie outside, else None; `bounded`, a sentence about the
    next rate where it has fewer finished runs and nothing beyond it has as many, as after the last rate that does not
    diverge, else None.
    """
    conditions: defaultdict[str, list[Cell]] = defaultdict(list)
    for cell in records(table):
        conditions[cell["condition_id"]].append(cell)
    chosen = []
    for members in conditions.values():
        candidates = sorted(members, key=lambda cell: cell["learning_rate"])
        tried = tuple(sorted({cell["learning_rate"] for cell in candidates}))
        most = max(cell[num_status(Status.FINISHED)] for cell in candidates)
        complete = [cell for cell in candidates if cell[num_status(Status.FINISHED)] == most]
        ranked = ranked_by(complete, score(candidates[0], "val"))
        best = complete[ranked[0]] if ranked else _together(candidates)
        edge, bounded = _ends(best, candidates, complete) if ranked and len(tried) > 1 else (None, None)
        edge = edge or best["search_edge"]
        chosen.append({**best, "tried": tried, "edge": edge, "bounded": bounded, "is_chosen": bool(ranked)})
    order = {cell_id: position for position, cell_id in enumerate(table["cell_id"])}
    chosen.sort(key=lambda cell: min(order[cell["cell_id"]], len(order)))
    best_table = pd.DataFrame(chosen, columns=[*table.columns, "tried", "edge", "bounded", "is_chosen"], dtype=object)
    dtypes = {column: table[column].dtype for column in table.columns if not _names_a_cell(column)}
    return with_dtypes(best_table, dtypes)


def _ends(best: Cell, candidates: Sequence[Cell], complete: Sequence[Cell]) -> tuple[str | None, str | None]:
    """`edge` and `bounded` of the best of the complete cells, which like all candidates are in order of their rates."""
    rate = best["learning_rate"]
    edges, nexts = [], []
    for side, word, beyond in (
        ("low", "lower", [cell for cell in reversed(candidates) if cell["learning_rate"] < rate]),
        ("high", "higher", [cell for cell in candidates if cell["learning_rate"] > rate]),
    ):
        if not beyond:
            edges.append(side)
        elif not any(cell in complete for cell in beyond):
            nexts.append(f"the next {word} rate tried, {beyond[0]['learning_rate']:g}, {_how_it_ended(beyond[0])}")
    return (edges[0] if edges else None), (" and ".join(nexts) or None)


def _how_it_ended(cell: Cell) -> str:
    """How the runs of a cell ended that did not all finish, as "diverged" or "has 1 finished, 2 diverged"."""
    counts = {status: cell[num_status(status)] for status in Status if cell[num_status(status)]}
    if len(counts) == 1 and Status.FINISHED not in counts:
        return {
            Status.DIVERGED: "diverged",
            Status.OUT_OF_MEMORY: "ran out of memory",
            Status.FAILED: "failed",
        }[next(iter(counts))]
    return f"has {', '.join(f'{count} {status}' for status, count in counts.items())}"


def _together(candidates: Sequence[Cell]) -> Cell:
    """The first of cells without numbers, with the runs of all."""
    counts: Cell = {num_status(status): sum(cell[num_status(status)] for cell in candidates) for status in Status}
    run_ids = tuple(run_id for cell in candidates for run_id in cell["run_ids"])
    return {**candidates[0], **counts, "run_ids": run_ids}
