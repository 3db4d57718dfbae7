"""The folder of a run, `<runs_dir>/<run_id>/`: what lies in it, and what that says about the run. Needs no torch.

A result is recorded by `Attempt.record` and nothing else: under the run's claim, and never a failure over a result that
stands. A run that is run again while a result stands (`rerun=all`) writes into `.rerun/` in its folder; once its result
is there, it takes the old one's place. So whenever a process is killed, a complete run is in the folder, the old or the
new one, and never an old result beside new weights.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from harness.config.schema import Rerun
from harness.content.identity import PlannedRun
from harness.results.claims import Claim, RunClaimedError, current_owner
from harness.results.files import (
    CHECKPOINT_FILE,
    CLAIMS_DIR,
    PHASES_FILE,
    RERUN_DIR,
    RESULT_FILE,
    SAVING_DIR,
    output_dirs,
)
from harness.results.schema import ResultError, RunResult, Status, read_result, write_result

# What only an unfinished run needs.
_UNFINISHED = (CHECKPOINT_FILE, PHASES_FILE, SAVING_DIR)

logger = logging.getLogger("harness")


class OutputError(OSError):
    """The runs folder cannot be written."""


def require_writable(runs_dir: str) -> None:
    """Makes the runs folder and writes into it. Raises `OutputError`."""
    folder = Path(runs_dir)
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"runs_dir={runs_dir}: cannot be written ({error.strerror}); give another folder with runs_dir=DIR."
        ) from error


def run_dir(planned: PlannedRun) -> Path:
    """Where a run lies."""
    return Path(planned.config.runs_dir) / planned.run_id


def kept_result(planned: PlannedRun) -> RunResult | None:
    """The result of an earlier run that `config.rerun` lets stand, if there is one.

    `never`: any. `failed`: one that finished or diverged; a run that failed or ran out of memory is tried again.
    `all`: none.

    What a process that was killed just after its result had left undone is done first.
    """
    folder = run_dir(planned)
    if any((folder / name).exists() for name in (f"{RERUN_DIR}/{RESULT_FILE}", *_UNFINISHED, CLAIMS_DIR)):
        with contextlib.suppress(RunClaimedError, OSError):
            if _ended_result(folder) is not None and current_owner(folder) is None:
                with Claim.acquire(folder) as claim:
                    settle(folder)
                    claim.release(ended=True)
    if planned.config.rerun is Rerun.all:
        return None
    result = _read(folder)
    if result is None:
        return None
    stands = planned.config.rerun is Rerun.never or _stands(result)
    return result if stands else None


def _stands(result: RunResult) -> bool:
    return result.status in (Status.FINISHED, Status.DIVERGED)


def _read(folder: Path) -> RunResult | None:
    path = folder / RESULT_FILE
    if not path.is_file():
        return None
    try:
        return read_result(path)
    except ResultError as error:
        logger.warning("%s; the run is repeated", error)
        return None


def _ended_result(folder: Path) -> RunResult | None:
    """The result that stands, or that is about to."""
    found = _read(folder / RERUN_DIR) or _read(folder)
    return found if found is not None and _stands(found) else None


def settle(folder: Path) -> None:
    """Does what was left undone by a process that was killed just after its result. The caller holds the claim."""
    if (folder / RERUN_DIR / RESULT_FILE).is_file():
        _replace_by_rerun(folder)
    result = _read(folder)
    if result is not None and _stands(result):
        for name in _UNFINISHED:
            _remove(folder / name)
        with contextlib.suppress(OSError):  # a rerun that is to be resumed is in it, or nothing
            (folder / RERUN_DIR).rmdir()


def _replace_by_rerun(folder: Path) -> None:
    """Puts the run in `.rerun/`, whose result is there, in the place of the old one; can be repeated at any point."""
    rerun = folder / RERUN_DIR
    # The first: a reader finds no result meanwhile, and not the old one beside some of the new files.
    (folder / RESULT_FILE).unlink(missing_ok=True)
    for name in _UNFINISHED:
        _remove(rerun / name)
    for path in rerun.iterdir():
        if path.name != RESULT_FILE:
            _remove(folder / path.name)
            path.rename(folder / path.name)
    for name in output_dirs():
        with contextlib.suppress(OSError):  # what the new run has not is an empty folder: see `Attempt.record`
            (folder / name).rmdir()
    # The last, so that until here another process finds that there is something to do.
    (rerun / RESULT_FILE).replace(folder / RESULT_FILE)
    rerun.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def attempt_dir(folder: Path) -> Path:
    """Where an attempt at the run of `folder` writes: into the folder itself unless a result stands there."""
    result = _read(folder)
    return folder / RERUN_DIR if result is not None and _stands(result) else folder


@dataclass(frozen=True)
class Attempt:
    """One process's attempt to compute a run: where it writes, and the one way to record how it ended.

    `folder` is the run's folder, `dir` where this attempt writes: the same, or `.rerun/` in it while a result stands.
    """

    folder: Path
    dir: Path
    claim: Claim

    @classmethod
    def begin(cls, planned: PlannedRun, claim: Claim) -> Attempt:
        """Takes out what an earlier attempt left and this one does not resume. The caller holds the claim.

        A checkpoint is resumed, unless `rerun=all` is to repeat a run that has ended.
        """
        folder = run_dir(planned)
        attempt = cls(folder, attempt_dir(folder), claim)
        if attempt.dir != folder:
            attempt.dir.mkdir(exist_ok=True)
        else:
            if (folder / RESULT_FILE).exists() and planned.config.rerun is Rerun.all:
                for name in _UNFINISHED:
                    _remove(folder / name)
            (folder / RESULT_FILE).unlink(missing_ok=True)
        is_resumed = (attempt.dir / CHECKPOINT_FILE).exists()
        for name in (SAVING_DIR, *(() if is_resumed else output_dirs())):
            _remove(attempt.dir / name)
        for path in attempt.dir.glob(".*.partial"):  # of a process that was killed while it wrote
            _remove(path)
        return attempt

    def record(self, result: RunResult) -> bool:
        """Writes `result`, and says whether it is the run's result now: a failure never replaces one that stands.

        Raises:
            ClaimLostError: another process computes the run now, or has ended it.
            OSError: it cannot be written.
        """
        self.claim.check()
        found = _read(self.folder)
        if found is not None and _stands(found) and not _stands(result):
            return False
        if self.dir != self.folder:
            for name in output_dirs():  # takes the place of what the earlier run has of that name
                (self.dir / name).mkdir(exist_ok=True)
        write_result(self.dir, result)
        if _stands(result):
            for name in _UNFINISHED:
                _remove(self.dir / name)
        return True

    def end(self) -> None:
        """To be called when nothing in `dir` is open any more: a rerun's result takes the old one's place."""
        settle(self.folder)


def record_failure(planned: PlannedRun, result: RunResult) -> RunResult:
    """Records that a run could not record its own end; returns that result, or one that the run has left after all.

    Under `rerun=all` a result from before the rerun stands in the folder and is not what became of the rerun.

    Raises:
        RunClaimedError, ClaimLostError: another process is computing it.
        OSError: it cannot be written.
    """
    folder = run_dir(planned)
    with Claim.acquire(folder) as claim:
        is_from_before = planned.config.rerun is Rerun.all and _read(folder / RERUN_DIR) is None
        settle(folder)
        found = _read(folder)
        kept = found if found is not None and _stands(found) and not is_from_before else result
        if kept is result:
            Attempt(folder, folder, claim).record(result)
        claim.release(ended=True)
    return kept


def result_stamp(planned: PlannedRun) -> tuple[int, int] | None:
    """What changes when a run's result is written; None without one."""
    for folder in (run_dir(planned) / RERUN_DIR, run_dir(planned)):
        with contextlib.suppress(OSError):
            found = (folder / RESULT_FILE).stat()
            return found.st_mtime_ns, found.st_ino
    return None
