"""Packs: several runs trained in one process, their micro-batches computed in one pass.

Each run is the generator that it is when it runs alone (`harness.training.turns`), with its own model over shared
base tensors, its own optimizer, random numbers and context variables. Only forward and backward passes are shared:
of all runs that wait for a micro-batch, `harness.methods.packed` computes the outputs in one model, each run makes its
loss of its rows, divided by its own targets, and one backward pass through the sum gives every run its gradients. What
frozen blocks make of a split that is scored is kept for all runs (`harness.methods.trunk`). A run that ends, diverges
or fails leaves, and the next waiting one enters.

On a CPU a pass is shared where that pays (`pack_size.pays_together`): runs of large batches that share no block are
computed one after the other, as they are alone.

The first micro-batch of a run in a shared pass is computed alone as well: if the gradients differ by more than
rounding, the run is computed alone from there on, and the log says so. A pack of one is a run alone.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from harness.data.batches import Batch
from harness.measure.clock import device_queue
from harness.measure.device import is_out_of_memory
from harness.methods.packed import PackedModel, Shared, draws, share_base, tensors_of, why_alone
from harness.methods.trunk import TrunkMemory
from harness.training.pack_size import Fixed, PackSize, Pass, pays_together
from harness.training.turns import Losses, MicroBatch, Turns

logger = logging.getLogger("harness")

Name = TypeVar("Name")
Outcome = TypeVar("Outcome")

# How far gradients of a pack may be from those of the run alone, relative to their norm. Rounding gives about 1e-6 in
# float32 and 1e-2 in bfloat16; what is forgotten or counted twice gives 1.
TOLERANCE = 1e-3
HALF_TOLERANCE = 0.1


@dataclass(frozen=True)
class Ended(Generic[Name, Outcome]):
    """A run that has left its pack: what it returned, or what it raised."""

    name: Name
    outcome: Outcome | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class RandomState:
    """Where the random numbers of this process are: of the CPU, and of the GPU that it computes on, if any."""

    cpu: Tensor
    gpu: Tensor | None

    @staticmethod
    def now() -> RandomState:
        """As they are at present."""
        gpu = _gpu_in_use()
        return RandomState(torch.get_rng_state(), None if gpu is None else gpu.get_rng_state())

    def restore(self) -> None:
        """Draws from here on."""
        torch.set_rng_state(self.cpu)
        gpu = _gpu_in_use()
        if gpu is not None and self.gpu is not None:
            gpu.set_rng_state(self.gpu)


def _gpu_in_use() -> Any:
    """`torch.cuda` or `torch.mps`; None without a GPU, and before anything was computed on a CUDA device."""
    if torch.cuda.is_available():
        return torch.cuda if torch.cuda.is_initialized() else None
    return torch.mps if torch.backends.mps.is_available() else None


@dataclass(eq=False)
class _Member(Generic[Name, Outcome]):
    """A run in a pack, at the micro-batch that it waits for."""

    name: Name
    turns: Turns[Outcome]
    random: RandomState
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    micro_batch: MicroBatch | None = None
    model: nn.Module | None = None
    is_checked: bool = False
    base: frozenset[int] = frozenset()
    first_own_block: int = 0
    draws: bool = False
    most_together: int = 1
    parameters: list[nn.Parameter] = field(default_factory=list)

    @property
    def batch(self) -> Batch:
        assert self.micro_batch is not None
        return self.micro_batch.batch

    @property
    def own_bytes(self) -> int:
        """What its longest step takes above the weights, as it rehearsed it."""
        return 0 if self.micro_batch is None else self.micro_batch.own_bytes

    def tell(self, level: int, text: str) -> None:
        """Writes into the run's own log."""
        self.context.run(logger.log, level, "%s", text)

    def advance(self, step: Callable[[], MicroBatch]) -> None:
        """Lets the run come to its next micro-batch. Raises `StopIteration` at its end."""
        self.micro_batch = self.own(step)

    def own(self, step: Callable[[], Outcome]) -> Outcome:
        """Does something as the run: in its context, drawing its random numbers."""
        with _random_numbers(self.random):
            try:
                return self.context.run(step)
            finally:
                self.random = RandomState.now()


