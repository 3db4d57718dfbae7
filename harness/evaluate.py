"""Scores of runs that have ended, on any split and any dataset with their labels: one base, many runs' weights.

A run is scored as it scored itself: its evaluation batches, precision, device and threads. On its own val or test the
numbers are then those of its result, to the bit where device and versions are the same.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from harness.config.composing import to_dict
from harness.config.schema import RunConfig, Task
from harness.config.validation import ConfigError
from harness.content.digests import file_digest, find_content
from harness.deltas import set_weight
from harness.measure.environment import environment
from harness.methods.swapping import merge_in
from harness.models import configs
from harness.models.loading import PreTrainedModel
from harness.models.tokenizers import check_vocabulary
from harness.placement.select import Target
from harness.prepare import build_accelerator, computes_on_gpu, length_problems, set_threads, wanted_generation_metrics
from harness.processes.stopping import StopRequest
from harness.results.files import GENERATIONS_DIR, PREDICTIONS_DIR, write_atomically
from harness.results.methods import METHODS
from harness.results.metrics import SCORES
from harness.run import MADE_BY
from harness.saved import Base, SavedRun, base_key, by_base
from harness.score import keep_generations
from harness.tasks.families import TaskData, find_family
from harness.tasks.generation import generate
from harness.tasks.generation_scores import score_texts
from harness.tasks.predictions import write_predictions

SCORES_FILE = "scores.csv"

# Other weights of some matrices of a model, as `(out_features, in_features)`.
Changed = Callable[[], Iterable[tuple[Target, Tensor]]]
_Key = TypeVar("_Key", bound=Hashable)

logger = logging.getLogger("harness")


@dataclass(frozen=True)
class Scored:
    """The scores of one run on one split, by name without the split; a score that does not exist is absent."""

    saved: SavedRun
    split: str
    num_examples: int
    scores: dict[str, float]


def evaluate(
    runs: Sequence[SavedRun], *, splits: Sequence[str], own_data: bool, folder: Path | None = None
) -> list[Scored]:
    """Scores each run on each split; what was predicted or generated is written below `folder`.

    Args:
        runs: with the dataset in their configs that they are to be scored on.
        splits: of that dataset.
        own_data: whether it is the one that the run was trained on, which must then be unchanged.
        folder: `<run_id>/predictions/<split>.parquet` and `<run_id>/generations/` are written there, in the form of
            the run's own.

    Raises:
        ConfigError: for a dataset that a run has no labels for, or whose content has changed since.
        ModelError, DataError, LoRAError, PeftMethodError: as training raises them.
    """
    if own_data:
        require_own_content(runs)
    scored: dict[tuple[str, str], Scored] = {}
    for group in by_base(runs):
        base = Base(group[0])
        datasets: dict[str, TaskData] = {}
        for saved in group:
            key = str(to_dict(saved.config)["dataset"])
            if key not in datasets:
                datasets[key] = load_own_data(base, saved.config, splits)
            _require_labels(saved, datasets[key])
            for split, found in _evaluate_one(base, saved, datasets[key], splits, folder).items():
                scored[saved.run_id, split] = found
                if own_data and split != "train":  # of train, a run records the last steps' loss alone
                    _compare(found)
        del base  # before the next one is loaded
    return [scored[saved.run_id, split] for saved in runs for split in splits]


def evaluate_changed(
    saved: SavedRun, changes: Mapping[_Key, Changed], *, splits: Sequence[str]
) -> dict[_Key, dict[str, Scored]]:
    """Scores a run on its own data with other weights in some of its matrices, by the name of the change and split.

    Args:
        saved: the run; what it trained is merged into its base before anything is changed.
        changes: for each name the matrices that are others, made when they are needed.
        splits: of the run's own data.

    Raises:
        ConfigError: data that have changed since, or a method that cannot be merged.
        ModelError, DataError, LoRAError, PeftMethodError: as training raises them.
    """
    require_own_content([saved])
    # In a sweep it had its worker's share of the cores; here are others, and nothing to compare to the last digit.
    saved = replace(saved, config=replace(saved.config, num_threads=None))
    base = Base(saved)
    data = load_own_data(base, saved.config, splits)

    def put_in(weights: Changed, model: PreTrainedModel) -> None:
        merge_in(model, saved.config)
        for target, weight in weights():
            set_weight(model, target, weight)

    return {
        name: _evaluate_one(base, saved, data, splits, None, change=partial(put_in, weights))
        for name, weights in changes.items()
    }


def origin_of_scores(saved: SavedRun) -> str | None:
    """All that scores of a run's weights follow from, as text: weights, base, data, device, code and versions.

    None where that is not known: of code that is in no commit, and of a run that recorded no content.
    """
    on_gpu = torch.cuda.is_available() and computes_on_gpu(saved.config.device)
    facts = environment("cuda" if on_gpu else "cpu")
    if facts.get("git_dirty") is not False or saved.content is None:
        return None
    files = sorted(path for path in saved.weights_dir.rglob("*") if path.is_file())
    weights = {str(path.relative_to(saved.weights_dir)): file_digest(path) for path in files}
    made_by = {name: facts.get(name) for name in MADE_BY}
    base = base_key(saved, untrained=True)
    return json.dumps([saved.run_id, weights, base, saved.content, made_by], sort_keys=True)


def require_own_content(runs: Sequence[SavedRun]) -> None:
    """Raises `ConfigError` where the data of a run are other ones now, with one sentence for each run."""
    problems = []
    for saved in runs:
        found = find_content(saved.config)
        changed = [
            name
            for name in sorted({*found, *(saved.content or {})})
            if name.startswith("dataset.") and saved.content is not None and saved.content.get(name) != found.get(name)
        ]
        if changed:
            problems.append(
                f"{saved.run_id}: {', '.join(changed)}: changed since the run, so its own data are not there any more; "
                "put them back, or name what is to be scored (dataset=NAME, or dataset.test_file=FILE)."
            )
    if problems:
        raise ConfigError(problems)


def load_own_data(base: Base, config: RunConfig, splits: Sequence[str]) -> TaskData:
    """The data of a config, of which these splits will be used; what the model cannot read is refused."""
    too_long = length_problems(config, configs.max_tokens(base.model_config, base.tokenizer))
    if too_long:
        raise ConfigError(too_long)
    data = find_family(config.dataset.task).load(config.dataset, base.tokenizer)
    batches = (
        batch.inputs["input_ids"]
        for split in splits
        for batch in getattr(data, split).batches(config.trainer.eval_batch_size)
    )
    check_vocabulary(base.model_config, base.base.model, base.tokenizer, batches)
    return data


def _require_labels(saved: SavedRun, data: TaskData) -> None:
    """Raises `ConfigError` where the classes of a dataset are not those of the run's head, in their order."""
    if saved.label_names == data.label_names:
        return
    raise ConfigError(
        [
            f"{saved.run_id}: dataset={saved.config.dataset.name} has the classes {_named(data.label_names)}, and the "
            f"run was trained on {_named(saved.label_names)}; give rows with the run's labels. To score a file that "
            "lacks some of them, keep the run's training rows: dataset.test_file=FILE alone."
        ]
    )


