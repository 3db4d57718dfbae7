"""On a GPU: what a training step costs, compiled and not, what it holds against the prediction, and what packs gain.

    python benchmarks/gpu.py                          all four tables, ten minutes or more
    python benchmarks/gpu.py --only memory            one of them
    python benchmarks/gpu.py --device cpu --small     that it runs, with tiny models

For a machine with nothing but PyTorch, transformers and accelerate (peft where its rows are wanted): the models have
the shapes of real ones and random weights. `bf16` is a base in bfloat16 with what trains in float32, under autocast;
else everything is in float32, without TF32. Times are medians by the device's own clock, of steps queued one after the
other, as in training.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import importlib.util
import time
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from harness.config.schema import Compile, RankConfig, TrainerConfig
from harness.data.batches import Batch
from harness.forecast.fitting import WORKSPACE_BYTES, allocated_bytes
from harness.measure.clock import DeviceQueue, device_queue
from harness.measure.device import device_peaks, reset_device_peaks
from harness.measure.environment import environment
from harness.measure.memory import MemoryPeak, measure_peak_memory
from harness.measure.without_data import floats_without_data
from harness.methods.adapting import apply_lora, lora_layers
from harness.methods.counts import set_trainable
from harness.methods.packed import copy_over_same_tensors
from harness.models.compiling import compile_blocks
from harness.models.loading import checkpoint_activations
from harness.placement.select import select_targets
from harness.tasks.language import summed_loss
from harness.training.optimizer import build_optimizer
from harness.training.packs import HALF_TOLERANCE, TOLERANCE, Pack
from harness.training.turns import MicroBatch, Turns, drive_alone

MIB = 2**20
NUM_LABELS = 8
SIZES = (2, 4, 8, 16)
# The first step of a run in a pack is also made alone, to compare, and the one after it warms up.
NUM_UNTIMED = 2


@dataclass(frozen=True)
class Shape:
    """A model of random weights: sizes as in a published one, and in which precision it trains."""

    name: str
    settings: BertConfig | LlamaConfig
    bf16: bool

    @property
    def is_language(self) -> bool:
        """Whether it predicts tokens and has no head of a task."""
        return isinstance(self.settings, LlamaConfig)

    @property
    def label(self) -> str:
        """As the tables call it."""
        return f"{self.name}, {'bf16' if self.bf16 else 'float32'}"

    @property
    def head(self) -> tuple[str, ...]:
        """What trains with every method."""
        return () if self.is_language else ("classifier",)


def _bert(width: int, blocks: int, heads: int, *, vocabulary: int = 30522) -> BertConfig:
    return BertConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        vocab_size=vocabulary,
        num_labels=NUM_LABELS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _llama(width: int, blocks: int, heads: int, mlp: int, *, vocabulary: int = 128256, groups: int = 8) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        use_cache=False,
    )


MINILM = Shape("all-MiniLM-L6-v2", _bert(384, 6, 12), bf16=False)
LLAMA_1B = Shape("Llama-3.2-1B", _llama(2048, 16, 32, 8192), bf16=True)
LLAMA_8B = Shape("Llama-3.1-8B", _llama(4096, 32, 32, 14336), bf16=True)
TINY_BERT = Shape("tiny BERT", _bert(64, 2, 4, vocabulary=128), bf16=False)
TINY_LLAMA = Shape("tiny Llama", _llama(64, 2, 4, 96, vocabulary=128, groups=4), bf16=True)


@dataclass(frozen=True)
class Trained:
    """What trains.

    `kind` is ours, composed (ours as a GPU computes it, on any device), peft, full, head, or floor: nothing, with a
    gradient of the embedded tokens.
    """

    kind: str
    rank: int = 0
    projections: tuple[str, ...] = ()
    blocks: str = "all"

    @property
    def name(self) -> str:
        """As the tables call it."""
        if not self.rank:
            return self.kind
        placed = ", ".join(self.projections) + ("" if self.blocks == "all" else f" of {self.blocks}")
        return f"{self.kind}, rank {self.rank} on {placed}"


FLOOR, HEAD, FULL = Trained("floor"), Trained("head"), Trained("full")
QUERY_VALUE, ALL = ("q", "v"), ("all",)


def build_model(shape: Shape, trained: Trained, device: torch.device, *, base: nn.Module | None = None) -> nn.Module:
    """A model in training mode, of which what `trained` says trains.

    Args:
        shape: of the model.
        trained: what trains.
        device: where it lies.
        base: whose tensors it has, all but the head's; drawn at random where there is none.
    """
    if base is None:
        auto = AutoModelForCausalLM if shape.is_language else AutoModelForSequenceClassification
        with torch.device(device):
            model = auto.from_config(copy.deepcopy(shape.settings), dtype=torch.bfloat16 if shape.bf16 else None)
    else:
        model = copy_over_same_tensors(base)
        for name in shape.head:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, copy.deepcopy(base.get_submodule(name)))
    if trained.rank:
        _adapt(model, shape, trained)
    if trained == FLOOR:
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    elif trained.kind != "peft":
        set_trainable(model, shape.head, trains_base=trained == FULL)
    if shape.bf16:  # as accelerate does: a pack calls the model itself
        forward = torch.autocast(device.type, dtype=torch.bfloat16)(type(model).forward)
        model.forward = types.MethodType(forward, model)
    return model.train()


def _adapt(model: nn.Module, shape: Shape, trained: Trained) -> None:
    targets = select_targets(
        [name for name, _ in model.named_modules()],
        model_type=shape.settings.model_type,
        config=shape.settings,
        projections=list(trained.projections),
        blocks=trained.blocks,
        head=shape.head,
        language_model=shape.is_language,
    )
    if trained.kind == "peft":
        import peft

        settings = peft.LoraConfig(
            r=trained.rank,
            lora_alpha=2 * trained.rank,
            target_modules=[target.module for target in targets],
            modules_to_save=list(shape.head) or None,
            task_type="CAUSAL_LM" if shape.is_language else "SEQ_CLS",
        )
        peft.get_peft_model(model, settings)  # puts its layers into `model`
        return
    rank = RankConfig(trained.rank, alpha=2.0 * trained.rank)
    apply_lora(model, targets, rank=rank, generator=torch.Generator().manual_seed(0))
    for _, layer in lora_layers(model):
        layer.composed = trained.kind == "composed"


def make_batch(shape: Shape, size: tuple[int, int], device: torch.device, *, seed: int = 0) -> Batch:
    """`(examples, tokens)` without padding."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, shape.settings.vocab_size, size, generator=draw)
    labels = ids if shape.is_language else torch.randint(0, NUM_LABELS, size[:1], generator=draw)
    num_targets = size[0] * (size[1] - 1) if shape.is_language else size[0]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, labels, ids.numel(), num_targets).to(device)


