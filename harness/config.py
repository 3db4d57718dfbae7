"""The one config schema: every setting of a run, its default, and what makes it wrong.

YAML files under `conf/` hold values only; the dataclasses here are registered in Hydra's ConfigStore and are merged
under every composed config, so an unknown key or a value of the wrong type fails by name. `from_composed` turns
what Hydra composed into a plain `RunConfig`; past that line no DictConfig exists.

Enum members are spelled like their values because OmegaConf looks enums up by member name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from harness import placement


class ConfigError(ValueError):
    """A config that must not be run. `problems` lists everything that is wrong, one sentence or two each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class Method(StrEnum):
    """Which parameters are trained beside the task head."""

    lora = "lora"
    full = "full"
    head_only = "head_only"


class AlphaPolicy(StrEnum):
    """How alpha, and with it the scaling of the delta weight, follows the rank."""

    fixed = "fixed"
    proportional = "proportional"
    rslora = "rslora"


class TinyModel(StrEnum):
    """Architectures of the small random models that tests use."""

    bert = "bert"
    gpt2 = "gpt2"
    llama = "llama"


class Dtype(StrEnum):
    """Type in which the weights are held."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Precision(StrEnum):
    """Type in which a step computes; anything but fp32 is autocast over weights of `model.dtype`."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Task(StrEnum):
    """What is predicted: a label of a text, or the text itself.

    `causal_lm`: every token of raw text. `completion`: a target after a prompt, the loss on the target alone. `chat`:
    the assistant's turns of a conversation.
    """

    classification = "classification"
    regression = "regression"
    causal_lm = "causal_lm"
    completion = "completion"
    chat = "chat"

    @property
    def is_language(self) -> bool:
        """Whether the task is for a language model, without a head of its own."""
        return self in (Task.causal_lm, Task.completion, Task.chat)


class Blocks(StrEnum):
    """How raw text becomes training examples of `max_length` tokens: each document by itself, or several in a block."""

    cut = "cut"
    packed = "packed"


class TooLong(StrEnum):
    """What becomes of a labelled text, a prompt with its target, or a conversation, of more than `max_length` tokens.

    Raw text (`causal_lm`) is cut into blocks and never too long.
    """

    truncate = "truncate"
    drop = "drop"
    error = "error"


class BadRows(StrEnum):
    """What becomes of rows without text or without a label: an error that names them, or left out and counted."""

    error = "error"
    drop = "drop"


class Quantization(StrEnum):
    """How the frozen weights of the base model are held (bitsandbytes)."""

    none = "none"
    int8 = "int8"
    nf4 = "nf4"


class Schedule(StrEnum):
    """Shape of the learning rate after warm-up."""

    linear = "linear"
    cosine = "cosine"
    constant = "constant"


class Device(StrEnum):
    """Where to run; `auto` takes CUDA, then MPS, then the CPU. Choose one of several GPUs with CUDA_VISIBLE_DEVICES."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Rerun(StrEnum):
    """Which ended runs are run again. A diverged run is a result: it would diverge again."""

    never = "never"
    failed = "failed"
    all = "all"


class WandbMode(StrEnum):
    """`offline` writes files that `wandb sync` uploads later. Not called `off`, which YAML reads as false."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


# Marks a field that came after the first runs were made. It is left out of `run_id` while it has its default, so that
# those runs keep their names.
ADDED_LATER = {"added_later": True}


@dataclass(frozen=True)
class ReadWhere:
    """Where a field is read. Elsewhere a value other than its default would change the run's id and nothing else.

    `words` continue "is read ..."; `holds` says it of a config.
    """

    words: str
    holds: Callable[[RunConfig], bool]


def _read(words: str, holds: Callable[[RunConfig], bool]) -> dict[str, ReadWhere]:
    """Metadata of a field that is not read everywhere."""
    return {"read_where": ReadWhere(words, holds)}


def _read_by(*tasks: Task) -> dict[str, ReadWhere]:
    words = f"by dataset.task={' and '.join(tasks)}"
    return _read(words, lambda config: config.dataset.task in tasks)


