"""What a report of many runs takes: seconds and memory of `python -m analysis report`, by the number of runs.

    python benchmarks/many_runs.py RUNS_DIR                10, 100, 1,000 and 10,000 runs, about two minutes

The runs are copies of one real run below RUNS_DIR (or an archive), LoRA with curves, under other ranks, placements,
learning rates and seeds, with scores that differ. Nothing is trained. Prints one Markdown table.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from analysis.archive import opened
from harness.results.files import CURVE_FILE, RESULT_FILE
from harness.results.launches import record_launch

# Ranks, placements, learning rates, seeds: 220 runs of each rank.
AXES = (
    range(1, 101),
    ("q", "k", "v", "o", "qv", "qk", "ov", "qkv", "qkvo", "mlp", "all"),
    (3e-4, 1e-3, 3e-3, 1e-2),
    range(5),
)
NAME = "many"


def make_runs(source: Path, runs_dir: Path, num_runs: int) -> None:
    """Writes so many runs below `runs_dir` and a launch that names them, all like the run in the folder `source`."""
    template = json.loads((source / RESULT_FILE).read_text(encoding="utf-8"))
    curve = (source / CURVE_FILE).read_bytes()
    draw = random.Random(0)
    run_ids = []
    for rank, placement, rate, seed in itertools.islice(itertools.product(*AXES), num_runs):
        result = _like(template, rank=rank, placement=placement, rate=rate, seed=seed, draw=draw)
        run_ids.append(result["run_id"])
        folder = runs_dir / result["run_id"]
        folder.mkdir(parents=True)
        (folder / RESULT_FILE).write_text(json.dumps(result), encoding="utf-8")
        (folder / CURVE_FILE).write_bytes(curve)
    record_launch(runs_dir, NAME, run_ids=run_ids, command=f"python -m harness -m sweeps={NAME}")


def _like(
    template: dict[str, Any], *, rank: int, placement: str, rate: float, seed: int, draw: random.Random
) -> dict[str, Any]:
    result = copy.deepcopy(template)
    config, metrics = result["config"], result["metrics"]
    cell = f"lora-r{rank}-{placement}-lr{rate}"
    result |= {"run_id": f"{cell}-s{seed}", "cell_id": cell, "sweep": NAME}
    config |= {"seed": seed, "sweep": NAME}
    config["rank"]["rank"] = rank
    config["target_layers"] |= {
        "name": placement,
        "projections": [placement] if placement in ("mlp", "all") else [*placement],
    }
    for group in ("trainer", "method"):
        if "learning_rate" in config[group]:
            config[group]["learning_rate"] = rate
    metrics["num_adapter_params"] = 768 * rank * len(placement)
    metrics["peak_memory_bytes"] += 12 * metrics["num_adapter_params"]
    for name in metrics:
        if name.startswith(("val_accuracy", "test_accuracy")):
            metrics[name] = draw.gauss(0.9, 0.01)
    return result


def measure(runs_dir: Path, reports_dir: Path) -> tuple[float, float]:
    """Seconds of a report in a separate process, and its peak memory in MiB (that of its largest process)."""
    command = [sys.executable, "-m", "analysis", "report", "--sweep", NAME, "--runs-dir", str(runs_dir)]
    began = time.monotonic()
    subprocess.run([*command, "--reports-dir", str(reports_dir)], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs_dir", type=Path, metavar="RUNS_DIR", help="a folder of runs or an archive of one")
    parser.add_argument("--num-runs", type=int, nargs="+", default=[10, 100, 1_000, 10_000])
    options = parser.parse_args()
    print("| runs | report (s) | peak memory (MiB) |\n|---|---|---|")
    with opened(options.runs_dir) as source_dir:
        source = next(
            path.parent
            for path in sorted(source_dir.glob(f"*-lora-*/{RESULT_FILE}"))
            if "test_accuracy" in path.read_text(encoding="utf-8")
        )
        # Ascending: the peak over child processes is that of the largest so far.
        for num_runs in sorted(options.num_runs):
            with tempfile.TemporaryDirectory() as directory:
                make_runs(source, Path(directory) / "runs", num_runs)
                seconds, memory = measure(Path(directory) / "runs", Path(directory) / "reports")
            print(f"| {num_runs:,} | {seconds:.1f} | {memory:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
