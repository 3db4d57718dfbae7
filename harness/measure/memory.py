"""Live tensor bytes: the peak of a training step and what it is made of.

`peak_memory_bytes` (`LiveTensors`, `measure_peak_memory`): bytes of the tensor storages that are alive at once. Exact,
repeatable to the byte, and the same wherever the same operations run. Which ones run depends on the device, on its
fused kernels and on the version of PyTorch. Scratch space inside one kernel, allocator rounding and fragmentation are
not in it; `harness.measure.device` has what the CUDA allocator and the operating system count.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.measure.clock import DeviceQueue


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

    def __init__(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        """Nothing is followed before the `with` statement."""
        super().__init__()
        self.peak = MemoryPeak(0, 0, 0, 0)
        # Collected once: going through the modules at every new peak would take longer than the step itself.
        self._parameters = list(model.parameters())
        self._buffers = [*model.buffers(), *_quantisation_tensors(model)]
        self._optimizers = optimizers
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
        state = [list(optimizer.state.values()) for optimizer in self._optimizers]
        return weights, gradients, _tensors_in(state)

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
            with garbage_collected_before():
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


@dataclass(frozen=True)
class StepSeconds:
    """What a rehearsed step took: its `forward_backward`, and that and the optimizer's step together."""

    forward_backward: float
    whole: float


def time_rehearsed_steps(
    steps: Iterable[Callable[[], object]], model: nn.Module, optimizer: torch.optim.Optimizer, queue: DeviceQueue
) -> list[StepSeconds]:
    """The times of rehearsed steps, each a `forward_backward` and the optimizer's step; leaves no trace.

    Otherwise see `without_side_effects`. The clock stands still while the gradients are zeroed in between.
    """
    found = []
    with without_side_effects(model, optimizer):
        for forward_backward in steps:
            began = queue.mark()
            forward_backward()
            computed = queue.mark()
            _zero_gradients_in_place(model)
            zeroed = queue.mark()
            _step(optimizer)
            ended = queue.mark()  # before anything waits for the device
            passed = queue.seconds(began, computed)
            found.append(StepSeconds(passed, passed + queue.seconds(zeroed, ended)))
    return found


def _rehearse_step(forward_backward: Callable[[], object], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    forward_backward()
    _zero_gradients_in_place(model)
    _step(optimizer)


def _step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _zero_gradients_in_place(model: nn.Module) -> None:
    """Raises `ValueError` where there are none."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    if not gradients:
        raise ValueError(
            "forward_backward left no gradient on any parameter of the model: it must call "
            "loss.backward() and leave optimizer.step() and zero_grad() to measure_peak_memory"
        )
    for gradient in gradients:
        gradient.zero_()


@contextmanager
def without_side_effects(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Rehearses training steps: on leaving, also by an exception, all is as if they had not happened.

    Inside, every learning rate is 0, which makes an optimizer step with zero gradients the identity (weight decay
    included); the gradients must be zeroed by the caller of the step, see `measure_peak_memory`. On leaving, the
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
def garbage_collected_before() -> Iterator[None]:
    """Python's garbage collector runs before and not inside, where it would free and take time at any moment."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
