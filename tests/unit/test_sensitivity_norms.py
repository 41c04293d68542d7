"""Jacobian norms, margins and effective dimensions against loops of plain autograd in float64."""

import io
import math

import pytest
import torch
from torch import Tensor, nn

import pushforward as pf
from pushforward.sensitivity import bar, batches, margin, norms
from pushforward.sensitivity.norms import softmax_jacobian

sensitivity = pf.sensitivity


def network(seed: int = 0, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 4)).double()
    with torch.no_grad():
        net[2].weight.mul_(scale)
    return net


def batch(count: int = 7, seed: int = 1) -> Tensor:
    return torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(f, x: Tensor) -> Tensor:
    """(B, m, n): row by row, sample by sample."""
    samples = []
    for sample in x.detach():
        point = sample.clone().requires_grad_()
        outputs = f(point[None])[0].reshape(-1)
        rows = [torch.autograd.grad(out, point, retain_graph=True)[0] for out in outputs]
        samples.append(torch.stack(rows).reshape(len(rows), -1))
    return torch.stack(samples).detach()


def slope(value, parameter: Tensor, step: float = 1e-6) -> float:
    """The derivative of ``value()`` with respect to the first entry, by central differences."""
    entry = parameter.data.reshape(-1)[0]
    start, ends = entry.item(), []
    for shift in (step, -step):
        entry.fill_(start + shift)
        ends.append(value().item())
    entry.fill_(start)
    return (ends[0] - ends[1]) / (2 * step)


# Norms


def test_of_probabilities():
    net, x = network(), batch()
    expected = dense(lambda x: net(x).softmax(1), x).norm(dim=(1, 2))
    torch.testing.assert_close(
        sensitivity.jacobian_norm(net, x).detach(), expected, rtol=1e-12, atol=0
    )


def test_of_logits():
    net, x = network(), batch()
    found = sensitivity.jacobian_norm(net, x, of="logits")
    torch.testing.assert_close(found.detach(), dense(net, x).norm(dim=(1, 2)), rtol=1e-12, atol=0)
    assert found.shape == (7,)


def test_of_images_and_of_positions():
    torch.manual_seed(0)
    net = nn.Conv2d(2, 3, 2).double()
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    expected = dense(lambda x: net(x).softmax(1), x).norm(dim=(1, 2))
    torch.testing.assert_close(sensitivity.jacobian_norm(net, x).detach(), expected)


def test_of_any_output_as_it_is():
    net, x = network(), batch()
    found = sensitivity.jacobian_norm(lambda x: {"a": net(x), "b": 2 * x}, x, of="logits")
    expected = (dense(net, x).square().sum((1, 2)) + 4 * 5).sqrt()
    torch.testing.assert_close(found.detach(), expected)


@pytest.mark.parametrize("of", ["probabilities", "logits"])
def test_first_derivatives(of):
    net, x = network(), batch().requires_grad_()

    def total() -> Tensor:
        return sensitivity.jacobian_norm(net, x, of=of).sum()

    total().backward()
    for parameter in (net[0].weight, net[2].weight):
        assert parameter.grad.reshape(-1)[0].item() == pytest.approx(
            slope(total, parameter), rel=1e-6, abs=1e-8
        )
    if of == "probabilities":
        assert x.grad.reshape(-1)[0].item() == pytest.approx(slope(total, x), rel=1e-6, abs=1e-8)


def test_derivatives_to_1e_8():
    """Against the same quantity by double backward of plain torch."""
    net, x = network(), batch()
    found = torch.autograd.grad(sensitivity.jacobian_norm(net, x).sum(), net[0].weight)[0]
    point = x.clone().requires_grad_()
    outputs = net(point).softmax(1)
    rows = [torch.autograd.grad(o.sum(), point, create_graph=True)[0] for o in outputs.T]
    norm = torch.stack(rows, 1).square().sum((1, 2)).sqrt().sum()
    expected = torch.autograd.grad(norm, net[0].weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_softmax_that_is_saturated_keeps_its_digits():
    """z = (t, 0, 0), q = exp(-t): ||J|| = q sqrt(6), though 1 - p = 2 q is lost in rounding."""
    scale = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]])
    x = torch.tensor([[40.0, 0, 0], [80.0, 0, 0]])
    found = sensitivity.jacobian_norm(lambda x: x @ scale, x).double()
    # d p_1 / d t = 2 q, d p_2 / d t = d p_3 / d t = -q.
    torch.testing.assert_close(
        found / torch.exp(-x[:, 0].double()), torch.full((2,), 6**0.5).double(), rtol=1e-6, atol=0
    )


