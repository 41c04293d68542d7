"""Making a recording shorter: constants folded, copies left out, identity seeds never multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pushforward.program.recorder import Instruction, Recording, Slot

aten = torch.ops.aten


def shortened(recording: Recording, outputs: Sequence[Slot]) -> tuple[Recording, tuple[Slot, ...]]:
    """The same computation in fewer ops, and where its outputs are."""
    written = _written_groups(recording)
    recording = _folded(recording, written)
    names = _Names()
    instructions = []
    for instruction in recording.instructions:
        instruction = _renamed(instruction, names)
        short = _short(instruction, recording, written)
        if isinstance(short, Slot):
            names.same(instruction.outs[0], short)
        else:
            instructions.append(short)
    outs = tuple(names.of(slot) for slot in outputs)
    recording = replace(recording, instructions=instructions)
    return replace(recording, instructions=_live(recording, outs)), outs


class _Names:
    """Slots that turned out to hold the same as others."""

    def __init__(self) -> None:
        self._same: dict[Slot, Slot] = {}

    def same(self, slot: Slot | None, other: Slot) -> None:
        if slot is not None:
            self._same[slot] = self.of(other)

    def of(self, slot: Slot) -> Slot:
        return self._same.get(slot, slot)


def _renamed(instruction: Instruction, names: _Names) -> Instruction:
    def renamed(leaf: Any) -> Any:
        return names.of(leaf) if isinstance(leaf, Slot) else leaf

    args, kwargs = pytree.tree_map(
        renamed,
        (instruction.args, instruction.kwargs),
        is_leaf=lambda node: isinstance(node, Slot),
    )
    return replace(instruction, args=args, kwargs=kwargs)


def _written_groups(recording: Recording) -> frozenset[int]:
    return frozenset().union(*(i.writes for i in recording.instructions))


def _folded(recording: Recording, written: frozenset[int]) -> Recording:
    """Leave out what depends on nothing from outside: its value is kept."""
    varying = {
        recording.groups[slot]
        for i in recording.instructions
        for slot in i.outs
        if slot is not None and slot not in recording.constants
    }
    varying |= {g for i in recording.instructions if not _constant(i, recording) for g in i.writes}
    constants = {
        slot: value
        for slot, value in recording.constants.items()
        if recording.groups[slot] not in varying
    }
    kept = [
        i
        for i in recording.instructions
        if i.expected is not None or not i.outs or not all(s is None or s in constants for s in i.outs)
    ]
    return replace(recording, constants=constants, instructions=kept)


def _constant(instruction: Instruction, recording: Recording) -> bool:
    return all(slot in recording.constants for slot in instruction.reads)


def _short(
    instruction: Instruction, recording: Recording, written: frozenset[int]
) -> Instruction | Slot:
    """The slot that already holds what an instruction makes, or a cheaper instruction."""
    if instruction.writes or len(instruction.outs) != 1 or instruction.outs[0] is None:
        return instruction
    if recording.groups[instruction.outs[0]] in written:
        return instruction
    shortcut = _SHORTCUTS.get(instruction.func)
    return instruction if shortcut is None else shortcut(instruction, recording, written)


def _copy(i: Instruction, recording: Recording, written: frozenset[int]) -> Instruction | Slot:
    """A copy of what nobody writes to is the thing itself."""
    source = i.args[0]
    if recording.groups[source] in written or recording.like[source] != recording.like[_out(i)]:
        return i
    return source


def _sum(i: Instruction, recording: Recording, written: frozenset[int]) -> Instruction | Slot:
    """Adding a constant zero."""
    if i.kwargs.get("alpha", 1) != 1:
        return i
    for zero, other in ((i.args[0], i.args[1]), (i.args[1], i.args[0])):
        if not isinstance(other, Slot) or recording.groups[other] in written:
            continue
        value = recording.constants.get(zero) if isinstance(zero, Slot) else None
        if value is not None and recording.like[other] == recording.like[_out(i)]:
            if not value.any():
                return other
    return i


def _factor(i: Instruction, recording: Recording, written: frozenset[int]) -> Instruction | Slot:
    """Multiplying by a constant one."""
    for one, other in ((i.args[0], i.args[1]), (i.args[1], i.args[0])):
        if not isinstance(other, Slot) or recording.groups[other] in written:
            continue
        value = recording.constants.get(one) if isinstance(one, Slot) else None
        if value is not None and recording.like[other] == recording.like[_out(i)]:
            if bool((value == 1).all()):
                return other
    return i


def _product(i: Instruction, recording: Recording, written: frozenset[int]) -> Instruction | Slot:
    """A product with rows or columns of the identity picks those of the other factor."""
    one, other = i.args[:2]
    rows = _picked(recording.constants.get(one))
    if rows is not None:
        return _pick(i, other, 0, rows, recording)
    columns = _picked(_transposed(recording.constants.get(other)))
    if columns is not None:
        return _pick(i, one, 1, columns, recording)
    return i


def _transposed(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.mT


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
    i: Instruction, factor: Slot, dim: int, places: Tensor, recording: Recording
) -> Instruction | Slot:
    size = recording.like[factor][0][dim]
    if len(places) == size and torch.equal(places, torch.arange(size, device=places.device)):
        return factor
    return Instruction(aten.index_select.default, (factor, dim, places), {}, i.outs, i.writes)


def _out(instruction: Instruction) -> Slot:
    (slot,) = instruction.outs
    assert slot is not None
    return slot


Shortcut = Callable[[Instruction, Recording, frozenset[int]], Instruction | Slot]
_SHORTCUTS: dict[Any, Shortcut] = {
    aten.clone.default: _copy,
    aten.add.Tensor: _sum,
    aten.mul.Tensor: _factor,
    aten.mm.default: _product,
}


def _live(recording: Recording, outputs: Iterable[Slot]) -> list[Instruction]:
    """What the outputs, or a guard, need."""
    groups = recording.groups
    wanted = set(outputs)
    wanted_groups = {groups[slot] for slot in wanted}
    written = _written_groups(recording)
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
