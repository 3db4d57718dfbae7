"""Method `head_only`: the task head alone trains, on frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from harness.config.schema import RunConfig
from harness.methods.base_part import keep, load_part
from harness.methods.peft_files import head_state, save_tensors
from harness.methods.registry import TrainedModel
from harness.placement.select import Target

FILE = "head.safetensors"


def adapt(model: nn.Module, targets: Sequence[Target], config: RunConfig) -> None:
    """Nothing is added."""


def is_adapter(name: str) -> bool:
    """No parameter is."""
    return False


def save(trained: TrainedModel, directory: Path) -> int:
    """Writes the parameters of the head."""
    return save_tensors(head_state(trained.model, trained.head), directory / FILE)


def load(model: nn.Module, directory: Path, config: RunConfig, *, head: Sequence[str]) -> None:
    """Reads what `save` wrote."""
    load_part(model, directory / FILE)


merge = keep
