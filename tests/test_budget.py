"""The planner: counts and solved ranks against built models, predicted bytes against measured ones, its messages."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_analysis_load import ENVIRONMENT, save_run, save_sweep
from test_analysis_tables import measured
from test_placement import CLASSIFIERS, CONFIGS, WITH_ALL
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from analysis.__main__ import main
from analysis.budget import CANNOT_SAY, DOES_NOT_FIT, FITS, _largest_text, measured_rate, parameters
from analysis.load import LoadError
from harness.config.schema import Device, ModelConfig, Quantization, RunConfig, TargetLayersConfig
from harness.forecast import memory
from harness.forecast.compute import predict_flops
from harness.forecast.fitting import GPU, WORKSPACE_BYTES, LargestBatch, largest_micro_batch
from harness.forecast.memory import MemoryForecast, load_run_data, predict_memory
from harness.forecast.parameters import size_of, solve_rank
from harness.forecast.request import ForecastError, UnmetError, own_configs, read_config
from harness.measure.memory import MemoryPeak
from harness.measure.without_data import floats_without_data
from harness.methods.counts import is_lora
from harness.models.configs import head_of
from harness.models.dropout import draw_key, dropped
from harness.placement.architectures import ARCHITECTURES
from harness.plan import adapt
from harness.results.schema import Status
from harness.run import run

ROOT = Path(__file__).resolve().parent.parent
LORA = ("rank=r8", "target_layers=qv")
LANGUAGE = ("model=tiny_llama", "dataset=friends", "dataset.blocks=cut")
CLASSIFIER = ("model=tiny_bert", "dataset=reuters_r8")


@functools.cache
def composed(*overrides: str) -> RunConfig:
    with own_configs(None):
        return read_config(overrides)


# ---------------------------------------------------------------- parameters


def _of_architecture(model_type: str, folder: Path) -> RunConfig:
    """LoRA on a model of which there is nothing but a config.json."""
    CONFIGS[model_type]().save_pretrained(folder)
    config = composed(*(CLASSIFIER if model_type in CLASSIFIERS else LANGUAGE), *LORA)
    placed = TargetLayersConfig("placed", ["all" if model_type in WITH_ALL else "attention"])
    return replace(
        config, model=ModelConfig(name=model_type, path=str(folder), attention="eager"), target_layers=placed
    )


def _built(model_type: str, config: RunConfig) -> int:
    """Adapter parameters of a model that is really allocated and adapted as in a run."""
    is_classifier = model_type in CLASSIFIERS
    auto = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    model = auto.from_config(CONFIGS[model_type]())
    adapt(model, config, head_of(model, language_model=not is_classifier))
    return sum(value.numel() for name, value in model.named_parameters() if is_lora(name))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_solved_rank_gives_the_count_of_the_built_model(model_type: str, tmp_path: Path) -> None:
    config = _of_architecture(model_type, tmp_path)
    assert config.rank is not None
    at_three = _built(model_type, replace(config, rank=config.rank.at(3)))
    budget = at_three + at_three // 6  # half a rank is left over
    solved = solve_rank(config, budget)
    assert (solved.rank, solved.pattern, solved.num_adapter_params) == (3, {}, at_three)
    assert solved.next_above == at_three // 3 * 4
    by_role = solve_rank(config, budget, per_role=True)
    ranks = replace(config.rank, rank=by_role.rank, pattern=dict(by_role.pattern) or None)
    assert by_role.num_adapter_params == _built(model_type, replace(config, rank=ranks))
    assert 0 <= by_role.residual <= solved.residual


def test_ranks_by_role_leave_the_least_that_one_more_rank_can() -> None:
    config = composed(*CLASSIFIER, "rank=r8", "target_layers=all")
    # Per rank and over two blocks: q, k, v, o take 2 * 128 each, up and down 2 * 192 each.
    per_rank = {"q": 256, "k": 256, "v": 256, "o": 256, "up": 384, "down": 384}
    for budget in (1792 * 2 + 700, 1792 * 5 + 1000, 1792 * 7):
        solved = solve_rank(config, budget, per_role=True)
        left = budget % 1792
        reachable = {
            sum(per_rank[role] for role in roles) for n in range(7) for roles in itertools.combinations(per_rank, n)
        }
        assert solved.residual == min(left - total for total in reachable if total <= left)


def test_roles_with_small_matrices_keep_their_largest_rank_and_the_others_take_the_rest() -> None:
    config = composed(*LANGUAGE, "rank=r8", "target_layers=qv")
    # Queries are 64 -> 64, values 64 -> 32: one rank for both ends at 32.
    with pytest.raises(UnmetError, match=r"the nearest below is rank 32, .*, with 14,336"):
        solve_rank(config, 17_000)
    solved = solve_rank(config, 17_000, per_role=True)
    assert {"q": solved.rank, "v": solved.rank} | dict(solved.pattern) == {"q": 42, "v": 32}
    assert solved.num_adapter_params == 2 * (42 * 128 + 32 * 96)


@pytest.mark.parametrize(
    ("extra", "per_rank", "fixed"),
    [(("variant=dora",), 512, 4 * 64), (("method=loha",), 1024, 0), ((), 512, 0)],
)
def test_what_is_in_no_rank_is_part_of_the_count(extra: tuple[str, ...], per_rank: int, fixed: int) -> None:
    config = composed(*CLASSIFIER, *LORA, *extra)
    solved = solve_rank(config, fixed + 9 * per_rank + per_rank - 1)
    assert (solved.rank, solved.num_adapter_params) == (9, fixed + 9 * per_rank)


def test_a_budget_that_nothing_meets_names_the_nearest() -> None:
    config = composed(*CLASSIFIER, *LORA)
    with pytest.raises(UnmetError, match=r"a budget of 511 .* the nearest above is rank 1 with 512\."):
        solve_rank(config, 511)
    assert solve_rank(config, 512 * 64).rank == 64
    with pytest.raises(UnmetError, match=r"the nearest below is rank 64, .*, with 32,768\."):
        solve_rank(config, 512 * 64 + 1)
    with pytest.raises(UnmetError, match=r"the nearest below is rank 64, .*, with 32,768\."):
        solve_rank(config, 512 * 64 + 1, per_role=True)
    with pytest.raises(ForecastError, match="a budget of 0 adapter parameters: give a whole number"):
        solve_rank(config, 0)
    with pytest.raises(ForecastError, match=r"method=full: has no rank to solve; .* lora"):
        solve_rank(composed(*CLASSIFIER, "method=full"), 1000)


def test_ranks_by_role_need_roles() -> None:
    named = replace(composed(*CLASSIFIER, *LORA), target_layers=TargetLayersConfig("own", modules=[".*query"]))
    assert solve_rank(named, 1000).rank == 3
    with pytest.raises(ForecastError, match=r"target_layers\.modules: names modules and no roles"):
        solve_rank(named, 1000, per_role=True)
    with pytest.raises(ForecastError, match="method=loha: has one rank for all"):
        solve_rank(composed(*CLASSIFIER, *LORA, "method=loha"), 1000, per_role=True)


def test_the_size_of_a_run_by_hand() -> None:
    size = size_of(composed(*CLASSIFIER, *LORA), num_labels=8)
    assert (size.counts.num_adapter_params, size.counts.num_head_params) == (2 * 2 * 8 * 128, 64 * 8 + 8)
    assert size.saved_bytes == 4 * (4096 + 520)
    assert size.placement == {"q": {"num_targets": 2, "ranks": [8]}, "v": {"num_targets": 2, "ranks": [8]}}
    full = size_of(composed(*CLASSIFIER, "method=full"), num_labels=8)
    assert full.counts.num_trainable_params == full.counts.num_total_params
    assert full.saved_bytes == 4 * full.counts.num_total_params


# ---------------------------------------------------------------- the command


def test_the_command_prints_a_ready_override(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", *CLASSIFIER, "target_layers=all", "--parameters", "4.2K", "--per-role"]) == FITS
    out = capsys.readouterr().out
    *_, command = out.splitlines()
    assert command == (
        "python -m harness model=tiny_bert dataset=reuters_r8 target_layers=all rank=r8 rank.rank=2 "
        "'rank.pattern={q:3,k:3}'"
    )
    assert "4,096" in out and "104 (2.48%)" in out


def test_a_table_over_placements_says_which_do_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", *CLASSIFIER, "rank=r4", "--placements", "q,gate,all", "--parameters", "5000"]) == FITS
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines[1:3]] == [["q", "19", "4,864"], ["all", "2", "3,584"]]
    assert lines[3][:2] == ["not", "gate:"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["target_layers=qv", "--parameters", "10"], DOES_NOT_FIT, "error: a budget of 10 adapter parameters: nothing"),
        (["rank=r3", "target_layers=qv"], CANNOT_SAY, "error: rank=r3: no such option. There are: r1,"),
        (["rank"], CANNOT_SAY, "error: rank: is no override; write setting=value"),
        (["sweeps=demo"], CANNOT_SAY, "error: sweeps=demo: a forecast is of one run; of a sweep,"),
        (["method=lora"], CANNOT_SAY, "error: method=lora needs a rank"),
        ([*LORA, "model.path=/nowhere"], CANNOT_SAY, "error: model.path=/nowhere: no config.json there."),
        ([*LORA, "--config-dir", "/nowhere"], CANNOT_SAY, "error: --config-dir=/nowhere: no such folder."),
        (["method=full", "--parameters", "5M"], CANNOT_SAY, "error: method=full"),
    ],
)
def test_bad_input_is_one_message(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["budget", "model=tiny_bert", *words]) == code
    said = capsys.readouterr()
    assert said.err.startswith(message) and said.out == ""


def test_a_wrong_override_is_refused_before_torch_is_imported() -> None:
    program = (
        "import sys; from analysis.__main__ import main; code = main(['budget', 'model=tiny_bert', 'rank=r3']);"
        "print(code, [name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == f"{CANNOT_SAY} []\n"
    assert ended.stderr.startswith("error: rank=r3: no such option.")


def test_numbers_of_parameters_as_people_write_them() -> None:
    assert [parameters(text) for text in ("300000", "0.3M", "18,874,368", "1b", "4_718_592")] == [
        300_000,
        300_000,
        18_874_368,
        10**9,
        4_718_592,
    ]


# ---------------------------------------------------------------- memory

CELLS = [
    # Classifier or language model, and what differs from its defaults.
    (CLASSIFIER, (*LORA, "trainer.batch_size=4")),
    (CLASSIFIER, ("rank=r1", "target_layers=all", "trainer.batch_size=4")),
    (CLASSIFIER, (*LORA, "trainer.batch_size=8", "trainer.micro_batch_size=4")),
    (CLASSIFIER, (*LORA, "trainer.batch_size=16", "trainer.micro_batch_size=2", "dataset.max_length=64")),
    (CLASSIFIER, (*LORA, "target_layers.blocks=last_half", "dataset.max_length=16")),
    (CLASSIFIER, (*LORA, "model.attention=eager", "model.dropout=0.1", "method.adapter_dropout=0.1")),
    (CLASSIFIER, (*LORA, "model.dropout=0.1", "method.adapter_dropout=0.1")),
    (LANGUAGE, (*LORA, "model.dropout=0.1", "trainer.batch_size=2", "trainer.gradient_checkpointing=true")),
    (LANGUAGE, (*LORA, "method.adapter_dropout=0.1", "trainer.batch_size=2", "trainer.precision=bf16")),
    (CLASSIFIER, (*LORA, "variant=dora", "trainer.batch_size=3")),
    (CLASSIFIER, (*LORA, "variant=bias_all", "trainer.max_gradient_norm=null")),
    (CLASSIFIER, ("method=full", "trainer.gradient_checkpointing=true", "dataset.max_length=64")),
    (CLASSIFIER, ("method=full", "trainer.precision=bf16", "trainer.optimizer=lion")),
    (CLASSIFIER, ("method=head_only", "trainer.batch_size=5")),
    (CLASSIFIER, ("method=bitfit", "trainer.label_smoothing=0.1")),
    (CLASSIFIER, ("target_layers=qv", "method=ia3")),
    (CLASSIFIER, ("method=norms", "trainer.batch_size=4")),
    (LANGUAGE, ("method=full", "trainer.batch_size=4")),
    (LANGUAGE, ("method=full", "trainer.batch_size=4", "trainer.loss_chunk_tokens=100", "trainer.optimizer=muon")),
    (LANGUAGE, (*LORA, "trainer.batch_size=2", "trainer.gradient_checkpointing=true")),
    (LANGUAGE, ("rank=r8", "target_layers=all_lm_head", "trainer.batch_size=4", "trainer.loss_chunk_tokens=0")),
    (LANGUAGE, ("rank=r16", "target_layers=all", "model.dtype=bfloat16", "trainer.precision=bf16")),
    (LANGUAGE, (*LORA, "dataset.blocks=packed", "trainer.batch_size=4", "trainer.micro_batch_size=2")),
    (LANGUAGE, (*LORA, "rank.pattern={v:2}", "trainer.optimizer=sgd", "dataset.max_length=48")),
    (LANGUAGE, (*LORA, "model=tiny_gpt2", "trainer.batch_size=4", "trainer.optimizer=sgd")),
    (LANGUAGE, (*LORA, "model=tiny_gpt2", "target_layers=all_embedding", "trainer.batch_size=4")),
]


def _short(task: tuple[str, ...], overrides: tuple[str, ...]) -> RunConfig:
    """A run of few tokens; of two values of a setting the last one holds."""
    words = (*task, "dataset.max_length=32", "trainer.eval_batch_size=4", *overrides)
    return composed(*{word.partition("=")[0]: word for word in words}.values())


@pytest.mark.parametrize(("task", "overrides"), CELLS)
def test_predicted_bytes_are_measured_bytes(task: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    config = _short(task, overrides)
    # The same steps with data, on a model of random weights.
    found = memory.step_and_scoring(config, memory.full_batches(config, 3))
    assert predict_memory(config, num_labels=3) == found
    assert found.step.weights_bytes > 0 and found.step.activations_bytes > 0


# The runs of a pack, and what each overrides.
PACKS = {
    "rates": (CLASSIFIER, LORA, [[], [], []]),
    "seeds": (CLASSIFIER, LORA, [["seed=1"], ["seed=2"], ["seed=3"], ["seed=4"]]),
    "ranks": (
        CLASSIFIER,
        ("rank=r1", "target_layers=all"),
        [[], ["rank=r8", "seed=1"], ["rank=r16", "target_layers=q"]],
    ),
    "batches": (CLASSIFIER, LORA, [["trainer.batch_size=2"], ["trainer.batch_size=8", "trainer.micro_batch_size=4"]]),
    "heads": (CLASSIFIER, ("method=head_only",), [["trainer.learning_rate=1e-2"], ["trainer.learning_rate=1e-3"]]),
    "upper half": (CLASSIFIER, (*LORA, "target_layers.blocks=last_half"), [[], ["trainer.optimizer=lion"]]),
    "language": (LANGUAGE, (*LORA, "trainer.batch_size=2"), [["rank=r2"], ["seed=5"]]),
    "checkpointing": (LANGUAGE, (*LORA, "trainer.gradient_checkpointing=true", "trainer.batch_size=2"), [[], []]),
    "dropout": (CLASSIFIER, (*LORA, "method.adapter_dropout=0.1"), [[], ["seed=2"]]),
    "bfloat16": (LANGUAGE, (*LORA, "trainer.precision=bf16", "trainer.batch_size=2"), [["seed=1"], ["seed=2"]]),
}


@pytest.mark.parametrize("as_on_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", PACKS)
def test_predicted_bytes_of_a_pack_are_measured_bytes(name: str, as_on_gpu: bool) -> None:
    task, shared, own = PACKS[name]
    configs = [_short(task, (*shared, *each)) for each in own]
    data = [memory.full_batches(config, 3) for config in configs]
    measured_peak = memory.pack_peak(configs, data, as_on_gpu=as_on_gpu)
    with floats_without_data():
        assert memory.pack_peak(configs, data, as_on_gpu=as_on_gpu) == measured_peak
    alone = [memory.step_and_scoring(*each, as_on_gpu=as_on_gpu).step for each in zip(configs, data, strict=True)]
    # One base for all, and the optimizers' states of all.
    assert measured_peak.weights_bytes < sum(each.weights_bytes for each in alone)
    assert measured_peak.total_bytes > max(each.total_bytes for each in alone)


def test_a_pack_of_equal_runs() -> None:
    config = _short(CLASSIFIER, LORA)
    alone, pack = predict_memory(config), memory.predict_pack_memory(config, 4)
    assert memory.predict_pack_memory(config, 1) == alone
    more = pack.step.weights_bytes - alone.step.weights_bytes
    assert more % 3 == 0 and more // 3 >= 4 * size_of(config).counts.num_trainable_params
    # One scores, and what the others keep is there as well.
    assert pack.scoring.optimizer_bytes == 4 * alone.step.optimizer_bytes > 0
    assert pack.scoring.activations_bytes == alone.scoring.activations_bytes
    assert pack.peak_bytes < 4 * alone.peak_bytes
    refused = {
        ("method=full",): "trains the base",
        (*LORA, "model.dropout=0.1"): "draws one mask for all rows",
        (*LORA, "trainer.precision=fp16"): "scales the loss of each run",
        ("target_layers=qv", "method=ia3"): "is computed by the peft package",
        (*LORA, "method.adapter_dropout=0.1"): "keeps a random state for each run on the CPU alone",
    }
    for overrides, reason in refused.items():
        with pytest.raises(ForecastError, match=rf"computed alone in its pack: .*{reason}.*; leave the pack out"):
            memory.predict_pack_memory(_short(CLASSIFIER, overrides), 2, on_gpu=True)


def test_a_pack_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["budget", *CLASSIFIER, *LORA, "trainer.batch_size=4", "trainer.eval_batch_size=4", "dataset.max_length=32"]
    pack = memory.predict_pack_memory(composed(*words[1:]), 3, on_gpu=True)
    fitting = ["--pack", "3", "--headroom", "0", "--gpu"]
    assert main([*words, *fitting, str(pack.peak_bytes / 1e9)]) == FITS
    printed = capsys.readouterr().out
    assert "of a step of 3 runs" in printed and f"{pack.step.total_bytes:,}" in printed
    assert main([*words, *fitting, str((pack.peak_bytes - 1) / 1e9), "--largest-batch"]) == DOES_NOT_FIT
    assert "largest micro-batch: 3 examples; of this run's 4 trainer.micro_batch_size=2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*words, "--memory", "--pack", "none"])
    assert "'none': must be a number of runs" in capsys.readouterr().err


# What is given beside an ordinary run, and what is said of it.
UNUSED = {
    ("--pack", "3"): "--pack 3: is of --memory or --gpu, not given here",
    ("--largest-batch",): "--largest-batch: is of --gpu, not given here",
    ("--data",): "--data: is of --memory or --gpu or --compute or --rate or --rate-of, not given here",
    ("--memory", "--headroom", "0.2"): "--headroom 0.2: is of --gpu, not given here",
    ("--per-role",): "--per-role: is of --parameters, not given here",
    ("--placements", "q,qv", "--gpu", "24", "--pack", "2"): "leave out --gpu 24 --pack 2, or ask for one placement",
    ("--gpu", "inf"): "--gpu inf: a GPU has more than 0 GB",
    ("--audit", "a.yaml", "--memory"): "is of parameter counts alone; leave out --memory.",
    ("--audit", "a.yaml", "--labels", "3"): "is of parameter counts alone; leave out --labels 3.",
}


@pytest.mark.parametrize("options", UNUSED)
def test_no_option_is_ignored(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [] if "--audit" in options else [*CLASSIFIER, *LORA]
    assert main(["budget", *overrides, *options]) == CANNOT_SAY
    printed = capsys.readouterr()
    assert UNUSED[options] in printed.err and printed.out == ""


def test_a_regression_has_one_output(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["dataset=glue_stsb", "model=tiny_bert", *LORA]
    assert main(["budget", *words]) == FITS
    printed = capsys.readouterr().out
    assert f"{size_of(composed(*words), num_labels=2).counts.num_head_params:,}" == "65"
    assert "65" in printed.splitlines()[1].split()
    assert main(["budget", *words, "--labels", "1"]) == CANNOT_SAY
    assert "--labels 1: a run of task regression (dataset=glue_stsb) has one output" in capsys.readouterr().err


def test_counts_are_those_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*CLASSIFIER, *LORA, "dataset.num_train_examples=60", "dataset.num_eval_examples=60"]
    assert main(["budget", *words, "--memory", "--data"]) == FITS
    counts = size_of(composed(*words), num_labels=8).counts
    assert f"{counts.num_head_params:,}" in capsys.readouterr().out.splitlines()[1]
    assert main(["budget", *words, "--memory", "--data", "--labels", "3"]) == CANNOT_SAY
    assert capsys.readouterr().err == "error: --labels 3: the data has 8; leave it out, or --data.\n"
    assert main(["budget", *LANGUAGE, *LORA, "--labels", "3"]) == CANNOT_SAY
    assert "--labels 3: a run of task causal_lm" in capsys.readouterr().err
    assert main(["budget", *LANGUAGE, "rank=r4", "--placements", "q,qv", "--labels", "3"]) == CANNOT_SAY
    printed = capsys.readouterr()
    assert printed.err.startswith("error: --labels 3: a run of task causal_lm") and printed.out == ""
    with pytest.raises(SystemExit):
        main(["budget", *words, "--labels", "0"])
    assert "'0': must be a number of outputs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "none; not one example fits"),
        (3, "3 examples; of this run's 16 trainer.micro_batch_size=2"),
        (16, "16 examples; of this run's 16 trainer.micro_batch_size=16"),
        (94, "94 examples; as one batch trainer.batch_size=94, of this run's 16 all"),
    ],
)
def test_what_is_printed_of_the_largest_batch_can_be_set(size: int | None, text: str) -> None:
    config = composed(*CLASSIFIER, *LORA, "trainer.batch_size=16")
    assert _largest_text(LargestBatch(size, None, 4096), config) == text


def test_a_gpu_too_small_for_scoring_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["budget", *CLASSIFIER, *LORA, "trainer.batch_size=1", "trainer.eval_batch_size=512"]
    assert main([*words, "--gpu", "0.02", "--largest-batch"]) == DOES_NOT_FIT
    assert "scoring does not fit; lower trainer.eval_batch_size=512" in capsys.readouterr().out


def test_a_mask_without_data_makes_nothing_with_data() -> None:
    with floats_without_data():
        x = torch.empty(8, 8)
        assert isinstance(dropped(x, 0.5, draw_key()), FakeTensor)


def test_a_pack_whose_pass_fails_is_no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.methods.packed.PackedModel.outputs", lambda *_, **__: 1 / 0)
    with pytest.raises(ForecastError, match="computed alone in its pack: ZeroDivisionError"):
        memory.predict_pack_memory(_short(CLASSIFIER, LORA), 2)


RUNS = {
    "classifier": ("model=tiny_bert", "dataset=local", *LORA, "trainer.batch_size=4", "trainer.micro_batch_size=2"),
    "packed": ("model=tiny_llama", "dataset=local_text", "dataset.blocks=packed", "method=full"),
    "completion": ("model=tiny_gpt2", "dataset=local_completion", "dataset.prompt_template='{text}: '", *LORA),
}


@pytest.mark.parametrize("task", RUNS)
def test_predicted_from_its_data_a_run_measures_the_same(task: str, tmp_path: Path) -> None:
    rows = [f"{'some text ' * (number % 5 + 1)}{number},{('good', 'bad')[number % 2]}" for number in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows, ""]), encoding="utf-8")
    extra = ["dataset.target_column=label"] if task == "completion" else []
    config = composed(
        *RUNS[task],
        *extra,
        f"dataset.train_file={tmp_path}/rows.csv",
        f"runs_dir={tmp_path}/runs",
        "trainer=debug",
        "tracking=off",
        "dataset.max_length=64",
    )
    result = run(config)
    assert result.status is Status.FINISHED
    forecast = predict_memory(config, data=load_run_data(config))
    assert forecast.step.as_metrics() == {name: result.metrics[name] for name in forecast.step.as_metrics()}
    compute = predict_flops(config, data=load_run_data(config))
    assert compute.is_exact and compute.run_flops == result.metrics["train_flops"]
    assert compute.num_steps == result.metrics["num_steps"]
    full = predict_flops(config)
    assert full.step_flops >= compute.step_flops
    # Full batches of the longest examples need no less.
    assert predict_memory(config, num_labels=2).step.total_bytes >= forecast.step.total_bytes


def test_for_a_gpu_lora_keeps_what_it_keeps_there() -> None:
    """Autograd's own products keep `x A^T`: of 32 x 32 tokens, rank 8 and 4 adapters, on the CPU recomputed."""
    wanted = composed(*CLASSIFIER, *LORA, "dataset.max_length=32", "trainer.batch_size=32")
    on_cpu, on_gpu = (predict_memory(replace(wanted, device=device)) for device in (Device.cpu, Device.cuda))
    more = on_gpu.step.activations_bytes - on_cpu.step.activations_bytes
    assert 0 < more <= 32 * 32 * 8 * 4 * 4
    assert on_gpu.step.weights_bytes == on_cpu.step.weights_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predicted_for_a_gpu_is_measured_there(tmp_path: Path, precision: str) -> None:
    rows = [f"{'some text ' * (number % 5 + 1)}{number},{('good', 'bad')[number % 2]}" for number in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows, ""]), encoding="utf-8")
    config = composed(
        *RUNS["classifier"],
        f"dataset.train_file={tmp_path}/rows.csv",
        f"runs_dir={tmp_path}/runs",
        "trainer=debug",
        "tracking=off",
        "device=cuda",
        "allow_busy_device=true",
        f"trainer.precision={precision}",
    )
    result = run(config)
    assert result.status is Status.FINISHED, result.error
    forecast = predict_memory(config, data=load_run_data(config))
    assert forecast.step.total_bytes == pytest.approx(result.metrics["peak_memory_bytes"], rel=0.01)
    # What the allocator rounds up is in no prediction.
    assert 0 <= result.metrics["cuda_peak_allocated_bytes"] - forecast.step.total_bytes < WORKSPACE_BYTES + 12 * 2**20


