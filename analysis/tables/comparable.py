"""Which rows of a table may be compared with each other, which is best, and with what full fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from analysis.axes import axes_of, axis_order, shared_axes
from analysis.comparisons import Cell, best_beyond_noise, ranked_by
from analysis.methods import is_full
from analysis.metrics import BY_DEVICE
from analysis.select import LARGEST, num_status, score
from harness.results.schema import Status


def comparison_of(row: Cell) -> tuple[str, str, str]:
    """What rows must share to be compared as methods, ranks or placements: model, dataset and recipe."""
    return row["model"], row["dataset"], row["recipe_id"]


def full_of(rows: Sequence[Cell]) -> dict[tuple[str, str, str], Cell]:
    """The finished full fine-tuning to compare with, by `comparison_of`.

    Of several the one that departs in nothing; of those that differ in their own axes the best on val.
    """
    several: dict[tuple[str, str, str], list[Cell]] = {}
    for row in filter(is_full, rows):
        if row[num_status(Status.FINISHED)]:
            several.setdefault(comparison_of(row), []).append(row)
    found = {}
    for comparison, members in several.items():
        usual = [row for row in members if row["recipe"] is None] or members
        ranked = ranked_by(usual, score(usual[0], "val"))
        has_own_axes = len({tuple(row[axis.setting] for axis in axes_of(row)) for row in usual}) > 1
        found[comparison] = usual[ranked[0]] if ranked and has_own_axes else usual[0]
    return found


def by_dataset(rows: Iterable[Cell]) -> list[list[Cell]]:
    """The rows of each model and dataset."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["dataset"]), []).append(row)
    return list(groups.values())


def by_facet(rows: Iterable[Cell]) -> list[list[Cell]]:
    """The rows of each model, dataset, method and value of the own axes.

    Ranks and placements of different methods are no one axis, and those after different epochs none either.
    """
    groups: list[list[Cell]] = []
    for group in by_dataset(rows):
        facets: dict[tuple[Any, ...], list[Cell]] = {}
        for row in group:
            facets.setdefault((row["method"], *(row[axis.setting] for axis in axes_of(row))), []).append(row)
        # Methods in the order of the rows, values in their own.
        methods = list(dict.fromkeys(method for method, *_ in facets))
        order = sorted(facets, key=lambda facet: (methods.index(facet[0]), *map(axis_order, facet[1:])))
        groups += [facets[facet] for facet in order]
    return groups


def groups_of(rows: Sequence[Cell]) -> list[list[int]]:
    """Indices of the rows that may be compared: those of one model on one dataset, in one recipe.

    Own axes that methods share, as epochs, are a part of the recipe; a method's own, as alpha, are what is compared.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        shared = tuple(row[axis.setting] for axis in shared_axes(row))
        groups.setdefault((row["model"], row["dataset"], row["recipe"], *shared), []).append(index)
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
