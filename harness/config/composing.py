"""From what Hydra composed, or from a recorded config, to a validated `RunConfig`, and back to JSON types.

A config is validated here, once, where it enters; past this module no DictConfig exists.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from harness.config.folders import CONF_DIR
from harness.config.schema import DatasetConfig, MethodConfig, RunConfig
from harness.config.validation import ConfigError, find_problems
from harness.results.methods import ANY_PEFT, METHODS
from harness.results.peft_types import PEFT_TYPES


def register() -> None:
    """Puts the schema where `conf/config.yaml` finds it."""
    schema = OmegaConf.structured(RunConfig)
    # peft knows the names of its fields, and says so where one does not exist: here each is accepted without a `+`.
    OmegaConf.set_struct(schema.method.peft, False)
    ConfigStore.instance().store(name="schema", node=schema)


def compose(overrides: list[str]) -> DictConfig:
    """What Hydra composes from overrides, without running anything. Raises what Hydra and OmegaConf raise."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        return hydra.compose("config", overrides)


def from_composed(composed: DictConfig) -> RunConfig:
    """Turns what Hydra composed into a validated `RunConfig`.

    Raises `ConfigError` for unknown keys, wrong types and every problem that `find_problems` sees.
    """
    if _is_of_schema(composed, RunConfig):
        try:
            return _checked(cast(RunConfig, OmegaConf.to_object(composed)))
        except OmegaConfBaseException:
            pass  # below, with the words that name it
    plain = OmegaConf.to_container(composed, resolve=False)
    if not isinstance(plain, dict):
        raise ConfigError([f"a config is a mapping, got {type(plain).__name__}"])
    return _validated(cast(dict[str, Any], plain))


def _is_of_schema(node: Any, schema: Any) -> bool:
    """Whether a composed node was merged into its schema and has exactly the settings of it.

    OmegaConf has then checked and converted every value, which an override cannot replace by one of another type. What
    `+stray.key=1` added is of no schema: merging into a fresh one, at ten times the cost, names it.
    """
    if not isinstance(node, DictConfig) or node._metadata.object_type is not schema:
        return False
    settings = cast(dict[str, Any], node._content)
    if settings.keys() != {field.name for field in fields(schema)}:
        return False
    for child in settings.values():
        if isinstance(child, DictConfig) and isinstance(child._content, dict):
            kind, of_items = child._metadata.ref_type, child._metadata.element_type
            if is_dataclass(kind) and not _is_of_schema(child, kind):
                return False
            if is_dataclass(of_items) and not all(_is_of_schema(item, of_items) for item in child._content.values()):
                return False
    return True


def from_dict(values: dict[str, Any]) -> RunConfig:
    """The `RunConfig` with these values over the schema's defaults, validated. Raises `ConfigError`.

    Texts are taken literally, unlike in what Hydra composes: a config that was resolved once may hold `${...}`.
    """
    return _validated(cast(dict[str, Any], _without_interpolation(values)))


def dataset_from_dict(values: dict[str, Any]) -> DatasetConfig:
    """A recorded `dataset` of a config that was validated then. Raises `ConfigError` for what is no setting now."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(DatasetConfig), _without_interpolation(values))
        return cast(DatasetConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError([f"dataset.{explain_omegaconf(error)}"]) from error


def _without_interpolation(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_interpolation(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_interpolation(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    return value


@functools.cache  # half of what a config costs; merging copies it
def _schema() -> DictConfig:
    return cast(DictConfig, OmegaConf.structured(RunConfig))


def _validated(values: dict[str, Any]) -> RunConfig:
    try:
        merged = OmegaConf.merge(_schema(), values)
        return _checked(cast(RunConfig, OmegaConf.to_object(merged)))
    except OmegaConfBaseException as error:
        raise ConfigError([explain_omegaconf(error)]) from error


def _checked(config: RunConfig) -> RunConfig:
    config.method = _by_its_type(config.method)
    problems = find_problems(config)
    if problems:
        raise ConfigError(problems)
    return config


def _by_its_type(method: MethodConfig) -> MethodConfig:
    """One spelling of a method of the `peft` package, and with it one id: the name says the type.

    What cannot be spelled so is left as it is, for `find_problems` to explain.
    """
    if not method.peft:
        return method
    settings = {name: method.peft[name] for name in sorted(method.peft)}
    named = str(settings.get("peft_type", "")).upper()
    known = PEFT_TYPES.get(named)
    if known is not None and known.method in METHODS and method.name in (ANY_PEFT, known.method):
        del settings["peft_type"]
        return replace(method, name=known.method, peft=settings)
    return replace(method, peft=settings)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as JSON types, verbatim: what `config.yaml`, `result.json` and W&B hold."""
    return cast(dict[str, Any], json.loads(json.dumps(asdict(config))))


def explain_omegaconf(error: OmegaConfBaseException) -> str:
    """One sentence for what OmegaConf did not accept: the setting, what is wrong, and the names that exist."""
    first_line = str(error).splitlines()[0]
    key = error.full_key
    if not key:
        return first_line
    if key == "sweeps":
        return "sweeps: a sweep file sets the run's own settings; `# @package _global_` must be its first line."
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
