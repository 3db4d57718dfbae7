"""From runs to cells to what a table shows: means over seeds, their noise, the best learning rate of each condition.

    frame of runs --cells--> a row per cell --best_cells--> a row per condition, at its best learning rate

A cell is a run without its seed; a condition is a cell without its learning rate. Only finished runs give numbers, but
a cell without any is a row all the same. Nothing here ever chooses by a test metric.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.names import CONTENT, FINGERPRINT, is_source, placement_keys, with_names
from harness.results.effects import is_fact_without_effect, is_setting_without_effect
from harness.results.metrics import METRICS, Direction, Metric
from harness.results.schema import Status

CONFIDENCE = 0.95
COLLAPSED_ABOVE = 0.999
# What lies above is no measurement, and its square no number.
LARGEST = 1e150

# Computed here from others, so not in the registry of what runs record.
TRAINABLE_SHARE = "trainable_share"
LEARNED = "learned_nll"
DERIVED = {
    TRAINABLE_SHARE: Metric("1", Direction.LOWER, "trainable", ".3f", "%", 0.01),
    LEARNED: Metric("nats", Direction.HIGHER, "learned: test nll before \N{MINUS SIGN} after", "+z.4f"),
}

FORGETTING = "forgetting_nll"
# Means over seeds with a spread that counts, as the scores on val and test are.
_QUALITY = {FORGETTING, LEARNED, "base_domain_nll"}

LANGUAGE_TASKS = {"causal_lm", "completion", "chat"}
# Of generated texts: on test, at the step that was best on val, and nowhere else.
GENERATION_SCORES = ("bleu", "chrf", "rouge_l", "nist", "exact_match", "number_match")

# Step times are skewed by whatever else the machine does: a median, and the range instead of a deviation.
BY_MEDIAN = {"step_seconds_median"}
# A property of the machine as much as of the method.
BY_DEVICE = {"step_seconds_median", "train_tokens_per_second"}

# In `cells` also when no run has them: what every table of results is expected to say.
ALWAYS = ("num_adapter_params", "peak_memory_bytes", "step_seconds_median", "checkpoint_bytes")

# Columns of `cells` that name a cell and keep their type; the others are numbers.
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
    "best_metric",
    "base_domain",
    "run_ids",
    "differs",
    "recipe",
    "by_seed",
    "tried",
    "edge",
    "bounded",
    "is_chosen",
)


def metric(name: str) -> Metric:
    """What a measured or derived number means."""
    return DERIVED[name] if name in DERIVED else METRICS[name]


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
    `target_layers`, `learning_rate`, `best_metric`, `run_ids` of all its runs, and where any run has one the
    `base_domain`), `model`, `dataset` and `target_layers` as `analysis.names` calls them; its runs by status
    (`num_finished`, `num_diverged`, ...) and how many of the finished ones collapsed (`num_collapsed`); in `differs`
    the settings in which its recipe departs from that of most others, and in `recipe` a number for each such way; in
    `by_seed` the scores of its finished runs, by metric and seed. Then, for each metric that any run has, over the
    cell's finished runs: `<metric>` (mean; for the step time the median), `<metric>_sd` (sample standard deviation,
    from two runs on; for the step time `_min` and `_max`), `<metric>_n` (number of runs), and for scores `<metric>_ci`,
    the half width of the 95 % interval of the mean by Student's t. Units are the stored ones; what does not exist is
    None or NaN.
    """
    frame = with_names(frame.reset_index(drop=True))
    best_metrics = frame["config.dataset.best_metric"].unique()
    always = {*ALWAYS, *(f"{split}_{name}" for name in best_metrics for split in ("val", "test"))}
    names = [name for name in METRICS if name in always or frame[name].notna().any()]
    values = {name: frame[name].to_numpy(dtype=float) for name in names}
    totals = frame["num_total_params"].where(frame["num_total_params"] > 0)
    shares = (frame["num_trainable_params"] / totals).to_numpy(dtype=float)
    values[TRAINABLE_SHARE] = np.where(np.abs(shares) < LARGEST, shares, math.nan)
    learned = frame["test_nll_before"] - frame["test_nll"]
    if learned.notna().any():
        values[LEARNED] = learned.to_numpy(dtype=float)
    finished = (frame["status"] == Status.FINISHED.value).to_numpy()
    collapsed = (frame[["val_majority_share", "test_majority_share"]] > COLLAPSED_ABOVE).any(axis="columns").to_numpy()
    differences = _recipe_differences(frame)
    conditions, recipes = _conditions(frame)
    statuses = frame["status"].to_numpy()
    seeds = frame["config.seed"].tolist()
    rows = []
    for cell_id, index in frame.groupby("cell_id", sort=False).indices.items():
        row = _name(frame.iloc[index[0]])
        row |= {"condition_id": conditions[str(cell_id)], "recipe_id": recipes[str(cell_id)]}
        row |= {"run_ids": tuple(frame["run_id"].iloc[index])}
        row |= {num_status(status): int((statuses[index] == status.value).sum()) for status in Status}
        row |= {
            "num_collapsed": int((finished & collapsed)[index].sum()),
            "differs": differences.get(str(cell_id)),
        }
        used = np.asarray(index)[finished[index]]
        row["by_seed"] = {}
        for name, column in values.items():
            measured = zip(used.tolist(), column[used].tolist(), strict=True)
            of_seed = {seeds[run]: value for run, value in measured if not math.isnan(value)}
            row |= _summary(name, list(of_seed.values()))
            if is_score(name):
                row["by_seed"][name] = of_seed
        rows.append(row)
    departures = dict.fromkeys(row["differs"] for row in rows if row["differs"] is not None)
    marks = {differs: number for number, differs in enumerate(departures, start=1)}
    for row in rows:
        row["recipe"] = marks.get(row["differs"])
    # What names a cell stays an object: a rank 8 stays 8 beside a missing one, which stays None.
    table = pd.DataFrame(rows, dtype=object)
    numbers = [column for column in table.columns if column not in CELL_COLUMNS]
    return table.astype({column: pd.to_numeric(table[column]).dtype for column in numbers})


