"""Whether a run fits into a device of so many GB, and the largest batch that does.

Live tensor bytes are not all that a GPU needs: its context, kernels with scratch space, and an allocator that rounds
and fragments take more: on an H100 two workspaces of cuBLAS, and the allocator reserved up to 20 % more for a small
model and 1 to 6 % more from 3 GiB on (LOG.md, "the first GPU"). So a part of the device, `headroom`, is left to them;
how much they take is measured, where a run has been on such a device, as `cuda_peak_reserved_bytes` beside
`peak_memory_bytes` of its result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from harness.config.schema import RunConfig
from harness.forecast.memory import MemoryForecast, predict_memory

GB = 10**9
HEADROOM = 0.1
# A workspace of cuBLAS for each thread that multiplies, that of the forward pass and that of the backward pass. PyTorch
# takes 32 MiB for one from compute capability 9.0 on, and 8.1 MiB on older GPUs.
WORKSPACE_BYTES = 2 * 32 * 2**20


def allocated_bytes(live_bytes: int) -> int:
    """About what `torch.cuda.max_memory_allocated` says of so many bytes of live tensors, on an H100 or later.

    Of twenty steps on an H100 and an H200 it was 0.0 to 2.2 % more, which is what the allocator rounds up (LOG.md).
    """
    return live_bytes + WORKSPACE_BYTES


@dataclass(frozen=True)
class GPU:
    """A GPU of `gb` times 10^9 bytes, of which tensors may take all but the part `headroom`."""

    gb: float
    headroom: float = HEADROOM

    @property
    def usable_bytes(self) -> int:
        """What tensors may take."""
        return int(self.gb * GB * (1 - self.headroom))

    def fits(self, forecast: MemoryForecast) -> bool:
        """Whether both a training step and scoring fit."""
        return forecast.peak_bytes <= self.usable_bytes


@dataclass(frozen=True)
class LargestBatch:
    """The largest micro-batch that fits, with its forecast; both None where not even one example does.

    `at_most` is where the search ended: nothing larger was tried.
    """

    micro_batch_size: int | None
    forecast: MemoryForecast | None
    at_most: int


def largest_micro_batch(
    config: RunConfig,
    device: GPU,
    *,
    at_most: int | None = None,
    predict: Callable[[RunConfig], MemoryForecast] = predict_memory,
) -> LargestBatch:
    """The largest micro-batch, up to `at_most` (the batch of the run), of whose size a step fits; scoring is left out.

    Memory is nearly a line in the size of a micro-batch, so that a few predictions find it. Scoring has its own size,
    `trainer.eval_batch_size`, and does not change.
    """
    at_most = at_most or config.trainer.batch_size
    known: dict[int, MemoryForecast] = {}

    def fits(size: int) -> bool:
        if size not in known:
            trainer = replace(config.trainer, batch_size=max(config.trainer.batch_size, size), micro_batch_size=size)
            known[size] = predict(replace(config, trainer=trainer))
        return known[size].step.total_bytes <= device.usable_bytes

    if not fits(1):
        return LargestBatch(None, None, at_most)
    low, high = 1, at_most + 1  # low fits; high does not, or is not to be tried
    while high - low > 1:
        middle = _guess(known, device.usable_bytes, low, high)
        if fits(middle):
            low = middle
        else:
            high = middle
    return LargestBatch(low, known[low], at_most)


def _guess(known: dict[int, MemoryForecast], limit: int, low: int, high: int) -> int:
    """A size between `low` and `high`, both excluded: where the line through what is known meets the limit."""
    sizes = sorted(known)
    if len(sizes) == 1:
        return min(low + 1, high - 1)
    near = sizes.index(low)
    first, second = sizes[max(0, min(near, len(sizes) - 2))], sizes[max(1, min(near + 1, len(sizes) - 1))]
    slope = (known[second].step.total_bytes - known[first].step.total_bytes) / (second - first)
    if slope <= 0:
        return (low + high) // 2
    meets = first + int((limit - known[first].step.total_bytes) / slope)
    # If the line is right, then `meets` fits and the next one does not.
    guess = meets if meets > low else low + 1
    return max(low + 1, min(guess, high - 1))
