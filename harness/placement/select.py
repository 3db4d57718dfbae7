"""Placement: from the names of a model's modules to the targets that get an adapter, each a module or some of its rows.

Names in, targets out: nothing here knows torch. A base model is described by where its blocks are and what the
projections inside one block are called; a placement asks for projections by role (`q`, `v`, `up`, ...) and for
blocks by index. Names are compared whole: a request that selects nothing is an error, never a smaller adapter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.placement.architectures import (
    ARCHITECTURES,
    EMBEDDING,
    GROUPS,
    OUTSIDE_BLOCKS,
    ROLES,
    STACKS,
    UNEMBEDDING,
    Architecture,
    PlacementError,
    Rows,
    find_architecture,
    head_modules,
)


@dataclass(frozen=True)
class Target:
    """What gets one adapter.

    Attributes:
        module: the module's name.
        role: which projection of its block it is; None where it was named by an expression.
        stack: of an encoder-decoder, which of `STACKS` its block is in; else ''.
        block: the index of its block; None outside the blocks, and where it was named by an expression.
        rows: the rows of the module's matrix; None for all of them.
        rank: the rank of its adapter; None for methods without rank.
    """

    module: str
    role: str | None = None
    block: int | None = None
    rows: Rows | None = None
    rank: int | None = None
    stack: str = ""

    def __str__(self) -> str:
        """The module's name, with the role in brackets where other rows of it are other roles."""
        return self.module if self.rows is None else f"{self.module}[{self.role}]"


def select_targets(
    module_names: Iterable[str],
    *,
    model_type: str,
    config: Any = None,
    projections: Sequence[str] = (),
    blocks: Any = "all",
    stacks: Any = "all",
    modules: Sequence[str] = (),
    language_model: bool = False,
    head: Sequence[str] | None = None,
    linear: Mapping[str, tuple[int, int]] | None = None,
) -> list[Target]:
    """What gets an adapter, in the model's own order; parts of a module in the order of their rows.

    Args:
        module_names: every name in `model.named_modules()`.
        model_type: transformers' name of the architecture, a key of `ARCHITECTURES`.
        config: transformers' config of the model, from which the rows of roles are read that share a matrix.
        projections: roles or groups of roles; see `ROLES` and `GROUPS`. Also `embedding`, and on a language model
            `lm_head`, the unembedding: each is one module whatever `blocks` says.
        blocks: `all`, `first_half`, `last_half`, `first_N`, `last_N` or a list of indices; in each stack by itself.
        stacks: `all`, or of an encoder-decoder a list of some of `STACKS`.
        modules: instead of projections, regular expressions over whole names, each matching at least one, and none a
            part of the task head.
        language_model: whether this is a causal language model, which has an unembedding and no task head, instead of
            a classifier.
        head: the modules of the task head, where these are more than the architecture's (see `Architecture.optional`)
            or it is not described.
        linear: in and out features of the model's linear layers by name, for messages.

    Raises:
        PlacementError: a role, block or expression that selects nothing here, with a list of what there is.

    >>> names = [f"bert.encoder.layer.{i}.attention.self.{p}" for i in (0, 1) for p in ("query", "key", "value")]
    >>> [str(target) for target in select_targets(names, model_type="bert", projections=["q"], blocks="last_1")]
    ['bert.encoder.layer.1.attention.self.query']
    """
    names = list(module_names)
    if modules:
        if head is None:
            head = head_modules(model_type, language_model=language_model)
        return [Target(name) for name in _match_expressions(names, modules, head, linear or {})]
    if model_type not in ARCHITECTURES and linear:
        raise PlacementError(
            f"model type {model_type!r} is not described in harness/placement/architectures.py and has no roles; name "
            "modules by expressions in target_layers.modules (and set target_layers.projections=[]), or add an "
            f"Architecture. {layers_there(linear)}"
        )
    architecture = find_architecture(model_type)
    if not projections:
        raise PlacementError("target_layers: neither projections nor modules are given.")
    num_blocks = count_blocks(names, model_type=model_type)
    for stack, count in num_blocks.items():
        if count == 0:
            raise PlacementError(
                f"target_layers: a {model_type} model has blocks named {architecture.stacks[stack].block}, and there "
                f"is none here; names here are like {_examples(names)}."
            )
    chosen_stacks = resolve_stacks(stacks, model_type, architecture)
    roles = _resolve_roles(projections, model_type, architecture, chosen_stacks, language_model)
    order = {name: number for number, name in enumerate(names)}
    if architecture.shares_blocks and blocks != "all":
        raise PlacementError(
            f"target_layers.blocks={blocks}: a {model_type} model passes its blocks several times, and with them their "
            "adapters; set target_layers.blocks=all."
        )
    in_blocks = [role for role in roles if role not in OUTSIDE_BLOCKS]
    targets = [
        _target_in_block(architecture, stack, role, block, config, order)
        for stack in chosen_stacks
        for block in resolve_blocks(blocks, num_blocks[stack], stack=stack)
        for role in in_blocks
        if role in architecture.parts or role in architecture.stacks[stack].projections
    ]
    if architecture.differs_by_block:
        targets = [target for target in targets if target.module in order]
        found = {target.role for target in targets}
        nowhere = [role for role in projections if role in ROLES and role not in found]
        if nowhere:
            raise PlacementError(
                f"target_layers.projections={list(projections)}: the blocks of {model_type} models differ, and here no "
                f"block of {blocks} has {', '.join(nowhere)}."
            )
    outside = {EMBEDDING: architecture.embedding, UNEMBEDDING: architecture.unembedding}
    targets += [Target(path, role) for role, path in outside.items() if role in roles and path is not None]
    absent = sorted({target.module for target in targets} - order.keys())
    if absent:
        raise PlacementError(f"target_layers: this {model_type} model has no module {', '.join(absent)}.")
    return sorted(targets, key=lambda target: (order[target.module], target.rows.start if target.rows else 0))


