"""`python -m harness` in a process that a fork server has forked: what it imports is paid for once, and not each time.

Its command line, standard streams, signals and exit code are those of a process that was started afresh; how it starts
that way is for tests/test_main.py. The fork server that it starts for its own workers is forked as well.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

from harness.content.identity import PlannedRun
from harness.measure.environment import loaded_checkout
from hydra_plugins.lora_harness import _worker as worker

# Loaded by the launcher's own workers as well, so one server does for both.
PRELOAD = "hydra_plugins.lora_harness._preload"


class Launched:
    """A process as `subprocess.Popen` has it, with its output in a file."""

    def __init__(self, arguments: list[str], *, cwd: Path, output: Path, address_space: int | None) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload([PRELOAD])
        self._output = output
        job = (arguments, str(cwd), str(output), dict(os.environ), address_space)
        self._process = context.Process(target=_main, args=job)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("python -m harness", timeout)
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, None]:
        self.wait(timeout)
        return self._output.read_text(), None

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


def _main(arguments: list[str], cwd: str, output: str, environment: dict[str, str], address_space: int | None) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    # A shell starts what it puts into the background with SIGINT ignored, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if address_space is not None:
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    else:  # under a limit, what the server itself takes counts
        _fork_own_server()
    from harness.__main__ import main

    sys.argv = ["harness", *arguments]
    sys.exit(main())


def _fork_own_server() -> None:
    """Starts the fork server of this process, as `forkserver.ensure_running` does, from what is imported already."""
    spawn = forkserver.util.spawnv_passfds
    forkserver.util.spawnv_passfds = _fork_instead  # type: ignore[assignment]
    try:
        forkserver.set_forkserver_preload([PRELOAD])
        forkserver.ensure_running()
    finally:
        forkserver.util.spawnv_passfds = spawn


def _fork_instead(path: bytes, arguments: list[str], kept: list[int]) -> int:
    """A process with the program after `-c` of `arguments`, and with the files that `spawnv_passfds` would leave it."""
    pid = os.fork()
    if pid == 0:
        try:
            for file in map(int, os.listdir("/proc/self/fd")):
                if file not in (0, 1, 2, *kept):
                    with contextlib.suppress(OSError):  # that of the listing itself
                        os.close(file)
            exec(arguments[-1], {"__name__": "__main__"})
        except SystemExit:
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


@dataclass(frozen=True)
class Forked:
    """What a process has from the fork server: imports, whether these are out of the garbage collector's sight.

    `knows_checkout`: whether the server has asked for the commit of the code that it loaded. `imported_by_run`: modules
    of the harness that a run had to load by itself.
    """

    modules: frozenset[str]
    is_frozen: bool
    address_space_bytes: int
    knows_checkout: bool
    imported_by_run: frozenset[str]


def look_at_fork(run: PlannedRun) -> Forked:
    """What a process has that the fork server has just forked, and what a run in it loads beside."""
    context = get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_look, args=(run, sender))
    process.start()
    sender.close()
    forked: Forked = receiver.recv()
    process.join()
    return forked


def _look(run: PlannedRun, sender: Any) -> None:
    modules, is_frozen = frozenset(sys.modules), gc.get_freeze_count() > 10_000
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kibibytes = int(status["VmPeak"].split()[0])
    knows_checkout = loaded_checkout.cache_info().currsize == 1
    assert worker.compute(run).status == "finished"
    imported = frozenset(name for name in sys.modules.keys() - modules if name.partition(".")[0] == "harness")
    sender.send(Forked(modules, is_frozen, kibibytes * 1024, knows_checkout, imported))
