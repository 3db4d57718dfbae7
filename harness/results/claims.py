"""Who is computing a run: an atomic claim with a heartbeat, so that no run is ever computed twice at once.

A run's folder holds `claims/0.json`, `claims/1.json`, ...; the highest number is the claim that counts. A claim is made
by linking a finished file to the next free number, which succeeds for exactly one process, also on a shared file
system; where there are no hard links, by creating that file exclusively. A claim that holds is never deleted or
overwritten by somebody else: who finds the highest claim released or dead makes the next one. So two processes that
find the same dead owner cannot both take over.

The owner rewrites its claim every few seconds: host, process, and how far the run is. `python -m analysis status` and
the launcher's screen read it from there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.results.files import CLAIMS_DIR, write_json_atomically

# An owner without a heartbeat for this long is taken for dead. Only where its process cannot be looked at:
# on this host a dead process is seen at once.
SILENT_SECONDS = 60.0
HEARTBEAT_SECONDS = 2.0
# Without hard links a claim is empty for the moment between its creation and its first write.
EMPTY_SECONDS = 5.0


class RunClaimedError(RuntimeError):
    """Another process is computing this run at the moment."""


class ClaimLostError(RuntimeError):
    """Another process has taken this run over, because this one was silent for too long."""


@dataclass(frozen=True)
class Owner:
    """What a claim says.

    `boot` distinguishes hosts of one name, and a host from itself before a restart; `pid_namespace` the containers
    of one host apart, whose process numbers mean different processes (empty where that is not known, as in claims of
    earlier versions); `started` distinguishes a process from a later one with the same number.
    """

    host: str
    boot: str
    pid: int
    started: float
    released: bool = False
    progress: dict[str, Any] = field(default_factory=dict)
    pid_namespace: str = ""


class Claim:
    """The right to compute one run, held from `acquire` to the end of the `with` block.

    Raises `RunClaimedError` from `acquire` when a living process holds it.
    """

    def __init__(self, run_dir: Path, number: int, owner: Owner) -> None:
        self._directory = run_dir / CLAIMS_DIR
        self._number = number
        self._path = self._directory / f"{number}.json"
        self._owner = owner
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, run_dir: Path) -> Claim:
        """Claims a run, taking over from an owner that is dead or has let go."""
        directory = run_dir / CLAIMS_DIR
        started = _process_start(os.getpid()) or 0.0
        me = Owner(socket.gethostname(), _boot_id(), os.getpid(), started, pid_namespace=_pid_namespace())
        while True:
            directory.mkdir(parents=True, exist_ok=True)
            number, path = _highest(directory)
            if path is not None and is_held(path):
                owner = read_owner(path)
                whom = f"process {owner.pid} on {owner.host}" if owner else "another process"
                raise RunClaimedError(f"{run_dir.name} is being computed by {whom}.")
            try:
                if _create_new(directory / f"{number + 1}.json", me):
                    return cls(run_dir, number + 1, me)
            except OSError as error:
                if not _is_gone(error):  # else the process that ended the run has just removed the folder
                    raise

    def report(self, progress: dict[str, Any]) -> None:
        """Says how far the run is; the first time at once, then with the next heartbeat."""
        with self._lock:
            is_first = not self._owner.progress
            self._owner = replace(self._owner, progress=progress)
        if is_first:
            self._write()

    def check(self) -> None:
        """Raises `ClaimLostError` when a later claim exists, or this one no longer does."""
        number, _ = _highest(self._directory)
        if number > self._number or not self._path.exists():
            raise ClaimLostError(
                f"{self._directory.parent.name} was taken over by another process: this one was silent for more than "
                f"{SILENT_SECONDS:.0f} s."
            )

    def release(self, *, ended: bool) -> None:
        """Lets go. `ended`: the run has a result and needs no claims any more."""
        self._stop.set()
        self._thread.join()
        if ended:
            self._remove()
        else:
            with self._lock:
                self._owner = replace(self._owner, released=True)
            self._write()

    def _remove(self) -> None:
        """Removes this claim after those before it, so that a claim which somebody makes meanwhile stays."""
        with contextlib.suppress(OSError):  # what cannot be listed is left; a folder may hold a claim again
            names = _names(self._directory)
            others = [name for name in names if name.startswith(".") or 0 <= _number(name) < self._number]
            for name in (*others, self._path.name):
                with contextlib.suppress(OSError):
                    (self._directory / name).unlink()
            self._directory.rmdir()

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._stop.is_set():
            self.release(ended=False)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            self._write()

    def _write(self) -> None:
        with self._lock:
            owner = self._owner
        # A full disk must not end a run that may still finish; without heartbeats others may take over, rightly.
        try:
            if self._path.exists():
                write_json_atomically(self._path, asdict(owner))
        except OSError:
            return


def current_owner(run_dir: Path) -> Owner | None:
    """Who holds the run, or None when nobody living does, as far as can be seen: only a claim itself makes sure."""
    try:
        _, path = _highest(run_dir / CLAIMS_DIR)
    except OSError:
        return None
    return read_owner(path) if path is not None and is_held(path) else None


def is_held(path: Path) -> bool:
    """Whether the owner in a claim file still runs, as far as can be seen from here."""
    owner = read_owner(path)
    if owner is None:
        return _is_being_written(path)
    if owner.released:
        return False
    if _is_visible(owner):
        return _process_start(owner.pid) == owner.started
    return _seconds_since_written(path) < SILENT_SECONDS


def _is_visible(owner: Owner) -> bool:
    """Whether the owner's process number means the same process here: where in doubt, only its heartbeat counts."""
    here = _pid_namespace()
    return (owner.host, owner.boot, owner.pid_namespace or here) == (socket.gethostname(), _boot_id(), here)


