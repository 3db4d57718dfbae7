"""What was launched under a sweep's name: one file per launch, never rewritten, and the union of them.

    <runs_dir>/sweeps/<sweep>/20261122T101500.123456Z-1a2b3c4d.json
    {"sweep": "demo", "run_ids": ["...", ...], "command": "python -m harness -m sweeps=demo", "created": "2026-...",
     "searched": [{"axes": ["trainer.learning_rate"], "trials": ["...", ...], "runs": ["...", ...],
                   "chosen": [0.002], "edges": {}}, ...]}

A sweep that searches is recorded at each round; `runs` and `chosen` of a cell are null until its trials have decided.

Launches that start at once write two files, so neither can lose the other's runs, on any file system. Folders of
several machines are merged by copying. `<runs_dir>/sweeps/<sweep>.json`, which held the last launch alone in earlier
versions, counts as the first launch.
"""

from __future__ import annotations

import datetime
import json
import re
import shlex
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.results.files import write_json_atomically

SWEEPS_DIR = "sweeps"


class LaunchError(ValueError):
    """A launch file that cannot be used; the message names the file, what is wrong with it, and the fix."""


@dataclass(frozen=True)
class SearchedCell:
    """A cell of a sweep in which settings (`axes`) were searched: its trials, and what they chose.

    `runs` have the values `chosen`; both are None until the trials have decided. `edges` names the settings whose
    chosen value is the first or last of all that were tried: "low" or "high".
    """

    axes: list[str]
    trials: list[str]
    runs: list[str] | None = None
    chosen: list[float] | None = None
    edges: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """One command that named runs of a sweep. `command` and `created` (ISO format) are None where they are unknown.

    `searched` is where the search stood, a record for each cell; empty where nothing was searched.
    """

    run_ids: list[str]
    command: str | None = None
    created: str | None = None
    searched: list[SearchedCell] = field(default_factory=list)


@dataclass(frozen=True)
class SweepLaunches:
    """Every launch under one sweep's name, the oldest first."""

    sweep: str
    launches: list[Launch]

    @property
    def run_ids(self) -> list[str]:
        """The runs that any launch named, in the order in which they were first named, without those superseded.

        Runs that searches decided on were named as their cells were decided: they stand in the order of the cells.
        """
        left_out = set(self.superseded)
        named = dict.fromkeys(run_id for launch in self.launches for run_id in launch.run_ids if run_id not in left_out)
        cells: dict[str, list[str]] = {}  # a cell has one first trial in all launches, decided or not
        for cell in (cell for launch in self.launches for cell in launch.searched):
            first = next(iter([*cell.trials, *(cell.runs or ())]), "")
            cells[first] = cell.runs or cells.get(first, [])
        decided = dict.fromkeys(run_id for runs in cells.values() for run_id in runs if run_id in named)
        in_order = iter(decided)
        return [next(in_order) if run_id in decided else run_id for run_id in named]

    @property
    def superseded(self) -> list[str]:
        """Runs at values that a search chose in an earlier launch, where it chose others in a later one.

        So it is when the search itself has changed. Beside the runs at the values of today they would be a second
        search, by the runs that are reported. What any launch names without a search is none of them.
        """
        decided: dict[str, list[SearchedCell]] = {}  # a cell has one first trial in all launches
        for cell in (cell for launch in self.launches for cell in launch.searched):
            if cell.runs is not None and cell.trials:
                decided.setdefault(cell.trials[0], []).append(cell)
        current = {run_id for cells in decided.values() for run_id in cells[-1].runs or ()}
        for launch in self.launches:
            current |= set(launch.run_ids) - {run_id for cell in launch.searched for run_id in cell.runs or ()}
        earlier = [
            run_id
            for cells in decided.values()
            for cell in cells[:-1]
            if cell.chosen != cells[-1].chosen
            for run_id in cell.runs or ()
        ]
        return [run_id for run_id in dict.fromkeys(earlier) if run_id not in current]

    @property
    def added_run_ids(self) -> list[list[str]]:
        """For each launch, the runs that it named and no earlier one did."""
        seen: set[str] = set()
        added = []
        for launch in self.launches:
            added.append([run_id for run_id in dict.fromkeys(launch.run_ids) if run_id not in seen])
            seen.update(launch.run_ids)
        return added


def command_line() -> str:
    """The command that started this process, as one would type it."""
    return "python -m harness " + shlex.join(sys.argv[1:])


def record_launch(
    runs_dir: Path,
    sweep: str,
    *,
    run_ids: Sequence[str],
    command: str,
    searched: Sequence[SearchedCell] = (),
) -> Path:
    """Adds a launch to a sweep and returns the new file. Raises `OSError` when it cannot be written."""
    now = datetime.datetime.now(datetime.UTC)
    path = runs_dir / SWEEPS_DIR / sweep / f"{now:%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex[:8]}.json"
    created = now.isoformat(timespec="seconds")
    values: dict[str, Any] = {"sweep": sweep, "run_ids": list(run_ids), "command": command, "created": created}
    if searched:
        values["searched"] = [asdict(cell) for cell in searched]
    write_json_atomically(path, values)
    return path


def read_launches(runs_dir: Path, sweep: str) -> SweepLaunches | None:
    """Every launch of a sweep; None when none is recorded. Raises `LaunchError` for a file that cannot be used."""
    folder = runs_dir / SWEEPS_DIR
    paths = [folder / f"{sweep}.json", *sorted((folder / sweep).glob("[!.]*.json"))]
    launches = [_read_launch(path, sweep) for path in paths if path.is_file()]
    return SweepLaunches(sweep, launches) if launches else None


def launched_sweeps(runs_dir: Path) -> list[str]:
    """The names of all sweeps that were launched in a folder, sorted."""
    folder = runs_dir / SWEEPS_DIR
    files = [path for path in (*folder.glob("*.json"), *folder.glob("*/*.json")) if path.is_file()]
    return sorted({path.stem if path.parent == folder else path.parent.name for path in files})


def _read_launch(path: Path, sweep: str) -> Launch:
    remedy = (
        "Delete the file and run its sweep again: the other launches stand, and without any the runs that "
        f"{sweep} computed itself are taken."
    )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LaunchError(f"{path}: not readable as JSON ({error}). {remedy}") from error
    run_ids = raw.get("run_ids") if isinstance(raw, dict) else None
    if not isinstance(run_ids, list) or not all(isinstance(run_id, str) for run_id in run_ids):
        raise LaunchError(f"{path}: expected an object with run_ids, a list of names. {remedy}")
    odd = [run_id for run_id in run_ids if not re.fullmatch(r"[\w][\w.+-]*", run_id)]
    if odd:
        raise LaunchError(f"{path}: {odd[0]!r:.80} in run_ids is no name of a run. {remedy}")
    if raw.get("sweep") != sweep:
        raise LaunchError(f"{path}: is about sweep {raw.get('sweep')!r}, not {sweep!r}. {remedy}")
    command, created = (value if isinstance(value, str) else None for value in (raw.get("command"), raw.get("created")))
    try:
        searched = [SearchedCell(**cell) for cell in raw.get("searched", [])]
    except TypeError as error:
        raise LaunchError(f"{path}: searched is no list of cells with axes, trials and runs. {remedy}") from error
    return Launch(run_ids, command, created, searched)
