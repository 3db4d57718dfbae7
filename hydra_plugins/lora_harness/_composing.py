"""From the overrides of one run to its validated config, as Hydra composes it.

Hydra takes a fifth of a second for a config, nearly all of it for the files that the choices of groups name. A sweep
has far fewer of those than runs, so what they give is kept. What is composed is what Hydra composes of all overrides
at once; `tests/test_sweeps.py` holds it to that.
"""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from harness.config.composing import from_composed
from harness.config.overrides import require_one_option
from harness.config.schema import RunConfig
from harness.content.identity import PlannedRun, planned

_Choices = tuple[str, ...]
_Content = TypeVar("_Content")


class _Copied(Generic[_Content]):
    """What copies are asked of: `one` is for reading alone.

    From its pickled form a config is copied three times as fast as by `deepcopy`.
    """

    def __init__(self, content: _Content) -> None:
        self.one = content
        self._pickled = pickle.dumps(content, pickle.HIGHEST_PROTOCOL)

    def copy(self) -> _Content:
        copied: _Content = pickle.loads(self._pickled)
        return copied


class _ReadFiles(IConfigRepository):
    """The config files that Hydra finds, each read once: it would read all of them again for every config.

    A sweep whose files are edited while it is composed then is of one version of them.
    """

    def __init__(
        self, delegate: IConfigRepository, read: dict[Any, _Copied[ConfigResult | None]] | None = None
    ) -> None:
        self._delegate = delegate
        self._read: dict[Any, _Copied[ConfigResult | None]] = {} if read is None else read

    def __deepcopy__(self, memo: dict[int, Any]) -> _ReadFiles:
        # Hydra copies it for every config, because a search path in a config may change where it looks.
        return _ReadFiles(copy.deepcopy(self._delegate, memo), self._read)

    def load_config(self, config_path: str) -> ConfigResult | None:
        """A copy, because Hydra merges into what it has loaded."""
        key = (config_path, *((source.provider, source.path) for source in self.get_sources()))
        if key not in self._read:
            self._read[key] = _Copied(self._delegate.load_config(config_path))
        return self._read[key].copy()

    def may_choose_by_interpolation(self) -> bool:
        """Whether a defaults list read so far may name an option by another choice (`- trainer: ${method}`)."""
        return any("${" in repr(file.one.defaults_list) for file in self._read.values() if file.one is not None)

    def get_schema_source(self) -> ConfigSource:
        return self._delegate.get_schema_source()

    def group_exists(self, config_path: str) -> bool:
        return self._delegate.group_exists(config_path)

    def config_exists(self, config_path: str) -> bool:
        return self._delegate.config_exists(config_path)

    def get_group_options(self, group_name: str, results_filter: ObjectType | None = ObjectType.CONFIG) -> list[str]:
        return self._delegate.get_group_options(group_name, results_filter)

    def get_sources(self) -> list[ConfigSource]:
        return self._delegate.get_sources()

    def initialize_sources(self, config_search_path: Any) -> None:
        self._delegate.initialize_sources(config_search_path)


