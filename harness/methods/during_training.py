"""What a method does at the steps of training beside having parameters that train. Most methods do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class DuringTraining(Protocol):
    """The part that a method takes in training, by which the loop needs to know no method.

    A method's module that has one has a function `during_training(model, config, num_steps)` that builds it and raises,
    before the first step, where the number of steps does not suit it.
    """

    def add_to_loss(self, loss: Tensor, *, share: float) -> Tensor:
        """The loss that is minimised, once a step: the mean over its targets plus `share` of what the method adds."""
        ...

    def stepped(self, step: int) -> None:
        """The optimizer has made step `step`, counted from 1; the gradients are still there. Not called in rehearsals.

        The same in all processes.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """What must be in a checkpoint beside the trained parameters for training to continue as if never stopped."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` returned."""
        ...


class Nothing:
    """What a method does whose parameters are trained and that is all."""

    def add_to_loss(self, loss: Tensor, *, share: float) -> Tensor:
        """The loss itself."""
        return loss

    def stepped(self, step: int) -> None:
        """Nothing."""

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""
