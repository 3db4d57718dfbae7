"""Every parameter count that the LoRA paper prints (arXiv 2106.09685v2), held against the count of the model itself.

The models are at their real size, on the meta device. `printed` is the paper's, in millions with its decimals.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from test_lora import CONFIGS
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2Model, PreTrainedModel

from harness.config.schema import RankConfig
from harness.methods.adapting import apply_lora, remove_lora
from harness.methods.counts import count_parameters, set_trainable
from harness.placement.select import select_targets

MODELS = {
    **CONFIGS,
    "gpt2_large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
}

# Model, roles, rank, count, what the paper prints, and where.
REPRODUCED = [
    ("roberta_base", "q v", 8, 294_912, "0.3", "table 2"),
    ("roberta_large", "q v", 8, 786_432, "0.8", "table 2"),
    ("deberta_v2_xxlarge", "q v", 16, 4_718_592, "4.7", "table 2, with the rank of the scripts"),
    ("gpt3", "q v", 1, 4_718_592, "4.7", "tables 4 and 15"),
    ("gpt3", "v", 2, 4_718_592, "4.7", "table 15"),
    ("gpt3", "q v", 2, 9_437_184, "9.4", "table 15"),
    ("gpt3", "q k v o", 1, 9_437_184, "9.4", "table 15"),
    ("gpt3", "q v", 8, 37_748_736, "37.7", "table 15"),
    ("gpt3", "q k v o", 4, 37_748_736, "37.7", "table 15"),
    ("gpt3", "q v", 64, 301_989_888, "301.9", "table 15, cut and not rounded"),
    ("gpt3", "q k v o", 64, 603_979_776, "603.8", "table 15, a misprint of 603.9"),
    ("gpt3", "q", 8, 18_874_368, "18", "table 5, cut to whole millions"),
    ("gpt3", "k", 8, 18_874_368, "18", "table 5, cut to whole millions"),
    ("gpt3", "v", 8, 18_874_368, "18", "table 5, cut to whole millions"),
    ("gpt3", "o", 8, 18_874_368, "18", "table 5, cut to whole millions"),
    ("gpt3", "q k", 4, 18_874_368, "18", "table 5, cut to whole millions"),
    ("gpt3", "q v", 4, 18_874_368, "18", "table 5, cut to whole millions"),
    ("gpt3", "q k v o", 2, 18_874_368, "18", "table 5; appendix D.4 says 37.7 of it"),
]
# What no rank gives: with the counts of the ranks around it.
NOT_REPRODUCED = [
    (
        "gpt2_medium",
        "q v",
        {3: 294_912, 4: 393_216},
        350_000,
        "table 3 prints 0.35, the count of prefix tuning beside it",
    ),
    (
        "gpt2_large",
        "q v",
        {4: 737_280, 5: 921_600},
        770_000,
        "table 3 prints 0.77, the count of prefix tuning beside it",
    ),
    ("deberta_v2_xxlarge", "q v", {8: 2_359_296}, 4_700_000, "table 10 prints rank 8; 4.7 is rank 16"),
]


@functools.cache
def _model(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(MODELS[name])


def _count(name: str, roles: str, rank: int) -> int:
    model = _model(name)
    targets = select_targets(
        [module for module, _ in model.named_modules()],
        model_type=model.config.model_type,
        config=model.config,
        projections=roles.split(),
    )
    apply_lora(model, targets, rank=RankConfig(rank, alpha=16))
    set_trainable(model, ())
    count = count_parameters(model, ()).num_adapter_params
    remove_lora(model)
    return count


@pytest.mark.parametrize(("model", "roles", "rank", "count", "printed", "where"), REPRODUCED)
def test_a_printed_count_is_the_models(model: str, roles: str, rank: int, count: int, printed: str, where: str) -> None:
    assert _count(model, roles, rank) == count
    millions = count / 1e6
    decimals = len(printed.partition(".")[2])
    if "misprint" in where:
        assert f"{millions:.{decimals}f}" == "604.0" and printed == "603.8"
    elif "cut" in where or "appendix" in where:
        assert int(millions * 10**decimals) == round(float(printed) * 10**decimals)
    else:
        assert f"{millions:.{decimals}f}" == printed


@pytest.mark.parametrize(("model", "roles", "counts", "printed", "reason"), NOT_REPRODUCED)
def test_what_no_rank_gives(model: str, roles: str, counts: dict[int, int], printed: int, reason: str) -> None:
    assert {rank: _count(model, roles, rank) for rank in counts} == counts
    assert all(abs(count - printed) > 0.02 * printed for count in counts.values()), reason


def test_what_the_documentation_says_of_gpt3() -> None:
    with torch.device("meta"):
        model = GPT2Model(GPT2Config(n_embd=12_288, n_layer=96, n_head=96, n_positions=2_048))
    base = sum(parameter.numel() for parameter in model.parameters())
    adapter = _count("gpt3", "q v", 4)
    page = (Path(__file__).resolve().parents[1] / "docs" / "how-to" / "will-it-fit.md").read_text(encoding="utf-8")
    for shown in (
        f"| {base:,} | {2 * base / 1e9:.1f} GB | 350 GB |",
        f"| {adapter:,} | {2 * adapter / 1e6:.1f} MB, or {2 * adapter / 2**20:.1f} MiB | 35 MB |",
        f"in 32 bits are {12 * adapter / 1e9:.1f} GB more | | {(2 * base + 12 * adapter) / 1e9:.1f} GB | 350 GB |",
        f"| | {6 * base / 1e12:.2f} TB | 1.2 TB |",
        f"| | {8 * base / 1e12:.2f} TB | 1.2 TB |",
        f"16 bytes a parameter, {16 * base / 1e12:.2f} TB",
    ):
        assert shown in page
