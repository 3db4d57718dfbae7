"""A sweep one run at a time and in packs, through the launcher: what it takes, what is chosen, how far scores differ.

    python benchmarks/packed_sweep.py --packs 1 4 auto -- sweeps=reuters_tuned dataset.num_train_examples=200

Makes the sweep once for each size of a pack, each into a new folder under --runs-dir, start-up included; the first
finds the caches of the system cold. A search that chooses another rate makes other runs, so equal run ids say that the
choices are equal. Prints a Markdown table, and the scores that differ most: a run at a rate that is too high may not
learn, and takes any rounding a long way, also that of another processor (`metrics.jsonl` of both says where it begins).
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from harness.measure.environment import environment
from harness.results.schema import RunResult, Status, read_result

SCORES = ("val_", "test_")


@dataclass(frozen=True)
class Made:
    """A sweep that was made: its wall time and its finished runs by id."""

    pack: str
    seconds: float
    runs: dict[str, RunResult]

    @property
    def together(self) -> float:
        """With how many runs the median run shared a pass, itself included."""
        return median(run.environment.get("packed", 1) for run in self.runs.values())


def make(overrides: Sequence[str], pack: str, folder: Path) -> Made:
    """Makes a sweep in a new folder. Raises `subprocess.CalledProcessError` where it fails."""
    folder.mkdir(parents=True)  # never one in which runs have ended already
    command = [sys.executable, "-m", "harness", "-m", *overrides, f"runs_dir={folder}", f"hydra.launcher.pack={pack}"]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    seconds = time.perf_counter() - started
    results = [read_result(path) for path in sorted(folder.glob("*/result.json"))]
    return Made(pack, seconds, {run.run_id: run for run in results if run.status is Status.FINISHED})


@dataclass(frozen=True)
class Difference:
    """A score of a run that two sweeps made: by how much of the larger value it differs."""

    of_it: float
    run_id: str
    score: str = ""


def differences(one: Made, other: Made) -> list[Difference]:
    """By run that both sweeps have, the score of it that differs most."""
    found = []
    for run_id in sorted(one.runs.keys() & other.runs.keys()):
        ours, theirs = one.runs[run_id].metrics, other.runs[run_id].metrics
        of_run = [Difference(0.0, run_id)]
        for name in ours.keys() & theirs.keys():
            if name.startswith(SCORES):
                size = max(abs(ours[name]), abs(theirs[name]))
                of_run.append(Difference(abs(ours[name] - theirs[name]) / size if size else 0.0, run_id, name))
        found.append(max(of_run, key=lambda difference: difference.of_it))
    return found


def table(made: Sequence[Made]) -> str:
    """One Markdown row for each sweep, against the first of them, and the scores that differ most."""
    first = made[0]
    lines = [
        "| pack | seconds | times faster | runs | in a pass, median | same runs | bitwise equal | largest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    furthest = []
    for one in made:
        common = sorted(differences(first, one), key=lambda difference: -difference.of_it)
        num_equal = sum(not difference.of_it for difference in common)
        most = common[0].of_it if common else 0.0
        lines.append(
            f"| {one.pack} | {one.seconds:.1f} | {first.seconds / one.seconds:.2f} | {len(one.runs)} | "
            f"{one.together:g} | {len(common)} of {len(first.runs)} | {num_equal} | {most:.2g} |"
        )
        furthest += [
            f"pack {one.pack}: {each.score} of {each.run_id}: {each.of_it:.2g}" for each in common[:5] if each.of_it
        ]
    return "\n".join([*lines, "", *furthest])


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the sweeps and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", nargs="+", default=["1", "8"], help="sizes, the first to compare the others with")
    parser.add_argument("--runs-dir", type=Path, help="where the folders are made; default: a temporary one")
    parser.add_argument("overrides", nargs="+", help="of the sweep, behind --")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.runs_dir or Path(temporary)
        made = [make(options.overrides, pack, folder / f"pack_{pack}") for pack in options.packs]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{datetime.date.today()}, {environment(device)}\n{' '.join(options.overrides)}\n\n{table(made)}")


if __name__ == "__main__":
    main()
