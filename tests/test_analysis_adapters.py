"""`python -m analysis adapters`: what is read from the weights of tiny runs, and what is said of runs without any."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from pandas.testing import assert_frame_equal
from safetensors.torch import load_file, save_file
from test_run import config, rows  # noqa: F401

from analysis import select
from analysis.__main__ import main
from analysis.adapters import measures
from analysis.adapters.figures import adapter_figures
from analysis.adapters.findings import Findings, find_in_weights
from analysis.adapters.kept_scores import KeptScores
from analysis.adapters.proposals import Role, count, propose
from analysis.adapters.scored_tables import intruder_figure, intruder_table, truncation_figure, truncation_table
from analysis.adapters.scoring import KEPT, score_truncations, score_without_intruders
from analysis.adapters.summaries import over_seeds
from analysis.adapters.tables import adapter_tables
from analysis.load import load_runs
from analysis.tables.cells import MISSING
from analysis.tables.suggestion import Adapter, Claim, Hypothesis, Suggestion, read_suggestion, suggestion_table
from harness.config.composing import compose, from_composed, register
from harness.config.overrides import as_override_value
from harness.config.schema import ModelConfig, TinyModel
from harness.content.identity import identify
from harness.deltas import find_each, read_deltas
from harness.evaluate import evaluate_changed, origin_of_scores
from harness.models.loading import load_model
from harness.models.saving import save_model
from harness.models.tokenizers import load_tokenizer
from harness.plan import plan
from harness.results.schema import Status
from harness.run import run
from harness.saved import SavedRun, find_saved
from hydra_plugins.lora_harness._grids import expand

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def runs_dir(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:  # noqa: F811
    """Two ranks of LoRA and full fine-tuning, two seeds each, all from the same tiny base."""
    folder = tmp_path_factory.mktemp("weights")
    tiny = ModelConfig(name="tiny_bert", tiny=TinyModel.bert)
    tokenizer = load_tokenizer(tiny)
    base = load_model(tiny, num_labels=3, pad_token_id=tokenizer.pad_token_id, seed=0)
    save_model(base.model, tokenizer, folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_HARNESS_CACHE", str(folder / "cache"))
        for seed in SEEDS:
            same: dict[str, Any] = {
                "model": {"name": "small", "tiny": None, "path": str(folder / "base")},
                "trainer": {"max_steps": 3, "eval_every": 0},
                "seed": seed,
                "sweep": "small",
            }
            for wanted in (
                *(config(rows, folder / "runs", rank={"rank": rank, "alpha": 16.0}, **same) for rank in (2, 4)),
                config(rows, folder / "runs", "full", **same),
            ):
                result = run(wanted)
                assert result.status is Status.FINISHED, result.error
        yield folder / "runs"


@pytest.fixture(scope="module")
def found(runs_dir: Path) -> Findings:
    return findings(runs_dir)


def findings(runs_dir: Path) -> Findings:
    frame = load_runs(runs_dir).frame
    cells = select.records(select.best_cells(select.cells(frame)))
    return find_in_weights(cells, dict(zip(frame["run_id"], frame["config.seed"], strict=True)), runs_dir)


def test_each_matrix_of_each_run_has_a_row_that_its_dense_delta_weight_gives(found: Findings, runs_dir: Path) -> None:
    assert not found.problems
    spectra = found.spectra
    # q and v of two blocks for two ranks and two seeds; six roles for full fine-tuning.
    assert len(spectra) == 2 * (2 * 4 + 12)
    runs, _ = find_each(list(dict.fromkeys(spectra["run_id"])), runs_dir)
    for saved, deltas in read_deltas(runs, []):
        own = spectra[spectra["run_id"] == saved.run_id]
        assert len(own) == len(deltas)
        for (_, row), delta in zip(own.iterrows(), deltas, strict=True):
            values = torch.linalg.svdvals(delta.matrix().double())
            assert (row["role"], row["block"]) == (delta.role, delta.target.block)
            assert row["stable_rank"] == pytest.approx(measures.stable_rank(values), rel=1e-6)
            assert row["energy_rank_90"] == measures.energy_rank(values, 0.9)
            assert row["delta_norm"] == pytest.approx(delta.matrix().norm().item(), rel=1e-5)
            assert row["drift"] == pytest.approx((delta.matrix().norm() / delta.base.norm()).item(), rel=1e-5)
            assert row["effective_rank"] <= (saved.config.rank.rank if saved.config.rank else 64) + 1e-9


def test_every_measure_stands_beside_its_random_floor(found: Findings) -> None:
    full = next(index for index, cell in enumerate(found.cells) if cell["rank"] is None)
    spectra = found.spectra
    # Random factors have all their directions, random matrices most of theirs.
    assert (spectra["effective_rank_random"] > 0.8 * spectra["rank"].fillna(40)).all()
    by_hand = found.amplification.eval("base_norm * rank") / 64
    square = found.amplification["role"].isin(["q", "v"])
    assert found.amplification["floor"][square].to_numpy() == pytest.approx(by_hand[square].to_numpy())
    assert (found.amplification["projected"] <= found.amplification["of_base"] * (1 + 1e-9)).all()
    assert sorted(found.amplification[found.amplification["condition"] == full]["rank"].unique()) == [1, 4, 16, 64]
    counts = found.intruders
    assert (counts["count"] <= counts["k"]).all() and (counts["count_random"] <= counts["k"]).all()
    wider = counts.groupby(["run_id", "role", "block", "k"])["count"]
    assert wider.apply(lambda each: each.is_monotonic_increasing).all()  # with epsilon


def test_subspaces_are_compared_by_rank_seed_block_and_with_full_fine_tuning(found: Findings) -> None:
    similarity = found.similarity
    assert set(similarity["kind"]) == {"ranks", "seeds", "blocks", "full"}
    assert similarity["phi"].between(0, 1 + 1e-6).all()
    assert (similarity["floor"] * 64 == similarity["k"])[similarity["role"] != "down"].all()
    ranks = similarity[similarity["kind"] == "ranks"]
    assert set(ranks["k"]) == {1, 2} and (ranks["seed"] == ranks["other_seed"]).all()
    assert len(ranks) == 2 * 4 * 2  # seeds, matrices, k
    seeds = similarity[similarity["kind"] == "seeds"]
    assert set(zip(seeds["seed"], seeds["other_seed"], strict=True)) == {(0, 1)}
    (grid, *_) = (grids[0] for key, grids in found.grids.items() if key[0] == "ranks")
    assert sorted(grid.shape) == [2, 4]


def test_means_are_over_blocks_and_then_over_seeds() -> None:
    frame = pd.DataFrame(
        {"condition": 0, "seed": [0, 0, 1, 1], "block": [0, 1, 0, 1], "drift": [1.0, 3.0, 4.0, 6.0], "none": None}
    )
    (row,) = over_seeds(frame, ["condition"], ["drift", "none"])
    assert (row["drift"], row["drift_n"]) == (3.5, 2)  # of 2 and 5
    assert row["drift_sd"] == pytest.approx(3 / 2**0.5)
    assert row["drift_ci"] == pytest.approx(12.706204736 * 1.5)
    assert (row["none"], row["none_sd"], row["none_n"]) == (None, None, 0)


def test_tables_and_figures_say_what_was_found(found: Findings) -> None:
    tables = {table.name: table for table in adapter_tables(found)}
    assert [*tables] == [f"adapter_{n}" for n in ("spectra", "amplification", "intruders", "drift", "similarity")]
    spectra = tables["adapter_spectra"]
    named = [row[0:4] for row in spectra.text.rows]
    assert [row[3] for row in named if row[0] == "full"] == ["q", "k", "v", "o", "up", "down"]
    assert [row for row in named if row[1] == "2"] == [["lora", "2", "qv", "q"], ["lora", "2", "qv", "v"]]
    assert len(tables["adapter_intruders"].numbers) == 10 * 7 * 4  # roles of conditions, epsilon, k
    assert list(tables["adapter_drift"].text.titles[-2:]) == ["block 0", "block 1"]
    figures = adapter_figures(found)
    assert [figure.name for figure in figures] == [
        *("adapter_spectra", "adapter_amplification", "adapter_intruders", "adapter_drift"),
        *(f"adapter_similarity_{kind}" for kind in ("ranks", "seeds", "full", "blocks")),
    ]
    drawn = {figure.name: figure.draw() for figure in figures}
    assert {axes.get_title() for axes in drawn["adapter_spectra"].axes} == {"q", "v", "k", "o", "up", "down"}
    lines = {line.get_label() for line in drawn["adapter_drift"].axes[0].containers}
    assert lines == {"lora r2 qv", "lora r4 qv", "full"}


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_an_interval_that_reaches_zero_is_said(found: Findings, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.adapters.figures.MIN_SEEDS_OF_INTERVAL", 2)
    frame = found.amplification
    apart = frame.assign(factor=1.0 + spread * (frame["seed"] == SEEDS[0]) * 9.0)
    drawn = {figure.name: figure.draw() for figure in adapter_figures(replace(found, amplification=apart))}
    said = drawn["adapter_amplification"].get_supxlabel()
    assert ("an interval that reaches zero ends at the lower edge" in " ".join(said.split())) == bool(spread)


def test_the_command_writes_tables_figures_and_frames(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--sweep", "small", "--runs-dir", str(runs_dir), "--reports-dir", str(tmp_path)]
    assert main(["adapters", *command]) == 0
    assert "Weights were read of 6 runs." in capsys.readouterr().out
    folder = tmp_path / "small" / "adapters"
    assert (folder / "adapters.md").read_text().count("\n## ") == 6  # figures and five tables
    assert sorted(path.stem for path in (folder / "data").iterdir()) == [
        *("amplification", "intruders", "similarity", "singular_values", "spectra")
    ]
    frame = pd.read_csv(folder / "data" / "spectra.csv")
    assert list(frame.columns[:6]) == ["model", "dataset", "method", "rank", "target_layers", "learning_rate"]
    assert len(frame) == 40 and "condition" not in frame
    assert len(list((folder / "figures").glob("*.png"))) == 8


def test_a_report_has_them_on_request(
    runs_dir: Path, found: Findings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.adapters.findings.find_in_weights", lambda *arguments: found)  # as above
    monkeypatch.setattr("analysis.adapters.figures.adapter_figures", lambda found: [])
    command = ["--sweep", "small", "--runs-dir", str(runs_dir), "--reports-dir", str(tmp_path)]
    assert main(["report", "--adapters", *command]) == 0
    assert (tmp_path / "small" / "tables" / "adapter_spectra.tex").is_file()
    assert "How many directions the delta weights have." in (tmp_path / "small" / "report.html").read_text()


def test_runs_without_weights_are_one_sentence_each(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs_dir, tmp_path / "runs")
    folders = sorted(path for path in (tmp_path / "runs").iterdir() if (path / "adapter").is_dir())
    shutil.rmtree(folders[0] / "adapter")
    problems = findings(tmp_path / "runs").problems
    assert len(problems) == 1 and problems[0].startswith(f"{folders[0].name}: its weights were not kept")
    for path in (tmp_path / "runs").glob("*/*/*.safetensors"):
        path.unlink()
    capsys.readouterr()
    assert main(["adapters", "--runs-dir", str(tmp_path / "runs"), "--reports-dir", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "no run has weights to analyse:" and len(lines) == 1 + 6
    assert not (tmp_path / "all").exists()


def test_runs_from_different_bases_are_not_compared(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    for seed in SEEDS:  # which a tiny model is drawn from
        run(config(rows, tmp_path, seed=seed, trainer={"max_steps": 2, "eval_every": 0}))
    found = findings(tmp_path)
    assert set(found.similarity["kind"]) == {"blocks"}
    assert len(found.problems) == 1 and "tiny_bert began from different weights" in found.problems[0]
    assert len(found.spectra) == 8


# ---------------------------------------------------------------- scored with other weights


def test_the_whole_difference_scores_as_full_fine_tuning_and_rank_0_as_without_it(runs_dir: Path) -> None:
    problems: list[str] = []
    frame = load_runs(runs_dir, sweep="small").frame
    cells = select.records(select.best_cells(select.cells(frame)))
    seeds = dict(zip(frame["run_id"], frame["config.seed"], strict=True))
    said: list[str] = []
    scored = score_truncations(cells, seeds, runs_dir, problems, progress=said.append)
    num_full = scored["run_id"].nunique()
    assert said[-1] == f"{scored['run_id'].iloc[-1]}: scored 7 times ({num_full} of {num_full} runs)"
    assert not problems and set(scored["rank"].dropna()) == {0, 1, 2, 4, 16, 64}
    test = scored[scored["split"] == "test"].set_index(["run_id", "rank"])["nll"]
    for run_id in dict.fromkeys(scored["run_id"]):
        own = frame.set_index("run_id").loc[run_id, "test_nll"]
        # The whole of it, and its best approximation of full rank: the same matrices.
        whole = scored[(scored["run_id"] == run_id) & scored["rank"].isna() & (scored["split"] == "test")]["nll"].item()
        assert whole == own
        assert test[run_id, 64] == pytest.approx(own, abs=1e-5)
        assert abs(test[run_id, 0] - own) > 1e-4
    table = truncation_table(scored, cells, problems)
    assert [row[table.text.titles.index("rank of the difference")] for row in table.text.rows] == [
        *("whole", "0", "1", "2", "4", "16", "64")
    ]
    assert table.text.titles[-1] == "trained: lora qv"
    assert [row[-1] == MISSING for row in table.text.rows] == [True, True, True, False, False, True, True]
    truncation_figure(scored, cells).draw()


def test_intruders_lose_a_part_of_their_singular_value_and_others_as_a_control(runs_dir: Path) -> None:
    frame = load_runs(runs_dir, sweep="small").frame
    cells = [cell for cell in select.records(select.best_cells(select.cells(frame))) if cell["rank"] == 4]
    seeds = dict(zip(frame["run_id"], frame["config.seed"], strict=True))
    problems: list[str] = []
    scored = score_without_intruders(cells, seeds, runs_dir, problems, epsilon=0.999)  # nearly all that has turned
    assert not problems
    test = scored[scored["split"] == "test"]
    assert (test["num_intruders"] > 0).all()
    for run_id, own in test.groupby("run_id"):
        at = own.set_index(["kept", "is_control"])["nll"]
        assert at[1.0, False] == pytest.approx(frame.set_index("run_id").loc[run_id, "test_nll"], abs=1e-5)
        assert set(at.index) == {(1.0, False), *((kept, control) for kept in KEPT for control in (False, True))}
        assert at[0.0, False] != at[0.0, True] and abs(at[0.0, False] - at[1.0, False]) > abs(
            at[0.7, False] - at[1.0, False]
        )
    table = intruder_table(scored, cells, problems)
    assert table.text.titles == [
        *("method", "rank", "target layers", "intruders", "as trained"),
        *(f"{kept:g} of {what} left" for kept in KEPT for what in ("intruders", "others")),
    ]
    intruder_figure(scored, cells).draw()
    # A run without intruders is scored once.
    assert set(score_without_intruders(cells, seeds, runs_dir, problems, epsilon=1e-6)["kept"]) == {1.0}


def test_what_was_scored_is_kept_and_not_scored_again(
    runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the first run, and asked again: the rest, and the same rows; edited code scores everything anew."""
    frame = load_runs(runs_dir, sweep="small").frame
    cells = select.records(select.best_cells(select.cells(frame)))
    seeds = dict(zip(frame["run_id"], frame["config.seed"], strict=True))
    monkeypatch.setattr("harness.evaluate.environment", lambda device: CHECKOUT)
    scored_here: list[str] = []

    def evaluate(saved: SavedRun, *arguments: Any, **options: Any) -> Any:
        if len(scored_here) == 1 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        scored_here.append(saved.run_id)
        return evaluate_changed(saved, *arguments, **options)

    monkeypatch.setattr("analysis.adapters.scoring.evaluate_changed", evaluate)

    def scores(path: Path | None, said: list[str], **options: Any) -> pd.DataFrame:
        kept = KeptScores(path)
        return score_truncations(cells, seeds, runs_dir, [], progress=said.append, kept=kept, **options)

    file = tmp_path / "small" / "scores.jsonl"
    with pytest.raises(KeyboardInterrupt):
        scores(file, [])
    file.write_text(f'{file.read_text()}{{"key": "half a li')
    (tmp_path / "again").touch()
    said: list[str] = []
    first = scores(file, said)
    assert said[0] == "1 of 2 runs are scored already" and len(scored_here) == 2 == len(set(scored_here))
    said.clear()
    assert_frame_equal(scores(file, said), first)
    assert said == ["2 of 2 runs are scored already"] and len(scored_here) == 2
    assert_frame_equal(scores(None, []), first)
    assert len(scored_here) == 4
    for change in ({"git_commit": "b" * 40}, {"versions": {"torch": "3"}}, {"git_dirty": True}):
        monkeypatch.setattr("harness.evaluate.environment", lambda device, change=change: CHECKOUT | change)
        before = len(scored_here)
        assert_frame_equal(scores(file, []), first)
        assert len(scored_here) == before + 2
    before = len(scored_here)
    scores(file, [])  # nothing says which code an edited one is
    assert len(scored_here) == before + 2


