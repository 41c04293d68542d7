"""Every kind of plan trains: first and second derivatives of its results, step after step."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import pushforward as pf
from oracles import loop_jacobian
from pushforward.errors import DifferentiationError
from zoo_families.case import module, randn

RIGHT = {"rtol": 1e-8, "atol": 1e-8}
Layer = Callable[[], nn.Module]


class Band(nn.Module):
    """Three diagonals, each with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.weight
        return a * x[1:-1] ** 2 + (b * x[2:]).sin() * x[:-2] + c


class Affine(nn.Module):
    """A constant Jacobian beside a parameter that it does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.flip(0) + 0.5 * x + self.bias


class Outer(nn.Module):
    """More outputs than inputs, all of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None] * x.sum() + self.weight * x).tanh().cumsum(0).cumsum(1)


def layers(*widths: int) -> Layer:
    def build() -> nn.Module:
        found: list[nn.Module] = []
        for into, out in itertools.pairwise(widths):
            found += [nn.Linear(into, out), nn.Tanh()]
        return nn.Sequential(*found[:-1])

    return build


@dataclass(frozen=True)
class Trained:
    """A network at a point, and the strategy that it gets."""

    build: Layer
    shape: tuple[int, ...]
    strategy: str

    def make(self) -> tuple[nn.Module, Tensor]:
        return module(self.build), randn(*self.shape)


CASES = {
    "sparse": Trained(Band, (7,), "sparse"),
    "batch": Trained(layers(3, 4, 2), (5, 3), "batch"),
    "constant": Trained(Affine, (5,), "constant"),
    "reverse": Trained(layers(4, 3, 4), (4,), "reverse"),
    "forward": Trained(Outer, (3,), "forward"),
    "split": Trained(layers(130, 24, 2, 24, 128), (130,), "split"),
}
FAST = [name for name in CASES if name != "split"]


def loss_of(jacobian: Tensor) -> Tensor:
    """A scalar with another weight for each entry."""
    weight = randn(jacobian.numel(), seed=5).reshape(jacobian.shape)
    return (weight * jacobian).sum() + 0.5 * jacobian.square().sum()


def by_loop(net: nn.Module, x: Tensor) -> Tensor:
    return loop_jacobian(net, x, create_graph=True)


def by_plan(net: nn.Module, x: Tensor) -> Tensor:
    return pf.jacobian(net, x).dense()


def gradients(loss: Tensor, wanted: Sequence[Tensor], **options: bool) -> list[Tensor]:
    """d loss / d wanted, zeros where nothing connects them."""
    if not loss.requires_grad:
        return [torch.zeros_like(w) for w in wanted]
    return list(torch.autograd.grad(loss, wanted, materialize_grads=True, **options))


def kept_gradients(loss: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    """The same, and the graph stays for more."""
    return gradients(loss, wanted, retain_graph=True)


def assert_all_close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **RIGHT)


def wanted_of(net: nn.Module, x: Tensor) -> list[Tensor]:
    return [x.requires_grad_(), *net.parameters()]


@pytest.mark.parametrize("name", CASES)
def test_once_and_again(name: str):
    """The first backward pass makes the tape, the second finds it."""
    net, x = CASES[name].make()
    wanted = wanted_of(net, x)
    expected = gradients(loss_of(by_loop(net, x)), wanted)
    for _ in range(3):
        J = pf.jacobian(net, x)
        assert J.plan.strategy == CASES[name].strategy
        assert_all_close(gradients(loss_of(J.dense()), wanted), expected)


