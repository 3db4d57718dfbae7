"""Runs that continue earlier ones: adapters and full models, heads, and what is forgotten of earlier tasks."""

from __future__ import annotations

import csv
import functools
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_analysis_load import save_run
from test_analysis_tables import measured
from test_run import config, exact, rows  # noqa: F401

from analysis.load import load_runs
from analysis.select import cells
from analysis.tables import paper_tables
from harness.chain import load_earlier_tasks, with_head
from harness.config.composing import from_dict, to_dict
from harness.config.schema import RunConfig
from harness.config.validation import ConfigError
from harness.content.errors import DataError, ModelError
from harness.content.files import base_model
from harness.content.identity import identify
from harness.methods.adapting import lora_layers, trained_biases
from harness.methods.lora import LoRAError
from harness.methods.peft_files import load_adapter, start_from_adapter
from harness.models.loading import load_model
from harness.plan import plan
from harness.prepare import prepare
from harness.results.launches import record_launch
from harness.results.schema import RunResult, Status
from harness.run import run
from harness.saved import base_key, find_saved

COLOURS = {"warm": "red orange amber scarlet", "cold": "blue teal cyan navy"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def write_rows(path: Path, words: dict[str, str], *, seed: int = 0) -> Path:
    draw = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(80):
            label = list(words)[number % len(words)]
            writer.writerow([" ".join(draw.choices(words[label].split(), k=4)), label])
    return path


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in two classes."""
    return write_rows(tmp_path_factory.mktemp("colours") / "train.csv", COLOURS)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in three classes."""
    words = {"small": "one two three", "large": "hundred thousand million", "none": "zero null nil"}
    return write_rows(tmp_path_factory.mktemp("numbers") / "train.csv", words)


def on(path: Path, name: str) -> dict[str, Any]:
    return {"name": name, "train_file": str(path)}


@functools.cache
def _kept_runs() -> Path:
    return Path(tempfile.mkdtemp(prefix="kept_runs"))


@pytest.fixture(scope="module", autouse=True)
def _no_kept_runs_are_left() -> Iterator[None]:
    yield
    shutil.rmtree(_kept_runs())
    _kept_runs.cache_clear()


def finished(wanted: RunConfig) -> RunResult:
    """The result of a run, left in its `runs_dir`; one that continues no other is computed once for all tests."""
    run_id = identify(wanted).run_id
    kept = _kept_runs() / run_id
    if kept.exists():
        shutil.copytree(kept, Path(wanted.runs_dir) / run_id)
    result = run(wanted)
    assert (result.status, result.error) == (Status.FINISHED, "")
    if "chain" not in result.environment and not kept.exists():
        shutil.copytree(Path(wanted.runs_dir) / run_id, kept)
    return result


def launched(runs_dir: Path, sweep: str, *results: RunResult) -> None:
    record_launch(runs_dir, sweep, run_ids=[result.run_id for result in results], command="")


def test_a_chain_keeps_every_head_and_says_what_was_forgotten(
    rows: Path,  # noqa: F811
    colours: Path,
    numbers: Path,
    tmp_path: Path,
) -> None:
    first = finished(config(rows, tmp_path, trainer={"max_steps": 30}))
    second = finished(config(rows, tmp_path, dataset=on(colours, "colours"), model={"adapter": first.run_id}))
    third = finished(config(rows, tmp_path, dataset=on(numbers, "numbers"), model={"adapter": second.run_id}))

    assert "chain" not in first.environment and "forgetting_score" not in first.metrics
    assert second.environment["chain"] == [first.run_id]
    assert third.environment["chain"] == [first.run_id, second.run_id]
    assert any("drawn from the seed" in note for note in second.environment["model_notes"])
    earlier = third.environment["earlier_tasks"]
    assert list(earlier) == ["words", "colours"]
    assert [earlier[name]["run_id"] for name in earlier] == third.environment["chain"]
    assert earlier["words"]["before"] == second.environment["earlier_tasks"]["words"]["before"]
    for name, of in (("words", first), ("colours", second)):
        assert earlier[name]["before"]["test_accuracy"] == of.metrics["test_accuracy"]
        assert earlier[name]["before"]["val_nll"] == of.metrics["val_nll"]
        assert earlier[name]["after"].keys() == earlier[name]["before"].keys()
    for moment, metric in (("before", "earlier_tasks_score_before"), ("after", "earlier_tasks_score")):
        mean = sum(earlier[name][moment]["test_accuracy"] for name in earlier) / 2
        assert third.metrics[metric] == pytest.approx(mean)
    assert third.metrics["forgetting_score"] == pytest.approx(
        third.metrics["earlier_tasks_score_before"] - third.metrics["earlier_tasks_score"]
    )
    # What a run continued may go when it has ended.
    shutil.rmtree(tmp_path / second.run_id / "adapter" / "heads")
    shutil.move(tmp_path / second.run_id, tmp_path.parent / "gone")
    (saved,) = find_saved([third.run_id], tmp_path)
    assert base_key(saved) == base_key(*find_saved([first.run_id], tmp_path))
    shutil.move(tmp_path.parent / "gone", tmp_path / second.run_id)
    # The kept heads are those that were trained, bit by bit.
    for name, of in (("words", first), ("colours", second)):
        kept = load_file(tmp_path / third.run_id / "adapter" / "heads" / f"{name}.safetensors")
        saved = load_file(tmp_path / of.run_id / "adapter" / "adapter_model.safetensors")
        assert kept and all(torch.equal(value, saved[f"base_model.model.{key}"]) for key, value in kept.items())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_before_a_step_nothing_is_forgotten(
    rows: Path,  # noqa: F811
    colours: Path,
    tmp_path: Path,
    method: str,
) -> None:
    """With a rate of almost nothing the scores of the earlier task are those of its own run: same base, same head."""
    first = finished(config(rows, tmp_path, method, trainer={"max_steps": 30}))
    start = {"adapter": first.run_id} if method == "lora" else {"run": first.run_id, "tiny": None}
    standing = {"learning_rate": 1e-30, "max_steps": 1, "weight_decay": 0.0}
    wanted = config(rows, tmp_path, method, dataset=on(colours, "colours"), model=start, trainer=standing)
    second = finished(wanted)
    found = second.environment["earlier_tasks"]["words"]
    assert found["after"] == pytest.approx(found["before"], abs=1e-6)
    assert found["before"]["test_accuracy"] == first.metrics["test_accuracy"]
    assert second.metrics["forgetting_score"] == 0.0

    moved = finished(
        config(rows, tmp_path, method, dataset=on(colours, "colours"), model=start, trainer={"learning_rate": 3e-2})
    )
    after = moved.environment["earlier_tasks"]["words"]["after"]
    assert after["test_nll"] != pytest.approx(found["before"]["test_nll"], abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_sweep_continues_the_run_of_the_same_method_and_seed(
    rows: Path,  # noqa: F811
    colours: Path,
    tmp_path: Path,
    method: str,
) -> None:
    firsts = [finished(config(rows, tmp_path, name, seed=seed)) for seed in (0, 1) for name in ("lora", "full")]
    launched(tmp_path, "one", *firsts)
    assert len({first.cell_id for first in firsts}) == 2
    results = []
    for seed in (0, 1):
        wanted = config(rows, tmp_path, method, dataset=on(colours, "colours"), model={"from_sweep": "one"}, seed=seed)
        result = finished(wanted)
        (source,) = result.environment["chain"]
        parent = next(first for first in firsts if first.run_id == source)
        assert (parent.config["seed"], parent.config["method"]["name"]) == (seed, method)
        assert result.environment["earlier_tasks"]["words"]["before"]["test_nll"] == parent.metrics["test_nll"]
        results.append(result)
    # One cell of two seeds, though each began with weights of its own.
    assert len({result.cell_id for result in results}) == 1
    assert len({result.run_id for result in results}) == 2
    assert identify(wanted).run_id == result.run_id


def test_a_run_begins_where_the_adapter_ended(rows: Path, colours: Path, tmp_path: Path) -> None:  # noqa: F811
    wanted = {"variant": {"name": "dora", "dora": True}}
    first = finished(config(rows, tmp_path, **wanted))
    saved = load_file(tmp_path / first.run_id / "adapter" / "adapter_model.safetensors")
    for source in (first.run_id, str(tmp_path / first.run_id / "adapter")):
        continued = config(rows, tmp_path, dataset=on(colours, "colours"), model={"adapter": source}, **wanted)
        prepared = prepare(continued)
        layers = dict(lora_layers(prepared.model))
        assert len(layers) > 2
        for name, layer in layers.items():
            (update,) = layer.updates().values()
            assert torch.equal(update.lora_A, saved[f"base_model.model.{name}.lora_A.weight"])
            assert torch.equal(update.lora_B, saved[f"base_model.model.{name}.lora_B.weight"])
            magnitude = saved[f"base_model.model.{name}.lora_magnitude_vector.weight"]
            assert torch.equal(update.lora_magnitude, magnitude)
            assert update.lora_B.requires_grad and update.lora_B.any()
        assert prepared.environment["chain"] == [first.run_id]
        assert [task.name for task in prepared.earlier] == ["words"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_same_classes_keep_their_head(rows: Path, tmp_path: Path, method: str) -> None:  # noqa: F811
    first = finished(config(rows, tmp_path, method))
    launched(tmp_path, "one", first)
    same = prepare(config(rows, tmp_path, method, dataset={"name": "other"}, model={"from_sweep": "one"}))
    fresh = prepare(config(rows, tmp_path, method))
    path = next((tmp_path / first.run_id).glob("*/*model.safetensors"))
    saved = {name.removeprefix("base_model.model."): value for name, value in load_file(path).items()}
    heads = {name for name in saved if name.startswith("classifier.")}
    assert heads
    for name in heads:
        assert torch.equal(same.model.get_parameter(name), saved[name])
        assert not torch.equal(fresh.model.get_parameter(name), saved[name])
    assert any("is that of" in note for note in same.environment["model_notes"])  # type: ignore[attr-defined]


def test_classes_that_are_numbers_are_others_under_another_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.csv", {"0": "red orange", "1": "blue teal"})
    first = finished(config(path, tmp_path))
    for name, words in (("other", "drawn from the seed"), ("words", "is that of")):
        prepared = prepare(config(path, tmp_path, dataset={"name": name}, model={"adapter": first.run_id}))
        assert any(words in note for note in prepared.environment["model_notes"])  # type: ignore[attr-defined]
        assert [task.name for task in prepared.earlier] == ([] if name == "words" else ["words"])


def test_content_decides_the_id_and_not_where_it_lies(rows: Path, colours: Path, tmp_path: Path) -> None:  # noqa: F811
    first = finished(config(rows, tmp_path))
    other = finished(config(rows, tmp_path, trainer={"learning_rate": 1e-3}))
    shutil.copytree(tmp_path / first.run_id, tmp_path / "elsewhere" / "run")
    shutil.copytree(tmp_path / first.run_id / "adapter", tmp_path / "copy")

    def run_id(**model: Any) -> str:
        return identify(config(rows, tmp_path, dataset=on(colours, "colours"), model=model)).run_id

    assert run_id(adapter=first.run_id) == run_id(adapter=str(tmp_path / "elsewhere" / "run" / "adapter"))
    # Of a copy outside its run nobody knows what the head was trained on: it is drawn, and no earlier task is scored.
    alone = run_id(adapter=str(tmp_path / "copy"))
    assert len({run_id(adapter=first.run_id), run_id(adapter=other.run_id), alone, run_id()}) == 4


def test_what_does_not_fit_is_refused_before_training(rows: Path, colours: Path, tmp_path: Path) -> None:  # noqa: F811
    first = finished(config(rows, tmp_path))
    full = finished(config(rows, tmp_path, "full"))

    def continuing(adapter: str = first.run_id, **changes: Any) -> RunConfig:
        model = {"adapter": adapter, **changes.pop("model", {})}
        return config(rows, tmp_path, dataset=on(colours, "colours"), model=model, **changes)

    for wanted, error, message in (
        (continuing(rank={"rank": 2, "alpha": 16.0}), LoRAError, "has rank 4 on .* this run 2: set rank.rank=4"),
        (continuing(rank={"rank": 4, "alpha": 8.0}), LoRAError, "scaling 4 on .* this run 2: .*rank.alpha=16"),
        (continuing(target_layers={"name": "q", "projections": ["q"]}), LoRAError, "it adapts other modules .*, too"),
        (continuing(target_layers={"name": "x", "projections": ["q", "k", "v"]}), LoRAError, "it has none of"),
        (continuing(variant={"name": "dora", "dora": True}), LoRAError, "no DoRA: set variant.dora=false"),
        (
            continuing(variant={"name": "bias", "bias": "adapted"}),
            LoRAError,
            r"it has bias=none in PEFT's words and this run trains other biases .*: set variant.bias=none",
        ),
        (continuing(model={"tiny": "llama"}), (LoRAError, ModelError), "another base model|of which this model has"),
        (continuing(seed=1), ModelError, "another base model .*drawn at random from seed=0"),
        (continuing(model={"tiny": "gpt2"}), ModelError, "another base model"),
        (continuing("nothing"), ModelError, "neither a run in runs_dir"),
        (continuing(full.run_id), ModelError, "method=full and so no adapter to continue"),
    ):
        with pytest.raises(error, match=message):
            identify(wanted)
            plan(wanted)
        with pytest.raises(error, match=message):
            prepare(wanted)
    with pytest.raises(ConfigError, match="is read by method=lora"):
        config(rows, tmp_path, "full", model={"adapter": first.run_id})
    with pytest.raises(ConfigError, match=r"variant.init=orthogonal: A and B begin as the adapter"):
        continuing(variant={"name": "orthogonal", "init": "orthogonal"})
    with pytest.raises(ConfigError, match="score_earlier_tasks=false: is read where"):
        config(rows, tmp_path, score_earlier_tasks=False)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (
            {"base_model.model.bert.embeddings.word_embeddings.weight": (300, 64)},
            r"word_embeddings.weight is \(300, 64\)",
        ),
        ({"base_model.model.nonsense.weight": (2, 2)}, "it has nonsense.weight, the model has no such tensor"),
        (
            {"base_model.model.bert.encoder.layer.0.attention.self.key.weight": (64, 64)},
            "key.weight is not that of the base: more than an adapter was trained; merge it into its base",
        ),
    ],
)
def test_an_adapter_with_a_trained_base_is_not_continued_without_it(
    beside: dict[str, tuple[int, int]],
    message: str,
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    first = finished(config(rows, tmp_path))
    shutil.copytree(tmp_path / first.run_id / "adapter", tmp_path / "more")
    path = tmp_path / "more" / "adapter_model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(shape) for name, shape in beside.items()}, path)
    with pytest.raises(LoRAError, match=message):
        prepare(config(rows, tmp_path, model={"adapter": str(tmp_path / "more")}))


def test_a_sweep_that_has_no_such_run_is_refused(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    def continuing(**changes: Any) -> RunConfig:
        return config(rows, tmp_path, model={"from_sweep": "one"}, dataset={"name": "next"}, **changes)

    with pytest.raises(ModelError, match=r"no sweep of that name was launched .* there are: none. Run it first"):
        identify(continuing())
    first = finished(config(rows, tmp_path))
    launched(tmp_path, "one", first)
    identify(continuing())
    with pytest.raises(ModelError, match=r"none of its 1 runs .* has finished with method=lora.* seed=1"):
        identify(continuing(seed=1))
    launched(tmp_path, "one", finished(config(rows, tmp_path, trainer={"learning_rate": 1e-3})))
    with pytest.raises(ModelError, match=r"2 of its runs finished with .*model.adapter=RUN_ID"):
        identify(continuing())
    with pytest.raises(ConfigError, match="both say where this run starts"):
        config(rows, tmp_path, model={"from_sweep": "one", "adapter": first.run_id})
    with pytest.raises(ConfigError, match=r"model.from_sweep=one: is read by method=lora and method=full"):
        config(rows, tmp_path, "head_only", model={"from_sweep": "one"})


def test_other_data_of_an_earlier_task_are_refused(colours: Path, tmp_path: Path) -> None:
    own = write_rows(tmp_path / "own.csv", {"a": "one two", "b": "three four"})
    first = finished(config(own, tmp_path))
    wanted = config(own, tmp_path, dataset=on(colours, "colours"), model={"adapter": first.run_id})
    write_rows(own, {"a": "one two", "b": "three four"}, seed=1)
    with pytest.raises(DataError, match=r"dataset=words: has other rows than when .*score_earlier_tasks=false"):
        prepare(wanted)
    own.unlink()
    with pytest.raises(DataError, match=r"an earlier task: .*score_earlier_tasks=false"):
        prepare(wanted)
    without = from_dict({**to_dict(wanted), "score_earlier_tasks": False})
    result = finished(without)
    assert "earlier_tasks" not in result.environment and result.environment["chain"] == [first.run_id]


def test_an_adapter_of_peft_continues_without_a_run(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    """A folder of which no run is known: A and B are its own, nothing is scored that nobody trained here."""
    first = finished(config(rows, tmp_path / "elsewhere"))
    shutil.copytree(tmp_path / "elsewhere" / first.run_id / "adapter", tmp_path / "adapter")
    result = finished(config(rows, tmp_path, model={"adapter": str(tmp_path / "adapter")}))
    assert "chain" not in result.environment and "earlier_tasks" not in result.environment
    assert any("in the folder of no finished run" in note for note in result.environment["model_notes"])
    # The same adapter of the run itself has a head that is known: another computation, and so another run.
    own = config(rows, tmp_path, model={"adapter": str(tmp_path / "elsewhere" / first.run_id / "adapter")})
    assert identify(own).run_id != result.run_id
    damaged = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**damaged, "peft_type": "IA3"}))
    prepared = prepare(config(rows, tmp_path))
    with pytest.raises(LoRAError, match="peft_type='IA3', this loads LORA"):
        start_from_adapter(prepared.model, tmp_path / "adapter", named="model.adapter=x")
    assert exact(result.metrics)


@pytest.mark.parametrize(
    ("changes", "num_parts"),
    [
        ({"model": {"name": "tiny_gpt2", "tiny": "gpt2"}}, 2),  # q and v are rows of one matrix
        ({"rank": {"rank": 4, "alpha": 12.0, "pattern": {"v": 2, "q@first_1": 3}}}, 1),
        ({"target_layers": {"name": "x", "projections": ["q", "embedding"]}}, 1),
        ({"variant": {"name": "bias", "bias": "all"}}, 1),
    ],
)
def test_whatever_is_adapted_begins_where_it_ended(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    changes: dict[str, Any],
    num_parts: int,
) -> None:
    first = finished(config(rows, tmp_path, **changes))
    model = {**changes.get("model", {}), "adapter": first.run_id}
    prepared = prepare(config(rows, tmp_path, **{**changes, "model": model}))
    layers = dict(lora_layers(prepared.model))
    assert {len(layer.updates()) for layer in layers.values()} == {num_parts}
    (saved,) = find_saved([first.run_id], tmp_path)
    reference = load_model(base_model(saved.config), num_labels=3, pad_token_id=0, seed=0).model
    load_adapter(reference, saved.weights_dir)
    expected = dict(lora_layers(reference))
    assert expected.keys() == layers.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.delta_weight(), expected[name].delta_weight())
        assert layer.delta_weight().any()
    biases, own = trained_biases(prepared.model), trained_biases(reference)
    assert biases.keys() == own.keys() and bool(biases) == ("variant" in changes)
    assert all(torch.equal(biases[name], value) for name, value in own.items())