def softmax_rows(logits: Tensor) -> Tensor:
    """(B, R, C, C): the Jacobian of softmax as it is put together."""
    scales, directions = softmax_jacobian(logits)
    return scales.unsqueeze(-1) * directions


def test_the_jacobian_of_softmax():
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, -1e3, 2.0], [5.0, 5.0, 5.0]]).double()
    p = logits.softmax(1)
    expected = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    torch.testing.assert_close(softmax_rows(logits.unsqueeze(2)).squeeze(1), expected)


def test_the_derivatives_of_the_jacobian_of_softmax():
    logits = torch.randn(2, 4, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(softmax_rows, logits)
    assert torch.autograd.gradgradcheck(softmax_rows, logits)


def test_gradients_below_the_smallest_normal_number():
    """A norm of 1e-42 in float32, where no sum of the backward pass is exact."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 4))
    x = torch.randn(50, 5) * 200
    found = sensitivity.jacobian_norm(net, x)
    expected = sensitivity.jacobian_norm(net.double(), x.double())
    tiny = expected < 1e-38
    assert 0 < tiny.sum() < 50
    torch.testing.assert_close(found[~tiny].double(), expected[~tiny], rtol=1e-2, atol=0)


def test_a_class_that_is_ruled_out():
    def masked(x: Tensor) -> Tensor:
        return torch.cat((x, torch.full_like(x[:, :1], -math.inf)), 1)

    x = batch()[:, :3]
    torch.testing.assert_close(
        sensitivity.jacobian_norm(masked, x), dense(lambda x: x.softmax(1), x).norm(dim=(1, 2))
    )


def test_zero_jacobians_have_zero_derivatives():
    x = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    norm = sensitivity.jacobian_norm(lambda x: x**2, x, of="logits")
    norm.sum().backward()
    assert not norm.any()
    assert not x.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_dtype_of_the_input(dtype):
    net, x = network(), batch()
    expected = sensitivity.jacobian_norm(net, x).detach()
    found = sensitivity.jacobian_norm(network().to(dtype), x.to(dtype)).detach()
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(),
        expected,
        rtol=3e-2 if dtype != torch.float32 else 1e-5,
        atol=1e-2 if dtype != torch.float32 else 0,
    )


@pytest.mark.parametrize("of", ["probabilities", "logits"])
def test_parts_agree_with_the_whole(of, monkeypatch):
    net, x = network(), batch(20)
    whole = sensitivity.jacobian_norm(net, x, of=of).detach()
    monkeypatch.setattr(batches, "SAMPLES", 7)
    torch.testing.assert_close(sensitivity.jacobian_norm(net, x, of=of).detach(), whole)


def test_a_budget_takes_fewer_samples_at_once():
    net, x = network(), batch(40)
    sizes = []

    def watched(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return net(x)

    with torch.no_grad():
        whole = sensitivity.jacobian_norm(net, x)
        found = sensitivity.jacobian_norm(watched, x, of="probabilities", memory=8_000)
        torch.testing.assert_close(found, whole)
        assert min(sizes) < 40
        with pytest.raises(pf.errors.MemoryBudgetError):
            sensitivity.jacobian_norm(net, x, memory=10)


@pytest.mark.parametrize("memory", [60_000, 150_000])
def test_rows_in_strips_where_not_even_one_sample_fits_whole(memory, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(900, 6), nn.ReLU(), nn.Linear(6, 8)).double()
    x = torch.randn(3, 900, dtype=torch.float64)
    monkeypatch.setattr(norms, "_of_probabilities", None)  # what takes them whole
    found = sensitivity.jacobian_norm(net, x, memory=memory)
    expected = dense(lambda x: net(x).softmax(1), x).norm(dim=(1, 2))
    torch.testing.assert_close(found.detach(), expected)
    (slopes,) = torch.autograd.grad(found.sum(), net[0].bias)
    monkeypatch.undo()
    (wanted,) = torch.autograd.grad(sensitivity.jacobian_norm(net, x).sum(), net[0].bias)
    torch.testing.assert_close(slopes, wanted, rtol=1e-8, atol=1e-12)


def test_a_budget_too_small_for_the_classes():
    weight = torch.randn(5, 60, dtype=torch.float64)
    with torch.no_grad():
        whole = sensitivity.jacobian_norm(lambda x: x @ weight, batch(3))
        found = sensitivity.jacobian_norm(lambda x: x @ weight, batch(3), memory=200_000)
        torch.testing.assert_close(found, whole)
        with pytest.raises(pf.errors.MemoryBudgetError, match="softmax over 60 classes"):
            sensitivity.jacobian_norm(lambda x: x @ weight, batch(3), memory=9_000)


@pytest.mark.parametrize("of", ["probabilities", "logits"])
def test_derivatives_under_a_budget(of):
    net, x = network(), batch(40)
    wanted = net[0].weight
    whole = torch.autograd.grad(sensitivity.jacobian_norm(net, x, of).sum(), wanted)
    parts = torch.autograd.grad(sensitivity.jacobian_norm(net, x, of, memory=16_000).sum(), wanted)
    torch.testing.assert_close(parts, whole, rtol=1e-8, atol=1e-12)


def test_no_samples():
    net = network()
    assert sensitivity.jacobian_norm(net, batch(0)).shape == (0,)
    assert margin(net, batch(0)).radius.shape == (0,)
    assert sensitivity.effective_dimension(net, batch(0)).rank.shape == (0,)


def test_nothing_stays_behind():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    model.eval()
    x = batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    sensitivity.jacobian_norm(model, x)
    margin(model, x)
    sensitivity.effective_dimension(model, x)
    sensitivity.linear_regions(model, x)
    sensitivity.decision_map(model, *x[:3], resolution=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_samples_that_meet_are_refused():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double()
    with pytest.raises(pf.errors.CouplingError, match="eval"):
        sensitivity.jacobian_norm(model, batch())


REFUSED = {
    "of": (lambda: sensitivity.jacobian_norm(network(), batch(), of="loss"), "of expects"),
    "no model": (lambda: sensitivity.jacobian_norm(3, batch()), "a model or function, got int"),
    "integers": (
        lambda: sensitivity.jacobian_norm(network(), torch.ones(2, 5, dtype=torch.int64)),
        "floating-point tensor",
    ),
    "a list": (lambda: sensitivity.jacobian_norm(network(), [1.0]), "got list"),
    "no batch": (lambda: sensitivity.jacobian_norm(network(), torch.tensor(1.0)), "x\\[None\\]"),
    "no entries": (lambda: sensitivity.jacobian_norm(network(), torch.ones(2, 0)), "have entries"),
    "one class": (
        lambda: sensitivity.jacobian_norm(lambda x: x[:, :1], batch()),
        "at least two classes",
    ),
    "a tree": (
        lambda: sensitivity.jacobian_norm(lambda x: {"z": x, "h": x}, batch()),
        "got dict of 2 tensors",
    ),
    "complex logits": (
        lambda: sensitivity.jacobian_norm(lambda x: torch.complex(x, x), batch()),
        "got torch.complex128",
    ),
    "labels with decimals": (lambda: margin(network(), batch(), torch.ones(7)), "integer tensor"),
    "labels in a list": (lambda: margin(network(), batch(), [1]), "got list"),
    "too few labels": (
        lambda: margin(network(), batch(), torch.ones(3, dtype=torch.int64)),
        "one class for each sample",
    ),
    "labels out of range": (
        lambda: margin(network(), batch(), torch.full((7,), 4)),
        "classes from 0 to 3, got 4 to 4",
    ),
    "another norm": (lambda: margin(network(), batch(), ord=3), "ord expects"),
    "positions": (
        lambda: margin(lambda x: x.reshape(-1, 5, 1), batch()),
        "one decision per sample",
    ),
    "rtol": (
        lambda: sensitivity.effective_dimension(network(), batch(), rtol=-1.0),
        "rtol expects",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(pf.PushforwardError, match=message):
        call()


def test_never_nan_in_silence():
    x = torch.zeros(2, 3).double()
    for call in (sensitivity.jacobian_norm, margin, sensitivity.effective_dimension):
        with pytest.raises(pf.PushforwardError):
            call(lambda x: x.sqrt(), x)


# Margins


def test_margins_against_gradients_of_differences():
    net, x = network(), batch()
    found, logits, J = margin(net, x), net(x).detach(), dense(net, x)
    for i in range(len(x)):
        own = int(logits[i].argmax())
        rivals = [j for j in range(4) if j != own]
        gaps = {j: (logits[i, own] - logits[i, j]).item() for j in rivals}
        reach = {j: gaps[j] / (J[i, own] - J[i, j]).norm().item() for j in rivals}
        assert found.prediction[i] == own
        assert found.margin[i].item() == pytest.approx(min(gaps.values()), rel=1e-12)
        assert found.radius[i].item() == pytest.approx(min(reach.values()), rel=1e-12)
        assert found.rival[i] == min(reach, key=reach.get)


@pytest.mark.parametrize(("ord", "dual"), [(1, math.inf), (2, 2), (math.inf, 1)])
def test_the_radius_is_where_a_linear_map_ties(ord, dual):
    """The shortest step in each norm leads exactly onto the border of a linear classifier."""
    weight = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = batch(6)
    found = margin(lambda x: x @ weight, x, ord=ord)
    for i in range(6):
        gradient = weight[:, found.prediction[i]] - weight[:, found.rival[i]]
        gap = (x[i] @ gradient).item()
        assert found.radius[i].item() == pytest.approx(gap / gradient.norm(p=dual).item())
        others = [
            (x[i] @ (weight[:, found.prediction[i]] - weight[:, j])).item()
            / (weight[:, found.prediction[i]] - weight[:, j]).norm(p=dual).item()
            for j in range(3)
            if j != found.prediction[i]
        ]
        assert found.radius[i].item() == pytest.approx(min(others))


def test_labels_make_wrong_decisions_negative():
    net, x = network(), batch()
    plain = margin(net, x)
    labels = plain.prediction.clone()
    labels[0] = (labels[0] + 1) % 4
    found = margin(net, x, labels)
    logits = net(x).detach()
    assert found.margin[0].item() == pytest.approx((logits[0, labels[0]] - logits[0].max()).item())
    assert found.radius[0] < 0
    assert torch.equal(found.prediction, plain.prediction)
    torch.testing.assert_close(found.radius[1:], plain.radius[1:])


def test_ties_and_rivals_that_never_come_nearer():
    def three(x: Tensor) -> Tensor:
        return torch.stack((x[:, 0], x[:, 0] - 1, x[:, 0] - 2), 1)

    x = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    found = margin(three, x)
    assert found.margin.tolist() == [1, 1]
    assert found.radius.tolist() == [math.inf, math.inf]
    tie = margin(lambda x: torch.cat((x, x), 1), torch.ones(1, 1).double())
    assert tie.radius.item() == 0
    wrong = margin(three, x, torch.tensor([2, 2]))
    assert wrong.radius.tolist() == [-math.inf, -math.inf]


def test_derivatives_of_margins():
    net, x = network(), batch()

    def total() -> Tensor:
        found = margin(net, x)
        return (found.margin + found.radius).sum()

    total().backward()
    for parameter in (net[0].weight, net[2].weight):
        found = parameter.grad.reshape(-1)[0].item()
        assert found == pytest.approx(slope(total, parameter), rel=1e-6, abs=1e-8)


def test_infinite_radii_have_finite_derivatives():
    weight = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    offset = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    found = margin(lambda x: x @ weight + offset, batch())
    (found.margin.sum() + found.radius.masked_fill(found.radius.isinf(), 0).sum()).backward()
    assert weight.grad.isfinite().all()
    assert offset.grad.isfinite().all()


def test_margins_in_parts(monkeypatch):
    net, x = network(), batch(20)
    labels = torch.arange(20) % 4
    whole = margin(net, x, labels)
    monkeypatch.setattr(batches, "SAMPLES", 3)
    parts = margin(net, x, labels)
    torch.testing.assert_close(parts.radius, whole.radius)
    assert torch.equal(parts.rival, whole.rival)


# Effective dimension


def stretched(*values: float):
    factors = torch.tensor(values, dtype=torch.float64)
    return lambda x: x * factors


@pytest.mark.parametrize(
    ("values", "participation", "entropy", "rank"),
    [
        ((2.0, 2.0, 2.0, 0.0, 0.0), 3, 3, 3),
        ((1e-9, 1.0, 0.0, 0.0, 0.0), 1, 1, 1),
        ((0.0,) * 5, 0, 0, 0),
        ((1e-200, 1e-200, 0.0, 0.0, 0.0), 2, 2, 2),
    ],
)
def test_dimensions_of_diagonal_maps(values, participation, entropy, rank):
    found = sensitivity.effective_dimension(stretched(*values), batch(2))
    torch.testing.assert_close(
        found.participation, torch.full((2,), participation).double(), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        found.entropy, torch.full((2,), entropy).double(), rtol=1e-6, atol=1e-6
    )
    assert found.rank.tolist() == [rank, rank]
    torch.testing.assert_close(
        found.svdvals[0], torch.tensor(sorted(values, reverse=True)).double()
    )


@pytest.mark.parametrize("of", ["logits", "probabilities"])
def test_dimensions_against_their_definitions(of):
    net, x = network(), batch()
    found = sensitivity.effective_dimension(net, x, of, rtol=0.2)
    J = dense(net if of == "logits" else (lambda x: net(x).softmax(1)), x)
    values = torch.linalg.svdvals(J)
    squares, shares = values**2, values / values.sum(1, keepdim=True)
    torch.testing.assert_close(found.svdvals.detach(), values)
    torch.testing.assert_close(
        found.participation.detach(), squares.sum(1) ** 2 / (squares**2).sum(1)
    )
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum(1)
    torch.testing.assert_close(found.entropy.detach(), entropy.exp())
    assert torch.equal(found.rank, (values > 0.2 * values[:, :1]).sum(1))


def test_derivatives_of_dimensions():
    net, x = network(), batch()

    def total() -> Tensor:
        found = sensitivity.effective_dimension(net, x)
        return (found.participation + found.entropy).sum()

    total().backward()
    parameter = net[2].weight
    assert parameter.grad.reshape(-1)[0].item() == pytest.approx(
        slope(total, parameter), rel=1e-6, abs=1e-8
    )


# The bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_that_is_asked_for(capsys):
    sensitivity.jacobian_norm(network(), batch(), progress=True)
    captured = capsys.readouterr()
    assert "100 %" in captured.err
    assert captured.err.endswith("\n")
    assert captured.out == ""


@pytest.mark.parametrize("progress", [None, False])
def test_no_bar_where_nobody_watches(capsys, progress):
    sensitivity.jacobian_norm(network(), batch(), progress=progress)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_appears_once_the_work_is_long(monkeypatch):
    seconds = iter(range(100))
    monkeypatch.setattr(bar.sys, "stderr", Terminal())
    monkeypatch.setattr(bar.time, "monotonic", lambda: next(seconds) / 2)
    with bar.progress_bar("Work", None) as advance:
        advance(1, 10)
        assert bar.sys.stderr.getvalue() == ""
        advance(2, 10)
        assert "20 %" in bar.sys.stderr.getvalue()
        advance(10, 10)
    assert bar.sys.stderr.getvalue().count("\r") == 2
    with bar.progress_bar("Work", False) as advance:
        advance(10, 10)
    assert bar.sys.stderr.getvalue().count("\r") == 2
