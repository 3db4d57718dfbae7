"""LoRA (Hu et al. 2021, arXiv 2106.09685), in one sitting.

    x: (..., in)                                  W: (out, in), frozen      A: (rank, in), uniform
        |------------------ W ------------------>(+)---> y                  B: (out, rank), zeros
        |---- dropout --- A ------- B -- * s -----^
                    (rank, in)  (out, rank)

    y = x W^T + b + s * (x A^T) B^T               s: scaling = alpha / rank, or alpha / sqrt(rank) for rsLoRA

B starts at zero, so an adapted model starts as its base model. A starts as in the paper's code, uniform in
+-1/sqrt(in) (`kaiming_uniform_(a=sqrt(5))`); `harness.methods.inits` has others. The product B A is never kept for the
backward pass: it would put a matrix of the size of W into the autograd graph, and the memory measured then would not be
LoRA's. On a CPU, where all is of one type of 32 or 64 bits, without dropout on A's input and without DoRA,
`lora_linear` computes the sum and its gradients in the cheapest order.

Three kinds of `AdaptedLayer` stand in the place of a base module: `LoRALayer` around a matrix; `SlicedLoRALayer` around
one whose rows are several roles (the queries, keys and values of GPT-2), with A, B and a rank for each adapted role;
`EmbeddingLoRALayer` around an embedding. DoRA adds to the first two the length of each row of the adapted weight.

`apply_lora` puts them in, `remove_lora` puts the base modules back; `merge` and `unmerge` fold the delta weight into W
and take it out again; `harness.methods.peft_files` saves and loads adapters in PEFT's file format. Loading a second
adapter swaps it for the first. No tensor of the base model is ever written to, so removing an adapter leaves the base
bitwise as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from harness.methods.lora_linear import is_supported, lora_linear, takes_one_product
from harness.models.dropout import Dropout
from harness.placement.architectures import PlacementError, Rows


class LoRAError(ValueError):
    """An adapter that does not fit the model or the file format; the message says which part."""


class LowRank(nn.Module):
    """The trained part of an update, `delta W = scaling * B A`; with DoRA also how long each adapted row is.

    Attributes:
        in_features: columns of the matrix that is updated.
        out_features: its rows, or as many of them as `rows` are.
        rank: of the update.
        scaling: the factor.
        rows: which rows of the base weight are updated; None for all.
        lora_A: `(rank, in_features)`.
        lora_B: `(out_features, rank)`.
        lora_magnitude: `(out_features,)` with DoRA, else None.
        initial_A, initial_B: what PiSSA starts from, which is no part of the update; frozen. Elsewhere None.
    """

    in_features: int
    out_features: int
    rank: int
    scaling: float
    rows: Rows | None
    lora_magnitude: nn.Parameter | None
    initial_A: Tensor | None
    initial_B: Tensor | None

    def add_factors(
        self, shape: tuple[int, int], rank: int, scaling: float, device: torch.device, *, rows: Rows | None = None
    ) -> None:
        """Registers A and B of a matrix of `(in_features, out_features)`; A is empty and B zero."""
        self.in_features, self.out_features = shape
        self.rank, self.scaling, self.rows = rank, scaling, rows
        # In float32 whatever the base is held in: AdamW's small updates are lost in bfloat16.
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=device))
        self.register_parameter("lora_magnitude", None)
        self.register_buffer("initial_A", None, persistent=False)
        self.register_buffer("initial_B", None, persistent=False)

    def since_start(self) -> tuple[Tensor, Tensor]:
        """Factors `(r, in)` and `(out, r)` of the unscaled update: A and B, less what they started from."""
        if self.initial_A is None or self.initial_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.initial_A]), torch.cat([self.lora_B, -self.initial_B], dim=1)

    def keep_as_initial(self) -> None:
        """Makes the present A and B what the update starts from, so that it is zero now."""
        self.initial_A, self.initial_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()


class AdaptedLayer(nn.Module):
    """A frozen `base` module with low-rank updates, which can be merged into its weight.

    `row_squares` are the squared lengths of the base weight's rows, where DoRA needs them; else None.
    """

    row_squares: Tensor | None

    def attach(self, base: nn.Module, *, dropout: float) -> None:
        """Takes a base module, which is frozen, and the dropout on the input of its updates."""
        self.base = base.requires_grad_(False)
        self.dropout = Dropout(dropout)
        # A tuple, because a parameter in an attribute would count as one of the model's.
        self._unmerged: tuple[nn.Parameter, ...] = ()
        self.register_buffer("row_squares", None, persistent=False)

    def updates(self) -> dict[str, LowRank]:
        """The updates by role, in the order of their rows; an update of the whole weight has the name ''."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Thin factors and scaling of the delta weight as `(out, in)`: `(r, in)`, `(out, r)`, factor."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """What merging adds to the base weight, in float32 and in its shape."""
        return self._delta_weight().detach()

    def _delta_weight(self) -> Tensor:
        low, high, scaling = self.factors()
        delta = scaling * (high @ low)
        lengths = self.length_ratios()
        if lengths is not None:
            rows = self.base_rows()
            delta = lengths[:, None] * (rows + delta) - rows
        return delta if isinstance(self.base, nn.Linear) else delta.T

    def length_ratios(self) -> Tensor | None:
        """DoRA's factor of each row of the adapted weight, `(out,)`: its trained length over its own; else None.

        The own length counts as a constant in the backward pass, as in section 4.3 of the paper.
        """
        if all(update.lora_magnitude is None for update in self.updates().values()):
            return None
        with torch.no_grad():
            own = self._row_lengths()
        ratios = torch.ones_like(own)
        for update in self.updates().values():
            if update.lora_magnitude is None:
                continue
            of_rows = update.lora_magnitude / take_rows(own, update.rows)
            ratios = of_rows if update.rows is None else put_rows(ratios, update.rows, of_rows)
        return ratios

    def _row_lengths(self) -> Tensor:
        """The length of each row of W + s B A, `(out,)`, without forming that sum."""
        assert self.row_squares is not None
        low, high, scaling = self.factors()
        rows = self.base_rows()
        squared = self.row_squares + 2 * scaling * ((rows @ low.T) * high).sum(1)
        # A row of zeros has no direction; its trained length is 0, and what it is divided by must not be.
        return (squared + scaling**2 * ((high @ (low @ low.T)) * high).sum(1)).clamp(min=1e-12).sqrt()

    def base_rows(self) -> Tensor:
        """The base weight as `(out, in)` in float32, unmerged."""
        rows = self._unmerged[0].detach() if self._unmerged else _weight(self.base).detach()
        return (rows if isinstance(self.base, nn.Linear) else rows.T).float()

    @property
    def weight(self) -> Tensor:
        """The adapted weight, for models that compute with a module's weight and not with the module.

        transformers' fused kernels of recurrent blocks do, and DeBERTa where its queries are given.
        """
        base = _weight(self.base)
        return base if self.merged or not base.is_floating_point() else base + self._delta_weight().to(base.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base module's bias."""
        return getattr(self.base, "bias", None)

    @property
    def merged(self) -> bool:
        """Whether the base module holds the merged weight at present."""
        return bool(self._unmerged)

    def require_mergeable(self) -> None:
        """Raises `LoRAError` when the base weight is held in a type that has no sums."""
        require_unquantised(self.base, "holds no sum; load the base model unquantised to merge into it")

    def merge(self) -> None:
        """Gives the base module a weight with the delta weight in it. Does nothing when merged.

        The sum is made in float32 and rounded to the type of the base weight, so in bfloat16 or float16 a merged model
        differs from the unmerged one by that rounding. The base weight itself is kept: another module may share it, as
        a tied embedding does.
        """
        if not self.merged:
            self.require_mergeable()
            weight = self.base.weight
            assert isinstance(weight, nn.Parameter)
            merged = (weight.detach().float() + self.delta_weight()).to(weight.dtype)
            self._unmerged = (weight,)
            self.base.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)

    def unmerge(self) -> None:
        """Puts the base weight back: the same tensor, and shared as before."""
        for weight in self._unmerged:
            weight.data = weight.data.to(_weight(self.base).device)  # the model may have been moved meanwhile
            self.base.weight = weight
        self._unmerged = ()

    def base_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters of the base module by their names in it, as they are unmerged."""
        for name, parameter in self.base.named_parameters():
            yield name, self._unmerged[0] if self._unmerged and name == "weight" else parameter

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        shown = (f"{name} rank={one.rank}, scaling={one.scaling:g}".strip() for name, one in self.updates().items())
        return f"{', '.join(shown)}, merged={self.merged}"


class MatrixLayer(AdaptedLayer):
    """An adapted projection: how all of them compute."""

    in_features: int
    out_features: int
    composed = False
    """Whether W, A and B are always three products of autograd's own: where operations are counted, and the memory of a
    GPU is predicted, which computes so."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        if self.merged:
            return self.base(x)
        rows = x.reshape(-1, self.in_features)
        return self.of_rows(rows).view(*x.shape[:-1], self.out_features)

    def of_rows(self, rows: Tensor) -> Tensor:
        """What the layer makes of `(rows, in_features)` while it is not merged: `(rows, out_features)`."""
        if not self._is_plain_sum(rows):
            return self.add_update(rows, self.base(rows))
        weight = _weight(self.base)
        low, high, scaling = self.factors()
        return lora_linear(
            rows, weight if isinstance(self.base, nn.Linear) else weight.T, self.bias, low, high, scaling
        )

    def takes_one_product(self, rows: Tensor) -> bool:
        """Whether `of_rows` multiplies `rows` with the sum `W + s B A` and makes no product with W itself."""
        if not self._is_plain_sum(rows):
            return False
        weight = _weight(self.base)
        return takes_one_product(len(rows), weight if isinstance(self.base, nn.Linear) else weight.T)

    def _is_plain_sum(self, rows: Tensor) -> bool:
        """Whether the layer is `x (W + s B A)^T + b` with a frozen W, and its base module nothing but `x W^T + b`."""
        if self.composed or not is_supported(rows):  # first, because a GPU waits for whatever Python does here
            return False
        base = self.base
        factors = (factor for update in self.updates().values() for factor in (update.lora_A, update.lora_B))
        return all(factor.dtype is rows.dtype for factor in (_weight(base), *factors)) and not (
            self.row_squares is not None
            or (self.training and self.dropout.p > 0)
            # A subclass may hold W in another form; a hook or a replaced `forward` wants to see the call.
            or (type(base) is not nn.Linear and type(base).__name__ != "Conv1D")
            or base._forward_hooks
            or base._forward_pre_hooks
            or base._backward_hooks
            or base._backward_pre_hooks
            or "forward" in vars(base)
            or _weight(base).requires_grad
            or isinstance(_weight(base), DTensor)
        )

    def add_update(self, rows: Tensor, y: Tensor) -> Tensor:
        """What the layer makes of `rows`, `(rows, in_features)`, of which the base module makes `y`."""
        low, high, scaling = self.factors()
        low_rank = functional.linear(self.dropout(rows), low)  # (rows, r)
        # One fused product instead of a product, a scaling and a sum: nothing of size (rows, out) is made twice.
        y = torch.addmm(y, low_rank, high.T, alpha=scaling)
        lengths = self.length_ratios()
        if lengths is not None:
            bias = self.bias
            y = y * lengths.to(y.dtype) if bias is None else bias + (y - bias) * lengths.to(y.dtype)
        return y


