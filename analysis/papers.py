"""What papers print, from a small YAML file for each: parameter counts, and rows of tables.

    paper: Hu et al., LoRA
    version: arXiv 2106.09685v2
    models:      what is needed of a config.json, by name; `labels` is the outputs of a task head
    counts:      printed parameter counts, by name, with what they are printed of
    tables:      printed rows; `count` names one of the counts

A file with `models` and `counts` alone can be audited (`python -m analysis budget --audit FILE`). Figures stay the text
that is printed. Every other key is an error that names the file and the key.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from harness.results.metrics import METRICS

PUBLISHED_DIR = Path(__file__).with_name("published")

# The table of ours under which rows are quoted; `own` is a table by itself.
FORMS = ("rank_by_target_layers", "target_layers_at_budget", "rank_sweep", "tasks_by_methods", "own")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_PRINTED = re.compile(r"([\d_,]*)(?:\.(\d+))?\s*([KMB]?)", flags=re.IGNORECASE)


class PaperError(ValueError):
    """A file that cannot be read; the message names the file, the key and the fix."""


@dataclass(frozen=True)
class PrintedCount:
    """A number of parameters as it is written: `0.3M` is 300,000, and its last digit stands for 100,000."""

    text: str
    value: int
    step: int

    @classmethod
    def parse(cls, text: str) -> PrintedCount:
        """Reads `0.3M`, `0.49B`, `294,912`. Raises `ValueError`.

        >>> PrintedCount.parse("37.7M").value, PrintedCount.parse("37.7M").step
        (37700000, 100000)
        """
        found = _PRINTED.fullmatch(text.strip())
        whole, fraction = (re.sub("[_,]", "", found[1]), found[2] or "") if found is not None else ("", "")
        if found is None or not whole + fraction:
            raise ValueError(f"{text!r}: must be a number of parameters, as 300000, 300K or 4.7M")
        unit = _UNITS[found[3].upper()]
        return cls(text.strip(), round(int(whole + fraction) * unit / 10 ** len(fraction)), unit // 10 ** len(fraction))

    def is_rounded(self, count: int) -> bool:
        """Whether `count`, rounded to the printed digits, is what is printed."""
        return 2 * abs(count - self.value) <= max(1, self.step)

    def is_cut(self, count: int) -> bool:
        """Whether `count`, cut to the printed digits, is what is printed."""
        return 0 <= count - self.value < max(1, self.step)

    def is_met_by(self, count: int) -> bool:
        """Whether the printed digits are those of `count`, rounded or cut."""
        return self.is_rounded(count) or self.is_cut(count)


@dataclass(frozen=True)
class Count:
    """A printed parameter count.

    Attributes:
        name: of the entry.
        model: one of the file's `models`.
        printed: as printed.
        method: of ours.
        target_layers: one of our presets, for a method with placement.
        rank: for a method with ranks.
        head: whether the task head is counted in.
        table: where it is printed.
        formula: what the formula gives, where the file says so; an audit holds it against the model.
        note: what is known about it.
    """

    name: str
    model: str
    printed: PrintedCount
    method: str = "lora"
    target_layers: str | None = None
    rank: int | None = None
    head: bool = False
    table: str = ""
    formula: int | None = None
    note: str = ""

    @property
    def off(self) -> float | None:
        """By what part of the printed count the formula gives more; None where the printed digits agree."""
        if self.formula is None or self.printed.is_met_by(self.formula):
            return None
        return self.formula / self.printed.value - 1

    @property
    def shown(self) -> str:
        """As printed, with what the formula gives."""
        if self.formula is None:
            return self.printed.text
        off = "" if self.off is None else f", {self.off:+.1%}"
        return f"{self.printed.text} (formula: {self.formula:,}{off})"


@dataclass(frozen=True)
class QuotedRow:
    """A printed row.

    Attributes:
        model, dataset, method, target_layers: names, as printed or as ours.
        rank: None where the method has none.
        count: the printed parameter count.
        params: another text for it, where nothing is audited.
        metric: of `by_rank`.
        by_rank: figures by rank.
        scores: figures by dataset or by the name of the score.
        axes: what else tells rows apart, by the title of a column.
    """

    model: str
    method: str = ""
    dataset: str = ""
    target_layers: str = ""
    rank: int | None = None
    count: Count | None = None
    params: str = ""
    metric: str = ""
    by_rank: Mapping[int, str] = field(default_factory=dict)
    scores: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class QuotedTable:
    """Rows of one printed table.

    Attributes:
        table: its number, or what is said of it.
        form: see `FORMS`.
        rows: of it.
        notes: what is to be known, the errata among it; sentences without a full stop.
        datasets: of a table by itself: our names of the datasets beside whose runs it is shown.
        measured: of a table by itself: the metric of ours that stands in a column of scores, by that column.
    """

    table: str
    form: str
    rows: Sequence[QuotedRow]
    notes: Sequence[str] = ()
    datasets: Sequence[str] = ()
    measured: Mapping[str, str] = field(default_factory=dict)

    @property
    def count_notes(self) -> list[str]:
        """What is known about the counts of its rows."""
        return list(dict.fromkeys(row.count.note for row in self.rows if row.count is not None and row.count.note))


@dataclass(frozen=True)
class Paper:
    """What a file holds; `models` are parts of a config.json, by name."""

    path: Path
    paper: str
    version: str
    models: Mapping[str, Mapping[str, Any]]
    counts: Mapping[str, Count]
    tables: Sequence[QuotedTable]

    @property
    def source(self) -> str:
        """Which paper it is."""
        return ", ".join(part for part in (self.paper, self.version) if part)


@cache
def shipped_papers() -> tuple[Paper, ...]:
    """The papers that come with the harness, by the names of their files."""
    return tuple(read_paper(path) for path in sorted(PUBLISHED_DIR.glob("*.yaml")))


def read_paper(path: Path) -> Paper:
    """Reads and checks a file. Raises `PaperError`."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=_Texts)
    except OSError as error:
        raise PaperError(f"{path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise PaperError(f"{path}: is no text in UTF-8.") from error
    except yaml.YAMLError as error:
        raise PaperError(f"{path}: is no YAML: {' '.join(str(error).split())}.") from error
    top = _Mapping(content, str(path), ("paper", "version", "models", "counts", "tables"))
    models = {name: _model(each, f"{path}: models.{name}") for name, each in top.mapping("models").items()}
    counts = {
        name: _count(name, each, f"{path}: counts.{name}", models) for name, each in top.mapping("counts").items()
    }
    tables = [_table(each, f"{path}: tables[{index}]", counts) for index, each in enumerate(top.list("tables"))]
    return Paper(path, top.text("paper"), top.text("version"), models, counts, tables)


# ---------------------------------------------------------------- reading


class _Texts(yaml.BaseLoader):  # type: ignore[misc]
    """Every scalar a text, so that a figure keeps its digits; a key that is there twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep=True)
        return found


class _Mapping:
    """A mapping of the file at `where`, whose keys are known."""

    def __init__(self, content: Any, where: str, known: Collection[str], *, required: Collection[str] = ()) -> None:
        if not isinstance(content, dict):
            raise PaperError(f"{where}: must be a mapping with the keys {', '.join(known)}.")
        for key in content:
            if key not in known:
                raise PaperError(f"{where}: {key}: no such key. There are: {', '.join(known)}.")
        for key in required:
            if key not in content:
                raise PaperError(f"{where}: {key} is missing.")
        self._content, self._where = content, where

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def text(self, key: str) -> str:
        """A text; empty where there is none."""
        value = self._content.get(key, "")
        if not isinstance(value, str):
            raise PaperError(f"{self._where}: {key}: must be a text.")
        return value

    def number(self, key: str) -> int | None:
        """A whole number, at least 1; None where there is none."""
        text = self.text(key)
        if not text:
            return None
        digits = re.sub("[_,]", "", text)
        if not digits.isdecimal() or int(digits) < 1:
            raise PaperError(f"{self._where}: {key}: {text!r} must be a whole number, at least 1.")
        return int(digits)

    def flag(self, key: str) -> bool:
        """Yes or no; no where there is none."""
        text = self.text(key)
        if text not in ("", "true", "false"):
            raise PaperError(f"{self._where}: {key}: {text!r} must be true or false.")
        return text == "true"

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping; empty where there is none."""
        value = self._content.get(key, {})
        if not isinstance(value, dict):
            raise PaperError(f"{self._where}: {key}: must be a mapping.")
        return value

    def texts(self, key: str) -> dict[str, str]:
        """A mapping to texts."""
        found = self.mapping(key)
        for name, value in found.items():
            if not isinstance(value, str):
                raise PaperError(f"{self._where}: {key}.{name}: must be a text.")
        return found

    def list(self, key: str) -> list[Any]:
        """A list; empty where there is none."""
        value = self._content.get(key, [])
        if not isinstance(value, list):
            raise PaperError(f"{self._where}: {key}: must be a list.")
        return value


def _names(kind: type) -> list[str]:
    return [each.name for each in fields(kind)]


def _required(kind: type) -> list[str]:
    return [
        each.name
        for each in fields(kind)
        if each.default is MISSING and each.default_factory is MISSING and each.name not in ("name", "rows")
    ]


def _model(content: Any, where: str) -> dict[str, Any]:
    # Its keys are those of a config.json, which only transformers knows.
    if not isinstance(content, dict):
        raise PaperError(f"{where}: must be a mapping, as {{model_type: gpt2, n_embd: 1024, n_layer: 24}}.")
    if ("path" in content) == ("model_type" in content):
        raise PaperError(f"{where}: give a model_type with what else its config.json says, or a path to its folder.")
    return {key: _typed(value) for key, value in content.items()}


def _typed(value: Any) -> Any:
    """A value with the type that YAML gives it."""
    if isinstance(value, dict):
        return {key: _typed(each) for key, each in value.items()}
    return [_typed(each) for each in value] if isinstance(value, list) else yaml.safe_load(value)


def _count(name: str, content: Any, where: str, models: Mapping[str, Any]) -> Count:
    own = _Mapping(content, where, [each for each in _names(Count) if each != "name"], required=_required(Count))
    if own.text("model") not in models:
        raise PaperError(f"{where}: model: {own.text('model')!r} is not among the models: {', '.join(models)}.")
    try:
        printed = PrintedCount.parse(own.text("printed"))
    except ValueError as error:
        raise PaperError(f"{where}: printed: {error}.") from error
    if printed.value < 1:
        raise PaperError(f"{where}: printed: {printed.text!r} is no number of parameters.")
    return Count(
        name,
        own.text("model"),
        printed,
        method=own.text("method") or "lora",
        target_layers=own.text("target_layers") or None,
        rank=own.number("rank"),
        head=own.flag("head"),
        table=own.text("table"),
        formula=own.number("formula"),
        note=own.text("note"),
    )


def _table(content: Any, where: str, counts: Mapping[str, Count]) -> QuotedTable:
    own = _Mapping(content, where, _names(QuotedTable), required=_required(QuotedTable))
    form = own.text("form")
    if form not in FORMS:
        raise PaperError(f"{where}: form: {form!r} must be one of {', '.join(FORMS)}.")
    measured = own.texts("measured")
    for metric in measured.values():
        if metric not in METRICS:
            raise PaperError(f"{where}: measured: {metric} is no metric of the harness.")
    rows = [_row(each, f"{where}: rows[{index}]", counts) for index, each in enumerate(own.list("rows"))]
    notes, datasets = ([str(each) for each in own.list(key)] for key in ("notes", "datasets"))
    return QuotedTable(own.text("table"), form, rows, notes, datasets, measured)


def _row(content: Any, where: str, counts: Mapping[str, Count]) -> QuotedRow:
    own = _Mapping(content, where, _names(QuotedRow), required=_required(QuotedRow))
    count = own.text("count")
    if count and count not in counts:
        raise PaperError(f"{where}: count: {count!r} is not among the counts.")
    by_rank = own.texts("by_rank")
    if not all(rank.isdecimal() for rank in by_rank):
        raise PaperError(f"{where}: by_rank: its keys must be ranks.")
    return QuotedRow(
        own.text("model"),
        method=own.text("method"),
        dataset=own.text("dataset"),
        target_layers=own.text("target_layers"),
        rank=own.number("rank"),
        count=counts[count] if count else None,
        params=own.text("params"),
        metric=own.text("metric"),
        by_rank={int(rank): figure for rank, figure in by_rank.items()},
        scores=own.texts("scores"),
        axes=own.texts("axes"),
    )
