"""The mathematics of language models: nll, chunks, packing, micro-batches, generation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from harness.config.schema import (
    Blocks,
    DatasetConfig,
    GenerationConfig,
    ModelConfig,
    RankConfig,
    Task,
    TinyModel,
)
from harness.data.batches import Batch
from harness.data.blocks import NO_TARGET, Prompt
from harness.data.language import LanguageData, load_language_data
from harness.measure.memory import LiveTensors
from harness.methods.adapting import apply_lora, lora_layers
from harness.methods.counts import set_trainable
from harness.models.loading import load_model
from harness.models.tokenizers import load_tokenizer
from harness.placement.architectures import ARCHITECTURES
from harness.tasks.generation import generate, num_truncated_prompts
from harness.tasks.language import LanguageObjective, chunked_cross_entropy, summed_loss, summed_nll

TINY = {name: ModelConfig(name=name, tiny=TinyModel(name)) for name in ("gpt2", "llama")}
TOKENIZER = load_tokenizer(TINY["gpt2"])


def tiny(name: str = "llama") -> Any:
    return load_model(TINY[name], num_labels=None, pad_token_id=0, seed=0).model


def random_batch(*, num: int = 3, length: int = 20, seed: int = 0, share: float = 0.6) -> Batch:
    """Rows of full length with about `share` of the tokens as targets."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 260, (num, length), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < share, ids, NO_TARGET)
    labels[:, 0] = NO_TARGET
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, labels, ids.numel(), int((labels != NO_TARGET).sum()))


# ---------------------------------------------------------------- nll


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("chunk", [0, 7, None])
def test_nll_is_transformers_own_loss_on_an_unpadded_sequence(name: str, chunk: int | None) -> None:
    model, batch = tiny(name).eval(), random_batch(num=1)
    own = summed_nll(model, batch, chunk_tokens=chunk) / batch.num_targets
    theirs = model(input_ids=batch.inputs["input_ids"], labels=batch.labels).loss
    assert own.item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("chunk", [0, 8])
def test_what_is_masked_has_no_loss_and_no_gradient(chunk: int) -> None:
    model, batch = tiny(), random_batch()
    reference = summed_nll(model, batch, chunk_tokens=chunk)
    # Other labels where nothing is asked for cannot matter, because there are none; other logits there must not either.
    hidden = model.base_model(**batch.inputs).last_hidden_state
    logits = model.lm_head(hidden).detach().float().log_softmax(-1)
    by_hand = -sum(
        logits[row, at - 1, batch.labels[row, at]]
        for row in range(batch.labels.shape[0])
        for at in range(1, batch.labels.shape[1])
        if batch.labels[row, at] != NO_TARGET
    )
    assert reference.item() == pytest.approx(float(by_hand), rel=1e-5)
    nothing = Batch(batch.inputs, torch.full_like(batch.labels, NO_TARGET), batch.num_tokens, 0)
    loss = summed_nll(model, nothing, chunk_tokens=chunk)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_padding_changes_no_nll() -> None:
    model = tiny().eval()
    rows = [random_batch(num=1, length=length, seed=length) for length in (5, 12, 20)]
    alone = sum(summed_nll(model, row).item() for row in rows)
    ids = torch.full((3, 20), 0)
    labels = torch.full((3, 20), NO_TARGET)
    mask = torch.zeros(3, 20, dtype=torch.int64)
    for index, row in enumerate(rows):
        length = row.labels.shape[1]
        ids[index, :length], labels[index, :length] = row.inputs["input_ids"][0], row.labels[0]
        mask[index, :length] = 1
    together = Batch({"input_ids": ids, "attention_mask": mask}, labels, 37, sum(row.num_targets for row in rows))
    assert summed_nll(model, together).item() == pytest.approx(alone, rel=1e-6)


