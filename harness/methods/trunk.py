"""What frozen blocks make of a batch, kept for the next run or epoch that scores the same batch.

Below the lowest module that trains, the runs of a pack compute the same numbers from the same batch, now and at every
later evaluation. Scoring a split of which they are kept begins at that module; the scores are bitwise those of
computing everything, because what is kept was computed from the same batch by the same products.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BUDGET_BYTES = 2**30
"""Bytes of block outputs that one process keeps. When it is full, what is kept stays and the rest is computed."""

_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}


class TrunkMemory:
    """Outputs of frozen blocks by batch, for several models.

    Args:
        budget_bytes: of all that is kept.
    """

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        self._budget_bytes = budget_bytes
        self._kept: dict[Hashable, Any] = {}
        self._kept_bytes = 0
        self.num_found = 0

    def clear(self) -> None:
        """Keeps nothing any more."""
        self._kept.clear()
        self._kept_bytes = 0

    def attach(self, model: nn.Module, blocks: Sequence[nn.Module], *, name: Hashable) -> None:
        """Lets a model find what its first `blocks` have made of a batch, and keep it, where it is scored.

        `name` is equal for models whose blocks and what is before them are the same tensors. Training, and generation
        with its cache of keys and values, compute everything as before.
        """
        if not blocks:
            return
        batch: list[Hashable | None] = [None]

        def enter(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            batch[0] = None if args or torch.is_grad_enabled() else _key_of(kwargs, name)

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            batch[0] = None

        model.register_forward_pre_hook(enter, with_kwargs=True)
        model.register_forward_hook(leave, always_call=True)
        for block in blocks:
            block.forward = self._found_or(block.forward, lambda: batch[0], keeps=block is blocks[-1])

    def _found_or(
        self, compute: Callable[..., Any], find_batch: Callable[[], Hashable | None], *, keeps: bool
    ) -> Callable[..., Any]:
        """The forward of a block that gives the last block's output where that is kept, as all before the last do."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            batch = find_batch()
            if batch in self._kept:
                self.num_found += keeps
                return self._kept[batch]
            output = compute(*args, **kwargs)
            if keeps and batch is not None:
                self._keep(batch, output)
            return output

        return forward

    def _keep(self, batch: Hashable, output: Any) -> None:
        tensors = [output] if isinstance(output, Tensor) else output
        if not isinstance(tensors, list | tuple) or not all(isinstance(one, Tensor) for one in tensors):
            return
        num_bytes = sum(one.nbytes for one in tensors)
        if self._kept_bytes + num_bytes <= self._budget_bytes:
            self._kept[batch] = output
            self._kept_bytes += num_bytes


def without_memory(block: nn.Module) -> None:
    """Gives a copy of a block its own forward again."""
    block.__dict__.pop("forward", None)


def _key_of(inputs: dict[str, Any], name: Hashable) -> Hashable | None:
    """What names a batch by its content; None where the model is given more than a batch."""
    if not inputs.keys() <= _INPUTS or not all(isinstance(value, Tensor) for value in inputs.values()):
        return None
    contents = ((key, tuple(value.shape), value.cpu().numpy().tobytes()) for key, value in sorted(inputs.items()))
    return (name, *contents)
