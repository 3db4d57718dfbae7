"""How far a sweep is: what has ended, what runs and when it will end, what failed and why, what is to do.

Reads files only, so it works beside a running sweep and on a copied folder. Whether a run is running is told by the
heartbeat in its claim (`harness/claims.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from analysis.load import Runs, load_runs
from harness.results.claims import Owner, current_owner
from harness.results.metrics import duration_text
from harness.results.schema import Status

LOG_FILE = "log.txt"


@dataclass(frozen=True)
class RunStatus:
    """One run of a sweep. `state` is a status of the results contract, `running` or `to do`; `text` says the rest."""

    run_id: str
    state: str
    text: str


def find_status(runs_dir: Path, sweep: str | None = None) -> list[RunStatus]:
    """The state of every run of a sweep, in its order. Raises `LoadError` when there is no such sweep."""
    runs = load_runs(runs_dir, sweep=sweep, need_ended=False)
    return [*_ended(runs, runs_dir), *_not_ended(runs, runs_dir)]


def print_status(runs_dir: Path, sweep: str | None = None, *, console: Console | None = None) -> None:
    """Prints totals, then a line for every run that is not simply finished."""
    console = console or Console(highlight=False)
    found = find_status(runs_dir, sweep)
    counts = Counter(run.state for run in found)
    totals = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    console.print(Text(f"{sweep or 'all runs'}: {totals}", style="bold"))
    for run in sorted(found, key=lambda run: _urgency(run.state)):
        if run.state != Status.FINISHED:
            console.print(Text(": ".join(filter(None, (run.state, run.run_id, run.text)))), soft_wrap=True)


def _urgency(state: str) -> tuple[int, str]:
    order = ["running", Status.FAILED, Status.OUT_OF_MEMORY, Status.DIVERGED]
    return (order.index(state) if state in order else len(order), state)


def _ended(runs: Runs, runs_dir: Path) -> Iterator[RunStatus]:
    for row in runs.frame.itertuples(index=False):
        run_id, status, error = str(row.run_id), str(row.status), str(row.error or "")
        owner = current_owner(runs_dir / run_id)
        if owner is not None:  # rerun=all
            yield _running(run_id, owner)
        elif status == Status.FINISHED:
            yield RunStatus(run_id, status, "")
        else:
            yield RunStatus(run_id, status, error or _last_line(runs_dir / run_id / LOG_FILE))
    for run_id in runs.unreadable:
        yield RunStatus(run_id, "unreadable", "its result.json cannot be read")


def _not_ended(runs: Runs, runs_dir: Path) -> Iterator[RunStatus]:
    for run_id in _unfinished_ids(runs, runs_dir):
        owner = current_owner(runs_dir / run_id)
        if owner is None:
            yield RunStatus(run_id, "to do", _last_line(runs_dir / run_id / LOG_FILE))
        else:
            yield _running(run_id, owner)


def _running(run_id: str, owner: Owner) -> RunStatus:
    return RunStatus(run_id, "running", _how_far(owner.progress, f"{owner.host}, process {owner.pid}"))


def _unfinished_ids(runs: Runs, runs_dir: Path) -> Sequence[str]:
    if runs.to_do is not None:
        return runs.to_do
    # Without a list of the sweep's runs, those that have a claim are all that can be known.
    ended = set(runs.frame["run_id"])
    return [path.parent.name for path in sorted(runs_dir.glob("*/claims")) if path.parent.name not in ended]


def _how_far(progress: dict[str, Any], where: str) -> str:
    step, num_steps = progress.get("step"), progress.get("num_steps")
    if not step or not num_steps:
        return f"preparing ({where})"
    text = f"step {step}/{num_steps}, loss {progress['loss']:.4f}, {progress['tokens_per_second']:,.0f} tokens/s"
    return f"{text}, about {duration_text(progress['seconds_left'])} left ({where})"


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return f"last line of its log: {lines[-1]}" if lines else ""
