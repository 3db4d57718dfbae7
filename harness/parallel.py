"""More than one process: what they share, and a model whose weights are spread over them.

The processes come from `accelerate launch` or torchrun; with one, nothing here does anything. Every process takes its
share of each step's examples. Without sharding each holds the whole model (DDP); with it, each holds a part of every
matrix (FSDP2) and the blocks are put together one at a time while they compute.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from harness.placement import ARCHITECTURES


def summed(values: Sequence[float], accelerator: Accelerator) -> list[float]:
    """Each value summed over all processes."""
    if accelerator.num_processes == 1:
        return list(values)
    # Counts up to 2^53 are exact.
    total = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return accelerator.reduce(total, reduction="sum").tolist()


def summed_on_device(parts: Sequence[Sequence[Tensor]], accelerator: Accelerator) -> Tensor:
    """Sums the n-th numbers of all parts over all processes: `(numbers,)`, on the device, without waiting for it."""
    # In the order of the parts and with 53 bits, as Python would add them up. MPS has no such numbers.
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    total = torch.zeros(len(parts[0]), dtype=dtype, device=accelerator.device)
    for part in parts:
        total = total + torch.stack(list(part)).to(dtype)
    return total if accelerator.num_processes == 1 else accelerator.reduce(total, reduction="sum")


def shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Spreads the weights over all processes, in place: each block by itself, then what is left."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    path = re.escape(ARCHITECTURES[model.config.model_type].block).replace(re.escape("{}"), r"\d+")
    for name, module in model.named_modules():
        if re.fullmatch(path, name):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, put together where it is spread; then all processes must ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(other: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, spread as `other` of the same shape is."""
    if isinstance(other, DTensor) and other.shape == value.shape:
        return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)
    return value


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one that may be spread."""
    target.copy_(like(target, value))
