"""How many parameters a run has, from shapes on the meta device, and the ranks that meet a budget of them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from harness.config.schema import RunConfig
from harness.forecast.request import ForecastError, UnmetError, explained
from harness.methods.adapting import lora_layers
from harness.methods.counts import ParameterCounts, count_parameters
from harness.methods.lora import LowRank
from harness.methods.peft_files import adapter_bytes
from harness.methods.registry import is_adapter
from harness.placement.select import summary
from harness.plan import AdaptedSkeleton, adapted_skeleton
from harness.results.methods import METHODS

# Ranks that are tried of a method of which no matrix limits the rank.
_LARGEST_RANK = 2**16


@dataclass(frozen=True)
class RunSize:
    """What a run trains and keeps.

    Attributes:
        counts: adapter, head, trainable and all parameters.
        saved_bytes: of the tensors that the run saves; a file also has a header of about 100 bytes a tensor.
        placement: adapted projections by role, as a result records them; empty for a method without placement.
    """

    counts: ParameterCounts
    saved_bytes: int
    placement: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Solution:
    """Ranks whose adapter has at most `budget` parameters.

    Attributes:
        budget: what was asked for.
        num_adapter_params: what the built model has.
        rank: `rank.rank`.
        pattern: `rank.pattern`, the roles that have another rank; empty for one rank.
        next_above: the fewest parameters above the budget that one more rank of everything has; None at the largest.
    """

    budget: int
    num_adapter_params: int
    rank: int
    pattern: Mapping[str, int]
    next_above: int | None

    @property
    def residual(self) -> int:
        """Parameters of the budget that are left over."""
        return self.budget - self.num_adapter_params

    @property
    def overrides(self) -> list[str]:
        """What sets these ranks on the command line of a run."""
        pattern = ",".join(f"{role}:{rank}" for role, rank in self.pattern.items())
        return [f"rank.rank={self.rank}", *([f"rank.pattern={{{pattern}}}"] if pattern else [])]


def size_of(config: RunConfig, *, num_labels: int = 2) -> RunSize:
    """Counts a run's parameters without its weights. Raises `ForecastError`."""
    adapted = _build(config, num_labels)
    counts = _count(adapted, config)
    placed = summary(adapted.targets) if adapted.targets else {}
    return RunSize(counts, _saved_bytes(adapted, config, counts), placed)


def solve_rank(config: RunConfig, budget: int, *, per_role: bool = False, num_labels: int = 2) -> Solution:
    """The largest rank whose adapter has at most `budget` parameters; the head does not count.

    Args:
        config: of a method with a rank; its own rank does not matter, its policy of alpha stays.
        budget: adapter parameters.
        per_role: whether some roles may have one rank more than the others, so that less is left over, and roles whose
            matrices are too small for it a lower one.
        num_labels: outputs of the head.

    Raises:
        UnmetError: a budget below what rank 1 has, or above what the largest rank has.
        ForecastError: a method without a rank, a run that cannot be built.
    """
    method = METHODS[config.method.name]
    if config.rank is None or not method.uses_rank:
        ranked = ", ".join(name for name, each in METHODS.items() if each.uses_rank)
        raise ForecastError(
            f"method={config.method.name}: has no rank to solve; a budget is met by a method with one: {ranked}."
        )
    if budget < 1:
        raise ForecastError(
            f"a budget of {budget} adapter parameters: give a whole number of adapter parameters, at least 1."
        )

    def at(rank: int, pattern: Mapping[str, int] | None = None) -> RunConfig:
        assert config.rank is not None
        own = replace(config.rank, rank=rank, pattern=dict(pattern) if pattern else None)
        return replace(config, rank=own)

    known: dict[str, int] = {}

    def count(rank: int, pattern: Mapping[str, int] | None = None) -> int:
        candidate = at(rank, pattern)
        key = repr(candidate.rank)
        if key not in known:
            known[key] = _count(_build(candidate, num_labels), candidate).num_adapter_params
        return known[key]

    roles = _roles(_build(at(1), num_labels), config) if per_role else []
    fewest = count(1)
    if budget < fewest:
        raise UnmetError(
            f"a budget of {budget:,} adapter parameters: nothing here has so few; the nearest above is rank 1 with "
            f"{fewest:,}. Adapt fewer projections or blocks (target_layers), or raise the budget."
        )
    if per_role:
        return _solve_per_role(roles, budget, count)
    limit = min((each.limit for each in _roles_if_lora(_build(at(1), num_labels))), default=_LARGEST_RANK)
    rank = _largest_rank(count, budget, limit)
    found = count(rank)
    if rank == limit and found < budget:
        raise _too_large(budget, rank, found)
    return Solution(budget, found, rank, {}, count(rank + 1) if rank < limit else None)


