"""The search inside a cell: where it goes from scores alone, and how a sweep makes its rounds from finished results."""

from __future__ import annotations

import json
import logging
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hypothesis import given
from hypothesis import strategies as st
from test_run import config, rows  # noqa: F401

from harness.__main__ import main
from harness.config.composing import to_dict
from harness.config.schema import RunConfig
from harness.content.errors import DataError
from harness.content.identity import PlannedRun, identify
from harness.folder import kept_result, run_dir
from harness.results.launches import read_launches
from harness.results.schema import RunResult, Status, write_result
from harness.run import run
from harness.tasks.objective import why_hopeless
from hydra_plugins.lora_harness import _composing, clusters
from hydra_plugins.lora_harness import sweeper as sweeper_module
from hydra_plugins.lora_harness._cells import score_of_trials
from hydra_plugins.lora_harness._search import WORST, Axis, Budget, Point, Score, Search, search_cell
from hydra_plugins.lora_harness._worker import Outcome

RATE = Axis("trainer.learning_rate", 2e-3)


def bowl(best: float, *, sharp: float = 1.0) -> Callable[[Point], Score]:
    """Scores that fall with the distance of the first axis from its best value."""
    return lambda point: Score(-sharp * abs(math.log(point[0] / best)) ** 1.5)


def play(score: Callable[[Point], Score], axes: list[Axis], budget: Budget) -> tuple[Search, list[list[Point]]]:
    """The search until it is over, and the points of every round."""
    known: dict[Point, Score] = {}
    batches: list[list[Point]] = []
    while True:
        found = search_cell(axes, budget, known.get)
        if found.is_over:
            assert set(found.tried) == set(known)
            return found, batches
        assert found.num_rounds == len(batches) + 1
        batches.append(list(found.wanted))
        known |= {point: score(point) for point in found.wanted}


@pytest.mark.parametrize(
    ("best", "tried", "edge"),
    [
        # Inside the bracket: halfway to the better neighbour, then to the other, since the vertex is the best itself.
        (2e-3, [6.67e-4, 2e-3, 6e-3, 1.15e-3, 3.46e-3], None),
        # Outside: one step, and the vertex.
        (1e-2, [6.67e-4, 2e-3, 6e-3, 1.8e-2, 9.85e-3], None),
        # Two steps: a sixth trial, so that the vertex is not left out.
        (3e-2, [6.67e-4, 2e-3, 6e-3, 1.8e-2, 5.4e-2, 2.96e-2], None),
        # Farther than six trials reach, which is said.
        (3e-5, [6.67e-4, 2e-3, 6e-3, 2.22e-4, 7.41e-5, 2.47e-5], "low"),
    ],
)
def test_a_search_moves_outward_and_then_refines(best: float, tried: list[float], edge: str | None) -> None:
    found, _ = play(bowl(best), [RATE], Budget())
    assert [point[0] for point in found.tried] == tried
    assert found.chosen == (min(tried, key=lambda rate: abs(math.log(rate / best))),)
    assert found.edges.get("trainer.learning_rate") == edge


def test_the_vertex_is_that_of_the_parabola_through_three_points() -> None:
    """By hand: heights 0, 3, 2 at -1, 0, 1 have their top at 0.25, where the rate is 2e-3 * 3 ** 0.25."""
    heights = {6.67e-4: 0.0, 2e-3: 3.0, 6e-3: 2.0}
    found = search_cell([RATE], Budget(), lambda point: Score(heights[point[0]]) if point[0] in heights else None)
    assert found.wanted == ((float(f"{2e-3 * 3**0.25:.3g}"),),)