def test_an_adapter_on_the_hub_names_its_base(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    """Of a folder that no run left: the repository and revision in PEFT's config, where they are there."""
    first = finished(config(rows, tmp_path / "elsewhere"))
    shutil.copytree(tmp_path / "elsewhere" / first.run_id / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text())
    source = {"hub_id": "a/b", "revision": "1" * 40, "tiny": None, "adapter": str(tmp_path / "adapter")}
    wanted = config(rows, tmp_path, model=source)
    for name, revision, fits in (
        ("a/b", "1" * 40, True),
        ("a/b", None, True),
        (None, None, True),
        ("a/b", "2" * 40, False),
        ("a/c", None, False),
    ):
        path.write_text(json.dumps({**values, "base_model_name_or_path": name, "revision": revision}))
        if fits:
            identify(wanted)
            continue
        with pytest.raises(ModelError, match=rf"another base model \({name}.*choose the base"):
            identify(wanted)


def test_a_sweep_does_not_continue_itself_and_parts_of_a_head_are_none(
    rows: Path,  # noqa: F811
    colours: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"model.from_sweep=one: is the sweep of this run itself"):
        config(rows, tmp_path, model={"from_sweep": "one"}, sweep="one")
    first = finished(config(rows, tmp_path))
    wanted = config(rows, tmp_path, dataset=on(colours, "colours"), model={"adapter": first.run_id}, shard_model=True)
    prepared = prepare(wanted)
    assert len(prepared.earlier) == 1
    with pytest.raises(ConfigError, match=r"score_earlier_tasks=true: .* shard_model=true holds in parts"):
        load_earlier_tasks(wanted, prepared.base, prepared.tokenizer, num_processes=2)
    own = prepared.model.get_parameter("classifier.weight")
    with with_head(prepared.model, prepared.earlier[0].head):
        assert prepared.model.get_parameter("classifier.weight").shape[0] == 3
    assert prepared.model.get_parameter("classifier.weight") is own


def test_the_report_has_a_table_of_earlier_tasks(tmp_path: Path) -> None:
    """Numbers worked by hand: two seeds that lose 0.1 and 0.3 of one task and gain 0.05 and 0.15 of another."""
    for seed, (words, colours) in enumerate([((0.9, 0.8), (0.5, 0.55)), ((0.8, 0.5), (0.6, 0.75))]):
        save_run(tmp_path, f"a-s{seed}", cell_id="a", seed=seed, metrics=measured(forgetting_score=0.1))
        path = tmp_path / f"a-s{seed}" / "result.json"
        values = json.loads(path.read_text())
        values["environment"]["earlier_tasks"] = {
            name: {
                "run_id": "x",
                "metric": "accuracy",
                "before": {"test_accuracy": before, "val_accuracy": 0.0},
                "after": {"test_accuracy": after, "val_accuracy": 0.0},
            }
            for name, (before, after) in (("words", words), ("more.colours", colours))
        }
        path.write_text(json.dumps(values))
    frame = load_runs(tmp_path).frame
    tables = {table.name: table for table in paper_tables(frame, cells(frame))}
    found = tables["earlier_tasks"]
    first = found.text.titles.index("earlier task")
    assert [row[first:] for row in found.text.rows] == [
        ["words", "test accuracy", "0.8500 ± 0.0707", "0.6500 ± 0.2121", "+0.2000 ± 0.1414"],
        ["more.colours", "test accuracy", "0.5500 ± 0.0707", "0.6500 ± 0.1414", "-0.1000 ± 0.0707"],
    ]
    assert found.run_ids == [("a-s0", "a-s1")] * 2
    assert found.numbers["forgotten"].tolist() == pytest.approx([0.2, -0.1])
    assert "forgotten of earlier tasks ↓" in tables["tradeoff"].text.titles

    save_run(tmp_path / "others", "b-s0", cell_id="b", seed=0, metrics=measured())
    frame = load_runs(tmp_path / "others").frame
    assert "earlier_tasks" not in {table.name for table in paper_tables(frame, cells(frame))}