def _file_names(dataset: DatasetConfig) -> list[str]:
    """The local files that a dataset names, as far as its settings tell."""
    if dataset.hub_id is not None and dataset.path is None:
        return []
    named = [dataset.train_file or dataset.path, dataset.val_file, dataset.test_file]
    return [name for name in named if name is not None]


def _is_given(dataset: DatasetConfig, split: str) -> bool:
    """Whether a split comes with the data, so that none is held out of train."""
    is_hub = dataset.hub_id is not None and dataset.path is None
    return getattr(dataset, f"{split}_split" if is_hub else f"{split}_file") is not None


def _generates(config: RunConfig) -> bool:
    return any(name in GENERATION_METRICS for name in config.dataset.metrics)


_OF_HUB_DATA = _read("where dataset.hub_id names the data", lambda config: config.dataset.hub_id is not None)
_OF_FILES = _read(
    "where dataset.hub_id does not name the data (or dataset.path replaces it)",
    lambda config: config.dataset.hub_id is None or config.dataset.path is not None,
)
_OF_LINES = _read(
    "in files of lines (.txt)",
    lambda config: any(name.endswith(".txt") for name in _file_names(config.dataset)),
)
_OF_GENERATION = _read("where dataset.metrics names a score of generated texts (bleu, exact_match, ...)", _generates)
_OF_WANDB = _read("where W&B is on (tracking.wandb)", lambda config: config.tracking.wandb is not WandbMode.disabled)


@dataclass
class ScratchConfig:
    """A base model to be pretrained here: a small Llama of random weights, and a byte-level BPE learned from text.

    Embedding and unembedding are one matrix. The vocabulary is learned from a column of a training file, which lies in
    `asset` or in the folder `path`.
    """

    num_blocks: int = 4
    width: int = 256
    num_heads: int = 4
    max_tokens: int = 512
    vocab_size: int = 8192
    asset: str | None = None
    path: str | None = None
    file: str = "???"
    column: str = "text"


@dataclass
class ModelConfig:
    """The base model: one of `asset`, `hub_id`, `tiny`, `run` and `scratch`, or `path`, a local folder, before all.

    `run` is the run id of a finished full fine-tuning in the same runs folder, whose model is the base of this run.
    """

    name: str = "???"
    asset: str | None = None
    hub_id: str | None = None
    revision: str | None = field(
        default=None,
        metadata=_read("where model.hub_id names the base", lambda config: config.model.hub_id is not None),
    )
    tiny: TinyModel | None = None
    path: str | None = None
    attention: str = "sdpa"
    dtype: Dtype = Dtype.float32
    dropout: float = 0.0
    run: str | None = field(default=None, metadata=ADDED_LATER)
    scratch: ScratchConfig | None = field(default=None, metadata=ADDED_LATER)
    quantization: Quantization = field(default=Quantization.none, metadata=ADDED_LATER)


@dataclass
class GenerationConfig:
    """How texts are generated on the test split, for tasks `completion` and `chat`.

    `num_examples` takes the first prompts in the order of the file, null all; `no_repeat_ngram_size` 0 allows repeats.
    """

    max_new_tokens: int = field(default=64, metadata=_OF_GENERATION)
    num_beams: int = field(default=1, metadata=_OF_GENERATION)
    length_penalty: float = field(
        default=1.0,
        metadata=_read(
            "where texts are generated with several beams (dataset.generation.num_beams)",
            lambda config: _generates(config) and config.dataset.generation.num_beams > 1,
        ),
    )
    no_repeat_ngram_size: int = field(default=0, metadata=_OF_GENERATION)
    num_examples: int | None = field(default=None, metadata=_OF_GENERATION)
    batch_size: int = field(default=32, metadata=_OF_GENERATION)


