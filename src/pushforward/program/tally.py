"""What the ops of a program do, counted from the shapes that were recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pushforward.meter import flops_of
from pushforward.program.recorder import Instruction, Like, Recording, Slot

aten = torch.ops.aten

# Elementwise, but many operations for each element.
_CURVED = frozenset(
    "tanh sigmoid exp expm1 exp2 log log1p log2 log10 sin cos tan sinh cosh asin acos atan atan2"
    " erf erfc erfinv gelu gelu_backward silu silu_backward softplus softplus_backward mish pow"
    " elu celu log_sigmoid_forward _softmax _log_softmax lgamma digamma".split()
)
# They pick or place elements one by one.
_PICKING = frozenset(
    "index_select index gather scatter scatter_add index_add index_put index_copy index_fill"
    " take embedding roll flip sort topk cumsum cumprod _unsafe_index masked_scatter"
    " max_pool2d_with_indices max_pool2d_with_indices_backward".split()
)
_BATCHED = frozenset("bmm baddbmm".split())


@dataclass(frozen=True, slots=True)
class Op:
    """What one op does.

    Attributes:
        flops: of a product of matrices or a convolution, else 0.
        pieces: how many products of matrices it is made of.
        moved: bytes that it reads and writes; none where it only looks at a tensor in another way.
        curved, picked: elements made by a function like tanh, and picked or placed one by one.
        taped: whether it runs in a backward pass of autograd, which adds to it.
    """

    flops: int = 0
    pieces: int = 1
    moved: int = 0
    curved: int = 0
    picked: int = 0
    taped: bool = False


def tally(recording: Recording) -> tuple[Op, ...]:
    """What each instruction does, in order."""
    return tuple(_counted(i, recording) for i in recording.instructions)


def _counted(instruction: Instruction, recording: Recording) -> Op:
    outs = [recording.like[slot] for slot in instruction.outs if slot is not None]
    if not outs or _only_looks(instruction, recording):
        return Op()
    name = instruction.func.overloadpacket.__name__.rstrip("_")
    made = sum(_elements(like) for like in outs)
    reads = [recording.like[slot] for slot in instruction.reads]
    return Op(
        flops=_flops(instruction, recording, outs),
        pieces=outs[0].shape[0] if name in _BATCHED else 1,
        moved=sum(_elements(like) * like.dtype.itemsize for like in (*outs, *reads)),
        curved=made if name in _CURVED else 0,
        picked=made if name in _PICKING else 0,
    )


def _only_looks(instruction: Instruction, recording: Recording) -> bool:
    """Whether every output is a view of something that was read."""
    read = {recording.groups[slot] for slot in instruction.reads}
    made = {recording.groups[slot] for slot in instruction.outs if slot is not None}
    return not instruction.writes and made <= read


def _elements(like: Like) -> int:
    """How many elements lie in memory; those of an expanded axis lie there once."""
    return math.prod(
        size for size, stride in zip(like.shape, like.strides, strict=True) if stride or not size
    )


def _flops(instruction: Instruction, recording: Recording, outs: Sequence[Like]) -> int:
    def shape(leaf: Any) -> Any:
        return recording.like[leaf].shape if isinstance(leaf, Slot) else leaf

    args, kwargs = pytree.tree_map(
        shape,
        (instruction.args, instruction.kwargs),
        is_leaf=lambda node: isinstance(node, Slot),
    )
    found = outs[0].shape if len(outs) == 1 else [like.shape for like in outs]
    try:
        return flops_of(instruction.func, args, kwargs, found)
    except (TypeError, ValueError, IndexError, AttributeError):  # asks for more than shapes
        return 0