class LoRALayer(MatrixLayer, LowRank):
    """A frozen `base` projection plus a trainable low-rank update of its matrix.

    Args:
        base: `nn.Linear`, or GPT-2's `Conv1D`, which keeps its weight as `(in_features, out_features)`.
        rank: rank of the update.
        scaling: the factor in `delta W = scaling * B @ A`.
        dropout: probability with which an entry of the adapter's input is zeroed in training.

    Raises:
        LoRAError: another kind of module.
    """

    def __init__(self, base: nn.Module, *, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        shape = features_of(base)
        self.attach(base, dropout=dropout)
        self.add_factors(shape, rank, scaling, _weight(base).device)

    def updates(self) -> dict[str, LowRank]:
        """This one."""
        return {"": self}

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A, B and the scaling."""
        return *self.since_start(), self.scaling


class SlicedLoRALayer(MatrixLayer):
    """A frozen projection whose rows are several roles, with one low-rank update for each adapted role.

    Computes one product with all A, one under the other, and one with all B, each in its rows and its columns of a
    matrix that is zero elsewhere: nothing is learned for the other rows, whose delta weight is exactly zero. Dropout
    draws one mask for all roles.

    Args:
        base: as in `LoRALayer`.
        parts: rows, rank and scaling of each role.
        dropout: as in `LoRALayer`.

    Raises:
        LoRAError: another kind of module, or rows that its matrix has not.
    """

    def __init__(self, base: nn.Module, parts: dict[str, tuple[Rows, int, float]], *, dropout: float = 0.0) -> None:
        super().__init__()
        shapes = {role: features_of(base, rows=rows) for role, (rows, _, _) in parts.items()}
        self.in_features, self.out_features = features_of(base)
        self.attach(base, dropout=dropout)
        self.parts = nn.ModuleDict()
        for role, (rows, rank, scaling) in parts.items():
            self.parts[role] = LowRank()
            self.parts[role].add_factors(shapes[role], rank, scaling, _weight(base).device, rows=rows)

    def updates(self) -> dict[str, LowRank]:
        """Those of the roles."""
        return cast(dict[str, LowRank], dict(self.parts.items()))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """All A, one under the other, and all B side by side, scaled, each in its own rows."""
        lows, highs = [], []
        for update in self.updates().values():
            low, high = update.since_start()
            assert update.rows is not None
            lows.append(low)
            highs.append(put_rows(high.new_zeros(self.out_features, high.shape[1]), update.rows, update.scaling * high))
        return torch.cat(lows), torch.cat(highs, dim=1), 1.0


class EmbeddingLoRALayer(AdaptedLayer, LowRank):
    """A frozen embedding plus a low-rank update: token `i` gets `scaling * B A[:, i]` added.

    As in the LoRA paper's code A, `(rank, num_embeddings)`, starts at zero and B, `(embedding_dim, rank)`, normal.
    There is no dropout: the input is a token.
    """

    def __init__(self, base: nn.Embedding, *, rank: int, scaling: float) -> None:
        super().__init__()
        shape = features_of(base)
        self.attach(base, dropout=0.0)
        self.add_factors(shape, rank, scaling, _weight(base).device)

    def updates(self) -> dict[str, LowRank]:
        """This one."""
        return {"": self}

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A, B and the scaling."""
        return *self.since_start(), self.scaling

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids `(...)` to `(..., embedding_dim)`."""
        y = self.base(ids)
        if self.merged:
            return y
        low, high, scaling = self.factors()
        low_rank = functional.embedding(ids, low.T, padding_idx=self.base.padding_idx)
        # Gemma multiplies what it has looked up.
        return y + (scaling * getattr(self.base, "embed_scale", 1.0) * functional.linear(low_rank, high)).to(y.dtype)


def features_of(base: nn.Module, *, rows: Rows | None = None) -> tuple[int, int]:
    """In and out features of a module, or of some of its rows. Raises `LoRAError` where these cannot be adapted."""
    if isinstance(base, nn.Linear):
        in_features, out_features = base.in_features, base.out_features
    elif isinstance(base, nn.Embedding):
        in_features, out_features = base.num_embeddings, base.embedding_dim
    elif is_linear(base):
        in_features, out_features = _weight(base).shape
    else:
        raise LoRAError(f"LoRA adapts nn.Linear, Conv1D and nn.Embedding, not {type(base).__name__}.")
    if rows is None:
        return in_features, out_features
    try:
        return in_features, rows.count(out_features)
    except PlacementError as error:
        raise LoRAError(str(error)) from None


def is_linear(base: nn.Module) -> bool:
    """Whether a module is a projection: `nn.Linear`, also quantised, or GPT-2's `Conv1D`."""
    return isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D"


def can_be_adapted(base: nn.Module) -> bool:
    """Whether LoRA adapts a module of this kind."""
    try:
        features_of(base)
    except LoRAError:
        return False
    return True


def require_unquantised(base: nn.Module, reason: str) -> None:
    """Raises `LoRAError`, with a reason that follows on the weight's type, for a base weight that is quantised."""
    weight = _weight(base)
    features = sorted(features_of(base))
    if not weight.is_floating_point() or sorted(weight.shape) != features:
        raise LoRAError(f"a quantised weight ({str(weight.dtype).removeprefix('torch.')}) {reason}.")


def _weight(base: nn.Module) -> Tensor:
    weight = base.weight
    assert isinstance(weight, Tensor)
    return weight


def take_rows(values: Tensor, rows: Rows | None) -> Tensor:
    """Some rows of a tensor of all rows."""
    if rows is None:
        return values
    return values.unflatten(0, (-1, rows.period))[:, rows.start : rows.stop].flatten(0, 1)


def put_rows(into: Tensor, rows: Rows, values: Tensor) -> Tensor:
    """A tensor of all rows with other values in some of them; the gradient flows into both."""
    periods = into.unflatten(0, (-1, rows.period))
    own = values.unflatten(0, (len(periods), -1))
    return torch.cat([periods[:, : rows.start], own, periods[:, rows.stop :]], dim=1).flatten(0, 1)
