"""Several adapted models over one base as one model: each computes its own rows of a batch.

The runs of a pack have separate models, with their own adapters, heads and optimizers, over the same frozen
tensors (`share_base`). A `PackedModel` is one more module tree over these tensors. Rows lie one run after the other:

    x: rows of run 1 | rows of run 2 | ...
       |------------------ W ------------------------------->(+)---> y     one product for all
       |-- A1, B1 --------|-- A2, B2 --------|-- ... ---------^            each run's adapter on its rows

On a CPU the product with `W + s B A` is cheaper with many rows (`harness.methods.lora_linear`): each run makes its own
then, as it does alone. Where no adapter is, all rows are computed at once; where a run trains a whole module (a head, a
norm), each computes its own rows with its own module, and a run without an adapter somewhere adds nothing there. No
parameter that trains is shared, so a run's gradients are those that it would have alone, up to the rounding of products
of more rows.

On a GPU a small product takes no longer than its launch. There the factors of all runs of a matrix lie in one tensor,
and one batched product computes all adapters (`Stack`), where all batches have equally many rows.

Where all runs have the same batch, the blocks below the lowest one in which they differ are computed once.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.methods.lora import AdaptedLayer, LoRALayer, MatrixLayer
from harness.methods.trunk import without_memory
from harness.placement.architectures import ARCHITECTURES, DROPOUT_FIELDS


class PackError(RuntimeError):
    """A model that cannot be computed together with others; the message says why."""


# ---------------------------------------------------------------- one base


Shared = dict[tuple[str, torch.Size, torch.dtype, torch.device], list[Tensor]]
"""The frozen tensors of models so far, by name and shape."""


def share_base(model: nn.Module, shared: Shared, *, is_equal: Callable[[Tensor, Tensor], bool] = torch.equal) -> None:
    """Puts tensors that earlier models have in the place of a model's own, where these are frozen and bitwise equal.

    What no earlier model has is kept in `shared` for later ones. So nobody has to say which models have one base. Where
    tensors have no data to compare, `is_equal` says which are alike.
    """
    for name, module in model.named_modules():
        path = ".".join(part for part in name.split(".") if part != "base")  # as it is called without an adapter
        for own, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for leaf, tensor in own.items():
                if tensor is None or tensor.requires_grad or tensor.layout is not torch.strided:
                    continue
                known = shared.setdefault((f"{path}.{leaf}", tensor.shape, tensor.dtype, tensor.device), [])
                same = next((one for one in known if one is tensor or is_equal(one, tensor)), None)
                if same is None:
                    known.append(tensor)
                elif not is_parameter or isinstance(same, nn.Parameter):
                    own[leaf] = same  # type: ignore[assignment]


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    yield from itertools.chain(model.parameters(), model.buffers())


def copy_over_same_tensors(model: nn.Module) -> nn.Module:
    """Separate modules, over the parameters, buffers and configuration of a model."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors_of(model)}
    config = getattr(model, "config", None)
    if config is not None:
        memo[id(config)] = config
    return copy.deepcopy(model, memo)


