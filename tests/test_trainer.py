"""The loop: its mathematics on small models, and what it promises to leave alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from harness.config.schema import Schedule, TrainerConfig
from harness.data.batches import Batch
from harness.measure.clock import HostQueue
from harness.methods.rates import LearningRates
from harness.processes.stopping import PreemptedError
from harness.tasks.objective import Evaluation, SummedLoss
from harness.training import learner
from harness.training.learner import Position, TrainingDivergedError
from harness.training.loop import TrainingOutcome, train, train_in_turns
from harness.training.optimizer import build_optimizer, count_steps, learning_rate_at
from harness.training.turns import MicroBatch, Turns, drive_alone


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
        self.poison_at, self.num_losses, self.num_rehearsals = poison_at, 0, 0

    def summed_loss(self, model: nn.Module, batch: Batch) -> SummedLoss:
        self.num_losses += 1
        loss = functional.cross_entropy(model(batch.inputs["input_ids"]), batch.labels, reduction="sum")
        return SummedLoss(loss * math.nan if self.num_losses == self.poison_at else loss)

    def rehearse(self, model: nn.Module) -> None:
        self.num_rehearsals += 1

    def evaluate(self, model: nn.Module) -> Evaluation:
        value = self.objectives.pop(0) if self.objectives else 0.0
        return Evaluation({"accuracy": value}, value)


class Record:
    """Callbacks that remember, and keep the checkpoints that they are asked to."""

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

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        self.evaluated_at.append(step)


def run(
    model: nn.Module,
    rows: Rows,
    config: TrainerConfig,
    objective: Objective | None = None,
    record: Record | None = None,
    rates: LearningRates | None = None,
) -> tuple[TrainingOutcome, Record]:
    record = record or Record()
    outcome = train(
        model,
        rows,
        objective or Objective(),
        config=config,
        accelerator=Accelerator(cpu=True),
        callbacks=record,
        rates=rates,
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


def test_a_loop_in_turns_stops_at_each_micro_batch_and_hears_its_errors() -> None:
    """Two steps of two micro-batches answered by hand are those of `train`; an error is raised where the loop waits."""
    by_hand, expected = BagOfWords(), BagOfWords()
    run(expected, Rows(size=4), recipe(max_steps=2))
    turns = train_in_turns(
        by_hand,
        Rows(size=4),
        Objective(),
        config=recipe(max_steps=2),
        accelerator=Accelerator(cpu=True),
        callbacks=Record(),
    )
    micro_batch, num_asked = next(turns), 0
    with pytest.raises(StopIteration):
        while True:
            num_asked += 1
            assert micro_batch.model is by_hand
            micro_batch = turns.send(micro_batch.answer())
    assert num_asked == 4
    assert parameters(by_hand).keys() == parameters(expected).keys()
    assert all(torch.equal(parameters(by_hand)[name], value) for name, value in parameters(expected).items())

    def waits() -> Turns[str]:
        try:
            yield MicroBatch(by_hand, micro_batch.batch, loss_of=fail, backward=lambda _: None)
        except MemoryError as error:
            return f"heard {error}"
        return "heard nothing"

    def fail(_: nn.Module) -> tuple[Tensor, Tensor]:
        raise MemoryError("no room")

    assert drive_alone(waits()) == "heard no room"


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
        run(BagOfWords(), Rows(size=8), recipe(), Objective(poison_at=6))


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


# ---------------------------------------------------------------- the clock, and what is read from the device


def test_collation_is_not_in_the_time_of_a_step() -> None:
    class SlowRows(Rows):
        def epoch(self, epoch: int, *, start: int = 0) -> Iterator[list[Batch]]:
            for step in super().epoch(epoch, start=start):
                time.sleep(0.05)
                yield step

    outcome, _ = run(BagOfWords(), SlowRows(size=8), recipe())
    assert outcome.measured["step_seconds_median"] < 0.05
    assert outcome.measured["train_seconds"] < 6 * 0.05


def test_no_number_is_read_from_the_device_within_a_step() -> None:
    """`item()` of a tensor on CUDA waits until everything before it is computed."""

    class Reads(TorchDispatchMode):
        num = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.num += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    with Reads() as reads:
        run(BagOfWords(), Rows(size=2), recipe())
    assert reads.num == 0


class SlowDevice(HostQueue):
    """Stands in for CUDA: a copy to the host holds NaN until a mark behind it was waited for, and that is counted."""

    lag = 1

    def __init__(self) -> None:
        super().__init__(lambda: None)
        self.num_marks, self.num_waits = 0, 0
        self.under_way: list[tuple[int, Tensor, Tensor]] = []

    def mark(self) -> Any:
        self.num_marks += 1
        return self.num_marks

    def fetch(self, values: Tensor) -> Tensor:
        self.under_way.append((self.num_marks, torch.full_like(values, math.nan), values.clone()))
        return self.under_way[-1][1]

    def seconds(self, began: Any, ended: Any) -> float:
        self.num_waits += 1
        for mark, copy, values in self.under_way:
            if mark < ended:
                copy.copy_(values)
        return 1.0


@pytest.fixture
def slow_device(monkeypatch: pytest.MonkeyPatch) -> SlowDevice:
    device = SlowDevice()
    monkeypatch.setattr(learner, "device_queue", lambda _: device)
    return device


class Ordered(Record):
    """Remembers what it was told in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, int]] = []

    def stepped(self, step: int, values: dict[str, float]) -> None:
        super().stepped(step, values)
        self.told.append(("step", step))

    def wants_checkpoint(self, step: int) -> bool:
        self.told.append(("asked", step))
        return super().wants_checkpoint(step)

    def keep_checkpoint(self, tensors: dict[str, Tensor], position: Position) -> None:
        super().keep_checkpoint(tensors, position)
        assert len(position.lap_seconds) == position.step
        self.told.append(("kept", position.step))

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        super().evaluated(step, evaluation)
        self.told.append(("evaluated", step))


