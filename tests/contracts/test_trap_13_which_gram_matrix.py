"""Trap 13: det(J J^T) of a tall map is 0; of a wide one, p(x)/vol is no density of y."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

import pushforward as pf

F64 = {"dtype": torch.float64}


def test_the_other_gram_matrix_has_determinant_zero():
    J = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]], **F64)
    assert torch.linalg.det(J @ J.T).abs() < 1e-12
    volume = torch.linalg.det(J.T @ J).sqrt()
    torch.testing.assert_close(pf.linalg.pdet(J), volume)
    torch.testing.assert_close(pf.linalg.logvol(J), volume.log())
    torch.testing.assert_close(pf.linalg.logvol(J.T), volume.log())


def test_a_submersion_is_refused_and_its_fibre_explained():
    base = MultivariateNormal(torch.zeros(2, **F64), torch.eye(2, **F64))
    with pytest.raises(pf.errors.DimensionError, match="fibre"):
        pf.Pushforward(base, lambda z: z.sum(-1, keepdim=True))


def test_the_integral_over_the_fibre_is_the_density():
    """y = z_1 + z_2 is N(0, 2): p(z)/vol has to be integrated along z_1 + z_2 = y."""
    base = MultivariateNormal(torch.zeros(2, **F64), torch.eye(2, **F64))
    y, t = 0.7, torch.linspace(-12, 12, 4001, **F64)
    along = torch.tensor([1.0, -1.0], **F64) / math.sqrt(2)
    fibre = y / 2 * torch.ones(2, **F64) + t[:, None] * along
    volume = pf.jacobian(lambda z: z.sum(-1, keepdim=True), fibre[0]).pdet()
    integrand = base.log_prob(fibre).exp() / volume
    density = torch.trapezoid(integrand, t)
    expected = math.exp(-(y**2) / 4) / math.sqrt(4 * math.pi)
    assert abs(density.item() - expected) < 1e-10
    assert abs(integrand[2000].item() - expected) > 1e-2
