"""Lets `sweeps=NAME` find the files in `sweeps/`, which lies beside `conf/` and not in it."""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

_CHECKOUT = Path(__file__).resolve().parents[2]


class SweepsSearchPath(SearchPathPlugin):
    """Appends the folder that holds `sweeps/`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra when it has set up its own search path."""
        search_path.append("lora-harness", f"file://{_CHECKOUT}")
