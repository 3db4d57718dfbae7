"""The methods of the `peft` package: its layers inside our model, and our trainer, measuring and tables around them.

`peft` puts its layers into the model in place, and the model keeps its own class. The `PeftModel` that does so is kept
beside the model, not in it: saving needs it, and AdaLoRA's allocator of ranks.

What is accepted is checked and not believed: exactly the target modules are adapted, exactly the adapter's parameters
train, no weight of the base is changed, and everything that the adapter needs lies inside the model, so that it moves,
is checkpointed and counted with it. A type that does otherwise is refused before training.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from harness.config.schema import AlphaPolicy, Precision, RankConfig, RunConfig
from harness.config.validation import PEFT_FIELDS_OF_THE_RUN
from harness.measure.device import is_out_of_memory
from harness.methods.adapting import check_rank
from harness.methods.counts import is_head
from harness.methods.during_training import DuringTraining, Nothing
from harness.methods.lora import LoRAError, features_of, is_linear
from harness.methods.norms_method import is_norm
from harness.methods.peft_files import ADAPTER_FILE, head_state, is_named_by, save_tensors
from harness.methods.registry import TrainedModel
from harness.models.configs import head_of
from harness.placement.architectures import ARCHITECTURES
from harness.placement.select import Target, layers_there
from harness.results.files import write_json_atomically
from harness.results.methods import METHODS
from harness.results.peft_types import PeftType

logger = logging.getLogger("harness")

RANKS_FILE = "ranks.json"
# peft's own name for the one adapter of a model; in its files it is left out.
_ADAPTER = "default"
_PREFIX = "base_model.model."
# Where a model keeps the PeftModel around it.
_HELD = "_held_by_peft"
# AdaLoRA's number of ranks, a constant of its forward pass, which peft lets the optimizer change and does not save.
_FROZEN = {"ranknum"}
# What peft raises for settings and modules that do not suit a type.
_REFUSALS = (
    *(ValueError, TypeError, ArithmeticError, LookupError, AttributeError, AssertionError),
    *(ImportError, RuntimeError, re.error),  # NotImplementedError is one of the second
)
# Fields of peft's configs that decide nothing in a run here, with what does, or why nothing could.
_WITHOUT_EFFECT = {
    "layers_to_transform": "target_layers.blocks chooses the blocks",
    "layers_pattern": "target_layers.blocks chooses the blocks",
    "target_parameters": "target_layers names modules",
    "use_qalora": "bases of GPTQ are not loaded here",
    "qalora_group_size": "bases of GPTQ are not loaded here",
    "megatron_config": "models are those of transformers",
    "megatron_core": "models are those of transformers",
    "runtime_config": "it moves adapters between devices at inference",
}
# Initialisations that peft makes from data or gradients, in a step before training that no run makes.
_FROM_DATA = ("eva", "lora_ga", "corda", "loftq")


class PeftMethodError(ValueError):
    """A method of the peft package that cannot be run on this model with these settings; the message says why."""


def adapt(model: nn.Module, targets: Sequence[Target], config: RunConfig) -> None:
    """Puts peft's layers into the model. Raises `PeftMethodError` for what the type cannot do."""
    peft = _require_peft(config)
    parts = [str(target) for target in targets if target.rows is not None]
    if parts:
        raise PeftMethodError(
            f"target_layers={config.target_layers.name if config.target_layers else None}: {', '.join(parts[:4])} are "
            f"some of the rows of a module, and peft adapts modules whole; name the module's role (qkv), or use "
            "method=lora."
        )
    target_modules = [target.module for target in targets]
    peft_config = _peft_config(peft, model, target_modules, config)
    _check_named(model, config)
    before = {name: (value, value.data_ptr(), value._version) for name, value in model.named_parameters()}
    is_planned = any(value.is_meta for value in model.parameters())  # then nothing is drawn and nothing allocated
    with _refusals_explained(config), _seeded(config.seed), _noise_left_out(is_planned=is_planned):
        held = peft.PeftModel(model, peft_config, _ADAPTER, low_cpu_mem_usage=is_planned)
    model.__dict__[_HELD] = held
    _check_honoured(model, held, config)
    _check_adapted(model, held, target_modules, config)
    _check_trained(model, held, before, config)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is one of peft's that train."""
    parts = name.split(".")
    return _ADAPTER in parts and any(part.startswith(_parameter_prefixes()) for part in parts)


