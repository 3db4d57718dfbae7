"""Packs of whole runs: each leaves what it leaves alone."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_run import _own_cache, rows, stopped_after  # noqa: F401 (fixtures)
from test_run import config as tiny_config

from harness.config.schema import Device, ModelConfig, RunConfig, TinyModel
from harness.config.validation import ConfigError
from harness.content.identity import PlannedRun, identify, planned
from harness.data import labelled, sources
from harness.data.batches import Batch
from harness.measure.memory import MemoryPeak
from harness.methods.packable import why_alone
from harness.methods.packed import PackedLayer
from harness.models.loading import load_model
from harness.models.saving import save_model
from harness.models.tokenizers import load_tokenizer
from harness.prepare import KeptData
from harness.processes.preparation import Preparation
from harness.results.claims import current_owner
from harness.results.files import CURVE_FILE
from harness.results.schema import RunResult, Status, read_result
from harness.run import run
from harness.tasks.families import find_family
from harness.training import packs
from harness.training.known_peaks import KnownPeaks, step_key
from harness.training.learner import Learner
from harness.training.ledger import Spending
from hydra_plugins.lora_harness import _worker as worker
from hydra_plugins.lora_harness._packs import in_order, pack_key, pack_size

# What is a figure of the whole process, and so of no run in a pack.
OF_THE_PROCESS = {"wall_seconds", "peak_rss_bytes", "train_seconds"}
OF_THE_CLOCK = {*OF_THE_PROCESS, "preparation_seconds", "step_seconds_median", "train_tokens_per_second"}


@pytest.fixture(autouse=True, scope="module")
def _base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A base that is the same at every seed, as one that was downloaded."""
    tiny = ModelConfig("tiny", tiny=TinyModel.bert)
    folder = tmp_path_factory.mktemp("base")
    model = load_model(tiny, num_labels=3, pad_token_id=0, seed=0).model
    save_model(model, load_tokenizer(tiny), folder)
    BASE["path"] = str(folder)
    yield
    BASE.clear()


BASE: dict[str, Any] = {}


def config(rows: Path, runs_dir: Path, method: str = "lora", /, **overrides: Any) -> RunConfig:  # noqa: F811
    model = {"name": "saved_bert", "tiny": None, **BASE, **overrides.pop("model", {})}
    return tiny_config(rows, runs_dir, method, model=model, **overrides)


def compute(configs: list[RunConfig], size: int) -> dict[str, worker.Outcome]:
    outcomes: dict[str, worker.Outcome] = {}
    runs = [planned(each) for each in configs]
    worker.compute_pack(runs, size=size, report=outcomes.__setitem__)
    assert outcomes.keys() == {run.run_id for run in runs}
    return outcomes


def result_of(wanted: RunConfig) -> RunResult:
    return read_result(Path(wanted.runs_dir) / identify(wanted).run_id / "result.json")


