"""The launchers for existing engines: their settings, the script SLURM would get. A real run: test_launcher.py."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import cast

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from harness.config.composing import register
from harness.config.schema import RunConfig
from harness.config.validation import ConfigError
from harness.content.identity import Identity, PlannedRun
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
        monkeypatch.setattr(clusters, "compute", lambda planned: Outcome(status))
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        assert clusters.ClusterRun()(PlannedRun(cast(RunConfig, None), Identity("r", "c", {}))).status == status
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert bool(asked) == requeued
