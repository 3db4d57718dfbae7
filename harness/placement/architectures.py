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
ROLES = (*ATTENTION, *MLP)

# The last matrix of a language model, from hidden states to logits. There is one, outside the blocks, so it belongs to
# no group: an adapter on it is asked for by name (`projections: [all, lm_head]`).
UNEMBEDDING = "lm_head"
# The table of token embeddings, likewise one module outside the blocks and in no group.
EMBEDDING = "embedding"
OUTSIDE_BLOCKS = (EMBEDDING, UNEMBEDDING)

# A group stands for those of its roles that are matrices of an architecture; a single role must exist, as a matrix or
# as a part of one.
GROUPS = {"attention": ATTENTION, "mlp": MLP, "all": ROLES}


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


@dataclass(frozen=True)
class Architecture:
    """All that has to be known of one family of models; paths are names of modules.

    Attributes:
        block: the path of a block, with `{}` for its index.
        projections: the path of each role inside a block.
        head: the modules of a classifier's task head: everything that a checkpoint of the base model does not hold.
        parts: roles that exist only as a part of the rows of another role's matrix.
        embedding: the path of the table of token embeddings; None where it takes no adapter.
        unembedding: the path of the unembedding of the family's causal language models; None where it has none.
        optional: modules between base and head that some checkpoints lack (a pooler): there they are part of the head.
        before_blocks, after_blocks: matrices outside the blocks that every token passes.
        packs_by_positions: whether transformers sees by the `position_ids` of a language model that a block is packed,
            and keeps attention inside each document.
        has_plain_logits: whether the unembedding gives the logits as they are. Other language models scale or cap them.
        has_plain_attention: whether attention is two products, of queries and keys and with the values.
        dropout_fields: names of dropout rates in transformers' config, beside `DROPOUT_FIELDS`.
    """

    block: str
    projections: dict[str, str]
    head: tuple[str, ...]
    parts: dict[str, Part] = field(default_factory=dict)
    embedding: str | None = None
    unembedding: str | None = None
    optional: tuple[str, ...] = ()
    before_blocks: tuple[str, ...] = ()
    after_blocks: tuple[str, ...] = ()
    packs_by_positions: bool = False
    has_plain_logits: bool = False
    has_plain_attention: bool = True
    dropout_fields: tuple[str, ...] = ()

    @property
    def block_pattern(self) -> str:
        """A regular expression that matches the path of a block; its group is the index."""
        return re.escape(self.block).replace(re.escape("{}"), r"(\d+)")

    def is_in_head(self, name: str) -> bool:
        """Whether a module is a part of the task head, or all of it."""
        return any(name == module or name.startswith(f"{module}.") for module in self.head)


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
        has_plain_attention=False,  # it has more products, and projects relative positions once a batch
    ),
    "deberta-v2": Architecture(
        "deberta.encoder.layer.{}",
        _DEBERTA_BLOCK,
        ("pooler", "classifier"),
        embedding="deberta.embeddings.word_embeddings",
        has_plain_attention=False,
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
}


def head_modules(model_type: str, *, language_model: bool = False) -> tuple[str, ...]:
    """Names of the task head's modules on an architecture. Raises `PlacementError` for an unknown one.

    A causal language model has no task head: its unembedding is in the base model's checkpoint.
    """
    head = find_architecture(model_type).head
    return () if language_model else head


def find_architecture(model_type: str) -> Architecture:
    """The record of a model type. Raises `PlacementError` for one that is not described."""
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        raise PlacementError(
            f"model type {model_type!r} is not described in harness/placement/architectures.py; described are "
            f"{', '.join(ARCHITECTURES)}. Add an Architecture with its block path, projections and head."
        ) from None
