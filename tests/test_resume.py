"""Runs that are stopped, fail or are killed in any phase: the next start resumes there and computes nothing twice."""

from __future__ import annotations

import json
import math
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_run
import test_run_language
import torch
from test_run import exact, rows, stopped_after  # noqa: F401
from test_run_language import data  # noqa: F401

from harness import base_scores, prepare, save
from harness import run as run_module
from harness import score as score_module
from harness.config.schema import RunConfig
from harness.content.identity import identify
from harness.folder import Attempt
from harness.measure.environment import environment
from harness.processes.stopping import PreemptedError, StopRequest
from harness.results.schema import RunResult, Status
from harness.run import run
from harness.tasks import generation, labelled, language
from harness.tasks.labelled import SequenceObjective
from harness.tasks.language import LanguageObjective
from harness.tasks.objective import Evaluation
from harness.training import checkpoint
from harness.training.callbacks import RunCallbacks
from harness.training.checkpoint import write_in_its_place


class Killed(BaseException):
    """Stands where a process would be killed."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each thing was done to its end."""
    counts: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*positional: Any, **named: Any) -> Any:
            value = function(*positional, **named)
            counts[name] += 1
            return value

        return counted

    for owner, name in (
        (SequenceObjective, "evaluate_split"),
        (LanguageObjective, "evaluate_split"),
        (RunCallbacks, "stepped"),
        (save, "_save_weights"),
        (generation, "_text_before"),
    ):
        monkeypatch.setattr(owner, name, counting(name, getattr(owner, name)))
    return counts


KEPT = ("generations", "adapter", "predictions")


def left(runs_dir: Path, result: RunResult) -> dict[str, Any]:
    """What a run leaves that no clock decides."""
    folder = runs_dir / result.run_id
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    curve = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    texts = {name: (folder / name).read_bytes() for name in names if name.startswith(KEPT)}
    return {"names": names, "metrics": exact(result.metrics), "curve": [exact(row) for row in curve], "texts": texts}


def classification(rows: Path, runs_dir: Path) -> RunConfig:  # noqa: F811
    dropout = {"model": {"dropout": 0.1}, "method": {"adapter_dropout": 0.1}}
    return test_run.config(rows, runs_dir, trainer={"max_steps": 5, "eval_every": 2, "eval_batch_size": 8}, **dropout)


def completion(data: Path, runs_dir: Path) -> RunConfig:  # noqa: F811
    also = {"tales": {**test_run_language.dataset(data, "causal_lm"), "name": "tales", "max_length": 32}}
    return test_run_language.config(data, runs_dir, task="completion", evaluate_also=also, model={"dropout": 0.1})


# How many checks an attempt gets: for what it does in any case, and the longest phase that resumes from its beginning.
@pytest.mark.parametrize(("make", "patience"), [(classification, 4), (completion, 6)])
def test_a_run_stopped_and_failing_everywhere_ends_as_an_undisturbed_one(
    make: Callable[[Path, Path], RunConfig],
    patience: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    done: Counter[str],
) -> None:
    source = request.getfixturevalue("rows" if make is classification else "data")
    monkeypatch.setattr(base_scores, "cache_dir", lambda: tmp_path / "calm")  # each computes the losses before training
    undisturbed = left(tmp_path / "calm", run(make(source, tmp_path / "calm")))
    done_at_once = dict(done)
    done.clear()

    monkeypatch.setattr(base_scores, "cache_dir", lambda: tmp_path / "wild")
    heard: list[str] = []
    check = StopRequest.check
    allowed = 0

    def disturbed(self: StopRequest, phase: str) -> None:
        nonlocal allowed
        allowed -= 1
        if allowed < 0:
            heard.append(phase)
            if len(heard) % 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            self.ask()
        check(self, phase)

    monkeypatch.setattr(StopRequest, "check", disturbed)
    wanted = make(source, tmp_path / "wild")
    for _ in range(20):
        allowed = patience
        try:
            result = run(wanted)
        except PreemptedError as error:
            assert "stopped" in str(error)
            assert not (tmp_path / "wild" / identify(wanted).run_id / "result.json").exists()
            continue
        if result.status is Status.FINISHED:
            break
        assert result.status is Status.OUT_OF_MEMORY
    else:
        pytest.fail(f"not finished: {heard}")
    assert len(heard) >= 2
    assert set(heard) == ({"scoring"} if make is classification else {"scoring", "generating"})
    assert left(tmp_path / "wild", result) == undisturbed
    assert dict(done) == done_at_once


