"""`python -m analysis report --sweep demo`: from the runs in a folder to tables and pages; and what a run will cost."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from analysis import budget, latency
from analysis.archive import opened, write_archive
from analysis.load import LoadError, load_runs
from analysis.metrics import STYLES
from analysis.status import print_status
from harness.extensions import ExtensionError, load_extensions


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m analysis") -> int:
    """Runs one command and returns its exit code: its own, or 2 when there is nothing to report on or to write to."""
    options = _parser(program).parse_args(arguments)
    try:
        load_extensions()
        code: int | None = options.command(options)
    except (LoadError, ExtensionError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return code or 0


def _parser(program: str = "python -m analysis") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description="Tables and pages from finished runs.")
    commands = parser.add_subparsers(required=True, metavar="command")

    report = commands.add_parser("report", help="tables, figures and a page of a sweep")
    report.add_argument("--sweep", metavar="NAME", help="name of the sweep; without it, all runs in one table")
    _add_runs_dir(report)
    report.add_argument("--reports-dir", type=Path, default=Path("reports"), metavar="DIR", help="default: %(default)s")
    report.add_argument(
        "--scores",
        choices=("best", "last"),
        default="best",
        help="of the step that was best on val, or of the last step; default: %(default)s",
    )
    report.add_argument(
        "--rows",
        type=_names,
        default=(),
        metavar="AXES",
        help="a table of your own: its rows, as method,rank; with --columns and --value",
    )
    report.add_argument(
        "--columns",
        type=_names,
        default=(),
        metavar="AXES",
        help="its columns, as epochs; without --rows the columns of one wide table, axes and metrics",
    )
    report.add_argument(
        "--value",
        type=_names,
        default=(),
        metavar="METRICS",
        help="what stands in it, as test_accuracy or peak_memory_bytes/full; default: the score on test",
    )
    report.add_argument(
        "--style",
        choices=STYLES,
        default="report",
        help="paper: scores times 100 with one decimal, and small deviations; default: %(default)s",
    )
    report.add_argument("--published", action="store_true", help="show what papers print underneath, marked as quoted")
    report.add_argument(
        "--margin",
        type=_margin,
        default=0.005,
        metavar="FRACTION",
        help="a difference within this part of a metric's scale does not matter; default: %(default)s, half a point",
    )
    report.add_argument(
        "--wandb", choices=("offline", "online"), help="also make a W&B run of job type report that carries all of it"
    )
    report.add_argument(
        "--adapters",
        action="store_true",
        help="with what the weights of its runs hold: spectra, subspaces, intruders, drift; needs torch",
    )
    report.set_defaults(command=_report)

    adapters = commands.add_parser("adapters", help="what runs have learned, from the weights that they saved")
    adapters.add_argument("--sweep", metavar="NAME", help="name of the sweep; without it, all runs in the folder")
    _add_runs_dir(adapters, reads_weights=True)
    adapters.add_argument(
        "--reports-dir", type=Path, default=Path("reports"), metavar="DIR", help="default: %(default)s"
    )
    adapters.add_argument(
        "--truncation",
        action="store_true",
        help="also score the base plus full fine-tuning's difference cut to ranks; an evaluation for each run and rank",
    )
    adapters.add_argument(
        "--intruders",
        action="store_true",
        help="also score runs with less of their intruder dimensions; seven evaluations for each run that has any",
    )
    adapters.add_argument(
        "--epsilon",
        type=_cosine,
        default=0.5,
        metavar="COSINE",
        help="below which a dimension is an intruder, for --intruders; default: %(default)s",
    )
    adapters.add_argument(
        "--gradients",
        type=_examples,
        nargs="?",
        const=128,
        default=0,
        metavar="EXAMPLES",
        help="also the gradient of each matrix before training, over so many training examples (128), beside the "
        "scores of placements; a backward pass for each seed",
    )
    adapters.set_defaults(command=_adapters)

    suggest = commands.add_parser(
        "suggest", help="a sweep file that tests the ranks and placements which a sweep's weights suggest"
    )
    suggest.add_argument("--sweep", metavar="NAME", required=True, help="name of the sweep whose weights are read")
    _add_runs_dir(suggest, reads_weights=True)
    suggest.add_argument("--to", type=Path, metavar="FILE", help="default: sweeps/NAME_suggested.yaml")
    suggest.add_argument("--seeds", type=int, default=3, metavar="N", help="of each cell; default: %(default)s")
    suggest.set_defaults(command=_suggest)

    status = commands.add_parser("status", help="how far a sweep is, also while it runs")
    status.add_argument("--sweep", metavar="NAME", help="name of the sweep; without it, all runs in the folder")
    _add_runs_dir(status)
    status.set_defaults(command=_status)

    archive = commands.add_parser("archive", help="results and curves of a sweep in one small file, without weights")
    archive.add_argument("--sweep", required=True, metavar="NAME", help="name of the sweep")
    _add_runs_dir(archive)
    archive.add_argument("--to", required=True, type=Path, metavar="FILE", help="the file, as results/demo.tar.xz")
    archive.add_argument("--predictions", action="store_true", help="with predictions by row, for tests paired by row")
    archive.set_defaults(command=_archive)

    of_a_run = commands.add_parser("budget", help="what a run costs before it starts: parameters, bytes, hours")
    budget.add_arguments(of_a_run)
    of_a_run.set_defaults(command=budget.print_budget)

    of_passes = commands.add_parser("latency", help="the time of a pass: base model, adapter merged and unmerged")
    latency.add_arguments(of_passes)
    of_passes.set_defaults(command=latency.print_latency)
    return parser


def _add_runs_dir(command: argparse.ArgumentParser, *, reads_weights: bool = False) -> None:
    command.add_argument(
        "--runs-dir",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help=f"the folder{'' if reads_weights else ', or an archive of it'}; default: %(default)s",
    )


def _require_weights(runs_dir: Path) -> None:
    if runs_dir.is_file():
        raise LoadError(
            f"--runs-dir {runs_dir}: weights are read, and an archive has none; name the folder of its runs."
        )


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}: must be names with commas between them, as method,rank")
    return names


def _margin(text: str) -> float:
    try:
        margin = float(text)
    except ValueError:
        margin = 0.0
    if not 0 < margin < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a fraction between 0 and 1, as 0.005")
    return margin


def _examples(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of training examples, as 128")
    return int(text)


def _cosine(text: str) -> float:
    try:
        cosine = float(text)
    except ValueError:
        cosine = 0.0
    if not 0 < cosine <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a cosine above 0 and at most 1, as 0.5")
    return cosine


@contextmanager
def _without_collections() -> Iterator[None]:
    """Inside, nothing looks for garbage: thousands of runs are millions of objects, and hardly any becomes garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _report(options: argparse.Namespace) -> None:
    # Imported late: the status comes without waiting for what draws figures.
    from analysis.report import write_report
    from analysis.tables.asked import Asked

    if options.adapters:
        _require_weights(options.runs_dir)
    # With adapters models come and go, which are large and in cycles.
    with opened(options.runs_dir) as runs_dir, nullcontext() if options.adapters else _without_collections():
        report_dir = write_report(
            runs_dir,
            options.reports_dir,
            options.sweep,
            scores=options.scores,
            published=options.published,
            margin=options.margin,
            asked=Asked(options.rows, options.columns, options.value),
            style=options.style,
            adapters=options.adapters,
        )
        if options.wandb is not None:
            # Imported late: a report needs neither W&B nor the rest of the harness.
            from harness.config.schema import TrackingConfig, WandbMode
            from harness.tracking.mirror import TrackingError
            from harness.tracking.wandb_mirror import log_report

            frame = load_runs(runs_dir, sweep=options.sweep).frame
            project, entity = (frame.get(f"config.tracking.{name}", [None])[0] for name in ("project", "entity"))
            try:
                log_report(
                    report_dir,
                    sweep=report_dir.name,
                    mode=WandbMode(options.wandb),
                    project=project or TrackingConfig().project,
                    entity=entity,
                )
            except TrackingError as error:
                raise SystemExit(str(error)) from error
            print(f"W&B files: {report_dir}/wandb/")