@pytest.mark.parametrize(
    ("objectives", "tried", "chosen"),
    [
        # Measured (rank 8 on all projections of the small language model, minus nll on Grimm's tales): flat below the
        #   best, steep above. The parabola's vertex lies at 0.006, so that halfway below it comes first.
        (
            {6.67e-4: -6.4466, 2e-3: -6.3794, 6e-3: -6.3513, 1.8e-2: -6.3817, 3.46e-3: -6.3597, 1.04e-2: -6.3404},
            [6.67e-4, 2e-3, 6e-3, 1.8e-2, 3.46e-3, 1.04e-2],
            1.04e-2,
        ),
        # Measured (rank 8 on all of minilm, accuracy on R8): halfway below is as good, halfway above better.
        (
            {6.67e-4: 0.900, 2e-3: 0.912, 6e-3: 0.900, 1.15e-3: 0.912, 3.46e-3: 0.920},
            [6.67e-4, 2e-3, 6e-3, 1.15e-3, 3.46e-3],
            3.46e-3,
        ),
        # Measured (rank 8 on q, v): a vertex that is better than the best ends a cell that has had its five trials.
        (
            {6.67e-4: 0.882, 2e-3: 0.902, 6e-3: 0.908, 1.8e-2: 0.824, 3.73e-3: 0.912},
            [6.67e-4, 2e-3, 6e-3, 1.8e-2, 3.73e-3],
            3.73e-3,
        ),
    ],
)
def test_a_search_looks_on_both_sides_of_the_best(
    objectives: dict[float, float], tried: list[float], chosen: float
) -> None:
    found, _ = play(lambda point: Score(objectives[point[0]]), [RATE], Budget())
    assert [point[0] for point in found.tried] == tried
    assert found.chosen == (chosen,)


def test_a_rate_that_diverges_bounds_the_search() -> None:
    """Away from it first, then towards it."""
    found, _ = play(lambda point: WORST if point[0] > 4e-3 else bowl(4e-3)(point), [RATE], Budget())
    assert found.tried[3:] == ((1.15e-3,), (3.46e-3,))
    assert (found.chosen, found.edges) == ((3.46e-3,), {})


@pytest.mark.parametrize(
    ("objectives", "tried", "chosen"),
    [
        # Measured (rank 8 on all of minilm, R8): a parabola through the cliff would have its vertex on the other side.
        (
            {6.67e-4: 0.902, 2e-3: 0.906, 6e-3: 0.914, 1.8e-2: None, 3.46e-3: 0.924},
            [6.67e-4, 2e-3, 6e-3, 1.8e-2, 3.46e-3],
            3.46e-3,
        ),
        # Measured (rank 1 on q, v, 20 Newsgroups): halfway below is no better, and halfway above is the cliff already.
        (
            {6.67e-4: 0.568, 2e-3: 0.572, 6e-3: 0.588, 1.8e-2: None, 3.46e-3: 0.570, 1.04e-2: None},
            [6.67e-4, 2e-3, 6e-3, 1.8e-2, 3.46e-3, 1.04e-2],
            6e-3,
        ),
    ],
)
def test_a_cliff_bounds_the_search_and_does_not_shape_it(
    objectives: dict[float, float | None], tried: list[float], chosen: float
) -> None:
    def score(point: Point) -> Score:
        objective = objectives[point[0]]
        return Score(0.5, has_learned=False) if objective is None else Score(objective)

    found, _ = play(score, [RATE], Budget())
    assert [point[0] for point in found.tried] == tried
    assert (found.chosen, found.edges) == ((chosen,), {})


def test_a_rate_that_learns_nothing_yet_leads_upward() -> None:
    heights = {6.67e-4: Score(0.5, has_learned=False), 2e-3: Score(0.8), 6e-3: Score(0.7)}
    found = search_cell([RATE], Budget(), lambda point: heights.get(point[0]))
    assert found.wanted == ((3.46e-3,),)


@pytest.mark.parametrize(
    ("metrics", "has_learned"),
    [
        ({"val_accuracy": 0.5, "val_majority_share": 0.996, "val_nll": 1.4}, False),
        ({"val_accuracy": 0.6, "val_majority_share": 0.8, "val_nll": 1.4}, True),
        ({"val_accuracy": 0.6, "val_nll": 5.9, "val_nll_before": 5.8}, False),
        ({"val_accuracy": 0.6, "val_nll": 5.7, "val_nll_before": 5.8}, True),
    ],
)
def test_what_has_learned_nothing(metrics: dict[str, float], has_learned: bool, rows: Path, tmp_path: Path) -> None:  # noqa: F811
    wanted = config(rows, tmp_path)
    result = RunResult("a", "a", None, Status.FINISHED, to_dict(wanted), metrics=metrics)
    score = score_of_trials([result], wanted)
    assert score is not None and score.has_learned is has_learned


