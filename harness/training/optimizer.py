"""The optimizer, and the learning rate of each step."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from harness.config.schema import Optimizer, Schedule, TrainerConfig
from harness.config.validation import ConfigError
from harness.methods.rates import Kind, LearningRates
from harness.training.lion import Lion


def count_steps(config: TrainerConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run: `max_steps`, or `num_epochs` rounded up to whole steps."""
    if config.max_steps is not None:
        return config.max_steps
    assert config.num_epochs is not None
    return max(1, math.ceil(config.num_epochs * steps_per_epoch))


def learning_rate_at(step: int, num_steps: int, config: TrainerConfig, *, full_rate: float | None = None) -> float:
    """Learning rate of optimizer step `step`, counted from 1, of what has `full_rate` (`trainer.learning_rate`).

    Warm-up rises linearly to the full rate over `warmup_fraction` of the steps; after it the rate is constant, falls
    linearly to one step above zero, or follows half a cosine. The last step still learns.
    """
    full_rate = config.learning_rate if full_rate is None else full_rate
    num_warmup = math.ceil(config.warmup_fraction * num_steps)
    if step <= num_warmup:
        return full_rate * step / num_warmup
    done = (step - 1 - num_warmup) / max(1, num_steps - num_warmup)  # 0 at the first step after warm-up, always < 1
    match config.schedule:
        case Schedule.constant:
            return full_rate
        case Schedule.linear:
            return full_rate * (1 - done)
        case Schedule.cosine:
            return full_rate * (1 + math.cos(math.pi * done)) / 2


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, num_steps: int, config: TrainerConfig) -> None:
    """Gives every group its learning rate of a step: all follow one schedule, each to a full rate of its own."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, num_steps, config, full_rate=group["initial_lr"])


def build_optimizer(
    model: nn.Module, config: TrainerConfig, rates: LearningRates | None = None
) -> torch.optim.Optimizer:
    """`trainer.optimizer` over the trainable parameters, each at the learning rate of its kind (null: one for all).

    Vectors (biases, norms) do not decay, as is usual in fine-tuning. What is no setting has PyTorch's defaults.
    """
    rates = rates or LearningRates(dict.fromkeys(Kind, config.learning_rate))
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = _groups(trainable, config, rates)
    rate, betas = config.learning_rate, (config.beta1, config.beta2)
    fused = all(parameter.device.type in ("cpu", "cuda", "mps") for _, parameter in trainable)

    def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=config.adam_epsilon, fused=fused)

    match config.optimizer:
        case Optimizer.adamw:
            return adamw(groups)
        case Optimizer.adamw8bit:
            return _bitsandbytes().AdamW8bit(groups, lr=rate, betas=betas, eps=config.adam_epsilon)
        case Optimizer.sgd:
            # On parts of a sharded model PyTorch has no fused SGD.
            fused = fused and not any(isinstance(parameter, DTensor) for _, parameter in trainable)
            return torch.optim.SGD(groups, lr=rate, momentum=config.effective_momentum, fused=fused)
        case Optimizer.adafactor:
            return torch.optim.Adafactor(groups, lr=rate)
        case Optimizer.lion:
            return Lion(groups, lr=rate, betas=(config.beta1, config.lion_beta2))
        case Optimizer.muon:
            hidden = hidden_matrices(model, rates)
            others = [(name, parameter) for name, parameter in trainable if name not in hidden]
            # With this factor a rate and a weight decay mean for Muon what they mean for AdamW (Liu et al. 2025,
            # arXiv 2502.16982), so that one setting serves both.
            muon = torch.optim.Muon(
                _groups(hidden.items(), config, rates),
                lr=rate,
                momentum=config.effective_momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            return MuonWithAdamW(muon, adamw(_groups(others, config, rates)) if others else None)


def _groups(trainable: Any, config: TrainerConfig, rates: LearningRates) -> list[dict[str, Any]]:
    """Parameter groups of one learning rate and one weight decay each."""
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for name, parameter in trainable:
        groups.setdefault((parameter.ndim <= 1, rates.of_kind[rates.kind(name)]), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rate,
            "initial_lr": rate,  # as PyTorch's schedulers call it
            "weight_decay": 0.0 if is_vector else config.weight_decay,
        }
        for (is_vector, rate), parameters in sorted(groups.items(), key=lambda item: item[0][0])
    ]


# ---------------------------------------------------------------- Muon


def hidden_matrices(model: nn.Module, rates: LearningRates) -> dict[str, nn.Parameter]:
    """The trainable parameters that Muon updates, by name: matrices of adapters and of the base model.

    Not the embeddings, the unembedding and the task head, and nothing that is no matrix (biases, norms, convolutions).
    """
    outside = {id(parameter) for module in _embeddings(model) for parameter in module.parameters(recurse=False)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.ndim == 2
        and id(parameter) not in outside
        and rates.kind(name) is not Kind.HEAD
    }


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    yield from (module for module in model.modules() if isinstance(module, nn.Embedding))
    unembedding = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(unembedding, nn.Module):
        yield unembedding


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on hidden matrices and AdamW on all else, as one optimizer: one list of groups and one state."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.Optimizer | None) -> None:
        """The groups of both must not be changed afterwards but through this optimizer."""
        parts = [part for part in (muon, adamw) if part is not None]
        self._parts = [(part, len(part.param_groups)) for part in parts]
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        start = 0
        for part, num_groups in self._parts:
            # Given anew each time: loading a state puts other objects in their places.
            part.state, part.param_groups = self.state, self.param_groups[start : start + num_groups]
            part.step()
            start += num_groups
        return loss


# ---------------------------------------------------------------- 8 bits


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes.optim")


def require_optimizer(config: TrainerConfig, device: torch.device) -> None:
    """Raises `ConfigError` when the optimizer needs a package that is not here, or cannot compute on this device."""
    if config.optimizer is not Optimizer.adamw8bit:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(["trainer.optimizer=adamw8bit: needs bitsandbytes; pip install 'lora-harness[quant]'."])
    version = importlib.import_module("bitsandbytes").__version__
    key = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS"}.get(device.type, device.type)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::optimizer_update_8bit_blockwise", key):
        raise ConfigError(
            [
                f"trainer.optimizer=adamw8bit: bitsandbytes {version} has no 8-bit optimizer for the device "
                f"{device.type}; run on another device, install a newer bitsandbytes, or use trainer.optimizer=adamw."
            ]
        )
