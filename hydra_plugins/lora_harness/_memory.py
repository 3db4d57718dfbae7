"""Which runs of a sweep do not fit into the memory of the device, said before they start.

Two answers. Weights, gradients and optimizer state follow from shapes that every sweep has at hand: what they alone
take is compared before any run starts. `hydra.sweeper.dry_run=memory` predicts the peak of each run
(`harness.forecast.memory`), which takes a second or more for each of another shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from harness.config.schema import RunConfig, Schedule
from harness.content.files import base_model
from harness.content.identity import PlannedRun
from harness.results.metrics import bytes_text

if TYPE_CHECKING:
    from harness.measure.device import DeviceMemory
    from harness.plan import Plan


def predict_peaks(runs: Sequence[PlannedRun]) -> dict[str, int | str]:
    """By run id the predicted bytes at the peak, or why they are not known; once for runs of one shape."""
    from harness.forecast.memory import predict_memory
    from harness.forecast.request import ForecastError

    known: dict[str, int | str] = {}
    found = {}
    for run in runs:
        shape = _shape(run.config)
        if shape not in known:
            try:
                known[shape] = predict_memory(run.config).peak_bytes
            except ForecastError as error:
                known[shape] = str(error).splitlines()[0]
        found[run.run_id] = known[shape]
    return found


def _shape(config: RunConfig) -> str:
    """Equal for runs that need the same memory: they differ in seed, rates, schedule or length of training alone."""
    trainer = replace(
        config.trainer,
        learning_rate=0.0,
        num_epochs=None,
        max_steps=1,
        schedule=Schedule.constant,
        warmup_fraction=0.0,
        weight_decay=0.0,
        eval_every=0,
        eval_each_epoch=False,
        checkpoint_every=0,
    )
    parts = (base_model(config), config.dataset, config.method, config.rank, config.target_layers, config.variant)
    return repr((parts, trainer, config.device))


def unfit(
    runs: Sequence[PlannedRun], plans: Mapping[str, Plan], peaks: Mapping[str, int | str], memory: DeviceMemory | None
) -> list[str]:
    """A sentence for each shape of run that does not fit; none where the device's memory is not known."""
    if memory is None:
        return []
    needs: dict[tuple[int, bool], list[str]] = {}
    for run in runs:
        peak = peaks.get(run.run_id)
        is_predicted = isinstance(peak, int)
        need = peak if isinstance(peak, int) else plans[run.run_id].least_bytes
        # The parts of a sharded model lie on several devices.
        if need > memory.num_bytes and not run.config.shard_model:
            needs.setdefault((need, is_predicted), []).append(run.run_id)
    return [_sentence(need, is_predicted, run_ids, memory) for (need, is_predicted), run_ids in needs.items()]


def _sentence(need: int, is_predicted: bool, run_ids: Sequence[str], memory: DeviceMemory) -> str:
    more = f" and {len(run_ids) - 1} more" if len(run_ids) > 1 else ""
    what = "is predicted to need" if is_predicted else "needs for weights, gradients and optimizer state alone"
    fix = (
        "set a smaller trainer.micro_batch_size or dataset.max_length, or trainer.gradient_checkpointing=true"
        if is_predicted
        else "hold the base in less (model.dtype=bfloat16), take a smaller model, or adapt it instead of training it"
    )
    return (
        f"{run_ids[0]}{more}: {what} {need:,} bytes ({bytes_text(need)}), and {memory.name} has {memory.num_bytes:,} "
        f"({bytes_text(memory.num_bytes)}), so that it will not fit; {fix}."
    )
