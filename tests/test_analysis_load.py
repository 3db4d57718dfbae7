"""Reading runs: what becomes a row, what is left out by name, and which runs a sweep has.

`save_run` writes result files by hand, also for the tests of tables and reports.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis import select
from analysis.load import LoadError, load_curves, load_runs
from harness.config.composing import from_dict, to_dict
from harness.results.launches import SearchedCell, record_launch
from harness.results.methods import METHODS
from harness.results.metrics import METRICS
from harness.results.schema import RunResult, Status, write_result

ROOT = Path(__file__).resolve().parent.parent

ENVIRONMENT = {
    "device_type": "cpu",
    "num_threads": 2,
    "versions": {"torch": "2.13.0"},
    "git_commit": "0123abcd",
    "git_dirty": False,
}


def result(
    run_id: str,
    *,
    cell_id: str | None = None,
    seed: int = 0,
    sweep: str | None = "demo",
    status: str = "finished",
    error: str = "",
    method: str = "lora",
    rank: int = 8,
    target_layers: str = "qv",
    blocks: Any = "all",
    learning_rate: float = 1e-3,
    metrics: dict[str, float] | None = None,
    environment: dict[str, Any] = ENVIRONMENT,
    **settings: Any,
) -> dict[str, Any]:
    """A result file's content; other settings by dotted name with `__` for the dot: `trainer__batch_size=32`."""
    has_rank = method in METHODS and METHODS[method].uses_rank
    projections = list(target_layers) if set(target_layers) <= set("qkvo") else [target_layers]
    config: dict[str, Any] = {
        "model": {"name": "bert", "revision": None},
        "dataset": {"name": "sst2", "best_metric": "accuracy", "text_columns": ["sentence"]},
        "method": {"name": method, "adapter_dropout": 0.0, "learning_rate": learning_rate},
        "rank": {"rank": rank, "alpha": 16.0} if has_rank else None,
        "target_layers": {"name": target_layers, "projections": projections, "blocks": blocks} if has_rank else None,
        "trainer": {"learning_rate": learning_rate, "batch_size": 16, "num_epochs": 3.0},
        "seed": seed,
        "tracking": {"wandb": "offline"},
        "sweep": sweep,
    }
    for name, value in settings.items():
        group, _, key = name.partition("__")
        config[group][key] = value
    return {
        "schema_version": 1,
        "run_id": run_id,
        "cell_id": cell_id or run_id,
        "sweep": sweep,
        "status": status,
        "error": error,
        "config": config,
        "target_modules": ["0.query", "0.value"] if has_rank else [],
        "metrics": metrics or {},
        "environment": environment,
    }


def save_run(runs_dir: Path, run_id: str, **options: Any) -> Path:
    """Writes `runs_dir/<run_id>/result.json` by hand and returns its path."""
    return save_json(runs_dir / run_id / "result.json", result(run_id, **options))


def save_sweep(runs_dir: Path, name: str, run_ids: list[str]) -> Path:
    """Writes the sweep file of the launcher and returns its path."""
    content = {
        "sweep": name,
        "run_ids": run_ids,
        "command": f"python -m harness -m sweeps={name}",
        "created": "2025-11",
    }
    return save_json(runs_dir / "sweeps" / f"{name}.json", content)


def save_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# ---------------------------------------------------------------- rows


def test_a_run_becomes_a_row(tmp_path: Path) -> None:
    metrics = {"num_adapter_params": 4096, "val_accuracy": 0.75}
    save_run(tmp_path, "a-s3", cell_id="a", seed=3, blocks=[0, 5], metrics=metrics)
    frame = load_runs(tmp_path).frame
    assert len(frame) == 1
    row = frame.iloc[0]
    assert (row["run_id"], row["cell_id"], row["sweep"], row["status"], row["error"]) == (
        "a-s3",
        "a",
        "demo",
        "finished",
        "",
    )
    assert (row["config.seed"], row["config.rank.rank"], row["config.trainer.batch_size"]) == (3, 8, 16)
    assert row["config.target_layers.blocks"] == (0, 5)
    assert row["config.model.revision"] is None
    assert row["num_target_modules"] == 2
    assert (row["environment.versions.torch"], row["environment.git_dirty"]) == ("2.13.0", False)
    assert (row["num_adapter_params"], row["val_accuracy"]) == (4096, 0.75)


