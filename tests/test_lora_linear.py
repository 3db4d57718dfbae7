"""`lora_linear` equals the products that it stands for, and computes them in the cheaper order."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from harness.config.schema import Init, VariantConfig
from harness.measure.memory import LiveTensors
from harness.measure.without_data import floats_without_data
from harness.methods.inits import start
from harness.methods.lora import LoRALayer, MatrixLayer, SlicedLoRALayer
from harness.methods.lora_linear import lora_linear
from harness.placement.architectures import Rows

# rows, in, out, rank; and for y, for dx, and for dA and dB, whether a matrix of the size of W is formed.
SHAPES = {
    "few rows": ((3, 16, 24, 2), (False, False, False)),
    "many rows": ((96, 16, 24, 2), (True, True, False)),
    "more outputs than rows": ((40, 16, 64, 4), (True, False, False)),
    "a large rank": ((96, 16, 24, 12), (True, True, True)),
    "a large rank and few rows": ((12, 16, 24, 16), (True, False, False)),
    "one of each": ((1, 1, 1, 1), (True, True, True)),
}
TRAINED = {
    "all": ("x", "bias", "low", "high"),
    "not x": ("low", "high"),
    "A alone": ("x", "low"),
    "B alone": ("high",),
    "x alone": ("x",),
}
SCALING = 1.7


def _tensors(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    rows, in_features, out_features, rank = shape
    draw = torch.Generator().manual_seed(sum(shape))
    shapes = {
        "x": (rows, in_features),
        "weight": (out_features, in_features),
        "bias": (out_features,),
        "low": (rank, in_features),
        "high": (out_features, rank),
    }
    return {name: torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for name, size in shapes.items()}


def _as_written(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, high: Tensor, scaling: float) -> Tensor:
    return functional.linear(x, weight, bias) + scaling * (x @ low.T) @ high.T


def _values_and_gradients(
    compute: Callable[..., Tensor], tensors: dict[str, Tensor], trained: tuple[str, ...]
) -> list[Tensor]:
    leaves = {name: tensor.clone().requires_grad_(name in trained) for name, tensor in tensors.items()}
    y = compute(*leaves.values(), SCALING)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [leaves[name] for name in trained], g)]


def _distance(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(params=["highest", "high"])
def precision(request: pytest.FixtureRequest) -> object:
    """How float32 matrices are multiplied: as they are, or rounded on devices that can."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED.keys())
@pytest.mark.parametrize("shape", [shape for shape, _ in SHAPES.values()], ids=SHAPES.keys())
def test_values_and_gradients_are_those_of_the_products_as_written(
    shape: tuple[int, int, int, int], trained: tuple[str, ...], dtype: torch.dtype, bound: float
) -> None:
    tensors = _tensors(shape, dtype)
    expected = _values_and_gradients(_as_written, {name: one.double() for name, one in tensors.items()}, trained)
    found = _values_and_gradients(lora_linear, tensors, trained)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype is dtype and ours.shape == theirs.shape
        assert _distance(ours.double(), theirs) < bound
    transposed = {**tensors, "weight": tensors["weight"].T.contiguous().T}
    for ours, theirs in zip(_values_and_gradients(lora_linear, transposed, trained), expected, strict=True):
        assert _distance(ours.double(), theirs) < bound


