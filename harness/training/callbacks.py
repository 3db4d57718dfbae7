"""Training callbacks: from the loop to the curves, the display, the claim's heartbeat and the checkpoint file."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.config.schema import RunConfig
from harness.folder import Attempt
from harness.processes.stopping import PreemptedError, StopRequest
from harness.results.files import CHECKPOINT_FILE, PHASES_FILE
from harness.tasks.objective import Evaluation
from harness.tracking.progress import NullProgress, Progress, open_progress
from harness.tracking.tracker import Tracker
from harness.training.checkpoint import read_checkpoint, write_checkpoint
from harness.training.learner import Position
from harness.training.ledger import Ledger, Spending

logger = logging.getLogger("harness")

_LAST_SCORES = "score val last"
# The phase in which what is predicted on val is kept, whether there is anything to keep or not.
VAL_PREDICTIONS = "predictions val"
# What a checkpoint says beside the position.
_STATE = ("losses", "rows", "spent", "id", "made_by")


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
    try:
        evaluations = {name: _evaluation(state["position"][name]) for name in ("best", "last")}
        return tensors, Position(**state["position"] | evaluations), {name: state[name] for name in _STATE}
    except (KeyError, TypeError):
        logger.warning("%s was written by another version: the run starts over", path)
        return None


def _start(made_from: Mapping[str, Any]) -> str:
    """Names what the phases before training are computed from; those after it have the id of the trained state."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def _evaluation(values: dict[str, Any] | None) -> Evaluation | None:
    if values is None:
        return None
    return Evaluation(values["scores"], -math.inf if values["objective"] is None else values["objective"])


def _as_values(evaluation: Evaluation | None) -> dict[str, Any] | None:
    """As JSON, which has no infinity."""
    if evaluation is None:
        return None
    has_objective = evaluation.objective != -math.inf
    return {"scores": evaluation.scores, "objective": evaluation.objective if has_objective else None}


def _last_scores(ledger: Ledger, trained: str) -> Evaluation | None:
    """The scores of the last step on val. Until what was predicted there is kept, they have to be computed again."""
    is_kept = ledger.find(trained, VAL_PREDICTIONS) is not None
    return _evaluation(ledger.find(trained, _LAST_SCORES)) if is_kept else None


