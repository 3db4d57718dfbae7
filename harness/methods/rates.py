"""The learning rate of each kind of parameter: an adapter's A and B, the task head, what is the base model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from harness.config.schema import RunConfig
from harness.methods.counts import is_head, is_lora


class Kind(StrEnum):
    """What a parameter is to a method."""

    A = "A"  # and DoRA's magnitudes
    B = "B"
    HEAD = "head"
    BASE = "base"


@dataclass(frozen=True)
class LearningRates:
    """`of_kind`: the learning rates after warm-up. `head_modules`: those of the task head, by which it is known."""

    of_kind: Mapping[Kind, float]
    head_modules: Sequence[str] = ()

    def kind(self, name: str) -> Kind:
        """The kind of the parameter of this name."""
        if is_head(name, self.head_modules):
            return Kind.HEAD
        if is_lora(name):
            return Kind.B if name.endswith("lora_B") else Kind.A
        return Kind.BASE


def learning_rates(config: RunConfig, head_modules: Sequence[str]) -> LearningRates:
    """The rates of a run, each after warm-up; all follow one schedule.

    The curve and the tables show `trainer.learning_rate`, that of every kind that has none of its own.
    """
    trainer = config.trainer
    own = {
        Kind.A: trainer.learning_rate_A,
        Kind.B: trainer.learning_rate_B,
        Kind.HEAD: trainer.learning_rate_head,
        Kind.BASE: trainer.learning_rate_base,
    }
    rates = {kind: trainer.learning_rate if rate is None else rate for kind, rate in own.items()}
    if config.variant.learning_rate_ratio != 1:  # validation refuses a rate of B beside it
        rates[Kind.B] = rates[Kind.A] * config.variant.learning_rate_ratio
    return LearningRates(rates, head_modules)
