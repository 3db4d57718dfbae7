"""train(): one loop for every method.

It steps whatever has `requires_grad`, and knows neither LoRA nor ranks, datasets, Hydra or W&B: what differs between
methods is decided before it starts, so a comparison of methods cannot be biased in here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from harness.config import Schedule, TrainerConfig
from harness.data import Batch
from harness.evaluate import Evaluation, Objective
from harness.measure import Stopwatch, measure_peak_memory


class TrainingDivergedError(RuntimeError):
    """The loss stopped being a finite number. `step` says when."""

    def __init__(self, step: int, loss: float) -> None:
        self.step = step
        super().__init__(f"the loss was {loss} at step {step}; try a lower trainer.learning_rate or a longer warm-up.")


class StepBatches(Protocol):
    """Training data as the loop needs it."""

    steps_per_epoch: int

    def epoch(self, epoch: int) -> Iterator[list[Batch]]:
        """The micro-batches of every step of an epoch, counted from 0."""
        ...

    def longest(self) -> list[Batch]:
        """The step that needs the most memory."""
        ...


class Observer(Protocol):
    """Who is told what happens, by metric name."""

    def started(self, num_steps: int, measured: dict[str, float]) -> None:
        """Training begins; `measured` is what was measured before it."""
        ...

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """An optimizer step was made."""
        ...

    def evaluated(self, step: int, scores: dict[str, float]) -> None:
        """The validation split was scored after `step`."""
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
            with torch.no_grad():
                for name, value in self.best_state.items():
                    parameters[name].copy_(value)


def count_steps(config: TrainerConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run: `max_steps`, or `num_epochs` rounded up to whole steps."""
    if config.max_steps is not None:
        return config.max_steps
    assert config.num_epochs is not None
    return max(1, math.ceil(config.num_epochs * steps_per_epoch))


def learning_rate_at(step: int, num_steps: int, config: TrainerConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 1.

    Warm-up rises linearly to the full rate over `warmup_fraction` of the steps; after it the rate is constant, falls
    linearly to one step above zero, or follows half a cosine. The last step still learns.
    """
    num_warmup = math.ceil(config.warmup_fraction * num_steps)
    if step <= num_warmup:
        return config.learning_rate * step / num_warmup
    done = (step - 1 - num_warmup) / max(1, num_steps - num_warmup)  # 0 at the first step after warm-up, always < 1
    match config.schedule:
        case Schedule.constant:
            return config.learning_rate
        case Schedule.linear:
            return config.learning_rate * (1 - done)
        case Schedule.cosine:
            return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


def build_optimizer(model: nn.Module, config: TrainerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors (biases, norms) do not decay, as is usual in fine-tuning."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_epsilon,
        fused=all(parameter.device.type in ("cpu", "cuda", "mps") for parameter in trainable),
    )


def train(
    model: nn.Module,
    batches: StepBatches,
    objective: Objective,
    *,
    config: TrainerConfig,
    accelerator: Accelerator,
    observer: Observer,
) -> TrainingOutcome:
    """Trains the parameters that require a gradient; the model ends at its last step.

    Before the first step, peak memory is measured on the longest batch with a learning rate of 0: if that does not
    fit, the run ends here and not after an hour. These steps warm the device up as well, so the clock starts after
    them. It stands still during evaluation.

    The loss of a step is the mean over its targets, whatever they are split into: each micro-batch contributes its sum
    divided by the targets of the whole step.

    Raises:
        TrainingDivergedError: the loss was not finite.
        torch.OutOfMemoryError: a step does not fit; also RuntimeError on the CPU.
    """
    device = accelerator.device
    model.to(device).train()
    optimizer = build_optimizer(model, config)
    model, optimizer = accelerator.prepare(model, optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_steps = count_steps(config, batches.steps_per_epoch)

    def forward_backward(micro_batches: Sequence[Batch]) -> float:
        """Gradients of one step's mean loss, clipped; returns that loss. Reading it waits for the device."""
        num_targets = sum(batch.num_targets for batch in micro_batches)
        total = 0.0
        for batch in micro_batches:
            with accelerator.autocast():
                loss = objective.summed_loss(model, batch.to(device)) / num_targets
            accelerator.backward(loss)
            total += loss.item()
        if config.max_gradient_norm is not None:
            accelerator.clip_grad_norm_(parameters, config.max_gradient_norm)
        return total

    memory = measure_peak_memory(lambda: forward_backward(batches.longest()), model, optimizer)
    measured: dict[str, float] = {**memory.as_metrics(), "num_steps": num_steps}
    observer.started(num_steps, measured)

    stopwatch = Stopwatch(device)
    best: Evaluation | None = None
    best_step, best_state = 0, None
    real_tokens = computed_tokens = 0
    step, epoch = 0, 0
    stopwatch.start()
    while step < num_steps:
        for step_in_epoch, micro_batches in enumerate(batches.epoch(epoch), start=1):
            step += 1
            rate = learning_rate_at(step, num_steps, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = forward_backward(micro_batches)
            if not math.isfinite(loss):
                raise TrainingDivergedError(step, loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            stopwatch.lap()

            real_tokens += sum(batch.num_tokens for batch in micro_batches)
            computed_tokens += sum(batch.inputs["input_ids"].numel() for batch in micro_batches)
            is_last = step == num_steps
            values = {
                objective.loss_name: loss,
                "learning_rate": rate,
                "train_tokens_per_second": real_tokens / stopwatch.seconds,
            }
            with stopwatch.paused():
                observer.stepped(step, values)
                ends_epoch = config.eval_each_epoch and step_in_epoch == batches.steps_per_epoch
                if is_last or ends_epoch or (config.eval_every and step % config.eval_every == 0):
                    evaluation = objective.evaluate(model)
                    observer.evaluated(step, evaluation.scores)
                    if best is None or evaluation.objective > best.objective:
                        best, best_step = evaluation, step
                        best_state = None if is_last else _trainable_state(accelerator.unwrap_model(model))
            if is_last:
                break
        epoch += 1
    stopwatch.stop()

    assert best is not None and stopwatch.median_lap_seconds is not None
    measured |= {
        objective.loss_name: loss,
        "best_step": best_step,
        "train_seconds": stopwatch.seconds,
        "step_seconds_median": stopwatch.median_lap_seconds,
        "train_tokens_per_second": real_tokens / stopwatch.seconds,
        "padding_overhead": computed_tokens / real_tokens,
    }
    return TrainingOutcome(measured, best, evaluation, best_state)


def _trainable_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
