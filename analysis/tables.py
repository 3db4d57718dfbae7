"""The tables of a sweep, each a function from cells to a `PaperTable`, or None where the sweep has nothing for it.

Numbers keep the stored units until they are turned into text here, by the METRICS registry. Rows are conditions at
their best learning rate, chosen on val alone. Bold is what differs from the runner-up beyond noise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import pandas as pd

from analysis.formats import Column, PaperTable, as_code, text_table
from analysis.published import Published, quoted_rows
from analysis.select import (
    BY_MEDIAN,
    COLLAPSED_ABOVE,
    TRAINABLE_SHARE,
    best_beyond_noise,
    best_cells,
    is_score,
    metric,
    num_status,
    p_value,
    ranked_by,
    score,
    score_columns,
)
from harness.results import Direction, Status

Cell = dict[Hashable, Any]

EN_DASH = "\N{EN DASH}"
MISSING = EN_DASH
TIMES = "\N{MULTIPLICATION SIGN}"
COLLAPSED_MARK = "†"
EDGE_MARK = "§"
QUOTED_MARK = "‡"

_ARROWS = {Direction.HIGHER: " ↑", Direction.LOWER: " ↓", Direction.NEUTRAL: ""}

# Ratios to full fine-tuning on the same model and dataset: title, metric.
_RATIOS = {"peak_memory_bytes": "memory", "step_seconds_median": "time"}


def paper_tables(
    frame: pd.DataFrame, table: pd.DataFrame, *, scores: str = "best", published: bool = False
) -> list[PaperTable]:
    """Every table that the runs of a sweep allow, the trade-off first.

    Args:
        frame: a row per run, from `load_runs`.
        table: a row per cell, from `select.cells` of that frame.
        scores: "best" or "last": which step the scores in both are of, for the captions.
        published: whether quoted rows of papers stand under the measured ones.
    """
    best = best_cells(table)
    found = [
        tradeoff(best, frame, scores=scores),
        summary(best),
        costs(best),
        rank_by_target_layers(best, published=published),
        target_layers_at_budget(best, published=published),
        rank_sweep(best, published=published),
        tasks_by_methods(best, published=published),
        learning_rates(table, best),
    ]
    return [one for one in found if one is not None]


# ---------------------------------------------------------------- the parts of every table


def _records(table: pd.DataFrame) -> list[Cell]:
    return table.to_dict("records")


def title(name: str) -> str:
    """A metric as the title of a column: label, unit, arrow to the better side."""
    about = metric(name)
    return f"{about.label}{f' ({about.display_unit})' if about.display_unit else ''}{_ARROWS[about.direction]}"


def format_value(name: str, value: float) -> str:
    """A value of a metric in its display unit, without the unit."""
    about = metric(name)
    return f"{value / about.display_divisor:{about.format}}"


def show_metric(cell: Cell, name: str) -> str:
    """A cell's number with its spread, and what must be known about it."""
    num_values = cell.get(f"{name}_n", 0)
    if not num_values:
        return MISSING
    text = format_value(name, cell[name])
    if name in BY_MEDIAN:
        low, high = format_value(name, cell[f"{name}_min"]), format_value(name, cell[f"{name}_max"])
        text += f" ({low}{EN_DASH}{high})" if low != high else ""
    elif num_values > 1 and (cell[f"{name}_sd"] > 0 or is_score(name)):
        # A cost that is the same for every seed is exact, and a "± 0" adds nothing; of a score it tells something.
        text += f" ± {format_value(name, cell[f'{name}_sd'])}"
    if num_values != cell[num_status(Status.FINISHED)]:
        text += f" (n={num_values})"
    return f"{text}{COLLAPSED_MARK}" if cell["num_collapsed"] and is_score(name) else text


def _metric_column(rows: Sequence[Cell], name: str, *, bold: frozenset[int] = frozenset()) -> Column:
    values = [float(row[name]) if row.get(f"{name}_n", 0) else None for row in rows]
    return Column(title(name), [show_metric(row, name) for row in rows], values, bold)


def _key_columns(rows: Sequence[Cell]) -> list[Column]:
    """What names a row: model and dataset where they differ, method, rank, target layers."""
    columns = [
        Column(name, [row[name] for row in rows])
        for name in ("model", "dataset")
        if len({row[name] for row in rows}) > 1
    ]
    return [
        *columns,
        Column("method", [row["method"] + _recipe_mark(row) for row in rows]),
        Column("rank", [MISSING if row["rank"] is None else str(row["rank"]) for row in rows], _ranks(rows)),
        Column("target layers", [row["target_layers"] or MISSING for row in rows]),
    ]


def _ranks(rows: Sequence[Cell]) -> list[float | None]:
    return [None if row["rank"] is None else float(row["rank"]) for row in rows]


def _learning_rate_column(rows: Sequence[Cell]) -> Column:
    texts = [show_rate(row["learning_rate"]) + (EDGE_MARK if row.get("edge") else "") for row in rows]
    return Column("learning rate", texts, [float(row["learning_rate"]) for row in rows])


def show_rate(rate: float) -> str:
    """A learning rate, as short as it is exact."""
    return f"{rate:g}"


def _recipe_mark(row: Cell) -> str:
    return "" if row["recipe"] is None else f" [{row['recipe']}]"


