"""Conditions on the same rows of test: against scipy, by hand, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_analysis_load import save_run
from test_analysis_tables import measured

from analysis import select
from analysis.load import load_runs
from analysis.predictions import mcnemar_p_value, paired_rows
from analysis.tables import PaperTable, paper_tables

EN_DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def answers(num_rows: int, share: float, seed: int) -> Any:
    return np.random.default_rng(seed).random(num_rows) < share


def test_one_seed_equals_scipy() -> None:
    first, second = answers(400, 0.9, 0), answers(400, 0.86, 1)
    found = paired_rows([first], [second])
    assert found.difference == pytest.approx(first.mean() - second.mean())
    only_first, only_second = (first & ~second).sum(), (second & ~first).sum()
    assert found.p_value == pytest.approx(stats.binomtest(only_first, only_first + only_second).pvalue)
    assert (found.only_first, found.only_second) == ((only_first,), (only_second,))
    expected = stats.bootstrap(
        (first * 1.0 - second,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(0)
    ).confidence_interval
    # Both are drawn, and move by whole rows: a row of 400 apart at most.
    assert found.interval == pytest.approx((expected.low, expected.high), abs=1.01 / 400)
    assert paired_rows([first], [second]) == found


def test_rows_are_drawn_for_all_seeds_together() -> None:
    """Three seeds with the same answers know no more about other rows than one of them."""
    first, second = answers(300, 0.9, 0), answers(300, 0.8, 1)
    one, three = paired_rows([first], [second]), paired_rows([first] * 3, [second] * 3)
    assert three.interval == pytest.approx(one.interval) and three.difference == pytest.approx(one.difference)
    seeds = [answers(300, 0.9, seed) for seed in range(3)], [answers(300, 0.8, seed) for seed in range(3, 6)]
    found = paired_rows(*seeds)
    by_row = (np.stack(seeds[0]) * 1.0 - np.stack(seeds[1])).mean(0)
    expected = stats.bootstrap((by_row,), np.mean, method="percentile", rng=np.random.default_rng(1))
    low, high = expected.confidence_interval
    assert found.difference == pytest.approx(by_row.mean())
    assert found.interval == pytest.approx((low, high), abs=1.01 / 300)


def test_p_of_several_seeds_by_hand() -> None:
    right, wrong = np.ones(10, bool), np.zeros(10, bool)
    # Of ten rows the first has ten alone, then eight of ten: one-sided 1/1024 and 56/1024, twice their mean, twice.
    eight = right.copy()
    eight[:2] = False
    second = ~eight
    found = paired_rows([right, eight], [wrong, second])
    assert found.p_value == pytest.approx(2 * (1 + 56) / 1024)
    # In opposite directions they find nothing, though each by itself is far below 5 %.
    assert paired_rows([right, wrong], [wrong, right]).p_value == 1.0
    assert paired_rows([right], [right]).p_value == 1.0


def test_seeds_combined_are_wrong_in_at_most_five_percent() -> None:
    """The same runs on both sides but for noise: seeds share hard rows, so their p-values depend on each other."""
    random = np.random.default_rng(2)
    hard = np.where(random.random((1000, 1, 1, 200)) < 0.3, 0.5, 0.98)
    right = random.random((1000, 2, 3, 200)) < hard
    only = [(right[:, side] & ~right[:, 1 - side]).sum(-1).tolist() for side in (0, 1)]
    found = [mcnemar_p_value(*counts) for counts in zip(*only, strict=True)]
    assert np.mean(np.array(found) < 0.05) <= 0.05
    # Rows that the second has wrong in every seed beside them are found.
    more = [[count + 25 for count in counts] for counts in only[0]]
    assert np.mean([mcnemar_p_value(*counts) < 0.05 for counts in zip(more, only[1], strict=True)]) > 0.8


# ---------------------------------------------------------------- the table


def save_predicting(
    runs_dir: Path, run_id: str, right: Any, *, source: str = "test.csv line", val: float = 0.8, **options: Any
) -> None:
    """A finished run, with predictions on test that are right where said."""
    metrics = measured(test_accuracy=float(np.mean(right)), val_accuracy=val)
    save_run(runs_dir, run_id, cell_id=run_id.partition("-")[0], metrics=metrics, **options)
    folder = runs_dir / run_id / "predictions"
    folder.mkdir()
    num_rows = len(right)
    table = {
        "row": np.arange(num_rows),
        "source": pd.Categorical([source] * num_rows),
        "source_row": np.arange(num_rows) + 2,
        "label": ["yes", "no"] * (num_rows // 2),
        "predicted": np.where(right, ["yes", "no"] * (num_rows // 2), "other"),
    }
    pd.DataFrame(table).to_parquet(folder / "test.parquet", index=False)


def table_of(runs_dir: Path, **options: Any) -> PaperTable | None:
    frame = load_runs(runs_dir).frame
    found = paper_tables(frame, select.cells(frame), **{"predictions_dir": runs_dir, **options})
    return next((table for table in found if table.name == "paired_predictions"), None)


def save_three(runs_dir: Path) -> dict[str, list[Any]]:
    """LoRA of two ranks, the second the best on val, and full fine-tuning, on two seeds."""
    right = {
        name: [answers(200, share, 10 * n + s) for s in (0, 1)]
        for n, (name, share) in enumerate({"r1": 0.7, "r8": 0.8, "full": 0.9}.items())
    }
    for seed in (0, 1):
        save_predicting(runs_dir, f"r1-{seed}", right["r1"][seed], seed=seed, rank=1)
        save_predicting(runs_dir, f"r8-{seed}", right["r8"][seed], seed=seed, val=0.9)
        save_predicting(runs_dir, f"full-{seed}", right["full"][seed], seed=seed, method="full")
    return right


def test_every_condition_stands_against_the_best_on_val_and_against_full(tmp_path: Path) -> None:
    right = save_three(tmp_path)
    table = table_of(tmp_path)
    assert table is not None
    at = table.text.titles.index("against")
    shown = {(row[1], row[at]) for row in table.text.rows}
    assert shown == {("1", "lora rank 8 qv (best on val)"), ("1", "full"), ("8", "full")}
    expected = {
        pair: paired_rows(right[pair[0]], right[pair[1]]) for pair in (("r1", "r8"), ("r1", "full"), ("r8", "full"))
    }
    for line in table.numbers.to_dict("records"):
        other = "full" if line["other_method"] == "full" else "r8"
        found = expected[f"r{line['rank']}", other]
        assert (line["difference"], line["low"], line["high"]) == (found.difference, *found.interval)
        assert line["p"] == found.p_value and line["p_holm"] >= line["p"]
        assert (line["seeds"], line["num_rows"]) == ((0, 1), 200)
    assert "correction for the 3 rows of this table" in table.notes[2]
    # The step that was last saved none, and without the folder of the runs there is nothing to read.
    assert table_of(tmp_path, scores="last") is None and table_of(tmp_path, predictions_dir=None) is None


def test_the_best_of_all_may_be_full(tmp_path: Path) -> None:
    for name, options in {"r1": {"rank": 1}, "full": {"method": "full", "val": 0.95}}.items():
        save_predicting(tmp_path, f"{name}-0", answers(50, 0.8, len(name)), **options)
    table = table_of(tmp_path)
    assert table is not None
    ((*_, against, difference, interval, p, seeds, num_rows),) = table.text.rows
    assert (against, seeds, num_rows) == ("full (best on val)", "1", "50")
    assert "over several seeds twice" not in table.notes[2]
    assert difference[0] in f"+{MINUS}" and " to " in interval and float(p) <= 1


def test_other_rows_are_refused_by_name(tmp_path: Path) -> None:
    save_three(tmp_path)
    for seed in (0, 1):
        other = {"seed": seed, "rank": 4, "source": "other.csv line"}
        save_predicting(tmp_path, f"r4-{seed}", answers(200, 0.8, seed), **other)
    table = table_of(tmp_path)
    assert table is not None and len(table.text.rows) == 3
    (note,) = (note for note in table.notes if note.startswith("Not compared"))
    assert "lora rank 4 qv and full of bert on sst2 were scored on different rows of test" in note


def test_seeds_without_a_partner_and_files_of_other_scores_are_left_out(tmp_path: Path) -> None:
    save_three(tmp_path)
    (tmp_path / "r8-1/predictions/test.parquet").write_bytes(b"PAR1 no more")
    save_predicting(tmp_path, "r2-7", answers(200, 0.8, 5), seed=7, rank=2)
    path = tmp_path / "r1-0/predictions/test.parquet"
    pd.read_parquet(path).assign(predicted="yes").to_parquet(path)
    table = table_of(tmp_path)
    assert table is not None
    lines = table.numbers.to_dict("records")
    assert {(line["rank"], line["seeds"]) for line in lines} == {(1, (1,)), (8, (0,))}
    (note,) = (note for note in table.notes if note.startswith("Not compared"))
    assert "r8-1/predictions/test.parquet" in note and "r1-0: its predictions have an accuracy of 0.5000" in note


def test_numbers_of_a_regression_are_not_right_or_wrong(tmp_path: Path) -> None:
    for run_id, method in (("lora-0", "lora"), ("full-0", "full")):
        save_predicting(tmp_path, run_id, answers(50, 0.8, 0), method=method)
        path = tmp_path / run_id / "predictions/test.parquet"
        pd.read_parquet(path).assign(label=1.5, predicted=1.4).to_parquet(path)
    assert table_of(tmp_path) is None