def test_where_every_rate_diverges_the_search_goes_down_and_chooses_nothing() -> None:
    found, batches = play(lambda point: WORST, [RATE], Budget())
    assert [len(batch) for batch in batches] == [3, 1, 1, 1]
    assert found.chosen is None
    assert min(found.tried) == (float(f"{2e-3 * 3**-4:.3g}"),)


def test_equal_scores_are_told_apart_by_the_loss() -> None:
    found, _ = play(lambda point: Score(0.5, -abs(math.log(point[0] / 6e-3))), [RATE], Budget(4, 4))
    assert found.chosen == (6e-3,)


def test_two_settings_are_searched_in_turn() -> None:
    """The first again where the second has moved, with what is known already not tried twice."""

    def score(point: Point) -> Score:
        rate, alpha = (math.log2(value) for value in point)
        return Score(-((rate - math.log2(8e-3)) ** 2) - (alpha - 5 + 0.5 * (rate - math.log2(8e-3))) ** 2)

    axes = [RATE, Axis("rank.alpha", 8.0, factor=2.0)]
    found, _ = play(score, axes, Budget(4, 6))
    assert found.chosen is not None
    assert len(found.tried) == len(set(found.tried)) <= 18
    # The second axis was searched at the first one's best value, and then the first at the second's.
    assert found.chosen[1] > 8 and {alpha for _, alpha in found.tried} > {8.0}
    best_of_grid = max(score((2e-3 * 3**i, 8.0 * 2**j)) for i in range(-2, 4) for j in range(-2, 4))
    assert score(found.chosen).objective > best_of_grid.objective - 0.5


def test_linear_and_whole_axes_stay_in_their_bounds() -> None:
    dropout = Axis("method.adapter_dropout", 0.05, factor=None, step=0.05, lowest=0.0)
    found, _ = play(lambda point: Score(-point[0]), [dropout], Budget())
    assert (found.chosen, found.edges) == ((0.0,), {})  # nothing lies beyond, so this is no edge
    batch = Axis("trainer.batch_size", 16, factor=2.0, lowest=1, is_whole=True)
    found, _ = play(bowl(4), [batch], Budget())
    assert all(point[0] == int(point[0]) >= 1 for point in found.tried)
    assert (batch.text(4.0), RATE.text(6.67e-4)) == ("4", "0.000667")


@given(st.lists(st.floats(-5, 5) | st.just(-math.inf), min_size=20, max_size=20), st.integers(4, 7), st.integers(0, 3))
def test_every_search_ends_within_its_budget(heights: list[float], trials: int, more: int) -> None:
    """Whatever the scores: at least `trials` where refining is possible, never above the cap, the best is chosen."""
    known: dict[Point, Score] = {}

    def score(point: Point) -> Score:
        return known.setdefault(point, Score(heights[len(known)]))

    found, _ = play(score, [RATE], Budget(trials, trials + more))
    assert 3 <= len(found.tried) <= trials + more
    finite = [point for point in found.tried if known[point] > WORST]
    assert (found.chosen is None) == (not finite)
    if found.chosen is not None:
        assert known[found.chosen] == max(known[point] for point in found.tried)


# ---------------------------------------------------------------- rounds


