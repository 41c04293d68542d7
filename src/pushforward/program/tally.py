"""What the ops of a program do, counted from the shapes that were recorded."""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree

from pushforward.program.recorder import Instruction, Recording, Slot
from pushforward.work import Op, op_of


def tally(recording: Recording) -> tuple[Op, ...]:
    """What each instruction does, in order."""
    return tuple(_counted(i, recording) for i in recording.instructions)


def _counted(instruction: Instruction, recording: Recording) -> Op:
    outs = [recording.like[slot] for slot in instruction.outs if slot is not None]
    if not outs or _only_looks(instruction, recording):
        return Op()
    reads = [recording.like[slot] for slot in instruction.reads]

    def shape(leaf: Any) -> Any:
        return recording.like[leaf].shape if isinstance(leaf, Slot) else leaf

    args, kwargs = pytree.tree_map(
        shape,
        (instruction.args, instruction.kwargs),
        is_leaf=lambda node: isinstance(node, Slot),
    )
    return op_of(instruction.func, args, kwargs, reads, outs)


def _only_looks(instruction: Instruction, recording: Recording) -> bool:
    """Whether every output is a view of something that was read."""
    read = {recording.groups[slot] for slot in instruction.reads}
    made = {recording.groups[slot] for slot in instruction.outs if slot is not None}
    returns = [value.alias_info for value in instruction.func._schema.returns]
    is_view = all(alias is not None and not alias.is_write for alias in returns)
    return not instruction.writes and (is_view or made <= read)