def summary(targets: Sequence[Target]) -> dict[str, dict[str, Any]]:
    """How many targets each role has, and their ranks; those without a role are called `modules`.

    >>> summary([Target("a", "q", 0, rank=8), Target("b", "q", 1, rank=4), Target("c")])
    {'q': {'num_targets': 2, 'ranks': [4, 8]}, 'modules': {'num_targets': 1}}
    """
    by_role: dict[str, list[Target]] = {}
    for target in targets:
        by_role.setdefault(target.role or "modules", []).append(target)
    found: dict[str, dict[str, Any]] = {}
    for role, those in by_role.items():
        ranks = sorted({target.rank for target in those if target.rank is not None})
        found[role] = {"num_targets": len(those), **({"ranks": ranks} if ranks else {})}
    return found


def _target_in_block(
    architecture: Architecture, stack: str, role: str, block: int, config: Any, names: Mapping[str, int]
) -> Target:
    part = architecture.parts.get(role)
    own = architecture.stacks[stack]
    paths = own.projections[role if part is None else part.whole].split("|")
    modules = [f"{own.block.format(block)}.{path}" for path in paths]
    rows = None if part is None else part.rows(config)
    return Target(next((name for name in modules if name in names), modules[0]), role, block, rows, stack=stack)


def count_blocks(module_names: Iterable[str], *, model_type: str) -> dict[str, int]:
    """How many blocks there are among the names of a model's modules, by stack (`Architecture.stacks`).

    Raises `PlacementError` for an unknown type.
    """
    names = _ancestors(module_names)
    patterns = {stack: re.compile(own.block_pattern) for stack, own in find_architecture(model_type).stacks.items()}
    return {
        stack: len({int(match.group(1)) for match in map(pattern.fullmatch, names) if match})
        for stack, pattern in patterns.items()
    }


def resolve_stacks(stacks: Any, model_type: str, architecture: Architecture) -> list[str]:
    """The names in `Architecture.stacks` that a value of `target_layers.stacks` chooses. Raises `PlacementError`."""
    problems = stack_problems(stacks)
    if problems:
        raise PlacementError(problems[0])
    chosen = canonical_stacks(stacks)
    if chosen == "all" and (stacks == "all" or architecture.beside_encoder):
        return list(architecture.stacks)
    if not architecture.beside_encoder:
        raise PlacementError(
            f"target_layers.stacks={list(stacks)}: a {model_type} model is no encoder-decoder and has one stack of "
            "blocks; set target_layers.stacks=all."
        )
    return list(chosen)


