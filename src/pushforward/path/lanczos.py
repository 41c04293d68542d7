"""A bound on a spectral norm that holds with probability 1 - delta."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pushforward.errors import DifferentiationError
from pushforward.path.dense import width
from pushforward.path.pull import Passes
from pushforward.path.steps import Step

ITERATIONS = 40

Product = Callable[[Tensor], Tensor]


def log_probable(
    passes: Passes, step: Step, samples: int, delta: float, generator: torch.Generator
) -> Tensor | None:
    """Return log of a number that ||J||_2 exceeds with probability delta at most, per sample.

    The Lanczos method on J^T J from a start that is uniform on the sphere: after k products, its
    estimate is below (1 - e) times the largest eigenvalue with probability at most
    1.648 sqrt(n) exp(-sqrt(e) (2k - 1)) (Kuczynski and Wozniakowski 1992, "Estimating the largest
    eigenvalue by the power and Lanczos algorithms with a random start", theorem 4.2). None where
    an op has no second derivative, or k products say nothing.
    """
    size = width(step.start, samples)
    iterations = min(ITERATIONS, size)
    try:
        product = _normal(passes, step, samples)
        found = _largest_ritz(product, samples, size, iterations, generator, step)
    except (RuntimeError, DifferentiationError):
        return None
    if iterations == size:  # the whole space
        return found.log() / 2
    missing = math.log(1.648 * math.sqrt(size) / delta) / (2 * iterations - 1)
    return (found.log() - math.log1p(-(missing**2))) / 2 if missing < 1 else None


def _normal(passes: Passes, step: Step, samples: int) -> Product:
    """v -> J^T J v on ``(samples, n)``, in float64 outside."""
    push = passes.transposed(step.stop, step.start)
    dtype = step.start.dtype

    def product(v: Tensor) -> Tensor:
        tangent = v.to(dtype).reshape(1, *step.start.shape)
        found = passes.pull(step.stop, step.start, push(tangent))
        return found.reshape(samples, -1).double()

    return product


def _largest_ritz(
    product: Product,
    samples: int,
    size: int,
    iterations: int,
    generator: torch.Generator,
    step: Step,
) -> Tensor:
    """The largest eigenvalue on the Krylov space of a random vector, sample by sample."""
    draw = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    start = draw.to(step.start.device)
    basis = [start / start.norm(dim=1, keepdim=True)]
    images = [product(basis[0])]
    while len(basis) < iterations:
        rest = _without(_without(images[-1], basis), basis)
        length = rest.norm(dim=1, keepdim=True)
        # Where the space is exhausted its rest is rounding; zero adds nothing to it.
        alive = length > 1e-10 * images[-1].norm(dim=1, keepdim=True)
        basis.append(torch.where(alive, rest / torch.where(alive, length, 1.0), 0.0))
        images.append(product(basis[-1]))
    space, moved = torch.stack(basis, dim=1), torch.stack(images, dim=1)
    projected = space @ moved.mT
    return torch.linalg.eigvalsh((projected + projected.mT) / 2)[:, -1].clamp(min=0)


def _without(vector: Tensor, basis: list[Tensor]) -> Tensor:
    space = torch.stack(basis, dim=1)
    return vector - ((space @ vector[..., None]).mT @ space)[:, 0]
