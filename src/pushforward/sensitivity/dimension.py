"""In how many directions a map answers to its input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pushforward import linalg
from pushforward.derivatives import jacobian
from pushforward.errors import InputError
from pushforward.jacobians import Jacobian
from pushforward.sensitivity.batches import budget, checked_batch, joined, over_samples
from pushforward.sensitivity.norms import COPIES, check_request, finite, matrix_of


@dataclass(frozen=True, eq=False)
class EffectiveDimension:
    r"""What `effective_dimension` returns, per sample.

    Attributes:
        participation: :math:`(\sum s_k^2)^2 / \sum s_k^4`, ``(B,)``.
        entropy: :math:`\exp(-\sum q_k \log q_k)` with :math:`q_k = s_k / \sum s_k`, ``(B,)``.
        rank: how many singular values exceed ``rtol`` times the largest, ``(B,)``, integer.
        svdvals: the singular values, largest first, ``(B, min(m, n))``.
    """

    participation: Tensor
    entropy: Tensor
    rank: Tensor
    svdvals: Tensor


def effective_dimension(
    model: Callable[[Tensor], Any],
    x: Tensor,
    of: str = "logits",
    *,
    rtol: float = 0.01,
    memory: int | None = None,
    progress: bool | None = None,
) -> EffectiveDimension:
    """The number of directions in which a map moves at each sample, by its singular values.

    k equal singular values, the others zero, count k in all three ways; where one outweighs the
    rest all come down to 1. The zero Jacobian counts 0.

    Args:
        model: a module or function, in the mode that it is in.
        x: a batch ``(B, *in)`` of independent samples.
        of: "logits" for the output as it is, or "probabilities" for its softmax.
        rtol: which singular values ``rank`` counts: those over ``rtol`` times the largest.
        memory, progress: as in `jacobian_norm`.

    Returns:
        `EffectiveDimension`: the participation ratio, the effective rank of Roy and Vetterli ("The
        effective rank: a measure of effective dimensionality", EUSIPCO 2007), and the numerical
        rank. The first two are differentiable with respect to ``x`` and all parameters.

    Raises:
        InputError: ``of`` or ``rtol`` is out of range, ``x`` is not real floating point.
        PushforwardError: for the reasons that `jacobian_norm` has.

    Cost: one Jacobian, held whole for some samples at a time, and its singular values.

    >>> found = effective_dimension(lambda x: x * torch.tensor([3.0, 3.0, 0.0]), torch.ones(1, 3))
    >>> found.participation, found.rank
    (tensor([2.]), tensor([2]))
    """
    checked_batch(x, "effective_dimension")
    if isinstance(rtol, bool) or not isinstance(rtol, int | float) or not 0 <= rtol < math.inf:
        raise InputError(f"rtol expects a number that is not negative, got {rtol!r}")
    check_request(model, of)
    room = budget(memory)

    def measured(rows: slice) -> EffectiveDimension:
        J = jacobian(model, x[rows], batch_dim=0, memory=room and room // COPIES)
        return dimensions(_svdvals(J, of).to(x.dtype), rtol)

    found = over_samples(measured, len(x), "Singular values", progress)
    return joined(found) if found else dimensions(x.new_zeros(0, 0), rtol)


def _svdvals(J: Jacobian, of: str) -> Tensor:
    """Of the logits by what the plan knows of their structure."""
    if of == "logits":
        finite(J.fro_norm())
        return J.svdvals()
    matrix = matrix_of(J, of)
    finite(linalg.fro_norm(matrix))
    return linalg.svdvals(matrix)


def dimensions(values: Tensor, rtol: float) -> EffectiveDimension:
    """Of singular values (B, k), largest first."""
    return EffectiveDimension(
        participation(values), _entropy_rank(values), _rank(values.detach(), rtol), values
    )


def participation(values: Tensor) -> Tensor:
    """(sum s^2)^2 / sum s^4 of singular values (B, k); 0 for the zero matrix."""
    squares = _scaled(values).square()
    return squares.sum(-1).square() / _nonzero(squares.square().sum(-1))


def _entropy_rank(values: Tensor) -> Tensor:
    """0 for the zero Jacobian, which has no distribution."""
    scaled = _scaled(values)
    shares = scaled / _nonzero(scaled.sum(-1, keepdim=True))
    logs = torch.where(shares > 0, shares, 1.0).log()
    return (-(shares * logs).sum(-1)).exp() * (scaled.detach().sum(-1) > 0)


def _rank(values: Tensor, rtol: float) -> Tensor:
    return (
        (values > rtol * values.amax(-1, keepdim=True)).sum(-1)
        if values.numel()
        else (values.sum(-1).long())
    )


def _scaled(values: Tensor) -> Tensor:
    """Divided by the largest, so that no square or fourth power vanishes; ratios stay."""
    return values / _nonzero(values.detach().amax(-1, keepdim=True)) if values.numel() else values


def _nonzero(numbers: Tensor) -> Tensor:
    return torch.where(numbers == 0, 1.0, numbers)
