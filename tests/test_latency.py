"""Latency: which passes are measured, in which order, that the variants compute what they stand for, its messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from analysis.__main__ import main
from harness.config.schema import RunConfig
from harness.forecast import latency
from harness.forecast.latency import BASE, DECODE, FORWARD, MERGED, PREFILL, UNMERGED, Passes, Timing, measure_latency
from harness.forecast.request import own_configs, read_config
from harness.methods import packed
from harness.methods.packed import adapters_side_by_side

LORA = ("rank=r4", "target_layers=qv")
CLASSIFIER = ("model=tiny_bert", "dataset=reuters_r8", *LORA)
LANGUAGE = ("model=tiny_llama", "dataset=friends", "dataset.blocks=cut", *LORA)
CPU = torch.device("cpu")


def composed(*overrides: str) -> RunConfig:
    with own_configs(None):
        return read_config(overrides)


def variants_of(*overrides: str, passes: Passes) -> tuple[RunConfig, latency._Variants]:
    config = latency._to_serve(composed(*overrides))
    return config, latency._Variants(config, passes, CPU)


# ---------------------------------------------------------------- what is measured


@pytest.mark.parametrize("names", ["ab", "abc", "abcd"])
def test_every_variant_is_equally_often_at_every_place(names: str) -> None:
    orders = list(latency.orders(names, 2 * len(names)))
    assert all(sorted(order) == list(names) for order in orders)
    places = Counter((name, place) for order in orders for place, name in enumerate(order))
    assert set(places.values()) == {2} and len(places) == len(names) ** 2


def test_a_round_measures_every_variant_once() -> None:
    measured: list[str] = []

    def measure(name: str) -> Callable[[], dict[str, float]]:
        def one() -> dict[str, float]:
            measured.append(name)
            return {FORWARD: float(len(measured))}

        return one

    found = latency._rounds({name: measure(name) for name in (BASE, MERGED, UNMERGED)}, 2)
    assert measured == [BASE, MERGED, UNMERGED, MERGED, UNMERGED, BASE]
    assert found == {BASE: {FORWARD: [1, 6]}, MERGED: {FORWARD: [2, 4]}, UNMERGED: {FORWARD: [3, 5]}}


def test_the_distribution_of_a_variant() -> None:
    assert Timing(1, 8, FORWARD, BASE, (4.0, 1.0, 2.0, 3.0, 9.0)).quartiles == (2, 3, 4)
    assert Timing(1, 8, FORWARD, BASE, (4.0,)).quartiles == (4, 4, 4)


def test_a_language_model_is_measured_in_prefill_and_in_decoding() -> None:
    found = measure_latency(
        composed(*LANGUAGE), Passes((1, 3), (8, 5), rounds=3, warm_up=1, new_tokens=2, num_adapters=2)
    )
    wanted = [
        (batch, length, phase, variant)
        for batch, several in ((1, []), (3, ["2 adapters"]))
        for length in (8, 5)
        for phase in (PREFILL, DECODE)
        for variant in (BASE, MERGED, UNMERGED, *several)
    ]
    assert [(one.batch, one.length, one.phase, one.variant) for one in found.timings] == wanted
    assert all(len(one.seconds) == 3 and min(one.seconds) > 0 for one in found.timings)
    assert {found.ratio_to_base(one) for one in found.timings if one.variant == BASE} == {1}
    for one, base in ((found.timings[2], found.timings[0]), (found.timings[5], found.timings[3])):
        assert found.ratio_to_base(one) == one.median / base.median
    assert found.merging_error is not None and found.merging_error < 1e-5 < found.logit_change
    assert found.notes == ["2 adapters need as many rows: left out at batch 1"]


def test_decoding_reads_the_cache_and_computes_one_token_at_a_time() -> None:
    passes = Passes((2,), (6,), new_tokens=3, num_adapters=0)
    config, variants = variants_of(*LANGUAGE, passes=passes)
    model: Any = variants.at(2)[UNMERGED]
    inputs = latency._inputs(config, passes, 2, 6, CPU)
    new = torch.tensor([[5, 6, 7], [8, 9, 10]])
    shapes: list[tuple[int, ...]] = []
    last: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    model.register_forward_hook(lambda _, args, output: last.append(output.logits))
    clock = latency._Clock(latency.device_queue(CPU))
    with torch.inference_mode():
        seconds = latency._time_generation(model, inputs, new, clock)
        whole = model(input_ids=torch.cat([inputs["input_ids"], new], dim=1)).logits
    assert seconds.keys() == {PREFILL, DECODE}
    assert shapes == [(2, 6), (2, 6), (2, 1), (2, 1), (2, 1), (2, 9)]
    assert all(logits.shape[1] == 1 for logits in last[:5])  # a prompt's logits are those of its last token
    for at, logits in enumerate(last[1:5]):
        torch.testing.assert_close(logits[:, 0], whole[:, 5 + at], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what the variants compute


@pytest.mark.parametrize(
    "overrides",
    [
        (*CLASSIFIER, "variant=bias_all"),
        (*LANGUAGE, "target_layers=all_lm_head"),
        ("model=tiny_gpt2", "dataset=friends", "rank=r4", "target_layers=all_embedding"),
        (*LANGUAGE, "variant=dora"),
        (*CLASSIFIER, "method=loha"),  # peft writes into the weights that it merges into
    ],
    ids=" ".join,
)
def test_merged_and_unmerged_agree_and_differ_from_the_base(overrides: tuple[str, ...]) -> None:
    words = [
        word for word in overrides if not (word == "target_layers=qv" and "target_layers=all_lm_head" in overrides)
    ]
    passes = Passes((3,), (7,), num_adapters=0)
    config, variants = variants_of(*words, passes=passes)
    before = [value.clone() for value in variants._base.model.parameters()]
    with torch.inference_mode():
        change, error = variants.differences(latency._inputs(config, passes, 3, 7, CPU))
    assert error is not None and 50 * error < change
    fresh = latency.load_model(
        config.model,
        num_labels=variants._base.model.config.num_labels if not config.dataset.task.is_language else None,
        pad_token_id=0,
        seed=config.seed,
        with_weights=False,
    )
    assert all(torch.equal(one, other) for one, other in zip(before, fresh.model.parameters(), strict=True))


def test_rows_side_by_side_are_those_of_their_own_adapters_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pack in training has a copy of all factors that it keeps filled; here nobody does."""
    monkeypatch.setattr(packed, "stacks_on", lambda device: True)
    passes = Passes((6,), (6,), num_adapters=3)
    config, variants = variants_of(*CLASSIFIER, passes=passes)
    inputs = latency._inputs(config, passes, 6, 6, CPU)
    with torch.inference_mode():
        own = [model(**inputs).logits for model in variants._adapted]
        made = variants.at(6)["3 adapters"](**inputs).logits
        base = variants._base.model(**inputs).logits
    torch.testing.assert_close(made, torch.cat([each[2 * run : 2 * run + 2] for run, each in enumerate(own)]))
    assert (made - base).abs().max() > 1e-5


