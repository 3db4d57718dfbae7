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

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.config.schema import RankConfig

# Where a model keeps the base modules, by name, in whose place `load_adapter` put the adapter's own.
REPLACED = "_modules_replaced_by_adapter"


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
        self.in_features, self.out_features = check_rank(base, rank)
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


def check_rank(base: nn.Module, rank: int) -> tuple[int, int]:
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
            check_rank(modules[name], rank.rank)
        except LoRAError as error:
            raise LoRAError(f"{name}: {error}") from None
    for name in target_modules:
        layer = LoRALayer(modules[name], rank=rank.rank, scaling=rank.scaling, dropout=dropout)
        if not layer.lora_A.is_meta:
            layer.reset_parameters(generator)
        replace_module(model, name, layer.train(modules[name].training))


def remove_lora(model: nn.Module) -> None:
    """Puts the base modules back, also those in whose place `load_adapter` put others; merged ones are unmerged first.

    They stay frozen: what is trained next is for `set_trainable` to say.
    """
    unmerge(model)
    for name, layer in list(lora_layers(model)):
        replace_module(model, name, layer.base)
    for name, module in replaced_modules(model).items():
        replace_module(model, name, module)
    model.__dict__.pop(REPLACED, None)


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
        replace_module(model, name, layer.base)
    model.__dict__.pop(REPLACED, None)


def _is_shared(model: nn.Module, layer: LoRALayer) -> bool:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return uses[id(layer.base.weight)] > 1


def _set_tied(model: nn.Module, tied: bool) -> None:
    """Says in a transformers model's config, and with it in what is saved, whether its embeddings are one tensor."""
    config = getattr(model, "config", None)
    if hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = tied


def replaced_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The base model's own modules in whose place a loaded adapter has put its own, by name."""
    return model.__dict__.get(REPLACED, {})


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one called `name`."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
