"""Method `full`: every parameter of the base model trains, and the model is saved as a base model again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from harness.config.schema import RunConfig
from harness.methods.base_part import keep
from harness.methods.registry import TrainedModel
from harness.models.saving import save_model
from harness.placement.select import Target


def adapt(model: nn.Module, targets: Sequence[Target], config: RunConfig) -> None:
    """Nothing is added."""


def is_adapter(name: str) -> bool:
    """No parameter is."""
    return False


def save(trained: TrainedModel, directory: Path) -> int:
    """Writes model and tokenizer so that transformers loads them."""
    return save_model(
        trained.model,
        trained.tokenizer,
        directory,
        own_settings=trained.base.own_settings,
        label_names=trained.label_names,
    )


merge = keep
