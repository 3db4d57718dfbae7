"""Claims: one owner at a time, dead owners replaced, living ones never."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.results import claims
from harness.results.claims import (
    EMPTY_SECONDS,
    SILENT_SECONDS,
    Claim,
    ClaimLostError,
    RunClaimedError,
    current_owner,
    read_owner,
)


def dead_owner(run_dir: Path, **changes: object) -> Path:
    """A claim file like one that an owner left, with some fields changed."""
    claim = Claim.acquire(run_dir)
    claim._stop.set()
    claim._thread.join()
    path = run_dir / "claims/0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def test_a_run_has_one_owner(tmp_path: Path) -> None:
    with Claim.acquire(tmp_path) as claim:
        owner = current_owner(tmp_path)
        assert owner is not None
        assert owner.pid == os.getpid()
        with pytest.raises(RunClaimedError, match=f"is being computed by process {os.getpid()} on"):
            Claim.acquire(tmp_path)
        claim.check()
    assert current_owner(tmp_path) is None
    with Claim.acquire(tmp_path):
        assert current_owner(tmp_path) is not None


def test_an_ended_run_leaves_no_claims(tmp_path: Path) -> None:
    with Claim.acquire(tmp_path) as claim:
        claim.release(ended=True)
    assert not (tmp_path / "claims").exists()


def test_a_dead_process_of_this_host_is_replaced_at_once(tmp_path: Path) -> None:
    code = (
        "import os, pathlib; from harness.results.claims import Claim; Claim.acquire(pathlib.Path({!r})); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code.format(str(tmp_path))], check=True)
    assert (tmp_path / "claims/0.json").exists()
    assert current_owner(tmp_path) is None
    with Claim.acquire(tmp_path):
        assert (tmp_path / "claims/1.json").exists()


def test_a_later_process_with_the_same_number_is_not_the_owner(tmp_path: Path) -> None:
    dead_owner(tmp_path, started=1.0)
    assert current_owner(tmp_path) is None


def test_a_claim_without_a_pid_namespace_is_read_as_before(tmp_path: Path) -> None:
    path = dead_owner(tmp_path)
    values = json.loads(path.read_text())
    del values["pid_namespace"]
    path.write_text(json.dumps(values))
    assert current_owner(tmp_path) is not None
    path.write_text(json.dumps({**values, "started": 1.0}))
    assert current_owner(tmp_path) is None


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"boot": "another"}, {"pid_namespace": "pid:[1]"}])
def test_a_silent_other_host_is_replaced_after_the_heartbeat_limit(tmp_path: Path, change: dict[str, str]) -> None:
    path = dead_owner(tmp_path, **change)
    assert current_owner(tmp_path) is not None
    with pytest.raises(RunClaimedError):
        Claim.acquire(tmp_path)
    past = time.time() - SILENT_SECONDS - 1
    os.utime(path, (past, past))
    assert current_owner(tmp_path) is None
    Claim.acquire(tmp_path).release(ended=True)


def test_an_owner_that_was_replaced_notices(tmp_path: Path) -> None:
    with Claim.acquire(tmp_path) as claim:
        (tmp_path / "claims/1.json").write_text("{}")
        with pytest.raises(ClaimLostError, match="taken over by another process"):
            claim.check()


def test_the_heartbeat_carries_the_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.01)
    with Claim.acquire(tmp_path) as claim:
        before = (tmp_path / "claims/0.json").stat().st_mtime_ns
        claim.report({"step": 3})
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            owner = current_owner(tmp_path)
            if owner is not None and owner.progress == {"step": 3}:
                break
            time.sleep(0.01)
        else:
            pytest.fail("no heartbeat")
        assert (tmp_path / "claims/0.json").stat().st_mtime_ns > before


def _race(run_dir: Path, barrier: object, won: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    try:
        Claim.acquire(run_dir)
        won.put(os.getpid())  # type: ignore[attr-defined]
    except RunClaimedError:
        won.put(None)  # type: ignore[attr-defined]
    barrier.wait()  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", range(5))
def test_of_many_that_find_a_dead_owner_one_takes_over(tmp_path: Path, number: int) -> None:
    dead_owner(tmp_path, started=1.0)
    context = multiprocessing.get_context("fork")
    barrier, won = context.Barrier(6), context.Queue()
    processes = [context.Process(target=_race, args=(tmp_path, barrier, won)) for _ in range(6)]
    for process in processes:
        process.start()
    winners = [won.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert len([winner for winner in winners if winner]) == 1


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    test_of_many_that_find_a_dead_owner_one_takes_over(tmp_path, 0)
    assert not list(tmp_path.glob("claims/.*"))
    assert read_owner(tmp_path / "claims/1.json") is not None


def test_a_claim_that_is_being_written_holds_for_a_moment(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    path = tmp_path / "claims/0.json"
    path.touch()
    with pytest.raises(RunClaimedError, match="by another process"):
        Claim.acquire(tmp_path)
    past = time.time() - EMPTY_SECONDS - 1
    os.utime(path, (past, past))
    Claim.acquire(tmp_path).release(ended=True)


def test_an_owner_whose_claim_was_removed_notices(tmp_path: Path) -> None:
    with Claim.acquire(tmp_path) as claim:
        (tmp_path / "claims/0.json").unlink()
        with pytest.raises(ClaimLostError):
            claim.check()


def test_the_end_of_a_run_leaves_a_claim_that_was_made_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Claim.acquire(tmp_path)
    monkeypatch.setattr(claims, "is_held", lambda path: False)
    second = Claim.acquire(tmp_path)
    first.release(ended=True)
    assert [path.name for path in (tmp_path / "claims").iterdir()] == ["1.json"]
    second.check()
    second.release(ended=True)
    assert not (tmp_path / "claims").exists()


@pytest.mark.parametrize("content", ["{}", '{"host": 3}', "[]", "\udcff"])
def test_a_claim_that_cannot_be_read_does_not_hold(tmp_path: Path, content: str) -> None:
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims/0.json").write_text(content, errors="surrogateescape")
    assert current_owner(tmp_path) is None
    Claim.acquire(tmp_path).release(ended=True)


@pytest.fixture
def vanishing(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """Folders that their run's end removes just before they are listed, once each."""
    folders: set[Path] = set()

    def gone(list_folder: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", /) -> Any:
            if not isinstance(path, int) and Path(path) in folders:  # rmtree lists open files
                folders.remove(Path(path))
                shutil.rmtree(path)
            return list_folder(path)

        return call

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, gone(getattr(os, name)))
    return folders


