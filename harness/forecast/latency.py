"""How long a forward pass takes: of the base model, with a merged adapter, and with one beside its weights.

As in Table 1 of the LoRA paper (arXiv 2106.09685). The model is built from its configuration and every weight is drawn,
because the time of a pass does not depend on what the weights are.

In each round every variant is measured once, in another order each round, so that a machine that is slower for a while
is slower for all of them. Each measured pass comes after one of the same variant that is thrown away: what the caches
of the processor hold then is what a model in use would find there.
"""

from __future__ import annotations

import copy
import inspect
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from harness.config.schema import Dtype, Precision, Quantization, RunConfig
from harness.content.errors import ModelError
from harness.content.files import base_model
from harness.forecast.memory import full_batches
from harness.forecast.request import ForecastError, explained
from harness.measure.clock import DeviceQueue, device_queue
from harness.measure.device import is_out_of_memory, require_free_device
from harness.measure.environment import environment
from harness.measure.memory import garbage_collected_before
from harness.methods.packed import PackError, adapters_side_by_side, copy_over_same_tensors
from harness.methods.peft_method import PeftMethodError
from harness.methods.registry import SavedMethod, find_method_module, is_adapter
from harness.models.configs import is_scratch, max_tokens, read_config
from harness.models.loading import PreTrainedModel, load_model
from harness.models.tokenizers import load_tokenizer
from harness.plan import adapt
from harness.prepare import build_accelerator, set_threads
from harness.results.methods import METHODS

FORWARD, PREFILL, DECODE = "forward", "prefill", "decode"
BASE, MERGED, UNMERGED = "base", "merged", "unmerged"

_DTYPES = {Precision.fp32: Dtype.float32, Precision.bf16: Dtype.bfloat16, Precision.fp16: Dtype.float16}
# What an adapter is drawn with: as of trained ones, it is neither zero nor does it drown the base.
_DEVIATION = 0.02

Key = TypeVar("Key")


@dataclass(frozen=True)
class Passes:
    """What is measured.

    Attributes:
        batches: numbers of texts.
        lengths: of each text, in tokens; of a language model, of the prompt.
        rounds: measurements of each variant.
        warm_up: rounds before them that are left out.
        new_tokens: that a language model decodes after each prompt.
        num_adapters: different adapters that the rows of one batch use; 0 for none.
        num_labels: outputs of a task head.
    """

    batches: tuple[int, ...] = (1, 16)
    lengths: tuple[int, ...] = (64, 128)
    rounds: int = 20
    warm_up: int = 3
    new_tokens: int = 16
    num_adapters: int = 8
    num_labels: int = 2

    def __post_init__(self) -> None:
        """Raises `ForecastError`."""
        at_least_one = {"--batches": self.batches, "--lengths": self.lengths, "--rounds": (self.rounds,)}
        at_least_one |= {"--new-tokens": (self.new_tokens,), "--labels": (self.num_labels,)}
        problems = [
            f"{option} {','.join(map(str, values))}: give whole numbers, at least 1 each."
            for option, values in at_least_one.items()
            if not values or min(values) < 1
        ]
        if self.warm_up < 0:
            problems.append(f"--warm-up {self.warm_up}: give a number of rounds, or 0 for none.")
        if self.num_adapters < 0 or self.num_adapters == 1:
            problems.append(
                f"--adapters {self.num_adapters}: give at least 2 that share a batch, or 0 to leave them out; one is "
                f"{UNMERGED}."
            )
        if problems:
            raise ForecastError("\n".join(problems))

    def several_at(self, batch: int) -> str | None:
        """What the variant of several adapters is called; None at a batch that has not a row for each."""
        return f"{self.num_adapters} adapters" if 0 < self.num_adapters <= batch else None