def require_equal(ours: Path, theirs: Path) -> None:
    """Two folders of one run, in a pack and alone: scores and curves to round-off, sizes and counts exactly."""
    packed, alone = read_result(ours / "result.json"), read_result(theirs / "result.json")
    assert (packed.run_id, packed.cell_id, packed.status) == (alone.run_id, alone.cell_id, alone.status)
    assert alone.metrics.keys() - packed.metrics.keys() == OF_THE_PROCESS
    for name, value in packed.metrics.items():
        if name not in OF_THE_CLOCK:
            assert value == pytest.approx(alone.metrics[name], rel=0 if name.endswith("bytes") else 1e-4), name
    curves = [
        [json.loads(line) for line in (folder / CURVE_FILE).read_text().splitlines()] for folder in (ours, theirs)
    ]
    assert len(curves[0]) == len(curves[1]) >= 3
    for row, expected in zip(*curves, strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - OF_THE_CLOCK:
            assert row[name] == pytest.approx(expected[name], rel=1e-4)
    for folder in ("adapter", "head"):
        for path in (theirs / folder).glob("*.safetensors"):
            found = load_file(ours / folder / path.name)
            for name, value in load_file(path).items():
                assert float((found[name] - value).norm()) <= 1e-4 * float(value.norm()) + 1e-7, name
    assert {path.name for path in ours.iterdir()} - {"log.txt"} == {path.name for path in theirs.iterdir()} - {
        "log.txt"
    }


def varied(rows: Path, runs_dir: Path) -> list[RunConfig]:  # noqa: F811
    return [
        config(rows, runs_dir, seed=1),
        config(rows, runs_dir, rank={"rank": 1}, trainer={"learning_rate": 1e-2, "max_steps": 3}),
        config(rows, runs_dir, trainer={"micro_batch_size": 4, "batch_size": 12}, method={"adapter_dropout": 0.2}),
        config(rows, runs_dir, target_layers={"name": "all", "projections": ["all"]}),
    ]


def test_runs_of_a_pack_leave_what_they_leave_alone(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    """Three at a time of four: claims, folders, curves, logs, weights and results are separate."""
    outcomes = compute(varied(rows, tmp_path / "packed"), size=3)
    assert {outcome.status for outcome in outcomes.values()} == {"finished"}
    together = []
    for wanted in varied(rows, tmp_path / "alone"):
        run_id = run(wanted).run_id
        require_equal(tmp_path / "packed" / run_id, tmp_path / "alone" / run_id)
        packed, alone = (read_result(tmp_path / name / run_id / "result.json") for name in ("packed", "alone"))
        together.append(packed.environment["packed"])
        assert "packed" not in alone.environment
        assert packed.metrics["step_seconds_median"] > 0
        assert packed.metrics["train_tokens_per_second"] > 0
        log = (tmp_path / "packed" / run_id / "log.txt").read_text()
        assert log.count(run_id) == 2  # its beginning and its end; nothing of the others
        assert not any(other in log for other in outcomes if other != run_id)
        assert outcomes[run_id].headline == alone.headline or outcomes[run_id].headline
    # Three are in training at once; that with adapter dropout shares a pass only with batches that are as long as its.
    assert together == [2, 2, 1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_runs_of_a_pack_on_a_gpu_score_as_they_do_alone(rows: Path, tmp_path: Path, precision: str) -> None:  # noqa: F811
    def wanted(runs_dir: Path) -> list[RunConfig]:
        trainer = {"precision": precision}
        return [
            replace(
                config(rows, runs_dir, rank={"rank": rank}, trainer=trainer), device=Device.cuda, allow_busy_device=True
            )
            for rank in (1, 4, 8)
        ]

    compute(wanted(tmp_path / "packed"), size=3)
    for each in wanted(tmp_path / "alone"):
        alone = run(each)
        packed = read_result(tmp_path / "packed" / alone.run_id / "result.json")
        assert (packed.status, packed.environment["packed"]) == (Status.FINISHED, 3)
        assert packed.metrics["train_nll"] == pytest.approx(
            alone.metrics["train_nll"], rel=1e-4 if precision == "fp32" else 0.02
        )
        assert packed.metrics["peak_memory_bytes"] == alone.metrics["peak_memory_bytes"]


def test_one_that_diverges_and_one_that_cannot_begin_leave_the_others(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    wild = config(rows, tmp_path, trainer={"learning_rate": 1e30, "max_gradient_norm": None})
    too_long = config(rows, tmp_path, dataset={"max_length": 4000}, seed=5)
    good = [config(rows, tmp_path, seed=seed) for seed in (0, 1)]
    outcomes = compute([wild, too_long, *good], size=2)
    assert [outcomes[identify(each).run_id].status for each in (wild, too_long, *good)] == [
        "diverged",
        "failed",
        "finished",
        "finished",
    ]
    assert "reads at most" in outcomes[identify(too_long).run_id].error
    assert outcomes[identify(wild).run_id].error == result_of(wild).error
    alone = run(config(rows, tmp_path / "alone", seed=0))
    require_equal(tmp_path / alone.run_id, tmp_path / "alone" / alone.run_id)


def test_a_pack_that_is_stopped_resumes_where_its_runs_were(
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """SIGTERM at step 3 of one: all keep a checkpoint, waiting ones do not begin; then packed otherwise, or alone."""
    wanted = [replace(each, runs_dir=str(tmp_path / "stopped")) for each in varied(rows, tmp_path)]
    with stopped_after(2):
        outcomes = compute(wanted, size=3)
    assert {outcome.status for outcome in outcomes.values()} == {worker.NOT_FINISHED}
    folders = [tmp_path / "stopped" / identify(each).run_id for each in wanted]
    assert [(folder / "checkpoint.safetensors").is_file() for folder in folders] == [True, True, True, False]
    again = compute([wanted[3], wanted[0], wanted[1]], size=2)
    assert {outcome.status for outcome in again.values()} == {"finished"}
    assert run(wanted[2]).status is Status.FINISHED
    for each in varied(rows, tmp_path / "alone")[:3]:  # of the third, which ends alone, no figure is the pack's either
        run_id = run(each).run_id
        require_equal(tmp_path / "stopped" / run_id, tmp_path / "alone" / run_id)
        assert "resumes from its checkpoint at step" in (tmp_path / "stopped" / run_id / "log.txt").read_text()


def test_a_run_that_somebody_else_computes_is_left_to_them(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    from harness.results.claims import Claim

    wanted = [config(rows, tmp_path, seed=seed) for seed in (0, 1)]
    with Claim.acquire(tmp_path / identify(wanted[0]).run_id):
        outcomes = compute(wanted, size=2)
    assert [outcomes[identify(each).run_id].status for each in wanted] == [worker.CLAIMED, "finished"]


# ---------------------------------------------------------------- which runs share a pack


def test_runs_share_a_pack_where_base_data_precision_and_depth_are_equal(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    one = config(rows, tmp_path)
    may_differ: list[Any] = [
        config(rows, tmp_path, seed=1),
        config(rows, tmp_path, rank={"rank": 1}),
        config(rows, tmp_path, target_layers={"name": "mlp", "projections": ["mlp"]}),
        config(
            rows, tmp_path, trainer={"learning_rate": 1e-5, "batch_size": 4, "max_steps": 9, "schedule": "constant"}
        ),
    ]
    may_not: list[Any] = [
        config(rows, tmp_path, target_layers={"name": "last", "projections": ["q"], "blocks": "last_1"}),
        config(rows, tmp_path, dataset={"max_length": 40}),
        config(rows, tmp_path, model={"tiny": "gpt2", "name": "tiny_gpt2", "path": None}),
        config(rows, tmp_path, trainer={"precision": "bf16"}),
        config(rows, tmp_path, "head_only"),
        config(rows, tmp_path, trainer={"gradient_checkpointing": True}),
    ]
    assert {pack_key(each) for each in may_differ} == {pack_key(one)}
    assert pack_key(one) not in {pack_key(each) for each in may_not}
    assert len({pack_key(each) for each in may_not}) == len(may_not)
    drawn = [tiny_config(rows, tmp_path, seed=seed) for seed in (0, 1)]  # whose base is drawn from the seed
    assert pack_key(drawn[0]) != pack_key(drawn[1])


@pytest.mark.parametrize(
    ("method", "overrides", "reason"),
    [
        ("full", {}, "method=full"),
        ("lora", {"model": {"dropout": 0.1}}, "model.dropout=0.1"),
        ("lora", {"trainer": {"precision": "fp16"}}, "trainer.precision=fp16"),
        ("ia3", {"target_layers": {"name": "qv", "projections": ["q", "v"]}}, "peft package"),
        ("head_only", {}, None),
        ("lora", {"method": {"adapter_dropout": 0.1}}, None),
    ],
)
def test_what_is_in_no_pack(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    method: str,
    overrides: dict[str, Any],
    reason: str | None,
) -> None:
    found = why_alone(config(rows, tmp_path, method, **overrides))
    assert (found is None) == (reason is None)
    assert reason is None or reason in (found or "")


def test_runs_with_the_same_batches_enter_one_after_the_other(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    configs = [config(rows, tmp_path, seed=seed, rank={"rank": rank}) for rank in (1, 2) for seed in (0, 1)]
    runs = [PlannedRun(each, identify(each)) for each in configs]
    assert [run.config.seed for run in in_order(runs)] == [0, 0, 1, 1]


@pytest.mark.parametrize("pack", [0, -1, True, "all", 1.5, None])
def test_a_size_that_is_none_is_refused(pack: Any) -> None:
    with pytest.raises(ConfigError, match=rf"hydra\.launcher\.pack={pack}: give the number of runs"):
        pack_size(pack)


def test_a_size_is_a_number_or_found() -> None:
    assert pack_size(8) == 8 and pack_size("auto") is None


@pytest.mark.parametrize(
    ("method", "placed", "depth"),
    [
        ("head_only", {}, 2),
        ("lora", {"target_layers": {"name": "last", "projections": ["q", "v"], "blocks": "last_1"}}, 1),
    ],
)
def test_frozen_blocks_are_computed_once_in_training_and_scoring(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    placed: dict[str, Any],
    depth: int,
) -> None:
    """Of three learning rates of one seed; each score is that of the run alone."""
    made, found = [], []
    step, look = packs.Pack._pass, packs.TrunkMemory.clear

    def watched(self: Any, packed: Any, members: Any) -> Any:
        made.append((len(members), packed.first_own_block, packed.shares_trunk))
        return step(self, packed, members)

    def counted(self: Any) -> None:
        found.append(self.num_found)
        look(self)

    monkeypatch.setattr(packs.Pack, "_pass", watched)
    monkeypatch.setattr(packs.TrunkMemory, "clear", counted)
    wanted = [config(rows, tmp_path, method, trainer={"learning_rate": rate}, **placed) for rate in (1e-3, 1e-2, 1e-1)]
    outcomes = compute(wanted, size=3)
    assert {outcome.status for outcome in outcomes.values()} == {"finished"}
    assert made == [(3, depth, True)] * 6
    # val at steps 4 and 6 and test, of three runs, a batch each: but val and test, once each, all were found.
    assert found[-1] >= 3 * 3 - 2
    alone = run(replace(wanted[1], runs_dir=str(tmp_path / "alone")))
    require_equal(tmp_path / alone.run_id, tmp_path / "alone" / alone.run_id)
    assert json.loads((tmp_path / alone.run_id / "result.json").read_text())["environment"]["packed"] == 3


@pytest.mark.parametrize("model", [{}, {"dtype": "bfloat16"}], ids=["base in float32", "base in bfloat16"])
def test_runs_in_bf16_share_a_pass_that_computes_in_it(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, Any],
) -> None:
    computed_in, forward = set(), PackedLayer.forward

    def recorded(layer: PackedLayer, x: torch.Tensor) -> torch.Tensor:
        y = forward(layer, x)
        computed_in.add(y.dtype)
        return y

    monkeypatch.setattr(PackedLayer, "forward", recorded)
    wanted = [
        config(rows, tmp_path / "packed", model=model, trainer={"precision": "bf16"}, rank={"rank": rank})
        for rank in (2, 4)
    ]
    compute(wanted, size=2)
    assert computed_in == {torch.bfloat16}
    for each in wanted:
        packed, alone = result_of(each), run(replace(each, runs_dir=str(tmp_path / "alone")))
        assert packed.environment["packed"] == 2, (tmp_path / "packed" / packed.run_id / "log.txt").read_text()
        assert packed.metrics["train_nll"] == pytest.approx(alone.metrics["train_nll"], rel=0.02)


def test_runs_of_a_pack_read_their_dataset_once(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[int] = []

    def open_source(wanted: Any, *, with_test: bool) -> Any:
        opened.append(wanted.num_train_examples)
        return sources.open_source(wanted, with_test=with_test)

    monkeypatch.setattr(labelled, "open_source", open_source)
    configs = [config(rows, tmp_path, trainer={"learning_rate": rate}) for rate in (1e-3, 2e-3, 3e-3)]
    fewer = config(rows, tmp_path, dataset={"num_train_examples": 20})
    outcomes = compute([*configs, fewer], size=2)
    assert {outcome.status for outcome in outcomes.values()} == {"finished"}
    assert len(opened) == 2
    assert opened[1] == 20


def test_a_run_for_which_memory_runs_out_in_a_pack_is_for_another_process(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One in its fourth step, after a checkpoint, and one that enters as the third. The two that wait are computed."""
    folder = tmp_path / "packed"
    wanted = [config(rows, folder, seed=seed, trainer={"checkpoint_every": 2}) for seed in range(5)]
    begun: list[int] = []
    models: list[weakref.ref[torch.nn.Module]] = []

    def step(learner: Learner, micro_batches: list[Batch]) -> Any:
        if learner.at.step == 3 and learner._config.learning_rate == 7e-3:
            models.append(weakref.ref(learner._model))
            raise torch.OutOfMemoryError("out of memory: step")
        yield from own_step(learner, micro_batches)

    def rehearse(learner: Learner, **steps: Any) -> dict[str, float]:
        begun.append(len(begun))
        if len(begun) == 3:
            models.append(weakref.ref(learner._model))
            raise torch.OutOfMemoryError("out of memory: third")
        if len(begun) > 3:
            assert [model() for model in models] == [None, None]
        return own_rehearse(learner, **steps)

    wanted[0] = config(rows, folder, trainer={"checkpoint_every": 2, "learning_rate": 7e-3})
    own_step, own_rehearse = Learner.step, Learner.rehearse
    monkeypatch.setattr(Learner, "step", step)
    monkeypatch.setattr(Learner, "rehearse", rehearse)
    outcomes = compute(wanted, size=3)
    monkeypatch.undo()
    assert [outcomes[identify(each).run_id].status for each in wanted] == [
        *(worker.NO_ROOM, "finished", worker.NO_ROOM),
        *("finished", "finished"),
    ]
    first, third = (folder / identify(wanted[number]).run_id for number in (0, 2))
    for one in (first, third):
        assert not (one / "result.json").exists()
        assert current_owner(one) is None
        assert "there was not enough memory beside the runs of its pack" in (one / "log.txt").read_text()
    assert result_of(wanted[4]).environment["packed"] == 1, "where three did not fit and then two did not, one is tried"
    assert [run(wanted[number]).status for number in (0, 2)] == ["finished"] * 2
    assert "resumes from its checkpoint at step 2" in (first / "log.txt").read_text()
    alone = run(replace(wanted[0], runs_dir=str(tmp_path / "alone")))
    require_equal(folder / alone.run_id, tmp_path / "alone" / alone.run_id)


def test_runs_of_a_pack_measure_the_memory_of_a_cell_once(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[Learner] = []
    scored: list[Learner] = []

    def step_peak(learner: Learner, **steps: Any) -> MemoryPeak:
        measured.append(learner)
        return own_peak(learner, **steps)

    def rehearse_scoring(learner: Learner) -> None:
        scored.append(learner)
        own_scoring(learner)

    def rehearse_step(learner: Learner, micro_batches: list[Batch]) -> None:
        own_step(learner, micro_batches)
        has_state.setdefault(learner, False)
        has_state[learner] |= sum(len(batch.labels) for batch in micro_batches) > 1 and bool(learner._optimizer.state)

    has_state: dict[Learner, bool] = {}
    own_peak, own_scoring, own_step = Learner.step_peak, Learner._rehearse_scoring, Learner._rehearse_step
    monkeypatch.setattr(Learner, "step_peak", step_peak)
    monkeypatch.setattr(Learner, "_rehearse_scoring", rehearse_scoring)
    monkeypatch.setattr(Learner, "_rehearse_step", rehearse_step)
    monkeypatch.setattr(Learner, "time_rehearsal", lambda learner, steps: {})  # which makes such steps as well
    folder = tmp_path / "packed"
    alike = [
        config(rows, folder, trainer={"learning_rate": rate}, seed=seed) for rate in (1e-3, 2e-3) for seed in (1, 2)
    ]
    others = [
        config(rows, folder, rank={"rank": 3}),
        config(rows, folder, trainer={"micro_batch_size": 4}),
        config(rows, folder, trainer={"learning_rate_head": 1e-2}),  # a group of parameters more in the optimizer
        config(rows, folder, dataset={"max_length": 7}),
    ]
    outcomes = compute([*alike, *others], size=2)
    assert {outcome.status for outcome in outcomes.values()} == {"finished"}
    assert len(measured) == 1 + len(others)
    assert len(scored) == len(alike) + len(others), "each sees whether it fits, beside the others as they are by then"
    assert list(has_state.values()) == [True] * len(scored), (
        "and so it is with its longest step, beside the optimizer's"
    )
    monkeypatch.undo()
    for each in [*alike, *others]:
        ours, alone = result_of(each), run(replace(each, runs_dir=str(tmp_path / "alone")))
        sizes = {name for name in alone.metrics if name.endswith("bytes")} - OF_THE_PROCESS
        assert "activations_bytes" in sizes
        assert {name: ours.metrics[name] for name in sizes} == {name: alone.metrics[name] for name in sizes}


def test_a_peak_is_known_by_what_trains_and_what_is_in_the_batches() -> None:
    """A step of as many tokens and fewer targets makes fewer logits, so shapes alone do not say what it takes."""
    ids = torch.arange(6).view(2, 3)
    model = torch.nn.Linear(2, 3)
    batch = Batch({"input_ids": ids}, torch.tensor([0, 1]), 6, 2)

    def key(*steps: list[Batch], of: torch.nn.Module = model, groups: int = 1) -> str:
        parameters = list(of.parameters())
        split = [parameters] if groups == 1 else [[each] for each in parameters]
        return step_key(of, torch.optim.AdamW([{"params": group} for group in split]), steps)

    partly = torch.nn.Linear(2, 3)
    partly.weight.requires_grad_(False)
    assert key([batch]) == key([replace(batch, num_tokens=5)], of=torch.nn.Linear(2, 3))
    different = [
        key([batch]),
        key([replace(batch, labels=torch.tensor([0, 2]))]),
        key([replace(batch, num_targets=1)]),
        key([replace(batch, inputs={"input_ids": ids + 1})]),
        key([batch], [batch]),
        key([batch, batch]),
        key([batch], groups=2),
        key([batch], of=torch.nn.Linear(3, 2)),
        key([batch], of=partly),
    ]
    assert len(set(different)) == len(different)


def test_peaks_are_those_of_a_cell(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    peaks, wanted = KnownPeaks(), config(rows, tmp_path)
    other_rates = {"learning_rate": 1.0, "learning_rate_head": 0.5}
    of_cell = peaks.of(wanted)
    assert peaks.of(config(rows, tmp_path, seed=9, trainer=other_rates)) is of_cell
    assert peaks.of(config(rows, tmp_path, rank={"rank": 5})) is not of_cell
    assert peaks.of(config(rows, tmp_path, trainer={"optimizer": "sgd"})) is not of_cell


def test_rows_that_changed_between_two_runs_are_read_again(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    wanted, kept = config(rows, tmp_path), KeptData()
    family, tokenizer = find_family(wanted.dataset.task), load_tokenizer(wanted.model)

    def load() -> Any:
        return kept.load(wanted, identify(wanted), family, tokenizer)

    first = load()
    assert load() is not first  # nobody has said yet that it is what the run was planned with
    kept.keep()
    first = load()
    assert load() is first
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join(lines[:-5]) + "\n")
    changed = load()
    assert changed is not first
    assert changed.fingerprint != first.fingerprint


# ---------------------------------------------------------------- what a shared process says of a run


def spending(*, num_packed: Any = None) -> Spending:
    return Spending(0.0, torch.device("cpu"), Preparation(), num_packed=num_packed)


def test_what_a_pack_scored_before_training_is_not_what_it_trained() -> None:
    """A phase before training leaves its cost; the steps may all be made alone after it."""
    in_pack = spending(num_packed=lambda: 3)
    assert in_pack.packed == 3
    assert not {"wall_seconds", "peak_rss_bytes"} & in_pack.total().keys()
    kept = json.loads(json.dumps(in_pack.so_far()))
    assert kept["wall_seconds"] > 0

    alone = spending()
    alone.resume(kept)
    assert alone.packed is None
    assert "preparation_seconds" in alone.total()
    assert not {"wall_seconds", "peak_rss_bytes"} & alone.total().keys()
    again = spending()
    again.resume(alone.so_far(), has_trained=True)
    assert again.packed is None
    assert "wall_seconds" not in again.total(), "whatever number of attempts lies between"

    goes_on = spending()
    goes_on.resume(kept, has_trained=True)
    assert goes_on.packed == 3
    in_another = spending(num_packed=lambda: 2)
    in_another.resume(goes_on.so_far(), has_trained=True)
    assert in_another.packed == 3
    assert spending().packed is None
    assert "wall_seconds" in spending().total()
