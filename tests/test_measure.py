"""Tests of the measuring instruments: bytes counted by hand and by two independent counters, and no side effects."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from harness.measure import device as device_module
from harness.measure import environment as environment_module
from harness.measure import memory
from harness.measure.clock import CudaQueue, HostQueue, StepMeter, device_queue
from harness.measure.device import (
    MIB,
    DeviceBusyError,
    DeviceMemory,
    device_memory,
    device_peaks,
    free_bytes,
    peak_rss_bytes,
    require_free_device,
    reset_device_peaks,
)
from harness.measure.environment import environment
from harness.measure.memory import (
    LiveTensors,
    MemoryPeak,
    StepSeconds,
    measure_peak_memory,
    time_rehearsed_steps,
    without_side_effects,
)
from harness.results.metrics import METRICS, check_metrics

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer without state, so that a hand count stays short."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


# --- live tensors, counted by hand ------------------------------------------------------------------------------------


def test_one_linear_by_hand() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.ones(4, 3)
    peak = measure_peak_memory(lambda: model(x).sum().backward(), model, optimizer)
    # The peak is the end of the second backward: both gradients are computed and not yet put on .grad.
    assert peak == MemoryPeak(
        weights_bytes=4 * (3 * 2 + 2),
        gradients_bytes=0,
        optimizer_bytes=2 * 4 * (3 * 2 + 2) + 2 * 4,  # two moments, one step count per parameter
        activations_bytes=4 * 4 * 3 + 4 + 4 + 4 * (3 * 2 + 2),  # x, loss, its gradient 1.0, the new gradients
    )
    assert peak.total_bytes == 32 + 72 + 88


def test_two_linears_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    x = torch.ones(1, 2)
    peak = measure_peak_memory(lambda: model(x).sum().backward(), model, sgd(model))
    # When the first layer's gradient comes out, the second layer's is on .grad already.
    assert peak == MemoryPeak(
        weights_bytes=32,
        gradients_bytes=16,
        optimizer_bytes=0,
        activations_bytes=8 + 4 + 4 + 8 + 16,  # x, loss, its gradient, gradient of the hidden layer, new gradient
    )


def test_storages_are_counted_once_and_until_they_die() -> None:
    model = nn.Linear(1, 1, bias=False)  # 4 bytes
    with LiveTensors(model, sgd(model)) as live:
        a = torch.zeros(100)
        assert live.peak.total_bytes == 404
        a.add_(1).relu_()
        views = [a.view(10, 10).t(), a[50:], a.detach(), a.expand(7, 100)]
        assert live.peak.total_bytes == 404, "in-place operations and views add nothing"
        b = a + 1
        assert live.peak.total_bytes == 804
        del a
        c = torch.zeros(50)
        assert live.peak.total_bytes == 1004, "a is alive as long as one view of it is"
        del b, c, views
        d = torch.zeros(200)
        assert live.peak.total_bytes == 1004, "what died makes room"
        del d
        e = torch.empty(0).resize_(300)
        assert live.peak.total_bytes == 1204, "growing in place counts"
        assert live.peak == MemoryPeak(4, 0, 0, 1200)
    f = e + torch.zeros(10, 300)
    assert live.peak.total_bytes == 1204, "after leaving nothing counts"
    del e, f


def test_input_of_an_operation_counts() -> None:
    model = nn.Linear(1, 1, bias=False)
    x = torch.zeros(100)
    with LiveTensors(model, sgd(model)) as live:
        x[0].item()
    assert live.peak.total_bytes == 404


def test_what_lives_beforehand_counts_untouched() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2, bias=False), "unused": nn.Linear(10, 10, bias=False)})
    model.register_buffer("unused_buffer", torch.zeros(5))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model["used"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with LiveTensors(model, optimizer) as live:
        pass
    assert live.peak == MemoryPeak(
        weights_bytes=4 * (4 + 100 + 5), gradients_bytes=16, optimizer_bytes=2 * 16 + 4, activations_bytes=0
    )


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.decoder = nn.Linear(4, 10, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.embedding(ids))

    model, ids = Tied(), torch.arange(3)
    peak = measure_peak_memory(lambda: model(ids).sum().backward(), model, sgd(model))
    assert peak.weights_bytes == 4 * 40
    assert peak.gradients_bytes <= 4 * 40


def test_views_of_weights_count_once_wherever_they_are_kept() -> None:
    model = nn.Module()
    model.flat = nn.Parameter(torch.zeros(100))
    model.register_buffer("part", model.flat.detach()[:10])
    optimizer = sgd(model)
    optimizer.state[model.flat]["slow_weight"] = model.flat.detach()
    with LiveTensors(model, optimizer) as live:
        pass
    assert live.peak == MemoryPeak(weights_bytes=400, gradients_bytes=0, optimizer_bytes=0, activations_bytes=0)


@pytest.mark.parametrize("kind", ["nf4", "nf4 with quantised scales", "int8"])
def test_what_quantised_weights_are_read_by_counts_as_weights_from_the_start(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes").nn
    out_features, in_features = 64, 128

    def layer() -> nn.Module:
        if kind == "int8":
            return bnb.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
        nested = kind != "nf4"
        return bnb.Linear4bit(in_features, out_features, bias=False, quant_type="nf4", compress_statistics=nested)

    model = nn.Sequential(layer())
    model.load_state_dict({"0.weight": torch.randn(out_features, in_features)})
    model.requires_grad_(False).to("cpu")  # it quantises on the way
    entries = out_features * in_features
    by_hand = {
        # A byte an entry, a float32 scale a row.
        "int8": entries + 4 * out_features,
        # Half a byte an entry, a float32 scale to 64 of them, a table of 16 values.
        "nf4": entries // 2 + 4 * entries // 64 + 4 * 16,
        # The scales as bytes, with an offset, a scale to 256 of them and a table of 256 values of their own.
        "nf4 with quantised scales": entries // 2 + entries // 64 + 4 * 16 + 4 * (1 + 1 + 256),
    }
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with LiveTensors(model, optimizer) as live:
        at_the_start = live.peak
        assert (at_the_start.weights_bytes, at_the_start.activations_bytes) == (by_hand[kind], 0)
        model(torch.randn(2, in_features))
    assert live.peak.weights_bytes == by_hand[kind]
    with LiveTensors(model, optimizer) as live:  # where int8 keeps them after the first forward
        assert live.peak == at_the_start


def test_copies_on_other_devices_do_not_count() -> None:
    model = nn.Linear(3, 2, device="meta")
    on_host = torch.zeros(4, 3)
    with LiveTensors(model, sgd(model)) as live:
        model(on_host.to("meta"))
    assert live.peak == MemoryPeak(32, 0, 0, 4 * 4 * 3 + 4 * 4 * 2)


def test_gradient_accumulation_holds_one_set_of_gradients() -> None:
    model = nn.Linear(64, 64, bias=False)
    x = torch.ones(1, 64)

    def micro_batches(num: int) -> Callable[[], None]:
        def forward_backward() -> None:
            for _ in range(num):
                model(x).sum().backward()

        return forward_backward

    once, thrice, often = (measure_peak_memory(micro_batches(num), model, sgd(model)) for num in (1, 3, 9))
    assert thrice == often
    assert thrice.gradients_bytes == 4 * 64 * 64
    assert thrice.total_bytes - once.total_bytes == 4 * 64 * 64, "the accumulated ones beside the new ones"


@pytest.fixture
def eager_or_no_garbage_collection() -> Iterator[Callable[[bool], None]]:
    """Makes the collector run at nearly every allocation (True) or never by itself (False)."""
    before = gc.get_threshold()
    yield lambda eager: gc.set_threshold(*((1, 1, 1) if eager else (1_000_000, 1, 1)))
    gc.set_threshold(*before)


def test_reference_cycles_do_not_spoil_repeatability(eager_or_no_garbage_collection: Callable[[bool], None]) -> None:
    model = nn.Linear(64, 64)
    x = torch.ones(8, 64)

    def leave_garbage(tensor: torch.Tensor) -> None:
        cycle = [tensor]
        cycle.append(cycle)

    def forward_backward() -> None:
        leave_garbage(x + 1)
        model(x).sum().backward()

    peaks = set()
    for eager in (True, False):
        eager_or_no_garbage_collection(eager)
        peaks |= {measure_peak_memory(forward_backward, model, sgd(model), num_steps=n) for n in (2, 3)}
        assert gc.isenabled()
    assert len(peaks) == 1


def test_measuring_keeps_nothing_alive(eager_or_no_garbage_collection: Callable[[bool], None]) -> None:
    def measured_model() -> weakref.ref[nn.Module]:
        model = nn.Linear(64, 64)
        measure_peak_memory(lambda: model(torch.ones(8, 64)).sum().backward(), model, sgd(model))
        return weakref.ref(model)

    eager_or_no_garbage_collection(False)
    assert measured_model()() is None


def test_sparse_tensors_are_refused_by_name() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    with pytest.raises(NotImplementedError, match=r"layout torch\.sparse_coo.*sparse=False"):
        measure_peak_memory(lambda: model(torch.arange(3)).sum().backward(), model, sgd(model))


def mlp_peak(device: str = "cpu") -> MemoryPeak:
    torch.manual_seed(0)
    with torch.device(device):
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, labels = torch.randn(16, 32, device=device), torch.zeros(16, dtype=torch.long, device=device)
    return measure_peak_memory(lambda: nn.functional.cross_entropy(model(x), labels).backward(), model, optimizer)


def test_fake_tensors_count_like_real_ones() -> None:
    real = mlp_peak()
    with FakeTensorMode():
        fake = mlp_peak()
    assert fake == real
    assert real.total_bytes > 0


def test_a_rehearsed_step_is_timed_without_the_zeroing_and_without_a_wait_inside() -> None:
    """By a clock that gains a second with each mark and refuses to be read before a step's last one."""
    marks: list[float] = []

    class Ticking(HostQueue):
        def mark(self) -> float:
            marks.append(float(len(marks)))
            return marks[-1]

        def seconds(self, began: float, ended: float) -> float:
            assert len(marks) % 4 == 0
            return ended - began

    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    found = time_rehearsed_steps(
        [lambda: model(torch.ones(1, 2)).sum().backward()] * 3, model, sgd(model), Ticking(lambda: None)
    )
    assert found == [StepSeconds(forward_backward=1.0, whole=2.0)] * 3
    assert torch.equal(model.weight, before)


