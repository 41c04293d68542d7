"""Largest singular values of matrices in float64, from above."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Nothing larger is decomposed: the eigenvalues of a symmetric 2048 x 2048 take seconds.
LARGEST_SIDE = 2048
PRUNING_SQUARINGS = 5


def gram(matrices: Tensor) -> Tensor:
    """A A^H or A^H A of (..., m, n), whichever is smaller, in double precision."""
    wide = matrices.to(torch.complex128 if matrices.is_complex() else torch.float64)
    adjoint = wide.mH
    return wide @ adjoint if wide.shape[-2] <= wide.shape[-1] else adjoint @ wide


def log_norms(matrices: Tensor) -> Tensor:
    """Return log ||A||_2 of (..., m, n), with a margin for rounding; (...)."""
    if 0 in matrices.shape[-2:]:
        return matrices.new_full(matrices.shape[:-2], -torch.inf, dtype=torch.float64)
    sizes = matrices.abs().amax(dim=(-2, -1), keepdim=True).double()
    scaled = matrices / torch.where(sizes > 0, sizes, 1.0)
    return log_root(gram(scaled)) + sizes[..., 0, 0].log()


def log_root(grams: Tensor) -> Tensor:
    """Half the logarithm of the largest eigenvalue of Gram matrices (..., k, k), from above.

    The error of a symmetric eigenvalue is k eps ||G||, which for the largest one is relative.
    """
    margin = 4 * grams.shape[-1] * torch.finfo(torch.float64).eps
    largest = torch.linalg.eigvalsh(grams)[..., -1].clamp(min=0)
    return (largest * (1 + margin)).log() / 2


def affordable(*matrix: int) -> bool:
    """Whether the norm of a matrix of this shape is to be had in seconds."""
    return min(matrix) <= LARGEST_SIDE


def log_inequality(matrices: Tensor) -> Tensor:
    """||A||_2 <= sqrt(||A||_1 ||A||_inf) and <= ||A||_F: the less of both, in logarithms."""
    sizes = matrices.abs().double()
    rows, columns = sizes.sum(dim=-1).amax(dim=-1), sizes.sum(dim=-2).amax(dim=-1)
    frobenius = torch.linalg.vector_norm(sizes, dim=(-2, -1))
    return torch.minimum((rows.log() + columns.log()) / 2, frobenius.log())


def log_norms_or_more(matrices: Tensor) -> Tensor:
    """Return log ||A||_2 where that is affordable, else what inequalities say."""
    fits = affordable(*matrices.shape[-2:])
    return log_norms(matrices) if fits else log_inequality(matrices)


def log_greatest(matrices: Tensor) -> float:
    """Return the largest log ||A||_2 among (F, m, n), deciding most of them without eigenvalues.

    ||A||_2 <= ||(A^H A)^p||_F^(1/(2p)), which squarings tighten (Delattre et al. 2023, "Efficient
    bound of Lipschitz constant for convolutional layers by Gram iteration"): candidates are
    decomposed in the order of these bounds, until the next bound is below what was found.
    """
    size = float(matrices.abs().max()) if matrices.numel() else 0.0
    if size == 0:
        return -torch.inf
    grams = gram(matrices / size)
    bounds = _log_gram_bounds(grams)
    found = -torch.inf
    at_once = max(1, LARGEST_SIDE // grams.shape[-1] ** 2)
    for chosen in bounds.argsort(descending=True).split(at_once):
        if float(bounds[chosen[0]]) <= found:
            break
        found = max(found, float(log_root(grams[chosen]).max()))
    return found + math.log(size)


def _log_gram_bounds(grams: Tensor) -> Tensor:
    """Half of log ||G^p||_F / p for p = 2^squarings; powers are kept at size one."""
    power, exponent = grams, 1.0
    log = torch.zeros(len(grams), dtype=torch.float64, device=grams.device)
    for _ in range(PRUNING_SQUARINGS):
        size = torch.linalg.vector_norm(power, dim=(-2, -1)).double()
        power = power / torch.where(size > 0, size, 1.0)[:, None, None]
        log = log + size.log() / exponent
        power, exponent = power @ power, 2 * exponent
    last = torch.linalg.vector_norm(power, dim=(-2, -1)).double().log()
    slack = 1e-12 * grams.shape[-1]
    return (log + last / exponent) / 2 + slack
