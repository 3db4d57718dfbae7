"""Adapters in PEFT's file format: what `peft` writes is read here, and what is written here `peft` loads."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.config.schema import AlphaPolicy, Bias, RankConfig, VariantConfig
from harness.methods.adapting import (
    REPLACED,
    apply_lora,
    lora_layers,
    original_parameters,
    remove_lora,
    replace_biases,
    replace_module,
    replaced_modules,
    trained_biases,
)
from harness.methods.counts import is_bias, is_head
from harness.methods.lora import (
    AdaptedLayer,
    EmbeddingLoRALayer,
    LoRAError,
    SlicedLoRALayer,
    can_be_adapted,
    features_of,
    put_rows,
    take_rows,
)
from harness.placement.architectures import Rows
from harness.placement.select import Target
from harness.processes.distributed import full_tensor
from harness.results.files import write_json_atomically

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
# Ours, beside PEFT's files: which rows of a module are which role's, where its update is that of several.
PARTS_FILE = "adapter_parts.json"
_OLDER_ADAPTER_FILE = "adapter_model.bin"
_PEFT_PREFIX = "base_model.model."
_PEFT_MAGNITUDE = "lora_magnitude_vector.weight"
_FACTOR = re.compile(r"\.lora_(embedding_)?[AB](\.weight)?$")


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
    layers = dict(lora_layers(model))
    if not layers:
        raise LoRAError("the model has no LoRA layers to save.")
    saved_modules = _modules_saved_whole(model, head_modules)
    tensors, scalings = _tensors_to_save(model, saved_modules)
    biases = _biases_to_save(model, saved_modules)
    use_rslora = rank.alpha_policy is AlphaPolicy.rslora
    shapes = {name: (r, _alpha(r, scaling, use_rslora=use_rslora)) for name, (r, scaling) in scalings.items()}
    (most_have_rank, most_have_alpha), _ = Counter(shapes.values()).most_common(1)[0]
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": most_have_rank,
        "lora_alpha": most_have_alpha,
        "rank_pattern": {name: r for name, (r, _) in shapes.items() if r != most_have_rank},
        "alpha_pattern": {name: alpha for name, (_, alpha) in shapes.items() if alpha != most_have_alpha},
        "use_rslora": use_rslora,
        "use_dora": any(leaf.endswith(f".{_PEFT_MAGNITUDE}") for leaf in tensors),
        "lora_dropout": dropout,
        "target_modules": [*layers],
        "modules_to_save": saved_modules,
        "fan_in_fan_out": any(type(layer.base).__name__ == "Conv1D" for layer in layers.values()),
        "bias": _bias_of(biases, layers),
        "inference_mode": True,
    }
    write_json_atomically(directory / ADAPTER_CONFIG_FILE, config)
    parts = {name: _parts_of(layer) for name, layer in layers.items() if isinstance(layer, SlicedLoRALayer)}
    if parts:
        write_json_atomically(directory / PARTS_FILE, parts)
    return save_tensors(tensors, directory / ADAPTER_FILE)


def adapter_bytes(model: nn.Module, head_modules: Sequence[str]) -> int:
    """Bytes of the tensors that `save_adapter` writes, from shapes; the header of the file is not in it."""
    tensors, _ = _tensors_to_save(model, _modules_saved_whole(model, head_modules))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _modules_saved_whole(model: nn.Module, head_modules: Sequence[str]) -> list[str]:
    """The head, and what an adapter loaded before brought along."""
    others = (name for name in replaced_modules(model) if not is_head(f"{name}.", head_modules))
    return [*head_modules, *others]


def _biases_to_save(model: nn.Module, saved_modules: Sequence[str]) -> dict[str, nn.Parameter]:
    return {name: value for name, value in _own_biases(model).items() if not is_head(name, saved_modules)}


def _tensors_to_save(
    model: nn.Module, saved_modules: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, float]]]:
    """What the file holds, by its names there; and rank and scaling of each adapted module."""
    layers = dict(lora_layers(model))
    tensors: dict[str, Tensor] = {}
    scalings: dict[str, tuple[int, float]] = {}
    for name, layer in layers.items():
        named, scalings[name] = _tensors_of(layer)
        tensors |= {f"{_PEFT_PREFIX}{name}.{leaf}": value for leaf, value in named.items()}
    for name, tensor in head_state(model, saved_modules).items():
        tensors[_PEFT_PREFIX + name] = tensor
    for name, tensor in _biases_to_save(model, saved_modules).items():
        module, _, leaf = name.rpartition(".")
        tensors[f"{_PEFT_PREFIX}{module}.{'base_layer.' if module in layers else ''}{leaf}"] = tensor
    return tensors, scalings


def _tensors_of(layer: AdaptedLayer) -> tuple[dict[str, Tensor], tuple[int, float]]:
    """The tensors of a layer by PEFT's names, as one update of the whole module; its rank and scaling.

    An update of some rows is that of all rows with zeros in the others; one that starts from the weight (PiSSA) is the
    one of twice the rank that leads from the base weight to where training has come.
    """
    low, high, scaling = layer.factors()
    kind = "_embedding" if isinstance(layer, EmbeddingLoRALayer) else ""
    leaf = "" if kind else ".weight"
    tensors = {f"lora{kind}_A{leaf}": low, f"lora{kind}_B{leaf}": high}
    if layer.row_squares is not None:
        lengths = layer.row_squares.sqrt()
        for update in layer.updates().values():
            assert update.lora_magnitude is not None
            own = update.lora_magnitude
            lengths = own if update.rows is None else put_rows(lengths, update.rows, own)
        tensors[_PEFT_MAGNITUDE] = lengths
    return tensors, (len(low), scaling)


def _own_biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """The biases that train in the place of the base's own, by their names in the base model."""
    own = {f"{name}.base.": f"{name}." for name, _ in lora_layers(model)}
    found = {}
    for name, value in trained_biases(model).items():
        module = name[: name.rfind(".") + 1]
        found[own.get(module, module) + name.removeprefix(module)] = value
    return found


