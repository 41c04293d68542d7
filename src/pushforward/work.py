"""What one op does, counted from the shapes that it sees: the unit of every prediction of time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# Elementwise, but many operations for each element.
_CURVED = frozenset(
    [
        "tanh",
        "sigmoid",
        "exp",
        "expm1",
        "exp2",
        "log",
        "log1p",
        "log2",
        "log10",
        "sin",
        "cos",
        "tan",
        "sinh",
        "cosh",
        "asin",
        "acos",
        "atan",
        "atan2",
        "erf",
        "erfc",
        "erfinv",
        "gelu",
        "gelu_backward",
        "silu",
        "silu_backward",
        "softplus",
        "softplus_backward",
        "mish",
        "pow",
        "elu",
        "celu",
        "log_sigmoid_forward",
        "_softmax",
        "_log_softmax",
        "lgamma",
        "digamma",
    ]
)
# They pick or place elements one by one.
_PICKING = frozenset(
    [
        "index_select",
        "index",
        "gather",
        "scatter",
        "scatter_add",
        "index_add",
        "index_put",
        "index_copy",
        "index_fill",
        "take",
        "embedding",
        "roll",
        "flip",
        "sort",
        "topk",
        "cumsum",
        "cumprod",
        "_unsafe_index",
        "masked_scatter",
        "max_pool2d_with_indices",
        "max_pool2d_with_indices_backward",
    ]
)
_BATCHED = frozenset(["bmm", "baddbmm"])
# Convolutions work on so many channels at once.
_VECTOR = 8


@dataclass(frozen=True, slots=True)
class Op:
    """What one op does.

    Attributes:
        flops: of a product of matrices or a convolution, else 0.
        pieces: how many products of matrices it is made of.
        channels: of a convolution, the fewer of its two numbers; 0 for other ops.
        padding: what filling up its channels to whole vectors multiplies its work by.
        transposed: whether the convolution is one from outputs to inputs.
        moved: bytes that it reads and writes; none where it only looks at a tensor in another way.
        curved, picked: elements made by a function like tanh, and picked or placed one by one.
        taped: whether it runs in a backward pass of autograd, which adds to it.
        repeats: how often it runs.
    """

    flops: int = 0
    pieces: int = 1
    channels: int = 0
    padding: float = 1.0
    transposed: bool = False
    moved: int = 0
    curved: int = 0
    picked: int = 0
    taped: bool = False
    repeats: int = 1

    def times(self, count: float, repeats: int = 1) -> Op:
        """The same op on so many vectors at once in a backward pass, and that so often."""
        amounts = {name: int(count * getattr(self, name)) for name in _AMOUNTS}
        return replace(self, taped=True, repeats=repeats, **amounts)


_AMOUNTS = ("flops", "moved", "curved", "picked")


def op_of(func: Any, args: Any, kwargs: Any, reads: Sequence[Any], outs: Sequence[Any]) -> Op:
    """Count an op that really makes something.

    Args:
        func: the op.
        args, kwargs: what it is called with; shapes may stand for tensors.
        reads, outs: its tensors, or what has their shape, strides and dtype.
    """
    name = func.overloadpacket.__name__.rstrip("_")
    made = sum(elements(out) for out in outs)
    channels, padding, transposed = _convolution(name, args)
    return Op(
        flops=_flops(func, args, kwargs, outs),
        pieces=outs[0].shape[0] if name in _BATCHED else 1,
        channels=channels,
        padding=padding,
        transposed=transposed,
        moved=sum(elements(like) * like.dtype.itemsize for like in (*outs, *reads)),
        curved=made if name in _CURVED else 0,
        picked=made if name in _PICKING else 0,
    )


def elements(like: Any) -> int:
    """How many elements lie in memory; those of an expanded axis lie there once."""
    strides = like.stride() if isinstance(like, Tensor) else like.strides
    return math.prod(
        size for size, stride in zip(like.shape, strides, strict=True) if stride or not size
    )


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """The floating-point operations of a product of matrices or a convolution; 0 for other ops."""
    count = flop_registry.get(func._overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))


def _flops(func: Any, args: Any, kwargs: Any, outs: Sequence[Any]) -> int:
    found = outs[0].shape if len(outs) == 1 else [out.shape for out in outs]
    try:
        return flops_of(func, args, kwargs, found)
    except (TypeError, ValueError, IndexError, AttributeError):  # it asks for more than shapes
        return 0


def _convolution(name: str, args: Any) -> tuple[int, float, bool]:
    """The fewer channels of a convolution, its padding, and whether it goes backwards."""
    if name not in ("convolution", "convolution_backward"):
        return 0, 1.0, False
    backward = name == "convolution_backward"
    weight = args[2 if backward else 1]
    channels = tuple(getattr(weight, "shape", weight))[:2]
    groups = args[9 if backward else 8]
    padding = math.prod(-(-c // _VECTOR) * _VECTOR / max(c, 1) for c in channels)
    return min(channels), padding if groups == 1 else 1.0, backward or bool(args[6])
