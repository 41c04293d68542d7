"""A plan is never used where it no longer holds, and results hold wherever they are used."""

import pytest
import torch
from lawbook import EXACT, normal
from torch import Tensor, nn
from torch.nn import functional

import pushforward as pf
from oracles import loop_jacobian, reverse_over_reverse
from zoo import Case, named, over


class Permuted:
    """Moves samples about: harmless at first, and then no longer."""

    def __init__(self, order: Tensor) -> None:
        self.order = order

    def __call__(self, x: Tensor) -> Tensor:
        return x[self.order].sin()


def test_a_cached_plan_does_not_hide_new_coupling():
    f, x = Permuted(torch.arange(6)), normal(6, 3)
    assert pf.jacobian(f, x, batch_dim=0).matrix().shape == (6, 3, 3)
    f.order = f.order.flip(0)
    with pytest.raises(pf.errors.CouplingError, match="influence each other"):
        pf.jacobian(f, x, batch_dim=0).matrix()


def test_a_plan_that_was_made_does_not_hide_coupling_elsewhere():
    def f(x: Tensor) -> Tensor:
        return x.roll(0 if x.sum() > 0 else 1, 0).sin()

    x = normal(6, 3).abs()
    made = pf.plan(f, x, batch_dim=0)
    assert made(2 * x).matrix().shape == (6, 3, 3)
    with pytest.raises(pf.errors.CouplingError, match="influence each other"):
        made(-x).matrix()


def test_training_mode_is_part_of_what_a_plan_holds_for():
    net, x = nn.BatchNorm1d(3).double().eval(), normal(6, 3)
    assert pf.jacobian(net, x, batch_dim=0).matrix().shape == (6, 3, 3)
    net.train()
    with pytest.raises(pf.errors.CouplingError, match="eval"):
        pf.jacobian(net, x, batch_dim=0)


def test_another_branch_is_another_map():
    def f(x: Tensor) -> Tensor:
        return x.sin() if x.sum() > 0 else x**3

    x = normal(4).abs()
    for point in (x, -x, 2 * x):
        torch.testing.assert_close(pf.jacobian(f, point).dense(), loop_jacobian(f, point))


@pytest.mark.parametrize("change", ["shape", "dtype", "tree"])
def test_a_plan_refuses_other_arguments(change: str):
    x = normal(4)
    made = pf.plan(torch.sin, x)
    other = {"shape": normal(5), "dtype": x.float(), "tree": [x]}[change]
    f = torch.sin if change != "tree" else (lambda pair: pair[0].sin())
    with pytest.raises(pf.errors.PlanError, match="expect"):
        pf.jacobian(f, other, plan=made)


def test_parameters_changed_in_place_are_noticed():
    weight, x = normal(4, 4).requires_grad_(), normal(4)
    J = pf.jacobian(lambda x: torch.tanh(weight @ x), x)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(pf.errors.DifferentiationError, match="changed in place"):
        J.matrix()


def test_a_point_changed_in_place_is_not_seen():
    """The Jacobian is at the values that the point had."""
    x = normal(4)
    expected = torch.diag(3 * x**2)
    J = pf.jacobian(lambda x: x**3, x)
    x.mul_(5)
    torch.testing.assert_close(J.matrix(), expected)
    torch.testing.assert_close(J @ torch.ones(4, 1).double(), expected.sum(1, keepdim=True))


def test_a_graph_that_was_freed_is_recorded_again():
    weight, x = normal(4, 4).requires_grad_(), normal(4)
    J = pf.jacobian(lambda x: torch.tanh(weight @ x), x)
    first = J.matrix()
    first.sum().backward()
    torch.testing.assert_close(J.matrix(), first)
    torch.testing.assert_close(J @ x, first @ x)
    J.fro_norm().backward()


def test_gradients_reach_what_the_point_was_computed_from():
    encoder = nn.Linear(3, 4).double()
    f = named("residual").f
    loss = pf.jacobian(f, encoder(normal(3))).fro_norm()
    (actual,) = torch.autograd.grad(loss, encoder.weight)
    whole = loop_jacobian(f, (point := encoder(normal(3))), create_graph=True)
    (expected,) = torch.autograd.grad(whole.norm(), encoder.weight)
    assert point.grad_fn is not None
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def normed(x: Tensor) -> Tensor:
    return (functional.layer_norm(x, (4,)) * normal(4, seed=4)).sin().sum()