def _adapters(options: argparse.Namespace) -> None:
    from analysis.report import write_adapter_report

    _require_weights(options.runs_dir)
    write_adapter_report(
        options.runs_dir,
        options.reports_dir,
        options.sweep,
        truncation=options.truncation,
        intruders=options.intruders,
        epsilon=options.epsilon,
        gradients=options.gradients,
        progress=lambda text: print(text, file=sys.stderr, flush=True),
    )


def _suggest(options: argparse.Namespace) -> None:
    from analysis.adapters.suggesting import command_of, suggest

    _require_weights(options.runs_dir)
    path, suggestion = suggest(options.runs_dir, options.sweep, to=options.to, num_seeds=options.seeds)
    for one in suggestion.hypotheses:
        ranks = ", ".join(f"{role} {rank}" for role, rank in one.proposal.pattern.items())
        print(
            f"{one.name}: rank {one.proposal.rank}{f' ({ranks})' if ranks else ''} on {one.proposal.target_layers}, "
            f"{one.num_params:,} adapter parameters (parent {one.parent_num_params:,}): {one.claim}"
        )
    print(f"written to {path}; run it: {command_of(path, options.runs_dir)}")


def _status(options: argparse.Namespace) -> None:
    with opened(options.runs_dir) as runs_dir:
        print_status(runs_dir, options.sweep)


def _archive(options: argparse.Namespace) -> None:
    with opened(options.runs_dir) as runs_dir:
        num_runs = write_archive(runs_dir, options.sweep, options.to, predictions=options.predictions)
    print(f"{options.to}: {num_runs} runs, {options.to.stat().st_size / 1024:,.0f} KiB")


if __name__ == "__main__":
    sys.exit(main())
