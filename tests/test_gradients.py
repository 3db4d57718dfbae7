"""Where the gradient is before training: `harness.gradients`, and its tables (`analysis adapters --gradients`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from test_run import config, rows  # noqa: F401

from analysis import select
from analysis.__main__ import main
from analysis.adapters.gradients import Gradients, find_gradients, gradient_tables
from analysis.load import LoadError, load_runs
from harness.config.validation import ConfigError
from harness.data.batches import TrainingBatches
from harness.deltas import set_weight, weight_of
from harness.evaluate import load_own_data
from harness.gradients import Gradient, gradients_before
from harness.processes.stopping import StopRequest
from harness.results.schema import Status
from harness.run import run
from harness.saved import Base, SavedRun, find_saved
from harness.tasks.families import find_family

NUM_EXAMPLES = 16
SHORT = {"max_steps": 1, "eval_every": 0}


@pytest.fixture(scope="module")
def runs_dir(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Two placements at two seeds, from bases that these draw, and GPT-2's matrix of three roles."""
    folder = tmp_path_factory.mktemp("gradients")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_HARNESS_CACHE", str(folder / "cache"))
        wanted = [
            config(rows, folder / "runs", seed=seed, trainer=SHORT, target_layers=placement)
            for seed in (0, 1)
            for placement in ({"name": "qv", "projections": ["q", "v"]}, {"name": "mlp", "projections": ["mlp"]})
        ]
        fused = config(
            rows,
            folder / "fused",
            trainer=SHORT,
            model={"name": "tiny_gpt2", "tiny": "gpt2"},
            variant={"name": "plain"},
        )
        for each in (*wanted, fused):
            result = run(each)
            assert result.status is Status.FINISHED, result.error
    return folder


def saved_in(folder: Path) -> list[SavedRun]:
    return find_saved(sorted(path.parent.name for path in folder.glob("*/result.json")), folder, needs_base=True)


def loss_of_start(saved: SavedRun, change: Gradient | None = None, *, step: float = 0.0) -> float:
    """The mean loss over the first 16 examples, with a matrix moved along its gradient."""
    base = Base(saved, untrained=True)
    data = load_own_data(base, saved.config, ("train",))
    objective = find_family(saved.config.dataset.task).build_objective(saved.config, data, {}, StopRequest())
    model = base.base.model.eval().double()
    if change is not None:
        module: Any = model.get_submodule(change.target.module)
        moved = weight_of(model, change.target).double() + step * change.matrix.double()
        set_weight(model, change.target, moved)
        module.weight.data = module.weight.data.double()
    order = TrainingBatches(data.train, batch_size=8, micro_batch_size=None, seed=saved.config.seed).epoch(0)
    batches = [batch for _ in range(2) for batch in next(order)]
    with torch.no_grad():
        losses = [objective.summed_loss(model, batch).minimised for batch in batches]
    return float(sum(losses)) / sum(batch.num_targets for batch in batches)


@pytest.mark.parametrize("kind", ["runs", "fused"])
def test_a_step_along_a_gradient_changes_the_loss_by_its_square(runs_dir: Path, kind: str) -> None:
    """A central difference quotient of the loss, for the matrices with the largest gradients."""
    saved = saved_in(runs_dir / kind)[0]
    found = gradients_before(saved, num_examples=NUM_EXAMPLES)
    assert [each.target.role for each in found[:3]] == ["q", "k", "v"]
    assert len(found) == 2 * 6  # of two blocks
    largest = sorted(found, key=lambda each: -float(each.matrix.norm()))[:3]
    for each in largest:
        square = float(each.matrix.double().square().sum())
        step = 0.05 / square**0.5  # small beside the matrix, and the loss is a sum in float32
        slope = (loss_of_start(saved, each, step=step) - loss_of_start(saved, each, step=-step)) / (2 * step)
        assert slope == pytest.approx(square, rel=0.02)


def test_the_gradient_is_that_of_the_run_s_beginning(runs_dir: Path) -> None:
    """Another seed draws another base, head and order; what a run has trained changes nothing."""
    saved = saved_in(runs_dir / "runs")
    of_seed = {seed: [one for one in saved if one.config.seed == seed] for seed in (0, 1)}
    first, same = (gradients_before(one, num_examples=NUM_EXAMPLES) for one in of_seed[0])
    other = gradients_before(of_seed[1][0], num_examples=NUM_EXAMPLES)
    assert all(torch.equal(one.matrix, two.matrix) for one, two in zip(first, same, strict=True))
    assert not any(torch.equal(one.matrix, two.matrix) for one, two in zip(first, other, strict=True))