def loss_of(shape: Shape, batch: Batch, model: nn.Module) -> tuple[Tensor, Tensor]:
    """The mean loss, with a graph and without, as `harness.training` makes it."""
    autocast: AbstractContextManager[Any] = nullcontext()
    if shape.bf16:
        autocast = torch.autocast(batch.labels.device.type, dtype=torch.bfloat16)
    with autocast:
        if shape.is_language:
            loss = summed_loss(model, batch).minimised / batch.num_targets
        else:
            loss = functional.cross_entropy(model(**batch.inputs).logits.float(), batch.labels)
    return loss, loss.detach()


# ---------------------------------------------------------------- steps


def step_milliseconds(
    steps: Mapping[str, Callable[[], None]], device: torch.device, *, repetitions: int
) -> dict[str, float]:
    """The median of each step, made by turns, ten in a row."""
    queue, in_a_row = device_queue(device), 10
    found: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions + 1):  # the first one warms up
        for name, step in steps.items():
            marks = [queue.mark()]
            for _ in range(in_a_row):
                step()
                marks.append(queue.mark())
            if repetition:
                found[name] += _laps(marks, queue)
    return {name: 1e3 * median(seconds) for name, seconds in found.items()}


def _step(
    shape: Shape, trained: Trained, batch: Batch, device: torch.device, how: Compile = Compile.none
) -> Callable[[], None]:
    model = build_model(shape, trained, device)
    compile_blocks(model, how, device)
    optimizer = None if trained == FLOOR else build_optimizer(model, TrainerConfig(learning_rate=1e-5))

    def step() -> None:
        loss_of(shape, batch, model)[0].backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def _laps(marks: Sequence[Any], queue: DeviceQueue) -> list[float]:
    return [queue.seconds(earlier, later) for earlier, later in pairwise(marks)]


