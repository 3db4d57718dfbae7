"""What a language model is trained on and judged by: the nll of target tokens, and texts that it generates.

Logits are the largest tensor of a small model: tokens x vocabulary, twice with their gradient. They are computed only
where there is a target, a chunk of targets at a time, and the gradient of a chunk is taken at once: never is more than
one chunk of them in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness.data.batches import Batch
from harness.data.blocks import NO_TARGET, TokenSplit
from harness.placement.architectures import ARCHITECTURES
from harness.processes.stopping import StopRequest
from harness.tasks.objective import Evaluation, SummedLoss, cross_entropy, evaluating, largest_batch

# 128 MiB of float32 logits at once; their gradient takes as much again.
_CHUNK_ELEMENTS = 2**25


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `head(hidden)` summed over rows, whose gradients are made chunk by chunk in the forward pass.

    With label smoothing there is a second output, without it and without a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Callable[[Tensor], Tensor],
        chunk: int,
        label_smoothing: float,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        totals = [hidden.new_zeros((), dtype=torch.float32) for _ in range(2 if label_smoothing else 1)]
        wants_hidden = ctx.needs_input_grad[0]
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            with torch.enable_grad():
                part = hidden[rows].detach().requires_grad_(wants_hidden)
                loss = cross_entropy(head(part).float(), targets[rows], label_smoothing=label_smoothing)
            wanted = [*([part] if wants_hidden else []), *parameters]
            found = list(torch.autograd.grad(loss.minimised, wanted))
            if hidden_gradient is not None:
                hidden_gradient[rows] = found.pop(0)
            for gradient, value in zip(gradients, found, strict=True):
                gradient += value
            totals[0] += loss.minimised.detach()
            if loss.unsmoothed is not None:
                totals[1] += loss.unsmoothed
        saved = [*([hidden_gradient] if hidden_gradient is not None else []), *gradients]
        ctx.save_for_backward(*saved)
        ctx.wants_hidden = wants_hidden
        ctx.mark_non_differentiable(*totals[1:])
        return tuple(totals)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = outputs[0]
        saved = [(value.float() * scale).to(value.dtype) for value in ctx.saved_tensors]
        hidden_gradient = saved.pop(0) if ctx.wants_hidden else None
        return hidden_gradient, None, None, None, None, *saved


def chunked_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    *,
    chunk: int,
    label_smoothing: float = 0.0,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> SummedLoss:
    """Cross-entropy in nats of `head(hidden)` against `targets`, summed, with at most `chunk` rows of logits in memory.

    Args:
        hidden: `(rows, width)`.
        targets: `(rows,)`, class indices.
        head: a module from `(n, width)` to logits `(n, classes)`; its trainable parameters get gradients.
        chunk: rows of logits at once.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        forward: what computes the logits in place of the head's own `forward`.
    """
    forward = forward or head.forward
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or parameters):
        totals = _ChunkedCrossEntropy.apply(hidden, targets, forward, chunk, label_smoothing, *parameters)
        return SummedLoss(*totals)
    total = hidden.new_zeros((), dtype=torch.float32)
    unsmoothed = torch.zeros_like(total) if label_smoothing else None
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        loss = cross_entropy(forward(hidden[rows]).float(), targets[rows], label_smoothing=label_smoothing)
        total += loss.minimised
        if unsmoothed is not None and loss.unsmoothed is not None:
            unsmoothed += loss.unsmoothed
    return SummedLoss(total, unsmoothed)


def makes_whole_logits(model: nn.Module, chunk_tokens: int | None) -> bool:
    """Whether a step computes the logits of every position at once, and not of targets alone, a chunk at a time."""
    known = ARCHITECTURES.get(model.config.model_type)
    return chunk_tokens == 0 or known is None or not known.has_plain_logits


def summed_nll(model: nn.Module, batch: Batch, *, chunk_tokens: int | None = None) -> Tensor:
    """-log p of a batch's targets in nats, summed; a scalar with a graph where gradients are on. See `summed_loss`."""
    return summed_loss(model, batch, chunk_tokens=chunk_tokens).minimised


