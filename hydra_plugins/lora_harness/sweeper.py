"""The default sweeper: a union of grids, every run composed and checked before the first one starts.

    hydra.sweeper.grids:
      - {method: lora, rank: [r1, r8], target_layers: [qv, all]}
      - {method: full, trainer.learning_rate: [1e-4, 2e-4]}

is six runs. Without grids, `-m rank=r1,r4 target_layers=qv` works as under Hydra's own sweeper; with them, an override
on the command line replaces the axis of the same name in every grid that has it.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.config.overrides import came_from_composing, explain_refusal
from harness.config.schema import RunConfig
from harness.config.validation import ConfigError
from harness.content.assets import AssetError
from harness.content.errors import DataError, ModelError
from harness.content.files import base_model, continued_adapter
from harness.content.identity import PlannedRun
from harness.folder import require_writable, run_dir
from harness.results.files import RESULT_FILE
from harness.results.launches import command_line, record_launch
from harness.results.schema import Status, read_result
from harness.results.state import run_state
from hydra_plugins.lora_harness._composing import compose_run
from hydra_plugins.lora_harness._grids import GridError, Overrides, expand

if TYPE_CHECKING:
    from harness.plan import Plan

logger = logging.getLogger("harness")


@dataclass
class GridSweeperConf:
    """Settings under `hydra.sweeper`."""

    _target_: str = "hydra_plugins.lora_harness.sweeper.GridSweeper"
    grids: list[dict[str, Any]] = field(default_factory=list)
    dry_run: bool = False


ConfigStore.instance().store(group="hydra/sweeper", name="lora_harness", node=GridSweeperConf, provider="lora_harness")


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: what makes it, and what it is."""

    overrides: Overrides
    planned: PlannedRun

    @property
    def config(self) -> RunConfig:
        """What it is."""
        return self.planned.config

    @property
    def run_id(self) -> str:
        """Identity of the run."""
        return self.planned.run_id


class GridSweeper(Sweeper):
    """Expands, composes, validates and launches. Raises `ConfigError` with every problem of every run."""

    def __init__(self, grids: Sequence[Any], dry_run: bool) -> None:
        self._grids = OmegaConf.to_container(grids) if OmegaConf.is_config(grids) else list(grids)
        self._dry_run = dry_run
        self.hydra_context: HydraContext | None = None
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra once, before `sweep`."""
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Runs what the grids and the command line's `arguments` name."""
        assert self.config is not None and self.launcher is not None
        runs = self._compose_all(self._expand(arguments))
        plans = _plan_all(runs)
        runs = _merge_equal(runs)
        if self._dry_run:
            show_plan(runs, plans)
            return []
        try:
            for runs_dir in {run.config.runs_dir for run in runs}:
                require_writable(runs_dir)
            _record_launches(runs)
        except OSError as error:
            raise ConfigError([str(error)]) from error
        returns = self.launcher.launch([list(run.overrides) for run in runs], initial_job_idx=0)
        if any(job.status is not JobStatus.COMPLETED for job in returns):
            # Every launcher has said by now which runs these are; what is left to say is the exit code.
            sys.exit(1)
        return returns

    def _expand(self, arguments: list[str]) -> list[Overrides]:
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given: dict[str, list[str]] = {}
        for override in parser.parse_overrides(arguments):
            given[override.get_key_element()] = _values(override)
        try:
            return expand(self._grids, given)
        except GridError as error:
            raise ConfigError([str(error)]) from error

    def _compose_all(self, expanded: list[Overrides]) -> list[SweepRun]:
        assert self.hydra_context is not None and self.config is not None
        runs: list[SweepRun] = []
        problems: dict[str, list[Overrides]] = {}
        for overrides in expanded:
            try:
                runs.append(SweepRun(overrides, compose_run(self.hydra_context, self.config, overrides)))
            except ConfigError as error:
                for problem in error.problems:
                    problems.setdefault(problem, []).append(overrides)
            except (DataError, ModelError, AssetError) as error:
                problems.setdefault(str(error), []).append(overrides)
            except Exception as error:  # Hydra lets whatever an override makes it do come through
                if not isinstance(error, HydraException) and not came_from_composing(error):
                    raise
                explained = explain_refusal(error, overrides, compose=self._compose_part)
                problems.setdefault(explained, []).append(overrides)
        if problems:
            raise ConfigError(_name_runs(problems, len(expanded)))
        return runs

    def _compose_part(self, overrides: list[str]) -> object:
        assert self.hydra_context is not None and self.config is not None
        return self.hydra_context.config_loader.load_sweep_config(self.config, overrides)