def table_of_steps(
    cells: Sequence[tuple[Shape, tuple[int, int], Sequence[Trained]]], device: torch.device, *, repetitions: int
) -> None:
    """Prints a row for each method of each shape."""
    print("| model | examples x tokens | trains | ms | ratio to the floor | tokens/s |\n|---|---|---|---|---|---|")
    for shape, size, trained in cells:
        batch = make_batch(shape, size, device)
        steps = {each.name: _step(shape, each, batch, device) for each in trained}
        found = step_milliseconds(steps, device, repetitions=repetitions)
        for name, milliseconds in found.items():
            ratio, rate = milliseconds / found[FLOOR.name], 1e3 * size[0] * size[1] / milliseconds
            print(
                f"| {shape.label} | {size[0]} x {size[1]} | {name} | {milliseconds:.2f} | {ratio:.2f} | {rate:,.0f} |",
                flush=True,
            )
        del steps
        _give_back(device)


# ---------------------------------------------------------------- compiled steps


def table_of_compiled(
    cells: Sequence[tuple[Shape, tuple[int, int], Trained]], device: torch.device, *, repetitions: int
) -> None:
    """Prints a row for each choice of `trainer.compile`; the first three steps compile."""
    queue = device_queue(device)
    print("| model | examples x tokens | trains | compile | first steps, s | ms | times as fast |")
    print("|---|---|---|---|---|---|---|")
    for shape, size, trained in cells:
        batch = make_batch(shape, size, device)
        steps = {how.value: _step(shape, trained, batch, device, how) for how in Compile}
        first: dict[str, float] = {}
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(3):
                step()
            queue.seconds(queue.mark(), queue.mark())  # waits for the device
            first[name] = time.perf_counter() - began
        found = step_milliseconds(steps, device, repetitions=repetitions)
        for name, milliseconds in found.items():
            print(
                f"| {shape.label} | {size[0]} x {size[1]} | {trained.name} | {name} | {first[name]:.1f} "
                f"| {milliseconds:.2f} | {found[Compile.none.value] / milliseconds:.2f} |",
                flush=True,
            )
        del steps
        torch.compiler.reset()
        _give_back(device)


# ---------------------------------------------------------------- memory


@dataclass(frozen=True)
class Held:
    """Peak bytes of a training step: predicted without data, followed, and what the allocator handed out and holds."""

    predicted: MemoryPeak
    live: MemoryPeak
    allocated: int | None
    reserved: int | None


def measure_memory(
    shape: Shape, trained: Trained, size: tuple[int, int], device: torch.device, *, checkpointing: bool
) -> Held:
    """The peak of a step, and the prediction, which is made on the CPU."""
    batches = [make_batch(shape, each, torch.device("cpu")) for each in ((1, 4), size)]
    is_ours_on_gpu = trained.kind == "ours" and device.type != "cpu"
    with floats_without_data():
        alike = replace(trained, kind="composed") if is_ours_on_gpu else trained
        predicted = _peak(shape, alike, batches, torch.device("cpu"), checkpointing)
    _give_back(device)
    reset_device_peaks(device)
    live = _peak(shape, trained, [batch.to(device) for batch in batches], device, checkpointing)
    peaks = device_peaks(device)
    return Held(predicted, live, peaks.get("cuda_peak_allocated_bytes"), peaks.get("cuda_peak_reserved_bytes"))