@dataclass(frozen=True)
class Timing:
    """The measurements of one variant in one phase: of a pass over a batch, or in `DECODE` of a token of each text."""

    batch: int
    length: int
    phase: str
    variant: str
    seconds: tuple[float, ...]

    @cached_property
    def quartiles(self) -> tuple[float, float, float]:
        """The lower one, the median and the upper one."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0], self.seconds[0]
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, middle, high

    @property
    def median(self) -> float:
        """In seconds."""
        return self.quartiles[1]


@dataclass(frozen=True)
class Latency:
    """What was measured, and by what.

    Attributes:
        timings: a batch and length after the other, in each a phase after the other.
        dtype: in which everything is held and computed.
        environment: see `harness.measure.environment`.
        logit_change: the largest that the adapter changes a logit of the first batch by.
        merging_error: the largest difference there between merged and unmerged; None where nothing is merged.
        notes: what is not in the table, and why.
    """

    timings: list[Timing]
    dtype: str
    environment: dict[str, Any]
    logit_change: float
    merging_error: float | None
    notes: list[str]

    def ratio_to_base(self, timing: Timing) -> float:
        """The median over that of the base model."""
        same = (timing.batch, timing.length, timing.phase)
        base = next(one for one in self.timings if (one.batch, one.length, one.phase) == same and one.variant == BASE)
        return timing.median / base.median


def measure_latency(
    config: RunConfig, passes: Passes, *, progress: Callable[[str], None] = lambda text: None
) -> Latency:
    """Measures the passes of a run's model.

    Args:
        config: of the run. Everything is held and computed in the type of `trainer.precision`.
        passes: which.
        progress: called with what is measured next.

    Raises:
        ForecastError: a method without an adapter, quantised weights, texts longer than the model reads, and whatever
            keeps the run from being built.
    """
    with explained():
        config = _to_serve(config)
        set_threads(config)
        device = build_accelerator(config).device
        if not config.allow_busy_device:
            require_free_device(device)
        _require_room(config, passes)
        variants = _Variants(config, passes, device)
    measured: list[Timing] = []
    with torch.inference_mode():
        first = _inputs(config, passes, passes.batches[0], passes.lengths[0], device)
        change, error = variants.differences(first)
        for batch in passes.batches:
            models = variants.at(batch)
            for length in passes.lengths:
                progress(f"batch {batch}, length {length}: {', '.join(models)}")
                measured += _measure(config, passes, models, (batch, length), device)
    return Latency(
        measured,
        dtype=str(config.model.dtype),
        environment=environment(device),
        logit_change=change,
        merging_error=error,
        notes=variants.notes,
    )


def _to_serve(config: RunConfig) -> RunConfig:
    """The run's model as it is served: in one type, without dropout. Raises `ForecastError`."""
    method, name = METHODS[config.method.name], config.method.name
    if config.target_layers is None and method.peft is None:
        raise ForecastError(
            f"method={name}: adds no adapter to the base model, so that all variants take the time of the base; choose "
            "method=lora, or a method of the peft package."
        )
    if config.model.quantization is not Quantization.none:
        raise ForecastError(
            f"model.quantization={config.model.quantization}: weights are drawn here, and no drawn weight is "
            "quantised; set model.quantization=none."
        )
    if config.variant.dora and config.trainer.precision is not Precision.fp32:
        raise ForecastError(
            f"trainer.precision={config.trainer.precision}: DoRA takes the lengths of rows in float32, also where the "
            "model is held in less; set trainer.precision=fp32."
        )
    # What it continues has its shapes.
    model = replace(
        base_model(config),
        adapter=None,
        from_sweep=None,
        run=None,
        dropout=0.0,
        dtype=_DTYPES[config.trainer.precision],
    )
    return replace(config, model=model, method=replace(config.method, adapter_dropout=0.0))


def _require_room(config: RunConfig, passes: Passes) -> None:
    """Raises `ForecastError` for texts that are longer than the model reads."""
    limit = _most_tokens(config)
    new = passes.new_tokens if config.dataset.task.is_language else 0
    longest = max(passes.lengths)
    if limit is not None and longest + new > limit:
        texts = f"--lengths {longest} and --new-tokens {new}" if new else f"--lengths {longest}"
        raise ForecastError(f"{texts}: {config.model.name} reads at most {limit} tokens; set less.")


def _most_tokens(config: RunConfig) -> int | None:
    if not is_scratch(config.model):  # its tokenizer is learned from text, and knows no more
        try:
            return max_tokens(config.model, load_tokenizer(config.model))
        except ModelError:  # a model of which there is nothing but its configuration
            pass
    return getattr(read_config(config.model), "max_position_embeddings", None)


# ---------------------------------------------------------------- the variants


