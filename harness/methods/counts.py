"""Which parameters train, and how many there are: adapter, head and base, from shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn


def is_lora(name: str) -> bool:
    """Whether a parameter of this name belongs to a LoRA adapter."""
    return name.rpartition(".")[2] in ("lora_A", "lora_B", "lora_magnitude")


def is_bias(name: str) -> bool:
    """Whether a parameter of this name is a bias, those of norms included; DeBERTa calls some `q_bias`."""
    leaf = name.rpartition(".")[2]
    return leaf == "bias" or leaf.endswith("_bias")


def is_head(name: str, head_modules: Sequence[str]) -> bool:
    """Whether a parameter of this name belongs to the task head."""
    return any(name.startswith(module + ".") for module in head_modules)


def set_trainable(
    model: nn.Module,
    head_modules: Sequence[str],
    *,
    is_adapter: Callable[[str], bool] = is_lora,
    trains_base: bool = False,
) -> None:
    """Makes exactly the parameters of a method trainable: this is all in which methods differ for the trainer.

    They are the head, what `is_adapter` says of their names, and with `trains_base` everything.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains_base or is_head(name, head_modules) or is_adapter(name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # a frozen base may be held in less


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters, from shapes; a tied parameter counts once."""

    num_adapter_params: int
    num_head_params: int
    num_trainable_params: int
    num_total_params: int


def count_parameters(
    model: nn.Module, head_modules: Sequence[str], *, is_adapter: Callable[[str], bool] = is_lora
) -> ParameterCounts:
    """Counts adapter, head, trainable and all parameters. Works on the meta device, where nothing is allocated."""
    adapter = head = trainable = total = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
        if is_head(name, head_modules):
            head += parameter.numel()
        elif is_adapter(name):
            adapter += parameter.numel()
    return ParameterCounts(adapter, head, trainable, total)
