"""Who may import whom: modules import from their own layer or below, without cycles, and some imports have one home.

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

LAYERS = {
    "harness": 0,
    "harness.config": 0,
    "harness.results": 0,
    "harness.placement": 0,
    "harness.cores": 0,
    "harness.launches": 0,
    "harness.models": 1,
    "harness.data": 1,
    "harness.assets": 1,
    "harness.checkpoint": 1,
    "harness.claims": 1,
    "harness.content": 1,
    "harness.evaluate": 1,
    "harness.flops": 1,
    "harness.folder": 1,
    "harness.identity": 1,
    "harness.language": 1,
    "harness.language_data": 1,
    "harness.ledger": 1,
    "harness.lora": 1,
    "harness.measure": 1,
    "harness.overrides": 1,
    "harness.parallel": 1,
    "harness.preparation": 0,
    "harness.prefetch": 1,
    "harness.readers": 1,
    "harness.row_checks": 1,
    "harness.scores": 1,
    "harness.sources": 1,
    "harness.stopping": 1,
    "harness.tracking": 1,
    "harness.trainer": 2,
    "harness.journal": 3,
    "harness.run": 3,
    "harness.__main__": 4,
    "hydra_plugins.lora_harness": 4,
    "hydra_plugins.lora_harness.clusters": 4,
    "hydra_plugins.lora_harness._composing": 4,
    "hydra_plugins.lora_harness._grids": 4,
    "hydra_plugins.lora_harness.launcher": 4,
    "hydra_plugins.lora_harness._preload": 4,
    "hydra_plugins.lora_harness._screen": 4,
    "hydra_plugins.lora_harness.search_path": 4,
    "hydra_plugins.lora_harness.sweeper": 4,
    "hydra_plugins.lora_harness._worker": 4,
    "analysis": 2,
    "analysis.load": 1,
    "analysis.select": 1,
    "analysis.names": 1,
    "analysis.formats": 1,
    "analysis.rows": 1,
    "analysis.forms": 2,
    "analysis.published": 1,
    "analysis.tables": 2,
    "analysis.labels": 1,
    "analysis.figures": 2,
    "analysis.page": 2,
    "analysis.adapters": 2,
    "analysis.report": 3,
    "analysis.status": 3,
    "analysis.budget": 3,
    "analysis.__main__": 4,
}

# Between our own packages: analysis reads results, and for its status claims, and nothing else of the harness, so that
# it runs without torch.
PACKAGES_SEEN_BY = {"harness": {"harness"}, "analysis": {"analysis"}, "hydra_plugins": {"hydra_plugins", "harness"}}
HARNESS_SEEN_BY_ANALYSIS = {"harness.results", "harness.claims", "harness.launches"}
HARNESS_SEEN_BY = {
    "analysis.adapters": HARNESS_SEEN_BY_ANALYSIS | {"harness.lora", "harness.placement"},
    # Imported late, when a report is to go to W&B.
    "analysis.__main__": HARNESS_SEEN_BY_ANALYSIS | {"harness.tracking", "harness.config"},
}

# Libraries that one module alone talks to.
HOMES = {
    "wandb": ("harness.tracking",),
    "transformers": ("harness.models",),
    "tokenizers": ("harness.models",),
    **dict.fromkeys(("sacrebleu", "rouge_score", "nltk"), ("harness.scores",)),
    "datasets": ("harness.data", "harness.sources"),
}

# Libraries that a module must not know.
BANNED = {
    "harness.config": {"torch", "pandas"},
    "harness.results": {"torch", "pandas"},
    "harness.placement": {"torch", "pandas"},
    "harness.trainer": {"hydra", "omegaconf"},
    **{name: {"torch"} for name in LAYERS if name.startswith("analysis") and name != "analysis.adapters"},
}


def find_violations(root: Path) -> list[str]:
    """Returns one sentence for every import below `root` that breaks a rule, sorted."""
    modules = {name: (package, tree) for name, package, tree in _modules(root)}
    violations = [
        f"{name} has no layer: give it one in LAYERS of tests/test_layering.py"
        for name in modules
        if name not in LAYERS
    ]
    graph: dict[str, set[str]] = {}
    for importer, (package, tree) in modules.items():
        for target in _imports(package, tree, set(modules) | set(LAYERS)):
            if target.partition(".")[0] in PACKAGES:
                if target != importer:
                    graph.setdefault(importer, set()).add(target)
                violations += _check_own(importer, target, exists=target in modules or target in LAYERS)
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
    if package == "analysis" and target_package == "harness":
        allowed = HARNESS_SEEN_BY.get(importer, HARNESS_SEEN_BY_ANALYSIS)
        if target not in allowed:
            yield f"{importer} imports {target}: of the harness it may know {', '.join(sorted(allowed))}"
    elif target_package not in PACKAGES_SEEN_BY[package]:
        yield f"{importer} imports {target}: {package} must not know {target_package}"
    elif not exists:
        yield f"{importer} imports {target}, which does not exist"
    elif LAYERS.get(target, 0) > LAYERS.get(importer, 4):
        yield f"{importer} (layer {LAYERS[importer]}) imports {target} (layer {LAYERS[target]}): downwards only"


def _check_library(importer: str, library: str) -> Iterator[str]:
    if library in HOMES and importer not in HOMES[library]:
        yield f"{importer} imports {library}: only {' and '.join(HOMES[library])} does"
    if library in BANNED.get(importer, ()):
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
    "harness/config.py": "import json\nfrom omegaconf import OmegaConf\nfrom harness import placement\n",
    "harness/placement.py": (
        "import typing\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n    from harness.run import x\n"
        "if typing.TYPE_CHECKING:\n    import transformers\n"
    ),
    "harness/results.py": "",
    "harness/lora.py": "import torch\nfrom .placement import resolve\n",
    "harness/tracking.py": "def start():\n    import wandb.sdk\n",
    "harness/trainer.py": "import torch\nfrom harness.lora import apply\n",
    "analysis/load.py": "import pandas\nfrom harness.results import read_result\n",
    "analysis/adapters.py": "import torch\nfrom harness import lora, placement, results\n",
    "hydra_plugins/lora_harness/__init__.py": "",
    "hydra_plugins/lora_harness/sweeper.py": "from hydra.plugins.sweeper import Sweeper\nfrom harness import config\n",
}

VIOLATIONS = [
    ("harness/config.py", "import torch.nn", "harness.config imports torch: it must not know it"),
    ("harness/results.py", "from pandas import DataFrame", "harness.results imports pandas: it must not know it"),
    ("harness/placement.py", "import wandb", "harness.placement imports wandb: only harness.tracking does"),
    ("harness/config.py", "import transformers", "harness.config imports transformers: only harness.models does"),
    ("harness/run.py", "def f():\n    import wandb", "harness.run imports wandb: only harness.tracking does"),
    (
        "harness/lora.py",
        "from transformers.pytorch_utils import Conv1D",
        "harness.lora imports transformers: only harness.models does",
    ),
    ("harness/data.py", "import tokenizers", "harness.data imports tokenizers: only harness.models does"),
    (
        "harness/models.py",
        "from importlib import import_module\nimport_module('datasets')",
        "harness.models imports datasets: only harness.data and harness.sources does",
    ),
    (
        "harness/models.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import datasets",
        "harness.models imports datasets: only harness.data and harness.sources does",
    ),
    ("harness/trainer.py", "from hydra.utils import instantiate", "harness.trainer imports hydra: it must not know it"),
    ("harness/trainer.py", "import omegaconf", "harness.trainer imports omegaconf: it must not know it"),
    ("harness/trainer.py", "import wandb", "harness.trainer imports wandb: only harness.tracking does"),
    ("harness/trainer.py", "import transformers", "harness.trainer imports transformers: only harness.models does"),
    (
        "harness/measure.py",
        "from harness import trainer",
        "harness.measure (layer 1) imports harness.trainer (layer 2): downwards only",
    ),
    (
        "harness/lora.py",
        "from . import run",
        "harness.lora (layer 1) imports harness.run (layer 3): downwards only",
    ),
    (
        "harness/__init__.py",
        "from .lora import apply",
        "harness (layer 0) imports harness.lora (layer 1): downwards only",
    ),
    (
        "analysis/tables.py",
        "import analysis.report",
        "analysis.tables (layer 2) imports analysis.report (layer 3): downwards only",
    ),
    (
        "harness/placement.py",
        "def f():\n    from harness.config import RunConfig",
        "import cycle: harness.config <- harness.placement <- harness.config",
    ),
    ("harness/run.py", "import analysis.load", "harness.run imports analysis.load: harness must not know analysis"),
    (
        "harness/run.py",
        "import hydra_plugins.lora_harness.launcher",
        "harness.run imports hydra_plugins.lora_harness.launcher: harness must not know hydra_plugins",
    ),
    (
        "analysis/load.py",
        "from harness.config import RunConfig",
        "analysis.load imports harness.config: "
        "of the harness it may know harness.claims, harness.launches, harness.results",
    ),
    (
        "analysis/adapters.py",
        "from harness.trainer import train",
        "analysis.adapters imports harness.trainer: "
        "of the harness it may know harness.claims, harness.launches, harness.lora, harness.placement, harness.results",
    ),
    ("analysis/report.py", "def f():\n    import torch", "analysis.report imports torch: it must not know it"),
    ("harness/run.py", "import harness.utils", "harness.run imports harness.utils, which does not exist"),
    (
        "harness/utils.py",
        "",
        "harness.utils has no layer: give it one in LAYERS of tests/test_layering.py",
    ),
    (
        "hydra_plugins/other.py",
        "",
        "hydra_plugins.other has no layer: give it one in LAYERS of tests/test_layering.py",
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
    _write_tree(tmp_path, {file: CLEAN.get(file, "") + source + "\n"})
    assert find_violations(tmp_path) == [violation]


LIGHT = {
    "harness.launches": {"torch", "pandas", "transformers", "omegaconf", "hydra"},
    "harness.config": {"torch", "pandas", "transformers", "datasets", "wandb"},
    "harness.results": {"torch", "pandas", "transformers", "datasets", "wandb"},
    "harness.placement": {"torch", "pandas", "transformers", "datasets", "wandb"},
    "harness.folder": {"torch", "pandas", "transformers", "datasets", "wandb"},
    "harness.identity": {"torch", "pandas", "transformers", "datasets", "wandb"},
    "analysis.__main__": {"torch", "transformers", "datasets", "wandb"},
}


@pytest.mark.parametrize("module", LIGHT)
def test_import_loads_no_heavy_library(module: str) -> None:
    if not (ROOT / module.replace(".", "/")).with_suffix(".py").exists():
        pytest.skip(f"{module} is not written yet")
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
