"""Texts that a language model writes after prompts, by greedy or beam search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.config.schema import GenerationConfig
from harness.data.blocks import Prompt
from harness.processes.stopping import StopRequest
from harness.tasks.objective import evaluating


def generate(
    model: nn.Module,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    tokenizer: Any,
    *,
    stop: StopRequest | None = None,
    once: Callable[[str, Callable[[], list[str]]], list[str]] = lambda phase, compute: compute(),
) -> list[str]:
    """The text that the model writes after each prompt, by greedy or beam search, special tokens left out.

    A prompt that leaves no room for `max_new_tokens` in the model's context loses its beginning, but for the token with
    which every text begins.

    Args:
        model: a causal language model of transformers, possibly wrapped.
        prompts: what to continue.
        config: how.
        tokenizer: the model's.
        stop: checked between two tokens; raises `PreemptedError`.
        once: called with the name of a batch and what generates it; may know its texts from an earlier attempt.
    """
    stop = stop or StopRequest()
    bare = getattr(model, "module", model)
    device = next(bare.parameters()).device
    room = _room(bare, config)
    ends = _end_tokens(prompts, tokenizer)
    # Longest first: little padding, and a batch that is too large fails at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].token_ids))

    def stop_between_tokens(token_ids: Tensor, scores: object, **_: Any) -> Tensor:
        stop.check("generating")
        return torch.zeros(len(token_ids), dtype=torch.bool, device=token_ids.device)

    def write(chosen: Sequence[int]) -> list[str]:
        rows = [prompts[index].token_ids for index in chosen]
        if room is not None:
            rows = [_last_tokens(ids, room, start=tokenizer.bos_token_id) for ids in rows]
        width = max(map(len, rows))
        # On the left, so that every text continues where its row ends.
        token_ids = [[tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in rows]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]
        written = bare.generate(
            torch.tensor(token_ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=config.max_new_tokens,
            num_beams=config.num_beams,
            length_penalty=config.length_penalty if config.num_beams > 1 else None,
            no_repeat_ngram_size=config.no_repeat_ngram_size,
            # What a model recommends for sampling is in its files; a table needs the same text every time.
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
            use_cache=True,
            stopping_criteria=[stop_between_tokens],
        )
        texts = []
        for index, ids in zip(chosen, written[:, width:].tolist(), strict=True):
            if tokenizer.eos_token_id in ids:
                ids = ids[: ids.index(tokenizer.eos_token_id)]
            text = _text_before(prompts[index].stop, ids, tokenizer)
            texts.append(text.removeprefix(prompts[index].lead))
        return texts

    texts = [""] * len(prompts)
    with evaluating(bare):
        for start in range(0, len(order), config.batch_size):
            chosen = order[start : start + config.batch_size]
            for index, text in zip(chosen, once(f"generate from {start}", partial(write, chosen)), strict=True):
                texts[index] = text
    return texts


def num_truncated_prompts(model: nn.Module, prompts: Sequence[Prompt], config: GenerationConfig) -> int:
    """How many of the prompts from which `generate` is to write are too long for the model's context."""
    room = _room(getattr(model, "module", model), config)
    return 0 if room is None else sum(len(prompt.token_ids) > room for prompt in prompts[: config.num_examples])


def _room(model: Any, config: GenerationConfig) -> int | None:
    """How many tokens a prompt may have; None where the model's context has no end."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return None if positions is None else max(1, positions - config.max_new_tokens)


def _last_tokens(ids: list[int], num: int, *, start: int | None) -> list[int]:
    """At most `num` tokens: the first one where it is the start token, and the last ones."""
    if len(ids) <= num or ids[0] != start:
        return ids[-num:]
    return [ids[0], *ids[len(ids) - num + 1 :]]


def _text_before(stop: str, token_ids: list[int], tokenizer: Any) -> str:
    """The text up to what ends an answer, which may be a special token and then has no text."""
    if stop and stop in tokenizer.decode(token_ids, skip_special_tokens=False):
        lengths = range(1, len(token_ids) + 1)
        until = next(n for n in lengths if stop in tokenizer.decode(token_ids[:n], skip_special_tokens=False))
        token_ids = token_ids[:until]
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    return text.partition(stop)[0] if stop else text


def _end_tokens(prompts: Sequence[Prompt], tokenizer: Any) -> list[int]:
    """The tokens after which a text has ended: the tokenizer's own, and what the chat template ends a turn with."""
    stops = [
        tokenizer(stop, add_special_tokens=False)["input_ids"] for stop in {prompt.stop for prompt in prompts} if stop
    ]
    return [tokenizer.eos_token_id, *(ids[0] for ids in stops if len(ids) == 1)]
