"""Many adapters on one base model: what a switch costs, what an adapter takes, and that the base stays as it is.

    python benchmarks/many_adapters.py                      50 adapters on all-MiniLM-L6-v2, under two minutes

The adapters are drawn at random, B and head included, and not trained: time and bytes do not depend on the values.
They are saved and read as those of runs are. Prints one Markdown table; a check that fails ends it.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import psutil
import torch
from torch import Tensor, nn

from harness.config.schema import ModelConfig, RankConfig
from harness.measure.environment import environment
from harness.methods.adapting import apply_lora, lora_layers, merge, remove_lora, replaced_modules, unmerge
from harness.methods.counts import is_head, is_lora, set_trainable
from harness.methods.peft_files import load_adapter, save_adapter
from harness.models.loading import BaseModel, load_model
from harness.models.tokenizers import load_tokenizer
from harness.placement.select import select_targets

MINILM = ModelConfig(name="minilm", asset="minilm")
NUM_LABELS = 8
RANK = RankConfig(rank=8, alpha=16.0)
# peft reads so many of the adapters too, as a reference.
NUM_FOR_PEFT = 3


@dataclass(frozen=True)
class Measured:
    """What `measure` found; all times in seconds."""

    num_params: int
    base_bytes: int
    base_load_seconds: float
    file_bytes: int
    live_bytes: int
    rss_growth_bytes: int
    switch_seconds: list[float]
    merge_seconds: list[float]
    unmerge_seconds: list[float]
    largest_difference_to_peft: float


class CheckError(AssertionError):
    """Something that the table says does not hold."""


def measure(config: ModelConfig, num_adapters: int, folder: Path, *, steps: int = 3) -> Measured:
    """Draws `num_adapters` adapters, trains one, switches through all, merges and unmerges each.

    Raises `CheckError` where outputs are not those of a model that was loaded for the adapter alone, or where a tensor
    of the base is not bitwise, and at the address, what and where it was.
    """
    pad_token_id = load_tokenizer(config).pad_token_id

    def load() -> BaseModel:
        loaded = load_model(config, num_labels=NUM_LABELS, pad_token_id=pad_token_id, seed=0)
        loaded.model.eval()
        return loaded

    started = time.perf_counter()
    base = load()
    base_load_seconds = time.perf_counter() - started
    model = base.model
    check_base = BaseChecker(model)
    base_bytes = _live_bytes(model)
    ids = torch.randint(5, 100, (8, 64), generator=torch.Generator().manual_seed(0))

    folders = [folder / str(number) for number in range(num_adapters)]
    file_bytes, num_params = [], 0
    for number, directory in enumerate(folders):
        file_bytes.append(_draw_adapter(base, directory, seed=number))
        num_params = sum(value.numel() for name, value in model.named_parameters() if is_lora(name))
        remove_lora(model)
        _restore_head(model, base.head, check_base.head)
    check_base("drawing the adapters")

    load_adapter(model, folders[0])
    _train(model, base.head, ids, steps)
    remove_lora(model)
    check_base("training")

    outputs, switch_seconds, merge_seconds, unmerge_seconds = [], [], [], []
    load_adapter(model, folders[-1])
    live_bytes = _live_bytes(model) - base_bytes
    rss_before = psutil.Process().memory_info().rss
    for directory in folders:
        switch_seconds.append(_seconds(lambda directory=directory: load_adapter(model, directory)))
        outputs.append(_logits(model, ids))
    rss_growth = psutil.Process().memory_info().rss - rss_before
    for directory, output in zip(folders, outputs, strict=True):
        load_adapter(model, directory)
        merge_seconds.append(_seconds(lambda: merge(model)))
        _check((_logits(model, ids) - output).abs().max().item() < 1e-4, "merged differs from unmerged")
        unmerge_seconds.append(_seconds(lambda: unmerge(model)))
        _check(torch.equal(_logits(model, ids), output), "unmerged differs from before merging")
    remove_lora(model)
    check_base("merging, unmerging and switching")

    alone = load()
    for directory, output in zip(folders, outputs, strict=True):
        load_adapter(alone.model, directory)
        _check(torch.equal(_logits(alone.model, ids), output), f"{directory}: differs from a model loaded for it alone")
        alone = load()
    differences = []
    for directory, output in list(zip(folders, outputs, strict=True))[:NUM_FOR_PEFT]:
        reference = peft.PeftModel.from_pretrained(load().model, str(directory)).eval()
        differences.append((_logits(reference, ids) - output).abs().max().item())
    _check(max(differences) < 1e-5, f"peft's outputs differ by {max(differences)}")
    _check(len({output.sum().item() for output in outputs}) == num_adapters, "two adapters give the same outputs")
    return Measured(
        num_params,
        base_bytes,
        base_load_seconds,
        max(file_bytes),
        live_bytes,
        rss_growth,
        switch_seconds,
        merge_seconds,
        unmerge_seconds,
        max(differences),
    )


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise CheckError(otherwise)


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits


def _live_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that the model holds, each once; also of the base's own head, which an adapter replaces."""
    waiting = (value for module in replaced_modules(model).values() for value in module.parameters())
    tensors = {value.data_ptr(): value.nbytes for value in (*model.parameters(), *model.buffers(), *waiting)}
    return sum(tensors.values())


