"""The peak memory of a run, or of a pack of runs, before it starts: the real training step on tensors without data.

Nothing is modelled. `Learner` makes the step that a run rehearses before training, through the same instrument
(`harness.measure.memory`), on a model built from its configuration, so that on the CPU the prediction is the measured
figure to the byte. It is what the CPU's kernels hold, with LoRA's products as a GPU makes them where the run is for
one; those of a GPU hold much the same, and what its allocator adds is in no prediction (`harness.forecast.fitting`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedOperatorException,
)

from harness.config.schema import Blocks, Device, Dtype, Precision, Quantization, RunConfig, Task
from harness.content.errors import ModelError
from harness.content.files import base_model
from harness.data.batches import Batch, TrainingBatches
from harness.data.blocks import NO_TARGET
from harness.forecast.request import ForecastError, explained
from harness.measure.memory import MemoryPeak, garbage_collected_before
from harness.measure.without_data import floats_without_data
from harness.methods.adapting import lora_layers
from harness.methods.packable import base_is_drawn, why_alone
from harness.methods.packed import Shared, share_base
from harness.methods.rates import learning_rates
from harness.methods.registry import during_training
from harness.models.configs import read_config
from harness.models.loading import checkpoint_activations, load_model
from harness.models.tokenizers import load_tokenizer
from harness.plan import adapt, head_outputs, require_packing
from harness.prepare import build_accelerator, computes_on_gpu
from harness.processes.stopping import StopRequest
from harness.tasks.families import TaskData, find_family
from harness.training.learner import Learner, TrainingCallbacks, follow
from harness.training.packs import Pack
from harness.training.turns import Turns

_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
_SHORTEST = 4
# Of a step of more micro-batches so many are run: the second one finds gradients, and so does every later one.
_MICRO_BATCHES = 2


@dataclass(frozen=True)
class MemoryForecast:
    """Live tensor bytes at the peak of a training step, and of scoring beside the optimizer's state."""

    step: MemoryPeak
    scoring: MemoryPeak

    @property
    def peak_bytes(self) -> int:
        """What a run needs: the larger of the two."""
        return max(self.step.total_bytes, self.scoring.total_bytes)


def predict_memory(
    config: RunConfig, *, num_labels: int = 2, data: TaskData | None = None, on_gpu: bool | None = None
) -> MemoryForecast:
    """The peaks of a run, from its configuration and the shapes of its batches.

    Args:
        config: of the run. float16 is predicted as bfloat16, which is of the same size.
        num_labels: outputs of a task head, where there are no data to say so.
        data: whose longest step is taken (`load_run_data`). Without them it is a full batch of examples of
            `dataset.max_length` tokens, every one of which is a target of a language model: no step needs more.
        on_gpu: whether LoRA makes the products that it makes on a GPU, which keep more; None for those of the device
            of the run.

    Raises:
        ForecastError: quantised weights, what looks at values (`trainer.optimizer=adafactor`), and whatever keeps the
            run from being built.
    """
    with _without_data(config):
        own, as_on_gpu = _on_the_cpu(config), computes_on_gpu(config.device) if on_gpu is None else on_gpu
        return step_and_scoring(own, data or full_batches(own, num_labels), as_on_gpu=as_on_gpu)


def predict_pack_memory(
    config: RunConfig,
    num_runs: int,
    *,
    num_labels: int = 2,
    data: TaskData | None = None,
    on_gpu: bool | None = None,
) -> MemoryForecast:
    """The peaks of a pack (`hydra.launcher.pack`) of so many runs, which differ in their seed from `config` on.

    Runs of a pack whose batches are the same, as those of a search are, need less where the lowest blocks are frozen.
    The arguments are those of `predict_memory`.

    Raises:
        ForecastError: as `predict_memory` does, and for a run that is computed alone in its pack.
    """
    if num_runs < 1:
        raise ForecastError(f"pack={num_runs}: a pack has at least one run.")
    alone = predict_memory(config, num_labels=num_labels, data=data, on_gpu=on_gpu)
    if num_runs == 1:
        return alone
    as_on_gpu = computes_on_gpu(config.device) if on_gpu is None else on_gpu
    reason = why_alone(config, on_gpu=as_on_gpu)
    if reason is not None:
        raise _not_packed(config, reason)
    with _without_data(config):
        own = _on_the_cpu(config)
        step_of_seeds = 0 if base_is_drawn(config) else 1  # runs of other seeds have other bases then
        configs = [replace(own, seed=own.seed + number * step_of_seeds) for number in range(num_runs)]
        step = pack_peak(configs, [data or full_batches(one, num_labels) for one in configs], as_on_gpu=as_on_gpu)
    # One run scores while the others wait with their weights and the state of their optimizers.
    optimizers = num_runs * alone.scoring.optimizer_bytes
    return MemoryForecast(step, replace(alone.scoring, weights_bytes=step.weights_bytes, optimizer_bytes=optimizers))


