"""The state of an unfinished training in one file: safetensors, with what is no tensor as JSON in its header.

One file, replaced atomically: a reader sees the previous checkpoint or this one, never a mixture. No pickle, so a
checkpoint of unknown origin can be loaded without running code out of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.processes.distributed import all_gather_to_cpu, copy_into, full_tensor, shard_like
from harness.results.files import write_atomically

Written = TypeVar("Written")

logger = logging.getLogger("harness")


def write_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes a checkpoint, atomically and through to the disk. Raises `OSError` when it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    header = {"state": json.dumps(state, allow_nan=False)}
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(on_host, partial, metadata=header)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except SafetensorError as error:
        partial.unlink(missing_ok=True)  # a full disk needs the room
        raise OSError(str(error)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_in_its_place(path: Path, write: Callable[[], Written]) -> Written:
    """Writes what a checkpoint was kept for; where the disk has no room for both, without the checkpoint.

    If that fails as well, the checkpoint is put back and the error is raised.
    """
    try:
        return write()
    except (OSError, SafetensorError):
        if not path.is_file():
            raise
    content = path.read_bytes()
    path.unlink()
    try:
        return write()
    except BaseException:
        write_atomically(path, content)
        raise


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of a checkpoint; None, with a warning unless there is no file, when it cannot be used."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        logger.warning("%s cannot be read (%s): the run starts over", path, error)
        return None


def pack_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    best_state: dict[str, Tensor] | None,
    *,
    method_state: Mapping[str, Tensor],
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Every tensor that decides how training continues: trained parameters, optimizer, random states, best so far.

    The random states are those of all processes, `(processes, bytes)`, so all of them must call this at once.
    `optimizer` is None when all steps are made. `method_state` is what the method itself keeps from step to step.
    """
    trainable = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    tensors = {f"model/{name}": full_tensor(value.detach()) for name, value in trainable}
    held: set[int] = set()
    for name, value in trainable if optimizer is not None else ():
        for key, entry in optimizer.state[value].items():
            packed = full_tensor(entry) if isinstance(entry, Tensor) else torch.tensor(entry)
            # bitsandbytes reads the states of all parameters by the same tables; a file holds no tensor twice.
            is_held = packed.data_ptr() in held
            held.add(packed.data_ptr())
            tensors[f"optimizer/{name}/{key}"] = packed.clone() if is_held else packed
    tensors |= {f"best/{name}": value for name, value in (best_state or {}).items()}
    tensors |= {f"method/{name}": value for name, value in method_state.items()}
    tensors["random/cpu"] = all_gather_to_cpu(torch.get_rng_state(), accelerator)
    if accelerator.device.type == "cuda":
        tensors["random/cuda"] = all_gather_to_cpu(torch.cuda.get_rng_state(accelerator.device), accelerator)
    return tensors


def unpack_training(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, *, accelerator: Accelerator
) -> tuple[dict[str, Tensor] | None, dict[str, Tensor]]:
    """Puts model, optimizer and random states back as `pack_training` found them.

    Returns the best state and that of the method. With another number of processes no random state is any process's
    own, and each takes a new one that follows from the old.
    """
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "best": {}, "method": {}, "random": {}}
    for name, value in tensors.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = value
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for name, value in parameters.items():
        copy_into(value, groups["model"][name])
    by_identity = {id(value): name for name, value in parameters.items()}
    ordered = [by_identity[id(value)] for group in optimizer.param_groups for value in group["params"]]
    states: dict[int, dict[str, Any]] = {}
    for name, value in groups["optimizer"].items():
        parameter, _, key = name.rpartition("/")
        states.setdefault(ordered.index(parameter), {})[key] = _unpack_entry(value, parameters[parameter])
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    _restore_random_state(groups["random"], accelerator)
    return groups["best"] or None, groups["method"]


def _unpack_entry(value: Tensor, parameter: Tensor) -> Any:
    """An entry of the optimizer's state as it was: a tensor, or bitsandbytes' count of steps, which is an `int`."""
    return value.item() if value.dtype is torch.int64 and value.ndim == 0 else shard_like(parameter, value)


def _restore_random_state(states: dict[str, Tensor], accelerator: Accelerator) -> None:
    number, num_processes = accelerator.process_index, accelerator.num_processes
    if len(states["cpu"]) == num_processes:
        torch.set_rng_state(states["cpu"][number].clone())  # PyTorch reads a view of it from the wrong place
        if accelerator.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"][number].clone(), accelerator.device)
        return
    logger.warning(
        "the checkpoint is of %d processes and these are %d: what is drawn at random (dropout) will differ from an "
        "undisturbed run",
        len(states["cpu"]),
        num_processes,
    )
    drawn = hashlib.sha256(states["cpu"].numpy().tobytes() + f"{number} of {num_processes}".encode()).digest()
    torch.manual_seed(int.from_bytes(drawn[:7]))
