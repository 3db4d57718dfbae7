"""The optimizer, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from harness.config.schema import Schedule, TrainerConfig


def count_steps(config: TrainerConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run: `max_steps`, or `num_epochs` rounded up to whole steps."""
    if config.max_steps is not None:
        return config.max_steps
    assert config.num_epochs is not None
    return max(1, math.ceil(config.num_epochs * steps_per_epoch))


def learning_rate_at(step: int, num_steps: int, config: TrainerConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 1.

    Warm-up rises linearly to the full rate over `warmup_fraction` of the steps; after it the rate is constant, falls
    linearly to one step above zero, or follows half a cosine. The last step still learns.
    """
    num_warmup = math.ceil(config.warmup_fraction * num_steps)
    if step <= num_warmup:
        return config.learning_rate * step / num_warmup
    done = (step - 1 - num_warmup) / max(1, num_steps - num_warmup)  # 0 at the first step after warm-up, always < 1
    match config.schedule:
        case Schedule.constant:
            return config.learning_rate
        case Schedule.linear:
            return config.learning_rate * (1 - done)
        case Schedule.cosine:
            return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


def build_optimizer(model: nn.Module, config: TrainerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors (biases, norms) do not decay, as is usual in fine-tuning."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_epsilon,
        fused=all(parameter.device.type in ("cpu", "cuda", "mps") for parameter in trainable),
    )
