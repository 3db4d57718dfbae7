"""A tracker in its own process: nothing that happens to it may end a run or hold it up.

That is why the run never imports a tracker's package: a second process, the mirror, does, and the run writes JSON
lines into its standard input.

    run  --- one JSON line a record, never blocking --->  mirror  --->  the tracker's files or its server
         <-- one line a problem, logged as a warning ---

A mirror that hangs can be killed, what a package imports and hooks does not show in the memory and time of the run,
and when the run is killed the mirror reads the end of its input and closes the tracker's files properly.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from harness.results.files import CURVE_FILE
from harness.results.schema import RunResult, Status
from harness.tracking.curves import curve_record


class TrackingError(RuntimeError):
    """A tracker did not take something that was asked for by name."""


MIRROR_LOG = "mirror.log"
# Before the names of the result's metrics, where a tracker has no summary apart from the curves.
RESULT_PREFIX = "result/"
# How long the end of a run may wait for a tracker's files, in seconds. It bounds a wait that normally takes some
# hundredths of a second.
FILES_SECONDS = 20.0
# Exit code of a mirror that has reported why it failed.
_REPORTED = 3

logger = logging.getLogger("harness")


@dataclass(frozen=True)
class Mirrored:
    """What a mirror is of, for messages and for its process.

    Attributes:
        product: what people call it.
        module: whose `mirror()` the process runs.
        setting: what turned it on.
        off: what turns it off.
    """

    product: str
    module: str
    setting: str
    off: str

    def lost(self, reason: str) -> str:
        """What is lost when the tracker fails, and what is not."""
        return (
            f"{self.setting}: {reason}. The run continues and {self.product} will miss the rest of it; {CURVE_FILE} "
            f"and result.json do not. {self.off} runs without {self.product}."
        )


class Writer(Protocol):
    """What a tracker's package makes of one run, in the mirror's process. Whatever it raises ends the mirror alone."""

    def log(self, record: dict[str, Any]) -> None:
        """Takes one record of the curve, `step` in it, as `metrics.jsonl` has it."""

    def finish(self, summary: Mapping[str, Any], *, exit_code: int) -> None:
        """Takes the metrics of the result and its `status`, of a run without a result nothing, and closes the files.

        Args:
            summary: by the names of the result.
            exit_code: 0 for a finished run.
        """


class MirrorTracker:
    """Mirrors a run to a tracker through its own process.

    What the tracker gets is `metrics.jsonl` row for row, and `RunResult.metrics` with `status`. Files are below
    `directory`, which is emptied first; what the tracker's package prints is in `mirror.log` there.

    No method raises or blocks because of the tracker: a problem is logged as a warning and the run continues without.

    Args:
        directory: of the tracker, in that of the run.
        job: what the mirror is to know of the run, as JSON values.
        mirrored: which tracker it is.
        end_seconds: how long the end of the run may wait for it.
        environment: variables for its process, beside those of this one.

    Raises:
        OSError: `directory` cannot be written or the process cannot be started.
    """

    def __init__(
        self,
        directory: Path,
        job: Mapping[str, Any],
        *,
        mirrored: Mirrored,
        end_seconds: float,
        environment: Mapping[str, str],
    ) -> None:
        self._mirrored = mirrored
        self._end_seconds = end_seconds
        self._log_path = directory / MIRROR_LOG
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir()
        checkout = str(Path(__file__).resolve().parents[2])
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    # The run comes first: importing a tracker takes a second or two in which it wants all cores.
                    f"import os, sys; os.nice(10); sys.path.insert(0, {checkout!r}); "
                    f"from {mirrored.module} import mirror; mirror()",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                env={**os.environ, **environment},
                # Ctrl-C is for the run; the mirror hears of its end and must live on to close its files.
                process_group=0,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._problems = self._process.stdin, self._process.stdout
        os.set_blocking(self._input.fileno(), False)
        os.set_blocking(self._problems.fileno(), False)
        # What the pipe had no room for: a few lines while the mirror starts, everything if it hangs.
        self._backlog = bytearray()
        self._is_open = True
        self._send({**job, "mirrored": asdict(mirrored)})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends one record; returns at once."""
        self._send(curve_record(step, values))

    def finish(self, result: RunResult) -> None:
        """Sends how the run ended and waits, for a limited time, until the tracker has it."""
        exit_code = 0 if result.status is Status.FINISHED else 1
        self._end({"exit_code": exit_code, "summary": {**result.metrics, "status": result.status}})

    def close(self) -> None:
        """Ends what is mirrored with exit code 1 and no summary."""
        self._end({"exit_code": 1, "summary": {}})

    def _send(self, message: Mapping[str, Any]) -> None:
        if not self._is_open:
            return
        with contextlib.suppress(BlockingIOError):  # no problem reported
            self._relay(os.read(self._problems.fileno(), 65536))
        self._backlog += json.dumps(message).encode() + b"\n"
        try:
            del self._backlog[: os.write(self._input.fileno(), self._backlog)]
        except BlockingIOError:
            pass  # no room at all; the next call tries again
        except BrokenPipeError:
            self._wait(1.0)

    def _end(self, message: Mapping[str, Any]) -> None:
        self._send(message)
        if self._is_open:
            self._wait(self._end_seconds)

    def _wait(self, seconds: float) -> None:
        """Lets the mirror read the rest and end; after `seconds` it is killed."""
        self._is_open = False
        problems = b""
        try:
            problems, _ = self._process.communicate(bytes(self._backlog), seconds)
            reason = f"its process ended with exit code {self._process.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"its process did not end within {seconds:g} seconds"
            self._process.kill()
            self._input.close()
            # A killed process stays while a file system does not answer; it is not worth waiting for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                problems, _ = self._process.communicate(timeout=1.0)
        self._relay(problems)
        if self._process.returncode not in (0, _REPORTED):
            self._warn(self._mirrored.lost(reason))

    def _relay(self, problems: bytes) -> None:
        """Logs what the mirror reported, one problem a line."""
        for line in problems.decode(errors="replace").splitlines():
            self._warn(line)

    def _warn(self, problem: str) -> None:
        logger.warning("%s Details: %s", problem, self._log_path)


