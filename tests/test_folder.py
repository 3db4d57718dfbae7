"""The folder of a run: what a process that is killed at any moment, comes late or lost its claim leaves there."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_run import config, rows  # noqa: F401

from harness import run as run_module
from harness.config.composing import to_dict
from harness.config.schema import Rerun, RunConfig
from harness.content.identity import identify, planned
from harness.folder import Attempt, kept_result
from harness.results.claims import Claim, ClaimLostError
from harness.results.schema import RunResult, Status, read_result, write_result
from harness.results.state import run_state
from harness.run import run
from harness.tracking.tracker import Trackers
from hydra_plugins.lora_harness import _worker as worker
from hydra_plugins.lora_harness import launcher


class Killed(BaseException):
    """Stands where a process would be killed."""


@pytest.fixture
def wanted(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:  # noqa: F811
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))
    return config(rows, tmp_path / "runs", trainer={"max_steps": 3, "eval_every": 2})


def ended(config: RunConfig, status: Status, error: str = "") -> RunResult:
    return RunResult(identify(config).run_id, identify(config).cell_id, None, status, to_dict(config), error=error)


def folder_of(config: RunConfig) -> Path:
    return Path(config.runs_dir) / identify(config).run_id


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the log, which all attempts share."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "log.txt")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def killed(*_: Any, **__: Any) -> None:
    raise Killed


def dead_job(config: RunConfig, stamp_before: object, number: int = signal.SIGKILL) -> Any:
    """What the launcher holds of a process that died by a signal without a reply."""
    process = SimpleNamespace(exitcode=-number)
    run = planned(config)
    job = SimpleNamespace(process=process, stamps_before={run.run_id: stamp_before}, is_pack=False)
    return job, run


@pytest.mark.parametrize("rerun", [Rerun.failed, Rerun.all])
def test_a_child_killed_between_its_result_and_its_reply_has_ended(wanted: RunConfig, rerun: Rerun) -> None:
    wanted = replace(wanted, rerun=rerun)
    path = write_result(folder_of(wanted), ended(wanted, Status.FINISHED))
    before = path.read_bytes()
    assert launcher._outcome_of_dead(*dead_job(wanted, None)).status == "finished"
    assert path.read_bytes() == before


def test_a_child_killed_in_a_rerun_has_failed_and_the_earlier_result_stands(wanted: RunConfig) -> None:
    wanted = replace(wanted, rerun=Rerun.all)
    path = write_result(folder_of(wanted), ended(wanted, Status.FINISHED))
    before = path.read_bytes()
    outcome = launcher._outcome_of_dead(*dead_job(wanted, launcher.result_stamp(planned(wanted))))
    assert (outcome.status, "SIGKILL" in outcome.error) == ("failed", True)
    assert path.read_bytes() == before


def test_a_rerun_that_could_not_be_put_in_place_has_ended(wanted: RunConfig) -> None:
    wanted = replace(wanted, rerun=Rerun.all)
    write_result(folder_of(wanted), ended(wanted, Status.FINISHED))
    write_result(folder_of(wanted) / ".rerun", ended(wanted, Status.DIVERGED))
    assert worker.write_failure(planned(wanted), "late").status == "diverged"
    assert read_result(folder_of(wanted) / "result.json").status is Status.DIVERGED
    assert not (folder_of(wanted) / ".rerun").exists()


def test_a_child_killed_before_its_result_has_failed(wanted: RunConfig) -> None:
    assert launcher._outcome_of_dead(*dead_job(wanted, None)).status == "failed"
    assert read_result(folder_of(wanted) / "result.json").status is Status.FAILED
    assert not (folder_of(wanted) / "claims").exists()


def test_a_child_told_to_stop_before_it_could_hear_is_not_finished(wanted: RunConfig) -> None:
    assert launcher._outcome_of_dead(*dead_job(wanted, None, signal.SIGTERM)).status == worker.NOT_FINISHED
    assert not folder_of(wanted).exists()


def test_who_lost_its_claim_leaves_the_run_to_its_new_owner(wanted: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: Any) -> None:
        raise ClaimLostError("taken over")

    monkeypatch.setattr(run_module, "run", lose)
    with Claim.acquire(folder_of(wanted)):
        assert worker.compute(planned(wanted)) == worker.Outcome(worker.CLAIMED, "taken over")
        # Whatever else went wrong in a process that has not got the run.
        assert worker.write_failure(planned(wanted), "late").status == worker.CLAIMED
    assert not (folder_of(wanted) / "result.json").exists()


def test_a_failure_never_replaces_a_result_that_stands(wanted: RunConfig) -> None:
    folder = folder_of(wanted)
    for status, late in ((Status.FINISHED, Status.FAILED), (Status.DIVERGED, Status.OUT_OF_MEMORY)):
        path = write_result(folder, ended(wanted, status))
        with Claim.acquire(folder) as claim:
            assert not Attempt(folder, folder, claim).record(ended(wanted, late))
        assert read_result(path).status is status
        assert worker.write_failure(planned(wanted), "late") == worker.Outcome(str(status), was_kept=True)
    with Claim.acquire(folder) as claim:
        (folder / f"claims/{claim._number + 1}.json").write_text("{}")
        with pytest.raises(ClaimLostError):
            Attempt(folder, folder, claim).record(ended(wanted, Status.FINISHED))


@pytest.mark.parametrize("moment", ["score_after_training", "save_weights"])
def test_a_killed_rerun_leaves_the_earlier_run_whole(
    wanted: RunConfig, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run(wanted)
    before = content(folder_of(wanted))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, moment, killed)
        with pytest.raises(Killed):
            run(replace(wanted, rerun=Rerun.all))
    assert {name: value for name, value in content(folder_of(wanted)).items() if name in before} == before
    assert run(wanted).status is Status.FINISHED
    again = run(replace(wanted, rerun=Rerun.all))
    assert read_result(folder_of(wanted) / "result.json") == again
    assert again.environment["ended_at"] > json.loads(before["result.json"])["environment"]["ended_at"]
    assert content(folder_of(wanted)).keys() == before.keys()


def test_a_rerun_that_fails_says_so_and_the_earlier_result_stands(
    wanted: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(wanted)

    def fail(*_: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(run_module, "score_after_training", fail)
    assert run(replace(wanted, rerun=Rerun.all)).status is Status.FAILED
    assert "the earlier result stands" in caplog.text
    assert run(wanted) == first


def test_a_rerun_killed_while_it_takes_the_old_one_s_place_is_completed(
    wanted: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(wanted)
    names = content(folder_of(wanted)).keys()
    renamed: list[str] = []
    rename = Path.rename

    def rename_one(self: Path, target: Path) -> Path:
        if renamed:
            raise Killed
        renamed.append(self.name)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_one)
        with pytest.raises(Killed):
            run(replace(wanted, rerun=Rerun.all))
    assert len(renamed) == 1
    # Until it is completed the folder has no result: the old one would stand beside some of the new files.
    assert not (folder_of(wanted) / "result.json").exists()
    kept = kept_result(planned(wanted))
    assert kept is not None and kept.environment["ended_at"] > first.environment["ended_at"]
    assert content(folder_of(wanted)).keys() == names
    assert not (folder_of(wanted) / ".rerun").exists()


def test_what_a_kill_right_after_the_result_leaves_is_removed(wanted: RunConfig) -> None:
    run(wanted)
    before = content(folder_of(wanted))
    (folder_of(wanted) / "checkpoint.safetensors").write_bytes(b"")
    (folder_of(wanted) / "claims").mkdir()
    (folder_of(wanted) / "claims/0.json").write_text("{}")
    assert kept_result(planned(wanted)) is not None
    assert content(folder_of(wanted)) == before
    assert not (folder_of(wanted) / "claims").exists()


def test_what_a_kill_in_the_middle_of_a_file_leaves_is_removed_by_the_next_attempt(wanted: RunConfig) -> None:
    folder = folder_of(wanted)
    partials = (".result.json.0123abcd.partial", ".checkpoint.safetensors.partial")
    for rerun, attempt_dir in ((Rerun.failed, folder), (Rerun.all, folder / ".rerun")):
        attempt_dir.mkdir(parents=True)
        for name in partials:
            (attempt_dir / name).write_bytes(b"half of it")
        assert run(replace(wanted, rerun=rerun)).status is Status.FINISHED
        assert not list(folder.rglob("*.partial"))
        assert not (folder / ".rerun").exists()


def test_a_tracker_that_fails_at_the_end_does_not_change_the_result(
    wanted: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no such mirror")

    monkeypatch.setattr(Trackers, "finish", fail)
    assert worker.compute(planned(wanted)).status == "finished"
    assert read_result(folder_of(wanted) / "result.json").status is Status.FINISHED
    assert "tracking did not end properly" in caplog.text


def test_a_run_that_is_rerun_is_running(wanted: RunConfig) -> None:
    write_result(folder_of(wanted), ended(wanted, Status.FINISHED))
    assert run_state(folder_of(wanted)) == "finished"
    with Claim.acquire(folder_of(wanted)):
        assert run_state(folder_of(wanted)) == "running"
        assert os.path.exists(folder_of(wanted) / "claims")
