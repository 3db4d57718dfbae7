"""The types of the `peft` package: what each is called here, how it takes rank and target layers, or why it cannot run.

A type is one record. That the records are true of the installed `peft` is tested (`tests/test_peft_methods.py`), so
nothing here imports it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PeftType:
    """A `peft_type` and how the settings of a run reach its config.

    Attributes:
        name: the `peft_type`.
        label: what it is called in a sentence.
        rank: the field of its config that is a rank; None where it has none.
        alpha: the field whose value divided by the rank is the scaling, as alpha is for LoRA: with it the setting
            `rank` says both. None where there is no such field; the rank is then set by its own name.
        uses_placement: whether it adapts projections, which target layers can name.
        takes_quantized: whether peft has layers of it for weights that are held quantised (bitsandbytes).
        refused: why a run cannot have it, empty where it can.
    """

    name: str
    label: str
    rank: str | None = None
    alpha: str | None = None
    uses_placement: bool = True
    takes_quantized: bool = False
    refused: str = ""

    @property
    def method(self) -> str:
        """What the method is called, `lora` being our own."""
        return "peft_lora" if self.name == "LORA" else self.name.lower()


_PROMPT = (
    "it puts virtual tokens before the input and needs peft's own model around ours, which the objectives of this "
    "harness do not call"
)

_FROM_WEIGHTS = (
    "it makes its parameters from the weights of the base, so that nothing could be planned and counted before these "
    "are loaded"
)

_TYPES = (
    PeftType("LORA", "LoRA of peft", rank="r", alpha="lora_alpha", takes_quantized=True),
    PeftType("ADALORA", "AdaLoRA", rank="target_r", alpha="lora_alpha", takes_quantized=True),
    PeftType("BEFT", "BEFT"),
    PeftType("BOFT", "BOFT", takes_quantized=True),
    PeftType("C3A", "C3A"),
    PeftType("DEFT", "DEFT", rank="r"),
    PeftType("DELORA", "DeLoRA", rank="r"),
    PeftType("FOURIERFT", "FourierFT"),
    PeftType("GLORA", "GLoRA", rank="r"),
    PeftType("GRALORA", "GraLoRA", rank="r"),
    PeftType("HIRA", "HiRA", rank="r", takes_quantized=True),
    PeftType("HRA", "HRA", rank="r"),
    PeftType("IA3", "(IA)^3", takes_quantized=True),
    PeftType("LILY", "Lily", rank="r"),
    PeftType("LN_TUNING", "tuning of the norms", uses_placement=False, takes_quantized=True),
    PeftType("LOHA", "LoHa", rank="r", alpha="alpha"),
    PeftType("LOKR", "LoKr", rank="r", alpha="alpha"),
    PeftType("MISS", "MiSS", rank="r", takes_quantized=True),
    PeftType("OFT", "OFT", takes_quantized=True),
    PeftType("OSF", "OSF"),
    PeftType("PEANUT", "PEANuT", rank="r"),
    PeftType("PSOFT", "PSOFT", rank="r"),
    PeftType("PVERA", "PVeRA", rank="r", takes_quantized=True),
    PeftType("RANDLORA", "RandLoRA", rank="r", takes_quantized=True),
    PeftType("ROAD", "RoAd", takes_quantized=True),
    PeftType("SUPERTUNING", "Supertuning"),
    PeftType("TINYLORA", "TinyLoRA", rank="r"),
    PeftType("TRAINABLE_TOKENS", "trainable tokens", uses_placement=False, takes_quantized=True),
    PeftType("UNILORA", "Uni-LoRA", rank="r"),
    PeftType("VBLORA", "VB-LoRA", rank="r"),
    PeftType("VERA", "VeRA", rank="r", takes_quantized=True),
    PeftType("WAVEFT", "WaveFT"),
    PeftType("ADAMSS", "AdaMSS", refused=_FROM_WEIGHTS),
    PeftType("FROD", "FRoD", refused=_FROM_WEIGHTS),
    PeftType("SHIRA", "SHiRA", refused=_FROM_WEIGHTS),
    PeftType("ADAPTION_PROMPT", "adaption prompt", refused=_PROMPT),
    PeftType("CARTRIDGE", "cartridges", refused=_PROMPT),
    PeftType("CPT", "CPT", refused=_PROMPT),
    PeftType("MULTITASK_PROMPT_TUNING", "multitask prompt tuning", refused=_PROMPT),
    PeftType("P_TUNING", "P-tuning", refused=_PROMPT),
    PeftType("PREFIX_TUNING", "prefix tuning", refused=_PROMPT),
    PeftType("PROMPT_TUNING", "prompt tuning", refused=_PROMPT),
    PeftType("POLY", "Poly", refused="its forward pass needs the number of a task for every example"),
    PeftType("SHADOW", "Shadow", refused="it trains a second, smaller model beside the base"),
    PeftType("XLORA", "X-LoRA", refused="it mixes several adapters that were trained before"),
)

PEFT_TYPES: dict[str, PeftType] = {each.name: each for each in _TYPES}
