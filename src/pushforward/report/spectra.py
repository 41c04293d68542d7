"""What the singular values of one Jacobian per sample say."""

from dataclasses import dataclass

import torch
from torch import Tensor

KEPT = 32  # singular values that are kept of each sample


@dataclass(frozen=True)
class Spectra:
    """Per sample: norms (B,), the largest singular values (B, k), participation ratios (B,)."""

    fro_norm: Tensor
    spectral_norm: Tensor
    singular_values: Tensor
    effective_rank: Tensor


def spectra(matrix: Tensor) -> Spectra:
    """The spectra of Jacobians (B, m, n), from all of their singular values, in float64."""
    values = torch.linalg.svdvals(_solvable(matrix)).double()
    return Spectra(
        fro_norm=torch.linalg.vector_norm(values, dim=-1),
        spectral_norm=values[:, 0],
        singular_values=values[:, :KEPT],
        effective_rank=effective_rank(values),
    )


def effective_rank(singular_values: Tensor) -> Tensor:
    """The participation ratio (sum s^2)^2 / sum s^4, (B, k) to (B,); 0 for the zero matrix.

    It is k for k equal singular values and 1 where one of them outweighs the rest.
    """
    largest = singular_values.amax(-1, keepdim=True)
    squares = (singular_values / largest.clamp_min(torch.finfo(largest.dtype).tiny)).square()
    return squares.sum(-1).square() / squares.square().sum(-1).clamp_min(1)


def _solvable(matrix: Tensor) -> Tensor:
    """LAPACK has no half precision."""
    return matrix if matrix.dtype in {torch.float32, torch.float64} else matrix.float()
