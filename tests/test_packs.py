"""Packs: every run of a pack is the run alone, on tiny random models."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from harness.config.schema import RankConfig, TrainerConfig, VariantConfig
from harness.data.batches import Batch
from harness.data.blocks import NO_TARGET
from harness.measure.clock import HostQueue
from harness.methods import packed as packed_module
from harness.methods.adapting import apply_lora
from harness.methods.counts import is_bias, is_lora, set_trainable
from harness.methods.lora import LoRALayer, MatrixLayer
from harness.methods.packed import PackedLayer, PackedModel, Stack, share_base, why_alone
from harness.methods.trunk import TrunkMemory
from harness.models.loading import checkpoint_activations
from harness.placement.select import select_targets
from harness.processes.stopping import PreemptedError
from harness.tasks.language import summed_loss
from harness.tasks.objective import Evaluation, SummedLoss, cross_entropy
from harness.training import learner, pack_size
from harness.training.learner import Position, TrainingDivergedError
from harness.training.loop import REHEARSED_STEPS, TrainingOutcome, train, train_in_turns
from harness.training.pack_size import Growing, Pass, pays_together
from harness.training.packs import Ended, Pack
from harness.training.turns import MicroBatch, Turns

SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 60}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Spec:
    """A run: what it adapts and how it is trained."""

    rank: int = 4
    projections: tuple[str, ...] = ("q", "v")
    blocks: str = "all"
    rate: float = 3e-3
    seed: int = 0
    batch_size: int = 8
    size: int = 8
    num_labels: int = 3
    num_steps: int = 2
    dropout: float = 0.0
    variant: VariantConfig | None = None
    trains: str = "lora"
    kind: str = "bert"
    dtype: torch.dtype = torch.float64
    checkpointing: bool = False
    data: int = 0
    model_dropout: float = 0.0
    device: str = "cpu"


SIX = (
    Spec(rank=1, projections=("q", "v"), rate=1e-4, num_labels=2),
    Spec(rank=2, projections=("mlp",), rate=1e-3, seed=1, batch_size=4, size=4),
    Spec(rank=8, projections=("all",), rate=3e-3, batch_size=8, size=4, num_labels=5),
    Spec(rank=64, projections=("q", "v"), rate=1e-2, seed=1),
    Spec(rank=8, projections=("all",), blocks="last_half", rate=2e-2),
    Spec(rank=2, projections=("q",), blocks="last_half", rate=5e-4, seed=1, batch_size=4, size=2),
)


# In batches of as many examples.
PLACED = (
    Spec(rank=1),
    Spec(rank=8, projections=("all",), rate=2e-3, seed=1),
    Spec(rank=32, projections=("mlp",), rate=1e-3, seed=2),
    Spec(rank=2, projections=("q",), rate=5e-3, seed=3),
)


class Rows:
    """Random texts of unequal length, their order drawn from a seed."""

    def __init__(self, spec: Spec) -> None:
        draw = np.random.default_rng(7 + spec.data)
        self.spec = spec
        self.texts = [torch.from_numpy(draw.integers(1, 60, draw.integers(3, 10))) for _ in range(32)]
        self.labels = draw.integers(0, 10**6, len(self.texts))
        self.steps_per_epoch = len(self.texts) // spec.batch_size

    def batch(self, chosen: Sequence[int]) -> Batch:
        texts = [self.texts[index] for index in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.spec.kind.endswith("lm"):
            labels = torch.where(mask > 0, ids, NO_TARGET)
            return Batch(inputs, labels, int(mask.sum()), int((labels[:, 1:] != NO_TARGET).sum()))
        labels = torch.from_numpy(self.labels[list(chosen)] % self.spec.num_labels)
        return Batch(inputs, labels, int(mask.sum()), len(chosen))

    def step(self, chosen: Sequence[int]) -> list[Batch]:
        return [self.batch(chosen[start : start + self.spec.size]) for start in range(0, len(chosen), self.spec.size)]

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[list[Batch]]:
        order = np.random.default_rng([self.spec.seed, epoch]).permutation(len(self.texts)).tolist()
        for cut in range(start * self.spec.batch_size, len(order), self.spec.batch_size):
            yield self.step(order[cut : cut + self.spec.batch_size])

    def shortest(self) -> list[Batch]:
        return [self.batch([min(range(len(self.texts)), key=lambda index: len(self.texts[index]))])]

    def longest(self) -> list[Batch]:
        return self.step(
            sorted(range(len(self.texts)), key=lambda index: -len(self.texts[index]))[: self.spec.batch_size]
        )


class Objective:
    """Cross-entropy in the type of the model; its value on a fixed batch is the score."""

    loss_name = "train_nll"

    def __init__(self, spec: Spec) -> None:
        self.spec, self.poison_at, self.num_losses = spec, 0, 0
        self.val = Rows(spec).batch(range(4))

    def summed_loss(self, model: nn.Module, batch: Batch) -> SummedLoss:
        if self.spec.kind.endswith("lm"):
            return summed_loss(model, batch, chunk_tokens=0 if self.spec.kind == "whole_lm" else None)
        return cross_entropy(model(**batch.inputs).logits, batch.labels)

    def rehearse(self, model: nn.Module) -> None:
        """Nothing."""

    def evaluate(self, model: nn.Module) -> Evaluation:
        model.eval()
        with torch.no_grad():
            nll = float(self.summed_loss(model, self.val.to(next(model.parameters()).device)).minimised)
        model.train()
        return Evaluation({"nll": nll} if math.isfinite(nll) else {}, -nll)


class Record:
    """Callbacks that remember, and stop where they are asked to."""

    def __init__(self, kept: tuple[dict[str, Tensor], Position] | None = None, stop_at: int = 0) -> None:
        self.losses: list[float] = []
        self.kept, self.stop_at = kept, stop_at

    def wants_checkpoint(self, step: int) -> bool:
        return step == self.stop_at

    def keep_checkpoint(self, tensors: dict[str, Tensor], position: Position) -> None:
        self.kept = ({name: value.detach().clone() for name, value in tensors.items()}, deepcopy(position))
        if position.step == self.stop_at:
            raise PreemptedError("stopped")

    def last_checkpoint(self) -> tuple[dict[str, Tensor], Position] | None:
        return deepcopy(self.kept)

    def started(self, num_steps: int, measured: dict[str, float]) -> None:
        """Nothing."""

    def stepped(self, step: int, values: dict[str, float]) -> None:
        self.losses.append(values["train_nll"])

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Nothing."""