@pytest.mark.gpu
@needs_gpu
def test_cuda_counts_like_cpu() -> None:
    assert mlp_peak("cuda") == mlp_peak("cpu")


@pytest.mark.gpu
@needs_gpu
def test_cuda_allocator_sees_at_least_the_live_tensors() -> None:
    reset_device_peaks("cuda")
    live = mlp_peak("cuda").total_bytes
    peaks = device_peaks("cuda")
    assert live <= peaks["cuda_peak_allocated_bytes"] <= peaks["cuda_peak_reserved_bytes"]


# --- live tensors of a real training step -----------------------------------------------------------------------------


class MiniLM:
    """A model of the shape of all-MiniLM-L6-v2 with random weights, and its training step on 16 x 64 tokens."""

    def __init__(self, *, lora_rank: int | None = None) -> None:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            vocab_size=30522,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=8,
            attn_implementation="sdpa",
        )
        self.model: nn.Module = transformers.BertForSequenceClassification(config)
        if lora_rank is not None:
            adapter = peft.LoraConfig(r=lora_rank, target_modules=["query", "value"], task_type="SEQ_CLS")
            self.model = peft.get_peft_model(self.model, adapter)
        self.optimizer = torch.optim.AdamW([w for w in self.model.parameters() if w.requires_grad], fused=False)
        ids = torch.randint(0, 30522, (16, 64))
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(16) % 8}

    def forward_backward(self) -> None:
        self.model(**self.batch).loss.backward()

    def step(self) -> None:
        self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self) -> MemoryPeak:
        return measure_peak_memory(self.forward_backward, self.model, self.optimizer)