def test_losses_are_read_a_step_late_and_before_everything_that_builds_on_them(slow_device: SlowDevice) -> None:
    record = Ordered()
    record.checkpoint_at = 4
    outcome, _ = run(BagOfWords(), Rows(size=4), recipe(max_steps=6, eval_every=3), record=record)
    assert [entry for entry in record.told if entry[0] != "asked" or entry[1] in (1, 2)] == [
        ("asked", 1),
        ("step", 1),
        ("asked", 2),
        ("step", 2),
        ("step", 3),
        ("evaluated", 3),
        ("step", 4),
        ("kept", 4),
        ("step", 5),
        ("step", 6),
        ("kept", 6),
        ("evaluated", 6),
    ]
    assert slow_device.num_waits == 6
    assert outcome.measured["train_seconds"] == 6


def test_a_step_late_is_the_same_training(slow_device: SlowDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    late = BagOfWords(dropout=0.5)
    torch.manual_seed(3)
    outcome, record = run(late, Rows(size=4), recipe(eval_every=4))
    monkeypatch.undo()
    at_once = BagOfWords(dropout=0.5)
    torch.manual_seed(3)
    expected, reference = run(at_once, Rows(size=4), recipe(eval_every=4))
    assert record.losses == reference.losses
    assert outcome.measured["train_nll"] == expected.measured["train_nll"]
    assert all(torch.equal(value, parameters(at_once)[name]) for name, value in parameters(late).items())


def test_divergence_seen_a_step_late_has_the_number_of_its_step(slow_device: SlowDevice) -> None:
    record = Ordered()
    with pytest.raises(TrainingDivergedError, match="the loss was nan at step 3") as caught:
        run(BagOfWords(), Rows(size=8), recipe(), Objective(poison_at=6), record)
    assert caught.value.step == 3
    assert record.told == [("asked", 1), ("step", 1), ("asked", 2), ("step", 2), ("asked", 3)]


@pytest.mark.parametrize("evaluates", [True, False])
def test_nothing_is_kept_or_scored_after_a_divergence(slow_device: SlowDevice, evaluates: bool) -> None:
    record = Ordered()
    record.checkpoint_at = 0 if evaluates else 3
    config = recipe(eval_every=3 if evaluates else 0)
    with pytest.raises(TrainingDivergedError, match="the loss was nan at step 3"):
        run(BagOfWords(), Rows(size=8), config, Objective(poison_at=6), record)
    assert record.kept is None and record.evaluated_at == []


# ---------------------------------------------------------------- the training loss of a result


def test_the_training_loss_is_the_mean_over_the_targets_of_the_last_ten_steps() -> None:
    """Sixteen examples in batches of five: every fourth step has one example, and counts for one."""
    outcome, record = run(BagOfWords(), Rows(size=5, batch_size=5), recipe(max_steps=14, batch_size=5))
    sizes = [5, 5, 5, 1] * 3 + [5, 5]
    weighted = sum(loss * size for loss, size in zip(record.losses[-10:], sizes[-10:], strict=True))
    assert outcome.measured["train_nll"] == pytest.approx(weighted / sum(sizes[-10:]), rel=1e-12)
    short, record = run(BagOfWords(), Rows(size=8), recipe(max_steps=2))
    assert short.measured["train_nll"] == pytest.approx(sum(record.losses) / 2, rel=1e-12)
