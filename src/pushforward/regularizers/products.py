"""Squared Frobenius norms of what is pulled back through a first layer, at the least cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pushforward.regularizers.graph import Convolution

# Entries that are computed before they are summed.
_COLUMNS = 1 << 21


def squared_norm_of_product(left: Tensor, right: Tensor) -> Tensor:
    """||A B||_F^2 for A, (m, h), and B, (h, n): by B B^T where that takes fewer products."""
    (m, h), n = left.shape, right.shape[1]
    if h * (n + m) < 1.5 * m * n:
        return _ByGram.apply(left, right)
    return (left @ right).square().sum()


class _ByGram(torch.autograd.Function):
    """<A^T A, B B^T>, with its gradients 2 A (B B^T) and 2 (A^T A) B.

    Autograd does not know that B B^T is symmetric, and would take twice as many products.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        product = left @ (right @ right.t())
        ctx.save_for_backward(left, right, product.detach())
        return (product * left).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,), (left, right, product) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of this one is wanted: it needs its graph
            product = left @ (right @ right.t())
        by_left = 2 * gradient * product if ctx.needs_input_grad[0] else None
        by_right = None
        if ctx.needs_input_grad[1]:
            by_right = 2 * gradient * ((left.t() @ left) @ right)
        return by_left, by_right


def squared_norm_of_transposed(outer: Tensor, layer: Convolution) -> Tensor:
    """The squared norm of gradients ``(k, *h)`` of a convolution, pulled back through it."""
    return _ByTaps.apply(outer, layer.weight, layer)


class _ByTaps(torch.autograd.Function):
    """|C^T g|^2 for a convolution C, with its gradients 2 C C^T g, and that by the weight."""

    @staticmethod
    def forward(ctx: Any, outer: Tensor, weight: Tensor, layer: Convolution) -> Tensor:
        ctx.arguments, ctx.shape = layer.arguments, layer.input_shape[1:]
        pulled = pulled_by_taps(outer, weight, ctx.shape, *ctx.arguments)
        ctx.save_for_backward(outer, weight, pulled.detach())
        return pulled.square().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (outer, weight, pulled) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled():
            pulled = pulled_by_taps(outer, weight, ctx.shape, *ctx.arguments)
        pulled = 2 * gradient * pulled
        by_outer = by_weight = None
        if ctx.needs_input_grad[0]:
            by_outer = torch.convolution(pulled, weight, None, *ctx.arguments)
        if ctx.needs_input_grad[1]:
            by_weight = torch.ops.aten.convolution_backward(
                outer, pulled, weight, None, *ctx.arguments, [False, True, False]
            )[1]
        return by_outer, by_weight, None


def pulled_by_taps(
    outer: Tensor,
    weight: Tensor,
    shape: tuple[int, ...],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    _: bool,
    __: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of a convolution's input, ``(k, *shape)``: a product, then one sum for each tap.

    For few input channels, as images have, the kernels that torch has for it on a CPU take several
    times as long.
    """
    matrix = weight.reshape(groups, len(weight) // groups, -1).transpose(1, 2)
    sizes = [size + 2 * pad for size, pad in zip(shape[1:], padding, strict=True)]
    whole = outer.new_zeros(len(outer), shape[0], *sizes)
    each = matrix.shape[0] * matrix.shape[1] * math.prod(outer.shape[2:])
    size = max(1, _COLUMNS // max(1, each))
    for start in range(0, len(outer), size):  # in parts that stay in the cache
        part, target = outer[start : start + size], whole[start : start + size]
        grouped = part.reshape(len(part), groups, len(weight) // groups, -1)
        columns = (matrix @ grouped).reshape(len(part), shape[0], -1, *part.shape[2:])
        for n, where in enumerate(_taps(weight.shape[2:], part.shape[2:], stride, dilation)):
            target[(..., *where)] += columns[:, :, n]
    inside = [slice(pad, pad + size) for size, pad in zip(shape[1:], padding, strict=True)]
    return whole[(..., *inside)]


def _taps(
    kernel: Sequence[int], leaving: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[slice, ...]]:
    """Where in the padded input each tap of a kernel looks."""
    for tap in itertools.product(*map(range, kernel)):
        yield tuple(
            slice(i * apart, i * apart + (count - 1) * step + 1, step)
            for i, apart, count, step in zip(tap, dilation, leaving, stride, strict=True)
        )
