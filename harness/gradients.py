"""Where the gradient of a run's loss is before it trains: one backward pass through the base that it began from.

With G the gradient of a matrix W, a small step against it lowers the loss by `|G|_F^2` times the step: the matrices
with most of that energy are those in which training gains most at first. Probes of this kind choose placements without
training (PAGE and DomLoRA, arXiv 2605.06183); what they are worth is for a placement sweep to say
(`analysis.adapters.gradients`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

from torch import Tensor, nn

from harness.config.validation import ConfigError
from harness.data.batches import Batch, TrainingBatches
from harness.deltas import all_targets
from harness.evaluate import load_own_data, require_own_content
from harness.methods.lora import take_rows
from harness.placement.select import Target
from harness.prepare import build_accelerator, set_threads
from harness.processes.distributed import place_on_device
from harness.processes.stopping import StopRequest
from harness.saved import Base, SavedRun
from harness.tasks.families import find_family


@dataclass(frozen=True)
class Gradient:
    """Of one matrix, or of those of its rows that are one role's.

    Attributes:
        target: which.
        matrix: the gradient of the mean loss, `(out_features, in_features)`, in float32 on the CPU.
    """

    target: Target
    matrix: Tensor


def gradients_before(saved: SavedRun, *, num_examples: int) -> list[Gradient]:
    """The gradient of every matrix in the blocks of the base that a run began from.

    The loss is the mean over the targets of the first examples of the run's first epoch, without dropout and with the
    run's head as it was drawn.

    Args:
        saved: the run; nothing that it has trained is used.
        num_examples: at least so many, in whole batches; all, where there are fewer.

    Raises:
        ConfigError: data that have changed since the run, or a base that is quantised.
        DataError, ModelError: as training raises them.
    """
    require_own_content([saved])
    config = saved.config
    base = Base(saved, untrained=True)
    model: nn.Module = base.base.model
    if getattr(model, "is_quantized", False):
        raise ConfigError(
            [f"{saved.run_id}: model.quantization={config.model.quantization}: no gradient of its weights."]
        )
    set_threads(config)
    accelerator = build_accelerator(config)
    data = load_own_data(base, config, ("train",))
    objective = find_family(config.dataset.task).build_objective(config, data, {}, StopRequest())
    place_on_device(model, accelerator, shard_model=False)
    model.eval()
    targets = all_targets(model, base.base.head, is_language=config.dataset.task.is_language)
    model.requires_grad_(False)
    for target in targets:
        _weight(model, target).requires_grad_(True)
    batches = list(
        _first(
            TrainingBatches(
                data.train,
                batch_size=config.trainer.batch_size,
                micro_batch_size=config.trainer.micro_batch_size,
                seed=config.seed,
            ),
            num_examples,
        )
    )
    num_targets = float(sum(batch.num_targets for batch in batches))
    for batch in batches:
        with accelerator.autocast():
            minimised, _ = objective.summed_loss(model, batch.to(accelerator.device)).over(num_targets)
        minimised.backward()
    found = []
    for target in targets:
        gradient = _weight(model, target).grad
        if gradient is not None:  # the loss does not reach every matrix of every model
            rows = gradient if isinstance(model.get_submodule(target.module), nn.Linear) else gradient.T
            found.append(Gradient(target, take_rows(rows, target.rows).float().cpu().clone()))
    return found


def _first(batches: TrainingBatches, num_examples: int) -> Iterator[Batch]:
    taken = 0
    for batch in chain.from_iterable(batches.epoch(0)):
        yield batch
        taken += len(batch.inputs["input_ids"])
        if taken >= num_examples:
            return


def _weight(model: nn.Module, target: Target) -> nn.Parameter:
    return cast(nn.Parameter, cast(Any, model.get_submodule(target.module)).weight)