@pytest.mark.parametrize("name", FAST)
def test_twice(name: str):
    """Gradients of gradients, on demand at first and through the tape later."""
    net, x = CASES[name].make()
    wanted = wanted_of(net, x)

    def second(jacobian: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        first = gradients(loss_of(jacobian(net, x)), wanted, create_graph=True)
        return gradients(sum(g.square().sum() for g in first), wanted)

    expected = second(by_loop)
    for _ in range(2):
        assert_all_close(second(by_plan), expected)


@pytest.mark.parametrize("name", [name for name in FAST if name != "constant"])
def test_steps(name: str):
    """Descent by the library and by the loop goes through the same parameters, on one plan."""
    (ours, x), (theirs, _) = CASES[name].make(), CASES[name].make()
    plans = set()
    for _ in range(4):
        for net, jacobian in ((ours, by_plan), (theirs, by_loop)):
            step(net, loss_of(jacobian(net, x.clone().requires_grad_())))
        plans.add(id(pf.jacobian(ours, x).plan.recipe))
        assert_all_close(list(ours.parameters()), list(theirs.parameters()))
    assert len(plans) == 1


def step(net: nn.Module, loss: Tensor) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_adam_and_accumulated_gradients():
    (ours, x), (theirs, _) = CASES["batch"].make(), CASES["batch"].make()
    for net, jacobian in ((ours, by_plan), (theirs, by_loop)):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        for _ in range(3):
            for scale in (1.0, 0.5):  # two backward passes a step
                loss_of(jacobian(net, (scale * x).requires_grad_())).backward()
            optimizer.step()
    assert_all_close(list(ours.parameters()), list(theirs.parameters()))


@pytest.mark.parametrize("name", FAST)
def test_gradients_off_then_on(name: str):
    net, x = CASES[name].make()
    with torch.no_grad():
        first = pf.jacobian(net, x)
        assert not first.dense().requires_grad
    wanted = wanted_of(net, x)
    expected = by_loop(net, x)
    torch.testing.assert_close(first.dense().detach(), expected.detach())
    assert_all_close(
        gradients(loss_of(by_plan(net, x)), wanted), gradients(loss_of(expected), wanted)
    )
    with torch.no_grad():
        assert not by_plan(net, x).requires_grad


@pytest.mark.parametrize("name", ["sparse", "batch", "split"])
def test_graph_on_demand(name: str):
    """The first values come from the program; whoever trained once gets the tape from then on."""
    net, x = CASES[name].make()
    J = pf.jacobian(net, x)
    evaluation = J.plan.recipe.evaluation
    assert evaluation is not None
    assert not evaluation.trained
    J.dense().sum().backward()
    assert evaluation.trained
    assert pf.jacobian(net, x).plan.recipe.evaluation is evaluation


@pytest.mark.parametrize("name", FAST)
def test_results_of_one_jacobian_train_apart(name: str):
    net, x = CASES[name].make()
    wanted, whole = wanted_of(net, x), by_loop(net, x)
    J = pf.jacobian(net, x)
    m, n = J.shape
    matrix = whole.reshape(m, n)
    v, u = randn(n, 2, seed=6), randn(m, 2, seed=7)
    for of in (
        lambda A: A.fro_norm() if isinstance(A, pf.Jacobian) else A.norm(),
        lambda A: loss_of(A @ v),
        lambda A: loss_of(A.T @ u),
        lambda A: loss_of(A.matrix() if isinstance(A, pf.Jacobian) else A),
    ):
        assert_all_close(gradients(of(J), wanted), kept_gradients(of(matrix), wanted))


def test_sparse_values_train():
    net, x = CASES["sparse"].make()
    wanted = wanted_of(net, x)
    actual = gradients(pf.jacobian(net, x).sparse("coo").coalesce().values().square().sum(), wanted)
    assert_all_close(actual, gradients(by_loop(net, x).square().sum(), wanted))


def test_points_with_a_graph_behind_them():
    net, _ = CASES["sparse"].make()
    encoder = module(lambda: nn.Linear(4, 7))
    wanted = [*encoder.parameters(), *net.parameters()]
    first, second, expected = (
        gradients(loss_of(jacobian(net, encoder(randn(4, seed=9)).tanh())), wanted)
        for jacobian in (by_plan, by_plan, by_loop)
    )
    assert_all_close(first, expected)
    assert_all_close(second, expected)


def test_a_loss_of_the_value_too():
    net, x = CASES["sparse"].make()
    wanted = wanted_of(net, x)
    J = pf.jacobian(net, x)
    ours = J.value.square().sum() + loss_of(J.dense())
    theirs = net(x).square().sum() + loss_of(by_loop(net, x))
    assert_all_close(gradients(ours, wanted), gradients(theirs, wanted))


def test_samples_train():
    net, x = CASES["batch"].make()
    wanted = wanted_of(net, x)
    rows = torch.stack([loop_jacobian(lambda z: net(z[None])[0], s, True) for s in x])
    for memory in (None, 10**6):
        J = pf.jacobian(net, x, batch_dim=0, memory=memory)
        assert_all_close(
            gradients(loss_of(J.dense()), wanted), kept_gradients(loss_of(rows), wanted)
        )


@pytest.mark.parametrize("memory", [None, 10**5])
def test_sparse_plans_per_sample_train(memory: int | None):
    """Each sample has three diagonals."""
    weight, x = randn(7, seed=2).requires_grad_(), randn(4, 9).requires_grad_()

    def f(x: Tensor) -> Tensor:
        return weight * x[:, 1:-1] ** 2 + x[:, 2:].sin() * x[:, :-2]

    J = pf.jacobian(f, x, batch_dim=0, memory=memory)
    assert (J.plan.strategy, J.plan.passes, J.plan.nnz) == ("sparse", 3, 21)
    rows = torch.stack([loop_jacobian(lambda z: f(z[None])[0], s, True) for s in x])
    torch.testing.assert_close(J.dense().detach(), rows.detach())
    assert_all_close(
        gradients(loss_of(J.dense()), [x, weight]), kept_gradients(loss_of(rows), [x, weight])
    )


def test_hessians_train():
    weight, x = randn(6, seed=2).requires_grad_(), randn(7).requires_grad_()

    def f(x: Tensor) -> Tensor:
        return (weight * x[1:] ** 2 * x[:-1]).sum()

    H = pf.hessian(f, x)
    assert (H.plan.strategy, H.plan.passes) == ("sparse", 3)
    expected = loss_of(loop_jacobian(lambda z: gradient_of(f, z), x, True))
    assert_all_close(gradients(loss_of(H.dense()), [x, weight]), gradients(expected, [x, weight]))


def gradient_of(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    return torch.autograd.grad(f(z), z, create_graph=True)[0]


@pytest.mark.parametrize("name", ["sparse", "batch"])
def test_a_step_between_values_and_gradients_is_an_error(name: str):
    net, x = CASES[name].make()
    loss = by_plan(net, x).square().sum()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    with pytest.raises((RuntimeError, DifferentiationError), match=r"inplace|changed"):
        loss.backward()


def test_frozen_parts_get_nothing():
    net, x = CASES["batch"].make()
    net[0].requires_grad_(False)
    by_plan(net, x).square().sum().backward()
    assert net[0].weight.grad is None
    (expected,) = gradients(by_loop(net, x.requires_grad_()).square().sum(), [net[2].weight])
    torch.testing.assert_close(net[2].weight.grad, expected)
