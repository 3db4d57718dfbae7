"""Where the numbers of a run go while it runs: `metrics.jsonl` always, W&B if wanted, and a progress display.

Names and values are the same everywhere. The local files are the truth; W&B is their mirror, so nothing that happens
to W&B may end a run or hold it up. That is why the run never imports wandb: a second process, the mirror, does, and
the run writes JSON lines into its standard input.

    run  --- one JSON line a record, never blocking --->  mirror  --->  wandb-core  --->  <run_dir>/wandb/
         <-- one line a problem, logged as a warning ---

A mirror that hangs can be killed, what wandb imports and hooks does not show in the memory and time of the run, and
when the run is killed the mirror reads the end of its input and closes the W&B files properly, with exit code 1.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBar

from harness.config import TrackingConfig, WandbMode
from harness.results import RunResult, Status, duration_text

if TYPE_CHECKING:
    import wandb


class TrackingError(RuntimeError):
    """W&B did not take something that was asked for by name."""


METRICS_FILE = "metrics.jsonl"
WANDB_DIR = "wandb"
MIRROR_LOG = "mirror.log"

# How long the end of a run may wait for W&B, in seconds: for the files, for a server that does not answer the start,
# for what is not uploaded yet. They bound a wait that normally takes some hundredths of a second.
FILES_SECONDS = 20.0
ONLINE_START_SECONDS = 10.0
UPLOAD_SECONDS = 15.0

# W&B refuses longer tags.
_TAG_LENGTH = 64
# Exit code of a mirror that has reported why it failed.
_REPORTED = 3

logger = logging.getLogger("harness")


class Tracker(Protocol):
    """Something that receives the curve of one run and then how it ended."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values`, by metric name, as they were after optimizer step `step`."""

    def finish(self, result: RunResult) -> None:
        """Records how the run ended; nothing can be logged after it."""

    def close(self) -> None:
        """Ends tracking for a run that leaves without a result; does nothing after `finish`."""


def open_tracker(
    config: TrackingConfig,
    *,
    run_dir: Path,
    run_id: str,
    cell_id: str,
    job_type: str,
    sweep: str | None,
    run_config: Mapping[str, Any],
) -> Tracker:
    """Starts tracking one run.

    The curve of an earlier attempt in `run_dir` is replaced, and so are its W&B files if W&B is on.

    Args:
        config: Which trackers to use; `metrics.jsonl` is always written.
        run_dir: Existing directory of the run.
        run_id: Id and name of the run on W&B.
        cell_id: Group of the run on W&B.
        job_type: Job type of the run on W&B: the name of the method.
        sweep: Name of the sweep, a tag on W&B; None outside sweeps.
        run_config: The validated config as JSON values, mirrored verbatim.
    """
    trackers: list[Tracker] = [JsonlTracker(run_dir / METRICS_FILE)]
    if config.wandb is not WandbMode.disabled:
        job = {
            "mode": config.wandb,
            "project": config.project,
            "entity": config.entity,
            "id": run_id,
            "name": run_id,
            "group": cell_id,
            "job_type": job_type,
            "tags": [] if sweep is None else [sweep[:_TAG_LENGTH]],
            "config": run_config,
        }
        try:
            trackers.append(WandbTracker(run_dir.absolute() / WANDB_DIR, job))
        except OSError as error:
            logger.warning("%s", _lost(config.wandb, f"its process could not be started ({error})"))
    return Trackers(trackers)


