"""The run that a forecast is asked for: the overrides of `python -m harness`, composed and validated like there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from hydra.errors import HydraException

from harness.config.composing import compose, from_composed, register
from harness.config.folders import OwnFolders, find_own, options_of, use_own
from harness.config.overrides import came_from_composing, explain_refusal, literal_texts, require_one_option
from harness.config.schema import RunConfig, Task
from harness.config.validation import ConfigError


class ForecastError(ValueError):
    """What cannot be forecast, one sentence a line; the message names the setting, the value and the fix."""


class OptionError(ForecastError):
    """An option of the command that would say nothing of this run, wherever its adapters are."""


class UnmetError(ForecastError):
    """A budget that nothing meets; the message has the nearest below and above."""


@contextmanager
def explained() -> Iterator[None]:
    """Turns what is raised at a run that cannot be built into a `ForecastError` with the same message."""
    try:
        yield
    except ForecastError:
        raise
    except Exception as error:
        from harness.run import USER_ERRORS  # with all of PyTorch, which a wrong override does not wait for

        if not isinstance(error, USER_ERRORS):
            raise
        raise ForecastError(str(error)) from error


@contextmanager
def own_configs(config_dir: str | None) -> Iterator[None]:
    """Inside, own configs are found as `python -m harness` finds them. Raises `ForecastError`."""
    with explained():
        use_own(find_own([] if config_dir is None else ["--config-dir", config_dir]))
    register()
    try:
        yield
    finally:
        use_own(OwnFolders())


def read_config(overrides: Sequence[str]) -> RunConfig:
    """The validated config of one run, inside `own_configs`. Raises `ForecastError`, one line a problem."""
    for word in overrides:
        key = word.partition("=")[0]
        if "=" not in word and not word.startswith("~"):
            raise ForecastError(f"{word}: is no override; write setting=value, as in rank=r8 target_layers=qv.")
        if key == "sweeps" or key.startswith("hydra"):
            raise ForecastError(
                f"{word}: a forecast is of one run; of a sweep, python -m harness -m sweeps=NAME "
                "hydra.sweeper.dry_run=true shows every run."
            )
    words = literal_texts(overrides, multirun=False)
    try:
        require_one_option(words)
        return from_composed(compose(words))
    except ConfigError as error:
        raise ForecastError(str(error)) from error
    except Exception as error:  # Hydra lets whatever an override makes it do come through
        if not isinstance(error, HydraException) and not came_from_composing(error):
            raise
        raise ForecastError(explain_refusal(error, words, compose=compose)) from error


def of_its_task(config: RunConfig, option: str, asked: int | None, default: int, *, of_language: bool) -> int:
    """What an option of the command gives where it is of tasks like this run's, or its default where it was not given.

    Raises `OptionError` for one that was given and would say nothing of this run.
    """
    task = config.dataset.task
    if asked is not None and (task.is_language != of_language or task is Task.regression):
        why = "decodes no tokens" if of_language else "has no task head" if task.is_language else "has one output"
        raise OptionError(
            f"{option} {asked}: a run of task {task} (dataset={config.dataset.name}) {why}; leave it out."
        )
    return default if asked is None else asked


def without(overrides: Iterable[str], *settings: str) -> list[str]:
    """The overrides but those of some settings.

    >>> without(["rank=r8", "rank.rank=3", "seed=1"], "rank.rank", "rank.pattern")
    ['rank=r8', 'seed=1']
    """
    return [word for word in overrides if word.partition("=")[0].lstrip("+~") not in settings]


def names(overrides: Iterable[str], group: str) -> bool:
    """Whether an option of a group is chosen among the overrides."""
    return any(word.partition("=")[0].lstrip("+~") == group for word in overrides)


def placements() -> list[str]:
    """The presets of `target_layers`, own ones among them."""
    return options_of("target_layers")
