"""What a run keeps of its weights."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from harness.config.schema import Method
from harness.folder import CHECKPOINT_FILE, SAVING_DIR, WEIGHTS_DIRS
from harness.methods.peft_files import head_state, save_adapter, save_tensors
from harness.models.saving import save_model
from harness.prepare import PreparedRun, class_names
from harness.results.files import write_json_atomically
from harness.training.checkpoint import write_in_its_place

LABELS_FILE = "labels.json"


def save_weights(prepared: PreparedRun, folder: Path) -> int:
    """Saves what the method trained, at the best step; returns the bytes of the tensor files."""
    name = WEIGHTS_DIRS[prepared.config.method.name]
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
    config, label_names = prepared.config, class_names(prepared.data)
    if config.method.name is Method.full:
        return save_model(
            prepared.model,
            prepared.tokenizer,
            directory,
            own_settings=prepared.base.own_settings,
            label_names=label_names,
        )
    if label_names:
        # As a transformers config has them: neither PEFT's config nor a tensor file has a place for names of classes.
        names = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
        write_json_atomically(directory / LABELS_FILE, names)
    if config.method.name is Method.head_only:
        return save_tensors(head_state(prepared.model, prepared.head), directory / "head.safetensors")
    assert config.rank is not None
    return save_adapter(
        prepared.model,
        directory,
        rank=config.rank,
        head_modules=prepared.head,
        dropout=config.method.adapter_dropout,
        base_model=prepared.base.name,
        revision=prepared.base.revision,
        task_type="CAUSAL_LM" if config.dataset.task.is_language else "SEQ_CLS",
    )