def _peak(
    shape: Shape, trained: Trained, batches: Sequence[Batch], device: torch.device, checkpointing: bool
) -> MemoryPeak:
    model = build_model(shape, trained, device)
    if checkpointing:
        checkpoint_activations(model)
    optimizer = build_optimizer(model, TrainerConfig(learning_rate=1e-5))
    shortest, longest = batches
    return measure_peak_memory(
        lambda: loss_of(shape, longest, model)[0].backward(),
        model,
        optimizer,
        first=lambda: loss_of(shape, shortest, model)[0].backward(),
    )


def table_of_memory(cells: Sequence[tuple[Shape, Trained, tuple[int, int], bool]], device: torch.device) -> None:
    """Prints a row for each cell, in MiB; the ratio is to the prediction and the workspaces of cuBLAS."""
    columns = ("model", "trains", "examples x tokens", "checkpoints", "predicted", "live", "allocated", "reserved")
    ratio_name = f"allocated / (predicted + {WORKSPACE_BYTES // MIB})"
    print(f"| {' | '.join(columns)} | {ratio_name} |\n|{'---|' * (len(columns) + 1)}")
    for shape, trained, size, checkpointing in cells:
        held = measure_memory(shape, trained, size, device, checkpointing=checkpointing)
        predicted = held.predicted.total_bytes
        sizes = (predicted, held.live.total_bytes, held.allocated, held.reserved)
        shown = " | ".join("-" if each is None else f"{each / MIB:,.1f}" for each in sizes)
        ratio = "-" if held.allocated is None else f"{held.allocated / allocated_bytes(predicted):.3f}"
        print(
            f"| {shape.label} | {trained.name} | {size[0]} x {size[1]} | {'yes' if checkpointing else 'no'} | {shown} "
            f"| {ratio} |",
            flush=True,
        )


# ---------------------------------------------------------------- packs


def turns(
    shape: Shape, model: nn.Module, batch: Batch, rate: float, *, num_steps: int, marks: list[Any], queue: DeviceQueue
) -> Turns[None]:
    """A run: so many steps on one batch; `marks` gets a point in time behind each."""
    optimizer = build_optimizer(model, TrainerConfig(learning_rate=rate))
    for _ in range(num_steps):
        yield MicroBatch(model, batch, loss_of=partial(loss_of, shape, batch), backward=torch.autograd.backward)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(queue.mark())


def measure_packs(
    shape: Shape,
    trained: Trained,
    size: tuple[int, int],
    device: torch.device,
    *,
    sizes: Sequence[int],
    num_steps: int,
    same: bool,
) -> tuple[float, list[float]]:
    """Seconds of a step alone, and of a step of all runs of a pack, for each size of a pack.

    Args:
        shape: of the base, which all runs share.
        trained: what trains in each run.
        size: of a batch of a run, `(examples, tokens)`.
        device: where they train.
        sizes: runs of the packs.
        num_steps: of each run, of which the first ones are not timed.
        same: whether the runs have the same batch, as the trials of a search have.
    """
    queue, base = device_queue(device), build_model(shape, HEAD, device)
    runs = [
        (build_model(shape, trained, device, base=base), make_batch(shape, size, device, seed=0 if same else number))
        for number in range(max(sizes))
    ]
    run = partial(turns, shape, num_steps=num_steps, queue=queue)
    alone: list[float] = []
    packed: list[float] = []
    for number in sizes:
        marks: list[Any] = []
        drive_alone(run(*runs[0], 1e-5, marks=marks))
        alone += _laps(marks[NUM_UNTIMED - 1 :], queue)
        of_runs: list[list[Any]] = [[] for _ in range(number)]
        waiting = ((each, partial(run, *runs[each], 1e-5 * (each + 1), marks=of_runs[each])) for each in range(number))
        pack = Pack(waiting, size=number, tolerance=HALF_TOLERANCE if shape.bf16 else TOLERANCE)
        for ended in pack.run():
            if ended.error is not None:
                raise ended.error
        if pack.num_alone > number:
            raise RuntimeError(f"{shape.label}, {trained.name}: runs were computed alone in a pack of {number}")
        packed.append(median(_laps(of_runs[-1][NUM_UNTIMED - 1 :], queue)))
    return median(alone), packed


