"""Method `norms`: weights and biases of LayerNorm and RMSNorm, and the head (Zhao et al. 2023, arXiv 2312.11420)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from harness.config.schema import RunConfig
from harness.config.validation import ConfigError
from harness.methods.base_part import keep, load_part, save_part
from harness.methods.registry import TrainedModel
from harness.placement.select import Target

FILE = "norms.safetensors"

# LayerNorm, input_layernorm, sa_layer_norm, ln_1, ln_f, q_norm, norm2, layernorm_embedding.
_NAME = re.compile(r"(.+_)?(layer_?norm|norm|ln)(\d+|_[a-z0-9]+)?", re.IGNORECASE)


def adapt(model: nn.Module, targets: Sequence[Target], config: RunConfig) -> None:
    """Nothing is added. Raises `ConfigError` where norms cannot be told by their names, or there are none."""
    by_type = {
        f"{path}.{leaf}"
        for path, module in model.named_modules()
        if is_norm(module)
        for leaf, _ in module.named_parameters(recurse=False)
    }
    by_name = {name for name, _ in model.named_parameters() if is_adapter(name)}
    where = f"method=norms: {config.model.name} (model type {model.config.model_type})"
    if not by_type:
        raise ConfigError([f"{where} has no LayerNorm or RMSNorm with weights; use method=lora or method=full."])
    odd = sorted(by_type ^ by_name)
    if odd:
        raise ConfigError(
            [
                f"{where} has norms that their names do not show, or other modules with such names: "
                f"{', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''}; extend harness/methods/norms_method.py."
            ]
        )


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises, by its type: transformers has one of its own for most architectures."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def is_adapter(name: str) -> bool:
    """Whether it is a parameter of a module that is called like a norm."""
    return _NAME.fullmatch(name.rpartition(".")[0].rpartition(".")[2]) is not None


def save(trained: TrainedModel, directory: Path) -> int:
    """Writes norms and head."""
    return save_part(trained, directory / FILE)


def load(model: nn.Module, directory: Path, config: RunConfig, *, head: Sequence[str]) -> None:
    """Reads what `save` wrote."""
    load_part(model, directory / FILE)


merge = keep
