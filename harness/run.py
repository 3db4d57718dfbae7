"""One run, from a validated config to `result.json`: the only place that wires the modules together."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from harness import lora, models
from harness.assets import AssetError
from harness.checkpoint import write_in_its_place
from harness.claims import Claim, ClaimLostError
from harness.config import (
    GENERATION_METRICS,
    Blocks,
    ConfigError,
    Device,
    Method,
    Precision,
    RunConfig,
    Task,
    to_dict,
)
from harness.content import ContentError, ModelError, base_model, require_content
from harness.cores import available_cores
from harness.data import Batch, Split, TextData, TrainingBatches, load_data
from harness.evaluate import Evaluation, SequenceObjective, SummedLoss
from harness.flops import FlopsError, StepFlops, formula_flops
from harness.folder import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    GENERATIONS_DIR,
    LOG_FILE,
    SAVING_DIR,
    WEIGHTS_DIRS,
    Attempt,
    OutputError,
    attempt_dir,
    kept_result,
    require_writable,
    run_dir,
    settle,
)
from harness.identity import Identity, PlannedRun, identify
from harness.journal import FollowingJournal, RunJournal
from harness.language import LanguageObjective, generate, makes_whole_logits, num_cut_prompts
from harness.language_data import LanguageData, TokenSplit, load_language_data
from harness.ledger import Spending
from harness.measure import (
    DeviceBusyError,
    environment,
    is_out_of_memory,
    require_free_device,
)
from harness.parallel import Companions, ProcessFailedError, place, summed
from harness.placement import PlacementError, head_modules, select_modules
from harness.preparation import PreparationError, preparation_of_a_run
from harness.results import RunResult, Status, write_atomically, write_json_atomically
from harness.scores import score_texts, write_texts
from harness.sources import DataError
from harness.stopping import PreemptedError, StopRequest
from harness.tracking import open_tracker
from harness.trainer import TrainingDivergedError, TrainingOutcome, train

logger = logging.getLogger("harness")

LABELS_FILE = "labels.json"
# What of the environment a run may find changed when it resumes; the result then lists all.
MADE_BY = ("git_commit", "git_dirty", "versions", "device_name")


# What a user can mend: each ends a run before training, with its message and no traceback.
USER_ERRORS = (
    ConfigError,
    PlacementError,
    lora.LoRAError,
    ModelError,
    DataError,
    ContentError,
    AssetError,
    DeviceBusyError,
    OutputError,
    PreparationError,
    ProcessFailedError,
)


@dataclass
class PreparedRun:
    """Everything that training needs, built and checked."""

    config: RunConfig
    identity: Identity
    accelerator: Accelerator
    data: TextData | LanguageData
    also: dict[str, LanguageData]
    model: models.PreTrainedModel
    tokenizer: models.PreTrainedTokenizerBase
    head: tuple[str, ...]
    target_modules: list[str]
    environment: dict[str, object]
    base: models.BaseModel
    companions: Companions


@dataclass(frozen=True)
class Plan:
    """What a config comes to on its model, known without loading a weight."""

    target_modules: list[str]
    num_adapter_params: int


def plan(config: RunConfig) -> Plan:
    """Resolves the placement and counts the adapter on the meta device.

    Raises `PlacementError`, `LoRAError` or `ModelError` for a placement or rank that the model does not allow.
    """
    is_language = config.dataset.task.is_language
    skeleton = models.build_skeleton(base_model(config), num_labels=None if is_language else 2)
    _require_packing(skeleton.config.model_type, config)
    head = head_modules(skeleton.config.model_type, language_model=is_language)
    target_modules = _adapt(skeleton, config, head)
    counts = lora.count_parameters(skeleton, head)
    return Plan(target_modules, counts.num_adapter_params)


def run(config: RunConfig, identity: Identity | None = None) -> RunResult:
    """Runs one config and returns its result, which lies in `<runs_dir>/<run_id>/result.json`.

    `identity` is what the run was planned as; without it, it is determined here. A run that has a result already (see
    `kept_result`) is not made again; one that left a checkpoint goes on from it.
    A run that diverges, exhausts the memory or fails in training returns a result that says so. Where an earlier result
    stands (`rerun=all`), a failure is returned and that result stays in the folder.

    Raises:
        PreemptedError: SIGTERM came; the checkpoint is written, and there is no result.
        RunClaimedError: another process is computing this run.
        ClaimLostError: another process took the run over from this one, and its result is what counts.
        One of `USER_ERRORS`, with nothing written, for what can be known before training.
    """
    started = time.perf_counter()
    planned = PlannedRun(config, identity or identify(config))
    folder = run_dir(planned)
    kept = kept_result(planned)
    if kept is not None:
        logger.info("%s: %s already; rerun=all makes it again", kept.run_id, kept.status)
        return kept
    require_writable(config.runs_dir)
    stop = StopRequest()
    with stop.signals():
        with stop.interrupting("loading"), preparation_of_a_run() as preparation:
            prepared = prepare(config, planned.identity)
        stop.share(prepared.accelerator)
        spending = Spending(started, prepared.accelerator.device, preparation)
        with prepared.companions.together(shared=(PreemptedError,)):
            if not prepared.accelerator.is_main_process:
                return _follow(prepared, folder, stop, spending)
            # Only now, when nothing is left to go wrong before training, does the run leave a trace.
            with Claim.acquire(folder) as claim:
                # Whoever had the claim before may have ended the run while this process prepared.
                settle(folder)
                kept = kept_result(planned)
                summed([kept is not None], prepared.accelerator)  # which the others ask for
                if kept is None:
                    attempt = Attempt.begin(planned, claim)
                    with _logged_to(folder / LOG_FILE):
                        kept = _run_claimed(prepared, attempt, stop, spending)
                    attempt.end()
                claim.release(ended=True)
    return kept


def _follow(prepared: PreparedRun, folder: Path, stop: StopRequest, spending: Spending) -> RunResult:
    """What the processes beside the main one do: the same training, and nothing written."""
    if any(summed([False], prepared.accelerator)):  # the main process has found a result
        kept = kept_result(PlannedRun(prepared.config, prepared.identity))
        assert kept is not None
        return kept
    prepared.accelerator.wait_for_everyone()
    directory = attempt_dir(folder)
    journal = FollowingJournal(directory, stop, spending, made_from=_made_from(prepared))
    prepared.accelerator.wait_for_everyone()  # the main process writes only after this one has read
    return _train_and_evaluate(prepared, directory, journal, stop, spending)


def _run_claimed(prepared: PreparedRun, attempt: Attempt, stop: StopRequest, spending: Spending) -> RunResult:
    config = prepared.config
    (attempt.dir / CONFIG_FILE).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    logger.info("%s", prepared.identity.run_id)
    for kind in ("data_notes", "model_notes"):
        for note in cast(list[str], prepared.environment.get(kind, [])):
            logger.warning("%s", note)
    tracker = open_tracker(
        config.tracking,
        run_dir=attempt.dir,
        run_id=prepared.identity.run_id,
        cell_id=prepared.identity.cell_id,
        job_type=str(config.method.name),
        sweep=config.sweep,
        run_config=to_dict(config),
    )
    made_by = {name: value for name, value in prepared.environment.items() if name in MADE_BY}
    journal = RunJournal(config, attempt, tracker, stop, spending, made_from=_made_from(prepared), made_by=made_by)
    prepared.accelerator.wait_for_everyone()  # whatever an earlier attempt left is cleared
    prepared.accelerator.wait_for_everyone()  # and the others have read what is resumed
    try:
        result = _train_and_evaluate(prepared, attempt.dir, journal, stop, spending)
        is_recorded = attempt.record(result)
        try:
            tracker.finish(result)
        except Exception:  # the result is on disk; what happens to its mirror cannot change that
            logger.warning("tracking did not end properly: %s", traceback.format_exc())
    finally:
        journal.close()
        tracker.close()
    logger.info("%s: %s %s", result.run_id, result.status, result.error or _headline(config, result))
    if not is_recorded:
        logger.warning("%s: the earlier result stands, a failure does not replace it", result.run_id)
    return result


def _made_from(prepared: PreparedRun) -> dict[str, Any]:
    """What a checkpoint must have been made from to be of use to this run, each under its name in a message."""
    return {
        "settings or content (run id)": prepared.identity.run_id,
        "data": prepared.data.fingerprint,
        "numbers of training examples": len(prepared.data.train),
    }


def prepare(config: RunConfig, identity: Identity | None = None) -> PreparedRun:
    """Loads data and model, applies the method, and checks everything that can be checked before training.

    What was loaded is what `identity` stands for: files that were edited in between raise `ContentError`.
    """
    identity = identity or identify(config)
    # PyTorch's own choice knows nothing of a container's quota.
    torch.set_num_threads(config.num_threads or min(torch.get_num_threads(), available_cores()))
    accelerator = _accelerator(config)
    companions = Companions(accelerator, identity.run_id)
    try:
        return _prepare(config, identity, accelerator, companions)
    except Exception as error:
        companions.report(error)  # the others find it where they meet
        raise


def _prepare(config: RunConfig, identity: Identity, accelerator: Accelerator, companions: Companions) -> PreparedRun:
    if not config.allow_busy_device:
        require_free_device(accelerator.device)
    base = base_model(config)
    tokenizer = models.load_tokenizer(base)
    max_tokens = models.max_tokens(base, tokenizer)
    named = {"dataset": config.dataset} | {f"evaluate_also.{name}": also for name, also in config.evaluate_also.items()}
    too_long = [
        f"{setting}.max_length={dataset.max_length}: {config.model.name} reads at most {max_tokens} tokens."
        for setting, dataset in named.items()
        if dataset.max_length > max_tokens
    ]
    if _generated(config) and config.dataset.generation.max_new_tokens >= max_tokens:
        too_long.append(
            f"dataset.generation.max_new_tokens={config.dataset.generation.max_new_tokens}: {config.model.name} reads "
            f"at most {max_tokens} tokens, prompt and text together."
        )
    if too_long:
        raise ConfigError(too_long)
    data: TextData | LanguageData
    if config.dataset.task.is_language:
        data = load_language_data(config.dataset, tokenizer)
        num_labels = None
    else:
        data = load_data(config.dataset, tokenizer)
        num_labels = data.num_labels
    also = {name: load_language_data(dataset, tokenizer) for name, dataset in config.evaluate_also.items()}
    loaded = models.load_model(base, num_labels=num_labels, pad_token_id=tokenizer.pad_token_id, seed=config.seed)
    model = loaded.model
    splits = [split for found in (data, *also.values()) for split in (found.train, found.val, found.test)]
    used = (batch.inputs["input_ids"] for split in splits for batch in split.batches(config.trainer.eval_batch_size))
    models.check_vocabulary(base, model, tokenizer, used)
    _require_packing(model.config.model_type, config)
    target_modules = _adapt(model, config, loaded.head)
    if config.trainer.gradient_checkpointing:
        models.checkpoint_activations(model)
    # After everything is read, so that an edit while it was read is seen too.
    require_content(config, identity.content)
    recorded = environment(accelerator.device, num_threads=config.num_threads)
    recorded["data_fingerprint"] = data.fingerprint
    recorded["content"] = identity.content
    if accelerator.num_processes > 1:
        recorded |= {"num_processes": accelerator.num_processes, "shard_model": config.shard_model}
    notes = [note for found in (data, *also.values()) for note in found.notes]
    if isinstance(data, LanguageData) and _generated(config):
        num_cut = num_cut_prompts(model, data.test.prompts(), config.dataset.generation)
        if num_cut:
            notes.append(f"dataset={config.dataset.name}: {num_cut} test prompts lose their beginning in generation.")
    if notes:
        recorded["data_notes"] = notes
    if isinstance(data, TextData) and data.positive_class is not None and "f1" in config.dataset.metrics:
        recorded["positive_label"] = data.label_names[data.positive_class]
    if loaded.notes:
        recorded["model_notes"] = loaded.notes
    if _label_names(data):
        recorded["label_names"] = _label_names(data)
    return PreparedRun(
        config,
        identity,
        accelerator,
        data,
        also,
        model,
        tokenizer,
        loaded.head,
        target_modules,
        recorded,
        loaded,
        companions,
    )


def _require_packing(model_type: str, config: RunConfig) -> None:
    for setting, dataset in (("dataset", config.dataset), *config.evaluate_also.items()):
        isolated = dataset.blocks is Blocks.packed and not dataset.attend_across_documents
        # Flash attention reads packing from positions only in batches of one.
        packs = model_type in models.PACKS_BY_POSITIONS and config.model.attention in ("sdpa", "eager")
        if dataset.task is Task.causal_lm and isolated and not packs:
            raise ConfigError(
                [
                    f"{setting}.blocks=packed: a {model_type} model with model.attention={config.model.attention} "
                    f"would attend across documents; set model.attention=sdpa where the model allows packing, "
                    f"{setting}.blocks=cut, or say that it may with {setting}.attend_across_documents=true."
                ]
            )


def _adapt(model: models.PreTrainedModel, config: RunConfig, head: tuple[str, ...]) -> list[str]:
    """Applies the method to a model, real or meta, whose head is `head`; returns the adapted modules."""
    target_modules: list[str] = []
    if config.method.name is Method.lora:
        assert config.rank is not None and config.target_layers is not None
        target_modules = select_modules(
            [name for name, _ in model.named_modules()],
            model_type=model.config.model_type,
            projections=config.target_layers.projections,
            blocks=config.target_layers.blocks,
            modules=config.target_layers.modules,
            language_model=config.dataset.task.is_language,
            head=head,
        )
        # A generator of its own: the adapter depends on the seed and not on what was drawn before it.
        lora.apply_lora(
            model,
            target_modules,
            rank=config.rank,
            dropout=config.method.adapter_dropout,
            generator=torch.Generator().manual_seed(config.seed),
        )
    lora.set_trainable(model, config.method.name, head)
    return target_modules


def _train_and_evaluate(
    prepared: PreparedRun,
    directory: Path,
    journal: RunJournal | FollowingJournal,
    stop: StopRequest,
    spending: Spending,
) -> RunResult:
    """Trains, scores, saves; whatever happens to training becomes a status. What an earlier attempt did is resumed."""
    config = prepared.config
    metrics: dict[str, float] = asdict(_counts(prepared))
    status, error = Status.FINISHED, ""
    started_at = time.time()
    try:
        objective = _objective(prepared, stop)
        place(prepared.model, prepared.accelerator, shard_model=config.shard_model)
        before = _score_before(prepared, objective, journal)
        metrics |= before
        outcome = _train(prepared, objective, journal)
        spending.end_training()
        metrics |= outcome.measured
        with prepared.accelerator.autocast():
            metrics |= _score_test(prepared, objective, journal, outcome, before)
        stop.check("saving")
        prepared.companions.check()
        if config.save_weights:
            metrics["checkpoint_bytes"] = journal.once("save", lambda: _save(prepared, directory))
        with prepared.accelerator.autocast():
            metrics |= _score_generations(prepared, directory, journal, stop)
    except (PreemptedError, ClaimLostError):
        raise
    except TrainingDivergedError as problem:
        status, error = Status.DIVERGED, str(problem)
    except Exception as problem:
        status = Status.OUT_OF_MEMORY if is_out_of_memory(problem) else Status.FAILED
        error = f"{type(problem).__name__}: {problem}"
        cause = prepared.companions.report(problem, status=status)
        if cause is not None:
            status, error = Status(cause.status), f"process {cause.process}: {cause.error}"
        logger.error("%s", traceback.format_exc())
    metrics = journal.measured | metrics
    metrics |= spending.total()
    times = {"started_at": started_at, "first_step_at": journal.first_step_at, "ended_at": time.time()}
    recorded: dict[str, Any] = {name: value for name, value in times.items() if value is not None}
    if len(journal.made_by) > 1:
        recorded["made_by"] = journal.made_by
    return RunResult(
        run_id=prepared.identity.run_id,
        cell_id=prepared.identity.cell_id,
        sweep=config.sweep,
        status=status,
        error=error,
        config=to_dict(config),
        target_modules=prepared.target_modules,
        metrics=metrics,
        environment=prepared.environment | recorded,
    )


def _train(prepared: PreparedRun, objective: _Objective, journal: RunJournal | FollowingJournal) -> TrainingOutcome:
    config = prepared.config
    batches = TrainingBatches(
        prepared.data.train,
        batch_size=config.trainer.batch_size,
        micro_batch_size=config.trainer.micro_batch_size,
        seed=config.seed,
        process_index=prepared.accelerator.process_index,
        num_processes=prepared.accelerator.num_processes,
    )
    # After everything is built, so that dropout draws the same numbers whatever the method drew before; and other ones
    # in each process.
    torch.manual_seed(config.seed + prepared.accelerator.process_index)
    return train(
        prepared.model,
        batches,
        objective,
        config=config.trainer,
        accelerator=prepared.accelerator,
        journal=journal,
        flops=_step_flops(prepared),
    )


def _step_flops(prepared: PreparedRun) -> StepFlops | None:
    try:
        whole_logits = prepared.config.dataset.task.is_language and makes_whole_logits(
            prepared.model, prepared.config.trainer.loss_chunk_tokens
        )
        return formula_flops(prepared.model, whole_logits=whole_logits)
    except FlopsError as reason:
        logger.info("train_flops is not recorded: %s", reason)
        return None


def _counts(prepared: PreparedRun) -> lora.ParameterCounts:
    """From shapes: a quantised weight has fewer entries than its matrix, so its model is counted as it was before."""
    if not getattr(prepared.model, "is_quantized", False):
        return lora.count_parameters(prepared.model, prepared.head)
    config = prepared.config
    num_labels = None if config.dataset.task.is_language else prepared.model.config.num_labels
    skeleton = models.build_skeleton(base_model(config), num_labels=num_labels)
    _adapt(skeleton, config, prepared.head)
    return lora.count_parameters(skeleton, prepared.head)


class _Objective(Protocol):
    """An objective that scores any split."""

    loss_name: str

    def summed_loss(self, model: nn.Module, batch: Batch) -> SummedLoss: ...

    def evaluate(self, model: nn.Module) -> Evaluation: ...

    def rehearse(self, model: nn.Module) -> None: ...

    def evaluate_split(self, model: nn.Module, split: Any) -> Evaluation: ...


def _objective(prepared: PreparedRun, stop: StopRequest) -> _Objective:
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


def _score_before(
    prepared: PreparedRun, objective: _Objective, journal: RunJournal | FollowingJournal
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


def _score_test(
    prepared: PreparedRun,
    objective: _Objective,
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


def _generated(config: RunConfig) -> list[str]:
    """The wanted scores of generated texts."""
    return [name for name in config.dataset.metrics if name in GENERATION_METRICS]


def _score_generations(
    prepared: PreparedRun, folder: Path, journal: RunJournal | FollowingJournal, stop: StopRequest
) -> dict[str, float]:
    """Generates from the test split's prompts at the best step, keeps the texts and scores them."""
    config, data = prepared.config.dataset, prepared.data
    wanted = _generated(prepared.config)
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
    write_atomically(folder / GENERATIONS_DIR / "generations.jsonl", lines.encode())
    write_texts(folder / GENERATIONS_DIR, texts, references)
    scored = score_texts(texts, references, wanted)
    prepared.environment["generation_signatures"] = scored.signatures
    return {f"test_{name}": value for name, value in scored.values.items()}


