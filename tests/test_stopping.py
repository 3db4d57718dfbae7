"""A request to stop: signals ask, and whoever computes hears it between two pieces of work."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from harness.processes.stopping import STOP_SIGNALS, PreemptedError, StopRequest


@pytest.fixture(autouse=True)
def _handlers_stay() -> Iterator[None]:
    numbers = (*STOP_SIGNALS, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGINT])
def test_a_signal_is_heard_between_two_items(number: int) -> None:
    stop, seen = StopRequest(), []
    with stop.signals(), pytest.raises(PreemptedError, match="stopped while scoring"):
        for item in stop.between(range(5), "scoring"):
            seen.append(item)
            if item == 2:
                os.kill(os.getpid(), number)
    assert seen == [0, 1, 2]


def test_ctrl_c_a_second_time_interrupts_at_once() -> None:
    stop = StopRequest()
    with stop.signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.was_heard
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_before_a_phase_that_keeps_nothing_ends_it_before_it_begins() -> None:
    stop = StopRequest()
    stop.ask()
    with pytest.raises(PreemptedError, match="stopped while loading"), stop.interrupting("loading"):
        pytest.fail("began")
