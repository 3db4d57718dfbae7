"""The documentation: every command and every block of code in it works, and the reference has all that there is."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from scripts import load_script
from test_analysis_load import save_run, save_sweep
from test_analysis_tables import measured
from test_settings_are_read import GROUPS
from test_sweeps import sweep  # noqa: F401 (a fixture)
from transformers import ElectraConfig, ElectraForSequenceClassification

from analysis import figures
from analysis.__main__ import _parser
from analysis.__main__ import main as analyse
from harness.__main__ import main
from harness.cli import OF_ANALYSIS, OF_ENDED_RUNS, _as_typed_to_harness
from harness.commands import dataset_preset, find_request
from harness.config.composing import from_composed, register
from harness.config.folders import CONF_DIR, find_own, use_own
from harness.config.schema import ModelConfig, RankConfig, RunConfig, ScratchConfig, TargetLayersConfig, TinyModel
from harness.content.identity import scientific
from harness.extensions import GROUP
from harness.models.tokenizers import load_tokenizer
from harness.placement import architectures
from harness.plan import plan
from harness.results import methods, metrics
from harness.results.schema import RunResult, Status
from harness.run import run
from hydra_plugins.lora_harness import sweeper as sweeper_module
from hydra_plugins.lora_harness._grids import expand

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
TUTORIAL = "docs/tutorial.md"
EXTENSIONS = ("docs/how-to/add-a-metric.md", "docs/how-to/add-a-model-type.md", "docs/how-to/add-a-method.md")
"""Pages whose command needs the code that they show."""


reference = load_script("docs/reference.py")


# ---------------------------------------------------------------- what the pages hold


@dataclass(frozen=True)
class Block:
    """A block of code: its language, the file that it is where it has a title, its text."""

    language: str
    title: str | None
    text: str


LANGUAGES = {"sh", "console", "python", "yaml", "toml", "json", "text", "latex"}


def blocks(page: str, *languages: str) -> list[Block]:
    found = re.findall(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', PAGES[page], flags=re.DOTALL | re.MULTILINE)
    # The README leaves the language out.
    listed = [Block(language or "sh", title or None, text) for language, title, text in found]
    return [block for block in listed if not languages or block.language in languages]


def commands(page: str) -> list[str]:
    """The lines of a page's shell blocks; what stands behind three spaces explains them."""
    lines = [line for block in blocks(page, "sh") for line in block.text.splitlines()]
    return [re.split(r" {3,}", line)[0].strip() for line in lines if line.strip()]


# Each command once, by the first page that shows it.
SHOWN_BY = {command: page for page in reversed(PAGES) for command in commands(page)}


def having(*languages: str) -> list[str]:
    return [page for page in PAGES if blocks(page, *languages)]


def test_every_block_is_of_a_language_that_a_test_knows() -> None:
    for page, text in PAGES.items():
        fences = len(re.findall(r"^```", text, flags=re.MULTILINE))
        assert fences == 2 * len(blocks(page)), f"{page}: a block that is not read"
        assert {block.language for block in blocks(page)} <= LANGUAGES, page


def test_the_pages_show_what_they_are_for() -> None:
    assert len(commands("README.md")) >= 12
    assert len(PAGES["README.md"].splitlines()) <= 150
    assert sum(len(blocks(page, "console")) for page in PAGES) >= 10


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_from_outside_the_site_lead_to_files(page: str) -> None:
    # mkdocs checks those inside.
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", PAGES[page])
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


# ---------------------------------------------------------------- a folder to run them in


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Makes an empty folder the current one and writes the files of a page there, beside rows of every kind."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def write(page: str) -> Path:
        rows = [f"text {number},{('good', 'bad')[number % 2]}" for number in range(40)]
        files = {
            "train.csv": "\n".join(["text,label", *rows, ""]),
            "test.csv": "\n".join(["text,label", *rows[:10], ""]),
            "holes.csv": "text,label\na text,good\n,bad\n",
            "corpus.txt": "a line\nanother line\n",
            "chats.jsonl": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
        }
        files |= {block.title: block.text for block in blocks(page) if block.title is not None}
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if page == TUTORIAL:
            runpy.run_path("make_reviews.py")
        use_own(find_own([]))
        return folder

    yield write
    monkeypatch.chdir(ROOT)
    use_own(find_own([]))
    GlobalHydra.instance().clear()


