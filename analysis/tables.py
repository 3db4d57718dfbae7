"""Tables: first the numbers, a row per cell, then their text, then a format.

    frame of runs --tradeoff_table--> frame of numbers --as_text--> TextTable --to_markdown--> str
                                            |                            `-----to_rich------> rich tables
                                            `-------to_csv----> str

Numbers keep the stored units until `as_text`, which alone turns them into text, by the METRICS registry. Only finished
runs give numbers. A cell without any is a row all the same, and `tradeoff_notes` names every run that did not finish.
Nothing here chooses by a test metric.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import textwrap
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from harness.results import METRICS, Direction, Metric, Status

EN_DASH = "\N{EN DASH}"
MISSING = EN_DASH
COLLAPSED_ABOVE = 0.999
COLLAPSED_MARK = "†"

# Computed here from others, so not in the registry of what runs record.
TRAINABLE_SHARE = "trainable_share"
_DERIVED = {TRAINABLE_SHARE: Metric("1", Direction.LOWER, "trainable", ".3f", "%", 0.01)}

_COSTS = ("num_adapter_params", TRAINABLE_SHARE, "peak_memory_bytes", "step_seconds_median", "checkpoint_bytes")
# Step times are skewed by whatever else the machine does: a median, and the range instead of a deviation.
_BY_MEDIAN = {"step_seconds_median"}

_ARROWS = {Direction.HIGHER: " ↑", Direction.LOWER: " ↓", Direction.NEUTRAL: ""}

# Columns of the trade-off table that name a cell; the others are numbers.
_CELL_COLUMNS = ("cell_id", "model", "dataset", "method", "rank", "target_layers", "learning_rate", "differs")


# ---------------------------------------------------------------- numbers


def tradeoff_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Cost and quality of every cell: one row per `cell_id`, in the order in which the cells appear in `frame`.

    Columns: the cell (`cell_id`, `model`, `dataset`, `method`, `rank`, `target_layers`, `learning_rate`); its runs by
    status (`num_finished`, `num_diverged`, ...), how many of the finished ones collapsed, and in `differs` the settings
    in which its recipe departs from that of the other cells. Then, for each metric, over the finished runs that have
    it: `<metric>` (mean; for the step time the median), `<metric>_sd` (sample standard deviation, from two runs on;
    for the step time `_min` and `_max`) and `<metric>_n` (number of runs). Units are the stored ones.
    """
    metrics = [*_COSTS, *_score_columns(frame)]
    differences = _recipe_differences(frame)
    rows = [_cell(runs, metrics, differences.get(cell_id)) for cell_id, runs in _cells(frame)]
    # What names a cell stays an object: a rank 8 stays 8 beside a missing one, which stays None.
    table = pd.DataFrame(rows, dtype=object)
    numbers = [column for column in table.columns if column not in _CELL_COLUMNS]
    return table.astype({column: pd.to_numeric(table[column]).dtype for column in numbers})


