"""The settings of a run: every name, type and default, and where it is read.

YAML files under `conf/` hold values only; these dataclasses are registered in Hydra's ConfigStore (`composing`) and
merged under every composed config, so that an unknown key or a value of the wrong type fails by name.

Enum members are spelled like their values because OmegaConf looks enums up by member name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, replace
from enum import StrEnum
from typing import Any, cast

from harness.results.methods import METHODS, Method
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


class Compile(StrEnum):
    """What torch.compile makes of a training step: nothing, a program for each block, or that as CUDA graphs."""

    none = "none"
    blocks = "blocks"
    graphs = "graphs"


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
        """Whether the task is for a language model, which has no task head."""
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


class Optimizer(StrEnum):
    """How gradients become steps.

    `adamw`: AdamW. `sgd`: stochastic gradient descent with momentum. `adafactor`: squared gradients held as a row and a
    column, steps relative to the size of a matrix. `muon`: orthogonalised momentum for hidden matrices, AdamW for the
    rest. `lion`: the sign of a momentum. `adamw8bit`: AdamW with its state in 8 bits (bitsandbytes, the extra `quant`).
    """

    adamw = "adamw"
    sgd = "sgd"
    adafactor = "adafactor"
    muon = "muon"
    lion = "lion"
    adamw8bit = "adamw8bit"


class Init(StrEnum):
    """How A and B of LoRA begin. All but `pissa` begin with a delta weight of zero.

    `kaiming`: A uniform in +-1/sqrt(in), B zero, as in the LoRA paper's code. `gaussian`: A normal of standard
    deviation 1/rank, B zero, as `peft` has it. `orthogonal`: rows of A orthonormal, B zero. `random_b`: A zero, B
    uniform in +-1/sqrt(rank) (Init[B] of Hayou et al. 2024, arXiv 2406.08447). `pissa`: the leading singular vectors of
    the weight, each times the root of its singular value (Meng et al. 2024, arXiv 2404.02948).
    """

    kaiming = "kaiming"
    gaussian = "gaussian"
    orthogonal = "orthogonal"
    random_b = "random_b"
    pissa = "pissa"


class Bias(StrEnum):
    """Which biases of the base model train beside A and B; `peft` calls `adapted` lora_only.

    `adapted`: those of the adapted modules. `all`: every one outside the task head, those of norms included.
    """

    none = "none"
    adapted = "adapted"
    all = "all"


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


class KeptAs(StrEnum):
    """What full fine-tuning keeps: a model as transformers loads it, or what it changed of the base, in bfloat16.

    The difference takes 2 bytes for each parameter, half of a model in float32, and needs the base to be read.
    """

    model = "model"
    difference = "difference"


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
    """The local files that a dataset names, as far as its settings show."""
    if dataset.hub_id is not None and dataset.path is None:
        return []
    named = [dataset.train_file or dataset.path, dataset.val_file, dataset.test_file]
    return [name for name in named if name is not None]


def is_given(dataset: DatasetConfig, split: str) -> bool:
    """Whether a split comes with the data, so that none is held out of train."""
    is_hub = dataset.hub_id is not None and dataset.path is None
    return getattr(dataset, f"{split}_split" if is_hub else f"{split}_file") is not None


def _continues(config: RunConfig) -> bool:
    return any(name is not None for name in (config.model.adapter, config.model.from_sweep, config.model.run))


def _generates(config: RunConfig) -> bool:
    return not set(config.dataset.metrics).isdisjoint(scores_of(of="generated"))


def _read_by_optimizer(*optimizers: Optimizer) -> dict[str, ReadWhere]:
    words = f"by trainer.optimizer={' and '.join(optimizers)}"
    return _read(words, lambda config: config.trainer.optimizer in optimizers)


def _has_adamw(config: RunConfig) -> bool:
    """Whether AdamW updates something: beside Muon's hidden matrices, all that is none of an adapter's."""
    method = METHODS.get(config.method.name)
    has_vectors = config.variant.dora or config.variant.bias is not Bias.none
    only_adapters = config.dataset.task.is_language and method is not None and method.uses_rank and not has_vectors
    return config.trainer.optimizer in (Optimizer.adamw, Optimizer.adamw8bit) or (
        config.trainer.optimizer is Optimizer.muon and not only_adapters
    )


def _of_method(words: str, holds: Callable[[Method], bool]) -> dict[str, ReadWhere]:
    """Read by methods of which something holds; a name that is no method's is refused by itself."""
    return _read(words, lambda config: config.method.name not in METHODS or holds(METHODS[config.method.name]))


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
_OF_ADAMW = _read("by trainer.optimizer=adamw and adamw8bit, and by muon where not all are hidden matrices", _has_adamw)
_OF_A_AND_B = _of_method(
    "by methods with a rank that are not of the peft package",
    lambda method: method.uses_rank and method.peft is None,
)
_OF_LORA = _of_method("by method=lora", lambda method: method.has_variants)
_OF_CONTINUED = _of_method("by method=lora and method=full", lambda method: method.has_variants or method.trains_base)
_OF_PEFT = _of_method(
    "by the methods of the peft package (method=ia3, adalora, ..., or method=peft)",
    lambda method: method.peft is not None,
)
_OF_WANDB = _read("where W&B is on (tracking.wandb)", lambda config: config.tracking.wandb is not WandbMode.disabled)
_OF_PROJECTS = _read(
    "where W&B or Trackio is on (tracking.wandb, tracking.trackio)",
    lambda config: config.tracking.wandb is not WandbMode.disabled or config.tracking.trackio,
)