@dataclass
class DatasetConfig:
    """Rows, what is predicted of them, and how they are split.

    One of `asset`, `hub_id` and `train_file` names the data. `path` is the folder in which the files are looked up;
    for an asset it replaces the download. Where there is no validation data, `val_fraction` of the training rows is
    carved off, stratified, by `split_seed`; where there are no test rows with labels, `test_fraction` likewise.
    `num_train_examples` takes the first rows of a permutation fixed by `subset_seed`, so smaller subsets lie inside
    larger ones; `num_eval_examples` likewise limits validation and test rows (of prompts with a target: prompts, each
    with all its references).

    `bad_rows` says what becomes of rows whose text is empty or whose label is missing; null is `error` where a label is
    predicted and `drop` for language models, whose corpora have empty lines. `positive_label` names the class of which
    `f1` is the score where there are two; null takes the second one, in the order of the data or of the alphabet.

    Language models: `causal_lm` reads one text column; `completion` fills `prompt_template`, in which `{name}` stands
    for a column, and predicts `target_column`; `chat` reads lists of `{"role", "content"}` in `messages_column` through
    `chat_template` (`chatml`, a file of a Jinja template, or null for the tokenizer's own). In files of lines (.txt) a
    line is a row: of one column `text`, or of `line_columns` between `line_separator`. `letters_only` makes texts lower
    case and everything but letters a space, which is how the 20 Newsgroups come: for a model that knows nothing else.
    """

    name: str = "???"
    asset: str | None = None
    hub_id: str | None = None
    subset: str | None = field(default=None, metadata=_OF_HUB_DATA)
    revision: str | None = field(default=None, metadata=_OF_HUB_DATA)
    path: str | None = None
    train_file: str | None = field(default=None, metadata=_OF_FILES)
    val_file: str | None = field(default=None, metadata=_OF_FILES)
    test_file: str | None = field(default=None, metadata=_OF_FILES)
    train_split: str = field(default="train", metadata=_OF_HUB_DATA)
    val_split: str | None = field(default=None, metadata=_OF_HUB_DATA)
    test_split: str | None = field(default=None, metadata=_OF_HUB_DATA)
    text_columns: list[str] = field(
        default_factory=lambda: ["text"], metadata=_read_by(Task.classification, Task.regression, Task.causal_lm)
    )
    label_column: str = field(default="label", metadata=_read_by(Task.classification, Task.regression))
    task: Task = Task.classification
    metrics: list[str] = field(default_factory=lambda: ["accuracy"])
    best_metric: str = "accuracy"
    val_fraction: float = field(
        default=0.1,
        metadata=_read("where the data have no val split", lambda config: not _is_given(config.dataset, "val")),
    )
    test_fraction: float = field(
        default=0.1,
        metadata=_read("where the data have no test split", lambda config: not _is_given(config.dataset, "test")),
    )
    split_seed: int = field(
        default=0,
        metadata=_read(
            "where the data have no val or no test split",
            lambda config: not (_is_given(config.dataset, "val") and _is_given(config.dataset, "test")),
        ),
    )
    num_train_examples: int | None = None
    subset_seed: int = field(
        default=0,
        metadata=_read(
            "where dataset.num_train_examples or dataset.num_eval_examples is set",
            lambda config: (config.dataset.num_train_examples, config.dataset.num_eval_examples) != (None, None),
        ),
    )
    max_length: int = 128
    num_eval_examples: int | None = field(default=None, metadata=ADDED_LATER)
    line_separator: str | None = field(default=None, metadata=ADDED_LATER | _OF_LINES)
    line_columns: list[str] = field(default_factory=list, metadata=ADDED_LATER | _OF_LINES)
    letters_only: bool = field(default=False, metadata=ADDED_LATER | _read_by(Task.causal_lm))
    blocks: Blocks = field(default=Blocks.cut, metadata=ADDED_LATER | _read_by(Task.causal_lm))
    attend_across_documents: bool = field(
        default=False,
        metadata=ADDED_LATER
        | _read(
            "by dataset.task=causal_lm with dataset.blocks=packed",
            lambda config: config.dataset.task is Task.causal_lm and config.dataset.blocks is Blocks.packed,
        ),
    )
    prompt_template: str | None = field(default=None, metadata=ADDED_LATER | _read_by(Task.completion))
    target_column: str = field(default="target", metadata=ADDED_LATER | _read_by(Task.completion))
    messages_column: str = field(default="messages", metadata=ADDED_LATER | _read_by(Task.chat))
    chat_template: str | None = field(default=None, metadata=ADDED_LATER | _read_by(Task.chat))
    too_long: TooLong = field(
        default=TooLong.truncate,
        metadata=ADDED_LATER | _read_by(*(task for task in Task if task is not Task.causal_lm)),
    )
    bad_rows: BadRows | None = field(default=None, metadata=ADDED_LATER)
    positive_label: str | None = field(default=None, metadata=ADDED_LATER)
    generation: GenerationConfig = field(default_factory=GenerationConfig, metadata=ADDED_LATER)