def records(table: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """The rows of a table, each a dict: as `to_dict("records")`, which takes ten times as long for so many columns."""
    names = list(table.columns)
    return [dict(zip(names, values, strict=True)) for values in table.astype(object).to_numpy().tolist()]


def num_status(status: Status) -> str:
    """The column of `cells` that counts the runs of a status."""
    return f"num_{status.value}"


def score(cell: pd.Series[Any] | dict[Hashable, Any], split: str) -> str:
    """The metric by which the cell's dataset is judged, on a split."""
    return f"{split}_{cell['best_metric']}"


def score_columns(table: pd.DataFrame) -> list[str]:
    """Those metrics of all datasets in a table of cells, val before test."""
    best_metrics = table["best_metric"].unique()
    return [f"{split}_{name}" for name in best_metrics for split in ("val", "test")]


def further_scores(frame: pd.DataFrame) -> list[str]:
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


def _name(run: pd.Series[Any]) -> dict[str, Any]:
    return {
        "cell_id": run["cell_id"],
        "model": run["model"],
        "dataset": run["dataset"],
        "method": run["config.method.name"],
        "rank": run.get("config.rank.rank"),
        "target_layers": run["target_layers"],
        "learning_rate": run["config.trainer.learning_rate"],
        "best_metric": run["config.dataset.best_metric"],
        **({"base_domain": run["base_domain"]} if "base_domain" in run else {}),
    }


def _summary(name: str, values: Sequence[float]) -> dict[str, float | int | None]:
    num = len(values)
    # Seeds that agree have a deviation of 0 and not of rounding.
    agree = num > 0 and min(values) == max(values)
    if name in BY_MEDIAN:
        center = statistics.median(values) if values else None
        return {
            name: center,
            f"{name}_min": min(values, default=None),
            f"{name}_max": max(values, default=None),
            f"{name}_n": num,
        }
    center = None if not num else values[0] if agree else math.fsum(values) / num
    sd = None
    if num > 1:
        assert center is not None
        sd = 0.0 if agree else math.sqrt(math.fsum((value - center) ** 2 for value in values) / (num - 1))
    row: dict[str, float | int | None] = {name: center, f"{name}_sd": sd, f"{name}_n": num}
    if is_score(name):
        row[f"{name}_ci"] = None if sd is None else half_interval(sd, num)
    return row


def is_score(name: str) -> bool:
    """Whether a metric is one of quality: a score on val or test, or what was learned and forgotten."""
    return name.startswith(("val_", "test_")) or name in _QUALITY


# ---------------------------------------------------------------- noise


def half_interval(sd: float, num: int) -> float:
    """Half the width of the 95 % interval of a mean over `num` runs with sample standard deviation `sd`."""
    return _t_quantile(num - 1) * sd / math.sqrt(num)


_T_QUANTILES: dict[int, float] = {}


def _t_quantile(degrees: int) -> float:
    if degrees not in _T_QUANTILES:  # scipy takes 0.1 ms for each
        _T_QUANTILES[degrees] = float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees))
    return _T_QUANTILES[degrees]


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


