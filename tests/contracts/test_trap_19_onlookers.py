"""Trap 19: det's backward takes another way where a dispatch mode looks on, and its Hessian is NaN.

It takes an SVD then, as under vmap; the SVD has no derivative where singular values repeat.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from pins import pinned
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pushforward as pf
from oracles import loop_hessian

REVISIT = "_NOT_UNDER_VMAP in pushforward.tape, and where a tape is recorded again in derivatives"
EYE = torch.eye(2, dtype=torch.float64)


class Onlooker(TorchDispatchMode):
    """Does nothing but note the names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def hessian_of_det(watched: AbstractContextManager) -> Tensor:
    x = EYE.clone().requires_grad_()
    with watched:
        (gradient,) = torch.autograd.grad(torch.linalg.det(x), x, create_graph=True)
        rows = [torch.autograd.grad(g, x, retain_graph=True)[0] for g in gradient.flatten()]
    return torch.stack(rows).reshape(4, 4)


def test_det_goes_by_an_svd_where_a_mode_looks_on():
    looks = Onlooker()
    found = hessian_of_det(looks)
    assert hessian_of_det(nullcontext()).isfinite().all()
    pinned(found.isnan().all(), "gives NaN for the Hessian of det under a dispatch mode", REVISIT)
    pinned("_linalg_svd" in looks.names, "takes an SVD there", REVISIT)


def test_a_plan_is_recorded_without_onlookers():
    expected = loop_hessian(lambda x: x[0, 0] * x[1, 1] - x[0, 1] * x[1, 0], EYE)
    for _ in range(3):
        torch.testing.assert_close(pf.hessian(torch.linalg.det, EYE).dense(), expected)