def _save(prepared: PreparedRun, folder: Path) -> int:
    """Saves what the method trained, at the best step; returns the bytes of the tensor files."""
    name = WEIGHTS_DIRS[prepared.config.method.name]
    if not prepared.accelerator.is_main_process:  # sharded weights are gathered by all processes, and kept by one
        with tempfile.TemporaryDirectory() as elsewhere:
            return _save_weights(prepared, Path(elsewhere) / name)

    def save() -> int:
        try:
            num_bytes = _save_weights(prepared, folder / SAVING_DIR / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / SAVING_DIR / name).rename(folder / name)
            return num_bytes
        finally:
            shutil.rmtree(folder / SAVING_DIR, ignore_errors=True)

    # A second try would have to be one of all processes.
    is_alone = prepared.accelerator.num_processes == 1
    return write_in_its_place(folder / CHECKPOINT_FILE, save) if is_alone else save()


def _save_weights(prepared: PreparedRun, directory: Path) -> int:
    config, label_names = prepared.config, _label_names(prepared.data)
    if config.method.name is Method.full:
        return models.save_model(
            prepared.model,
            prepared.tokenizer,
            directory,
            own_settings=prepared.base.own_settings,
            label_names=label_names,
        )
    if label_names:
        # As a transformers config has them: neither PEFT's config nor a tensor file has a place for names of classes.
        names = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
        write_json_atomically(directory / LABELS_FILE, names)
    if config.method.name is Method.head_only:
        return lora.save_tensors(lora.head_state(prepared.model, prepared.head), directory / "head.safetensors")
    assert config.rank is not None
    return lora.save_adapter(
        prepared.model,
        directory,
        rank=config.rank,
        head_modules=prepared.head,
        dropout=config.method.adapter_dropout,
        base_model=prepared.base.name,
        revision=prepared.base.revision,
        task_type="CAUSAL_LM" if config.dataset.task.is_language else "SEQ_CLS",
    )


