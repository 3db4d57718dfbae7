"""What the page's scripts draw from: cells with what is said of them, runs with settings, metrics and curves, as JSON.

Numbers become text here, by the METRICS registry; the scripts draw and format nothing but axes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.axes import Axis, axes_of, axes_texts, axis_number, axis_order, axis_text, varied
from analysis.comparisons import Cell
from analysis.curves import seed_curve
from analysis.metrics import FORGETTING, LEARNED, MEMORY_PARTS, format_spread, format_value, metric
from analysis.recipes import show_value
from analysis.select import generation_scores, num_status, records, score
from analysis.tables.cells import recipe_mark
from harness.results.metrics import METRICS, Direction
from harness.results.schema import Status

# Beyond these the page would be slow to open. `runs.csv` and the run folders hold everything.
MAX_DETAILED_RUNS = 2_000
MAX_CURVE_POINTS = 200
MAX_CURVE_POINTS_ALTOGETHER = 200_000
MAX_BANDS = 400
# What a run records during training that says how good its model is.
_CURVES = tuple(
    name
    for name in METRICS
    if name in {"train_nll", "train_mse"}
    or (name.startswith("val_") and not name.endswith(("_last", "_before", "_majority_share")))
)


def detailed_runs(frame: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """The runs whose settings, metrics and curves the page holds, those of the best cells before the others."""
    if len(frame) <= MAX_DETAILED_RUNS:
        return frame
    preferred = {run_id for run_ids in best["run_ids"] for run_id in run_ids}
    later = (~frame["run_id"].isin(preferred)).to_numpy()
    return frame.iloc[np.argsort(later, kind="stable")[:MAX_DETAILED_RUNS]]


def tasks_of(cells: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The cells by model and dataset, whose scores can be compared with each other."""
    groups = (group for _, group in cells.groupby(["model", "dataset"], sort=False))
    return {_task_name(group.iloc[0]): group for group in groups}


def _task_name(cell: pd.Series[Any] | Cell) -> str:
    return f"{cell['model']} on {cell['dataset']}"


# ---------------------------------------------------------------- cells


def cells_data(cells: pd.DataFrame, best: pd.DataFrame, leading: Collection[str] = ()) -> dict[str, Any]:
    """Every cell with what is drawn and said of it, and the titles of axes; `leading` by id are those best on val."""
    tasks, chosen, rows = tasks_of(cells), set(best["cell_id"]), records(cells)
    axes, own = axes_of(cells.columns), {name: varied(records(table)) for name, table in tasks.items()}
    series_of = [_series(row, own[_task_name(row)]) for row in rows]
    series = list(dict.fromkeys(series_of))
    generated = generation_scores(cells)
    return {
        "tasks": [_task(table.iloc[0]) for table in tasks.values()],
        "series": series,
        "memory": _axis("peak_memory_bytes"),
        "parts": [_axis(name) for name in MEMORY_PARTS],
        "params": _axis("num_adapter_params"),
        "compute": f"{metric('train_flops').label} ({metric('train_flops').unit})",
        "learned": metric(LEARNED).label,
        "forgetting": metric(FORGETTING).label,
        "axes": [axis.name for axis in axes],
        "cells": [
            _cell(cell, generated, own[_task_name(cell)])
            | {
                "task": list(tasks).index(_task_name(cell)),
                "series": series.index(name),
                "best": cell["cell_id"] in chosen,
                "leads": cell["cell_id"] in leading,
                "axes": [None if cell[axis.setting] is None else axis_text(cell[axis.setting]) for axis in axes],
                "places": [_number(axis_number(cell[axis.setting])) for axis in axes],
            }
            for cell, name in zip(rows, series_of, strict=True)
        ],
    }


def axis_choices(cells: pd.DataFrame) -> dict[str, list[str]]:
    """By the name of each own axis its values as text, in order."""
    return {
        axis.name: list(dict.fromkeys(map(axis_text, sorted(set(cells[axis.setting].dropna()), key=axis_order))))
        for axis in axes_of(cells.columns)
    }


def _task(cell: pd.Series[Any]) -> dict[str, Any]:
    val, test = (metric(score(cell, split)) for split in ("val", "test"))
    return {"higher": test.direction is not Direction.LOWER, "val": val.label, "test": test.label}


def _series(cell: Cell, axes: Sequence[Axis]) -> str:
    """What shares a colour and may be joined by a line: a method with a placement, at one value of each own axis."""
    parts = [str(part) for part in (cell["method"], cell["target_layers"]) if part is not None]
    return ", ".join([*parts, *axes_texts(cell, axes)]) + recipe_mark(cell)


def _cell(cell: Cell, generated: Sequence[str], axes: Sequence[Axis]) -> dict[str, Any]:
    val, test = score(cell, "val"), score(cell, "test")
    return {
        "method": str(cell["method"]),
        "name": _name(cell, axes),
        "bare": _name(cell, ()),
        "condition": cell["condition_id"],
        "rank": _number(cell["rank"]),
        "rate": _number(cell["learning_rate"]),
        "test": _number(cell.get(test)),
        "test_sd": _number(cell.get(f"{test}_sd")),
        "val": _number(cell.get(val)),
        "val_sd": _number(cell.get(f"{val}_sd")),
        "params": _displayed("num_adapter_params", cell.get("num_adapter_params")),
        "memory": _displayed("peak_memory_bytes", cell.get("peak_memory_bytes")),
        "parts": [_displayed(name, cell.get(name)) for name in MEMORY_PARTS],
        # In the stored unit, to which the axis adds its own prefix.
        "compute": _number(cell.get("train_flops")),
        "learned": _number(cell.get(LEARNED)),
        "learned_sd": _number(cell.get(f"{LEARNED}_sd")),
        "forgetting": _number(cell.get(FORGETTING)),
        "forgetting_sd": _number(cell.get(f"{FORGETTING}_sd")),
        "runs": list(cell["run_ids"]),
        "lines": list(_lines(cell, (test, val, *generated, FORGETTING))),
    }