@dataclass
class ScratchConfig:
    """A base model to be pretrained here: a small Llama of random weights, and a byte-level BPE learned from text.

    Embedding and unembedding are one matrix. The text is a column of a file in `asset` or in the folder `path`.

    Attributes:
        num_blocks: how many transformer blocks.
        width: the size of a hidden state, a multiple of `num_heads`.
        num_heads: attention heads of a block.
        max_tokens: the longest input, in tokens.
        vocab_size: tokens in the vocabulary: at least 258, the bytes and two special tokens.
        asset: the asset whose text the vocabulary is learned from.
        path: a folder of your own with that text.
        file: the file of rows in `asset` or `path`.
        column: its column of texts.
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
    """The base model: one of `asset`, `hub_id`, `tiny`, `run` and `scratch`, or `path`, which comes before all.

    Attributes:
        name: what tables and run ids call it.
        asset: the name of a pinned asset in `harness.content.assets`.
        hub_id: a repository on the model hub.
        revision: its commit; a branch such as main where the commit may change.
        tiny: a small random model with a tokenizer of bytes, for tests.
        path: a local folder that `save_pretrained` wrote.
        attention: how attention is computed, in transformers' words: sdpa, eager, flash_attention_2.
        dtype: the type in which frozen weights are held; what is trained is held in float32.
        dropout: the rate of every dropout in the base model.
        run: the run id of a finished full fine-tuning in the same runs folder, whose model is the base of this run.
        scratch: a random model to be pretrained, with a vocabulary learned from text.
        adapter: where LoRA continues instead of starting anew: the run id of a finished LoRA run in the same runs
            folder, or a folder with an adapter in PEFT's format. Rank, target layers and variant are those of that run.
        from_sweep: the sweep that this run continues: of LoRA the adapter, of full fine-tuning the model of its
            finished run with the same method, rank, target layers, variant, base and seed.
        quantization: how frozen weights are quantised (the extra `quant`).
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
    adapter: str | None = field(default=None, metadata=ADDED_LATER | _OF_LORA)
    from_sweep: str | None = field(default=None, metadata=ADDED_LATER | _OF_CONTINUED)


