"""Parts of a matrix, ranks of their own, variants of LoRA, embeddings: what they compute and what their files hold."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_placement import CONFIGS
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DebertaConfig,
    DebertaForSequenceClassification,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from harness.config.schema import AlphaPolicy, Bias, Init, RankConfig, VariantConfig
from harness.methods.adapting import (
    apply_lora,
    lora_layers,
    merge,
    merge_and_remove,
    remove_lora,
    trained_biases,
    unmerge,
)
from harness.methods.counts import count_parameters, is_lora, set_trainable
from harness.methods.lora import LoRAError, LoRALayer, SlicedLoRALayer, put_rows, take_rows
from harness.methods.lora_method import is_adapter_in
from harness.methods.peft_files import load_adapter, save_adapter
from harness.models.configs import head_of
from harness.placement.architectures import ARCHITECTURES, PlacementError, Rows, head_modules
from harness.placement.ranks import pattern_problems, ranks_of
from harness.placement.select import Target, select_targets

RANK = RankConfig(4, alpha=8)
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
WIDTH, HEADS, VOCABULARY = 32, 4, 50


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(n_embd=WIDTH, n_layer=2, n_head=HEADS, vocab_size=VOCABULARY, n_positions=32)
    return _built(lambda: AutoModelForCausalLM.from_config(config))


def _gpt_neox() -> PreTrainedModel:
    config = GPTNeoXConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
    )
    return _built(lambda: AutoModelForCausalLM.from_config(config))


def _deberta() -> PreTrainedModel:
    config = DebertaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        num_labels=3,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    return _built(lambda: DebertaForSequenceClassification(config))


def _described(model_type: str) -> PreTrainedModel:
    """The small model of tests/test_placement.py: grouped keys and values on Phi-3 and Falcon."""
    config = CONFIGS[model_type]()
    config.pad_token_id, config.num_labels = 0, 3
    is_encoder = ARCHITECTURES[model_type].unembedding is None
    auto = AutoModelForSequenceClassification if is_encoder else AutoModelForCausalLM
    return _built(lambda: auto.from_config(config))


FUSED = {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "deberta": _deberta,
    **{name: partial(_described, name) for name in ("modernbert", "phi3", "bloom", "falcon")},
}


def _built(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)  # so that attention is not the same everywhere
    return model


def _targets(model: PreTrainedModel, *projections: str, blocks: object = "all") -> list[Target]:
    return select_targets(
        [name for name, _ in model.named_modules()],
        model_type=model.config.model_type,
        config=model.config,
        projections=projections,
        blocks=blocks,
        language_model=model.get_output_embeddings() is not None,
    )


def _adapt(model: PreTrainedModel, *projections: str, rank: Any = RANK, **more: Any) -> list[Target]:
    targets = _targets(model, *projections)
    apply_lora(model, targets, rank=rank, generator=torch.Generator().manual_seed(1), **more)
    return targets


def _randomise(model: nn.Module) -> None:
    """Makes every update something."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            for update in layer.updates().values():
                update.lora_A.add_(0.3 * torch.empty(update.lora_A.shape).normal_(generator=generator))
                update.lora_B.add_(0.3 * torch.empty(update.lora_B.shape).normal_(generator=generator))
                if update.lora_magnitude is not None:
                    update.lora_magnitude.mul_(1.1)
        for bias in trained_biases(model).values():
            bias.add_(0.3 * torch.empty(bias.shape).normal_(generator=generator))


