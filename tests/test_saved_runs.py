"""Runs that have ended: scored again to the bit by `evaluate=`, swapped on one base, merged by `export=`; refusals."""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import test_run_language
import torch
from scripts import load_script
from test_bitfit_and_norms import COUNTS
from test_flops import SIZES
from test_run import WORDS, config, rows  # noqa: F401
from test_run_language import data  # noqa: F401
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from harness import saved as saved_module
from harness.__main__ import main
from harness.commands import find_request
from harness.config.schema import ModelConfig, RunConfig, TinyModel
from harness.config.validation import ConfigError
from harness.content.errors import ModelError
from harness.deltas import DeltaWeight, all_targets, by_untrained_base, find_each, read_deltas, set_weight, weight_of
from harness.methods import lora_method
from harness.methods.adapting import remove_lora
from harness.methods.peft_method import PeftMethodError
from harness.methods.swapping import merge_in, put_in, restored
from harness.models.loading import load_model
from harness.models.saving import save_model
from harness.models.tiny import byte_tokenizer
from harness.models.tokenizers import load_tokenizer
from harness.plan import plan
from harness.prepare import build_accelerator
from harness.results.schema import RunResult, Status
from harness.run import run
from harness.saved import Base, SavedRun, by_base, find_saved

PLACED = {"name": "qv", "projections": ["q", "v"]}
RANK = {"rank": 6, "alpha": 16.0}
PEFT = {
    "ia3": {"name": "ia3"},
    "adalora": {"name": "adalora", "peft": {"tinit": 1, "tfinal": 2}},
    "vera": {"name": "vera", "peft": {"r": 8}},
    "lily": {"name": "lily", "peft": {"r": 4}},
    "trainable_tokens": {"name": "trainable_tokens", "peft": {"token_indices": [36, 68, 87]}},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": RANK}),
    # A part of a fused matrix, on another base.
    "slices": ("lora", {"model": {"name": "tiny_gpt2", "tiny": "gpt2"}, "rank": {"rank": 3, "alpha": 16.0}}),
    "dora": ("lora", {"variant": {"name": "dora", "dora": True}}),
    "pissa": ("lora", {"variant": {"name": "pissa", "init": "pissa"}}),
    "embedding": ("lora", {"target_layers": {"name": "x", "projections": ["q", "embedding"]}}),
    "bias": ("lora", {"variant": {"name": "bias", "bias": "adapted"}}),
    "biases_in_half": (
        "lora",
        {
            "variant": {"name": "bias_all", "bias": "all"},
            "model": {"dtype": "bfloat16"},
            "trainer": {"precision": "bf16"},
        },
    ),
    "full": ("full", {}),
    "head_only": ("head_only", {}),
    "bitfit": ("bitfit", {}),
    "norms": ("norms", {}),
    "bitfit_in_half": ("bitfit", {"model": {"dtype": "bfloat16"}, "trainer": {"precision": "bf16"}}),
    "ia3": ("ia3", {"method": PEFT["ia3"], "target_layers": PLACED}),
    "adalora": ("adalora", {"method": PEFT["adalora"], "target_layers": PLACED, "rank": RANK}),
    "vera": ("vera", {"method": PEFT["vera"], "target_layers": PLACED}),
    "lily": ("lily", {"method": PEFT["lily"], "target_layers": PLACED}),
    "trainable_tokens": ("trainable_tokens", {"method": PEFT["trainable_tokens"]}),
}


Command = Callable[..., tuple[int, str, str]]


class Saved(NamedTuple):
    runs_dir: Path
    results: dict[str, RunResult]

    def ids(self, *names: str) -> list[str]:
        return [self.results[name].run_id for name in names or self.results]


