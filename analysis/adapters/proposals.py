"""Other ranks and placements for a sweep's best adapter, from what its weights hold: hypotheses, to be tested by runs.

    spectra of the parent's runs --propose--> Proposal --sweep_file--> sweeps/<name>.yaml, and what it claims

A proposal says nothing until the sweep that tests it has run: `analysis.tables.suggestion` then says whether it held.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.tables.suggestion import Claim


@dataclass(frozen=True)
class Role:
    """What the runs of the parent show of the matrices of one role, means over blocks and seeds.

    Attributes:
        rank: that the parent gave it.
        cost: adapter parameters of one rank, in all its matrices.
        limit: the highest rank that its matrices allow.
        energy_rank: how many directions have 90 % of the sum of squares.
        effective_rank: see `measures.effective_rank`.
        energy: the sum of squares of the delta weights, of all its matrices.
    """

    rank: int
    cost: int
    limit: int
    energy_rank: float
    effective_rank: float
    energy: float


@dataclass(frozen=True)
class Proposal:
    """Ranks by role, and what is claimed of them.

    Attributes:
        name: of the proposal.
        claim: what a test of it has to show.
        ranks: by role; roles that are not there get no adapter.
        why: where the ranks come from, in a sentence.
    """

    name: str
    claim: Claim
    ranks: Mapping[str, int]
    why: str


def roles_of(spectra: pd.DataFrame) -> dict[str, Role]:
    """The roles of one condition, from the rows of its runs in `Findings.spectra`."""
    found = {}
    for role, own in spectra.groupby("role", sort=False):
        one_run = own[own["run_id"] == own["run_id"].iloc[0]]
        sides = one_run[["num_rows", "num_columns"]]
        found[str(role)] = Role(
            rank=int(own["rank"].iloc[0]),
            cost=int(sides.to_numpy().sum()),
            limit=int(sides.to_numpy().min()),
            energy_rank=float(own["energy_rank_90"].mean()),
            effective_rank=float(own["effective_rank"].mean()),
            energy=float((own["delta_norm"] ** 2).groupby(own["run_id"]).sum().mean()),
        )
    return found


def count(ranks: Mapping[str, int], roles: Mapping[str, Role]) -> int:
    """Adapter parameters: rank times rows plus columns, over all matrices."""
    return sum(rank * roles[role].cost for role, rank in ranks.items())


def propose(roles: Mapping[str, Role]) -> list[Proposal]:
    """What the spectra of a parent suggest: fewer ranks, the same count elsewhere, fewer roles.

    A proposal that is the parent is none.
    """
    parent = {role: each.rank for role, each in roles.items()}
    found = [_fewer(roles), _moved(roles), _placed(roles)]
    return [each for each in found if each is not None and dict(each.ranks) != parent]


def _fewer(roles: Mapping[str, Role]) -> Proposal:
    ranks = {role: min(each.rank, max(1, math.ceil(each.energy_rank - 1e-9))) for role, each in roles.items()}
    why = "each role has as many directions as hold 90 % of its delta weight's sum of squares, mean over blocks, seeds"
    return Proposal("fewer", Claim.AS_GOOD, ranks, why)


def _moved(roles: Mapping[str, Role]) -> Proposal | None:
    if len(roles) < 2:
        return None
    wanted = {role: each.effective_rank for role, each in roles.items()}
    ranks = _within_budget(wanted, roles, count({role: each.rank for role, each in roles.items()}, roles))
    why = "the parent's count, dealt to the roles in proportion to the effective ranks of their delta weights"
    return Proposal("moved", Claim.BETTER, ranks, why)


def _placed(roles: Mapping[str, Role]) -> Proposal | None:
    """The roles that have moved most for their parameters, until they hold 90 % of all that has moved."""
    total = sum(each.energy for each in roles.values())
    ordered = sorted(roles, key=lambda role: -roles[role].energy / (roles[role].cost * roles[role].rank))
    kept, held = [], 0.0
    for role in ordered:
        kept.append(role)
        held += roles[role].energy
        if held >= 0.9 * total:
            break
    if len(kept) == len(roles):
        return None
    budget = count({role: each.rank for role, each in roles.items()}, roles)
    ranks = _within_budget(dict.fromkeys(kept, 1.0), {role: roles[role] for role in roles if role in kept}, budget)
    ranks = {role: ranks[role] for role in roles if role in ranks}  # in the model's order
    why = (
        f"these roles hold {held / total:.0%} of the sum of squares of all delta weights, and most of it for their "
        "parameters; they get the parent's count"
    )
    return Proposal("placed", Claim.AS_GOOD, ranks, why)


def _within_budget(wanted: Mapping[str, float], roles: Mapping[str, Role], budget: int) -> dict[str, int]:
    """Whole ranks in proportion to `wanted`, at least 1, of as many parameters as fit the budget.

    >>> roles = {"q": Role(4, 10, 99, 0, 0, 0), "v": Role(4, 10, 99, 0, 0, 0)}
    >>> _within_budget({"q": 1.0, "v": 3.0}, roles, 80)
    {'q': 2, 'v': 6}
    """
    unit = budget / sum(wanted[role] * roles[role].cost for role in wanted)
    exact = {role: min(unit * wanted[role], roles[role].limit) for role in wanted}
    ranks = {role: max(1, math.floor(exact[role] + 1e-9)) for role in wanted}
    while True:
        left = budget - count(ranks, roles)
        open_ = [role for role in ranks if roles[role].cost <= left and ranks[role] < roles[role].limit]
        if not open_:
            return ranks
        ranks[max(open_, key=lambda role: exact[role] - ranks[role])] += 1


def pattern_of(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """`rank.rank` and `rank.pattern` that give these ranks: the most frequent one, and the roles with others.

    >>> pattern_of({"q": 4, "k": 2, "v": 4})
    (4, {'k': 2})
    """
    values = list(ranks.values())
    most = max(dict.fromkeys(values), key=values.count)
    return most, {role: rank for role, rank in ranks.items() if rank != most}


def fresh_seeds(used: Sequence[Any], num: int) -> list[int]:
    """The first seeds above those that reported runs have, none of which any run has had.

    >>> fresh_seeds([0, 1, 2, 1000], 3)
    [3, 4, 5]
    """
    taken = {int(seed) for seed in used}
    found: list[int] = []
    seed = 0
    while len(found) < num:
        if seed not in taken:
            found.append(seed)
        seed += 1
    return found
