"""Scores that took long, in a file as soon as they are known: a command that was killed computes the rest alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]


@dataclass
class KeptScores:
    """Rows by what they follow from, a line of JSON for each; a line that cannot be read is none.

    Args:
        path: of the file, which need not be there; None to keep nothing.
    """

    path: Path | None
    _known: dict[str, Rows] = field(init=False)

    def __post_init__(self) -> None:
        self._known = {}
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                one = json.loads(line)
                self._known[one["key"]] = one["rows"]

    def find(self, key: str | None) -> Rows | None:
        """The rows that follow from it, None where they are not known."""
        return None if key is None else self._known.get(key)

    def keep(self, key: str | None, rows: Rows) -> None:
        """Keeps rows; those without a key, of which nothing says what they follow from, are not kept."""
        if key is None or self.path is None:
            return
        self._known[key] = rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            # A line that a killed process left without an end spoils no other.
            file.write(f"\n{json.dumps({'key': key, 'rows': rows})}\n")
