"""From a sweep's weights to a sweep file that tests what they suggest, and to the hypotheses for its report."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from analysis import select
from analysis.adapters.findings import Findings, find_in_weights
from analysis.adapters.proposals import Proposal, count, fresh_seeds, pattern_of, propose, roles_of
from analysis.comparisons import Cell, ranked_by
from analysis.load import LoadError, Runs, load_runs
from analysis.tables.cells import cell_name
from analysis.tables.suggestion import Adapter, Hypothesis, Suggestion, write_suggestion
from harness.config.composing import compose, register
from harness.results.effects import is_setting_without_effect
from harness.results.files import RESULT_FILE, write_atomically
from harness.results.schema import read_result

RATE = "trainer.learning_rate"
# Of a run's config what the sweep file says elsewhere, or leaves to the sweep that runs it.
_OF_GRIDS = ("seed", "trial", "sweep", "rank", "target_layers", "method.name", RATE)


def suggest(runs_dir: Path, sweep: str, *, to: Path | None = None, num_seeds: int = 3) -> tuple[Path, Suggestion]:
    """Writes a sweep file that tests what the weights of a sweep's best LoRA suggest against it, on fresh seeds.

    Args:
        runs_dir: where the runs lie, and where the hypotheses are kept.
        sweep: its name; the new one is called `<sweep>_suggested`, or as `to` is.
        to: the sweep file, `sweeps/<sweep>_suggested.yaml` by default; not there yet.
        num_seeds: of each cell.

    Returns:
        The file, and what is claimed.

    Raises:
        LoadError: no such runs, none of plain LoRA with weights, several models or datasets, nothing to propose, or a
            file that is there.
    """
    path = to or Path("sweeps") / f"{sweep}_suggested.yaml"
    if path.exists():
        raise LoadError(f"--to {path}: is there already; name another file, or delete it.")
    if path.suffix != ".yaml" or not re.fullmatch(r"\w[\w.-]*", path.stem) or path.absolute().parent.name != "sweeps":
        raise LoadError(
            f"--to {path}: must be a file NAME.yaml in a folder called sweeps, where sweeps=NAME finds it; a name has "
            "letters, digits, _ - and dots."
        )
    if num_seeds < 2:
        raise LoadError(f"--seeds {num_seeds}: a test needs two seeds at least, and three are usual.")
    runs = load_runs(runs_dir, sweep=sweep)
    cells = select.records(select.best_cells(select.cells(runs.frame)))
    candidates = _candidates(cells, sweep)
    seeds = dict(zip(runs.frame["run_id"], runs.frame["config.seed"], strict=True))
    found = find_in_weights(candidates, seeds, runs_dir)
    parent = _parent(candidates, found)
    roles = roles_of(found.spectra[found.spectra["condition"] == parent])
    cell = found.cells[parent]
    ranks = {role: each.rank for role, each in roles.items()}
    built = cell.get("num_adapter_params")
    if count(ranks, roles) != built:
        raise LoadError(
            f"{cell_name(cell)}: has {built:,.0f} adapter parameters and {count(ranks, roles):,} by its matrices; "
            "suggest works on plain LoRA of one rank for each role."
        )
    proposals = propose(roles)
    if not proposals:
        raise LoadError(
            f"{cell_name(cell)}: its weights use all of its ranks alike ({_named(ranks)}), so there is nothing to "
            "propose; a sweep of higher ranks would show whether there is more to hold."
        )
    config = read_result(runs_dir / cell["run_ids"][0] / RESULT_FILE).config
    base = Adapter(config["rank"]["rank"], config["rank"].get("pattern") or {}, config["target_layers"]["name"])
    adapters = [_adapter(each, base, ranks) for each in proposals]
    hypotheses = [
        Hypothesis(each.name, each.claim, each.why, adapter, base, count(each.ranks, roles), count(ranks, roles))
        for each, adapter in zip(proposals, adapters, strict=True)
    ]
    suggestion = Suggestion(path.stem, sweep, hypotheses)
    fresh = fresh_seeds([*runs.frame["config.seed"], *runs.trials.get("config.seed", [])], num_seeds)
    tested = zip([base, *adapters], [None, *proposals], strict=True)
    grids = [_grid(config, adapter, proposal, fresh) for adapter, proposal in tested]
    is_searched = _is_searched(runs)
    command = command_of(path, runs_dir)
    text = _sweep_file(suggestion, config, grids, is_searched=is_searched, parent=cell_name(cell), command=command)
    write_atomically(path, text.encode())
    write_suggestion(runs_dir, suggestion)
    return path, suggestion


def command_of(path: Path, runs_dir: Path) -> str:
    """What runs a sweep file, with its runs where the hypotheses are kept."""
    words = ["python -m harness -m", f"sweeps={path.stem}"]
    if path.parent != Path("sweeps"):
        words.append(f"--config-dir {shlex.quote(str(path.parent.parent))}")
    if runs_dir != Path("runs"):
        words.append(shlex.quote(f"runs_dir={runs_dir}"))
    return " ".join(words)


def _candidates(cells: Sequence[Cell], sweep: str) -> list[Cell]:
    own = [cell for cell in cells if cell["method"] == "lora" and cell["num_finished"]]
    if not own:
        raise LoadError(f"sweep={sweep!r}: no finished run of plain LoRA; suggest proposes ranks and placements of it.")
    subjects = {(cell["model"], cell["dataset"]) for cell in own}
    if len(subjects) > 1:
        shown = ", ".join(f"{model} on {dataset}" for model, dataset in sorted(subjects))
        raise LoadError(
            f"sweep={sweep!r}: is about {shown}; suggest works on one model and dataset; run each as its own sweep."
        )
    return own


def _parent(candidates: Sequence[Cell], found: Findings) -> int:
    """The condition that is best on val. Raises `LoadError` where its weights could not be read."""
    best = candidates[ranked_by(candidates, select.score(candidates[0], "val"))[0]]
    for index in dict.fromkeys(found.spectra["condition"]):
        if found.cells[int(index)]["cell_id"] == best["cell_id"]:
            return int(index)
    raise LoadError(
        f"{cell_name(best)}: is the best LoRA on val, and its weights cannot be read; suggest proposes what they say."
        + "".join(f"\n  {problem}" for problem in found.problems)
    )


def _adapter(proposal: Proposal, parent: Adapter, ranks: Mapping[str, int]) -> Adapter:
    rank, pattern = pattern_of(proposal.ranks)
    same = proposal.ranks.keys() == ranks.keys()
    return Adapter(rank, pattern, parent.target_layers if same else "_".join(proposal.ranks))


def _grid(
    config: Mapping[str, Any], adapter: Adapter, proposal: Proposal | None, seeds: Sequence[int]
) -> dict[str, Any]:
    """The axes of one cell: everything by its value, so that no preset has to be there."""
    rank, placement = config["rank"], config["target_layers"]
    named = {f"target_layers.{name}": placement[name] for name in ("blocks", "stacks", "modules") if name in placement}
    projections = placement["projections"]
    if proposal is not None and adapter.target_layers != placement["name"]:
        projections = list(proposal.ranks)
    return {
        "method": "lora",
        "rank": "r8",
        "rank.rank": adapter.rank,
        **{f"rank.{name}": rank[name] for name in ("alpha_policy", "alpha", "alpha_per_rank")},
        **({"rank.pattern": [dict(adapter.pattern)]} if adapter.pattern else {}),
        "target_layers": "qv",
        "target_layers.name": adapter.target_layers,
        "target_layers.projections": [list(projections)],
        **{name: [value] for name, value in named.items()},
        RATE: config["trainer"]["learning_rate"],
        "seed": list(seeds),
    }


def _is_searched(runs: Runs) -> bool:
    return any(RATE in cell.axes for launch in runs.launches[-1:] for cell in launch.searched)


def _sweep_file(
    suggestion: Suggestion,
    config: Mapping[str, Any],
    grids: Sequence[dict[str, Any]],
    *,
    is_searched: bool,
    parent: str,
    command: str,
) -> str:
    num_runs = sum(len(grid["seed"]) for grid in grids)
    sweeper: dict[str, Any] = {"grids": [dict(grid) for grid in grids]}
    if is_searched:
        sweeper = {"search": {"axis": RATE}, **sweeper}
        for grid in sweeper["grids"]:
            del grid[RATE]
    body = {**_differences(config), "sweep": suggestion.sweep, "hydra": {"mode": "MULTIRUN", "sweeper": sweeper}}
    how = "each at a learning rate that a search finds for it on val" if is_searched else "all at its learning rate"
    head = [
        "# @package _global_",
        f"# Which table: what the weights of {suggestion.parent_sweep} suggest, against its best adapter ({parent}),",
        f"#   {how}, on fresh seeds. Its report says whether each proposal has held.",
        f"# Command: {command}",
        f"# Runs: {num_runs}",
        "# Proposals:",
        *(
            f"#   {one.name}: {one.claim}; {one.num_params:,} adapter parameters, the parent {one.parent_num_params:,}"
            for one in suggestion.hypotheses
        ),
    ]
    return "\n".join(head) + "\n" + OmegaConf.to_yaml(OmegaConf.create(body))


def _differences(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that differ from those that are composed where nothing is said, nested."""
    register()
    composed = OmegaConf.to_container(compose(["method=lora", "rank=r8", "target_layers=qv"]), resolve=True)
    found: dict[str, Any] = {}
    for name, value in _leaves(config):
        if is_setting_without_effect(name) or any(name == each or name.startswith(f"{each}.") for each in _OF_GRIDS):
            continue
        here: Any = composed
        for part in name.split("."):
            here = here.get(part) if isinstance(here, dict) else None
        if here == value:
            continue
        inner = found
        *groups, leaf = name.split(".")
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = value
    return found


def _leaves(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in config.items():
        leaves += (
            _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else [(prefix + name, value)]
        )
    return leaves


def _named(ranks: Mapping[str, int]) -> str:
    return ", ".join(f"{role} {rank}" for role, rank in ranks.items())