def _too_large(budget: int, rank: int, found: int) -> UnmetError:
    return UnmetError(
        f"a budget of {budget:,} adapter parameters: nothing here has so many; the nearest below is rank {rank}, the "
        f"largest that the matrices allow, with {found:,}. Adapt more projections or blocks (target_layers), or "
        "lower the budget."
    )


def _largest_rank(count: Callable[[int], int], budget: int, limit: int) -> int:
    """The largest rank up to `limit` that counts at most `budget`; rank 1 does."""
    # Of most methods the count is a line, so that a guess from two ranks is right.
    low, high = 1, limit + 1
    if limit > 1:
        first, second = count(1), count(2)
        if second > first:
            guess = min(limit, 1 + (budget - first) // (second - first))
            if count(guess) <= budget:
                low = guess
                if guess < limit and count(guess + 1) > budget:
                    return guess
            else:
                high = guess
    while high - low > 1:
        middle = (low + high) // 2
        if count(middle) <= budget:
            low = middle
        else:
            high = middle
    return low


# ---------------------------------------------------------------- ranks by role


@dataclass(frozen=True)
class _Role:
    """A role: parameters that one more rank adds to it, over all its blocks, and the largest rank that it allows."""

    name: str
    per_rank: int
    limit: int


def _roles_if_lora(adapted: AdaptedSkeleton) -> list[_Role]:
    layers = dict(lora_layers(adapted.model))
    found: dict[str, _Role] = {}
    for target in adapted.targets:
        if target.module in layers:
            update = layers[target.module].updates()[str(target.role) if target.rows is not None else ""]
            name = target.role or ""
            before = found.get(name, _Role(name, 0, _LARGEST_RANK))
            limit = min(before.limit, update.in_features, update.out_features)
            found[name] = _Role(name, before.per_rank + _per_rank(update), limit)
    return list(found.values())


def _per_rank(update: LowRank) -> int:
    return update.in_features + update.out_features


def _roles(adapted: AdaptedSkeleton, config: RunConfig) -> list[_Role]:
    roles = _roles_if_lora(adapted)
    if not roles or not METHODS[config.method.name].has_variants:
        raise ForecastError(f"method={config.method.name}: has one rank for all; ranks by role are of method=lora.")
    if any(not role.name for role in roles):
        raise ForecastError(
            "target_layers.modules: names modules and no roles, so there are no ranks by role; use "
            "target_layers.projections, or solve one rank for all."
        )
    return roles


def _solve_per_role(roles: list[_Role], budget: int, count: Callable[[int, Mapping[str, int]], int]) -> Solution:
    """As equal ranks as the matrices allow, then one more for those roles that leave the least of the budget."""
    rest = budget - (count(1, {}) - sum(role.per_rank for role in roles))  # what is in no rank, as DoRA's magnitudes

    def total(level: int) -> int:
        return sum(role.per_rank * min(level, role.limit) for role in roles)

    largest = max(role.limit for role in roles)
    level = _largest_rank(total, rest, largest)
    raisable = [role for role in roles if role.limit > level]
    chosen = max(
        (
            subset
            for size in range(len(raisable) + 1)
            for subset in itertools.combinations(raisable, size)
            if total(level) + sum(role.per_rank for role in subset) <= rest
        ),
        # Of equal sums the one of fewer exceptions.
        key=lambda subset: (sum(role.per_rank for role in subset), -len(subset)),
    )
    ranks = {role.name: min(level, role.limit) + (role in chosen) for role in roles}
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: rank for name, rank in ranks.items() if rank != common}
    found = count(common, pattern)
    if level == largest and found < budget:
        raise _too_large(budget, level, found)
    above = budget - rest + total(level + 1) if level < largest else None
    return Solution(budget, found, common, pattern, above)


# ---------------------------------------------------------------- counting


def _build(config: RunConfig, num_labels: int) -> AdaptedSkeleton:
    with explained():
        return adapted_skeleton(config, num_labels=num_labels)


def _count(adapted: AdaptedSkeleton, config: RunConfig) -> ParameterCounts:
    return count_parameters(adapted.model, adapted.head, is_adapter=is_adapter(adapted.model, config))


def _saved_bytes(adapted: AdaptedSkeleton, config: RunConfig, counts: ParameterCounts) -> int:
    if METHODS[config.method.name].trains_base:
        return counts.num_total_params * 4  # in float32, as everything that is trained
    if _roles_if_lora(adapted):
        return adapter_bytes(adapted.model, adapted.head)
    return counts.num_trainable_params * 4
