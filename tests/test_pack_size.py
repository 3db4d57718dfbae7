"""How many runs train at once: `hydra.launcher.pack=auto`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness.training.pack_size import NUM_PASSES, Fixed, Growing, Pass

ALONE = 1.0


def train(size: Growing, seconds_of: Callable[[int], float], *, bytes_per_run: int = 1) -> list[str]:
    """Passes with as many runs as wanted until it stays; what was decided."""
    for _ in range(100):
        runs = size.target
        decided = size.passed(Pass(runs, runs * ALONE, seconds_of(runs), bytes_per_run))
        if size.is_settled:
            return [decided]
        assert not decided
    raise AssertionError("it never settles")


def test_it_doubles_while_twice_as_many_compute_faster() -> None:
    """Up to four runs take the time of one, and more take 1.1 times as long as four by four."""
    size = Growing(most=100, available=lambda: None)
    decided = train(size, lambda runs: 1.0 if runs <= 4 else 1.1 * runs / 4)
    assert decided == ["4 at once: 8 are 0.91 times as fast, 16 are 0.91 times as fast"]
    assert size.target == 4


def test_two_that_gain_nothing_do_not_speak_for_four() -> None:
    """As measured on a GPU with runs on q and v and on all projections by turns: 20 ms each alone."""
    size = Growing(most=24, available=lambda: None)
    assert train(size, lambda runs: 1.0 if runs == 1 else (39 + 4.1 * (runs - 2)) / 20) == [
        "24 at once: more do not wait"
    ]


def test_what_does_not_fit_ends_the_search_after_a_size_that_gained_nothing() -> None:
    size = Growing(most=100, available=lambda: 50 * 2**20)
    assert train(size, lambda runs: float(runs), bytes_per_run=15 * 2**20) == [
        "1 at once: 2 are 1.00 times as fast, 4 need 60.00 MiB, available are 50.00 MiB"
    ]
    assert size.target == 1


def test_runs_without_a_shared_pass_are_not_tried_in_larger_numbers() -> None:
    size = Growing(most=100, available=lambda: None)
    for _ in range(NUM_PASSES):
        size.passed(Pass(1, ALONE, 1.0, 1, is_shared=False))
    for _ in range(NUM_PASSES):
        decided = size.passed(Pass(2, 2 * ALONE, 2.0, 1, is_shared=False))
    assert decided == "1 at once: 2 are 1.00 times as fast"


def test_where_runs_take_turns_anyway_each_is_alone() -> None:
    size = Growing(most=100, available=lambda: None)
    train(size, lambda runs: 1.0 if runs == 1 else runs / 1.04)
    assert size.target == 1


def test_a_run_that_costs_more_is_no_reason_to_stay_small() -> None:
    """One on q and v, then one on all projections, which takes three times as long, alone and in the pack."""
    size = Growing(most=2, available=lambda: None)
    for _ in range(NUM_PASSES):
        size.passed(Pass(1, 1.0, 1.0, 1))
    for _ in range(NUM_PASSES):
        decided = size.passed(Pass(2, 1.0 + 3.0, 3.0, 1))
    assert decided == "2 at once: more do not wait"


def test_there_are_never_more_than_wait() -> None:
    size = Growing(most=3, available=lambda: None)
    assert train(size, lambda runs: 1.0) == ["3 at once: more do not wait"]
    assert size.target == 3


def test_the_memory_that_is_available_is_a_limit() -> None:
    size = Growing(most=100, available=lambda: 50 * 2**20)
    assert train(size, lambda runs: 1.0, bytes_per_run=10 * 2**20) == [
        "4 at once: 8 need 80.00 MiB, available are 50.00 MiB"
    ]
    assert size.target == 4


def test_a_pass_with_other_numbers_of_runs_decides_nothing() -> None:
    """While runs enter or leave; one slow pass of five is not the median."""
    size = Growing(most=2, available=lambda: None)
    for _ in range(NUM_PASSES - 1):
        size.passed(Pass(1, ALONE, 1.0, 1))
    for _ in range(NUM_PASSES):
        size.passed(Pass(2, 2 * ALONE, 1.0, 1))
    assert size.target == 1
    size.passed(Pass(1, ALONE, 9.0, 1))
    assert size.target == 2
    for seconds in (9.0, 1.0, 1.0, 1.0, 1.0):
        size.passed(Pass(2, 2 * ALONE, seconds, 1))
    assert size.is_settled and size.target == 2


def test_a_fixed_size_stays() -> None:
    size = Fixed(3)
    assert size.passed(Pass(3, ALONE, 1.0, 1)) == "" and size.target == 3
    with pytest.raises(ValueError, match="size=0: a pack has at least one run"):
        Fixed(0)


def test_memory_is_looked_at_whenever_a_run_enters() -> None:
    """Four of 10 MiB were decided on; beside a larger one there is room for three."""
    size = Growing(most=4, available=lambda: 50 * 2**20)
    small, large = 10 * 2**20, 12 * 2**20
    assert train(size, lambda runs: 1.0, bytes_per_run=small) == ["4 at once: more do not wait"]
    assert size.why_full([small] * 3) is None
    assert size.why_full([small, large]) is None
    assert size.why_full([small, small, large]) == "4 need 48.00 MiB, available are 50.00 MiB"


def grown_to_four(*, most: int = 8) -> Growing:
    size = Growing(most=most, available=lambda: 50 * 2**20)
    for runs in (1, 2):
        for _ in range(NUM_PASSES):
            size.passed(Pass(runs, runs * ALONE, 1.0, 10 * 2**20))
    assert size.target == 4
    return size


def test_before_it_has_settled_it_judges_as_many_as_fit() -> None:
    """The rates of passes of four do not count as those of three."""
    size = grown_to_four()
    for _ in range(NUM_PASSES - 1):
        size.passed(Pass(4, 4 * ALONE, 100.0, 10 * 2**20))
    size.keep_to(3, "4 need 120.00 MiB, available are 50.00 MiB")
    decided = [size.passed(Pass(3, 3 * ALONE, 1.0, 30 * 2**20)) for _ in range(NUM_PASSES)]
    assert decided == [""] * (NUM_PASSES - 1) + ["3 at once: 4 need 120.00 MiB, available are 50.00 MiB"]


def test_what_did_not_fit_is_not_tried_again() -> None:
    size = grown_to_four()
    size.keep_to(1, "2 did not fit into the memory")
    decided = [size.passed(Pass(1, ALONE, 1.0, 1)) for _ in range(NUM_PASSES)]
    assert decided[-1] == "1 at once: 2 did not fit into the memory"
    assert size.target == 1
    size = grown_to_four(most=4)
    assert train(size, lambda runs: 1.0)
    size.keep_to(2, "3 did not fit into the memory")
    assert size.target == 2


def test_a_given_number_is_tried_until_memory_runs_out() -> None:
    size = Fixed(3)
    assert size.why_full([2**60]) is None
    size.keep_to(2, "3 did not fit into the memory")
    assert size.target == 2
    size.keep_to(5, "6 did not fit into the memory")
    assert size.target == 2
