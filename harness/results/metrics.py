"""The registry of metrics: every name that a result may have, its unit, direction and form in tables."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from typing import Any, Literal

# A classifier has collapsed when one class receives more than this share of its predictions.
COLLAPSED_ABOVE = 0.999


class Direction(StrEnum):
    """Which way a metric improves."""

    HIGHER = "higher"
    LOWER = "lower"
    NEUTRAL = "neutral"


@dataclass(frozen=True)
class Metric:
    """What one number means.

    `label` is the column title of a table; `format` is a format specification applied to the value divided by
    `display_divisor`, which turns the stored unit into `display_unit`. `largest` is the largest value there can be:
    figures end intervals there.
    """

    unit: str
    direction: Direction
    label: str
    format: str
    display_unit: str = ""
    display_divisor: float = 1.0
    largest: float = math.inf

    def digits(self, value: float) -> str:
        """A value in its stored unit as text in the display unit, without the unit."""
        shown = value / self.display_divisor
        # Nothing measures so much; of what is there all the same nobody reads a hundred digits.
        return f"{shown:{self.format if abs(shown) < 1e15 else '.4g'}}"

    def text(self, value: float) -> str:
        """Label, value and unit, for a line without columns."""
        return f"{self.label} {self.digits(value)}{f' {self.display_unit}' if self.display_unit else ''}"


MIB = 1024.0**2


def bytes_text(num_bytes: float) -> str:
    """Bytes in the unit that reads best, with the constant in its name.

    >>> bytes_text(1000), bytes_text(24 * 2**20), bytes_text(1.5 * 2**40)
    ('1,000 B', '24.00 MiB', '1,536.00 GiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= (size if size > 2**10 else 100 * size):
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes:,.0f} B"


def duration_text(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def _count(label: str) -> Metric:
    return Metric("1", Direction.LOWER, label, ",.0f")


def _memory(label: str) -> Metric:
    return Metric("bytes", Direction.LOWER, label, ",.1f", "MiB", MIB)


def _score(label: str) -> Metric:
    return Metric("1", Direction.HIGHER, label, "z.4f", largest=1.0)


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
    # Of the tasks that the run continues: means over them of each one's own score on test (its `best_metric`), when it
    # had been trained and at the best step of this run, with the head that it had; and how much of that is gone.
    "earlier_tasks_score_before": Metric("1", Direction.NEUTRAL, "earlier tasks before", "z.4f"),
    "earlier_tasks_score": Metric("1", Direction.HIGHER, "earlier tasks", "z.4f"),
    "forgetting_score": Metric("1", Direction.LOWER, "forgotten of earlier tasks", "+z.4f"),
    # Of the model as training found it; a language model has such a score, a fresh task head has none worth having.
    "val_nll_before": Metric("nats", Direction.NEUTRAL, "val nll before training", "z.4f"),
    "test_nll_before": Metric("nats", Direction.NEUTRAL, "test nll before training", "z.4f"),
}


@dataclass(frozen=True)
class Score:
    """A score of a split: of which tasks, from what it is computed, and how it is shown.

    Attributes:
        metric: unit, direction and form; its label gets the split's name in front.
        tasks: the tasks that have it, by their names in a config.
        of: what it is computed from: the `loss`, `predictions` of labels, or `generated` texts. Generated texts are
            scored once, at the end and on test.
        scorer: for predictions and generated texts, the function that computes it, as `module:function`; imported where
            it is needed, and called as `harness.tasks.labelled.Scorer` or `harness.tasks.generation_scores.Scorer`.
    """

    metric: Metric
    tasks: tuple[str, ...]
    of: Literal["loss", "predictions", "generated"]
    scorer: str = ""


_LABELLED = "harness.tasks.labelled"
_GENERATED = "harness.tasks.generation_scores"
LANGUAGE_TASKS = ("causal_lm", "completion", "chat")
_PROMPTED = ("completion", "chat")

SCORES: dict[str, Score] = {}


