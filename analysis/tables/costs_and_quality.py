"""The trade-off table, cost and quality of every condition, and the table of what the costs are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from analysis.axes import own_axes
from analysis.code_spans import as_code
from analysis.comparisons import Cell
from analysis.metrics import (
    FORGETTING,
    FORGETTING_SCORE,
    GENERATION_SCORES,
    NUM_TRIALS,
    TRAINABLE_SHARE,
    TUNING_FLOPS,
    format_value,
    metric,
)
from analysis.names import name_notes, with_names
from analysis.select import additional_scores, num_status, records, score_columns
from analysis.tables.cells import EN_DASH, MISSING, TIMES, same_everywhere, show_rate, show_status
from analysis.tables.columns import (
    cell_names,
    key_columns,
    learning_rate_columns,
    methods_of,
    metric_column,
    num_finished_column,
    run_ids_of,
    with_spread,
)
from analysis.tables.comparable import best_rows, comparison_of, full_of, ratio_to
from analysis.tables.notes import (
    NOTE_N,
    NOTE_RATIO,
    axes_notes,
    best_metrics_of,
    bold_notes,
    count_note,
    edge_notes,
    failure_notes,
    forgetting_notes,
    recipe_notes,
    selection_rule,
    warning_notes,
)
from analysis.tables.structure import Column, PaperTable, text_table
from harness.results.schema import Status

# ---------------------------------------------------------------- trade-off

_TRADEOFF_COSTS = (
    NUM_TRIALS,
    TUNING_FLOPS,
    "num_adapter_params",
    TRAINABLE_SHARE,
    "peak_memory_bytes",
    "step_seconds_median",
    "train_tokens_per_second",
    "checkpoint_bytes",
)
# Costs with a column for their ratio to full fine-tuning, and the first word of its title.
_RATIOS = {"peak_memory_bytes": "memory", "step_seconds_median": "time", "train_flops": "compute"}


def tradeoff(best: pd.DataFrame, frame: pd.DataFrame, *, scores: str = "best") -> PaperTable:
    """Cost and quality of every condition, with ratios to full fine-tuning."""
    rows = records(best)
    named = with_names(frame)
    keys = [*key_columns(rows), *learning_rate_columns(rows)]
    costs = [name for name in _TRADEOFF_COSTS if name in best]
    for name in ("train_tokens_per_second", TUNING_FLOPS):
        if name in costs and not best[f"{name}_n"].any():
            costs.remove(name)
    score_names = _score_names(best, frame)
    columns = [
        *keys,
        *(column for name in costs for column in (metric_column(rows, name), *_ratio_columns(rows, name))),
        *(metric_column(rows, name, bold=best_rows(rows, name)) for name in score_names),
        num_finished_column(rows),
    ]
    if any(row[num_status(status)] for row in rows for status in Status if status is not Status.FINISHED):
        columns.append(Column("status", [show_status(row) for row in rows]))
    text = text_table(columns, num_key_columns=len(keys))
    return PaperTable(
        name="tradeoff",
        caption=f"Cost and quality. {_sentence(selection_rule(best_metrics_of(rows), scores))}",
        text=text,
        numbers=best.drop(columns=["by_seed", "searched", "search_edge", "head_rate"]),
        notes=[
            *_definitions(rows, frame),
            *axes_notes(rows),
            *_following_notes(named),
            *name_notes(frame, named),
            *forgetting_notes(rows),
            *_generation_notes(score_names, frame, scores),
            *bold_notes(rows, score_names, any_bold=bool(text.bold)),
            *edge_notes(rows),
            *warning_notes(rows, frame),
            *failure_notes(frame),
        ],
        run_ids=run_ids_of(rows),
        methods=methods_of(rows),
    )


def _score_names(best: pd.DataFrame, frame: pd.DataFrame) -> list[str]:
    """By what each dataset is judged, on both splits, then on test alone what else it names, then forgetting."""
    names = [*score_columns(best), *additional_scores(frame)]
    names += [name for name in (FORGETTING, FORGETTING_SCORE) if name in best and best[f"{name}_n"].any()]
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


def _following_notes(named: pd.DataFrame) -> Iterator[str]:
    """What differs along with the own axes and has no column."""
    following = own_axes(named).following
    if following:
        yield f"Along with these axes: {'. '.join(following.values())}."


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _ratio_columns(rows: Sequence[Cell], name: str) -> list[Column]:
    """The column with the ratios of a cost to full fine-tuning, where it has one and there is anything to compare."""
    full = full_of(rows)
    if name not in _RATIOS or not len(rows) > len(full) > 0:
        return []
    ratios = [ratio_to(row, full.get(comparison_of(row)), name) for row in rows]
    texts = [MISSING if ratio is None else f"{ratio:.2f}{TIMES}" for ratio in ratios]
    return [Column(f"{_RATIOS[name]} / full", texts, ratios)]


def _definitions(rows: Sequence[Cell], frame: pd.DataFrame) -> Iterator[str]:
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
    if len(rows) > len(full_of(rows)) > 0:
        yield f"/ full: {NOTE_RATIO}"


# ---------------------------------------------------------------- costs

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
NOTE_COMPUTE = (
    "Training compute: multiplications and additions of all training steps, forward and backward, by formula from "
    "shapes and numbers of tokens."
)


def costs(best: pd.DataFrame) -> PaperTable | None:
    """What the cost of every condition is made of: parameters, and the parts of the memory peak."""
    rows = records(best)
    names = [name for name in _COSTS if name in best and best[f"{name}_n"].any()]
    if "num_head_params" in names and not best["num_head_params"].fillna(0).any():
        names.remove("num_head_params")  # a language model has no task head
    if not names:
        return None
    keys = key_columns(rows)
    ratios = _ratio_columns(rows, "train_flops") if "train_flops" in names else []
    return PaperTable(
        name="costs",
        caption="What the costs are made of.",
        text=text_table([*keys, *(metric_column(rows, name) for name in names), *ratios], num_key_columns=len(keys)),
        numbers=best[[*cell_names(best), *with_spread(best, names)]],
        notes=[
            "Peak memory is the sum of weights, gradients, optimizer and activations at the moment of the peak, in "
            "bytes of live tensors. Peak RSS: of the whole process, the test split included.",
            "Trainable params: adapter and head, and the base in full fine-tuning; counted from shapes.",
            *([NOTE_COMPUTE] if "train_flops" in names else []),
            *([f"/ full: {NOTE_RATIO}"] if ratios else []),
            count_note(rows),
            *recipe_notes(rows),
        ],
        run_ids=run_ids_of(rows),
        methods=methods_of(rows),
    )
