"""The sweeper, and every committed sweep file: expanded, composed, validated and counted without running anything."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf
from transformers import BertConfig, FalconH1Config, GPT2Config, Lfm2Config, LlamaConfig, RobertaConfig

from harness.__main__ import main
from harness.config import composing
from harness.config.composing import register, to_dict
from harness.config.schema import RunConfig
from harness.content.files import base_model
from harness.forecast import memory
from harness.forecast.memory import MemoryForecast
from harness.forecast.parameters import size_of
from harness.forecast.request import ForecastError
from harness.measure import device
from harness.measure.device import DeviceMemory
from harness.measure.environment import environment
from harness.measure.memory import MemoryPeak
from harness.methods.peft_files import save_adapter
from harness.models import configs
from harness.models.configs import build_skeleton, load_model_config
from harness.plan import adapt
from harness.results.launches import read_launches
from harness.results.schema import RunResult, Status, write_result
from hydra_plugins.lora_harness import _composing
from hydra_plugins.lora_harness import sweeper as sweeper_module

ROOT = Path(__file__).resolve().parent.parent
# Without what `suggest` has written into a checkout, which is its user's.
SWEEP_FILES = sorted(path for path in (ROOT / "sweeps").glob("*.yaml") if not path.stem.endswith("_suggested"))
GOLDEN = json.loads((ROOT / "tests/golden/identities.json").read_text())
# Their ids follow from content that is not in this repository: no list can hold them.
NOT_GOLDEN = {
    **dict.fromkeys(
        ("demo_lm", "newsgpt_tuned", "newsgpt_audit_grid"),
        "starts from the weights of the run that sweeps=newsgpt makes",
    ),
    "e2e": "starts from the weights of the run that sweeps=newsgpt makes, and reads the files of a local folder",
    "gpt2_e2e": "reads the files of a local folder",
    "gpt2_e2e_rank": "reads the files of a local folder",
    **{f"forgetting_chain_{step}": "continues the runs of the step before" for step in (2, 3)},
    "roberta_from_mnli_2": "continues the runs of the step before",
    **{f"forgetting_glue_{step}": "continues the runs of the step before" for step in (2, 3, 4)},
}


class Launched(Exception):
    """Stands where the launcher would begin."""

    def __init__(self, overrides: list[list[str]]) -> None:
        self.overrides = overrides
        super().__init__()


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs `python -m harness -m ARGUMENTS` up to the launcher; returns exit code, runs and what was launched.

    DIR in the arguments is a folder with the files of E2E.
    """
    e2e = tmp_path_factory.mktemp("e2e")
    for name in ("train.txt", "valid.txt", "test.txt"):
        (e2e / name).write_text("meaning || reference\n")
    seen: dict[str, Any] = {}
    Plugins.instance()  # Hydra's scan runs the plug-in modules once more and would undo what is replaced below
    merge, split = sweeper_module._merge_equal, sweeper_module.split_cells

    def watched(runs: Any) -> Any:
        seen["runs"] = merge(runs)
        return seen["runs"]

    def split_and_seen(*arguments: Any) -> Any:
        seen["fixed"], seen["cells"] = split(*arguments)
        return seen["fixed"], seen["cells"]

    class Stand:
        def launch(self, job_overrides: list[list[str]], initial_job_idx: int) -> list[Any]:
            seen["launched"] = job_overrides
            return [JobReturn(overrides=each, status=JobStatus.COMPLETED) for each in job_overrides]

    monkeypatch.setattr(sweeper_module, "_merge_equal", watched)
    monkeypatch.setattr(sweeper_module, "split_cells", split_and_seen)
    monkeypatch.setattr(
        sweeper_module.GridSweeper,
        "setup",
        lambda self, hydra_context, task_function, config: self.__dict__.update(
            hydra_context=hydra_context, config=config, launcher=Stand()
        ),
    )

    def call(*arguments: str) -> tuple[int, dict[str, Any]]:
        seen.clear()
        GlobalHydra.instance().clear()
        monkeypatch.setattr(
            sys,
            "argv",
            ["harness", "-m", f"runs_dir={tmp_path}", *(word.replace("=DIR", f"={e2e}") for word in arguments)],
        )
        try:
            return main(), seen
        except SystemExit as error:  # a search whose trials have no score, since nothing was run
            return int(error.code or 0), seen

    return call