def register_score(name: str, score: Score) -> None:
    """Adds a score to `SCORES`, and to `METRICS` on both splits and at both moments.

    `val_accuracy` belongs to the step that was best on val, `val_accuracy_last` to the last step. No quantity is ever
    chosen on test.
    """
    SCORES[name] = score
    for split in ("val", "test"):
        METRICS.update(_on_split(split, name, score.metric))


def _on_split(split: str, name: str, metric: Metric) -> dict[str, Metric]:
    label = f"{split} {metric.label}"
    return {
        f"{split}_{name}": replace(metric, label=label),
        f"{split}_{name}_last": replace(metric, label=f"{label} (last step)"),
    }


def scores_of(task: str | None = None, *, of: str | None = None) -> tuple[str, ...]:
    """Names of the scores that a task has, in the order of the registry; of one kind where `of` says so."""
    return tuple(
        name
        for name, score in SCORES.items()
        if (task is None or task in score.tasks) and (of is None or score.of == of)
    )


@functools.cache
def find_scorer(score: str) -> Any:
    """The function that computes a score, as `SCORES` names it."""
    module, _, function = SCORES[score].scorer.partition(":")
    return getattr(importlib.import_module(module), function)


def _of_predictions(metric: Metric, task: str, function: str) -> Score:
    return Score(metric, (task,), "predictions", f"{_LABELLED}:{function}")


def _of_generated(metric: Metric, function: str) -> Score:
    return Score(metric, _PROMPTED, "generated", f"{_GENERATED}:{function}")


SCORES |= {
    "accuracy": _of_predictions(_score("accuracy"), "classification", "accuracy"),
    "nll": Score(Metric("nats", Direction.LOWER, "nll", "z.4f"), ("classification", *LANGUAGE_TASKS), "loss"),
    "f1": _of_predictions(_score("F1"), "classification", "f1"),
    "mcc": _of_predictions(_score("MCC"), "classification", "mcc"),
    "pearson": _of_predictions(_score("Pearson"), "regression", "pearson"),
    "spearman": _of_predictions(_score("Spearman"), "regression", "spearman"),
    "mse": Score(Metric("1", Direction.LOWER, "mse", "z.4f"), ("regression",), "loss"),
    "perplexity": Score(Metric("1", Direction.LOWER, "perplexity", "z.2f"), LANGUAGE_TASKS, "loss"),
    # Of the target text in UTF-8: the one that compares models with different tokenizers.
    "bits_per_byte": Score(Metric("bits/byte", Direction.LOWER, "bits per byte", "z.4f"), LANGUAGE_TASKS, "loss"),
    # BLEU and chrF from 0 to 100, ROUGE-L and the shares from 0 to 1.
    "bleu": _of_generated(Metric("1", Direction.HIGHER, "BLEU", "z.2f"), "bleu"),
    "chrf": _of_generated(Metric("1", Direction.HIGHER, "chrF", "z.2f"), "chrf"),
    "rouge_l": _of_generated(_score("ROUGE-L"), "rouge_l"),
    "nist": _of_generated(Metric("1", Direction.HIGHER, "NIST", "z.3f"), "nist"),
    "exact_match": _of_generated(_score("exact match"), "exact_match"),
    "number_match": _of_generated(_score("final number right"), "number_match"),
    # Largest share of the predictions that one class received: 1.0 marks a collapsed classifier. Always computed.
    "majority_share": Score(
        Metric("1", Direction.NEUTRAL, "share of the most predicted class", ".3f"), (), "predictions"
    ),
}
for _split in ("val", "test"):
    for _name, _registered in SCORES.items():
        METRICS.update(_on_split(_split, _name, _registered.metric))


def _is_finite_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Raises `ValueError` naming every metric that is unknown or not a finite number."""
    problems = [f"{name!r} is not in the METRICS registry" for name in metrics if name not in METRICS]
    problems += [
        f"{name}={value!r} is not a finite number; leave the key out instead"
        for name, value in metrics.items()
        if not _is_finite_number(value)
    ]
    if problems:
        raise ValueError("metrics: " + "; ".join(problems))
