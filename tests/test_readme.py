"""Every command that the README shows is one that works."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from test_analysis_load import save_run, save_sweep
from test_analysis_tables import measured
from test_sweeps import newsgpt, shapes_without_a_hub, sweep  # noqa: F401 (two of them fixtures)

from analysis.__main__ import _parser
from harness.config.composing import from_composed, register
from harness.config.folders import OwnFolders, find_own, use_own

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(start: str) -> list[str]:
    """Lines of the README's code blocks that begin so; what stands behind three spaces explains them."""
    blocks = re.findall(r"```\w*\n(.*?)```", README, flags=re.DOTALL)
    lines = [re.split(r" {3,}", line)[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(start)]


def test_the_readme_shows_commands() -> None:
    assert len(commands("python -m harness")) >= 8
    assert len(commands("python -m analysis")) >= 2
    assert len(commands("make ")) >= 3


@pytest.fixture
def _hydra() -> Iterator[None]:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


@pytest.mark.usefixtures("_hydra")
@pytest.mark.parametrize("command", [line for line in commands("python -m harness") if " -m harness -m " not in line])
def test_a_single_run_composes_and_is_valid(command: str) -> None:
    overrides = [word for word in shlex.split(command)[3:] if not word.startswith("--")]
    if "--help" not in command:
        from_composed(compose("config", overrides=overrides))


@pytest.mark.parametrize(
    "command", [line for line in commands("python -m harness -m ") if "hydra/launcher" not in line]
)
@pytest.mark.usefixtures("newsgpt")
def test_a_sweep_expands(command: str, sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    shapes_without_a_hub(monkeypatch)
    code, _ = sweep(*shlex.split(command)[4:])
    assert code == 0


@pytest.mark.parametrize("command", commands("python -m analysis"))
def test_an_analysis_parses(command: str) -> None:
    assert _parser().parse_args(shlex.split(command)[3:])


@pytest.mark.parametrize("command", commands("make "))
def test_a_target_exists(command: str) -> None:
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_notebook_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path / "runs", "a", metrics=measured())
    save_sweep(tmp_path / "runs", "demo", ["a"])
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert list(names["best"]["cell_id"]) == ["a"]


def test_the_page_on_own_configs_shows_files_that_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/how-to/own-configs.md").read_text(encoding="utf-8")
    dataset, model, sweep_file = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    files = {"conf/dataset/mine.yaml": dataset, "conf/model/mine.yaml": model, "sweeps/mine.yaml": sweep_file}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    register()
    GlobalHydra.instance().clear()
    use_own(find_own([]))
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            composed = compose(
                "config", overrides=["sweeps=mine", "model=mine", "method=full"], return_hydra_config=True
            )
            config = from_composed(compose("config", overrides=["sweeps=mine", "model=mine", "method=full"]))
    finally:
        use_own(OwnFolders())
    assert (config.dataset.train_file, config.model.path, config.sweep) == ("data/train.csv", "/models/my-bert", "mine")
    assert len(composed.hydra.sweeper.grids) == 2
