"""Dropout drawn from keys: its rate, its gradients, what is kept of it, and attention with it against PyTorch's own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_models import TINY, load
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from harness.config.schema import TinyModel
from harness.models import dropout
from harness.models.dropout import Dropout, attention_with_dropout, draw_key, dropped
from harness.models.loading import checkpoint_activations

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("p", [1 / 32768, 0.003, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rate_is_right_at_every_place(p: float, dtype: torch.dtype) -> None:
    """Four entries come from one number, and each of its parts drops as often."""
    x = torch.ones(1000, 1000, dtype=dtype)
    found = dropped(x, p, 3)
    rate = round(p * 32768) / 32768
    assert abs(rate - p) <= 1 / 65536
    for part in range(4):
        share = float((found.reshape(-1)[part::4] == 0).double().mean())
        assert abs(share - rate) < 5 * math.sqrt(rate * (1 - rate) / (x.numel() / 4))
    kept = found[found != 0]
    assert torch.equal(kept, torch.full_like(kept, 1 / (1 - rate)))


def test_neighbouring_keys_and_places_are_independent() -> None:
    x = torch.ones(200_000)
    masks = [(dropped(x, 0.5, key) != 0).double() for key in (1, 2, 3, 2**62)]
    for first in range(4):
        for second in range(first):
            assert abs(float(torch.corrcoef(torch.stack([masks[first], masks[second]]))[0, 1])) < 0.012
        for apart in (1, 2, 3, 4, 64, 384):
            shifted = torch.stack([masks[first][apart:], masks[first][:-apart]])
            assert abs(float(torch.corrcoef(shifted)[0, 1])) < 0.012


def test_gradients_go_where_values_went() -> None:
    x = torch.randn(17, 33, dtype=torch.float64, requires_grad=True)
    y = dropped(x, 0.3, 7)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, (y != 0).double() * (32768 / (32768 - round(0.3 * 32768))))
    assert torch.autograd.gradcheck(lambda one: dropped(one, 0.3, 7), x)
    assert torch.autograd.gradgradcheck(lambda one: dropped(one, 0.3, 7), x)


def test_what_is_dropped_is_zero_whatever_it_was() -> None:
    found = dropped(torch.full((1000,), math.inf), 0.5, 1)
    assert set(found.tolist()) == {0.0, math.inf}


def test_shapes_of_any_kind() -> None:
    assert dropped(torch.empty(0, 3), 0.5, 1).shape == (0, 3)
    x = torch.randn(6, 5, 4)
    turned = dropped(x.transpose(0, 2), 0.5, 1)
    assert torch.equal(turned, dropped(x.transpose(0, 2).contiguous(), 0.5, 1))
    assert dropped(torch.tensor(2.0), 0.5, 1).shape == ()


def test_a_seed_says_the_mask_and_every_call_draws_another_one() -> None:
    layer, x = Dropout(0.5), torch.ones(64, 64)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    state = torch.get_rng_state()
    third = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    torch.set_rng_state(state)
    assert torch.equal(layer(x), third)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_no_mask_is_kept() -> None:
    kept: list[Tensor] = []
    x = torch.randn(64, 64, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = Dropout(0.5)(x)
    assert not kept
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad != 0, y != 0)


@pytest.mark.parametrize("change", [{"p": 0.0}, {"training": False}])
def test_where_nothing_is_dropped_the_input_comes_back(change: dict[str, Any]) -> None:
    layer, x = Dropout(0.5), torch.randn(4, 4)
    vars(layer).update(change)
    assert layer(x) is x


def test_other_kinds_are_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "dropped", None)
    for rate in (1.0, 1 - 1e-9):
        assert (Dropout(rate)(torch.ones(9)) == 0).all()
    x = torch.ones(9)
    assert Dropout(0.5, inplace=True)(x) is x
    assert Dropout(0.5)(torch.ones(9, device="meta")).device.type == "meta"


def test_modules_of_a_model_are_replaced() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2), nn.ModuleDict({"inner": nn.Dropout(0.3)}), nn.Dropout1d())
    model[1].eval()
    dropout._replace_modules(model)
    assert [type(module) for module in model.modules() if hasattr(module, "p")] == [Dropout, Dropout, nn.Dropout1d]
    assert (model[1].p, model[1].training, model[2]["inner"].p) == (0.2, False, 0.3)


# ---------------------------------------------------------------- attention


def _tensors(num_key_heads: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 4, 5, 8), (2, num_key_heads, 7, 8), (2, num_key_heads, 7, 6)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "scaled": {"scale": 0.3},
    "causal": {"is_causal": True},
    "booleans": {"attn_mask": torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.6},
    "a row that sees nothing": {"attn_mask": (torch.arange(5) > 0)[:, None].expand(2, 1, 5, 7)},
    "numbers": {"attn_mask": torch.linspace(-3, 1, 35, dtype=torch.float64).view(5, 7)},
    "groups": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_without_a_dropped_weight_is_pytorchs(name: str) -> None:
    tensors = _tensors(2 if name == "groups" else 4)
    found = attention_with_dropout(*tensors, dropout_p=1e-9, **MASKS[name])
    expected = functional.scaled_dot_product_attention(*tensors, **MASKS[name])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(expected)
    gradients = [torch.autograd.grad(each, tensors, direction) for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_attention_with_dropped_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "draw_key", lambda: 11)
    query, key, value = tensors = _tensors()
    found = attention_with_dropout(*tensors, dropout_p=0.4)
    weights = (query @ key.mT / math.sqrt(8)).softmax(-1)
    expected = dropped(weights, 0.4, 11) @ value
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(expected)
    gradients = [torch.autograd.grad(each, tensors, direction) for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_attention_is_pytorchs_without_dropout_under_autocast_in_16_bits_and_of_odd_masks() -> None:
    tensors = [tensor.detach().float() for tensor in _tensors()]
    state = torch.get_rng_state()
    expected = functional.scaled_dot_product_attention(*tensors)
    assert torch.equal(attention_with_dropout(*tensors), expected)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_with_dropout(*tensors, dropout_p=0.5).dtype == torch.bfloat16
    for dtype in (torch.float16, torch.bfloat16):
        halves = [tensor.to(dtype) for tensor in tensors]
        found = []
        for attend in (attention_with_dropout, functional.scaled_dot_product_attention):
            torch.manual_seed(0)
            found.append(attend(*halves, dropout_p=0.5))
        assert torch.equal(*found)
    with pytest.raises(RuntimeError):
        attention_with_dropout(*tensors, torch.ones(5, 7, dtype=torch.bool), dropout_p=0.5, is_causal=True)


@pytest.mark.parametrize("family", [TinyModel.bert, TinyModel.gpt2, TinyModel.llama])
def test_a_model_trains_by_it_and_is_the_same_in_evaluation(family: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    num_keys = 0

    def counted() -> int:
        nonlocal num_keys
        num_keys += 1
        return draw_key()

    monkeypatch.setattr(dropout, "draw_key", counted)
    model, plain = (load(replace(TINY[family], dropout=rate)) for rate in (0.1, 0.0))
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(5, 50, (3, 9), generator=torch.Generator().manual_seed(2))
    seen = torch.arange(9) < torch.tensor([[9], [4], [7]])
    inputs = {"input_ids": ids, "attention_mask": seen.long()}
    assert torch.equal(model.eval()(**inputs).logits, plain.eval()(**inputs).logits)
    assert num_keys == 0
    torch.manual_seed(0)
    first = model.train()(**inputs).logits
    assert num_keys >= model.config.num_hidden_layers
    assert not torch.equal(model(**inputs).logits, first)
    torch.manual_seed(0)
    assert torch.equal(model(**inputs).logits, first)
    # A recomputed pass has the masks of the first one.
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model)
        model.zero_grad()
        torch.manual_seed(3)
        model(**inputs).logits.square().mean().backward()
        gradients.append([one.grad for one in model.parameters() if one.grad is not None])
    torch.testing.assert_close(*gradients)
