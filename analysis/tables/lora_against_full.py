"""The summary: full fine-tuning against the smallest LoRA adapter that is as good as the best one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.axes import axes_of
from analysis.comparisons import (
    CONFIDENCE,
    MARGIN,
    Cell,
    equivalence_margin,
    equivalence_p_value,
    holm,
    p_value,
    ranked_by,
)
from analysis.methods import is_full, method_label, uses_rank
from analysis.metrics import FORGETTING, format_spread, is_score, metric
from analysis.select import generation_scores, num_status, records, score
from analysis.tables.cells import MISSING, TIMES, cell_name, comparison_name, recipe_mark, show_metric
from analysis.tables.comparable import comparison_of, full_of, ratio_to
from analysis.tables.notes import collapsed_notes, count_note, forgetting_notes, recipe_notes
from analysis.tables.structure import Column, PaperTable, text_table
from harness.results.schema import Status

MINUS = "\N{MINUS SIGN}"

_COSTS = (
    ("parameters updated", "num_trainable_params"),
    ("peak memory", "peak_memory_bytes"),
    ("time of a step", "step_seconds_median"),
    ("throughput", "train_tokens_per_second"),
    ("storage per task", "checkpoint_bytes"),
)


@dataclass(frozen=True)
class _Pair:
    """Full fine-tuning and the LoRA cell to compare it with: which pair it is, and why it is this cell."""

    where: str
    why: str
    full: Cell
    lora: Cell

    @property
    def note(self) -> str:
        name = cell_name(self.lora, with_shared=False)
        return f"{self.where}: {method_label(self.lora)} is {name}{recipe_mark(self.lora)}, {self.why}."


def summary(best: pd.DataFrame, *, margin: float = MARGIN) -> PaperTable | None:
    """Full fine-tuning against the smallest LoRA adapter as good as the best one, for each model, dataset and recipe.

    Args:
        best: a row per condition, from `select.best_cells`.
        margin: how much of a metric's scale a difference may be and still not matter (`equivalence_margin`).
    """
    pairs = list(_pairs(records(best), margin))
    if not pairs:
        return None
    lines = [(pair, what, name) for pair in pairs for what, name in _quantities(pair, best)]
    tested = _tested([(pair, name) for pair, _, name in lines], margin)
    texts = [
        _texts(pair, what, name, verdict, unit=name in best)
        for (pair, what, name), verdict in zip(lines, tested, strict=True)
    ]
    labels = dict.fromkeys(method_label(pair.lora) for pair in pairs)
    label = next(iter(labels)) if len(labels) == 1 else "adapter"
    titles = ["", "", "full fine-tuning", label, f"{label} against full"]
    columns = [Column(heading, [row[index] for row in texts]) for index, heading in enumerate(titles)]
    columns = columns[1:] if len(pairs) == 1 else columns
    compared = [cell for pair in pairs for cell in (pair.full, pair.lora)]
    return PaperTable(
        name="summary",
        caption="Full fine-tuning against LoRA in one look.",
        text=text_table(columns, num_key_columns=len(columns) - 3),
        numbers=pd.DataFrame(
            [
                _numbers(pair, name, margin if verdict else None)
                for (pair, _, name), verdict in zip(lines, tested, strict=True)
            ],
            dtype=object,
        ),
        notes=[
            *(pair.note for pair in pairs),
            _note_equivalent(compared, margin, num_pairs=len(pairs)),
            *forgetting_notes(compared),
            count_note(compared),
            *collapsed_notes(compared),
            *recipe_notes(compared),
        ],
    )


# ---------------------------------------------------------------- which cells


def _pairs(rows: Sequence[Cell], margin: float) -> Iterator[_Pair]:
    references = full_of(rows)
    for comparison, full in references.items():
        candidates = [row for row in rows if uses_rank(row) and comparison_of(row) == comparison]
        # What differs in its own settings or environment is not compared where there is something that does not.
        alike = [row for row in candidates if row["recipe"] == full["recipe"]]
        chosen = _smallest_as_good(alike, margin) or _smallest_as_good(candidates, margin)
        if chosen is not None:
            is_one_of_several = sum(other[:2] == comparison[:2] for other in references) > 1
            where = comparison_name(full, rows) + (recipe_mark(full) if is_one_of_several else "")
            yield _Pair(where, chosen[1], full, chosen[0])


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
    candidates = [row for row in ranked[1:] if row.get("num_adapter_params_n", 0) and _is_smaller(row, best)]
    smaller = as_good(candidates, best, name, margin)
    within = f"within {format_spread(name, margin)} of {metric(name).label}"
    if not smaller:
        return best, f"the best on val, and no smaller adapter is shown to be as good ({within})"
    cheapest = min(smaller, key=lambda row: row["num_adapter_params"])
    return (
        cheapest,
        f"the smallest adapter shown to be as good on val as the best ({cell_name(best, with_shared=False)}; {within})",
    )


def as_good(rows: Sequence[Cell], best: Cell, name: str, margin: float) -> list[Cell]:
    """The rows shown to be as good as the best one, with Holm's correction for how many are tried."""
    tested = [(row, equivalence_p_value(row, best, name, margin)) for row in rows]
    found = [(row, probability) for row, probability in tested if probability is not None]
    corrected = holm([probability for _, probability in found])
    return [row for (row, _), probability in zip(found, corrected, strict=True) if probability < 1 - CONFIDENCE]


