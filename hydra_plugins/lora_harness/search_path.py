"""Where Hydra looks for configs: own folders first, then ours; sweep files lie beside `conf/` and not in it."""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.search_path_plugin import SearchPathPlugin

from harness.config.folders import SWEEPS_DIR, own_folders

GROUP = "sweeps"


class SweepFiles(FileConfigSource):
    """The group `sweeps` of a folder, and nothing else of it.

    As an ordinary source the folder would make everything in it a config group: of a checkout the virtual environment,
    of a project all its runs, and `--help` would walk through them for minutes.
    """

    @staticmethod
    def scheme() -> str:
        """What marks such a folder in Hydra's search path: `sweeps:///a/folder`."""
        return GROUP

    def is_group(self, config_path: str) -> bool:
        """Whether there are options below a name."""
        return (config_path == "" or _is_in_group(config_path)) and super().is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        """Whether a name is a sweep file."""
        return _is_in_group(config_path) and super().is_config(config_path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> Any:
        """The names below a name."""
        names = super().list(config_path, results_filter)
        return names if config_path else [name for name in names if name == GROUP]


def _is_in_group(config_path: str) -> bool:
    return config_path.partition("/")[0] == GROUP


class ConfigFolders(SearchPathPlugin):
    """Adds the folders that hold configs beside `CONF_DIR`, which the command line names itself."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra when it has set up its own search path."""
        own = own_folders()
        if own.conf_dir is not None:
            search_path.prepend("own", f"file://{own.conf_dir}", anchor="main")
        if own.sweeps_dir is not None:
            search_path.prepend("own", f"{GROUP}://{own.sweeps_dir.parent}", anchor="main")
        search_path.append("lora-harness", f"{GROUP}://{SWEEPS_DIR.parent}")
