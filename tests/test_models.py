"""Base models: where they come from, what is drawn from the seed, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
)

from harness.config.schema import Dtype, ModelConfig, Quantization, RankConfig, ScratchConfig, TinyModel
from harness.content.errors import ModelError
from harness.measure.memory import LiveTensors
from harness.methods.adapting import apply_lora, lora_layers
from harness.methods.counts import set_trainable
from harness.models import configs, loading
from harness.models import scratch as scratch_module
from harness.models.configs import build_skeleton, load_model_config, max_tokens, task_head
from harness.models.loading import checkpoint_activations, load_model
from harness.models.saving import save_model
from harness.models.tokenizers import check_vocabulary, load_tokenizer
from harness.placement.architectures import ARCHITECTURES, head_modules
from harness.placement.select import select_targets

TINY = {tiny: ModelConfig(name=f"tiny_{tiny}", tiny=tiny) for tiny in TinyModel}
HUB = ModelConfig(name="bert_base", hub_id="google-bert/bert-base-uncased", revision="8" * 40)


def load(config: ModelConfig, *, num_labels: int | None = 3, seed: int = 0) -> PreTrainedModel:
    return load_model(config, num_labels=num_labels, pad_token_id=0, seed=seed).model


def inputs_of(texts: list[str]) -> dict[str, Tensor]:
    encoded = load_tokenizer(TINY[TinyModel.bert])(texts, padding=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def logits_of(model: nn.Module, texts: list[str] | None = None) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs_of(texts or ["a text", "a longer text", "x"])).logits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a tiny BERT of three classes and its tokenizer, as a run with method=full saves it."""
    folder = tmp_path / "saved"
    save_model(load(TINY[TinyModel.bert], seed=5), load_tokenizer(TINY[TinyModel.bert]), folder)
    return folder


# ---------------------------------------------------------------- tiny models


@pytest.mark.parametrize("tiny", TinyModel)
def test_a_tiny_model_of_every_family(tiny: TinyModel) -> None:
    model = load(TINY[tiny])
    assert model.config.model_type == tiny
    assert model.config._attn_implementation == "sdpa"
    assert logits_of(model).shape == (3, 3)
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("tiny", TinyModel)
def test_padding_does_not_change_what_a_model_says(tiny: TinyModel) -> None:
    model = load(TINY[tiny])
    together = logits_of(model, ["short", "a text that is a good deal longer"])
    assert torch.allclose(together[0], logits_of(model, ["short"])[0], atol=1e-5)


def test_the_byte_tokenizer_cuts_as_bert_does() -> None:
    tokenizer = load_tokenizer(TINY[TinyModel.gpt2])
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab", "c")["input_ids"]) == [
        "[CLS]",
        "a",
        "b",
        "[SEP]",
        "c",
        "[SEP]",
    ]
    text = "größer 😀\ttab"
    assert len(tokenizer(text)["input_ids"]) == len(text.encode()) + 2
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in tokenizer(bytes(range(1, 128)).decode())["input_ids"]
    assert (tokenizer.pad_token_id, tokenizer.padding_side, len(tokenizer)) == (0, "right", 260)


