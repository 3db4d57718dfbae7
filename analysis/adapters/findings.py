"""From saved runs to frames: every measure of every matrix of every run, each beside what random directions would give.

A matrix is one role of one block. Nothing is averaged here; `analysis.adapters.summaries` does that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from analysis.adapters import measures
from analysis.adapters.measures import Decomposition
from analysis.comparisons import Cell
from analysis.load import LoadError
from analysis.methods import is_full
from harness.content.errors import ModelError
from harness.deltas import DeltaWeight, by_untrained_base, find_each, read_deltas, role_of
from harness.placement.select import Target
from harness.saved import SavedRun

# The paper on intruder dimensions looks at the first 10 and sweeps epsilon; its code has 0.5.
EPSILONS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FIRST_DIMENSIONS = (1, 5, 10, 20)
# Of a delta weight that is no product of thin factors: the numbers of its directions that are looked at.
RANKS_OF_DENSE = (1, 4, 16, 64)
# So many singular vectors are kept to compare runs by, and so many singular values to draw.
MOST_DIRECTIONS = 64
# Draws what is random: the same numbers whenever the same runs are read.
_SEED = 0


@dataclass(frozen=True)
class Findings:
    """What was found in the weights of a sweep's runs: a frame for each measure, a row for each matrix of each run.

    All frames have `condition` (a number of `cells`), `seed`, `run_id`, `role` and `block`. What has no value is None.

    Attributes:
        cells: the conditions, as `select.best_cells` has them.
        spectra: `rank` of the factors, `num_rows`, `num_columns`; `stable_rank`, `effective_rank`, `energy_rank_90`
            and `_99`, each also with `_random`; `delta_norm`, `base_norm` and `drift`, the first over the second.
        values: the singular values by `index`, over the largest: `value`, and `value_random`.
        amplification: for so many directions (`rank`) `projected`, `of_base`, `floor`, norms and `factor`.
        intruders: `count` among the first `k` dimensions by `epsilon`, and `count_random`.
        similarity: phi(k, k) of two subspaces and its `floor`, by `kind`: `ranks` (two ranks of one placement at one
            seed), `seeds` (two seeds of a condition), `blocks` (two blocks of a run), `full` (with full fine-tuning at
            one seed); `other` is the other one's condition, `other_seed` and `other_block` likewise.
        grids: phi(i, j) for every i and j, by kind, conditions of both and role: one for each block and pair of seeds.
        features: in features of the matrices of a role, which the floor of phi is made of.
        problems: one sentence for each run that could not be read, and for comparisons that mean nothing.
    """

    cells: list[Cell]
    spectra: pd.DataFrame
    values: pd.DataFrame
    amplification: pd.DataFrame
    intruders: pd.DataFrame
    similarity: pd.DataFrame
    grids: dict[tuple[str, int, int, str], list[Tensor]]
    features: dict[str, int]
    problems: list[str]


@dataclass
class _Rows:
    """Rows of the frames to be."""

    spectra: list[dict[str, Any]] = field(default_factory=list)
    values: list[dict[str, Any]] = field(default_factory=list)
    amplification: list[dict[str, Any]] = field(default_factory=list)
    intruders: list[dict[str, Any]] = field(default_factory=list)
    similarity: list[dict[str, Any]] = field(default_factory=list)
    grids: dict[tuple[str, int, int, str], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    features: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Learned:
    """The directions of one run's matrices: `(in_features, p)` by role and block."""

    saved: SavedRun
    condition: int
    seed: int
    right: dict[tuple[str, int | None, str], Tensor]


def find_in_weights(cells: Sequence[Cell], seeds: Mapping[str, int], runs_dir: Path) -> Findings:
    """Reads the weights of every run of these conditions, base by base, and measures them.

    Args:
        cells: the conditions, as `select.best_cells` has them, each with its `run_ids`.
        seeds: of each run, by its id.
        runs_dir: where the runs lie.

    Raises:
        LoadError: no run's weights can be read; a sentence for each says why.
    """
    condition_of = {run_id: number for number, cell in enumerate(cells) for run_id in cell["run_ids"]}
    runs, problems = find_each(list(condition_of), runs_dir)
    rows, bases = _Rows(), []
    for group in by_untrained_base(runs):
        try:
            learned = list(_of_group(group, condition_of, seeds, rows, problems))
        except ModelError as error:
            problems.append(f"{group[0].run_id}: {error}")
            continue
        _compare_runs(learned, cells, rows)
        bases += [learned] if learned else []
    if not bases:
        why = "".join(f"\n  {problem}" for problem in problems) or "\n  what these runs trained is no matrix"
        raise LoadError(f"no run has weights to analyse:{why}")
    problems += _other_bases(bases, cells)
    return Findings(
        cells=list(cells),
        spectra=pd.DataFrame(rows.spectra),
        values=pd.DataFrame(rows.values),
        amplification=pd.DataFrame(rows.amplification),
        intruders=pd.DataFrame(rows.intruders),
        similarity=pd.DataFrame(rows.similarity, columns=_SIMILARITY),
        grids=dict(rows.grids),
        features=rows.features,
        problems=problems,
    )


