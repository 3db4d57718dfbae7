"""Trackio and TensorBoard hold what W&B holds, beside it or alone, and neither can end a run."""

from __future__ import annotations

import importlib.util
import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run import config, rows  # noqa: F401
from test_tracking import CELL_ID, CONFIG, CURVE, RUN_ID, _read_curve, _read_wandb, _result

from harness.config.composing import compose, from_composed, register
from harness.config.schema import TrackingConfig, WandbMode
from harness.config.validation import ConfigError
from harness.plan import plan
from harness.results.schema import Status
from harness.run import run
from harness.tracking import tensorboard_mirror, trackio_mirror, wandb_mirror
from harness.tracking.tracker import Tracker, open_tracker


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trackio's folder, in place of the one in the home directory."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "database"))
    # Not a matter of these tests, and three processes start at once beside another worker of the suite.
    for module in (wandb_mirror, trackio_mirror, tensorboard_mirror):
        monkeypatch.setattr(module, "FILES_SECONDS", 120.0)
    return tmp_path / "database"


def opened(run_dir: Path, **on: Any) -> Tracker:
    run_dir.mkdir(exist_ok=True)
    settings = TrackingConfig(**on)
    names = {"run_id": RUN_ID, "cell_id": CELL_ID, "job_type": "lora", "sweep": "demo"}
    return open_tracker(settings, run_dir=run_dir, run_config=CONFIG, **names)


def read_trackio(folder: Path, project: str = "lora-harness") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The config of the one run in a project, and its records in order."""
    with closing(sqlite3.connect(folder / f"{project}.db")) as connection:
        ((name, kept),) = connection.execute("SELECT run_name, config FROM configs").fetchall()
        assert name == RUN_ID
        records = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert {each for each, _, _ in records} == {RUN_ID}
    return json.loads(kept), [{"step": step, **json.loads(values)} for _, step, values in records]


def read_tensorboard(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[tuple[int, str]]]]:
    """Of each scalar and of each text, the steps and values."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    scalars: dict[str, list[tuple[int, float]]] = {}
    texts: dict[str, list[tuple[int, str]]] = {}
    for tag in events.Tags()["tensors"]:
        plugin = events.SummaryMetadata(tag).plugin_data.plugin_name
        for event in events.Tensors(tag):
            if plugin == "scalars":
                scalars.setdefault(tag, []).append((event.step, event.tensor_proto.double_val[0]))
            else:
                assert plugin == "text"
                texts.setdefault(tag, []).append((event.step, event.tensor_proto.string_val[0].decode()))
    return scalars, texts


def test_several_trackers_hold_what_the_local_files_hold(
    tmp_path: Path, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    tracker = opened(run_dir, wandb=WandbMode.offline, trackio=True, tensorboard=True)
    for step, values in [*CURVE, (30, {"train_nll": float("nan"), "train_tokens_per_second": 1000.0})]:
        tracker.log(step, values)
    result = _result(Status.DIVERGED)
    tracker.finish(result)
    tracker.close()
    assert caplog.messages == []

    curve, summary = _read_curve(run_dir), {**result.metrics, "status": "diverged"}
    mirrored = _read_wandb(run_dir)
    assert (mirrored.history, mirrored.summary) == (curve, summary)

    kept, records = read_trackio(database)
    assert kept.pop("_Group") == CELL_ID
    assert {name: value for name, value in kept.items() if not name.startswith("_")} == CONFIG
    assert records == [*curve, {"step": 30, **{f"result/{name}": value for name, value in summary.items()}}]

    scalars, texts = read_tensorboard(run_dir / "tensorboard")
    expected: dict[str, list[tuple[int, float]]] = {}
    for row in curve:
        for name, value in row.items():
            if name not in ("step", "non_finite"):
                expected.setdefault(name, []).append((row["step"], value))
    assert scalars == expected | {f"result/{name}": [(30, value)] for name, value in result.metrics.items()}
    ((_, text),) = texts.pop("config")
    assert json.loads(text.removeprefix("```json\n").removesuffix("```")) == CONFIG
    assert texts == {"non_finite": [(30, "train_nll")], "result/status": [(30, "diverged")]}


def test_a_second_attempt_replaces_the_first_and_other_runs_stay(tmp_path: Path, database: Path) -> None:
    other = open_tracker(
        TrackingConfig(trackio=True, project="mine"),
        run_dir=tmp_path,
        run_id="other",
        cell_id=CELL_ID,
        job_type="lora",
        sweep=None,
        run_config={},
    )
    other.log(1, {"train_nll": 1.0})
    other.close()
    for nll in (0.5, 0.25):
        tracker = opened(tmp_path / "run", trackio=True, tensorboard=True, project="mine")
        tracker.log(1, {"train_nll": nll})
        tracker.close()
    with closing(sqlite3.connect(database / "mine.db")) as connection:
        found = connection.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    assert [(name, json.loads(values)) for name, values in found] == [
        ("other", {"train_nll": 1.0}),
        (RUN_ID, {"train_nll": 0.25}),
    ]
    assert read_tensorboard(tmp_path / "run" / "tensorboard")[0] == {"train_nll": [(1, 0.25)]}


@pytest.mark.parametrize("name", ["trackio", "tensorboard"])
@pytest.mark.parametrize("harm", ["raise ImportError('libfoo.so')", "import os; os.kill(os.getpid(), 9)"])
def test_a_tracker_that_fails_is_reported_once_and_changes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    harm: str,
) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / f"{name}.py").write_text(harm)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    run_dir = tmp_path / "run"
    tracker = opened(run_dir, **{name: True})
    for step, values in CURVE:
        tracker.log(step, values)
    tracker.finish(_result())
    (warning,) = caplog.messages
    product = {"trackio": "Trackio", "tensorboard": "TensorBoard"}[name]
    assert warning.startswith(f"tracking.{name}=true: ") and f"{product} will miss the rest of it" in warning
    assert f"tracking.{name}=false runs without {product}. Details: {run_dir}/{name}/mirror.log" in warning
    assert len(_read_curve(run_dir)) == len(CURVE)