@dataclass
class GenerationConfig:
    """How texts are generated on the test split, for tasks `completion` and `chat`.

    Attributes:
        max_new_tokens: the most tokens of a text.
        num_beams: beams of the search; 1 is greedy.
        length_penalty: the exponent of the length by which a beam's score is divided.
        no_repeat_ngram_size: n-grams of this size occur once in a text; 0 allows repeats.
        num_examples: so many prompts, the first in the order of the file; null takes all.
        batch_size: prompts at a time.
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

    One of `asset`, `hub_id` and `train_file` names the data. Where there is no validation data, `val_fraction` of the
    training rows is held out, stratified, by `split_seed`; where there are no test rows with labels, `test_fraction`
    likewise. What `completion` and `chat` read is in `harness.data.prompts` and `harness.data.chat`.

    Attributes:
        name: what tables and run ids call it.
        asset: the name of a pinned asset in `harness.content.assets`.
        hub_id: a repository on the data hub.
        subset: the configuration of `hub_id`, such as mrpc of GLUE.
        revision: the commit of `hub_id`.
        path: the folder in which the files are looked up; for an asset it replaces the download.
        train_file: the file of training rows: .csv, .tsv, .tab, .json, .jsonl, .parquet or .txt.
        val_file: the file of validation rows.
        test_file: the file of test rows.
        train_split: the split of `hub_id` that is trained on.
        val_split: its split for validation.
        test_split: its split for test.
        text_columns: the column of texts; two columns make a task on pairs.
        label_column: the column of labels, or of the numbers of a regression.
        task: what is predicted.
        metrics: scores beside the loss, of those that the task has.
        best_metric: the score on val that chooses the best step.
        val_fraction: the part of the training rows that is held out for validation.
        test_fraction: the part of the training rows that is held out for test.
        split_seed: draws which rows are held out.
        num_train_examples: the first so many rows of a permutation fixed by `subset_seed`, so that smaller subsets lie
            inside larger ones; null takes all.
        subset_seed: draws the subsets of rows.
        max_length: the most tokens of an example.
        num_eval_examples: limits validation and test rows likewise (of prompts with a target: prompts, each with all
            its references).
        line_separator: what stands between the columns of a line in a .txt file; null makes a line one text.
        line_columns: the names of those columns.
        letters_only: makes texts lower case and everything but letters a space, which is how the 20 Newsgroups come:
            for a model that knows nothing else.
        blocks: how raw text becomes examples.
        attend_across_documents: whether the documents packed into an example see each other.
        prompt_template: the prompt, in which `{name}` stands for a column.
        target_column: the column that is predicted after the prompt.
        messages_column: the column of conversations, lists of `{"role", "content"}`.
        chat_template: `chatml`, a file of a Jinja template, or null for the tokenizer's own.
        too_long: what becomes of examples of more than `max_length` tokens.
        bad_rows: what becomes of rows whose text is empty or whose label is missing; null is `error` where a label is
            predicted and `drop` for language models, whose corpora have empty lines.
        positive_label: the class of which `f1` is the score where there are two; null takes the second one, in the
            order of the data or of the alphabet.
        generation: how texts are generated for the scores of generated texts.
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
        metadata=_read("where the data have no val split", lambda config: not is_given(config.dataset, "val")),
    )
    test_fraction: float = field(
        default=0.1,
        metadata=_read("where the data have no test split", lambda config: not is_given(config.dataset, "test")),
    )
    split_seed: int = field(
        default=0,
        metadata=_read(
            "where the data have no val or no test split",
            lambda config: not (is_given(config.dataset, "val") and is_given(config.dataset, "test")),
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
    """What is trained.

    Attributes:
        name: a key of `METHODS` in `harness.results.methods`.
        adapter_dropout: the rate of dropout on the adapter's input.
        learning_rate: what `trainer.learning_rate` falls back to: methods need different ones.
        peft: fields of the type's config in the `peft` package, by peft's names. With `method=peft` its `peft_type`
            says which type; the other methods of the package say it by their name.
    """

    name: str = "lora"
    adapter_dropout: float = 0.0
    learning_rate: float = 1e-3
    peft: dict[str, Any] = field(default_factory=dict, metadata=ADDED_LATER | _OF_PEFT)


@dataclass
class RankConfig:
    """Rank of the adapters and the policy that gives alpha.

    `fixed`: scaling = alpha / rank. `proportional`: alpha = alpha_per_rank * rank, so scaling = alpha_per_rank.
    `rslora`: scaling = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).

    Attributes:
        rank: the rank of the low-rank update, at most the smaller side of each matrix (of the rows of a role that
            shares a matrix).
        alpha_policy: how alpha follows the rank.
        alpha: the numerator of the scaling, for `fixed` and `rslora`.
        alpha_per_rank: what it is at rank 1, for `proportional`.
        pattern: other ranks for some targets, by role or group, with or without blocks: `{v: 16, mlp@last_half: 4}`.
            The narrower key decides. Null for one rank.
    """

    rank: int = 8
    alpha_policy: AlphaPolicy = AlphaPolicy.fixed
    alpha: float | None = None
    alpha_per_rank: float | None = None
    pattern: Any = field(default=None, metadata=ADDED_LATER | _OF_LORA)

    def at(self, rank: int) -> RankConfig:
        """The same policy at another rank, for one target."""
        return replace(self, rank=rank, pattern=None)

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
class VariantConfig:
    """What of plain LoRA is changed. rsLoRA is a policy of alpha: `rank.alpha_policy=rslora`.

    Attributes:
        name: what tables call it.
        dora: whether each row of the adapted weight has a trained length (DoRA: Liu et al. 2024, arXiv 2402.09353).
        init: how A and B begin.
        learning_rate_ratio: the learning rate of B over that of A (LoRA+: Hayou et al. 2024, arXiv 2402.12354).
        bias: which biases of the base model train, too, at `trainer.learning_rate_base`.
    """

    name: str = field(default="plain", metadata=_OF_LORA)
    dora: bool = field(default=False, metadata=_OF_LORA)
    init: Init = field(default=Init.kaiming, metadata=_OF_LORA)
    learning_rate_ratio: float = field(default=1.0, metadata=_OF_LORA)
    bias: Bias = field(default=Bias.none, metadata=ADDED_LATER | _OF_LORA)


@dataclass
class TargetLayersConfig:
    """Placement: which projections of which blocks get an adapter.

    Attributes:
        name: what tables and run ids call it.
        projections: roles such as q, k, v, o, up, down, gate, or the groups attention, mlp, all; also embedding, and
            lm_head on a language model.
        blocks: all, first_half, last_half, first_N, last_N, or a list of block indices.
        stacks: of an encoder-decoder (T5) all, or a list of some of encoder, decoder and cross, the decoder's attention
            to the encoder.
        modules: for modules that no role names: regular expressions, each of which must match at least one whole module
            name; given instead of `projections` and `blocks`.
    """

    name: str = "???"
    projections: list[str] = field(default_factory=list)
    blocks: Any = "all"
    modules: list[str] = field(default_factory=list)
    stacks: Any = field(default="all", metadata=ADDED_LATER)


@dataclass
class TrainerConfig:
    """The recipe. Exactly one of `num_epochs` and `max_steps` is given; periods count optimizer steps, 0 = never.

    Attributes:
        optimizer: how gradients become steps.
        learning_rate: after warm-up; falls back to that of the method.
        learning_rate_A: of the A of adapters, and of DoRA's magnitudes; null for `learning_rate`, as for the three
            below it.
        learning_rate_B: of the B of adapters.
        learning_rate_head: of the task head.
        learning_rate_base: of the base model's own parameters.
        num_epochs: passes over the training rows, also a part of one (1.5).
        max_steps: optimizer steps.
        batch_size: examples of an optimizer step, over all micro-batches and processes.
        micro_batch_size: examples of a forward pass; null takes the batch at once.
        schedule: the shape of the learning rate after warm-up.
        warmup_fraction: the part of the steps over which the rate rises from 0.
        weight_decay: on matrices; biases and norms have none. Decoupled from the gradient, but for `sgd`, where it is
            added to it.
        beta1: of AdamW, and of Lion.
        beta2: of AdamW.
        adam_epsilon: of AdamW.
        momentum: of SGD and Muon; null is 0.9 for `sgd` and 0.95 for `muon`.
        lion_beta2: of Lion, whose paper has 0.99.
        max_gradient_norm: gradients are clipped to this norm; null for no clipping.
        precision: the type in which a step computes.
        gradient_checkpointing: whether activations are computed again in the backward pass instead of held.
        label_smoothing: the part of the target's probability that all classes or tokens share.
        loss_chunk_tokens: of how many targets a language model's logits are held at once; null takes as many as fit
            into 128 MiB of float32, 0 all.
        eval_every: steps between two scorings on val; the last step is always scored.
        eval_each_epoch: whether val is also scored at the end of each epoch.
        eval_batch_size: examples at a time when scoring.
        checkpoint_every: steps between two checkpoints; at 0 one is written only when the run is asked to stop.
        compile: whether the blocks are compiled for training steps, and replayed as CUDA graphs.
    """

    learning_rate: float = "${method.learning_rate}"  # type: ignore[assignment]
    num_epochs: float | None = None
    max_steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    schedule: Schedule = Schedule.linear
    warmup_fraction: float = 0.06
    weight_decay: float = 0.01
    beta1: float = field(
        default=0.9,
        metadata=_read(
            "by trainer.optimizer=lion, adamw and adamw8bit, and by muon where not all are hidden matrices",
            lambda config: config.trainer.optimizer is Optimizer.lion or _has_adamw(config),
        ),
    )
    beta2: float = field(default=0.999, metadata=_OF_ADAMW)
    adam_epsilon: float = field(default=1e-8, metadata=_OF_ADAMW)
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
    optimizer: Optimizer = field(default=Optimizer.adamw, metadata=ADDED_LATER)
    momentum: float | None = field(
        default=None, metadata=ADDED_LATER | _read_by_optimizer(Optimizer.sgd, Optimizer.muon)
    )
    learning_rate_A: float | None = field(default=None, metadata=ADDED_LATER | _OF_A_AND_B)
    learning_rate_B: float | None = field(default=None, metadata=ADDED_LATER | _OF_A_AND_B)
    learning_rate_head: float | None = field(
        default=None, metadata=ADDED_LATER | _read_by(*(task for task in Task if not task.is_language))
    )
    learning_rate_base: float | None = field(
        default=None,
        metadata=ADDED_LATER
        | _read(
            "where parameters of the base model train: by method=full, bitfit, ..., and with variant.bias",
            lambda config: (
                config.variant.bias is not Bias.none
                or config.method.name not in METHODS
                or METHODS[config.method.name].trains_base
                or METHODS[config.method.name].trains_part_of_base
            ),
        ),
    )
    lion_beta2: float = field(default=0.99, metadata=ADDED_LATER | _read_by_optimizer(Optimizer.lion))
    compile: Compile = field(default=Compile.none, metadata=ADDED_LATER)

    @property
    def effective_momentum(self) -> float:
        """The momentum of SGD or Muon."""
        if self.momentum is None:
            return 0.95 if self.optimizer is Optimizer.muon else 0.9
        return self.momentum


@dataclass
class TrackingConfig:
    """Where numbers go beside `metrics.jsonl` and `result.json`, which are always written: any of the trackers here.

    Attributes:
        wandb: whether and how W&B mirrors them.
        trackio: whether Trackio mirrors them: a local database, without an account (the extra `trackio`).
        tensorboard: whether TensorBoard's event files mirror them, in the run's folder (the extra `tensorboard`).
        project: the project on W&B and Trackio.
        entity: W&B's user or team; null for the default one of the account.
        progress: whether progress is displayed.
        log_every: steps between two points of the training curves.
    """

    wandb: WandbMode = WandbMode.disabled
    trackio: bool = False
    tensorboard: bool = False
    project: str = field(default="lora-harness", metadata=_OF_PROJECTS)
    entity: str | None = field(default=None, metadata=_OF_WANDB)
    progress: bool = True
    log_every: int = 10


@dataclass
class RunConfig:
    """One run. `rank` and `target_layers` belong to methods that have them, and have no hidden default.

    Attributes:
        model: the base model.
        dataset: the data, and the task on them.
        method: what is trained.
        rank: the rank of the adapters.
        target_layers: where they are.
        variant: what of plain LoRA is changed.
        trainer: the recipe.
        seed: draws the head, the adapters, the order of the rows and dropout.
        trial: whether the run is one of a search (`hydra.sweeper.search`), judged on val alone: no test split is
            opened, nothing else is scored, and a run worse than the untrained model after warm-up ends as diverged.
        evaluate_also: additional language datasets by name, whose test split is scored before and after training; the
            first is the domain of the base model, on which forgetting is measured.
        score_earlier_tasks: whether a classifier that continues an earlier run is also scored on the tasks of that run
            and of those before it, each with the head that it had: what was forgotten.
        tracking: where the numbers go.
        sweep: the sweep that the run belongs to.
        runs_dir: the folder of all runs.
        rerun: which ended runs are run again.
        device: where to run.
        num_threads: CPU threads of PyTorch; null for its own choice.
        allow_busy_device: whether to run on a GPU that other processes use.
        save_weights: whether to keep what was trained.
        save_full_as: what full fine-tuning keeps: a model, or its difference to the base in bfloat16, half the size of
            a model in float32, which `evaluate=`, `export=` and `analysis adapters` read and no other run starts from.
        save_predictions: whether classifiers and regressions keep what they predict on val and test, by row.
        shard_model: under several processes, each holds a part of the weights instead of all.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    rank: RankConfig | None = None
    target_layers: TargetLayersConfig | None = None
    variant: VariantConfig = field(default_factory=VariantConfig, metadata=ADDED_LATER)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = 0
    trial: bool = field(default=False, metadata=ADDED_LATER)
    evaluate_also: dict[str, DatasetConfig] = field(default_factory=dict, metadata=ADDED_LATER)
    score_earlier_tasks: bool = field(
        default=True,
        metadata=ADDED_LATER
        | _read(
            "where a run with labels continues another (model.adapter, model.from_sweep or model.run)",
            lambda config: not config.dataset.task.is_language and _continues(config),
        ),
    )
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sweep: str | None = None
    runs_dir: str = "runs"
    rerun: Rerun = Rerun.failed
    device: Device = Device.auto
    num_threads: int | None = None
    allow_busy_device: bool = False
    save_weights: bool = True
    save_full_as: KeptAs = field(
        default=KeptAs.model,
        metadata=ADDED_LATER
        | _read(
            "by method=full, where weights are kept (save_weights=true)",
            lambda config: (
                config.save_weights and config.method.name in METHODS and METHODS[config.method.name].trains_base
            ),
        ),
    )
    save_predictions: bool = True
    shard_model: bool = False


def default_of(item: Field[Any]) -> Any:
    """The default of a field."""
    return item.default if item.default_factory is MISSING else item.default_factory()
