"""`noise_response` against closed forms, and the coverage of its interval."""

import math

import pytest
import torch
from torch import Tensor, nn

from pushforward import noise
from pushforward.derivatives import jacobian
from pushforward.errors import CouplingError, InputError, ShapeError
from pushforward.noise import noise_response

POINT = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def square(x: Tensor) -> Tensor:
    return x**2


def square_ratio(point: Tensor, sigma: float) -> Tensor:
    """E|2 x e + e^2|^2 / (n sigma^2) = mean(4 x^2) + 3 sigma^2."""
    return (4 * point**2).mean(-1) + 3 * sigma**2


def covered(response, truth) -> bool:
    low, high = response.ratio.interval
    return bool((low <= truth) & (truth <= high))


# Values


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 1.0])
def test_a_closed_form(sigma):
    response = noise_response(square, POINT, sigma, samples=2000, seed=0)
    truth = square_ratio(POINT, sigma)
    assert (response.ratio.value - truth).abs() < 4 * response.ratio.stderr
    torch.testing.assert_close(response.linear, (4 * POINT**2).mean())
    torch.testing.assert_close(response.curvature, response.ratio.value / response.linear - 1)
    assert response.ratio.converged
    assert response.ratio.unbiased


def test_the_dimension_is_not_lost():
    """E|J e|^2 / E|e|^2 = ||J||_F^2 / n."""
    weight = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    response = noise_response(lambda x: weight @ x, POINT, 0.3, seed=0)
    expected = weight.square().sum() / 3
    torch.testing.assert_close(response.linear, expected)
    torch.testing.assert_close(response.ratio.value, expected)
    assert response.ratio.stderr < 1e-12
    assert response.curvature.abs() < 1e-12
    assert covered(response, expected)


@pytest.mark.parametrize("sigma", [1e-4, 1e-3, 1e-2])
def test_curvature_is_sharp_at_small_sigma(sigma):
    """Without the control variate the spread would be of order 1, not sigma^2."""
    response = noise_response(square, POINT, sigma, samples=1000, seed=1)
    expected = 3 * sigma**2 / 7
    assert abs(response.curvature.item() / expected - 1) < 0.2
    assert response.ratio.stderr < 0.1 * 3 * sigma**2


def test_one_dimension_and_a_scalar_point():
    point = torch.tensor(0.5, dtype=torch.float64)
    response = noise_response(square, point, 0.5, samples=4000, seed=0)
    assert response.ratio.value.shape == ()
    assert covered(response, square_ratio(point[None], 0.5))


@pytest.mark.parametrize(
    ("f", "truth"),
    [
        (torch.exp, lambda s: (math.exp(2 * s * s) - 2 * math.exp(s * s / 2) + 1) / s**2),
        (torch.sin, lambda s: (1 - math.exp(-2 * s * s)) / 2 / s**2),
    ],
)
@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_other_closed_forms_at_zero(f, truth, sigma):
    response = noise_response(f, torch.zeros(1).double(), sigma, samples=4000, seed=2)
    assert (response.ratio.value - truth(sigma)).abs() < 4 * response.ratio.stderr


def test_trees_and_complex_outputs_count_whole():
    def tree(x):
        return {"a": (x**2, 3), "b": torch.complex(x, 2 * x)}

    response = noise_response(tree, POINT, 0.2, samples=1000, seed=0)
    torch.testing.assert_close(response.linear, (4 * POINT**2).mean() + 5)
    truth = square_ratio(POINT, 0.2) + 5
    assert (response.ratio.value - truth).abs() < 4 * response.ratio.stderr


def test_per_sample():
    batch = torch.stack([POINT, 2 * POINT, torch.zeros(3).double()])
    response = noise_response(square, batch, 0.5, samples=4000, batch_dim=0, seed=0)
    truth = square_ratio(batch, 0.5)
    assert response.ratio.value.shape == (3,)
    assert ((response.ratio.value - truth).abs() < 4 * response.ratio.stderr).all()
    torch.testing.assert_close(response.linear, (4 * batch**2).mean(-1))
    assert response.curvature[2] == torch.inf


def test_numbers_in_numbers_out():
    batch = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    response = noise_response(square, batch, 0.1, samples=1000, batch_dim=0, seed=0)
    truth = 4 * batch**2 + 3 * 0.1**2
    assert ((response.ratio.value - truth).abs() < 4 * response.ratio.stderr).all()


# Zero Jacobians


def test_curvature_without_a_linear_part_is_never_nan():
    flat = noise_response(lambda x: torch.ones(2) * 3 + 0 * x.sum(), POINT, 0.1, seed=0)
    assert flat.linear == 0
    assert flat.ratio.value == 0
    assert flat.curvature == 0
    bent = noise_response(square, torch.zeros(3).double(), 0.1, seed=0)
    assert bent.curvature == torch.inf


# Coverage: each sample of a batch has noise of its own, so that a batch of copies is as many runs


