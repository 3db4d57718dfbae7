"""Which local files and folders a config names: data, template, vocabulary, base weights, what a run continues."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness.config.schema import DatasetConfig, ModelConfig, RunConfig, Task
from harness.content.assets import asset_dir
from harness.content.errors import DataError, ModelError
from harness.results.files import DIFFERENCE_FILE, RESULT_FILE
from harness.results.launches import LaunchError, launched_sweeps, read_launches
from harness.results.methods import METHODS
from harness.results.schema import ResultError, RunResult, Status, read_result

_ADAPTER_CONFIG = "adapter_config.json"  # of PEFT's format


def data_files(config: DatasetConfig, *, with_test: bool = True) -> dict[str, Path]:
    """The local file of each split that has one; those of an asset are fetched where needed. Raises `DataError`."""
    given = {"train": config.train_file, "val": config.val_file, "test": config.test_file if with_test else None}
    folder = None
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
    """The model with the run that is its base resolved to the folder of that run's weights. Raises `ModelError`."""
    if config.model.path is not None:
        return config.model
    method = METHODS.get(config.method.name)
    if config.model.from_sweep is not None and method is not None and method.trains_base:
        return replace(config.model, path=str(_run_of_sweep(config).weights_dir))
    if config.model.run is None:
        return config.model
    return replace(config.model, path=str(_run_model(config).weights_dir))


def vocabulary_file(folder: Path, name: str) -> Path:
    """The file from which a vocabulary is learned. Raises `ModelError`."""
    if not (folder / name).is_file():
        raise ModelError(f"model.scratch.file={name}: no such file in {folder}.")
    return folder / name


# ---------------------------------------------------------------- what a run continues


@dataclass(frozen=True)
class Continued:
    """What a run starts from instead of a base model alone.

    `weights_dir` holds the adapter or the model; `result` is that of the run that left it, None for a folder of which
    no run is known.
    """

    weights_dir: Path
    result: RunResult | None


def continued(config: RunConfig) -> Continued | None:
    """What the run continues, if anything: an adapter, or a full run's model. Raises `ModelError`."""
    if config.model.from_sweep is not None:
        return _run_of_sweep(config)
    if config.model.adapter is not None:
        return _adapter(config)
    if config.model.run is not None and config.model.path is None:
        return _run_model(config)
    return None


def continued_adapter(config: RunConfig) -> Continued | None:
    """What the run continues where that is an adapter. Raises `ModelError`."""
    method = METHODS.get(config.method.name)
    if config.model.adapter is None and (config.model.from_sweep is None or method is None or method.trains_base):
        return None
    return continued(config)


def _adapter(config: RunConfig) -> Continued:
    named = f"model.adapter={config.model.adapter}"
    run_dir, folder = Path(config.runs_dir) / str(config.model.adapter), Path(str(config.model.adapter)).expanduser()
    is_run = run_dir.is_dir() and run_dir.resolve() != Path(config.runs_dir).resolve()
    if is_run and not (run_dir / _ADAPTER_CONFIG).is_file():
        result = _finished(run_dir, named, config.runs_dir, "")
        return Continued(_adapter_of(run_dir, result, named), result)
    if not (folder / _ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{named}: neither a run in runs_dir={config.runs_dir} nor a folder with {_ADAPTER_CONFIG}; give the id of "
            "a finished run with method=lora, or a folder with an adapter in PEFT's format."
        )
    # The adapter's folder of a run, wherever that lies.
    with contextlib.suppress(ResultError):
        result = read_result(folder.resolve().parent / RESULT_FILE)
        known = METHODS.get(result.config["method"]["name"])
        if result.status is Status.FINISHED and known is not None and known.weights_dir == folder.resolve().name:
            return Continued(folder, result)
    return Continued(folder, None)


def _adapter_of(run_dir: Path, result: RunResult, named: str) -> Path:
    method = result.config["method"]["name"]
    known = METHODS.get(method)
    if known is None or not known.has_variants:
        raise ModelError(
            f"{named}: this run has method={method} and so no adapter to continue; name a run with method=lora (a full "
            "run's model is a base: model.run)."
        )
    if not (run_dir / known.weights_dir / _ADAPTER_CONFIG).is_file():
        raise ModelError(f"{named}: its weights were not kept; rerun it with save_weights=true rerun=all.")
    return run_dir / known.weights_dir


