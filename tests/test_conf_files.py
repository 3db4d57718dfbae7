"""Every file under conf/ composes into a config that may be run, says what it is, and holds values alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

from harness.config.composing import from_composed, register
from harness.config.schema import (
    DatasetConfig,
    MethodConfig,
    ModelConfig,
    RankConfig,
    RunConfig,
    TargetLayersConfig,
    Task,
    TrackingConfig,
    TrainerConfig,
    VariantConfig,
)
from harness.config.validation import ConfigError
from harness.content.assets import ASSETS
from harness.content.identity import identify
from harness.models.configs import build_skeleton
from harness.placement.architectures import ARCHITECTURES, OUTSIDE_BLOCKS, UNEMBEDDING, head_modules
from harness.placement.select import select_targets
from harness.plan import plan
from harness.results.methods import METHODS

CONF = Path(__file__).resolve().parent.parent / "conf"
SCHEMAS = {
    "model": ModelConfig,
    "dataset": DatasetConfig,
    "method": MethodConfig,
    "rank": RankConfig,
    "target_layers": TargetLayersConfig,
    "trainer": TrainerConfig,
    "variant": VariantConfig,
    "tracking": TrackingConfig,
}
# Its files hold no values: each places a dataset under `evaluate_also`.
ALSO = "evaluate_also"
# Its files choose options of the other groups.
REPRODUCE = "reproduce"
FILES = sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_file())
# Those below hydra/ are settings of launchers, composed by tests/test_clusters.py; accelerate/ is for its own launcher.
GROUP_FILES = [name for name in FILES if name != "config.yaml" and not name.startswith(("hydra/", "accelerate/"))]


def _options(group: str) -> list[str]:
    """What `group=...` may be."""
    return [
        name.removeprefix(f"{group}/").removesuffix(".yaml") for name in GROUP_FILES if name.startswith(f"{group}/")
    ]


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    register()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        yield


@functools.cache  # a tenth of a second each
def _compose(*overrides: str) -> RunConfig:
    return from_composed(compose("config", overrides=list(overrides)))


@functools.cache
def _raw(name: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(CONF / name))  # unlike PyYAML it reads 2e-4 as a number


# Of every model its architecture, by hand: those on the hub cannot be asked here.
MODEL_TYPES = {
    "bert_base": "bert",
    "deberta_v2_xxlarge": "deberta-v2",
    "deberta_v3_base": "deberta-v2",
    "falcon_h1_0_5b": "falcon_h1",
    "lfm2_350m": "lfm2",
    "gemma3_1b": "gemma3_text",
    "gemma3_270m": "gemma3_text",
    "gpt2": "gpt2",
    "gpt2_large": "gpt2",
    "gpt2_medium": "gpt2",
    "gpt2_xl": "gpt2",
    "llama3_1_8b": "llama",
    "llama3_2_1b": "llama",
    "llama3_2_3b": "llama",
    "minilm": "bert",
    "newsgpt": "llama",
    "newsgpt_scratch": "llama",
    "opt_125m": "opt",
    "opt_350m": "opt",
    "pythia_160m": "gpt_neox",
    "pythia_1b": "gpt_neox",
    "pythia_410m": "gpt_neox",
    "pythia_70m": "gpt_neox",
    "qwen2_5_0_5b": "qwen2",
    "qwen2_5_1_5b": "qwen2",
    "qwen3_0_6b": "qwen3",
    "qwen3_1_7b": "qwen3",
    "roberta_base": "roberta",
    "roberta_large": "roberta",
    "smollm2_135m": "llama",
    "smollm2_1_7b": "llama",
    "smollm2_360m": "llama",
    "tiny_bert": "bert",
    "tiny_gpt2": "gpt2",
    "tiny_llama": "llama",
}

LORA = ("rank=r8", "target_layers=qv")

# Datasets for language models; the rest is for models with a task head.
LANGUAGE_DATASETS = {
    option
    for option in _options("dataset")
    if Task(_raw(f"dataset/{option}.yaml").get("task", "classification")).is_language
}

# ---------------------------------------------------------------- every file


def test_there_is_nothing_else_below_conf() -> None:
    assert {name.partition("/")[0] for name in GROUP_FILES} == {*SCHEMAS, ALSO, REPRODUCE}
    assert all(name.endswith(".yaml") for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_opens_with_a_comment(name: str) -> None:
    text = (CONF / name).read_text(encoding="utf-8")
    first, *_ = text.removeprefix("# @package _global_\n").splitlines()
    assert re.fullmatch(r"# \w.*\.", first), first


@pytest.mark.parametrize("name", [name for name in GROUP_FILES if name.partition("/")[0] in SCHEMAS])
def test_a_file_holds_values_of_its_groups_settings_and_nothing_else(name: str) -> None:
    schema = SCHEMAS[name.partition("/")[0]]
    values = _raw(name)
    assert set(values) <= {item.name for item in dataclasses.fields(schema)}
    assert "${" not in (CONF / name).read_text(encoding="utf-8")
    if "name" in {item.name for item in dataclasses.fields(schema)}:
        assert values["name"] == Path(name).stem  # what tables print is what the command line says


def _command(name: str) -> list[str] | None:
    """The overrides in a file's comment that stand in a line of their own, indented."""
    lines = re.findall(r"^#   (\S+=.*)$", (CONF / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) <= 1
    return shlex.split(lines[0]) if lines else None


COMMANDS = {name: command for name in GROUP_FILES if (command := _command(name)) is not None}


def test_presets_and_data_of_ones_own_say_how_to_use_them() -> None:
    from_a_folder = {"local", "local_text", "local_completion", "local_chat", "e2e"}
    presets = {name for name in GROUP_FILES if name.count("/") == 2}
    of_a_folder = {f"dataset/{option}.yaml" for option in from_a_folder}
    assert set(COMMANDS) == {*presets, *of_a_folder, "method/peft.yaml"}


def _overrides(name: str) -> list[str]:
    """The command in a file's comment, or else what makes a run of it."""
    group, _, option = name.removesuffix(".yaml").partition("/")
    if name in COMMANDS:
        # A recipe of the paper belongs to a whole run of it.
        assert f"{REPRODUCE if group == 'trainer' else group}={option}" in COMMANDS[name]
        model = "tiny_llama" if option in LANGUAGE_DATASETS else "minilm"
        return [f"model={model}", *LORA, *COMMANDS[name]] if group == "dataset" else COMMANDS[name]
    overrides = {"model": "tiny_bert", "dataset": "reuters_r8", "rank": "r8", "target_layers": "qv", group: option}
    match group, option:
        case "model", _ if "qkv" in ARCHITECTURES[MODEL_TYPES[option]].projections:
            overrides["target_layers"] = "qkv"
        case "target_layers", "qkv":
            overrides["model"] = "tiny_gpt2"
        case "target_layers", "gate":
            overrides["model"] = "tiny_llama"
        case "dataset", _ if option in LANGUAGE_DATASETS:
            overrides["model"] = "tiny_llama"
        case ("evaluate_also", _) | ("target_layers", "all_lm_head"):
            overrides |= {"model": "tiny_llama", "dataset": "grimm_tales"}
        case "rank", _:
            overrides["model"] = "minilm"
        case "method", _:
            uses = METHODS[option]
            for group, is_used in (("rank", uses.uses_rank), ("target_layers", uses.uses_placement)):
                if not is_used:
                    del overrides[group]
        case _:
            pass
    return [f"{name}={value}" for name, value in overrides.items()]


def _run_of(name: str) -> RunConfig:
    return _compose(*_overrides(name))


@pytest.mark.parametrize("name", [name for name in GROUP_FILES if name.partition("/")[0] in SCHEMAS])
def test_a_file_composes_into_a_config_that_may_be_run(name: str) -> None:
    part = dataclasses.asdict(getattr(_run_of(name), name.partition("/")[0]))
    given = {override.partition("=")[0] for override in _overrides(name)}
    for setting, value in _raw(name).items():
        if (name, setting) == ("method/peft.yaml", "name"):
            value = "loha"  # one run, one id: it is called by its type
        if f"{name.partition('/')[0]}.{setting}" in given:
            continue
        if isinstance(value, dict):
            assert value.items() <= part[setting].items(), setting
        else:
            assert part[setting] == value, setting


@pytest.mark.parametrize("option", _options(ALSO))
def test_a_further_set_is_the_dataset_of_its_name(option: str) -> None:
    assert _raw(f"{ALSO}/{option}.yaml") == {"defaults": [{f"/dataset@{option}": option}]}
    config = _run_of(f"{ALSO}/{option}.yaml")
    assert config.evaluate_also == {option: _run_of(f"dataset/{option}.yaml").dataset}


def test_further_sets_may_be_several() -> None:
    several = _compose("model=tiny_llama", "dataset=friends", *LORA, "evaluate_also=[grimm_tales,wikitext2]")
    assert list(several.evaluate_also) == ["grimm_tales", "wikitext2"]


@pytest.mark.parametrize("option", sorted(LANGUAGE_DATASETS))
def test_a_dataset_for_language_models_fits_one(option: str) -> None:
    assert len(plan(_run_of(f"dataset/{option}.yaml")).targets) == 2 * 2


# ---------------------------------------------------------------- identities

GOLDEN = json.loads((CONF.parent / "tests/golden/identities.json").read_text())
# Identity is content, and theirs is not in this repository.
OF_LOCAL_FILES = {"local", "local_text", "local_completion", "local_chat", "e2e"}
OF_A_RUN = {"newsgpt"}


def _ids(config: RunConfig) -> list[str]:
    identity = identify(config)
    return [identity.run_id, identity.cell_id]


def test_every_model_on_every_dataset_has_the_identity_that_it_always_had() -> None:
    """Another id orphans every finished run: whoever changes the golden file does so on purpose."""
    models = sorted(set(_options("model")) - OF_A_RUN)
    datasets = sorted(set(_options("dataset")) - OF_LOCAL_FILES)
    base = _compose(*LORA)
    also = {name: _run_of(f"{ALSO}/{name}.yaml").evaluate_also for name in _options(ALSO)}
    of_datasets = {name: _run_of(f"dataset/{name}.yaml").dataset for name in datasets}
    found: dict[str, dict[str, list[str]]] = {}
    for model in models:
        config = dataclasses.replace(base, model=_run_of(f"model/{model}.yaml").model)
        ids = {name: _ids(dataclasses.replace(config, dataset=dataset)) for name, dataset in of_datasets.items()}
        language = dataclasses.replace(config, dataset=of_datasets["friends"])
        ids |= {
            f"friends and {name}": _ids(dataclasses.replace(language, evaluate_also=sets))
            for name, sets in also.items()
        }
        # The hashes alone: what stands before them is made of names.
        found[model] = {name: [one.rpartition("-")[2] for one in pair] for name, pair in ids.items()}
    assert found == GOLDEN["models_on_datasets"]


# What is composed of a recipe of the paper is the run of the same name.
WITH_IDENTITY = [name for name in GROUP_FILES if not name.startswith(("model/", "dataset/", "trainer/lora_"))]


@pytest.mark.parametrize("name", WITH_IDENTITY)
def test_a_preset_has_the_identity_that_it_always_had(name: str) -> None:
    config = _run_of(name)
    if config.dataset.name in OF_LOCAL_FILES:
        assert name == f"{REPRODUCE}/lora_paper/gpt2_e2e.yaml"  # reads the files of a local folder
        return
    assert _ids(config) == GOLDEN["presets"][name]


def test_a_template_on_the_command_line_arrives_as_it_is_meant() -> None:
    name = "dataset/local_completion.yaml"
    assert _run_of(name).dataset.prompt_template == "Question: {question} Answer:"
    # The other way that its comment names: of $'...' the shell makes this.
    (bash,) = re.findall(r"\$'(.*)'", (CONF / name).read_text(encoding="utf-8"))
    other = [word for word in COMMANDS[name] if not word.startswith("dataset.prompt_template=")]
    config = _compose("model=tiny_llama", *LORA, *other, bash.replace("\\n", "\n"))
    assert config.dataset.prompt_template == "{question}\n"


# ---------------------------------------------------------------- config.yaml


def test_lora_has_no_hidden_rank_and_placement() -> None:
    with pytest.raises(ConfigError) as caught:
        _compose()
    assert caught.value.problems == [
        "method=lora needs a rank and has no hidden default: add rank=r8 (r1 to r1024).",
        "method=lora needs target layers: add target_layers=qv (q, v, qkvo, mlp, all, ...).",
    ]


@pytest.mark.parametrize("method", ["full", "head_only"])
def test_the_baselines_are_valid_alone(method: str) -> None:
    config = _compose(f"method={method}")
    assert config.method.name == method and config.rank is None and config.target_layers is None


def test_the_defaults_are_what_ships_with_public_wheels() -> None:
    config = _compose(*LORA)
    assert config.model.asset == "minilm" and config.dataset.asset == "reuters_r8"
    assert (config.model.dropout, config.seed, config.sweep) == (0.0, 0, None)


def test_each_method_brings_its_learning_rate() -> None:
    rates = {method: _run_of(f"method/{method}.yaml").trainer.learning_rate for method in _options("method")}
    assert rates["lora"] == 10 * rates["full"]  # the ratio that section 3.1 of the reference reports
    ours = {name for name, method in METHODS.items() if method.peft is None}
    assert ours < set(rates) - {"peft"} < set(METHODS)
    assert _compose(*LORA, "trainer.learning_rate=1e-5").trainer.learning_rate == 1e-5


def test_a_stray_key_is_an_error_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^stray: no such setting\. Known here: allow_busy_device, .*, variant\.$"):
        _compose(*LORA, "+stray.key=1")
    with pytest.raises(ConfigError, match=r"^lora_rank: no such setting\. Known here: .*, rank, "):
        _compose(*LORA, "++lora_rank=8")
    with pytest.raises(ConfigCompositionException, match=r"Could not override 'lora_rank'"):
        _compose(*LORA, "lora_rank=8")
    with pytest.raises(ConfigError, match=r"^rank\.r: no such setting\. Known here: alpha, alpha_per_rank, "):
        _compose(*LORA, "+rank.r=8")


@pytest.mark.parametrize(("group", "close"), [("rank", "r8"), ("target_layers", "qv"), ("model", "minilm")])
def test_an_option_that_does_not_exist_is_an_error_that_lists_those_that_do(group: str, close: str) -> None:
    with pytest.raises(MissingConfigException, match=rf"Could not find '{group}/typo'") as caught:
        _compose(f"{group}=typo")
    assert re.search(rf"Available options in '{group}':(\s+\S+)*\s+{close}\s", str(caught.value))


def test_a_sweep_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(MissingConfigException, match=r"Could not find 'sweeps/typo'"):
        _compose(*LORA, "sweeps=typo")


# ---------------------------------------------------------------- models and data


# Of which no commit is known here; the file says so.
NOT_PINNED = {"model/deberta_v2_xxlarge.yaml", "model/falcon_h1_0_5b.yaml", "model/lfm2_350m.yaml"}


@pytest.mark.parametrize("name", [name for name in GROUP_FILES if "hub_id" in _raw(name)])
def test_what_comes_from_the_hub_is_pinned_to_a_commit(name: str) -> None:
    revision = _raw(name)["revision"]
    if name in NOT_PINNED:
        assert revision == "main" and "# Not pinned: " in (CONF / name).read_text(encoding="utf-8")
    else:
        assert re.fullmatch(r"[0-9a-f]{40}", revision)


@pytest.mark.parametrize("name", [name for name in GROUP_FILES if "asset" in _raw(name)])
def test_what_comes_from_a_wheel_is_registered(name: str) -> None:
    values = _raw(name)
    asset = ASSETS[values["asset"]]
    assert asset.setting == f"{name.partition('/')[0]}.path"
    assert {values[key] for key in ("train_file", "val_file", "test_file") if key in values} <= set(asset.files)


@pytest.mark.parametrize("name", [name for name in GROUP_FILES if name.startswith("model/") and "hub_id" in _raw(name)])
def test_a_model_of_the_hub_says_its_size_and_what_it_needs(name: str) -> None:
    comment = (CONF / name).read_text(encoding="utf-8").splitlines()[0]
    assert re.search(r": (?:\w+, )?\d+ blocks, width \d+, [\d.]+[MB] parameters\.", comment), comment
    model_type = MODEL_TYPES[Path(name).stem]
    assert ("lie in one matrix, qkv" in comment) is ("qkv" in ARCHITECTURES[model_type].projections)
    gated = _raw(name)["hub_id"].startswith(("meta-llama/", "google/gemma"))
    assert ("Gated: needs `hf auth login`." in comment) is gated
    assert set(_raw(name)) <= {"name", "hub_id", "revision", "attention"}


def test_no_two_models_are_the_same() -> None:
    hubs = [_raw(name)["hub_id"] for name in GROUP_FILES if name.startswith("model/") and "hub_id" in _raw(name)]
    pins = [_raw(name)["revision"] for name in GROUP_FILES if name.startswith("model/") and "hub_id" in _raw(name)]
    commits = [pin for pin in pins if pin != "main"]
    assert len(set(hubs)) == len(hubs) and len(set(commits)) == len(commits)


def test_the_embedded_language_model_has_the_size_that_its_files_say() -> None:
    scratch = _run_of("model/newsgpt_scratch.yaml").model
    skeleton = build_skeleton(scratch, num_labels=None)
    millions = sum(parameter.numel() for parameter in skeleton.parameters()) / 1e6
    assert scratch.scratch is not None
    size = f"{scratch.scratch.num_blocks} blocks, width {scratch.scratch.width}, {millions:.1f}M parameters"
    for name in ("conf/model/newsgpt_scratch.yaml", "conf/model/newsgpt.yaml", "sweeps/newsgpt.yaml"):
        assert size in (CONF.parent / name).read_text(encoding="utf-8"), name


def test_every_model_is_of_an_architecture_with_a_placement() -> None:
    assert set(MODEL_TYPES) == set(_options("model"))
    assert set(MODEL_TYPES.values()) <= set(ARCHITECTURES)


HERE = ("minilm", "newsgpt_scratch", "tiny_bert", "tiny_gpt2", "tiny_llama")


@functools.cache
def _module_names(model: str, *, language_model: bool = False) -> tuple[str, tuple[str, ...]]:
    skeleton = build_skeleton(_run_of(f"model/{model}.yaml").model, num_labels=None if language_model else 2)
    return skeleton.config.model_type, tuple(name for name, _ in skeleton.named_modules())


@pytest.mark.parametrize("model", HERE)
def test_the_architecture_of_a_model_is_what_its_config_says(model: str) -> None:
    model_type, names = _module_names(model)
    assert model_type == MODEL_TYPES[model]
    assert set(head_modules(model_type)) <= set(names)


# Roles of each placement, by hand. A group stands for those that a model has.
ROLES = {
    "q": ["q"],
    "k": ["k"],
    "v": ["v"],
    "o": ["o"],
    "up": ["up"],
    "down": ["down"],
    "gate": ["gate"],
    "qk": ["q", "k"],
    "qv": ["q", "v"],
    "qkv": ["qkv"],
    "qkvo": ["q", "k", "v", "o"],
    "attention": ["attention"],
    "mlp": ["mlp"],
    "all": ["all"],
    "all_lm_head": ["all", "lm_head"],
    "all_embedding": ["all", "embedding"],
    "recurrent": ["recurrent"],
}
PER_BLOCK = {"tiny_bert": {"attention": 4, "mlp": 2, "all": 6}, "tiny_gpt2": {"attention": 2, "mlp": 2, "all": 4}}
PER_BLOCK["tiny_llama"] = {"attention": 4, "mlp": 3, "all": 7}


# The models of recurrent blocks, which are none of those here, are in tests/test_placement.py.
@pytest.mark.parametrize("placement", [option for option in _options("target_layers") if option != "recurrent"])
def test_a_placement_selects_its_roles_in_every_block(placement: str) -> None:
    layers = _run_of(f"target_layers/{placement}.yaml").target_layers
    assert layers is not None and layers.projections == ROLES[placement]
    models = [model for model in PER_BLOCK if _has(model, placement)]
    assert models
    for model in models:
        language_model = UNEMBEDDING in layers.projections
        model_type, names = _module_names(model, language_model=language_model)
        selected = select_targets(
            names,
            model_type=model_type,
            projections=layers.projections,
            blocks=layers.blocks,
            language_model=language_model,
        )
        in_blocks = [role for role in ROLES[placement] if role not in OUTSIDE_BLOCKS]
        per_block = sum(PER_BLOCK[model].get(role, 1) for role in in_blocks)
        assert len(selected) == 2 * per_block + len(set(ROLES[placement]) & set(OUTSIDE_BLOCKS))
        assert (UNEMBEDDING in [target.module for target in selected]) is language_model


def _has(model: str, placement: str) -> bool:
    architecture = ARCHITECTURES[MODEL_TYPES[model]]
    unembedding = {UNEMBEDDING} if architecture.unembedding is not None else set()
    return set(ROLES[placement]) <= {*architecture.projections, *PER_BLOCK[model], "embedding", *unembedding}


@pytest.mark.parametrize("name", [name for name in GROUP_FILES if name.startswith("rank/")])
def test_a_rank_is_what_its_name_says_and_scales_as_its_comment_says(name: str) -> None:
    rank = _run_of(name).rank
    named = re.fullmatch(r"r(\d+)(?:_alpha(\d+))?", Path(name).stem)
    assert rank is not None and named is not None and int(named[1]) == rank.rank
    said = re.search(r"scaling = ([\d.]+)\.$", (CONF / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert said is not None and float(said.group(1)) == rank.scaling == int(named[2] or 16) / rank.rank


def test_ranks_are_the_powers_of_two_up_to_1024() -> None:
    of_the_paper = {"r4_alpha32", "r8_alpha8", "r16_alpha32"}
    assert {f"r{2**power}" for power in range(11)} | of_the_paper == set(_options("rank"))


def test_language_is_scored_by_nll_regression_by_pearson_cola_by_mcc_and_the_rest_by_accuracy() -> None:
    best = {option: _run_of(f"dataset/{option}.yaml").dataset.best_metric for option in _options("dataset")}
    assert {best.pop(option) for option in LANGUAGE_DATASETS} == {"nll"}
    assert best.pop("glue_stsb") == "pearson" and best.pop("glue_cola") == "mcc"
    assert set(best.values()) == {"accuracy"}


def test_local_data_may_be_numbers() -> None:
    local = ["method=full", "dataset=local", "dataset.train_file=rows.csv"]
    scores = ["dataset.metrics=[pearson]", "dataset.best_metric=pearson"]
    assert _compose(*local, "dataset.task=regression", *scores).dataset.task == "regression"
    with pytest.raises(ConfigError, match=r"^dataset: no data named\. Set dataset\.train_file=FILE "):
        _compose("method=full", "dataset=local")


# ---------------------------------------------------------------- presets of the LoRA paper

# arXiv 2106.09685, appendix D, tables 9 and 10, as transcribed in section 2.3 of the project's reference.
TASKS = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
PAPER: dict[str, dict[str, list[float]]] = {
    "roberta_base": {
        "batch_size": [16, 16, 16, 32, 32, 16, 32, 16],
        "num_epochs": [30, 60, 30, 80, 25, 25, 80, 40],
        "learning_rate": [5e-4, 5e-4, 4e-4, 4e-4, 4e-4, 5e-4, 5e-4, 4e-4],
        "max_length": [512] * 8,
    },
    "roberta_large": {
        "batch_size": [4, 4, 4, 4, 4, 4, 8, 8],
        "num_epochs": [10, 10, 20, 20, 10, 20, 20, 30],
        "learning_rate": [3e-4, 4e-4, 3e-4, 2e-4, 2e-4, 3e-4, 4e-4, 2e-4],
        "max_length": [128, 128, 512, 128, 512, 512, 512, 512],
    },
    "deberta_v2_xxlarge": {
        "batch_size": [8, 8, 32, 4, 6, 8, 4, 4],
        "num_epochs": [5, 16, 30, 10, 8, 11, 11, 10],
        "learning_rate": [1e-4, 6e-5, 2e-4, 1e-4, 1e-4, 1e-4, 2e-4, 2e-4],
    },
}
# Of DeBERTa XXL the table prints rank and alpha 8, with which LoRA would have half of the 4.7M parameters printed; the
# scripts have these.
RANK_AND_ALPHA = {"roberta_base": (8, 8), "roberta_large": (8, 16), "deberta_v2_xxlarge": (16, 32)}
# What the published scripts do differently.
SCRIPTS: dict[tuple[str, str], dict[str, float]] = {
    **{("roberta_base", task): {"alpha": 16} for task in TASKS},
    ("roberta_large", "cola"): {"learning_rate": 3e-4},
    ("roberta_large", "stsb"): {"learning_rate": 3e-4, "num_epochs": 10, "max_length": 128, "batch_size": 4},
    ("deberta_v2_xxlarge", "cola"): {"learning_rate": 1.3e-4},
    ("deberta_v2_xxlarge", "rte"): {"learning_rate": 2.6e-4},
}
PRESETS: dict[str, dict[str, float]] = {
    f"lora_paper/{model}_{task}": {
        **{setting: column[index] for setting, column in table.items()},
        **dict(zip(("rank", "alpha"), RANK_AND_ALPHA[model], strict=True)),
        "warmup_fraction": 0.1 if model == "deberta_v2_xxlarge" else 0.06,
        "dropout": 0.1,
    }
    for model, table in PAPER.items()
    for index, task in enumerate(TASKS)
}
for (_model, _task), _different in SCRIPTS.items():
    PRESETS[f"lora_scripts/{_model}_{_task}"] = {**PRESETS[f"lora_paper/{_model}_{_task}"], **_different}


def test_every_preset_is_in_the_table() -> None:
    assert set(_options(REPRODUCE)) == {*PRESETS, "lora_paper/gpt2_e2e"}
    assert len(PRESETS) == 3 * 8 + 8 + 4
    recipes = {option for option in _options("trainer") if "/" in option}
    # With alpha alone another, the scripts have the recipe of the paper.
    assert recipes == {option for option in _options(REPRODUCE) if not option.startswith("lora_scripts/roberta_base")}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_holds_the_numbers_of_the_paper(preset: str) -> None:
    source, _, cell = preset.partition("/")
    model, _, task = cell.rpartition("_")
    config = _run_of(f"{REPRODUCE}/{preset}.yaml")
    assert config.rank is not None and config.target_layers is not None
    values = {
        **dataclasses.asdict(config.trainer),
        "max_length": config.dataset.max_length,
        "rank": config.rank.rank,
        "alpha": config.rank.alpha,
        "dropout": config.model.dropout,
    }
    assert {setting: values[setting] for setting in PRESETS[preset]} == PRESETS[preset]
    assert config.method.name == "lora" and config.method.adapter_dropout == 0
    assert config.trainer.schedule == "linear"
    assert config.trainer.eval_each_epoch  # the paper reports the best epoch
    assert config.target_layers.projections == ["q", "v"]
    assert (config.dataset.name, config.model.name) == (f"glue_{task}", model)
    comment = (CONF / f"{REPRODUCE}/{preset}.yaml").read_text(encoding="utf-8").splitlines()[1]
    assert ("published scripts" in comment) is (source == "lora_scripts") and task.upper() in comment


def test_a_preset_may_be_changed_and_be_fully_fine_tuned() -> None:
    name = "reproduce=lora_paper/roberta_base_mrpc"
    assert _compose(name, "rank.alpha=16", "model.dropout=0", "rank=r4").model.dropout == 0
    full = _compose(name, "method=full", "~rank", "~target_layers", "trainer.learning_rate=2e-5")
    assert (full.rank, full.model.dropout, full.trainer.num_epochs) == (None, 0.1, 30)


def test_the_preset_of_e2e_holds_the_numbers_of_the_paper() -> None:
    # Table 11 of the same appendix.
    config = _run_of(f"{REPRODUCE}/lora_paper/gpt2_e2e.yaml")
    trainer, generation = config.trainer, config.dataset.generation
    assert (trainer.learning_rate, trainer.num_epochs, trainer.batch_size) == (2e-4, 5, 8)
    assert (trainer.schedule, trainer.weight_decay, trainer.label_smoothing) == ("linear", 0.01, 0.1)
    num_steps = 5 * math.ceil(42_061 / 8)  # the rows of train.txt
    assert math.ceil(trainer.warmup_fraction * num_steps) == 500
    assert trainer.eval_each_epoch
    assert config.rank is not None and (config.rank.rank, config.rank.alpha) == (4, 32)
    assert config.method.adapter_dropout == 0.1 and config.model.name == "gpt2_medium"
    assert config.target_layers is not None and config.target_layers.projections == ["q", "v"]
    assert (generation.num_beams, generation.length_penalty, generation.no_repeat_ngram_size) == (10, 0.9, 4)
    assert config.dataset.name == "e2e"
