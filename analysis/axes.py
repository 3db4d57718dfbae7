"""What a set of runs varies besides method, rank, placement, model, dataset, learning rate and seed: its own axes.

    frame of runs --own_axes--> settings with a column in `select.cells`, named as in a config: `trainer.num_epochs`

A setting is an own axis where two cells that agree in method, variant, rank, placement, model and dataset, and in the
axes found before it, differ in it. What differs between methods, ranks or datasets alone is a recipe and no axis
(`analysis.recipes`). What differs along with an axis follows from it: epochs that fall as the number of rows grows are
no second axis of the grid.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from analysis.names import placement_keys
from analysis.recipes import is_of_method, is_shared, scientific_settings, setting_values, show_value
from harness.results.methods import METHODS

# Titles of columns. In this order a setting is taken for the axis and those after it for what follows from it.
_NAMES = {
    "dataset.num_train_examples": "rows",
    "model.quantization": "quantization",
    "model.dtype": "dtype",
    "trainer.num_epochs": "epochs",
    "trainer.max_steps": "steps",
    "trainer.optimizer": "optimizer",
    "trainer.batch_size": "batch size",
    "rank.alpha_policy": "alpha policy",
    "rank.alpha": "alpha",
    "rank.alpha_per_rank": "alpha / rank",
    "method.adapter_dropout": "dropout",
    "variant.init": "init",
    "variant.dora": "DoRA",
    "variant.learning_rate_ratio": "rate B / A",
    "trainer.schedule": "schedule",
    "trainer.warmup_fraction": "warm-up",
    "trainer.weight_decay": "weight decay",
    "trainer.learning_rate_A": "rate of A",
    "trainer.learning_rate_B": "rate of B",
    "trainer.learning_rate_head": "rate of head",
    "trainer.learning_rate_base": "rate of base",
    "trainer.max_gradient_norm": "gradient norm",
    "trainer.micro_batch_size": "micro-batch",
    "trainer.gradient_checkpointing": "checkpointing",
    "trainer.compile": "compiled",
    "model.dropout": "base dropout",
    "dataset.max_length": "max length",
    "dataset.num_eval_examples": "eval rows",
}
# What cells agree in besides: named by `analysis.names` and `analysis.methods`, or what they are scored on in addition;
# and settings of no group, which say what a run is for.
_NO_AXES = ("method.name", "variant.name", "rank.rank", "rank.pattern", "evaluate_also")
# Titles that tables have already.
_TAKEN = {"name", "model", "dataset", "method", "rank", "target layers", "learning rate", "seed", "n", "status"}


@dataclass(frozen=True)
class Axis:
    """An own axis.

    Attributes:
        setting: its dotted name in a config, which is also its column in `select.cells`.
        name: the title of its column in tables.
        is_of_method: whether it is a method's own setting, as alpha: other methods are compared with it at every value,
            and not at an equal one that they do not have.
    """

    setting: str
    name: str
    is_of_method: bool


@dataclass(frozen=True)
class OwnAxes:
    """The own axes of a set of runs.

    Attributes:
        settings: of the axes, in the order of their columns.
        following: settings that differ along with those axes, each with a sentence that says its values.
    """

    settings: tuple[str, ...]
    following: Mapping[str, str]


def own_axes(frame: pd.DataFrame) -> OwnAxes:
    """The own axes of runs that have their names (`names.with_names`)."""
    firsts = frame.drop_duplicates("cell_id")
    texts = {
        setting: [_comparable(value) for value in setting_values(firsts, f"config.{setting}")]
        for setting in (column.removeprefix("config.") for column in scientific_settings(frame))
        if is_axis(setting)
        and not any(setting == name or setting.startswith(f"{name}.") for name in _NO_AXES)
        and not is_shared(firsts, f"config.{setting}")
    }
    codes = {setting: _codes(values) for setting, values in texts.items() if len(set(values)) > 1}
    if not codes:
        return OwnAxes((), {})
    agreeing = ("config.method.name", "config.variant.name", "config.rank.rank", "model", "dataset")
    named = (firsts[column].tolist() for column in agreeing if column in firsts)
    groups = _codes(list(zip(placement_keys(firsts), *named, strict=True)))
    candidates = [setting for setting, values in codes.items() if _varies(values, groups)]
    ordered = [setting for setting in _NAMES if setting in candidates]
    # Of others the one with the most values first, which the coarser ones may follow.
    ordered += sorted((name for name in candidates if name not in _NAMES), key=lambda name: -len(set(texts[name])))
    kept: list[str] = []
    within = groups
    for setting in ordered:
        if _varies(codes[setting], within):
            kept.append(setting)
            within = _codes(list(zip(within.tolist(), codes[setting].tolist(), strict=True)))
    names = {axis.setting: axis.name for axis in axes_of(kept)}
    following = {
        setting: _following_note(setting, texts, {name: codes[name] for name in kept}, groups, codes[setting], names)
        for setting in ordered
        if setting not in kept
    }
    return OwnAxes(tuple(kept), following)


def axes_of(columns: Iterable[Hashable]) -> list[Axis]:
    """The own axes among the columns of a table of cells, or the keys of its rows: those with a dot in their names."""
    return list(_axes_named(tuple(columns)))


@lru_cache(maxsize=64)  # thousands of cells have the same columns
def _axes_named(columns: tuple[Hashable, ...]) -> tuple[Axis, ...]:
    settings = [str(column) for column in columns if is_axis(column)]
    names = [_NAMES.get(setting, setting.rpartition(".")[2].replace("_", " ")) for setting in settings]
    counts = Counter(names)
    return tuple(
        Axis(setting, setting if counts[name] > 1 or name in _TAKEN else name, is_of_method(setting))
        for setting, name in zip(settings, names, strict=True)
    )


def is_axis(column: Hashable) -> bool:
    """Whether a column of a table of cells is an own axis."""
    return "." in str(column)


def shared_axes(row: Mapping[Hashable, Any]) -> list[Axis]:
    """The own axes of a cell that are no method's own settings: all methods are compared at equal values of them."""
    return [axis for axis in axes_of(row) if not axis.is_of_method]


