"""The model's tokenizer, and whether the model embeds every token that it gives."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from harness.config.schema import ModelConfig
from harness.content.errors import ModelError
from harness.models.configs import (
    explain_loading_errors,
    first_few,
    is_scratch,
    is_tiny,
    origin,
    revision_arguments,
    source_arguments,
)
from harness.models.scratch import scratch_tokenizer
from harness.models.tiny import byte_tokenizer


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right, with a pad token. Raises `ModelError`."""
    if is_tiny(config):
        return byte_tokenizer()
    if is_scratch(config):
        return scratch_tokenizer(config)
    with explain_loading_errors(config):
        tokenizer = AutoTokenizer.from_pretrained(*source_arguments(config), **revision_arguments(config))
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # What transformers makes of a folder without tokenizer files: every text becomes unknown tokens.
        raise ModelError(
            f"model={config.name}: {origin(config)} has no tokenizer (tokenizer.json, vocab.txt or the like); copy its "
            "files beside the model's."
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        # GPT-2 and Llama have none. Padding is masked out, so any token will do.
        if tokenizer.eos_token is None:
            raise ModelError(
                f"model={config.name}: the tokenizer of {origin(config)} has neither a pad token nor an end-of-text "
                "token; name one in its tokenizer_config.json (pad_token)."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_ends(config: ModelConfig, model: PreTrainedModel, used: Iterable[Tensor]) -> None:
    """Raises `ModelError` when an encoder-decoder would not know where the texts in `used` (token ids) end.

    Its classifier reads the answer at the last end-of-text token and wants as many of them in each example.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        return
    end = model.config.eos_token_id
    counts = sorted({count for ids in used for count in (ids == end).sum(1).tolist()})
    if len(counts) > 1 or counts == [0]:
        raise ModelError(
            f"model={config.name}: its classifier reads the answer at the end-of-text token (id {end}) and wants as "
            f"many in each example, at least one; here are {' or '.join(map(str, counts[:4]))}. Use the model's own "
            "tokenizer, which adds it, and leave it out of the texts."
        )


def check_vocabulary(
    config: ModelConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, used: Iterable[Tensor] = ()
) -> None:
    """Raises `ModelError` when the tokenizer gives ids for which the model has no embedding.

    Special tokens that no text in `used` (token ids) contains are let through: Gemma's tokenizer has one for images,
    which its language models do not embed.
    """
    rows = model.get_input_embeddings().num_embeddings
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= rows}
    if not beyond:
        return
    special = tokenizer.added_tokens_decoder
    unused = {index for index in beyond if index in special and special[index].special} - {
        getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos", "unk", "cls", "sep", "mask")
    }
    named = {index: token for index, token in beyond.items() if index not in unused}
    for ids in used if unused else ():
        named |= {index: beyond.get(index, "?") for index in ids[ids >= rows].unique().tolist()}
    if named:
        shown = first_few([f"{token!r} is {index}" for index, token in sorted(named.items())])
        raise ModelError(
            f"model={config.name}: the tokenizer of {origin(config)} gives ids up to {max(named)}, and the model "
            f"embeds 0 to {rows - 1}: {shown}. Call "
            "model.resize_token_embeddings(len(tokenizer)) and save model and tokenizer again, or remove the tokens."
        )
