"""The launchers for existing engines: their settings, the script SLURM would get, and a real run on this machine."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from omegaconf import DictConfig
from test_launcher import SweepHere, base, exact, results, sweep, sweep_here  # noqa: F401 (two of them fixtures)

from harness.config.composing import register
from harness.config.validation import ConfigError
from harness.content.identity import Identity
from harness.results.schema import Status
from hydra_plugins.lora_harness import clusters
from hydra_plugins.lora_harness._worker import NOT_FINISHED, Outcome

CONF = Path(__file__).resolve().parent.parent / "conf"
LAUNCHERS = sorted(path.stem for path in (CONF / "hydra/launcher").glob("*.yaml"))


def composed(*overrides: str) -> DictConfig:
    register()
    GlobalHydra.instance().clear()
    Plugins.instance()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=list(overrides), return_hydra_config=True)
    return config.hydra.launcher


def test_the_ready_launchers() -> None:
    assert LAUNCHERS == ["ray", "submitit_local", "submitit_slurm"]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_settings_compose_over_the_schema(name: str) -> None:
    launcher = composed(f"hydra/launcher={name}")
    assert launcher._target_.startswith("hydra_plugins.lora_harness.clusters.")
    assert (CONF / "hydra/launcher" / f"{name}.yaml").read_text().startswith("# ")


def test_the_script_that_slurm_would_get() -> None:
    launcher = composed(
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.parameters.slurm_partition=gpu",
        "hydra.launcher.max_parallel=7",
    )
    script = clusters._slurm_script(Path("jobs"), clusters._plain(launcher.parameters), 42, launcher.max_parallel)
    lines = script.splitlines()
    for wanted in (
        "#SBATCH --array=0-41%7",
        "#SBATCH --partition=gpu",
        "#SBATCH --mem=32GB",
        "#SBATCH --time=240",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR2@120",
    ):
        assert wanted in lines
    assert not any("account" in line for line in lines)


def test_a_library_that_is_not_installed_is_named_with_its_extra() -> None:
    with pytest.raises(ConfigError, match=r"needs no_such_engine.*pip install 'lora-harness\[slurm\]'"):
        clusters._import("no_such_engine", "slurm")


@pytest.mark.parametrize(("status", "requeued"), [(NOT_FINISHED, True), ("finished", False)])
def test_a_run_that_slurm_stopped_asks_to_be_queued_again(
    monkeypatch: pytest.MonkeyPatch, status: str, requeued: bool
) -> None:
    asked: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: asked.append(number))
    try:
        monkeypatch.setattr(clusters, "compute", lambda values, identity: Outcome(status))
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        assert clusters.ClusterRun()({}, Identity("r", "c", {})).status == status
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert bool(asked) == requeued


def engine(name: str) -> Any:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed (an extra of this project)")


@pytest.mark.parametrize(
    ("launcher", "more"),
    [
        pytest.param("submitit_local", [], marks=engine("submitit")),
        pytest.param("ray", ["+hydra.launcher.init.num_cpus=2"], marks=[engine("ray"), pytest.mark.slow]),
    ],
)
def test_a_sweep_under_another_engine_gives_the_same_and_skips_what_is_finished(
    base: list[str],  # noqa: F811
    sweep_here: SweepHere,  # noqa: F811
    tmp_path: Path,
    launcher: str,
    more: list[str],
) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    arguments = [*base, "rank=r2,r4", "target_layers=qv", "num_threads=1"]
    code, output = sweep_here(tmp_path / "own", *arguments)
    assert code == 0, output
    code, output = sweep(tmp_path / "other", *arguments, f"hydra/launcher={launcher}", *more)
    assert code == 0, output
    assert {result.status for result in results(tmp_path / "other").values()} == {Status.FINISHED}
    assert exact(tmp_path / "other") == exact(tmp_path / "own")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("other/*/result.json")}
    code, output = sweep(tmp_path / "other", *arguments, f"hydra/launcher={launcher}", *more)
    assert code == 0
    assert "2 of 2 runs have a result already" in output
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("other/*/result.json")}