def adapted_modules(model: nn.Module) -> list[str]:
    """The modules that peft adapted, in the order of the model."""
    targeted = set(_held(model).base_model.targeted_module_names)
    return [name for name, _ in model.named_modules() if name in targeted]


def ranks_of(model: nn.Module) -> dict[str, int]:
    """The rank of each adapted module of a type that has ranks and keeps them; AdaLoRA's change in training."""
    held = _held(model)
    if held.peft_config[_ADAPTER].peft_type.value == "ADALORA":
        return {}
    found = {name: getattr(model.get_submodule(name), "r", None) for name in adapted_modules(model)}
    return {name: ranks[_ADAPTER] for name, ranks in found.items() if isinstance(ranks, dict) and _ADAPTER in ranks}


def during_training(model: nn.Module, config: RunConfig, num_steps: int) -> DuringTraining:
    """AdaLoRA's allocation of ranks; for every other type nothing. Raises `PeftMethodError` for too few steps."""
    if _type_of(config).name != "ADALORA":
        return Nothing()
    settings = _held(model).peft_config[_ADAPTER]
    if settings.tinit + settings.tfinal + 2 > num_steps:
        raise PeftMethodError(
            f"method.peft.tinit={settings.tinit} and tfinal={settings.tfinal}: AdaLoRA takes ranks away between them, "
            f"and the run has {num_steps} steps; both together leave at least 2 of them."
        )
    if config.trainer.precision is Precision.fp16:
        raise PeftMethodError(
            "trainer.precision=fp16: a step that overflows would stay in AdaLoRA's averages for good; use bf16 or fp32."
        )
    return RankAllocation(model, num_steps)


def save(trained: TrainedModel, directory: Path) -> int:
    """Writes adapter and head so that `peft.PeftModel.from_pretrained(base, directory)` loads them."""
    peft = _require_peft(trained.config)
    held = _held(trained.model)
    settings = held.peft_config[_ADAPTER]
    if _type_of(trained.config).name == "ADALORA":
        _save_ranks(trained, settings, directory)
    with _noise_left_out():
        state = peft.get_peft_model_state_dict(held, adapter_name=_ADAPTER, save_embedding_layers=False)
    head = {f"{_PREFIX}{name}": value for name, value in head_state(trained.model, trained.head).items()}
    saved = copy.copy(settings)
    saved.task_type = "CAUSAL_LM" if trained.config.dataset.task.is_language else "SEQ_CLS"
    saved.modules_to_save = list(trained.head) or None
    saved.base_model_name_or_path, saved.revision = trained.base.name, trained.base.revision
    saved.inference_mode = True
    for name, value in vars(saved).items():
        if isinstance(value, set):
            setattr(saved, name, sorted(value))  # sets have another order in every process
    directory.mkdir(parents=True, exist_ok=True)
    saved.save_pretrained(str(directory))
    return save_tensors(_without_aliases(state | head), directory / ADAPTER_FILE)


def load(model: nn.Module, directory: Path, config: RunConfig, *, head: Sequence[str]) -> None:
    """Reads what `save` wrote, by peft itself. Raises `PeftMethodError` where peft cannot."""
    peft = _require_peft(config)
    for name, value in model.named_parameters():
        if is_head(name, head):
            # As it was trained, whatever the base is held in; and a copy, because peft writes into the head of a type
            # that it does not know `modules_to_save` of (trainable tokens).
            value.data = value.data.to(torch.float32, copy=True)
    try:
        with _refusals_explained(config), _seeded(config.seed), _noise_left_out():
            model.__dict__[_HELD] = peft.PeftModel.from_pretrained(model, str(directory), _ADAPTER)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise PeftMethodError(f"method={config.method.name}: peft cannot read {directory}: {error}") from error


