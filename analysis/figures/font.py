"""The figures' font, cut to the characters that a report may need.

A PDF embeds the glyphs that it shows, which are cut out of the font file for each figure. From the whole of DejaVu
Sans, 6,000 glyphs with their tables, that takes longer than drawing a simple figure does; from this part of it a fifth.
Whatever is missing here is taken from the whole font.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager

from harness.results.files import write_atomically

WHOLE = "DejaVu Sans"
PART = "Harness Sans"
# Latin, Greek, punctuation, arrows and mathematical operators: the first code of each range and the one after its last.
RANGES = ((0x20, 0x180), (0x370, 0x400), (0x2000, 0x20A0), (0x2190, 0x2300))
_FAMILY_NAMES = (1, 4, 16)  # of the `name` table: by these fonts are found; 6, which a PDF shows, stays


@cache
def families() -> list[str]:
    """The fonts of the figures in the order in which a character is looked for, once they can be found by name.

    The part is made once and kept where matplotlib keeps its own lists of fonts, under a name that says by which
    version of this file; where nothing can be written there the whole font stands alone.
    """
    source = Path(font_manager.findfont(WHOLE, fallback_to_default=False))
    made_by = Path(__file__).read_bytes() + f"{matplotlib.__version__} {source.stat().st_size}".encode()
    path = Path(matplotlib.get_cachedir()) / f"harness-{hashlib.sha256(made_by).hexdigest()[:16]}.ttf"
    try:
        if not path.exists():
            write_atomically(path, cut(source))
        font_manager.fontManager.addfont(path)
    except (OSError, RuntimeError) as error:  # no room, or a file that is no font
        logging.getLogger(__name__).debug("%s: %s", path, error)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return [WHOLE]
    return [PART, WHOLE]


def cut(source: Path) -> bytes:
    """The characters of `RANGES` out of a font file, with how they are spaced and hinted: they look the same."""
    # Imported late: a second's third, once for each version of matplotlib.
    from fontTools.subset import Options, Subsetter
    from fontTools.ttLib import TTFont

    options = Options(glyph_names=True, recommended_glyphs=True, layout_features=["*"], name_IDs=["*"])
    options.drop_tables += ["FFTM", "MATH"]
    font = TTFont(source)
    part = Subsetter(options)
    part.populate(unicodes=[code for start, stop in RANGES for code in range(start, stop)])
    part.subset(font)
    for record in font["name"].names:
        if record.nameID in _FAMILY_NAMES:
            record.string = PART
    content = io.BytesIO()
    font.save(content)
    return content.getvalue()
