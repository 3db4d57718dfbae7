"""The files of a run's folder: their names, and how they are written so that none is ever half there."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from harness.results.methods import METHODS

RESULT_FILE = "result.json"
CONFIG_FILE = "config.yaml"
CURVE_FILE = "metrics.jsonl"
LOG_FILE = "log.txt"
PREDICTIONS_DIR = "predictions"
GENERATIONS_DIR = "generations"
GENERATIONS_FILE = "generations.jsonl"
HYPOTHESES_FILE = "hypotheses.txt"
REFERENCES_FILE = "references.tsv"
LABELS_FILE = "labels.json"
# Of a folder of runs: what a sweep is to test, by its name.
SUGGESTIONS_DIR = "suggestions"
# In the place of a whole model: what full fine-tuning changed of its base.
DIFFERENCE_FILE = "difference.safetensors"
HEADS_DIR = "heads"
WANDB_DIR = "wandb"
TRACKIO_DIR = "trackio"
TENSORBOARD_DIR = "tensorboard"

# While a run is computed, and where it was stopped.
CLAIMS_DIR = "claims"
CHECKPOINT_FILE = "checkpoint.safetensors"
PHASES_FILE = "phases.jsonl"
SAVING_DIR = ".saving"
RERUN_DIR = ".rerun"


def output_dirs() -> tuple[str, ...]:
    """What a run leaves beside its result and its logs: its method's folder, predictions, and generated texts."""
    return (*dict.fromkeys(method.weights_dir for method in METHODS.values()), PREDICTIONS_DIR, GENERATIONS_DIR)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes so that a reader sees either the old file or the whole new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp, whose files nobody else on a shared file system may read.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json_atomically(path: Path, value: Any) -> None:
    """Writes `value` as JSON, like `write_atomically`."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
