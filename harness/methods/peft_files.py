"""Adapters in PEFT's file format: what `peft` writes is read here, and what is written here `peft` loads."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.config.schema import AlphaPolicy, RankConfig
from harness.methods.counts import is_head
from harness.methods.lora import (
    REPLACED,
    LoRAError,
    LoRALayer,
    apply_lora,
    check_rank,
    lora_layers,
    remove_lora,
    replace_module,
    replaced_modules,
)
from harness.processes.distributed import full_tensor
from harness.results.files import write_json_atomically

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
_OLDER_ADAPTER_FILE = "adapter_model.bin"
_PEFT_PREFIX = "base_model.model."


def save_adapter(
    model: nn.Module,
    directory: Path,
    *,
    rank: RankConfig,
    head_modules: Sequence[str],
    dropout: float = 0.0,
    base_model: str | None = None,
    revision: str | None = None,
    task_type: str = "SEQ_CLS",
) -> int:
    """Writes adapter and head in PEFT's file format and returns the bytes of the tensor file.

    `peft.PeftModel.from_pretrained(base, directory)` loads it. Raises `LoRAError` when the model has no adapter.
    """
    tensors: dict[str, Tensor] = {}
    transposed = False
    for name, layer in lora_layers(model):
        tensors[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = layer.lora_B
        transposed = transposed or not isinstance(layer.base, nn.Linear)
    if not tensors:
        raise LoRAError("the model has no LoRA layers to save.")
    target_modules = [name for name, _ in lora_layers(model)]
    # Beside the head, what an adapter loaded before brought along.
    saved_modules = [
        *head_modules,
        *(name for name in replaced_modules(model) if not is_head(f"{name}.", head_modules)),
    ]
    for name, tensor in head_state(model, saved_modules).items():
        tensors[_PEFT_PREFIX + name] = tensor
    alpha = rank.effective_alpha
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": rank.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": rank.alpha_policy is AlphaPolicy.rslora,
        "lora_dropout": dropout,
        "target_modules": target_modules,
        "modules_to_save": saved_modules,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "inference_mode": True,
    }
    write_json_atomically(directory / ADAPTER_CONFIG_FILE, config)
    return save_tensors(tensors, directory / ADAPTER_FILE)


def head_state(model: nn.Module, head_modules: Sequence[str]) -> dict[str, Tensor]:
    """Parameters of the task head by name."""
    return {name: value for name, value in model.named_parameters() if is_head(name, head_modules)}


def save_tensors(tensors: dict[str, Tensor], path: Path) -> int:
    """Writes tensors as safetensors, atomically, and returns the bytes written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    save_file({name: full_tensor(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)
    return path.stat().st_size


# Settings of a PEFT file under which its tensors do not mean `scaling * B @ A` on top of this base model, with the
# values that do. null means the default everywhere.
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    # The others (pissa, olora, corda, ...) change the base weight, too.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "ensure_weight_tying": (False,),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication"), (None,)),
    **dict.fromkeys(("monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora"), (None,)),
}
# Settings that are read here, and those that only say how the adapter was trained or found its targets.
_READ = {"peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save"}
_WITHOUT_EFFECT = {
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size"),
}


def load_adapter(model: nn.Module, directory: Path) -> list[str]:
    """Loads an adapter written by us or by `peft`, in place of any adapter that the model has.

    Modules that the adapter holds whole (the head, PEFT's `modules_to_save`) take the place of the model's until
    `remove_lora`; a tied weight among them is untied, as `peft` does it. Returns the names of the adapted modules.

    Raises:
        LoRAError: with the model as it was, when a file is missing, uses a variant that this layer does not compute, or
            does not fit the model.
    """
    config_path = directory / ADAPTER_CONFIG_FILE
    config = _read_adapter_config(config_path)
    rank = RankConfig(
        rank=config["r"],
        alpha_policy=AlphaPolicy.rslora if config.get("use_rslora") else AlphaPolicy.fixed,
        alpha=config["lora_alpha"],
    )
    path, tensors = _read_adapter_tensors(directory)
    parts = (".lora_A.weight", ".lora_B.weight")
    target_modules = sorted({name.rpartition(".lora_")[0] for name in tensors if name.endswith(parts)})
    if not target_modules:
        raise LoRAError(f"{path} holds no LoRA tensors.")
    _check_complete(model, config, target_modules, path)
    whole_modules = _check_fits(model, target_modules, tensors, rank=rank, config=config, path=path)

    remove_lora(model)
    ordered = [name for name, _ in model.named_modules() if name in target_modules]
    apply_lora(model, ordered, rank=rank, dropout=config.get("lora_dropout") or 0.0)
    with torch.no_grad():
        for name, layer in lora_layers(model):
            layer.lora_A.copy_(tensors[f"{name}.lora_A.weight"])
            layer.lora_B.copy_(tensors[f"{name}.lora_B.weight"])
    originals = {name: model.get_submodule(name) for name in whole_modules}
    model.__dict__[REPLACED] = originals
    for name, original in originals.items():
        own = copy.deepcopy(original)
        for leaf, parameter in list(own.named_parameters(recurse=False)):
            value = tensors.get(f"{name}.{leaf}")
            if value is not None:
                # In float32, in which it was trained, whatever the base is held in; see `set_trainable`.
                value = value.to(parameter.device, torch.float32, copy=True)
                setattr(own, leaf, nn.Parameter(value, requires_grad=parameter.requires_grad))
        replace_module(model, name, own)
    return ordered


def _read_adapter_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise LoRAError(f"{path.parent} holds no {path.name}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoRAError(f"{path} is not readable as JSON ({error}).") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise LoRAError(f"{path}: peft_type={kind!r}, this loads LORA.")
    for name, value in config.items():
        if name in _SUPPORTED:
            if value is not None and value not in _SUPPORTED[name]:
                allowed = ", ".join(map(repr, _SUPPORTED[name]))
                raise LoRAError(f"{path}: {name}={value!r} is not supported, only {allowed}.")
        elif name not in _READ | _WITHOUT_EFFECT and value:
            raise LoRAError(
                f"{path}: {name}={value!r} is a setting that is not known here; it may change what the tensors mean."
            )
    for name in ("r", "lora_alpha"):
        if config.get(name) is None:
            raise LoRAError(f"{path}: {name} is missing.")
    return config


def _read_adapter_tensors(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    """The tensors under the names that the base model has for their modules, and the file that they come from."""
    path = directory / ADAPTER_FILE
    if not path.is_file() and (directory / _OLDER_ADAPTER_FILE).is_file():
        path = directory / _OLDER_ADAPTER_FILE
    if not path.is_file():
        raise LoRAError(f"{directory} holds no {ADAPTER_FILE}.")
    try:
        loaded = load_file(path) if path.name == ADAPTER_FILE else torch.load(path, map_location="cpu")
    except SafetensorError as error:
        raise LoRAError(f"{path} is not readable as safetensors ({error}).") from error
    except (pickle.UnpicklingError, EOFError, LookupError, OSError, RuntimeError) as error:
        raise LoRAError(f"{path} is not readable as tensors ({error}).") from error
    tensors: dict[str, Tensor] = {}
    for name, value in loaded.items():
        if ".original_module." in name:  # what a module to save was before training
            continue
        # Older files name the adapter, `default`, and the wrapper of a saved module.
        plain = re.sub(r"\.(lora_[AB]|modules_to_save)\.default\.", r".\1.", name.removeprefix(_PEFT_PREFIX))
        plain = plain.replace(".modules_to_save.", ".")
        if plain in tensors:
            raise LoRAError(f"{path} holds {plain} twice, of several adapters; save one of them alone.")
        tensors[plain] = value
    return path, tensors


def _check_complete(model: nn.Module, config: dict[str, Any], target_modules: Sequence[str], path: Path) -> None:
    """Raises `LoRAError` when the file lacks a module that its config names; `peft` would leave it without update."""
    targets = config.get("target_modules")
    picky = any(config.get(name) for name in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    if picky or targets == "all-linear" or not targets:
        return
    layers = dict(lora_layers(model))
    saved = _saved_modules(config)
    absent = []
    for name, module in model.named_modules():
        matches = (
            re.fullmatch(targets, name) is not None
            if isinstance(targets, str)
            else any(name == target or name.endswith(f".{target}") for target in targets)
        )
        can_be_adapted = name in layers or isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if matches and can_be_adapted and name not in target_modules and not _is_saved(name, saved):
            absent.append(name)
    if absent:
        raise LoRAError(
            f"{path} holds no tensors of {', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}, which "
            "target_modules names; the file is not complete, or belongs to another model."
        )


def _saved_modules(config: dict[str, Any]) -> set[str]:
    saved = set(config.get("modules_to_save") or ())
    # `peft` adds these by itself.
    return saved | {"classifier", "score"} if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else saved


def _is_saved(module_name: str, saved: Iterable[str]) -> bool:
    """Whether a module is one of PEFT's `modules_to_save`, which name the end of a path, or lies inside one."""
    return any(f".{module}." in f".{module_name}." for module in saved)


def _base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters under the names of the base model, whatever is adapted, merged or replaced at present."""
    layers = dict(lora_layers(model))
    inside = tuple(f"{name}." for name in layers)
    named = model.named_parameters(remove_duplicate=False)  # a tied weight has two names
    found: dict[str, Tensor] = {name: value for name, value in named if not name.startswith(inside)}
    for name, layer in layers.items():
        found |= {f"{name}.{leaf}": value for leaf, value in layer.base_parameters()}
    for name, module in replaced_modules(model).items():
        found |= {f"{name}.{leaf}": value for leaf, value in module.named_parameters()}
    return found


def _check_fits(
    model: nn.Module,
    target_modules: Sequence[str],
    tensors: dict[str, Tensor],
    *,
    rank: RankConfig,
    config: dict[str, Any],
    path: Path,
) -> list[str]:
    """The modules that the adapter holds whole. Raises `LoRAError` when a tensor does not fit."""
    bases = {name: module.base if isinstance(module, LoRALayer) else module for name, module in model.named_modules()}
    parameters = _base_parameters(model)
    expected: dict[str, tuple[int, ...] | None] = {}
    for name in target_modules:
        if name not in bases:
            raise LoRAError(f"{path}: the model has no module {name}.")
        try:
            in_features, out_features = check_rank(bases[name], rank.rank)
        except LoRAError as error:
            raise LoRAError(f"{path}: {name}: {error}") from None
        expected[f"{name}.lora_A.weight"] = (rank.rank, in_features)
        expected[f"{name}.lora_B.weight"] = (out_features, rank.rank)
    whole_modules, of_the_base = [], {}
    for name in sorted(tensors.keys() - expected.keys()):
        module, _, leaf = name.rpartition(".")
        if leaf in ("lora_embedding_A", "lora_embedding_B"):
            raise LoRAError(f"{path}: {module}: LoRA adapts nn.Linear and Conv1D, not Embedding.")
        # `peft` saves the base weight of an adapted unembedding, and embeddings of another size, beside the adapter.
        own_name = name.replace(".base_layer.", ".") if module.removesuffix(".base_layer") in target_modules else name
        known = parameters.get(own_name)
        expected[name] = None if known is None else tuple(known.shape)
        if own_name == name and known is not None and _is_saved(module, _saved_modules(config)):
            whole_modules.append(module)
        elif known is not None:
            of_the_base[name] = known
    wrong = [
        f"{name} is {tuple(tensors[name].shape) if name in tensors else 'absent'}, the model needs {shape or 'none'}"
        for name, shape in expected.items()
        if name not in tensors or tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise LoRAError(f"{path} does not fit the model: {'; '.join(wrong[:5])}.")
    both = sorted(set(whole_modules) & set(target_modules))
    if both:
        raise LoRAError(f"{path}: {', '.join(both)} is adapted and saved whole at once, which is not supported.")
    for name, known in sorted(of_the_base.items()):
        if not torch.equal(known.detach().cpu().to(tensors[name].dtype), tensors[name]):
            raise LoRAError(
                f"{path}: {name} differs from the model's: the adapter belongs to another base model, or to one whose "
                "embeddings were trained. Load it on the base model that it was trained on."
            )
    return sorted(set(whole_modules))
