"""LoRA is what the paper says and what `peft` computes; its counts are those of hand arithmetic; it leaves no trace."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    RobertaConfig,
)
from transformers.pytorch_utils import Conv1D

from harness.config.schema import AlphaPolicy, Dtype, ModelConfig, RankConfig, TinyModel, VariantConfig
from harness.methods import peft_files
from harness.methods.adapting import apply_lora, lora_layers, merge, merge_and_remove, remove_lora, unmerge
from harness.methods.counts import ParameterCounts, count_parameters, set_trainable
from harness.methods.inits import start
from harness.methods.lora import LoRAError, LoRALayer
from harness.methods.peft_files import head_state, load_adapter, save_adapter
from harness.models.configs import load_model_config
from harness.models.loading import load_model
from harness.placement.architectures import head_modules
from harness.placement.select import select_targets

TINY = ("tiny_bert", "tiny_gpt2", "tiny_llama")
MODELS = (*TINY, "minilm")
PLACEMENTS = {"qv": ["q", "v"], "qkv": ["qkv"], "all": ["all"]}
SCALINGS = {"alpha/rank": AlphaPolicy.fixed, "alpha/sqrt(rank)": AlphaPolicy.rslora}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
NUM_LABELS = 3
# Its head is two modules, one of which `peft` does not add to a classifier's head by itself.
TINY_DEBERTA = DebertaV2Config(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    vocab_size=260,
    max_position_embeddings=64,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    share_att_key=True,
    num_labels=NUM_LABELS,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def _placements(model: str) -> tuple[str, str]:
    return ("qkv" if model == "tiny_gpt2" else "qv"), "all"


@functools.cache
def _pristine(name: str, wide: bool = False) -> PreTrainedModel:
    """A base model, loaded once. `wide`: a Llama whose k and v are as wide as q, so that rank 64 is possible."""
    torch.manual_seed(0)
    if name == "tiny_deberta":
        model = AutoModelForSequenceClassification.from_config(TINY_DEBERTA, attn_implementation="eager")
    else:
        tiny = None if name == "minilm" else TinyModel(name.removeprefix("tiny_"))
        config = ModelConfig(name=name, tiny=tiny, asset="minilm" if tiny is None else None)
        if wide and name == "tiny_llama":
            model_config = load_model_config(config, num_labels=NUM_LABELS, pad_token_id=0)
            model_config.num_key_value_heads = model_config.num_attention_heads
            model = AutoModelForSequenceClassification.from_config(model_config)
        else:
            model = load_model(config, num_labels=NUM_LABELS, pad_token_id=0, seed=0).model
    # At the usual init of 0.02 attention is nearly uniform, logits are small, and differences hide in the tolerance.
    with torch.no_grad():
        for parameter in head_state(model, _head(model)).values() if name == "minilm" else model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model.eval()


def _base(name: str, wide: bool = False) -> PreTrainedModel:
    return copy.deepcopy(_pristine(name, wide))


def _targets(model: PreTrainedModel, placement: str) -> list[str]:
    names = [name for name, _ in model.named_modules()]
    selected = select_targets(names, model_type=model.config.model_type, projections=PLACEMENTS[placement])
    return [target.module for target in selected]


def _head(model: PreTrainedModel) -> tuple[str, ...]:
    return head_modules(model.config.model_type)


def _batch(seed: int, rows: int = 3, length: int = 10) -> tuple[dict[str, Tensor], Tensor]:
    """Random tokens, padded to three different lengths, and random labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 260, (rows, length), generator=generator)
    mask = (torch.arange(length) < torch.tensor([length, length - 3, 4])[:rows, None]).long()
    labels = torch.randint(0, NUM_LABELS, (rows,), generator=generator)
    return {"input_ids": tokens * mask, "attention_mask": mask}, labels


def _logits(model: nn.Module, seed: int = 0) -> Tensor:
    with torch.no_grad():
        return model(**_batch(seed)[0]).logits