def _is_smaller(row: Cell, other: Cell) -> bool:
    return bool(not other.get("num_adapter_params_n", 0) or row["num_adapter_params"] < other["num_adapter_params"])


# ---------------------------------------------------------------- what is compared


def _quantities(pair: _Pair, best: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """What is compared, in words and by its metric: costs and quality always, the rest where either cell has it."""
    yield from _COSTS
    if _either_has(pair, "train_flops"):
        yield "training compute", "train_flops"
    for split in ("val", "test"):
        name = score(pair.full, split)
        yield f"quality ({name.replace('_', ' ')})", name
    for name in generation_scores(best):
        if _either_has(pair, name):
            yield f"quality ({metric(name).label})", name
    if _either_has(pair, FORGETTING):
        yield "forgetting (nll)", FORGETTING


def _either_has(pair: _Pair, name: str) -> bool:
    return any(cell.get(f"{name}_n", 0) for cell in (pair.full, pair.lora))


def _texts(pair: _Pair, what: str, name: str, verdict: str | None, *, unit: bool) -> list[str]:
    """A row of the table: which pair, what is compared, both values, and how they compare."""
    display_unit = metric(name).display_unit if unit else ""
    ratio = _ratio(pair, name)
    compared = verdict or (MISSING if ratio is None else f"{ratio:.3g}{TIMES}")
    what += f" ({display_unit})" if display_unit else ""
    return [pair.where, what, show_metric(pair.full, name), show_metric(pair.lora, name), compared]


def _numbers(pair: _Pair, name: str, margin: float | None) -> dict[str, Any]:
    """A row of the CSV; with a margin where a difference was tested."""
    full, lora = pair.full, pair.lora
    return {
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
        "ratio": _ratio(pair, name),
        "margin": None if margin is None else equivalence_margin(name, full[name], margin),
        "lora_rank": lora["rank"],
        "lora_target_layers": lora["target_layers"],
        **{f"lora_{axis.setting}" if axis.is_of_method else axis.setting: lora[axis.setting] for axis in axes_of(lora)},
    }


def _ratio(pair: _Pair, name: str) -> float | None:
    # Nothing, or less than nothing, may have been forgotten: then a ratio says nothing.
    return ratio_to(pair.lora, pair.full, name) if name != FORGETTING else None


def _tested(lines: Sequence[tuple[_Pair, str]], fraction: float) -> list[str | None]:
    """For each line with a score the difference, and whether it is equivalent to none, beyond noise, or neither.

    Both tests have Holm's correction over the lines of the same score: with each more pair one could be found by luck.
    """
    found: list[str | None] = []
    equivalent, different = (_corrected(lines, fraction, equivalence=equivalence) for equivalence in (True, False))
    for index, (pair, name) in enumerate(lines):
        if not _has_difference(pair, name):
            found.append(None)
            continue
        value = pair.lora[name] - pair.full[name]
        sign = f"{'+' if value >= 0 else MINUS}{format_spread(name, abs(value))}"
        if equivalent.get(index, 1.0) < 1 - CONFIDENCE:
            verdict = "equivalent"
        elif index not in different:
            verdict = "noise unknown"
        else:
            verdict = "beyond noise" if different[index] < 1 - CONFIDENCE else "inconclusive"
        found.append(f"{sign} ({verdict})")
    return found


def _corrected(lines: Sequence[tuple[_Pair, str]], fraction: float, *, equivalence: bool) -> dict[int, float]:
    """By the index of the line, the p-values of one test after the correction, where it exists."""
    by_score: dict[str, dict[int, float]] = {}
    for index, (pair, name) in enumerate(lines):
        if not _has_difference(pair, name):
            continue
        margin = equivalence_margin(name, pair.full[name], fraction)
        sides = pair.lora, pair.full, name
        probability = equivalence_p_value(*sides, margin) if equivalence else p_value(*sides)
        if probability is not None:
            by_score.setdefault(name, {})[index] = probability
    return {
        index: corrected
        for found in by_score.values()
        for index, corrected in zip(found, holm([*found.values()]), strict=True)
    }


def _has_difference(pair: _Pair, name: str) -> bool:
    return is_score(name) and all(bool(cell.get(f"{name}_n", 0)) for cell in (pair.lora, pair.full))


def _note_equivalent(rows: Sequence[Cell], fraction: float, *, num_pairs: int) -> str:
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
        + (" They have Holm's correction for the comparisons of one score in this table." if num_pairs > 1 else "")
    )