def run_mirror(start: Callable[[dict[str, Any]], Writer]) -> None:
    """Body of a mirror process: makes the JSON lines on standard input into what a tracker keeps of one run.

    The first line is the job, the following are records of the curve, the last holds `exit_code` and `summary`. Input
    that ends without it is a run that was killed. Problems are reported on standard output, one line each; what a
    package prints goes to standard error, which is `mirror.log`.

    Args:
        start: takes the job and returns what the records are written with.
    """
    _redirect_prints()
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=[lines], daemon=True).start()
    job = json.loads(lines.get())
    mirrored, exit_code = Mirrored(**job.pop("mirrored")), 0
    try:
        writer = start(job)
        end: dict[str, Any] = {"exit_code": 1, "summary": {}}
        for line in iter(lines.get, b""):
            message = json.loads(line)
            if "summary" in message:
                end = message
                break
            writer.log(message)
        writer.finish(end["summary"], exit_code=end["exit_code"])
    except (Exception, SystemExit) as error:  # a package's errors share no base class; a teardown that fails exits
        report(mirrored.lost(describe(error)))
        exit_code = _REPORTED
    # All is written. Taking a package's modules apart, for which the run would have to wait, takes several times
    # longer than `finish`.
    sys.stderr.flush()
    os._exit(exit_code)


def _redirect_prints() -> None:
    global _problems
    _problems = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


# Where a mirror reports; standard output, until a package could print there.
_problems = sys.stdout


def _read_lines(lines: queue.SimpleQueue[bytes]) -> None:
    """Empties the pipe at once, whatever the tracker is waiting for, so that the run never finds it full."""
    for line in sys.stdin.buffer:
        lines.put(line)
    lines.put(b"")


def describe(error: BaseException) -> str:
    """Returns an error on one line, after writing its traceback to standard error, which is `mirror.log`."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(".: ")


def report(problem: str) -> None:
    """Tells the run of a problem, one line each."""
    print(problem, file=_problems, flush=True)
