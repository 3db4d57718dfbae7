"""`python -m analysis budget --audit FILE`: the parameter counts that a paper prints, held against the model.

Counts come from `harness.forecast.audit`, which builds each model without a weight. A count agrees where its printed
digits are those of the formula's count, rounded or cut; of one that does not, the simple variants that would are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.papers import Count, Paper, PaperError, read_paper
from analysis.tables.cells import MISSING
from analysis.tables.structure import Column, text_table
from analysis.tables.writers import to_csv, to_markdown

AGREES, DOES_NOT = 0, 1


@dataclass(frozen=True)
class Audited:
    """A printed count, the formula's, and of one that disagrees the variants with the printed digits."""

    entry: Count
    count: int
    variants: tuple[tuple[str, int], ...]

    @property
    def agrees(self) -> bool:
        """Whether the printed digits are those of the formula's count."""
        return self.entry.printed.is_met_by(self.count)

    @property
    def off(self) -> int:
        """By how much the printed count is above the formula's."""
        return self.entry.printed.value - self.count

    @property
    def verdict(self) -> str:
        """In words."""
        if self.entry.printed.is_rounded(self.count):
            return "agrees to the printed digits"
        if self.agrees:
            return "agrees to the printed digits, cut and not rounded"
        return f"does not: the formula gives {-self.off:+,} ({self.count / self.entry.printed.value - 1:+.1%})"

    @property
    def explanation(self) -> str:
        """The variants with the printed digits; of a count that agrees, nothing."""
        if self.agrees:
            return ""
        return "; ".join(f"{words}: {count:,}" for words, count in self.variants) or "no simple variant gives it"


def audit(paper: Paper) -> list[Audited]:
    """Holds every count of a paper against its model.

    Raises:
        ForecastError: what a model or a method does not allow, or a `formula` of the file that is another; the message
            names file and entry.
    """
    from harness.forecast.audit import Auditor
    from harness.forecast.request import ForecastError

    found = []
    with Auditor(paper.models, folder=paper.path.parent) as auditor:
        for entry in paper.counts.values():
            try:
                count = auditor.count(entry)
                if entry.formula not in (None, count):
                    raise ForecastError(f"formula: {entry.formula:,} is not what the model gives, {count:,}.")
                is_met = entry.printed.is_met_by
                wanted = () if is_met(count) else auditor.variants(entry)
                variants = tuple((words, other) for words, other in wanted if is_met(other))
            except ForecastError as error:
                where = f"{paper.path}: counts.{entry.name}"
                raise ForecastError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from error
            found.append(Audited(entry, count, variants))
    return found


def audit_frame(audited: Sequence[Audited]) -> pd.DataFrame:
    """A row for each count."""
    return pd.DataFrame(
        [
            {
                "name": each.entry.name,
                "table": each.entry.table,
                "model": each.entry.model,
                "method": each.entry.method,
                "target_layers": each.entry.target_layers,
                "rank": each.entry.rank,
                "head": each.entry.head,
                "printed": each.entry.printed.text,
                "printed_value": each.entry.printed.value,
                "count": each.count,
                "off": each.off,
                "agrees": each.agrees,
                "verdict": each.verdict,
                "variants": each.explanation,
                "note": each.entry.note,
            }
            for each in audited
        ],
        dtype=object,
    )


def audit_markdown(audited: Sequence[Audited]) -> str:
    """The same as a table to read, and how many agree."""
    columns = [
        Column("count", [each.entry.name for each in audited]),
        Column("printed in", [each.entry.table or MISSING for each in audited]),
        Column("printed", [each.entry.printed.text for each in audited], [float(each.count) for each in audited]),
        Column("formula", [f"{each.count:,}" for each in audited], [float(each.count) for each in audited]),
        Column("verdict", [each.verdict for each in audited]),
        Column("variants with the printed digits", [each.explanation for each in audited]),
    ]
    num_agreeing = sum(each.agrees for each in audited)
    return f"{to_markdown(text_table(columns, num_key_columns=2))}\n{num_agreeing} of {len(audited)} counts agree.\n"


def print_audit(path: Path, csv: Path | None) -> int:
    """Prints the audit of a file, writes it as CSV where asked to, and returns the exit code: 0 where all agree.

    Raises `PaperError`, or `ForecastError` as `audit` does.
    """
    paper = read_paper(path)
    if not paper.counts:
        raise PaperError(f"{path}: counts: there are none to audit; write a mapping from a name to a printed count.")
    audited = audit(paper)
    print(audit_markdown(audited), end="")
    if csv is not None:
        csv.write_text(to_csv(audit_frame(audited)), encoding="utf-8")
    return AGREES if all(each.agrees for each in audited) else DOES_NOT