def test_every_metric_is_a_column_of_numbers_and_a_missing_one_is_nan(tmp_path: Path) -> None:
    save_run(tmp_path, "a", metrics={"val_accuracy": 0.75})
    frame = load_runs(tmp_path).frame
    assert [str(frame[name].dtype) for name in METRICS] == ["float64"] * len(METRICS)
    assert math.isnan(frame["peak_memory_bytes"].iloc[0])


def test_runs_that_did_not_finish_stay_rows(tmp_path: Path) -> None:
    for status in Status:
        save_run(tmp_path, f"run-{status}", status=status.value, error="" if status == "finished" else "it ended")
    frame = load_runs(tmp_path).frame
    assert dict(zip(frame["status"], frame["error"], strict=True)) == {
        "finished": "",
        "diverged": "it ended",
        "out_of_memory": "it ended",
        "failed": "it ended",
    }


def test_a_method_without_a_rank_has_none(tmp_path: Path) -> None:
    save_run(tmp_path, "full", method="full")
    save_run(tmp_path, "lora")
    frame = load_runs(tmp_path).frame.set_index("run_id")
    assert frame.loc["full", "config.rank.rank"] is None
    assert frame.loc["lora", "config.rank.rank"] == 8
    assert "config.rank" not in frame.columns


def test_without_a_sweep_file_runs_are_ordered_by_method_placement_rank_and_seed(tmp_path: Path) -> None:
    save_run(tmp_path, "1", target_layers="qv", rank=16)
    save_run(tmp_path, "2", target_layers="qv", rank=8, seed=10)
    save_run(tmp_path, "3", target_layers="qv", rank=8, seed=9)
    save_run(tmp_path, "4", target_layers="qv", rank=8, blocks=[1, 2])
    save_run(tmp_path, "5", target_layers="all", rank=64)
    save_run(tmp_path, "6", method="full")
    assert list(load_runs(tmp_path).frame["run_id"]) == ["6", "5", "4", "3", "2", "1"]


def test_the_settings_that_analysis_reads_are_those_of_the_schema(tmp_path: Path) -> None:
    config = from_dict(
        {
            "model": {"name": "tiny", "tiny": "bert"},
            "dataset": {"name": "toy", "train_file": "toy.csv"},
            "rank": {"rank": 8, "alpha": 16},
            "target_layers": {"name": "qv", "projections": ["q", "v"]},
            "trainer": {"learning_rate": 1e-3, "num_epochs": 1},
        }
    )
    write_result(tmp_path / "a", RunResult("a", "a", None, Status.FINISHED, to_dict(config)))
    runs = load_runs(tmp_path)
    assert runs.problems == []
    row = runs.frame.iloc[0]
    assert (row["config.rank.rank"], row["config.target_layers.name"], row["config.target_layers.blocks"]) == (
        8,
        "qv",
        "all",
    )


# ---------------------------------------------------------------- problems


def test_files_that_are_no_results_are_named_and_left_out(tmp_path: Path) -> None:
    save_run(tmp_path, "good")
    save_json(tmp_path / "newer" / "result.json", result("newer") | {"schema_version": 2})
    save_json(tmp_path / "foreign" / "result.json", {"accuracy": 0.9})
    save_json(tmp_path / "unknown_metric" / "result.json", result("unknown_metric", metrics={"speed": 1.0}))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "result.json").write_text('{"schema_version": 1, "run_', encoding="utf-8")
    no_method = result("no_method")
    del no_method["config"]["method"]
    save_json(tmp_path / "no_method" / "result.json", no_method)
    save_run(tmp_path, "odd_metric", dataset__best_metric="vibes")
    runs = load_runs(tmp_path)
    assert list(runs.frame["run_id"]) == ["good"]
    assert [problem.removeprefix(f"{tmp_path}/") for problem in runs.problems] == [
        "cut/result.json: not readable as JSON (Unterminated string starting at: line 1 column 23 (char 22))",
        "foreign/result.json: schema_version None, this code reads 1",
        "newer/result.json: schema_version 2, this code reads 1",
        "no_method/result.json: its config has no method.name",
        "odd_metric/result.json: its dataset.best_metric 'vibes' is not in the METRICS registry",
        "unknown_metric/result.json: metrics: 'speed' is not in the METRICS registry",
    ]