@pytest.fixture(scope="module")
def minilm_peak() -> MemoryPeak:
    return MiniLM().measure()


def test_full_fine_tuning_of_minilm(minilm_peak: MemoryPeak) -> None:
    # 436.07 MiB: four times the weights, and AdamW's two temporaries (not fused) of the size of the word embedding.
    assert minilm_peak.total_bytes / MIB == pytest.approx(436, rel=0.02)
    assert minilm_peak.gradients_bytes == minilm_peak.weights_bytes - 2 * 8 * 512  # less position and token type ids
    assert minilm_peak.optimizer_bytes == pytest.approx(2 * minilm_peak.gradients_bytes, rel=1e-4)
    assert minilm_peak.activations_bytes == pytest.approx(2 * 4 * 30522 * 384, rel=1e-3)


def test_minilm_repeats_to_the_byte(minilm_peak: MemoryPeak) -> None:
    assert MiniLM().measure() == minilm_peak


def test_lora_needs_much_less(minilm_peak: MemoryPeak) -> None:
    lora = MiniLM(lora_rank=8).measure()
    assert lora.total_bytes < 0.5 * minilm_peak.total_bytes
    assert lora.weights_bytes == pytest.approx(minilm_peak.weights_bytes, rel=0.01)
    assert lora.gradients_bytes + lora.optimizer_bytes < 0.01 * minilm_peak.optimizer_bytes


