"""What runs have saved, put into their base model one after the other: the base is loaded once and stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from harness.config.schema import RunConfig
from harness.config.validation import ConfigError
from harness.methods.adapting import replace_module
from harness.methods.registry import find_method_module


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Whatever is put into a model inside is out of it afterwards: modules, parameters, and the tensors behind them.

    Nothing is copied. What is inside may give a parameter another tensor, and must not write into the one that it has.
    """
    modules = [(module, _attributes(module)) for module in model.modules()]
    parameters = [(value, value.data, value.requires_grad) for value in model.parameters()]
    try:
        yield
    finally:
        for module, attributes in modules:
            module.__dict__.clear()
            for name, (value, entries) in attributes.items():
                if entries is not None:
                    value.clear()
                    value.update(entries)
                module.__dict__[name] = value
        for parameter, data, requires_grad in parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, dict[Any, Any] | None]]:
    """The attributes of a module; of those that are dictionaries, their entries too."""
    return {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in vars(module).items()}


def put_in(model: nn.Module, directory: Path, config: RunConfig, *, head: Sequence[str]) -> None:
    """Puts what a run saved in `directory` into its base model, whose head has the shape of the run's.

    Raises `ConfigError` for a method that cannot, and what the method raises for files that cannot be read or do not
    fit.
    """
    load: Callable[..., None] = _function(config, "load")
    with torch.no_grad():
        load(model, directory, config, head=head)


def merge_in(model: nn.Module, config: RunConfig) -> None:
    """Makes a plain model of what `put_in` left, with what was trained in its weights. Raises likewise."""
    merge: Callable[[nn.Module], None] = _function(config, "merge")
    with torch.no_grad():
        merge(model)


def _function(config: RunConfig, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] | None = getattr(find_method_module(config.method.name), name, None)
    if function is None:
        raise ConfigError([f"method={config.method.name}: its module has no function `{name}`; write one."])
    return function


def change_head(model: nn.Module, skeleton: nn.Module, head: Sequence[str], *, num_labels: int) -> None:
    """Gives a model an empty head of other outputs, that of `skeleton` on the meta device; inside `restored` alone."""
    device = next(model.parameters()).device
    for name in head:
        replace_module(model, name, skeleton.get_submodule(name).to_empty(device=device).train(model.training))
    # The configuration is not the model's alone, and `restored` does not look into it.
    model.config = copy.deepcopy(cast(Any, model).config)
    model.config.num_labels = num_labels
    if hasattr(model, "num_labels"):
        model.num_labels = num_labels