@dataclass
class MethodConfig:
    """What is trained. `learning_rate` is what `trainer.learning_rate` falls back to: methods need different ones."""

    name: Method = Method.lora
    adapter_dropout: float = 0.0
    learning_rate: float = 1e-3


@dataclass
class RankConfig:
    """Rank of the adapters and the policy that gives alpha.

    `fixed`: scaling = alpha / rank. `proportional`: alpha = alpha_per_rank * rank, so scaling = alpha_per_rank.
    `rslora`: scaling = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
    """

    rank: int = 8
    alpha_policy: AlphaPolicy = AlphaPolicy.fixed
    alpha: float | None = None
    alpha_per_rank: float | None = None

    @property
    def effective_alpha(self) -> float:
        """The numerator of the scaling."""
        if self.alpha_policy is AlphaPolicy.proportional:
            return cast(float, self.alpha_per_rank) * self.rank
        return cast(float, self.alpha)

    @property
    def scaling(self) -> float:
        """The factor in `delta W = scaling * B @ A`."""
        if self.alpha_policy is AlphaPolicy.rslora:
            return self.effective_alpha / math.sqrt(self.rank)
        return self.effective_alpha / self.rank


@dataclass
class TargetLayersConfig:
    """Placement: which projections of which blocks get an adapter.

    `projections`: roles such as q, k, v, o, up, down, gate, or the groups attention, mlp, all.
    `blocks`: all, first_half, last_half, first_N, last_N, or a list of block indices.
    `modules`: for modules that no role names: regular expressions, each of which must match at least one whole module
    name; given instead of `projections` and `blocks`.
    """

    name: str = "???"
    projections: list[str] = field(default_factory=list)
    blocks: Any = "all"
    modules: list[str] = field(default_factory=list)


@dataclass
class TrainerConfig:
    """The recipe. Exactly one of `num_epochs` and `max_steps` is given; periods count optimizer steps, 0 = never.

    `loss_chunk_tokens`: of how many targets a language model's logits are held at once; null takes as many as fit into
    128 MiB of float32, 0 all.
    """

    learning_rate: float = "${method.learning_rate}"  # type: ignore[assignment]
    num_epochs: float | None = None
    max_steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    schedule: Schedule = Schedule.linear
    warmup_fraction: float = 0.06
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_gradient_norm: float | None = 1.0
    precision: Precision = Precision.fp32
    gradient_checkpointing: bool = False
    label_smoothing: float = field(
        default=0.0, metadata=ADDED_LATER | _read_by(*(task for task in Task if task is not Task.regression))
    )
    loss_chunk_tokens: int | None = field(
        default=None, metadata=ADDED_LATER | _read_by(*(task for task in Task if task.is_language))
    )
    eval_every: int = 0
    eval_each_epoch: bool = False
    eval_batch_size: int = 64
    checkpoint_every: int = 0


@dataclass
class TrackingConfig:
    """Where numbers go beside `metrics.jsonl` and `result.json`, which are always written."""

    wandb: WandbMode = WandbMode.offline
    project: str = field(default="lora-harness", metadata=_OF_WANDB)
    entity: str | None = field(default=None, metadata=_OF_WANDB)
    progress: bool = True
    log_every: int = 10


@dataclass
class RunConfig:
    """One run. `rank` and `target_layers` belong to method `lora` alone and have no hidden default.

    `evaluate_also` names further language sets whose test split is scored before and after training; the first is the
    domain of the base model, on which forgetting is measured. `shard_model`: under several processes, each holds a part
    of the weights instead of all.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    rank: RankConfig | None = None
    target_layers: TargetLayersConfig | None = None
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = 0
    evaluate_also: dict[str, DatasetConfig] = field(default_factory=dict, metadata=ADDED_LATER)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sweep: str | None = None
    runs_dir: str = "runs"
    rerun: Rerun = Rerun.failed
    device: Device = Device.auto
    num_threads: int | None = None
    allow_busy_device: bool = False
    save_weights: bool = True
    shard_model: bool = False


# ---------------------------------------------------------------- composing


def register() -> None:
    """Puts the schema where `conf/config.yaml` finds it."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