def _tokens() -> Tensor:
    return torch.randint(1, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(_tokens()).logits


def _loss(model: PreTrainedModel) -> Tensor:
    labels = _tokens() if model.get_output_embeddings() is not None else torch.tensor([0, 1, 2])
    return model(input_ids=_tokens(), labels=labels).loss


# ---------------------------------------------------------------- parts of a matrix


class Split(nn.Module):
    """A projection in three: query, key and value each with a matrix of its own, and their outputs put together."""

    def __init__(self, fused: nn.Module, rows: dict[str, Rows]) -> None:
        super().__init__()
        weight, bias = fused.weight.detach(), fused.bias
        if isinstance(fused, Conv1D):
            weight = weight.T
        self.rows = rows
        for role, own in rows.items():
            part = nn.Linear(weight.shape[1], own.count(weight.shape[0]), bias=bias is not None)
            part.weight = nn.Parameter(take_rows(weight, own).clone())
            if bias is not None:
                part.bias = nn.Parameter(take_rows(bias.detach(), own).clone())
            setattr(self, role, part)
        self.out_features = weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_zeros(self.out_features, x[..., 0].numel())
        for role, own in self.rows.items():
            y = put_rows(y, own, getattr(self, role)(x).flatten(0, -2).T)
        return y.T.reshape(*x.shape[:-1], self.out_features)


def _split(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    for target in _targets(model, "qkv"):
        module = model.get_submodule(target.module)
        parts = ARCHITECTURES[model.config.model_type].parts
        parent, _, name = target.module.rpartition(".")
        setattr(
            model.get_submodule(parent), name, Split(module, {role: parts[role].rows(model.config) for role in "qkv"})
        )
    return model


@pytest.mark.parametrize("model_type", FUSED)
def test_a_split_model_is_the_fused_one(model_type: str) -> None:
    """So that a role is its rows: were a row another role's, attention would compute with the wrong one."""
    model = FUSED[model_type]()
    assert_close(_logits(_split(model)), _logits(model), **TOLERANCE)
    mixed = _split(model)
    split = next(module for module in mixed.modules() if isinstance(module, Split))
    split.k, split.v = split.v, split.k
    assert (_logits(mixed) - _logits(model)).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", FUSED)
def test_q_and_v_of_a_fused_matrix_train_as_matrices_of_their_own(model_type: str) -> None:
    fused = FUSED[model_type]()
    split = _split(fused)
    base_weights = {name: value.clone() for name, value in fused.state_dict().items()}
    targets = _adapt(fused, "q", "v")
    apply_lora(
        split,
        [f"{target.module}.{target.role}" for target in targets],
        rank=RANK,
        generator=torch.Generator().manual_seed(1),
    )
    losses = {}
    for name, model in (("fused", fused), ("split", split)):
        set_trainable(model, ())
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
        losses[name] = []
        for _ in range(20):
            loss = _loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert_close(torch.tensor(losses["fused"]), torch.tensor(losses["split"]), **TOLERANCE)
    assert losses["fused"][-1] < losses["fused"][0] - 0.01

    others = dict(lora_layers(split))
    for name, layer in lora_layers(fused):
        assert isinstance(layer, SlicedLoRALayer) and list(layer.updates()) == ["q", "v"]
        delta = layer.delta_weight() if isinstance(layer.base, nn.Linear) else layer.delta_weight().T
        key_rows = ARCHITECTURES[model_type].parts["k"].rows(fused.config)
        assert take_rows(delta, key_rows).numel() and not take_rows(delta, key_rows).any()
        for role, update in layer.updates().items():
            assert_close(take_rows(delta, update.rows), others[f"{name}.{role}"].delta_weight(), atol=1e-4, rtol=1e-3)
    remove_lora(fused)
    assert all(torch.equal(value, base_weights[name]) for name, value in fused.state_dict().items())


@pytest.mark.parametrize("model_type", FUSED)
def test_parts_count_as_separate_matrices(model_type: str) -> None:
    model, split = FUSED[model_type](), _split(FUSED[model_type]())
    targets = _adapt(model, "q", "v")
    apply_lora(split, [f"{target.module}.{target.role}" for target in targets], rank=RANK)
    for one in (model, split):
        set_trainable(one, ())
    num_params = count_parameters(model, ()).num_adapter_params
    assert num_params == count_parameters(split, ()).num_adapter_params
    if model_type in ("gpt2", "gpt_neox", "deberta"):
        assert num_params == 2 * 2 * 4 * (WIDTH + WIDTH)


def test_a_part_allows_the_rank_of_its_rows() -> None:
    layer = nn.Linear(64, 96)
    with pytest.raises(LoRAError, match=r"m\[k\]: rank=33: a 64 -> 32 projection allows 1 to 32\."):
        apply_lora(nn.ModuleDict({"m": layer}), [Target("m", "k", 0, Rows(32, 64, 96))], rank=RankConfig(33, alpha=8))
    with pytest.raises(LoRAError, match=r"m\[k\]: rows 0:8 of each 40 do not divide a matrix of 96 rows"):
        apply_lora(nn.ModuleDict({"m": layer}), [Target("m", "k", 0, Rows(0, 8, 40))], rank=RANK)


def test_rows_by_hand() -> None:
    values = torch.arange(12)
    rows = Rows(1, 3, 4)
    assert rows.count(12) == 6 and str(rows) == "1:3 of each 4"
    assert take_rows(values, rows).tolist() == [1, 2, 5, 6, 9, 10]
    assert put_rows(values, rows, -torch.arange(6)).tolist() == [0, 0, -1, 3, 4, -2, -3, 7, 8, -4, -5, 11]
    assert take_rows(values, None) is values


# ---------------------------------------------------------------- a rank for some


def _bert_targets(num_blocks: int) -> list[Target]:
    return [Target(f"{block}.{role}", role, block) for block in range(num_blocks) for role in ("q", "v", "up")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ({}, [8] * 6),
        ({"v": 2}, [8, 2, 8] * 2),
        ({"attention": 2}, [2, 2, 8] * 2),
        ({"attention": 2, "v": 3}, [2, 3, 8] * 2),
        ({"v": 3, "attention": 2}, [2, 3, 8] * 2),
        ({"all@1": 2}, [8, 8, 8, 2, 2, 2]),
        ({"all@last_half": 2, "v@1": 4}, [8, 8, 8, 2, 4, 2]),
        ({"all": 1, "all@first_1": 2, "q@0": 3}, [3, 2, 2, 1, 1, 1]),
        ({"v": 4, "all@0": 4}, [4, 4, 4, 8, 4, 8]),  # they overlap and agree
    ],
)
def test_the_narrower_key_decides_a_rank(pattern: dict[str, int], expected: list[int]) -> None:
    assert ranks_of(_bert_targets(2), rank=8, pattern=pattern, num_blocks={"": 2}) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"k": 2}, r"rank\.pattern: k names nothing that gets an adapter here; there are q, v, up\."),
        ({"v@5": 2}, r"^rank\.pattern: 'v@5', blocks=\[5\]: \[5\] do not exist; this model has blocks 0 to 1\.$"),
        ({"v": 4, "all@0": 2}, r"v: 4, all@0: 2 give 0\.v different ranks, and none of them is a part of the other"),
        ({"query": 2}, r"rank\.pattern: 'query' begins with no role; allowed: q, k, v, "),
        ({"v@middle": 2}, r"rank\.pattern: 'v@middle', blocks='middle': allowed: all, first_half"),
    ],
)
def test_a_pattern_that_names_nothing_or_two_things_is_an_error(pattern: dict[str, int], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        ranks_of(_bert_targets(2), rank=8, pattern=pattern, num_blocks={"": 2})


@pytest.mark.parametrize("pattern", [{}, ["v", 4], "v:4", 8])
def test_a_pattern_is_ranks_by_role(pattern: object) -> None:
    (problem,) = pattern_problems(pattern)
    assert problem.startswith(f"rank.pattern={pattern!r}: ranks by role, such as {{v: 16, mlp@last_half: 4}}, or null.")


def test_a_rank_of_a_pattern_is_at_least_1() -> None:
    assert pattern_problems({"v": 2.5}) == ["rank.pattern: v: 2.5: a rank is a whole number, at least 1."]
    assert pattern_problems({"v": 0, "mlp": 1}) == ["rank.pattern: v: 0: a rank is a whole number, at least 1."]


@pytest.mark.parametrize(
    "policy",
    [
        RankConfig(8, alpha=16),
        RankConfig(8, AlphaPolicy.rslora, alpha=16),
        RankConfig(8, AlphaPolicy.proportional, alpha_per_rank=2),
    ],
    ids=lambda policy: policy.alpha_policy,
)
def test_alpha_follows_each_rank(policy: RankConfig) -> None:
    model = _gpt2()
    targets = _targets(model, "o", "up")
    ranks = ranks_of(targets, rank=8, pattern={"o": 2}, num_blocks={"": 2})
    apply_lora(model, targets, rank=[policy.at(rank) for rank in ranks])
    expected = {2: replace(policy, rank=2).scaling, 8: policy.scaling}
    layers = [update for _, layer in lora_layers(model) for update in layer.updates().values()]
    assert [layer.rank for layer in layers] == [2, 8, 2, 8]
    assert all(layer.scaling == expected[layer.rank] for layer in layers)


# ---------------------------------------------------------------- files


def _save(model: PreTrainedModel, directory: Path, rank: RankConfig = RANK) -> None:
    save_adapter(model, directory, rank=rank, head_modules=(), task_type="CAUSAL_LM")


CASES: dict[str, tuple[tuple[str, ...], dict[str, int], VariantConfig]] = {
    "parts": (("q", "v"), {}, VariantConfig()),
    "parts of unequal rank": (("q", "v", "up"), {"q": 2, "up": 6}, VariantConfig()),
    "a pattern": (("o", "up", "down"), {"down": 2, "up@1": 7}, VariantConfig()),
    "unembedding": (("o", "lm_head"), {}, VariantConfig()),
    "embedding": (("o", "embedding"), {"embedding": 3}, VariantConfig()),
    "dora": (("o", "up"), {"up": 2}, VariantConfig(dora=True)),
    "dora of parts": (("v", "up"), {}, VariantConfig(dora=True)),
    "pissa": (("o", "up"), {}, VariantConfig(init=Init.pissa)),
    "pissa of parts": (("v", "k"), {"k": 2}, VariantConfig(init=Init.pissa)),
    "random_b": (("o",), {}, VariantConfig(init=Init.random_b)),
    "bias": (("qkv", "down"), {"down": 2}, VariantConfig(bias=Bias.adapted)),
    "all biases": (("q", "v"), {}, VariantConfig(bias=Bias.all)),
    "bias of dora": (("o",), {}, VariantConfig(bias=Bias.adapted, dora=True)),
}
POLICIES = {"fixed": RANK, "rslora": RankConfig(4, AlphaPolicy.rslora, alpha=8)}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:fan_in_fan_out is set to True")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_any_kind_loads_in_peft_and_here(case: str, model_type: str, policy: str, tmp_path: Path) -> None:
    projections, pattern, variant = CASES[case]
    model, rank = FUSED[model_type](), POLICIES[policy]
    targets = _targets(model, *projections)
    ranks = ranks_of(targets, rank=rank.rank, pattern=pattern, num_blocks={"": 2})
    apply_lora(
        model,
        targets,
        rank=[rank.at(each) for each in ranks],
        variant=variant,
        generator=torch.Generator().manual_seed(1),
    )
    _randomise(model)
    expected = _logits(model)
    assert (expected - _logits(FUSED[model_type]())).abs().max() > 1e-2
    _save(model, tmp_path, rank)
    theirs = peft.PeftModel.from_pretrained(FUSED[model_type](), str(tmp_path)).eval()
    assert_close(_logits(theirs), expected, **TOLERANCE)

    again = FUSED[model_type]()
    base = {name: (value, value.clone()) for name, value in again.named_parameters()}
    load_adapter(again, tmp_path)
    assert_close(_logits(again), expected, **TOLERANCE)
    assert trained_biases(again).keys() == trained_biases(model).keys()
    kinds = {name: (type(layer), list(layer.updates())) for name, layer in lora_layers(model)}
    assert {name: (type(layer), list(layer.updates())) for name, layer in lora_layers(again)} == kinds
    merge(again)
    assert_close(_logits(again), expected, **TOLERANCE)
    unmerge(again)
    assert_close(_logits(again), expected, **TOLERANCE)
    remove_lora(again)
    assert torch.equal(_logits(again), _logits(FUSED[model_type]()))
    left = dict(again.named_parameters())
    assert left.keys() == base.keys() and not trained_biases(again)
    assert all(left[name] is own and torch.equal(own, value) for name, (own, value) in base.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["c_proj", "c_fc"], "rank_pattern": {"c_proj": 2, "h.1.mlp.c_fc": 3}},
        {"target_modules": ["c_proj", "c_fc"], "alpha_pattern": {"attn.c_proj": 32}, "use_rslora": True},
        {"target_modules": ["c_attn"], "use_dora": True},
        {"target_modules": ["wte", "c_attn"]},
        {"target_modules": ["c_attn"], "bias": "lora_only"},
        {"target_modules": ["c_attn"], "bias": "all"},
    ],
    ids=["rank_pattern", "alpha_pattern", "dora", "embedding", "bias", "all biases"],
)
def test_an_adapter_of_peft_of_any_kind_loads_here(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(_gpt2(), peft.LoraConfig(r=4, fan_in_fan_out=True, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path))
    model = _gpt2()
    load_adapter(model, tmp_path)
    assert_close(_logits(model), _logits(theirs.eval()), **TOLERANCE)


def test_parts_that_do_not_fit_their_file_are_refused(tmp_path: Path) -> None:
    model = _gpt2()
    _adapt(model, "q", "v")
    _save(model, tmp_path)
    path = tmp_path / "adapter_parts.json"
    parts = json.loads(path.read_text())
    parts["transformer.h.0.attn.c_attn"]["q"]["rank"] = 3
    path.write_text(json.dumps(parts))
    with pytest.raises(
        LoRAError, match=r"ranks of transformer\.h\.0\.attn\.c_attn's roles do not add up to its rank, 8"
    ):
        load_adapter(_gpt2(), tmp_path)
    path.write_text("{")
    with pytest.raises(LoRAError, match=r"adapter_parts\.json is not readable"):
        load_adapter(_gpt2(), tmp_path)


# ---------------------------------------------------------------- variants


@pytest.mark.parametrize("init", Init)
def test_a_model_starts_as_its_base_model_whatever_the_init(init: Init) -> None:
    model = _gpt2()
    expected = _logits(model)
    _adapt(model, "q", "up", "lm_head", variant=VariantConfig(init=init))
    assert_close(_logits(model), expected, **TOLERANCE)
    for name, layer in lora_layers(model):
        for update in layer.updates().values():
            a, b = update.lora_A.detach(), update.lora_B.detach()
            assert a.isfinite().all() and b.isfinite().all()
            assert bool(a.any()) is not (init is Init.random_b), name
            assert bool(b.any()) is (init in (Init.random_b, Init.pissa)), name
            if init is Init.orthogonal:
                assert_close(a @ a.T, torch.eye(len(a)), **TOLERANCE)
            if init is Init.gaussian:
                assert 0.15 < a.std().item() < 0.35  # 1 / rank


def test_pissa_begins_with_the_leading_part_of_the_weight() -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 10)
    model = nn.ModuleDict({"m": base})
    apply_lora(model, ["m"], rank=RankConfig(3, alpha=6), variant=VariantConfig(init=Init.pissa))
    layer = model["m"]
    assert isinstance(layer, LoRALayer)
    u, singular, v = torch.linalg.svd(base.weight.detach(), full_matrices=False)
    leading = (u[:, :3] * singular[:3]) @ v[:3]
    assert_close(layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach(), leading, **TOLERANCE)
    assert_close(layer.delta_weight(), torch.zeros(10, 12))
    with torch.no_grad():
        layer.lora_A.zero_()
    assert_close(layer.delta_weight(), -leading, **TOLERANCE)


