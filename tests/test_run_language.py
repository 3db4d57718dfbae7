"""Runs of language models, end to end on tiny ones: what they leave, runs based on runs, whose numbers they equal."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from harness.config.composing import from_dict
from harness.config.schema import RankConfig, RunConfig
from harness.config.validation import ConfigError
from harness.content.errors import ModelError
from harness.content.identity import identify
from harness.data.batches import TrainingBatches
from harness.methods.adapting import merge_and_remove
from harness.methods.flops import formula_flops
from harness.methods.peft_files import load_adapter, save_adapter
from harness.models.loading import load_model
from harness.models.saving import save_model
from harness.models.tokenizers import load_tokenizer
from harness.plan import plan
from harness.prepare import prepare
from harness.processes.stopping import PreemptedError
from harness.results.metrics import METRICS
from harness.results.schema import Status, read_result
from harness.run import run
from harness.tasks.generation_scores import score_texts
from harness.tasks.language import LanguageObjective
from harness.training.callbacks import RunCallbacks
from harness.training.optimizer import learning_rate_at

WORDS = ["the", "old", "king", "had", "three", "sons", "and", "a", "well", "at", "the", "end", "of", "the", "world"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw text, prompts with targets, and conversations."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    (folder / "tales.txt").write_text(
        "\n".join(" ".join(draw.choices(WORDS, k=draw.randint(3, 20))) for _ in range(60))
    )
    pairs = [{"q": f"{a}+{b}", "a": str(a + b)} for a in range(8) for b in range(8)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    chats = [
        {"messages": [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]}
        for row in pairs
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def dataset(data: Path, task: str) -> dict[str, Any]:
    own: dict[str, dict[str, Any]] = {
        "causal_lm": {"train_file": str(data / "tales.txt"), "blocks": "packed"},
        "completion": {
            "train_file": str(data / "sums.jsonl"),
            "prompt_template": "{q} = ",
            "target_column": "a",
            "metrics": ["bleu", "exact_match", "number_match"],
            "generation": {"max_new_tokens": 4, "num_examples": 5, "num_beams": 2},
        },
        "chat": {
            "train_file": str(data / "chats.jsonl"),
            "chat_template": "chatml",
            "metrics": ["exact_match"],
            "generation": {"max_new_tokens": 4, "num_examples": 3},
        },
    }
    common = {"name": task, "task": task, "metrics": [], "best_metric": "nll", "max_length": 96}
    return {**common, **own[task]}


def config(data: Path, runs_dir: Path, method: str = "lora", /, task: str = "causal_lm", **overrides: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": {"name": "tiny_llama", "tiny": "llama"},
        "dataset": dataset(data, task),
        "method": {"name": method},
        "trainer": {"learning_rate": 3e-3, "max_steps": 4, "batch_size": 4, "eval_every": 2},
        "tracking": {"wandb": "disabled", "progress": False, "log_every": 1},
        "runs_dir": str(runs_dir),
        "device": "cpu",
    }
    if method == "lora":
        values["rank"] = {"rank": 4, "alpha": 16.0}
        values["target_layers"] = {"name": "qv", "projections": ["q", "v"]}
    for name, value in overrides.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) and name in values else value
    return from_dict(values)


# ---------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize("task", ["causal_lm", "completion", "chat"])
def test_a_run_leaves_what_the_contract_says(data: Path, tmp_path: Path, task: str) -> None:
    wanted = config(data, tmp_path, task=task)
    result = run(wanted)
    metrics = result.metrics
    assert result.status is Status.FINISHED, result.error
    assert read_result(tmp_path / identify(wanted).run_id / "result.json") == result
    assert set(metrics) <= set(METRICS)
    assert metrics["num_head_params"] == 0
    # q: 64 -> 64, v: 64 -> 32, two blocks.
    assert metrics["num_trainable_params"] == metrics["num_adapter_params"] == 2 * 4 * (128 + 96)
    for split in ("val", "test"):
        assert metrics[f"{split}_perplexity"] == pytest.approx(math.exp(metrics[f"{split}_nll"]))
        assert metrics[f"{split}_bits_per_byte"] > 0
        assert metrics[f"{split}_nll"] < metrics[f"{split}_nll_before"]
    assert metrics["train_flops"] > 0
    adapter = json.loads((tmp_path / identify(wanted).run_id / "adapter/adapter_config.json").read_text())
    assert adapter["task_type"] == "CAUSAL_LM"


def test_an_adapter_loads_in_peft(data: Path, tmp_path: Path) -> None:
    wanted = config(data, tmp_path)
    result = run(wanted)
    prepared = prepare(wanted)
    base = load_model(wanted.model, num_labels=None, pad_token_id=0, seed=0).model
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / result.run_id / "adapter").eval()
    objective = LanguageObjective(val=prepared.data.val, eval_batch_size=8, chunk_tokens=0)  # type: ignore[arg-type]
    scores = objective.evaluate_split(theirs.base_model.model, prepared.data.test).scores  # type: ignore[arg-type]
    assert scores["nll"] == pytest.approx(result.metrics["test_nll"], rel=1e-6)


def test_an_adapter_of_a_tied_unembedding_scores_the_same_in_peft_merged_and_saved(data: Path, tmp_path: Path) -> None:
    placement = {"name": "all_lm_head", "projections": ["all", "lm_head"]}
    wanted = config(data, tmp_path, model={"name": "tiny_gpt2", "tiny": "gpt2"}, target_layers=placement)
    result = run(wanted)
    adapter = tmp_path / result.run_id / "adapter"
    split = prepare(wanted).data
    objective = LanguageObjective(val=split.val, eval_batch_size=8, chunk_tokens=0)  # type: ignore[arg-type]

    def fresh() -> transformers.PreTrainedModel:
        model = load_model(wanted.model, num_labels=None, pad_token_id=0, seed=0).model
        assert model.lm_head.weight is model.transformer.wte.weight
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of the tied weights
        theirs = peft.PeftModel.from_pretrained(fresh(), adapter).base_model.model
    merged = fresh()
    load_adapter(merged, adapter)
    merge_and_remove(merged)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", use_cache=False)
    for model in (theirs, merged, again):
        scores = objective.evaluate_split(model.eval(), split.test).scores  # type: ignore[arg-type]
        assert scores["nll"] == pytest.approx(result.metrics["test_nll"], rel=1e-5)


def test_generations_are_kept_and_score_as_the_result_says(data: Path, tmp_path: Path) -> None:
    wanted = config(data, tmp_path, task="completion")
    result = run(wanted)
    folder = tmp_path / result.run_id / "generations"
    rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert all(row["prompt"].endswith(" = ") and row["references"][0].isdigit() for row in rows)
    scored = score_texts(
        [row["generated"] for row in rows], [row["references"] for row in rows], ["bleu", "exact_match", "number_match"]
    )
    assert {f"test_{name}": value for name, value in scored.values.items()}.items() <= result.metrics.items()
    assert result.environment["generation_signatures"] == scored.signatures
    command = [sys.executable, "-m", "sacrebleu", str(folder / "references.tsv"), "-i", str(folder / "hypotheses.txt")]
    printed = subprocess.run([*command, "-b", "-w", "6"], capture_output=True, text=True, check=True).stdout
    assert float(printed) == pytest.approx(result.metrics["test_bleu"], abs=1e-6)


def test_forgetting_is_the_first_further_sets_nll_after_minus_before(data: Path, tmp_path: Path) -> None:
    also = {"old": dataset(data, "causal_lm"), "sums": dataset(data, "completion")}
    result = run(config(data, tmp_path, task="chat", evaluate_also=also))
    metrics = result.metrics
    alone = run(config(data, tmp_path / "alone"))
    assert metrics["base_domain_nll_before"] == alone.metrics["test_nll_before"]
    assert metrics["forgetting_nll"] == metrics["base_domain_nll"] - metrics["base_domain_nll_before"]
    assert metrics["forgetting_nll_last"] == metrics["base_domain_nll_last"] - metrics["base_domain_nll_before"]
    assert metrics["forgetting_nll"] != 0
    assert set(result.environment["evaluated_also"]) == {"old", "sums"}
    assert result.environment["evaluated_also"]["old"]["nll"] == metrics["base_domain_nll"]


def test_what_was_left_out_is_in_the_log_and_in_the_result(data: Path, tmp_path: Path) -> None:
    (tmp_path / "holes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["one", "", "two"] * 5))
    result = run(config(data, tmp_path, dataset={"train_file": str(tmp_path / "holes.jsonl")}))
    assert "empty in 5 rows" in result.environment["data_notes"][0]
    assert "empty in 5 rows" in (tmp_path / result.run_id / "log.txt").read_text()


# ---------------------------------------------------------------- a run based on a run


def based_on(run_name: str) -> dict[str, Any]:
    return {"name": "own", "run": run_name, "tiny": None}


def test_a_finished_full_run_is_a_base(data: Path, tmp_path: Path) -> None:
    base = run(config(data, tmp_path, "full"))
    child = run(config(data, tmp_path, model=based_on(base.run_id)))
    assert child.status is Status.FINISHED, child.error
    assert child.metrics["test_nll_before"] == pytest.approx(base.metrics["test_nll"], rel=1e-6)
    assert child.metrics["num_total_params"] == base.metrics["num_total_params"] + child.metrics["num_adapter_params"]
    adapter = json.loads((tmp_path / child.run_id / "adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / base.run_id / "model")
    # And a grandchild.
    again = run(config(data, tmp_path, "full", model=based_on(base.run_id)))
    assert run(config(data, tmp_path, model=based_on(again.run_id))).metrics["test_nll_before"] == pytest.approx(
        again.metrics["test_nll"], rel=1e-6
    )


def test_a_base_that_was_computed_again_is_another_run(data: Path, tmp_path: Path) -> None:
    base = run(config(data, tmp_path, "full"))
    child = config(data, tmp_path, model=based_on(base.run_id))
    first = run(child)
    run(config(data, tmp_path, "full", rerun="all"))
    assert run(child) == first  # the same weights, bit for bit
    weights = load_file(tmp_path / base.run_id / "model/model.safetensors")
    save_file(
        {name: value * 1.5 for name, value in weights.items()}, tmp_path / base.run_id / "model/model.safetensors"
    )
    second = run(child)
    assert second.run_id != first.run_id
    assert second.metrics["test_nll_before"] != first.metrics["test_nll_before"]


def test_a_base_that_cannot_be_one_is_refused_before_anything_is_loaded(data: Path, tmp_path: Path) -> None:
    def refusal(name: str, **overrides: Any) -> str:
        wanted = config(data, tmp_path, model=based_on(name), **overrides)
        with pytest.raises(ModelError) as planned:
            plan(wanted)
        with pytest.raises(ModelError) as prepared:
            run(wanted)
        assert str(planned.value) == str(prepared.value)
        return str(planned.value)

    assert "model.run=nobody: this run does not exist in runs_dir=" in refusal("nobody")
    assert "Finished full runs there: none." in refusal("nobody")

    full = run(config(data, tmp_path, "full"))
    assert f"Finished full runs there: {full.run_id}." in refusal("nobody")

    adapted = run(config(data, tmp_path))
    assert "has method=lora and so no full weights to start from" in refusal(adapted.run_id)

    unsaved = run(config(data, tmp_path, "full", seed=1, save_weights=False))
    assert "its weights were not kept; rerun it with save_weights=true rerun=all." in refusal(unsaved.run_id)

    diverged = run(config(data, tmp_path, "full", trainer={"learning_rate": 1e30, "max_gradient_norm": None}))
    assert diverged.status is Status.DIVERGED
    assert "this run ended as diverged: " in refusal(diverged.run_id)

    (tmp_path / "stopped").mkdir()
    assert "this run was not finished" in refusal("stopped")

    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"text {n},{n % 2}\n" for n in range(40)))
    labels = {"name": "l", "train_file": str(tmp_path / "rows.csv"), "max_length": 16, "task": "classification"}
    classifier = run(from_dict({**to_values(config(data, tmp_path, "full")), "dataset": labels}))
    assert "this run trained a classifier" in refusal(classifier.run_id)


def to_values(wanted: RunConfig) -> dict[str, Any]:
    from harness.config.composing import to_dict

    return to_dict(wanted)


# ---------------------------------------------------------------- what does not go together


def test_methods_and_models_that_language_tasks_cannot_have(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method=head_only: a language model .* has no task head"):
        config(data, tmp_path, "head_only")
    with pytest.raises(ModelError, match="bert is no language model that predicts the next token"):
        plan(config(data, tmp_path, model={"name": "tiny_bert", "tiny": "bert"}))
    with pytest.raises(ConfigError, match=r"dataset.best_metric=bleu: texts are generated once, at the end"):
        config(data, tmp_path, task="completion", dataset={"best_metric": "bleu"})
    with pytest.raises(ConfigError, match=r"'accuracy' is not a metric of task causal_lm"):
        config(data, tmp_path, dataset={"metrics": ["accuracy"]})
    with pytest.raises(ConfigError, match=r"evaluate_also.x.max_length=500: tiny_llama reads at most 128 tokens"):
        prepare(config(data, tmp_path, evaluate_also={"x": {**dataset(data, "causal_lm"), "max_length": 500}}))


def test_a_family_that_cannot_be_packed_is_refused(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "opt"
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 64}
    transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=260, word_embed_proj_dim=32, max_position_embeddings=128, dropout=0.0, **shape
        )
    ).save_pretrained(folder)
    load_tokenizer(config(data, tmp_path).model).save_pretrained(folder)
    model = {"name": "opt", "tiny": None, "path": str(folder)}
    with pytest.raises(
        ConfigError, match=r"dataset.blocks=packed: a opt model with model.attention=sdpa would attend across documents"
    ):
        plan(config(data, tmp_path, model=model))
    assert run(config(data, tmp_path, model=model, dataset={"blocks": "cut"})).status is Status.FINISHED


# ---------------------------------------------------------------- the trainer's mathematics


def curve(runs_dir: Path, wanted: RunConfig) -> list[float]:
    run(wanted)
    lines = (runs_dir / identify(wanted).run_id / "metrics.jsonl").read_text().splitlines()
    return [row["train_nll"] for row in map(json.loads, lines) if "train_nll" in row]


def test_micro_batches_of_unequal_targets_make_the_same_steps(data: Path, tmp_path: Path) -> None:
    """1 x 8 = 2 x 4 = 8 x 1: the mean is over the targets of the whole step, not of each part."""
    settings = {"learning_rate": 3e-3, "max_steps": 6, "batch_size": 8}
    curves = {
        size: curve(tmp_path, config(data, tmp_path, task="completion", trainer={**settings, "micro_batch_size": size}))
        for size in (8, 4, 1)
    }
    assert len(curves[8]) == 6
    for size in (4, 1):
        assert curves[size] == pytest.approx(curves[8], rel=1e-5)
    prepared = prepare(config(data, tmp_path, task="completion"))
    assert len(set(prepared.data.train.num_targets.tolist())) > 1  # type: ignore[union-attr]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_loss_curves_are_those_of_peft_and_the_transformers_trainer(
    data: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = ["q", "v"] if model == "llama" else ["qkv"]
    wanted = config(
        data,
        tmp_path,
        model={"name": f"tiny_{model}", "tiny": model},
        task="completion",
        target_layers={"name": "t", "projections": roles},
        trainer={"max_steps": 12, "weight_decay": 0.0, "warmup_fraction": 0.25, "batch_size": 8},
    )
    ours = curve(tmp_path, wanted)

    prepared = prepare(wanted)
    seen = TrainingBatches(prepared.data.train, batch_size=8, micro_batch_size=None, seed=wanted.seed)  # type: ignore[arg-type]
    steps = [step[0] for epoch in range(4) for step in seen.epoch(epoch)][:12]
    assert wanted.rank is not None
    save_adapter(prepared.model, tmp_path / "start", rank=RankConfig(rank=4, alpha=16.0), head_modules=())
    base = load_model(wanted.model, num_labels=None, pad_token_id=0, seed=0).model
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    AcceleratorState._reset_state(reset_partial_state=True)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(steps)  # type: ignore[arg-type]

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_train_batch_size=1,
        max_steps=12,
        learning_rate=3e-3,
        lr_scheduler_type="linear",
        warmup_steps=3,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    rates = [learning_rate_at(step, 12, wanted.trainer) for step in range(1, 13)]

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        return {**rows[0].inputs, "labels": rows[0].labels}

    peft_trainer = InOrder(model=theirs, args=arguments, train_dataset=steps, data_collator=collate)  # type: ignore[arg-type]
    # The same rate at each step: transformers warms up from 0, we from the first fraction of the rate.
    optimizer = peft_trainer.create_optimizer()
    peft_trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rates[min(step, 11)] / wanted.trainer.learning_rate
    )
    peft_trainer.train()
    losses = [row["loss"] for row in peft_trainer.state.log_history if "loss" in row]
    assert len(losses) == len(ours) == 12
    assert ours[0] - ours[-1] > 0.1
    # The Trainer rounds what it logs to four decimals or more.
    assert ours == pytest.approx(losses, abs=1e-5)


def test_a_run_stops_and_goes_on_bitwise(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = run(config(data, tmp_path / "a", task="completion", trainer={"max_steps": 8}))
    wanted = config(data, tmp_path / "b", task="completion", trainer={"max_steps": 8, "checkpoint_every": 3})
    keep = RunCallbacks.keep_checkpoint

    def stop_after(self: Any, tensors: Any, position: Any) -> None:
        self._stop.ask()
        keep(self, tensors, position)

    with monkeypatch.context() as patched:
        patched.setattr(RunCallbacks, "keep_checkpoint", stop_after)
        with pytest.raises(PreemptedError):
            run(wanted)
    result = run(wanted)
    times = {
        "train_seconds",
        "step_seconds_median",
        "preparation_seconds",
        "wall_seconds",
        "train_tokens_per_second",
        "peak_rss_bytes",
    }
    assert {k: v for k, v in result.metrics.items() if k not in times} == {
        k: v for k, v in undisturbed.metrics.items() if k not in times
    }


def test_a_base_in_bfloat16_is_scored_and_trained_under_autocast(data: Path, tmp_path: Path) -> None:
    halved = {"name": "tiny_llama", "tiny": "llama", "dtype": "bfloat16"}
    result = run(config(data, tmp_path, task="completion", model=halved, trainer={"precision": "bf16"}))
    assert result.status is Status.FINISHED, result.error
    assert result.metrics["test_nll"] < result.metrics["test_nll_before"]
    whole = run(config(data, tmp_path, task="completion"))
    assert result.metrics["test_nll_before"] == pytest.approx(whole.metrics["test_nll_before"], rel=0.02)
    assert result.metrics["weights_bytes"] < 0.6 * whole.metrics["weights_bytes"]


@pytest.mark.parametrize("chunk", [None, 0])
def test_training_compute_is_steps_times_what_the_formula_says(data: Path, tmp_path: Path, chunk: int | None) -> None:
    settings = {"max_steps": 2, "batch_size": 2, "loss_chunk_tokens": chunk}
    wanted = config(data, tmp_path, task="completion", dataset={"max_length": 32}, trainer=settings)
    result = run(wanted)
    prepared = prepare(wanted)
    train = prepared.data.train
    steps = TrainingBatches(train, batch_size=2, micro_batch_size=None, seed=0).epoch(0)  # type: ignore[arg-type]
    batches = [next(steps)[0] for _ in range(2)]
    flops = formula_flops(prepared.model, whole_logits=chunk == 0)
    assert sum(batch.num_targets for batch in batches) < sum(batch.labels.numel() for batch in batches)
    expected = sum(
        flops.total(num_tokens=rows * length, num_squared=rows * length**2, num_targets=batch.num_targets)
        for batch in batches
        for rows, length in [batch.labels.shape]
    )
    assert result.metrics["train_flops"] == expected


# ---------------------------------------------------------------- a quantised base


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_is_trained_on_and_counted_by_its_shapes(
    data: Path, tmp_path: Path, quantization: str
) -> None:
    pytest.importorskip("bitsandbytes")
    base = run(config(data, tmp_path, "full"))
    whole = run(config(data, tmp_path, model=based_on(base.run_id)))
    quantised = run(config(data, tmp_path, model={**based_on(base.run_id), "quantization": quantization}))
    assert quantised.status is Status.FINISHED, quantised.error
    for name in ("num_adapter_params", "num_trainable_params", "num_total_params"):
        assert quantised.metrics[name] == whole.metrics[name]
    assert quantised.metrics["weights_bytes"] < whole.metrics["weights_bytes"]
    assert quantised.metrics["test_nll_before"] == pytest.approx(whole.metrics["test_nll_before"], abs=0.2)
    assert quantised.metrics["test_nll"] < quantised.metrics["test_nll_before"]


def test_what_cannot_be_quantised_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.quantization=nf4: quantises weights as they are read"):
        config(data, tmp_path, model={"quantization": "nf4"})
    with pytest.raises(ConfigError, match=r"model.quantization=nf4: quantised weights are frozen; use method=lora"):
        config(data, tmp_path, "full", model={**based_on("x"), "quantization": "nf4"})


def test_what_a_run_saves_is_a_model_like_its_base(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = config(data, tmp_path).model
    base = tmp_path / "base"
    save_model(load_model(tiny, num_labels=None, pad_token_id=0, seed=5).model, load_tokenizer(tiny), base)
    own = {"use_cache": True, "pad_token_id": None, "attention_dropout": 0.25}
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | own))
    # What transformers reads and refuses to write: a temperature without sampling.
    generation = {"do_sample": False, "temperature": 0.6, "eos_token_id": [3, 5]}
    (base / "generation_config.json").write_text(json.dumps(generation))
    monkeypatch.chdir(tmp_path)
    model = {"model": {"name": "own", "tiny": None, "path": "base"}}

    full = run(config(data, tmp_path, "full", **model))
    assert full.status is Status.FINISHED, full.error
    saved = tmp_path / full.run_id / "model"
    written = json.loads((saved / "config.json").read_text())
    assert {name: written.get(name) for name in own} == own
    assert generation.items() <= json.loads((saved / "generation_config.json").read_text()).items()
    (saved / "generation_config.json").unlink()
    again = run(config(data, tmp_path, "full", model={"name": "again", "tiny": None, "path": str(saved)}))
    derived = json.loads((tmp_path / again.run_id / "model" / "generation_config.json").read_text())
    assert derived.get("use_cache", True) is True and derived.get("pad_token_id") is None

    result = run(config(data, tmp_path, **model))
    adapter = str(tmp_path / result.run_id / "adapter")
    assert json.loads((Path(adapter) / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    monkeypatch.chdir("/")
    # With a cache, transformers does not see that a block is packed.
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, use_cache=False).eval()
    split = prepare(config(data, tmp_path, model={"name": "own", "tiny": None, "path": str(base)})).data
    objective = LanguageObjective(val=split.val, eval_batch_size=8, chunk_tokens=0)  # type: ignore[arg-type]
    scores = objective.evaluate_split(theirs.base_model.model, split.test).scores  # type: ignore[arg-type]
    assert scores["nll"] == pytest.approx(result.metrics["test_nll"], rel=1e-6)
