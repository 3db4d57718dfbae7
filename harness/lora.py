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
adapter trained here loads in `peft` and the other way round. Loading a second adapter swaps it for the first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
_PEFT_PREFIX = "base_model.model."


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
        self._unmerged_weight: Tensor | None = None

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
        """Whether the base weight holds the delta weight at present."""
        return self._unmerged_weight is not None

    def merge(self) -> None:
        """Adds the delta weight to the base weight, and keeps a copy of the latter. Does nothing when merged."""
        if not self.merged:
            weight = _weight(self.base)
            if weight.shape != self.delta_weight().shape:
                raise LoRAError("a quantised weight holds no sum; load the base model unquantised to merge into it.")
            self._unmerged_weight = weight.detach().clone()
            with torch.no_grad():
                weight.copy_(weight.float() + self.delta_weight())

    def unmerge(self) -> None:
        """Puts the copied base weight back: bitwise what it was, which subtracting would not give."""
        if self._unmerged_weight is not None:
            with torch.no_grad():
                _weight(self.base).copy_(self._unmerged_weight)
            self._unmerged_weight = None

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
    """Puts the base modules back in place of the `LoRALayer`s; merged ones are unmerged first.

    They stay frozen: what is trained next is for `set_trainable` to say.
    """
    for name, layer in list(lora_layers(model)):
        layer.unmerge()
        _replace(model, name, layer.base)


def merge(model: nn.Module) -> None:
    """Folds every delta weight into its base weight: inference then costs what the base model costs."""
    for _, layer in lora_layers(model):
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Takes every delta weight out again; base weights are bitwise what they were before `merge`."""
    for _, layer in lora_layers(model):
        layer.unmerge()


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
    for name, tensor in head_state(model, head_modules).items():
        tensors[_PEFT_PREFIX + name] = tensor
    alpha = rank.effective_alpha
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": rank.alpha_policy is AlphaPolicy.rslora,
        "lora_dropout": dropout,
        "target_modules": target_modules,
        "modules_to_save": list(head_modules),
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
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication"), (None,)),
    **dict.fromkeys(("monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora"), (None,)),
}


def load_adapter(model: nn.Module, directory: Path) -> list[str]:
    """Loads an adapter written by us or by `peft`, in place of any adapter that the model has.

    Returns the names of the adapted modules. Raises `LoRAError`, with the model as it was, when a file is missing,
    uses a variant that this layer does not compute, or does not fit the model.
    """
    config_path, tensors_path = directory / ADAPTER_CONFIG_FILE, directory / ADAPTER_FILE
    for path in (config_path, tensors_path):
        if not path.is_file():
            raise LoRAError(f"{directory} holds no {path.name}.")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoRAError(f"{config_path} is not readable as JSON ({error}).") from error
    if config.get("peft_type") != "LORA":
        raise LoRAError(f"{config_path}: peft_type={config.get('peft_type')!r}, this loads LORA.")
    for name, supported in _SUPPORTED.items():
        if config.get(name) is not None and config[name] not in supported:
            allowed = ", ".join(map(repr, supported))
            raise LoRAError(f"{config_path}: {name}={config[name]!r} is not supported, only {allowed}.")
    for name in ("r", "lora_alpha"):
        if config.get(name) is None:
            raise LoRAError(f"{config_path}: {name} is missing.")
    rank = RankConfig(
        rank=config["r"],
        alpha_policy=AlphaPolicy.rslora if config.get("use_rslora") else AlphaPolicy.fixed,
        alpha=config["lora_alpha"],
    )
    try:
        tensors = {name.removeprefix(_PEFT_PREFIX): value for name, value in load_file(tensors_path).items()}
    except SafetensorError as error:
        raise LoRAError(f"{tensors_path} is not readable as safetensors ({error}).") from error
    parts = (".lora_A.weight", ".lora_B.weight")
    target_modules = sorted({name.rpartition(".lora_")[0] for name in tensors if name.endswith(parts)})
    if not target_modules:
        raise LoRAError(f"{tensors_path} holds no LoRA tensors.")
    _check_fits(model, target_modules, tensors, rank, tensors_path)

    remove_lora(model)
    ordered = [name for name, _ in model.named_modules() if name in target_modules]
    apply_lora(model, ordered, rank=rank, dropout=config.get("lora_dropout", 0.0))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            own_name = name.removesuffix(".weight") if ".lora_" in name else name
            parameters[own_name].copy_(value)
    return ordered


def _check_fits(
    model: nn.Module, target_modules: Iterable[str], tensors: dict[str, Tensor], rank: RankConfig, path: Path
) -> None:
    bases = {name: module.base if isinstance(module, LoRALayer) else module for name, module in model.named_modules()}
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
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
    expected |= {name: shapes.get(name) for name in tensors if name not in expected}
    wrong = [
        f"{name} is {tuple(tensors[name].shape) if name in tensors else 'absent'}, the model needs {shape or 'none'}"
        for name, shape in expected.items()
        if name not in tensors or tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise LoRAError(f"{path} does not fit the model: {'; '.join(wrong[:5])}.")
