"""What is known of each architecture: one record per `model_type` of transformers. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field


class PlacementError(ValueError):
    """A placement that a model cannot satisfy; the message lists what the model has."""


ATTENTION = ("q", "k", "v", "o", "qkv")
MLP = ("up", "down", "gate")
ROLES = (*ATTENTION, *MLP)

# The last matrix of a language model, from hidden states to logits. There is one, outside the blocks, so it belongs to
# no group: an adapter on it is asked for by name (`projections: [all, lm_head]`).
UNEMBEDDING = "lm_head"

# A group stands for those of its roles that an architecture has; a single role must exist.
GROUPS = {"attention": ATTENTION, "mlp": MLP, "all": ROLES}


@dataclass(frozen=True)
class Architecture:
    """Where the projections of one family of models are.

    `block` is the path of a block with `{}` for its index, `projections` the path of each role inside a block,
    `head` the modules of a classifier's task head (everything a checkpoint of the base model does not hold), `fused`
    says of roles that exist only as part of another role which one that is, `unembedding` is the path of the
    unembedding of the family's causal language models, `None` where it has none, and `optional` names modules between
    base and head that some checkpoints lack: there they are part of the head.
    """

    block: str
    projections: dict[str, str]
    head: tuple[str, ...]
    fused: dict[str, str] = field(default_factory=dict)
    unembedding: str | None = None
    optional: tuple[str, ...] = ()


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
_FUSED_QKV = {"q": "qkv", "k": "qkv", "v": "qkv"}
_LLAMA = Architecture("model.layers.{}", _LLAMA_BLOCK, ("score",), unembedding="lm_head")

# Keys are transformers' `config.model_type`. RoBERTa's head has a dense layer of its own; the pooler of DeBERTa is
# not in its checkpoints and is part of the head; that of BERT is in most, and belongs to the base there.
ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture("bert.encoder.layer.{}", _BERT_BLOCK, ("classifier",), optional=("bert.pooler",)),
    "roberta": Architecture("roberta.encoder.layer.{}", _BERT_BLOCK, ("classifier",)),
    "deberta": Architecture(
        "deberta.encoder.layer.{}",
        {"qkv": "attention.self.in_proj", **{role: _BERT_BLOCK[role] for role in ("o", "up", "down")}},
        ("pooler", "classifier"),
        fused=_FUSED_QKV,
    ),
    "deberta-v2": Architecture("deberta.encoder.layer.{}", _DEBERTA_BLOCK, ("pooler", "classifier")),
    "gpt2": Architecture("transformer.h.{}", _GPT2_BLOCK, ("score",), fused=_FUSED_QKV, unembedding="lm_head"),
    # Pythia. Its unembedding was `embed_out` in earlier versions of transformers and is in its checkpoints.
    "gpt_neox": Architecture(
        "gpt_neox.layers.{}", _GPT_NEOX_BLOCK, ("score",), fused=_FUSED_QKV, unembedding="lm_head"
    ),
    "opt": Architecture("model.decoder.layers.{}", _OPT_BLOCK, ("score",), unembedding="lm_head"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
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