def found_in(folder: Path) -> Gradients:
    frame = load_runs(folder).frame
    cells = select.records(select.best_cells(select.cells(frame)))
    seeds = dict(zip(frame["run_id"], frame["config.seed"], strict=True))
    return find_gradients(cells, seeds, folder, num_examples=NUM_EXAMPLES)


def test_shares_are_those_of_the_matrices_that_a_placement_adapts(runs_dir: Path) -> None:
    found = found_in(runs_dir / "runs")
    frame = found.frame
    assert not found.problems and len(frame) == 2 * 12
    for _, own in frame.groupby("seed"):
        assert own["share"].sum() == pytest.approx(1)
        assert (own["density"] * own["num_entries"]).sum() == pytest.approx(own["num_entries"].sum())
    by_role = frame.groupby(["seed", "role"])["share"].sum()
    for _, row in found.placed.iterrows():
        roles = {"qv": ["q", "v"], "mlp": ["up", "down"]}[found.cells[int(row["condition"])]["target_layers"]]
        assert row["share"] == pytest.approx(sum(by_role[row["seed"], role] for role in roles))
    assert len(found.placed) == 4
    assert frame["leading"].between(0, 1).all() and (frame["leading"] > frame["leading_random"]).mean() > 0.9
    by_role_table, by_placement = gradient_tables(found)
    assert len(by_role_table.text.rows) == 6 and len(by_placement.text.rows) == 2
    assert "No rank has 4 placements: too few for a correlation of gradient and score." in by_placement.notes


def test_the_correlation_is_between_placements_of_one_rank(runs_dir: Path) -> None:
    """Four placements in the order of their shares, and against that of their densities."""
    placements = ["q", "k", "v", "o"]
    cell = select.records(select.best_cells(select.cells(load_runs(runs_dir / "runs").frame)))[0]
    cells = [
        cell | {"target_layers": placement, "val_accuracy": 0.8 + 0.01 * number}
        for number, placement in enumerate(placements)
    ]
    placed = pd.DataFrame(
        [{"condition": number, "seed": 0, "share": 0.1 * (number + 1), "density": 4.0 - number} for number in range(4)]
    )
    inside = {"num_entries": 4, "energy": 1.0, "share": 0.25, "density": 1.0, "leading": 0.5, "leading_random": 0.4}
    frame = pd.DataFrame([{"subject": "m on d", "seed": 0, "role": role, "block": 0, **inside} for role in placements])
    _, table = gradient_tables(Gradients(cells, frame, placed, 16, []))
    expected = (
        "tiny_bert on words, rank 4: Spearman's correlation of the score on val over 4 placements: 1.00 with share "
        "(p = 0.00) and -1.00 with density (p = 0.00)."
    )
    assert expected in table.notes


def test_the_command_writes_tables_figure_and_frame(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["adapters", "--runs-dir", str(runs_dir / "runs"), "--reports-dir", str(tmp_path), "--gradients", "16"]
    assert main(command) == 0, capsys.readouterr().err
    folder = tmp_path / "all/adapters"
    for name in ("tables/gradient_before.md", "tables/gradient_and_score.csv", "figures/gradient_before.png"):
        assert (folder / name).stat().st_size > 0
    assert len(pd.read_csv(folder / "data/gradients.csv")) == 24
    with pytest.raises(SystemExit):
        main([*command[:-1], "0"])
    assert "'0': must be a number of training examples, as 128" in capsys.readouterr().err


def test_where_the_data_are_others_now_nothing_is_computed(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))
    copied = tmp_path / "rows.csv"
    copied.write_bytes(rows.read_bytes())
    assert run(config(copied, tmp_path / "runs", trainer=SHORT)).status is Status.FINISHED
    copied.write_text(copied.read_text() + "one more,x\n")
    (saved,) = saved_in(tmp_path / "runs")
    with pytest.raises(ConfigError, match="changed since the run"):
        gradients_before(saved, num_examples=NUM_EXAMPLES)
    with pytest.raises(LoadError, match=r"(?s)no gradient before training:.*changed since the run"):
        found_in(tmp_path / "runs")
