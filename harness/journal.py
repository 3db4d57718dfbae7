"""What the trainer tells goes here: to the curves, the display, the claim's heartbeat, and the checkpoint file."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.checkpoint import read_checkpoint, write_checkpoint
from harness.config import RunConfig, run_id
from harness.evaluate import Evaluation
from harness.folder import CHECKPOINT_FILE, Attempt
from harness.tracking import NullProgress, Progress, Tracker, open_progress
from harness.trainer import Position, PreemptedError

logger = logging.getLogger("harness")


def _read(path: Path, made_from: Mapping[str, Any]) -> tuple[dict[str, Tensor], Position, dict[str, Any]] | None:
    """Tensors, position and the whole state of a checkpoint, if there is one of this run that can be read."""
    found = read_checkpoint(path)
    if found is None:
        return None
    tensors, state = found
    then = state.get("made_from", {})
    differing = [name for name, value in made_from.items() if then.get(name) != value]
    if differing:
        logger.warning("%s was made from other %s: the run starts over", path, ", ".join(differing))
        return None
    position = dict(state["position"])
    if position["best"] is not None:
        position["best"] = Evaluation(**position["best"])
    return tensors, Position(**position), state


class FollowingJournal:
    """The journal of a process beside the main one: it goes on from the same checkpoint, and tells nobody anything."""

    def __init__(self, run_dir: Path, *, made_from: Mapping[str, Any]) -> None:
        self._path = run_dir / CHECKPOINT_FILE
        self._made_from = made_from
        self.measured: dict[str, float] = {}
        self.first_step_at: float | None = None

    def last_checkpoint(self) -> tuple[dict[str, Tensor], Position] | None:
        """Reads the checkpoint of the main process."""
        found = _read(self._path, self._made_from)
        return None if found is None else found[:2]

    def started(self, num_steps: int, measured: dict[str, float]) -> None:
        """Nothing."""

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """Nothing."""

    def evaluated(self, step: int, scores: dict[str, float]) -> None:
        """Nothing."""

    def wants_checkpoint(self, step: int) -> bool:
        """Never: the main process wants it for all."""
        return False

    def keep_checkpoint(self, tensors: dict[str, Tensor], position: Position) -> None:
        """Nothing: the main process keeps it."""


class RunJournal:
    """The trainer's journal of one run.

    Curves get the mean loss since the last record, every `tracking.log_every` steps; scores come at once. A checkpoint
    holds the curve so far, so that a run that goes on leaves the same curve as an undisturbed one, and `made_from`,
    what the run is made from: a checkpoint that was made from anything else is not used.
    """

    def __init__(
        self, config: RunConfig, attempt: Attempt, tracker: Tracker, *, made_from: Mapping[str, Any]
    ) -> None:
        self._config = config
        self._made_from = dict(made_from)
        self._path = attempt.dir / CHECKPOINT_FILE
        self._tracker = tracker
        self._claim = attempt.claim
        self._progress: Progress = NullProgress()
        self._losses: list[float] = []
        self._rows: list[tuple[int, dict[str, float]]] = []
        self._num_steps = 0
        self._stop_wanted = False
        self.measured: dict[str, float] = {}
        self.resumed_at_step = 0
        self.first_step_at: float | None = None

    def ask_to_stop(self) -> None:
        """After the step that is being made, writes a checkpoint and ends the run as preempted."""
        self._stop_wanted = True

    def last_checkpoint(self) -> tuple[dict[str, Tensor], Position] | None:
        """Reads the checkpoint and hands its curve to the trackers again."""
        found = _read(self._path, self._made_from)
        if found is None:
            return None
        tensors, position, state = found
        self._losses = list(state["losses"])
        for step, values in state["rows"]:
            self._log(step, values)
        self.resumed_at_step = position.step
        return tensors, position

    def started(self, num_steps: int, measured: dict[str, float]) -> None:
        """Opens the display; keeps what was measured for a run that does not finish."""
        self._num_steps = num_steps
        self.measured = measured
        self.first_step_at = time.time()
        self._progress = open_progress(self._config.tracking, total_steps=num_steps, description=run_id(self._config))
        if self.resumed_at_step:
            self._progress.note(f"goes on from its checkpoint at step {self.resumed_at_step}")

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """Shows the step, and records every `log_every`-th and the last."""
        (loss_name, loss), *rest = values.items()
        tokens_per_second = values["train_tokens_per_second"]
        self._progress.update(step, loss, tokens_per_second)
        self._claim.report(
            {
                "step": step,
                "num_steps": self._num_steps,
                "loss": loss,
                "tokens_per_second": tokens_per_second,
                "seconds_left": self._seconds_left(step),
            }
        )
        self._losses.append(loss)
        if step % self._config.tracking.log_every == 0 or step == self._num_steps:
            self._log(step, {loss_name: sum(self._losses) / len(self._losses), **dict(rest)})
            self._losses.clear()

    def evaluated(self, step: int, scores: dict[str, float]) -> None:
        """Records and shows scores on the validation split."""
        named = {f"val_{name}": value for name, value in scores.items()}
        self._log(step, named)
        self._progress.note(f"step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in named.items()))

    def wants_checkpoint(self, step: int) -> bool:
        """Every `trainer.checkpoint_every` steps, and when asked to stop."""
        every = self._config.trainer.checkpoint_every
        return self._stop_wanted or (every > 0 and step % every == 0)

    def keep_checkpoint(self, tensors: dict[str, Tensor], position: Position) -> None:
        """Replaces the checkpoint file. Raises `PreemptedError` when the run was asked to stop."""
        self._claim.check()
        state: dict[str, Any] = {
            "made_from": self._made_from,
            "position": asdict(position),
            "losses": self._losses,
            "rows": self._rows,
        }
        write_checkpoint(self._path, tensors, state)
        if self._stop_wanted:
            raise PreemptedError(f"stopped after step {position.step}; its checkpoint is {self._path}.")

    def close(self) -> None:
        """Ends the display."""
        self._progress.close()

    def _seconds_left(self, step: int) -> float:
        assert self.first_step_at is not None
        seconds_per_step = (time.time() - self.first_step_at) / (step - self.resumed_at_step)
        return seconds_per_step * (self._num_steps - step)

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self._rows.append((step, dict(values)))
        self._tracker.log(step, values)
