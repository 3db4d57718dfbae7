"""The measures themselves: tensors in, numbers out. Matrices are `(out_features, in_features)`, as `nn.Linear` has.

    phi(i, j)       = |V_i^T V'_j|_F^2 / min(i, j)        LoRA paper (arXiv 2106.09685), section 7.2
    amplification   = |dW|_F / |U^T W V|_F                its section 7.3, Table 7
    intruder        : max_i |cos(u_j, x_i)| < epsilon     Shuttleworth et al. 2024 (arXiv 2410.21228), definition 3.1

Singular vectors stand in the columns of a matrix, the one of the largest singular value first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A singular value below this part of the largest one is round-off.
_ROUND_OFF = 1e-12


@dataclass(frozen=True)
class Decomposition:
    """A singular value decomposition, `left @ diag(values) @ right.T`.

    Attributes:
        left: `(out_features, p)`, orthonormal columns.
        values: `(p,)`, descending, none negative.
        right: `(in_features, p)`, orthonormal columns.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def truncated(self, rank: int) -> Tensor:
        """The matrix of at most this rank that is nearest to the whole (Eckart and Young 1936)."""
        return (self.left[:, :rank] * self.values[:rank]) @ self.right[:, :rank].T


def decompose(matrix: Tensor) -> Decomposition:
    """Of a dense matrix, in float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Decomposition(left, values, right.T)


def decompose_product(high: Tensor, low: Tensor) -> Decomposition:
    """Of the product of thin factors, in float64, without forming it.

    Both factors are orthogonalised, and what is decomposed is the small matrix between their bases:
    `high @ low = Q_high (R_high R_low^T) Q_low^T`.

    Args:
        high: `(out_features, rank)`: B, scaled.
        low: `(rank, in_features)`: A.
    """
    high_basis, high_core = torch.linalg.qr(high.double())
    low_basis, low_core = torch.linalg.qr(low.double().T)
    core = decompose(high_core @ low_core.T)
    return Decomposition(high_basis @ core.left, core.values, low_basis @ core.right)


def leading_left_vectors(matrix: Tensor, count: int) -> Tensor:
    """The left singular vectors of the `count` largest singular values, `(out_features, count)`.

    From the eigenvectors of the smaller of the two Gram matrices: a fraction of the time of a whole decomposition, and
    exact enough for vectors of large singular values.
    """
    rows = matrix.double()
    wide = rows.shape[0] <= rows.shape[1]
    gram = rows @ rows.T if wide else rows.T @ rows
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]
    if wide:
        return vectors
    images: Tensor = rows @ vectors
    lengths: Tensor = images.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    return images / lengths


# ---------------------------------------------------------------- subspaces


def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """phi(i, j) for every i and j, `(p, q)`: how much of one subspace lies in the other, between 0 and 1.

    Args:
        first: `(features, p)`, orthonormal columns of which the first i span the subspace.
        second: `(features, q)`, likewise.
    """
    overlaps = (first.T @ second).square().cumsum(0).cumsum(1)
    return overlaps / _smaller_dimension(*overlaps.shape)


def _smaller_dimension(p: int, q: int) -> Tensor:
    return torch.minimum(torch.arange(1, p + 1)[:, None], torch.arange(1, q + 1)[None, :]).double()


def similarity_floor(i: int, j: int, features: int) -> float:
    """The mean of phi(i, j) of random subspaces: each of min(i, j) unit vectors has j/d (or i/d) of its square inside.

    >>> similarity_floor(8, 64, 768)
    0.08333333333333333
    """
    return max(i, j) / features


def projection_distance(first: Tensor, second: Tensor) -> float:
    """The projection metric of two subspaces of one dimension p: `|P - P'|_F / sqrt(2)`, from 0 to sqrt(p).

    phi(p, p) = 1 - d^2 / p; the paper's appendix G prints (1 - d^2) / p.
    """
    return float((first @ first.T - second @ second.T).norm() / math.sqrt(2))


# ---------------------------------------------------------------- spectra


def stable_rank(values: Tensor) -> float:
    """`|M|_F^2 / |M|_2^2` from singular values: at most the rank, hardly moved by small ones; 0 of a zero matrix."""
    largest = values.max()
    return float((values / largest).square().sum()) if largest > 0 else 0.0


def effective_rank(values: Tensor) -> float:
    """The exponential of the Shannon entropy of the normalised singular values (Roy and Vetterli 2007, EUSIPCO).

    r equal values give r; 0 of a zero matrix.
    """
    total = values.sum()
    if total <= 0:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def energy_rank(values: Tensor, share: float) -> int:
    """How many of the largest singular values have this share of the sum of squares; 0 of a zero matrix."""
    squares = values.square()
    total = squares.sum()
    if total <= 0:
        return 0
    reached = squares.cumsum(0) / total
    return int((reached < share - _ROUND_OFF).sum()) + 1


def random_spectrum(shape: tuple[int, int], rank: int | None, draw: torch.Generator) -> Tensor:
    """Singular values of a random matrix to compare with: of Gaussian factors of a rank, or Gaussian itself (None)."""
    out_features, in_features = shape
    if rank is not None:
        return decompose_product(_normal(out_features, rank, draw), _normal(rank, in_features, draw)).values
    values: Tensor = torch.linalg.svdvals(_normal(out_features, in_features, draw))
    return values


def random_directions(like: Decomposition, draw: torch.Generator) -> Tensor:
    """A matrix with the singular values of another one, whose singular vectors are uniformly random."""
    left, right = (_random_basis(each, draw) for each in (like.left, like.right))
    return (left * like.values) @ right.T


def _random_basis(like: Tensor, draw: torch.Generator) -> Tensor:
    basis: Tensor = torch.linalg.qr(_normal(like.shape[0], like.shape[1], draw)).Q
    return basis


def _normal(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=draw)


# ---------------------------------------------------------------- against the base


@dataclass(frozen=True)
class Amplification:
    """How much of the base weight lies where the delta weight acts, and how much the delta weight adds there.

    Attributes:
        projected: `|U^T W V|_F` with the first r singular vectors of the delta weight.
        of_base: the same with those of W: the most that is possible.
        floor: what random directions have in the mean, `|W|_F r / sqrt(out_features * in_features)`.
        base_norm: `|W|_F`.
        delta_norm: `|dW|_F` of what the delta weight has in these directions: of a product of that rank all of it.
    """

    projected: float
    of_base: float
    floor: float
    base_norm: float
    delta_norm: float

    @property
    def factor(self) -> float | None:
        """The amplification factor; None where the base has nothing in these directions."""
        return self.delta_norm / self.projected if self.projected > 0 else None


def amplification(base: Tensor, base_values: Tensor, delta: Decomposition, rank: int) -> Amplification:
    """Of a delta weight in its first `rank` directions.

    Args:
        base: W, `(out_features, in_features)`.
        base_values: its singular values, descending.
        delta: the decomposition of the delta weight.
        rank: r.
    """
    left, right = delta.left[:, :rank], delta.right[:, :rank]
    out_features, in_features = base.shape
    norm = float(base_values.norm())
    return Amplification(
        projected=float((left.T @ base.double() @ right).norm()),
        of_base=float(base_values[:rank].norm()),
        floor=norm * rank / math.sqrt(out_features * in_features),
        base_norm=norm,
        delta_norm=float(delta.values[:rank].norm()),
    )


def nearest_cosines(vectors: Tensor, base_left: Tensor) -> Tensor:
    """For each column the largest |cosine| to any left singular vector of the base weight."""
    return (vectors.T @ base_left).abs().amax(dim=1)


def count_intruders(cosines: Tensor, *, epsilon: float, k: int) -> int:
    """How many of the first `k` singular vectors are like none of the base's: whose nearest cosine is below epsilon."""
    return int((cosines[:k] < epsilon).sum())


def find_intruders(base: Tensor, delta: Tensor, *, epsilon: float, k: int) -> tuple[Decomposition, Tensor]:
    """The decomposition of W + dW, and which of its first `k` dimensions are intruders, by number."""
    tuned = decompose(base.double() + delta.double())
    cosines = nearest_cosines(tuned.left[:, :k], decompose(base).left)
    return tuned, (cosines < epsilon).nonzero().ravel()


def scaled_dimensions(tuned: Decomposition, dimensions: Tensor, *, keep: float) -> Tensor:
    """A matrix of which some dimensions have the part `keep` of their singular value left; 1 changes nothing.

    As the paper scales intruders: `W + dW + (keep - 1) * sum_j s_j u_j v_j^T` over the dimensions j.
    """
    values = tuned.values.clone()
    values[dimensions] *= keep
    return (tuned.left * values) @ tuned.right.T


def drift(base: Tensor, delta_norm: float) -> float | None:
    """`|dW|_F / |W|_F`, how far a matrix has moved; None of a base of zeros."""
    norm = float(base.double().norm())
    return delta_norm / norm if norm > 0 else None
