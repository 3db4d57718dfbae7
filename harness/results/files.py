"""The files of a run's folder: their names, and how they are written so that none is ever half there."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

RESULT_FILE = "result.json"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes so that a reader sees either the old file or the whole new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp, whose files nobody else on a shared file system may read.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json_atomically(path: Path, value: Any) -> None:
    """Writes `value` as JSON, like `write_atomically`."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
