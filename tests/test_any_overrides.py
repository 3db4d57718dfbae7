"""Any overrides at all: a run is planned, or refused by a message that names a setting. Never a traceback.

    FUZZ_OVERRIDES=1000 pytest tests/test_any_overrides.py -s

tries a thousand combinations and prints how they ended; without the variable a short form runs.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

import harness.run
from harness.__main__ import main
from harness.config.folders import CONF_DIR
from harness.config.overrides import as_override_value
from harness.config.schema import DatasetConfig, ReadWhere, RunConfig, Task, default_of
from harness.results.schema import RunResult, Status

NUM_COMBINATIONS = int(os.environ.get("FUZZ_OVERRIDES", "25"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))


class Setting(NamedTuple):
    """A leaf of the schema: its dotted name, values of its type, and where it is read (None: everywhere)."""

    name: str
    plausible: tuple[str, ...]
    read_where: ReadWhere | None


PLAUSIBLE: dict[type, tuple[str, ...]] = {
    bool: ("true", "false"),
    int: ("1", "2", "4", "16"),
    float: ("0.1", "0.5", "1", "1e-3"),
    str: ("text", "label", "rows.csv", "q"),
}


def values_of_presets() -> dict[str, list[str]]:
    """What the files under conf/ give each setting, by its dotted name."""
    found: dict[str, set[str]] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                collect(f"{name}.{key}", item)
        else:
            found.setdefault(name, set()).add(as_override_value(value))

    for group in ("dataset", "method", "rank", "target_layers", "tracking", "trainer"):
        for path in (CONF_DIR / group).rglob("*.yaml"):
            collect(group, {key: value for key, value in yaml.safe_load(path.read_text()).items() if key != "defaults"})
    return {name: sorted(values) for name, values in found.items()}


def settings_of(node: type, prefix: str = "", preset_group: str = "") -> Iterator[Setting]:
    """The leaves below a class of the schema; `preset_group` is the group whose presets have values for them."""
    hints = get_type_hints(node)
    for item in fields(node):
        kinds = [kind for kind in (hints[item.name], *get_args(hints[item.name])) if isinstance(kind, type)]
        nested = [kind for kind in kinds if is_dataclass(kind)]
        if nested and item.name != "evaluate_also":
            yield from settings_of(nested[0], f"{prefix}{item.name}.", f"{preset_group}{item.name}.")
        else:
            members = [str(member) for kind in kinds if issubclass(kind, StrEnum) for member in kind]
            typed = [value for kind in kinds for value in PLAUSIBLE.get(kind, ())]
            values = [*members, *PRESET_VALUES.get(f"{preset_group}{item.name}", typed)]
            values = values or [as_override_value(default_of(item))]
            yield Setting(f"{prefix}{item.name}", tuple(values), item.metadata.get("read_where"))


PRESET_VALUES = values_of_presets()
SETTINGS = list(settings_of(RunConfig))
ADDITIONAL = list(settings_of(DatasetConfig, "evaluate_also.more.", "dataset."))
GROUPS = {
    group.name: sorted(path.relative_to(group).with_suffix("").as_posix() for path in group.rglob("*.yaml"))
    for group in CONF_DIR.iterdir()
    if group.is_dir() and group.name not in ("accelerate", "hydra")
}
ODD_VALUES = [
    *("null", "true", "false", "nan", "inf", "-inf", "0", "-1", "1", "2", "3", "7", "0.5", "1e-3", "1e400", "10" * 20),
    *("''", "' '", "a", "'two words'", "naïve", "日本", "'a=b'", "'[a'", "'{x}'", "'${seed}'", "'${nowhere}'", "'{'"),
    *("${seed}", "${nowhere}", "[]", "[a]", "[-1]", "[0,1]", "[null]", "[[a]]", "{}", "{a:1}", "{a:{b:c}}", "???"),
    *("../../x", "/", "~", "'a\\nb'", "first_0", "first_1", "last_99", "all", "q", "[q,q]", "[lm_head]", "local"),
]
# What a person mistypes on a command line.
BROKEN = [
    "rank=",
    "=3",
    "rank",
    "seed=[1",
    "seed='1",
    "a b",
    "+",
    "~",
    "~seed",
    "+seed=1",
    "++seed=x",
    "seed=1,2",
    "--",
]

BASES = {
    "classification": ("model=tiny_bert", "dataset=local"),
    "regression": ("model=tiny_bert", "dataset=local", "dataset.task=regression", "dataset.metrics=[pearson]"),
    "causal_lm": ("model=tiny_gpt2", "dataset=local_text"),
    "completion": ("model=tiny_llama", "dataset=local_completion", "dataset.prompt_template='{text}: '"),
    "chat": ("model=tiny_llama", "dataset=local_chat"),
}
METHODS = {
    "lora": ("rank=r2", "target_layers=qv"),
    "full": ("method=full",),
    "head_only": ("method=head_only",),
}


def read_by(task: str) -> list[Setting]:
    """The settings that a run on rows of one file reads, for a task."""
    config = RunConfig(dataset=DatasetConfig(task=Task(task), train_file="rows.csv"))
    return [each for each in SETTINGS if each.read_where is None or each.read_where.holds(config)]


def draw_overrides(chance: random.Random, train_file: Path) -> list[str]:
    """A base that is fine, and one to three overrides that may not be, of a run or of a sweep."""
    task = chance.choice(list(BASES))
    method = chance.choice(
        [name for name in METHODS if name != "head_only" or task in ("classification", "regression")]
    )
    overrides = [*BASES[task], *METHODS[method], f"dataset.train_file={train_file}", "trainer=debug", "tracking=off"]
    # Half of the combinations are what a person might mean, so that plans are met as well as refusals.
    is_sane = chance.random() < 0.5
    for _ in range(chance.choice([1, 1, 2, 3])):
        kind = chance.random()
        if not is_sane and kind < 0.05:
            overrides.append(chance.choice(BROKEN))
        elif kind < 0.15:
            group, options = chance.choice(sorted(GROUPS.items()))
            overrides.append(f"{group}={chance.choice([*options, 'nonsense', 'null'])}")
        elif is_sane:
            setting = chance.choice(read_by(task))
            overrides.append(f"{setting.name}={chance.choice(setting.plausible)}")
        else:
            setting = chance.choice(SETTINGS if kind < 0.95 else ADDITIONAL)
            value = chance.choice(setting.plausible if chance.random() < 0.6 else ODD_VALUES)
            overrides.append(f"{'+' if 'more' in setting.name else ''}{setting.name}={value}")
    return ["-m", *overrides, "hydra.sweeper.dry_run=true"] if chance.random() < 0.25 else overrides


def names_a_setting(message: str, overrides: list[str]) -> bool:
    """Whether a message has the name of an override, of its group, or of its last part."""
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    # The setting itself, what it lies in (`rank` of `rank.alpha`), or the whole override.
    names = {key.rsplit(".", cut)[0] for key in keys if key for cut in range(key.count(".") + 1)}
    return any(re.search(rf"(^|\W){re.escape(name)}\b", message) for name in names) or any(
        override in message for override in overrides
    )


@pytest.fixture
def plan_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[[list[str]], tuple[int, str]]:
    """`python -m harness` up to the moment at which the run would begin."""
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.chdir(tmp_path)
    finished = RunResult(run_id="x", cell_id="x", sweep=None, status=Status.FINISHED, config={})
    monkeypatch.setattr(harness.run, "run", lambda config, identity: finished)

    def call(overrides: list[str]) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["harness", *overrides])
        GlobalHydra.instance().clear()
        capfd.readouterr()
        try:
            code = main()
        except SystemExit as error:  # argparse, for what it takes for an option
            code = error.code if isinstance(error.code, int) else 1
        return code, capfd.readouterr().err

    return call


def test_any_overrides_are_planned_or_refused_by_name(
    plan_only: Callable[[list[str]], tuple[int, str]], tmp_path: Path
) -> None:
    train_file = tmp_path / "rows.csv"
    train_file.write_text("text,label\n" + "".join(f"text {row},{row % 2}\n" for row in range(60)))
    chance = random.Random(SEED)
    ends: Counter[str] = Counter()
    wrong: list[str] = []
    for _ in range(NUM_COMBINATIONS):
        overrides = draw_overrides(chance, train_file)
        shown = shlex.join(overrides)
        try:
            code, message = plan_only(overrides)
        except Exception as error:
            ends["traceback"] += 1
            wrong.append(f"{shown}\n    {type(error).__name__}: {error}")
            continue
        ends[{0: "planned", 2: "refused"}.get(code, f"exit code {code}")] += 1
        if code not in (0, 2):
            wrong.append(f"{shown}\n    exit code {code}: {message}")
        if code == 2 and not names_a_setting(message, overrides):
            wrong.append(f"{shown}\n    names no setting: {message}")
    print(f"{NUM_COMBINATIONS} combinations of overrides, seed {SEED}:", dict(ends))
    assert not wrong, "\n".join(wrong)
    assert ends["planned"] and ends["refused"]