@pytest.fixture(scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_HARNESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def ended(rows: Path, tmp_path_factory: pytest.TempPathFactory, _cache: None) -> Saved:  # noqa: F811
    """A finished run of each case, on one base."""
    runs_dir = tmp_path_factory.mktemp("runs")
    return Saved(
        runs_dir,
        {name: trained(config(rows, runs_dir, method, **changes)) for name, (method, changes) in CASES.items()},
    )


def trained(wanted: RunConfig) -> RunResult:
    result = run(wanted)
    assert result.status is Status.FINISHED, result.error
    return result


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """`python -m harness` with these words: exit code, output, errors."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["harness", *words])
        capfd.readouterr()
        return (main(), *capfd.readouterr())

    return call


def read_scores(folder: Path) -> list[dict[str, str]]:
    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- evaluate


def test_every_method_has_the_scores_of_its_result_to_the_bit(
    ended: Saved, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def counted(model: Any, **options: Any) -> Any:
        loaded.append(model.name if not options["keeps_head"] else "own")
        return load_model(model, **options)

    monkeypatch.setattr(saved_module, "load_model", counted)
    ids = ended.ids()
    code, printed, errors = command(
        f"evaluate={','.join(ids)}", "split=test,val,train", f"to={tmp_path / 'scores'}", f"runs_dir={ended.runs_dir}"
    )
    assert code == 0, errors
    assert "differ" not in errors
    # Each base once, and in each form in which it is held; the full model is its own.
    assert sorted(loaded) == ["own", "tiny_bert", "tiny_bert", "tiny_gpt2"]
    table = read_scores(tmp_path / "scores")
    assert [(row["run_id"], row["split"]) for row in table] == [(e, s) for e in ids for s in ("test", "val", "train")]
    # Where the best step is not the last one, both were scored: each with its own weights, also in bf16.
    in_half = ended.results["bitfit_in_half"].metrics
    assert in_half["best_step"] < in_half["num_steps"] and in_half["test_nll"] != in_half["test_nll_last"]
    lines = printed.splitlines()
    assert lines[0].split() == list(table[0]) and len(lines) == 1 + len(table)
    for row in table:
        if row["split"] == "train":
            continue
        metrics = next(result.metrics for result in ended.results.values() if result.run_id == row["run_id"])
        for name in ("accuracy", "nll", "majority_share"):
            assert float(row[name]) == metrics[f"{row['split']}_{name}"], (row["run_id"], name)
        path = Path(row["run_id"]) / "predictions" / f"{row['split']}.parquet"
        again, own = pd.read_parquet(tmp_path / "scores" / path), pd.read_parquet(ended.runs_dir / path)
        pd.testing.assert_frame_equal(again, own, check_exact=True)


def test_biases_are_planned_and_counted_as_adapter_parameters(ended: Saved) -> None:
    factors = 2 * 2 * 4 * (64 + 64)  # q and v of two blocks
    for name, num_biases in (("bias", 2 * 2 * 64), ("biases_in_half", COUNTS["bitfit"])):
        (saved,) = find_saved(ended.ids(name), ended.runs_dir)
        metrics = saved.result.metrics
        assert metrics["num_adapter_params"] == plan(saved.config).num_adapter_params == factors + num_biases
        assert metrics["num_trainable_params"] == factors + num_biases + metrics["num_head_params"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_language_model_has_the_scores_of_its_result_to_the_bit(
    data: Path,  # noqa: F811
    tmp_path: Path,
    command: Command,
) -> None:
    half = {"model": {"dtype": "bfloat16"}, "trainer": {"precision": "bf16"}}
    unembedding = {"name": "x", "projections": ["q", "lm_head"]}
    wanted = [
        test_run_language.config(data, tmp_path, *kind, **changes)
        for kind, changes in (
            (("lora", "causal_lm"), {"target_layers": unembedding}),
            (("norms", "completion"), half),
            (("lora", "completion"), half),
            (("ia3", "completion"), {"target_layers": PLACED, **half}),
        )
    ]
    results = [trained(each) for each in wanted]
    ids = [result.run_id for result in results]
    code, _, errors = command(f"evaluate={','.join(ids)}", f"runs_dir={tmp_path}", f"to={tmp_path / 'scores'}")
    assert code == 0 and "differ" not in errors, errors
    for row, result, own in zip(read_scores(tmp_path / "scores"), results, wanted, strict=True):
        scores = {name: float(row[name]) for name in ("nll", "perplexity", *own.dataset.metrics)}
        assert scores == {name: result.metrics[f"test_{name}"] for name in scores}
        texts = Path(result.run_id) / "generations" / "generations.jsonl"
        assert (tmp_path / "scores" / texts).is_file() == (own.dataset.task == "completion")
        if own.dataset.task == "completion":
            assert (tmp_path / "scores" / texts).read_text() == (tmp_path / texts).read_text()

    # The adapted unembedding is merged into a matrix of its own; the embedding keeps the tied one.
    code, _, errors = command(f"export={ids[0]}", f"to={tmp_path / 'merged'}", f"runs_dir={tmp_path}")
    assert code == 0, errors
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    (saved,) = find_saved(ids[:1], tmp_path)
    with Base(saved).holding(saved, build_accelerator(saved.config)) as adapted:
        torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=1e-5)


def test_the_base_is_bitwise_what_it_was_whatever_was_in_it(ended: Saved) -> None:
    saved = find_saved(ended.ids(*(name for name in CASES if name != "full")), ended.runs_dir)
    groups = by_base(saved)
    assert [len(group) for group in groups] == [len(CASES) - 4, 1, 2]
    for group in groups:
        check_bitwise(group)


def check_bitwise(group: list[SavedRun]) -> None:
    base = Base(group[0])
    model = base.base.model
    accelerator = build_accelerator(group[0].config)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: (value.data_ptr(), value.dtype, value.detach().clone()) for name, value in tensors.items()}
    modules = {name: id(module) for name, module in model.named_modules()}
    with accelerator.autocast():
        untouched = logits(model)
    for each in group:
        with base.holding(each, accelerator) as held, accelerator.autocast():
            assert held is model
            assert not torch.equal(logits(model), untouched), each.run_id
        assert {name: id(module) for name, module in model.named_modules()} == modules
        after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, (address, dtype, value) in before.items():
            assert after[name] is tensors[name] and after[name].data_ptr() == address and after[name].dtype is dtype
            assert torch.equal(after[name], value), (each.run_id, name)
        with accelerator.autocast():
            assert torch.equal(logits(model), untouched)


# Of the RoFormer below, of width 32: the same parts as of the tiny BERT, without a pooler.
UNDESCRIBED = {
    "bitfit": 32 + 2 * (4 * 32 + 48 + 32 + 2 * 32),
    "norms": 2 * 32 * (1 + 2 * 2),
    "head_only": 0,
    "ia3": 2 * (32 + 48),
}


def test_a_model_type_that_is_not_described_has_biases_norms_and_a_head(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    sizes = {**SIZES, "vocab_size": 260, "embedding_size": 32, "max_position_embeddings": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("roformer", **sizes)).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model = {"name": "roformer", "tiny": None, "path": str(tmp_path / "base"), "attention": "eager"}
    run_ids = []
    for method, num_params in UNDESCRIBED.items():
        own: dict[str, Any] = {"name": method}
        if method == "ia3":
            own["peft"] = {"target_modules": ["query", "intermediate.dense"], "feedforward_modules": []}
        wanted = config(rows, tmp_path, method, model=model, method=own, trainer={"max_steps": 2})
        result = run(wanted)
        assert result.status is Status.FINISHED, result.error
        assert result.metrics["num_adapter_params"] == plan(wanted).num_adapter_params == num_params
        assert result.metrics["num_head_params"] == 32 * 32 + 32 + 32 * 3 + 3
        run_ids.append(result.run_id)
    for group in by_base(find_saved(run_ids, tmp_path)):
        check_bitwise(group)
    with pytest.raises(PeftMethodError, match=r"classifier.dense is in the task head, which is trained whole"):
        own = {"name": "ia3", "peft": {"target_modules": ["classifier.dense"], "feedforward_modules": []}}
        plan(config(rows, tmp_path, "ia3", model=model, method=own))


def test_runs_with_other_numbers_of_classes_share_a_base(
    ended: Saved,
    rows: Path,  # noqa: F811
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "two.csv"
    lines = [line for line in rows.read_text().splitlines() if not line.endswith("sea")]
    path.write_text("\n".join([*lines, ""]))
    runs_dir = tmp_path / "runs"
    shutil.copytree(ended.runs_dir / ended.ids("lora")[0], runs_dir / ended.ids("lora")[0])
    two = [trained(config(path, runs_dir, method)) for method in ("lora", "head_only", "bitfit")]
    loaded = []
    monkeypatch.setattr(saved_module, "load_model", lambda *a, **o: loaded.append(1) or load_model(*a, **o))
    ids = [*ended.ids("lora"), *(result.run_id for result in two), ended.ids("lora")[0]]
    code, _, errors = command(f"evaluate={','.join(ids)}", f"runs_dir={runs_dir}", f"to={tmp_path / 'scores'}")
    assert code == 0 and "differ" not in errors
    assert loaded == [1]
    table = read_scores(tmp_path / "scores")
    assert [float(row["nll"]) for row in table] == [
        result.metrics["test_nll"] for result in (ended.results["lora"], *two)
    ]


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(4, 36).view(2, 16)
    ids[:, -1] = 3  # the end of a text, at which T5 reads its answer
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return result


def test_another_dataset_with_the_same_labels(
    ended: Saved,
    rows: Path,  # noqa: F811
    tmp_path: Path,
    command: Command,
) -> None:
    lines = rows.read_text().splitlines()
    own = tmp_path / "own.csv"
    own.write_text("\n".join([lines[0], *lines[1:10], ""]))
    ids = ended.ids("lora", "full")
    common = (f"evaluate={','.join(ids)}", f"runs_dir={ended.runs_dir}")
    # The run's own training rows, and another file of test rows, in which one class is missing.
    code, _, errors = command(*common, f"dataset.test_file={own}", f"to={tmp_path / 'a'}")
    assert code == 0, errors
    assert [row["examples"] for row in read_scores(tmp_path / "a")] == ["9", "9"]
    predicted = pd.read_parquet(tmp_path / "a" / ids[0] / "predictions" / "test.parquet")
    assert predicted["source_row"].tolist() == list(range(2, 11))
    assert list(predicted.filter(like="probability_").columns) == [f"probability_{name}" for name in sorted(WORDS)]
    # A preset in its place, with settings of its own.
    preset = ("dataset=local", f"dataset.train_file={rows}", "dataset.max_length=48", f"dataset.test_file={own}")
    code, _, errors = command(*common, *preset, "split=test,train", f"to={tmp_path / 'b'}")
    assert code == 0, errors
    first, second = read_scores(tmp_path / "a"), read_scores(tmp_path / "b")
    assert [row["nll"] for row in second if row["split"] == "test"] == [row["nll"] for row in first]
    assert [row["examples"] for row in second if row["split"] == "train"] == ["108", "108"]


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("name", [name for name in CASES if name != "lily"])
def test_a_merged_model_is_the_adapted_one(ended: Saved, tmp_path: Path, command: Command, name: str) -> None:
    (run_id,) = ended.ids(name)
    code, printed, errors = command(f"export={run_id}", f"to={tmp_path / 'model'}", f"runs_dir={ended.runs_dir}")
    assert code == 0, errors
    assert printed.startswith(f"{tmp_path / 'model'}: ")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    (saved,) = find_saved([run_id], ended.runs_dir)
    accelerator = build_accelerator(saved.config)
    with Base(saved).holding(saved, accelerator) as adapted, accelerator.autocast():
        exact = saved.config.model.dtype == "float32"
        torch.testing.assert_close(
            logits(merged).float(), logits(adapted).float(), rtol=0, atol=1e-5 if exact else 1e-2
        )
    assert merged.config.id2label == dict(enumerate(sorted(WORDS)))
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("a text")["input_ids"]
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


# ---------------------------------------------------------------- refused


def failing(outcome: tuple[int, str, str]) -> list[str]:
    code, _, errors = outcome
    assert code == 2, errors
    return [line.removeprefix("error: ") for line in errors.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate A B", "evaluate: write evaluate=A,B, or lora-harness evaluate A ..."),
        ("--evaluate=A", "--evaluate=A: write evaluate=A, or lora-harness evaluate A ..."),
        ("export A", "export: write export=A to=DIR, or lora-harness export A ..."),
        ("evaluate=", "evaluate=: name a run by its id, the folder in runs_dir: evaluate=RUN_ID."),
        ("evaluate=A export=A", "export=A: one command at a time; several runs stand between commas: evaluate=A,B."),
        ("-m evaluate=A", "-m: evaluate is no sweep; several runs stand between commas: evaluate=A,B."),
        ("evaluate=A split=test,dev", "split=test,dev: evaluate takes some of train, val, test between commas."),
        (
            "evaluate=A rank=r8",
            "rank=r8: evaluate takes split=val,test, dataset=NAME, dataset.test_file=FILE, to=DIR, runs_dir=DIR, "
            "device=..., num_threads=..., trainer.eval_batch_size=...; all else is as the run had it.",
        ),
        ("evaluate=A split=val split=test", "split=test: split is given twice."),
        ("evaluate=../A", "../A: the id of a run is the name of its folder; say where that lies with runs_dir=DIR."),
        ("evaluate=A to=taken", "to=taken: is there already and not empty; name a new folder."),
        ("export=A", "export=A: to=DIR is needed, a folder that is not there yet."),
        ("export=A,B to=DIR", "export=A,B: one run at a time, each into a folder of its own."),
        ("evaluate=A device=cpu,cuda", "device=cpu,cuda: one value for each setting."),
        ("evaluate=A runs_dir=none", "A: no such run has ended in runs_dir=none. There: none (0 in all)."),
    ],
)
def test_words_that_ask_for_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    assert failing(command(*words.split())) == [message]


def test_a_run_is_no_request() -> None:
    assert find_request(["rank=r8", "target_layers=qv", "evaluate_also=wikitext2"]) is None
    assert find_request(["--config-dir", "evaluate", "-m", "sweeps=export"]) is None


def test_every_run_that_cannot_be_used_has_a_line(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    command: Command,
) -> None:
    base = tmp_path / "base"
    tokenizer = load_tokenizer(ModelConfig(name="tiny", tiny=TinyModel.bert))
    tiny = load_model(ModelConfig(name="tiny", tiny=TinyModel.bert), num_labels=3, pad_token_id=0, seed=0)
    save_model(tiny.model, tokenizer, base)
    model = {"name": "own", "tiny": None, "path": str(base)}
    runs_dir = tmp_path / "runs"
    adapted = trained(config(rows, runs_dir, model=model))
    without = trained(config(rows, runs_dir, seed=1, save_weights=False))
    diverged = run(config(rows, runs_dir, "full", trainer={"learning_rate": 1e30}))
    here = f"runs_dir={runs_dir}"
    ids = [adapted.run_id, without.run_id, diverged.run_id, adapted.run_id[:-1]]

    weights = base / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + b"1234")
    assert failing(command(f"evaluate={','.join(ids)}", here)) == [
        f"{ids[0]}: the base model has other content than the run had: model.path={base} was changed, and what was "
        "trained belongs to the model as it was; put that back.",
        f"{ids[1]}: its weights were not kept ({runs_dir / ids[1] / 'adapter'}); rerun it with save_weights=true "
        "rerun=all.",
        f"{ids[2]}: the run ended as diverged, and only finished runs keep weights.",
        f"{ids[3]}: no such run has ended in runs_dir={runs_dir}. There: {ids[0]}, {ids[1]} (3 in all).",
    ]
    (base / "config.json").rename(base / "elsewhere.json")
    assert failing(command(f"evaluate={ids[0]}", here)) == [
        f"{ids[0]}: model.path={base}: no config.json there. Give a folder that `save_pretrained` wrote: config.json, "
        "model.safetensors, tokenizer files."
    ]
    (base / "elsewhere.json").rename(base / "config.json")
    weights.write_bytes(kept)
    code, _, errors = command(f"evaluate={ids[0]}", here)
    assert code == 0, errors


def test_data_that_do_not_suit_a_run(
    ended: Saved,
    rows: Path,  # noqa: F811
    tmp_path: Path,
    command: Command,
) -> None:
    (run_id,) = ended.ids("lora")
    here = (f"evaluate={run_id}", f"runs_dir={ended.runs_dir}")
    other = tmp_path / "other.csv"
    other.write_text("\n".join(["text,label", *(f"text {n},{('good', 'bad')[n % 2]}" for n in range(60)), ""]))
    assert failing(command(*here, "dataset=local", f"dataset.train_file={other}")) == [
        f"{run_id}: dataset=local has the classes 'bad', 'good', and the run was trained on 'fruit', 'metal', 'sea'; "
        "give rows with the run's labels. To score a file that lacks some of them, keep the run's training rows: "
        "dataset.test_file=FILE alone."
    ]
    assert failing(command(*here, "dataset=local_text", f"dataset.train_file={other}")) == [
        f"{run_id}: dataset.task=causal_lm: the run was trained for classification; give a dataset of that task."
    ]
    (message,) = failing(command(*here, "dataset.nothing=1"))
    assert message.startswith(f"{run_id}: dataset.nothing: no such setting. Known here: asset, ")
    (message,) = failing(command(*here, "dataset=nothing"))
    assert message.startswith("dataset=nothing: no such option. There are: ")
    assert failing(command(*here, "dataset.test_file=none.csv"))[0].startswith("dataset.test_file=none.csv: no file ")

    mine = tmp_path / "mine.csv"
    shutil.copy(rows, mine)
    result = trained(config(mine, tmp_path / "runs"))
    mine.write_text(mine.read_text() + "a text,sea\n")
    assert failing(command(f"evaluate={result.run_id}", f"runs_dir={tmp_path / 'runs'}")) == [
        f"{result.run_id}: dataset.train: changed since the run, so its own data are not there any more; put them "
        "back, or name what is to be scored (dataset=NAME, or dataset.test_file=FILE)."
    ]


def test_an_adapter_that_is_damaged_or_of_another_shape(ended: Saved, tmp_path: Path, command: Command) -> None:
    for name, fault in (("lora", "is not readable as safetensors"), ("bitfit", "is not readable as safetensors")):
        (run_id,) = ended.ids(name)
        shutil.copytree(ended.runs_dir / run_id, tmp_path / run_id)
        (path,) = tmp_path.glob(f"{run_id}/*/*.safetensors")
        path.write_bytes(b"nothing")
        (message,) = failing(command(f"evaluate={run_id}", f"runs_dir={tmp_path}", f"to={tmp_path / 'scores'}"))
        assert fault in message and str(path) in message
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == sorted(ended.ids("lora", "bitfit"))  # nothing of the scores
    to = tmp_path / there[0] / "result.json" / "new"
    assert failing(command(f"evaluate={ended.ids('lora')[0]}", f"runs_dir={ended.runs_dir}", f"to={to}")) == [
        f"to={to}: cannot be written (File exists); name another folder."
    ]


def test_what_cannot_be_merged_is_refused(
    ended: Saved, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = f"runs_dir={ended.runs_dir}"
    assert failing(command(f"export={ended.ids('lily')[0]}", f"to={tmp_path / 'model'}", here)) == [
        "LILY of peft cannot be merged into its base model: This method is not supported for Lily."
    ]
    # A merge that loses what was trained is seen in the logits.
    with monkeypatch.context() as patch:
        patch.setattr(lora_method, "merge", remove_lora)
        (message,) = failing(command(f"export={ended.ids('lora')[0]}", f"to={tmp_path / 'model'}", here))
    assert f"{ended.ids('lora')[0]}: method=lora does not merge: a logit of the merged model is off by 0." in message
    assert not list(tmp_path.iterdir())

    (run_id,) = ended.ids("lora")
    shutil.copytree(ended.runs_dir / run_id, tmp_path / run_id)
    path = tmp_path / run_id / "result.json"
    quantised = path.read_text().replace('"quantization": "none"', '"quantization": "nf4"')
    assert quantised != path.read_text()
    quantised = quantised.replace('"tiny": "bert"', '"tiny": null, "hub_id": "x", "revision": "main"', 1)
    path.write_text(quantised.replace('"hub_id": null,', "", 1).replace('"revision": null,', "", 1))
    assert failing(command(f"export={run_id}", f"to={tmp_path / 'model'}", f"runs_dir={tmp_path}")) == [
        f"{run_id}: model.quantization=nf4: a quantised weight holds no sum; load the base model unquantised to merge "
        "into it (load_adapter, then merge_and_remove)."
    ]
    assert not (tmp_path / "model").exists()


# ---------------------------------------------------------------- many adapters on one base


def test_adapters_are_switched_on_one_base_that_stays_as_it_is(tmp_path: Path) -> None:
    benchmark = load_script("benchmarks/many_adapters.py")
    tiny = ModelConfig(name="tiny", tiny=TinyModel.bert)
    measured = benchmark.measure(tiny, 4, tmp_path)
    assert len(measured.switch_seconds) == 4
    assert measured.num_params == 2 * 2 * 8 * (64 + 64)  # q and v of two blocks
    assert measured.live_bytes == 4 * (measured.num_params + 8 * 64 + 8)
    assert "| bitwise equal, 4 of 4 |" in benchmark.table(measured, "tiny", 4)

    # Each check can fail.
    model = load_model(tiny, num_labels=8, pad_token_id=0, seed=0).model
    check = benchmark.BaseChecker(model)
    check("nothing")
    with torch.no_grad():
        model.bert.pooler.dense.bias[0] += 1e-6
    with pytest.raises(benchmark.CheckError, match=r"after this bert.pooler.dense.bias has other values"):
        check("this")
    model.bert.pooler.dense.bias.data = check.head["bert.pooler.dense.bias"]
    with pytest.raises(benchmark.CheckError, match=r"after that bert.pooler.dense.bias lies elsewhere"):
        check("that")


# ---------------------------------------------------------------- delta weights

MATRICES = ("lora", "slices", "dora", "pissa", "full", "ia3", "adalora", "vera")


def deltas_of(ended: Saved, *names: str) -> dict[str, tuple[SavedRun, list[DeltaWeight]]]:
    runs, problems = find_each(ended.ids(*names), ended.runs_dir)
    by_id = {ended.results[name].run_id: name for name in names}
    found = {
        by_id[saved.run_id]: (saved, deltas)
        for group in by_untrained_base(runs)
        for saved, deltas in read_deltas(group, problems)
    }
    unmergeable = ended.ids("lily") if "lily" in names else []
    assert [problem.partition(":")[0] for problem in problems] == unmergeable
    return found


def matrices(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.ndim == 2}


def merged_less_base(saved: SavedRun) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    base = Base(saved, untrained=True)
    before = matrices(base.base.model)
    if saved.is_model:
        return before, matrices(Base(saved).base.model)
    with restored(base.base.model):
        put_in(base.base.model, saved.weights_dir, saved.config, head=base.base.head)
        merge_in(base.base.model, saved.config)
        return before, matrices(base.base.model)


def test_a_delta_weight_is_what_merging_adds(ended: Saved) -> None:
    found = deltas_of(ended, *MATRICES, "lily")  # which cannot be merged
    assert found.keys() == set(MATRICES)
    for name, (saved, deltas) in found.items():
        before, after = merged_less_base(saved)
        assert deltas, name
        for delta in deltas:
            weight, target = f"{delta.target.module}.weight", delta.target
            turned = name == "slices"  # GPT-2 keeps its matrices the other way round
            old, new = (each[weight].T if turned else each[weight] for each in (before, after))
            if target.rows is not None:
                of_rows = slice(target.rows.start, target.rows.stop)
                old, new = old[of_rows], new[of_rows]
            torch.testing.assert_close(delta.base, old, rtol=0, atol=0)
            torch.testing.assert_close(delta.matrix(), new - old, rtol=1e-4, atol=1e-6)
    roles = {name: sorted({(d.role, d.target.block) for d in deltas}) for name, (_, deltas) in found.items()}
    assert roles["lora"] == roles["slices"] == roles["dora"] == [("q", 0), ("q", 1), ("v", 0), ("v", 1)]
    assert {role for role, _ in roles["full"]} == {"q", "k", "v", "o", "up", "down"}
    slices, base = found["slices"][0], Base(found["slices"][0], untrained=True).base
    assert [str(target.rows) for target in all_targets(base.model, base.head, is_language=False)][:4] == [
        *("0:64 of each 192", "64:128 of each 192", "128:192 of each 192", "None")
    ]
    assert slices.config.model.tiny == "gpt2"
    # What is a product is kept as one, of the rank; twice the rank where an update has a start.
    assert [d.low.shape[0] for d in found["lora"][1]] == [6] * 4 and [d.low.shape[0] for d in found["pissa"][1]] == (
        [8] * 4
    )
    assert all(d.low is None for name in ("dora", "full", "vera") for d in found[name][1])


def test_methods_that_change_no_matrix_have_no_delta_weight(ended: Saved) -> None:
    found = deltas_of(ended, "head_only", "bitfit", "norms", "lora")
    assert {name: len(deltas) for name, (_, deltas) in found.items()} == {
        **dict.fromkeys(("head_only", "bitfit", "norms"), 0),
        "lora": 4,
    }


def test_full_fine_tuning_and_adapters_share_the_base_that_they_began_from(ended: Saved) -> None:
    runs, _ = find_each(ended.ids("lora", "full", "slices", "dora"), ended.runs_dir)
    groups = [[saved.run_id for saved in group] for group in by_untrained_base(runs)]
    assert groups == [ended.ids("lora", "full", "dora"), ended.ids("slices")]


def test_a_weight_that_is_set_is_that_of_its_rows_and_gone_afterwards(ended: Saved) -> None:
    (saved,), _ = find_each(ended.ids("slices"), ended.runs_dir)
    base = Base(saved, untrained=True)
    model = base.base.model
    target = next(t for t in all_targets(model, base.base.head, is_language=False) if (t.role, t.block) == ("k", 1))
    others = [t for t in all_targets(model, base.base.head, is_language=False) if t != target]
    before = {t: weight_of(model, t).clone() for t in (target, *others)}
    with restored(model):
        set_weight(model, target, before[target] + 1)
        torch.testing.assert_close(weight_of(model, target), before[target] + 1)
        assert all(torch.equal(weight_of(model, t), before[t]) for t in others)
    assert all(torch.equal(weight_of(model, t), value) for t, value in before.items())


def test_each_run_that_cannot_be_used_is_one_sentence(
    ended: Saved,
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    (lora,) = ended.ids("lora")
    shutil.copytree(ended.runs_dir / lora, tmp_path / lora)
    base = tmp_path / "base"
    first: dict[str, Any] = {"model": {"name": "own", "tiny": None, "path": str(base)}, "trainer": {"max_steps": 1}}
    saved = Base(find_each([lora], tmp_path)[0][0])
    saved.base.model.save_pretrained(base)
    saved.tokenizer.save_pretrained(base)
    without = run(config(rows, tmp_path, save_weights=False))
    full = run(config(rows, tmp_path, "full", **first))
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\x80\x3f")
    runs, problems = find_each([lora, without.run_id, full.run_id, "nothing"], tmp_path)
    assert [run.run_id for run in runs] == [lora]
    assert len(problems) == 3
    assert problems[0].startswith(f"{without.run_id}: its weights were not kept") and "save_weights=true" in problems[0]
    assert problems[1].startswith(f"{full.run_id}: the base model has other content than the run had")
    assert problems[2].startswith("nothing: no such run has ended")


# ---------------------------------------------------------------- full fine-tuning kept as a difference


def test_a_difference_is_half_as_large_and_scores_and_exports_as_the_model(
    ended: Saved,
    rows: Path,  # noqa: F811
    tmp_path: Path,
    command: Command,
) -> None:
    wanted = config(rows, tmp_path / "runs", "full", save_full_as="difference")
    result = trained(wanted)
    whole = ended.results["full"]
    assert result.run_id == whole.run_id  # what is kept is no part of what a run is
    folder = tmp_path / "runs" / result.run_id / "model"
    assert [path.name for path in folder.iterdir()] == ["difference.safetensors"]
    assert result.metrics["checkpoint_bytes"] < 0.52 * whole.metrics["checkpoint_bytes"]

    (kept,), (model,) = find_saved([result.run_id], tmp_path / "runs"), find_saved([whole.run_id], ended.runs_dir)
    assert model.is_model and not kept.is_model
    base = Base(kept)
    with base.holding(kept, build_accelerator(kept.config)) as held:
        torch.testing.assert_close(logits(held), logits(Base(model).base.model), rtol=0, atol=2e-3)
        assert not torch.equal(logits(held), logits(Base(kept).base.model))
    # The delta weights are those of the model, to bfloat16.
    for (_, found), (_, expected) in zip(read_deltas([kept], []), read_deltas([model], []), strict=True):
        for one, other in zip(found, expected, strict=True):
            assert one.target == other.target
            torch.testing.assert_close(one.matrix(), other.matrix(), rtol=2**-7, atol=1e-6)

    code, _, errors = command(f"evaluate={result.run_id}", f"runs_dir={tmp_path / 'runs'}", f"to={tmp_path / 'scores'}")
    assert code == 0, errors
    assert float(read_scores(tmp_path / "scores")[0]["nll"]) == pytest.approx(result.metrics["test_nll"], abs=1e-3)
    code, _, errors = command(f"export={result.run_id}", f"runs_dir={tmp_path / 'runs'}", f"to={tmp_path / 'merged'}")
    assert code == 0, errors
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(exported), logits(Base(model).base.model), rtol=0, atol=2e-3)

    # No run starts from it, and the message says how one can.
    with pytest.raises(ModelError, match=r"kept as a difference to the base .* write a model \(export=.* to=DIR\)"):
        plan(config(rows, tmp_path / "runs", "full", model={"name": "next", "tiny": None, "run": result.run_id}))


def test_a_difference_that_does_not_fit_is_refused(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    result = trained(config(rows, tmp_path, "full", save_full_as="difference", trainer={"max_steps": 1}))
    path = tmp_path / result.run_id / "model" / "difference.safetensors"
    (saved,) = find_saved([result.run_id], tmp_path)
    base = Base(saved)
    path.write_bytes(path.read_bytes()[:-8])
    accelerator = build_accelerator(saved.config)
    with pytest.raises(ModelError, match="is not readable as safetensors"), base.holding(saved, accelerator):
        pass


def test_what_is_kept_of_full_fine_tuning_is_refused_where_nothing_is_kept_so(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match="save_full_as=difference: is read by method=full"):
        config(rows, tmp_path, save_full_as="difference")
    with pytest.raises(ConfigError, match="save_full_as=difference"):
        config(rows, tmp_path, "full", save_full_as="difference", save_weights=False)