@pytest.mark.parametrize("overrides", [CLASSIFIER, LANGUAGE, ("model=tiny_gpt2", "dataset=friends", *LORA)])
def test_rows_side_by_side_are_those_of_their_own_adapters(overrides: tuple[str, ...]) -> None:
    passes = Passes((5,), (6,), num_adapters=3)
    config, variants = variants_of(*overrides, passes=passes)
    inputs = latency._inputs(config, passes, 5, 6, CPU)
    side: Any = variants.at(5)["3 adapters"]
    with torch.inference_mode():
        own: list[Any] = [model(**inputs).logits for model in variants._adapted]
        made = side(**inputs, **({"use_cache": True} if config.dataset.task.is_language else {}))
        expected = torch.cat([own[0][:2], own[1][2:4], own[2][4:]])
        torch.testing.assert_close(made.logits, expected)
        assert (own[0] - own[1]).abs().max() > 1e-5
        if config.dataset.task.is_language:
            more = torch.full((5, 1), 9)
            decoded = side(input_ids=more, past_key_values=made.past_key_values, use_cache=True).logits[:, -1]
            ids = torch.cat([inputs["input_ids"], more], dim=1)
            whole = [model(input_ids=ids).logits[:, -1] for model in variants._adapted]
            torch.testing.assert_close(
                decoded, torch.cat([whole[0][:2], whole[1][2:4], whole[2][4:]]), rtol=1e-4, atol=1e-5
            )


