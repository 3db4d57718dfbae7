"""The forms of table that papers on LoRA print, each for sweeps that have its axes; None for those that have not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd

from analysis.formats import Column, PaperTable, text_table
from analysis.published import Published, quoted_rows
from analysis.rows import (
    ARROWS,
    CELL_NAMES,
    MISSING,
    NOTE_N,
    QUOTED_MARK,
    TIMES,
    Cell,
    as_rows,
    best_rows,
    bold_note,
    collapsed_note,
    comparison_of,
    count_note,
    edge_mark,
    edge_notes,
    full_of,
    is_full,
    is_lora,
    key_columns,
    learning_rate_column,
    methods_of,
    metric_column,
    num_finished_column,
    ranks_of,
    recipe_mark,
    recipe_notes,
    run_ids_of,
    show_metric,
    show_rate,
    show_status,
    title,
    with_spread,
)
from analysis.select import best_beyond_noise, generation_scores, metric, num_status, score, score_columns
from harness.results.metrics import Direction
from harness.results.schema import Status

# ---------------------------------------------------------------- rank x target layers


def rank_by_target_layers(best: pd.DataFrame, *, published: bool = False) -> PaperTable | None:
    """Scores of every placement (rows) at every rank (columns): the form of the LoRA paper's Table 6."""
    rows = [row for row in as_rows(best) if is_lora(row)]
    rows = [row for group in _by_dataset(rows) if _is_plane(group) for row in group]
    if not rows:
        return None
    ranks = sorted({row["rank"] for row in rows})
    lines: list[dict[str, Any]] = []
    for group in _by_dataset(rows):
        for split in ("val", "test"):
            name = score(group[0], split)
            lines += _by_placement(group, name, best_rows(group, name))
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
    text = text_table(columns, num_key_columns=3, rules=frozenset(ends))
    return PaperTable(
        name="rank_by_target_layers",
        caption="Rank by target layers: scores of LoRA at every rank and placement.",
        text=text,
        numbers=_long_numbers(rows, ("val", "test")),
        notes=[
            *_reference_notes(as_rows(best), rows),
            count_note(rows),
            *(note.replace("row", "cell") for note in bold_note(rows, names, any_bold=bool(text.bold))),
            *collapsed_note(rows),
            *edge_notes(rows),
            *recipe_notes(rows),
            *_quoted_notes("rank_by_target_layers", published),
        ],
        run_ids=[line["run_ids"] for line in (*lines, *quoted)],
        methods=[*["lora"] * len(lines), *[""] * len(quoted)],
    )


def _by_dataset(rows: Sequence[Cell]) -> list[list[Cell]]:
    groups: dict[tuple[str, str], list[Cell]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["dataset"]), []).append(row)
    return list(groups.values())


def _is_plane(group: Sequence[Cell]) -> bool:
    return len({row["rank"] for row in group}) > 1 and len({row["target_layers"] for row in group}) > 1


def _by_placement(group: Sequence[Cell], name: str, winners: frozenset[int]) -> list[dict[str, Any]]:
    """A line per placement; a second one where a rank is there twice, in two recipes."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for index, row in sorted(enumerate(group), key=lambda pair: pair[1]["recipe"] is not None):
        keys = (f"{row['model']}, {row['dataset']}", title(name), row["target_layers"])
        number = 0
        while row["rank"] in lines.get((row["target_layers"], number), {"cells": {}})["cells"]:
            number += 1
        new = {"keys": keys, "cells": {}, "bold": set(), "run_ids": ()}
        line = lines.setdefault((row["target_layers"], number), new)
        has_value = bool(row.get(f"{name}_n", 0))
        text = show_metric(row, name) if has_value else show_status(row)
        num_finished, num_runs = row[num_status(Status.FINISHED)], len(row["run_ids"])
        text += f" ({num_finished} of {num_runs} runs)" if has_value and num_finished < num_runs else ""
        text += edge_mark(row) + recipe_mark(row)
        line["cells"][row["rank"]] = (text, row[name] if has_value else None)
        line["run_ids"] += row["run_ids"]
        if index in winners:
            line["bold"].add(row["rank"])
    return list(lines.values())


def _reference_notes(every: Sequence[Cell], rows: Sequence[Cell]) -> Iterator[str]:
    """Full fine-tuning and the head alone, which have no rank and no placement, in the recipes of a table's rows."""
    shown = set(map(comparison_of, rows))
    for row in every:
        if is_lora(row) or not row[num_status(Status.FINISHED)] or comparison_of(row) not in shown:
            continue
        texts = [f"{split} {show_metric(row, score(row, split))}" for split in ("val", "test")]
        yield (
            f"For comparison, {'full fine-tuning' if is_full(row) else 'the head alone'}{recipe_mark(row)} of "
            f"{row['model']} on {row['dataset']}: {', '.join(texts)} (n={row[num_status(Status.FINISHED)]})."
        )


