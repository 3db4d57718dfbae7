"""Language models in tables and figures: what was learned, forgotten, generated and computed, and at which rate best.

`save_language` makes up a sweep whose numbers follow from its settings, so that every expectation is worked by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from test_analysis_figures import draw, footnote, line, texts
from test_analysis_load import ENVIRONMENT, save_run
from test_analysis_page import browser, check_quiet, data_of, hover_text, make, open_page  # noqa: F401

from analysis import metrics, select
from analysis.figures import paper_figures
from analysis.load import CAME_LATER, load_curves, load_runs
from analysis.report import write_report
from analysis.tables import PaperTable, paper_tables
from analysis.tables.writers import to_csv, to_markdown
from harness.config import schema
from harness.config.composing import from_dict, to_dict
from harness.config.schema import Task
from harness.results.metrics import LANGUAGE_TASKS, METRICS

RATES = (1e-3, 2e-3, 4e-3)
# Which of `RATES` is best at a rank, and how many nats it learns there.
BEST_RATE = {1: 1e-3, 8: 2e-3, 64: 4e-3}
LEARNED = {1: 0.5, 8: 0.75, 64: 1.0}
MINUS, DASH, TIMES = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


def language_metrics(nll: float, forgotten: float, **changes: float) -> dict[str, float]:
    """The metrics of a run that ends at `nll` on test, from 3.0 before, and forgot so many nats of 2.0."""
    metrics = {
        "num_adapter_params": 2048.0,
        "num_head_params": 0.0,
        "num_trainable_params": 2048.0,
        "num_total_params": 1_024_000.0,
        "peak_memory_bytes": 2.0**24,
        "step_seconds_median": 0.01,
        "checkpoint_bytes": 2.0**18,
        "train_nll": nll - 0.25,
        "train_flops": 2e12,
        "val_nll_before": 3.125,
        "test_nll_before": 3.0,
        "base_domain_nll_before": 2.0,
        "base_domain_nll": 2.0 + forgotten,
        "forgetting_nll": forgotten,
    }
    for split, value in (("val", nll + 0.125), ("test", nll)):
        metrics |= {
            f"{split}_nll": value,
            f"{split}_perplexity": math.exp(value),
            f"{split}_bits_per_byte": value / 4,
        }
    return metrics | changes


def dataset_settings(**changes: Any) -> dict[str, Any]:
    settings = {
        "dataset__name": "friends",
        "dataset__task": "causal_lm",
        "dataset__best_metric": "nll",
        "dataset__metrics": ["perplexity", "bits_per_byte"],
        "model__name": "newsgpt",
    }
    return settings | {f"dataset__{name}": value for name, value in changes.items()}


def save_lm_run(runs_dir: Path, run_id: str, *, also: dict[str, Any] | None = None, **options: Any) -> None:
    """A run with additional evaluation datasets: those of `also`, each with its config."""
    save_run(runs_dir, run_id, **dataset_settings() | options)
    path = runs_dir / run_id / "result.json"
    content = json.loads(path.read_text())
    names = {"news": {"name": "newsgroups", "max_length": 256}} if also is None else also
    content["config"]["evaluate_also"] = names
    if options.get("status", "finished") == "finished":
        nll = content["metrics"].get("base_domain_nll", 2.0)
        scores = {"evaluated_also": {name: {"nll": nll} for name in names}}
        content["environment"] = content["environment"] | (scores if names else {})
    path.write_text(json.dumps(content))


def save_curve(runs_dir: Path, run_id: str, nll: float, rate: float, *, on_val: bool = True) -> None:
    """Loss at steps 10 to 1000: at first the highest rate is lowest, at the end the run's own nll is reached."""
    rows = []
    for step in (10, 100, 500, 1000):
        loss = nll + (1 - rate * 100) * math.log10(1000 / step)
        rows.append({"step": step, "train_nll": loss - 0.25})
        if on_val or step == 1000:
            rows[-1]["val_nll"] = loss + 0.125
    (runs_dir / run_id / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_language(
    runs_dir: Path,
    *,
    placements: Sequence[str] = ("qv", "all"),
    rates: Sequence[float] = RATES,
    seeds: int = 2,
    on_val: bool = True,
    **options: Any,
) -> None:
    """LoRA at ranks 1, 8, 64, and full fine-tuning at a tenth of its rates, best at the second of them.

    The further a rate is from the best one the less is learned; seeds differ by 0.01. What is forgotten is half of what
    is learned, by full fine-tuning as much.
    """
    for seed in range(seeds):
        noise = 0.01 * seed
        for rate in rates:
            off = abs(math.log2(rate / 2e-3))
            nll = 3.0 - 1.125 + 0.125 * off + noise
            run_id = f"full-{rate:g}-s{seed}"
            save_lm_run(
                runs_dir, run_id, cell_id=run_id[:-3], seed=seed, method="full", learning_rate=rate / 10,
                metrics=language_metrics(
                    nll, 3.0 - nll, num_adapter_params=0, num_trainable_params=1_024_000, train_flops=3e12
                ),
                **options,
            )  # fmt: skip
            save_curve(runs_dir, run_id, nll, rate, on_val=on_val)
            for number, placement in enumerate(placements):
                for rank, best in BEST_RATE.items():
                    nll = 3.0 - LEARNED[rank] - 0.0625 * number + 0.125 * abs(math.log2(rate / best)) + noise
                    run_id = f"{placement}-r{rank}-{rate:g}-s{seed}"
                    flops = 2e12 + 1e9 * rank * (number + 1)
                    save_lm_run(
                        runs_dir, run_id, cell_id=run_id[:-3], seed=seed, rank=rank, target_layers=placement,
                        learning_rate=rate,
                        metrics=language_metrics(
                            nll, (3.0 - nll) / 2, num_adapter_params=1024 * rank * (number + 1), train_flops=flops
                        ),
                        **options,
                    )  # fmt: skip
                    save_curve(runs_dir, run_id, nll, rate, on_val=on_val)


def tables_of(frame: pd.DataFrame, **options: Any) -> dict[str, PaperTable]:
    return {table.name: table for table in paper_tables(frame, select.cells(frame), **options)}


def column(table: PaperTable, title: str) -> list[str]:
    index = table.text.titles.index(title)
    return [row[index] for row in table.text.rows]


def recipe_notes(frame: pd.DataFrame) -> list[str]:
    return [note for note in tables_of(frame)["tradeoff"].notes if note.startswith("[")]


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("runs")
    save_language(found)
    return found


@pytest.fixture(scope="module")
def frame(runs_dir: Path) -> pd.DataFrame:
    return load_runs(runs_dir).frame


# ---------------------------------------------------------------- what the registry and the schema say


def test_the_names_of_the_schema_are_known_here() -> None:
    assert metrics.GENERATION_SCORES == ("bleu", "chrf", "rouge_l", "nist", "exact_match", "number_match")
    assert {task.value for task in Task if task.is_language} == set(LANGUAGE_TASKS)
    assert {f"test_{name}" for name in metrics.GENERATION_SCORES} <= METRICS.keys()


# ---------------------------------------------------------------- trade-off


def test_the_trade_off_adds_what_the_dataset_names_and_forgetting(frame: pd.DataFrame) -> None:
    table = tables_of(frame)["tradeoff"]
    assert table.text.titles[-6:] == [
        "val nll ↓",
        "test nll ↓",
        "test perplexity ↓",
        "test bits per byte ↓",
        "forgetting ↓",
        "n",
    ]
    (full,) = (row for row in table.text.rows if row[0] == "full")
    # Seeds at 1.875 and 1.885: mean 1.88, deviation 0.01 / sqrt(2); forgotten 1.125 and 1.115.
    assert full[3] == "0.0002"
    assert full[-6:] == [
        "2.0050 ± 0.0071",
        "1.8800 ± 0.0071",
        f"{(math.exp(1.875) + math.exp(1.885)) / 2:.2f} ± {(math.exp(1.885) - math.exp(1.875)) / 2**0.5:.2f}",
        "0.4700 ± 0.0018",
        "+1.1200 ± 0.0071",
        "2",
    ]


def test_lower_is_better_where_it_is(frame: pd.DataFrame) -> None:
    """Full has the lowest nll and the most forgotten, rank 1 on qv the least: bold goes to the lower of each."""
    table = tables_of(frame)["tradeoff"]
    bold = {
        table.text.titles[index]: (table.text.rows[row][0], table.text.rows[row][1]) for row, index in table.text.bold
    }
    assert bold["val nll ↓"] == bold["test nll ↓"] == bold["test perplexity ↓"] == ("full", DASH)
    assert bold["forgetting ↓"] == ("lora", "1")
    best = select.best_cells(select.cells(frame))
    lora = best[(best["method"] == "lora") & (best["target_layers"] == "qv")]
    assert dict(zip(lora["rank"], lora["learning_rate"], strict=True)) == BEST_RATE


def test_the_notes_say_what_forgetting_is_and_what_was_known_before(frame: pd.DataFrame) -> None:
    notes = tables_of(frame)["tradeoff"].notes
    assert (
        "Forgetting: nll on the base model's own domain (`news`), after training minus before; 0 is none, below 0 the "
        "model got better there." in notes
    )
    assert "Before training, newsgpt on friends: val nll 3.1250, test nll 3.0000, base domain nll 2.0000." in notes
    assert not any("which has 0" in note for note in notes)


def test_the_last_step_has_its_own_forgetting(tmp_path: Path) -> None:
    metrics = language_metrics(2.0, 0.5, val_nll_last=2.5, test_nll_last=2.25, forgetting_nll_last=0.75)
    save_lm_run(tmp_path, "a", metrics=metrics)
    (row,) = tables_of(select.at_last_step(load_runs(tmp_path).frame), scores="last")["tradeoff"].numbers.to_dict(
        "records"
    )
    assert (row["val_nll"], row["test_nll"], row["forgetting_nll"], row["learned_nll"]) == (2.5, 2.25, 0.75, 0.75)


def test_a_range_where_models_of_one_name_begin_differently(tmp_path: Path) -> None:
    save_lm_run(tmp_path, "a", metrics=language_metrics(2.0, 0.5))
    save_lm_run(tmp_path, "b", rank=2, metrics=language_metrics(2.0, 0.5, test_nll_before=3.25))
    notes = tables_of(load_runs(tmp_path).frame)["tradeoff"].notes
    expected = f"val nll 3.1250, test nll 3.0000{DASH}3.2500, base domain nll 2.0000."
    assert any(note.endswith(expected) for note in notes)


def test_the_csv_has_every_metric_unrounded(frame: pd.DataFrame) -> None:
    table = tables_of(frame)["tradeoff"]
    (full,) = table.numbers[table.numbers["method"] == "full"].to_dict("records")
    assert full["forgetting_nll"] == pytest.approx(1.12, abs=1e-12)
    assert full["learned_nll"] == pytest.approx(1.12, abs=1e-12)
    assert full["learned_nll_sd"] == pytest.approx(0.01 / 2**0.5)
    # t(0.975, 1) = 12.7062 by the table; half the width is that times sd / sqrt(2).
    assert full["forgetting_nll_ci"] == pytest.approx(12.7062 * 0.005, rel=1e-4)
    assert full["base_domain"] == "news"
    assert "learned_nll" in to_csv(table.numbers).splitlines()[0]


def test_classification_has_none_of_it(tmp_path: Path) -> None:
    scores = {"val_accuracy": 0.8, "test_accuracy": 0.75, "test_nll": 0.5}
    for method in ("lora", "full"):
        save_run(
            tmp_path, method, method=method, dataset__metrics=["accuracy", "f1"], metrics=scores | {"test_f1": 0.5}
        )
    frame = load_runs(tmp_path).frame
    assert not {"base_domain", "config.evaluate_also"} & set(frame.columns)
    cells = select.cells(frame)
    assert not {"base_domain", "learned_nll", "forgetting_nll"} & set(cells.columns)
    tables = tables_of(frame)
    assert tables["tradeoff"].text.titles[-3:] == ["val accuracy ↑", "test accuracy ↑", "n"]
    assert not any("orgetting" in to_markdown(table.text) + str(table.notes) for table in tables.values())
    assert {"forgetting", "lowest_curves", "score_by_compute"}.isdisjoint(one.name for one in paper_figures(cells, {}))


def test_scores_of_generated_texts_and_how_they_were_made(tmp_path: Path) -> None:
    signed = ENVIRONMENT | {
        "generation_signatures": {"bleu": "nrefs:var|case:mixed|v:2.5", "rouge_l": "rouge-score 0.1.2"}
    }
    for method, bleu in (("lora", (60.0, 61.0)), ("full", (70.0, 71.0))):
        for seed, value in enumerate(bleu):
            save_lm_run(
                tmp_path, f"{method}-s{seed}", cell_id=method, seed=seed, method=method, environment=signed, also={},
                metrics=language_metrics(2.0 + 0.01 * seed, 0.5, test_bleu=value, test_rouge_l=0.5),
                **dataset_settings(task="completion", metrics=["bleu", "rouge_l", "number_match"]),
            )  # fmt: skip
    frame = load_runs(tmp_path).frame
    tables = tables_of(frame)
    assert tables["tradeoff"].text.titles[-5:] == ["test nll ↓", "test BLEU ↑", "test ROUGE-L ↑", "forgetting ↓", "n"]
    assert column(tables["tradeoff"], "test BLEU ↑") == ["70.50 ± 0.71", "60.50 ± 0.71"]
    bold = {
        (tables["tradeoff"].text.rows[row][0], tables["tradeoff"].text.titles[i])
        for row, i in tables["tradeoff"].text.bold
    }
    assert ("full", "test BLEU ↑") in bold
    assert "test BLEU: `nrefs:var|case:mixed|v:2.5`." in tables["tradeoff"].notes
    summary = {row[0]: row[1:] for row in tables["summary"].text.rows}
    assert summary["quality (test BLEU)"] == ["70.50 ± 0.71", "60.50 ± 0.71", f"{MINUS}10.00 (beyond noise)"]
    assert "quality (test NIST)" not in summary
    at_last = tables_of(select.at_last_step(frame), scores="last")["tradeoff"]
    assert not any("BLEU" in title for title in at_last.text.titles)
    assert "Texts were generated at the best step alone, so the last step has no score of them." in at_last.notes


# ---------------------------------------------------------------- summary, costs, forms


def test_summary_and_costs_count_compute_and_forgetting(frame: pd.DataFrame) -> None:
    tables = tables_of(frame)
    summary = {row[0]: row[1:] for row in tables["summary"].text.rows}
    assert summary["forgetting (nll)"] == ["+1.1200 ± 0.0071", "+0.5288 ± 0.0035", f"{MINUS}0.5913 (beyond noise)"]
    # Rank 64 on all: 2 TFLOP and 64 x 2 x 1 GFLOP against 3 TFLOP.
    assert summary["training compute (TFLOP)"] == ["3.0", "2.1", f"0.709{TIMES}"]
    forgetting = tables["summary"].numbers.set_index("metric").loc["forgetting_nll"]
    assert (forgetting["ratio"], round(forgetting["lora"], 10)) == (None, 0.52875)
    costs = tables["costs"]
    assert "head params ↓" not in costs.text.titles
    assert costs.text.titles[-2:] == ["training compute (TFLOP) ↓", "compute / full"]
    ratios = dict(zip(zip(column(costs, "method"), column(costs, "rank"), column(costs, "target layers"), strict=True),
                      column(costs, "compute / full"), strict=True))  # fmt: skip
    assert ratios["full", DASH, DASH] == f"1.00{TIMES}"
    assert ratios["lora", "64", "qv"] == f"0.69{TIMES}"
    assert any(note.startswith("Training compute: multiplications and additions") for note in costs.notes)


def test_a_rank_sweep_judged_by_nll_has_each_column_once(frame: pd.DataFrame) -> None:
    table = tables_of(frame)["rank_sweep"]
    assert table.text.titles == [
        "target layers", "rank", "learning rate", "adapter params ↓", "val nll ↓", "test nll ↓", "n",
    ]  # fmt: skip
    assert len(set(table.numbers.columns)) == len(table.numbers.columns)
    bold = {(table.text.rows[row][0], table.text.rows[row][1]) for row, _ in table.text.bold}
    assert bold == {("all", "64"), ("qv", "64")}


def test_rank_by_target_layers_marks_the_lowest_nll(frame: pd.DataFrame) -> None:
    table = tables_of(frame)["rank_by_target_layers"]
    bold = {(table.text.rows[row][1], table.text.rows[row][2], table.text.titles[i]) for row, i in table.text.bold}
    assert bold == {("val nll ↓", "all", "rank 64"), ("test nll ↓", "all", "rank 64")}


def test_best_rates_their_ratio_to_full_and_their_edges(frame: pd.DataFrame) -> None:
    table = tables_of(frame)["learning_rates"]
    rows = {(row[0], row[1], row[2]): row[-2:] for row in table.text.rows}
    assert rows["full", DASH, DASH] == ["0.0002", f"1{TIMES}"]
    assert rows["lora", "1", "qv"] == ["0.001§", f"5{TIMES}"]
    assert rows["lora", "8", "all"] == ["0.002", f"10{TIMES}"]
    assert rows["lora", "64", "qv"] == ["0.004§", f"20{TIMES}"]
    numbers = table.numbers[table.numbers["chosen"] & (table.numbers["metric"] == "val_nll")]
    found = {
        (row["rank"], row["target_layers"]): (row["learning_rate"], row["edge"], row["ratio_to_full"])
        for row in numbers.to_dict("records")
        if row["method"] == "lora"
    }
    assert found[1, "qv"] == (1e-3, "low", pytest.approx(5))
    assert found[8, "qv"] == (2e-3, None, pytest.approx(10))
    assert found[64, "all"] == (4e-3, "high", pytest.approx(20))
    assert len(numbers) == 7


# ---------------------------------------------------------------- recipes


def test_scores_on_further_sets_are_no_difference_and_no_environment(
    frame: pd.DataFrame, runs_dir: Path, tmp_path: Path
) -> None:
    assert "environment.evaluated_also.news.nll" in frame.columns
    assert recipe_notes(frame) == []
    report_dir = write_report(runs_dir, tmp_path, console=Console(quiet=True))
    page = (report_dir / "report.md").read_text(encoding="utf-8")
    assert "evaluated_also" not in page
    assert "![Learning against forgetting](figures/forgetting.png)" in page
    assert (report_dir / "figures/forgetting.pdf").exists()
    assert "Learning against forgetting" in (report_dir / "report.html").read_text(encoding="utf-8")


def test_a_run_without_the_further_set_differs_in_that_alone(tmp_path: Path) -> None:
    sets = {"news": {"name": "newsgroups", "max_length": 256, "generation": {"num_beams": 1}}}
    for rank in (1, 2, 4):
        save_lm_run(tmp_path, f"a{rank}", rank=rank, also=sets, metrics=language_metrics(2.0, 0.5))
    save_lm_run(tmp_path, "none", rank=8, also={}, metrics=language_metrics(2.0, 0.5))
    shorter = {"news": {"name": "newsgroups", "max_length": 128, "generation": {"num_beams": 4}}}
    save_lm_run(tmp_path, "shorter", rank=16, also=shorter, metrics=language_metrics(2.0, 0.5))
    other = {"tales": {"name": "grimm"}, **sets}
    save_lm_run(tmp_path, "other", rank=32, also=other, metrics=language_metrics(2.0, 0.5))
    frame = load_runs(tmp_path).frame
    assert dict(zip(frame["run_id"], frame["base_domain"], strict=True)) == {
        "a1": "news", "a2": "news", "a4": "news", "none": None, "shorter": "news", "other": "tales",
    }  # fmt: skip
    assert recipe_notes(frame) == [
        '[1] differs in recipe or environment: `evaluate_also=[] instead of ["news"]`.',
        "[2] differs in recipe or environment: `evaluate_also.news.max_length=128 instead of 256`.",
        '[3] differs in recipe or environment: `evaluate_also=["tales", "news"] instead of ["news"]`.',
    ]


def test_how_texts_are_generated_is_a_setting_of_the_dataset(tmp_path: Path) -> None:
    for rank, beams, batch in ((1, 10, 32), (2, 10, 8), (4, 1, 32)):
        options = dataset_settings(generation={"num_beams": beams, "batch_size": batch})
        save_lm_run(tmp_path, f"a{rank}", rank=rank, metrics=language_metrics(2.0, 0.5), **options)
    other = dataset_settings(name="gsm8k", generation={"num_beams": 4, "batch_size": 32})
    signed = ENVIRONMENT | {"generation_signatures": {"bleu": "x"}, "data_notes": ["2 rows are cut."]}
    save_lm_run(tmp_path, "b", environment=signed, metrics=language_metrics(2.0, 0.5), **other)
    assert recipe_notes(load_runs(tmp_path).frame) == [
        "[1] differs in recipe or environment: `dataset.generation.num_beams=1 instead of 10`."
    ]


def test_rates_that_differ_in_what_changes_nothing_are_one_condition(tmp_path: Path) -> None:
    for rate, batch in ((1e-3, 8), (2e-3, 32)):
        options = dataset_settings(generation={"num_beams": 1, "batch_size": batch})
        save_lm_run(tmp_path, f"a{rate}", learning_rate=rate, metrics=language_metrics(2 - rate, 0.5), **options)
    (row,) = select.best_cells(select.cells(load_runs(tmp_path).frame)).to_dict("records")
    assert (row["tried"], row["learning_rate"]) == ((1e-3, 2e-3), 2e-3)


def test_rates_scored_in_batches_of_another_size_are_one_condition(tmp_path: Path) -> None:
    for rate, batch in ((1e-3, 8), (2e-3, 32)):
        options = {"trainer__eval_batch_size": batch, "trainer__checkpoint_every": batch}
        save_lm_run(tmp_path, f"a{rate}", learning_rate=rate, metrics=language_metrics(2 - rate, 0.5), **options)
    frame = load_runs(tmp_path).frame
    (row,) = select.best_cells(select.cells(frame)).to_dict("records")
    assert (row["tried"], row["learning_rate"]) == ((1e-3, 2e-3), 2e-3)
    assert recipe_notes(frame) == []


def test_rates_that_read_the_same_content_in_two_folders_are_one_condition(tmp_path: Path) -> None:
    for rate, folder in ((1e-3, "here"), (2e-3, "there")):
        names = {"path": folder, "train_file": f"{folder}.jsonl", "chat_template": f"{folder}.jinja"}
        content = {
            "dataset": {"train": "d1.jsonl", "chat_template": "d2"},
            "evaluate_also": {"old": {"train": "d3.txt"}},
        }
        save_lm_run(
            tmp_path,
            f"a{rate}",
            learning_rate=rate,
            metrics=language_metrics(2 - rate, 0.5),
            environment=ENVIRONMENT | {"content": content},
            also={"old": {"name": "old", "path": folder, "train_file": f"{folder}.txt"}},
            **dataset_settings(**names),
        )
    frame = load_runs(tmp_path).frame
    (row,) = select.best_cells(select.cells(frame)).to_dict("records")
    assert (row["tried"], row["learning_rate"]) == ((1e-3, 2e-3), 2e-3)
    assert recipe_notes(frame) == []


# ---------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def figures(frame: pd.DataFrame, runs_dir: Path) -> list[Any]:
    return paper_figures(select.cells(frame), load_curves(runs_dir, frame["run_id"]))


def test_the_figures_of_a_language_sweep(figures: list[Any]) -> None:
    assert [figure.name for figure in figures] == [
        "score_by_memory",
        "score_by_params",
        "score_by_compute",
        "forgetting",
        "rank_curves",
        "rank_by_placement",
        "learning_rates",
        "best_rates",
        "lowest_curves",
        "training_curves",
        "score_by_step_time",
    ]


def test_learning_against_forgetting(figures: list[Any]) -> None:
    figure = draw(figures, "forgetting")
    # Means of two seeds are 0.005 lower than the first; half as much is forgotten.
    learned = np.array([0.495, 0.745, 0.995])
    np.testing.assert_allclose(line(figure, "qv"), np.stack([learned, learned / 2], axis=1))
    np.testing.assert_allclose(line(figure, "all"), np.stack([learned + 0.0625, (learned + 0.0625) / 2], axis=1))
    np.testing.assert_allclose(line(figure, "full"), [[1.12, 1.12]])
    assert line(figure, "base model").tolist() == [[0, 0]]
    axes = figure.axes[0]
    assert axes.get_xlabel() == f"learned: test nll before {MINUS} after (nats), → better"
    assert axes.get_ylabel() == "forgetting (nats), ↓ better"
    assert "forgetting: nll on news after training minus before" in footnote(figure)
    assert "mean of 2 seeds, small points: both seeds" in footnote(figure)
    shown = texts(figure).split("\n")
    assert shown.count("r64") == 2 and "base model" in shown and "full" in shown


def test_a_base_model_far_off_is_told_in_words(tmp_path: Path) -> None:
    for rank in (1, 2, 4):
        save_lm_run(tmp_path, f"a{rank}", rank=rank, metrics=language_metrics(1.0 + 0.01 * rank, 0.5))
    figure = draw(paper_figures(select.cells(load_runs(tmp_path).frame), {}), "forgetting")
    assert "base model: beyond the axes, at 0 and 0" in footnote(figure)
    (left, _), (low, _) = figure.axes[0].get_xlim(), figure.axes[0].get_ylim()
    assert left > 1.5
    assert line(figure, "base model").tolist() == [[left, low]]


def test_score_against_compute(figures: list[Any]) -> None:
    figure = draw(figures, "score_by_compute")
    np.testing.assert_allclose(line(figure, "qv"), [[2.001, 2.505], [2.008, 2.255], [2.064, 2.005]])
    np.testing.assert_allclose(line(figure, "full"), [[3.0, 1.88]])
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "training compute (FLOP), ← better")
    assert axes.get_ylabel() == "test nll (nats), ↓ better"
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    inside = [label.get_text() for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    assert len(inside) > 1 and all(text.endswith("T") for text in inside)


def test_a_cost_without_a_logarithm_has_no_place_on_that_axis(tmp_path: Path) -> None:
    scores = {"val_accuracy": 0.8, "test_accuracy": 0.75}
    for rank, cost in ((2, 0.0), (4, -1.0)):
        costs = {"train_flops": cost, "num_adapter_params": cost}
        save_run(tmp_path, f"r{rank}", rank__rank=rank, metrics=scores | costs)
    by_cost = {"score_by_compute", "score_by_params"}
    assert by_cost.isdisjoint(one.name for one in paper_figures(select.cells(load_runs(tmp_path).frame), {}))
    for rank, cost in ((8, 2e9), (16, 3e9)):
        costs = {"train_flops": cost, "num_adapter_params": cost}
        save_run(tmp_path, f"r{rank}", rank__rank=rank, metrics=scores | costs)
    drawn = paper_figures(select.cells(load_runs(tmp_path).frame), {})
    for name in by_cost:
        (axes, *_) = draw(drawn, name).axes
        low, high = axes.get_xlim()
        assert axes.get_xscale() == "log" and 1 < high / low < 10


def test_the_best_rate_against_the_rank(figures: list[Any]) -> None:
    figure = draw(figures, "best_rates")
    for placement in ("qv", "all"):
        assert line(figure, placement).tolist() == [[1, 1e-3], [8, 2e-3], [64, 4e-3]]
    assert set(line(figure, "full")[:, 1]) == {2e-4}
    edges = [single.get_xydata().tolist() for single in figure.axes[0].lines if single.get_label() == "edge"]
    assert sorted(edges) == [[[1, 1e-3]]] * 2 + [[[64, 4e-3]]] * 2
    shown = texts(figure).split("\n")
    assert [shown.count(f"{ratio}{TIMES}") for ratio in (5, 10, 20)] == [1, 1, 1]
    assert "hollow: at the edge of its grid" in footnote(figure)
    assert f"{TIMES}: ratio to the best rate of full" in footnote(figure)
    assert "edge of its grid, so" in footnote(figure) and "the rate of full is at" not in footnote(figure)


def lowest_by_hand(placement: str, rank: int, seeds: int, offset: float) -> list[list[float]]:
    """At each step the lowest over rates of the mean over seeds, from `save_curve`'s formula."""
    found = []
    for step in (10, 100, 500, 1000):
        losses = []
        for rate in RATES:
            learned = LEARNED[rank] + 0.0625 * (placement == "all") - 0.125 * abs(math.log2(rate / BEST_RATE[rank]))
            nll = 3.0 - learned + 0.01 * (seeds - 1) / 2
            losses.append(nll + (1 - rate * 100) * math.log10(1000 / step) + offset)
        found.append([step, min(losses)])
    return found


def test_the_lowest_curve_over_learning_rates(figures: list[Any]) -> None:
    figure = draw(figures, "lowest_curves")
    assert {axes.get_title() for axes in figure.axes} == {"all", "qv"}
    for number, axes in enumerate(figure.axes):
        for rank in BEST_RATE:
            by_hand = lowest_by_hand(axes.get_title(), rank, 2, 0.125)
            np.testing.assert_allclose(line(figure, f"r{rank}", axes=number), by_hand)
        assert len(line(figure, "full", axes=number)) == 4
    assert figure.axes[0].get_ylabel() == "val nll (nats), ↓ better"
    # By hand: early the highest rate is lowest, whatever is best at the end, where rank 1 has learned half a nat.
    assert lowest_by_hand("qv", 1, 2, 0.125)[0] == [10, pytest.approx(2.63 + 0.25 + 0.6 * 2)]
    assert lowest_by_hand("qv", 1, 2, 0.125)[-1] == [1000, pytest.approx(2.63)]
    assert "at every step the lowest of the mean curves of all finished learning rates" in footnote(figure)


def test_the_training_loss_where_val_is_scored_at_the_end_alone(tmp_path: Path) -> None:
    save_language(tmp_path, placements=("qv",), seeds=1, on_val=False)
    runs = load_runs(tmp_path).frame
    figures = paper_figures(select.cells(runs), load_curves(tmp_path, runs["run_id"]))
    figure = draw(figures, "lowest_curves")
    assert len(figure.axes) == 1
    np.testing.assert_allclose(line(figure, "r8"), lowest_by_hand("qv", 8, 1, -0.25))
    assert figure.axes[0].get_ylabel() == "train nll (nats), ↓ better"


def test_one_rate_or_one_rank_is_no_form_of_it(tmp_path: Path) -> None:
    save_language(tmp_path, rates=(2e-3,), seeds=1)
    runs = load_runs(tmp_path).frame
    names = {one.name for one in paper_figures(select.cells(runs), load_curves(tmp_path, runs["run_id"]))}
    assert names.isdisjoint({"best_rates", "lowest_curves", "learning_rates"})
    assert "forgetting" in names


def test_the_heat_map_of_an_nll_is_lighter_where_it_is_lower(figures: list[Any]) -> None:
    mesh = draw(figures, "rank_by_placement").axes[0].collections[0]
    values = np.asarray(mesh.get_array())
    lowest, highest = (sum(mesh.to_rgba(np.asarray(value))[:3]) for value in (values.min(), values.max()))
    assert lowest > highest


# ---------------------------------------------------------------- page


def test_the_page_has_what_was_learned_and_computed(frame: pd.DataFrame) -> None:
    data = data_of(make(frame, tables=[], curves={}))
    assert data["tasks"] == [{"higher": False, "val": "val nll", "test": "test nll"}]
    assert data["compute"] == "training compute (FLOP)"
    assert data["learned"] == f"learned: test nll before {MINUS} after"
    cell = next(cell for cell in data["cells"] if cell["name"] == "full" and cell["best"])
    assert (cell["compute"], round(cell["learned"], 10), round(cell["forgetting"], 10)) == (3e12, 1.12, 1.12)
    assert "forgetting +1.1200 ± 0.0071 (n=2)" in cell["lines"]


@pytest.mark.browser
def test_learning_and_forgetting_in_a_browser(
    browser: Any,  # noqa: F811
    frame: pd.DataFrame,
    tmp_path: Path,
) -> None:
    address = open_page(browser, tmp_path / "page.html", make(frame, curves={}))
    for name, num_points in (("forgetting", 1 + 7), ("compute", 7)):
        assert browser.find_element("id", f"figure-{name}").is_displayed()
        assert len(browser.find_elements("css selector", f"#figure-{name} .point")) == num_points
    base, full = browser.find_elements("css selector", "#figure-forgetting .point")[:2]
    assert hover_text(browser, base) == "base model, before training"
    assert "forgetting +1.1200 ± 0.0071 (n=2)" in hover_text(browser, full)
    check_quiet(browser, address)


# ---------------------------------------------------------------- results from before a setting existed


def test_settings_that_came_later_have_the_value_that_stood_for_them(tmp_path: Path) -> None:
    save_run(tmp_path, "before", metrics={"val_accuracy": 0.5})
    save_run(
        tmp_path, "after", rank=2, trainer__label_smoothing=0.0, dataset__blocks="cut",
        dataset__generation={"num_beams": 1}, model__scratch=None, metrics={"val_accuracy": 0.5},
    )  # fmt: skip
    frame = load_runs(tmp_path).frame
    assert frame["config.trainer.label_smoothing"].tolist() == [0.0, 0.0]
    assert recipe_notes(frame) == []


def test_what_came_later_is_what_the_schema_says() -> None:
    """A field that the schema marks as added later and that has a default other than null needs a line in `load`."""
    defaults = to_dict(
        from_dict(
            {
                "model": {"name": "tiny", "tiny": "bert"},
                "dataset": {"name": "toy", "train_file": "toy.csv"},
                "rank": {"rank": 8, "alpha": 16},
                "target_layers": {"name": "qv", "projections": ["q", "v"]},
                "trainer": {"learning_rate": 1e-3, "num_epochs": 1},
            }
        )
    )
    classes = {
        "model": schema.ModelConfig,
        "dataset": schema.DatasetConfig,
        "trainer": schema.TrainerConfig,
    }
    # A group that came later whole.
    expected: dict[str, Any] = {f"config.variant.{name}": value for name, value in defaults["variant"].items()}
    expected["config.trial"] = defaults["trial"]
    for group, kind in classes.items():
        for name, item in kind.__dataclass_fields__.items():
            if item.metadata.get("added_later"):
                value = defaults[group][name]
                leaves = value if isinstance(value, dict) else {"": value}
                for key, leaf in leaves.items():
                    if leaf is not None:
                        setting = ".".join(filter(None, ("config", group, name, key)))
                        expected[setting] = tuple(leaf) if isinstance(leaf, list) else leaf
    assert expected == CAME_LATER
