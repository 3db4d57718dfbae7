"""Where a base model comes from, and its configuration as transformers has it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from harness.config.schema import ModelConfig
from harness.content.assets import cache_dir, verified_asset_dir
from harness.content.errors import ModelError
from harness.content.hub import is_offline
from harness.models.scratch import scratch_config
from harness.models.tiny import tiny_config
from harness.placement.architectures import ARCHITECTURES, DROPOUT_FIELDS, head_modules


def auto_class(num_labels: int | None) -> Any:
    """The Auto class for a language model (None), or for a head of so many outputs."""
    return AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification


def first_few(items: Sequence[str], between: str = ", ") -> str:
    """At most four items, and how many there are."""
    return between.join(items[:4]) + (f"{between}... ({len(items)} in all)" if len(items) > 4 else "")


def adapter_message(setting: str, where: str) -> str:
    """Why a folder with an adapter is no base model, and what to do."""
    return (
        f"{setting}: {where} holds an adapter, not a model. Name its base model, or merge the adapter into it with "
        "peft (merge_and_unload) and save the result."
    )


def max_tokens(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest input that the model can read, in tokens. Raises `ModelError`."""
    model_config = load_model_config(config, num_labels=2, pad_token_id=0)
    # A tokenizer that does not know says 10^30; RoBERTa's configuration counts two positions that cannot be used.
    limits = (tokenizer.model_max_length, getattr(model_config, "max_position_embeddings", None))
    return min(int(limit) for limit in limits if limit is not None)


def build_skeleton(config: ModelConfig, *, num_labels: int | None) -> PreTrainedModel:
    """The model on the meta device: names and shapes, nothing allocated, nothing read but its configuration."""
    model_config = load_model_config(config, num_labels=num_labels, pad_token_id=0)
    with explain_loading_errors(config), torch.device("meta"):
        return auto_class(num_labels).from_config(model_config, attn_implementation=config.attention)


def task_head(model_config: PreTrainedConfig, num_labels: int | None) -> tuple[str, ...]:
    """The modules of the task head of a model that has so many outputs; a language model (None) has no task head."""
    if num_labels is None or model_config.model_type in ARCHITECTURES:
        return () if num_labels is None else head_modules(model_config.model_type)
    with torch.device("meta"):
        return head_of(auto_class(num_labels).from_config(model_config), language_model=False)


def head_of(model: nn.Module, *, language_model: bool) -> tuple[str, ...]:
    """The modules of a model's task head: of a type that is not described, all outside transformers' base model."""
    own = cast(PreTrainedModel, model)
    if language_model:
        return ()
    if own.config.model_type in ARCHITECTURES:
        return head_modules(own.config.model_type)
    return tuple(
        name
        for name, child in own.named_children()
        if name != own.base_model_prefix and next(child.parameters(), None) is not None
    )


def load_model_config(config: ModelConfig, *, num_labels: int | None, pad_token_id: int) -> PreTrainedConfig:
    """The base model's configuration as transformers has it, with our dropout and head. Raises `ModelError`."""
    model_config = read_config(config)
    configure(model_config, config, num_labels=num_labels, pad_token_id=pad_token_id)
    return model_config


def read_config(config: ModelConfig) -> PreTrainedConfig:
    """The base model's configuration as its source has it. Raises `ModelError`."""
    with explain_loading_errors(config):
        if is_tiny(config):
            return tiny_config(config.tiny)
        if is_scratch(config):
            assert config.scratch is not None
            return scratch_config(config.scratch)
        return AutoConfig.from_pretrained(*source_arguments(config), **revision_arguments(config))


def write_config(folder: Path, values: Mapping[str, Any], *, named: str) -> None:
    """Writes the config.json of a model of random weights: `model_type`, and what is not transformers' default.

    Raises `ModelError`, in whose message the values are called `named`.
    """
    own = dict(values)
    model_type = str(own.pop("model_type"))
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError as error:
        described = ", ".join(ARCHITECTURES)
        raise ModelError(f"{named}: model_type: transformers has no {model_type!r}; it has {described} ...") from error
    unknown = [key for key in own if not hasattr(known, key)]
    if unknown:
        raise ModelError(f"{named}: {', '.join(unknown)}: a config.json of {model_type} has no such key.")
    try:
        AutoConfig.for_model(model_type, **own).save_pretrained(folder)
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{named}: transformers makes no configuration of these values: {reason}") from error


