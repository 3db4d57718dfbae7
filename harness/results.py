"""The one results schema: what a run leaves behind, and what its numbers mean.

`runs/<run_id>/result.json` is written once, atomically, at the end of a run: its existence means that the run ended.
Everything downstream (the analysis package, W&B, the launcher that skips finished work) reads this file and never
parses a name, a path or a log.

A measurement that could not be made is a key that is absent from `metrics`: never 0, -1 or NaN.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
RESULT_FILE = "result.json"


# Where a model or a dataset comes from. Once its content is known, it decides nothing.
MODEL_SOURCE = ("asset", "hub_id", "revision", "tiny", "path", "run", "scratch")
DATA_SOURCE = (
    "asset",
    "hub_id",
    "subset",
    "revision",
    "path",
    "train_file",
    "val_file",
    "test_file",
    "train_split",
    "val_split",
    "test_split",
)

# Settings by dotted name, or whole groups of them, that cannot change a result: no part of a run's identity, and no
# difference between recipes. The only such list.
SETTINGS_WITHOUT_EFFECT = {
    "dataset.generation.batch_size",
    "method.learning_rate",  # only what trainer.learning_rate falls back to
    "trainer.eval_batch_size",
    "trainer.checkpoint_every",
    "tracking",
    "sweep",
    "runs_dir",
    "rerun",
    "device",  # asked for; environment.device_type and device_name say what it was
    "num_threads",  # likewise
    "allow_busy_device",
    "save_weights",
    "shard_model",  # what it came to is in the environment
}
# The same for what a run records of its environment.
FACTS_WITHOUT_EFFECT = {
    "hostname",  # a name; what the machine is made of is compared
    "data_notes",  # follow from the data and the tokenizer, which are compared
    "model_notes",  # follow from the base model, likewise
    "label_names",  # follow from the data
    "started_at",
    "first_step_at",
    "ended_at",
    "evaluated_also",  # scores, which every run has of its own
}


def is_setting_without_effect(name: str) -> bool:
    """Whether a setting, or the group that it is in, cannot change a result.

    >>> [is_setting_without_effect(name) for name in ("tracking.entity", "seed", "evaluate_also.x.generation")]
    [True, False, True]
    """
    group, _, rest = name.partition(".")
    if group == "evaluate_also":
        inner = rest.partition(".")[2]
        # Of additional evaluation datasets only the nll is taken: no text is generated.
        return inner.partition(".")[0] == "generation" or _is_listed(f"dataset.{inner}", SETTINGS_WITHOUT_EFFECT)
    return _is_listed(name, SETTINGS_WITHOUT_EFFECT)


def is_fact_without_effect(name: str) -> bool:
    """Whether a fact of the environment, by its name below `environment`, stands behind no number."""
    return _is_listed(name, FACTS_WITHOUT_EFFECT)


def _is_listed(name: str, listed: set[str]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in listed)


class Status(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out_of_memory"
    FAILED = "failed"


class Direction(StrEnum):
    """Which way a metric improves."""

    HIGHER = "higher"
    LOWER = "lower"
    NEUTRAL = "neutral"


class ResultError(ValueError):
    """A result file that cannot be read as one of ours; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Metric:
    """What one number means.

    `label` is the column title of a table; `format` is a format specification applied to the value divided by
    `display_divisor`, which turns the stored unit into `display_unit`.
    """

    unit: str
    direction: Direction
    label: str
    format: str
    display_unit: str = ""
    display_divisor: float = 1.0


MIB = 1024.0**2