def test_adapters_side_by_side_share_the_tensors_of_the_base() -> None:
    _, variants = variants_of(*CLASSIFIER, passes=Passes((4,), (6,), num_adapters=4))
    side = adapters_side_by_side(variants._adapted, [1] * 4)
    base = {id(value) for value in variants._base.model.parameters()}
    own = [value for value in side.parameters() if id(value) not in base]
    assert sum(value.numel() for value in own) == 4 * 2 * 2 * 4 * 128


def test_everything_is_held_in_the_type_of_the_precision() -> None:
    config, variants = variants_of(*CLASSIFIER, "trainer.precision=bf16", passes=Passes((2,), (6,), num_adapters=2))
    assert config.model.dtype == "bfloat16"
    for model in variants.at(2).values():
        assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------- the command


def test_the_command_prints_tables_in_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--batches", "1,2", "--lengths", "6", "--rounds", "2", "--warm-up", "0", "--adapters", "2"]
    assert main(["latency", *CLASSIFIER, *words]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == f"# Latency of `{' '.join(CLASSIFIER)}`"
    by_shape = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert by_shape[0] == ["variant", "batch 1, length 6", "batch 2, length 6"]
    assert [row[0] for row in by_shape[2:6]] == [BASE, MERGED, UNMERGED, "2 adapters"]
    assert by_shape[5][1] == "\N{EN DASH}" and by_shape[5][2].endswith("%)") and "(" not in by_shape[2][1]
    assert [row[:4] for row in by_shape[8:]] == [
        [FORWARD, batch, "6", variant]
        for batch, several in (("1", []), ("2", ["2 adapters"]))
        for variant in (BASE, MERGED, UNMERGED, *several)
    ]
    for row in by_shape[8:]:
        low, middle, high = map(float, row[4:7])
        assert 0 < low <= middle <= high and row[7] == "2"
    facts = [line for line in lines if line.startswith("- ")]
    assert "threads" in facts[0] and f"torch {torch.__version__}" in facts[1] and "float32" in facts[2]
    assert said.err.splitlines()[-1] == "batch 2, length 6: base, merged, unmerged, 2 adapters"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=full"], "error: method=full: adds no adapter to the base model"),
        ([*LORA, "--lengths", "16,129"], "error: --lengths 129: tiny_bert reads at most 128 tokens; set less."),
        ([*LORA, "--rounds", "0"], "error: --rounds 0: give whole numbers, at least 1 each."),
        ([*LORA, "--batches", "0,4"], "error: --batches 0,4: give whole numbers, at least 1 each."),
        ([*LORA, "--adapters", "1"], "error: --adapters 1: give at least 2 that share a batch, or 0"),
        ([*LORA, "--warm-up", "-1"], "error: --warm-up -1: give a number of rounds, or 0 for none."),
        ([*LORA, "variant=dora", "trainer.precision=bf16"], "error: trainer.precision=bf16: DoRA takes the lengths"),
        (["rank=r4"], "error: method=lora needs target layers"),
        ([*LORA, "model.path=/nowhere"], "error: model.path=/nowhere: no config.json there."),
        (["sweeps=demo"], "error: sweeps=demo: a forecast is of one run"),
    ],
)
def test_bad_input_is_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latency", "model=tiny_bert", *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(message) and said.err.count("error: ") == 1 and said.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*LANGUAGE, "--labels", "3"], "--labels 3: a run of task causal_lm (dataset="),
        ([*CLASSIFIER, "--new-tokens", "4"], "--new-tokens 4: a run of task classification (dataset="),
    ],
)
def test_an_option_of_another_task_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["latency", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.endswith("; leave it out.\n")


def test_the_new_tokens_count_as_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latency", *LANGUAGE, "--lengths", "120", "--new-tokens", "9"]) == 2
    assert capsys.readouterr().err.startswith("error: --lengths 120 and --new-tokens 9: tiny_llama reads at most 128")


def test_lists_of_numbers_are_whole_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["latency", *CLASSIFIER, "--batches", "1,x"])
    assert "'1,x': must be whole numbers with commas between them, as 1,16" in capsys.readouterr().err
