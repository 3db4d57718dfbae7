"""The loop: its mathematics on small models, and what it promises to leave alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from harness.config import Schedule, TrainerConfig
from harness.data import Batch
from harness.evaluate import Evaluation
from harness.trainer import (
    Position,
    PreemptedError,
    TrainingDivergedError,
    TrainingOutcome,
    build_optimizer,
    count_steps,
    learning_rate_at,
    train,
)


def recipe(**values: object) -> TrainerConfig:
    """A short recipe; the schema's own default for the learning rate is an interpolation."""
    return TrainerConfig(**{"learning_rate": 1e-2, "max_steps": 6, "batch_size": 8, **values})


class Rows:
    """Random sequences of unequal length for a linear classifier, cut into micro-batches of `size`."""

    def __init__(self, *, size: int, batch_size: int = 8, num_rows: int = 16) -> None:
        generator = np.random.default_rng(0)
        self.examples = [
            (generator.integers(1, 20, generator.integers(3, 9)), int(generator.integers(3))) for _ in range(num_rows)
        ]
        self.size, self.batch_size = size, batch_size
        self.steps_per_epoch = -(-num_rows // batch_size)
        self.epochs: list[int] = []

    def _batch(self, chosen: list[int]) -> Batch:
        width = max(len(self.examples[index][0]) for index in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        for row, index in enumerate(chosen):
            tokens = self.examples[index][0]
            ids[row, : len(tokens)] = torch.from_numpy(tokens)
        labels = torch.tensor([self.examples[index][1] for index in chosen])
        num_tokens = sum(len(self.examples[index][0]) for index in chosen)
        return Batch({"input_ids": ids}, labels, num_tokens, len(chosen))

    def _step(self, chosen: list[int]) -> list[Batch]:
        return [self._batch(chosen[start : start + self.size]) for start in range(0, len(chosen), self.size)]

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[list[Batch]]:
        self.epochs.append(epoch)
        order = np.random.default_rng(epoch).permutation(len(self.examples)).tolist()
        for cut in range(start * self.batch_size, len(order), self.batch_size):
            yield self._step(order[cut : cut + self.batch_size])

    def shortest(self) -> list[Batch]:
        return [self._batch([min(range(len(self.examples)), key=lambda index: len(self.examples[index][0]))])]

    def longest(self) -> list[Batch]:
        order = sorted(range(len(self.examples)), key=lambda index: -len(self.examples[index][0]))
        return self._step(order[: self.batch_size])


class BagOfWords(nn.Module):
    """Mean embedding of the real tokens, dropout, linear head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 6, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        real = (input_ids > 0).unsqueeze(-1)
        return self.head(self.dropout((self.embedding(input_ids) * real).sum(1) / real.sum(1)))


class Objective:
    """Cross-entropy; validation scores are read from a script, or 0 when it is used up."""

    loss_name = "train_nll"

    def __init__(self, objectives: list[float] | None = None, poison_at: int | None = None) -> None:
        self.objectives = list(objectives or [])
        self.poison_at, self.num_losses = poison_at, 0

    def summed_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.num_losses += 1
        loss = functional.cross_entropy(model(batch.inputs["input_ids"]), batch.labels, reduction="sum")
        return loss * math.nan if self.num_losses == self.poison_at else loss

    def evaluate(self, model: nn.Module) -> Evaluation:
        value = self.objectives.pop(0) if self.objectives else 0.0
        return Evaluation({"accuracy": value}, value)


class Record:
    """A journal that remembers, and keeps the checkpoints it is told to."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.evaluated_at: list[int] = []
        self.measured: dict[str, float] = {}
        self.checkpoint_at = 0
        self.stop = False
        self.kept: tuple[dict[str, Tensor], Position] | None = None

    def wants_checkpoint(self, step: int) -> bool:
        return step == self.checkpoint_at

    def keep_checkpoint(self, tensors: dict[str, Tensor], position: Position) -> None:
        self.kept = ({name: value.detach().clone() for name, value in tensors.items()}, deepcopy(position))
        if self.stop:
            raise PreemptedError("stopped")

    def last_checkpoint(self) -> tuple[dict[str, Tensor], Position] | None:
        return self.kept

    def started(self, num_steps: int, measured: dict[str, float]) -> None:
        self.measured = measured

    def stepped(self, step: int, values: dict[str, float]) -> None:
        self.losses.append(values["train_nll"])
        self.rates.append(values["learning_rate"])

    def evaluated(self, step: int, scores: dict[str, float]) -> None:
        self.evaluated_at.append(step)


def run(
    model: nn.Module,
    rows: Rows,
    config: TrainerConfig,
    objective: Objective | None = None,
    record: Record | None = None,
) -> tuple[TrainingOutcome, Record]:
    record = record or Record()
    outcome = train(
        model, rows, objective or Objective(), config=config, accelerator=Accelerator(cpu=True), journal=record
    )
    return outcome, record


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_loop_equals_one_written_out_by_hand() -> None:
    config = recipe(weight_decay=0.1, max_gradient_norm=0.5)
    model, rows = BagOfWords(), Rows(size=8)
    expected = BagOfWords()
    optimizer = torch.optim.AdamW(
        [
            {"params": [expected.embedding.weight, expected.head.weight], "weight_decay": 0.1},
            {"params": [expected.head.bias], "weight_decay": 0.0},
        ],
        lr=1.0,
    )
    losses = []
    steps = [step for epoch in range(3) for step in Rows(size=8).epoch(epoch)]
    for number, (batch,) in enumerate(steps, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(number, 6, config)
        loss = functional.cross_entropy(expected(batch.inputs["input_ids"]), batch.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    _, record = run(model, rows, config)

    assert record.losses == pytest.approx(losses, abs=1e-6)
    for name, value in parameters(expected).items():
        torch.testing.assert_close(parameters(model)[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [4, 3, 1])
def test_micro_batches_give_the_same_training(size: int) -> None:
    """1x8 = 2x4 = 3+3+2 = 8x1: the loss is a mean over the step's targets however they are cut."""
    whole, cut = BagOfWords(), BagOfWords()
    _, one = run(whole, Rows(size=8), recipe())
    _, many = run(cut, Rows(size=size), recipe())
    assert many.losses == pytest.approx(one.losses, abs=1e-6)
    for name, value in parameters(whole).items():
        torch.testing.assert_close(parameters(cut)[name], value, atol=1e-5, rtol=0)


def test_only_what_requires_grad_moves() -> None:
    model = BagOfWords()
    model.embedding.requires_grad_(False)
    before = parameters(model)
    run(model, Rows(size=8), recipe())
    assert torch.equal(model.embedding.weight, before["embedding.weight"])
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_measuring_memory_leaves_no_trace_in_training() -> None:
    """With dropout: were the random numbers of the rehearsal not given back, the losses would differ."""
    config = recipe(weight_decay=0.1)
    model = BagOfWords(dropout=0.5)
    torch.manual_seed(7)
    _, record = run(model, Rows(size=8), config)

    expected = BagOfWords(dropout=0.5).train()
    optimizer = build_optimizer(expected, config)
    torch.manual_seed(7)
    losses = []
    for number, (batch,) in enumerate([step for epoch in range(3) for step in Rows(size=8).epoch(epoch)], start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(number, 6, config)
        loss = functional.cross_entropy(expected(batch.inputs["input_ids"]), batch.labels, reduction="sum") / 8
        loss.backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert record.losses == losses
    assert record.measured["peak_memory_bytes"] > 0
    assert all(torch.equal(value, parameters(expected)[name]) for name, value in parameters(model).items())


def test_best_is_chosen_by_validation_and_both_states_are_kept() -> None:
    model = BagOfWords()
    outcome, record = run(model, Rows(size=8), recipe(eval_every=2), Objective([0.1, 0.9, 0.5]))
    assert record.evaluated_at == [2, 4, 6]
    assert (outcome.best.objective, outcome.last.objective) == (0.9, 0.5)
    assert outcome.measured["best_step"] == 4

    stopped = BagOfWords()
    # The same recipe read up to step 4: what restore_best has to bring back.
    rates = [learning_rate_at(step, 6, recipe()) for step in range(1, 7)]
    assert record.rates == rates
    last = parameters(model)
    outcome.restore_best(model)
    assert any(not torch.equal(last[name], value) for name, value in parameters(model).items())
    reference, _ = run(stopped, Rows(size=8), recipe(eval_every=4), Objective([1.0, 0.0]))
    reference.restore_best(stopped)
    assert all(torch.equal(value, parameters(stopped)[name]) for name, value in parameters(model).items())


def test_a_tie_keeps_the_earlier_step_and_a_last_best_step_costs_no_copy() -> None:
    outcome, _ = run(BagOfWords(), Rows(size=8), recipe(eval_every=3), Objective([0.5, 0.5]))
    assert outcome.measured["best_step"] == 3
    outcome, _ = run(BagOfWords(), Rows(size=8), recipe())
    assert outcome.best_state is None
    assert outcome.measured["best_step"] == 6


def test_evaluation_at_the_end_is_never_doubled_nor_left_out() -> None:
    _, record = run(BagOfWords(), Rows(size=8), recipe(max_steps=5, eval_every=5, eval_each_epoch=True))
    assert record.evaluated_at == [2, 4, 5]


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step() -> None:
    # Two losses belong to the measuring of memory, so the fifth is that of step 3.
    with pytest.raises(TrainingDivergedError, match=r"the loss was nan at step 3; try a lower trainer\.learning_rate"):
        run(BagOfWords(), Rows(size=8), recipe(), Objective(poison_at=5))


def test_a_loss_that_is_not_finite_while_measuring_does_not_poison_the_weights() -> None:
    outcome, _ = run(BagOfWords(), Rows(size=8), recipe(), Objective(poison_at=1))
    assert math.isfinite(outcome.measured["train_nll"])


def test_steps_and_epochs() -> None:
    assert count_steps(recipe(max_steps=7), 4) == 7
    assert count_steps(recipe(max_steps=None, num_epochs=2.5), 4) == 10
    assert count_steps(recipe(max_steps=None, num_epochs=0.01), 4) == 1
    rows = Rows(size=8)
    run(BagOfWords(), rows, recipe(max_steps=5))
    assert rows.epochs == [0, 1, 2]


def test_learning_rates_by_hand() -> None:
    config = recipe(learning_rate=1.0, warmup_fraction=0.2)
    assert [learning_rate_at(step, 10, config) for step in range(1, 11)] == pytest.approx(
        [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    constant = replace(config, schedule=Schedule.constant, warmup_fraction=0.0)
    assert {learning_rate_at(step, 10, constant) for step in range(1, 11)} == {1.0}
    cosine = replace(config, schedule=Schedule.cosine, warmup_fraction=0.0)
    assert learning_rate_at(1, 10, cosine) == 1.0
    assert learning_rate_at(6, 10, cosine) == pytest.approx(0.5)
    assert learning_rate_at(10, 10, cosine) > 0


def test_vectors_do_not_decay() -> None:
    decayed, plain = build_optimizer(BagOfWords(), recipe(weight_decay=0.3)).param_groups
    assert [parameter.ndim for parameter in decayed["params"]] == [2, 2] and decayed["weight_decay"] == 0.3
    assert [parameter.ndim for parameter in plain["params"]] == [1] and plain["weight_decay"] == 0.0


def test_measured_numbers_are_those_of_the_loop() -> None:
    rows = Rows(size=8)
    outcome, _ = run(BagOfWords(), rows, recipe(max_steps=4))
    batches = [batch for epoch in range(2) for step in Rows(size=8).epoch(epoch) for batch in step]
    computed = sum(batch.inputs["input_ids"].numel() for batch in batches)
    real = sum(batch.num_tokens for batch in batches)
    measured = outcome.measured
    assert measured["padding_overhead"] == computed / real
    assert measured["train_tokens_per_second"] == pytest.approx(real / measured["train_seconds"])
    assert 0 < 4 * measured["step_seconds_median"] < 10 * measured["train_seconds"]
    assert measured["num_steps"] == 4


@pytest.mark.parametrize("stop_at", range(1, 6))
def test_a_run_that_goes_on_from_a_checkpoint_equals_an_undisturbed_one_bitwise(stop_at: int) -> None:
    """With dropout, clipping and a best step before the stop: everything that a checkpoint has to hold."""
    config = recipe(eval_every=2, weight_decay=0.1)

    def evaluations() -> Objective:
        return Objective([0.9, 0.1, 0.5])

    torch.manual_seed(7)
    whole = BagOfWords(dropout=0.5)
    torch.manual_seed(7)
    expected, record = run(whole, Rows(size=4), config, evaluations())

    first = Record()
    first.checkpoint_at, first.stop = stop_at, True
    objective = evaluations()
    torch.manual_seed(7)
    interrupted = BagOfWords(dropout=0.5)
    torch.manual_seed(7)
    with pytest.raises(PreemptedError):
        run(interrupted, Rows(size=4), config, objective, first)
    second = Record()
    second.kept = first.kept
    resumed = BagOfWords(dropout=0.5)
    torch.manual_seed(99)  # another process
    outcome, _ = run(resumed, Rows(size=4), config, objective, second)

    assert first.losses + second.losses == record.losses
    assert first.rates + second.rates == record.rates
    assert (outcome.best, outcome.last) == (expected.best, expected.last)
    for name in ("best_step", "train_nll", "padding_overhead", "num_steps"):
        assert outcome.measured[name] == expected.measured[name]
    assert all(torch.equal(value, parameters(whole)[name]) for name, value in parameters(resumed).items())
    outcome.restore_best(resumed)
    expected.restore_best(whole)
    assert all(torch.equal(value, parameters(whole)[name]) for name, value in parameters(resumed).items())
