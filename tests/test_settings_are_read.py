"""Each setting is read or refused, for each task and method: none is accepted and then decides nothing.

Tiny runs are watched while they compute: a setting is read when code beyond composing, validation, identity and cache
keys asks a config for it. Where a run does not ask, another value must be refused with a message that names it.
A new field that is neither fails here. `pytest -s tests/test_settings_are_read.py` prints the table.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import pytest

from harness.config.composing import from_dict
from harness.config.schema import (
    Blocks,
    DatasetConfig,
    GenerationConfig,
    MethodConfig,
    ModelConfig,
    Precision,
    RankConfig,
    RunConfig,
    ScratchConfig,
    TargetLayersConfig,
    Task,
    TrackingConfig,
    TrainerConfig,
    VariantConfig,
)
from harness.config.validation import ConfigError, find_problems
from harness.content.identity import identify
from harness.data import sources
from harness.processes import preparation
from harness.results.schema import Status
from harness.run import run

Values = dict[str, Any]

GROUPS: dict[type, str] = {
    RunConfig: "",
    ModelConfig: "model.",
    ScratchConfig: "model.scratch.",
    DatasetConfig: "dataset.",
    GenerationConfig: "dataset.generation.",
    MethodConfig: "method.",
    RankConfig: "rank.",
    TargetLayersConfig: "target_layers.",
    VariantConfig: "variant.",
    TrainerConfig: "trainer.",
    TrackingConfig: "tracking.",
}
# What these ask for says nothing of whether a value matters to the run.
NOT_READING = (
    "harness.config",
    "harness.content.identity",
    "dataclasses",
    "omegaconf",
    "copy",
    "json",
    "yaml",
    __name__,
)
CACHE_KEYS = ("_settings", "_tokenising_settings")
PROPERTIES = ("effective_alpha", "scaling", "effective_momentum")
# They name things, in the readable part of the run id and in every table.
LABELS = {"model.name", "dataset.name", "target_layers.name", "variant.name"}

TASKS: dict[str, Values] = {
    "classification": {"metrics": ["accuracy", "f1"], "best_metric": "accuracy", "line_columns": ["text", "label"]},
    "regression": {"metrics": ["pearson"], "best_metric": "mse", "line_columns": ["text", "label"]},
    "causal_lm": {
        "metrics": [],
        "best_metric": "nll",
        "line_columns": ["text", "note"],
        "blocks": "packed",
        "attend_across_documents": True,
    },
    "completion": {
        "metrics": ["exact_match"],
        "best_metric": "nll",
        "line_columns": ["q", "a"],
        "prompt_template": "{q} = ",
        "target_column": "a",
    },
    "chat": {"metrics": ["exact_match"], "best_metric": "nll", "chat_template": "chatml"},
}
GENERATION = {"max_new_tokens": 2, "num_beams": 2, "length_penalty": 0.9, "no_repeat_ngram_size": 3, "num_examples": 1}
SCENARIOS = [
    *((task, method) for task in TASKS for method in ("lora", "full", "head_only")),
    ("classification", "loha"),  # of the peft package
    ("data of the hub", "lora"),
    ("a base to be pretrained", "full"),
    ("by muon", "lora"),
    ("by lion", "lora"),
    ("an adapter", "lora"),
]

SPECIAL = {
    "data of the hub": "classification",
    "a base to be pretrained": "causal_lm",
    "by muon": "classification",
    "by lion": "classification",
    "an adapter": "classification",
}

# Another valid value, where one more or one letter more is none; with what else must then change.
OTHERS: dict[str, Any] = {
    "method.name": "full",
    "method.peft": {"rank_dropout": 0.5},
    "rank.pattern": {"q": 3},
    "model.attention": "eager",
    "dataset.text_columns": ["other"],
    "dataset.metrics": {
        "classification": ["accuracy", "f1", "mcc"],
        "regression": ["pearson", "spearman"],
        "causal_lm": ["perplexity"],
        "completion": ["exact_match", "bleu"],
        "chat": ["exact_match", "bleu"],
    },
    "dataset.best_metric": {
        "classification": "nll",
        "regression": "pearson",
        **dict.fromkeys(("causal_lm", "completion", "chat"), "perplexity"),
    },
    "model.scratch.width": 32,
    "target_layers.projections": ["q", "o"],
    "target_layers.blocks": "last_half",
    "target_layers.stacks": ["encoder"],
}
COMPANIONS: dict[str, Values] = {"model.dtype": {"trainer.precision": Precision.bf16}}


def _values(scenario: str, method: str, folder: Path) -> Values:
    optimizer = scenario.removeprefix("by ") if scenario.startswith("by ") else "adamw"
    task = SPECIAL.get(scenario, scenario)
    is_language = Task(task).is_language
    dataset: Values = {
        "name": "mine",
        "task": task,
        "train_file": str(folder / ("chats.jsonl" if task == "chat" else f"{task}.txt")),
        "num_train_examples": 12,
        "num_eval_examples": 3,
        "max_length": 96 if task == "chat" else 24,
        **TASKS[task],
    }
    if "line_columns" in dataset:
        dataset["line_separator"] = " || "
    if task in ("completion", "chat"):
        dataset["generation"] = GENERATION
    values: Values = {
        "model": {"name": "tiny", "tiny": "llama" if is_language else "bert"},
        "dataset": dataset,
        "method": {"name": method},
        "trainer": {"max_steps": 2, "batch_size": 4, "optimizer": optimizer},
        "tracking": {"wandb": "disabled", "progress": False},
        "runs_dir": str(folder / "runs"),
        "device": "cpu",
    }
    if method in ("lora", "loha"):
        values["rank"] = {"rank": 2, "alpha": 4}
        values["target_layers"] = {"name": "qv", "projections": ["q", "v"]}
    if scenario == "data of the hub":
        for name in ("train_file", "line_columns", "line_separator"):
            del dataset[name]
        dataset |= {"hub_id": "a/b", "revision": "0" * 40}
        values["rank"] = {"rank": 2, "alpha_policy": "proportional", "alpha_per_rank": 2}
    if scenario == "an adapter":  # that the run of the first scenario leaves
        values["model"]["adapter"] = identify(from_dict(_values("classification", "lora", folder))).run_id
    if scenario == "a base to be pretrained":
        scratch = {"num_blocks": 1, "width": 16, "num_heads": 2, "max_tokens": 32, "vocab_size": 260}
        values["model"] = {"name": "own", "scratch": {**scratch, "path": str(folder), "file": "text.txt"}}
        values["trainer"] = {"num_epochs": 0.5, "batch_size": 4}
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of rows for each task."""
    folder = tmp_path_factory.mktemp("rows")
    lines = {
        "classification": [f"text number {n} || {('good', 'bad')[n % 2]}" for n in range(40)],
        "regression": [f"text number {n} || {n % 7}" for n in range(40)],
        "causal_lm": [f"text number {n} || note" for n in range(40)],
        "completion": [f"{n}+{n} || {str(2 * n) * 30}" for n in range(40)],
        "text": [f"word {n}" for n in range(40)],
    }
    for name, rows in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(rows))
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!" * 20}]}
        for n in range(40)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return folder