def _bias_of(biases: Iterable[str], adapted: Iterable[str]) -> str:
    """What PEFT calls the choice of these biases, of a model with these adapted modules."""
    modules = {name.rpartition(".")[0] for name in biases}
    if not modules:
        return "none"
    return "lora_only" if modules <= set(adapted) else "all"


def _alpha(rank: int, scaling: float, *, use_rslora: bool) -> float:
    alpha = scaling * (math.sqrt(rank) if use_rslora else rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _parts_of(layer: AdaptedLayer) -> dict[str, Any]:
    """What of a layer's single update in PEFT's file is whose: rows, rank and scaling by role."""
    return {
        role: {**asdict(cast(Rows, update.rows)), "rank": len(update.since_start()[0]), "scaling": update.scaling}
        for role, update in layer.updates().items()
    }


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
    "use_qalora": (False,),
    "bias": ("none", "lora_only", "all"),
    "lora_bias": (False,),
    # The others (pissa, olora, corda, ...) change the base weight, too.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "ensure_weight_tying": (False,),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication"), (None,)),
    **dict.fromkeys(("monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora"), (None,)),
}
# Settings that are read here, and those that only say how the adapter was trained or found its targets.
_READ = {
    *("peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora"),
    *("use_dora", "target_modules", "modules_to_save"),
}
_BIASES = {"none": Bias.none, "lora_only": Bias.adapted, "all": Bias.all}
_WITHOUT_EFFECT = {
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size"),
}


def load_adapter(model: nn.Module, directory: Path) -> list[str]:
    """Loads an adapter written by us or by `peft`, in place of any adapter that the model has.

    Modules that the adapter holds whole (the head, PEFT's `modules_to_save`) and biases that it trained take the place
    of the model's until `remove_lora`; a tied weight among them is untied, as `peft` does it. Returns the names of the
    adapted modules.

    Raises:
        LoRAError: with the model as it was, when a file is missing, uses a variant that this layer does not compute, or
            does not fit the model.
    """
    config, path, tensors, names = _read_adapter(directory)
    ordered = [name for name, _ in model.named_modules() if name in names]
    _check_complete(model, config, names, path)
    ranks = {name: _rank_of(name, config) for name in names}
    biases = _biases_in(tensors, config)
    whole_modules = _check_fits(model, tensors, ranks=ranks, config=config, path=path)
    _check_biases(model, biases, names, config, path)
    targets = [each for name in ordered for each in _targets_of(name, ranks[name], directory / PARTS_FILE)]
    variant = VariantConfig(name=str(directory), dora=bool(config.get("use_dora")))

    remove_lora(model)
    apply_lora(
        model,
        [target for target, _ in targets],
        rank=[rank for _, rank in targets],
        dropout=config.get("lora_dropout") or 0.0,
        variant=variant,
        any_rank=True,
    )
    with torch.no_grad():
        for name, layer in lora_layers(model):
            _fill(layer, {leaf: tensors[f"{name}.{leaf}"] for leaf in _leaves(layer.base, config)})
    replace_biases(model, [*biases])
    _fill_biases(model, biases)
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


