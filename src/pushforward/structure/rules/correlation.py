"""The backward pass of convolution: gradients of the image, of the kernel and of the bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch

from pushforward.structure.rules.registry import Call, Numbers, rule
from pushforward.structure.rules.windows import convolution, pair

aten = torch.ops.aten


@rule(aten.convolution_backward)
def convolution_backward(call: Call) -> list[Numbers]:
    gradient, mask = call.numbers(call.args[0]), call.named("output_mask")
    found = []
    if mask[0]:
        found.append(_of_image(call))
    if mask[1]:
        found.append(_of_kernel(call))
    if mask[2]:
        found.append(call.unite_axes(gradient, [i for i in range(gradient.ndim) if i != 1]))
    return found


def _of_image(call: Call) -> Numbers:
    """A plain convolution goes back by a transposed one, and the other way round."""
    gradient, _, weight, _, stride, padding, dilation, transposed, extra, groups = call.args[:10]
    geometry = (stride, padding, dilation, not transposed, extra, groups)
    other = replace(
        call, args=(gradient, weight, None, *geometry), kwargs={}, outputs=call.outputs[:1]
    )
    return convolution(other)[0]


def _of_kernel(call: Call) -> Numbers:
    """Each tap from what slides by it: (channels that stay, channels that slide, taps)."""
    gradient, image, weight = call.args[:3]
    space = weight.dim() - 2
    stays, slides = (image, gradient) if call.named("transposed") else (gradient, image)
    stays, slides = call.numbers(stays), call.numbers(slides)
    stride, padding, dilation = (
        pair(call.named(name), space) for name in ("stride", "padding", "dilation")
    )
    parts = []
    for tap in product(*map(range, weight.shape[2:])):
        start = [k * d - p for k, d, p in zip(tap, dilation, padding, strict=True)]
        own, other = _overlap(stays, slides, start, stride)
        parts.append(_each_pair(call, own, other, call.named("groups")))
    room = np.zeros(tuple(weight.shape), np.int32)
    return np.stack(parts, -1).reshape(room.shape) if parts else room


def _overlap(
    stays: Numbers, slides: Numbers, start: Sequence[int], stride: Sequence[int]
) -> tuple[Numbers, Numbers]:
    """The places that a tap brings together: p, and ``start + stride * p`` inside the other."""
    for axis, (first, step) in enumerate(zip(start, stride, strict=True), 2):
        places = np.arange(stays.shape[axis])
        others = first + step * places
        inside = (others >= 0) & (others < slides.shape[axis])
        stays = np.take(stays, places[inside], axis)
        slides = np.take(slides, others[inside], axis)
    return stays, slides


def _each_pair(call: Call, stays: Numbers, slides: Numbers, groups: int) -> Numbers:
    """The unions over samples and places, for each pair of channels of a group."""
    axes = [0, *range(2, stays.ndim)]
    one, other = call.unite_axes(stays, axes), call.unite_axes(slides, axes)
    pairs = call.unite(one.reshape(groups, -1, 1), other.reshape(groups, 1, -1))
    return pairs.reshape(len(one), -1)
