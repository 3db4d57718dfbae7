"""One run, end to end, on tiny models and a small file: what it leaves behind, whatever happens to it."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from harness import prepare as prepare_module
from harness import run as run_module
from harness.config.composing import from_dict
from harness.config.schema import ModelConfig, RunConfig, TinyModel
from harness.content.errors import ContentError, ModelError
from harness.content.identity import identify, planned
from harness.data.batches import TrainingBatches
from harness.data.labelled import load_data
from harness.folder import kept_result
from harness.methods.peft_files import load_adapter
from harness.models.loading import load_model
from harness.models.saving import save_model
from harness.models.tokenizers import load_tokenizer
from harness.placement.architectures import PlacementError
from harness.plan import plan
from harness.prepare import prepare
from harness.processes.stopping import PreemptedError
from harness.results.claims import Claim, RunClaimedError
from harness.results.metrics import METRICS
from harness.results.schema import Status, read_result
from harness.run import run
from harness.tasks.families import find_family
from harness.training import loop
from harness.training.callbacks import RunCallbacks

# What a clock or the operating system says differs from run to run; everything else is exact.
NOT_EXACT = {
    "train_seconds",
    "step_seconds_median",
    "preparation_seconds",
    "wall_seconds",
    "train_tokens_per_second",
    "peak_rss_bytes",
}
WORDS = {"fruit": "apple pear plum cherry melon", "metal": "iron zinc lead copper silver", "sea": "tide wave reef gulf"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 120 rows in three classes, of unequal length."""
    path = tmp_path_factory.mktemp("rows") / "train.csv"
    draw = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(120):
            label = list(WORDS)[number % 3]
            writer.writerow([" ".join(draw.choices(WORDS[label].split(), k=draw.randint(2, 9))), label])
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Inside, a run that has made so many steps gets SIGTERM."""
    asked = RunCallbacks.wants_checkpoint

    def stop(self: RunCallbacks, now: int) -> bool:
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return asked(self, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCallbacks, "wants_checkpoint", stop)
        yield


def config(rows: Path, runs_dir: Path, method: str = "lora", /, **overrides: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": {"name": "tiny_bert", "tiny": "bert"},
        "dataset": {"name": "words", "train_file": str(rows), "max_length": 48},
        "method": {"name": method},
        "trainer": {"learning_rate": 3e-3, "max_steps": 6, "batch_size": 8, "eval_every": 4},
        "tracking": {"wandb": "disabled", "progress": False, "log_every": 2},
        "runs_dir": str(runs_dir),
        "device": "cpu",
    }
    if method == "lora":
        values["rank"] = {"rank": 4, "alpha": 16.0}
        values["target_layers"] = {"name": "qv", "projections": ["q", "v"]}
    for name, value in overrides.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) and name in values else value
    return from_dict(values)


def exact(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in NOT_EXACT}


@pytest.mark.parametrize(("method", "folder"), [("lora", "adapter"), ("full", "model"), ("head_only", "head")])
def test_a_run_leaves_what_the_contract_says(rows: Path, tmp_path: Path, method: str, folder: str) -> None:
    wanted = config(rows, tmp_path, method)
    result = run(wanted)
    run_dir = tmp_path / identify(wanted).run_id

    assert result.status is Status.FINISHED
    assert read_result(run_dir / "result.json") == result
    assert set(result.metrics) <= set(METRICS)
    assert {"peak_memory_bytes", "step_seconds_median", "val_accuracy", "test_accuracy", "test_accuracy_last"} <= set(
        result.metrics
    )
    parts = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes")
    assert sum(result.metrics[part] for part in parts) == result.metrics["peak_memory_bytes"]
    saved = list((run_dir / folder).glob("*.safetensors"))
    assert result.metrics["checkpoint_bytes"] == sum(path.stat().st_size for path in saved) > 0
    assert sorted(path.name for path in run_dir.iterdir()) == sorted(
        ["config.yaml", "log.txt", "metrics.jsonl", "predictions", "result.json", folder]
    )
    curve = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve if "train_nll" in row] == [2, 4, 6]
    assert [row["step"] for row in curve if "val_accuracy" in row] == [4, 6]


def test_a_result_says_what_of_its_rows_was_cut_and_which_class_f1_is_of(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"text number {n % 50},{'good' if n % 2 else 'bad'}\n" for n in range(60)))
    f1 = {"metrics": ["f1"], "best_metric": "f1", "max_length": 15}
    results = [
        run(config(path, tmp_path, "head_only", dataset={**f1, **named})) for named in ({}, {"positive_label": "bad"})
    ]
    assert [result.environment["positive_label"] for result in results] == ["good", "bad"]
    assert results[0].run_id != results[1].run_id
    assert results[0].metrics["test_nll"] == results[1].metrics["test_nll"]
    assert results[0].metrics["test_f1"] != results[1].metrics["test_f1"]
    notes = results[0].environment["data_notes"]
    assert re.match(r"dataset=words, train: 3\d of 49 texts are longer than dataset.max_length=15 tokens", notes[0])
    assert any(note.endswith("test rows have the text of a row of train.") for note in notes)
    log = (tmp_path / results[0].run_id / "log.txt").read_text()
    assert all(f"WARNING {note}" in log for note in notes)


def test_label_smoothing_is_not_in_the_training_loss(rows: Path, tmp_path: Path) -> None:
    """The first step of the curve is of the untrained model on the same batch, whatever is minimised."""
    settings = {"tracking": {"log_every": 1}}

    def curve(**trainer: float) -> list[float]:
        result = run(config(rows, tmp_path, **settings, trainer=trainer))
        lines = (tmp_path / result.run_id / "metrics.jsonl").read_text().splitlines()
        return [row["train_nll"] for row in map(json.loads, lines) if "train_nll" in row]

    plain, smoothed = curve(), curve(label_smoothing=0.3)
    assert smoothed[0] == plain[0]
    assert smoothed[1:] != plain[1:]


def test_counts_of_the_three_methods(rows: Path, tmp_path: Path) -> None:
    counts = {method: run(config(rows, tmp_path, method)).metrics for method in ("lora", "full", "head_only")}
    head = 64 * 3 + 3
    # Two blocks of width 64, q and v, rank 4.
    assert counts["lora"]["num_adapter_params"] == 2 * 2 * 4 * (64 + 64)
    assert counts["lora"]["num_trainable_params"] == counts["lora"]["num_adapter_params"] + head
    assert counts["head_only"]["num_trainable_params"] == head
    assert counts["full"]["num_trainable_params"] == counts["full"]["num_total_params"]
    assert all(metrics["num_head_params"] == head for metrics in counts.values())
    assert counts["full"]["peak_memory_bytes"] > counts["lora"]["peak_memory_bytes"]
    assert counts["lora"]["checkpoint_bytes"] < counts["full"]["checkpoint_bytes"]


def test_the_same_config_gives_bitwise_equal_metrics_and_another_seed_does_not(rows: Path, tmp_path: Path) -> None:
    dropout = {"model": {"dropout": 0.1}, "method": {"adapter_dropout": 0.1}}
    first = run(config(rows, tmp_path / "a", **dropout))
    torch.rand(7)  # whatever the process drew before must not matter
    second = run(config(rows, tmp_path / "b", **dropout))
    other = run(config(rows, tmp_path / "a", seed=1, **dropout))
    assert exact(first.metrics) == exact(second.metrics)
    assert first.run_id == second.run_id
    weights = [load_file(tmp_path / at / first.run_id / "adapter/adapter_model.safetensors") for at in "ab"]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert exact(other.metrics) != exact(first.metrics)
    assert other.cell_id == first.cell_id


def test_data_order_and_head_do_not_depend_on_the_method(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[list[int]]] = {}
    heads: dict[str, torch.Tensor] = {}
    epoch, train = TrainingBatches.epoch, loop.train_in_turns

    def watched_epoch(self: TrainingBatches, number: int, *, start: int = 0) -> Iterator[list[Any]]:
        for micro_batches in epoch(self, number, start=start):
            seen[method].append(micro_batches[0].inputs["input_ids"].flatten().tolist())
            yield micro_batches

    def watched_train(model: Any, *positional: Any, **named: Any) -> Any:
        heads[method] = model.classifier.weight.detach().clone()
        return train(model, *positional, **named)

    monkeypatch.setattr(TrainingBatches, "epoch", watched_epoch)
    monkeypatch.setattr(run_module, "train_in_turns", watched_train)
    for method in ("lora", "full", "head_only"):
        seen[method] = []
        run(config(rows, tmp_path, method))
    assert len(seen["lora"]) >= 6
    assert seen["lora"] == seen["full"] == seen["head_only"]
    assert torch.equal(heads["lora"], heads["full"])
    assert torch.equal(heads["lora"], heads["head_only"])


def test_a_run_that_diverges_says_so_and_keeps_what_was_measured(rows: Path, tmp_path: Path) -> None:
    result = run(config(rows, tmp_path, "full", trainer={"learning_rate": 1e30, "max_gradient_norm": None}))
    assert result.status is Status.DIVERGED
    assert "try a lower trainer.learning_rate" in result.error
    assert result.metrics["peak_memory_bytes"] > 0
    assert "test_accuracy" not in result.metrics


def test_a_model_that_breaks_on_its_last_step_has_diverged(rows: Path, tmp_path: Path) -> None:
    result = run(config(rows, tmp_path, "full", trainer={"learning_rate": 1e30, "max_steps": 1, "eval_every": 0}))
    assert result.status is Status.DIVERGED
    assert "predictions on val were not finite at step 1" in result.error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), Status.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (MemoryError(), Status.OUT_OF_MEMORY),
        (KeyError("surprise"), Status.FAILED),
    ],
)
def test_what_goes_wrong_in_training_becomes_a_status(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(run_module, "train_in_turns", fail)
    result = run(config(rows, tmp_path))
    assert result.status == status
    assert type(error).__name__ in result.error
    assert "num_adapter_params" in result.metrics
    assert "peak_memory_bytes" not in result.metrics
    assert "Traceback" in (tmp_path / result.run_id / "log.txt").read_text()


def test_a_finished_run_is_not_made_again(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(config(rows, tmp_path))
    monkeypatch.setattr(run_module, "prepare", lambda _: pytest.fail("prepared a finished run"))
    assert run(config(rows, tmp_path)) == first


def test_flipped_labels_are_another_run_and_a_copy_of_the_file_is_the_same(rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(rows.read_text())
    first = run(config(path, tmp_path / "runs"))
    copied = tmp_path / "copied.csv"
    copied.write_text(rows.read_text())
    assert run(config(copied, tmp_path / "runs")) == first
    assert first.environment["content"] == identify(config(path, tmp_path)).content
    path.write_text(rows.read_text().replace(",fruit", ",x").replace(",metal", ",fruit").replace(",x", ",metal"))
    second = run(config(path, tmp_path / "runs"))
    assert second.run_id != first.run_id
    assert second.metrics["train_nll"] != first.metrics["train_nll"]


@pytest.mark.parametrize("when", ["before it is read", "after it is read"])
def test_data_that_are_edited_after_planning_are_refused(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(rows.read_text())
    wanted = config(path, tmp_path / "runs")
    planned = identify(wanted)
    load = load_data

    def edited(*arguments: Any, **options: Any) -> Any:
        loaded = load(*arguments, **options) if when == "after it is read" else None
        path.write_text(rows.read_text().replace(",fruit", ",x"))
        return loaded or load(*arguments, **options)

    monkeypatch.setattr(prepare_module, "find_family", lambda task: replace(find_family(task), load=edited))
    with pytest.raises(ContentError, match=r"dataset\.train: changed since this run was planned"):
        run(wanted, planned)
    assert not (tmp_path / "runs" / planned.run_id).exists()


@pytest.mark.parametrize(
    ("status", "rerun", "stands"),
    [
        ("finished", "failed", True),
        ("diverged", "failed", True),
        ("failed", "failed", False),
        ("out_of_memory", "failed", False),
        ("failed", "never", True),
        ("finished", "all", False),
    ],
)
def test_which_results_stand(rows: Path, tmp_path: Path, status: str, rerun: str, stands: bool) -> None:
    wanted = config(rows, tmp_path, rerun=rerun)
    path = tmp_path / identify(wanted).run_id / "result.json"
    path.parent.mkdir(parents=True)
    fields = {"run_id": identify(wanted).run_id, "cell_id": "c", "sweep": None, "config": {}, "schema_version": 1}
    path.write_text(json.dumps({**fields, "status": status}))
    assert (kept_result(planned(wanted)) is not None) == stands


def test_a_half_written_result_does_not_stand(rows: Path, tmp_path: Path) -> None:
    wanted = config(rows, tmp_path)
    path = tmp_path / identify(wanted).run_id / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"run_id": ')
    assert kept_result(planned(wanted)) is None


def test_a_run_that_another_process_computes_is_left_to_it(rows: Path, tmp_path: Path) -> None:
    wanted = config(rows, tmp_path)
    with (
        Claim.acquire(tmp_path / identify(wanted).run_id),
        pytest.raises(RunClaimedError, match=f"process {os.getpid()} on"),
    ):
        run(wanted)
    assert run(wanted).status is Status.FINISHED


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on_from_it_bitwise(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {"max_steps": 9, "eval_every": 2}
    dropout = {"model": {"dropout": 0.1}, "method": {"adapter_dropout": 0.1}}
    whole = run(config(rows, tmp_path / "whole", trainer=trainer, **dropout))

    stepped = RunCallbacks.stepped

    def terminated_at_5(self: Any, step: int, values: dict[str, float]) -> None:
        stepped(self, step, values)
        if step == 5 and not self.resumed_at_step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunCallbacks, "stepped", terminated_at_5)
    wanted = config(rows, tmp_path / "cut", trainer=trainer, **dropout)
    run_dir = tmp_path / "cut" / identify(wanted).run_id
    with pytest.raises(PreemptedError, match="stopped after step 5"):
        run(wanted)
    assert (run_dir / "checkpoint.safetensors").is_file()
    assert not (run_dir / "result.json").exists()

    resumed = run(wanted)
    assert exact(resumed.metrics) == exact(whole.metrics)
    assert not (run_dir / "checkpoint.safetensors").exists()

    def curve(directory: Path) -> list[dict[str, float]]:
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in NOT_EXACT} for line in lines]

    assert curve(run_dir) == curve(tmp_path / "whole" / whole.run_id)


def test_a_damaged_checkpoint_is_refused_with_a_word_and_the_run_starts_over(
    rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = config(rows, tmp_path)
    run_dir = tmp_path / identify(wanted).run_id
    run_dir.mkdir()
    (run_dir / "checkpoint.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
    assert run(wanted).status is Status.FINISHED
    assert "the run starts over" in caplog.text


def test_a_checkpoint_of_other_data_is_refused_with_a_word_and_the_run_starts_over(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With fewer rows than before, a loop that continued would ask for a step that its epoch does not have."""
    trainer = {"max_steps": 12, "eval_every": 0, "checkpoint_every": 5}
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("".join(rows.read_text().splitlines(keepends=True)[:31]))
    wanted = config(fewer, tmp_path / "runs", trainer=trainer)
    undisturbed = run(wanted)

    keep = RunCallbacks.keep_checkpoint

    def killed_after(self: Any, *state: Any) -> None:
        keep(self, *state)
        raise PreemptedError("killed")

    monkeypatch.setattr(RunCallbacks, "keep_checkpoint", killed_after)
    more = config(rows, tmp_path / "runs", trainer=trainer)
    with pytest.raises(PreemptedError):
        run(more)
    monkeypatch.undo()
    checkpoint, folder = "checkpoint.safetensors", tmp_path / "runs" / identify(wanted).run_id
    again = run(config(fewer, tmp_path / "runs", trainer=trainer, rerun="never"))
    assert again == undisturbed
    (folder / "result.json").unlink()
    (tmp_path / "runs" / identify(more).run_id / checkpoint).rename(folder / checkpoint)
    again = run(wanted)
    assert "was made from other settings or content (run id), data, numbers of training examples" in caplog.text
    assert exact(again.metrics) == exact(undisturbed.metrics)