@pytest.mark.filterwarnings("ignore:Module is None")
def test_agrees_with_mem_tracker(minilm_peak: MemoryPeak) -> None:
    run = MiniLM()
    tracker = MemTracker()
    tracker.track_external(run.model, run.optimizer, *run.batch.values())
    with tracker:
        run.step()
        tracker.reset_mod_stats()
        run.step()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    assert minilm_peak.total_bytes == pytest.approx(snapshot["Total"], rel=0.01)


def test_agrees_with_the_allocator(minilm_peak: MemoryPeak) -> None:
    run = MiniLM()
    run.step()  # creates the optimizer state
    gc.collect()
    weights = (*run.model.parameters(), *run.model.buffers())
    state = [tensor for slots in run.optimizer.state.values() for tensor in slots.values()]
    before = sum(tensor.nbytes for tensor in (*weights, *state, *run.batch.values()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run.step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    peak = before + max(itertools.accumulate(changes))
    assert minilm_peak.total_bytes == pytest.approx(peak, rel=1e-3)


# --- no side effects --------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw_fused": lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1, fused=False),
    "adamw_tensor_rate": lambda weights: torch.optim.AdamW(weights, lr=torch.tensor(1e-2), weight_decay=0.1),
    "sgd_momentum": lambda weights: torch.optim.SGD(weights, lr=1e-2, weight_decay=0.1, momentum=0.9),
}


class Rehearsal:
    """A small model with buffers that training changes and with dropout; two parameter groups."""

    def __init__(self, optimizer: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))
        with torch.no_grad():
            self.model[0].bias.fill_(-0.0)  # -0.0 + 0.0 is +0.0: a careless update shows here
        groups = [{"params": self.model[0].parameters()}, {"params": self.model[1:].parameters(), "weight_decay": 0.5}]
        self.optimizer = OPTIMIZERS[optimizer](groups)
        self.factor = 1.0

    def forward_backward(self) -> None:
        (self.model(torch.randn(6, 8)).square().sum() * self.factor).backward()

    def measure(self) -> MemoryPeak:
        return measure_peak_memory(self.forward_backward, self.model, self.optimizer, num_steps=3)

    def train(self) -> None:
        for _ in range(5):
            self.forward_backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self) -> list[bytes]:
        """Bit patterns: nan and -0.0 would slip through a comparison of values."""
        return [bits(tensor) for tensor in self.model.state_dict().values()] + [bits(torch.get_rng_state())]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("factor", [1.0, float("nan"), float("inf"), 1e38])
