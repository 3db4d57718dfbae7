"""Launchers for existing engines: submitit (SLURM, or processes of this machine) and Ray.

They hand each run's config to `worker.compute` on another machine that sees the same folders. What they share with the
default launcher lies in the run itself: a finished run is skipped, a run that somebody computes is left alone, a
stopped one resumes from its checkpoint.

Hydra's submitit plug-in has had no release since 2022; its Ray plug-in wants cloudpickle below 3 and brings an AWS tool
chain. So the libraries themselves are driven from here. Both are extras: `pip install 'lora-harness[slurm]'`,
`pip install 'lora-harness[ray]'`.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from harness.config.validation import ConfigError
from harness.content.identity import PlannedRun
from harness.folder import kept_result, result_stamp
from harness.results.schema import Status
from hydra_plugins.lora_harness._composing import compose_run
from hydra_plugins.lora_harness._worker import NOT_FINISHED, Outcome, compute, outcome_of, outcome_of_dead
from hydra_plugins.lora_harness.launcher import job_return

logger = logging.getLogger("harness")

_POLL_SECONDS = 1.0


@dataclass
class SubmititLauncherConf:
    """Settings of both submitit launchers, under `hydra.launcher`; `parameters` are submitit's own names."""

    _target_: str = "hydra_plugins.lora_harness.clusters.SubmititLauncher"
    cluster: str = "local"
    max_parallel: int = 1
    folder: str = "${runs_dir}/.submitit"
    dry_run: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass
class RayLauncherConf:
    """Settings under `hydra.launcher`. `init` goes to `ray.init`, `remote` to `ray.remote`."""

    _target_: str = "hydra_plugins.lora_harness.clusters.RayLauncher"
    init: dict[str, Any] = field(default_factory=dict)
    remote: dict[str, Any] = field(default_factory=dict)


for name, node in (("submitit_base", SubmititLauncherConf), ("ray_base", RayLauncherConf)):
    ConfigStore.instance().store(group="hydra/launcher", name=name, node=node, provider="lora_harness")


class ClusterRun:
    """One run as submitit carries it to its machine."""

    def __call__(self, planned: PlannedRun) -> Outcome:
        """Computes the run. One that SLURM stopped is queued again by submitit; its checkpoint is on disk."""
        outcome = compute(planned)
        if outcome.status == NOT_FINISHED and os.environ.get("SLURM_JOB_ID"):
            # Submitit's own handler is in place again: it calls `checkpoint`, queues the job and ends this process.
            os.kill(os.getpid(), signal.SIGUSR2)
        return outcome

    def checkpoint(self, planned: PlannedRun) -> Any:
        """Called by submitit before it queues the job again: the state is in the run's folder already."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, planned)


class _ClusterLauncher(Launcher):
    """What both launchers do: compose, leave out what is kept, hand over the rest, collect, say what failed."""

    def __init__(self) -> None:
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        # By run id, from before the runs were handed over: a process that changes one has ended its run.
        self._stamps: dict[str, object] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra once."""
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs every config; returns one JobReturn each, whose value is the status or why there is none."""
        assert self.config is not None and self.hydra_context is not None
        runs = [compose_run(self.hydra_context, self.config, overrides) for overrides in job_overrides]
        outcomes: dict[str, Outcome] = {}
        todo = []
        for run in runs:
            kept = kept_result(run)
            if kept is None:
                todo.append(run)
            else:
                outcomes[run.run_id] = outcome_of(kept, was_kept=True)
        logger.info("%d of %d runs have a result already", len(outcomes), len(runs))
        self._stamps = {run.run_id: result_stamp(run) for run in todo}
        outcomes |= self.compute_all(todo)
        for name, outcome in outcomes.items():
            if outcome.status != Status.FINISHED:
                logger.info("%s: %s: %s", outcome.status, name, outcome.error)
        num_finished = sum(outcome.status == Status.FINISHED for outcome in outcomes.values())
        logger.info("%d of %d runs finished", num_finished, len(runs))
        return [job_return(overrides, outcomes[run.run_id]) for overrides, run in zip(job_overrides, runs, strict=True)]

    def died(self, run: PlannedRun, error: str) -> Outcome:
        """What became of a run whose process is gone."""
        return outcome_of_dead(run, error, stamp_before=self._stamps.get(run.run_id))

    @abstractmethod
    def compute_all(self, runs: Sequence[PlannedRun]) -> dict[str, Outcome]:
        """The outcome of every run, by run id."""


class SubmititLauncher(_ClusterLauncher):
    """One submitit job per run.

    Args:
        cluster: `slurm`, or `local` for processes of this machine.
        max_parallel: runs at a time; on SLURM the limit of the job array.
        folder: where submitit keeps its files; must be seen by all machines.
        dry_run: print the batch script that would be submitted, and stop.
        parameters: what submitit's `update_parameters` takes (timeout_min, mem_gb, gpus_per_node, slurm_...).
    """

    def __init__(
        self, cluster: str, max_parallel: int, folder: str, dry_run: bool, parameters: DictConfig | dict[str, Any]
    ) -> None:
        super().__init__()
        self._cluster = cluster
        self._max_parallel = max_parallel
        self._folder = Path(folder)
        self._dry_run = dry_run
        self._parameters = _plain(parameters)

    def compute_all(self, runs: Sequence[PlannedRun]) -> dict[str, Outcome]:
        """Submits the runs and waits for all of them."""
        submitit = _import("submitit", "slurm")
        if self._dry_run:
            print(_slurm_script(self._folder, self._parameters, len(runs), self._max_parallel))
            return {run.run_id: Outcome(NOT_FINISHED, "dry run: nothing was submitted") for run in runs}
        executor = submitit.AutoExecutor(folder=self._folder, cluster=self._cluster)
        parameters = dict(self._parameters)
        if self._cluster == "slurm":
            parameters["slurm_array_parallelism"] = self._max_parallel
        executor.update_parameters(**parameters)
        if self._cluster == "slurm":
            jobs = executor.map_array(ClusterRun(), runs) if runs else []
            return {run.run_id: self._collect(run, job) for run, job in zip(runs, jobs, strict=True)}
        return self._compute_locally(executor, runs)

    def _compute_locally(self, executor: Any, runs: Sequence[PlannedRun]) -> dict[str, Outcome]:
        """Submitit's local executor starts everything at once: here at most `max_parallel` run at a time."""
        todo, running, outcomes = list(runs), [], {}
        while todo or running:
            while todo and len(running) < self._max_parallel:
                run = todo.pop(0)
                running.append((run, executor.submit(ClusterRun(), run)))
            time.sleep(_POLL_SECONDS)
            for run, job in [pair for pair in running if pair[1].done()]:
                running.remove((run, job))
                outcomes[run.run_id] = self._collect(run, job)
                logger.info("%s: %s", run.run_id, outcomes[run.run_id].status)
        return outcomes

    def _collect(self, run: PlannedRun, job: Any) -> Outcome:
        """Waits for a submitit job."""
        error = job.exception()
        if error is None:
            outcome: Outcome = job.result()
            return outcome
        return self.died(run, f"submitit job {job.job_id} died: {str(error).strip().splitlines()[-1]}")


