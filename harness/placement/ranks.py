"""Which rank each target gets: `rank.rank`, or what `rank.pattern` says of its role and block. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.placement.architectures import GROUPS, OUTSIDE_BLOCKS, ROLES, PlacementError
from harness.placement.select import Target, block_problems, resolve_blocks


def ranks_of(
    targets: Sequence[Target], *, rank: int, pattern: Mapping[str, int], num_blocks: Mapping[str, int]
) -> list[int]:
    """The rank of each target.

    Args:
        targets: of one model, as `select_targets` gives them.
        rank: of targets that no key names.
        pattern: ranks by key: a role or a group, `@` and blocks (`v`, `mlp`, `v@last_half`, `all@0`), as
            `target_layers` has them. Of two keys that name a target, the one whose targets are among those of the other
            decides.
        num_blocks: how many blocks the model has, adapted or not, as `count_blocks` has them by stack.

    Raises:
        PlacementError: a key that names no target, and two keys with different ranks of which neither is the narrower.

    >>> targets = [Target(f"{role}{block}", role, block) for block in (0, 1) for role in ("q", "v")]
    >>> ranks_of(targets, rank=8, pattern={"v": 2, "v@last_1": 4}, num_blocks={"": 2})
    [8, 2, 8, 4]
    """
    named = {key: _named(key, targets, num_blocks) for key in pattern}
    ranks = []
    for number, target in enumerate(targets):
        keys = [key for key in pattern if number in named[key]]
        narrowest = [key for key in keys if not any(named[other] < named[key] for other in keys)]
        if len({pattern[key] for key in narrowest}) > 1:
            shown = ", ".join(f"{key}: {pattern[key]}" for key in narrowest)
            raise PlacementError(
                f"rank.pattern: {shown} give {target} different ranks, and none of them is a part of the other; add a "
                "key for what they share."
            )
        ranks.append(pattern[narrowest[0]] if keys else rank)
    return ranks


def pattern_problems(pattern: Any) -> list[str]:
    """What is wrong with a value of `rank.pattern` on any model; empty when nothing is."""
    if not isinstance(pattern, Mapping) or not pattern:
        return [f"rank.pattern={pattern!r}: ranks by role, such as {{v: 16, mlp@last_half: 4}}, or null."]
    problems = []
    for key, rank in pattern.items():
        role, _, blocks = str(key).partition("@")
        known = (*ROLES, *GROUPS, *OUTSIDE_BLOCKS)
        if role not in known:
            problems.append(
                f"rank.pattern: {key!r} begins with no role; allowed: {', '.join(known)}, each also with blocks, as in "
                "v@last_half or all@0."
            )
        elif "@" in key and not blocks.isdecimal():
            problems += [_of_key(key, problem) for problem in block_problems(blocks)]
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            problems.append(f"rank.pattern: {key}: {rank}: a rank is a whole number, at least 1.")
    return problems


def _of_key(key: Any, problem: str) -> str:
    """What is wrong with the blocks of a key, said of it and not of the placement."""
    return problem.replace("target_layers.blocks", f"rank.pattern: {key!r}, blocks")


def _named(key: str, targets: Sequence[Target], num_blocks: Mapping[str, int]) -> frozenset[int]:
    """The numbers of the targets that a key of `rank.pattern` names, at least one."""
    problems = pattern_problems({key: 1})
    if problems:
        raise PlacementError(problems[0])
    role, _, blocks = key.partition("@")
    roles = GROUPS.get(role, (role,))
    stacks = dict.fromkeys(target.stack for target in targets if target.role in roles)
    try:
        wanted = {
            stack: resolve_blocks([int(blocks)] if blocks.isdecimal() else blocks, num_blocks[stack], stack=stack)
            for stack in (stacks if blocks else ())
        }
    except PlacementError as error:
        raise PlacementError(_of_key(key, str(error))) from None
    named = frozenset(
        number
        for number, target in enumerate(targets)
        if target.role in roles and (not blocks or target.block in wanted[target.stack])
    )
    if not named:
        there = dict.fromkeys(target.role for target in targets if target.role is not None)
        raise PlacementError(
            f"rank.pattern: {key} names nothing that gets an adapter here; there are "
            f"{', '.join(there) or 'no roles, because target_layers.modules names modules'}."
        )
    return named
