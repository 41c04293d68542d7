"""`spectral_radius` against all eigenvalues, and the coverage of its interval."""

import math

import pytest
import torch
from torch import Tensor, nn

import pushforward as pf
from pushforward.errors import CouplingError, DimensionError, InputError, ShapeError
from pushforward.implicit import fixed_point, spectral_radius

TURN = 0.9 * torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def truth(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvals(matrix).abs().amax(-1)


@pytest.mark.parametrize("method", ["exact", "growth"])
def test_a_scaled_rotation(method: str):
    """Where a Rayleigh quotient says anything up to 0.9 cos(angle) = 0.54."""
    radius = spectral_radius(lambda z: z @ TURN.T, torch.zeros(3, 2).double(), method=method)
    torch.testing.assert_close(
        radius.value, torch.full((3,), 0.9, dtype=torch.float64), rtol=1e-9, atol=0
    )
    assert radius.converged
    v = normal(2)
    assert abs((v @ TURN @ v / (v @ v)).item()) < 0.6


@pytest.mark.parametrize("make", [lambda A: A, lambda A: (A + A.T) / 2, lambda A: torch.triu(A)])
@pytest.mark.parametrize("n", [3, 40])
def test_growth_gives_what_eigenvalues_give(make, n: int):
    for seed in range(5):
        matrix = make(normal(n, n, seed=seed)) / n**0.5
        radius = spectral_radius(matrix, method="growth", seed=seed)
        assert radius.interval[0] <= truth(matrix) <= radius.interval[1]
        torch.testing.assert_close(radius.value, truth(matrix), rtol=0.02, atol=0)
        assert radius.converged
        assert radius.interval[1] / radius.interval[0] < 1.03


@pytest.mark.slow
def test_the_interval_covers_the_truth():
    draws = covered = 0
    for seed in range(120):
        n = (10, 60, 200)[seed % 3]
        matrix = normal(n, n, seed=seed) / n**0.5
        if seed % 2:
            matrix = matrix * torch.rand(n, 1, generator=torch.Generator().manual_seed(seed))
        radius = spectral_radius(matrix, method="growth", seed=seed)
        if radius.converged:
            draws += 1
            covered += bool(radius.interval[0] <= truth(matrix) <= radius.interval[1])
    assert draws > 80
    assert covered >= 0.95 * draws


def test_the_jacobian_of_a_network_per_sample():
    net = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 6)).double()
    z = normal(4, 6)
    matrices = torch.stack([torch.func.jacrev(net)(each) for each in z])
    exact = spectral_radius(net, z)
    assert exact.method == "eigvals"
    assert exact.passes == 6
    assert exact.stderr.tolist() == [0.0] * 4
    torch.testing.assert_close(exact.value, truth(matrices))
    estimate = spectral_radius(net, z, method="growth", seed=1)
    assert estimate.method == "growth"
    assert not estimate.unbiased
    assert estimate.seed == 1
    torch.testing.assert_close(estimate.value, truth(matrices), rtol=0.02, atol=0)


def test_states_of_any_form():
    net = nn.Conv2d(2, 2, 3, padding=1).double()
    z = normal(3, 2, 4, 4)
    flat = torch.stack([torch.func.jacrev(net)(each).reshape(32, 32) for each in z])
    torch.testing.assert_close(spectral_radius(net, z).value, truth(flat))
    one = spectral_radius(lambda v: TURN @ v, normal(2), method="growth")
    assert one.value.shape == ()
    torch.testing.assert_close(one.value.item(), 0.9, rtol=1e-9, atol=0)
    tree = spectral_radius(lambda s: (0.5 * s[1], 0.5 * s[0]), (normal(3, 2), normal(3, 2)))
    torch.testing.assert_close(tree.value, torch.full((3,), 0.5, dtype=torch.float64))


def test_operators_and_matrices():
    matrices = normal(3, 5, 5)
    torch.testing.assert_close(spectral_radius(matrices).value, truth(matrices))
    growth = spectral_radius(matrices, method="growth", seed=0)
    torch.testing.assert_close(growth.value, truth(matrices), rtol=0.02, atol=0)
    J = pf.jacobian(lambda v: TURN @ v.sin(), torch.zeros(2).double())
    torch.testing.assert_close(spectral_radius(J).value.item(), 0.9)
    products = pf.aslinearoperator(
        (2, 2), lambda v: TURN @ v, lambda u: TURN.T @ u, dtype=torch.float64
    )
    assert spectral_radius(products, method="growth").value.item() == pytest.approx(0.9)


