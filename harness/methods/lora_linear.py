"""A frozen matrix with a low-rank update as one operation of autograd, which computes it in the cheapest order.

    y = x W^T + b + s (x A^T) B^T          W: (out, in), frozen      A: (rank, in)      B: (out, rank)
      = x (W + s B A)^T + b

With g the gradient of y, the chain rule gives

    dx = g W + s (g B) A = g (W + s B A)            dA = s (g B)^T x = s B^T (g^T x)
                                                    dB = s g^T (x A^T) = s (g^T x) A^T

Every equation has two sides, which are equal but for round-off and differ in multiply-adds, as Cherniuk et al. note
(Run LoRA Run, arXiv 2312.03415). With so many `rows` of x, and without what both sides compute:

    y            rows rank (in + out)        or   rank in out
    dx           rows rank in                or   rank in out        (rows rank out more where g B is not there for dA)
    dA and dB    2 rows rank (in + out)      or   rows in out + 2 rank in out

The second side is taken where it is cheaper, each time. What it forms is the size of W, is gone when the product is
made, and is by these conditions never larger than x and y together, or than A and B with their gradients.

`W + s B A` rounds the update to the precision of W. In float32 and float64 that is what the sum of the two products in
y is rounded to as well. Where matrices are multiplied in less (TF32), the update would be lost; the sum stands there.

Nothing but x, W, A and B is kept for the backward pass: not `x A^T`, which costs as many operations to compute then as
now, and nothing at all in the second form. The backward pass is made of operations that can be differentiated, so
second derivatives are right, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_supported(x: Tensor) -> bool:
    """Whether `lora_linear` is for such an input: on the CPU, of a type of 32 or 64 bits, without autocast.

    On a GPU autograd's own products are faster while models are small: what this operation saves in multiply-adds is
    less than what its Python takes, for which the device waits (LOG.md, "the first GPU"). A compiler fuses them itself.
    """
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(x.device.type)
    )


def takes_one_product(num_rows: int, weight: Tensor) -> bool:
    """Whether so many rows are multiplied with `W + s B A`, and not with W, A and B."""
    out_features, in_features = weight.shape
    return _sums_are_exact(weight) and in_features * out_features <= num_rows * (in_features + out_features)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, high: Tensor, scaling: float) -> Tensor:
    """`x (W + s B A)^T + b`, with gradients for x, b, A and B.

    Args:
        x: `(rows, in)`.
        weight: W, `(out, in)`, frozen; it may be a transposed view.
        bias: b, `(out,)`, or none.
        low: A, `(rank, in)`.
        high: B, `(out, rank)`.
        scaling: s.

    Raises:
        ValueError: W is to have a gradient, which this operation does not compute.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight.requires_grad=True: lora_linear has no gradient for W; freeze it or use two products.")
    y: Tensor = _LoRALinear.apply(x, weight, bias, low, high, scaling)
    return y


class _LoRALinear(torch.autograd.Function):
    # A product with the rank as one side is computed with it in front, (rank, rows): with a small rank the kernels of
    # the CPU take a third to a fifth of the time for `A x^T` and `(A x^T) g` than for `x A^T` and `g^T (x A^T)`.

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, high: Tensor, scaling: float) -> Tensor:
        if takes_one_product(len(x), weight):
            return torch.nn.functional.linear(x, _effective(weight, low, high, scaling), bias)
        return torch.nn.functional.linear(x, weight, bias).addmm_((low @ x.T).T, high.T, alpha=scaling)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, low, high, ctx.scaling = inputs
        ctx.save_for_backward(x, weight, low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, weight, low, high = ctx.saved_tensors
        scaling: float = ctx.scaling
        needs_x, _, needs_bias, needs_low, needs_high, _ = ctx.needs_input_grad
        num_rows, (out_features, in_features), rank = len(x), weight.shape, len(low)

        through_weight = (
            needs_low
            and needs_high
            and (
                (num_rows + 2 * rank) * in_features * out_features < 2 * num_rows * rank * (in_features + out_features)
            )
        )
        has_high_g = needs_low and not through_weight
        one_product = _sums_are_exact(weight) and (
            in_features * out_features <= num_rows * (in_features if has_high_g else in_features + out_features)
        )

        high_g = None  # s (g B)^T, (rank, rows)
        if has_high_g or (needs_x and not one_product):
            high_g = scaling * (high.T @ g.T)
        dx = dlow = dhigh = None
        if needs_x:
            if one_product:
                dx = g @ _effective(weight, low, high, scaling)
            else:
                assert high_g is not None
                dx = (g @ weight).addmm_(high_g.T, low)
        if through_weight:
            scaled = scaling * (g.T @ x)
            dlow, dhigh = high.T @ scaled, scaled @ low.T
        else:
            if needs_low:
                assert high_g is not None
                dlow = high_g @ x
            if needs_high:
                dhigh = (scaling * (low @ x.T) @ g).T
        return dx, None, g.sum(0) if needs_bias else None, dlow, dhigh, None


def _effective(weight: Tensor, low: Tensor, high: Tensor, scaling: float) -> Tensor:
    """`W + s B A`, laid out as W is."""
    if weight.is_contiguous():
        return torch.addmm(weight, high, low, alpha=scaling)
    return torch.addmm(weight.T, low.T, high.T, alpha=scaling).T


def _sums_are_exact(weight: Tensor) -> bool:
    """Whether products with a matrix take it as it is, and not rounded to fewer bits."""
    return weight.dtype is torch.float64 or torch.get_float32_matmul_precision() == "highest"
