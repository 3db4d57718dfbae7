"""Sentences in which text between backticks is code: how one is written, and how it gets into another format."""

from __future__ import annotations

import re
from collections.abc import Callable


def as_code(text: str) -> str:
    """Text as a code span, in which nothing is markup."""
    one_line = " ".join(text.split()).replace("`", "'")
    return f"`{one_line}`"


_CODE_SPAN = re.compile(r"`([^`]*)`")


def with_code(note: str, plain: Callable[[str], str], code: Callable[[str], str]) -> str:
    """A note with its code spans and the text around them each turned into another format."""
    parts = _CODE_SPAN.split(note)
    return "".join(code(part) if index % 2 else plain(part) for index, part in enumerate(parts))
