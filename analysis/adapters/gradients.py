"""Where the gradient is before training, role by role, held against what a sweep's placements scored.

energy of a matrix        |G|_F^2
share                     its part of the energy of all matrices in the blocks
density                   share over its part of all their entries: 1 where the gradient is spread evenly
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from analysis.adapters import measures
from analysis.adapters.figures import laid_out, page_of_axes
from analysis.adapters.findings import role_name
from analysis.adapters.summaries import over_seeds, subject_of, text_of
from analysis.comparisons import Cell
from analysis.figures import Figure
from analysis.figures.style import our_settings
from analysis.load import LoadError
from analysis.metrics import title
from analysis.select import score
from analysis.tables.cells import MISSING, show_metric
from analysis.tables.columns import key_columns, methods_of, run_ids_of
from analysis.tables.structure import Column, PaperTable, text_table
from harness.config.validation import ConfigError
from harness.content.errors import DataError, ModelError
from harness.deltas import by_untrained_base, find_each
from harness.gradients import gradients_before
from harness.saved import SavedRun

# So many placements of one rank have an order that a correlation says something of.
MIN_PLACEMENTS = 4
# The leading directions whose part of a matrix's energy is shown.
LEADING = 8
_SEED = 0


@dataclass(frozen=True)
class Gradients:
    """What was found before training.

    Attributes:
        cells: the conditions, as `select.best_cells` has them.
        frame: a row for each matrix, model, dataset and seed: `subject`, `seed`, `role`, `block`, `num_entries`,
            `energy`, `share`, `density`, `leading`, the part of the energy in the first `LEADING` singular directions,
            and `leading_random`, that of a Gaussian matrix.
        placed: a row for each run of plain LoRA: `condition`, `seed`, `share` of its placement's matrices together, and
            `density`.
        num_examples: that were asked for.
        problems: one sentence for each run whose beginning cannot be computed.
    """

    cells: list[Cell]
    frame: pd.DataFrame
    placed: pd.DataFrame
    num_examples: int
    problems: list[str]


def find_gradients(cells: Sequence[Cell], seeds: Mapping[str, int], runs_dir: Path, *, num_examples: int) -> Gradients:
    """One backward pass for each base, dataset and seed of these conditions' runs.

    Args:
        cells: the conditions, as `select.best_cells` has them, each with its `run_ids`.
        seeds: of each run, by its id.
        runs_dir: where the runs lie.
        num_examples: of training data, for each pass.

    Raises:
        LoadError: it can be computed for none; a sentence for each says why.
    """
    condition_of = {run_id: number for number, cell in enumerate(cells) for run_id in cell["run_ids"]}
    runs, problems = find_each(list(condition_of), runs_dir)
    beginnings: dict[tuple[Any, ...], list[SavedRun]] = defaultdict(list)
    for number, group in enumerate(by_untrained_base(runs)):
        for saved in group:
            beginnings[number, subject_of(cells[condition_of[saved.run_id]]), seeds[saved.run_id]].append(saved)
    rows: list[dict[str, Any]] = []
    placed: list[dict[str, Any]] = []
    draw = torch.Generator().manual_seed(_SEED)
    floors: dict[tuple[int, int], float] = {}
    for (_, subject, seed), group in beginnings.items():
        try:
            gradients = gradients_before(group[0], num_examples=num_examples)
        except (ConfigError, DataError, ModelError) as error:
            problems.append(f"{group[0].run_id}: {error}")
            continue
        energies = {str(each.target): float(each.matrix.double().square().sum()) for each in gradients}
        entries = {str(each.target): each.matrix.numel() for each in gradients}
        energy, num_entries = sum(energies.values()), sum(entries.values())
        for each in gradients:
            name = str(each.target)
            shape = (each.matrix.shape[0], each.matrix.shape[1])
            if shape not in floors:
                floors[shape] = _leading(measures.random_spectrum(shape, None, draw))
            share = energies[name] / energy if energy else 0.0
            rows.append(
                {
                    **{"subject": subject, "seed": seed, "role": role_name(each.target), "block": each.target.block},
                    **{"num_entries": entries[name], "energy": energies[name], "share": share},
                    "density": share / (entries[name] / num_entries),
                    "leading": _leading(torch.linalg.svdvals(each.matrix.double())),
                    "leading_random": floors[shape],
                }
            )
        for saved in group:
            adapted = [name for name in saved.result.target_modules if name in energies]
            condition = condition_of[saved.run_id]
            if adapted and _is_plain_lora(cells[condition]) and len(adapted) == len(saved.result.target_modules):
                share = sum(energies[name] for name in adapted) / energy if energy else 0.0
                size = sum(entries[name] for name in adapted) / num_entries
                placed.append({"condition": condition, "seed": seed, "share": share, "density": share / size})
    if not rows:
        raise LoadError("no gradient before training:" + "".join(f"\n  {problem}" for problem in problems))
    return Gradients(
        cells=list(cells),
        frame=pd.DataFrame(rows),
        placed=pd.DataFrame(placed, columns=["condition", "seed", "share", "density"]),
        num_examples=num_examples,
        problems=problems,
    )


def _leading(values: torch.Tensor) -> float:
    squares = values.square()
    total = float(squares.sum())
    return float(squares[:LEADING].sum()) / total if total else 0.0


def _is_plain_lora(cell: Cell) -> bool:
    return cell["method"] == "lora" and cell["rank"] is not None


# ---------------------------------------------------------------- tables


def gradient_tables(found: Gradients) -> list[PaperTable]:
    """Role by role; and, where runs of LoRA are there, placement by placement beside their scores."""
    return [_by_role(found), *([_by_placement(found)] if len(found.placed) else [])]


def _by_role(found: Gradients) -> PaperTable:
    summed = found.frame.groupby(["subject", "seed", "role"], sort=False)[["num_entries", "share"]].sum().reset_index()
    whole = summed.groupby(["subject", "seed"])["num_entries"].transform("sum")
    summed["density"] = summed["share"] / (summed["num_entries"] / whole)
    totals = over_seeds(summed, ("subject", "role"), ["share", "density"])
    inside = over_seeds(found.frame, ("subject", "role"), ["leading", "leading_random"])
    subjects = list(dict.fromkeys(row["subject"] for row in totals))
    keys = [Column("role", [row["role"] for row in totals])]
    if len(subjects) > 1:
        keys.insert(0, Column("model and dataset", [row["subject"] for row in totals]))
    columns = [
        _column("share", totals, "share", ".3f"),
        _column("density", totals, "density", ".2f"),
        _column(f"in {LEADING} directions", inside, "leading", ".3f"),
        _column("random", inside, "leading_random", ".3f"),
    ]
    return PaperTable(
        name="gradient_before",
        caption="Where the gradient is before training.",
        text=text_table([*keys, *columns], num_key_columns=len(keys)),
        numbers=pd.DataFrame(
            [
                one | {key: value for key, value in other.items() if key.startswith("leading")}
                for one, other in zip(totals, inside, strict=True)
            ],
            dtype=object,
        ),
        notes=[
            *([f"{subjects[0]}."] if len(subjects) == 1 else []),
            f"The gradient of the mean loss over the first {found.num_examples} training examples, with the base as it "
            "was and a head as it was drawn; over seeds, which draw the head and the order of the examples.",
            "share: the role's part of the sum of squares over all matrices of the blocks. density: that over the "
            "role's part of their entries, 1 where the gradient is spread evenly.",
            f"in {LEADING} directions: how much of a matrix's sum of squares its first {LEADING} singular directions "
            "hold, mean over blocks. random: the same of a Gaussian matrix.",
            *found.problems,
        ],
        run_ids=[() for _ in totals],
        methods=["" for _ in totals],
    )


def _by_placement(found: Gradients) -> PaperTable:
    lines = over_seeds(found.placed, ("condition",), ["share", "density"])
    cells = [found.cells[line["condition"]] for line in lines]
    keys = key_columns(cells)
    columns = [_column("share of the gradient", lines, "share", ".3f"), _column("density", lines, "density", ".2f")]
    for split in ("val", "test"):
        heading = " or ".join(dict.fromkeys(title(score(cell, split)) for cell in cells))
        columns.append(
            Column(
                heading,
                [show_metric(cell, score(cell, split)) for cell in cells],
                [_value(cell, split) for cell in cells],
            )
        )
    return PaperTable(
        name="gradient_and_score",
        caption="The gradient before training in the matrices that a placement adapts, and what it scored.",
        text=text_table([*keys, *columns], num_key_columns=len(keys)),
        numbers=pd.DataFrame(
            [
                {
                    **{name: cell[name] for name in ("model", "dataset", "method", "rank", "target_layers")},
                    **{key: value for key, value in line.items() if key != "condition"},
                    **{score(cell, split): cell[score(cell, split)] for split in ("val", "test")},
                }
                for cell, line in zip(cells, lines, strict=True)
            ],
            dtype=object,
        ),
        notes=[*_correlations(cells, lines), *found.problems],
        run_ids=run_ids_of(cells),
        methods=methods_of(cells),
    )


def _correlations(cells: Sequence[Cell], lines: Sequence[dict[str, Any]]) -> list[str]:
    """How well the order of placements by gradient is that by score on val, for each rank of a model and dataset."""
    groups: dict[tuple[str, Any], list[int]] = defaultdict(list)
    for number, cell in enumerate(cells):
        if _value(cell, "val") is not None:
            groups[subject_of(cell), cell["rank"]].append(number)
    notes = []
    for (subject, rank), members in groups.items():
        if len({cells[number]["target_layers"] for number in members}) < MIN_PLACEMENTS:
            continue
        scores = [_value(cells[number], "val") for number in members]
        shown = []
        for name in ("share", "density"):
            rho = spearmanr([lines[number][name] for number in members], scores)
            shown.append(f"{rho.statistic:.2f} with {name} (p = {rho.pvalue:.2f})")
        notes.append(
            f"{subject}, rank {rank:g}: Spearman's correlation of the score on val over {len(members)} placements: "
            f"{' and '.join(shown)}."
        )
    return notes or [f"No rank has {MIN_PLACEMENTS} placements: too few for a correlation of gradient and score."]


def _value(cell: Cell, split: str) -> float | None:
    value = cell[score(cell, split)]
    return None if value is None or math.isnan(value) else float(value)


def _column(heading: str, rows: Sequence[dict[str, Any]], name: str, digits: str) -> Column:
    return Column(heading, [text_of(row, name, digits) or MISSING for row in rows], [row[name] for row in rows])


# ---------------------------------------------------------------- figure


def gradient_figure(found: Gradients) -> Figure:
    """The density of each role in each block, a map for each model and dataset."""
    return Figure("gradient_before", "Density of the gradient before training", partial(_draw, found))


def _draw(found: Gradients) -> matplotlib.figure.Figure:
    inside = found.frame.dropna(subset=["block"])
    subjects = list(dict.fromkeys(inside["subject"]))
    footnote = (
        "density: a matrix's part of the gradient's sum of squares over its part of the entries, mean over seeds; 1, "
        "in white, where the gradient is spread evenly"
    )
    with our_settings():
        figure, axes = page_of_axes("", subjects, footnote, row_inches=2.4)
        for each, subject in zip(axes, subjects, strict=True):
            own = inside[inside["subject"] == subject]
            table = own.groupby(["role", "block"], sort=False)["density"].mean().unstack()
            table = table.reindex(list(dict.fromkeys(own["role"])))
            values = np.log2(table.to_numpy(dtype=float).clip(min=2.0**-10))
            reach = max(1.0, float(np.nanmax(np.abs(values))))
            drawn = each.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
            for row, role in enumerate(table.index):
                for column, block in enumerate(table.columns):
                    value = table.loc[role, block]
                    if not pd.isna(value) and len(table.columns) <= 16:
                        dark = abs(values[row, column]) > 0.6 * reach
                        each.text(
                            column,
                            row,
                            f"{value:.2g}",
                            ha="center",
                            va="center",
                            fontsize=6,
                            color="white" if dark else "black",
                        )
            each.set_xticks(range(len(table.columns)), [f"{block:g}" for block in table.columns])
            each.set_yticks(range(len(table.index)), list(table.index))
            each.set(xlabel="block", ylabel="")
            bar = figure.colorbar(drawn, ax=each)
            bar.ax.yaxis.set_major_formatter(lambda value, _: f"{2.0**value:g}")
        return laid_out(figure)