def _of_group(
    group: Sequence[SavedRun],
    condition_of: Mapping[str, int],
    seeds: Mapping[str, int],
    rows: _Rows,
    problems: list[str],
) -> Iterator[_Learned]:
    """Measures each run of a base by itself, and keeps the directions by which it is compared with others."""
    bases: dict[Target, Decomposition] = {}
    floors: dict[tuple[tuple[int, int], int | None], Tensor] = {}
    for saved, deltas in read_deltas(group, problems):
        condition, seed = condition_of[saved.run_id], seeds[saved.run_id]
        right = {}
        draw = torch.Generator().manual_seed(_SEED)
        for delta in deltas:
            target = delta.target
            if target not in bases:
                bases[target] = measures.decompose(delta.base)
            thin = delta.low is not None and delta.high is not None
            found = (
                measures.decompose_product(delta.high, delta.low)  # type: ignore[arg-type]
                if thin
                else measures.decompose(delta.matrix())
            )
            shape = (delta.base.shape[0], delta.base.shape[1])
            rank = len(found.values) if thin else None
            if (shape, rank) not in floors:
                floors[shape, rank] = measures.random_spectrum(shape, rank, draw)
            role = role_name(target)
            name = {"condition": condition, "seed": seed, "run_id": saved.run_id}
            name |= {"role": role, "block": target.block}
            rows.spectra.append({**name, **_spectrum(delta, found, rank, floors[shape, rank])})
            rows.values += [{**name, **line} for line in _values(found.values, floors[shape, rank])]
            rows.amplification += [{**name, **line} for line in _amplifications(delta, bases[target], found, rank)]
            rows.intruders += [{**name, **line} for line in _intruders(delta, bases[target], found, draw)]
            rows.features[role] = shape[1]
            right[role, target.block, target.module] = found.right[:, :MOST_DIRECTIONS].float()
        if right:
            yield _Learned(saved, condition, seed, right)


def role_name(target: Target) -> str:
    """What the frames call the role of a target: of an encoder-decoder with its stack, as "decoder.q"."""
    return f"{target.stack}.{role_of(target)}" if target.stack else role_of(target)


def _spectrum(delta: DeltaWeight, found: Decomposition, rank: int | None, random: Tensor) -> dict[str, Any]:
    values = found.values
    norm = float(values.norm())
    ranks: dict[str, float] = {}
    for ending, spectrum in (("", values), ("_random", random)):
        ranks |= {
            f"stable_rank{ending}": measures.stable_rank(spectrum),
            f"effective_rank{ending}": measures.effective_rank(spectrum),
            f"energy_rank_90{ending}": measures.energy_rank(spectrum, 0.9),
            f"energy_rank_99{ending}": measures.energy_rank(spectrum, 0.99),
        }
    return {
        "rank": rank,
        "num_rows": delta.base.shape[0],
        "num_columns": delta.base.shape[1],
        **ranks,
        "delta_norm": norm,
        "base_norm": float(delta.base.double().norm()),
        "drift": measures.drift(delta.base, norm),
    }


def _values(values: Tensor, random: Tensor) -> Iterator[dict[str, Any]]:
    shown = values[:MOST_DIRECTIONS] / values[0], random[:MOST_DIRECTIONS] / random[0]
    for index, (value, other) in enumerate(zip(*(each.tolist() for each in shown), strict=True), start=1):
        yield {"index": index, "value": value, "value_random": other}


def _amplifications(
    delta: DeltaWeight, base: Decomposition, found: Decomposition, rank: int | None
) -> Iterator[dict[str, Any]]:
    most = len(found.values)
    for directions in (rank,) if rank is not None else [each for each in RANKS_OF_DENSE if each <= most]:
        one = measures.amplification(delta.base, base.values, found, directions)
        yield {
            "rank": directions,
            "projected": one.projected,
            "of_base": one.of_base,
            "floor": one.floor,
            "base_norm": one.base_norm,
            "delta_norm": one.delta_norm,
            "factor": one.factor,
        }


