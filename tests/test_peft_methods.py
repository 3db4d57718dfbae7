"""The methods of the `peft` package: every type that the installed one has runs as any method does, or is refused."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from harness import run as run_module
from harness.config.composing import from_dict
from harness.config.schema import RunConfig
from harness.content.files import base_model
from harness.methods import peft_method
from harness.models.loading import load_model
from harness.plan import plan
from harness.prepare import PreparedRun, prepare
from harness.results.methods import METHODS
from harness.results.peft_types import PEFT_TYPES, PeftType
from harness.results.schema import RunResult, Status
from harness.run import run

Values = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent

# What a type needs to fit matrices of 64 and 128 features, or has no default for.
OF_TYPE: dict[str, Values] = {
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 50},
    "OFT": {"oft_block_size": 16},
    "ROAD": {"group_size": 32},
    "TRAINABLE_TOKENS": {"token_indices": [36, 68, 87]},
    "UNILORA": {"theta_d_length": 64},
    "VBLORA": {"num_vectors": 16, "vector_length": 16},
    "WAVEFT": {"n_frequency": 50},
    "VERA": {"r": 16},
    "PVERA": {"r": 16},
}
USABLE = [name for name, kind in PEFT_TYPES.items() if not kind.refused]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with labels and lines of text."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [f"{('apple pear', 'iron zinc')[n % 2]} {n},{('fruit', 'metal')[n % 2]}" for n in range(24)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows, ""]))
    (folder / "lines.txt").write_text("\n".join(f"{n} comes before {n + 1}" for n in range(24)))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def values_of(folder: Path, runs_dir: Path, /, *, model: str = "bert", **changes: Any) -> Values:
    is_language = model != "bert"
    values: Values = {
        "model": {"name": f"tiny_{model}", "tiny": model},
        "dataset": {"name": "rows", "train_file": str(folder / "rows.csv"), "max_length": 24},
        "method": {},
        "target_layers": {"name": "all", "projections": ["all"]},
        # Every step has all rows, so that the loss falls as surely as it can.
        "trainer": {"learning_rate": 2e-3, "max_steps": 6, "batch_size": 24, "warmup_fraction": 0},
        "tracking": {"wandb": "disabled", "progress": False, "log_every": 1},
        "runs_dir": str(runs_dir),
        "device": "cpu",
    }
    if is_language:
        values["dataset"] |= {"train_file": str(folder / "lines.txt"), "task": "causal_lm"}
        values["dataset"] |= {"metrics": [], "best_metric": "nll"}
    for name, value in changes.items():
        if value is None:
            values.pop(name, None)
        else:
            values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return values


def of_type(kind: PeftType, folder: Path, runs_dir: Path, *, model: str = "bert", **changes: Any) -> RunConfig:
    """A run of a type on all projections, at rank 4 where it has one."""
    settings = dict(OF_TYPE.get(kind.name, {}))
    rank = None
    if kind.alpha is not None:
        rank = {"rank": 4, "alpha": 8}
    elif kind.rank is not None:
        settings.setdefault(kind.rank, 4)
    method = {"name": kind.method, "peft": settings}
    changed: Values = {"method": method, "rank": rank, **changes}
    if not kind.uses_placement:
        changed["target_layers"] = None
    return from_dict(values_of(folder, runs_dir, model=model, **changed))


@dataclass
class Ran:
    """A run that was made, and the model as it left it."""

    result: RunResult
    prepared: PreparedRun
    dir: Path

    def losses(self) -> list[float]:
        rows = [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()]
        return [row["train_nll"] for row in rows if "train_nll" in row]


def ran(config: RunConfig) -> Ran:
    kept: list[PreparedRun] = []

    def keep(*arguments: Any) -> PreparedRun:
        kept.append(prepare(*arguments))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "prepare", keep)
        result = run(config)
    assert result.status is Status.FINISHED, result.error
    return Ran(result, kept[0], Path(config.runs_dir) / result.run_id)


def fresh_base(config: RunConfig) -> nn.Module:
    is_language = config.dataset.task.is_language
    base = load_model(base_model(config), num_labels=None if is_language else 2, pad_token_id=0, seed=config.seed)
    return base.model.eval()


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(4, 44).view(2, 20)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def read_by_peft(base: nn.Module, adapter_dir: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft says of a type (BOFT's extension for CUDA)
        return peft.PeftModel.from_pretrained(base, str(adapter_dir))


# ---------------------------------------------------------------- every type


def test_every_type_of_the_installed_peft_is_described() -> None:
    assert {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING} == set(PEFT_TYPES)
    assert {kind.method for kind in PEFT_TYPES.values() if not kind.refused} == {
        name for name, method in METHODS.items() if method.peft is not None
    }


@pytest.mark.parametrize("name", USABLE)
def test_a_type_trains_adapter_and_head_alone_and_is_saved_as_peft_reads_it(
    name: str, folder: Path, tmp_path: Path
) -> None:
    config = of_type(PEFT_TYPES[name], folder, tmp_path)
    planned = plan(config)
    base = fresh_base(config)
    weights = {each: value.clone() for each, value in base.named_parameters()}
    one = ran(config)
    model, metrics = one.prepared.model, one.result.metrics

    assert metrics["num_adapter_params"] == planned.num_adapter_params > 0
    assert metrics["num_head_params"] == 2 * 64 + 2
    assert metrics["num_trainable_params"] == metrics["num_adapter_params"] + metrics["num_head_params"]
    assert planned.target_modules == one.result.target_modules != []
    assert metrics["peak_memory_bytes"] > 0 and "train_flops" not in metrics
    losses = one.losses()
    assert losses[-1] < losses[0]

    kept = {each.replace(".base_layer.", "."): value for each, value in model.named_parameters()}
    changed = {each for each, value in weights.items() if not torch.equal(kept[each], value)}
    assert changed == {"classifier.weight", "classifier.bias"}
    adapter = [value for each, value in model.named_parameters() if peft_method.is_adapter(each)]
    assert all(value.requires_grad for value in adapter)

    adapter_dir = one.dir / "adapter"
    assert metrics["checkpoint_bytes"] == (adapter_dir / "adapter_model.safetensors").stat().st_size
    before = logits(base)
    loaded = read_by_peft(base, adapter_dir)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(loaded), before, atol=1e-4, rtol=0)
