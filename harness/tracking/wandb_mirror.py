"""W&B, as a mirror of the local files: nothing that happens to it may end a run or hold it up.

That is why the run never imports wandb: a second process, the mirror, does, and the run writes JSON lines into its
standard input.

    run  --- one JSON line a record, never blocking --->  mirror  --->  wandb-core  --->  <run_dir>/wandb/
         <-- one line a problem, logged as a warning ---

A mirror that hangs can be killed, what wandb imports and hooks does not show in the memory and time of the run, and
when the run is killed the mirror reads the end of its input and closes the W&B files properly, with exit code 1.
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
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.schema import WandbMode
from harness.results.schema import RunResult, Status

if TYPE_CHECKING:
    import wandb
from harness.results.files import CURVE_FILE, WANDB_DIR
from harness.tracking.curves import curve_record


class TrackingError(RuntimeError):
    """W&B did not take something that was asked for by name."""


MIRROR_LOG = "mirror.log"

# How long the end of a run may wait for W&B, in seconds: for the files, for a server that does not answer the start,
# for what is not uploaded yet. They bound a wait that normally takes some hundredths of a second.
FILES_SECONDS = 20.0
ONLINE_START_SECONDS = 10.0
UPLOAD_SECONDS = 15.0

# W&B refuses longer tags.
TAG_LENGTH = 64
# Exit code of a mirror that has reported why it failed.
_REPORTED = 3

logger = logging.getLogger("harness")


class WandbTracker:
    """Mirrors a run to W&B through its own process.

    The history on W&B is `metrics.jsonl` row for row, the x axis is its `step`, and the summary is
    `RunResult.metrics` plus `status` and nothing derived from the curve. A run that is not finished ends with exit
    code 1. All files are below `directory`, which is emptied first; `wandb sync` uploads those of an offline run.
    What wandb prints is in `mirror.log` there.

    No method raises or blocks because of W&B: a problem is logged as a warning and the run continues without.

    Raises:
        OSError: `directory` cannot be written or the process cannot be started.
    """

    def __init__(self, directory: Path, job: Mapping[str, Any]) -> None:
        self._mode: WandbMode = job["mode"]
        online = self._mode is WandbMode.online
        self._end_seconds = FILES_SECONDS + (ONLINE_START_SECONDS + UPLOAD_SECONDS if online else 0.0)
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
                    # The run comes first: importing wandb takes a second or two in which it wants all cores.
                    f"import os, sys; os.nice(10); sys.path.insert(0, {checkout!r}); "
                    "from harness.tracking.wandb_mirror import mirror; mirror()",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                env={
                    **os.environ,
                    # An offline run makes no connection at all, so W&B's own telemetry is off.
                    "WANDB_ERROR_REPORTING": "false",
                    # wandb-core logs into its cache, which would otherwise grow by one file a run in the home
                    # directory, or print its log where there is no home directory.
                    "WANDB_CACHE_DIR": str(directory / "cache"),
                },
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
        self._send(
            {
                **job,
                "dir": str(directory.parent),
                "start_seconds": ONLINE_START_SECONDS,
                "upload_seconds": UPLOAD_SECONDS,
            }
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends one record; returns at once."""
        self._send(curve_record(step, values))

    def finish(self, result: RunResult) -> None:
        """Sends how the run ended and waits, for a limited time, until W&B has it."""
        exit_code = 0 if result.status is Status.FINISHED else 1
        self._end({"exit_code": exit_code, "summary": {**result.metrics, "status": result.status}})

    def close(self) -> None:
        """Ends the W&B run with exit code 1 and no summary."""
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
            self._warn(lost_message(self._mode, reason))

    def _relay(self, problems: bytes) -> None:
        """Logs what the mirror reported, one problem a line."""
        for line in problems.decode(errors="replace").splitlines():
            self._warn(line)

    def _warn(self, problem: str) -> None:
        logger.warning("%s Details: %s", problem, self._log_path)


def lost_message(mode: str, reason: str) -> str:
    """What is lost when W&B fails, and what is not."""
    return (
        f"tracking.wandb={mode}: {reason}. The run continues and W&B will miss the rest of it; {CURVE_FILE} and "
        f"result.json do not. tracking.wandb=disabled runs without W&B."
    )