def _loss(model: nn.Module, seed: int) -> Tensor:
    inputs, labels = _batch(seed)
    return nn.functional.cross_entropy(model(**inputs).logits, labels)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _randomise(model: PreTrainedModel, seed: int = 0) -> None:
    """Makes the delta weights and the head differ from what a fresh model has, so that each of them shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            # The delta weight has entries of about 0.1 * scaling / sqrt(3) at every rank.
            layer.lora_B.normal_(0, 0.1 * math.sqrt(layer.in_features / layer.rank) / 8, generator=generator)
        for parameter in head_state(model, _head(model)).values():
            parameter.normal_(0, 0.1, generator=generator)


def _adapted(
    name: str, placement: str, *, rank: RankConfig | None = None, seed: int = 0, dropout: float = 0.0
) -> PreTrainedModel:
    model = _base(name)
    apply_lora(
        model,
        _targets(model, placement),
        rank=rank or RankConfig(8, alpha=16),
        dropout=dropout,
        generator=torch.Generator().manual_seed(seed),
    )
    set_trainable(model, _head(model))
    return model


def _peft_config(model: PreTrainedModel, targets: Sequence[str] | str, rank: RankConfig, **more: object) -> object:
    return peft.LoraConfig(
        task_type="SEQ_CLS",
        r=rank.rank,
        lora_alpha=rank.effective_alpha,
        use_rslora=rank.alpha_policy is AlphaPolicy.rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(_head(model)),
        fan_in_fan_out=model.config.model_type == "gpt2",
        **more,
    )


def _copy_adapter(ours: nn.Module, theirs: peft.PeftModel) -> None:
    with torch.no_grad():
        for name, layer in lora_layers(ours):
            other = theirs.base_model.model.get_submodule(name)
            other.lora_A["default"].weight.copy_(layer.lora_A)
            other.lora_B["default"].weight.copy_(layer.lora_B)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert value.dtype == after[name].dtype and torch.equal(value, after[name]), name


# ---------------------------------------------------------------- against peft


PEFT_CASES = [
    (model, placement, rank, scaling)
    for model in MODELS
    for placement in _placements(model)
    for rank in (1, 8, 64)
    for scaling in SCALINGS
]


@pytest.mark.parametrize(("name", "placement", "rank", "scaling"), PEFT_CASES)
def test_logits_and_gradients_equal_those_of_peft(name: str, placement: str, rank: int, scaling: str) -> None:
    base = _base(name, wide=rank == 64)
    targets, settings_ = _targets(base, placement), RankConfig(rank, SCALINGS[scaling], alpha=16)
    theirs = peft.get_peft_model(copy.deepcopy(base), _peft_config(base, targets, settings_))
    ours = base
    logits_of_base = _logits(ours)
    apply_lora(ours, targets, rank=settings_)
    set_trainable(ours, _head(ours))
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for _, layer in lora_layers(ours):  # B = 0 would hide A: its gradient is zero then
            layer.lora_B.normal_(0, 0.2 / layer.scaling, generator=generator)
    _copy_adapter(ours, theirs)

    assert_close(_logits(ours), _logits(theirs), **TOLERANCE)
    assert (_logits(ours) - logits_of_base).abs().max() > 1e-2  # otherwise the comparison sees no adapter
    _loss(ours, 1).backward()
    _loss(theirs, 1).backward()
    for name_, layer in lora_layers(ours):
        other = theirs.base_model.model.get_submodule(name_)
        for mine, reference in (
            (layer.lora_A, other.lora_A["default"].weight),
            (layer.lora_B, other.lora_B["default"].weight),
        ):
            assert mine.grad is not None and mine.grad.abs().max() > 1e-5
            assert_close(mine.grad, reference.grad, **TOLERANCE)
    assert sum(p.numel() for p in _trainable(ours)) == sum(p.numel() for p in _trainable(theirs))
    assert all(parameter.grad is None for parameter in ours.parameters() if not parameter.requires_grad)


def _curve(model: nn.Module, *, learning_rate: float, num_steps: int = 20) -> list[float]:
    optimizer = torch.optim.AdamW(_trainable(model), lr=learning_rate, weight_decay=0.01)
    losses = []
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = _loss(model, seed=step % 3)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# All that is tiny; of MiniLM the two corners, which take as long as all the others together.
CURVES = [case for case in PEFT_CASES if case[0] != "minilm"]
CURVES += [("minilm", "qv", 8, "alpha/rank"), ("minilm", "all", 64, "alpha/sqrt(rank)")]


@pytest.mark.parametrize(("name", "placement", "rank", "scaling"), CURVES)
def test_a_loss_curve_of_20_steps_equals_that_of_peft(name: str, placement: str, rank: int, scaling: str) -> None:
    torch.manual_seed(rank)
    base = _base(name, wide=rank == 64)
    targets, settings_ = _targets(base, placement), RankConfig(rank, SCALINGS[scaling], alpha=16)
    theirs = peft.get_peft_model(copy.deepcopy(base), _peft_config(base, targets, settings_)).train()
    ours = base.train()
    apply_lora(ours, targets, rank=settings_)
    set_trainable(ours, _head(ours))
    _copy_adapter(ours, theirs)
    # MiniLM overshoots at a higher rate, and what overshoots multiplies rounding.
    learning_rate = 2e-4 if name == "minilm" else 2e-3
    curve = _curve(ours, learning_rate=learning_rate)
    assert_close(curve, _curve(theirs, learning_rate=learning_rate), **TOLERANCE)
    assert min(curve[-3:]) < curve[0] - 0.05  # it learns


RANKS = {
    "fixed": RankConfig(4, AlphaPolicy.fixed, alpha=12),
    "proportional": RankConfig(4, AlphaPolicy.proportional, alpha_per_rank=0.5),
    "rslora": RankConfig(4, AlphaPolicy.rslora, alpha=3.5),
}


@pytest.mark.parametrize(
    ("name", "policy"),
    [(name, policy) for name in TINY for policy in RANKS] + [("tiny_deberta", "fixed"), ("minilm", "rslora")],
)
def test_an_adapter_saved_here_loads_in_peft(name: str, policy: str, tmp_path: Path) -> None:
    rank = RANKS[policy]
    ours = _adapted(name, "all", rank=rank)
    _randomise(ours)
    num_bytes = save_adapter(ours, tmp_path, rank=rank, head_modules=_head(ours), dropout=0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert num_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size

    theirs = peft.PeftModel.from_pretrained(_base(name), tmp_path).eval()
    assert_close(_logits(theirs), _logits(ours), **TOLERANCE)
    assert (_logits(theirs) - _logits(_base(name))).abs().max() > 1e-2
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (rank.rank, rank.effective_alpha, 0.1)
    assert config.use_rslora is (policy == "rslora")
    assert set(config.modules_to_save) >= set(_head(ours))
    adapted = [module for module, layer in theirs.base_model.model.named_modules() if hasattr(layer, "lora_A")]
    assert adapted == _targets(_base(name), "all")


@pytest.mark.parametrize(
    ("name", "policy"),
    [(name, policy) for name in TINY for policy in ("fixed", "rslora")]
    + [("tiny_deberta", "fixed"), ("minilm", "rslora")],
)
def test_an_adapter_saved_by_peft_loads_here(name: str, policy: str, tmp_path: Path) -> None:
    template = _adapted(name, "all", rank=RANKS[policy])
    _randomise(template)
    targets = [module for module, _ in lora_layers(template)]
    config = _peft_config(template, targets, RANKS[policy], lora_dropout=0.25)
    theirs = peft.get_peft_model(_base(name), config).eval()
    _copy_adapter(template, theirs)
    with torch.no_grad():
        for module in _head(template):
            saved = theirs.base_model.model.get_submodule(module).modules_to_save["default"]
            saved.load_state_dict(template.get_submodule(module).state_dict())
    theirs.save_pretrained(tmp_path)

    ours = _base(name)
    assert load_adapter(ours, tmp_path) == targets
    assert_close(_logits(ours), _logits(theirs), **TOLERANCE)
    assert (_logits(ours) - _logits(_base(name))).abs().max() > 1e-2
    layers = dict(lora_layers(ours))
    assert list(layers) == targets
    assert {layer.dropout.p for layer in layers.values()} == {0.25}
    assert all(layer.scaling == pytest.approx(RANKS[policy].scaling) for layer in layers.values())


@pytest.mark.parametrize(
    ("targets", "more", "expected"),
    [
        (
            ["query", "value"],
            {},
            [f"bert.encoder.layer.{i}.attention.self.{p}" for i in (0, 1) for p in ("query", "value")],
        ),
        (r".*\.1\.output\.dense", {}, ["bert.encoder.layer.1.output.dense"]),
        (["query"], {"layers_to_transform": [1]}, ["bert.encoder.layer.1.attention.self.query"]),
        (
            ["query"],
            {"init_lora_weights": "gaussian"},
            [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)],
        ),
    ],
    ids=["suffixes", "expression", "one layer", "gaussian"],
)
def test_an_adapter_of_peft_may_name_its_targets_in_any_way(
    targets: list[str] | str, more: dict[str, object], expected: list[str], tmp_path: Path
) -> None:
    base = _base("tiny_bert")
    theirs = peft.get_peft_model(_base("tiny_bert"), _peft_config(base, targets, RANKS["fixed"], **more)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path)
    assert load_adapter(base, tmp_path) == expected
    assert_close(_logits(base), _logits(theirs), **TOLERANCE)
    assert (_logits(base) - _logits(_base("tiny_bert"))).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_qalora", True),
        ("bias", "some_only"),
        ("lora_bias", True),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("alora_invocation_tokens", [5]),
        ("trainable_token_indices", [5]),
        ("layer_replication", [[0, 2], [1, 2]]),
    ],
)
def test_a_variant_of_peft_that_this_layer_does_not_compute_is_refused_by_name(
    setting: str, value: object, tmp_path: Path
) -> None:
    base = _adapted("tiny_bert", "all")
    _randomise(base)
    before = _state(base)
    config = _peft_config(base, ["query", "value"], RANKS["fixed"])
    peft.get_peft_model(_base("tiny_bert"), config).save_pretrained(tmp_path)
    config_path = tmp_path / "adapter_config.json"
    saved = json.loads(config_path.read_text())
    assert setting in saved  # peft spells it like this
    config_path.write_text(json.dumps(saved | {setting: value}))
    with pytest.raises(LoRAError, match=rf"adapter_config\.json: {setting}=.* is not supported, only "):
        load_adapter(base, tmp_path)
    _assert_same_state(base, before)


def _break(directory: Path, change: str) -> None:
    """Makes a saved adapter of `tiny_bert` into one that does not fit it."""
    config_path, tensors_path = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    config, tensors = json.loads(config_path.read_text()), load_file(tensors_path)
    query = "base_model.model.bert.encoder.layer.0.attention.self.query"
    match change:
        case "no config":
            config_path.unlink()
            return
        case "no tensors":
            tensors_path.unlink()
            return
        case "config is not JSON":
            config_path.write_text("{")
            return
        case "tensors are not safetensors":
            tensors_path.write_bytes(b"torch")
            return
        case "another kind":
            config["peft_type"] = "IA3"
        case "no rank":
            del config["r"]
        case "another rank":
            config["r"] = 5
        case "no B":
            del tensors[f"{query}.lora_B.weight"]
        case "no A":
            del tensors[f"{query}.lora_A.weight"]
        case "no adapter":
            tensors = {name: value for name, value in tensors.items() if "lora_" not in name}
        case "unknown module":
            tensors[f"{query}2.lora_A.weight"] = torch.zeros(4, 64)
            tensors[f"{query}2.lora_B.weight"] = torch.zeros(64, 4)
        case "an embedding":
            tensors["base_model.model.bert.embeddings.word_embeddings.lora_A.weight"] = torch.zeros(4, 64)
            tensors["base_model.model.bert.embeddings.word_embeddings.lora_B.weight"] = torch.zeros(64, 4)
        case "another width":
            tensors[f"{query}.lora_A.weight"] = torch.zeros(4, 65)
        case "another head":
            tensors["base_model.model.classifier.weight"] = torch.zeros(NUM_LABELS + 1, 64)
        case "unknown scalar":
            tensors[f"{query}.alpha"] = torch.tensor(4.0)
    config_path.write_text(json.dumps(config))
    save_file(tensors, tensors_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no config", r"holds no adapter_config\.json\."),
        ("no tensors", r"holds no adapter_model\.safetensors\."),
        ("config is not JSON", r"adapter_config\.json is not readable as JSON"),
        ("tensors are not safetensors", r"adapter_model\.safetensors is not readable as safetensors"),
        ("another kind", r"peft_type='IA3', this loads LORA\."),
        ("no rank", r"adapter_config\.json: r is missing\."),
        ("another rank", r"query\.lora_A\.weight is \(4, 64\), the model needs \(5, 64\)"),
        ("no B", r"layer\.0\.attention\.self\.query\.lora_B\.weight is absent, the model needs \(64, 4\)"),
        ("no A", r"layer\.0\.attention\.self\.query\.lora_A\.weight is absent, the model needs \(4, 64\)"),
        ("no adapter", r"adapter_model\.safetensors holds no LoRA tensors\."),
        ("unknown module", r"the model has no module bert\.encoder\.layer\.0\.attention\.self\.query2\."),
        ("an embedding", r"word_embeddings\.lora_embedding_A is absent, the model needs \(4, 260\)"),
        ("another width", r"query\.lora_A\.weight is \(4, 65\), the model needs \(4, 64\)"),
        ("another head", r"classifier\.weight is \(4, 64\), the model needs \(3, 64\)"),
        ("unknown scalar", r"query\.alpha is \(\), the model needs none"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_the_model_stays_as_it_was(
    change: str, message: str, tmp_path: Path
) -> None:
    other = _adapted("tiny_bert", "all", rank=RankConfig(4, alpha=8))
    save_adapter(other, tmp_path, rank=RankConfig(4, alpha=8), head_modules=_head(other))
    _break(tmp_path, change)
    model = _adapted("tiny_bert", "qv")
    _randomise(model)
    before, modules = _state(model), list(model.modules())
    with pytest.raises(LoRAError, match=message):
        load_adapter(model, tmp_path)
    _assert_same_state(model, before)
    assert list(model.modules()) == modules


def test_a_model_without_adapters_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(LoRAError, match=r"the model has no LoRA layers to save\."):
        save_adapter(_base("tiny_bert"), tmp_path, rank=RANKS["fixed"], head_modules=("classifier",))
    assert list(tmp_path.iterdir()) == []


def test_loading_an_adapter_swaps_it_for_the_one_before(tmp_path: Path) -> None:
    kinds = {"first": ("qv", RankConfig(8, alpha=16)), "second": ("all", RankConfig(3, AlphaPolicy.rslora, alpha=4))}
    expected, targets = {}, {}
    for seed, (kind, (placement, rank)) in enumerate(kinds.items()):
        model = _adapted("tiny_llama", placement, rank=rank, seed=seed)
        _randomise(model, seed)
        save_adapter(model, tmp_path / kind, rank=rank, head_modules=_head(model))
        expected[kind], targets[kind] = _logits(model), _targets(_base("tiny_llama"), placement)

    model = _base("tiny_llama")
    for kind in ("first", "second", "first", "second"):
        load_adapter(model, tmp_path / kind)
        assert [name for name, _ in lora_layers(model)] == targets[kind]
        assert torch.equal(_logits(model), expected[kind])
        merge(model)  # the next one must take it out again
    remove_lora(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, _base("tiny_llama").model.layers[0].mlp.up_proj.weight)


# ---------------------------------------------------------------- the layer by hand


@settings(max_examples=50, deadline=None)
@given(
    in_features=st.integers(1, 9),
    out_features=st.integers(1, 9),
    rows=st.lists(st.integers(1, 4), max_size=2),
    kind=st.sampled_from(["linear", "linear without bias", "conv1d"]),
    data=st.data(),
)
def test_forward_and_gradients_are_those_of_the_formula(
    in_features: int, out_features: int, rows: list[int], kind: str, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(in_features, out_features)))
    scaling = data.draw(st.floats(0.1, 4))
    torch.manual_seed(0)
    if kind == "conv1d":
        base: nn.Module = Conv1D(out_features, in_features)
        weight, bias = base.weight.detach().T, base.bias.detach()
    else:
        base = nn.Linear(in_features, out_features, bias=kind == "linear")
        weight, bias = base.weight.detach(), base.bias.detach() if kind == "linear" else torch.zeros(out_features)
    layer = LoRALayer(base, rank=rank, scaling=scaling)
    start(layer, VariantConfig())
    with torch.no_grad():
        layer.lora_B.normal_()
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    x = torch.randn(*rows, in_features, requires_grad=True)
    g = torch.randn(*rows, out_features)

    y = layer(x)
    y.backward(g)
    flat, flat_g = x.detach().reshape(-1, in_features), g.reshape(-1, out_features)
    expected = flat @ weight.T + bias + scaling * (flat @ a.T) @ b.T
    assert y.shape == (*rows, out_features)
    assert_close(y.detach().reshape(-1, out_features), expected, **TOLERANCE)
    assert_close(layer.lora_B.grad, scaling * flat_g.T @ (flat @ a.T), **TOLERANCE)
    assert_close(layer.lora_A.grad, scaling * (flat_g @ b).T @ flat, **TOLERANCE)
    assert_close(x.grad.reshape(-1, in_features), flat_g @ weight + scaling * (flat_g @ b) @ a, **TOLERANCE)


@pytest.mark.parametrize("base", [nn.Linear(3, 2), Conv1D(2, 3)], ids=["Linear", "Conv1D"])
def test_delta_weight_by_hand(base: nn.Module) -> None:
    layer = LoRALayer(base, rank=1, scaling=0.5)
    with torch.no_grad():
        layer.lora_A.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        layer.lora_B.copy_(torch.tensor([[10.0], [20.0]]))
    expected = torch.tensor([[5.0, 10.0, 15.0], [10.0, 20.0, 30.0]])  # 0.5 * B A, (out_features, in_features)
    if isinstance(base, Conv1D):
        expected = expected.T
    assert layer.delta_weight().shape == base.weight.shape
    assert torch.equal(layer.delta_weight(), expected)
    assert not layer.delta_weight().requires_grad


@pytest.mark.parametrize(
    ("rank", "scaling"),
    [
        (RankConfig(8, AlphaPolicy.fixed, alpha=16), 2.0),
        (RankConfig(64, AlphaPolicy.fixed, alpha=16), 0.25),
        (RankConfig(64, AlphaPolicy.proportional, alpha_per_rank=2), 2.0),
        (RankConfig(64, AlphaPolicy.rslora, alpha=16), 2.0),
    ],
)
def test_the_layer_gets_the_scaling_of_its_alpha_policy(rank: RankConfig, scaling: float) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    apply_lora(model, ["0"], rank=rank)
    assert [layer.scaling for _, layer in lora_layers(model)] == [scaling]


def test_dropout_acts_in_training_alone_and_on_the_adapters_input() -> None:
    torch.manual_seed(0)
    base = nn.Linear(200, 5)
    layer = LoRALayer(base, rank=5, scaling=1.0, dropout=0.4)
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(5, 200))
        layer.lora_B.copy_(torch.eye(5))
    x = torch.ones(1000, 200)
    undropped = base(x) + x[:, :5]
    assert_close(layer.eval()(x), undropped)
    # With these A and B the adapter hands its first five inputs through: each is 0, or 1 / (1 - 0.4).
    through = (layer.train()(x) - base(x)).detach()
    dropped = through.abs() < 1e-4
    assert_close(through[~dropped], torch.full_like(through[~dropped], 1 / 0.6), rtol=1e-4, atol=1e-4)
    assert 0.35 < dropped.float().mean() < 0.45


def test_a_begins_uniform_below_one_over_sqrt_in_and_b_at_zero() -> None:
    layer = LoRALayer(nn.Linear(400, 300), rank=64, scaling=1.0)
    start(layer, VariantConfig(), torch.Generator().manual_seed(3))
    bound = 1 / 20
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.min() < -0.99 * bound and layer.lora_A.max() > 0.99 * bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert torch.equal(layer.lora_B, torch.zeros(300, 64))
    reference = nn.init.kaiming_uniform_(
        torch.empty(64, 400), a=math.sqrt(5), generator=torch.Generator().manual_seed(3)
    )
    assert_close(layer.lora_A.detach(), reference)


def test_a_seed_means_one_adapter_whatever_was_drawn_before() -> None:
    first = _adapted("tiny_bert", "all", seed=7)
    torch.rand(100)
    _assert_same_state(_adapted("tiny_bert", "all", seed=7), _state(first))
    other = dict(lora_layers(_adapted("tiny_bert", "all", seed=8)))
    layers = dict(lora_layers(first))
    assert not any(torch.equal(layer.lora_A, other[name].lora_A) for name, layer in layers.items())
    assert len({layer.lora_A.flatten()[0].item() for layer in layers.values()}) == len(layers)


# ---------------------------------------------------------------- memory


def _saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward of `module(x)`, beside parameters; a shared storage counts once."""
    storages: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept = []  # a freed storage would lend its address to the next

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    assert y.requires_grad
    return sum(storages.values())