def _named(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")


def _evaluate_one(
    base: Base,
    saved: SavedRun,
    data: TaskData,
    splits: Sequence[str],
    folder: Path | None,
    *,
    change: Callable[[PreTrainedModel], None] | None = None,
) -> dict[str, Scored]:
    config = replace(saved.config, save_predictions=folder is not None)
    own_folder = None if folder is None else folder / saved.run_id
    set_threads(config)
    accelerator = build_accelerator(config)
    objective = find_family(config.dataset.task).build_objective(config, data, {}, StopRequest())
    found = {}
    with base.holding(saved, accelerator) as model, accelerator.autocast():
        if change is not None:
            change(model)
        for name in splits:
            split = getattr(data, name)
            evaluation = objective.evaluate_split(model, split)
            if own_folder is not None and evaluation.logits is not None:
                path = own_folder / PREDICTIONS_DIR / f"{name}.parquet"
                write_predictions(path, split, evaluation.logits, data.label_names)
            scores = evaluation.scores
            if name == "test" and change is None:  # texts take most of the time
                scores = scores | _score_generations(base, model, config, split, own_folder)
            found[name] = Scored(saved, name, len(split), scores)
            logger.info("%s: %s scored, %d examples", saved.run_id, name, len(split))
    return found


def _score_generations(
    base: Base, model: PreTrainedModel, config: RunConfig, split: Any, folder: Path | None
) -> dict[str, float]:
    """Scores of texts generated from the prompts of test, where the dataset has such scores."""
    wanted = wanted_generation_metrics(config)
    if not wanted:
        return {}
    prompts = split.prompts()[: config.dataset.generation.num_examples]
    texts = generate(model, prompts, config.dataset.generation, base.tokenizer)
    if folder is not None:
        keep_generations(folder / GENERATIONS_DIR, prompts, texts)
    return score_texts(texts, [prompt.references for prompt in prompts], wanted).values


def _compare(found: Scored) -> None:
    """Says where scores on a run's own val or test differ from those of its result."""
    recorded = found.saved.result.metrics
    differing = [
        f"{name} {value!r} and not {recorded[f'{found.split}_{name}']!r}"
        for name, value in found.scores.items()
        if recorded.get(f"{found.split}_{name}", value) != value
    ]
    if differing:
        logger.warning(
            "%s: on its own %s the scores differ from those of result.json (%s): another device, version of PyTorch, "
            "batch size or number of threads or processes than that of the run, or weights kept as a difference",
            found.saved.run_id,
            found.split,
            ", ".join(differing),
        )


# ---------------------------------------------------------------- tables


def rows(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """A row for each run and split: which run it is, and its scores unrounded; what does not exist is None."""
    names = list(dict.fromkeys(name for each in scored for name in each.scores))
    return [
        {
            **_described(each.saved),
            "dataset": each.saved.config.dataset.name,
            "split": each.split,
            "examples": each.num_examples,
            **{name: each.scores.get(name) for name in names},
        }
        for each in scored
    ]


def _described(saved: SavedRun) -> dict[str, Any]:
    config = saved.config
    kind = METHODS[config.method.name].peft
    own_rank = config.method.peft.get(kind.rank) if kind is not None and kind.rank is not None else None
    return {
        "run_id": saved.run_id,
        "method": config.method.name,
        "rank": own_rank if config.rank is None else config.rank.rank,
        "target_layers": None if config.target_layers is None else config.target_layers.name,
        "seed": config.seed,
    }


def write_scores(path: Path, scored: Sequence[Scored]) -> None:
    """Writes the rows as CSV."""
    table = rows(scored)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_atomically(path, text.getvalue().encode())


def as_text(scored: Sequence[Scored]) -> str:
    """The rows as a table of aligned columns."""
    table = rows(scored)
    shown = [list(table[0]), *([_shown(name, value) for name, value in row.items()] for row in table)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in shown)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name not in SCORES:
        return str(value)
    metric = SCORES[name].metric
    return format(value / metric.display_divisor, metric.format)


def require_task(run: Mapping[str, Any], dataset: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where a dataset has another kind of task than the run that is to be scored on it."""
    had, has = run["dataset"]["task"], dataset.get("task", Task.classification)
    known = {str(task): task for task in Task}  # what is no task, the schema refuses
    if had != has and {had, has} <= known.keys() and not (known[had].is_language and known[has].is_language):
        raise ConfigError([f"dataset.task={has}: the run was trained for {had}; give a dataset of that task."])