class BaseChecker:
    """Remembers a base model's tensors, and fails where one is another, elsewhere, or has other bits."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = {
            name: (value.data_ptr(), value.detach().clone())
            for name, value in (*model.named_parameters(), *model.named_buffers())
        }
        self.head = {name: value for name, (_, value) in self._before.items()}

    def __call__(self, after: str) -> None:
        """Raises `CheckError` where a tensor is not what it was."""
        found = dict((*self._model.named_parameters(), *self._model.named_buffers()))
        _check(found.keys() == self._before.keys(), f"after {after} the base has other tensors")
        for name, (address, value) in self._before.items():
            _check(found[name].data_ptr() == address, f"after {after} {name} lies elsewhere")
            _check(torch.equal(found[name], value), f"after {after} {name} has other values")


def _draw_adapter(base: BaseModel, directory: Path, *, seed: int) -> int:
    """Puts an adapter of random values into the model and saves it with a random head; bytes of the file."""
    draw = torch.Generator().manual_seed(seed)
    targets = select_targets(
        [name for name, _ in base.model.named_modules()],
        model_type=base.model.config.model_type,
        config=base.model.config,
        projections=["q", "v"],
        blocks="all",
        head=base.head,
    )
    apply_lora(base.model, targets, rank=RANK, generator=draw)
    with torch.no_grad():
        for _, layer in lora_layers(base.model):
            for update in layer.updates().values():
                update.lora_B.normal_(0, 0.05, generator=draw)
        for name, value in base.model.named_parameters():
            if is_head(name, base.head):
                value.normal_(0, 0.05, generator=draw)
    return save_adapter(base.model, directory, rank=RANK, head_modules=base.head)


def _restore_head(model: nn.Module, head: tuple[str, ...], before: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in model.named_parameters():
            if is_head(name, head):
                value.copy_(before[name])


def _train(model: nn.Module, head: tuple[str, ...], ids: Tensor, steps: int) -> None:
    set_trainable(model, head)
    trained = [value for value in model.parameters() if value.requires_grad]
    before = [value.detach().clone() for value in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    labels = torch.arange(len(ids)) % NUM_LABELS
    for _ in range(steps):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [not torch.equal(old, new) for old, new in zip(before, trained, strict=True)]
    _check(all(moved), "training has left a tensor as it was")


# ---------------------------------------------------------------- the table


def table(measured: Measured, name: str, num_adapters: int) -> str:
    """The measurements in Markdown, with date, commit and machine."""

    def milliseconds(values: list[float]) -> str:
        return f"{1000 * statistics.median(values):.1f} ms ({1000 * min(values):.1f} to {1000 * max(values):.1f})"

    mib = 2.0**20
    rows = [
        (
            "adapters",
            f"{num_adapters}, LoRA of rank {RANK.rank} on q and v, each with its head of {NUM_LABELS} classes",
        ),
        ("parameters of an adapter", f"{measured.num_params:,}"),
        ("base model", f"{measured.base_bytes / mib:.1f} MiB, held once; loaded in {measured.base_load_seconds:.2f} s"),
        ("time to switch, median (least to most)", milliseconds(measured.switch_seconds)),
        ("file of an adapter with its head", f"{measured.file_bytes:,} bytes"),
        ("tensors that an adapter with its head adds in memory", f"{measured.live_bytes:,} bytes"),
        ("growth of the process over all switches", f"{measured.rss_growth_bytes / mib:.1f} MiB"),
        ("time to merge, median (least to most)", milliseconds(measured.merge_seconds)),
        ("time to unmerge, median (least to most)", milliseconds(measured.unmerge_seconds)),
        ("outputs against models loaded for one adapter each", f"bitwise equal, {num_adapters} of {num_adapters}"),
        ("outputs against peft's", f"{measured.largest_difference_to_peft:.1g} at most, {NUM_FOR_PEFT} adapters"),
        ("base after training, merging, unmerging, switching", "bitwise equal, every tensor where it was"),
    ]
    facts = environment("cpu")
    commit = f"commit {facts.get('git_commit', 'unknown')[:7]}{' with changes' if facts.get('git_dirty') else ''}"
    machine = f"{facts['device_name']}, {facts['num_threads']} of {facts['num_cores']} cores"
    versions = f"torch {facts['versions']['torch']}, peft {peft.__version__}"
    lines = ["| what | measured |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]
    return "\n".join([*lines, "", f"({datetime.date.today()}, {commit}, {name}, {machine}, {versions}.)"])


def main() -> None:
    """Measures on the embedded default and prints the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--num-adapters", type=int, default=50)
    num_adapters = parser.parse_args().num_adapters
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(MINILM, num_adapters, Path(folder))
    print(table(measured, "all-MiniLM-L6-v2", num_adapters))


if __name__ == "__main__":
    main()
