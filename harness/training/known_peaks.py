"""Peak memory that a run of a process has measured, for those after it whose steps take the same to the byte.

The trials of a search and the seeds of a cell train the same matrices on the same longest step. Following every tensor
of a step in Python takes longer than the step, so runs that share a process measure it once for each cell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from harness.config.schema import RunConfig
from harness.data.batches import Batch
from harness.measure.memory import MemoryPeak

PeaksOfCell = dict[str, MemoryPeak]
"""The peaks that runs of one cell have measured, by the `step_key` of what was measured."""


class KnownPeaks:
    """The peaks that runs of one process have measured."""

    def __init__(self) -> None:
        self._of: dict[str, PeaksOfCell] = {}

    def of(self, config: RunConfig) -> PeaksOfCell:
        """Those of runs that differ from this one in seed and learning rates alone; to be added to."""
        rates = {field.name: 0.0 for field in fields(config.trainer) if field.name.startswith("learning_rate")}
        trainer, method = replace(config.trainer, **rates), replace(config.method, learning_rate=0.0)
        # The last of these a pack sets for the runs after its first.
        alike = replace(config, seed=0, trainer=trainer, method=method, allow_busy_device=False)
        return self._of.setdefault(repr(alike), {})


def step_key(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[Sequence[Batch]]) -> str:
    """Equal where steps of runs of one cell take the same memory: equal matrices train, in equal groups, on one batch.

    Args:
        model: of the run.
        optimizer: of the run; its groups count, since a fused step works on one after the other.
        steps: those that are measured, each the batches of its micro-batches.
    """
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {parameter.requires_grad}\n".encode())
    found.update(repr([len(group["params"]) for group in optimizer.param_groups]).encode())
    for step in steps:
        for batch in step:
            named: list[tuple[str, Tensor]] = [*sorted((batch.collated or batch.inputs).items()), ("", batch.labels)]
            for name, tensor in named:
                found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {batch.num_targets}".encode())
                found.update(tensor.cpu().contiguous().numpy().tobytes())
        found.update(b"|")
    return found.hexdigest()
