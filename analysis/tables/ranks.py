"""The table of a rank sweep, as the LoRA paper prints it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd

from analysis.axes import axes_of, axis_order
from analysis.comparisons import Cell, best_beyond_noise
from analysis.methods import uses_rank
from analysis.metrics import title
from analysis.select import generation_scores, records, score_columns
from analysis.tables.cells import MISSING, QUOTED_MARK, recipe_mark
from analysis.tables.columns import (
    axis_columns,
    cell_names,
    learning_rate_columns,
    methods_of,
    metric_column,
    num_finished_column,
    rank_values,
    run_ids_of,
    with_spread,
)
from analysis.tables.notes import NOTE_N, bold_notes, collapsed_notes, edge_notes, recipe_notes, reference_notes
from analysis.tables.published import Published, quoted_rows
from analysis.tables.quoted import (
    QUOTED_NAMES,
    QuotedCell,
    naming_columns,
    quoted,
    quoted_notes,
    rule_before_quoted,
    with_quoted,
)
from analysis.tables.structure import Column, PaperTable, text_table


def rank_sweep(best: pd.DataFrame, *, published: bool = False) -> PaperTable | None:
    """Every rank of a placement with its parameters, nll and scores: the form of the LoRA paper's Table 18."""
    cells = records(best)
    candidates = sorted(filter(uses_rank, cells), key=lambda row: (*_placement_key(row), row["rank"]))
    rows = [
        row
        for start, end in _stretches(candidates)
        if len({row["rank"] for row in candidates[start:end]}) >= 3
        for row in candidates[start:end]
    ]
    if not rows:
        return None
    below = quoted_rows("rank_sweep") if published else []
    wanted = dict.fromkeys(("val_nll", "test_nll", *score_columns(best), *generation_scores(best)))
    names = [name for name in wanted if name in best]
    key_columns = [
        *naming_columns(rows, below),
        Column("target layers", [(row["target_layers"] or MISSING) + recipe_mark(row) for row in rows]),
        *axis_columns(rows),
        Column("rank", [str(row["rank"]) for row in rows], rank_values(rows)),
        *learning_rate_columns(rows),
    ]
    columns = [
        *key_columns,
        metric_column(rows, "num_adapter_params"),
        *(metric_column(rows, name, bold=_best_of_placement(rows, name)) for name in names),
        *([Column(f"BLEU {QUOTED_MARK}", [MISSING] * len(rows), [None] * len(rows))] if below else []),
        num_finished_column(rows),
    ]
    text = text_table(
        with_quoted(columns, below, _quoted_cells(names)),
        num_key_columns=len(key_columns),
        rules=_ends_of_placements(rows) | rule_before_quoted(len(rows), below),
    )
    is_shown = best["cell_id"].isin([row["cell_id"] for row in rows])
    return PaperTable(
        name="rank_sweep",
        caption="Rank sweep: parameters, negative log-likelihood and scores at every rank.",
        text=text,
        numbers=best.loc[is_shown, [*cell_names(best), *with_spread(best, ["num_adapter_params", *names])]],
        notes=[
            *reference_notes(cells, rows),
            NOTE_N,
            *(f"{note} Compared within one placement." for note in bold_notes(rows, names, any_bold=bool(text.bold))),
            *collapsed_notes(rows),
            *edge_notes(rows),
            *recipe_notes(rows),
            *quoted_notes("rank_sweep", published),
        ],
        run_ids=[*run_ids_of(rows), *[()] * len(below)],
        methods=[*methods_of(rows), *[""] * len(below)],
    )


def _quoted_cells(names: Sequence[str]) -> dict[str, Callable[[Published], QuotedCell]]:
    """What quoted rows show in the columns, by title."""
    scores = {title(name): quoted(lambda row, name=name: row.scores.get(name, MISSING)) for name in names}  # type: ignore[misc]
    return {
        **QUOTED_NAMES,
        "rank": quoted(lambda row: str(row.rank)),
        title("num_adapter_params"): quoted(lambda row: row.params),
        f"BLEU {QUOTED_MARK}": quoted(lambda row: row.scores.get("BLEU", MISSING)),
        **scores,
    }


def _best_of_placement(rows: Sequence[Cell], name: str) -> frozenset[int]:
    """In each placement the row that is best beyond noise."""
    found = ((start, best_beyond_noise(rows[start:end], name)) for start, end in _stretches(rows))
    return frozenset(start + best for start, best in found if best is not None)


def _ends_of_placements(rows: Sequence[Cell]) -> frozenset[int]:
    return frozenset(end - 1 for _, end in _stretches(rows)[:-1])


def _placement_key(row: Cell) -> tuple[Any, ...]:
    axes = tuple(axis_order(row[axis.setting]) for axis in axes_of(row))
    return row["model"], row["dataset"], row["method"], row["target_layers"] or "", *axes, row["recipe"] or 0


def _stretches(rows: Sequence[Cell]) -> list[tuple[int, int]]:
    """Start and end of each run of rows with one placement; no rows have none."""
    keys = [_placement_key(row) for row in rows]
    starts = [index for index in range(len(keys)) if index == 0 or keys[index] != keys[index - 1]]
    return list(pairwise([*starts, len(keys)]))
