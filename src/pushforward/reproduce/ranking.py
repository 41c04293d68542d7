"""What the order of numbers says, whatever their scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """1 for the smallest of (N,), N for the largest; equal ones share the mean of their places."""
    _, group, sizes = values.double().unique(return_inverse=True, return_counts=True)
    ends = sizes.cumsum(0).double()
    return (ends - (sizes.double() - 1) / 2)[group]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's coefficient; NaN where either has no spread."""
    pair = [ranks(torch.tensor(values, dtype=torch.float64)) for values in (one, other)]
    if len(one) < 2 or any(bool((rank == rank[0]).all()) for rank in pair):
        return math.nan
    return torch.corrcoef(torch.stack(pair))[0, 1].item()


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """How often a positive one of (N,) scores higher than a negative one, ties counting half.

    The area under the receiver operating characteristic (Mann and Whitney, 1947); NaN where all
    are alike.
    """
    count = int(positive.sum())
    if count in (0, len(positive)):
        return math.nan
    above = ranks(scores)[positive].sum().item() - count * (count + 1) / 2
    return above / (count * (len(positive) - count))