def _record(step: int, values: Mapping[str, float]) -> dict[str, Any]:
    """Returns one record of the curve. JSON has no NaN: such a value is left out and its name listed."""
    record = {"step": step, **{name: value for name, value in values.items() if math.isfinite(value)}}
    non_finite = [name for name, value in values.items() if not math.isfinite(value)]
    return {**record, "non_finite": non_finite} if non_finite else record


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values` in every tracker."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def finish(self, result: RunResult) -> None:
        """Tells every tracker how the run ended."""
        for tracker in self._trackers:
            tracker.finish(result)

    def close(self) -> None:
        """Closes every tracker."""
        for tracker in self._trackers:
            tracker.close()


class JsonlTracker:
    """Writes the curve to a file, one JSON object a line: `{"step": 10, "train_nll": 0.5}`.

    Every line is handed to the operating system at once, so that a killed run keeps its curve. Where a value is not
    finite its key is absent and `non_finite` lists its name: `{"step": 20, "non_finite": ["train_nll"]}`.
    """

    def __init__(self, path: Path) -> None:
        # A new file: a process that has lost the run may still write into the old one.
        path.unlink(missing_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line."""
        self._file.write(json.dumps(_record(step, values), allow_nan=False) + "\n")
        self._file.flush()

    def finish(self, result: RunResult) -> None:
        """Closes the file; the result has a file of its own."""
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class WandbTracker:
    """Mirrors a run to W&B through a process of its own.

    The history on W&B is `metrics.jsonl` row for row, the x axis is its `step`, and the summary is
    `RunResult.metrics` plus `status` and nothing derived from the curve. A run that is not finished ends with exit
    code 1. All files are below `directory`, which is emptied first; `wandb sync` uploads those of an offline run.
    What wandb prints is in `mirror.log` there.

    No method raises or blocks because of W&B: a problem is logged as a warning and the run goes on without.

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
        checkout = str(Path(__file__).resolve().parent.parent)
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    # The run comes first: importing wandb takes a second or two in which it wants all cores.
                    f"import os, sys; os.nice(10); sys.path.insert(0, {checkout!r}); "
                    "from harness import tracking; tracking.mirror()",
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
        self._send(_record(step, values))

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
            self._warn(_lost(self._mode, reason))

    def _relay(self, problems: bytes) -> None:
        """Logs what the mirror reported, one problem a line."""
        for line in problems.decode(errors="replace").splitlines():
            self._warn(line)

    def _warn(self, problem: str) -> None:
        logger.warning("%s Details: %s", problem, self._log_path)


def _lost(mode: str, reason: str) -> str:
    return (
        f"tracking.wandb={mode}: {reason}. The run goes on and W&B will miss the rest of it; {METRICS_FILE} and "
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
        _report(_lost(mode, _describe(error)))
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
        # The run records its own environment in result.json. These cost time and tell W&B about the machine.
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


class Progress(Protocol):
    """Shows a person how far a run is."""

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows the state after optimizer step `step`."""

    def note(self, text: str) -> None:
        """Shows one line that stays, such as the result of an evaluation."""

    def close(self) -> None:
        """Ends the display; may be called twice."""


def open_progress(config: TrackingConfig, *, total_steps: int, description: str) -> Progress:
    """Returns a bar where standard error is a terminal, log lines where it is not, nothing if progress is off."""
    if not config.progress:
        return NullProgress()
    console = Console(stderr=True)
    # rich takes FORCE_COLOR for a terminal; a log file must not get a bar's control codes for it.
    if sys.stderr.isatty() and console.is_interactive:
        return RichProgress(total_steps, description, console=console)
    return PlainProgress(total_steps, description)


class NullProgress:
    """Shows nothing."""

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class RichProgress:
    """One bar on a terminal: steps, loss, tokens/s, elapsed and remaining time; notes are printed above it."""

    def __init__(self, total_steps: int, description: str, *, console: Console) -> None:
        self._bar = RichBar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            # Drawing takes time from the training it describes: twice a second is enough.
            refresh_per_second=2,
        )
        self._task = self._bar.add_task(description, total=total_steps, loss="-", rate="-")
        self._bar.start()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Moves the bar to `step`."""
        self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", rate=f"{tokens_per_second:,.0f}")

    def note(self, text: str) -> None:
        """Prints `text` above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Draws the bar a last time and leaves it on the screen."""
        self._bar.stop()


class PlainProgress:
    """Log lines: the first and the last step, between them one when 10 s and 10 % of the steps have both passed.

    That is at most a dozen lines a run, however long it is or however often `update` is called.
    """

    _SECONDS = 10.0
    _SHARE = 0.1

    def __init__(self, total_steps: int, description: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps = total_steps
        self._description = description
        self._clock = clock
        self._start_seconds = clock()
        # Step and time of the first update and of the last line; None before them.
        self._first: tuple[int, float] | None = None
        self._shown: tuple[int, float] | None = None
        self._unshown: str | None = None

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Logs a line if one is due."""
        now = self._clock()
        self._first = self._first or (step, now)
        self._unshown = (
            f"{self._description}: step {step}/{self._total_steps}, loss {loss:.4f}, "
            f"{tokens_per_second:,.0f} tokens/s, elapsed {duration_text(now - self._start_seconds)}, "
            f"ETA {self._remaining(step, now)}"
        )
        if self._shown is None or step >= self._total_steps or self._is_due(step, now, *self._shown):
            self._shown = (step, now)
            self._show()

    def note(self, text: str) -> None:
        """Logs `text`."""
        logger.info("%s: %s", self._description, text)

    def close(self) -> None:
        """Logs the last step of a run that ended early."""
        self._show()

    def _is_due(self, step: int, now: float, shown_step: int, shown_seconds: float) -> bool:
        return now - shown_seconds >= self._SECONDS and step - shown_step >= self._SHARE * self._total_steps

    def _remaining(self, step: int, now: float) -> str:
        """Returns the time left at the mean speed since the first update, which itself includes warming up."""
        assert self._first is not None
        first_step, first_seconds = self._first
        if step == first_step:
            return "-"
        return duration_text((now - first_seconds) / (step - first_step) * (self._total_steps - step))

    def _show(self) -> None:
        if self._unshown is not None:
            logger.info("%s", self._unshown)
            self._unshown = None
