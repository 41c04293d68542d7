"""Trap 2: second derivatives of det, slogdet and logdet, where torch loses them."""

import pytest
import torch
from torch import Tensor

import pushforward as pf
from oracles import loop_hessian

F64 = {"dtype": torch.float64}
MATRIX = torch.tensor([[2.0, 0.3, 0.1], [0.0, 1.5, 0.4], [0.2, 0.1, 3.0]], **F64)
MAPS = {
    "det": torch.linalg.det,
    "slogdet": lambda a: torch.linalg.slogdet(a)[1],
    "logdet": torch.logdet,
}


@pytest.mark.parametrize("name", list(MAPS))
def test_hessians_are_right(name: str):
    for point in (MATRIX, torch.eye(3, **F64)):
        expected = loop_hessian(MAPS[name], point)
        torch.testing.assert_close(pf.hessian(MAPS[name], point).dense(), expected)
        traced = torch.einsum("ijij->", expected)
        torch.testing.assert_close(pf.laplacian(MAPS[name], point), traced)


@pytest.mark.parametrize("name", list(MAPS))
def test_gradients_of_jacobians_are_right(name: str):
    point = MATRIX.clone().requires_grad_()

    def f(a: Tensor) -> Tensor:
        return MAPS[name](a).reshape(1) * torch.ones(2, **F64)

    (actual,) = torch.autograd.grad(pf.jacobian(f, point).matrix().pow(3).sum(), point)
    inner = MATRIX.clone().requires_grad_()
    (row,) = torch.autograd.grad(MAPS[name](inner), inner, create_graph=True)
    (expected,) = torch.autograd.grad(2 * row.pow(3).sum(), inner)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
