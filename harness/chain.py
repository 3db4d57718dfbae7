"""A run that continues an earlier one: where its head begins, and the tasks before it, whose heads are kept.

What a run trained lies in its weights folder, and beside it in `heads/` one head for each task that was trained before:
`<dataset>.safetensors`, with a record of the run that had it in `<dataset>.json`. So a chain of runs can say of every
earlier task what the model still knows of it: its head is put in the place of the present one, and its data are scored
again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.config.composing import dataset_from_dict
from harness.config.schema import DatasetConfig, RunConfig
from harness.config.validation import ConfigError
from harness.content.errors import DataError, ModelError
from harness.content.files import Continued, continued
from harness.methods.counts import is_head
from harness.methods.peft_files import read_saved_modules, save_tensors
from harness.models.loading import BaseModel
from harness.models.tokenizers import PreTrainedTokenizerBase
from harness.processes.distributed import copy_into
from harness.results.files import HEADS_DIR, write_json_atomically
from harness.results.methods import METHODS
from harness.tasks.families import TaskData, find_family


@dataclass(frozen=True)
class TaskRecord:
    """A labelled task as a run was trained on it: its data, classes and scores, and the id of that run."""

    run_id: str
    dataset: DatasetConfig
    data_fingerprint: str | None
    label_names: list[str]
    scores: dict[str, float]


@dataclass(frozen=True)
class EarlierTask:
    """A task that was trained before this run, with the head that it had and its data."""

    record: TaskRecord
    head: dict[str, Tensor]
    data: TaskData

    @property
    def name(self) -> str:
        """The name of its dataset."""
        return self.record.dataset.name


def chain_of(config: RunConfig) -> list[str]:
    """The ids of the runs that this one continues, the first of them first; empty where it starts anew."""
    source = continued(config)
    if source is None or source.result is None:
        return []
    return [*source.result.environment.get("chain", []), source.result.run_id]


# ---------------------------------------------------------------- where the head begins


def start_head(base: BaseModel, config: RunConfig, data: TaskData) -> None:
    """Puts the head of the run that is continued in the place of the one that was drawn, where the classes are equal.

    `base.notes` gets a sentence that says which it is. A run whose base is another run's model (`model.run`) has a head
    of its own in any case.
    """
    source = continued(config)
    if source is None or config.model.run is not None or config.dataset.task.is_language:
        return
    record = _record(source)
    if record is None:
        base.notes.append(
            f"The head is drawn from the seed: {source.weights_dir} is in the folder of no finished run, which would "
            "say what its head was trained on."
        )
        return
    if not _has_classes_of(record, config, data):
        base.notes.append(f"The head is drawn from the seed: {record.run_id} had other labels.")
        return
    head = _head_of(source, base.head)
    parameters = {name: value for name, value in base.model.named_parameters() if is_head(name, base.head)}
    _check_head(head, parameters, source)
    with torch.no_grad():
        for name, value in head.items():
            copy_into(parameters[name], value.to(parameters[name].dtype))
    base.notes.append(f"The head is that of {record.run_id}, which had the same labels.")


def _has_classes_of(record: TaskRecord, config: RunConfig, data: TaskData) -> bool:
    if record.dataset.task is not config.dataset.task or record.label_names != data.label_names:
        return False
    # Numbers, and the one output of a regression, name nothing: the next task would have them, too.
    names_nothing = all(name.strip().lstrip("+-").isdigit() for name in record.label_names)
    return not names_nothing or record.dataset.name == config.dataset.name


def _check_head(head: Mapping[str, Tensor], parameters: Mapping[str, Tensor], source: Continued) -> None:
    wrong = [
        f"{name} is {tuple(head[name].shape) if name in head else 'absent'}, the model needs {tuple(value.shape)}"
        for name, value in parameters.items()
        if name not in head or head[name].shape != value.shape
    ]
    wrong += [f"{name} is there, the model has none" for name in head if name not in parameters]
    if wrong:
        raise ModelError(f"{source.weights_dir}: its head does not fit the model: {'; '.join(wrong[:5])}.")


# ---------------------------------------------------------------- earlier tasks


def load_earlier_tasks(
    config: RunConfig, base: BaseModel, tokenizer: PreTrainedTokenizerBase, *, num_processes: int
) -> list[EarlierTask]:
    """The labelled tasks before this run, the latest last; none for a language model, or where nothing is continued.

    A task of the same name as the run's own is trained again and no earlier one.

    Raises:
        ModelError: a head that cannot be read.
        DataError: data of an earlier task that cannot be read, or are others than it was trained on.
        ConfigError: more than one process with a sharded model.
    """
    source = continued(config)
    if source is None or config.dataset.task.is_language or not config.score_earlier_tasks:
        return []
    heads: dict[str, tuple[TaskRecord, dict[str, Tensor]]] = {}
    for path in sorted((source.weights_dir / HEADS_DIR).glob("*.json")):
        record = _read_record(path)
        heads[record.dataset.name] = record, _load(path.with_suffix(".safetensors"))
    latest = _record(source)
    if latest is not None:
        heads.pop(latest.dataset.name, None)
        heads[latest.dataset.name] = latest, _head_of(source, base.head)
    heads.pop(config.dataset.name, None)
    if heads and config.shard_model and num_processes > 1:
        raise ConfigError(
            [
                "score_earlier_tasks=true: puts whole heads in the place of one that shard_model=true holds in parts; "
                "set one of the two to false."
            ]
        )
    return [EarlierTask(record, head, _load_data(record, tokenizer)) for record, head in heads.values()]


def _load_data(record: TaskRecord, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    way_out = "Put them back, or set score_earlier_tasks=false."
    try:
        data = find_family(record.dataset.task).load(record.dataset, tokenizer)
    except DataError as error:
        raise DataError(f"the data of {record.run_id}, an earlier task: {error} {way_out}") from error
    if record.data_fingerprint not in (None, data.fingerprint):
        raise DataError(
            f"dataset={record.dataset.name}: has other rows than when {record.run_id} was trained on it, so that its "
            f"scores then and now could not be compared. {way_out}"
        )
    return data


def _record(source: Continued) -> TaskRecord | None:
    """The task of the run that is continued; None of a language model, and where no run is known."""
    result = source.result
    if result is None:
        return None
    dataset = dataset_from_dict(result.config["dataset"])
    if dataset.task.is_language:
        return None
    return TaskRecord(
        result.run_id,
        dataset,
        result.environment.get("data_fingerprint"),
        list(result.environment.get("label_names", [])),
        {name: value for name, value in result.metrics.items() if _is_kept_score(name)},
    )


def _is_kept_score(name: str) -> bool:
    return name.startswith(("val_", "test_")) and not name.endswith(("_last", "_before"))


def _read_record(path: Path) -> TaskRecord:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return TaskRecord(**{**values, "dataset": dataset_from_dict(values["dataset"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not readable as the record of an earlier task ({error!r}).") from error


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not readable as safetensors ({error}).") from error


def _head_of(source: Continued, head_modules: Sequence[str]) -> dict[str, Tensor]:
    """The head that the run that is continued was trained with, by the names of its parameters."""
    assert source.result is not None
    if not METHODS[source.result.config["method"]["name"]].trains_base:
        found = read_saved_modules(source.weights_dir)
    else:
        found = {}
        for path in sorted(source.weights_dir.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    names = [name for name in file.keys() if is_head(name, head_modules)]  # noqa: SIM118 (no mapping)
                    found |= {name: file.get_tensor(name) for name in names}
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} is not readable as safetensors ({error}).") from error
    if not found:
        raise ModelError(
            f"{source.weights_dir}: holds no head of {source.result.run_id}; set score_earlier_tasks=false."
        )
    return found


@contextmanager
def with_head(model: nn.Module, head: Mapping[str, Tensor]) -> Iterator[None]:
    """While inside, the model has an earlier head, with its number of classes, in the place of the present one."""
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, value in head.items():
            module, _, leaf = name.rpartition(".")
            owner = model.get_submodule(module)
            own = getattr(owner, leaf)
            replaced.append((owner, leaf, own))
            setattr(owner, leaf, nn.Parameter(value.to(own.device, torch.float32), requires_grad=False))
        yield
    finally:
        for owner, leaf, own in replaced:
            setattr(owner, leaf, own)


def save_heads(earlier: Sequence[EarlierTask], directory: Path) -> None:
    """Keeps the heads of the tasks before a run beside what it trained."""
    for task in earlier:
        save_tensors(task.head, directory / HEADS_DIR / f"{task.name}.safetensors")
        write_json_atomically(directory / HEADS_DIR / f"{task.name}.json", _as_json(task.record))


def _as_json(record: TaskRecord) -> Any:
    return asdict(record)