def _groups(rows: Sequence[Cell]) -> list[list[int]]:
    """Indices of the rows that may be compared: those of one model on one dataset."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((row["model"], row["dataset"]), []).append(index)
    return list(groups.values())


def _bold(rows: Sequence[Cell], name: str) -> frozenset[int]:
    """In each group the row that is best beyond noise."""
    found = set()
    for indices in _groups(rows):
        best = best_beyond_noise([rows[index] for index in indices], name)
        if best is not None:
            found.add(indices[best])
    return frozenset(found)


def _is_full(row: Cell) -> bool:
    return bool(row["method"] == "full")


def _is_lora(row: Cell) -> bool:
    return bool(row["method"] == "lora")


def _name(row: Cell) -> str:
    """A cell in a sentence."""
    parts = [row["method"], f"rank {row['rank']}" if row["rank"] is not None else None, row["target_layers"]]
    return " ".join(part for part in parts if part)


def _same_everywhere(rows: Sequence[Cell], names: Sequence[str]) -> str:
    same = [f"{name.replace('_', ' ')} {rows[0][name]}" for name in names if len({row[name] for row in rows}) == 1]
    return ", ".join(same)


def _run_ids(rows: Sequence[Cell]) -> list[tuple[str, ...]]:
    return [row["run_ids"] for row in rows]


def _methods(rows: Sequence[Cell]) -> list[str]:
    return [row["method"] for row in rows]


# ---------------------------------------------------------------- notes

NOTE_N = (
    "n: finished runs, one per seed; only they give numbers. ±: sample standard deviation over them; the CSV has the "
    "half width of the 95 % interval (Student's t) as well."
)
NOTE_BOLD = "Bold: better than the runner-up by Welch's t-test, two-sided, p < 0.05."
NOTE_NO_NOISE = "One seed: no row can be told from another beyond noise, so nothing is bold."


def _bold_note(rows: Sequence[Cell], names: Sequence[str]) -> str:
    return NOTE_BOLD if any(row.get(f"{name}_n", 0) > 1 for row in rows for name in names) else NOTE_NO_NOISE


def selection_rule(frame: pd.DataFrame, scores: str = "best") -> str:
    """From which split and which step the scores come, in words."""
    best_metrics = " or ".join(frame["config.dataset.best_metric"].unique())
    if scores == "last":
        return "scores of the last step; learning rate chosen on val only; test used for no choice"
    return f"best step chosen on val only, by {best_metrics}; test evaluated after training, and used for no choice"


def _edge_notes(rows: Sequence[Cell]) -> Iterator[str]:
    tuned = [row for row in rows if len(row["tried"]) > 1]
    if tuned:
        yield "Learning rate: the best of those tried for the row, by the mean over seeds on val only."
    at_edge = [row for row in tuned if row["edge"]]
    if at_edge:
        listed = "; ".join(f"{_name(row)}, tried {', '.join(map(show_rate, row['tried']))}" for row in at_edge)
        yield f"{EDGE_MARK} at the edge of the rates that were tried, so a better one may lie outside: {listed}."


def _warnings(rows: Sequence[Cell], frame: pd.DataFrame) -> Iterator[str]:
    shown = {run_id for row in rows for run_id in row["run_ids"]}
    shares = frame[["val_majority_share", "test_majority_share"]]
    is_collapsed = (shares > COLLAPSED_ABOVE).any(axis="columns") & (frame["status"] == Status.FINISHED.value)
    collapsed = [run_id for run_id in frame.loc[is_collapsed, "run_id"] if run_id in shown]
    if collapsed:
        yield (
            f"{COLLAPSED_MARK} collapsed: one class received more than {COLLAPSED_ABOVE:.1%} of the predictions on val "
            f"or test. Counted in all the same: {listed(collapsed)}."
        )
    departures = {row["recipe"]: row["differs"] for row in rows if row["recipe"] is not None}
    for number, differs in sorted(departures.items()):
        settings = "; ".join(as_code(difference) for difference in differs)
        yield f"[{number}] differs in recipe or environment: {settings}."


# So many runs are named; a page holds them all, a table's footnote need not.
_NUM_NAMED = 20


def listed(run_ids: Sequence[str]) -> str:
    """Names as code; of very many the first, and how many more."""
    text = ", ".join(map(as_code, run_ids[:_NUM_NAMED]))
    return text if len(run_ids) <= _NUM_NAMED else f"{text} and {len(run_ids) - _NUM_NAMED} more"


def failures(frame: pd.DataFrame) -> list[str]:
    """Every run that did not finish, with its status and the first line of its message."""
    failed = frame[frame["status"] != Status.FINISHED.value]
    runs = zip(failed["run_id"], failed["status"], failed["error"], strict=True)
    return [f"{as_code(run_id)}: {status}: {_first_line(error)}" for run_id, status, error in runs]


def _failure_notes(frame: pd.DataFrame) -> Iterator[str]:
    failed = failures(frame)
    if failed:
        lines = failed[:_NUM_NAMED]
        if len(failed) > _NUM_NAMED:
            lines.append(f"and {len(failed) - _NUM_NAMED} more, see runs.csv")
        yield "\n  - ".join([f"Not finished, so without numbers: {len(failed)} of {len(frame)} runs:", *lines])


def _first_line(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return as_code(lines[0]) if lines else "no message"


# ---------------------------------------------------------------- trade-off


def tradeoff(best: pd.DataFrame, frame: pd.DataFrame, *, scores: str = "best") -> PaperTable:
    """Cost and quality of every condition, with ratios to full fine-tuning."""
    rows = _records(best)
    columns = _key_columns(rows)
    if len({row["learning_rate"] for row in rows}) > 1 or any(row["edge"] for row in rows):
        columns.append(_learning_rate_column(rows))
    num_key_columns = len(columns)
    reference = {(row["model"], row["dataset"]): row for row in rows if _is_full(row)}
    for name in (
        "num_adapter_params",
        TRAINABLE_SHARE,
        "peak_memory_bytes",
        "step_seconds_median",
        "train_tokens_per_second",
        "checkpoint_bytes",
    ):
        if name in best and (best[f"{name}_n"].any() or name != "train_tokens_per_second"):
            columns.append(_metric_column(rows, name))
            if name in _RATIOS and len(rows) > len(reference) > 0:
                columns.append(_ratio_column(rows, reference, name))
    score_names = [name for name in score_columns(best) if name in best]
    columns += [_metric_column(rows, name, bold=_bold(rows, name)) for name in score_names]
    columns.append(_num_finished_column(rows))
    if any(row[num_status(status)] for row in rows for status in Status if status is not Status.FINISHED):
        columns.append(Column("status", [_show_status(row) for row in rows]))
    return PaperTable(
        name="tradeoff",
        caption=f"Cost and quality. {_sentence(selection_rule(frame, scores))}",
        text=text_table(columns, num_key_columns=num_key_columns),
        numbers=best,
        notes=[
            *_definitions(rows, reference, frame),
            _bold_note(rows, score_names),
            *_edge_notes(rows),
            *_warnings(rows, frame),
            *_failure_notes(frame),
        ],
        run_ids=_run_ids(rows),
        methods=_methods(rows),
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _ratio_column(rows: Sequence[Cell], reference: dict[tuple[str, str], Cell], name: str) -> Column:
    ratios = [_ratio(row, reference.get((row["model"], row["dataset"])), name) for row in rows]
    texts = [MISSING if ratio is None else f"{ratio:.2f}{TIMES}" for ratio in ratios]
    return Column(f"{_RATIOS[name]} / full", texts, ratios)


def _ratio(row: Cell, reference: Cell | None, name: str) -> float | None:
    if reference is None or not row.get(f"{name}_n", 0) or not reference.get(f"{name}_n", 0) or not reference[name]:
        return None
    return float(row[name] / reference[name])


def _num_finished_column(rows: Sequence[Cell]) -> Column:
    counts = [row[num_status(Status.FINISHED)] for row in rows]
    return Column("n", [str(count) for count in counts], [float(count) for count in counts])


def _show_status(row: Cell) -> str:
    counts = [(status, row[num_status(status)]) for status in Status]
    return ", ".join(f"{count} {status}" for status, count in counts if count)


def _definitions(rows: Sequence[Cell], reference: dict[tuple[str, str], Cell], frame: pd.DataFrame) -> Iterator[str]:
    same = _same_everywhere(rows, ("model", "dataset"))
    if len({row["learning_rate"] for row in rows}) == 1:
        rate = f"learning rate {show_rate(rows[0]['learning_rate'])}"
        same = f"{same}, {rate}" if same else rate
    if same:
        yield f"The same in every row: {same}."
    yield f"{NOTE_N} Step time: median over runs of each run's median step (smallest{EN_DASH}largest)."
    heads = sorted(set(frame.loc[frame["status"] == Status.FINISHED.value, "num_head_params"].dropna()))
    sizes = " or ".join(format_value("num_head_params", head) for head in heads)
    yield (
        "Trainable: share of all parameters (base, adapter and head) that were trained (adapter and head; the base too "
        f"in full fine-tuning). Adapter params leave the head out{f', which has {sizes}' if heads else ''}."
    )
    yield "Peak memory: bytes of live tensors at the peak of a training step. Checkpoint: what the run saved."
    if reference and len(rows) > len(reference):
        yield f"/ full: ratio to full fine-tuning on the same model and dataset; below 1{TIMES} is less."


_COSTS = (
    "num_adapter_params",
    "num_head_params",
    "num_trainable_params",
    "num_total_params",
    "peak_memory_bytes",
    "weights_bytes",
    "gradients_bytes",
    "optimizer_bytes",
    "activations_bytes",
    "cuda_peak_allocated_bytes",
    "cuda_peak_reserved_bytes",
    "peak_rss_bytes",
    "train_seconds",
)


def costs(best: pd.DataFrame) -> PaperTable | None:
    """What the cost of every condition is made of: parameters, and the parts of the memory peak."""
    rows = _records(best)
    names = [name for name in _COSTS if name in best and best[f"{name}_n"].any()]
    if not names:
        return None
    keys = _key_columns(rows)
    return PaperTable(
        name="costs",
        caption="What the costs are made of.",
        text=text_table([*keys, *(_metric_column(rows, name) for name in names)], num_key_columns=len(keys)),
        numbers=best[[*_NAMES, *_with_spread(best, names)]],
        notes=[
            "Peak memory is the sum of weights, gradients, optimizer and activations at the moment of the peak, in "
            "bytes of live tensors. Peak RSS: of the whole process, the test split included.",
            "Trainable params: adapter and head, and the base in full fine-tuning; counted from shapes.",
            *_recipe_notes(rows),
        ],
        run_ids=_run_ids(rows),
        methods=_methods(rows),
    )


_NAMES = ["model", "dataset", "method", "rank", "target_layers", "learning_rate"]


def _with_spread(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    endings = ("", "_sd", "_min", "_max", "_n", "_ci")
    return [f"{name}{ending}" for name in names for ending in endings if f"{name}{ending}" in table]


def _recipe_notes(rows: Sequence[Cell]) -> list[str]:
    """Only that marks are explained elsewhere: the list may be long, and stands under the trade-off table."""
    numbers = sorted({row["recipe"] for row in rows if row["recipe"] is not None})
    marks = ", ".join(f"[{number}]" for number in numbers)
    return [f"{marks}: differs in recipe or environment, as told under the trade-off table."] if numbers else []


# ---------------------------------------------------------------- summary


_SUMMARY = (
    ("parameters updated", "num_trainable_params"),
    ("peak memory", "peak_memory_bytes"),
    ("time of a step", "step_seconds_median"),
    ("throughput", "train_tokens_per_second"),
    ("storage per task", "checkpoint_bytes"),
)


def summary(best: pd.DataFrame) -> PaperTable | None:
    """Full fine-tuning against the cheapest LoRA cell within noise of the best one, for each model and dataset."""
    records = _records(best)
    texts: list[list[str]] = []
    numbers: list[dict[str, Any]] = []
    notes: list[str] = []
    for indices in _groups(records):
        rows = [records[index] for index in indices]
        full = next((row for row in rows if _is_full(row) and row[num_status(Status.FINISHED)]), None)
        chosen = _cheapest_within_noise([row for row in rows if _is_lora(row)])
        if full is None or chosen is None:
            continue
        where = f"{full['model']} on {full['dataset']}"
        lora, why = chosen
        notes.append(f"{where}: LoRA is {_name(lora)}, {why}.")
        quality = [
            (f"quality ({score(full, split).replace('_', ' ')})", score(full, split)) for split in ("val", "test")
        ]
        for what, name in (*_SUMMARY, *quality):
            ratio = _ratio(lora, full, name)
            difference = _difference(lora, full, name) if is_score(name) else None
            compared = MISSING if ratio is None else f"{ratio:.3g}{TIMES}"
            unit = metric(name).display_unit if name in best else ""
            texts.append(
                [
                    where,
                    what + (f" ({unit})" if unit else ""),
                    show_metric(full, name),
                    show_metric(lora, name),
                    difference or compared,
                ]
            )
            numbers.append(
                {
                    "model": full["model"],
                    "dataset": full["dataset"],
                    "metric": name,
                    "full": full.get(name),
                    "lora": lora.get(name),
                    "ratio": ratio,
                    "lora_rank": lora["rank"],
                    "lora_target_layers": lora["target_layers"],
                }
            )
    if not texts:
        return None
    titles = ["", "", "full fine-tuning", "LoRA", "LoRA against full"]
    columns = [Column(name, [row[index] for row in texts]) for index, name in enumerate(titles)]
    columns = columns[1:] if len(notes) == 1 else columns
    return PaperTable(
        name="summary",
        caption="Full fine-tuning against LoRA in one look.",
        text=text_table(columns, num_key_columns=len(columns) - 3),
        numbers=pd.DataFrame(numbers, dtype=object),
        notes=notes,
    )


def _difference(row: Cell, reference: Cell, name: str) -> str | None:
    if not row.get(f"{name}_n", 0) or not reference.get(f"{name}_n", 0):
        return None
    sign = f"{row[name] - reference[name]:+.4f}".replace("-", "\N{MINUS SIGN}")
    probability = p_value(row, reference, name)
    if probability is None:
        return f"{sign} (one seed: noise unknown)"
    return f"{sign} ({'within' if probability >= 0.05 else 'beyond'} noise)"


def _cheapest_within_noise(rows: Sequence[Cell]) -> tuple[Cell, str] | None:
    """The cell with the fewest adapter parameters that val does not tell from the best, and why it was taken.

    Of the cells with the most finished runs: the survivors of a cell that half failed are not its quality.
    """
    most = max((row[num_status(Status.FINISHED)] for row in rows), default=0)
    complete = [row for row in rows if row[num_status(Status.FINISHED)] == most]
    name = score(rows[0], "val") if rows else ""
    ranked = [complete[index] for index in ranked_by(complete, name)] if rows else []
    if not ranked:
        return None
    best = ranked[0]
    probabilities = [p_value(row, best, name) for row in ranked[1:]]
    if all(probability is None for probability in probabilities):
        return best, "the best on val (too few seeds to know what lies within noise)"
    within = [best] + [
        row
        for row, probability in zip(ranked[1:], probabilities, strict=True)
        if probability is not None and probability >= 0.05
    ]
    cheapest = min(within, key=lambda row: row["num_adapter_params"])
    if cheapest is best:
        return best, "the best on val, and no smaller adapter lies within noise of it (Welch's t-test)"
    return cheapest, f"the smallest adapter that val does not tell from the best ({_name(best)}) by Welch's t-test"


# ---------------------------------------------------------------- rank x target layers


def rank_by_target_layers(best: pd.DataFrame, *, published: bool = False) -> PaperTable | None:
    """Scores of every placement (rows) at every rank (columns): the form of the LoRA paper's Table 6."""
    rows = [row for row in _records(best) if _is_lora(row)]
    ranks = sorted({row["rank"] for row in rows})
    if len(ranks) < 2 or len({row["target_layers"] for row in rows}) < 2:
        return None
    lines: list[dict[str, Any]] = []
    for indices in _groups(rows):
        group = [rows[index] for index in indices]
        for split in ("val", "test"):
            name = score(group[0], split)
            winner = best_beyond_noise(group, name)
            lines += _by_placement(group, name, None if winner is None else group[winner])
    quoted = [
        {
            "keys": (f"{found.model}, {found.dataset} ({QUOTED_MARK} quoted)", found.metric, found.target_layers),
            "cells": found.by_rank,
            "bold": set(),
            "run_ids": (),
        }
        for found in (quoted_rows("rank_by_target_layers") if published else [])
    ]
    ranks = sorted({*ranks, *(rank for line in quoted for rank in line["cells"])})
    columns = [
        Column(head, [line["keys"][index] for line in (*lines, *quoted)])
        for index, head in enumerate(("model, dataset", "metric", "target layers"))
    ]
    for rank in ranks:
        texts = [line["cells"].get(rank, (MISSING, None))[0] for line in (*lines, *quoted)]
        values = [line["cells"].get(rank, (MISSING, None))[1] for line in (*lines, *quoted)]
        bold = frozenset(index for index, line in enumerate(lines) if rank in line["bold"])
        columns.append(Column(f"rank {rank}", texts, values, bold))
    ends = frozenset(
        index for index, line in enumerate(lines[:-1]) if line["keys"][:2] != lines[index + 1]["keys"][:2]
    ) | ({len(lines) - 1} if quoted else set())
    names = [score(row, split) for row in rows for split in ("val", "test")]
    return PaperTable(
        name="rank_by_target_layers",
        caption="Rank by target layers: scores of LoRA at every rank and placement.",
        text=text_table(columns, num_key_columns=3, rules=frozenset(ends)),
        numbers=_long_numbers(rows, ("val", "test")),
        notes=[
            *_reference_notes(_records(best)),
            NOTE_N,
            _bold_note(rows, names).replace("row", "cell"),
            *_edge_notes(rows),
            *_recipe_notes(rows),
            *_quoted_notes("rank_by_target_layers", published),
        ],
        run_ids=[line["run_ids"] for line in (*lines, *quoted)],
        methods=[*["lora"] * len(lines), *[""] * len(quoted)],
    )