def _values(override: Override) -> list[str]:
    if override.is_sweep_override():
        if not override.is_discrete_sweep():
            raise ConfigError([f"{override.input_line}: give a list of values (a,b,c) or range(...)."])
        return [str(value) for value in override.sweep_string_iterator()]
    return [str(override.get_value_element_as_str())]


def _name_runs(problems: dict[str, list[Overrides]], num_runs: int) -> list[str]:
    named = []
    for problem, where in problems.items():
        example = " ".join(where[0])
        named.append(f"{problem} [{len(where)} of {num_runs} runs, the first: {example}]")
    return named


def _plan_all(runs: Sequence[SweepRun]) -> dict[str, Plan]:
    """Resolves every placement on its model's skeleton; by run id, what each run resolves to.

    Raises `ConfigError` naming every rank or projection that a model has not.
    """
    from harness.plan import plan
    from harness.run import USER_ERRORS

    problems: dict[str, list[Overrides]] = {}
    known: dict[str, Plan | str] = {}
    plans: dict[str, Plan] = {}
    for run in runs:
        # Runs that differ in seed, recipe or rows alone share a plan.
        config, dataset = run.config, run.config.dataset
        texts = (dataset.task, dataset.blocks, dataset.attend_across_documents, config.evaluate_also)
        method = (config.method.name, config.method.peft)
        placed = (config.rank, config.target_layers, config.variant, config.trainer.optimizer)
        try:
            starts = (base_model(config), continued_adapter(config))
        except ModelError as error:  # gone since it was composed
            problems.setdefault(str(error), []).append(run.overrides)
            continue
        key = repr((starts, method, placed, texts))
        if key not in known:
            try:
                known[key] = plan(run.config)
            except USER_ERRORS as error:
                known[key] = str(error)
        found = known[key]
        if isinstance(found, str):
            problems.setdefault(found, []).append(run.overrides)
        else:
            plans[run.run_id] = found
    if problems:
        raise ConfigError(_name_runs(problems, len(runs)))
    return plans


def show_plan(runs: Sequence[SweepRun], plans: Mapping[str, Plan]) -> None:
    """Prints what a sweep would run: each run's overrides, its state in the runs folder, its adapter's size."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run")
    table.add_column("state")
    table.add_column("adapter params", justify="right")
    table.add_column("overrides")
    counts: Counter[str] = Counter()
    for run in runs:
        state = run_state(run_dir(run.planned))
        counts[state] += 1
        note = _code_differs(run.planned) if state == Status.FINISHED else ""
        # As Text: rich would take [x] in a file's name for markup.
        overrides = Text(" ".join(run.overrides))
        table.add_row(run.run_id, state + note, f"{plans[run.run_id].num_adapter_params:,}", overrides)
    # Wide enough that nothing is cut off in a file; a terminal wraps.
    console = Console(width=None if sys.stdout.isatty() else 250)
    console.print(table)
    console.print(f"{len(runs)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.items()))


def _code_differs(run: PlannedRun) -> str:
    """Says when a finished run was made by other code or other versions than those here."""
    from harness.measure.environment import environment

    then = read_result(run_dir(run) / RESULT_FILE).environment
    here = environment("cpu")
    what = {"git_commit": "commit", "git_dirty": "uncommitted changes", "versions": "package versions"}
    differing = [words for name, words in what.items() if then.get(name) != here.get(name)]
    return f" (other {', '.join(differing)})" if differing else ""


def _merge_equal(runs: Sequence[SweepRun]) -> list[SweepRun]:
    kept: dict[str, SweepRun] = {}
    for run in runs:
        kept.setdefault(run.run_id, run)
    if len(kept) < len(runs):
        logger.info("%d of %d runs are named more than once and are run once", len(runs) - len(kept), len(runs))
    return list(kept.values())


def _record_launches(runs: Sequence[SweepRun]) -> None:
    """Says which runs a named sweep has: the report needs it, because two sweeps may share a run."""
    by_sweep: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        if run.config.sweep is not None:
            by_sweep.setdefault((run.config.runs_dir, run.config.sweep), []).append(run.run_id)
    for (runs_dir, sweep), run_ids in by_sweep.items():
        record_launch(Path(runs_dir), sweep, run_ids=run_ids, command=command_line())
