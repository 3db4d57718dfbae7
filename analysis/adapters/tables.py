"""The tables of what was found in weights, each number beside what random directions would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from analysis.adapters.findings import EPSILONS, Findings
from analysis.adapters.summaries import named, over_seeds, text_of
from analysis.tables.cells import MISSING, cell_name, same_everywhere
from analysis.tables.columns import key_columns, methods_of, run_ids_of
from analysis.tables.structure import Column, PaperTable, text_table

# The first dimensions that the table of intruders shows; its CSV has all numbers.
_SHOWN_DIMENSIONS = 10
_SHOWN_EPSILONS = (0.3, 0.5, 0.7, 0.9)

NOTE_MEANS = (
    "Mean over the blocks of a run, then over seeds; ± is the standard deviation over seeds, and the CSV has the half "
    "width of the 95 % interval (Student's t)."
)


def adapter_tables(found: Findings) -> list[PaperTable]:
    """Every table that the runs allow."""
    tables = [_spectra(found), _amplification(found), _intruders(found), _drift(found)]
    return tables if found.similarity.empty else [*tables, _similarity(found)]


def _table(
    found: Findings,
    name: str,
    caption: str,
    rows: Sequence[dict[str, Any]],
    columns: Sequence[Column],
    notes: Sequence[str],
    *,
    numbers: Sequence[dict[str, Any]] | None = None,
) -> PaperTable:
    """A table whose rows are conditions and roles; its CSV has `numbers`, or else the rows."""
    cells = [found.cells[row["condition"]] for row in rows]
    keys = key_columns(cells)
    keys.append(Column("role", [row["role"] for row in rows]))
    same = same_everywhere(cells, ("model", "dataset"))
    return PaperTable(
        name=name,
        caption=caption,
        text=text_table([*keys, *columns], num_key_columns=len(keys)),
        numbers=pd.DataFrame([named(found, row) for row in numbers or rows], dtype=object),
        notes=[*([f"{same}."] if same else []), NOTE_MEANS, *notes, *found.problems],
        run_ids=run_ids_of(cells),
        methods=methods_of(cells),
    )


def _column(
    title: str,
    rows: Sequence[dict[str, Any]],
    name: str,
    digits: str,
    text: Callable[[dict[str, Any]], str] | None = None,
) -> Column:
    shown = text or (lambda row: text_of(row, name, digits) or MISSING)
    return Column(title, [shown(row) for row in rows], [row[name] for row in rows])


def _beside_random(title: str, rows: Sequence[dict[str, Any]], name: str, random: str, digits: str) -> list[Column]:
    return [
        _column(title, rows, name, digits),
        _column("random", rows, random, digits, lambda row: _plain(row[random], digits)),
    ]


def _plain(value: float | None, digits: str) -> str:
    return MISSING if value is None else f"{value:{digits}}"


def _spectra(found: Findings) -> PaperTable:
    names = [
        f"{name}{ending}"
        for name in ("stable_rank", "effective_rank", "energy_rank_90", "energy_rank_99")
        for ending in ("", "_random")
    ]
    rows = over_seeds(found.spectra, ("condition", "role"), ["rank", *names])
    columns = [
        *_beside_random("stable rank", rows, "stable_rank", "stable_rank_random", ".2f"),
        *_beside_random("effective rank", rows, "effective_rank", "effective_rank_random", ".2f"),
        *_beside_random("90 % energy", rows, "energy_rank_90", "energy_rank_90_random", ".1f"),
        *_beside_random("99 % energy", rows, "energy_rank_99", "energy_rank_99_random", ".1f"),
    ]
    return _table(
        found,
        "adapter_spectra",
        "How many directions the delta weights have.",
        rows,
        columns,
        [
            "Of the singular values of a delta weight: stable rank is the sum of their squares over the largest one; "
            "effective rank the exponential of the entropy of their shares; 90 % energy how many of them have that "
            "share of the sum of squares.",
            "random: the same of Gaussian factors of the same rank and shape, and of a Gaussian matrix for what is no "
            "product of factors, as full fine-tuning's difference.",
        ],
    )


def _amplification(found: Findings) -> PaperTable:
    names = ["projected", "floor", "of_base", "base_norm", "delta_norm", "factor"]
    rows = over_seeds(found.amplification, ("condition", "role", "rank"), names)
    columns = [
        Column("directions", [str(row["rank"]) for row in rows], [float(row["rank"]) for row in rows]),
        _column("W in them", rows, "projected", ".3g"),
        _column("random", rows, "floor", ".3g", lambda row: _plain(row["floor"], ".3g")),
        _column("W's own", rows, "of_base", ".3g", lambda row: _plain(row["of_base"], ".3g")),
        _column("norm of W", rows, "base_norm", ".3g", lambda row: _plain(row["base_norm"], ".3g")),
        _column("norm of delta weight", rows, "delta_norm", ".3g"),
        _column("amplification", rows, "factor", ".3g"),
    ]
    return _table(
        found,
        "adapter_amplification",
        "How much of the base weight lies in the directions of the delta weight, and how far these are amplified.",
        rows,
        columns,
        [
            "As Table 7 of the LoRA paper (arXiv 2106.09685): W in them is the Frobenius norm of `U^T W V` with the "
            "first so many left and right singular vectors of the delta weight, W's own that with W's own first ones, "
            "amplification the norm of the delta weight over the former.",
            "random: `|W| r / sqrt(rows * columns)`, what r random directions have.",
        ],
    )


def _intruders(found: Findings) -> PaperTable:
    whole = over_seeds(found.intruders, ("condition", "role", "epsilon", "k"), ["count", "count_random"])
    by_row: dict[tuple[int, str], dict[float, dict[str, Any]]] = {}
    for line in whole:
        if line["k"] == _SHOWN_DIMENSIONS:
            by_row.setdefault((line["condition"], line["role"]), {})[line["epsilon"]] = line
    rows: list[dict[str, Any]] = [{"condition": condition, "role": role} for condition, role in by_row]
    columns = []
    for epsilon in _SHOWN_EPSILONS:
        lines = [by_row[row["condition"], row["role"]][epsilon] for row in rows]
        columns += _beside_random(f"epsilon {epsilon:g}", lines, "count", "count_random", ".2f")
    return _table(
        found,
        "adapter_intruders",
        f"Intruder dimensions among the first {_SHOWN_DIMENSIONS} of a matrix.",
        rows,
        columns,
        [
            "A left singular vector of the trained weight is an intruder where its cosine with every one of the base "
            "weight is below epsilon (arXiv 2410.21228, definition 3.1); mean number of a matrix.",
            "random: the same with the delta weight's singular values on random directions.",
            f"The CSV has epsilon of {', '.join(f'{each:g}' for each in EPSILONS)} and the first 1, 5, 10 and 20.",
        ],
        numbers=whole,
    )


def _drift(found: Findings) -> PaperTable:
    lines = over_seeds(found.spectra, ("condition", "role", "block"), ["drift", "delta_norm", "base_norm"])
    blocks = sorted({line["block"] for line in lines}, key=lambda block: (pd.isna(block), block))
    at = {(line["condition"], line["role"], line["block"]): line for line in lines}
    rows = [{"condition": condition, "role": role} for condition, role in dict.fromkeys(key[:2] for key in at)]
    columns = []
    for block in blocks:
        own = [at.get((row["condition"], row["role"], block)) for row in rows]
        texts = [MISSING if line is None else text_of(line, "drift", ".4f") or MISSING for line in own]
        title = "outside blocks" if pd.isna(block) else f"block {block:g}"
        columns.append(Column(title, texts, [None if line is None else line["drift"] for line in own]))
    return _table(
        found,
        "adapter_drift",
        "How far each matrix has moved: the norm of the delta weight over that of the base weight.",
        rows,
        columns,
        ["Frobenius norms. There is no random floor: directions do not change a norm."],
        numbers=lines,
    )


_KINDS = {
    "ranks": "two ranks, one seed",
    "seeds": "two seeds",
    "blocks": "two blocks of a run",
    "full": "with full fine-tuning, one seed",
}


def _similarity(found: Findings) -> PaperTable:
    frame = found.similarity
    rows = over_seeds(frame, ("kind", "condition", "other", "role", "k"), ["phi", "floor"])
    most: dict[tuple[Any, ...], int] = {}
    for row in rows:
        key = (row["kind"], row["condition"], row["other"], row["role"])
        most[key] = max(most.get(key, 0), row["k"])
    at = {(row["kind"], row["condition"], row["other"], row["role"], row["k"]): row for row in rows}
    order = sorted(most, key=lambda key: [*_KINDS].index(key[0]))
    firsts, lasts = [at[*key, 1] for key in order], [at[*key, most[key]] for key in order]
    columns = [
        Column("compared", [_KINDS[key[0]] for key in order]),
        Column("with", [MISSING if key[1] == key[2] else cell_name(found.cells[key[2]]) for key in order]),
        _column("phi(1, 1)", firsts, "phi", ".3f"),
        _column("random", firsts, "floor", ".3f", lambda row: _plain(row["floor"], ".3f")),
        Column("k", [str(row["k"]) for row in lasts], [float(row["k"]) for row in lasts]),
        _column("phi(k, k)", lasts, "phi", ".3f"),
        _column("random", lasts, "floor", ".3f", lambda row: _plain(row["floor"], ".3f")),
    ]
    return _table(
        found,
        "adapter_similarity",
        "How much of the directions of one delta weight lies in those of another.",
        firsts,
        columns,
        [
            "phi(i, j) of the LoRA paper (arXiv 2106.09685, section 7.2) with the first right singular vectors of "
            "both, between 0 and 1. random: max(i, j) over the number of columns.",
            "Pairs of seeds share runs and pairs of blocks share matrices: their intervals are too narrow.",
        ],
        numbers=rows,
    )
