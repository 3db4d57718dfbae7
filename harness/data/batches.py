"""Batches of similar length: what one forward pass takes, and the order of a training epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_WINDOW_BATCHES = 50


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes.

    `inputs`: `input_ids` and the like, each `(examples, tokens)`, padded on the right to the longest example.
    `labels`: `(examples,)`, class index (int64) or target value (float32); for language models `(examples, tokens)`.
    `num_tokens`: real tokens, without padding. `num_targets`: what the loss is averaged over.
    `collated`: the inputs as they were before they went to another device; None where they did not.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    num_tokens: int
    num_targets: int
    collated: dict[str, Tensor] | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        labels = self.labels.to(device, non_blocking=True)
        return Batch(inputs, labels, self.num_tokens, self.num_targets, self.collated or self.inputs)

    def has_inputs_of(self, other: Batch) -> bool:
        """Whether the inputs are the same ones; compared where they were collated, so that no device is waited for."""
        ours, theirs = self.collated or self.inputs, other.collated or other.inputs
        return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def length_bucketed_batches(lengths: np.ndarray, *, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Batches of example indices for one epoch: a random order, but alike in length inside a batch.

    The shuffled examples are taken in windows of 50 batches, each window is sorted by length and cut into batches,
    and the batches are shuffled. Every example comes once; the order depends on `seed` and `epoch` alone.

    >>> batches = length_bucketed_batches(np.array([3, 9, 2, 8]), batch_size=2, seed=0, epoch=0)
    >>> sorted(sorted(batch.tolist()) for batch in batches)
    [[0, 2], [1, 3]]
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    window = batch_size * _WINDOW_BATCHES
    batches: list[np.ndarray] = []
    for start in range(0, len(order), window):
        chosen = order[start : start + window]
        chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
        batches += [chosen[cut : cut + batch_size] for cut in range(0, len(chosen), batch_size)]
    return [batches[index] for index in generator.permutation(len(batches))]


class Examples(Protocol):
    """A split as training needs it: the length of each example in tokens, and batches of them."""

    lengths: np.ndarray

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The examples at `indices` as one batch."""
        ...


def count_steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Optimizer steps of an epoch: the last one may be of fewer examples."""
    return -(-num_examples // batch_size)


class TrainingBatches:
    """The batches of a training split: per optimizer step a list of micro-batches, in a seeded order per epoch.

    Of several processes, each gets every n-th example of a step, and all get the same number of micro-batches: one that
    has run out of examples repeats one, without targets.
    """

    def __init__(
        self,
        split: Examples,
        *,
        batch_size: int,
        micro_batch_size: int | None,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self._split = split
        self._process_index = process_index
        self._num_processes = num_processes
        self._batch_size = batch_size
        self._micro_batch_size = micro_batch_size or batch_size
        self._seed = seed
        self.steps_per_epoch = count_steps_per_epoch(len(split), batch_size)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each step of one epoch (counted from 0) but its first `start` steps.

        Raises `ValueError` when that leaves none: a loop over epochs would not end.
        """
        if start >= self.steps_per_epoch:
            raise ValueError(f"epoch {epoch} has {self.steps_per_epoch} steps and cannot begin after step {start}")
        order = length_bucketed_batches(self._split.lengths, batch_size=self._batch_size, seed=self._seed, epoch=epoch)
        for indices in order[start:]:
            yield self._micro_batches(indices)

    def shortest(self) -> list[Batch]:
        """A step made of the shortest example alone, in every process."""
        return [self._split.batch([int(self._split.lengths.argmin())])]

    def longest(self) -> list[Batch]:
        """A step made of the longest examples: no step of the run needs more memory."""
        return self._micro_batches(np.argsort(-self._split.lengths, kind="stable")[: self._batch_size])

    def _micro_batches(self, indices: np.ndarray) -> list[Batch]:
        size = self._micro_batch_size
        own = indices[self._process_index :: self._num_processes]
        num_batches = math.ceil(math.ceil(len(indices) / self._num_processes) / size)
        batches = [self._split.batch(own[start : start + size]) for start in range(0, len(own), size)]
        while len(batches) < num_batches:
            batches.append(replace(self._split.batch(indices[:1]), num_tokens=0, num_targets=0))
        return batches