def _by_placement(group: Sequence[Cell], name: str, winner: Cell | None) -> list[dict[str, Any]]:
    """A line per placement; a second one where a rank is there twice, in two recipes."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for row in sorted(group, key=lambda row: row["recipe"] is not None):
        keys = (f"{row['model']}, {row['dataset']}", title(name), row["target_layers"])
        number = 0
        while row["rank"] in lines.get((row["target_layers"], number), {"cells": {}})["cells"]:
            number += 1
        new = {"keys": keys, "cells": {}, "bold": set(), "run_ids": ()}
        line = lines.setdefault((row["target_layers"], number), new)
        has_value = bool(row.get(f"{name}_n", 0))
        text = show_metric(row, name) if has_value else _show_status(row)
        num_finished, num_runs = row[num_status(Status.FINISHED)], len(row["run_ids"])
        text += f" ({num_finished} of {num_runs} runs)" if has_value and num_finished < num_runs else ""
        text += (EDGE_MARK if row["edge"] else "") + _recipe_mark(row)
        line["cells"][row["rank"]] = (text, row[name] if has_value else None)
        line["run_ids"] += row["run_ids"]
        if row is winner:
            line["bold"].add(row["rank"])
    return list(lines.values())


def _reference_notes(rows: Sequence[Cell]) -> Iterator[str]:
    """Full fine-tuning and the head alone, which have no rank and no placement."""
    for row in rows:
        if _is_lora(row) or not row[num_status(Status.FINISHED)]:
            continue
        texts = [f"{split} {show_metric(row, score(row, split))}" for split in ("val", "test")]
        yield (
            f"For comparison, {'full fine-tuning' if _is_full(row) else 'the head alone'} of {row['model']} on "
            f"{row['dataset']}: {', '.join(texts)} (n={row[num_status(Status.FINISHED)]})."
        )


def _long_numbers(rows: Sequence[Cell], splits: Sequence[str]) -> pd.DataFrame:
    lines = []
    for row in rows:
        for split in splits:
            name = score(row, split)
            lines.append(
                {
                    **{key: row[key] for key in _NAMES},
                    "num_adapter_params": row.get("num_adapter_params"),
                    "metric": name,
                    "mean": row.get(name),
                    "sd": row.get(f"{name}_sd"),
                    "ci": row.get(f"{name}_ci"),
                    "n": row.get(f"{name}_n", 0),
                    "edge": row["edge"],
                }
            )
    return pd.DataFrame(lines, dtype=object)


def _quoted_notes(form: str, published: bool) -> Iterator[str]:
    if published:
        for found in dict.fromkeys(row.source for row in quoted_rows(form)):
            yield f"{QUOTED_MARK} quoted, not measured here and in no statistic: {found}."
        for note in dict.fromkeys(row.note for row in quoted_rows(form) if row.note):
            yield f"{QUOTED_MARK} {note}."


# ---------------------------------------------------------------- target layers at one budget

# Counts of one budget lie within this factor of each other; a real rank sweep does not.
_BUDGET_SPREAD = 1.5


def target_layers_at_budget(best: pd.DataFrame, *, published: bool = False) -> PaperTable | None:
    """Every placement at one parameter budget, with exact counts: the form of the LoRA paper's Table 5."""
    rows = [row for row in _records(best) if _is_lora(row) and row.get("num_adapter_params_n", 0)]
    placements = Counter((row["model"], row["dataset"], row["target_layers"]) for row in rows)
    counts = [row["num_adapter_params"] for row in rows]
    if len({row["target_layers"] for row in rows}) < 3 or max(placements.values()) > 1:
        return None
    if len({row["rank"] for row in rows}) < 2 or max(counts) > _BUDGET_SPREAD * min(counts):
        return None
    budget = Counter(counts).most_common(1)[0][0]
    quoted = quoted_rows("target_layers_at_budget") if published else []
    names = [name for name in score_columns(best) if name in best]
    keys = [
        Column("target layers", [*(row["target_layers"] for row in rows), *(row.target_layers for row in quoted)]),
        Column(
            "rank",
            [*(str(row["rank"]) for row in rows), *(str(row.rank) for row in quoted)],
            [*_ranks(rows), *(float(row.rank) if row.rank else None for row in quoted)],
        ),
    ]
    deviations = [row["num_adapter_params"] / budget - 1 for row in rows]
    columns = [
        *_named_where_several(rows, quoted),
        *keys,
        _with_quoted(_metric_column(rows, "num_adapter_params"), [row.params for row in quoted]),
        _with_quoted(
            Column("off budget (%)", [f"{100 * value:+.1f}" if value else "0" for value in deviations], deviations),
            [MISSING] * len(quoted),
        ),
        *(
            _with_quoted(
                _metric_column(rows, name, bold=_bold(rows, name)),
                [row.text if f"test_{row.metric}" == name else MISSING for row in quoted],
            )
            for name in names
        ),
        _with_quoted(_num_finished_column(rows), [MISSING] * len(quoted)),
    ]
    if quoted and not any(f"test_{row.metric}" in names for row in quoted):
        texts = [*[MISSING] * len(rows), *(f"{row.metric} {row.text}" for row in quoted)]
        columns.append(Column(f"score {QUOTED_MARK}", texts, [None] * len(texts)))
    return PaperTable(
        name="target_layers_at_budget",
        caption=f"Target layers at one budget of {budget:,.0f} adapter parameters.",
        text=text_table(columns, num_key_columns=len(columns) - 3 - len(names), rules=_rule_before(rows, quoted)),
        numbers=_long_numbers(rows, ("val", "test")),
        notes=[
            f"Budget: the count that most rows have, {budget:,.0f}. Counts are exact, heads left out.",
            *_reference_notes(_records(best)),
            NOTE_N,
            _bold_note(rows, names),
            *_edge_notes(rows),
            *_recipe_notes(rows),
            *_quoted_notes("target_layers_at_budget", published),
        ],
        run_ids=[*_run_ids(rows), *[()] * len(quoted)],
        methods=[*_methods(rows), *[""] * len(quoted)],
    )


