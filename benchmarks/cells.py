"""A run of a sweep against a script that trains the same adapter: wall time, start-up included, and accuracy.

    python benchmarks/cells.py                                    about 20 minutes on two idle cores
    python benchmarks/cells.py --num-rows 100 --seeds 1 --num-runs 2      that it runs

Eight LoRA runs (rank 8 on q,v of all-MiniLM-L6-v2, 2,000 rows of Reuters R8, one epoch in batches of 8, val and test
scored once) through the launcher, and `benchmarks/trainer_script.py` once for each seed, as it is by default and tuned.
All have the same rows, rate and schedule, and the machine to themselves: a cell's seconds are those of the sweep, of
two workers with a core each, by its runs. Prints a Markdown table, and which share of the rate of plain matrix products
of its shapes a step of the sweep reaches.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev

import torch

from harness.content.assets import cache_dir, verified_asset_dir
from harness.data.sources import read_column
from harness.measure.environment import environment
from harness.results.schema import RunResult, read_result

LEARNING_RATE = 2e-3
MAX_LENGTH = 64


def write_rows(folder: Path, *, num_rows: int) -> None:
    """`train.csv` of so many rows, `val.csv` and `test.csv` of a quarter of them; no text twice."""
    source = verified_asset_dir("reuters_r8", cache_dir())
    num_scored = num_rows // 4
    used: set[str] = set()
    for file, parts in (("train", {"train": num_rows, "val": num_scored}), ("test", {"test": num_scored})):
        path = source / f"reuters-r8-{file}.tab"
        rows = list(zip(read_column(path, "Text"), read_column(path, "Category"), strict=True))
        random.Random(0).shuffle(rows)
        left = iter(rows)
        for name, wanted in parts.items():
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as out:
                writer = csv.writer(out)
                writer.writerow(["text", "label"])
                for _ in range(wanted):
                    text, label = next(row for row in left if row[0] not in used)
                    used.add(text)
                    writer.writerow([text, label])


def sweep(data: Path, runs_dir: Path, *, num_runs: int) -> tuple[float, list[RunResult]]:
    """Seconds of a sweep of so many seeds, and its results by seed."""
    files = [f"dataset.{name}_file={data}/{name}.csv" for name in ("train", "val", "test")]
    recipe = ["trainer.num_epochs=1", "trainer.batch_size=8", f"trainer.learning_rate={LEARNING_RATE:g}"]
    command = [sys.executable, "-m", "harness", "-m", "sweep=cells", "model=minilm", "dataset=local", *files]
    command += [f"dataset.max_length={MAX_LENGTH}", "method=lora", "rank=r8", "target_layers=qv", *recipe]
    command += [f"seed={','.join(map(str, range(num_runs)))}", "tracking=off", f"runs_dir={runs_dir}"]
    started = time.perf_counter()
    subprocess.run([*command, "hydra.launcher.workers=2"], check=True, stdout=sys.stderr)
    seconds = time.perf_counter() - started
    results = [read_result(path) for path in runs_dir.glob("*/result.json")]
    return seconds, sorted(results, key=lambda result: result.config["seed"])


def script(data: Path, folder: Path, *, seed: int, tuned: bool) -> tuple[float, float]:
    """Seconds of the script, and its accuracy on test."""
    model = verified_asset_dir("minilm", cache_dir())
    command = [sys.executable, str(Path(__file__).with_name("trainer_script.py")), f"--model={model}", f"--data={data}"]
    command += [f"--to={folder}", f"--seed={seed}", f"--learning-rate={LEARNING_RATE}", f"--max-length={MAX_LENGTH}"]
    started = time.perf_counter()
    done = subprocess.run([*command, *(["--tuned"] if tuned else [])], check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - started, json.loads(done.stdout.splitlines()[-1])["test"]


def product_rate(num_rows: int) -> float:
    """Multiply-adds, twice, per second of one thread in products of this model's shapes."""
    torch.set_num_threads(1)
    flops, seconds = 0.0, 0.0
    for wide, narrow in ((384, 384), (384, 1536), (1536, 384)):
        x, weight = torch.randn(num_rows, wide), torch.randn(wide, narrow)
        laps = []
        for _ in range(200):
            started = time.perf_counter()
            x @ weight
            laps.append(time.perf_counter() - started)
        flops += 2 * num_rows * wide * narrow
        seconds += median(laps)
    return flops / seconds


def row(name: str, seconds: float, of_ours: float, scores: Sequence[float]) -> str:
    """A line of the table."""
    spread = f" ± {stdev(scores):.4f}" if len(scores) > 1 else ""
    return f"| {name} | {seconds:.1f} | {seconds / of_ours:.2f} | {mean(scores):.4f}{spread} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rows", type=int, default=2000)
    parser.add_argument("--num-runs", type=int, default=8, help="of the sweep")
    parser.add_argument("--seeds", type=int, default=3, help="of the scripts, and of the accuracies")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder, num_rows=options.num_rows)
        seconds, runs = sweep(folder, folder / "runs", num_runs=options.num_runs)
        made = {
            tuned: [script(folder, folder / f"{seed}-{tuned}", seed=seed, tuned=tuned) for seed in range(options.seeds)]
            for tuned in (False, True)
        }
    ours = seconds / len(runs)
    print(f"{datetime.date.today()}, {environment(torch.device('cpu'))}\n")
    print("| a cell of | seconds | times as long | test accuracy |\n|---|---|---|---|")
    print(row(f"a sweep of {len(runs)}", ours, ours, [run.metrics["test_accuracy"] for run in runs[: options.seeds]]))
    for tuned, name in ((False, "a script with Trainer and peft"), (True, "the same without dropout, by length")):
        print(row(name, median(one for one, _ in made[tuned]), ours, [score for _, score in made[tuned]]))
    rates = [run.metrics["train_flops"] / run.metrics["train_seconds"] for run in runs]
    plain = product_rate(8 * MAX_LENGTH)
    print(
        f"\nsteps: {median(rates) / 1e9:.0f} GFLOP/s a run of one thread, plain products {plain / 1e9:.0f}: "
        f"{median(rates) / plain:.2f} of it"
    )


if __name__ == "__main__":
    main()
