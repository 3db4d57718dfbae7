"""What a figure shows: the cells of one model on one dataset, with the names that they have in figures."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib import font_manager

from analysis.axes import Axis, axes_texts, axis_number, axis_order, varied
from analysis.comparisons import Cell
from analysis.curves import Curves, SeedCurve, seed_curve
from analysis.figures.style import COLOURS, LINES, LOOK_OF_FULL, LOOK_WITHOUT_RANK, MARKERS, in_turn
from analysis.methods import is_full
from analysis.metrics import metric
from analysis.select import best_cells, num_status, records
from analysis.trials import Searches
from harness.results.schema import Status

MIN_SEEDS_OF_INTERVAL = 3


@dataclass(frozen=True, eq=False)
class PlottedCell:
    """A cell and its names in a figure: `label` ("lora r8 qv") and `family`, what it shares with other ranks ("qv")."""

    row: Cell
    label: str
    family: str

    def value(self, name: str) -> float | None:
        """Its mean of a metric; None if no run finished or none measured it."""
        value = self.row.get(name)
        return None if not self.num_finished or value is None or math.isnan(value) else float(value)

    def displayed(self, name: str) -> float:
        """Such a mean that it has, in the unit in which it is shown; of "rank" the rank."""
        value = self.rank if name == "rank" else self.value(name)
        assert value is not None, name
        return value if name == "rank" else value / metric(name).display_divisor

    def interval(self, name: str) -> float:
        """Half the width of the 95 % interval; 0 below three seeds.

        That of two is nine times their deviation on either side: it would press all means of a figure onto one line,
        and says less than the two values, which are drawn instead (`two_seeds`).
        """
        half = self.row.get(f"{name}_ci")
        if half is None or math.isnan(half) or self.row[f"{name}_n"] < MIN_SEEDS_OF_INTERVAL:
            return 0.0
        return float(half) / metric(name).display_divisor

    def ends(self, name: str) -> tuple[float, float]:
        """Where the interval ends, in the unit in which it is shown; not above the largest value of the metric."""
        mean, half = self.displayed(name), self.interval(name)
        return mean - half, max(mean, min(mean + half, metric(name).largest / metric(name).display_divisor))

    def two_seeds(self, name: str) -> tuple[float, float] | tuple[()]:
        """The values of a score where it has exactly two, in the unit in which it is shown and the order of seeds."""
        by_seed = self.row["by_seed"].get(name, {})
        if len(by_seed) != MIN_SEEDS_OF_INTERVAL - 1:
            return ()
        first, second = (by_seed[seed] / metric(name).display_divisor for seed in sorted(by_seed))
        return first, second

    @property
    def rank(self) -> float | None:
        """Its rank; None for a method without one."""
        return None if pd.isna(self.row["rank"]) else float(self.row["rank"])

    @property
    def is_full(self) -> bool:
        """Whether it is full fine-tuning."""
        return is_full(self.row)

    @cached_property  # read for each value
    def num_finished(self) -> int:
        """How many of its runs finished."""
        return int(self.row[num_status(Status.FINISHED)])

    @property
    def status(self) -> str:
        """How its runs ended that did not finish."""
        ended = [status for status in Status if status is not Status.FINISHED and self.row[num_status(status)]]
        return " and ".join(status.value.replace("_", " ") for status in ended)


@dataclass(frozen=True)
class Panel:
    """What is shown of one model on one dataset, at one value of each own axis that methods share.

    `tried` holds the cells of all learning rates, `best` one per condition; `numbers` are those of the families in the
    whole sweep, so that a placement looks alike in all panels. `along` is an own axis of which a panel has all values,
    for a figure that has it as its x axis. `searches` are what was tried before the runs were reported.
    """

    name: str
    best: list[PlottedCell]
    tried: list[PlottedCell]
    curves: Curves
    test: str
    val: str
    numbers: Mapping[str, int]
    along: Axis | None = None
    searches: Searches | None = None

    def with_metrics(self, *names: str) -> list[PlottedCell]:
        """The conditions that have all of these metrics."""
        return [cell for cell in self.best if all(cell.value(name) is not None for name in names)]

    def seed_curve(self, cell: PlottedCell, name: str) -> SeedCurve:
        """The curve of a metric over the runs of a cell."""
        key = tuple(cell.row["run_ids"]), name  # where no rate finished, one cell has the runs of all
        if key not in self._seed_curves:
            self._seed_curves[key] = seed_curve(self.curves, cell.row["run_ids"], name)
        return self._seed_curves[key]

    @cached_property
    def _seed_curves(self) -> dict[tuple[tuple[str, ...], str], SeedCurve]:
        return {}

    def ranks(self) -> list[float]:
        """The ranks of its conditions, ascending."""
        return sorted({cell.rank for cell in self.best if cell.rank})

    def families(self) -> dict[str, list[PlottedCell]]:
        """The conditions with a rank by family, in order of rank."""
        found = defaultdict(list)
        for cell in sorted((cell for cell in self.best if cell.rank), key=lambda cell: cell.displayed("rank")):
            found[cell.family].append(cell)
        return dict(sorted(found.items(), key=lambda item: self.numbers[item[0]]))

    def look_of(self, cell: PlottedCell) -> dict[str, Any]:
        """Colour, marker and line style of a family; full fine-tuning is black, whatever else has no rank grey."""
        colour, marker, line = LOOK_OF_FULL if cell.is_full else LOOK_WITHOUT_RANK
        if cell.rank:
            number = self.numbers[cell.family]
            colour, marker, line = (in_turn(kinds, number) for kinds in (COLOURS, MARKERS, LINES))
        return {"color": colour, "marker": marker, "linestyle": line}

    def look_by_rank(self, cell: PlottedCell) -> dict[str, Any]:
        """The colour of the family with the marker and the line style of the rank, where every rank is a line."""
        look = self.look_of(cell)
        if not cell.rank:
            return look
        number = self.ranks().index(cell.rank)
        return look | {"marker": in_turn(MARKERS, number), "linestyle": in_turn(LINES, number)}

    def tuned_ranks(self) -> list[PlottedCell]:
        """The conditions of which several learning rates were tried, in placements that have several such ranks."""
        tuned = [cell for cell in self.with_metrics(self.val) if cell.rank and len(cell.row["tried"]) > 1]
        ranks = defaultdict(set)
        for cell in tuned:
            ranks[cell.family].add(cell.rank)
        return [cell for cell in tuned if len(ranks[cell.family]) > 1]

    def tuned_full(self, shown: Sequence[PlottedCell]) -> dict[str, PlottedCell]:
        """By the recipes of the cells shown, full fine-tuning with several learning rates, of several the usual one."""
        tuned = [cell for cell in self.with_metrics(self.val) if cell.is_full and len(cell.row["tried"]) > 1]
        found: dict[str, PlottedCell] = {}
        for cell in sorted(tuned, key=lambda cell: bool(_departures(cell.row))):
            if any(cell.row["recipe_id"] == other.row["recipe_id"] for other in shown):
                found.setdefault(cell.row["recipe_id"], cell)
        return found


# ---------------------------------------------------------------- from cells to panels


def panels_of(
    cells: pd.DataFrame, curves: Curves, *, along: Axis | None = None, searches: Searches | None = None
) -> list[Panel]:
    """The panels of a table of `select.cells` at all learning rates, those of a dataset in the order of own axes."""
    best = best_cells(cells)
    by_dataset: defaultdict[tuple[Any, ...], list[Cell]] = defaultdict(list)
    for row in records(best):
        by_dataset[row["model"], row["dataset"], row["best_metric"]].append(row)
    one_method = best.loc[best["rank"].notna(), "method"].nunique() == 1
    at_all_rates = records(cells)
    numbers: dict[str, int] = {}
    panels: list[Panel] = []
    for (model, dataset, score), members in by_dataset.items():
        for facet, rows in _facets(members, along):
            own = [axis for axis in varied(rows) if axis != along]
            usual = _usual_words(rows, own)
            named = _named(rows, one_method=one_method, along=along, own=own, unsaid=usual)
            chosen = {cell.row["condition_id"]: cell for cell in named}
            for cell in chosen.values():
                if cell.rank:
                    numbers.setdefault(cell.family, len(numbers))
            tried = [
                PlottedCell(row, chosen[row["condition_id"]].label, chosen[row["condition_id"]].family)
                for row in at_all_rates
                if row["condition_id"] in chosen
            ]
            name = ", ".join([short_name(model), short_name(dataset), *facet, *(f"{text} if unsaid" for text in usual)])
            alike = sum(panel.name.partition(" #")[0] == name for panel in panels)
            name += f" #{alike + 1}" if alike else ""
            scored = (f"test_{score}", f"val_{score}")
            panels.append(Panel(name, [*chosen.values()], tried, curves, *scored, numbers, along, searches))
    return panels


def _facets(rows: Sequence[Cell], along: Axis | None) -> list[tuple[list[str], list[Cell]]]:
    """The rows of a dataset apart for each value of the own axes that methods share, with those values in words."""
    axes = [axis for axis in varied(rows) if not axis.is_of_method and axis != along]
    groups: defaultdict[tuple[Any, ...], list[Cell]] = defaultdict(list)
    for row in rows:
        groups[tuple(axis_order(row[axis.setting]) for axis in axes)].append(row)
    return [
        ([short_name(text, 40) for text in axes_texts(groups[key][0], axes)], groups[key]) for key in sorted(groups)
    ]


def _usual_words(rows: Sequence[Cell], axes: Sequence[Axis]) -> list[str]:
    """As "alpha policy fixed": of each axis whose values are words, the one that more than half of the rows have."""
    usual = []
    for axis in axes:
        having = [row for row in rows if row[axis.setting] is not None]
        (text, number), *_ = Counter(axes_texts(row, [axis])[0] for row in having).most_common(1)
        if 2 * number > len(having) and all(axis_number(row[axis.setting]) is None for row in having):
            usual.append(short_name(text, 40))
    return usual


def _named(
    rows: Sequence[Cell], *, one_method: bool, along: Axis | None, own: Sequence[Axis], unsaid: Collection[str]
) -> list[PlottedCell]:
    """The rows with their names; where recipes differ, those that depart from the usual one are numbered: "(2)".

    Names have the values of the rows on the axes `own`, but for those `unsaid`.
    """
    known = variants(rows)
    taken: Counter[tuple[Any, str]] = Counter()
    cells = []
    for row in rows:
        number = known.index(_departures(row)) + 1
        variant = [f"({number})"] if number > 1 else []
        method = short_name(row["method"])
        placement = [short_name(row["target_layers"])] if isinstance(row["target_layers"], str) else []
        rank: list[str] = [] if pd.isna(row["rank"]) else [f"r{row['rank']:g}"]
        values = [text for text in (short_name(text, 40) for text in axes_texts(row, own)) if text not in unsaid]
        label = " ".join([method, *rank, *placement, *values, *variant])
        family = " ".join([*([] if one_method and rank else [method]), *placement, *values, *variant]) or method
        at = None if along is None else row[along.setting]
        taken[at, label] += 1
        again = f" #{taken[at, label]}" if taken[at, label] > 1 else ""
        cells.append(PlottedCell(row, label + again, family + again))
    return cells


def variants(rows: Sequence[Cell]) -> list[tuple[str, ...]]:
    """The ways in which recipes depart from the usual one, that one first if there is any."""
    return sorted(dict.fromkeys(map(_departures, rows)), key=bool)


def _departures(row: Cell) -> tuple[str, ...]:
    return tuple(text for text in row["differs"] or () if not text.startswith("environment."))


# ---------------------------------------------------------------- names


def short_name(value: Any, length: int = 20) -> str:
    """A name from a config on one line, shortened in its middle; what the font has no glyph for as its code point."""
    text = "".join(letter if _has_glyph(letter) else f"U+{ord(letter):04X}" for letter in str(value)).strip() or "?"
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length // 2 - 1) :]}"


@lru_cache(maxsize=4096)
def _has_glyph(letter: str) -> bool:
    """Whether the font that every figure is set in, the one that comes with matplotlib, has a letter."""
    font = font_manager.get_font(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")))
    return letter.isprintable() and font.get_char_index(ord(letter)) != 0
