"""Tables and figures of what runs score with other weights in their matrices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import matplotlib.figure
import pandas as pd
from matplotlib.axes import Axes

from analysis.adapters.figures import (
    condition_label,
    condition_look,
    laid_out,
    page_of_axes,
    plain_ticks,
    shared_legend,
)
from analysis.adapters.scoring import FIRST, KEPT
from analysis.adapters.summaries import over_seeds, subject_of
from analysis.comparisons import Cell
from analysis.figures import Figure
from analysis.figures.panels import MIN_SEEDS_OF_INTERVAL
from analysis.figures.style import LOOK_OF_FULL, MARKERS, in_turn, our_settings
from analysis.metrics import format_spread, format_value, metric, title
from analysis.select import score
from analysis.tables.cells import MISSING, show_metric
from analysis.tables.columns import cell_names, key_columns, methods_of, run_ids_of
from analysis.tables.structure import Column, PaperTable, text_table

_NOTE = (
    "Scored again from saved weights, with nothing trained; mean over seeds, ± their standard deviation. Everything "
    "that is no matrix of a block (head, biases, norms, embeddings) is as the run trained it."
)


def truncation_table(frame: pd.DataFrame, cells: Sequence[Cell], problems: Sequence[str]) -> PaperTable:
    """A row for each rank of full fine-tuning's difference: its score, and that of the adapters of this rank."""
    lines = _lines(frame, cells, ("rank",))
    others = [cell for cell in cells if cell["rank"] is not None]
    families = list(dict.fromkeys((cell["method"], cell["target_layers"]) for cell in others))
    columns = [
        Column("rank of the difference", [_rank(line) for line in lines], [_rank_value(line) for line in lines]),
        *_score_columns(lines, cells),
        Column("of the gain", [_share_text(line, lines) for line in lines], [_share(line, lines) for line in lines]),
    ]
    for method, placement in families:
        own = [_trained(line, others, (method, placement), cells) for line in lines]
        columns.append(
            Column(
                f"trained: {method} {placement}",
                [MISSING if cell is None else show_metric(cell, score(cell, "test")) for cell in own],
                [None if cell is None else float(cell[score(cell, "test")]) for cell in own],
            )
        )
    return _table(
        "oracle_truncation",
        "What a rank could hold: the base weights plus full fine-tuning's difference, cut to a rank.",
        lines,
        cells,
        columns,
        [
            "The best approximation of each matrix's difference by the rank (its largest singular values). of the "
            "gain: how much of the way from rank 0 to the whole difference the score has gone.",
            "Where a rank scores as the whole difference does and an adapter of this rank less, the rank has room for "
            "it and training did not find it.",
            *problems,
        ],
    )


def intruder_table(frame: pd.DataFrame, cells: Sequence[Cell], problems: Sequence[str]) -> PaperTable:
    """A row for each condition: its score, and with a part of its intruders left, beside as many others."""
    counts = over_seeds(frame, ("condition",), ["num_intruders"])
    lines = _lines(frame, cells, ("kept", "is_control"))
    at = {(line["condition"], line["kept"], line["is_control"]): line for line in lines}
    rows = [{"condition": line["condition"], **line} for line in counts]
    columns = [
        Column("intruders", [f"{row['num_intruders']:.1f}" for row in rows], [row["num_intruders"] for row in rows])
    ]
    for kept, control in [(1.0, False), *((kept, control) for kept in KEPT for control in (False, True))]:
        own = [at.get((row["condition"], kept, control)) for row in rows]
        heading = "as trained" if kept == 1 else f"{kept:g} of {'others' if control else 'intruders'} left"
        columns.append(
            Column(
                heading,
                [MISSING if line is None else _score_text(line, cells, "test") for line in own],
                [None if line is None else line["test"] for line in own],
            )
        )
    names = dict.fromkeys(title(score(cells[row["condition"]], "test")) for row in rows)
    epsilon = frame["epsilon"].iloc[0]
    table = _table(
        "intruders_removed",
        f"Score on test with less of the intruder dimensions ({', '.join(names)}).",
        rows,
        cells,
        columns,
        [
            f"Intruders: of the first {FIRST} dimensions of each matrix those whose cosine with every left singular "
            f"vector of the base weight is below {epsilon:g}; their number in all matrices of a run. Of their singular "
            "values the part that is named is left (arXiv 2410.21228). others: the same done to as many random ones of "
            f"the first {FIRST} dimensions that are no intruders. A run without intruders counts as trained.",
            *problems,
        ],
        numbers=lines,
    )
    return table