# What `config.json` of each hub model says of shapes, where it is not the default of its family.
PUBLISHED = {
    "FacebookAI/roberta-base": RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
    "google-bert/bert-base-uncased": BertConfig(),
    "openai-community/gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "openai-community/gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "tiiuae/Falcon-H1-0.5B-Base": FalconH1Config(
        hidden_size=1024, num_hidden_layers=36, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=2
    ),
    "LiquidAI/LFM2-350M": Lfm2Config(
        hidden_size=1024,
        num_hidden_layers=16,
        intermediate_size=6656,
        num_attention_heads=16,
        num_key_value_heads=8,
        full_attn_idxs=[2, 5, 8, 10, 12, 14],
    ),
    "meta-llama/Llama-3.2-1B": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
}


def shapes_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published shapes, where transformers would ask the hub."""
    load = configs.AutoConfig.from_pretrained

    def stand_in(source: str, **options: Any) -> Any:
        return copy.deepcopy(PUBLISHED[source]) if source in PUBLISHED else load(source, **options)

    monkeypatch.setattr(configs.AutoConfig, "from_pretrained", stand_in)


@pytest.fixture
def newsgpt(sweep: Any, tmp_path: Path) -> str:
    """The run id of the sweep that pretrains model=newsgpt, whose result and model's shape then lie in `tmp_path`."""
    code, seen = sweep("sweeps=newsgpt")
    assert code == 0
    (run,) = seen["runs"]
    # Under the name that the model has for it: whether that is right is for one test to say, and not for all.
    folder = tmp_path / yaml.safe_load((ROOT / "conf/model/newsgpt.yaml").read_text())["run"]
    load_model_config(run.config.model, num_labels=None, pad_token_id=0).save_pretrained(folder / "model")
    write_result(folder, RunResult(folder.name, folder.name, None, Status.FINISHED, to_dict(run.config)))
    return run.run_id


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A folder of runs for the sweeps that continue others, and which of those have left their results there."""
    return tmp_path_factory.mktemp("chains"), set()


def finish(path: Path, sweep: Any, chains: tuple[Path, set[str]]) -> None:
    """Launches what a sweep file continues, in the order of the chain, and leaves results and weights in its place."""
    runs_dir, finished = chains
    before = yaml.safe_load(path.read_text()).get("model", {}).get("from_sweep")
    if before is None or before in finished:
        return
    finish(path.with_name(f"{before}.yaml"), sweep, chains)
    code, seen = sweep(f"sweeps={before}", f"runs_dir={runs_dir}")
    assert code == 0
    finished.add(before)
    for each in seen["runs"]:
        folder, config, identity = runs_dir / each.run_id, each.config, each.planned.identity
        if config.method.name == "full":
            model = replace(config.model, from_sweep=None)
            load_model_config(model, num_labels=2, pad_token_id=0).save_pretrained(folder / "model")
            (folder / "model" / "of.json").write_text(each.run_id)  # each has weights of its own
        else:
            skeleton = build_skeleton(base_model(config), num_labels=2)
            adapt(skeleton, replace(config, model=replace(config.model, from_sweep=None)), ("classifier",))
            skeleton.to_empty(device="cpu")
            save_adapter(skeleton, folder / "adapter", rank=config.rank, head_modules=["classifier"])
        facts = {"content": identity.content}
        result = RunResult(each.run_id, identity.cell_id, before, Status.FINISHED, to_dict(config), environment=facts)
        write_result(folder, result)


def comment_of(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def arguments_of(path: Path) -> list[str]:
    """What the command in a sweep file's comment says after `-m harness -m`; of several commands, the last."""
    line = re.search(r"^# Command: (.*)", comment_of(path), re.MULTILINE)[1]  # type: ignore[index]
    return shlex.split(re.findall(r"python -m harness -m ((?:\S+=\S+ ?)+)", line)[-1])


