"""What a person sees while a sweep runs: a live screen on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harness.results.metrics import duration_text
from harness.results.schema import Status
from hydra_plugins.lora_harness._worker import Outcome

logger = logging.getLogger("harness")

# Without a terminal, how often a line says how far the running runs are.
_LINE_EVERY_SECONDS = 60.0


@dataclass(frozen=True)
class RunningRun:
    """How far a running run is. `progress` as it reports it: step, num_steps, loss, tokens_per_second."""

    run_id: str
    slot: str
    seconds: float
    progress: Mapping[str, Any] = field(default_factory=dict)


class Screen(Protocol):
    """Shows a sweep."""

    def started(self, run_id: str, slot: str) -> None:
        """A run begins."""

    def ended(self, run_id: str, outcome: Outcome) -> None:
        """A run has ended, or need not be run."""

    def show(self, running: Sequence[RunningRun], num_waiting: int) -> None:
        """The state at this moment; called several times a second."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def summarise(self, outcomes: Mapping[str, Outcome]) -> None:
        """The sweep is over."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_screen(num_runs: int) -> Screen:
    """The live screen where standard error is a terminal, log lines where it is not."""
    console = Console(stderr=True)
    if sys.stderr.isatty() and console.is_interactive:
        return LiveScreen(num_runs, console)
    return PlainScreen(num_runs)


class Tally:
    """Counts ended runs and estimates the time that is left from those that were really run."""

    def __init__(self, num_runs: int) -> None:
        self.num_runs = num_runs
        self.counts: dict[str, int] = {}
        self._began = time.monotonic()
        self._num_run = 0

    def add(self, outcome: Outcome) -> None:
        """Counts an ended run."""
        name = "kept" if outcome.was_kept and outcome.status == Status.FINISHED else outcome.status
        self.counts[name] = self.counts.get(name, 0) + 1
        self._num_run += not outcome.was_kept

    @property
    def num_ended(self) -> int:
        """Runs that have ended or were kept."""
        return sum(self.counts.values())

    def text(self, running: Sequence[RunningRun]) -> str:
        """For instance `12/40 runs: 10 finished, 2 failed; 0:12:30 elapsed, about 0:30:00 left`."""
        counted = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        elapsed = time.monotonic() - self._began
        parts = [f"{self.num_ended}/{self.num_runs} runs" + (f": {counted}" if counted else "")]
        parts.append(f"{duration_text(elapsed)} elapsed")
        left = self._seconds_left(elapsed, running)
        if left is not None:
            parts.append(f"about {duration_text(left)} left")
        return ", ".join(parts[:1]) + "; " + ", ".join(parts[1:])

    def _seconds_left(self, elapsed: float, running: Sequence[RunningRun]) -> float | None:
        done = self._num_run + sum(_share(run) for run in running)
        remaining = self.num_runs - self.num_ended - sum(_share(run) for run in running)
        return elapsed / done * remaining if done > 0.05 else None


class PlainScreen:
    """Log lines: each start and end, and now and then how far the running runs are."""

    def __init__(self, num_runs: int) -> None:
        self._tally = Tally(num_runs)
        self._shown = time.monotonic()

    def started(self, run_id: str, slot: str) -> None:
        """One line."""
        logger.info("%s: started on %s", run_id, slot)

    def ended(self, run_id: str, outcome: Outcome) -> None:
        """One line: the run, what became of it, its scores, and the totals."""
        self._tally.add(outcome)
        word = "already finished" if outcome.was_kept else outcome.status
        logger.info("%s: %s%s%s [%s]", run_id, word, _because(outcome), _row(outcome), self._tally.text([]))

    def show(self, running: Sequence[RunningRun], num_waiting: int) -> None:
        """A line per running run, once a minute."""
        if time.monotonic() - self._shown < _LINE_EVERY_SECONDS:
            return
        self._shown = time.monotonic()
        for run in running:
            logger.info("%s: %s", run.run_id, "  ".join(_cells(run)[1:]))

    def say(self, text: str) -> None:
        """Logs it."""
        logger.info("%s", text)

    def summarise(self, outcomes: Mapping[str, Outcome]) -> None:
        """Totals, and every run that is not finished."""
        for line in _summary(self._tally, outcomes):
            logger.info("%s", line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


class LiveScreen:
    """A table of the running runs that is redrawn in place, with ended runs scrolling by above it."""

    def __init__(self, num_runs: int, console: Console) -> None:
        self._tally = Tally(num_runs)
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def started(self, run_id: str, slot: str) -> None:
        """Nothing: it appears in the table."""

    def ended(self, run_id: str, outcome: Outcome) -> None:
        """One line above the table, with its scores."""
        self._tally.add(outcome)
        word = "already finished" if outcome.was_kept else outcome.status
        style = "green" if outcome.status == Status.FINISHED else "red"
        self._live.console.print(
            Text.assemble((f"{word:>16}  ", style), run_id, _because(outcome), _row(outcome)), soft_wrap=True
        )

    def show(self, running: Sequence[RunningRun], num_waiting: int) -> None:
        """Redraws the table."""
        table = Table(box=None, pad_edge=False)
        for title in ("run", "where", "step", "loss", "tokens/s", "elapsed", "left"):
            table.add_column(title, justify="left" if title in ("run", "where") else "right", no_wrap=title != "run")
        for run in running:
            table.add_row(*_cells(run))
        self._live.update(Group(table, Text(self._tally.text(running), style="bold")))

    def say(self, text: str) -> None:
        """Prints it above the table."""
        self._live.console.print(Text(text))

    def summarise(self, outcomes: Mapping[str, Outcome]) -> None:
        """Totals, and every run that is not finished."""
        self._live.stop()
        for line in _summary(self._tally, outcomes):
            self._console.print(Text(line), soft_wrap=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


def _share(run: RunningRun) -> float:
    step, num_steps = run.progress.get("step", 0), run.progress.get("num_steps", 0)
    return step / num_steps if num_steps else 0.0


def _cells(run: RunningRun) -> list[str]:
    progress, share = run.progress, _share(run)
    if not share:
        return [run.run_id, run.slot, "preparing", "", "", duration_text(run.seconds), ""]
    return [
        run.run_id,
        run.slot,
        f"{progress['step']}/{progress['num_steps']}",
        f"{progress.get('loss', float('nan')):.4f}",
        f"{progress.get('tokens_per_second', 0):,.0f}",
        duration_text(run.seconds),
        duration_text(progress["seconds_left"]),
    ]


def _because(outcome: Outcome) -> str:
    lines = outcome.error.strip().splitlines()
    return f": {lines[0]}" if lines else ""


def _row(outcome: Outcome) -> str:
    return f"  {outcome.headline}" if outcome.headline else ""


def _summary(tally: Tally, outcomes: Mapping[str, Outcome]) -> list[str]:
    lines = [tally.text([])]
    for run_id, outcome in outcomes.items():
        if outcome.status != Status.FINISHED:
            lines.append(f"{outcome.status}: {run_id}{_because(outcome)}")
    return lines