# ---------------------------------------------------------------- chunks


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("method", ["full", "lora", "lm_head"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_chunked_loss_is_the_full_loss_with_its_gradients(method: str, smoothing: float) -> None:
    model, batch = tiny(), random_batch()
    if method != "full":
        names = (
            ["lm_head"] if method == "lm_head" else ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
        )
        apply_lora(model, names, rank=RankConfig(rank=4, alpha=8.0), generator=torch.Generator().manual_seed(0))
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_B, std=0.1)
        set_trainable(model, ())
    whole = summed_loss(model, batch, chunk_tokens=0, label_smoothing=smoothing)
    expected = gradients(model, whole.minimised)
    chunked = summed_loss(model, batch, chunk_tokens=5, label_smoothing=smoothing)
    found = gradients(model, chunked.minimised)
    assert chunked.minimised.item() == pytest.approx(whole.minimised.item(), rel=1e-6)
    plain = summed_nll(model, batch, chunk_tokens=0).item()
    for loss in (whole, chunked):
        assert (loss.minimised if loss.unsmoothed is None else loss.unsmoothed).item() == pytest.approx(plain, rel=1e-6)
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()), msg=name)


def test_the_head_is_as_it_was_afterwards_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny(), random_batch()
    summed_nll(model, batch)
    assert "forward" not in vars(model.lm_head)
    monkeypatch.setattr(functional, "cross_entropy", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        summed_nll(model, batch)
    assert "forward" not in vars(model.lm_head)
    assert model(**batch.inputs).logits.shape == (3, 20, 260)


def test_chunks_go_through_a_checkpointed_model_too() -> None:
    model, batch = tiny(), random_batch()
    expected = gradients(model, summed_nll(model, batch))
    hidden = checkpoint(
        lambda ids: model.base_model(ids).last_hidden_state, batch.inputs["input_ids"], use_reentrant=False
    )
    wanted = batch.labels[:, 1:] != NO_TARGET
    loss = chunked_cross_entropy(hidden[:, :-1][wanted], batch.labels[:, 1:][wanted], model.lm_head, chunk=4).minimised
    found = gradients(model, loss)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6 * float(value.abs().max()))


def test_peak_memory_of_a_chunked_loss_at_a_vocabulary_of_128k() -> None:
    """Logits of 512 targets are 250 MiB, and their gradient as much; chunks of 64 need an eighth of both."""
    vocab, width, rows = 128_000, 32, 512
    head = nn.Linear(width, vocab, bias=False).requires_grad_(False)
    hidden = torch.randn(rows, width, requires_grad=True)
    targets = torch.randint(vocab, (rows,))
    owner = nn.Linear(1, 1)
    peaks = {}
    for chunk in (rows, 64):
        with LiveTensors(owner, torch.optim.SGD(owner.parameters())) as live:
            chunked_cross_entropy(hidden, targets, head, chunk=chunk).minimised.backward()
        peaks[chunk] = live.peak.total_bytes / 2**20
    with LiveTensors(owner, torch.optim.SGD(owner.parameters())) as live:
        functional.cross_entropy(head(hidden), targets, reduction="sum").backward()
    whole = live.peak.total_bytes / 2**20
    weight = vocab * width * 4 / 2**20
    logits = rows * vocab * 4 / 2**20
    print(f"MiB at vocabulary {vocab:,}, {rows} targets: whole {whole:.0f}, chunks of 64 {peaks[64]:.0f}")
    assert whole > weight + 2 * logits
    assert peaks[64] < weight + 3.1 * logits / 8
    assert peaks[64] < whole / 4


FAMILIES = {
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=260, n_positions=64),
    "gpt_neox": transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=260
    ),
    "opt": transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, vocab_size=260, word_embed_proj_dim=32
    ),
    **{
        name: config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            intermediate_size=64,
            vocab_size=260,
            pad_token_id=0,
        )
        for name, config in {
            "llama": transformers.LlamaConfig,
            "qwen2": transformers.Qwen2Config,
            "qwen3": transformers.Qwen3Config,
            "gemma": transformers.GemmaConfig,
            "gemma2": transformers.Gemma2Config,
            "gemma3_text": transformers.Gemma3TextConfig,
            "smollm3": transformers.SmolLM3Config,
        }.items()
    },
}


def family(name: str) -> Any:
    torch.manual_seed(0)
    config = FAMILIES[name]
    for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    config.use_cache = False
    attention = "eager" if name == "gemma2" else "sdpa"
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_give_each_family_its_own_loss(name: str) -> None:
    model, batch = family(name), random_batch()
    own = summed_nll(model, batch, chunk_tokens=6).item()
    logits = model(**batch.inputs).logits[:, :-1].float()
    theirs = functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    assert own == pytest.approx(theirs.item(), rel=1e-5)


