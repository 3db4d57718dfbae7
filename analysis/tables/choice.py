"""Which condition is best on val, and which cheaper ones cannot be told from it: the sentences at the head of a report.

They print what the tests of `analysis.comparisons` give, with the numbers of seeds, and recommend nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.axes import shared_axes
from analysis.code_spans import as_code
from analysis.comparisons import CONFIDENCE, MARGIN, Cell, equivalence_margin, holm, p_value, ranked_by
from analysis.metrics import format_spread, format_value, is_better, metric
from analysis.select import num_status, records, score
from analysis.tables.cells import (
    EDGE_MARK,
    cell_name,
    comparison_name,
    edge_mark,
    recipe_mark,
    show_metric,
    show_status,
)
from analysis.tables.lora_against_full import as_good
from analysis.tables.notes import collapsed_notes
from harness.results.schema import Status

# So many conditions are named, the cheapest first.
_NUM_NAMED = 4
# What is cheap: the first of these that the best condition has. Memory is exact and the same on every device.
_COSTS = ("peak_memory_bytes", "num_trainable_params")


@dataclass(frozen=True)
class Choice:
    """What the tests say of one model on one dataset, at one value of each own axis that methods share.

    Attributes:
        best: the condition that is best on val.
        alike: conditions of its recipe that cost less and cannot be told from it, the cheapest first.
        verdict: which one is best, in a sentence; in this, as in `tests`, `code` spans are marked by backticks.
        tests: how sure that is, in sentences.
    """

    best: Cell
    alike: list[Cell]
    verdict: str
    tests: str


def choices(best: pd.DataFrame, *, margin: float = MARGIN) -> list[Choice]:
    """A choice for each model, dataset and value of the shared own axes with more than one finished condition.

    Args:
        best: a row per condition, from `select.best_cells`.
        margin: how much of a metric's scale a difference may be and still not matter (`equivalence_margin`).
    """
    rows = records(best)
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for row in rows:
        shared = tuple(row[axis.setting] for axis in shared_axes(row))
        groups.setdefault((row["model"], row["dataset"], *shared), []).append(row)
    return [_choice(ranked, rows, margin) for group in groups.values() if len(ranked := _ranked(group)) > 1]


def _ranked(rows: Sequence[Cell]) -> list[Cell]:
    """Those with a score on val, the best first; among equals the one with less memory."""
    by_memory = sorted(rows, key=lambda row: row[_COSTS[0]] if row.get(f"{_COSTS[0]}_n", 0) else math.inf)
    return [by_memory[index] for index in ranked_by(by_memory, score(rows[0], "val"))]


def _choice(ranked: Sequence[Cell], rows: Sequence[Cell], margin: float) -> Choice:
    best, name = ranked[0], score(ranked[0], "val")
    cost = next((cost for cost in _COSTS if best.get(f"{cost}_n", 0)), None)
    alike_in_recipe = [row for row in ranked[1:] if row["recipe"] == best["recipe"]]
    tests = [(row, p_value(best, row, name)) for row in alike_in_recipe]
    tested = [(row, probability) for row, probability in tests if probability is not None]
    corrected = holm([probability for _, probability in tested])
    cheaper = [row for row in alike_in_recipe if cost is None or _is_cheaper(row, best, cost)]
    alike = [
        row
        for (row, _), probability in zip(tested, corrected, strict=True)
        if probability >= 1 - CONFIDENCE and row in cheaper
    ]
    alike.sort(key=lambda row: row[cost] if cost is not None else 0)
    sentences = [
        *_about_others(best, cheaper, [row for row, _ in tested], alike, cost),
        *([_as_good_text(best, alike, name, margin)] if alike else []),
        *_warnings(best, len(ranked) - 1 - len(alike_in_recipe)),
    ]
    verdict = f"{comparison_name(best, rows)}: {_best_text(best, name, cost)}."
    return Choice(best, alike, verdict, " ".join(sentences))


def _is_cheaper(row: Cell, other: Cell, cost: str) -> bool:
    return bool(row.get(f"{cost}_n", 0)) and row[cost] < other[cost]


# ---------------------------------------------------------------- sentences


def _named(row: Cell) -> str:
    return as_code(cell_name(row, with_shared=False) + recipe_mark(row))


def _with_cost(row: Cell, cost: str | None) -> str:
    if cost is None:
        return ""
    unit = metric(cost).display_unit
    return f"{format_value(cost, row[cost])} {unit}".rstrip()


def _best_text(best: Cell, name: str, cost: str | None) -> str:
    test = score(best, "test")
    others = [f"{metric(test).label} {show_metric(best, test)}"] if best.get(f"{test}_n", 0) else []
    others += [f"{metric(cost).label} {_with_cost(best, cost)}"] if cost is not None else []
    with_others = f"; {', '.join(others)}" if others else ""
    label = metric(name).label
    return f"{_named(best)} has the best {label}, {show_metric(best, name)} (n={best[f'{name}_n']}{with_others})"


def _about_others(
    best: Cell, cheaper: Sequence[Cell], tested: Sequence[Cell], alike: Sequence[Cell], cost: str | None
) -> Iterator[str]:
    """What the tests say of those that cost less, or why there is none."""
    name = score(best, "val")
    less = f"with less {metric(cost).label}" if cost is not None else "beside it"
    if best[f"{name}_n"] < 2:
        yield "One seed: no interval, so nothing says how sure that is."
        return
    if not cheaper:
        yield f"None {less} was run in its recipe."
        return
    among = [row for row in cheaper if row in tested]
    test = "t-test at 5 %" if len(tested) == 1 else f"t-tests at 5 %, Holm's correction for {len(tested)}"
    if alike:
        one, some = f"The only one {less} cannot", f"Of {len(among)} {less}, {len(alike)} cannot"
        which = one if len(among) == 1 else f"None of {len(among)} {less} can" if len(alike) == len(among) else some
        yield f"{which} be told from it ({test}): {_listed(alike, name, cost)}."
        if best[f"{name}_n"] == 2:  # with one degree of freedom
            yield "Two seeds tell little apart."
    elif among:
        which = f"The only one tested {less} is" if len(among) == 1 else f"All {len(among)} tested {less} are"
        yield f"{which} worse beyond noise ({test})."
    if len(among) < len(cheaper):
        yield f"{len(cheaper) - len(among)} {less} cannot be tested: one seed, or no noise."


def _listed(alike: Sequence[Cell], name: str, cost: str | None) -> str:
    """The best of those that no cheaper one beats on val, the cheapest first, and how many there are besides."""
    front = [row for place, row in enumerate(alike) if not _is_beaten(row, alike[:place], name)]
    ranked = [front[index] for index in ranked_by(front, name)[:_NUM_NAMED]]
    texts = [f"{_named(row)} ({_about(row, name, cost)})" for row in front if row in ranked]
    return ", ".join(texts) + (f" and {len(alike) - len(texts)} more" if len(alike) > len(texts) else "")


def _is_beaten(row: Cell, cheaper: Sequence[Cell], name: str) -> bool:
    return any(not is_better(name, row[name], other[name]) for other in cheaper)


def _about(row: Cell, name: str, cost: str | None) -> str:
    parts = [show_metric(row, name), f"n={row[f'{name}_n']}", *([_with_cost(row, cost)] if cost is not None else [])]
    return ", ".join(parts)


def _as_good_text(best: Cell, alike: Sequence[Cell], name: str, fraction: float) -> str:
    """That nothing was found shows no equality; what is shown to be within the margin."""
    margin = equivalence_margin(name, best[name], fraction)
    found, within = as_good(alike, best, name, margin), f"within {format_spread(name, margin)} of it"
    if found:
        cheapest = next(row for row in alike if row in found)
        return f"The cheapest that is shown to be as good, {within}: {_named(cheapest)}."
    return f"That does not show that they are equal: none is shown to be {within}."


def _warnings(best: Cell, num_elsewhere: int) -> Iterator[str]:
    """What else stands against the best."""
    if best[num_status(Status.FINISHED)] < len(best["run_ids"]):
        yield f"Its runs: {show_status(best)}."
    yield from collapsed_notes([best])
    if edge_mark(best):
        yield f"Its learning rate is at the edge of those tried ({EDGE_MARK}), so a better one may lie outside."
    if num_elsewhere:
        is_or_are = "is" if num_elsewhere == 1 else "are"
        yield f"{num_elsewhere} of another recipe or environment {is_or_are} not compared with it."
