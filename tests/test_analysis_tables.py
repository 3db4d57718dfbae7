"""The trade-off table: its numbers worked by hand, its text to the letter, and what stands underneath it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from test_analysis_load import ENVIRONMENT, save_run

from analysis.load import load_runs
from analysis.select import best_cells, cells
from analysis.tables import PaperTable, tradeoff
from analysis.tables.structure import TextTable
from analysis.tables.writers import to_markdown, to_rich

MIB = 1024 * 1024


def measured(**changes: float | None) -> dict[str, float]:
    """The metrics of a finished LoRA run, with changes; None takes one away."""
    metrics = {
        "num_adapter_params": 2048,
        "num_head_params": 512,
        "num_trainable_params": 2560,
        "num_total_params": 1_024_000,
        "peak_memory_bytes": 10 * MIB,
        "step_seconds_median": 0.010,
        "checkpoint_bytes": MIB // 4,
        "val_accuracy": 0.80,
        "test_accuracy": 0.75,
        "val_majority_share": 0.6,
        "test_majority_share": 0.6,
    } | changes
    return {name: value for name, value in metrics.items() if value is not None}


def save_demo(runs_dir: Path) -> None:
    """Full fine-tuning and LoRA with three seeds; a cell half failed, one wholly, and a collapsed run."""
    full = {
        "num_adapter_params": 0,
        "num_trainable_params": 1_024_000,
        "peak_memory_bytes": 40 * MIB,
        "checkpoint_bytes": 4 * MIB,
    }
    for seed, (step, val, test) in enumerate([(0.030, 0.90, 0.88), (0.034, 0.91, 0.88), (0.031, 0.92, 0.88)]):
        save_run(
            runs_dir,
            f"full-s{seed}",
            cell_id="full",
            seed=seed,
            method="full",
            learning_rate=5e-5,
            metrics=measured(**full, step_seconds_median=step, val_accuracy=val, test_accuracy=test),
        )
    for seed, (memory, val, test) in enumerate([(10, 0.80, 0.75), (10, 0.81, 0.77), (13, 0.85, 0.79)]):
        save_run(
            runs_dir,
            f"qv8-s{seed}",
            cell_id="qv8",
            seed=seed,
            metrics=measured(peak_memory_bytes=memory * MIB, val_accuracy=val, test_accuracy=test),
        )
    save_run(runs_dir, "half-s0", cell_id="half", blocks="last_half", metrics=measured(checkpoint_bytes=None))
    save_run(
        runs_dir,
        "half-s1",
        cell_id="half",
        blocks="last_half",
        seed=1,
        status="failed",
        error="\nDataError: no labels\n  in line 3",
    )
    save_run(
        runs_dir, "qv64-s0", cell_id="qv64", rank=64, status="diverged", error="nll is nan", metrics={"train_nll": 9}
    )
    save_run(runs_dir, "qv64-s1", cell_id="qv64", rank=64, seed=1, status="out_of_memory", environment={})
    save_run(runs_dir, "q1-s0", cell_id="q1", target_layers="q", rank=1, metrics=measured(val_majority_share=1.0))


def demo_frame(runs_dir: Path) -> pd.DataFrame:
    save_demo(runs_dir)
    return load_runs(runs_dir).frame


def one_row(frame: pd.DataFrame, cell_id: str) -> dict[Any, Any]:
    table = cells(frame)
    (row,) = table[table["cell_id"] == cell_id].to_dict("records")
    return row


def tradeoff_of(frame: pd.DataFrame) -> PaperTable:
    return tradeoff(best_cells(cells(frame)), frame)


def notes_of(frame: pd.DataFrame) -> list[str]:
    return tradeoff_of(frame).notes


# ---------------------------------------------------------------- numbers


def test_mean_deviation_and_median_worked_by_hand(tmp_path: Path) -> None:
    frame = demo_frame(tmp_path)
    row = one_row(frame, "qv8")
    # Deviations from 0.82 are -0.02, -0.01 and 0.03; their squares sum to 0.0014; 0.0014 / 2 = 0.0007.
    assert row["val_accuracy"] == pytest.approx(0.82, abs=1e-12)
    assert row["val_accuracy_sd"] == pytest.approx(0.0007**0.5, abs=1e-12)
    assert row["val_accuracy_n"] == 3
    # Deviations from 11 MiB are -1, -1 and 2; 6 / 2 = 3.
    assert row["peak_memory_bytes"] == 11 * MIB
    assert row["peak_memory_bytes_sd"] == pytest.approx(3**0.5 * MIB)
    assert row["trainable_share"] == 0.0025
    full = one_row(frame, "full")
    assert (full["step_seconds_median"], full["step_seconds_median_min"], full["step_seconds_median_max"]) == (
        0.031,
        0.030,
        0.034,
    )
    assert (full["trainable_share"], full["rank"], full["target_layers"]) == (1.0, None, None)


def test_only_finished_runs_give_numbers(tmp_path: Path) -> None:
    save_run(tmp_path, "a-s0", cell_id="a", metrics=measured(val_accuracy=0.8))
    save_run(tmp_path, "a-s1", cell_id="a", seed=1, status="diverged", metrics=measured(val_accuracy=0.2))
    row = one_row(load_runs(tmp_path).frame, "a")
    assert (row["val_accuracy"], row["val_accuracy_n"], row["num_finished"], row["num_diverged"]) == (0.8, 1, 1, 1)
    assert pd.isna(row["val_accuracy_sd"])


def test_rows_keep_the_order_of_the_runs(tmp_path: Path) -> None:
    frame = demo_frame(tmp_path)
    assert list(cells(frame)["cell_id"]) == ["full", "q1", "qv8", "qv64", "half"]
    assert list(cells(frame.iloc[::-1])["cell_id"]) == ["half", "qv64", "qv8", "q1", "full"]


# ---------------------------------------------------------------- text

GOLDEN_MARKDOWN = """\
| method | rank | target layers  | learning rate | adapter params ↓ | trainable (%) ↓ | peak memory (MiB) ↓ | memory / full | step time (ms) ↓ | time / full | checkpoint (MiB) ↓ |      val accuracy ↑ |     test accuracy ↑ |   n | status                      |
| ------ | ---: | -------------- | ------------: | ---------------: | --------------: | ------------------: | ------------: | ---------------: | ----------: | -----------------: | ------------------: | ------------------: | --: | --------------------------- |
| full   |    – | –              |         5e-05 |                0 |         100.000 |                40.0 |         1.00× | 31.0 (30.0–34.0) |       1.00× |               4.00 | **0.9100 ± 0.0100** | **0.8800 ± 0.0000** |   3 | 3 finished                  |
| lora   |    1 | q              |         0.001 |            2,048 |           0.250 |                10.0 |         0.25× |             10.0 |       0.32× |               0.25 |             0.8000† |             0.7500† |   1 | 1 finished                  |
| lora   |    8 | qv             |         0.001 |            2,048 |           0.250 |          11.0 ± 1.7 |         0.28× |             10.0 |       0.32× |               0.25 |     0.8200 ± 0.0265 |     0.7700 ± 0.0200 |   3 | 3 finished                  |
| lora   |   64 | qv             |         0.001 |                – |               – |                   – |             – |                – |           – |                  – |                   – |                   – |   0 | 1 diverged, 1 out_of_memory |
| lora   |    8 | qv (last_half) |         0.001 |            2,048 |           0.250 |                10.0 |         0.25× |             10.0 |       0.32× |                  – |              0.8000 |              0.7500 |   1 | 1 finished, 1 failed        |
"""  # noqa: E501, RUF001

HEAD_NOTE = (
    "The head learns at the rate of its row, and a low one may hold it back: `trainer.learning_rate_head` gives it one "
    "rate in all rows."
)
GOLDEN_NOTES = [
    "The same in every row: model bert, dataset sst2.",
    "n: finished runs, one per seed; only they give numbers. ±: sample standard deviation over them. "
    "Step time: median over runs of each run's median step (smallest\N{EN DASH}largest).",
    "Trainable: share of all parameters (base, adapter and head) that were trained (adapter and head; the base too in "
    "full fine-tuning). Adapter params leave the head out, which has 512.",
    "Peak memory: bytes of live tensors at the peak of a training step. Checkpoint: what the run saved.",
    "/ full: ratio to full fine-tuning of the same model, dataset and recipe (every setting but the learning rate and "
    "those of the method), for times also on the same device; \N{EN DASH} where that was not run; below "
    "1\N{MULTIPLICATION SIGN} is less.",
    "Bold: better than every other row of its model, dataset and recipe that has two runs, by two-sided t-tests with "
    "Holm's correction for their number, p < 0.05, paired by seed where both have the same seeds, else Welch's.",
    HEAD_NOTE,
    "† collapsed: one class received more than 99.9% of the predictions on val or test. Counted in all the same: "
    "`q1-s0`.",
    "Not finished, so without numbers: 3 of 11 runs:\n"
    "  - `qv64-s0`: diverged: `nll is nan`\n"
    "  - `qv64-s1`: out_of_memory: no message\n"
    "  - `half-s1`: failed: `DataError: no labels`",
]


def test_golden_markdown(tmp_path: Path) -> None:
    assert to_markdown(tradeoff_of(demo_frame(tmp_path)).text) == GOLDEN_MARKDOWN


def test_golden_notes(tmp_path: Path) -> None:
    assert notes_of(demo_frame(tmp_path)) == GOLDEN_NOTES


@pytest.mark.parametrize(
    ("rates", "head", "head_params", "is_said"),
    [
        ((1e-3, 3e-3), None, 512, True),
        ((1e-3, 2e-3), None, 512, False),
        ((1e-3, 3e-3), 5e-2, 512, False),
        ((1e-3, 3e-3), None, 0, False),
    ],
)
def test_heads_that_learn_at_rates_far_apart_are_said(
    tmp_path: Path, rates: tuple[float, float], head: float | None, head_params: int, is_said: bool
) -> None:
    for rank, rate in zip((1, 8), rates, strict=True):
        save_run(
            tmp_path, f"r{rank}", rank=rank, learning_rate=rate, trainer__learning_rate_head=head,
            metrics=measured(num_head_params=head_params),
        )  # fmt: skip
    assert (HEAD_NOTE in notes_of(load_runs(tmp_path).frame)) == is_said


def test_columns_that_tell_no_rows_apart_are_left_out(tmp_path: Path) -> None:
    save_run(tmp_path, "a", metrics=measured())
    frame = load_runs(tmp_path).frame
    assert tradeoff_of(frame).text.titles == [
        "method",
        "rank",
        "target layers",
        "adapter params ↓",
        "trainable (%) ↓",
        "peak memory (MiB) ↓",
        "step time (ms) ↓",
        "checkpoint (MiB) ↓",
        "val accuracy ↑",
        "test accuracy ↑",
        "n",
    ]
    assert notes_of(frame)[0] == "The same in every row: model bert, dataset sst2, learning rate 0.001."


def test_several_models_and_datasets_get_columns_and_each_dataset_its_metric(tmp_path: Path) -> None:
    save_run(tmp_path, "a", metrics=measured())
    cola = measured(val_accuracy=None, test_accuracy=None, val_mcc=0.5, test_mcc=0.4)
    save_run(tmp_path, "b", model__name="gpt2", dataset__name="cola", dataset__best_metric="mcc", metrics=cola)
    text = tradeoff_of(load_runs(tmp_path).frame).text
    assert text.titles[:2] == ["model", "dataset"]
    assert text.titles[-5:-1] == ["val accuracy ↑", "test accuracy ↑", "val MCC ↑", "test MCC ↑"]
    assert [row[:2] + row[-5:-1] for row in text.rows] == [
        ["bert", "sst2", "0.8000", "0.7500", "\N{EN DASH}", "\N{EN DASH}"],
        ["gpt2", "cola", "\N{EN DASH}", "\N{EN DASH}", "0.5000", "0.4000"],
    ]


def test_a_metric_that_some_seeds_lack_shows_its_own_n(tmp_path: Path) -> None:
    for seed, test in enumerate([0.75, 0.77, None]):
        save_run(tmp_path, f"a-s{seed}", cell_id="a", seed=seed, metrics=measured(test_accuracy=test))
    (row,) = tradeoff_of(load_runs(tmp_path).frame).text.rows
    assert row[-3:] == ["0.8000 ± 0.0000", "0.7600 ± 0.0141 (n=2)", "3"]


def test_a_sweep_in_which_everything_failed_is_a_table(tmp_path: Path) -> None:
    save_run(tmp_path, "a", status="failed", error="no")
    frame = load_runs(tmp_path).frame
    (row,) = tradeoff_of(frame).text.rows
    assert row == ["lora", "8", "qv", *["\N{EN DASH}"] * 7, "0", "1 failed"]
    assert notes_of(frame)[-1] == "Not finished, so without numbers: 1 of 1 runs:\n  - `a`: failed: `no`"


def test_a_list_of_blocks_is_part_of_the_placement(tmp_path: Path) -> None:
    save_run(tmp_path, "a", blocks=[0, 5], metrics=measured())
    assert cells(load_runs(tmp_path).frame)["target_layers"].tolist() == ["qv (blocks 0, 5)"]


def test_markdown_escapes_the_column_separator() -> None:
    assert to_markdown(TextTable(["a|b"], [["c"]], [False], 1)) == "| a\\|b |\n| ---- |\n| c    |\n"


# ---------------------------------------------------------------- recipes


def recipe_notes(runs_dir: Path) -> list[str]:
    return [note for note in notes_of(load_runs(runs_dir).frame) if note.startswith("[")]


def test_what_the_table_compares_and_what_changes_no_number_is_no_difference(tmp_path: Path) -> None:
    save_run(tmp_path, "full", method="full", learning_rate=5e-5, metrics=measured())
    runs: dict[str, dict[str, Any]] = {
        "a": {"rank": 4, "target_layers": "q", "seed": 7, "sweep": "other"},
        "b": {"tracking__wandb": "disabled", "environment": ENVIRONMENT | {"hostname": "n1"}},
        "c": {"blocks": "first_half", "environment": ENVIRONMENT | {"hostname": "n2"}},
        "d": {"model__name": "gpt2", "model__revision": "abc"},
        "e": {"dataset__name": "cola", "dataset__text_columns": ["text"]},
    }
    for run_id, options in runs.items():
        # An adapter's dropout is no setting of full fine-tuning, which must have 0.
        save_run(tmp_path, run_id, method__adapter_dropout=0.1, metrics=measured(), **options)
    assert recipe_notes(tmp_path) == []


def test_a_recipe_that_differs_is_marked_and_printed(tmp_path: Path) -> None:
    for rank in (1, 2, 4):
        save_run(tmp_path, f"a{rank}", rank=rank, metrics=measured())
    for rank in (8, 16):
        save_run(tmp_path, f"b{rank}", rank=rank, trainer__batch_size=32, trainer__num_epochs=1, metrics=measured())
    save_run(tmp_path, "c", rank=32, rank__alpha=32.0, metrics=measured())
    frame = load_runs(tmp_path).frame
    methods = [row[0] for row in tradeoff_of(frame).text.rows]
    assert methods == ["lora", "lora", "lora", "lora [1]", "lora [1]", "lora [2]"]
    assert recipe_notes(tmp_path) == [
        "[1] differs in recipe or environment: `trainer.batch_size=32 instead of 16`; "
        "`trainer.num_epochs=1 instead of 3.0`.",
        "[2] differs in recipe or environment: `rank.alpha=32.0 instead of 16.0`.",
    ]


def test_data_that_differs_under_one_name_are_two_datasets(tmp_path: Path) -> None:
    for run_id, dataset, fingerprint in (
        ("a", "sst2", "f0"),
        ("b", "sst2", "f0"),
        ("c", "sst2", "f1"),
        ("d", "r8", "f2"),
    ):
        save_run(
            tmp_path,
            run_id,
            rank=ord(run_id),
            dataset__name=dataset,
            environment=ENVIRONMENT | {"data_fingerprint": fingerprint},
            metrics=measured(),
        )
    assert recipe_notes(tmp_path) == []
    datasets = cells(load_runs(tmp_path).frame)["dataset"].tolist()
    assert datasets[0] == "r8"
    assert datasets[1] == datasets[2] != datasets[3]
    assert all(re.fullmatch(r"sst2 \[[0-9a-f]{6}\]", dataset) for dataset in datasets[1:])


def test_one_name_for_two_placements_is_not_printed(tmp_path: Path) -> None:
    save_run(tmp_path, "a", rank=1, metrics=measured())
    save_run(tmp_path, "b", rank=2, metrics=measured())
    save_run(tmp_path, "c", rank=4, target_layers__projections=["q"], metrics=measured())
    assert recipe_notes(tmp_path) == []
    assert cells(load_runs(tmp_path).frame)["target_layers"].tolist() == ["qv", "qv", "q"]


def test_an_environment_that_differs_is_printed_also_within_a_cell(tmp_path: Path) -> None:
    other = {**ENVIRONMENT, "versions": {"torch": "2.9.0"}, "git_dirty": True}
    for seed, environment in enumerate([ENVIRONMENT, ENVIRONMENT, other]):
        save_run(tmp_path, f"a-s{seed}", cell_id="a", seed=seed, environment=environment, metrics=measured())
    assert recipe_notes(tmp_path) == [
        "[1] differs in recipe or environment: "
        "`environment.versions.torch=2.13.0 and 2.9.0 instead of 2.13.0`; "
        "`environment.git_dirty=false and true instead of false`."
    ]


def test_the_environment_of_a_run_without_numbers_does_not_matter(tmp_path: Path) -> None:
    save_run(tmp_path, "a", rank=1, metrics=measured())
    save_run(tmp_path, "b", rank=2, status="out_of_memory", environment={"device_type": "cuda"})
    assert recipe_notes(tmp_path) == []


# ---------------------------------------------------------------- terminal


def printed(table: TextTable, width: int) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        for block in to_rich(table, width=width):
            console.print(block)
    return capture.get()


@pytest.mark.parametrize(("width", "num_blocks"), [(80, 4), (100, 3), (120, 2), (200, 1)])
def test_a_narrow_terminal_gets_several_tables_and_loses_nothing(tmp_path: Path, width: int, num_blocks: int) -> None:
    table = tradeoff_of(demo_frame(tmp_path)).text
    assert len(to_rich(table, width=width)) == num_blocks
    text = printed(table, width)
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    for value in ("31.0 (30.0\N{EN DASH}34.0)", "0.8200 ± 0.0265", "0.8000†", "1 out_of_memory"):
        assert value in text
    assert text.count("qv (last_half)") == num_blocks


def test_columns_are_dealt_evenly_onto_several_tables() -> None:
    table = TextTable(["key", *"abcd"], [["k", *["12345678"] * 4]], [False, *[True] * 4], 1)
    # 3 + 4 * (2 + 8) = 43 for all of them; three would fit into 33, but would leave the fourth alone.
    assert [line.split() for line in printed(table, 42).splitlines()[::3]] == [["key", "a", "b"], ["key", "c", "d"]]


def test_terminal_text(tmp_path: Path) -> None:
    save_run(tmp_path, "a", rank=1, metrics=measured())
    save_run(tmp_path, "b", rank=2, metrics=measured())
    save_run(tmp_path, "c", rank=4, trainer__batch_size=32, metrics=measured())
    lines = printed(tradeoff_of(load_runs(tmp_path).frame).text, 110).splitlines()
    assert lines == [
        "                                                peak    step                                       ",
        "                target   adapter  trainable   memory    time  checkpoint         val        test   ",
        "method    rank  layers  params ↓      (%) ↓  (MiB) ↓  (ms) ↓     (MiB) ↓  accuracy ↑  accuracy ↑  n",
        "─" * 99,
        "lora         1  qv         2,048      0.250     10.0    10.0        0.25      0.8000      0.7500  1",
        "lora         2  qv         2,048      0.250     10.0    10.0        0.25      0.8000      0.7500  1",
        "lora [1]     4  qv         2,048      0.250     10.0    10.0        0.25      0.8000      0.7500  1",
    ]
