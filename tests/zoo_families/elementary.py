"""Affine and elementwise maps, reductions, products, quadratic forms, convolution and pooling."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from zoo_families.case import Problem, block_diagonal, case, rand, randn


@case("affine_wide")
def affine_wide() -> Problem:
    a, b = randn(3, 4, seed=1), randn(3, seed=2)
    return Problem(lambda x: a @ x + b, (randn(4),), jacobian=lambda: a)


@case("affine_tall")
def affine_tall() -> Problem:
    a = randn(5, 3, seed=1)
    return Problem(lambda x: a @ x, (randn(3),), jacobian=lambda: a)


@case("affine_square", "square")
def affine_square() -> Problem:
    a = randn(4, 4, seed=1)
    return Problem(lambda x: a @ x, (randn(4),), jacobian=lambda: a)


@case("affine_batched", "batched")
def affine_batched() -> Problem:
    w = randn(5, 4, seed=1).requires_grad_()
    return Problem(
        lambda x: functional.linear(x, w),
        (randn(3, 4),),
        jacobian=lambda: block_diagonal(w.detach().expand(3, 5, 4)),
        pattern=lambda: np.kron(np.eye(3), np.ones((5, 4))).astype(bool),
        parameters=(w,),
    )


@case("affine_rank_one", "square")
def affine_rank_one() -> Problem:
    a = torch.outer(randn(4, seed=1), randn(4, seed=2))
    return Problem(lambda x: a @ x, (randn(4),), jacobian=lambda: a)


@case("zero_map", "square", "symmetric")
def zero_map() -> Problem:
    zero = torch.zeros(4, 4, dtype=torch.float64)
    return Problem(
        lambda x: 0 * x, (randn(4),), jacobian=lambda: zero, pattern=lambda: np.zeros((4, 4), bool)
    )


ELEMENTWISE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]] = {
    "sin": (torch.sin, torch.cos, randn(3, 4)),
    "exp": (torch.exp, torch.exp, randn(3, 4)),
    "tanh": (torch.tanh, lambda x: 1 - torch.tanh(x) ** 2, randn(3, 4)),
    "sigmoid": (torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x), randn(3, 4)),
    "softplus": (functional.softplus, torch.sigmoid, randn(3, 4)),
    "relu": (torch.relu, lambda x: (x > 0).double(), randn(3, 4)),
    "abs": (torch.abs, torch.sign, randn(3, 4)),
    "cube": (lambda x: x**3, lambda x: 3 * x**2, randn(3, 4)),
    "log": (torch.log, lambda x: 1 / x, rand(3, 4) + 0.5),
    "sqrt": (torch.sqrt, lambda x: 0.5 / x.sqrt(), rand(3, 4) + 0.5),
    "clamp": (lambda x: x.clamp(-1, 1), lambda x: (x.abs() < 1).double(), randn(3, 4)),
    "where": (
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: 0.1 + 0.9 * (x > 0).double(),
        randn(3, 4),
    ),
}


def _elementwise(name: str) -> Callable[[], Problem]:
    f, derivative, x = ELEMENTWISE[name]
    return lambda: Problem(
        f,
        (x.clone(),),
        jacobian=lambda: torch.diag(derivative(x).double().reshape(-1)),
        pattern=lambda: np.eye(x.numel(), dtype=bool),
    )


for _name in ELEMENTWISE:
    case(_name, "batched", "square", "symmetric")(_elementwise(_name))


@case("gelu", "batched", "square", "symmetric")
def gelu() -> Problem:
    return Problem(functional.gelu, (randn(3, 4),), pattern=lambda: np.eye(12, dtype=bool))


@case("softmax", "batched", "square", "symmetric")
def softmax() -> Problem:
    x = randn(3, 4)
    p = torch.softmax(x, -1)
    return Problem(
        lambda x: torch.softmax(x, -1),
        (x,),
        jacobian=lambda: block_diagonal(torch.diag_embed(p) - p[:, :, None] * p[:, None, :]),
        pattern=lambda: np.kron(np.eye(3), np.ones((4, 4))).astype(bool),
    )


@case("log_softmax", "batched", "square")
def log_softmax() -> Problem:
    x = randn(3, 4)
    p = torch.softmax(x, -1)
    eye = torch.eye(4, dtype=torch.float64)
    return Problem(
        lambda x: torch.log_softmax(x, -1),
        (x,),
        jacobian=lambda: block_diagonal(eye - p[:, None, :]),
    )


@case("logsumexp", "batched")
def logsumexp() -> Problem:
    x = randn(3, 4)
    return Problem(
        lambda x: torch.logsumexp(x, -1),
        (x,),
        jacobian=lambda: block_diagonal(torch.softmax(x, -1)[:, None, :]),
    )


@case("row_norms", "batched")
def row_norms() -> Problem:
    x = randn(3, 4)
    return Problem(
        lambda x: x.norm(dim=-1),
        (x,),
        jacobian=lambda: block_diagonal((x / x.norm(dim=-1, keepdim=True))[:, None, :]),
    )


@case("frobenius_norm")
def frobenius_norm() -> Problem:
    x = randn(3, 4)
    return Problem(torch.linalg.norm, (x,), jacobian=lambda: (x / x.norm()).reshape(1, 12))


@case("normalize", "batched", "square", "symmetric")
def normalize() -> Problem:
    x = randn(3, 4)
    unit, length = x / x.norm(dim=-1, keepdim=True), x.norm(dim=-1)[:, None, None]
    eye = torch.eye(4, dtype=torch.float64)
    return Problem(
        lambda x: functional.normalize(x, dim=-1),
        (x,),
        jacobian=lambda: block_diagonal((eye - unit[:, :, None] * unit[:, None, :]) / length),
    )


@case("spherical_coordinates", "square")
def spherical_coordinates() -> Problem:
    def f(x: Tensor) -> Tensor:
        radius, theta, phi = x
        across = radius * theta.sin()
        return torch.stack([across * phi.cos(), across * phi.sin(), radius * theta.cos()])

    def jacobian() -> Tensor:
        (s, c), (u, v) = (np.sin(0.7), np.cos(0.7)), (np.sin(-0.4), np.cos(-0.4))
        rows = [
            [s * v, 1.3 * c * v, -1.3 * s * u],
            [s * u, 1.3 * c * u, 1.3 * s * v],
            [c, -1.3 * s, 0.0],
        ]
        return torch.tensor(rows, dtype=torch.float64)

    return Problem(f, (torch.tensor([1.3, 0.7, -0.4], dtype=torch.float64),), jacobian=jacobian)


@case("product", "batched")
def product() -> Problem:
    x = randn(3, 4)
    return Problem(
        lambda x: x.prod(-1),
        (x,),
        jacobian=lambda: block_diagonal((x.prod(-1, keepdim=True) / x)[:, None, :]),
    )


@case("pairwise_product")
def pairwise_product() -> Problem:
    x = randn(6)
    halves = torch.diag_embed(torch.stack([x[3:], x[:3]]))
    return Problem(lambda x: x[:3] * x[3:], (x,), jacobian=lambda: torch.cat(list(halves), dim=1))


@case("outer_product")
def outer_product() -> Problem:
    return Problem(lambda x: torch.outer(x[:3], x[3:]), (randn(7),))


@case("quadratic_form")
def quadratic_form() -> Problem:
    a, x = randn(4, 4, seed=1), randn(4)
    return Problem(lambda x: x @ a @ x, (x,), jacobian=lambda: ((a + a.T) @ x)[None])


@case("gradient_field", "square", "symmetric")
def gradient_field() -> Problem:
    a, x = randn(4, 4, seed=1), randn(4)
    return Problem(
        lambda x: (a + a.T) @ x + x**3, (x,), jacobian=lambda: a + a.T + torch.diag(3 * x**2)
    )


@case("bilinear_einsum", "batched")
def bilinear_einsum() -> Problem:
    w = randn(5, 4, 4, seed=1).requires_grad_()
    return Problem(
        lambda x: torch.einsum("bi,oij,bj->bo", x, w, x), (randn(3, 4),), parameters=(w,)
    )


@case("conv1d", "batched")
def conv1d() -> Problem:
    w = randn(2, 1, 3, seed=1).requires_grad_()

    def band() -> Tensor:
        eye, taps = torch.eye(7, dtype=torch.float64), w.detach()[:, 0]
        return torch.cat([sum(t[k] * eye[k : k + 5] for k in range(3)) for t in taps])

    return Problem(
        lambda x: functional.conv1d(x, w),
        (randn(3, 1, 7),),
        jacobian=lambda: block_diagonal(band().expand(3, 10, 7)),
        pattern=lambda: np.kron(np.eye(3), band().numpy()) != 0,
        parameters=(w,),
    )


@case("conv2d", "batched")
def conv2d() -> Problem:
    w = randn(3, 2, 3, 3, seed=1).requires_grad_()
    return Problem(
        lambda x: functional.conv2d(x, w, stride=2, padding=1),
        (randn(2, 2, 5, 4),),
        parameters=(w,),
    )


@case("conv_transpose2d", "batched")
def conv_transpose2d() -> Problem:
    w = randn(2, 3, 3, 3, seed=1).requires_grad_()
    return Problem(
        lambda x: functional.conv_transpose2d(x, w, stride=2), (randn(2, 2, 3, 2),), parameters=(w,)
    )


@case("avg_pool", "batched")
def avg_pool() -> Problem:
    def average() -> Tensor:
        rows, columns = (torch.eye(k, dtype=torch.float64).repeat_interleave(2, 1) for k in (2, 3))
        return torch.kron(rows, columns) / 4

    return Problem(
        lambda x: functional.avg_pool2d(x, 2),
        (randn(2, 1, 4, 6),),
        jacobian=lambda: block_diagonal(average().expand(2, 6, 24)),
        pattern=lambda: np.kron(np.eye(2), average().numpy()) != 0,
    )


@case("max_pool", "batched")
def max_pool() -> Problem:
    def pattern() -> np.ndarray:
        """Which window, numbered like the output, each input lies in."""
        windows = np.arange(12).reshape(2, 1, 2, 3).repeat(2, 2).repeat(2, 3)
        return np.arange(12)[:, None] == windows.reshape(-1)

    return Problem(lambda x: functional.max_pool2d(x, 2), (randn(2, 1, 4, 6),), pattern=pattern)


@case("interpolate", "batched")
def interpolate() -> Problem:
    def f(x: Tensor) -> Tensor:
        return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    return Problem(f, (randn(2, 1, 2, 3),))


@case("real_fft", "batched")
def real_fft() -> Problem:
    return Problem(lambda x: torch.view_as_real(torch.fft.rfft(x)), (randn(3, 4),))