def test_gradient_checkpointing_and_micro_batches_train_alike(rows: Path, tmp_path: Path) -> None:
    plain = run(config(rows, tmp_path / "a"))
    for trainer in ({"gradient_checkpointing": True}, {"micro_batch_size": 2}):
        other = run(config(rows, tmp_path / "b", trainer=trainer))
        assert other.run_id != plain.run_id
        assert other.metrics["train_nll"] == pytest.approx(plain.metrics["train_nll"], abs=1e-5)
        assert other.metrics["peak_memory_bytes"] < plain.metrics["peak_memory_bytes"]


def test_bfloat16_base_and_autocast(rows: Path, tmp_path: Path) -> None:
    half = run(config(rows, tmp_path, model={"dtype": "bfloat16"}, trainer={"precision": "bf16"}))
    whole = run(config(rows, tmp_path))
    assert half.status is Status.FINISHED
    assert half.metrics["num_total_params"] == whole.metrics["num_total_params"]
    assert half.metrics["weights_bytes"] < 0.6 * whole.metrics["weights_bytes"]
    assert half.metrics["train_nll"] == pytest.approx(whole.metrics["train_nll"], abs=0.05)


@pytest.mark.parametrize(("model", "projections"), [("gpt2", ["qkv"]), ("llama", ["all"])])
def test_decoders_classify_too(rows: Path, tmp_path: Path, model: str, projections: list[str]) -> None:
    wanted = config(
        rows,
        tmp_path,
        model={"name": f"tiny_{model}", "tiny": model},
        target_layers={"name": "x", "projections": projections},
    )
    assert run(wanted).status is Status.FINISHED