class Pack(Generic[Name, Outcome]):
    """Runs that share a process.

    Args:
        waiting: names and beginnings of runs, in the order in which they enter.
        size: how many are in training at once; a number, or what decides it (`harness.training.pack_size`).
        tolerance: how far gradients may be from those alone, relative to their norm; infinite where they have no values
            to compare.
        as_on_gpu: whether every pass is shared that can be, as on a GPU.

    Attributes:
        why_alone: of each run that is computed alone from some pass on, the reason.
        memory: what frozen blocks make of splits that are scored.
        num_passes: that several runs shared.
        num_alone: passes of one run, those for comparison and those that sharing would make no faster among them.
    """

    def __init__(
        self,
        waiting: Iterator[tuple[Name, Callable[[], Turns[Outcome]]]],
        *,
        size: int | PackSize,
        tolerance: float = TOLERANCE,
        as_on_gpu: bool = False,
    ) -> None:
        self._size: PackSize = Fixed(size) if isinstance(size, int) else size
        self._waiting, self._next = waiting, next(waiting, None)
        self._tolerance, self._as_on_gpu = tolerance, as_on_gpu
        self._members: list[_Member[Name, Outcome]] = []
        self._shared: Shared = {}
        self._packed: dict[tuple[int, ...], PackedModel] = {}
        self.why_alone: dict[Name, str] = {}
        self.memory = TrunkMemory()
        self.num_passes = 0
        self.num_alone = 0
        self._decided = ""  # about the size, as logs say it
        self._has_garbage = False

    def run(self) -> Iterator[Ended[Name, Outcome]]:
        """Runs everything; gives every run once it has ended.

        If the caller stops asking, or an error is none of a run's own, the runs in training are closed: their claims
        are released.
        """
        with _random_numbers(RandomState.now()):
            try:
                while True:
                    yield from self._enter()
                    if not self._members:
                        return
                    yield from self._step()
            finally:
                for member in self._members:
                    member.own(member.turns.close)

    def most_together(self, name: Name) -> int:
        """The most runs that a run in training has shared a pass with, itself included."""
        return max((member.most_together for member in self._members if member.name == name), default=1)

    def _enter(self) -> Iterator[Ended[Name, Outcome]]:
        while True:
            if self._has_garbage:  # models have cycles, and one that did not fit would stand beside the next
                gc.collect()
                self._has_garbage = False
            if self._next is None or len(self._members) >= self._size.target:
                return
            full = self._size.why_full([member.own_bytes for member in self._members]) if self._members else None
            if full is not None:
                if not self._size.is_settled:
                    self._keep_to(len(self._members), full)
                return
            (name, begin), self._next = self._next, next(self._waiting, None)
            member = _Member(name, begin(), RandomState.now())
            self._members.append(member)
            yield from self._advance(member, lambda member=member: next(member.turns))
            if self._decided and member in self._members:
                member.tell(logging.INFO, self._decided)

    def _step(self) -> Iterator[Ended[Name, Outcome]]:
        """Answers every run once."""
        members = list(self._members)
        answers = self._answers() if self._size.is_settled else self._timed_answers()
        for member in members:
            answer = answers[id(member)]
            if isinstance(answer, BaseException):
                yield from self._advance(member, lambda member=member, error=answer: member.turns.throw(error))
            else:
                yield from self._advance(member, lambda member=member, losses=answer: member.turns.send(losses))

    def _timed_answers(self) -> dict[int, Losses | BaseException]:
        """The answers of all runs, after which more of them may train at once."""
        members = list(self._members)
        queue = device_queue(members[0].batch.inputs["input_ids"].device)
        unchecked = sum(not member.is_checked for member in members)
        num_passes, began = self.num_passes, queue.mark()
        answers = self._answers()
        seconds = queue.seconds(began, queue.mark())
        # A run that has just entered is computed twice, and the first run alone warms up.
        if unchecked == sum(not member.is_checked for member in members):
            decided = self._size.passed(_pass_of(members, seconds, is_shared=self.num_passes > num_passes))
            if decided:
                self._decide(f"pack=auto: {decided}")
        return answers

    def _decide(self, text: str) -> None:
        """Tells all runs about the size of the pack, those that are in training and those that enter later."""
        self._decided = text
        for member in self._members:
            member.tell(logging.INFO, text)

    def _keep_to(self, num_runs: int, reason: str) -> None:
        self._size.keep_to(num_runs, reason)
        self._decide(f"its pack trains {num_runs} at once at most from here on: {reason}")

    def _answers(self) -> dict[int, Losses | BaseException]:
        answers: dict[int, Losses | BaseException] = {}
        groups: dict[tuple[object, ...], list[_Member[Name, Outcome]]] = {}
        for member in self._members:
            # What is drawn depends on the length, so a batch with dropout is not padded further.
            length = member.batch.inputs["input_ids"].shape[1] if member.draws else 0
            groups.setdefault((member.base, member.first_own_block, length), []).append(member)
        compositions = set()
        for group in groups.values():
            together = [member for member in group if member.name not in self.why_alone]
            if len(together) > 1 and (self._as_on_gpu or _pays(together)):
                compositions.add(tuple(map(id, together)))
                answers |= self._together(together)
        self._release(key for key in list(self._packed) if key not in compositions)
        for member in self._members:
            if id(member) not in answers:
                answers[id(member)] = self._alone(member)
        return answers

    def _advance(
        self, member: _Member[Name, Outcome], step: Callable[[], MicroBatch]
    ) -> Iterator[Ended[Name, Outcome]]:
        try:
            member.advance(step)
            self._know_model(member)
            return
        except StopIteration as end:
            ended: Ended[Name, Outcome] = Ended(member.name, outcome=end.value)
        except Exception as error:
            member.own(member.turns.close)
            # By its traceback an error keeps all that the run had in memory.
            ended = Ended(member.name, error=MemoryError(str(error)) if is_out_of_memory(error) else error)
        self._leave(member)
        if isinstance(ended.error, MemoryError):
            self._has_garbage = True
            if self._members:  # or all that wait would enter, and fail, one after the other
                self._keep_to(len(self._members), f"{len(self._members) + 1} did not fit into the memory")
        yield ended

    def _stay_alone(self, member: _Member[Name, Outcome], reason: str) -> None:
        """From here on, the run is computed alone."""
        self.why_alone[member.name] = reason
        member.tell(logging.WARNING, f"{member.name}: computed alone in its pack: {reason}")

    def _leave(self, member: _Member[Name, Outcome]) -> None:
        self._members.remove(member)
        self._release(list(self._packed))
        used = {id(one) for other in self._members if other.model is not None for one in tensors_of(other.model)}
        for known in self._shared.values():
            known[:] = [one for one in known if id(one) in used]
        if all(other.base != member.base for other in self._members):  # whose identity may come again
            self.memory.clear()
        member.micro_batch, member.model, member.parameters = None, None, []  # a caller may still hold the member

    def _release(self, keys: Iterable[tuple[int, ...]]) -> None:
        for key in keys:
            self._packed.pop(key).release()

    def _know_model(self, member: _Member[Name, Outcome]) -> None:
        assert member.micro_batch is not None
        if member.model is not None:
            return
        member.model = member.micro_batch.model
        member.parameters = [parameter for parameter in member.model.parameters() if parameter.requires_grad]
        member.draws = draws(member.model)
        reason = why_alone(member.model)
        if reason is None:
            try:
                share_base(member.model, self._shared)
                member.base = frozenset(id(one) for one in member.model.parameters() if not one.requires_grad)
                packed = PackedModel([member.model])
                member.first_own_block = packed.first_own_block
                blocks, name = packed.frozen_blocks(member.model), (member.base, member.first_own_block)
                self.memory.attach(member.model, blocks, name=name)
            except Exception as error:  # whatever a model does when it is copied
                if is_out_of_memory(error):
                    raise
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            self._stay_alone(member, reason)

    # ------------------------------------------------------------ passes

    def _alone(self, member: _Member[Name, Outcome]) -> Losses | BaseException:
        assert member.micro_batch is not None
        self.num_alone += 1
        try:
            return member.own(member.micro_batch.answer)
        except Exception as error:
            return error

    def _together(self, members: Sequence[_Member[Name, Outcome]]) -> dict[int, Losses | BaseException]:
        """One pass for runs over one base; empty where it fails, and each is computed alone from there on."""
        before = [member.random for member in members]
        try:
            packed = self._pack(members)
            losses, gradients = self._pass(packed, members)
        except Exception as error:
            for member, state in zip(members, before, strict=True):
                member.random = state
                self._stay_alone(member, f"{type(error).__name__}: {error}")
            if is_out_of_memory(error):
                self._keep_to(len(self._members) - 1, f"a pass of {len(members)} did not fit into the memory")
            return {}
        self.num_passes += 1
        for member in members:
            member.most_together = max(member.most_together, len(members))
        answers: dict[int, Losses | BaseException] = {}
        for member, own, state, found in zip(members, losses, before, gradients, strict=True):
            if member.is_checked:
                _add_gradients(member.parameters, found)
                answers[id(member)] = own
                continue
            member.is_checked, member.random = True, state
            answers[id(member)] = self._alone(member)
            reason = _why_unequal(member.parameters, found, self._tolerance)
            if reason is not None:
                self._stay_alone(member, reason)
        return answers

    def _pack(self, members: Sequence[_Member[Name, Outcome]]) -> PackedModel:
        key = tuple(map(id, members))
        if key not in self._packed:
            self._packed[key] = PackedModel([member.model for member in members if member.model is not None])
        return self._packed[key]

    def _pass(
        self, packed: PackedModel, members: Sequence[_Member[Name, Outcome]]
    ) -> tuple[list[Losses], list[list[Tensor | None]]]:
        """Losses of each run, and the gradients of its parameters; nothing of a run is changed but its random state."""
        inputs = [member.batch.inputs for member in members]
        is_same = all(members[0].batch.has_inputs_of(other.batch) for other in members[1:])
        outputs = packed.outputs(inputs, [member.random.cpu for member in members], is_same=is_same)
        for member, state in zip(members, packed.random_states, strict=True):
            member.random = replace(member.random, cpu=state)
        made = []
        for member, output in zip(members, outputs, strict=True):
            assert member.micro_batch is not None
            made.append(member.own(lambda at=member.micro_batch, output=output: at.loss_of(output)))
        parameters = [member.parameters for member in members]
        total = torch.stack([minimised for minimised, _ in made]).sum()
        gradients = iter(packed.gradients(total, [one for own in parameters for one in own]))
        return (
            [(minimised.detach(), reported) for minimised, reported in made],
            [[next(gradients) for _ in own] for own in parameters],
        )