def duration_text(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def _count(label: str) -> Metric:
    return Metric("1", Direction.LOWER, label, ",.0f")


def _memory(label: str) -> Metric:
    return Metric("bytes", Direction.LOWER, label, ",.1f", "MiB", MIB)


def _score(label: str) -> Metric:
    return Metric("1", Direction.HIGHER, label, "z.4f")


METRICS: dict[str, Metric] = {
    "num_adapter_params": _count("adapter params"),
    "num_head_params": _count("head params"),
    "num_trainable_params": _count("trainable params"),
    "num_total_params": Metric("1", Direction.NEUTRAL, "total params", ",.0f"),
    # Live tensor bytes; the same wherever the same operations run, which depends on device and version of PyTorch.
    "peak_memory_bytes": _memory("peak memory"),
    "weights_bytes": _memory("weights"),
    "gradients_bytes": _memory("gradients"),
    "optimizer_bytes": _memory("optimizer"),
    "activations_bytes": _memory("activations"),
    "cuda_peak_allocated_bytes": _memory("CUDA peak allocated"),
    "cuda_peak_reserved_bytes": _memory("CUDA peak reserved"),
    "peak_rss_bytes": _memory("peak RSS"),
    "train_seconds": Metric("s", Direction.LOWER, "training time", ",.1f", "s"),
    "step_seconds_median": Metric("s", Direction.LOWER, "step time", ",.1f", "ms", 1e-3),
    # The whole run but what the first run of a sweep does for all: fetching, learning a vocabulary, tokenising. That is
    # apart, and not in `peak_rss_bytes` either (harness/preparation.py).
    "preparation_seconds": Metric("s", Direction.NEUTRAL, "preparation time", ",.1f", "s"),
    "wall_seconds": Metric("s", Direction.LOWER, "wall time", ",.1f", "s"),
    "train_tokens_per_second": Metric("tokens/s", Direction.HIGHER, "throughput", ",.0f", "tokens/s"),
    "padding_overhead": Metric("1", Direction.LOWER, "padding overhead", ".3f"),
    "checkpoint_bytes": Metric("bytes", Direction.LOWER, "checkpoint", ",.2f", "MiB", MIB),
    "num_steps": Metric("1", Direction.NEUTRAL, "steps", ",.0f"),
    "best_step": Metric("1", Direction.NEUTRAL, "best step", ",.0f"),
    # Means over the targets of the last 10 steps (all of them, where there are fewer) as training computed them: with
    # dropout, before the step's update, and without label smoothing.
    "train_nll": Metric("nats", Direction.LOWER, "train nll", ".4f"),
    "train_mse": Metric("1", Direction.LOWER, "train mse", ".4f"),
    # Multiplications and additions of all training steps, forward and backward, by formula (harness/flops.py).
    "train_flops": Metric("FLOP", Direction.LOWER, "training compute", ",.1f", "TFLOP", 1e12),
    # The first set of `evaluate_also`, the domain that the base model comes from: its nll before training and at the
    # best step, and the difference of the two.
    "base_domain_nll_before": Metric("nats", Direction.NEUTRAL, "base domain nll before", "z.4f"),
    "base_domain_nll": Metric("nats", Direction.LOWER, "base domain nll", "z.4f"),
    "forgetting_nll": Metric("nats", Direction.LOWER, "forgetting", "+z.4f"),
    "base_domain_nll_last": Metric("nats", Direction.LOWER, "base domain nll (last step)", "z.4f"),
    "forgetting_nll_last": Metric("nats", Direction.LOWER, "forgetting (last step)", "+z.4f"),
    # Of the model as training found it; a language model has such a score, a fresh task head has none worth having.
    "val_nll_before": Metric("nats", Direction.NEUTRAL, "val nll before training", "z.4f"),
    "test_nll_before": Metric("nats", Direction.NEUTRAL, "test nll before training", "z.4f"),
}

# Scores exist on two splits and at two moments: `val_accuracy` belongs to the step that was best on val,
# `val_accuracy_last` to the last step. No quantity is ever chosen on test.
_SCORES = {
    "accuracy": _score("accuracy"),
    "nll": Metric("nats", Direction.LOWER, "nll", "z.4f"),
    "f1": _score("F1"),
    "mcc": _score("MCC"),
    "pearson": _score("Pearson"),
    "spearman": _score("Spearman"),
    "mse": Metric("1", Direction.LOWER, "mse", "z.4f"),
    "perplexity": Metric("1", Direction.LOWER, "perplexity", "z.2f"),
    # Of the target text in UTF-8: the one that compares models with different tokenizers.
    "bits_per_byte": Metric("bits/byte", Direction.LOWER, "bits per byte", "z.4f"),
    # Of generated texts (harness/scores.py): BLEU and chrF from 0 to 100, ROUGE-L and the shares from 0 to 1.
    "bleu": Metric("1", Direction.HIGHER, "BLEU", "z.2f"),
    "chrf": Metric("1", Direction.HIGHER, "chrF", "z.2f"),
    "rouge_l": _score("ROUGE-L"),
    "nist": Metric("1", Direction.HIGHER, "NIST", "z.3f"),
    "exact_match": _score("exact match"),
    "number_match": _score("final number right"),
    # Largest share of the predictions that one class received: 1.0 marks a collapsed classifier.
    "majority_share": Metric("1", Direction.NEUTRAL, "share of the most predicted class", ".3f"),
}
for _split in ("val", "test"):
    for _name, _metric in _SCORES.items():
        METRICS[f"{_split}_{_name}"] = Metric(
            _metric.unit, _metric.direction, f"{_split} {_metric.label}", _metric.format
        )
        METRICS[f"{_split}_{_name}_last"] = Metric(
            _metric.unit, _metric.direction, f"{_split} {_metric.label} (last step)", _metric.format
        )


@dataclass(frozen=True)
class RunResult:
    """One ended run. Fields as in the results contract; `config` is the validated config, verbatim.

    Raises `TypeError` for a field of another type, and `ValueError` for a metric that the registry does not know or
    whose value is not a finite number: a missing measurement is a missing key.
    """

    run_id: str
    cell_id: str
    sweep: str | None
    status: Status
    config: dict[str, Any]
    target_modules: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name, kind in _FIELD_TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected {kind}, got {value!r:.60}")
        if not all(isinstance(name, str) for name in self.target_modules):
            raise TypeError("target_modules: expected a list of names")
        check_metrics(self.metrics)


_FIELD_TYPES: dict[str, Any] = {
    "run_id": str,
    "cell_id": str,
    "sweep": str | None,
    "status": Status,
    "config": dict,
    "target_modules": list,
    "metrics": dict,
    "environment": dict,
    "error": str,
}


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Raises `ValueError` naming every metric that is unknown or not a finite number."""
    problems = [f"{name!r} is not in the METRICS registry" for name in metrics if name not in METRICS]
    problems += [
        f"{name}={value!r} is not a finite number; leave the key out instead"
        for name, value in metrics.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value)
    ]
    if problems:
        raise ValueError("metrics: " + "; ".join(problems))


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


def write_result(run_dir: Path, result: RunResult) -> Path:
    """Writes `result` to `run_dir/result.json` atomically and returns its path."""
    path = run_dir / RESULT_FILE
    write_json_atomically(path, asdict(result))
    return path


def read_result(path: Path) -> RunResult:
    """Reads one result file.

    Raises `ResultError` when the file is not JSON, not of this schema version, or holds unknown fields or metrics.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ResultError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ResultError(f"{path}: schema_version {version!r}, this code reads {SCHEMA_VERSION}")
    try:
        return RunResult(**{**raw, "status": Status(raw["status"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ResultError(f"{path}: {error}") from error
