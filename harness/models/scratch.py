"""A small Llama to be pretrained here, and its byte-level BPE learned from text."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from harness.config.schema import ModelConfig, ScratchConfig
from harness.content.assets import cache_dir, verified_asset_dir
from harness.content.digests import file_digest
from harness.content.errors import ModelError
from harness.content.files import vocabulary_file
from harness.data.sources import digest, read_column
from harness.processes.preparation import once
from harness.results.files import write_atomically

_PAD, _END = "<|pad|>", "<|endoftext|>"


def scratch_config(scratch: ScratchConfig) -> PreTrainedConfig:
    """A small Llama of the given sizes."""
    return LlamaConfig(
        vocab_size=scratch.vocab_size,
        max_position_embeddings=scratch.max_tokens,
        hidden_size=scratch.width,
        # Three matrices of this size have the parameters of the two of a plain MLP of four times the width.
        intermediate_size=scratch.width * 8 // 3,
        num_hidden_layers=scratch.num_blocks,
        num_attention_heads=scratch.num_heads,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )


def scratch_tokenizer(config: ModelConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE, learned once and kept in the cache folder. Raises `ModelError`."""
    assert config.scratch is not None
    path = _learned_bpe(config.name, config.scratch)
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        pad_token=_PAD,
        bos_token=_END,
        eos_token=_END,
        unk_token=_END,
        padding_side="right",
        model_max_length=config.scratch.max_tokens,
    )


def _learned_bpe(name: str, scratch: ScratchConfig) -> Path:
    if scratch.path is not None:
        folder = Path(scratch.path).expanduser()
    else:
        assert scratch.asset is not None
        folder = verified_asset_dir(scratch.asset, cache_dir())
    source = vocabulary_file(folder, scratch.file)
    key = digest(file_digest(source), scratch.column, str(scratch.vocab_size))[:16]
    path = cache_dir() / "tokenizers" / f"{name}-{key}.json"
    if not path.is_file():
        once(lambda: _learn_bpe(source, scratch, path))
    return path


def _learn_bpe(source: Path, scratch: ScratchConfig, path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=scratch.vocab_size,
        special_tokens=[_PAD, _END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = read_column(source, scratch.column)
    backend.train_from_iterator(texts, trainer, length=len(texts))
    if backend.get_vocab_size() != scratch.vocab_size:
        raise ModelError(
            f"model.scratch.vocab_size={scratch.vocab_size}: the text of {scratch.file} gives only "
            f"{backend.get_vocab_size()} tokens; set that or fewer."
        )
    write_atomically(path, backend.to_str().encode())
