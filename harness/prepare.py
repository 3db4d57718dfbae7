"""Everything that training needs, loaded and checked: what can be wrong is found before the first step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from harness.config.schema import Device, Precision, RunConfig
from harness.config.validation import ConfigError
from harness.content.digests import require_content
from harness.content.files import base_model
from harness.content.identity import Identity, identify
from harness.data.labelled import TextData, load_data
from harness.data.language import LanguageData, load_language_data
from harness.measure.device import require_free_device
from harness.measure.environment import environment
from harness.methods.counts import ParameterCounts, count_parameters
from harness.models import configs
from harness.models.configs import build_skeleton
from harness.models.loading import (
    BaseModel,
    PreTrainedModel,
    checkpoint_activations,
    load_model,
)
from harness.models.tokenizers import PreTrainedTokenizerBase, check_vocabulary, load_tokenizer
from harness.plan import adapt, require_packing
from harness.processes.cores import available_cores
from harness.processes.distributed import Companions
from harness.results.metrics import scores_of
from harness.tasks.generation import num_cut_prompts


@dataclass
class PreparedRun:
    """Everything that training needs, built and checked."""

    config: RunConfig
    identity: Identity
    accelerator: Accelerator
    data: TextData | LanguageData
    also: dict[str, LanguageData]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: tuple[str, ...]
    target_modules: list[str]
    environment: dict[str, object]
    base: BaseModel
    companions: Companions


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
    tokenizer = load_tokenizer(base)
    max_tokens = configs.max_tokens(base, tokenizer)
    named = {"dataset": config.dataset} | {f"evaluate_also.{name}": also for name, also in config.evaluate_also.items()}
    too_long = [
        f"{setting}.max_length={dataset.max_length}: {config.model.name} reads at most {max_tokens} tokens."
        for setting, dataset in named.items()
        if dataset.max_length > max_tokens
    ]
    if wanted_generation_metrics(config) and config.dataset.generation.max_new_tokens >= max_tokens:
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
    loaded = load_model(base, num_labels=num_labels, pad_token_id=tokenizer.pad_token_id, seed=config.seed)
    model = loaded.model
    splits = [split for found in (data, *also.values()) for split in (found.train, found.val, found.test)]
    used = (batch.inputs["input_ids"] for split in splits for batch in split.batches(config.trainer.eval_batch_size))
    check_vocabulary(base, model, tokenizer, used)
    require_packing(model.config.model_type, config)
    target_modules = adapt(model, config, loaded.head)
    if config.trainer.gradient_checkpointing:
        checkpoint_activations(model)
    # After everything is read, so that an edit while it was read is seen too.
    require_content(config, identity.content)
    recorded = environment(accelerator.device, num_threads=config.num_threads)
    recorded["data_fingerprint"] = data.fingerprint
    recorded["content"] = identity.content
    if accelerator.num_processes > 1:
        recorded |= {"num_processes": accelerator.num_processes, "shard_model": config.shard_model}
    notes = [note for found in (data, *also.values()) for note in found.notes]
    if isinstance(data, LanguageData) and wanted_generation_metrics(config):
        num_cut = num_cut_prompts(model, data.test.prompts(), config.dataset.generation)
        if num_cut:
            notes.append(f"dataset={config.dataset.name}: {num_cut} test prompts lose their beginning in generation.")
    if notes:
        recorded["data_notes"] = notes
    if isinstance(data, TextData) and data.positive_class is not None and "f1" in config.dataset.metrics:
        recorded["positive_label"] = data.label_names[data.positive_class]
    if loaded.notes:
        recorded["model_notes"] = loaded.notes
    if class_names(data):
        recorded["label_names"] = class_names(data)
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


def parameter_counts(prepared: PreparedRun) -> ParameterCounts:
    """From shapes: a quantised weight has fewer entries than its matrix, so its model is counted as it was before."""
    if not getattr(prepared.model, "is_quantized", False):
        return count_parameters(prepared.model, prepared.head)
    config = prepared.config
    num_labels = None if config.dataset.task.is_language else prepared.model.config.num_labels
    skeleton = build_skeleton(base_model(config), num_labels=num_labels)
    adapt(skeleton, config, prepared.head)
    return count_parameters(skeleton, prepared.head)


def wanted_generation_metrics(config: RunConfig) -> list[str]:
    """The wanted scores of generated texts."""
    return [name for name in config.dataset.metrics if name in scores_of(of="generated")]


def class_names(data: TextData | LanguageData) -> list[str]:
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
