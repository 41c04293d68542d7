"""Discretised equations: Jacobians with a stencil, and the smallest and largest shapes."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from zoo_families.case import Problem, case, randn


def _ring(size: int, *offsets: int) -> np.ndarray:
    """(size, size) with ones at the given cyclic offsets."""
    return sum(np.roll(np.eye(size), offset, axis=1) for offset in offsets) != 0


@case("burgers", "square")
def burgers() -> Problem:
    """Viscous Burgers on a ring, central differences."""
    size = 9

    def f(u: Tensor) -> Tensor:
        left, right = u.roll(1), u.roll(-1)
        return -u * (right - left) * size / 2 + 0.05 * size**2 * (left - 2 * u + right)

    def jacobian() -> Tensor:
        left, right = np.roll(np.eye(size), -1, 1), np.roll(np.eye(size), 1, 1)
        diffusion = 0.05 * size**2 * (left + right - 2 * np.eye(size))
        slope = (u.roll(-1) - u.roll(1)).numpy() * size / 2
        transport = u.numpy()[:, None] * (right - left) * size / 2 + np.diag(slope)
        return torch.from_numpy(diffusion - transport)

    u = randn(size)
    return Problem(f, (u,), jacobian=jacobian, pattern=lambda: _ring(size, -1, 0, 1))


@case("brusselator", "square")
def brusselator() -> Problem:
    """Two reacting fields on a 4 x 5 torus: a diagonal and a five-point stencil."""

    def spread(u: Tensor) -> Tensor:
        neighbours = [u.roll(shift, axis) for axis in (0, 1) for shift in (1, -1)]
        return 0.1 * (sum(neighbours) - 4 * u)

    def f(fields: Tensor) -> Tensor:
        u, v = fields
        return torch.stack([1 + u**2 * v - 4.4 * u + spread(u), 3.4 * u - u**2 * v + spread(v)])

    def pattern() -> np.ndarray:
        stencil = np.kron(_ring(4, -1, 0, 1), np.eye(5)) + np.kron(np.eye(4), _ring(5, -1, 0, 1))
        eye = np.eye(20)
        return np.block([[stencil, eye], [eye, stencil]]) != 0

    return Problem(f, (randn(2, 4, 5).abs(),), pattern=pattern)


@case("heat_batched", "batched", "square", "symmetric")
def heat_batched() -> Problem:
    def f(u: Tensor) -> Tensor:
        return functional.pad(u, (1, 1))[..., 2:] + functional.pad(u, (1, 1))[..., :-2] - 2 * u

    block = np.eye(5, k=1) + np.eye(5, k=-1) - 2 * np.eye(5)
    return Problem(
        f,
        (randn(3, 5),),
        jacobian=lambda: torch.from_numpy(np.kron(np.eye(3), block)),
        pattern=lambda: np.kron(np.eye(3), block) != 0,
    )


@case("arrow", "square", "symmetric")
def arrow() -> Problem:
    """One variable that all others meet."""

    def f(x: Tensor) -> Tensor:
        return torch.cat([x.sum()[None], x[1:] ** 2 + x[0]])

    def jacobian() -> Tensor:
        diagonal = torch.cat([torch.ones(1, dtype=x.dtype), 2 * x[1:]])
        return (
            torch.diag(diagonal).index_fill(0, torch.tensor(0), 1).index_fill(1, torch.tensor(0), 1)
        )

    x = randn(6)
    return Problem(f, (x,), jacobian=jacobian, pattern=lambda: jacobian().numpy() != 0)


@case("to_scalar")
def to_scalar() -> Problem:
    x = randn(3, 4)
    return Problem(lambda x: x.sin().sum(), (x,), jacobian=lambda: x.cos().reshape(1, 12))


@case("from_scalar")
def from_scalar() -> Problem:
    slopes = randn(3, seed=1)
    return Problem(
        lambda t: torch.sin(slopes * t),
        (torch.tensor(0.3, dtype=torch.float64),),
        jacobian=lambda: (slopes * torch.cos(slopes * 0.3))[:, None],
    )


@case("scalar_to_scalar", "square", "symmetric")
def scalar_to_scalar() -> Problem:
    x = torch.tensor(0.3, dtype=torch.float64)
    return Problem(torch.exp, (x,), jacobian=lambda: x.exp().reshape(1, 1))


@case("one_by_one", "batched", "square", "symmetric")
def one_by_one() -> Problem:
    x = randn(3, 1)
    return Problem(torch.sin, (x,), jacobian=lambda: torch.diag(x.cos()[:, 0]))


@case("batch_of_one", "batched")
def batch_of_one() -> Problem:
    return Problem(lambda x: x.cumsum(-1)[:, :3].sin(), (randn(1, 4),))


@case("no_inputs", "empty")
def no_inputs() -> Problem:
    return Problem(
        lambda x: x.sum().expand(3),
        (randn(0),),
        jacobian=lambda: torch.zeros(3, 0, dtype=torch.float64),
    )


@case("no_outputs", "empty")
def no_outputs() -> Problem:
    return Problem(
        lambda x: x[:0], (randn(4),), jacobian=lambda: torch.zeros(0, 4, dtype=torch.float64)
    )


@case("nothing_at_all", "empty", "square", "symmetric")
def nothing_at_all() -> Problem:
    return Problem(
        torch.sin, (randn(0, 3),), jacobian=lambda: torch.zeros(0, 0, dtype=torch.float64)
    )
