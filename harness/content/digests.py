"""What a run reads from local files, named by its bytes: data, base weights, templates, vocabulary.

Names and folders say where content lies today, and not what it is. Digests are kept in the process and in the cache
folder by path, size and time stamps, so that a plan of hundreds of runs reads a large file once. Needs no torch and no
pandas: a launcher asks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from harness.config.schema import DatasetConfig, ModelConfig, RunConfig
from harness.content.assets import ASSETS, cache_dir
from harness.content.errors import ContentError, DataError, ModelError
from harness.content.files import (
    Continued,
    base_model,
    chat_template_file,
    continued,
    continued_adapter,
    data_files,
    vocabulary_file,
)
from harness.results.files import HEADS_DIR, LABELS_FILE, write_atomically

_SPLITS = ("train", "val", "test")

# What transformers may read of a model's folder; not its README, nor what a trainer left beside the weights.
_MODEL_ENDINGS = (".safetensors", ".bin", ".json", ".model", ".jinja", ".tiktoken")
_MODEL_TEXTS = ("vocab.txt", "merges.txt")
# What of an adapter's folder decides where a run starts: A and B, whose rows they are, and the head's labels.
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "adapter_parts.json", LABELS_FILE)
_NOT_OF_THE_MODEL = ("training_args.bin", "trainer_state.json", "optimizer.bin", "scheduler.bin")

# A time stamp can be as coarse as two seconds: a file changed within them is digested again.
_SETTLED_NANOSECONDS = 2 * 10**9


def find_content(config: RunConfig) -> dict[str, str]:
    """Digests of everything local that decides the run's numbers, by what it is (`dataset.train`, `model`, ...).

    A file of rows is its sha256 with the ending of its name, which decides how bytes become rows. Content of a
    registered asset has the digests that are registered; content on the hub is named by its revision and not here. Of a
    trial no test split is looked at.

    Raises:
        DataError: a data file or chat template that does not exist.
        ModelError: a model folder, run or vocabulary file that does not exist.
    """
    found = _dataset_content("dataset", config.dataset, with_test=not config.trial)
    for name, dataset in config.evaluate_also.items():
        found |= _dataset_content(f"evaluate_also.{name}", dataset, with_test=not config.trial)
    found |= model_content(config)
    return found | _continued_content(config, found)


def require_content(config: RunConfig, content: Mapping[str, str]) -> None:
    """Raises `ContentError` when what the config names has other content than `content` says."""
    found = find_content(config)
    changed = sorted(name for name in {*found, *content} if found.get(name) != content.get(name))
    if changed:
        raise ContentError(
            f"{', '.join(changed)}: changed since this run was planned, so its numbers would not belong to its run id. "
            "Start it again; with the new content it is another run."
        )


def _dataset_content(setting: str, config: DatasetConfig, *, with_test: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    if config.path is not None or (config.asset is None and config.hub_id is None):
        found = {
            f"{setting}.{split}": _rows_digest(path) for split, path in data_files(config, with_test=with_test).items()
        }
    elif config.asset is not None and config.asset in ASSETS:
        pins = ASSETS[config.asset].files
        splits = [split for split in _SPLITS if with_test or split != "test"]
        names = {split: getattr(config, f"{split}_file") for split in splits}
        found = {f"{setting}.{split}": pins[name] + _ending(name) for split, name in names.items() if name in pins}
    template = chat_template_file(config)
    if template is not None:
        try:
            found[f"{setting}.chat_template"] = file_digest(template)
        except OSError as error:
            raise DataError(
                f"{setting}.chat_template={config.chat_template}: neither chatml nor a file that can be read "
                f"({error.strerror})."
            ) from error
    return found


def _rows_digest(path: Path) -> str:
    try:
        return file_digest(path) + _ending(path.name)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def _ending(name: str) -> str:
    ending = Path(name).suffix
    return ".jsonl" if ending == ".json" else ending  # read alike


def pinned_names(config: DatasetConfig, setting: str, content: Mapping[str, str]) -> dict[str, str] | None:
    """The registered file names of a dataset whose files, wherever they lie, are those of its asset; else None."""
    if config.asset is None or config.asset not in ASSETS:
        return None
    by_digest = {sha256 + _ending(name): name for name, sha256 in ASSETS[config.asset].files.items()}
    digests = {split: content[f"{setting}.{split}"] for split in _SPLITS if f"{setting}.{split}" in content}
    if not all(digest in by_digest for digest in digests.values()):
        return None
    return {split: by_digest[digest] for split, digest in digests.items()}


def is_pinned(model: ModelConfig, content: Mapping[str, str]) -> bool:
    """Whether `model.path` holds the files of `model.asset`."""
    return (
        model.asset is not None
        and model.asset in ASSETS
        and content.get("model") == _folder_digest(ASSETS[model.asset].files)
    )


def model_content(config: RunConfig) -> dict[str, str]:
    """The part of `find_content` that is the base model's. Raises `ModelError`."""
    model = base_model(config)
    if model.path is not None:
        folder = Path(model.path).expanduser()
        if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"model.path={model.path}: no config.json there. Give a folder that `save_pretrained` wrote: "
                "config.json, model.safetensors, tokenizer files."
            )
        return {"model": _folder_digest(_model_files(folder))}
    if model.asset is not None:
        return {"model": _folder_digest(ASSETS[model.asset].files)} if model.asset in ASSETS else {}
    if model.scratch is not None and model.scratch.path is not None:
        path = vocabulary_file(Path(model.scratch.path).expanduser(), model.scratch.file)
        return {"model.scratch": file_digest(path) + _ending(path.name)}
    return {}


