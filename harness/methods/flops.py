"""Floating-point operations of a training step: by formula from the model's matrices, and counted on shapes alone.

A multiply-add is two operations. Matrix products count and nothing else does: norms, softmax, rotary positions,
dropout and the optimizer are a few operations an entry, and an embedding is a look-up. A product of `tokens x in` with
`in x out` costs `2 * tokens * in * out` forward, the same again for the gradient of its input where something upstream
is trained, and the same again for the gradient of its weight where that is trained:

    full fine-tuning       3 products a matrix (the first ones of a model included: the embedding is trained, too)
    LoRA                   2 products a matrix, and 3 of each of the adapter's two, with rank * (in + out) entries
    frozen, up to the      1 product
    first trained one

so LoRA costs a little more than 2/3 of full fine-tuning (LoRA Without Regret, Schulman & Thinking Machines 2025), and
less where the first blocks have no adapter, because autograd stops at the first trained parameter.

What counts is what the steps of training compute, on padding, too: a batch is padded to its longest example, and a
packed block attends over its whole length, with what other documents hold masked out. Neither evaluation nor the
rehearsal before the first step is counted, nor what gradient checkpointing computes a second time. An adapter's
products are counted as they are written down, also where `harness.methods.lora_linear` finds a cheaper order: that
depends on the batch, and a count must not.

`formula_flops` and `counted_flops` agree exactly for what the harness trains: everything, adapters and head, head
alone, biases or norms and head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness.methods.lora import AdaptedLayer, EmbeddingLoRALayer, MatrixLayer, is_linear
from harness.placement.architectures import ARCHITECTURES, Architecture


class FlopsError(ValueError):
    """A model whose operations are not known; the message says what stands in the way."""


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of forward and backward, as coefficients of what a batch holds.

    `per_token`: the matrices that every position passes. `per_token_squared`: attention. `per_target`: the
    unembedding of a language model, or the head of an encoder, where they read only some of the positions.
    """

    per_token: int
    per_token_squared: int
    per_target: int

    def total(self, *, num_tokens: int, num_squared: int, num_targets: int) -> int:
        """Operations of a step.

        Args:
            num_tokens: computed tokens, padding included.
            num_squared: the sum over examples of their padded length squared.
            num_targets: positions whose logits are computed; for a classifier the number of examples.
        """
        return self.per_token * num_tokens + self.per_token_squared * num_squared + self.per_target * num_targets


