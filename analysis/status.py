"""How far a sweep is: what has ended, what runs and when it will end, what failed and why, what is to do.

Reads files only, so it works beside a running sweep and on a copied folder. A run is running while its claim has a
heartbeat (`harness/results/claims.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.text import Text

from analysis.load import Runs, load_runs
from harness.results.claims import current_owner
from harness.results.files import CLAIMS_DIR, LOG_FILE, RESULT_FILE
from harness.results.launches import read_launches
from harness.results.metrics import duration_text
from harness.results.schema import Status
from harness.results.state import NEW, RUNNING, STOPPED, UNREADABLE, run_state

_SHOWN = ["run_id", "status", "error"]


@dataclass(frozen=True)
class RunStatus:
    """One run of a sweep. `state` is that of `run_state`, or `to do` for what has not ended; `text` says the rest."""

    run_id: str
    state: str
    text: str


def find_status(runs_dir: Path, sweep: str | None = None) -> list[RunStatus]:
    """The state of every run of a sweep, in its order. Raises `LoadError` when there is no such sweep."""
    runs = load_runs(runs_dir, sweep=sweep, need_ended=False)
    ended = pd.concat([runs.frame[_SHOWN], runs.trials[_SHOWN]]).itertuples(index=False)
    return [
        *(_status(runs_dir / str(row.run_id), ended=str(row.status), error=str(row.error or "")) for row in ended),
        *(_status(runs_dir / run_id, ended=UNREADABLE) for run_id in runs.unreadable),
        *(_status(runs_dir / run_id) for run_id in _unfinished_ids(runs, runs_dir)),
    ]


def print_status(runs_dir: Path, sweep: str | None = None, *, console: Console | None = None) -> None:
    """Prints totals, then a line for every run that is not simply finished."""
    console = console or Console(highlight=False)
    found = find_status(runs_dir, sweep)
    counts = Counter(run.state for run in found)
    totals = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    console.print(Text(f"{sweep or 'all runs'}: {totals}", style="bold"))
    searched = search_text(runs_dir, sweep) if sweep is not None else ""
    if searched:
        console.print(Text(searched))
    for run in sorted(found, key=lambda run: _urgency(run.state)):
        if run.state != Status.FINISHED:
            console.print(Text(": ".join(filter(None, (run.state, run.run_id, run.text)))), soft_wrap=True)


def search_text(runs_dir: Path, sweep: str) -> str:
    """How far the search of a sweep was when its last round began; empty where nothing is searched."""
    launched = read_launches(runs_dir, sweep)
    cells = launched.launches[-1].searched if launched is not None else []
    if not cells:
        return ""
    names = " and ".join(dict.fromkeys(axis for cell in cells for axis in cell.axes))
    num_chosen = sum(cell.runs is not None for cell in cells)
    num_trials = sum(len(cell.trials) for cell in cells)
    return f"search for {names}: chosen in {num_chosen} of {len(cells)} cells, {num_trials} trials so far"


def _urgency(state: str) -> tuple[int, str]:
    order = [RUNNING, Status.FAILED, Status.OUT_OF_MEMORY, Status.DIVERGED]
    return (order.index(state) if state in order else len(order), state)


def _status(run_dir: Path, *, ended: str | None = None, error: str = "") -> RunStatus:
    """The status of a run; `ended` and `error` are what its result says, if it has one."""
    state = run_state(run_dir, ended=ended)
    if state == RUNNING:
        text = _progress(run_dir)
    elif state == Status.FINISHED:
        text = ""
    elif state == UNREADABLE:
        text = f"its {RESULT_FILE} cannot be read"
    else:
        text = error or _last_line(run_dir / LOG_FILE)
    return RunStatus(run_dir.name, "to do" if state in (STOPPED, NEW) else state, text)


def _unfinished_ids(runs: Runs, runs_dir: Path) -> Sequence[str]:
    if runs.to_do is not None:
        return runs.to_do
    # Without a list of the sweep's runs, those that have a claim are all that can be known.
    ended = {*runs.frame["run_id"], *runs.trials["run_id"]}
    return [path.parent.name for path in sorted(runs_dir.glob(f"*/{CLAIMS_DIR}")) if path.parent.name not in ended]


def _progress(run_dir: Path) -> str:
    """How far a run is and where it is computed; nothing where it has ended meanwhile."""
    owner = current_owner(run_dir)
    if owner is None:
        return ""
    where, progress = f"{owner.host}, process {owner.pid}", owner.progress
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
