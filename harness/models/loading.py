"""A base model with its weights: from a folder, an asset, the hub or a finished run, or drawn at random.

What the checkpoint lacks is an error, except what is meant to be fresh: the head.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from harness.config.schema import ModelConfig, Quantization
from harness.content.errors import ModelError
from harness.measure.device import is_out_of_memory
from harness.models.configs import (
    adapter_message,
    auto_class,
    configure,
    explain_loading_errors,
    first_few,
    is_hub,
    is_scratch,
    is_tiny,
    origin,
    quiet_transformers,
    read_config,
    revision_arguments,
    settings_to_restore,
    source_arguments,
    task_head,
)
from harness.models.dropout import use_own_dropout
from harness.models.quantization import quantization_arguments
from harness.placement.architectures import ARCHITECTURES


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


def load_model(
    config: ModelConfig,
    *,
    num_labels: int | None,
    pad_token_id: int,
    seed: int,
    keeps_head: bool = False,
    with_weights: bool = True,
) -> BaseModel:
    """The base model in `config.dtype` with a fresh head of `num_labels` outputs, drawn from `seed`.

    The head is the same for every method at a seed, also where the checkpoint holds one: runs start equal. With
    `num_labels` None, the language model as it is. With `keeps_head` the head is that of the checkpoint, which must
    have it. Without `with_weights` the whole model is drawn, and nothing of its source is read but the configuration.

    Raises:
        ModelError: a source that cannot be read, or a checkpoint that lacks a tensor of the base model.
    """
    model_config = read_config(config)
    own_settings = settings_to_restore(model_config, num_labels)
    configure(model_config, config, num_labels=num_labels, pad_token_id=pad_token_id)
    dtype = getattr(torch, config.dtype)
    torch.manual_seed(seed)
    with explain_loading_errors(config), quiet_transformers():
        if is_tiny(config) or is_scratch(config) or not with_weights:
            model = auto_class(num_labels).from_config(model_config, dtype=dtype, attn_implementation=config.attention)
            head, notes = task_head(model_config, num_labels), list[str]()
        else:
            model, head, notes = _load_weights(config, model_config, dtype, num_labels, None if keeps_head else seed)
    if num_labels is None:
        # Where padding is the end-of-text token, that token is read and learned like any other.
        model.get_input_embeddings().padding_idx = None
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # With it bitsandbytes repacks 4-bit weights at the first evaluation, and cannot train on them afterwards.
            module.support_avx512bf16_for_cpu = False
    odd = {module.p for module in model.modules() if isinstance(module, nn.Dropout)} - {config.dropout}
    if odd:
        named = [name for name, value in vars(model_config).items() if isinstance(value, float) and value in odd]
        raise ModelError(
            f"model.dropout={config.dropout}: {type(model).__name__} keeps dropout {sorted(odd)} under a name that "
            "harness/placement/architectures.py does not know; add it to dropout_fields of its record. What has that "
            f"value in its config.json: {', '.join(named) or 'nothing'}."
        )
    if config.dropout:
        with quiet_transformers():
            use_own_dropout(model)
    return BaseModel(model, head, notes, own_settings, *_resolvable_name(config))


def _resolvable_name(config: ModelConfig) -> tuple[str | None, str | None]:
    if is_tiny(config) or is_scratch(config):
        return None, None
    if is_hub(config):
        return config.hub_id, config.revision or "main"
    return str(Path(*source_arguments(config)).resolve()), None


def _load_weights(
    config: ModelConfig, model_config: PreTrainedConfig, dtype: torch.dtype, num_labels: int | None, seed: int | None
) -> tuple[PreTrainedModel, tuple[str, ...], list[str]]:
    """The model, its head and notes, as `BaseModel` has them; without a seed, the head is the checkpoint's."""
    head = task_head(model_config, num_labels)
    try:
        model, report = auto_class(num_labels).from_pretrained(
            *source_arguments(config),
            config=model_config,
            dtype=dtype,
            attn_implementation=config.attention,
            # Shapes are compared below: a head of another shape is no fault, it is drawn anew.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **revision_arguments(config),
            **quantization_arguments(config, model_config, head),
        )
    except SafetensorError as error:
        raise ModelError(f"model={config.name}: the tensor file of {origin(config)} is damaged ({error}).") from error
    except (pickle.UnpicklingError, EOFError, LookupError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelError(f"model={config.name}: the tensors of {origin(config)} cannot be read ({reason}).") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(adapter_message(f"model={config.name}", origin(config)))
    optional = _optional_modules(model, report["missing_keys"])
    if optional and config.quantization is not Quantization.none:
        raise ModelError(
            f"model.quantization={config.quantization}: {origin(config)} lacks {', '.join(optional)}, which is then "
            "trained with the head and cannot be quantised; set model.quantization=none."
        )
    fresh = (*optional, *head)
    _check_loaded(config, model_config, report, () if seed is None else fresh)
    if seed is None:
        return model, fresh, []
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
    where = f"model={config.name}: {origin(config)}"
    wrong = sorted(entry for entry in report["mismatched_keys"] if not _is_inside(entry[0], fresh))
    if wrong:
        shapes = [f"{name} is {tuple(found)}, config.json needs {tuple(needed)}" for name, found, needed in wrong]
        raise ModelError(f"{where}: tensors have other shapes than its config.json says: {first_few(shapes, '; ')}.")
    missing = sorted(name for name in report["missing_keys"] if not _is_inside(name, fresh))
    unexpected = sorted(report["unexpected_keys"])
    if missing:
        holds = f" It holds instead {first_few(unexpected)}." if unexpected else ""
        raise ModelError(
            f"{where} lacks tensors of the base model, which would be random: {first_few(missing)}.{holds} "
            f"{_likely_fix(missing, unexpected)}"
        )
    beyond = _beyond_the_blocks(model_config, unexpected)
    if beyond:
        raise ModelError(
            f"{where} holds blocks that its config.json does not count and that would be left out: "
            f"{first_few(beyond)}. Correct the number of layers in config.json."
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
    return (
        "Its config.json is of another architecture, the head of its record in harness/placement/architectures.py "
        "lacks a module, or a part of the checkpoint is missing."
    )


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
            f"{origin(config)} lacks {', '.join(optional)}: drawn from the seed, and trained, saved and counted with "
            "the head."
        )
    found = sorted(head_found)
    if found:
        notes.append(
            f"The head in {origin(config)} is replaced by a fresh one drawn from the seed: {first_few(found)}."
        )
    unexpected = sorted(report["unexpected_keys"])
    if unexpected:
        notes.append(f"{origin(config)} holds tensors that this model does not have: {first_few(unexpected)}.")
    return notes


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes the blocks keep their inputs alone and compute the rest again in the backward pass."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    # transformers makes the embeddings' output require a gradient, which the reentrant kind needs. Here it would only
    # send the backward pass through every block, also through those below the lowest one that is trained.
    model.disable_input_require_grads()