def p_value(first: dict[Hashable, Any], second: dict[Hashable, Any], name: str) -> float | None:
    """A t-test, two-sided, that two cells have the same mean of a metric: paired by seed where seeds match, else Welch.

    None where it does not exist: fewer than two runs in either, or no spread.
    """
    found = _difference(first, second, name)
    if found is None or found.error == 0:  # the test divides by the spread
        return None
    return float(2 * stats.t.sf(abs(found.mean) / found.error, found.degrees))


def is_equivalent(first: dict[Hashable, Any], second: dict[Hashable, Any], name: str, margin: float) -> bool:
    """Whether the means of a metric are shown to differ by less than `margin`, in its stored unit.

    Two one-sided t-tests at 5 % (Schuirmann 1987, doi 10.1007/BF01068419): the 90 % interval of the difference lies
    inside the margin. Never with fewer than two runs in either cell: that nothing was found shows nothing.
    """
    found = _difference(first, second, name)
    if found is None:
        return False
    half = found.error * float(stats.t.ppf(CONFIDENCE, found.degrees)) if found.error else 0.0
    return -margin < found.mean - half and found.mean + half < margin


@dataclass(frozen=True)
class _Difference:
    """Of the mean of one cell less that of another: the value, its standard error and its degrees of freedom."""

    mean: float
    error: float
    degrees: float


def _difference(first: dict[Hashable, Any], second: dict[Hashable, Any], name: str) -> _Difference | None:
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


def _paired(first: dict[Hashable, Any], second: dict[Hashable, Any], name: str) -> list[float]:
    """The differences seed by seed where both have the same seeds, of which each gives them the same order and head."""
    if any(first[key] != second[key] for key in ("model", "dataset", "recipe_id")):
        return []
    values, others = (cell["by_seed"].get(name, {}) for cell in (first, second))
    return [values[seed] - others[seed] for seed in values] if values.keys() == others.keys() else []


def is_better(name: str, value: float, other: float) -> bool:
    """Whether a value of a metric is better than another."""
    return value < other if metric(name).direction is Direction.LOWER else value > other


def best_beyond_noise(rows: Sequence[dict[Hashable, Any]], name: str) -> int | None:
    """Index of the best row by a metric, if it differs from the runner-up by `p_value` at 5 %; else None.

    A row of which a run collapsed to one class is never it.
    """
    ranked = ranked_by(rows, name)
    if len(ranked) < 2 or rows[ranked[0]]["num_collapsed"]:
        return None
    probability = p_value(rows[ranked[0]], rows[ranked[1]], name)
    return ranked[0] if probability is not None and probability < 1 - CONFIDENCE else None


def ranked_by(rows: Sequence[dict[Hashable, Any]], name: str) -> list[int]:
    """Indices of the rows that have a metric, the best first; equal ones keep their order."""
    having = [index for index, row in enumerate(rows) if row.get(f"{name}_n", 0)]
    sign = 1 if metric(name).direction is Direction.LOWER else -1
    return sorted(having, key=lambda index: sign * rows[index][name])


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
    conditions: defaultdict[str, list[dict[Hashable, Any]]] = defaultdict(list)
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
        chosen.append({**best, "tried": tried, "edge": edge, "bounded": bounded, "is_chosen": bool(ranked)})
    order = {cell_id: position for position, cell_id in enumerate(table["cell_id"])}
    chosen.sort(key=lambda cell: min(order[cell["cell_id"]], len(order)))
    best_table = pd.DataFrame(chosen, columns=[*table.columns, "tried", "edge", "bounded", "is_chosen"], dtype=object)
    return best_table.astype({column: table[column].dtype for column in table.columns if column not in CELL_COLUMNS})


