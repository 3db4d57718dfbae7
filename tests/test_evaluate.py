"""Scores: equal to the references, to numbers worked by hand, and taken without a trace on the model."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import sklearn.metrics
import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.config.schema import DatasetConfig, ModelConfig, Task, TinyModel
from harness.data.labelled import TextData, load_data
from harness.models.loading import load_model
from harness.models.tokenizers import load_tokenizer
from harness.tasks.labelled import SequenceObjective, predict, score
from harness.tasks.objective import cross_entropy


def classification(*metrics: str, best: str = "accuracy") -> DatasetConfig:
    return DatasetConfig(name="x", metrics=list(metrics), best_metric=best)


def regression(*metrics: str, best: str = "mse") -> DatasetConfig:
    return DatasetConfig(name="x", task=Task.regression, metrics=list(metrics), best_metric=best)


def logits_of(predicted: list[int], num_classes: int) -> Tensor:
    """Logits that predict these classes, with a margin of 1."""
    return nn.functional.one_hot(torch.tensor(predicted), num_classes).float()


def column(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


# ---------------------------------------------------------------- against the references


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_classification_scores_are_those_of_the_references(num_classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(200, num_classes, generator=generator)
    labels = torch.randint(num_classes, (200,), generator=generator)
    logits[torch.arange(200), labels] += 0.7  # better than chance
    scores = score(logits, labels, config=classification("accuracy", "f1", "mcc", "nll"))
    predicted, truth = logits.argmax(-1).numpy(), labels.numpy()
    average = "binary" if num_classes == 2 else "macro"
    assert scores == pytest.approx(
        {
            "accuracy": sklearn.metrics.accuracy_score(truth, predicted),
            "f1": sklearn.metrics.f1_score(truth, predicted, average=average),
            "mcc": sklearn.metrics.matthews_corrcoef(truth, predicted),
            "nll": nn.functional.cross_entropy(logits, labels).item(),
            "majority_share": np.unique(predicted, return_counts=True)[1].max() / 200,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize("seed", range(3))
def test_regression_scores_are_those_of_the_references(seed: int) -> None:
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, 26, size=200) / 5  # many ties, as in STS-B
    predictions = np.round(targets + generator.normal(size=200), 1)
    scores = score(column(predictions), torch.tensor(targets).float(), config=regression("pearson", "spearman"))
    assert scores == pytest.approx(
        {
            "pearson": scipy.stats.pearsonr(predictions, targets).statistic,
            "spearman": scipy.stats.spearmanr(predictions, targets).statistic,
            "mse": np.mean((predictions - targets) ** 2),
        },
        rel=1e-5,
    )


# ---------------------------------------------------------------- by hand


def test_two_classes_by_hand() -> None:
    # Three true positives, one false positive, two false negatives, four true negatives.
    predicted = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    truth = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    scores = score(logits_of(predicted, 2), truth, config=classification("accuracy", "f1", "mcc"))
    # -log p is log(1 + e^-1) where right and log(1 + e) where wrong.
    nll = (7 * math.log(1 + math.exp(-1)) + 3 * math.log(1 + math.e)) / 10
    assert scores == pytest.approx(
        {
            "accuracy": 0.7,
            "f1": 2 * 3 / (2 * 3 + 1 + 2),
            "mcc": (3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6),
            "nll": nll,
            "majority_share": 0.6,
        }
    )


def test_f1_of_two_classes_is_that_of_class_one() -> None:
    truth = torch.tensor([0, 0, 0, 1])
    assert score(logits_of([0, 0, 0, 0], 2), truth, config=classification("f1"))["f1"] == 0.0
    assert score(logits_of([0, 1, 1, 1], 2), truth, config=classification("f1"))["f1"] == pytest.approx(0.5)


def test_f1_of_the_class_that_is_named() -> None:
    truth = torch.tensor([0, 0, 0, 1])
    logits = logits_of([0, 0, 1, 1], 2)
    named = [score(logits, truth, config=classification("f1"), positive_class=at)["f1"] for at in (None, 1, 0)]
    assert named == pytest.approx([2 / 3, 2 / 3, 4 / 5])


def test_f1_of_three_classes_is_their_mean() -> None:
    # Class 0: two of two right and none wrong, F1 1. Class 1: F1 2/3. Class 2: never right, F1 0.
    truth = torch.tensor([0, 0, 1, 2])
    scores = score(logits_of([0, 0, 1, 1], 3), truth, config=classification("f1"))
    assert scores["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_ranks_of_ties_are_averaged() -> None:
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: both have mean 2.5; covariance 4.5, variances 4.5 and 5.
    scores = score(column([0.1, 0.5, 0.5, 9.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]), config=regression("spearman"))
    assert scores["spearman"] == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_a_collapsed_classifier_shows() -> None:
    scores = score(logits_of([2] * 6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), config=classification("mcc", "f1"))
    assert scores["majority_share"] == 1.0
    assert scores["mcc"] == 0.0
    assert scores["f1"] == pytest.approx(0.5 / 3)


# ---------------------------------------------------------------- what does not exist


def test_a_correlation_without_variance_is_left_out() -> None:
    scores = score(column([1.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 3.0]), config=regression("pearson", "spearman"))
    assert scores == {"mse": pytest.approx(5 / 3)}
    assert score(column([1.0, 2.0]), torch.tensor([2.0, 2.0]), config=regression("pearson")).keys() == {"mse"}
    assert score(column([1.0]), torch.tensor([2.0]), config=regression("pearson")).keys() == {"mse"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_is_made_of_logits_that_are_no_numbers(bad: float) -> None:
    logits = logits_of([0, 1, 1, 0], 2)
    logits[2, 1] = bad
    assert score(logits, torch.tensor([0, 1, 1, 0]), config=classification("accuracy", "mcc", "f1")) == {}
    assert score(logits[:, 1:], torch.rand(4), config=regression("pearson")) == {}


def test_an_mse_too_large_for_float32_is_left_out() -> None:
    scores = score(column([1e30, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]), config=regression("pearson"))
    assert scores.keys() == {"pearson"}


def test_the_best_metric_is_scored_even_where_it_is_not_listed() -> None:
    assert "mcc" in score(logits_of([0, 1], 2), torch.tensor([0, 1]), config=classification("accuracy", best="mcc"))
    scores = score(column([0.0, 1.0]), torch.tensor([0.0, 1.0]), config=regression(best="spearman"))
    assert scores.keys() == {"mse", "spearman"}


# ---------------------------------------------------------------- on a model


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextData:
    """Sixty texts of many lengths in three classes, all of them in every split."""
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.csv"
    texts = [f"text {row} " + "z" * (11 * row % 60) for row in range(60)]
    pd.DataFrame({"text": texts, "label": ["a", "b", "c"] * 20}).to_csv(path, index=False)
    config = DatasetConfig(name="x", train_file=str(path), val_file=str(path), test_file=str(path))
    return load_data(config, load_tokenizer(ModelConfig(name="tiny", tiny=TinyModel.bert)))


def tiny_model(tiny: TinyModel = TinyModel.bert, *, dropout: float = 0.5, num_labels: int = 3) -> nn.Module:
    config = ModelConfig(name="tiny", tiny=tiny, dropout=dropout)
    return load_model(config, num_labels=num_labels, pad_token_id=0, seed=0).model


def objective(loaded: TextData, config: DatasetConfig | None = None, *, eval_batch_size: int = 16) -> SequenceObjective:
    config = config or classification("accuracy", "mcc")
    return SequenceObjective(config, val=loaded.val, eval_batch_size=eval_batch_size)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_no_trace(loaded: TextData, training: bool) -> None:
    model = tiny_model().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    objective(loaded).evaluate(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (str(np.random.get_state()), random.getstate()) == states[1:]
    assert {module.training for module in model.modules()} == {training}


def test_an_evaluation_that_fails_leaves_the_training_mode(loaded: TextData) -> None:
    model = tiny_model().train()
    batches = loaded.val.batches(8)
    with pytest.raises(RuntimeError, match="stop"):
        predict(model, (batch if number < 2 else fail() for number, batch in enumerate(batches)))
    assert model.training


def fail() -> Any:
    raise RuntimeError("stop")


@pytest.mark.parametrize("tiny", TinyModel)
def test_scores_do_not_depend_on_the_evaluation_batch_size(loaded: TextData, tiny: TinyModel) -> None:
    """Padding is masked out, and dropout does not act."""
    model = tiny_model(tiny).train()
    scores = [objective(loaded, eval_batch_size=size).evaluate(model).scores for size in (1, 7, 60, 60)]
    assert scores[2] == scores[3]
    for other in scores[:2]:
        assert other == pytest.approx(scores[2], rel=1e-4)


def test_predictions_belong_to_their_labels(loaded: TextData) -> None:
    """Evaluation goes by length; logits and labels stay together."""
    model = tiny_model().eval()
    logits, labels = predict(model, loaded.val.batches(16))
    by_length = np.argsort(-loaded.val.lengths, kind="stable")
    assert labels.tolist() == loaded.val.labels[by_length].tolist()
    with torch.no_grad():
        alone = torch.cat([model(**loaded.val.batch([row]).inputs).logits for row in by_length])
    assert torch.allclose(logits, alone, atol=1e-5)


def test_the_training_loss_is_the_sum_over_targets(loaded: TextData) -> None:
    model = tiny_model(dropout=0.0)
    batch = loaded.train.batch(range(10))
    loss = objective(loaded).summed_loss(model, batch).minimised
    expected = nn.functional.cross_entropy(model(**batch.inputs).logits, batch.labels, reduction="sum")
    assert torch.equal(loss, expected)
    assert loss.requires_grad
    # The mean over a split that evaluation reports is the same quantity.
    whole = objective(loaded).summed_loss(model, loaded.val.batch(range(60))).minimised.item()
    assert objective(loaded).evaluate(model).scores["nll"] == pytest.approx(whole / 60, rel=1e-5)


def test_the_regression_loss_is_a_squared_error(loaded: TextData) -> None:
    model = tiny_model(dropout=0.0, num_labels=1)
    batch = loaded.train.batch(range(10))
    loss = objective(loaded, regression("pearson")).summed_loss(model, batch).minimised
    outputs = model(**batch.inputs).logits[:, 0]
    assert loss.item() == pytest.approx(((outputs - batch.labels) ** 2).sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("metric", "sign"), [("accuracy", 1), ("mcc", 1), ("f1", 1), ("nll", -1)], ids=lambda value: str(value)
)
def test_the_objective_is_higher_for_better(loaded: TextData, metric: str, sign: int) -> None:
    evaluation = objective(loaded, classification("accuracy", best=metric)).evaluate(tiny_model())
    assert evaluation.objective == sign * evaluation.scores[metric]


def test_a_best_metric_that_does_not_exist_never_wins(loaded: TextData) -> None:
    """A model that predicts one number has no correlation: the run goes on, and any other step is better."""
    model = tiny_model(num_labels=1)
    with torch.no_grad():
        model.classifier.weight.zero_()
    flat = objective(loaded, regression("pearson", best="pearson")).evaluate(model)
    assert flat.objective == -math.inf
    assert flat.scores.keys() == {"mse"}
    with torch.no_grad():
        model.classifier.weight.normal_()
    assert objective(loaded, regression("pearson", best="pearson")).evaluate(model).objective > flat.objective


def test_a_broken_model_has_no_scores_and_never_wins(loaded: TextData) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.classifier.weight.fill_(math.nan)
    evaluation = objective(loaded, classification("accuracy", best="nll")).evaluate(model)
    assert (evaluation.scores, evaluation.objective) == ({}, -math.inf)


def test_a_smoothed_loss_is_that_of_pytorch_to_the_bit_and_comes_with_the_plain_one() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(64, 7), torch.randint(7, (64,))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = cross_entropy(ours, targets, label_smoothing=0.1)
    expected = functional.cross_entropy(theirs, targets, reduction="sum", label_smoothing=0.1)
    loss.minimised.backward()
    expected.backward()
    assert torch.equal(loss.minimised, expected)
    assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    assert loss.unsmoothed is not None and not loss.unsmoothed.requires_grad
    assert torch.equal(loss.unsmoothed, functional.cross_entropy(logits, targets, reduction="sum"))
