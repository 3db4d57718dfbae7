"""Method `lora`: adapters at the target layers (`harness.methods.lora`), saved in PEFT's format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from harness.config.schema import RunConfig
from harness.methods.adapting import apply_lora, merge_and_remove, trained_biases
from harness.methods.counts import is_lora
from harness.methods.peft_files import load_adapter, save_adapter
from harness.methods.registry import TrainedModel
from harness.models.configs import head_of
from harness.placement.select import Target

is_adapter = is_lora


def is_adapter_in(model: nn.Module) -> Callable[[str], bool]:
    """A and B, and with `variant.bias` the biases of the base that train beside them."""
    biases = trained_biases(model).keys()
    return lambda name: is_lora(name) or name in biases


def adapt(model: nn.Module, targets: Sequence[Target], config: RunConfig) -> None:
    """Puts adapted layers in the place of the target modules."""
    assert config.rank is not None
    # Its own generator: the adapter depends on the seed and not on what was drawn before it.
    apply_lora(
        model,
        targets,
        head=head_of(model, language_model=config.dataset.task.is_language),
        rank=[config.rank.at(target.rank or config.rank.rank) for target in targets],
        dropout=config.method.adapter_dropout,
        variant=config.variant,
        generator=torch.Generator().manual_seed(config.seed),
    )


def save(trained: TrainedModel, directory: Path) -> int:
    """Writes adapter and head so that `peft` loads them."""
    config = trained.config
    assert config.rank is not None
    return save_adapter(
        trained.model,
        directory,
        rank=config.rank,
        head_modules=trained.head,
        dropout=config.method.adapter_dropout,
        base_model=trained.base.name,
        revision=trained.base.revision,
        task_type="CAUSAL_LM" if config.dataset.task.is_language else "SEQ_CLS",
    )


def load(model: nn.Module, directory: Path, config: RunConfig, *, head: Sequence[str]) -> None:
    """Reads what `save` wrote."""
    load_adapter(model, directory)


merge = merge_and_remove