def test_weights_come_in_the_configured_type() -> None:
    model = load(replace(TINY[TinyModel.bert], dtype=Dtype.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------- the seed


def head_state(model: PreTrainedModel) -> dict[str, Tensor]:
    heads = head_modules(model.config.model_type)
    return {name: value for name, value in model.state_dict().items() if name.split(".")[0] in heads}


@pytest.mark.parametrize("tiny", TinyModel)
def test_a_fresh_head_is_drawn_from_the_seed_alone(tiny: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    base = load(TINY[tiny])
    save_model(base, load_tokenizer(TINY[tiny]), folder)
    drop_tensors(folder, tuple(head_state(base)))  # as pretrained models come
    config = ModelConfig(name="x", path=str(folder))

    first = load(config, seed=3)
    torch.rand(100)  # whatever was drawn before
    again, other = load(config, seed=3), load(config, seed=4)
    assert head_state(first)
    for name, value in head_state(first).items():
        assert torch.equal(value, head_state(again)[name])
        if value.ndim > 1:
            assert not torch.equal(value, head_state(other)[name])
    # The base is the checkpoint's at every seed.
    for name, value in other.state_dict().items():
        if name not in head_state(other):
            assert torch.equal(value, base.state_dict()[name])


def drop_tensors(folder: Path, names: tuple[str, ...]) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if name not in names}
    assert len(kept) == len(tensors) - len(names)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_tiny_model_is_drawn_from_the_seed() -> None:
    first, again, other = (load(TINY[TinyModel.llama], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(logits_of(first), logits_of(again))
    assert not torch.equal(logits_of(first), logits_of(other))


# ---------------------------------------------------------------- dropout


def dropout_rates(model: nn.Module) -> set[float]:
    return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}


@pytest.mark.parametrize("tiny", TinyModel)
def test_without_dropout_training_is_deterministic(tiny: TinyModel) -> None:
    model = load(TINY[tiny]).train()
    assert dropout_rates(model) <= {0.0}
    inputs = inputs_of(["a text"])
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("tiny", TinyModel)
def test_dropout_is_applied_wherever_the_model_has_it(tiny: TinyModel) -> None:
    model = load(replace(TINY[tiny], dropout=0.3)).train()
    assert dropout_rates(model) <= {0.3}
    if tiny is TinyModel.llama:  # attention alone, by a function
        assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {0.3}
    else:
        assert dropout_rates(model)
    inputs = inputs_of(["a text"])
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_a_dropout_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = tuple(name for name in configs.DROPOUT_FIELDS if name != "hidden_dropout_prob")
    monkeypatch.setattr(configs, "DROPOUT_FIELDS", known)
    with pytest.raises(ModelError, match=r"model.dropout=0.0: BertForSequenceClassification keeps dropout \[0.1\]"):
        load(TINY[TinyModel.bert])


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("tiny", TinyModel)
def test_a_saved_model_loads_by_path_and_says_the_same(tiny: TinyModel, tmp_path: Path) -> None:
    model, tokenizer = load(TINY[tiny], seed=5), load_tokenizer(TINY[tiny])
    num_bytes = save_model(model, tokenizer, tmp_path / "saved")
    assert num_bytes == (tmp_path / "saved" / "model.safetensors").stat().st_size
    config = ModelConfig(name="x", path=str(tmp_path / "saved"))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(theirs), logits_of(model))
    # Here it is a base model, whose head is drawn anew.
    ours = load(config, seed=6)
    assert {name for name, value in ours.state_dict().items() if not torch.equal(value, model.state_dict()[name])} == {
        name for name in head_state(ours) if name.endswith("weight")
    }
    reloaded = load_tokenizer(config)
    assert reloaded("größer", "b") == tokenizer("größer", "b")
    assert max_tokens(config, reloaded) == max_tokens(TINY[tiny], tokenizer) == 128


def test_path_goes_before_every_other_source(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "verified_asset_dir", lambda name, _: pytest.fail(f"{name} was asked for"))
    expected = logits_of(load(ModelConfig(name="x", path=str(saved))))
    for source in ({"asset": "minilm"}, {"hub_id": "no/such"}, {"tiny": TinyModel.gpt2}):
        assert torch.equal(logits_of(load(ModelConfig(name="x", path=str(saved), **source))), expected)


def test_an_asset_is_loaded_from_its_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "verified_asset_dir", lambda name, _: {"minilm": saved}[name])
    config = ModelConfig(name="minilm", asset="minilm")
    assert torch.equal(logits_of(load(config)), logits_of(load(ModelConfig(name="x", path=str(saved)))))
    assert len(load_tokenizer(config)) == 260


def test_a_tokenizer_without_pad_token_pads_with_its_last_one(saved: Path) -> None:
    settings = json.loads((saved / "tokenizer_config.json").read_text())
    settings |= {"pad_token": None, "eos_token": "[SEP]", "padding_side": "left"}
    (saved / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(ModelConfig(name="x", path=str(saved)))
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.padding_side) == ("[SEP]", 3, "right")


@pytest.mark.parametrize("tiny", [TinyModel.gpt2, TinyModel.llama])
def test_a_model_without_pad_token_is_told_the_tokenizers(tiny: TinyModel, tmp_path: Path) -> None:
    """It reads its answer at the last token that is no padding."""
    save_model(load(TINY[tiny]), load_tokenizer(TINY[tiny]), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"pad_token_id": None}))
    model = load_model(ModelConfig(name="x", path=str(tmp_path)), num_labels=3, pad_token_id=3, seed=0).model.eval()
    alone, together = torch.tensor([[2, 9, 8]]), torch.tensor([[2, 9, 8, 3, 3], [2, 9, 8, 7, 6]])
    with torch.no_grad():
        logits = model(input_ids=together, attention_mask=(together != 3).long()).logits
        assert torch.allclose(model(input_ids=alone).logits[0], logits[0], atol=1e-5)


