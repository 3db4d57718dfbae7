"""What runs that have ended changed of their base's matrices: the delta weight of each, by role and block.

LoRA's is a product of thin factors, read as training had it (scaling, slices of a fused matrix, PiSSA's start). That of
any other method is the difference of two matrices, as merging leaves it or as the model was saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from harness.config.validation import ConfigError
from harness.content.errors import ModelError
from harness.methods.adapting import lora_layers
from harness.methods.lora import AdaptedLayer, LoRAError, features_of, is_linear, put_rows, take_rows
from harness.methods.peft_method import PeftMethodError
from harness.methods.swapping import merge_in, put_in, restored
from harness.placement.architectures import ARCHITECTURES
from harness.placement.select import Target, select_targets
from harness.saved import Base, SavedRun, base_key, find_saved


@dataclass(frozen=True)
class DeltaWeight:
    """What a run changed of one matrix, or of those of its rows that are one role's.

    Attributes:
        target: module, role, block and rows; a module that no role names has the last part of its name for a role.
        base: the base weight, `(out_features, in_features)`, in float32.
        low: `(rank, in_features)`, where the delta weight is the product `high @ low`; else None.
        high: `(out_features, rank)`, scaled, likewise.
        dense: the delta weight where it is no such product; else None.
    """

    target: Target
    base: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    dense: Tensor | None = None

    @property
    def role(self) -> str:
        """Which projection of its block it is."""
        return role_of(self.target)

    def matrix(self) -> Tensor:
        """The delta weight as a matrix."""
        if self.dense is not None:
            return self.dense
        assert self.low is not None and self.high is not None
        return self.high @ self.low


def role_of(target: Target) -> str:
    """Which projection of its block a target is; of one that no role names the last part of the module's name."""
    return target.role or target.module.rpartition(".")[2]


def find_each(run_ids: Sequence[str], runs_dir: Path) -> tuple[list[SavedRun], list[str]]:
    """Those of the runs whose weights can be used, and one sentence for each of the others."""
    found: list[SavedRun] = []
    problems: list[str] = []
    for run_id in run_ids:
        try:
            found += find_saved([run_id], runs_dir, needs_base=True)
        except (ConfigError, ModelError) as error:
            problems += str(error).splitlines()
    return found, list(dict.fromkeys(problems))


def by_untrained_base(runs: Sequence[SavedRun]) -> list[list[SavedRun]]:
    """The runs in groups whose training began from the same weights, in their order."""
    groups: dict[str, list[SavedRun]] = {}
    for saved in runs:
        groups.setdefault(base_key(saved, untrained=True), []).append(saved)
    return list(groups.values())


def read_deltas(group: Sequence[SavedRun], problems: list[str]) -> Iterator[tuple[SavedRun, list[DeltaWeight]]]:
    """The delta weights of runs that began from the same weights, which are loaded once; run by run, in their order.

    A matrix that a run left as it was has no delta weight. Of a run whose files do not fit, or whose method cannot be
    merged, `problems` gets a sentence instead. Raises `ModelError` where the base model cannot be loaded.
    """
    base = Base(group[0], untrained=True)
    for saved in group:
        try:
            found = _of_run(base, saved)
            _require_finite(found)
        except (ConfigError, ModelError, LoRAError, PeftMethodError) as error:
            problems.append(f"{saved.run_id}: {error}")
        else:
            yield saved, found


def _require_finite(deltas: Sequence[DeltaWeight]) -> None:
    """Raises `ModelError`: numbers that are none come of a damaged file, and nothing can be decomposed with them."""
    for delta in deltas:
        parts = (delta.low, delta.high) if delta.low is not None and delta.high is not None else (delta.matrix(),)
        if not all(bool(part.isfinite().all()) for part in parts):
            raise ModelError(
                f"its weights of {delta.target.module} are not all finite numbers; the file is damaged: delete the run "
                "and make it again."
            )