def formula_flops(model: nn.Module, *, whole_logits: bool = False) -> StepFlops:
    """Operations of a step from the shapes of a model's matrices and from which parameters are trained.

    Follows autograd through the blocks in the order of their computation: the gradient of an input is computed where
    the input depends on a trained parameter, and attention's four backward products where their operands do. A trained
    parameter that is in no matrix (an embedding, a norm) counts as upstream of everything. Where some of them are
    trained and some are not, a pass on fake tensors says whether that is so.

    Attention counts `4 * length^2 * width` forward: all pairs, masked ones included, because most kernels compute
    whole tiles and a count must not depend on the kernel. What gradient checkpointing and flash attention compute a
    second time counts once. In a decoder the task head `score` counts a token, not an example: transformers computes
    the scores of every position and picks one.

    Args:
        model: transformers' causal language model or sequence classifier of an architecture in
            `harness.placement.architectures`, on any device, adapted or not, with `requires_grad` as in training.
        whole_logits: whether a language model computes the logits of every position, padding included, and not of its
            targets alone (`harness.tasks.language.makes_whole_logits`).

    Raises:
        FlopsError: an architecture that is not described or whose attention is another (DeBERTa), matrices of which it
            is not known what passes them, trained norms behind frozen matrices, or layers of the `peft` package.
    """
    config: Any = model.config
    if getattr(model, "peft_config", None) is not None:
        raise FlopsError("the layers of peft have no formula here: what they compute differs from type to type.")
    matrices = dict(_matrices(model))
    architecture = _architecture(config.model_type)
    if not architecture.has_plain_blocks:
        raise FlopsError(f"model type {config.model_type!r}: its blocks have no formula here.")
    blocks = _blocks(architecture, matrices)
    before = [name for name in architecture.before_blocks if name in matrices]
    after = [name for name in architecture.after_blocks if name in matrices]
    pooler = [name for name in matrices if name.startswith(tuple(f"{module}." for module in architecture.optional))]
    head = [name for name in matrices if architecture.is_in_head(name)]
    unembedding = [name for name in matrices if name == architecture.unembedding]
    in_blocks = {f"{block}.{path}" for block in blocks for path in architecture.projections.values()}
    unknown = [name for name in matrices if name not in {*in_blocks, *before, *after, *pooler, *head, *unembedding}]
    if unknown:
        raise FlopsError(
            f"model type {config.model_type!r}: it is not known what passes {', '.join(unknown[:4])}"
            f"{', ...' if len(unknown) > 4 else ''}, so its operations cannot be counted from its shapes."
        )

    per_token = per_token_squared = per_target = 0
    trained_outside = _trained_outside(model, matrices, architecture)
    live = any(trained_outside)  # whether what is passed on depends on a trained parameter
    if live and not all(trained_outside):
        _require_live_inputs(model, [matrices[name] for name in (*before, *sorted(in_blocks & matrices.keys()))])
    for name in before:
        flops, live = _matrix_flops(matrices[name], live)
        per_token += flops
    for block in blocks:
        roles = {role: matrices[f"{block}.{path}"] for role, path in architecture.projections.items()}
        flops, squared, live = _block_flops(roles, live, parallel=_is_parallel(config))
        per_token += flops
        per_token_squared += squared
    for name in after:
        flops, live = _matrix_flops(matrices[name], live)
        per_token += flops
    for name in (*pooler, *head, *unembedding):
        flops, live = _matrix_flops(matrices[name], live)
        if (name in head and architecture.unembedding is not None) or (name in unembedding and whole_logits):
            per_token += flops
        else:
            per_target += flops
    return StepFlops(per_token, per_token_squared, per_target)