def _rule_before(rows: Sequence[Cell], quoted: Sequence[Published]) -> frozenset[int]:
    return frozenset([len(rows) - 1]) if quoted else frozenset()


def _with_quoted(column: Column, texts: Sequence[str]) -> Column:
    """A column of measured numbers with quoted ones underneath, which are text and nothing else."""
    values = None if column.values is None else [*column.values, *[None] * len(texts)]
    return Column(column.title, [*column.texts, *texts], values, column.bold)


def _named_where_several(rows: Sequence[Cell], quoted: Sequence[Published]) -> list[Column]:
    named = [(row["model"], row["dataset"]) for row in rows]
    named += [(f"{row.model} ({QUOTED_MARK} quoted)", row.dataset) for row in quoted]
    if len(set(named)) == 1:
        return []
    return [Column(head, [pair[index] for pair in named]) for index, head in enumerate(("model", "dataset"))]


# ---------------------------------------------------------------- rank sweep


def rank_sweep(best: pd.DataFrame, *, published: bool = False) -> PaperTable | None:
    """Every rank of a placement with its parameters, nll and scores: the form of the LoRA paper's Table 18."""
    candidates = [row for row in _records(best) if _is_lora(row)]
    num_ranks = Counter((row["model"], row["dataset"], row["target_layers"]) for row in candidates)
    rows = [row for row in candidates if num_ranks[row["model"], row["dataset"], row["target_layers"]] >= 3]
    if not rows:
        return None
    rows.sort(key=lambda row: (row["model"], row["dataset"], row["target_layers"], row["rank"]))
    quoted = quoted_rows("rank_sweep") if published else []
    names = [name for name in ("val_nll", "test_nll", *score_columns(best)) if name in best]
    placements = [row["target_layers"] + _recipe_mark(row) for row in rows]
    columns = [
        *_named_where_several(rows, quoted),
        Column("target layers", [*placements, *(row.target_layers for row in quoted)]),
        _with_quoted(
            Column("rank", [str(row["rank"]) for row in rows], _ranks(rows)), [str(row.rank) for row in quoted]
        ),
        _with_quoted(_metric_column(rows, "num_adapter_params"), [row.params for row in quoted]),
    ]
    num_key_columns = len(columns) - 1
    for name in names:
        texts = [row.scores.get(name, MISSING) for row in quoted]
        columns.append(_with_quoted(_metric_column(rows, name, bold=_bold_by_placement(rows, name)), texts))
    if quoted:
        columns.append(
            Column(
                f"BLEU {QUOTED_MARK}",
                [*[MISSING] * len(rows), *(row.text for row in quoted)],
                [None] * (len(rows) + len(quoted)),
            )
        )
    columns.append(_with_quoted(_num_finished_column(rows), [MISSING] * len(quoted)))
    return PaperTable(
        name="rank_sweep",
        caption="Rank sweep: parameters, negative log-likelihood and scores at every rank.",
        text=text_table(
            columns, num_key_columns=num_key_columns, rules=_ends_of_placements(rows) | _rule_before(rows, quoted)
        ),
        numbers=best.loc[[row["cell_id"] in {one["cell_id"] for one in rows} for row in _records(best)]][
            [*_NAMES, *_with_spread(best, ["num_adapter_params", *names])]
        ],
        notes=[
            *_reference_notes(_records(best)),
            NOTE_N,
            _bold_note(rows, names) + " Compared within one placement.",
            *_edge_notes(rows),
            *_recipe_notes(rows),
            *_quoted_notes("rank_sweep", published),
        ],
        run_ids=[*_run_ids(rows), *[()] * len(quoted)],
        methods=[*_methods(rows), *[""] * len(quoted)],
    )