def merge(model: nn.Module) -> None:
    """Merges by peft itself. Raises `PeftMethodError` for a type that cannot be merged."""
    held = _held(model)
    kind = str(held.peft_config[_ADAPTER].peft_type.value)
    try:
        with _noise_left_out():
            held.merge_and_unload()
    except _REFUSALS as error:
        raise PeftMethodError(f"{kind} of peft cannot be merged into its base model: {error}") from error
    del model.__dict__[_HELD]


# ---------------------------------------------------------------- peft's config


def _require_peft(config: RunConfig) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise PeftMethodError(
            f"method={config.method.name} needs the package peft: pip install 'lora-harness[peft]', or "
            "pip install -c constraints.txt '.[peft]' in a checkout."
        )
    import peft

    return peft


def _type_of(config: RunConfig) -> PeftType:
    kind = METHODS[config.method.name].peft
    assert kind is not None
    return kind


def _peft_config(peft: Any, model: nn.Module, target_modules: Sequence[str], config: RunConfig) -> Any:
    """The config of the type as peft has it, from the run's settings."""
    kind = _type_of(config)
    config_class = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind.name)
    if config_class is None:
        raise PeftMethodError(f"method={config.method.name}: peft {peft.__version__} has no {kind.name}; update it.")
    known = {field.name for field in dataclasses.fields(config_class) if field.init}
    settable = sorted(known - {"peft_type", *PEFT_FIELDS_OF_THE_RUN} | ({"rank_pattern"} & known))
    for name, value in config.method.peft.items():
        if name not in known:
            raise PeftMethodError(
                f"method.peft.{name}={value}: {config_class.__name__} of peft {peft.__version__} has no such field; it "
                f"has {', '.join(settable)}."
            )
    _check_values(config_class, config)
    values: dict[str, Any] = dict(config.method.peft)
    modules = dict(model.named_modules())
    if config.target_layers is not None:
        values["target_modules"] = list(target_modules)
        if "fan_in_fan_out" in known:
            are_transposed = {type(modules[name]).__name__ == "Conv1D" for name in target_modules}
            values.setdefault("fan_in_fan_out", are_transposed == {True})
    if config.rank is not None:
        values |= _rank_values(kind, config.rank)
    if kind.name == "IA3" and config.target_layers is not None:
        values.setdefault("feedforward_modules", _feedforward(model, target_modules))
    if kind.name == "LN_TUNING":
        values.setdefault("target_modules", _norms(model, config))
    if kind.name == "ADALORA":
        if "init_r" not in values:
            # The paper's 1.5 (arXiv 2303.10512, section 4), which peft's defaults of 12 and 8 are as well.
            values["init_r"] = -(-3 * values["target_r"] // 2)
        # The number of steps is known when the data are; `during_training` sets it.
        values["total_step"] = values.get("tinit", 0) + values.get("tfinal", 0) + 2
        _check_allocation(values)
    if kind.name == "TRAINABLE_TOKENS":
        _check_tokens(model, values.get("token_indices"))
    # A householder reflection is of a vector of the input: more than it has entries cannot differ.
    has_largest = kind.alpha is not None or kind.name == "HRA"
    largest = values.get("init_r", values.get(kind.rank or "r")) if has_largest else None
    for name in target_modules if isinstance(largest, int) else ():
        try:
            check_rank(modules[name], largest)
        except LoRAError as error:
            raise PeftMethodError(f"method={config.method.name}: {name}: {error}") from None
    with _refusals_explained(config), _noise_left_out():
        return config_class(**values)


def _check_values(config_class: Any, config: RunConfig) -> None:
    """Raises `PeftMethodError` for fields that decide nothing here, or whose values are of another type."""
    hints = get_type_hints(config_class)
    for name, value in config.method.peft.items():
        given = f"method.peft.{name}={value}"
        if isinstance(value, str) and not _takes_text(hints.get(name, Any)):
            raise PeftMethodError(f"{given}: {config_class.__name__} has no text there, but a number, list or mapping.")
        is_default = value in (None, False)
        beside_targets = name not in ("layers_to_transform", "layers_pattern") or config.target_layers is not None
        if name in _WITHOUT_EFFECT and not is_default and beside_targets:
            raise PeftMethodError(f"{given}: decides nothing here: {_WITHOUT_EFFECT[name]}; leave it out.")
        if name == "init_lora_weights" and str(value).lower().startswith(_FROM_DATA):
            raise PeftMethodError(
                f"{given}: peft makes this from data in a step of its own, which a run does not make; choose true, "
                "false, gaussian, orthogonal or olora, or another type."
            )
        if name == "r" and _type_of(config).name == "ADALORA":
            raise PeftMethodError(
                f"{given}: AdaLoRA reads rank.rank, its target, and method.peft.init_r; leave it out."
            )


def _takes_text(hint: Any) -> bool:
    """Whether an annotation allows a text."""
    if hint in (str, Any) or isinstance(hint, str):
        return True
    if isinstance(hint, type) and issubclass(hint, str):
        return True
    if get_origin(hint) is Literal:
        return any(isinstance(each, str) for each in get_args(hint))
    return get_origin(hint) in (Union, UnionType) and any(_takes_text(each) for each in get_args(hint))


def _check_allocation(values: Mapping[str, Any]) -> None:
    """Raises `PeftMethodError` for a plan of ranks that AdaLoRA cannot follow."""
    for name, least in (("deltaT", 1), ("tinit", 0), ("tfinal", 0), ("init_r", values["target_r"])):
        value = values.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            words = f"the rank that is to be left ({least})" if name == "init_r" else str(least)
            raise PeftMethodError(f"method.peft.{name}={value}: must be a whole number of at least {words}.")


def _check_tokens(model: nn.Module, tokens: Any) -> None:
    """Raises `PeftMethodError` for anything but a list of tokens that the model has."""
    num_tokens = cast(Any, model).get_input_embeddings().num_embeddings
    named = f"method.peft.token_indices={tokens}"
    is_list = isinstance(tokens, list) and tokens and all(type(token) is int for token in tokens)
    if not is_list or not all(0 <= token < num_tokens for token in tokens):
        raise PeftMethodError(f"{named}: must be a list of tokens from 0 to {num_tokens - 1}, as [0,5].")


def _rank_values(kind: PeftType, rank: RankConfig) -> dict[str, Any]:
    """Rank and alpha under the type's names. Its scaling is alpha / rank, so rsLoRA's is another alpha."""
    assert kind.rank is not None and kind.alpha is not None
    is_rslora = rank.alpha_policy is AlphaPolicy.rslora
    alpha = rank.scaling * rank.rank if is_rslora else rank.effective_alpha
    return {kind.rank: rank.rank, kind.alpha: int(alpha) if alpha == int(alpha) else alpha}


def _check_named(model: nn.Module, config: RunConfig) -> None:
    """Raises `PeftMethodError` where `method.peft.target_modules` names something that is not there.

    `peft` itself is content with one name of several.
    """
    named = config.method.peft.get("target_modules")
    names = [name for name, _ in model.named_modules()]
    absent = [
        each
        for each in (named if isinstance(named, list) else [])
        if not any(name == each or name.endswith(f".{each}") for name in names)
    ]
    if (
        isinstance(named, str)
        and named.lower() != "all-linear"
        and not any(re.fullmatch(named, name) for name in names)
    ):
        absent = [named]
    if absent:
        linear = {name: features_of(module) for name, module in model.named_modules() if is_linear(module)}
        shown = ", ".join(map(str, absent))
        raise PeftMethodError(
            f"method.peft.target_modules={named}: no module's name ends in {shown}, or matches it whole where it is a "
            f"text and no list. {layers_there(linear)}"
        )


def _feedforward(model: nn.Module, target_modules: Sequence[str]) -> list[str]:
    """Those of the targets whose input is scaled, and not their output: the MLP's second matrix (arXiv 2205.05638)."""
    known = ARCHITECTURES.get(cast(Any, model).config.model_type)
    if known is None:
        return []
    patterns = [
        rf"{stack.block_pattern}\.{re.escape(stack.projections['down'])}"
        for stack in known.stacks.values()
        if "down" in stack.projections
    ]
    return [name for name in target_modules if any(re.fullmatch(pattern, name) for pattern in patterns)]


def _norms(model: nn.Module, config: RunConfig) -> list[str]:
    """The normalisation layers of the base: peft knows those of a few model types alone."""
    head = head_of(model, language_model=config.dataset.task.is_language)
    return [name for name, module in model.named_modules() if is_norm(module) and not is_head(f"{name}.", head)]


# ---------------------------------------------------------------- putting it into the model


def _held(model: nn.Module) -> Any:
    return model.__dict__[_HELD]


@cache
def _parameter_prefixes() -> tuple[str, ...]:
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    return tuple(PEFT_TYPE_TO_PREFIX_MAPPING.values())


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Everything drawn inside follows from the seed, and what is drawn later does not depend on it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _refusals_explained(config: RunConfig) -> Iterator[None]:
    try:
        yield
    except _REFUSALS as error:
        if is_out_of_memory(error):
            raise
        text = str(error) or type(error).__name__
        raise PeftMethodError(f"method={config.method.name}: peft refuses it: {text}") from error


# Said of what is set here on purpose, or of names inside transformers.
_NOISE = (
    "fan_in_fan_out",
    "is_gradient_checkpointing",
    "rank_pattern keys did not match any targeted module",  # AdaLoRA's are of parameters
)


@contextmanager
def _noise_left_out(*, is_planned: bool = False) -> Iterator[None]:
    """What peft warns of is logged, but for what this module makes it warn of, and for what is only planned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        if not is_planned and not any(noise in text for noise in _NOISE):
            logger.warning("peft: %s", text)


def _check_honoured(model: nn.Module, held: Any, config: RunConfig) -> None:
    """Where peft changes a field to what it can do and warns, there is no run: a run is what its settings say."""
    settings = held.peft_config[_ADAPTER]
    adapted = set(held.base_model.targeted_module_names)
    for name, wanted in config.method.peft.items():
        if name in ("rank_pattern", "alpha_pattern") and isinstance(wanted, Mapping):
            idle = [key for key in wanted if not any(is_named_by(key, each) for each in adapted)]
            if idle:
                raise PeftMethodError(
                    f"method.peft.{name}={wanted}: {', '.join(idle)} is the end of no adapted module's name; those are "
                    f"{_some({each.rpartition('.')[2] for each in adapted})}."
                )
        found = getattr(settings, name)
        if name == "boft_n_butterfly_factor":  # peft takes 1 without its extension for CUDA, and leaves its config
            found = next(len(value) for each, value in model.named_parameters() if ".boft_R." in each)
        is_same = set(wanted) == found if isinstance(found, set) and isinstance(wanted, list) else wanted == found
        if not is_same:
            raise PeftMethodError(
                f"method.peft.{name}={wanted}: peft makes {found} of it here; set that, or leave it out."
            )


def _check_adapted(model: nn.Module, held: Any, target_modules: Sequence[str], config: RunConfig) -> None:
    adapted = set(held.base_model.targeted_module_names)
    if config.target_layers is not None and adapted != set(target_modules):
        differing = sorted(adapted ^ set(target_modules))
        raise PeftMethodError(
            f"method={config.method.name}: of the target layers peft adapts other modules; it differs in "
            f"{', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''}."
        )
    head = head_of(model, language_model=config.dataset.task.is_language)
    in_head = sorted(name for name in adapted if is_head(f"{name}.", head))
    if in_head:
        raise PeftMethodError(
            f"method.peft.target_modules={config.method.peft.get('target_modules')}: {_some(in_head)} is in the task "
            "head, which is trained whole; name modules of the base."
        )


def _check_trained(
    model: nn.Module, held: Any, before: Mapping[str, tuple[Tensor, int, int]], config: RunConfig
) -> None:
    """Exactly the adapter trains, the base is as it was, and all that the adapter needs is inside the model."""
    name = config.method.name
    trained = {each for each, value in model.named_parameters() if value.requires_grad}
    trained = {each for each in trained if _FROZEN.isdisjoint(each.split("."))}
    adapter = {each for each, _ in model.named_parameters() if is_adapter(each)}
    if trained - adapter:
        raise PeftMethodError(
            f"method={name}: its settings train {_some(trained - adapter)} of the base, which an adapter leaves as it "
            "is (method.peft.bias=none; method=lora trains biases with variant.bias)."
        )
    if not adapter:
        raise PeftMethodError(
            f"method={name}: peft adds nothing that trains to {_some(held.base_model.targeted_module_names)}."
        )
    if adapter - trained:
        raise PeftMethodError(f"method={name}: its settings freeze {_some(adapter - trained)}.")
    after = {id(value) for value in model.parameters()}
    changed = [
        each
        for each, (value, address, version) in before.items()
        if id(value) not in after or value.data_ptr() != address or value._version != version
    ]
    if changed:
        raise PeftMethodError(
            f"method={name}: its settings change weights of the base, such as {_some(changed)}, so that what is saved "
            "would not fit the base model; choose another initialisation."
        )
    inside = {id(value) for value in (*model.parameters(), *model.buffers())}
    outside = [each for each, value in (*held.named_parameters(), *held.named_buffers()) if id(value) not in inside]
    if outside:
        raise PeftMethodError(f"method={name}: it keeps {_some(outside)} outside the model, where nothing trains it.")


def _some(names: Any) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those that share their storage with another copied: safetensors refuses to write them."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return found


# ---------------------------------------------------------------- AdaLoRA


class RankAllocation:
    """AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) at the steps of training.

    After each step peft's allocator updates the importance of every singular value and takes the least important ones
    away, until `target_r` are left a module on average; to the loss comes how far A and B are from orthogonal.
    """

    def __init__(self, model: nn.Module, num_steps: int) -> None:
        self._model = model
        self._tuner = _held(model).base_model
        self._allocator = self._tuner.rankallocator
        self._settings = _held(model).peft_config[_ADAPTER]
        self._allocator.set_total_step(num_steps)

    def add_to_loss(self, loss: Tensor, *, share: float) -> Tensor:
        """Adds `orth_reg_weight` times the mean over all A and B of `|A A^T - 1|` and `|B^T B - 1|` (Frobenius)."""
        distances = []
        for name, value in self._model.named_parameters():
            if is_adapter(name) and (".lora_A." in name or ".lora_B." in name):
                product = value @ value.T if ".lora_A." in name else value.T @ value
                distances.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
        return loss + share * self._settings.orth_reg_weight * torch.stack(distances).mean().to(loss.device)

    def stepped(self, step: int) -> None:
        """Updates the importances from the gradients of the step, and takes ranks away."""
        self._tuner.update_and_allocate(step)

    def state(self) -> dict[str, Tensor]:
        """The averages of importance, and which singular values are left."""
        state = {
            f"{kind}/{name}": value
            for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc")
            for name, value in getattr(self._allocator, kind).items()
        }
        pattern = self._settings.rank_pattern or {}
        return state | {f"rank_pattern/{name}": torch.tensor(kept) for name, kept in pattern.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` returned."""
        self._allocator.reset_ipt()
        parameters = dict(self._model.named_parameters())
        pattern: dict[str, list[bool]] = {}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind == "rank_pattern":
                pattern[name] = value.tolist()
            else:
                getattr(self._allocator, kind)[name] = value.to(parameters[name].device)
        self._settings.rank_pattern = pattern or None


def _save_ranks(trained: TrainedModel, settings: Any, directory: Path) -> None:
    """Writes the rank that each module has at the saved step, and makes peft save no more than that."""
    parameters = dict(trained.model.named_parameters())
    left = {
        name: (value.detach() != 0).flatten().tolist()
        for name, value in parameters.items()
        if f".lora_E.{_ADAPTER}" in name
    }
    ranks = {name.partition(".lora_E.")[0]: sum(kept) for name, kept in left.items()}
    per_rank = {
        module: sum(parameters[f"{module}.lora_{part}.{_ADAPTER}"].numel() for part in "AEB") // settings.init_r
        for module in ranks
    }
    settings.rank_pattern = left
    write_json_atomically(
        directory / RANKS_FILE,
        {
            "initial_rank": settings.init_r,
            "target_rank": settings.target_r,
            "ranks": ranks,
            "num_adapter_params_at_start": sum(settings.init_r * each for each in per_rank.values()),
            "num_adapter_params_at_end": sum(ranks[module] * each for module, each in per_rank.items()),
        },
    )