CHECKOUT = {"git_commit": "a" * 40, "git_dirty": False, "versions": {"torch": "2"}, "device_name": "a CPU"}


def test_scores_follow_from_weights_base_data_and_code(
    runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs_dir, tmp_path / "runs")
    frame = load_runs(runs_dir, sweep="small").frame
    (saved,) = find_saved([frame[frame["config.method.name"] == "full"]["run_id"].iloc[0]], tmp_path / "runs")
    facts: dict[str, Any] = dict(CHECKOUT)
    monkeypatch.setattr("harness.evaluate.environment", lambda device: facts)

    def of(**recorded: Any) -> str | None:
        return origin_of_scores(
            replace(saved, result=replace(saved.result, environment=saved.result.environment | recorded))
        )

    origins = [of(), of(content={"dataset.train": "other"})]
    for name, value in (("git_commit", "b" * 40), ("versions", {"torch": "3"}), ("device_name", "a GPU")):
        facts[name] = value
        origins.append(of())
        facts[name] = CHECKOUT[name]
    base = saved.config.model.path
    assert base is not None
    shutil.copytree(base, tmp_path / "base")
    other_base = replace(saved.config, model=replace(saved.config.model, path=str(tmp_path / "base")))
    saved = replace(saved, config=other_base)
    assert of() == origins[0]  # the same content in another folder
    for changed in (tmp_path / "base" / "model.safetensors", next(saved.weights_dir.glob("*.safetensors"))):
        tensors = load_file(changed)
        name = max(tensors, key=lambda each: tensors[each].numel())
        save_file({**tensors, name: tensors[name] + 1.0}, changed, metadata={"format": "pt"})
        origins.append(of())
    assert None not in origins and len(set(origins)) == len(origins) == 7
    assert of(content=None) is None
    for state in (True, None):  # edited since its commit; no checkout, or git did not answer
        facts["git_dirty"] = state
        assert of() is None


