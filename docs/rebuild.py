"""Writes what README.md and docs/ show of measured sweeps, from the results in docs/results/: `make results`.

    <!-- shown tables/tradeoff.md | report --sweep demo --runs-dir docs/results/demo.tar.xz -->
    whatever stands here is replaced by that file of the report that this command writes
    <!-- /shown -->

`tables/tradeoff.md:table` takes the table without the notes under it. Of a figure (`figures/NAME.png`) the file is
copied to docs/results/SWEEP_NAME.png, and the lines between stay: they show it, in their own words.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS_DIR = ROOT / "docs" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
_BLOCK = re.compile(
    r"(?P<head><!-- shown (?P<file>\S+?)(?P<part>:table)? \| (?P<command>report [^\n]*) -->\n)"
    r"(?P<shown>.*?)(?P<foot><!-- /shown -->)",
    flags=re.DOTALL,
)


@dataclass(frozen=True)
class Figure:
    """A picture of a report: where the report has it, and where the pages have it."""

    made: Path
    shown: Path


def rebuilt(page: str) -> str:
    """The text of a page with every shown table written again from the results."""
    return _BLOCK.sub(_with_content, page)


def figures(page: str) -> Iterator[Figure]:
    """The figures that a page shows, each drawn again."""
    for block in _BLOCK.finditer(page):
        made = _report(block["command"]) / block["file"]
        if made.suffix == ".png":
            yield Figure(made, RESULTS_DIR / f"{made.parents[1].name}_{made.name}")


def _with_content(block: re.Match[str]) -> str:
    if block["file"].endswith(".png"):
        return block[0]
    text = (_report(block["command"]) / block["file"]).read_text(encoding="utf-8")
    return f"{block['head']}{text.partition(chr(10) * 2)[0] if block['part'] else text.rstrip()}\n{block['foot']}"


@cache
def _report(command: str) -> Path:
    """The folder of the report that a command writes; each is written once."""
    # Imported late: the folder of documentation is read where nothing is installed.
    from analysis.__main__ import main

    reports_dir = Path(tempfile.mkdtemp(prefix="reports-"))
    _DIRECTORIES.append(reports_dir)
    arguments = shlex.split(command)
    at = arguments.index("--runs-dir") + 1
    arguments[at] = str(ROOT / arguments[at])
    if main([*arguments, "--reports-dir", str(reports_dir)]) != 0:
        raise SystemExit(f"not rebuilt: {command}")
    (report_dir,) = reports_dir.iterdir()
    return report_dir


_DIRECTORIES: list[Path] = []


def remove_reports() -> None:
    """Removes what was written to take the tables from."""
    _report.cache_clear()
    while _DIRECTORIES:
        shutil.rmtree(_DIRECTORIES.pop())


def main() -> None:
    """Writes every page and every figure again."""
    try:
        for path in PAGES:
            page = path.read_text(encoding="utf-8")
            path.write_text(rebuilt(page), encoding="utf-8")
            for figure in figures(page):
                shutil.copyfile(figure.made, figure.shown)
    finally:
        remove_reports()


if __name__ == "__main__":
    sys.exit(main())
