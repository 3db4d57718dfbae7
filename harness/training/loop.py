"""train(): one loop for every method, alone and in packs.

It steps whatever has `requires_grad`, and knows neither LoRA nor ranks, datasets, Hydra or W&B: what differs between
methods is decided before it starts, so a comparison of methods cannot be biased in here. The few methods that do more
at a step than have parameters do it by `DuringTraining`, which the loop calls for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from harness.config.schema import TrainerConfig
from harness.data.batches import Batch
from harness.methods.during_training import DuringTraining, Nothing
from harness.methods.flops import StepFlops
from harness.methods.rates import LearningRates
from harness.processes.distributed import all_reduce_sum, copy_into
from harness.tasks.objective import Evaluation, Objective
from harness.training.known_peaks import PeaksOfCell
from harness.training.learner import OF_THE_CLOCK, Learner, TrainingCallbacks
from harness.training.optimizer import count_steps
from harness.training.prefetch import prefetched
from harness.training.turns import Turns, alone

# Of a run in a pack: as many give the median of a step's time within some percent.
REHEARSED_STEPS = 3


class StepBatches(Protocol):
    """Training data as the loop needs it."""

    steps_per_epoch: int

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of every step of an epoch (counted from 0) but its first `start` steps."""
        ...

    def shortest(self) -> list[Batch]:
        """A step of one short example."""
        ...

    def longest(self) -> list[Batch]:
        """The step that needs the most memory."""
        ...


@dataclass(frozen=True)
class TrainingOutcome:
    """What training left behind. The model itself is at its last step.

    `best_state` holds the trainable parameters of the best step on the CPU, or None when that is the last step.
    """

    measured: dict[str, float]
    best: Evaluation
    last: Evaluation
    best_state: dict[str, Tensor] | None

    def restore_best(self, model: nn.Module) -> None:
        """Puts the model at its best step."""
        if self.best_state is not None:
            parameters = dict(model.named_parameters())
            for name, value in self.best_state.items():
                copy_into(parameters[name], value)


def train_in_turns(
    model: nn.Module,
    batches: StepBatches,
    objective: Objective,
    *,
    config: TrainerConfig,
    accelerator: Accelerator,
    callbacks: TrainingCallbacks,
    flops: StepFlops | None = None,
    rates: LearningRates | None = None,
    method: DuringTraining | None = None,
    untrained: Mapping[str, float] | None = None,
    shares_process: Callable[[], bool] = lambda: False,
    known_peaks: PeaksOfCell | None = None,
) -> Turns[TrainingOutcome]:
    """Trains the parameters that require a gradient; the model ends at its last step.

    A generator: it yields each micro-batch and is sent its losses (see `harness.training.turns`). `train` is the same
    as a plain function. What is rehearsed is computed at once, with the run's own model.

    Before the first step, the largest batch of scoring is rehearsed, and peak memory is measured on the longest batch
    with a learning rate of 0: if one of them does not fit, the run ends here and not after an hour. These steps warm
    the device up as well, so the clock starts after them. The time of a step is that of forward, backward, clipping and
    optimizer, the batch's way to the device included; the clock stands still while a batch is collated, during
    evaluation and while a checkpoint is written.

    Losses stay on the device until the step after them is queued (see `StepMeter`), so one that is not finite ends the
    run one step later on CUDA, with its own number; nothing is evaluated or kept before all losses are read.

    The loss of a step is the mean over its targets, whatever they are split into: each micro-batch contributes its sum
    divided by the targets of the whole step.

    `flops` counts the model's operations; without it `train_flops` is missing from what is measured. `rates` are the
    learning rates of the kinds of parameters; without them all have that of `config`. `method` is what the method does
    at a step; without it nothing. `untrained` are the scores on val that the model begins with, where a run that is
    worse than them after warm-up is to end.

    `shares_process` says, once a checkpoint is read, whether other runs share the process or shared that of an earlier
    attempt. The clock says how long all of them took, so the times of steps are then those of a few that are rehearsed
    alone before the first one, and `train_seconds` is missing.

    `known_peaks` has the peak memory that earlier runs of this cell have measured in this process; where it has that of
    this run, the step is rehearsed and not measured again.

    Several processes (see `harness.processes.distributed`) make the steps that one would make; each scores all of val.
    The model lies on the accelerator's device already, whole or sharded.

    A run that resumes from a checkpoint makes the steps that an undisturbed one would have made, bitwise on the CPU.
    When all steps are made, the state is kept before it is scored; so is the state that a scoring in between fails or
    is stopped on. A run that resumes from there begins with that scoring.

    Raises:
        TrainingDivergedError: a loss or the predictions on val were not finite, or the run is worse than `untrained`.
        PreemptedError: the run was asked to stop; the checkpoint is written.
        torch.OutOfMemoryError: a step does not fit; also RuntimeError on the CPU.
    """
    num_steps = count_steps(config, batches.steps_per_epoch)
    learner = Learner(
        model,
        objective,
        config=config,
        accelerator=accelerator,
        callbacks=callbacks,
        num_steps=num_steps,
        rates=rates,
        method=method or Nothing(),
        untrained=untrained,
    )
    checkpoint = callbacks.last_checkpoint()
    if checkpoint is not None:
        learner.at = checkpoint[1]
    at, measured = learner.at, dict[str, float]()
    times_rehearsal = any(all_reduce_sum([shares_process()], accelerator))  # the main process alone may know it
    if not at.measured:
        measured = learner.rehearse(shortest=batches.shortest, longest=batches.longest, known=known_peaks)
        measured |= {"num_steps": num_steps}
        if times_rehearsal:
            measured |= learner.time_rehearsal(islice(batches.epoch(0), REHEARSED_STEPS))
    if checkpoint is not None:
        learner.load(checkpoint[0])
        del checkpoint
    if not at.measured:
        callbacks.started(num_steps, measured)
        if at.is_to_score:
            learner.score(is_kept=False)

    while at.step < num_steps:
        with prefetched(batches.epoch(at.epoch, start=at.step_in_epoch), accelerator.device) as steps:
            for micro_batches in steps:
                yield from learner.step(micro_batches)
                is_last, ends_epoch = at.step == num_steps, at.step_in_epoch == batches.steps_per_epoch
                at.is_to_score = (
                    is_last
                    or (config.eval_each_epoch and ends_epoch)
                    or (config.eval_every > 0 and at.step % config.eval_every == 0)
                )
                learner.account(behind=not at.is_to_score)
                if ends_epoch:
                    at.epoch, at.step_in_epoch = at.epoch + 1, 0
                if is_last:
                    break
                if at.is_to_score:
                    learner.score(is_kept=False)
                if any(all_reduce_sum([callbacks.wants_checkpoint(at.step)], accelerator)):
                    learner.account(behind=False)
                    learner.keep()

    if not at.measured:
        summary = learner.summary(flops)
        if times_rehearsal:
            summary = {name: value for name, value in summary.items() if name not in OF_THE_CLOCK}
        at.measured = measured | summary
        learner.keep(with_optimizer=False)
    last = learner.score(is_kept=True)
    assert at.best is not None
    return TrainingOutcome(at.measured | {"best_step": at.best_step}, at.best, last, learner.best_state)


train = alone(train_in_turns)