# Scores of generated texts; computed at the end, on test alone, and therefore never what chooses a step.
GENERATION_METRICS = ("bleu", "chrf", "rouge_l", "nist", "exact_match", "number_match")
_METRICS_OF_TASK = {
    Task.classification: ("accuracy", "f1", "mcc", "nll"),
    Task.regression: ("pearson", "spearman", "mse"),
    Task.causal_lm: ("nll", "perplexity", "bits_per_byte"),
    Task.completion: ("nll", "perplexity", "bits_per_byte", *GENERATION_METRICS),
    Task.chat: ("nll", "perplexity", "bits_per_byte", *GENERATION_METRICS),
}
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def from_composed(composed: DictConfig) -> RunConfig:
    """Turns what Hydra composed into a validated `RunConfig`.

    Raises `ConfigError` for unknown keys, wrong types and every problem that `find_problems` sees.
    """
    plain = OmegaConf.to_container(composed, resolve=False)
    if not isinstance(plain, dict):
        raise ConfigError([f"a config is a mapping, got {type(plain).__name__}"])
    return _validated(cast(dict[str, Any], plain))


def from_dict(values: dict[str, Any]) -> RunConfig:
    """The `RunConfig` with these values over the schema's defaults, validated. Raises `ConfigError`.

    Texts are taken literally, unlike in what Hydra composes: a config that was resolved once may hold `${...}`.
    """
    return _validated(cast(dict[str, Any], _without_interpolation(values)))