def test_a_copied_run_does_not_count_twice(tmp_path: Path) -> None:
    save_run(tmp_path, "a")
    save_json(tmp_path / "a-backup" / "result.json", result("a"))
    runs = load_runs(tmp_path)
    assert len(runs.frame) == 1
    assert runs.problems == [
        f"{tmp_path}/a-backup/result.json: is the result of run a and belongs into a folder of that name"
    ]


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(LoadError) as error:
        load_runs(tmp_path / "rums")
    assert str(error.value) == (
        f"runs_dir={tmp_path}/rums: no such folder. Name the folder that holds the runs with --runs-dir, "
        "or make runs first: python -m harness -m sweeps=demo"
    )


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(LoadError) as error:
        load_runs(tmp_path)
    assert str(error.value) == (
        f"runs_dir={tmp_path}: no result.json of a run in any of its folders, so no run has ended here. "
        "Name another folder with --runs-dir, or make runs first: python -m harness -m sweeps=demo"
    )


def test_a_folder_of_foreign_files_says_what_it_left_out(tmp_path: Path) -> None:
    save_json(tmp_path / "foreign" / "result.json", [])
    with pytest.raises(LoadError) as error:
        load_runs(tmp_path)
    assert str(error.value).endswith(
        f"sweeps=demo\n  left out: {tmp_path}/foreign/result.json: expected a JSON object, got list"
    )


# ---------------------------------------------------------------- sweeps


def test_a_sweep_file_decides_membership_order_and_what_is_to_do(tmp_path: Path) -> None:
    save_run(tmp_path, "lora", sweep="second")
    save_run(tmp_path, "shared", method="full", sweep="first")
    save_run(tmp_path, "other", sweep="second")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "result.json").write_text("", encoding="utf-8")
    save_sweep(tmp_path, "second", ["missing", "lora", "broken", "shared"])
    runs = load_runs(tmp_path, sweep="second")
    assert list(runs.frame["run_id"]) == ["lora", "shared"]
    assert runs.to_do == ["missing"]
    assert runs.unreadable == ["broken"]
    assert len(runs.problems) == 1
    assert (runs.sweep, runs.command, runs.created) == ("second", "python -m harness -m sweeps=second", "2025-11")


def test_a_sweep_is_the_union_of_its_launches(tmp_path: Path) -> None:
    save_run(tmp_path, "a")
    save_run(tmp_path, "c")
    save_sweep(tmp_path, "demo", ["a", "b"])  # as earlier versions wrote it
    record_launch(tmp_path, "demo", run_ids=["c", "a"], command="python -m harness -m sweeps=demo rank=r4")
    runs = load_runs(tmp_path, sweep="demo")
    assert list(runs.frame["run_id"]) == ["a", "c"]
    assert runs.to_do == ["b"]
    assert [launch.run_ids for launch in runs.launches] == [["a", "b"], ["c", "a"]]
    assert runs.command == "python -m harness -m sweeps=demo rank=r4"


def test_runs_that_a_search_chooses_no_more_are_rows_of_no_report(tmp_path: Path) -> None:
    for run_id, rate in {"low": 1e-3, "high": 2e-3, "other": 3e-3}.items():
        save_run(tmp_path, run_id, learning_rate=rate)
    low, high = (SearchedCell(["x"], ["t"], [run_id], [value]) for run_id, value in (("low", 1.0), ("high", 2.0)))
    record_launch(tmp_path, "demo", run_ids=["t", "low"], command="x", searched=[low])
    record_launch(tmp_path, "demo", run_ids=["t", "high"], command="x", searched=[high])
    said = ["low: at values that a search chose in an earlier launch; now it chose others"]
    of_sweep, of_folder = load_runs(tmp_path, sweep="demo"), load_runs(tmp_path)
    assert list(of_sweep.frame["run_id"]) == ["high"] and of_sweep.problems == said
    assert list(of_folder.frame["run_id"]) == ["high", "other"] and of_folder.problems == said
    record_launch(tmp_path, "by_hand", run_ids=["low"], command="x")
    assert list(load_runs(tmp_path).frame["run_id"]) == ["low", "high", "other"]
    (tmp_path / "sweeps" / "demo" / "x.json").write_text("{")
    of_folder = load_runs(tmp_path)
    assert len(of_folder.frame) == 3 and "x.json: not readable as JSON" in of_folder.problems[0]


def test_without_a_sweep_file_a_sweep_has_the_runs_that_it_computed(tmp_path: Path) -> None:
    save_run(tmp_path, "a", sweep="first")
    save_run(tmp_path, "b", sweep="second")
    save_run(tmp_path, "c", sweep=None)
    runs = load_runs(tmp_path, sweep="second")
    assert list(runs.frame["run_id"]) == ["b"]
    assert (runs.command, runs.to_do) == (None, None)


