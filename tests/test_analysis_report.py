"""The report of a sweep: its page to the letter, its files, and what the command line says when there is none."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from test_analysis_load import ENVIRONMENT, save_json, save_run, save_sweep
from test_analysis_tables import measured
from wandb_file import read_artifacts, read_wandb_file

from analysis import figures, report
from analysis.__main__ import main
from analysis.report import write_report
from harness.results.launches import record_launch

ROOT = Path(__file__).resolve().parent.parent

GOLDEN_PAGE = Path(__file__).parent / "golden" / "report.md"


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    return save_runs(tmp_path / "runs")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same runs, and the report of their sweep, for tests that read it."""
    folder = tmp_path_factory.mktemp("written")
    runs_dir = save_runs(folder / "runs")
    return runs_dir, write_report(runs_dir, folder / "reports", "demo", console=quiet())


def save_runs(runs_dir: Path) -> Path:
    """A sweep of five: two finished, one failed, one unreadable, one to do; and a run of another sweep."""
    older = {**ENVIRONMENT, "versions": {"torch": "2.9.0"}}
    counts_unknown: dict[str, float | None] = {"num_adapter_params": None, "num_total_params": None}
    save_run(runs_dir, "lora-s0", metrics=measured())
    save_run(
        runs_dir, "full-s0", method="full", environment=older, metrics=measured(val_accuracy=0.9, **counts_unknown)
    )
    failure = "ValueError: <b>`rank`</b>\n  File run.py"
    save_run(runs_dir, "lora64-s0", rank=64, status="failed", error=failure, environment={})
    save_json(runs_dir / "broken" / "result.json", {"schema_version": 2})
    save_run(runs_dir, "other", sweep="other", metrics=measured())
    save_sweep(runs_dir, "demo", ["lora-s0", "lora-s1", "full-s0", "broken", "lora64-s0"])
    return runs_dir


def quiet() -> Console:
    return Console(quiet=True)


def test_golden_page(written: tuple[Path, Path]) -> None:
    runs_dir, report_dir = written
    assert report_dir == runs_dir.parent / "reports" / "demo"
    page = (report_dir / "report.md").read_text(encoding="utf-8").replace(str(runs_dir), "RUNS")
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN_PAGE.write_text(page, encoding="utf-8")
    assert page == GOLDEN_PAGE.read_text(encoding="utf-8")


def test_the_table_alone_says_what_the_page_says_at_its_head(written: tuple[Path, Path]) -> None:
    runs_dir, report_dir = written
    table = (report_dir / "tables" / "tradeoff.md").read_text(encoding="utf-8").replace(str(runs_dir), "RUNS")
    golden = GOLDEN_PAGE.read_text(encoding="utf-8").removeprefix("# demo\n\n")
    head, _, rest = golden.partition("\n## Cost and quality.")
    choice, _, head = head.partition("\n## ")[0].partition("\n")
    assert "has the best val accuracy" in choice  # is about all conditions, not about a table
    assert table == rest.partition("\n\n")[2].partition("\n## ")[0] + "\n" + head


def test_every_run_is_a_row_of_runs_csv_with_everything(written: tuple[Path, Path]) -> None:
    _, report_dir = written
    with (report_dir / "runs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run_id"] for row in rows] == ["lora-s0", "full-s0", "lora64-s0"]
    lora, full, failed = rows
    assert (lora["config.rank.rank"], lora["config.target_layers.projections"]) == ("8", '["q", "v"]')
    assert (lora["peak_memory_bytes"], lora["step_seconds_median"]) == ("10485760", "0.01")
    assert (full["config.rank.rank"], full["num_adapter_params"], full["environment.versions.torch"]) == (
        "",
        "",
        "2.9.0",
    )
    assert failed["error"] == "ValueError: <b>`rank`</b>\n  File run.py"
    assert (failed["val_accuracy"], failed["environment.git_dirty"]) == ("", "")
    assert "cuda_peak_allocated_bytes" not in lora  # no run measured it


