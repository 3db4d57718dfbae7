"""What is typed after `python -m harness`, in the form that Hydra's override grammar reads.

Hydra's grammar refuses `dataset.train_file=run=3.csv` and `dataset.train_file=naïve.csv`, and reads
`dataset.label_column=007` as the number 7. The schema knows which settings are text: their values are taken literally,
unless they are quoted, `null`, an interpolation `${...}`, or under `--multirun` a list of values between commas.
"""

from __future__ import annotations

import re
import shlex
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from harness.config.composing import explain_omegaconf
from harness.config.folders import options_of
from harness.config.schema import RunConfig
from harness.config.validation import ConfigError

# What the grammar reads as one plain word; anything else is quoted.
_PLAIN = re.compile(r"[A-Za-z0-9_/][A-Za-z0-9_./:+-]*")
_KEYWORDS = ("null", "true", "false", "nan", "inf")


def as_override_value(value: Any) -> str:
    """A value of a YAML file in Hydra's override grammar; a text stays a text, also where it looks like a number.

    >>> [as_override_value(value) for value in (None, True, 2e-3, "r8", "two words", "007", [0, 2])]
    ['null', 'true', '0.002', 'r8', "'two words'", "'007'", '[0,2]']
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(as_override_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{as_override_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and (not _PLAIN.fullmatch(value) or value.lower() in _KEYWORDS or _is_number(value)):
        return quoted(value)
    return str(value)


def quoted(text: str) -> str:
    """A text between quotation marks, as the grammar reads it back."""
    # A backslash means something only before a quotation mark: there it is doubled.
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def literal_texts(arguments: Sequence[str], *, multirun: bool) -> list[str]:
    """The arguments of a command line with the values of text settings quoted where Hydra would read something else.

    >>> literal_texts(["seed=1", "dataset.train_file=run=3.csv", "dataset.label_column=007"], multirun=False)
    ['seed=1', "dataset.train_file='run=3.csv'", "dataset.label_column='007'"]
    >>> literal_texts(["dataset.train_file=a.csv,b=1.csv"], multirun=True)
    ["dataset.train_file=a.csv,'b=1.csv'"]
    """
    return [_literal_text(argument, multirun) for argument in arguments]


def _literal_text(argument: str, multirun: bool) -> str:
    key, _, value = argument.partition("=")
    if not value or not _is_text(key.lstrip("+")):
        return argument
    if multirun and "," in value:
        kind = _kind(value)
        if any(mark in value for mark in "'\""):  # its commas may be part of a text
            if kind is ValueType.SIMPLE_CHOICE_SWEEP:
                return argument
        elif kind in (None, ValueType.SIMPLE_CHOICE_SWEEP):
            return f"{key}={','.join(map(_as_literal, value.split(',')))}"
    return f"{key}={_as_literal(value)}"


def _as_literal(value: str) -> str:
    """The value itself where Hydra reads it as the text that it is, as null, or as a sweep function; else quoted."""
    kind = _kind(value)
    if kind is ValueType.ELEMENT:
        read = _parse(value).value()
        is_text = isinstance(read, str) and (value == value.strip() or value.strip()[0] in "'\"")
        return value if is_text or read is None else quoted(value)
    return quoted(value) if kind in (None, ValueType.SIMPLE_CHOICE_SWEEP) else value


def _parse(value: str) -> Override:
    return OverridesParser.create().parse_override(f"key={value}")


def _kind(value: str) -> ValueType | None:
    """What Hydra takes a value for; None where it cannot read it."""
    try:
        return _parse(value).value_type
    except HydraException:
        return None


def _is_text(key: str) -> bool:
    """Whether a dotted name is a setting of the schema whose type is text, or text or null."""
    kind: Any = RunConfig
    for part in key.split("."):
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
            continue
        schemas = [each for each in (kind, *get_args(kind)) if is_dataclass(each)]
        hints = get_type_hints(schemas[0]) if schemas else {}
        if part not in hints:
            return False
        kind = hints[part]
    return kind is str or set(get_args(kind)) == {str, type(None)}


# Of these a run has one; of tracking and evaluate_also it may have several.
_ONE_OPTION = ("model", "dataset", "method", "rank", "target_layers", "variant", "trainer")


def require_one_option(overrides: Sequence[str]) -> None:
    """Raises `ConfigError` where a group gets a list of options: Hydra would merge them, the last one in front."""
    problems = []
    for override in overrides:
        key, _, value = override.partition("=")
        group, text = key.lstrip("+").partition("@")[0], value.strip()
        if group not in _ONE_OPTION or not (text.startswith("[") and text.endswith("]")):
            continue
        way_out = f"give one option, as {group}={text.strip('[]').split(',')[0].strip() or 'NAME'}"
        if group == "target_layers":
            way_out += f", or name roles with target_layers.projections={text}"
        problems.append(f"{override}: a run has one {group}, and a list of them would be merged into one; {way_out}.")
    if problems:
        raise ConfigError(problems)


def came_from_composing(error: Exception) -> bool:
    """Whether Hydra, OmegaConf or the YAML reader raised an error, and not the code that they called."""
    *_, (innermost, _line) = traceback.walk_tb(error.__traceback__)
    return innermost.f_globals["__name__"].partition(".")[0] in ("hydra", "omegaconf", "yaml")


def explain_refusal(error: Exception, overrides: Sequence[str], *, compose: Callable[[list[str]], object]) -> str:
    """Why overrides cannot be composed: the override or setting at fault, and what there is instead.

    Args:
        error: what Hydra or OmegaConf raised for them.
        overrides: all of them, in order.
        compose: composes a part of them, to find out which one is at fault.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        parts = error.missing_cfg_file.split("/")
        group = "/".join(parts[:2] if parts[0] == "hydra" else parts[:1])
        # Hydra lists the folder alone and not what is below it.
        options = options_of(group) or error.options
        option = error.missing_cfg_file.removeprefix(f"{group}/")
        return f"{group}={option}: no such option. There are: {', '.join(options)}."
    if isinstance(error, OverrideParseException):
        return _explain_unreadable(error)
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: not YAML: {error.problem}."
    override = _first_refused(overrides, compose)
    named = f"{override}: " if override is not None else ""
    if override is not None and re.match(r"\+*evaluate_also\.\w+[.=]", override):
        return (
            f"{named}an additional dataset is a file of conf/evaluate_also/, chosen by name (evaluate_also=wikitext2); "
            "add a file for your own. Its settings can then be changed here."
        )
    # Hydra raises its own in place of what a file made OmegaConf raise, with and without `from`.
    cause = next(
        (each for each in (error.__cause__, error.__context__) if isinstance(each, OmegaConfBaseException)), error
    )
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        explained = explain_omegaconf(cause)
        is_named = override is None or cause.full_key in override
        return explained if is_named else f"{named}{explained}"
    if isinstance(error, HydraException):
        lines = [line.strip() for line in str(error).partition("Config search path:")[0].splitlines()]
        text = "\n".join(line for line in lines if line and not line.startswith("See https://"))
        key = (override or "").partition("=")[0].lstrip("+~")
        return text if key and key in text else f"{named}{text}"
    return (
        f"{named}cannot be applied ({error}). A setting in a group needs the group itself, as in rank=r8 "
        "rank.alpha=32; a group takes the name of an option, not null: leave it out instead."
    )


def _explain_unreadable(error: OverrideParseException) -> str:
    key, equals, value = error.override.partition("=")
    if not equals or not key:
        return f"{error.override!r}: not an override; write setting=value, such as rank=r8 or trainer.batch_size=8."
    return (
        f"{error.override!r}: Hydra cannot read the value. A text with characters such as = , ( ) [ ] {{ }} or an "
        f"accent is quoted twice, for the shell and for Hydra: {shlex.quote(f'{key}={quoted(value)}')}."
    )


def _first_refused(overrides: Sequence[str], compose: Callable[[list[str]], object]) -> str | None:
    """An override with which composing fails although it does not without; None when none is at fault.

    Found by halving: each try takes a fifth of a second.
    """

    def is_refused(number: int) -> bool:
        try:
            compose(list(overrides[:number]))
        except Exception:  # whatever the overrides made Hydra or OmegaConf raise
            return True
        return False

    if not overrides or not is_refused(len(overrides)):
        return None
    fine, refused = 0, len(overrides)
    while refused - fine > 1:
        middle = (fine + refused) // 2
        fine, refused = (fine, middle) if is_refused(middle) else (middle, refused)
    return overrides[refused - 1]
