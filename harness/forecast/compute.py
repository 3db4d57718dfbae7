"""The floating-point operations of a run before it starts: what the run will record as `train_flops`.

The formula is that of runs (`harness.methods.flops`), on the model without its weights; what a batch holds is counted
as training counts it. With the data every batch of every epoch is made, and the figure is that of the run to the
operation. Without them steps are taken to be full, so that no run of as many steps needs more.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from harness.config.schema import RunConfig, Task
from harness.data.batches import TrainingBatches, count_steps_per_epoch
from harness.forecast.memory import full_batches
from harness.forecast.request import ForecastError, explained
from harness.methods.flops import FlopsError, StepFlops, formula_flops
from harness.plan import adapted_skeleton
from harness.processes.stopping import StopRequest
from harness.tasks.families import TaskData, find_family
from harness.training.learner import step_sizes
from harness.training.optimizer import count_steps


@dataclass(frozen=True)
class ComputeForecast:
    """Floating-point operations of training, forward and backward.

    Attributes:
        step_flops: of the largest step.
        num_steps: of the run; None where only the data say how many there are.
        run_flops: of all steps; None likewise.
        is_exact: whether every batch was counted, and no full step stands for them.
    """

    step_flops: int
    num_steps: int | None
    run_flops: int | None
    is_exact: bool

    def hours(self, flops_per_second: float) -> float | None:
        """Of training alone, without evaluation, at a rate; None where the number of steps is not known."""
        return None if self.run_flops is None else self.run_flops / flops_per_second / 3600


def predict_flops(config: RunConfig, *, num_labels: int = 2, data: TaskData | None = None) -> ComputeForecast:
    """The operations of a run in one process, from its configuration.

    Args:
        config: of the run.
        num_labels: outputs of a task head, where there are no data to say so.
        data: of the run (`harness.forecast.memory.load_run_data`).

    Raises:
        ForecastError: an architecture or a method without a formula, and whatever keeps the run from being built.
    """
    with explained():
        shapes = data or full_batches(config, num_labels)
        model = adapted_skeleton(config, num_labels=shapes.num_labels or num_labels).model
        objective = find_family(config.dataset.task).build_objective(config, shapes, {}, StopRequest())
        try:
            flops = formula_flops(model, whole_logits=objective.makes_whole_logits(model))
        except FlopsError as error:
            raise ForecastError(
                f"model={config.model.name}, method={config.method.name}: its operations are not known, and no run "
                f"records them. {error}"
            ) from error
        batches = TrainingBatches(
            shapes.train,
            batch_size=config.trainer.batch_size,
            micro_batch_size=config.trainer.micro_batch_size,
            seed=config.seed,
        )
    largest = _total(flops, step_sizes(batches.longest()))
    if data is None:
        num_steps = _num_steps(config)
        return ComputeForecast(largest, num_steps, None if num_steps is None else num_steps * largest, is_exact=False)
    num_steps = count_steps(config.trainer, batches.steps_per_epoch)
    run_flops = 0
    for epoch in range(-(-num_steps // batches.steps_per_epoch)):
        left = num_steps - epoch * batches.steps_per_epoch
        run_flops += sum(_total(flops, step_sizes(step)) for step in islice(batches.epoch(epoch), left))
    return ComputeForecast(largest, num_steps, run_flops, is_exact=True)


def _num_steps(config: RunConfig) -> int | None:
    """What the config says of it without the data: the number of training examples may be set."""
    # Of a corpus it is a number of documents, and how many blocks these fill is not known.
    num_examples = None if config.dataset.task is Task.causal_lm else config.dataset.num_train_examples
    if config.trainer.max_steps is None and num_examples is None:
        return None
    return count_steps(config.trainer, count_steps_per_epoch(num_examples or 0, config.trainer.batch_size))


def _total(flops: StepFlops, sizes: list[float]) -> int:
    _, num_tokens, num_squared, num_targets = map(int, sizes)
    return flops.total(num_tokens=num_tokens, num_squared=num_squared, num_targets=num_targets)
