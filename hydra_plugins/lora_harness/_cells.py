"""The cells of a sweep whose settings are searched: what `hydra.sweeper.search` says, the overrides of trials and runs.

A cell is what a grid names without its seed. Its trials have the seeds of the search and see val alone; the runs that
are reported have the seeds of the grid, at the values that the trials chose.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from types import UnionType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config.composing import explain_omegaconf
from harness.config.schema import AlphaPolicy, Init, RunConfig
from harness.config.validation import ConfigError
from harness.results.metrics import METRICS, Direction
from harness.results.schema import RunResult, Status
from hydra_plugins.lora_harness._grids import Overrides
from hydra_plugins.lora_harness._search import LEARNING_RATE, WORST, Axis, Budget, Point, Score

# The rank to which the learning rates of conf/method belong.
RANK_OF_PRIOR = 8


@dataclass
class AxisConf:
    """Settings of a setting that is searched, in `hydra.sweeper.search.axis`.

    Attributes:
        prior: where the search begins; null is the value of the config, of a learning rate with the law of its rank.
        factor: the ratio of neighbouring values; null is 3 for learning rates and 2 for others, unless `step` is given.
        step: their difference instead, on a linear scale.
        lowest: no value below it is tried.
        highest: no value above it is tried.
    """

    prior: float | None = None
    factor: float | None = None
    step: float | None = None
    lowest: float | None = None
    highest: float | None = None


@dataclass
class SearchConf:
    """Settings under `hydra.sweeper.search`.

    Attributes:
        axis: the setting that is searched, such as `trainer.learning_rate`; two are a list, and are searched in turn; a
            mapping has the settings of `AxisConf` for each. Null: nothing is searched.
        trials: values that are tried of each axis in every cell.
        max_trials: the most of them, where the best lies at an edge or the first look beside it was no better.
        seeds: the seeds of the trials, which no reported run may have.
    """

    axis: Any = None
    trials: int = 5
    max_trials: int = 6
    seeds: list[int] = field(default_factory=lambda: [1000])


@dataclass(frozen=True)
class SearchPlan:
    """What is searched: the axes by their settings' names, how many values are tried of each, on which seeds."""

    axes: Mapping[str, AxisConf]
    budget: Budget
    seeds: tuple[int, ...]


def read_search(search: SearchConf) -> SearchPlan | None:
    """What `hydra.sweeper.search` says; None where nothing is searched. Raises `ConfigError`."""
    if search.axis is None:
        return None
    where = "hydra.sweeper.search"
    named = {search.axis: {}} if isinstance(search.axis, str) else search.axis
    named = {name: {} for name in named} if isinstance(named, list) else named
    if not isinstance(named, dict) or not named:
        raise ConfigError(
            [f"{where}.axis={search.axis!r}: must be a setting, a list of settings, or a mapping from them to theirs."]
        )
    try:
        typed = {name: OmegaConf.merge(OmegaConf.structured(AxisConf), own or {}) for name, own in named.items()}
    except OmegaConfBaseException as error:
        raise ConfigError([f"{where}.axis: {_explain(error)}"]) from error
    axes = {str(name): typing.cast(AxisConf, OmegaConf.to_object(axis)) for name, axis in typed.items()}
    problems = [problem for name, axis in axes.items() for problem in _axis_problems(name, axis)]
    if len(axes) > 2:
        problems.append(
            f"{where}.axis: {', '.join(axes)}; one or two settings can be searched. For more use a W&B sweep."
        )
    if search.trials < 4:
        problems.append(f"{where}.trials={search.trials}: at least 4, three values and one between them.")
    if search.max_trials < search.trials:
        problems.append(f"{where}.max_trials={search.max_trials}: at least trials={search.trials}.")
    if not search.seeds or len(set(search.seeds)) < len(search.seeds):
        problems.append(f"{where}.seeds={search.seeds}: give one seed or several different ones.")
    if problems:
        raise ConfigError(problems)
    return SearchPlan(axes, Budget(search.trials, search.max_trials), tuple(search.seeds))