def _long_numbers(rows: Sequence[Cell], splits: Sequence[str]) -> pd.DataFrame:
    lines = []
    for row in rows:
        for split in splits:
            name = score(row, split)
            lines.append(
                {
                    **{key: row[key] for key in CELL_NAMES},
                    "num_adapter_params": row.get("num_adapter_params"),
                    "metric": name,
                    "mean": row.get(name),
                    "sd": row.get(f"{name}_sd"),
                    "ci": row.get(f"{name}_ci"),
                    "n": row.get(f"{name}_n", 0),
                    "edge": row["edge"],
                    "bounded": row["bounded"],
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
_BUDGET_SPREAD = 1.3


def target_layers_at_budget(best: pd.DataFrame, *, published: bool = False) -> PaperTable | None:
    """Every placement at one parameter budget, with exact counts: the form of the LoRA paper's Table 5."""
    candidates = [
        row for row in as_rows(best) if is_lora(row) and row["recipe"] is None and row.get("num_adapter_params", 0) > 0
    ]
    groups = [group for group in _by_dataset(candidates) if _is_one_budget(group)]
    rows = [row for group in groups for row in group]
    if not rows:
        return None
    budget = Counter(row["num_adapter_params"] for row in rows).most_common(1)[0][0]
    quoted = quoted_rows("target_layers_at_budget") if published else []
    names = [name for name in score_columns(best) if name in best]
    keys = [
        Column("target layers", [*(row["target_layers"] for row in rows), *(row.target_layers for row in quoted)]),
        Column(
            "rank",
            [*(str(row["rank"]) for row in rows), *(str(row.rank) for row in quoted)],
            [*ranks_of(rows), *(float(row.rank) if row.rank else None for row in quoted)],
        ),
    ]
    deviations = [row["num_adapter_params"] / budget - 1 for row in rows]
    columns = [
        *_named_where_several(rows, quoted),
        *keys,
        *_rates_where_several(rows, quoted),
        _with_quoted(metric_column(rows, "num_adapter_params"), [row.params for row in quoted]),
        _with_quoted(
            Column("off budget (%)", [f"{100 * value:+.1f}" if value else "0" for value in deviations], deviations),
            [MISSING] * len(quoted),
        ),
        *(
            _with_quoted(
                metric_column(rows, name, bold=best_rows(rows, name)),
                [row.text if f"test_{row.metric}" == name else MISSING for row in quoted],
            )
            for name in names
        ),
        _with_quoted(num_finished_column(rows), [MISSING] * len(quoted)),
    ]
    if quoted and not any(f"test_{row.metric}" in names for row in quoted):
        texts = [*[MISSING] * len(rows), *(f"{row.metric} {row.text}" for row in quoted)]
        columns.append(Column(f"score {QUOTED_MARK}", texts, [None] * len(texts)))
    text = text_table(columns, num_key_columns=len(columns) - 3 - len(names), rules=_rule_before(rows, quoted))
    return PaperTable(
        name="target_layers_at_budget",
        caption=f"Target layers at one budget of {budget:,.0f} adapter parameters.",
        text=text,
        numbers=_long_numbers(rows, ("val", "test")),
        notes=[
            f"Budget: the count that most rows have, {budget:,.0f}. Counts are exact, heads left out.",
            *_reference_notes(as_rows(best), rows),
            NOTE_N,
            *bold_note(rows, names, any_bold=bool(text.bold)),
            *collapsed_note(rows),
            *edge_notes(rows),
            *_quoted_notes("target_layers_at_budget", published),
        ],
        run_ids=[*run_ids_of(rows), *[()] * len(quoted)],
        methods=[*methods_of(rows), *[""] * len(quoted)],
    )


def _is_one_budget(group: Sequence[Cell]) -> bool:
    """Three placements at least, each once, of two ranks at least, whose counts agree or nearly do."""
    counts = [row["num_adapter_params"] for row in group]
    return (
        len({row["target_layers"] for row in group}) == len(group) >= 3
        and len({row["rank"] for row in group}) > 1
        and Counter(counts).most_common(1)[0][1] > 1
        and max(counts) <= _BUDGET_SPREAD * min(counts)
    )


def _rule_before(rows: Sequence[Cell], quoted: Sequence[Published]) -> frozenset[int]:
    return frozenset([len(rows) - 1]) if quoted else frozenset()


def _with_quoted(column: Column, texts: Sequence[str]) -> Column:
    """A column of measured numbers with quoted ones underneath, which are text and nothing else."""
    values = None if column.values is None else [*column.values, *[None] * len(texts)]
    return Column(column.title, [*column.texts, *texts], values, column.bold)


def _rates_where_several(rows: Sequence[Cell], quoted: Sequence[Published]) -> list[Column]:
    if len({row["learning_rate"] for row in rows}) == 1 and not any(map(edge_mark, rows)):
        return []
    return [_with_quoted(learning_rate_column(rows), [MISSING] * len(quoted))]


def _named_where_several(rows: Sequence[Cell], quoted: Sequence[Published]) -> list[Column]:
    named = [(row["model"], row["dataset"]) for row in rows]
    named += [(f"{row.model} ({QUOTED_MARK} quoted)", row.dataset) for row in quoted]
    if len(set(named)) == 1:
        return []
    return [Column(head, [pair[index] for pair in named]) for index, head in enumerate(("model", "dataset"))]


# ---------------------------------------------------------------- rank sweep


def rank_sweep(best: pd.DataFrame, *, published: bool = False) -> PaperTable | None:
    """Every rank of a placement with its parameters, nll and scores: the form of the LoRA paper's Table 18."""
    candidates = [row for row in as_rows(best) if is_lora(row)]
    candidates.sort(key=lambda row: (*_placement_key(row), row["rank"]))
    rows = [
        row
        for start, end in _stretches(candidates)
        if len({row["rank"] for row in candidates[start:end]}) >= 3
        for row in candidates[start:end]
    ]
    if not rows:
        return None
    quoted = quoted_rows("rank_sweep") if published else []
    wanted = dict.fromkeys(("val_nll", "test_nll", *score_columns(best), *generation_scores(best)))
    names = [name for name in wanted if name in best]
    placements = [row["target_layers"] + recipe_mark(row) for row in rows]
    columns = [
        *_named_where_several(rows, quoted),
        Column("target layers", [*placements, *(row.target_layers for row in quoted)]),
        _with_quoted(
            Column("rank", [str(row["rank"]) for row in rows], ranks_of(rows)), [str(row.rank) for row in quoted]
        ),
        *_rates_where_several(rows, quoted),
        _with_quoted(metric_column(rows, "num_adapter_params"), [row.params for row in quoted]),
    ]
    num_key_columns = len(columns) - 1
    for name in names:
        texts = [row.scores.get(name, MISSING) for row in quoted]
        columns.append(_with_quoted(metric_column(rows, name, bold=_bold_by_placement(rows, name)), texts))
    if quoted:
        columns.append(
            Column(
                f"BLEU {QUOTED_MARK}",
                [*[MISSING] * len(rows), *(row.text for row in quoted)],
                [None] * (len(rows) + len(quoted)),
            )
        )
    columns.append(_with_quoted(num_finished_column(rows), [MISSING] * len(quoted)))
    text = text_table(
        columns, num_key_columns=num_key_columns, rules=_ends_of_placements(rows) | _rule_before(rows, quoted)
    )
    return PaperTable(
        name="rank_sweep",
        caption="Rank sweep: parameters, negative log-likelihood and scores at every rank.",
        text=text,
        numbers=best.loc[[row["cell_id"] in {one["cell_id"] for one in rows} for row in as_rows(best)]][
            [*CELL_NAMES, *with_spread(best, ["num_adapter_params", *names])]
        ],
        notes=[
            *_reference_notes(as_rows(best), rows),
            NOTE_N,
            *(f"{note} Compared within one placement." for note in bold_note(rows, names, any_bold=bool(text.bold))),
            *collapsed_note(rows),
            *edge_notes(rows),
            *recipe_notes(rows),
            *_quoted_notes("rank_sweep", published),
        ],
        run_ids=[*run_ids_of(rows), *[()] * len(quoted)],
        methods=[*methods_of(rows), *[""] * len(quoted)],
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


def _placement_key(row: Cell) -> tuple[str, str, str, int]:
    return row["model"], row["dataset"], row["target_layers"], row["recipe"] or 0


def _stretches(rows: Sequence[Cell]) -> list[tuple[int, int]]:
    """Start and end of each run of rows with one placement; no rows have none."""
    keys = [_placement_key(row) for row in rows]
    starts = [index for index in range(len(keys)) if index == 0 or keys[index] != keys[index - 1]]
    return list(pairwise([*starts, len(keys)]))


# ---------------------------------------------------------------- tasks x methods


def tasks_by_methods(best: pd.DataFrame, *, published: bool = False) -> PaperTable | None:
    """Test scores of every method (rows) on every dataset (columns) and their mean: the LoRA paper's Table 2."""
    cells_ = as_rows(best)
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
                *(row["method"] + recipe_mark(row) for row in first),
                *(f"{row.method} ({QUOTED_MARK} quoted)" for row in quoted),
            ],
        ),
        _with_quoted(
            Column("rank", [MISSING if row["rank"] is None else str(row["rank"]) for row in first], ranks_of(first)),
            [str(row.rank or MISSING) for row in quoted],
        ),
        Column(
            "target layers",
            [*(row["target_layers"] or MISSING for row in first), *(row.target_layers or MISSING for row in quoted)],
        ),
        _with_quoted(metric_column(first, "num_trainable_params"), [row.params for row in quoted]),
    ]
    columns = list(keys)
    for dataset in datasets:
        columns.append(_task_column(dataset, first, list(lines.values()), quoted))
    columns.append(_average_column(datasets, list(lines.values()), quoted))
    numbers = _long_numbers([row for line in lines.values() for row in line.values()], ("val", "test"))
    text = text_table(columns, num_key_columns=4, rules=_rule_before(first, quoted))
    return PaperTable(
        name="tasks_by_methods",
        caption="Methods on every task, by each task's metric on test, and their mean.",
        text=text,
        numbers=numbers,
        notes=[
            f"{count_note(cells_)} Mean: of the tasks' means, whatever their metrics, only where all have one and "
            "more is better in all; it is not tested.",
            *bold_note(cells_, [score(row, "test") for row in cells_], any_bold=bool(text.bold)),
            *collapsed_note(cells_),
            *edge_notes(cells_),
            *recipe_notes(cells_),
            *_quoted_notes("tasks_by_methods", published),
        ],
        run_ids=[
            *(tuple(run_id for row in line.values() for run_id in row["run_ids"]) for line in lines.values()),
            *[()] * len(quoted),
        ],
        methods=[*methods_of(first), *[""] * len(quoted)],
    )


