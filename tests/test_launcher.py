"""The launcher for real: processes are started, killed and started again, on tiny models and a small file."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_run
import torch
from hydra.core.global_hydra import GlobalHydra
from launching import Forked, Launched, look_at_fork
from test_run import NOT_EXACT

from analysis.status import find_status
from harness.__main__ import main
from harness.config.composing import compose, from_composed, register
from harness.config.validation import ConfigError
from harness.content.identity import PlannedRun, identify, planned
from harness.results.claims import Claim, Owner, current_owner, read_owner
from harness.results.schema import RunResult, Status, read_result
from hydra_plugins.lora_harness import _workers as workers_module
from hydra_plugins.lora_harness import launcher as launcher_module

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("apple pear plum", "iron zinc lead")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """What every sweep here has in common: a tiny model, 60 short rows, few steps."""
    forkserver._forkserver._stop()  # it keeps the environment that it was started in
    folder = tmp_path_factory.mktemp("rows")
    lines = ["text,label", *(f"{WORDS[number % 2]} {number},{number % 2}" for number in range(60))]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    os.environ["LORA_HARNESS_CACHE"] = str(folder / "cache")
    yield [
        "model=tiny_bert",
        "dataset=local",
        f"dataset.train_file={folder / 'train.csv'}",
        "dataset.max_length=32",
        "trainer.num_epochs=null",
        "trainer.max_steps=4",
        "tracking=off",
        "device=cpu",
    ]
    del os.environ["LORA_HARNESS_CACHE"]
    forkserver._forkserver._stop()


def launch(runs_dir: Path, *arguments: str, address_space: int | None = None) -> Launched:
    """A launcher in its own process, which starts another fork server for its workers."""
    output = runs_dir.with_name(f"{runs_dir.name}-{next(_numbers)}.txt")
    words = ["-m", *arguments, f"runs_dir={runs_dir}"]
    return Launched(words, cwd=ROOT, output=output, address_space=address_space)


_numbers = itertools.count()


def sweep(runs_dir: Path, *arguments: str, address_space: int | None = None) -> tuple[int, str]:
    process = launch(runs_dir, *arguments, address_space=address_space)
    output, _ = process.communicate(timeout=300)
    assert process.returncode is not None
    return process.returncode, output


SweepHere = Callable[..., tuple[int, str]]


@pytest.fixture
def sweep_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> SweepHere:
    """`sweep` with this process for the launcher: the runs have their own processes, and imports are paid for once."""

    def call(runs_dir: Path, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["harness", "-m", *arguments, f"runs_dir={runs_dir}"])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        GlobalHydra.instance().clear()
        capfd.readouterr()
        caplog.clear()
        try:
            code = main()
        except SystemExit as error:  # how the sweeper says that not every run has finished
            assert isinstance(error.code, int)
            code = error.code
        return code, "".join((*capfd.readouterr(), caplog.text))

    return call


def results(runs_dir: Path) -> dict[str, Any]:
    return {path.parent.name: read_result(path) for path in runs_dir.glob("*/result.json")}


def exact(runs_dir: Path) -> dict[str, dict[str, float]]:
    return {
        run_id: {name: value for name, value in result.metrics.items() if name not in NOT_EXACT}
        for run_id, result in results(runs_dir).items()
    }


@pytest.fixture(scope="module")
def forked(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Forked:
    register()
    folder = tmp_path_factory.mktemp("runs")
    overrides = [*base, "method=lora", "rank=r1", "target_layers=qv", f"runs_dir={folder}"]
    return look_at_fork(planned(from_composed(compose(overrides))))


def test_what_the_fork_server_has_loaded(forked: Forked) -> None:
    """All of a run but W&B, which a run never imports, and out of the garbage collector's sight."""
    assert forked.is_frozen
    assert "harness.run" in forked.modules
    assert "wandb" not in forked.modules


def test_runs_compute_with_the_code_that_their_launch_loaded_and_say_so(forked: Forked) -> None:
    """What is edited or committed in the middle of a sweep is not what its runs are made by."""
    assert forked.imported_by_run == frozenset()
    assert forked.knows_checkout


