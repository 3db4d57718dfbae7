"""Packages of others that add architectures, methods and metrics. No torch.

A distribution names a module under the entry point group `lora_harness`; the module registers its records when it is
imported. In its pyproject.toml:

    [project.entry-points.lora_harness]
    mymodels = "mymodels.records"
"""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points

GROUP = "lora_harness"


class ExtensionError(RuntimeError):
    """An installed extension that cannot be loaded; the message names its distribution and its module."""


@functools.cache
def load_extensions() -> dict[str, str]:
    """Imports the module of every entry point of the group, once per process, in the order of their names.

    Called where a command line or a run's process begins. Returns the version of each distribution that was loaded.
    Raises `ExtensionError`.
    """
    versions = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        try:
            point.load()
        except (Exception, SystemExit) as error:  # whatever somebody else's module raises
            raise ExtensionError(
                f"{_distribution(point)}: its extension {point.name!r} (module {point.value}, entry point group "
                f"{GROUP}) cannot be imported: {type(error).__name__}: {error}. Fix the module or uninstall the "
                "distribution."
            ) from error
        if point.dist is not None:
            versions[point.dist.name] = point.dist.version
    return versions


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"