def test_the_longest_input_is_the_smaller_of_what_model_and_tokenizer_say(saved: Path) -> None:
    config = ModelConfig(name="x", path=str(saved))
    tokenizer = load_tokenizer(config)
    tokenizer.model_max_length = 100
    assert max_tokens(config, tokenizer) == 100
    tokenizer.model_max_length = int(1e30)  # a tokenizer that does not know
    assert max_tokens(config, tokenizer) == 128


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_half_the_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def with_a_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def of_an_unknown_family(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "nope"}')


def that_is_no_text_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit"}')


def of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))


def of_another_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "roberta"}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "model.path={folder}: no config.json there. Give a folder that `save_pretrained` wrote: "),
        (without_config, "model.path={folder}: no config.json there."),
        (without_weights, "model=x: {folder} could not be loaded with attention=sdpa. Error no file named model.safe"),
        (with_half_the_weights, "model=x: the tensor file of {folder} is damaged ("),
        (with_a_broken_config, "is not a valid JSON file."),
        (of_an_unknown_family, "model type `nope`"),
        (that_is_no_text_model, "Unrecognized configuration class"),
        (of_another_size, "model=x: {folder}: tensors have other shapes than its config.json says: bert.encoder.layer"),
        (of_another_family, "model=x: {folder} lacks tensors of the base model, which would be random: roberta.e"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_that_cannot_be_used_is_refused(saved: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(saved)
    with pytest.raises(ModelError) as raised:
        load(ModelConfig(name="x", path=str(saved)))
    assert message.format(folder=saved) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "Without network" not in str(raised.value)


# ---------------------------------------------------------------- what is loaded is what was named


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): value for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def with_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("rename", "fix"),
    [
        (lambda name: f"_orig_mod.{name}", "To use it, remove '_orig_mod.' at the beginning of its tensor names"),
        (lambda name: f"module.{name}", "To use it, remove 'module.' at the beginning of its tensor names"),
        (lambda name: f"module.{name.removeprefix('bert.')}", "To use it, replace 'module.' by 'bert.' at the beginn"),
        (lambda name: name.replace("encoder", "decoder"), "Its config.json is of another architecture, the head of"),
    ],
)
def test_names_that_do_not_match_are_refused(saved: Path, rename: Callable[[str], str], fix: str) -> None:
    """All of these trained from random weights before."""
    rename_tensors(saved, rename)
    found = sorted(map(rename, ("bert.encoder.layer.0.attention.output.dense.bias",)))
    with pytest.raises(ModelError) as raised:
        load(ModelConfig(name="x", path=str(saved)))
    message = str(raised.value)
    assert message.startswith(f"model=x: {saved} lacks tensors of the base model, which would be random: bert.e")
    assert "It holds instead " in message and fix in message
    assert found[0].split(".")[0] in message


@pytest.mark.parametrize("tiny", TinyModel)
def test_one_missing_tensor_is_refused(tiny: TinyModel, tmp_path: Path) -> None:
    save_model(load(TINY[tiny]), load_tokenizer(TINY[tiny]), tmp_path)
    name = next(name for name in load_file(tmp_path / "model.safetensors") if re.search(r"\b1\..*weight", name))
    drop_tensors(tmp_path, (name,))
    with pytest.raises(ModelError, match=rf"lacks tensors of the base model, which would be random: {name}\. Its conf"):
        load(ModelConfig(name="x", path=str(tmp_path)))


def test_a_head_in_the_checkpoint_is_replaced_by_a_fresh_one(saved: Path, tmp_path: Path) -> None:
    headless = tmp_path / "headless"
    shutil.copytree(saved, headless)
    drop_tensors(headless, ("classifier.weight", "classifier.bias"))
    for num_labels in (3, 5):  # as many classes as the checkpoint's head has, and others
        with_head, without = (
            load_model(ModelConfig(name="x", path=str(folder)), num_labels=num_labels, pad_token_id=0, seed=9)
            for folder in (saved, headless)
        )
        assert without.head == with_head.head == ("classifier",)
        for name, value in without.model.state_dict().items():
            assert torch.equal(value, with_head.model.state_dict()[name]), name
        assert without.notes == []
        (note,) = with_head.notes
        assert note == (
            f"The head in {saved} is replaced by a fresh one drawn from the seed: classifier.bias, classifier.weight."
        )
    assert torch.rand(1) == (load(ModelConfig(name="x", path=str(headless)), num_labels=5, seed=9), torch.rand(1))[1]


