"""The loss before training is computed once for all runs that begin with one model, and is the one of that model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from test_run_language import config, data, dataset  # noqa: F401 (data is a fixture)

from harness import base_scores
from harness.config.schema import RunConfig
from harness.results.schema import RunResult, Status
from harness.run import run
from harness.tasks.language import LanguageObjective

BEFORE = ("val_nll_before", "test_nll_before", "base_domain_nll_before")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))


class Evaluations:
    """Runs configs and counts how often each one scored a split."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num = 0
        evaluate_split = LanguageObjective.evaluate_split

        def counted(*positional: Any) -> Any:
            self.num += 1
            return evaluate_split(*positional)

        monkeypatch.setattr(LanguageObjective, "evaluate_split", counted)

    def of(self, wanted: RunConfig) -> tuple[RunResult, int]:
        before = self.num
        result = run(wanted)
        assert result.status is Status.FINISHED, result.error
        return result, self.num - before


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> Evaluations:
    return Evaluations(monkeypatch)


@pytest.fixture
def base(data: Path, tmp_path: Path) -> dict[str, Any]:  # noqa: F811
    return {"data": data, "runs_dir": tmp_path / "runs", "also": {"old": dataset(data, "completion")}}


def wanted(base: dict[str, Any], method: str = "lora", **overrides: Any) -> RunConfig:
    trainer = {"eval_every": 0, **overrides.pop("trainer", {})}
    return config(base["data"], base["runs_dir"], method, evaluate_also=base["also"], trainer=trainer, **overrides)


def test_runs_on_one_base_compute_it_once_to_the_bit(
    base: dict[str, Any], evaluations: Evaluations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, num_first = evaluations.of(wanted(base))
    others = [
        evaluations.of(wanted(base, rank={"rank": 2})),
        evaluations.of(wanted(base, target_layers={"name": "mlp", "projections": ["mlp"]})),
        evaluations.of(wanted(base, "full", trainer={"learning_rate": 1e-4})),
        evaluations.of(wanted(base, "norms")),
    ]
    assert {number for _, number in others} == {num_first - len(BEFORE)}
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "empty"))
    for result, _ in others:
        assert [result.metrics[name] for name in BEFORE] == [first.metrics[name] for name in BEFORE]
    again, number = evaluations.of(wanted({**base, "runs_dir": tmp_path / "again"}, rank={"rank": 2}))
    assert number == num_first
    assert [again.metrics[name] for name in BEFORE] == [first.metrics[name] for name in BEFORE]


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},  # draws another tiny model
        {"trainer": {"eval_batch_size": 3}},
        {"trainer": {"precision": "bf16"}},
        {"dataset": {"max_length": 48}},
        {"variant": {"name": "pissa", "init": "pissa"}},
        {"model": {"name": "tiny_gpt2", "tiny": "gpt2"}},
    ],
    ids=str,
)
def test_what_decides_the_loss_decides_what_is_shared(
    base: dict[str, Any], evaluations: Evaluations, other: dict[str, Any], tmp_path: Path
) -> None:
    _, num_first = evaluations.of(wanted(base))
    _, number = evaluations.of(wanted({**base, "runs_dir": tmp_path / "other"}, **other))
    assert number > num_first - len(BEFORE)


def test_other_code_computes_it_again(
    base: dict[str, Any], evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, num_first = evaluations.of(wanted(base))
    monkeypatch.setattr(base_scores, "_code", lambda kinds: "edited")
    _, number = evaluations.of(wanted(base, rank={"rank": 2}))
    assert number == num_first


def test_the_first_run_takes_no_longer_by_it(
    base: dict[str, Any], evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it computes for all is preparation, as tokenising is."""
    waited = 0.5
    compute = LanguageObjective.evaluate_split

    def slow(*positional: Any) -> Any:
        time.sleep(waited)
        return compute(*positional)

    monkeypatch.setattr(LanguageObjective, "evaluate_split", slow)
    first, _ = evaluations.of(wanted(base))
    second, _ = evaluations.of(wanted(base, rank={"rank": 2}))
    assert first.metrics["preparation_seconds"] - second.metrics["preparation_seconds"] > len(BEFORE) * waited
    assert first.metrics["wall_seconds"] < second.metrics["wall_seconds"] + len(BEFORE) * waited


def test_a_cache_that_cannot_be_used_costs_time_alone(
    base: dict[str, Any], evaluations: Evaluations, tmp_path: Path
) -> None:
    first, num_first = evaluations.of(wanted(base))
    for path in (tmp_path / "cache" / "base_scores").iterdir():
        path.write_text("{half")
    second, number = evaluations.of(wanted(base, rank={"rank": 2}))
    assert number == num_first
    assert [second.metrics[name] for name in BEFORE] == [first.metrics[name] for name in BEFORE]
    for path in (tmp_path / "cache" / "base_scores").iterdir():
        path.unlink()
        path.mkdir()
    _, number = evaluations.of(wanted(base, rank={"rank": 1}))
    assert number == num_first
