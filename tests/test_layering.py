"""Who may import whom: rooms import from the rooms below them, without cycles, and some imports have one home.

An `ast` reading of every module, so imports inside functions count too; those under `if TYPE_CHECKING:` do not.
A fresh interpreter shows what an `ast` reading cannot: what the imports of the imports load.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("harness", "analysis", "hydra_plugins")

# From the ground up: a package with all its modules, or a module by itself. A room knows those before it.
ROOMS = (
    "harness",
    "harness.extensions",
    "harness.results",
    "harness.placement",
    "harness.config",
    "harness.processes",
    "harness.content",
    "harness.folder",
    "harness.measure",
    "harness.tracking",
    "harness.data",
    "harness.models",
    "harness.methods",
    "harness.tasks",
    "harness.training",
    "harness.plan",
    "harness.chain",
    "harness.prepare",
    "harness.throughput",
    "harness.base_scores",
    "harness.score",
    "harness.save",
    "harness.run",
    "harness.forecast",
    "harness.saved",
    "harness.deltas",
    "harness.evaluate",
    "harness.gradients",
    "harness.export",
    "harness.commands",
    "harness.__main__",
    "harness.new_project",
    "hydra_plugins.lora_harness",
    "analysis.code_spans",
    "analysis.names",
    "analysis.metrics",
    "analysis.trials",
    "analysis.forked",
    "analysis.load",
    "analysis",
    "analysis.archive",
    "analysis.papers",
    "analysis.comparisons",
    "analysis.interquartile",
    "analysis.tuning",
    "analysis.predictions",
    "analysis.methods",
    "analysis.recipes",
    "analysis.axes",
    "analysis.select",
    "analysis.mean_ranks",
    "analysis.curves",
    "analysis.tables",
    "analysis.figures",
    "analysis.page",
    "analysis.adapters",
    "analysis.report",
    "analysis.status",
    "analysis.audit",
    "analysis.budget",
    "analysis.latency",
    "analysis.__main__",
    "harness.cli",
)

# Between our own packages: analysis reads results and nothing else of the harness, so that it runs without torch.
PACKAGES_SEEN_BY = {"harness": {"harness"}, "analysis": {"analysis"}, "hydra_plugins": {"hydra_plugins", "harness"}}
# The command that has the other two as subcommands.
SEES_ANALYSIS = ("harness.cli",)
HARNESS_SEEN_BY_ANALYSIS = ("harness.results",)
HARNESS_SEEN_BY = {
    # It reads weights, of runs that have ended.
    "analysis.adapters": (
        *("harness.results", "harness.methods", "harness.placement", "harness.config", "harness.content"),
        *("harness.saved", "harness.deltas", "harness.evaluate", "harness.gradients"),
    ),
    # The commands; what they print is worked out in the harness, which alone knows models.
    "analysis.audit": ("harness.results", "harness.forecast"),
    "analysis.budget": ("harness.results", "harness.forecast"),
    "analysis.latency": ("harness.results", "harness.forecast"),
    # Imported late, when a report is to go to W&B.
    "analysis.__main__": ("harness.results", "harness.tracking", "harness.config", "harness.extensions"),
}

# Libraries that one room alone talks to.
HOMES = {
    **dict.fromkeys(("wandb", "trackio", "tensorboard"), ("harness.tracking",)),
    "transformers": ("harness.models",),
    "tokenizers": ("harness.models",),
    **dict.fromkeys(("sacrebleu", "rouge_score", "nltk"), ("harness.tasks",)),
    "datasets": ("harness.data",),
    "peft": ("harness.methods",),
}

# Libraries that a room must not know.
BANNED = {
    "harness.config": {"torch", "pandas"},
    "harness.results": {"torch", "pandas", "omegaconf", "hydra"},
    "harness.placement": {"torch", "pandas"},
    "harness.training": {"hydra", "omegaconf"},
    **{room: {"torch"} for room in ROOMS if room.startswith("analysis") and room != "analysis.adapters"},
}


def room_of(module: str) -> str | None:
    """The room of a module: its own, or that of the package that it is in."""
    if module in ROOMS:
        return module
    parts = module.split(".")
    # The top-level packages hold no modules but those with rooms of their own.
    packages = (".".join(parts[:length]) for length in range(len(parts) - 1, 1, -1))
    return next((package for package in packages if package in ROOMS), None)


def _is_in(module: str, rooms: tuple[str, ...]) -> bool:
    return room_of(module) in rooms


def find_violations(root: Path) -> list[str]:
    """Returns one sentence for every import below `root` that breaks a rule, sorted."""
    modules = {name: (package, tree) for name, package, tree in _modules(root)}
    violations = [
        f"{name} has no room: give it one in ROOMS of tests/test_layering.py"
        for name in modules
        if room_of(name) is None
    ]
    graph: dict[str, set[str]] = {}
    for importer, (package, tree) in modules.items():
        for target in _imports(package, tree, set(modules) | set(ROOMS)):
            if target.partition(".")[0] in PACKAGES:
                if target != importer:
                    graph.setdefault(importer, set()).add(target)
                violations += _check_own(importer, target, exists=target in modules or target in ROOMS)
            else:
                violations += _check_library(importer, target.partition(".")[0])
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        violations.append(f"import cycle: {' <- '.join(error.args[1])}")
    return sorted(set(violations))


def _modules(root: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """Yields name, enclosing package (of an `__init__`, itself) and syntax tree of every module below `root`."""
    for top_level in PACKAGES:
        for path in sorted((root / top_level).rglob("*.py")):
            package = ".".join(path.parent.relative_to(root).parts)
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            yield name, package, ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _imports(package: str, tree: ast.Module, known: set[str]) -> Iterator[str]:
    """Yields the modules that `tree`, a module of `package`, imports; of `from harness import run`, the submodule."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            ancestor = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*ancestor, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield submodule if submodule in known else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))