def test_a_report_can_be_written_again(runs_dir: Path, tmp_path: Path) -> None:
    def contents() -> dict[str, bytes]:
        report_dir = write_report(runs_dir, tmp_path / "reports", "demo", console=quiet())
        return {str(path.relative_to(report_dir)): path.read_bytes() for path in report_dir.rglob("*.*")}

    first = contents()
    assert {"report.html", "report.md", "runs.csv", "tables/preview.tex"} <= first.keys()
    for name in ("tradeoff", "summary", "costs"):
        assert {f"tables/{name}.{ending}" for ending in ("md", "tex", "csv", "html")} <= first.keys()
    assert {"figures/score_by_memory.pdf", "figures/score_by_memory.png"} <= first.keys()
    assert contents() == first
    save_run(runs_dir, "lora-s1", seed=1, cell_id="lora-s0", metrics=measured())
    assert b"To do" not in contents()["report.md"]


def test_what_an_earlier_report_had_and_this_one_has_not_is_taken_away(runs_dir: Path, tmp_path: Path) -> None:
    save_run(runs_dir, "lora-lr2", cell_id="lr2", learning_rate=1e-2, metrics=measured())
    report_dir = write_report(runs_dir, tmp_path / "reports", console=quiet())
    assert (report_dir / "tables/learning_rates.md").exists()
    (runs_dir / "lora-lr2/result.json").unlink()
    write_report(runs_dir, tmp_path / "reports", console=quiet())
    assert not (report_dir / "tables/learning_rates.md").exists()
    assert (report_dir / "tables/tradeoff.md").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="figures are drawn by two processes on Linux alone")
