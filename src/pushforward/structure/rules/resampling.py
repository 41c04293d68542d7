"""Resampling: which pixels an output looks at is read from the op itself, run on unit vectors.

Interpolation and sampling at constant places are linear, and separate into one linear map for each
axis of space. The maps are small: their zeros say which pixels weigh nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from pushforward.structure.rules.pooling import through, turned
from pushforward.structure.rules.registry import (
    Call,
    Numbers,
    depends,
    rule,
    without_derivative,
)

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
    call.noted(grid, False)
    numbers = call.numbers(image)
    if not depends(numbers):
        return call.unite_axes(numbers, range(2, numbers.ndim), True)
    looks = [_looked_at(call, axis) for axis in range(2, numbers.ndim)]
    samples = np.arange(len(numbers)).reshape(-1, *[1] * (numbers.ndim - 2))
    found = []
    for taps in np.ndindex(*(look.shape[-1] for look in looks)):
        places = [look[..., tap] for look, tap in zip(looks, taps, strict=True)]
        meets = reduce(np.logical_and, [place >= 0 for place in places])
        pixels = numbers[(samples, slice(None), *places)]
        found.append(np.moveaxis(np.where(meets[..., None], pixels, 0), -1, 1))
    return call.sets.unite_all(found) if found else np.zeros(call.shape, np.int32)


def _looked_at(call: Call, axis: int) -> np.ndarray:
    """(samples, *outputs, taps): the places along one axis of the image that weigh something.

    Sampled are unit vectors of this axis, times numbers at random along the others, so that
    weights of both signs do not cancel.
    """
    image, grid, *options = call.args
    grid = call.value(grid).cpu()
    size = image.shape[axis]
    generator = torch.Generator().manual_seed(0)
    units = torch.eye(size, dtype=grid.dtype).reshape(
        1, size, *(size if place == axis else 1 for place in range(2, image.dim()))
    )
    others = [1 if place == axis else image.shape[place] for place in range(2, image.dim())]
    waves = 1 + torch.rand([1, 1, *others], generator=generator, dtype=grid.dtype)
    probes = (units * waves).expand(len(grid), size, *image.shape[2:])
    weights = call.func(probes, grid, *options)
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
