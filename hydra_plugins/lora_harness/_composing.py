"""From the overrides of one run to its validated config, as Hydra composes it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from harness.config.composing import from_composed
from harness.content.identity import PlannedRun, planned

# A sweeper and its launcher ask for the same runs, and composing one takes a quarter of a second. Its identity is
# determined once as well: files that are edited while a sweep runs do not rename what it planned.
# The master config is kept with what was composed from it: its id would otherwise be that of a later one.
_planned: dict[tuple[int, tuple[str, ...]], tuple[DictConfig, PlannedRun]] = {}
# Which files are merged takes most of that time and follows from the choices of groups, which many runs share.
_chosen: dict[tuple[int, tuple[str, ...]], tuple[DictConfig, DictConfig]] = {}


def compose_run(context: HydraContext, master: DictConfig, overrides: Sequence[str]) -> PlannedRun:
    """Composes and validates one run of a sweep.

    Raises `ConfigError`, what Hydra raises for a group option or a key that does not exist, `DataError` or
    `ModelError` for content that does not exist.
    """
    key = (id(master), tuple(overrides))
    if key not in _planned:
        _planned[key] = master, planned(from_composed(_compose(context, master, list(overrides))))
    return _planned[key][1]


def _compose(context: HydraContext, master: DictConfig, overrides: list[str]) -> DictConfig:
    parsed = OverridesParser.create(config_loader=context.config_loader).parse_overrides(overrides)
    if any(override.is_sweep_override() or override.is_hydra_override() for override in parsed):
        return _load(context, master, overrides)
    values = [override for override in parsed if not _chooses(context, override)]
    choices = tuple(override.input_line or "" for override in parsed if override not in values)
    key = (id(master), choices)
    if key not in _chosen:
        _chosen[key] = master, _load(context, master, list(choices))
    composed = copy.deepcopy(_chosen[key][1])
    # Hydra's own second half: what it does with values once the files are merged.
    ConfigLoaderImpl._apply_overrides_to_config(values, composed)
    return composed


def _load(context: HydraContext, master: DictConfig, overrides: list[str]) -> DictConfig:
    composed = context.config_loader.load_sweep_config(master, overrides)
    with open_dict(composed):
        del composed["hydra"]
    return composed


def _chooses(context: HydraContext, override: Override) -> bool:
    """Whether an override chooses the option of a group; Hydra draws the line here."""
    assert isinstance(context.config_loader, ConfigLoaderImpl)
    is_group = context.config_loader.repository.group_exists(override.key_or_group)
    return is_group and not isinstance(override.value(), dict)
