"""Which cells may be compared: their conditions and recipes, and the settings in which one departs from the others.

A recipe is what a comparison of methods, ranks and placements must hold fixed: everything but these, their own settings
and the learning rate. A condition is a cell without its learning rate.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from analysis.names import CONTENT, FINGERPRINT, is_source, placement_keys
from harness.results.effects import is_fact_without_effect, is_setting_without_effect
from harness.results.schema import Status


def conditions_and_recipes(
    frame: pd.DataFrame, *, searched: Collection[str] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """By cell, a key of its scientific settings but the learning rate and the seed; and one of its recipe.

    The recipe is what a comparison of methods, ranks and placements must hold fixed: everything but these, their own
    settings, the learning rate, and the settings that were searched for each of them.
    """
    settings = scientific_settings(frame)
    firsts = frame.drop_duplicates("cell_id")
    shown = {column: setting_values(firsts, column).tolist() for column in settings}
    names = [firsts["model"].tolist(), firsts["dataset"].tolist()]
    names_of = {column: column.removeprefix("config.") for column in settings}
    own = {column for column, name in names_of.items() if is_of_method(name) or name in searched}
    fixed = [shown[column] for column in settings if column not in own]
    varied = [shown[column] for column in settings if column in own]
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


def scientific_settings(frame: pd.DataFrame) -> list[str]:
    """The columns of the settings that can change a number, less names, sources, placement, learning rate and seed."""
    return [
        column
        for column in frame.columns
        if column.startswith("config.")
        and not _is_without_effect(column)
        and not is_source(column)
        and not column.startswith("config.target_layers")
        and column not in ("config.model.name", "config.dataset.name", "config.trainer.learning_rate", "config.seed")
    ]


def is_of_method(setting: str) -> bool:
    """Whether a setting, by its name in a config, belongs to a method: another method does not have it."""
    return setting.startswith(_OF_METHOD)


# Only what adapts a frozen base can hold it quantised; only what has an A and a B has rates for them. What a run is
# scored on besides changes nothing that is compared.
_OF_METHOD = (
    "method",
    "variant",
    "rank",
    "model.quantization",
    "trainer.learning_rate_A",
    "trainer.learning_rate_B",
    "trainer.learning_rate_base",
    "evaluate_also",
)


# ---------------------------------------------------------------- departures

# What the rows of a table compare, and what cannot change a number in it. Everything else must agree or is reported.
_COMPARED = {
    "config.model.name",
    "config.dataset.name",
    "config.method.name",
    "config.variant.name",
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
    "config.trainer.": "dataset",  # each task has its own recipe
    "config.variant.": "config.variant.name",
    "config.rank": "config.method.name",
    _ALSO: "dataset",
    "environment.positive_label": "dataset",
    "environment.generation_signatures.": "dataset",
}
# Another value of these is another model, dataset or placement for `analysis.names`, and no other recipe.
_PART_OF_A_NAME = ("config.target_layers", "config.rank.pattern", FINGERPRINT, CONTENT)


def _is_without_effect(column: str) -> bool:
    kind, _, name = column.partition(".")
    return is_setting_without_effect(name) if kind == "config" else is_fact_without_effect(name)


def setting_values(frame: pd.DataFrame, setting: str) -> pd.Series[Any]:
    """A setting's values as text; where it names a file, the content of that file in the runs that recorded it."""
    values, content = frame[setting].map(show_value), _content_of(setting)
    return values if content not in frame else frame[content].where(frame[content].notna(), values)


def is_shared(frame: pd.DataFrame, setting: str) -> bool:
    """Whether all runs plainly have one value of a setting: a quick look that spares that at each value as text."""
    values = frame[setting].tolist()
    kinds = set(map(type, values))
    # Equal is not enough: 1, 1.0 and True are, and lists of them.
    is_plain = len(kinds) == 1 and kinds <= {str, int, float, bool, type(None)}
    return is_plain and values.count(values[0]) == len(values) and _content_of(setting) not in frame


def _content_of(setting: str) -> str:
    """The column with the content of the file that a setting names; "" for another setting."""
    named = _NAMES_A_FILE.fullmatch(setting)
    return "" if named is None else f"{CONTENT}{named[1]}.{_CONTENT_OF.get(named[2], named[2])}"


_NAMES_A_FILE = re.compile(
    r"config\.((?:dataset|evaluate_also\.[^.]+))\.(path|train_file|val_file|test_file|chat_template)"
)
_CONTENT_OF = {"path": "train", "train_file": "train", "val_file": "val", "test_file": "test"}


def recipe_differences(
    frame: pd.DataFrame, *, axes: Sequence[str] = (), following: Collection[str] = ()
) -> dict[str, tuple[str, ...]]:
    """By cell, the settings in which it departs from most runs, as text; cells that depart in none are left out.

    Args:
        frame: a row per run.
        axes: settings that tables have columns for, in which rows may differ.
        following: settings that differ along with those, compared among the runs that agree in them.
    """
    differences: defaultdict[str, list[str]] = defaultdict(list)
    evaluated = _evaluated_also(frame)
    if any(evaluated):
        frame = pd.concat([frame, pd.Series(evaluated, frame.index, object, _ALSO)], axis="columns")
    for setting in frame.columns:
        if not setting.startswith(("config.", "environment.")) or _is_without_effect(setting):
            continue
        name = setting.removeprefix("config.")
        if setting in _COMPARED or name in axes or is_source(setting) or setting.startswith(_PART_OF_A_NAME):
            continue
        if is_shared(frame, setting):
            continue
        runs = frame
        if setting.startswith("environment."):
            # It stands behind measured numbers, so that of a run without any does not matter.
            runs = frame[frame["status"] == Status.FINISHED.value]
        elif setting.startswith(f"{_ALSO}."):
            # That a run has no such set is one difference, and not one for each of the set's settings.
            runs = frame[[setting.split(".")[2] in names for names in evaluated]]
        for values, cell_ids in _within_scopes(runs, setting, axes if name in following else ()):
            if values.nunique() < 2:
                continue
            usual = Counter(values).most_common(1)[0][0]
            for cell_id, own in values.groupby(cell_ids, sort=False):
                if set(own) != {usual}:
                    shown = " and ".join(dict.fromkeys(own))
                    differences[str(cell_id)].append(f"{name}={shown} instead of {usual}")
    return {cell_id: tuple(found) for cell_id, found in differences.items()}


def _evaluated_also(frame: pd.DataFrame) -> list[tuple[str, ...]]:
    """For each run, the names of its additional evaluation datasets, that on which forgetting is measured first."""
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


def _within_scopes(
    runs: pd.DataFrame, setting: str, axes: Sequence[str]
) -> Iterator[tuple[pd.Series[Any], pd.Series[Any]]]:
    """A setting's values as text, and their cells, apart for each group of runs in which it must agree."""
    values = setting_values(runs, setting)
    scope = next((column for prefix, column in _SCOPES.items() if setting.startswith(prefix)), None)
    scopes = [*([scope] if scope in runs else []), *(f"config.{axis}" for axis in axes)]
    if not scopes:
        yield values, runs["cell_id"]
        return
    for index in runs.groupby(scopes, sort=False, dropna=False).indices.values():
        yield values.iloc[index], runs["cell_id"].iloc[index]


@lru_cache(maxsize=8192, typed=True)  # thousands of runs share a handful of values
def show_value(value: Hashable) -> str:
    """A setting as text: words as they are, everything else as JSON."""
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, str) else json.dumps(value)
