"""LoRA (Hu et al. 2021, arXiv 2106.09685), in one sitting.

    x: (..., in)                                  W: (out, in), frozen      A: (rank, in), uniform
        |------------------ W ------------------>(+)---> y                  B: (out, rank), zeros
        |---- dropout --- A ------- B -- * s -----^
                    (rank, in)  (out, rank)

    y = x W^T + b + s * (x A^T) B^T               s: scaling = alpha / rank, or alpha / sqrt(rank) for rsLoRA

B starts at zero, so an adapted model starts as its base model. A starts as in the paper's code, uniform in
+-1/sqrt(in) (`kaiming_uniform_(a=sqrt(5))`). The product B A is never formed in training: it would put a matrix of
the size of W into the autograd graph, and the memory measured then would not be LoRA's.

`apply_lora` replaces modules by `LoRALayer`s, `remove_lora` puts the base modules back; `merge` and `unmerge` fold
the delta weight into W and take it out again; `save_adapter` and `load_adapter` use PEFT's file format, so an
adapter trained here loads in `peft` and the other way round. Loading a second adapter swaps it for the first. No
tensor of the base model is ever written to, so removing an adapter leaves the base bitwise as it was.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from harness.config import AlphaPolicy, Method, RankConfig
from harness.parallel import whole
from harness.results import write_json_atomically

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
_OLDER_ADAPTER_FILE = "adapter_model.bin"
_PEFT_PREFIX = "base_model.model."

# Where a model keeps the base modules, by name, in whose place `load_adapter` put the adapter's own.
_REPLACED = "_modules_replaced_by_adapter"


class LoRAError(ValueError):
    """An adapter that does not fit the model or the file format; the message says which part."""


class LoRALayer(nn.Module):
    """A frozen `base` projection plus a trainable low-rank update.

    Args:
        base: `nn.Linear`, or GPT-2's `Conv1D`, which keeps its weight as `(in_features, out_features)`.
        rank: rank of the update, at most `min(in_features, out_features)`.
        scaling: the factor in `delta W = scaling * B @ A`.
        dropout: probability with which an entry of the adapter's input is zeroed in training.

    Raises:
        LoRAError: another kind of module, or a rank that its shape cannot have.
    """

    def __init__(self, base: nn.Module, *, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_features, self.out_features = _check_rank(base, rank)
        weight = _weight(base)
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        # In float32 whatever the base is held in: AdamW's small updates are lost in bfloat16.
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=torch.float32, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=weight.device))
        # A tuple, because a parameter in an attribute would count as one of the model's.
        self._unmerged: tuple[nn.Parameter, ...] = ()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws A anew and zeroes B."""
        bound = 1 / math.sqrt(self.in_features)  # = kaiming_uniform_(a=sqrt(5))
        with torch.no_grad():
            # Drawn on the CPU, so that a seed means the same adapter on every device.
            self.lora_A.copy_(torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator))
            self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        if self.merged:
            return self.base(x)
        rows = x.reshape(-1, self.in_features)
        low_rank = functional.linear(self.dropout(rows), self.lora_A)  # (rows, rank)
        # One fused product instead of a product, a scaling and a sum: nothing of size (rows, out) is made twice.
        y = torch.addmm(self.base(rows), low_rank, self.lora_B.T, alpha=self.scaling)
        return y.view(*x.shape[:-1], self.out_features)

    def delta_weight(self) -> Tensor:
        """`scaling * B @ A` in float32, in the shape of the base weight."""
        delta = self.scaling * (self.lora_B.detach() @ self.lora_A.detach())
        return delta if isinstance(self.base, nn.Linear) else delta.T

    @property
    def merged(self) -> bool:
        """Whether the base module holds the merged weight at present."""
        return bool(self._unmerged)

    def require_mergeable(self) -> None:
        """Raises `LoRAError` when the base weight is held in a type that has no sums."""
        weight = _weight(self.base)
        if not weight.is_floating_point() or weight.shape != self.delta_weight().shape:
            raise LoRAError(
                f"a quantised weight ({str(weight.dtype).removeprefix('torch.')}) holds no sum; load the base model "
                "unquantised to merge into it."
            )

    def merge(self) -> None:
        """Gives the base module a weight with the delta weight in it. Does nothing when merged.

        The sum is made in float32 and rounded to the type of the base weight, so in bfloat16 or float16 a merged model
        differs from the unmerged one by that rounding. The base weight itself is kept: another module may share it, as
        a tied embedding does.
        """
        if not self.merged:
            self.require_mergeable()
            weight = self.base.weight
            assert isinstance(weight, nn.Parameter)
            merged = (weight.detach().float() + self.delta_weight()).to(weight.dtype)
            self._unmerged = (weight,)
            self.base.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)

    def unmerge(self) -> None:
        """Puts the base weight back: the same tensor, and shared as before."""
        for weight in self._unmerged:
            weight.data = weight.data.to(_weight(self.base).device)  # the model may have been moved meanwhile
            self.base.weight = weight
        self._unmerged = ()

    def base_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters of the base module by their names in it, as they are unmerged."""
        for name, parameter in self.base.named_parameters():
            yield name, self._unmerged[0] if self._unmerged and name == "weight" else parameter

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"rank={self.rank}, scaling={self.scaling:g}, merged={self.merged}"


def _check_rank(base: nn.Module, rank: int) -> tuple[int, int]:
    """In and out features of a projection. Raises `LoRAError` when it is none or cannot have this rank."""
    if isinstance(base, nn.Linear):
        in_features, out_features = base.in_features, base.out_features
    elif type(base).__name__ == "Conv1D" and isinstance(getattr(base, "weight", None), Tensor):
        in_features, out_features = _weight(base).shape
    else:
        raise LoRAError(f"LoRA adapts nn.Linear and Conv1D, not {type(base).__name__}.")
    largest = min(in_features, out_features)
    if not 1 <= rank <= largest:
        raise LoRAError(f"rank={rank}: a {in_features} -> {out_features} projection allows 1 to {largest}.")
    return in_features, out_features


def _weight(base: nn.Module) -> Tensor:
    weight = base.weight
    assert isinstance(weight, Tensor)
    return weight


# ---------------------------------------------------------------- apply and remove


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Name and layer of every adapted module, in the model's order; the name is that of the base model."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield name, module


def apply_lora(
    model: nn.Module,
    target_modules: Sequence[str],
    *,
    rank: RankConfig,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> None:
    """Replaces each module named in `target_modules` by a `LoRALayer` around it, in place.

    Raises `LoRAError`, and changes nothing, when a module does not exist, cannot be adapted or allows no such rank.
    """
    modules = dict(model.named_modules())
    unknown = [name for name in target_modules if name not in modules]
    if unknown:
        raise LoRAError(f"no module {', '.join(unknown)} in {type(model).__name__}.")
    for name in target_modules:  # all of them, before a layer freezes its base module
        try:
            _check_rank(modules[name], rank.rank)
        except LoRAError as error:
            raise LoRAError(f"{name}: {error}") from None
    for name in target_modules:
        layer = LoRALayer(modules[name], rank=rank.rank, scaling=rank.scaling, dropout=dropout)
        if not layer.lora_A.is_meta:
            layer.reset_parameters(generator)
        _replace(model, name, layer.train(modules[name].training))


def remove_lora(model: nn.Module) -> None:
    """Puts the base modules back, also those in whose place `load_adapter` put others; merged ones are unmerged first.

    They stay frozen: what is trained next is for `set_trainable` to say.
    """
    unmerge(model)
    for name, layer in list(lora_layers(model)):
        _replace(model, name, layer.base)
    for name, module in _replaced_modules(model).items():
        _replace(model, name, module)
    model.__dict__.pop(_REPLACED, None)


def merge(model: nn.Module) -> None:
    """Folds every delta weight into its base weight: inference then costs what the base model costs.

    A merged unembedding is no longer the input embedding, so a tied model is untied until `unmerge`. Raises `LoRAError`
    before anything is merged when a weight is quantised.
    """
    layers = dict(lora_layers(model))
    for name, layer in layers.items():
        try:
            layer.require_mergeable()
        except LoRAError as error:
            raise LoRAError(f"{name}: {error}") from None
    untied = any(_is_shared(model, layer) for layer in layers.values())
    for layer in layers.values():
        layer.merge()
    if untied:
        _set_tied(model, False)


def unmerge(model: nn.Module) -> None:
    """Takes every delta weight out again; base weights are bitwise what they were before `merge`."""
    merged = [layer for _, layer in lora_layers(model) if layer.merged]
    for layer in merged:
        layer.unmerge()
    if any(_is_shared(model, layer) for layer in merged):
        _set_tied(model, True)


def merge_and_remove(model: nn.Module) -> None:
    """Merges for good: a plain model, without an adapter, that can be saved and used like any other."""
    merge(model)
    for name, layer in list(lora_layers(model)):
        _replace(model, name, layer.base)
    model.__dict__.pop(_REPLACED, None)


def _is_shared(model: nn.Module, layer: LoRALayer) -> bool:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return uses[id(layer.base.weight)] > 1


def _set_tied(model: nn.Module, tied: bool) -> None:
    """Says in a transformers model's config, and with it in what is saved, whether its embeddings are one tensor."""
    config = getattr(model, "config", None)
    if hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = tied


