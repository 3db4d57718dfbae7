"""Tables of placements, as the LoRA paper prints them: at every rank, and at one parameter budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pandas as pd

from analysis.comparisons import Cell
from analysis.methods import method_label, uses_rank
from analysis.metrics import title
from analysis.select import num_status, records, score, score_columns
from analysis.tables.cells import MISSING, QUOTED_MARK, edge_mark, facet_texts, recipe_mark, show_metric, show_status
from analysis.tables.columns import (
    axis_columns,
    learning_rate_columns,
    methods_of,
    metric_column,
    num_finished_column,
    rank_values,
    run_ids_of,
    scores_by_split,
)
from analysis.tables.comparable import best_rows, by_facet
from analysis.tables.notes import (
    NOTE_N,
    bold_notes,
    collapsed_notes,
    count_note,
    edge_notes,
    recipe_notes,
    reference_notes,
)
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
from harness.results.schema import Status

# ---------------------------------------------------------------- rank x target layers


@dataclass
class _Line:
    """A row of the table: what names it, its method, and by rank a text and its value."""

    names: tuple[str, str, str]
    method: str = ""
    cells: dict[int, QuotedCell] = field(default_factory=dict)
    bold: set[int] = field(default_factory=set)
    run_ids: tuple[str, ...] = ()


def rank_by_target_layers(best: pd.DataFrame, *, published: bool = False) -> PaperTable | None:
    """Scores of every placement (rows) at every rank (columns): the form of the LoRA paper's Table 6."""
    cells = records(best)
    groups = [group for group in by_facet(filter(uses_rank, cells)) if _is_plane(group)]
    rows = [row for group in groups for row in group]
    if not rows:
        return None
    labels = dict.fromkeys(map(method_label, rows))
    measured = [
        line
        for group in groups
        for split in ("val", "test")
        for line in _lines(group, score(group[0], split), cells, name_method=len(labels) > 1)
    ]
    lines = [*measured, *(_quoted_line(row) for row in quoted_rows("rank_by_target_layers") if published)]
    columns = [
        Column(heading, [line.names[index] for line in lines])
        for index, heading in enumerate(("model, dataset", "metric", "target layers"))
    ]
    columns += [_rank_column(rank, lines) for rank in sorted({rank for line in lines for rank in line.cells})]
    ends = {
        index for index in range(len(measured) - 1) if measured[index].names[:2] != measured[index + 1].names[:2]
    } | ({len(measured) - 1} if len(lines) > len(measured) else set())
    names = [score(row, split) for row in rows for split in ("val", "test")]
    text = text_table(columns, num_key_columns=3, rules=frozenset(ends))
    return PaperTable(
        name="rank_by_target_layers",
        caption=f"Rank by target layers: scores of {' and '.join(labels)} at every rank and placement.",
        text=text,
        numbers=scores_by_split(rows),
        notes=[
            *reference_notes(cells, rows),
            count_note(rows),
            *(note.replace("row", "cell") for note in bold_notes(rows, names, any_bold=bool(text.bold))),
            *collapsed_notes(rows),
            *edge_notes(rows),
            *recipe_notes(rows),
            *quoted_notes("rank_by_target_layers", published),
        ],
        run_ids=[line.run_ids for line in lines],
        methods=[line.method for line in lines],
    )


def _is_plane(group: Sequence[Cell]) -> bool:
    return len({row["rank"] for row in group}) > 1 and len({row["target_layers"] for row in group}) > 1


def _lines(group: Sequence[Cell], name: str, every: Sequence[Cell], *, name_method: bool) -> list[_Line]:
    """A line per placement; a second one where a rank is there twice, in two recipes."""
    winners = best_rows(group, name)
    facet = facet_texts(group[0], every)
    lines: dict[tuple[str | None, int], _Line] = {}
    for index, row in sorted(enumerate(group), key=lambda pair: pair[1]["recipe"] is not None):
        placement, rank, number = row["target_layers"], row["rank"], 0
        while (placement, number) in lines and rank in lines[placement, number].cells:
            number += 1
        where = ", ".join([row["model"], row["dataset"], *([row["method"]] if name_method else []), *facet])
        new = _Line((where, title(name), placement or MISSING), row["method"])
        line = lines.setdefault((placement, number), new)
        line.cells[rank] = _score_cell(row, name)
        line.run_ids += row["run_ids"]
        if index in winners:
            line.bold.add(rank)
    return list(lines.values())


