"""Trap 14: E|J e|^2 / E|e|^2 is ||J||_F^2 / n, not ||J||_F^2, for e ~ N(0, s^2 I)."""

import pytest
import torch
from pins import normal
from torch import Tensor

import pushforward as pf


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (1, 5), (5, 1)])
def test_the_ratio_has_the_dimension_under_it(shape: tuple[int, int]):
    """By brute force, far from ||J||_F^2 wherever n > 1."""
    a = normal(*shape)
    e = 0.1 * normal(200_000, shape[1], seed=1)
    brute = ((e @ a.mT) ** 2).sum() / (e**2).sum()
    torch.testing.assert_close(brute, a.square().sum() / shape[1], rtol=2e-2, atol=0)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (1, 5), (5, 1)])
@pytest.mark.parametrize("sigma", [1e-3, 0.5])
def test_the_response_of_a_linear_map(shape: tuple[int, int], sigma: float):
    a = normal(*shape)
    x = normal(shape[1], seed=1)
    response = pf.noise_response(lambda x: a @ x, x, sigma, seed=0)
    expected = a.square().sum() / shape[1]
    torch.testing.assert_close(response.linear, expected)
    torch.testing.assert_close(response.ratio.value, expected, rtol=1e-6, atol=1e-8)
    assert response.curvature.abs() < 1e-6
    low, high = response.ratio.interval
    assert low <= expected + 1e-8
    assert high >= expected - 1e-8


def test_the_response_of_a_network_tends_to_the_linear_one():
    w = normal(3, 4)

    def f(x: Tensor) -> Tensor:
        return torch.tanh(w @ x)

    x = normal(4, seed=1)
    exact = pf.jacobian(f, x).fro_norm().square() / 4
    for sigma in (1e-1, 1e-2, 1e-3):
        response = pf.noise_response(f, x, sigma, samples=512, seed=0)
        torch.testing.assert_close(response.linear, exact)
        assert (response.curvature.abs() < 20 * sigma**2).all()


def test_the_response_per_sample():
    w, x = normal(3, 4), normal(5, 4, seed=1)
    response = pf.noise_response(lambda x: x @ w.mT, x, 0.1, batch_dim=0, seed=0)
    expected = (w.square().sum() / 4).expand(5)
    torch.testing.assert_close(response.linear, expected)
    torch.testing.assert_close(response.ratio.value, expected, rtol=1e-6, atol=1e-8)