def _explain(error: OmegaConfBaseException) -> str:
    if error.object_type is AxisConf and "not in" in str(error):
        return f"{error.full_key}: no such setting. Known here: prior, factor, step, lowest, highest."
    return explain_omegaconf(error)


def _axis_problems(name: str, axis: AxisConf) -> list[str]:
    where = f"hydra.sweeper.search.axis.{name}"
    kind = _type_of(name)
    if name == "seed" or kind not in (int, float):
        return [f"{where}: only settings that are numbers can be searched, such as {LEARNING_RATE} or rank.alpha."]
    problems = []
    if axis.factor is not None and axis.step is not None:
        problems.append(f"{where}: factor={axis.factor} and step={axis.step}; give one of them.")
    if axis.factor is not None and not axis.factor > 1:
        problems.append(f"{where}.factor={axis.factor}: must be above 1.")
    if axis.step is not None and not axis.step > 0:
        problems.append(f"{where}.step={axis.step}: must be above 0.")
    return problems


def _type_of(name: str) -> type | None:
    """The type of a setting by its dotted name, without None; None where there is no such setting."""
    node: Any = RunConfig
    for part in name.split("."):
        if not is_dataclass(node):
            return None
        node = typing.get_type_hints(node).get(part)
        if typing.get_origin(node) in (typing.Union, UnionType):
            node = next(kind for kind in typing.get_args(node) if kind is not type(None))
    return node if isinstance(node, type) else None


@dataclass(frozen=True)
class Cell:
    """What a grid names without its seed, and the axes along which it is searched.

    `name`: those of its overrides that not all cells of the sweep have, for a person.
    """

    overrides: Overrides
    axes: tuple[Axis, ...]
    seeds: tuple[str, ...]
    name: str

    def trial(self, point: Point, seed: int) -> Overrides:
        """The overrides of a trial."""
        # A trial leaves its scores alone.
        own = (f"seed={seed}", "trial=true", "save_weights=false", "save_predictions=false")
        return (*self.overrides, *self._at(point), *own)

    def run(self, point: Point, seed: str) -> Overrides:
        """The overrides of a run that is reported."""
        return (*self.overrides, *self._at(point), f"seed={seed}")

    def _at(self, point: Point) -> Overrides:
        return tuple(f"{axis.name}={axis.text(value)}" for axis, value in zip(self.axes, point, strict=True))

    def shown(self, point: Point) -> str:
        """A point for a person."""
        return ", ".join(self._at(point))


def split_cells(
    expanded: Sequence[Overrides], search: SearchPlan, config_of: Callable[[Overrides], RunConfig]
) -> tuple[list[Overrides], list[Cell]]:
    """The runs of a sweep that are not searched because their grids name the axes, and the cells that are.

    `config_of` composes the config of overrides. Raises `ConfigError`.
    """
    fixed: list[Overrides] = []
    seeds: dict[Overrides, list[str]] = {}
    for overrides in expanded:
        named = {override.partition("=")[0].lstrip("+"): override.partition("=")[2] for override in overrides}
        if set(search.axes) <= set(named):
            fixed.append(overrides)
            continue
        cell = tuple(override for override in overrides if override.partition("=")[0].lstrip("+") != "seed")
        seeds.setdefault(cell, []).append(named.get("seed", ""))
    cells, problems = [], []
    for overrides, given in seeds.items():
        config = config_of(overrides)
        # Without a seed in the grid, that of the config.
        own = tuple(dict.fromkeys(seed or str(config.seed) for seed in given))
        shared = [seed for seed in own if seed in map(str, search.seeds)]
        if shared:
            problems.append(
                f"hydra.sweeper.search.seeds={list(search.seeds)}: seed={shared[0]} is reported as well; a search with "
                "the same seeds would choose by luck that the report then shows. Give other ones."
            )
        if config.model.from_sweep is not None:
            problems.append(
                f"hydra.sweeper.search: model.from_sweep={config.model.from_sweep} continues the run of each seed, and "
                "the seeds of the search have none; search the first sweep, and set hydra.sweeper.search.axis=null "
                "here."
            )
        named_here = {override.partition("=")[0].lstrip("+") for override in overrides}
        axes = []
        for name, conf in search.axes.items():
            if name not in named_here:
                try:
                    axes.append(_axis(name, conf, config))
                except ConfigError as error:
                    problems += error.problems
        name = " ".join(override for override in overrides if not all(override in cell for cell in seeds))
        cells.append(Cell(overrides, tuple(axes), own, name or "the cell"))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return fixed, cells


