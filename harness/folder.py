"""The folder of a run, `<runs_dir>/<run_id>/`: what lies in it, and what that says about the run. Needs no torch."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from harness.claims import current_owner
from harness.config import Method, Rerun, RunConfig, Task, run_id
from harness.results import RESULT_FILE, ResultError, RunResult, Status, read_result

CONFIG_FILE = "config.yaml"
LOG_FILE = "log.txt"
CHECKPOINT_FILE = "checkpoint.safetensors"

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


def run_dir(config: RunConfig) -> Path:
    """Where a run lies."""
    return Path(config.runs_dir) / run_id(config)


def kept_result(config: RunConfig) -> RunResult | None:
    """The result of an earlier run that `config.rerun` lets stand, if there is one.

    `never`: any. `failed`: one that finished or diverged; a run that failed or ran out of memory is tried again.
    `all`: none.
    """
    path = run_dir(config) / RESULT_FILE
    if config.rerun is Rerun.all or not path.is_file():
        return None
    try:
        result = read_result(path)
    except ResultError as error:
        logger.warning("%s; the run is made again", error)
        return None
    stands = config.rerun is Rerun.never or result.status in (Status.FINISHED, Status.DIVERGED)
    return result if stands else None


def run_state(config: RunConfig) -> str:
    """The status of a run's result, or `running`, `stopped` (it has a checkpoint), `new`, `unreadable`."""
    folder = run_dir(config)
    if (folder / RESULT_FILE).is_file():
        try:
            return str(read_result(folder / RESULT_FILE).status)
        except ResultError:
            return "unreadable"
    if current_owner(folder) is not None:
        return "running"
    return "stopped" if (folder / CHECKPOINT_FILE).is_file() else "new"


def base_model_dir(config: RunConfig) -> Path:
    """Where the weights of `config.model.run` lie. Raises `FileNotFoundError`, saying what that run is instead."""
    named = f"model.run={config.model.run}"
    folder = Path(config.runs_dir) / str(config.model.run)
    try:
        result = read_result(folder / RESULT_FILE)
    except ResultError:
        state = "was not finished" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{named}: this run {state} in runs_dir={config.runs_dir}; make it first. {_possible_bases(config)}"
        ) from None
    if result.status is not Status.FINISHED:
        raise FileNotFoundError(
            f"{named}: this run ended as {result.status}: {result.error}. {_possible_bases(config)}"
        )
    method = result.config["method"]["name"]
    if method != Method.full:
        raise FileNotFoundError(
            f"{named}: this run has method={method} and so no weights of its own to start from; a base is a run with "
            f"method=full. {_possible_bases(config)}"
        )
    if config.dataset.task.is_language and not Task(result.config["dataset"]["task"]).is_language:
        raise FileNotFoundError(
            f"{named}: this run trained a classifier, and dataset.task={config.dataset.task} needs a language model. "
            f"{_possible_bases(config)}"
        )
    if not (folder / "model" / "config.json").is_file():
        raise FileNotFoundError(f"{named}: its weights were not kept; make it again with save_weights=true rerun=all.")
    return folder / "model"


def _possible_bases(config: RunConfig) -> str:
    found = sorted(path.parent.parent.name for path in Path(config.runs_dir).glob("*/model/config.json"))
    return f"Finished full runs there: {', '.join(found[:5]) or 'none'}{', ...' if len(found) > 5 else ''}."
