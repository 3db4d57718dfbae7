"""What a row is called: a model, a dataset and a placement named by what ran, not by what somebody typed alone.

    frame of runs --with_names--> the same with the columns `model`, `dataset`, `target_layers`

A name stays as it is while it stands for one thing. Where runs give one name to several (two files that are both called
`local`, a folder under the name of another model), each gets a mark in brackets, as `local [train.csv 1a2b3c]`, and
nothing is averaged or compared across them. Names that look alike are spelled out. A placement is named by the
projections and blocks that were asked for, whatever its config calls it.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import pandas as pd

from analysis.code_spans import as_code
from harness.results.effects import DATA_SOURCE, MODEL_SOURCE, canonical_blocks

CONTENT = "environment.content."
FINGERPRINT = "environment.data_fingerprint"

_ROLES = (
    "q",
    "k",
    "v",
    "o",
    "qkv",
    "attention",
    "up",
    "down",
    "gate",
    "gate_up",
    "mlp",
    "rec_in",
    "rec_gate",
    "rec_beta",
    "rec_decay",
    "rec_out",
    "recurrent",
    "all",
    "embedding",
    "lm_head",
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NUM_DIGITS = 6

_Token = tuple[Hashable, ...]


def with_names(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs with the columns `model`, `dataset` and `target_layers`, by which tables and figures call them.

    A `cell_id` that holds runs on different data, as those do whose ids were made of paths, becomes several.
    """
    models, _ = _named(frame, "model", MODEL_SOURCE)
    datasets, groups = _named(frame, "dataset", DATA_SOURCE)
    placements = _made_distinct([_placement(*placement) for placement in placement_keys(frame)])
    groups_of_cell: defaultdict[str, set[int]] = defaultdict(set)
    for cell_id, group in zip(frame["cell_id"], groups, strict=True):
        groups_of_cell[cell_id].add(group)
    cell_ids = [
        f"{cell_id} on {dataset}" if len(groups_of_cell[cell_id]) > 1 else cell_id
        for cell_id, dataset in zip(frame["cell_id"], datasets, strict=True)
    ]
    names = {"cell_id": cell_ids, "model": models, "dataset": datasets, "target_layers": placements}
    others = frame.drop(columns=[*names], errors="ignore")
    # Not `assign`, which warns of a frame of so many columns.
    return pd.concat([pd.DataFrame(names, frame.index, dtype=object), others], axis="columns")


def name_notes(frame: pd.DataFrame, named: pd.DataFrame) -> Iterator[str]:
    """What stands behind the names that are not those of the configs, in words; `named` has them (`with_names`)."""
    origins: dict[str, None] = {}
    for group, settings in (("model", MODEL_SOURCE), ("dataset", DATA_SOURCE)):
        sources = zip(*(_settings(frame, f"config.{group}.{setting}") for setting in settings), strict=True)
        for label, name, source in zip(named[group], frame[f"config.{group}.name"], sources, strict=True):
            if label != name:
                known = [f"{key}={value}" for key, value in zip(settings, source, strict=True) if value is not None]
                origins[f"{as_code(label)} is {as_code(' '.join([f'{group}={name}', *known]))}"] = None
    for label, name in zip(named["target_layers"], _column(frame, "config.target_layers.name"), strict=True):
        if label is not None and label.partition(" (")[0] != name:
            origins[f"{as_code(label)} is {as_code(f'target_layers={name}')}"] = None
    if origins:
        listed = [*origins][:_NUM_LISTED]
        more = f"; and {len(origins) - _NUM_LISTED} more" if len(origins) > _NUM_LISTED else ""
        yield (
            "Named by what ran and not by its config, in which one name stands for several things or for another: "
            f"{'; '.join(listed)}{more}."
        )


_NUM_LISTED = 20


def is_source(setting: str) -> bool:
    """Whether a setting says where a model or its data come from, which the names of `with_names` distinguish."""
    return setting in _SOURCES or setting.startswith(_SOURCE_GROUPS)


_SOURCES = {f"config.model.{name}" for name in MODEL_SOURCE} | {f"config.dataset.{name}" for name in DATA_SOURCE}
_SOURCE_GROUPS = tuple(f"{name}." for name in sorted(_SOURCES))


# ---------------------------------------------------------------- models and datasets


