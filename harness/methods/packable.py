"""Which runs can share a pack, from their configs; what those cannot say, `harness.methods.packed` asks of models."""

from __future__ import annotations

from harness.config.schema import Compile, Precision, Quantization, RunConfig
from harness.results.methods import METHODS


def why_alone(config: RunConfig, *, on_gpu: bool = False) -> str | None:
    """Why a run can be in no pack, as a sentence's end; None where it can.

    `on_gpu` adds what its model would say there, for those who have none.
    """
    method = METHODS[config.method.name]
    if method.trains_base:
        return f"method={config.method.name} trains the base that a pack shares"
    if method.peft is not None:
        return f"method={config.method.name} is computed by the peft package"
    if config.model.dropout > 0:
        return f"model.dropout={config.model.dropout} draws one mask for all rows"
    if config.model.quantization is not Quantization.none:
        return f"model.quantization={config.model.quantization}"
    if config.trainer.precision is Precision.fp16:
        return "trainer.precision=fp16 scales the loss of each run by another factor"
    if config.shard_model:
        return "shard_model=true"
    if config.trainer.compile is not Compile.none:
        return f"trainer.compile={config.trainer.compile} compiles the blocks of one model"
    if on_gpu and config.method.adapter_dropout > 0:
        return "adapter dropout keeps a random state for each run on the CPU alone"
    return None


def base_is_drawn(config: RunConfig) -> bool:
    """Whether the base model is drawn from the seed, so that runs of other seeds share none."""
    return (config.model.tiny is not None or config.model.scratch is not None) and config.model.path is None
