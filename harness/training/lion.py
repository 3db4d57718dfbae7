"""Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): steps of one size, in the direction of a momentum's sign.

    update = sign(beta1 * m + (1 - beta1) * gradient)      weight <- weight - rate * (update + weight_decay * weight)
    m <- beta2 * m + (1 - beta2) * gradient

It holds one tensor of the size of the weights where Adam holds two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Groups of `params` with `lr`, `betas` and `weight_decay`, as PyTorch's optimizers have them."""

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(momentum.lerp(gradient, 1 - beta1).sign_(), alpha=-rate)
                momentum.lerp_(gradient, 1 - beta2)
        return loss