def mirror() -> None:
    """Body of the mirror process: makes the JSON lines on standard input into one W&B run.

    The first line is the job (the arguments of `wandb.init` and time limits), the following are records of the
    curve, the last holds `exit_code` and `summary`. Input that ends without it is a run that was killed. Problems are
    reported on standard output, one line each.
    """
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=[lines], daemon=True).start()
    job = json.loads(lines.get())
    mode, exit_code = job["mode"], 0
    try:
        import wandb

        run = _start_wandb_run(job)
        end: dict[str, Any] = {"exit_code": 1, "summary": {}}
        for line in iter(lines.get, b""):
            message = json.loads(line)
            if "summary" in message:
                end = message
                break
            run.log(message)
        run.summary.update(end["summary"])
        run.finish(exit_code=end["exit_code"])
        wandb.teardown()
    except (Exception, SystemExit) as error:  # wandb's errors share no base class; a teardown that fails exits
        _report(lost_message(mode, _describe(error)))
        exit_code = _REPORTED
    # All is written and wandb-core has ended. Taking wandb's modules apart, for which the run would have to wait,
    # takes several times longer than `finish`.
    os._exit(exit_code)


def _read_lines(lines: queue.SimpleQueue[bytes]) -> None:
    """Empties the pipe at once, whatever W&B is waiting for, so that the run never finds it full."""
    for line in sys.stdin.buffer:
        lines.put(line)
    lines.put(b"")


def _start_wandb_run(job: dict[str, Any]) -> wandb.Run:
    """Starts the W&B run of `job`, offline where it was to be online and W&B does not let it."""
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=job.pop("start_seconds"),
        finish_timeout=job.pop("upload_seconds"),
        finish_timeout_raises=True,
        # The run records its own environment in result.json. These cost time and send facts of the machine to W&B.
        disable_git=True,
        save_code=False,
        symlink=False,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    mode = job.pop("mode")
    try:
        run = wandb.init(mode=mode, settings=settings, **job)
    except Exception as error:  # no key, no network, no such project: offline needs none of them
        if mode == WandbMode.offline:
            raise
        directory = Path(job["dir"], WANDB_DIR)
        _report(
            f"tracking.wandb={mode}: {_describe(error)}. W&B files are written offline instead; upload them later "
            f"with: wandb sync {directory}/offline-run-*"
        )
        # The service would still hold the run id, and the directory an online run without content.
        wandb.teardown()
        for failed_dir in directory.glob("run-*"):
            shutil.rmtree(failed_dir)
        run = wandb.init(mode="offline", settings=settings, **job)
    # Without these W&B counts calls on the x axis and fills the summary with the last values of the curve.
    run.define_metric("step", summary="none")
    run.define_metric("*", step_metric="step", summary="none")
    return run


def log_report(report_dir: Path, *, sweep: str, mode: WandbMode, project: str, entity: str | None = None) -> None:
    """Makes a W&B run of job type `report` that carries a sweep's report folder as an artifact.

    The W&B files lie in `report_dir/wandb`, which is emptied first; `wandb sync` uploads those of an offline run.
    Called where no run is being measured, so in this process.

    Raises:
        TrackingError: W&B did not take it; the message says why. The report itself is complete.
    """
    directory = report_dir / WANDB_DIR
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir()
    # Copies of the files wait here for the upload, and not in the home directory.
    for variable, folder in (("WANDB_CACHE_DIR", "cache"), ("WANDB_DATA_DIR", "data")):
        os.environ[variable] = str(directory / folder)
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    try:
        import wandb

        job = {"mode": str(mode), "dir": str(report_dir), "project": project, "entity": entity, "group": sweep}
        limits = {"start_seconds": ONLINE_START_SECONDS, "upload_seconds": UPLOAD_SECONDS}
        run = _start_wandb_run({**job, **limits, "job_type": "report", "name": f"{sweep} report"})
        artifact = wandb.Artifact(f"{sweep}-report", type="report")
        for path in sorted(report_dir.rglob("*")):
            if path.is_file() and directory not in path.parents:
                artifact.add_file(str(path), name=path.relative_to(report_dir).as_posix())
        run.log_artifact(artifact)
        run.finish()
        wandb.teardown()
    except (Exception, SystemExit) as error:  # as in the mirror
        raise TrackingError(
            f"wandb={mode}: {_describe(error)}. The report in {report_dir} is complete; only W&B has not got it."
        ) from error


def _describe(error: BaseException) -> str:
    """Returns an error on one line, after writing its traceback to standard error, which is `mirror.log`."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(".: ")


def _report(problem: str) -> None:
    print(problem, flush=True)
