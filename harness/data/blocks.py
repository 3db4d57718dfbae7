"""Blocks of tokens with their targets, and batches of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from harness.config.schema import DatasetConfig, Task, TooLong
from harness.content.errors import DataError
from harness.data.batches import Batch
from harness.data.readers import place

NO_TARGET = -100
"""Label of a token that is not to be predicted."""


@dataclass(frozen=True)
class Prompt:
    """What a text is generated from, and what people wrote in its place.

    `token_ids` are the tokens before the target, as in training but never truncated; `references` all targets that the
    split has for them, also those of rows that are too long; `stop` is what a chat template writes after an answer;
    `lead` are the spaces that ended the prompt and are tokenised with the target, so that a generated text begins with
    them and no reference does.
    """

    text: str
    token_ids: list[int]
    references: list[str]
    stop: str = ""
    lead: str = ""


@dataclass
class TokenBlocks:
    """Blocks under construction. `piece_starts` are the positions at which a piece of another document begins."""

    token_ids: list[list[int]] = field(default_factory=list)
    is_target: list[list[bool]] = field(default_factory=list)
    piece_starts: list[list[int]] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    prompts: dict[str, Prompt] = field(default_factory=dict)

    def add(self, token_ids: list[int], is_target: list[bool], num_bytes: int) -> None:
        """Adds a block that is one piece."""
        self.token_ids.append(token_ids)
        self.is_target.append(is_target)
        self.piece_starts.append([0])
        self.num_bytes.append(num_bytes)


class TokenSplit:
    """The blocks of one split, in a fixed order, and of the test split the prompts to generate from."""

    def __init__(self, arrays: dict[str, np.ndarray], prompts: list[Prompt], *, pad_token_id: int, isolate: bool):
        self._arrays = arrays
        self._prompts = prompts
        self._pad_token_id = pad_token_id
        self._isolate = isolate
        self._starts = np.concatenate([[0], np.cumsum(arrays["lengths"])])
        self.lengths = arrays["lengths"]
        self.num_targets = np.add.reduceat(arrays["is_target"].astype(np.int64), self._starts[:-1])
        self.num_bytes = int(arrays["num_bytes"].sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The blocks at `indices` as one batch, padded on the right to the longest of them.

        Labels are the token ids themselves where they are targets, else `NO_TARGET`; nothing is shifted. Packed blocks
        have `position_ids` that start over at each piece, which is how transformers knows that they are packed, and no
        attention mask: padding is its own piece.
        """
        lengths = self.lengths[np.asarray(indices)]
        shape = (len(lengths), int(lengths.max()))
        # Packed, padding is a piece like any other; transformers would warn of pad tokens without a mask.
        fill = self._arrays["token_ids"][0] if self._isolate else self._pad_token_id
        token_ids = np.full(shape, fill, dtype=np.int64)
        labels = np.full(shape, NO_TARGET, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            where = slice(self._starts[index], self._starts[index] + length)
            token_ids[row, :length] = self._arrays["token_ids"][where]
            is_target = self._arrays["is_target"][where]
            labels[row, :length][is_target] = token_ids[row, :length][is_target]
            positions[row, :length] = self._arrays["positions"][where]
            positions[row, length:] = np.arange(shape[1] - length)
        inputs = {"input_ids": torch.from_numpy(token_ids)}
        if self._isolate:
            inputs["position_ids"] = torch.from_numpy(positions)
        else:
            inputs["attention_mask"] = torch.from_numpy((np.arange(shape[1]) < lengths[:, None]).astype(np.int64))
        return Batch(
            inputs,
            torch.from_numpy(labels),
            num_tokens=int(lengths.sum()),
            num_targets=int(self.num_targets[np.asarray(indices)].sum()),
        )

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every block once, longest first: padding is least, and a batch that is too large fails at once."""
        order = np.argsort(-self.lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size])

    def prompts(self) -> list[Prompt]:
        """Each prompt once and uncut, in the order of the rows, with all its references; of the test split alone."""
        return self._prompts


def piece_positions(length: int, piece_starts: list[int]) -> np.ndarray:
    """Positions of a block's tokens, which start over at each piece: `(length,)`."""
    ends = [*piece_starts[1:], length]
    return np.concatenate(
        [np.arange(end - start, dtype=np.int32) for start, end in zip(piece_starts, ends, strict=True)]
    )


def tokenise(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """The token ids of each text, without special tokens."""
    # Not verbose: transformers would warn that a document is longer than the model reads.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def start_token(tokenizer: Any) -> int:
    """What stands before the first token of a document: without it that token could not be predicted."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


@dataclass(frozen=True)
class Example:
    """A prompt with its target, or a conversation. The first `num_start` tokens stay however much is truncated."""

    prompt: Prompt
    target: str
    token_ids: list[int]
    is_target: list[bool]
    num_start: int = 0


def fit_to_length(
    examples: Iterator[Example], rows: pd.Index, split: str, config: DatasetConfig, tokenizer: Any, notes: list[str]
) -> TokenBlocks:
    """The examples within `max_length`; a prompt loses its beginning, a target and a conversation their end."""
    blocks, counts, size = TokenBlocks(), Counter[str](), config.max_length
    for row, example in enumerate(examples):
        ids, mask = example.token_ids, example.is_target
        blocks.prompts.setdefault(example.prompt.text, example.prompt).references.append(example.target)
        if len(ids) > size:
            if config.too_long is TooLong.error:
                raise DataError(
                    f"dataset={config.name}, {split}: {place(rows, row)} has {len(ids)} tokens, "
                    f"dataset.max_length={size}; give a larger one, or dataset.too_long=truncate or drop."
                )
            if config.too_long is TooLong.drop:
                counts["dropped"] += 1
                continue
            ids, mask = _truncated(example, size, config.task)
            if any(mask):
                counts["truncated"] += 1
        if not any(mask):
            counts["dropped"] += 1
            continue
        blocks.add(ids, mask, _target_bytes(example, ids, mask, config, tokenizer))
    if counts:
        what = " and ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        notes.append(
            f"dataset={config.name}, {split}: of {counts.total() + len(blocks.token_ids) - counts['truncated']} rows "
            f"{what} at dataset.max_length={size} tokens (dataset.too_long={config.too_long})."
        )
    return blocks


def _truncated(example: Example, size: int, task: Task) -> tuple[list[int], list[bool]]:
    ids, mask = example.token_ids, example.is_target
    if task is Task.chat:
        return ids[:size], mask[:size]
    start, num_context = example.num_start, mask.index(True)
    # The target first, then of the context as much as there is room for: at least one token, with the start token.
    room = max(1, size - (len(ids) - num_context))
    first = num_context - min(num_context - start, room - start)
    return [*ids[:start], *ids[first:]][:size], [*mask[:start], *mask[first:]][:size]


def _target_bytes(example: Example, ids: list[int], mask: list[bool], config: DatasetConfig, tokenizer: Any) -> int:
    if config.task is Task.completion and len(ids) == len(example.token_ids):
        return len((example.prompt.lead + example.target).encode())
    targets = [token for token, wanted in zip(ids, mask, strict=True) if wanted]
    return len(tokenizer.decode(targets, skip_special_tokens=True).encode())
