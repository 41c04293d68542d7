"""Functions of matrices, with their closed-form Jacobians, and distances."""

import torch
from torch import Tensor

from zoo_families.case import Problem, case, randn


def _matrix() -> Tensor:
    """A (3, 3) matrix of modest condition and positive determinant."""
    return randn(3, 3, seed=7) * 0.5 + 2 * torch.eye(3, dtype=torch.float64)


@case("inverse", "square")
def inverse() -> Problem:
    x = _matrix()
    y = torch.linalg.inv(x).contiguous()
    return Problem(torch.linalg.inv, (x,), jacobian=lambda: -torch.kron(y, y.T.contiguous()))


@case("solve")
def solve() -> Problem:
    b = randn(3, seed=8)
    x = _matrix()

    def jacobian() -> Tensor:
        y = torch.linalg.solve(x, b)
        return -torch.kron(torch.linalg.inv(x).contiguous(), y[None])

    return Problem(
        lambda x: torch.linalg.solve(x, b),
        (x,),
        jacobian=jacobian,
        reference=lambda x: torch.linalg.inv(x) @ b,
    )


@case("det")
def det() -> Problem:
    x = _matrix()
    return Problem(
        torch.linalg.det,
        (x,),
        jacobian=lambda: (torch.det(x) * torch.linalg.inv(x).T).reshape(1, 9),
        reference=lambda x: (x[0] * torch.linalg.cross(x[1], x[2])).sum(),
    )


@case("slogdet")
def slogdet() -> Problem:
    x = _matrix()
    return Problem(
        lambda x: torch.linalg.slogdet(x).logabsdet,
        (x,),
        jacobian=lambda: torch.linalg.inv(x).T.reshape(1, 9),
        reference=lambda x: (x[0] * torch.linalg.cross(x[1], x[2])).sum().abs().log(),
    )


@case("logdet_batched", "batched")
def logdet_batched() -> Problem:
    x = torch.stack([_matrix(), _matrix() + 0.1 * randn(3, 3, seed=9)])
    return Problem(
        torch.logdet,
        (x,),
        jacobian=lambda: torch.block_diag(*torch.linalg.inv(x).mT.reshape(2, 1, 9)),
        reference=lambda x: (x[:, 0] * torch.linalg.cross(x[:, 1], x[:, 2])).sum(-1).log(),
    )


@case("cholesky")
def cholesky() -> Problem:
    def f(x: Tensor) -> Tensor:
        return torch.linalg.cholesky(x @ x.mT + torch.eye(3, dtype=x.dtype))

    return Problem(f, (_matrix(),))


@case("qr_log_volume")
def qr_log_volume() -> Problem:
    x = randn(5, 3, seed=7)

    def f(x: Tensor) -> Tensor:
        return torch.linalg.qr(x).R.diagonal().abs().log().sum()

    return Problem(f, (x,), jacobian=lambda: torch.linalg.pinv(x).T.reshape(1, 15))


@case("singular_values")
def singular_values() -> Problem:
    x = randn(3, 4, seed=7)

    def jacobian() -> Tensor:
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        return torch.einsum("ik,kj->kij", u, vh).reshape(3, 12)

    return Problem(torch.linalg.svdvals, (x,), jacobian=jacobian)


@case("eigenvalues")
def eigenvalues() -> Problem:
    return Problem(lambda x: torch.linalg.eigvalsh(x + x.mT), (_matrix(),))


@case("matrix_exponential", "square")
def matrix_exponential() -> Problem:
    return Problem(torch.linalg.matrix_exp, (_matrix() / 3,))


@case("matrix_product", "batched", "square")
def matrix_product() -> Problem:
    a = randn(3, 3, seed=4)
    return Problem(
        lambda x: a @ x,
        (randn(2, 3, 4),),
        jacobian=lambda: torch.kron(
            torch.eye(2, dtype=a.dtype), torch.kron(a, torch.eye(4, dtype=a.dtype))
        ),
    )


@case("distances", "batched")
def distances() -> Problem:
    centres, x = randn(4, 3, seed=3), randn(5, 3)

    def reference(x: Tensor) -> Tensor:
        return ((x[:, None] - centres) ** 2).sum(-1).sqrt()

    def jacobian() -> Tensor:
        offset = x[:, None] - centres
        return torch.block_diag(*(offset / offset.norm(dim=-1, keepdim=True)))

    return Problem(lambda x: torch.cdist(x, centres), (x,), jacobian=jacobian, reference=reference)


@case("pairwise_distances")
def pairwise_distances() -> Problem:
    rows, columns = torch.triu_indices(4, 4, offset=1)
    return Problem(
        torch.pdist,
        (randn(4, 3),),
        reference=lambda x: ((x[rows] - x[columns]) ** 2).sum(-1).sqrt(),
    )
