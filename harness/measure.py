"""The measuring instruments: live-tensor peak memory and its breakdown, clocks, CUDA allocator peaks, environment.

Four kinds of memory appear in a result, and each name says which one it is:

* `peak_memory_bytes` (`LiveTensors`, `measure_peak_memory`): bytes of the tensor storages that are alive at once.
  Exact, repeatable to the byte, and the same wherever the same operations run. Which ones run depends on the device, on
  its fused kernels and on the version of PyTorch. Scratch space inside one kernel, allocator rounding and fragmentation
  are not in it.
* `cuda_peak_allocated_bytes`, `cuda_peak_reserved_bytes` (`device_peaks`): what the CUDA caching allocator handed out
  and what it holds.
* `peak_rss_bytes`: the high-water mark of the process, Python and libraries included; what is prepared once for all
  runs happens in another (`harness.preparation`).
"""

from __future__ import annotations

import gc
import os
import platform
import re
import socket
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.cores import available_cores

MIB = 1024**2

# `mem_get_info` cannot tell our own CUDA context (roughly 300 to 600 MiB, by GPU and driver) from other processes'
# memory, so a limit below that would refuse an idle device.
BUSY_LIMIT_BYTES = 1024 * MIB

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


# --- live-tensor peak memory ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPeak:
    """What was alive at the moment of the peak, in bytes; every storage is counted once.

    weights: parameters and buffers of the model. gradients: what hung on `.grad` of a parameter at that moment.
    optimizer: the tensors in `optimizer.state`. activations: all the rest (saved activations, temporaries, the batch).
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int

    @property
    def total_bytes(self) -> int:
        """The peak itself: the sum of the four parts."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes

    def as_metrics(self) -> dict[str, int]:
        """The peak and its parts under the names of the METRICS registry, in bytes."""
        return {
            "peak_memory_bytes": self.total_bytes,
            "weights_bytes": self.weights_bytes,
            "gradients_bytes": self.gradients_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "activations_bytes": self.activations_bytes,
        }


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested lists, tuples and dict values."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)


def _storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    if tensor.layout is not torch.strided:
        raise NotImplementedError(
            f"live tensor bytes: got a tensor of layout {tensor.layout}, must be torch.strided, because only those "
            "have one storage to count; switch sparse gradients off (nn.Embedding(sparse=False)) or do not measure"
        )
    return tensor.untyped_storage()


