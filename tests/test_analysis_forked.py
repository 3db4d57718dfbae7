"""Work that a second process takes half of."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from pandas.testing import assert_frame_equal
from test_analysis_load import save_run

from analysis import load
from analysis.forked import in_halves

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


def _squares(items: Sequence[int]) -> tuple[list[int], int]:
    return [item**2 for item in items], os.getpid()


def test_each_process_has_half_in_order() -> None:
    (first, here), (second, there) = in_halves(_squares, range(7), least=2)
    assert [*first, *second] == [0, 1, 4, 9, 16, 25, 36]
    assert here == os.getpid() != there


@pytest.mark.parametrize("cores", [{0}, {0, 1}])
def test_what_is_no_work_for_two_or_has_one_core_stays_here(cores: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    assert in_halves(_squares, range(3), least=4 if len(cores) > 1 else 1) == [([0, 1, 4], os.getpid())]


def test_the_half_of_a_process_that_dies_is_done_here() -> None:
    parent = os.getpid()

    def squares(items: Sequence[int]) -> tuple[list[int], int]:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return _squares(items)

    assert in_halves(squares, range(4), least=2) == [([0, 1], parent), ([4, 9], parent)]


def test_a_process_that_dies_while_it_sends_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_a_message(sender: Connection, answer: object) -> None:
        os.write(sender.fileno(), (1000).to_bytes(4, "big") + b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Connection, "send", half_a_message)
    assert in_halves(_squares, range(4), least=2) == [([0, 1], os.getpid()), ([4, 9], os.getpid())]


@pytest.mark.parametrize("bad", [0, 3])
def test_an_error_of_either_half_is_raised_here(bad: int, capfd: pytest.CaptureFixture[str]) -> None:
    def inverse(items: Sequence[int]) -> list[float]:
        return [1 / (item - bad) for item in items]

    with pytest.raises(ZeroDivisionError):
        in_halves(inverse, range(4), least=2)


def test_runs_read_by_two_are_those_read_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        metrics = {"val_accuracy": number / 8} if number != 3 else {}
        path = save_run(
            tmp_path, f"run-{number}", seed=number, method="full" if number == 4 else "lora", metrics=metrics
        )
        path.with_name("metrics.jsonl").write_text(f'{{"step": 1, "val_accuracy": {number / 8}}}\n')
    for broken in ("alpha", "run-9"):
        (tmp_path / broken).mkdir()
        (tmp_path / broken / "result.json").write_text("no result")
    alone = load.load_runs(tmp_path)
    names = list(alone.frame["run_id"])
    curves = load.load_curves(tmp_path, names)
    monkeypatch.setattr(load, "_MANY", 2)
    together = load.load_runs(tmp_path)
    assert_frame_equal(together.frame, alone.frame)
    assert len(alone.problems) == 2 and together.problems == alone.problems
    found = load.load_curves(tmp_path, names)
    assert len(curves) == 5 and found == curves and list(found) == list(curves)
