"""Batches taken ahead in a thread: the same ones, and a thread that always ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from harness.data.batches import Batch
from harness.training.prefetch import ahead, prefetched


def num_threads() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


class Source:
    """Numbers up to `num`; says how many were taken, and by which thread."""

    def __init__(self, num: int, *, fails_at: int | None = None) -> None:
        self.num, self.fails_at = num, fails_at
        self.taken = 0
        self.threads: set[str] = set()

    def __iter__(self) -> Iterator[int]:
        for number in range(self.num):
            self.taken += 1
            self.threads.add(threading.current_thread().name)
            if number == self.fails_at:
                raise OSError(f"row {number}")
            yield number


def test_items_come_in_order_from_one_other_thread() -> None:
    source = Source(50)
    with ahead(iter(source)) as items:
        assert list(items) == list(range(50))
    assert len(source.threads) == 1 and threading.current_thread().name not in source.threads
    assert num_threads() == 0


def test_no_more_than_the_depth_is_taken_ahead() -> None:
    source = Source(50)
    with ahead(iter(source), depth=2) as items:
        for wanted in range(10):
            assert next(items) == wanted
            assert source.taken <= wanted + 3
    assert source.taken <= 12


def test_an_error_is_raised_where_its_item_is_asked_for() -> None:
    with ahead(iter(Source(50, fails_at=3))) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="row 3"):
            next(items)
    assert num_threads() == 0


def test_the_thread_ends_when_the_loop_fails() -> None:
    with pytest.raises(ZeroDivisionError), ahead(iter(Source(50))) as items:
        next(items)
        raise ZeroDivisionError
    assert num_threads() == 0


def test_a_cpu_collates_between_its_steps() -> None:
    steps = iter([[Batch({"input_ids": torch.zeros(1, 1)}, torch.zeros(1), 1, 1)]])
    with prefetched(steps, torch.device("cpu")) as taken:
        assert taken is steps


@pytest.mark.parametrize(("device", "index"), [("cuda", 3), ("cuda:1", 1)])
def test_the_thread_pins_through_the_device_that_is_computed_on(
    monkeypatch: pytest.MonkeyPatch, device: str, index: int
) -> None:
    """Also where it has no number, as accelerate's of a single process: `set_device` wants one."""
    chosen: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with prefetched(iter([[], []]), torch.device(device)) as steps:
        assert list(steps) == [[], []]
    assert chosen == [index]


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_takes_pinned_batches(device: str) -> None:
    batch = Batch({"input_ids": torch.arange(4).view(1, 4)}, torch.zeros(1), 4, 1)
    with prefetched(iter([[batch]]), torch.device(device)) as steps:
        ((found,),) = steps
    assert found.inputs["input_ids"].is_pinned() and found.labels.is_pinned()
    assert torch.equal(found.to(torch.device("cuda")).inputs["input_ids"].cpu(), batch.inputs["input_ids"])
