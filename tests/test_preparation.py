"""Work that the first run does for all: its time apart, its memory in another process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.content.errors import DataError
from harness.processes.preparation import Preparation, PreparationError, once, preparation_of_a_run

# Each run in a process of its own, as under a launcher, so that each has its own peak.
TWO_RUNS = """
import json, os, sys
from pathlib import Path
from harness.config.composing import from_dict
from harness.run import run

folder = Path(sys.argv[1])
for seed in (0, 1):
    if os.fork() == 0:
        result = run(from_dict({
            "model": {"name": "tiny_bert", "tiny": "bert"},
            "dataset": {"name": "rows", "train_file": str(folder / "rows.csv"), "max_length": 32,
                        "num_train_examples": 64, "test_file": str(folder / "few.csv"),
                        "val_file": str(folder / "few.csv")},
            "method": {"name": "head_only"}, "trainer": {"learning_rate": 1e-3, "max_steps": 2, "batch_size": 8},
            "tracking": {"wandb": "disabled", "progress": False}, "runs_dir": str(folder), "device": "cpu",
            "seed": seed}))
        (folder / f"{seed}.json").write_text(json.dumps(result.metrics))
        os._exit(0)
    os.wait()
"""


LOCKED = """
import multiprocessing
from harness.processes.preparation import once, preparation_of_a_run

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")  # as in the runs of a sweep
    multiprocessing.Lock()  # which has what looks for leaks started
    with preparation_of_a_run():
        once(lambda: globals().update(lock=multiprocessing.Lock()))
"""


def test_a_lock_that_was_made_is_given_up(tmp_path: Path) -> None:
    """Progress bars make one; a warning of a leaked semaphore was the last thing that a first sweep said."""
    (tmp_path / "locked.py").write_text(LOCKED, encoding="utf-8")
    made = subprocess.run([sys.executable, str(tmp_path / "locked.py")], capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, "")


def test_the_first_run_has_the_time_and_memory_of_the_second(tmp_path: Path) -> None:
    lines = [f"row {number} of a file with some more words,{number % 2}" for number in range(10_000)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines, ""]))
    (tmp_path / "few.csv").write_text("\n".join(["text,label", *lines[:60], ""]))
    made = subprocess.run(
        [sys.executable, "-c", TWO_RUNS, str(tmp_path)],
        env={**os.environ, "LORA_HARNESS_CACHE": str(tmp_path / "cache")},
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{seed}.json").read_text()) for seed in (0, 1))
    assert first["preparation_seconds"] > 0.1
    assert second["preparation_seconds"] == 0.0
    if sys.platform == "linux":
        # With the rows tokenised in the run itself, its peak is a quarter higher.
        assert first["peak_rss_bytes"] == pytest.approx(second["peak_rss_bytes"], rel=0.05)


def collected(work: object) -> Preparation:
    with preparation_of_a_run() as preparation:
        once(work)  # type: ignore[arg-type]
    return preparation


@pytest.mark.skipif(sys.platform != "linux", reason="forked on Linux alone")
def test_work_is_done_in_another_process_and_timed(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(0.05)

    assert collected(work).seconds >= 0.05
    assert int((tmp_path / "pid").read_text()) != os.getpid()
    assert not collected(work).is_in_peak_rss
    once(work)  # outside of a run
    assert int((tmp_path / "pid").read_text()) == os.getpid()


def test_work_inside_work_is_counted_once() -> None:
    preparation = collected(lambda: once(lambda: time.sleep(0.5)))
    # Twice would be a second; what starting a process takes is in it.
    assert 0.5 <= preparation.seconds < 1.0


class Untransportable(Exception):
    """Cannot be put together again from its message."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def test_errors_come_back_and_their_time_counts() -> None:
    def fail(error: BaseException) -> None:
        time.sleep(0.02)
        raise error

    with preparation_of_a_run() as preparation:
        with pytest.raises(DataError, match="no such column"):
            once(lambda: fail(DataError("no such column")))
        with pytest.raises(RuntimeError, match="Untransportable: 1 and 2"):
            once(lambda: fail(Untransportable(1, 2)))
    assert preparation.seconds >= 0.04


@pytest.mark.skipif(sys.platform != "linux", reason="forked on Linux alone")
def test_a_process_that_is_killed_is_named() -> None:
    with pytest.raises(PreparationError, match=r"exit code -9 and no message, most likely for want of memory"):
        collected(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_where_nothing_is_forked_the_peak_is_not_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    pids: list[int] = []
    preparation = collected(lambda: pids.append(os.getpid()))
    assert pids == [os.getpid()]
    assert preparation.is_in_peak_rss