@dataclass
class SweepComposer:
    """Composes the runs of one sweep.

    Attributes:
        master: what Hydra composed of the sweep itself.
        loader: Hydra's, with files that are read once.
        files: those.
    """

    master: DictConfig
    loader: ConfigLoaderImpl
    files: _ReadFiles
    _parsed: dict[str, Override] = field(default_factory=dict)
    _independent: dict[str, bool] = field(default_factory=dict)
    # By the groups of independent choices and by the other choices: by each of the former, a config with it.
    _composed: dict[tuple[frozenset[str], _Choices], dict[str, _Copied[DictConfig]]] = field(default_factory=dict)
    _planned: dict[tuple[str, ...], PlannedRun] = field(default_factory=dict)

    def plan(self, overrides: Sequence[str]) -> PlannedRun:
        """One run, validated, with its identity, both determined once: a launcher asks for what the sweeper planned.

        Files that are edited while a sweep runs do not rename it.
        """
        key = tuple(overrides)
        if key not in self._planned:
            require_one_option(overrides)
            self._planned[key] = planned(from_composed(self.compose(key)))
        return self._planned[key]

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """What Hydra composes of these overrides; raises what it raises."""
        parsed = [self._parse(override) for override in overrides]
        if any(override.is_sweep_override() or override.is_hydra_override() for override in parsed):
            return self.load(overrides)
        values = [override for override in parsed if not self._chooses(override)]
        composed = self._compose_choices([override for override in parsed if override not in values])
        # Hydra's own second half: what it does with values once the files are merged.
        ConfigLoaderImpl._apply_overrides_to_config(values, composed)
        return composed

    def load(self, overrides: Sequence[str]) -> DictConfig:
        """The same, by Hydra alone."""
        composed = self.loader.load_sweep_config(self.master, list(overrides))
        with open_dict(composed):
            del composed["hydra"]
        return composed

    def _parse(self, override: str) -> Override:
        if override not in self._parsed:
            parser = OverridesParser.create(config_loader=self.loader)
            (self._parsed[override],) = parser.parse_overrides([override])
        return self._parsed[override]

    def _chooses(self, override: Override) -> bool:
        """Whether an override chooses the option of a group; Hydra draws the line here."""
        return self.files.group_exists(override.key_or_group) and not isinstance(override.value(), dict)

    def _compose_choices(self, overrides: Sequence[Override]) -> DictConfig:
        """What Hydra composes of choices of groups, from fewer configs than there are combinations of them.

        An independent choice decides what stands under the name of its group, together with choices that are not
        independent, and nothing else. So what n ranks at m placements give is known from n + m - 1 of them.
        """
        choices = tuple(override.input_line or "" for override in overrides)
        counts = Counter(override.key_or_group for override in overrides)
        independent = {
            override.key_or_group: choice
            for override, choice in zip(overrides, choices, strict=True)
            if counts[override.key_or_group] == 1 and self._is_independent(override, choice)
        }
        others = tuple(choice for choice in choices if choice not in independent.values())
        known = self._composed.setdefault((frozenset(independent), others), {})
        wanted = independent or {"": ""}  # where none is, there is one config of the others
        if not known.keys() >= set(wanted.values()):
            loaded = _Copied(self.load(choices))
            # The first config that needs an option may be the first to show that another choice hangs on it.
            if not (independent and self.files.may_choose_by_interpolation()):
                known.update(dict.fromkeys(wanted.values(), loaded) | known)
            return loaded.copy()
        first = known[next(iter(wanted.values()))]
        composed = first.copy()
        for group, choice in independent.items():
            if known[choice] is not first:
                with open_dict(composed):
                    composed[group] = known[choice].one._get_node(group)
        return composed

    def _is_independent(self, override: Override, choice: str) -> bool:
        """Whether a choice changes what is under the name of its group and nothing else.

        So does a file of values of its group: one without a defaults list, in the group's own package.
        """
        if self.files.may_choose_by_interpolation():
            return False
        if choice not in self._independent:
            group, option = override.key_or_group, override.value()
            is_plain = override.type is OverrideType.CHANGE and override.package is None and isinstance(option, str)
            file = self.files.load_config(f"{group}/{option}") if is_plain and "/" not in group else None
            is_free = file is not None and not file.defaults_list and file.header["package"] is None
            self._independent[choice] = is_free
        return self._independent[choice]


# By the id of the master config, which the composer keeps: its id would otherwise be that of a later one.
_composers: dict[int, SweepComposer] = {}


def composer_of(context: HydraContext, master: DictConfig) -> SweepComposer:
    """The composer of a sweep, which its sweeper and its launcher share."""
    if id(master) not in _composers:
        assert isinstance(context.config_loader, ConfigLoaderImpl)
        loader = copy.copy(context.config_loader)
        loader.repository = files = _ReadFiles(loader.repository)
        _composers[id(master)] = SweepComposer(master, loader, files)
    return _composers[id(master)]


def compose_run(context: HydraContext, master: DictConfig, overrides: Sequence[str]) -> PlannedRun:
    """Composes and validates one run of a sweep.

    Raises `ConfigError`, what Hydra raises for a group option or a key that does not exist, `DataError` or
    `ModelError` for content that does not exist.
    """
    return composer_of(context, master).plan(overrides)


def compose_config(context: HydraContext, master: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """Composes and validates one run of a sweep, and opens nothing that it names. Raises as `compose_run` does."""
    return from_composed(composer_of(context, master).compose(overrides))