class LiveTensors(TorchDispatchMode):
    """Follows the storage of every tensor that an operation touches; `peak` says how much was alive at once, and what.

        with LiveTensors(model, optimizer) as live:
            step()
        live.peak.total_bytes

    Counted from the start: parameters, buffers, gradients and optimizer state that exist on entry, touched or not; the
    scales of quantised weights are weights.
    Counted from the first touch until the storage dies: everything else on the devices of the model, inputs included.
    So a tensor that was alive before and is touched late (the labels) is missed by an earlier peak of the first step,
    and is in the count from the second step on. Copies on other devices (a batch on the host) are not counted.

    The storage is the unit: views, in-place operations and tied weights add nothing. Sizes are read after each
    operation, when its inputs and outputs coexist; scratch space inside a kernel is invisible here. Fake tensors work
    the same way: enter the `FakeTensorMode` first.

    Raises `NotImplementedError` on touching a tensor that is not strided (sparse, mkldnn).
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Nothing is followed before the `with` statement."""
        super().__init__()
        self.peak = MemoryPeak(0, 0, 0, 0)
        # Collected once: going through the modules at every new peak would take longer than the step itself.
        self._parameters = list(model.parameters())
        self._buffers = [*model.buffers(), *_quantisation_tensors(model)]
        self._optimizer = optimizer
        self._devices = _devices_of(model)
        # id(storage) -> (weak reference, bytes). PyTorch keeps the Python object of a storage as long as the storage
        # itself lives, so the id is stable and the reference dies with the memory.
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._live_bytes = 0
        self._peak_bytes = 0

    def __enter__(self) -> LiveTensors:
        """Starts with what the model and the optimizer hold now."""
        for group in self._owned():
            for tensor in group:
                self._follow(tensor)
        self._note_peak()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Stops following; `peak` stays."""
        super().__exit__(*exception)
        self._live.clear()  # the callbacks refer to self, and that cycle would keep the model alive until collected
        self._live_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation, then books what it was given and what it returned."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in _tensors_in((args, kwargs, result)):
            self._follow(tensor)
        self._note_peak()
        return result

    def _follow(self, tensor: torch.Tensor) -> None:
        if tensor.device not in self._devices:
            return
        storage = _storage_of(tensor)
        key, num_bytes = id(storage), storage.nbytes()
        known = self._live.get(key)
        if known is None:
            self._live[key] = (weakref.ref(storage, partial(self._forget, key)), num_bytes)
            self._live_bytes += num_bytes
        elif known[1] != num_bytes:  # resized in place
            self._live[key] = (known[0], num_bytes)
            self._live_bytes += num_bytes - known[1]

    def _forget(self, key: int, _: weakref.ref[torch.UntypedStorage]) -> None:
        self._live_bytes -= self._live.pop(key)[1]

    def _owned(self) -> tuple[Iterable[torch.Tensor], Iterable[torch.Tensor], Iterable[torch.Tensor]]:
        """Weights, gradients and optimizer state as they are now; whatever is alive besides is activations."""
        weights = [*self._parameters, *self._buffers]
        gradients = [weight.grad for weight in self._parameters if weight.grad is not None]
        return weights, gradients, _tensors_in(list(self._optimizer.state.values()))

    def _note_peak(self) -> None:
        # Gradients and optimizer state come and go, so the parts are worked out at each new peak, and only then.
        if self._live_bytes <= self._peak_bytes:
            return
        self._peak_bytes = self._live_bytes
        counted: set[int] = set()
        owned_bytes = []
        for group in self._owned():
            keys = {id(_storage_of(tensor)) for tensor in group} & self._live.keys()
            owned_bytes.append(sum(self._live[key][1] for key in keys - counted))
            counted |= keys
        weights_bytes, gradients_bytes, optimizer_bytes = owned_bytes
        self.peak = MemoryPeak(
            weights_bytes, gradients_bytes, optimizer_bytes, activations_bytes=self._live_bytes - sum(owned_bytes)
        )


def _quantisation_tensors(model: nn.Module) -> list[torch.Tensor]:
    """By what bitsandbytes reads quantised weights: scales and tables, which are neither parameters nor buffers."""
    found = []
    for module in model.modules():
        # Of int8, the scales move from the weight to the module's state at the first forward.
        for holder in (*module.parameters(recurse=False), getattr(module, "state", None)):
            found += [getattr(holder, name, None) for name in ("CB", "SCB")]
            state = getattr(holder, "quant_state", None)
            while state is not None:  # scales may be quantised themselves
                found += [state.absmax, state.code, state.offset]
                state = state.state2
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def _devices_of(model: nn.Module) -> set[torch.device]:
    return {tensor.device for tensor in (*model.parameters(), *model.buffers())}


def measure_peak_memory(
    forward_backward: Callable[[], object],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    first: Callable[[], object] | None = None,
    num_steps: int = 2,
) -> MemoryPeak:
    """Peak live tensor bytes of a training step, measured before training and leaving no trace.

    Runs `num_steps` steps: `forward_backward()`, `optimizer.step()`, `optimizer.zero_grad(set_to_none=True)`. The
    optimizer creates its state in the first one, so the second has the real peak; `first`, a `forward_backward` over
    very little data, makes that first step a short one. `forward_backward` does all micro-batches of one step and the
    clipping, where there is any; it leaves gradients on the parameters and calls neither the optimizer nor a scheduler.

    The optimizer is called here and not by `forward_backward`, because a learning rate of 0 alone does not protect the
    weights: 0 * nan is nan. So the gradients are overwritten with zeros in place before each optimizer step: the same
    storages are alive, and the step is then exactly the identity. Everything else: see `without_side_effects`.

    Garbage is collected before each step and not during it: when the collector happens to run would otherwise decide
    when tensors in reference cycles die, and the figure would not repeat.

    Raises `ValueError` for `num_steps` below 1, when `forward_backward` leaves no gradient, and for a model or an
    optimizer that training has already touched.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps!r}: must be at least 1; 2 sees the optimizer state as well")
    with without_side_effects(model, optimizer), LiveTensors(model, optimizer) as live:
        for number in range(num_steps):
            with _garbage_collected_before():
                step = first if number == 0 and first is not None else forward_backward
                _rehearse_step(step, model, optimizer)
    return live.peak


