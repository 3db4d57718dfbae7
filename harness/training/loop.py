"""train(): one loop for every method.

It steps whatever has `requires_grad`, and knows neither LoRA nor ranks, datasets, Hydra or W&B: what differs between
methods is decided before it starts, so a comparison of methods cannot be biased in here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from harness.config.schema import TrainerConfig
from harness.data.batches import Batch
from harness.measure.clock import StepMeter, device_queue
from harness.measure.device import reset_device_peaks
from harness.measure.memory import measure_peak_memory, rehearse_beside_optimizer
from harness.methods.flops import StepFlops
from harness.processes.distributed import all_reduce_sum, all_reduce_sum_on_device, copy_into, full_tensor, is_sharded
from harness.processes.stopping import PreemptedError
from harness.tasks.objective import Evaluation, Objective
from harness.training.checkpoint import pack_training, unpack_training
from harness.training.optimizer import build_optimizer, count_steps, learning_rate_at
from harness.training.prefetch import prefetched

# The training loss of a result is a mean over so many steps: those of one are too few examples to compare runs by. It
# is no setting, because `tracking.log_every` may change and the numbers of a run may not.
RECENT_STEPS = 10


class TrainingDivergedError(RuntimeError):
    """The model stopped giving finite numbers. `what` names which, `step` says when."""

    def __init__(self, step: int, what: str) -> None:
        self.step = step
        super().__init__(f"{what} at step {step}; try a lower trainer.learning_rate or a longer warm-up.")


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


@dataclass
class Position:
    """Where training stands, beside its tensors: what a checkpoint holds as JSON."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    real_tokens: int = 0
    computed_tokens: int = 0
    squared_tokens: int = 0
    num_targets: int = 0
    seconds: float = 0.0
    lap_seconds: list[float] = field(default_factory=list)
    recent_losses: list[tuple[float, int]] = field(default_factory=list)
    best: Evaluation | None = None
    best_step: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)
    # The state after `step` is to be scored on val, and its scores where they are known.
    is_to_score: bool = False
    last: Evaluation | None = None
    # Of all steps, once they are made; only scoring is left then.
    measured: dict[str, float] = field(default_factory=dict)

    def add(self, seconds: float, sizes: Sequence[float], loss: float) -> None:
        """Counts a step: how long it took, what it was made of (see `_sizes`), and the mean loss over its targets."""
        self.lap_seconds.append(seconds)
        self.seconds += seconds
        real, computed, squared, targets = map(round, sizes)
        self.real_tokens += real
        self.computed_tokens += computed
        self.squared_tokens += squared
        self.num_targets += targets
        self.recent_losses = [*self.recent_losses, (loss, targets)][-RECENT_STEPS:]

    @property
    def mean_loss(self) -> float:
        """Mean over the targets of the last `RECENT_STEPS` steps."""
        return sum(loss * targets for loss, targets in self.recent_losses) / sum(
            targets for _, targets in self.recent_losses
        )


class TrainingCallbacks(Protocol):
    """What is called when something happens, with values by metric name, and what keeps the checkpoints."""

    def started(self, num_steps: int, measured: dict[str, float]) -> None:
        """Steps begin or resume; `measured` is what was measured before them. Raises as `keep_checkpoint` does."""
        ...

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """An optimizer step was made; on CUDA the next one is under way, but evaluation and checkpoint come later."""
        ...

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """The validation split was scored after `step`."""
        ...

    def wants_checkpoint(self, step: int) -> bool:
        """Whether the state after `step` is to be kept."""
        ...

    def keep_checkpoint(self, tensors: dict[str, Tensor], position: Position) -> None:
        """Keeps a state, in all processes at once. Raises `PreemptedError` when the run was asked to stop."""
        ...

    def last_checkpoint(self) -> tuple[dict[str, Tensor], Position] | None:
        """The state to resume from, if there is one."""
        ...


@dataclass(frozen=True)
class _Made:
    """A step as the loop queued it."""

    step: int
    learning_rate: float
    sizes: list[float]


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