def _without_interpolation(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_interpolation(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_interpolation(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    return value


def _validated(values: dict[str, Any]) -> RunConfig:
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), values)
        config = cast(RunConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError([explain_omegaconf(error)]) from error
    problems = find_problems(config)
    if problems:
        raise ConfigError(problems)
    return config


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as JSON types, verbatim: what `config.yaml`, `result.json` and W&B hold."""
    return cast(dict[str, Any], json.loads(json.dumps(asdict(config))))


def explain_omegaconf(error: OmegaConfBaseException) -> str:
    """One sentence for what OmegaConf did not accept: the setting, what is wrong, and the names that exist."""
    first_line = str(error).splitlines()[0]
    key = error.full_key
    if not key:
        return first_line
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        schema = error.object_type if is_dataclass(error.object_type) else RunConfig
        known = sorted(field.name for field in fields(schema))
        return f"{key}: no such setting. Known here: {', '.join(known)}."
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: a value is needed and none was given."
    if "is not a ListConfig" in first_line:
        return f"{key}: a list is needed, such as {key}=[a,b]."
    if isinstance(error, InterpolationKeyError):
        return f"{key}: {first_line.rstrip('.')}; where the text is to hold ${{...}} itself, write \\${{...}}."
    return f"{key}: {first_line.rstrip('.')}."


# ---------------------------------------------------------------- validation


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


def default_of(item: Field[Any]) -> Any:
    """The default of a field."""
    return item.default if item.default_factory is MISSING else item.default_factory()


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
    allowed = _METRICS_OF_TASK[dataset.task]
    for name in dict.fromkeys((*dataset.metrics, dataset.best_metric)):
        if name not in allowed:
            problems.append(
                f"dataset.metrics / dataset.best_metric: {name!r} is not a metric of task {dataset.task}; "
                f"allowed: {', '.join(allowed)}."
            )
    if dataset.task.is_language:
        if dataset.best_metric in GENERATION_METRICS:
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
    """What does not go together with a language model, and further sets that cannot be scored."""
    problems = []
    if config.dataset.task.is_language and config.method.name is Method.head_only:
        problems.append(
            f"method=head_only: a language model (dataset.task={config.dataset.task}) has no head of its own to train; "
            "use method=lora or method=full."
        )
    for name, dataset in config.evaluate_also.items():
        if not config.dataset.task.is_language or not dataset.task.is_language:
            problems.append(
                f"evaluate_also.{name}: scores language models; dataset.task={config.dataset.task} and "
                f"evaluate_also.{name}.task={dataset.task} must be causal_lm, completion or chat."
            )
        problems += [problem.replace("dataset", f"evaluate_also.{name}", 1) for problem in _dataset_problems(dataset)]
    if config.model.quantization is not Quantization.none and config.method.name is Method.full:
        problems.append(
            f"model.quantization={config.model.quantization}: quantised weights are frozen; use method=lora, or "
            "model.quantization=none for method=full."
        )
    return problems


def _method_problems(config: RunConfig) -> list[str]:
    method, problems = config.method.name, []
    if method is Method.lora:
        if config.rank is None:
            problems.append("method=lora needs a rank and has no hidden default: add rank=r8 (r1 to r1024).")
        if config.target_layers is None:
            problems.append("method=lora needs target layers: add target_layers=qv (q, v, qkvo, mlp, all, ...).")
        if not 0 <= config.method.adapter_dropout < 1:
            problems.append(f"method.adapter_dropout={config.method.adapter_dropout}: allowed is 0 <= dropout < 1.")
    else:
        for name, value in (("rank", config.rank), ("target_layers", config.target_layers)):
            if value is not None:
                problems.append(f"method={method} takes no {name}: leave {name}=... out, or use method=lora.")
        if config.method.adapter_dropout != 0:
            problems.append(f"method={method} has no adapter: method.adapter_dropout must be 0.")
    if config.rank is not None:
        problems += _rank_problems(config.rank)
    if config.target_layers is not None:
        problems += _target_layers_problems(config.target_layers, config.dataset.task)
    return problems


def _rank_problems(rank: RankConfig) -> list[str]:
    problems = []
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


def _target_layers_problems(target_layers: TargetLayersConfig, task: Task) -> list[str]:
    problems = _name_problems("target_layers.name", target_layers.name)
    if bool(target_layers.projections) == bool(target_layers.modules):
        problems.append("target_layers: set either projections or modules (regular expressions), not both or neither.")
    problems += placement.projection_problems(target_layers.projections, language_model=task.is_language)
    problems += placement.block_problems(target_layers.blocks)
    if target_layers.modules and target_layers.blocks != "all":
        problems.append(
            f"target_layers.blocks={target_layers.blocks}: narrows projections alone; with target_layers.modules leave "
            "it at all and name the blocks in the expressions."
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
    if config.method.name is Method.full:
        return [
            f"model.dtype={dtype}: method=full trains float32 weights; set model.dtype=float32 "
            "(trainer.precision=bf16 computes in bfloat16)."
        ]
    if precision is Precision.fp32:
        return [f"model.dtype={dtype} needs trainer.precision=bf16 or fp16, got {precision}."]
    return []


def _run_problems(config: RunConfig) -> list[str]:
    problems = []
    if not 0 <= config.seed < 2**32:
        problems.append(f"seed={config.seed}: allowed is 0 to {2**32 - 1}.")
    if config.sweep is not None:
        problems += _name_problems("sweep", config.sweep)
    if config.num_threads is not None and config.num_threads < 1:
        problems.append(f"num_threads={config.num_threads}: at least 1, or null for PyTorch's choice.")
    if config.shard_model and config.trainer.precision is Precision.fp16:
        problems.append("shard_model=true: trainer.precision=fp16 is not scaled across parts; use bf16 or fp32.")
    if config.shard_model and config.model.quantization is not Quantization.none:
        problems.append(
            f"shard_model=true: a base in {config.model.quantization} is not spread; set one of the two off."
        )
    if config.tracking.log_every < 1:
        problems.append(f"tracking.log_every={config.tracking.log_every}: at least 1 step.")
    return problems


def _name_problems(setting: str, name: str) -> list[str]:
    # Names become folder names and table cells.
    if _SAFE_NAME.fullmatch(name):
        return []
    return [f"{setting}={name!r}: letters, digits, '.', '_' and '-' only, beginning with a letter or digit."]
