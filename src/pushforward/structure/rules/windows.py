"""Convolution: an output depends on the inputs in a window, over the channels of its group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from pushforward.structure.rules.registry import Call, Numbers, depends, rule

aten = torch.ops.aten


def pair(value: int | Sequence[int], count: int) -> list[int]:
    """One number for each axis of space."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def windows(
    padded: Numbers,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    sizes: Sequence[int],
    sets: Call,
) -> Numbers:
    """Unions over windows of the last axes, one axis after the other."""
    for axis, (taps, step, apart, size) in enumerate(
        zip(kernel, stride, dilation, sizes, strict=True)
    ):
        place = padded.ndim - len(kernel) + axis
        shifted = [_strided(padded, place, tap * apart, step, size) for tap in range(taps)]
        padded = sets.sets.unite_all(shifted)
    return padded


def _strided(numbers: Numbers, axis: int, start: int, step: int, size: int) -> Numbers:
    cut = [slice(None)] * numbers.ndim
    cut[axis] = slice(start, start + step * (size - 1) + 1, step)
    return numbers[tuple(cut)]


def padded(numbers: Numbers, before: Sequence[int], after: Sequence[int]) -> Numbers:
    """Constants around the last axes."""
    lead = [(0, 0)] * (numbers.ndim - len(before))
    return np.pad(numbers, lead + list(zip(before, after, strict=True)))


@rule(aten.convolution, aten._convolution, aten.convolution_overrideable)
def convolution(call: Call) -> list[Numbers]:
    """Windows over all channels of a group, forwards or transposed."""
    image, weight, bias, stride, padding, dilation, transposed, _, groups = call.args[:9]
    space = weight.dim() - 2
    stride, padding, dilation = (pair(v, space) for v in (stride, padding, dilation))
    kernel, sizes = list(weight.shape[2:]), call.shape[-space:]

    def laid_out(numbers: Numbers) -> Numbers:
        """What a plain convolution without padding would slide over."""
        if transposed:
            numbers = _spread(numbers, kernel, stride, padding, dilation)
        else:
            numbers = padded(numbers, padding, padding)
        return _fitted(numbers, kernel, step, dilation, sizes)

    step = [1] * space if transposed else stride
    numbers = call.numbers(image)
    numbers = numbers if numbers.ndim == weight.dim() else numbers[None]
    found = _convolved(call, laid_out(numbers), weight, transposed, groups, step, dilation, sizes)
    inside = laid_out(np.ones(numbers.shape[2:], np.int32)) > 0
    own = _own(call, weight, transposed, groups, inside, step, dilation, sizes)
    offset = call.numbers(bias)
    offset = offset.reshape(-1, *[1] * space) if offset.ndim else offset
    found = call.unite(found, offset, own)
    return [found if len(call.shape) == weight.dim() else found[0]]


def _own(
    call: Call,
    weight: Tensor,
    transposed: bool,
    groups: int,
    inside: np.ndarray,
    stride: Sequence[int],
    dilation: Sequence[int],
    sizes: Sequence[int],
) -> Numbers:
    """What comes of the weights, (out, *space): those of the taps that meet the image."""
    numbers = call.numbers(weight)
    if not depends(numbers):
        return call.sets.unite_axis(numbers.reshape(-1))
    taps = _taps(numbers, transposed, groups)
    taps = taps.reshape(*taps.shape[:3], -1)
    meets = np.stack(
        [
            _window(inside, tap, stride, dilation, sizes).reshape(-1)
            for tap in np.ndindex(*weight.shape[2:])
        ]
    )
    kinds, where = np.unique(meets, axis=1, return_inverse=True)
    parts = [call.sets.unite_axis(taps[..., kind].reshape(*taps.shape[:2], -1)) for kind in kinds.T]
    return np.stack(parts, -1)[..., where.reshape(-1)].reshape(-1, *sizes)


def _window(
    numbers: Numbers,
    tap: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    sizes: Sequence[int],
) -> Numbers:
    """What one tap of the kernel slides over, along the last axes."""
    first = numbers.ndim - len(tap)
    for axis, place in enumerate(tap):
        start = place * dilation[axis]
        numbers = _strided(numbers, first + axis, start, stride[axis], sizes[axis])
    return numbers


def _spread(
    numbers: Numbers,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Numbers:
    """A transposed convolution is a plain one of its input with constants put in between."""
    space = len(kernel)
    sizes = [(n - 1) * s + 1 for n, s in zip(numbers.shape[-space:], stride, strict=True)]
    apart = np.zeros((*numbers.shape[:-space], *sizes), np.int32)
    apart[(..., *(slice(None, None, s) for s in stride))] = numbers
    around = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    apart = padded(apart, around, around)
    cut = tuple(slice(p, None) for p in padding)
    return apart[(..., *cut)]


def _fitted(
    numbers: Numbers,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    sizes: Sequence[int],
) -> Numbers:
    """Constants at the end where a window would reach past it."""
    wanted = [
        (size - 1) * s + (k - 1) * d + 1
        for size, s, k, d in zip(sizes, stride, kernel, dilation, strict=True)
    ]
    lacking = [
        max(0, want - have)
        for want, have in zip(wanted, numbers.shape[-len(kernel) :], strict=True)
    ]
    return padded(numbers, [0] * len(kernel), lacking)


def _convolved(
    call: Call,
    numbers: Numbers,
    weight: Tensor,
    transposed: bool,
    groups: int,
    stride: Sequence[int],
    dilation: Sequence[int],
    sizes: Sequence[int],
) -> Numbers:
    zero = call.equals(weight, 0)
    batch, channels = numbers.shape[:2]
    kernel = weight.shape[2:]
    grouped = numbers.reshape(batch, groups, channels // groups, *numbers.shape[2:])
    outs = weight.shape[1] if transposed else weight.shape[0] // groups
    if zero is None:
        merged = call.sets.unite_axis(grouped, 2)
        found = windows(merged, kernel, stride, dilation, sizes, call)[:, :, None]
        shape = (batch, groups, outs, *sizes)
        return np.broadcast_to(found, shape).reshape(batch, groups * outs, *sizes)
    kept = _taps(~zero, transposed, groups)
    parts = [
        _one_filter(call, grouped[:, g], kept[g, out], stride, dilation, sizes)
        for g in range(groups)
        for out in range(outs)
    ]
    return np.stack(parts, 1)


def _taps(kept: np.ndarray, transposed: bool, groups: int) -> np.ndarray:
    """Which taps are not zero, (groups, out, in, *kernel)."""
    if not transposed:
        return kept.reshape(groups, kept.shape[0] // groups, *kept.shape[1:])
    flipped = np.flip(kept, tuple(range(2, kept.ndim)))
    grouped = flipped.reshape(groups, kept.shape[0] // groups, *kept.shape[1:])
    return np.swapaxes(grouped, 1, 2)


def _one_filter(
    call: Call,
    numbers: Numbers,
    kept: np.ndarray,
    stride: Sequence[int],
    dilation: Sequence[int],
    sizes: Sequence[int],
) -> Numbers:
    shifted = [np.zeros((len(numbers), *sizes), np.int32)]
    for channel, *tap in product(*map(range, kept.shape)):
        if kept[(channel, *tap)]:
            shifted.append(_window(numbers[:, channel], tap, stride, dilation, sizes))
    return call.sets.unite_all(shifted)