def coverage(f, point, sigma, samples, truth, runs=2000) -> float:
    copies = point.expand(runs, *point.shape)
    low, high = noise_response(f, copies, sigma, samples, batch_dim=0, seed=0).ratio.interval
    return ((low <= truth) & (truth <= high)).double().mean().item()


@pytest.mark.parametrize("samples", [64, 128, 256])
def test_the_interval_covers_the_truth(samples):
    found = coverage(square, POINT, 0.5, samples, square_ratio(POINT, 0.5))
    assert 0.93 <= found <= 0.97


def test_copies_in_a_batch_are_like_seeds():
    runs = (noise_response(square, POINT, 0.5, 64, seed=seed) for seed in range(100))
    assert sum(covered(run, square_ratio(POINT, 0.5)) for run in runs) >= 88


@pytest.mark.parametrize("samples", [64, 256])
@pytest.mark.parametrize(
    ("f", "sigma", "truth"),
    [
        (square, 0.5, square_ratio(POINT[:1], 0.5)),
        (torch.exp, 0.5, None),
        (lambda x: torch.sin(3 * x), 0.5, None),
        (torch.relu, 1.0, None),
    ],
)
def test_the_interval_covers_the_truth_in_one_dimension(f, sigma, truth, samples):
    point = POINT[:1]
    if truth is None:
        nodes = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
        weights = torch.exp(-(nodes**2) / 2) / torch.exp(-(nodes**2) / 2).sum()
        changes = f(point + sigma * nodes) - f(point)
        truth = (weights * changes**2).sum() / sigma**2
    assert 0.925 <= coverage(f, point, sigma, samples, truth) <= 0.985


def test_the_ratio_is_unbiased():
    sigma, runs = 0.7, 20_000
    copies = POINT.expand(runs, 3)
    values = noise_response(square, copies, sigma, 16, batch_dim=0, seed=0).ratio.value
    error = (values.mean() - square_ratio(POINT, sigma)).abs()
    assert error < 4 * values.std() / math.sqrt(runs)


def test_too_few_draws_promise_nothing():
    assert not noise_response(square, POINT, 0.1, samples=62, seed=0).ratio.converged
    assert noise_response(square, POINT, 0.1, samples=64, seed=0).ratio.converged
    few = noise_response(square, POINT, 0.1, samples=4, seed=0)
    assert (few.ratio.value - square_ratio(POINT, 0.1)).abs() < 1