def _task_column(
    dataset: str, first: Sequence[Cell], lines: Sequence[dict[str, Cell]], quoted: Sequence[Published]
) -> Column:
    present = {index: line[dataset] for index, line in enumerate(lines) if dataset in line}
    name = score(next(iter(present.values())), "test")
    bold: set[int] = set()
    for model in {row["model"] for row in first}:
        indices = [index for index in present if first[index]["model"] == model]
        bold |= {indices[best] for best in best_rows([present[index] for index in indices], name)}
    texts = [
        show_metric(present[index], name) + edge_mark(present[index]) if index in present else MISSING
        for index in range(len(lines))
    ]
    values = [
        float(present[index][name]) if index in present and present[index].get(f"{name}_n", 0) else None
        for index in range(len(lines))
    ]
    label = metric(name).label.removeprefix("test ")
    column = Column(f"{dataset} ({label}){ARROWS[metric(name).direction]}", texts, values, frozenset(bold))
    return _with_quoted(column, [row.scores.get(dataset, MISSING) for row in quoted])


def _average_column(datasets: Sequence[str], lines: Sequence[dict[str, Cell]], quoted: Sequence[Published]) -> Column:
    values: list[float | None] = []
    for line in lines:
        found = [
            float(line[dataset][score(line[dataset], "test")])
            for dataset in datasets
            if dataset in line and line[dataset].get(f"{score(line[dataset], 'test')}_n", 0)
        ]
        is_sensible = all(metric(score(cell, "test")).direction is Direction.HIGHER for cell in line.values())
        values.append(math.fsum(found) / len(found) if len(found) == len(datasets) and is_sensible else None)
    texts = [MISSING if value is None else f"{value:.4f}" for value in values]
    return _with_quoted(Column("mean", texts, values), [row.scores.get("mean", MISSING) for row in quoted])


