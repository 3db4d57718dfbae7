"""How far a sweep is, read from files alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from analysis.__main__ import main
from analysis.status import RunStatus, find_status, print_status
from harness.results.claims import Claim
from harness.results.files import CHECKPOINT_FILE
from harness.results.schema import RunResult, Status, write_result
from harness.results.state import run_state

CONFIG = {
    "model": {"name": "m"},
    "dataset": {"name": "d", "best_metric": "accuracy"},
    "method": {"name": "full"},
    "trainer": {"learning_rate": 1e-4},
    "seed": 0,
}


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    """A sweep of five: one finished, one diverged, one running, one stopped, one that nobody has begun."""
    for run_id, status, error in (("a", Status.FINISHED, ""), ("b", Status.DIVERGED, "the loss was nan at step 7")):
        write_result(tmp_path / run_id, RunResult(run_id, run_id, "s", status, CONFIG, error=error))
    (tmp_path / "d").mkdir()
    (tmp_path / "d/log.txt").write_text("first\nstopped after step 3\n")
    (tmp_path / "sweeps").mkdir()
    listed = {"sweep": "s", "run_ids": list("abcde"), "command": "c", "created": "2026-01-01T00:00:00+00:00"}
    (tmp_path / "sweeps/s.json").write_text(json.dumps(listed))
    return tmp_path


def test_every_state_is_told(runs_dir: Path) -> None:
    with Claim.acquire(runs_dir / "c") as claim:
        claim.report({"step": 5, "num_steps": 20, "loss": 0.5, "tokens_per_second": 1234.5, "seconds_left": 75.0})
        claim._write()
        found = {status.run_id: status for status in find_status(runs_dir, "s")}
    assert found["a"] == RunStatus("a", "finished", "")
    assert found["b"] == RunStatus("b", "diverged", "the loss was nan at step 7")
    assert found["c"].state == "running"
    assert found["c"].text.startswith("step 5/20, loss 0.5000, 1,234 tokens/s, about 0:01:15 left")
    assert found["d"] == RunStatus("d", "to do", "last line of its log: stopped after step 3")
    assert found["e"] == RunStatus("e", "to do", "")


def test_a_run_that_is_rerun_is_running(runs_dir: Path) -> None:
    with Claim.acquire(runs_dir / "a"):
        assert {status.run_id: status.state for status in find_status(runs_dir, "s")}["a"] == "running"


def test_it_prints_totals_and_a_line_for_what_is_not_finished(runs_dir: Path) -> None:
    console = Console(record=True, width=80)
    print_status(runs_dir, "s", console=console)
    lines = console.export_text().splitlines()
    assert lines == [
        "s: 3 to do, 1 finished, 1 diverged",
        "diverged: b: the loss was nan at step 7",
        "to do: c",
        "to do: d: last line of its log: stopped after step 3",
        "to do: e",
    ]


def test_a_sweep_of_which_nothing_has_ended_yet(runs_dir: Path) -> None:
    for run_id in "ab":
        (runs_dir / run_id / "result.json").unlink()
    assert {status.state for status in find_status(runs_dir, "s")} == {"to do"}


def test_a_half_written_result_is_told(runs_dir: Path) -> None:
    (runs_dir / "e").mkdir()
    (runs_dir / "e/result.json").write_text("{")
    assert RunStatus("e", "unreadable", "its result.json cannot be read") in find_status(runs_dir, "s")


def test_a_result_that_cannot_be_read_and_is_computed_again_is_running(runs_dir: Path) -> None:
    (runs_dir / "e").mkdir()
    (runs_dir / "e/result.json").write_text("{")
    with Claim.acquire(runs_dir / "e"):
        assert {status.run_id: status.state for status in find_status(runs_dir, "s")}["e"] == "running"


def test_the_state_of_a_run_that_has_not_ended(runs_dir: Path) -> None:
    (runs_dir / "d" / CHECKPOINT_FILE).write_bytes(b"")
    assert [run_state(runs_dir / run_id) for run_id in "abcd"] == ["finished", "diverged", "new", "stopped"]
    (runs_dir / "c").mkdir()
    (runs_dir / "c/result.json").write_text("{")
    assert run_state(runs_dir / "c") == "unreadable"


def test_the_command(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--sweep", "s", "--runs-dir", str(runs_dir)]) == 0
    assert "1 finished" in capsys.readouterr().out
    assert main(["status", "--sweep", "typo", "--runs-dir", str(runs_dir)]) == 2
    assert "sweep='typo'" in capsys.readouterr().err


def test_it_needs_no_torch() -> None:
    code = "import analysis.__main__, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