def test_scores_with_another_epsilon_are_other_scores(
    runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = load_runs(runs_dir, sweep="small").frame
    cells = [cell for cell in select.records(select.best_cells(select.cells(frame))) if cell["rank"] == 4]
    seeds = dict(zip(frame["run_id"], frame["config.seed"], strict=True))
    monkeypatch.setattr("harness.evaluate.environment", lambda device: CHECKOUT)
    file, said = tmp_path / "scores.jsonl", list[str]()
    for epsilon in (0.999, 1e-6, 0.999):
        kept = KeptScores(file)
        score_without_intruders(cells, seeds, runs_dir, [], epsilon=epsilon, kept=kept, progress=said.append)
    scored = [line.split(": ")[-1] for line in said]
    assert scored == [
        *("scored 7 times (1 of 2 runs)", "scored 7 times (2 of 2 runs)"),
        *("scored 1 times (1 of 2 runs)", "scored 1 times (2 of 2 runs)"),
        "2 of 2 runs are scored already",
    ]


def test_a_run_without_intruders_counts_beside_those_that_have_some(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The means of a condition are over the same runs whatever part is left."""
    frame = load_runs(runs_dir, sweep="small").frame
    cells = [cell for cell in select.records(select.best_cells(select.cells(frame))) if cell["rank"] == 4]
    seeds = dict(zip(frame["run_id"], frame["config.seed"], strict=True))
    find, calls = measures.find_intruders, list[int]()

    def find_some(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        tuned, found = find(*arguments, **options)
        return tuned, found if len(calls) <= 4 else found[:0]  # the second run, of four matrices, has none

    monkeypatch.setattr(measures, "find_intruders", find_some)
    scored = score_without_intruders(cells, seeds, runs_dir, [], epsilon=0.999)
    assert set(scored.groupby("run_id").size()) == {7}
    without = scored[scored["num_intruders"] == 0]
    assert without["nll"].nunique() == 1 and len(without) == 7


def test_scoring_takes_all_cores_also_of_a_run_that_had_a_share(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (saved,) = find_saved([load_runs(runs_dir, sweep="small").frame["run_id"].iloc[0]], runs_dir)
    saved = replace(saved, config=replace(saved.config, num_threads=1))
    asked: list[int | None] = []
    monkeypatch.setattr("harness.evaluate.set_threads", lambda config: asked.append(config.num_threads))
    assert set(evaluate_changed(saved, {"as trained": tuple}, splits=("val",))) == {"as trained"}
    assert asked == [None]


# ---------------------------------------------------------------- suggest


ROLES = {
    "q": Role(rank=4, cost=100, limit=64, energy_rank=1.2, effective_rank=2.0, energy=1.0),
    "v": Role(rank=4, cost=100, limit=64, energy_rank=4.0, effective_rank=3.0, energy=89.0),
    "up": Role(rank=4, cost=300, limit=64, energy_rank=2.0, effective_rank=1.0, energy=10.0),
}


def test_proposals_worked_by_hand() -> None:
    fewer, moved, placed = propose(ROLES)
    assert (fewer.claim, fewer.ranks) == (Claim.AS_GOOD, {"q": 2, "v": 4, "up": 2})
    assert count(fewer.ranks, ROLES) == 1200
    # 2000 parameters at 2 : 3 : 1 are 800 a unit: 5, 7.5 and 2.5; the 200 left over are one for v and one for q.
    assert (moved.claim, moved.ranks) == (Claim.BETTER, {"q": 6, "v": 8, "up": 2})
    assert count(moved.ranks, ROLES) == 2000
    # v alone has 89 % of all that moved; with up, which has more for its parameters than q, 99 %.
    assert (placed.claim, placed.ranks) == (Claim.AS_GOOD, {"v": 5, "up": 5})
    assert count(placed.ranks, ROLES) == 2000
    alike = Role(rank=1, cost=10, limit=64, energy_rank=1.0, effective_rank=1.0, energy=1.0)
    assert propose({"q": alike, "v": alike}) == []


def test_a_suggestion_is_written_run_and_judged(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs_dir, tmp_path / "runs")
    path = tmp_path / "sweeps" / "own.yaml"
    command = ["suggest", "--sweep", "small", "--runs-dir", str(tmp_path / "runs"), "--to", str(path)]
    assert main(command) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    suggestion = read_suggestion(tmp_path / "runs", "own")
    assert suggestion is not None and suggestion.parent_sweep == "small" and suggestion.hypotheses
    assert main(command) == 2 and "is there already" in capsys.readouterr().err
    # It says where it is, and its runs go where the hypotheses are kept.
    launch = f"python -m harness -m sweeps=own --config-dir {tmp_path} runs_dir={tmp_path / 'runs'}\n"
    assert printed.endswith(f"run it: {launch}") and f"# Command: {launch}" in path.read_text()
    assert path.read_text().startswith("# @package _global_\n")
    for wrong in ("own.txt", "p q.yaml", "../own.yaml"):
        assert main([*command[:-1], str(path.parent / wrong)]) == 2
        assert "must be a file NAME.yaml in a folder called sweeps" in capsys.readouterr().err

    # Every run of the file is the parent or a proposal, with the count that was predicted, on seeds that are new.
    register()
    body = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(body, dict)
    grids = body.pop("hydra")["sweeper"]["grids"]
    overrides = [f"{name}={as_override_value(value)}" for name, value in leaves(body)]
    counts = []
    parent_cells = set(load_runs(tmp_path / "runs", sweep="small").frame["cell_id"])
    for number, grid in enumerate(expand(grids, {})):
        wanted = from_composed(compose([*overrides, *grid, f"runs_dir={tmp_path / 'runs'}"]))
        assert wanted.seed == 2 + number % 3
        counts.append(plan(wanted).num_adapter_params)
        assert (identify(wanted).cell_id in parent_cells) == (number < 3)
    expected = [suggestion.hypotheses[0].parent_num_params, *(one.num_params for one in suggestion.hypotheses)]
    assert counts == [each for each in expected for _ in range(3)]

    # Before and after its runs.
    frame = load_runs(tmp_path / "runs", sweep="small").frame
    best = select.best_cells(select.cells(frame))
    before = suggestion_table(suggestion, best, frame)
    assert before is not None and {row[-1] for row in before.text.rows} == {"not run yet"}
    tried = expand(grids, {})
    for grid in (tried[0], tried[1], tried[3], tried[4]):
        wanted = from_composed(compose([*overrides, *grid, f"runs_dir={tmp_path / 'runs'}", "tracking=off"]))
        assert run(wanted).status is Status.FINISHED
    frame = load_runs(tmp_path / "runs", sweep="own").frame
    after = suggestion_table(suggestion, select.best_cells(select.cells(frame)), frame)
    assert after is not None
    assert after.text.rows[0][-1] in ("held", "did not hold", "not shown")
    assert after.numbers["num_adapter_params"][0] == suggestion.hypotheses[0].num_params


def test_no_other_parent_takes_the_place_of_the_best(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs_dir, tmp_path / "runs")
    frame = load_runs(tmp_path / "runs", sweep="small").frame
    cells = [cell for cell in select.records(select.best_cells(select.cells(frame))) if cell["method"] == "lora"]
    best = max(cells, key=lambda cell: cell["val_accuracy"])
    for run_id in best["run_ids"]:
        shutil.rmtree(tmp_path / "runs" / run_id / "adapter")
    path = tmp_path / "sweeps" / "own.yaml"
    assert main(["suggest", "--sweep", "small", "--runs-dir", str(tmp_path / "runs"), "--to", str(path)]) == 2
    printed = capsys.readouterr().err
    assert "is the best LoRA on val, and its weights cannot be read" in printed and best["run_ids"][0] in printed
    assert not path.exists()


def test_numbers_that_are_none_are_a_problem_of_their_run(runs_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(runs_dir, tmp_path / "runs")
    frame = load_runs(tmp_path / "runs", sweep="small").frame
    cells = select.records(select.best_cells(select.cells(frame)))
    damaged = next(cell["run_ids"][0] for cell in cells if cell["method"] == "lora")
    file = next((tmp_path / "runs" / damaged / "adapter").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    seeds = dict(zip(frame["run_id"], frame["config.seed"], strict=True))
    found = find_in_weights(cells, seeds, tmp_path / "runs")
    assert [text for text in found.problems if text.startswith(damaged)] == [
        text for text in found.problems if "are not all finite numbers; the file is damaged" in text
    ]
    assert damaged not in set(found.spectra["run_id"]) and len(found.spectra)


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize(
    ("claim", "proposal", "verdict"),
    [
        (Claim.AS_GOOD, [0.901, 0.911, 0.919], "held"),
        (Claim.AS_GOOD, [0.95, 0.96, 0.97], "held"),  # better is as good
        (Claim.BETTER, [0.95, 0.961, 0.97], "held"),
        (Claim.BETTER, [0.901, 0.911, 0.919], "not shown"),
        (Claim.BETTER, [0.85, 0.861, 0.87], "did not hold"),
        (Claim.AS_GOOD, [0.85, 0.861, 0.87], "did not hold"),
        (Claim.AS_GOOD, [0.80, 0.91, 1.0], "not shown"),
    ],
)
def test_the_verdict_on_a_claim(claim: Claim, proposal: list[float], verdict: str) -> None:
    def cell(rank: int, values: list[float]) -> dict[Any, Any]:
        series = pd.Series(values)
        summary = {"test_accuracy": series.mean(), "test_accuracy_sd": series.std(), "test_accuracy_n": len(values)}
        by_seed = {"test_accuracy": dict(enumerate(values))}
        same = dict.fromkeys(("model", "dataset", "recipe_id", "method", "target_layers", "learning_rate"), "x")
        costs = {"num_adapter_params": 10.0, "num_adapter_params_n": 3, "num_collapsed": 0, "num_finished": 3}
        return {
            **same,
            **summary,
            **costs,
            "by_seed": by_seed,
            "best_metric": "accuracy",
            "rank": rank,
            "run_ids": (str(rank),),
        }

    best = pd.DataFrame([cell(2, proposal), cell(4, [0.90, 0.91, 0.92])], dtype=object)
    frame = pd.DataFrame(
        {
            "run_id": ["2", "4"],
            "config.method.name": "lora",
            "config.rank.rank": [2, 4],
            "config.target_layers.name": "qv",
        }
    )
    one = Hypothesis("fewer", claim, "why", Adapter(2, {}, "qv"), Adapter(4, {}, "qv"), 10, 20)
    table = suggestion_table(Suggestion("s", "p", [one]), best, frame)
    assert table is not None
    assert table.text.rows[0][-1] == verdict
