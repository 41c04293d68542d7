"""Pooling: an output depends on a box of inputs, axis by axis; a gradient goes the other way.

Along each axis a table (outputs, taps) names the inputs that each output looks at, with -1 where a
window reaches past the end. The table of the backward pass is the same one, turned around.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pushforward.structure.rules.registry import Call, Numbers, rule, without_derivative
from pushforward.structure.rules.scattering import joined
from pushforward.structure.rules.windows import pair
from pushforward.structure.sets import VARIES

aten = torch.ops.aten

Table = np.ndarray


def through(call: Call, numbers: Numbers, tables: Sequence[Table]) -> Numbers:
    """The unions over boxes of the last axes, one axis after the other."""
    for axis, table in enumerate(tables, numbers.ndim - len(tables)):
        numbers = _along(call, numbers, axis, table)
    return numbers


def _along(call: Call, numbers: Numbers, axis: int, table: Table) -> Numbers:
    """Entry i along an axis is the union of the entries that row i of the table names."""
    after = [1] * (numbers.ndim - axis - 1)
    parts = [
        np.where((taps < 0).reshape(-1, *after), 0, np.take(numbers, np.maximum(taps, 0), axis))
        for taps in table.T
        if numbers.shape[axis]
    ]
    empty = (*numbers.shape[:axis], len(table), *numbers.shape[axis + 1 :])
    return call.sets.unite_all(parts) if parts else np.zeros(empty, np.int32)


def turned(table: Table, size: int) -> Table:
    """(size, outputs at most): for each input the outputs that look at it."""
    outputs, taps = np.nonzero(table >= 0)
    inputs = table[outputs, taps]
    order = np.argsort(inputs, kind="stable")
    inputs, outputs = inputs[order], outputs[order]
    counts = np.bincount(inputs, minlength=size)
    rank = np.arange(len(inputs)) - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.full((size, int(counts.max(initial=0))), -1)
    found[inputs, rank] = outputs
    return found


def sliding(size: int, outputs: int, taps: int, step: int, pad: int, apart: int) -> Table:
    """Windows that move by a step, over an axis with so much padding."""
    places = np.arange(outputs)[:, None] * step - pad + np.arange(taps) * apart
    return np.where((places >= 0) & (places < size), places, -1)


def adaptive(size: int, outputs: int) -> Table:
    """Windows of unequal sizes: from floor(i n / k) to ceil((i + 1) n / k)."""
    i = np.arange(outputs)
    starts, stops = i * size // max(outputs, 1), -(-(i + 1) * size // max(outputs, 1))
    places = starts[:, None] + np.arange(int((stops - starts).max(initial=0)))
    return np.where(places < stops[:, None], places, -1)


def _windows(call: Call, image: Tensor, sizes: Sequence[int]) -> list[Table]:
    """The tables of a pooling op over an image of some shape, by its arguments."""
    space = 3 if "3d" in call.op else 1 if "1d" in call.op else 2
    kernel = pair(call.named("kernel_size"), space)
    stride = pair(call.named("stride") or kernel, space)
    padding = pair(call.named("padding", 0), space)
    dilation = pair(call.named("dilation", 1), space)
    axes = zip(image.shape[-space:], sizes[-space:], kernel, stride, padding, dilation, strict=True)
    return [sliding(*axis) for axis in axes]


@rule(aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, aten.max_pool1d_with_indices)
@rule(aten.max_pool1d, aten.max_pool2d, aten.max_pool3d)
@rule(aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d)
def pool(call: Call) -> list[Numbers]:
    """Maxima stay dense over their windows: which one is chosen differs from point to point."""
    tables = _windows(call, call.args[0], call.shape)
    return _with_indices(call, through(call, call.numbers(call.args[0]), tables))


def _with_indices(call: Call, found: Numbers) -> list[Numbers]:
    return [found, *[without_derivative(found)] * (len(call.outputs) - 1)]


@rule(aten.max_pool2d_with_indices_backward, aten.max_pool3d_with_indices_backward)
@rule(aten.avg_pool2d_backward, aten.avg_pool3d_backward)
def pool_backward(call: Call) -> list[Numbers]:
    """The gradient of a window goes to all of it; no derivative passes by what was pooled."""
    gradient, image = call.args[:2]
    tables = _windows(call, image, gradient.shape)
    return [_sent_back(call, gradient, tables, image.shape[-len(tables) :])]


@rule(aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d, aten.adaptive_avg_pool1d)
@rule(aten.adaptive_max_pool2d, aten.adaptive_max_pool3d, aten.adaptive_max_pool1d)
def adaptive_pool(call: Call) -> list[Numbers]:
    space = int(call.op[-2])
    sizes = zip(call.args[0].shape[-space:], call.shape[-space:], strict=True)
    tables = [adaptive(*axis) for axis in sizes]
    return _with_indices(call, through(call, call.numbers(call.args[0]), tables))


@rule(aten._adaptive_avg_pool2d_backward, aten._adaptive_avg_pool3d_backward)
@rule(aten.adaptive_max_pool2d_backward, aten.adaptive_max_pool3d_backward)
def adaptive_pool_backward(call: Call) -> list[Numbers]:
    gradient, image = call.args[:2]
    space = 3 if "3d" in call.op else 2
    sizes = image.shape[-space:]
    tables = [adaptive(*axis) for axis in zip(sizes, gradient.shape[-space:], strict=True)]
    return [_sent_back(call, gradient, tables, sizes)]


def _sent_back(
    call: Call, gradient: Tensor, tables: Sequence[Table], sizes: Sequence[int]
) -> Numbers:
    back = [turned(*axis) for axis in zip(tables, sizes, strict=True)]
    found = through(call, call.numbers(gradient), back)
    chooses = "max" in call.op and not call.is_constant(call.args[1])
    return np.maximum(found, VARIES) if chooses else found


@rule(aten.max_unpool2d, aten.max_unpool3d)
def unpool(call: Call) -> list[Numbers]:
    """Each element goes to the place in its plane that its index names."""
    image, indices = call.args[:2]
    space = 3 if "3d" in call.op else 2
    room = np.zeros(call.shape, np.int32)
    planes = np.arange(room.size).reshape(*call.shape[:-space], -1)
    places = np.take_along_axis(planes, call.constant(indices).reshape(*planes.shape[:-1], -1), -1)
    found = joined(call, room, places, call.numbers(image), True)
    return [found if call.is_constant(indices) else np.maximum(found, VARIES)]
