"""Everything that can be wrong with a config and be seen without loading anything: all problems at once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any

from harness.config.schema import (
    AlphaPolicy,
    Bias,
    Compile,
    DatasetConfig,
    Dtype,
    GenerationConfig,
    Init,
    ModelConfig,
    Optimizer,
    Precision,
    Quantization,
    RankConfig,
    RunConfig,
    ScratchConfig,
    TargetLayersConfig,
    Task,
    TrainerConfig,
    default_of,
)
from harness.placement.ranks import pattern_problems
from harness.placement.select import block_problems, projection_problems, stack_problems
from harness.results.methods import ANY_PEFT, METHODS, Method
from harness.results.metrics import scores_of
from harness.results.peft_types import PEFT_TYPES


class ConfigError(ValueError):
    """A config that must not be run. `problems` lists everything that is wrong, one sentence or two each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


SHARDED = (Optimizer.adamw, Optimizer.sgd, Optimizer.lion)
"""Optimizers whose every number belongs to one weight, so that they update the parts of a sharded model."""

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def find_problems(config: RunConfig) -> list[str]:
    """Everything that is wrong with a config and can be seen without loading anything; empty when it may be run."""
    return [
        *_model_problems(config.model),
        *_dataset_problems(config.dataset),
        *_language_problems(config),
        *_method_problems(config),
        *_trainer_problems(config.trainer),
        *_dtype_problems(config),
        *_run_problems(config),
        *_unread_problems(config),
    ]


