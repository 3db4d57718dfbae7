"""Installed as people install things: the wheel in an environment from which the checkout cannot be imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# All that a build reads.
SOURCES = (
    "analysis",
    "conf",
    "harness",
    "hydra_plugins",
    "sweeps",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / "source")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([*PIP, "wheel", *options, str(folder / "source")], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bin_dir(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel and with the dependencies of this one, and without the checkout."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # A line in a .pth file adds a folder without reading the .pth files there, of which one leads to the checkout.
    dependencies = environment / "lib" / version / "site-packages" / "dependencies.pth"
    dependencies.write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [
            *PIP,
            "--python",
            str(environment / "bin/python"),
            "install",
            "--no-deps",
            "--no-index",
            "--no-compile",
            str(wheel),
        ],
        check=True,
    )
    return environment / "bin"


def run(program: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    completed = subprocess.run(
        [program, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment_of(program, folder),
    )
    assert completed.returncode == 0, completed.stderr
    return completed


def environment_of(program: Path, folder: Path) -> dict[str, str]:
    """Nothing of this process but the home directory, where matplotlib keeps its list of fonts."""
    return {
        "PATH": f"{program.parent}:/usr/bin:/bin",
        "HOME": str(Path.home()),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "LORA_HARNESS_CACHE": str(folder / "cache"),
    }


def test_the_wheel_holds_every_config_and_nothing_beside_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    for folder in ("conf", "sweeps"):
        ours = {f"harness/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert ours == {name for name in names if name.startswith(f"harness/{folder}/")}
    modules = {str(path.relative_to(ROOT)) for name in ("harness", "analysis") for path in (ROOT / name).rglob("*.py")}
    assert modules <= set(names)
    assert {name.partition("/")[0] for name in names} == {"harness", "analysis", "hydra_plugins"}
    # Other plug-ins of Hydra share the namespace package.
    assert "hydra_plugins/__init__.py" not in names and "hydra_plugins/lora_harness/sweeper.py" in names


def test_an_editable_install_is_a_plain_path_entry(tmp_path: Path) -> None:
    """Hydra's scan for plug-ins cannot see through an import hook."""
    code = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("harness", "analysis", "hydra_plugins", "conf", "sweeps"):
        (source / name).symlink_to(ROOT / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        (entry,) = (name for name in archive.namelist() if not name.partition("/")[0].endswith(".dist-info"))
        assert archive.read(entry).decode() == f"{source}\n"


def test_a_new_project_runs_and_is_reported(bin_dir: Path, tmp_path: Path) -> None:
    where = run(
        bin_dir / "python", "-c", "import harness, sys; print(harness.__file__, sys.path)", folder=tmp_path
    ).stdout
    assert where.startswith(str(bin_dir.parent)) and f"'{ROOT}'" not in where

    printed = run(bin_dir / "lora-harness", "init", "project", folder=tmp_path).stdout
    project = tmp_path / "project"
    files = sorted(str(path.relative_to(tmp_path)) for path in project.rglob("*") if path.is_file())
    assert printed.splitlines()[:-1] == files
    assert 15 <= len((project / "README.md").read_text().splitlines()) <= 20
    again = subprocess.run([bin_dir / "lora-harness", "init", "project"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr == (
        "error: project: not empty (Makefile, README.md, conf, data, sweeps); name a new folder. Nothing was written.\n"
    )

    arguments = "model=tiny_bert trainer=debug device=cpu tracking=off rank=r2"
    made = run(
        Path(shutil.which("make") or "make"),
        f"ARGS={arguments}",
        f"LORA_HARNESS={bin_dir / 'lora-harness'}",
        folder=project,
    )
    assert f"own configs in {project}/conf and {project}/sweeps: dataset/reviews, sweeps/ranks" in made.stderr
    results = [json.loads(path.read_text()) for path in project.glob("runs/*/result.json")]
    assert [(result["status"], result["sweep"], result["config"]["dataset"]["name"]) for result in results] == [
        ("finished", "ranks", "reviews")
    ] * 2
    assert all("git_commit" not in result["environment"] for result in results)
    assert "dataset reviews" in made.stdout
    assert (project / "reports/ranks/report.html").is_file()
    assert "2 finished" in run(bin_dir / "lora-harness", "status", "--sweep", "ranks", folder=project).stdout


def test_bash_completes_commands_and_options(bin_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps/own.yaml").write_text("sweep: own\n")
    script = """
        eval "$(lora-harness --completion bash)"
        complete -p lora-harness
        offer() {
            COMP_LINE="$1" COMP_POINT=${#1} COMPREPLY=()
            _lora_harness lora-harness
            printf '<%s>' "${COMPREPLY[@]}"
            echo
        }
        offer 'lora-harness st'
        offer 'lora-harness run rank=r10'
        offer 'lora-harness sweep ow'
    """
    printed = run(
        Path(shutil.which("bash") or "bash"), "--norc", "-c", f"PATH={bin_dir}:$PATH\n{script}", folder=tmp_path
    ).stdout
    assert printed.splitlines()[1:] == ["<status >", "<r1024>", "<own >"]
    assert "-F _lora_harness lora-harness" in printed