class _Parallel(nn.Module):
    """Query, key and value: three projections of one input."""

    def __init__(self, *projections: nn.Module) -> None:
        super().__init__()
        self.projections = nn.ModuleList(projections)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([projection(x) for projection in self.projections], dim=-1)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_adapter_keeps_its_input_for_the_backward_and_nothing_else(
    kind: type[nn.Module],
) -> None:
    batch, seq, in_features, out_features, rank = 4, 8, 16, 48, 2
    rows = batch * seq

    def base() -> nn.Module:
        arguments = (in_features, out_features) if kind is nn.Linear else (out_features, in_features)
        return kind(*arguments).requires_grad_(False)

    x = torch.randn(batch, seq, in_features, requires_grad=True)
    assert _saved_bytes(base(), x) == 0  # a frozen projection keeps its weight alone
    one = LoRALayer(base(), rank=rank, scaling=1.0)
    assert _saved_bytes(one, x) == 4 * rows * in_features
    three = _Parallel(*(LoRALayer(base(), rank=rank, scaling=1.0) for _ in range(3)))
    assert _saved_bytes(three, x) == 4 * rows * in_features  # q, k and v share their input
    dropping = LoRALayer(base(), rank=rank, scaling=1.0, dropout=0.5)
    # What is left of the input takes its place, with no mask; rank numbers for each row come on top.
    assert _saved_bytes(dropping, x) == 4 * rows * (in_features + rank)


