"""Encoders that are one elementwise function of one linear layer: their Jacobian in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.regularizers.graph import RESHAPES, Affine, Between, Convolution
from pushforward.regularizers.pair import Pair

# Each output element depends on the element of the input in the same place alone.
_ELEMENTWISE = frozenset(
    f"{name}Backward0"
    for name in (
        *("Sigmoid", "Tanh", "Relu", "Softplus", "Elu", "Celu", "Gelu", "Silu", "Mish"),
        *("LeakyRelu", "PreluKernel", "RreluWithNoise", "LogSigmoid", "Hardtanh", "Hardsigmoid"),
        *("Hardswish", "Softshrink", "Hardshrink", "Threshold", "Clamp", "ClampMin", "ClampMax"),
        *("Sin", "Cos", "Sinh", "Cosh", "Asinh", "Atan", "Exp", "Expm1", "Log", "Log1P", "Erf"),
        *("Pow", "Sqrt", "Rsqrt", "Reciprocal", "Abs", "Neg", "Add", "Sub", "Rsub", "Mul", "Div"),
        *("Where", "Maximum", "Minimum", "NativeDropout", "MaskedFill"),
    )
)


@dataclass(frozen=True, eq=False)
class OneLayer:
    """J = diag(slopes) W: ||J||_F^2 = sum_j slopes_j^2 |W_j|^2.

    Attributes:
        slopes: of the elementwise function, ``(B, units)``, with their graph.
        squares: |W_j|^2 for each unit; broadcasts to the same.
    """

    slopes: Tensor
    squares: Tensor

    @staticmethod
    def of(pair: Pair) -> OneLayer | None:
        """None where an encoder is anything else."""
        first = pair.first
        if first is None or not _is_elementwise(pair, first):
            return None
        (slopes,) = pair.pull_to([first.edge], torch.ones_like(pair.y).unsqueeze(0))
        slopes = slopes[0]
        if slopes.numel() != pair.y.numel():  # a bare value was spread over several outputs
            return None
        return OneLayer(slopes, _squares(first))

    def squared_norm(self) -> Tensor:
        """||J||_F^2, the sum over samples."""
        return (self.slopes.square() * self.squares).sum()

    def squared_distance(self, other: OneLayer) -> Tensor:
        """||J - J'||_F^2 between two points of one encoder, the sum over samples."""
        return ((self.slopes - other.slopes).square() * self.squares).sum()


def _is_elementwise(pair: Pair, first: Affine | Convolution) -> bool:
    names, start = pair.between.names, first.edge.node
    behind = _after(pair.between, start)
    return all(names[node] in _ELEMENTWISE or names[node] in RESHAPES for node in behind)


def _after(between: Between, start: object) -> set:
    """The nodes that use a node, and those that use them."""
    found, pending = set(), [start]
    while pending:
        node = pending.pop()
        for place, users in between.users.items():
            if place[0] is node:
                new = {user for user, _ in users} - found
                found |= new
                pending.extend(new)
    return found


def _squares(first: Affine | Convolution) -> Tensor:
    """|W_j|^2 of each unit: the taps of a convolution that meet the input, not its padding."""
    if isinstance(first, Affine):
        return first.weight.square().sum(1)
    ones = torch.ones(
        (1, *first.input_shape[1:]), dtype=first.weight.dtype, device=first.weight.device
    )
    return torch.convolution(ones, first.weight.square(), None, *first.arguments)
