"""Scores before and after training, on earlier tasks, and the texts that a language model generates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.base_scores import BaseLosses
from harness.chain import EarlierTask, with_head
from harness.data.blocks import Prompt
from harness.prepare import PreparedRun, wanted_generation_metrics
from harness.processes.stopping import StopRequest
from harness.results.files import GENERATIONS_DIR, GENERATIONS_FILE, PREDICTIONS_DIR, write_atomically
from harness.results.metrics import METRICS, Direction
from harness.tasks.families import find_family
from harness.tasks.generation import generate
from harness.tasks.generation_scores import score_texts, write_texts
from harness.tasks.objective import Evaluation, Objective
from harness.tasks.predictions import write_predictions
from harness.training.callbacks import VAL_PREDICTIONS, FollowerCallbacks, RunCallbacks
from harness.training.ledger import Spending
from harness.training.loop import TrainingOutcome


def score_before_training(
    prepared: PreparedRun, objective: Objective, callbacks: RunCallbacks | FollowerCallbacks, spending: Spending
) -> dict[str, float]:
    """The nll that a language model begins with: on val, on test, and on the domain that it comes from."""
    if not prepared.family.scores_untrained:
        return {}
    splits = {"val_nll_before": prepared.data.val}
    if prepared.data.test is not None:
        splits["test_nll_before"] = prepared.data.test
    if prepared.also:
        splits["base_domain_nll_before"] = _base_domain(prepared)
    known = BaseLosses(prepared, objective, spending)
    losses = {
        name: callbacks.once(f"score {name}", lambda split=split: known.of(split)) for name, split in splits.items()
    }
    return {name: values["nll"] for name, values in losses.items() if values}


def untrained_scores(
    prepared: PreparedRun, objective: Objective, callbacks: RunCallbacks | FollowerCallbacks, spending: Spending
) -> dict[str, float] | None:
    """The loss on val that a trial's model begins with, where val is scored during training; else None."""
    config = prepared.config
    if not config.trial or not (config.trainer.eval_every or config.trainer.eval_each_epoch):
        return None
    return callbacks.once(
        "score val_nll_before", lambda: BaseLosses(prepared, objective, spending).of(prepared.data.val)
    )


def _base_domain(prepared: PreparedRun) -> Any:
    return next(iter(prepared.also.values())).test


def score_after_training(
    prepared: PreparedRun,
    objective: Objective,
    callbacks: RunCallbacks | FollowerCallbacks,
    outcome: TrainingOutcome,
    before: dict[str, float],
    *,
    folder: Path,
) -> dict[str, float]:
    """Scores of both splits at the last step and at the step that was best on val; the model ends at the best.

    What classifiers and regressions predict at the best step is kept below `folder`.
    """
    callbacks.once(VAL_PREDICTIONS, lambda: _keep_predictions(prepared, folder, "val", outcome.best))
    moment_of_best = "last" if outcome.best_state is None else "best"
    sets: dict[str, Any] = {
        **({"test": prepared.data.test} if prepared.data.test is not None else {}),
        **{f"also {name}": data.test for name, data in prepared.also.items()},
    }

    def evaluate(name: str, moment: str) -> dict[str, float]:
        # By itself: within one context autocast keeps its casts of weights, and the best would be scored as the last.
        with prepared.accelerator.autocast():
            evaluation = objective.evaluate_split(prepared.model, sets[name])
        if name == "test" and moment == moment_of_best:
            _keep_predictions(prepared, folder, name, evaluation)
        return evaluation.scores

    def evaluate_all(moment: str) -> dict[str, dict[str, float]]:
        return {
            name: callbacks.once(f"score {name} {moment}", lambda name=name: evaluate(name, moment)) for name in sets
        }

    last = evaluate_all("last")
    best = last
    if outcome.best_state is not None:
        outcome.restore_best(prepared.model)
        best = evaluate_all("best")
    scores: dict[str, float] = {}
    for split, at_best, at_last in (
        ("val", outcome.best.scores, outcome.last.scores),
        ("test", best.get("test", {}), last.get("test", {})),
    ):
        scores |= {f"{split}_{name}": value for name, value in at_best.items()}
        scores |= {f"{split}_{name}_last": value for name, value in at_last.items()}
    if prepared.also:
        prepared.environment["evaluated_also"] = {name: best[f"also {name}"] for name in prepared.also}
        first = f"also {next(iter(prepared.also))}"
        for suffix, found in (("", best), ("_last", last)):
            if "nll" in found[first] and "base_domain_nll_before" in before:
                nll = found[first]["nll"]
                scores[f"base_domain_nll{suffix}"] = nll
                scores[f"forgetting_nll{suffix}"] = nll - before["base_domain_nll_before"]
    return scores