def _unread_problems(config: RunConfig) -> list[str]:
    """Settings that this run would not read, of those that have another value than their default."""
    problems = []
    for name, item, value in _leaves(config):
        where = item.metadata.get("read_where")
        if where is None or value == default_of(item) or where.holds(config):
            continue
        problems.append(
            f"{name}={_shown(value)}: is read {where.words}, and would decide nothing here; set it to "
            f"{_shown(default_of(item))}, its default."
        )
    return problems


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Dotted name, field and value of every setting; those of `evaluate_also` are the presets of datasets, whole."""
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item, value


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _model_problems(model: ModelConfig) -> list[str]:
    problems = _name_problems("model.name", model.name)
    sources = {
        "model.asset": model.asset,
        "model.hub_id": model.hub_id,
        "model.tiny": model.tiny,
        "model.run": model.run,
        "model.scratch": model.scratch,
    }
    given = [name for name, value in sources.items() if value is not None]
    if model.path is None and len(given) != 1:
        problems.append(
            f"model: exactly one of {', '.join(sources)} must be set (or model.path, a local folder), "
            f"got {' and '.join(given) or 'none'}."
        )
    if model.path is None and model.hub_id is not None and model.revision is None:
        problems.append("model.revision: a hub model needs a pinned revision (a commit hash, or main).")
    if not 0 <= model.dropout < 1:
        problems.append(f"model.dropout={model.dropout}: allowed is 0 <= dropout < 1.")
    if model.run is not None and re.fullmatch(r"\w[\w.+-]*", model.run) is None:
        problems.append(f"model.run={model.run!r}: the id of a run, as its folder is called.")
    if model.from_sweep is not None:
        problems += _name_problems("model.from_sweep", model.from_sweep)
        for name in ("adapter", "run", "path"):
            if getattr(model, name) is not None:
                problems.append(
                    f"model.from_sweep={model.from_sweep} and model.{name}={getattr(model, name)} both say where this "
                    "run starts; set one of them to null."
                )
    if model.quantization is not Quantization.none and (model.tiny or model.scratch) and model.path is None:
        problems.append(
            f"model.quantization={model.quantization}: quantises weights as they are read, and random ones are not "
            "read; name saved weights (model.path, run, asset or hub_id)."
        )
    if model.scratch is not None:
        problems += _scratch_problems(model.scratch)
    return problems


def _scratch_problems(scratch: ScratchConfig) -> list[str]:
    problems = []
    for name in ("num_blocks", "width", "num_heads", "max_tokens"):
        if getattr(scratch, name) < 1:
            problems.append(f"model.scratch.{name}={getattr(scratch, name)}: at least 1.")
    if scratch.num_heads > 0 and scratch.width % scratch.num_heads:
        problems.append(
            f"model.scratch.width={scratch.width}: must be a multiple of model.scratch.num_heads={scratch.num_heads}."
        )
    if scratch.vocab_size < 258:
        problems.append(
            f"model.scratch.vocab_size={scratch.vocab_size}: at least 258, the bytes and two special tokens."
        )
    if (scratch.asset is None) == (scratch.path is None):
        problems.append("model.scratch: the vocabulary's text needs either asset or path, a folder with the file.")
    return problems


def _dataset_problems(dataset: DatasetConfig) -> list[str]:
    problems = _name_problems("dataset.name", dataset.name)
    if dataset.asset is None and dataset.hub_id is None and dataset.train_file is None and dataset.path is None:
        problems.append(
            "dataset: no data named. Set dataset.train_file=FILE (CSV, JSON lines or Parquet), "
            "or choose a dataset that names an asset or a hub id."
        )
    if dataset.asset is not None and dataset.hub_id is not None:
        problems.append(f"dataset: asset={dataset.asset} and hub_id={dataset.hub_id} both name data; set one to null.")
    if dataset.task is Task.causal_lm and len(dataset.text_columns) != 1:
        problems.append(f"dataset.text_columns={dataset.text_columns}: task=causal_lm reads one column.")
    elif not 1 <= len(dataset.text_columns) <= 2:
        problems.append(f"dataset.text_columns={dataset.text_columns}: one or two columns are allowed.")
    for name in ("split_seed", "subset_seed"):
        if getattr(dataset, name) < 0:
            problems.append(f"dataset.{name}={getattr(dataset, name)}: at least 0.")
    if dataset.task is Task.completion and f"{{{dataset.target_column}}}" in (dataset.prompt_template or ""):
        problems.append(
            f"dataset.prompt_template={dataset.prompt_template!r}: holds the target column {dataset.target_column} "
            "and would give the answer away."
        )
    if dataset.task is Task.completion and not dataset.prompt_template:
        problems.append(
            "dataset.prompt_template: task=completion needs the text before the target, with columns in braces: "
            "'{question} Answer: '."
        )
    if dataset.positive_label is not None and "f1" not in (*dataset.metrics, dataset.best_metric):
        problems.append(
            f"dataset.positive_label={dataset.positive_label!r}: names the class of the metric f1, which is not among "
            f"dataset.metrics=[{','.join(dataset.metrics)}]; add it there, or set it to null."
        )
    if (dataset.line_separator is None) != (not dataset.line_columns):
        problems.append(
            f"dataset.line_separator={dataset.line_separator!r} and dataset.line_columns={dataset.line_columns}: set "
            "both, or neither."
        )
    allowed = scores_of(dataset.task)
    for name in dict.fromkeys((*dataset.metrics, dataset.best_metric)):
        if name not in allowed:
            problems.append(
                f"dataset.metrics / dataset.best_metric: {name!r} is not a metric of task {dataset.task}; "
                f"allowed: {', '.join(allowed)}."
            )
    if dataset.task.is_language:
        if dataset.best_metric in scores_of(of="generated"):
            problems.append(
                f"dataset.best_metric={dataset.best_metric}: texts are generated once, at the end and on test, so they "
                "cannot choose a step; set dataset.best_metric=nll."
            )
        problems += _generation_problems(dataset.generation)
    always = "mse" if dataset.task is Task.regression else "nll"
    if (
        not dataset.task.is_language
        and dataset.best_metric in allowed
        and dataset.best_metric not in (*dataset.metrics, always)
    ):
        problems.append(
            f"dataset.best_metric={dataset.best_metric}: must be {always} or one of dataset.metrics="
            f"[{','.join(dataset.metrics)}]; add it there."
        )
    for name in ("val_fraction", "test_fraction"):
        value = getattr(dataset, name)
        if not 0 < value < 1:
            problems.append(f"dataset.{name}={value}: allowed is 0 < {name} < 1.")
    if dataset.num_train_examples is not None and dataset.num_train_examples < 2:
        problems.append(f"dataset.num_train_examples={dataset.num_train_examples}: at least 2, or null for all rows.")
    if dataset.num_eval_examples is not None and dataset.num_eval_examples < 1:
        problems.append(f"dataset.num_eval_examples={dataset.num_eval_examples}: at least 1, or null for all rows.")
    if dataset.max_length < 4:
        problems.append(f"dataset.max_length={dataset.max_length}: at least 4 tokens.")
    return problems


def _generation_problems(generation: GenerationConfig) -> list[str]:
    problems = []
    lowest = {"max_new_tokens": 1, "num_beams": 1, "no_repeat_ngram_size": 0, "num_examples": 1, "batch_size": 1}
    for name, least in lowest.items():
        value = getattr(generation, name)
        if value is not None and value < least:
            problems.append(f"dataset.generation.{name}={value}: at least {least}.")
    if not math.isfinite(generation.length_penalty):
        problems.append(f"dataset.generation.length_penalty={generation.length_penalty}: a finite number.")
    return problems


def _language_problems(config: RunConfig) -> list[str]:
    """What a language model excludes, and additional evaluation datasets that cannot be scored."""
    problems = []
    method = METHODS.get(config.method.name)
    if config.dataset.task.is_language and method is not None and method.needs_head:
        problems.append(
            f"method={config.method.name}: a language model (dataset.task={config.dataset.task}) has no task head to "
            "train; use method=lora or method=full."
        )
    for name, dataset in config.evaluate_also.items():
        if not config.dataset.task.is_language or not dataset.task.is_language:
            problems.append(
                f"evaluate_also.{name}: scores language models; dataset.task={config.dataset.task} and "
                f"evaluate_also.{name}.task={dataset.task} must be causal_lm, completion or chat."
            )
        problems += [problem.replace("dataset", f"evaluate_also.{name}", 1) for problem in _dataset_problems(dataset)]
    trains_base = method is not None and (method.trains_base or method.trains_part_of_base)
    if config.model.quantization is not Quantization.none and trains_base:
        problems.append(
            f"model.quantization={config.model.quantization}: quantised weights are frozen; use method=lora, or "
            f"model.quantization=none for method={config.method.name}."
        )
    return problems


def _method_problems(config: RunConfig) -> list[str]:
    name, problems = config.method.name, []
    method = METHODS.get(name)
    if name == ANY_PEFT:
        return [_peft_type_problem(config.method.peft.get("peft_type"))]
    if method is None:
        own = ", ".join(each for each, found in METHODS.items() if found.peft is None)
        of_peft = ", ".join(each for each, found in METHODS.items() if found.peft is not None)
        return [f"method.name={name}: no such method; there are {own}, and of the peft package {of_peft}."]
    if method.peft is not None:
        return _peft_problems(config, method)
    if method.uses_rank and config.rank is None:
        problems.append(f"method={name} needs a rank and has no hidden default: add rank=r8 (r1 to r1024).")
    if method.uses_placement and config.target_layers is None:
        problems.append(f"method={name} needs target layers: add target_layers=qv (q, v, qkvo, mlp, all, ...).")
    if method.uses_rank and not 0 <= config.method.adapter_dropout < 1:
        problems.append(f"method.adapter_dropout={config.method.adapter_dropout}: allowed is 0 <= dropout < 1.")
    for setting, value, is_used in (
        ("rank", config.rank, method.uses_rank),
        ("target_layers", config.target_layers, method.uses_placement),
    ):
        if value is not None and not is_used:
            problems.append(f"method={name} takes no {setting}: leave {setting}=... out, or use method=lora.")
    if not method.uses_rank and config.method.adapter_dropout != 0:
        problems.append(f"method={name} has no adapter: method.adapter_dropout must be 0.")
    if config.rank is not None:
        problems += _rank_problems(config.rank)
        if config.rank.pattern and config.target_layers is not None and config.target_layers.modules:
            problems.append(
                "rank.pattern: names roles, and target_layers.modules names modules; give target_layers.projections."
            )
    problems += _variant_problems(config)
    if config.target_layers is not None:
        problems += _target_layers_problems(config.target_layers, config.dataset.task)
    return problems


def _peft_type_problem(peft_type: Any) -> str:
    """Why `method=peft` with this type is no method."""
    usable = ", ".join(name for name, each in PEFT_TYPES.items() if not each.refused)
    if peft_type is None:
        return f"method=peft: which type of the peft package? Set method.peft.peft_type to one of {usable}."
    known = PEFT_TYPES.get(str(peft_type).upper())
    if known is None:
        return f"method.peft.peft_type={peft_type}: no such type; there are {usable}."
    return f"method.peft.peft_type={peft_type}: cannot be run here: {known.refused}. Of the others there are {usable}."


# Fields of peft's configs that follow from the run.
PEFT_FIELDS_OF_THE_RUN = {
    "auto_mapping": "is made when the adapter is saved",
    "base_model_name_or_path": "follows from model",
    "inference_mode": "is false in training and true in what is saved",
    "modules_to_save": "the task head is trained and saved in any case",
    "peft_version": "is that of the installed package",
    "rank_pattern": "is what training finds out",
    "revision": "follows from model",
    "task_type": "follows from dataset.task",
    "total_step": "is the number of steps of the run",
}


def _peft_problems(config: RunConfig, method: Method) -> list[str]:
    """What is wrong with a method of the peft package, without asking the package."""
    name, settings, kind = config.method.name, config.method.peft, method.peft
    assert kind is not None
    problems = []
    if "peft_type" in settings:
        problems.append(
            f"method.peft.peft_type={settings['peft_type']}: method={name} is {kind.name}; leave it out, or say "
            f"method=peft."
        )
    for field, why in PEFT_FIELDS_OF_THE_RUN.items():
        if field in settings and not (field == "rank_pattern" and kind.name != "ADALORA"):
            problems.append(f"method.peft.{field}={_shown(settings[field])}: {why}; leave it out.")
    if config.method.adapter_dropout != 0:
        problems.append(
            f"method.adapter_dropout={config.method.adapter_dropout}: is read by method=lora; set one of the rates "
            f"that {kind.name} has in peft (method.peft.lora_dropout, module_dropout, ...), and this to 0."
        )
    if config.model.quantization is not Quantization.none and not kind.takes_quantized:
        problems.append(
            f"model.quantization={config.model.quantization}: peft has no layers of method={name} for quantised "
            "weights; set model.quantization=none, or use method=lora."
        )
    problems += _peft_rank_problems(config, method)
    if config.target_layers is not None:
        problems += _target_layers_problems(config.target_layers, config.dataset.task)
    has_own_targets = settings.get("target_modules") is not None
    if config.target_layers is not None and not method.uses_placement:
        problems.append(
            f"method={name} takes no target_layers: it adapts no projections; leave target_layers=... out (peft "
            "chooses the modules, or method.peft.target_modules does)."
        )
    elif config.target_layers is not None and has_own_targets:
        problems.append(
            f"method.peft.target_modules={settings['target_modules']}: target_layers={config.target_layers.name} says "
            "already where it acts; give one of the two."
        )
    elif method.uses_placement and config.target_layers is None and not has_own_targets:
        problems.append(
            f"method={name} needs target layers: add target_layers=qv (q, v, qkvo, mlp, all, ...), or "
            "method.peft.target_modules."
        )
    return problems


def _peft_rank_problems(config: RunConfig, method: Method) -> list[str]:
    name, settings, kind = config.method.name, config.method.peft, method.peft
    assert kind is not None
    if config.rank is not None and kind.alpha is None:
        instead = f"set method.peft.{kind.rank}" if kind.rank is not None else "leave rank=... out"
        reason = "it has a rank of another kind, without alpha" if kind.rank is not None else "it has none"
        return [f"method={name} takes no rank: {reason}; {instead}."]
    if config.rank is not None:
        twice = [field for field in (kind.rank, kind.alpha, "use_rslora") if field in settings]
        return [
            *_rank_problems(config.rank),
            *(
                f"method.peft.{field}={_shown(settings[field])}: the setting rank says it already; give one of the two."
                for field in twice
            ),
        ]
    if kind.alpha is not None and kind.rank not in settings:
        return [f"method={name} needs a rank and has no hidden default: add rank=r8, or method.peft.{kind.rank}=8."]
    return []


def _rank_problems(rank: RankConfig) -> list[str]:
    problems = [] if rank.pattern is None else pattern_problems(rank.pattern)
    if rank.rank < 1:
        problems.append(f"rank.rank={rank.rank}: at least 1.")
    needed, unused = "alpha", "alpha_per_rank"
    if rank.alpha_policy is AlphaPolicy.proportional:
        needed, unused = unused, needed
    value = getattr(rank, needed)
    if value is None or not 0 < value < math.inf:
        problems.append(f"rank.{needed}={value}: rank.alpha_policy={rank.alpha_policy} needs a finite number above 0.")
    if getattr(rank, unused) is not None:
        problems.append(
            f"rank.{unused}={getattr(rank, unused)}: not used with rank.alpha_policy={rank.alpha_policy}; "
            f"set it to null."
        )
    return problems


def _variant_problems(config: RunConfig) -> list[str]:
    variant = config.variant
    problems = _name_problems("variant.name", variant.name)
    if not 0 < variant.learning_rate_ratio < math.inf:
        problems.append(f"variant.learning_rate_ratio={variant.learning_rate_ratio}: a finite number above 0.")
    if variant.learning_rate_ratio != 1 and config.trainer.learning_rate_B is not None:
        problems.append(
            f"variant.learning_rate_ratio={variant.learning_rate_ratio} and trainer.learning_rate_B="
            f"{config.trainer.learning_rate_B} both give the rate of B; set one of them to its default (1, null)."
        )
    if variant.init is not Init.kaiming and (config.model.adapter or config.model.from_sweep):
        problems.append(
            f"variant.init={variant.init}: A and B begin as the adapter that is continued; set it to kaiming, its "
            "default."
        )
    if config.model.quantization is not Quantization.none and (variant.dora or variant.init is Init.pissa):
        setting = "dora=true" if variant.dora else "init=pissa"
        problems.append(
            f"variant.{setting}: reads the rows of the base weights, which model.quantization="
            f"{config.model.quantization} has packed; set model.quantization=none."
        )
    if config.model.quantization is not Quantization.none and variant.bias is not Bias.none:
        problems.append(
            f"variant.bias={variant.bias}: the layers of model.quantization={config.model.quantization} round their "
            "biases to the type of their input, so that none can train; set model.quantization=none."
        )
    return problems


def _target_layers_problems(target_layers: TargetLayersConfig, task: Task) -> list[str]:
    problems = _name_problems("target_layers.name", target_layers.name)
    if bool(target_layers.projections) == bool(target_layers.modules):
        problems.append("target_layers: set either projections or modules (regular expressions), not both or neither.")
    problems += projection_problems(target_layers.projections, language_model=task.is_language)
    problems += block_problems(target_layers.blocks)
    problems += stack_problems(target_layers.stacks)
    for name in ("blocks", "stacks"):
        value = getattr(target_layers, name)
        if target_layers.modules and value != "all":
            problems.append(
                f"target_layers.{name}={value}: narrows projections alone; with target_layers.modules leave it at all "
                f"and name the {name} in the expressions."
            )
    for pattern in target_layers.modules:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"target_layers.modules: {pattern!r} is not a regular expression ({error}).")
    return problems


def _trainer_problems(trainer: TrainerConfig) -> list[str]:
    problems = []

    def require(condition: bool, name: str, allowed: str) -> None:
        if not condition:
            problems.append(f"trainer.{name}={getattr(trainer, name)}: allowed is {allowed}.")

    if (trainer.num_epochs is None) == (trainer.max_steps is None):
        problems.append(
            f"trainer: exactly one of num_epochs={trainer.num_epochs} and max_steps={trainer.max_steps} must be set; "
            "set the other to null."
        )
    require(trainer.num_epochs is None or 0 < trainer.num_epochs < math.inf, "num_epochs", "a finite number above 0")
    require(trainer.max_steps is None or trainer.max_steps >= 1, "max_steps", "at least 1")
    require(0 < trainer.learning_rate < math.inf, "learning_rate", "a finite number above 0")
    for name in ("learning_rate_A", "learning_rate_B", "learning_rate_head", "learning_rate_base"):
        rate = getattr(trainer, name)
        require(rate is None or 0 < rate < math.inf, name, "a finite number above 0, or null for learning_rate")
    require(trainer.batch_size >= 1, "batch_size", "at least 1")
    if trainer.micro_batch_size is not None and (
        trainer.micro_batch_size < 1 or trainer.batch_size % trainer.micro_batch_size
    ):
        problems.append(
            f"trainer.micro_batch_size={trainer.micro_batch_size}: must divide trainer.batch_size={trainer.batch_size}."
        )
    require(0 <= trainer.warmup_fraction < 1, "warmup_fraction", "0 <= fraction < 1")
    require(0 <= trainer.weight_decay < math.inf, "weight_decay", "0 or a finite number above")
    require(0 <= trainer.beta1 < 1, "beta1", "0 <= beta1 < 1")
    require(0 <= trainer.beta2 < 1, "beta2", "0 <= beta2 < 1")
    require(0 < trainer.adam_epsilon < math.inf, "adam_epsilon", "a finite number above 0")
    require(trainer.momentum is None or 0 <= trainer.momentum < 1, "momentum", "0 <= momentum < 1, or null")
    require(0 <= trainer.lion_beta2 < 1, "lion_beta2", "0 <= lion_beta2 < 1")
    require(
        trainer.max_gradient_norm is None or 0 < trainer.max_gradient_norm < math.inf,
        "max_gradient_norm",
        "a finite number above 0, or null for no clipping",
    )
    require(0 <= trainer.label_smoothing < 1, "label_smoothing", "0 <= label_smoothing < 1")
    require(
        trainer.loss_chunk_tokens is None or trainer.loss_chunk_tokens >= 0,
        "loss_chunk_tokens",
        "null, 0 (all at once) or a number of targets",
    )
    require(trainer.eval_every >= 0, "eval_every", "0 (only at the end) or a number of steps")
    require(trainer.eval_batch_size >= 1, "eval_batch_size", "at least 1")
    require(trainer.checkpoint_every >= 0, "checkpoint_every", "0 (only when asked to stop) or a number of steps")
    return problems


def _dtype_problems(config: RunConfig) -> list[str]:
    # Trainable parameters are float32, so a base held in another type computes only under autocast.
    dtype, precision = config.model.dtype, config.trainer.precision
    if dtype is Dtype.float32:
        return []
    method = METHODS.get(config.method.name)
    if method is not None and method.trains_base:
        return [
            f"model.dtype={dtype}: method={config.method.name} trains float32 weights; set model.dtype=float32 "
            "(trainer.precision=bf16 computes in bfloat16)."
        ]
    if precision is Precision.fp32:
        return [f"model.dtype={dtype} needs trainer.precision=bf16 or fp16, got {precision}."]
    return []


def _run_problems(config: RunConfig) -> list[str]:
    problems = []
    if not 0 <= config.seed < 2**32:
        problems.append(f"seed={config.seed}: allowed is 0 to {2**32 - 1}.")
    if config.sweep is not None and config.sweep == config.model.from_sweep:
        problems.append(
            f"model.from_sweep={config.model.from_sweep}: is the sweep of this run itself; name the one before it."
        )
    if config.sweep is not None:
        problems += _name_problems("sweep", config.sweep)
    if config.num_threads is not None and config.num_threads < 1:
        problems.append(f"num_threads={config.num_threads}: at least 1, or null for PyTorch's choice.")
    if config.shard_model and config.trainer.precision is Precision.fp16:
        problems.append("shard_model=true: trainer.precision=fp16 is not scaled across parts; use bf16 or fp32.")
    method = METHODS.get(config.method.name)
    if config.shard_model and method is not None and method.peft is not None:
        problems.append(
            f"shard_model=true: the layers of peft (method={config.method.name}) are not sharded; turn it off, or use "
            "method=lora."
        )
    if config.shard_model and config.model.quantization is not Quantization.none:
        problems.append(
            f"shard_model=true: a base in {config.model.quantization} cannot be sharded; turn one of the two off."
        )
    if config.shard_model and config.trainer.optimizer not in SHARDED:
        problems.append(
            f"shard_model=true: trainer.optimizer={config.trainer.optimizer} reads whole matrices, of which each "
            f"process has a part; use {', '.join(SHARDED)}."
        )
    if config.trainer.compile is not Compile.none and (
        config.shard_model or config.model.quantization is not Quantization.none
    ):
        what = "shard_model=true" if config.shard_model else f"model.quantization={config.model.quantization}"
        problems.append(
            f"trainer.compile={config.trainer.compile}: is not tested with {what}; turn one of the two off."
        )
    if config.tracking.log_every < 1:
        problems.append(f"tracking.log_every={config.tracking.log_every}: at least 1 step.")
    return problems


def _name_problems(setting: str, name: str) -> list[str]:
    # Names become folder names and table cells.
    if _SAFE_NAME.fullmatch(name):
        return []
    return [f"{setting}={name!r}: letters, digits, '.', '_' and '-' only, beginning with a letter or digit."]