# ---------------------------------------------------------------- what a model is before, during and after


@pytest.mark.parametrize("name", MODELS)
def test_an_adapted_model_starts_as_its_base_model(name: str) -> None:
    base = _base(name)
    assert torch.equal(_logits(_adapted(name, "all")), _logits(base))


def _change(model: PreTrainedModel, *, num_steps: int = 2) -> set[str]:
    """Names of the parameters that differ after optimizer steps over what is trainable."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.train()
    optimizer = torch.optim.AdamW(_trainable(model), lr=1e-2, weight_decay=0.01)
    for step in range(num_steps):  # two, since the gradient of A is zero while B is
        optimizer.zero_grad()
        _loss(model, step).backward()
        optimizer.step()
    return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("name", MODELS)
def test_lora_changes_every_adapter_and_the_head_and_nothing_else(name: str) -> None:
    model = _adapted(name, "all")
    adapter = {f"{layer}.{part}" for layer, _ in lora_layers(model) for part in ("lora_A", "lora_B")}
    head = set(head_state(model, _head(model)))
    assert head and len(adapter) == 2 * len(_targets(_base(name), "all"))
    assert {name for name, value in model.named_parameters() if value.requires_grad} == adapter | head
    assert _change(model) == adapter | head


@pytest.mark.parametrize("name", TINY)
def test_full_fine_tuning_changes_every_parameter(name: str) -> None:
    model = _base(name)
    model.requires_grad_(False)
    set_trainable(model, _head(model), trains_base=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert _change(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", TINY)
def test_head_only_changes_the_head(name: str) -> None:
    model = _base(name)
    set_trainable(model, _head(model))
    head = {"classifier.weight", "classifier.bias"} if name == "tiny_bert" else {"score.weight"}
    assert {name for name, value in model.named_parameters() if value.requires_grad} == head
    assert _change(model) == head


def test_what_is_trained_is_float32_over_a_base_in_bfloat16() -> None:
    config = ModelConfig(name="tiny_bert", tiny=TinyModel.bert, dtype=Dtype.bfloat16)
    model = load_model(config, num_labels=NUM_LABELS, pad_token_id=0, seed=0).model
    apply_lora(model, _targets(model, "qv"), rank=RANKS["fixed"])
    set_trainable(model, _head(model))
    for name, parameter in model.named_parameters():
        assert parameter.dtype is (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _loss(model, 0).backward()
    assert all(parameter.grad is not None and parameter.grad.dtype is torch.float32 for parameter in _trainable(model))


@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model_computes_the_same_and_unmerging_restores_every_bit(name: str) -> None:
    model = _adapted(name, "all")
    _randomise(model)
    before, unmerged = _state(model), _logits(model)
    merge(model)
    merge(model)  # once more changes nothing
    assert all(layer.merged for _, layer in lora_layers(model))
    assert_close(_logits(model), unmerged, **TOLERANCE)
    for module, layer in lora_layers(model):
        assert_close(layer.base.weight, before[f"{module}.base.weight"] + layer.delta_weight())
    unmerge(model)
    unmerge(model)
    assert not any(layer.merged for _, layer in lora_layers(model))
    _assert_same_state(model, before)
    assert torch.equal(_logits(model), unmerged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_restores_every_bit_in_every_type(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LoRALayer(nn.Linear(32, 16).to(dtype), rank=4, scaling=2.0)
    start(layer, VariantConfig())
    with torch.no_grad():
        layer.lora_B.normal_()
    before = _state(layer)
    layer.merge()
    assert layer.base.weight.dtype is dtype
    merged = (before["base.weight"].float() + layer.delta_weight()).to(dtype)
    assert torch.equal(layer.base.weight, merged) and not torch.equal(merged, before["base.weight"])
    layer.unmerge()
    _assert_same_state(layer, before)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_removing_adapters_leaves_the_model_as_it_was(name: str, merged: bool) -> None:
    model = _base(name)
    before, modules, logits = _state(model), dict(model.named_modules()), _logits(model)
    apply_lora(model, _targets(model, "all"), rank=RANKS["fixed"])
    _randomise_adapter_only(model)
    assert not torch.equal(_logits(model), logits)
    if merged:
        merge(model)
    remove_lora(model)
    assert dict(model.named_modules()) == modules  # the very same objects
    _assert_same_state(model, before)
    assert torch.equal(_logits(model), logits)
    assert not list(lora_layers(model))


def _randomise_adapter_only(model: nn.Module) -> None:
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_(0, 0.1)


@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_takes_the_mode_of_the_module_that_it_wraps(training: bool) -> None:
    model = _base("tiny_bert").train(training)
    apply_lora(model, _targets(model, "qv"), rank=RANKS["fixed"], dropout=0.5)
    assert {layer.training for _, layer in lora_layers(model)} == {training}
    assert {layer.dropout.training for _, layer in lora_layers(model)} == {training}


@pytest.mark.parametrize(
    ("module", "rank", "message"),
    [
        ("self_attn.q_proj", 0, r"layers\.0\.self_attn\.q_proj: rank=0: a 64 -> 64 projection allows 1 to 64\."),
        ("self_attn.q_proj", -1, r"layers\.0\.self_attn\.q_proj: rank=-1: a 64 -> 64 projection allows 1 to 64\."),
        ("self_attn.k_proj", 33, r"layers\.1\.self_attn\.k_proj: rank=33: a 64 -> 32 projection allows 1 to 32\."),
        ("self_attn.query", 8, r"no module model\.layers\.1\.self_attn\.query in LlamaForSequenceClassification\."),
        ("input_layernorm", 8, r"LoRA adapts nn\.Linear, Conv1D and nn\.Embedding, not LlamaRMSNorm\."),
        ("mlp", 8, r"model\.layers\.1\.mlp: LoRA adapts nn\.Linear, Conv1D and nn\.Embedding, not LlamaMLP\."),
    ],
)
def test_what_cannot_be_adapted_is_an_error_and_nothing_changes(module: str, rank: int, message: str) -> None:
    model = _base("tiny_llama")
    before, modules = _state(model), list(model.modules())
    # A target that allows all ranks but two goes first: it must not be left adapted, or frozen.
    name = f"model.layers.1.{module}".replace("layers.1...", "")
    with pytest.raises(LoRAError, match=message):
        apply_lora(model, ["model.layers.0.self_attn.q_proj", name], rank=RankConfig(rank, alpha=16))
    assert list(model.modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    _assert_same_state(model, before)


def test_an_adapted_module_is_not_adapted_twice() -> None:
    model = _adapted("tiny_bert", "qv")
    query = _targets(_base("tiny_bert"), "qv")[0]
    with pytest.raises(LoRAError, match=rf"{query}: LoRA adapts nn\.Linear, Conv1D and nn\.Embedding, not LoRALayer\."):
        apply_lora(model, [query], rank=RANKS["fixed"])


# ---------------------------------------------------------------- counts, on the meta device


def _bert(width: int, num_blocks: int, *, vocab_size: int = 30522) -> BertConfig:
    return BertConfig(
        hidden_size=width,
        num_hidden_layers=num_blocks,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        vocab_size=vocab_size,
    )


def _roberta(width: int, num_blocks: int, *, num_labels: int = 2) -> RobertaConfig:
    return RobertaConfig(
        hidden_size=width,
        num_hidden_layers=num_blocks,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        num_labels=num_labels,
    )


CONFIGS = {
    "minilm": _bert(384, 6),
    "roberta_base": _roberta(768, 12, num_labels=3),
    "roberta_large": _roberta(1024, 24),
    "deberta_v2_xxlarge": DebertaV2Config(
        hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144, vocab_size=128100
    ),
    "gpt2_medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "as_wide_as_gpt2_medium": _bert(1024, 24),
    # Of GPT-3 only the shapes of the blocks matter here.
    "gpt3": _bert(12288, 96, vocab_size=100),
    "llama3_1_8b": LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
    ),
}


@functools.cache
def _skeleton(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(CONFIGS[name])


def _counts(name: str, projections: list[str], rank: int) -> ParameterCounts:
    model = _skeleton(name)
    names = [name for name, _ in model.named_modules()]
    targets = select_targets(names, model_type=model.config.model_type, projections=projections)
    apply_lora(model, targets, rank=RankConfig(rank, alpha=16))
    set_trainable(model, _head(model))
    counts = count_parameters(model, _head(model))
    assert all(parameter.is_meta for parameter in model.parameters())
    remove_lora(model)
    return counts


MLP_8B = 32 * 256 * 3 * (4096 + 14336)  # gate, up, down
ATTENTION_8B = 32 * 256 * (2 * (4096 + 4096) + 2 * (4096 + 1024))  # q, o; k, v


@pytest.mark.parametrize(
    ("model", "projections", "rank", "expected"),
    [
        ("minilm", ["q", "v"], 8, 73_728),  # 6 * 2 * 8 * (384 + 384)
        ("minilm", ["all"], 8, 331_776),  # 6 * 8 * (4 * (384 + 384) + 2 * (384 + 1536))
        ("roberta_base", ["q", "v"], 8, 294_912),
        ("roberta_large", ["q", "v"], 8, 786_432),
        ("deberta_v2_xxlarge", ["q", "v"], 16, 4_718_592),
        ("deberta_v2_xxlarge", ["q", "v"], 8, 2_359_296),  # the rank that the LoRA paper prints beside 4.7 M
        ("gpt2_medium", ["qkv"], 4, 393_216),
        ("gpt3", ["q", "v"], 1, 4_718_592),
        ("gpt3", ["q"], 8, 18_874_368),
        ("gpt3", ["q", "k"], 4, 18_874_368),
        ("gpt3", ["q", "k", "v", "o"], 2, 18_874_368),
        ("gpt3", ["q", "v"], 64, 301_989_888),
        ("llama3_1_8b", ["mlp"], 256, MLP_8B),
        ("llama3_1_8b", ["attention"], 256, ATTENTION_8B),
        ("llama3_1_8b", ["all"], 256, MLP_8B + ATTENTION_8B),
        ("llama3_1_8b", ["mlp"], 128, MLP_8B // 2),
    ],
)
def test_adapter_parameters_by_hand(model: str, projections: list[str], rank: int, expected: int) -> None:
    assert _counts(model, projections, rank).num_adapter_params == expected


def test_counts_of_llama_are_the_published_ones_without_the_unembedding() -> None:
    billions = [round(count / 1e9, 3) for count in (MLP_8B, ATTENTION_8B, MLP_8B + ATTENTION_8B, MLP_8B // 2)]
    assert billions == [0.453, 0.218, 0.671, 0.226]


def test_a_fused_projection_counts_like_separate_q_and_v() -> None:
    """The count cannot tell one shared A over q, k and v from two adapters of their own: r (d + 3d) = 2 r (d + d)."""
    fused = _counts("gpt2_medium", ["qkv"], 4).num_adapter_params
    separate = _counts("as_wide_as_gpt2_medium", ["q", "v"], 4).num_adapter_params
    assert fused == separate == 393_216


def test_adapter_head_and_base_are_counted_apart() -> None:
    head = (768 * 768 + 768) + (768 * 3 + 3)
    blocks = 12 * (4 * (768 * 768 + 768) + (768 * 3072 + 3072) + (3072 * 768 + 768) + 2 * (768 + 768))
    embeddings = (50265 + 514 + 1) * 768 + (768 + 768)
    assert head == 592_899
    assert _counts("roberta_base", ["q", "v"], 8) == ParameterCounts(
        num_adapter_params=294_912,
        num_head_params=head,
        num_trainable_params=294_912 + head,
        num_total_params=294_912 + head + blocks + embeddings,
    )


def test_counts_on_the_meta_device_are_those_of_the_real_model() -> None:
    model = _base("minilm")
    real = _adapted("minilm", "all")
    with torch.device("meta"):
        skeleton = AutoModelForSequenceClassification.from_config(model.config)
    apply_lora(skeleton, _targets(skeleton, "all"), rank=RankConfig(8, alpha=16))
    set_trainable(skeleton, _head(skeleton))
    assert count_parameters(skeleton, _head(skeleton)) == count_parameters(real, _head(real))


def test_full_and_head_only_count_as_trainable_what_they_train() -> None:
    model = _base("tiny_llama")
    total = sum(parameter.numel() for parameter in model.parameters())
    set_trainable(model, _head(model), trains_base=True)
    assert count_parameters(model, _head(model)) == ParameterCounts(0, 3 * 64, total, total)
    set_trainable(model, _head(model))
    assert count_parameters(model, _head(model)) == ParameterCounts(0, 3 * 64, 3 * 64, total)


def test_a_tied_parameter_counts_once() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 4), "output": nn.Linear(4, 10, bias=False)})
    model["output"].weight = model["embedding"].weight
    assert count_parameters(model, ()).num_total_params == 40


# ---------------------------------------------------------------- language models, whose embeddings are tied


@functools.cache
def _pristine_language_model(name: str, tied: bool) -> PreTrainedModel:
    sizes = {"vocab_size": 260, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_inner=128, n_positions=128, **sizes)
    else:
        config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model.eval()


def _language_model(name: str = "gpt2", *, tied: bool = True) -> PreTrainedModel:
    model = copy.deepcopy(_pristine_language_model(name, tied))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    return model


def _of_peft(model: PreTrainedModel, directory: Path, **settings_: object) -> peft.PeftModel:
    """An adapter of `peft` whose every trained tensor differs from what it began with, saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights: what is said there is what is tested here
        theirs = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings_))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.2)
        theirs.eval().save_pretrained(directory)
    return theirs


