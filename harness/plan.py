"""A config resolved against shapes: which modules get an adapter, and what they count, without a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness.config.schema import Blocks, Dtype, Optimizer, Quantization, RunConfig, Task
from harness.config.validation import ConfigError
from harness.content.files import base_model, continued_adapter
from harness.methods import peft_method
from harness.methods.counts import ParameterCounts, count_parameters, set_trainable
from harness.methods.lora import features_of, is_linear
from harness.methods.peft_files import start_from_adapter
from harness.methods.rates import learning_rates
from harness.methods.registry import find_method_module, is_adapter
from harness.models.configs import build_skeleton, task_head
from harness.models.loading import PreTrainedModel
from harness.placement.architectures import ARCHITECTURES
from harness.placement.ranks import ranks_of
from harness.placement.select import Target, count_blocks, select_targets
from harness.results.methods import METHODS
from harness.tracking.tracker import require_trackers
from harness.training.optimizer import hidden_matrices


@dataclass(frozen=True)
class Plan:
    """What a config resolves to on its model, known without loading a weight.

    `least_bytes`: of weights, gradients and optimizer state alone; a step needs more.
    """

    targets: list[Target]
    num_adapter_params: int
    least_bytes: int = 0


def plan(config: RunConfig) -> Plan:
    """Resolves the placement and counts the adapter on the meta device.

    Raises `PlacementError`, `LoRAError`, `PeftMethodError` or `ModelError` for a placement or rank that the model does
    not allow, `ConfigError` for a tracker that is not installed.
    """
    require_trackers(config.tracking)
    adapted = adapted_skeleton(config)
    counts = count_parameters(adapted.model, adapted.head, is_adapter=is_adapter(adapted.model, config))
    return Plan(adapted.targets, counts.num_adapter_params, _least_bytes(config, counts))


def _least_bytes(config: RunConfig, counts: ParameterCounts) -> int:
    """Frozen weights as they are held; what trains, and its gradient, in float32, and the two moments of AdamW."""
    is_quantized = config.model.quantization is not Quantization.none
    frozen = 0.5 if is_quantized else 4 if config.model.dtype is Dtype.float32 else 2
    moments = 8 if config.trainer.optimizer is Optimizer.adamw else 0
    num_trained = counts.num_trainable_params
    return int(frozen * (counts.num_total_params - num_trained)) + (8 + moments) * num_trained


@dataclass(frozen=True)
class AdaptedSkeleton:
    """A model on the meta device with the method applied, its task head's modules, and what got an adapter."""

    model: PreTrainedModel
    head: tuple[str, ...]
    targets: list[Target]


def head_outputs(config: RunConfig, num_labels: int) -> int | None:
    """Outputs of a run's task head: `num_labels` of them, one for a regression, None without a head."""
    task = config.dataset.task
    return None if task.is_language else 1 if task is Task.regression else num_labels


def adapted_skeleton(config: RunConfig, *, num_labels: int = 2) -> AdaptedSkeleton:
    """The model of a run without a weight; its task head is as `head_outputs` says. Raises as `plan`."""
    labels = head_outputs(config, num_labels)
    skeleton = build_skeleton(base_model(config), num_labels=labels)
    require_packing(skeleton.config.model_type, config)
    head = task_head(skeleton.config, labels)
    return AdaptedSkeleton(skeleton, head, adapt(skeleton, config, head))


def require_packing(model_type: str, config: RunConfig) -> None:
    """Raises `ConfigError` when packed blocks would attend across documents on this model."""
    for setting, dataset in (("dataset", config.dataset), *config.evaluate_also.items()):
        isolated = dataset.blocks is Blocks.packed and not dataset.attend_across_documents
        # Flash attention reads packing from positions only in batches of one.
        known = ARCHITECTURES.get(model_type)
        packs = known is not None and known.packs_by_positions and config.model.attention in ("sdpa", "eager")
        if dataset.task is Task.causal_lm and isolated and not packs:
            raise ConfigError(
                [
                    f"{setting}.blocks=packed: a {model_type} model with model.attention={config.model.attention} "
                    f"would attend across documents; set model.attention=sdpa where the model allows packing, "
                    f"{setting}.blocks=cut, or say that it may with {setting}.attend_across_documents=true."
                ]
            )


def adapt(model: PreTrainedModel, config: RunConfig, head: tuple[str, ...]) -> list[Target]:
    """Applies the method to a model, real or meta, whose head is `head`; returns what got an adapter."""
    targets: list[Target] = []
    method = find_method_module(config.method.name)
    names = [name for name, _ in model.named_modules()]
    model_type = model.config.model_type
    if config.target_layers is not None:
        targets = select_targets(
            names,
            model_type=model_type,
            config=model.config,
            projections=config.target_layers.projections,
            blocks=config.target_layers.blocks,
            stacks=config.target_layers.stacks,
            modules=config.target_layers.modules,
            language_model=config.dataset.task.is_language,
            head=head,
            linear={name: features_of(module) for name, module in model.named_modules() if is_linear(module)},
        )
    if config.rank is not None:
        pattern = config.rank.pattern or {}
        num_blocks = count_blocks(names, model_type=model_type) if pattern else {}
        ranks = ranks_of(targets, rank=config.rank.rank, pattern=pattern, num_blocks=num_blocks)
        targets = [replace(target, rank=rank) for target, rank in zip(targets, ranks, strict=True)]
    method.adapt(model, targets, config)
    adapter = continued_adapter(config)
    if adapter is not None:
        named = "adapter" if config.model.adapter is not None else "from_sweep"
        setting = f"model.{named}={getattr(config.model, named)}"
        start_from_adapter(model, adapter.weights_dir, named=setting, head=head)
    if METHODS[config.method.name].peft is not None:
        # Those of `method.peft.target_modules`, too.
        known, ranks = {target.module: target for target in targets}, peft_method.ranks_of(model)
        adapted = [known.get(name) or Target(name) for name in peft_method.adapted_modules(model)]
        targets = [replace(target, rank=ranks.get(target.module, target.rank)) for target in adapted]
    trains_base = METHODS[config.method.name].trains_base
    set_trainable(model, head, is_adapter=is_adapter(model, config), trains_base=trains_base)
    if config.trainer.optimizer is Optimizer.muon and not hidden_matrices(model, learning_rates(config, head)):
        raise ConfigError(
            [
                f"trainer.optimizer=muon: method={config.method.name} trains no hidden matrix of {config.model.name}, "
                "and Muon updates nothing else; use trainer.optimizer=adamw."
            ]
        )
    return targets