def test_nothing_changes_outside_of_a_prediction() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    predict_memory(composed(*CLASSIFIER, *LORA))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.ones(2).sum() == 2


def test_what_cannot_be_predicted_says_so() -> None:
    with pytest.raises(ForecastError, match=r"model\.quantization=nf4: bitsandbytes does not run without data"):
        predict_memory(replace(composed(*LANGUAGE, *LORA), model=ModelConfig("x", quantization=Quantization.nf4)))
    with pytest.raises(ForecastError, match=r"trainer\.optimizer=adafactor: a step of tiny_llama looks at the values"):
        predict_memory(composed(*LANGUAGE, *LORA, "trainer.optimizer=adafactor"))
    with pytest.raises(ForecastError, match=r"method=loha, .* looks at the values"):
        predict_memory(composed(*CLASSIFIER, *LORA, "method=loha"))
    with pytest.raises(ForecastError, match="could not be loaded with attention=flash_attention_2"):
        predict_memory(composed(*LANGUAGE, *LORA, "model.attention=flash_attention_2"))


# ---------------------------------------------------------------- compute


def test_operations_and_hours_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*CLASSIFIER, *LORA, "trainer.batch_size=4", "dataset.max_length=32", "trainer.num_epochs=null"]
    by_hand = predict_flops(composed(*words, "trainer.max_steps=10"))
    assert by_hand.run_flops == 10 * by_hand.step_flops and not by_hand.is_exact
    assert by_hand.hours(by_hand.step_flops / 3600) == 10
    rate = str(by_hand.step_flops / 3600)
    assert main(["budget", *words, "trainer.max_steps=10", "--rate", rate]) == FITS
    out = capsys.readouterr().out
    assert f"{by_hand.run_flops:,}" in out and out.split()[-4:] == ["hours", "of", "training", "10"]
    assert main(["budget", *words, "trainer.max_steps=10", "--rate", rate, "--placements", "q,qv"]) == FITS
    header, q, qv = capsys.readouterr().out.splitlines()
    assert header.split()[-2:] == ["operations", "hours"] and q.split()[0] == "q"
    assert qv.split()[-2:] == [f"{by_hand.run_flops:,}", "10"]
    assert main(["budget", *CLASSIFIER, *LORA, "--compute"]) == FITS
    assert "known from the data alone; add --data, or set trainer.max_steps" in capsys.readouterr().out