def _score_cell(row: Cell, name: str) -> QuotedCell:
    """The score with how many of its runs gave it, or how they ended."""
    has_value = bool(row.get(f"{name}_n", 0))
    text = show_metric(row, name) if has_value else show_status(row)
    num_finished, num_runs = row[num_status(Status.FINISHED)], len(row["run_ids"])
    text += f" ({num_finished} of {num_runs} runs)" if has_value and num_finished < num_runs else ""
    return text + edge_mark(row) + recipe_mark(row), row[name] if has_value else None


def _quoted_line(row: Published) -> _Line:
    return _Line(
        (f"{row.model}, {row.dataset} ({QUOTED_MARK} quoted)", row.metric, row.target_layers), cells=row.by_rank
    )


def _rank_column(rank: int, lines: Sequence[_Line]) -> Column:
    cells = [line.cells.get(rank, (MISSING, None)) for line in lines]
    bold = frozenset(index for index, line in enumerate(lines) if rank in line.bold)
    return Column(f"rank {rank}", [text for text, _ in cells], [value for _, value in cells], bold)


# ---------------------------------------------------------------- target layers at one budget


# Counts of one budget lie within this factor of each other; a real rank sweep does not.
_BUDGET_SPREAD = 1.3


def target_layers_at_budget(best: pd.DataFrame, *, published: bool = False) -> PaperTable | None:
    """Every placement at one parameter budget, with exact counts: the form of the LoRA paper's Table 5."""
    cells = records(best)
    candidates = [
        row for row in filter(uses_rank, cells) if row["recipe"] is None and row.get("num_adapter_params", 0) > 0
    ]
    rows = [row for group in by_facet(candidates) if _is_one_budget(group) for row in group]
    if not rows:
        return None
    below = quoted_rows("target_layers_at_budget") if published else []
    budget = Counter(row["num_adapter_params"] for row in rows).most_common(1)[0][0]
    names = [name for name in score_columns(best) if name in best]
    key_columns = [
        *naming_columns(rows, below),
        Column("target layers", [row["target_layers"] or MISSING for row in rows]),
        Column("rank", [str(row["rank"]) for row in rows], rank_values(rows)),
        *axis_columns(rows),
        *learning_rate_columns(rows),
    ]
    params = metric_column(rows, "num_adapter_params")
    columns = [
        *key_columns,
        params,
        _off_budget_column(rows, budget),
        *(metric_column(rows, name, bold=best_rows(rows, name)) for name in names),
        num_finished_column(rows),
    ]
    other_scores = below and not any(f"test_{row.metric}" in names for row in below)
    if other_scores:
        columns.append(Column(f"score {QUOTED_MARK}", [MISSING] * len(rows), [None] * len(rows)))
    columns = with_quoted(
        columns,
        below,
        {
            **QUOTED_NAMES,
            "rank": lambda row: (str(row.rank), float(row.rank) if row.rank else None),
            params.title: quoted(lambda row: row.params),
            **{title(name): quoted(_score_named(name)) for name in names},
            f"score {QUOTED_MARK}": quoted(lambda row: f"{row.metric} {row.text}"),
        },
    )
    text = text_table(columns, num_key_columns=len(key_columns), rules=rule_before_quoted(len(rows), below))
    return PaperTable(
        name="target_layers_at_budget",
        caption=f"Target layers at one budget of {budget:,.0f} adapter parameters.",
        text=text,
        numbers=scores_by_split(rows),
        notes=[
            f"Budget: the count that most rows have, {budget:,.0f}. Counts are exact, heads left out.",
            *reference_notes(cells, rows),
            NOTE_N,
            *bold_notes(rows, names, any_bold=bool(text.bold)),
            *collapsed_notes(rows),
            *edge_notes(rows),
            *quoted_notes("target_layers_at_budget", published),
        ],
        run_ids=[*run_ids_of(rows), *[()] * len(below)],
        methods=[*methods_of(rows), *[""] * len(below)],
    )


def _off_budget_column(rows: Sequence[Cell], budget: float) -> Column:
    """By how much the counts of the rows miss the budget, for those that do."""
    deviations: list[float | None] = [row["num_adapter_params"] / budget - 1 for row in rows]
    return Column("off budget (%)", [f"{100 * value:+.1f}" if value else "0" for value in deviations], deviations)


def _score_named(name: str) -> Callable[[Published], str]:
    return lambda row: row.text if f"test_{row.metric}" == name else MISSING


def _is_one_budget(group: Sequence[Cell]) -> bool:
    """Three placements at least, each once, of two ranks at least, whose counts agree or nearly do."""
    counts = [row["num_adapter_params"] for row in group]
    return (
        len({row["target_layers"] for row in group}) == len(group) >= 3
        and len({row["rank"] for row in group}) > 1
        and Counter(counts).most_common(1)[0][1] > 1
        and max(counts) <= _BUDGET_SPREAD * min(counts)
    )