def test_dora_trains_the_length_of_each_row_and_its_direction_apart() -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 10)
    model = nn.ModuleDict({"m": base})
    x = torch.randn(5, 12)
    expected = base(x).detach()
    apply_lora(model, ["m"], rank=RankConfig(3, alpha=6), variant=VariantConfig(dora=True))
    layer = model["m"]
    assert isinstance(layer, LoRALayer) and layer.lora_magnitude is not None
    assert_close(layer.lora_magnitude.detach(), base.weight.detach().norm(dim=1))
    assert_close(layer(x).detach(), expected, **TOLERANCE)
    _randomise(model)
    adapted = base.weight.detach() + layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
    by_hand = layer.lora_magnitude.detach()[:, None] * adapted / adapted.norm(dim=1, keepdim=True)
    assert_close(layer(x).detach(), x @ by_hand.T + base.bias.detach(), **TOLERANCE)
    assert_close(base.weight.detach() + layer.delta_weight(), by_hand, **TOLERANCE)
    set_trainable(model, ())
    assert count_parameters(model, ()).num_adapter_params == 3 * (12 + 10) + 10


def test_a_row_of_zeros_stays_one_under_dora_and_a_merged_layer_knows_its_delta() -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 10)
    with torch.no_grad():
        base.weight[3] = 0
    model = nn.ModuleDict({"m": base})
    apply_lora(model, ["m"], rank=RankConfig(3, alpha=6), variant=VariantConfig(dora=True))
    layer, x = model["m"], torch.randn(5, 12)
    assert isinstance(layer, LoRALayer)
    assert_close(layer(x).detach(), base(x).detach(), **TOLERANCE)
    layer(x).sum().backward()
    assert all(one.grad.isfinite().all() for one in (layer.lora_A, layer.lora_B, layer.lora_magnitude))
    _randomise(model)
    delta = layer.delta_weight()
    layer.merge()
    assert_close(layer.delta_weight(), delta)