@pytest.fixture(scope="module")
def calm(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:  # noqa: F811
    """What the run that is killed below leaves when nobody disturbs it."""
    runs_dir = tmp_path_factory.mktemp("calm")
    return left(runs_dir, run(classification(rows, runs_dir)))


@pytest.mark.parametrize("at", ["the last evaluation", "the predictions on val", "the test split", "the result"])
def test_a_run_killed_after_its_last_step_makes_no_step_again(
    calm: dict[str, Any],
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    done: Counter[str],
    at: str,
) -> None:
    evaluate_split = SequenceObjective.evaluate_split
    where = {"the last evaluation": 3, "the test split": 4}.get(at, 0)

    def killed(*_: Any, **__: Any) -> Any:
        raise Killed

    def killed_at(self: Any, *positional: Any) -> Evaluation:
        if done["evaluate_split"] == where - 1:
            raise Killed
        return evaluate_split(self, *positional)

    wanted = classification(rows, tmp_path / "wild")
    with monkeypatch.context() as patch:
        if where:
            patch.setattr(SequenceObjective, "evaluate_split", killed_at)
        elif at == "the predictions on val":
            patch.setattr(score_module, "write_predictions", killed)
        else:
            patch.setattr(Attempt, "record", killed)
        with pytest.raises(Killed):
            run(wanted)
    assert done["stepped"] == 5
    result = run(wanted)
    assert done["stepped"] == 5
    assert left(tmp_path / "wild", result) == calm


def test_a_last_evaluation_whose_predictions_were_not_kept_is_made_again(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    done: Counter[str],
) -> None:
    """Its scores are on disk, and what was scored is not."""

    def killed(*_: Any, **__: Any) -> Any:
        raise Killed

    wanted = test_run.config(rows, tmp_path, trainer={"max_steps": 3, "eval_every": 0})
    with monkeypatch.context() as patch:
        patch.setattr(score_module, "write_predictions", killed)
        with pytest.raises(Killed):
            run(wanted)
    result = run(wanted)
    folder = tmp_path / result.run_id / "predictions"
    assert sorted(path.name for path in folder.iterdir()) == ["test.parquet", "val.parquet"]
    assert (done["stepped"], done["evaluate_split"]) == (3, 3)


def test_a_failed_run_keeps_its_checkpoint_and_a_finished_one_does_not(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = classification(rows, tmp_path)
    folder = tmp_path / identify(wanted).run_id
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "score_after_training", lambda *_: (_ for _ in ()).throw(KeyError("surprise")))
        first = run(wanted)
    assert first.status is Status.FAILED
    assert first.metrics["train_seconds"] > 0
    assert {path.name for path in folder.iterdir()} >= {"result.json", "checkpoint.safetensors", "phases.jsonl"}
    assert "made_by" not in first.environment
    with monkeypatch.context() as patch:
        facts = environment
        patch.setattr(prepare, "environment", lambda *p, **n: facts(*p, **n) | {"git_commit": "f" * 40})
        second = run(wanted)
    # Trained by one commit and scored by another: both are named.
    assert [maker.get("git_commit") for maker in second.environment["made_by"]] == [
        first.environment.get("git_commit"),
        "f" * 40,
    ]
    assert second.status is Status.FINISHED
    assert {path.name for path in folder.iterdir()} == {
        "adapter",
        "config.yaml",
        "log.txt",
        "metrics.jsonl",
        "predictions",
        "result.json",
    }
    # What an attempt took is not lost with it.
    assert second.metrics["wall_seconds"] > first.metrics["train_seconds"]
    assert second.metrics["train_seconds"] == first.metrics["train_seconds"]
    assert second.metrics["peak_rss_bytes"] >= first.metrics["peak_rss_bytes"]


def test_an_evaluation_that_does_not_fit_ends_the_run_before_its_first_step(
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    done: Counter[str],
) -> None:
    """The additional dataset has the longest blocks; the optimizer's state is there as it will be."""
    wanted = completion(data, tmp_path)
    summed_nll = language.summed_nll
    is_rehearsed = False
    step = torch.optim.AdamW.step

    def limited(model: Any, batch: Any, **named: Any) -> Any:
        if is_rehearsed and batch.inputs["input_ids"].numel() >= 32 * 8:
            raise MemoryError
        return summed_nll(model, batch, **named)

    def stepped(self: Any, *positional: Any) -> Any:
        nonlocal is_rehearsed
        is_rehearsed = True
        return step(self, *positional)

    monkeypatch.setattr(language, "summed_nll", limited)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    result = run(wanted)
    assert result.status is Status.OUT_OF_MEMORY
    assert done["stepped"] == 0


def test_a_score_that_does_not_exist_yet_does_not_break_a_checkpoint(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = test_run.config(
        rows,
        tmp_path,
        dataset={"best_metric": "mcc", "metrics": ["mcc"]},
        trainer={"max_steps": 3, "eval_every": 1, "checkpoint_every": 1},
    )
    score = labelled.score
    monkeypatch.setattr(labelled, "score", lambda *p, **n: {k: v for k, v in score(*p, **n).items() if k != "mcc"})
    keep = RunCallbacks.keep_checkpoint
    bests: list[float] = []

    def watched(self: Any, tensors: Any, position: Any) -> None:
        keep(self, tensors, position)
        bests.append(position.best.objective)
        if len(bests) == 2:
            raise PreemptedError("stopped")

    monkeypatch.setattr(RunCallbacks, "keep_checkpoint", watched)
    with pytest.raises(PreemptedError):
        run(wanted)
    monkeypatch.setattr(labelled, "score", score)
    result = run(wanted)
    assert result.status is Status.FINISHED
    assert bests == [-math.inf] * 3
    assert result.metrics["best_step"] == 3


def test_a_signal_while_loading_ends_the_run_at_once(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):  # Python hears a signal between two instructions
                pass
        except Exception:
            pytest.fail("a library may take the interruption for an error of its own")
        pytest.fail("not interrupted")

    monkeypatch.setattr(prepare, "load_tokenizer", load)
    with pytest.raises(PreemptedError, match="stopped while loading"):
        run(test_run.config(rows, tmp_path))
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert run(classification(rows, tmp_path)).status is Status.FINISHED
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize("fits", [True, False])
def test_a_checkpoint_makes_room_for_what_it_was_kept_for(tmp_path: Path, fits: bool) -> None:
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"state")

    def write() -> str:
        if path.exists() or not fits:
            raise OSError(28, "No space left on device")
        return "written"

    if fits:
        assert write_in_its_place(path, write) == "written"
        assert not path.exists()
    else:
        with pytest.raises(OSError, match="No space left"):
            write_in_its_place(path, write)
        assert path.read_bytes() == b"state"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_stopped_on_a_gpu_resumes_there(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    precision: str,
) -> None:
    """With dropout, whose random numbers are the device's; and with the scaler of fp16."""

    def wanted(runs_dir: Path) -> RunConfig:
        trainer = {"max_steps": 6, "eval_every": 3, "precision": precision}
        dropout = {"model": {"dropout": 0.1}, "method": {"adapter_dropout": 0.1}}
        return test_run.config(rows, runs_dir, device="cuda", allow_busy_device=True, trainer=trainer, **dropout)

    undisturbed = run(wanted(tmp_path / "calm"))
    assert undisturbed.status is Status.FINISHED, undisturbed.error
    with stopped_after(2), pytest.raises(PreemptedError):
        run(wanted(tmp_path / "stopped"))
    result = run(wanted(tmp_path / "stopped"))
    log = (tmp_path / "stopped" / result.run_id / "log.txt").read_text()
    assert "resumes from its checkpoint at step 2" in log
    assert result.metrics["train_nll"] == pytest.approx(undisturbed.metrics["train_nll"], rel=1e-3)
