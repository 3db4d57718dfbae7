"""`python -m analysis report --sweep demo`: from the runs in a folder to tables and pages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.load import LoadError
from analysis.report import write_report
from analysis.status import print_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 2 when there is nothing to report on or nowhere to write."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except LoadError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m analysis", description="Tables and pages from finished runs.")
    commands = parser.add_subparsers(required=True, metavar="command")

    report = commands.add_parser("report", help="one table of a sweep, as a page, Markdown and CSV")
    report.add_argument("--sweep", metavar="NAME", help="name of the sweep; without it, all runs in one table")
    report.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: %(default)s")
    report.add_argument("--reports-dir", type=Path, default=Path("reports"), metavar="DIR", help="default: %(default)s")
    report.set_defaults(command=_report)

    status = commands.add_parser("status", help="how far a sweep is, also while it runs")
    status.add_argument("--sweep", metavar="NAME", help="name of the sweep; without it, all runs in the folder")
    status.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: %(default)s")
    status.set_defaults(command=_status)
    return parser


def _report(options: argparse.Namespace) -> None:
    write_report(options.runs_dir, options.reports_dir, options.sweep)


def _status(options: argparse.Namespace) -> None:
    print_status(options.runs_dir, options.sweep)


if __name__ == "__main__":
    sys.exit(main())
