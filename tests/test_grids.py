"""A sweep as a union of grids."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from harness.config.overrides import as_override_value
from hydra_plugins.lora_harness._grids import GridError, expand

LORA = {"method": "lora", "rank": ["r1", "r8"], "trainer.learning_rate": 2e-3}
FULL = {"method": "full", "trainer.learning_rate": [1e-4, 2e-4]}


def test_the_union_of_two_products_in_order() -> None:
    assert expand([LORA, FULL], {}) == [
        ("method=lora", "rank=r1", "trainer.learning_rate=0.002"),
        ("method=lora", "rank=r8", "trainer.learning_rate=0.002"),
        ("method=full", "trainer.learning_rate=0.0001"),
        ("method=full", "trainer.learning_rate=0.0002"),
    ]


def test_the_command_line_replaces_an_axis_in_the_grids_that_have_it() -> None:
    assert expand([LORA, FULL], {"rank": ["r4"], "trainer.learning_rate": ["1e-3"]}) == [
        ("method=lora", "rank=r4", "trainer.learning_rate=1e-3"),
        ("method=full", "trainer.learning_rate=1e-3"),
    ]


def test_a_new_axis_goes_to_every_grid() -> None:
    runs = expand([LORA, FULL], {"seed": ["0", "1"]})
    assert len(runs) == 8
    assert all(run[-1] in ("seed=0", "seed=1") for run in runs)


def test_no_grids_at_all_is_hydras_own_multirun() -> None:
    assert expand([], {"rank": ["r1", "r4"], "seed": ["0"]}) == [("rank=r1", "seed=0"), ("rank=r4", "seed=0")]


def test_a_run_that_two_grids_name_comes_once() -> None:
    assert expand([{"rank": ["r1", "r8"]}, {"rank": ["r8"]}], {}) == [("rank=r1",), ("rank=r8",)]


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([LORA, "rank"], r"grids\[1\]: must be a mapping from axis to values, got 'rank'\. Did you mean"),
        ([{"rank": []}], r"grids\[0\]\.rank: no values"),
    ],
)
def test_a_grid_that_is_none_is_named(grids: list[Any], message: str) -> None:
    with pytest.raises(GridError, match=message):
        expand(grids, {})


plain = st.none() | st.booleans() | st.integers(-1000, 1000) | st.text("abcXYZ019 _-./,'=$()\\", max_size=12)


@given(plain | st.lists(plain, max_size=4))
def test_hydra_reads_every_value_back(value: Any) -> None:
    override = OverridesParser.create().parse_override(f"key={as_override_value(value)}")
    read = override.value()
    read = [str(item) if isinstance(item, str) else item for item in read] if isinstance(read, list) else read
    expected = value if isinstance(value, list) else (value,)
    for item, got in zip(expected, read if isinstance(value, list) else (read,), strict=True):
        # A text that looks like a number stays one: 007 names a column, and 12e5 begins a commit.
        assert got == item and isinstance(got, str) == isinstance(item, str)