# ---------------------------------------------------------------- packing


def write_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    texts = [
        "".join(generator.choice(list("abcdefgh ")) for _ in range(n)).strip() or "x" for n in (3, 9, 1, 6, 20, 4, 11)
    ]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    names = dict.fromkeys(("train_file", "val_file", "test_file"), str(tmp_path / "text.txt"))
    return {"name": "text", "task": Task.causal_lm, "best_metric": "nll", "max_length": 32, **names}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "opt"])
def test_packed_equals_unpacked_per_document(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All targets of the packed blocks, one by one, against each document by itself."""
    settings = write_documents(tmp_path, monkeypatch)
    model = family(name)
    packed = load_language_data(DatasetConfig(**settings, blocks=Blocks.packed), TOKENIZER).train
    batch = packed.batch(range(len(packed)))
    losses = target_losses(model, batch)
    alone: list[float] = []
    for row in range(len(packed)):
        ids, positions = batch.inputs["input_ids"][row], batch.inputs["position_ids"][row].tolist()
        starts = [at for at, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
            labels = batch.labels[row, start:end].clone()
            piece = {"input_ids": ids[None, start:end]}
            alone += target_losses(model, Batch(piece, labels[None], end - start, 0)).tolist()
    assert len(alone) == batch.num_targets
    torch.testing.assert_close(losses, torch.tensor(alone), rtol=1e-5, atol=1e-5)


def test_a_family_that_would_attend_across_documents_is_not_packed() -> None:
    """OPT reads no packing out of positions: two equal documents would get other losses than one by itself."""
    packing = {name for name, known in ARCHITECTURES.items() if known.packs_by_positions}
    assert "opt" not in packing
    assert set(FAMILIES) - {"opt"} <= packing
    ids = torch.arange(10, 16).repeat(2)[None]
    positions = torch.arange(6).repeat(2)[None]
    batch = Batch({"input_ids": ids, "position_ids": positions}, ids, 12, 11)
    for name in FAMILIES:
        losses = target_losses(family(name), batch)
        assert torch.allclose(losses[:5], losses[6:], atol=1e-4) == (name in packing)


def target_losses(model: Any, batch: Batch) -> torch.Tensor:
    logits = model(**batch.inputs).logits[:, :-1].float()
    wanted = batch.labels[:, 1:] != NO_TARGET
    return functional.cross_entropy(logits[wanted], batch.labels[:, 1:][wanted], reduction="none").detach()


def test_asking_for_attention_across_documents_changes_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = write_documents(tmp_path, monkeypatch)
    model = tiny().eval()
    losses = [
        summed_nll(model, split.batch(range(len(split)))).item()
        for across in (False, True)
        for split in [
            load_language_data(
                DatasetConfig(**settings, blocks=Blocks.packed, attend_across_documents=across), TOKENIZER
            ).train
        ]
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


# ---------------------------------------------------------------- scores


def test_scores_of_a_split_are_over_all_its_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_language_data(DatasetConfig(**write_documents(tmp_path, monkeypatch)), TOKENIZER)
    model = tiny().train()
    objective = LanguageObjective(val=data.val, eval_batch_size=2)
    evaluation = objective.evaluate(model)
    whole = data.val.batch(range(len(data.val)))
    total = summed_nll(model.eval(), whole).item()
    num_bytes = len((tmp_path / "text.txt").read_text().replace("\n", ""))
    assert evaluation.scores["nll"] == pytest.approx(total / whole.num_targets, rel=1e-6)
    assert evaluation.scores["perplexity"] == pytest.approx(math.exp(total / whole.num_targets), rel=1e-5)
    assert evaluation.scores["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-6)
    assert evaluation.objective == -evaluation.scores["nll"]
    assert LanguageObjective(val=data.val, eval_batch_size=64).evaluate(model).scores["nll"] == pytest.approx(
        evaluation.scores["nll"], rel=1e-6
    )


def test_a_model_that_gives_no_numbers_has_no_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_language_data(DatasetConfig(**write_documents(tmp_path, monkeypatch)), TOKENIZER)
    model = tiny().train()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    evaluation = LanguageObjective(val=data.val, eval_batch_size=2).evaluate(model)
    assert (evaluation.scores, evaluation.objective) == ({}, -math.inf)
    assert model.training


# ---------------------------------------------------------------- generation


def memorised(texts: dict[str, str]) -> tuple[Any, LanguageData | None]:
    """A tiny model that has learned these targets by heart."""
    model = tiny("gpt2").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [(ids(prompt), ids(target)) for prompt, target in texts.items()]
    for _ in range(150):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for prompt, target in rows:
            tokens = torch.tensor([[TOKENIZER.bos_token_id, *prompt, *target, TOKENIZER.eos_token_id]])
            labels = tokens.clone()
            labels[:, : 1 + len(prompt)] = NO_TARGET
            loss = loss + summed_nll(model, Batch({"input_ids": tokens}, labels, tokens.numel(), len(target) + 1))
        loss.backward()
        optimizer.step()
    return model, None


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


TEXTS = {"what is up? ": "not much", "a": "long answer it is", "and who? ": "me"}


@pytest.fixture(scope="module")
def knowing() -> Any:
    return memorised(TEXTS)[0]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_what_was_learned_by_heart_is_generated_in_any_batch(knowing: Any, num_beams: int, batch_size: int) -> None:
    prompts = [Prompt(text, [TOKENIZER.bos_token_id, *ids(text)], [target]) for text, target in TEXTS.items()]
    config = GenerationConfig(max_new_tokens=30, num_beams=num_beams, batch_size=batch_size)
    knowing.train()
    assert generate(knowing, prompts, config, TOKENIZER) == list(TEXTS.values())
    assert knowing.training


def test_a_text_ends_where_the_template_ends_an_answer(knowing: Any) -> None:
    prompt = Prompt("a", [TOKENIZER.bos_token_id, *ids("a")], [""], stop=" answer")
    assert generate(knowing, [prompt], GenerationConfig(max_new_tokens=30), TOKENIZER) == ["long"]


def test_a_stop_that_is_a_special_token_ends_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(TINY["gpt2"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = tiny("gpt2")
    asked: dict[str, Any] = {}

    def generate_more(rows: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.update(options)
        return torch.cat([rows, torch.tensor([[*ids("42"), stop, *ids("\nuser: more")]])], dim=1)

    monkeypatch.setattr(model, "generate", generate_more)
    prompt = Prompt("", ids("what?"), ["42"], stop="<|im_end|>")
    assert generate(model, [prompt], GenerationConfig(), tokenizer) == ["42"]
    assert asked["eos_token_id"] == [tokenizer.eos_token_id, stop]


def test_generation_settings_reach_the_search(knowing: Any) -> None:
    prompt = Prompt("a", [TOKENIZER.bos_token_id, *ids("a")], [""])
    assert generate(knowing, [prompt], GenerationConfig(max_new_tokens=4), TOKENIZER) == ["long"]
    (text,) = generate(knowing, [prompt], GenerationConfig(max_new_tokens=30, no_repeat_ngram_size=1), TOKENIZER)
    assert len(set(text)) == len(text)


def test_a_prompt_without_room_loses_its_beginning(knowing: Any) -> None:
    # 128 positions in all; the end of the prompt is what was learned.
    prompt = Prompt("", [*ids("z" * 200), TOKENIZER.bos_token_id, *ids("a")], [""])
    (text,) = generate(knowing, [prompt], GenerationConfig(max_new_tokens=126), TOKENIZER)
    assert text.startswith("long")


def test_a_prompt_without_room_keeps_the_start_token_and_a_text_loses_the_spaces_of_the_prompt(
    knowing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def generate_more(rows: torch.Tensor, **_: Any) -> torch.Tensor:
        asked.append(rows[0].tolist())
        return torch.cat([rows, torch.tensor([ids("  me")])], dim=1)

    monkeypatch.setattr(knowing, "generate", generate_more)
    prompt = Prompt("", [TOKENIZER.bos_token_id, *ids("z" * 200 + "a")], [""], lead=" ")
    assert generate(knowing, [prompt], GenerationConfig(max_new_tokens=125), TOKENIZER) == [" me"]
    assert asked == [[TOKENIZER.bos_token_id, *ids("za")]]
    fits = Prompt("", ids("zzz"), [""])
    prompts = [prompt, fits, prompt]
    assert [num_truncated_prompts(knowing, prompts, GenerationConfig(125, num_examples=n)) for n in (None, 2, 1)] == [
        2,
        1,
        1,
    ]
