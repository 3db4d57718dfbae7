"""What benchmarks print, where they can be run small; others are tested beside what they measure."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripts import load_script

from harness.config.schema import Compile
from harness.models import compiling


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what PyTorch's compiler imports
def test_what_is_measured_on_a_gpu_runs_on_a_cpu_with_tiny_models(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, *, mode: compiled.append(mode) or function)
    monkeypatch.setattr(compiling, "missing_compiler", lambda device: None)
    load_script("benchmarks/gpu.py").main(["--device", "cpu", "--small"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    kinds = [row for row in rows if row[3] in list(Compile)]
    steps, memory, packs = ([row for row in rows if len(row) == width and row not in kinds] for width in (6, 9, 7))
    assert {row[0] for row in steps} == {row[0] for row in packs}
    assert len(steps) == 18 and len(memory) == 12 and len(packs) == 7
    assert [float(row[4]) for row in steps if row[2] == "floor"] == [1.0] * 3
    assert all(float(row[3]) > 0 for row in steps)
    assert [row[3] for row in kinds] == 3 * list(Compile)
    assert set(compiled) == {None, "reduce-overhead"}
    assert all(float(value) > 0 for row in kinds for value in row[5:])
    for row in memory:
        assert row[4] == row[5], "predicted bytes are followed bytes"
        assert row[6:] == ["-", "-", "-"]
    assert all(float(value) > 0 for row in packs for value in row[4:])


@pytest.mark.slow
def test_a_step_has_not_become_slower() -> None:
    """By processor time, which others on the machine change by some hundredths, in the best of three measurements."""
    module = load_script("benchmarks/step.py")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [module.exceeded()]
        while found[-1] and len(found) < 3:
            found.append(module.exceeded())
    finally:
        torch.set_num_threads(num_threads)
    assert not found[-1], found


def test_a_step_that_has_become_slower_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_script("benchmarks/step.py")
    seconds = {"floor": [1.0, 1.1, 1.2]} | {f"ours, rank 8 on {of}": [1.2, 1.3, 1.4] for of in ("all", "q, v")}
    monkeypatch.setattr(module, "measure", lambda *_, **__: (seconds, {}))
    assert module.exceeded() == ["ours, rank 8 on q, v, dropout 0: 1.18 of the floor, recorded 1.00"]


def test_sweeps_in_packs_are_compared_run_by_run() -> None:
    module = load_script("benchmarks/packed_sweep.py")

    def run(accuracy: float, **environment: Any) -> SimpleNamespace:
        return SimpleNamespace(metrics={"test_accuracy": accuracy, "wall_seconds": 3.0}, environment=environment)

    alone = module.Made("1", 30.0, {"a": run(0.5), "b": run(0.8)})
    packed = module.Made("4", 10.0, {"a": run(0.5, packed=4), "b": run(0.6, packed=2)})
    other = module.Made("8", 15.0, {"a": run(0.5), "c": run(0.1)})
    assert module.table([alone, packed, other]).splitlines()[2:] == [
        "| 1 | 30.0 | 1.00 | 2 | 1 | 2 of 2 | 2 | 0 |",
        "| 4 | 10.0 | 3.00 | 2 | 3 | 2 of 2 | 1 | 0.25 |",
        "| 8 | 15.0 | 2.00 | 2 | 1 | 1 of 2 | 1 | 0 |",
        "",
        "pack 4: test_accuracy of b: 0.25",
    ]