def test_gradients_of_dora_are_those_of_peft() -> None:
    ours, theirs = _gpt2(), None
    _adapt(ours, "o", variant=VariantConfig(dora=True))
    _randomise(ours)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["attn.c_proj"], use_dora=True, fan_in_fan_out=True)
    theirs = peft.get_peft_model(_gpt2(), config)
    others = {name: module for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    for name, layer in lora_layers(ours):
        assert isinstance(layer, LoRALayer) and layer.lora_magnitude is not None
        with torch.no_grad():
            others[name].lora_A["default"].weight.copy_(layer.lora_A)
            others[name].lora_B["default"].weight.copy_(layer.lora_B)
            others[name].lora_magnitude_vector["default"].weight.copy_(layer.lora_magnitude)
    set_trainable(ours, ())
    _loss(ours).backward()
    theirs(input_ids=_tokens(), labels=_tokens()).loss.backward()
    for name, layer in lora_layers(ours):
        assert isinstance(layer, LoRALayer) and layer.lora_magnitude is not None
        assert_close(layer.lora_A.grad, others[name].lora_A["default"].weight.grad, **TOLERANCE)
        assert_close(layer.lora_B.grad, others[name].lora_B["default"].weight.grad, **TOLERANCE)
        magnitude = others[name].lora_magnitude_vector["default"].weight
        assert_close(layer.lora_magnitude.grad, magnitude.grad, **TOLERANCE)


# The roles, and how many entries of biases train, by hand: of the GPT-2 above in two blocks 96 and 32 of attention, 128
# and 32 of the MLP, two norms; then a last norm. Of the BERT of tests/test_placement.py in three blocks 4 of attention,
# 48 and 32 of the MLP, two norms; then the embeddings' norm and the pooler.
BIASES = {
    ("gpt2", Bias.adapted): (("qkv", "up"), 2 * (96 + 128)),
    ("gpt2", Bias.all): (("q", "v"), 2 * (96 + 32 + 128 + 32 + 2 * 32) + 32),
    ("bert", Bias.adapted): (("q", "v"), 3 * 2 * 32),
    ("bert", Bias.all): (("q", "v"), 3 * (4 * 32 + 48 + 32 + 2 * 32) + 32 + 32),
}


@pytest.mark.parametrize(("model_type", "bias"), BIASES)
def test_biases_beside_lora_train_as_in_peft_and_nothing_else_does(model_type: str, bias: Bias) -> None:
    roles, num_biases = BIASES[model_type, bias]
    build = FUSED.get(model_type, partial(_described, model_type))
    ours, base = build(), dict(build().named_parameters())
    head = head_of(ours, language_model=model_type == "gpt2")
    targets = _adapt(ours, *roles, variant=VariantConfig(bias=bias), head=head)
    is_adapter = is_adapter_in(ours)
    set_trainable(ours, head, is_adapter=is_adapter)
    layers = dict(lora_layers(ours))
    counts = count_parameters(ours, head, is_adapter=is_adapter)
    factors = sum(
        4 * (one.in_features + one.out_features) for each in layers.values() for one in each.updates().values()
    )
    assert counts.num_adapter_params == factors + num_biases
    assert counts.num_trainable_params == counts.num_adapter_params + counts.num_head_params
    assert counts.num_total_params == sum(value.numel() for value in base.values()) + factors

    if not any(target.rows for target in targets):
        config = peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=[*layers],
            bias="lora_only" if bias is Bias.adapted else "all",
            fan_in_fan_out=model_type == "gpt2",
            task_type="CAUSAL_LM" if model_type == "gpt2" else "SEQ_CLS",
        )
        theirs = peft.get_peft_model(build(), config)
        for name, module in theirs.base_model.model.named_modules():
            if name in layers:
                module.lora_A["default"].weight.data = layers[name].lora_A.detach().clone()
        losses = [_steps(model, 10) for model in (ours, theirs)]
        assert_close(losses[0], losses[1], **TOLERANCE)
    else:
        losses = [_steps(ours, 10)]
    assert losses[0][-1] < losses[0][0] - 0.01
    own = {name.replace(".base.", "."): value for name, value in ours.named_parameters()}
    changed = {name for name, value in base.items() if not torch.equal(own[name], value)}
    in_head = {name for name in base if name.startswith(tuple(f"{module}." for module in head))}
    adapted = {f"{name}.bias" for name in layers}
    expected = {name for name in base if name.endswith(".bias") and (bias is Bias.all or name in adapted)}
    still = {name for name in expected if ".key." in name}  # softmax cancels what all keys have in common
    assert expected - still <= changed <= expected | in_head