def _name(cell: Cell, axes: Sequence[Axis]) -> str:
    rank = None if cell["rank"] is None else f"rank {cell['rank']}"
    parts = [str(part) for part in (cell["method"], rank, cell["target_layers"]) if part is not None]
    return ", ".join([*parts, *axes_texts(cell, axes)]) + recipe_mark(cell)


def _lines(cell: Cell, scores: Iterable[str]) -> Iterator[str]:
    """What is said about a cell where one points at it, below its name."""
    yield f"learning rate {show_value(cell['learning_rate'])}"
    for name in (*scores, "peak_memory_bytes", "num_adapter_params"):
        text = _with_unit(name, cell.get(name))
        if text is None:
            continue
        sd, num = _number(cell.get(f"{name}_sd")), cell.get(f"{name}_n")
        spread = f" ± {format_spread(name, sd)} (n={num})" if sd is not None else f" (n={num})"
        yield f"{metric(name).label} {text}" + (spread if name in scores else "")
    counts = [f"{cell[num_status(status)]} {status}" for status in Status if cell[num_status(status)]]
    yield f"runs: {', '.join(counts)}"


def _axis(name: str) -> str:
    meaning = metric(name)
    return f"{meaning.label} ({meaning.display_unit})" if meaning.display_unit else meaning.label


# ---------------------------------------------------------------- runs


def runs_data(detailed: pd.DataFrame, curves: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Settings that all runs share are stored once, the others and the metrics as a list per run."""
    names = [name for name in detailed.columns if name.startswith(("config.", "environment."))]
    settings = {name: [show_value(value) for value in detailed[name]] for name in names}
    varying = [name for name in names if len(set(settings[name])) > 1]
    measured = [name for name in METRICS if detailed[name].notna().any()]
    metrics = {name: [_with_unit(name, value) for value in detailed[name]] for name in measured}
    max_points = max(20, min(MAX_CURVE_POINTS, MAX_CURVE_POINTS_ALTOGETHER // max(1, len(detailed))))
    runs, found = {}, {}
    for i, (run_id, status, error) in enumerate(
        zip(detailed["run_id"], detailed["status"], detailed["error"], strict=True)
    ):
        runs[run_id] = {
            "status": status,
            "error": error or "",
            "settings": [settings[name][i] for name in varying],
            "metrics": [metrics[name][i] for name in measured],
        }
        if thinned := _thinned(curves.get(run_id, ()), max_points):
            found[run_id] = thinned
    return {
        "settings": {name: settings[name][0] for name in names if name not in varying and settings[name]},
        "varying": varying,
        "metrics": [METRICS[name].label for name in measured],
        "runs": runs,
        "curve_labels": {name: METRICS[name].label for name in _CURVES},
        "curves": found,
    }


def bands_data(
    cells: pd.DataFrame, best: pd.DataFrame, curves: Mapping[str, Sequence[Mapping[str, float]]]
) -> dict[str, Any]:
    """By the index of a best cell and by metric: steps, means, lowest and highest run, and how many runs."""
    places = {cell_id: str(place) for place, cell_id in enumerate(cells["cell_id"])}
    shown = [
        (cell_id, runs) for cell_id, runs in zip(best["cell_id"], best["run_ids"], strict=True) if cell_id in places
    ]
    max_points = max(20, min(MAX_CURVE_POINTS, MAX_CURVE_POINTS_ALTOGETHER // max(1, len(shown))))
    bands: dict[str, dict[str, Any]] = {}
    for cell_id, run_ids in shown[:MAX_BANDS]:
        found = {}
        for name in _CURVES:
            curve = seed_curve(curves, run_ids, name)
            if len(curve.steps) > 1:
                kept = _kept(len(curve.steps), max_points)
                numbers = (curve.steps, curve.means, curve.lows, curve.highs)
                found[name] = [*([_rounded(values[i]) for i in kept] for values in numbers), curve.num_runs]
        if found:
            bands[places[cell_id]] = found
    return {"bands": bands}


def _kept(num: int, most: int) -> list[int]:
    """The indices of at most so many of `num` points, the first and the last among them."""
    return [*range(num)] if num <= most else [round(i * (num - 1) / (most - 1)) for i in range(most)]


def _thinned(
    records: Sequence[Mapping[str, float]], max_points: int
) -> dict[str, tuple[list[float], list[float | None]]]:
    """By metric, steps and values of at most `max_points` records, the first and the last among them."""
    found = {}
    for name in _CURVES:
        steps = ((_number(record.get("step")), record[name]) for record in records if name in record)
        points = [(step, _rounded(value)) for step, value in steps if step is not None]
        points.sort(key=lambda point: point[0])  # a resumed run goes back a few steps
        points = [points[i] for i in _kept(len(points), max_points)]
        if len(points) > 1:
            found[name] = ([step for step, _ in points], [value for _, value in points])
    return found


# ---------------------------------------------------------------- numbers


def _number(value: Any) -> float | None:
    """A finite number, or None: JSON has no NaN."""
    value = value.item() if isinstance(value, np.generic) else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def _displayed(name: str, value: Any) -> float | None:
    number = _number(value)
    return None if number is None else number / metric(name).display_divisor


def _with_unit(name: str, value: Any) -> str | None:
    number, meaning = _number(value), metric(name)
    return None if number is None else f"{format_value(name, number)} {meaning.display_unit}".rstrip()


def _rounded(value: Any) -> float | None:
    number = _number(value)
    return None if number is None else float(f"{number:.5g}")
