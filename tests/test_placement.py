"""Roles find their modules in transformers' real models, names are compared whole, and nothing is selected silently."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    SmolLM3Config,
    T5Config,
)
from transformers.pytorch_utils import Conv1D

from harness.config.schema import RankConfig
from harness.methods.adapting import apply_lora
from harness.methods.counts import count_parameters, set_trainable
from harness.placement.architectures import ARCHITECTURES, GROUPS, ROLES, UNEMBEDDING, PlacementError, head_modules
from harness.placement.ranks import ranks_of
from harness.placement.select import (
    block_problems,
    count_blocks,
    projection_problems,
    resolve_blocks,
    select_targets,
    stack_problems,
)

NUM_BLOCKS = 3
BERT_LIKE = {"hidden_size": 32, "num_hidden_layers": NUM_BLOCKS, "num_attention_heads": 2, "intermediate_size": 48}
# As in the published checkpoints; without it DeBERTa has neither relative positions nor their projections.
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "vocab_size": 50}
LLAMA_LIKE = {**BERT_LIKE, "num_key_value_heads": 1, "vocab_size": 50}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(**BERT_LIKE, vocab_size=50),
    "roberta": lambda: RobertaConfig(**BERT_LIKE, vocab_size=50),
    "deberta": lambda: DebertaConfig(**BERT_LIKE, **DEBERTA),
    "deberta-v2": lambda: DebertaV2Config(**BERT_LIKE, **DEBERTA, share_att_key=True),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=NUM_BLOCKS, n_head=2, vocab_size=50),
    "gpt_neox": lambda: GPTNeoXConfig(**BERT_LIKE, vocab_size=50),
    # Embeddings of another width, as in OPT 350M: their projections are linear and outside the blocks.
    "opt": lambda: OPTConfig(
        hidden_size=32,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=2,
        ffn_dim=48,
        word_embed_proj_dim=16,
        vocab_size=50,
    ),
    "llama": lambda: LlamaConfig(**LLAMA_LIKE),
    "mistral": lambda: MistralConfig(**LLAMA_LIKE),
    "qwen2": lambda: Qwen2Config(**LLAMA_LIKE),
    "qwen3": lambda: Qwen3Config(**LLAMA_LIKE, head_dim=16),
    "gemma": lambda: GemmaConfig(**LLAMA_LIKE, head_dim=16),
    "gemma2": lambda: Gemma2Config(**LLAMA_LIKE, head_dim=16),
    "gemma3_text": lambda: Gemma3TextConfig(**LLAMA_LIKE, head_dim=16),
    "smollm3": lambda: SmolLM3Config(**LLAMA_LIKE, pad_token_id=0),
    # Embeddings of another width, whose projection is outside the blocks.
    "electra": lambda: ElectraConfig(**BERT_LIKE, vocab_size=50, embedding_size=16),
    "distilbert": lambda: DistilBertConfig(dim=32, n_layers=NUM_BLOCKS, n_heads=2, hidden_dim=48, vocab_size=50),
    "albert": lambda: AlbertConfig(**BERT_LIKE, vocab_size=50, embedding_size=16, num_hidden_groups=NUM_BLOCKS),
    "modernbert": lambda: ModernBertConfig(**BERT_LIKE, vocab_size=50, pad_token_id=0),
    "bloom": lambda: BloomConfig(hidden_size=32, n_layer=NUM_BLOCKS, n_head=2, vocab_size=50),
    "falcon": lambda: FalconConfig(
        hidden_size=32,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        vocab_size=50,
    ),
    "olmo2": lambda: Olmo2Config(**LLAMA_LIKE, pad_token_id=0),
    "phi3": lambda: Phi3Config(**LLAMA_LIKE, pad_token_id=0),
    "mixtral": lambda: MixtralConfig(**LLAMA_LIKE, num_local_experts=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **LLAMA_LIKE, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8
    ),
    "falcon_h1": lambda: FalconH1Config(
        **LLAMA_LIKE, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8
    ),
    "lfm2": lambda: Lfm2Config(
        **LLAMA_LIKE, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False
    ),
    "qwen3_5_text": lambda: Qwen3_5TextConfig(
        **LLAMA_LIKE,
        head_dim=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    ),
    "t5": lambda: _t5(feed_forward_proj="gated-gelu"),
}


def _t5(**more: Any) -> PreTrainedConfig:
    sizes: dict[str, Any] = {"d_model": 32, "num_layers": NUM_BLOCKS, "num_heads": 2, "d_kv": 8, "d_ff": 48}
    return T5Config(**{**sizes, "vocab_size": 50, "eos_token_id": 1, "decoder_start_token_id": 0, **more})


LANGUAGE_MODELS = [
    "gpt2",
    "gpt_neox",
    "opt",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "smollm3",
    "bloom",
    "falcon",
    "olmo2",
    "phi3",
    "mixtral",
    "qwen3_moe",
    "falcon_h1",
    "lfm2",
    "qwen3_5_text",
]
CLASSIFIERS = [name for name, architecture in ARCHITECTURES.items() if architecture.head is not None]

# In a block, linear, and yet no role: DeBERTa's projections of relative positions see no token.
WITHOUT_ROLE = {"deberta": {"attention.self.pos_proj", "attention.self.pos_q_proj"}}


@functools.cache
def _model(model_type: str) -> PreTrainedModel:
    """The classifier, or the language model where there is no classifier."""
    if model_type not in CLASSIFIERS:
        return _language_model(model_type)
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(CONFIGS[model_type]())


@functools.cache
def _language_model(model_type: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIGS[model_type]())


@functools.cache
def _names(model_type: str) -> tuple[str, ...]:
    return tuple(name for name, _ in _model(model_type).named_modules())


def _select(model_type: str, *projections: str, blocks: object = "all", modules: tuple[str, ...] = ()) -> list[str]:
    targets = select_targets(
        _names(model_type),
        model_type=model_type,
        config=_model(model_type).config,
        projections=projections,
        blocks=blocks,
        modules=modules,
        language_model=model_type not in CLASSIFIERS,
    )
    return [str(target) for target in targets]


def _select_lm(model_type: str, *projections: str, blocks: object = "all", modules: tuple[str, ...] = ()) -> list[str]:
    names = [name for name, _ in _language_model(model_type).named_modules()]
    return [
        str(target)
        for target in select_targets(
            names,
            model_type=model_type,
            config=_language_model(model_type).config,
            projections=projections,
            blocks=blocks,
            modules=modules,
            language_model=True,
        )
    ]


def _bert_names(num_blocks: int) -> list[str]:
    return [
        f"bert.encoder.layer.{block}.attention.self.{projection}"
        for block in range(num_blocks)
        for projection in ("query", "key", "value")
    ]


def _modules(names: Sequence[str], **request: Any) -> list[str]:
    return [target.module for target in select_targets(names, model_type="bert", **request)]


# ---------------------------------------------------------------- every architecture


def test_every_architecture_is_tested_against_its_model() -> None:
    assert list(CONFIGS) == list(ARCHITECTURES)
    assert all(_model(model_type).config.model_type == model_type for model_type in CONFIGS)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_role_is_one_projection_of_every_block(model_type: str) -> None:
    architecture = ARCHITECTURES[model_type]
    modules = dict(_model(model_type).named_modules())
    for role in architecture.projections:
        selected = _select(model_type, role)
        everywhere = [
            f"{stack.block.format(block)}.{path}"
            for block in range(NUM_BLOCKS)
            for stack in architecture.stacks.values()
            for path in stack.projections.get(role, "").split("|")
            if path
        ]
        assert sorted(selected) == sorted(
            name for name in everywhere if not architecture.differs_by_block or name in modules
        )
        assert selected
        assert all(isinstance(modules[name], nn.Linear | Conv1D) for name in selected)
    assert set(architecture.projections) <= set(ROLES)
    assert len(set(architecture.projections.values())) == len(architecture.projections)


# Models of experts, whose stacks take no adapter, have no `all` and no `mlp`.
WITH_ALL = [name for name, architecture in ARCHITECTURES.items() if not set(architecture.refused) & set(ROLES)]


@pytest.mark.parametrize("model_type", WITH_ALL)
def test_all_is_every_linear_module_of_the_blocks(model_type: str) -> None:
    architecture = ARCHITECTURES[model_type]
    prefix = architecture.block.partition("{}")[0]
    prefixes = tuple(stack.block.partition("{}")[0] for stack in architecture.stacks.values())
    linear = [name for name, module in _model(model_type).named_modules() if isinstance(module, nn.Linear | Conv1D)]
    in_blocks = [name for name in linear if name.startswith(prefixes)]
    without_role = {
        f"{prefix}{block}.{path}" for block in range(NUM_BLOCKS) for path in WITHOUT_ROLE.get(model_type, ())
    }
    assert without_role <= set(in_blocks)
    assert _select(model_type, "all") == [name for name in in_blocks if name not in without_role]


@pytest.mark.parametrize("model_type", WITH_ALL)
def test_the_groups_share_nothing_and_make_up_all(model_type: str) -> None:
    attention, mlp = _select(model_type, "attention"), _select(model_type, "mlp")
    has_recurrent = any(role.startswith("rec_") for role in ARCHITECTURES[model_type].projections)
    recurrent = _select(model_type, "recurrent") if has_recurrent else []
    assert attention and mlp and not set(attention) & set(mlp) and not set(recurrent) & {*attention, *mlp}
    assert sorted([*attention, *mlp, *recurrent]) == sorted(_select(model_type, "all"))
    assert all("attn" in name or "attention" in name.lower() for name in attention)
    assert not any("attn" in name or "attention" in name.lower() for name in mlp)
    if not has_recurrent:
        with pytest.raises(PlacementError, match=r"it has nothing of recurrent\."):
            _select(model_type, "recurrent")


@pytest.mark.parametrize("group", ["mlp", "all", "up"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_stacks_of_experts_are_refused_with_the_reason(model_type: str, group: str) -> None:
    with pytest.raises(PlacementError, match=rf"{group} cannot be adapted: its experts are stacks of matrices"):
        _select(model_type, group)
    assert len(_select(model_type, "attention")) == 4 * NUM_BLOCKS


def test_blocks_that_are_passed_several_times_are_adapted_all_or_not() -> None:
    assert len(_select("albert", "q", "v")) == 2 * NUM_BLOCKS
    with pytest.raises(PlacementError, match=r"blocks=last_half: a albert model passes its blocks several times"):
        _select("albert", "q", blocks="last_half")


def test_a_role_that_no_chosen_block_has_is_an_error() -> None:
    assert _select_lm("lfm2", "q", blocks=[1]) == ["model.layers.1.self_attn.q_proj"]
    assert len(_select_lm("lfm2", "all", blocks=[0])) == 5
    with pytest.raises(PlacementError, match=r"blocks of lfm2 models differ, and here no block of \[0, 2\] has q\."):
        _select_lm("lfm2", "q", "rec_in", blocks=[0, 2])


# ---------------------------------------------------------------- an encoder-decoder

_SELF, _CROSS = "layer.0.SelfAttention", "layer.1.EncDecAttention"


def _t5_modules(stacks: str, *paths: str, blocks: Sequence[int] = range(NUM_BLOCKS)) -> list[str]:
    return [f"transformer.{stacks}.block.{block}.{path}" for block in blocks for path in paths]


T5_PLACED: dict[str, tuple[list[str], dict[str, Any], list[str]]] = {
    "encoder": (
        ["q", "v"],
        {"stacks": ["encoder"]},
        _t5_modules("encoder", f"{_SELF}.q", f"{_SELF}.v"),
    ),
    "decoder": (
        ["mlp"],
        {"stacks": ["decoder"], "blocks": "last_1"},
        _t5_modules("decoder", *(f"layer.2.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")), blocks=[2]),
    ),
    "cross": (
        ["all"],
        {"stacks": ["cross"]},
        _t5_modules("decoder", *(f"{_CROSS}.{role}" for role in "qkvo")),
    ),
    "decoder and cross": (
        ["o"],
        {"stacks": ["cross", "decoder"], "blocks": [0]},
        _t5_modules("decoder", f"{_SELF}.o", f"{_CROSS}.o", blocks=[0]),
    ),
    "every stack": (
        ["q", "down"],
        {"blocks": "first_half"},
        [
            *_t5_modules("encoder", f"{_SELF}.q", "layer.1.DenseReluDense.wo", blocks=[0]),
            *_t5_modules("decoder", f"{_SELF}.q", f"{_CROSS}.q", "layer.2.DenseReluDense.wo", blocks=[0]),
        ],
    ),
}
# Of rank 4, by hand: attention is 32 -> 16 and back, the MLP 32 -> 48 and back.
T5_COUNTS = {
    "encoder": 3 * 2 * 4 * (32 + 16),
    "decoder": 3 * 4 * (32 + 48),
    "cross": 3 * 4 * 4 * (32 + 16),
    "decoder and cross": 2 * 4 * (32 + 16),
    "every stack": 3 * 4 * (32 + 16) + 2 * 4 * (48 + 32),
}


@pytest.mark.parametrize("case", T5_PLACED)
def test_stacks_of_an_encoder_decoder_by_hand(case: str) -> None:
    roles, choice, expected = T5_PLACED[case]
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(CONFIGS["t5"]())
    names = [name for name, _ in model.named_modules()]
    targets = select_targets(names, model_type="t5", projections=roles, **choice)
    assert [target.module for target in targets] == expected
    apply_lora(model, targets, rank=RankConfig(4, alpha=8))
    assert count_parameters(model, ()).num_adapter_params == T5_COUNTS[case]
    for target in targets:
        assert target.stack == ("cross" if "EncDec" in target.module else target.module.split(".")[1])


def test_t5_without_a_gate_has_one_matrix_up() -> None:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(_t5(num_decoder_layers=2))
    names = [name for name, _ in model.named_modules()]
    mlp = [target.module for target in select_targets(names, model_type="t5", projections=["mlp"])]
    assert mlp == [
        *_t5_modules("encoder", "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"),
        *_t5_modules("decoder", "layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo", blocks=[0, 1]),
    ]
    with pytest.raises(PlacementError, match=r"blocks of t5 models differ, and here no block of all has gate\."):
        select_targets(names, model_type="t5", projections=["gate"])
    # The decoder is shorter; each stack counts its own blocks.
    last = select_targets(names, model_type="t5", projections=["up"], blocks="last_1")
    assert [(target.stack, target.block) for target in last] == [("encoder", 2), ("decoder", 1)]
    with pytest.raises(PlacementError, match=r"\[2\] do not exist; this model's decoder has blocks 0 to 1\."):
        select_targets(names, model_type="t5", projections=["up"], blocks=[2])
    counts = count_blocks(names, model_type="t5")
    assert counts == {"encoder": 3, "decoder": 2, "cross": 2}
    targets = select_targets(names, model_type="t5", projections=["up"])
    assert ranks_of(targets, rank=8, pattern={"up@last_1": 2}, num_blocks=counts) == [8, 8, 2, 8, 2]


@pytest.mark.parametrize(
    ("model_type", "roles", "stacks", "message"),
    [
        ("t5", ["mlp"], ["cross"], r"on t5: it has nothing of mlp\. It has: q, k, v, o \(and the groups"),
        ("t5", ["embedding"], "all", r"embedding cannot be adapted: encoder and decoder look tokens up in modules of"),
        ("t5", ["q"], ["middle"], r"target_layers\.stacks=\['middle'\]: allowed: all, or a list of some of encoder, "),
        ("bert", ["q"], ["encoder"], r"stacks=\['encoder'\]: a bert model is no encoder-decoder and has one stack"),
        ("bert", ["q"], ["encoder", "decoder", "cross"], r"a bert model is no encoder-decoder and has one stack"),
    ],
)
def test_a_stack_that_is_not_there_is_an_error(model_type: str, roles: list[str], stacks: Any, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        select_targets(_names(model_type), model_type=model_type, projections=roles, stacks=stacks)


@pytest.mark.parametrize("stacks", ["encoder", [], ["encoder", "encoder"], None, 1, {"encoder": 1}])
def test_what_is_no_choice_of_stacks_is_an_error_that_lists_the_choices(stacks: object) -> None:
    assert stack_problems(stacks) == [
        f"target_layers.stacks={stacks!r}: allowed: all, or a list of some of encoder, decoder, cross."
    ]


# Rows of each part by hand, of the models above.
PARTS = {
    "gpt2": {"q": (0, 32, 96), "k": (32, 64, 96), "v": (64, 96, 96)},
    "gpt_neox": {"q": (0, 16, 48), "k": (16, 32, 48), "v": (32, 48, 48)},
    "deberta": {"q": (0, 16, 48), "k": (16, 32, 48), "v": (32, 48, 48)},
    "modernbert": {
        "q": (0, 32, 96),
        "k": (32, 64, 96),
        "v": (64, 96, 96),
        "gate": (0, 48, 96),
        "up": (48, 96, 96),
    },
    "bloom": {"q": (0, 16, 48), "k": (16, 32, 48), "v": (32, 48, 48)},
    "falcon": {"q": (0, 16, 32), "k": (16, 24, 32), "v": (24, 32, 32)},
    "phi3": {"q": (0, 32, 64), "k": (32, 48, 64), "v": (48, 64, 64), "gate": (0, 48, 96), "up": (48, 96, 96)},
}


def test_parts_are_these_rows() -> None:
    found = {
        model_type: {
            role: tuple(vars(part.rows(_model(model_type).config)).values())
            for role, part in architecture.parts.items()
        }
        for model_type, architecture in ARCHITECTURES.items()
        if architecture.parts
    }
    assert found == PARTS


@pytest.mark.parametrize("model_type", PARTS)
def test_parts_of_a_matrix_are_all_its_rows_once(model_type: str) -> None:
    architecture = ARCHITECTURES[model_type]
    for whole in {part.whole for part in architecture.parts.values()}:
        module = _model(model_type).get_submodule(_select(model_type, whole)[0])
        num_rows = module.nf if isinstance(module, Conv1D) else module.out_features
        parts = [part.rows(_model(model_type).config) for part in architecture.parts.values() if part.whole == whole]
        assert sum(rows.count(num_rows) for rows in parts) == num_rows
        assert [rows.start for rows in parts] == [0, *[rows.stop for rows in parts[:-1]]]


# Names that mean "query" and so on whatever the model: read off by hand.
ROLE_BY_HAND = {
    "q": r"query|query_proj|q_proj|q_lin|(Self|EncDec)Attention\.q",
    "k": r"key|key_proj|k_proj|k_lin|(Self|EncDec)Attention\.k",
    "v": r"value|value_proj|v_proj|v_lin|(Self|EncDec)Attention\.v",
    "o": r"attention\.(output\.)?dense|self_attention\.dense|o_proj|self_attn\.out_proj|attn\.c_proj|out_lin|attn\.Wo"
    r"|(Self|EncDec)Attention\.o",
    "qkv": r"c_attn|in_proj|query_key_value|Wqkv|qkv_proj",
    "up": r"intermediate\.dense|up_proj|c_fc|dense_h_to_4h|fc1|lin1|ffn|w3|wi|wi_1",
    "down": r"\d\.output\.dense|down_proj|mlp\.c_proj|dense_4h_to_h|fc2|lin2|ffn_output|mlp\.Wo|w2|DenseReluDense\.wo",
    "gate": r"gate_proj|w1|wi_0",
    "gate_up": r"gate_up_proj|Wi",
    "rec_in": r"(mamba|conv)\.in_proj|in_proj_qkv",
    "rec_gate": r"in_proj_z",
    "rec_beta": r"in_proj_b",
    "rec_decay": r"in_proj_a",
    "rec_out": r"(mamba|conv|linear_attn)\.out_proj",
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_roles_mean_what_they_say(model_type: str) -> None:
    for role in ARCHITECTURES[model_type].projections:
        assert all(re.search(rf"(^|\.)({ROLE_BY_HAND[role]})$", name) for name in _select(model_type, role)), role


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_the_head_is_all_that_is_outside_the_base_model(model_type: str) -> None:
    model = _model(model_type)
    outside = {name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")}
    heads = head_modules(model_type)
    assert outside == {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{h}." for h in heads))}
    assert outside
    assert set(heads) <= set(_names(model_type))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_part_names_a_projection_that_exists(model_type: str) -> None:
    architecture = ARCHITECTURES[model_type]
    assert {part.whole for part in architecture.parts.values()} <= set(architecture.projections)
    assert not set(architecture.parts) & set(architecture.projections)
    # Query, key and value exist everywhere, by themselves or as a part.
    assert {"q", "k", "v"} <= set(architecture.parts) | set(architecture.projections)


# ---------------------------------------------------------------- causal language models


def test_every_architecture_with_an_unembedding_is_tested_as_a_language_model() -> None:
    assert [name for name, architecture in ARCHITECTURES.items() if architecture.unembedding] == LANGUAGE_MODELS
    assert all(_language_model(model_type).config.model_type == model_type for model_type in LANGUAGE_MODELS)


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_a_language_model_has_the_blocks_of_the_classifier(model_type: str) -> None:
    architecture = ARCHITECTURES[model_type]
    groups = ("attention",) if architecture.refused else ("attention", "mlp", "all")
    for role in (*architecture.projections, *groups):
        assert _select_lm(model_type, role, blocks=[0, 1, 2]) == _select(model_type, role, blocks=[0, 1, 2])


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_the_unembedding_is_the_module_that_computes_the_logits(model_type: str) -> None:
    model = _language_model(model_type)
    assert _select_lm(model_type, "lm_head") == [ARCHITECTURES[model_type].unembedding]
    unembedding = model.get_submodule(str(ARCHITECTURES[model_type].unembedding))
    assert unembedding is model.get_output_embeddings() and isinstance(unembedding, nn.Linear)
    assert unembedding.out_features == model.config.vocab_size


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_a_language_model_has_no_task_head(model_type: str) -> None:
    assert head_modules(model_type, language_model=True) == ()
    if model_type in CLASSIFIERS:
        assert head_modules(model_type) == head_modules(model_type, language_model=False) == ("score",)
    else:
        with pytest.raises(PlacementError, match="transformers has no classifier"):
            head_modules(model_type)
    outside = [
        name
        for name, module in _language_model(model_type).named_modules()
        if next(module.parameters(recurse=False), None) is not None
        and not name.startswith(f"{_language_model(model_type).base_model_prefix}.")
    ]
    assert outside == [ARCHITECTURES[model_type].unembedding]


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_the_unembedding_is_one_module_whatever_blocks_says_and_in_no_group(model_type: str) -> None:
    unembedding = ARCHITECTURES[model_type].unembedding
    for blocks in ("all", "last_2", [0, 1]):
        selected = _select_lm(model_type, "lm_head", "attention", blocks=blocks)
        assert selected == [*_select_lm(model_type, "attention", blocks=blocks), unembedding]
    groups = [group for group in ("attention", "mlp", "all") if group == "attention" or model_type in WITH_ALL]
    assert all(unembedding not in _select_lm(model_type, group) for group in groups)
    with pytest.raises(PlacementError, match=r"target_layers\.blocks=first_4: this model has 3 blocks\."):
        _select_lm(model_type, "lm_head", blocks="first_4")


def test_an_adapter_fits_the_unembedding() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    apply_lora(model, _select_lm("llama", "q", "lm_head", blocks=[1]), rank=RankConfig(4, alpha=8))
    assert count_parameters(model, ()).num_adapter_params == 4 * (32 + 32) + 4 * (32 + 50)
    assert type(model.get_output_embeddings()).__name__ == "LoRALayer"


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_a_classifier_has_no_unembedding(model_type: str) -> None:
    message = (
        "target_layers.projections: lm_head is the unembedding of a causal language model; a model with a task head "
        "has none. Leave it out."
    )
    assert projection_problems(["all", "lm_head"]) == [message]
    with pytest.raises(PlacementError, match=f"^{re.escape(message)}$"):
        _select(model_type, "all", "lm_head")
    with pytest.raises(PlacementError, match=r"^target_layers: this .* model has no module lm_head\.$|does not exist"):
        # A classifier that is taken for a language model has no such module either.
        select_targets(_names(model_type), model_type=model_type, projections=["lm_head"], language_model=True)


@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name not in LANGUAGE_MODELS])
def test_an_encoder_has_no_unembedding(model_type: str) -> None:
    with pytest.raises(
        PlacementError, match=r": lm_head does not exist\. It has: [a-z_, ]*down(, embedding)? \(and the groups"
    ):
        select_targets(_names(model_type), model_type=model_type, projections=["lm_head"], language_model=True)


def test_what_a_language_model_has_includes_its_unembedding() -> None:
    with pytest.raises(
        PlacementError,
        match=r"gate does not exist\. It has: q, k, v, qkv, o, up, down, embedding, lm_head \(and the groups",
    ):
        _select_lm("gpt_neox", "gate")
    assert projection_problems(["all", "lm_head"], language_model=True) == []
    assert projection_problems(["lm_head", "lm_head"], language_model=True) == [
        "target_layers.projections: lm_head named twice."
    ]
    assert projection_problems(["query"], language_model=True) == [
        "target_layers.projections: query unknown; known: q, k, v, o, qkv, up, down, gate, gate_up, rec_in, "
        "rec_gate, rec_beta, rec_decay, rec_out, embedding, lm_head, attention, mlp, recurrent, all."
    ]


def test_expressions_on_a_language_model_may_name_all_but_nothing() -> None:
    assert _select_lm("llama", modules=("lm_head",)) == ["lm_head"]
    with pytest.raises(PlacementError, match="'score' match no whole module name"):
        _select_lm("llama", modules=("score",))


# LoRA Without Regret, its table of matched parameters on Llama 3.1 8B, in billions as section 3.1 of the reference
# has them: with the unembedding they are what the article prints (0.49, 0.25, 0.70, 0.24), without it they are not.
@pytest.mark.parametrize(
    ("projections", "rank", "with_unembedding", "without"),
    [
        ("mlp", 256, 0.487, 0.453),
        ("attention", 256, 0.252, 0.218),
        ("all", 256, 0.705, 0.671),
        ("mlp", 128, 0.243, 0.226),
    ],
)
def test_counts_of_llama_3_1_8b_are_those_of_lora_without_regret(
    projections: str, rank: int, with_unembedding: float, without: float
) -> None:
    config = LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
        tie_word_embeddings=False,
    )

    def adapter_params(*roles: str) -> int:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        names = [name for name, _ in model.named_modules()]
        selected = select_targets(names, model_type="llama", projections=roles, language_model=True)
        apply_lora(model, selected, rank=RankConfig(rank, alpha=32))
        set_trainable(model, head_modules("llama", language_model=True))
        counts = count_parameters(model, head_modules("llama", language_model=True))
        assert counts.num_trainable_params == counts.num_adapter_params
        return counts.num_adapter_params

    blocks = adapter_params(projections)
    both = adapter_params(projections, UNEMBEDDING)
    assert both - blocks == rank * (4096 + 128256)
    assert (round(both / 1e9, 3), round(blocks / 1e9, 3)) == (with_unembedding, without)


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize(
    ("blocks", "num_blocks", "expected"),
    [
        ("all", 3, [0, 1, 2]),
        ("first_half", 6, [0, 1, 2]),
        ("last_half", 6, [3, 4, 5]),
        ("first_half", 5, [0, 1]),
        ("last_half", 5, [2, 3, 4]),
        ("first_1", 12, [0]),
        ("last_2", 12, [10, 11]),
        ("first_12", 12, list(range(12))),
        ("last_half", 1, [0]),
        ([11, 0, 5], 12, [0, 5, 11]),
        ((1,), 2, [1]),
    ],
)
def test_blocks_by_hand(blocks: object, num_blocks: int, expected: list[int]) -> None:
    assert resolve_blocks(blocks, num_blocks) == expected


@given(st.integers(2, 200))
def test_the_halves_are_disjoint_and_make_up_all(num_blocks: int) -> None:
    first, last = resolve_blocks("first_half", num_blocks), resolve_blocks("last_half", num_blocks)
    assert first + last == resolve_blocks("all", num_blocks) == list(range(num_blocks))
    assert len(last) - len(first) in (0, 1)


@given(st.integers(1, 100).flatmap(lambda num: st.tuples(st.just(num), st.integers(1, num))))
def test_first_and_last_n_have_n_blocks_at_their_end(sizes: tuple[int, int]) -> None:
    num_blocks, count = sizes
    everything = list(range(num_blocks))
    assert resolve_blocks(f"first_{count}", num_blocks) == everything[:count]
    assert resolve_blocks(f"last_{count}", num_blocks) == everything[-count:]


@given(st.sets(st.integers(0, 30), min_size=1), st.randoms())
def test_the_order_of_indices_means_nothing(blocks: set[int], random: object) -> None:
    shuffled = sorted(blocks, key=lambda _: random.random())
    assert resolve_blocks(shuffled, 31) == sorted(blocks)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([0, 3], r"target_layers\.blocks=\[0, 3\]: \[3\] do not exist; this model has blocks 0 to 2\."),
        ("first_4", r"target_layers\.blocks=first_4: this model has 3 blocks\."),
        ("last_12", r"target_layers\.blocks=last_12: this model has 3 blocks\."),
    ],
)
def test_blocks_that_the_model_lacks_are_an_error_that_says_how_many_there_are(blocks: object, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        _select("bert", "q", blocks=blocks)


def test_half_of_one_block_is_an_error_and_no_empty_placement() -> None:
    with pytest.raises(PlacementError, match=r"blocks=first_half: that is none of this model's 1 blocks\."):
        select_targets(_bert_names(1), model_type="bert", projections=["q"], blocks="first_half")


NOT_BLOCKS = [
    "",
    "ALL",
    "half",
    "first",
    "first_0",
    "first_-1",
    "first_01",
    "middle_2",
    "last_2 ",
    "0",
    [],
    [-1],
    [1, 1],
]
NOT_BLOCKS += [[True], [0.5], ["0"], 3, None, {"first": 2}]


@pytest.mark.parametrize("blocks", NOT_BLOCKS, ids=repr)
def test_what_is_no_choice_of_blocks_is_an_error_that_lists_the_choices(blocks: object) -> None:
    expected = (
        f"target_layers.blocks={blocks!r}: allowed: all, first_half, last_half, first_N, last_N (N from 1), or a list "
        "of indices such as [0,2,5]."
    )
    assert block_problems(blocks) == [expected]
    with pytest.raises(PlacementError, match=re.escape(expected)):
        resolve_blocks(blocks, 12)


# ---------------------------------------------------------------- whole names


def test_a_longer_name_is_not_taken_for_a_shorter_one() -> None:
    decoys = [
        "bert.encoder.layer.1.attention.self.query_extra",
        "bert.encoder.layer.1.attention.self.query.query",
        "bert.encoder.layer.1.attention.self.my.query",
        "bert.encoder.layer.1.crossattention.self.query",
        "other.bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1x.attention.self.query",
        "bert.encoder.layers.1.attention.self.query",
    ]
    names = [*decoys, *_bert_names(12), *decoys]
    assert _modules(names, projections=["q"], blocks=[1]) == ["bert.encoder.layer.1.attention.self.query"]
    everywhere = _modules(names, projections=["q"])
    assert everywhere == [f"bert.encoder.layer.{block}.attention.self.query" for block in range(12)]


def test_block_1_is_not_block_10() -> None:
    names = _bert_names(12)
    assert _modules(names, projections=["v"], blocks=[1, 10]) == [
        "bert.encoder.layer.1.attention.self.value",
        "bert.encoder.layer.10.attention.self.value",
    ]
    one = _modules(names, modules=[r"bert\.encoder\.layer\.1\..*query"])
    assert one == ["bert.encoder.layer.1.attention.self.query"]


def test_the_order_is_that_of_the_model() -> None:
    assert _select("llama", "v", "q", blocks=[2, 0]) == [
        f"model.layers.{block}.self_attn.{part}" for block in (0, 2) for part in ("q_proj", "v_proj")
    ]


@given(st.sets(st.sampled_from(["q", "k", "v", "o", "up", "down"]), min_size=1), st.sets(st.integers(0, 2), min_size=1))
def test_a_placement_is_projections_times_blocks(roles: set[str], blocks: set[int]) -> None:
    selected = _select("bert", *sorted(roles), blocks=sorted(blocks))
    one_by_one = [name for role in roles for block in blocks for name in _select("bert", role, blocks=[block])]
    assert len(selected) == len(roles) * len(blocks)
    assert sorted(selected) == sorted(one_by_one)


def test_expressions_match_whole_names_and_may_overlap() -> None:
    dense = _select("bert", modules=(r"bert\.encoder\..*\.output\.dense", r".*layer\.2\.output\.dense"))
    assert dense == [
        f"bert.encoder.layer.{block}.{path}"
        for block in range(3)
        for path in ("attention.output.dense", "output.dense")
    ]
    assert _select("bert", modules=(r"bert\.pooler\.dense",)) == ["bert.pooler.dense"]


# ---------------------------------------------------------------- what selects nothing is an error


@pytest.mark.parametrize(
    ("model_type", "projections", "message"),
    [
        (
            "bert",
            ["gate"],
            r"gate does not exist\. It has: q, k, v, o, up, down, embedding \(and the groups attention, mlp, ",
        ),
        ("bert", ["qkv"], r"qkv does not exist\. It has: q, k, v, o, up, down, embedding "),
        (
            "gpt2",
            ["q", "qkv"],
            r"q is a part of qkv, which is adapted whole\. It has: q, k, v, qkv, o, up, down, embedding ",
        ),
        ("gpt2", ["gate"], r"gate does not exist\. It has: q, k, v, qkv, o, up, down, embedding "),
        ("llama", ["q", "qkv", "v"], r"on llama: qkv does not exist\. It has: q, k, v, o, gate, up, down, embedding "),
    ],
)
def test_a_role_that_the_model_lacks_is_an_error_that_lists_what_it_has(
    model_type: str, projections: list[str], message: str
) -> None:
    prefix = re.escape(f"target_layers.projections={projections} on {model_type}: ")
    with pytest.raises(PlacementError, match=prefix) as caught:
        _select(model_type, *projections)
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("projections", "message"),
    [
        (
            ["q", "query", "x"],
            "target_layers.projections: query, x unknown; known: q, k, v, o, qkv, up, down, gate, gate_up, "
            "rec_in, rec_gate, rec_beta, rec_decay, rec_out, embedding, attention, mlp, recurrent, all.",
        ),
        (["q", "v", "q"], "target_layers.projections: q named twice."),
        (["attention", "q", "o"], "target_layers.projections: o, q named twice."),
        (["all", "mlp"], "target_layers.projections: down, gate, gate_up, up named twice."),
    ],
)
def test_unknown_and_repeated_roles_are_errors_on_every_model(projections: list[str], message: str) -> None:
    assert projection_problems(projections) == [message]
    with pytest.raises(PlacementError) as caught:
        _select("llama", *projections)
    assert str(caught.value) == message


@pytest.mark.parametrize("projections", [["q"], ["q", "v"], ["attention", "mlp"], ["all"], ["qkv", "mlp"], []])
def test_fine_projections_have_no_problems(projections: list[str]) -> None:
    assert projection_problems(projections) == []


def test_groups_consist_of_roles() -> None:
    assert all(set(roles) <= set(ROLES) for roles in GROUPS.values())
    assert set(GROUPS["all"]) == set(ROLES) == {*GROUPS["attention"], *GROUPS["mlp"], *GROUPS["recurrent"]}


def test_a_module_missing_from_one_block_is_an_error_and_no_smaller_adapter() -> None:
    names = _bert_names(4)
    names.remove("bert.encoder.layer.2.attention.self.query")
    with pytest.raises(PlacementError) as caught:
        select_targets(names, model_type="bert", projections=["q", "v"])
    message = "target_layers: this bert model has no module bert.encoder.layer.2.attention.self.query."
    assert str(caught.value) == message


def test_a_model_without_its_blocks_is_an_error() -> None:
    without_prefix = [name.removeprefix("bert.") for name in _bert_names(2)]  # a model without a task head
    message = (
        r"a bert model has blocks named bert\.encoder\.layer\.\{\}, and there is none here; names here are like "
        r"encoder\.layer\.0\.attention\.self\.query, encoder"
    )
    with pytest.raises(PlacementError, match=message):
        select_targets(without_prefix, model_type="bert", projections=["q"])


def test_no_request_at_all_is_an_error() -> None:
    with pytest.raises(PlacementError, match=r"target_layers: neither projections nor modules are given\."):
        _select("bert")


@pytest.mark.parametrize("modules", [(), (r".*query",)])
def test_an_unknown_architecture_is_an_error_that_says_what_to_add(modules: tuple[str, ...]) -> None:
    message = (
        r"model type 'xlnet' is not described in harness/placement/architectures\.py; "
        r"described are bert, .*, t5\. "
        r"Add an Architecture with its block path, projections and head\."
    )
    with pytest.raises(PlacementError, match=message):
        select_targets(["a"], model_type="xlnet", projections=["q"], modules=modules)
    with pytest.raises(PlacementError, match=message):
        head_modules("xlnet")


@pytest.mark.parametrize("expression", ["query", r"attention\.self\.query", r"bert\.encoder\.layer\.0", r".*\.quer"])
def test_an_expression_that_matches_no_whole_name_is_an_error(expression: str) -> None:
    names = [name for name in _names("bert") if name != "bert.encoder.layer.0"]
    with pytest.raises(PlacementError) as caught:
        # One of several is enough: it would be missing from the adapter without a word.
        select_targets(names, model_type="bert", modules=[r".*\.key", expression, r".*\.value"])
    assert str(caught.value).startswith(
        f"target_layers.modules: {expression!r} match no whole module name. Names here are like "
        "bert.embeddings.word_embeddings, "
    )


@pytest.mark.parametrize(
    ("model_type", "expression", "in_head"),
    [
        ("roberta", r".*\.dense", "classifier.dense"),
        ("bert", "classifier", "classifier"),
        ("deberta-v2", r".*dense", "pooler.dense"),
        ("llama", ".*", "score"),
    ],
)
def test_the_head_takes_no_adapter(model_type: str, expression: str, in_head: str) -> None:
    message = f"target_layers.modules: {in_head} belong to the task head, which is trained whole and takes no adapter"
    with pytest.raises(PlacementError, match=re.escape(message)):
        _select(model_type, modules=(expression,))


ROFORMER = [f"roformer.encoder.layer.{block}.{part}" for block in range(2) for part in ("query", "output.dense")]
LINEAR = {name: (32, 48) if name.endswith("dense") else (32, 32) for name in ROFORMER} | {"classifier": (32, 2)}


def test_a_model_that_is_not_described_has_no_roles_and_takes_expressions() -> None:
    names = [*LINEAR]
    with pytest.raises(PlacementError) as caught:
        select_targets(names, model_type="roformer", projections=["q"], linear=LINEAR)
    assert str(caught.value).endswith(
        "Its linear layers: 2 x roformer.encoder.layer.N.query (32 -> 32), 2 x roformer.encoder.layer.N.output.dense "
        "(32 -> 48), 1 x classifier (32 -> 2)."
    )
    assert "target_layers.modules" in str(caught.value)
    chosen = select_targets(names, model_type="roformer", modules=[r".*\.query"], head=("classifier",), linear=LINEAR)
    assert [str(target) for target in chosen] == ROFORMER[::2]
    with pytest.raises(PlacementError, match=r"'\.\*\\\\\.key' match no whole module name\. Its linear layers: 2 x "):
        select_targets(names, model_type="roformer", modules=[r".*\.key"], head=("classifier",), linear=LINEAR)
    with pytest.raises(PlacementError, match="classifier belong to the task head"):
        select_targets(names, model_type="roformer", modules=[".*"], head=("classifier",), linear=LINEAR)