def test_regression(rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    with rows.open() as source, path.open("w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["text", "label"])
        writer.writerows([row["text"], str(len(row["text"]) / 60)] for row in csv.DictReader(source))
    dataset = {"train_file": str(path), "task": "regression", "metrics": ["pearson"], "best_metric": "pearson"}
    result = run(config(rows, tmp_path / "runs", dataset=dataset, trainer={"max_steps": 20}))
    assert result.status is Status.FINISHED
    assert result.metrics["test_mse"] > 0
    assert result.metrics["num_head_params"] == 65


def test_a_plan_needs_no_weights(rows: Path, tmp_path: Path) -> None:
    planned = plan(config(rows, tmp_path))
    assert planned.num_adapter_params == 2048
    assert [str(target) for target in planned.targets] == [
        f"bert.encoder.layer.{block}.attention.self.{name}" for block in (0, 1) for name in ("query", "value")
    ]


@pytest.fixture(scope="module")
def without_pooler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as a masked language model leaves it: neither pooler nor classifier."""
    folder = tmp_path_factory.mktemp("models") / "without_pooler"
    tiny = ModelConfig(name="tiny_bert", tiny=TinyModel.bert)
    model = load_model(tiny, num_labels=3, pad_token_id=0, seed=5).model
    save_model(model, load_tokenizer(tiny), folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "pooler" not in name and "classifier" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_fresh_pooler_is_trained_saved_and_counted_with_the_head(
    rows: Path, tmp_path: Path, without_pooler: Path
) -> None:
    model = {"model": {"name": "masked", "tiny": None, "path": str(without_pooler)}}
    results = {method: run(config(rows, tmp_path, method, **model)) for method in ("lora", "full", "head_only")}
    head = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    for result in results.values():
        assert result.metrics["num_head_params"] == 64 * 64 + 64 + 64 * 3 + 3
        (note,) = result.environment["model_notes"]
        assert "lacks bert.pooler: drawn from the seed, and trained, saved and counted with the head." in note
        assert note in (tmp_path / result.run_id / "log.txt").read_text()
    adapter = tmp_path / results["lora"].run_id / "adapter"
    saved = load_file(adapter / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.") for name in saved if "lora_" not in name} == head
    assert set(load_file(tmp_path / results["head_only"].run_id / "head" / "head.safetensors")) == head
    for folder in (adapter, tmp_path / results["head_only"].run_id / "head"):
        labels = json.loads((folder / "labels.json").read_text())
        assert labels["id2label"] == {"0": "fruit", "1": "metal", "2": "sea"}
        assert labels["label2id"] == {"fruit": 0, "metal": 1, "sea": 2}

    prepared = prepare(config(rows, tmp_path, **model))
    batch = prepared.data.test.batch(range(6))
    base = load_model(prepared.config.model, num_labels=3, pad_token_id=0, seed=1).model
    theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
    load_adapter(prepared.model, adapter)
    with torch.no_grad():
        ours = prepared.model.eval()(**batch.inputs).logits
        assert torch.allclose(ours, theirs(**batch.inputs).logits, atol=1e-5)
    on_the_pooler = {"target_layers": {"name": "pooler", "projections": [], "modules": [r"bert\.pooler\.dense"]}}
    with pytest.raises(PlacementError, match=r"bert\.pooler\.dense belong to the task head"):
        prepare(config(rows, tmp_path, **model, **on_the_pooler))


def test_a_tokenizer_larger_than_the_embedding_is_refused_before_training(
    rows: Path, tmp_path: Path, without_pooler: Path
) -> None:
    folder = tmp_path / "larger"
    shutil.copytree(without_pooler, folder)
    tokenizer = load_tokenizer(ModelConfig(name="x", path=str(folder)))
    tokenizer.add_tokens(["apple"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    wanted = config(rows, tmp_path / "runs", model={"name": "larger", "tiny": None, "path": str(folder)})
    with pytest.raises(ModelError, match=r"gives ids up to 260, and the model embeds 0 to 259: 'apple' is 260"):
        run(wanted)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/*"))


def test_what_a_run_saves_says_what_it_is(rows: Path, tmp_path: Path, without_pooler: Path) -> None:
    """Plain transformers and peft load it, with the names of the classes and the base's own settings."""
    base = tmp_path / "base"
    shutil.copytree(without_pooler, base)
    settings = json.loads((base / "config.json").read_text())
    own = {"use_cache": True, "hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.125, "problem_type": "x"}
    (base / "config.json").write_text(json.dumps(settings | own | {"id2label": {"0": "a", "1": "b", "2": "c"}}))
    model = {"model": {"name": "own", "tiny": None, "path": str(base)}}
    results = {method: run(config(rows, tmp_path, method, **model)) for method in ("lora", "full")}
    names = sorted(WORDS)
    id2label, label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    assert all(result.environment["label_names"] == names for result in results.values())

    saved = tmp_path / results["full"].run_id / "model"
    prepared = prepare(config(rows, tmp_path, "full", **model))
    batch = prepared.data.test.batch(range(len(prepared.data.test)))
    full = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    assert (full.config.id2label, full.config.label2id) == (id2label, label2id)
    written = json.loads((saved / "config.json").read_text())
    assert {name: written[name] for name in own} == own | {"problem_type": "single_label_classification"}
    assert written["dtype"] == "float32"
    with torch.no_grad():
        correct = (full(**batch.inputs).logits.argmax(-1) == batch.labels).float().mean()
    assert correct.item() == pytest.approx(results["full"].metrics["test_accuracy"])

    adapter = tmp_path / results["lora"].run_id / "adapter"
    described = peft.PeftConfig.from_pretrained(str(adapter))
    assert (described.base_model_name_or_path, described.revision) == (str(base), None)
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(adapter), num_labels=3).eval()
    with torch.no_grad():
        correct = (theirs(**batch.inputs).logits.argmax(-1) == batch.labels).float().mean()
    assert correct.item() == pytest.approx(results["lora"].metrics["test_accuracy"])