def _steps(model: nn.Module, num_steps: int) -> Tensor:
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    losses = []
    for _ in range(num_steps):
        loss = _loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(
    ("model_type", "roles", "bias", "message"),
    [
        ("llama", ("q",), Bias.adapted, r"variant\.bias=adapted: the adapted modules have no bias, so nothing more"),
        ("llama", ("q",), Bias.all, r"variant\.bias=all: the base model has no biases, so nothing more would train"),
        ("gpt2", ("embedding",), Bias.adapted, r"variant\.bias=adapted: the adapted modules have no bias"),
        ("gpt2", ("q",), Bias.adapted, r"c_attn\[q\] is some of the rows of a module, whose bias is that of all its"),
    ],
)
def test_biases_that_are_not_there_are_refused(
    model_type: str, roles: tuple[str, ...], bias: Bias, message: str
) -> None:
    model = FUSED.get(model_type, partial(_described, model_type))()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(LoRAError, match=message):
        _adapt(model, *roles, variant=VariantConfig(bias=bias))
    assert [name for name, _ in model.named_parameters()] == names


def test_a_norm_in_half_precision_takes_a_bias_in_float32_and_gets_its_own_back() -> None:
    model = _described("bert").to(torch.bfloat16)
    before = {name: (value, value.clone()) for name, value in model.named_parameters()}
    _adapt(model, "q", variant=VariantConfig(bias=Bias.all), head=head_of(model, language_model=False))
    set_trainable(model, (), is_adapter=is_adapter_in(model))
    norm = model.bert.embeddings.LayerNorm
    assert norm.bias.dtype is norm.weight.dtype is torch.float32
    assert norm.bias.requires_grad and not norm.weight.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        _loss(model).backward()
    assert norm.bias.grad.any()
    remove_lora(model)
    for name, value in model.named_parameters():
        own, content = before[name]
        assert value is own and value.dtype is torch.bfloat16 and torch.equal(value, content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "all"}, r"has bias=all and holds no .*; the file is not complete, or belongs to another model"),
        ({"bias": "none"}, r"c_attn\.base_layer\.bias differs from the model's: the adapter belongs to another base"),
        ({"bias": "vera_only"}, r"bias='vera_only' is not supported, only 'none', 'lora_only', 'all'"),
    ],
)
def test_biases_of_a_file_that_do_not_fit_are_refused(change: dict[str, str], message: str, tmp_path: Path) -> None:
    model = _gpt2()
    _adapt(model, "qkv", variant=VariantConfig(bias=Bias.adapted))
    _randomise(model)
    _save(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    again = _gpt2()
    with pytest.raises(LoRAError, match=message):
        load_adapter(again, tmp_path)
    assert torch.equal(_logits(again), _logits(_gpt2()))


def test_a_weight_that_is_read_instead_of_its_module_is_the_adapted_one() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"m": nn.Linear(12, 10)})
    apply_lora(model, ["m"], rank=RANK)
    _randomise(model)
    x = torch.randn(5, 12)
    layer = model["m"]
    assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x), **TOLERANCE)
    nn.functional.linear(x, layer.weight).sum().backward()
    assert layer.lora_B.grad.abs().sum() > 0