def test_a_rate_comes_from_finished_runs_of_one_device(tmp_path: Path) -> None:
    for number, seconds in enumerate((1.0, 2.0, 4.0)):
        save_run(tmp_path, f"r{number}", seed=number, metrics=measured(train_flops=8e9, train_seconds=seconds))
    save_run(tmp_path, "broken", seed=9, status="failed", error="no", metrics=measured(train_flops=1.0))
    save_sweep(tmp_path, "mine", ["r0", "r1", "r2", "broken"])
    rate = measured_rate(tmp_path, "mine")
    assert rate.flops_per_second == 4e9
    assert rate.origin.startswith("median of 3 finished runs of mine on ") and rate.origin.endswith(", 2e+09 to 8e+09")
    assert measured_rate(tmp_path, "r2").flops_per_second == 2e9
    with pytest.raises(LoadError, match="--rate-of broken: none of its runs has finished with train_flops"):
        measured_rate(tmp_path, "broken")
    elsewhere = ENVIRONMENT | {"device_name": "another"}
    save_run(tmp_path, "e", seed=7, environment=elsewhere, metrics=measured(train_flops=8e9, train_seconds=1.0))
    save_sweep(tmp_path, "both", ["r0", "e"])
    with pytest.raises(LoadError, match=r"--rate-of both: its runs were made on .* and on .*; name one run of them"):
        measured_rate(tmp_path, "both")