def _keep_predictions(prepared: PreparedRun, folder: Path, name: str, evaluation: Evaluation) -> int:
    """Writes the predictions of a split where there are any; of how many rows."""
    if not prepared.config.save_predictions or evaluation.logits is None:
        return 0
    if prepared.accelerator.is_main_process:
        split, label_names = getattr(prepared.data, name), prepared.data.label_names
        write_predictions(folder / PREDICTIONS_DIR / f"{name}.parquet", split, evaluation.logits, label_names)
    return len(evaluation.logits)


def score_generations(
    prepared: PreparedRun, folder: Path, callbacks: RunCallbacks | FollowerCallbacks, stop: StopRequest
) -> dict[str, float]:
    """Generates from the test split's prompts at the best step, keeps the texts and scores them."""
    config, data = prepared.config.dataset, prepared.data
    wanted = wanted_generation_metrics(prepared.config)
    if not wanted:
        return {}
    prompts = data.test.prompts()[: config.generation.num_examples]
    texts = generate(prepared.model, prompts, config.generation, prepared.tokenizer, stop=stop, once=callbacks.once)
    if not prepared.accelerator.is_main_process:
        return {}
    keep_generations(folder / GENERATIONS_DIR, prompts, texts)
    scored = score_texts(texts, [prompt.references for prompt in prompts], wanted)
    prepared.environment["generation_signatures"] = scored.signatures
    return {f"test_{name}": value for name, value in scored.values.items()}


def keep_generations(folder: Path, prompts: Sequence[Prompt], texts: Sequence[str]) -> None:
    """Writes the texts with what they were generated from and what they are scored against."""
    rows = [
        {"prompt": prompt.text, "generated": text, "references": prompt.references}
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder / GENERATIONS_FILE, lines.encode())
    write_texts(folder, texts, [prompt.references for prompt in prompts])


def score_earlier_tasks(
    prepared: PreparedRun, callbacks: RunCallbacks | FollowerCallbacks, stop: StopRequest
) -> dict[str, float]:
    """Scores the model at its best step on the tasks before it, each with its own head, and what was forgotten.

    Every score, before and after, is recorded in the environment by dataset. The metrics are means over the tasks of
    each one's own `best_metric` on test; they do not exist where more is not better in all.
    """
    found: dict[str, Any] = {}
    for task in prepared.earlier:
        config = replace(prepared.config, dataset=task.record.dataset, save_predictions=False)
        objective = find_family(task.record.dataset.task).build_objective(config, task.data, {}, stop)
        after: dict[str, float] = {}
        for name in ("val", "test"):
            split = getattr(task.data, name)

            def evaluate(task: EarlierTask = task, objective: Any = objective, split: Any = split) -> dict[str, float]:
                with with_head(prepared.model, task.head), prepared.accelerator.autocast():
                    return objective.evaluate_split(prepared.model, split).scores

            scores = callbacks.once(f"score earlier {task.name} {name}", evaluate)
            after |= {f"{name}_{score}": value for score, value in scores.items()}
        found[task.name] = {
            "run_id": task.record.run_id,
            "metric": task.record.dataset.best_metric,
            "before": task.record.scores,
            "after": after,
        }
    if not found:
        return {}
    prepared.environment["earlier_tasks"] = found
    names = {task: f"test_{each['metric']}" for task, each in found.items()}
    if any(METRICS[name].direction is not Direction.HIGHER for name in names.values()):
        return {}
    pairs = [(each["before"].get(names[task]), each["after"].get(names[task])) for task, each in found.items()]
    if any(value is None for pair in pairs for value in pair):
        return {}
    before, after_all = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return {
        "earlier_tasks_score_before": before,
        "earlier_tasks_score": after_all,
        "forgetting_score": before - after_all,
    }
