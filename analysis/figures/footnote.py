"""What stands under a figure: how many seeds are behind it, what is not shown and why, how to read it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from analysis.figures.panels import MIN_SEEDS_OF_INTERVAL, Panel, PlottedCell, short_name, variants


@dataclass
class Footnote:
    """The footnote of one figure, which its panels add to.

    Attributes:
        where: stands before the names of cells, to distinguish panels.
        seeds: numbers of seeds behind the means shown.
        absent: by reason, what is not shown.
        remarks: sentences on how to read the figure.
    """

    where: str = ""
    seeds: set[int] = field(default_factory=set)
    absent: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    remarks: list[str] = field(default_factory=list)

    def account_for(self, cells: Sequence[PlottedCell], shown: Sequence[PlottedCell], name: str | None = None) -> None:
        """Says how many seeds are behind metric `name` of those shown, and which of all the cells are not."""
        self.seeds |= {int(cell.row[f"{name}_n"]) for cell in shown if name}
        for cell in cells:
            if not cell.num_finished:
                self.absent["not finished"].append(f"{self.where}{cell.label} ({cell.status})")
            elif cell not in shown:
                self.absent["not measured"].append(self.where + cell.label)

    def explain_variants(self, panel: Panel, written: Callable[[], Sequence[str]]) -> None:
        """Says what the numbers behind names stand for: "(2)" is a recipe that departs.

        Args:
            panel: whose cells have the names.
            written: gives what stands in the figure, which may not have all of them.
        """
        numbered = list(enumerate(variants([cell.row for cell in panel.best]), 1))[1:]
        texts = written() if numbered else ()
        self.remarks += [
            f"{self.where}({number}): {short_name(', '.join(settings), 60)}"
            for number, settings in numbered
            if any(f"({number})" in text for text in texts)
        ]

    def text(self, *, has_intervals: bool) -> str:
        """All of it in one sentence."""
        parts = []
        if self.seeds:
            low, high = min(self.seeds), max(self.seeds)
            several = f"mean of {high} seeds" if low == high else f"mean of {low} to {high} seeds"
            several += self._noise() if has_intervals else ""
            parts.append(several if high > 1 else "one seed: no interval")
        parts += dict.fromkeys(self.remarks)
        for reason, names in self.absent.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{reason}: {', '.join(names[:3])}{more}")
        return "; ".join(parts)

    def _noise(self) -> str:
        """What is drawn around the means."""
        small = f"small points: both seeds{' of two' if len(self.seeds) > 1 else ''}, too few for an interval"
        parts = [
            *(["95 % interval"] if max(self.seeds) >= MIN_SEEDS_OF_INTERVAL else []),
            *([small] if MIN_SEEDS_OF_INTERVAL - 1 in self.seeds else []),
        ]
        return f", {', '.join(parts)}" + (" (none for one seed)" if min(self.seeds) == 1 else "")
