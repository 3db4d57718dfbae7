"""Dropout on a CPU in a fraction of PyTorch's time, with masks that are drawn again and not kept.

PyTorch draws a number for each entry there. Here a mask is drawn from a key, four entries from a number of 64 bits, so
that the rate is right to 1/65536, and what is left is scaled by the rate that it has:

    key   one number from PyTorch's random state, so that a seed, a checkpoint and a resumed run say all masks
    bits  of a generator that starts at the key; an entry is kept where they are below the share that is kept
    mask  made of the bits by whole numbers, and laid over those of the floating-point numbers

The backward pass draws from the same key. On other devices everything is PyTorch's own, whose kernels draw as they go.

    a loaded model -- use_own_dropout --> its nn.Dropout are Dropout, its attention "sdpa" makes the same products and
                                          draws what it drops from keys
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# As transformers knows it, where it stands for "sdpa".
ATTENTION = "sdpa_with_own_dropout"

_STEPS = 2**15
_WHOLE: dict[torch.dtype, torch.dtype] = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


class Dropout(nn.Dropout):
    """`nn.Dropout`; see the module's text for what it is on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Of any shape, and the same shape."""
        if not self.training or self.inplace or not is_drawn_from_keys(input, self.p):
            return super().forward(input)
        return dropped(input, self.p, draw_key())


def use_own_dropout(model: PreTrainedModel) -> None:
    """Puts `Dropout` in the place of every `nn.Dropout` of a model, and `ATTENTION` in that of "sdpa"."""
    _replace_modules(model)
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, _attend)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)  # some old models warn and keep theirs


def _replace_modules(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                own = Dropout(child.p, child.inplace)
                own.train(child.training)
                setattr(module, name, own)


def is_drawn_from_keys(x: Tensor, p: float) -> bool:
    """Whether a mask for a tensor is drawn here: on a CPU, where some of it is dropped and some is kept."""
    return x.device.type == "cpu" and x.dtype in _WHOLE and p > 0 and round(p * _STEPS) < _STEPS


def draw_key() -> int:
    """What the bits of a mask start from, from the random state of the CPU."""
    return int(torch.empty((), dtype=torch.int64).random_(0, None))  # has a value also where floats have no data


def dropped(x: Tensor, p: float, key: int) -> Tensor:
    """What is left of a tensor on a CPU, scaled by the inverse of the share that is kept."""
    result: Tensor = _Dropped.apply(x, p, key)
    return result


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, key: int) -> Tensor:
        ctx.p, ctx.key = p, key
        return _masked(x, p, key)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return dropped(gradient, ctx.p, ctx.key), None, None


def _masked(x: Tensor, p: float, key: int) -> Tensor:
    share_kept, whole = _STEPS - round(p * _STEPS), _WHOLE[x.dtype]
    # -1, which has all bits, where an entry is kept, and 0 where it is dropped.
    mask = _bits(x.numel(), key).sub_(share_kept).bitwise_right_shift_(15).to(whole).view(x.shape)
    kept = x.contiguous().view(whole) & mask  # and not in place: a tensor without data gives another one
    return kept.view(x.dtype).mul_(_STEPS / share_kept)


def _bits(number: int, key: int) -> Tensor:
    """So many uniform numbers from 0 to 32767."""
    generator = torch.Generator().manual_seed(key)
    # From a lower end on: without one all numbers would be above zero, and every fourth part of 16 bits as well.
    words = torch.empty(-(-number // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:number].bitwise_and_(_STEPS - 1)


# ---------------------------------------------------------------- attention


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Transformers' `sdpa`, whose kernel is ours where one would draw a mask on a CPU."""
    with _OurKernel():
        return sdpa_attention_forward(module, *args, **kwargs)


class _OurKernel(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            func = attention_with_dropout
        return func(*args, **(kwargs or {}))


def attention_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`functional.scaled_dot_product_attention`, of which the arguments are.

    PyTorch's own where nothing is drawn here, and of 16 bits, whose products it makes in 32.
    Kept for the backward pass are the weights before dropout, where PyTorch keeps those after it and the mask as well.
    """
    is_half = query.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled("cpu")
    is_odd = attn_mask is not None and (is_causal or attn_mask.dtype not in (torch.bool, query.dtype))
    if is_half or is_odd or not is_drawn_from_keys(query, dropout_p):
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = torch._safe_softmax(scores, -1)  # zeros for a row that may see nothing, as there
    attended: Tensor = _DroppedProduct.apply(weights, value, dropout_p, draw_key())
    return attended


class _DroppedProduct(torch.autograd.Function):
    """Of weights without those that are dropped, and values."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, value: Tensor, p: float, key: int) -> Tensor:
        ctx.save_for_backward(weights, value)
        ctx.p, ctx.key = p, key
        return _masked(weights, p, key) @ value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        weights, value = ctx.saved_tensors
        of_value = _masked(weights, ctx.p, ctx.key).mT @ gradient if ctx.needs_input_grad[1] else None
        of_weights = _masked(gradient @ value.mT, ctx.p, ctx.key) if ctx.needs_input_grad[0] else None
        return of_weights, of_value, None, None