def _replaced_modules(model: nn.Module) -> dict[str, nn.Module]:
    return model.__dict__.get(_REPLACED, {})


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


# ---------------------------------------------------------------- what is trained


def _is_adapter(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_A", "lora_B")


def _is_head(name: str, head_modules: Sequence[str]) -> bool:
    return any(name.startswith(module + ".") for module in head_modules)


def set_trainable(model: nn.Module, method: Method, head_modules: Sequence[str]) -> None:
    """Makes exactly the parameters of a method trainable: this is all in which methods differ for the trainer.

    `lora`: adapter and head. `head_only`: head. `full`: everything.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(method is Method.full or _is_head(name, head_modules) or _is_adapter(name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # a frozen base may be held in less


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters, from shapes; a tied parameter counts once."""

    num_adapter_params: int
    num_head_params: int
    num_trainable_params: int
    num_total_params: int


def count_parameters(model: nn.Module, head_modules: Sequence[str]) -> ParameterCounts:
    """Counts adapter, head, trainable and all parameters. Works on the meta device, where nothing is allocated."""
    adapter = head = trainable = total = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
        adapter += parameter.numel() if _is_adapter(name) else 0
        head += parameter.numel() if _is_head(name, head_modules) else 0
    return ParameterCounts(adapter, head, trainable, total)


# ---------------------------------------------------------------- files


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
        *(name for name in _replaced_modules(model) if not _is_head(f"{name}.", head_modules)),
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
    return {name: value for name, value in model.named_parameters() if _is_head(name, head_modules)}


def save_tensors(tensors: dict[str, Tensor], path: Path) -> int:
    """Writes tensors as safetensors, atomically, and returns the bytes written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    save_file({name: whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}, temporary)
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
    model.__dict__[_REPLACED] = originals
    for name, original in originals.items():
        own = copy.deepcopy(original)
        for leaf, parameter in list(own.named_parameters(recurse=False)):
            value = tensors.get(f"{name}.{leaf}")
            if value is not None:
                # In float32, in which it was trained, whatever the base is held in; see `set_trainable`.
                value = value.to(parameter.device, torch.float32, copy=True)
                setattr(own, leaf, nn.Parameter(value, requires_grad=parameter.requires_grad))
        _replace(model, name, own)
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
    for name, module in _replaced_modules(model).items():
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
            in_features, out_features = _check_rank(bases[name], rank.rank)
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
