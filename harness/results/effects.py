"""Which settings, facts and spellings of a run cannot change its numbers. The only such lists."""

from __future__ import annotations

from typing import Any

# Where a model or a dataset comes from. Once its content is known, it decides nothing.
MODEL_SOURCE = ("asset", "hub_id", "revision", "tiny", "path", "run", "scratch")
# What a run continues, likewise; between runs it is a difference of the recipe.
STARTING_POINT = ("adapter", "from_sweep")
DATA_SOURCE = (
    "asset",
    "hub_id",
    "subset",
    "revision",
    "path",
    "train_file",
    "val_file",
    "test_file",
    "train_split",
    "val_split",
    "test_split",
)

# Settings by dotted name, or whole groups of them, that cannot change a result: no part of a run's identity, and no
# difference between recipes. The only such list.
SETTINGS_WITHOUT_EFFECT = {
    "dataset.generation.batch_size",
    "method.learning_rate",  # only what trainer.learning_rate falls back to
    "trainer.eval_batch_size",
    "trainer.checkpoint_every",
    "tracking",
    "sweep",
    "runs_dir",
    "rerun",
    "device",  # asked for; environment.device_type and device_name say what it was
    "num_threads",  # likewise
    "allow_busy_device",
    "save_weights",
    "save_full_as",  # the bytes of what is kept alone
    "save_predictions",
    "shard_model",  # what it resolved to is in the environment
}
# The same for what a run records of its environment.
FACTS_WITHOUT_EFFECT = {
    "packed",  # how many runs shared the process: their numbers are equal to rounding, as with other threads
    "hostname",  # a name; what the machine is made of is compared
    "data_notes",  # follow from the data and the tokenizer, which are compared
    "model_notes",  # follow from the base model, likewise
    "label_names",  # follow from the data
    "placement",  # follows from the settings and the model
    "started_at",
    "first_step_at",
    "ended_at",
    "evaluated_also",  # scores, which differ from run to run
    "earlier_tasks",  # likewise
    "chain",  # ids; what was continued is in the config, and what it was in the content
}


def is_setting_without_effect(name: str) -> bool:
    """Whether a setting, or the group that it is in, cannot change a result.

    >>> [is_setting_without_effect(name) for name in ("tracking.entity", "seed", "evaluate_also.x.generation")]
    [True, False, True]
    """
    group, _, rest = name.partition(".")
    if group == "evaluate_also":
        inner = rest.partition(".")[2]
        # Of additional evaluation datasets only the nll is taken: no text is generated.
        return inner.partition(".")[0] == "generation" or _is_listed(f"dataset.{inner}", SETTINGS_WITHOUT_EFFECT)
    return _is_listed(name, SETTINGS_WITHOUT_EFFECT)


def is_fact_without_effect(name: str) -> bool:
    """Whether a fact of the environment, by its name below `environment`, stands behind no number."""
    return _is_listed(name, FACTS_WITHOUT_EFFECT)


def _is_listed(name: str, listed: set[str]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in listed)


def canonical_blocks(blocks: Any) -> Any:
    """One spelling for block lists that always select the same blocks.

    >>> canonical_blocks([1, 0]), canonical_blocks([5, 2]), canonical_blocks("first_2")
    ('first_2', [2, 5], 'first_2')
    """
    if isinstance(blocks, str):
        return blocks
    ordered = sorted(blocks)
    return f"first_{len(ordered)}" if ordered == list(range(len(ordered))) else ordered
