"""Training in turns: a run stops at each micro-batch, and what drives it computes the gradients and answers.

Everything that belongs to a run (its schedule, clipping, optimizer, evaluation, checkpoints, results) is one piece of
code, a generator. It yields a `MicroBatch` and is sent the losses once the gradients are there. `alone` drives one run;
`harness.training.packs` drives several and computes all their micro-batches in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import Tensor, nn

from harness.data.batches import Batch

Outcome = TypeVar("Outcome")
Settings = ParamSpec("Settings")


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass that a run waits for.

    Attributes:
        model: the run's own.
        batch: on the model's device.
        loss_of: from a model that gives the outputs for `batch` to what is minimised, already divided by the targets
            of the whole step, and what is reported, which has no graph. The run's precision applies inside.
        backward: from what is minimised to gradients on the run's parameters.
        own_bytes: what the run's longest step takes, as it was rehearsed, above the model; 0 where it was not.
        alone_seconds: what this one takes alone, by the passes that were rehearsed; None where none were timed.
    """

    model: nn.Module
    batch: Batch
    loss_of: Callable[[nn.Module], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor], None]
    own_bytes: int = 0
    alone_seconds: float | None = None

    def answer(self) -> Losses:
        """Computes this micro-batch with the run's own model."""
        minimised, reported = self.loss_of(self.model)
        self.backward(minimised)
        return minimised.detach(), reported


Losses = tuple[Tensor, Tensor]
"""The loss of a micro-batch as minimised and as reported, scalars on the device, without a graph."""

Turns = Generator[MicroBatch, Losses, Outcome]
"""A run, or a part of it, that is driven from one micro-batch to the next."""


def drive_alone(turns: Turns[Outcome]) -> Outcome:
    """Computes every micro-batch with the run's own model, and returns what the run returns.

    What goes wrong in a micro-batch is raised where the run waits for it.
    """
    try:
        micro_batch = next(turns)
        while True:
            try:
                losses = micro_batch.answer()
            except BaseException as error:
                micro_batch = turns.throw(error)
            else:
                micro_batch = turns.send(losses)
    except StopIteration as end:
        return end.value


def alone(steps: Callable[Settings, Turns[Outcome]]) -> Callable[Settings, Outcome]:
    """The plain function that a generator of turns is when it is driven alone."""

    @wraps(steps)
    def run(*args: Settings.args, **kwargs: Settings.kwargs) -> Outcome:
        return drive_alone(steps(*args, **kwargs))

    return run