def rehearse_beside_optimizer(
    rehearsal: Callable[[], object],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    first: Callable[[], object],
) -> None:
    """Does something once with the optimizer's state in memory, as it will be during training; leaves no trace.

    `first` is a `forward_backward` over very little data, as in `measure_peak_memory`: it lets the optimizer create its
    state. Otherwise see `without_side_effects`.
    """
    with without_side_effects(model, optimizer):
        _rehearse_step(first, model, optimizer)
        rehearsal()


def _rehearse_step(forward_backward: Callable[[], object], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    forward_backward()
    if _zero_gradients_in_place(model) == 0:
        raise ValueError(
            "forward_backward left no gradient on any parameter of the model: it must call "
            "loss.backward() and leave optimizer.step() and zero_grad() to measure_peak_memory"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _zero_gradients_in_place(model: nn.Module) -> int:
    """Returns how many gradients there were."""
    num_gradients = 0
    for weight in model.parameters():
        if weight.grad is not None:
            weight.grad.zero_()
            num_gradients += 1
    return num_gradients


@contextmanager
def without_side_effects(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Rehearses training steps: on leaving, also by an exception, all is as if they had not happened.

    Inside, every learning rate is 0, which makes an optimizer step with zero gradients the identity (weight decay
    included); the gradients must be zeroed by whoever calls the step, see `measure_peak_memory`. On leaving, the
    parameter groups and the buffers are restored, the optimizer's state is emptied, gradients are None, and the random
    state (CPU, and CUDA or MPS where the model is) is what it was.

    Raises `ValueError` when the optimizer already has state or the model already has gradients: they would be lost.
    """
    if optimizer.state:
        raise ValueError(
            f"optimizer.state: has entries for {len(optimizer.state)} parameters, must be empty, because it is emptied "
            "on leaving; measure before the first step and before loading a checkpoint, or pass a fresh optimizer"
        )
    num_gradients = sum(weight.grad is not None for weight in model.parameters())
    if num_gradients:
        raise ValueError(
            f"gradients: {num_gradients} parameters of the model have one, none may, because they are dropped on "
            "leaving; call optimizer.zero_grad(set_to_none=True) first"
        )
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    # Buffers are small, so a copy is the simple way; it stays uncounted, because no operation touches it in between.
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    with _random_state_kept(_devices_of(model)):
        try:
            for group in optimizer.param_groups:
                rate = group["lr"]
                group["lr"] = torch.zeros_like(rate) if isinstance(rate, torch.Tensor) else 0.0
            yield
        finally:
            for group, saved in zip(optimizer.param_groups, groups, strict=True):
                group.update(saved)
            optimizer.state.clear()
            for weight in model.parameters():
                weight.grad = None
            with torch.no_grad():
                for module, name, buffer, saved_buffer in buffers:
                    setattr(module, name, buffer)
                    buffer.copy_(saved_buffer)


@contextmanager
def _random_state_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    cuda_indices = [device.index for device in devices if device.type == "cuda"] if torch.cuda.is_available() else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda_indices))
        if any(device.type == "mps" for device in devices):  # fork_rng wants per-device states, which MPS lacks
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        yield


@contextmanager
def _garbage_collected_before() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# --- clocks -----------------------------------------------------------------------------------------------------------


class DeviceQueue(Protocol):
    """How the time of a device is taken. Work is queued: on CUDA a launch returns before its kernel has run."""

    lag: int
    """Steps whose numbers stay unread while the next one is queued, so that the device never waits for the host."""

    def mark(self) -> Any:
        """Puts a point in time behind the work that is queued."""
        ...

    def fetch(self, values: Tensor) -> Tensor:
        """Starts a copy to the host; it can be read when a later mark was reached."""
        ...

    def seconds(self, began: Any, ended: Any) -> float:
        """Waits until the device has reached `ended`; the seconds between the two marks."""
        ...


class HostQueue:
    """CPU and MPS: wait for the device, then read the host's clock."""

    lag = 0

    def __init__(self, synchronize: Callable[[], None], *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._synchronize = synchronize
        self._clock = clock

    def mark(self) -> float:
        """The time at which all queued work is done."""
        self._synchronize()
        return self._clock()

    def fetch(self, values: Tensor) -> Tensor:
        """The copy itself."""
        return values.cpu()

    def seconds(self, began: float, ended: float) -> float:
        """Both are in the past."""
        return ended - began


class CudaQueue:
    """Events in the queue of a CUDA device, and copies into pinned memory: nothing waits before the step after next."""

    lag = 1

    def __init__(self, device: torch.device, *, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda

    def mark(self) -> Any:
        """A timed event."""
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self._device))
        return event

    def fetch(self, values: Tensor) -> Tensor:
        """Copies beside the host."""
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

    def seconds(self, began: Any, ended: Any) -> float:
        """By the device's own clock."""
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3  # it says milliseconds


def device_queue(device: torch.device) -> DeviceQueue:
    """How to take the time of a device. Raises `ValueError` for one of another type than cpu, cuda or mps."""
    match device.type:
        case "cpu":
            return HostQueue(lambda: None)
        case "cuda":
            return CudaQueue(device)
        case "mps":
            return HostQueue(torch.mps.synchronize)
    raise ValueError(f"device={str(device)!r}: its clock is not known; must be of type cpu, cuda or mps")


Note = TypeVar("Note")


@dataclass(frozen=True)
class MeteredStep(Generic[Note]):
    """A step that the device has finished. `note` is what its `end` was given."""

    seconds: float
    values: list[float]
    note: Note


class StepMeter(Generic[Note]):
    """Seconds of each step, and the few numbers that it left on the device, read without holding the device up.

        meter.begin()
        loss = step()
        meter.end(loss, note)
        for step in meter.finished():
            step.seconds, step.values, step.note

    What happens between `end` and the next `begin` is in no step's seconds: collation, evaluation, checkpoints. On
    CUDA `finished` stays one step behind, unless `behind=False` asks for all of them: the queue of the device then
    never runs empty because a number is read, and the host never runs more than one step ahead.
    """

    def __init__(self, queue: DeviceQueue) -> None:
        self._queue = queue
        self._began: Any = None
        self._open: deque[tuple[Any, Any, Tensor, Note]] = deque()

    def begin(self) -> None:
        """Lets time count."""
        self._began = self._queue.mark()

    def end(self, values: Tensor, note: Note) -> None:
        """Ends the step. `values` has one dimension. Raises `RuntimeError` without a `begin`."""
        if self._began is None:
            raise RuntimeError("StepMeter.end: no step is open; call begin() first")
        fetched = self._queue.fetch(values)
        self._open.append((self._began, self._queue.mark(), fetched, note))
        self._began = None

    def finished(self, *, behind: bool = True) -> Iterator[MeteredStep[Note]]:
        """The steps that were not handed out yet, in order: all but those in the queue, or all, waiting for them."""
        while len(self._open) > (self._queue.lag if behind else 0):
            began, ended, values, note = self._open.popleft()
            seconds = self._queue.seconds(began, ended)
            yield MeteredStep(seconds, values.tolist(), note)


# --- allocator and process peaks --------------------------------------------------------------------------------------


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
    # PyTorch's CPU allocator has no exception of its own.
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

    Memory in use minus what our own allocator reserved; our own CUDA context (300 to 600 MiB) cannot be told apart, so
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


# --- environment ------------------------------------------------------------------------------------------------------


def environment(
    device: torch.device | str, *, num_threads: int | None = None, cuda: Any = torch.cuda
) -> dict[str, Any]:
    """Where a run runs, JSON-serialisable. What cannot be found out is an absent key.

    Keys: python, platform, hostname, cpu_model, num_cores (that this process may use), num_threads (of torch, unless
    given), device_type, device_name; on CUDA cuda_version, cudnn_version, nvidia_driver; versions (package -> version);
    git_commit and git_dirty (a tracked file differs from the commit), if this file belongs to a git checkout.
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
    facts["versions"] = _package_versions(RECORDED_PACKAGES)
    facts |= _checkout_state(Path(__file__).resolve())
    return {key: value for key, value in facts.items() if value is not None}


def _package_versions(names: Iterable[str]) -> dict[str, str]:
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


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


def _checkout_state(file: Path) -> dict[str, Any]:
    """`git_commit` and `git_dirty` of the checkout that tracks `file`; `{}` when none does or git is missing."""
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
