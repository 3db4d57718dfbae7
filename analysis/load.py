"""From result files to one frame with a row per ended run.

A sweep is known by its launches (`harness/launches.py`): together they decide which runs belong to the sweep, their
order, and which are still to do. A run that two sweeps share was computed by one of them, so the `sweep` in its result
file cannot tell; it is looked at only where no launch is recorded.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.forked import in_halves
from analysis.trials import with_search_costs
from harness.results.files import CURVE_FILE, RESULT_FILE
from harness.results.launches import SWEEPS_DIR, Launch, LaunchError, SweepLaunches, launched_sweeps, read_launches
from harness.results.methods import METHODS
from harness.results.metrics import METRICS
from harness.results.schema import ResultError, RunResult, Status, read_result

# Without these a run has no place in a table.
_NEEDED_SETTINGS: dict[str, type] = {
    "config.model.name": str,
    "config.dataset.name": str,
    "config.dataset.best_metric": str,
    "config.method.name": str,
    "config.trainer.learning_rate": float,
    "config.seed": int,
}
_LARGEST = 1e300
# From so many runs on reading takes longer than a second process does.
_MANY = 1000
# Where a run has these, they are of this type.
_TYPED_SETTINGS: dict[str, type] = {"config.rank.rank": int, "config.target_layers.name": str}
# Settings that came after the first results were written, and the value that stood for them until then: without these a
# run of before would differ in recipe from its own repetition. What came with the value null needs no line here.
CAME_LATER: dict[str, Any] = {
    "config.model.quantization": "none",
    "config.dataset.line_columns": (),
    "config.dataset.blocks": "cut",
    "config.dataset.attend_across_documents": False,
    "config.dataset.target_column": "target",
    "config.dataset.messages_column": "messages",
    "config.dataset.too_long": "truncate",
    "config.dataset.letters_only": False,
    "config.dataset.generation.max_new_tokens": 64,
    "config.dataset.generation.num_beams": 1,
    "config.dataset.generation.length_penalty": 1.0,
    "config.dataset.generation.no_repeat_ngram_size": 0,
    "config.dataset.generation.batch_size": 32,
    "config.trainer.label_smoothing": 0.0,
    "config.trainer.optimizer": "adamw",
    "config.trainer.lion_beta2": 0.99,
    "config.trainer.compile": "none",
    "config.variant.name": "plain",
    "config.variant.dora": False,
    "config.variant.init": "kaiming",
    "config.variant.learning_rate_ratio": 1.0,
    "config.trial": False,
    "config.variant.bias": "none",
}
# The order of runs where no sweep file gives one: equal settings side by side, the placement before the rank.
_ORDER = (
    "config.model.name",
    "config.dataset.name",
    "config.method.name",
    "config.variant.name",
    "config.target_layers.name",
    "config.target_layers.blocks",
    "config.rank.rank",
    "config.trainer.learning_rate",
    "config.seed",
    "run_id",
)


_OF_EVERY_RUN = ("run_id", "cell_id", "sweep", "status", "error")


class LoadError(ValueError):
    """There is nothing to analyse; the message names the setting, its value, what there is, and the fix."""


@dataclass(frozen=True)
class Runs:
    """The ended runs of a sweep, or of a whole folder.

    Attributes:
        frame: a row per run, whatever its status. Columns: `run_id`, `cell_id`, `sweep` (which computed the run first),
            `status`, `error`, `num_target_modules`, and where a run has `evaluate_also` in `base_domain` the first set
            of it, on which forgetting is measured; the config under dotted names (`config.rank.rank`), lists as
            tuples; every metric of the registry as float64; the environment (`environment.versions.torch`). Missing
            is None, for a metric NaN. Where a search chose any of them also what `trials.with_search_costs` adds.
        trials: the runs of a search (`trial=true`), likewise, which chose on val where those of `frame` are and are no
            rows of any table.
        sweep: its name; None for a whole folder.
        command: what started the sweep last, None where no launch says so.
        created: when, in ISO format; likewise.
        launches: every launch of the sweep, the oldest first.
        to_do: run ids that belong to the sweep and have no result; None where no launch lists them.
        unreadable: run ids that belong to the sweep and whose result is among the problems.
        problems: one sentence for each file that was left out.
    """

    frame: pd.DataFrame
    trials: pd.DataFrame
    sweep: str | None = None
    command: str | None = None
    created: str | None = None
    launches: list[Launch] = field(default_factory=list)
    to_do: list[str] | None = None
    unreadable: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def load_runs(runs_dir: Path, *, sweep: str | None = None, need_ended: bool = True) -> Runs:
    """Reads the result files of one sweep, or of all runs in the folder.

    Files that are not result files of this schema are left out and named in `problems`. Without `need_ended` a sweep
    whose file is there may have no ended run yet.

    Raises:
        LoadError: no such folder, no such sweep, no run that has ended, or a sweep file that cannot be read.
    """
    if not runs_dir.is_dir():
        raise LoadError(
            f"runs_dir={runs_dir}: no such folder. Name the folder that holds the runs with --runs-dir, "
            "or make runs first: python -m harness -m sweeps=demo"
        )
    launched = None if sweep is None else _launches_of(runs_dir, sweep)
    if launched is not None:
        return _load_listed(runs_dir, launched, need_ended)
    paths = {path.parent.name: path for path in sorted(_result_paths(runs_dir))}
    superseded, unreadable = _superseded_anywhere(runs_dir) if sweep is None else (set(), [])
    found, problems = _read_rows([path for run_id, path in paths.items() if run_id not in superseded])
    problems += [*unreadable, *_about_superseded([run_id for run_id in paths if run_id in superseded])]
    rows, trials = _without_trials(found)
    if not rows and trials:
        raise LoadError(f"runs_dir={runs_dir}: only trials of a search have ended there, {len(trials)} of them.")
    if not rows:
        raise LoadError(
            f"runs_dir={runs_dir}: no {RESULT_FILE} of a run in any of its folders, so no run has ended here. "
            "Name another folder with --runs-dir, or make runs first: python -m harness -m sweeps=demo"
            + _listing(problems)
        )
    if sweep is not None:
        known = _known_sweeps(runs_dir, rows)
        rows, trials = ([row for row in each if row["sweep"] == sweep] for each in (rows, trials))
        if not rows:
            raise LoadError(
                f"sweep={sweep!r}: no run in {runs_dir} belongs to a sweep of that name. "
                f"Sweeps there: {', '.join(known) or 'none'}. Leave --sweep out for all runs in one table."
                + _listing(problems)
            )
    rows = _once_per_seed(rows, problems)
    rows.sort(key=_position)
    return Runs(_frame(rows), _frame(trials), sweep=sweep, problems=problems)


def _load_listed(runs_dir: Path, launched: SweepLaunches, need_ended: bool) -> Runs:
    sweep, last = launched.sweep, launched.launches[-1]
    paths = {run_id: runs_dir / run_id / RESULT_FILE for run_id in launched.run_ids}
    found, problems = _read_rows([path for path in paths.values() if path.exists()])
    problems += _about_superseded(
        [run_id for run_id in launched.superseded if (runs_dir / run_id / RESULT_FILE).exists()]
    )
    rows, trials = _without_trials(found)
    if not rows and need_ended:
        ended = f"; {len(trials)} trials of its search have" if trials else ""
        raise LoadError(
            f"sweep={sweep!r}: none of its {len(paths)} runs has ended in {runs_dir} yet{ended}. "
            f"Its command: {last.command or 'unknown'}" + _listing(problems)
        )
    read = {row["run_id"] for row in found}
    of_search = _frame(trials)
    return Runs(
        with_search_costs(_frame(_once_per_seed(rows, problems)), of_search, launched.launches),
        of_search,
        sweep=sweep,
        command=last.command,
        created=last.created,
        launches=launched.launches,
        to_do=[run_id for run_id, path in paths.items() if not path.exists()],
        unreadable=[run_id for run_id, path in paths.items() if path.exists() and run_id not in read],
        problems=problems,
    )


def load_curves(runs_dir: Path, run_ids: Iterable[str]) -> Mapping[str, list[dict[str, float]]]:
    """The curve of each run that has one: rows with `step` and what was recorded at it, in order.

    A line that is not such a row (the last one of a killed run) is left out. Each is read when it is asked for: of
    thousands of runs a report draws a part.
    """
    return _CurvesOnDemand(runs_dir, run_ids)


class _CurvesOnDemand(Mapping[str, list[dict[str, float]]]):
    """By run id, each read once."""

    def __init__(self, runs_dir: Path, run_ids: Iterable[str]) -> None:
        self._runs_dir, self._run_ids = runs_dir, dict.fromkeys(run_ids)
        self._read: dict[str, list[dict[str, float]]] = {}

    def __getitem__(self, run_id: str) -> list[dict[str, float]]:
        if run_id not in self._run_ids:
            raise KeyError(run_id)
        if run_id not in self._read:
            self._read[run_id] = _read_curve(self._runs_dir / run_id / CURVE_FILE)
        if not self._read[run_id]:
            raise KeyError(run_id)
        return self._read[run_id]

    def __iter__(self) -> Iterator[str]:
        return (run_id for run_id in self._run_ids if self.get(run_id))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _read_curve(path: Path) -> list[dict[str, float]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [row for row in map(_curve_row, _parsed(lines)) if row is not None]


def _parsed(lines: Sequence[str]) -> list[Any]:
    """The values of lines of JSON, None for one that is none."""
    try:
        values = json.loads(f"[{','.join(lines)}]")  # at once, which takes half of the time
        if len(values) == len(lines):
            return list(values)
    except (ValueError, RecursionError):
        pass
    return list(map(_parsed_line, lines))


def _parsed_line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _curve_row(row: Any) -> dict[str, float] | None:
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return {
        str(name): value
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST
    }


def _result_paths(runs_dir: Path) -> Iterator[Path]:
    # A sweep called "result" has its sweep file where a run called "sweeps" would have its result.
    return (path for path in runs_dir.glob(f"*/{RESULT_FILE}") if path.parent.name != SWEEPS_DIR)


def _launches_of(runs_dir: Path, sweep: str) -> SweepLaunches | None:
    try:
        found = read_launches(runs_dir, sweep)
    except LaunchError as error:
        raise LoadError(str(error)) from error
    if found is None:
        return None
    texts = (replace(launch, command=_leaf(launch.command), created=_leaf(launch.created)) for launch in found.launches)
    return SweepLaunches(sweep, list(texts))


def _superseded_anywhere(runs_dir: Path) -> tuple[set[str], list[str]]:
    """The runs of a folder that are superseded in a sweep and named by no other, and the launch files that are none."""
    superseded: set[str] = set()
    named: set[str] = set()
    problems = []
    for sweep in launched_sweeps(runs_dir):
        try:
            launched = read_launches(runs_dir, sweep)
        except LaunchError as error:
            problems.append(str(error))
            continue
        if launched is not None:
            superseded |= set(launched.superseded)
            named |= set(launched.run_ids)
    return superseded - named, problems


def _about_superseded(run_ids: Sequence[str]) -> list[str]:
    if not run_ids:
        return []
    more = f" and {len(run_ids) - 3} more runs" if len(run_ids) > 3 else ""
    return [f"{', '.join(run_ids[:3])}{more}: at values that a search chose in an earlier launch; now it chose others"]


def _known_sweeps(runs_dir: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({*launched_sweeps(runs_dir), *(row["sweep"] for row in rows if row["sweep"] is not None)})


def _listing(problems: Sequence[str]) -> str:
    return "".join(f"\n  left out: {problem}" for problem in problems)


# ---------------------------------------------------------------- one result


def _read_rows(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    parts = in_halves(_read_some, paths, least=_MANY)
    return [row for rows, _ in parts for row in rows], [problem for _, problems in parts for problem in problems]


def _read_some(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for path in paths:
        try:
            result = read_result(path)
        except ResultError as error:
            problems.append(str(error))
            continue
        try:
            row = _row(result)
        except RecursionError:
            problems.append(f"{path}: its config or environment is nested too deeply")
            continue
        found = _find_problem(path, row)
        if found:
            problems.append(f"{path}: {found}")
        else:
            rows.append(row)
    return rows, problems


def _without_trials(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The runs that are reported, and the trials of a search."""
    return [row for row in rows if not row.get("config.trial")], [row for row in rows if row.get("config.trial")]


