"""How many runs a pack trains at once, a given number or as many as pay and fit into memory, and which passes are one.

`Growing` starts with one run and doubles. At each size it watches a few passes, and it stays at the last size that was
faster than the best below it, by more than a margin: twice as many runs take twice the memory, and where a core or a
GPU is busy already, they take twice the time as well. How fast a pack is, is the time that passes of its runs take one
after the other, as each rehearsed it, over that of a pass at once: a run on all projections that joins one on q and v
does more work, and that is not the pack's doing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import ClassVar, Protocol

from harness.results.metrics import bytes_text

# More runs are kept where they are so many times as fast as the best size before.
LEAST_GAIN = 1.05
# Sizes in a row that were no faster, after which none larger is tried. On a GPU one pass for two runs, whose adapters
# lie on other matrices, took as long as two passes, and one for 24 of them a quarter of 24.
NUM_TRIES = 2
# Passes at a size before it is judged, by the median of their rates.
NUM_PASSES = 5
# The part of the memory that is available which a pack may take: kernels need scratch space, and allocators fragment.
MEMORY_SHARE = 0.8


# Numbers in the hidden states of a run's batch, for each thread of a CPU, from which on that run keeps the thread busy:
# with more of them one pass for several runs takes longer than one for each, whose tensors are smaller.
BUSY_THREAD = 50_000


def pays_together(num_hidden: int, *, num_threads: int, shares_blocks: bool) -> bool:
    """Whether on a CPU a pass that several runs share takes no longer than one for each of them.

    By their sizes and not by the clock, so that a run is computed in the same way each time, to the last digit.

    Args:
        num_hidden: tokens times width of the largest of their batches.
        num_threads: that compute.
        shares_blocks: whether blocks below all adapters are computed once for all.
    """
    return shares_blocks or num_hidden <= BUSY_THREAD * num_threads


@dataclass(frozen=True)
class Pass:
    """One turn of all runs of a pack: how many there were, and what it took.

    Attributes:
        num_runs: that trained at once.
        alone_seconds: that they would take one after the other.
        seconds: of forward and backward.
        bytes_per_run: what a step of the largest of them takes above the weights that all share.
        is_shared: whether some of them were computed in one pass.
    """

    num_runs: int
    alone_seconds: float
    seconds: float
    bytes_per_run: int
    is_shared: bool = True


class PackSize(Protocol):
    """How many runs are in training at once, from what their passes took."""

    @property
    def target(self) -> int:
        """Runs that may be in training now. More that are stay until they end."""
        ...

    @property
    def is_settled(self) -> bool:
        """Whether it will stay, so that no pass has to be timed."""
        ...

    def why_full(self, own_bytes: Sequence[int]) -> str | None:
        """Why memory does not allow one more run beside those whose longest steps take so much above the weights."""
        ...

    def keep_to(self, num_runs: int, reason: str) -> None:
        """Makes so many the most from here on."""
        ...

    def passed(self, done: Pass) -> str:
        """Takes note of a pass. What was decided, as a sentence's end; empty where nothing was."""
        ...


@dataclass
class Fixed:
    """So many, or as many as there was memory for.

    Raises:
        ValueError: less than one.
    """

    target: int
    is_settled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.target < 1:
            raise ValueError(f"size={self.target}: a pack has at least one run")

    def why_full(self, own_bytes: Sequence[int]) -> str | None:
        """As many as were asked for are tried."""
        return None

    def keep_to(self, num_runs: int, reason: str) -> None:
        """The others do not fit."""
        self.target = min(self.target, num_runs)

    def passed(self, done: Pass) -> str:
        """Nothing to decide."""
        return ""


@dataclass
class Growing:
    """Doubles from one run on, while that makes it faster and memory allows.

    Args:
        most: never more than that; the number of runs there are.
        available: the bytes that are free at present; None where that is not known.
    """

    most: int
    available: Callable[[], int | None]
    target: int = 1
    is_settled: bool = False
    _rates: list[float] = field(default_factory=list)
    _best: tuple[int, float] | None = None
    _against: list[str] = field(default_factory=list)
    _limits: list[str] = field(default_factory=list)

    def why_full(self, own_bytes: Sequence[int]) -> str | None:
        """Looks again: runs that enter later may be larger than those by which the size was decided."""
        return self._why_too_large(len(own_bytes) + 1, max(own_bytes))

    def keep_to(self, num_runs: int, reason: str) -> None:
        """Before the size is decided, so many are judged next, and then no more are tried."""
        self.most = min(self.most, num_runs)
        if self.target > self.most:
            self.target, self._rates = self.most, []
        self._limits = [reason]

    def passed(self, done: Pass) -> str:
        """Takes note of a pass in which as many runs trained as wanted, and decides after `NUM_PASSES` of them."""
        if self.is_settled or done.num_runs != self.target:
            return ""
        self._rates.append(done.alone_seconds / done.seconds)
        if len(self._rates) < NUM_PASSES:
            return ""
        rate, self._rates = median(self._rates), []
        if self._best is None or rate >= LEAST_GAIN * self._best[1]:
            self._best, self._against = (self.target, rate), []
        elif self._best[0] < self.target:  # and not beside what memory has left of it
            self._against.append(f"{self.target} are {rate / self._best[1]:.2f} times as fast")
        doubled = min(2 * self.target, self.most)
        # Runs that are computed one after the other anyway are no faster in any number.
        if len(self._against) == (NUM_TRIES if done.is_shared else 1) or doubled == self.target:
            return self._settle()
        too_large = self._why_too_large(doubled, done.bytes_per_run)
        if too_large is not None:
            self._limits = [too_large]
            return self._settle()
        self.target = doubled
        return ""

    def _why_too_large(self, num_runs: int, bytes_per_run: int) -> str | None:
        available, needed = self.available(), num_runs * bytes_per_run
        if available is None or needed <= MEMORY_SHARE * available:
            return None
        return f"{num_runs} need {bytes_text(needed)}, available are {bytes_text(available)}"

    def _settle(self) -> str:
        assert self._best is not None
        self.target, self.is_settled = min(self._best[0], self.most), True
        return f"{self.target} at once: {', '.join(self._against + self._limits) or 'more do not wait'}"