def test_a_run_that_ends_while_its_claims_are_looked_at_has_no_owner(tmp_path: Path, vanishing: set[Path]) -> None:
    """A launcher looks at each of its runs several times a second: once in a night it looks just then."""
    held = Claim.acquire(tmp_path)
    vanishing.add(tmp_path / "claims")
    assert current_owner(tmp_path) is None
    assert not vanishing
    with pytest.raises(ClaimLostError):
        held.check()
    held.release(ended=True)


def test_claims_that_vanish_are_made_anew(tmp_path: Path, vanishing: set[Path]) -> None:
    first = Claim.acquire(tmp_path)
    first.release(ended=False)
    vanishing.add(tmp_path / "claims")
    with Claim.acquire(tmp_path) as claim:
        assert current_owner(tmp_path) is not None
        vanishing.add(tmp_path / "claims")
        with pytest.raises(ClaimLostError):
            claim.check()
        (tmp_path / "claims").mkdir()
        vanishing.add(tmp_path / "claims")
        claim.release(ended=True)
    assert not vanishing


@pytest.mark.parametrize(("number", "is_gone"), [(errno.ESTALE, True), (errno.EIO, False)])
def test_a_folder_that_cannot_be_listed_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_gone: bool
) -> None:
    """To claim a run beside claims that cannot be seen would compute it twice; to look at it must not end a sweep."""
    claim = Claim.acquire(tmp_path)
    if is_gone:
        shutil.rmtree(tmp_path / "claims")
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", lambda path: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
        assert current_owner(tmp_path) is None
        with pytest.raises(ClaimLostError if is_gone else OSError, match=None if is_gone else "Input/output"):
            claim.check()
    claim.release(ended=True)
