"""Whether what `analysis suggest` proposed has held: each proposal against its parent, on the seeds of the new sweep.

<runs_dir>/suggestions/<sweep>.json, written by `suggest` beside the sweep file --suggestion--> a table of verdicts
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.comparisons import MARGIN, Cell, equivalence_margin, holm, non_inferiority_p_value, p_value
from analysis.load import LoadError
from analysis.metrics import format_spread, is_better, title
from analysis.select import records, score
from analysis.tables.cells import MISSING, show_metric
from analysis.tables.columns import cell_names, run_ids_of
from analysis.tables.structure import Column, PaperTable, text_table
from harness.results.files import SUGGESTIONS_DIR, write_json_atomically


class Claim(StrEnum):
    """What is claimed of a proposal."""

    AS_GOOD = "as good as its parent, or better"
    BETTER = "better than its parent"


@dataclass(frozen=True)
class Adapter:
    """What tells the cells of a suggestion apart: `rank.rank`, `rank.pattern` and the name of the target layers."""

    rank: int
    pattern: Mapping[str, int]
    target_layers: str


@dataclass(frozen=True)
class Hypothesis:
    """A proposal, and what is claimed of it.

    Attributes:
        name: of the proposal.
        claim: a value of `Claim`.
        why: where its ranks come from.
        proposal: what is proposed.
        parent: what it is compared with.
        num_params: adapter parameters that it will have, by formula.
        parent_num_params: those of the parent.
    """

    name: str
    claim: str
    why: str
    proposal: Adapter
    parent: Adapter
    num_params: int
    parent_num_params: int


@dataclass(frozen=True)
class Suggestion:
    """The hypotheses that a sweep tests, and the sweep whose weights suggested them."""

    sweep: str
    parent_sweep: str
    hypotheses: list[Hypothesis]


def write_suggestion(runs_dir: Path, suggestion: Suggestion) -> Path:
    """Keeps the hypotheses where the report of their sweep looks for them."""
    path = runs_dir / SUGGESTIONS_DIR / f"{suggestion.sweep}.json"
    write_json_atomically(path, asdict(suggestion))
    return path


def read_suggestion(runs_dir: Path, sweep: str | None) -> Suggestion | None:
    """The hypotheses that a sweep tests; None where it tests none. Raises `LoadError` for what is no such file."""
    path = runs_dir / SUGGESTIONS_DIR / f"{sweep}.json"
    if sweep is None or not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        hypotheses = [
            Hypothesis(**{**one, "proposal": Adapter(**one["proposal"]), "parent": Adapter(**one["parent"])})
            for one in raw["hypotheses"]
        ]
        return Suggestion(raw["sweep"], raw["parent_sweep"], hypotheses)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"{path}: not readable as a suggestion ({error!r}). Delete it, and the report leaves its table out."
        ) from error


def suggestion_table(
    suggestion: Suggestion | None, best: pd.DataFrame, frame: pd.DataFrame, *, margin: float = MARGIN
) -> PaperTable | None:
    """A row for each hypothesis of a sweep: the counts, the scores on test of both, and whether it held.

    None where the sweep tests none. A proposal held where the tests say so at 5 % after Holm's correction; that it did
    not hold is said of one that is worse at 5 %, and else that the runs do not show it.
    """
    if suggestion is None:
        return None
    cells = {adapter: _cell_of(adapter, best, frame) for each in suggestion.hypotheses for adapter in _keys(each)}
    found = [(one, cells[_key(one.proposal)], cells[_key(one.parent)]) for one in suggestion.hypotheses]
    verdicts = _verdicts(found, margin)
    named = [proposal or parent for _, proposal, parent in found]
    names = dict.fromkeys(score(cell, "test") for cell in named if cell is not None)
    heading = " or ".join(map(title, names)) or "score on test"
    columns = [
        Column("proposal", [one.name for one, _, _ in found]),
        Column("ranks", [_shown(one.proposal) for one, _, _ in found]),
        Column("parent", [_shown(one.parent) for one, _, _ in found]),
        Column("claim", [one.claim for one, _, _ in found]),
        _counts("predicted params", [one.num_params for one, _, _ in found]),
        _counts("adapter params", [_built(proposal) for _, proposal, _ in found]),
        _counts("of parent", [_built(parent) for _, _, parent in found]),
        Column(heading, [_score(proposal) for _, proposal, _ in found]),
        Column("of parent", [_score(parent) for _, _, parent in found]),
        Column("difference", [verdict.difference_text for verdict in verdicts], [v.difference for v in verdicts]),
        Column("p", [MISSING if v.p is None else f"{v.p:.3f}" for v in verdicts], [v.p for v in verdicts]),
        Column("verdict", [verdict.text for verdict in verdicts]),
    ]
    return PaperTable(
        name="suggestion",
        caption=f"Whether what the weights of {suggestion.parent_sweep} suggested has held on fresh seeds.",
        text=text_table(columns, num_key_columns=3),
        numbers=pd.DataFrame([*_numbers(found, verdicts)], dtype=object),
        notes=[
            *(f"{one.name}: {one.why}." for one, _, _ in found),
            f"held: below 5 %, with Holm's correction for the number of proposals, by the one-sided t-test that it is "
            f"worse by {margin:g} of the scale or more (as good, or better), or by the two-sided t-test (better). did "
            "not hold: worse by the two-sided test. not shown: neither, which is no equality.",
        ],
        run_ids=[
            tuple(run_id for cell in (proposal, parent) if cell is not None for run_id in run_ids_of([cell])[0])
            for _, proposal, parent in found
        ],
    )


def _keys(one: Hypothesis) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return _key(one.proposal), _key(one.parent)


def _key(adapter: Adapter) -> tuple[Any, ...]:
    return adapter.rank, tuple(sorted(adapter.pattern.items())), adapter.target_layers


_PATTERN = "config.rank.pattern."
_OF_ADAPTER = ("run_id", "config.method.name", "config.rank.rank", "config.target_layers.name")


def _cell_of(key: tuple[Any, ...], best: pd.DataFrame, frame: pd.DataFrame) -> Cell | None:
    """The condition of the runs that have these ranks and target layers."""
    patterns = [column for column in frame.columns if column.startswith(_PATTERN)]
    own = set()
    for row in frame[
        ["run_id", "config.method.name", "config.rank.rank", "config.target_layers.name", *patterns]
    ].to_dict("records"):
        pattern = {name.removeprefix(_PATTERN): row[name] for name in patterns if not pd.isna(row[name])}
        ranks = (row["config.rank.rank"], tuple(sorted(pattern.items())), row["config.target_layers.name"])
        if row["config.method.name"] == "lora" and ranks == key:
            own.add(row["run_id"])
    return next((cell for cell in records(best) if own.intersection(cell["run_ids"])), None)


@dataclass(frozen=True)
class _Verdict:
    text: str
    difference: float | None = None
    difference_text: str = MISSING
    p: float | None = None


def _verdicts(found: Sequence[tuple[Hypothesis, Cell | None, Cell | None]], margin: float) -> list[_Verdict]:
    """With Holm's correction for those that can be tested."""
    tested: list[tuple[float, float] | None] = []
    for one, proposal, parent in found:
        tested.append(None if proposal is None or parent is None else _p_values(one, proposal, parent, margin))
    corrected = iter(holm([pair[0] for pair in tested if pair is not None]))
    verdicts = []
    for (_, proposal, parent), pair in zip(found, tested, strict=True):
        if proposal is None or parent is None:
            verdicts.append(_Verdict("not run yet"))
            continue
        name = score(proposal, "test")
        if not proposal.get(f"{name}_n", 0) or not parent.get(f"{name}_n", 0):
            verdicts.append(_Verdict("no finished run"))
            continue
        difference = proposal[name] - parent[name]
        sign = "+" if difference >= 0 else "\N{MINUS SIGN}"
        shown = f"{sign}{format_spread(name, abs(difference))}"
        if pair is None:
            verdicts.append(_Verdict("not tested: one run of either", difference, shown))
            continue
        p = next(corrected)
        if p < 0.05:
            text = "held"
        elif pair[1] < 0.05 and not is_better(name, proposal[name], parent[name]):
            text = "did not hold"
        else:
            text = "not shown"
        verdicts.append(_Verdict(text, difference, shown, p))
    return verdicts


