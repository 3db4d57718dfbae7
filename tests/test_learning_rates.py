"""Learning rates of A, B, head and base: which parameter has which, what a step does, and how a report tells them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import config, exact, rows  # noqa: F401
from test_trainer import parameters, recipe

from analysis.load import load_runs
from analysis.recipes import recipe_differences
from harness.config.schema import ModelConfig, Optimizer, RankConfig, TinyModel
from harness.config.validation import ConfigError
from harness.content.identity import identify
from harness.methods.adapting import apply_lora
from harness.methods.counts import set_trainable
from harness.methods.rates import Kind, LearningRates, learning_rates
from harness.models.loading import load_model
from harness.run import run
from harness.training.optimizer import build_optimizer, set_learning_rates

OWN = {"learning_rate_A": 1e-3, "learning_rate_B": 4e-3, "learning_rate_head": 2e-3}


def adapted() -> tuple[torch.nn.Module, tuple[str, ...]]:
    """A tiny BERT with adapters at q and v."""
    torch.manual_seed(0)
    loaded = load_model(ModelConfig(name="tiny", tiny=TinyModel.bert), num_labels=3, pad_token_id=0, seed=0)
    targets = [name for name, _ in loaded.model.named_modules() if name.endswith(("query", "value"))]
    apply_lora(loaded.model, targets, rank=RankConfig(rank=2, alpha=4.0), generator=torch.Generator().manual_seed(0))
    set_trainable(loaded.model, loaded.head)
    return loaded.model, loaded.head


def test_every_parameter_has_the_rate_of_its_kind(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    model, head = adapted()
    wanted = config(rows, tmp_path, trainer={"learning_rate": 7e-3, **OWN, "weight_decay": 0.3})
    optimizer = build_optimizer(model, wanted.trainer, learning_rates(wanted, head))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["initial_lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    expected = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = 1e-3 if name.endswith("lora_A") else 4e-3 if name.endswith("lora_B") else 2e-3
            expected[name] = (rate, 0.3 if parameter.ndim > 1 else 0.0)
    assert found == expected
    assert {name.rpartition(".")[2] for name in found} == {"lora_A", "lora_B", "weight", "bias"}


def test_base_and_head_of_full_fine_tuning(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    rates = learning_rates(
        config(rows, tmp_path, "full", trainer={"learning_rate": 1e-4, "learning_rate_head": 1e-2}), ["classifier"]
    )
    assert rates.of_kind[rates.kind("classifier.weight")] == 1e-2
    assert rates.of_kind[rates.kind("bert.embeddings.word_embeddings.weight")] == 1e-4
    own = {"learning_rate": 1e-4, "learning_rate_base": 2e-5}
    rates = learning_rates(config(rows, tmp_path, "full", trainer=own), ["classifier"])
    assert rates.of_kind == {Kind.A: 1e-4, Kind.B: 1e-4, Kind.HEAD: 1e-4, Kind.BASE: 2e-5}
    # B does not follow A unless a ratio says so.
    own = {"learning_rate": 1e-4, "learning_rate_A": 2e-5}
    assert learning_rates(config(rows, tmp_path, trainer=own), []).of_kind[Kind.B] == 1e-4
    plus = learning_rates(config(rows, tmp_path, trainer=own, variant={"learning_rate_ratio": 16.0}), [])
    assert (plus.of_kind[Kind.A], plus.of_kind[Kind.B]) == (2e-5, 16 * 2e-5)
    # A module whose name begins as that of the head does is none of it.
    assert rates.kind("classifier2.weight") is Kind.BASE


@pytest.mark.parametrize("optimizer", [Optimizer.adamw, Optimizer.muon])
def test_all_follow_one_schedule(optimizer: Optimizer) -> None:
    model, head = adapted()
    trainer = recipe(learning_rate=1.0, warmup_fraction=0.5, optimizer=optimizer)
    rates = LearningRates({Kind.A: 1.0, Kind.B: 16.0, Kind.HEAD: 0.5, Kind.BASE: 1.0}, head)
    built = build_optimizer(model, trainer, rates)
    seen = set()
    for step in (1, 2, 3, 4):
        set_learning_rates(built, step, 4, trainer)
        factor = {1: 0.5, 2: 1.0, 3: 1.0, 4: 0.5}[step]
        assert {group["lr"] for group in built.param_groups} == {factor, 16 * factor, 0.5 * factor}
        seen |= {group["initial_lr"] for group in built.param_groups}
    assert seen == {1.0, 16.0, 0.5}


def test_a_step_moves_each_kind_by_its_rate() -> None:
    """AdamW's first step is one rate long in every entry that has a gradient."""
    model, head = adapted()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)  # A has no gradient while B is zero
    before = parameters(model)
    rates = LearningRates({Kind.A: 1e-3, Kind.B: 1.6e-2, Kind.HEAD: 5e-4, Kind.BASE: 9.0}, head)
    optimizer = build_optimizer(model, recipe(weight_decay=0.0), rates)
    model(input_ids=torch.randint(3, 90, (4, 8)), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    steps = {name: (value - before[name]).abs().max().item() for name, value in parameters(model).items()}
    for name, length in steps.items():
        rate = {"lora_A": 1e-3, "lora_B": 1.6e-2}.get(name.rpartition(".")[2], 0.0)
        assert length == pytest.approx(5e-4 if name.startswith("classifier.") else rate, rel=1e-2), name


def test_the_same_rate_by_four_names_is_the_same_training(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    one = run(config(rows, tmp_path / "one"))
    own = dict.fromkeys(OWN, 3e-3)
    four = run(config(rows, tmp_path / "four", trainer={"learning_rate": 3e-3, **own}))
    assert exact(four.metrics) == exact(one.metrics)
    assert four.cell_id != one.cell_id
    other = run(config(rows, tmp_path / "other", trainer={"learning_rate_B": 3e-2}))
    assert other.metrics["train_nll"] != one.metrics["train_nll"]


def test_a_report_tells_runs_of_other_rates_apart(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    usual = [run(config(rows, tmp_path, seed=seed)) for seed in (0, 1)]
    other = run(config(rows, tmp_path, trainer={"learning_rate_B": 3e-2}))
    assert identify(config(rows, tmp_path, trainer={"learning_rate_B": None})).run_id == usual[0].run_id
    frame = load_runs(tmp_path).frame
    assert recipe_differences(frame) == {other.cell_id: ("trainer.learning_rate_B=0.03 instead of null",)}


@pytest.mark.parametrize(
    ("method", "trainer", "expected"),
    [
        (
            "full",
            {"learning_rate_A": 1e-3},
            "trainer.learning_rate_A=0.001: is read by methods with a rank that are not of the peft package, and",
        ),
        (
            "head_only",
            {"learning_rate_B": 1e-3},
            "trainer.learning_rate_B=0.001: is read by methods with a rank that are not of the peft package, and",
        ),
        (
            "lora",
            {"learning_rate_base": 1e-3},
            "trainer.learning_rate_base=0.001: is read where parameters of the base model train: by method=full, ",
        ),
        (
            "lora",
            {"learning_rate_B": 0},
            "trainer.learning_rate_B=0.0: allowed is a finite number above 0, or null for learning_rate.",
        ),
    ],
)
def test_a_rate_that_nothing_has_is_refused(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    method: str,
    trainer: dict[str, Any],
    expected: str,
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(rows, tmp_path, method, trainer=trainer)
    (problem,) = caught.value.problems
    assert problem.startswith(expected)


def test_a_language_model_has_no_rate_of_a_head(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    language = {"dataset": {"task": "causal_lm", "metrics": [], "best_metric": "nll"}, "model": {"tiny": "gpt2"}}
    with pytest.raises(ConfigError, match=r"^trainer.learning_rate_head=0.001: is read by dataset.task=classification"):
        config(rows, tmp_path, "full", trainer={"learning_rate_head": 1e-3}, **language)
