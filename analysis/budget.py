"""`python -m analysis budget rank=r8 target_layers=qv`: what a run costs before it starts.

The overrides are those of `python -m harness`. What is printed is worked out by `harness.forecast`, from the model's
configuration alone: no weights are read. Exit codes: 0 it fits, 1 it does not, 2 nothing can be said.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.load import LoadError, load_runs
from analysis.papers import PaperError, PrintedCount
from harness.results.metrics import bytes_text
from harness.results.schema import Status

if TYPE_CHECKING:
    from harness.config.schema import RunConfig
    from harness.forecast.compute import ComputeForecast
    from harness.forecast.fitting import LargestBatch
    from harness.forecast.parameters import RunSize, Solution
    from harness.tasks.families import TaskData

FITS, DOES_NOT_FIT, CANNOT_SAY = 0, 1, 2
MISSING = "\N{EN DASH}"

# The rank of a run whose rank is to be solved: its policy of alpha.
_RANK_TO_SOLVE = "rank=r8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line may say."""
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of one run, as for python -m harness")
    parser.add_argument("--config-dir", metavar="DIR", help="own configs, as for python -m harness")
    parser.add_argument(
        "--parameters",
        type=parameters,
        metavar="N",
        help="solve the rank: the largest whose adapter has at most N parameters, as 300000, 300K or 4.7M",
    )
    parser.add_argument(
        "--per-role",
        action="store_true",
        help="with --parameters: some roles one rank higher, so that less is left over (rank.pattern)",
    )
    parser.add_argument(
        "--placements",
        type=lambda text: tuple(text.split(",")),
        metavar="NAMES",
        help="a table over placements, as q,qv,all; ALL for every preset of target_layers",
    )
    parser.add_argument(
        "--memory", action="store_true", help="predict the peak bytes of a training step and of scoring"
    )
    parser.add_argument(
        "--data", action="store_true", help="with --memory and --compute: of the data's own steps, and not of full ones"
    )
    parser.add_argument(
        "--compute", action="store_true", help="the floating-point operations of training, as runs record them"
    )
    parser.add_argument(
        "--rate", type=_rate, metavar="FLOPS", help="operations a second: with --compute the hours of training; as 2e12"
    )
    parser.add_argument(
        "--rate-of", metavar="NAME", help="the rate that the finished runs of a sweep, or a run by its id, had"
    )
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="for --rate-of; default: %(default)s"
    )
    parser.add_argument(
        "--pack", type=_pack, default=1, metavar="K", help="with --memory and --gpu: of K such runs that train together"
    )
    parser.add_argument("--gpu", type=float, metavar="GB", help="whether it fits; exit code 0 it does, 1 it does not")
    parser.add_argument(
        "--headroom",
        type=float,
        metavar="FRACTION",
        help="the part of a GPU that is left to its context and allocator; default: 0.1",
    )
    parser.add_argument("--largest-batch", action="store_true", help="with --gpu: the largest micro-batch that fits")
    parser.add_argument(
        "--audit", type=Path, metavar="FILE", help="a paper's printed parameter counts, from a YAML file; no overrides"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="with --audit: where it is written as CSV")
    parser.add_argument("--labels", type=_num_outputs, metavar="N", help="outputs of a task head; default: 2")


def parameters(text: str) -> int:
    """A number of parameters.

    >>> parameters("300000"), parameters("4.7M"), parameters("18_874_368")
    (300000, 4700000, 18874368)
    """
    try:
        return PrintedCount.parse(text).value
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: must be floating-point operations a second, as 2e12")
    return rate


def _num_outputs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of outputs, as 2")
    return int(text)