def start_from_adapter(model: nn.Module, directory: Path, *, named: str, head: Sequence[str] = ()) -> None:
    """Gives the LoRA layers that a model has the values of an adapter's file; on the meta device, only checks it.

    Args:
        model: with the layers.
        directory: of the adapter.
        named: the setting that named it.
        head: the modules of the task head, of this model or another; what the file holds of one is left where it is.

    Raises:
        LoRAError: with the model as it was, when the file cannot be read, or has other modules, rows, ranks or scalings
            than the layers, or more than them: a base that was trained too.
    """
    config, path, tensors, names = _read_adapter(directory)
    layers = dict(lora_layers(model))
    has_dora = bool(config.get("use_dora"))
    problems = _other_modules(names, [*layers], {name for name, _ in model.named_modules()})
    biases = _biases_in(tensors, config)
    if not problems:
        problems += _other_biases(biases, _own_biases(model), config)
    for name, layer in layers.items() if not problems else ():
        parts = _targets_of(name, _rank_of(name, config), directory / PARTS_FILE)
        problems += _differences(name, layer, parts)
        if has_dora != (layer.row_squares is not None):
            problems.append(f"it has {'' if has_dora else 'no '}DoRA: set variant.dora={str(has_dora).lower()}")
        if problems:
            break
    leaves = {
        name: {leaf: tensors.get(f"{name}.{leaf}") for leaf in _leaves(layers[name].base, config)}
        for name in names & layers.keys()
    }
    for name, values in leaves.items():
        in_features, out_features = features_of(layers[name].base)
        rank = _rank_of(name, config).rank
        shapes = ((rank, in_features), (out_features, rank), (out_features,))
        for (leaf, value), shape in zip(values.items(), shapes, strict=False):
            if not problems and (value is None or tuple(value.shape) != shape):
                found = "absent" if value is None else tuple(value.shape)
                problems.append(f"{name}.{leaf} is {found}, this model needs {shape}")
    if not problems:
        problems += _beside_the_adapter(model, tensors, names, config, head=head)
    if problems:
        raise LoRAError(f"{named}: {path} does not fit this run: {'; '.join(problems)}.")
    with torch.no_grad():
        for name, layer in layers.items():
            if not any(parameter.is_meta for parameter in layer.parameters()):
                _fill(layer, {leaf: value for leaf, value in leaves[name].items() if value is not None})
        _fill_biases(model, biases)


def _beside_the_adapter(
    model: nn.Module, tensors: Mapping[str, Tensor], names: set[str], config: Mapping[str, Any], *, head: Sequence[str]
) -> list[str]:
    """What a file holds that is neither A, B and biases, nor a head, nor the base as this model has it."""
    saved, parameters, biases = _saved_modules(config), _base_parameters(model), _biases_in(tensors, config)
    problems = []
    for name in sorted(tensors):
        module = name.rpartition(".")[0]
        if ".lora_" in name or is_head(name, head):
            continue
        own_name = _name_in_base(name, names)
        known = parameters.get(own_name)
        if own_name in biases or (known is None and _is_saved(module, saved)):  # the head of another kind of model
            continue
        if known is None:
            problems.append(f"it has {name}, the model has no such tensor")
        elif known.shape != tensors[name].shape:
            problems.append(f"its {name} is {tuple(tensors[name].shape)}, that of the base {tuple(known.shape)}")
        elif not known.is_meta and not torch.equal(known.detach().cpu().to(tensors[name].dtype), tensors[name]):
            problems.append(f"its {name} is not that of the base: more than an adapter was trained")
    if not problems:
        return []
    return [*problems[:3], "merge it into its base and name that with model.path, or continue an adapter alone"]


def _name_in_base(name: str, adapted: Container[str]) -> str:
    """What the base model calls a tensor that a file holds beside A and B: an adapted module is inside its layer."""
    module = name.rpartition(".")[0]
    return name.replace(".base_layer.", ".") if module.removesuffix(".base_layer") in adapted else name


