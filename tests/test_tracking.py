"""The curve survives, W&B holds the same numbers as the local files, and no W&B problem reaches the run."""

from __future__ import annotations

import io
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from wandb_file import WandbRun, read_wandb_file

from harness.config.schema import TrackingConfig, WandbMode
from harness.results.files import CURVE_FILE, RESULT_FILE
from harness.results.schema import RunResult, Status, read_result, write_result
from harness.tracking import wandb_mirror
from harness.tracking.curves import JsonlTracker
from harness.tracking.progress import NullProgress, PlainProgress, RichProgress, open_progress
from harness.tracking.tracker import Tracker, open_tracker

ROOT = Path(__file__).resolve().parent.parent
RUN_ID, CELL_ID = "tiny-lora-r8-qv-s0-0123abcd", "tiny-lora-r8-qv-89ef4567"

CONFIG: dict[str, Any] = {
    "model": {"name": "tiny", "revision": None, "dropout": 0.1},
    "rank": {"rank": 8, "alpha": 16.0},
    "target_layers": {"projections": ["query", "value"], "blocks": [], "nested": [[0, 1], {"last": True}]},
    "trainer": {"learning_rate": 3e-4, "seed": 0},
    "sweep": None,
    # Makes the file longer than one of its blocks.
    "note": "ä✓ " + 40_000 * "x",
}
# Numbers that a detour through text or 32 bits would change.
CURVE = [
    (1, {"train_nll": 1 / 3}),
    (10, {"train_nll": 0.1 + 0.2, "train_tokens_per_second": 123456.789}),
    (10, {"val_accuracy": 0.875, "val_nll": 5e-324}),
    (20, {"train_nll": 1.7976931348623157e308}),
]


def _open(run_dir: Path, wandb: WandbMode = WandbMode.offline, sweep: str | None = "demo") -> Tracker:
    return open_tracker(
        TrackingConfig(wandb=wandb),
        run_dir=run_dir,
        run_id=RUN_ID,
        cell_id=CELL_ID,
        job_type="lora",
        sweep=sweep,
        run_config=CONFIG,
    )


def _result(status: Status = Status.FINISHED) -> RunResult:
    # val_accuracy is the best one, not the last of the curve, and there is no train_nll.
    metrics = {"val_accuracy": 0.9375, "num_adapter_params": 2**53 - 1, "peak_memory_bytes": 1234567.0}
    return RunResult(RUN_ID, CELL_ID, "demo", status, CONFIG, metrics=metrics)


def _read_curve(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / CURVE_FILE).read_text().splitlines()]


def _wandb_path(run_dir: Path) -> Path:
    [path] = run_dir.glob(f"wandb/offline-run-*/run-{RUN_ID}.wandb")
    return path


def _read_wandb(run_dir: Path) -> WandbRun:
    return read_wandb_file(_wandb_path(run_dir))


def _poll(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} seconds"
        time.sleep(0.05)