def _pack(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of runs, as 8 (hydra.launcher.pack)")
    return int(text)


@dataclass(frozen=True)
class Rate:
    """Floating-point operations a second of training, and where that is known from."""

    flops_per_second: float
    origin: str


def measured_rate(runs_dir: Path, name: str) -> Rate:
    """The median rate of the finished runs of a sweep, or of one run: `train_flops` over `train_seconds`.

    Raises `LoadError` where no run recorded both, or where they ran on different devices.
    """
    every = load_runs(runs_dir).frame
    runs = every[every["run_id"] == name]
    if runs.empty:
        runs = load_runs(runs_dir, sweep=name).frame
    if not {"train_flops", "train_seconds"} <= set(runs.columns):
        runs = runs.iloc[:0]
    else:
        runs = runs[(runs["status"] == Status.FINISHED.value) & runs["train_flops"].notna()]
    if runs.empty:
        raise LoadError(
            f"--rate-of {name}: none of its runs has finished with train_flops and train_seconds; name another sweep "
            "or run of --runs-dir, or give a rate, as --rate 2e12."
        )
    devices = sorted({_device(row) for row in runs.to_dict("records")})
    if len(devices) > 1:
        raise LoadError(f"--rate-of {name}: its runs were made on {' and on '.join(devices)}; name one run of them.")
    rates = sorted((runs["train_flops"] / runs["train_seconds"]).astype(float))
    between = f", {rates[0]:.3g} to {rates[-1]:.3g}" if len(rates) > 1 else ""
    return Rate(statistics.median(rates), f"median of {len(rates)} finished runs of {name} on {devices[0]}{between}")


def _device(run: Mapping[Hashable, object]) -> str:
    names = (f"environment.{name}" for name in ("device_name", "device_type"))
    return next((str(run[name]) for name in names if isinstance(run.get(name), str)), "an unnamed device")


def _asked_rate(options: argparse.Namespace) -> Rate | None:
    from harness.forecast.request import ForecastError

    if options.rate is not None and options.rate_of is not None:
        raise ForecastError(f"--rate {options.rate:g} --rate-of {options.rate_of}: give one of them.")
    if options.rate_of is not None:
        return measured_rate(options.runs_dir, options.rate_of)
    return None if options.rate is None else Rate(options.rate, "as given")


def print_budget(options: argparse.Namespace, *, console: Console | None = None) -> int:
    """Prints what was asked for and returns the exit code."""
    # Imported late: the other commands come without waiting for torch.
    from harness.forecast.request import ForecastError, UnmetError, own_configs

    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    try:
        with own_configs(options.config_dir):
            return _print(options, console) if options.audit is None else _print_audit(options)
    except (ForecastError, PaperError) as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return DOES_NOT_FIT if isinstance(error, UnmetError) else CANNOT_SAY


def _print_audit(options: argparse.Namespace) -> int:
    from analysis.audit import print_audit
    from harness.forecast.request import ForecastError

    if options.overrides:
        raise ForecastError(f"--audit {options.audit}: takes no overrides; leave out {' '.join(options.overrides)}.")
    others = [given for given in _given(options) if given.split()[0] not in ("--audit", "--csv")]
    if others:
        raise ForecastError(f"--audit {options.audit}: is of parameter counts alone; leave out {' '.join(others)}.")
    return print_audit(options.audit, options.csv)


def _given(options: argparse.Namespace) -> list[str]:
    """The options that were given, as they are typed."""
    typed = {
        "--parameters": options.parameters,
        "--per-role": options.per_role,
        "--placements": None if options.placements is None else ",".join(options.placements),
        "--memory": options.memory,
        "--data": options.data,
        "--compute": options.compute,
        "--rate": options.rate,
        "--rate-of": options.rate_of,
        "--pack": None if options.pack == 1 else options.pack,
        "--gpu": None if options.gpu is None else f"{options.gpu:g}",
        "--headroom": None if options.headroom is None else f"{options.headroom:g}",
        "--largest-batch": options.largest_batch,
        "--labels": options.labels,
        "--audit": options.audit,
        "--csv": options.csv,
    }
    return [
        name if value is True else f"{name} {value}"
        for name, value in typed.items()
        if value is not None and value is not False
    ]


# What each option is of, at least one of which has to be given with it.
_NEEDS = {
    "--csv": ("--audit",),
    "--per-role": ("--parameters",),
    "--data": ("--memory", "--gpu", "--compute", "--rate", "--rate-of"),
    "--pack": ("--memory", "--gpu"),
    "--headroom": ("--gpu",),
    "--largest-batch": ("--gpu",),
}
_NOT_OF_PLACEMENTS = ("--memory", "--gpu", "--pack", "--largest-batch")


def _require_used(options: argparse.Namespace) -> None:
    """Raises `ForecastError` for an option that would say nothing."""
    from harness.forecast.request import ForecastError

    given = {text.split()[0]: text for text in _given(options)}
    for name, needed in _NEEDS.items():
        if name in given and not set(needed) & set(given):
            raise ForecastError(
                f"{given[name]}: is of {' or '.join(needed)}, not given here; add it, or leave this out."
            )
    unused = [given[name] for name in _NOT_OF_PLACEMENTS if name in given]
    if "--placements" in given and unused:
        raise ForecastError(
            f"{given['--placements']}: a table over placements has counts and operations, and no memory; leave out "
            f"{' '.join(unused)}, or ask for one placement, as target_layers=qv."
        )
    if options.gpu is not None and not (0 < options.gpu < float("inf") and 0 <= (options.headroom or 0) < 1):
        shown = " ".join(given[name] for name in ("--gpu", "--headroom") if name in given)
        raise ForecastError(
            f"{shown}: a GPU has more than 0 GB, and a headroom is a part of it from 0 to below 1, as 0.1."
        )
    if options.largest_batch and options.data:
        raise ForecastError("--largest-batch: is of full batches; leave out --data.")


def _print(options: argparse.Namespace, console: Console) -> int:
    from harness.forecast.request import names, read_config, without

    _require_used(options)
    overrides = list(options.overrides)
    solved: Solution | None = None
    if options.parameters is not None:
        overrides = without(overrides, "rank.rank", "rank.pattern")
        if not names(overrides, "rank"):
            overrides.append(_RANK_TO_SOLVE)
    if options.placements is not None:
        return _print_placements(options, overrides, console)
    config = read_config(overrides)
    # Only now, as for a run: what is wrong in the overrides is said without waiting for torch.
    from harness.forecast.memory import load_run_data
    from harness.forecast.parameters import size_of, solve_rank

    if options.parameters is not None:
        solved = solve_rank(
            config, options.parameters, per_role=options.per_role, num_labels=_num_labels(options, config, None)
        )
        overrides += solved.overrides
        config = read_config(overrides)
    data = load_run_data(config) if options.data else None
    num_labels = _num_labels(options, config, data)
    _print_size(size_of(config, num_labels=num_labels), console)
    _print_compute(options, config, data, num_labels, console)
    if solved is not None:
        _print_solution(solved, overrides, console)
    if options.memory or options.gpu is not None:
        return _print_memory(options, config, data, num_labels, console)
    return FITS


def _num_labels(options: argparse.Namespace, config: RunConfig, data: TaskData | None) -> int:
    """Outputs of a head: as asked for, or of the data that were read. Raises `OptionError` where both differ."""
    from harness.forecast.request import OptionError, of_its_task

    asked = of_its_task(config, "--labels", options.labels, 2, of_language=False)
    if data is None or data.num_labels is None:
        return asked
    if options.labels not in (None, data.num_labels):
        raise OptionError(f"--labels {options.labels}: the data has {data.num_labels}; leave it out, or --data.")
    return data.num_labels


def _print_compute(
    options: argparse.Namespace, config: RunConfig, data: TaskData | None, num_labels: int, console: Console
) -> None:
    from harness.forecast.compute import predict_flops

    rate = _asked_rate(options)
    if not options.compute and rate is None:
        return
    compute = predict_flops(config, num_labels=num_labels, data=data)
    table = _rows()
    longest = "largest" if compute.is_exact else "full"
    table.add_row(f"operations of a {longest} step", _flops_text(compute.step_flops))
    if compute.num_steps is None or compute.run_flops is None:
        table.add_row(
            "steps", "known from the data alone; add --data, or set trainer.max_steps (trainer.num_epochs=null)"
        )
    else:
        table.add_row("steps", f"{compute.num_steps:,}")
        words = "operations of the run" if compute.is_exact else "operations of the run, at most"
        table.add_row(words, _flops_text(compute.run_flops))
    if rate is not None:
        table.add_row("rate", f"{rate.flops_per_second:.3g} operations a second, {rate.origin}")
        table.add_row("hours of training", _hours_text(compute, rate))
    console.print(table)


def _flops_text(flops: int) -> str:
    return f"{flops:,} ({flops / 1e12:,.3g} TFLOP)"


def _hours_text(compute: ComputeForecast, rate: Rate) -> str:
    hours = compute.hours(rate.flops_per_second)
    return MISSING if hours is None else f"{hours:.3g}"


def _print_memory(
    options: argparse.Namespace, config: RunConfig, data: TaskData | None, num_labels: int, console: Console
) -> int:
    from harness.forecast.fitting import GPU, allocated_bytes, largest_micro_batch
    from harness.forecast.memory import predict_pack_memory

    on_gpu = True if options.gpu is not None else None
    predict = partial(predict_pack_memory, num_runs=options.pack, num_labels=num_labels, on_gpu=on_gpu)
    forecast = predict(config, data=data)
    table = Table(box=None, pad_edge=False)
    table.add_column("bytes at the peak")
    step = "of a training step" if options.pack == 1 else f"of a step of {options.pack} runs"
    for name in (step, "of scoring"):
        table.add_column(name, justify="right")
    of_step, of_scoring = forecast.step.as_metrics(), forecast.scoring.as_metrics()
    rows = {name.removesuffix("_bytes").replace("_", " "): (of_step[name], of_scoring[name]) for name in of_step}
    if options.gpu is not None:
        peaks = (forecast.step.total_bytes, forecast.scoring.total_bytes)
        rows["allocated on a GPU, about"] = (allocated_bytes(peaks[0]), allocated_bytes(peaks[1]))
    for words, values in rows.items():
        table.add_row(words, *(f"{each:,} ({bytes_text(each)})" for each in values))
    console.print(table)
    if options.gpu is None:
        return FITS
    gpu = GPU(options.gpu) if options.headroom is None else GPU(options.gpu, options.headroom)
    fits = gpu.fits(forecast)
    console.print(
        Text(
            f"{'fits' if fits else 'does not fit'} into a GPU of {options.gpu:g} GB: {forecast.peak_bytes:,} bytes, "
            f"and {gpu.usable_bytes:,} of it are for tensors"
        )
    )
    if options.largest_batch:
        found = largest_micro_batch(config, gpu, at_most=4096, predict=predict)
        console.print(Text(f"largest micro-batch: {_largest_text(found, config)}"))
        if forecast.scoring.total_bytes > gpu.usable_bytes:
            console.print(Text(f"scoring does not fit; lower trainer.eval_batch_size={config.trainer.eval_batch_size}"))
    return FITS if fits else DOES_NOT_FIT


def _largest_text(found: LargestBatch, config: RunConfig) -> str:
    """How many examples fit, and the setting by which the run's batches consist of no more."""
    size, batch_size = found.micro_batch_size, config.trainer.batch_size
    if size is None:
        return "none; not one example fits"
    if size > batch_size:
        return f"{size} examples; as one batch trainer.batch_size={size}, of this run's {batch_size} all"
    divisor = max(number for number in range(1, size + 1) if batch_size % number == 0)
    return f"{size} examples; of this run's {batch_size} trainer.micro_batch_size={divisor}"


def _print_size(size: RunSize, console: Console) -> None:
    counts = size.counts
    table = _rows()
    table.add_row("adapter parameters", f"{counts.num_adapter_params:,}")
    table.add_row("head parameters", f"{counts.num_head_params:,}")
    table.add_row("trainable parameters", f"{counts.num_trainable_params:,}")
    table.add_row("all parameters", f"{counts.num_total_params:,}")
    table.add_row("saved tensors", bytes_text(size.saved_bytes))
    if size.placement:
        table.add_row("adapters", _placement(size))
    console.print(table)


def _placement(size: RunSize) -> str:
    return ", ".join(
        f"{each['num_targets']} {role}" + (f" (rank {', '.join(map(str, each['ranks']))})" if "ranks" in each else "")
        for role, each in size.placement.items()
    )


def _print_solution(solved: Solution, overrides: Sequence[str], console: Console) -> None:
    table = _rows()
    table.add_row("budget", f"{solved.budget:,}")
    table.add_row("left over", f"{solved.residual:,} ({solved.residual / solved.budget:.2%})")
    if solved.next_above is not None:
        table.add_row("one rank more", f"{solved.next_above:,} parameters")
    table.add_row("ranks", " ".join(solved.overrides))
    console.print(table)
    console.print(Text(f"python -m harness {shlex.join(overrides)}"))


def _print_placements(options: argparse.Namespace, overrides: list[str], console: Console) -> int:
    """A row for each placement; one that the model has not, or whose budget is not met, says why."""
    from harness.forecast.compute import predict_flops
    from harness.forecast.memory import load_run_data
    from harness.forecast.parameters import size_of, solve_rank
    from harness.forecast.request import ForecastError, OptionError, placements, read_config, without

    wanted = placements() if options.placements == ("ALL",) else options.placements
    overrides = without(overrides, "target_layers")
    table = Table(box=None, pad_edge=False)
    table.add_column("target_layers")
    for column in ("rank", "adapter", "head", "all parameters", "saved"):
        table.add_column(column, justify="right")
    if options.parameters is not None:
        table.add_column("left over", justify="right")
    rate = _asked_rate(options)
    if options.compute or rate is not None:
        table.add_column("operations", justify="right")
    if rate is not None:
        table.add_column("hours", justify="right")
    notes: list[str] = []
    data = None
    num_rows = 0
    for name in wanted:
        # The placement first, so that target_layers.blocks=... of the overrides stays.
        own = [f"target_layers={name}", *overrides]
        try:
            config = read_config(own)
            solved: Solution | None = None
            if options.parameters is not None:
                solved = solve_rank(
                    config, options.parameters, per_role=options.per_role, num_labels=_num_labels(options, config, None)
                )
                config = read_config([*own, *solved.overrides])
            if options.data and data is None:  # the same at every placement
                data = load_run_data(config)
            num_labels = _num_labels(options, config, data)
            size = size_of(config, num_labels=num_labels)
            costs: list[str] = []
            if options.compute or rate is not None:
                compute = predict_flops(config, num_labels=num_labels, data=data)
                shown = compute.step_flops if compute.run_flops is None else compute.run_flops
                costs = [f"{shown:,}{' a step' if compute.run_flops is None else ''}"]
                costs += [_hours_text(compute, rate)] if rate is not None else []
        except OptionError:
            raise
        except ForecastError as error:
            notes.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        num_rows += 1
        counts = size.counts
        rank = "" if config.rank is None else " ".join([str(config.rank.rank), *_pattern(config.rank.pattern)])
        table.add_row(
            name,
            rank,
            f"{counts.num_adapter_params:,}",
            f"{counts.num_head_params:,}",
            f"{counts.num_total_params:,}",
            bytes_text(size.saved_bytes),
            *([f"{solved.residual:,}"] if solved is not None else []),
            *costs,
        )
    if num_rows:
        console.print(table)
    for note in notes:
        console.print(Text(f"not {note}"))
    return FITS if num_rows else CANNOT_SAY


def _pattern(pattern: dict[str, int] | None) -> list[str]:
    return [f"{role}:{rank}" for role, rank in (pattern or {}).items()]


def _rows() -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column()
    return table