def test_what_trackio_only_warns_of_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "file"))
    tracker = opened(tmp_path / "run", trackio=True)
    tracker.log(1, {"train_nll": 0.5})
    tracker.finish(_result())
    (warning,) = caplog.messages
    assert warning.startswith("tracking.trackio=true: ")


def test_a_run_ends_in_the_trackers_that_were_chosen(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    database: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = config(rows, tmp_path, "head_only", tracking={"trackio": True, "tensorboard": True})
    plan(wanted)
    result = run(wanted)
    assert result.status is Status.FINISHED
    monkeypatch.setitem(globals(), "RUN_ID", result.run_id)
    _, records = read_trackio(database)
    curve = _read_curve(tmp_path / result.run_id)
    assert len(curve) > 2 and records[:-1] == curve
    assert records[-1] == {
        "step": curve[-1]["step"],
        **{f"result/{name}": value for name, value in result.metrics.items()},
        "result/status": "finished",
    }
    scalars, texts = read_tensorboard(tmp_path / result.run_id / "tensorboard")
    assert {name: [value for _, value in found] for name, found in scalars.items() if name.startswith("result/")} == {
        f"result/{name}": [value] for name, value in result.metrics.items()
    }
    assert texts["result/status"][0][1] == "finished"


@pytest.mark.parametrize("name", ["trackio", "tensorboard"])
def test_a_package_that_is_missing_is_an_error_of_planning_that_names_the_extra(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    wanted = config(rows, tmp_path, "head_only", tracking={name: True})
    plan(wanted)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda each, *more: None if each == name else find(each, *more))
    with pytest.raises(ConfigError) as caught:
        plan(wanted)
    assert caught.value.problems == [f"tracking.{name}=true: needs {name}; pip install 'lora-harness[{name}]'."]
    plan(config(rows, tmp_path, "head_only"))


@pytest.mark.parametrize(
    ("chosen", "wandb", "trackio", "tensorboard"),
    [
        ([], "offline", False, False),
        (["tracking=off"], "disabled", False, False),
        (["tracking=trackio", "tracking.project=mine"], "disabled", True, False),
        (["tracking=tensorboard"], "disabled", False, True),
        (["tracking=[wandb_offline,trackio]"], "offline", True, False),
        (["tracking=[tensorboard,wandb_online,trackio]", "tracking.log_every=3"], "online", True, True),
    ],
)
def test_trackers_are_chosen_alone_and_together(
    chosen: list[str], wandb: str, trackio: bool, tensorboard: bool
) -> None:
    register()
    composed = compose(["method=full", *chosen])
    tracking = from_composed(composed).tracking
    assert (tracking.wandb, tracking.trackio, tracking.tensorboard) == (wandb, trackio, tensorboard)


def test_a_project_without_a_tracker_that_has_projects_is_refused() -> None:
    register()
    with pytest.raises(ConfigError, match=r"tracking.project=mine: is read where W&B or Trackio is on"):
        from_composed(compose(["method=full", "tracking=tensorboard", "tracking.project=mine"]))


@pytest.mark.parametrize("package", ["wandb", "trackio", "tensorboard"])
def test_a_package_is_imported_in_the_file_of_its_tracker_alone(package: str) -> None:
    root = Path(tensorboard_mirror.__file__).parents[2]
    importing = rf"^\s*(?:import|from) {package}\b"
    files = [path for folder in ("harness", "hydra_plugins", "analysis") for path in (root / folder).rglob("*.py")]
    found = [path.name for path in files if re.search(importing, path.read_text(encoding="utf-8"), re.MULTILINE)]
    assert found == [f"{package}_mirror.py"]