class Killed(Exception):
    """The process that runs the sweep dies."""


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Any:
    """Runs a sweep whose runs are made up: `score(config)` is their val accuracy, or the status that they end with."""
    Plugins.instance()
    text = [
        "text,label",
        *(f"{'apple pear' if number % 2 else 'iron zinc'} {number},{number % 2}" for number in range(60)),
    ]
    (tmp_path / "train.csv").write_text("\n".join(text) + "\n")
    state = SimpleNamespace(score=lambda wanted: 0.5, made=[], left=math.inf, log="")

    class Stand:
        def __init__(self, context: Any, master: Any) -> None:
            self.context, self.master = context, master

        def launch(self, job_overrides: list[list[str]], initial_job_idx: int) -> list[Any]:
            return [self.end(_composing.compose_run(self.context, self.master, each)) for each in job_overrides]

        def end(self, planned: PlannedRun) -> Any:
            kept = kept_result(planned)
            if kept is None:
                if state.left <= 0:
                    raise Killed
                state.left -= 1
                state.made.append(planned.run_id)
                kept = made_up(planned, state.score(planned.config))
                write_result(run_dir(planned), kept)
            fine = kept.status is Status.FINISHED
            return SimpleNamespace(status=JobStatus.COMPLETED if fine else JobStatus.FAILED)

    monkeypatch.setattr(
        sweeper_module.GridSweeper,
        "setup",
        lambda self, hydra_context, task_function, config: self.__dict__.update(
            hydra_context=hydra_context, config=config, launcher=Stand(hydra_context, config)
        ),
    )

    def call(*arguments: str) -> int:
        GlobalHydra.instance().clear()
        own = ["model=tiny_bert", "dataset=local", f"dataset.train_file={tmp_path / 'train.csv'}", "tracking=off"]
        monkeypatch.setattr(
            sys, "argv", ["harness", "-m", *own, f"runs_dir={tmp_path / 'runs'}", "sweep=s", *arguments]
        )
        caplog.clear()
        try:
            with caplog.at_level(logging.INFO, logger="harness"):
                return main()
        except SystemExit as error:
            return int(error.code or 0)
        except Killed:
            return -9
        finally:
            state.log = caplog.text

    state.sweep, state.runs_dir = call, tmp_path / "runs"
    return state


def made_up(planned: PlannedRun, score: float | Status) -> RunResult:
    status = score if isinstance(score, Status) else Status.FINISHED
    metrics = {} if isinstance(score, Status) else {"val_accuracy": score, "val_nll": 1 - score}
    (run_dir(planned)).mkdir(parents=True, exist_ok=True)
    return RunResult(
        planned.run_id, planned.identity.cell_id, "s", status, to_dict(planned.config), metrics=metrics, error="made up"
    )


SEARCH = [
    "hydra.sweeper.search.axis=trainer.learning_rate",
    "method=lora",
    "rank=r1,r4",
    "target_layers=qv",
    "seed=0,1",
]


def near(rate: float, **best: float) -> float:
    return 1 / (1 + abs(math.log(rate / best["best"])))


def by_rank(wanted: RunConfig) -> float:
    """The best rate is 1e-3 at rank 1 and 5e-3 elsewhere."""
    is_one = wanted.rank is not None and wanted.rank.rank == 1
    return near(wanted.trainer.learning_rate, best=1e-3 if is_one else 5e-3)


def test_a_sweep_searches_each_cell_and_reports_at_what_it_chose(searched: Any) -> None:
    searched.score = by_rank
    assert searched.sweep(*SEARCH) == 0
    found = [json.loads(path.read_text()) for path in searched.runs_dir.glob("*/result.json")]
    trials = [each["config"] for each in found if each["config"]["trial"]]
    reported = [each["config"] for each in found if not each["config"]["trial"]]
    # At rank 4 one step outward, a vertex that is no better than the best, and the other side of it.
    assert len(trials) == 5 + 6 and {each["seed"] for each in trials} == {1000}
    assert sorted((each["rank"]["rank"], each["seed"]) for each in reported) == [(1, 0), (1, 1), (4, 0), (4, 1)]
    for each in reported:
        own = [trial for trial in trials if trial["rank"] == each["rank"]]
        best = max(
            own,
            key=lambda trial: near(trial["trainer"]["learning_rate"], best={1: 1e-3, 4: 5e-3}[each["rank"]["rank"]]),
        )
        assert each["trainer"]["learning_rate"] == best["trainer"]["learning_rate"]
    assert "rank=r1: trainer.learning_rate=" in searched.log and "of 5 tried" in searched.log
    launches = read_launches(searched.runs_dir, "s")
    assert launches is not None
    last = launches.launches[-1]
    assert [(cell.axes, len(cell.trials), len(cell.runs or [])) for cell in last.searched] == [
        (["trainer.learning_rate"], 5, 2),
        (["trainer.learning_rate"], 6, 2),
    ]
    assert {run_id for cell in last.searched for run_id in cell.trials + (cell.runs or [])} == set(last.run_ids)
    # Launched again, it runs nothing.
    before = list(searched.made)
    assert searched.sweep(*SEARCH) == 0
    assert searched.made == before