def _ends(
    best: dict[Hashable, Any], candidates: Sequence[dict[Hashable, Any]], complete: Sequence[dict[Hashable, Any]]
) -> tuple[str | None, str | None]:
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


def _how_it_ended(cell: dict[Hashable, Any]) -> str:
    """How the runs of a cell ended that did not all finish, as "diverged" or "has 1 finished, 2 diverged"."""
    counts = {status: cell[num_status(status)] for status in Status if cell[num_status(status)]}
    if len(counts) == 1 and Status.FINISHED not in counts:
        return {
            Status.DIVERGED: "diverged",
            Status.OUT_OF_MEMORY: "ran out of memory",
            Status.FAILED: "failed",
        }[next(iter(counts))]
    return f"has {', '.join(f'{count} {status}' for status, count in counts.items())}"


def _together(candidates: Sequence[dict[Hashable, Any]]) -> dict[Hashable, Any]:
    """The first of cells without numbers, with the runs of all."""
    counts: dict[Hashable, Any] = {
        num_status(status): sum(cell[num_status(status)] for cell in candidates) for status in Status
    }
    run_ids = tuple(run_id for cell in candidates for run_id in cell["run_ids"])
    return {**candidates[0], **counts, "run_ids": run_ids}


def _conditions(frame: pd.DataFrame) -> tuple[dict[str, str], dict[str, str]]:
    """By cell, a key of its scientific settings but the learning rate and the seed; and one of its recipe.

    The recipe is what a comparison of methods, ranks and placements must hold fixed: everything but these, their own
    settings and the learning rate.
    """
    settings = [
        column
        for column in frame.columns
        if column.startswith("config.")
        and not _is_without_effect(column)
        and not is_source(column)
        and not column.startswith("config.target_layers")
        and column not in ("config.model.name", "config.dataset.name", "config.trainer.learning_rate", "config.seed")
    ]
    firsts = frame.drop_duplicates("cell_id")
    shown = {column: _values(firsts, column).tolist() for column in settings}
    names = [firsts["model"].tolist(), firsts["dataset"].tolist()]
    fixed = [shown[column] for column in settings if not column.startswith(_OF_METHOD)]
    varied = [shown[column] for column in settings if column.startswith(_OF_METHOD)]
    if "config.target_layers.name" in frame:
        varied.append(firsts["config.target_layers.name"].tolist())
    recipes: dict[tuple[Any, ...], str] = {}
    conditions: dict[tuple[Any, ...], str] = {}
    rates: set[tuple[str, Any]] = set()
    found: tuple[dict[str, str], dict[str, str]] = {}, {}
    for cell_id, rate, placement, *key in zip(
        firsts["cell_id"],
        firsts["config.trainer.learning_rate"],
        placement_keys(firsts),
        *names,
        *fixed,
        *varied,
        strict=True,
    ):
        condition = conditions.setdefault((placement, *key), f"condition-{len(conditions)}")
        while (condition, rate) in rates:  # one and the same under two ids: each stays a row
            condition += "+"
        rates.add((condition, rate))
        found[0][str(cell_id)] = condition
        found[1][str(cell_id)] = recipes.setdefault(tuple(key[: len(names) + len(fixed)]), f"recipe-{len(recipes)}")
    return found


# Settings of a method, which another method does not have: only what adapts a frozen base can hold it quantised. What a
# run is scored on besides changes nothing that is compared.
_OF_METHOD = ("config.method", "config.rank", "config.model.quantization", "config.evaluate_also")


# ---------------------------------------------------------------- recipes

# What the rows of a table compare, and what cannot change a number in it. Everything else must agree or is reported.
_COMPARED = {
    "config.model.name",
    "config.dataset.name",
    "config.method.name",
    "config.rank.rank",
    "config.trainer.learning_rate",
    "config.seed",
}
_ALSO = "config.evaluate_also"

