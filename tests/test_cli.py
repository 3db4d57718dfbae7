"""`lora-harness`: which command becomes what, and what needs no command at all."""

from __future__ import annotations

import argparse
import sys

import pytest

import analysis.__main__
import harness.__main__
from harness import cli


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What `python -m harness` and `python -m analysis` were given."""
    calls: list[list[str]] = []

    def run() -> int:
        calls.append(sys.argv[1:])
        return 75

    def analyse(arguments: list[str], *, program: str) -> int:
        calls.append([program, *arguments])
        return 2

    monkeypatch.setattr(harness.__main__, "main", run)
    monkeypatch.setattr(analysis.__main__, "main", analyse)
    return calls


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lora-harness", *arguments])
    return cli.main()


@pytest.mark.parametrize(
    ("typed", "code", "becomes"),
    [
        ("run rank=r8 target_layers=qv", 75, "rank=r8 target_layers=qv"),
        ("run --help", 75, "--help"),
        ("run rank=r8 --config-dir mine seed=1 --cfg job", 75, "--config-dir mine --cfg job rank=r8 seed=1"),
        ("sweep demo", 75, "-m sweeps=demo"),
        ("sweep demo rank=r4 seed=0,1", 75, "-m sweeps=demo rank=r4 seed=0,1"),
        ("sweep -cd mine ranks seed=0,1", 75, "-m -cd mine sweeps=ranks seed=0,1"),
        ("sweep sweeps=demo", 75, "-m sweeps=demo"),
        ("sweep rank=r1,r8 target_layers=qv", 75, "-m rank=r1,r8 target_layers=qv"),
        ("sweep --config-dir", 75, "-m --config-dir"),
        ("evaluate A B split=val", 75, "evaluate=A,B split=val"),
        ("evaluate --config-dir mine A,B dataset=mine", 75, "--config-dir mine evaluate=A,B dataset=mine"),
        ("evaluate evaluate=A", 75, "evaluate=A"),
        ("export A to=model", 75, "export=A to=model"),
        ("export", 75, "export="),
        ("report --sweep demo --margin 0.01", 2, "lora-harness report --sweep demo --margin 0.01"),
        ("status", 2, "lora-harness status"),
    ],
)
def test_a_command_is_what_it_stands_for_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, called: list[list[str]], typed: str, code: int, becomes: str
) -> None:
    assert call(monkeypatch, *typed.split()) == code
    assert called == [becomes.split()]


def test_a_command_that_does_not_exist(
    monkeypatch: pytest.MonkeyPatch, called: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "reprot", "--sweep", "demo") == 2
    assert capsys.readouterr().err == f"error: reprot: no such command. There are: {', '.join(cli.COMMANDS)}.\n"
    assert called == []


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_has_a_line_for_each_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    try:
        code = call(monkeypatch, *arguments)
    except SystemExit as ended:  # argparse's own --help
        code = ended.code  # type: ignore[assignment]
    assert code == 0
    printed = capsys.readouterr().out
    for name, line in cli.COMMANDS.items():
        assert f"\n  {name:<8}  {line}\n" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_every_command_of_analysis_is_one_here_with_the_same_words() -> None:
    (commands,) = (
        action for action in analysis.__main__._parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    words = {action.dest: action.help for action in commands._choices_actions}
    assert words == {name: cli.COMMANDS[name] for name in cli.OF_ANALYSIS}


def test_the_analysis_is_called_what_was_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, "report", "--help")
    assert capsys.readouterr().out.startswith("usage: lora-harness report ")


@pytest.mark.parametrize("options", [["--completion", "tcsh"], ["--nope"]])
def test_options_that_do_not_exist(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, *options)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("lora-harness ", [f"{name} " for name in cli.COMMANDS]),
        ("", [f"{name} " for name in cli.COMMANDS]),
        ("lora-harness re", ["report "]),
        ("lora-harness nope x", []),
        ("lora-harness init ", []),
        ("lora-harness run rank=r8 target_layers=qk", ["target_layers=qk", "target_layers=qkv", "target_layers=qkvo"]),
        ("lora-harness sweep demo", ["demo ", "demo_lm "]),
        ("lora-harness sweep demo rank=r25", ["rank=r256"]),
    ],
)
def test_what_a_line_is_completed_to(monkeypatch: pytest.MonkeyPatch, line: str, offers: list[str]) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("COMP_LINE", "")
    monkeypatch.setattr(sys, "argv", ["lora-harness", "--complete", line])
    assert list(cli._completions(line)) == offers