def test_failures_are_rows_and_do_not_stop_the_others(base: list[str], sweep_here: SweepHere, tmp_path: Path) -> None:
    """One axis of learning rates: two runs finish, one diverges; one more cannot write its folder."""
    arguments = [
        *base,
        "rank=r2",
        "target_layers=qv",
        "trainer.learning_rate=1e-3,1e30,2e-3",
        "trainer.max_gradient_norm=null",
        "sweep=mixed",
    ]
    code, output = sweep_here(tmp_path, *arguments)
    found = results(tmp_path)
    assert code == 1
    assert sorted(result.status for result in found.values()) == ["diverged", "finished", "finished"]
    assert "3/3 runs: 2 finished, 1 diverged" in output
    # A reader sees what a run scored as soon as it has ended.
    row = (
        r": finished  val accuracy \d\.\d{4}  test accuracy \d\.\d{4}  adapter params [\d,]+  peak memory [\d.]+ MiB \["
    )
    assert len(re.findall(row, output)) == 2, output
    assert "diverged: tiny_bert-local-lora-r2-qv-lr1e+30" in output
    assert "from one run's end to the next one's first step: median" in output
    assert not list(tmp_path.glob("*/claims"))
    assert {status.state for status in find_status(tmp_path, "mixed")} == {"finished", "diverged"}

    # Again: all three results stand, and nothing is computed.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}
    code, output = sweep_here(tmp_path, *arguments)
    assert code == 1
    assert output.count("already finished") == 3
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}


def test_data_that_cannot_be_used_is_a_failed_row_with_its_message(
    base: list[str], sweep_here: SweepHere, tmp_path: Path
) -> None:
    code, output = sweep_here(tmp_path, *base, "rank=r2", "target_layers=qv", "dataset.label_column=nope,label")
    by_status = {result.status: result for result in results(tmp_path).values()}
    assert code == 1
    assert set(by_status) == {Status.FINISHED, Status.FAILED}
    assert "no column nope" in by_status[Status.FAILED].error
    assert "no column nope" in output
    assert "Traceback" not in output


def test_a_worker_is_killed_and_then_the_sweep_and_the_next_launch_does_the_rest(
    base: list[str], sweep_here: SweepHere, tmp_path: Path
) -> None:
    """A killed run is a failed row, and the next one starts; Ctrl-C lets that one write a checkpoint."""
    arguments = [*base, "trainer.max_steps=150", "rank=r2,r4", "target_layers=qv", "trainer.checkpoint_every=20"]
    process = launch(tmp_path, *arguments)
    killed, owner = _wait_for_worker(tmp_path)
    os.kill(owner.pid, signal.SIGKILL)
    interrupted, _ = _wait_for_worker(tmp_path, but=killed)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode not in (0, None)
    assert {run_id: result.status for run_id, result in results(tmp_path).items()} == {killed: Status.FAILED}
    assert "the process was killed by SIGKILL" in output
    assert "interrupted" in output
    assert "Traceback" not in output
    # The run that was running can go on, and nobody holds it.
    assert (tmp_path / interrupted / "checkpoint.safetensors").is_file()
    for path in tmp_path.glob("*/claims/*.json"):
        claimant = read_owner(path)
        assert claimant is not None and claimant.released

    code, _ = sweep_here(tmp_path, *arguments)
    assert code == 0
    assert {result.status for result in results(tmp_path).values()} == {Status.FINISHED}
    assert results(tmp_path).keys() == {killed, interrupted}
    assert not list(tmp_path.glob("*/checkpoint.safetensors"))