def test_measuring_changes_nothing(optimizer: str, factor: float) -> None:
    run = Rehearsal(optimizer)
    run.factor = factor
    before, groups = run.state(), [dict(group) for group in run.optimizer.param_groups]
    assert run.measure().total_bytes > 0
    assert run.state() == before
    assert [dict(group) for group in run.optimizer.param_groups] == groups
    assert not run.optimizer.state
    assert all(weight.grad is None for weight in run.model.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_after_measuring_equals_training_without(optimizer: str) -> None:
    measured, plain = Rehearsal(optimizer), Rehearsal(optimizer)
    torch.manual_seed(1)
    plain.train()
    torch.manual_seed(1)
    measured.measure()
    measured.train()
    assert measured.state() == plain.state()
    assert plain.state() != Rehearsal(optimizer).state(), "the comparison must be able to fail"


def test_an_exception_leaves_no_trace_either() -> None:
    run = Rehearsal("adamw")
    before = run.state()

    def forward_backward() -> None:
        run.forward_backward()
        if run.optimizer.state:
            raise torch.OutOfMemoryError("second step")

    with pytest.raises(torch.OutOfMemoryError):
        measure_peak_memory(forward_backward, run.model, run.optimizer)
    assert run.state() == before
    assert [group["lr"] for group in run.optimizer.param_groups] == [1e-2, 1e-2]
    assert not run.optimizer.state
    assert all(weight.grad is None for weight in run.model.parameters())
    assert gc.isenabled()


def test_replaced_buffers_are_put_back() -> None:
    run = Rehearsal("adamw")
    norm = run.model[1]
    mean = norm.running_mean
    with without_side_effects(run.model, run.optimizer):
        norm.running_mean = torch.full((16,), 7.0)
    assert norm.running_mean is mean
    assert mean.eq(0).all()


def test_touched_optimizer_and_gradients_are_refused() -> None:
    run = Rehearsal("adamw")
    run.forward_backward()
    with pytest.raises(ValueError, match=r"gradients: 6 parameters .*zero_grad\(set_to_none=True\)"):
        run.measure()
    run.optimizer.step()
    run.optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"optimizer\.state: has entries for 6 parameters, must be empty"):
        run.measure()
    assert len(run.optimizer.state) == 6, "a refusal must not destroy what it protects"


def test_wrong_calls_are_refused_by_name() -> None:
    run = Rehearsal("adamw")
    with pytest.raises(ValueError, match=r"num_steps=0: must be at least 1"):
        measure_peak_memory(run.forward_backward, run.model, run.optimizer, num_steps=0)
    with pytest.raises(ValueError, match=r"forward_backward left no gradient.*loss\.backward\(\)"):
        measure_peak_memory(lambda: None, run.model, run.optimizer)


@pytest.mark.gpu
@needs_gpu
def test_cuda_random_state_is_kept() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).to("cuda")
    before = bits(torch.cuda.get_rng_state())
    measure_peak_memory(lambda: model(torch.randn(2, 8, device="cuda")).sum().backward(), model, sgd(model))
    assert bits(torch.cuda.get_rng_state()) == before


def test_peak_has_the_names_of_the_registry() -> None:
    metrics = MemoryPeak(1, 2, 3, 4).as_metrics()
    check_metrics(metrics)
    assert metrics["peak_memory_bytes"] == 10 == sum(metrics.values()) - 10


# --- clocks -----------------------------------------------------------------------------------------------------------


def test_the_host_waits_for_the_device_before_every_reading_of_its_clock() -> None:
    events: list[str] = []
    readings = iter([1.0, 3.5])

    def clock() -> float:
        events.append("clock")
        return next(readings)

    queue = HostQueue(lambda: events.append("synchronize"), clock=clock)
    assert queue.seconds(queue.mark(), queue.mark()) == 2.5
    assert events == ["synchronize", "clock"] * 2


def test_time_between_steps_is_in_none() -> None:
    readings = iter([10.0, 11.0, 50.0, 53.0])
    meter: StepMeter[str] = StepMeter(HostQueue(lambda: None, clock=lambda: next(readings)))
    meter.begin()
    meter.end(torch.tensor([1.5]), "first")
    meter.begin()
    meter.end(torch.tensor([2.5]), "second")
    assert [(step.seconds, step.values, step.note) for step in meter.finished()] == [
        (1.0, [1.5], "first"),
        (3.0, [2.5], "second"),
    ]
    assert list(meter.finished(behind=False)) == []