def _label_names(data: TextData | LanguageData) -> list[str]:
    """The classes in the order of the logits; none for regression and language models."""
    return data.label_names if isinstance(data, TextData) else []


def _accelerator(config: RunConfig) -> Accelerator:
    if config.device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError(["device=cuda: PyTorch sees no CUDA device here; use device=auto or device=cpu."])
    if config.device is Device.mps and not torch.backends.mps.is_available():
        raise ConfigError(["device=mps: PyTorch sees no MPS device here; use device=auto or device=cpu."])
    # accelerate keeps one state per process; a second run in this process must not inherit the first one's.
    AcceleratorState._reset_state(reset_partial_state=True)
    on_cpu = config.device is Device.cpu
    will_be_cpu = on_cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    precision = config.trainer.precision
    if precision is Precision.fp16 and will_be_cpu:
        raise ConfigError(["trainer.precision=fp16 needs a GPU; on the CPU use bf16 or fp32."])
    mixed = "no" if precision is Precision.fp32 else str(precision)
    # Not on_cpu: of several processes where there is nothing but a CPU, each would take itself for the only one.
    return Accelerator(cpu=will_be_cpu, mixed_precision=mixed)


@contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """While inside, what the harness logs goes into the file too."""
    handler = logging.FileHandler(path, mode="a", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()


def _headline(config: RunConfig, result: RunResult) -> str:
    best = config.dataset.best_metric
    shown = {name: result.metrics[name] for name in (f"val_{best}", f"test_{best}") if name in result.metrics}
    return "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
