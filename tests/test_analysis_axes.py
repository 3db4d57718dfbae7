"""Own axes: what a sweep varies besides method, rank and placement is a column, and comparisons are at equal values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text
from test_analysis_load import save_run
from test_analysis_page import data_of
from test_analysis_tables import MIB, measured

from analysis import select
from analysis.axes import axes_of, axis_text, own_axes
from analysis.figures import paper_figures
from analysis.load import load_runs
from analysis.names import with_names
from analysis.page import page
from analysis.tables import PaperTable, paper_tables

TIMES = "\N{MULTIPLICATION SIGN}"
DASH = "\N{EN DASH}"


def save_grid(runs_dir: Path, *, seeds: int = 1) -> None:
    """Ranks 1, 4 and 16 on two placements, with alpha 16 and 32, and full fine-tuning, after 1 and 3 epochs each.

    Two rates; the better one differs by epochs. Full fine-tuning takes 40 MiB after 1 epoch and 60 after 3.
    """
    for seed in range(seeds):
        for epochs in (1, 3):
            common: dict[str, Any] = {"trainer__num_epochs": epochs, "seed": seed}
            for rate in (1e-3, 2e-3):
                bonus = 0.01 * ((rate == 1e-3) == (epochs == 1))
                options = {"learning_rate": rate} | common
                for rank in (1, 4, 16):
                    for placement in ("q", "qv"):
                        for alpha in (16.0, 32.0):
                            value = 0.7 + 0.05 * epochs + rank / 1000 + bonus + 0.001 * seed
                            cell_id = f"r{rank}-{placement}-a{alpha:g}-e{epochs}-{rate}"
                            save_run(
                                runs_dir, f"{cell_id}-s{seed}", cell_id=cell_id, rank=rank, target_layers=placement,
                                rank__alpha=alpha, metrics=measured(val_accuracy=value, test_accuracy=value),
                                **options,
                            )  # fmt: skip
            full = measured(peak_memory_bytes=(40 if epochs == 1 else 60) * MIB, num_adapter_params=0)
            save_run(
                runs_dir, f"full-e{epochs}-s{seed}", cell_id=f"full-e{epochs}", method="full", metrics=full, **common
            )


def axes_in(runs_dir: Path) -> tuple[str, ...]:
    return own_axes(with_names(load_runs(runs_dir).frame)).settings


def tables_in(runs_dir: Path) -> dict[str, PaperTable]:
    frame = load_runs(runs_dir).frame
    return {table.name: table for table in paper_tables(frame, select.cells(frame))}


def column(table: PaperTable, title: str) -> list[str]:
    index = table.text.titles.index(title)
    return [row[index] for row in table.text.rows]


# ---------------------------------------------------------------- what is an axis


def test_what_two_runs_of_one_method_rank_and_placement_differ_in_is_an_axis(tmp_path: Path) -> None:
    save_grid(tmp_path)
    assert axes_in(tmp_path) == ("trainer.num_epochs", "rank.alpha")
    cells = select.cells(load_runs(tmp_path).frame)
    assert [(axis.name, axis.is_of_method) for axis in axes_of(cells.columns)] == [("epochs", False), ("alpha", True)]
    assert cells["recipe"].isna().all()


@pytest.mark.parametrize(
    "other",
    [
        {"rank": 4, "rank__alpha": 32.0},
        {"target_layers": "q", "trainer__num_epochs": 1},
        {"method": "full", "trainer__num_epochs": 1},
        {"dataset__name": "cola", "trainer__num_epochs": 1, "dataset__max_length": 64},
        {"model__name": "gpt2", "trainer__batch_size": 8},
        {"seed": 1, "cell_id": "a"},
        {"learning_rate": 2e-3},
        {"tracking__wandb": "disabled"},
    ],
)
def test_what_differs_between_methods_ranks_or_datasets_alone_is_none(tmp_path: Path, other: dict[str, Any]) -> None:
    save_run(tmp_path, "a", cell_id="a", metrics=measured())
    save_run(tmp_path, "b", **other, metrics=measured())
    assert axes_in(tmp_path) == ()


def test_what_differs_along_with_an_axis_follows_from_it(tmp_path: Path) -> None:
    for rows, epochs in ((100, 30), (1000, 3)):
        for rank in (1, 4):
            save_run(
                tmp_path, f"{rows}-{rank}", rank=rank, dataset__num_train_examples=rows, trainer__num_epochs=epochs,
                metrics=measured(),
            )  # fmt: skip
    table = tables_in(tmp_path)["tradeoff"]
    assert axes_in(tmp_path) == ("dataset.num_train_examples",)
    assert column(table, "rows") == ["100", "1,000", "100", "1,000"] and "epochs" not in table.text.titles
    assert "Along with these axes: `trainer.num_epochs` follows rows: 30 at 100; 3 at 1000." in table.notes
    assert not any(note.startswith("[1]") for note in table.notes)


def test_a_departure_beside_what_follows_an_axis_is_still_marked(tmp_path: Path) -> None:
    for rows, epochs in ((100, 30), (1000, 3)):
        for rank in (1, 4, 16):
            late = 7 if (rows, rank) == (100, 16) else epochs
            settings = {"dataset__num_train_examples": rows, "trainer__num_epochs": late}
            save_run(tmp_path, f"{rows}-{rank}", rank=rank, **settings, metrics=measured())
    (note,) = [note for note in tables_in(tmp_path)["tradeoff"].notes if note.startswith("[")]
    assert note == "[1] differs in recipe or environment: `trainer.num_epochs=7 instead of 30`."


def test_titles_that_two_settings_share_are_spelled_out(tmp_path: Path) -> None:
    for number, (split, subset) in enumerate([(0, 0), (0, 1), (1, 0)]):
        save_run(tmp_path, f"a{number}", dataset__seed=split, trainer__seed=subset, metrics=measured())
    cells = select.cells(load_runs(tmp_path).frame)
    assert [axis.name for axis in axes_of(cells.columns)] == ["dataset.seed", "trainer.seed"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1000, "1,000"),
        (3.0, "3"),
        (1.5, "1.5"),
        (0.12345678, "0.12345678"),
        (1e-5, "1e-05"),
        (float("inf"), "Infinity"),
        (True, "true"),
        ("sgd", "sgd"),
        ((1, 2), "[1, 2]"),
    ],
)
def test_values_as_text(value: Any, text: str) -> None:
    assert axis_text(value) == text


def test_long_values_that_begin_alike_stay_two() -> None:
    first, second = axis_text("x" * 60 + "a"), axis_text("x" * 60 + "b")
    assert first != second and len(first) == len(second) == 40


def test_what_only_adapters_have_is_no_value_of_full_fine_tuning(tmp_path: Path) -> None:
    for dropout in (0.0, 0.1):
        save_run(tmp_path, f"lora-{dropout}", method__adapter_dropout=dropout, metrics=measured())
    save_run(tmp_path, "full", method="full", metrics=measured())
    table = tables_in(tmp_path)["tradeoff"]
    assert column(table, "dropout") == [DASH, "0", "0.1"]
    assert column(table, "memory / full") == [f"1.00{TIMES}"] * 3


def test_settings_of_no_group_are_no_axes(tmp_path: Path) -> None:
    for run_id, value in (("a", True), ("b", False)):
        path = save_run(tmp_path, run_id, metrics=measured())
        raw = json.loads(path.read_text())
        raw["config"]["score_earlier_tasks"] = value
        path.write_text(json.dumps(raw))
    assert axes_in(tmp_path) == ()


# ---------------------------------------------------------------- tables


def test_epochs_are_a_column_and_ratios_are_to_the_full_run_of_the_same_epochs(tmp_path: Path) -> None:
    save_grid(tmp_path)
    table = tables_in(tmp_path)["tradeoff"]
    columns = ("method", "epochs", "alpha", "learning rate", "memory / full")
    rows = set(zip(*(column(table, title) for title in columns), strict=True))
    assert rows == {
        *(("lora", "1", alpha, "0.001§", f"0.25{TIMES}") for alpha in ("16", "32")),
        *(("lora", "3", alpha, "0.002§", f"0.17{TIMES}") for alpha in ("16", "32")),
        ("full", "1", DASH, "0.001", f"1.00{TIMES}"),
        ("full", "3", DASH, "0.001", f"1.00{TIMES}"),
    }
    assert "Columns: epochs is `trainer.num_epochs`, alpha is `rank.alpha`." in table.notes
    assert {"trainer.num_epochs", "rank.alpha"} <= set(table.numbers.columns)


def test_no_ratio_where_the_full_run_of_the_same_value_is_missing(tmp_path: Path) -> None:
    for epochs in (1.0, 3.0):
        save_run(tmp_path, f"lora-{epochs}", trainer__num_epochs=epochs, metrics=measured())
    save_run(tmp_path, "full", method="full", metrics=measured(peak_memory_bytes=40 * MIB))
    ratios = column(tables_in(tmp_path)["tradeoff"], "memory / full")
    assert sorted(ratios) == sorted([DASH, f"0.25{TIMES}", f"1.00{TIMES}"])


def test_a_setting_of_the_method_is_compared_with_full_at_every_value(tmp_path: Path) -> None:
    for rate_of_b in (1e-3, 1e-2):
        save_run(tmp_path, f"lora-{rate_of_b}", trainer__learning_rate_B=rate_of_b, metrics=measured())
    save_run(tmp_path, "full", method="full", metrics=measured(peak_memory_bytes=40 * MIB))
    table = tables_in(tmp_path)["tradeoff"]
    assert column(table, "rate of B") == [DASH, "0.001", "0.01"]
    assert column(table, "memory / full") == [f"1.00{TIMES}", f"0.25{TIMES}", f"0.25{TIMES}"]


def test_bold_is_the_best_of_all_alphas_and_of_the_same_epochs(tmp_path: Path) -> None:
    for seed in range(3):
        for epochs, alpha, base in ((1, 16.0, 0.7), (1, 32.0, 0.8), (3, 16.0, 0.9), (3, 32.0, 0.85)):
            save_run(
                tmp_path, f"e{epochs}-a{alpha:g}-s{seed}", cell_id=f"e{epochs}-a{alpha:g}", seed=seed,
                trainer__num_epochs=epochs, rank__alpha=alpha,
                metrics=measured(val_accuracy=base + 0.001 * seed * (1 + epochs), test_accuracy=None),
            )  # fmt: skip
    text = tables_in(tmp_path)["tradeoff"].text
    epochs, alpha = text.titles.index("epochs"), text.titles.index("alpha")
    assert {(text.rows[row][epochs], text.rows[row][alpha]) for row, _ in text.bold} == {("1", "32"), ("3", "16")}


def test_paper_forms_have_a_facet_for_each_value(tmp_path: Path) -> None:
    save_grid(tmp_path)
    tables = tables_in(tmp_path)
    facets = [f"bert, sst2, epochs {epochs}, alpha {alpha}" for epochs in (1, 3) for alpha in (16, 32)]
    assert list(dict.fromkeys(column(tables["rank_by_target_layers"], "model, dataset"))) == facets
    sweep = tables["rank_sweep"]
    stretches = zip(*(column(sweep, title) for title in ("target layers", "epochs", "alpha")), strict=True)
    assert len(dict.fromkeys(stretches)) == 8 and len(sweep.text.rules) == 7
    notes = [note.partition(",")[0] + note.partition(",")[2].partition(":")[0] for note in tables["summary"].notes]
    assert [note for note in notes if note.startswith("bert on sst2")] == [
        "bert on sst2 epochs 1",
        "bert on sst2 epochs 3",
    ]
    assert set(tables["summary"].numbers["trainer.num_epochs"]) == {1, 3}
    references = [note for note in sweep.notes if note.startswith("For comparison")]
    assert [note.partition(":")[0] for note in references] == [
        f"For comparison, full fine-tuning of bert on sst2, epochs {epochs}" for epochs in (1, 3)
    ]


def test_an_axis_of_one_dataset_is_not_printed_for_another(tmp_path: Path) -> None:
    for epochs in (1, 3):
        save_run(tmp_path, f"e{epochs}", dataset__name="cola", trainer__num_epochs=epochs, metrics=measured())
    for placement in ("q", "v"):
        for rank in (1, 2):
            save_run(tmp_path, f"{placement}{rank}", rank=rank, target_layers=placement, metrics=measured())
    assert set(column(tables_in(tmp_path)["rank_by_target_layers"], "model, dataset")) == {"bert, sst2"}


def test_tasks_stand_beside_each_other_at_equal_values(tmp_path: Path) -> None:
    for dataset, base in (("sst2", 0.8), ("cola", 0.6)):
        for epochs in (1, 3):
            metrics = measured(test_accuracy=base + epochs / 100)
            options = {"dataset__name": dataset, "trainer__num_epochs": epochs}
            save_run(tmp_path, f"{dataset}-{epochs}", metrics=metrics, **options)
    table = tables_in(tmp_path)["tasks_by_methods"]
    rows = zip(*(column(table, title) for title in ("epochs", "sst2 (accuracy) ↑", "cola (accuracy) ↑")), strict=True)
    assert sorted(rows) == [("1", "0.8100", "0.6100"), ("3", "0.8300", "0.6300")]
    assert sorted(column(table, "mean")) == ["0.7100", "0.7300"]


# ---------------------------------------------------------------- figures and page


def test_figures_have_a_panel_for_each_shared_value_and_a_figure_along_each_axis(tmp_path: Path) -> None:
    save_grid(tmp_path, seeds=2)
    drawn = {figure.name: figure for figure in paper_figures(select.cells(load_runs(tmp_path).frame), {})}
    curves = drawn["rank_curves"].draw()
    assert [figure.get_suptitle() for figure in curves.subfigs[:2]] == ["bert, sst2, epochs 1", "bert, sst2, epochs 3"]
    labels = {text.get_text() for text in curves.findobj(Text)}
    assert {"q alpha 16", "qv alpha 32", "full"} <= labels
    (axes,) = drawn["score_by_epochs"].draw().axes
    lines = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axes.containers}
    assert len(lines) == 12 and axes.get_xlabel() == "epochs"
    # 0.7 + 0.05 per epoch + 4/1000 for the rank + 0.01 for the better rate + half of 0.001 for two seeds
    assert lines["lora r4 qv alpha 16"] == [[1.0, pytest.approx(0.7645)], [3.0, pytest.approx(0.8645)]]
    along_alpha = drawn["score_by_alpha"].draw()
    assert [figure.get_suptitle() for figure in along_alpha.subfigs] == ["bert, sst2, epochs 1", "bert, sst2, epochs 3"]
    assert any(line.get_label() == "full" for line in along_alpha.axes[0].lines)


def test_words_of_an_axis_stand_side_by_side(tmp_path: Path) -> None:
    for optimizer in ("adamw", "sgd"):
        save_run(tmp_path, optimizer, trainer__optimizer=optimizer, metrics=measured())
    drawn = {figure.name: figure for figure in paper_figures(select.cells(load_runs(tmp_path).frame), {})}
    (axes,) = drawn["score_by_optimizer"].draw().axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["adamw", "sgd"]


def test_a_word_that_most_conditions_share_stands_in_the_title_alone(tmp_path: Path) -> None:
    for rank, policy in ((1, "fixed"), (4, "fixed"), (16, "fixed"), (4, "rslora")):
        save_run(tmp_path, f"{rank}-{policy}", rank=rank, rank__alpha_policy=policy, metrics=measured())
    drawn = {figure.name: figure for figure in paper_figures(select.cells(load_runs(tmp_path).frame), {})}
    figure = drawn["score_by_memory"].draw()
    (panel,) = figure.subfigs
    assert panel.get_suptitle() == "bert, sst2, alpha policy fixed if unsaid"
    names = {bars.get_label() for bars in figure.axes[0].containers} | {
        line.get_label() for line in figure.axes[0].lines
    }
    assert {"lora r1 qv", "lora r4 qv", "lora r4 qv alpha policy rslora"} <= names


def test_the_page_filters_by_own_axes_and_draws_along_them(tmp_path: Path) -> None:
    save_grid(tmp_path)
    frame = load_runs(tmp_path).frame
    cells = select.cells(frame)
    html = page(title="t", summary=[], tables=[], cells=cells, frame=frame, curves={}, environment=[], failures=[])
    data = data_of(html)
    assert data["axes"] == ["epochs", "alpha"]
    cell = next(cell for cell in data["cells"] if cell["name"] == "lora, rank 4, qv, epochs 3, alpha 32")
    assert (cell["bare"], cell["axes"], cell["places"]) == ("lora, rank 4, qv", ["3", "32"], [3, 32])
    assert data["series"][cell["series"]] == "lora, qv, epochs 3, alpha 32"
    full = next(cell for cell in data["cells"] if cell["method"] == "full")
    assert full["axes"] == ["1", None]
    choice = '<label>epochs <select class="axis"><option value="">all</option><option value="1">1</option>'
    assert choice in html