# ---------------------------------------------------------------- learning rates


def learning_rates(table: pd.DataFrame, best: pd.DataFrame) -> PaperTable | None:
    """Val scores at every learning rate (columns) of every condition, its best rate, and its ratio to that of full."""
    rows = [row for row in as_rows(best) if len(row["tried"]) > 1]
    if not rows:
        return None
    by_condition: dict[str, dict[float, Cell]] = {}
    for cell in as_rows(table):
        by_condition.setdefault(cell["condition_id"], {})[cell["learning_rate"]] = cell
    rates = sorted({rate for row in rows for rate in row["tried"]})
    full = full_of(rows)
    columns = key_columns(rows)
    num_key_columns = len(columns)
    for rate in rates:
        found = [by_condition[row["condition_id"]].get(rate) for row in rows]
        columns.append(_rate_column(rate, rows, found))
    columns.append(learning_rate_column(rows, "best"))
    ratios = [
        row["learning_rate"] / full[comparison_of(row)]["learning_rate"]
        if comparison_of(row) in full and row["is_chosen"]
        else None
        for row in rows
    ]
    if full:
        texts = [MISSING if ratio is None else f"{ratio:.3g}{TIMES}" for ratio in ratios]
        columns.append(Column("best / full's", texts, ratios))
    shown = [cell for row in rows for cell in by_condition[row["condition_id"]].values()]
    numbers = _long_numbers([{**cell, "edge": None, "bounded": None} for cell in shown], ("val", "test"))
    # The best rates and what they are of full's, for whoever fits a line through them.
    chosen = {
        row["cell_id"]: (row["edge"], row["bounded"], ratio)
        for row, ratio in zip(rows, ratios, strict=True)
        if row["is_chosen"]
    }
    further = [
        {"edge": edge, "bounded": bounded, "chosen": cell["cell_id"] in chosen, "ratio_to_full": ratio}
        for cell in shown
        for edge, bounded, ratio in [chosen.get(cell["cell_id"], (None, None, None))] * 2  # on val and on test
    ]
    numbers = pd.concat(
        [numbers.drop(columns=["edge", "bounded"]), pd.DataFrame(further, dtype=object)], axis="columns"
    )
    names = sorted({score(row, "val") for row in rows})
    return PaperTable(
        name="learning_rates",
        caption=f"Learning rates: {' or '.join(title(name) for name in names)} at every rate.",
        text=text_table(columns, num_key_columns=num_key_columns),
        numbers=numbers,
        notes=[
            f"{count_note(shown)} (n=...): fewer than at other rates of the row, which are then preferred.",
            "Bold: the chosen rate of the row; this marks the choice and is no test of a difference.",
            *([NOTE_BEST_OF_FULL] if full else []),
            *collapsed_note(shown),
            *edge_notes(rows),
            *recipe_notes(rows),
        ],
        run_ids=[
            tuple(run_id for cell in by_condition[row["condition_id"]].values() for run_id in cell["run_ids"])
            for row in rows
        ],
        methods=methods_of(rows),
    )


NOTE_BEST_OF_FULL = (
    "best / full's: ratio to the best rate of full fine-tuning of the same model, dataset and recipe; none where that "
    "was not run."
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
        text = show_metric(cell, name) if has_value else show_status(cell)
        fewer = has_value and cell[f"{name}_n"] < row.get(f"{name}_n", 0)
        text += f" (n={cell[f'{name}_n']})" if fewer else ""
        texts.append(f"{text} ({num_failed} failed)" if has_value and num_failed else text)
        values.append(float(cell[name]) if has_value else None)
        if has_value and row["is_chosen"] and rate == row["learning_rate"]:
            bold.add(index)
    return Column(show_rate(rate), texts, values, frozenset(bold))