def composed(overrides: list[str], *, config: str = "config") -> RunConfig:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return from_composed(compose(config, overrides=overrides))


def overrides_of(command: str) -> list[str]:
    words = shlex.split(command)
    return words[words.index("harness") + 1 :]


# ---------------------------------------------------------------- commands


def runs_of(words: list[str]) -> list[list[str]]:
    """The overrides of every run of a multirun."""
    parsed = OverridesParser.create().parse_overrides(words)
    given = {override.get_key_element(): sweeper_module._values(override) for override in parsed}
    (name,) = given.get("sweeps", [None])
    files = [path for path in (Path(f"sweeps/{name}.yaml"), ROOT / f"sweeps/{name}.yaml") if path.is_file()]
    assert files or name is None, f"no sweep {name}"
    grids = yaml.safe_load(files[0].read_text(encoding="utf-8"))["hydra"]["sweeper"]["grids"] if files else []
    return [list(run) for run in expand(grids, given)]


def check_harness(words: list[str]) -> None:
    """Composes and validates what stands behind `-m harness`."""
    request = find_request(words)
    if request is not None:
        dataset_preset(request.dataset)
        return
    if "--cfg" in words:
        words = words[: words.index("--cfg")]
    if "--config-dir" in words:
        del words[words.index("--config-dir") : words.index("--config-dir") + 2]
    words = [word for word in words if word != "--help"]
    if words[:1] == ["-m"]:
        # tests/test_sweeps.py composes and plans every run of every committed file.
        composed(runs_of(words[1:])[0])
    elif words:
        composed(words)


def check_other(command: str) -> None:
    """Commands that are not the harness: those of analysis, make and pip, and what a shell does."""
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "analysis"]:
        if "--help" not in words:
            assert _parser().parse_args(words[3:])
    elif words[0] == "lora-harness" and words[1] in OF_ANALYSIS:
        assert _parser().parse_args(words[1:])
    elif words[:2] == ["lora-harness", "init"]:
        assert len(words) == 3
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert words == ["make"] or re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE)
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert set(re.findall(r"\.\[(\w+)\]", command)) <= project["optional-dependencies"].keys()
    else:
        assert words[0] in ("cd", "eval"), "no test knows this command"


@pytest.mark.parametrize("page", sorted(set(SHOWN_BY.values()) - set(EXTENSIONS)))
def test_every_command_is_one_that_works(page: str, project: Any) -> None:
    project(page)
    for command in commands(page):
        if SHOWN_BY[command] != page:
            continue
        words = shlex.split(command)
        try:
            if words[0] == "lora-harness" and words[1] in ("run", "sweep", *OF_ENDED_RUNS):
                check_harness(_as_typed_to_harness(words[1], words[2:]))
            elif "harness" in words and words[0] in ("python", "accelerate", "torchrun"):
                check_harness(words[words.index("harness") + 1 :])
            else:
                check_other(command)
        except Exception as error:
            raise AssertionError(f"{page}: {command}: {error}") from error


def examples() -> list[tuple[str, str, str]]:
    """Each command of a console block, and what must be printed."""
    found = []
    for page in PAGES:
        for block in blocks(page, "console"):
            for command, printed in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.text, flags=re.MULTILINE):
                found.append((page, command, printed))
    return found


