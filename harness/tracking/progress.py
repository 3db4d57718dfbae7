"""The progress of a run on a terminal or in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar

from harness.config.schema import TrackingConfig
from harness.results.metrics import duration_text

logger = logging.getLogger("harness")


class Progress(Protocol):
    """Shows a person how far a run is."""

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows the state after optimizer step `step`."""

    def note(self, text: str) -> None:
        """Shows one line that stays, such as the result of an evaluation."""

    def close(self) -> None:
        """Ends the display; may be called twice."""


def open_progress(config: TrackingConfig, *, total_steps: int, description: str) -> Progress:
    """Returns a bar where standard error is a terminal, log lines where it is not, nothing if progress is off."""
    if not config.progress:
        return NullProgress()
    console = Console(stderr=True)
    # rich takes FORCE_COLOR for a terminal; a log file must not get a bar's control codes for it.
    if sys.stderr.isatty() and console.is_interactive:
        return RichProgress(total_steps, description, console=console)
    return PlainProgress(total_steps, description)


class NullProgress:
    """Shows nothing."""

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class RichProgress:
    """One bar on a terminal: steps, loss, tokens/s, elapsed and remaining time; notes are printed above it."""

    def __init__(self, total_steps: int, description: str, *, console: Console) -> None:
        self._bar = RichBar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            # Drawing takes time from the training it describes: twice a second is enough.
            refresh_per_second=2,
        )
        self._task = self._bar.add_task(description, total=total_steps, loss="-", rate="-")
        self._bar.start()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Moves the bar to `step`."""
        self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", rate=f"{tokens_per_second:,.0f}")

    def note(self, text: str) -> None:
        """Prints `text` above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Draws the bar a last time and leaves it on the screen."""
        self._bar.stop()


class PlainProgress:
    """Log lines: the first and the last step, between them one when 10 s and 10 % of the steps have both passed.

    That is at most a dozen lines a run, however long it is or however often `update` is called.
    """

    _SECONDS = 10.0
    _SHARE = 0.1

    def __init__(self, total_steps: int, description: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps = total_steps
        self._description = description
        self._clock = clock
        self._start_seconds = clock()
        # Step and time of the first update and of the last line; None before them.
        self._first: tuple[int, float] | None = None
        self._shown: tuple[int, float] | None = None
        self._unshown: str | None = None

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Logs a line if one is due."""
        now = self._clock()
        self._first = self._first or (step, now)
        self._unshown = (
            f"{self._description}: step {step}/{self._total_steps}, loss {loss:.4f}, "
            f"{tokens_per_second:,.0f} tokens/s, elapsed {duration_text(now - self._start_seconds)}, "
            f"ETA {self._remaining(step, now)}"
        )
        if self._shown is None or step >= self._total_steps or self._is_due(step, now, *self._shown):
            self._shown = (step, now)
            self._show()

    def note(self, text: str) -> None:
        """Logs `text`."""
        logger.info("%s: %s", self._description, text)

    def close(self) -> None:
        """Logs the last step of a run that ended early."""
        self._show()

    def _is_due(self, step: int, now: float, shown_step: int, shown_seconds: float) -> bool:
        return now - shown_seconds >= self._SECONDS and step - shown_step >= self._SHARE * self._total_steps

    def _remaining(self, step: int, now: float) -> str:
        """Returns the time left at the mean speed since the first update, which itself includes warming up."""
        assert self._first is not None
        first_step, first_seconds = self._first
        if step == first_step:
            return "-"
        return duration_text((now - first_seconds) / (step - first_step) * (self._total_steps - step))

    def _show(self) -> None:
        if self._unshown is not None:
            logger.info("%s", self._unshown)
            self._unshown = None
