"""More than one process: what they share, and a model whose weights are sharded over them.

The processes come from `accelerate launch` or torchrun; with one, nothing here does anything. Every process takes its
share of each step's examples. Without sharding each holds the whole model (DDP); with it, each holds a part of every
matrix (FSDP2) and the blocks are all-gathered one at a time while they compute.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from harness.placement.architectures import ARCHITECTURES


class ProcessFailedError(RuntimeError):
    """Another process of the run failed, and this one ends with it. `status` and `error` are those of the first."""

    def __init__(self, process: int, status: str, error: str) -> None:
        self.process, self.status, self.error = process, status, error
        super().__init__(f"process {process} of this run failed: {error}")


class Companions:
    """The other processes of a run: an error in one of them ends all.

    What fails is written into the store through which the processes found each other. Over gloo, those that wait for
    the failed one hear at once that its connections are closed, and find the reason there. NCCL waits on; a thread that
    watches the store ends its communication.

    Args:
        accelerator: of this run; with one process nothing here does anything.
        name: of the run, the same in all processes.
        store, abort: in place of those of the process group.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        name: str,
        *,
        store: Any = None,
        abort: Callable[[], object] | None = None,
        poll_seconds: float = 1.0,
    ) -> None:
        self._process = accelerator.process_index
        self._key = f"lora-harness/failed/{name}"
        if store is None and accelerator.num_processes > 1:
            store = distributed_c10d._get_default_store()
            if torch.distributed.get_backend() != "gloo":
                abort = distributed_c10d._abort_process_group
        self._store, self._abort, self._poll_seconds = store, abort, poll_seconds
        self._over = threading.Event()

    def report(self, error: BaseException, *, status: str = "failed") -> ProcessFailedError | None:
        """Says that this process fails with `error`; returns the failure of another where that is what caused it."""
        if self._store is None:
            return None
        own = {"process": self._process, "status": status, "error": f"{type(error).__name__}: {error}"}
        try:
            first = json.loads(self._store.compare_set(self._key, "", json.dumps(own)))
        except RuntimeError:  # the store ended with the process that held it
            return None
        # A lost connection is an error of no other type. What each process finds by itself is its own.
        is_consequence = type(error) is RuntimeError or isinstance(error, torch.distributed.DistError)
        return ProcessFailedError(**first) if is_consequence and first["process"] != self._process else None

    def check(self) -> None:
        """Raises `ProcessFailedError` when another process has failed."""
        if self._store is not None and self._store.check([self._key]):
            first = json.loads(self._store.get(self._key))
            if first["process"] != self._process:
                raise ProcessFailedError(**first)

    @contextmanager
    def together(self, *, shared: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Reports an error that leaves this block, and raises that of another process where it is the cause.

        Args:
            shared: errors that all processes raise by themselves; they are passed on as they are.
        """
        watch = threading.Thread(target=self._watch, name="companions", daemon=True)
        if self._abort is not None:
            watch.start()
        try:
            yield
        except shared:
            raise
        except Exception as error:
            cause = self.report(error)
            if cause is not None:
                raise cause from error
            raise
        finally:
            self._over.set()
            if watch.is_alive():
                watch.join()

    def _watch(self) -> None:
        assert self._abort is not None
        while not self._over.wait(self._poll_seconds):
            try:
                self.check()
            except RuntimeError:  # of another process, or of the store
                self._abort()
                return


def all_reduce_sum(values: Sequence[float], accelerator: Accelerator) -> list[float]:
    """Each value summed over all processes."""
    if accelerator.num_processes == 1:
        return list(values)
    # Counts up to 2^53 are exact.
    total = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return accelerator.reduce(total, reduction="sum").tolist()


def all_gather_to_cpu(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """The tensor of each process, `(processes, ...)`, on the CPU of all of them."""
    everyone: Tensor = accelerator.gather(tensor.unsqueeze(0).to(accelerator.device))
    return everyone.cpu()


def all_reduce_sum_on_device(parts: Sequence[Sequence[Tensor]], accelerator: Accelerator) -> Tensor:
    """Sums the n-th numbers of all parts over all processes: `(numbers,)`, on the device, without waiting for it."""
    # In the order of the parts and with 53 bits, as Python would add them up. MPS has no such numbers.
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    total = torch.zeros(len(parts[0]), dtype=dtype, device=accelerator.device)
    for part in parts:
        total = total + torch.stack(list(part)).to(dtype)
    return total if accelerator.num_processes == 1 else accelerator.reduce(total, reduction="sum")


def place_on_device(model: nn.Module, accelerator: Accelerator, *, shard_model: bool) -> None:
    """Puts a model from the CPU on the device: whole, or this process's part of every matrix."""
    if shard_model and accelerator.num_processes > 1:
        shard(model, accelerator)
    # Quantised weights lie on their device already, and transformers refuses to move them.
    elif not getattr(model, "is_quantized", False):
        model.to(accelerator.device)


def is_sharded(model: nn.Module) -> bool:
    """Whether the processes hold parts of the model's matrices."""
    return isinstance(model, FSDPModule)


def shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shards the weights over all processes, in place: each block by itself, then what is left.

    One of these at a time goes to the device and is sharded there, so no device ever holds more of the model than its
    part, one block, and at the end what is in no block (the embeddings).
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    paths = {stack.block_pattern for stack in ARCHITECTURES[model.config.model_type].stacks.values()}
    for name, module in model.named_modules():
        if any(re.fullmatch(path, name) for path in paths):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def reshard(model: nn.Module) -> None:
    """Frees what a forward pass without a backward pass has left whole: what is in no block.

    Until then `parameters()` gives whole tensors in place of the parts that are trained.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, all-gathered where it is sharded; then all processes must call this at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(other: Tensor, value: Tensor) -> Tensor:
    """A full tensor, sharded as `other` of the same shape is."""
    if isinstance(other, DTensor) and other.shape == value.shape:
        return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)
    return value


@torch.no_grad()
def copy_into(target: Tensor, value: Tensor) -> None:
    """Copies a full tensor into one that may be sharded."""
    target.copy_(shard_like(target, value))