def test_rounding_is_part_of_the_interval():
    """float32 at a sigma where f(x+e) - f(x) is mostly rounding."""
    point = torch.tensor([1000.0])
    response = noise_response(lambda x: x + 1e4, point, 1e-3, seed=0)
    assert not response.ratio.converged
    fine = noise_response(lambda x: x + 1e4, point, 10.0, seed=0)
    assert fine.ratio.converged
    assert covered(fine, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_short_dtypes(dtype):
    response = noise_response(lambda x: 2 * x, torch.ones(4, dtype=dtype), 0.5, seed=0)
    assert response.ratio.value.dtype == torch.float64
    assert response.ratio.value == pytest.approx(4, rel=0.05)
    assert covered(response, 4.0)


# Stacks, chunks, randomness


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def calls_of(f):
    sizes = []

    def counted(x):
        sizes.append(len(x))
        return f(x)

    return counted, sizes


def test_draws_go_through_in_stacks_and_agree_with_single_ones():
    batch = torch.randn(4, 3, dtype=torch.float64)
    counted, sizes = calls_of(network())
    stacked = noise_response(counted, batch, 0.3, samples=64, batch_dim=0, seed=5)
    assert max(sizes) == 4 * 64
    assert len(sizes) < 12
    fixed, sizes = calls_of(lambda x: network()(x) if len(x) == 4 else 1 / 0)
    single = noise_response(fixed, batch, 0.3, samples=64, batch_dim=0, seed=5)
    assert sizes.count(4) > 64
    torch.testing.assert_close(stacked.ratio.value, single.ratio.value)


def test_a_map_that_depends_on_the_size_of_the_batch_goes_draw_by_draw():
    batch = torch.randn(4, 3, dtype=torch.float64)
    response = noise_response(lambda x: x**2 * (4 / len(x)), batch, 0.3, batch_dim=0, seed=5)
    expected = noise_response(square, batch, 0.3, batch_dim=0, seed=5)
    torch.testing.assert_close(response.ratio.value, expected.ratio.value)


def test_groups_of_draws_do_not_change_the_noise(monkeypatch):
    batch = torch.randn(4, 3, dtype=torch.float64)
    whole = noise_response(network(), batch, 0.3, samples=64, batch_dim=0, seed=5)
    monkeypatch.setattr(noise, "STACKED_SCALARS", 60)
    parts = noise_response(network(), batch, 0.3, samples=64, batch_dim=0, seed=5)
    torch.testing.assert_close(whole.ratio.value, parts.ratio.value)
    monkeypatch.setattr(noise, "MATRIX_SCALARS", 0)
    products = noise_response(network(), batch, 0.3, samples=64, batch_dim=0, seed=5)
    torch.testing.assert_close(whole.ratio.value, products.ratio.value)
    torch.testing.assert_close(whole.linear, products.linear)
    one = noise_response(network(), batch[0], 0.3, samples=64, seed=5)
    torch.testing.assert_close(one.linear, whole.linear[0])


def test_same_seed_same_bits():
    first = noise_response(network(), POINT, 0.3)
    again = noise_response(network(), POINT, 0.3, seed=first.ratio.seed)
    assert torch.equal(first.ratio.value, again.ratio.value)
    assert all(map(torch.equal, first.ratio.interval, again.ratio.interval))
    other = noise_response(network(), POINT, 0.3)
    assert other.ratio.seed != first.ratio.seed
    assert not torch.equal(first.ratio.value, other.ratio.value)


def test_a_generator_instead_of_a_seed():
    one = noise_response(network(), POINT, 0.3, generator=torch.Generator().manual_seed(3))
    two = noise_response(network(), POINT, 0.3, seed=3)
    assert torch.equal(one.ratio.value, two.ratio.value)
    assert one.ratio.seed is None


@pytest.mark.parametrize("batch_dim", [0, None])
def test_dropout_keeps_one_mask(batch_dim):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    response = noise_response(model, x, 0.3, batch_dim=batch_dim, seed=0)
    linear = jacobian(model, x, batch_dim=batch_dim).fro_norm().square() / (12, 3)[batch_dim == 0]
    torch.testing.assert_close(response.linear, linear.detach())
    torch.testing.assert_close(response.ratio.value, response.linear)


def test_nothing_stays_behind():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, values = torch.get_rng_state(), x.detach().clone()
    response = noise_response(model, x, 0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, values)
    assert x.grad is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    tensors = (response.ratio.value, response.linear, response.curvature)
    assert not any(tensor.requires_grad for tensor in tensors)
    with torch.inference_mode():
        noise_response(model, values, 0.1)


def test_in_place_maps_leave_the_point_alone():
    point = POINT.clone()
    response = noise_response(lambda x: x.mul_(3), point, 0.1, seed=0)
    assert torch.equal(point, POINT)
    torch.testing.assert_close(response.linear, torch.tensor(9.0).double())


# What is shown


def test_repr():
    text = repr(noise_response(square, POINT, 0.1, seed=7))
    assert text.startswith("NoiseResponse(sigma=0.1, ratio=7.0")
    assert "95 % in [" in text
    assert "seed 7" in text
    assert "linear=7, curvature=0.00" in text
    many = noise_response(square, torch.stack([POINT, 2 * POINT]), 0.1, batch_dim=0, seed=7)
    assert "linear=7 to 28" in repr(many)
    assert "2 values from" in repr(many)
    none = noise_response(square, torch.zeros(0, 3), 0.1, batch_dim=0, seed=7)
    assert "linear=none" in repr(none)


def test_html():
    shown = noise_response(square, POINT, 0.1, seed=7)._repr_html_()
    assert shown.count("<tr>") == 4
    assert "<th>curvature</th>" in shown


# What is refused


@pytest.mark.parametrize("sigma", [0, -1.0, float("nan"), float("inf")])
def test_sigma_is_positive_and_finite(sigma):
    with pytest.raises(InputError, match="sigma expects a positive finite number, got"):
        noise_response(square, POINT, sigma)


@pytest.mark.parametrize("samples", [0, 2, 7, 10.0, True])
def test_samples_come_in_pairs(samples):
    with pytest.raises(InputError, match="samples expects an even number of at least 4, got"):
        noise_response(square, POINT, 0.1, samples=samples)


def test_refused_points():
    with pytest.raises(InputError, match="expects x to be one tensor, got dict"):
        noise_response(square, {"x": POINT}, 0.1)
    with pytest.raises(InputError, match=r"expects a real floating-point x, got torch\.int64"):
        noise_response(square, torch.arange(3), 0.1)
    with pytest.raises(InputError, match=r"expects a real floating-point x, got torch\.complex128"):
        noise_response(square, POINT * 1j, 0.1)
    for shape, batch_dim in [((0,), None), ((2, 0), 0)]:
        with pytest.raises(ShapeError, match="at least one scalar to add noise to, got"):
            noise_response(square, torch.zeros(shape), 0.1, batch_dim=batch_dim)
    with pytest.raises(InputError, match="expected seed= or generator=, got both"):
        noise_response(square, POINT, 0.1, seed=1, generator=torch.Generator())


@pytest.mark.parametrize(
    ("f", "kind"), [(lambda x: x.log(), "NaN"), (lambda x: (200 * x).exp() ** 2, "inf")]
)
def test_a_map_must_be_finite_around_the_point(f, kind):
    with pytest.raises(InputError, match=f"expects f to be finite at x \\+ e, got {kind}"):
        noise_response(f, torch.full((3,), 0.1), 1.0, seed=0)


def test_coupled_samples_are_refused():
    with pytest.raises(CouplingError, match="native_batch_norm"):
        noise_response(nn.BatchNorm1d(3), torch.randn(4, 3), 0.1, batch_dim=0)
