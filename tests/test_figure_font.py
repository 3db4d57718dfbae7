"""The figures' font: the part looks like the whole, what it lacks comes from the whole, and it can be done without."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import matplotlib.figure
import pytest
from fontTools.ttLib import TTFont
from matplotlib import font_manager

from analysis.figures import font
from analysis.figures.style import our_settings

SHOWN = "office AVATAR Ty. fit: test accuracy, ↑ better ± 2·10⁻⁴ — ≤ ΔW αβ ÄÖß"


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test finds its fonts anew, and what it adds to them is gone after it."""
    font.families.cache_clear()
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist])
    yield
    font.families.cache_clear()


def drawn(text: str, families: list[str], suffix: str = "png") -> bytes:
    """A small figure with that text."""
    content = io.BytesIO()
    with our_settings():
        matplotlib.rcParams["font.family"] = families
        figure = matplotlib.figure.Figure(figsize=(8, 1))
        figure.text(0.02, 0.5, text)
        figure.savefig(content, format=suffix, dpi=200)
    return content.getvalue()


def test_the_part_looks_like_the_whole_to_the_last_pixel() -> None:
    assert font.families() == [font.PART, font.WHOLE]
    assert drawn(SHOWN, font.families()) == drawn(SHOWN, [font.WHOLE])
    assert drawn(SHOWN, font.families()) != drawn(SHOWN.replace("Δ", "δ"), font.families())


def test_what_the_part_lacks_comes_from_the_whole() -> None:
    text = "модель 8"
    part = TTFont(io.BytesIO(font.cut(Path(font_manager.findfont(font.WHOLE))))).getBestCmap()
    assert ord("8") in part
    assert ord("м") not in part
    assert drawn(text, font.families(), "pdf").startswith(b"%PDF")  # a glyph that no font has would warn
    assert drawn(text, font.families()) == drawn(text, [font.WHOLE])


def test_a_pdf_names_the_font_that_the_part_is_of() -> None:
    content = drawn("abc", [font.families()[0]], "pdf")
    assert b"DejaVuSans" in content
    assert b"Harness" not in content


def test_it_is_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matplotlib, "get_cachedir", lambda: str(tmp_path))
    assert font.families()[0] == font.PART
    [kept] = tmp_path.iterdir()
    font.families.cache_clear()
    monkeypatch.setattr(font, "cut", lambda source: pytest.fail("was made before"))
    assert font.families()[0] == font.PART
    assert [*tmp_path.iterdir()] == [kept]


@pytest.mark.parametrize("content", [b"", b"no font"])
def test_a_broken_file_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(matplotlib, "get_cachedir", lambda: str(tmp_path))
    monkeypatch.setattr(font, "cut", lambda source: content)
    assert font.families() == [font.WHOLE]
    assert not [*tmp_path.iterdir()]  # it is made anew the next time
    assert drawn(SHOWN, font.families()).startswith(b"\x89PNG")


def test_without_room_for_it_the_whole_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(matplotlib, "get_cachedir", lambda: str(file))
    assert font.families() == [font.WHOLE]