def test_what_has_no_count_of_operations_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", *CLASSIFIER, *LORA, "variant=dora", "--compute"]) == CANNOT_SAY
    assert "its operations are not known, and no run records them. DoRA" in capsys.readouterr().err
    assert main(["budget", *CLASSIFIER, *LORA, "--rate", "1e12", "--rate-of", "demo"]) == CANNOT_SAY
    assert "error: --rate 1e+12 --rate-of demo: give one of them." in capsys.readouterr().err


# ---------------------------------------------------------------- tensors without data


def test_floats_have_no_data_and_integers_have() -> None:
    with floats_without_data():
        weight = torch.empty(2**20, 2**20)  # 4 TiB
        mask = torch.arange(6).view(2, 3) > 2
        assert mask.sum().item() == 3 and bool(mask[1].all())
        chosen = torch.ones(2, 3, 5)[mask]
        assert chosen.shape == (3, 5)
        assert (weight @ weight[:, :2]).shape == (2**20, 2)
        with pytest.raises(DataDependentOutputException):
            weight.sum().item()


# ---------------------------------------------------------------- what fits


def test_whether_a_run_fits_is_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    run_of = [*CLASSIFIER, *LORA, "trainer.batch_size=4", "dataset.max_length=32"]
    words = ["budget", *run_of, "--headroom", "0"]
    peak = predict_memory(composed(*run_of)).peak_bytes
    assert main([*words, "--gpu", str(peak / 1e9)]) == FITS
    printed = capsys.readouterr().out
    assert f"{peak:,}" in printed
    (allocated,) = (line for line in printed.splitlines() if line.startswith("allocated on a GPU, about"))
    assert f"{peak + 64 * 2**20:,}" in allocated
    assert main([*words, "--gpu", str((peak - 1) / 1e9)]) == DOES_NOT_FIT
    assert "does not fit" in capsys.readouterr().out
    assert main(["budget", *run_of, "trainer.optimizer=adafactor", "--gpu", "80"]) == CANNOT_SAY


@pytest.mark.parametrize("bend", [0, 7])
@pytest.mark.parametrize("limit", [9, 10, 11, 15, 57, 1000, 10**6])
def test_the_largest_batch_is_the_last_that_fits(limit: int, bend: int) -> None:
    tried: list[int] = []

    def bytes_of(size: int) -> int:
        return 7 + 3 * size + bend * (size > 4)

    def predict(config: RunConfig) -> MemoryForecast:
        size = config.trainer.micro_batch_size
        assert size is not None and size <= config.trainer.batch_size
        tried.append(size)
        return MemoryForecast(MemoryPeak(bytes_of(size), 0, 0, 0), MemoryPeak(0, 0, 0, 0))

    device = GPU(limit / 1e9, headroom=0)
    found = largest_micro_batch(composed(*CLASSIFIER, *LORA), device, at_most=512, predict=predict)
    fitting = [size for size in range(1, 513) if bytes_of(size) <= limit]
    assert found.micro_batch_size == max(fitting, default=None)
    assert len(tried) == len(set(tried)) <= 7
