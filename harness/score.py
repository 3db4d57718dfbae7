"""Scores before and after training, and the texts that a language model generates."""

from __future__ import annotations

import json
from pathlib import Path

from harness.data.blocks import TokenSplit
from harness.data.labelled import Split
from harness.data.language import LanguageData
from harness.prepare import PreparedRun, wanted_generation_metrics
from harness.processes.stopping import StopRequest
from harness.results.files import GENERATIONS_DIR, GENERATIONS_FILE, write_atomically
from harness.tasks.generation import generate
from harness.tasks.generation_scores import score_texts, write_texts
from harness.tasks.labelled import SequenceObjective
from harness.tasks.language import LanguageObjective
from harness.tasks.objective import Objective
from harness.training.callbacks import FollowingJournal, RunJournal
from harness.training.loop import TrainingOutcome


def build_objective(prepared: PreparedRun, stop: StopRequest) -> Objective:
    """The objective of the run's task, which also scores its other splits."""
    config = prepared.config
    if isinstance(prepared.data, LanguageData):
        return LanguageObjective(
            val=prepared.data.val,
            others=[prepared.data.test, *(data.test for data in prepared.also.values())],
            eval_batch_size=config.trainer.eval_batch_size,
            chunk_tokens=config.trainer.loss_chunk_tokens,
            label_smoothing=config.trainer.label_smoothing,
            stop=stop,
        )
    return SequenceObjective(
        config.dataset,
        val=prepared.data.val,
        others=[prepared.data.test],
        positive_class=prepared.data.positive_class,
        eval_batch_size=config.trainer.eval_batch_size,
        label_smoothing=config.trainer.label_smoothing,
        stop=stop,
    )


def score_before_training(
    prepared: PreparedRun, objective: Objective, journal: RunJournal | FollowingJournal
) -> dict[str, float]:
    """The nll that a language model begins with: on val, on test, and on the domain that it comes from."""
    if not isinstance(prepared.data, LanguageData):
        return {}
    model = prepared.model
    splits = {"val_nll_before": prepared.data.val, "test_nll_before": prepared.data.test}
    if prepared.also:
        splits["base_domain_nll_before"] = _base_domain(prepared)
    with prepared.accelerator.autocast():
        scores = {
            name: journal.once(f"score {name}", lambda split=split: objective.evaluate_split(model, split).scores)
            for name, split in splits.items()
        }
    return {name: values["nll"] for name, values in scores.items() if values}


def _base_domain(prepared: PreparedRun) -> TokenSplit:
    return next(iter(prepared.also.values())).test


def score_after_training(
    prepared: PreparedRun,
    objective: Objective,
    journal: RunJournal | FollowingJournal,
    outcome: TrainingOutcome,
    before: dict[str, float],
) -> dict[str, float]:
    """Scores of both splits at the last step and at the step that was best on val; the model ends at the best."""
    sets: dict[str, Split | TokenSplit] = {
        "test": prepared.data.test,
        **{f"also {name}": data.test for name, data in prepared.also.items()},
    }

    def evaluate_all(moment: str) -> dict[str, dict[str, float]]:
        return {
            name: journal.once(
                f"score {name} {moment}",
                lambda split=split: objective.evaluate_split(prepared.model, split).scores,
            )
            for name, split in sets.items()
        }

    last = evaluate_all("last")
    best = last
    if outcome.best_state is not None:
        outcome.restore_best(prepared.model)
        best = evaluate_all("best")
    scores: dict[str, float] = {}
    for split, at_best, at_last in (
        ("val", outcome.best.scores, outcome.last.scores),
        ("test", best["test"], last["test"]),
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


def score_generations(
    prepared: PreparedRun, folder: Path, journal: RunJournal | FollowingJournal, stop: StopRequest
) -> dict[str, float]:
    """Generates from the test split's prompts at the best step, keeps the texts and scores them."""
    config, data = prepared.config.dataset, prepared.data
    wanted = wanted_generation_metrics(prepared.config)
    if not wanted or not isinstance(data, LanguageData):
        return {}
    prompts = data.test.prompts()[: config.generation.num_examples]
    texts = generate(prepared.model, prompts, config.generation, prepared.tokenizer, stop=stop, once=journal.once)
    if not prepared.accelerator.is_main_process:
        return {}
    references = [prompt.references for prompt in prompts]
    rows = [
        {"prompt": prompt.text, "generated": text, "references": prompt.references}
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder / GENERATIONS_DIR / GENERATIONS_FILE, lines.encode())
    write_texts(folder / GENERATIONS_DIR, texts, references)
    scored = score_texts(texts, references, wanted)
    prepared.environment["generation_signatures"] = scored.signatures
    return {f"test_{name}": value for name, value in scored.values.items()}
