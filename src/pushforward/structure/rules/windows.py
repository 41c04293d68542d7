"""Convolution and pooling: an output depends on the inputs in a window, channel by channel or not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from pushforward.structure.rules.registry import Call, Numbers, rule

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
        shifted = [
            _strided(padded, place, tap * apart, step, size) for tap in range(taps)
        ]
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
    image, weight, bias, stride, padding, dilation, transposed, extra, groups = call.args[:9]
    space = weight.dim() - 2
    stride, padding, dilation, extra = (pair(v, space) for v in (stride, padding, dilation, extra))
    numbers = call.numbers(image)
    numbers = numbers if numbers.ndim == weight.dim() else numbers[None]
    kernel = list(weight.shape[2:])
    if transposed:
        numbers, before = _spread(numbers, kernel, stride, padding, dilation), [0] * space
        stride = [1] * space
    else:
        numbers, before = padded(numbers, padding, padding), padding
    sizes = call.shape[-space:]
    numbers = _fitted(numbers, kernel, stride, dilation, sizes)
    found = _convolved(call, numbers, weight, transposed, groups, stride, dilation, sizes)
    offset = call.numbers(bias)
    offset = offset.reshape(-1, *[1] * space) if offset.ndim else offset
    # The weights are part of what varies.
    found = call.unite(found, offset, _own(call, weight))
    return [found if len(call.shape) == weight.dim() else found[0]]


def _own(call: Call, weight: Tensor) -> Numbers:
    """What the weights depend on themselves, put together."""
    return call.sets.unite_axis(call.numbers(weight).reshape(-1))


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
            part = numbers[:, channel]
            for axis, place in enumerate(tap):
                start = place * dilation[axis]
                part = _strided(part, axis + 1, start, stride[axis], sizes[axis])
            shifted.append(part)
    return call.sets.unite_all(shifted)


@rule(aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, aten.max_pool1d, aten.max_pool2d)
def max_pool(call: Call) -> list[Numbers]:
    space = 3 if "3d" in str(call.func) else 1 if "pool1d" in str(call.func) else 2
    kernel = pair(call.args[1], space)
    stride = pair(call.arg(2, "stride") or kernel, space)
    padding, dilation = (pair(call.arg(i, name, d), space) for i, name, d in _POOL)
    return call.same_everywhere(_pooled(call, kernel, stride, padding, dilation))


_POOL = ((3, "padding", 0), (4, "dilation", 1))


@rule(aten.avg_pool2d, aten.avg_pool3d, aten.avg_pool1d)
def avg_pool(call: Call) -> list[Numbers]:
    space = 3 if "3d" in str(call.func) else 1 if "pool1d" in str(call.func) else 2
    kernel = pair(call.args[1], space)
    stride = pair(call.arg(2, "stride") or kernel, space)
    padding = pair(call.arg(3, "padding", 0), space)
    return [_pooled(call, kernel, stride, padding, [1] * space)]


def _pooled(
    call: Call,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Numbers:
    numbers = padded(call.numbers(call.args[0]), padding, padding)
    sizes = call.shape[-len(kernel) :]
    numbers = _fitted(numbers, kernel, stride, dilation, sizes)
    return windows(numbers, kernel, stride, dilation, sizes, call)


@rule(aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d, aten.adaptive_avg_pool1d)
@rule(aten.adaptive_max_pool2d, aten.adaptive_max_pool3d, aten.adaptive_max_pool1d)
def adaptive_pool(call: Call) -> list[Numbers]:
    """Windows of unequal sizes: from floor(i n / k) to ceil((i + 1) n / k)."""
    numbers = call.numbers(call.args[0])
    space = len(pair(call.args[1], 1)) if not isinstance(call.args[1], int) else 1
    for axis in range(numbers.ndim - space, numbers.ndim):
        have, want = numbers.shape[axis], call.shape[axis]
        parts = [
            call.sets.unite_axis(
                np.take(numbers, range(i * have // want, -((-(i + 1) * have) // want)), axis), axis
            )
            for i in range(want)
        ]
        numbers = np.stack(parts, axis)
    return call.same_everywhere(numbers)
