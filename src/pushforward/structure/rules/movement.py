"""Data movement: each output element is one input element, or a constant.

No op here is described: it is run on the positions of its inputs' elements, and the positions that
come out say where each output element came from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pushforward.structure.rules.registry import (
    Call,
    Numbers,
    positions,
    rule,
    without_derivative,
)
from pushforward.structure.sets import VARIES

aten = torch.ops.aten

MOVES = (
    *(aten.clone, aten._to_copy, aten.copy, aten.cat, aten.stack, aten.flip, aten.roll, aten.rot90),
    *(aten.repeat, aten.index_select, aten.gather, aten.index, aten.take, aten.constant_pad_nd),
    *(aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d, aten.unfold_copy),
    *(aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d, aten.narrow_copy),
    *(aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle, aten.tril, aten.triu),
    *(aten.slice_scatter, aten.select_scatter, aten.diagonal_scatter, aten.as_strided_scatter),
    *(aten.slice_backward, aten.select_backward, aten.diagonal_backward, aten.view_copy),
    *(aten.masked_select, aten.im2col, aten._unsafe_view, aten.lift_fresh_copy, aten.diag_embed),
    *(aten.permute_copy, aten.expand_copy, aten.slice_copy, aten.select_copy, aten.t_copy),
    *(aten.transpose_copy, aten.unsqueeze_copy, aten.squeeze_copy, aten.as_strided_copy),
    *(aten.alias_copy, aten.detach_copy, aten.diagonal_copy, aten.unbind_copy, aten.split_copy),
    *(aten.split_with_sizes_copy, aten._reshape_copy, aten.masked_scatter, aten.embedding),
    *(aten._unsafe_index, aten._chunk_cat, aten.contiguous, aten.block_diag),
    aten.view_as_real_copy,
)


# What comes of these is partly zero whatever they are given.
MAKE_ZEROS = frozenset(
    {
        *("tril", "triu", "constant_pad_nd", "diag_embed", "block_diag", "im2col", "linalg_qr"),
        *("slice_backward", "select_backward", "diagonal_backward", "unfold_backward"),
        *("linalg_cholesky_ex", "linalg_lu", "lu_unpack"),
    }
)
# Which argument of some of them says where from or where to.
_POINTERS: dict[Any, int] = {
    **dict.fromkeys((aten.index, aten._unsafe_index, aten.take, aten.masked_select), 1),
    **dict.fromkeys((aten.embedding, aten.masked_scatter), 1),
    **dict.fromkeys((aten.index_select, aten.gather), 2),
}


@rule(*MOVES)
def movement(call: Call) -> list[Numbers]:
    """Run the op on positions and read the sets from where each element came from."""
    numbers, sunk = [np.zeros(1, np.int32)], [np.zeros(1, bool)]
    filled = 1
    pointers = _pointers(call)

    def placed(leaf: Any) -> Any:
        nonlocal filled
        if not isinstance(leaf, Tensor):
            return torch.float64 if isinstance(leaf, torch.dtype) else leaf
        if id(leaf) in pointers:
            return torch.from_numpy(call.constant(leaf))
        numbers.append(call.numbers(leaf).reshape(-1))
        sunk.append(_sunk(call, leaf))
        start, filled = filled, filled + leaf.numel()
        return positions(leaf.shape, start)

    args, kwargs = pytree.tree_map(placed, (call.args, call.kwargs))
    kwargs.pop("memory_format", None)
    moved = pytree.tree_leaves(call.func(*args, **kwargs))
    table, low = np.concatenate(numbers), np.concatenate(sunk)
    varying = not all(call.is_constant(pointer) for pointer in pointers.values())
    if low.any() and not varying:
        call.sinks = low[moved[0].long().cpu().numpy()]
    return [_read(table, part, varying) for part in moved]


def _sunk(call: Call, tensor: Tensor) -> np.ndarray:
    mask = call.sunken(tensor)
    return np.zeros(tensor.numel(), bool) if mask is None else mask.reshape(-1)


def _pointers(call: Call) -> dict[int, Tensor]:
    """The indices and masks of a call."""
    place = _POINTERS.get(getattr(aten, call.op, None))
    leaves = [] if place is None else pytree.tree_leaves(call.args[place])
    return {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}


def _read(table: np.ndarray, moved: Tensor, varying: bool) -> Numbers:
    found = table[moved.long().cpu().numpy()]
    return np.maximum(found, VARIES) if varying else found


@rule(aten.constant_pad_nd)
def constant_pad(call: Call) -> list[Numbers]:
    numbers, widths = call.numbers(call.args[0]), call.args[1]
    moved = aten.constant_pad_nd(positions(numbers.shape, 1), widths, 0)
    return [_read(np.append(np.zeros(1, np.int32), numbers), moved, False)]


@rule(aten.embedding)
def embedding(call: Call) -> list[Numbers]:
    """Rows of a table; the row that pads is given no gradient."""
    found = movement(call)[0]
    padding = call.arg(2, "padding_idx", -1)
    pads = call.value(call.args[1]).cpu().numpy() == padding
    return [np.where(pads[..., None], without_derivative(found), found)]


@rule(aten._pack_padded_sequence)
def pack(call: Call) -> list[Numbers]:
    """Rows in the order of time, without those past the end, and how many there are at a time."""
    numbers, lengths = call.numbers(call.args[0]), call.args[1]
    given = torch.from_numpy(call.constant(lengths))
    moved = call.func(positions(numbers.shape, 0), given, *call.args[2:])[0]
    known = call.sets.unite_axis(call.numbers(lengths))
    return [_read(numbers.reshape(-1), moved, not call.is_constant(lengths)), known]


@rule(aten.as_strided_scatter)
def as_strided_scatter(call: Call) -> list[Numbers]:
    """Torch's derivative by the first argument lies where the second one was written."""
    return [call.unite(movement(call)[0], call.args[0])]


@rule(aten.copy_)
def copy_(call: Call) -> list[Numbers]:
    return [np.broadcast_to(call.numbers(call.args[1]), call.shape)]


@rule(aten.fill, aten.fill_, aten.zero_, aten.zero)
def fill(call: Call) -> list[Numbers]:
    value = call.args[1] if len(call.args) > 1 else 0
    return [np.broadcast_to(call.numbers(value), call.shape)]


@rule(aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full)
def made(call: Call) -> list[Numbers]:
    """A constant of another tensor's shape."""
    return [np.broadcast_to(call.numbers(call.kwargs.get("fill_value", 0)), call.shape)]


@rule(aten.empty_like, aten.new_empty, aten.new_empty_strided)
def unwritten(call: Call) -> list[Numbers]:
    """Whatever memory held: it varies until something is written."""
    return [np.full((), VARIES, np.int32)]