def _lines(frame: pd.DataFrame, cells: Sequence[Cell], by: Sequence[str]) -> list[dict[str, Any]]:
    """Means over seeds by condition and `by`: of the score by which a dataset is judged as `val` and `test`."""
    frame = frame.copy()
    frame["value"] = [
        row[score(cells[row["condition"]], "test").removeprefix("test_")] for row in frame.to_dict("records")
    ]
    keys = ["condition", *by]
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in over_seeds(frame, [*keys, "split"], ["value"]):
        split, key = line.pop("split"), tuple(None if pd.isna(line[name]) else line[name] for name in keys)
        own = merged.setdefault(key, dict(zip(keys, key, strict=True)))
        own |= {name.replace("value", split, 1): value for name, value in line.items() if name not in keys}
    return list(merged.values())


def _score_columns(lines: Sequence[dict[str, Any]], cells: Sequence[Cell]) -> list[Column]:
    columns = []
    for split in ("val", "test"):
        headings = dict.fromkeys(title(score(cells[line["condition"]], split)) for line in lines)
        texts = [_score_text(line, cells, split) for line in lines]
        columns.append(Column(" or ".join(headings), texts, [line[split] for line in lines]))
    return columns


def _score_text(line: dict[str, Any], cells: Sequence[Cell], split: str) -> str:
    name = score(cells[line["condition"]], split)
    if line[split] is None:
        return MISSING
    sd = line[f"{split}_sd"]
    return format_value(name, line[split]) + ("" if sd is None else f" ± {format_spread(name, sd)}")


def _rank(line: dict[str, Any]) -> str:
    return "whole" if line["rank"] is None else f"{line['rank']:g}"


def _rank_value(line: dict[str, Any]) -> float | None:
    return None if line["rank"] is None else float(line["rank"])


def _share(line: dict[str, Any], lines: Sequence[dict[str, Any]]) -> float | None:
    own = {each["rank"]: each["test"] for each in lines if each["condition"] == line["condition"]}
    none, whole = own.get(0), own.get(None)
    if none is None or whole is None or none == whole or line["test"] is None:
        return None
    return float((line["test"] - none) / (whole - none))


