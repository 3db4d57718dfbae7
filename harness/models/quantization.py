"""Frozen base weights in 8 or 4 bits (bitsandbytes)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig

from harness.config.schema import ModelConfig, Quantization
from harness.content.errors import ModelError
from harness.models.configs import origin


def quantization_arguments(
    config: ModelConfig, model_config: PreTrainedConfig, head: tuple[str, ...]
) -> dict[str, Any]:
    """What `from_pretrained` is given to quantise the weights, but for the head. Raises `ModelError`."""
    stored = getattr(model_config, "quantization_config", None)
    if stored is not None:
        kind = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        raise ModelError(
            f"model={config.name}: the weights of {origin(config)} are stored quantised ({kind}). Name the model whose "
            "weights are not, and set model.quantization=nf4 or int8."
        )
    if config.quantization is Quantization.none:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization={config.quantization}: needs bitsandbytes; pip install 'lora-harness[quant]'."
        )
    # A head is trained. Of a language model, transformers leaves out the unembedding by itself.
    unquantised = list(head) or None
    if config.quantization is Quantization.int8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=unquantised)}
    # What is computed with is what the weights would be held in otherwise.
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        llm_int8_skip_modules=unquantised,
    )
    return {"quantization_config": four_bits}
