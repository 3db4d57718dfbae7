"""From the overrides of one run to its validated config, as Hydra composes it."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from harness.config import RunConfig, from_composed

# Composing takes a good tenth of a second, and a sweeper and its launcher ask for the same runs.
_composed: dict[tuple[int, tuple[str, ...]], RunConfig] = {}


def compose_run(context: HydraContext, master: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """Composes and validates one run of a sweep.

    Raises `ConfigError`, or what Hydra raises for a group option or a key that does not exist.
    """
    key = (id(master), tuple(overrides))
    if key not in _composed:
        composed = context.config_loader.load_sweep_config(master, list(overrides))
        with open_dict(composed):
            del composed["hydra"]
        _composed[key] = from_composed(composed)
    return _composed[key]
