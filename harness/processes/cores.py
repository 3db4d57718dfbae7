"""How many CPU cores this process may use: its affinity, and the quota of the container or job that it runs in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def available_cores(*, root: Path = Path("/")) -> int:
    """Whole cores, at least 1. `root` is where /proc and /sys lie."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([cores, *_quotas(root)])))


def asked_threads() -> int | None:
    """The threads that the environment allows a process (OMP_NUM_THREADS); None where it says nothing."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list has one number per nesting level
    return int(first) if first.isdecimal() and int(first) > 0 else None


def _quotas(root: Path) -> Iterator[float]:
    """The quota in cores of each control group around this process that has one, in both versions of their files."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup/cpu"]
        else:
            continue
        group = Path(path.lstrip("/"))
        for mount in mounts:
            # Inside a container the path may be the host's, and the mount itself the container's group.
            for folder in {mount / group, *(mount / parent for parent in group.parents), mount}:
                yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period")
            )
        if quota != "max" and int(quota) > 0:
            yield int(quota) / int(period)
    except (OSError, ValueError):
        return
