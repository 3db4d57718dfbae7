"""A method, a metric and a dataset that nobody has: one file or record each, in a folder, and they run.

The counterpart for an architecture is in test_extensions.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.results.schema import ResultError, Status, read_result

ROOT = Path(__file__).resolve().parent.parent

# What an extension registers when it is imported; it needs no torch.
RECORDS = """
from harness.results.methods import METHODS, Method
from harness.results.metrics import Direction, Metric, Score, register_score

METHODS["biases"] = Method("the biases", "made_up.biases", trains="biases and head", weights_dir="biases")
register_score(
    "balanced_accuracy",
    Score(
        Metric("1", Direction.HIGHER, "balanced accuracy", "z.4f"),
        ("classification",),
        "predictions",
        "made_up.scores:balanced_accuracy",
    ),
)
"""
METHOD = """
from harness.methods.peft_files import save_tensors

def adapt(model, targets, config):
    assert targets == []

def is_adapter(name):
    return name.endswith(".bias")

def save(trained, directory):
    biases = {name: value for name, value in trained.model.named_parameters() if value.requires_grad}
    return save_tensors(biases, directory / "biases.safetensors")
"""
SCORES = """
from sklearn.metrics import balanced_accuracy_score

def balanced_accuracy(predictions):
    return float(balanced_accuracy_score(predictions.truth, predictions.predicted))
"""
DATASET = """
name: fruit
train_file: fruit.csv
max_length: 32
metrics: [accuracy, balanced_accuracy]
best_metric: balanced_accuracy
"""


def make_project(folder: Path) -> None:
    """A folder with own configs, and beside them a distribution as pip installs one."""
    for name, text in {
        "conf/dataset/fruit.yaml": DATASET,
        "conf/method/biases.yaml": "name: biases\nlearning_rate: 1e-2\n",
        "packages/made_up/__init__.py": "",
        "packages/made_up/records.py": RECORDS,
        "packages/made_up/biases.py": METHOD,
        "packages/made_up/scores.py": SCORES,
        "packages/made_up-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n",
        "packages/made_up-1.0.dist-info/entry_points.txt": "[lora_harness]\nmade_up = made_up.records\n",
        "fruit.csv": "text,label\n" + "".join(f"{('apple', 'zinc')[n % 2]} {n},{n % 2}\n" for n in range(60)),
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder / "packages"), str(ROOT)]),
        "LORA_HARNESS_CACHE": str(folder / "cache"),
    }
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_method_a_metric_and_a_dataset_run_and_are_reported(tmp_path: Path) -> None:
    make_project(tmp_path)
    settings = ["model=tiny_bert", "dataset=fruit", "method=biases", "trainer=debug", "tracking=off", "device=cpu"]
    made = call(tmp_path, "harness", *settings, "sweep=made_up")
    assert made.returncode == 0, made.stderr
    (path,) = tmp_path.glob("runs/*/result.json")
    # This process has not loaded the extension, and refuses the metric that it does not know.
    with pytest.raises(ResultError, match="test_balanced_accuracy"):
        read_result(path)
    result = json.loads(path.read_text())
    assert result["status"] == Status.FINISHED
    metrics = result["metrics"]
    # Per block 4 of width 64 in attention, 128 and 64 in the MLP, and 2 norms; embeddings' norm; the pooler.
    assert metrics["num_adapter_params"] == 2 * (4 * 64 + 128 + 64 + 2 * 64) + 64 + 64
    assert metrics["num_head_params"] == 2 * 64 + 2
    assert metrics["num_trainable_params"] == metrics["num_adapter_params"] + metrics["num_head_params"]
    assert 0 <= metrics["test_balanced_accuracy"] <= 1
    assert (path.parent / "biases/biases.safetensors").is_file()

    report = call(tmp_path, "analysis", "report", "--sweep", "made_up")
    assert report.returncode == 0, report.stderr
    printed = report.stdout + "".join(found.read_text() for found in (tmp_path / "reports").rglob("*.md"))
    assert "biases" in printed and "balanced accuracy" in printed

    refused = call(tmp_path, "harness", *settings, "rank=r2")
    assert refused.returncode == 2
    assert "method=biases takes no rank" in refused.stderr
