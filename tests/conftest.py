"""What every test may rely on: no network, one torch thread, no W&B account, a process as the session began it."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports torch or transformers, and inherited by the processes that tests start. One thread: the
# models are tiny, `make test` runs one worker per core, and the order of a parallel sum then cannot change a result.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)
os.environ.pop("WANDB_API_KEY", None)


@pytest.fixture(autouse=True)
def _contained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B writes below the test's own directory, and what a test sets for its process ends with it.

    That is the working directory, and the level of the harness's log, which the command line raises.
    """
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    logging.getLogger("harness").setLevel(logging.NOTSET)
    before = Path.cwd()
    yield
    os.chdir(before)


# Files that take longest, the first of them most: they begin, or one worker would wait for the other at the end.
LONGEST_FIRST = ("test_launcher.py", "test_sweeps.py", "test_parallel.py", "test_main.py", "test_tracking.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.name) if item.path.name in LONGEST_FIRST else 99)
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What the test modules imported."""
    import hypothesis  # noqa: F401 (its plug-ins ask the collector for objects: before they are out of sight)

    _freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    # A test was the first to use peft, or a family of models. A process that only hands tests out has frozen nothing.
    if 0 < _num_modules_frozen < len(sys.modules) - 100:
        _freeze()


_num_modules_frozen = 0


def _freeze() -> None:
    """Takes what was imported so far out of the garbage collector's sight, as a sweep's fork server does.

    Every run collects garbage before it measures memory: half of a tiny run's time went into a million objects of
    PyTorch and transformers that never die.
    """
    global _num_modules_frozen
    gc.collect()
    gc.freeze()
    _num_modules_frozen = len(sys.modules)
