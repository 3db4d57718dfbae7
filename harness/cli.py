"""`lora-harness COMMAND ...`: one name for `python -m harness`, `python -m analysis` and a new project.

Each command is imported when it is asked for: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

COMMANDS = {
    "run": "one run: lora-harness run rank=r8 target_layers=qv",
    "sweep": "many runs: lora-harness sweep demo, or lora-harness sweep rank=r1,r8 target_layers=qv",
    "report": "tables, figures and a page of a sweep",
    "evaluate": "score runs that have ended: lora-harness evaluate RUN_ID RUN_ID split=val",
    "export": "merge what a run trained into its base model: lora-harness export RUN_ID to=DIR",
    "status": "how far a sweep is, also while it runs",
    "archive": "results and curves of a sweep in one small file, without weights",
    "budget": "what a run costs before it starts: parameters, bytes, hours",
    "latency": "the time of a pass: base model, adapter merged and unmerged",
    "adapters": "what runs have learned, from the weights that they saved",
    "suggest": "a sweep file that tests the ranks and placements which a sweep's weights suggest",
    "init": "write a small project with its own dataset and sweep",
}
OF_ANALYSIS = ("report", "status", "archive", "budget", "latency", "adapters", "suggest")
OF_ENDED_RUNS = ("evaluate", "export")
_EPILOG = """\
run is `python -m harness`, sweep is `python -m harness -m`, and both take Hydra's flags (run --help lists every
setting); evaluate and export are `python -m harness evaluate=RUN_ID,RUN_ID` and `export=RUN_ID to=DIR`; report,
status, archive, budget, latency, adapters and suggest are those of `python -m analysis`.

Own configs: conf/ and sweeps/ below the current folder, or --config-dir DIR after run or sweep. DIR/dataset/mine.yaml
is dataset=mine, DIR/sweeps/mine.yaml is the sweep mine.
"""
# Flags of Hydra that are followed by a value.
_VALUED = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
# Zsh runs the completion functions of bash after bashcompinit. Bash breaks words at = and has to be given no more than
# what follows it.
_COMPLETION = """\
_lora_harness() {
    local IFS=$'\\n' line="${COMP_LINE:0:$COMP_POINT}"
    local word="${line##* }"
    COMPREPLY=($("$1" --complete "$line" 2>/dev/null))
    if [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${word%=*}="}")
    fi
}
complete -o nospace -o default -F _lora_harness lora-harness
"""
_PREPARATION = {"bash": "", "zsh": "autoload -U +X bashcompinit && bashcompinit\n"}


def main() -> int:
    """Runs what the command line says and returns the exit code of the command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        return _without_command(arguments)
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"error: {command}: no such command. There are: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    if command == "init":
        return _init(rest)
    if command in OF_ANALYSIS:
        from analysis.__main__ import main as analyse

        return analyse(arguments, program="lora-harness")
    return _harness(_as_typed_to_harness(command, rest))


def _without_command(arguments: Sequence[str]) -> int:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="lora-harness",
        usage="lora-harness COMMAND ...",
        description=f"LoRA and full fine-tuning, one comparable run at a time.\n\ncommands:\n{listed}",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lora-harness {version('lora-harness')}")
    parser.add_argument(
        "--completion",
        choices=tuple(_PREPARATION),
        metavar="SHELL",
        help='what makes bash or zsh complete commands and settings: eval "$(lora-harness --completion bash)"',
    )
    parser.add_argument("--complete", metavar="LINE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.completion is not None:
        print(_PREPARATION[options.completion] + _COMPLETION, end="")
    elif options.complete is not None:
        print(*_completions(options.complete), sep="\n")
    else:
        parser.print_help()
    return 0


def _harness(arguments: Sequence[str]) -> int:
    from harness.__main__ import main as run

    sys.argv = [sys.argv[0], *arguments]
    return run()


def _as_typed_to_harness(command: str, arguments: Sequence[str]) -> list[str]:
    """The same command after `python -m harness`, where flags come first and a sweep is `-m sweeps=NAME`.

    >>> _as_typed_to_harness("sweep", ["demo", "seed=0,1", "--config-dir", "mine"])
    ['-m', '--config-dir', 'mine', 'sweeps=demo', 'seed=0,1']
    >>> _as_typed_to_harness("evaluate", ["RUN_ID", "OTHER_ID", "split=val"])
    ['evaluate=RUN_ID,OTHER_ID', 'split=val']
    """
    flags: list[str] = ["-m"] if command == "sweep" else []
    settings: list[str] = []
    words = iter(arguments)
    for word in words:
        if word.startswith("-"):
            flags += [word, *itertools.islice(words, word in _VALUED)]
        else:
            settings.append(word)
    if command == "sweep" and settings and "=" not in settings[0]:
        settings[0] = f"sweeps={settings[0]}"
    if command in OF_ENDED_RUNS and not any(setting.startswith(f"{command}=") for setting in settings):
        run_ids = [setting for setting in settings if "=" not in setting]
        settings = [f"{command}={','.join(run_ids)}", *(setting for setting in settings if "=" in setting)]
    return [*flags, *settings]


def _completions(line: str) -> Iterator[str]:
    """What the last word of a command line may become."""
    words = [*line.split()[1:], *([""] if line.endswith(" ") else [])]
    if len(words) < 2:
        yield from (f"{name} " for name in COMMANDS if name.startswith(words[0] if words else ""))
        return
    command, *rest, word = words
    if command in OF_ANALYSIS and rest and rest[-1] == "--sweep":
        from harness.results.launches import launched_sweeps

        yield from (name for name in launched_sweeps(Path("runs")) if name.startswith(word))
    elif command in ("run", "sweep"):
        yield from _settings(command, rest, word)


def _settings(command: str, before: Sequence[str], word: str) -> Iterator[str]:
    """What Hydra completes a word to, and the names of sweeps where one may stand."""
    from harness.config.folders import config_dir, find_own, options_of, use_own

    typed = _as_typed_to_harness(command, before)
    if command == "sweep" and "=" not in word and not any("=" in setting for setting in typed):
        use_own(find_own(typed))
        yield from (f"{name} " for name in options_of("sweeps") if name.startswith(word))
    own = config_dir(typed)
    os.environ["COMP_LINE"] = " ".join(["lora-harness", *typed, word])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        _harness([*(["--config-dir", own] if own else []), "--shell-completion", "query=bash"])
    yield from printed.getvalue().split()


def _init(arguments: Sequence[str]) -> int:
    from harness.new_project import ProjectError, write_project

    parser = argparse.ArgumentParser(prog="lora-harness init", description=COMMANDS["init"])
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that does not exist yet, or is empty")
    folder = parser.parse_args(arguments).folder
    try:
        written = write_project(folder)
    except ProjectError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*written, sep="\n")
    print(f"next: cd {folder} && make   (README.md says what is there)")
    return 0
