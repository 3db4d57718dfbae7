"""Compiled blocks: in training steps, one program made by torch.compile in the place of a block's single operations.

What is computed is the same but for round-off. Scoring and generation, whose batches have other shapes, stay as they
are, and so does the step whose live tensors are counted, which a compiled one would hide.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers.modeling_layers import GradientCheckpointingLayer

from harness.config.schema import Compile
from harness.content.errors import ModelError

# How many programs PyTorch keeps of one block's code before it gives up compiling it: blocks of other ranks are others,
# and each has one for the first shape of a batch and one for all shapes.
_MOST_PROGRAMS = 256


def compile_blocks(model: nn.Module, how: Compile, device: torch.device) -> None:
    """Has the blocks of a model compiled when they are first passed in training; `how=none` changes nothing.

    Raises:
        ModelError: the model has no blocks that could be found, or this machine has no compiler.
    """
    if how is Compile.none:
        return
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ModelError(f"trainer.compile={how}: {type(model).__name__} has no blocks as transformers marks them.")
    missing = missing_compiler(device)
    if missing is not None:
        raise ModelError(f"trainer.compile={how}: {missing}; use trainer.compile=none.")
    torch._dynamo.config.recompile_limit = _MOST_PROGRAMS
    mode = "reduce-overhead" if how is Compile.graphs else None
    for block in blocks:
        block.forward = _compiled_in_training(block, mode)
    if how is Compile.graphs:
        # A replayed graph writes its outputs where the last one wrote them, which nobody needs after a backward pass.
        model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())


def missing_compiler(device: torch.device) -> str | None:
    """What compiling for a device lacks on this machine, as a sentence; None where nothing is missing."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "the package triton is not installed"
    if device.type != "cpu":
        return f"device={device.type} is not compiled for"
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return None if any(map(shutil.which, compilers)) else f"no C++ compiler is installed ({' or '.join(compilers)})"


def _compiled_in_training(block: nn.Module, mode: str | None) -> Callable[..., Any]:
    plain = block.forward
    compiled = torch.compile(plain, mode=mode)

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        is_compiled = block.training and torch.is_grad_enabled()
        # Called while a dispatch mode watches, torch.compile would leave this code uncompiled from then on.
        is_compiled = is_compiled and not is_in_torch_dispatch_mode()
        return (compiled if is_compiled else plain)(*args, **kwargs)

    return forward
