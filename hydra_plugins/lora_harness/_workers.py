"""How many runs compute at a time where there is no GPU: a given number, or as many as make a sweep faster.

With `auto` a few seconds of the first run's steps are rehearsed by one process that has all cores, by two with half of
them each, and so on, for as long as all together compute more tokens a second. A small model leaves many cores waiting
for each other; a large one is limited by memory, whose bandwidth they share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from harness.config.composing import to_dict
from harness.config.schema import RunConfig
from harness.config.validation import ConfigError
from harness.content.identity import PlannedRun
from harness.folder import kept_result
from harness.results.metrics import bytes_text
from harness.training.pack_size import LEAST_GAIN, MEMORY_SHARE
from hydra_plugins.lora_harness import _worker as worker

logger = logging.getLogger("harness")

AUTO = "auto"
_SECONDS = 3.0
# How long the processes that are ready wait for one that is still loading.
_PATIENCE_SECONDS = 600.0


@dataclass(frozen=True)
class Tried:
    """What so many processes computed side by side: tokens a second of all, and the memory of the largest."""

    num_workers: int
    num_threads: int
    tokens_per_second: float
    rss_bytes: int

    def __str__(self) -> str:
        threads = f"{self.num_threads} thread{'s' * (self.num_threads > 1)}"
        return f"{self.num_workers} of {threads} {self.tokens_per_second:,.0f}"


def check_workers(workers: Any) -> int | None:
    """The number that is given, 1 where none is; None for `auto`. Raises `ConfigError` for anything else."""
    if workers is None:
        return 1
    if workers == AUTO:
        return None
    if isinstance(workers, int) and not isinstance(workers, bool):
        return workers
    raise ConfigError(
        [
            f"hydra.launcher.workers={workers}: give the number of runs at a time, or {AUTO} for as many as make the "
            "sweep faster."
        ]
    )


def choose_workers(
    runs: Sequence[PlannedRun], *, num_cores: int, measure: Callable[[RunConfig, int], Tried], available: int | None
) -> int:
    """As many as make the runs that are to do faster; says why.

    Args:
        runs: of the sweep. Those that have a result say how many threads a run had, which then stays so.
        num_cores: that this process may use.
        measure: of a config and a number of processes; raises `RuntimeError` for what cannot be measured.
        available: bytes of memory; None where that is not known.
    """
    results = {run.run_id: kept_result(run) for run in runs}
    threads = {result.environment.get("num_threads") for result in results.values() if result is not None}
    if len(threads) == 1 and isinstance(known := threads.pop(), int) and 1 <= known <= num_cores:
        logger.info(
            "workers=%s: %d, as runs of this sweep have been computed (%d threads)", AUTO, num_cores // known, known
        )
        return num_cores // known
    to_do = [run.config for run in runs if results[run.run_id] is None]
    most = min(len(to_do), num_cores // max((config.num_threads or 1 for config in to_do), default=1))
    if most < 2:
        return 1
    tried: list[Tried] = []
    chosen, reason = 1, ""
    for number in _numbers(most):
        needed = number * tried[-1].rss_bytes if tried else 0
        if available is not None and needed > MEMORY_SHARE * available:
            reason = f"; {number} need {bytes_text(needed)}, available are {bytes_text(available)}"
            break
        try:
            tried.append(measure(to_do[0], number))
        except RuntimeError as error:
            reason = f"; {number} could not be tried: {error}"
            break
        if len(tried) > 1 and tried[-1].tokens_per_second < LEAST_GAIN * tried[-2].tokens_per_second:
            break
        chosen = number
    logger.info("workers=%s: %d (tokens a second: %s%s)", AUTO, chosen, ", ".join(map(str, tried)) or "-", reason)
    return chosen


def _numbers(most: int) -> list[int]:
    """1, 2, 4, ... and the most."""
    return sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most})


def measure_together(processes: Any, config: RunConfig, num_workers: int, *, num_threads: int) -> Tried:
    """What so many processes compute that make the steps of a run side by side.

    Args:
        processes: the context of `multiprocessing` that starts them.
        config: of the run.
        num_workers: processes.
        num_threads: of each.

    Raises:
        RuntimeError: one of them could not begin, or died.
    """
    meet = partial(processes.Barrier(num_workers).wait, _PATIENCE_SECONDS)
    values = to_dict(replace(config, num_threads=num_threads))
    started: dict[Connection, Any] = {}
    found: list[tuple[float, int]] = []
    try:
        for _ in range(num_workers):
            receiver, sender = processes.Pipe(duplex=False)
            settings = {"values": values, "meet": meet, "seconds": _SECONDS, "reply": sender}
            started[receiver] = processes.Process(target=worker.time_steps, kwargs=settings, daemon=True)
            started[receiver].start()
            sender.close()
        todo = set(started)
        while todo:
            for receiver in wait(todo):
                todo.remove(receiver)
                found.append(_reply(receiver, started[receiver]))
    finally:
        for process in started.values():
            process.kill()
            process.join()
    return Tried(num_workers, num_threads, sum(rate for rate, _ in found), max(rss_bytes for _, rss_bytes in found))


def _reply(receiver: Connection, process: Any) -> tuple[float, int]:
    try:
        reply = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with exit code {process.exitcode}") from None
    if isinstance(reply, str):
        raise RuntimeError(reply)
    return cast(tuple[float, int], reply)