class FakeEvents:
    """Stands in for `torch.cuda`: events that say in which order they were recorded and waited for."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.num = 0

    def current_stream(self, device: torch.device) -> str:
        return f"stream of {device}"

    def Event(self, *, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        self.num += 1
        return FakeEvent(self, self.num)


class FakeEvent:
    def __init__(self, cuda: FakeEvents, number: int) -> None:
        self.cuda, self.number = cuda, number

    def record(self, stream: str) -> None:
        self.cuda.calls.append(f"record {self.number} on {stream}")

    def synchronize(self) -> None:
        self.cuda.calls.append(f"wait for {self.number}")

    def elapsed_time(self, other: FakeEvent) -> float:
        return 250.0 * (other.number - self.number)


def test_on_cuda_a_step_is_read_when_the_next_one_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeEvents()
    queue = CudaQueue(torch.device("cuda:1"), cuda=cuda)
    monkeypatch.setattr(queue, "fetch", lambda values: values)  # no pinned memory without a CUDA device
    meter: StepMeter[int] = StepMeter(queue)

    def step(number: int) -> list[tuple[float, list[float], int]]:
        meter.begin()
        meter.end(torch.tensor([float(number)]), number)
        return [(done.seconds, done.values, done.note) for done in meter.finished()]

    assert step(1) == []
    assert cuda.calls == ["record 1 on stream of cuda:1", "record 2 on stream of cuda:1"]
    assert step(2) == [(0.25, [1.0], 1)]
    assert cuda.calls[2:] == [
        "record 3 on stream of cuda:1",
        "record 4 on stream of cuda:1",
        "wait for 2",
    ]
    assert [done.note for done in meter.finished(behind=False)] == [2]
    assert cuda.calls[-1] == "wait for 4"


@pytest.mark.gpu
def test_cuda_times_what_was_computed_and_fetches_what_it_gave() -> None:
    device = torch.device("cuda")
    meter: StepMeter[None] = StepMeter(device_queue(device))
    matrix = torch.randn(4096, 4096, device=device)
    started = time.perf_counter()
    for number in range(3):
        meter.begin()
        for _ in range(50):
            matrix @ matrix
        meter.end(torch.tensor([float(number)], device=device), None)
    steps = list(meter.finished(behind=False))
    assert [step.values for step in steps] == [[0.0], [1.0], [2.0]]
    assert 0 < sum(step.seconds for step in steps) <= time.perf_counter() - started


def test_misuse_of_a_meter_is_refused_by_name() -> None:
    meter: StepMeter[None] = StepMeter(device_queue(torch.device("cpu")))
    with pytest.raises(RuntimeError, match=r"StepMeter\.end: no step is open; call begin\(\) first"):
        meter.end(torch.zeros(1), None)
    with pytest.raises(ValueError, match=r"device='meta'.*cpu, cuda or mps"):
        device_queue(torch.device("meta"))


# --- allocator and process peaks --------------------------------------------------------------------------------------


class FakeCuda:
    """Stands in for `torch.cuda`: an allocator with a cache, on a device of 80 GiB that others use as well."""

    def __init__(self, *, others_bytes: int = 0, reserved_bytes: int = 0) -> None:
        self.calls: list[str] = []
        self.others_bytes = others_bytes
        self.reserved_bytes = reserved_bytes

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.calls.append(f"reset {device}")

    def max_memory_allocated(self, device: torch.device) -> int:
        assert str(device) == "cuda:1"
        return 300

    def max_memory_reserved(self, device: torch.device) -> int:
        assert str(device) == "cuda:1"
        return 512

    def memory_reserved(self, device: torch.device) -> int:
        return self.reserved_bytes

    def memory_allocated(self, device: torch.device) -> int:
        return self.reserved_bytes // 4

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        total = 80 * 1024 * MIB
        return total - self.others_bytes - self.reserved_bytes, total

    def get_device_name(self, device: torch.device) -> str:
        return "Imaginary GPU"


def test_what_the_allocator_holds_without_a_tensor_in_it_is_free() -> None:
    cuda = FakeCuda(others_bytes=20 * 1024 * MIB, reserved_bytes=40 * 1024 * MIB)
    assert free_bytes(torch.device("cuda"), cuda=cuda) == (20 + 30) * 1024 * MIB


def test_what_is_free_of_a_cpu_or_of_another_device(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  7 kB\n")
    assert free_bytes(torch.device("cpu"), root=tmp_path) == 7 * 1024
    assert free_bytes(torch.device("mps"), root=tmp_path) is None


def test_device_peaks_on_cuda() -> None:
    cuda = FakeCuda()
    reset_device_peaks("cuda:1", cuda=cuda)
    assert cuda.calls == ["empty_cache", "reset cuda:1"], "what was reserved before must not count"
    peaks = device_peaks("cuda:1", cuda=cuda)
    assert peaks == {"cuda_peak_allocated_bytes": 300, "cuda_peak_reserved_bytes": 512}
    assert peaks.keys() <= METRICS.keys()


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_device_functions_leave_other_devices_alone(device: str) -> None:
    cuda = SimpleNamespace()  # any call would raise
    reset_device_peaks(device, cuda=cuda)
    assert device_peaks(device, cuda=cuda) == {}
    require_free_device(device, limit_bytes=0, cuda=cuda)


def test_busy_device_is_refused_with_the_fix() -> None:
    with pytest.raises(DeviceBusyError) as refusal:
        require_free_device("cuda:3", cuda=FakeCuda(others_bytes=2 * 1024 * MIB, reserved_bytes=MIB))
    message = str(refusal.value)
    for part in (
        "cuda:3",
        "Imaginary GPU",
        "2,147,483,648 of 85,899,345,920 bytes",
        "1,073,741,824",
        "CUDA_VISIBLE_DEVICES",
        "wait",
        "allow_busy_device=true",
    ):
        assert part in message


def test_own_memory_does_not_make_a_device_busy() -> None:
    context_bytes = 600 * MIB  # of this process; looks like somebody else's
    require_free_device("cuda", cuda=FakeCuda(others_bytes=context_bytes, reserved_bytes=70 * 1024 * MIB))
    with pytest.raises(DeviceBusyError):
        require_free_device("cuda", limit_bytes=500 * MIB, cuda=FakeCuda(others_bytes=context_bytes))


@pytest.mark.gpu
@needs_gpu
def test_idle_gpu_is_free() -> None:
    require_free_device("cuda")


def test_peak_rss_is_of_this_process_and_in_bytes() -> None:
    # In a child, whose memory is small and known, started by a parent that has held more than the child ever will.
    ballast = b"x" * (1024 * MIB)
    code = (
        "from harness.measure.device import peak_rss_bytes; before = peak_rss_bytes(); x = b'x' * 2**28; "
        "print(before, peak_rss_bytes())"
    )
    root = Path(memory.__file__).parents[2]
    child = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    before, after = map(int, child.stdout.split())
    assert after - before == pytest.approx(2**28, rel=0.25)
    if sys.platform.startswith("linux"):
        assert after < len(ballast), "ru_maxrss would show the launcher's peak"


def test_peak_rss_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(*_: object, **__: object) -> str:
        raise FileNotFoundError

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", read_text)
        fallback = peak_rss_bytes()
    assert 64 * MIB < fallback < 1024**4, "bytes, not KiB"


# --- environment ------------------------------------------------------------------------------------------------------


def test_environment_is_json_and_complete() -> None:
    facts = environment("cpu")
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["python"].count(".") == 2
    assert facts["device_type"] == "cpu"
    assert facts["num_cores"] >= 1
    assert facts["num_threads"] == torch.get_num_threads()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["transformers"] == transformers.__version__
    assert {"platform", "hostname"} <= facts.keys()
    assert not {"cuda_version", "nvidia_driver", "cudnn_version"} & facts.keys()
    assert None not in facts.values()
    assert environment(torch.device("cpu"), num_threads=7)["num_threads"] == 7


def test_environment_names_the_gpu() -> None:
    facts = environment("cuda:0", cuda=FakeCuda())
    assert facts["device_type"] == "cuda"
    assert facts["device_name"] == "Imaginary GPU"
    assert None not in facts.values()


def test_absent_package_is_an_absent_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module, "RECORDED_PACKAGES", ("torch", "no-such-package-of-ours"))
    assert environment("cpu")["versions"] == {"torch": torch.__version__}


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


class Checkout:
    """A git repository with a copy of the module's path in it, which the module is made to believe in."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in os.environ if name.startswith("GIT_")]:
            monkeypatch.delenv(name)
        self.root = root
        self.file = root / "harness" / "measure" / "environment.py"
        self.file.parent.mkdir(parents=True)
        self.file.write_text("x = 1\n")
        monkeypatch.setattr(environment_module, "__file__", str(self.file))
        monkeypatch.setattr(environment_module, "loaded_checkout", environment_module.loaded_checkout.__wrapped__)

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(self.root), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit(self) -> str:
        self.git("init", "--quiet")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "first")
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    return Checkout(tmp_path / "project", monkeypatch)