def test_two_launchers_on_one_folder_compute_each_run_once(base: list[str], tmp_path: Path) -> None:
    arguments = [*base, "trainer.max_steps=20", "rank=r1,r2,r4,r8", "target_layers=qv", "num_threads=1"]
    both = [launch(tmp_path, *arguments) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert len(results(tmp_path)) == 4
    # A log that begins once was written by one process.
    for run_id in results(tmp_path):
        log = (tmp_path / run_id / "log.txt").read_text()
        assert log.count(f"INFO {run_id}\n") == 1, log


# Runs that classify and runs that generate; all phases of a run are in one of them.
CHAOS_GRIDS = (
    "hydra.sweeper.grids=["
    "{model:tiny_bert,dataset:local,dataset.train_file:%s/train.csv,seed:[%s],trainer.max_steps:40},"
    "{model:tiny_llama,dataset:local_completion,dataset.train_file:%s/sums.jsonl,"
    "dataset.prompt_template:'\\'{q} = \\'',dataset.target_column:a,dataset.generation.max_new_tokens:12,"
    "dataset.generation.batch_size:4,seed:[%s],trainer.max_steps:20}]"
)
# What a worker may be doing when it is hit, in the order of a run: see `_phase`.
CHAOS_PHASES = (
    "loading",
    "scoring before training",
    "rehearsing",
    "training",
    "scoring val",
    "scoring test",
    "saving",
    "generating or recording",
    "after its result",
)


def test_chaos(base: list[str], sweep_here: SweepHere, tmp_path: Path) -> None:
    """Launchers and workers are killed or asked to stop in every phase, over and over: all ends as undisturbed.

    CHAOS_KILLS=200 CHAOS_SEED=1 gives the long form, with W&B; `pytest -s` shows what was hit.
    """
    kills, draw = int(os.environ.get("CHAOS_KILLS", "2")), random.Random(int(os.environ.get("CHAOS_SEED", "0")))
    folder = Path(next(word for word in base if "train_file" in word).partition("=")[2]).parent
    sums = [{"q": f"{first}+{second}", "a": str(first + second)} for first in range(8) for second in range(8)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    seeds = ("0,1", "0") if kills < 10 else ("0,1,2", "0,1,2")
    num_runs = sum(len(each.split(",")) for each in seeds)
    arguments = [
        CHAOS_GRIDS % (folder, seeds[0], folder, seeds[1]),
        "dataset.max_length=32",
        "trainer.num_epochs=null",
        "trainer.checkpoint_every=5",
        "trainer.eval_every=10",
        "model.dropout=0.1",
        "rank=r4",
        "target_layers=qv",
        "num_threads=1",
        "hydra.launcher.workers=2",
        f"tracking={'off' if kills < 10 else 'wandb_offline'}",
        "device=cpu",
        "sweep=chaos",
    ]
    began = time.monotonic()
    code, output = sweep_here(tmp_path / "calm", *arguments)
    assert code == 0, output
    calm, seconds = exact(tmp_path / "calm"), time.monotonic() - began
    assert len(calm) == num_runs

    hit: Counter[str] = Counter()
    rounds = 0
    while hit.total() < kills:
        rounds += 1
        runs_dir = tmp_path / f"wild{rounds}"
        finished: dict[Path, bytes] = {}
        while len(finished) < num_runs:
            launcher = launch(runs_dir, *arguments)
            while launcher.poll() is None:
                if hit.total() < kills:
                    for what in _hit(draw, launcher, runs_dir, patience=seconds):
                        hit[what] += 1
                        print(f"{time.monotonic() - began:6.0f} s, round {rounds}: {what}", flush=True)
                else:
                    launcher.wait(300)
                for path in runs_dir.glob("*/result.json"):
                    content = path.read_bytes()
                    if read_result(path).status is Status.FINISHED:
                        assert finished.setdefault(path, content) == content, f"{path} has changed"
            launcher.communicate(timeout=300)
            for path, content in finished.items():
                assert path.read_bytes() == content, f"{path} has changed"
        if launcher.returncode != 0:  # killed, perhaps right after the last result
            code, output = sweep_here(runs_dir, *arguments)
            assert code == 0, output
        assert exact(runs_dir) == calm
        for run_id in calm:
            assert (runs_dir / run_id / "log.txt").read_text().count(f"{run_id}: finished") <= 1
            left = {path.name for path in (runs_dir / run_id).iterdir()}
            assert left == {path.name for path in (tmp_path / "calm" / run_id).iterdir()}
        shutil.rmtree(runs_dir)
    print(
        f"\nseed {os.environ.get('CHAOS_SEED', '0')}: {hit.total()} kills in {rounds} rounds of {num_runs} runs, ",
        end="",
    )
    print(f"{(time.monotonic() - began) / hit.total():.1f} s each")
    for what, count in sorted(hit.items()):
        print(f"{count:5} {what}")


def test_a_search_that_is_killed_makes_the_same_trials_and_choice(
    base: list[str], sweep_here: SweepHere, tmp_path: Path
) -> None:
    """Launchers and workers are killed at random, and the sweep launched again, until it ends as undisturbed.

    CHAOS_KILLS=20 CHAOS_SEED=1 gives the long form; `pytest -s` shows what was hit.
    """
    kills, draw = int(os.environ.get("CHAOS_KILLS", "1")), random.Random(int(os.environ.get("CHAOS_SEED", "0")))
    ranks = "r2" if kills < 10 else "r1,r2,r4"
    arguments = [
        *base,
        "hydra.sweeper.search.axis=trainer.learning_rate",
        f"rank={ranks}",
        "target_layers=qv",
        "seed=0,1",
        "sweep=searched",
    ]
    arguments += ["trainer.max_steps=12", "trainer.checkpoint_every=4"]
    code, output = sweep_here(tmp_path / "calm", *arguments)
    assert code == 0, output
    calm = exact(tmp_path / "calm")
    hit: Counter[str] = Counter()
    rounds = 0
    while hit.total() < kills:
        rounds += 1
        runs_dir = tmp_path / f"wild{rounds}"
        code = 1
        while code != 0:
            launcher = launch(runs_dir, *arguments)
            if hit.total() < kills:
                time.sleep(draw.uniform(1, 12))
                workers = _workers(launcher.pid)
                is_worker = bool(workers) and draw.random() < 0.5
                victim, what = (draw.choice(workers), "worker") if is_worker else (launcher.pid, "launcher")
                number = draw.choice([signal.SIGKILL, signal.SIGTERM])
                with contextlib.suppress(ProcessLookupError):
                    if launcher.poll() is None:
                        os.kill(victim, number)
                        hit[f"{number.name} {what}"] += 1
                        print(f"round {rounds}, {len(results(runs_dir))} results: {number.name} {what}", flush=True)
            launcher.communicate(timeout=300)
            code = launcher.returncode
        assert exact(runs_dir) == calm
        for run_id in calm:
            assert (runs_dir / run_id / "log.txt").read_text().count(f"{run_id}: finished") <= 1
        shutil.rmtree(runs_dir)
    print(f"{hit.total()} kills in {rounds} rounds of {len(calm)} runs: {dict(sorted(hit.items()))}")


def _hit(draw: random.Random, launcher: Launched, runs_dir: Path, *, patience: float) -> list[str]:
    """Kills the launcher or a worker, or asks it to stop; says which, and what it was doing.

    A phase is drawn, and the first worker seen in it within `patience` seconds is hit a moment later. The launcher is
    hit at any time, but mostly spared while it has no workers, or no sweep would get beyond its start.
    """
    number, aim = draw.choice([signal.SIGKILL, signal.SIGTERM]), draw.choice(("launcher", *CHAOS_PHASES))
    victim, what = None, ""
    if aim == "launcher":
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(draw.uniform(0, patience))
        workers = _workers(launcher.pid)
        if workers or draw.random() < 0.1:
            victim, what = launcher.pid, f"launcher, {'working' if workers else 'starting or waiting'}"
    else:
        deadline = time.monotonic() + patience
        while victim is None and time.monotonic() < deadline and launcher.poll() is None:
            time.sleep(0.005)
            victim = next((each for each in _workers(launcher.pid) if _phase(each, runs_dir) == aim), None)
        time.sleep(draw.uniform(0, 0.03))
        if victim is not None:
            what = f"worker, {_phase(victim, runs_dir)}"  # a short phase may be over by now
    try:
        if victim is not None and launcher.poll() is None:
            os.kill(victim, number)
            return [f"{number.name} {what}"]
    except ProcessLookupError:
        pass
    return []


def _workers(launcher: int) -> list[int]:
    """The processes that compute: what the launcher's fork server has forked."""
    with contextlib.suppress(OSError):  # the launcher, or its server, has just ended
        return [
            worker
            for server in _children(launcher)
            if b"forkserver" in Path(f"/proc/{server}/cmdline").read_bytes()
            for worker in _children(server)
        ]
    return []


def _children(parent: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return []


def _phase(worker: int, runs_dir: Path) -> str:
    """What a worker is doing, as far as its run's folder tells: one of `CHAOS_PHASES`."""
    for path in runs_dir.glob("*/claims/*.json"):
        owner = read_owner(path)
        if owner is None or owner.pid != worker:
            continue
        folder = path.parent.parent
        if (folder / "result.json").exists():
            return "after its result"
        phases = ""
        with contextlib.suppress(OSError):
            phases = (folder / "phases.jsonl").read_text()
        for done, doing in (
            ('"phase": "save"', "generating or recording"),
            ('"phase": "score test last"', "saving"),
            ('"phase": "score val last"', "scoring test"),
        ):
            if done in phases:
                return doing
        is_classifier = folder.name.startswith("tiny_bert")
        if owner.progress:
            curve = ""
            with contextlib.suppress(OSError):
                curve = (folder / "metrics.jsonl").read_text()
            # The claim tells a step with each heartbeat, the curve tells the last one at once.
            return "scoring val" if f'"step": {40 if is_classifier else 20},' in curve else "training"
        is_scored = is_classifier or '"phase": "score test_nll_before"' in phases
        return "rehearsing" if is_scored else "scoring before training"
    return "loading"


def _wait_for_worker(runs_dir: Path, *, but: str = "") -> tuple[str, Owner]:
    """A run that is past its first step, other than `but`, and the process that computes it."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for run_dir in runs_dir.glob("*"):
            owner = current_owner(run_dir)
            if run_dir.name != but and owner is not None and owner.progress.get("step"):
                return run_dir.name, owner
        time.sleep(0.05)
    raise TimeoutError("no worker has made a step")


def long_rows(folder: Path) -> list[str]:
    """A step of 3,000 rows, which do not fit into 1 GiB at once."""
    lines = ["text,label", *(f"{' '.join([WORDS[number % 2]] * 8)} {number},{number % 2}" for number in range(3000))]
    (folder / "long.csv").write_text("\n".join(lines) + "\n")
    return [f"dataset.train_file={folder / 'long.csv'}", "dataset.max_length=128", "trainer.max_steps=1"]


def all_but_one_fit(runs_dir: Path) -> dict[int, RunResult]:
    """The results by batch size, of which 2048 does not fit."""
    found = {result.config["trainer"]["batch_size"]: result for result in results(runs_dir).values()}
    assert {size: result.status for size, result in found.items()} == {
        8: Status.FINISHED,
        2048: Status.OUT_OF_MEMORY,
        4: Status.FINISHED,
    }
    return found


def test_memory_runs_out_in_one_run_and_the_next_measures_what_it_measures_alone(
    base: list[str], forked: Forked, sweep_here: SweepHere, tmp_path: Path
) -> None:
    """`ulimit -v` for real: 3,000 rows at once do not fit into 1 GiB beside the program."""
    common = [*base, *long_rows(tmp_path), "rank=r2", "target_layers=qv", "num_threads=1"]
    limit = forked.address_space_bytes + 2**30

    code, output = sweep(tmp_path / "after", *common, "trainer.batch_size=8,2048,4", address_space=limit)
    assert code == 1, output
    after = all_but_one_fit(tmp_path / "after")
    assert "can't allocate memory" in after[2048].error

    sweep_here(tmp_path / "alone", *common, "trainer.batch_size=4")
    (alone,) = results(tmp_path / "alone").values()
    assert after[4].run_id == alone.run_id
    assert after[4].metrics["peak_memory_bytes"] == alone.metrics["peak_memory_bytes"]


def test_what_does_not_fit_into_a_pack_is_computed_alone(base: list[str], forked: Forked, tmp_path: Path) -> None:
    """As above, in packs; `rerun=never` would let a result stand that the pack had left."""
    common = [*base, *long_rows(tmp_path), "rank=r2", "target_layers=qv", "num_threads=1", "rerun=never"]
    limit = forked.address_space_bytes + 2**30
    code, output = sweep(
        tmp_path / "runs", *common, "trainer.batch_size=8,2048,4", "hydra.launcher.pack=3", address_space=limit
    )
    assert code == 1, output
    found = all_but_one_fit(tmp_path / "runs")
    assert output.count("there was not enough memory in its pack; it is computed alone") == 1
    assert "3/3 runs: 2 finished, 1 out_of_memory" in output
    assert "packed" not in found[2048].environment, "the result is that of the attempt alone"


def test_a_full_disk(base: list[str], sweep_here: SweepHere, small_disk: Path) -> None:
    """The heads fit, the second model does not: what had finished stays, and the message says why."""
    arguments = [*base, "method=head_only,full", "seed=0,1"]
    code, output = sweep_here(small_disk, *arguments)
    assert code == 1, output
    assert sorted(result.status for result in results(small_disk).values()) == ["failed", *["finished"] * 3], output
    assert "No space left on device" in output
    assert not list(small_disk.rglob("*partial*"))

    # Not even a claim fits any more.
    (small_disk / "filler").write_bytes(b"")
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)
    finished = {path: path.read_bytes() for path in small_disk.glob("*/result.json")}
    code, output = sweep_here(small_disk, *arguments, "trainer.learning_rate=1e-3")
    assert code == 1, output
    assert output.count("No space left on device") >= 4
    assert finished == {path: path.read_bytes() for path in small_disk.glob("*/result.json")}


def test_a_folder_that_cannot_be_written_fails_before_anything_starts(
    base: list[str], sweep_here: SweepHere, small_disk: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, output = sweep_here(small_disk, *base, "method=head_only", "seed=0,1")
    assert code == 2, output
    assert f"runs_dir={small_disk}: cannot be written (Read-only file system)" in output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KiB. Mounting one takes root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("stranger", ["", "device='cuda': 9 of 10 bytes are in use"])
def test_runs_that_share_a_device_are_no_strangers_to_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stranger: str
) -> None:
    """Who else uses the device is asked once, while none of the launcher's own runs does."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "rows.csv").write_text("text,label\n")
    configs = [replace(test_run.config(tmp_path / "rows.csv", tmp_path, seed=seed), device="auto") for seed in range(3)]
    gpus = launcher_module.find_gpus(configs)
    slots = launcher_module.find_slots(configs, gpus, runs_per_device=2, num_workers=1)
    assert [(slot.name, slot.is_shared) for slot in slots] == [("gpu 0", True)] * 2
    with pytest.raises(ConfigError, match=r"hydra.launcher.runs_per_device=0: a GPU computes one run at least"):
        launcher_module.find_slots(configs, gpus, runs_per_device=0, num_workers=1)
    queue = launcher_module.Queue([PlannedRun(config, identify(config)) for config in configs], slots, None)
    asked: list[str] = []
    started: list[bool] = []

    def find_busy(slot: launcher_module.Slot) -> str:
        asked.append(slot.name)
        return stranger

    def spawn(runs: list[PlannedRun], slot: launcher_module.Slot) -> Any:
        started.extend(run.config.allow_busy_device for run in runs)
        return SimpleNamespace(slot=slot)

    monkeypatch.setattr(queue, "_find_busy", find_busy)
    monkeypatch.setattr(queue, "_spawn", spawn)
    with launcher_module.open_screen(3) as screen:
        queue._start(screen)
    if stranger:
        assert not started
        assert [result.error for result in results(tmp_path).values()] == [stranger] * 3
    else:
        assert (asked, started) == (["gpu 0"], [True, True])


def test_a_claimed_run_is_waited_for(
    base: list[str], sweep_here: SweepHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another launcher's run: this one does not compute it, and ends when the other has let go."""
    arguments = [*base, "rank=r2", "target_layers=qv"]
    _, shown = sweep_here(tmp_path, *arguments, "hydra.sweeper.dry_run=true")
    (run_id,) = {word for word in shown.split() if word.startswith("tiny_bert-local-lora")}
    claim = Claim.acquire(tmp_path / run_id)
    looks: list[bool] = []

    def looked(run_dir: Path) -> Owner | None:
        owner = current_owner(run_dir)
        looks.append(owner is not None)
        if len(looks) == 3:  # before anything starts, and twice while it waits
            assert not results(tmp_path)
            claim.release(ended=False)
        return owner

    monkeypatch.setattr(launcher_module, "current_owner", looked)
    code, output = sweep_here(tmp_path, *arguments)
    assert code == 0, output
    assert looks[:3] == [True] * 3
    assert json.loads((tmp_path / run_id / "result.json").read_text())["status"] == "finished"


def test_a_sweep_in_packs(base: list[str], sweep_here: SweepHere, tmp_path: Path) -> None:
    """Two runs share a process; one that trains the base is alone, and the log says so."""
    grids = "hydra.sweeper.grids=[{method: lora, rank: [r1, r2], target_layers: qv}, {method: full}]"
    code, output = sweep_here(tmp_path, *base, grids, "hydra.launcher.pack=8")
    assert code == 0, output
    assert "pack=8: 1 of 3 runs are trained alone: method=full trains the base that a pack shares" in output
    assert "3/3 runs: 3 finished" in output
    packed = {
        result.config["method"]["name"]: result.environment.get("packed") for result in results(tmp_path).values()
    }
    assert packed == {"lora": 2, "full": None}
    assert not list(tmp_path.glob("*/claims"))


def test_a_sweep_in_packs_that_grow(base: list[str], sweep_here: SweepHere, tmp_path: Path) -> None:
    """However fast this machine is, all runs are there, and each says how many it trained with."""
    code, output = sweep_here(tmp_path, *base, "rank=r1,r2,r4", "target_layers=qv", "hydra.launcher.pack=auto")
    assert code == 0, output
    assert "3/3 runs: 3 finished" in output
    assert {result.environment["packed"] for result in results(tmp_path).values()} <= {1, 2, 3}


def test_a_pack_whose_process_dies_is_computed_run_by_run(base: list[str], tmp_path: Path) -> None:
    """As when two runs do not fit into the memory: each resumes from its checkpoint, alone."""
    arguments = [*base, "rank=r1,r2", "target_layers=qv", "trainer.max_steps=200", "trainer.checkpoint_every=5"]
    process = launch(tmp_path, *arguments, "hydra.launcher.pack=2")
    _, owner = _wait_for_worker(tmp_path)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*/checkpoint.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.monotonic() < deadline
    os.kill(owner.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    found = results(tmp_path)
    assert [result.status for result in found.values()] == ["finished"] * 2
    assert output.count("the process of its pack was killed by SIGKILL (Linux does that when memory runs out)") == 2
    for run_id, result in found.items():
        assert "resumes from its checkpoint at step" in (tmp_path / run_id / "log.txt").read_text()
        assert result.environment["packed"] == 2, "what the clock said there is no figure of this run"
        assert not {"train_seconds", "wall_seconds", "peak_rss_bytes"} & result.metrics.keys()


def test_as_many_workers_as_make_a_sweep_faster(
    base: list[str], sweep_here: SweepHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast this machine is, the choice is one of those tried, and runs that follow keep it without trying."""
    monkeypatch.setattr(workers_module, "_SECONDS", 0.1)
    monkeypatch.setattr(launcher_module, "available_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = [*base, "target_layers=qv", "hydra.launcher.workers=auto"]
    code, output = sweep_here(tmp_path, *words, "rank=r1,r2")
    assert code == 0, output
    ((number, tried),) = re.findall(r"workers=auto: (\d) for 2 runs \(tokens a second: (.*)\)", output)
    assert re.fullmatch(r"1 of 2 threads [\d,]+, 2 of 1 thread [\d,]+", tried), tried
    found = results(tmp_path)
    assert {result.environment["num_threads"] for result in found.values()} == {2 // int(number)}
    # Nothing but the two runs is there: the steps that were timed left no trace.
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "sweeps") == sorted(found)
    code, output = sweep_here(tmp_path, *words, "rank=r1,r2,r4,r8")
    assert code == 0, output
    assert f"workers=auto: {number}, because runs of this sweep had" in output
    assert {result.environment["num_threads"] for result in results(tmp_path).values()} == {2 // int(number)}


def test_a_run_that_cannot_begin_leaves_one_worker_and_says_so_itself(
    base: list[str], sweep_here: SweepHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher_module, "available_cores", lambda: 2)
    (tmp_path / "one.csv").write_text("text,label\na,x\n")
    words = [*base, f"dataset.train_file={tmp_path}/one.csv", "target_layers=qv", "rank=r1,r2"]
    code, output = sweep_here(tmp_path / "runs", *words, "hydra.launcher.workers=auto")
    assert code == 1, output
    assert re.search(
        r"workers=auto: 1 for 2 runs \(tokens a second: -; 1 could not be tried: DataError: .*\)", output
    ), output
    assert "2 failed" in output


def test_workers_are_a_number_or_auto(base: list[str], sweep_here: SweepHere, tmp_path: Path) -> None:
    code, output = sweep_here(tmp_path, *base, "rank=r1,r2", "target_layers=qv", "hydra.launcher.workers=many")
    assert code == 2
    assert "hydra.launcher.workers=many: give the number of runs at a time, 1 or more, or auto" in output
    assert not results(tmp_path)


def test_packs_share_the_cores(base: list[str], sweep_here: SweepHere, tmp_path: Path) -> None:
    words = ["rank=r1,r2", "target_layers=qv", "hydra.launcher.workers=auto", "hydra.launcher.pack=2"]
    code, output = sweep_here(tmp_path, *base, *words)
    assert code == 0, output
    assert "workers=auto: 1, because runs that train together (pack=2) share the cores" in output
    assert {result.environment["packed"] for result in results(tmp_path).values()} == {2}


def test_a_pack_has_at_least_one_run(base: list[str], sweep_here: SweepHere, tmp_path: Path) -> None:
    code, output = sweep_here(tmp_path, *base, "rank=r1,r2", "target_layers=qv", "hydra.launcher.pack=0")
    assert code == 2
    assert "hydra.launcher.pack=0: give the number of runs that train together, 1 for each alone, or auto" in output
    assert not results(tmp_path)


def engine(name: str) -> Any:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed (an extra of this project)")


@pytest.mark.parametrize(
    ("launcher", "more"),
    [
        pytest.param("submitit_local", [], marks=engine("submitit")),
        pytest.param("ray", ["+hydra.launcher.init.num_cpus=2"], marks=[engine("ray"), pytest.mark.slow]),
    ],
)
def test_a_sweep_under_another_engine_gives_the_same_and_skips_what_is_finished(
    base: list[str],
    sweep_here: SweepHere,
    tmp_path: Path,
    launcher: str,
    more: list[str],
) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    arguments = [*base, "rank=r2,r4", "target_layers=qv", "num_threads=1"]
    code, output = sweep_here(tmp_path / "own", *arguments)
    assert code == 0, output
    code, output = sweep(tmp_path / "other", *arguments, f"hydra/launcher={launcher}", *more)
    assert code == 0, output
    assert {result.status for result in results(tmp_path / "other").values()} == {Status.FINISHED}
    assert exact(tmp_path / "other") == exact(tmp_path / "own")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("other/*/result.json")}
    code, output = sweep(tmp_path / "other", *arguments, f"hydra/launcher={launcher}", *more)
    assert code == 0
    assert "2 of 2 runs have a result already" in output
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("other/*/result.json")}
