"""How fast the steps of a run are made while others like them are made beside it, before any run starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from typing import cast

from harness.config.schema import RunConfig
from harness.data.batches import TrainingBatches
from harness.methods.rates import learning_rates
from harness.prepare import prepare
from harness.processes.distributed import place_on_device
from harness.processes.stopping import StopRequest
from harness.training.learner import Learner, TrainingCallbacks
from harness.training.loop import REHEARSED_STEPS


def tokens_per_second(config: RunConfig, *, meet: Callable[[], object], seconds: float) -> float:
    """Rehearses the first steps of a run over and over for so long, and gives their rate; leaves no trace.

    Args:
        config: of the run.
        meet: called when the steps are about to be timed; may wait until others are.
        seconds: how long to time them; one is made at least, and another one before.

    Raises:
        As `harness.run.run` does for what is wrong before training.
    """
    # Nothing that a trial leaves out is read: those are scored, and no step is made on them.
    prepared = prepare(replace(config, trial=True))
    objective = prepared.family.build_objective(config, prepared.data, {}, StopRequest())
    place_on_device(prepared.model, prepared.accelerator, shard_model=False)
    learner = Learner(
        prepared.model,
        objective,
        config=config.trainer,
        accelerator=prepared.accelerator,
        callbacks=cast(TrainingCallbacks, None),  # of steps whose losses are read; none are
        num_steps=2,
        rates=learning_rates(config, prepared.head),
        method=prepared.during_training,
    )
    batches = TrainingBatches(
        prepared.data.train,
        batch_size=config.trainer.batch_size,
        micro_batch_size=config.trainer.micro_batch_size,
        seed=config.seed,
    )
    steps = cycle(islice(batches.epoch(0), REHEARSED_STEPS))
    learner.time_rehearsal([next(steps)])  # warms up
    meet()
    num_tokens = taken = 0.0
    end = time.monotonic() + seconds
    while taken == 0 or time.monotonic() < end:
        found = learner.time_rehearsal([next(steps)])
        taken += found["step_seconds_median"]
        num_tokens += found["step_seconds_median"] * found["train_tokens_per_second"]
    return num_tokens / taken