def _p_values(one: Hypothesis, proposal: Cell, parent: Cell, margin: float) -> tuple[float, float] | None:
    """The p-value of what is claimed, and that of a difference; None where there is nothing to test."""
    name = score(proposal, "test")
    room = equivalence_margin(name, parent.get(name) or 0.0, margin)
    as_good = non_inferiority_p_value(proposal, parent, name, room)
    if as_good is None:
        return None
    found = p_value(proposal, parent, name)
    differs = 1.0 if found is None else found
    if one.claim == Claim.AS_GOOD:
        return as_good, differs
    return (differs if is_better(name, proposal[name], parent[name]) else 1.0), differs


def _shown(adapter: Adapter) -> str:
    pattern = ", ".join(f"{role} {rank}" for role, rank in adapter.pattern.items())
    return f"rank {adapter.rank}{f' ({pattern})' if pattern else ''} on {adapter.target_layers}"


def _counts(heading: str, values: Sequence[float | None]) -> Column:
    return Column(heading, [MISSING if value is None else f"{value:,.0f}" for value in values], [*values])


def _built(cell: Cell | None) -> float | None:
    return None if cell is None or not cell.get("num_adapter_params_n", 0) else float(cell["num_adapter_params"])


def _score(cell: Cell | None) -> str:
    return MISSING if cell is None else show_metric(cell, score(cell, "test"))


def _numbers(
    found: Sequence[tuple[Hypothesis, Cell | None, Cell | None]], verdicts: Sequence[_Verdict]
) -> Iterator[dict[str, Any]]:
    for (one, proposal, parent), verdict in zip(found, verdicts, strict=True):
        line: dict[str, Any] = {"proposal": one.name, "claim": one.claim, "predicted_params": one.num_params}
        for prefix, cell in (("", proposal), ("parent_", parent)):
            if cell is not None:
                line |= {f"{prefix}{name}": cell[name] for name in cell_names(cell)}
                name = score(cell, "test")
                line |= {f"{prefix}{part}": cell.get(part) for part in (name, f"{name}_sd", f"{name}_n")}
                line[f"{prefix}num_adapter_params"] = _built(cell)
        yield {**line, "difference": verdict.difference, "p_holm": verdict.p, "verdict": verdict.text}