def _cells(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    return ((str(cell_id), runs) for cell_id, runs in frame.groupby("cell_id", sort=False))


def _finished(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[runs["status"] == Status.FINISHED.value]


def _num(status: Status) -> str:
    return f"num_{status.value}"


def _score_columns(frame: pd.DataFrame) -> list[str]:
    """The metric by which the best step is chosen, on val and on test, for each dataset's."""
    best_metrics = frame["config.dataset.best_metric"].unique()
    return [f"{split}_{best_metric}" for best_metric in best_metrics for split in ("val", "test")]


def _cell(runs: pd.DataFrame, metrics: Sequence[str], differs: tuple[str, ...] | None) -> dict[str, Any]:
    first = runs.iloc[0]
    finished = _finished(runs)
    row: dict[str, Any] = {
        "cell_id": first["cell_id"],
        "model": first["config.model.name"],
        "dataset": first["config.dataset.name"],
        "method": first["config.method.name"],
        "rank": first.get("config.rank.rank"),
        "target_layers": _placement(first),
        "learning_rate": first["config.trainer.learning_rate"],
        **{_num(status): int((runs["status"] == status.value).sum()) for status in Status},
        "num_collapsed": len(_collapsed(finished)),
        "differs": differs,
    }
    for metric in metrics:
        row |= _summary(metric, _values(finished, metric))
    return row


def _placement(run: pd.Series[Any]) -> str | None:
    name, blocks = run.get("config.target_layers.name"), run.get("config.target_layers.blocks")
    if name is None or blocks == "all":
        return name
    return f"{name} ({blocks})" if isinstance(blocks, str) else f"{name} (blocks {', '.join(map(str, blocks or ()))})"


def _values(runs: pd.DataFrame, metric: str) -> list[float]:
    if metric == TRAINABLE_SHARE:
        return [float(value) for value in (runs["num_trainable_params"] / runs["num_total_params"]).dropna()]
    return [float(value) for value in runs[metric].dropna()]


def _summary(metric: str, values: Sequence[float]) -> dict[str, float | int | None]:
    if metric in _BY_MEDIAN:
        spread = {"min": min(values, default=None), "max": max(values, default=None)}
        center = statistics.median(values) if values else None
    else:
        # `statistics` computes exactly: seeds that agree have a deviation of 0 and not of rounding.
        spread = {"sd": statistics.stdev(values) if len(values) > 1 else None}
        center = statistics.mean(values) if values else None
    return {metric: center, **{f"{metric}_{name}": value for name, value in spread.items()}, f"{metric}_n": len(values)}


def _collapsed(finished: pd.DataFrame) -> pd.DataFrame:
    """The runs that predict one single class on val or on test."""
    shares = finished[["val_majority_share", "test_majority_share"]]
    return finished[(shares > COLLAPSED_ABOVE).any(axis="columns")]


# ---------------------------------------------------------------- recipes

# What the rows of a table compare, and what cannot change a number in it. Everything else must agree or is reported.
_COMPARED = {
    "config.model.name",
    "config.dataset.name",
    "config.method.name",
    "config.rank.rank",
    "config.target_layers.name",
    "config.target_layers.blocks",
    "config.trainer.learning_rate",
    "config.seed",
}
_WITHOUT_EFFECT = {
    "config.method.learning_rate",  # only what trainer.learning_rate fell back to
    "config.sweep",
    "config.runs_dir",
    "config.device",  # asked for; environment.device_type and device_name tell what it was
    "config.num_threads",  # likewise
    "config.rerun",
    "config.trainer.checkpoint_every",
    "environment.hostname",  # a name; what the machine is made of is compared
    "environment.started_at",
    "environment.first_step_at",
    "environment.ended_at",
}
_TRACKING = "config.tracking."

# Settings that may differ between rows because these columns do: compared only among rows that agree in them.
_SCOPES = {
    "config.model.": "config.model.name",
    "config.dataset.": "config.dataset.name",
    "config.method.": "config.method.name",
    "config.rank": "config.method.name",
    "config.target_layers": "config.target_layers.name",
    "environment.data_fingerprint": "config.dataset.name",
}


def _recipe_differences(frame: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """By cell, the settings in which it departs from most runs, as text; cells that depart in none are left out."""
    differences: defaultdict[str, list[str]] = defaultdict(list)
    for setting in frame.columns:
        if not setting.startswith(("config.", "environment.")) or setting.startswith(_TRACKING):
            continue
        if setting in _COMPARED | _WITHOUT_EFFECT:
            continue
        # The environment stands behind measured numbers, so that of a run without any does not matter.
        runs = _finished(frame) if setting.startswith("environment.") else frame
        scope = next((column for prefix, column in _SCOPES.items() if setting.startswith(prefix)), None)
        for _, group in runs.groupby(scope, sort=False, dropna=False) if scope in runs else [(None, runs)]:
            values = group[setting].map(show_value)
            if values.nunique() < 2:
                continue
            usual = Counter(values).most_common(1)[0][0]
            for cell_id, own in values.groupby(group["cell_id"], sort=False):
                if set(own) != {usual}:
                    shown = " and ".join(dict.fromkeys(own))
                    differences[str(cell_id)].append(f"{setting.removeprefix('config.')}={shown} instead of {usual}")
    return {cell_id: tuple(found) for cell_id, found in differences.items()}


def show_value(value: Any) -> str:
    """A setting as text: words as they are, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------- text


@dataclass(frozen=True)
class TextTable:
    """Strings ready to be laid out; the first `num_key_columns` columns name the row, numbers are set right."""

    titles: list[str]
    rows: list[list[str]]
    is_number: list[bool]
    num_key_columns: int


def as_text(table: pd.DataFrame) -> TextTable:
    """The trade-off table as people read it: only the columns that tell its rows apart, units, signs and marks."""
    marks = _recipe_marks(table)
    cells = table.to_dict("records")
    columns: list[tuple[str, bool, list[str]]] = [
        (name, False, [cell[name] for cell in cells]) for name in ("model", "dataset") if table[name].nunique() > 1
    ]
    columns += [
        ("method", False, [cell["method"] + _recipe_mark(cell, marks) for cell in cells]),
        ("rank", True, [MISSING if cell["rank"] is None else str(cell["rank"]) for cell in cells]),
        ("target layers", False, [cell["target_layers"] or MISSING for cell in cells]),
    ]
    if table["learning_rate"].nunique() > 1:
        columns.append(("learning rate", True, [_show_learning_rate(cell["learning_rate"]) for cell in cells]))
    num_key_columns = len(columns)
    columns += [(_title(name), True, [_show_metric(cell, name) for cell in cells]) for name in _shown_metrics(table)]
    columns.append(("n", True, [str(cell[_num(Status.FINISHED)]) for cell in cells]))
    if any(cell[_num(status)] for cell in cells for status in Status if status is not Status.FINISHED):
        columns.append(("status", False, [_show_status(cell) for cell in cells]))
    titles, is_number, texts = zip(*columns, strict=True)
    return TextTable(
        titles=list(titles),
        rows=[list(row) for row in zip(*texts, strict=True)],
        is_number=list(is_number),
        num_key_columns=num_key_columns,
    )


def _shown_metrics(table: pd.DataFrame) -> list[str]:
    return [column for column in table.columns if column in METRICS or column in _DERIVED]


def _metric(name: str) -> Metric:
    return _DERIVED[name] if name in _DERIVED else METRICS[name]


def _title(name: str) -> str:
    metric = _metric(name)
    return f"{metric.label}{f' ({metric.display_unit})' if metric.display_unit else ''}{_ARROWS[metric.direction]}"


def format_value(name: str, value: float) -> str:
    """A value of a metric in its display unit, without the unit."""
    metric = _metric(name)
    return f"{value / metric.display_divisor:{metric.format}}"


def _show_metric(cell: dict[Hashable, Any], name: str) -> str:
    num_values = cell[f"{name}_n"]
    if num_values == 0:
        return MISSING
    text = format_value(name, cell[name])
    if name in _BY_MEDIAN:
        low, high = format_value(name, cell[f"{name}_min"]), format_value(name, cell[f"{name}_max"])
        text += f" ({low}{EN_DASH}{high})" if low != high else ""
    elif num_values > 1 and (cell[f"{name}_sd"] > 0 or name not in _COSTS):
        # A cost that is the same for every seed is exact, and a "± 0" adds nothing; of a score it tells something.
        text += f" ± {format_value(name, cell[f'{name}_sd'])}"
    if num_values != cell[_num(Status.FINISHED)]:
        text += f" (n={num_values})"
    return f"{text}{COLLAPSED_MARK}" if cell["num_collapsed"] and name not in _COSTS else text


def _show_learning_rate(value: float) -> str:
    return f"{value:g}"


def _show_status(cell: dict[Hashable, Any]) -> str:
    counts = [(status, cell[_num(status)]) for status in Status]
    return ", ".join(f"{count} {status}" for status, count in counts if count)


def _recipe_marks(table: pd.DataFrame) -> dict[tuple[str, ...], int]:
    """A number for every way in which a cell's recipe departs, in the order of the rows."""
    departures = dict.fromkeys(differs for differs in table["differs"] if differs is not None)
    return {differs: number for number, differs in enumerate(departures, start=1)}


def _recipe_mark(cell: dict[Hashable, Any], marks: dict[tuple[str, ...], int]) -> str:
    return "" if cell["differs"] is None else f" [{marks[cell['differs']]}]"


# ---------------------------------------------------------------- notes


def tradeoff_notes(frame: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """What stands underneath the table: what its numbers are, what its marks mean, and the runs that gave none."""
    return [*_definitions(frame, table), *_warnings(frame, table), *_failures(frame)]


def selection_rule(frame: pd.DataFrame) -> str:
    """From which split and which step the scores come, in words."""
    best_metrics = " or ".join(frame["config.dataset.best_metric"].unique())
    return f"best step chosen on val only, by {best_metrics}; test evaluated after training, and used for no choice"


def _definitions(frame: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    same = [f"{name} {table[name].iloc[0]}" for name in ("model", "dataset") if table[name].nunique() == 1]
    if table["learning_rate"].nunique() == 1:
        same.append(f"learning rate {_show_learning_rate(table['learning_rate'].iloc[0])}")
    if same:
        yield f"The same in every row: {', '.join(same)}."
    yield (
        "n: finished runs, one per seed; only they give numbers. ±: sample standard deviation over them. "
        f"Step time: median over runs of each run's median step (smallest{EN_DASH}largest)."
    )
    heads = sorted(set(_finished(frame)["num_head_params"].dropna()))
    sizes = " or ".join(format_value("num_head_params", head) for head in heads)
    yield (
        "Trainable: share of all parameters (base, adapter and head) that were trained (adapter and head; the base too "
        f"in full fine-tuning). Adapter params leave the head out{f', which has {sizes}' if heads else ''}."
    )
    yield "Peak memory: bytes of live tensors at the peak of a training step. Checkpoint: what the run saved."


def _warnings(frame: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    collapsed = _collapsed(_finished(frame))["run_id"]
    if len(collapsed):
        yield (
            f"{COLLAPSED_MARK} collapsed: one class received more than {COLLAPSED_ABOVE:.1%} of the predictions on val "
            f"or test. Counted in all the same: {', '.join(map(as_code, collapsed))}."
        )
    for differs, number in _recipe_marks(table).items():
        settings = "; ".join(as_code(difference) for difference in differs)
        yield f"[{number}] differs in recipe or environment: {settings}."


def _failures(frame: pd.DataFrame) -> Iterator[str]:
    failed = frame[frame["status"] != Status.FINISHED.value]
    if len(failed):
        runs = zip(failed["run_id"], failed["status"], failed["error"], strict=True)
        lines = [f"{as_code(run_id)}: {status}: {_first_line(error)}" for run_id, status, error in runs]
        yield "\n  - ".join([f"Not finished, so without numbers: {len(failed)} of {len(frame)} runs:", *lines])


def _first_line(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return as_code(lines[0]) if lines else "no message"


def as_code(text: str) -> str:
    """Text as a Markdown code span, in which nothing is markup."""
    return f"`{text.replace('`', chr(39))}`"


# ---------------------------------------------------------------- formats


def to_markdown(table: TextTable) -> str:
    """A GitHub table, padded so that it reads as plain text too."""
    cells = [[text.replace("|", "\\|") for text in row] for row in (table.titles, *table.rows)]
    widths = [max(3, *(cell_len(row[i]) for row in cells)) for i in range(len(table.titles))]
    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, table.is_number, strict=True)]
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        padded = [
            " " * (width - cell_len(text)) + text if right else text + " " * (width - cell_len(text))
            for text, width, right in zip(row, widths, table.is_number, strict=True)
        ]
        lines.append(f"| {' | '.join(padded)} |\n")
    return "".join(lines)


def to_csv(frame: pd.DataFrame) -> str:
    """Full precision, stored units, an empty cell for what is missing; lists as JSON."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(frame.columns)
    writer.writerows([_csv_cell(value) for value in row] for row in frame.astype(object).to_numpy().tolist())
    return text.getvalue()


def _csv_cell(value: Any) -> Any:
    if isinstance(value, tuple):
        return json.dumps(value)
    if isinstance(value, float):
        # Counts and bytes are whole numbers in a float column.
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value


def to_rich(table: TextTable, *, width: int) -> list[Table]:
    """The table for a terminal of this width: as many tables as it takes, each with the columns that name the row."""
    indices = range(len(table.titles))
    texts = [[row[i] for row in table.rows] for i in indices]
    keys, rest = indices[: table.num_key_columns], indices[table.num_key_columns :]
    for i in rest:
        if not table.is_number[i]:
            texts[i] = [text.replace(", ", ",\n") for text in texts[i]]
    titles = [_fold_title(title, _width(texts[i])) for i, title in enumerate(table.titles)]
    widths = [_width([titles[i], *texts[i]]) for i in indices]
    blocks = _pack(keys, rest, widths, width)
    # The narrowest of the ways with as few tables, so that the last is not a single column.
    for narrower in range(width - 1, 0, -1):
        tighter = _pack(keys, rest, widths, narrower)
        if len(tighter) > len(blocks):
            break
        blocks = tighter
    return [_rich_block([(titles[i], table.is_number[i], texts[i]) for i in (*keys, *block)]) for block in blocks]


def _pack(keys: Sequence[int], rest: Sequence[int], widths: Sequence[int], width: int) -> list[list[int]]:
    """Deals the columns in their order onto tables that begin with the key columns, two spaces between columns."""
    blocks: list[list[int]] = []
    for i in rest:
        if not blocks or sum(widths[j] + 2 for j in (*keys, *blocks[-1], i)) - 2 > width:
            blocks.append([])
        blocks[-1].append(i)
    return blocks


def _width(texts: Sequence[str]) -> int:
    return max(cell_len(line) for text in texts for line in text.split("\n"))


def _fold_title(title: str, width: int) -> str:
    """The title in lines no longer than the column's values, or than its own longest word; the arrow stays with one."""
    words = title.split(" ")
    if words[-1] in ("↑", "↓"):
        words[-2:] = ["\N{NO-BREAK SPACE}".join(words[-2:])]
    lines = textwrap.wrap(" ".join(words), max(width, *map(cell_len, words)), break_long_words=False)
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def _rich_block(columns: Sequence[tuple[str, bool, list[str]]]) -> Table:
    block = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    height = max(title.count("\n") for title, _, _ in columns)
    for title, is_number, _ in columns:
        # Text, not str: rich would read a [1] as markup. Titles stand on the rule, as in print.
        lowered = "\n" * (height - title.count("\n")) + title
        block.add_column(Text(lowered), justify="right" if is_number else "left", no_wrap=True)
    for row in zip(*(texts for _, _, texts in columns), strict=True):
        block.add_row(*map(Text, row))
    return block
