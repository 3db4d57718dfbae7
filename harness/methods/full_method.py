"""Method `full`: every parameter of the base model trains.

The model is saved as a base model again, or (`save_full_as=difference`) as what was added to each parameter of the
base, in bfloat16, with the head as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from harness.config.schema import KeptAs, RunConfig
from harness.content.files import base_model
from harness.methods.base_part import keep, read_part
from harness.methods.counts import is_head
from harness.methods.peft_files import save_tensors
from harness.methods.registry import TrainedModel
from harness.models.loading import load_model
from harness.models.saving import save_model
from harness.placement.select import Target
from harness.processes.distributed import full_tensor
from harness.results.files import DIFFERENCE_FILE


def adapt(model: nn.Module, targets: Sequence[Target], config: RunConfig) -> None:
    """Nothing is added."""


def is_adapter(name: str) -> bool:
    """No parameter is."""
    return False


def save(trained: TrainedModel, directory: Path) -> int:
    """Writes model and tokenizer so that transformers loads them, or the difference to the base."""
    if trained.config.save_full_as is KeptAs.difference:
        return _save_difference(trained, directory / DIFFERENCE_FILE)
    return save_model(
        trained.model,
        trained.tokenizer,
        directory,
        own_settings=trained.base.own_settings,
        label_names=trained.label_names,
    )


def _save_difference(trained: TrainedModel, path: Path) -> int:
    config = trained.config
    before = load_model(
        base_model(config),
        num_labels=None if config.dataset.task.is_language else len(trained.label_names) or 1,
        pad_token_id=trained.tokenizer.pad_token_id,
        seed=config.seed,
    ).model
    own = dict(before.named_parameters())
    tensors = {}
    for name, value in trained.model.named_parameters():
        now = full_tensor(value.detach()).cpu().float()
        tensors[name] = now if is_head(name, trained.head) else (now - own[name].detach().float()).to(torch.bfloat16)
    return save_tensors(tensors, path)


def load(model: nn.Module, directory: Path, config: RunConfig, *, head: Sequence[str]) -> None:
    """Adds the difference that `save` wrote to a base model's parameters, in float32, and puts the head in.

    Raises `ModelError`, with the model as it was, for a file that cannot be read or does not fit.
    """
    tensors = read_part(model, directory / DIFFERENCE_FILE)
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        own = parameters[name].data
        value = value.to(own.device, torch.float32)
        parameters[name].data = value if is_head(name, head) else own.float() + value


merge = keep