def _bold_by_placement(rows: Sequence[Cell], name: str) -> frozenset[int]:
    found = set()
    for start, end in _stretches(rows):
        best = best_beyond_noise(rows[start:end], name)
        if best is not None:
            found.add(start + best)
    return frozenset(found)


def _ends_of_placements(rows: Sequence[Cell]) -> frozenset[int]:
    return frozenset(end - 1 for _, end in _stretches(rows)[:-1])


def _stretches(rows: Sequence[Cell]) -> list[tuple[int, int]]:
    keys = [(row["model"], row["dataset"], row["target_layers"]) for row in rows]
    starts = [index for index in range(len(keys)) if index == 0 or keys[index] != keys[index - 1]]
    return list(zip(starts, [*starts[1:], len(keys)], strict=True))


# ---------------------------------------------------------------- tasks x methods


def tasks_by_methods(best: pd.DataFrame, *, published: bool = False) -> PaperTable | None:
    """Test scores of every method (rows) on every dataset (columns) and their mean: the LoRA paper's Table 2."""
    cells_ = _records(best)
    datasets = list(dict.fromkeys(row["dataset"] for row in cells_))
    if len(datasets) < 2:
        return None
    lines: dict[tuple[Any, ...], dict[str, Cell]] = {}
    for row in cells_:
        lines.setdefault(
            (row["model"], row["method"], row["rank"], row["target_layers"], row["differs"]), {}
        ).setdefault(row["dataset"], row)
    first = [next(iter(line.values())) for line in lines.values()]
    quoted = quoted_rows("tasks_by_methods") if published else []
    keys = [
        Column("model", [*(row["model"] for row in first), *(row.model for row in quoted)]),
        Column(
            "method",
            [
                *(row["method"] + _recipe_mark(row) for row in first),
                *(f"{row.method} ({QUOTED_MARK} quoted)" for row in quoted),
            ],
        ),
        _with_quoted(
            Column("rank", [MISSING if row["rank"] is None else str(row["rank"]) for row in first], _ranks(first)),
            [str(row.rank or MISSING) for row in quoted],
        ),
        Column(
            "target layers",
            [*(row["target_layers"] or MISSING for row in first), *(row.target_layers or MISSING for row in quoted)],
        ),
        _with_quoted(_metric_column(first, "num_trainable_params"), [row.params for row in quoted]),
    ]
    columns = list(keys)
    for dataset in datasets:
        columns.append(_task_column(dataset, first, list(lines.values()), quoted))
    columns.append(_average_column(datasets, list(lines.values()), quoted))
    numbers = _long_numbers([row for line in lines.values() for row in line.values()], ("val", "test"))
    return PaperTable(
        name="tasks_by_methods",
        caption="Methods on every task, by each task's metric on test, and their mean.",
        text=text_table(columns, num_key_columns=4, rules=_rule_before(first, quoted)),
        numbers=numbers,
        notes=[
            f"{NOTE_N} Mean: of the tasks' means, only where all have one; it is not tested.",
            _bold_note(cells_, [score(row, "test") for row in cells_]),
            *_edge_notes(cells_),
            *_recipe_notes(cells_),
            *_quoted_notes("tasks_by_methods", published),
        ],
        run_ids=[
            *(tuple(run_id for row in line.values() for run_id in row["run_ids"]) for line in lines.values()),
            *[()] * len(quoted),
        ],
        methods=[*_methods(first), *[""] * len(quoted)],
    )