def stack_problems(stacks: Any) -> list[str]:
    """What is wrong with a value of `target_layers.stacks` on any model; empty when nothing is."""
    if stacks == "all":
        return []
    is_list = isinstance(stacks, list | tuple) and len(stacks) > 0
    if is_list and all(each in STACKS and stacks.count(each) == 1 for each in stacks):
        return []
    return [f"target_layers.stacks={stacks!r}: allowed: all, or a list of some of {', '.join(STACKS)}."]


def canonical_stacks(stacks: Any) -> Any:
    """One spelling for values of `target_layers.stacks` that always choose the same.

    >>> canonical_stacks(["cross", "encoder"]), canonical_stacks(["decoder", "cross", "encoder"])
    (['encoder', 'cross'], 'all')
    """
    if isinstance(stacks, str):
        return stacks
    return "all" if len(stacks) == len(STACKS) else sorted(stacks, key=STACKS.index)


def resolve_blocks(blocks: Any, num_blocks: int, *, stack: str = "") -> list[int]:
    """Indices of the blocks that `blocks` names in a model or stack of `num_blocks`, ascending.

    Raises `PlacementError` for blocks that are not there.

    >>> resolve_blocks("last_half", 6), resolve_blocks("first_2", 6), resolve_blocks([5, 0], 6)
    ([3, 4, 5], [0, 1], [0, 5])
    """
    problems = block_problems(blocks)
    if problems:
        raise PlacementError(problems[0])
    this = f"this model's {stack}" if stack else "this model"
    if isinstance(blocks, str):
        if blocks == "all":
            return list(range(num_blocks))
        end, _, amount = blocks.partition("_")
        # The middle block of an odd number belongs to the last half, so that the two halves are disjoint.
        first_half = num_blocks // 2
        count = int(amount) if amount != "half" else (first_half if end == "first" else num_blocks - first_half)
        if count > num_blocks:
            raise PlacementError(f"target_layers.blocks={blocks}: {this} has {num_blocks} blocks.")
        if count == 0:
            raise PlacementError(f"target_layers.blocks={blocks}: that is none of {this}'s {num_blocks} blocks.")
        return list(range(count)) if end == "first" else list(range(num_blocks - count, num_blocks))
    outside = [block for block in blocks if block >= num_blocks]
    if outside:
        raise PlacementError(
            f"target_layers.blocks={list(blocks)}: {outside} do not exist; {this} has blocks 0 to {num_blocks - 1}."
        )
    return sorted(blocks)


def block_problems(blocks: Any) -> list[str]:
    """What is wrong with a value of `target_layers.blocks` on any model; empty when nothing is."""
    allowed = "allowed: all, first_half, last_half, first_N, last_N (N from 1), or a list of indices such as [0,2,5]."
    if isinstance(blocks, str):
        fine = blocks == "all" or re.fullmatch(r"(first|last)_(half|[1-9]\d*)", blocks) is not None
    else:
        fine = (
            isinstance(blocks, list | tuple)
            and len(blocks) > 0
            and all(isinstance(block, int) and not isinstance(block, bool) and block >= 0 for block in blocks)
            and len(set(blocks)) == len(blocks)
        )
    return [] if fine else [f"target_layers.blocks={blocks!r}: {allowed}"]


def canonical_projections(projections: Sequence[str]) -> list[str]:
    """Roles in a fixed order: modules get their adapters in the model's own order, whatever the order here."""
    known = (*ROLES, *GROUPS, UNEMBEDDING, EMBEDDING)
    return sorted(projections, key=known.index)


