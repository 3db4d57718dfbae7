"""Which local files and folders a config names: data, chat template, vocabulary, base weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from harness.config.schema import DatasetConfig, ModelConfig, RunConfig, Task
from harness.content.assets import asset_dir
from harness.content.errors import DataError, ModelError
from harness.results.files import RESULT_FILE
from harness.results.methods import METHODS
from harness.results.schema import ResultError, Status, read_result


def data_files(config: DatasetConfig) -> dict[str, Path]:
    """The local file of each split that has one; those of an asset are fetched where needed. Raises `DataError`."""
    folder, given = None, {"train": config.train_file, "val": config.val_file, "test": config.test_file}
    if config.path is not None:
        folder = Path(config.path).expanduser()
        if folder.is_file() and config.train_file is None:
            folder, given["train"] = folder.parent, folder.name
        elif not folder.is_dir():
            raise DataError(f"dataset.path={config.path}: no such folder. Give the folder that holds {_named(given)}.")
    elif config.asset is not None:
        folder = asset_dir(config.asset)
    files: dict[str, Path] = {}
    for split, name in given.items():
        if name is None:
            continue
        path = (folder / name) if folder is not None else Path(name).expanduser()
        if not path.is_file():
            raise DataError(f"dataset.{split}_file={name}: no file {path}. There: {_listing(path.parent)}.")
        files[split] = path
    if "train" not in files:
        there = f" In {folder}: {_listing(folder)}." if folder is not None else ""
        raise DataError(f"dataset.train_file: not set. Name the file with the training rows.{there}")
    return files


def _named(given: Mapping[str, str | None]) -> str:
    return ", ".join(name for name in given.values() if name is not None) or "dataset.train_file"


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return (", ".join(names[:10]) + (", ..." if len(names) > 10 else "")) or "nothing"


def chat_template_file(config: DatasetConfig) -> Path | None:
    """The file of the chat template, where one is named and read."""
    if config.task is not Task.chat or config.chat_template in (None, "chatml"):
        return None
    return Path(str(config.chat_template)).expanduser()


def base_model(config: RunConfig) -> ModelConfig:
    """The model with `model.run` resolved to the folder of that run's weights. Raises `ModelError`."""
    if config.model.run is None or config.model.path is not None:
        return config.model
    return replace(config.model, path=str(_run_model_dir(config)))


def vocabulary_file(folder: Path, name: str) -> Path:
    """The file from which a vocabulary is learned. Raises `ModelError`."""
    if not (folder / name).is_file():
        raise ModelError(f"model.scratch.file={name}: no such file in {folder}.")
    return folder / name


def _run_model_dir(config: RunConfig) -> Path:
    named = f"model.run={config.model.run}"
    folder = Path(config.runs_dir) / str(config.model.run)
    try:
        result = read_result(folder / RESULT_FILE)
    except ResultError:
        state = "was not finished" if folder.is_dir() else "does not exist"
        raise ModelError(
            f"{named}: this run {state} in runs_dir={config.runs_dir}; run it first. {_possible_bases(config)}"
        ) from None
    if result.status is not Status.FINISHED:
        raise ModelError(f"{named}: this run ended as {result.status}: {result.error}. {_possible_bases(config)}")
    method = result.config["method"]["name"]
    known = METHODS.get(method)
    if known is None or not known.trains_base:
        raise ModelError(
            f"{named}: this run has method={method} and so no full weights to start from; a base is a run with "
            f"method=full. {_possible_bases(config)}"
        )
    if config.dataset.task.is_language and not Task(result.config["dataset"]["task"]).is_language:
        raise ModelError(
            f"{named}: this run trained a classifier, and dataset.task={config.dataset.task} needs a language model. "
            f"{_possible_bases(config)}"
        )
    if not (folder / known.weights_dir / "config.json").is_file():
        raise ModelError(f"{named}: its weights were not kept; rerun it with save_weights=true rerun=all.")
    return folder / known.weights_dir


def _possible_bases(config: RunConfig) -> str:
    found = sorted(path.parent.parent.name for path in Path(config.runs_dir).glob("*/model/config.json"))
    return f"Finished full runs there: {', '.join(found[:5]) or 'none'}{', ...' if len(found) > 5 else ''}."