def _check_own(importer: str, target: str, *, exists: bool) -> Iterator[str]:
    package, target_package = importer.partition(".")[0], target.partition(".")[0]
    room, target_room = room_of(importer), room_of(target)
    if package == "analysis" and target_package == "harness":
        allowed = HARNESS_SEEN_BY.get(room or "", HARNESS_SEEN_BY_ANALYSIS)
        if not _is_in(target, allowed):
            yield f"{importer} imports {target}: of the harness it may know {', '.join(allowed)}"
    elif target_package not in PACKAGES_SEEN_BY[package] and not (
        target_package == "analysis" and importer in SEES_ANALYSIS
    ):
        yield f"{importer} imports {target}: {package} must not know {target_package}"
    elif not exists:
        yield f"{importer} imports {target}, which does not exist"
    elif room is not None and target_room is not None and ROOMS.index(target_room) > ROOMS.index(room):
        yield f"{importer} imports {target}: {target_room} is above {room}"


def _check_library(importer: str, library: str) -> Iterator[str]:
    if library in HOMES and not _is_in(importer, HOMES[library]):
        yield f"{importer} imports {library}: only {' and '.join(HOMES[library])} does"
    if library in BANNED.get(room_of(importer) or "", ()):
        yield f"{importer} imports {library}: it must not know it"


def loaded_in_fresh_interpreter(root: Path, module: str, libraries: set[str]) -> set[str]:
    """Returns which of `libraries` are loaded after `module` alone was imported with `root` as the checkout."""
    script = f"import sys, {module}; print(*(sys.modules.keys() & {libraries!r}))"
    process = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return set(process.stdout.split())


def test_every_import_goes_downwards() -> None:
    assert find_violations(ROOT) == []


CLEAN = {
    "harness/__init__.py": "",
    "harness/config/__init__.py": "",
    "harness/config/schema.py": "import json\nfrom omegaconf import OmegaConf\nfrom harness.placement import select\n",
    "harness/placement/__init__.py": "",
    "harness/placement/select.py": (
        "import typing\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n    from harness.run import x\n"
        "if typing.TYPE_CHECKING:\n    import transformers\n"
    ),
    "harness/results/__init__.py": "",
    "harness/results/schema.py": "",
    "harness/methods/__init__.py": "",
    "harness/methods/lora.py": "import torch\nfrom ..placement.select import resolve\n",
    "harness/tracking/__init__.py": "",
    "harness/tracking/wandb_mirror.py": "def start():\n    import wandb.sdk\n",
    "harness/training/__init__.py": "",
    "harness/training/loop.py": "import torch\nfrom harness.methods.lora import apply\n",
    "analysis/load.py": "import pandas\nfrom harness.results.schema import read_result\n",
    "analysis/adapters.py": "import torch\nfrom harness.methods import lora\nfrom harness.results import schema\n",
    "hydra_plugins/lora_harness/__init__.py": "",
    "hydra_plugins/lora_harness/sweeper.py": (
        "from hydra.plugins.sweeper import Sweeper\nfrom harness.config import schema\n"
    ),
}

