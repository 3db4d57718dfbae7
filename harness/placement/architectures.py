"""What is known of each architecture: one record per `model_type` of transformers. No torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any


class PlacementError(ValueError):
    """A placement that a model cannot satisfy; the message lists what the model has."""


ATTENTION = ("q", "k", "v", "o", "qkv")
MLP = ("up", "down", "gate", "gate_up")
# Of a block that carries a state from token to token: into it, its gate, what is written, what decays, and out of it.
RECURRENT = ("rec_in", "rec_gate", "rec_beta", "rec_decay", "rec_out")
ROLES = (*ATTENTION, *MLP, *RECURRENT)

# The last matrix of a language model, from hidden states to logits. There is one, outside the blocks, so it belongs to
# no group: an adapter on it is asked for by name (`projections: [all, lm_head]`).
UNEMBEDDING = "lm_head"
# The table of token embeddings, likewise one module outside the blocks and in no group.
EMBEDDING = "embedding"
OUTSIDE_BLOCKS = (EMBEDDING, UNEMBEDDING)

# A group stands for those of its roles that are matrices of an architecture; a single role must exist, as a matrix or
# as a part of one.
GROUPS = {"attention": ATTENTION, "mlp": MLP, "recurrent": RECURRENT, "all": ROLES}


@dataclass(frozen=True)
class Rows:
    """Some rows of a matrix, as its outputs are numbered: those with `start <= row % period < stop`."""

    start: int
    stop: int
    period: int

    def count(self, num_rows: int) -> int:
        """How many of `num_rows` rows these are. Raises `PlacementError` when the periods do not fill the matrix."""
        if num_rows % self.period or not 0 <= self.start < self.stop <= self.period:
            raise PlacementError(f"rows {self} do not divide a matrix of {num_rows} rows.")
        return num_rows // self.period * (self.stop - self.start)

    def __str__(self) -> str:
        """`0:64 of each 192`."""
        return f"{self.start}:{self.stop} of each {self.period}"


@dataclass(frozen=True)
class Part:
    """A role that is a part of the rows of another role's matrix.

    Attributes:
        whole: that other role.
        rows: which rows, from transformers' config of the model.
    """

    whole: str
    rows: Callable[[Any], Rows]


# Of a model that reads with one stack of blocks and writes with another: where in them a role is. The decoder's blocks
# have an attention to what they write and one, `cross`, to what the encoder has read.
ENCODER, DECODER, CROSS = STACKS = ("encoder", "decoder", "cross")


@dataclass(frozen=True)
class Stack:
    """Blocks that follow on each other, or one of two attentions in them.

    Attributes:
        block: the path of a block, with `{}` for its index.
        projections: the path of each role inside a block; of two with `|` between them, that which the model has.
    """

    block: str
    projections: dict[str, str]

    @property
    def block_pattern(self) -> str:
        """A regular expression that matches the path of a block; its group is the index."""
        return re.escape(self.block).replace(re.escape("{}"), r"(\d+)")


@dataclass(frozen=True)
class Architecture:
    """All that has to be known of one family of models; paths are names of modules.

    Attributes:
        block, projections: the blocks, as `Stack` has them; of an encoder-decoder those of its encoder.
        beside_encoder: the other stacks of an encoder-decoder, by their names in `STACKS`; empty for other models.
        head: the modules of a classifier's task head: everything that a checkpoint of the base model does not hold.
            None where transformers has no classifier.
        parts: roles that exist only as a part of the rows of another role's matrix.
        embedding: the path of the table of token embeddings; None where it takes no adapter.
        unembedding: the path of the unembedding of the family's causal language models; None where it has none.
        refused: roles whose matrices take no adapter, each with the reason.
        differs_by_block: whether blocks or checkpoints differ, so that a role is in some of them alone.
        shares_blocks: whether one block is passed several times, and its adapter with it.
        optional: modules between base and head that some checkpoints lack (a pooler): there they are part of the head.
        before_blocks, after_blocks: matrices outside the blocks that every token passes.
        packs_by_positions: whether transformers sees by the `position_ids` of a language model that a block is packed,
            and keeps attention inside each document.
        has_plain_logits: whether the unembedding gives the logits as they are. Other language models scale or cap them.
        has_plain_blocks: whether a block is passed once, and is attention of two products, of queries and keys and with
            the values, and an MLP. The formula of operations knows no others.
        dropout_fields: names of dropout rates in transformers' config, beside `DROPOUT_FIELDS`.
    """

    block: str
    projections: dict[str, str]
    head: tuple[str, ...] | None
    parts: dict[str, Part] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    differs_by_block: bool = False
    shares_blocks: bool = False
    embedding: str | None = None
    unembedding: str | None = None
    optional: tuple[str, ...] = ()
    before_blocks: tuple[str, ...] = ()
    after_blocks: tuple[str, ...] = ()
    packs_by_positions: bool = False
    has_plain_logits: bool = False
    has_plain_blocks: bool = True
    dropout_fields: tuple[str, ...] = ()
    beside_encoder: dict[str, Stack] = field(default_factory=dict)

    @property
    def stacks(self) -> dict[str, Stack]:
        """All of them by name; the one of a model that is no encoder-decoder has the name ''."""
        first = Stack(self.block, self.projections)
        return {ENCODER: first, **self.beside_encoder} if self.beside_encoder else {"": first}

    @property
    def block_pattern(self) -> str:
        """That of `block`: see `Stack`."""
        return Stack(self.block, self.projections).block_pattern

    def is_in_head(self, name: str) -> bool:
        """Whether a module is a part of the task head, or all of it."""
        return any(name == module or name.startswith(f"{module}.") for module in self.head or ())


# What the families call their dropout rates. Loading a model checks that no dropout of another rate is left.
DROPOUT_FIELDS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "pooler_dropout",
    "cls_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "summary_first_dropout",
    "attention_dropout",
    "hidden_dropout",
    "dropout",
    "dropout_rate",
    "classifier_dropout_prob",
    "layerdrop",
)

_BERT_BLOCK = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_DEBERTA_BLOCK = {
    **_BERT_BLOCK,
    "q": "attention.self.query_proj",
    "k": "attention.self.key_proj",
    "v": "attention.self.value_proj",
}
_LLAMA_BLOCK = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_GPT2_BLOCK = {"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
_GPT_NEOX_BLOCK = {
    "qkv": "attention.query_key_value",
    "o": "attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
_OPT_BLOCK = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "up": "fc1",
    "down": "fc2",
}


def _in_turn(whole: str, roles: tuple[str, ...], sizes: Callable[[Any], tuple[int, ...]]) -> dict[str, Part]:
    """Parts of so many rows each that follow on each other, and do so again as often as the matrix has rows."""

    def part(number: int) -> Part:
        def rows(config: Any) -> Rows:
            ends = [0, *itertools.accumulate(sizes(config))]
            return Rows(ends[number], ends[number + 1], ends[-1])

        return Part(whole, rows)

    return {role: part(number) for number, role in enumerate(roles)}


_QKV = ("q", "k", "v")
# All queries, then all keys, then all values.
_THIRDS = _in_turn("qkv", _QKV, lambda config: (config.hidden_size,) * 3)
# Query, key and value of a head, then those of the next.
_THIRDS_OF_A_HEAD = _in_turn("qkv", _QKV, lambda config: (config.hidden_size // config.num_attention_heads,) * 3)
_LLAMA = Architecture(
    "model.layers.{}",
    _LLAMA_BLOCK,
    ("score",),
    embedding="model.embed_tokens",
    unembedding="lm_head",
    packs_by_positions=True,
    has_plain_logits=True,
)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _phi3_sizes(config: Any) -> tuple[int, ...]:
    size = _head_size(config)
    return (config.num_attention_heads * size, *[config.num_key_value_heads * size] * 2)


def _falcon_sizes(config: Any) -> tuple[int, ...]:
    """Queries that share a key and a value, and these: of a group of heads, of all heads, or of one head."""
    size = config.hidden_size // config.num_attention_heads
    if config.new_decoder_architecture:
        return (config.num_attention_heads // config.num_kv_heads * size, size, size)
    return (config.num_attention_heads * size if config.multi_query else size, size, size)


# The half that passes the activation comes first.
_HALVES = _in_turn("gate_up", ("gate", "up"), lambda config: (config.intermediate_size,) * 2)
_BLOOM_BLOCK = {
    "qkv": "self_attention.query_key_value",
    "o": "self_attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
_EXPERTS = "its experts are stacks of matrices, one parameter for all of them, to which LoRA adds no products here"
_MIXTURE = replace(
    _LLAMA,
    projections={role: _LLAMA_BLOCK[role] for role in ("q", "k", "v", "o")},
    refused=dict.fromkeys(("gate", "up", "down"), _EXPERTS),
    has_plain_blocks=False,
)

_T5_ATTENTION = ("q", "k", "v", "o")


def _t5_block(attention: int, mlp: int) -> dict[str, str]:
    """A block of T5, whose attention and MLP are numbered; in version 1.1 the MLP has a gate."""
    return {
        **{role: f"layer.{attention}.SelfAttention.{role}" for role in _T5_ATTENTION},
        "gate": f"layer.{mlp}.DenseReluDense.wi_0",
        "up": f"layer.{mlp}.DenseReluDense.wi|layer.{mlp}.DenseReluDense.wi_1",
        "down": f"layer.{mlp}.DenseReluDense.wo",
    }


# Keys are transformers' `config.model_type`. RoBERTa's head has its own dense layer; the pooler of DeBERTa is not in
# its checkpoints and is part of the head; that of BERT is in most, and belongs to the base there.
ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        "bert.encoder.layer.{}",
        _BERT_BLOCK,
        ("classifier",),
        embedding="bert.embeddings.word_embeddings",
        optional=("bert.pooler",),
    ),
    "roberta": Architecture(
        "roberta.encoder.layer.{}",
        _BERT_BLOCK,
        ("classifier",),
        embedding="roberta.embeddings.word_embeddings",
    ),
    "deberta": Architecture(
        "deberta.encoder.layer.{}",
        {"qkv": "attention.self.in_proj", **{role: _BERT_BLOCK[role] for role in ("o", "up", "down")}},
        ("pooler", "classifier"),
        embedding="deberta.embeddings.word_embeddings",
        parts=_THIRDS_OF_A_HEAD,
        has_plain_blocks=False,  # it has more products, and projects relative positions once a batch
    ),
    "deberta-v2": Architecture(
        "deberta.encoder.layer.{}",
        _DEBERTA_BLOCK,
        ("pooler", "classifier"),
        embedding="deberta.embeddings.word_embeddings",
        has_plain_blocks=False,
    ),
    "gpt2": Architecture(
        "transformer.h.{}",
        _GPT2_BLOCK,
        ("score",),
        embedding="transformer.wte",
        parts=_THIRDS,
        unembedding="lm_head",
        packs_by_positions=True,
        has_plain_logits=True,
    ),
    # Pythia. Its unembedding was `embed_out` in earlier versions of transformers and is in its checkpoints.
    "gpt_neox": Architecture(
        "gpt_neox.layers.{}",
        _GPT_NEOX_BLOCK,
        ("score",),
        embedding="gpt_neox.embed_in",
        parts=_THIRDS_OF_A_HEAD,
        unembedding="lm_head",
        packs_by_positions=True,
        has_plain_logits=True,
    ),
    "opt": Architecture(
        "model.decoder.layers.{}",
        _OPT_BLOCK,
        ("score",),
        embedding="model.decoder.embed_tokens",
        unembedding="lm_head",
        before_blocks=("model.decoder.project_in",),
        after_blocks=("model.decoder.project_out",),
        has_plain_logits=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": replace(_LLAMA, has_plain_logits=False),
    "gemma3_text": _LLAMA,
    "smollm3": _LLAMA,
    "electra": Architecture(
        "electra.encoder.layer.{}",
        _BERT_BLOCK,
        ("classifier",),
        embedding="electra.embeddings.word_embeddings",
        before_blocks=("electra.embeddings_project",),
    ),
    "distilbert": Architecture(
        "distilbert.transformer.layer.{}",
        {
            "q": "attention.q_lin",
            "k": "attention.k_lin",
            "v": "attention.v_lin",
            "o": "attention.out_lin",
            "up": "ffn.lin1",
            "down": "ffn.lin2",
        },
        ("pre_classifier", "classifier"),
        embedding="distilbert.embeddings.word_embeddings",
        dropout_fields=("seq_classif_dropout", "qa_dropout"),
    ),
    "albert": Architecture(
        "albert.encoder.albert_layer_groups.{}.albert_layers.0",
        {
            "q": "attention.query",
            "k": "attention.key",
            "v": "attention.value",
            "o": "attention.dense",
            "up": "ffn",
            "down": "ffn_output",
        },
        ("classifier",),
        embedding="albert.embeddings.word_embeddings",
        optional=("albert.pooler",),
        before_blocks=("albert.encoder.embedding_hidden_mapping_in",),
        shares_blocks=True,
        has_plain_blocks=False,
    ),
    "modernbert": Architecture(
        "model.layers.{}",
        {"qkv": "attn.Wqkv", "o": "attn.Wo", "gate_up": "mlp.Wi", "down": "mlp.Wo"},
        ("head", "classifier"),
        embedding="model.embeddings.tok_embeddings",
        parts={**_THIRDS, **_HALVES},
        dropout_fields=("embedding_dropout", "mlp_dropout"),
    ),
    "bloom": Architecture(
        "transformer.h.{}",
        _BLOOM_BLOCK,
        ("score",),
        embedding="transformer.word_embeddings",
        parts=_THIRDS_OF_A_HEAD,
        unembedding="lm_head",
        has_plain_logits=True,
    ),
    "falcon": Architecture(
        "transformer.h.{}",
        _BLOOM_BLOCK,
        ("score",),
        embedding="transformer.word_embeddings",
        parts=_in_turn("qkv", _QKV, _falcon_sizes),
        unembedding="lm_head",
        has_plain_logits=True,
    ),
    "olmo2": _LLAMA,
    "phi3": replace(
        _LLAMA,
        projections={
            "qkv": "self_attn.qkv_proj",
            "o": "self_attn.o_proj",
            "gate_up": "mlp.gate_up_proj",
            "down": "mlp.down_proj",
        },
        parts={**_in_turn("qkv", _QKV, _phi3_sizes), **_HALVES},
    ),
    "mixtral": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    # Every block has a state-space part and attention, side by side.
    "falcon_h1": Architecture(
        "model.layers.{}",
        {
            **{role: _LLAMA_BLOCK[role] for role in ("q", "k", "v", "o")},
            **{role: f"feed_forward.{role}_proj" for role in ("gate", "up", "down")},
            "rec_in": "mamba.in_proj",
            "rec_out": "mamba.out_proj",
        },
        None,
        embedding="model.embed_tokens",
        unembedding="lm_head",
        has_plain_blocks=False,
    ),
    # A block has a short convolution or attention.
    "lfm2": Architecture(
        "model.layers.{}",
        {
            **{role: _LLAMA_BLOCK[role] for role in ("q", "k", "v")},
            "o": "self_attn.out_proj",
            "gate": "feed_forward.w1",
            "up": "feed_forward.w3",
            "down": "feed_forward.w2",
            "rec_in": "conv.in_proj",
            "rec_out": "conv.out_proj",
        },
        None,
        embedding="model.embed_tokens",
        unembedding="lm_head",
        differs_by_block=True,
        has_plain_logits=True,
        has_plain_blocks=False,
    ),
    # A block has a gated delta rule or attention.
    "qwen3_5_text": replace(
        _LLAMA,
        projections={
            **_LLAMA_BLOCK,
            "rec_in": "linear_attn.in_proj_qkv",
            "rec_gate": "linear_attn.in_proj_z",
            "rec_beta": "linear_attn.in_proj_b",
            "rec_decay": "linear_attn.in_proj_a",
            "rec_out": "linear_attn.out_proj",
        },
        differs_by_block=True,
        packs_by_positions=False,
        has_plain_blocks=False,
    ),
    # T5 1.0 and 1.1, Flan-T5, ByT5. The classifier reads a text with the encoder and again with the decoder.
    "t5": Architecture(
        "transformer.encoder.block.{}",
        _t5_block(0, 1),
        ("classification_head",),
        beside_encoder={
            DECODER: Stack("transformer.decoder.block.{}", _t5_block(0, 2)),
            CROSS: Stack(
                "transformer.decoder.block.{}", {role: f"layer.1.EncDecAttention.{role}" for role in _T5_ATTENTION}
            ),
        },
        refused={EMBEDDING: "encoder and decoder look tokens up in modules of their own, which share one table"},
        differs_by_block=True,
        has_plain_blocks=False,
    ),
}


def head_modules(model_type: str, *, language_model: bool = False) -> tuple[str, ...]:
    """Names of the task head's modules on an architecture. Raises `PlacementError` for an unknown one.

    A causal language model has no task head: its unembedding is in the base model's checkpoint.
    """
    head = find_architecture(model_type).head
    if not language_model and head is None:
        raise PlacementError(f"model type {model_type!r}: transformers has no classifier; use a language task.")
    return () if language_model or head is None else head


def find_architecture(model_type: str) -> Architecture:
    """The record of a model type. Raises `PlacementError` for one that is not described."""
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        raise PlacementError(
            f"model type {model_type!r} is not described in harness/placement/architectures.py; described are "
            f"{', '.join(ARCHITECTURES)}. Add an Architecture with its block path, projections and head."
        ) from None
