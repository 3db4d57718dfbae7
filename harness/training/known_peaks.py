"""Peak memory that a run of a process has measured, for those after it whose steps take the same to the byte.

The trials of a search and the seeds of a cell train the same matrices on the same longest step. Following every tensor
of a step in Python takes longer than the step, so runs that share a process measure it once for each cell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from harness.config.schema import RunConfig
from harness.data.batches import Batch
from harness.measure.memory import MemoryPeak


class KnownPeaks:
    """The peaks that runs of one process have measured, by what decides them."""

    def __init__(self) -> None:
        self._of: dict[Hashable, MemoryPeak] = {}

    def find(
        self,
        config: RunConfig,
        optimizer: torch.optim.Optimizer,
        steps: Iterable[Sequence[Batch]],
        measure: Callable[[], MemoryPeak],
    ) -> MemoryPeak:
        """What an earlier run of these settings, whatever its seed and rates, measured for these steps; else measured.

        Args:
            config: of the run.
            optimizer: of the run; its groups count, since a fused step works on one after the other.
            steps: those that are measured, each the batches of its micro-batches.
            measure: gives the peak of these steps.
        """
        groups = tuple(len(group["params"]) for group in optimizer.param_groups)
        key = (_without_rates(config), groups, _digest(steps))
        if key not in self._of:
            self._of[key] = measure()
        return self._of[key]


def _without_rates(config: RunConfig) -> str:
    """Everything that is set but the seed and the learning rates, and what a pack sets for the runs after its first."""
    rates = {field.name: 0.0 for field in fields(config.trainer) if field.name.startswith("learning_rate")}
    trainer, method = replace(config.trainer, **rates), replace(config.method, learning_rate=0.0)
    return repr(replace(config, seed=0, trainer=trainer, method=method, allow_busy_device=False))


def _digest(steps: Iterable[Sequence[Batch]]) -> str:
    found = hashlib.sha256()
    for step in steps:
        for batch in step:
            named: list[tuple[str, Tensor]] = [*sorted((batch.collated or batch.inputs).items()), ("", batch.labels)]
            for name, tensor in named:
                found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {batch.num_targets}".encode())
                found.update(tensor.cpu().contiguous().numpy().tobytes())
        found.update(b"|")
    return found.hexdigest()