def _biases_in(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The biases of a file that were trained beside A and B, by their names in the base model."""
    if _bias_setting(config) is Bias.none:
        return {}
    saved = _saved_modules(config)
    named = {name.replace(".base_layer.", "."): value for name, value in tensors.items()}
    return {
        name: value
        for name, value in named.items()
        if is_bias(name) and ".lora_" not in name and not _is_saved(name.rpartition(".")[0], saved)
    }


def _bias_setting(config: Mapping[str, Any]) -> Bias:
    return _BIASES[config.get("bias") or "none"]


def _check_biases(
    model: nn.Module, biases: Iterable[str], adapted: set[str], config: Mapping[str, Any], path: Path
) -> None:
    """Raises `LoRAError` when a file lacks a bias that its config says it trained."""
    setting, saved = _bias_setting(config), _saved_modules(config)
    named = (name.rpartition(".") for name in _base_parameters(model) if setting is not Bias.none)
    # Not those that DeBERTa calls `q_bias`: `peft` does not know them for biases.
    wanted = {
        f"{module}.{leaf}"
        for module, _, leaf in named
        if leaf == "bias" and not _is_saved(module, saved) and (setting is Bias.all or module in adapted)
    }
    absent = sorted(wanted - set(biases))
    if absent:
        raise LoRAError(
            f"{path} has bias={config['bias']} and holds no {', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}"
            "; the file is not complete, or belongs to another model."
        )


def _other_biases(biases: Mapping[str, Tensor], own: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
    """How the trained biases of a file differ from those of a run."""
    # What `peft` does not know for biases begins as the base has it.
    differing = sorted(biases.keys() - own.keys()) + sorted(
        name for name in own.keys() - biases.keys() if name.endswith(".bias")
    )
    if differing:
        return [
            f"it has bias={config.get('bias')} in PEFT's words and this run trains other biases (it differs in "
            f"{', '.join(differing[:3])}{', ...' if len(differing) > 3 else ''}): set "
            f"variant.bias={_bias_setting(config)}"
        ]
    wrong = [
        f"{name} is {tuple(value.shape)}, this model needs {tuple(own[name].shape)}"
        for name, value in biases.items()
        if value.shape != own[name].shape
    ]
    return wrong[:5]


def _fill_biases(model: nn.Module, biases: Mapping[str, Tensor]) -> None:
    """Copies biases of a file, by their names in the base model, into those that train."""
    own = _own_biases(model)
    with torch.no_grad():
        for name, value in biases.items():
            if not own[name].is_meta:
                own[name].copy_(value)


def _other_modules(names: set[str], own: Sequence[str], there: set[str]) -> list[str]:
    """How the modules of a file differ from those of a run's target layers, of all that its model has."""
    if names.isdisjoint(there):
        first = ", ".join(sorted(names)[:2])
        return [f"it adapts {first}, ..., of which this model has none: choose the base model that it was trained on"]
    absent, beyond = sorted(set(own) - set(names)), sorted(set(names) - set(own))
    if not absent and not beyond:
        return []
    found = [f"it has none of {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}"] if absent else []
    found += [f"it has {', '.join(beyond[:3])}{', ...' if len(beyond) > 3 else ''}, too"] if beyond else []
    return [f"it adapts other modules ({'; '.join(found)}): choose the target_layers that it was trained with"]


def _differences(name: str, layer: AdaptedLayer, parts: Sequence[tuple[Target, RankConfig]]) -> list[str]:
    """How the updates of one module in a file differ from those of a run, with the settings that would make it fit."""
    theirs = {(each.role if each.rows is not None else ""): (each.rows, own) for each, own in parts}
    updates = {(role if update.rows is not None else ""): update for role, update in layer.updates().items()}
    if theirs.keys() != updates.keys() or any(theirs[role][0] != update.rows for role, update in updates.items()):
        words = " and ".join(filter(None, map(str, theirs))) or "all rows at once"
        return [f"of {name} it adapts {words}: choose the target_layers that it was trained with"]
    for role, update in updates.items():
        own = theirs[role][1]
        where = f"{name} ({role})" if role else name
        if own.rank != update.rank:
            way_out = f"set rank.rank={own.rank}, or where its modules differ the rank.pattern that it was trained with"
            return [f"it has rank {own.rank} on {where}, this run {update.rank}: {way_out}"]
        if not math.isclose(own.scaling, update.scaling, rel_tol=1e-6):
            return [
                f"it has scaling {own.scaling:g} on {where}, this run {update.scaling:g}: set the alpha that it was "
                f"trained with (rank.alpha={own.scaling * own.rank:g} with rank.alpha_policy=fixed)"
            ]
    return []


def read_saved_modules(directory: Path) -> dict[str, Tensor]:
    """The tensors that an adapter's file holds beside A and B, of the modules that it saves whole: the head.

    Raises `LoRAError` for a file that cannot be read.
    """
    config, _, tensors, _ = _read_adapter(directory)
    saved = _saved_modules(config)
    return {
        name: value
        for name, value in tensors.items()
        if _is_saved(name.rpartition(".")[0], saved) and ".lora_" not in name
    }


def _read_adapter(directory: Path) -> tuple[dict[str, Any], Path, dict[str, Tensor], set[str]]:
    """Config, tensor file and tensors of an adapter, and the names of the modules that it adapts."""
    config = _read_adapter_config(directory / ADAPTER_CONFIG_FILE)
    path, tensors = _read_adapter_tensors(directory)
    names = {name.rpartition(".lora_")[0] for name in tensors if _FACTOR.search(name)}
    if not names:
        raise LoRAError(f"{path} holds no LoRA tensors.")
    return config, path, tensors, names


def _leaves(base: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """What PEFT calls the tensors of an adapted module, A and B first."""
    if isinstance(base, nn.Embedding):
        return ["lora_embedding_A", "lora_embedding_B"]
    return ["lora_A.weight", "lora_B.weight", *([_PEFT_MAGNITUDE] if config.get("use_dora") else [])]


def _fill(layer: AdaptedLayer, values: Mapping[str, Tensor]) -> None:
    """Copies the tensors of a file into a layer that was made for them; a role's are cut out of the whole."""
    low, high, *lengths = values.values()
    first = 0
    for update in layer.updates().values():
        columns = slice(first, first + update.rank)
        first += update.rank
        update.lora_A.copy_(low[columns])
        own = take_rows(high[:, columns], update.rows)
        update.lora_B.copy_(own if update.rows is None else own / update.scaling)
        for each in lengths:
            assert update.lora_magnitude is not None
            update.lora_magnitude.copy_(take_rows(each, update.rows))


def is_named_by(key: str, module: str) -> bool:
    """Whether a key of PEFT's `rank_pattern` or `alpha_pattern` is for a module: its name ends with it."""
    return re.match(rf"(.*\.)?({key})$", module) is not None


def _rank_of(name: str, config: Mapping[str, Any]) -> RankConfig:
    """Rank and alpha of a module, as `peft` finds them: those of the first key that its name ends with."""

    def own(pattern: str, otherwise: str) -> Any:
        keys: Mapping[str, Any] = config.get(pattern) or {}
        fitting = (value for key, value in keys.items() if is_named_by(key, name))
        return next(fitting, config[otherwise])

    return RankConfig(
        rank=own("rank_pattern", "r"),
        alpha_policy=AlphaPolicy.rslora if config.get("use_rslora") else AlphaPolicy.fixed,
        alpha=own("alpha_pattern", "lora_alpha"),
    )


def _targets_of(name: str, rank: RankConfig, parts_path: Path) -> list[tuple[Target, RankConfig]]:
    """What of a module is adapted and at which rank: the module, or its roles where our own file says which."""
    try:
        parts = json.loads(parts_path.read_text(encoding="utf-8")).get(name, {}) if parts_path.is_file() else {}
        found = [
            (
                Target(name, role, rows=Rows(part["start"], part["stop"], part["period"])),
                RankConfig(rank=part["rank"], alpha=part["scaling"] * part["rank"]),
            )
            for role, part in parts.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoRAError(f"{parts_path} is not readable ({error!r}).") from error
    if not found:
        return [(Target(name), rank)]
    if sum(own.rank for _, own in found) != rank.rank:
        raise LoRAError(f"{parts_path}: the ranks of {name}'s roles do not add up to its rank, {rank.rank}.")
    return found


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
    _check_numbers(config, path)
    return config


def _check_numbers(config: Mapping[str, Any], path: Path) -> None:
    """Raises `LoRAError` for ranks and alphas that are none, alone or by pattern."""
    for one, several, kinds, words in (
        ("r", "rank_pattern", (int,), "a whole number of at least 1"),
        ("lora_alpha", "alpha_pattern", (int, float), "a number above 0"),
    ):
        pattern = config.get(several) or {}
        if not isinstance(pattern, dict):
            raise LoRAError(f"{path}: {several}={pattern!r} must be a mapping from names of modules.")
        for name, value in ((one, config[one]), *((f"{several}.{key}", value) for key, value in pattern.items())):
            if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
                raise LoRAError(f"{path}: {name}={value!r} must be {words}.")
        for key in pattern:
            try:
                re.compile(key)
            except re.error as error:
                raise LoRAError(f"{path}: {several}: {key!r} is no regular expression ({error}).") from error


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
        plain = name.removeprefix(_PEFT_PREFIX)
        plain = re.sub(r"\.(lora_[AB]|lora_embedding_[AB]|modules_to_save)\.default\b", r".\1", plain)
        plain = re.sub(r"\.lora_magnitude_vector(\.default)?(\.weight)?$", f".{_PEFT_MAGNITUDE}", plain)
        plain = plain.replace(".modules_to_save.", ".")
        # With bias=all the biases of a saved module are there under two names.
        if plain in tensors and not torch.equal(tensors[plain], value):
            raise LoRAError(f"{path} holds {plain} twice, of several adapters; save one of them alone.")
        tensors[plain] = value
    return path, tensors


def _check_complete(model: nn.Module, config: dict[str, Any], target_modules: Iterable[str], path: Path) -> None:
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
        if (
            matches
            and (name in layers or can_be_adapted(module))
            and name not in target_modules
            and not _is_saved(name, saved)
        ):
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
    originals = original_parameters(model)
    return {name: originals.get(id(value), value) for name, value in found.items()}


def _check_fits(
    model: nn.Module,
    tensors: dict[str, Tensor],
    *,
    ranks: Mapping[str, RankConfig],
    config: dict[str, Any],
    path: Path,
) -> list[str]:
    """The modules that the adapter holds whole. Raises `LoRAError` when a tensor does not fit."""
    bases = {
        name: module.base if isinstance(module, AdaptedLayer) else module for name, module in model.named_modules()
    }
    parameters = _base_parameters(model)
    expected: dict[str, tuple[int, ...] | None] = {}
    for name, rank in sorted(ranks.items()):
        if name not in bases:
            raise LoRAError(f"{path}: the model has no module {name}.")
        try:
            in_features, out_features = features_of(bases[name])
        except LoRAError as error:
            raise LoRAError(f"{path}: {name}: {error}") from None
        shapes = ((rank.rank, in_features), (out_features, rank.rank), (out_features,))
        expected |= {f"{name}.{leaf}": shape for leaf, shape in zip(_leaves(bases[name], config), shapes, strict=False)}
    whole_modules, of_the_base = [], {}
    for name in sorted(tensors.keys() - expected.keys()):
        module = name.rpartition(".")[0]
        # `peft` saves the base weight of an adapted unembedding, and embeddings of another size, beside the adapter.
        own_name = _name_in_base(name, ranks.keys())
        known = parameters.get(own_name)
        expected[name] = None if known is None else tuple(known.shape)
        if own_name == name and known is not None and _is_saved(module, _saved_modules(config)):
            whole_modules.append(module)
        elif known is not None and not (is_bias(own_name) and _bias_setting(config) is not Bias.none):
            of_the_base[name] = known
    wrong = [
        f"{name} is {tuple(tensors[name].shape) if name in tensors else 'absent'}, the model needs {shape or 'none'}"
        for name, shape in expected.items()
        if name not in tensors or tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise LoRAError(f"{path} does not fit the model: {'; '.join(wrong[:5])}.")
    both = sorted(set(whole_modules) & ranks.keys())
    if both:
        raise LoRAError(f"{path}: {', '.join(both)} is adapted and saved whole at once, which is not supported.")
    for name, known in sorted(of_the_base.items()):
        if not torch.equal(known.detach().cpu().to(tensors[name].dtype), tensors[name]):
            raise LoRAError(
                f"{path}: {name} differs from the model's: the adapter belongs to another base model, or to one whose "
                "embeddings were trained. Load it on the base model that it was trained on."
            )
    return sorted(set(whole_modules))
