"""Small random models and a tokenizer of bytes, which need no download: what tests run on."""

from __future__ import annotations

import tokenizers
from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from harness.config.schema import TinyModel

_TINY_SIZES = {"vocab_size": 260, "max_position_embeddings": 128}
_TINY_TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def tiny_config(tiny: TinyModel | None) -> PreTrainedConfig:
    """Two blocks of width 64, of the architecture that `tiny` names."""
    match tiny:
        case TinyModel.bert:
            return BertConfig(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=128,
                **_TINY_SIZES,
                **_TINY_TOKENS,
            )
        case TinyModel.gpt2:
            return GPT2Config(
                n_embd=64, n_layer=2, n_head=4, n_inner=128, vocab_size=260, n_positions=128, **_TINY_TOKENS
            )
        case TinyModel.llama:
            return LlamaConfig(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=128,
                **_TINY_SIZES,
                **_TINY_TOKENS,
            )
        case None:
            raise AssertionError("not a tiny model")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: no vocabulary to download. `[CLS] a [SEP]` and `[CLS] a [SEP] b [SEP]` as BERT has them."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        padding_side="right",
        model_max_length=_TINY_SIZES["max_position_embeddings"],
    )
