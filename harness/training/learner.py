"""One model in training: its optimizer, its position, and what happens to it at a step, a score and a checkpoint.

Nothing here knows LoRA or ranks, datasets, Hydra or W&B. The order of it all is `harness.training.loop`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from harness.config.schema import Compile, TrainerConfig
from harness.data.batches import Batch
from harness.measure.clock import StepMeter, device_queue
from harness.measure.device import reset_device_peaks
from harness.measure.memory import (
    LiveTensors,
    MemoryPeak,
    garbage_collected_before,
    measure_peak_memory,
    rehearse_beside_optimizer,
    time_rehearsed_steps,
)
from harness.methods.during_training import DuringTraining
from harness.methods.flops import StepFlops
from harness.methods.rates import LearningRates
from harness.processes.distributed import all_reduce_sum, all_reduce_sum_on_device, full_tensor, is_sharded
from harness.processes.stopping import PreemptedError
from harness.tasks.objective import Evaluation, Objective, why_hopeless
from harness.training.checkpoint import pack_training, unpack_training
from harness.training.known_peaks import PeaksOfCell, step_key
from harness.training.optimizer import build_optimizer, learning_rate_at, set_learning_rates
from harness.training.turns import MicroBatch, Turns, drive_alone

# The training loss of a result is a mean over so many steps: those of one are too few examples to compare runs by. It
# is no setting, because `tracking.log_every` may change and the numbers of a run may not.
RECENT_STEPS = 10

# Metrics that the time of all steps gives.
OF_THE_CLOCK = ("train_seconds", "step_seconds_median", "train_tokens_per_second")

# In a checkpoint, what was predicted on val at the best step.
_BEST_LOGITS = "best_logits"


class TrainingDivergedError(RuntimeError):
    """The model stopped giving finite numbers. `what` names which, `step` says when."""

    def __init__(self, step: int, what: str) -> None:
        self.step = step
        super().__init__(f"{what} at step {step}; try a lower trainer.learning_rate or a longer warm-up.")


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
        """Counts a step: how long it took, what it holds (see `step_sizes`), and the mean loss over its targets."""
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


class Learner:
    """A model whose trainable parameters are trained.

    Args:
        model: on the accelerator's device already, whole or sharded.
        objective: what is minimised, and how a split is scored.
        config: the recipe.
        accelerator: of the run.
        callbacks: what is called after a step, a score, and for a checkpoint.
        num_steps: how many steps the training has, for the learning rate.
        rates: the learning rate of each kind of parameter; null for one of all.
        method: what the method does at a step.
        untrained: the scores on val below which a run ends after warm-up (see `why_hopeless`); null for none.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        config: TrainerConfig,
        accelerator: Accelerator,
        callbacks: TrainingCallbacks,
        num_steps: int,
        method: DuringTraining,
        rates: LearningRates | None = None,
        untrained: Mapping[str, float] | None = None,
    ) -> None:
        model.train()
        self._is_sharded = is_sharded(model)
        optimizer: Any = build_optimizer(model, config, rates)
        if self._is_sharded:
            optimizer = accelerator.prepare_optimizer(optimizer)
        else:
            model, optimizer = accelerator.prepare(model, optimizer)
        self._model, self._optimizer = model, optimizer
        self._bare_model = accelerator.unwrap_model(model)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._objective, self._config, self._accelerator = objective, config, accelerator
        self._callbacks, self._num_steps, self._method = callbacks, num_steps, method
        self._untrained = untrained
        self._meter: StepMeter[_Made] = StepMeter(device_queue(accelerator.device))
        self.at = Position()
        self.best_state: dict[str, Tensor] | None = None
        self._own_bytes = 0
        self._seconds_per_token: float | None = None  # of rehearsed passes, padding counted

    def rehearse(
        self,
        *,
        shortest: Callable[[], Sequence[Batch]],
        longest: Callable[[], Sequence[Batch]],
        known: PeaksOfCell | None = None,
    ) -> dict[str, float]:
        """Rehearses scoring and the longest step, and changes nothing; the peak memory of that step, by metric name.

        Where `known` has the peak it is not measured, and otherwise added to it.
        """
        scaler = self._accelerator.scaler
        scaler_state = scaler.state_dict() if scaler is not None else {}
        measured: dict[str, float] = {}
        if self._is_sharded:  # a part of a matrix has no storage that could be followed
            self._rehearse_scoring()
        else:
            key = "" if known is None else step_key(self._model, self._optimizer, (shortest(), longest()))
            memory = None if known is None else known.get(key)

            def fits() -> None:
                self._rehearse_scoring()
                if memory is not None:
                    self._rehearse_step(longest())

            with garbage_collected_before():
                rehearse_beside_optimizer(
                    fits, self._model, self._optimizer, first=lambda: self._rehearse_step(shortest())
                )
            if memory is None:
                reset_device_peaks(self._accelerator.device)
                memory = self.step_peak(shortest=shortest, longest=longest)
                if known is not None:
                    known[key] = memory
            measured |= memory.as_metrics()
            self._own_bytes = memory.total_bytes - memory.weights_bytes
            if self._config.compile is not Compile.none:  # which it is now, before the clock starts
                self.time_rehearsal([shortest(), longest()])
        if scaler is not None:
            scaler.load_state_dict(scaler_state)
        return measured

    def time_rehearsal(self, steps: Iterable[Sequence[Batch]]) -> dict[str, float]:
        """Rehearses steps with this run's model alone, and changes nothing; what their times give, by metric name.

        Nothing for a model that is sharded, whose steps are not rehearsed.
        """
        if self._is_sharded:
            return {}
        chosen = list(steps)
        rehearsals = [partial(self._rehearse_step, micro_batches) for micro_batches in chosen]
        queue = device_queue(self._accelerator.device)
        took = time_rehearsed_steps(rehearsals, self._model, self._optimizer, queue)
        real, computed, *_ = zip(*map(step_sizes, chosen), strict=True)
        passes = zip(took, computed, strict=True)
        self._seconds_per_token = median(each.forward_backward / num_computed for each, num_computed in passes)
        seconds, num_tokens = [each.whole for each in took], sum(real)
        return {"step_seconds_median": median(seconds), "train_tokens_per_second": num_tokens / sum(seconds)}

    def step_peak(
        self, *, shortest: Callable[[], Sequence[Batch]], longest: Callable[[], Sequence[Batch]]
    ) -> MemoryPeak:
        """Peak memory of the longest step; the shortest one comes before it, for the optimizer to create its state."""
        return measure_peak_memory(
            lambda: self._rehearse_step(longest()),
            self._model,
            self._optimizer,
            first=lambda: self._rehearse_step(shortest()),
        )

    def scoring_peak(self, *, shortest: Callable[[], Sequence[Batch]]) -> MemoryPeak:
        """Peak memory of the largest forward pass that scoring makes, beside the optimizer's state."""
        peaks: list[MemoryPeak] = []

        def score() -> None:
            with LiveTensors(self._model, self._optimizer) as live:
                self._rehearse_scoring()
            peaks.append(live.peak)

        rehearse_beside_optimizer(score, self._model, self._optimizer, first=lambda: self._rehearse_step(shortest()))
        return peaks[0]

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes over the state of a checkpoint, whose position `at` is."""
        tensors = dict(tensors)
        logits = tensors.pop(_BEST_LOGITS, None)
        if self.at.best is not None:
            self.at.best = replace(self.at.best, logits=logits)
        self.best_state, method_state = unpack_training(
            tensors, self._bare_model, self._optimizer, accelerator=self._accelerator
        )
        self._method.load(method_state)
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(self.at.scaler)

    def step(self, micro_batches: Sequence[Batch]) -> Turns[None]:
        """Makes one optimizer step, in turns; its loss is read later, by `account`."""
        self.at.step += 1
        self.at.step_in_epoch += 1
        self.at.last = None
        rate = learning_rate_at(self.at.step, self._num_steps, self._config)
        set_learning_rates(self._optimizer, self.at.step, self._num_steps, self._config)
        sizes = all_reduce_sum(step_sizes(micro_batches), self._accelerator)
        self._meter.begin()
        loss = yield from self._forward_backward(micro_batches, sizes[-1])
        self._optimizer.step()
        self._method.stepped(self.at.step)
        self._optimizer.zero_grad(set_to_none=True)
        self._meter.end(loss, _Made(self.at.step, rate, sizes))

    def account(self, *, behind: bool) -> None:
        """Counts the steps that the device has finished, or waits for all of them, and hands them to the callbacks.

        Raises `TrainingDivergedError` for a loss that is not finite.
        """
        for done in self._meter.finished(behind=behind):
            minimised, reported = done.values
            for loss in (minimised, reported):
                if not math.isfinite(loss):
                    raise TrainingDivergedError(done.note.step, f"the loss was {loss}")
            self.at.add(done.seconds, done.note.sizes, reported)
            tokens_per_second = self.at.real_tokens / self.at.seconds
            values = {"learning_rate": done.note.learning_rate, "train_tokens_per_second": tokens_per_second}
            self._callbacks.stepped(done.note.step, {self._objective.loss_name: reported, **values})

    def score(self, *, is_kept: bool) -> Evaluation:
        """Scores the state after `at.step` on val. Unless it is kept already, it is kept when that fails."""
        at = self.at
        try:
            with self._accelerator.autocast():
                evaluation = at.last or self._objective.evaluate(self._model)
        except Exception as error:
            # The others would not take part when one process alone has failed.
            if not is_kept and (self._accelerator.num_processes == 1 or isinstance(error, PreemptedError)):
                self.keep()
            raise
        if not evaluation.scores:
            raise TrainingDivergedError(at.step, "predictions on val were not finite")
        self._callbacks.evaluated(at.step, evaluation)
        at.is_to_score, at.last = False, evaluation
        is_between = self._config.warmup_fraction * self._num_steps < at.step < self._num_steps
        if self._untrained is not None and is_between:
            reason = why_hopeless(evaluation.scores, self._untrained)
            if reason is not None:
                raise TrainingDivergedError(at.step, reason)
        if at.best is None or evaluation.objective > at.best.objective:
            at.best, at.best_step = evaluation, at.step
            self.best_state = None if at.step == self._num_steps else _trainable_state(self._bare_model)
        return evaluation

    def keep(self, *, with_optimizer: bool = True) -> None:
        """Hands the state to the callbacks as a checkpoint; without the optimizer's when all steps are made."""
        accelerator = self._accelerator
        self.at.scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
        optimizer = self._optimizer if with_optimizer else None
        tensors = pack_training(
            self._bare_model, optimizer, self.best_state, method_state=self._method.state(), accelerator=accelerator
        )
        if self.at.best is not None and self.at.best.logits is not None:
            tensors[_BEST_LOGITS] = self.at.best.logits
        self._callbacks.keep_checkpoint(tensors, self.at)

    def summary(self, flops: StepFlops | None) -> dict[str, float]:
        """Loss, time, throughput and compute of all steps, by metric name."""
        at = self.at
        summary = {
            self._objective.loss_name: at.mean_loss,
            "train_seconds": at.seconds,
            "step_seconds_median": median(at.lap_seconds),
            "train_tokens_per_second": at.real_tokens / at.seconds,
            "padding_overhead": at.computed_tokens / at.real_tokens,
        }
        if flops is not None:
            summary["train_flops"] = flops.total(
                num_tokens=at.computed_tokens, num_squared=at.squared_tokens, num_targets=at.num_targets
            )
        return summary

    def _forward_backward(self, micro_batches: Sequence[Batch], num_targets: float) -> Turns[Tensor]:
        """Gradients of one step's mean loss, clipped; that loss as minimised and as reported, `(2,)` on the device.

        What the method adds to the loss is minimised and not reported.
        """
        accelerator, losses = self._accelerator, []
        for number, batch in enumerate(micro_batches, start=1):
            is_last = number == len(micro_batches)
            with contextlib.nullcontext() if is_last or self._is_sharded else accelerator.no_sync(self._model):
                on_device = batch.to(accelerator.device)
                pace, num_tokens = self._seconds_per_token, on_device.inputs["input_ids"].numel()
                losses.append(
                    (
                        yield MicroBatch(
                            self._model,
                            on_device,
                            loss_of=partial(self._loss_of, on_device, num_targets, is_last=is_last),
                            backward=self._backward,
                            own_bytes=self._own_bytes,
                            alone_seconds=None if pace is None else pace * num_tokens,
                        )
                    )
                )
        if self._config.max_gradient_norm is not None:
            accelerator.clip_grad_norm_(self._parameters, self._config.max_gradient_norm)
        return all_reduce_sum_on_device(losses, accelerator)

    def _loss_of(self, batch: Batch, num_targets: float, model: nn.Module, *, is_last: bool) -> tuple[Tensor, Tensor]:
        """A micro-batch's part of a step's mean loss, by the outputs of `model`: as minimised and as reported."""
        with self._accelerator.autocast():
            loss, reported = self._objective.summed_loss(model, batch).over(num_targets)
        if batch.num_targets == 0:  # stands in for examples that this process has no more of
            loss, reported = 0.0 * loss, 0.0 * reported
        if is_last:
            loss = self._method.add_to_loss(loss, share=1 / self._accelerator.num_processes)
        return loss, reported

    def _backward(self, loss: Tensor) -> None:
        # Gradients are averaged over the processes, and what is wanted is their sum.
        num_processes = self._accelerator.num_processes
        self._accelerator.backward(loss * num_processes if num_processes > 1 else loss)

    def _rehearse_step(self, micro_batches: Sequence[Batch]) -> None:
        num_targets = all_reduce_sum(step_sizes(micro_batches), self._accelerator)[-1]
        drive_alone(self._forward_backward(micro_batches, num_targets))

    def _rehearse_scoring(self) -> None:
        with self._accelerator.autocast():
            self._objective.rehearse(self._model)


def follow(learners: Sequence[Learner]) -> LiveTensors:
    """Follows the tensors of learners that are in one process, each a base tensor once where they share it."""
    return LiveTensors(
        nn.ModuleList(learner._bare_model for learner in learners), *(learner._optimizer for learner in learners)
    )


def step_sizes(micro_batches: Sequence[Batch]) -> list[float]:
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
