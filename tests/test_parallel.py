"""Two processes on the CPU: the losses and adapter of one, whether the model is whole in each or spread over both."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from harness.__main__ import main
from harness.config.schema import ModelConfig, Optimizer, TinyModel, TrainerConfig
from harness.config.validation import SHARDED
from harness.data.batches import Batch, TrainingBatches
from harness.models.loading import load_model
from harness.processes.distributed import Companions, ProcessFailedError, full_tensor, is_sharded, place_on_device
from harness.results.claims import Claim, RunClaimedError
from harness.tasks.language import summed_nll
from harness.tasks.objective import evaluating
from harness.training.checkpoint import pack_training, unpack_training
from harness.training.optimizer import build_optimizer

ROOT = Path(__file__).resolve().parent.parent


class Numbered:
    """Examples whose only token is their number."""

    def __init__(self, num: int) -> None:
        self.lengths = np.ones(num, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Any) -> Batch:
        ids = torch.tensor([[int(index)] for index in indices])
        return Batch({"input_ids": ids}, ids, len(indices), len(indices))


@pytest.mark.parametrize(("num", "micro"), [(8, None), (8, 1), (7, 2), (9, 1), (1, None)])
def test_processes_share_each_step_without_loss_or_repetition(num: int, micro: int | None) -> None:
    def steps(process: int, num_processes: int) -> list[list[Batch]]:
        batches = TrainingBatches(
            Numbered(num),
            batch_size=4,
            micro_batch_size=micro,
            seed=0,
            process_index=process,
            num_processes=num_processes,
        )
        return list(batches.epoch(0))

    def examples(step: list[Batch]) -> list[int]:
        return [int(token) for batch in step if batch.num_targets for token in batch.inputs["input_ids"][:, 0]]

    alone, first, second = steps(0, 1), steps(0, 2), steps(1, 2)
    assert len(alone) == len(first) == len(second)
    for whole, left, right in zip(alone, first, second, strict=True):
        assert sorted(examples(left) + examples(right)) == sorted(examples(whole))
        assert len(left) == len(right)
        assert all(len(batch.labels) > 0 for batch in right)  # a process without examples still takes part


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and targets of unequal length."""
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    draw = random.Random(0)
    rows = [{"q": "x" * draw.randint(1, 9), "a": "y" * draw.randint(1, 12)} for _ in range(46)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(sums: Path, runs_dir: Path, *more: str) -> list[str]:
    return [
        "model=tiny_llama",
        "dataset=local_completion",
        f"dataset.train_file={sums}",
        "dataset.prompt_template='{q}='",
        "dataset.target_column=a",
        "dataset.generation.max_new_tokens=4",
        "dataset.max_length=32",
        "trainer.num_epochs=null",
        "trainer.max_steps=12",  # ten make an epoch: its last step has one example, and one process none
        "trainer.batch_size=4",
        "trainer.eval_every=5",
        "trainer.checkpoint_every=6",
        "tracking=off",
        "tracking.log_every=1",
        "device=cpu",
        f"runs_dir={runs_dir}",
        *more,
    ]


LORA = ("rank=r4", "target_layers=all")
FULL = ("method=full", "trainer.learning_rate=2e-3", "trainer.micro_batch_size=1")
DROPOUT = (*LORA, "method.adapter_dropout=0.5", "trainer.checkpoint_every=0")

# What `torchrun` starts instead of `-m harness`: the same for one command line after the other, with something
# happening to one process of the two.
UNDER_TORCHRUN = """
import json, os, signal, sys
from contextlib import nullcontext
from unittest.mock import patch
import torch
from harness.tasks.language import LanguageObjective
from harness.training.callbacks import RunCallbacks
from harness.__main__ import main

calls, summed_loss, stepped = [], LanguageObjective.summed_loss, RunCallbacks.stepped

def failing(self, model, batch):
    calls.append(1)
    if len(calls) == 5:
        raise torch.OutOfMemoryError("this device alone is full")
    return summed_loss(self, model, batch)

def stopping(self, step, values):
    stepped(self, step, values)
    if step == 4 and not self.resumed_at_step:
        os.kill(os.getpid(), signal.SIGTERM)

rank = int(os.environ["RANK"])
happening = {
    ("out_of_memory", 1): lambda: patch.object(LanguageObjective, "summed_loss", failing),
    ("stopped", 0): lambda: patch.object(RunCallbacks, "stepped", stopping),
}
for what, arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    with happening.get((what, rank), nullcontext)():
        code = main()
    print(f"{what} in process {rank}: exit code {code}", flush=True)
sys.exit(code)
"""


def run_in_two_processes(commands: list[tuple[str, list[str]]], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs command lines one after the other in the same two processes; each has a name for what happens to it."""
    script = folder / "under_torchrun.py"
    script.write_text(UNDER_TORCHRUN)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.run(
        [sys.executable, *launch, json.dumps(commands)],
        cwd=ROOT,
        env={**os.environ, "LORA_HARNESS_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["train_nll"] for row in rows if "train_nll" in row]


def only_run(runs_dir: Path) -> Path:
    (path,) = runs_dir.glob("*/result.json")
    return path.parent


@pytest.fixture(scope="module")
def together(sums: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder of folders of runs, which two processes have computed, and how they ended.

    All in the same two processes, which import PyTorch once; the run that fails is the last, for it ends them.
    """
    folder = tmp_path_factory.mktemp("together")
    commands = [
        ("lora-data_parallel", arguments(sums, folder / "lora-data_parallel", *LORA)),
        ("lora-sharded", arguments(sums, folder / "lora-sharded", *LORA, "shard_model=true")),
        ("full-sharded", arguments(sums, folder / "full-sharded", *FULL, "shard_model=true")),
        ("whole", arguments(sums, folder / "whole", *DROPOUT)),
        ("stopped", arguments(sums, folder / "parts", *DROPOUT)),
        ("resumed", arguments(sums, folder / "parts", *DROPOUT)),
        ("out_of_memory", arguments(sums, folder / "failing", *LORA)),
    ]
    return folder, run_in_two_processes(commands, folder)


@pytest.fixture(scope="module")
def alone(sums: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By method, the folder of the run that this process has computed."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_HARNESS_CACHE", str(folder / "cache"))
        patch.setenv("HYDRA_FULL_ERROR", "0")
        for method, overrides in (("lora", LORA), ("full", FULL)):
            patch.setattr(sys, "argv", ["harness", *arguments(sums, folder / method, *overrides)])
            GlobalHydra.instance().clear()
            assert main() == 0
    return {method: only_run(folder / method) for method in ("lora", "full")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora-data_parallel", "lora-sharded", "full-sharded"])
def test_two_processes_are_one(
    together: tuple[Path, subprocess.CompletedProcess[str]], alone: dict[str, Path], kind: str
) -> None:
    folder, ended = together
    for process in (0, 1):
        assert f"{kind} in process {process}: exit code 0\n" in ended.stdout, ended.stderr[-3000:]
    one, two = alone[kind.partition("-")[0]], only_run(folder / kind)
    assert one.name == two.name  # sharding is no part of a run's identity
    assert losses(two) == pytest.approx(losses(one), rel=1e-6, abs=1e-6)

    results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    assert [result["status"] for result in results] == ["finished"] * 2, results[1]["error"]
    assert results[1]["environment"]["num_processes"] == 2
    first, second = (result["metrics"] for result in results)
    for name in ("num_adapter_params", "num_trainable_params", "num_total_params", "num_steps", "best_step"):
        assert second[name] == first[name]
    for name in ("val_nll", "test_nll", "val_nll_last", "test_bits_per_byte"):
        assert second[name] == pytest.approx(first[name], rel=1e-5)

    (saved,) = (path.relative_to(one) for path in one.glob("*/*.safetensors"))
    expected, found = load_file(one / saved), load_file(two / saved)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    files = {path.relative_to(folder) for folder in (one, two) for path in folder.rglob("*") if path.is_file()}
    assert all((one / path).is_file() == (two / path).is_file() for path in files), files


# ---------------------------------------------------------------- failing and resuming together


@pytest.mark.slow
def test_an_error_in_one_process_is_the_result_of_the_run(
    together: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, ended = together
    assert ended.returncode != 0
    result = json.loads((only_run(folder / "failing") / "result.json").read_text())
    assert result["status"] == "out_of_memory"
    assert result["error"] == "process 1: OutOfMemoryError: this device alone is full"


def run_claimed(arguments: list[str], environment: dict[str, str], output: Path) -> None:
    """One process of a run that is being computed elsewhere, as the main process then hears."""

    def taken(*_: object) -> None:
        raise RunClaimedError("it is being computed by process 7 on other.")

    os.environ.update(environment)
    sys.argv = ["harness", *arguments]
    GlobalHydra.instance().clear()
    with output.open("w") as file, redirect_stderr(file), patch.object(Claim, "acquire", taken):
        sys.exit(main())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python 3.12 warns of it beside a thread
def test_a_run_that_is_claimed_ends_all_processes(sums: Path, tmp_path: Path) -> None:
    """Forked: what these two import is imported here. Their environment is that of `torchrun`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in "01":
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank, "LORA_HARNESS_CACHE": str(tmp_path / "cache")}
        job = (arguments(sums, tmp_path / "runs", *LORA), environment, tmp_path / rank)
        processes.append(multiprocessing.get_context("fork").Process(target=run_claimed, args=job))
        processes[-1].start()
    for process in processes:
        process.join(300)
    outputs = [(tmp_path / rank).read_text() for rank in "01"]
    assert processes[0].exitcode == 2 and processes[1].exitcode not in (0, None), outputs
    assert "it is being computed by process 7 on other." in outputs[0]
    assert not list((tmp_path / "runs").glob("*/result.json"))


@pytest.mark.slow
def test_each_process_resumes_with_its_own_random_state(
    together: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """Dropout draws in both processes; the losses after the stop are those of a run that was never stopped."""
    folder, ended = together
    for process in (0, 1):
        assert f"stopped in process {process}: exit code 75\n" in ended.stdout
        assert f"resumed in process {process}: exit code 0\n" in ended.stdout
    one, two = only_run(folder / "whole"), only_run(folder / "parts")
    assert len(losses(two)) == 12
    assert losses(two) == losses(one)


class Store(dict[str, str]):
    """Stands in for the store of a process group."""

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        if self.get(key, "") == expected:
            self[key] = desired
        return self[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(key, default)


def companions(process: int, store: Store | None, **options: Any) -> Companions:
    accelerator = SimpleNamespace(process_index=process, num_processes=1)
    return Companions(accelerator, "run", store=store, **options)  # type: ignore[arg-type]


def test_a_lost_connection_is_explained_by_the_failure_of_another_process() -> None:
    store = Store()
    first, second = companions(1, store), companions(0, store)
    assert first.report(MemoryError("full"), status="out_of_memory") is None
    message = "process 1 of this run failed: MemoryError: full"
    with pytest.raises(ProcessFailedError, match=message) as caught, second.together():
        raise RuntimeError("Connection closed by peer")
    assert (caught.value.status, caught.value.process) == ("out_of_memory", 1)
    with pytest.raises(ProcessFailedError):
        second.check()
    first.check()
    # What it finds by itself stays its own, and so does everything of one process alone.
    with pytest.raises(KeyError), second.together():
        raise KeyError("mine")
    with pytest.raises(RuntimeError, match="mine"), companions(0, None).together():
        raise RuntimeError("mine")


def test_communication_is_ended_when_another_process_has_failed() -> None:
    store, aborted = Store(), threading.Event()
    waiting = companions(0, store, abort=aborted.set, poll_seconds=0.01)
    with waiting.together():
        companions(1, store).report(ValueError("wrong"))
        assert aborted.wait(5)
    calm = companions(0, Store(), abort=lambda: pytest.fail("nobody failed"), poll_seconds=0.01)
    with calm.together():
        pass
    assert not any(thread.name == "companions" for thread in threading.enumerate())


def test_a_checkpoint_holds_the_random_state_of_every_process(caplog: pytest.LogCaptureFixture) -> None:
    model, config = torch.nn.Linear(2, 2), TrainerConfig(learning_rate=1e-3)
    optimizer = build_optimizer(model, config)
    torch.manual_seed(1)
    other = torch.get_rng_state()
    drawn = torch.rand(3)
    torch.manual_seed(0)

    def process(number: int, num: int) -> Any:
        return SimpleNamespace(
            process_index=number,
            num_processes=num,
            device=torch.device("cpu"),
            gather=lambda tensor: torch.cat([tensor, other.unsqueeze(0)]),
        )

    tensors = pack_training(model, optimizer, None, method_state={}, accelerator=process(0, 2))
    unpack_training(tensors, model, build_optimizer(model, config), accelerator=process(1, 2))
    assert torch.equal(torch.rand(3), drawn)
    assert not caplog.records

    draws = []
    for number, num in ((0, 3), (1, 3), (0, 3), (0, 1)):
        unpack_training(tensors, model, build_optimizer(model, config), accelerator=process(number, num))
        draws.append(torch.rand(3))
    assert "the checkpoint is of 2 processes and these are 3" in caplog.text
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[3])


@pytest.fixture
def _process_group() -> Iterator[None]:
    """One process that takes itself for several."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded_llama(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny Llama, sharded over the one process."""
    model = load_model(ModelConfig(name="tiny", tiny=TinyModel.llama), num_labels=None, pad_token_id=0, seed=0)
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=2)
    monkeypatch.setattr("harness.processes.distributed.init_device_mesh", lambda kind, _: init_device_mesh(kind, (1,)))
    monkeypatch.setattr(type(model.model), "to", lambda *_: pytest.fail("moved as a whole"))
    place_on_device(model.model, accelerator, shard_model=True)  # type: ignore[arg-type]
    return model.model


@pytest.mark.usefixtures("_process_group")
def test_a_model_that_is_sharded_is_never_whole_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []

    def moving(params: list[Any], buffers: list[Any], device: torch.device) -> None:
        moved.append(sum(value.nbytes for value in params if not isinstance(value, DTensor)))

    monkeypatch.setattr("torch.distributed.fsdp._fully_shard._fsdp_init._move_states_to_device", moving)
    model = sharded_llama(monkeypatch)
    assert len(moved) == 3  # two blocks, and what is in none
    assert sum(moved) == sum(value.nbytes for value in model.parameters())
    assert max(moved) < sum(moved) / 2
    assert is_sharded(model)


@pytest.mark.usefixtures("_process_group")
def test_scoring_leaves_the_parts_of_a_sharded_model_where_the_optimizer_finds_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FSDP keeps what is in no block whole after a forward pass, and only a backward pass undoes that."""
    model = sharded_llama(monkeypatch)
    parts = dict(model.named_parameters())
    assert all(isinstance(part, DTensor) for part in parts.values())
    ids = torch.randint(3, 260, (2, 8))
    with evaluating(model):
        summed_nll(model, Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, 16, 14))
    assert all(value is parts[name] for name, value in model.named_parameters())


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("name", SHARDED)
def test_an_optimizer_steps_on_the_parts_as_on_the_whole(name: Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, with the state packed and unpacked between them."""
    whole = load_model(ModelConfig(name="tiny", tiny=TinyModel.llama), num_labels=None, pad_token_id=0, seed=0).model
    config = TrainerConfig(learning_rate=1e-2, optimizer=name)
    ids = torch.randint(3, 260, (2, 8), generator=torch.Generator().manual_seed(0))
    process = SimpleNamespace(
        process_index=0, num_processes=1, device=torch.device("cpu"), gather=lambda tensor: tensor
    )

    def two_steps(model: Any) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] | None = None
        for _ in range(2):
            optimizer = build_optimizer(model, config)
            if tensors is not None:
                unpack_training(tensors, model, optimizer, accelerator=process)  # type: ignore[arg-type]
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tensors = pack_training(model, optimizer, None, method_state={}, accelerator=process)  # type: ignore[arg-type]
        return {key: full_tensor(value.detach()).clone() for key, value in model.named_parameters()}

    expected = two_steps(whole)
    model = sharded_llama(monkeypatch)
    before = {key: full_tensor(value.detach()).clone() for key, value in model.named_parameters()}
    found = two_steps(model)
    for key, value in expected.items():
        assert not torch.equal(found[key], before[key]), key
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)