def _is_being_written(path: Path) -> bool:
    try:
        is_empty = path.stat().st_size == 0
    except OSError:
        return False
    return is_empty and _seconds_since_written(path) < EMPTY_SECONDS


def _seconds_since_written(path: Path) -> float:
    try:
        return _now_of_file_system(path.parent) - path.stat().st_mtime
    except OSError:  # it is gone
        return math.inf


def read_owner(path: Path) -> Owner | None:
    """What a claim file says; None for a file that is gone or not ours."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _names(directory: Path) -> list[str]:
    """What a folder of claims holds: nothing where it is gone, as it is at any moment when its run ends."""
    try:
        return os.listdir(directory)
    except OSError as error:
        if _is_gone(error):
            return []
        raise


def _is_gone(error: OSError) -> bool:
    """Whether a file or folder is no longer there; NFS speaks of a stale handle where another machine removed it."""
    return isinstance(error, FileNotFoundError) or error.errno == errno.ESTALE


def _number(name: str) -> int:
    """The number of a claim by the name of its file, -1 for a file that is none."""
    number, _, suffix = name.partition(".")
    return int(number) if number.isdecimal() and suffix == "json" else -1


def _highest(directory: Path) -> tuple[int, Path | None]:
    number = max(map(_number, _names(directory)), default=-1)
    return (number, directory / f"{number}.json") if number >= 0 else (-1, None)


def _create_new(path: Path, owner: Owner) -> bool:
    """Makes a claim file with its content, unless there is one of that name."""
    content = json.dumps(asdict(owner)).encode()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".claim-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except FileNotFoundError:
        raise
    except OSError:  # each file system without hard links says so in its own way
        return _create_exclusively(path, content)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _create_exclusively(path: Path, content: bytes) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True


def _now_of_file_system(directory: Path) -> float:
    """The time by the clock that stamps files there, which may be another host's."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".clock-") as file:
            return os.stat(file.name).st_mtime
    except OSError:
        return time.time()


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process_start(pid: int) -> float | None:
    """When a process of this host started, in clock ticks since boot; None when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        return _alive_without_proc(pid)
    return None if fields[0] in "ZX" else float(fields[19])


def _alive_without_proc(pid: int) -> float | None:
    # macOS: whether it lives is all that can be said without another library.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0.0
