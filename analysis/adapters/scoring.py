"""What runs score with other weights in their matrices: no training, one evaluation for each change.

Oracle truncation: W0 + the best approximation of rank r of full fine-tuning's difference. Where it scores as full
fine-tuning does and LoRA of rank r does not, the rank has the capacity and training did not find it. All that is no
matrix of a block (head, biases, norms, embeddings) is full fine-tuning's at every rank: rank 0 says what that does.

Intruders: those among the first dimensions of W0 + dW with a part of their singular value left; beside it the same done
to as many random ones of the first dimensions that are none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from analysis.adapters import measures
from analysis.adapters.findings import RANKS_OF_DENSE
from analysis.adapters.kept_scores import KeptScores
from analysis.comparisons import Cell
from analysis.load import LoadError
from analysis.methods import is_full
from harness.config.validation import ConfigError
from harness.content.errors import DataError, ModelError
from harness.deltas import DeltaWeight, by_untrained_base, find_each, read_deltas
from harness.evaluate import Changed, evaluate_changed, origin_of_scores
from harness.placement.select import Target
from harness.saved import SavedRun

# What is left of an intruder's singular value.
KEPT = (0.7, 0.3, 0.0)
EPSILON, FIRST = 0.5, 10
NOTHING_KEPT = KeptScores(None)
_PARTS = [(part, control) for part in KEPT for control in (False, True)]

# For the delta weights of a run the changes that are scored, by what tells them apart, and what else to say.
_Changes = Callable[[Sequence[DeltaWeight]], tuple[Mapping[tuple[Any, ...], Changed], dict[str, Any]]]


@dataclass(frozen=True)
class _Question:
    """What is asked of runs.

    Attributes:
        settings: what rows follow from besides a run and the code, to keep them by.
        names: of what tells the changes apart, as columns.
        splits: that are scored.
        changes_of: what is changed of a run.
    """

    settings: tuple[Any, ...]
    names: tuple[str, ...]
    splits: tuple[str, ...]
    changes_of: _Changes


def truncation_ranks(cells: Sequence[Cell]) -> list[int]:
    """Rank 0, the ranks of the sweep, and 1, 4, 16 and 64."""
    return sorted({0, *RANKS_OF_DENSE, *(int(cell["rank"]) for cell in cells if cell["rank"] is not None)})


def score_truncations(
    cells: Sequence[Cell],
    seeds: Mapping[str, int],
    runs_dir: Path,
    problems: list[str],
    *,
    progress: Callable[[str], None] = lambda text: None,
    kept: KeptScores = NOTHING_KEPT,
) -> pd.DataFrame:
    """A row for each run of full fine-tuning, rank and split: `condition`, `seed`, `run_id`, `rank`, `split`, scores.

    The rank of the whole difference is None. `problems` gets a sentence for each run that cannot be scored, and
    `progress` one for each that was. What `kept` has is not scored again, and it gets what is. Raises `LoadError` where
    no run of full fine-tuning has weights.
    """
    ranks = truncation_ranks(cells)

    def changes_of(deltas: Sequence[DeltaWeight]) -> tuple[Mapping[tuple[Any, ...], Changed], dict[str, Any]]:
        whole = [(delta, measures.decompose(delta.matrix())) for delta in deltas]
        return {(None,): tuple, **{(rank,): partial(_truncated, whole, rank) for rank in ranks}}, {}

    chosen = {number: cell for number, cell in enumerate(cells) if is_full(cell)}
    question = _Question(("truncation", ranks), ("rank",), ("val", "test"), changes_of)
    rows = list(_scored(question, chosen, seeds, runs_dir, problems, progress, kept))
    if not rows:
        raise LoadError(f"no run of full fine-tuning has weights to truncate.{_lines(problems)}")
    return pd.DataFrame(rows, dtype=object)


def _truncated(
    whole: Sequence[tuple[DeltaWeight, measures.Decomposition]], rank: int
) -> Iterator[tuple[Target, Tensor]]:
    for delta, decomposed in whole:
        yield delta.target, delta.base + decomposed.truncated(rank).float()


def score_without_intruders(
    cells: Sequence[Cell],
    seeds: Mapping[str, int],
    runs_dir: Path,
    problems: list[str],
    *,
    epsilon: float = EPSILON,
    progress: Callable[[str], None] = lambda text: None,
    kept: KeptScores = NOTHING_KEPT,
) -> pd.DataFrame:
    """A row for each run and part that is left: `kept`, `is_control`, `num_intruders` of all matrices, scores on test.

    A run without intruders has the same scores for every part, where another one of its condition has some; else, the
    row of `kept` 1 alone. Otherwise as `score_truncations`.
    """

    def changes_of(deltas: Sequence[DeltaWeight]) -> tuple[Mapping[tuple[Any, ...], Changed], dict[str, Any]]:
        plans = [
            (delta, *measures.find_intruders(delta.base, delta.matrix(), epsilon=epsilon, k=FIRST)) for delta in deltas
        ]
        num = sum(len(found) for _, _, found in plans)
        several = _PARTS if num else []
        changes: dict[tuple[Any, ...], Changed] = {each: partial(_scaled, plans, *each) for each in several}
        return {(1.0, False): tuple, **changes}, {"num_intruders": num, "epsilon": epsilon}

    question = _Question(("intruders", epsilon, FIRST, KEPT), ("kept", "is_control"), ("test",), changes_of)
    rows = list(_scored(question, dict(enumerate(cells)), seeds, runs_dir, problems, progress, kept))
    if not rows:
        raise LoadError(f"no run has weights to look for intruders in.{_lines(problems)}")
    have_some = {row["condition"] for row in rows if row["num_intruders"]}
    unchanged = [row for row in rows if row["condition"] in have_some and not row["num_intruders"]]
    rows += [{**row, "kept": part, "is_control": control} for row in unchanged for part, control in _PARTS]
    return pd.DataFrame(rows, dtype=object)


def _scaled(
    plans: Sequence[tuple[DeltaWeight, measures.Decomposition, Tensor]], kept: float, control: bool
) -> Iterator[tuple[Target, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    for delta, tuned, intruders in plans:
        if control:
            others = torch.tensor([each for each in range(FIRST) if each not in intruders.tolist()], dtype=torch.long)
            intruders = others[torch.randperm(len(others), generator=draw)[: len(intruders)]]
        if len(intruders):
            yield delta.target, measures.scaled_dimensions(tuned, intruders, keep=kept).float()


def _scored(
    question: _Question,
    chosen: Mapping[int, Cell],
    seeds: Mapping[str, int],
    runs_dir: Path,
    problems: list[str],
    progress: Callable[[str], None],
    kept: KeptScores,
) -> Iterator[dict[str, Any]]:
    """Rows of all runs, in their order."""
    conditions = {run_id: number for number, cell in chosen.items() for run_id in cell["run_ids"]}
    runs, others = find_each(list(conditions), runs_dir)
    problems += others
    keys = {saved.run_id: _key(saved, question) for saved in runs}
    known = {run_id: kept.find(key) for run_id, key in keys.items()}
    rows = {run_id: found for run_id, found in known.items() if found is not None}
    if rows:
        progress(f"{len(rows)} of {len(runs)} runs are scored already")
    for group in by_untrained_base([saved for saved in runs if saved.run_id not in rows]):
        for saved, deltas in read_deltas(group, problems):
            if not deltas:
                continue
            changes, also = question.changes_of(deltas)
            try:
                scores = evaluate_changed(saved, changes, splits=question.splits)
            except (ConfigError, DataError, ModelError) as error:
                problems.append(f"{saved.run_id}: {error}")
                continue
            rows[saved.run_id] = [
                {**also, **dict(zip(question.names, change, strict=True)), "split": split, **scored.scores}
                for change, by_split in scores.items()
                for split, scored in by_split.items()
            ]
            kept.keep(keys[saved.run_id], rows[saved.run_id])
            progress(f"{saved.run_id}: scored {len(scores)} times ({len(rows)} of {len(runs)} runs)")
    for saved in runs:
        name = {"condition": conditions[saved.run_id], "seed": seeds[saved.run_id], "run_id": saved.run_id}
        yield from ({**name, **row} for row in rows.get(saved.run_id, ()))


def _key(saved: SavedRun, question: _Question) -> str | None:
    origin = origin_of_scores(saved)
    return None if origin is None else json.dumps([question.settings, origin], sort_keys=True)


def _lines(problems: Sequence[str]) -> str:
    return "".join(f"\n  {problem}" for problem in problems)