def git_facts() -> dict[str, object]:
    return {key: value for key, value in environment("cpu").items() if key.startswith("git_")}


@needs_git
def test_commit_and_dirty_of_a_checkout(checkout: Checkout) -> None:
    commit = checkout.commit()
    assert git_facts() == {"git_commit": commit, "git_dirty": False}
    (checkout.root / "notes.txt").write_text("untracked\n")
    assert git_facts() == {"git_commit": commit, "git_dirty": False}
    checkout.file.write_text("x = 2\n")
    assert git_facts() == {"git_commit": commit, "git_dirty": True}
    checkout.git("add", "--all")
    assert git_facts() == {"git_commit": commit, "git_dirty": True}


@needs_git
def test_what_is_committed_later_is_not_what_was_loaded(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module, "loaded_checkout", functools.cache(environment_module.loaded_checkout))
    commit = checkout.commit()
    assert git_facts() == {"git_commit": commit, "git_dirty": False}
    checkout.file.write_text("x = 2\n")
    checkout.git("commit", "--quiet", "--all", "--message", "second")
    assert git_facts() == {"git_commit": commit, "git_dirty": False}


@needs_git
def test_the_working_directory_does_not_matter(
    checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = checkout.commit()
    monkeypatch.chdir(tmp_path)
    assert git_facts()["git_commit"] == commit


@needs_git
def test_a_copy_inside_somebody_elses_repository_is_not_theirs(checkout: Checkout) -> None:
    (checkout.root / ".gitignore").write_text("harness/\n")  # as .venv/ would be
    checkout.commit()
    assert git_facts() == {}


@needs_git
def test_git_variables_of_a_hook_do_not_mislead(
    checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = checkout.commit()
    other = tmp_path / "other"
    subprocess.run(["git", "init", "--quiet", str(other)], check=True)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert git_facts() == {"git_commit": commit, "git_dirty": False}


@needs_git
def test_no_repository_and_no_commit_are_absent_keys(checkout: Checkout) -> None:
    assert git_facts() == {}
    checkout.git("init", "--quiet")
    checkout.git("add", "--all")
    assert git_facts() == {}


def test_no_git_is_an_absent_key(checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("git"):
        checkout.commit()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_facts() == {}


def test_a_short_first_step_gives_the_same_peak() -> None:
    model = nn.Linear(16, 16)
    long, short = torch.ones(64, 16), torch.ones(1, 16)
    plain = measure_peak_memory(lambda: model(long).sum().backward(), model, torch.optim.AdamW(model.parameters()))
    shortened = measure_peak_memory(
        lambda: model(long).sum().backward(),
        model,
        torch.optim.AdamW(model.parameters()),
        first=lambda: model(short).sum().backward(),
    )
    assert shortened.optimizer_bytes > 0
    # The short example is alive beside the long ones, because this test holds on to it.
    assert plain.total_bytes <= shortened.total_bytes <= plain.total_bytes + short.nbytes


def test_the_memory_that_a_run_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_memory(wants_gpu=False, root=tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  99 kB\nMemAvailable:   50 kB\n", encoding="utf-8")
    assert device_memory(wants_gpu=False, root=tmp_path) == DeviceMemory("this machine", 50 * 1024)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n", encoding="utf-8")
    for limit, available in (("max", 50 * 1024), ("11000", 10_000), ("900", 0)):
        (group / "memory.max").write_text(f"{limit}\n", encoding="utf-8")
        assert device_memory(wants_gpu=False, root=tmp_path) == DeviceMemory("this machine", available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(device_module, "_gpu_totals", lambda: [80 * 2**30, 24 * 2**30])
    assert device_memory(wants_gpu=True, root=tmp_path) == DeviceMemory("the smallest GPU", 24 * 2**30)
    monkeypatch.setattr(device_module, "_gpu_totals", list)
    assert device_memory(wants_gpu=True, root=tmp_path) is None
