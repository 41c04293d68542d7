"""The ladder: bounds on log ||J||_F of a chain, from the norms of its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pushforward.path.dense import Norms
from pushforward.path.groups import Groups, log_best_chain


def log_frobenius(log_fros: Tensor) -> Tensor:
    """The product of the Frobenius norms; ``(steps, samples) -> (samples,)``."""
    return log_fros.sum(dim=0)


def log_mixed(singles: Sequence[Norms]) -> Tensor:
    """||A B||_F <= ||A||_F ||B||_2: one factor by its Frobenius norm, at the best place."""
    fros = torch.stack([norms.log_fro for norms in singles])
    spectral = torch.stack([norms.log_spectral for norms in singles])
    none = torch.zeros_like(spectral[:1])
    before = torch.cat([none, spectral[:-1].cumsum(dim=0)])
    after = torch.cat([spectral[1:].flip(0).cumsum(dim=0).flip(0), none])
    return (before + fros + after).amin(dim=0)


def log_spectral(singles: Sequence[Norms], narrowest: int) -> Tensor:
    """||J||_F <= sqrt(rank J) ||J||_2, and no rank exceeds the narrowest width."""
    spectral = torch.stack([norms.log_spectral for norms in singles])
    return spectral.sum(dim=0) + math.log(narrowest) / 2


def log_segments(singles: Sequence[Norms], groups: Groups) -> Tensor:
    """The mixed rung over groups of steps, in the best division into groups."""
    return log_best_chain(singles, groups)
