"""Runs of tiny models keep their numbers: to the last bit where they were recorded, else to round-off.

    GOLDEN=write pytest tests/test_golden_results.py

records them anew in golden/results.json, which a change of numbers needs, with the reason in its commit message.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config.composing import from_dict
from harness.run import run

GOLDEN = Path(__file__).parent / "golden" / "results.json"
WORDS = ("apple pear plum", "iron zinc lead", "red green blue")

BERT = {"model": {"name": "tiny_bert", "tiny": "bert", "dropout": 0.1}}
LLAMA = {"model": {"name": "tiny_llama", "tiny": "llama", "dropout": 0.1}}
GPT2 = {"model": {"name": "tiny_gpt2", "tiny": "gpt2"}}
QUERY_VALUE = {"name": "x", "projections": ["q", "v"]}
LORA: dict[str, Any] = {
    "method": {"name": "lora", "adapter_dropout": 0.1},
    "rank": {"rank": 4, "alpha": 8},
    "target_layers": QUERY_VALUE,
}
LAST_BLOCK: dict[str, Any] = {
    "method": {"name": "lora"},
    "rank": {"rank": 2, "alpha_policy": "rslora", "alpha": 4},
    "target_layers": {"name": "y", "projections": ["all"], "blocks": "last_1"},
}
LABELS = {
    "dataset": {
        "name": "labels",
        "train_file": "labels.csv",
        "max_length": 32,
        "metrics": ["accuracy", "f1", "mcc"],
        "num_train_examples": 50,
        "num_eval_examples": 8,
    }
}
VALUES = {
    "dataset": {
        "name": "values",
        "train_file": "values.csv",
        "max_length": 32,
        "task": "regression",
        "metrics": ["pearson", "spearman"],
        "best_metric": "mse",
    }
}
TEXT = {
    "dataset": {
        "name": "text",
        "train_file": "text.txt",
        "max_length": 32,
        "task": "causal_lm",
        "metrics": ["nll", "perplexity"],
        "best_metric": "nll",
        "blocks": "packed",
    }
}
SUMS = {
    "dataset": {
        "name": "sums",
        "train_file": "sums.jsonl",
        "max_length": 32,
        "task": "completion",
        "prompt_template": "{q} = ",
        "target_column": "a",
        "metrics": ["nll", "exact_match", "bleu", "number_match"],
        "best_metric": "nll",
        "generation": {"max_new_tokens": 6, "num_beams": 2},
    }
}
CASES: dict[str, dict[str, Any]] = {
    "labels lora": BERT | LABELS | LORA,
    "labels full": BERT | LABELS | {"method": {"name": "full"}},
    "labels head_only": BERT | LABELS | {"method": {"name": "head_only"}},
    "values lora": BERT | VALUES | LAST_BLOCK,
    "text full": LLAMA | TEXT | {"method": {"name": "full"}},
    "text lora": GPT2 | TEXT | LORA | {"target_layers": {"name": "x", "projections": ["o", "mlp"]}},
    "sums lora": LLAMA | SUMS | LAST_BLOCK,
}
COMMON: dict[str, Any] = {
    "trainer": {"learning_rate": 1e-2, "max_steps": 6, "batch_size": 8, "micro_batch_size": 4, "eval_every": 3},
    "tracking": {"wandb": "disabled", "progress": False},
    "device": "cpu",
    "num_threads": 1,
    "seed": 3,
}


def machine() -> dict[str, str]:
    """What round-off depends on."""
    return {
        "torch": torch.__version__,
        "processor": platform.machine(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lines = [f"{WORDS[n % 3]} {n},{'abc'[n % 3]}" for n in range(90)]
    (tmp_path / "labels.csv").write_text("\n".join(["text,label", *lines, ""]))
    lines = [f"{WORDS[n % 3]} {n},{(n % 7) / 3:.3f}" for n in range(90)]
    (tmp_path / "values.csv").write_text("\n".join(["text,label", *lines, ""]))
    sums = [{"q": f"{first}+{second}", "a": str(first + second)} for first in range(8) for second in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    texts = [f"{WORDS[n % 3]} and {WORDS[(n + 1) % 3]} number {n}" for n in range(80)]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def numbers(case: dict[str, Any], data: Path) -> dict[str, Any]:
    dataset = case["dataset"] | {"train_file": str(data / case["dataset"]["train_file"])}
    result = run(from_dict(case | COMMON | {"dataset": dataset, "runs_dir": str(data)}))
    assert result.status == "finished", result.error
    of_the_clock = ("seconds", "rss")
    return {
        "run_id": result.run_id,
        "target_modules": result.target_modules,
        "metrics": {
            name: value
            for name, value in sorted(result.metrics.items())
            if not any(word in name for word in of_the_clock) and name != "train_tokens_per_second"
        },
    }


@pytest.mark.parametrize("name", CASES)
def test_a_tiny_run_keeps_its_numbers(name: str, data: Path) -> None:
    found = numbers(CASES[name], data)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"machine": {}, "runs": {}}
    if os.environ.get("GOLDEN") == "write":
        golden["machine"], golden["runs"][name] = machine(), found
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    expected = golden["runs"][name]
    if golden["machine"] == machine():
        assert found == expected
    else:
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-3, abs=1e-4)
        assert {**found, "metrics": {}} == {**expected, "metrics": {}}