def _architecture(model_type: str) -> Architecture:
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        raise FlopsError(
            f"model type {model_type!r} is not described in harness/placement/architectures.py; described are "
            f"{', '.join(ARCHITECTURES)}."
        ) from None


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every linear map; an adapted one is the layer, under the name of its base module."""
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, EmbeddingLoRALayer):
            raise FlopsError(f"{name} is an adapted embedding, whose operations have no formula here.")
        if isinstance(module, AdaptedLayer):
            if module.row_squares is not None:
                raise FlopsError("DoRA measures the rows of every adapted matrix in each pass, whatever its tokens.")
            adapted += (f"{name}.",)
            yield name, module
        elif is_linear(module) and not name.startswith(adapted):
            yield name, module


def _is_parallel(config: Any) -> bool:
    """Whether attention and MLP of a block read the same input: GPT-NeoX and Falcon, by their settings."""
    names = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")
    return any(getattr(config, name, False) for name in names)


def _blocks(architecture: Architecture, matrices: Mapping[str, nn.Module]) -> list[str]:
    pattern = re.compile(architecture.block_pattern + r"\..*")
    indices = {int(match.group(1)) for match in map(pattern.fullmatch, matrices) if match}
    return [architecture.block.format(index) for index in sorted(indices)]


def _trained_outside(model: nn.Module, matrices: Mapping[str, nn.Module], architecture: Architecture) -> list[bool]:
    """Of each parameter below the head that is in no matrix, whether it is trained."""
    # By module and not by parameter: the weight of an embedding may be tied to that of the unembedding.
    inside = {part for module in matrices.values() for part in module.modules()}
    return [
        parameter.requires_grad
        for name, module in model.named_modules()
        if module not in inside and not architecture.is_in_head(name)
        for parameter in module.parameters(recurse=False)
    ]


def _require_live_inputs(model: nn.Module, matrices: Sequence[nn.Module]) -> None:
    """Raises `FlopsError` unless what each matrix reads depends on a trained parameter."""
    if getattr(model, "is_quantized", False) or any(isinstance(weight, DTensor) for weight in model.parameters()):
        raise FlopsError(
            "some norms or biases of a quantized or sharded model train; which gradients that takes is not known."
        )
    live: list[bool] = []
    hooks = [
        matrix.register_forward_pre_hook(lambda _, inputs: live.append(inputs[0].requires_grad)) for matrix in matrices
    ]
    try:
        with _as_written(model):
            _Step(model, whole_logits=False).count(1, 8, 1, backward=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not all(live):
        raise FlopsError(
            f"model type {model.config.model_type!r}: some norms or biases train, and {live.count(False)} matrices "
            "come before the first of them, of which the formula knows nothing."
        )


def _block_flops(roles: Mapping[str, nn.Module], live: bool, *, parallel: bool) -> tuple[int, int, bool]:
    """Operations of a block per token and per token squared, and whether its output depends on a trained parameter.

    With `parallel` residuals attention and MLP read the same input (GPT-NeoX).
    """
    per_token = 0
    states = {}  # whether the queries, keys and values depend on a trained parameter
    for role in ("qkv", "q", "k", "v"):
        if role in roles:
            flops, states[role] = _matrix_flops(roles[role], live)
            per_token += flops
    query, key, value = (states.get(role, states.get("qkv", False)) for role in ("q", "k", "v"))
    # scores = query key^T and output = softmax(scores) value: each has a gradient for each operand that needs one.
    num_products = 2 + query + key + (query or key) + value
    width, _ = _shape(roles["o"])
    flops, attention_live = _matrix_flops(roles["o"], query or key or value)
    per_token += flops
    attention_live = attention_live or live
    mlp_live = live if parallel else attention_live
    hidden_live = False
    for role in ("gate_up", "gate", "up"):
        if role in roles:
            flops, role_live = _matrix_flops(roles[role], mlp_live)
            per_token += flops
            hidden_live = hidden_live or role_live
    flops, mlp_live = _matrix_flops(roles["down"], hidden_live)
    return per_token + flops, 2 * width * num_products, attention_live or mlp_live


def _matrix_flops(module: nn.Module, live: bool) -> tuple[int, bool]:
    """Operations per row of a linear map, and whether its output depends on a trained parameter if its input does."""
    if isinstance(module, MatrixLayer):
        base, _ = _matrix_flops(module.base, live)
        low, high, _ = module.factors()  # of several roles in one product; all zeros of the others' rows are computed
        low_rank_live = live or low.requires_grad
        flops = (
            base
            + _product(low.numel(), live, low.requires_grad)
            + _product(high.numel(), low_rank_live, high.requires_grad)
        )
        return flops, low_rank_live or high.requires_grad
    weight = module.weight
    assert isinstance(weight, Tensor)
    in_features, out_features = _shape(module)  # not those of the weight, which is packed where it is quantized
    trained = any(parameter.requires_grad for parameter in module.parameters())
    return _product(in_features * out_features, live, weight.requires_grad), live or trained


def _product(num_entries: int, input_gradient: bool, weight_gradient: bool) -> int:
    return 2 * num_entries * (1 + input_gradient + weight_gradient)


def _shape(module: nn.Module) -> tuple[int, int]:
    """In and out features."""
    if isinstance(module, MatrixLayer | nn.Linear):
        return module.in_features, module.out_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]  # Conv1D


def counted_flops(model: nn.Module, *, whole_logits: bool = False) -> StepFlops:
    """Operations of a step as PyTorch counts them (`FlopCounterMode`) in forward and backward, solved for a batch.

    Runs on fake tensors: nothing is computed or allocated, and neither the parameters nor their gradients change. A
    few small batches give the coefficients exactly, one more checks them. The count is the same on every machine:
    attention is computed by its two plain products (PyTorch's own formula for flash attention would count the
    recomputation of the scores in backward), all in float32 and without gradient checkpointing.

    Args:
        model: a transformers model as in `formula_flops`, of any architecture, not quantized, on the meta device or
            another, with attention `eager` or `sdpa`.
        whole_logits: as in `formula_flops`.

    Raises:
        FlopsError: operations that are no sum of terms per token, per token squared and per target; DeBERTa projects
            its relative positions once a batch.
    """
    step = _Step(model, whole_logits)
    with _as_written(model):
        # One example takes per_token * length + per_token_squared * length^2 + per_target * targets. Three unknowns:
        # two lengths and two numbers of targets, or for a classifier, which has one target an example, three lengths.
        if step.is_language_model:
            counts = [step.count(1, 8, 1), step.count(1, 16, 1), step.count(1, 8, 2)]
            per_target = counts[2] - counts[0]
        else:
            counts = [step.count(1, length, 1) for length in (8, 16, 24)]
            per_target = 3 * counts[0] - 3 * counts[1] + counts[2]
        short, long = counts[0] - per_target, counts[1] - per_target
        per_token_squared = (long - 2 * short) // (16**2 - 2 * 8**2)
        flops = StepFlops((short - 8**2 * per_token_squared) // 8, per_token_squared, per_target)
        batch, length, targets = 2, 40, 3 if step.is_language_model else 2
        counted = step.count(batch, length, targets)
    expected = flops.total(num_tokens=batch * length, num_squared=batch * length**2, num_targets=targets)
    if counted != expected:
        raise FlopsError(
            f"{type(model).__name__}: {batch} x {length} tokens with {targets} targets take {counted} operations, and "
            f"{expected} by what smaller batches say: they do not add up per token, per token squared and per target."
        )
    return flops


@contextmanager
def _as_written(model: nn.Module) -> Iterator[None]:
    """With neither dropout nor gradient checkpointing, and an adapter's products as they are written down."""
    training = {module: module.training for module in model.modules()}
    composed = {module: module.composed for module in model.modules() if isinstance(module, MatrixLayer)}
    model.eval()
    for layer in composed:
        layer.composed = True
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for layer, flag in composed.items():
            layer.composed = flag


