"""The default sweeper: a union of grids, every run composed and checked before the first one starts.

    hydra.sweeper.grids:
      - {method: lora, rank: [r1, r8], target_layers: [qv, all]}
      - {method: full, trainer.learning_rate: [1e-4, 2e-4]}

is six runs. Without grids, `-m rank=r1,r4 target_layers=qv` works as under Hydra's own sweeper; with them, an override
on the command line replaces the axis of the same name in every grid that has it.

    hydra.sweeper.search.axis: trainer.learning_rate

searches the learning rate inside every cell first (`_search`), in rounds: each is planned from the finished results of
those before it, so that a sweep that was killed, or runs on several machines, makes the same trials.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.config.overrides import came_from_composing, explain_refusal
from harness.config.schema import Device, RunConfig
from harness.config.validation import ConfigError
from harness.content.assets import AssetError
from harness.content.errors import DataError, ModelError
from harness.content.files import base_model, continued_adapter
from harness.content.identity import PlannedRun
from harness.folder import kept_result, require_writable, run_dir
from harness.results.files import RESULT_FILE
from harness.results.launches import SearchedCell, command_line, record_launch
from harness.results.metrics import bytes_text
from harness.results.schema import ResultError, RunResult, Status, read_result
from harness.results.state import run_state
from hydra_plugins.lora_harness._cells import Cell, SearchConf, SearchPlan, read_search, score_of_trials, split_cells
from hydra_plugins.lora_harness._composing import compose_config, compose_run
from hydra_plugins.lora_harness._grids import GridError, Overrides, expand
from hydra_plugins.lora_harness._memory import predict_peaks, unfit
from hydra_plugins.lora_harness._search import Point, Score, Search, search_cell

if TYPE_CHECKING:
    from harness.plan import Plan

logger = logging.getLogger("harness")
Made = TypeVar("Made")
_MEMORY = "memory"  # the dry run that also predicts peaks


@dataclass
class GridSweeperConf:
    """Settings under `hydra.sweeper`."""

    _target_: str = "hydra_plugins.lora_harness.sweeper.GridSweeper"
    grids: list[dict[str, Any]] = field(default_factory=list)
    search: SearchConf = field(default_factory=SearchConf)
    dry_run: Any = False  # true, or memory: with the predicted peak of every run


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


@dataclass(frozen=True)
class Stand:
    """Where the search of a cell stands: its trials by run id, and those among them that ended without a score."""

    cell: Cell
    found: Search
    search: SearchPlan
    trials: tuple[str, ...]
    failed: tuple[str, ...]

    @property
    def wanted(self) -> list[Overrides]:
        """The overrides of the trials that come next, or at the end of the runs that are reported."""
        if self.found.chosen is not None:
            return [self.cell.run(self.found.chosen, seed) for seed in self.cell.seeds]
        return [self.cell.trial(point, seed) for point in self.found.wanted for seed in self.search.seeds]

    @property
    def problem(self) -> str:
        """Why nothing was chosen, when nothing more can be tried; empty where something was."""
        if self.found.chosen is not None:
            return ""
        if self.failed:
            return f"{self.cell.name}: nothing is chosen, because these trials have no score: {', '.join(self.failed)}."
        tried = "; ".join(map(self.cell.shown, self.found.tried))
        return f"{self.cell.name}: nothing is chosen, because no trial finished: {tried}. Give another prior."


@dataclass(frozen=True)
class Round:
    """What is run next: `named` are all runs of the sweep that are known so far, `runs` those not yet handed over."""

    runs: list[SweepRun]
    named: list[SweepRun]
    stands: list[Stand]
    problems: list[str]

    @property
    def newly_chosen(self) -> list[Stand]:
        """The cells whose runs are reported from this round on."""
        now = {run.overrides for run in self.runs}
        return [stand for stand in self.stands if stand.found.chosen is not None and now.intersection(stand.wanted)]


class GridSweeper(Sweeper):
    """Expands, composes, validates and launches. Raises `ConfigError` with every problem of every run."""

    def __init__(self, grids: Sequence[Any], dry_run: Any, search: Any) -> None:
        self._grids = OmegaConf.to_container(grids) if OmegaConf.is_config(grids) else list(grids)
        self._search: SearchConf = OmegaConf.to_object(search) if OmegaConf.is_config(search) else search
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
        if self._dry_run not in (True, False, _MEMORY):
            raise ConfigError([f"hydra.sweeper.dry_run={self._dry_run}: must be true, false or {_MEMORY}."])
        expanded = self._expand(arguments)
        search = read_search(self._search)
        fixed, cells = (expanded, []) if search is None else split_cells(expanded, search, self._compose_config)
        attempted: set[str] = set()
        returns: list[JobReturn] = []
        is_complete = True
        while True:
            found = self._next_round(fixed, cells, search, attempted)
            if self._dry_run:
                plans = _plan_all(found.runs)
                planned = [run.planned for run in found.runs]
                peaks = predict_peaks(planned) if self._dry_run == _MEMORY else None
                show_plan(found.runs, plans, _summary(found.runs, found.stands, found.stands), peaks=peaks)
                _warn_of_unfit(found.runs, plans, peaks or {})
                return []
            if not found.runs:
                break
            _warn_of_unfit(found.runs, _plan_all(found.runs), {})
            self._record(found)
            if cells:
                logger.info("%s", _summary(found.runs, found.stands, found.newly_chosen))
            launched = self.launcher.launch([list(run.overrides) for run in found.runs], initial_job_idx=len(returns))
            returns += launched
            attempted |= {run.run_id for run in found.runs}
            # A trial that diverges is an answer.
            is_complete &= all(
                job.status is JobStatus.COMPLETED
                for job, run in zip(launched, found.runs, strict=True)
                if not run.config.trial
            )
            if search is None:
                break
        for problem in found.problems:
            logger.error("%s", problem)
        if found.problems or not is_complete:
            # Every launcher has said by now which runs these are; what is left to say is the exit code.
            sys.exit(1)
        return returns

    def _next_round(
        self, fixed: Sequence[Overrides], cells: Sequence[Cell], search: SearchPlan | None, attempted: set[str]
    ) -> Round:
        """What is to be run next, from the results that there are; nothing where all is run, or was tried in vain."""
        stands = [self._stand(cell, search, attempted) for cell in cells if search is not None]
        wanted = [*fixed, *(overrides for stand in stands for overrides in stand.wanted)]
        runs = _merge_equal(self._compose_all(wanted))
        todo = [run for run in runs if run.run_id not in attempted]
        problems = [stand.problem for stand in stands if stand.problem] if not todo else []
        return Round(todo, runs, stands, problems)

    def _stand(self, cell: Cell, search: SearchPlan, attempted: set[str]) -> Stand:
        """Where a cell stands, from the results of its trials that count."""
        trials: dict[str, None] = {}
        failed: list[str] = []

        def result_of(run: SweepRun) -> RunResult | None:
            trials.setdefault(run.run_id)
            result = kept_result(run.planned)
            if result is None and run.run_id in attempted:  # `rerun` applies once in a sweep
                with contextlib.suppress(ResultError):
                    result = read_result(run_dir(run.planned) / RESULT_FILE)
                if result is None or result.status is Status.FAILED:
                    failed.append(run.run_id)
            return result

        def score_of(point: Point) -> Score | None:
            runs = self._compose_all([cell.trial(point, seed) for seed in search.seeds])
            return score_of_trials([result_of(run) for run in runs], runs[0].config)

        found = search_cell(cell.axes, search.budget, score_of)
        return Stand(cell, found, search, tuple(trials), tuple(failed))

    def _record(self, found: Round) -> None:
        try:
            for runs_dir in {run.config.runs_dir for run in found.named}:
                require_writable(runs_dir)
            _record_launches(found)
        except OSError as error:
            raise ConfigError([str(error)]) from error

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
        context, master = self.hydra_context, self.config
        return self._collect(expanded, lambda overrides: SweepRun(overrides, compose_run(context, master, overrides)))

    def _compose_config(self, overrides: Overrides) -> RunConfig:
        """The config of overrides; refused like a run of the sweep."""
        assert self.hydra_context is not None and self.config is not None
        context, master = self.hydra_context, self.config
        return self._collect([overrides], lambda overrides: compose_config(context, master, overrides))[0]

    def _collect(self, expanded: list[Overrides], make: Callable[[Overrides], Made]) -> list[Made]:
        """What is made of each run's overrides. Raises `ConfigError` with every problem of all."""
        found: list[Made] = []
        problems: dict[str, list[Overrides]] = {}
        for overrides in expanded:
            try:
                found.append(make(overrides))
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
        return found

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
        key = repr((starts, method, placed, texts, config.tracking))
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


