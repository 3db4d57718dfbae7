"""What packs gain: steps of K runs in one pass against the steps of the same runs one after the other, by turns.

    python benchmarks/packs.py                  wall time, two threads: for a machine that is idle
    python benchmarks/packs.py --cpu-time       processor time of one thread: where others compute beside it
    python benchmarks/packs.py --blocks 12      another depth at the same width: its six blocks twice

All-MiniLM-L6-v2 (embedded, no download) in float32 without dropout, rank 8; every run has its own learning rate, and
all have the same batches, as the trials of a search have. Prints one Markdown table: how many times as long the runs
take one after the other, as the ratio of medians over the steps of all rounds.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.config.schema import ModelConfig, RankConfig, TrainerConfig
from harness.data.batches import Batch
from harness.measure.environment import environment
from harness.methods.adapting import apply_lora
from harness.methods.counts import set_trainable
from harness.models.loading import load_model
from harness.models.tokenizers import load_tokenizer
from harness.placement.select import select_targets
from harness.training.optimizer import build_optimizer
from harness.training.packs import Pack
from harness.training.turns import MicroBatch, Turns, drive_alone

NUM_LABELS = 8
SIZES = (2, 4, 8, 16)
SHAPES = ((4, 32), (8, 64), (16, 64))


@dataclass(frozen=True)
class Placement:
    """What the runs adapt: nothing but the head, or roles of some blocks."""

    name: str
    projections: tuple[str, ...] = ()
    blocks: str = "all"


PLACEMENTS = (
    Placement("head_only"),
    Placement("q,v of the last 2 blocks", ("q", "v"), "last_2"),
    Placement("q,v", ("q", "v")),
    Placement("all", ("all",)),
)


def build_model(placement: Placement, *, num_blocks: int, seed: int) -> nn.Module:
    """A model in training mode, of which the adapter and the head train."""
    config = ModelConfig(name="minilm", asset="minilm", dropout=0.0)
    loaded = load_model(config, num_labels=NUM_LABELS, pad_token_id=load_tokenizer(config).pad_token_id, seed=0)
    encoder = loaded.model.get_submodule("bert.encoder")
    own = list(encoder.layer)
    encoder.layer = nn.ModuleList(copy.deepcopy(own[number % len(own)]) for number in range(num_blocks))
    loaded.model.config.num_hidden_layers = num_blocks
    if placement.projections:
        targets = select_targets(
            [name for name, _ in loaded.model.named_modules()],
            model_type="bert",
            config=loaded.model.config,
            projections=list(placement.projections),
            blocks=placement.blocks,
            head=loaded.head,
        )
        apply_lora(loaded.model, targets, rank=RankConfig(8, alpha=16.0), generator=torch.Generator().manual_seed(seed))
    set_trainable(loaded.model, loaded.head, trains_base=False)
    return loaded.model.train()


def batches(shape: tuple[int, int], *, num_steps: int) -> list[Batch]:
    """The batches of a run of `(examples, tokens)` without padding, the same ones each time."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(num_steps):
        inputs = {
            "input_ids": torch.randint(1000, 20000, shape, generator=draw),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
        labels = torch.randint(0, NUM_LABELS, shape[:1], generator=draw)
        made.append(Batch(inputs, labels, shape[0] * shape[1], shape[0]))
    return made


def steps(
    model: nn.Module, own: Sequence[Batch], rate: float, *, marks: list[float], clock: Callable[[], float]
) -> Turns[None]:
    """A run: forward, backward and a step of AdamW for each batch; `marks` gets the time after each."""
    optimizer = build_optimizer(model, TrainerConfig(learning_rate=rate))
    for batch in own:

        def loss_of(computing: nn.Module, batch: Batch = batch) -> tuple[Tensor, Tensor]:
            loss = functional.cross_entropy(computing(**batch.inputs).logits, batch.labels)
            return loss, loss.detach()

        yield MicroBatch(model, batch, loss_of=loss_of, backward=torch.autograd.backward)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(clock())


def measure(
    models: Sequence[nn.Module], shape: tuple[int, int], *, rounds: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds in which each of the runs makes a step: one after the other, and in a pack."""
    own = batches(shape, num_steps=5)
    alone: list[float] = []
    packed: list[float] = []
    for _ in range(rounds):
        marks: list[list[float]] = [[] for _ in models]
        beginnings = (
            (number, partial(steps, model, own, 1e-5 * (number + 1), marks=marks[number], clock=clock))
            for number, model in enumerate(models)
        )
        for ended in Pack(beginnings, size=len(models)).run():
            if ended.error is not None:
                raise ended.error
        packed += laps(marks[-1])  # a turn ends when the last of the runs has made its step
        by_run: list[list[float]] = []
        for number, model in enumerate(models):
            by_run.append([])
            drive_alone(steps(model, own, 1e-5 * (number + 1), marks=by_run[-1], clock=clock))
        alone += [sum(turn) for turn in zip(*map(laps, by_run), strict=True)]
    return median(alone), median(packed)


def laps(marks: Sequence[float]) -> list[float]:
    """Seconds of the third step and those after it: the first one checks a pack against each run alone, or warms up."""
    return [later - earlier for earlier, later in pairwise(marks)][1:]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument(
        "--blocks", type=int, default=6, help="of the model, its six again and again; default: %(default)s"
    )
    names = [placement.name for placement in PLACEMENTS]
    parser.add_argument(
        "--trains", nargs="+", default=names, choices=names, metavar="NAME", help="of a row; default: all"
    )
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread in place of wall time")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu_time else 2)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(f"{datetime.date.today()}, {environment(torch.device('cpu'))}")
    timed = "processor time, one thread" if options.cpu_time else "wall time, 2 threads"
    print(f"{timed}, {options.blocks} blocks", end="\n\n")
    print(f"| trains | examples x tokens | {' | '.join(f'{size} runs' for size in options.sizes)} |")
    print("|---|---|" + "---|" * len(options.sizes))
    for placement in (one for one in PLACEMENTS if one.name in options.trains):
        models = [build_model(placement, num_blocks=options.blocks, seed=seed) for seed in range(max(options.sizes))]
        for shape in SHAPES:
            cells = []
            for size in options.sizes:
                alone, packed = measure(models[:size], shape, rounds=options.rounds, clock=clock)
                cells.append(f"{alone / packed:.2f}")
            print(f"| {placement.name} | {shape[0]} x {shape[1]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