class _Step(nn.Module):
    """The forward pass of a training step up to the logits that it needs."""

    def __init__(self, model: Any, whole_logits: bool) -> None:
        super().__init__()
        self.model = model
        self.is_language_model = model.get_output_embeddings() is not None
        self.whole_logits = whole_logits

    def forward(self, input_ids: Tensor, num_targets: int) -> Tensor:
        """`(batch, length)` to `(targets, vocabulary)`, or to `(batch, labels)`."""
        logits: Tensor
        if self.is_language_model and self.whole_logits:
            logits = self.model(input_ids).logits.flatten(0, 1)[:num_targets]
        elif self.is_language_model:
            hidden = self.model.base_model(input_ids).last_hidden_state
            logits = self.model.get_output_embeddings()(hidden.flatten(0, 1)[:num_targets])
        else:
            logits = self.model(input_ids=input_ids).logits
        return logits

    def count(self, batch: int, length: int, num_targets: int, *, backward: bool = True) -> int:
        """Operations of one step, or of its forward pass alone."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        counter = FlopCounterMode(display=False)
        with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), counter:
            state = {
                # In float32, because a base held in less and its adapter meet under autocast alone.
                name: torch.empty_like(
                    tensor,
                    dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype,
                    requires_grad=tensor.requires_grad,
                )
                for name, tensor in tensors.items()
            }
            device = next(iter(state.values())).device
            input_ids = torch.zeros((batch, length), dtype=torch.long, device=device)
            logits = torch.func.functional_call(self, state, (input_ids, num_targets))
            if logits.requires_grad and backward:
                logits.sum().backward()
        return counter.get_total_flops()