def train(
    model: nn.Module,
    batches: StepBatches,
    objective: Objective,
    *,
    config: TrainerConfig,
    accelerator: Accelerator,
    callbacks: TrainingCallbacks,
    flops: StepFlops | None = None,
) -> TrainingOutcome:
    """Trains the parameters that require a gradient; the model ends at its last step.

    Before the first step, the largest batch of scoring is rehearsed, and peak memory is measured on the longest batch
    with a learning rate of 0: if one of them does not fit, the run ends here and not after an hour. These steps warm
    the device up as well, so the clock starts after them. The time of a step is that of forward, backward, clipping and
    optimizer, the batch's way to the device included; the clock stands still while a batch is collated, during
    evaluation and while a checkpoint is written.

    Losses stay on the device until the step after them is queued (see `StepMeter`), so one that is not finite ends the
    run one step later on CUDA, with its own number; nothing is evaluated or kept before all losses are read.

    The loss of a step is the mean over its targets, whatever they are split into: each micro-batch contributes its sum
    divided by the targets of the whole step.

    `flops` counts the model's operations; without it `train_flops` is missing from what is measured.

    Several processes (see `harness.processes.distributed`) make the steps that one would make; each scores all of val.
    The model lies on the accelerator's device already, whole or sharded.

    A run that resumes from a checkpoint makes the steps that an undisturbed one would have made, bitwise on the CPU.
    When all steps are made, the state is kept before it is scored; so is the state that a scoring in between fails or
    is stopped on. A run that resumes from there begins with that scoring.

    Raises:
        TrainingDivergedError: a loss or the predictions on val were not finite.
        PreemptedError: the run was asked to stop; the checkpoint is written.
        torch.OutOfMemoryError: a step does not fit; also RuntimeError on the CPU.
    """
    device = accelerator.device
    sharded = is_sharded(model)
    model.train()
    if sharded:
        optimizer = accelerator.prepare_optimizer(build_optimizer(model, config))
    else:
        model, optimizer = accelerator.prepare(model, build_optimizer(model, config))
    bare_model = accelerator.unwrap_model(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_steps = count_steps(config, batches.steps_per_epoch)

    def forward_backward(micro_batches: Sequence[Batch], num_targets: float) -> Tensor:
        """Gradients of one step's mean loss, clipped; that loss as minimised and as reported, `(2,)` on the device."""
        losses = []
        for number, batch in enumerate(micro_batches, start=1):
            is_last = number == len(micro_batches)
            with contextlib.nullcontext() if is_last or sharded else accelerator.no_sync(model):
                with accelerator.autocast():
                    loss, reported = objective.summed_loss(model, batch.to(device)).over(num_targets)
                if batch.num_targets == 0:  # stands in for examples that this process has no more of
                    loss, reported = 0.0 * loss, 0.0 * reported
                losses.append((loss.detach(), reported))
                if accelerator.num_processes > 1:
                    # Gradients are averaged over the processes, and what is wanted is their sum.
                    loss = loss * accelerator.num_processes
                accelerator.backward(loss)
        if config.max_gradient_norm is not None:
            accelerator.clip_grad_norm_(parameters, config.max_gradient_norm)
        return all_reduce_sum_on_device(losses, accelerator)

    def rehearse(micro_batches: Sequence[Batch]) -> None:
        forward_backward(micro_batches, all_reduce_sum(_sizes(micro_batches), accelerator)[-1])

    def account(*, behind: bool) -> None:
        """Counts the steps that the device has finished, or waits for all of them, and hands them to the callbacks."""
        for done in meter.finished(behind=behind):
            minimised, reported = done.values
            for loss in (minimised, reported):
                if not math.isfinite(loss):
                    raise TrainingDivergedError(done.note.step, f"the loss was {loss}")
            at.add(done.seconds, done.note.sizes, reported)
            tokens_per_second = at.real_tokens / at.seconds
            values = {"learning_rate": done.note.learning_rate, "train_tokens_per_second": tokens_per_second}
            callbacks.stepped(done.note.step, {objective.loss_name: reported, **values})

    def rehearse_scoring() -> None:
        with accelerator.autocast():
            objective.rehearse(model)

    def keep(optimizer: torch.optim.Optimizer | None) -> None:
        at.scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
        callbacks.keep_checkpoint(pack_training(bare_model, optimizer, best_state, accelerator=accelerator), at)

    def score(*, is_kept: bool) -> Evaluation:
        """Scores the state after `at.step` on val. Unless it is kept already, it is when that fails."""
        nonlocal best_state
        try:
            with accelerator.autocast():
                evaluation = at.last or objective.evaluate(model)
        except Exception as error:
            # The others would not take part when one process alone has failed.
            if not is_kept and (accelerator.num_processes == 1 or isinstance(error, PreemptedError)):
                keep(optimizer)
            raise
        if not evaluation.scores:
            raise TrainingDivergedError(at.step, "predictions on val were not finite")
        callbacks.evaluated(at.step, evaluation)
        at.is_to_score, at.last = False, evaluation
        if at.best is None or evaluation.objective > at.best.objective:
            at.best, at.best_step = evaluation, at.step
            best_state = None if at.step == num_steps else _trainable_state(bare_model)
        return evaluation

    at, best_state = Position(), None
    meter: StepMeter[_Made] = StepMeter(device_queue(device))
    checkpoint = callbacks.last_checkpoint()
    if checkpoint is not None:
        at = checkpoint[1]
    if not at.measured:
        scaler_state = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
        measured: dict[str, float] = {}
        if sharded:  # a part of a matrix has no storage that could be followed
            rehearse_scoring()
        else:
            rehearse_beside_optimizer(rehearse_scoring, model, optimizer, first=lambda: rehearse(batches.shortest()))
            reset_device_peaks(device)
            memory = measure_peak_memory(
                lambda: rehearse(batches.longest()), model, optimizer, first=lambda: rehearse(batches.shortest())
            )
            measured |= memory.as_metrics()
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(scaler_state)
        measured["num_steps"] = num_steps
    if checkpoint is not None:
        best_state = unpack_training(checkpoint[0], bare_model, optimizer, accelerator=accelerator)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(at.scaler)
        del checkpoint
    if not at.measured:
        callbacks.started(num_steps, measured)
        if at.is_to_score:
            score(is_kept=False)

    while at.step < num_steps:
        with prefetched(batches.epoch(at.epoch, start=at.step_in_epoch), device) as steps:
            for micro_batches in steps:
                at.step += 1
                at.step_in_epoch += 1
                rate = learning_rate_at(at.step, num_steps, config)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                sizes = all_reduce_sum(_sizes(micro_batches), accelerator)
                meter.begin()
                step_loss = forward_backward(micro_batches, sizes[-1])
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                meter.end(step_loss, _Made(at.step, rate, sizes))

                is_last, ends_epoch = at.step == num_steps, at.step_in_epoch == batches.steps_per_epoch
                at.is_to_score, at.last = (
                    (
                        is_last
                        or (config.eval_each_epoch and ends_epoch)
                        or (config.eval_every > 0 and at.step % config.eval_every == 0)
                    ),
                    None,
                )
                account(behind=not at.is_to_score)
                if ends_epoch:
                    at.epoch, at.step_in_epoch = at.epoch + 1, 0
                if is_last:
                    break
                if at.is_to_score:
                    score(is_kept=False)
                if any(all_reduce_sum([callbacks.wants_checkpoint(at.step)], accelerator)):
                    account(behind=False)
                    keep(optimizer)

    if not at.measured:
        at.measured = measured | {
            objective.loss_name: at.mean_loss,
            "train_seconds": at.seconds,
            "step_seconds_median": median(at.lap_seconds),
            "train_tokens_per_second": at.real_tokens / at.seconds,
            "padding_overhead": at.computed_tokens / at.real_tokens,
        }
        if flops is not None:
            at.measured["train_flops"] = flops.total(
                num_tokens=at.computed_tokens, num_squared=at.squared_tokens, num_targets=at.num_targets
            )
        keep(None)
    last = score(is_kept=True)
    assert at.best is not None
    return TrainingOutcome(at.measured | {"best_step": at.best_step}, at.best, last, best_state)


def _sizes(micro_batches: Sequence[Batch]) -> list[float]:
    """Real tokens, computed tokens, the sum over examples of padded length squared, targets."""
    shapes = [batch.inputs["input_ids"].shape for batch in micro_batches]
    return [
        sum(batch.num_tokens for batch in micro_batches),
        sum(num_examples * length for num_examples, length in shapes),
        sum(num_examples * length**2 for num_examples, length in shapes),
        sum(batch.num_targets for batch in micro_batches),
    ]


def _trainable_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: full_tensor(parameter.detach()).to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