def base(spec: Spec) -> nn.Module:
    torch.manual_seed(0)
    if spec.kind == "bert":
        dropout = NO_DROPOUT if not spec.model_dropout else dict.fromkeys(NO_DROPOUT, spec.model_dropout)
        config = BertConfig(
            **SIZES, **dropout, num_hidden_layers=2, num_labels=spec.num_labels, max_position_embeddings=16
        )
        return BertForSequenceClassification(config)
    if spec.kind == "gpt2_lm":
        none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), 0.0)
        return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=60, n_positions=16, **none))
    config = LlamaConfig(
        **SIZES, num_key_value_heads=2, num_hidden_layers=2, num_labels=spec.num_labels, pad_token_id=0
    )
    return LlamaForSequenceClassification(config) if spec.kind == "llama" else LlamaForCausalLM(config)


def build(spec: Spec) -> nn.Module:
    """A separate model, whose base is equal for all; B is not zero."""
    model = base(spec)
    head = {"bert": ["classifier"], "llama": ["score"]}.get(spec.kind, [])
    torch.manual_seed(spec.seed)
    for name in head:
        nn.init.normal_(model.get_submodule(name).weight, std=0.1)
    is_adapter = is_lora
    if spec.trains == "lora":
        names = [name for name, _ in model.named_modules()]
        targets = select_targets(
            names,
            model_type=model.config.model_type,
            config=model.config,
            projections=spec.projections,
            blocks=spec.blocks,
            language_model=spec.kind.endswith("lm"),
        )
        generator = torch.Generator().manual_seed(spec.seed)
        rank = RankConfig(spec.rank, alpha=8)
        apply_lora(model, targets, rank=rank, dropout=spec.dropout, variant=spec.variant, generator=generator)
        for name, value in model.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(value, std=0.02, generator=generator)
    elif spec.trains == "biases":
        is_adapter = is_bias
    set_trainable(model, head, is_adapter=is_adapter, trains_base=spec.trains == "everything")
    if spec.checkpointing:
        checkpoint_activations(model)
    return model.to(spec.dtype)


@dataclass
class Run:
    """A run and what it left."""

    spec: Spec
    model: nn.Module
    record: Record
    outcome: TrainingOutcome | None = None
    error: BaseException | None = None

    def settings(self) -> dict[str, Any]:
        spec = self.spec
        config = TrainerConfig(
            learning_rate=spec.rate, max_steps=spec.num_steps, batch_size=spec.batch_size, weight_decay=0.01
        )
        torch.manual_seed(spec.seed)  # what dropout draws
        return {"config": config, "accelerator": Accelerator(cpu=spec.device == "cpu"), "callbacks": self.record}

    def trained(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.model.named_parameters() if value.requires_grad}


def begin(spec: Spec, record: Record | None = None) -> Run:
    return Run(spec, build(spec), record or Record())


