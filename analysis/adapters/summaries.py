"""From a row for each matrix to what a table shows: the mean over blocks, then over seeds with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.adapters.findings import Findings
from analysis.comparisons import Cell, half_interval
from analysis.select import records
from analysis.tables.columns import cell_names


def over_seeds(frame: pd.DataFrame, by: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
    """The means of measures over matrices and then over seeds, a row for each group, in the order of its first row.

    Args:
        frame: a row for each matrix of each run, with `seed` (and `other_seed`, where a row is about two runs).
        by: the columns that name a group.
        names: the measures.

    Returns:
        By the names in `by`, and for each measure `<name>`, `<name>_sd` (sample standard deviation over seeds, None
        with one), `<name>_ci` (half the width of the 95 % interval of the mean) and `<name>_n`, the number of seeds, or
        of pairs of seeds. What has no value is None.
    """
    seeds = [name for name in ("seed", "other_seed") if name in frame]
    numbers = frame[[*by, *seeds]].assign(**{name: frame[name].astype(float) for name in names})
    within = numbers.groupby([*by, *seeds], sort=False, dropna=False)[list(names)].mean().reset_index()
    rows = []
    for values, group in within.groupby(list(by), sort=False, dropna=False):
        row = dict(zip(by, values, strict=True))
        for name in names:
            row |= _summary(name, group[name].dropna())
        rows.append(row)
    return rows


def _summary(name: str, values: pd.Series[float]) -> dict[str, Any]:
    num = len(values)
    sd = float(values.std()) if num > 1 else None
    return {
        name: float(values.mean()) if num else None,
        f"{name}_sd": sd,
        f"{name}_ci": None if sd is None else half_interval(sd, num),
        f"{name}_n": num,
    }


def text_of(row: dict[str, Any], name: str, digits: str) -> str | None:
    """A measure of a row of `over_seeds` as a cell of a table has it; None where it has none."""
    if row[name] is None:
        return None
    sd = row[f"{name}_sd"]
    return f"{row[name]:{digits}}" + ("" if sd is None else f" ± {sd:{digits}}")


def subject_of(cell: Cell) -> str:
    """The model and dataset of a condition, as "minilm on reuters_r8"."""
    return f"{cell['model']} on {cell['dataset']}"


def named(found: Findings, row: Mapping[Any, Any]) -> dict[str, Any]:
    """A row with what names its condition, and where it is about two that of the other, in the place of numbers."""
    cell = found.cells[row["condition"]]
    names: dict[str, Any] = {key: cell[key] for key in cell_names(cell)}
    if "other" in row:
        other = found.cells[row["other"]]
        names |= {f"other_{key}": other[key] for key in cell_names(other) if key not in ("model", "dataset")}
    return {**names, **{key: value for key, value in row.items() if key not in ("condition", "other")}}


def named_frames(found: Findings) -> dict[str, pd.DataFrame]:
    """The frames of a row for each matrix of each run, each with what names the condition; those without rows not."""
    frames = {
        "spectra": found.spectra,
        "singular_values": found.values,
        "amplification": found.amplification,
        "intruders": found.intruders,
        "similarity": found.similarity,
    }
    return {
        name: pd.DataFrame([named(found, row) for row in records(frame)])
        for name, frame in frames.items()
        if not frame.empty
    }