def value_for(setting: str, method: str, value: Any) -> Any:
    """A run's value on an own axis: None for a setting of adapters where its method has none, whatever its config says.

    >>> value_for("method.adapter_dropout", "full", 0.0), value_for("method.adapter_dropout", "lora", 0.0)
    (None, 0.0)
    """
    about = METHODS.get(method)
    has_none = about is not None and not about.uses_placement and setting.startswith(("method.adapter_", "variant."))
    return None if has_none else value


def varied(rows: Sequence[Mapping[Hashable, Any]]) -> list[Axis]:
    """The own axes in which any two of the cells differ."""
    return [axis for axis in axes_of(rows[0]) if len({row[axis.setting] for row in rows}) > 1]


def axis_text(value: Any) -> str:
    """A value of an own axis as text; a long one by its beginning and a digest."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        text = " ".join(show_value(value).split())
        digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:6]
        return text if len(text) <= _MAX_LENGTH else f"{text[: _MAX_LENGTH - 8]}… {digest}"
    return f"{int(value):,}" if value == int(value) and abs(value) < 1e15 else f"{value:.12g}"


_MAX_LENGTH = 40


def axis_number(value: Any) -> float | None:
    """What to sort or draw a value of an own axis by, where it is a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def axis_order(value: Any) -> tuple[int, float, str]:
    """Sorts the values of an own axis: what is missing first, then numbers by size, then texts."""
    number = axis_number(value)
    return (0, 0.0, "") if value is None else (1, number, "") if number is not None else (2, 0.0, axis_text(value))


def axes_texts(row: Mapping[Hashable, Any], axes: Sequence[Axis]) -> list[str]:
    """The values of a cell on these axes in words, as "epochs 3"; what its method does not have is left out."""
    return [f"{axis.name} {axis_text(row[axis.setting])}" for axis in axes if row[axis.setting] is not None]


# ---------------------------------------------------------------- which settings vary


def _comparable(text: str) -> str:
    return text.removesuffix(".0")  # 3 epochs and 3.0


def _codes(values: Sequence[Hashable]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A number for each value, the same for equal ones."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def _varies(codes: np.ndarray[Any, Any], within: np.ndarray[Any, Any]) -> bool:
    """Whether any two that are in one group differ."""
    pairs = np.unique(within * (int(codes.max(initial=0)) + 1) + codes)
    return len(pairs) > len(np.unique(within))


def _following_note(
    setting: str,
    texts: Mapping[str, Sequence[str]],
    axes: Mapping[str, np.ndarray[Any, Any]],
    groups: np.ndarray[Any, Any],
    codes: np.ndarray[Any, Any],
    names: Mapping[str, str],
) -> str:
    """Which values a setting has at those of the axis that it follows, or from which axes together it follows."""
    for axis, values in axes.items():
        if not _varies(codes, _codes(list(zip(groups.tolist(), values.tolist(), strict=True)))):
            found: dict[str, dict[str, None]] = {}
            for at, value in zip(texts[axis], texts[setting], strict=True):
                found.setdefault(at, {})[value] = None
            listed = "; ".join(f"{' or '.join(values)} at {at}" for at, values in found.items())
            return f"`{setting}` follows {names[axis]}: {listed}"
    return f"`{setting}` follows {' and '.join(names.values())}"
