"""One folder per sweep: the page, its tables and figures in every format, and every run as CSV.

    reports_dir/<sweep>/report.html  report.md  runs.csv  tables/<name>.{md,tex,csv,html}  figures/<name>.{pdf,png}

The same runs give the same bytes.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from analysis import figures, select, tables
from analysis.code_spans import as_code
from analysis.comparisons import MARGIN
from analysis.forked import context_of_forks
from analysis.load import LoadError, Runs, load_curves, load_runs
from analysis.metrics import table_style
from analysis.page import PageTable, page
from analysis.recipes import show_value
from analysis.tables import notes, writers
from analysis.tables.asked import Asked
from analysis.tables.structure import PaperTable
from analysis.trials import searches_of
from harness.results.files import write_atomically
from harness.results.launches import Launch, SweepLaunches
from harness.results.metrics import METRICS
from harness.results.schema import Status

if TYPE_CHECKING:
    from analysis.adapters.findings import Findings

# The name of the report about every run in a folder.
ALL_RUNS = "all"


def write_report(
    runs_dir: Path,
    reports_dir: Path,
    sweep: str | None = None,
    *,
    scores: str = "best",
    published: bool = False,
    margin: float = MARGIN,
    asked: Asked | None = None,
    style: str = "report",
    adapters: bool = False,
    console: Console | None = None,
) -> Path:
    """Writes the report of a sweep, or of all runs in the folder, prints a table of it, and returns its folder.

    Args:
        runs_dir: where the runs lie.
        reports_dir: gets a folder named after the sweep.
        sweep: its name; None for all runs.
        scores: "best", the step chosen on val, or "last".
        published: whether quoted rows of papers stand under the measured ones.
        margin: how much of a metric's scale a difference may be and still not matter.
        asked: a table of the reader's own, before all others and printed in place of the first.
        style: how tables show scores, of `metrics.STYLES`.
        adapters: whether what is in the weights of the runs is measured, too.
        console: where the table is printed; standard output by default.

    Raises:
        LoadError: there are no such runs, the sweep's name is no name of a folder, or what was asked for is not there.
    """
    name = _report_name(sweep)
    if scores not in ("best", "last"):
        raise ValueError(f"scores={scores!r}: must be best or last")
    runs = load_runs(runs_dir, sweep=sweep)
    frame = select.at_last_step(runs.frame) if scores == "last" else runs.frame
    cells = select.cells(frame)
    searches = searches_of(runs.launches, runs.trials)
    report_dir = reports_dir / name
    curves = load_curves(runs_dir, runs.frame["run_id"])
    drawn = figures.paper_figures(cells, curves, searches=searches)
    in_weights: list[PaperTable] = []
    if adapters:
        _, in_weights, more = _in_weights(frame, cells, runs_dir)
        drawn = [*drawn, *more]
    write_others = _begin_figures(drawn, report_dir / "figures", num_runs=len(frame))
    with table_style(style):
        paper_tables = tables.paper_tables(
            frame,
            cells,
            scores=scores,
            published=published,
            margin=margin,
            asked=asked or Asked(),
            searches=searches,
            predictions_dir=runs_dir,
            sweep=sweep,
        )
        choices = tables.choices(select.best_cells(cells), margin=margin)
    paper_tables = [*paper_tables, *in_weights]
    summary = list(_summary(runs, scores))
    # In a file or a pipe nothing has to fold: wide enough for the table in one piece.
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    _print(name, summary, paper_tables[0], console)
    _write_tables(report_dir / "tables", paper_tables, name, summary, small_spread=style == "paper")
    _write(report_dir / "runs.csv", writers.to_csv(_without_empty_metrics(runs.frame)))
    _write(
        report_dir / "report.md",
        _markdown(
            name, [*(f"{one.verdict} {one.tests}" for one in choices), *summary], paper_tables, drawn, runs.frame
        ),
    )
    html = page(
        title=name,
        summary=summary,
        tables=[PageTable(one.name, one.caption, writers.to_html(one), one.notes) for one in paper_tables],
        cells=cells,
        frame=frame,
        curves=curves,
        environment=list(_environment(runs.frame)),
        failures=notes.failures(runs.frame),
        figures=_pngs(drawn, report_dir / "figures", write_others),
        choices=choices,
    )
    _write(report_dir / "report.html", html)
    console.print(Text(f"\nwritten to {report_dir}/: report.html report.md runs.csv tables/ figures/"))
    return report_dir


def write_adapter_report(
    runs_dir: Path,
    reports_dir: Path,
    sweep: str | None = None,
    *,
    truncation: bool = False,
    intruders: bool = False,
    epsilon: float = 0.5,
    gradients: int = 0,
    console: Console | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Path:
    """Writes what was found in the weights of a sweep's runs, `<sweep>/adapters/` of the reports; returns that folder.

    The runs are those that a report would show: of each condition at its best learning rate on val.

    Args:
        runs_dir: where the runs lie.
        reports_dir: gets a folder named after the sweep.
        sweep: its name; None for all runs.
        truncation: whether full fine-tuning's differences are cut to ranks and scored.
        intruders: whether runs are scored with less of their intruder dimensions.
        epsilon: of those intruders.
        gradients: of so many training examples the gradient before training; 0 for none.
        console: where what was found is printed; standard output by default.
        progress: gets a line for each run that was scored.

    Raises:
        LoadError: there are no such runs, or none whose weights can be read.
    """
    from analysis.adapters import scored_tables, scoring
    from analysis.adapters.gradients import find_gradients, gradient_figure, gradient_tables
    from analysis.adapters.kept_scores import KeptScores
    from analysis.adapters.summaries import named_frames

    name = _report_name(sweep)
    runs = load_runs(runs_dir, sweep=sweep)
    found, paper_tables, drawn = _in_weights(runs.frame, select.cells(runs.frame), runs_dir)
    summary = [*_summary(runs, "best"), f"Weights were read of {found.spectra['run_id'].nunique()} runs."]
    seeds, problems = _seeds(runs.frame), list[str]()
    frames = named_frames(found)
    report_dir = reports_dir / name / "adapters"
    kept = KeptScores(report_dir / "scores.jsonl")
    if truncation:
        scores = scoring.score_truncations(found.cells, seeds, runs_dir, problems, progress=progress, kept=kept)
        paper_tables.append(scored_tables.truncation_table(scores, found.cells, problems))
        drawn.append(scored_tables.truncation_figure(scores, found.cells))
    if intruders:
        scores = scoring.score_without_intruders(
            found.cells, seeds, runs_dir, problems, epsilon=epsilon, progress=progress, kept=kept
        )
        paper_tables.append(scored_tables.intruder_table(scores, found.cells, problems))
        drawn.append(scored_tables.intruder_figure(scores, found.cells))
    if gradients:
        before = find_gradients(found.cells, seeds, runs_dir, num_examples=gradients)
        problems += before.problems
        paper_tables += gradient_tables(before)
        drawn.append(gradient_figure(before))
        frames["gradients"] = before.frame
    _write_tables(report_dir / "tables", paper_tables, f"{name}-adapters", summary, small_spread=False)
    _remove_others(report_dir / "figures", figures.write_figures(drawn, report_dir / "figures"))
    for key, frame in frames.items():
        _write(report_dir / "data" / f"{key}.csv", writers.to_csv(frame))
    _remove_others(report_dir / "data", [report_dir / "data" / f"{key}.csv" for key in frames])
    _write(report_dir / "adapters.md", "\n".join(_markdown_parts(name, summary, paper_tables, drawn)))
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for line in dict.fromkeys([*summary, *found.problems, *problems]):
        console.print(Text(line))
    console.print(Text(f"\nwritten to {report_dir}/: adapters.md tables/ figures/ data/"))
    return report_dir


def _in_weights(
    frame: pd.DataFrame, cells: pd.DataFrame, runs_dir: Path
) -> tuple[Findings, list[PaperTable], list[figures.Figure]]:
    """What is in the weights of the runs of a report, with its tables and figures. Raises `LoadError`."""
    # Imported late: no other part of a report needs torch.
    from analysis.adapters.figures import adapter_figures
    from analysis.adapters.findings import find_in_weights
    from analysis.adapters.tables import adapter_tables

    found = find_in_weights(select.records(select.best_cells(cells)), _seeds(frame), runs_dir)
    return found, adapter_tables(found), adapter_figures(found)


def _seeds(frame: pd.DataFrame) -> dict[str, int]:
    return dict(zip(frame["run_id"], frame["config.seed"], strict=True))


def _print(name: str, summary: Sequence[str], table: PaperTable, console: Console) -> None:
    console.print(Text(f"\n{name}", style="bold"))
    for line in summary:
        console.print(Text(line))
    for block in writers.to_rich(table.text, width=console.width):
        console.print()
        console.print(block)
    console.print()
    for note in table.notes:
        # Indented, so that a folded note does not look like two.
        console.print(Padding(Text(note), (0, 0, 0, 2)))


def _report_name(sweep: str | None) -> str:
    """The folder of a report. Raises `LoadError` for a name that is none."""
    name = sweep or ALL_RUNS
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise LoadError(f"sweep={name!r}: must be letters, digits, _ - and dots, because a folder is named after it")
    return name


def _write_tables(
    directory: Path, paper_tables: Sequence[PaperTable], sweep: str, summary: Sequence[str], *, small_spread: bool
) -> None:
    written = []
    for table in paper_tables:
        contents = {
            # Alone, a table needs the sentences that the page has at its head.
            "md": f"{_in_markdown(table)}\n{_as_list(summary)}",
            "tex": writers.to_latex(table, label=f"{sweep}-{table.name}", small_spread=small_spread),
            "csv": writers.to_csv(table.numbers),
            "html": writers.to_html(table) + "\n",
        }
        for ending, text in contents.items():
            _write(directory / f"{table.name}.{ending}", text)
            written.append(directory / f"{table.name}.{ending}")
    _write(directory / "preview.tex", _preview(paper_tables))
    _remove_others(directory, [*written, directory / "preview.tex"])


def _preview(paper_tables: Sequence[PaperTable]) -> str:
    """A document that holds every table, to look at: `pdflatex preview.tex`."""
    inputs = "\n".join(f"\\input{{{table.name}}}\n\\clearpage" for table in paper_tables)
    return (
        "\\documentclass{article}\n\\usepackage[T1]{fontenc}\n\\usepackage{booktabs,graphicx,textcomp}\n"
        f"\\usepackage[margin=2cm]{{geometry}}\n\\begin{{document}}\n{inputs}\n\\end{{document}}\n"
    )


# From so many runs on drawing takes longer than a second process does.
_MANY_RUNS = 500


def _begin_figures(drawn: Sequence[figures.Figure], directory: Path, *, num_runs: int) -> Callable[[], list[Path]]:
    """Begins to write the figures, and gives what writes the others and waits for all of them.

    Of many runs a second process draws from here on, where the system can fork one, beside whatever this one does.
    """
    context = context_of_forks() if num_runs >= _MANY_RUNS else None
    if context is None:
        return partial(figures.write_figures, drawn, directory)
    # Each process takes the next figure, the largest first: some take a hundred times as long as others.
    drawn = sorted(drawn, key=lambda figure: -figure.inches)
    taken, written = context.Value("i", 0), context.Array("b", len(drawn))

    def write_some() -> None:
        while True:
            with taken.get_lock():
                number = taken.value
                taken.value += 1
            if number >= len(drawn):
                return
            figures.write_figures([drawn[number]], directory)
            written[number] = True

    # Forked, because what is drawn is here and nothing that could be sent.
    other = context.Process(target=write_some, daemon=True)
    other.start()

    def write_others() -> list[Path]:
        try:
            write_some()
        finally:
            other.join()
        if other.exitcode != 0:  # here its error is raised, or what it had no memory for is drawn
            figures.write_figures([figure for number, figure in enumerate(drawn) if not written[number]], directory)
        return [directory / f"{figure.name}.{suffix}" for figure in drawn for suffix in ("pdf", "png")]

    return write_others


def _pngs(
    drawn: Sequence[figures.Figure], directory: Path, write_others: Callable[[], list[Path]]
) -> Iterator[tuple[str, str, bytes]]:
    """Name, title and content of each figure, once all are written and no other file is in their folder."""
    _remove_others(directory, write_others())
    yield from ((one.name, one.title, (directory / f"{one.name}.png").read_bytes()) for one in drawn)


def _in_markdown(table: PaperTable) -> str:
    return f"{writers.to_markdown(table.text)}\n{_as_list(table.notes)}"


def _markdown(
    name: str,
    summary: Sequence[str],
    paper_tables: Sequence[PaperTable],
    drawn: Sequence[figures.Figure],
    frame: pd.DataFrame,
) -> str:
    parts = _markdown_parts(name, summary, paper_tables, drawn)
    parts.append(f"## Environment\n\n{_as_list(list(_environment(frame)))}")
    parts.append(
        "## Files\n\n"
        "- `report.html`: this page with figures that answer to the mouse; it opens without network\n"
        "- `runs.csv`: every run with its whole config, metrics and environment, in the stored units\n"
        "- `tables/`: each table as Markdown, LaTeX (`preview.tex` holds them all), HTML, and CSV (unrounded, in the "
        "stored units)\n"
        "- `figures/`: each figure as PDF and PNG\n"
    )
    return "\n".join(parts)


def _markdown_parts(
    name: str, summary: Sequence[str], paper_tables: Sequence[PaperTable], drawn: Sequence[figures.Figure]
) -> list[str]:
    """Head, figures and tables."""
    parts = [f"# {name}\n\n{_as_list(summary)}"]
    if drawn:
        pictures = "\n".join(f"![{figure.title}](figures/{figure.name}.png)\n" for figure in drawn)
        parts.append(f"## Figures\n\n{pictures}")
    return parts + [f"## {table.caption}\n\n{_in_markdown(table)}" for table in paper_tables]


def _summary(runs: Runs, scores: str) -> Iterator[str]:
    statuses = runs.frame["status"].value_counts()
    counts = [f"{statuses[status.value]} {status}" for status in Status if status.value in statuses]
    num_runs = len(runs.frame) + len(runs.unreadable) + len(runs.to_do or ())
    if runs.unreadable:
        counts.append(f"{len(runs.unreadable)} unreadable")
    if runs.to_do is not None:
        counts.append(f"{len(runs.to_do)} to do")
    left_out = SweepLaunches("", runs.launches).superseded
    yield from _launches(_without_earlier_rounds(runs.launches), left_out=left_out)
    yield f"Runs: {num_runs} ({', '.join(counts)})."
    yield from _search(runs)
    if runs.sweep is not None and runs.to_do is None:
        yield "What is still to do is not known: no sweep file lists the runs of this sweep."
    if runs.to_do:
        yield f"To do: {notes.listed(runs.to_do)}."
    best_metrics = " or ".join(runs.frame["config.dataset.best_metric"].unique())
    yield f"Selection: {notes.selection_rule(best_metrics, scores)}."
    for problem in runs.problems:
        yield f"Left out: {as_code(problem)}"


def _search(runs: Runs) -> Iterator[str]:
    """What was searched in which cells, by how many trials, and that test had no part in it."""
    cells = runs.launches[-1].searched if runs.launches else []
    if not cells:
        return
    names = " and ".join(as_code(name) for name in dict.fromkeys(axis for cell in cells for axis in cell.axes))
    seeds = ", ".join(str(seed) for seed in sorted(set(runs.trials["config.seed"])))
    counts = Counter(runs.trials["status"])
    ended = ", ".join(f"{counts[status.value]} {status}" for status in Status if counts[status.value])
    num_open = sum(cell.runs is None for cell in cells)
    yield (
        f"Search: {names} in {len(cells)} cells{f', {num_open} of them not decided yet' if num_open else ''}, by "
        f"{len(runs.trials)} trials ({ended}) on seed{'s' * (', ' in seeds)} {seeds}, chosen on val; trials open no "
        "test split, and the runs below have other seeds."
    )


def _without_earlier_rounds(launches: Sequence[Launch]) -> list[Launch]:
    """The launches; of the rounds of one search, which name more and more runs, the last."""
    return [
        launch
        for launch, later in zip_longest(launches, launches[1:])
        if later is None or not (launch.searched and later.searched and later.command == launch.command)
    ]


def _launches(launches: Sequence[Launch], *, left_out: Sequence[str]) -> Iterator[str]:
    """The commands that named the runs of the sweep, which part each added, and what a repetition no longer names."""
    if len(launches) == 1:
        yield f"Command: {_command(launches[0])}"
        return
    named: set[str] = set()
    lines, num_repeated = [], 0
    latest: dict[str | None, Launch] = {}
    for launch in launches:
        added = set(launch.run_ids) - named
        named |= added
        latest[launch.command] = launch
        if added:
            num_runs = len(set(launch.run_ids))
            part = "" if len(added) == num_runs else f", {len(added)} of them added by it"
            lines.append(f"{_command(launch)}: {num_runs} run{'s' * (num_runs != 1)}{part}")
        else:
            num_repeated += 1
    if lines:
        heading = f"Commands, {len(named)} runs altogether"
        heading += f" ({num_repeated} more launches added none)" if num_repeated else ""
        yield "\n  - ".join([f"{heading}:", *lines])
    gone = [
        run_id
        for launch in launches
        for run_id in launch.run_ids
        if launch.command is not None and run_id not in latest[launch.command].run_ids
    ]
    others = {run_id for launch in latest.values() for run_id in launch.run_ids}
    superseded = [run_id for run_id in dict.fromkeys(gone) if run_id not in others and run_id not in left_out]
    if superseded:
        yield (
            "Superseded: the last launch of the same command names other runs in their place, because its settings or "
            f"the data have changed since. Still counted here: {notes.listed(superseded)}."
        )


def _command(launch: Launch) -> str:
    text = "unknown" if launch.command is None else as_code(launch.command)
    return text + (f", {launch.created}" if launch.created else "")


def _environment(frame: pd.DataFrame) -> Iterator[str]:
    """Every fact about the environment, and for how many runs it held where they differ."""
    facts = frame[[column for column in frame.columns if column.startswith("environment.")]]
    facts = facts.drop(columns=[f"environment.{name}" for name in _MOMENTS], errors="ignore")
    # Scores on additional evaluation datasets, which say nothing about where a run ran.
    facts = facts[[column for column in facts.columns if not column.startswith("environment.evaluated_also.")]]
    recorded = facts.dropna(how="all")
    if len(recorded) < len(facts):
        yield f"recorded by {len(recorded)} of {len(facts)} runs"
    for column in recorded.columns:
        counts = Counter("unknown" if value is None else show_value(value) for value in recorded[column])
        values = [as_code(value) + (f" (n={n})" if len(counts) > 1 else "") for value, n in counts.most_common(20)]
        more = f" and {len(counts) - 20} more values" if len(counts) > 20 else ""
        yield f"{column.removeprefix('environment.')}: {', '.join(values)}{more}"


# Every run has its own; they are in runs.csv.
_MOMENTS = ("started_at", "first_step_at", "ended_at")


def _without_empty_metrics(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns=[name for name in METRICS if frame[name].isna().all()])


def _as_list(lines: Sequence[str]) -> str:
    return "".join(f"- {writers.note_in_markdown(line)}\n" for line in lines)


def _remove_others(directory: Path, written: Iterable[Path]) -> None:
    """What an earlier report with other tables or figures left would look like a part of this one."""
    keep = set(written)
    for path in directory.glob("*"):
        if path.is_file() and path not in keep:
            path.unlink()


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode("utf-8"))