LANGUAGE_ADAPTERS = {
    "the unembedding": {"target_modules": ["lm_head"]},
    "with the unembedding": {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True},
    "a whole embedding": {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "fan_in_fan_out": True},
    "a whole unembedding": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"], "fan_in_fan_out": True},
    "whole norms": {"target_modules": ["c_attn"], "modules_to_save": ["ln_1", "ln_f"], "fan_in_fan_out": True},
    "an expression": {"target_modules": r".*h\.1\.attn\.c_attn", "fan_in_fan_out": True},
    "all but some": {"target_modules": ["c_attn"], "exclude_modules": r".*h\.0\..*", "fan_in_fan_out": True},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", LANGUAGE_ADAPTERS)
def test_an_adapter_of_peft_on_a_language_model_gives_equal_logits_and_leaves_no_trace(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    theirs = _of_peft(_language_model(tied=tied), tmp_path, **LANGUAGE_ADAPTERS[kind])
    ours = _language_model(tied=tied)
    before, modules, logits = _state(ours), dict(ours.named_modules()), _logits(ours)
    load_adapter(ours, tmp_path)
    assert_close(_logits(ours), _logits(theirs), **TOLERANCE)
    assert (_logits(ours) - logits).abs().max() > 1e-2
    # Its own format again, with all that the adapter holds.
    save_adapter(ours, tmp_path / "ours", rank=RankConfig(4, alpha=8), head_modules=(), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(_language_model(tied=tied), tmp_path / "ours").eval()
    assert_close(_logits(back), _logits(theirs), **TOLERANCE)

    merge(ours)
    assert_close(_logits(ours), _logits(theirs), **TOLERANCE)
    remove_lora(ours)
    assert dict(ours.named_modules()) == modules
    _assert_same_state(ours, before)
    assert torch.equal(_logits(ours), logits)
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) is tied
    assert ours.config.tie_word_embeddings is tied


def _edit_adapter(directory: Path, rename: Callable[[str], str], **settings_: object) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file({rename(name): value for name, value in tensors.items()}, directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | settings_))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
        lambda name: name.replace("ln_f.", "ln_f.modules_to_save."),
        lambda name: name.replace("ln_f.", "ln_f.modules_to_save.default."),
    ],
    ids=["no prefix", "name of the adapter", "wrapper", "wrapper and name"],
)
def test_names_of_other_versions_of_peft_are_read(rename: Callable[[str], str], tmp_path: Path) -> None:
    theirs = _of_peft(_language_model(), tmp_path, target_modules=["c_proj"], modules_to_save=["ln_f"])
    _edit_adapter(tmp_path, rename)
    ours = _language_model()
    load_adapter(ours, tmp_path)
    assert_close(_logits(ours), _logits(theirs), **TOLERANCE)