class ThroughACluster(clusters._ClusterLauncher):
    """What the launchers for SLURM and Ray share, with runs that are made up where they would be handed over."""

    def __init__(self, made_up_by: Any) -> None:
        super().__init__()
        self._made_up_by = made_up_by

    def compute_all(self, runs: Sequence[PlannedRun]) -> dict[str, Outcome]:
        """Ends the runs at once."""
        outcomes = {}
        for planned in reversed(runs):  # jobs of a cluster end in any order
            found = made_up(planned, self._made_up_by(planned.config))
            write_result(run_dir(planned), found)
            outcomes[planned.run_id] = Outcome(str(found.status), found.error)
        return outcomes


def test_launchers_of_clusters_make_the_same_choices(
    searched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched.score = by_rank
    assert searched.sweep(*SEARCH) == 0
    made = sorted(path.parent.name for path in searched.runs_dir.glob("*/result.json"))
    (tmp_path / "runs").rename(tmp_path / "queue")

    def setup(self: Any, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        launcher = ThroughACluster(by_rank)
        launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.__dict__.update(hydra_context=hydra_context, config=config, launcher=launcher)

    monkeypatch.setattr(sweeper_module.GridSweeper, "setup", setup)
    assert searched.sweep(*SEARCH) == 0
    assert sorted(path.parent.name for path in searched.runs_dir.glob("*/result.json")) == made


def test_a_search_that_is_killed_anywhere_makes_the_same_trials_and_choice(searched: Any, tmp_path: Path) -> None:
    """Killed after each of its results in turn, it ends with the runs of an undisturbed search, none made twice."""
    searched.score = by_rank
    assert searched.sweep(*SEARCH) == 0
    undisturbed, searched.made = sorted(searched.made), []
    (tmp_path / "runs").rename(tmp_path / "undisturbed")
    kills = 0
    draw = random.Random(0)
    while True:
        searched.left = draw.randint(1, 3)
        code = searched.sweep(*SEARCH)
        if code == 0:
            break
        assert code == -9
        kills += 1
    assert kills >= 5
    assert sorted(searched.made) == undisturbed


def test_a_trial_that_diverges_is_an_answer_and_one_that_fails_is_none(searched: Any) -> None:
    def score(wanted: RunConfig) -> float | Status:
        return Status.DIVERGED if wanted.trainer.learning_rate > 3e-3 else by_rank(wanted)

    searched.score = score
    assert searched.sweep(*SEARCH) == 0

    def broken(wanted: RunConfig) -> float | Status:
        assert wanted.rank is not None
        return Status.FAILED if wanted.rank.rank == 4 and wanted.trial else by_rank(wanted)

    searched.score, searched.made = broken, []
    assert searched.sweep(*SEARCH, "dataset.split_seed=1") == 1
    assert "rank=r4: nothing is chosen, because these trials have no score: tiny_bert-local-lora-r4" in searched.log
    assert "rank=r1: trainer.learning_rate=" in searched.log  # the other cell is not held up
    assert sum("-r4-" in run_id for run_id in searched.made) == 3  # once in a sweep, and again by the next
    searched.score = by_rank
    assert searched.sweep(*SEARCH, "dataset.split_seed=1") == 0


def test_rerun_all_makes_every_trial_and_run_once_more(searched: Any) -> None:
    searched.score = by_rank
    assert searched.sweep(*SEARCH) == 0
    first = sorted(searched.made)
    searched.made = []
    assert searched.sweep(*SEARCH, "rerun=all") == 0
    assert sorted(searched.made) == first
    assert max(searched.made.count(run_id) for run_id in first) == 1


def test_several_seeds_of_the_search_are_averaged(searched: Any) -> None:
    def score(wanted: RunConfig) -> float:
        wiggle = {7: 0.2, 8: -0.2}.get(wanted.seed, 0.0)
        return by_rank(wanted) * 0.5 + (wiggle if wanted.trainer.learning_rate > 3e-3 else -wiggle) + 0.25

    searched.score = score
    arguments = [word for word in SEARCH if "search" not in word and "rank" not in word]
    assert searched.sweep(*arguments, "rank=r1", *SEARCH[:1], "hydra.sweeper.search.seeds=[7,8]") == 0
    rates = {run_id.split("-lr")[1].split("-s")[0] for run_id in searched.made if "-s0-" in run_id}
    assert {float(rate) for rate in rates} == {8.5e-4}  # as with one seed and no wiggle


def test_a_grid_that_names_the_setting_is_not_searched(searched: Any) -> None:
    searched.score = by_rank
    grids = "[{method: lora, rank: r1, target_layers: qv}, {method: full, trainer.learning_rate: 1e-4}]"
    assert searched.sweep("hydra.sweeper.search.axis=trainer.learning_rate", f"hydra.sweeper.grids={grids}") == 0
    full = [run_id for run_id in searched.made if "-full-" in run_id]
    assert len(full) == 1 and len(searched.made) == 1 + 5 + 1


def test_the_dry_run_says_what_the_next_round_is(searched: Any, capsys: pytest.CaptureFixture[str]) -> None:
    searched.score = by_rank
    assert searched.sweep(*SEARCH, "hydra.sweeper.dry_run=true") == 0
    assert "in 2 cells, 0 chosen; round 1 of about 3: 6 runs" in capsys.readouterr().out
    searched.left = 6
    assert searched.sweep(*SEARCH) == -9
    assert searched.sweep(*SEARCH, "hydra.sweeper.dry_run=true") == 0
    assert "in 2 cells, 0 chosen; round 2 of about 3: 2 runs" in capsys.readouterr().out
    assert len(searched.made) == 6


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ("axi=x", "axi: no such setting. Known here: axis, max_trials, seeds, trials."),
        ("trials=few", "trials: Value 'few' of type 'str' could not be converted to Integer"),
        ("trials=2", "trials=2: at least 4"),
        ("trials=7", "max_trials=6: at least trials=7"),
        ("seeds=[]", "seeds=[]: give one seed"),
        ("seeds=[1]", "seed=1 is reported as well"),
        ("axis=trainer.learning_rat", "trainer.learning_rat: only settings that are numbers"),
        ("axis=model.name", "model.name: only settings that are numbers"),
        ("axis=seed", "seed: only settings that are numbers"),
        ("axis=5", "axis=5: must be a setting, a list of settings, or a mapping"),
        ("axis=[trainer.learning_rate,rank.alpha,rank.rank]", "one or two settings can be searched"),
        ("axis={rank.alpha:{facto:2}}", "facto: no such setting. Known here: prior, factor, step, lowest, highest."),
        ("axis={rank.alpha:{factor:much}}", "factor: Value 'much' of type 'str' could not be converted to Float"),
        ("axis={rank.alpha:{factor:1}}", "rank.alpha.factor=1.0: must be above 1"),
        ("axis={rank.alpha:{factor:2,step:1}}", "factor=2.0 and step=1.0; give one"),
        ("axis={rank.alpha:{highest:2}}", "begins at 16, outside of lowest=0 to 2"),
        ("axis=method.adapter_dropout", "own value is 0.0, from which no search can begin; give a prior"),
    ],
)
def test_a_search_that_cannot_be_is_refused(
    searched: Any, search: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [] if search.startswith("axis=") else SEARCH[:1]
    assert searched.sweep(*SEARCH[1:], *own, f"hydra.sweeper.search.{search}") == 2
    assert message in capsys.readouterr().err
    assert not searched.made


@pytest.mark.parametrize(
    ("policy", "rate"),
    [
        ("rank.alpha_policy=fixed", 2e-3),
        ("rank.alpha_policy=rslora", 2e-3 * (64 / 8) ** -0.25),
        ("rank.alpha_policy=proportional rank.alpha_per_rank=2 rank.alpha=null", 2e-3 * (64 / 8) ** -0.5),
        ("rank.alpha_policy=rslora variant=random_b", 2e-3),
    ],
)
def test_the_prior_follows_the_law_of_the_rank(searched: Any, policy: str, rate: float) -> None:
    searched.score = by_rank
    searched.left = 3
    assert (
        searched.sweep(
            "hydra.sweeper.search.axis=trainer.learning_rate",
            "method=lora",
            "rank=r64",
            "target_layers=qv",
            *policy.split(),
        )
        == -9
    )
    tried = sorted(float(run_id.split("-lr")[1].split("-s")[0]) for run_id in searched.made)
    assert tried[1] == float(f"{rate:.3g}")


# ---------------------------------------------------------------- trials


def test_a_trial_opens_no_test_file_and_trains_as_its_run_does(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    """With a test file that is not there: the run is refused, and the trial ends with the run's scores on val."""
    absent = {"test_file": str(tmp_path / "absent.csv")}
    trial = config(rows, tmp_path, trial=True, dataset=absent)
    result = run(trial)
    assert (result.status, result.error) == (Status.FINISHED, "")
    assert not [name for name in result.metrics if name.startswith("test_")]
    with pytest.raises(DataError, match=r"absent\.csv"):
        run(config(rows, tmp_path, dataset=absent))
    (tmp_path / "absent.csv").write_text(rows.read_text())
    assert identify(trial).run_id == result.run_id
    reported = run(config(rows, tmp_path, dataset=absent))
    assert {"test_accuracy", "test_nll"} <= set(reported.metrics)
    for name in ("val_accuracy", "val_nll", "train_nll"):
        assert result.metrics[name] == reported.metrics[name]


def test_test_rows_that_are_held_out_of_train_stay_out_of_a_trial(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    trial, reported = (run(config(rows, tmp_path, trial=is_trial)) for is_trial in (True, False))
    assert trial.metrics["val_nll"] == reported.metrics["val_nll"]
    assert trial.metrics["train_nll"] == reported.metrics["train_nll"]
    assert not [name for name in trial.metrics if name.startswith("test_")]
    assert not (
        run_dir(PlannedRun(config(rows, tmp_path, trial=True), identify(config(rows, tmp_path, trial=True))))
        / "predictions/test.parquet"
    ).exists()


def test_a_trial_that_cannot_win_ends_early_and_says_so(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    blown = {"learning_rate": 100.0, "max_steps": 40, "max_gradient_norm": None}
    result = run(config(rows, tmp_path, "full", trial=True, trainer=blown))
    assert result.status is Status.DIVERGED
    assert "of the untrained model and nearly all predictions fell on one class at step" in result.error
    whole = run(config(rows, tmp_path, "full", trainer=blown))
    assert whole.status is Status.FINISHED  # only a trial is ended


@pytest.mark.parametrize(
    ("scores", "untrained", "is_hopeless"),
    [
        ({"nll": 3.0, "majority_share": 1.0}, {"nll": 2.0}, True),
        ({"nll": 3.0, "majority_share": 0.6}, {"nll": 2.0}, False),  # too sure of itself, and often right
        ({"nll": 1.9, "majority_share": 1.0}, {"nll": 2.0}, False),  # has not begun to learn
        ({"nll": 3.0, "perplexity": 20.0}, {"nll": 2.0}, True),
        ({"mse": 3.0, "pearson": 0.9}, {"mse": 2.0}, True),
        ({"mse": 1.0}, {"mse": 2.0}, False),
        ({"nll": 3.0}, {}, False),
        ({"nll": 2.1, "majority_share": 1.0}, {"nll": 2.0}, False),
    ],
)
def test_what_cannot_win(scores: dict[str, float], untrained: dict[str, float], is_hopeless: bool) -> None:
    assert (why_hopeless(scores, untrained) is not None) is is_hopeless
