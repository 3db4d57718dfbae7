"""Floating-point tensors without data: a training step of any size, run for its shapes alone.

Inside `floats_without_data` every operation on floating-point tensors gives a fake tensor (PyTorch's `FakeTensorMode`),
which has a shape, a type, a device and a storage of so many bytes, and no memory. What is computed with integers and
booleans alone is computed: ids, masks and positions are small, and code that looks at their values (whether a batch has
padding, which positions are targets) takes the same path as in training. So the same kernels are chosen, attention's
included, and what is followed by `harness.measure.memory` is what training would have.

Learned from the values of floating-point tensors is nothing: code that asks for one raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
# Without a type they make integers of integers, and their end decides.
_RANGES = (_aten.arange.default, _aten.arange.start, _aten.arange.start_step)


@contextmanager
def floats_without_data() -> Iterator[None]:
    """Inside, what is made of floating-point numbers has no data, and what is made of integers has.

    Tensors from outside may be used; those of floating-point numbers among them should be few, because each stays.
    The random state is afterwards what it was.
    """
    # Integers that meet a tensor without data are taken as they are.
    with (
        torch.random.fork_rng(devices=[]),
        # PyTorch would swap a fake parameter for its copy, which what follows tensors forbids.
        mock.patch.object(nn.Module, "_apply", _apply),
        FakeTensorMode(allow_non_fake_inputs=True),
        _RealIntegers(),
    ):
        yield


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What `Module.to` and the like do: a tensor that `fn` returns as it is stays, another one takes its place."""
    for module in self.modules() if recurse else (self,):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    made = fn(parameter)
                if made is not parameter:
                    module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return self


class _RealIntegers(TorchDispatchMode):
    """Computes what has no fake tensor among its operands, and says how much a real mask chooses of a fake tensor."""

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if tensors or _makes_integers(func, args, kwargs):
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
        elif func is _aten.index.Tensor and any(_is_mask(index) for index in args[1]):
            return func(args[0], [each for index in args[1] for each in _positions(index)])
        return func(*args, **kwargs)


def _makes_integers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    if dtype is None:
        return func in _RANGES and all(isinstance(arg, int) for arg in args)
    return not (dtype.is_floating_point or dtype.is_complex)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype is torch.bool and not isinstance(index, FakeTensor)


def _positions(index: Tensor | None) -> list[Tensor | None]:
    """What chooses the same as an index and has a length that is known: of a mask, where it holds."""
    if index is None or not _is_mask(index):
        return [index]
    with unset_fake_temporarily():
        return list(index.nonzero(as_tuple=True))