# ---------------------------------------------------------------- embeddings


def test_an_adapted_embedding_by_hand_and_merged_for_good() -> None:
    model = _gpt2()
    targets = _adapt(model, "embedding")
    assert [str(target) for target in targets] == ["transformer.wte"]
    _randomise(model)
    expected = _logits(model)
    layer = model.get_submodule("transformer.wte")
    ids = _tokens()
    table = layer.base.weight + layer.scaling * (layer.lora_B @ layer.lora_A).T
    assert_close(layer(ids), nn.functional.embedding(ids, table), **TOLERANCE)
    merge_and_remove(model)
    assert_close(_logits(model), expected, **TOLERANCE)
    # The unembedding, which was the same tensor, stays the base model's.
    assert torch.equal(model.get_output_embeddings().weight, _gpt2().get_output_embeddings().weight)


def test_gemmas_embedding_is_scaled_with_its_update() -> None:
    config = Gemma3TextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        pad_token_id=0,
    )
    model = _built(lambda: AutoModelForCausalLM.from_config(config))
    _adapt(model, "embedding")
    _randomise(model)
    expected = _logits(model)
    merge(model)
    assert_close(_logits(model), expected, **TOLERANCE)


@pytest.mark.parametrize("variant", [VariantConfig(dora=True), VariantConfig(init=Init.pissa)])
def test_a_variant_of_matrices_is_refused_on_an_embedding(variant: VariantConfig) -> None:
    with pytest.raises(LoRAError, match=r"transformer\.wte: variant\.\w+=\w+ adapts matrices, not an embedding"):
        _adapt(_gpt2(), "embedding", variant=variant)


