"""Resampling: which pixels an output looks at is read from the op itself, run on unit vectors.

Interpolation and sampling at constant places are linear, and separate into one linear map for each
axis of space. The maps are small: their zeros say which pixels weigh nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from pushforward.structure.rules.pooling import through, turned
from pushforward.structure.rules.registry import (
    Call,
    Numbers,
    rule,
    without_derivative,
)
from pushforward.structure.rules.scattering import joined

aten = torch.ops.aten

_BY_NEAREST = (
    *(aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d),
    *(aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d),
    aten._upsample_nearest_exact3d,
)
_BY_WEIGHTS = (
    *(aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_trilinear3d),
    *(aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa),
    *((aten._upsample_lanczos2d_aa,) if hasattr(aten, "_upsample_lanczos2d_aa") else ()),
)
_NEAREST = 1


@rule(*_BY_NEAREST, *_BY_WEIGHTS)
def upsample(call: Call) -> list[Numbers]:
    """Along each axis the inputs that weigh something."""
    image, sizes, *options = call.args
    tables = _tables(call.func, image, image.shape[2:], sizes, options)
    return [through(call, call.numbers(image), tables)]


def _backward_of(packet: object) -> object:
    return getattr(aten, f"{packet.__name__}_backward")  # type: ignore[attr-defined]


@rule(*(_backward_of(packet) for packet in (*_BY_NEAREST, *_BY_WEIGHTS)))
def upsample_backward(call: Call) -> list[Numbers]:
    """The transpose: from each output to all inputs that it looked at."""
    gradient, sizes, given, *options = call.args
    forward = getattr(aten, call.op.removesuffix("_backward")).default
    tables = _tables(forward, gradient, given[2:], sizes, options)
    back = [turned(table, size) for table, size in zip(tables, given[2:], strict=True)]
    return [through(call, call.numbers(gradient), back)]


def _tables(
    op: object, like: Tensor, sizes: Sequence[int], wanted: Sequence[int], options: Sequence[object]
) -> list[np.ndarray]:
    """For each axis (outputs, taps): which inputs an output looks at, -1 where it has fewer."""
    space = len(sizes)
    aligned, scales = list(options[:-space]), list(options[-space:])
    if len(options) < space:
        aligned, scales = list(options), [None] * space
    return [
        _table(op, like, axis, size, want, aligned, scales[axis], space)
        for axis, (size, want) in enumerate(zip(sizes, wanted, strict=True))
    ]


def _table(
    op: object,
    like: Tensor,
    axis: int,
    size: int,
    want: int,
    aligned: list[object],
    scale: object,
    space: int,
) -> np.ndarray:
    """Interpolate every unit vector of one axis, alike along the others.

    Those have length two: smoothed interpolation takes tensors of width one for another layout.
    """
    shape, target = [1] * space, [2] * space
    shape[axis], target[axis] = size, want
    scales = [scale if place == axis else None for place in range(space)]
    units = torch.eye(size, dtype=like.dtype).reshape(1, size, *shape)
    wide = units.expand(1, size, *(size if place == axis else 2 for place in range(space)))
    weights = op(wide.contiguous(), target, *aligned, *scales)  # type: ignore[operator]
    meets = (weights[0] != 0).movedim(1 + axis, 0).reshape(want, size, -1).any(-1)
    return _listed(meets.numpy())


def _listed(mask: np.ndarray) -> np.ndarray:
    """Where the last axis of a mask is true, as a list filled up with -1."""
    counts = mask.sum(-1)
    order = np.argsort(~mask, -1, kind="stable")[..., : int(counts.max(initial=0))]
    return np.where(np.arange(order.shape[-1]) < counts[..., None], order, -1)


@rule(aten.grid_sampler_2d, aten.grid_sampler_3d)
def grid_sampler(call: Call) -> list[Numbers]:
    """At constant places, the pixels around; elsewhere, all pixels and the place itself."""
    image, grid, mode = call.args[:3]
    if call.is_constant(grid):
        return [_sampled(call, image, grid)]
    numbers, places = call.numbers(image), call.sets.unite_axis(call.numbers(grid))
    if mode == _NEAREST:
        places = without_derivative(places)
    pixels = call.unite_axes(numbers, range(2, numbers.ndim), True)
    return [call.unite(pixels, places[:, None])]


def _sampled(call: Call, image: Tensor, grid: Tensor) -> Numbers:
    numbers = call.numbers(image).reshape(*image.shape[:2], -1)
    found = [
        np.where(meets[:, None], np.take_along_axis(numbers, _in_rows(pixels, image), 2), 0)
        for pixels, meets in _taps(call, image, grid)
    ]
    return call.sets.unite_all(found).reshape(call.shape) if found else _nothing(call.shape)


def _in_rows(pixels: np.ndarray, image: Tensor) -> np.ndarray:
    """The same pixels in every channel."""
    return np.broadcast_to(pixels[:, None], (len(pixels), image.shape[1], pixels.shape[1]))


def _nothing(shape: Sequence[int]) -> Numbers:
    return np.zeros(tuple(shape), np.int32)


@rule(aten.grid_sampler_2d_backward, aten.grid_sampler_3d_backward)
def grid_sampler_backward(call: Call) -> list[Numbers]:
    """To the image from the samples that looked at a pixel; to the grid from all of the image."""
    gradient, image, grid = call.args[:3]
    numbers, pixels = call.numbers(gradient), call.numbers(image)
    space = range(2, image.dim())
    places = call.sets.unite_axis(call.numbers(grid))
    whole = call.sets.unite_axis(call.unite_axes(pixels, space), 1)
    whole = whole.reshape(-1, *[1] * len(space))
    to_grid = call.unite(call.sets.unite_axis(numbers, 1), whole, places)[..., None]
    if len(call.outputs) == 1:  # the image wants no gradient
        return [to_grid]
    if call.is_constant(grid):
        return [_sent_back(call, gradient, image, grid), to_grid]
    own = call.unite_axes(places, range(1, places.ndim), True)[:, None]
    return [call.unite(call.unite_axes(numbers, space, True), own), to_grid]


def _sent_back(call: Call, gradient: Tensor, image: Tensor, grid: Tensor) -> Numbers:
    room = _nothing((*image.shape[:2], int(np.prod(image.shape[2:]))))
    rows = np.arange(room.shape[0] * room.shape[1]).reshape(*room.shape[:2], 1) * room.shape[2]
    numbers = call.numbers(gradient).reshape(*room.shape[:2], -1)
    places, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    for pixels, meets in _taps(call, image, grid):
        meeting = np.broadcast_to(meets[:, None], numbers.shape)
        places.append((rows + pixels[:, None])[meeting])
        values.append(numbers[meeting])
    found = joined(call, room, np.concatenate(places), np.concatenate(values), True)
    return found.reshape(tuple(image.shape))


def _taps(call: Call, image: Tensor, grid: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each tap of the samples (N, outputs): its flat pixel, and whether there is one."""
    call.noted(grid, False)
    sizes = image.shape[2:]
    looks = [_looked_at(call, image, grid, axis) for axis in range(2, image.dim())]
    for taps in np.ndindex(*(look.shape[-1] for look in looks)):
        places = [look[..., tap] for look, tap in zip(looks, taps, strict=True)]
        meets = reduce(np.logical_and, [place >= 0 for place in places])
        pixels = np.ravel_multi_index([np.maximum(place, 0) for place in places], tuple(sizes))
        yield pixels.reshape(len(image), -1), meets.reshape(len(image), -1)