def _summary(todo: Sequence[SweepRun], stands: Sequence[Stand], shown: Sequence[Stand]) -> str:
    """What is searched, how far that is, and what was chosen in the cells `shown`; empty without a search."""
    if not stands:
        return ""
    num_trials = sum(run.config.trial for run in todo)
    current = max((stand.found.num_rounds for stand in stands if not stand.found.is_over), default=0)
    num_axes = max(len(stand.cell.axes) for stand in stands)
    num_chosen = sum(stand.found.chosen is not None for stand in stands)
    names = " and ".join(dict.fromkeys(axis.name for stand in stands for axis in stand.cell.axes))
    lines = [f"search for {names} in {len(stands)} cells, {num_chosen} chosen"]
    if current:
        # Three values, then one after the other: about three rounds an axis.
        lines[0] += f"; round {current} of about {max(current, 3 * num_axes)}: {len(todo)} runs"
        lines[0] += f" ({num_trials} trials, {len(todo) - num_trials} reported)" if num_trials < len(todo) else ""
    for stand in shown:
        if stand.found.chosen is not None:
            edges = "".join(f", at the {side} edge of what was tried" for side in stand.found.edges.values())
            chosen = stand.cell.shown(stand.found.chosen)
            lines.append(f"  {stand.cell.name}: {chosen} of {len(stand.found.tried)} tried{edges}")
    return "\n".join(lines)