def test_no_such_sweep_names_those_that_exist(tmp_path: Path) -> None:
    save_run(tmp_path, "a", sweep="first")
    save_run(tmp_path, "b", sweep=None)
    save_sweep(tmp_path, "second", ["a"])
    with pytest.raises(LoadError) as error:
        load_runs(tmp_path, sweep="frist")
    assert str(error.value) == (
        f"sweep='frist': no run in {tmp_path} belongs to a sweep of that name. Sweeps there: first, second. "
        "Leave --sweep out for all runs in one table."
    )


def test_a_sweep_of_which_no_run_has_ended(tmp_path: Path) -> None:
    save_run(tmp_path, "other")
    save_sweep(tmp_path, "demo", ["a", "b"])
    with pytest.raises(LoadError) as error:
        load_runs(tmp_path, sweep="demo")
    assert str(error.value) == (
        f"sweep='demo': none of its 2 runs has ended in {tmp_path} yet. Its command: python -m harness -m sweeps=demo"
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not readable as JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ("[]", "expected an object with run_ids, a list of names"),
        ('{"run_ids": [1]}', "expected an object with run_ids, a list of names"),
        ('{"sweep": "other", "run_ids": []}', "is about sweep 'other', not 'demo'"),
    ],
)
def test_a_sweep_file_that_cannot_be_read_is_an_error(tmp_path: Path, content: str, problem: str) -> None:
    path = save_sweep(tmp_path, "demo", [])
    path.write_text(content, encoding="utf-8")
    with pytest.raises(LoadError) as error:
        load_runs(tmp_path, sweep="demo")
    assert str(error.value) == (
        f"{path}: {problem}. Delete the file and run its sweep again: the other launches stand, and without any the "
        "runs that demo computed itself are taken."
    )


def test_a_sweep_called_result_is_not_taken_for_a_run(tmp_path: Path) -> None:
    save_run(tmp_path, "a")
    save_sweep(tmp_path, "result", ["a"])
    assert load_runs(tmp_path).problems == []


# ---------------------------------------------------------------- imports


WITHOUT_TORCH = (
    "import sys\n"
    "class Missing:\n"
    "    def find_spec(self, name, *_):\n"
    "        if name in ('torch', 'transformers', 'wandb', 'hydra', 'omegaconf'):\n"
    "            raise ModuleNotFoundError(name)\n"
    "sys.meta_path.insert(0, Missing())\n"
)


def test_analysis_works_without_torch_in_a_fresh_interpreter(tmp_path: Path) -> None:
    save_run(tmp_path / "runs", "a")
    script = (
        f"{WITHOUT_TORCH}from analysis.__main__ import main\n"
        f"sys.exit(main(['report', '--runs-dir', {str(tmp_path / 'runs')!r}, '--reports-dir', {str(tmp_path)!r}]))\n"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "all" / "report.md").exists()


def test_a_fresh_interpreter_without_torch_can_fail() -> None:
    process = subprocess.run([sys.executable, "-c", f"{WITHOUT_TORCH}import torch"], capture_output=True, text=True)
    assert "ModuleNotFoundError: torch" in process.stderr


