"""Which run a config is: its scientific settings and the content that it reads, never a path or a name of a sweep.

`identify` is called once, where a run is planned or begins; what it returns is carried from there as a `PlannedRun`.
What loads the content compares it with `Identity.content`, so that numbers cannot end up under the id of other data.
"""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from harness.config.schema import DatasetConfig, ModelConfig, RunConfig, default_of
from harness.content.digests import find_content, is_pinned, pinned_names
from harness.content.files import continued
from harness.placement.select import canonical_projections, canonical_stacks
from harness.results.effects import (
    DATA_SOURCE,
    MODEL_SOURCE,
    STARTING_POINT,
    canonical_blocks,
    is_setting_without_effect,
)


@dataclass(frozen=True)
class Identity:
    """Names of a run and of its cell, and the content that they stand for (`harness.content.digests.find_content`)."""

    run_id: str
    cell_id: str
    content: dict[str, str]


@dataclass(frozen=True)
class PlannedRun:
    """A config, and the identity that it was planned with."""

    config: RunConfig
    identity: Identity

    @property
    def run_id(self) -> str:
        """Identity of the run."""
        return self.identity.run_id


def planned(config: RunConfig) -> PlannedRun:
    """The config with its identity as it is now. Raises what `identify` raises."""
    return PlannedRun(config, identify(config))


def identify(config: RunConfig) -> Identity:
    """The identity of a run, from its settings and the content of what they name.

    `run_id` is `<readable slug>-s<seed>-<8 hex>`, `cell_id` the same without the seed; names for humans, nothing is
    parsed out of them. Raises `DataError` or `ModelError` where content that is named does not exist.
    """
    content = find_content(config)
    values = scientific(config, content)
    slug = _slug(config)
    run_id = f"{slug}-s{config.seed}-{_hash(values)}"
    del values["seed"]
    if config.model.from_sweep is not None:
        # Each seed continues its own run: the cell is that of the cell which it continues.
        kept = {name: value for name, value in values["model"].items() if name not in ("adapter", "heads", "content")}
        values["model"] = {**kept, "continues": _continued_cell(config)}
    return Identity(run_id, f"{slug}-{_hash(values)}", content)


def _continued_cell(config: RunConfig) -> str:
    source = continued(config)
    assert source is not None and source.result is not None
    return source.result.cell_id


def scientific(config: RunConfig, content: Mapping[str, str]) -> dict[str, Any]:
    """What decides a run's numbers: settings, and digests where settings name local files."""
    values = _scientific_fields(config, "")
    values["dataset"] = _with_content(values["dataset"], config.dataset, "dataset", content)
    also = values.get("evaluate_also", {})
    for name, dataset in config.evaluate_also.items():
        also[name] = _with_content(also[name], dataset, f"evaluate_also.{name}", content)
    values["model"] = _model_with_content(values["model"], config.model, content)
    if config.target_layers is not None:
        target_layers = values["target_layers"]
        target_layers["blocks"] = canonical_blocks(config.target_layers.blocks)
        if "stacks" in target_layers:
            target_layers["stacks"] = canonical_stacks(config.target_layers.stacks)
            if target_layers["stacks"] == "all":  # its default, spelled out
                del target_layers["stacks"]
        target_layers["projections"] = canonical_projections(config.target_layers.projections)
    if config.rank is not None and config.rank.pattern:
        # The narrower of two keys decides, in whatever order they stand.
        values["rank"]["pattern"] = dict(sorted(config.rank.pattern.items()))
    return values


def _with_content(
    values: dict[str, Any], config: DatasetConfig, setting: str, content: Mapping[str, str]
) -> dict[str, Any]:
    template = content.get(f"{setting}.chat_template")
    if template is not None:
        values["chat_template"] = {"sha256": template}
    if config.path is None and (config.asset is not None or config.hub_id is not None):
        return values
    names = pinned_names(config, setting, content)
    if names is not None:
        # A copy of an asset is that asset.
        return {**values, "path": None, **{f"{split}_file": names.get(split) for split in ("train", "val", "test")}}
    kept = {name: value for name, value in values.items() if name not in DATA_SOURCE}
    digests = {name: content.get(f"{setting}.{name}") for name in ("train", "val", "test")}
    return {**kept, "content": {name: digest for name, digest in digests.items() if digest is not None}}


def _model_with_content(values: dict[str, Any], config: ModelConfig, content: Mapping[str, str]) -> dict[str, Any]:
    values = {name: value for name, value in values.items() if name not in STARTING_POINT}
    for name in ("adapter", "heads"):
        if f"model.{name}" in content:
            values[name] = {"content": content[f"model.{name}"]}
    if config.path is not None or config.run is not None or (config.from_sweep and "adapter" not in values):
        if is_pinned(config, content):
            return {**values, "path": None}
        kept = {name: value for name, value in values.items() if name not in MODEL_SOURCE}
        return {**kept, "content": content["model"]}
    if config.scratch is not None and config.scratch.path is not None:
        scratch = {name: value for name, value in values["scratch"].items() if name not in ("path", "file")}
        return {**values, "scratch": {**scratch, "content": content["model.scratch"]}}
    return values


def _scientific_fields(node: Any, prefix: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    schema: type = type(node)
    for item in fields(node):
        name = f"{prefix}{item.name}"
        if is_setting_without_effect(name):
            continue
        value = getattr(node, item.name)
        if isinstance(value, int) and not isinstance(value, bool) and _is_float(schema, item.name):
            value = float(value)
        values[item.name] = _scientific_value(value, name)
        if item.metadata.get("added_later") and values[item.name] == _scientific_value(default_of(item), name):
            del values[item.name]
    return values


@cache
def _is_float(schema: type, name: str) -> bool:
    hint = typing.get_type_hints(schema)[name]
    return float in (hint, *typing.get_args(hint))


def _scientific_value(value: Any, name: str) -> Any:
    if is_dataclass(value):
        return _scientific_fields(value, f"{name}.")
    if isinstance(value, dict):
        entries = {key: _scientific_value(entry, f"{name}.{key}") for key, entry in value.items()}
        # JSON objects are hashed in the order of their keys; here the first is special.
        return {"order": list(value), **entries} if len(value) > 1 else entries
    return value + 0.0 if isinstance(value, float) else value  # one zero


def _hash(values: dict[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def _slug(config: RunConfig) -> str:
    parts = [config.model.name, config.dataset.name, str(config.method.name)]
    if config.rank is not None:
        parts.append(f"r{config.rank.rank}")
    if config.target_layers is not None:
        parts.append(config.target_layers.name)
    if config.variant.name != "plain":
        parts.append(config.variant.name)
    parts.append(f"lr{config.trainer.learning_rate:g}")
    return "-".join(parts)
