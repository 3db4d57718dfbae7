"""What the registry of methods says of the method of a cell; of one that is not registered here, its own settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.comparisons import Cell
from harness.results.methods import METHODS, Method


def method_name(run: Mapping[Any, Any] | pd.Series[Any]) -> str:
    """What the method of a run is called in tables: by its name, and that of its variant, as in `lora dora`."""
    name, variant = str(run["config.method.name"]), run.get("config.variant.name")
    return name if variant in (None, "plain") else f"{name} {variant}"


def _record(cell: Cell) -> Method | None:
    return METHODS.get(str(cell["method"]).partition(" ")[0])


def uses_rank(cell: Cell) -> bool:
    """Whether the cell's method has a rank."""
    method = _record(cell)
    return cell["rank"] is not None if method is None else method.uses_rank


def is_full(cell: Cell) -> bool:
    """Whether the cell is full fine-tuning, what every other method is compared with."""
    method = _record(cell)
    return method is not None and method.trains_base and not method.uses_placement


def method_label(cell: Cell) -> str:
    """The cell's method in a sentence."""
    method = _record(cell)
    name, _, variant = str(cell["method"]).partition(" ")
    label = name if method is None else method.label
    return f"{label} ({variant})" if variant else label
