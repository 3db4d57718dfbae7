"""What a run keeps of its weights."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from harness.chain import save_heads
from harness.methods.registry import TrainedModel, find_method_module
from harness.prepare import PreparedRun
from harness.results.files import CHECKPOINT_FILE, LABELS_FILE, SAVING_DIR, write_json_atomically
from harness.results.methods import METHODS
from harness.training.checkpoint import write_in_its_place


def save_weights(prepared: PreparedRun, folder: Path) -> int:
    """Saves what the method trained, at the best step; returns the bytes of the tensor files."""
    name = METHODS[prepared.config.method.name].weights_dir
    if not prepared.accelerator.is_main_process:  # sharded weights are gathered by all processes, and kept by one
        with tempfile.TemporaryDirectory() as elsewhere:
            return _save_weights(prepared, Path(elsewhere) / name)

    def save() -> int:
        try:
            num_bytes = _save_weights(prepared, folder / SAVING_DIR / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / SAVING_DIR / name).rename(folder / name)
            return num_bytes
        finally:
            shutil.rmtree(folder / SAVING_DIR, ignore_errors=True)

    # A second try would have to be one of all processes.
    is_alone = prepared.accelerator.num_processes == 1
    return write_in_its_place(folder / CHECKPOINT_FILE, save) if is_alone else save()


def _save_weights(prepared: PreparedRun, directory: Path) -> int:
    name, label_names = prepared.config.method.name, prepared.data.label_names
    if label_names and not METHODS[name].trains_base:
        # As a transformers config has them: neither PEFT's config nor a tensor file has a place for names of classes.
        names = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
        write_json_atomically(directory / LABELS_FILE, names)
    trained = TrainedModel(
        prepared.config, prepared.model, prepared.tokenizer, prepared.base, prepared.head, label_names
    )
    num_bytes = find_method_module(name).save(trained, directory)
    save_heads(prepared.earlier, directory)
    return num_bytes