# ---------------------------------------------------------------- every architecture trains

TRAINED = {  # the placement of each architecture that reaches the most kinds of its modules
    **dict.fromkeys(ARCHITECTURES, ("all",)),
    **{name: (*one.parts, "o") for name, one in ARCHITECTURES.items() if one.parts},
    **{name: ("attention",) for name, one in ARCHITECTURES.items() if "up" in one.refused},
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_ten_steps_lower_the_loss_and_change_adapter_and_head_alone(model_type: str) -> None:
    is_language = ARCHITECTURES[model_type].head is None
    auto = AutoModelForCausalLM if is_language else AutoModelForSequenceClassification
    config = CONFIGS[model_type]()
    config.pad_token_id = 0
    model = _built(lambda: auto.from_config(config))
    head = () if is_language else head_modules(model_type)
    names = [name for name, _ in model.named_modules()]
    targets = select_targets(
        names, model_type=model_type, config=model.config, projections=TRAINED[model_type], language_model=is_language
    )
    apply_lora(model, targets, rank=RankConfig(2, alpha=4), generator=torch.Generator().manual_seed(1))
    set_trainable(model, head)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    by_hand = sum(
        2 * (update.in_features + update.out_features)
        for _, layer in lora_layers(model)
        for update in layer.updates().values()
    )
    assert count_parameters(model, head).num_adapter_params == by_hand
    assert sum(len(layer.updates()) for _, layer in lora_layers(model)) == len(targets)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0)
    tokens = _tokens()
    if model.config.is_encoder_decoder:  # it reads its answer at the end of the text
        tokens[tokens == model.config.eos_token_id] += 1
        tokens[:, -1] = model.config.eos_token_id
    labels = tokens if is_language else torch.tensor([0, 1, 1])
    losses = []
    for _ in range(11):
        loss = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    factors = {f"{name}.lora_B" for name, layer in lora_layers(model) if not isinstance(layer, SlicedLoRALayer)}
    assert factors <= changed
    assert all(is_lora(name) or name.startswith(tuple(f"{module}." for module in head)) for name in changed)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"variant": VariantConfig(init=Init.orthogonal)},
            "variant.init=orthogonal: the A and B of an embedding begin",
        ),
        ({"dropout": 0.1}, "method.adapter_dropout=0.1: the input of an embedding is a token, which is not dropped"),
    ],
)
def test_what_decides_nothing_of_an_embedding_is_refused_where_nothing_else_is_adapted(
    given: dict[str, Any], message: str
) -> None:
    rank = RankConfig(2, alpha=2)
    model = nn.ModuleDict({"table": nn.Embedding(8, 4), "matrix": nn.Linear(4, 4)})
    with pytest.raises(LoRAError, match=re.escape(message)):
        apply_lora(model, ["table"], rank=rank, **given)
    apply_lora(model, ["table", "matrix"], rank=rank, **given)