def table_of_packs(
    cells: Sequence[tuple[Shape, Trained, tuple[int, int], bool]],
    device: torch.device,
    *,
    sizes: Sequence[int],
    num_steps: int,
) -> None:
    """Prints how many times as long as in a pack the runs of a pack take one after the other."""
    print(
        f"| model | trains | examples x tokens | batches | alone, ms | {' | '.join(f'{size} runs' for size in sizes)} |"
    )
    print("|---|---|---|---|---|" + "---|" * len(sizes))
    for shape, trained, size, same in cells:
        alone, packed = measure_packs(shape, trained, size, device, sizes=sizes, num_steps=num_steps, same=same)
        shown = " | ".join(f"{number * alone / each:.2f}" for number, each in zip(sizes, packed, strict=True))
        print(
            f"| {shape.label} | {trained.name} | {size[0]} x {size[1]} | {'the same' if same else 'own'} "
            f"| {1e3 * alone:.2f} | {shown} |",
            flush=True,
        )
        _give_back(device)


def _give_back(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    tables = ("step", "compile", "memory", "packs")
    parser.add_argument("--only", nargs="+", choices=tables, default=tables)
    parser.add_argument("--small", action="store_true", help="tiny models and few steps, whose times say nothing")
    options = parser.parse_args(arguments)
    bert, llama, largest = (TINY_BERT, TINY_LLAMA, TINY_LLAMA) if options.small else (MINILM, LLAMA_1B, LLAMA_8B)
    bert_bf16 = replace(bert, bf16=True)
    short, long = ((2, 8), (2, 16)) if options.small else ((16, 64), (4, 512))
    qv, on_all, large = (Trained("ours", rank, placed) for rank, placed in ((8, QUERY_VALUE), (8, ALL), (64, ALL)))
    top = Trained("ours", 8, QUERY_VALUE, "last_half")
    print(f"{datetime.date.today()}, {environment(options.device)}\n")
    if "step" in options.only:
        peft = (Trained("peft", 8, ALL),) if importlib.util.find_spec("peft") else ()
        methods = (FLOOR, qv, on_all, large, *peft, FULL)
        cells = [(bert, short, methods), (bert_bf16, short, methods), (llama, long, methods)]
        table_of_steps(cells, options.device, repetitions=1 if options.small else 5)
    if "compile" in options.only:
        print()
        compiled = [(shape, size, on_all) for shape, size in ((bert, short), (bert_bf16, short), (llama, long))]
        with torch.compiler.config.patch(force_disable_caches=True):
            table_of_compiled(compiled, options.device, repetitions=1 if options.small else 5)
    if "memory" in options.only:
        print()
        table_of_memory(
            [
                *((bert, trained, short, False) for trained in (qv, on_all, FULL)),
                (bert, on_all, (4 * short[0], short[1]), False),
                (bert, on_all, short, True),
                *((llama, trained, long, False) for trained in (qv, on_all, FULL)),
                (llama, on_all, long, True),
                (llama, on_all, (1, 4 * long[1]), False),
                (largest, Trained("ours", 16, ALL), (1, 4 * long[1]), False),
                (largest, Trained("ours", 16, ALL), (1, 4 * long[1]), True),
            ],
            options.device,
        )
    if "packs" in options.only:
        print()
        table_of_packs(
            [
                *((bert, trained, short, True) for trained in (HEAD, top, qv, on_all)),
                (bert, on_all, short, False),
                (bert_bf16, on_all, short, False),
                (llama, on_all, (1, long[1]), False),
            ],
            options.device,
            sizes=SIZES[:2] if options.small else SIZES,
            num_steps=4 if options.small else 12,
        )


if __name__ == "__main__":
    main()
