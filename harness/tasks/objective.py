"""What a task is to the trainer: a loss to minimise and scores on a split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.data.batches import Batch
from harness.processes.distributed import reshard
from harness.results.metrics import COLLAPSED_ABOVE


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split by metric name (without the split), and the one that decides which step is best.

    `objective` is higher for better whatever the metric's own direction, and -inf where that score does not exist:
    such a step is the best only if no other has been scored. `logits`, `(examples, labels)` on the CPU and in the order
    of the split, are what was scored, where predictions are to be kept.
    """

    scores: dict[str, float]
    objective: float
    logits: Tensor | None = field(default=None, compare=False, repr=False)


# A loss above that of the untrained model by less than this is that of a run which has not begun to learn.
HOPELESS_RATIO = 1.1


def why_hopeless(scores: Mapping[str, float], untrained: Mapping[str, float]) -> str | None:
    """Why a run cannot win any more, from its scores on val and those that its model began with; None where it can.

    Its loss is clearly above that of the untrained model, and of a classifier nearly all predictions fall on one class:
    the loss alone also rises when a classifier that is often right becomes too sure of itself.
    """
    loss = next((name for name in ("nll", "mse") if name in scores and name in untrained), None)
    if (
        loss is None
        or scores[loss] <= HOPELESS_RATIO * untrained[loss]
        or scores.get("majority_share", 1.0) <= COLLAPSED_ABOVE
    ):
        return None
    collapsed = " and nearly all predictions fell on one class" if "majority_share" in scores else ""
    return f"val {loss} was {scores[loss]:.4g}, above the {untrained[loss]:.4g} of the untrained model{collapsed}"


@dataclass(frozen=True)
class SummedLoss:
    """A loss summed over the targets of a batch, scalars in float32.

    `minimised` has a graph. `unsmoothed` has none and is the same without label smoothing, None where there is none.
    """

    minimised: Tensor
    unsmoothed: Tensor | None = None

    def over(self, num_targets: float) -> tuple[Tensor, Tensor]:
        """Divided by a number of targets: what is minimised, and what is reported, which has no graph."""
        minimised = self.minimised / num_targets
        return minimised, minimised.detach() if self.unsmoothed is None else self.unsmoothed / num_targets


class Objective(Protocol):
    """What the trainer and the scoring of a run need to know of a task.

    `loss_name` is the metric that its loss without label smoothing is.
    """

    loss_name: str

    def summed_loss(self, model: nn.Module, batch: Batch) -> SummedLoss:
        """Loss summed over the batch's targets."""
        ...

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Scores on the validation split; changes neither parameters nor random state nor the training mode.

        Raises `PreemptedError` when the run was asked to stop.
        """
        ...

    def evaluate_split(self, model: nn.Module, split: Any) -> Evaluation:
        """Scores on any split of the task's data; otherwise as `evaluate`."""
        ...

    def makes_whole_logits(self, model: nn.Module) -> bool:
        """Whether a step of a language model computes the logits of every position, and not of its targets alone."""
        ...

    def rehearse(self, model: nn.Module) -> None:
        """Makes the largest forward pass that scoring will make, and throws it away."""
        ...


class Batched(Protocol):
    """A split as scoring reads it."""

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every example once, longest first."""
        ...


def largest_batch(splits: Iterable[Batched], batch_size: int) -> Batch:
    """The batch with the most tokens, padding included, of all that scoring these splits will make."""
    firsts = [next(split.batches(batch_size)) for split in splits]
    return max(firsts, key=lambda batch: batch.inputs["input_ids"].numel())


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> SummedLoss:
    """Cross-entropy in nats of `(rows, classes)` against `(rows,)`; smoothed as PyTorch's, to the bit."""
    if label_smoothing == 0:
        return SummedLoss(functional.cross_entropy(logits, targets, reduction="sum"))
    log_probabilities = functional.log_softmax(logits, dim=-1)
    nll = functional.nll_loss(log_probabilities, targets, reduction="sum")
    uniform = (-log_probabilities.sum(-1)).sum() * (label_smoothing / logits.shape[-1])
    return SummedLoss((1 - label_smoothing) * nll + uniform, nll.detach())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; the training mode is what it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        reshard(model)
