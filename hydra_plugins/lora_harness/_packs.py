"""Which runs of a sweep can be trained in one pack, from their configs alone.

Those that can be in none: `harness.methods.packable`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from harness.config.composing import to_dict
from harness.config.schema import RunConfig
from harness.config.validation import ConfigError
from harness.content.identity import PlannedRun
from harness.methods.packable import base_is_drawn
from harness.placement.architectures import EMBEDDING
from harness.results.methods import METHODS

AUTO = "auto"


def pack_size(pack: int | str) -> int | None:
    """The most runs that train together; None for as many as make it faster. Raises `ConfigError` for neither."""
    if pack == AUTO:
        return None
    if isinstance(pack, int) and not isinstance(pack, bool) and pack >= 1:
        return pack
    raise ConfigError(
        [
            f"hydra.launcher.pack={pack}: give the number of runs that train together, 1 for each alone, or {AUTO} for "
            "as many as make it faster."
        ]
    )


def pack_key(config: RunConfig) -> str:
    """Equal for runs that may share a pack: one base, data, precision, and lowest block with an adapter.

    Ranks, scalings, projections, learning rates and schedules, batch sizes, seeds and periods may differ.
    """
    values = to_dict(config)
    trainer = config.trainer
    return json.dumps(
        [
            [values[name] for name in ("model", "dataset", "device", "num_threads", "allow_busy_device")],
            [trainer.precision, trainer.gradient_checkpointing],
            _depth(config),
            config.seed if base_is_drawn(config) else None,
        ],
        sort_keys=True,
        default=str,
    )


def _depth(config: RunConfig) -> Any:
    """What says how far down a backward pass goes."""
    placed = config.target_layers
    if placed is None or not METHODS[config.method.name].uses_placement:
        return METHODS[config.method.name].trains
    if config.variant.bias != "none":
        return ["biases", config.variant.bias]
    return [placed.blocks, placed.stacks, placed.modules, EMBEDDING in placed.projections]


def in_order(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs of a pack, those with the same batches beside each other: their frozen blocks are computed once."""

    def batches(run: PlannedRun) -> tuple[int, int, int]:
        trainer = run.config.trainer
        return run.config.seed, trainer.batch_size, trainer.micro_batch_size or trainer.batch_size

    return sorted(runs, key=batches)
