"""Methods `bitfit` and `norms`: what of a base model trains, is counted, saved and loaded back; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_run_language
import torch
from safetensors.torch import load_file, save_file
from test_flops import GROUPED, LANGUAGE_MODELS, SIZES
from test_run import config, exact, rows  # noqa: F401
from test_run_language import data  # noqa: F401
from transformers import AutoConfig, AutoModel

from harness.config.schema import RunConfig
from harness.config.validation import ConfigError
from harness.content.errors import ModelError
from harness.content.files import base_model
from harness.content.identity import identify
from harness.data.labelled import load_data
from harness.methods import bitfit_method, norms_method
from harness.methods.base_part import load_part
from harness.models.loading import load_model
from harness.models.tokenizers import load_tokenizer
from harness.plan import plan
from harness.processes.stopping import StopRequest
from harness.results.schema import Status
from harness.run import run
from harness.tasks.families import find_family

# Of the tiny BERT, of width 64: embeddings' norm; in two blocks 4 biases of attention, 128 and 64 in the MLP, two
# norms; the pooler. A norm has a weight, too.
COUNTS = {"bitfit": 64 + 2 * (4 * 64 + 128 + 64 + 2 * 64) + 64, "norms": 2 * 64 * (1 + 2 * 2)}


def base_of(wanted: RunConfig) -> Any:
    tokenizer = load_tokenizer(base_model(wanted))
    return load_model(wanted.model, num_labels=3, pad_token_id=tokenizer.pad_token_id, seed=wanted.seed).model


@pytest.mark.parametrize("method", COUNTS)
def test_a_run_trains_counts_and_saves_its_part_and_a_base_takes_it_back(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    method: str,
) -> None:
    wanted = config(rows, tmp_path, method, trainer={"max_steps": 8, "learning_rate": 1e-2})
    result = run(wanted)
    assert result.status is Status.FINISHED, result.error
    metrics = result.metrics
    assert metrics["num_adapter_params"] == COUNTS[method]
    assert metrics["num_head_params"] == 64 * 3 + 3
    assert metrics["num_trainable_params"] == COUNTS[method] + 64 * 3 + 3
    assert metrics["train_flops"] > 0
    assert plan(wanted).num_adapter_params == COUNTS[method]

    folder = tmp_path / result.run_id / method
    path = folder / f"{method}.safetensors"
    saved, model = load_file(path), base_of(wanted)
    own = {name: value.detach().clone() for name, value in model.named_parameters()}
    module = {"bitfit": bitfit_method, "norms": norms_method}[method]
    expected = {name for name in own if module.is_adapter(name) or name.startswith("classifier.")}
    assert saved.keys() == expected
    assert all(not torch.equal(value, own[name]) for name, value in saved.items())
    assert sum(value.numel() for value in saved.values()) == metrics["num_trainable_params"]
    assert metrics["checkpoint_bytes"] == path.stat().st_size
    assert (folder / "labels.json").is_file()

    # On a base as it was loaded, the saved part gives the scores that the run had at its best step.
    texts = load_data(wanted.dataset, load_tokenizer(base_model(wanted)))
    objective = find_family(wanted.dataset.task).build_objective(wanted, texts, {}, StopRequest())
    before = objective.evaluate_split(model, texts.test).scores
    assert sorted(load_part(model, path)) == sorted(saved)
    after = objective.evaluate_split(model, texts.test).scores
    assert after["nll"] == metrics["test_nll"] != before["nll"]
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, own[name])}
    assert changed == expected


@pytest.mark.parametrize("method", COUNTS)
def test_a_base_held_in_bfloat16_trains_its_part_in_float32(rows: Path, tmp_path: Path, method: str) -> None:  # noqa: F811
    wanted = config(rows, tmp_path, method, model={"dtype": "bfloat16"}, trainer={"precision": "bf16"})
    result = run(wanted)
    assert result.status is Status.FINISHED, result.error
    saved = load_file(tmp_path / result.run_id / method / f"{method}.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert result.metrics["val_nll"] < 2


@pytest.mark.parametrize(("method", "tiny"), [("bitfit", "gpt2"), ("norms", "llama")])
def test_a_language_model_has_a_part_and_no_head(data: Path, tmp_path: Path, method: str, tiny: str) -> None:  # noqa: F811
    language = test_run_language.config(data, tmp_path, method, model={"name": f"tiny_{tiny}", "tiny": tiny})
    result = run(language)
    assert result.status is Status.FINISHED, result.error
    assert result.metrics["num_adapter_params"] == result.metrics["num_trainable_params"] > 0
    assert result.metrics["num_head_params"] == 0
    assert result.metrics["val_nll"] < result.metrics["val_nll_before"]
    assert "train_flops" in result.metrics


def test_a_part_of_another_model_is_refused_and_changes_nothing(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    model = base_of(config(rows, tmp_path, "bitfit"))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    path = tmp_path / "part.safetensors"
    save_file(
        {"classifier.bias": torch.ones(3), "bert.pooler.dense.bias": torch.ones(5), "x.bias": torch.ones(1)}, path
    )
    with pytest.raises(ModelError) as caught:
        load_part(model, path)
    assert str(caught.value).removeprefix(f"{path} does not fit the model: ") == (
        "bert.pooler.dense.bias is (5,), the model needs (64,); x.bias is (1,), the model needs none."
    )
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError, match="is not readable as safetensors"):
        load_part(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


# ---------------------------------------------------------------- refused


def test_a_model_without_biases_is_refused_before_training(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    wanted = config(rows, tmp_path, "bitfit", model={"name": "tiny_llama", "tiny": "llama"})
    for refused in (plan, run):
        with pytest.raises(ConfigError) as caught:
            refused(wanted)
        assert caught.value.problems == [
            "method=bitfit: tiny_llama (model type llama) has no biases below its task head, so nothing of it would "
            "train; use method=norms or method=lora."
        ]
    assert not (tmp_path / identify(wanted).run_id).exists()


@pytest.mark.parametrize("method", COUNTS)
def test_what_has_no_meaning_is_refused(rows: Path, tmp_path: Path, method: str) -> None:  # noqa: F811
    for changes, expected in (
        (
            {"rank": {"rank": 2, "alpha": 4.0}},
            f"method={method} takes no rank: leave rank=... out, or use method=lora.",
        ),
        (
            {"target_layers": {"name": "qv", "projections": ["q", "v"]}},
            f"method={method} takes no target_layers: leave target_layers=... out, or use method=lora.",
        ),
        (
            {"model": {"name": "x", "path": "x", "tiny": None, "quantization": "nf4"}},
            f"model.quantization=nf4: quantised weights are frozen; use method=lora, or model.quantization=none for "
            f"method={method}.",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            config(rows, tmp_path, method, **changes)
        assert caught.value.problems == [expected]


@pytest.mark.parametrize("method", COUNTS)
def test_the_part_has_the_learning_rate_of_the_base(rows: Path, tmp_path: Path, method: str) -> None:  # noqa: F811
    usual = run(config(rows, tmp_path, method))
    same = run(config(rows, tmp_path, method, trainer={"learning_rate_base": 3e-3, "learning_rate_head": 3e-3}))
    other = run(config(rows, tmp_path, method, trainer={"learning_rate_base": 3e-2}))
    assert exact(same.metrics) == exact(usual.metrics)
    assert other.metrics["train_nll"] != usual.metrics["train_nll"]


# ---------------------------------------------------------------- norms by name

# Small configs of architectures beside those of test_flops; the names of their norms are all that matters.
SHAPES: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES,
    "electra": SIZES,
    "albert": SIZES,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "deberta": SIZES,
    "deberta-v2": SIZES,
    "modernbert": {**SIZES, "pad_token_id": 0},
    "t5": {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": SIZES,
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "mistral": GROUPED,
}


@pytest.mark.parametrize("name", [*SHAPES, *LANGUAGE_MODELS])
def test_norms_are_told_by_their_names_on_every_architecture(rows: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    shape = LANGUAGE_MODELS[name]() if name in LANGUAGE_MODELS else AutoConfig.for_model(name, **SHAPES[name])
    with torch.device("meta"):
        model = AutoModel.from_config(shape)
    norms_method.adapt(model, [], config(rows, tmp_path, "norms"))
    found = [key for key, _ in model.named_parameters() if norms_method.is_adapter(key)]
    assert len(found) >= 4
    assert not any(".q_proj." in key or ".dense." in key or "embeddings.weight" in key for key in found)


def test_a_norm_of_another_name_is_an_error(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    model = base_of(config(rows, tmp_path, "norms"))
    model.bert.scale = torch.nn.LayerNorm(4)
    model.bert.norm = torch.nn.Linear(4, 4)
    with pytest.raises(ConfigError) as caught:
        norms_method.adapt(model, [], config(rows, tmp_path, "norms"))
    assert caught.value.problems == [
        "method=norms: tiny_bert (model type bert) has norms that their names do not show, or other modules with such "
        "names: bert.norm.bias, bert.norm.weight, bert.scale.bias, bert.scale.weight; extend "
        "harness/methods/norms_method.py."
    ]
    del model.bert.scale, model.bert.norm
    norms_method.adapt(model, [], config(rows, tmp_path, "norms"))
