"""How A, B and the lengths of rows begin: the inits of LoRA and its variants."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from harness.config.schema import Init, VariantConfig
from harness.methods.lora import (
    AdaptedLayer,
    EmbeddingLoRALayer,
    LoRAError,
    LowRank,
    require_unquantised,
    take_rows,
)


def start(layer: AdaptedLayer, variant: VariantConfig, generator: torch.Generator | None = None) -> None:
    """Gives A, B and the lengths of rows of a new layer their first values; on the meta device only their shapes."""
    if variant.dora:
        layer.row_squares = layer.base_rows().square().sum(1)
    for update in layer.updates().values():
        if layer.row_squares is not None:
            update.lora_magnitude = nn.Parameter(take_rows(layer.row_squares, update.rows).sqrt())
        is_meta = update.lora_A.is_meta
        with torch.no_grad():
            if isinstance(layer, EmbeddingLoRALayer):
                update.lora_A.zero_()
                if not is_meta:
                    update.lora_B.copy_(_drawn(update.lora_B, "normal", 1.0, generator))
            elif variant.init is Init.pissa:
                _start_from_weight(update, take_rows(layer.base_rows(), update.rows))
            elif not is_meta:
                _start_at_zero(update, variant.init, generator)


def _start_at_zero(update: LowRank, init: Init, generator: torch.Generator | None) -> None:
    if init is Init.random_b:
        update.lora_A.zero_()
        update.lora_B.copy_(_drawn(update.lora_B, "uniform", 1 / math.sqrt(update.rank), generator))
        return
    if init is Init.gaussian:
        update.lora_A.copy_(_drawn(update.lora_A, "normal", 1 / update.rank, generator))
    elif init is Init.orthogonal:
        # Rows of the Q of a normal matrix, whose signs are those of R's diagonal, are uniform among all such rows.
        q, r = torch.linalg.qr(_drawn(update.lora_A.T, "normal", 1.0, generator))
        update.lora_A.copy_((q * r.diagonal().sign()).T)
    else:
        # = kaiming_uniform_(a=sqrt(5))
        update.lora_A.copy_(_drawn(update.lora_A, "uniform", 1 / math.sqrt(update.in_features), generator))
    update.lora_B.zero_()


def _start_from_weight(update: LowRank, weight: Tensor) -> None:
    """PiSSA: the leading part of the weight trains; the update is by how much it has changed, and W stays whole."""
    if not weight.is_meta:
        u, singular, v = torch.linalg.svd(weight, full_matrices=False)
        roots = (singular[: update.rank] / update.scaling).sqrt()
        update.lora_A.copy_(roots[:, None] * v[: update.rank])
        update.lora_B.copy_(u[:, : update.rank] * roots)
    update.keep_as_initial()


def _drawn(like: Tensor, law: str, size: float, generator: torch.Generator | None) -> Tensor:
    """Random values of a tensor's shape: uniform in +-size, or normal of that standard deviation."""
    # Drawn on the CPU, so that a seed means the same adapter on every device.
    values = torch.empty(like.shape)
    if law == "normal":
        return values.normal_(0, size, generator=generator)
    return values.uniform_(-size, size, generator=generator)


def check_variant(base: nn.Module, variant: VariantConfig) -> None:
    """Raises `LoRAError` for a variant that needs more of a base module than it has."""
    if isinstance(base, nn.Embedding):
        if variant.dora or variant.init is Init.pissa:
            setting = "dora=true" if variant.dora else "init=pissa"
            raise LoRAError(f"variant.{setting} adapts matrices, not an embedding; leave it out of target_layers.")
    elif variant.dora or variant.init is Init.pissa:
        setting = "variant.dora=true" if variant.dora else "variant.init=pissa"
        require_unquantised(base, f"has no rows to measure; {setting} needs model.quantization=none")
