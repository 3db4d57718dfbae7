"""`lora-harness init DIR`: a small project with its own dataset and sweep that runs as it is."""

from __future__ import annotations

import csv
import itertools
import random
from pathlib import Path

FILES = Path(__file__).parent / "files"
DATA_FILE = "data/reviews.csv"

_THINGS = ("blender", "kettle", "lamp", "chair", "radio", "camera", "backpack", "tent", "watch", "keyboard")
_VERDICTS = {
    "good": (
        "works perfectly",
        "is a joy to use",
        "was worth every cent",
        "is even better than described",
        "still runs like new after a year",
        "arrived early and in one piece",
        "is solid and well made",
        "has never let me down",
        "does exactly what it should",
        "is the best one I have owned",
        "was easy to set up",
        "made my whole family happy",
    ),
    "bad": (
        "broke after two days",
        "is a waste of money",
        "never worked at all",
        "is much worse than described",
        "fell apart in my hands",
        "arrived late and damaged",
        "is flimsy and badly made",
        "let me down at once",
        "does nothing that it should",
        "is the worst one I have owned",
        "was impossible to set up",
        "went straight back to the shop",
    ),
}


class ProjectError(ValueError):
    """A folder in which no project can be written; the message names it and what is there."""


def write_project(folder: Path) -> list[Path]:
    """Writes the project and returns its files. Raises `ProjectError` for a folder that holds anything."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = sorted(path.name for path in folder.iterdir())
        if present:
            raise ProjectError(
                f"{folder}: not empty ({', '.join(present[:5])}); name a new folder. Nothing was written."
            )
        written = [_copy(path, folder / path.relative_to(FILES)) for path in sorted(FILES.rglob("*")) if path.is_file()]
        return sorted([*written, _write_reviews(folder / DATA_FILE)])
    except OSError as error:
        raise ProjectError(f"{folder}: cannot be written ({error.strerror}); name another folder.") from error


def _copy(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    return target


def _write_reviews(path: Path) -> Path:
    """Every verdict on every thing, in an order that is always the same."""
    rows = [
        (f"The {thing} {verdict}.", label)
        for label, verdicts in _VERDICTS.items()
        for thing, verdict in itertools.product(_THINGS, verdicts)
    ]
    random.Random(0).shuffle(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("text", "label"), *rows])
    return path