# ---------------------------------------------------------------- hostile files


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"schema_version": 1, "run_id": "half", "cell', "not readable as JSON"),
        (b"\xff\xfe{}", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"schema_version": 1, "n": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        (b'{"schema_version": 2}', "schema_version 2"),
        (b'{"schema_version": 1, "foreign": true}', "result.json"),
        (b"[]", "expected a JSON object"),
    ],
)
def test_a_file_that_is_no_result_is_named_and_the_others_are_read(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    save_run(tmp_path, "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/result.json").write_bytes(content)
    runs = load_runs(tmp_path)
    assert list(runs.frame["run_id"]) == ["good"]
    (problem,) = runs.problems
    assert "bad/result.json" in problem and complaint in problem


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"metrics": {"val_accuracy": 10**400}}, "val_accuracy"),
        ({"metrics": {"val_accuracy": 1e200}}, "val_accuracy"),
        ({"trainer__learning_rate": 10**400}, "trainer.learning_rate"),
        ({"model__name": ["a", "list"]}, "model.name"),
        ({"rank__rank": "eight"}, "rank.rank"),
        ({"rank__rank": None}, "no rank.rank"),
        ({"target_layers__name": None}, "no target_layers.name"),
        ({"blocks": 5}, "target_layers.blocks"),
        ({"trainer__learning_rate": math.nan}, "trainer.learning_rate"),
        ({"dataset__best_metric": "__import__('os')"}, "best_metric"),
    ],
)
def test_values_of_no_sense_are_named(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    save_run(tmp_path, "good")
    save_run(tmp_path, "bad", **changes)
    runs = load_runs(tmp_path)
    assert list(runs.frame["run_id"]) == ["good"]
    assert "bad/result.json" in runs.problems[0] and complaint in runs.problems[0]


def test_half_a_surrogate_pair_is_its_code(tmp_path: Path) -> None:
    save_run(tmp_path, "a", target_layers="q\ud800", error="\udfff")
    (row,) = load_runs(tmp_path).frame.to_dict("records")
    assert (row["config.target_layers.name"], row["error"]) == ("q\\ud800", "\\udfff")


def test_what_would_steer_a_terminal_is_its_code(tmp_path: Path) -> None:
    save_run(tmp_path, "a", target_layers="q\x1b[2J\n# H", error="one\ntwo\x1b]0;x")
    (row,) = load_runs(tmp_path).frame.to_dict("records")
    assert (row["config.target_layers.name"], row["error"]) == ("q\\x1b[2J\\n# H", "one\ntwo\\x1b]0;x")


@pytest.mark.parametrize(
    ("makers", "shown"),
    [
        (
            [{"git_commit": "a1", "versions": {"torch": "2.12"}}, {"git_commit": "b2", "versions": {"torch": "2.13"}}],
            "git_commit a1, then b2; versions.torch 2.12, then 2.13",
        ),
        ([{"git_commit": "a1", "git_dirty": False}, {"git_commit": "a1"}], "git_dirty False, then None"),
        (["by hand"], ("by hand",)),
        ([], ()),
    ],
)
def test_of_the_makers_of_a_run_a_row_has_what_they_differ_in(tmp_path: Path, makers: Any, shown: Any) -> None:
    save_run(tmp_path, "a", environment=ENVIRONMENT | {"made_by": makers})
    (row,) = load_runs(tmp_path).frame.to_dict("records")
    assert row["environment.made_by"] == shown


def test_odd_but_possible_values_are_read(tmp_path: Path) -> None:
    gpus = {"gpus": [{"name": "a"}], "k\ud800": 1}
    save_run(tmp_path, "a", blocks=None, environment=ENVIRONMENT | gpus, metrics={"num_total_params": 0})
    (row,) = select.cells(load_runs(tmp_path).frame).to_dict("records")
    assert row["target_layers"] == "qv"
    assert row["trainable_share_n"] == 0


def test_deep_nesting_and_a_sweep_file_of_other_types(tmp_path: Path) -> None:
    save_run(tmp_path, "a")
    deep: dict[str, Any] = {}
    for _ in range(900):
        deep = {"x": deep or 1}
    save_run(tmp_path, "deep", environment=deep)
    assert "nested too deeply" in " ".join(load_runs(tmp_path).problems) or len(load_runs(tmp_path).frame) == 2
    sweep = {"sweep": "demo", "run_ids": ["a"], "command": ["x"], "created": 5}
    save_json(tmp_path / "sweeps/demo.json", sweep)
    runs = load_runs(tmp_path, sweep="demo")
    assert (runs.command, runs.created) == (None, None)
    (tmp_path / "sweeps/demo.json").write_text("[" * 100_000)
    with pytest.raises(LoadError, match="not readable as JSON"):
        load_runs(tmp_path, sweep="demo")


def test_a_sweep_file_cannot_point_out_of_the_folder(tmp_path: Path) -> None:
    save_run(tmp_path / "elsewhere", "a")
    save_run(tmp_path / "runs", "b")
    save_sweep(tmp_path / "runs", "demo", ["../elsewhere/a"])
    with pytest.raises(LoadError, match="no name of a run"):
        load_runs(tmp_path / "runs", sweep="demo")


def test_curves_without_the_half_written_last_line(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    rows = '{"step": 1, "train_nll": 2.0}\n{"step": 2, "train_nll": NaN, "note": "x"}\n[1]\n{"step": 3, "tra'
    rows = rows.replace("[1]", '[1]\n{"step": 2, "n": ' + "9" * 400 + "}\n" + "[" * 100_000)
    (tmp_path / "a/metrics.jsonl").write_text(rows)
    assert load_curves(tmp_path, ["a", "b"]) == {"a": [{"step": 1, "train_nll": 2.0}, {"step": 2}, {"step": 2}]}
