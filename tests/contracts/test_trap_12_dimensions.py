"""Traps 12 and 13: maps that change the dimension.

On this build ``TransformedDistribution`` of a stick-breaking transform, which raises the dimension,
followed by an affine map of scale 3 integrates to 1/3: it adds log-determinants where only the
log-volume of the whole is right. For more outputs than inputs det(J J^T) = 0, and the volume is
det(J^T J)^(1/2); for fewer, p(x) / vol is the integrand over the fibre, not the density of y.
"""

import math
from collections.abc import Callable

import pytest
import torch
from pins import pinned
from torch import Tensor
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import AffineTransform, StickBreakingTransform

import pushforward as pf

REVISIT = "pushforward.density.law.Pushforward"
GRID = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None]
BASE = Independent(Normal(torch.zeros(1).double(), torch.ones(1).double()), 1)
STICK = StickBreakingTransform()


def integral(log_density: Tensor, points: Tensor) -> float:
    """The integral of a density over a curve, by the trapezoidal rule along its length."""
    steps = (points[1:] - points[:-1]).norm(dim=-1)
    density = log_density.exp()
    return ((density[1:] + density[:-1]) / 2 * steps).sum().item()


def test_chains_of_torch_integrate_to_a_third():
    law = TransformedDistribution(BASE, [STICK, AffineTransform(0.0, 3.0, event_dim=1)])
    points = 3 * STICK(GRID)
    first = points[:, :1]  # torch counts the segment by its first coordinate
    pinned(
        abs(integral(law.log_prob(points), first) - 1 / 3) < 1e-3,
        "a chain over a raised dimension that integrates to 1/3",
        REVISIT,
    )
    lone = TransformedDistribution(BASE, [STICK])
    assert integral(lone.log_prob(STICK(GRID)), STICK(GRID)[:, :1]) == pytest.approx(1, abs=1e-3)


def scaled(x: Tensor) -> Tensor:
    return 3 * x


def sheared(y: Tensor) -> Tensor:
    return torch.stack([3 * y[..., 0], y[..., 0] + y[..., 1]], -1)


def parabola(z: Tensor) -> Tensor:
    return torch.cat([z, z**2], -1)


@pytest.mark.parametrize("after", [scaled, sheared])
@pytest.mark.parametrize("embedding", [STICK, parabola], ids=["stick", "parabola"])
def test_laws_on_surfaces_integrate_to_one(embedding: Callable, after: Callable):
    def whole(z: Tensor) -> Tensor:
        return after(embedding(z))

    points = whole(GRID)
    nested = pf.Pushforward(pf.Pushforward(BASE, embedding), after)
    for law in (pf.Pushforward(BASE, whole), nested):
        J = pf.jacobian(whole, GRID, batch_dim=0)
        log_density = BASE.log_prob(GRID) - J.logvol()
        assert integral(log_density, points) == pytest.approx(1, abs=1e-3)
        some = slice(1500, 2500, 100)
        torch.testing.assert_close(law.log_prob(points[some]), log_density[some])


def test_log_volumes_of_a_chain_do_not_add_up():
    x = torch.tensor([0.4], dtype=torch.float64)
    whole = pf.jacobian(lambda z: sheared(parabola(z)), x).logvol()
    parts = pf.jacobian(parabola, x).logvol() + pf.jacobian(sheared, parabola(x)).logvol()
    assert (whole - parts).abs() > 0.05
    slope = torch.tensor([3.0, 1 + 2 * 0.4], dtype=torch.float64)
    torch.testing.assert_close(whole, slope.norm().log())


def test_log_determinants_of_a_chain_add_up_where_the_dimension_stays():
    x = torch.tensor([0.4, -1.0], dtype=torch.float64)
    whole = pf.jacobian(lambda y: torch.sinh(sheared(y)), x).logvol()
    parts = pf.jacobian(sheared, x).logvol() + pf.jacobian(torch.sinh, sheared(x)).logvol()
    torch.testing.assert_close(whole, parts)


def test_the_other_gram_matrix_is_singular():
    J = pf.jacobian(parabola, torch.tensor([0.4], dtype=torch.float64))
    matrix = J.matrix()
    assert torch.linalg.det(matrix @ matrix.mT).abs() < 1e-15
    torch.testing.assert_close(J.logvol(), 0.5 * torch.logdet(matrix.mT @ matrix))
    wide = J.T.matrix()
    torch.testing.assert_close(pf.linalg.logvol(wide), 0.5 * torch.logdet(wide @ wide.mT))


def test_maps_that_lower_the_dimension_are_refused():
    plane = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    with pytest.raises(pf.errors.DimensionError, match="fibre"):
        pf.Pushforward(plane, lambda z: z.sum(-1, keepdim=True))


def test_density_over_volume_is_the_integrand_over_the_fibre():
    """y = |z| of a plane normal is Rayleigh: p(y) = y exp(-y^2 / 2), with volume 1 everywhere.

    p(x) / vol is constant on the fibre, a circle of length 2 pi y; only times that length it is
    the density of y.
    """
    plane = Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1)
    x = torch.tensor([0.6, -0.8], dtype=torch.float64) * 1.7
    volume = pf.jacobian(lambda z: z.norm()[None], x).logvol()
    torch.testing.assert_close(volume, torch.zeros(()).double())
    integrand = (plane.log_prob(x) - volume).exp()
    rayleigh = 1.7 * math.exp(-(1.7**2) / 2)
    assert integrand.item() != pytest.approx(rayleigh, rel=0.1)
    assert (integrand * 2 * math.pi * 1.7).item() == pytest.approx(rayleigh)