def why_alone(model: nn.Module) -> str | None:
    """Why a model cannot share a pass with others; None where it can."""
    parameters = list(model.parameters())
    if all(parameter.requires_grad for parameter in parameters):
        return "every parameter trains, so there is no base to share"
    if getattr(model, "is_quantized", False):
        return "its base is quantised"
    inside = {id(layer.dropout) for layer in model.modules() if isinstance(layer, AdaptedLayer)}
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return "batch normalisation mixes the examples of a batch"
        if isinstance(module, nn.Dropout) and module.p > 0 and id(module) not in inside:
            return "dropout in the base model draws one mask for all rows"
        if isinstance(module, AdaptedLayer) and module.dropout.p > 0 and parameters[0].device.type != "cpu":
            return "adapter dropout keeps a random state for each run on the CPU alone"
    config = getattr(model, "config", None)
    if any(getattr(config, name, None) for name in DROPOUT_FIELDS):
        return "dropout in the base model draws one mask for all rows"
    if any((getattr(config, name, None) or 0) > 1 for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "a mixture of experts routes the rows of a batch together"
    if draws(model) and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "gradient checkpointing draws adapter dropout again"
    return None


# ---------------------------------------------------------------- rows


@dataclass
class Layout:
    """Which rows of the batch at hand are whose.

    Attributes:
        rows: how many each run has, in the order of the runs.
        random_states: of each run, from which its adapter's dropout is drawn.
        widths: of each run, the outputs of its head, where these differ.
        num_shared: the rows of one run while all have the same and the blocks computed once are passed; else None.
        hidden: what enters the unembedding, where each run has its own.
    """

    rows: list[int] = field(default_factory=list)
    random_states: list[Tensor] = field(default_factory=list)
    widths: list[int] | None = None
    num_shared: int | None = None
    hidden: Tensor | None = None

    def split(self, x: Tensor) -> list[Tensor]:
        """The part of each run. The first dimension may be that of the rows with others behind it in one."""
        factor, rest = divmod(len(x), sum(self.rows))
        if rest or not factor:
            raise PackError(f"{len(x)} rows where the batch has {sum(self.rows)}")
        return list(x.split([factor * rows for rows in self.rows]))

    @contextlib.contextmanager
    def drawing(self, run: int) -> Iterator[None]:
        """Draws from the random numbers of a run."""
        own = torch.get_rng_state()
        torch.set_rng_state(self.random_states[run])
        try:
            yield
        finally:
            self.random_states[run] = torch.get_rng_state()
            torch.set_rng_state(own)

    def each(self, compute: Sequence[Callable[..., Tensor]], drawn: Sequence[bool], *parts: list[Tensor]) -> Tensor:
        """What each run makes of its parts, one after the other; narrower ones are filled up with zeros."""
        made = []
        for run, one in enumerate(compute):
            with self.drawing(run) if drawn[run] else contextlib.nullcontext():
                made.append(one(*(part[run] for part in parts)))
        widths = [part.shape[-1] for part in made]
        if len(set(widths)) > 1:
            self.widths = widths
            made = [functional.pad(part, (0, max(widths) - part.shape[-1])) for part in made]
        return torch.cat(made)


def draws(module: nn.Module) -> bool:
    """Whether a module draws random numbers in training."""
    return any(isinstance(inner, nn.Dropout) and inner.p > 0 for inner in module.modules())


def stacks_on(device: torch.device) -> bool:
    """Whether adapters of runs are computed by batched products. On the CPU, of a few cores, these are no faster."""
    return device.type != "cpu"


class Stack:
    """The factors of several runs' adapters of one matrix in one tensor: narrower ones and absent ones are zero.

    Attributes:
        low: `(runs, rank, in)`, with a gradient, as `high`.
        high: `(runs, out, rank)`.
        slots: the part of `low` or `high` that is each parameter, behind which of the two it is.
    """

    def __init__(self, adapters: Sequence[LoRALayer | None]) -> None:
        given = [adapter for adapter in adapters if adapter is not None]
        rank, (first, *_) = max(adapter.rank for adapter in given), given
        self.low = first.lora_A.new_zeros(len(adapters), rank, first.in_features)
        self.high = first.lora_B.new_zeros(len(adapters), first.out_features, rank)
        self.slots: list[tuple[nn.Parameter, Tensor, tuple[Any, ...]]] = []
        for run, adapter in enumerate(adapters):
            if adapter is not None:
                self.slots.append((adapter.lora_A, self.low, (run, slice(adapter.rank))))
                self.slots.append((adapter.lora_B, self.high, (run, slice(None), slice(adapter.rank))))
        scalings = [adapter.scaling if adapter is not None else given[0].scaling for adapter in adapters]
        self._scaling = scalings[0] if len(set(scalings)) == 1 else None
        self._scalings = self.low.new_tensor(scalings).view(-1, 1, 1)
        self.low.requires_grad_()
        self.high.requires_grad_()

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether an adapter is `s B A` with A and B alone."""
        return (
            isinstance(module, LoRALayer)
            and module.row_squares is None
            and module.initial_A is None
            and not draws(module)
            and module.lora_A.requires_grad
            and module.lora_B.requires_grad
        )

    def add_updates(self, rows: Tensor, y: Tensor) -> Tensor:
        """What the adapters make of `(runs * n, in)`, added to what the base module makes of it, `(runs * n, out)`."""
        num_runs, _, in_features = self.low.shape
        low_rank = torch.bmm(rows.view(num_runs, -1, in_features), self.low.mT)
        if self._scaling is None:
            low_rank = low_rank * self._scalings  # in float32: a bfloat16 would make another factor of 16 / 3
        y = y.view(num_runs, -1, y.shape[-1])
        alpha = 1.0 if self._scaling is None else self._scaling
        return torch.baddbmm(y, low_rank, self.high.mT, alpha=alpha).flatten(0, 1)


class PackedLayer(nn.Module):
    """One base matrix that several runs adapt, each with its own layer, or not at all."""

    def __init__(self, modules: Sequence[nn.Module], layout: Layout) -> None:
        super().__init__()
        self.layers = nn.ModuleList(module for module in modules if isinstance(module, AdaptedLayer))
        first = cast(MatrixLayer, self.layers[0])
        self.base, self.in_features, self.out_features = first.base, first.in_features, first.out_features
        self._layout = layout
        self._adapters = [module if isinstance(module, MatrixLayer) else None for module in modules]
        self._draws = [draws(module) for module in modules]
        self.stack: Stack | None = None

    def make_stack(self) -> None:
        """Lets one batched product compute the adapters where it can, by copies of their factors that are kept up."""
        if not all(Stack.takes(layer) for layer in self.layers):
            return
        if stacks_on(self.base.weight.device) or all(cast(LoRALayer, layer).composed for layer in self.layers):
            self.stack = Stack(cast(list[LoRALayer | None], self._adapters))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        rows = x.reshape(-1, self.in_features)
        if self.stack is not None and len(set(self._layout.rows)) == 1:
            y = self.stack.add_updates(rows, self.base(rows))
            return y.view(*x.shape[:-1], self.out_features)
        parts = self._layout.split(rows)
        adapted = [(adapter, part) for adapter, part in zip(self._adapters, parts, strict=True) if adapter is not None]
        if all(adapter.takes_one_product(part) for adapter, part in adapted):
            y = self._layout.each(
                [adapter.of_rows if adapter else self.base for adapter in self._adapters], self._draws, parts
            )
        else:
            add = [adapter.add_update if adapter else _keep for adapter in self._adapters]
            y = self._layout.each(add, self._draws, parts, self._layout.split(self.base(rows)))
        return y.view(*x.shape[:-1], self.out_features)


def _keep(rows: Tensor, y: Tensor) -> Tensor:
    return y


class PerRun(nn.Module):
    """A module of which each run has its own."""

    def __init__(self, modules: Sequence[nn.Module], layout: Layout) -> None:
        super().__init__()
        self.of_runs = nn.ModuleList(modules)
        self._layout = layout
        self._draws = [draws(module) for module in modules]

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Each run's rows through its own module."""
        if rest or named:
            raise PackError("a module that trains takes more than one input")
        return self._layout.each(list(self.of_runs), self._draws, self._layout.split(x))


class _Unembedding(nn.Module):
    """Keeps what enters the unembedding: each run makes logits, or a loss, of its rows later."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self._layout = layout

    def forward(self, hidden: Tensor) -> Tensor:
        self._layout.hidden = hidden
        return hidden


# ---------------------------------------------------------------- the model


class PackedModel:
    """The models of several runs as one.

    Args:
        models: with one base (see `share_base`), in training mode.

    Raises:
        PackError: for models that differ in more than modules that train.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = list(models)
        self._layout = Layout()
        self._tree = copy_over_same_tensors(self.models[0])
        self._replaced = list(_combine(self._tree, self._layout, self.models))
        self._splits_unembedding = self._split_unembedding()
        self._stacks = list(self._make_stacks()) if len(self.models) > 1 else []
        slots = [slot for stack in self._stacks for slot in stack.slots]
        self._slots = {id(parameter): (whole, part) for parameter, whole, part in slots}
        self._stacked = [parameter for parameter, _, _ in slots]
        with torch.no_grad():
            self._in_stacks = [whole[part] for _, whole, part in slots]
        self._is_same = False
        self._block_names: list[str] = []
        self._first_own_block, blocks = self._find_blocks()
        for block in blocks:
            without_memory(block)
        self.shares_trunk = self._first_own_block > 0
        if self.shares_trunk:
            for block in blocks[: self._first_own_block]:
                block.register_forward_pre_hook(self._narrow, with_kwargs=True)
            blocks[self._first_own_block - 1].register_forward_hook(self._widen)

    @property
    def first_own_block(self) -> int:
        """The index of the lowest block in which a run trains something; their number where none does."""
        return self._first_own_block

    def frozen_blocks(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of a run's own model that lie below that."""
        return [model.get_submodule(name) for name in self._block_names[: self._first_own_block]]

    def outputs(
        self, inputs: Sequence[Mapping[str, Tensor]], random_states: Sequence[Tensor], *, is_same: bool = False
    ) -> list[RunOutputs]:
        """One forward pass over the batches of all runs; what each run's model would have returned for its own.

        Args:
            inputs: of each run, as its model takes them, each `(rows, tokens)`.
            random_states: of each run; what is drawn is drawn from them, and `random_states` has them afterwards.
            is_same: whether all batches are the same one.
        """
        layout = self._layout
        layout.rows = [len(batch["input_ids"]) for batch in inputs]
        if self._stacked and len(set(layout.rows)) == 1:
            with torch.no_grad():
                torch._foreach_copy_(self._in_stacks, self._stacked)
        layout.random_states, layout.widths, layout.hidden = list(random_states), None, None
        self._is_same = is_same and self.shares_trunk and len(inputs) > 1
        pad_id = getattr(getattr(self.models[0], "config", None), "pad_token_id", None) or 0
        made = cast(Any, self._tree(**_concatenate(inputs, pad_id)))
        logits = layout.split(made.logits if layout.hidden is None else layout.hidden)
        layout.hidden = None
        found = []
        for run, (model, batch, own) in enumerate(zip(self.models, inputs, logits, strict=True)):
            if own.ndim > 2:  # of every token
                own = own[:, : batch["input_ids"].shape[1]]
            if layout.widths is not None:
                own = own[..., : layout.widths[run]]
            found.append(RunOutputs(model, own, has_unembedding=self._splits_unembedding))
        return found

    def gradients(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """The gradients of what was made of the last outputs; None for a parameter that has no part in it."""
        leaves = [*parameters, *(factor for stack in self._stacks for factor in (stack.low, stack.high))]
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        of_leaves = {id(leaf): gradient for leaf, gradient in zip(leaves, found, strict=True)}
        for stack in self._stacks:  # laid out as parameters are, where all have one rank: once, and not for each run
            gradient = of_leaves[id(stack.high)]
            of_leaves[id(stack.high)] = None if gradient is None else gradient.contiguous()
        gradients = []
        for parameter in parameters:
            whole, part = self._slots.get(id(parameter), (None, ()))
            in_stack = None if whole is None else of_leaves[id(whole)]
            own = of_leaves[id(parameter)]
            if in_stack is None or own is None:
                gradients.append(own if in_stack is None else in_stack[part])
            else:
                gradients.append(own + in_stack[part])
        return gradients

    def release(self) -> None:
        """Gives up what it holds beside the models, when no pass will be made any more.

        Hooks make cycles of it, which Python frees at some later time.
        """
        for module in self._tree.modules():
            if isinstance(module, PackedLayer):
                module.stack = None
        for held in (self._stacks, self._stacked, self._in_stacks, self._slots):
            held.clear()

    @property
    def random_states(self) -> list[Tensor]:
        """Of each run, after the last pass."""
        return self._layout.random_states

    def _make_stacks(self) -> Iterator[Stack]:
        for module in self._tree.modules():
            if isinstance(module, PackedLayer):
                module.make_stack()
                if module.stack is not None:
                    yield module.stack

    def _split_unembedding(self) -> bool:
        """Whether each run is to make its own logits or loss from what enters the unembedding of its language model."""
        known = ARCHITECTURES.get(getattr(getattr(self.models[0], "config", None), "model_type", ""))
        find = getattr(self.models[0], "get_output_embeddings", None)
        own = find() if find is not None else None
        if known is None or not known.has_plain_logits or not isinstance(own, nn.Module):
            return False
        name = next(name for name, module in self.models[0].named_modules() if module is own)
        parent, _, leaf = name.rpartition(".")
        setattr(self._tree.get_submodule(parent), leaf, _Unembedding(self._layout))
        return True

    def _find_blocks(self) -> tuple[int, list[nn.Module]]:
        """The first block in which runs differ, and all blocks; 0 where that cannot be said."""
        known = ARCHITECTURES.get(getattr(getattr(self._tree, "config", None), "model_type", ""))
        if known is None or known.beside_encoder or known.shares_blocks:
            return 0, []
        pattern = re.compile(known.block_pattern)
        matches = [(name, pattern.fullmatch(name)) for name, _ in self._tree.named_modules()]
        named = {int(match[1]): name for name, match in matches if match}
        self._block_names = [named[index] for index in sorted(named)]
        lowest = len(named)
        for name in self._replaced:
            inside = re.match(rf"{known.block_pattern}(\.|$)", name)
            if inside:
                lowest = min(lowest, int(inside[1]))
            elif not (known.is_in_head(name) or name in (*known.optional, *known.after_blocks, known.unembedding)):
                return 0, []
        return lowest, [self._tree.get_submodule(name) for name in self._block_names]

    def _narrow(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        """Lets one run's rows enter a block that is computed once."""
        if not self._is_same:
            return None
        total, own = sum(self._layout.rows), self._layout.rows[0]
        return _map_rows((args, kwargs), total, lambda tensor: tensor[:own])

    def _widen(self, block: nn.Module, args: Any, output: Any) -> Any:
        """Gives every run what the last of the blocks that are computed once has made."""
        if not self._is_same:
            return None
        own, num_runs = self._layout.rows[0], len(self._layout.rows)
        return _map_rows(output, own, lambda tensor: tensor.repeat(num_runs, *[1] * (tensor.ndim - 1)))


def _combine(tree: nn.Module, layout: Layout, modules: Sequence[nn.Module], name: str = "") -> Iterator[str]:
    """Puts what differs between the runs' modules of one name into the tree; yields the name of each that it put."""
    bases = [module.base if isinstance(module, AdaptedLayer) else module for module in modules]
    adapts = any(isinstance(module, AdaptedLayer) for module in modules)
    made: nn.Module
    if adapts and _has_one_base(bases) and all(isinstance(m, MatrixLayer) for m in modules if m not in bases):
        made = PackedLayer(modules, layout)
    elif adapts or not _is_same_module(modules):
        made = PerRun(modules, layout)
    else:
        for child in dict(modules[0].named_children()):
            inner = [module.get_submodule(child) for module in modules]
            yield from _combine(tree, layout, inner, f"{name}.{child}" if name else child)
        return
    if not name:
        raise PackError("the models differ in parameters that are in no module of theirs")
    parent, _, leaf = name.rpartition(".")
    setattr(tree.get_submodule(parent), leaf, made)
    yield name


# ---------------------------------------------------------------- forward passes alone


def adapters_side_by_side(models: Sequence[nn.Module], rows: Sequence[int]) -> nn.Module:
    """One model for forward passes, with a cache of keys and values or without, whose batches are several models' rows.

    Args:
        models: over the tensors of one base, and without dropout.
        rows: how many of each batch are each model's, one model's after the other's.

    Raises:
        PackError: for models that cannot share a pass.
    """
    reason = why_alone(models[0])
    if reason is not None:
        raise PackError(reason)
    tree = copy_over_same_tensors(models[0])
    for _ in _combine(tree, Layout(rows=list(rows)), models):
        pass
    return tree


class RunOutputs:
    """What a run's model gave for a batch, in the place of that model: calling it returns what is there already."""

    def __init__(self, model: nn.Module, logits: Tensor, *, has_unembedding: bool) -> None:
        self._model, self._logits, self._has_unembedding = model, logits, has_unembedding
        self.config = getattr(model, "config", None)

    def __call__(self, **inputs: Tensor) -> _Output:
        """The model's output; of a language model with the run's own unembedding, or what stands in its place."""
        return _Output(self.get_output_embeddings()(self._logits) if self._has_unembedding else self._logits)

    def get_output_embeddings(self) -> Any:
        """Those of the run's model."""
        return cast(Any, self._model).get_output_embeddings()


@dataclass(frozen=True)
class _Output:
    logits: Tensor


def _tensors(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [*module._parameters.items(), *module._buffers.items()]


def _is_same_module(modules: Sequence[nn.Module]) -> bool:
    """Whether modules are alike in all but what is inside their submodules, and nothing of that trains."""
    first = modules[0]
    own = _tensors(first)
    return all(
        type(module) is type(first)
        and [name for name, _ in module.named_children()] == [name for name, _ in first.named_children()]
        and [(name, id(one)) for name, one in _tensors(module)] == [(name, id(one)) for name, one in own]
        for module in modules
    ) and not any(tensor is not None and tensor.requires_grad for _, tensor in own)


def _has_one_base(bases: Sequence[nn.Module]) -> bool:
    return _is_same_module(bases) and not any(True for base in bases for _ in base.children())


def _map_rows(value: Any, num_rows: int, change: Callable[[Tensor], Tensor]) -> Any:
    """Changes every tensor of so many rows in nested tuples, lists and dicts; what has one dimension is no batch."""
    if isinstance(value, Tensor):
        return change(value) if value.ndim > 1 and len(value) == num_rows else value
    if isinstance(value, tuple | list):
        return type(value)(_map_rows(item, num_rows, change) for item in value)
    if isinstance(value, dict):
        return {key: _map_rows(item, num_rows, change) for key, item in value.items()}
    return value


def _concatenate(inputs: Sequence[Mapping[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """One batch of all rows, padded on the right to the longest."""
    if any(batch.keys() != inputs[0].keys() for batch in inputs):
        raise PackError("the batches have different inputs")
    length = max(batch["input_ids"].shape[1] for batch in inputs)
    return {
        name: torch.cat(
            [
                functional.pad(
                    batch[name], (0, length - batch[name].shape[1]), value=pad_id if name == "input_ids" else 0
                )
                for batch in inputs
            ]
        )
        for name in inputs[0]
    }
