"""The tables of a sweep, each a function from cells to a `PaperTable`, or None where the sweep has nothing for it.

Numbers keep the stored units until they are turned into text here, by the METRICS registry. Rows are conditions at
their best learning rate, chosen on val alone. Bold is what differs from all others beyond noise.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from analysis.comparisons import MARGIN
from analysis.select import best_cells, records
from analysis.tables.asked import Asked, asked_table
from analysis.tables.choice import Choice, choices
from analysis.tables.costs_and_quality import costs, tradeoff
from analysis.tables.forgetting import earlier_tasks
from analysis.tables.lora_against_full import summary
from analysis.tables.mean_ranks import mean_ranks_table
from analysis.tables.notes import axes_notes, setting_note
from analysis.tables.paired_predictions import paired_predictions
from analysis.tables.placements import rank_by_target_layers, target_layers_at_budget
from analysis.tables.quoted_alone import quoted_alone
from analysis.tables.ranks import rank_sweep
from analysis.tables.rates import learning_rates
from analysis.tables.search import search
from analysis.tables.structure import PaperTable
from analysis.tables.suggestion import read_suggestion, suggestion_table
from analysis.tables.tasks import tasks_by_methods
from analysis.trials import Searches

__all__ = [
    "Asked",
    "Choice",
    "PaperTable",
    "choices",
    "costs",
    "earlier_tasks",
    "learning_rates",
    "mean_ranks_table",
    "paired_predictions",
    "paper_tables",
    "rank_by_target_layers",
    "rank_sweep",
    "suggestion_table",
    "summary",
    "target_layers_at_budget",
    "tasks_by_methods",
    "tradeoff",
]


_NOTHING = Asked()


def paper_tables(
    frame: pd.DataFrame,
    table: pd.DataFrame,
    *,
    scores: str = "best",
    published: bool = False,
    margin: float = MARGIN,
    asked: Asked = _NOTHING,
    searches: Searches | None = None,
    predictions_dir: Path | None = None,
    sweep: str | None = None,
) -> list[PaperTable]:
    """Every table that the runs of a sweep allow, the trade-off first, and before it what was asked for.

    Args:
        frame: a row per run, from `load_runs`.
        table: a row per cell, from `select.cells` of that frame.
        scores: "best" or "last": which step the scores in both are of, for the captions.
        published: whether quoted rows of papers stand under the measured ones.
        margin: how much of a metric's scale a difference may be and still not matter.
        asked: a table of the reader's own.
        searches: what was tried before the runs were reported.
        predictions_dir: the folder of the runs, where their saved predictions of the best step are compared.
        sweep: its name, by which that folder says which hypotheses it tests.

    Raises:
        LoadError: what was asked for is not there.
    """
    best = best_cells(table)
    suggested = None if predictions_dir is None else read_suggestion(predictions_dir, sweep)
    found = [
        suggestion_table(suggested, best, frame, margin=margin),
        summary(best, margin=margin),
        costs(best),
        rank_by_target_layers(best, published=published),
        target_layers_at_budget(best, published=published),
        rank_sweep(best, published=published),
        tasks_by_methods(best, published=published),
        *(quoted_alone(best) if published else ()),
        mean_ranks_table(best),
        paired_predictions(best, frame, predictions_dir) if predictions_dir is not None and scores == "best" else None,
        learning_rates(table, best),
        search(best, searches) if searches is not None else None,
        earlier_tasks(best, frame),
    ]
    # Each is pasted alone, and must say by itself what it is about.
    rows = records(best)
    setting, axes = setting_note(rows, scores), [*axes_notes(rows)]
    own = [asked_table(asked, table, best, frame)] if asked != _NOTHING else []
    own = [replace(one, notes=[setting, *one.notes, *axes]) for one in own]
    others = [replace(one, notes=[setting, *one.notes, *axes]) for one in found if one is not None]
    return [*own, tradeoff(best, frame, scores=scores), *others]
