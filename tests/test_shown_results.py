"""What README and the documentation show of measured sweeps is what the results in docs/results/ give."""

from __future__ import annotations

import json
import tarfile
import types
from collections.abc import Iterator

import pytest
from matplotlib.testing.compare import compare_images
from scripts import ROOT, load_script


@pytest.fixture(scope="module")
def rebuild() -> Iterator[types.ModuleType]:
    module = load_script("docs/rebuild.py")
    yield module
    module.remove_reports()


def pages_with_results(rebuild: types.ModuleType) -> dict[str, str]:
    pages = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in rebuild.PAGES}
    return {name: page for name, page in pages.items() if "<!-- shown " in page}


def test_tables_are_those_of_the_results(rebuild: types.ModuleType) -> None:
    pages = pages_with_results(rebuild)
    assert {"README.md", "docs/results.md"} <= set(pages)
    for name, page in pages.items():
        assert page.count("<!-- shown ") == page.count("<!-- /shown -->"), name
        assert rebuild.rebuilt(page) == page, f"{name}: run make results"


def test_figures_are_those_of_the_results(rebuild: types.ModuleType) -> None:
    drawn = [figure for page in pages_with_results(rebuild).values() for figure in rebuild.figures(page)]
    assert drawn
    for figure in drawn:
        assert compare_images(str(figure.made), str(figure.shown), tol=1) is None, f"{figure.shown}: run make results"


def test_the_demo_computes_runs_of_the_first_table() -> None:
    golden = json.loads((ROOT / "tests/golden/identities.json").read_text())
    with tarfile.open(ROOT / "docs/results/reuters_tuned.tar.xz") as archive:
        recorded = {name.partition("/")[0] for name in archive.getnames()}
    assert set(golden["sweeps"]["demo"]) <= recorded


def test_an_edited_number_is_noticed(rebuild: types.ModuleType) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    begin = page.index("<!-- shown tables/")
    digit = next(at for at in range(page.index("|", page.index("\n", begin)), len(page)) if page[at].isdigit())
    edited = f"{page[:digit]}{(int(page[digit]) + 1) % 10}{page[digit + 1 :]}"
    assert rebuild.rebuilt(edited) == page
