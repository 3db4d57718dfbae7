"""What a method's module provides, and where to find it by the method's name.

To the trainer methods differ in which parameters have `requires_grad` (`set_trainable`), and in what a few of them do
at a step (`harness.methods.during_training`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from torch import nn

from harness.config.schema import RunConfig
from harness.methods.during_training import DuringTraining, Nothing
from harness.models.loading import BaseModel, PreTrainedModel
from harness.models.tokenizers import PreTrainedTokenizerBase
from harness.placement.select import Target
from harness.results.methods import METHODS


@dataclass(frozen=True)
class TrainedModel:
    """What there is to save: a model that was adapted and trained, and what belongs to it.

    `base` is the base model as it was loaded (the same object as `model`, with where it came from); `head` names the
    modules of the task head; `label_names` are the classes in the order of the logits, none for other tasks.
    """

    config: RunConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: BaseModel
    head: tuple[str, ...]
    label_names: list[str]


class MethodModule(Protocol):
    """The functions of a method's module."""

    def adapt(self, model: nn.Module, targets: Sequence[Target], config: RunConfig) -> None:
        """Puts what the method adds into a model, real or on the meta device; the same for a seed, whatever was drawn.

        `targets` is empty for a method without placement, and has ranks for one with a rank.
        """
        ...

    def is_adapter(self, name: str) -> bool:
        """Whether a parameter of this name is the method's: it trains, and is counted as adapter.

        The method added it, or it is one of the base model's that the method trains (`trains_part_of_base`).
        """
        ...

    def save(self, trained: TrainedModel, directory: Path) -> int:
        """Writes what was trained into `directory`; returns the bytes of the tensor files."""
        ...


class PartlyOfBase(Protocol):
    """The function of a method's module where settings decide which of the base's own parameters train, too."""

    def is_adapter_in(self, model: nn.Module) -> Callable[[str], bool]:
        """What `is_adapter` is in a model that `adapt` has adapted."""
        ...


class SavedMethod(Protocol):
    """The functions of a method's module that `evaluate=` and `export=` need; without them a run trains all the same.

    Where what a run saved is a whole model, `load` is not asked for.
    """

    def load(self, model: nn.Module, directory: Path, config: RunConfig, *, head: Sequence[str]) -> None:
        """Puts what `save` wrote into a base model as it was loaded, whose head has the right shape.

        A parameter may be given another tensor; into the one that it has, nothing may be written.
        """
        ...

    def merge(self, model: nn.Module) -> None:
        """Makes a plain model, without an adapter, of what `load` left."""
        ...


def find_method_module(name: str) -> MethodModule:
    """The module of a method, by the method's name in `METHODS`."""
    return cast(MethodModule, importlib.import_module(METHODS[name].module))


def is_adapter(model: nn.Module, config: RunConfig) -> Callable[[str], bool]:
    """Says of a parameter of an adapted model, by its name, whether it is the method's (`MethodModule.is_adapter`)."""
    module = find_method_module(config.method.name)
    build = getattr(module, "is_adapter_in", None)
    return module.is_adapter if build is None else cast(Callable[[str], bool], build(model))


def during_training(model: nn.Module, config: RunConfig, num_steps: int) -> DuringTraining:
    """What the method does at the steps of training: what its module says, or nothing."""
    build = getattr(find_method_module(config.method.name), "during_training", None)
    return Nothing() if build is None else cast(DuringTraining, build(model, config, num_steps))
