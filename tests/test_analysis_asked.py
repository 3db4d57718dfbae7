"""Tables as a person asks for them: any axes by any axes, chosen columns, the style of papers, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from test_analysis_axes import column, save_grid
from test_analysis_load import ENVIRONMENT, save_run
from test_analysis_tables import MIB, measured

from analysis import select
from analysis.__main__ import main
from analysis.load import LoadError, load_runs
from analysis.metrics import METRICS, format_value, is_score, metric, table_style
from analysis.tables import Asked, PaperTable, paper_tables
from analysis.tables.writers import to_latex, to_markdown

DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


@pytest.fixture
def frame(tmp_path: Path) -> pd.DataFrame:
    save_grid(tmp_path, seeds=2)
    return load_runs(tmp_path).frame


def asked(frame: pd.DataFrame, rows: str = "", columns: str = "", value: str = "", style: str = "report") -> PaperTable:
    names = (tuple(filter(None, text.split(","))) for text in (rows, columns, value))
    with table_style(style):
        return paper_tables(frame, select.cells(frame), asked=Asked(*names))[0]


def save_small(runs_dir: Path) -> None:
    """Ranks 1 and 4 after 1 and 3 epochs, two seeds each, and full fine-tuning after 3."""
    for seed in (0, 1):
        for epochs in (1.0, 3.0):
            for rank in (1, 4):
                value = 0.7 + 0.05 * epochs + 0.01 * rank + 0.002 * seed
                save_run(
                    runs_dir, f"r{rank}-e{epochs:g}-s{seed}", cell_id=f"r{rank}-e{epochs:g}", rank=rank, seed=seed,
                    trainer__num_epochs=epochs, metrics=measured(val_accuracy=value, test_accuracy=value),
                )  # fmt: skip
        full = measured(test_accuracy=0.9 + 0.002 * seed, peak_memory_bytes=40 * MIB)
        save_run(runs_dir, f"full-s{seed}", cell_id="full", method="full", seed=seed, metrics=full)


def test_rank_by_epochs_to_the_letter(tmp_path: Path) -> None:
    save_small(tmp_path)
    table = asked(load_runs(tmp_path).frame, "rank", "epochs", "test_accuracy")
    assert table.caption == "Test accuracy ↑ by rank (rows) and epochs (columns)."
    # Two seeds 0.002 apart: sd = 0.002 / sqrt(2) = 0.0014, the mean 0.001 above the first.
    assert to_markdown(table.text) == (
        "| method | rank |            epochs 1 |            epochs 3 |\n"
        "| ------ | ---: | ------------------: | ------------------: |\n"
        f"| full   |    {DASH} |                   {DASH} | **0.9010 ± 0.0014** |\n"
        "| lora   |    1 |     0.7610 ± 0.0014 |     0.8610 ± 0.0014 |\n"
        "| lora   |    4 | **0.7910 ± 0.0014** |     0.8910 ± 0.0014 |\n"
    )
    assert [len(run_ids) for run_ids in table.run_ids] == [2, 4, 4]
    assert table.methods == ["full", "lora", "lora"]


def test_paper_style_to_the_letter(tmp_path: Path) -> None:
    save_small(tmp_path)
    table = asked(load_runs(tmp_path).frame, "rank", "epochs", "test_accuracy", "paper")
    assert table.caption.startswith("Test accuracy (%) ↑")
    assert column(table, "epochs 3") == ["90.1 ± 0.1", "86.1 ± 0.1", "89.1 ± 0.1"]
    lines = to_latex(table, label="x", small_spread=True).splitlines()
    assert r"lora & 4 & \textbf{79.1$_{\pm 0.1}$} & 89.1$_{\pm 0.1}$ \\" in lines
    assert r"lora & 4 & \textbf{79.1 $\pm$ 0.1} & 89.1 $\pm$ 0.1 \\" in to_latex(table, label="x").splitlines()
    assert table.numbers["mean"].tolist() == asked(load_runs(tmp_path).frame, "rank", "epochs").numbers["mean"].tolist()


def test_paper_style_of_every_score() -> None:
    """Shares are times 100, BLEU and chrF are of 100 already, and a loss is what it is."""
    with table_style("paper"):
        shown = {name: format_value(name, 0.5) for name in METRICS if is_score(name)}
    for name, text in shown.items():
        kind = re.sub(r"_(last|before)$", "", name.partition("_")[2])
        is_share = metric(name).unit == "1" and kind not in ("mse", "perplexity", "bleu", "chrf", "nist")
        as_always = format_value(name, 0.5)
        expected = "50.0" if is_share else "0.5" if kind in ("bleu", "chrf") else as_always
        assert text.lstrip("+") == expected.lstrip("+"), name


def test_what_rows_would_not_tell_apart_is_added_in_front(frame: pd.DataFrame) -> None:
    table = asked(frame, "rank", "epochs")
    assert table.text.titles[:4] == ["method", "target layers", "alpha", "rank"]
    assert len(table.text.rows) == 3 * 2 * 2 + 1
    assert "Rows differ besides in method and target layers and alpha." in table.notes
    keys = [tuple(row[:4]) for row in table.text.rows]
    assert len(set(keys)) == len(keys)


def test_columns_of_two_axes_and_a_ratio(frame: pd.DataFrame) -> None:
    table = asked(frame, "method,target_layers", "rank.alpha,trainer.num_epochs", "peak_memory_bytes/full")
    assert table.text.titles[:3] == ["rank", "method", "target layers"]
    assert column(table, "alpha 16, epochs 1") == [*[f"0.25{TIMES}"] * 6, DASH]
    assert column(table, "alpha 32, epochs 3") == [*[f"0.17{TIMES}"] * 6, DASH]
    assert column(table, f"alpha {DASH}, epochs 3")[-1] == f"1.00{TIMES}"


def test_several_metrics_are_rows(frame: pd.DataFrame) -> None:
    table = asked(frame, "rank", "epochs", "val_accuracy,peak_memory_bytes")
    assert column(table, "metric")[:2] == ["val accuracy ↑", "peak memory (MiB) ↓"]
    assert set(table.numbers["metric"]) == {"val_accuracy", "peak_memory_bytes"}


def test_the_learning_rate_as_an_axis_shows_all_rates_and_marks_none(frame: pd.DataFrame) -> None:
    table = asked(frame, "rank", "lr", "val_accuracy")
    titles = ["learning rate 0.001", "learning rate 0.002"]
    assert [title for title in table.text.titles if title.startswith("learning")] == titles
    assert not table.text.bold and "Cells at every learning rate that was tried; none was chosen." in table.notes
    assert all(text != DASH for text in column(table, titles[1])[2:])


def test_a_setting_that_is_no_own_axis(tmp_path: Path) -> None:
    for rank, alpha in ((1, 16.0), (4, 32.0)):
        save_run(tmp_path, f"r{rank}", rank=rank, rank__alpha=alpha, metrics=measured())
    table = asked(load_runs(tmp_path).frame, "rank", "rank.alpha")
    assert table.text.titles == ["rank", "rank.alpha 16", "rank.alpha 32"]
    assert table.text.rows == [["1", "0.7500", DASH], ["4", DASH, "0.7500 [1]"]]


@pytest.mark.parametrize("name", ["Epochs", "trainer.num_epochs", "config.trainer.num_epochs"])
def test_an_own_axis_has_its_title_by_whatever_name_it_was_asked_for(tmp_path: Path, name: str) -> None:
    save_small(tmp_path)
    assert asked(load_runs(tmp_path).frame, "rank", name).text.titles == ["method", "rank", "epochs 1", "epochs 3"]


def test_a_group_stands_for_its_name(tmp_path: Path) -> None:
    for variant in ("plain", "dora"):
        path = save_run(tmp_path, variant, metrics=measured())
        raw = json.loads(path.read_text())
        raw["config"]["variant"] = {"name": variant}
        path.write_text(json.dumps(raw))
    table = asked(load_runs(tmp_path).frame, "variant", "rank")
    assert table.text.titles == ["method", "variant.name", "rank 8"]
    assert [row[1] for row in table.text.rows] == ["dora", "plain"]


def test_two_recipes_at_one_place_are_two_rows(tmp_path: Path) -> None:
    """One machine is no axis: what was measured on another stands below, with its mark."""
    for place, options in enumerate(({}, {"environment": ENVIRONMENT | {"num_threads": 8}})):
        save_run(tmp_path, f"a{place}", metrics=measured(test_accuracy=0.75 + place / 10), **options)
    save_run(tmp_path, "b", rank=4, metrics=measured())
    table = asked(load_runs(tmp_path).frame, "rank", "method")
    assert table.text.rows == [["4", "0.7500"], ["8", "0.7500"], ["8", "0.8500 [1]"]]


def test_each_dataset_has_its_own_score(tmp_path: Path) -> None:
    save_run(tmp_path, "a", metrics=measured())
    cola = measured(val_accuracy=None, test_accuracy=None, val_mcc=0.5, test_mcc=0.4)
    save_run(tmp_path, "b", dataset__name="cola", dataset__best_metric="mcc", metrics=cola)
    table = asked(load_runs(tmp_path).frame, "dataset", "method")
    assert table.text.titles == ["dataset", "metric", "method lora"]
    assert table.text.rows == [["cola", "test MCC ↑", "0.4000"], ["sst2", "test accuracy ↑", "0.7500"]]


def test_cells_without_numbers_say_how_they_ended(tmp_path: Path) -> None:
    save_run(tmp_path, "a", rank=1, metrics=measured())
    save_run(tmp_path, "b", rank=4, status="out_of_memory", error="no")
    table = asked(load_runs(tmp_path).frame, "rank", "target layers")
    assert column(table, "target layers qv") == ["0.7500", "1 out_of_memory"]


def test_chosen_columns_stand_in_their_order_behind_what_tells_rows_apart(frame: pd.DataFrame) -> None:
    table = asked(frame, "", "epochs,test_accuracy,n,peak_memory_bytes/full,learning rate,method")
    assert table.text.titles == [
        "rank", "target layers", "alpha",
        "epochs", "test accuracy ↑", "n", "peak memory / full", "learning rate", "method",
    ]  # fmt: skip
    assert table.name == "chosen_columns" and table.text.num_key_columns == 4
    assert list(table.numbers.columns[-4:]) == [f"test_accuracy{ending}" for ending in ("", "_sd", "_n", "_ci")]


@pytest.mark.parametrize(
    ("rows", "columns", "value", "message"),
    [
        ("ranks", "epochs", "", "--rows 'ranks': no axis of these runs. Axes: model, dataset, method, rank, target"),
        ("rank", "epoch", "", "--columns 'epoch': no axis of these runs."),
        ("rank", "epochs", "accuracy", "--value 'accuracy': no metric of these runs. Metrics: num_adapter_params, "),
        ("rank", "epochs", "test_accuracy/lora", "--value 'test_accuracy/lora': no metric of these runs."),
        ("", "rank,accuracy", "", "--columns 'accuracy': no axis and no metric of these runs. Axes: "),
        ("rank", "", "", "--rows: needs --columns besides"),
        ("", "", "test_accuracy", "--value: needs --rows and --columns besides"),
        ("", "rank", "test_accuracy", "--value: needs --rows besides"),
        ("seed", "rank", "", "--rows seed: means are taken over seeds"),
        ("rank,epochs", "rank", "", "rank is named twice"),
    ],
)
def test_what_is_refused(frame: pd.DataFrame, rows: str, columns: str, value: str, message: str) -> None:
    with pytest.raises(LoadError, match=re.escape(message)):
        asked(frame, rows, columns, value)


def test_the_command_writes_every_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.figures.paper_figures", lambda cells, curves, searches: [])
    save_small(tmp_path / "runs")
    arguments = ["report", "--runs-dir", str(tmp_path / "runs"), "--reports-dir", str(tmp_path / "reports")]
    arguments += ["--rows", "rank", "--columns", "epochs", "--style", "paper"]
    assert main(arguments) == 0
    assert "86.1 ± 0.1" in capsys.readouterr().out
    folder = tmp_path / "reports/all"
    assert r"86.1$_{\pm 0.1}$" in (folder / "tables/rows_by_columns.tex").read_text()
    assert "86.1 ± 0.1" in (folder / "tables/rows_by_columns.md").read_text()
    assert "0.861" in (folder / "tables/rows_by_columns.csv").read_text()
    assert r"90.1$_{\pm 0.1}$" in (folder / "tables/tradeoff.tex").read_text()
    assert "<h3>rows_by_columns</h3>" in (folder / "report.html").read_text()
    assert main([*arguments[:5], "--rows", "nothing", "--columns", "rank"]) == 2
    assert "--rows 'nothing': no axis of these runs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments[:5], "--columns", "rank,,epochs"])
    assert "must be names with commas between them" in capsys.readouterr().err
