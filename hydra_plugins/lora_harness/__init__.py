"""Hydra plug-ins: the sweeper, the launchers, and where sweep files are found.

The modules are imported here because Hydra's scan runs a plug-in's file without putting it into `sys.modules`, unless
it is there already; dataclasses and pickling need it there. The scan runs these files once more all the same, and so
makes their classes a second time: what must exist once lives in modules whose names begin with `_`, which it leaves
out.
"""

from hydra_plugins.lora_harness import clusters, launcher, search_path, sweeper

__all__ = ["clusters", "launcher", "search_path", "sweeper"]
