"""What a run was computed by: versions, commit, machine, device."""

from __future__ import annotations

import functools
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from harness.extensions import load_extensions
from harness.processes.cores import available_cores

RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "hydra-core",
    "wandb",
    "safetensors",
    "scikit-learn",
    "numpy",
    "lora-harness",
)


def environment(
    device: torch.device | str, *, num_threads: int | None = None, cuda: Any = torch.cuda
) -> dict[str, Any]:
    """Where a run runs, JSON-serialisable. What cannot be found out is an absent key.

    Keys: python, platform, hostname, cpu_model, num_cores (that this process may use), num_threads (of torch, unless
    given), device_type, device_name; on CUDA cuda_version, cudnn_version, nvidia_driver; versions (package -> version,
    extensions among them); what `loaded_checkout` gives.
    """
    device_type = torch.device(device).type
    cpu_model = _cpu_model()
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "cpu_model": cpu_model,
        "num_cores": available_cores(),
        "num_threads": torch.get_num_threads() if num_threads is None else num_threads,
        "device_type": device_type,
        "device_name": cpu_model,
    }
    if device_type == "cuda":
        facts |= {
            "device_name": cuda.get_device_name(device),
            "cuda_version": torch.version.cuda,
            "cudnn_version": torch.backends.cudnn.version(),
            "nvidia_driver": _nvidia_driver(),
        }
    facts["versions"] = _package_versions(RECORDED_PACKAGES) | load_extensions()
    facts |= loaded_checkout()
    return {key: value for key, value in facts.items() if value is not None}


def _package_versions(names: Iterable[str]) -> dict[str, str]:
    versions = {name: _version(name) for name in names}
    return {name: version for name, version in versions.items() if version is not None}


@functools.cache  # what was imported stays as it is, and each takes a millisecond
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    if sys.platform == "darwin":
        return _output_of(["sysctl", "-n", "machdep.cpu.brand_string"])
    match = _first_match(Path("/proc/cpuinfo"), r"^model name\s*:\s*(.+)$")
    return match or platform.processor() or None


def _nvidia_driver() -> str | None:
    return _first_match(Path("/proc/driver/nvidia/version"), r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s")


def _first_match(path: Path, pattern: str) -> str | None:
    try:
        match = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return match[1].strip() if match else None


@functools.cache
def loaded_checkout() -> dict[str, Any]:
    """`git_commit` and `git_dirty` (a tracked file differs from it) of the checkout that this code was loaded from.

    As they were when this was first asked: what is edited or committed later is not what this process computes with. A
    fork server asks once it has loaded the code of all its runs, hours before the last of them. `{}` when this file is
    tracked by no checkout or git is missing.
    """
    file = Path(__file__).resolve()
    # An installed copy can lie inside somebody else's repository (.venv in a checkout): only a tracked file is theirs.
    if _git(file.parent, "ls-files", "--error-unmatch", "--", file.name) is None:
        return {}
    # One call gives both: "# branch.oid <commit>" and one line without "#" for each changed file.
    status = _git(file.parent, "status", "--porcelain=v2", "--branch", "--no-ahead-behind", "--untracked-files=no")
    commit = re.search(r"^# branch\.oid ([0-9a-f]{40,64})$", status or "", re.MULTILINE)
    if status is None or commit is None:
        return {}
    return {
        "git_commit": commit[1],
        "git_dirty": any(not line.startswith("#") for line in status.splitlines()),
    }


def _git(directory: Path, *arguments: str) -> str | None:
    # Inside a git hook these point at the repository of the hook, whatever the directory.
    elsewhere = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY"}
    variables = {key: value for key, value in os.environ.items() if key not in elsewhere}
    variables["GIT_OPTIONAL_LOCKS"] = "0"  # reading the status must not disturb a git command that runs beside us
    return _output_of(["git", "-C", str(directory), *arguments], variables=variables)


def _output_of(command: list[str], *, variables: dict[str, str] | None = None) -> str | None:
    """Standard output of `command`, stripped; None when it is missing, fails or takes longer than 5 seconds."""
    try:
        process = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()
