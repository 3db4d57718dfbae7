"""Runs that have ended, with the weights that they kept: found, and put into a base that is loaded once for all."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from harness.config.composing import from_dict
from harness.config.schema import ModelConfig, Quantization, RunConfig
from harness.config.validation import ConfigError
from harness.content.digests import model_content
from harness.content.errors import ModelError
from harness.content.files import base_model
from harness.methods.swapping import change_head, put_in, restored
from harness.models.configs import build_skeleton, is_scratch, is_tiny
from harness.models.loading import BaseModel, PreTrainedModel, load_model
from harness.models.tokenizers import PreTrainedTokenizerBase, load_tokenizer
from harness.processes.distributed import place_on_device
from harness.results.effects import MODEL_SOURCE, STARTING_POINT
from harness.results.files import DIFFERENCE_FILE, RESULT_FILE
from harness.results.methods import METHODS
from harness.results.schema import ResultError, RunResult, Status, read_result


@dataclass(frozen=True)
class SavedRun:
    """A finished run: its config, what it measured, and the folder of what it trained."""

    config: RunConfig
    result: RunResult
    weights_dir: Path

    @property
    def run_id(self) -> str:
        """Identity of the run."""
        return self.result.run_id

    @property
    def content(self) -> dict[str, str] | None:
        """Digests of what the run read, as `find_content` has them; None where an early version recorded none."""
        content: dict[str, str] | None = self.result.environment.get("content")
        return content

    @property
    def label_names(self) -> list[str]:
        """The run's classes in the order of its logits, none for other tasks."""
        names: list[str] = self.result.environment.get("label_names", [])
        return names

    @property
    def num_labels(self) -> int | None:
        """Outputs of the run's head, None where it has none."""
        return None if self.config.dataset.task.is_language else len(self.label_names) or 1

    @property
    def is_model(self) -> bool:
        """Whether what it kept is a whole model."""
        return METHODS[self.config.method.name].trains_base and not (self.weights_dir / DIFFERENCE_FILE).is_file()


