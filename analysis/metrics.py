"""What a number means: measured or derived metrics, how they are summarised, and their values as text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache

from harness.results.metrics import METRICS, Direction, Metric, scores_of

# Computed here from others, so not in the registry of what runs record.
TRAINABLE_SHARE = "trainable_share"
LEARNED = "learned_nll"
# Of a search: the values that were tried before a run was reported, and the compute of all their trials.
NUM_TRIALS = "num_trials"
TUNING_FLOPS = "tuning_flops"
DERIVED = {
    NUM_TRIALS: Metric("1", Direction.NEUTRAL, "trials", ",.0f"),
    TUNING_FLOPS: replace(METRICS["train_flops"], label="tuning compute"),
    TRAINABLE_SHARE: Metric("1", Direction.LOWER, "trainable", ".3f", "%", 0.01),
    LEARNED: Metric("nats", Direction.HIGHER, "learned: test nll before \N{MINUS SIGN} after", "+z.4f"),
}
FORGETTING = "forgetting_nll"
FORGETTING_SCORE = "forgetting_score"
# Means over seeds with a spread that counts, as the scores on val and test are.
_QUALITY = {FORGETTING, LEARNED, "base_domain_nll", FORGETTING_SCORE, "earlier_tasks_score"}
# What the memory peak is made of.
MEMORY_PARTS = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes")

# Of generated texts: on test, at the step that was best on val, and nowhere else.
GENERATION_SCORES = scores_of(of="generated")
# Step times are skewed by whatever else the machine does: a median, and the range instead of a deviation.
BY_MEDIAN = {"step_seconds_median"}
# A property of the machine as much as of the method.
BY_DEVICE = {"step_seconds_median", "train_tokens_per_second"}
ARROWS = {Direction.HIGHER: " ↑", Direction.LOWER: " ↓", Direction.NEUTRAL: ""}


STYLES = ("report", "paper")
_STYLE: ContextVar[str] = ContextVar("style", default="report")


@contextmanager
def table_style(style: str) -> Iterator[None]:
    """How tables that are made inside show scores: `paper` has shares times 100, and one decimal.

    A context, as `decimal.localcontext` is one for digits: which number stands where does not depend on it.
    """
    if style not in STYLES:
        raise ValueError(f"style={style!r}: must be one of {', '.join(STYLES)}")
    token = _STYLE.set(style)
    try:
        yield
    finally:
        _STYLE.reset(token)


def metric(name: str) -> Metric:
    """What a measured or derived number means, and how it is shown in the style of the table that is being made."""
    about = DERIVED[name] if name in DERIVED else METRICS[name]
    if _STYLE.get() == "paper" and is_score(name):
        if _is_share(name, about):
            return replace(about, display_unit="%", display_divisor=0.01, format=f"{about.format[:-2]}1f")
        if not _OUT_OF_100.isdisjoint(name.split("_")):
            return replace(about, format=f"{about.format[:-2]}1f")
    return about


_OUT_OF_100 = {"bleu", "chrf"}


def _is_share(name: str, about: Metric) -> bool:
    """Whether a score lies between 0 and 1, or -1 and 1."""
    return about.unit == "1" and about.format.endswith((".4f", ".3f")) and {"mse", "nist"}.isdisjoint(name.split("_"))


@cache  # asked for each metric of each cell
def is_score(name: str) -> bool:
    """Whether a metric is one of quality: a score on val or test, or what was learned and forgotten."""
    return name.startswith(("val_", "test_")) or name in _QUALITY


def is_better(name: str, value: float, other: float) -> bool:
    """Whether a value of a metric is better than another."""
    return value < other if metric(name).direction is Direction.LOWER else value > other


def title(name: str) -> str:
    """A metric as the title of a column: label, unit, arrow to the better side."""
    about = metric(name)
    return f"{about.label}{f' ({about.display_unit})' if about.display_unit else ''}{ARROWS[about.direction]}"


def format_value(name: str, value: float) -> str:
    """A value of a metric, in its stored unit, as text in its display unit, without the unit."""
    return metric(name).digits(value)


def format_spread(name: str, value: float) -> str:
    """A deviation of a metric as text in its display unit: without the sign that a difference always has."""
    about = metric(name)
    return replace(about, format=about.format.removeprefix("+")).digits(value)
