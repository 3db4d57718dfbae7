"""One rich sweep, made up, and everything that its report says, to the letter: tables, figure data, the page's data.

The other tests say what a table, a figure or the page must do; these say that rearranging the code changes nothing.
`UPDATE_GOLDEN=1 pytest tests/test_analysis_golden.py` writes the files anew: read the difference before you commit it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.text import Text
from plotly.offline import get_plotlyjs
from rich.console import Console
from test_analysis_language import save_language
from test_analysis_load import ENVIRONMENT, save_run, save_sweep
from test_analysis_page import data_of
from test_analysis_paper import MIB, save_paper_sweep
from test_analysis_tables import measured

import analysis.figures
from analysis.figures import Figure
from analysis.report import write_report

GOLDEN_DIR = Path(__file__).parent / "golden" / "whole_report"
SWEEP = "rich"
FORMS = (
    "tradeoff",
    "summary",
    "costs",
    "rank_by_target_layers",
    "target_layers_at_budget",
    "rank_sweep",
    "tasks_by_methods",
    "learning_rates",
)


def parts(peak: float) -> dict[str, float]:
    """A memory peak of so many MiB, and what it is made of."""
    shares = {"weights": 0.5, "gradients": 0.125, "optimizer": 0.125, "activations": 0.25}
    return {"peak_memory_bytes": peak * MIB} | {f"{name}_bytes": peak * MIB * share for name, share in shares.items()}


def save_rich_sweep(runs_dir: Path) -> None:
    """Three datasets and two models, with failures of every kind, several rates and recipes, and one budget.

    `save_paper_sweep` has a classifier, `save_language` a language model with curves; besides them there are placements
    at one parameter budget, the head alone, a collapsed run, another machine and a run that is still to do.
    """
    save_paper_sweep(runs_dir)
    save_language(runs_dir / "language", rates=(1e-3, 4e-3))
    for path in sorted((runs_dir / "language").iterdir()):
        path.rename(runs_dir / path.name)
    (runs_dir / "language").rmdir()
    for seed in range(2):
        for placement, rank in (("q", 8), ("qv", 4), ("qkvo", 2)):
            scores = {"val_mcc": 0.5 + 0.01 * rank + 0.002 * seed, "test_mcc": 0.45 + 0.01 * rank - 0.001 * seed}
            save_run(
                runs_dir, f"cola-{placement}-s{seed}", cell_id=f"cola-{placement}", seed=seed, rank=rank,
                target_layers=placement, dataset__name="cola", dataset__best_metric="mcc",
                metrics=measured(**parts(12 + rank), **scores, num_adapter_params=6144 + 64 * (rank == 8)),
            )  # fmt: skip
        for method, peak in (("full", 40), ("head_only", 8)):
            scores = {"val_mcc": 0.6 if method == "full" else 0.1, "test_mcc": 0.55 if method == "full" else 0.05}
            save_run(
                runs_dir, f"cola-{method}-s{seed}", cell_id=f"cola-{method}", seed=seed, method=method,
                dataset__name="cola", dataset__best_metric="mcc",
                metrics=measured(**parts(peak), **scores, num_adapter_params=0, num_trainable_params=512),
            )  # fmt: skip
    collapsed = measured(**parts(9), test_majority_share=1.0)
    save_run(runs_dir, "collapsed-s0", rank=2, target_layers="k", metrics=collapsed)
    elsewhere = {**ENVIRONMENT, "device_name": "other", "num_threads": 8}
    save_run(runs_dir, "elsewhere-s0", rank=8, target_layers="q", environment=elsewhere, metrics=measured(**parts(11)))
    save_run(runs_dir, "blocks-s0", rank=8, target_layers="q", blocks=[1, 0], metrics=measured(**parts(10)))
    save_sweep(runs_dir, SWEEP, [*sorted(path.name for path in runs_dir.iterdir()), "still-to-do"])


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("rich") / "runs"
    save_rich_sweep(found)
    return found


@pytest.fixture(scope="module")
def drawn() -> dict[str, matplotlib.figure.Figure]:
    """The figures of the report, which fills it."""
    return {}


@pytest.fixture(scope="module")
def report_dir(runs_dir: Path, drawn: dict[str, matplotlib.figure.Figure]) -> Iterator[Path]:
    """The report, its figures drawn and not turned into PDF and PNG, which takes longer than all the rest."""

    def draw_figures(figures: Sequence[Figure], directory: Path) -> list[Path]:
        directory.mkdir(parents=True)
        paths = [directory / f"{figure.name}.png" for figure in figures]
        for figure, path in zip(figures, paths, strict=True):
            drawn[f"{figure.name}: {figure.title}"] = figure.draw()
            path.write_bytes(b"")
        return paths

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis.figures, "write_figures", draw_figures)
        yield write_report(runs_dir, runs_dir.parent / "reports", SWEEP, published=True, console=Console(quiet=True))


def check(name: str, text: str) -> None:
    """Compares with the golden file, or writes it."""
    path = GOLDEN_DIR / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def as_lines(value: Any, depth: int = 2) -> str:
    """JSON with a line for each entry of the outer levels: short, and its differences can be read."""
    if depth and value and isinstance(value, dict):
        inner = ",\n".join(f"{json.dumps(key)}: {as_lines(item, depth - 1)}" for key, item in value.items())
        return f"{{\n{inner}\n}}"
    if depth and value and isinstance(value, list):
        inner = ",\n".join(as_lines(item, depth - 1) for item in value)
        return f"[\n{inner}\n]"
    return json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------- tables


def test_the_report_as_text(report_dir: Path) -> None:
    """Every table as Markdown with its notes, and the sentences of the page."""
    check("report.md", (report_dir / "report.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("form", FORMS)
def test_tables_as_latex(report_dir: Path, form: str) -> None:
    check(f"{form}.tex", (report_dir / f"tables/{form}.tex").read_text(encoding="utf-8"))


@pytest.mark.parametrize("form", FORMS)
def test_tables_as_numbers(report_dir: Path, form: str) -> None:
    check(f"{form}.csv", (report_dir / f"tables/{form}.csv").read_text(encoding="utf-8"))


def test_which_files_there_are_and_what_is_in_those_without_a_golden_file(report_dir: Path) -> None:
    """The HTML of tables says what their Markdown says, `runs.csv` what the runs were made with: digests will do."""
    digests = {
        path.relative_to(report_dir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        if path.suffix in (".html", ".csv") and path.name != "report.html"
        else ""
        for path in sorted(report_dir.rglob("*.*"))
    }
    check("files.json", as_lines(digests, 1) + "\n")


# ---------------------------------------------------------------- figures


def rounded(values: Any) -> Any:
    array = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan)
    return json.loads(json.dumps(np.round(array, 6).tolist()).replace("NaN", "null"))


def drawn_in(axes: Axes) -> Iterator[list[Any]]:
    """The data of everything in a panel, in the order in which it was drawn; where labels lie is not data."""
    yield ["axes", axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale(), axes.get_yscale()]
    yield ["limits", *rounded([*axes.get_xlim(), *axes.get_ylim()])]
    for axis in (axes.xaxis, axes.yaxis):
        yield ["ticks", *(label.get_text() for label in axis.get_ticklabels())]
    for line in axes.lines:
        look = [str(line.get_color()), str(line.get_marker()), str(line.get_linestyle())]
        yield ["line", str(line.get_label()), *look, rounded(line.get_xydata())]
    for bars in axes.containers:
        if hasattr(bars, "has_yerr"):
            segments = [
                rounded(part) for child in bars.get_children()[1:] for part in getattr(child, "get_segments", list)()
            ]
            yield ["bars", str(bars.get_label()), segments]
    for mesh in axes.collections:
        if isinstance(mesh, QuadMesh):
            yield ["mesh", rounded(mesh.get_array())]
    for patch in axes.patches:
        yield ["patch", str(patch.get_label()), str(patch.get_hatch()), rounded(patch.get_extents().bounds)[2:]]
    for text in axes.texts:
        yield ["text", text.get_text(), str(text.get_color())]


def everything_in(figure: matplotlib.figure.Figure) -> list[Any]:
    names = [
        text.get_text()
        for place in (figure, *figure.subfigs)
        for text in place.findobj(Text, include_self=False)
        if text.axes is None and text.get_text()
    ]
    return [
        ["size", *figure.get_size_inches().tolist()],
        ["names", *dict.fromkeys(names)],
        *(entry for axes in figure.axes for entry in drawn_in(axes)),
    ]


@pytest.mark.usefixtures("report_dir")
def test_the_data_of_the_figures(drawn: dict[str, matplotlib.figure.Figure]) -> None:
    check("figures.json", as_lines({name: everything_in(figure) for name, figure in drawn.items()}) + "\n")


# ---------------------------------------------------------------- page


def test_the_data_of_the_page(report_dir: Path) -> None:
    data = data_of((report_dir / "report.html").read_text(encoding="utf-8"))
    check("page.json", as_lines(data) + "\n")


def test_the_page_around_its_data(report_dir: Path) -> None:
    """Its elements and text, without the library, the style, the scripts, the data and the pictures."""
    text = (report_dir / "report.html").read_text(encoding="utf-8").replace(get_plotlyjs().replace("\r\n", "\n"), "")
    for pattern, instead in (
        (r"(<script[^>]*>).*?</script>", r"\1</script>"),
        (r"<style>.*?</style>", "<style></style>"),
        (r"sha256-[^']*", "sha256"),
        (r"base64,[^\"]*", "base64,"),
        (r"<table>.*?</table>", "<table></table>"),
    ):
        text = re.sub(pattern, instead, text, flags=re.DOTALL)
    check("page.html", text)
