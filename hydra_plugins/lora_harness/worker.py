"""What happens inside the process of one run."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Exit codes of a run's process. The launcher reads the result file; these say why there is none.
FINISHED, NOT_FINISHED, REFUSED, CLAIMED, PREEMPTED = 0, 1, 2, 3, 75

# Loaded once by the fork server, so that each run starts in a fraction of a second.
PRELOAD = ["harness.run", "hydra_plugins.lora_harness.worker", "torch.optim.adamw", "sklearn.metrics"]


def run_in_process(
    values: dict[str, Any], *, log_path: str, variables: dict[str, str], launcher_pid: int, reply: Connection
) -> None:
    """Computes one run in this process and exits with one of the codes above.

    Args:
        values: the run's config, as `to_dict` gives it.
        log_path: file that takes everything the process prints.
        variables: environment variables that give the process its device.
        launcher_pid: when this process is gone, the run writes a checkpoint and ends.
        reply: takes the message of a refused run.
    """
    # Ctrl-C reaches the whole terminal; what becomes of the runs is the launcher's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(variables)
    _redirect_output(Path(log_path))
    threading.Thread(target=_end_with, args=(launcher_pid,), daemon=True).start()

    from harness.claims import RunClaimedError
    from harness.config import from_dict
    from harness.results import Status
    from harness.run import USER_ERRORS, PreemptedError, run

    try:
        config = from_dict(values)
        result = run(replace(config, tracking=replace(config.tracking, progress=False)))
        code = FINISHED if result.status is Status.FINISHED else NOT_FINISHED
    except RunClaimedError:
        code = CLAIMED
    except PreemptedError:
        code = PREEMPTED
    except USER_ERRORS as error:
        reply.send(str(error))
        code = REFUSED
    sys.exit(code)


def _redirect_output(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())


def _end_with(launcher_pid: int) -> None:
    """Asks this process to stop once the launcher is gone: nobody would start the next run after this one."""
    while True:
        time.sleep(1.0)
        try:
            os.kill(launcher_pid, 0)
        except OSError:
            os.kill(os.getpid(), signal.SIGTERM)
            return