def _pass_of(members: Sequence[_Member[Name, Outcome]], seconds: float, *, is_shared: bool) -> Pass:
    """What a pass took, beside what its runs rehearsed.

    Raises:
        ValueError: a run rehearsed no times, so that nothing says whether the pack is faster.
    """
    micro_batches = [member.micro_batch for member in members if member.micro_batch is not None]
    alone = [at.alone_seconds for at in micro_batches if at.alone_seconds is not None]
    if len(alone) < len(members):
        raise ValueError("a pack that finds its size wants runs that time their rehearsal (shares_process)")
    bytes_per_run = max(member.own_bytes for member in members)
    return Pass(len(members), sum(alone), seconds, bytes_per_run, is_shared=is_shared)


def _pays(members: Sequence[_Member[Name, Outcome]]) -> bool:
    """Whether one pass for all takes no longer than one for each."""
    first, others = members[0], members[1:]
    if first.batch.inputs["input_ids"].device.type != "cpu":
        return True
    shares_blocks = first.first_own_block > 0 and all(first.batch.has_inputs_of(other.batch) for other in others)
    width = getattr(getattr(first.model, "config", None), "hidden_size", 0)
    largest = max(member.batch.inputs["input_ids"].numel() for member in members) * width
    return pays_together(largest, num_threads=torch.get_num_threads(), shares_blocks=shares_blocks)


