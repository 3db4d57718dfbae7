"""A trained model, written so that it loads as a base model again."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from harness.models.configs import quiet_transformers
from harness.processes.distributed import full_tensor


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    own_settings: Mapping[str, Any] | None = None,
    label_names: Sequence[str] = (),
) -> int:
    """Writes model and tokenizer so that `model.path=directory` loads them; returns the bytes of the tensor files.

    What is written is a model like the base: with the `own_settings` of the base instead of what training needed, and
    with the names of the classes.
    """
    trained = model.config
    generation = model.generation_config if model.can_generate() else None
    config = copy.deepcopy(trained)
    for name, value in (own_settings or {}).items():
        setattr(config, name, value)
        if generation is not None and generation._from_model_config and hasattr(generation, name):
            generation = copy.deepcopy(generation)
            setattr(generation, name, value)
    if label_names:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: index for index, name in enumerate(label_names)}
    if type(model) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.values():
        config.problem_type = "regression" if config.num_labels == 1 else "single_label_classification"
    try:
        model.config = config
        if generation is not None:
            # Of the base's own, transformers refuses to write what it did not refuse to read.
            model.generation_config = GenerationConfig()
        with quiet_transformers():
            state = {name: full_tensor(value) for name, value in model.state_dict().items()}
            model.save_pretrained(directory, state_dict=state)
            tokenizer.save_pretrained(directory)
        if generation is not None:
            generation.to_json_file(directory / "generation_config.json")
    finally:
        model.config = trained
        if generation is not None:
            model.generation_config = generation
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
