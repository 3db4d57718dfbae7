"""Which rows are train, val and test: the one place that holds out, takes subsets and limits, for every task.

Rows are chosen by their number in a table, so that what a table is does not matter here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from harness.config.schema import DatasetConfig, is_given
from harness.content.errors import DataError

SPLITS = ("train", "val", "test")

HoldOut = Callable[[np.ndarray, float, str], np.ndarray]
"""From row numbers of the training table, a fraction and the name of a split: which of them that split gets (bool)."""


class Chosen(NamedTuple):
    """The rows of a split: in which of the given tables they are, and their numbers in it, in the split's order."""

    table: str
    rows: np.ndarray


def choose_rows(
    groups: Mapping[str, np.ndarray],
    config: DatasetConfig,
    *,
    hold_out: HoldOut,
    keep_order: bool,
    with_test: bool,
) -> dict[str, Chosen]:
    """Holds out of train what is missing (test first, then val), then takes the subsets.

    Args:
        groups: for each table that there is, a number for each row: rows of one number belong together, and are counted
            as one by `num_eval_examples`.
        config: fractions, seeds and limits.
        hold_out: which training rows a missing split gets.
        keep_order: whether a subset of train is in the order of the table, and not in the order of its drawing.
        with_test: whether test is wanted; else its rows are held out where they must be, and are in no split.

    Raises:
        DataError: fewer rows than `num_train_examples`, or what `hold_out` raises.
    """
    chosen = {name: Chosen(name, np.arange(len(numbers))) for name, numbers in groups.items()}
    for name, fraction in (("test", config.test_fraction), ("val", config.val_fraction)):
        if not is_given(config, name):
            rows = chosen["train"].rows
            is_held_out = hold_out(rows, fraction, name)
            chosen |= {"train": Chosen("train", rows[~is_held_out]), name: Chosen("train", rows[is_held_out])}
    if config.num_train_examples is not None:
        rows = chosen["train"].rows
        if config.num_train_examples > len(rows):
            raise DataError(
                f"dataset.num_train_examples={config.num_train_examples}: {config.name} has {len(rows)} training rows "
                "(validation and test rows taken off); give at most that, or null for all."
            )
        order = np.random.default_rng(config.subset_seed).permutation(len(rows))[: config.num_train_examples]
        chosen["train"] = Chosen("train", rows[np.sort(order) if keep_order else order])
    if config.num_eval_examples is not None:
        for name in [name for name in ("val", "test") if name in chosen]:
            table, rows = chosen[name]
            numbers = pd.factorize(groups[table][rows])[0]
            order = np.random.default_rng(config.subset_seed).permutation(int(numbers.max()) + 1)
            chosen[name] = Chosen(table, rows[np.isin(numbers, order[: config.num_eval_examples])])
    return {name: chosen[name] for name in SPLITS if with_test or name != "test"}


def hold_out_rows(
    labels: np.ndarray, fraction: float, name: str, config: DatasetConfig, *, stratify: bool
) -> np.ndarray:
    """Which rows the split `name` gets, drawn by `split_seed`; with every class in both parts where stratified.

    Raises `DataError` for too few rows.
    """
    num_held_out = max(1, round(len(labels) * fraction))
    candidates, num_classes = np.arange(len(labels)), 1
    if stratify:
        # A class of one row cannot be in both parts; such rows stay in train, and the rest is stratified.
        counts = Counter(labels.tolist())
        candidates = candidates[[counts[label] > 1 for label in labels.tolist()]]
        num_classes = sum(count > 1 for count in counts.values())
    if not num_classes <= num_held_out <= len(candidates) - num_classes:
        over = f" with every one of {num_classes} classes in both parts" if stratify else ""
        raise DataError(
            f"dataset={config.name}: {len(candidates)} rows are too few to hold out a {name} split of {num_held_out}"
            f"{over}; give more rows, another dataset.{name}_fraction (now {fraction}), or dataset.{name}_file."
        )
    _, held_out = train_test_split(
        candidates,
        test_size=num_held_out,
        random_state=config.split_seed,
        shuffle=True,
        stratify=labels[candidates] if stratify else None,
    )
    is_held_out = np.zeros(len(labels), dtype=bool)
    is_held_out[held_out] = True
    return is_held_out


def hold_out_groups(groups: np.ndarray, fraction: float, name: str, config: DatasetConfig) -> np.ndarray:
    """Which rows the split `name` gets, whole groups of them, drawn by `split_seed`.

    Rows of one prompt are a group: its other references in training would give the answer away. Raises `DataError` for
    too few groups.
    """
    numbers = pd.factorize(groups)[0]
    num_groups = int(numbers.max()) + 1
    num_held_out = max(1, round(num_groups * fraction))
    if num_held_out >= num_groups:
        raise DataError(
            f"dataset={config.name}: {num_groups} rows are too few to hold out a {name} split; give more rows, or "
            f"dataset.{name}_file."
        )
    # Another seed for each split: held out one after the other, they would otherwise take the same places.
    generator = np.random.default_rng([config.split_seed, len(name)])
    return np.isin(numbers, generator.permutation(num_groups)[:num_held_out])
