"""Results of a sweep in one file, and everything that is rebuilt from it."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
from test_analysis_load import save_run, save_sweep
from test_analysis_tables import measured

from analysis.__main__ import main
from analysis.archive import opened
from analysis.tables.suggestion import Adapter, Claim, Hypothesis, Suggestion, read_suggestion, write_suggestion

CURVE = '{"step": 1, "train_nll": 2.0}\n{"step": 2, "train_nll": 1.5}\n'


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    """Two runs of a sweep with curves, weights and predictions, and a run of another sweep."""
    runs_dir = tmp_path / "runs"
    for run_id, method in (("lora-s0", "lora"), ("full-s0", "full"), ("other", "lora")):
        folder = save_run(runs_dir, run_id, method=method, metrics=measured()).parent
        (folder / "metrics.jsonl").write_text(CURVE)
        for name in ("adapter/adapter_model.safetensors", "predictions/test.parquet"):
            (folder / name).parent.mkdir()
            (folder / name).write_bytes(b"x" * 1000)
    save_sweep(runs_dir, "demo", ["lora-s0", "full-s0"])
    return runs_dir


def archive(runs_dir: Path, path: Path, *options: str) -> int:
    return main(["archive", "--sweep", "demo", "--runs-dir", str(runs_dir), "--to", str(path), *options])


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_report_of_the_archive_is_the_report_of_the_folder(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "published" / "demo.tar.xz"
    assert archive(runs_dir, path) == 0
    assert capsys.readouterr().out == f"{path}: 2 runs, {path.stat().st_size / 1024:,.0f} KiB\n"
    for source in (runs_dir, path):
        options = ["--sweep", "demo", "--runs-dir", str(source), "--reports-dir", str(tmp_path / source.name)]
        assert main(["report", *options]) == 0
        assert main(["status", *options[:4]]) == 0
        assert "demo: 2 finished" in capsys.readouterr().out
    reports = contents(tmp_path / "runs" / "demo"), contents(tmp_path / "demo.tar.xz" / "demo")
    assert reports[0] == reports[1]
    assert {"report.html", "figures/training_curves.pdf"} <= set(reports[0])


def test_no_weights_and_nothing_of_others_is_in_it(runs_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "demo.tar.xz"
    archive(runs_dir, path)
    of_runs = [f"{run_id}/{name}" for run_id in ("lora-s0", "full-s0") for name in ("result.json", "metrics.jsonl")]
    with tarfile.open(path) as packed:
        assert packed.getnames() == ["sweeps/demo.json", *of_runs]
    archive(runs_dir, path, "--predictions")
    with tarfile.open(path) as packed:
        assert set(packed.getnames()) - {"sweeps/demo.json", *of_runs} == {
            "lora-s0/predictions/test.parquet",
            "full-s0/predictions/test.parquet",
        }


def test_what_a_sweep_tests_goes_with_it(runs_dir: Path, tmp_path: Path) -> None:
    ranks = [Adapter(rank, {}, "qv") for rank in (4, 8)]
    hypothesis = Hypothesis("fewer", Claim.AS_GOOD, "why", *ranks, num_params=1, parent_num_params=2)
    for sweep in ("demo", "another"):
        write_suggestion(runs_dir, Suggestion(sweep, "parent", [hypothesis]))
    path = tmp_path / "demo.tar.xz"
    archive(runs_dir, path)
    with opened(path) as found:
        assert read_suggestion(found, "demo") == Suggestion("demo", "parent", [hypothesis])
        assert read_suggestion(found, "another") is None


def test_equal_results_give_equal_bytes(runs_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(runs_dir, tmp_path / "copy", copy_function=shutil.copyfile)
    archive(runs_dir, tmp_path / "one.tar.xz")
    archive(tmp_path / "copy", tmp_path / "two.tar.xz")
    archive(tmp_path / "one.tar.xz", tmp_path / "three.tar.xz")
    assert len({(tmp_path / f"{name}.tar.xz").read_bytes() for name in ("one", "two", "three")}) == 1


def test_what_cannot_be_archived_or_read_is_refused(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert archive(runs_dir, tmp_path / "demo.zip") == 2
    assert capsys.readouterr().err == (f"--to {tmp_path}/demo.zip: must end in .tar.xz, because that is what it is\n")
    (runs_dir / "full-s0" / "result.json").unlink()
    assert archive(runs_dir, tmp_path / "demo.tar.xz") == 2
    assert capsys.readouterr().err == (
        "sweep='demo': 1 of its runs have no result that can be read, as full-s0. "
        "Finish it first: python -m harness -m sweeps=demo\n"
    )
    assert not (tmp_path / "demo.tar.xz").exists()
    (tmp_path / "demo.tar.xz").write_bytes(b"no archive")
    assert main(["report", "--runs-dir", str(tmp_path / "demo.tar.xz")]) == 2
    assert capsys.readouterr().err.startswith(
        f"--runs-dir {tmp_path}/demo.tar.xz: neither a folder nor an archive of one ("
    )


@pytest.mark.parametrize("command", [["adapters"], ["suggest"], ["report", "--adapters"]])
def test_an_archive_has_no_weights_to_read(
    command: list[str], runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "demo.tar.xz"
    assert archive(runs_dir, path) == 0
    capsys.readouterr()
    assert main([*command, "--sweep", "demo", "--runs-dir", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"--runs-dir {path}: weights are read, and an archive has none; name the folder of its runs.\n"
    )
