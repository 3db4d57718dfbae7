"""A user's own configs and sweeps: found by name, listed, before ours, and announced in the log."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins

from harness.__main__ import main
from harness.config.folders import CONF_DIR, SWEEPS_DIR, OwnFolders, find_own, options_of, own_folders
from harness.config.validation import ConfigError

DATASET = "name: mine\ntrain_file: rows.csv\n"
SWEEP = """\
# @package _global_
defaults:
  - override /dataset: mine
sweep: mine
hydra:
  mode: MULTIRUN
  sweeper:
    grids:
      - {rank: [r1, r2], target_layers: qv}
"""


class Outcome(NamedTuple):
    exit_code: int
    out: str
    err: str


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `conf/` with a dataset, `sweeps/` with a sweep of two runs on it, and its rows."""
    write(tmp_path / "project/conf/dataset/mine.yaml", DATASET)
    write(tmp_path / "project/sweeps/mine.yaml", SWEEP)
    write(tmp_path / "project/rows.csv", "text,label\n" + "".join(f"row {row},{row % 2}\n" for row in range(40)))
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "project"


@pytest.fixture
def harness(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Callable[..., Outcome]:
    """`python -m harness` in this process."""

    def call(*arguments: str) -> Outcome:
        # What main sets for its process.
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", ["harness", *arguments])
        GlobalHydra.instance().clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="harness"):
            exit_code = main()
        assert own_folders() == OwnFolders()  # nothing is left for what is composed next in this process
        printed = capsys.readouterr()
        return Outcome(exit_code, printed.out, printed.err + caplog.text)

    return call


