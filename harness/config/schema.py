"""The settings of a run: every name, type and default, and where it is read.

YAML files under `conf/` hold values only; these dataclasses are registered in Hydra's ConfigStore (`composing`) and
merged under every composed config, so that an unknown key or a value of the wrong type fails by name.

Enum members are spelled like their values because OmegaConf looks enums up by member name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field
from enum import StrEnum
from typing import Any, cast

from harness.results.metrics import scores_of


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
    return not set(config.dataset.metrics).isdisjoint(scores_of(of="generated"))


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
    held out, stratified, by `split_seed`; where there are no test rows with labels, `test_fraction` likewise.
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
    """What is trained: `name` is a key of `METHODS` in `harness.results.methods`.

    `learning_rate` is what `trainer.learning_rate` falls back to: methods need different ones.
    """

    name: str = "lora"
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


def default_of(item: Field[Any]) -> Any:
    """The default of a field."""
    return item.default if item.default_factory is MISSING else item.default_factory()