def _warn_of_unfit(runs: Sequence[SweepRun], plans: Mapping[str, Plan], peaks: Mapping[str, int | str]) -> None:
    """Says which runs do not fit into the memory of the device; they fail alone, and the others run."""
    from harness.measure.device import device_memory

    todo = [run.planned for run in runs if run_state(run_dir(run.planned)) != Status.FINISHED]
    wants_gpu = {run.config.device for run in todo} <= {Device.auto, Device.cuda}
    for sentence in unfit(todo, plans, peaks, device_memory(wants_gpu=wants_gpu) if todo else None):
        logger.warning("%s", sentence)


def show_plan(
    runs: Sequence[SweepRun],
    plans: Mapping[str, Plan],
    summary: str = "",
    *,
    peaks: Mapping[str, int | str] | None = None,
) -> None:
    """Prints what a sweep would run: each run's overrides, its state in the runs folder, its adapter's size.

    `summary` says how far a search is; `peaks` are predicted bytes by run id, or why they are not known.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("run")
    table.add_column("state")
    table.add_column("adapter params", justify="right")
    if peaks is not None:
        table.add_column("predicted peak", justify="right")
    table.add_column("overrides")
    unknown: dict[str, None] = {}
    counts: Counter[str] = Counter()
    for run in runs:
        state = run_state(run_dir(run.planned))
        counts[state] += 1
        note = _code_differs(run.planned) if state == Status.FINISHED else ""
        # As Text: rich would take [x] in a file's name for markup.
        overrides = Text(" ".join(run.overrides))
        peak = [] if peaks is None else [peaks[run.run_id]]
        unknown |= {each: None for each in peak if isinstance(each, str)}
        shown = [bytes_text(each) if isinstance(each, int) else "not known" for each in peak]
        table.add_row(run.run_id, state + note, f"{plans[run.run_id].num_adapter_params:,}", *shown, overrides)
    # Wide enough that nothing is cut off in a file; a terminal wraps.
    console = Console(width=None if sys.stdout.isatty() else 250)
    console.print(table)
    for reason in unknown:
        console.print(Text(f"not known: {reason}"))
    if summary:
        console.print(Text(summary))
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


def _record_launches(found: Round) -> None:
    """Says which runs a named sweep has: the report needs it, because two sweeps may share a run.

    Of a search also which trials stand behind which runs.
    """
    by_sweep: dict[tuple[str, str], dict[Overrides, str]] = {}
    for run in found.named:
        if run.config.sweep is not None:
            by_sweep.setdefault((run.config.runs_dir, run.config.sweep), {})[run.overrides] = run.run_id
    trials = [run_id for stand in found.stands for run_id in stand.trials]
    for (runs_dir, sweep), run_ids in by_sweep.items():
        searched = [
            SearchedCell(
                axes=[axis.name for axis in stand.cell.axes],
                trials=list(stand.trials),
                runs=[run_ids[overrides] for overrides in stand.wanted if overrides in run_ids]
                if stand.found.chosen is not None
                else None,
                chosen=None if stand.found.chosen is None else list(stand.found.chosen),
                edges=dict(stand.found.edges),
            )
            for stand in found.stands
        ]
        record_launch(
            Path(runs_dir),
            sweep,
            run_ids=list(dict.fromkeys([*trials, *run_ids.values()])),
            command=command_line(),
            searched=searched,
        )
