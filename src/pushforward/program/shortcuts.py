"""A recording made shorter: constants folded, no copies, no products with the identity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pushforward.program.recorder import Instruction, Like, Recording, Slot

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.as_strided.default)


def shortened(recording: Recording, outputs: Sequence[Slot]) -> tuple[Recording, tuple[Slot, ...]]:
    """The same computation in fewer ops, and where its outputs are."""
    context = Context(_folded(recording), outputs)
    for instruction in context.recording.instructions:
        context.take(instruction)
    outs = tuple(context.name(slot) for slot in outputs)
    recording = replace(context.recording, instructions=context.instructions)
    return replace(recording, instructions=_live(recording, outs)), outs


@dataclass
class Context:
    """The instructions so far, who makes each slot, and which slots hold the same as others."""

    recording: Recording
    outputs: Sequence[Slot] = ()
    instructions: list[Instruction] = field(default_factory=list)
    makers: dict[Slot, Instruction] = field(default_factory=dict)
    _same: dict[Slot, Slot] = field(default_factory=dict)
    _done: dict[Any, Slot] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._written = written_groups(self.recording)
        reads = [slot for i in self.recording.instructions for slot in i.reads]
        self._uses = Counter([*reads, *self.outputs])
        viewed = [i for i in self.recording.instructions if i.func in _VIEWS]
        self._viewed = frozenset(slot for i in viewed for slot in i.reads)
        strided = [i for i in viewed if i.func is aten.as_strided.default]
        self._strided = frozenset(self.recording.groups[s] for i in strided for s in i.reads)

    def used_once(self, slot: Slot) -> bool:
        """Whether one instruction alone reads a slot, so that it may do the work itself."""
        return self._uses[slot] <= 1

    def must_lie_so(self, slot: Slot) -> bool:
        """Whether somebody views a slot, and so relies on how it lies in memory."""
        return slot in self._viewed

    def emit(self, func: Any, args: tuple[Any, ...], like: Like) -> Slot:
        """Enter an instruction that was not there, and give the slot of its result."""
        slot = self._new_slot(like)
        self.take(Instruction(func, args, {}, (slot,), frozenset()))
        return self.name(slot)

    def name(self, slot: Slot) -> Slot:
        """The slot that stands for another one."""
        return self._same.get(slot, slot)

    def take(self, instruction: Instruction) -> None:
        """Enter an instruction, or a shorter one, or nothing where its result is there already."""
        instruction = self._renamed(instruction)
        if not self._is_pure(instruction):
            self.instructions.append(instruction)
            return
        out = out_of(instruction)
        found = self._shortest(instruction)
        if self._would_move(instruction, found):
            found = instruction
        if isinstance(found, Slot):
            self._same[out] = self.name(found)
            return
        self.instructions.append(found)
        self.makers[out] = found

    def _would_move(self, instruction: Instruction, found: Instruction | Slot) -> bool:
        """Whether a result would lie elsewhere, while somebody counts on where it lies."""
        if self.recording.groups[out_of(instruction)] not in self._strided:
            return False
        return isinstance(found, Slot) or (found.func in _VIEWS) > (instruction.func in _VIEWS)

    def _shortest(self, instruction: Instruction) -> Instruction | Slot:
        """Apply shortcuts until none applies, then look whether the same was done before."""
        while True:
            shortcut = SHORTCUTS.get(instruction.func)
            shorter = instruction if shortcut is None else shortcut(instruction, self)
            if isinstance(shorter, Slot):
                return shorter
            if shorter is instruction:
                break
            instruction = shorter
        return self._before(instruction)

    def _before(self, instruction: Instruction) -> Instruction | Slot:
        key = _call_key(instruction)
        if key is None:
            return instruction
        if key in self._done:
            return self._done[key]
        self._done[key] = out_of(instruction)
        return instruction

    def _renamed(self, instruction: Instruction) -> Instruction:
        def renamed(leaf: Any) -> Any:
            return self.name(leaf) if isinstance(leaf, Slot) else leaf

        args, kwargs = pytree.tree_map(
            renamed,
            (instruction.args, instruction.kwargs),
            is_leaf=lambda node: isinstance(node, Slot),
        )
        return replace(instruction, args=args, kwargs=kwargs)

    def _is_pure(self, instruction: Instruction) -> bool:
        """Whether nobody writes to what an instruction reads and makes, one tensor."""
        if instruction.writes or len(instruction.outs) != 1 or instruction.outs[0] is None:
            return False
        slots = [*instruction.reads, instruction.outs[0]]
        return not any(self.recording.groups[slot] in self._written for slot in slots)

    def constant(self, value: Any) -> Tensor | None:
        """The value of a slot that depends on nothing from outside."""
        return self.recording.constants.get(value) if isinstance(value, Slot) else None

    def like(self, slot: Slot) -> Like:
        """How a slot lies in memory."""
        return self.recording.like[slot]

    def maker(self, value: Any, func: Any) -> Instruction | None:
        """The instruction that makes a slot, if it is a call of ``func``."""
        made = self.makers.get(value) if isinstance(value, Slot) else None
        return made if made is not None and made.func is func else None

    def new_constant(self, value: Tensor) -> Slot:
        """A slot for a constant that was not there before."""
        slot = self._new_slot(Like(tuple(value.shape), value.stride(), value.dtype))
        self.recording.constants[slot] = value
        return slot

    def _new_slot(self, like: Like) -> Slot:
        slot = Slot(len(self.recording.groups))
        self.recording.groups[slot] = len(self.recording.groups)
        self.recording.like[slot] = like
        return slot


def out_of(instruction: Instruction) -> Slot:
    """The only output of an instruction."""
    (slot,) = instruction.outs
    assert slot is not None
    return slot


def _call_key(instruction: Instruction) -> Any:
    """What two calls with the same result have in common; None where that cannot be told."""
    leaves, spec = pytree.tree_flatten(
        (instruction.args, instruction.kwargs), is_leaf=lambda node: isinstance(node, Slot)
    )
    if any(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return (instruction.func, tuple((type(leaf), leaf) for leaf in leaves), spec)


def written_groups(recording: Recording) -> frozenset[int]:
    """The storages that some instruction writes to."""
    return frozenset().union(*(i.writes for i in recording.instructions))


def _folded(recording: Recording) -> Recording:
    """Leave out what depends on nothing from outside: its value is kept."""
    varying = {
        recording.groups[slot]
        for i in recording.instructions
        for slot in i.outs
        if slot is not None and slot not in recording.constants
    }
    constant = recording.constants
    varying |= {
        group
        for i in recording.instructions
        if not all(slot in constant for slot in i.reads)
        for group in i.writes
    }
    constants = {
        slot: value for slot, value in constant.items() if recording.groups[slot] not in varying
    }
    kept = [
        i
        for i in recording.instructions
        if not i.outs or not all(slot is None or slot in constants for slot in i.outs)
    ]
    return replace(recording, constants=constants, instructions=kept)


def _copy(i: Instruction, context: Context) -> Instruction | Slot:
    """A copy of what nobody writes to is the thing itself."""
    return i.args[0] if context.like(i.args[0]) == context.like(out_of(i)) else i


def _sum(i: Instruction, context: Context) -> Instruction | Slot:
    """Adding a constant zero; a + (-b) is a - b; two constants are added beforehand."""
    if i.kwargs.get("alpha", 1) != 1:
        return i
    one, other = i.args
    for zero, rest in ((one, other), (other, one)):
        value = context.constant(zero)
        if value is not None and _lies_like(rest, i, context) and not value.any():
            return rest
    for term, rest in ((other, one), (one, other)):
        negated = context.maker(term, aten.neg.default)
        if negated is not None and isinstance(rest, Slot):
            return replace(i, func=aten.sub.Tensor, args=(rest, negated.args[0]), kwargs={})
    shorter = _two_constants(i, context)
    return shorter if shorter is not i else _fused(i, context)


def _fused(i: Instruction, context: Context) -> Instruction:
    """a + b c in one call; d + (b c + e f) in two."""
    out = context.like(out_of(i))
    for term, rest in (i.args[::-1], i.args):
        if not isinstance(term, Slot) or not isinstance(rest, Slot):
            return i
        product = _own_product(rest, context)
        if product is not None and _one_dtype(out, (term, *product), context):
            return replace(i, func=aten.addcmul.default, args=(term, *product), kwargs={})
    for term, rest in (i.args, i.args[::-1]):
        inner = context.maker(rest, aten.addcmul.default)
        if inner is None or inner.kwargs or not context.used_once(rest):
            continue
        product = _own_product(inner.args[0], context)
        if product is not None and _one_dtype(out, (term, *product), context):
            begun = context.emit(aten.addcmul.default, (term, *product), context.like(rest))
            return replace(i, func=aten.addcmul.default, args=(begun, *inner.args[1:]), kwargs={})
    return i


def _own_product(slot: Slot, context: Context) -> tuple[Slot, Slot] | None:
    """The factors of a product that nobody else reads."""
    made = context.maker(slot, aten.mul.Tensor)
    if (
        made is None
        or not context.used_once(slot)
        or not all(isinstance(factor, Slot) for factor in made.args)
    ):
        return None
    return made.args[0], made.args[1]


def _one_dtype(out: Like, slots: Sequence[Slot], context: Context) -> bool:
    return out.dtype.is_floating_point and all(context.like(s).dtype == out.dtype for s in slots)


def _two_constants(i: Instruction, context: Context) -> Instruction:
    """(a + c) + d is a + (c + d)."""
    for term, rest in (i.args, i.args[::-1]):
        value, inner = context.constant(term), context.maker(rest, aten.add.Tensor)
        if value is None or inner is None or inner.kwargs or i.kwargs:
            continue
        for known, left in (inner.args, inner.args[::-1]):
            first, out = context.constant(known), context.like(out_of(i))
            alike = context.like(known) == context.like(term)
            if first is not None and alike and _one_dtype(out, (term,), context):
                return replace(i, args=(left, context.new_constant(first + value)))
    return i


def _difference(i: Instruction, context: Context) -> Instruction | Slot:
    """a - (-b) is a + b; taking a constant zero away."""
    one, other = i.args
    if i.kwargs.get("alpha", 1) != 1:
        return i
    value = context.constant(other)
    if value is not None and _lies_like(one, i, context) and not value.any():
        return one
    negated = context.maker(other, aten.neg.default)
    if negated is not None and isinstance(one, Slot):
        return replace(i, func=aten.add.Tensor, args=(one, negated.args[0]), kwargs={})
    return i


def _factor(i: Instruction, context: Context) -> Instruction | Slot:
    """Multiplying by a constant one; c (-a) is (-c) a; a number is multiplied into constants."""
    scaled = _scaled(i, context)
    if scaled is not None:
        return scaled
    for factor, rest in (i.args, i.args[::-1]):
        value = context.constant(factor)
        if value is None:
            continue
        if _lies_like(rest, i, context) and bool((value == 1).all()):
            return rest
        negated = context.maker(rest, aten.neg.default)
        if negated is not None and value.dtype == context.like(out_of(i)).dtype:
            return replace(i, args=(context.new_constant(-value), negated.args[0]))
    return i


def _scaled(i: Instruction, context: Context) -> Instruction | None:
    """k (c a) is (k c) a, and k (c a + d b) is (k c) a + (k d) b."""
    for number, rest in (i.args, i.args[::-1]):
        if type(number) in (int, float) and isinstance(rest, Slot) and context.used_once(rest):
            made = _times_number(number, rest, context)
            if made is not None:
                return replace(i, func=made[0], args=made[1], kwargs={})
    return None


def _times_number(number: float, slot: Slot, context: Context) -> Any:
    """The call that makes a multiple of a slot out of the same inputs, with other constants."""
    product = context.maker(slot, aten.mul.Tensor)
    if not context.like(slot).dtype.is_floating_point:
        return None
    if product is not None:
        for factor, rest in (product.args, product.args[::-1]):
            scaled = _multiple(context.constant(factor), number)
            if scaled is not None and scaled.dtype == context.like(slot).dtype:
                return aten.mul.Tensor, (context.new_constant(scaled), rest)
    fused = context.maker(slot, aten.addcmul.default)
    if fused is not None and not fused.kwargs and context.used_once(fused.args[0]):
        start = _times_number(number, fused.args[0], context)
        scaled = _multiple(context.constant(fused.args[1]), number)
        if start is not None and scaled is not None:
            begun = context.emit(start[0], start[1], context.like(fused.args[0]))
            return aten.addcmul.default, (begun, context.new_constant(scaled), fused.args[2])
    return None


def _multiple(value: Tensor | None, number: float) -> Tensor | None:
    """A constant times a number, where that neither grows beyond all bounds nor vanishes."""
    if value is None:
        return None
    scaled = value * number
    kept = (scaled.isfinite() & ((scaled != 0) | (value == 0))) | ~value.isfinite()
    return scaled if bool(kept.all()) else None


def _by_number(i: Instruction, context: Context) -> Instruction | Slot:
    """Dividing a multiple by a number."""
    value, number = i.args[:2]
    if i.kwargs or type(number) not in (int, float) or not isinstance(value, Slot) or not number:
        return i
    made = _times_number(1.0 / number, value, context) if context.used_once(value) else None
    return i if made is None else replace(i, func=made[0], args=made[1])


def _lies_like(slot: Any, i: Instruction, context: Context) -> bool:
    return isinstance(slot, Slot) and context.like(slot) == context.like(out_of(i))


def _view(i: Instruction, context: Context) -> Instruction | Slot:
    """A view of a view; a view of all of it; rows of a matrix repeated, without the copy."""
    source, shape = i.args[0], context.like(out_of(i)).shape
    if _lies_like(source, i, context):
        return source
    repeated = context.maker(source, aten.index_select.default)
    if repeated is not None and not context.must_lie_so(out_of(i)):
        lies = _repeats(repeated, shape, context)
        if lies is not None:
            where = (repeated.args[0], list(shape), lies, 0)
            return replace(i, func=aten.as_strided.default, args=where)
    for func in (aten.view.default, aten._unsafe_view.default):
        inner = context.maker(source, func)
        if inner is not None and _is_contiguous(context.like(inner.args[0])):
            return replace(i, func=aten.view.default, args=(inner.args[0], list(shape)))
    return i


def _repeats(i: Instruction, shape: tuple[int, ...], context: Context) -> list[int] | None:
    """The strides that show each row of a matrix several times, where rows are picked like that."""
    matrix, dim, places = i.args
    like = context.like(matrix)
    if dim != 0 or len(shape) < 3 or len(like.shape) != 2 or not _is_contiguous(like):
        return None
    rows, width = like.shape
    if shape[0] != rows or shape[-1] != width or not isinstance(places, Tensor):
        return None
    times = len(places) // max(rows, 1)
    if not torch.equal(places, torch.arange(rows).repeat_interleave(times)):
        return None
    return [width, *(0 for _ in shape[1:-1]), 1]


def _is_contiguous(like: Like) -> bool:
    expected = 1
    for size, stride in zip(reversed(like.shape), reversed(like.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _product(i: Instruction, context: Context) -> Instruction | Slot:
    """A product with rows or columns of the identity picks those of the other factor."""
    one, other = i.args[:2]
    rows = _picked(context.constant(one))
    if rows is not None:
        return _pick(i, other, 0, rows, context)
    matrix = context.constant(other)
    columns = None if matrix is None else _picked(matrix.mT)
    return i if columns is None else _pick(i, one, 1, columns, context)


def _picked(matrix: Tensor | None) -> Tensor | None:
    """The place of the one in each row of a matrix whose rows are unit vectors."""
    if matrix is None or matrix.dim() != 2 or 0 in matrix.shape:
        return None
    nonzero = matrix != 0
    if not bool((nonzero.sum(1) == 1).all()):
        return None
    places = nonzero.int().argmax(1)
    ones = matrix.gather(1, places[:, None]) == 1
    return places if bool(ones.all()) else None


def _pick(
    i: Instruction, factor: Slot, dim: int, places: Tensor, context: Context
) -> Instruction | Slot:
    size = context.like(factor).shape[dim]
    if len(places) != size or not torch.equal(places, torch.arange(size, device=places.device)):
        return Instruction(aten.index_select.default, (factor, dim, places), {}, i.outs, i.writes)
    if context.like(factor) == context.like(out_of(i)):
        return factor
    # What comes after may rely on how the product lay in memory.
    how = {"memory_format": torch.contiguous_format}
    return Instruction(aten.clone.default, (factor,), how, i.outs, i.writes)


Shortcut = Callable[[Instruction, Context], Instruction | Slot]
SHORTCUTS: dict[Any, Shortcut] = {
    aten.clone.default: _copy,
    aten.add.Tensor: _sum,
    aten.sub.Tensor: _difference,
    aten.mul.Tensor: _factor,
    aten.div.Tensor: _by_number,
    aten.mm.default: _product,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
}


def _live(recording: Recording, outputs: Iterable[Slot]) -> list[Instruction]:
    """What the outputs, or a guard, need."""
    groups = recording.groups
    wanted = set(outputs)
    wanted_groups = {groups[slot] for slot in wanted}
    written = written_groups(recording)
    kept = []
    for instruction in reversed(recording.instructions):
        outs = [slot for slot in instruction.outs if slot is not None]
        needed = (
            not instruction.outs
            or any(slot in wanted for slot in outs)
            or bool(instruction.writes & wanted_groups)
            or any(groups[slot] in written & wanted_groups for slot in outs)
        )
        if needed:
            kept.append(instruction)
            wanted.update(instruction.reads)
            wanted_groups.update(groups[slot] for slot in instruction.reads)
    return kept[::-1]
