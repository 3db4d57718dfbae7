"""A sweep as a union of grids: from axes to the overrides of each run. Pure functions, no Hydra objects."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from harness.config.overrides import as_override_value

Overrides = tuple[str, ...]


class GridError(ValueError):
    """A grid that is not a mapping from axis to values; the message names the grid and the fix."""


def expand(grids: Sequence[Mapping[str, Any]], given: Mapping[str, Sequence[str]]) -> list[Overrides]:
    """Overrides of every run: the union of the grids' cartesian products, in order, each run once.

    Args:
        grids: axis name to a value or a list of values. No grids at all count as one empty grid.
        given: what the command line says, axis name to override values. An axis of the same name is replaced in every
            grid that has it; an axis that no grid has is added to all of them.

    Raises:
        GridError: an entry that is no mapping, or an axis without values.

    >>> expand([{"method": "lora", "rank": ["r1", "r8"]}, {"method": "full"}], {"seed": ["0"]})
    [('method=lora', 'rank=r1', 'seed=0'), ('method=lora', 'rank=r8', 'seed=0'), ('method=full', 'seed=0')]
    >>> expand([{"method": "lora", "rank": ["r1", "r8"]}, {"method": "full"}], {"rank": ["r4"]})
    [('method=lora', 'rank=r4'), ('method=full',)]
    """
    axes = [_axes(grid, number) for number, grid in enumerate(grids or [{}])]
    everywhere = {name: list(values) for name, values in given.items() if not any(name in grid for grid in axes)}
    runs: dict[Overrides, None] = {}
    for grid in axes:
        replaced = {name: list(given[name]) if name in given else values for name, values in grid.items()}
        replaced |= everywhere
        names = list(replaced)
        for point in itertools.product(*replaced.values()):
            runs[tuple(f"{name}={value}" for name, value in zip(names, point, strict=True))] = None
    return list(runs)


def _axes(grid: Mapping[str, Any], number: int) -> dict[str, list[str]]:
    if not isinstance(grid, Mapping):
        raise GridError(
            f"hydra.sweeper.grids[{number}]: must be a mapping from axis to values, got {grid!r}. "
            "Did you mean {rank: [r1, r8]}?"
        )
    axes: dict[str, list[str]] = {}
    for name, values in grid.items():
        listed = list(values) if isinstance(values, list | tuple) else [values]
        if not listed:
            raise GridError(f"hydra.sweeper.grids[{number}].{name}: no values. Give one, or take the axis out.")
        axes[str(name)] = [as_override_value(value) for value in listed]
    return axes
