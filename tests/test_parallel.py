"""Two processes on the CPU: the losses and adapter of one, whether the model is whole in each or spread over both."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from harness.data import Batch, TrainingBatches

ROOT = Path(__file__).resolve().parent.parent


class Numbered:
    """Examples whose only token is their number."""

    def __init__(self, num: int) -> None:
        self.lengths = np.ones(num, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Any) -> Batch:
        ids = torch.tensor([[int(index)] for index in indices])
        return Batch({"input_ids": ids}, ids, len(indices), len(indices))


@pytest.mark.parametrize(("num", "micro"), [(8, None), (8, 1), (7, 2), (9, 1), (1, None)])
def test_processes_share_each_step_without_loss_or_repetition(num: int, micro: int | None) -> None:
    def steps(process: int, num_processes: int) -> list[list[Batch]]:
        batches = TrainingBatches(
            Numbered(num),
            batch_size=4,
            micro_batch_size=micro,
            seed=0,
            process_index=process,
            num_processes=num_processes,
        )
        return list(batches.epoch(0))

    def examples(step: list[Batch]) -> list[int]:
        return [int(token) for batch in step if batch.num_targets for token in batch.inputs["input_ids"][:, 0]]

    alone, first, second = steps(0, 1), steps(0, 2), steps(1, 2)
    assert len(alone) == len(first) == len(second)
    for whole, left, right in zip(alone, first, second, strict=True):
        assert sorted(examples(left) + examples(right)) == sorted(examples(whole))
        assert len(left) == len(right)
        assert all(len(batch.labels) > 0 for batch in right)  # a process without examples still takes part


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and targets of unequal length."""
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    draw = random.Random(0)
    rows = [{"q": "x" * draw.randint(1, 9), "a": "y" * draw.randint(1, 12)} for _ in range(46)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(sums: Path, runs_dir: Path, *more: str) -> list[str]:
    return [
        "model=tiny_llama",
        "dataset=local_completion",
        f"dataset.train_file={sums}",
        "dataset.prompt_template='{q}='",
        "dataset.target_column=a",
        "dataset.generation.max_new_tokens=4",
        "dataset.max_length=32",
        "trainer.num_epochs=null",
        "trainer.max_steps=12",  # ten make an epoch: its last step has one example, and one process none
        "trainer.batch_size=4",
        "trainer.eval_every=5",
        "trainer.checkpoint_every=6",
        "tracking=off",
        "tracking.log_every=1",
        "device=cpu",
        f"runs_dir={runs_dir}",
        *more,
    ]


def run(arguments: list[str], cache: Path, *, num_processes: int = 1) -> None:
    launch = []
    if num_processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    process = subprocess.run(
        [sys.executable, *launch, "-m", "harness", *arguments],
        cwd=ROOT,
        env={**os.environ, "LORA_HARNESS_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["train_nll"] for row in rows if "train_nll" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "sharded"),
    [
        (("rank=r4", "target_layers=all"), False),
        (("rank=r4", "target_layers=all"), True),
        (("method=full", "trainer.learning_rate=2e-3", "trainer.micro_batch_size=1"), True),
    ],
    ids=["lora-data_parallel", "lora-sharded", "full-sharded"],
)
def test_two_processes_are_one(sums: Path, tmp_path: Path, method: tuple[str, ...], sharded: bool) -> None:
    cache = tmp_path / "cache"
    run(arguments(sums, tmp_path / "one", *method), cache)
    run(arguments(sums, tmp_path / "two", *method, f"shard_model={sharded}".lower()), cache, num_processes=2)
    (one,), (two,) = ((path.parent for path in (tmp_path / name).glob("*/result.json")) for name in ("one", "two"))
    assert one.name == two.name  # sharding is no part of a run's identity
    assert losses(two) == pytest.approx(losses(one), rel=1e-6, abs=1e-6)

    results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    assert [result["status"] for result in results] == ["finished"] * 2, results[1]["error"]
    assert results[1]["environment"]["num_processes"] == 2
    first, second = (result["metrics"] for result in results)
    for name in ("num_adapter_params", "num_trainable_params", "num_total_params", "num_steps", "best_step"):
        assert second[name] == first[name]
    for name in ("val_nll", "test_nll", "val_nll_last", "test_bits_per_byte"):
        assert second[name] == pytest.approx(first[name], rel=1e-5)

    (saved,) = (path.relative_to(one) for path in one.glob("*/*.safetensors"))
    expected, found = load_file(one / saved), load_file(two / saved)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    files = {path.relative_to(folder) for folder in (one, two) for path in folder.rglob("*") if path.is_file()}
    assert all((one / path).is_file() == (two / path).is_file() for path in files), files