def _continued_content(config: RunConfig, found: Mapping[str, str]) -> dict[str, str]:
    """The adapter that is continued, and the heads of earlier tasks beside it or beside a full run's model.

    Raises `ModelError` for an adapter of another base, as far as that is known.
    """
    content: dict[str, str] = {}
    adapter, source = continued_adapter(config), continued(config)
    if adapter is not None:
        _require_base(config, adapter, found)
        # Not its config: rank, scaling and targets are the run's own, which must be equal.
        names = [name for name in _ADAPTER_FILES if (adapter.weights_dir / name).is_file()]
        if adapter.result is None:  # then the labels of its head are not read, and the head is drawn
            names = [name for name in names if name != LABELS_FILE]
        try:
            content["model.adapter"] = _folder_digest({name: file_digest(adapter.weights_dir / name) for name in names})
        except OSError as error:
            raise ModelError(f"{error.filename}: cannot be read ({error.strerror}).") from error
    if source is not None and not config.dataset.task.is_language and config.score_earlier_tasks:
        heads = sorted((source.weights_dir / HEADS_DIR).glob("*.*"))
        if heads:
            content["model.heads"] = _folder_digest({path.name: file_digest(path) for path in heads})
    return content


def _require_base(config: RunConfig, adapter: Continued, found: Mapping[str, str]) -> None:
    """Raises `ModelError` where the adapter is known to belong to another base model than the run's."""
    named = f"model.adapter={config.model.adapter}"
    if config.model.adapter is None:
        named = f"model.from_sweep={config.model.from_sweep} ({adapter.weights_dir.parent.name})"
    own = base_model(config)
    if adapter.result is None:
        theirs, revision, digest = _base_in_file(adapter.weights_dir)
        is_same = digest == found["model"] if digest is not None and "model" in found else None
        if is_same is None and own.path is None and own.hub_id is not None and theirs is not None:
            is_same = theirs == own.hub_id and revision in (None, own.revision)
            theirs = f"{theirs} at revision {revision}" if revision is not None else theirs
    else:
        other = adapter.result.config["model"]
        digest = adapter.result.environment.get("content", {}).get("model")
        theirs = " ".join(f"{name}={other[name]}" for name in ("name", "hub_id", "revision", "tiny") if other.get(name))
        if digest is not None or "model" in found:
            is_same = digest == found.get("model")
        else:
            names = ("hub_id", "revision", "tiny", "scratch")
            is_same = all(other.get(name) == asdict(own)[name] for name in names)
            if is_same and (own.tiny or own.scratch) and adapter.result.config["seed"] != config.seed:
                is_same, theirs = False, f"{theirs}, drawn at random from seed={adapter.result.config['seed']}"
    if is_same is False:
        mine = own.path or own.asset or own.hub_id or f"drawn at random from seed={config.seed}"
        raise ModelError(
            f"{named}: this adapter belongs to another base model ({theirs}) than model={config.model.name} "
            f"({mine}); choose the base that it was trained on."
        )


def _base_in_file(folder: Path) -> tuple[str | None, str | None, str | None]:
    """Name and revision of its base in PEFT's config of an adapter, and the digest of a base that is a folder here."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder}: its adapter_config.json is not readable ({error}).") from error
    if not isinstance(name, str) or not (Path(name) / "config.json").is_file():
        return name if isinstance(name, str) else None, revision, None
    return name, revision, _folder_digest(_model_files(Path(name)))


def _model_files(folder: Path) -> dict[str, str]:
    """Digests of the files of a model's folder that decide what is loaded from it, by name."""
    names = [
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and (path.suffix in _MODEL_ENDINGS or path.name in _MODEL_TEXTS)
        and path.name not in _NOT_OF_THE_MODEL
        and not path.name.endswith("_results.json")
        and not path.name.startswith(".")
    ]
    if any(name.endswith(".safetensors") for name in names):
        names = [name for name in names if not name.endswith((".bin", ".bin.index.json"))]  # read only without these
    try:
        return {name: file_digest(folder / name) for name in names}
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read ({error.strerror}).") from error


def _folder_digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()


_digests: dict[tuple[str, int, int, int, int], str] = {}


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes, 64 hex digits; from the cache where path, size and time stamps are known.

    Raises `OSError` when the file cannot be read.
    """
    real = path.resolve()
    while True:
        stat = real.stat()
        key = (str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        is_settled = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NANOSECONDS
        if is_settled and key in _digests:
            return _digests[key]
        cached = _cache_path(key)
        if is_settled and (digest := _read_cached(cached, key)) is not None:
            _digests[key] = digest
            return digest
        with real.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = real.stat()
        if (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns):
            break
    if is_settled:
        _digests[key] = digest
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
            write_atomically(cached, json.dumps({"key": key, "sha256": digest}).encode())
    return digest


def _cache_path(key: tuple[str, int, int, int, int]) -> Path:
    return cache_dir() / "digests" / f"{hashlib.sha256(os.fsencode(key[0])).hexdigest()[:32]}.json"


def _read_cached(path: Path, key: tuple[str, int, int, int, int]) -> str | None:
    try:
        entry = json.loads(path.read_bytes())
        return str(entry["sha256"]) if entry["key"] == list(key) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
