"""What the singular values of d out / d h say beside their sum of squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.path.spectrum import gram

# Beyond that many outputs, singular values at every place cost more than the passes.
MOST_ROWS = 256
# Outside of it, squares in float32 are brought to size one first.
TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Spectrum:
    """log(||G||_2 / ||G||_F) and the effective rank of G, both ``(samples,)``."""

    log_share: Tensor
    effective_rank: Tensor


def spectrum(rows: Tensor, norms: Tensor, samples: int) -> Spectrum:
    """Describe the singular values of ``(m, samples, n)`` whose Frobenius norms are ``norms``.

    The effective rank is exp(H(p)), p_i = s_i / sum_j s_j (Roy and Vetterli 2007, "The effective
    rank: a measure of effective dimensionality"); 0 for a Jacobian of zero.
    """
    matrices = rows.reshape(len(rows), samples, -1).transpose(0, 1)
    squares = torch.linalg.eigvalsh(_gram(matrices, norms)).clamp(min=0)
    whole = squares.sum(dim=-1, keepdim=True)
    share = torch.where(whole > 0, squares / whole, 0.0)
    singular = share.sqrt()
    p = singular / singular.sum(dim=-1, keepdim=True).clamp(min=1e-300)
    rank = torch.special.entr(p).sum(dim=-1).exp()
    return Spectrum(share[:, -1].log() / 2, torch.where(norms > 0, rank, 0.0))


def _gram(matrices: Tensor, norms: Tensor) -> Tensor:
    """In float64 where it is small, else in single precision, which is enough for large ones."""
    if matrices.dtype.itemsize > 4 or matrices[0].numel() <= 2**16:
        return gram(matrices / torch.where(norms > 0, norms, 1.0)[:, None, None])
    matrices = matrices.float()
    safe = bool(((norms > TINY) & (norms < 1 / TINY)).all())
    if not safe:
        matrices = matrices / torch.where(norms > 0, norms, 1.0)[:, None, None].float()
    transposed = matrices.mT
    short = matrices.shape[1] <= matrices.shape[2]
    return (matrices @ transposed if short else transposed @ matrices).double()


def joined(spectra: list[Spectrum]) -> Spectrum:
    """Several places as one, ``(places, samples)``."""
    shares = torch.stack([each.log_share for each in spectra])
    return Spectrum(shares, torch.stack([each.effective_rank for each in spectra]))
