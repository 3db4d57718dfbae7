"""Method `bitfit`: the biases of the base model and the head (Ben Zaken et al. 2021, arXiv 2106.10199)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from harness.config.schema import RunConfig
from harness.config.validation import ConfigError
from harness.methods.base_part import keep, load_part, save_part
from harness.methods.counts import is_bias, is_head
from harness.methods.norms_method import is_norm
from harness.methods.registry import TrainedModel
from harness.models.configs import head_of
from harness.placement.select import Target

FILE = "bitfit.safetensors"

is_adapter = is_bias


def adapt(model: nn.Module, targets: Sequence[Target], config: RunConfig) -> None:
    """Nothing is added. Raises `ConfigError` for a model without biases."""
    head = head_of(model, language_model=config.dataset.task.is_language)
    if not any(is_adapter(name) and not is_head(name, head) for name, _ in model.named_parameters()):
        raise ConfigError(
            [
                f"method=bitfit: {config.model.name} (model type {model.config.model_type}) has no biases below its "
                "task head, so nothing of it would train; use method=norms or method=lora."
            ]
        )
    for module in model.modules():
        if is_norm(module):  # some of PyTorch's kernels want its weight in the type of its bias, which is float32
            module.float()


def save(trained: TrainedModel, directory: Path) -> int:
    """Writes biases and head."""
    return save_part(trained, directory / FILE)


def load(model: nn.Module, directory: Path, config: RunConfig, *, head: Sequence[str]) -> None:
    """Reads what `save` wrote."""
    adapt(model, (), config)
    load_part(model, directory / FILE)


merge = keep
