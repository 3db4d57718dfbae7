"""`python -m harness evaluate=RUN_ID,RUN_ID` and `export=RUN_ID to=DIR`: what is done with runs that have ended.

They are words of the same command line, beside settings, and no settings of a run: nothing of them is composed, and the
config is the one that the run recorded.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config.composing import compose
from harness.config.folders import config_dir
from harness.config.overrides import explain_refusal, literal_texts
from harness.config.validation import ConfigError

COMMANDS = ("evaluate", "export")
SPLITS = ("train", "val", "test")
# Settings of the runs that may be others here: they change how a number is computed and not what it is a number of.
_SETTINGS = ("device", "num_threads", "trainer.eval_batch_size")


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    `to` is a folder that is not there yet, or empty; `dataset` the words that name another dataset; `settings` other
    values of settings, by dotted name.
    """

    command: str
    run_ids: list[str]
    runs_dir: Path
    to: Path | None = None
    splits: tuple[str, ...] = ("test",)
    dataset: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def find_request(arguments: Sequence[str]) -> Request | None:
    """The request of a command line, None where it is a run or a sweep. Raises `ConfigError`, one line a problem."""
    own = config_dir(arguments)  # a folder may be called like a command
    named = [word for word in arguments if word.partition("=")[0].lstrip("+-") in COMMANDS and word != own]
    if not named:
        return None
    word = named[0]
    command, _, value = word.lstrip("+-").partition("=")
    bare = [each for each in arguments if "=" not in each and not each.startswith("-") and each != word]
    if "=" not in word or word != f"{command}={value}":
        ids = value or ",".join(bare) or "RUN_ID,RUN_ID"
        raise ConfigError([f"{word}: write {_usage(command, ids)}, or lora-harness {command} {ids.split(',')[0]} ..."])
    if len(named) > 1:
        raise ConfigError([f"{named[1]}: one command at a time; several runs stand between commas: {command}=A,B."])
    return _read(command, value, [each for each in arguments if each != word])


def _usage(command: str, run_ids: str) -> str:
    return f"{command}={run_ids}" if command == "evaluate" else f"{command}={run_ids.split(',')[0]} to=DIR"


def _read(command: str, value: str, arguments: Sequence[str]) -> Request:
    problems: list[str] = []
    run_ids = [run_id for run_id in value.split(",") if run_id]
    if not run_ids:
        problems.append(f"{command}=: name a run by its id, the folder in runs_dir: {_usage(command, 'RUN_ID')}.")
    if command == "export" and len(run_ids) > 1:
        problems.append(f"export={value}: one run at a time, each into a folder of its own.")
    words: dict[str, str] = {}
    dataset: list[str] = []
    settings: list[str] = []
    own = config_dir(arguments)
    for word in arguments:
        name, equals, given = word.partition("=")
        if word == own or name in ("--config-dir", "-cd"):
            continue
        if word in ("-m", "--multirun"):
            problems.append(f"{word}: {command} is no sweep; several runs stand between commas: evaluate=A,B.")
        elif equals and name in ("runs_dir", "to", "split"):
            if name in words:
                problems.append(f"{word}: {name} is given twice.")
            words[name] = given
        elif equals and (name == "dataset" or name.startswith("dataset.")) and command == "evaluate":
            dataset.append(word)
        elif equals and name in _SETTINGS:
            settings.append(word)
        else:
            problems.append(f"{word}: {command} takes {_taken(command)}; all else is as the run had it.")
    splits = tuple(dict.fromkeys(words.get("split", "test").split(",")))
    unknown = [split for split in splits if split not in SPLITS]
    if "split" in words and (unknown or command == "export"):
        problems.append(f"split={words['split']}: evaluate takes some of {', '.join(SPLITS)} between commas.")
    to = Path(words["to"]).expanduser() if words.get("to") else None
    if command == "export" and to is None:
        problems.append(f"export={value}: to=DIR is needed, a folder that is not there yet.")
    if to is not None and to.exists() and (not to.is_dir() or any(to.iterdir())):
        problems.append(f"to={to}: is there already and not empty; name a new folder.")
    if problems:
        raise ConfigError(problems)
    return Request(
        command,
        run_ids,
        Path(words.get("runs_dir") or "runs"),
        to,
        splits,
        dataset,
        {override.get_key_element(): override.value() for override in _parsed(settings)},
    )


def _taken(command: str) -> str:
    own = ["split=val,test", "dataset=NAME", "dataset.test_file=FILE"] if command == "evaluate" else []
    return ", ".join([*own, "to=DIR", "runs_dir=DIR", *(f"{name}=..." for name in _SETTINGS)])


def _parsed(words: Sequence[str]) -> list[Override]:
    """Overrides of single settings as Hydra reads them. Raises `ConfigError`."""
    literal = literal_texts(words, multirun=False)
    try:
        overrides = OverridesParser.create().parse_overrides(literal)
    except HydraException as error:
        raise ConfigError([explain_refusal(error, literal, compose=compose)]) from error
    for override in overrides:
        if override.type is not OverrideType.CHANGE or override.is_sweep_override():
            raise ConfigError([f"{override.input_line}: one value for each setting."])
    return overrides


def dataset_preset(words: Sequence[str]) -> dict[str, Any] | None:
    """The preset that the words name, with the settings beside it; None where they name none. Raises `ConfigError`."""
    if not any(word.startswith("dataset=") for word in words):
        return None
    literal = literal_texts(words, multirun=False)
    try:
        composed = OmegaConf.to_container(compose(literal).dataset, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([explain_refusal(error, literal, compose=compose)]) from error
    found: dict[str, Any] = json.loads(json.dumps(composed))
    return found


def carry_out(request: Request) -> None:
    """Does what is asked, and prints what came of it.

    Raises `ConfigError` and what else of `USER_ERRORS` says that it cannot be done.
    """
    preset = dataset_preset(request.dataset)
    own = {} if preset is not None else {one.get_key_element(): one.value() for one in _parsed(request.dataset)}
    # Imported late: what is wrong with the words is said without waiting for torch.
    from harness.evaluate import SCORES_FILE, as_text, evaluate, require_task, write_scores
    from harness.export import export
    from harness.saved import find_saved, with_values

    def changed(values: dict[str, Any]) -> dict[str, Any]:
        changes = {**request.settings, **own}
        if preset is not None:
            changes["dataset"] = preset
        result = with_values(values, changes)
        require_task(values, result["dataset"])
        return result

    runs = find_saved(request.run_ids, request.runs_dir, changed)
    with _new_folder(request.to) as folder:
        if request.command == "export":
            assert folder is not None
            num_bytes = export(runs[0], folder)
            said = (
                f"{request.to}: {num_bytes / 2**20:.1f} MiB; transformers loads it, and so does model.path={request.to}"
            )
        else:
            scored = evaluate(runs, splits=request.splits, own_data=not request.dataset, folder=folder)
            if folder is not None:
                write_scores(folder / SCORES_FILE, scored)
            said = as_text(scored)
    print(said)


@contextmanager
def _new_folder(to: Path | None) -> Iterator[Path | None]:
    """Where to write what is to be in `to`: it is there whole when all has gone well, and not at all before."""
    if to is None:
        yield None
        return
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-", ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigError([f"to={to}: cannot be written ({error.strerror}); name another folder."]) from error
    with scratch as name:
        # One level down, because a temporary directory is closed to other users.
        folder = Path(name) / "new"
        folder.mkdir()
        yield folder
        folder.replace(to)  # also an empty one
