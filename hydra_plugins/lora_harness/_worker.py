"""What happens inside the process of one run, under every launcher."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.config.schema import RunConfig
    from harness.content.identity import PlannedRun
    from harness.results.schema import RunResult, Status
    from harness.training.turns import Turns

# How a run can end beside the statuses of the results contract; it has no result then.
NOT_FINISHED = "not finished"
CLAIMED = "claimed"
NO_ROOM = "no room"

# What a process says that is about to time steps.
READY = "ready"


@dataclass(frozen=True)
class Outcome:
    """What became of a run: a status of the results contract, or that it has no result.

    Then it is `not finished` (stopped), `claimed` (by another) or `no room` (beside the other runs of its pack).

    `headline`: its result in one line. `was_kept`: nothing was computed, because the run had a result already.
    """

    status: str
    error: str = ""
    was_kept: bool = False
    headline: str = ""


def outcome_of(result: RunResult, *, was_kept: bool = False) -> Outcome:
    """What a result says of its run."""
    return Outcome(str(result.status), result.error, was_kept, result.headline)


def compute(planned: PlannedRun) -> Outcome:
    """Computes one run in this process, without a progress display.

    A run that cannot even begin (data that cannot be used, a model that cannot be had) leaves a failed result with the
    message: in a sweep it is a row like any other.
    """
    from harness.extensions import load_extensions
    from harness.run import run

    load_extensions()
    planned = _quiet(planned)
    try:
        result = run(planned.config, planned.identity)
    except Exception as error:
        return _outcome_of_error(planned, error)
    return outcome_of(result)


def compute_pack(runs: Sequence[PlannedRun], *, size: int | None, report: Callable[[str, Outcome], None]) -> None:
    """Computes runs in packs of `size` in this process, and reports each by its run id once it has ended.

    Without a size the pack grows while that makes it faster. A run that finds too little memory beside others leaves no
    result, and is reported as `NO_ROOM`.

    Otherwise as `compute`.
    """
    from harness.config.schema import Precision
    from harness.extensions import load_extensions
    from harness.measure.device import is_out_of_memory
    from harness.prepare import KeptData
    from harness.processes.stopping import StopRequest
    from harness.run import run_in_turns
    from harness.training.known_peaks import KnownPeaks
    from harness.training.pack_size import Growing
    from harness.training.packs import HALF_TOLERANCE, TOLERANCE, Pack

    load_extensions()
    stop, kept_data, known_peaks = StopRequest(), KeptData(), KnownPeaks()
    planned = {one.run_id: _quiet(one) for one in runs}
    for one in list(planned.values())[1:]:  # whose device this process uses by then
        planned[one.run_id] = replace(one, config=replace(one.config, allow_busy_device=True))

    def begin(run_id: str) -> Turns[RunResult]:
        one = planned[run_id]
        return run_in_turns(
            one.config,
            one.identity,
            stop=stop,
            num_packed=lambda: pack.most_together(run_id),
            kept_data=kept_data,
            known_peaks=known_peaks,
        )

    rounds = any(one.config.trainer.precision is not Precision.fp32 for one in planned.values())
    # Each run raises the level for its log and puts back what it found; here runs end in another order than they began.
    logging.getLogger("harness").setLevel(logging.INFO)
    pack = Pack(
        ((run_id, partial(begin, run_id)) for run_id in planned),
        size=Growing(most=len(planned), available=_free_bytes) if size is None else size,
        tolerance=HALF_TOLERANCE if rounds else TOLERANCE,
    )
    with stop.signals():
        for ended in pack.run():
            if ended.outcome is not None:
                report(ended.name, outcome_of(ended.outcome))
                continue
            assert ended.error is not None
            if is_out_of_memory(ended.error):
                report(ended.name, Outcome(NO_ROOM, str(ended.error)))
            else:
                report(ended.name, _outcome_of_error(planned[ended.name], ended.error))


def _free_bytes() -> int | None:
    import torch

    from harness.measure.device import free_bytes

    return free_bytes(torch.device("cuda" if torch.cuda.is_initialized() else "cpu"))


def _quiet(planned: PlannedRun) -> PlannedRun:
    """The run without a progress display."""
    config = planned.config
    return replace(planned, config=replace(config, tracking=replace(config.tracking, progress=False)))


def _outcome_of_error(planned: PlannedRun, error: Exception) -> Outcome:
    """What became of a run that raised and left no result."""
    from harness.measure.device import is_out_of_memory
    from harness.processes.stopping import PreemptedError
    from harness.results.claims import ClaimLostError, RunClaimedError
    from harness.results.schema import Status
    from harness.run import USER_ERRORS

    if isinstance(error, RunClaimedError | ClaimLostError):
        return Outcome(CLAIMED, str(error))
    if isinstance(error, PreemptedError):
        return Outcome(NOT_FINISHED, str(error))
    if isinstance(error, USER_ERRORS):
        return write_failure(planned, str(error))
    # The disk is full, the folder went away: the sweep's other runs must hear why.
    with contextlib.suppress(OSError):
        traceback.print_exception(error)
    status = Status.OUT_OF_MEMORY if is_out_of_memory(error) else Status.FAILED
    return write_failure(planned, f"{type(error).__name__}: {error}", status=status)


def write_failure(planned: PlannedRun, error: str, *, status: Status | None = None) -> Outcome:
    """Leaves a result for a run that could not leave one itself, unless another process has the run or has ended it.

    Its status is `failed`, or the one that is given.
    """
    from harness.config.composing import to_dict
    from harness.folder import record_failure
    from harness.results.claims import ClaimLostError, RunClaimedError
    from harness.results.schema import RunResult, Status

    config, status = planned.config, status or Status.FAILED
    result = RunResult(
        run_id=planned.identity.run_id,
        cell_id=planned.identity.cell_id,
        sweep=config.sweep,
        status=status,
        config=to_dict(config),
        error=error,
    )
    try:
        recorded = record_failure(planned, result)
    except (RunClaimedError, ClaimLostError) as problem:
        return Outcome(CLAIMED, str(problem))
    except OSError as problem:
        error += f" (this could not be written to {config.runs_dir}: {problem.strerror})"
        return Outcome(str(status), error)
    return outcome_of(recorded, was_kept=recorded is not result)


def outcome_of_dead(planned: PlannedRun, error: str | None, *, stamp_before: object) -> Outcome:
    """What became of a run whose process died without a word: it may have died after its result.

    Args:
        planned: the run.
        error: how the process died; None when it was asked to.
        stamp_before: `result_stamp(planned)` from before the process was started.
    """
    from harness.config.schema import Rerun
    from harness.folder import kept_result, result_stamp

    if result_stamp(planned) not in (None, stamp_before):
        result = kept_result(replace(planned, config=replace(planned.config, rerun=Rerun.never)))
        if result is not None:
            return outcome_of(result)
    if error is None:
        return Outcome(NOT_FINISHED, "its process was asked to stop")
    return write_failure(planned, error)


def run_in_process(
    runs: Sequence[PlannedRun],
    *,
    pack: int | None,
    log_path: str,
    variables: dict[str, str],
    launcher_pid: int,
    reply: Connection,
) -> None:
    """Computes runs in a process of the queue launcher and sends run id and outcome of each once it has ended.

    Args:
        runs: their configs were validated where they were composed.
        pack: how many are trained together, None for as many as make it faster; a single run is computed alone.
        log_path: file that takes everything the process prints.
        variables: environment variables that give the process its device.
        launcher_pid: when this process is gone, the runs write a checkpoint and end.
        reply: takes the outcomes.
    """
    # Ctrl-C reaches the whole terminal; what becomes of the runs is the launcher's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(variables)
    _redirect_output(Path(log_path))
    threading.Thread(target=_end_with, args=(launcher_pid,), daemon=True).start()
    if len(runs) == 1:
        reply.send((runs[0].run_id, compute(runs[0])))
    else:
        compute_pack(runs, size=pack, report=lambda run_id, outcome: reply.send((run_id, outcome)))


def find_busy(variables: dict[str, str], reply: Connection) -> None:
    """Sends why a device cannot be used, or an empty text, from a process that ends and frees the device again.

    Args:
        variables: environment variables that give the process its device.
        reply: takes the text.
    """
    from harness.measure.device import DeviceBusyError, require_free_device

    os.environ.update(variables)
    try:
        require_free_device("cuda")
    except DeviceBusyError as error:
        reply.send(str(error))
    else:
        reply.send("")


def time_steps(config: RunConfig, *, seconds: float, talk: Connection) -> None:
    """Sends how many tokens a second a run's steps take in, and the peak RSS of this process, or why that is not known.

    Before its steps are timed it sends `READY` and waits for an answer, so that several processes begin at once; where
    the launcher is gone there is none, and it ends.

    Args:
        config: of the run.
        seconds: how long the steps are timed.
        talk: with the launcher.
    """
    from harness.extensions import load_extensions
    from harness.measure.device import peak_rss_bytes
    from harness.throughput import tokens_per_second

    def meet() -> None:
        talk.send(READY)
        talk.recv()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _redirect_output(Path(os.devnull))
    load_extensions()
    try:
        rate = tokens_per_second(config, meet=meet, seconds=seconds)
    except EOFError:
        return
    except Exception as error:
        talk.send(f"{type(error).__name__}: {error}")
    else:
        talk.send((rate, peak_rss_bytes()))


def _redirect_output(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
    except OSError as error:
        print(f"{path}: {error.strerror}; what this run prints is not kept", file=sys.stderr)


def _end_with(launcher_pid: int) -> None:
    """Asks this process to stop once the launcher is gone: nobody would start the next run after this one."""
    while True:
        time.sleep(1.0)
        try:
            os.kill(launcher_pid, 0)
        except OSError:
            os.kill(os.getpid(), signal.SIGTERM)
            return
