"""How many runs compute at a time where there is no GPU: a given number, or as many as make a sweep faster.

With `auto` a few seconds of a run's steps are rehearsed by one process that has all cores, by two with half of them
each, and so on, for as long as all together compute more tokens a second. A small model leaves many cores waiting for
each other; a large one is limited by memory, whose bandwidth they share.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from harness.config.schema import RunConfig
from harness.config.validation import ConfigError
from harness.content.identity import PlannedRun
from harness.folder import kept_result
from harness.results.files import RESULT_FILE
from harness.results.launches import LaunchError, read_launches
from harness.results.metrics import bytes_text
from harness.results.schema import ResultError, RunResult, read_result
from harness.training.pack_size import LEAST_GAIN, MEMORY_SHARE
from hydra_plugins.lora_harness import _worker as worker

logger = logging.getLogger("harness")

AUTO = "auto"
_SECONDS = 3.0


@dataclass(frozen=True)
class Tried:
    """What so many processes computed side by side: tokens a second of all, and the memory of the largest."""

    num_workers: int
    num_threads: int
    tokens_per_second: float
    rss_bytes: int

    def __str__(self) -> str:
        return f"{self.num_workers} of {_threads(self.num_threads)} {self.tokens_per_second:,.0f}"

    def time_of(self, num_runs: int) -> float:
        """How long so many runs take, a run having one token: the last round may have fewer than all workers."""
        rounds = math.ceil(num_runs / self.num_workers)
        return rounds * self.num_workers / self.tokens_per_second


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number > 1)}"


def check_workers(workers: Any) -> int | None:
    """The number that is given, 1 where none is; None for `auto`. Raises `ConfigError` for anything else."""
    if workers is None:
        return 1
    if workers == AUTO:
        return None
    if isinstance(workers, int) and not isinstance(workers, bool) and workers >= 1:
        return workers
    raise ConfigError(
        [
            f"hydra.launcher.workers={workers}: give the number of runs at a time, 1 or more, or {AUTO} for as many as "
            "make the sweep faster."
        ]
    )


def choose_workers(
    runs: Sequence[PlannedRun], *, num_cores: int, measure: Callable[[RunConfig, int], Tried], available: int | None
) -> int | None:
    """As many as make the runs that are to do faster, and says why; None where no more than one run is to do.

    Args:
        runs: that are wanted now.
        num_cores: that this process may use.
        measure: of a config and a number of processes; raises `RuntimeError` for what cannot be measured.
        available: bytes of memory; None where that is not known.
    """
    to_do = [run for run in runs if kept_result(run) is None]
    if len(to_do) < 2:
        return None
    most = min(len(to_do), num_cores // max(run.config.num_threads or 1 for run in to_do))
    if most < 2:
        logger.info("workers=%s: 1, because num_threads leaves no room for more on %d cores", AUTO, num_cores)
        return 1
    known = _as_before(runs, num_cores, most, available)
    if known is not None:
        return known
    # Imported late: a sweep whose configs are wrong says so without waiting for torch.
    from harness.plan import plan

    largest = max(to_do, key=lambda run: plan(run.config).least_bytes)
    logger.info("workers=%s: timing steps of %s in one process and in several", AUTO, largest.run_id)
    tried: list[Tried] = []
    reason = ""
    for number in _numbers(num_cores, most):
        needed = number * tried[-1].rss_bytes if tried else 0
        if available is not None and needed > MEMORY_SHARE * available:
            reason = f"; {number} need {bytes_text(needed)}, available are {bytes_text(available)}"
            break
        try:
            tried.append(measure(largest.config, number))
        except RuntimeError as error:
            reason = f"; {number} could not be tried: {error}"
            break
        if len(tried) > 1 and tried[-1].tokens_per_second < LEAST_GAIN * tried[-2].tokens_per_second:
            break
    best: Tried | None = None
    for one in tried:
        if best is None or LEAST_GAIN * one.time_of(len(to_do)) <= best.time_of(len(to_do)):
            best = one
    chosen = 1 if best is None else best.num_workers
    shown = ", ".join(map(str, tried)) or "-"
    logger.info("workers=%s: %d for %d runs (tokens a second: %s%s)", AUTO, chosen, len(to_do), shown, reason)
    return chosen


def _numbers(num_cores: int, most: int) -> list[int]:
    """Those that leave no core idle, and the most."""
    return sorted({*(number for number in range(1, most + 1) if num_cores % number == 0), most})


def _as_before(runs: Sequence[PlannedRun], num_cores: int, most: int, available: int | None) -> int | None:
    """Workers by which runs have as many threads as those of the sweep that have ended; None where there are none."""
    for result in _ended(runs):
        threads, rss_bytes = result.environment.get("num_threads"), result.metrics.get("peak_rss_bytes", 0)
        if not isinstance(threads, int) or not 1 <= threads <= num_cores:
            continue
        number = min(num_cores // threads, most)
        if available is None or number * rss_bytes <= MEMORY_SHARE * available:
            logger.info("workers=%s: %d, because runs of this sweep had %s each", AUTO, number, _threads(threads))
            return number
    return None


def _ended(runs: Sequence[PlannedRun]) -> Iterator[RunResult]:
    """Results of the runs, and of others that were launched under the name of their sweep."""
    for run in runs:
        kept = kept_result(run)
        if kept is not None:
            yield kept
    config = runs[0].config
    try:
        launched = read_launches(Path(config.runs_dir), config.sweep) if config.sweep else None
    except LaunchError:
        return
    for run_id in launched.run_ids if launched is not None else ():
        try:
            yield read_result(Path(config.runs_dir) / run_id / RESULT_FILE)
        except ResultError:
            continue


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
    config = replace(config, num_threads=num_threads)
    started: dict[Connection, Any] = {}
    try:
        for _ in range(num_workers):
            here, there = processes.Pipe()
            settings = {"config": config, "seconds": _SECONDS, "talk": there}
            started[here] = processes.Process(target=worker.time_steps, kwargs=settings, daemon=True)
            started[here].start()
            there.close()
        _replies(started)  # that each is ready
        for here in started:
            here.send("begin")
        found = cast(list[tuple[float, int]], _replies(started))
    finally:
        for process in started.values():
            process.kill()
            process.join()
    return Tried(num_workers, num_threads, sum(rate for rate, _ in found), max(rss_bytes for _, rss_bytes in found))


def _replies(started: dict[Connection, Any]) -> list[Any]:
    """What each process says next. Raises `RuntimeError` for the first that has died or says why it cannot."""
    replies, todo = [], set(started)
    while todo:
        for here in cast(list[Connection], wait(todo)):
            todo.remove(here)
            try:
                reply = here.recv()
            except (EOFError, OSError):
                started[here].join()
                raise RuntimeError(f"its process ended with exit code {started[here].exitcode}") from None
            if isinstance(reply, str) and reply != worker.READY:
                raise RuntimeError(reply)
            replies.append(reply)
    return replies
