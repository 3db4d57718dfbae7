"""Everything that training needs, loaded and checked: what can be wrong is found before the first step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from harness.chain import EarlierTask, chain_of, load_earlier_tasks, start_head
from harness.config.composing import to_dict
from harness.config.schema import Device, Precision, RunConfig
from harness.config.validation import ConfigError
from harness.content.digests import require_content
from harness.content.files import base_model
from harness.content.identity import Identity, identify
from harness.data.batches import count_steps_per_epoch
from harness.measure.device import require_free_device
from harness.measure.environment import environment
from harness.methods.counts import ParameterCounts, count_parameters
from harness.methods.during_training import DuringTraining
from harness.methods.registry import during_training, is_adapter
from harness.models import configs
from harness.models.compiling import compile_blocks
from harness.models.configs import build_skeleton
from harness.models.loading import (
    BaseModel,
    PreTrainedModel,
    checkpoint_activations,
    load_model,
)
from harness.models.tokenizers import PreTrainedTokenizerBase, check_ends, check_vocabulary, load_tokenizer
from harness.placement.select import Target, summary
from harness.plan import adapt, require_packing
from harness.processes.cores import available_cores
from harness.processes.distributed import Companions
from harness.results.metrics import scores_of
from harness.tasks.families import TaskData, TaskFamily, find_family
from harness.tasks.generation import num_truncated_prompts
from harness.training.known_peaks import KnownPeaks
from harness.training.optimizer import count_steps, require_optimizer


@dataclass
class PreparedRun:
    """Everything that training needs, built and checked."""

    config: RunConfig
    identity: Identity
    accelerator: Accelerator
    family: TaskFamily
    data: TaskData
    also: dict[str, TaskData]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: tuple[str, ...]
    targets: list[Target]
    counts: ParameterCounts
    environment: dict[str, object]
    base: BaseModel
    companions: Companions
    during_training: DuringTraining
    earlier: list[EarlierTask]
    num_packed: Callable[[], int] | None = None
    """Where the process is shared with other runs: how many have trained together so far."""
    known_peaks: KnownPeaks | None = None
    """Where it is, the peak memory that they have measured."""


class KeptData:
    """The dataset of runs that share a process, read once where settings, tokenizer and content of files are equal."""

    def __init__(self) -> None:
        self._kept: tuple[str, TaskData] | None = None
        self._unverified: tuple[str, TaskData] | None = None

    def load(
        self, config: RunConfig, identity: Identity, family: TaskFamily, tokenizer: PreTrainedTokenizerBase
    ) -> TaskData:
        """The data of a run. Raises what `family.load` does."""
        values = to_dict(config)
        parts = [values["dataset"], values["model"], config.trial, identity.content]
        key = json.dumps(parts, sort_keys=True, default=str)
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        self._kept, self._unverified = None, None  # runs of one pack have one dataset; another is not worth its memory
        data = family.load(config.dataset, tokenizer, with_test=not config.trial)
        self._unverified = key, data
        return data

    def keep(self) -> None:
        """Keeps what was loaded last for other runs, once it is known that it has the content it was planned with."""
        if self._unverified is not None:
            self._kept, self._unverified = self._unverified, None


def prepare(config: RunConfig, identity: Identity | None = None, *, kept_data: KeptData | None = None) -> PreparedRun:
    """Loads data and model, applies the method, and checks everything that can be checked before training.

    What was loaded is what `identity` stands for: files that were edited in between raise `ContentError`. With
    `kept_data` runs before this one may have read its dataset.
    """
    identity = identity or identify(config)
    set_threads(config)
    accelerator = build_accelerator(config)
    companions = Companions(accelerator, identity.run_id)
    try:
        return _prepare(config, identity, accelerator, companions, kept_data or KeptData())
    except Exception as error:
        companions.report(error)  # the others find it where they meet
        raise


def _prepare(
    config: RunConfig, identity: Identity, accelerator: Accelerator, companions: Companions, kept_data: KeptData
) -> PreparedRun:
    if not config.allow_busy_device:
        require_free_device(accelerator.device)
    base = base_model(config)
    require_optimizer(config.trainer, accelerator.device)
    tokenizer = load_tokenizer(base)
    too_long = length_problems(config, configs.max_tokens(base, tokenizer))
    if too_long:
        raise ConfigError(too_long)
    family = find_family(config.dataset.task)
    data = kept_data.load(config, identity, family, tokenizer)
    # Their test splits are what is scored of them.
    others = {} if config.trial else config.evaluate_also
    also = {name: find_family(dataset.task).load(dataset, tokenizer) for name, dataset in others.items()}
    loaded = load_model(base, num_labels=data.num_labels, pad_token_id=tokenizer.pad_token_id, seed=config.seed)
    model = loaded.model
    splits = [
        split for found in (data, *also.values()) for split in (found.train, found.val, found.test) if split is not None
    ]

    def used() -> Iterator[torch.Tensor]:
        for split in splits:
            yield from (batch.inputs["input_ids"] for batch in split.batches(config.trainer.eval_batch_size))

    check_vocabulary(base, model, tokenizer, used())
    check_ends(base, model, used())
    require_packing(model.config.model_type, config)
    targets = adapt(model, config, loaded.head)
    start_head(loaded, config, data)
    earlier: list[EarlierTask] = []
    if not config.trial:
        earlier = load_earlier_tasks(config, loaded, tokenizer, num_processes=accelerator.num_processes)
    steps_per_epoch = count_steps_per_epoch(len(data.train), config.trainer.batch_size)
    method = during_training(model, config, count_steps(config.trainer, steps_per_epoch))
    if config.trainer.gradient_checkpointing:
        checkpoint_activations(model)
    compile_blocks(model, config.trainer.compile, accelerator.device)
    # After everything is read, so that an edit while it was read is seen too.
    require_content(config, identity.content)
    kept_data.keep()
    recorded = environment(accelerator.device, num_threads=config.num_threads)
    if accelerator.num_processes > 1:
        recorded |= {"num_processes": accelerator.num_processes, "shard_model": config.shard_model}
    return PreparedRun(
        config=config,
        identity=identity,
        accelerator=accelerator,
        family=family,
        data=data,
        also=also,
        model=model,
        tokenizer=tokenizer,
        head=loaded.head,
        targets=targets,
        counts=_count_parameters(config, loaded, data.num_labels),
        environment=recorded
        | _facts(config, identity, data, also, loaded)
        | ({"placement": summary(targets)} if targets else {}),
        base=loaded,
        companions=companions,
        during_training=method,
        earlier=earlier,
    )


def length_problems(config: RunConfig, max_tokens: int) -> list[str]:
    """What is longer than the model reads."""
    named = {"dataset": config.dataset} | {f"evaluate_also.{name}": also for name, also in config.evaluate_also.items()}
    problems = [
        f"{setting}.max_length={dataset.max_length}: {config.model.name} reads at most {max_tokens} tokens; set at "
        f"most {max_tokens}."
        for setting, dataset in named.items()
        if dataset.max_length > max_tokens
    ]
    if wanted_generation_metrics(config) and config.dataset.generation.max_new_tokens >= max_tokens:
        problems.append(
            f"dataset.generation.max_new_tokens={config.dataset.generation.max_new_tokens}: {config.model.name} reads "
            f"at most {max_tokens} tokens, prompt and text together."
        )
    return problems


def _facts(
    config: RunConfig, identity: Identity, data: TaskData, also: Mapping[str, TaskData], base: BaseModel
) -> dict[str, object]:
    """What a result records of data and model, by its name in `environment`; what does not exist is absent."""
    notes = [note for found in (data, *also.values()) for note in found.notes]
    if wanted_generation_metrics(config):
        num_truncated = num_truncated_prompts(base.model, data.test.prompts(), config.dataset.generation)
        if num_truncated:
            notes.append(
                f"dataset={config.dataset.name}: {num_truncated} test prompts lose their beginning in generation."
            )
    facts: dict[str, object] = {"data_fingerprint": data.fingerprint, "content": identity.content}
    if notes:
        facts["data_notes"] = notes
    if data.positive_class is not None and "f1" in config.dataset.metrics:
        facts["positive_label"] = data.label_names[data.positive_class]
    if base.notes:
        facts["model_notes"] = base.notes
    chain = chain_of(config)
    if chain:
        facts["chain"] = chain
    if data.label_names:
        facts["label_names"] = data.label_names
    return facts


def _count_parameters(config: RunConfig, base: BaseModel, num_labels: int | None) -> ParameterCounts:
    """From shapes: a quantised weight has fewer entries than its matrix, so its model is counted as it was before."""
    if not getattr(base.model, "is_quantized", False):
        return count_parameters(base.model, base.head, is_adapter=is_adapter(base.model, config))
    skeleton = build_skeleton(base_model(config), num_labels=num_labels)
    adapt(skeleton, config, base.head)
    return count_parameters(skeleton, base.head, is_adapter=is_adapter(skeleton, config))


def wanted_generation_metrics(config: RunConfig) -> list[str]:
    """The wanted scores of texts that are generated from test."""
    if config.trial:
        return []
    return [name for name in config.dataset.metrics if name in scores_of(of="generated")]


def set_threads(config: RunConfig) -> None:
    """Gives PyTorch the threads of a run."""
    # PyTorch's own choice knows nothing of a container's quota.
    torch.set_num_threads(config.num_threads or min(torch.get_num_threads(), available_cores()))


def computes_on_gpu(device: Device) -> bool:
    """Whether a run with this `device` computes on a GPU: it asks for one, or takes what there is and finds one."""
    if device is Device.auto:
        return torch.cuda.is_available() or torch.backends.mps.is_available()
    return device is not Device.cpu


def build_accelerator(config: RunConfig) -> Accelerator:
    """The device of a run and the precision that it computes in. Raises `ConfigError` for a device that is not here."""
    if config.device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError(["device=cuda: PyTorch sees no CUDA device here; use device=auto or device=cpu."])
    if config.device is Device.mps and not torch.backends.mps.is_available():
        raise ConfigError(["device=mps: PyTorch sees no MPS device here; use device=auto or device=cpu."])
    # accelerate keeps one state per process; a second run in this process must not inherit the first one's.
    AcceleratorState._reset_state(reset_partial_state=True)
    on_cpu = not computes_on_gpu(config.device)
    precision = config.trainer.precision
    if precision is Precision.fp16 and on_cpu:
        raise ConfigError(["trainer.precision=fp16 needs a GPU; on the CPU use bf16 or fp32."])
    mixed = "no" if precision is Precision.fp32 else str(precision)
    # Also where device=auto finds nothing else: of several processes each would take itself for the only one.
    return Accelerator(cpu=on_cpu, mixed_precision=mixed)
