"""Statistics against scipy, by hand, and by planted effects: Holm, bold, equivalence, mean ranks over datasets."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_analysis_load import save_run
from test_analysis_tables import measured

from analysis import select
from analysis.comparisons import best_beyond_noise, equivalence_p_value, holm, p_value
from analysis.figures import paper_figures
from analysis.interquartile import interquartile_mean
from analysis.load import load_runs
from analysis.mean_ranks import mean_ranks
from analysis.tables import paper_tables

NAME = "test_accuracy"


def cell(values: list[float], cell_id: str = "a") -> dict[Any, Any]:
    """A row with these scores, seed by seed."""
    return {
        "cell_id": cell_id,
        "model": "m",
        "dataset": "d",
        "recipe_id": "r",
        "num_collapsed": 0,
        NAME: float(np.mean(values)),
        f"{NAME}_sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        f"{NAME}_n": len(values),
        "by_seed": {NAME: dict(enumerate(values))},
    }


# ---------------------------------------------------------------- Holm


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04, and the last may not fall.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_bold_is_better_than_every_row_after_the_correction() -> None:
    """The test against the runner-up alone passes; as one of fifteen it must pass at a stricter level."""
    best, second, far = [0.90, 0.91, 0.92], [0.880, 0.897, 0.898], [0.5, 0.51, 0.52]
    rows = [cell(best, "a"), cell(second, "b")]
    probability = stats.ttest_rel(best, second).pvalue
    assert p_value(*rows, NAME) == pytest.approx(probability) and 0.01 < probability < 0.05
    assert best_beyond_noise(rows, NAME) == 0
    # Fifteen rows that are as close: 15 times the smallest of their p-values is above 5 %.
    assert best_beyond_noise([*rows, *(cell(second, f"c{n}") for n in range(14))], NAME) is None
    # Rows far below cost the runner-up nothing: Holm takes them first.
    assert (
        best_beyond_noise(
            [*rows, *(cell([v + 0.001 * i**2 for i, v in enumerate(far)], f"d{n}") for n in range(3))], NAME
        )
        == 0
    )


def test_a_row_of_one_run_says_nothing_and_a_runner_up_of_one_run_forbids_bold() -> None:
    rows = [cell([0.90, 0.91, 0.92], "a"), cell([0.70, 0.72, 0.71], "b")]
    assert best_beyond_noise([*rows, cell([0.6], "c")], NAME) == 0
    assert best_beyond_noise([*rows, cell([0.8], "c")], NAME) is None


def test_planted_effects_give_the_stated_error_rates() -> None:
    """1,000 tables of six rows: bold without any difference in at most 5 %; with one, the wrong row in at most 1 %."""
    random = np.random.default_rng(0)
    sd, num_seeds = 0.01, 5
    rates = {}
    for effect in (0.0, 2.0, 5.0):
        values = 0.8 + sd * random.standard_normal((1000, 6, num_seeds))
        values[:, 0] += effect * sd
        tables = [[cell(list(row), str(n)) for n, row in enumerate(table)] for table in values]
        found = [best_beyond_noise(rows, NAME) for rows in tables]
        rates[effect] = np.mean([one is not None for one in found]), np.mean([one == 0 for one in found])
    assert rates[0.0][0] <= 0.05
    for effect, power in ((2.0, 0.1), (5.0, 0.8)):
        assert rates[effect][1] > power and rates[effect][0] - rates[effect][1] <= 0.01


def test_equivalence_is_wrong_in_at_most_five_percent() -> None:
    """Means that differ by the margin itself are called equivalent in 5 % of the cases, equal ones mostly."""
    random = np.random.default_rng(1)
    sd, margin = 0.01, 0.02
    called = {}
    for difference in (0.0, margin):
        pairs = 0.8 + sd * random.standard_normal((1000, 2, 8))
        pairs[:, 1] += difference
        p_values = [equivalence_p_value(cell(list(a)), cell(list(b), "b"), NAME, margin) for a, b in pairs]
        called[difference] = np.mean([p is not None and p < 0.05 for p in p_values])
    assert called[0.0] > 0.9
    assert abs(called[margin] - 0.05) < 0.02


def test_equivalence_equals_two_one_sided_tests_of_scipy() -> None:
    first, second, margin = [0.80, 0.82, 0.81, 0.83], [0.81, 0.80, 0.815, 0.825], 0.02
    low = stats.ttest_rel(np.array(first) - np.array(second) + margin, np.zeros(4), alternative="greater").pvalue
    high = stats.ttest_rel(np.array(first) - np.array(second) - margin, np.zeros(4), alternative="less").pvalue
    assert equivalence_p_value(cell(first), cell(second), NAME, margin) == pytest.approx(max(low, high))
    third = [0.81, 0.80, 0.815, 0.825, 0.80]
    shifted = np.array(first)
    low = stats.ttest_ind(shifted + margin, third, equal_var=False, alternative="greater").pvalue
    high = stats.ttest_ind(shifted - margin, third, equal_var=False, alternative="less").pvalue
    assert equivalence_p_value(cell(first), cell(third), NAME, margin) == pytest.approx(max(low, high))


def test_several_comparisons_with_full_are_corrected_together(tmp_path: Path) -> None:
    """One p of 0.03 is beyond noise alone; beside two others of the same score it is not."""
    lora, full = [0.80, 0.82, 0.81], [0.840, 0.845, 0.850]
    assert 0.017 < stats.ttest_rel(lora, full).pvalue < 0.05

    def verdicts(folder: Path, values: tuple[int, ...]) -> list[str]:
        for epochs in values:
            for method, scores in (("lora", lora), ("full", full)):
                for seed, value in enumerate(scores):
                    metrics = measured(test_accuracy=value)
                    options = {"method": method, "seed": seed, "trainer__num_epochs": float(epochs)}
                    save_run(
                        folder, f"{method}{epochs}-{seed}", cell_id=f"{method}{epochs}", metrics=metrics, **options
                    )
        frame = frame_of(folder)
        (summary,) = (one for one in paper_tables(frame, select.cells(frame)) if one.name == "summary")
        return [row[-1] for row in summary.text.rows if "test accuracy" in " ".join(row)]

    difference = "\N{MINUS SIGN}0.0350"
    assert verdicts(tmp_path / "one", (1,)) == [f"{difference} (beyond noise)"]
    assert verdicts(tmp_path / "three", (1, 2, 3)) == [f"{difference} (inconclusive)"] * 3


# ---------------------------------------------------------------- mean ranks


def save_datasets(
    runs_dir: Path, num_datasets: int, *, methods: int = 3, skip: tuple[int, int] = (-1, -1)
) -> list[list[float]]:
    """LoRA of three ranks on several datasets, better by rank but for noise; returns scores by rank and dataset."""
    random = np.random.default_rng(3)
    scores = [[0.7 + 0.05 * m + 0.02 * float(random.random()) for _ in range(num_datasets)] for m in range(methods)]
    for m, row in enumerate(scores):
        for d, value in enumerate(row):
            if (m, d) != skip:
                metrics = measured(test_accuracy=value, val_accuracy=value)
                save_run(runs_dir, f"r{m}-d{d}", rank=2**m, dataset__name=f"d{d}", metrics=metrics)
    return scores


def frame_of(runs_dir: Path) -> pd.DataFrame:
    return load_runs(runs_dir).frame


def best_records(runs_dir: Path) -> list[dict[Any, Any]]:
    return select.records(select.best_cells(select.cells(frame_of(runs_dir))))


def test_mean_ranks_equal_scipy(tmp_path: Path) -> None:
    scores = save_datasets(tmp_path, 8)
    (found,) = mean_ranks(best_records(tmp_path))
    assert found.ranks == [1.0, 2.0, 3.0]
    assert [line["d0"]["rank"] for line in found.lines] == [4, 2, 1]
    assert found.friedman == pytest.approx(stats.friedmanchisquare(*scores).pvalue)
    raw = [stats.wilcoxon(scores[2 - a], scores[2 - b]).pvalue for a, b in combinations(range(3), 2)]
    assert [found.pairs[pair] for pair in combinations(range(3), 2)] == pytest.approx(holm(raw))
    assert raw[0] == pytest.approx(2 / 2**8)  # of eight differences of one sign
    assert found.groups() == []


def test_methods_that_do_not_differ_share_a_bar(tmp_path: Path) -> None:
    save_datasets(tmp_path, 5)
    (found,) = mean_ranks(best_records(tmp_path))
    # Five datasets: the exact p of a pair is 2/32, and three pairs make it 0.19.
    assert [*found.pairs.values()] == pytest.approx([3 / 16] * 3)
    assert found.groups() == [(0, 2)]
    table = next(
        t for t in paper_tables(frame_of(tmp_path), select.cells(frame_of(tmp_path))) if t.name == "mean_ranks"
    )
    assert [row[-3:-1] for row in table.text.rows] == [["1.00", "\N{EN DASH}"], ["2.00", "0.188"], ["3.00", "0.188"]]
    assert any(note.startswith("With 5 datasets and 3 pairs no corrected p can be below 0.19") for note in table.notes)
    assert table.numbers["p_holm"].tolist() == pytest.approx([3 / 16] * 3)


def test_below_five_datasets_there_are_none_and_the_table_says_so(tmp_path: Path) -> None:
    save_datasets(tmp_path, 4)
    assert mean_ranks(best_records(tmp_path)) == []
    frame = frame_of(tmp_path)
    tables = {table.name: table for table in paper_tables(frame, select.cells(frame))}
    assert "mean_ranks" not in tables
    assert any(
        note
        == "No mean ranks and no interquartile mean: they need two methods with scores on the same 5 datasets or more, "
        "and here a method has 4 at most."
        for note in tables["tasks_by_methods"].notes
    )


def test_a_method_that_lacks_a_dataset_has_no_mean_rank(tmp_path: Path) -> None:
    save_datasets(tmp_path, 6, skip=(1, 2))
    (found,) = mean_ranks(best_records(tmp_path))
    # Three methods have five datasets, two have six: the more methods count.
    assert len(found.lines) == 3 and found.datasets == ("d0", "d1", "d3", "d4", "d5")


def test_of_a_loss_less_is_better(tmp_path: Path) -> None:
    for d in range(5):
        for rank, nll in ((1, 2.0), (2, 1.0)):
            metrics = measured(val_nll=nll, test_nll=nll)
            save_run(
                tmp_path, f"{rank}-{d}", rank=rank, dataset__name=f"d{d}", dataset__best_metric="nll", metrics=metrics
            )
    (found,) = mean_ranks(best_records(tmp_path))
    assert [line["d0"]["rank"] for line in found.lines] == [2, 1]
    assert found.friedman is None and found.pairs[0, 1] == pytest.approx(2 / 32)


def test_the_interquartile_mean_by_hand() -> None:
    """Four datasets of two runs: of eight scores the two lowest and the two highest are left out."""
    found = interquartile_mean([[0.1, 0.9], [0.2, 0.8], [0.4, 0.5], [0.6, 0.7]])
    assert found is not None and found.mean == pytest.approx((0.4 + 0.5 + 0.6 + 0.7) / 4)
    # Runs of one dataset take each other's place and never that of another: these scores cannot change.
    found = interquartile_mean([[0.1, 0.1], [0.4, 0.4], [0.5, 0.5], [0.9, 0.9]])
    assert found is not None and found.interval == pytest.approx((0.45, 0.45))
    found = interquartile_mean([[0.3], [0.6]])
    assert found is not None and found.interval is None
    assert interquartile_mean([[0.3, 0.4], [0.6]]) is None


def test_the_interval_of_an_interquartile_mean_covers_as_stated() -> None:
    random = np.random.default_rng(5)
    centers = np.linspace(0.3, 0.9, 6)
    truth = stats.trim_mean((centers[:, None] + 0.05 * random.standard_normal((6, 20_000))).ravel(), 0.25)
    found = [interquartile_mean(centers[:, None] + 0.05 * random.standard_normal((6, 10))) for _ in range(80)]
    covered = [
        one is not None and one.interval is not None and one.interval[0] <= truth <= one.interval[1] for one in found
    ]
    assert 0.88 <= np.mean(covered) <= 0.99


def test_the_table_of_mean_ranks_has_interquartile_means(tmp_path: Path) -> None:
    values = {rank: [[0.6 + 0.02 * rank + 0.05 * d + 0.001 * s for s in range(3)] for d in range(5)] for rank in (1, 2)}
    for rank, by_dataset in values.items():
        for d, scores in enumerate(by_dataset):
            for seed, value in enumerate(scores):
                if (rank, d, seed) != (2, 4, 2):
                    run = {"rank": rank, "dataset__name": f"d{d}", "seed": seed, "cell_id": f"{rank}-{d}"}
                    save_run(tmp_path, f"{rank}-{d}-{seed}", metrics=measured(test_accuracy=value), **run)
    frame = frame_of(tmp_path)
    table = next(one for one in paper_tables(frame, select.cells(frame)) if one.name == "mean_ranks")
    expected = stats.trim_mean(np.ravel(values[1]), 0.25)
    shown = {row[2]: row[-1] for row in table.text.rows}
    # Of rank 2 one run is missing on one dataset.
    assert shown["2"] == "\N{EN DASH}" and shown["1"].startswith(f"{expected:.4f} (")
    assert any(note.startswith("No interquartile mean of a row") for note in table.notes)
    assert table.numbers["other_interquartile_mean"].tolist() == pytest.approx([expected])


def test_the_critical_difference_figure(tmp_path: Path) -> None:
    save_datasets(tmp_path, 8)
    drawn = {figure.name: figure for figure in paper_figures(select.cells(frame_of(tmp_path)), {})}
    figure = drawn["mean_ranks"].draw()
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["lora r4 qv (1.00)", "lora r2 qv (2.00)", "lora r1 qv (3.00)"]
    assert "Friedman: p = 0.000335" in figure.texts[-1].get_text()
    assert not [line for line in axes.lines if line.get_label() == "alike"]