def _run_of_sweep(config: RunConfig) -> Continued:
    """The one finished run of `model.from_sweep` that differs in dataset and recipe alone."""
    sweep = str(config.model.from_sweep)
    named = f"model.from_sweep={sweep}"
    runs_dir = Path(config.runs_dir)
    command = f"python -m harness -m sweeps={sweep}"
    try:
        launched = read_launches(runs_dir, sweep)
    except LaunchError as error:
        raise ModelError(f"{named}: {error}") from error
    if launched is None:
        known = ", ".join(launched_sweeps(runs_dir)) or "none"
        raise ModelError(
            f"{named}: no sweep of that name was launched in runs_dir={config.runs_dir}, where there are: {known}. Run "
            f"it first: {command}"
        )
    wanted = _comparable(json.loads(json.dumps(asdict(config))))
    found: list[tuple[Path, RunResult]] = []
    for run_id in launched.run_ids:
        with contextlib.suppress(ResultError):
            result = read_result(runs_dir / run_id / RESULT_FILE)
            if result.status is Status.FINISHED and _comparable(result.config) == wanted:
                found.append((runs_dir / run_id, result))
    searched = f"method={config.method.name}, this rank, target layers, variant and base, and seed={config.seed}"
    if not found:
        raise ModelError(
            f"{named}: none of its {len(launched.run_ids)} runs in runs_dir={config.runs_dir} has finished with "
            f"{searched}. Run it first: {command}"
        )
    if len(found) > 1:
        raise ModelError(
            f"{named}: {len(found)} of its runs finished with {searched}: {', '.join(path.name for path, _ in found)}. "
            "Name one of them: model.adapter=RUN_ID with method=lora, model.run=RUN_ID with method=full."
        )
    run_dir, result = found[0]
    method = METHODS[config.method.name]
    if not method.trains_base:
        return Continued(_adapter_of(run_dir, result, f"{named} ({run_dir.name})"), result)
    if not (run_dir / method.weights_dir / "config.json").is_file():
        raise ModelError(f"{named}: {_why_no_model(run_dir, method.weights_dir, f'the weights of {run_dir.name}')}")
    return Continued(run_dir / method.weights_dir, result)


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run of a chain has in common with the run that it continues."""
    model = {name: value for name, value in config["model"].items() if value is not None}
    placement, variant = config.get("target_layers") or {}, config.get("variant") or {}
    rank = config.get("rank") or {}
    return {
        "method": config["method"]["name"],
        "seed": config["seed"],
        "rank": {**rank, "pattern": rank.get("pattern") or {}} if rank else {},
        "target_layers": {name: value for name, value in placement.items() if name != "name"},
        "dora": variant.get("dora", False),
        "learning_rate_ratio": variant.get("learning_rate_ratio", 1.0),
        "bias": variant.get("bias", "none"),
        # Where it continues something itself is its own affair, and how its weights are held no part of them.
        "base": {name: model.get(name) for name in ("asset", "hub_id", "revision", "tiny", "path", "run", "scratch")},
    }


def _run_model(config: RunConfig) -> Continued:
    named = f"model.run={config.model.run}"
    folder = Path(config.runs_dir) / str(config.model.run)
    result = _finished(folder, named, config.runs_dir, f" {_possible_bases(config)}")
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
        raise ModelError(f"{named}: {_why_no_model(folder, known.weights_dir, 'its weights')}")
    return Continued(folder / known.weights_dir, result)


def _why_no_model(folder: Path, weights_dir: str, what: str) -> str:
    if (folder / weights_dir / DIFFERENCE_FILE).is_file():
        return (
            f"{what} were kept as a difference to the base (save_full_as=difference), from which no run starts; write "
            f"a model (export={folder.name} to=DIR) and name it (model.path=DIR), or rerun it with save_full_as=model "
            "rerun=all."
        )
    return f"{what} were not kept; rerun it with save_weights=true rerun=all."


def _finished(folder: Path, named: str, runs_dir: str, hint: str) -> RunResult:
    """The result of a run that finished. Raises `ModelError`."""
    try:
        result = read_result(folder / RESULT_FILE)
    except ResultError:
        state = "was not finished" if folder.is_dir() else "does not exist"
        raise ModelError(f"{named}: this run {state} in runs_dir={runs_dir}; run it first.{hint}") from None
    if result.status is not Status.FINISHED:
        raise ModelError(f"{named}: this run ended as {result.status}: {result.error}.{hint}")
    return result


def _possible_bases(config: RunConfig) -> str:
    found = sorted(path.parent.parent.name for path in Path(config.runs_dir).glob("*/model/config.json"))
    return f"Finished full runs there: {', '.join(found[:5]) or 'none'}{', ...' if len(found) > 5 else ''}."