class _Variants:
    """The models that are compared, over one base's tensors where they can be.

    Raises what `adapt` raises, and `ForecastError` where several adapters cannot share a batch.
    """

    def __init__(self, config: RunConfig, passes: Passes, device: torch.device) -> None:
        self._config, self._passes, self._device = config, passes, device
        self.notes: list[str] = []
        num_labels = full_batches(config, passes.num_labels).num_labels
        self._base = load_model(
            config.model, num_labels=num_labels, pad_token_id=0, seed=config.seed, with_weights=False
        )
        self._base.model.to(device)  # type: ignore[arg-type]
        self._merged = self._merge()
        is_lora = config.method.name == "lora"
        packs = is_lora and any(map(passes.several_at, passes.batches))
        small = [str(batch) for batch in passes.batches if passes.several_at(batch) is None]
        if passes.num_adapters and not is_lora:
            self.notes.append(f"several adapters in a batch: of method=lora alone, not of {config.method.name}")
        elif passes.num_adapters and small:
            self.notes.append(f"{passes.num_adapters} adapters need as many rows: left out at batch {', '.join(small)}")
        self._adapted = [self._adapt(number) for number in range(passes.num_adapters if packs else 1)]
        self._packs = packs
        for model in self._all():
            model.eval()

    def at(self, batch: int) -> dict[str, nn.Module]:
        """By name, those of which a batch of so many rows can be computed."""
        found: dict[str, nn.Module] = {BASE: self._base.model}
        if self._merged is not None:
            found[MERGED] = self._merged
        found[UNMERGED] = self._adapted[0]
        name = self._passes.several_at(batch)
        if self._packs and name is not None:
            found[name] = self._side_by_side(batch)
        return found

    def differences(self, inputs: Mapping[str, Tensor]) -> tuple[float, float | None]:
        """The largest that the adapter changes a logit by, and that merging does."""
        base, unmerged = (model(**inputs).logits.float() for model in (self._base.model, self._adapted[0]))
        change = float((unmerged - base).abs().max())
        if self._merged is None:
            return change, None
        return change, float((unmerged - self._merged(**inputs).logits.float()).abs().max())

    def _all(self) -> Iterator[nn.Module]:
        yield from (self._base.model, *self._adapted, *([] if self._merged is None else [self._merged]))

    def _side_by_side(self, batch: int) -> nn.Module:
        num = len(self._adapted)
        rows = [batch // num + (number < batch % num) for number in range(num)]
        try:
            return adapters_side_by_side(self._adapted, rows)
        except PackError as error:
            raise ForecastError(
                f"--adapters {num}: adapters of {self._config.model.name} cannot share a batch, because {error}; set "
                "--adapters 0."
            ) from error

    def _adapt(self, number: int) -> PreTrainedModel:
        """The model with a separate adapter, beside the tensors of the base."""
        model = self._with_adapter(cast(PreTrainedModel, copy_over_same_tensors(self._base.model)), number)
        return self._in_one_type(model)

    def _merge(self) -> PreTrainedModel | None:
        """The model with the first adapter in its weights; None, and a note, for a method that does not merge."""
        merges = cast(SavedMethod, find_method_module(self._config.method.name))
        # peft adds to the tensors that it finds; LoRA makes others.
        writes = METHODS[self._config.method.name].peft is not None
        made = copy.deepcopy(self._base.model) if writes else copy_over_same_tensors(self._base.model)
        model = self._with_adapter(cast(PreTrainedModel, made), 0)
        try:
            merges.merge(model)
        except PeftMethodError as error:
            self.notes.append(f"no merged variant: {error}")
            return None
        return self._in_one_type(model)

    def _with_adapter(self, model: PreTrainedModel, number: int) -> PreTrainedModel:
        adapt(model, self._config, self._base.head)
        is_added = is_adapter(model, self._config)
        generator = torch.Generator().manual_seed(self._config.seed + number)
        for name, value in model.named_parameters():
            if is_added(name) and value.is_floating_point():
                drawn = torch.empty(value.shape).normal_(0, _DEVIATION, generator=generator)
                value.data += drawn.to(value)
        return model

    def _in_one_type(self, model: PreTrainedModel) -> PreTrainedModel:
        """Holds also what would train, adapter and head, in the type of the base."""
        dtype = getattr(torch, self._config.model.dtype)
        for value in model.parameters():
            if value.requires_grad:
                value.data = value.data.to(self._device, dtype)
        return model


# ---------------------------------------------------------------- passes


def _inputs(config: RunConfig, passes: Passes, batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """A batch of drawn tokens without padding."""
    sized = replace(
        config,
        dataset=replace(config.dataset, max_length=length),
        trainer=replace(config.trainer, eval_batch_size=batch),
    )
    inputs = dict(next(full_batches(sized, passes.num_labels).val.batches(batch)).inputs)
    inputs.pop("position_ids", None)  # of packed blocks, which are of training
    ids = inputs["input_ids"]
    inputs["attention_mask"] = torch.ones_like(ids)
    # Where every token is the same, a table of embeddings is one row, and a mixture of experts one expert.
    model = read_config(config.model)
    ids[:, :-1] = _drawn_tokens(model, (batch, length - 1), spare=int(ids[0, 0]), seed=config.seed)
    return {name: value.to(device) for name, value in inputs.items()}


def _drawn_tokens(model_config: Any, shape: tuple[int, int], *, spare: int, seed: int) -> Tensor:
    """Token ids but those of padding, beginning and end, in whose place `spare` is."""
    size = model_config.get_text_config().vocab_size
    drawn = torch.randint(size, shape, generator=torch.Generator().manual_seed(seed))
    special = [getattr(model_config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    taken = torch.tensor([0, *(each for each in special if isinstance(each, int))])
    return torch.where(torch.isin(drawn, taken), spare, drawn)


@dataclass(frozen=True)
class _Clock:
    """The time of what is computed alone on a device."""

    queue: DeviceQueue

    def __call__(self, compute: Callable[[], Any]) -> tuple[Any, float]:
        """What it gives, and its seconds; the device has finished it."""
        began = self.queue.mark()
        made = compute()
        return made, self.queue.seconds(began, self.queue.mark())


def _measure(
    config: RunConfig,
    passes: Passes,
    models: Mapping[str, nn.Module],
    shape: tuple[int, int],
    device: torch.device,
) -> list[Timing]:
    """All variants at one batch and length. Raises `ForecastError` where they do not fit into the memory."""
    batch, length = shape
    clock = _Clock(device_queue(device))
    inputs = _inputs(config, passes, batch, length, device)
    measures: dict[str, Callable[[], dict[str, float]]]
    if config.dataset.task.is_language:
        spare = int(inputs["input_ids"][0, 0])
        new = _drawn_tokens(read_config(config.model), (batch, passes.new_tokens), spare=spare, seed=config.seed)
        new = new.to(device)
        measures = {name: partial(_time_generation, model, inputs, new, clock) for name, model in models.items()}
    else:
        measures = {name: partial(_time_forward, model, inputs, clock) for name, model in models.items()}
    try:
        with garbage_collected_before():
            _rounds(measures, passes.warm_up)
            found = _rounds(measures, passes.rounds)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ForecastError(f"--batches {batch} --lengths {length}: out of memory on {device}; set less.") from error
    phases = (PREFILL, DECODE) if config.dataset.task.is_language else (FORWARD,)
    return [Timing(batch, length, phase, name, tuple(found[name][phase])) for phase in phases for name in models]


def orders(names: Sequence[Key], rounds: int) -> Iterator[list[Key]]:
    """The order of each round: begun one further each time, and backwards in every other cycle.

    >>> list(orders("abc", 4))
    [['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'a', 'b'], ['c', 'b', 'a']]
    """
    for number in range(rounds):
        cycle, start = divmod(number, len(names))
        rotated = [*names[start:], *names[:start]]
        yield rotated[::-1] if cycle % 2 else rotated


def _rounds(
    measures: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds by variant and phase, in the order of the rounds."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in measures}
    for order in orders(list(measures), rounds):
        for name in order:
            for phase, seconds in measures[name]().items():
                found[name].setdefault(phase, []).append(seconds)
    return found


def _time_forward(model: nn.Module, inputs: Mapping[str, Tensor], clock: _Clock) -> dict[str, float]:
    clock(lambda: model(**inputs))
    _, seconds = clock(lambda: model(**inputs))
    return {FORWARD: seconds}


def _time_generation(model: nn.Module, inputs: Mapping[str, Tensor], new: Tensor, clock: _Clock) -> dict[str, float]:
    """Prefill of a prompt up to the logits of its last token; then decoding, a token after the other."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def prefill() -> Any:
        return model(**inputs, use_cache=True, **last)

    clock(prefill)
    made, prefilled = clock(prefill)
    cache = getattr(made, "past_key_values", None)
    if cache is None:
        raise ForecastError(f"{type(model).__name__}: gives no cache of keys and values, so that nothing is decoded.")
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    length = inputs["input_ids"].shape[1]

    def decode() -> None:
        for at in range(new.shape[1]):
            step = {"input_ids": new[:, at : at + 1], "attention_mask": mask[:, : length + at + 1]}
            model(**step, past_key_values=cache, use_cache=True, **last)

    _, decoded = clock(decode)
    return {PREFILL: prefilled, DECODE: decoded / new.shape[1]}
