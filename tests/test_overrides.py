"""The command line: a text stays as it was typed, alone and in a sweep; a mistake names its override."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins

import harness.run
from harness.__main__ import main
from harness.config.overrides import literal_texts
from harness.config.schema import RunConfig
from harness.results.schema import RunResult, Status
from hydra_plugins.lora_harness import sweeper

SHOW_PLAN = sweeper.show_plan
BASE = ("model=tiny_bert", "dataset=local", "method=full", "trainer=debug", "tracking=off")


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[RunConfig]]:
    """The configs that a command line gives: of one run, or of a sweep that is planned and not started."""
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.chdir(tmp_path)
    seen: list[RunConfig] = []
    Plugins.instance()  # Hydra's scan runs the plug-in modules once more and would undo what is replaced below

    def run(config: RunConfig, identity: object) -> RunResult:
        seen.append(config)
        return RunResult(run_id="x", cell_id="x", sweep=None, status=Status.FINISHED, config={})

    monkeypatch.setattr(harness.run, "run", run)
    monkeypatch.setattr(sweeper, "show_plan", lambda runs, plans, summary, **_: seen.extend(run.config for run in runs))

    def call(*arguments: str, exit_code: int = 0) -> list[RunConfig]:
        seen.clear()
        monkeypatch.setattr(sys, "argv", ["harness", *arguments])
        GlobalHydra.instance().clear()
        assert main() == exit_code
        return list(seen)

    return call


TYPED = [
    *(
        "run=3.csv",
        "two words.csv",
        "naïve.csv",
        "日本.csv",
        "[x].csv",
        "{x}.csv",
        "rows (1).csv",
        "it's.csv",
        'the "x".csv',
    ),
    *(
        "a;b.csv",
        "a#b.csv",
        "a&b.csv",
        "~/x.csv",
        "$HOME.csv",
        "a\\b.csv",
        "'a' b.csv",
        "007",
        "1e3",
        "true",
        " spaced ",
    ),
]


@pytest.mark.parametrize("value", TYPED)
@pytest.mark.parametrize("multirun", [False, True])
def test_hydra_reads_a_text_as_it_was_typed(value: str, multirun: bool) -> None:
    (override,) = literal_texts([f"dataset.train_file={value}"], multirun=multirun)
    assert OverridesParser.create().parse_override(override).value() == value


@pytest.mark.parametrize("value", ["a=[b] 'naïve'.csv", "007"])
def test_a_text_is_what_was_typed_alone_and_in_a_sweep(composed: Callable[..., list[RunConfig]], value: str) -> None:
    # The column is a text like the file's name, and need not exist for a plan.
    Path("rows.csv").write_text("text,label\n")
    arguments = (*BASE, "dataset.train_file=rows.csv", f"dataset.label_column={value}")
    (alone,) = composed(*arguments)
    (in_sweep,) = composed("-m", *arguments, "hydra.sweeper.dry_run=true")
    assert alone.dataset.label_column == in_sweep.dataset.label_column == value


def test_a_comma_separates_values_in_a_sweep_alone() -> None:
    typed = ["dataset.label_column=a,b=1", "seed=0,1"]
    assert literal_texts(typed, multirun=False) == ["dataset.label_column='a,b=1'", "seed=0,1"]
    assert literal_texts(typed, multirun=True) == ["dataset.label_column=a,'b=1'", "seed=0,1"]
    quoted = ["dataset.label_column='a,b',c"]
    assert literal_texts(quoted, multirun=True) == quoted


def test_null_quotes_functions_and_interpolation_keep_their_meaning() -> None:
    kept = [
        "dataset.path=null",
        "dataset.path='a b'",
        "dataset.path=${runs_dir}",
        "dataset.path=choice(a,b)",
        "+dataset.path=a",
    ]
    assert literal_texts(kept, multirun=True) == kept
    others = [
        "rank=r8",
        "seed=007",
        "trainer.learning_rate=1e-3",
        "dataset.text_columns=[a,b]",
        "--help",
        "nonsense=[1",
    ]
    assert literal_texts(others, multirun=False) == others
    assert literal_texts(["evaluate_also.own.path=a=b"], multirun=False) == ["evaluate_also.own.path='a=b'"]


@pytest.mark.parametrize("template", ["\\${price}: {text} ", "'\\${price}: {text} '"])
def test_an_escaped_interpolation_is_literal_alone_and_in_a_sweep(
    composed: Callable[..., list[RunConfig]], template: str
) -> None:
    Path("rows.csv").write_text("text,target\n")
    arguments = ("model=tiny_llama", "dataset=local_completion", "dataset.train_file=rows.csv", "method=full")
    arguments = (*arguments, "trainer=debug", "tracking=off", f"dataset.prompt_template={template}")
    (alone,) = composed(*arguments)
    (in_sweep,) = composed("-m", *arguments, "hydra.sweeper.dry_run=true")
    assert alone.dataset.prompt_template == in_sweep.dataset.prompt_template == "${price}: {text} "


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("seed=[1", "'seed=[1': Hydra cannot read the value. A text with characters such as = , ( ) [ ] { } or an "),
        ("seed", "'seed': not an override; write setting=value, such as rank=r8 or trainer.batch_size=8."),
        ("model.scratch.width=8", "model.scratch.width=8: cannot be applied ("),
        ("evaluate_also=[-1]", "evaluate_also=[-1]: cannot be applied ("),
        ("+evaluate_also.more.name=x", "+evaluate_also.more.name=x: an additional dataset is a file of "),
        ("rank.alpha=3", "rank.alpha=3: cannot be applied ("),
        ("dataset.nothing=3", "dataset.nothing: no such setting. Known here: "),
    ],
)
@pytest.mark.parametrize("multirun", [False, True])
def test_a_refused_override_is_named(
    composed: Callable[..., list[RunConfig]],
    capsys: pytest.CaptureFixture[str],
    argument: str,
    message: str,
    multirun: bool,
) -> None:
    composed(*(["-m"] if multirun else []), *BASE, argument, "dataset.train_file=x.csv", exit_code=2)
    assert f"error: {message}" in capsys.readouterr().err


def test_the_plan_shows_brackets_in_a_name(
    composed: Callable[..., list[RunConfig]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweeper, "show_plan", SHOW_PLAN)
    Path("[x].csv").write_text("text,label\n")
    composed("-m", *BASE, "dataset.train_file=[x].csv", "hydra.sweeper.dry_run=true")
    assert "dataset.train_file='[x].csv'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("method=lora", "rank=r8", "target_layers=[q,v]"),
            "target_layers=[q,v]: a run has one target_layers, and a list of them would be merged into one; give one "
            "option, as target_layers=q, or name roles with target_layers.projections=[q,v].",
        ),
        (
            ("method=[full,lora]", "rank=r8", "target_layers=qv"),
            "method=[full,lora]: a run has one method, and a list of them would be merged into one; give one option, "
            "as method=full.",
        ),
        (
            ("-m", "method=lora", "rank=r8", "target_layers=[q,v],all", "hydra.sweeper.dry_run=true"),
            "target_layers=[q,v]: a run has one target_layers,",
        ),
    ],
)
def test_a_list_of_options_is_refused_where_a_run_has_one(
    words: tuple[str, ...],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Hydra would merge them, and the last would win in silence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["harness", *words, *(word for word in BASE if not word.startswith("method"))])
    assert main() == 2
    assert expected in capsys.readouterr().err
