"""Plans used again where what they rely on has changed: at other points, later, for others."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian as reference

import pushforward as pf

RISING = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
FALLING = RISING.flip(0)


def sorted_squares(x: Tensor) -> Tensor:
    return x[x.argsort()] ** 2


def branching(x: Tensor) -> Tensor:
    return x.roll(1) ** 2 if x[0] > 2 else x**2


BY_THE_POINT = {"indices": sorted_squares, "branches": branching}


@pytest.mark.parametrize("f", BY_THE_POINT.values(), ids=BY_THE_POINT)
class TestGuardsHoldWhereGraphsAreWanted:
    def test_after_training(self, f):
        def step(x: Tensor) -> None:
            x = x.clone().requires_grad_()
            pf.jacobian(f, x).matrix().sum().backward()

        f = _own(f)
        for _ in range(3):
            step(RISING)
        x = FALLING.clone().requires_grad_()
        torch.testing.assert_close(pf.jacobian(f, x).matrix().detach(), reference(f, FALLING))

    def test_where_the_point_has_a_graph(self, f):
        f = _own(f)
        for _ in range(3):
            pf.jacobian(f, RISING).matrix()
        x = FALLING.clone().requires_grad_() * 1.0
        torch.testing.assert_close(pf.jacobian(f, x).matrix().detach(), reference(f, FALLING))

    def test_gradients_at_another_point(self, f):
        f = _own(f)
        plan = pf.plan(f, RISING)
        for _ in range(3):
            x = FALLING.clone().requires_grad_()
            (found,) = torch.autograd.grad(plan(x).matrix().square().sum(), x)
            y = FALLING.clone().requires_grad_()
            wanted = reference(f, y, create_graph=True).square().sum()
            torch.testing.assert_close(found, *torch.autograd.grad(wanted, y))


def _own(f):
    """A function of its own, for which nothing was planned."""
    return lambda x: f(x)


COUPLED_ELSEWHERE = {
    "sum": (lambda x: x + torch.relu(x - 100).sum(0), 1.0, 200.0),
    "mean under a mask": (
        lambda x: torch.where(x > 0, x.mean(0, keepdim=True) * x, x**2),
        -1.0,
        2.0,
    ),
    "attention over the batch": (lambda x: x + torch.relu(x @ x.T - 50) @ x, 1.0, 10.0),
}


@pytest.mark.parametrize("name", COUPLED_ELSEWHERE)
def test_samples_that_meet_at_other_points_alone(name: str):
    f, apart, together = COUPLED_ELSEWHERE[name]
    x = torch.full((4, 2), apart, dtype=torch.float64)
    for _ in range(2):
        pf.jacobian(f, x, batch_dim=0).matrix()
    y = torch.full((4, 2), together, dtype=torch.float64)
    for _ in range(6):
        with pytest.raises(pf.errors.CouplingError, match="influence each other"):
            pf.jacobian(f, y, batch_dim=0).matrix()


def test_samples_that_can_never_meet_are_not_checked_again():
    """What is structurally apart costs no pass at later uses."""
    net = nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(-1)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    assert "LogSoftmaxBackward0" in pf.plan(net, x, batch_dim=0).recipe.ops
    assert not pf.plan(net, x, batch_dim=0).may_couple


OTHERS = {
    "builtins": (torch.sin, torch.cos),
    "methods": (Tensor.sin, Tensor.cos),
    "functional": (nn.functional.silu, nn.functional.gelu),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_plan_for_another_function_of_torch(name: str):
    planned, other = OTHERS[name]
    plan = pf.plan(planned, RISING)
    for _ in range(3):
        found = pf.jacobian(other, RISING, plan=plan).matrix()
        torch.testing.assert_close(found, reference(other, RISING))


class Settings:
    slope = 1.0


class Spike(torch.autograd.Function):
    """A step whose backward reads what its forward does not."""

    slope = 1.0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient / (1 + Spike.slope * Settings.slope * x.abs()) ** 2


@pytest.mark.parametrize("owner", [Settings, Spike])
def test_what_a_custom_backward_reads_is_guarded(owner, monkeypatch):
    def f(x):
        return Spike.apply(x)

    for _ in range(2):
        pf.jacobian(f, RISING).diagonal()
    monkeypatch.setattr(owner, "slope", 10.0)
    for _ in range(3):
        found = pf.jacobian(f, RISING).diagonal()
        torch.testing.assert_close(found, (1 + 10 * RISING) ** -2)


@pytest.mark.parametrize("uses", [1, 2])
def test_nothing_is_asked_of_parameters_that_have_changed(uses: int):
    """After a step of an optimiser a Jacobian does not silently become that of the new weights."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    x = torch.randn(3, dtype=torch.float64)
    before = net(x).detach()
    for _ in range(uses):
        J = pf.jacobian(net, x)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    for ask in (lambda: J @ x, lambda: J.T @ x, J.matrix):
        with pytest.raises(pf.errors.DifferentiationError, match="that this Jacobian was taken at"):
            ask()
    if uses == 1:  # the evaluation by which the plan was made is there
        torch.testing.assert_close(J.value.detach(), before)
    else:
        with pytest.raises(pf.errors.DifferentiationError, match="that this Jacobian was taken at"):
            print(J.value)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].exp()


