"""A part of the base model's own parameters that trains with the head: written as one file, read back onto a base."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.content.errors import ModelError
from harness.methods.peft_files import save_tensors
from harness.methods.registry import TrainedModel
from harness.processes.distributed import copy_into


def save_part(trained: TrainedModel, path: Path) -> int:
    """Writes every parameter that was trained, under its name in the model; returns the bytes written."""
    parameters = trained.model.named_parameters()
    return save_tensors({name: value for name, value in parameters if value.requires_grad}, path)


def read_part(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The tensors of a file, each of the shape of the model's parameter of its name.

    Raises `ModelError` when the file cannot be read or does not fit the model.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not readable as safetensors ({error}).") from error
    parameters = dict(model.named_parameters())
    needed = {name: tuple(value.shape) for name, value in parameters.items()}
    wrong = [
        f"{name} is {tuple(value.shape)}, the model needs {needed.get(name, 'none')}"
        for name, value in tensors.items()
        if needed.get(name) != tuple(value.shape)
    ]
    if wrong:
        more = "; ..." if len(wrong) > 5 else ""
        raise ModelError(f"{path} does not fit the model: {'; '.join(wrong[:5])}{more}.")
    return tensors


def load_part(model: nn.Module, path: Path) -> list[str]:
    """Puts what `save_part` wrote in the place of a base model's own values; returns the names of the parameters.

    Raises:
        ModelError: with the model as it was, when the file cannot be read or does not fit the model.
    """
    tensors = read_part(model, path)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            # As it was trained, whatever the base is held in; the base's own tensor stays as it is.
            parameters[name].data = parameters[name].data.to(torch.float32, copy=True)
            copy_into(parameters[name], value)
    return list(tensors)


def keep(model: nn.Module) -> None:
    """To merge is to do nothing: what was trained is the model's own."""