def _named(frame: pd.DataFrame, group: str, settings: Sequence[str]) -> tuple[list[str], list[int]]:
    """For each run the label of its model or dataset, and the number of what it stands for."""
    runs: list[tuple[Any, ...]] = list(
        zip(
            frame[f"config.{group}.name"].tolist(),
            zip(*(_settings(frame, f"config.{group}.{setting}") for setting in settings), strict=True),
            _contents(frame, group),
            _column(frame, FINGERPRINT) if group == "dataset" else [None] * len(frame),
            frame["cell_id"].tolist(),
            strict=True,
        )
    )
    # Runs of a cell agree in all of that, and it is enough to look at one of them.
    distinct = list(dict.fromkeys(runs))
    names, sources, contents, fingerprints = ([run[part] for run in distinct] for part in range(4))
    tokens = [
        list(_tokens(group, dict(zip(settings, source, strict=True)), content, fingerprint, cell_id))
        for _, source, content, fingerprint, cell_id in distinct
    ]
    numbers = _joined([(name, source) for name, source in zip(names, sources, strict=True)], tokens)
    firsts: dict[int, int] = {}
    for run, number in enumerate(numbers):
        firsts.setdefault(number, run)
    kinds = defaultdict(list)
    for number, run in firsts.items():
        kinds[names[run]].append(number)
    labels: dict[int, str] = {}
    for number, run in firsts.items():
        name, source = names[run], dict(zip(settings, sources[run], strict=True))
        presets = [
            other for other in kinds[name] if _is_preset(dict(zip(settings, sources[firsts[other]], strict=True)))
        ]
        if len(kinds[name]) == 1 or presets == [number]:
            # A folder under the name of a preset is not that preset, also where the preset itself is not here.
            mark = _last_part(str(source["path"])) if source["path"] is not None and _has_preset(source) else ""
        else:
            mark = f"{_hint(source)} {_digest(contents[run] or fingerprints[run] or sources[run])}".strip()
        labels[number] = f"{name} [{mark}]" if mark else name
    labels = dict(zip(firsts, _made_distinct([labels[number] for number in firsts]), strict=True))
    numbers_of = dict(zip(distinct, numbers, strict=True))
    return [labels[numbers_of[run]] for run in runs], [numbers_of[run] for run in runs]


def _tokens(
    group: str, source: dict[str, Any], content: tuple[Any, ...], fingerprint: Any, cell_id: str
) -> Iterator[_Token]:
    """What says which model or data a run had: runs that share one of these had the same."""
    if content:
        yield "content", content
        yield "cell", cell_id  # made of content too, where that is recorded
    if fingerprint is not None:
        yield "fingerprint", fingerprint
    is_pinned = source["asset"] is not None or _COMMIT.fullmatch(str(source["revision"])) is not None
    if source["path"] is None and (is_pinned or (group == "model" and source["run"] is None)):
        yield "source", tuple(source.values())


def _joined(keys: Sequence[_Token], tokens: Sequence[Sequence[_Token]]) -> list[int]:
    """A number for each run, the same for runs of one name that share a token, through others too.

    A run without any token, one that failed before it had read anything, goes with those of the same settings, if they
    are all the same.
    """
    parents: dict[_Token, _Token] = {}

    def root(token: _Token) -> _Token:
        while parents.setdefault(token, token) != token:
            token = parents[token]
        return token

    for (name, _), own in zip(keys, tokens, strict=True):
        for token in own:
            parents[root((name, *token))] = root((name, *own[0]))
    roots = [root((key[0], *own[0])) if own else None for key, own in zip(keys, tokens, strict=True)]
    known: defaultdict[_Token, set[_Token]] = defaultdict(set)
    for key, found in zip(keys, roots, strict=True):
        if found is not None:
            known[key].add(found)
    numbers: dict[_Token, int] = {}
    placed = [
        found if found is not None else next(iter(known[key])) if len(known[key]) == 1 else ("unknown", *key)
        for key, found in zip(keys, roots, strict=True)
    ]
    return [numbers.setdefault(place, len(numbers)) for place in placed]


def _has_preset(source: dict[str, Any]) -> bool:
    return any(source.get(setting) is not None for setting in ("asset", "hub_id", "tiny"))


def _is_preset(source: dict[str, Any]) -> bool:
    return _has_preset(source) and source["path"] is None


def _hint(source: dict[str, Any]) -> str:
    """What says to a person which of several it is: a folder, a file, or a revision."""
    for setting in ("path", "train_file"):
        if source.get(setting) is not None:
            return _last_part(str(source[setting]))
    revision = str(source["revision"] or "")
    return revision[:7] if _COMMIT.fullmatch(revision) else revision


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _contents(frame: pd.DataFrame, group: str) -> Iterator[tuple[Any, ...]]:
    """What each run recorded of the content that it read, empty where it did not."""
    names = (
        [f"{CONTENT}model", f"{CONTENT}model.scratch"]
        if group == "model"
        else [f"{CONTENT}dataset.{split}" for split in ("train", "val", "test")]
    )
    for values in zip(*(_column(frame, name) for name in names), strict=True):
        yield values if any(value is not None for value in values) else ()