def test_a_layer_that_solves_has_a_radius_too():
    weight = normal(4, 4) * 0.2

    def solved(x: Tensor) -> Tensor:
        return fixed_point(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x)).z

    x = normal(2, 4)
    J = pf.jacobian(solved, x, batch_dim=0).matrix()
    torch.testing.assert_close(spectral_radius(solved, x).value, truth(J), rtol=1e-7, atol=0)


def test_nilpotent_and_zero_jacobians_have_radius_0():
    nilpotent = torch.triu(normal(6, 6), 1)
    for matrix in (nilpotent, torch.zeros(3, 3)):
        radius = spectral_radius(matrix, method="growth")
        assert radius.value.item() == 0
        assert radius.interval == (0, 0)
        assert radius.converged
    assert spectral_radius(lambda z: torch.ones_like(z), torch.zeros(2, 3)).value.tolist() == [0, 0]


@pytest.mark.parametrize("method", ["auto", "growth"])
def test_empty_states(method: str):
    assert spectral_radius(torch.zeros(0, 0), method=method).value.item() == 0
    assert spectral_radius(lambda z: z, torch.zeros(2, 0), method=method).value.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shorter_dtypes(dtype: torch.dtype):
    radius = spectral_radius(TURN.to(dtype), method="growth", seed=0)
    assert radius.value.dtype is torch.float64
    assert radius.value.item() == pytest.approx(0.9, rel=0.02)


def test_a_seed_repeats_it_and_global_random_state_is_not_touched():
    matrix = normal(20, 20)
    state = torch.get_rng_state()
    first = spectral_radius(matrix, method="growth")
    assert torch.equal(state, torch.get_rng_state())
    again = spectral_radius(matrix, method="growth", seed=first.seed)
    assert torch.equal(first.value, again.value)
    generator = torch.Generator().manual_seed(first.seed)
    given = spectral_radius(matrix, method="growth", generator=generator)
    assert torch.equal(first.value, given.value)
    assert given.seed is None


def test_it_says_where_it_has_not_converged():
    """Two eigenvalues of nearly the same modulus take long to tell apart."""
    matrix = torch.diag(torch.linspace(0.9, 1.0, 50, dtype=torch.float64))
    radius = spectral_radius(matrix, method="growth", rtol=1e-6, max_products=32, seed=0)
    assert not radius.converged
    assert radius.passes == 4 * 32
    assert radius.value < 1
    assert "not converged" in repr(radius)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "power"}, 'method expects "auto", "exact" or "growth", got \'power\''),
        ({"rtol": 0.0}, "rtol expects a positive number, got 0.0"),
        ({"max_products": 3}, "max_products expects a whole number of at least 16, got 3"),
        ({"seed": 0, "generator": torch.Generator()}, "expected seed= or generator=, got both"),
        ({"seed": 0.5}, "seed expects a whole number, got 0.5"),
    ],
)
def test_arguments_out_of_range(arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        spectral_radius(TURN, **{"method": "growth", **arguments})


def test_what_has_no_spectral_radius():
    with pytest.raises(DimensionError, match="expects a square operator, got 2 x 3"):
        spectral_radius(torch.zeros(2, 3))
    with pytest.raises(InputError, match="got no point z"):
        spectral_radius(torch.sin)
    with pytest.raises(InputError, match="leave the point out"):
        spectral_radius(TURN, torch.zeros(2))
    with pytest.raises(InputError, match="real floating-point matrix"):
        spectral_radius(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ShapeError, match="is expected to return what it takes"):
        spectral_radius(nn.Linear(3, 4), torch.zeros(2, 3))
    with pytest.raises(CouplingError, match="native_batch_norm"):
        spectral_radius(nn.BatchNorm1d(3), torch.randn(4, 3))


@pytest.mark.parametrize("method", ["exact", "growth"])
def test_a_jacobian_that_is_not_finite_is_refused(method: str):
    with pytest.raises(InputError, match="expects a finite Jacobian, got infinite entries"):
        spectral_radius(torch.tensor([[math.inf, 0.0], [0.0, 1.0]]), method=method)
    with pytest.raises(InputError, match="expects a finite Jacobian, got NaN entries"):
        spectral_radius(torch.full((2, 2), math.nan), method=method)