# Settings that may differ between rows because these columns do: compared only among rows that agree in them.
_SCOPES = {
    "config.model.": "model",
    "config.dataset.": "dataset",
    "config.method.": "config.method.name",
    "config.trainer.": "dataset",  # tasks have recipes of their own
    "config.rank": "config.method.name",
    _ALSO: "dataset",
    "environment.positive_label": "dataset",
    "environment.generation_signatures.": "dataset",
}
# What `analysis.names` tells apart by name: other values are another model, dataset or placement, and no other recipe.
_TOLD_BY_NAME = ("config.target_layers", FINGERPRINT, CONTENT)


def _is_without_effect(column: str) -> bool:
    kind, _, name = column.partition(".")
    return is_setting_without_effect(name) if kind == "config" else is_fact_without_effect(name)


def _values(frame: pd.DataFrame, setting: str) -> pd.Series[Any]:
    """A setting's values as text; where it names a file, the content of that file in the runs that recorded it."""
    values = frame[setting].map(show_value)
    named = _NAMES_A_FILE.fullmatch(setting)
    content = "" if named is None else f"{CONTENT}{named[1]}.{_CONTENT_OF.get(named[2], named[2])}"
    return values if content not in frame else frame[content].where(frame[content].notna(), values)


_NAMES_A_FILE = re.compile(
    r"config\.((?:dataset|evaluate_also\.[^.]+))\.(path|train_file|val_file|test_file|chat_template)"
)
_CONTENT_OF = {"path": "train", "train_file": "train", "val_file": "val", "test_file": "test"}


def _recipe_differences(frame: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """By cell, the settings in which it departs from most runs, as text; cells that depart in none are left out."""
    differences: defaultdict[str, list[str]] = defaultdict(list)
    evaluated = _evaluated_also(frame)
    if any(evaluated):
        frame = pd.concat([frame, pd.Series(evaluated, frame.index, object, _ALSO)], axis="columns")
    for setting in frame.columns:
        if not setting.startswith(("config.", "environment.")) or _is_without_effect(setting):
            continue
        if setting in _COMPARED or is_source(setting) or setting.startswith(_TOLD_BY_NAME):
            continue
        runs = frame
        if setting.startswith("environment."):
            # It stands behind measured numbers, so that of a run without any does not matter.
            runs = frame[frame["status"] == Status.FINISHED.value]
        elif setting.startswith(f"{_ALSO}."):
            # That a run has no such set is one difference, and not one for each of the set's settings.
            runs = frame[[setting.split(".")[2] in names for names in evaluated]]
        for values, cell_ids in _within_scopes(runs, setting):
            if values.nunique() < 2:
                continue
            usual = Counter(values).most_common(1)[0][0]
            for cell_id, own in values.groupby(cell_ids, sort=False):
                if set(own) != {usual}:
                    shown = " and ".join(dict.fromkeys(own))
                    differences[str(cell_id)].append(f"{setting.removeprefix('config.')}={shown} instead of {usual}")
    return {cell_id: tuple(found) for cell_id, found in differences.items()}


def _evaluated_also(frame: pd.DataFrame) -> list[tuple[str, ...]]:
    """For each run, the names of the further sets that it is scored on, that on which forgetting is measured first."""
    settings: defaultdict[str, list[str]] = defaultdict(list)
    for setting in frame.columns:
        if setting.startswith(f"{_ALSO}."):
            settings[setting.split(".")[2]].append(setting)
    if not settings:
        return [()] * len(frame)
    has_set = {name: frame[columns].notna().any(axis="columns").to_numpy() for name, columns in settings.items()}
    return [
        tuple(sorted((name for name in has_set if has_set[name][run]), key=lambda name: name != base_domain))
        for run, base_domain in enumerate(frame["base_domain"])
    ]


def _within_scopes(runs: pd.DataFrame, setting: str) -> Iterator[tuple[pd.Series[Any], pd.Series[Any]]]:
    """A setting's values as text, and their cells, apart for each group of runs in which it must agree."""
    values = _values(runs, setting)
    scope = next((column for prefix, column in _SCOPES.items() if setting.startswith(prefix)), None)
    if scope not in runs:
        yield values, runs["cell_id"]
        return
    for index in runs.groupby(scope, sort=False, dropna=False).indices.values():
        yield values.iloc[index], runs["cell_id"].iloc[index]


@lru_cache(maxsize=8192, typed=True)  # thousands of runs share a handful of values
def show_value(value: Hashable) -> str:
    """A setting as text: words as they are, everything else as JSON."""
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, str) else json.dumps(value)