def alone(spec: Spec, record: Record | None = None) -> Run:
    run = begin(spec, record)
    run.outcome = train(run.model, Rows(spec), Objective(spec), **run.settings())
    return run


def turns(run: Run, *, shares_process: bool = False) -> Turns[TrainingOutcome]:
    rows, objective = Rows(run.spec), Objective(run.spec)
    return (
        yield from train_in_turns(run.model, rows, objective, shares_process=lambda: shares_process, **run.settings())
    )


def together(
    runs: Sequence[Run], *, size: int | None = None, expects_passes: bool = True
) -> Pack[int, TrainingOutcome]:
    pack = Pack(((number, lambda run=run: turns(run)) for number, run in enumerate(runs)), size=size or len(runs))
    for ended in pack.run():
        runs[ended.name].outcome, runs[ended.name].error = ended.outcome, ended.error
    assert (pack.num_passes > 0) == expects_passes
    return pack


def distance(one: Tensor, other: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


def furthest(run: Run, other: Run) -> float:
    ours, theirs = run.trained(), other.trained()
    assert ours.keys() == theirs.keys()
    # The bias of keys adds the same to all scores of a query: its gradient is the rounding of zero, and Adam makes
    # steps of full length of it.
    return max(distance(ours[name], theirs[name]) for name in ours if not name.endswith("key.bias"))


# ---------------------------------------------------------------- packed equals alone


@pytest.fixture(params=[False, True], ids=["one by one", "stacked"])
def stacked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Adapters computed as on the CPU, and by batched products as on a GPU."""
    monkeypatch.setattr(packed_module, "stacks_on", lambda device: request.param)
    return request.param


def test_six_different_runs_of_fifty_steps_equal_those_alone(stacked: bool) -> None:
    """Ranks, placements, rates over 100 times, seeds, batch sizes, micro-batches and heads differ."""
    specs = [replace(spec, num_steps=50) for spec in SIX]
    runs = [begin(spec) for spec in specs]
    pack = together(runs)
    assert pack.num_passes >= 100  # two of them make two passes a step
    for run, spec in zip(runs, specs, strict=True):
        expected = alone(spec)
        assert furthest(run, expected) <= 1e-10
        assert run.record.losses == pytest.approx(expected.record.losses, rel=1e-9)
        assert run.outcome is not None and expected.outcome is not None
        assert run.outcome.last.objective == pytest.approx(expected.outcome.last.objective, rel=1e-9)
        assert furthest(run, begin(spec)) > 1e-3  # it has learned


@pytest.mark.gpu
def test_runs_on_a_gpu_equal_those_alone_there() -> None:
    specs = [replace(spec, num_steps=20, device="cuda") for spec in (*SIX[:3], *PLACED)]
    runs = [begin(spec) for spec in specs]
    together(runs)
    for run, spec in zip(runs, specs, strict=True):
        assert furthest(run, alone(spec)) <= 1e-10


def test_in_float32_gradients_and_losses_are_equal_to_round_off(stacked: bool) -> None:
    specs = [replace(spec, dtype=torch.float32, num_steps=20) for spec in SIX[:3]]
    for (ours, theirs), spec in zip(gradients_together(specs), specs, strict=True):
        for name in theirs:
            assert distance(ours[name], theirs[name]) <= 1e-5, (spec, name)
    runs = [begin(spec) for spec in specs]
    together(runs)
    for run in runs:
        assert run.record.losses == pytest.approx(alone(run.spec).record.losses, rel=1e-4)


def test_a_pack_of_one_is_the_run_alone_to_the_bit() -> None:
    spec = replace(SIX[2], dtype=torch.float32)
    run = begin(spec)
    together([run], expects_passes=False)
    expected = alone(spec)
    assert run.record.losses == expected.record.losses
    assert all(torch.equal(value, expected.trained()[name]) for name, value in run.trained().items())


def test_an_update_is_scaled_in_a_stack_as_it_is_alone_in_bf16() -> None:
    """32 / 6 is no bfloat16: rounded to one, every update of a run would be 0.2 % too large beside other scalings."""
    torch.manual_seed(0)
    layers = [LoRALayer(nn.Linear(64, 64, bias=False), rank=rank, scaling=32 / rank) for rank in (6, 8)]
    for layer in layers:
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    stack = Stack(layers)
    with torch.no_grad():
        for parameter, whole, part in stack.slots:
            whole[part] = parameter
        rows = torch.randn(400, 64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = stack.add_updates(rows, torch.zeros(400, 64))[:200].double()
    exact = rows[:200].double() @ layers[0].delta_weight().double().T
    assert float((made * exact).sum() / (exact * exact).sum()) == pytest.approx(1, abs=4e-4)


def test_what_a_pack_holds_beside_its_runs_is_given_up_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and not when Python next collects cycles: on a GPU it is all factors of all runs."""
    monkeypatch.setattr(packed_module, "stacks_on", lambda device: True)
    models = [build(replace(spec, projections=("all", "lm_head"), kind="llama_lm")) for spec in PLACED[:2]]
    shared: packed_module.Shared = {}
    for model in models:
        share_base(model, shared)
    pack = PackedModel(models)
    in_tree = [one for one in pack._tree.modules() if isinstance(one, PackedLayer)]
    assert len(pack._stacks) == len(in_tree) == 14  # seven roles of two blocks; each run has its own unembedding
    held = [weakref.ref(stack.low) for stack in pack._stacks]
    pack.release()
    assert all(each() is None for each in held)
    assert not PackedModel(models[:1])._stacks  # a run alone is computed by its own model


VARIED = {
    "adapter dropout": Spec(dropout=0.5),
    "DoRA": Spec(variant=VariantConfig(dora=True), dtype=torch.float32),
    "trained biases": Spec(trains="biases"),
    "head only": Spec(trains="head"),
    "Llama classifier": Spec(kind="llama", projections=("all",)),
    "Llama language model": Spec(kind="llama_lm", projections=("all", "lm_head")),
    "whole logits": Spec(kind="whole_lm", projections=("all",)),
    "GPT-2, roles in one matrix": Spec(kind="gpt2_lm", projections=("q", "v", "o")),
    "gradient checkpointing": Spec(checkpointing=True, projections=("all",)),
}


@pytest.mark.parametrize("spec", VARIED.values(), ids=VARIED.keys())
def test_every_kind_of_run_equals_itself_alone(spec: Spec, stacked: bool) -> None:
    """In one pack with another rank, rate and seed, and so other batches."""
    specs = [replace(spec, rank=2), replace(spec, rate=1e-2, seed=1)]
    runs = [begin(each) for each in specs]
    pack = together(runs)
    assert pack.num_alone == 2  # each run's first micro-batch, to compare
    for run in runs:
        # DoRA computes lengths in float32.
        assert furthest(run, alone(run.spec)) <= (1e-10 if spec.dtype is torch.float64 else 1e-4)


def test_adapters_of_other_ranks_and_placements_are_one_batched_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches of as many rows; alpha is the same, and so their scalings differ."""
    monkeypatch.setattr(packed_module, "stacks_on", lambda device: True)
    runs = [begin(replace(spec, num_steps=20)) for spec in PLACED]
    with monkeypatch.context() as patch:
        patch.setattr(MatrixLayer, "of_rows", None)
        patch.setattr(MatrixLayer, "add_update", None)
        batch = Rows(PLACED[0]).batch(range(8)).inputs
        shared: packed_module.Shared = {}
        for run in runs:
            share_base(run.model, shared)
        PackedModel([run.model for run in runs]).outputs([batch] * len(runs), [torch.get_rng_state()] * len(runs))
    pack = together(runs)
    assert pack.num_alone == len(runs)
    for run in runs:
        assert furthest(run, alone(run.spec)) <= 1e-10


@pytest.mark.parametrize(
    "spec", [VARIED["head only"], VARIED["Llama language model"], SIX[4]], ids=lambda one: one.kind
)
def test_runs_with_the_same_batches_equal_themselves_alone(spec: Spec, stacked: bool) -> None:
    runs = [begin(replace(spec, rank=rank, rate=rate)) for rank, rate in ((1, 1e-3), (2, 1e-2), (2, 1e-4))]
    together(runs)
    for run in runs:
        assert furthest(run, alone(run.spec)) <= 1e-10


def test_runs_of_large_batches_that_share_nothing_are_computed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_size, "BUSY_THREAD", 0)
    specs = [replace(spec, dtype=torch.float32) for spec in SIX[:3]]
    runs = [begin(spec) for spec in specs]
    pack = together(runs, expects_passes=False)
    assert not pack.why_alone
    for run, spec in zip(runs, specs, strict=True):
        expected = alone(spec)
        assert run.record.losses == expected.record.losses
        assert all(torch.equal(value, expected.trained()[name]) for name, value in run.trained().items())


def test_on_a_gpu_and_for_its_forecast_every_pass_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_size, "BUSY_THREAD", 0)
    runs = [begin(spec) for spec in SIX[:3]]
    pack = Pack(((number, lambda run=run: turns(run)) for number, run in enumerate(runs)), size=3, as_on_gpu=True)
    assert all(ended.error is None for ended in pack.run())
    assert pack.num_passes > 0


def test_runs_of_large_batches_share_the_blocks_below_their_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_size, "BUSY_THREAD", 0)
    head_only = VARIED["head only"]
    together([begin(replace(head_only, rate=rate)) for rate in (1e-3, 1e-2)])
    others = [begin(replace(head_only, seed=seed)) for seed in (0, 1)]  # and so other batches
    together(others, expects_passes=False)


@pytest.mark.parametrize(
    ("tokens", "width", "num_threads", "shares_blocks", "expected"),
    [
        (4 * 32, 384, 2, False, True),
        (16 * 64, 384, 2, False, False),
        (16 * 64, 384, 2, True, True),
        (16 * 64, 384, 16, False, True),
        (4 * 32, 2048, 2, False, False),
    ],
)
def test_a_pass_is_shared_where_the_threads_are_not_busy_with_one_run(
    tokens: int, width: int, num_threads: int, shares_blocks: bool, expected: bool
) -> None:
    assert pays_together(tokens * width, num_threads=num_threads, shares_blocks=shares_blocks) is expected


def gradients_together(
    specs: Sequence[Spec], changed: dict[int, int] | None = None
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Each run's gradients of the first micro-batch: in one pass, and alone. `changed`: other data for some runs."""
    models = [build(spec) for spec in specs]
    shared: packed_module.Shared = {}
    for model in models:
        share_base(model, shared)
    rows = [Rows(replace(spec, data=(changed or {}).get(number, 0))) for number, spec in enumerate(specs)]
    batches = [next(each.epoch(0))[0] for each in rows]
    state = torch.get_rng_state()
    pack = PackedModel(models)
    outputs = pack.outputs([batch.inputs for batch in batches], [state] * len(models))
    objectives = [Objective(spec) for spec in specs]

    def loss(number: int, model: Any) -> Tensor:
        return objectives[number].summed_loss(model, batches[number]).minimised / batches[number].num_targets

    total = torch.stack([loss(number, output) for number, output in enumerate(outputs)]).sum()
    trained = [value for model in models for value in model.parameters() if value.requires_grad]
    for value, gradient in zip(trained, pack.gradients(total, trained), strict=True):
        value.grad = gradient
    packed = [taken(model) for model in models]
    for number, model in enumerate(models):
        loss(number, model).backward()
    return list(zip(packed, [taken(model) for model in models], strict=True))


def taken(model: nn.Module) -> dict[str, Tensor]:
    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    model.zero_grad(set_to_none=True)
    assert all(gradient is not None for gradient in found.values())
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_of_every_run_has_a_gradient(checkpointing: bool, stacked: bool) -> None:
    """Also with gradient checkpointing on a frozen embedding, where packed adapters are known to go without."""
    specs = [replace(spec, checkpointing=checkpointing) for spec in SIX]
    for ours, theirs in gradients_together(specs):
        for name, gradient in theirs.items():
            assert ours[name].norm() > 0, name
            assert distance(ours[name], gradient) <= 1e-12


def test_the_data_of_one_run_change_nothing_for_the_others(stacked: bool) -> None:
    specs = [replace(spec, dtype=torch.float32, batch_size=8, size=8) for spec in SIX[:3]]
    before, after = gradients_together(specs), gradients_together(specs, changed={1: 1})
    assert not torch.equal(before[1][0]["classifier.weight"], after[1][0]["classifier.weight"])
    for number in (0, 2):
        for name, gradient in before[number][0].items():
            assert torch.equal(gradient, after[number][0][name])


def test_a_neighbour_that_diverges_changes_nothing_to_the_bit(stacked: bool) -> None:
    def neighbours(rate: float) -> list[Run]:
        # Of one length, so that its leaving changes nothing but the rows.
        specs = [Spec(num_steps=8), Spec(rate=rate, seed=1, num_steps=8), Spec(rank=1, num_steps=8)]
        runs = [begin(replace(spec, dtype=torch.float32)) for spec in specs]
        together(runs)
        return runs

    wild, tame = neighbours(1e30), neighbours(1e-3)
    assert isinstance(wild[1].error, TrainingDivergedError)
    assert tame[1].error is None
    num_steps = len(wild[1].record.losses)
    assert 0 < num_steps < 8
    for number in (0, 2):
        assert wild[number].error is None
        # While it was there, with numbers that are not finite among its own.
        assert wild[number].record.losses[: num_steps + 1] == tame[number].record.losses[: num_steps + 1]
        assert wild[number].record.losses == pytest.approx(tame[number].record.losses, rel=1e-4)


# ---------------------------------------------------------------- entering and leaving


def test_runs_that_end_leave_and_waiting_ones_enter() -> None:
    specs = [replace(spec, num_steps=steps) for spec, steps in zip(SIX[:4], (2, 5, 4, 2), strict=True)]
    runs = [begin(spec) for spec in specs]
    pack = Pack(((number, lambda run=run: turns(run)) for number, run in enumerate(runs)), size=2)
    ended = [each.name for each in pack.run()]
    assert sorted(ended) == [0, 1, 2, 3]
    assert ended[0] == 0
    for run in runs:
        assert furthest(run, alone(run.spec)) <= 1e-10


def test_a_run_enters_when_memory_allows() -> None:
    """Three were decided on; then there is no room beside others, and those that wait are computed one by one."""
    free = [2**40]
    together: list[int] = []

    class Roomy(Growing):
        def passed(self, done: Pass) -> str:
            return super().passed(replace(done, alone_seconds=done.num_runs, seconds=1.0))

    size = Roomy(most=3, available=lambda: free[0])

    def counted(run: Run) -> Turns[TrainingOutcome]:
        driven = turns(run, shares_process=True)
        losses = None
        while True:
            try:
                micro_batch = next(driven) if losses is None else driven.send(losses)
            except StopIteration as end:
                return end.value
            together.append(len(pack._members))
            if size.is_settled and len(together) < 400:
                free[0] = 1
            losses = yield micro_batch

    runs = [begin(replace(SIX[4], num_steps=steps, seed=steps)) for steps in (24, 20, 18, 7, 8)]
    pack = Pack(((number, partial(counted, run)) for number, run in enumerate(runs)), size=size)
    ended = [(each.name, each.error) for each in pack.run()]
    assert sorted(name for name, _ in ended) == [0, 1, 2, 3, 4]
    assert {error for _, error in ended} == {None}
    assert size.target == 3 and max(together) == 3
    last = together[-3:]
    assert last == [1, 1, 1], "the fourth and the fifth, for which there was room with nobody beside them"
    for run in runs:
        assert furthest(run, alone(run.spec)) <= 1e-10


@pytest.mark.parametrize("fails_at", ["entry", "a step"])
def test_what_did_not_fit_is_out_of_the_memory_when_the_next_run_enters(fails_at: str) -> None:
    """The error has the frames in which it was raised, and they have the model; the pack has it as well."""
    spec = SIX[4]
    models: list[weakref.ref[nn.Module]] = []

    def too_large() -> Turns[TrainingOutcome]:
        run = begin(spec)
        vars(run.model)["itself"] = [run.model]  # a cycle, as hooks make
        models.append(weakref.ref(run.model))
        micro_batch = next(turns(run))
        try:
            if fails_at == "a step":
                yield micro_batch
            raise MemoryError("first")
        except MemoryError as error:
            raise torch.OutOfMemoryError("second") from error

    def after_it() -> Turns[TrainingOutcome]:
        assert models[0]() is None
        return (yield from turns(begin(spec)))

    pack = Pack(iter([("large", too_large), ("next", after_it)]), size=1)
    assert [(ended.name, type(ended.error)) for ended in pack.run()] == [("large", MemoryError), ("next", type(None))]


def test_a_pack_grows_while_that_makes_it_faster(caplog: pytest.LogCaptureFixture) -> None:
    """By a clock that says so: the runs are still those alone, whenever they enter."""
    runs = [begin(replace(SIX[4], num_steps=steps, seed=steps)) for steps in (24, 16, 8, 7)]
    together: dict[int, int] = {}

    class Clocked(Growing):
        def passed(self, done: Pass) -> str:
            assert done.alone_seconds > 0 and done.seconds > 0 and done.bytes_per_run > 0
            seconds = 1.0 if done.num_runs < 4 else 8.0
            return super().passed(replace(done, alone_seconds=done.num_runs, seconds=seconds))

    def counted(number: int, run: Run) -> Turns[TrainingOutcome]:
        outcome = yield from turns(run, shares_process=True)
        together[number] = pack.most_together(number)
        return outcome

    size = Clocked(most=len(runs), available=lambda: 2**40)
    pack = Pack(((number, partial(counted, number, run)) for number, run in enumerate(runs)), size=size)
    with caplog.at_level("INFO", logger="harness"):
        assert [ended.error for ended in pack.run()] == [None] * 4
    assert size.is_settled and size.target == 2
    assert together == dict.fromkeys(range(4), 4)
    assert caplog.messages.count("pack=auto: 2 at once: 4 are 0.25 times as fast") == 4
    for run in runs:
        assert furthest(run, alone(run.spec)) <= 1e-10


def test_what_a_pass_takes_alone_is_what_it_took_in_the_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a pass takes a second, and zeroing and the optimizer's step one each."""
    clock = itertools.count()

    class Ticking(HostQueue):
        def mark(self) -> float:
            return float(next(clock))

    monkeypatch.setattr(learner, "device_queue", lambda device: Ticking(lambda: None))
    spec = replace(SIX[4], num_steps=4)
    first = next(turns(begin(spec), shares_process=True))
    rehearsed = [
        sum(batch.inputs["input_ids"].numel() for batch in step)
        for step in itertools.islice(Rows(spec).epoch(0), REHEARSED_STEPS)
    ]
    num_tokens = first.batch.inputs["input_ids"].numel()
    assert first.alone_seconds == pytest.approx(num_tokens * median(1 / each for each in rehearsed))


def test_a_pack_that_finds_its_size_wants_timed_rehearsals() -> None:
    run = begin(replace(SIX[4], num_steps=2))
    with pytest.raises(ValueError, match=r"runs that time their rehearsal \(shares_process\)"):
        list(Pack(iter([(0, lambda: turns(run))]), size=Growing(most=2, available=lambda: None)).run())


def test_a_run_stopped_in_a_pack_resumes_in_another_or_alone() -> None:
    stopped = begin(replace(SIX[2], num_steps=5), Record(stop_at=2))
    other = begin(replace(SIX[3], num_steps=4))
    together([stopped, other])
    assert isinstance(stopped.error, PreemptedError)
    assert furthest(other, alone(other.spec)) <= 1e-10
    expected = alone(stopped.spec)
    resumed, beside = begin(stopped.spec, Record(stopped.record.kept)), begin(replace(SIX[0], num_steps=4))
    together([resumed, beside])
    assert furthest(resumed, expected) <= 1e-10
    assert furthest(beside, alone(beside.spec)) <= 1e-10
    assert furthest(alone(stopped.spec, Record(stopped.record.kept)), expected) <= 1e-10


def test_a_run_that_fails_leaves_the_others_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(number: int, run: Run) -> Turns[TrainingOutcome]:
        micro_batch = next(turns(run))
        yield micro_batch
        raise KeyError("surprise")

    run, other = begin(SIX[0]), begin(SIX[2])
    beginnings = [lambda: fails(0, run), lambda: turns(other)]
    ended = list(Pack(enumerate(beginnings), size=2).run())
    assert [each.name for each in ended] == [0, 1]
    assert isinstance(ended[0].error, KeyError)
    assert furthest(other, alone(other.spec)) <= 1e-10


def test_runs_in_training_are_closed_when_nobody_asks_any_more() -> None:
    closed = []

    def waits(run: Run) -> Turns[TrainingOutcome]:
        try:
            return (yield from turns(run))
        finally:
            closed.append(run)

    runs = [begin(replace(SIX[0], num_steps=1)), begin(SIX[3]), begin(SIX[2])]
    ending: Iterator[Ended[int, TrainingOutcome]] = Pack(
        ((number, lambda run=run: waits(run)) for number, run in enumerate(runs)), size=3
    ).run()
    assert next(ending).name == 0
    ending.close()  # type: ignore[attr-defined]
    assert closed == runs


# ---------------------------------------------------------------- what is shared, and what is not


def test_models_share_the_tensors_that_are_frozen_and_equal() -> None:
    models = [build(spec) for spec in SIX[:3]]
    other = build(SIX[3])
    with torch.no_grad():
        other.bert.encoder.layer[0].intermediate.dense.weight[0, 0] += 1e-9
    shared: packed_module.Shared = {}
    for model in (*models, other):
        share_base(model, shared)
    frozen = [{id(value) for value in model.parameters() if not value.requires_grad} for model in (*models, other)]
    assert frozen[0] == frozen[1] == frozen[2]
    assert len(frozen[0] - frozen[3]) == 1
    trained = [{id(value) for value in model.parameters() if value.requires_grad} for model in models]
    assert not any(one & two for one, two in itertools.combinations(trained, 2))


@pytest.mark.parametrize(("is_same", "expected"), [(True, [8, 16]), (False, [16, 16])])
def test_blocks_below_the_lowest_adapter_are_computed_once(is_same: bool, expected: list[int]) -> None:
    """For runs with the same batches, and for no others."""
    specs = [Spec(blocks="last_half"), Spec(blocks="last_half", rank=2)]
    models = [build(spec) for spec in specs]
    shared: packed_module.Shared = {}
    for each in models:
        share_base(each, shared)
    packed = PackedModel(models)
    assert packed.first_own_block == 1
    rows: list[int] = []
    for block in packed._tree.bert.encoder.layer:
        block.intermediate.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    inputs = [next(Rows(spec).epoch(0))[0].inputs for spec in specs]
    outputs = packed.outputs(inputs, [torch.get_rng_state()] * 2, is_same=is_same)
    assert rows == expected
    for model, output in zip(models, outputs, strict=True):
        torch.testing.assert_close(output(**inputs[0]).logits, model(**inputs[0]).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["bert", "llama_lm"])
def test_what_frozen_blocks_make_of_a_batch_is_kept_for_scoring_alone(kind: str) -> None:
    """Bitwise, for equal batches, within a budget; not in training, and not beside a cache of keys and values."""
    specs = [Spec(kind=kind, blocks="last_half", dtype=torch.float32), Spec(kind=kind, blocks="last_half", rank=2)]
    models = [build(replace(spec, dtype=torch.float32)).eval() for spec in specs]
    shared: packed_module.Shared = {}
    for model in models:
        share_base(model, shared)
    plain = [deepcopy(model) for model in models]
    memory = TrunkMemory(budget_bytes=8 * 9 * 64 * 4)
    for model in models:
        memory.attach(model, PackedModel([model]).frozen_blocks(model), name="one base")
    inputs = {name: value[:, :9] for name, value in Rows(PLACED[0]).batch(range(8)).inputs.items()}
    with torch.no_grad():
        expected = [model(**inputs).logits for model in plain]
        for number, (model, logits) in enumerate(zip(models, expected, strict=True)):
            assert torch.equal(model(**inputs).logits, logits)
            assert memory.num_found == number
        other = {name: value[:4] for name, value in inputs.items()}  # for which there is no room
        for _ in range(2):
            assert torch.equal(models[0](**other).logits, plain[0](**other).logits)
        assert memory.num_found == 1
        if kind == "llama_lm":
            ours, theirs = (one.generate(**inputs, max_new_tokens=3, do_sample=False) for one in (models[0], plain[0]))
            assert torch.equal(ours, theirs)
    models[0](**inputs).logits.sum().backward()
    assert memory.num_found == 1
    PackedModel(models).outputs([inputs] * 2, [torch.get_rng_state()] * 2, is_same=True)
    assert memory.num_found == 1


ALONE = {
    "every parameter trains": Spec(trains="everything"),
    "dropout in the base model": Spec(model_dropout=0.1),
    "gradient checkpointing draws": Spec(dropout=0.1, checkpointing=True),
}


@pytest.mark.parametrize(("reason", "spec"), ALONE.items(), ids=ALONE.keys())
def test_what_cannot_share_a_pass_is_computed_alone_and_the_log_says_why(
    reason: str, spec: Spec, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [begin(spec), begin(replace(spec, rate=1e-3))]
    pack = together(runs, expects_passes=False)
    assert pack.num_alone == 4
    assert reason in caplog.text
    for run in runs:
        expected = alone(run.spec)
        assert all(torch.equal(value, expected.trained()[name]) for name, value in run.trained().items())


def test_batch_normalisation_and_experts_are_refused() -> None:
    model = build(Spec())
    assert why_alone(model) is None
    model.bert.norm = nn.BatchNorm1d(4).requires_grad_(False)
    assert "batch normalisation" in (why_alone(model) or "")
    model = build(Spec())
    model.config.num_local_experts = 8
    assert "experts" in (why_alone(model) or "")


def test_gradients_that_are_not_those_alone_are_seen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter's part of the pass that is wrong: the runs are trained alone, and are right."""
    right = PackedLayer.forward
    monkeypatch.setattr(PackedLayer, "forward", lambda self, x: right(self, x) * 1.01)
    runs = [begin(SIX[0]), begin(SIX[2])]
    together(runs)
    assert caplog.text.count("its gradients in the pack differ") == 2
    for run in runs:
        expected = alone(run.spec)
        assert all(torch.equal(value, expected.trained()[name]) for name, value in run.trained().items())


def test_a_pass_that_fails_is_made_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As when the memory is enough for one run and not for two."""

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(PackedLayer, "forward", fail)
    runs = [begin(replace(spec, dropout=0.5, seed=0)) for spec in (SIX[0], SIX[3])]
    together(runs, expects_passes=False)
    assert "no room" in caplog.text
    for run in runs:
        expected = alone(run.spec)
        assert all(torch.equal(value, expected.trained()[name]) for name, value in run.trained().items())


def test_an_error_of_a_run_alone_in_its_pack_is_raised_where_it_waits() -> None:
    def waits() -> Turns[Any]:
        try:
            yield MicroBatch(build(SIX[0]), Rows(SIX[0]).batch([0]), loss_of=fail, backward=lambda _: None)
        except MemoryError as error:
            return f"heard {error}"

    def fail(_: nn.Module) -> tuple[Tensor, Tensor]:
        raise MemoryError("no room")

    (ended,) = Pack(iter([("one", waits)]), size=1).run()
    assert ended.outcome == "heard no room"


def test_a_pack_has_at_least_one_run() -> None:
    with pytest.raises(ValueError, match="size=0"):
        Pack(iter([]), size=0)
