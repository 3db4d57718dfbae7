"""Adapters put into a model, taken out of it, and merged into its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from harness.config.schema import Bias, RankConfig, VariantConfig
from harness.methods.counts import is_bias, is_head
from harness.methods.inits import check_variant, start
from harness.methods.lora import (
    AdaptedLayer,
    EmbeddingLoRALayer,
    LoRAError,
    LoRALayer,
    SlicedLoRALayer,
    features_of,
)
from harness.placement.architectures import Rows
from harness.placement.select import Target

# Where a model keeps the base modules, by name, in whose place `load_adapter` put the adapter's own.
REPLACED = "_modules_replaced_by_adapter"
# And the base's own parameters in whose place others are: each with the module that has it, and its name there.
_REPLACED_PARAMETERS = "_parameters_replaced_by_adapter"


def check_rank(base: nn.Module, rank: int, *, rows: Rows | None = None) -> None:
    """Raises `LoRAError` where a module, or some of its rows, cannot be adapted or cannot have the rank."""
    in_features, out_features = features_of(base, rows=rows)
    largest = min(in_features, out_features)
    if not 1 <= rank <= largest:
        raise LoRAError(f"rank={rank}: a {in_features} -> {out_features} projection allows 1 to {largest}.")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Name and layer of every adapted module, in the model's order; the name is that of the base model."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield name, module


def apply_lora(
    model: nn.Module,
    targets: Sequence[Target | str],
    *,
    rank: RankConfig | Sequence[RankConfig],
    dropout: float = 0.0,
    variant: VariantConfig | None = None,
    generator: torch.Generator | None = None,
    any_rank: bool = False,
    head: Sequence[str] = (),
) -> None:
    """Puts an adapted layer in the place of every module that is a target, or some of whose rows are, in place.

    Args:
        model: the base model.
        targets: what is adapted; a name stands for the whole module.
        rank: of all targets, or of each.
        dropout: on the input of every update; an embedding has none.
        variant: how A and B begin, whether rows have trained lengths, and which biases of the base train.
        generator: draws A and B, in the order of the targets.
        any_rank: whether a rank may be larger than the smaller side of its matrix, as in files of others.
        head: the modules of the task head, whose biases are none of the base's.

    Raises:
        LoRAError: and changes nothing, when a module does not exist, cannot be adapted or allows no such rank.
    """
    modules = dict(model.named_modules())
    wanted = [Target(target) if isinstance(target, str) else target for target in targets]
    unknown = [target.module for target in wanted if target.module not in modules]
    if unknown:
        raise LoRAError(f"no module {', '.join(unknown)} in {type(model).__name__}.")
    at = [rank] * len(wanted) if isinstance(rank, RankConfig) else rank
    variant = variant or VariantConfig()
    for target, own in zip(wanted, at, strict=True):  # all of them, before a layer freezes its base module
        try:
            features_of(modules[target.module], rows=target.rows)
            if not any_rank:
                check_rank(modules[target.module], own.rank, rows=target.rows)
            check_variant(modules[target.module], variant)
        except LoRAError as error:
            raise LoRAError(f"{target}: {error}") from None
    if wanted and all(isinstance(modules[target.module], nn.Embedding) for target in wanted):
        _require_matrix(variant, dropout)
    biases = _biases(model, wanted, variant.bias, head)
    of_module: dict[str, list[tuple[Target, RankConfig]]] = {}
    for target, own in zip(wanted, at, strict=True):
        of_module.setdefault(target.module, []).append((target, own))
    for name, parts in of_module.items():
        layer = _layer_around(modules[name], parts, dropout)
        start(layer, variant, generator)
        replace_module(model, name, layer.train(modules[name].training))
    replace_biases(model, biases)


def _require_matrix(variant: VariantConfig, dropout: float) -> None:
    """Raises `LoRAError` for what decides nothing where embeddings alone are adapted."""
    if variant.init is not VariantConfig().init:
        raise LoRAError(
            f"variant.init={variant.init}: the A and B of an embedding begin as in the LoRA paper's code, whatever is "
            "set, and nothing else is adapted; use variant=plain, or adapt a matrix as well."
        )
    if dropout:
        raise LoRAError(
            f"method.adapter_dropout={dropout:g}: the input of an embedding is a token, which is not dropped, and "
            "nothing else is adapted; use method.adapter_dropout=0, or adapt a matrix as well."
        )


def _biases(model: nn.Module, targets: Sequence[Target], which: Bias, head: Sequence[str]) -> list[str]:
    """The names of the biases that `variant.bias` says, before anything is adapted. Raises `LoRAError` for none."""
    if which is Bias.none:
        return []
    names = [name for name, _ in model.named_parameters() if is_bias(name) and not is_head(name, head)]
    if which is Bias.adapted:
        for target in targets:
            if target.rows is not None:
                raise LoRAError(
                    f"variant.bias=adapted: {target} is some of the rows of a module, whose bias is that of all its "
                    f"rows; adapt the module whole, or use variant=bias_all or plain."
                )
        adapted = {target.module for target in targets}
        names = [name for name in names if name.rpartition(".")[0] in adapted]
    if not names:
        where = "the adapted modules have no bias" if which is Bias.adapted else "the base model has no biases"
        raise LoRAError(f"variant.bias={which}: {where}, so nothing more would train; use variant=plain.")
    return names


def replace_biases(model: nn.Module, names: Sequence[str]) -> None:
    """Puts a copy in float32 in the place of biases of the base model, to be trained; `remove_lora` puts these back.

    Names are those of the base model.
    """
    layers = dict(lora_layers(model))
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for name in names:
        module, _, leaf = name.rpartition(".")
        owner = layers[module].base if module in layers else model.get_submodule(module)
        replaced.append((owner, leaf, getattr(owner, leaf)))
        weight = getattr(owner, "weight", None)
        # Some of PyTorch's kernels want the weight of a norm in the type of its bias.
        if isinstance(weight, nn.Parameter) and weight.ndim == 1 and weight.dtype is not torch.float32:
            replaced.append((owner, "weight", weight))
    for owner, leaf, own in replaced:
        copied = own.detach().to(torch.float32, copy=True)
        setattr(owner, leaf, nn.Parameter(copied, requires_grad=is_bias(leaf)))
    if replaced:
        model.__dict__[_REPLACED_PARAMETERS] = (*model.__dict__.get(_REPLACED_PARAMETERS, ()), *replaced)


def trained_biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """The biases that train in the place of the base's own, by the names that they have in the adapted model."""
    trained = {id(getattr(owner, leaf)) for owner, leaf, _ in _replaced_parameters(model) if is_bias(leaf)}
    return {name: value for name, value in model.named_parameters() if id(value) in trained} if trained else {}