def test_a_pooler_that_the_checkpoint_lacks_is_part_of_the_head(saved: Path) -> None:
    """Checkpoints of masked language models have none; a random one would be frozen between base and head."""
    drop_tensors(saved, ("bert.pooler.dense.weight", "bert.pooler.dense.bias"))
    config = ModelConfig(name="x", path=str(saved))
    loaded = load_model(config, num_labels=3, pad_token_id=0, seed=1)
    assert loaded.head == ("bert.pooler", "classifier")
    assert loaded.notes[0] == (
        f"{saved} lacks bert.pooler: drawn from the seed, and trained, saved and counted with the head."
    )
    pooler = loaded.model.bert.pooler.dense.weight
    assert torch.equal(pooler, load(config, seed=1).bert.pooler.dense.weight)
    assert not torch.equal(pooler, load(config, seed=2).bert.pooler.dense.weight)


def test_half_a_pooler_is_refused(saved: Path) -> None:
    drop_tensors(saved, ("bert.pooler.dense.bias",))
    with pytest.raises(ModelError, match=r"which would be random: bert\.pooler\.dense\.bias\."):
        load(ModelConfig(name="x", path=str(saved)))


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_blocks_that_the_config_does_not_count_are_refused(saved: Path, prefix: str) -> None:
    rename_tensors(saved, lambda name: prefix + name.removeprefix("bert."))
    with_config(saved, num_hidden_layers=1)
    with pytest.raises(ModelError, match=rf"does not count .* left out: {prefix}encoder\.layer\.1\."):
        load(ModelConfig(name="x", path=str(saved)))


def test_what_else_a_checkpoint_holds_is_said(saved: Path) -> None:
    rename_tensors(saved, lambda name: name.replace("classifier.", "cls.predictions."))
    loaded = load_model(ModelConfig(name="x", path=str(saved)), num_labels=3, pad_token_id=0, seed=1)
    assert loaded.notes == [
        f"{saved} holds tensors that this model does not have: cls.predictions.bias, cls.predictions.weight."
    ]