def projection_problems(projections: Sequence[str], *, language_model: bool = False) -> list[str]:
    """Roles that exist on no architecture, and roles named twice; empty when there are none.

    `lm_head` exists on language models alone.
    """
    known = (*ROLES, EMBEDDING, *((UNEMBEDDING,) if language_model else ()), *GROUPS)
    unknown = [role for role in projections if role not in known]
    if UNEMBEDDING in unknown:
        return [
            f"target_layers.projections: {UNEMBEDDING} is the unembedding of a causal language model; a model with a "
            "task head has none. Leave it out."
        ]
    if unknown:
        return [f"target_layers.projections: {', '.join(unknown)} unknown; known: {', '.join(known)}."]
    expanded = [role for name in projections for role in GROUPS.get(name, (name,))]
    twice = sorted({role for role in expanded if expanded.count(role) > 1})
    return [f"target_layers.projections: {', '.join(twice)} named twice."] if twice else []


def _resolve_roles(
    projections: Sequence[str],
    model_type: str,
    architecture: Architecture,
    stacks: Sequence[str],
    language_model: bool,
) -> list[str]:
    problems = projection_problems(projections, language_model=language_model)
    if problems:
        raise PlacementError(problems[0])
    roles: list[str] = []
    in_blocks = dict.fromkeys(role for stack in stacks for role in architecture.stacks[stack].projections)
    has = [*architecture.parts, *in_blocks]
    if architecture.embedding is not None:
        has.append(EMBEDDING)
    if language_model and architecture.unembedding is not None:
        has.append(UNEMBEDDING)
    for name in projections:
        refused = [role for role in GROUPS.get(name, (name,)) if role in architecture.refused]
        found = [role for role in GROUPS.get(name, ()) if role in in_blocks]
        if refused:
            problems.append(f"{name} cannot be adapted: {architecture.refused[refused[0]]}")
        elif found:
            roles += found
        elif name in GROUPS:
            problems.append(f"it has nothing of {name}")
        elif name in has:
            roles.append(name)
        else:
            problems.append(f"{name} does not exist")
    problems += [
        f"{part} is a part of {architecture.parts[part].whole}, which is adapted whole"
        for part in roles
        if part in architecture.parts and architecture.parts[part].whole in roles
    ]
    if problems:
        groups = [group for group, roles_in in GROUPS.items() if not in_blocks.keys().isdisjoint(roles_in)]
        raise PlacementError(
            f"target_layers.projections={list(projections)} on {model_type}: {'; '.join(problems)}. "
            f"It has: {', '.join(has)} (and the groups {', '.join(groups)})."
        )
    return roles


def _ancestors(names: Iterable[str]) -> set[str]:
    """The names and every dotted prefix of them, so that a list without the containers themselves will do."""
    found: set[str] = set()
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return found


def layers_there(linear: Mapping[str, tuple[int, int]]) -> str:
    """The linear layers of a model, those of all blocks as one, with how many there are and of which shape."""
    counts = Counter((re.sub(r"\.\d+(?=\.|$)", ".N", name), *features) for name, features in linear.items())
    shown = (f"{count} x {name} ({inside} -> {out})" for (name, inside, out), count in counts.items())
    return f"Its linear layers: {', '.join(shown)}."


def _match_expressions(
    names: Sequence[str], expressions: Sequence[str], head: Sequence[str], linear: Mapping[str, tuple[int, int]]
) -> list[str]:
    hits = {expression: [name for name in names if re.fullmatch(expression, name)] for expression in expressions}
    empty = [expression for expression, found in hits.items() if not found]
    if empty:
        raise PlacementError(
            f"target_layers.modules: {', '.join(map(repr, empty))} match no whole module name. "
            f"{layers_there(linear) if linear else f'Names here are like {_examples(names)}.'}"
        )
    chosen = {name for found in hits.values() for name in found}
    in_head = sorted(name for name in chosen if any(f"{name}.".startswith(f"{module}.") for module in head))
    if in_head:
        raise PlacementError(
            f"target_layers.modules: {', '.join(in_head)} belong to the task head, which is trained whole and takes no "
            "adapter; name the others alone."
        )
    return [name for name in names if name in chosen]


def _examples(names: Sequence[str]) -> str:
    # The model itself, whose name is empty, is among `named_modules`.
    leaves = [name for name in names if name and not any(other.startswith(name + ".") for other in names)]
    return ", ".join(leaves[:8])
