"""Trap 17: second derivatives in reverse mode that are wrong: fused weight norm, logcumsumexp."""

import torch
from pins import pinned, relative_error
from torch import Tensor

import pushforward as pf
from oracles import loop_hessian

F64 = {"dtype": torch.float64}
G = torch.tensor([[1.5], [0.5]], **F64)
V = torch.tensor([[1.0, 2.0], [3.0, -1.0]], **F64)


def fused(v: Tensor) -> Tensor:
    return torch._weight_norm(v, G, 0).pow(3).sum()


def written_out(v: Tensor) -> Tensor:
    return (G * v / v.norm(dim=1, keepdim=True)).pow(3).sum()


def test_weight_norm():
    truth = loop_hessian(written_out, V)
    pinned(
        relative_error(loop_hessian(fused, V), truth) > 1e-2,
        "gets the second derivative of the fused weight norm wrong",
        "WeightNormInterfaceBackward0 in composites.UNFIT",
    )
    torch.testing.assert_close(pf.hessian(fused, V).dense(), truth)


def test_logcumsumexp():
    """Its backward takes the logarithm of the cotangent, which has no derivative at zero."""
    x = torch.tensor([0.3, -0.2, 0.5], **F64, requires_grad=True)
    u = torch.zeros(3, **F64, requires_grad=True)
    (pulled,) = torch.autograd.grad(torch.logcumsumexp(x, 0), x, u, create_graph=True)
    (pushed,) = torch.autograd.grad(pulled, u, torch.ones(3, **F64))
    pinned(
        pushed.isnan().any(),
        "gives NaN for J v by way of the backward of logcumsumexp",
        "LogcumsumexpBackward0 in composites.UNFIT",
    )
    J = pf.jacobian(lambda x: torch.logcumsumexp(x, 0), x.detach())
    torch.testing.assert_close(J @ torch.ones(3, **F64), J.matrix().sum(1))
