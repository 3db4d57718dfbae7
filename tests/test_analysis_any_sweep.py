"""A report of whatever a person may have run: no shape, name or number ends in a traceback, a wrong row or a NaN.

`sweeps` makes up folders of result files. Set ANY_SWEEP_EXAMPLES for more of them, with every figure drawn.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_analysis_load import save_run
from test_analysis_page import data_of

from analysis import figures, select, tables
from analysis.__main__ import main
from analysis.load import load_curves, load_runs
from analysis.page import PageTable, page
from analysis.tables import notes, writers
from analysis.tables.structure import PaperTable
from harness.results.metrics import METRICS, Direction
from harness.results.schema import RunResult, Status, write_result

IS_SHORT = "ANY_SWEEP_EXAMPLES" not in os.environ
NUM_EXAMPLES = int(os.environ.get("ANY_SWEEP_EXAMPLES", "25"))
DASH = "\N{EN DASH}"

TASKS = {
    "accuracy": ("classification", ["accuracy"]),
    "mcc": ("classification", ["mcc", "accuracy"]),
    "pearson": ("regression", ["pearson", "mse"]),
    "mse": ("regression", ["mse"]),
    "nll": ("causal_lm", ["perplexity", "bits_per_byte"]),
    "bleu": ("completion", ["bleu", "nist", "exact_match"]),
    "perplexity": ("chat", ["perplexity"]),
}
NAMES = [
    "bert",
    "sst2",
    "sst2 ",
    "sst2\u200b",
    "caf\u00e9",
    "cafe\u0301",
    "数据集",
    "نموذج",
    "🤖👨\u200d👩\u200d👧",
    r"a_b%$&#{}~^\end{tabular}",
    "<script>alert(1)</script> | `x` ![i](http://e) [l](javascript:e)",
    "x" * 300,
    "=1+1",
    "\x1b[31mred\n- list",
    "\ud800",
    " ",
    "",
]
COSTS = [name for name in METRICS if not name.startswith(("val_", "test_")) or name.endswith("_before")]

names = st.sampled_from(NAMES) | st.text(max_size=12)
numbers = (
    st.sampled_from([0.0, -0.0, 0.5, 0.25, 1.0, -1.0, 100.0, 5e-324, 1e-9, 123456.789, 1e149, -1e149])
    | st.integers(-3, 10**12)
    | st.floats(-2, 2, allow_nan=False)
)
placements = st.sampled_from(
    [
        {"projections": ["q", "v"]},
        {"projections": ["q"]},
        {"projections": ["all"], "blocks": "last_half"},
        {"projections": ["all", "lm_head"], "blocks": [0, 11]},
        {"projections": [], "modules": [r".*\.query", ".*key$"]},
        {},
    ]
)


@st.composite
def sweeps(draw: st.DrawFn) -> list[RunResult]:
    """Up to twelve runs over few values of each axis, so that cells, seeds and learning rates meet."""
    fingerprints = draw(st.sampled_from([[None], ["f0"], ["f0", "f1"]]))
    axes: dict[str, Any] = {
        name: draw(st.lists(values, min_size=1, max_size=size))
        for name, values, size in (
            ("model", names, 2),
            ("dataset", st.tuples(names, st.sampled_from([*TASKS]), st.sampled_from(fingerprints)), 3),
            ("method", st.sampled_from(["lora", "full", "head_only"]), 3),
            ("rank", st.sampled_from([1, 2, 8, 64, 100_000]), 3),
            ("placement", st.tuples(names, placements), 3),
            ("rate", st.sampled_from([1e-5, 1e-3, 0.004, 0.1, 1e-30, 12345.6789]), 3),
            ("epochs", st.sampled_from([1, 3.0, 16]), 2),
        )
    }
    seeds = draw(st.sampled_from([[0], [0, 1], [0, 1, 2], [7, 10**9]]))
    statuses = draw(st.sampled_from([[Status.FINISHED], [*Status], [Status.FINISHED] * 5 + [*Status], [*Status][1:]]))
    found: dict[str, RunResult] = {}
    for _ in range(draw(st.integers(1, 12))):
        pick = {name: draw(st.sampled_from(values)) for name, values in axes.items()}
        run = _run(pick, draw(st.sampled_from(seeds)), draw(st.sampled_from(statuses)), draw)
        found.setdefault(run.run_id, run)
    return [*found.values()]


def _run(pick: dict[str, Any], seed: int, status: Status, draw: st.DrawFn) -> RunResult:
    (dataset, best_metric, fingerprint), is_lora = pick["dataset"], pick["method"] == "lora"
    task, metrics = TASKS[best_metric]
    placement_name, placement = pick["placement"]
    config = {
        "model": {"name": pick["model"]},
        "dataset": {"name": dataset, "task": task, "metrics": metrics, "best_metric": best_metric},
        "method": {"name": pick["method"], "adapter_dropout": 0.1 if is_lora else 0.0},
        "rank": {"rank": pick["rank"], "alpha": 16.0} if is_lora else None,
        "target_layers": {"name": placement_name, "blocks": "all", **placement} if is_lora else None,
        "trainer": {"learning_rate": pick["rate"], "num_epochs": pick["epochs"]},
    }
    scores = [f"{split}_{name}" for split in ("val", "test") for name in (best_metric, *metrics, "majority_share")]
    chosen = draw(st.lists(st.sampled_from([*COSTS, *scores]), max_size=12)) + draw(
        st.sampled_from([[], scores[:1], scores, [*scores, *COSTS]])
    )
    cell_id = hashlib.sha256(json.dumps([config, fingerprint]).encode()).hexdigest()[:8]
    return RunResult(
        run_id=f"run-{cell_id}-s{seed}",
        cell_id=cell_id,
        sweep="any",
        status=status,
        config=config | {"seed": seed},
        metrics={name: draw(numbers) for name in chosen},
        environment={"device_type": "cpu"} | ({} if fingerprint is None else {"data_fingerprint": fingerprint}),
        error="" if status is Status.FINISHED else draw(names),
    )


@given(sweeps(), st.integers(0, 99))
@settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=IS_SHORT,
    suppress_health_check=[*HealthCheck],
    database=None,
    phases=(Phase.generate,),  # to shrink a failing one takes minutes
)
def test_any_sweep_has_a_report(runs: list[RunResult], number: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs_dir = Path(folder)
        for run in runs:
            write_result(runs_dir / run.run_id, run)
            if number % 2:
                (runs_dir / run.run_id / "metrics.jsonl").write_text(
                    "".join(json.dumps({"step": step, **_curve(run)}) + "\n" for step in (1, 2, 30))
                )
        loaded = load_runs(runs_dir)
        assert loaded.problems == []
        frame = loaded.frame
        cells = select.cells(frame)
        check_runs(frame, cells, runs)
        found = tables.paper_tables(frame, cells, published=number % 5 == 0)
        for table in found:
            check_formats(table)
        check_trade_off(found[0], runs)
        curves = load_curves(runs_dir, frame["run_id"])
        drawn = figures.paper_figures(cells, curves)
        if drawn and not IS_SHORT:
            figures.write_figures(drawn, runs_dir / "figures")
        elif drawn and number % 3 == 0:
            figures.write_figures([drawn[number % len(drawn)]], runs_dir / "figures")
        if number % 2:
            check_page(found, cells, frame, curves)


def _curve(run: RunResult) -> dict[str, float]:
    return {name: value for name, value in run.metrics.items() if name.startswith(("train_", "val_"))}


# ---------------------------------------------------------------- by the command


@pytest.mark.parametrize("method", ["full", "head_only"])
def test_one_method_alone(method: str, tmp_path: Path) -> None:
    save_run(tmp_path / "runs", "a", method=method, metrics={"val_accuracy": 0.5})
    assert main(["report", "--runs-dir", str(tmp_path / "runs"), "--reports-dir", str(tmp_path / "reports")]) == 0
    assert f"| {method} " in (tmp_path / "reports/all/report.md").read_text()


def test_all_failed(tmp_path: Path) -> None:
    for number, status in enumerate(["failed", "diverged", "out_of_memory"]):
        save_run(tmp_path / "runs", f"a-s{number}", cell_id="a", seed=number, status=status, error="no\nroom")
    assert main(["report", "--runs-dir", str(tmp_path / "runs"), "--reports-dir", str(tmp_path / "reports")]) == 0
    report = (tmp_path / "reports/all/report.md").read_text()
    assert "- Runs: 3 (1 diverged, 1 out_of_memory, 1 failed)." in report
    assert "| 1 diverged, 1 out_of_memory, 1 failed |" in report


def test_two_folders_copied_together(tmp_path: Path) -> None:
    """What is there twice counts once: an overwritten folder, one under another name, and the same seed of a cell."""
    for folder, seeds in (("one", (0, 1)), ("two", (1, 2))):
        for seed in seeds:
            save_run(tmp_path / folder, f"a-s{seed}", cell_id="a", seed=seed, metrics={"val_accuracy": 0.5 + seed / 4})
    shutil.copytree(tmp_path / "two", tmp_path / "one", dirs_exist_ok=True)
    shutil.copytree(tmp_path / "one/a-s0", tmp_path / "one/a-s0 (copy)")
    save_run(tmp_path / "one", "older-a-s2", cell_id="a", seed=2, metrics={"val_accuracy": 0.0})
    shutil.move(tmp_path / "one", tmp_path / "moved elsewhere")
    runs = load_runs(tmp_path / "moved elsewhere")
    assert runs.frame["run_id"].tolist() == ["a-s0", "a-s1", "a-s2"]
    assert [problem.partition(": ")[2] for problem in runs.problems] == [
        "is the result of run a-s0 and belongs into a folder of that name",
        "has cell and seed of a-s2, which is counted; a seed counts once",
    ]
    (cell,) = select.cells(runs.frame).to_dict("records")
    assert (cell["val_accuracy"], cell["val_accuracy_n"]) == (0.75, 3)


# ---------------------------------------------------------------- what must hold


def check_runs(frame: pd.DataFrame, cells: pd.DataFrame, runs: list[RunResult]) -> None:
    """Every run is a row, of the frame and of runs.csv, and is counted in exactly one cell."""
    assert sorted(frame["run_id"]) == sorted(run.run_id for run in runs)
    rows_of_csv = list(csv.DictReader(io.StringIO(writers.to_csv(frame))))
    assert [row["run_id"] for row in rows_of_csv] == frame["run_id"].tolist()
    assert sorted(run_id for run_ids in cells["run_ids"] for run_id in run_ids) == sorted(frame["run_id"])
    for status in Status:
        assert cells[select.num_status(status)].sum() == sum(run.status is status for run in runs)


def check_formats(table: PaperTable) -> None:
    """The four formats have the same rows, and no text of a name or a message is markup in any."""
    num_rows, num_columns = len(table.text.rows), len(table.text.titles)
    assert len(table.run_ids or table.text.rows) == len(table.methods or table.text.rows) == num_rows
    text = writers.to_markdown(table.text)
    assert len(text.splitlines()) == num_rows + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()} == {num_columns + 1}
    for note in table.notes:
        writers.note_in_markdown(note).encode()
    assert not re.search(r"\b(nan|inf)\b", " ".join(_number_texts(table)), re.IGNORECASE)
    check_latex(writers.to_latex(table, label=f"any-{table.name}"), num_rows, num_columns)
    html = writers.to_html(table)
    assert html.count("<tr") == num_rows + 1 and html.count("<td") == num_rows * num_columns
    assert "<script" not in html
    numbers = list(csv.reader(io.StringIO(writers.to_csv(table.numbers))))
    assert len(numbers) == len(table.numbers) + 1 and len({len(row) for row in numbers}) == 1
    assert not {"nan", "inf", "-inf"} & {cell for row in numbers for cell in row}
    console = Console(width=80, file=io.StringIO())
    for block in writers.to_rich(table.text, width=80):
        console.print(block)
    (text + html + writers.to_csv(table.numbers)).encode()


def _number_texts(table: PaperTable) -> Iterable[str]:
    return (
        text for row in table.text.rows for text, is_number in zip(row, table.text.is_number, strict=True) if is_number
    )


def check_latex(text: str, num_rows: int, num_columns: int) -> None:
    bare = re.sub(r"\\[\\{}&%$#_]", "", text)
    assert bare.count("{") == bare.count("}")
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert text.isascii() or all(character <= "ÿ" for character in text)
    begun = re.findall(r"\\begin\{(\w+)\}", text)
    assert begun[:2] == ["table", "tabular"] and sorted(re.findall(r"\\end\{(\w+)\}", text)) == sorted(begun)
    body = text.split("\\midrule\n", 1)[1].split("\\bottomrule")[0].replace("\\midrule\n", "")
    assert len(body.splitlines()) == num_rows
    assert all(len(re.findall(r"(?<!\\)&", line)) == num_columns - 1 for line in body.splitlines())


def check_trade_off(table: PaperTable, runs: list[RunResult]) -> None:
    """A row per condition, no number for one without a finished run, and otherwise that of a rate that was tried."""
    conditions: defaultdict[str, list[RunResult]] = defaultdict(list)
    for run in runs:
        config = json.loads(json.dumps(run.config))
        del config["seed"], config["trainer"]["learning_rate"]
        conditions[json.dumps([config, run.environment.get("data_fingerprint")])].append(run)
    by_run = {run.run_id: key for key, members in conditions.items() for run in members}
    assert len(table.text.rows) == len(conditions)
    assert {by_run[run_ids[0]] for run_ids in table.run_ids} == conditions.keys()
    for values, texts, run_ids in zip(table.text.values, table.text.rows, table.run_ids, strict=True):
        members = conditions[by_run[run_ids[0]]]
        shown = {title.rpartition(" ")[0]: i for i, title in enumerate(table.text.titles) if title[-1] in "↑↓"}
        finished = [run for run in members if run.status is Status.FINISHED]
        if not finished:
            assert all(values[i] is None and texts[i] == DASH for i in shown.values())
            continue
        best_metric = members[0].config["dataset"]["best_metric"]
        index = shown[METRICS[f"val_{best_metric}"].label]
        assert (values[index], values[index] is None) == (
            _best_mean(finished, f"val_{best_metric}"),
            texts[index] == DASH,
        )


def _best_mean(runs: list[RunResult], name: str) -> float | None:
    """The best mean on val of the learning rates with the most finished runs."""
    by_rate: defaultdict[float, list[RunResult]] = defaultdict(list)
    for run in runs:
        by_rate[run.config["trainer"]["learning_rate"]].append(run)
    most = max(map(len, by_rate.values()))
    measured = [
        [run.metrics[name] for run in members if name in run.metrics]
        for members in by_rate.values()
        if len(members) == most
    ]
    means = [
        float(values[0]) if len(set(values)) == 1 else math.fsum(values) / len(values) for values in measured if values
    ]
    better = min if METRICS[name].direction is Direction.LOWER else max
    return better(means, default=None)


def check_page(found: list[PaperTable], cells: pd.DataFrame, frame: pd.DataFrame, curves: Any) -> None:
    shown = page(
        title="any",
        summary=[],
        tables=[PageTable(table.name, table.caption, writers.to_html(table), table.notes) for table in found],
        cells=cells,
        frame=frame,
        curves=curves,
        environment=[],
        failures=notes.failures(frame),
    )
    data = data_of(shown)
    assert len(data["cells"]) == len(cells) and set(data["runs"]) == set(frame["run_id"])
    assert sum(len(cell["runs"]) for cell in data["cells"]) == len(frame)
