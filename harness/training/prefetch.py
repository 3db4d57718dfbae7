"""Batches collated on the host while the device computes the step before them.

On CUDA a thread collates into pinned memory, from which copies to the device run beside the host. On the CPU a thread
would compete with the step for the cores, so batches are collated between the steps there; either way the trainer's
clock stands still while it waits for a batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from harness.data.batches import Batch

T = TypeVar("T")

# Two steps ahead: one that waits for the loop, one that is being collated.
_DEPTH = 2


def prefetched(steps: Iterator[list[Batch]], device: torch.device) -> AbstractContextManager[Iterator[list[Batch]]]:
    """The same steps in the same order, collated ahead where the device is CUDA."""
    if device.type != "cuda":
        return nullcontext(steps)
    pinned = ([_pin(batch) for batch in micro_batches] for micro_batches in steps)
    # A new thread would otherwise pin through the first device, whichever this process computes on. A device without
    # a number, which is what accelerate gives a single process, is the one that this thread computes on.
    index = torch.cuda.current_device() if device.index is None else device.index
    return ahead(pinned, initializer=partial(torch.cuda.set_device, index))


@contextmanager
def ahead(
    items: Iterator[T], *, depth: int = _DEPTH, initializer: Callable[[], object] | None = None
) -> Iterator[Iterator[T]]:
    """Takes items in a thread, up to `depth` before they are asked for; in the same order.

    An error in taking an item is raised where that item is asked for. On leaving, the thread has ended: at most the
    item that is being taken is waited for.
    """
    end = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=initializer)

    def taken() -> Iterator[T]:
        waiting = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]

    try:
        yield taken()
    finally:
        pool.shutdown(cancel_futures=True)


def _pin(batch: Batch) -> Batch:
    inputs = {name: value.pin_memory() for name, value in batch.inputs.items()}
    return replace(batch, inputs=inputs, labels=batch.labels.pin_memory())