@contextmanager
def _without_data(config: RunConfig) -> Iterator[None]:
    """Inside, floating-point tensors have no data, and what cannot be forecast so is said."""
    if config.model.quantization is not Quantization.none:
        raise ForecastError(
            f"model.quantization={config.model.quantization}: bitsandbytes does not run without data, so the bytes of "
            "a step are not known; measure them with a run of a few steps (trainer.max_steps=2)."
        )
    with explained(), floats_without_data(), warnings.catch_warnings():
        # Who compares where tensors lie, to see which are new, finds all of these at 0.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        try:
            yield
        except _NEEDS_VALUES as error:
            raise ForecastError(
                f"method={config.method.name}, trainer.optimizer={config.trainer.optimizer}: a step of "
                f"{config.model.name} looks at the values of its tensors ({error}), and a prediction has none; "
                "measure it with a run of a few steps (trainer.max_steps=2)."
            ) from error


def load_run_data(config: RunConfig) -> TaskData:
    """The data of a run, tokenised as for it. Raises `ForecastError`."""
    with explained():
        tokenizer = load_tokenizer(base_model(config))
        return find_family(config.dataset.task).load(config.dataset, tokenizer, with_test=not config.trial)


def _on_the_cpu(config: RunConfig) -> RunConfig:
    """The same run where it can be predicted, from its base model alone."""
    model, trainer = base_model(config), config.trainer
    if model.dtype is Dtype.float16:
        model = replace(model, dtype=Dtype.bfloat16)
    if trainer.precision is Precision.fp16:
        trainer = replace(trainer, precision=Precision.bf16)
    # What it continues has its shapes.
    model = replace(model, adapter=None, from_sweep=None, run=None)
    return replace(config, model=model, trainer=trainer, device=Device.cpu)


def step_and_scoring(config: RunConfig, data: TaskData, *, as_on_gpu: bool = False) -> MemoryForecast:
    """Both peaks of a run on the CPU; measured, where floating-point tensors have data.

    With `as_on_gpu` LoRA computes by the products that it makes on a GPU.
    """
    run = _Run.prepare(config, data, as_on_gpu=as_on_gpu, base_seed=config.seed)
    step = run.learner.step_peak(shortest=run.batches.shortest, longest=run.batches.longest)
    return MemoryForecast(step, run.learner.scoring_peak(shortest=run.batches.shortest))


def pack_peak(configs: Sequence[RunConfig], data: Sequence[TaskData], *, as_on_gpu: bool = False) -> MemoryPeak:
    """The peak of the first two steps of a pack on the CPU; measured, where floating-point tensors have data.

    Of each run these are its longest step twice. In the first one gradients are compared with those alone, so that they
    are there twice; the second one has the state of the optimizers beside it.
    """
    base_seed, shared = configs[0].seed, Shared()
    runs = [_Run.prepare(*one, as_on_gpu=as_on_gpu, base_seed=base_seed) for one in zip(configs, data, strict=True)]
    for run in runs:
        share_base(run.model, shared, is_equal=_is_equal)
    pack = Pack(enumerate(run.steps for run in runs), size=len(runs), tolerance=math.inf, as_on_gpu=as_on_gpu)
    with garbage_collected_before(), follow([run.learner for run in runs]) as live:
        for ended in pack.run():
            if ended.error is not None:
                raise ended.error
    for number, reason in pack.why_alone.items():
        raise _not_packed(runs[number].config, reason)
    return live.peak


def _not_packed(config: RunConfig, reason: str) -> ForecastError:
    return ForecastError(
        f"method={config.method.name}: a run of {config.model.name} is computed alone in its pack: {reason}; leave the "
        "pack out."
    )