def test_what_can_be_differentiated_once_is_refused_a_second_time():
    """Under vmap torch forgets to refuse, and takes the factor for a constant."""

    def f(x):
        return Once.apply(x) * x

    torch.testing.assert_close(pf.jacobian(f, RISING).diagonal(), (1 + RISING) * RISING.exp())
    for _ in range(3):
        x = RISING.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="once_differentiable"):
            pf.jacobian(f, x).trace().backward()


def _sparse(layout: torch.layout) -> Tensor:
    return torch.eye(4, dtype=torch.float64).roll(1, 0).to_sparse(layout=layout)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_sparse_constants(layout: torch.layout, tmp_path):
    neighbours = _sparse(layout)

    def f(x):
        return neighbours @ x**2

    for _ in range(3):
        torch.testing.assert_close(pf.jacobian(f, RISING).matrix(), reference(f, RISING))
    pf.plan(f, RISING).save(tmp_path / "a.plan")
    loaded = pf.load_plan(tmp_path / "a.plan", f)
    torch.testing.assert_close(loaded(FALLING).matrix(), reference(f, FALLING))
    neighbours.mul_(2)
    torch.testing.assert_close(pf.jacobian(f, RISING).matrix(), reference(f, RISING))


class Dilated(nn.Module):
    """A branch whose gain is zero at first, so that nothing of it shows in the entries."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=dilation, dilation=dilation, bias=False)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() + self.gain * self.conv(x).tanh()


class Shifted(nn.Module):
    """The same with slices, which are views."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift, self.gain = shift, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :10].sin() + self.gain * x[..., self.shift : self.shift + 10] ** 2


@pytest.mark.parametrize("kind", [Dilated, Shifted])
def test_a_loaded_plan_knows_an_op_with_other_settings(kind, tmp_path):
    x = torch.randn(1, 1, 20, dtype=torch.float64)
    pf.plan(kind(1).double(), x).save(tmp_path / "a.plan")
    net = kind(2).double()
    plan = pf.load_plan(tmp_path / "a.plan", net)
    plan(x)
    net.gain.data.fill_(1.0)
    for _ in range(3):
        found = plan(x).matrix().detach()
        torch.testing.assert_close(found, reference(net, x).reshape(found.shape))


def test_numbers_too_small_for_the_dtype_are_no_coupling():
    """They do not scale exactly on the way back, and what is zero is zero all the same."""

    def f(x):
        return x * 1e30 * 1e-20 * 1e-22

    x = torch.randn(8, 3)
    J = pf.jacobian(f, x, batch_dim=0)
    torch.testing.assert_close(J.matrix(), 1e-12 * torch.eye(3).expand(8, 3, 3), rtol=1e-2, atol=0)
    with pytest.raises(pf.errors.CouplingError, match="influence each other"):
        pf.jacobian(lambda x: f(x) + f(x.flip(0)), x, batch_dim=0)