def summed_loss(
    model: nn.Module, batch: Batch, *, chunk_tokens: int | None = None, label_smoothing: float = 0.0
) -> SummedLoss:
    """The cross-entropy of a batch's targets in nats, summed, with and without label smoothing.

    The loss is made inside the model's own forward pass, in place of the logits, so that wrappers which do something
    around that pass (data parallel, sharding, autocast) do it here as well.

    Args:
        model: a causal language model of transformers, possibly wrapped.
        batch: labels `(examples, tokens)`, not shifted, `NO_TARGET` where nothing is predicted.
        chunk_tokens: targets whose logits are held at once; None as many as fit into 128 MiB, 0 all.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
    """
    bare = getattr(model, "module", model)
    targets = batch.labels[:, 1:]
    wanted = targets != NO_TARGET
    chosen = targets[wanted]
    if makes_whole_logits(bare, chunk_tokens):
        logits = model(**batch.inputs).logits[:, :-1][wanted]
        return cross_entropy(logits.float(), chosen, label_smoothing=label_smoothing)
    chunk = chunk_tokens or max(1, _CHUNK_ELEMENTS // bare.config.vocab_size)
    head = bare.get_output_embeddings()
    forward = head.forward
    unsmoothed: list[Tensor | None] = []

    def loss_instead_of_logits(hidden: Tensor) -> Tensor:
        loss = chunked_cross_entropy(
            hidden[:, :-1][wanted], chosen, head, chunk=chunk, label_smoothing=label_smoothing, forward=forward
        )
        unsmoothed.append(loss.unsmoothed)
        return loss.minimised

    head.forward = loss_instead_of_logits
    try:
        return SummedLoss(model(**batch.inputs).logits, *unsmoothed)
    finally:
        del head.forward


class LanguageObjective:
    """Next-token prediction of the targets of each block."""

    loss_name = "train_nll"

    def __init__(
        self,
        *,
        val: TokenSplit,
        eval_batch_size: int,
        best_metric: str = "nll",
        chunk_tokens: int | None = None,
        label_smoothing: float = 0.0,
        others: Sequence[TokenSplit] = (),
        stop: StopRequest | None = None,
    ) -> None:
        """`others` are the splits beside val that will be scored; `stop` is checked between batches."""
        self._val = val
        self._splits = (val, *others)
        self._stop = stop or StopRequest()
        self._eval_batch_size = eval_batch_size
        self._best_metric = best_metric
        self._chunk_tokens = chunk_tokens
        self._label_smoothing = label_smoothing

    def summed_loss(self, model: nn.Module, batch: Batch) -> SummedLoss:
        """Summed cross-entropy of the targets in nats."""
        return summed_loss(model, batch, chunk_tokens=self._chunk_tokens, label_smoothing=self._label_smoothing)

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Scores on the validation split."""
        return self.evaluate_split(model, self._val)

    def evaluate_split(self, model: nn.Module, split: TokenSplit) -> Evaluation:
        """`nll` per target token in nats, `perplexity`, and `bits_per_byte` of the target text, on any split.

        Empty where the model gives no finite numbers; perplexity is left out where no float can hold it.
        """
        total = 0.0
        device = next(model.parameters()).device
        with evaluating(model):
            for batch in self._stop.between(split.batches(self._eval_batch_size), "scoring"):
                total += float(summed_nll(model, batch.to(device), chunk_tokens=self._chunk_tokens))
        nll = total / int(split.num_targets.sum())
        if not math.isfinite(nll):
            return Evaluation({}, -math.inf)
        scores = {"nll": nll, "bits_per_byte": total / math.log(2) / max(1, split.num_bytes)}
        if nll < math.log(1e300):
            scores["perplexity"] = math.exp(nll)
        # All three fall together; perplexity is missing where it is too large.
        return Evaluation(scores, -scores.get(self._best_metric, math.inf))

    def makes_whole_logits(self, model: nn.Module) -> bool:
        """Whether a step computes the logits of every position at once."""
        return makes_whole_logits(model, self._chunk_tokens)

    def rehearse(self, model: nn.Module) -> None:
        """One forward pass on the largest batch of all splits."""
        batch = largest_batch(self._splits, self._eval_batch_size)
        with evaluating(model):
            summed_nll(model, batch.to(next(model.parameters()).device), chunk_tokens=self._chunk_tokens)
