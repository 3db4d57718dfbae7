"""From the overrides of one run to its validated config, as Hydra composes it."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from harness.config.composing import from_composed
from harness.content.identity import PlannedRun, planned

# Composing takes a good tenth of a second, and a sweeper and its launcher ask for the same runs.
# Its identity is determined once as well: files that are edited while a sweep runs do not rename what it planned.
_composed: dict[tuple[int, tuple[str, ...]], PlannedRun] = {}


def compose_run(context: HydraContext, master: DictConfig, overrides: Sequence[str]) -> PlannedRun:
    """Composes and validates one run of a sweep.

    Raises `ConfigError`, what Hydra raises for a group option or a key that does not exist, `DataError` or
    `ModelError` for content that does not exist.
    """
    key = (id(master), tuple(overrides))
    if key not in _composed:
        composed = context.config_loader.load_sweep_config(master, list(overrides))
        with open_dict(composed):
            del composed["hydra"]
        _composed[key] = planned(from_composed(composed))
    return _composed[key]
