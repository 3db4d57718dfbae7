"""One run, from a validated config to `result.json`: the only place that wires the modules together."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from harness.config.composing import to_dict
from harness.config.schema import RunConfig
from harness.config.validation import ConfigError
from harness.content.assets import AssetError
from harness.content.errors import ContentError, DataError, ModelError
from harness.content.identity import Identity, PlannedRun, identify
from harness.data.batches import TrainingBatches
from harness.folder import (
    Attempt,
    OutputError,
    attempt_dir,
    kept_result,
    require_writable,
    run_dir,
    settle,
)
from harness.measure.device import DeviceBusyError, is_out_of_memory
from harness.methods.flops import FlopsError, StepFlops, formula_flops
from harness.methods.lora import LoRAError
from harness.methods.peft_method import PeftMethodError
from harness.methods.rates import learning_rates
from harness.placement.architectures import PlacementError
from harness.placement.select import summary
from harness.prepare import KeptData, PreparedRun, prepare
from harness.processes.distributed import ProcessFailedError, all_reduce_sum, place_on_device
from harness.processes.preparation import PreparationError, preparation_of_a_run
from harness.processes.stopping import PreemptedError, StopRequest
from harness.results.claims import Claim, ClaimLostError
from harness.results.files import CONFIG_FILE, LOG_FILE
from harness.results.schema import RunResult, Status
from harness.save import save_weights
from harness.score import (
    score_after_training,
    score_before_training,
    score_earlier_tasks,
    score_generations,
    untrained_scores,
)
from harness.tasks.objective import Objective
from harness.tracking.tracker import open_tracker
from harness.training.callbacks import FollowerCallbacks, RunCallbacks
from harness.training.known_peaks import KnownPeaks
from harness.training.learner import TrainingDivergedError
from harness.training.ledger import Spending
from harness.training.loop import TrainingOutcome, train_in_turns
from harness.training.turns import Turns, drive_alone

logger = logging.getLogger("harness")
# What of the environment a run may find changed when it resumes; the result then lists all.
MADE_BY = ("git_commit", "git_dirty", "versions", "device_name")


# What a user can fix: each ends a run before training, with its message and no traceback.
USER_ERRORS = (
    ConfigError,
    PlacementError,
    LoRAError,
    PeftMethodError,
    ModelError,
    DataError,
    ContentError,
    AssetError,
    DeviceBusyError,
    OutputError,
    PreparationError,
    ProcessFailedError,
)


def run(config: RunConfig, identity: Identity | None = None) -> RunResult:
    """Runs one config and returns its result: `run_in_turns`, alone in its process."""
    stop = StopRequest()
    with stop.signals():
        return drive_alone(run_in_turns(config, identity, stop=stop))


def run_in_turns(
    config: RunConfig,
    identity: Identity | None = None,
    *,
    stop: StopRequest,
    num_packed: Callable[[], int] | None = None,
    kept_data: KeptData | None = None,
    known_peaks: KnownPeaks | None = None,
) -> Turns[RunResult]:
    """Runs one config and returns its result, which lies in `<runs_dir>/<run_id>/result.json`.

    A generator: it stops at each micro-batch of training (see `harness.training.turns`). `stop` is the request to stop.
    With `num_packed` the process is shared with other runs, and it gives how many trained together: what is measured of
    the whole process is left out. `kept_data` holds the datasets that those runs have read, and `known_peaks` the peak
    memory that they have measured.

    `identity` is what the run was planned as; without it, it is determined here. A run that has a result already (see
    `kept_result`) is not repeated; one that left a checkpoint resumes from it.
    A run that diverges, exhausts the memory or fails in training returns a result that says so. Where an earlier result
    stands (`rerun=all`), a failure is returned and that result stays in the folder.

    Raises:
        PreemptedError: SIGTERM came; the checkpoint is written, and there is no result.
        torch.OutOfMemoryError, MemoryError, RuntimeError: memory ran out beside other runs; there is no result, and the
            checkpoint stays.
        RunClaimedError: another process is computing this run.
        ClaimLostError: another process took the run over from this one, and its result is what counts.
        One of `USER_ERRORS`, with nothing written, for what can be known before training.
    """
    started = time.perf_counter()
    planned = PlannedRun(config, identity or identify(config))
    folder = run_dir(planned)
    kept = kept_result(planned)
    if kept is not None:
        logger.info("%s: %s already; rerun=all repeats it", kept.run_id, kept.status)
        return kept
    require_writable(config.runs_dir)
    with stop.interrupting("loading"), preparation_of_a_run() as preparation:
        prepared = prepare(config, planned.identity, kept_data=kept_data)
    prepared = replace(prepared, num_packed=num_packed, known_peaks=known_peaks)
    stop.share(prepared.accelerator)
    spending = Spending(started, prepared.accelerator.device, preparation, num_packed=num_packed)
    with prepared.companions.together(shared=(PreemptedError,)):
        if not prepared.accelerator.is_main_process:
            return (yield from _follow(prepared, folder, stop, spending))
        # Only now, when nothing is left to go wrong before training, does the run leave a trace.
        with Claim.acquire(folder) as claim:
            # The process that had the claim before may have ended the run while this process prepared.
            settle(folder)
            kept = kept_result(planned)
            all_reduce_sum([kept is not None], prepared.accelerator)  # which the others ask for
            if kept is None:
                attempt = Attempt.begin(planned, claim)
                with _logged_to(folder / LOG_FILE):
                    kept = yield from _run_claimed(prepared, attempt, stop, spending)
                attempt.end()
            claim.release(ended=True)
    return kept


def _follow(prepared: PreparedRun, folder: Path, stop: StopRequest, spending: Spending) -> Turns[RunResult]:
    """What the processes beside the main one do: the same training, and nothing written."""
    if any(all_reduce_sum([False], prepared.accelerator)):  # the main process has found a result
        kept = kept_result(PlannedRun(prepared.config, prepared.identity))
        assert kept is not None
        return kept
    prepared.accelerator.wait_for_everyone()
    directory = attempt_dir(folder)
    callbacks = FollowerCallbacks(directory, stop, spending, made_from=_made_from(prepared))
    prepared.accelerator.wait_for_everyone()  # the main process writes only after this one has read
    return (yield from _train_and_evaluate(prepared, directory, callbacks, stop, spending))


def _run_claimed(prepared: PreparedRun, attempt: Attempt, stop: StopRequest, spending: Spending) -> Turns[RunResult]:
    config = prepared.config
    (attempt.dir / CONFIG_FILE).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    logger.info("%s", prepared.identity.run_id)
    for role, those in summary(prepared.targets).items():
        logger.info("%s: %d adapters of rank %s", role, those["num_targets"], those.get("ranks", "none"))
    for kind in ("data_notes", "model_notes"):
        for note in cast(list[str], prepared.environment.get(kind, [])):
            logger.warning("%s", note)
    tracker = open_tracker(
        config.tracking,
        run_dir=attempt.dir,
        run_id=prepared.identity.run_id,
        cell_id=prepared.identity.cell_id,
        job_type=str(config.method.name),
        sweep=config.sweep,
        run_config=to_dict(config),
    )
    made_by = {name: value for name, value in prepared.environment.items() if name in MADE_BY}
    callbacks = RunCallbacks(config, attempt, tracker, stop, spending, made_from=_made_from(prepared), made_by=made_by)
    prepared.accelerator.wait_for_everyone()  # whatever an earlier attempt left is cleared
    prepared.accelerator.wait_for_everyone()  # and the others have read what is resumed
    try:
        result = yield from _train_and_evaluate(prepared, attempt.dir, callbacks, stop, spending)
        is_recorded = attempt.record(result)
        try:
            tracker.finish(result)
        except Exception:  # the result is on disk; what happens to its mirror cannot change that
            logger.warning("tracking did not end properly: %s", traceback.format_exc())
    finally:
        callbacks.close()
        tracker.close()
    logger.info("%s: %s %s", result.run_id, result.status, result.error or result.headline)
    if not is_recorded:
        logger.warning("%s: the earlier result stands, a failure does not replace it", result.run_id)
    return result


def _made_from(prepared: PreparedRun) -> dict[str, Any]:
    """What a checkpoint must have been made from to be of use to this run, each under its name in a message."""
    return {
        "settings or content (run id)": prepared.identity.run_id,
        "data": prepared.data.fingerprint,
        "numbers of training examples": len(prepared.data.train),
    }


def _train_and_evaluate(
    prepared: PreparedRun,
    directory: Path,
    callbacks: RunCallbacks | FollowerCallbacks,
    stop: StopRequest,
    spending: Spending,
) -> Turns[RunResult]:
    """Trains, scores, saves; whatever happens to training becomes a status. What an earlier attempt did is resumed."""
    config = prepared.config
    metrics: dict[str, float] = asdict(prepared.counts)
    status, error = Status.FINISHED, ""
    started_at = time.time()
    try:
        objective = prepared.family.build_objective(config, prepared.data, prepared.also, stop)
        place_on_device(prepared.model, prepared.accelerator, shard_model=config.shard_model)
        before = score_before_training(prepared, objective, callbacks, spending)
        metrics |= before
        untrained = untrained_scores(prepared, objective, callbacks, spending)
        outcome = yield from _train(prepared, objective, callbacks, spending, untrained=untrained)
        spending.end_training()
        metrics |= outcome.measured
        metrics |= score_after_training(prepared, objective, callbacks, outcome, before, folder=directory)
        stop.check("saving")
        prepared.companions.check()
        if config.save_weights:
            metrics["checkpoint_bytes"] = callbacks.once("save", lambda: save_weights(prepared, directory))
        with prepared.accelerator.autocast():
            metrics |= score_generations(prepared, directory, callbacks, stop)
        metrics |= score_earlier_tasks(prepared, callbacks, stop)
    except (PreemptedError, ClaimLostError):
        raise
    except TrainingDivergedError as problem:
        status, error = Status.DIVERGED, str(problem)
    except Exception as problem:
        if prepared.num_packed is not None and is_out_of_memory(problem):
            logger.warning("there was not enough memory beside the runs of its pack: %s", str(problem))
            raise
        status = Status.OUT_OF_MEMORY if is_out_of_memory(problem) else Status.FAILED
        error = f"{type(problem).__name__}: {problem}"
        cause = prepared.companions.report(problem, status=status)
        if cause is not None:
            status, error = Status(cause.status), f"process {cause.process}: {cause.error}"
        logger.error("%s", traceback.format_exc())
    metrics = callbacks.measured | metrics
    metrics |= spending.total()
    times = {"started_at": started_at, "first_step_at": callbacks.first_step_at, "ended_at": time.time()}
    recorded: dict[str, Any] = {name: value for name, value in times.items() if value is not None}
    if spending.packed is not None:
        recorded["packed"] = spending.packed
    if len(callbacks.made_by) > 1:
        recorded["made_by"] = callbacks.made_by
    return RunResult(
        run_id=prepared.identity.run_id,
        cell_id=prepared.identity.cell_id,
        sweep=config.sweep,
        status=status,
        error=error,
        config=to_dict(config),
        target_modules=[str(target) for target in prepared.targets],
        metrics=metrics,
        environment=prepared.environment | recorded,
    )


def _train(
    prepared: PreparedRun,
    objective: Objective,
    callbacks: RunCallbacks | FollowerCallbacks,
    spending: Spending,
    *,
    untrained: dict[str, float] | None,
) -> Turns[TrainingOutcome]:
    config = prepared.config
    batches = TrainingBatches(
        prepared.data.train,
        batch_size=config.trainer.batch_size,
        micro_batch_size=config.trainer.micro_batch_size,
        seed=config.seed,
        process_index=prepared.accelerator.process_index,
        num_processes=prepared.accelerator.num_processes,
    )
    # After everything is built, so that dropout draws the same numbers whatever the method drew before; and other ones
    # in each process.
    torch.manual_seed(config.seed + prepared.accelerator.process_index)
    return (
        yield from train_in_turns(
            prepared.model,
            batches,
            objective,
            config=config.trainer,
            accelerator=prepared.accelerator,
            callbacks=callbacks,
            flops=_step_flops(prepared, objective),
            rates=learning_rates(config, prepared.head),
            method=prepared.during_training,
            untrained=untrained,
            shares_process=lambda: spending.packed is not None,
            known_peaks=None if prepared.known_peaks is None else prepared.known_peaks.of(config),
        )
    )


def _step_flops(prepared: PreparedRun, objective: Objective) -> StepFlops | None:
    try:
        return formula_flops(prepared.model, whole_logits=objective.makes_whole_logits(prepared.model))
    except FlopsError as reason:
        logger.info("train_flops is not recorded: %s", reason)
        return None


# Which of a process's runs is at work: each has its own context (see `harness.training.packs`).
_LOG_PATH: ContextVar[Path | None] = ContextVar("log_path", default=None)


@contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """While inside, what the harness logs in this run's context goes into the file too."""
    before = _LOG_PATH.get()
    _LOG_PATH.set(path)
    handler = logging.FileHandler(path, mode="a", encoding="utf-8")
    handler.addFilter(lambda record: _LOG_PATH.get() in (path, None))  # None: of a thread, which has no context
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
        _LOG_PATH.set(before)
