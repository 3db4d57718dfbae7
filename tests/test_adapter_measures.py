"""Measures of adapters, each against an example worked by hand, against the reference's way, or against its floor."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from analysis.adapters import measures
from analysis.adapters.measures import Decomposition


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis(features: int, count: int, *, seed: int) -> Tensor:
    return torch.linalg.qr(random(features, count, seed=seed)).Q


def test_phi_of_subspaces_worked_by_hand() -> None:
    # In R^3: (e1, e2) against (e1, (e2 + e3) / sqrt 2). Of the second vector one half lies in the first plane.
    first = torch.eye(3, dtype=torch.float64)[:, :2]
    second = torch.tensor([[1, 0], [0, 0.5**0.5], [0, 0.5**0.5]], dtype=torch.float64)
    phi = measures.subspace_similarity(first, second)
    torch.testing.assert_close(phi, torch.tensor([[1.0, 1.0], [1.0, 0.75]], dtype=torch.float64))


def test_phi_is_one_less_the_squared_projection_distance_by_dimension() -> None:
    first, second = basis(20, 5, seed=1), basis(20, 5, seed=2)
    phi = measures.subspace_similarity(first, second)
    for p in range(1, 6):
        distance = measures.projection_distance(first[:, :p], second[:, :p])
        assert phi[p - 1, p - 1].item() == pytest.approx(1 - distance**2 / p, abs=1e-12)
    # The distance by the angles: of two lines at 60 degrees its sine.
    line = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    other = torch.tensor([[0.5], [math.sqrt(0.75)]], dtype=torch.float64)
    assert measures.projection_distance(line, other) == pytest.approx(math.sqrt(0.75))
    # And it does not depend on the basis of a subspace.
    turned = second @ basis(5, 5, seed=3)
    assert measures.subspace_similarity(first, turned)[4, 4].item() == pytest.approx(phi[4, 4].item())


@pytest.mark.parametrize(("i", "j"), [(1, 1), (2, 8), (8, 8), (8, 3)])
def test_phi_of_random_matrices_lies_at_its_floor(i: int, j: int) -> None:
    features, draws = 48, 200
    found = [
        measures.subspace_similarity(basis(features, i, seed=2 * n), basis(features, j, seed=2 * n + 1))[-1, -1].item()
        for n in range(draws)
    ]
    mean = sum(found) / draws
    spread = math.sqrt(sum((value - mean) ** 2 for value in found) / (draws - 1) / draws)
    assert abs(mean - measures.similarity_floor(i, j, features)) < 4 * spread
    assert spread < 0.1 * measures.similarity_floor(i, j, features)


@pytest.mark.parametrize(("out_features", "in_features", "rank"), [(30, 20, 4), (12, 40, 1), (10, 8, 8), (6, 9, 12)])
def test_the_core_of_thin_factors_is_the_dense_decomposition(out_features: int, in_features: int, rank: int) -> None:
    high, low = random(out_features, rank, seed=4), random(rank, in_features, seed=5)
    thin, dense = measures.decompose_product(high, low), measures.decompose(high @ low)
    num = min(out_features, in_features, rank)
    torch.testing.assert_close(thin.values[:num], dense.values[:num], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(thin.truncated(num), high @ low, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(thin.right.T @ thin.right, torch.eye(thin.right.shape[1]).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(thin.left.T @ thin.left, torch.eye(thin.left.shape[1]).double(), rtol=0, atol=1e-10)
    phi = measures.subspace_similarity(thin.right[:, :num], dense.right[:, :num])
    torch.testing.assert_close(phi.diagonal(), torch.ones(num).double(), rtol=0, atol=1e-10)


def test_ranks_of_a_spectrum_worked_by_hand() -> None:
    values = torch.tensor([4.0, 2.0, 2.0], dtype=torch.float64)  # squares 16, 4, 4; shares 1/2, 1/4, 1/4
    assert measures.stable_rank(values) == pytest.approx(24 / 16)
    assert measures.effective_rank(values) == pytest.approx(2**1.5)  # entropy: 1/2 ln 2 + 2 * 1/4 ln 4
    assert [measures.energy_rank(values, share) for share in (0.5, 16 / 24, 0.7, 20 / 24, 0.9, 1.0)] == [
        *(1, 1, 2, 2, 3, 3)
    ]
    equal = torch.full((5,), 3.0, dtype=torch.float64)
    assert measures.stable_rank(equal) == pytest.approx(5) and measures.effective_rank(equal) == pytest.approx(5)
    zero = torch.zeros(3, dtype=torch.float64)
    assert (measures.stable_rank(zero), measures.effective_rank(zero), measures.energy_rank(zero, 0.9)) == (0, 0, 0)


def test_amplification_worked_by_hand() -> None:
    # W = diag(3, 4, 0) and dW = 6 e2 e3^T + 8 e1 e1^T: in its two directions U = (e1, e2), V = (e1, e3) W has the 3.
    base = torch.diag(torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64))
    delta = torch.zeros(3, 3, dtype=torch.float64)
    delta[1, 2], delta[0, 0] = 6, 8
    found = measures.amplification(base, measures.decompose(base).values, measures.decompose(delta), 2)
    assert found.projected == pytest.approx(3) and found.of_base == pytest.approx(5)
    assert found.base_norm == pytest.approx(5) and found.delta_norm == pytest.approx(10)
    assert found.factor == pytest.approx(10 / 3)
    assert found.floor == pytest.approx(5 * 2 / 3)
    # Where the base is zero nothing is amplified.
    alone = measures.decompose(torch.outer(base.new_tensor([0, 0, 1.0]), base.new_tensor([0, 0, 1.0])))
    assert measures.amplification(base, measures.decompose(base).values, alone, 1).factor is None


def test_the_floor_of_amplification_is_that_of_the_paper_and_of_random_directions() -> None:
    # Table 7 of the paper: |W| = 61.95 at d = 12288, random directions 0.02 at r = 4 and 0.33 at r = 64.
    assert round(61.95 * 4 / 12288, 2) == 0.02 and round(61.95 * 64 / 12288, 2) == 0.32
    base, rank = random(24, 40, seed=6), 3
    values = measures.decompose(base).values
    draw = torch.Generator().manual_seed(0)
    like = Decomposition(basis(24, rank, seed=7), torch.ones(rank).double(), basis(40, rank, seed=8))
    squares = []
    for _ in range(400):
        delta = measures.decompose(measures.random_directions(like, draw))
        found = measures.amplification(base, values, delta, rank)
        squares.append(found.projected**2)
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(found.floor, rel=0.06)


def test_random_directions_keep_the_spectrum() -> None:
    like = measures.decompose_product(random(9, 3, seed=1), random(3, 14, seed=2))
    other = measures.decompose(measures.random_directions(like, torch.Generator().manual_seed(1)))
    torch.testing.assert_close(other.values[:3], like.values, rtol=1e-10, atol=1e-10)
    assert measures.subspace_similarity(like.right, other.right[:, :3])[2, 2] < 0.7


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_leading_left_vectors_are_those_of_the_decomposition(shape: tuple[int, int]) -> None:
    matrix = random(*shape, seed=9)
    found, whole = measures.leading_left_vectors(matrix, 5), measures.decompose(matrix)
    torch.testing.assert_close((found.T @ whole.left[:, :5]).abs(), torch.eye(5).double(), rtol=0, atol=1e-9)


def test_intruders_worked_by_hand() -> None:
    # The update turns nothing of diag(3, 2, 0, 0) and adds 5 in a direction between e3 and e4, which the base has as
    # two vectors: 1/sqrt(2) = 0.707 near each of them.
    base = torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    high = torch.tensor([0, 0, 1.0, 1.0], dtype=torch.float64) / math.sqrt(2)
    delta = 5 * torch.outer(high, high)
    base_left = torch.eye(4, dtype=torch.float64)
    cosines = measures.nearest_cosines(measures.decompose(base + delta).left[:, :3], base_left)
    torch.testing.assert_close(cosines, torch.tensor([0.5**0.5, 1.0, 1.0], dtype=torch.float64))
    counts = {(e, k): measures.count_intruders(cosines, epsilon=e, k=k) for e in (0.5, 0.8) for k in (1, 3)}
    assert counts == {(0.5, 1): 0, (0.5, 3): 0, (0.8, 1): 1, (0.8, 3): 1}
    # Left with a fifth of its singular value, the direction has 1 in the place of 5; the others stay.
    tuned, found = measures.find_intruders(base + 0.1 * torch.eye(4), delta, epsilon=0.8, k=3)
    assert found.tolist() == [0]
    whole = base + delta + 0.1 * torch.eye(4)
    less = whole - 0.8 * 5.1 * torch.outer(high, high)
    torch.testing.assert_close(measures.scaled_dimensions(tuned, found, keep=0.2), less)
    assert len(measures.find_intruders(base + 0.1 * torch.eye(4), delta, epsilon=0.5, k=3)[1]) == 0


def test_intruders_are_those_that_the_peft_package_removes() -> None:
    """`peft` scales a rank-one intruder by 0.75 of itself away; its new adapter is our matrix less the base."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.intruders import reduce_intruder_dimension
    from torch import nn

    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(24, 16, bias=False)), LoraConfig(r=4, lora_alpha=4, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_(random(16, 4, seed=3).float())
    base, delta = layer.base_layer.weight.detach(), layer.get_delta_weight("default").detach()
    lines: list[str] = []
    reduce_intruder_dimension(model, top_k=3, threshold_epsilon=0.9, mitigation_lambda=0.0, logging_sink=lines.append)
    tuned, found = measures.find_intruders(base, delta, epsilon=0.9, k=3)
    assert len(found) > 0 and lines[0].endswith(f"Intruders: {len(found)}")
    ours = measures.scaled_dimensions(tuned, found, keep=0.0) - base
    # `peft` has no more than the adapter's rank for what is left, and takes rows of V^T for V.
    theirs = layer.get_delta_weight("intruder_reduced").detach().double()
    torch.testing.assert_close(theirs, measures.decompose(ours).truncated(4), rtol=1e-4, atol=1e-4)


def test_drift_and_truncation_worked_by_hand() -> None:
    base = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert measures.drift(base, 2.5) == pytest.approx(0.5)
    assert measures.drift(torch.zeros(2, 2), 2.5) is None
    whole = measures.decompose(torch.diag(torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64)))
    torch.testing.assert_close(whole.truncated(2), torch.diag(torch.tensor([0.0, 5.0, 2.0]).double()))


def test_a_random_spectrum_has_the_rank_and_of_a_gaussian_matrix_the_semicircle_edge() -> None:
    draw = torch.Generator().manual_seed(0)
    assert len(measures.random_spectrum((20, 30), 4, draw)) == 4
    values = measures.random_spectrum((200, 800), None, draw)
    # Marchenko and Pastur: between sqrt(800) - sqrt(200) and sqrt(800) + sqrt(200).
    assert values.max().item() == pytest.approx(math.sqrt(800) + math.sqrt(200), rel=0.05)
    assert values.min().item() == pytest.approx(math.sqrt(800) - math.sqrt(200), rel=0.1)