@pytest.fixture
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run launches nothing, so nothing has to be loaded for it."""
    Plugins.instance()  # Hydra's scan runs the plug-in modules once more and would undo what is replaced below
    monkeypatch.setattr(Plugins.instance(), "instantiate_launcher", lambda **_: object())


def test_own_files_below_the_current_folder_are_found_by_name(project: Path, harness: Callable[..., Outcome]) -> None:
    outcome = harness("--cfg", "job", "dataset=mine", "rank=r1", "target_layers=qv")
    assert outcome.exit_code == 0
    assert "train_file: rows.csv" in outcome.out
    assert f"own configs in {project}/conf and {project}/sweeps: dataset/mine, sweeps/mine\n" in outcome.err


@pytest.mark.usefixtures("_no_launcher")
def test_an_own_sweep_on_an_own_dataset_plans_its_runs(project: Path, harness: Callable[..., Outcome]) -> None:
    outcome = harness("-m", "sweeps=mine", "model=tiny_bert", "hydra.sweeper.dry_run=true")
    assert outcome.exit_code == 0, outcome.err
    assert "2 runs: 2 new" in outcome.out
    assert "tiny_bert-mine-lora-r1-qv" in outcome.out


@pytest.mark.usefixtures("_no_launcher")
def test_config_dir_holds_groups_and_sweeps_and_stands_for_the_current_folder(
    project: Path, harness: Callable[..., Outcome]
) -> None:
    write(project / "theirs/dataset/other.yaml", DATASET.replace("mine", "other"))
    write(project / "theirs/sweeps/other.yaml", SWEEP.replace("mine", "other"))
    arguments = ("--config-dir", "theirs", "model=tiny_bert", "hydra.sweeper.dry_run=true")
    outcome = harness("-m", *arguments, "sweeps=other")
    assert outcome.exit_code == 0, outcome.err
    assert "tiny_bert-other-lora-r2-qv" in outcome.out
    assert f"own configs in {project}/theirs: dataset/other, sweeps/other" in outcome.err
    assert "sweeps=mine: no such option. There are: demo," in harness("-m", *arguments, "sweeps=mine").err


@pytest.mark.parametrize("group", ["dataset", "sweeps"])
def test_an_option_that_does_not_exist_lists_own_ones_too(
    project: Path, harness: Callable[..., Outcome], group: str
) -> None:
    outcome = harness("rank=r1", "target_layers=qv", f"{group}=mien")
    assert outcome.exit_code == 2
    assert f"error: {group}=mien: no such option. There are: " in outcome.err
    listed = outcome.err.partition("There are: ")[2].rstrip(".\n").split(", ")
    assert "mine" in listed and {"dataset": "reuters_r8", "sweeps": "demo"}[group] in listed


def test_an_own_file_replaces_ours_and_the_log_says_so(project: Path, harness: Callable[..., Outcome]) -> None:
    own = write(project / "conf/trainer/default.yaml", "num_epochs: 7\n")
    write(project / "sweeps/demo.yaml", SWEEP)
    outcome = harness("--cfg", "job", "rank=r1", "target_layers=qv")
    assert "num_epochs: 7" in outcome.out
    assert f"{own} replaces the trainer/default that comes with lora-harness" in outcome.err
    assert "demo.yaml replaces the sweeps/demo that comes with lora-harness" in outcome.err


def test_a_copy_of_ours_is_no_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harness: Callable[..., Outcome]
) -> None:
    """A clone in which the installed package runs: edited files count, and nothing else is announced."""
    shutil.copytree(CONF_DIR, tmp_path / "conf")
    shutil.copytree(SWEEPS_DIR, tmp_path / "sweeps")
    monkeypatch.chdir(tmp_path)
    assert find_own([]) == OwnFolders()
    edited = tmp_path / "conf/rank/r8.yaml"
    edited.write_text(edited.read_text() + "# edited\n")
    assert list(find_own([]).options()) == ["rank/r8"]
    (tmp_path / "conf/config.yaml").write_text("seed: 1\n")
    outcome = harness("rank=r1", "target_layers=qv")
    assert outcome.exit_code == 2
    assert outcome.err.startswith(f"error: {tmp_path}/conf/config.yaml: would replace that of lora-harness.")
    assert "--config-name NAME" in outcome.err


def test_folders_of_another_program_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "conf/config.yaml", "port: 80\n")
    write(tmp_path / "conf/sites/default.yaml", "port: 80\n")
    (tmp_path / "sweeps").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_own(["rank=r8"]) == OwnFolders()


@pytest.mark.parametrize("arguments", [["--config-dir", "nope"], ["--config-dir="], ["-cd", "nope", "rank=r8"]])
def test_a_config_dir_that_is_not_there(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^--config-dir=(nope)?: no such folder\.$"):
        find_own(arguments)


def test_a_config_dir_may_be_a_project_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.parent)
    assert find_own(["--config-dir", "project"]) == OwnFolders(project / "conf", project / "sweeps")
    shutil.rmtree(project / "sweeps")
    assert list(find_own(["--config-dir", "project"]).options()) == ["dataset/mine"]


def test_a_config_dir_without_a_group_names_the_groups(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find_own(["--config-dir", str(tmp_path)])
    message = str(caught.value)
    assert message.startswith(f"--config-dir={tmp_path}: has no folder named like a group (dataset, evaluate_also, ")
    assert message.endswith(f"chosen. {tmp_path}/dataset/mine.yaml would be dataset=mine.")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dataset/bad", "name: [", "{file}, line 1, column 8: not YAML: expected the node content, but found"),
        ("dataset/bad", "train_file: rows.csv", "dataset.name: a value is needed and none was given."),
        ("dataset/bad", "name: bad\nfiel: rows.csv", "dataset=bad: dataset.fiel: no such setting. Known here: asset, "),
        ("trainer/bad", "max_steps: many", "trainer=bad: trainer.max_steps: Value 'many' of type 'str' could not be"),
        ("sweeps/bad", "sweep: bad", "sweeps: a sweep file sets the run's own settings; `# @package _global_` must be"),
    ],
)
def test_an_own_file_with_a_fault_is_named_with_what_is_wrong(
    project: Path, harness: Callable[..., Outcome], name: str, text: str, message: str
) -> None:
    path = write(project / f"conf/{name}.yaml", text)
    outcome = harness("rank=r1", "target_layers=qv", "model=tiny_bert", name.replace("/", "="))
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.exit_code == 2
    assert len(errors) == 1 and errors[0].startswith("error: " + message.format(file=path)), outcome.err


def test_nothing_beside_a_folder_of_sweeps_becomes_a_group(
    project: Path, harness: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    write(project / "runs/a/config.yaml", "seed: 1\n")
    with pytest.raises(SystemExit) as ended:
        harness("--help")
    assert ended.value.code == 0
    groups = capsys.readouterr().out.partition("== Configuration groups ==")[2].partition("== Config ==")[0]
    names = [line.partition(":")[0] for line in groups.splitlines() if ": " in line]
    assert "sweeps" in names and "dataset" in names
    assert {name.partition("/")[0] for name in names} <= {path.name for path in CONF_DIR.iterdir()} | {"sweeps"}


def test_the_options_of_a_group_are_listed_without_own_folders_too() -> None:
    assert {"default", "debug", "lora_paper/roberta_base_cola"} <= set(options_of("trainer"))
    assert options_of("sweeps") == sorted(path.stem for path in SWEEPS_DIR.glob("*.yaml"))