def test_an_older_adapter_of_pickled_tensors_is_read(tmp_path: Path) -> None:
    theirs = _of_peft(_language_model(), tmp_path, target_modules=["c_proj"])
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    ours = _language_model()
    load_adapter(ours, tmp_path)
    assert_close(_logits(ours), _logits(theirs), **TOLERANCE)
    (tmp_path / "adapter_model.bin").write_bytes(b"no tensors")
    with pytest.raises(LoRAError, match=r"adapter_model\.bin is not readable as tensors"):
        load_adapter(ours, tmp_path)


def test_an_adapter_in_bfloat16_is_read(tmp_path: Path) -> None:
    theirs = _of_peft(_language_model(), tmp_path, target_modules=["c_proj"], modules_to_save=["ln_f"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rounded = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
    save_file(rounded, tmp_path / "adapter_model.safetensors")
    ours = _language_model()
    load_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(_language_model(), tmp_path).eval()
    assert_close(_logits(ours), _logits(theirs), **TOLERANCE)
    assert {value.dtype for value in ours.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings_", "edit", "message"),
    [
        (
            {"target_modules": ["lm_head"]},
            lambda tensors: {name: value + 1 if "base_layer" in name else value for name, value in tensors.items()},
            r"lm_head\.base_layer\.weight differs from the model's: the adapter belongs to another base model",
        ),
        (
            {"target_modules": ["c_proj"]},
            lambda tensors: tensors | {"base_model.model.transformer.wte.weight": torch.zeros(260, 64)},
            r"transformer\.wte\.weight differs from the model's",
        ),
        (
            {"target_modules": ["c_proj"]},
            lambda tensors: tensors | {"base_model.model.transformer.wte.weight": torch.zeros(300, 64)},
            r"transformer\.wte\.weight is \(300, 64\), the model needs \(260, 64\)",
        ),
        (
            {"target_modules": ["c_proj"]},
            lambda tensors: {name: value for name, value in tensors.items() if ".h.1." not in name},
            r"holds no tensors of transformer\.h\.1\.attn\.c_proj, transformer\.h\.1\.mlp\.c_proj, which target_mod",
        ),
    ],
    ids=["another base", "another embedding", "another vocabulary", "a part"],
)
def test_an_adapter_that_is_not_for_this_base_is_refused(
    settings_: dict[str, object],
    edit: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
    tmp_path: Path,
) -> None:
    _of_peft(_language_model(), tmp_path, **settings_)
    save_file(edit(load_file(tmp_path / "adapter_model.safetensors")), tmp_path / "adapter_model.safetensors")
    model = _language_model()
    before, modules = _state(model), list(model.modules())
    with pytest.raises(LoRAError, match=message):
        load_adapter(model, tmp_path)
    assert list(model.modules()) == modules
    _assert_same_state(model, before)


def test_a_setting_of_peft_that_is_not_known_is_refused(tmp_path: Path) -> None:
    _of_peft(_language_model(), tmp_path, target_modules=["c_proj"])
    _edit_adapter(tmp_path, str, use_of_tomorrow=False)
    load_adapter(_language_model(), tmp_path)
    _edit_adapter(tmp_path, str, use_of_tomorrow=True)
    with pytest.raises(LoRAError, match=r"use_of_tomorrow=True is a setting that is not known here"):
        load_adapter(_language_model(), tmp_path)


def test_every_setting_of_peft_is_known() -> None:
    known = set(peft_files._SUPPORTED) | peft_files._READ | peft_files._WITHOUT_EFFECT
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_merging_into_a_tied_unembedding_leaves_the_embedding_alone(name: str, tmp_path: Path) -> None:
    model = _language_model(name)
    apply_lora(model, ["lm_head"], rank=RankConfig(4, alpha=8))
    _randomise_adapter_only(model)
    before, unmerged, num_params = _state(model), _logits(model), sum(p.numel() for p in model.parameters())
    merge(model)
    assert_close(_logits(model), unmerged, **TOLERANCE)
    assert torch.equal(model.get_input_embeddings().weight, before["lm_head.base.weight"])
    assert model.config.tie_word_embeddings is False
    unmerge(model)
    _assert_same_state(model, before)
    assert model.lm_head.base.weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings is True
    assert sum(p.numel() for p in model.parameters()) == num_params

    merge_and_remove(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(_logits(again), unmerged, **TOLERANCE)
    assert again.lm_head.weight is not again.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_a_quantised_weight_is_not_merged_into(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    apply_lora(model, ["0", "1"], rank=RankConfig(2, alpha=2))
    layers = dict(lora_layers(model))
    layers["1"].base.weight = nn.Parameter(torch.zeros(8, 8, dtype=dtype), requires_grad=False)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(LoRAError, match=rf"^1: a quantised weight \({kind}\) holds no sum; load the base model"):
        merge(model)
    assert not any(layer.merged for layer in layers.values())
