"""Trap 5: tracing loses the backward of a custom ``autograd.Function``, silently.

On this build ``make_fx`` (with and without ``pre_dispatch``) and ``torch.export`` trace a
straight-through estimator as its forward: a derivative of zero instead of one. ``detach`` survives
tracing. Old-style functions (no ``setup_context``) are refused by ``torch.func``, and functions
without a vmap rule by ``jacfwd``.
"""

import pytest
import torch
from pins import forward_mode, normal, pinned, pinned_raise
from torch import Tensor, nn
from torch.func import jacfwd, jacrev
from torch.fx.experimental.proxy_tensor import make_fx

import pushforward as pf
from zoo import named
from zoo_families.unusual import ScaledGradient, StraightThrough

pytestmark = forward_mode
REVISIT = "the plain route of pushforward.tape, which records and never traces"
EYE = torch.eye(4, dtype=torch.float64)


def gradient_of_sum(f, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(f(leaf).sum(), leaf)[0]


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_loses_the_backward(pre_dispatch: bool):
    x = normal(4)
    straight = make_fx(StraightThrough.apply, pre_dispatch=pre_dispatch)(x)
    halved = make_fx(ScaledGradient.apply, pre_dispatch=pre_dispatch)(x)
    pinned(not gradient_of_sum(straight, x).any(), "a zero gradient of a traced estimator", REVISIT)
    pinned(gradient_of_sum(halved, x).eq(1).all(), "a traced function without its scale", REVISIT)


def test_export_loses_the_backward():
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return StraightThrough.apply(x)

    x = normal(4)
    exported = torch.export.export(Net(), (x,)).module()
    pinned(not gradient_of_sum(exported, x).any(), "a zero gradient after export", REVISIT)


def test_torch_func_refuses_such_functions():
    x = normal(4)
    with pinned_raise("setup_context", "torch.func refusing old-style functions", REVISIT):
        jacrev(ScaledGradient.apply)(x)
    with pinned_raise("vmap support", "jacfwd refusing functions without a vmap rule", REVISIT):
        jacfwd(StraightThrough.apply)(x)


@pytest.mark.parametrize("plan", ["auto", "reverse", "forward", "loop"])
@pytest.mark.parametrize("name", ["straight_through", "old_style_function", "old_style_saved"])
def test_their_own_backward_counts(name: str, plan: str):
    problem = named(name)
    J = pf.jacobian(problem.f, problem.x, plan=plan)
    torch.testing.assert_close(J.matrix(), problem.jacobian(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", ["auto", "reverse", "forward", "loop"])
def test_detach_is_a_derivative_of_zero(plan: str):
    x = normal(4)
    partly = pf.jacobian(lambda x: x * x.detach(), x, plan=plan)
    torch.testing.assert_close(partly.matrix(), torch.diag(x))
    wholly = pf.jacobian(lambda x: x.sin().detach(), x, plan=plan)
    assert not wholly.matrix().any()
    assert wholly.logvol() == -torch.inf


def test_gradients_flow_through_straight_through_networks():
    """d/dw of the Jacobian of w2 round(w1 x), where round passes gradients on."""
    w1 = (0.7 * EYE).requires_grad_()
    w2 = normal(3, 4).requires_grad_()
    J = pf.jacobian(lambda x: w2 @ StraightThrough.apply(w1 @ x), normal(4, seed=1)).matrix()
    torch.testing.assert_close(J.detach(), (w2 @ w1).detach())
    found = torch.autograd.grad(J.square().sum(), (w1, w2))
    expected = torch.autograd.grad((w2 @ w1).square().sum(), (w1, w2))
    torch.testing.assert_close(found, expected)