def original_parameters(model: nn.Module) -> dict[int, nn.Parameter]:
    """The base model's own parameters that others replace, each by the `id` of the one in its place."""
    return {id(getattr(owner, leaf)): own for owner, leaf, own in reversed(_replaced_parameters(model))}


def _replaced_parameters(model: nn.Module) -> Sequence[tuple[nn.Module, str, nn.Parameter]]:
    return model.__dict__.get(_REPLACED_PARAMETERS, ())


def _layer_around(base: nn.Module, parts: Sequence[tuple[Target, RankConfig]], dropout: float) -> AdaptedLayer:
    whole, own = parts[0]
    if whole.rows is not None:
        of_roles = {str(part.role): (part.rows, at.rank, at.scaling) for part, at in parts if part.rows is not None}
        return SlicedLoRALayer(base, of_roles, dropout=dropout)
    if isinstance(base, nn.Embedding):
        return EmbeddingLoRALayer(base, rank=own.rank, scaling=own.scaling)
    return LoRALayer(base, rank=own.rank, scaling=own.scaling, dropout=dropout)


def remove_lora(model: nn.Module) -> None:
    """Puts the base modules and biases back, also modules in whose place `load_adapter` put others; unmerges first.

    They stay frozen: what is trained next is for `set_trainable` to say.
    """
    unmerge(model)
    for owner, leaf, own in reversed(_replaced_parameters(model)):
        own.data = own.data.to(getattr(owner, leaf).device)  # the model may have been moved meanwhile
        setattr(owner, leaf, own)
    model.__dict__.pop(_REPLACED_PARAMETERS, None)
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
    model.__dict__.pop(_REPLACED_PARAMETERS, None)


def _is_shared(model: nn.Module, layer: AdaptedLayer) -> bool:
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