class RayLauncher(_ClusterLauncher):
    """One Ray task per run, each in its own worker process.

    Args:
        init: arguments of `ray.init`; without an address a cluster of this machine alone.
        remote: arguments of `ray.remote`: num_cpus and num_gpus of a run.
    """

    def __init__(self, init: DictConfig | dict[str, Any], remote: DictConfig | dict[str, Any]) -> None:
        super().__init__()
        self._init = _plain(init)
        self._remote = _plain(remote)

    def compute_all(self, runs: Sequence[PlannedRun]) -> dict[str, Outcome]:
        """Hands the runs to Ray and waits for all of them."""
        ray = _import("ray", "ray")
        ray.init(**{"logging_level": logging.WARNING, "include_dashboard": False, **self._init})
        try:
            # max_calls=1: the worker process ends with its run, or memory figures would carry over.
            task = ray.remote(**{"max_calls": 1, "max_retries": 0, **self._remote})(compute)
            waiting = {task.remote(run): run for run in runs}
            outcomes = {}
            while waiting:
                (reference, *_), _ = ray.wait(list(waiting), num_returns=1)
                run = waiting.pop(reference)
                try:
                    outcomes[run.run_id] = ray.get(reference)
                except ray.exceptions.RayError as error:
                    outcomes[run.run_id] = self.died(run, f"Ray lost the run: {error}")
                logger.info("%s: %s", run.run_id, outcomes[run.run_id].status)
            return outcomes
        finally:
            ray.shutdown()


def _slurm_script(folder: Path, parameters: dict[str, Any], num_runs: int, max_parallel: int) -> str:
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    renamed = SlurmExecutor._equivalence_dict()
    named = {renamed.get(name, name.removeprefix("slurm_")): value for name, value in parameters.items()}
    if "mem" in named and isinstance(named["mem"], int | float):
        named["mem"] = f"{named['mem']}GB"
    return _make_sbatch_string(
        command="srun python -u -m submitit.core._submit " + str(folder),
        folder=folder,
        map_count=num_runs,
        array_parallelism=max_parallel,
        **named,
    )


def _plain(values: DictConfig | dict[str, Any]) -> dict[str, Any]:
    container = OmegaConf.to_container(values, resolve=True) if OmegaConf.is_config(values) else values
    return {str(key): value for key, value in container.items() if value is not None}


def _import(library: str, extra: str) -> Any:
    try:
        return __import__(library)
    except ImportError as error:
        raise ConfigError(
            [f"hydra/launcher needs {library}, which is not installed: pip install 'lora-harness[{extra}]'."]
        ) from error