def _intruders(
    delta: DeltaWeight, base: Decomposition, found: Decomposition, draw: torch.Generator
) -> Iterator[dict[str, Any]]:
    cosines = [
        measures.nearest_cosines(
            measures.leading_left_vectors(delta.base.double() + change, max(FIRST_DIMENSIONS)), base.left
        )
        for change in (delta.matrix().double(), measures.random_directions(found, draw))
    ]
    for epsilon in EPSILONS:
        for k in FIRST_DIMENSIONS:
            count, random = (measures.count_intruders(each, epsilon=epsilon, k=k) for each in cosines)
            yield {"epsilon": epsilon, "k": k, "count": count, "count_random": random}


# ---------------------------------------------------------------- subspaces of two

_SIMILARITY = [
    *("kind", "condition", "other", "seed", "other_seed", "run_id", "other_run_id"),
    *("role", "block", "other_block", "k", "phi", "floor"),
]


def _compare_runs(learned: Sequence[_Learned], cells: Sequence[Cell], rows: _Rows) -> None:
    for one in learned:
        _compare_blocks(one, rows)
    for one, other in combinations(sorted(learned, key=lambda each: (each.condition, each.seed)), 2):
        kind = _kind(one, other, cells)
        if kind is None:
            continue
        for place in (each for each in one.right if each in other.right):
            phi = measures.subspace_similarity(one.right[place].double(), other.right[place].double())
            role, block, _ = place
            rows.grids[kind, one.condition, other.condition, role].append(phi)
            name = {
                "kind": kind,
                **{"condition": one.condition, "other": other.condition},
                **{"seed": one.seed, "other_seed": other.seed},
                **{"run_id": one.saved.run_id, "other_run_id": other.saved.run_id},
                **{"role": role, "block": block, "other_block": block},
            }
            rows.similarity += [{**name, **line} for line in _diagonal(phi, len(one.right[place]))]


def _compare_blocks(one: _Learned, rows: _Rows) -> None:
    """Pairs of blocks of one run: which directions of the stream its adapters read in several of them."""
    by_role: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for (role, block, _), right in one.right.items():
        if block is not None:
            by_role[role].append((block, right))
    for role, members in by_role.items():
        for (block, right), (other_block, other) in combinations(members, 2):
            if len(right) != len(other):  # blocks of different widths read no common space
                continue
            phi = measures.subspace_similarity(right.double(), other.double())
            name = {
                "kind": "blocks",
                **{"condition": one.condition, "other": one.condition, "seed": one.seed, "other_seed": one.seed},
                **{"run_id": one.saved.run_id, "other_run_id": one.saved.run_id},
                **{"role": role, "block": block, "other_block": other_block},
            }
            rows.similarity += [{**name, **line} for line in _diagonal(phi, len(right))]


def _diagonal(phi: Tensor, features: int) -> Iterator[dict[str, Any]]:
    """phi(k, k) for k of 1, 2, 4 ... and the most that there is."""
    most = min(phi.shape)
    for k in sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most}):
        yield {"k": k, "phi": float(phi[k - 1, k - 1]), "floor": measures.similarity_floor(k, k, features)}


def _kind(one: _Learned, other: _Learned, cells: Sequence[Cell]) -> str | None:
    """By what two runs are compared; None where too much differs for a comparison to say something."""
    first, second = cells[one.condition], cells[other.condition]
    if one.condition == other.condition:
        return "seeds"
    if one.seed != other.seed or first["dataset"] != second["dataset"]:
        return None
    if is_full(first) != is_full(second):
        return "full"
    names = ("method", "target_layers", "recipe_id")
    return "ranks" if all(first[name] == second[name] for name in names) and first["rank"] != second["rank"] else None


def _other_bases(bases: Sequence[Sequence[_Learned]], cells: Sequence[Cell]) -> Iterator[str]:
    """One sentence for runs of a model by one name whose training began from different weights."""
    for number, one in enumerate(bases):
        for other in bases[number + 1 :]:
            first, second = one[0], other[0]
            if cells[first.condition]["model"] == cells[second.condition]["model"]:
                yield (
                    f"{first.saved.run_id} and {second.saved.run_id} ({len(one)} and {len(other)} runs): their "
                    f"{cells[first.condition]['model']} began from different weights (a tiny or new model is drawn "
                    "from the seed), so directions of one mean nothing in the other: not compared."
                )