def _task_column(
    dataset: str, first: Sequence[Cell], lines: Sequence[dict[str, Cell]], quoted: Sequence[Published]
) -> Column:
    present = {index: line[dataset] for index, line in enumerate(lines) if dataset in line}
    name = score(next(iter(present.values())), "test")
    bold: set[int] = set()
    for model in {row["model"] for row in first}:
        indices = [index for index in present if first[index]["model"] == model]
        best = best_beyond_noise([present[index] for index in indices], name)
        if best is not None:
            bold.add(indices[best])
    texts = [show_metric(present[index], name) if index in present else MISSING for index in range(len(lines))]
    values = [
        float(present[index][name]) if index in present and present[index].get(f"{name}_n", 0) else None
        for index in range(len(lines))
    ]
    label = metric(name).label.removeprefix("test ")
    column = Column(f"{dataset} ({label}){_ARROWS[metric(name).direction]}", texts, values, frozenset(bold))
    return _with_quoted(column, [row.scores.get(dataset, MISSING) for row in quoted])


def _average_column(datasets: Sequence[str], lines: Sequence[dict[str, Cell]], quoted: Sequence[Published]) -> Column:
    values: list[float | None] = []
    for line in lines:
        found = [
            float(line[dataset][score(line[dataset], "test")])
            for dataset in datasets
            if dataset in line and line[dataset].get(f"{score(line[dataset], 'test')}_n", 0)
        ]
        values.append(math.fsum(found) / len(found) if len(found) == len(datasets) else None)
    texts = [MISSING if value is None else f"{value:.4f}" for value in values]
    return _with_quoted(Column("mean", texts, values), [row.scores.get("mean", MISSING) for row in quoted])


