"""The strategies: which one is taken, in how many passes exactly, and that each is exact."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import pushforward as pf
from oracles import loop_hessian, loop_jacobian
from pushforward.errors import PlanError
from pushforward.meter import measure
from zoo_families.case import module, randn


def laplacian(u: Tensor) -> Tensor:
    """Differences with the next neighbours along every axis, periodic."""
    shifted = [u.roll(step, dim) for dim in range(u.dim()) for step in (1, -1)]
    return sum(shifted) - 2 * u.dim() * u


def walled(u: Tensor) -> Tensor:
    """The same with zeros all around, as one convolution."""
    kernel = torch.zeros([3] * u.dim(), dtype=u.dtype)
    kernel[(1,) * u.dim()] = -2 * u.dim()
    for dim in range(u.dim()):
        for side in (0, 2):
            kernel[tuple(side if d == dim else 1 for d in range(u.dim()))] = 1
    convolve = functional.conv2d if u.dim() == 2 else functional.conv3d
    return convolve(u[None, None], kernel[None, None], padding=1)[0, 0]


def brusselator(state: Tensor) -> Tensor:
    u, v = state.unbind()
    change = u * u * v
    spread = torch.stack((laplacian(u), laplacian(v)))
    return torch.stack((1 + change - 4.4 * u, 3.4 * u - change)) + 10 * spread


def heat(u: Tensor) -> Tensor:
    flux = u + u * u
    return flux.roll(1) - 2 * flux + flux.roll(-1)


def arrowhead(x: Tensor) -> Tensor:
    return torch.cat(((x * x).sum()[None], x[1:].sin() * x[0]))


def shared_weights(x: Tensor) -> Tensor:
    """The same small map on each of ten groups of three."""
    return (x.reshape(10, 3) @ randn(3, 4, seed=3)).tanh().flatten()


def hourglass() -> nn.Module:
    widths = (150, 64, 8, 64, 130)
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.Linear(into, out), nn.Tanh()]
    return module(lambda: nn.Sequential(*layers[:-1]))


def small_net() -> nn.Module:
    return module(lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5)))


def written_into_zeros(x):
    """Zeros of the shape of x are no constant once x is written into them."""
    y = torch.zeros_like(x)
    y[1:] = x[1:] ** 2
    return y


@dataclass(frozen=True)
class Expected:
    """A map at a point, and the plan that it must get."""

    f: Callable[[Tensor], Tensor]
    x: Tensor
    strategy: str
    jvps: int
    vjps: int
    nnz: int


CASES = {
    "tridiagonal": Expected(
        lambda x: x[1:-1] ** 2 + x[2:] * x[:-2], randn(40), "sparse", 3, 0, 114
    ),
    "seven diagonals": Expected(
        lambda x: sum(x[i : i + 90] ** 2 for i in range(7)), randn(96), "sparse", 7, 0, 630
    ),
    "ring of 200": Expected(heat, randn(200), "sparse", 0, 4, 600),
    "ring of 201": Expected(heat, randn(201), "sparse", 0, 3, 603),
    "arrowhead": Expected(arrowhead, randn(500), "sparse", 2, 1, 1498),
    "5 points, periodic": Expected(
        lambda u: laplacian(u) + u**3, randn(15, 20), "sparse", 5, 0, 1500
    ),
    "5 points, walls": Expected(lambda u: walled(u) + u**3, randn(13, 17), "sparse", 5, 0, 1045),
    "7 points, periodic": Expected(
        lambda u: laplacian(u) + u**3, randn(7, 7, 7), "sparse", 7, 0, 2401
    ),
    "7 points, walls": Expected(lambda u: walled(u) + u**3, randn(7, 8, 9), "sparse", 7, 0, 3146),
    "brusselator": Expected(brusselator, randn(2, 32, 32), "sparse", 0, 8, 12288),
    "diagonal": Expected(torch.sin, randn(50), "sparse", 0, 1, 50),
    "shared weights": Expected(shared_weights, randn(30), "sparse", 3, 0, 120),
    "batch": Expected(small_net(), randn(256, 8), "batch", 0, 5, 10240),
    "layer norm": Expected(
        lambda x: functional.layer_norm(x, (6,)), randn(9, 6), "batch", 0, 6, 324
    ),
    "hourglass": Expected(hourglass(), randn(150), "split", 8, 8, 150 * 130),
    "permutation": Expected(lambda x: x.flip(0), randn(30), "constant", 0, 0, 30),
    "affine": Expected(lambda x: 3 * x.roll(2, 0) - x[:1] + 1, randn(7, 5), "constant", 0, 0, 65),
    "nothing": Expected(lambda x: x.detach() * 2, randn(5), "constant", 0, 0, 0),
    "ones of its shape": Expected(
        lambda x: 3 * torch.ones_like(x) * x + x.new_full((5,), 2.0), randn(5), "constant", 0, 0, 5
    ),
    "written into zeros": Expected(written_into_zeros, randn(5), "sparse", 0, 1, 4),
    "dense": Expected(lambda x: x.cumsum(0) ** 2, randn(20), "reverse", 0, 20, 210),
    "tall": Expected(lambda x: x[:, None] * x.sum() + x.sin(), randn(9), "forward", 9, 0, 729),
}


@pytest.mark.parametrize("name", CASES)
def test_passes(name: str):
    case = CASES[name]
    plan = pf.plan(case.f, case.x)
    found = plan.strategy, plan.jvps, plan.vjps, plan.nnz
    assert found == (case.strategy, case.jvps, case.vjps, case.nnz)
    assert plan.passes == case.jvps + case.vjps


@pytest.mark.parametrize("name", CASES)
def test_numbers_at_another_point(name: str):
    """Products with what is found, against backward passes that share nothing."""
    case = CASES[name]
    x = case.x.cos() + 0.1
    found = pf.plan(case.f, case.x)(x).matrix().detach()
    for seed in (1, 2):
        u = randn(found.shape[0], seed=seed)
        torch.testing.assert_close(u @ found, pulled(case.f, x, u), rtol=1e-9, atol=1e-9)


def pulled(f: Callable[[Tensor], Tensor], x: Tensor, u: Tensor) -> Tensor:
    """u^T J, zeros where nothing is connected."""
    point = x.detach().clone().requires_grad_()
    y = f(point).reshape(-1)
    if not y.requires_grad:
        return torch.zeros(x.numel(), dtype=x.dtype)
    (gradient,) = torch.autograd.grad(y, point, u)
    return gradient.reshape(-1)


HESSIANS = {
    "arrow": (lambda x: (x[0] * x).sum() + (x**4).sum(), randn(40), 2, 118),
    "tridiagonal": (lambda x: (x[1:] ** 2 * x[:-1]).sum(), randn(41), 3, 120),
    "ring": (lambda x: (x.roll(1) ** 2 * x).sum(), randn(31), 3, 93),
    "diagonal": (lambda x: (x**4).sum(), randn(30), 1, 30),
    "grid": (
        lambda u: (u[1:] ** 2 * u[:-1]).sum() + (u[:, 1:] ** 2 * u[:, :-1]).sum(),
        *(randn(8, 9), 5, 325),
    ),
}


@pytest.mark.parametrize("name", HESSIANS)
def test_passes_of_hessians(name: str):
    f, x, passes, nnz = HESSIANS[name]
    plan = pf.plan(f, x, quantity="hessian")
    assert (plan.strategy, plan.jvps, plan.vjps, plan.nnz) == ("sparse", 0, passes, nnz)
    point = x.cos()
    torch.testing.assert_close(plan(point).dense(), loop_hessian(f, point))


DIAGONALS = {
    "ring of 200": (heat, randn(200), 2),
    "arrowhead": (arrowhead, randn(50), 2),
    "5 points": (lambda u: walled(u) + u**3, randn(6, 7), 2),
    "triangle": (lambda x: x.cumsum(0) ** 2, randn(9), 9),
}


@pytest.mark.parametrize("name", DIAGONALS)
def test_passes_of_diagonals(name: str):
    """Only what pollutes the diagonal counts: a stencil is a chequerboard."""
    f, x, passes = DIAGONALS[name]
    plan = pf.plan(f, x, quantity="diagonal")
    assert plan.passes == passes
    whole = loop_jacobian(f, x).reshape(x.numel(), x.numel())
    torch.testing.assert_close(pf.jacobian(f, x).diagonal(), whole.diagonal())
    torch.testing.assert_close(pf.jacobian(f, x).trace(), whole.trace())


BY_NAME = ("constant", "batch", "sparse", "split", "reverse", "forward", "loop")
SMALL = {
    "sparse": (lambda x: x[1:-1] ** 2 + x[2:] * x[:-2], randn(9)),
    "batch": (lambda x: (x @ randn(4, 3, seed=5)).tanh(), randn(6, 4)),
    "constant": (lambda x: 3 * x.roll(2, 0) - x[:1] + 1, randn(4, 3)),
    "dense": (lambda x: x.cumsum(0) ** 2, randn(5)),
}
APPLIES = {
    "sparse": {"sparse"},
    "batch": {"sparse", "batch"},
    "constant": {"constant", "sparse"},
    "dense": set(),
}


@pytest.mark.parametrize("strategy", BY_NAME)
@pytest.mark.parametrize("name", SMALL)
def test_by_name(name: str, strategy: str):
    """What was asked for is taken, and exact; or it does not apply, and the error says why."""
    f, x = SMALL[name]
    if strategy not in {*APPLIES[name], "reverse", "forward", "loop"}:
        with pytest.raises(PlanError, match=rf"got '{strategy}' \({strategy}: .+\)"):
            pf.jacobian(f, x, plan=strategy)
        return
    J = pf.jacobian(f, x, plan=strategy)
    assert J.plan.strategy == strategy
    torch.testing.assert_close(J.dense().detach(), loop_jacobian(f, x), rtol=1e-10, atol=1e-12)


def test_a_split_by_name():
    net, x = hourglass(), randn(150)
    J = pf.jacobian(net, x, plan="split")
    assert J.plan.strategy == "split"
    torch.testing.assert_close(J.dense(), pf.jacobian(net, x, plan="loop").dense())


def test_constant_by_name_says_why_not():
    with pytest.raises(PlanError, match="the map is not affine"):
        pf.jacobian(torch.sin, randn(4), plan="constant")


QUADRATIC = {
    "products of neighbours": lambda x: (x[1:] * x[:-1]).sum(),
    "squares of differences": lambda x: ((x[1:] - x[:-1]) ** 2).sum(),
    "a form": lambda x: x @ torch.arange(36.0, dtype=x.dtype).reshape(6, 6) @ x,
}


@pytest.mark.parametrize("f", QUADRATIC.values(), ids=QUADRATIC)
def test_the_hessian_of_a_quadratic_form_takes_no_product(f: Callable[[Tensor], Tensor]):
    plan = pf.plan(f, randn(6), quantity="hessian")
    assert (plan.strategy, plan.passes) == ("constant", 0)
    x = randn(6, seed=5)
    wanted = torch.autograd.functional.hessian(f, x)
    torch.testing.assert_close(plan(x).matrix(), wanted)
    torch.testing.assert_close(plan(x) @ x, wanted @ x)


def test_split_by_name_in_a_small_map():
    """It would not be chosen, and gives factors all the same."""
    net = nn.Sequential(nn.Linear(40, 3), nn.Tanh(), nn.Linear(3, 40)).double()
    x = randn(40)
    J = pf.jacobian(net, x, plan="split")
    assert (J.plan.strategy, J.plan.passes) == ("split", 6)
    wanted = torch.autograd.functional.jacobian(net, x)
    torch.testing.assert_close(J.matrix().detach(), wanted)
    torch.testing.assert_close(J.svdvals()[:3].detach(), torch.linalg.svdvals(wanted)[:3])


class TestBudgetsOfPatterns:
    """Entries by a pattern keep to ``memory=`` as rows do: in a stream, or they are refused."""

    x = randn(64, 40)

    def net(self) -> nn.Module:
        net = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 30)).double()
        return net.requires_grad_(False)

    def test_norms_stream(self):
        net = self.net()
        tight = pf.jacobian(net, self.x, memory=300_000)
        assert tight.plan.strategy == "batch"
        assert tight.plan.compressed.room(1) > 300_000
        _, cost = measure(tight.fro_norm)
        assert cost.peak <= 300_000
        torch.testing.assert_close(tight.fro_norm(), pf.jacobian(net, self.x).fro_norm())

    def test_entries_that_do_not_fit_are_refused(self):
        tight = pf.jacobian(self.net(), self.x, memory=300_000)
        with pytest.raises(pf.errors.MemoryBudgetError, match="76800 entries, which take"):
            tight.sparse()

    def test_the_diagonal_by_a_plan_of_its_own(self):
        x = randn(60, 60)
        tight = pf.jacobian(lambda u: laplacian(u) + u**3, x, memory=300_000)
        torch.testing.assert_close(tight.diagonal(), (3 * x**2 - 4).reshape(-1))

    def test_colourings_that_do_not_stream_give_way(self):
        f = arrowhead
        x = randn(200)
        plan = pf.plan(f, x, memory=18_000)
        assert plan.strategy in ("reverse", "forward")
        assert "its entries take" in dict(plan.rejected)["sparse"]
