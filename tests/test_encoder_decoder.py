"""T5: a classifier out of a checkpoint as it is published, the adapters that it takes by stack, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_run import config, rows  # noqa: F401
from test_saved_runs import check_bitwise
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, T5Config, T5ForConditionalGeneration

from harness.config.schema import RunConfig
from harness.config.validation import ConfigError
from harness.content.errors import ModelError
from harness.content.identity import identify
from harness.models.tiny import byte_tokenizer
from harness.plan import plan
from harness.prepare import build_accelerator
from harness.results.schema import Status
from harness.run import run
from harness.saved import Base, find_saved


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small T5 1.1 with the head of its pretraining; its config.json does not say with which token texts begin."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 48, "vocab_size": 260}
    settings = T5Config(**sizes, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=3)
    path = tmp_path_factory.mktemp("t5")
    T5ForConditionalGeneration(settings).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def on_t5(rows: Path, runs_dir: Path, t5: Path, method: str = "lora", **changes: Any) -> RunConfig:  # noqa: F811
    model = {"name": "t5", "tiny": None, "path": str(t5)}
    return config(
        rows, runs_dir, method, **{"trainer": {"max_steps": 12, "learning_rate": 1e-2}, "model": model} | changes
    )


def test_a_run_of_each_kind_trains_is_saved_and_loads_in_peft(rows: Path, tmp_path: Path, t5: Path) -> None:  # noqa: F811
    placed = {"name": "qv", "projections": ["q", "v"], "stacks": ["encoder", "cross"]}
    wanted = [
        on_t5(rows, tmp_path, t5, target_layers=placed),
        on_t5(rows, tmp_path, t5, "bitfit", trainer={"max_steps": 2}),
        on_t5(rows, tmp_path, t5, "norms"),
        on_t5(rows, tmp_path, t5, "full", trainer={"max_steps": 3, "learning_rate": 1e-3}),
    ]
    with pytest.raises(ConfigError, match=r"method=bitfit: t5 \(model type t5\) has no biases below its task head"):
        run(wanted.pop(1))
    results = [run(each) for each in wanted]
    assert [result.status for result in results] == [Status.FINISHED] * 3, [result.error for result in results]
    adapter = results[0]
    assert adapter.metrics["num_adapter_params"] == plan(wanted[0]).num_adapter_params == 2 * 2 * 2 * 4 * (32 + 16)
    assert adapter.target_modules == [
        f"transformer.{stack}.block.{block}.layer.{attention}.{role}"
        for stack, attention in (("encoder", "0.SelfAttention"), ("decoder", "1.EncDecAttention"))
        for block in (0, 1)
        for role in "qv"
    ]
    assert adapter.metrics["val_accuracy"] > 0.5  # of three classes
    assert "train_flops" not in adapter.metrics
    saved = find_saved([result.run_id for result in results[:2]], tmp_path)
    check_bitwise(saved)

    # The head is not in the checkpoint; peft has it from the adapter's file.
    settings = T5Config.from_pretrained(t5, num_labels=3)
    settings.decoder_start_token_id = 0
    base = AutoModelForSequenceClassification.from_pretrained(t5, config=settings)
    theirs = peft.PeftModel.from_pretrained(base, str(saved[0].weights_dir)).eval()
    ids = torch.tensor([[40, 41, 42, 3], [50, 51, 52, 3]])
    loaded = Base(saved[0])
    with torch.no_grad(), loaded.holding(saved[0], build_accelerator(wanted[0])) as ours:
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=1e-5, atol=1e-5)

    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / results[2].run_id / "model")
    assert again.config.decoder_start_token_id == 0 and again.config.dropout_rate == 0.1


def test_the_order_of_stacks_means_nothing_and_all_three_are_all(rows: Path, tmp_path: Path, t5: Path) -> None:  # noqa: F811
    def run_id(**placed: Any) -> str:
        return identify(on_t5(rows, tmp_path, t5, target_layers={"name": "q", "projections": ["q"], **placed})).run_id

    assert run_id() == run_id(stacks="all") == run_id(stacks=["cross", "encoder", "decoder"])
    assert run_id(stacks=["cross", "encoder"]) == run_id(stacks=["encoder", "cross"]) != run_id()


def test_what_an_encoder_decoder_cannot_do_is_refused_before_training(rows: Path, tmp_path: Path, t5: Path) -> None:  # noqa: F811
    completion = {
        "task": "completion",
        "prompt_template": "{text}: ",
        "target_column": "label",
        "metrics": [],
        "best_metric": "nll",
    }
    for refused in (plan, run):
        with pytest.raises(
            ModelError, match="t5 is an encoder-decoder, and to train it from a text to a text is no task"
        ):
            refused(on_t5(rows, tmp_path, t5, dataset={**completion, "name": "words", "train_file": str(rows)}))
    expressions = {"name": "x", "modules": [r".*\.q"], "stacks": ["encoder"]}
    with pytest.raises(ConfigError, match=r"target_layers.stacks=\['encoder'\]: narrows projections alone"):
        on_t5(rows, tmp_path, t5, target_layers=expressions)

    # A tokenizer that does not say where a text ends.
    other = tmp_path / "other"
    shutil.copytree(t5, other)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(other)
    with pytest.raises(
        ModelError, match=r"at the end-of-text token \(id 3\) and wants .*; here are 0\. Use the model's"
    ):
        run(on_t5(rows, tmp_path, other))
