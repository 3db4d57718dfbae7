"""What the device and the operating system say: allocator peaks, other users of a GPU, resident memory.

* `cuda_peak_allocated_bytes`, `cuda_peak_reserved_bytes` (`device_peaks`): what the CUDA caching allocator handed out
  and what it holds.
* `peak_rss_bytes`: the high-water mark of the process, Python and libraries included; what is prepared once for all
  runs happens in another (`harness.processes.preparation`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MIB = 1024**2

# `mem_get_info` cannot tell our own CUDA context (roughly 300 to 600 MiB, by GPU and driver) from other processes'
# memory, so a limit below that would refuse an idle device.
BUSY_LIMIT_BYTES = 1024 * MIB


class DeviceBusyError(RuntimeError):
    """Other processes use the device, so its peaks and times would not be this run's own."""


def reset_device_peaks(device: torch.device | str, *, cuda: Any = torch.cuda) -> None:
    """Starts a new period for `device_peaks`. Nothing happens unless the device is CUDA.

    The allocator's cache is emptied first: what an earlier period reserved would otherwise count as this one's.
    """
    if torch.device(device).type == "cuda":
        cuda.empty_cache()
        cuda.reset_peak_memory_stats(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # PyTorch's CPU allocator has no exception type.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def device_peaks(device: torch.device | str, *, cuda: Any = torch.cuda) -> dict[str, int]:
    """Peaks of the CUDA caching allocator since `reset_device_peaks`, in bytes; `{}` unless the device is CUDA."""
    if torch.device(device).type != "cuda":
        return {}
    return {
        "cuda_peak_allocated_bytes": int(cuda.max_memory_allocated(device)),
        "cuda_peak_reserved_bytes": int(cuda.max_memory_reserved(device)),
    }


def require_free_device(
    device: torch.device | str, *, limit_bytes: int = BUSY_LIMIT_BYTES, cuda: Any = torch.cuda
) -> None:
    """Raises `DeviceBusyError` when other processes hold more than `limit_bytes` of a CUDA device.

    Memory in use minus what our own allocator reserved; our own CUDA context (300 to 600 MiB) cannot be separated, so
    the limit must leave room for it. Nothing happens unless the device is CUDA.
    """
    if torch.device(device).type != "cuda":
        return
    free_bytes, total_bytes = cuda.mem_get_info(device)
    others_bytes = total_bytes - free_bytes - cuda.memory_reserved(device)
    if others_bytes > limit_bytes:
        raise DeviceBusyError(
            f"device={str(device)!r} ({cuda.get_device_name(device)}): {others_bytes:,} of {total_bytes:,} bytes are "
            f"in use outside this process's allocator, allowed are {limit_bytes:,}; times and memory limits would not "
            "be this run's own. Choose another device with CUDA_VISIBLE_DEVICES, wait until it is free, or set "
            "allow_busy_device=true"
        )


@dataclass(frozen=True)
class DeviceMemory:
    """What a run can have at most: of a GPU all its memory, of a machine what is available now."""

    name: str
    num_bytes: int


def device_memory(*, wants_gpu: bool, root: Path = Path("/")) -> DeviceMemory | None:
    """The memory of the device that runs get: of the smallest GPU that is visible, or else of the machine.

    None where neither says. No CUDA context is made, which would count as another user of the GPU.

    Args:
        wants_gpu: whether runs take a GPU where there is one.
        root: where /proc and /sys lie.
    """
    if wants_gpu and torch.cuda.device_count() > 0:
        totals = _gpu_totals()
        return None if not totals else DeviceMemory("the smallest GPU" if len(totals) > 1 else "the GPU", min(totals))
    available = _available_bytes(root)
    return None if available is None else DeviceMemory("this machine", available)


def free_bytes(device: torch.device, *, cuda: Any = torch.cuda, root: Path = Path("/")) -> int | None:
    """What this process can still take of a device at present; None where that is not known.

    Of a GPU also what its allocator holds and has no tensor in; no other device than a GPU or the CPU says.
    """
    if device.type == "cuda":
        return int(cuda.mem_get_info(device)[0]) + cuda.memory_reserved(device) - cuda.memory_allocated(device)
    return _available_bytes(root) if device.type == "cpu" else None


def _gpu_totals() -> list[int]:
    """Bytes of each visible GPU; none where the driver's tool is not there."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    only = [f"--id={visible}"] if visible else []
    command = ["nvidia-smi", *only, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) * MIB for line in shown.split() if line.isdecimal()]


def _available_bytes(root: Path) -> int | None:
    """Of the machine, and of the container where that has less."""
    try:
        match = re.search(r"^MemAvailable:\s*(\d+) kB$", (root / "proc/meminfo").read_text("utf-8"), re.MULTILINE)
    except OSError:
        return None
    if match is None:
        return None
    available = int(match[1]) * 1024
    group = root / "sys/fs/cgroup"
    try:
        limit, used = (int((group / f"memory.{name}").read_text("utf-8")) for name in ("max", "current"))
    except (OSError, ValueError):  # no control group, or one without a limit ("max")
        return available
    return max(0, min(available, limit - used))


def peak_rss_bytes() -> int:
    """Largest resident set size of this process so far, in bytes."""
    # On Linux ru_maxrss survives exec: a child starts with the peak of the launcher that spawned it. VmHWM does not.
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        status = ""
    if match := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
        return int(match[1]) * 1024
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