def composed(x: Tensor) -> Tensor:
    centred = x - x.mean()
    unit = centred * torch.rsqrt((centred**2).mean() + 1e-5)
    return (unit * normal(4, seed=4)).sin().sum()


def thrice(jacobian, f) -> Tensor:
    """The third derivative as the Jacobian of a Jacobian of a Jacobian."""
    inner = lambda x: jacobian(f, x)  # noqa: E731
    return jacobian(lambda y: jacobian(inner, y), normal(4))


def test_jacobians_of_jacobians_of_jacobians():
    expected = thrice(lambda f, x: torch.func.jacrev(f)(x), composed)
    for f in (composed, normed):
        actual = thrice(lambda g, x: pf.jacobian(g, x).dense(), f)
        torch.testing.assert_close(actual, expected, **EXACT)
    hessian = pf.jacobian(lambda x: pf.hessian(normed, x).matrix(), normal(4)).dense()
    torch.testing.assert_close(hessian, expected, **EXACT)


def test_a_divergence_is_a_map_like_any_other():
    f = named("residual").f
    x = normal(4)
    actual = pf.jacobian(lambda y: pf.divergence(f, y)[None], x).matrix()
    (expected,) = reverse_over_reverse(lambda J: J.trace(), f, x)
    torch.testing.assert_close(actual[0], expected, **EXACT)


def test_gradients_by_torch_func_go_through():
    f, x = named("residual").f, normal(4)
    actual = torch.func.grad(lambda y: pf.jacobian(f, y).fro_norm())(x)
    (expected,) = reverse_over_reverse(lambda J: J.norm(), f, x)
    torch.testing.assert_close(actual, expected, **EXACT)


@over("network", without=("tree", "random", "coupled"))
def test_training_within_a_budget(case: Case):
    """Under the least budget that is enough, gradients are what they are without one."""
    problem = case.make()

    def trained(memory: int | None) -> tuple[Tensor, ...]:
        x = problem.x.clone().requires_grad_()
        J = pf.jacobian(problem.f, x, memory=memory).matrix()
        loss = (J * normal(*J.shape, seed=5)).sum() + J.square().sum()
        return torch.autograd.grad(loss, (x, *problem.parameters), materialize_grads=True)

    expected = trained(None)
    for exponent in range(12, 34, 2):
        try:
            actual = trained(2**exponent)
        except pf.errors.MemoryBudgetError:
            continue
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        return
    raise AssertionError("no budget under 16 GiB is enough")


@pytest.mark.parametrize("attached", [False, True])
def test_parameters_that_are_gone_are_noticed(attached: bool):
    """Replaced, and not kept by anybody: the Jacobian at them is wanted all the same."""
    net, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double(), normal(4)
    pf.jacobian(net, x).matrix()
    with torch.set_grad_enabled(attached):
        J = pf.jacobian(net, x)
    net[0].weight = nn.Parameter(normal(3, 4))
    with pytest.raises(pf.errors.DifferentiationError, match="taken at, but they were changed"):
        J.matrix()
    torch.testing.assert_close(pf.jacobian(net, x).dense(), loop_jacobian(net, x))


def test_orders_are_guarded_after_tensors_that_are_made_inside():
    """Ops are found again by number: what makes constants counts alike, whoever looks on."""

    def f(x: Tensor) -> Tensor:
        back = torch.arange(3).flip(0)
        shifted = x.index_add(0, back, torch.eye(3, dtype=x.dtype) + x.sin())
        return shifted.sort(1).values[0] * torch.ones(3, dtype=x.dtype)

    x = normal(3, 3)
    plan = pf.plan(f, x)
    for point in (x, -x, normal(3, 3, seed=1), x.flip(1)):
        expected = loop_jacobian(f, point)
        torch.testing.assert_close(plan(point).dense(), expected, **EXACT)
        torch.testing.assert_close(pf.jacobian(f, point).dense(), expected, **EXACT)


def test_cuts_are_found_after_tensors_that_are_made_inside():
    weight, other = normal(160, 4, seed=1), normal(4, 160, seed=2)

    def f(x: Tensor) -> Tensor:
        scale = torch.arange(160, dtype=x.dtype) / 160 + torch.ones(160, dtype=x.dtype)
        return ((x * scale) @ weight).tanh() @ other * torch.eye(1, dtype=x.dtype)[0]

    x = normal(160)
    plan = pf.plan(f, x)
    assert plan.strategy == "split"
    assert plan.passes < 40
    torch.testing.assert_close(plan(-x).dense(), loop_jacobian(f, -x), **EXACT)