# ---------------------------------------------------------------- learning rates


def learning_rates(table: pd.DataFrame, best: pd.DataFrame) -> PaperTable | None:
    """Val scores at every learning rate (columns) of every condition, its best rate, and its ratio to that of full."""
    rows = [row for row in _records(best) if len(row["tried"]) > 1]
    if not rows:
        return None
    by_condition: dict[str, dict[float, Cell]] = {}
    for cell in _records(table):
        by_condition.setdefault(cell["condition_id"], {})[cell["learning_rate"]] = cell
    rates = sorted({rate for row in rows for rate in row["tried"]})
    full = {(row["model"], row["dataset"]): row for row in rows if _is_full(row)}
    columns = _key_columns(rows)
    num_key_columns = len(columns)
    for rate in rates:
        found = [by_condition[row["condition_id"]].get(rate) for row in rows]
        columns.append(_rate_column(rate, rows, found))
    columns.append(
        Column(
            "best",
            [show_rate(row["learning_rate"]) + (EDGE_MARK if row["edge"] else "") for row in rows],
            [float(row["learning_rate"]) for row in rows],
        )
    )
    if full:
        ratios = [
            row["learning_rate"] / full[row["model"], row["dataset"]]["learning_rate"]
            if (row["model"], row["dataset"]) in full
            else None
            for row in rows
        ]
        texts = [MISSING if ratio is None else f"{ratio:.3g}{TIMES}" for ratio in ratios]
        columns.append(Column("best / full's", texts, ratios))
    shown = [cell for row in rows for cell in by_condition[row["condition_id"]].values()]
    names = sorted({score(row, "val") for row in rows})
    return PaperTable(
        name="learning_rates",
        caption=f"Learning rates: {' or '.join(title(name) for name in names)} at every rate.",
        text=text_table(columns, num_key_columns=num_key_columns),
        numbers=_long_numbers([{**cell, "edge": None} for cell in shown], ("val", "test")),
        notes=[
            NOTE_N,
            "Bold: the best rate of the row, by the mean over seeds on val; this marks the choice and is no test of a "
            "difference.",
            *_edge_notes(rows),
            *_recipe_notes(rows),
        ],
        run_ids=[
            tuple(run_id for cell in by_condition[row["condition_id"]].values() for run_id in cell["run_ids"])
            for row in rows
        ],
        methods=_methods(rows),
    )


def _rate_column(rate: float, rows: Sequence[Cell], found: Sequence[Cell | None]) -> Column:
    texts: list[str] = []
    values: list[float | None] = []
    bold: set[int] = set()
    for index, (row, cell) in enumerate(zip(rows, found, strict=True)):
        name = score(row, "val")
        if cell is None:
            texts.append(MISSING)
            values.append(None)
            continue
        has_value = bool(cell.get(f"{name}_n", 0))
        num_failed = sum(cell[num_status(status)] for status in Status if status is not Status.FINISHED)
        text = show_metric(cell, name) if has_value else _show_status(cell)
        texts.append(f"{text} ({num_failed} failed)" if has_value and num_failed else text)
        values.append(float(cell[name]) if has_value else None)
        if has_value and rate == row["learning_rate"]:
            bold.add(index)
    return Column(show_rate(rate), texts, values, frozenset(bold))