def _run_script(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def _processes_of(run_dir: Path) -> list[str]:
    """Returns the command lines of the processes that were started for W&B on behalf of `run_dir`."""
    marker = f"WANDB_CACHE_DIR={run_dir}/".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            continue  # ended in between, or not ours to look at
    return found


# ---- metrics.jsonl


def test_the_curve_is_one_json_object_a_line(tmp_path: Path) -> None:
    tracker = _open(tmp_path, WandbMode.disabled)
    for step, values in CURVE:
        tracker.log(step, values)
    assert _read_curve(tmp_path) == [{"step": step, **values} for step, values in CURVE], "every line is there at once"
    tracker.finish(_result())
    assert sorted(path.name for path in tmp_path.iterdir()) == [CURVE_FILE]


def test_a_value_that_is_not_finite_is_named_and_left_out(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log(5, {"train_nll": float("nan"), "val_nll": float("-inf"), "val_accuracy": 0.5})
    tracker.close()
    line = '{"step": 5, "val_accuracy": 0.5, "non_finite": ["train_nll", "val_nll"]}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == line


KILLED_RUN = """
    import os, signal, sys, time
    from pathlib import Path
    from harness.config.schema import TrackingConfig, WandbMode
    from harness.tracking.tracker import open_tracker

    run_dir, mode = Path(sys.argv[1]), WandbMode(sys.argv[2])
    tracker = open_tracker(
        TrackingConfig(wandb=mode), run_dir=run_dir, run_id=sys.argv[3], cell_id="cell", job_type="lora", sweep=None,
        run_config={"seed": 0},
    )
    for step in range(1, 51):
        tracker.log(step, {"train_nll": 1 / step})
    while mode is WandbMode.offline and not list(run_dir.glob("wandb/offline-run-*/*.wandb")):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
"""
KILLED_CURVE = [{"step": step, "train_nll": 1 / step} for step in range(1, 51)]


def test_a_killed_run_keeps_its_curve(tmp_path: Path) -> None:
    process = _run_script(KILLED_RUN, str(tmp_path), "disabled", RUN_ID)
    assert process.returncode == -9, process.stderr
    assert _read_curve(tmp_path) == KILLED_CURVE


# ---- W&B: the same names and values


@pytest.mark.parametrize(
    ("status", "exit_code"),
    [(Status.FINISHED, 0), (Status.DIVERGED, 1), (Status.FAILED, 1)],
)
def test_wandb_holds_what_the_local_files_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, status: Status, exit_code: int
) -> None:
    tracker = _open(tmp_path)
    for step, values in CURVE:
        tracker.log(step, values)
    if status is Status.DIVERGED:
        tracker.log(30, {"train_nll": float("nan"), "train_tokens_per_second": 1000.0})
    write_result(tmp_path, _result(status))
    tracker.finish(_result(status))
    tracker.close()

    local, mirrored = read_result(tmp_path / RESULT_FILE), _read_wandb(tmp_path)
    assert mirrored.config == local.config
    assert mirrored.summary == {**local.metrics, "status": local.status}
    assert mirrored.history == _read_curve(tmp_path)
    assert (mirrored.run_id, mirrored.name, mirrored.group) == (local.run_id, local.run_id, local.cell_id)
    assert (mirrored.job_type, mirrored.tags, mirrored.project) == ("lora", [local.sweep], "lora-harness")
    assert mirrored.exit_code == exit_code
    assert caplog.messages == []
    assert _processes_of(tmp_path) == []


def test_wandb_misses_nothing_when_the_run_is_faster_than_the_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(CONFIG, "note", 1_000_000 * "x")
    tracker = _open(tmp_path)
    for step in range(500):
        tracker.log(step, {"train_nll": 1 / (step + 1), "train_tokens_per_second": 1000.0})
    tracker.finish(_result())
    mirrored = _read_wandb(tmp_path)
    assert mirrored.config == CONFIG
    assert mirrored.history == _read_curve(tmp_path)
    assert (mirrored.exit_code, caplog.messages) == (0, [])


def test_the_reader_notices_damage(tmp_path: Path) -> None:
    tracker = _open(tmp_path)
    tracker.finish(_result())
    content = _wandb_path(tmp_path).read_bytes()
    damaged = tmp_path / "damaged.wandb"
    for harm, message in [
        (content[:-1], "damaged"),
        (content[:40_000] + bytes([content[40_000] ^ 1]) + content[40_001:], "damaged"),
        (content[:32768], "incomplete"),
        (content[:7] + content[32768:], "cannot follow"),
        (b"PK" + content, "not a .wandb file"),
    ]:
        damaged.write_bytes(harm)
        with pytest.raises(ValueError, match=message):
            read_wandb_file(damaged)


def test_a_run_that_leaves_without_a_result_has_failed(tmp_path: Path) -> None:
    tracker = _open(tmp_path, sweep=None)
    tracker.log(1, {"train_nll": 0.5})
    tracker.close()
    tracker.close()
    mirrored = _read_wandb(tmp_path)
    assert (mirrored.exit_code, mirrored.summary, mirrored.tags) == (1, {}, [])
    assert mirrored.history == _read_curve(tmp_path) == [{"step": 1, "train_nll": 0.5}]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_run_is_closed_on_wandb_and_leaves_no_process(tmp_path: Path) -> None:
    process = _run_script(KILLED_RUN, str(tmp_path), "offline", RUN_ID)
    assert process.returncode == -9, process.stderr
    _poll(lambda: not _processes_of(tmp_path))
    mirrored = _read_wandb(tmp_path)
    assert mirrored.history == _read_curve(tmp_path) == KILLED_CURVE
    assert (mirrored.exit_code, mirrored.summary) == (1, {})


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_search_for_processes_finds_them(tmp_path: Path) -> None:
    tracker = _open(tmp_path)
    for name in ("wandb_mirror", "wandb-core"):
        _poll(lambda name=name: any(name in command for command in _processes_of(tmp_path)))
    tracker.finish(_result())
    assert _processes_of(tmp_path) == []


def test_a_second_attempt_replaces_the_first(tmp_path: Path) -> None:
    for nll in (0.5, 0.25):
        tracker = _open(tmp_path)
        tracker.log(1, {"train_nll": nll})
        tracker.finish(_result())
    assert _read_curve(tmp_path) == _read_wandb(tmp_path).history == [{"step": 1, "train_nll": 0.25}]


def test_wandb_sync_lists_the_run(tmp_path: Path) -> None:
    _open(tmp_path).finish(_result())
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run"]
    for arguments in ([str(_wandb_path(tmp_path).parent)], []):
        process = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        output = process.stdout + process.stderr
        assert process.returncode == 0, output
        assert "Would sync 1 run(s)" in output, output
        assert f"run-{RUN_ID}.wandb" in output, output


def test_a_run_costs_little_of_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run waits for W&B while it opens, logs and finishes; the mirror starts beside it."""
    logs = 200
    costs = []
    for attempt in range(2):
        run_dir = tmp_path / str(attempt)
        run_dir.mkdir()
        start = time.perf_counter()
        tracker = _open(run_dir)
        opened = time.perf_counter()
        _poll(lambda run_dir=run_dir: bool(list(run_dir.glob("wandb/offline-run-*/*.wandb"))))
        time.sleep(1.0)  # wandb imports a good deal more after it has made its file
        training = time.perf_counter()
        for step in range(logs):
            tracker.log(step, {"train_nll": 0.5, "train_tokens_per_second": 1000.0})
        logged = time.perf_counter()
        tracker.finish(_result())
        finished = time.perf_counter()
        costs.append((opened - start, (logged - training) / logs, finished - logged))
    # The shorter of two: what else the machine does only adds to them.
    open_seconds, log_seconds, finish_seconds = (min(column) for column in zip(*costs, strict=True))
    with capsys.disabled():
        print(
            f"\nW&B offline costs a run: open {open_seconds:.3f} s, log {log_seconds * 1e6:.0f} us, "
            f"finish {finish_seconds:.3f} s"
        )
    assert open_seconds + finish_seconds < 1.5
    assert log_seconds < 1e-3


# ---- W&B: whatever happens to it, the run goes on


def _assert_run_goes_on(run_dir: Path, mode: WandbMode, *, seconds: float) -> None:
    """Runs a whole run and checks that no call was held up and that the local files are complete."""
    longest_log = 0.0
    start = time.perf_counter()
    tracker = _open(run_dir, mode)
    assert time.perf_counter() - start < 1.0
    for step in range(1, 41):
        before = time.perf_counter()
        tracker.log(step, {"train_nll": 1 / step})
        longest_log = max(longest_log, time.perf_counter() - before)
        time.sleep(0.02)
    write_result(run_dir, _result())
    tracker.finish(_result())
    assert longest_log < 1.0 < seconds, "a log call waited for W&B"
    assert time.perf_counter() - start < seconds
    assert _read_curve(run_dir) == [{"step": step, "train_nll": 1 / step} for step in range(1, 41)]
    assert read_result(run_dir / RESULT_FILE) == _result()


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers, as behind a firewall."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def _assert_offline_instead(run_dir: Path, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    [warning] = caplog.messages
    assert warning.startswith(f"tracking.wandb=online: {reason}"), warning
    assert f"wandb sync {run_dir}/wandb/offline-run-*" in warning
    mirrored = _read_wandb(run_dir)
    assert mirrored.history == _read_curve(run_dir)
    assert (mirrored.summary, mirrored.exit_code) == ({**_result().metrics, "status": "finished"}, 0)
    assert list(run_dir.glob("wandb/run-*")) == []
    assert _processes_of(run_dir) == []


def test_online_without_a_key_goes_offline_and_does_not_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # the key may also be in ~/.netrc
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    _assert_run_goes_on(run_dir, WandbMode.online, seconds=15.0)
    _assert_offline_instead(run_dir, caplog, "UsageError: No API key configured")


@pytest.mark.parametrize("server", ["closed_port", "silent_server"])
def test_online_without_a_network_goes_offline_after_a_while(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    server: str,
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", request.getfixturevalue(server))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_mirror, "ONLINE_START_SECONDS", 2.0)
    _assert_run_goes_on(tmp_path, WandbMode.online, seconds=20.0)
    _assert_offline_instead(tmp_path, caplog, "CommError: ")


FAKE_WANDB = """
    import os, signal, time

    class Run:
        summary = {}
        def define_metric(self, *args, **kwargs): pass
        def log(self, values): pass
        def finish(self, exit_code): pass

    Settings = dict
    def teardown(): pass
    def init(**kwargs): return Run()
"""
BREAK = {
    "import": ("raise ImportError('libfoo.so: no such file')", "ImportError: libfoo.so: no such file"),
    "init": ("def init(**kwargs): raise RuntimeError('no space left\\nsecond line')", "RuntimeError: no space left"),
    "log": ("def fail(self, values): raise ConnectionError('gone')\nRun.log = fail", "ConnectionError: gone"),
    "finish": ("def fail(self, exit_code): raise TimeoutError('disk')\nRun.finish = fail", "TimeoutError: disk"),
    "teardown": ("def teardown(): raise SystemExit(7)", "SystemExit: 7"),
    "death": ("def fail(self, values): os.kill(os.getpid(), 9)\nRun.log = fail", "its process ended with exit code -9"),
    "late death": (
        "def fail(self, exit_code): os.kill(os.getpid(), 9)\nRun.finish = fail",
        "its process ended with exit code -9",
    ),
    "hang in init": ("def init(**kwargs): time.sleep(600)", "its process did not end within 2 seconds"),
    "hang in log": (
        "def hang(self, values): time.sleep(600)\nRun.log = hang",
        "its process did not end within 2 seconds",
    ),
    "stop": (
        "def stop(**kwargs): os.kill(os.getpid(), signal.SIGSTOP)\ninit = stop",
        "its process did not end within 2 seconds",
    ),
}


def _install_fake_wandb(directory: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    directory.mkdir()
    (directory / "wandb.py").write_text(textwrap.dedent(FAKE_WANDB) + harm)
    monkeypatch.setenv("PYTHONPATH", str(directory))


@pytest.mark.parametrize("case", BREAK)
def test_broken_wandb_is_reported_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    harm, reason = BREAK[case]
    _install_fake_wandb(tmp_path / "fake", monkeypatch, harm)
    if "2 seconds" in reason:
        monkeypatch.setattr(wandb_mirror, "FILES_SECONDS", 2.0)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    _assert_run_goes_on(run_dir, WandbMode.offline, seconds=15.0)
    assert caplog.messages == [
        f"tracking.wandb=offline: {reason}. The run continues and W&B will miss the rest of it; metrics.jsonl and "
        f"result.json do not. tracking.wandb=disabled runs without W&B. Details: {run_dir}/wandb/mirror.log"
    ]
    assert _processes_of(run_dir) == []
    if "Error" in reason:
        assert "Traceback" in (run_dir / "wandb" / "mirror.log").read_text()


def test_a_mirror_that_reads_nothing_does_not_hold_up_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop_waiting(*_: object) -> None:
        raise AssertionError("the run waits for a mirror that does not read")

    _install_fake_wandb(tmp_path / "fake", monkeypatch, "os.kill(os.getpid(), signal.SIGSTOP)")
    monkeypatch.setattr(wandb_mirror, "FILES_SECONDS", 2.0)
    before = signal.signal(signal.SIGALRM, stop_waiting)
    signal.alarm(30)
    try:
        tracker = _open(tmp_path)
        for step in range(5000):  # several times what a pipe holds
            tracker.log(step, {"train_nll": 0.5, "train_tokens_per_second": 1000.0})
        tracker.finish(_result())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert len(_read_curve(tmp_path)) == 5000
    [warning] = caplog.messages
    assert "its process did not end within 2 seconds" in warning


def test_the_fake_that_is_not_broken_is_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _install_fake_wandb(tmp_path / "fake", monkeypatch, "")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    _assert_run_goes_on(run_dir, WandbMode.offline, seconds=10.0)
    assert caplog.messages == []
    assert (run_dir / "wandb" / "mirror.log").read_text() == ""


def test_a_mirror_that_cannot_be_started_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    _assert_run_goes_on(tmp_path, WandbMode.offline, seconds=10.0)
    [warning] = caplog.messages
    assert "its process could not be started" in warning and "/nowhere/python" in warning


def test_a_directory_that_cannot_be_made_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "wandb").write_text("a file is in the way")
    _assert_run_goes_on(tmp_path, WandbMode.offline, seconds=10.0)
    [warning] = caplog.messages
    assert "its process could not be started" in warning and str(tmp_path / "wandb") in warning


# ---- the run itself never imports wandb


def _loads_wandb(script: str, *arguments: str) -> bool:
    process = _run_script(textwrap.dedent(script) + "\nimport sys; print('wandb' in sys.modules)", *arguments)
    assert process.returncode == 0, process.stderr
    return process.stdout.split() == ["True"]


def test_importing_tracking_does_not_import_wandb() -> None:
    assert not _loads_wandb("import harness.tracking.tracker, harness.tracking.wandb_mirror")


def test_a_tracked_run_does_not_import_wandb(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from harness.config.schema import TrackingConfig
        from harness.tracking.tracker import open_tracker
        tracker = open_tracker(
            TrackingConfig(wandb="offline"), run_dir=Path(sys.argv[1]), run_id="r", cell_id="c", job_type="lora",
            sweep=None, run_config={},
        )
        tracker.log(1, {"train_nll": 0.5})
        tracker.close()
    """
    assert not _loads_wandb(script, str(tmp_path))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_the_check_for_wandb_can_fail() -> None:
    assert _loads_wandb("import harness.tracking.wandb_mirror, wandb")


# ---- progress


def test_the_bar_shows_loss_speed_and_remaining_time() -> None:
    console = Console(file=io.StringIO(), record=True, force_terminal=True, width=120)
    progress = RichProgress(1000, "lora r8", console=console)
    for step in range(1, 501):
        progress.update(step, 0.12345, 6789.4)
        time.sleep(0.0005)
    progress.note("val_accuracy [0.75]")
    progress.close()
    progress.close()
    text = console.export_text()
    last_line = text.strip().splitlines()[-1]
    assert re.search(r"lora r8 .* 500/1000 loss 0.1235 6,789 tokens/s 0:00:0\d ETA 0:00:0\d", last_line), text
    assert "val_accuracy [0.75]" in text.splitlines()[0] or "\nval_accuracy [0.75]" in text


class _Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def _plain_lines(caplog: pytest.LogCaptureFixture, *, num_steps: int, step_seconds: float) -> list[str]:
    clock = _Clock()
    caplog.set_level(logging.INFO, "harness")
    progress = PlainProgress(num_steps, "lora r8", clock=clock)
    for step in range(1, num_steps + 1):
        clock.seconds += step_seconds
        progress.update(step, 1 / step, 1000.0)
    progress.close()
    progress.close()
    return caplog.messages


@pytest.mark.parametrize(
    ("num_steps", "step_seconds", "num_lines"),
    [
        (1, 1.0, 1),
        (1000, 0.001, 2),  # over in a second
        (1000, 0.03, 4),  # half a minute: every 10 s
        (1000, 10.0, 11),  # hours: every 10 %
        (100_000, 1.0, 11),
    ],
)
def test_plain_progress_is_a_dozen_lines_at_most(
    caplog: pytest.LogCaptureFixture, num_steps: int, step_seconds: float, num_lines: int
) -> None:
    lines = _plain_lines(caplog, num_steps=num_steps, step_seconds=step_seconds)
    assert len(lines) == num_lines, lines
    assert f"step 1/{num_steps}," in lines[0]
    assert f"step {num_steps}/{num_steps}," in lines[-1]


def test_a_plain_line_shows_loss_speed_and_remaining_time(caplog: pytest.LogCaptureFixture) -> None:
    lines = _plain_lines(caplog, num_steps=100, step_seconds=1.5)
    assert lines[0] == "lora r8: step 1/100, loss 1.0000, 1,000 tokens/s, elapsed 0:00:02, ETA -"
    assert lines[1] == "lora r8: step 11/100, loss 0.0909, 1,000 tokens/s, elapsed 0:00:16, ETA 0:02:14"


def test_plain_progress_shows_where_a_run_broke_off(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "harness")
    progress = PlainProgress(100, "lora r8", clock=_Clock())
    progress.update(1, 1.0, 10.0)
    progress.update(2, float("nan"), 10.0)
    assert len(caplog.messages) == 1
    progress.note("val_accuracy 0.5")
    progress.close()
    assert caplog.messages[1] == "lora r8: val_accuracy 0.5"
    assert "step 2/100, loss nan" in caplog.messages[2]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_suits_where_it_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # colours in a log file are no terminal

    def kind(progress_on: bool = True) -> type:
        progress = open_progress(TrackingConfig(progress=progress_on), total_steps=3, description="run")
        progress.update(1, 0.5, 10.0)
        progress.note("note")
        progress.close()
        return type(progress)

    assert kind() is PlainProgress
    assert kind(progress_on=False) is NullProgress
    monkeypatch.setattr(sys, "stderr", _Terminal())
    assert kind() is RichProgress
    assert kind(progress_on=False) is NullProgress
    monkeypatch.setenv("TERM", "dumb")
    assert kind() is PlainProgress
    assert capsys.readouterr().out == ""