def _looked_at(call: Call, image: Tensor, grid: Tensor, axis: int) -> np.ndarray:
    """(samples, *outputs, taps): the places along one axis of the image that weigh something.

    Sampled are unit vectors of this axis, times numbers at random along the others, so that
    weights of both signs do not cancel.
    """
    options = call.args[-4:-1] if "backward" in call.op else call.args[-3:]
    grid = call.value(grid).cpu()
    size = image.shape[axis]
    generator = torch.Generator().manual_seed(0)
    units = torch.eye(size, dtype=grid.dtype).reshape(
        1, size, *(size if place == axis else 1 for place in range(2, image.dim()))
    )
    others = [1 if place == axis else image.shape[place] for place in range(2, image.dim())]
    waves = 1 + torch.rand([1, 1, *others], generator=generator, dtype=grid.dtype)
    probes = (units * waves).expand(len(grid), size, *image.shape[2:])
    sampler = aten.grid_sampler_2d if image.dim() == 4 else aten.grid_sampler_3d
    weights = sampler(probes, grid, *options)
    return _listed((weights != 0).movedim(1, -1).numpy())


@rule(aten.affine_grid_generator)
def affine_grid(call: Call) -> list[Numbers]:
    """Coordinate i of a place by row i of the matrix, but for coordinates that are zero."""
    matrix, size, aligned = call.args[:3]
    numbers = call.numbers(matrix)
    spread = numbers.reshape(len(numbers), *[1] * (len(size) - 2), *numbers.shape[1:])
    parts = []
    for column in range(numbers.shape[-1]):
        unit = torch.zeros(1, *matrix.shape[1:], dtype=matrix.dtype)
        unit[0, 0, column] = 1
        base = aten.affine_grid_generator(unit, [1, *size[1:]], aligned)[..., 0]
        parts.append(np.where((base != 0).numpy()[..., None], spread[..., column], 0))
    return [call.sets.unite_all(parts)]
