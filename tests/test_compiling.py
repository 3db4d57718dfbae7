"""`trainer.compile`: the same run but for round-off, with compiled blocks in its training steps and nowhere else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import config, rows  # noqa: F401
from torch import nn

from harness.config.schema import Compile, RunConfig
from harness.config.validation import ConfigError
from harness.content.errors import ModelError
from harness.measure.memory import LiveTensors
from harness.methods.packable import why_alone
from harness.models import compiling
from harness.models.compiling import compile_blocks
from harness.prepare import PreparedRun, prepare
from harness.results.schema import RunResult, Status
from harness.run import run

# PyTorch's compiler does what PyTorch warns of: it reads gradients that are none, and imports what is deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf"),
]

SHORT = {"num_epochs": None, "max_steps": 6, "eval_every": 0}
CPU = torch.device("cpu")


def wanted(rows: Path, folder: Path, compile: str, **more: Any) -> RunConfig:  # noqa: F811
    return config(rows, folder, trainer=SHORT | {"compile": compile}, **more)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What stands in for the compiler traces a block and runs it as it is; how often, and in which mode."""
    found: dict[str, Any] = {"calls": 0, "mode": "not asked"}
    torch_compile = torch.compile

    def backend(graph: Any, example: Any) -> Callable[..., Any]:
        def compute(*args: Any) -> Any:
            found["calls"] += 1
            return graph.forward(*args)

        return compute

    def stand_in(function: Callable[..., Any], *, mode: str | None) -> Callable[..., Any]:
        found["mode"] = mode
        compiled: Callable[..., Any] = torch_compile(function, backend=backend)
        return compiled

    monkeypatch.setattr(torch, "compile", stand_in)
    torch._dynamo.reset()
    return found


def gradients(prepared: PreparedRun) -> dict[str, torch.Tensor]:
    batch = next(iter(prepared.data.train.batches(4))).inputs
    prepared.model.train()
    prepared.model.zero_grad(set_to_none=True)
    prepared.model(**batch).logits.square().sum().backward()
    return {name: own.grad for name, own in prepared.model.named_parameters() if own.grad is not None}


@pytest.mark.parametrize("how", ["blocks", "graphs"])
def test_training_steps_alone_are_compiled(
    how: str,
    counted: dict[str, Any],
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    prepared = prepare(wanted(rows, tmp_path, how))
    plain = gradients(prepare(wanted(rows, tmp_path, "none")))
    assert counted["calls"] == 0
    found = gradients(prepared)
    assert counted["calls"] > 0
    assert counted["mode"] == {"blocks": None, "graphs": "reduce-overhead"}[how]
    assert found.keys() == plain.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)

    batch = next(iter(prepared.data.val.batches(4))).inputs
    before = counted["calls"]
    with torch.no_grad():
        prepared.model(**batch)
    prepared.model.eval()
    prepared.model(**batch)
    assert counted["calls"] == before


def test_a_step_whose_memory_is_counted_is_not_compiled_and_those_after_it_are(
    counted: dict[str, Any],
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    prepared = prepare(wanted(rows, tmp_path, "blocks"))
    with LiveTensors(prepared.model):
        gradients(prepared)
    assert counted["calls"] == 0
    gradients(prepared)
    first = counted["calls"]
    assert first > 0
    gradients(prepared)
    assert counted["calls"] == 2 * first


def test_every_step_of_a_run_is_compiled(
    counted: dict[str, Any],
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    forward = compiling._compiled_in_training

    def watched(block: nn.Module, mode: str | None) -> Callable[..., Any]:
        inner = forward(block, mode)

        def call(*args: Any, **kwargs: Any) -> Any:
            before = counted["calls"]
            output = inner(*args, **kwargs)
            if block.training and torch.is_grad_enabled() and not compiling.is_in_torch_dispatch_mode():
                calls.append(counted["calls"] - before)
            return output

        return call

    monkeypatch.setattr(compiling, "_compiled_in_training", watched)
    result = run(wanted(rows, tmp_path, "blocks"))
    assert result.status is Status.FINISHED, result.error
    assert len(calls) >= 6 and min(calls) > 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_run_has_the_scores_of_the_plain_one(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    torch._dynamo.reset()
    assert_equal_runs(run(wanted(rows, tmp_path, "none")), run(wanted(rows, tmp_path, "blocks")))


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["blocks", "graphs"])
def test_a_compiled_run_has_the_scores_of_the_plain_one_on_a_gpu(
    how: str,
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    torch._dynamo.reset()
    on_gpu = {"device": "cuda", "allow_busy_device": True}
    assert_equal_runs(run(wanted(rows, tmp_path, "none", **on_gpu)), run(wanted(rows, tmp_path, how, **on_gpu)))


def assert_equal_runs(plain: RunResult, compiled: RunResult) -> None:
    for result in (plain, compiled):
        assert result.status is Status.FINISHED, result.error
    assert plain.run_id != compiled.run_id
    for name in ("train_nll", "val_nll", "test_nll"):
        assert compiled.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-4)
    assert compiled.metrics["peak_memory_bytes"] == plain.metrics["peak_memory_bytes"]


def test_what_cannot_be_compiled_is_refused(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ModelError, match=r"trainer\.compile=blocks: Linear has no blocks"):
        compile_blocks(nn.Linear(2, 2), Compile.blocks, CPU)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(ModelError, match=r"no C\+\+ compiler is installed .*use trainer\.compile=none"):
        prepare(wanted(rows, tmp_path, "blocks"))
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert compiling.missing_compiler(torch.device("cuda")) == "the package triton is not installed"
    assert "mps" in str(compiling.missing_compiler(torch.device("mps")))
    with pytest.raises(ConfigError, match=r"trainer\.compile=graphs: is not tested with shard_model=true"):
        wanted(rows, tmp_path, "graphs", shard_model=True)
    assert "trainer.compile=blocks" in str(why_alone(wanted(rows, tmp_path, "blocks")))
