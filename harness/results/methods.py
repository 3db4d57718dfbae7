"""The registry of methods: what each one trains, which settings it reads, and where its weights lie. No torch.

A method is one record here and one module, named by the record, that does the work (`harness.methods`). Everything else
(validation, the run, tables, figures) asks the record and compares no names.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.results.peft_types import PEFT_TYPES, PeftType


@dataclass(frozen=True)
class Method:
    """What has to be known of a method without running it.

    Attributes:
        label: what it is called in a sentence.
        module: the module that adapts a model and saves what was trained; see `harness.methods.registry`.
        trains: what is trained, for documentation.
        weights_dir: the folder in a run's folder that holds what was trained.
        uses_rank: whether it has a rank, and with it alpha and adapter dropout.
        uses_placement: whether target layers say where it acts.
        has_variants: whether `variant` changes it.
        trains_base: whether the weights of the base model change, so that they are held in float32 and a run of it can
            be the base of other runs.
        trains_part_of_base: whether it trains some of the base model's own parameters, which count as its adapter.
        needs_head: whether it trains the task head alone, and so nothing where a task has none.
        peft: the type of the `peft` package that it is; None for the methods of the harness itself.
    """

    label: str
    module: str
    trains: str
    weights_dir: str
    uses_rank: bool = False
    uses_placement: bool = False
    has_variants: bool = False
    trains_base: bool = False
    trains_part_of_base: bool = False
    needs_head: bool = False
    peft: PeftType | None = None


METHODS: dict[str, Method] = {
    "lora": Method(
        "LoRA",
        "harness.methods.lora_method",
        trains="adapter and head",
        weights_dir="adapter",
        uses_rank=True,
        uses_placement=True,
        has_variants=True,
    ),
    "full": Method(
        "full fine-tuning", "harness.methods.full_method", trains="everything", weights_dir="model", trains_base=True
    ),
    "head_only": Method(
        "the head alone", "harness.methods.head_only_method", trains="head", weights_dir="head", needs_head=True
    ),
    "bitfit": Method(
        "BitFit",
        "harness.methods.bitfit_method",
        trains="biases of the base model, and head",
        weights_dir="bitfit",
        trains_part_of_base=True,
    ),
    "norms": Method(
        "norm tuning",
        "harness.methods.norms_method",
        trains="normalisation layers of the base model, and head",
        weights_dir="norms",
        trains_part_of_base=True,
    ),
    **{
        each.method: Method(
            each.label,
            "harness.methods.peft_method",
            trains="adapter and head",
            weights_dir="adapter",
            uses_rank=each.alpha is not None,
            uses_placement=each.uses_placement,
            peft=each,
        )
        for each in PEFT_TYPES.values()
        if not each.refused
    },
}

# What a config may say instead: the method is then the one of `method.peft.peft_type`.
ANY_PEFT = "peft"
