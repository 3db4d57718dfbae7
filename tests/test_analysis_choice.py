"""The sentences at the head of a report: which condition is best on val, and which cheaper ones the tests leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from test_analysis_load import save_run

from analysis.load import load_runs
from analysis.select import best_cells, cells
from analysis.tables import Choice, choices
from harness.results.schema import Status

MIB = 1024 * 1024
# Val accuracy by seed. Against the best of them (0.906, 0.914, 0.910), paired by seed, the p-values are far below 5 %
# for `k`, above it for `q` and none for the one seed of `v`.
SCORES = {
    "all": (0.906, 0.914, 0.910),
    "q": (0.904, 0.906, 0.911),
    "k": (0.806, 0.8145, 0.810),
    "v": (0.9,),
}


def save(runs_dir: Path, scores: Mapping[str, Sequence[float]], **options: Any) -> None:
    """LoRA at placements, the later ones in less memory."""
    for place, (placement, values) in enumerate(scores.items()):
        for seed, value in enumerate(values):
            name = f"{options.get('dataset__name', '')}{placement}-s{seed}"
            metrics = {
                "val_accuracy": value,
                "test_accuracy": value - 0.01,
                "peak_memory_bytes": (100 - 10 * place) * MIB,
            }
            metrics |= {"num_trainable_params": 1000.0 - place}
            save_run(
                runs_dir, name, cell_id=name.rpartition("-")[0], seed=seed, rank=8, target_layers=placement,
                metrics={key: metrics[key] for key in options.get("measured", metrics)},
                **{key: value for key, value in options.items() if key != "measured"},
            )  # fmt: skip


def found(runs_dir: Path, **options: float) -> list[Choice]:
    return choices(best_cells(cells(load_runs(runs_dir).frame)), **options)


def test_the_best_and_what_the_tests_leave(tmp_path: Path) -> None:
    save(tmp_path, SCORES)
    (choice,) = found(tmp_path)
    assert choice.verdict == (
        "bert on sst2: `lora rank 8 all` has the best val accuracy, 0.9100 ± 0.0040 (n=3; test accuracy 0.9000 ± "
        "0.0040, peak memory 100.0 MiB)."
    )
    assert stats.ttest_rel(SCORES["all"], SCORES["q"]).pvalue > 0.05
    assert 2 * stats.ttest_rel(SCORES["all"], SCORES["k"]).pvalue < 0.05
    assert choice.tests == (
        "Of 2 with less peak memory, 1 cannot be told from it (t-tests at 5 %, Holm's correction for 2): "
        "`lora rank 8 q` (0.9070 ± 0.0036, n=3, 90.0 MiB). 1 with less peak memory cannot be tested: one seed, or no "
        "noise. That does not show that they are equal: none is shown to be within 0.0050 of it."
    )
    assert [row["target_layers"] for row in choice.alike] == ["q"]


def test_what_is_shown_to_be_as_good_is_named(tmp_path: Path) -> None:
    save(tmp_path, {name: SCORES[name] for name in ("all", "q")})
    (choice,) = found(tmp_path, margin=0.05)
    assert "The only one with less peak memory cannot be told from it (t-test at 5 %): `lora rank 8 q`" in choice.tests
    assert choice.tests.endswith("The cheapest that is shown to be as good, within 0.0500 of it: `lora rank 8 q`.")


def test_all_that_is_cheaper_is_worse(tmp_path: Path) -> None:
    save(tmp_path, {name: SCORES[name] for name in ("all", "k")})
    assert (
        found(tmp_path)[0].tests == "The only one tested with less peak memory is worse beyond noise (t-test at 5 %)."
    )


def test_the_best_is_the_cheapest(tmp_path: Path) -> None:
    save(tmp_path, {name: SCORES[name] for name in ("k", "all")})
    assert found(tmp_path)[0].tests == "None with less peak memory was run in its recipe."


def test_one_seed_says_nothing_of_how_sure_it_is(tmp_path: Path) -> None:
    save(tmp_path, {name: values[:1] for name, values in SCORES.items()})
    (choice,) = found(tmp_path)
    assert "`lora rank 8 all` has the best val accuracy, 0.9060 (n=1;" in choice.verdict
    assert choice.tests == "One seed: no interval, so nothing says how sure that is."
    assert choice.alike == []


def test_two_seeds_are_said_to_tell_little(tmp_path: Path) -> None:
    """Paired by two seeds the test has one degree of freedom."""
    save(tmp_path, {"all": (0.90, 0.92), "q": (0.80, 0.83), "k": (0.89, 0.91)})
    tests = found(tmp_path)[0].tests
    assert tests.startswith("None of 2 with less peak memory can be told from it")
    # `q` is dearer and worse than `k`: counted and not named.
    assert "`lora rank 8 k` (0.9000 ± 0.0141, n=2, 80.0 MiB) and 1 more. Two seeds tell little apart." in tests


def test_a_lower_nll_is_better(tmp_path: Path) -> None:
    for placement, value in (("qv", 2.0), ("all", 1.9)):
        metrics = {"val_nll": value, "test_nll": value, "peak_memory_bytes": 10.0 * MIB}
        save_run(
            tmp_path, placement, target_layers=placement, rank=8, dataset__best_metric="nll", metrics=metrics
        )  # fmt: skip
    assert "`lora rank 8 all` has the best val nll" in found(tmp_path)[0].verdict


def test_without_a_measured_memory_parameters_are_the_cost_and_without_those_nothing_is(tmp_path: Path) -> None:
    save(tmp_path / "a", SCORES, measured=("val_accuracy", "num_trainable_params"))
    (choice,) = found(tmp_path / "a")
    assert choice.verdict.endswith("(n=3; trainable params 1,000).")
    assert "Of 2 with less trainable params, 1 cannot" in choice.tests
    save(tmp_path / "b", SCORES, measured=("val_accuracy",))
    (choice,) = found(tmp_path / "b")
    assert choice.verdict.endswith("0.9100 ± 0.0040 (n=3).")
    assert "Of 2 beside it, 1 cannot be told from it" in choice.tests


def test_datasets_and_recipes_are_not_mixed(tmp_path: Path) -> None:
    save(tmp_path, SCORES)
    save(tmp_path, {"all": SCORES["k"], "q": SCORES["q"]}, dataset__name="imdb")
    save_run(
        tmp_path, "o-s0", cell_id="o", rank=8, target_layers="o", trainer__weight_decay=0.5,
        metrics={"val_accuracy": 0.99, "peak_memory_bytes": 1.0 * MIB},
    )  # fmt: skip
    sst2, imdb = sorted(found(tmp_path), key=lambda choice: choice.verdict, reverse=True)
    assert "bert on imdb: `lora rank 8 q`" in imdb.verdict
    assert "bert on sst2: `lora rank 8 o [1]`" in sst2.verdict
    assert sst2.tests.endswith("4 of another recipe or environment are not compared with it.")


def test_what_stands_against_the_best_is_said(tmp_path: Path) -> None:
    save(tmp_path, {"all": (0.9, 0.91)})
    save(tmp_path, {"q": (0.8, 0.82)})
    save_run(tmp_path, "all-s2", cell_id="all", seed=2, rank=8, target_layers="all", status="diverged", metrics={})
    save_run(
        tmp_path, "low-s0", cell_id="low", rank=8, target_layers="all", learning_rate=1e-6,
        metrics={"val_accuracy": 0.5},
    )  # fmt: skip
    tests = found(tmp_path)[0].tests
    assert f"Its runs: 2 {Status.FINISHED}, 1 {Status.DIVERGED}." in tests
    assert "Its learning rate is at the edge of those tried (§), so a better one may lie outside." in tests


@pytest.mark.parametrize("scores", [{"all": (0.9, 0.91)}, {}])
def test_of_one_condition_nothing_is_said(tmp_path: Path, scores: dict[str, tuple[float, ...]]) -> None:
    save(tmp_path, scores)
    save_run(tmp_path, "failed", cell_id="failed", rank=8, target_layers="q", status="failed", metrics={})
    assert found(tmp_path) == []


def test_names_are_code(tmp_path: Path) -> None:
    save(tmp_path, {"a`b<script>": (0.9, 0.91), "q": (0.8, 0.82)})
    assert "`lora rank 8 a'b<script>` has" in found(tmp_path)[0].verdict