LOOP, SCHEMA = "harness/training/loop.py", "harness/config/schema.py"
VIOLATIONS = [
    (SCHEMA, "import torch.nn", "harness.config.schema imports torch: it must not know it"),
    (
        "harness/results/schema.py",
        "from pandas import DataFrame",
        "harness.results.schema imports pandas: it must not know it",
    ),
    (
        "harness/placement/select.py",
        "import wandb",
        "harness.placement.select imports wandb: only harness.tracking does",
    ),
    (SCHEMA, "import transformers", "harness.config.schema imports transformers: only harness.models does"),
    ("harness/run.py", "def f():\n    import wandb", "harness.run imports wandb: only harness.tracking does"),
    (
        "harness/methods/lora.py",
        "from transformers.pytorch_utils import Conv1D",
        "harness.methods.lora imports transformers: only harness.models does",
    ),
    (
        "harness/data/batches.py",
        "import tokenizers",
        "harness.data.batches imports tokenizers: only harness.models does",
    ),
    (
        "harness/models/loading.py",
        "from importlib import import_module\nimport_module('datasets')",
        "harness.models.loading imports datasets: only harness.data does",
    ),
    (
        "harness/models/loading.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import datasets",
        "harness.models.loading imports datasets: only harness.data does",
    ),
    (
        "harness/run.py",
        "def f():\n    from peft import LoraConfig",
        "harness.run imports peft: only harness.methods does",
    ),
    (LOOP, "from hydra.utils import instantiate", "harness.training.loop imports hydra: it must not know it"),
    (LOOP, "import omegaconf", "harness.training.loop imports omegaconf: it must not know it"),
    (LOOP, "import wandb", "harness.training.loop imports wandb: only harness.tracking does"),
    (LOOP, "import transformers", "harness.training.loop imports transformers: only harness.models does"),
    (
        "harness/measure/memory.py",
        "from harness.training import loop",
        "harness.measure.memory imports harness.training.loop: harness.training is above harness.measure",
    ),
    (
        "harness/methods/lora.py",
        "from .. import run",
        "harness.methods.lora imports harness.run: harness.run is above harness.methods",
    ),
    (
        "harness/__init__.py",
        "from .methods.lora import apply",
        "harness imports harness.methods.lora: harness.methods is above harness",
    ),
    (
        "analysis/tables/ranks.py",
        "import analysis.report",
        "analysis.tables.ranks imports analysis.report: analysis.report is above analysis.tables",
    ),
    (
        "harness/methods/counts.py",
        "def f():\n    from harness.methods.files import f\n",
        "import cycle: harness.methods.counts <- harness.methods.files <- harness.methods.counts",
    ),
    ("harness/run.py", "import analysis.load", "harness.run imports analysis.load: harness must not know analysis"),
    (
        "harness/run.py",
        "import hydra_plugins.lora_harness.launcher",
        "harness.run imports hydra_plugins.lora_harness.launcher: harness must not know hydra_plugins",
    ),
    (
        "analysis/load.py",
        "from harness.config.schema import RunConfig",
        "analysis.load imports harness.config.schema: of the harness it may know harness.results",
    ),
    (
        "analysis/adapters.py",
        "from harness.training.loop import train",
        "analysis.adapters imports harness.training.loop: "
        "of the harness it may know harness.results, harness.methods, harness.placement, harness.config, "
        "harness.content, harness.saved, harness.deltas, harness.evaluate, harness.gradients",
    ),
    ("analysis/report.py", "def f():\n    import torch", "analysis.report imports torch: it must not know it"),
    (
        "harness/run.py",
        "import harness.methods.utils",
        "harness.run imports harness.methods.utils, which does not exist",
    ),
    ("harness/utils.py", "", "harness.utils has no room: give it one in ROOMS of tests/test_layering.py"),
    (
        "hydra_plugins/other.py",
        "",
        "hydra_plugins.other has no room: give it one in ROOMS of tests/test_layering.py",
    ),
]


def _write_tree(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)


def test_a_clean_tree_has_no_violations(tmp_path: Path) -> None:
    _write_tree(tmp_path, CLEAN)
    assert find_violations(tmp_path) == []


@pytest.mark.parametrize(("file", "source", "violation"), VIOLATIONS)
def test_every_rule_can_fail(tmp_path: Path, file: str, source: str, violation: str) -> None:
    _write_tree(tmp_path, CLEAN)
    if "cycle" in violation:
        _write_tree(tmp_path, {"harness/methods/files.py": "from harness.methods.counts import f\n"})
    _write_tree(tmp_path, {file: CLEAN.get(file, "") + source + "\n"})
    assert find_violations(tmp_path) == [violation]


HEAVY = {"torch", "pandas", "transformers", "datasets", "wandb", "peft"}
LIGHT = {
    "harness.cli": {*HEAVY, "omegaconf", "hydra"},
    "harness.extensions": {*HEAVY, "omegaconf", "hydra"},
    "harness.results.launches": {*HEAVY, "omegaconf", "hydra"},
    "harness.results.schema": {*HEAVY, "omegaconf", "hydra"},
    "harness.config.composing": HEAVY,
    "harness.config.overrides": HEAVY,
    "harness.placement.select": HEAVY,
    "harness.folder": HEAVY,
    "harness.content.identity": HEAVY,
    "analysis.__main__": HEAVY - {"pandas"},
}


@pytest.mark.parametrize("module", LIGHT)
def test_import_loads_no_heavy_library(module: str) -> None:
    assert loaded_in_fresh_interpreter(ROOT, module, LIGHT[module]) == set()


def test_the_fresh_interpreter_sees_a_heavy_library(tmp_path: Path) -> None:
    files = {
        "analysis/__init__.py": "",
        "analysis/__main__.py": "import analysis.load",
        "analysis/load.py": "import torch",
        "torch.py": "",
    }
    _write_tree(tmp_path, files)
    assert loaded_in_fresh_interpreter(tmp_path, "analysis.__main__", {"torch", "wandb"}) == {"torch"}
