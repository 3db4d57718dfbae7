"""Printed parameter counts held against the model: what the formula gives, and what simple variants of it give.

Models are built from parts of a config.json, on the meta device. An entry is counted as a run is: the method is
applied, and the shapes of what trains are added up. Variants are arithmetic on the same shapes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from harness.config.schema import ModelConfig, RunConfig
from harness.forecast.parameters import size_of
from harness.forecast.request import ForecastError, explained, read_config
from harness.methods.adapting import remove_lora
from harness.methods.counts import count_parameters, is_bias, is_head
from harness.methods.lora import features_of
from harness.models.configs import build_skeleton, task_head, write_config
from harness.models.loading import PreTrainedModel
from harness.placement.architectures import PlacementError
from harness.placement.select import Target, select_targets
from harness.plan import adapt

# Placements and ranks that papers name.
PLACEMENTS = {
    **{name: [*name] for name in ("q", "k", "v", "o", "qk", "qv", "qkv", "qkvo")},
    **{name: [name] for name in ("attention", "mlp", "all")},
}
RANKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)

# What stands in for the rest of a run; a config.json takes the place of its model.
_CLASSIFIER = ("model=tiny_bert", "dataset=reuters_r8")
_LANGUAGE_MODEL = ("model=tiny_llama", "dataset=friends")
# Of a model in the file and of no config.json: outputs of a task head; without it a language model.
_LABELS = "labels"


class Entry(Protocol):
    """What is counted: a method on a model, with its placement and rank where it has them, with or without the head."""

    @property
    def model(self) -> str:
        """One of the models."""

    @property
    def method(self) -> str:
        """One of ours."""

    @property
    def target_layers(self) -> str | None:
        """A preset."""

    @property
    def rank(self) -> int | None:
        """Of the method."""

    @property
    def head(self) -> bool:
        """Whether the task head is counted in."""


@dataclass(frozen=True)
class _Model:
    skeleton: PreTrainedModel
    head: tuple[str, ...]
    config: ModelConfig
    num_labels: int | None

    @property
    def num_head_params(self) -> int:
        parameters = self.skeleton.named_parameters()
        return sum(parameter.numel() for name, parameter in parameters if is_head(name, self.head))


class Auditor:
    """Counts entries of models that are given as parts of a config.json, by name; a context.

    Inside `harness.forecast.request.own_configs`. A model is built once.

    Args:
        models: `model_type` and what else of its config.json is not transformers' default, or `path` to a folder with
            one; and `labels`, the outputs of a task head.
        folder: what a relative `path` is relative to.
    """

    def __init__(self, models: Mapping[str, Mapping[str, Any]], *, folder: Path) -> None:
        self._models, self._folder = models, folder
        self._stack = ExitStack()
        self._built: dict[str, _Model] = {}
        self._composed = cache(_compose)

    def __enter__(self) -> Auditor:
        self._scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def count(self, entry: Entry) -> int:
        """What trains: adapter, biases or the whole base, and the head only where the entry says so.

        Raises `ForecastError` for what the model or the method does not allow.
        """
        model = self._model(entry.model)
        config = self._config(entry, model)
        head = model.num_head_params if entry.head else 0
        if entry.method != "lora":
            counts = size_of(config, num_labels=model.num_labels or 2).counts
            return counts.num_trainable_params - counts.num_head_params + head
        with explained():
            # The skeleton is that of all entries: what is put in is taken out again.
            try:
                adapt(model.skeleton, config, model.head)
                return count_parameters(model.skeleton, model.head).num_adapter_params + head
            finally:
                remove_lora(model.skeleton)

    def variants(self, entry: Entry) -> Iterator[tuple[str, int]]:
        """Simple variants of an entry, each with what it counts: head, A or B alone, biases, rank, placement."""
        model, own = self._model(entry.model), self.count(entry)
        head = model.num_head_params
        if head:
            yield ("without the head", own - head) if entry.head else ("with the head", own + head)
        biases = [
            (name.rpartition(".")[0], parameter.numel())
            for name, parameter in model.skeleton.named_parameters()
            if is_bias(name) and not is_head(name, model.head)
        ]
        if entry.method != "lora":
            return
        if biases:
            yield "with all biases of the base", own + sum(size for _, size in biases)
        assert entry.rank is not None
        config = self._config(entry, model)
        assert config.target_layers is not None
        counted = head if entry.head else 0
        targets = self._targets(model, config.target_layers.projections, config)
        shapes = _shapes(model, targets)
        adapted = {target.module for target in targets}
        of_adapted = sum(size for module, size in biases if module in adapted)
        if of_adapted:
            yield "with the biases of the adapted matrices", own + of_adapted
        yield "A alone, without B", counted + entry.rank * sum(low for low, _ in shapes)
        yield "B alone, without A", counted + entry.rank * sum(high for _, high in shapes)
        for rank in RANKS:
            if rank != entry.rank:
                yield f"rank {rank}", counted + rank * _per_rank(shapes)
        placements = dict(PLACEMENTS)
        own_projections = config.target_layers.projections
        for more, words in (("lm_head", "the unembedding"), ("embedding", "the embeddings")):
            placements[f"{entry.target_layers} and {words}"] = [*own_projections, more]
        seen = {tuple(sorted(shapes))}
        for name, projections in placements.items():
            try:
                found = tuple(sorted(_shapes(model, self._targets(model, projections, config))))
            except PlacementError:
                continue
            if found not in seen:
                seen.add(found)
                yield f"on {name}", counted + entry.rank * _per_rank(found)

    def _model(self, name: str) -> _Model:
        if name not in self._built:
            values = dict(self._models[name])
            labels = values.pop(_LABELS, None)
            if labels is not None and (not isinstance(labels, int) or isinstance(labels, bool) or labels < 1):
                raise ForecastError(f"models.{name}: labels: {labels!r} must be a whole number, at least 1.")
            folder = self._folder / str(values["path"]) if "path" in values else self._scratch / name
            with explained():
                if "path" not in values:
                    write_config(folder, values, named=f"models.{name}")
                config = ModelConfig(name=name, path=str(folder), attention="eager")
                try:
                    skeleton = build_skeleton(config, num_labels=labels)
                except (TypeError, AttributeError, ZeroDivisionError, RuntimeError) as error:
                    # Of values that no model can be built of, as a width of 'wide'.
                    raise ForecastError(f"models.{name}: no model can be built of these values: {error}") from error
                head = task_head(skeleton.config, labels)
            self._built[name] = _Model(skeleton, head, config, labels)
        return self._built[name]

    def _config(self, entry: Entry, model: _Model) -> RunConfig:
        stands_in = _LANGUAGE_MODEL if model.num_labels is None else _CLASSIFIER
        config = self._composed(stands_in, entry.method, entry.target_layers, entry.rank is not None)
        rank = None if config.rank is None or entry.rank is None else config.rank.at(entry.rank)
        return replace(config, model=model.config, rank=rank)

    @staticmethod
    def _targets(model: _Model, projections: Sequence[str], config: RunConfig) -> list[Target]:
        placed = config.target_layers
        assert placed is not None
        return select_targets(
            [name for name, _ in model.skeleton.named_modules()],
            model_type=model.skeleton.config.model_type,
            config=model.skeleton.config,
            projections=projections,
            blocks=placed.blocks,
            stacks=placed.stacks,
            language_model=model.num_labels is None,
            head=model.head,
        )


def _compose(stands_in: Sequence[str], method: str, target_layers: str | None, has_rank: bool) -> RunConfig:
    placed = [] if target_layers is None else [f"target_layers={target_layers}"]
    return read_config([*stands_in, f"method={method}", *(["rank=r8"] if has_rank else []), *placed])


def _shapes(model: _Model, targets: Sequence[Target]) -> list[tuple[int, int]]:
    modules = dict(model.skeleton.named_modules())
    return [features_of(modules[target.module], rows=target.rows) for target in targets]


def _per_rank(shapes: Sequence[tuple[int, int]]) -> int:
    return sum(low + high for low, high in shapes)