def _share_text(line: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    share = _share(line, lines)
    return MISSING if share is None else f"{share:.0%}"


def _trained(
    line: dict[str, Any], others: Sequence[Cell], family: tuple[Any, Any], cells: Sequence[Cell]
) -> Cell | None:
    full = cells[line["condition"]]
    for cell in others:
        same = all(cell[name] == full[name] for name in ("model", "dataset"))
        if same and (cell["method"], cell["target_layers"]) == family and cell["rank"] == line["rank"]:
            return cell if cell.get(f"{score(cell, 'test')}_n", 0) else None
    return None


def _table(
    name: str,
    caption: str,
    rows: Sequence[dict[str, Any]],
    cells: Sequence[Cell],
    columns: Sequence[Column],
    notes: Sequence[str],
    *,
    numbers: Sequence[dict[str, Any]] | None = None,
) -> PaperTable:
    own = [cells[row["condition"]] for row in rows]
    keys = key_columns(own)
    lines = [
        {
            **{key: cells[row["condition"]][key] for key in cell_names(cells[row["condition"]]) if key != "rank"},
            "adapter_rank": cells[row["condition"]]["rank"],
            "metric": cells[row["condition"]]["best_metric"],
            **{key: value for key, value in row.items() if key != "condition"},
        }
        for row in numbers or rows
    ]
    return PaperTable(
        name=name,
        caption=caption,
        text=text_table([*keys, *columns], num_key_columns=len(keys)),
        numbers=pd.DataFrame(lines, dtype=object),
        notes=[_NOTE, *notes],
        run_ids=run_ids_of(own),
        methods=methods_of(own),
    )


# ---------------------------------------------------------------- figures


def truncation_figure(frame: pd.DataFrame, cells: Sequence[Cell]) -> Figure:
    """Score on test against the rank: of the truncated difference, and of trained adapters."""
    return Figure(
        "oracle_truncation", "Score of full fine-tuning's difference by rank", partial(_draw_ranks, frame, cells)
    )


def _draw_ranks(frame: pd.DataFrame, cells: Sequence[Cell]) -> matplotlib.figure.Figure:
    lines = [line for line in _lines(frame, cells, ("rank",)) if line["test"] is not None]
    fulls = list(dict.fromkeys(line["condition"] for line in lines))
    footnote = (
        "black: base weights plus full fine-tuning's difference cut to a rank, dashed the whole of it; others: trained "
        "adapters of this rank; means over seeds, 95 % interval from three seeds on; rank 0 is all that is no matrix"
    )
    with our_settings():
        figure, axes = page_of_axes("", [subject_of(cells[each]) for each in fulls], footnote, row_inches=2.6)
        for each, condition in zip(axes, fulls, strict=True):
            name = score(cells[condition], "test")
            own = [line for line in lines if line["condition"] == condition]
            look = {"color": LOOK_OF_FULL[0], "marker": LOOK_OF_FULL[1]}
            cut = [(line["rank"], line["test"], _half(line)) for line in own if line["rank"] is not None]
            _points(each, cut, name, "full, cut to the rank", look)
            for line in own:
                if line["rank"] is None:
                    each.axhline(_displayed(name, line["test"]), color=look["color"], linestyle="--", linewidth=0.8)
            for number, (family, members) in enumerate(_families(cells, cells[condition]).items()):
                trained = [(cell["rank"], cell[name], _half_of_cell(cell, name)) for cell in members]
                _points(each, trained, name, family, {"color": f"C{number}", "marker": in_turn(MARKERS, number)})
            each.set_xscale("symlog", base=2, linthresh=1)
            plain_ticks(each.xaxis)
            each.set(xlabel="rank", ylabel=title(name))
        shared_legend(figure, axes)
        return laid_out(figure)


def intruder_figure(frame: pd.DataFrame, cells: Sequence[Cell]) -> Figure:
    """Score on test against the part of the intruders that is left, dotted with as many others."""
    return Figure("intruders_removed", "Score with less of the intruder dimensions", partial(_draw_kept, frame, cells))


def _draw_kept(frame: pd.DataFrame, cells: Sequence[Cell]) -> matplotlib.figure.Figure:
    lines = [line for line in _lines(frame, cells, ("kept", "is_control")) if line["test"] is not None]
    shown = list(dict.fromkeys(line["condition"] for line in lines))
    subjects: dict[str, list[int]] = {}
    for each in shown:
        subjects.setdefault(subject_of(cells[each]), []).append(each)
    footnote = (
        "part of the intruders' singular values that is left, 1 is as trained; dotted: the same of as many other "
        "dimensions; means over seeds, 95 % interval from three seeds on; without intruders nothing is scored"
    )
    with our_settings():
        figure, axes = page_of_axes("", list(subjects), footnote, row_inches=2.6)
        for each, conditions in zip(axes, subjects.values(), strict=True):
            for condition in conditions:
                name, label = score(cells[condition], "test"), condition_label(cells[condition], cells)
                look = condition_look(cells[condition], [cells[other] for other in shown])
                for control in (False, True):
                    own = [line for line in lines if line["condition"] == condition]
                    own = [line for line in own if line["is_control"] is control or line["kept"] == 1]
                    points = [(line["kept"], line["test"], 0.0 if control else _half(line)) for line in own]
                    dotted = {"linestyle": ":", "linewidth": 0.7, "marker": "none"} if control else {}
                    _points(each, points, name, "_" if control else label, look | dotted)
            each.set(xlabel="part that is left", ylabel=title(score(cells[conditions[0]], "test")))
        shared_legend(figure, axes)
        return laid_out(figure)


def _families(cells: Sequence[Cell], full: Cell) -> dict[str, list[Cell]]:
    """The scored conditions with a rank of a model and dataset, by method and placement, in order of rank."""
    found: dict[str, list[Cell]] = {}
    for cell in sorted((cell for cell in cells if cell["rank"] is not None), key=lambda cell: cell["rank"]):
        if subject_of(cell) == subject_of(full) and cell.get(f"{score(cell, 'test')}_n", 0):
            found.setdefault(f"{cell['method']} {cell['target_layers']}", []).append(cell)
    return found


def _points(
    axes: Axes, points: Sequence[tuple[float, float, float]], name: str, label: str, look: dict[str, Any]
) -> None:
    # As in other figures, no interval ends above the largest value that there is.
    above = [min(half, max(0.0, metric(name).largest - value)) for _, value, half in points]
    reaches = [[_displayed(name, half) for _, _, half in points], [_displayed(name, half) for half in above]]
    axes.errorbar(
        [x for x, _, _ in points],
        [_displayed(name, value) for _, value, _ in points],
        yerr=reaches if any(reaches[0]) else None,
        elinewidth=0.7,
        capsize=1.5,
        label=label,
        **look,
    )


def _displayed(name: str, value: float) -> float:
    return value / metric(name).display_divisor


def _half(line: dict[str, Any]) -> float:
    return float(line["test_ci"]) if line["test_n"] >= MIN_SEEDS_OF_INTERVAL else 0.0


def _half_of_cell(cell: Cell, name: str) -> float:
    return float(cell[f"{name}_ci"]) if cell[f"{name}_n"] >= MIN_SEEDS_OF_INTERVAL else 0.0