@contextlib.contextmanager
def _random_numbers(state: RandomState) -> Iterator[None]:
    """Draws from `state` inside, and from where it was afterwards."""
    before = RandomState.now()
    state.restore()
    try:
        yield
    finally:
        before.restore()


@torch.no_grad()
def _add_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    laid_out: list[Tensor] = []
    copied: list[Tensor] = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is not None:
            parameter.grad += gradient
        elif gradient.stride() == parameter.stride():
            parameter.grad = gradient
        else:  # laid out as the parameter is, as autograd does it: fused optimizers walk through both side by side
            parameter.grad = torch.empty_like(parameter)
            laid_out.append(parameter.grad)
            copied.append(gradient)
    if copied:
        torch._foreach_copy_(laid_out, copied)


@torch.no_grad()
def _why_unequal(
    parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None], tolerance: float
) -> str | None:
    """Says that gradients differ from those on the parameters by more than rounding; None where they do not."""
    if tolerance == math.inf:
        return None
    alone = [one.grad if one.grad is not None else torch.zeros_like(one) for one in parameters]
    packed = [
        torch.zeros_like(one) if found is None else found for one, found in zip(parameters, gradients, strict=True)
    ]
    whole = torch.stack([own.norm() for own in alone]).norm()
    if not torch.isfinite(whole):  # the run has diverged
        return None
    for own, found in zip(alone, packed, strict=True):
        if not (own - found).norm() <= tolerance * own.norm() + tolerance * 0.1 * whole:
            return (
                f"its gradients in the pack differ from those alone by {float((own - found).norm() / whole):.1e} of "
                "their norm"
            )
    return None