@pytest.mark.parametrize("is_killed", [False, True])
def test_two_processes_draw_the_same_figures(
    is_killed: bool, written: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the second is killed, as for want of memory: the first draws its figures then."""
    runs_dir, report_dir = written
    one = report_dir / "figures"
    monkeypatch.setattr(report, "_MANY_RUNS", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    draw, parent, drawn_here = figures.write_figures, os.getpid(), []

    def write(drawn: Sequence[figures.Figure], directory: Path) -> list[Path]:
        if os.getpid() == parent:
            drawn_here.extend(figure.name for figure in drawn)
            if len(drawn_here) == 1:  # until the other has taken one, too
                time.sleep(0.5)
        elif is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(drawn, directory)

    monkeypatch.setattr(figures, "write_figures", write)
    two = write_report(runs_dir, tmp_path / "two", "demo", console=quiet()) / "figures"
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    assert len(files) >= 4 and {path.name: path.read_bytes() for path in two.iterdir()} == files
    all_figures = {Path(name).stem for name in files}
    assert len(drawn_here) == len(set(drawn_here))
    assert set(drawn_here) == all_figures if is_killed else set(drawn_here) < all_figures


def test_a_report_on_wandb_carries_the_whole_folder(runs_dir: Path, tmp_path: Path) -> None:
    arguments = ["report", "--sweep", "demo", "--runs-dir", str(runs_dir), "--reports-dir", str(tmp_path / "out")]
    command = [sys.executable, "-m", "analysis", *arguments, "--wandb", "offline"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    report_dir = tmp_path / "out/demo"
    (path,) = (report_dir / "wandb").glob("offline-run-*/*.wandb")
    run = read_wandb_file(path)
    assert (run.job_type, run.name, run.group, run.exit_code) == ("report", "demo report", "demo", 0)
    (manifest,) = read_artifacts(path)
    expected = {
        path.relative_to(report_dir).as_posix()
        for path in report_dir.rglob("*")
        if path.is_file() and "wandb" not in path.parts
    }
    assert manifest == ("demo-report", "report", expected)


# ---------------------------------------------------------------- command line


def test_the_command_prints_the_table(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["report", "--sweep", "demo", "--runs-dir", str(runs_dir), "--reports-dir", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Runs: 5 (2 finished, 1 failed, 1 unreadable, 1 to do)." in printed
    assert "To do: `lora-s1`." in printed
    assert "    - `lora64-s0`: failed: `ValueError: <b>'rank'</b>`" in printed
    assert (tmp_path / "out" / "demo" / "report.md").exists()


def test_without_a_sweep_all_runs_are_one_table(runs_dir: Path, tmp_path: Path) -> None:
    assert main(["report", "--runs-dir", str(runs_dir), "--reports-dir", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "all" / "report.md").read_text(encoding="utf-8")
    assert re.match(r"# all\n\n- .* has the best .*\n- Runs: 4 \(3 finished, 1 failed\)\.\n- Selection:", page)


def test_a_sweep_without_a_sweep_file_says_so(runs_dir: Path, tmp_path: Path) -> None:
    report_dir = write_report(runs_dir, tmp_path / "reports", "other", console=quiet())
    page = (report_dir / "report.md").read_text(encoding="utf-8")
    assert "- Runs: 1 (1 finished).\n- What is still to do is not known: no sweep file lists the runs" in page


DEMO = "python -m harness -m sweeps=demo"


def head_of(report_dir: Path) -> str:
    return (report_dir / "report.md").read_text(encoding="utf-8").partition("\n## ")[0]


def test_a_report_covers_every_launch_and_says_what_each_added(tmp_path: Path) -> None:
    """Six runs, then two more ranks and seeds of the README, then the first command again."""
    for run_id in ("r1-s0", "r8-s0", "r4-s0", "r4-s1"):
        save_run(tmp_path / "runs", run_id, cell_id=run_id[:2], rank=int(run_id[1]), seed=int(run_id[-1]))
    record_launch(tmp_path / "runs", "demo", run_ids=["r1-s0", "r8-s0"], command=DEMO)
    record_launch(tmp_path / "runs", "demo", run_ids=["r8-s0", "r4-s0", "r4-s1"], command=f"{DEMO} rank=r4,r8")
    record_launch(tmp_path / "runs", "demo", run_ids=["r1-s0", "r8-s0"], command=DEMO)
    head = head_of(write_report(tmp_path / "runs", tmp_path / "reports", "demo", console=quiet()))
    head = re.sub("20[0-9T:+-]{23}", "WHEN", head)
    assert "- Runs: 4 (4 finished, 0 to do).\n" in head
    assert (
        "- Commands, 4 runs altogether (1 more launches added none):\n"
        f"  - `{DEMO}`, WHEN: 2 runs\n"
        f"  - `{DEMO} rank=r4,r8`, WHEN: 3 runs, 2 of them added by it\n"
    ) in head
    assert "Superseded" not in head


def test_a_run_that_its_command_no_longer_names_is_said(tmp_path: Path) -> None:
    for run_id in ("old-s0", "new-s0"):
        save_run(tmp_path / "runs", run_id, metrics=measured())
    record_launch(tmp_path / "runs", "demo", run_ids=["old-s0"], command=DEMO)
    record_launch(tmp_path / "runs", "demo", run_ids=["new-s0"], command=DEMO)
    head = head_of(write_report(tmp_path / "runs", tmp_path / "reports", "demo", console=quiet()))
    assert "- Superseded: the last launch of the same command names other runs in their place" in head
    assert "Still counted here: `old-s0`." in head


def test_folders_are_runs_and_reports_unless_named(
    runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs_dir.parent)
    assert main(["report", "--sweep", "demo"]) == 0
    assert (tmp_path / "reports" / "demo" / "runs.csv").exists()


def test_an_error_is_one_message_and_exit_code_2(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--sweep", "dmeo", "--runs-dir", str(runs_dir)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"sweep='dmeo': no run in {runs_dir} belongs to a sweep of that name. Sweeps there: demo, other. "
        f"Leave --sweep out for all runs in one table.\n"
        f"  left out: {runs_dir}/broken/result.json: schema_version 2, this code reads 1\n"
    )
    (tmp_path / "file").write_text("")
    assert main(["report", "--runs-dir", str(runs_dir), "--reports-dir", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"{tmp_path}/file/all/tables: Not a directory\n"


def test_an_unknown_command_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["reprot"])
    assert error.value.code == 2
    assert "invalid choice: 'reprot' (choose from" in capsys.readouterr().err