@pytest.mark.parametrize(("page", "command", "printed"), examples(), ids=[command for _, command, _ in examples()])
def test_a_command_prints_what_the_page_says(
    page: str,
    command: str,
    printed: str,
    project: Any,
    sweep: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project(page)
    words = overrides_of(command)
    if words[:1] == ["-m"]:
        code, _ = sweep(*words[1:])
    else:
        monkeypatch.setattr(sys, "argv", ["harness", *words])
        code = main()
    seen = capsys.readouterr().err
    assert code == 2
    assert printed
    for line in printed.splitlines():
        pattern = ".*".join(map(re.escape, line.split("...")))
        assert re.search(f"^{pattern}", seen, flags=re.MULTILINE), f"{line}\nis not in\n{seen}"


# ---------------------------------------------------------------- files


def presets() -> list[tuple[str, str, str]]:
    found = []
    for page in PAGES:
        for block in blocks(page, "yaml"):
            name = re.fullmatch(r"conf/(.+)/(\w+)\.yaml", block.title or "")
            if name and page not in EXTENSIONS:
                found.append((page, name[1], name[2]))
    return found


LANGUAGE = ["model=tiny_gpt2", "dataset=local_text", "dataset.train_file=corpus.txt", "rank=r8", "target_layers=qkv"]


@pytest.mark.parametrize(("page", "group", "name"), presets())
def test_a_preset_can_be_chosen(page: str, group: str, name: str, project: Any) -> None:
    project(page)
    if group == "evaluate_also":
        assert list(composed([*LANGUAGE, f"{group}={name}"]).evaluate_also) == [name]
    elif group.startswith("hydra/"):
        assert composed(["rank=r8", "target_layers=qv", f"{group}={name}"])
    else:
        assert getattr(composed(["rank=r8", "target_layers=qv", f"{group}={name}"]), group).name == name


def test_own_defaults_can_be_chosen(project: Any) -> None:
    page = "docs/how-to/own-configs.md"
    project(page)
    names = [re.fullmatch(r"conf/(\w+)\.yaml", block.title or "") for block in blocks(page, "yaml")]
    (name,) = [found[1] for found in names if found]
    assert composed(["rank=r8", "target_layers=qv"], config=name).dataset.name == "mine"


@pytest.mark.parametrize("page", [page for page in having("yaml") if "sweeps/" in str(blocks(page, "yaml"))])
def test_a_sweep_file_has_the_runs_that_it_says(page: str, project: Any) -> None:
    project(page)
    for block in blocks(page, "yaml"):
        if (block.title or "").startswith("sweeps/"):
            runs = runs_of([f"sweeps={Path(str(block.title)).stem}"])
            for overrides in (runs[0], runs[-1]):
                config = composed(overrides)
                assert config.model.path is not None or plan(config)
            announced = re.search(r"^# Runs: (\d+)$", block.text, flags=re.MULTILINE)
            assert announced and len(runs) == int(announced[1])


def test_blocks_of_values_can_be_read() -> None:
    for page in having("yaml", "toml", "json"):
        for block in blocks(page, "yaml"):
            values = yaml.safe_load(block.text)
            if block.title is None:
                assert expand(values["hydra"]["sweeper"]["grids"], {})
        for block in blocks(page, "toml"):
            assert tomllib.loads(block.text)
        for block in blocks(page, "json"):
            assert [json.loads(line) for line in block.text.splitlines()]


def test_an_extension_names_its_module_where_it_is_looked_for() -> None:
    (block,) = blocks("docs/how-to/extensions.md", "toml")
    modules = tomllib.loads(block.text)
    shown = {Path(str(each.title)).stem for page in EXTENSIONS for each in blocks(page, "python") if each.title}
    assert set(modules["project"]["entry-points"][GROUP].values()) <= shown
    assert set(modules["tool"]["setuptools"]["py-modules"]) == shown


# ---------------------------------------------------------------- code


@pytest.mark.parametrize("page", having("python"))
def test_python_runs(page: str, project: Any) -> None:
    folder = project(page)
    save_run(folder / "runs", "a", metrics=measured())
    save_sweep(folder / "runs", "demo", ["a"])
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        if block.title is None:
            exec(block.text, names)
    if "best" in names:
        assert list(names["best"]["cell_id"]) == ["a"]


@pytest.fixture
def registries(project: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registries as they are now are there again afterwards."""
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (registry, dict(registry))
        for registry in (architectures.ARCHITECTURES, methods.METHODS, metrics.METRICS, metrics.SCORES)
    ]
    monkeypatch.syspath_prepend(Path.cwd())
    yield
    for registry, before in kept:
        registry.clear()
        registry.update(before)
    for name in ("my_extension", "my_embedding"):
        sys.modules.pop(name, None)
    metrics.find_scorer.cache_clear()


TINY = ["dataset=local", "dataset.train_file=train.csv", "trainer=debug", "trainer.max_steps=2", "tracking=off"]


def extended_run(page: str, project: Any, *more: str) -> RunResult:
    """The result of a page's command on a tiny model, with what the page registers."""
    project(page)
    importlib.import_module("my_extension")
    (command,) = [command for command in commands(page) if "harness" in command]
    result = run(composed([*overrides_of(command), *TINY, *more]))
    assert result.status is Status.FINISHED, result.error
    return result


@pytest.mark.usefixtures("registries")
def test_a_metric_is_added_as_the_page_says(project: Any) -> None:
    result = extended_run(EXTENSIONS[0], project, "model=tiny_bert")
    assert 0 <= result.metrics["val_balanced_accuracy"] <= 1
    assert {"test_balanced_accuracy", "test_balanced_accuracy_last"} <= result.metrics.keys()


@pytest.mark.usefixtures("registries")
def test_a_model_type_is_added_as_the_page_says(project: Any) -> None:
    tokenizer = load_tokenizer(ModelConfig(name="tiny_bert", tiny=TinyModel.bert))
    size = {"embedding_size": 16, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    shape = ElectraConfig(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=128, **size)
    ElectraForSequenceClassification(shape).save_pretrained("DIR")
    tokenizer.save_pretrained("DIR")
    result = extended_run(EXTENSIONS[1], project)
    assert len(result.target_modules) == 2 * 6
    # Four squares and two matrices of the MLP, at rank 8.
    assert result.metrics["num_adapter_params"] == 2 * 8 * (4 * (32 + 32) + 2 * (32 + 64))
    assert result.metrics["train_flops"] > 0


@pytest.mark.usefixtures("registries")
def test_a_method_is_added_as_the_page_says(project: Any) -> None:
    result = extended_run(EXTENSIONS[2], project, "model=tiny_bert")
    tokenizer = load_tokenizer(ModelConfig(name="tiny_bert", tiny=TinyModel.bert))
    assert result.metrics["num_adapter_params"] == len(tokenizer) * 64
    assert (Path("runs") / result.run_id / "embedding" / "embedding.safetensors").is_file()


def test_the_linear_modules_of_the_example_are_those_that_the_page_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = EXTENSIONS[1]
    (code,) = [block for block in blocks(page, "python") if block.title is None]
    (shown,) = blocks(page, "text")
    exec(code.text, {})
    assert capsys.readouterr().out == shown.text


def test_the_tutorial_ends_with_its_table(
    project: Any,
    sweep: Any,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project(TUTORIAL)
    monkeypatch.setattr(figures, "KINDS", [kind for kind in figures.KINDS if kind.name in PAGES[TUTORIAL]])
    # One of each row of the table, a few steps of a tiny model.
    few = ["seed=0", "trainer.learning_rate=1e-3", "model=tiny_bert", "trainer.num_epochs=null", "trainer.max_steps=2"]
    code, seen = sweep("sweeps=reviews", *few, "tracking=off", "save_weights=false")
    assert code == 0
    for planned in seen["runs"]:
        assert run(planned.config).status is Status.FINISHED
    capsys.readouterr()
    for command in dict.fromkeys(commands(TUTORIAL)):
        if command.startswith("python -m analysis"):
            assert analyse([*shlex.split(command)[3:], "--runs-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "reviews: 3 finished" in printed and "reports/reviews/" in printed
    (latex,) = blocks(TUTORIAL, "latex")
    for name in re.findall(r"\\input\{(.+?)\}", latex.text):
        assert "tab:reviews-tradeoff" in Path(f"{name}.tex").read_text(encoding="utf-8")
    for name in re.findall(r"\\includegraphics(?:\[.*?\])?\{(.+?)\}", latex.text):
        assert Path(f"{name}.pdf").is_file()
    assert Path("reports/reviews/tables/preview.tex").is_file()


# ---------------------------------------------------------------- the reference


def test_the_reference_has_every_setting() -> None:
    page = reference.settings_page()
    listed = set(re.findall(r"^#### `([\w.]+)`", page, flags=re.MULTILINE))
    expected = {
        f"{prefix}{item.name}"
        for schema, prefix in GROUPS.items()
        for item in dataclasses.fields(schema)
        if f"{prefix}{item.name}." not in GROUPS.values()
    }
    assert listed == expected


def test_the_reference_says_what_a_setting_does_to_the_identity() -> None:
    # Of what a path leads to the content counts, which other tests hold.
    config = RunConfig(rank=RankConfig(alpha=16.0), target_layers=TargetLayersConfig(name="qv", projections=["q", "v"]))
    config.model.scratch = ScratchConfig(asset="newsgroups_20", file="train.tab")
    config.dataset.hub_id = "a/dataset"
    before = scientific(config, {})
    settings = [setting for group in reference.settings_by_group().values() for setting in group]
    assert len(settings) > 80
    for setting in settings:
        if setting.identity == reference.CONTENT or setting.name == "evaluate_also":
            continue
        changed = copy.deepcopy(config)
        *groups, name = setting.name.split(".")
        node: Any = changed
        for group in groups:
            node = getattr(node, group)
        setattr(node, name, {"v": 2} if setting.name == "rank.pattern" else _another(getattr(node, name)))
        is_same = scientific(changed, {}) == before
        assert is_same == (setting.identity == reference.NONE), setting.name


def _another(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case list():
            return [*value, "o"]
        case dict():
            return {**value, "v": 2}
        case None:
            return 3
    members = getattr(type(value), "__members__", {})
    return next((member for member in members.values() if member is not value), f"{value}x")


def test_the_reference_has_every_metric_and_the_page_on_measuring_explains_each() -> None:
    page, explained = reference.metrics_page(), PAGES["docs/measured.md"]
    names = {name for name in metrics.METRICS if name not in reference.split_metrics()} | metrics.SCORES.keys()
    assert len(names) > 40
    for name in names:
        assert f"| `{name}`" in page, name
        assert f"`{name}`" in explained, f"docs/measured.md does not say how {name} is measured"


def test_the_reference_has_every_record_and_every_file() -> None:
    registered = reference.methods_page()
    for name in (*methods.METHODS, *architectures.ARCHITECTURES):
        assert f"| `{name}`" in registered
    presets_page, sweeps_page = reference.presets_page(), reference.sweeps_page()
    for path in (ROOT / "conf" / "dataset").glob("*.yaml"):
        assert f"`dataset={path.stem}`" in presets_page
    for path in (ROOT / "sweeps").glob("*.yaml"):
        assert f"\n## {path.stem}\n" in sweeps_page


# Between these stands what docs/rebuild.py writes: it is there already.
SHOWN = re.compile("<!-- /?shown")


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- " in SHOWN.sub("", PAGES[page])])
def test_what_a_page_asks_to_be_filled_in_is(page: str) -> None:
    filled = reference.expand(PAGES[page])
    assert "<!-- " not in SHOWN.sub("", filled)
    assert len(filled.splitlines()) > len(PAGES[page].splitlines())
