"""Classification and regression: the loss over a head's outputs, and scores of predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from torch.nn import functional

from harness.config.schema import DatasetConfig, Task
from harness.data.batches import Batch
from harness.data.labelled import Split
from harness.processes.stopping import StopRequest
from harness.results.metrics import METRICS, Direction, find_scorer, scores_of
from harness.tasks.objective import Evaluation, SummedLoss, cross_entropy, evaluating, largest_batch


class SequenceObjective:
    """One label per text: classification by cross-entropy, or regression by squared error.

    `positive_class` is the index of the class of which `f1` is the score, where there are two.
    """

    def __init__(
        self,
        config: DatasetConfig,
        *,
        val: Split,
        eval_batch_size: int,
        label_smoothing: float = 0.0,
        positive_class: int | None = None,
        others: Sequence[Split] = (),
        keeps_logits: bool = False,
        stop: StopRequest | None = None,
    ) -> None:
        """`others` are the splits beside val that will be scored; `stop` is checked between batches.

        `keeps_logits`: whether an evaluation holds the logits that it scored.
        """
        self._config = config
        self._positive_class = positive_class
        self._label_smoothing = label_smoothing
        self._val = val
        self._splits = (val, *others)
        self._keeps_logits = keeps_logits
        self._stop = stop or StopRequest()
        self._eval_batch_size = eval_batch_size
        self.loss_name = "train_mse" if config.task is Task.regression else "train_nll"

    def summed_loss(self, model: nn.Module, batch: Batch) -> SummedLoss:
        """Summed cross-entropy in nats, or summed squared error."""
        return _summed_loss(self._config.task, _logits(model, batch), batch.labels, self._label_smoothing)

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Scores on the validation split."""
        return self.evaluate_split(model, self._val)

    def evaluate_split(self, model: nn.Module, split: Split) -> Evaluation:
        """Scores on any split."""
        logits, labels = predict(model, self._stop.between(split.batches(self._eval_batch_size), "scoring"))
        scores = score(logits, labels, config=self._config, positive_class=self._positive_class)
        best = self._config.best_metric
        sign = 1.0 if METRICS[f"val_{best}"].direction is Direction.HIGHER else -1.0
        in_order = None
        if self._keeps_logits:
            in_order = torch.empty_like(logits)
            in_order[torch.from_numpy(split.scoring_order)] = logits
        return Evaluation(scores, sign * scores[best] if best in scores else -math.inf, in_order)

    def makes_whole_logits(self, model: nn.Module) -> bool:
        """No: a classifier has one row of logits a text."""
        return False

    def rehearse(self, model: nn.Module) -> None:
        """One forward pass on the largest batch of all splits."""
        predict(model, [largest_batch(self._splits, self._eval_batch_size)])


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch.inputs).logits.float()


def _summed_loss(task: Task, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> SummedLoss:
    if task is Task.regression:
        return SummedLoss(functional.mse_loss(logits.squeeze(-1), labels, reduction="sum"))
    return cross_entropy(logits, labels, label_smoothing=label_smoothing)


def predict(model: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Logits `(examples, labels)` and labels `(examples,)` of all batches, on the CPU, without dropout."""
    device = next(model.parameters()).device
    logits, labels = [], []
    with evaluating(model):
        for batch in batches:
            logits.append(_logits(model, batch.to(device)).cpu())
            labels.append(batch.labels)
    return torch.cat(logits), torch.cat(labels)


def score(
    logits: Tensor, labels: Tensor, *, config: DatasetConfig, positive_class: int | None = None
) -> dict[str, float]:
    """The configured metrics and the best one, plus always the loss in its reporting unit.

    Classification: `nll` in nats per example, and `majority_share`, the largest share of predictions that fell on
    one class (1.0: the model has collapsed). Regression: `mse`. `f1` is that of `positive_class` for two classes
    (None: of class 1), else the macro average. What does not exist is left out: a correlation without variance, and
    everything where a logit is not a finite number.
    """
    if not torch.isfinite(logits).all():
        return {}
    mean_loss = float(_summed_loss(config.task, logits, labels).minimised) / len(labels)
    if config.task is Task.regression:
        scores = {"mse": mean_loss}
        predictions = Predictions(logits.squeeze(-1).double().numpy(), labels.double().numpy())
    else:
        predicted = logits.argmax(-1).numpy()
        scores = {"nll": mean_loss, "majority_share": float(np.bincount(predicted).max() / len(predicted))}
        predictions = Predictions(predicted, labels.numpy(), logits.shape[-1], positive_class)
    wanted = dict.fromkeys([*config.metrics, config.best_metric])
    for name in scores_of(config.task, of="predictions"):
        if name in wanted:
            scorer: Scorer = find_scorer(name)
            scores[name] = scorer(predictions)
    return {name: value for name, value in scores.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Predictions:
    """What a score of labels is computed from.

    `predicted` and `truth`: `(examples,)`, class indices of `num_classes` classes, or the values of a regression.
    `positive_class` is the class of which F1 is the score where there are two (None: class 1).
    """

    predicted: np.ndarray
    truth: np.ndarray
    num_classes: int = 0
    positive_class: int | None = None


Scorer = Callable[[Predictions], float]
"""From predictions to a score; NaN where it does not exist."""


def accuracy(predictions: Predictions) -> float:
    """Share of the examples whose class is right."""
    return float(accuracy_score(predictions.truth, predictions.predicted))


def f1(predictions: Predictions) -> float:
    """F1 of the positive class of two, else the macro average."""
    return float(
        f1_score(
            predictions.truth,
            predictions.predicted,
            average="binary" if predictions.num_classes == 2 else "macro",
            pos_label=1 if predictions.positive_class is None else predictions.positive_class,
            zero_division=0.0,
        )
    )


def mcc(predictions: Predictions) -> float:
    """Matthews correlation coefficient."""
    return float(matthews_corrcoef(predictions.truth, predictions.predicted))


def pearson(predictions: Predictions) -> float:
    """Pearson correlation; NaN without variance."""
    return _correlation(scipy.stats.pearsonr, predictions)


def spearman(predictions: Predictions) -> float:
    """Spearman rank correlation, ties averaged; NaN without variance."""
    return _correlation(scipy.stats.spearmanr, predictions)


def _correlation(function: Callable[..., Any], predictions: Predictions) -> float:
    predicted, truth = predictions.predicted, predictions.truth
    if np.ptp(predicted) == 0 or np.ptp(truth) == 0:
        return math.nan
    return float(function(predicted, truth).statistic)