def _settings(frame: pd.DataFrame, setting: str) -> list[Any]:
    """A setting of every run; of a group all its settings."""
    inside = [column for column in frame.columns if column.startswith(f"{setting}.")]
    if not inside:
        return _column(frame, setting)
    values = zip(*(_column(frame, column) for column in inside), strict=True)
    return [value if any(part is not None for part in value) else None for value in values]


def _column(frame: pd.DataFrame, name: str) -> list[Any]:
    return frame[name].tolist() if name in frame else [None] * len(frame)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode("utf-8", "replace")).hexdigest()[:_NUM_DIGITS]


# ---------------------------------------------------------------- placements


def placement_keys(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    """What each run's placement asks for: projections in the order of the roles, blocks, modules, name, own ranks.

    The name is there only where nothing else is, or where it names expressions that nobody can read.
    """
    columns = [_column(frame, f"config.target_layers.{name}") for name in ("name", "projections", "blocks", "modules")]
    keys = []
    for name, projections, blocks, modules, pattern in zip(*columns, _rank_patterns(frame), strict=True):
        projections, modules = tuple(projections or ()), tuple(modules or ())
        ordered = sorted(projections, key=lambda role: _ROLES.index(role) if role in _ROLES else len(_ROLES))
        keys.append((tuple(ordered), _comparable_blocks(blocks), modules, None if projections else name, pattern))
    return keys


_PATTERN = "config.rank.pattern."


def _rank_patterns(frame: pd.DataFrame) -> Iterator[tuple[tuple[str, Any], ...]]:
    """The ranks that some targets of each run have for themselves, by role and blocks."""
    names = sorted(column for column in frame.columns if column.startswith(_PATTERN))
    for values in zip(*(_column(frame, name) for name in names), strict=True) if names else [()] * len(frame):
        own = zip(names, values, strict=True)
        yield tuple((name.removeprefix(_PATTERN), rank) for name, rank in own if rank is not None)


def _comparable_blocks(blocks: Any) -> Any:
    if not isinstance(blocks, tuple):
        return blocks or "all"
    if not blocks or not all(isinstance(block, int) for block in blocks):
        return tuple(sorted(blocks, key=str))  # nothing that ran
    canonical = canonical_blocks(blocks)
    return canonical if isinstance(canonical, str) else tuple(canonical)


def _placement(
    projections: tuple[Any, ...],
    blocks: Any,
    modules: tuple[Any, ...],
    name: str | None,
    pattern: tuple[tuple[str, Any], ...],
) -> str | None:
    """A placement in a word: as `qv`, `all (last_half)`, `q_up (blocks 0, 5)`, `all (mlp r4)`."""
    if not projections and name is None:
        return None
    words = list(map(str, projections))
    text = "".join(words)
    if any(len(word) > 1 for word in words) or (len(words) > 1 and text in _ROLES):
        text = "_".join(words)
    if not words:
        text = str(name)
    if modules:
        # A name of projections would say what these are not.
        parts = set(text.split("_"))
        is_taken = not words and (parts <= {*_ROLES, "lm", "head"} or set(text) <= set("qkvo"))
        text = f"{'modules' if is_taken else text} [{_digest(modules)}]"
    marks = [f"{key} r{rank:g}" for key, rank in pattern]
    if blocks not in ("all", ()):
        marks.insert(0, blocks if isinstance(blocks, str) else f"blocks {', '.join(map(str, blocks))}")
    return f"{text} ({', '.join(marks)})" if marks else text


# ---------------------------------------------------------------- names that look alike


def _made_distinct(labels: Sequence[Any]) -> list[Any]:
    """The labels, those spelled out that a reader could take for another of them."""
    alike: defaultdict[str, set[str]] = defaultdict(set)
    for label in labels:
        if label is not None:
            alike[_as_seen(label)].add(label)
    return [label if label is None or len(alike[_as_seen(label)]) == 1 else _spelled_out(label) for label in labels]


def _as_seen(label: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", label).split())


def _spelled_out(label: str) -> str:
    """A label in which every space that cannot be seen and every letter beyond ASCII is a code."""
    inner = label.strip(" ")
    before, after = label[: len(label) - len(label.lstrip(" "))], label[len(label.rstrip(" ")) :] if inner else ""
    spelled = inner.encode("unicode_escape").decode("ascii").replace("  ", "\\x20\\x20")
    return "\\x20" * len(before) + spelled + "\\x20" * len(after)
