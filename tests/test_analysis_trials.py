"""Trials of a search in the analysis: no row of a table, but counted, costed and shown as what was tried."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scripts import load_script
from test_analysis_load import result, save_json

from analysis.figures import paper_figures
from analysis.load import LoadError, load_runs
from analysis.report import write_report
from analysis.select import best_cells, cells
from analysis.status import print_status
from analysis.tables import paper_tables
from analysis.trials import searches_of
from harness.results.launches import SearchedCell, read_launches, record_launch

RATES = {1e-3: 0.80, 3e-3: 0.90, 9e-3: 0.85, 4e-3: None}


def save_searched(
    runs_dir: Path,
    *,
    axis: str = "learning_rate",
    values: dict[float, float | None] = RATES,
    chosen: float = 3e-3,
    edges: dict[str, str] | None = None,
    is_decided: bool = True,
) -> None:
    """A cell with a trial at each value on seed 1000 (None: diverged), and two runs at the chosen one."""
    trials = []
    for value, score in values.items():
        trials.append(f"trial-{value:g}")
        metrics = {} if score is None else {"val_accuracy": score, "val_nll": 1 - score, "train_flops": 1e12}
        status = "diverged" if score is None else "finished"
        save_one(runs_dir, trials[-1], axis, value, 1000, metrics, status=status, trial=True)
    runs = [f"run-s{seed}" for seed in (0, 1)]
    if is_decided:
        for seed, run_id in enumerate(runs):
            save_one(runs_dir, run_id, axis, chosen, seed, {"val_accuracy": 0.88 + seed / 100, "test_accuracy": 0.87})
    cell = SearchedCell(
        [f"trainer.{axis}"],
        trials,
        runs if is_decided else None,
        [chosen] if is_decided else None,
        edges or {},
    )
    first = SearchedCell([f"trainer.{axis}"], trials[:3])
    for named, searched in ((trials[:3], first), (trials + runs * is_decided, cell)):
        record_launch(runs_dir, "demo", run_ids=named, command="python -m harness", searched=[searched])


def save_one(
    runs_dir: Path,
    run_id: str,
    axis: str,
    value: float,
    seed: int,
    metrics: Any,
    *,
    status: str = "finished",
    **more: Any,
) -> None:
    content = result(run_id, cell_id=run_id.rpartition("-s")[0] or run_id, seed=seed, metrics=metrics, status=status)
    content["config"]["trainer"][axis] = value
    content["config"] |= more
    save_json(runs_dir / run_id / "result.json", content)


def test_trials_are_no_rows_and_their_costs_are(tmp_path: Path) -> None:
    save_searched(tmp_path, values={1e-3: 0.8, 3e-3: 0.9, 9e-3: 0.85})
    runs = load_runs(tmp_path, sweep="demo")
    assert sorted(runs.frame["run_id"]) == ["run-s0", "run-s1"]
    assert len(runs.trials) == 3 and runs.to_do == []
    (row,) = best_cells(cells(runs.frame)).to_dict("records")
    assert (row["num_trials"], row["tuning_flops"], row["learning_rate"]) == (3, 3e12, 3e-3)
    assert row["val_accuracy"] == pytest.approx(0.885)  # of the two runs, and not of the better trial
    (loose,) = best_cells(cells(load_runs(tmp_path).frame)).to_dict("records")  # the folder without its sweep
    assert loose["val_accuracy_n"] == 2 and "num_trials" not in loose


def test_the_compute_of_a_search_is_missing_where_a_trial_recorded_none(tmp_path: Path) -> None:
    save_searched(tmp_path)
    (row,) = best_cells(cells(load_runs(tmp_path, sweep="demo").frame)).to_dict("records")
    assert row["num_trials"] == 4 and math.isnan(row["tuning_flops"])


def test_the_table_of_a_search_has_every_value_with_its_score(tmp_path: Path) -> None:
    save_searched(tmp_path, edges={"trainer.learning_rate": "high"})
    runs = load_runs(tmp_path, sweep="demo")
    searches = searches_of(runs.launches, runs.trials)
    tables = {one.name: one for one in paper_tables(runs.frame, cells(runs.frame), searches=searches)}
    table = tables["search"]
    (shown,) = table.text.rows
    assert shown[-2:] == ["0.003", "0.001: 0.8000; 0.003: 0.9000; 0.004: diverged; 0.009: 0.8500"]
    assert table.numbers["chosen"].tolist() == [False, True, False, False]
    assert "the chosen trainer.learning_rate is the highest tried" in " ".join(table.notes)
    # Where the rate stands it is marked, as at the edge of a grid.
    assert "0.003§" in tables["tradeoff"].text.rows[0]
    assert any("the highest of its search" in note for note in tables["tradeoff"].notes)
    drawn = {figure.name for figure in paper_figures(cells(runs.frame), {}, searches=searches)}
    assert "search" in drawn
    assert "search" not in {one.name for one in paper_tables(runs.frame, cells(runs.frame))}


def test_only_the_row_whose_search_ended_at_an_edge_is_marked(tmp_path: Path) -> None:
    save_searched(tmp_path, edges={"trainer.learning_rate": "high"})
    for seed in (0, 1):
        save_one(
            tmp_path, f"other-s{seed}", "learning_rate", 5e-4, seed, {"val_accuracy": 0.8}, method={"name": "full"}
        )
    record_launch(tmp_path, "demo", run_ids=["other-s0", "other-s1"], command="python -m harness", searched=[])
    runs = load_runs(tmp_path, sweep="demo")
    assert sorted(runs.frame["search_edge"], key=str) == [None, None, "high", "high"]
    (table, *_) = paper_tables(runs.frame, cells(runs.frame))
    assert sorted(cell for row in table.text.rows for cell in row if cell.startswith("0.00")) == ["0.0005", "0.003§"]
    (note,) = [note for note in table.notes if "at the edge" in note]
    assert note.endswith("a better one may lie outside: lora rank 8 qv, the highest of its search.")


def test_another_setting_that_was_searched_is_a_column_and_no_other_recipe(tmp_path: Path) -> None:
    """Full fine-tuning at its best batch size is what LoRA at its own best batch size is compared with."""
    save_searched(tmp_path, axis="batch_size", values={8: 0.8, 16: 0.9, 32: 0.7}, chosen=16)
    content = result("full-s0", cell_id="full", method="full", metrics={"val_accuracy": 0.9, "peak_memory_bytes": 400})
    content["config"]["trainer"]["batch_size"] = 8
    save_json(tmp_path / "full-s0" / "result.json", content)
    cell = SearchedCell(["trainer.batch_size"], [], ["full-s0"], [8.0])
    record_launch(tmp_path, "demo", run_ids=["full-s0"], command="python -m harness method=full", searched=[cell])
    runs = load_runs(tmp_path, sweep="demo")
    found = cells(runs.frame)
    assert found["recipe_id"].nunique() == 1 and found["differs"].isna().all()
    tradeoff = paper_tables(runs.frame, found)[0]
    at = tradeoff.text.titles.index("batch size (searched)")
    assert [row[at] for row in tradeoff.text.rows] == ["16", "8"]


def test_a_search_that_has_not_decided_is_said_and_no_table(tmp_path: Path) -> None:
    save_searched(tmp_path, is_decided=False)
    with pytest.raises(LoadError, match=r"none of its 4 runs has ended .* yet; 4 trials of its search have\."):
        load_runs(tmp_path, sweep="demo")
    with pytest.raises(LoadError, match="only trials of a search have ended there, 4 of them"):
        load_runs(tmp_path)
    console = Console(record=True, width=200)
    print_status(tmp_path, "demo", console=console)
    text = console.export_text()
    assert "demo: 3 finished, 1 diverged" in text
    assert "search for trainer.learning_rate: chosen in 0 of 1 cells, 4 trials so far" in text


def test_runs_at_a_value_that_the_search_chose_before_are_no_row(tmp_path: Path) -> None:
    save_searched(tmp_path)
    decided = read_launches(tmp_path, "demo")
    assert decided is not None
    [cell] = decided.launches[-1].searched
    assert cell.chosen is not None
    save_one(tmp_path, "later-s0", "learning_rate", 0.5, 0, {"val_accuracy": 0.5, "test_accuracy": 0.4})
    now = replace(cell, runs=["later-s0"], chosen=[0.5])
    record_launch(tmp_path, "demo", run_ids=[*cell.trials, "later-s0"], command="python -m harness", searched=[now])
    runs = load_runs(tmp_path, sweep="demo")
    assert runs.frame["run_id"].tolist() == ["later-s0"]  # though it scores less than those
    assert runs.problems == ["run-s0, run-s1: at values that a search chose in an earlier launch; now it chose others"]
    report = write_report(tmp_path, tmp_path / "reports", "demo", console=Console(file=io.StringIO()))
    head = (report / "report.md").read_text()
    assert "run-s0, run-s1: at values that a search chose in an earlier launch" in head
    assert "Still counted here" not in head


def test_the_report_says_what_was_searched_and_shows_the_rounds_as_one_launch(tmp_path: Path) -> None:
    save_searched(tmp_path / "runs")
    folder = write_report(tmp_path / "runs", tmp_path / "reports", sweep="demo", console=Console(file=io.StringIO()))
    text = (folder / "report.md").read_text()
    assert "Search: `trainer.learning_rate` in 1 cells, by 4 trials (3 finished, 1 diverged) on seed 1000" in text
    assert text.count("python -m harness") == 1
    assert (folder / "figures/search.png").is_file()


def test_the_audit_of_a_search_compares_its_choice_with_a_full_grid(tmp_path: Path) -> None:
    """By hand: the grid's best is 0.92 at 4e-3, the choice 0.90, the runs 0.88 and 0.89: 0.02 / 0.00707 = 2.83 sd."""
    module = load_script("benchmarks/search_against_grid.py")
    save_searched(tmp_path, values={1e-3: 0.8, 3e-3: 0.9, 9e-3: 0.85})
    rates = {1e-3: 0.80, 2e-3: 0.85, 3e-3: 0.90, 4e-3: 0.92, 9e-3: 0.85}
    for rate, score in rates.items():
        save_one(tmp_path, f"trial-{rate:g}", "learning_rate", rate, 1000, {"val_accuracy": score}, trial=True)
    record_launch(tmp_path, "grid", run_ids=[f"trial-{rate:g}" for rate in rates], command="python -m harness")
    (one,) = module.audit(tmp_path, "demo", "grid")
    assert (one.chosen, one.score, one.best_rate, one.best) == (3e-3, 0.9, 4e-3, 0.92)
    assert one.regret == pytest.approx(0.02 / (0.01 / math.sqrt(2)))
    assert (one.num_trials, one.num_grid) == (3, 5)