@pytest.mark.parametrize(("shape", "forms"), SHAPES.values(), ids=SHAPES.keys())
def test_the_cheaper_order_is_computed(
    shape: tuple[int, int, int, int], forms: tuple[bool, bool, bool], precision: str
) -> None:
    rows, in_features, out_features, rank = shape
    tensors = _tensors(shape, torch.float32)
    leaves = {name: tensor.requires_grad_(name != "weight") for name, tensor in tensors.items()}
    product, matrix = rows * in_features * out_features, rank * in_features * out_features
    low, high = rows * rank * in_features, rows * rank * out_features
    in_y, in_dx, in_factors = forms
    if precision == "high":
        in_y = in_dx = False
    in_place = {torch.ops.aten.addmm_: lambda into, one, other, **rest: 2 * one[0] * one[1] * other[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as forward:
        y = lora_linear(*leaves.values(), SCALING)
    assert forward.get_total_flops() == 2 * (product + (matrix if in_y else low + high))
    with FlopCounterMode(display=False, custom_mapping=in_place) as backward:
        y.sum().backward()
    expected = product + (matrix if in_dx else low) + (product + 2 * matrix if in_factors else 2 * low + 2 * high)
    if in_factors and not in_dx:
        expected += high  # g B, which the gradient of A has no use for then
    assert backward.get_total_flops() == 2 * expected


@pytest.mark.parametrize("shape", [shape for shape, _ in SHAPES.values()], ids=SHAPES.keys())
def test_first_and_second_derivatives_are_those_of_differences(shape: tuple[int, int, int, int]) -> None:
    rows, in_features, out_features, rank = (min(size, 7) for size in shape)
    for sizes in ((rows, in_features, out_features, rank), (7, 2, 3, 2), (2, 3, 4, 1), (3, 1, 5, 1)):
        tensors = _tensors(sizes)
        x, weight, bias, low, high = tensors.values()
        trained = tuple(one.requires_grad_() for one in (x, bias, low, high))

        def compute(x: Tensor, bias: Tensor, low: Tensor, high: Tensor, weight: Tensor = weight) -> Tensor:
            return lora_linear(x, weight, bias, low, high, SCALING)

        assert torch.autograd.gradcheck(compute, trained)
        assert torch.autograd.gradgradcheck(compute, trained)


def test_a_weight_that_trains_is_refused() -> None:
    tensors = _tensors((4, 3, 2, 1))
    tensors["weight"].requires_grad_()
    with pytest.raises(ValueError, match=r"weight\.requires_grad=True: .* freeze it"):
        lora_linear(*tensors.values(), SCALING)
    with torch.no_grad():
        lora_linear(*tensors.values(), SCALING)


def test_there_is_a_function_transform() -> None:
    x, weight, bias, low, high = _tensors((40, 8, 8, 2)).values()

    def total(low: Tensor, compute: Callable[..., Tensor]) -> Tensor:
        return compute(x, weight, bias, low, high, SCALING).square().sum()

    found = torch.func.grad(total)(low, lora_linear)
    assert _distance(found, torch.func.grad(total)(low, _as_written)) < 1e-14


# ---------------------------------------------------------------- layers


def _layer(kind: str, *, dropout: float = 0.0, variant: VariantConfig | None = None) -> MatrixLayer:
    torch.manual_seed(0)
    base = Conv1D(24, 16) if kind == "Conv1D" else nn.Linear(16, 24, bias=kind != "no bias")
    if kind == "roles":
        parts = {"q": (Rows(0, 8, 24), 2, 0.5), "v": (Rows(16, 24, 24), 4, 2.0)}
        layer: MatrixLayer = SlicedLoRALayer(base, parts, dropout=dropout)
    else:
        layer = LoRALayer(base, rank=3, scaling=SCALING, dropout=dropout)
    start(layer, variant or VariantConfig())
    with torch.no_grad():
        for update in layer.updates().values():
            update.lora_B.add_(torch.randn_like(update.lora_B))
    return layer.double()


KINDS = ("Linear", "no bias", "Conv1D", "roles")


def _calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each call of `lora_linear` by a layer."""
    calls: list[int] = []

    def counted(x: Tensor, *rest: object) -> Tensor:
        calls.append(len(x))
        return lora_linear(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("harness.methods.lora.lora_linear", counted)
    return calls


def _of_layer(layer: MatrixLayer, x: Tensor, *, checkpointing: bool = False) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False) if checkpointing else layer(x)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", [(4, 12, 16), (2, 2, 16), (16,), (3, 0, 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_layer_as_written(
    kind: str, shape: tuple[int, ...], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, calls = _layer(kind), _calls(monkeypatch)
    if layer.bias is not None:
        layer.bias.requires_grad_()  # as with variant.bias
    x = torch.randn(shape, dtype=torch.float64)
    found = _of_layer(layer, x, checkpointing=checkpointing)
    assert len(calls) == 1 + checkpointing
    layer.composed = True
    expected = _of_layer(layer, x)
    assert len(calls) == 1 + checkpointing
    assert len(found) == len(expected) >= 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).norm() <= 1e-12 * theirs.norm()
    layer.composed = False
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected[0], rtol=1e-12, atol=1e-12)


def test_what_an_update_started_from_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = _layer("Linear", variant=VariantConfig(init=Init.pissa)), _calls(monkeypatch)
    x = torch.randn(40, 16, dtype=torch.float64)
    found = _of_layer(layer, x)
    layer.composed = True
    assert calls == [40]
    for ours, theirs in zip(found, _of_layer(layer, x), strict=True):
        assert _distance(ours, theirs) < 1e-12


def _trains_base(layer: MatrixLayer) -> None:
    layer.base.requires_grad_()


def _is_listened_to(layer: MatrixLayer) -> None:
    layer.base.register_forward_hook(lambda module, inputs, output: output)


def _is_of_another_kind(layer: MatrixLayer) -> None:
    layer.base.__class__ = type("Linear4bit", (nn.Linear,), {})


def _is_called_otherwise(layer: MatrixLayer) -> None:
    layer.base.forward = layer.base.forward


@pytest.mark.parametrize(
    "change",
    [_trains_base, _is_listened_to, _is_of_another_kind, _is_called_otherwise],
)
def test_products_are_computed_as_written_where_the_base_is_more_than_a_frozen_matrix(
    change: Callable[[MatrixLayer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, calls = _layer("Linear"), _calls(monkeypatch)
    expected = _of_layer(layer, x := torch.randn(40, 16, dtype=torch.float64))
    assert calls == [40]
    change(layer)
    found = _of_layer(layer, x)
    assert calls == [40]
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert _distance(ours, theirs) < 1e-12


def test_dropout_dora_and_merged_weights_are_computed_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _calls(monkeypatch)
    x = torch.randn(40, 16, dtype=torch.float64)
    dropping = _layer("Linear", dropout=0.5)
    dropping(x)
    _layer("Linear", variant=VariantConfig(dora=True)).float()(x.float())
    merged = _layer("Linear")
    merged.merge()
    merged(x)
    assert calls == []
    dropping.eval()(x)
    assert calls == [40]


def test_under_autocast_products_are_computed_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = _layer("Linear").float(), _calls(monkeypatch)
    x = torch.randn(40, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _of_layer(layer, x)
    assert calls == [] and found[0].dtype is torch.bfloat16
    for ours, theirs in zip(found, _of_layer(layer, x), strict=True):
        assert _distance(ours, theirs) < 0.02
    assert calls == [40]


def test_without_data_as_many_bytes_are_alive() -> None:
    """Of a step of three layers over one input, which they keep once."""

    def peak() -> int:
        layers = nn.ModuleList([LoRALayer(nn.Linear(32, 48), rank=4, scaling=1.0) for _ in range(3)])
        x = torch.zeros(200, 32, requires_grad=True)
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.0)
        with LiveTensors(layers, optimizer) as live:
            outputs = [layer(x) for layer in layers]
            kept = live.peak.activations_bytes
            sum(output.sum() for output in outputs).backward()
        # The input once, three outputs, and W + s B A while the last of them is computed.
        assert kept == 4 * (200 * 32 + 3 * 200 * 48 + 32 * 48)
        return live.peak.total_bytes

    expected = peak()
    with floats_without_data():
        assert peak() == expected


# Of torch itself, while it traces an operation of autograd.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_layer_can_be_compiled_and_copied() -> None:
    layer = _layer("Linear")
    x = torch.randn(40, 16, dtype=torch.float64)
    expected = _of_layer(layer, x)
    for other in (torch.compile(layer, backend="aot_eager"), copy.deepcopy(layer)):
        for ours, theirs in zip(_of_layer(other, x), expected, strict=True):
            assert _distance(ours, theirs) < 1e-12
