"""Writing at places that an index names: what is written replaces what was there, or joins it.

Where several values go to one place without being added up, torch differentiates each of them, so
that all of them count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pushforward.structure.rules.registry import Call, Numbers, positions, rule
from pushforward.structure.sets import VARIES

aten = torch.ops.aten


@rule(aten.scatter, aten.scatter_add, aten.scatter_reduce)
def scatter(call: Call) -> list[Numbers]:
    """``out[..., index[i], ...] = src[i]`` along one axis."""
    own, axis, index = call.args[:3]
    source = call.numbers(call.arg(3, "src", call.kwargs.get("value")))
    index_shape = tuple(index.shape)
    if source.ndim:
        source = source[tuple(map(slice, index_shape))]
    places = _all_places(own).gather(axis, _index(call, index))
    keeps = call.op != "scatter" or "reduce" in call.func._overloadname
    return [_written(call, [index], places, source, keeps and _includes_self(call))]


@rule(aten.index_add, aten.index_copy, aten.index_reduce, aten.index_fill)
def along_an_axis(call: Call) -> list[Numbers]:
    """``out[..., index[i], ...] = source[..., i, ...]`` along one axis."""
    own, axis, index, source = call.args[:4]
    if call.kwargs.get("alpha", 1) == 0:
        return [call.numbers(own)]
    places = _all_places(own)
    chosen = _index(call, index).reshape(-1)
    places = places.index_select(axis, chosen) if own.dim() else places.expand(len(chosen))
    values = call.numbers(source).reshape(-1)
    values = values if values.size == 1 else values.reshape(places.shape)
    keeps = call.op in ("index_add", "index_reduce")
    return [_written(call, [index], places, values, keeps and _includes_self(call))]


@rule(aten.index_put, aten._index_put_impl_, aten._unsafe_index_put)
def index_put(call: Call) -> list[Numbers]:
    """``out[indices] = values``, or ``+=``."""
    own, indices, values = call.args[:3]
    given = [index for index in indices if index is not None]
    places = _all_places(own)[tuple(_each(call, index) for index in indices)]
    adds = bool(call.arg(3, "accumulate", False))
    return [_written(call, given, places, call.numbers(values), adds)]


@rule(aten.put)
def put(call: Call) -> list[Numbers]:
    """``out.flatten()[index] = source``, or ``+=``."""
    own, index, source = call.args[:3]
    places = _all_places(own).reshape(-1)[_index(call, index)]
    adds = bool(call.arg(3, "accumulate", False))
    values = call.numbers(source).reshape(places.shape)
    return [_written(call, [index], places, values, adds)]


@rule(aten.col2im)
def col2im(call: Call) -> list[Numbers]:
    """The transpose of im2col: each place sums the columns that im2col would copy it to."""
    columns, kernel, apart = call.numbers(call.args[0]), call.args[2], call.args[3:]
    places = aten.im2col(positions(call.shape, 1), kernel, *apart).long().numpy()
    room = np.zeros(int(np.prod(call.shape)) + 1, np.int32)
    return [joined(call, room, places, columns, True)[1:].reshape(call.shape)]


@rule(aten.unfold_backward)
def unfold_backward(call: Call) -> list[Numbers]:
    """Each place sums the windows that looked at it."""
    windows, shape, *window = call.args
    places = positions(shape, 0).unfold(*window).long().numpy()
    room = np.zeros(tuple(shape), np.int32)
    return [joined(call, room, places, call.numbers(windows), True)]


@rule(aten._embedding_bag, aten._embedding_bag_forward_only)
def embedding_bag(call: Call) -> list[Numbers]:
    """Sums, means or maxima of the rows of a table that are named between two offsets."""
    table, index, offsets = call.args[:3]
    weights, padding = call.arg(6, "per_sample_weights"), call.arg(8, "padding_idx", -1)
    rows = _index(call, index).numpy()
    values = call.numbers(table)[rows]
    kept = rows != padding
    if weights is not None:
        values = call.unite(values, call.numbers(weights)[:, None])
        zero = call.equals(weights, 0)
        kept &= True if zero is None else ~zero
    starts = _index(call, offsets).numpy()
    bags = np.searchsorted(starts, np.arange(len(rows)), "right") - 1
    room = np.zeros(call.shape, np.int32)
    places = np.arange(room.size).reshape(call.shape)[bags[kept]]
    found = joined(call, room, places, values[kept], True)
    return [_shaken(call, [index, offsets], found), *[np.ones((), np.int32)] * 3]


@rule(aten.embedding_renorm_)
def embedding_renorm_(call: Call) -> list[Numbers]:
    """Rows made shorter where autograd does not look."""
    return [np.maximum(call.numbers(call.args[0]), VARIES)]


def joined(call: Call, base: Numbers, places: np.ndarray, values: Numbers, keeps: bool) -> Numbers:
    """Sets written at flat places: united where they meet, and with what was there if it stays."""
    places = places.reshape(-1)
    values = np.broadcast_to(values, places.shape) if values.ndim == 0 else values.reshape(-1)
    order = np.argsort(places, kind="stable")
    targets, starts = np.unique(places[order], return_index=True)
    united = call.sets.unite_groups(np.append(starts, len(places)), values[order])
    found = np.array(base).reshape(-1)
    found[targets] = call.sets.unite(found[targets], united) if keeps else united
    return found.reshape(base.shape)


def _written(
    call: Call, indices: Sequence[Tensor], places: Tensor, values: Numbers, keeps: bool
) -> Numbers:
    at = places.long().numpy()
    spread = np.broadcast_to(values, at.shape)
    found = joined(call, call.numbers(call.args[0]), at, spread, keeps)
    return _shaken(call, indices, found)


def _shaken(call: Call, indices: Sequence[Tensor], found: Numbers) -> Numbers:
    """No value is constant where the places vary."""
    varying = not all(call.is_constant(index) for index in indices)
    return np.maximum(found, VARIES) if varying else found


def _includes_self(call: Call) -> bool:
    return bool(call.kwargs.get("include_self", True))


def _all_places(tensor: Tensor) -> Tensor:
    """The flat position of each element."""
    return positions(tensor.shape, 0).long()


def _index(call: Call, index: Tensor) -> Tensor:
    return torch.from_numpy(call.constant(index)).long()


def _each(call: Call, index: Any) -> Any:
    """One of several indices: a mask, numbers or a whole axis."""
    return slice(None) if index is None else torch.from_numpy(call.constant(index))