class FollowerCallbacks:
    """The callbacks of a process beside the main one: it resumes from the same checkpoint, and reports nothing."""

    def __init__(
        self, attempt_dir: Path, stop: StopRequest, spending: Spending, *, made_from: Mapping[str, Any]
    ) -> None:
        self._path = attempt_dir / CHECKPOINT_FILE
        self._made_from = made_from
        self._stop = stop
        self._ledger = Ledger(attempt_dir / PHASES_FILE, spending, is_writer=False)
        self._trained: str | None = None
        self.made_by: list[dict[str, Any]] = []
        self.measured: dict[str, float] = {}
        self.first_step_at: float | None = None

    def once(self, phase: str, compute: Callable[[], Any]) -> Any:
        """The result of a phase: see `RunCallbacks.once`."""
        return self._ledger.once(self._trained or _start(self._made_from), phase, compute)

    def last_checkpoint(self) -> tuple[dict[str, Tensor], Position] | None:
        """Reads the checkpoint of the main process."""
        found = _read(self._path, self._made_from)
        if found is None:
            return None
        tensors, position, state = found
        self._trained = state["id"]
        if self._trained is not None:
            position.last = _last_scores(self._ledger, self._trained)
        return tensors, position

    def started(self, num_steps: int, measured: dict[str, float]) -> None:
        """Nothing, unless all are to stop."""
        self._stop.check("rehearsing")

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """Nothing."""

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Nothing."""

    def wants_checkpoint(self, step: int) -> bool:
        """Never: the main process wants it for all."""
        return False

    def keep_checkpoint(self, tensors: dict[str, Tensor], position: Position) -> None:
        """The main process keeps it; all stop together."""
        self._stop.check("training")


class RunCallbacks:
    """The training callbacks of one run.

    Curves get the mean loss since the last record, every `tracking.log_every` steps; scores come at once. A checkpoint
    holds the curve so far, so that a run that resumes leaves the same curve as an undisturbed one, and `made_from`,
    what the run is made from: a checkpoint that was made from anything else is not used. `made_by` is the code and the
    device that compute; where a run resumes with others, it lists them all.
    """

    def __init__(
        self,
        config: RunConfig,
        attempt: Attempt,
        tracker: Tracker,
        stop: StopRequest,
        spending: Spending,
        *,
        made_from: Mapping[str, Any],
        made_by: Mapping[str, Any],
    ) -> None:
        self._config = config
        self._run_id = attempt.folder.name
        self._made_from = dict(made_from)
        self.made_by = [dict(made_by)]
        self._path = attempt.dir / CHECKPOINT_FILE
        self._tracker = tracker
        self._claim = attempt.claim
        self._stop = stop
        self._spending = spending
        self._ledger = Ledger(attempt.dir / PHASES_FILE, spending)
        self._trained: str | None = None
        self._progress: Progress = NullProgress()
        self._losses: list[float] = []
        self._rows: list[tuple[int, dict[str, float]]] = []
        self._num_steps = 0
        self.measured: dict[str, float] = {}
        self.resumed_at_step = 0
        self.first_step_at: float | None = None

    def once(self, phase: str, compute: Callable[[], Any]) -> Any:
        """The result of a phase beside the steps, as JSON values: from an earlier attempt, or computed now and kept.

        Raises `ClaimLostError` when the run is another process's by now.
        """
        self._claim.check()
        return self._ledger.once(self._trained or _start(self._made_from), phase, compute)

    def last_checkpoint(self) -> tuple[dict[str, Tensor], Position] | None:
        """Reads the checkpoint and hands its curve to the trackers again."""
        found = _read(self._path, self._made_from)
        if found is None:
            return None
        tensors, position, state = found
        self._trained = state["id"]
        self._spending.resume(state["spent"], has_trained=True)
        self._losses = list(state["losses"])
        for step, values in state["rows"]:
            self._log(step, values)
        self.resumed_at_step = position.step
        if state["made_by"][-1] != self.made_by[-1]:
            logger.warning("%s was made by other code, other versions or on another device", self._path)
            self.made_by = [*state["made_by"], *self.made_by]
        else:
            self.made_by = state["made_by"]
        if self._trained is not None:
            position.last = _last_scores(self._ledger, self._trained)
        logger.info("resumes from its checkpoint at step %d", position.step)
        return tensors, position

    def started(self, num_steps: int, measured: dict[str, float]) -> None:
        """Opens the display; keeps what was measured for a run that does not finish."""
        self._num_steps = num_steps
        self.measured = measured
        self.first_step_at = time.time()
        self._progress = open_progress(self._config.tracking, total_steps=num_steps, description=self._run_id)
        self._spending.begin_training()
        self._stop.check("rehearsing")

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

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Records and shows scores on the validation split."""
        if self._trained is not None:
            self._ledger.once(self._trained, _LAST_SCORES, lambda: _as_values(evaluation))
        named = {f"val_{name}": value for name, value in evaluation.scores.items()}
        self._log(step, named)
        self._progress.note(f"step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in named.items()))

    def wants_checkpoint(self, step: int) -> bool:
        """Every `trainer.checkpoint_every` steps, and when asked to stop."""
        every = self._config.trainer.checkpoint_every
        return self._stop.was_heard or (every > 0 and step % every == 0)

    def keep_checkpoint(self, tensors: dict[str, Tensor], position: Position) -> None:
        """Replaces the checkpoint file. Raises `PreemptedError` when the run was asked to stop.

        A disk that is full does not end the run, which may still finish.
        """
        self._claim.check()
        if position.measured:
            self._trained = uuid.uuid4().hex
        evaluations = {"best": _as_values(position.best), "last": _as_values(position.last)}
        state: dict[str, Any] = {
            "made_from": self._made_from,
            "position": asdict(replace(position, best=None, last=None)) | evaluations,
            "losses": self._losses,
            "rows": self._rows,
            "spent": self._spending.so_far(),
            "id": self._trained,
            "made_by": self.made_by,
        }
        try:
            write_checkpoint(self._path, tensors, state)
        except OSError as error:
            logger.warning("%s cannot be written (%s): this state is not kept", self._path, error)
        if self._stop.is_asked():
            raise PreemptedError(f"stopped after step {position.step}; its checkpoint is {self._path}.")

    def close(self) -> None:
        """Ends the display."""
        self._progress.close()

    def _seconds_left(self, step: int) -> float:
        assert self.first_step_at is not None
        seconds_per_step = (time.time() - self.first_step_at) / max(1, step - self.resumed_at_step)
        return seconds_per_step * (self._num_steps - step)

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self._rows.append((step, dict(values)))
        self._tracker.log(step, values)
