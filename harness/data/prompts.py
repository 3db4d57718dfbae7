"""Prompts and targets: the text of a template, and the tokens of both."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Any

import pandas as pd

from harness.config.schema import DatasetConfig
from harness.content.errors import DataError
from harness.data.blocks import Example, Prompt, start_token, tokenise


def template_columns(config: DatasetConfig) -> list[str]:
    """The columns that a prompt template names. Raises `DataError`."""
    assert config.prompt_template is not None
    try:
        return [name for _, name, _, _ in string.Formatter().parse(config.prompt_template) if name is not None]
    except ValueError as error:
        raise DataError(f"dataset.prompt_template={config.prompt_template!r}: {error}; braces name columns.") from error


def prompt_text(row: dict[Any, Any], config: DatasetConfig) -> str:
    """The prompt of a row. Raises `DataError`."""
    assert config.prompt_template is not None
    try:
        return config.prompt_template.format_map(row)
    except (ValueError, KeyError, AttributeError, IndexError) as error:
        raise DataError(
            f"dataset.prompt_template={config.prompt_template!r}: {error}; braces hold names of columns alone."
        ) from error


def encode_completions(
    table: pd.DataFrame, split: str, config: DatasetConfig, tokenizer: Any, notes: list[str]
) -> Iterator[Example]:
    """The tokens of each prompt with its target, the target's as targets."""
    prompts = [prompt_text(row, config) for row in table.to_dict("records")]
    targets = table[config.target_column].tolist()
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    kept = [prompt.rstrip(" ") for prompt in prompts] if _joins_spaces(tokenizer) else prompts
    leads = [prompt[len(text) :] for prompt, text in zip(prompts, kept, strict=True)]
    num_moved = sum(lead != "" for lead in leads)
    if num_moved:
        notes.append(
            f"dataset={config.name}, {split}: {num_moved} of {len(prompts)} prompts end in a space, which this "
            "tokenizer joins with the word after it; it is tokenised with the target."
        )
    ends = [lead + target for lead, target in zip(leads, targets, strict=True)]
    joined = tokenise([text + end for text, end in zip(kept, ends, strict=True)], tokenizer)
    encoded = zip(tokenise(kept, tokenizer), tokenise(ends, tokenizer), joined, strict=True)
    for row, (prompt_ids, target_ids, joined_ids) in enumerate(encoded):
        if joined_ids[: len(prompt_ids)] == prompt_ids:
            target_ids = joined_ids[len(prompt_ids) :]
        # The first token has nothing before it from which it could be predicted.
        context = [*start, *prompt_ids] or [start_token(tokenizer)]
        ids = [*context, *target_ids, tokenizer.eos_token_id]
        is_target = [False] * len(context) + [True] * (len(ids) - len(context))
        prompt = Prompt(prompts[row], context, [], lead=leads[row])
        yield Example(prompt, targets[row], ids, is_target, num_start=len(start))


def _joins_spaces(tokenizer: Any) -> bool:
    """Whether a space and the word after it can be one token; GPT-2 and SentencePiece have a sign for that space."""
    return any(len(token) > 1 and token[0] in "Ġ▁ " for token in tokenizer.get_vocab())