def _is_reading(frame: FrameType) -> bool:
    module, function = frame.f_globals["__name__"], frame.f_code.co_name
    if module == "harness.config.schema" and function in PROPERTIES:
        return True
    return not module.startswith(NOT_READING) and function not in CACHE_KEYS


def _watch(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """From here on, the settings that anybody reads."""
    seen: set[str] = set()
    for kind, prefix in GROUPS.items():
        names = {item.name for item in dataclasses.fields(kind)}

        def get(self: Any, name: str, *, _prefix: str = prefix, _names: set[str] = names) -> Any:
            if name in _names and _is_reading(sys._getframe(1)):
                seen.add(f"{_prefix}{name}")
            return object.__getattribute__(self, name)

        monkeypatch.setattr(kind, "__getattribute__", get, raising=False)
    return seen


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every setting."""
    hints = typing.get_type_hints(type(node))
    for item in dataclasses.fields(node):
        value, name = getattr(node, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, hints[item.name]


def _another(hint: Any, value: Any) -> Any:
    """A value that is allowed for the type and is not `value`."""
    if isinstance(hint, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if hint is bool:
        return not value
    if hint is int:
        return 1 if value is None else value + 1
    if hint is float:
        return value / 2 if value else 0.1
    if hint is str:
        return f"{value or 'x'}x"
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return next(member for member in hint if member is not value)
    if hint is ScratchConfig:
        return ScratchConfig(asset="newsgroups_20", file="x")
    if hint is RankConfig:
        return RankConfig(rank=1, alpha=1.0)
    if hint is TargetLayersConfig:
        return TargetLayersConfig(name="q", projections=["q"])
    if typing.get_origin(hint) is dict:
        return {"x": DatasetConfig("x", "friends", train_file="f", task=Task.causal_lm, metrics=[], best_metric="nll")}
    assert typing.get_origin(hint) is list, hint
    return [*value, "other"]


def _replaced(config: RunConfig, changes: Values) -> RunConfig:
    changed = copy.deepcopy(config)
    for name, value in changes.items():
        *groups, last = name.split(".")
        node: Any = changed
        for group in groups:
            node = getattr(node, group)
        setattr(node, last, value)
    return changed


def _becomes(config: RunConfig, name: str, hint: Any, seen: set[str]) -> str:
    """What becomes of a setting in a run that read `seen`: read, refused, or silent, which must not be."""
    *groups, last = name.split(".")
    value = functools.reduce(getattr, [*groups, last], config)
    other = OTHERS[name] if name in OTHERS else _another(hint, value)
    other = other[config.dataset.task] if isinstance(other, dict) and set(other) == set(TASKS) else other
    changed = _replaced(config, {name: other, **COMPANIONS.get(name, {})})
    problems = find_problems(changed)
    if any(problem.startswith(f"{name}=") for problem in problems):
        return "refused"
    if name in seen:
        return "read"
    if any(re.search(rf"\b({re.escape(name)}|{last})\b", problem) for problem in problems):
        return "refused"
    if problems:
        return f"refused without its name: {problems}"
    if name in LABELS:
        return "read" if str(other) in identify(changed).run_id else "silent"
    # Where another setting falls back to it, composing reads it.
    return "read" if name in _INTERPOLATED else "silent"


_INTERPOLATED = {
    reference
    for kind in GROUPS
    for item in dataclasses.fields(kind)
    for reference in re.findall(r"\$\{([\w.]+)\}", str(item.default))
}


@pytest.fixture(scope="module")
def table(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[tuple[str, str], str]]:
    """By setting and scenario, what becomes of it."""
    found: dict[str, dict[tuple[str, str], str]] = {}
    rows = {"text": [f"text {n}" for n in range(40)], "label": ["good", "bad"] * 20}
    for scenario, method in SCENARIOS:
        values = _values(scenario, method, folder)
        if method == "head_only" and Task(values["dataset"]["task"]).is_language:
            with pytest.raises(ConfigError, match="method=head_only: "):
                from_dict(values)
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LORA_HARNESS_CACHE", str(tmp_path_factory.mktemp("cache")))
            patch.setattr(sources.datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(rows))
            # What another process reads, this one does not see.
            patch.setattr(preparation, "_in_child", lambda work: work())
            config = from_dict(values)
            seen = _watch(patch)
            result = run(config)
        assert result.status is Status.FINISHED, result.error
        assert find_problems(config) == []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LORA_HARNESS_CACHE", str(folder / "cache"))
            for name, hint in _leaves(config):
                found.setdefault(name, {})[scenario, method] = _becomes(config, name, hint, seen)
    return found


def test_every_setting_is_read_or_refused(table: dict[str, dict[tuple[str, str], str]]) -> None:
    scenarios = list(dict.fromkeys(scenario for column in table.values() for scenario in column))
    width = max(map(len, table))
    print("\nr: read. x: refused where it is not the default. Blank: its group is not there.")
    for number, (scenario, method) in enumerate(scenarios, start=1):
        print(f"{number:4} {scenario}, {method}")
    print(" " * width, *(f"{number:2}" for number in range(1, len(scenarios) + 1)))
    for name, column in table.items():
        marks = {"read": " r", "refused": " x"}
        print(
            f"{name:{width}}",
            *(marks.get(column.get(one, ""), "  " if one not in column else " ?") for one in scenarios),
        )
    odd = [
        f"{name}: {became} in {', '.join(one)}"
        for name, column in table.items()
        for one, became in column.items()
        if became not in ("read", "refused")
    ]
    assert odd == []


def test_every_setting_is_read_somewhere(table: dict[str, dict[tuple[str, str], str]]) -> None:
    # W&B, the hub's and other machines' parts are not here; tests of their own modules read them.
    elsewhere = {"model.asset", "model.hub_id", "model.revision", "model.quantization", "model.scratch.asset"}
    elsewhere |= {"tracking.project", "tracking.entity"}
    elsewhere |= {"rank", "target_layers"}  # one by one, where the method has them
    never = {name for name, column in table.items() if "read" not in column.values()}
    assert never <= elsewhere


def test_the_walk_sees_what_is_silent(folder: Path) -> None:
    """With nothing seen, a setting that is not refused is silent; a wrong value is no refusal of the setting."""
    config = from_dict(_values("classification", "lora", folder))
    assert _becomes(config, "trainer.beta1", float, set()) == "silent"
    assert _becomes(config, "trainer.beta1", float, {"trainer.beta1"}) == "read"
    assert _becomes(config, "dataset.blocks", Blocks, {"dataset.blocks"}) == "refused"