@dataclass(frozen=True)
class _Run:
    """A run up to its first step."""

    config: RunConfig
    model: nn.Module
    learner: Learner
    batches: TrainingBatches

    @staticmethod
    def prepare(config: RunConfig, data: TaskData, *, as_on_gpu: bool, base_seed: int) -> _Run:
        """The run, on a base without its weights: random ones of a seed, where tensors have data."""
        accelerator = build_accelerator(config)
        accelerator.device_placement = False  # a tensor without data is where it is
        base = load_model(config.model, num_labels=data.num_labels, pad_token_id=0, seed=base_seed, with_weights=False)
        require_packing(base.model.config.model_type, config)
        adapt(base.model, config, base.head)
        for _, layer in lora_layers(base.model):
            layer.composed = as_on_gpu
        method = during_training(base.model, config, 1)
        if config.trainer.gradient_checkpointing:
            checkpoint_activations(base.model)
        objective = find_family(config.dataset.task).build_objective(config, data, {}, StopRequest())
        learner = Learner(
            base.model,
            objective,
            config=config.trainer,
            accelerator=accelerator,
            callbacks=cast(TrainingCallbacks, None),  # of steps whose losses are read; none are
            num_steps=2,
            rates=learning_rates(config, base.head),
            method=method,
        )
        micro_batch_size = config.trainer.micro_batch_size or config.trainer.batch_size
        batches = TrainingBatches(
            data.train,
            batch_size=min(config.trainer.batch_size, _MICRO_BATCHES * micro_batch_size),
            micro_batch_size=micro_batch_size,
            seed=config.seed,
        )
        return _Run(config, base.model, learner, batches)

    def steps(self) -> Turns[None]:
        """The longest step twice."""
        for _ in range(2):
            yield from self.learner.step(self.batches.longest())


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Without data, tensors of one name in the models of a pack are of its base."""
    return isinstance(one, FakeTensor) or torch.equal(one, other)


# ---------------------------------------------------------------- batches of which only the shape is known


@dataclass(frozen=True)
class _Examples:
    """A split of examples that are all of one length but the last, a short one.

    `names` are the inputs beside `input_ids`; `ids` are those of a token and of the one that ends a text.
    """

    num_long: int
    length: int
    task: Task
    names: tuple[str, ...]
    ids: tuple[int, int]

    @property
    def lengths(self) -> np.ndarray:
        """In tokens."""
        return np.array([self.length] * self.num_long + [min(_SHORTEST, self.length)])

    def __len__(self) -> int:
        return self.num_long + 1

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The examples at `indices`, padded to the longest of them."""
        lengths = torch.from_numpy(self.lengths[np.asarray(indices)])
        shape = (len(lengths), int(lengths.max()))
        inputs = {"input_ids": torch.full(shape, self.ids[0], dtype=torch.long)}
        inputs["input_ids"][:, -1] = self.ids[1]
        for name in self.names:
            inputs[name] = torch.zeros(shape, dtype=torch.long)
        if "attention_mask" in inputs:
            inputs["attention_mask"] += torch.arange(shape[1]) < lengths[:, None]
        if "position_ids" in inputs:  # a block of two documents
            inputs["position_ids"] += torch.arange(shape[1]) % max(1, shape[1] - shape[1] // 2)
        num_targets = len(lengths)
        if self.task.is_language:
            labels = inputs["input_ids"].clone()
            labels[:, 0] = NO_TARGET
            num_targets = int((labels != NO_TARGET).sum())
        else:
            labels = torch.zeros(shape[0], dtype=torch.float32 if self.task is Task.regression else torch.long)
        return Batch(inputs, labels, num_tokens=int(lengths.sum()), num_targets=num_targets)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The largest one alone."""
        yield self.batch(range(min(batch_size, self.num_long)))


@dataclass(frozen=True)
class _FullBatches:
    """Data of which only the shapes are known."""

    train: Any
    val: Any
    num_labels: int | None
    test: None = None
    fingerprint: str = ""
    positive_class: int | None = None

    @property
    def notes(self) -> list[str]:
        """None."""
        return []

    @property
    def label_names(self) -> list[str]:
        """None."""
        return []


def full_batches(config: RunConfig, num_labels: int) -> TaskData:
    """Stands in for data: every example has `dataset.max_length` tokens, other ones for each of some seeds."""
    dataset, trainer = config.dataset, config.trainer
    names = _input_names(config)
    model = read_config(config.model)
    special = [getattr(model, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    tokens = [number for number in range(1, 12) if number not in special]
    token = tokens[config.seed % len(tokens)]
    end = special[2] if isinstance(special[2], int) else token

    def split(num_examples: int) -> _Examples:
        return _Examples(num_examples, dataset.max_length, dataset.task, names, (token, end))

    labels = head_outputs(config, num_labels)
    return _FullBatches(split(trainer.batch_size), split(trainer.eval_batch_size), labels)


def _input_names(config: RunConfig) -> tuple[str, ...]:
    """What a batch holds beside token ids."""
    dataset = config.dataset
    if dataset.task.is_language:
        isolated = dataset.blocks is Blocks.packed and not dataset.attend_across_documents
        return ("position_ids",) if dataset.task is Task.causal_lm and isolated else ("attention_mask",)
    try:
        names = load_tokenizer(config.model).model_input_names
    except ModelError:  # a model of which there is nothing but its configuration
        has_types = getattr(read_config(config.model), "type_vocab_size", 0) > 1
        names = ["token_type_ids", "attention_mask"] if has_types else ["attention_mask"]
    return tuple(name for name in names if name != "input_ids")