def find_saved(
    run_ids: Sequence[str],
    runs_dir: Path,
    changed: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    *,
    needs_base: bool = False,
) -> list[SavedRun]:
    """The runs of these ids, with configs that `changed` makes of theirs.

    With `needs_base` a run that kept a whole model needs the one that it was trained from, too.

    Raises `ConfigError` with one sentence for each that cannot be used: unknown, not finished, without weights, or with
    a base model that is gone or is another one now.
    """
    found: list[SavedRun] = []
    problems: list[str] = []
    for run_id in dict.fromkeys(run_ids):
        try:
            found.append(_find(run_id, runs_dir, changed, needs_base=needs_base))
        except (ConfigError, ModelError) as error:
            problems += [line if line.startswith(run_id) else f"{run_id}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return found


def _find(
    run_id: str, runs_dir: Path, changed: Callable[[dict[str, Any]], dict[str, Any]], *, needs_base: bool
) -> SavedRun:
    folder = runs_dir / run_id
    if Path(run_id).name != run_id:
        raise ConfigError(["the id of a run is the name of its folder; say where that lies with runs_dir=DIR."])
    if not (folder / RESULT_FILE).is_file():
        ended = sorted(path.parent.name for path in runs_dir.glob(f"*/{RESULT_FILE}"))
        near = difflib.get_close_matches(run_id, ended, n=3) or ended[:3]
        raise ConfigError(
            [f"no such run has ended in runs_dir={runs_dir}. There: {', '.join(near) or 'none'} ({len(ended)} in all)."]
        )
    try:
        result = read_result(folder / RESULT_FILE)
    except ResultError as error:
        raise ConfigError([str(error)]) from None
    if result.run_id != run_id:
        raise ConfigError([f"{folder} holds the run {result.run_id}; give the folder that name."])
    if result.status is not Status.FINISHED:
        raise ConfigError([f"the run ended as {result.status}, and only finished runs keep weights."])
    method = METHODS.get(result.config["method"]["name"])
    if method is None:
        raise ConfigError([f"method={result.config['method']['name']} is not known here; install its extension."])
    if not list((folder / method.weights_dir).glob("*.safetensors")):
        raise ConfigError(
            [f"its weights were not kept ({folder / method.weights_dir}); rerun it with save_weights=true rerun=all."]
        )
    # What a run continued, and what else was scored while it trained, need not be here any more.
    model = {**result.config["model"], **dict.fromkeys(STARTING_POINT)}
    gone = {"model": model, "evaluate_also": {}, "score_earlier_tasks": True}
    config = from_dict(changed({**result.config, "runs_dir": str(runs_dir), **gone}))
    saved = SavedRun(config, result, folder / method.weights_dir)
    if needs_base or not saved.is_model:
        _require_base(saved)
    return saved


def _require_base(saved: SavedRun) -> None:
    """Raises `ModelError` where the base model is gone or has other content than the run had."""
    if saved.content is None:
        return
    found = model_content(saved.config)
    for name in ("model", "model.scratch"):
        if saved.content.get(name) != found.get(name):
            raise ModelError(
                f"the base model has other content than the run had: {_where(base_model(saved.config))} was changed, "
                "and what was trained belongs to the model as it was; put that back."
            )


def _where(model: ModelConfig) -> str:
    named = {name: getattr(model, name) for name in ("path", "asset", "hub_id", "scratch")}
    return next((f"model.{name}={value}" for name, value in named.items() if value is not None), model.name)


def base_key(saved: SavedRun, *, untrained: bool = False) -> str:
    """What is equal for runs with one base model: its content, and the form in which it is loaded.

    A run that kept a whole model is its own base; with `untrained` what counts is the one that it was trained from.
    """
    if saved.is_model and not untrained:
        return saved.run_id
    model = base_model(saved.config)
    content = model_content(saved.config)
    values: dict[str, Any] = asdict(model)
    for name in ("name", "dropout", *STARTING_POINT, *(MODEL_SOURCE if content.keys() == {"model"} else ())):
        del values[name]
    if is_tiny(model) or is_scratch(model):
        values["seed"] = saved.config.seed  # every weight is drawn from it
    return json.dumps([values, content, saved.num_labels is None], sort_keys=True)


class Base:
    """A base model in memory, and its tokenizer: what runs saved is put into it, one run at a time.

    Raises `ModelError` where it cannot be loaded.
    """

    tokenizer: PreTrainedTokenizerBase
    base: BaseModel

    def __init__(self, first: SavedRun, *, untrained: bool = False) -> None:
        """Loads the base of a run; it has that run's head until `holding` gives it another one.

        With `untrained` also of a run that kept a whole model the one that it was trained from.
        """
        self.model_config = base_model(first.config) if untrained else own_model(first)
        self.tokenizer = load_tokenizer(self.model_config)
        self._num_labels = first.num_labels
        self.base = load_model(
            self.model_config,
            num_labels=first.num_labels,
            pad_token_id=self.tokenizer.pad_token_id,
            seed=first.config.seed,
            keeps_head=first.is_model and not untrained,
        )

    @contextmanager
    def holding(self, saved: SavedRun, accelerator: Accelerator) -> Iterator[PreTrainedModel]:
        """Inside, the model as a run has trained it, on the device; afterwards the base is bitwise what it was.

        Raises what the run's method raises for files that cannot be read or do not fit.
        """
        model = self.base.model
        place_on_device(model, accelerator, shard_model=False)
        model.eval()
        with restored(model):
            if not saved.is_model:
                self.fit_head(saved)
                put_in(model, saved.weights_dir, saved.config, head=self.base.head)
                place_on_device(model, accelerator, shard_model=False)
                model.eval()
            yield model

    def fit_head(self, saved: SavedRun) -> None:
        """Gives the model an empty head of a run's number of outputs where its own has another; inside `restored`."""
        if saved.num_labels is not None and saved.num_labels != self._num_labels:
            skeleton = build_skeleton(self.model_config, num_labels=saved.num_labels)
            change_head(self.base.model, skeleton, self.base.head, num_labels=saved.num_labels)


def own_model(saved: SavedRun) -> ModelConfig:
    """Where the model is loaded from: the base, or what the run kept where that is a whole model."""
    if not saved.is_model:
        return base_model(saved.config)
    return replace(saved.config.model, path=str(saved.weights_dir), run=None, quantization=Quantization.none)


def by_base(runs: Sequence[SavedRun]) -> list[list[SavedRun]]:
    """The runs in groups of one base model each, in their order."""
    groups: dict[str, list[SavedRun]] = {}
    for saved in runs:
        groups.setdefault(base_key(saved), []).append(saved)
    return list(groups.values())


def with_values(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with others under dotted names; the given ones stay as they are.

    >>> with_values({"a": {"b": 1, "c": 2}}, {"a.b": 3})
    {'a': {'b': 3, 'c': 2}}
    """
    result = dict(values)
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        result[first] = with_values(result.get(first) or {}, {rest: value}) if rest else value
    return result
