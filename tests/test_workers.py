"""How many runs compute at a time on a CPU (`hydra.launcher.workers=auto`), from rates that are made up."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import test_run

from harness.config.composing import to_dict
from harness.config.schema import RunConfig
from harness.config.validation import ConfigError
from harness.content.identity import PlannedRun, planned
from harness.folder import run_dir
from harness.results.launches import record_launch
from harness.results.schema import RunResult, Status, write_result
from hydra_plugins.lora_harness._workers import Tried, check_workers, choose_workers

MIB = 2**20


@pytest.fixture
def runs(tmp_path: Path) -> list[PlannedRun]:
    """Twenty runs that differ in their seed."""
    (tmp_path / "rows.csv").write_text("text,label\na b,x\nc d,y\n")
    return [planned(test_run.config(tmp_path / "rows.csv", tmp_path, seed=seed)) for seed in range(20)]


class Machine:
    """Measures by a table: tokens a second of all processes together, by their number."""

    def __init__(self, num_cores: int, rates: dict[int, float]) -> None:
        self.num_cores, self.rates = num_cores, rates
        self.tried: list[int] = []

    def measure(self, config: RunConfig, num_workers: int) -> Tried:
        self.tried.append(num_workers)
        if num_workers not in self.rates:
            raise RuntimeError("its process ended with exit code -9")
        return Tried(num_workers, self.num_cores // num_workers, self.rates[num_workers], 300 * MIB)

    def choose(self, runs: list[PlannedRun], *, available: int | None = None) -> int | None:
        return choose_workers(runs, num_cores=self.num_cores, measure=self.measure, available=available)


@pytest.mark.parametrize(
    ("num_runs", "num_cores", "rates", "tried", "chosen"),
    [
        (20, 2, {1: 1000.0, 2: 1200.0}, [1, 2], 2),
        (20, 2, {1: 1000.0, 2: 1049.0}, [1, 2], 1),
        (16, 16, {1: 1000.0, 2: 1900.0, 4: 3000.0, 8: 3100.0, 16: 9000.0}, [1, 2, 4, 8], 4),
        (20, 6, {1: 1000.0, 2: 1900.0, 3: 2500.0, 6: 4000.0}, [1, 2, 3, 6], 6),  # 4 would leave two cores idle
        (20, 3, {1: 1000.0, 3: 1500.0}, [1, 3], 3),
        # No faster for these runs, though more tokens a second are computed: two rounds of two, of which one is half.
        (3, 2, {1: 1000.0, 2: 1100.0}, [1, 2], 1),
        (17, 16, {1: 1000.0, 2: 1100.0, 4: 1400.0, 8: 1600.0, 16: 1750.0}, [1, 2, 4, 8, 16], 4),
        (5, 8, {1: 1000.0, 2: 1500.0, 4: 2000.0, 5: 2110.0}, [1, 2, 4, 5], 5),
    ],
)
def test_as_many_workers_as_make_the_runs_faster(
    runs: list[PlannedRun], num_runs: int, num_cores: int, rates: dict[int, float], tried: list[int], chosen: int
) -> None:
    machine = Machine(num_cores, rates)
    assert machine.choose(runs[:num_runs]) == chosen
    assert machine.tried == tried


def test_what_was_chosen_is_said_with_its_rates(runs: list[PlannedRun], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="harness")
    Machine(2, {1: 1000.0, 2: 1049.4}).choose(runs)
    assert f"workers=auto: timing steps of {runs[0].run_id} in one process and in several" in caplog.text
    assert "workers=auto: 1 for 20 runs (tokens a second: 1 of 2 threads 1,000, 2 of 1 thread 1,049)" in caplog.text


def test_the_run_that_holds_most_is_timed(runs: list[PlannedRun], tmp_path: Path) -> None:
    timed: list[RunConfig] = []

    def measure(config: RunConfig, num_workers: int) -> Tried:
        timed.append(config)
        return Tried(num_workers, 1, 1000.0, 0)

    full = planned(test_run.config(tmp_path / "rows.csv", tmp_path, "full"))
    choose_workers([*runs[:2], full, runs[2]], num_cores=2, measure=measure, available=None)
    assert timed == [full.config] * 2


def test_no_more_workers_than_runs_that_are_to_do(runs: list[PlannedRun]) -> None:
    rates = {number: 1000.0 * number for number in range(1, 17)}
    machine = Machine(16, rates)
    assert machine.choose(runs[:3]) == 3
    assert machine.tried == [1, 2, 3]
    machine = Machine(16, rates)
    assert machine.choose(runs[:1]) is None  # as in a late round of a search: that decides nothing
    assert machine.tried == []


def test_runs_that_ask_for_threads_leave_room_for_fewer(runs: list[PlannedRun]) -> None:
    asking = [replace(run, config=replace(run.config, num_threads=4)) for run in runs]
    machine = Machine(16, {1: 1000.0, 2: 2000.0, 4: 4000.0})
    assert machine.choose(asking) == 4
    assert machine.tried == [1, 2, 4]
    assert Machine(3, {}).choose(asking) == 1


def test_no_more_are_tried_than_memory_has_room_for(runs: list[PlannedRun], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="harness")
    machine = Machine(8, {1: 1000.0, 2: 2000.0, 4: 4000.0, 8: 8000.0})
    assert machine.choose(runs, available=1000 * MIB) == 2
    assert machine.tried == [1, 2]
    assert "4 need 1.17 GiB, available are 1,000.00 MiB" in caplog.text


@pytest.mark.parametrize(("rates", "chosen"), [({}, 1), ({1: 1000.0, 2: 2000.0}, 2)])
def test_what_cannot_be_tried_ends_the_trying(
    runs: list[PlannedRun], rates: dict[int, float], chosen: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="harness")
    machine = Machine(8, rates)
    assert machine.choose(runs) == chosen
    assert f"{2 * chosen if rates else 1} could not be tried: its process ended with exit code -9" in caplog.text


def ended(run: PlannedRun, num_threads: object, **metrics: float) -> None:
    """Leaves the result of a finished run that had so many threads."""
    result = RunResult(
        run_id=run.run_id,
        cell_id=run.identity.cell_id,
        sweep=None,
        status=Status.FINISHED,
        config=to_dict(run.config),
        environment={"num_threads": num_threads} if num_threads is not None else {},
        metrics=metrics,
    )
    write_result(run_dir(run), result)


@pytest.mark.parametrize(
    ("threads", "chosen"), [([4, 4], 4), ([None, 4], 4), ([1], 16), ([64, 8], 2), ([64], None), (["many"], None)]
)
def test_a_continued_sweep_keeps_the_threads_of_its_runs(
    runs: list[PlannedRun], threads: list[object], chosen: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="harness")
    for run, number in zip(runs, threads, strict=False):
        ended(run, number)
    machine = Machine(16, {1: 1000.0, 2: 900.0})
    assert machine.choose(runs) == (chosen or 1)
    assert machine.tried == ([1, 2] if chosen is None else [])
    one = threads[-1]
    assert (f"because runs of this sweep had {one} thread{'s' if one != 1 else ''} each" in caplog.text) == bool(chosen)


def test_of_a_searched_sweep_also_the_trials_that_this_round_does_not_want(runs: list[PlannedRun]) -> None:
    runs = [replace(run, config=replace(run.config, sweep="searched")) for run in runs]
    ended(runs[0], 2)
    record_launch(Path(runs[0].config.runs_dir), "searched", run_ids=[run.run_id for run in runs], command="python")
    machine = Machine(8, {})
    assert machine.choose(runs[1:]) == 4
    assert machine.tried == []


def test_threads_are_kept_where_so_many_runs_fit(runs: list[PlannedRun]) -> None:
    ended(runs[0], 1, peak_rss_bytes=200.0 * MIB)
    machine = Machine(8, {1: 1000.0, 2: 1000.0})
    assert machine.choose(runs, available=2100 * MIB) == 8
    assert machine.choose(runs, available=1900 * MIB) == 1
    assert machine.tried == [1, 2]


@pytest.mark.parametrize("workers", ["many", 1.5, True, [2], 0, -1])
def test_workers_are_a_number_or_auto(workers: object) -> None:
    with pytest.raises(ConfigError, match=r"hydra.launcher.workers=.*: give the number of runs at a time, 1 or more"):
        check_workers(workers)


def test_a_number_of_workers_stays_as_it_is() -> None:
    assert (check_workers(None), check_workers(3), check_workers("auto")) == (1, 3, None)
