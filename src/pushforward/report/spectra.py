"""What the singular values of one Jacobian per sample say."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.sensitivity.dimension import participation as effective_rank

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


def _solvable(matrix: Tensor) -> Tensor:
    """LAPACK has no half precision."""
    return matrix if matrix.dtype in {torch.float32, torch.float64} else matrix.float()