@pytest.mark.parametrize("path", SWEEP_FILES, ids=lambda path: path.stem)
def test_every_sweep_file_expands_validates_and_counts_right(
    path: Path,
    sweep: Any,
    chains: tuple[Path, set[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    shapes_without_a_hub(monkeypatch)
    runs_dir, arguments = tmp_path, arguments_of(path)
    if "override /model: newsgpt\n" in path.read_text():
        request.getfixturevalue("newsgpt")
    if "from_sweep" in path.read_text():
        finish(path, sweep, chains)
        runs_dir, _ = chains
        arguments.append(f"runs_dir={runs_dir}")
    head = comment_of(path)
    for heading in ("Which table:", "Command:", "Runs:", "Time:"):
        assert heading in head
    announced = int(re.search(r"Runs: (\d+)", head)[1])  # type: ignore[index]

    assert f"sweeps={path.stem}" in arguments
    code, seen = sweep(*arguments)
    if "cells" in seen:
        assert code == 1
        assert len(seen["fixed"]) + sum(len(cell.seeds) for cell in seen["cells"]) == announced
        low, high = map(int, re.search(r"Trials: (\d+) to (\d+)", head).groups())  # type: ignore[union-attr]
        assert (low, high) == (5 * len(seen["cells"]), 6 * len(seen["cells"]))
        assert len(seen["launched"]) == 3 * len(seen["cells"])  # the first round
    else:
        assert code == 0
        assert len(seen["launched"]) == announced
    assert {run.config.sweep for run in seen["runs"]} == {path.stem}
    launches = read_launches(runs_dir, path.stem)
    assert launches is not None
    assert launches.run_ids == [run.run_id for run in seen["runs"]]
    # The last run, which has least in common with the first: Hydra alone composes it, and OmegaConf alone checks it.
    last, composer = seen["runs"][-1], list(_composing._composers.values())[-1]
    plain = OmegaConf.to_container(composer.load(last.overrides), resolve=False)
    assert OmegaConf.to_container(composer.compose(last.overrides), resolve=False) == plain
    assert composing._validated(plain) == last.config
    if path.stem not in NOT_GOLDEN:
        # Another id orphans every finished run: whoever changes the golden file does so on purpose.
        assert {run.run_id: run.planned.identity.cell_id for run in seen["runs"]} == GOLDEN["sweeps"][path.stem]


def test_a_part_of_a_sweep_is_added_to_what_was_launched_before(sweep: Any, tmp_path: Path) -> None:
    _, seen = sweep("sweeps=demo", "model=tiny_bert")
    whole = [run.run_id for run in seen["runs"]]
    _, seen = sweep("sweeps=demo", "model=tiny_bert", "rank=r8", "seed=0,1,2")
    launches = read_launches(tmp_path, "demo")
    assert launches is not None
    assert launches.run_ids == list(dict.fromkeys([*whole, *(run.run_id for run in seen["runs"])]))
    assert len(launches.run_ids) == 5 + 10  # rank 8 in two placements with three seeds; two more seeds of full and head
    assert [(launch.command or "").split()[-2:] for launch in launches.launches] == [
        ["sweeps=demo", "model=tiny_bert"],
        ["rank=r8", "seed=0,1,2"],
    ]
    assert [len(added) for added in launches.added_run_ids] == [5, 10]


def test_the_golden_list_holds_every_sweep_that_it_can() -> None:
    assert {path.stem for path in SWEEP_FILES} == {*GOLDEN["sweeps"], *NOT_GOLDEN}
    assert not NOT_GOLDEN.keys() & GOLDEN["sweeps"].keys()


def test_the_embedded_language_model_is_what_its_sweep_makes(newsgpt: str) -> None:
    named = yaml.safe_load((ROOT / "conf/model/newsgpt.yaml").read_text())["run"]
    assert named == newsgpt, (
        f"sweeps=newsgpt makes the run {newsgpt}, and model=newsgpt starts from {named}. Where the recipe was meant to "
        f"change, write `run: {newsgpt}` into conf/model/newsgpt.yaml, and make that run again."
    )


def test_a_sweep_on_the_embedded_language_model_asks_for_its_run(
    sweep: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, seen = sweep("sweeps=demo_lm")
    error = capsys.readouterr().err
    assert code == 2
    assert not seen
    assert "this run does not exist" in error and "run it first" in error


def test_the_wandb_sweep_names_what_exists() -> None:
    values = yaml.safe_load((ROOT / "sweeps/wandb/rank_by_target_layers.yaml").read_text())
    assert values["command"][:3] == ["python", "-m", "harness"]
    for group in ("rank", "target_layers"):
        for option in values["parameters"][group]["values"]:
            assert (ROOT / "conf" / group / f"{option}.yaml").is_file()
    own = yaml.safe_load((ROOT / "sweeps/rank_by_target_layers.yaml").read_text())["hydra"]["sweeper"]["grids"][0]
    assert {name: entry["values"] for name, entry in values["parameters"].items()} == {
        name: own[name] for name in ("rank", "target_layers", "seed")
    }


def test_a_misspelt_sweep_lists_those_that_exist(sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, seen = sweep("sweeps=dmo")
    assert code == 2
    assert not seen
    assert "sweeps=dmo: no such option. There are: demo," in capsys.readouterr().err


def test_a_bad_axis_in_one_of_three_grids_names_every_problem_before_anything_starts(
    sweep: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    grids = (
        "hydra.sweeper.grids=[{method:lora,rank:[r1,r8],target_layers:qv},"
        "{method:full,rank:r8},"
        "{method:lora,rank:r8,target_layers:[gate,nope],trainer.learning_rate:-1}]"
    )
    code, seen = sweep(grids, "model=tiny_bert")
    error = capsys.readouterr().err
    assert code == 2
    assert not seen
    assert "method=full takes no rank" in error
    assert "trainer.learning_rate=-1.0: allowed is a finite number above 0." in error
    assert "target_layers=nope: no such option. There are: all, all_embedding, all_lm_head," in error
    assert "search path" not in error
    assert "of 5 runs, the first: method=full rank=r8" in error
    assert not list(tmp_path.iterdir())


def test_placements_and_ranks_are_checked_against_the_model(sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, seen = sweep("model=tiny_bert", "rank=r8,r128", "target_layers=qv,gate")
    error = capsys.readouterr().err
    assert code == 2
    assert "launched" not in seen
    assert "gate does not exist" in error
    assert "rank=128: a 64 -> 64 projection allows 1 to 64." in error


def test_equal_runs_are_merged_with_a_word(sweep: Any, caplog: pytest.LogCaptureFixture) -> None:
    arguments = ("model=tiny_bert", "rank=r8", "target_layers=qv")
    code, seen = sweep(*arguments, "seed=0,1", "rank.rank=8,4")
    assert (code, len(seen["launched"])) == (0, 4)
    code, seen = sweep(*arguments, "trainer.learning_rate=1e-3,0.001")
    assert (code, len(seen["launched"])) == (0, 1)

    caplog.set_level("INFO")
    assert len(sweeper_module._merge_equal(seen["runs"] * 2)) == 1
    assert "1 of 2 runs are named more than once and are run once" in caplog.text


@pytest.fixture
def composer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """What composes the runs of a sweep from a folder of configs; each entry of its `loads` is a config of Hydra's."""
    register()
    GlobalHydra.instance().clear()

    def make(conf: Path) -> Any:
        initialize_config_dir(str(conf), version_base="1.3")
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", overrides=[], run_mode=RunMode.MULTIRUN)
        made = _composing.composer_of(HydraContext(config_loader=loader, callbacks=Callbacks()), master)
        loads: list[list[str]] = []
        load = made.load
        monkeypatch.setattr(made, "load", lambda overrides: loads.append(overrides) or load(overrides))
        return SimpleNamespace(compose=made.compose, load=load, loads=loads)

    return make


def outcome(compose: Any, overrides: list[str]) -> Any:
    try:
        return OmegaConf.to_container(compose(overrides), resolve=False)
    except HydraException as error:
        return type(error), str(error)


def test_runs_that_choose_the_same_files_are_composed_from_them_once(composer: Callable[[Path], Any]) -> None:
    """What is composed is what Hydra composes of all overrides at once: the config, or the error."""
    one = composer(ROOT / "conf")
    choices = ["model=tiny_bert", "rank=r2", "target_layers=qv"]
    also = ["model=tiny_llama", "dataset=friends", "rank=r2", "target_layers=qv", "evaluate_also=grimm_tales"]
    paper = ["reproduce=lora_paper/roberta_base_mrpc"]
    for overrides, num_loads in (
        ([*choices, "seed=1"], 1),
        ([*choices, "seed=2", "trainer.learning_rate=1e-4", "rank.alpha=4"], 0),
        (["trainer.batch_size=2", "model=tiny_bert", "rank=r4", "target_layers=qv", "rank.rank=3"], 1),
        (["rank=r2", "target_layers=all", "model=tiny_bert"], 1),
        (["model=tiny_bert", "rank=r2", "target_layers=all"], 0),
        (["model=tiny_bert", "rank=r4", "target_layers=all", "target_layers.blocks=[0]"], 0),
        ([*choices, "method=loha"], 1),
        ([*choices, "method=ia3"], 1),
        (["model=tiny_bert", "rank=r4", "target_layers=qv", "method=ia3", "method.peft.new=[1]"], 1),
        ([*choices, "++trainer.max_steps=3", "dataset={label_column:x}", "target_layers.blocks=[0]"], 0),
        ([*choices, "+stray.key=1"], 0),
        ([*choices, "trainer.stray=1"], 0),
        ([*choices, "trainer.max_steps=x"], 0),
        ([*choices, "seed=1,2"], 1),  # not for one run: Hydra says so
        ([*choices, "rank=r4"], 1),
        ([*choices, "rank=nope"], 1),
        (["model=tiny_bert", "rank=nope", "target_layers=qv"], 1),
        (["model=tiny_bert", "rank=007", "target_layers=qv"], 1),
        ([*choices, "hydra.launcher.workers=2"], 1),
        ([*also, "evaluate_also.grimm_tales.max_length=8"], 1),
        ([*also[:2], "rank=r4", *also[3:]], 1),
        ([*also[:-1], "evaluate_also=wikitext2"], 1),
        ([*paper, "method=full", "~rank", "~target_layers", "trainer.learning_rate=2e-5"], 1),
        ([*paper, "method=head_only", "~rank", "~target_layers", "trainer.learning_rate=2e-5"], 1),
        ([*paper, "~trainer.learning_rate"], 1),
        ([*paper, "rank=r4"], 1),
        (["reproduce=lora_paper/roberta_base_rte", "rank=r8"], 1),
    ):
        one.loads.clear()
        assert outcome(one.compose, overrides) == outcome(one.load, overrides), overrides
        assert len(one.loads) == num_loads, overrides


@pytest.mark.parametrize("by_interpolation", [False, True])
def test_a_file_that_a_choice_brings_along_is_composed_with_it(
    composer: Callable[[Path], Any], tmp_path: Path, by_interpolation: bool
) -> None:
    files = {
        "config.yaml": "defaults: [a: one, b: one, c: null, d: null, _self_]\na: {of_config: 1}\n",
        "a/one.yaml": "value: 1\nother: ${b.value}\n",
        "a/two.yaml": "value: 2\n",
        "b/one.yaml": "value: 1\n",
        "b/two.yaml": "value: 2\n",
        "c/brings.yaml": "defaults: [/b@of: two]\nvalue: 3\n",
        "c/everywhere.yaml": "# @package _global_\nb: {value: 4}\n",
        "d/of_one.yaml": "value: 1\n",
        "d/of_two.yaml": "value: 2\n",
    }
    if by_interpolation:
        files["config.yaml"] = files["config.yaml"].replace("d: null", "d: 'of_${a}'")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    one = composer(tmp_path)
    combinations = list(itertools.product(("one", "two"), ("one", "two"), ("", "brings", "everywhere")))
    for a, b, c in combinations:
        overrides = [f"a={a}", f"b={b}", *([f"c={c}"] if c else [])]
        assert outcome(one.compose, overrides) == outcome(one.load, overrides), overrides
        again = [*overrides, "a.value=7"]
        assert outcome(one.compose, again) == outcome(one.load, again), again
    # Three of the four pairs, with each choice of c; all where one may decide what another brings, the first twice.
    assert len(one.loads) == (len(combinations) + 1 if by_interpolation else 3 * 3)


def test_the_command_line_on_top_of_a_sweep_file(sweep: Any) -> None:
    _, seen = sweep("sweeps=demo", "rank=r4", "seed=0,1", "model=tiny_bert")
    runs = seen["runs"]
    assert len(runs) == 8
    assert {run.config.rank.rank for run in runs if run.config.rank} == {4}
    assert {run.config.model.name for run in runs} == {"tiny_bert"}


def test_a_dry_run_shows_and_starts_nothing(sweep: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, seen = sweep("sweeps=demo", "model=tiny_bert", "hydra.sweeper.dry_run=true")
    printed = capsys.readouterr().out
    assert code == 0
    assert "launched" not in seen
    assert "5 runs: 5 new" in printed
    # Two blocks, q and v, rank 4, 64 -> 64.
    assert re.search(r"lora-r4-qv-.*new +2,048 ", printed)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_predicts_peaks_once_for_each_shape(
    sweep: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    predicted: list[RunConfig] = []

    def predict(config: RunConfig) -> MemoryForecast:
        predicted.append(config)
        if config.method.name == "full":
            raise ForecastError("method=full: looks at values.")
        assert config.rank is not None
        return MemoryForecast(MemoryPeak(config.rank.rank * 2**30, 0, 0, 0), MemoryPeak(0, 0, 0, 0))

    monkeypatch.setattr(memory, "predict_memory", predict)
    monkeypatch.setattr(device, "device_memory", lambda **_: DeviceMemory("the GPU", 6 * 2**30))
    arguments = ("model=tiny_bert", "rank=r4,r8", "target_layers=qv", "seed=0,1", "trainer.learning_rate=1e-3,2e-3")
    code, seen = sweep(*arguments, "hydra.sweeper.dry_run=memory")
    printed = capsys.readouterr().out
    assert code == 0 and "launched" not in seen
    assert len(predicted) == 2
    assert len(re.findall(r"4\.00 GiB", printed)) == len(re.findall(r"8\.00 GiB", printed)) == 4
    (warning,) = (record.message for record in caplog.records if "not fit" in record.message)
    assert "-lora-r8-qv-" in warning and warning.partition(": ")[2] == (
        "is predicted to need 8,589,934,592 bytes (8.00 GiB), and the GPU has 6,442,450,944 (6.00 GiB), so that it "
        "will not fit; set a smaller trainer.micro_batch_size or dataset.max_length, or "
        "trainer.gradient_checkpointing=true."
    )
    assert warning.partition(": ")[0].endswith(" and 3 more")
    code, _ = sweep("model=tiny_bert", "method=full", "hydra.sweeper.dry_run=memory")
    assert code == 0 and "not known: method=full: looks at values." in capsys.readouterr().out
    code, _ = sweep("model=tiny_bert", "method=full", "hydra.sweeper.dry_run=maybe")
    assert code == 2 and "hydra.sweeper.dry_run=maybe: must be true, false or memory." in capsys.readouterr().err


def test_what_cannot_fit_is_said_before_it_starts(
    sweep: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "device_memory", lambda **_: DeviceMemory("this machine", 1_000_000))
    code, seen = sweep("model=tiny_bert", "rank=r4", "target_layers=qv")
    assert code == 0 and "launched" in seen
    assert not any("not fit" in record.message for record in caplog.records)
    # Weights, gradients and two moments in float32, of everything.
    _, seen = sweep("model=tiny_bert", "method=full")
    (warning,) = (record.message for record in caplog.records if "not fit" in record.message)
    num_params = size_of(seen["runs"][0].config).counts.num_total_params
    assert f": needs for weights, gradients and optimizer state alone {16 * num_params:,} bytes" in warning
    assert "launched" in seen


def test_a_runs_folder_that_cannot_be_written_is_named(
    sweep: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    code, seen = sweep("sweeps=demo", "model=tiny_bert", f"runs_dir={tmp_path / 'file'}")
    assert code == 2
    assert "launched" not in seen
    assert "cannot be written" in capsys.readouterr().err


def test_a_dry_run_tells_what_is_there_and_which_code_made_it(
    sweep: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ("model=tiny_bert", "rank=r2,r4", "target_layers=qv", "hydra.sweeper.dry_run=true")
    _, seen = sweep(*arguments)
    made, stopped = (run.run_id for run in seen["runs"])
    here = environment("cpu")
    for number, recorded in enumerate((here, {**here, "git_commit": "0" * 40, "versions": {"torch": "1.0"}})):
        result = RunResult(made, made, None, Status.FINISHED, {}, environment=recorded)
        write_result(tmp_path / made, result)
        (tmp_path / stopped).mkdir(exist_ok=True)
        (tmp_path / stopped / "checkpoint.safetensors").write_bytes(b"")
        capsys.readouterr()
        sweep(*arguments)
        printed = capsys.readouterr().out
        assert ("finished (other commit, package versions)" in printed) == bool(number)
        assert "2 runs: 1 finished, 1 stopped" in printed
