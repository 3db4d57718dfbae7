"""Launches of a sweep: written once each, united on reading."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from harness.results.launches import LaunchError, SearchedCell, launched_sweeps, read_launches, record_launch


def test_launches_are_united_in_the_order_in_which_runs_were_first_named(tmp_path: Path) -> None:
    for run_ids in (["b", "a"], ["a", "c"], ["c"]):
        record_launch(tmp_path, "demo", run_ids=run_ids, command=f"python -m harness {run_ids}")
    found = read_launches(tmp_path, "demo")
    assert found is not None
    assert found.run_ids == ["b", "a", "c"]
    assert found.added_run_ids == [["b", "a"], ["c"], []]
    assert [launch.command for launch in found.launches] == [
        "python -m harness ['b', 'a']",
        "python -m harness ['a', 'c']",
        "python -m harness ['c']",
    ]
    assert launched_sweeps(tmp_path) == ["demo"]
    assert read_launches(tmp_path, "other") is None


def test_runs_that_searches_decided_on_stand_in_the_order_of_the_cells(tmp_path: Path) -> None:
    first, second = SearchedCell(["x"], ["t1"], ["r1"], [1.0]), SearchedCell(["x"], ["t2"], ["r2"], [2.0])
    undecided = [SearchedCell(["x"], ["t1"]), SearchedCell(["x"], ["t2"])]
    record_launch(tmp_path, "demo", run_ids=["other", "t1", "t2"], command="x", searched=undecided)
    record_launch(tmp_path, "demo", run_ids=["t1", "t2", "r2"], command="x", searched=[undecided[0], second])
    record_launch(tmp_path, "demo", run_ids=["t1", "t2", "r2", "r1"], command="x", searched=[first, second])
    found = read_launches(tmp_path, "demo")
    assert found is not None
    assert found.run_ids == ["other", "t1", "t2", "r1", "r2"]


def test_runs_at_values_that_a_search_chooses_no_more_are_left_out(tmp_path: Path) -> None:
    trials = ["t1", "t2"]
    before = SearchedCell(["x"], trials, ["r-1.0-s0", "r-1.0-s1"], [1.0])
    other = SearchedCell(["x"], ["u1"], ["q-s0"], [3.0])
    record_launch(
        tmp_path, "demo", run_ids=[*trials, "u1", *before.runs, "q-s0"], command="x", searched=[before, other]
    )  # type: ignore[misc]
    again = SearchedCell(["x"], [*trials, "t3"])
    record_launch(tmp_path, "demo", run_ids=[*trials, "t3", "u1", "q-s0"], command="x", searched=[again, other])
    found = read_launches(tmp_path, "demo")
    assert found is not None and found.superseded == []  # until it has decided anew
    after = SearchedCell(["x"], [*trials, "t3"], ["r-2.0-s0"], [2.0])
    more_seeds = SearchedCell(["x"], ["u1"], ["q-s0", "q-s1"], [3.0])
    record_launch(
        tmp_path,
        "demo",
        run_ids=[*trials, "t3", "u1", "r-2.0-s0", "q-s0", "q-s1"],
        command="x",
        searched=[after, more_seeds],
    )
    found = read_launches(tmp_path, "demo")
    assert found is not None
    assert found.superseded == ["r-1.0-s0", "r-1.0-s1"]
    assert sorted(found.run_ids) == sorted([*trials, "t3", "u1", "r-2.0-s0", "q-s0", "q-s1"])
    record_launch(tmp_path, "demo", run_ids=["r-1.0-s1"], command="x trainer.learning_rate=1.0")  # asked for by name
    found = read_launches(tmp_path, "demo")
    assert found is not None
    assert found.superseded == ["r-1.0-s0"]
    assert "r-1.0-s1" in found.run_ids


def _launch(runs_dir: Path, barrier: object, number: int) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    record_launch(runs_dir, "demo", run_ids=[f"run{number}"], command="x")


def test_launchers_that_start_at_once_are_all_in_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(8)
    processes = [context.Process(target=_launch, args=(tmp_path, barrier, number)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = read_launches(tmp_path, "demo")
    assert found is not None
    assert sorted(found.run_ids) == [f"run{number}" for number in range(8)]


def test_one_damaged_file_is_named(tmp_path: Path) -> None:
    record_launch(tmp_path, "demo", run_ids=["a"], command="x")
    damaged = record_launch(tmp_path, "demo", run_ids=["b"], command="x")
    damaged.write_text("{")
    with pytest.raises(LaunchError, match=f"{damaged.name}: not readable as JSON.*the other launches stand"):
        read_launches(tmp_path, "demo")