@torch.no_grad()
def _of_run(base: Base, saved: SavedRun) -> list[DeltaWeight]:
    model = base.base.model
    targets = all_targets(model, base.base.head, is_language=saved.config.dataset.task.is_language)
    if saved.is_model:
        other = Base(saved).base.model
        return _differences(targets, model, other)
    with restored(model):
        base.fit_head(saved)
        if saved.config.method.name == "lora":
            put_in(model, saved.weights_dir, saved.config, head=base.base.head)
            wholes = _wholes(model, base.base.head, is_language=saved.config.dataset.task.is_language)
            known = {(target.module, target.rows): target for target in (*wholes, *targets)}
            return [
                delta for name, layer in lora_layers(model) for delta in _of_layer(name, layer, known) if _acts(delta)
            ]
        before = {target: weight_of(model, target).clone() for target in targets}
        for parameter in model.parameters():  # what merges in place then does so in copies
            parameter.data = parameter.data.clone()
        put_in(model, saved.weights_dir, saved.config, head=base.base.head)
        merge_in(model, saved.config)
        return _differences(targets, before, model)


def _differences(
    targets: Sequence[Target], before: nn.Module | dict[Target, Tensor], after: nn.Module
) -> list[DeltaWeight]:
    found = []
    for target in targets:
        own = before[target] if isinstance(before, dict) else weight_of(before, target)
        found.append(DeltaWeight(target, own, dense=weight_of(after, target) - own))
    return [delta for delta in found if _acts(delta)]


def _acts(delta: DeltaWeight) -> bool:
    factors = (delta.dense,) if delta.dense is not None else (delta.low, delta.high)
    return all(factor is not None and bool(factor.any()) for factor in factors)


def _of_layer(name: str, layer: AdaptedLayer, known: dict[Any, Target]) -> Iterator[DeltaWeight]:
    base = layer.base_rows()
    whole = None
    if layer.length_ratios() is not None:  # DoRA: each row is scaled, so that the difference is no product
        whole = layer.delta_weight()
        whole = whole if isinstance(layer.base, nn.Linear) else whole.T
    for role, update in layer.updates().items():
        target = known.get((name, update.rows)) or Target(name, role or None, rows=update.rows)
        own = take_rows(base, update.rows).clone()
        if whole is not None:
            yield DeltaWeight(target, own, dense=take_rows(whole, update.rows).float())
            continue
        low, high = update.since_start()
        yield DeltaWeight(target, own, low=low.detach().clone(), high=update.scaling * high.detach())


# ---------------------------------------------------------------- matrices of a model


def all_targets(model: nn.Module, head: Sequence[str], *, is_language: bool) -> list[Target]:
    """Every matrix in the blocks of a model, by role; of a type that is not described, every linear layer.

    A matrix whose rows are several roles, as GPT-2's of queries, keys and values, is one target for each of them.
    """
    found: list[Target] = []
    config = cast(Any, model).config
    for target in _wholes(model, head, is_language=is_language):
        parts = ARCHITECTURES[config.model_type].parts if target.role is not None else {}
        own = {role: part for role, part in parts.items() if part.whole == target.role}
        found += [replace(target, role=role, rows=part.rows(config)) for role, part in own.items()] or [target]
    return found


def _wholes(model: nn.Module, head: Sequence[str], *, is_language: bool) -> list[Target]:
    """The matrices themselves."""
    config = cast(Any, model).config
    if config.model_type in ARCHITECTURES:
        return select_targets(
            [name for name, _ in model.named_modules()],
            model_type=config.model_type,
            config=config,
            projections=["all"],
            language_model=is_language,
            head=head,
        )
    inside = tuple(f"{module}." for module in head)
    return [
        Target(name)
        for name, module in model.named_modules()
        if is_linear(module) and not f"{name}.".startswith(inside)
    ]


def weight_of(model: nn.Module, target: Target) -> Tensor:
    """The weight of a target as `(out_features, in_features)`, in float32."""
    module = model.get_submodule(target.module)
    rows = module.base_rows() if isinstance(module, AdaptedLayer) else _rows(module)
    return take_rows(rows, target.rows)


def set_weight(model: nn.Module, target: Target, weight: Tensor) -> None:
    """Gives a target other values, in a separate tensor: inside `restored` the model has the old ones back after."""
    module: Any = model.get_submodule(target.module)
    rows = _rows(module)
    if target.rows is not None:
        weight = put_rows(rows, target.rows, weight.to(rows.device, rows.dtype))
    whole = weight if isinstance(module, nn.Linear) else weight.T
    module.weight.data = whole.to(module.weight.device, module.weight.dtype).contiguous()


def _rows(module: nn.Module) -> Tensor:
    features_of(module)  # refuses what is no matrix
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (weight.detach() if isinstance(module, nn.Linear) else weight.detach().T).float()
