"""Trap 20: as_strided_scatter has a wrong first derivative by what it writes over.

It is 1 where the source was written, and 0 where the tensor shows: the wrong way round.
"""

import pytest
import torch
from pins import normal, pinned
from torch import Tensor

import pushforward as pf

PLACE = ((2,), (1,), 2)  # two elements, the third one on
TRUTH = torch.tensor([1, 1, 0, 0, 1, 1], dtype=torch.float64)


def scattered(x: Tensor) -> Tensor:
    return torch.as_strided_scatter(x, normal(2, seed=1), *PLACE)


def written_out(x: Tensor) -> Tensor:
    y = x.clone()
    y.as_strided(*PLACE).copy_(normal(2, seed=1))
    return y


def test_the_derivative_is_the_wrong_way_round():
    x = normal(6).requires_grad_()
    torch.testing.assert_close(scattered(x), written_out(x))
    (gradient,) = torch.autograd.grad(scattered(x).sum(), x)
    pinned(
        torch.equal(gradient, 1 - TRUTH),
        "gets the derivative of as_strided_scatter the wrong way round",
        "AsStridedScatterBackward0 in composites.UNFIT, and its rule in structure.rules.movement",
    )


@pytest.mark.parametrize("plan", ["auto", "reverse", "forward", "loop"])
def test_it_is_written_out(plan: str):
    J = pf.jacobian(scattered, normal(6), plan=plan)
    torch.testing.assert_close(J.matrix(), torch.diag(TRUTH))
    torch.testing.assert_close(J @ normal(6, seed=2), TRUTH * normal(6, seed=2))
