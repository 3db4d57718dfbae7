"""A config that must not be run is refused with a text that helps; one that may be run survives JSON."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf, open_dict

from harness.config import composing
from harness.config.composing import compose, from_composed, from_dict, register, to_dict
from harness.config.schema import AlphaPolicy, RankConfig, RunConfig
from harness.config.validation import ConfigError, find_problems
from harness.results.methods import METHODS

Values = dict[str, Any]

VALID: Values = {
    "model": {"name": "tiny_bert", "tiny": "bert"},
    "dataset": {"name": "mine", "train_file": "train.csv"},
    "method": {"name": "lora"},
    "rank": {"rank": 8, "alpha": 16},
    "target_layers": {"name": "qv", "projections": ["q", "v"]},
    "trainer": {"num_epochs": 3},
}
FULL: Values = {"method.name": "full", "rank": None, "target_layers": None}


def _values(changes: Values | None = None) -> Values:
    """The valid config with `changes`, by dotted name."""
    values = copy.deepcopy(VALID)
    for name, value in (changes or {}).items():
        *groups, last = name.split(".")
        node = values
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return values


def _config(changes: Values | None = None) -> RunConfig:
    return from_dict(_values(changes))


def _problems(changes: Values) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        _config(changes)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


# ---------------------------------------------------------------- interpolation


def test_what_hydra_composes_may_point_at_other_settings() -> None:
    config = from_composed(OmegaConf.create(_values({"dataset.label_column": "${dataset.name}_label"})))
    assert config.dataset.label_column == "mine_label"
    with pytest.raises(
        ConfigError, match=r"^trainer\.learning_rate: Interpolation key 'method\.lr' not found; where the text"
    ):
        from_composed(OmegaConf.create(_values({"trainer.learning_rate": "${method.lr}"})))


@pytest.mark.parametrize("text", ["${seed} {text}", "\\${seed} {text}", "${ {text}", "$\\{{text}", "a\\\\${x"])
def test_a_resolved_config_is_read_back_to_the_letter(text: str) -> None:
    config = _config({"dataset.label_column": text})
    assert config.dataset.label_column == text
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


# ---------------------------------------------------------------- what is wrong, and how it is said

KNOWN_ROLES = (
    "q, k, v, o, qkv, up, down, gate, gate_up, rec_in, rec_gate, rec_beta, rec_decay, rec_out, embedding, attention, "
    "mlp, recurrent, all"
)
BLOCKS = "all, first_half, last_half, first_N, last_N (N from 1), or a list of indices such as [0,2,5]"
NAMES = "letters, digits, '.', '_' and '-' only, beginning with a letter or digit"
SOURCES = (
    "exactly one of model.asset, model.hub_id, model.tiny, model.run, model.scratch must be set (or model.path, a "
    "local folder)"
)
NO_DATA = (
    "dataset: no data named. Set dataset.train_file=FILE (CSV, JSON lines or Parquet), or choose a dataset that names "
    "an asset or a hub id."
)
METRICS = "dataset.metrics / dataset.best_metric"

PROBLEMS: list[tuple[Values, list[str]]] = [
    # model
    ({"model.name": "my model"}, [f"model.name='my model': {NAMES}."]),
    ({"model.name": ""}, [f"model.name='': {NAMES}."]),
    ({"model.name": "../up"}, [f"model.name='../up': {NAMES}."]),
    ({"model.tiny": None}, [f"model: {SOURCES}, got none."]),
    ({"model.asset": "minilm"}, [f"model: {SOURCES}, got model.asset and model.tiny."]),
    (
        {"model.tiny": None, "model.hub_id": "a/b"},
        ["model.revision: a hub model needs a pinned revision (a commit hash, or main)."],
    ),
    ({"model.dropout": 1.0}, ["model.dropout=1.0: allowed is 0 <= dropout < 1."]),
    ({"model.dropout": math.nan}, ["model.dropout=nan: allowed is 0 <= dropout < 1."]),
    # dataset
    ({"dataset.name": "-r8"}, [f"dataset.name='-r8': {NAMES}."]),
    ({"dataset.train_file": None}, [NO_DATA]),
    (
        {"dataset.asset": "reuters_r8", "dataset.hub_id": "nyu-mll/glue", "dataset.train_file": None},
        ["dataset: asset=reuters_r8 and hub_id=nyu-mll/glue both name data; set one to null."],
    ),
    ({"dataset.text_columns": []}, ["dataset.text_columns=[]: one or two columns are allowed."]),
    (
        {"dataset.text_columns": ["a", "b", "c"]},
        ["dataset.text_columns=['a', 'b', 'c']: one or two columns are allowed."],
    ),
    (
        {"dataset.metrics": ["accuracy", "bleu"]},
        [f"{METRICS}: 'bleu' is not a metric of task classification; allowed: accuracy, nll, f1, mcc."],
    ),
    (
        {"dataset.task": "regression"},
        [f"{METRICS}: 'accuracy' is not a metric of task regression; allowed: pearson, spearman, mse."],
    ),
    (
        {"dataset.best_metric": "f1"},
        ["dataset.best_metric=f1: must be nll or one of dataset.metrics=[accuracy]; add it there."],
    ),
    (
        {"dataset.task": "regression", "dataset.metrics": ["spearman", "mse"], "dataset.best_metric": "pearson"},
        ["dataset.best_metric=pearson: must be mse or one of dataset.metrics=[spearman,mse]; add it there."],
    ),
    ({"dataset.val_fraction": 0.0}, ["dataset.val_fraction=0.0: allowed is 0 < val_fraction < 1."]),
    ({"dataset.test_fraction": 1.0}, ["dataset.test_fraction=1.0: allowed is 0 < test_fraction < 1."]),
    (
        {"dataset.positive_label": "good"},
        [
            "dataset.positive_label='good': names the class of the metric f1, which is not among "
            "dataset.metrics=[accuracy]; add it there, or set it to null."
        ],
    ),
    ({"dataset.num_train_examples": 1}, ["dataset.num_train_examples=1: at least 2, or null for all rows."]),
    ({"dataset.max_length": 3}, ["dataset.max_length=3: at least 4 tokens."]),
    # method
    ({"rank": None}, ["method=lora needs a rank and has no hidden default: add rank=r8 (r1 to r1024)."]),
    ({"target_layers": None}, ["method=lora needs target layers: add target_layers=qv (q, v, qkvo, mlp, all, ...)."]),
    ({"method.adapter_dropout": -0.1}, ["method.adapter_dropout=-0.1: allowed is 0 <= dropout < 1."]),
    (
        {**FULL, "rank": {"rank": 8, "alpha": 16}},
        ["method=full takes no rank: leave rank=... out, or use method=lora."],
    ),
    (
        {"method.name": "head_only", "rank": None},
        ["method=head_only takes no target_layers: leave target_layers=... out, or use method=lora."],
    ),
    ({**FULL, "method.adapter_dropout": 0.1}, ["method=full has no adapter: method.adapter_dropout must be 0."]),
    # rank
    ({"rank.rank": 0}, ["rank.rank=0: at least 1."]),
    ({"rank.alpha": None}, ["rank.alpha=None: rank.alpha_policy=fixed needs a finite number above 0."]),
    ({"rank.alpha": 0}, ["rank.alpha=0.0: rank.alpha_policy=fixed needs a finite number above 0."]),
    ({"rank.alpha": math.inf}, ["rank.alpha=inf: rank.alpha_policy=fixed needs a finite number above 0."]),
    (
        {"rank.alpha_policy": "rslora", "rank.alpha": math.nan},
        ["rank.alpha=nan: rank.alpha_policy=rslora needs a finite number above 0."],
    ),
    (
        {"rank.alpha_policy": "proportional"},
        [
            "rank.alpha_per_rank=None: rank.alpha_policy=proportional needs a finite number above 0.",
            "rank.alpha=16.0: not used with rank.alpha_policy=proportional; set it to null.",
        ],
    ),
    (
        {"rank.alpha_per_rank": 2},
        ["rank.alpha_per_rank=2.0: not used with rank.alpha_policy=fixed; set it to null."],
    ),
    # target layers
    ({"target_layers.name": "q v"}, [f"target_layers.name='q v': {NAMES}."]),
    (
        {"target_layers.projections": []},
        ["target_layers: set either projections or modules (regular expressions), not both or neither."],
    ),
    (
        {"target_layers.modules": [".*query"]},
        ["target_layers: set either projections or modules (regular expressions), not both or neither."],
    ),
    (
        {"target_layers.projections": ["q", "query"]},
        [f"target_layers.projections: query unknown; known: {KNOWN_ROLES}."],
    ),
    ({"target_layers.projections": ["attention", "q"]}, ["target_layers.projections: q named twice."]),
    ({"target_layers.blocks": "middle"}, [f"target_layers.blocks='middle': allowed: {BLOCKS}."]),
    ({"target_layers.blocks": None}, [f"target_layers.blocks=None: allowed: {BLOCKS}."]),
    ({"target_layers.blocks": [0, -1]}, [f"target_layers.blocks=[0, -1]: allowed: {BLOCKS}."]),
    (
        {"target_layers.projections": [], "target_layers.modules": ["(.*query"]},
        [
            "target_layers.modules: '(.*query' is not a regular expression "
            "(missing ), unterminated subpattern at position 0)."
        ],
    ),
    (
        {"target_layers.projections": [], "target_layers.modules": [".*query"], "target_layers.blocks": "last_half"},
        [
            "target_layers.blocks=last_half: narrows projections alone; with target_layers.modules leave it at all and "
            "name the blocks in the expressions."
        ],
    ),
    # trainer
    (
        {"trainer.num_epochs": None},
        ["trainer: exactly one of num_epochs=None and max_steps=None must be set; set the other to null."],
    ),
    (
        {"trainer.max_steps": 10},
        ["trainer: exactly one of num_epochs=3.0 and max_steps=10 must be set; set the other to null."],
    ),
    ({"trainer.num_epochs": 0}, ["trainer.num_epochs=0.0: allowed is a finite number above 0."]),
    ({"trainer.num_epochs": math.inf}, ["trainer.num_epochs=inf: allowed is a finite number above 0."]),
    ({"trainer.num_epochs": None, "trainer.max_steps": 0}, ["trainer.max_steps=0: allowed is at least 1."]),
    ({"trainer.learning_rate": 0}, ["trainer.learning_rate=0.0: allowed is a finite number above 0."]),
    ({"method.learning_rate": -1}, ["trainer.learning_rate=-1.0: allowed is a finite number above 0."]),
    ({"trainer.learning_rate": math.nan}, ["trainer.learning_rate=nan: allowed is a finite number above 0."]),
    ({"trainer.batch_size": 0}, ["trainer.batch_size=0: allowed is at least 1."]),
    ({"trainer.micro_batch_size": 5}, ["trainer.micro_batch_size=5: must divide trainer.batch_size=16."]),
    ({"trainer.micro_batch_size": 0}, ["trainer.micro_batch_size=0: must divide trainer.batch_size=16."]),
    ({"trainer.warmup_fraction": 1}, ["trainer.warmup_fraction=1.0: allowed is 0 <= fraction < 1."]),
    ({"trainer.weight_decay": -0.1}, ["trainer.weight_decay=-0.1: allowed is 0 or a finite number above."]),
    ({"trainer.beta1": 1}, ["trainer.beta1=1.0: allowed is 0 <= beta1 < 1."]),
    ({"trainer.beta2": -1}, ["trainer.beta2=-1.0: allowed is 0 <= beta2 < 1."]),
    ({"trainer.adam_epsilon": 0}, ["trainer.adam_epsilon=0.0: allowed is a finite number above 0."]),
    (
        {"trainer.max_gradient_norm": 0},
        ["trainer.max_gradient_norm=0.0: allowed is a finite number above 0, or null for no clipping."],
    ),
    ({"trainer.eval_every": -1}, ["trainer.eval_every=-1: allowed is 0 (only at the end) or a number of steps."]),
    ({"trainer.eval_batch_size": 0}, ["trainer.eval_batch_size=0: allowed is at least 1."]),
    (
        {"trainer.checkpoint_every": -1},
        ["trainer.checkpoint_every=-1: allowed is 0 (only when asked to stop) or a number of steps."],
    ),
    # across groups
    (
        {"model.dtype": "bfloat16"},
        ["model.dtype=bfloat16 needs trainer.precision=bf16 or fp16, got fp32."],
    ),
    (
        {**FULL, "model.dtype": "float16", "trainer.precision": "fp16"},
        [
            "model.dtype=float16: method=full trains float32 weights; set model.dtype=float32 (trainer.precision=bf16 "
            "computes in bfloat16)."
        ],
    ),
    # the run
    ({"seed": -1}, ["seed=-1: allowed is 0 to 4294967295."]),
    ({"seed": 2**32}, ["seed=4294967296: allowed is 0 to 4294967295."]),
    ({"sweep": "a/b"}, [f"sweep='a/b': {NAMES}."]),
    ({"num_threads": 0}, ["num_threads=0: at least 1, or null for PyTorch's choice."]),
    ({"tracking.log_every": 0}, ["tracking.log_every=0: at least 1 step."]),
    # what OmegaConf does not accept
    ({"model.name": "???"}, ["model.name: a value is needed and none was given."]),
    ({"seed": "abc"}, ["seed: Value 'abc' of type 'str' could not be converted to Integer."]),
    ({"seed": None}, ["seed: Incompatible value 'None' for field of type 'int'."]),
    ({"seed": True}, ["seed: Value 'True' of type 'bool' could not be converted to Integer."]),
    (
        {"trainer.batch_size": 1.5},
        ["trainer.batch_size: Value '1.5' of type 'float' could not be converted to Integer."],
    ),
    (
        {"trainer.batch_size": "not in"},
        ["trainer.batch_size: Value 'not in' of type 'str' could not be converted to Integer."],
    ),
    (
        {"trainer.learning_rate": "fast"},
        ["trainer.learning_rate: Value 'fast' of type 'str' could not be converted to Float."],
    ),
    (
        {"method.name": "LoRA"},
        [
            "method.name=LoRA: no such method; there are lora, full, head_only, bitfit, norms, and of the peft "
            f"package {', '.join(name for name, method in METHODS.items() if method.peft is not None)}."
        ],
    ),
    ({"device": "gpu"}, ["device: Invalid value 'gpu', expected one of [auto, cpu, cuda, mps]."]),
    (
        {"dataset.text_columns": "text"},
        ["dataset.text_columns: a list is needed, such as dataset.text_columns=[a,b]."],
    ),
    ({"trainer": None}, ["trainer: field 'trainer' is not Optional."]),
]


@pytest.mark.parametrize(("changes", "expected"), PROBLEMS, ids=[str(changes) for changes, _ in PROBLEMS])
def test_what_is_wrong_is_said_in_these_words(changes: Values, expected: list[str]) -> None:
    assert _problems(changes) == expected


def test_every_problem_is_reported_at_once() -> None:
    wrong = {
        "model.name": "a b",
        "dataset.max_length": 1,
        "rank.rank": 0,
        "target_layers.blocks": "some",
        "trainer.batch_size": 0,
        "trainer.warmup_fraction": 2,
        "model.dtype": "bfloat16",
        "seed": -1,
    }
    one_by_one = [problem for name, value in wrong.items() for problem in _problems({name: value})]
    assert len(one_by_one) == len(wrong)
    assert sorted(_problems(wrong)) == sorted(one_by_one)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        (
            "learning_rate",
            ["allow_busy_device", "dataset", "device", "evaluate_also", "method", "model", "num_threads"],
        ),
        ("model.hub", ["adapter", "asset", "attention", "dropout", "dtype", "from_sweep", "hub_id", "name", "path"]),
        ("rank.r", ["alpha", "alpha_per_rank", "alpha_policy", "pattern", "rank"]),
        ("target_layers.layers", ["blocks", "modules", "name", "projections"]),
        ("tracking.group", ["entity", "log_every", "progress", "project", "tensorboard", "trackio", "wandb"]),
    ],
)
def test_an_unknown_setting_is_an_error_that_lists_those_that_exist(key: str, known: list[str]) -> None:
    (problem,) = _problems({key: 1})
    assert problem.startswith(f"{key}: no such setting. Known here: {', '.join(known)}")


CHOSEN = ("model=tiny_llama", "dataset=friends", "rank=r8", "target_layers=qv", "evaluate_also=grimm_tales")


@pytest.mark.parametrize(
    ("overrides", "is_of_schema"),
    [
        ([], True),
        (["seed=3", "trainer.learning_rate=1", "target_layers.blocks=[0]", "tracking=off", "sweep=mine"], True),
        (["evaluate_also.grimm_tales.max_length=8", "rank.pattern={q:2}", "dataset.text_columns=[a]"], True),
        (["dataset.label_column='${dataset.name} \\${seed}'", "method=loha", "method.peft.alpha=[1]"], True),
        (["dataset.train_file=\\${seed}", "rank={alpha:1}", "model.from_sweep=mine", "num_threads=1"], True),
        (["~trainer", "trainer={learning_rate:1e-3,max_steps:3}", "++trainer.batch_size='8'"], True),
        # Refused, with the same words.
        (["+stray.key=1"], False),
        (["+trainer.stray=1"], False),
        (["+evaluate_also.grimm_tales.stray=1"], False),
        (["trainer.learning_rate=${method.lr}"], True),
        (["trainer.batch_size=${dataset.name}"], True),
        (["model.name=???"], True),
        (["trainer.batch_size=0", "seed=-1"], True),
    ],
)
def test_what_hydra_merged_into_the_schema_is_what_merging_it_again_gives(
    overrides: list[str], is_of_schema: bool
) -> None:
    register()
    composed = compose([*CHOSEN, *overrides])
    with open_dict(composed):
        composed.pop("hydra", None)
    outcomes: list[RunConfig | list[str]] = []
    for by in (from_composed, lambda each: composing._validated(OmegaConf.to_container(each, resolve=False))):
        try:
            outcomes.append(by(composed))
        except ConfigError as error:
            outcomes.append(error.problems)
    assert outcomes[0] == outcomes[1] and repr(outcomes[0]) == repr(outcomes[1])
    assert composing._is_of_schema(composed, RunConfig) is is_of_schema


def test_a_composed_config_is_checked_like_any_other() -> None:
    assert from_composed(OmegaConf.create(_values())) == _config()
    with pytest.raises(ConfigError, match=r"^stray: no such setting\. Known here: .*, variant\.$"):
        from_composed(OmegaConf.create(_values({"stray": 1})))
    with pytest.raises(ConfigError, match=r"^a config is a mapping, got list$"):
        from_composed(OmegaConf.create([1]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        FULL,
        {**FULL, "method.name": "head_only"},
        {"model.tiny": None, "model.path": "~/model"},
        {"model.tiny": None, "model.hub_id": "a/b", "model.revision": "main"},
        {"model.dtype": "bfloat16", "trainer.precision": "bf16"},
        {"dataset.train_file": None, "dataset.path": "rows.csv"},
        {"dataset.best_metric": "nll"},
        {"dataset.task": "regression", "dataset.metrics": ["pearson"], "dataset.best_metric": "mse"},
        {"rank": {"rank": 8, "alpha_policy": "proportional", "alpha_per_rank": 2}},
        {"rank.alpha_policy": "rslora"},
        {"target_layers.projections": [], "target_layers.modules": [r".*\.query"]},
        {"target_layers.blocks": [0, 2]},
        {"trainer.num_epochs": 0.5},
        {"trainer.num_epochs": None, "trainer.max_steps": 1},
        {"trainer.micro_batch_size": 4, "trainer.max_gradient_norm": None, "trainer.warmup_fraction": 0},
        {"seed": 2**32 - 1},
    ],
    ids=str,
)
def test_what_may_be_run_has_no_problems(changes: Values) -> None:
    assert find_problems(_config(changes)) == []


def test_the_learning_rate_is_that_of_the_method_unless_given() -> None:
    assert _config({"method.learning_rate": 3e-3}).trainer.learning_rate == 3e-3
    assert _config({"method.learning_rate": 3e-3, "trainer.learning_rate": 5e-4}).trainer.learning_rate == 5e-4


def test_past_from_dict_there_are_plain_types_alone() -> None:
    def visit(value: object) -> Iterator[object]:
        yield value
        if dataclasses.is_dataclass(value):
            for item in dataclasses.fields(value):
                yield from visit(getattr(value, item.name))
        if isinstance(value, list | dict):
            for item_ in value:
                yield from visit(item_)

    config = _config({"target_layers.blocks": [0, 1]})
    kinds = {type(value) for value in visit(config) if not dataclasses.is_dataclass(value)}
    plain = {str, int, float, bool, list, dict, type(None)}
    assert all(kind in plain or issubclass(kind, StrEnum) for kind in kinds), kinds
    assert config.method.name == "lora" and config.rank is not None
    assert config.rank.alpha_policy is AlphaPolicy.fixed


# ---------------------------------------------------------------- scaling


@pytest.mark.parametrize(
    ("rank", "alpha", "scaling"),
    [
        (RankConfig(8, AlphaPolicy.fixed, alpha=16), 16, 2),
        (RankConfig(64, AlphaPolicy.fixed, alpha=8), 8, 0.125),  # alpha left behind when the rank rose
        (RankConfig(8, AlphaPolicy.proportional, alpha_per_rank=2), 16, 2),
        (RankConfig(64, AlphaPolicy.proportional, alpha_per_rank=2), 128, 2),
        (RankConfig(16, AlphaPolicy.rslora, alpha=16), 16, 4),
        (RankConfig(64, AlphaPolicy.rslora, alpha=16), 16, 2),
    ],
)
def test_scaling_by_hand(rank: RankConfig, alpha: float, scaling: float) -> None:
    assert rank.effective_alpha == alpha
    assert rank.scaling == scaling


@given(st.integers(1, 512), st.floats(0.01, 1000))
def test_how_scaling_follows_the_rank(rank: int, alpha: float) -> None:
    fixed = RankConfig(rank, AlphaPolicy.fixed, alpha=alpha)
    rslora = RankConfig(rank, AlphaPolicy.rslora, alpha=alpha)
    proportional = RankConfig(rank, AlphaPolicy.proportional, alpha_per_rank=alpha)
    assert fixed.scaling * rank == pytest.approx(alpha)
    assert rslora.scaling**2 * rank == pytest.approx(alpha**2)
    assert rslora.scaling == pytest.approx(fixed.scaling * math.sqrt(rank))
    assert proportional.scaling == pytest.approx(alpha)


# ---------------------------------------------------------------- written and read again

SMALL_CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.sampled_from([0, 1]),
        "rank.rank": st.sampled_from([1, 8]),
        "rank.alpha_policy": st.sampled_from(["fixed", "rslora"]),
        "target_layers.projections": st.sampled_from([["q"], ["q", "v"]]),
        "target_layers.blocks": st.sampled_from(["all", "first_half", [0], [0, 1]]),
        "trainer.learning_rate": st.sampled_from([1e-3, 1e-3 * (1 + 1e-12), 2e-3]),
        "trainer.num_epochs": st.sampled_from([3, 3.0, 4]),
        "dataset.num_train_examples": st.sampled_from([None, 100]),
        "sweep": st.sampled_from([None, "demo"]),
        "runs_dir": st.sampled_from(["runs", "elsewhere"]),
        "device": st.sampled_from(["auto", "cpu"]),
        "tracking.wandb": st.sampled_from(["offline", "disabled"]),
        "save_weights": st.booleans(),
    },
)


@settings(max_examples=30, deadline=None)
@given(SMALL_CHANGES)
def test_a_config_survives_the_way_through_json(changes: Values) -> None:
    config = _config(changes)
    written = json.loads(json.dumps(to_dict(config)))
    assert from_dict(written) == config


@pytest.mark.parametrize("changes", [{}, FULL, {"rank.alpha": 0.1, "trainer.adam_epsilon": 1e-30}])
def test_what_is_written_is_every_setting_as_it_is(changes: Values) -> None:
    config = _config(changes)
    written = to_dict(config)
    assert list(written) == [item.name for item in dataclasses.fields(RunConfig)]
    assert written["trainer"]["learning_rate"] == config.trainer.learning_rate == 1e-3  # a number, no reference
    assert written["rank"] == (None if changes == FULL else {**VALID["rank"], **written["rank"]})
    assert from_dict(written) == config