def _dropout_fields(model_config: PreTrainedConfig) -> tuple[str, ...]:
    known = ARCHITECTURES.get(model_config.model_type)
    return DROPOUT_FIELDS if known is None else (*DROPOUT_FIELDS, *known.dropout_fields)


def settings_to_restore(model_config: PreTrainedConfig, num_labels: int | None) -> dict[str, Any]:
    """The values of the base's configuration in whose place `configure` puts those of training."""
    # A classifier reads its answer before the padding: without our pad token it would not give the same logits.
    names = (*_dropout_fields(model_config), "use_cache", *(("pad_token_id",) if num_labels is None else ()))
    return {name: getattr(model_config, name) for name in names if hasattr(model_config, name)}


def configure(
    model_config: PreTrainedConfig, config: ModelConfig, *, num_labels: int | None, pad_token_id: int
) -> None:
    """Sets dropout, head and pad token for training, in place. Raises `ModelError`."""
    for name in _dropout_fields(model_config):
        if hasattr(model_config, name):
            setattr(model_config, name, config.dropout)
    if num_labels is None:
        # transformers would build a decoder out of BERT that sees every token, the next one included.
        known = ARCHITECTURES.get(model_config.model_type)
        if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (known is not None and known.unembedding is None):
            other = (
                "an encoder-decoder, and to train it from a text to a text is no task here"
                if getattr(model_config, "is_encoder_decoder", False)
                else "no language model that predicts the next token"
            )
            raise ModelError(
                f"model={config.name}: {model_config.model_type} is {other}; choose a language model (model=gpt2, "
                "llama3_2_1b, newsgpt_scratch, ...), or a dataset with labels."
            )
    else:
        model_config.num_labels = num_labels
        if getattr(model_config, "is_encoder_decoder", False):
            # The decoder of T5 begins with the pad token; not every config.json says so.
            first = getattr(model_config, "decoder_start_token_id", None)
            model_config.decoder_start_token_id = pad_token_id if first is None else first
    model_config.pad_token_id = pad_token_id
    model_config.use_cache = False  # a cache of keys and values is for generation


def is_tiny(config: ModelConfig) -> bool:
    """Whether the base is one of the tests' small random models."""
    return config.tiny is not None and config.path is None


def is_scratch(config: ModelConfig) -> bool:
    """Whether the base is a random model to be pretrained here."""
    return config.scratch is not None and config.path is None


def is_hub(config: ModelConfig) -> bool:
    """Whether the base comes from the hub."""
    return config.hub_id is not None and config.path is None


def source_arguments(config: ModelConfig) -> tuple[str]:
    """What `from_pretrained` is given first: a folder or a hub id. Raises `ModelError`."""
    if config.path is not None:
        folder = Path(config.path).expanduser()
        if (folder / "adapter_config.json").is_file():
            raise ModelError(adapter_message(f"model.path={config.path}", str(folder)))
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model.path={config.path}: no config.json there. Give a folder that `save_pretrained` wrote: "
                "config.json, model.safetensors, tokenizer files."
            )
        return (str(folder),)
    if config.asset is not None:
        return (str(verified_asset_dir(config.asset, cache_dir())),)
    assert config.hub_id is not None
    is_offline()  # and if so, transformers uses what is cached
    return (config.hub_id,)


def revision_arguments(config: ModelConfig) -> dict[str, Any]:
    """Which revision `from_pretrained` takes; for a folder, that it asks no server."""
    return {"revision": config.revision or "main"} if is_hub(config) else {"local_files_only": True}


@contextlib.contextmanager
def explain_loading_errors(config: ModelConfig) -> Iterator[None]:
    """Turns what transformers raises while it loads into a `ModelError` that names the fix."""
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
            f"model={config.name}: {origin(config)} could not be loaded with attention={config.attention}. {reason}."
            f"{' ' + way_out if is_hub(config) else ''}"
        ) from error


def origin(config: ModelConfig) -> str:
    """Where the base comes from, for messages."""
    return str(config.path or config.asset or config.hub_id or config.tiny or config.run or config.name)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' loading report and progress bars."""
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