def _once_per_seed(rows: Sequence[dict[str, Any]], problems: list[str]) -> list[dict[str, Any]]:
    """The rows without second ones of a cell and seed, of which the finished one is kept, or the first; adds those."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["status"] != Status.FINISHED):
        first = kept.setdefault((row["cell_id"], row["config.seed"]), row)
        if first is not row:
            problems.append(
                f"{row['run_id']}: has cell and seed of {first['run_id']}, which is counted; a seed counts once"
            )
    chosen = {row["run_id"] for row in kept.values()}
    return [row for row in rows if row["run_id"] in chosen]


def _row(result: RunResult) -> dict[str, Any]:
    row = {
        "run_id": _as_text(result.run_id),
        "cell_id": _as_text(result.cell_id),
        "sweep": _leaf(result.sweep),
        "status": result.status.value,
        "error": _as_text(result.error, keep_lines=True),
        "num_target_modules": len(result.target_modules),
        **_base_domain(result.config.get("evaluate_also")),
    }
    _flatten("config", result.config, row)
    row |= result.metrics
    _flatten("environment", result.environment | _makers(result.environment), row)
    _take_rank_of_peft(row)
    return row


def _makers(environment: dict[str, Any]) -> dict[str, str]:
    """Of a run that others took up in turn, what they differ in: `git_commit 673a8ee, then 88686d5`."""
    makers = environment.get("made_by")
    if not (isinstance(makers, list) and makers and all(isinstance(maker, dict) for maker in makers)):
        return {}
    leaves: list[dict[str, Any]] = [{} for _ in makers]
    for maker, own in zip(makers, leaves, strict=True):
        _flatten("", maker, own)
    names = dict.fromkeys(name for own in leaves for name in own)
    values = {name: [own.get(name) for own in leaves] for name in names}
    changed = {name: each for name, each in values.items() if any(value != each[0] for value in each)}
    return {"made_by": "; ".join(f"{name[1:]} {', then '.join(map(str, each))}" for name, each in changed.items())}


def _take_rank_of_peft(row: dict[str, Any]) -> None:
    """A rank that was given by the name that it has in the `peft` package becomes the rank of the row."""
    method = METHODS.get(str(row.get("config.method.name")))
    if method is None or method.peft is None or row.get("config.rank.rank") is not None:
        return
    rank = row.pop(f"config.method.peft.{method.peft.rank}", None)
    if rank is not None:
        row["config.rank.rank"] = rank


def _base_domain(evaluate_also: Any) -> dict[str, str]:
    # The columns of the frame are those of all runs, and do not say which set came first in this one.
    if not isinstance(evaluate_also, dict) or not evaluate_also:
        return {}
    return {"base_domain": _as_text(str(next(iter(evaluate_also))))}


def _as_text(value: str, *, keep_lines: bool = False) -> str:
    """Text that can be seen and written: what no file can hold, steers a terminal or cannot be seen as its code.

    As a code and not as a space, so that two names that differ in it stay two.
    """
    if value.isprintable():
        return value
    return "".join(
        character if character.isprintable() or (keep_lines and character == "\n") else _as_code(character)
        for character in value
    )


def _as_code(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _flatten(name: str, value: dict[str, Any], row: dict[str, Any]) -> None:
    """Adds the leaves of nested objects to a row, under dotted names."""
    for dotted, inner in zip(_dotted(name, tuple(value)), value.values(), strict=True):
        kind = type(inner)  # of what was read as JSON: looked at millions of times, and quicker than `isinstance`
        if kind is dict:
            _flatten(dotted, inner, row)
        elif kind is str:
            row[dotted] = _shared_text(inner)
        else:
            row[dotted] = _leaf(inner) if kind is list else inner


# Thousands of runs have the same names and share most values: each is looked at, and held, once.
@lru_cache(maxsize=65536)
def _dotted(name: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}.{_as_text(part)}" for part in parts)


@lru_cache(maxsize=65536)
def _shared_text(value: str) -> str:
    return _as_text(value)


def _leaf(value: Any) -> Any:
    """A leaf, text as `_as_text` has it; a list becomes a tuple, which can be compared and grouped by."""
    if isinstance(value, str):
        return _shared_text(value)
    return tuple(map(_item, value)) if isinstance(value, list) else value


def _item(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else _leaf(value)


def _find_problem(path: Path, row: dict[str, Any]) -> str | None:
    absent = [setting for setting in _NEEDED_SETTINGS if row.get(setting) is None]
    if absent:
        return f"its config has no {', '.join(setting.removeprefix('config.') for setting in absent)}"
    for setting, kind in (_NEEDED_SETTINGS | _TYPED_SETTINGS).items():
        value = row.get(setting)
        if value is not None and not _is_sensible(value, kind):
            shown = f"{setting.removeprefix('config.')}={str(value)[:60]!r}"
            return f"its config has {shown}, which is not a {kind.__name__}"
    absent = [setting.removeprefix("config.") for setting in _settings_of_method(row) if row.get(setting) is None]
    if absent:
        return f"its method is {row['config.method.name']} and its config has no {', '.join(absent)}"
    if not isinstance(row.get("config.target_layers.blocks", ""), str | tuple | None):
        return f"its config has target_layers.blocks={row['config.target_layers.blocks']!r}, which is no list"
    best_metric = row["config.dataset.best_metric"]
    if f"val_{best_metric}" not in METRICS:
        return f"its dataset.best_metric {best_metric!r} is not in the METRICS registry"
    huge = [name for name in sorted(METRICS.keys() & row.keys()) if abs(row[name]) > _LARGEST**0.5]
    if huge:
        return f"its {huge[0]} is {row[huge[0]]!r:.30}, which nothing measures"
    # A copied folder would count a seed twice.
    if path.parent.name != row["run_id"]:
        return f"is the result of run {row['run_id']} and belongs into a folder of that name"
    return None


def _settings_of_method(row: dict[str, Any]) -> Iterator[str]:
    """What a run must have because of its method; of one that is not registered here nothing is known."""
    method = METHODS.get(row["config.method.name"])
    if method is not None and method.uses_rank:
        yield "config.rank.rank"
    if method is not None and method.uses_placement:
        yield "config.target_layers.name"


def _is_sensible(value: Any, kind: type) -> bool:
    if kind is str:
        return isinstance(value, str)
    allowed = int if kind is int else int | float
    return isinstance(value, allowed) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _position(row: dict[str, Any]) -> tuple[tuple[int, float, str], ...]:
    """Sorts by `_ORDER`: what is missing first, then numbers by size, then the rest as text."""
    values = (row.get(column) for column in _ORDER)
    return tuple(
        (0, 0.0, "") if value is None else (1, value, "") if isinstance(value, int | float) else (2, 0.0, str(value))
        for value in values
    )


# ---------------------------------------------------------------- the frame


def with_dtypes(table: pd.DataFrame, dtypes: Mapping[str, Any]) -> pd.DataFrame:
    """`table.astype(dtypes)` for columns of a frame of objects, in one block a type.

    `astype` leaves each column in its own block, and whatever reads hundreds of those takes several times longer.
    """
    columns = {
        column: pd.Series(table[column].to_numpy(), dtype=dtypes.get(column, object)) for column in table.columns
    }
    return pd.DataFrame(columns, columns=table.columns).set_axis(table.index)


def _frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    found = _columns(rows)
    names = dict.fromkeys([*_OF_EVERY_RUN, *found])
    columns = [
        *(name for name in names if not name.startswith(("config", "environment")) and name not in METRICS),
        *_leaves([name for name in names if name.startswith("config")]),
        *METRICS,
        *_leaves([name for name in names if name.startswith("environment")]),
    ]
    absent: list[Any] = [None] * len(rows)
    # Objects keep a rank 8 an 8 beside rows that have none; pandas would make it 8.0.
    values = {
        column: pd.Series(found.get(column, absent), dtype="float64" if column in METRICS else object)
        for column in columns
    }
    return pd.DataFrame(values, columns=columns)


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The values of all rows by name, and what stands for a name that a row does not have."""
    # Of thousands of runs most have the same names, and what is one after the other needs no look at each.
    shapes: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        shapes[tuple(row)].append(number)
    columns: dict[str, list[Any]] = {}
    for shape, numbers in shapes.items():
        values_of = zip(*(rows[number].values() for number in numbers), strict=True)
        for name, values in zip(shape, values_of, strict=True):
            column = columns.setdefault(name, [CAME_LATER.get(name)] * len(rows))
            for number, value in zip(numbers, values, strict=True):
                column[number] = value
    return columns


def _leaves(names: Sequence[str]) -> list[str]:
    """The names without those that are a group elsewhere (`rank: null` beside `rank.rank: 8`), groups kept together."""
    groups = list(dict.fromkeys(_group(name) for name in names))
    leaves = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    return sorted(leaves, key=lambda name: groups.index(_group(name)))


def _group(name: str) -> str:
    return ".".join(name.split(".")[:2])