def test_a_tied_unembedding_that_the_checkpoint_lacks_is_no_fault(tmp_path: Path) -> None:
    base = load(TINY[TinyModel.gpt2], num_labels=None)
    save_model(base, load_tokenizer(TINY[TinyModel.gpt2]), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_model(ModelConfig(name="x", path=str(tmp_path)), num_labels=None, pad_token_id=0, seed=3)
    assert torch.equal(loaded.model.lm_head.weight, base.transformer.wte.weight)
    assert (loaded.head, loaded.notes) == ((), [])


ENCODERS = ("bert", "roberta", "deberta", "deberta-v2", "electra", "distilbert", "albert", "modernbert")
SIZES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {},
    "bloom": {},
    "falcon": {},
    "distilbert": {"hidden_dim": 48},
    "albert": {"intermediate_size": 48, "embedding_size": 16},
    "electra": {"intermediate_size": 48, "embedding_size": 16},
    "smollm3": {"intermediate_size": 48, "num_key_value_heads": 2},
    "phi3": {"intermediate_size": 48, "num_key_value_heads": 2},
    "mixtral": {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 2},
    "qwen3_moe": {"intermediate_size": 48, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1},
    "lfm2": {"intermediate_size": 48, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "falcon_h1": {"intermediate_size": 48, "num_key_value_heads": 2, "mamba_d_ssm": 32, "mamba_n_heads": 4}
    | {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "qwen3_5_text": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16}
    | {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_checkpoint_as_its_family_publishes_it_lacks_nothing(model_type: str, tmp_path: Path) -> None:
    """With the head of its pretraining, and bare."""
    sizes = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    more = dict(SIZES.get(model_type, {"intermediate_size": 48}))
    more |= {"relative_attention": True} if model_type.startswith("deberta") else {}
    config = AutoConfig.for_model(model_type, **sizes, **tokens, **more)
    pretrained = AutoModelForMaskedLM if model_type in ENCODERS else AutoModelForCausalLM
    pretrained = AutoModelForSeq2SeqLM if model_type == "t5" else pretrained
    for auto in (pretrained, AutoModel):
        base = auto.from_config(config)
        base.save_pretrained(tmp_path / auto.__name__)
        has_classifier = ARCHITECTURES[model_type].head is not None
        for num_labels in (3,) if model_type in (*ENCODERS, "t5") else (3, None) if has_classifier else (None,):
            if num_labels is None and auto is AutoModel and not config.tie_word_embeddings:
                continue  # it does lack the unembedding
            saved_config = ModelConfig(name="x", path=str(tmp_path / auto.__name__), attention="eager")
            loaded = load_model(saved_config, num_labels=num_labels, pad_token_id=0, seed=0)
            optional = ARCHITECTURES[model_type].optional if auto is AutoModelForMaskedLM else ()
            assert loaded.head == (*optional, *head_modules(model_type, language_model=num_labels is None))
            embedding = loaded.model.get_input_embeddings().weight
            assert torch.equal(embedding, base.get_input_embeddings().weight)


def test_an_older_checkpoint_of_pickled_tensors_is_read(saved: Path) -> None:
    config = ModelConfig(name="x", path=str(saved))
    expected = logits_of(load(config))
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(tensors, saved / "pytorch_model.bin")
    assert torch.equal(logits_of(load(config)), expected)
    for damage in (lambda content: content[:5000], lambda _: b"hello", lambda _: b""):
        (saved / "pytorch_model.bin").write_bytes(damage((saved / "pytorch_model.bin").read_bytes()))
        with pytest.raises(ModelError, match=r"model=x: .*(cannot be read|could not be loaded)"):
            load(config)


def test_an_adapter_is_no_model(saved: Path) -> None:
    """Transformers would load its base model from elsewhere and put the adapter into it."""
    (saved / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ModelError, match=rf"model\.path={saved}: {saved} holds an adapter, not a model\. Name its base"
    ):
        load(ModelConfig(name="x", path=str(saved)))


def test_weights_that_are_stored_quantised_are_refused(saved: Path) -> None:
    with_config(saved, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelError, match=r"stored quantised \(bitsandbytes\).*set model.quantization=nf4 or int8"):
        load(ModelConfig(name="x", path=str(saved)))


def test_the_head_of_a_quantised_classifier_is_not_quantised(saved: Path) -> None:
    model = load(ModelConfig(name="x", path=str(saved), quantization=Quantization.nf4))
    assert model.classifier.weight.dtype == torch.float32
    assert not model.bert.encoder.layer[0].output.dense.weight.is_floating_point()


@pytest.mark.parametrize(
    ("add", "used", "refused"),
    [
        ({"tokens": ["<new>"]}, [], True),
        ({"special": ["<image>"]}, [], False),  # as Gemma's tokenizer has it
        ({"special": ["<image>"]}, [[5, 260]], True),
        ({"special": ["<image>"]}, [[5, 259]], False),
        ({"pad": "<padding>"}, [], True),
    ],
)
def test_a_tokenizer_larger_than_the_embedding(
    saved: Path, add: dict[str, Any], used: list[list[int]], refused: bool
) -> None:
    config = ModelConfig(name="x", path=str(saved))
    model, tokenizer = load(config), load_tokenizer(config)
    check_vocabulary(config, model, tokenizer)
    tokenizer.add_tokens(add.get("tokens", []))
    tokenizer.add_tokens(add.get("special", []), special_tokens=True)
    if "pad" in add:
        tokenizer.add_special_tokens({"pad_token": add["pad"]})
    given = [torch.tensor(ids) for ids in used]
    if refused:
        message = (
            rf"model=x: the tokenizer of {saved} gives ids up to 260, and the model embeds 0 to 259: '<\w+>' is 260"
        )
        with pytest.raises(ModelError, match=message):
            check_vocabulary(config, model, tokenizer, given)
    else:
        check_vocabulary(config, model, tokenizer, given)


def test_a_folder_without_tokenizer_is_refused(saved: Path) -> None:
    """Transformers makes a tokenizer of special tokens alone: everything would be unknown."""
    for path in saved.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer \(tokenizer.json, vocab.txt or the like\)"):
        load_tokenizer(ModelConfig(name="x", path=str(saved)))


# ---------------------------------------------------------------- skeletons


@pytest.mark.parametrize("tiny", TinyModel)
def test_a_skeleton_allocates_nothing_and_has_the_same_names_and_shapes(tiny: TinyModel) -> None:
    skeleton, model = build_skeleton(TINY[tiny], num_labels=3), load(TINY[tiny])
    assert {value.device.type for value in (*skeleton.parameters(), *skeleton.buffers())} == {"meta"}
    for kind in ("named_parameters", "named_buffers"):
        shapes = [{name: value.shape for name, value in getattr(one, kind)()} for one in (skeleton, model)]
        assert shapes[0] == shapes[1]
    assert [name for name, _ in skeleton.named_modules()] == [name for name, _ in model.named_modules()]


def test_a_skeleton_reads_the_configuration_alone(saved: Path) -> None:
    without_weights(saved)
    skeleton = build_skeleton(ModelConfig(name="x", path=str(saved)), num_labels=7)
    assert skeleton.classifier.weight.shape == (7, 64)


def test_a_skeleton_of_a_large_model_is_free(tmp_path: Path) -> None:
    RobertaConfig(
        hidden_size=8192, num_hidden_layers=48, intermediate_size=32768, num_attention_heads=64
    ).save_pretrained(tmp_path)
    skeleton = build_skeleton(ModelConfig(name="large", path=str(tmp_path)), num_labels=2)
    assert sum(parameter.numel() for parameter in skeleton.parameters()) > 38e9


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "call",
    [lambda: load_tokenizer(HUB), lambda: load(HUB), lambda: build_skeleton(HUB, num_labels=2)],
    ids=["tokenizer", "model", "skeleton"],
)
def test_without_network_the_hub_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(ModelError) as raised:
        call()
    message = str(raised.value)
    assert message.startswith(
        "model=bert_base: google-bert/bert-base-uncased could not be loaded with attention=sdpa. "
    )
    assert message.endswith("Without network, point model.path at a local folder that `save_pretrained` wrote.")


def test_an_attention_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ModelError, match=r"bert could not be loaded with attention=flash.*only possible arguments"):
        load(replace(TINY[TinyModel.bert], attention="flash"))


def test_an_error_without_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError

    monkeypatch.setattr(configs.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"attention=sdpa\. OSError\. Without network"):
        load(HUB)


# ---------------------------------------------------------------- a model to be pretrained here


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus.txt").write_text("the old king and the young king\n" * 20 + "a castle, Größe 3\n" * 5)
    settings = ScratchConfig(
        num_blocks=2, width=32, num_heads=2, max_tokens=64, vocab_size=280, path=str(tmp_path), file="corpus.txt"
    )
    return ModelConfig(name="own", scratch=settings)


def test_a_vocabulary_is_learned_once_and_loses_nothing(
    scratch: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(scratch)
    assert (len(tokenizer), tokenizer.model_max_length) == (280, 64)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 1)
    for text in ("the old king", "Größe 3, 日本\n", "  spaces  "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the king")["input_ids"]) < len("the king") / 2
    assert len(list((tmp_path / "cache/tokenizers").iterdir())) == 1
    monkeypatch.setattr(scratch_module, "read_column", lambda *_: pytest.fail("learned twice"))
    assert load_tokenizer(scratch).get_vocab() == tokenizer.get_vocab()


def test_a_scratch_model_has_its_shape_and_a_tied_embedding(scratch: ModelConfig, tmp_path: Path) -> None:
    model = load_model(scratch, num_labels=None, pad_token_id=0, seed=0).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # Embedding; per block q, k, v, o and three MLP matrices of 85 = 32 * 8 // 3, and two norms; one norm at the end.
    assert sum(p.numel() for p in model.parameters()) == 280 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 85 + 2 * 32) + 32
    save_model(model, load_tokenizer(scratch), tmp_path / "saved")
    again = load_model(
        ModelConfig(name="x", path=str(tmp_path / "saved")), num_labels=None, pad_token_id=0, seed=1
    ).model
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_vocabulary_that_the_text_cannot_fill_is_refused(scratch: ModelConfig) -> None:
    assert scratch.scratch is not None
    scratch.scratch.vocab_size = 5000
    with pytest.raises(ModelError, match=r"vocab_size=5000: the text of corpus.txt gives only \d+ tokens"):
        load_tokenizer(scratch)
    scratch.scratch.file = "nothing.txt"
    with pytest.raises(ModelError, match=r"model.scratch.file=nothing.txt: no such file"):
        load_tokenizer(scratch)


# ---------------------------------------------------------------- activation checkpointing


@pytest.mark.parametrize("method", ["lora", "head_only"])
@pytest.mark.parametrize("tiny", TinyModel)
def test_checkpointing_sends_no_gradient_below_the_lowest_trained_block(tiny: TinyModel, method: str) -> None:
    """Transformers makes the embeddings' output require one, for the reentrant kind of checkpointing."""
    gradients, peaks, needed = [], [], []
    for checkpoint in (
        lambda _: None,
        checkpoint_activations,
        lambda model: model.activation_checkpointing_enable({"use_reentrant": False}),  # as it was
    ):
        model = load(TINY[tiny])
        names = [name for name, _ in model.named_modules()]
        if method == "lora":
            last = select_targets(names, model_type=str(tiny), projections=["o"], blocks="last_1")
            apply_lora(model, last, rank=RankConfig(4, alpha=8), generator=torch.Generator().manual_seed(0))
            for _, layer in lora_layers(model):  # so that A has a gradient, too
                nn.init.ones_(layer.lora_B)
        set_trainable(model, head_modules(str(tiny)))
        checkpoint(model)
        path = ARCHITECTURES[str(tiny)].block_pattern
        seen: list[bool] = []
        for name, module in model.named_modules():
            if re.fullmatch(path, name):
                module.register_forward_hook(lambda *call, seen=seen: seen.append(_needs_gradient(call[2])))
        optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.0)
        inputs = {name: value.repeat(8, 4) for name, value in inputs_of(["a longer text"]).items()}
        with LiveTensors(model, optimizer) as live:
            model.train()(**inputs).logits.square().sum().backward()
        needed.append(seen)
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
        peaks.append(live.peak.total_bytes)
    assert gradients[0]
    for name, value in gradients[0].items():
        assert value.abs().max() > 0
        assert torch.allclose(value, gradients[1][name], rtol=1e-5, atol=1e-6), name
    assert needed[0] == needed[1] == [False, method == "lora"]
    assert needed[2] == [True, True]
    assert peaks[1] <= peaks[2]


