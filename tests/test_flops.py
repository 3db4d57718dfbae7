"""Operations of a step: by hand, by formula, as PyTorch counts them on shapes, and in a step that is computed."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    XLNetConfig,
)

from harness.config.schema import Bias, ModelConfig, RankConfig, TinyModel, VariantConfig
from harness.data.batches import Batch
from harness.data.blocks import NO_TARGET
from harness.methods import flops
from harness.methods.adapting import apply_lora, lora_layers
from harness.methods.counts import set_trainable
from harness.methods.flops import FlopsError, StepFlops, counted_flops, formula_flops
from harness.methods.lora_method import is_adapter_in
from harness.methods.registry import find_method_module
from harness.models.configs import build_skeleton
from harness.placement.architectures import ARCHITECTURES, head_modules
from harness.placement.select import select_targets
from harness.results.methods import METHODS
from harness.tasks.language import makes_whole_logits, summed_loss

WIDTH, INNER, VOCAB, RANK = 32, 48, 50, 3
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": INNER,
    "vocab_size": VOCAB,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _gpt2_config() -> PreTrainedConfig:
    return GPT2Config(n_embd=WIDTH, n_layer=2, n_head=4, n_inner=INNER, vocab_size=VOCAB, **TOKENS)


LANGUAGE_MODELS = {
    "gpt2": _gpt2_config,
    "llama": lambda: LlamaConfig(**GROUPED),
    # Heads whose width times number is not the model's, normed queries, tied embeddings.
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=16, tie_word_embeddings=True),
    # Logits are capped after the unembedding, so they are made whole.
    "gemma2": lambda: Gemma2Config(**GROUPED, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, head_dim=16),
    # Attention and MLP side by side, and one after the other.
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, **TOKENS),
    "gpt_neox, not parallel": lambda: GPTNeoXConfig(**SIZES, **TOKENS, use_parallel_residual=False),
    # Matrices before and after the blocks.
    "opt": lambda: OPTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=INNER,
        vocab_size=VOCAB,
        word_embed_proj_dim=16,
    ),
}


def _language_model(name: str, *, device: str = "meta", attention: str = "sdpa") -> PreTrainedModel:
    config = LANGUAGE_MODELS[name]()
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device(device):
        # Capped scores have no fused kernel.
        attention = "eager" if name == "gemma2" else attention
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def _classifier(tiny: TinyModel) -> PreTrainedModel:
    return build_skeleton(ModelConfig(name="tiny", tiny=tiny), num_labels=5)


def _train(
    model: PreTrainedModel, method: str, *roles: str, blocks: object = "all", bias: Bias = Bias.none
) -> PreTrainedModel:
    """Makes of a model what the harness trains."""
    model_type, language_model = model.config.model_type, model.get_output_embeddings() is not None
    if roles:
        names = [name for name, _ in model.named_modules()]
        selected = select_targets(
            names, model_type=model_type, projections=roles, blocks=blocks, language_model=language_model
        )
        apply_lora(model, selected, rank=RankConfig(RANK, alpha=8), variant=VariantConfig(bias=bias))
    head = head_modules(model_type, language_model=language_model)
    is_adapter = is_adapter_in(model) if roles else find_method_module(method).is_adapter
    set_trainable(model, head, is_adapter=is_adapter, trains_base=METHODS[method].trains_base)
    return model


def _as_written(model: PreTrainedModel) -> PreTrainedModel:
    """Computes every product of an adapter as it is counted, and not in a cheaper order."""
    for _, layer in lora_layers(model):
        layer.composed = True
    return model


# ---------------------------------------------------------------- by hand


def test_a_total_is_worked_by_hand() -> None:
    step = StepFlops(per_token=7, per_token_squared=3, per_target=11)
    # Two examples padded to 4 and 6 tokens, 5 targets.
    assert step.total(num_tokens=10, num_squared=16 + 36, num_targets=5) == 70 + 156 + 55


# One block of the Llama above: queries and outputs are of full width, keys and values of half of it.
SQUARE, HALF, GATED = WIDTH * WIDTH, WIDTH * WIDTH // 2, WIDTH * INNER
BLOCK = 2 * SQUARE + 2 * HALF + 3 * GATED


def test_full_fine_tuning_is_three_products_of_every_matrix() -> None:
    step = formula_flops(_train(_language_model("llama"), "full"))
    assert step == StepFlops(3 * 2 * 2 * BLOCK, 3 * 2 * 4 * WIDTH, 3 * 2 * WIDTH * VOCAB)


def test_nothing_trained_is_one_product() -> None:
    step = formula_flops(_train(_language_model("llama"), "head_only"))  # a language model has no head
    assert step == StepFlops(2 * 2 * BLOCK, 2 * 4 * WIDTH, 2 * WIDTH * VOCAB)


def test_adapters_on_all_are_worked_by_hand() -> None:
    step = formula_flops(_train(_language_model("llama"), "lora", "all"))
    frozen = 2 * 2 * 2 * BLOCK - 2 * (SQUARE + 2 * HALF)  # nothing is trained before q, k and v of the first block
    ranks = 2 * (WIDTH + WIDTH) + 2 * (WIDTH + WIDTH // 2) + 3 * (WIDTH + INNER)
    adapters = 3 * 2 * RANK * 2 * ranks - 3 * 2 * RANK * WIDTH  # nor is the gradient of their input's first product
    assert step == StepFlops(frozen + adapters, 3 * 2 * 4 * WIDTH, 2 * 2 * WIDTH * VOCAB)


def test_attention_has_the_backward_products_that_its_operands_need() -> None:
    def products(*roles: str) -> float:
        step = formula_flops(_train(_language_model("llama"), "lora", *roles, blocks=[0]))
        return step.per_token_squared / (2 * WIDTH) - 6  # the other block has all six

    assert (products("v"), products("q"), products("q", "v"), products("o")) == (3, 4, 5, 2)
    assert products("q", "k", "v") == 6


def test_a_head_alone_has_no_backward_products_but_that_of_its_weight() -> None:
    bert = formula_flops(_train(_classifier(TinyModel.bert), "head_only"))
    assert bert == StepFlops(2 * 2 * (4 * 64 * 64 + 2 * 64 * 128), 2 * 4 * 64, 2 * 64 * 64 + 2 * 2 * 64 * 5)
    # transformers gives every position of a decoder its scores.
    gpt2 = formula_flops(_train(_classifier(TinyModel.gpt2), "head_only"))
    assert gpt2 == StepFlops(2 * 2 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * 2 * 64 * 5, 2 * 4 * 64, 0)


@functools.cache
def _wide(rank: int | None, blocks: str) -> StepFlops:
    config = LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if rank is not None:
        names = [name for name, _ in model.named_modules()]
        selected = select_targets(names, model_type="llama", projections=["all"], blocks=blocks, language_model=True)
        apply_lora(model, selected, rank=RankConfig(rank, alpha=8))
    set_trainable(model, (), trains_base=rank is None)
    return formula_flops(model)


def test_lora_costs_a_little_more_than_two_thirds_of_full_fine_tuning() -> None:
    full = _wide(None, "all").per_token
    low, high = (_wide(rank, "all").per_token / full for rank in (1, 64))
    assert 0.66 < low < 0.67 < high < 0.72


def test_autograd_stops_at_the_first_adapter() -> None:
    # Forward through all blocks, gradients of inputs through half of them: (1 + 1/2) / 3.
    assert 0.49 < _wide(1, "last_half").per_token / _wide(None, "all").per_token < 0.51
    assert 0.66 < _wide(1, "first_half").per_token / _wide(None, "all").per_token < 0.67


# ---------------------------------------------------------------- formula and count

TRAINED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "full": ("full", (), "all"),
    "head_only": ("head_only", (), "all"),
    "all": ("lora", ("all",), "all"),
    "all, last half": ("lora", ("all",), "last_half"),
    "attention": ("lora", ("attention",), "all"),
    "o": ("lora", ("o",), "first_1"),
    "up": ("lora", ("up",), "all"),
    "q": ("lora", ("q",), "all"),
    "qv": ("lora", ("q", "v"), "all"),
    "qkv": ("lora", ("qkv",), "all"),
    "v, last half": ("lora", ("v",), "last_half"),
    "lm_head": ("lora", ("lm_head",), "all"),
    "all and lm_head": ("lora", ("all", "lm_head"), "last_half"),
    "bitfit": ("bitfit", (), "all"),
    "norms": ("norms", (), "all"),
}
# What tells the architectures apart. The first two language models and BERT are taken through everything above.
FEW = ("full", "o", "all and lm_head")
# Norms of queries and keys; two norms that read the same.
PARTS = (("qwen3", "norms"), ("gpt_neox", "bitfit"))


# A projection lies between the embeddings and the first norm or bias that trains.
NORMS_BEHIND_MATRICES = (("opt", "bitfit"), ("opt", "norms"))


@pytest.mark.parametrize(("name", "trained"), NORMS_BEHIND_MATRICES)
def test_what_comes_before_the_first_trained_norm_is_an_error_and_no_wrong_number(name: str, trained: str) -> None:
    model = _train(_language_model(name), trained)
    with pytest.raises(FlopsError, match=r"'opt': some norms or biases train, and 1 matrices come before the first"):
        formula_flops(model)
    assert formula_flops(_train(_language_model(name), "full")) == counted_flops(model.requires_grad_(True))


def _fits(trained: str, model_type: str) -> bool:
    """Whether a model has the single roles; groups exist everywhere."""
    roles = set(TRAINED[trained][1]) - {"lm_head", "all", "attention"}
    return roles <= set(ARCHITECTURES[model_type].projections)


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        (name, trained)
        for name, config in LANGUAGE_MODELS.items()
        for trained in (TRAINED if name in ("gpt2", "llama") else FEW)
        if _fits(trained, config().model_type)
    ]
    + list(PARTS),
)
def test_a_language_models_formula_is_what_is_counted(name: str, trained: str) -> None:
    method, roles, blocks = TRAINED[trained]
    model = _train(_language_model(name), method, *roles, blocks=blocks)
    assert formula_flops(model) == counted_flops(model)


@pytest.mark.parametrize(
    ("tiny", "trained"),
    [
        (tiny, trained)
        for tiny in TinyModel
        for trained in (TRAINED if tiny is TinyModel.bert else FEW)
        if _fits(trained, tiny) and "lm_head" not in trained
    ],
)
def test_a_classifiers_formula_is_what_is_counted(tiny: TinyModel, trained: str) -> None:
    method, roles, blocks = TRAINED[trained]
    model = _train(_classifier(tiny), method, *roles, blocks=blocks)
    assert formula_flops(model) == counted_flops(model)


@pytest.mark.parametrize("bias", [Bias.adapted, Bias.all])
@pytest.mark.parametrize("blocks", ["all", "last_half"])
def test_biases_that_train_beside_adapters_are_what_is_counted(blocks: str, bias: Bias) -> None:
    for model in (_language_model("gpt2"), _classifier(TinyModel.bert)):
        _train(model, "lora", "up", blocks=blocks, bias=bias)
        assert formula_flops(model) == counted_flops(model)


@pytest.mark.parametrize("trained", ["full", "qv", "all, last half", "all and lm_head"])
def test_a_step_that_is_computed_has_as_many_operations(trained: str) -> None:
    method, roles, blocks = TRAINED[trained]
    # Eager, because the counter has a formula of its own for each of PyTorch's fused kernels.
    model = _as_written(
        _train(_language_model("llama", device="cpu", attention="eager"), method, *roles, blocks=blocks)
    )
    lengths = torch.tensor([9, 5, 2])
    input_ids = torch.randint(0, VOCAB, (3, 9))
    mask = torch.arange(9) < lengths[:, None]
    selected = mask.clone()
    selected[:, :2] = False  # a prompt
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model(input_ids, attention_mask=mask.long()).last_hidden_state
        logits = model.get_output_embeddings()(hidden[selected])
        functional.cross_entropy(logits, input_ids[selected], reduction="sum").backward()
    num_targets = int(selected.sum())
    assert num_targets == 7 + 3
    expected = formula_flops(model).total(num_tokens=3 * 9, num_squared=3 * 9**2, num_targets=num_targets)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(("name", "chunk"), [("llama", None), ("llama", 5), ("llama", 0), ("gemma2", None)])
@pytest.mark.parametrize("trained", ["full", "all and lm_head"])
def test_a_step_of_the_language_objective_has_as_many_operations(name: str, chunk: int | None, trained: str) -> None:
    """Padded rows of which some positions are targets, through what the trainer calls; every way to make logits."""
    method, roles, blocks = TRAINED[trained]
    model = _as_written(_train(_language_model(name, device="cpu", attention="eager"), method, *roles, blocks=blocks))
    lengths = torch.tensor([9, 5, 2])
    input_ids = torch.randint(3, VOCAB, (3, 9))
    mask = torch.arange(9) < lengths[:, None]
    is_target = mask.clone()
    is_target[:, :2] = False
    labels = torch.where(is_target, input_ids, NO_TARGET)
    batch = Batch({"input_ids": input_ids, "attention_mask": mask.long()}, labels, 16, int(is_target.sum()))
    with FlopCounterMode(display=False) as counter:
        summed_loss(model, batch, chunk_tokens=chunk).minimised.backward()
    whole = makes_whole_logits(model, chunk)
    assert whole == (chunk == 0 or name == "gemma2")
    step = formula_flops(model, whole_logits=whole)
    assert step == counted_flops(model, whole_logits=whole)
    assert (step.per_target == 0) == whole
    expected = step.total(num_tokens=3 * 9, num_squared=3 * 9**2, num_targets=batch.num_targets)
    assert counter.get_total_flops() == expected


def test_a_batch_of_classification_has_as_many_operations() -> None:
    model = _train(build_skeleton(ModelConfig(name="tiny", tiny=TinyModel.bert), num_labels=5), "lora", "q")
    real = AutoModelForSequenceClassification.from_config(model.config, attn_implementation="eager")
    _as_written(_train(real, "lora", "q"))
    with FlopCounterMode(display=False) as counter:
        logits = real(input_ids=torch.zeros((3, 7), dtype=torch.long)).logits
        functional.cross_entropy(logits, torch.tensor([0, 1, 4])).backward()
    expected = counted_flops(model).total(num_tokens=21, num_squared=3 * 49, num_targets=3)
    assert counter.get_total_flops() == expected


# ---------------------------------------------------------------- the count depends on nothing else


def test_the_count_is_that_of_the_model_and_not_of_how_it_is_held() -> None:
    expected = counted_flops(_train(_language_model("llama"), "lora", "all"))
    assert counted_flops(_train(_language_model("llama", attention="eager"), "lora", "all")) == expected
    assert counted_flops(_train(_language_model("llama", device="cpu"), "lora", "all")) == expected
    # A base in bfloat16 under adapters in float32, which meet under autocast alone.
    half = _train(_language_model("llama").to(torch.bfloat16), "lora", "all")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16, torch.float32}
    assert counted_flops(half) == expected


def test_what_gradient_checkpointing_computes_again_is_not_counted() -> None:
    model = _train(_language_model("llama", device="cpu"), "full")
    expected = counted_flops(model)
    model.activation_checkpointing_enable()
    model.train()
    assert counted_flops(model) == expected == formula_flops(model)


def test_counting_changes_nothing() -> None:
    model = _train(_language_model("llama", device="cpu"), "lora", "q")
    model.train()
    model.model.norm.eval()
    training = {name: module.training for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    counted_flops(model)
    assert {name: module.training for name, module in model.named_modules()} == training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------- what is not known is an error


def _deberta() -> PreTrainedModel:
    config = DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True)
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")


def test_attention_of_another_kind_is_an_error_and_no_wrong_number() -> None:
    model = _train(_deberta(), "full")
    with pytest.raises(FlopsError, match=r"^model type 'deberta-v2': its blocks have no formula"):
        formula_flops(model)
    message = r"^DebertaV2ForSequenceClassification: 2 x 40 tokens with 2 targets take \d+ operations, and \d+ by what "
    with pytest.raises(FlopsError, match=message):
        counted_flops(model)


def test_an_architecture_that_is_not_described_is_an_error() -> None:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=48))
    with pytest.raises(
        FlopsError, match=r"^model type 'xlnet' is not described in harness/placement/architectures\.py; "
    ):
        formula_flops(model)


def test_a_matrix_of_unknown_use_is_an_error() -> None:
    model = _language_model("gpt2")
    model.transformer.extra = nn.Linear(4, 4, device="meta")
    with pytest.raises(FlopsError, match=r"^model type 'gpt2': it is not known what passes transformer\.extra, so "):
        formula_flops(model)


def test_the_shape_of_a_matrix_is_not_read_off_a_packed_weight() -> None:
    layer = nn.Linear(8, 4, bias=False)
    expected = flops._matrix_flops(layer, True)
    layer.weight = nn.Parameter(torch.zeros(16, 1))  # 4-bit weights are held two in a byte
    assert flops._matrix_flops(layer, True) == expected == (3 * 2 * 8 * 4, True)
