"""Which rows of a table may be compared with each other, which is best, and with what full fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from analysis.comparisons import Cell, best_beyond_noise
from analysis.methods import is_full
from analysis.metrics import BY_DEVICE
from analysis.select import LARGEST, num_status
from harness.results.schema import Status


def comparison_of(row: Cell) -> tuple[str, str, str]:
    """What rows must share to be compared as methods, ranks or placements: model, dataset and recipe."""
    return row["model"], row["dataset"], row["recipe_id"]


def full_of(rows: Sequence[Cell]) -> dict[tuple[str, str, str], Cell]:
    """The finished full fine-tuning to compare with, by `comparison_of`; of several the one that departs in nothing."""
    found: dict[tuple[str, str, str], Cell] = {}
    for row in sorted(filter(is_full, rows), key=lambda row: row["recipe"] is not None):
        if row[num_status(Status.FINISHED)]:
            found.setdefault(comparison_of(row), row)
    return found


def by_dataset(rows: Iterable[Cell]) -> list[list[Cell]]:
    """The rows of each model and dataset."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["dataset"]), []).append(row)
    return list(groups.values())


def by_dataset_and_method(rows: Iterable[Cell]) -> list[list[Cell]]:
    """The rows of each model, dataset and method: ranks and placements of different methods are no one axis."""
    return [
        [row for row in group if row["method"] == method]
        for group in by_dataset(rows)
        for method in dict.fromkeys(row["method"] for row in group)
    ]


def groups_of(rows: Sequence[Cell]) -> list[list[int]]:
    """Indices of the rows that may be compared: those of one model on one dataset, in one recipe."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((row["model"], row["dataset"], row["recipe"]), []).append(index)
    return list(groups.values())


def best_rows(rows: Sequence[Cell], name: str) -> frozenset[int]:
    """In each group the row that is best beyond noise."""
    found = set()
    for indices in groups_of(rows):
        best = best_beyond_noise([rows[index] for index in indices], name)
        if best is not None:
            found.add(indices[best])
    return frozenset(found)


def ratio_to(row: Cell, reference: Cell | None, name: str) -> float | None:
    """A row's metric over that of a reference, where both have it; of times only where the device is the same."""
    if reference is None or not row.get(f"{name}_n", 0) or not reference.get(f"{name}_n", 0) or not reference[name]:
        return None
    if name in BY_DEVICE and _device_departures(row) != _device_departures(reference):
        return None
    ratio = float(row[name]) / float(reference[name])
    return ratio if abs(ratio) < LARGEST else None


def _device_departures(row: Cell) -> set[str]:
    facts = ("environment.device_", "environment.num_threads", "environment.num_processes")
    return {text for text in row["differs"] or () if text.startswith(facts)}
