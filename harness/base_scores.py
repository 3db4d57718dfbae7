"""The loss of a model before training, computed once for all runs that begin with the same model.

A sweep over ranks begins every run with one base model: a fresh adapter adds exactly nothing to it. Its loss on a split
is kept in the cache folder, under a digest of everything that decides it: the model's tensors and settings, the rows as
the model reads them, how they are computed, and the code that does. A file there can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import sys
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.content.assets import cache_dir
from harness.methods.adapting import lora_layers
from harness.methods.packed import tensors_of
from harness.prepare import PreparedRun
from harness.results.files import write_json_atomically
from harness.tasks.objective import Objective
from harness.training.ledger import Spending

logger = logging.getLogger("harness")

_FOLDER = "base_scores"
# What is compared with later: other scores may be those of an extension, whose code is not in the digest.
_LOSSES = ("nll", "mse")


class BaseLosses:
    """The losses of a run's model as training finds it, from the cache folder or computed.

    Computing one is timed apart from the run, as all is that the first run of a sweep does for the others. Of several
    processes each would look into its own cache folder: they compute it together.
    """

    def __init__(self, prepared: PreparedRun, objective: Objective, spending: Spending) -> None:
        """Nothing is read or computed until a loss is asked for."""
        self._prepared, self._objective, self._spending = prepared, objective, spending

    def of(self, split: Any) -> dict[str, float]:
        """The loss on a split, `nll` or `mse`."""
        if self._prepared.accelerator.num_processes > 1:
            return self._compute(split)
        found = self._model.copy()
        for batch in split.batches(self._prepared.config.trainer.eval_batch_size):
            for tensor in (*batch.inputs.values(), batch.labels):
                _add(found, tensor)
        path = cache_dir() / _FOLDER / f"{found.hexdigest()[:32]}.json"
        with contextlib.suppress(OSError, ValueError):
            kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
            return kept
        with self._spending.apart():
            scores = self._compute(split)
        losses = {name: scores[name] for name in _LOSSES if name in scores}
        try:
            write_json_atomically(path, losses)
        except (OSError, ValueError) as error:  # no room, no permission, or a loss that JSON has no number for
            logger.info("the loss before training is not kept in %s: %s", path.parent, error)
        return losses

    def _compute(self, split: Any) -> dict[str, float]:
        with self._prepared.accelerator.autocast():
            return self._objective.evaluate_split(self._prepared.model, split).scores

    @cached_property
    def _model(self) -> Any:
        """A hash of the model and of how it computes, which no split is in yet."""
        found = hashlib.sha256(json.dumps(_how(self._prepared, self._objective), sort_keys=True, default=str).encode())
        for tensor in _tensors(self._prepared.model):
            _add(found, tensor)
        return found


def _how(prepared: PreparedRun, objective: Objective) -> dict[str, Any]:
    config, model, device = prepared.config, prepared.model, prepared.accelerator.device
    return {
        "eval_batch_size": config.trainer.eval_batch_size,
        "whole_logits": objective.makes_whole_logits(model),
        "precision": str(config.trainer.precision),
        "quantization": str(config.model.quantization),
        "attention": getattr(model.config, "_attn_implementation", None),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "versions": [torch.__version__, sys.version],
        "model": model.config.to_dict(),
        "code": _code(frozenset(type(module) for module in model.modules())),
    }


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Everything that the model computes with, in its order; of adapters that still add nothing, nothing."""
    idle = {
        id(tensor)
        for _, layer in lora_layers(model)
        for update in layer.updates().values()
        if update.lora_magnitude is None and update.initial_A is None and not update.lora_B.any()
        for tensor in (update.lora_A, update.lora_B)
    }
    for tensor in tensors_of(model):
        if id(tensor) not in idle:
            yield tensor


def _add(found: Any, tensor: Tensor) -> None:
    found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


@cache
def _code(kinds: frozenset[type]) -> str:
    """A digest of the source files of the harness and of these kinds of modules, which a user may have written."""
    files = set(Path(__file__).parent.rglob("*.py"))
    for kind in kinds:
        if kind.__module__.startswith("torch."):  # named by its version, and an adapter may bring one more kind
            continue
        with contextlib.suppress(OSError, TypeError):  # one that was typed into a notebook has no file
            files.add(Path(inspect.getfile(kind)))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(files))).hexdigest()