def _needs_gradient(output: Tensor | tuple[Tensor, ...]) -> bool:
    return (output if isinstance(output, Tensor) else output[0]).requires_grad


# ---------------------------------------------------------------- where other tools find it


def test_a_model_is_named_so_that_other_tools_find_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name_of(config: ModelConfig) -> tuple[str | None, str | None]:
        loaded = load_model(config, num_labels=3, pad_token_id=0, seed=0)
        return loaded.name, loaded.revision

    monkeypatch.chdir(saved.parent)
    assert name_of(ModelConfig(name="x", path=saved.name)) == (str(saved), None)
    monkeypatch.setattr(configs, "verified_asset_dir", lambda name, _: {"minilm": saved}[name])
    assert name_of(ModelConfig(name="minilm", asset="minilm")) == (str(saved), None)
    assert name_of(TINY[TinyModel.bert]) == (None, None)  # random, and nowhere to be found
    for module in (configs, loading):
        monkeypatch.setattr(module, "source_arguments", lambda config: (str(saved),))
        monkeypatch.setattr(module, "revision_arguments", lambda config: {})
    assert name_of(HUB) == ("google-bert/bert-base-uncased", "8" * 40)
    assert name_of(replace(HUB, revision=None)) == ("google-bert/bert-base-uncased", "main")


def test_the_head_of_a_type_that_is_not_described_is_what_is_outside_the_base(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = AutoConfig.for_model("roformer", vocab_size=260, pad_token_id=0, **sizes)
    assert "roformer" not in ARCHITECTURES
    AutoModel.from_config(config).save_pretrained(tmp_path)
    saved_config = ModelConfig(name="x", path=str(tmp_path), attention="eager")
    loaded = load_model(saved_config, num_labels=3, pad_token_id=0, seed=0)
    assert loaded.head == ("classifier",) == task_head(load_model_config(saved_config, num_labels=3, pad_token_id=0), 3)
    assert task_head(config, None) == ()
