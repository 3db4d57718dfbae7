"""One small file with all that a report is made from, to publish beside a paper: results, curves, launches; no weights.

    python -m analysis archive --sweep demo --to demo.tar.xz
    python -m analysis report --sweep demo --runs-dir demo.tar.xz

The archive has the files of the folder under their names, so that `tar -xf demo.tar.xz` gives a folder of runs back.
"""

from __future__ import annotations

import io
import lzma
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from analysis.load import LoadError, load_runs
from harness.results.files import CURVE_FILE, PREDICTIONS_DIR, RESULT_FILE, SUGGESTIONS_DIR, write_atomically
from harness.results.launches import SWEEPS_DIR


def write_archive(runs_dir: Path, sweep: str, path: Path, *, predictions: bool = False) -> int:
    """Writes the results of a sweep, trials included, into one file and returns the number of runs.

    Equal folders give equal bytes.

    Args:
        runs_dir: where the runs lie.
        sweep: its name.
        path: the file, `.tar.xz`.
        predictions: whether predictions by row go with it, which the paired tests on them need.

    Raises:
        LoadError: no such sweep, a run of it that has not ended or cannot be read, or a name that is not `.tar.xz`.
    """
    if not path.name.endswith(".tar.xz"):
        raise LoadError(f"--to {path}: must end in .tar.xz, because that is what it is")
    runs = load_runs(runs_dir, sweep=sweep)
    missing = [*(runs.to_do or []), *runs.unreadable]
    if missing:
        raise LoadError(
            f"sweep={sweep!r}: {len(missing)} of its runs have no result that can be read, as {missing[0]}. "
            f"Finish it first: {runs.command or 'run its command again'}"
        )
    run_ids = [*runs.frame["run_id"], *runs.trials["run_id"]]
    members = [
        *sorted((runs_dir / SWEEPS_DIR / sweep).glob("*.json")),
        runs_dir / SWEEPS_DIR / f"{sweep}.json",
        runs_dir / SUGGESTIONS_DIR / f"{sweep}.json",
        *(runs_dir / run_id / name for run_id in run_ids for name in (RESULT_FILE, CURVE_FILE)),
    ]
    if predictions:
        members += [one for run_id in run_ids for one in sorted((runs_dir / run_id / PREDICTIONS_DIR).glob("*"))]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member in members:
            if member.is_file():
                content = member.read_bytes()
                about = tarfile.TarInfo(member.relative_to(runs_dir).as_posix())
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))
    write_atomically(path, lzma.compress(packed.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    return len(run_ids)


@contextmanager
def opened(runs_dir: Path) -> Iterator[Path]:
    """The folder of runs: `runs_dir` itself, or where it is an archive, a folder with its files for as long as needed.

    Raises:
        LoadError: a file that is no such archive.
    """
    if not runs_dir.is_file():
        yield runs_dir
        return
    with tempfile.TemporaryDirectory(prefix="runs-") as directory:
        try:
            with tarfile.open(runs_dir) as archive:
                archive.extractall(directory, filter="data")
        except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
            raise LoadError(
                f"--runs-dir {runs_dir}: neither a folder nor an archive of one ({error}). "
                "Archives are written by: python -m analysis archive --sweep NAME --to NAME.tar.xz"
            ) from error
        yield Path(directory)
