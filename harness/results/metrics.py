"""The registry of metrics: every name that a result may have, its unit, direction and form in tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum


class Direction(StrEnum):
    """Which way a metric improves."""

    HIGHER = "higher"
    LOWER = "lower"
    NEUTRAL = "neutral"


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
    # apart, and not in `peak_rss_bytes` either (harness/processes/preparation.py).
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
    # Multiplications and additions of all training steps, forward and backward, by formula (harness/methods/flops.py).
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
    # Of generated texts (harness/tasks/generation_scores.py): BLEU and chrF from 0 to 100, ROUGE-L and the shares from
    # 0 to 1.
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
