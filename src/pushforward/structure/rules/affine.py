"""Which ops leave a Jacobian the same at every point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pushforward.structure.rules.movement import MOVES

aten = torch.ops.aten

# They ask a tensor for its shape alone.
_FILLS = frozenset(
    {
        *(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like),
        *(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.new_empty_strided),
    }
)
# Affine in all of their arguments together.
_SUMS = frozenset(
    {
        *(aten.add, aten.add_, aten.sub, aten.sub_, aten.rsub, aten.neg, aten.neg_, aten.sum),
        *(aten.mean, aten.cumsum, aten.copy_, aten.fill_, aten.zero_, aten.trace, aten.real),
        *(aten.imag, aten.avg_pool2d, aten.avg_pool3d, aten._adaptive_avg_pool2d, aten.conj),
        *(aten.index_add, aten.scatter_add, aten.index_put, aten.index_put_, aten.slice_backward),
        *(aten.select_backward, aten._fft_r2c, aten._fft_c2c, aten._fft_c2r),
        aten.upsample_bilinear2d,
        *(aten.upsample_nearest2d, aten.upsample_nearest1d, aten.upsample_linear1d),
        aten.masked_fill,
        *MOVES,
    }
)
# Linear in each of two factors: affine where only one depends on the inputs.
_PRODUCTS = frozenset(
    {
        *(aten.mul, aten.mul_, aten.mm, aten.bmm, aten.mv, aten.dot, aten.addmm, aten.addmv),
        *(aten.baddbmm, aten.linear, aten.convolution, aten._convolution),
    }
)
# Affine in the first argument, where only that depends on the inputs.
_FIRST = frozenset({aten.div, aten.div_, aten.true_divide})


def is_affine(func: Any, args: Any, depends: Callable[[Tensor], bool]) -> bool:
    """Whether the derivative of a call is the same for all values of what depends on the inputs."""
    packet = func.overloadpacket
    if packet in _SUMS or packet in _FILLS:
        return True
    tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
    factors = tensors[-2:] if packet in (aten.addmm, aten.addmv, aten.baddbmm) else tensors[:2]
    if packet in _PRODUCTS:
        return sum(depends(t) for t in factors) <= 1
    return packet in _FIRST and not any(depends(t) for t in tensors[1:])
