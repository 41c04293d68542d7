"""Trap 22: the derivative of relu and of max pooling has a derivative of zeros, which go their way.

A backward pass through a gradient meets the second derivative of each op. Where that is zero but
not absent, torch makes a tensor of zeros and carries it through all of the network before.
"""

from collections.abc import Callable

import pytest
import torch
from pins import normal, pinned
from torch import Tensor
from torch.nn import functional as F

from pushforward.regularizers.kinks import Evaluated

REVISIT = "regularizers.kinks, which runs such ops so that nothing flows back"
X = normal(2, 3, 4, 4)
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
}


def flows_back(f: Callable[[Tensor], Tensor]) -> Tensor | None:
    """What a gradient sends to the input of the op that it was pulled through."""
    x = X.clone().requires_grad_()
    y = f(x)
    u = torch.ones_like(y).requires_grad_()
    (gradient,) = torch.autograd.grad(y, x, u, create_graph=True)
    return torch.autograd.grad(gradient.sum(), x, allow_unused=True)[0]


@pytest.mark.parametrize("name", OPS)
def test_torch_carries_zeros(name: str):
    found = flows_back(OPS[name])
    pinned(found is not None and not found.any(), f"sends zeros back through {name}", REVISIT)


@pytest.mark.parametrize("name", OPS)
def test_nothing_flows_here(name: str):
    assert flows_back(Evaluated(OPS[name])) is None
