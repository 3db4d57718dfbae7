"""`python -m harness` in a process that a fork server has forked: what it imports is paid for once, and not each time.

Its command line, standard streams, signals and exit code are those of a process that was started afresh; how it starts
that way is for tests/test_main.py.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

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
    from harness.__main__ import main

    sys.argv = ["harness", *arguments]
    sys.exit(main())
