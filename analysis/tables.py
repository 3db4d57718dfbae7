"""The tables of a sweep, each a function from cells to a `PaperTable`, or None where the sweep has nothing for it.

Numbers keep the stored units until they are turned into text here, by the METRICS registry. Rows are conditions at
their best learning rate, chosen on val alone. Bold is what differs from the runner-up beyond noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from analysis.formats import Column, PaperTable, as_code, text_table
from analysis.forms import learning_rates, rank_by_target_layers, rank_sweep, target_layers_at_budget, tasks_by_methods
from analysis.names import name_notes
from analysis.rows import (
    CELL_NAMES,
    EN_DASH,
    MISSING,
    NOTE_N,
    TIMES,
    Cell,
    as_rows,
    best_metrics_of,
    best_rows,
    bold_note,
    cell_name,
    collapsed_note,
    comparison_of,
    count_note,
    edge_mark,
    edge_notes,
    failure_notes,
    forgetting_notes,
    format_spread,
    format_value,
    full_of,
    is_full,
    is_lora,
    key_columns,
    learning_rate_column,
    methods_of,
    metric_column,
    num_finished_column,
    ratio_to,
    recipe_mark,
    recipe_notes,
    run_ids_of,
    same_everywhere,
    selection_rule,
    setting_note,
    show_metric,
    show_rate,
    show_status,
    warnings,
    with_spread,
)
from analysis.select import (
    CONFIDENCE,
    FORGETTING,
    GENERATION_SCORES,
    MARGIN,
    TRAINABLE_SHARE,
    best_cells,
    equivalence_margin,
    further_scores,
    generation_scores,
    is_equivalent,
    is_score,
    metric,
    num_status,
    p_value,
    ranked_by,
    score,
    score_columns,
)
from harness.results.schema import Status

# Ratios to full fine-tuning on the same model and dataset: title, metric.
_RATIOS = {"peak_memory_bytes": "memory", "step_seconds_median": "time", "train_flops": "compute"}


def paper_tables(
    frame: pd.DataFrame,
    table: pd.DataFrame,
    *,
    scores: str = "best",
    published: bool = False,
    margin: float = MARGIN,
) -> list[PaperTable]:
    """Every table that the runs of a sweep allow, the trade-off first.

    Args:
        frame: a row per run, from `load_runs`.
        table: a row per cell, from `select.cells` of that frame.
        scores: "best" or "last": which step the scores in both are of, for the captions.
        published: whether quoted rows of papers stand under the measured ones.
        margin: how much of a metric's scale a difference may be and still not matter.
    """
    best = best_cells(table)
    found = [
        summary(best, margin=margin),
        costs(best),
        rank_by_target_layers(best, published=published),
        target_layers_at_budget(best, published=published),
        rank_sweep(best, published=published),
        tasks_by_methods(best, published=published),
        learning_rates(table, best),
    ]
    # Each is pasted alone, and must say by itself what it is about.
    setting = setting_note(as_rows(best), scores)
    others = [replace(one, notes=[setting, *one.notes]) for one in found if one is not None]
    return [tradeoff(best, frame, scores=scores), *others]


# ---------------------------------------------------------------- trade-off


def tradeoff(best: pd.DataFrame, frame: pd.DataFrame, *, scores: str = "best") -> PaperTable:
    """Cost and quality of every condition, with ratios to full fine-tuning."""
    rows = as_rows(best)
    columns = key_columns(rows)
    if len({row["learning_rate"] for row in rows}) > 1 or any(map(edge_mark, rows)):
        columns.append(learning_rate_column(rows))
    num_key_columns = len(columns)
    reference = full_of(rows)
    for name in (
        "num_adapter_params",
        TRAINABLE_SHARE,
        "peak_memory_bytes",
        "step_seconds_median",
        "train_tokens_per_second",
        "checkpoint_bytes",
    ):
        if name in best and (best[f"{name}_n"].any() or name != "train_tokens_per_second"):
            columns.append(metric_column(rows, name))
            if name in _RATIOS and len(rows) > len(reference) > 0:
                columns.append(_ratio_column(rows, reference, name))
    score_names = _score_names(best, frame)
    columns += [metric_column(rows, name, bold=best_rows(rows, name)) for name in score_names]
    columns.append(num_finished_column(rows))
    if any(row[num_status(status)] for row in rows for status in Status if status is not Status.FINISHED):
        columns.append(Column("status", [show_status(row) for row in rows]))
    text = text_table(columns, num_key_columns=num_key_columns)
    return PaperTable(
        name="tradeoff",
        caption=f"Cost and quality. {_sentence(selection_rule(best_metrics_of(rows), scores))}",
        text=text,
        numbers=best.drop(columns="by_seed"),
        notes=[
            *_definitions(rows, reference, frame),
            *name_notes(frame),
            *forgetting_notes(rows),
            *_generation_notes(score_names, frame, scores),
            *bold_note(rows, score_names, any_bold=bool(text.bold)),
            *edge_notes(rows),
            *warnings(rows, frame),
            *failure_notes(frame),
        ],
        run_ids=run_ids_of(rows),
        methods=methods_of(rows),
    )


def _score_names(best: pd.DataFrame, frame: pd.DataFrame) -> list[str]:
    """By what each dataset is judged, on both splits, then on test alone what else it names, then forgetting."""
    names = [*score_columns(best), *further_scores(frame)]
    if FORGETTING in best and best[f"{FORGETTING}_n"].any():
        names.append(FORGETTING)
    return [name for name in dict.fromkeys(names) if name in best]


def _generation_notes(names: Sequence[str], frame: pd.DataFrame, scores: str) -> Iterator[str]:
    """How the scores of generated texts were computed, in the words of the libraries that did."""
    for score_name in GENERATION_SCORES:
        column = f"environment.generation_signatures.{score_name}"
        if f"test_{score_name}" in names and column in frame:
            signatures = " or ".join(as_code(text) for text in dict.fromkeys(frame[column].dropna()))
            yield f"{metric(f'test_{score_name}').label}: {signatures}."
    asked = {name for metrics in frame.get("config.dataset.metrics", ()) for name in metrics or ()}
    if scores == "last" and asked.intersection(GENERATION_SCORES):
        yield "Texts were generated at the best step alone, so the last step has no score of them."


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _ratio_column(rows: Sequence[Cell], reference: dict[tuple[str, str, str], Cell], name: str) -> Column:
    ratios = [ratio_to(row, reference.get(comparison_of(row)), name) for row in rows]
    texts = [MISSING if ratio is None else f"{ratio:.2f}{TIMES}" for ratio in ratios]
    return Column(f"{_RATIOS[name]} / full", texts, ratios)


def _definitions(
    rows: Sequence[Cell], reference: dict[tuple[str, str, str], Cell], frame: pd.DataFrame
) -> Iterator[str]:
    same = same_everywhere(rows, ("model", "dataset"))
    if len({row["learning_rate"] for row in rows}) == 1:
        rate = f"learning rate {show_rate(rows[0]['learning_rate'])}"
        same = f"{same}, {rate}" if same else rate
    if same:
        yield f"The same in every row: {same}."
    yield f"{NOTE_N} Step time: median over runs of each run's median step (smallest{EN_DASH}largest)."
    heads = sorted(set(frame.loc[frame["status"] == Status.FINISHED.value, "num_head_params"].dropna()) - {0})
    sizes = " or ".join(format_value("num_head_params", head) for head in heads)
    yield (
        "Trainable: share of all parameters (base, adapter and head) that were trained (adapter and head; the base too "
        f"in full fine-tuning). Adapter params leave the head out{f', which has {sizes}' if heads else ''}."
    )
    yield "Peak memory: bytes of live tensors at the peak of a training step. Checkpoint: what the run saved."
    if reference and len(rows) > len(reference):
        yield f"/ full: {NOTE_RATIO}"


NOTE_RATIO = (
    "ratio to full fine-tuning of the same model, dataset and recipe (every setting but the learning rate and those of "
    f"the method), for times also on the same device; {EN_DASH} where that was not run; below 1{TIMES} is less."
)


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
    "train_flops",
)


def costs(best: pd.DataFrame) -> PaperTable | None:
    """What the cost of every condition is made of: parameters, and the parts of the memory peak."""
    rows = as_rows(best)
    names = [name for name in _COSTS if name in best and best[f"{name}_n"].any()]
    if "num_head_params" in names and not best["num_head_params"].fillna(0).any():
        names.remove("num_head_params")  # language models have no head of their own
    if not names:
        return None
    keys = key_columns(rows)
    columns = [*keys, *(metric_column(rows, name) for name in names)]
    reference = full_of(rows)
    has_ratio = "train_flops" in names and len(rows) > len(reference) > 0
    if has_ratio:
        columns.append(_ratio_column(rows, reference, "train_flops"))
    return PaperTable(
        name="costs",
        caption="What the costs are made of.",
        text=text_table(columns, num_key_columns=len(keys)),
        numbers=best[[*CELL_NAMES, *with_spread(best, names)]],
        notes=[
            "Peak memory is the sum of weights, gradients, optimizer and activations at the moment of the peak, in "
            "bytes of live tensors. Peak RSS: of the whole process, the test split included.",
            "Trainable params: adapter and head, and the base in full fine-tuning; counted from shapes.",
            *([NOTE_COMPUTE] if "train_flops" in names else []),
            *([f"/ full: {NOTE_RATIO}"] if has_ratio else []),
            count_note(rows),
            *recipe_notes(rows),
        ],
        run_ids=run_ids_of(rows),
        methods=methods_of(rows),
    )


NOTE_COMPUTE = (
    "Training compute: multiplications and additions of all training steps, forward and backward, by formula from "
    "shapes and numbers of tokens."
)


# ---------------------------------------------------------------- summary


_SUMMARY = (
    ("parameters updated", "num_trainable_params"),
    ("peak memory", "peak_memory_bytes"),
    ("time of a step", "step_seconds_median"),
    ("throughput", "train_tokens_per_second"),
    ("storage per task", "checkpoint_bytes"),
)


def summary(best: pd.DataFrame, *, margin: float = MARGIN) -> PaperTable | None:
    """Full fine-tuning against the smallest LoRA adapter as good as the best one, for each model, dataset and recipe.

    Args:
        best: a row per condition, from `select.best_cells`.
        margin: how much of a metric's scale a difference may be and still not matter (`select.equivalence_margin`).
    """
    records = as_rows(best)
    texts: list[list[str]] = []
    numbers: list[dict[str, Any]] = []
    notes: list[str] = []
    compared_rows: list[Cell] = []
    references = full_of(records)
    for comparison, full in references.items():
        candidates = [row for row in records if is_lora(row) and comparison_of(row) == comparison]
        # What differs in its own settings or environment is not compared where there is something that does not.
        alike = [row for row in candidates if row["recipe"] == full["recipe"]]
        chosen = _smallest_as_good(alike, margin) or _smallest_as_good(candidates, margin)
        if chosen is None:
            continue
        is_one_of_several = sum(other[:2] == comparison[:2] for other in references) > 1
        where = f"{full['model']} on {full['dataset']}" + (recipe_mark(full) if is_one_of_several else "")
        lora, why = chosen
        compared_rows += [full, lora]
        notes.append(f"{where}: LoRA is {cell_name(lora)}{recipe_mark(lora)}, {why}.")
        quality = [
            (f"quality ({score(full, split).replace('_', ' ')})", score(full, split)) for split in ("val", "test")
        ]
        optional = [
            ("training compute", "train_flops"),
            *quality,
            *((f"quality ({metric(name).label})", name) for name in generation_scores(best)),
            ("forgetting (nll)", FORGETTING),
        ]
        optional = [line for line in optional if line in quality or _has_either(full, lora, line[1])]
        for what, name in (*_SUMMARY, *optional):
            # Nothing, or less than nothing, may have been forgotten: then a ratio says nothing.
            ratio = ratio_to(lora, full, name) if name != FORGETTING else None
            difference = _difference(lora, full, name, margin) if is_score(name) else None
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
                    "full_sd": full.get(f"{name}_sd"),
                    "lora_sd": lora.get(f"{name}_sd"),
                    "full_n": full.get(f"{name}_n", 0),
                    "lora_n": lora.get(f"{name}_n", 0),
                    "recipe_id": full["recipe_id"],
                    "ratio": ratio,
                    "margin": equivalence_margin(name, full[name], margin) if difference else None,
                    "lora_rank": lora["rank"],
                    "lora_target_layers": lora["target_layers"],
                }
            )
    if not texts:
        return None
    titles = ["", "", "full fine-tuning", "LoRA", "LoRA against full"]
    columns = [Column(name, [row[index] for row in texts]) for index, name in enumerate(titles)]
    columns = columns[1:] if len(notes) == 1 else columns
    notes += [
        _note_equivalent(compared_rows, margin),
        *forgetting_notes(compared_rows),
        count_note(compared_rows),
        *collapsed_note(compared_rows),
        *recipe_notes(compared_rows),
    ]
    return PaperTable(
        name="summary",
        caption="Full fine-tuning against LoRA in one look.",
        text=text_table(columns, num_key_columns=len(columns) - 3),
        numbers=pd.DataFrame(numbers, dtype=object),
        notes=notes,
    )


def _has_either(row: Cell, other: Cell, name: str) -> bool:
    return bool(row.get(f"{name}_n", 0) or other.get(f"{name}_n", 0))


def _difference(row: Cell, reference: Cell, name: str, fraction: float) -> str | None:
    if not row.get(f"{name}_n", 0) or not reference.get(f"{name}_n", 0):
        return None
    value = row[name] - reference[name]
    sign = f"{'+' if value >= 0 else MINUS}{format_spread(name, abs(value))}"
    margin = equivalence_margin(name, reference[name], fraction)
    if is_equivalent(row, reference, name, margin):
        return f"{sign} (equivalent)"
    probability = p_value(row, reference, name)
    if probability is None:
        return f"{sign} (noise unknown)"
    return f"{sign} ({'beyond noise' if probability < 1 - CONFIDENCE else 'inconclusive'})"


MINUS = "\N{MINUS SIGN}"


def _note_equivalent(rows: Sequence[Cell], fraction: float) -> str:
    names = dict.fromkeys(score(row, split) for row in rows for split in ("val", "test"))
    margins = dict.fromkeys(
        f"{format_spread(name, equivalence_margin(name, row[name], fraction))} of {metric(name).label}"
        for row in rows
        if is_full(row)
        for name in names
        if row.get(f"{name}_n", 0)
    )
    margin = f"{' or '.join(margins)}" if margins else f"{fraction:g} of a metric's scale"
    return (
        f"Equivalent: the 90 % interval of the difference lies within ± the margin ({margin}): two one-sided t-tests "
        "at 5 % (TOST). Beyond noise: p < 0.05 by the two-sided t-test. Inconclusive: neither. Both tests are paired "
        "by seed where both sides have the same seeds, else Welch's, and need two runs on each side."
    )


def _smallest_as_good(rows: Sequence[Cell], fraction: float) -> tuple[Cell, str] | None:
    """The cell with the fewest adapter parameters that is as good on val as the best one, and why it was taken.

    Of the cells with the most finished runs: the survivors of a cell that half failed are not its quality. As good
    means shown to be within the margin; that a difference was not found, with two seeds, shows nothing.
    """
    most = max((row[num_status(Status.FINISHED)] for row in rows), default=0)
    complete = [row for row in rows if row[num_status(Status.FINISHED)] == most]
    name = score(rows[0], "val") if rows else ""
    ranked = [complete[index] for index in ranked_by(complete, name)] if rows else []
    if not ranked:
        return None
    best = ranked[0]
    margin = equivalence_margin(name, best[name], fraction)
    if len(ranked) == 1:
        return best, "the only one of its recipe with as many finished runs"
    if max(row[f"{name}_n"] for row in ranked) < 2:
        return best, "the best on val (one seed: none can be shown to be as good)"
    as_good = [row for row in ranked[1:] if is_equivalent(row, best, name, margin)]
    smaller = [row for row in as_good if row.get("num_adapter_params_n", 0) and _is_smaller(row, best)]
    within = f"within {format_spread(name, margin)} of {metric(name).label}"
    if not smaller:
        return best, f"the best on val, and no smaller adapter is shown to be as good ({within})"
    cheapest = min(smaller, key=lambda row: row["num_adapter_params"])
    return cheapest, f"the smallest adapter shown to be as good on val as the best ({cell_name(best)}; {within})"


def _is_smaller(row: Cell, other: Cell) -> bool:
    return bool(not other.get("num_adapter_params_n", 0) or row["num_adapter_params"] < other["num_adapter_params"])
