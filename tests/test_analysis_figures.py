"""The figures: which appear, that what they draw are the cells' numbers, what failed, hostile names, and the files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import ConnectionStyle, Rectangle
from test_analysis_load import save_run

from analysis.figures import Figure, paper_figures, write_figures
from analysis.figures.footnote import Footnote
from analysis.figures.labels import leader
from analysis.figures.memory import MOST_BARS
from analysis.figures.multiples import MAX_LINES
from analysis.figures.tradeoffs import pareto_front
from analysis.load import load_runs
from analysis.select import best_cells, cells

ROOT = Path(__file__).resolve().parent.parent
MIB = 1024 * 1024
ALL = [
    "score_by_memory",
    "score_by_params",
    "rank_curves",
    "rank_by_placement",
    "learning_rates",
    "best_rates",
    "training_curves",
    "memory_parts",
    "score_by_step_time",
]


def measured(score: float, memory: float, params: float) -> dict[str, float]:
    """The metrics of a finished run whose peak of `memory` MiB is half weights."""
    return {
        "num_adapter_params": params,
        "num_trainable_params": params + 512,
        "num_total_params": 1_024_000,
        "peak_memory_bytes": memory * MIB,
        "weights_bytes": memory * MIB / 2,
        "gradients_bytes": memory * MIB / 8,
        "optimizer_bytes": memory * MIB / 8,
        "activations_bytes": memory * MIB / 4,
        "step_seconds_median": memory / 1000,
        "train_nll": 0.5,
        "val_accuracy": score,
        "test_accuracy": score - 0.01,
    }


def save_grid(
    runs_dir: Path,
    *,
    placements: Sequence[str] = ("qv", "all"),
    ranks: Sequence[int] = (1, 8),
    rates: Sequence[float] = (1e-3, 4e-3),
    seeds: int = 3,
    failed: Mapping[tuple[str, int], str] | None = None,
    **options: Any,
) -> None:
    """LoRA at each placement, rank, learning rate and seed, and full fine-tuning; `failed` by placement and rank."""
    for seed in range(seeds):
        noise = 0.004 * seed
        metrics = measured(0.95 + noise, 40, 0)
        save_run(runs_dir, f"full-s{seed}", cell_id="full", seed=seed, method="full", metrics=metrics, **options)
        for number, placement in enumerate(placements):
            for rank in ranks:
                for rate in rates:
                    cell = f"c{number}-r{rank}-{rate}"
                    status = (failed or {}).get((placement, rank), "finished")
                    score = 0.80 + 0.01 * rank + 0.02 * number - 10 * rate + noise
                    fine = measured(score, 10 + number + rank / 8, 1024 * rank * (number + 1))
                    save_run(
                        runs_dir,
                        f"{cell}-s{seed}",
                        cell_id=cell,
                        seed=seed,
                        target_layers=placement,
                        rank=rank,
                        learning_rate=rate,
                        status=status,
                        metrics=fine if status == "finished" else {},
                        **options,
                    )


def curves_of(table: pd.DataFrame) -> dict[str, list[dict[str, float]]]:
    """Three steps of loss and score for every run."""
    steps = (10, 20, 30)
    return {
        run_id: [{"step": step, "train_nll": 2 / step, "val_accuracy": step / 50 + 0.01 * number} for step in steps]
        for run_ids in table["run_ids"]
        for number, run_id in enumerate(run_ids)
    }


def grid_cells(runs_dir: Path, **options: Any) -> pd.DataFrame:
    save_grid(runs_dir, **options)
    return cells(load_runs(runs_dir).frame)


def draw(figures: Sequence[Figure], name: str) -> matplotlib.figure.Figure:
    return next(figure for figure in figures if figure.name == name).draw()


def line(figure: matplotlib.figure.Figure, label: str, axes: int = 0) -> np.ndarray[Any, Any]:
    """The points of the line or error bars of that label."""
    panel = figure.axes[axes]
    drawn = {str(bars.get_label()): bars[0] for bars in panel.containers if bars.get_label() and bars[0]}
    drawn |= {str(single.get_label()): single for single in panel.lines}
    return np.asarray(drawn[label].get_xydata())


def texts(figure: matplotlib.figure.Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def footnote(figure: matplotlib.figure.Figure) -> str:
    return figure.get_supxlabel().replace("\n", " ")


# ---------------------------------------------------------------- which figures


def test_a_whole_sweep_has_every_figure_in_order(tmp_path: Path) -> None:
    table = grid_cells(tmp_path)
    assert [figure.name for figure in paper_figures(table, curves_of(table))] == ALL


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"placements": ("qv",)}, {"rank_by_placement"}),
        ({"ranks": (8,)}, {"rank_curves", "rank_by_placement", "best_rates"}),
        ({"rates": (1e-3,)}, {"learning_rates", "best_rates"}),
    ],
)
def test_what_would_be_senseless_is_left_out(tmp_path: Path, options: dict[str, Any], missing: set[str]) -> None:
    table = grid_cells(tmp_path, seeds=1, **options)
    assert set(ALL) - {figure.name for figure in paper_figures(table, curves_of(table))} == missing


def test_without_curves_or_finished_runs_there_is_less(tmp_path: Path) -> None:
    table = grid_cells(tmp_path / "a", seeds=1)
    assert "training_curves" not in {figure.name for figure in paper_figures(table, {})}
    save_run(tmp_path / "b", "x-s0", cell_id="x", status="failed", metrics={})
    assert paper_figures(cells(load_runs(tmp_path / "b").frame), {}) == []


# ---------------------------------------------------------------- numbers


def test_the_pareto_front_worked_by_hand() -> None:
    costs, scores = [10, 20, 20, 30, 40, 10], [0.5, 0.7, 0.6, 0.7, 0.9, 0.5]
    # 20 at 0.6 loses to 20 at 0.7, and so does 30 at 0.7; equals both stay.
    assert pareto_front(costs, scores, "test_accuracy") == [0, 5, 1, 4]
    assert pareto_front([1, 2, 3], [0.5, 0.4, 0.6], "test_nll") == [0, 1]
    assert pareto_front([], [], "test_nll") == []


def test_points_and_intervals_are_those_of_the_cells(tmp_path: Path) -> None:
    table = grid_cells(tmp_path)
    figures, best = paper_figures(table, curves_of(table)), best_cells(table)
    qv = best[best["target_layers"] == "qv"].sort_values("rank", key=lambda ranks: ranks.astype(int))
    scores = qv["test_accuracy"].tolist()
    by_params = line(draw(figures, "score_by_params"), "qv")
    assert by_params.tolist() == [[1024, scores[0]], [8192, scores[1]]]
    curves = draw(figures, "rank_curves")
    assert line(curves, "qv").tolist() == [[1, scores[0]], [8, scores[1]]]
    low, high = curves.axes[0].collections[0].get_segments()[0][:, 1]
    half = qv["test_accuracy_ci"].tolist()[0]
    assert any(np.allclose([low, high], [score - half, score + half]) for score in best["test_accuracy"])
    front = draw(figures, "score_by_memory")
    assert line(front, "lora r8 qv").tolist() == [[11.0, scores[1]]]
    assert line(draw(figures, "score_by_step_time"), "lora r8 qv").tolist() == [[pytest.approx(11.0), scores[1]]]
    assert "mean of 3 seeds, 95 % interval" in footnote(front)


def test_no_interval_reaches_above_an_accuracy_of_one(tmp_path: Path) -> None:
    """That of three seeds is wide, and symmetric by its formula."""
    table = grid_cells(tmp_path)
    table["test_accuracy_ci"] = 0.4
    figure = draw(paper_figures(table, curves_of(table)), "rank_curves")
    ends = np.concatenate([segment[:, 1] for segment in figure.axes[0].collections[0].get_segments()])
    scores = table["test_accuracy"]
    assert ends.max() == 1.0 and any(np.isclose(ends.min(), scores - 0.4))
    assert figure.axes[0].get_ylim()[1] < 1.2


def test_the_heat_map_prints_and_colours_the_scores(tmp_path: Path) -> None:
    table = grid_cells(tmp_path)
    figure = draw(paper_figures(table, {}), "rank_by_placement")
    mesh = figure.axes[0].collections[0].get_array()
    assert mesh is not None
    best = best_cells(table)
    expected = {
        (rank, placement): best[(best["rank"] == rank) & (best["target_layers"] == placement)]["test_accuracy"].item()
        for rank in (1, 8)
        for placement in ("qv", "all")
    }
    columns = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert mesh.tolist() == [[expected[rank, placement] for placement in columns] for rank in (1, 8)]
    assert {f"{value:.4f}" for value in expected.values()} <= set(texts(figure).split("\n"))


def test_learning_rates_show_val_and_mark_the_chosen_one(tmp_path: Path) -> None:
    table = grid_cells(tmp_path)
    figure = draw(paper_figures(table, {}), "learning_rates")
    points = line(figure, "lora r8 qv")
    mine = table[(table["rank"] == 8) & (table["target_layers"] == "qv")]
    assert points.tolist() == mine[["learning_rate", "val_accuracy"]].to_numpy(dtype=float).tolist()
    rings = [single.get_xydata().tolist() for single in figure.axes[0].lines if single.get_label() == "best"]
    assert [points[0].tolist()] in rings


def test_the_name_of_a_line_that_ends_early_lies_at_its_end(tmp_path: Path) -> None:
    """Full fine-tuning has lower rates than LoRA: a leader from there to the right edge would look like data."""
    save_grid(tmp_path)
    metrics = measured(0.9, 40, 0)
    save_run(tmp_path, "full-low", cell_id="full-low", method="full", learning_rate=1e-5, metrics=metrics)
    axes = draw(paper_figures(cells(load_runs(tmp_path).frame), {}), "learning_rates").axes[0]
    labels = {text.get_text(): text for text in axes.texts}
    assert labels["lora r8 qv"].anncoords == "axes fraction"
    save_run(tmp_path, "full-lower", cell_id="full-lower", method="full", learning_rate=1e-6, metrics=metrics)
    (tmp_path / "full-s0/result.json").unlink()
    (tmp_path / "full-s1/result.json").unlink()
    (tmp_path / "full-s2/result.json").unlink()
    axes = draw(paper_figures(cells(load_runs(tmp_path).frame), {}), "learning_rates").axes[0]
    (full,) = (text for text in axes.texts if text.get_text() == "full")
    assert full.anncoords == "offset points"
    assert max(map(abs, full.get_position())) < 40


@pytest.mark.parametrize("point", [(400.0, 300.0), (230.0, 80.0), (190.0, 260.0), (20.0, 110.0), (200.0, 130.0)])
def test_a_leader_goes_where_the_style_of_the_library_has_it(point: tuple[float, float]) -> None:
    box, middle, shrink = Rectangle((150, 90), 100, 20), (200.0, 100.0), {"shrinkA": 3.0, "shrinkB": 6.0}
    found = leader(middle, point, patchA=box, patchB=None, **shrink).vertices
    expected = ConnectionStyle("arc3")(middle, point, patchA=box, patchB=None, **shrink).vertices
    np.testing.assert_allclose(found, expected[[0, -1]], atol=0.05)


@pytest.mark.parametrize("point", [(205.0, 104.0), (252.0, 100.0), (200.0, 100.0)])
def test_a_label_that_touches_its_point_needs_no_leader(point: tuple[float, float]) -> None:
    box = Rectangle((150, 90), 100, 20)
    found = leader((200.0, 100.0), point, patchA=box, patchB=None, shrinkA=3.0, shrinkB=6.0).vertices
    np.testing.assert_array_equal(found, [point, point])


def test_full_fine_tuning_has_its_name_also_where_it_is_beaten(tmp_path: Path) -> None:
    table = grid_cells(tmp_path, ranks=(16,), placements=("qv",))
    front = draw(paper_figures(table, {}), "score_by_memory").axes[0]
    assert {text.get_text() for text in front.texts} == {"lora r16 qv", "full"}


def test_curves_are_means_of_whole_runs(tmp_path: Path) -> None:
    table = grid_cells(tmp_path)
    curves = curves_of(table)
    stopped = next(iter(best_cells(table)[lambda best: best["method"] == "full"]["run_ids"]))[0]
    curves[stopped] = [{"step": 10, "train_nll": 99.0, "val_accuracy": 0.0}]
    figure = draw(paper_figures(table, curves), "training_curves")
    np.testing.assert_allclose(line(figure, "full", axes=0), [[10, 0.2], [20, 0.1], [30, 2 / 30]])
    np.testing.assert_allclose(line(figure, "full", axes=1), [[10, 0.215], [20, 0.415], [30, 0.615]])
    # The band of the two that are left: from the second to the third seed.
    bands = [band.get_xy() for band in figure.axes[1].patches]
    assert any(np.allclose(band[:, 1].min(), 0.21) and np.allclose(band[:, 1].max(), 0.62) for band in bands)
    assert "band: from the lowest to the highest seed" in footnote(figure)


def test_of_many_curves_the_best_on_val_are_drawn_and_the_title_says_so(tmp_path: Path) -> None:
    table = grid_cells(tmp_path, ranks=(1, 2, 4, 8, 16), rates=(1e-3,), seeds=1)
    figure = next(figure for figure in paper_figures(table, curves_of(table)) if figure.name == "training_curves")
    assert figure.title == "Training curves (the 8 conditions that are best on val)"
    drawn = {str(single.get_label()) for single in figure.draw().axes[0].lines}
    best = best_cells(table).nlargest(8, "val_accuracy")
    assert drawn == {
        "full" if cell.method == "full" else f"lora r{cell.rank} {cell.target_layers}" for cell in best.itertuples()
    }


def test_of_very_many_conditions_some_bars_stand_for_all(tmp_path: Path) -> None:
    ranks = tuple(range(1, 61))
    save_grid(tmp_path, ranks=ranks, placements=("qv",), rates=(1e-3,), seeds=1)
    table = cells(load_runs(tmp_path).frame)
    figure = draw(paper_figures(table, {}), "memory_parts")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(names) == MOST_BARS
    assert {"full", "lora r1 qv"} <= set(names)  # the most memory and the least
    assert figure.get_size_inches()[1] < 9
    assert "40 of 61, from the least peak memory to the most" in footnote(figure)


def test_the_parts_of_the_memory_add_up(tmp_path: Path) -> None:
    table = grid_cells(tmp_path)
    figure = draw(paper_figures(table, {}), "memory_parts")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    bars = figure.axes[0].patches
    ends = [max(bar.get_x() + bar.get_width() for bar in bars[row :: len(names)]) for row in range(len(names))]
    assert dict(zip(names, ends, strict=True))["full"] == 40
    assert "40.0 MiB" in texts(figure)
    assert len({bar.get_hatch() for bar in bars}) == 4


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    figure = draw(paper_figures(grid_cells(tmp_path, seeds=1), {}), "rank_curves")
    assert footnote(figure) == "one seed: no interval"
    assert len(figure.axes[0].collections) == 0


def test_two_seeds_are_points_and_do_not_flatten_the_axis(tmp_path: Path) -> None:
    """The 95 % interval of two seeds is 12.7 times their standard error on either side."""
    table = grid_cells(tmp_path, seeds=2)
    figures = paper_figures(table, {})
    for name in ("score_by_params", "score_by_memory", "rank_curves", "score_by_step_time"):
        axes = draw(figures, name).axes[0]
        scored = [single for single in axes.lines if str(single.get_label()).endswith(": seeds")]
        seeds = {value for single in scored for value in np.asarray(single.get_ydata(), dtype=float).round(6)}
        best = best_cells(table)
        assert seeds == {round(value, 6) for row in best["by_seed"] for value in row["test_accuracy"].values()}, name
        low, high = axes.get_ylim()
        assert high - low < 1.5 * (max(seeds) - min(seeds)), name
    assert (
        footnote(draw(figures, "rank_curves")) == "mean of 2 seeds, small points: both seeds, too few for an interval"
    )


def test_where_some_have_three_seeds_those_have_intervals(tmp_path: Path) -> None:
    save_grid(tmp_path, seeds=3)
    for seed in (1, 2):
        for path in tmp_path.glob(f"c0-r8-*-s{seed}/result.json"):
            path.unlink()
    for path in tmp_path.glob("c1-r1-*-s2/result.json"):
        path.unlink()
    figure = draw(paper_figures(cells(load_runs(tmp_path).frame), {}), "rank_curves")
    expected = "mean of 1 to 3 seeds, 95 % interval, small points: both seeds of two, too few for an interval"
    assert footnote(figure) == f"{expected} (none for one seed)"
    (seeds,) = (single for single in figure.axes[0].lines if str(single.get_label()).endswith(": seeds"))
    assert (seeds.get_label(), len(seeds.get_xydata())) == ("all: seeds", 2)


# ---------------------------------------------------------------- small multiples

FIVE = ("q", "v", "qv", "mlp", "all")


def test_more_than_thirteen_conditions_are_small_multiples(tmp_path: Path) -> None:
    table = grid_cells(tmp_path, placements=FIVE, ranks=(1, 2, 8), seeds=2, failed={("q", 8): "diverged"})
    figures = paper_figures(table, curves_of(table))
    best = best_cells(table).set_index(["target_layers", "rank"])["test_accuracy"]
    for name in ("rank_curves", "score_by_params"):
        figure = draw(figures, name)
        shown = [axes for axes in figure.axes if axes.get_visible()]
        assert {axes.get_title() for axes in shown} == set(FIVE)
        assert len({axes.get_ylim() for axes in shown}) == 1
        for axes in shown:
            ranks = (1, 2) if axes.get_title() == "q" else (1, 2, 8)
            (bars,) = axes.containers
            assert bars[0].get_ydata().tolist() == [best[axes.get_title(), rank] for rank in ranks]
            assert sum(single.get_label() == "behind" for single in axes.lines) == 4
        assert "faint: the others" in footnote(figure)
    figure = draw(figures, "learning_rates")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert {axes.get_title() for axes in shown} == set(FIVE)
    assert {text.get_text() for text in shown[0].texts} == {"r1", "r2", "r8"}
    crosses = [single for axes in shown for single in axes.lines if single.get_marker() == "x"]
    assert [str(cross.get_label()) for cross in crosses] == ["lora r8 q: diverged"] * 2
    assert all(axes.get_ylim()[0] < min(shown[0].lines[0].get_ydata()) for axes in shown)


def test_of_very_many_groups_those_best_on_val_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.figures.multiples.MAX_GROUPS", 3)
    table = grid_cells(tmp_path, placements=FIVE, ranks=(1, 2, 8), rates=(1e-3, 4e-3), seeds=1)
    for name, num in (("rank_curves", 6), ("score_by_params", 6), ("learning_rates", 6)):
        figure = draw(paper_figures(table, {}), name)
        # Later placements are better by 0.02.
        assert {axes.get_title() for axes in figure.axes if axes.get_visible()} == {"qv", "mlp", "all"}
        assert f"the 3 groups that are best on val, without {num} other conditions" in footnote(figure)


def test_of_very_many_ranks_those_between_the_lowest_and_the_highest_are_lines(tmp_path: Path) -> None:
    """A line with a name for each of thirty ranks cannot be read; where ranks are points of a line, all are drawn."""
    table = grid_cells(tmp_path, placements=("q", "v"), ranks=range(1, 31), rates=(1e-3, 4e-3), seeds=1)
    curves = curves_of(table)
    for name in ("learning_rates", "training_curves"):
        figure = draw(paper_figures(table, curves), name)
        axes = next(axes for axes in figure.axes if axes.get_title() == "v")
        names = [str(single.get_label()) for single in axes.lines if str(single.get_label()).startswith("lora ")]
        assert len(names) == MAX_LINES and {"lora r1 v", "lora r30 v"} < set(names)
        assert f"{MAX_LINES} ranks of each group, evenly over them" in footnote(figure)
    (figure,) = (figure for figure in paper_figures(table, curves) if figure.name == "rank_curves")
    (bars, *_) = figure.draw().axes[0].containers
    assert len(bars[0].get_ydata()) == 30


def test_the_curves_of_many_conditions_are_all_drawn(tmp_path: Path) -> None:
    table = grid_cells(tmp_path, placements=FIVE, ranks=(1, 2, 8), rates=(1e-3,), seeds=2)
    curves = curves_of(table)
    (figure,) = (figure for figure in paper_figures(table, curves) if figure.name == "training_curves")
    assert figure.title == "Training curves"
    shown = [axes for axes in figure.draw().axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == 2 * [*dict.fromkeys(axes.get_title() for axes in shown)]
    assert {axes.get_title() for axes in shown} == {*FIVE, "others"}
    assert sum(len(axes.lines) for axes in shown) == 2 * 16


def test_scores_at_a_single_step_are_no_curve(tmp_path: Path) -> None:
    table = grid_cells(tmp_path, rates=(1e-3,), seeds=1)
    curves = {
        run: [{"step": row["step"], "train_nll": row["train_nll"]} for row in rows]
        for run, rows in curves_of(table).items()
    }
    for rows in curves.values():
        rows[-1]["val_accuracy"] = 0.9
    (axes,) = draw(paper_figures(table, curves), "training_curves").axes
    assert axes.get_ylabel() == "train nll (nats), ↓ better"
    assert {text.get_text() for text in axes.texts} == {str(single.get_label()) for single in axes.lines}


# ---------------------------------------------------------------- failures


def test_a_failed_cell_is_named_and_never_a_number(tmp_path: Path) -> None:
    table = grid_cells(tmp_path, failed={("qv", 8): "diverged", ("all", 1): "out_of_memory"})
    for column in ("test_accuracy", "peak_memory_bytes", "val_accuracy"):
        table.loc[table["num_finished"] == 0, column] = 0.123
    figures = paper_figures(table, {})
    for name in ("score_by_params", "score_by_memory", "rank_by_placement", "memory_parts"):
        figure = draw(figures, name)
        assert "not finished: " in footnote(figure)
        assert "lora r8 qv (diverged)" in footnote(figure)
        assert "lora r1 all (out of memory)" in footnote(figure)
        for panel in figure.axes:
            assert not any(np.isclose(single.get_ydata(), 0.123).any() for single in panel.lines)
    heat_map = draw(figures, "rank_by_placement")
    mesh = heat_map.axes[0].collections[0].get_array()
    assert np.ma.count_masked(mesh) == 2
    assert len([patch for patch in heat_map.axes[0].patches if patch.get_hatch()]) == 2
    assert "diverged" in texts(heat_map).split("\n")
    rates = draw(figures, "learning_rates")
    crosses = [single for single in rates.axes[0].lines if single.get_marker() == "x"]
    assert {str(cross.get_label()) for cross in crosses} == {"lora r8 qv: diverged", "lora r1 all: out of memory"}
    assert all(cross.get_ydata()[0] < 0.1 for cross in crosses)


def test_long_lists_of_failures_are_cut(tmp_path: Path) -> None:
    failed = {("qv", rank): "failed" for rank in (2, 4, 8, 16)}
    table = grid_cells(tmp_path, ranks=(1, 2, 4, 8, 16), rates=(1e-3,), seeds=1, failed=failed)
    assert footnote(draw(paper_figures(table, {}), "score_by_memory")).endswith(" (failed) and 1 more")


# ---------------------------------------------------------------- names, panels, files


def test_hostile_names_are_printed_as_they_are(tmp_path: Path) -> None:
    hostile = (r"$\frac{x^$", "<script>alert(1)</script>", "a\nb\tc" + "y" * 500, "%s {0} \\")
    table = grid_cells(tmp_path / "runs", placements=hostile, rates=(1e-3, 2e-3), seeds=1, dataset__name="$d_$")
    figures = paper_figures(table, curves_of(table))
    assert [figure.name for figure in figures] == ALL
    assert len(write_figures(figures[3:4], tmp_path / "figures")) == 2
    for figure in figures[4:]:
        figure.draw()
    shown = texts(draw(figures, "score_by_params"))
    assert r"$\frac{x^$" in shown
    assert "$d_$" in shown
    assert "y" * 21 not in shown


def test_each_dataset_has_its_panel_and_a_placement_one_look(tmp_path: Path) -> None:
    save_grid(tmp_path / "imdb", dataset__name="imdb", seeds=1)
    save_grid(
        tmp_path / "sst2", dataset__name="sst2", placements=("all", "qv"), seeds=1, failed={("qv", 8): "diverged"}
    )
    frames = [load_runs(tmp_path / name).frame for name in ("imdb", "sst2")]
    for name, frame in zip(("imdb", "sst2"), frames, strict=True):
        frame["cell_id"] = name + frame["cell_id"]
        frame["run_id"] = name + frame["run_id"]
    figures = paper_figures(cells(pd.concat(frames)), {})
    figure = draw(figures, "rank_curves")
    assert len(figure.axes) == 2
    assert "sst2: lora r8 qv (diverged)" in footnote(figure)
    looks = [
        {str(bars.get_label()): (bars[0].get_color(), bars[0].get_marker()) for bars in panel.containers}
        for panel in figure.axes
    ]
    assert looks[0] == looks[1]


def test_the_files_are_the_same_again(tmp_path: Path) -> None:
    table = grid_cells(tmp_path / "runs", seeds=2)
    written = [
        write_figures(paper_figures(table, curves_of(table))[0:4:3], tmp_path / name) for name in ("first", "second")
    ]
    assert [path.name for path in written[0][:2]] == ["score_by_memory.pdf", "score_by_memory.png"]
    for first, second in zip(*written, strict=True):
        assert first.read_bytes() == second.read_bytes()
        assert first.read_bytes().startswith(b"%PDF-" if first.suffix == ".pdf" else b"\x89PNG")
    assert sorted((tmp_path / "first").iterdir()) == sorted(written[0])


def test_settings_of_the_user_neither_change_nor_matter(tmp_path: Path) -> None:
    figures = paper_figures(grid_cells(tmp_path / "runs", seeds=1), {})[1:2]
    plain = write_figures(figures, tmp_path / "plain")
    with matplotlib.rc_context({"font.size": 30, "text.parse_math": True, "lines.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        other = write_figures(figures, tmp_path / "other")
        assert dict(matplotlib.rcParams) == before
    assert [path.read_bytes() for path in plain] == [path.read_bytes() for path in other]


def test_the_import_is_light() -> None:
    script = "import sys, analysis.figures; print(*(sys.modules.keys() & {'torch', 'matplotlib.pyplot'}))"
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stdout.strip()) == (0, ""), process.stderr


def test_a_rank_that_all_conditions_share_stands_below(tmp_path: Path) -> None:
    for number, placement in enumerate(("q", "qv", "all")):
        metrics = {"val_accuracy": 0.8, "test_accuracy": 0.8 + number / 50, "num_adapter_params": 100 * (number + 1)}
        save_run(tmp_path, placement, target_layers=placement, rank=8, metrics=metrics)
    figure = draw(paper_figures(cells(load_runs(tmp_path).frame), {}), "score_by_params")
    assert "rank 8" in texts(figure)
    assert "r8" not in {text.get_text() for text in figure.findobj(matplotlib.text.Text)}


def test_a_mark_is_explained_where_it_stands() -> None:
    """A condition that a figure has no room for would be explained to nobody."""
    usual, other = SimpleNamespace(row={"differs": None}), SimpleNamespace(row={"differs": ("trainer.num_epochs=9",)})
    panel: Any = SimpleNamespace(best=[usual, other])
    footnote = Footnote()
    footnote.explain_variants(panel, lambda: ["lora r8", "full"])
    assert footnote.text(has_intervals=False) == ""
    footnote.explain_variants(panel, lambda: ["lora r8 (2)", "full"])
    assert footnote.text(has_intervals=False) == "(2): trainer.num_epochs=9"
