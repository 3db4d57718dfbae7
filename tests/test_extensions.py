"""Packages of others: the architecture of a made-up distribution is found by a sweep, its processes and the report."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_launcher import results
from transformers import RoFormerConfig, RoFormerForSequenceClassification

import harness.__main__
from harness.config.schema import ModelConfig, TinyModel
from harness.extensions import ExtensionError, load_extensions
from harness.models.tokenizers import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
REGISTERS = """\
import sys
from harness.placement.architectures import ARCHITECTURES, Architecture

ARCHITECTURES["roformer"] = Architecture(
    "roformer.encoder.layer.{}",
    {"q": "attention.self.query", "v": "attention.self.value"},
    ("classifier",),
)
print("registered", "torch" in sys.modules)
"""


def install(folder: Path, source: str, *, value: str = "more_models.records") -> Path:
    """Puts a distribution `more-models` 1.5 with one module into a folder, as pip would."""
    (folder / "more_models").mkdir(parents=True)
    (folder / "more_models/__init__.py").touch()
    (folder / "more_models/records.py").write_text(source)
    info = folder / "more_models-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: more-models\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(f"[lora_harness]\nroformer = {value}\n")
    return folder


def run(module: str, *arguments: str, with_packages: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(with_packages)}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(autouse=True)
def _unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    load_extensions.cache_clear()
    for name in ("more_models", "more_models.records"):
        sys.modules.pop(name, None)
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))
    yield
    load_extensions.cache_clear()


def test_an_architecture_is_found_by_a_sweep_its_processes_and_the_report(tmp_path: Path) -> None:
    packages = install(tmp_path / "packages", REGISTERS)
    config = RoFormerConfig(
        vocab_size=300, embedding_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    RoFormerForSequenceClassification(config).save_pretrained(tmp_path / "roformer")
    load_tokenizer(ModelConfig(name="tiny_bert", tiny=TinyModel.bert)).save_pretrained(tmp_path / "roformer")
    rows = [f"text {number},{number % 2}" for number in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    completed = run(
        "harness",
        "-m",
        f"model.path={tmp_path / 'roformer'}",
        "model.attention=eager",
        "dataset=local",
        f"dataset.train_file={tmp_path / 'rows.csv'}",
        "dataset.max_length=32",
        "trainer=debug",
        "tracking=off",
        "device=cpu",
        "rank=r1,r2",
        "target_layers=qv",
        "sweep=extended",
        f"runs_dir={tmp_path / 'runs'}",
        with_packages=packages,
    )
    assert completed.returncode == 0, completed.stderr
    assert "registered False" in completed.stdout
    found = list(results(tmp_path / "runs").values())
    assert [result.status for result in found] == ["finished"] * 2
    assert found[0].target_modules[0] == "roformer.encoder.layer.0.attention.self.query"
    assert found[0].environment["versions"]["more-models"] == "1.5"
    arguments = ("status", "--sweep", "extended", "--runs-dir", str(tmp_path / "runs"))
    assert "registered False" in run("analysis", *arguments, with_packages=packages).stdout


@pytest.mark.parametrize(
    ("source", "value", "why"),
    [
        ("import no_such_module", "more_models.records", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("ARCHITECTURES['x'] = 1", "more_models.records", "NameError: name 'ARCHITECTURES' is not defined"),
        ("raise SystemExit(0)", "more_models.records", "SystemExit: 0"),
        ("", "more_models.recordz", "ModuleNotFoundError: No module named 'more_models.recordz'"),
        (
            "",
            "more_models.records:register",
            "AttributeError: module 'more_models.records' has no attribute 'register'",
        ),
        ("", "more models!", "AttributeError: "),
    ],
)
def test_a_broken_extension_is_an_error_that_names_distribution_and_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, value: str, why: str
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path, source, value=value))
    with pytest.raises(ExtensionError) as caught:
        load_extensions()
    assert str(caught.value).startswith(
        f"more-models 1.5: its extension 'roformer' (module {value}, entry point group lora_harness) cannot be "
        f"imported: {why}"
    )


def test_a_broken_extension_ends_the_command_line_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path, "import no_such_module"))
    monkeypatch.setattr(sys, "argv", ["harness", "seed=-1"])
    assert harness.__main__.main() == 2
    assert capsys.readouterr().err.startswith("error: more-models 1.5: its extension 'roformer' ")


def test_a_module_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    source = f"with open({str(log)!r}, 'a') as file:\n    file.write('loaded ')\n"
    monkeypatch.syspath_prepend(install(tmp_path / "packages", source))
    assert load_extensions() == load_extensions() == {"more-models": "1.5"}
    assert log.read_text() == "loaded "
