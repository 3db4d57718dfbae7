"""One folder per sweep: the page, its tables, and every run as CSV.

    reports_dir/<sweep>/report.md  runs.csv  tables/tradeoff.md  tables/tradeoff.csv

Writing it again from the same runs gives the same bytes.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from analysis import tables
from analysis.load import Runs, load_runs
from harness.results import METRICS, Status

# The name of the report about every run in a folder.
ALL_RUNS = "all"


def write_report(
    runs_dir: Path, reports_dir: Path, sweep: str | None = None, *, console: Console | None = None
) -> Path:
    """Writes the report of a sweep, or of all runs in the folder, prints its table, and returns its folder.

    Raises:
        LoadError: there are no such runs.
    """
    runs = load_runs(runs_dir, sweep=sweep)
    table = tables.tradeoff_table(runs.frame)
    text = tables.as_text(table)
    notes = tables.tradeoff_notes(runs.frame, table)
    summary = list(_summary(runs))

    tradeoff = tables.to_markdown(text) + "\n" + _as_list(notes)
    report_dir = reports_dir / (sweep or ALL_RUNS)
    _write(report_dir / "tables" / "tradeoff.csv", tables.to_csv(table))
    # Alone, the table needs the sentences that the page has at its head.
    _write(report_dir / "tables" / "tradeoff.md", tradeoff + _as_list(summary))
    _write(report_dir / "runs.csv", tables.to_csv(_without_empty_metrics(runs.frame)))
    _write(report_dir / "report.md", _page(sweep or ALL_RUNS, summary, tradeoff, runs.frame))

    # In a file or a pipe nothing has to fold: wide enough for the table in one piece.
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(Text(f"\n{sweep or ALL_RUNS}", style="bold"))
    for line in summary:
        console.print(Text(line))
    for block in tables.to_rich(text, width=console.width):
        console.print()
        console.print(block)
    console.print()
    for note in notes:
        # Indented, so that a folded note does not look like two.
        console.print(Padding(Text(note), (0, 0, 0, 2)))
    console.print(Text(f"\nwritten to {report_dir}/: report.md runs.csv tables/tradeoff.md tables/tradeoff.csv"))
    return report_dir


def _page(name: str, summary: Sequence[str], tradeoff: str, frame: pd.DataFrame) -> str:
    return (
        f"# {name}\n\n{_as_list(summary)}\n"
        f"## Cost and quality\n\n{tradeoff}\n"
        f"## Environment\n\n{_as_list(list(_environment(frame)))}\n"
        "## Files\n\n"
        "- `runs.csv`: every run with its whole config, metrics and environment, in the stored units\n"
        "- `tables/tradeoff.csv`: the numbers of the table above, unrounded, in the stored units\n"
        "- `tables/tradeoff.md`: the table above\n"
    )


def _summary(runs: Runs) -> Iterator[str]:
    statuses = runs.frame["status"].value_counts()
    counts = [f"{statuses[status.value]} {status}" for status in Status if status.value in statuses]
    num_runs = len(runs.frame) + len(runs.unreadable) + len(runs.to_do or ())
    if runs.unreadable:
        counts.append(f"{len(runs.unreadable)} unreadable")
    if runs.to_do is not None:
        counts.append(f"{len(runs.to_do)} to do")
    if runs.command is not None:
        yield f"Command: {tables.as_code(runs.command)}" + (f", {runs.created}" if runs.created else "")
    yield f"Runs: {num_runs} ({', '.join(counts)})."
    if runs.sweep is not None and runs.to_do is None:
        yield "What is still to do is not known: no sweep file lists the runs of this sweep."
    if runs.to_do:
        yield f"To do: {', '.join(map(tables.as_code, runs.to_do))}."
    yield f"Selection: {tables.selection_rule(runs.frame)}."
    for problem in runs.problems:
        yield f"Left out: {tables.as_code(problem)}"


def _environment(frame: pd.DataFrame) -> Iterator[str]:
    """Every fact about the environment, and for how many runs it held where they differ."""
    facts = frame[[column for column in frame.columns if column.startswith("environment.")]]
    recorded = facts.dropna(how="all")
    if len(recorded) < len(facts):
        yield f"recorded by {len(recorded)} of {len(facts)} runs"
    for column in recorded.columns:
        counts = Counter("unknown" if value is None else tables.show_value(value) for value in recorded[column])
        values = [tables.as_code(value) + (f" (n={n})" if len(counts) > 1 else "") for value, n in counts.items()]
        yield f"{column.removeprefix('environment.')}: {', '.join(values)}"


def _without_empty_metrics(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns=[name for name in METRICS if frame[name].isna().all()])


def _as_list(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def _write(path: Path, text: str) -> None:
    """Writes so that a reader sees either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8", newline="")
    partial.replace(path)
