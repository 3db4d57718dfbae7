"""What a run trained, merged into its base model and written as a model that transformers loads."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from harness.config.schema import Quantization
from harness.config.validation import ConfigError
from harness.methods.swapping import merge_in
from harness.models.loading import PreTrainedModel
from harness.models.saving import save_model
from harness.prepare import build_accelerator, set_threads
from harness.saved import Base, SavedRun

logger = logging.getLogger("harness")

# Of a logit, relative to the largest one: rounding of a sum in float32 is far below.
_TOLERANCE = 1e-4


def export(saved: SavedRun, directory: Path) -> int:
    """Writes model, tokenizer, head and names of classes into a folder; returns the bytes of the tensor files.

    The merged model's logits are compared with the adapted model's.

    Raises:
        ConfigError: a base that is held quantised, or a method that merging does not keep.
        ModelError, LoRAError, PeftMethodError: weights that cannot be loaded, or a method that cannot be merged.
    """
    if saved.config.model.quantization is not Quantization.none:
        raise ConfigError(
            [
                f"{saved.run_id}: model.quantization={saved.config.model.quantization}: a quantised weight holds no "
                "sum; load the base model unquantised to merge into it (load_adapter, then merge_and_remove)."
            ]
        )
    set_threads(saved.config)
    base = Base(saved)
    inputs = _made_up_inputs(base.base.model)
    accelerator = build_accelerator(saved.config)
    with base.holding(saved, accelerator) as model:
        with accelerator.autocast():
            adapted = _logits(model, inputs)
        merge_in(model, saved.config)
        with accelerator.autocast():
            merged = _logits(model, inputs)
        difference = (merged - adapted).abs().max().item()
        if not difference <= _TOLERANCE * adapted.abs().max().item() and saved.config.model.dtype == "float32":
            raise ConfigError(
                [
                    f"{saved.run_id}: method={saved.config.method.name} does not merge: a logit of the merged model is "
                    f"off by {difference:.2g}."
                ]
            )
        logger.info("%s: merged; logits are those of the adapted model to %.1g", saved.run_id, difference)
        return save_model(
            model,
            base.tokenizer,
            directory,
            own_settings=base.base.own_settings,
            label_names=saved.label_names,
        )


def _made_up_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.get_input_embeddings().num_embeddings, (4, 16), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Logits in float32, on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits: Tensor = model(**{name: value.to(device) for name, value in inputs.items()}).logits
    return logits.float().cpu()
