"""Linear regions against codes read off by hand, and the paths on which they are counted."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pushforward as pf
from pushforward.sensitivity import great_circle, linear_regions, regions


def path(steps: int = 60, size: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randn(3, size, dtype=torch.float64, generator=generator)
    return great_circle(*corners.unbind(), steps=steps)


def changes(*codes: Tensor) -> Tensor:
    """(T - 1,) of codes (T, ...)."""
    joined = torch.cat([code.reshape(len(code), -1).int() for code in codes], 1)
    return (joined[1:] != joined[:-1]).sum(1)


def three(h: Tensor, low: float, high: float) -> Tensor:
    return (h > low).int() + (h >= high).int()


def dense_net(*units: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for unit in units for layer in (nn.Linear(5, 5), unit)]
    return nn.Sequential(*layers, nn.Linear(5, 3)).double()


# The path


def test_the_ellipse_passes_through_its_three_points():
    a, b, c = torch.randn(3, 2, 4, dtype=torch.float64).unbind()
    found = great_circle(a, b, c, 12)
    assert found.shape == (12, 2, 4)
    for place, point in ((0, a), (4, b), (8, c)):
        assert torch.equal(found[place], point)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_the_ellipse_is_mean_and_two_axes(steps):
    a, b, c = torch.randn(3, 6, dtype=torch.float64).unbind()
    mean = (a + b + c) / 3
    angles = [2 * math.pi * i / steps for i in range(steps)]
    expected = torch.stack(
        [mean + math.cos(t) * (a - mean) + math.sin(t) * (b - c) / math.sqrt(3) for t in angles]
    )
    torch.testing.assert_close(great_circle(a, b, c, steps), expected)


def test_equally_long_and_equally_far_points_lie_on_a_circle():
    found = great_circle(*torch.eye(3, dtype=torch.float64).unbind(), steps=25)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(25).double())


def test_the_ellipse_is_left_open_and_differentiable():
    corners = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    found = great_circle(*corners.unbind(), steps=30)
    gaps = (found.roll(-1, 0) - found).norm(dim=1)
    assert gaps[-1] > 0.1 * gaps.max()
    found[10].sum().backward()
    torch.testing.assert_close(corners.grad[:, 0], torch.tensor([0.0, 1.0, 0.0]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ellipse_in_other_dtypes(dtype):
    corners = torch.randn(3, 4).to(dtype)
    found = great_circle(*corners.unbind(), steps=6)
    assert found.dtype == dtype
    assert torch.equal(found[2], corners[1])


A = torch.zeros(3)
REFUSED_POINTS = {
    "shapes": ((A, torch.zeros(4), A, 5), "one shape"),
    "dtypes": ((A, A.double(), A, 5), "one dtype"),
    "integers": ((A.long(), A, A, 5), "floating-point points, got torch.int64"),
    "a list": (([1.0], A, A, 5), "got list"),
    "no steps": ((A, A, A, 0), "steps expects"),
    "half a step": ((A, A, A, 2.5), "steps expects"),
}


@pytest.mark.parametrize("case", REFUSED_POINTS)
def test_paths_that_are_refused(case):
    arguments, message = REFUSED_POINTS[case]
    with pytest.raises(pf.errors.InputError, match=message):
        great_circle(*arguments)


# Units as modules


def test_a_network_of_several_units():
    net = dense_net(nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.LeakyReLU(0.2))
    x = path(300) * 4
    found = linear_regions(net, x)
    h = [x]
    for layer in net:
        h.append(layer(h[-1]).detach())
    expected = changes(h[1] > 0, three(h[3], 0, 6), three(h[5], -1, 1), h[7] > 0)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)
    assert expected.sum() > 10


def test_three_pieces_are_told_apart():
    """A unit that jumps over its middle piece changes once, as one that enters it does."""
    x = torch.tensor([[-2.0], [0.0], [2.0], [-2.0], [-3.0]])
    assert linear_regions(nn.Hardtanh(), x).tolist() == [1, 1, 1, 0]
    assert linear_regions(nn.ReLU6(), 5 * x).tolist() == [0, 1, 1, 0]


def test_convolution_with_norm_and_pools():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Dropout(0.5), nn.Conv2d(3, 4, 1), nn.LeakyReLU(inplace=True), nn.AvgPool2d(3),
        nn.Flatten(), nn.Linear(4, 3), nn.LogSoftmax(1),
    ).double().eval()  # fmt: skip
    x = great_circle(*torch.randn(3, 1, 8, 8, dtype=torch.float64).unbind(), steps=40)
    before = net[1](net[0](x)).detach()
    pooled, places = F.max_pool2d(before.relu(), 2, return_indices=True)
    expected = changes(before > 0, net[5](pooled) > 0)
    assert torch.equal(linear_regions(net, x), expected)
    assert torch.equal(
        linear_regions(net, x, pooling=True), changes(before > 0, places, net[5](pooled) > 0)
    )


def test_residual_and_concatenated_branches():
    torch.manual_seed(0)
    first, second = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()

    def net(x: Tensor) -> Tensor:
        h = x + first(x).relu()
        return torch.cat((h, F.relu(second(h))), 1).split(5, 1)[1] - h[:, :5]

    x = path()
    h = x + first(x).relu()
    assert torch.equal(linear_regions(net, x), changes(first(x) > 0, second(h) > 0))


# Units as functions: each of these bends at 0, or at the places that are given


KINKS = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "in place": lambda x: F.relu(x, inplace=True),
    "method in place": lambda x: x.relu_(),
    "clamp": lambda x: x.clamp(min=0),
    "clamp of a tensor": lambda x: torch.clamp(x, min=torch.zeros(5).double()),
    "clip in place": lambda x: x.clip_(0),
    "clamp_min": lambda x: torch.clamp_min(x, 0),
    "clamp_max": lambda x: -torch.clamp_max(-x, 0),
    "threshold": lambda x: F.threshold(x, 0, 0),
    "maximum": lambda x: torch.maximum(x, torch.zeros(1).double()),
    "max of two": lambda x: torch.max(x, torch.zeros(1).double()),
    "minimum of both": lambda x: torch.minimum(x, 2 * x),
    "leaky": F.leaky_relu,
    "prelu": lambda x: F.prelu(x, torch.tensor([0.1]).double()),
    "rrelu": nn.RReLU().eval(),
    "abs": torch.abs,
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "mask": lambda x: x * (x > 0),
    "mask as numbers": lambda x: x * (x > 0).double(),
    "masked_fill": lambda x: x.masked_fill(x <= 0, 0.0),
    "steps alone": lambda x: (x > 0).double() * 3,
    "one condition, used twice": lambda x: (lambda on: x * on + (2 * x) * on)(x > 0),
    "written into": lambda x: torch.zeros(len(x), 5).double().copy_(x).relu_(),
    "transposed": lambda x: x.t().relu().t(),
    "rows mixed with the batch": lambda x: x.reshape(-1, 1).relu().reshape(-1, 5),
    "softmax at the end": lambda x: F.softmax(x.relu(), 1),
    "sigmoid at the end, viewed": lambda x: torch.sigmoid(x.relu()).view(-1, 1, 5).squeeze(1),
    "a tuple": lambda x: (x.relu(), {"x": x}),
    "half of it": lambda x: torch.cat((x[:, :2].relu(), x[:, 2:].relu()), 1),
}


@pytest.mark.parametrize("case", KINKS)
def test_however_a_unit_is_written(case):
    x = path()
    kept = x.clone()
    assert torch.equal(linear_regions(KINKS[case], x), changes(x > 0))
    assert torch.equal(x, kept)


PIECES = {
    "hardtanh": (lambda x: F.hardtanh(x, -0.3, 0.5), (-0.3, 0.5)),
    "hardtanh in place": (lambda x: F.hardtanh_(x, -0.3, 0.5), (-0.3, 0.5)),
    "clamp of both sides": (lambda x: x.clamp(-0.3, 0.5), (-0.3, 0.5)),
    "softshrink": (lambda x: F.softshrink(x, 0.4), (-0.4, 0.4)),
    "hardshrink": (lambda x: F.hardshrink(x, 0.4), (-0.4, 0.4)),
    "hardsigmoid": (lambda x: F.hardsigmoid(6 * x), (-0.5, 0.5)),
    "relu6": (lambda x: F.relu6(6 * x), (0, 1)),
}


@pytest.mark.parametrize("case", PIECES)
def test_units_of_three_pieces(case):
    f, (low, high) = PIECES[case]
    x = path()
    assert torch.equal(linear_regions(f, x), changes(three(x, low, high)))


AFFINE = {
    "linear": nn.Linear(5, 3).double(),
    "no op at all": lambda x: x,
    "movement": lambda x: torch.roll(x.flip(1), 1, 1)[:, [0, 2]].repeat(1, 2).cumsum(1),
    "a mask of the inputs that is not used": lambda x: (x * 2, x > 0)[0],
    "division by constants": lambda x: x / 3 - 1,
    "shapes alone": lambda x: torch.ones_like(x).exp(),
    "upsampling": lambda x: F.interpolate(x[:, None], scale_factor=2, mode="linear"),
    "batch norm": nn.BatchNorm1d(5).double().eval(),
    "parameters go through anything": lambda x: x * torch.ones(5).double().tanh(),
}


@pytest.mark.parametrize("case", AFFINE)
def test_affine_maps_have_one_region(case):
    assert not linear_regions(AFFINE[case], path()).any()


POOLS = {
    "amax": (lambda x: x.amax(1), lambda x: x.argmax(1)),
    "amin": (lambda x: x.amin((1,)), lambda x: x.argmin(1)),
    "max along": (lambda x: x.max(1)[0], lambda x: x.argmax(1)),
    "adaptive": (
        lambda x: F.adaptive_max_pool1d(x[:, None], 1),
        lambda x: x.argmax(1),
    ),
}


@pytest.mark.parametrize("case", POOLS)
def test_pools_count_where_that_is_wanted(case):
    pool, winner = POOLS[case]
    x = path()
    assert not linear_regions(pool, x).any()
    assert torch.equal(linear_regions(pool, x, pooling=True), changes(winner(x)))


def test_a_pool_over_everything_goes_point_by_point():
    x = path()
    found = linear_regions(lambda x: x.max(), x, pooling=True)
    assert torch.equal(found, changes(x.argmax(1)))


def test_a_unit_that_the_input_does_not_reach_counts_nothing():
    assert not linear_regions(lambda x: x + torch.arange(5.0).double().sub(2).relu(), path()).any()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripted_modules():
    x = path()
    assert torch.equal(linear_regions(torch.jit.script(nn.ReLU()), x), changes(x > 0))


# What is refused


SMOOTH = {
    "tanh": nn.Tanh(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "softplus": nn.Softplus(),
    "elu": nn.ELU(),
    "celu": nn.CELU(),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "layer_norm": nn.LayerNorm(5),
    "sigmoid that is not the last": nn.Sigmoid(),
    "softmax that is not the last": nn.Softmax(1),
    "log_sigmoid that is not the last": nn.LogSigmoid(),
    "div": nn.Softsign(),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_units_are_refused_by_name(name):
    unit = SMOOTH[name]
    kind = type(unit).__name__
    place = "Linear '2'" if "last" in name else f"{kind} '1'"
    with pytest.raises(pf.errors.InputError, match=rf"got {name}.*\(in {place}\)"):
        linear_regions(dense_net(unit), path())


REFUSED = {
    "functions": (torch.tanh, pf.errors.InputError, "got tanh;"),
    "squares": (lambda x: x * x, pf.errors.InputError, "got mul"),
    "powers": (lambda x: x**2, pf.errors.InputError, "got pow"),
    "products of both": (lambda x: x @ x.T, pf.errors.InputError, "got mm"),
    "division by the input": (lambda x: 1 / x, pf.errors.InputError, "got reciprocal"),
    "attention": (
        lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
        pf.PushforwardError,
        "linear_regions expects",
    ),
    "unknown": (lambda x: x.sort(1)[0], pf.errors.NotAvailableError, "got sort"),
    "whole numbers": (lambda x: x.to(torch.int64), pf.errors.NotAvailableError, "to_copy"),
    "branches": (
        lambda x: x if x.sum() > 0 else -x,
        pf.errors.NotAvailableError,
        "branches on values",
    ),
    "dropout": (lambda x: F.dropout(x), pf.errors.InputError, r"no random numbers.*\.eval\(\)"),
    "random slopes": (nn.RReLU(), pf.errors.InputError, "rrelu_with_noise"),
    "batch norm": (
        nn.BatchNorm1d(5).double(),
        pf.errors.CouplingError,
        r"batch_norm in training mode.*\.eval\(\)",
    ),
    "points that meet": (
        lambda x: (x - x.mean(0)).relu(),
        pf.errors.CouplingError,
        "do not influence each other",
    ),
    "points that look back": (
        lambda x: x.cumsum(0).relu(),
        pf.errors.CouplingError,
        "do not influence each other",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    model, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        linear_regions(model, path())


ARGUMENTS = {
    "no model": ((3, torch.zeros(4, 2)), {}, "got int"),
    "a list": ((nn.ReLU(), [1.0, 2.0]), {}, "got list"),
    "integers": ((nn.ReLU(), torch.zeros(4, 2).long()), {}, "got torch.int64"),
    "no points": ((nn.ReLU(), torch.zeros(0, 2)), {}, "one point or more"),
    "a number": ((nn.ReLU(), torch.tensor(1.0)), {}, "one point or more"),
    "too little memory": ((nn.ReLU(), torch.zeros(4, 2)), {"memory": 10}, "room for two points"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_are_refused(case):
    arguments, named, message = ARGUMENTS[case]
    with pytest.raises(pf.PushforwardError, match=message):
        linear_regions(*arguments, **named)


# Parts, traces


def test_parts_meet_without_a_gap(monkeypatch):
    net, x = dense_net(nn.ReLU(), nn.ReLU()), path(100)
    whole = linear_regions(net, x)
    sizes = []

    def watched(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return net(x)

    assert torch.equal(linear_regions(watched, x, memory=4 * 8 * 15 * 11), whole)
    assert max(sizes) == 11
    monkeypatch.setattr(regions, "POINTS", 1)
    assert torch.equal(linear_regions(net, x), whole)
    assert whole.sum() > 0


def test_point_by_point_where_the_batch_is_not_first():
    net, x = dense_net(nn.ReLU(), nn.ReLU6()), path(30)
    sizes = []

    def turned(x: Tensor) -> Tensor:
        sizes.append(len(x))
        h = net[2](net[0](x).t().relu().t())
        return net[3:](h)

    assert torch.equal(linear_regions(turned, x), linear_regions(net, x))
    assert max(sizes) == 2


def test_units_that_come_and_go_are_refused():
    def turns(x: Tensor) -> Tensor:
        return x.t().relu().t() if len(calls) < 7 else x.t().relu().relu().t()

    calls: list[int] = []

    def model(x: Tensor) -> Tensor:
        calls.append(1)
        return turns(x)

    with pytest.raises(pf.errors.InputError, match="same units at every point"):
        linear_regions(model, path())


def test_one_point_has_no_steps():
    assert linear_regions(dense_net(nn.ReLU()), path(1)).shape == (0,)


def test_nothing_stays_behind():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU()).double().eval()
    x = path().requires_grad_()
    hooks = [len(module._forward_hooks) for module in net.modules()]
    state = torch.get_rng_state()
    found = linear_regions(net, x)
    with torch.inference_mode():
        assert torch.equal(linear_regions(net, x), found)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(module._forward_hooks) for module in net.modules()] == hooks
    assert x.grad is None
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_a_bar_that_is_asked_for(capsys):
    linear_regions(nn.ReLU(), path(), progress=True)
    assert "Linear regions" in capsys.readouterr().err
