"""The two families of tasks, texts with a label and language models, as the life of a run sees them.

What differs between them is asked of the record here; the run itself knows no task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from harness.config.schema import RunConfig, Task
from harness.data.labelled import load_data
from harness.data.language import load_language_data
from harness.processes.stopping import StopRequest
from harness.tasks.labelled import SequenceObjective
from harness.tasks.language import LanguageObjective
from harness.tasks.objective import Objective


class TaskData(Protocol):
    """A dataset ready for training: its splits, and what has to be known of them.

    `num_labels` are the outputs of a task head, None where the task has none. `label_names` are the classes in the
    order of the logits, empty where there are none; `positive_class` is the one of two of which F1 is the score.
    `notes` says what was left out, truncated or looks wrong, one sentence each. `test` is None for a trial.
    """

    @property
    def train(self) -> Any: ...  # noqa: D102

    @property
    def val(self) -> Any: ...  # noqa: D102

    @property
    def test(self) -> Any: ...  # noqa: D102

    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    @property
    def notes(self) -> list[str]: ...  # noqa: D102

    @property
    def num_labels(self) -> int | None: ...  # noqa: D102

    @property
    def label_names(self) -> list[str]: ...  # noqa: D102

    @property
    def positive_class(self) -> int | None: ...  # noqa: D102


BuildObjective = Callable[[RunConfig, Any, Mapping[str, Any], StopRequest], Objective]
"""From a config, the data of the run and of `evaluate_also`, and the request to stop."""


@dataclass(frozen=True)
class TaskFamily:
    """How data are read (`with_test=False`: for a trial), and what is learned from them.

    `scores_untrained`: whether the model has a score before.
    """

    load: Callable[..., TaskData]
    build_objective: BuildObjective
    scores_untrained: bool


def _tests(*loaded: TaskData) -> list[Any]:
    return [data.test for data in loaded if data.test is not None]


def _labelled_objective(config: RunConfig, data: Any, also: Mapping[str, Any], stop: StopRequest) -> Objective:
    return SequenceObjective(
        config.dataset,
        val=data.val,
        others=_tests(data),
        positive_class=data.positive_class,
        eval_batch_size=config.trainer.eval_batch_size,
        label_smoothing=config.trainer.label_smoothing,
        keeps_logits=config.save_predictions,
        stop=stop,
    )


def _language_objective(config: RunConfig, data: Any, also: Mapping[str, Any], stop: StopRequest) -> Objective:
    return LanguageObjective(
        val=data.val,
        others=_tests(data, *also.values()),
        eval_batch_size=config.trainer.eval_batch_size,
        best_metric=config.dataset.best_metric,
        chunk_tokens=config.trainer.loss_chunk_tokens,
        label_smoothing=config.trainer.label_smoothing,
        stop=stop,
    )


_LABELLED = TaskFamily(load_data, _labelled_objective, scores_untrained=False)
_LANGUAGE = TaskFamily(load_language_data, _language_objective, scores_untrained=True)


def find_family(task: Task) -> TaskFamily:
    """The family of a task."""
    return _LANGUAGE if task.is_language else _LABELLED