def _axis(name: str, conf: AxisConf, config: RunConfig) -> Axis:
    start = conf.prior
    if start is None:
        start = prior_rate(config) if name == LEARNING_RATE else _value_of(name, config)
    where = f"hydra.sweeper.search.axis.{name}"
    if start is None or (conf.step is None and not start > 0):
        fix = "give a prior above 0" + (", or a step for a linear scale." if start is not None else ".")
        raise ConfigError([f"{where}: the config's own value is {start}, from which no search can begin; {fix}"])
    is_whole = _type_of(name) is int
    least = 1.0 if is_whole else 0.0
    axis = Axis(
        name,
        start,
        factor=None if conf.step is not None else conf.factor or (3.0 if name.endswith("learning_rate") else 2.0),
        step=conf.step,
        lowest=least if conf.lowest is None else max(least, conf.lowest),
        highest=math.inf if conf.highest is None else conf.highest,
        is_whole=is_whole,
    )
    if not axis.lowest <= start <= axis.highest:
        raise ConfigError([f"{where}: begins at {start:g}, outside of lowest={axis.lowest:g} to {axis.highest:g}."])
    return axis


def _value_of(name: str, config: RunConfig) -> float | None:
    node: Any = config
    for part in name.split("."):
        node = getattr(node, part, None)
    return node


def prior_rate(config: RunConfig) -> float:
    """Where the search for a learning rate begins: the rate of the config, which belongs to rank 8, at its rank.

    With A at random, B zero and a scaling of `rank ** -g`, the best rate is proportional to `rank ** (-(1 - g) / 2)`
    (muA, arXiv 2602.06204): independent of the rank for a fixed alpha (g = 1), `rank ** -1/4` for rsLoRA and
    `rank ** -1/2` for an alpha that is proportional to the rank. With B at random it is independent of the rank.
    """
    rate, rank = config.trainer.learning_rate, config.rank
    if rank is None or config.variant.init is Init.random_b:
        return rate
    decay = {AlphaPolicy.fixed: 1.0, AlphaPolicy.rslora: 0.5, AlphaPolicy.proportional: 0.0}[rank.alpha_policy]
    return rate * (rank.rank / RANK_OF_PRIOR) ** (-(1 - decay) / 2)


def score_of_trials(results: Sequence[RunResult | None], config: RunConfig) -> Score | None:
    """The score of a point from the results of its seeds; None where one is missing or failed by an error.

    The mean over seeds; the worst of all where one diverged or ran out of memory.
    """
    if any(result is None or result.status is Status.FAILED for result in results):
        return None
    best = config.dataset.best_metric
    sign = 1.0 if METRICS[f"val_{best}"].direction is Direction.HIGHER else -1.0
    known = [result for result in results if result is not None and f"val_{best}" in result.metrics]
    if any(result.status is not Status.FINISHED for result in known) or len(known) < len(results):
        return WORST

    def mean(name: str) -> float:
        return math.fsum(result.metrics[name] for result in known) / len(known)

    has_loss = all("val_nll" in result.metrics for result in known)
    return Score(
        sign * mean(f"val_{best}"),
        -mean("val_nll") if has_loss else -math.inf,
        has_learned=all(_has_learned(result.metrics) for result in known),
    )


# Of a classifier that has learned nothing, or has forgotten it: so much of its predictions on val is one class.
_ONE_CLASS = 0.99


def _has_learned(metrics: Mapping[str, float]) -> bool:
    is_above = metrics.get("val_nll", 0.0) > metrics.get("val_nll_before", math.inf)
    return not is_above and metrics.get("val_majority_share", 0.0) <= _ONE_CLASS
