"""What the registry of methods says of the method of a cell; of one that is not registered here, its own settings."""

from __future__ import annotations

from analysis.comparisons import Cell
from harness.results.methods import METHODS


def uses_rank(cell: Cell) -> bool:
    """Whether the cell's method has a rank."""
    method = METHODS.get(cell["method"])
    return cell["rank"] is not None if method is None else method.uses_rank


def is_full(cell: Cell) -> bool:
    """Whether the cell is full fine-tuning, what every other method is compared with."""
    method = METHODS.get(cell["method"])
    return method is not None and method.trains_base and not method.uses_placement


def method_label(cell: Cell) -> str:
    """The cell's method in a sentence."""
    method = METHODS.get(cell["method"])
    return str(cell["method"]) if method is None else method.label
