"""Trap 11: zero, rank-one and singular operators turn estimators and determinants into NaN.

This version has no stochastic estimators, so that their coverage has nothing to be checked on yet.
What is exact must have no NaN: -inf for a volume that is zero, 1 for an empty product.

On this build: ``torch.logdet`` of a matrix of negative determinant is NaN, and gradients of
``slogdet`` at a singular matrix raise or are not finite.
"""

import math

import pytest
import torch
from pins import normal, pinned
from torch import Tensor

import pushforward as pf

RANK_ONE = torch.outer(normal(4), normal(4, seed=1))
SINGULAR = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [5.0, 7.0, 9.0]], dtype=torch.float64)
DEFICIENT = {
    "zero": torch.zeros(3, 3, dtype=torch.float64),
    "rank_one": RANK_ONE,
    "singular": SINGULAR,
    "zero_tall": torch.zeros(4, 2, dtype=torch.float64),
    "zero_wide": torch.zeros(2, 4, dtype=torch.float64),
    "rank_one_tall": torch.outer(normal(5), normal(3)),
    "rank_one_wide": torch.outer(normal(3), normal(5)),
    "one_zero_row": torch.diag(torch.tensor([2.0, 0.0, 3.0], dtype=torch.float64)),
}


def linear(a: Tensor) -> pf.Jacobian:
    return pf.jacobian(lambda x: a @ x, normal(a.shape[1]))


def test_logdet_of_a_negative_determinant_is_nan():
    flipped = torch.diag(torch.tensor([-1.0, 2.0]))
    pinned(torch.logdet(flipped).isnan(), "a NaN logdet", "pushforward.linalg.slogdet")
    assert linear(flipped.double()).logabsdet() == math.log(2)


@pytest.mark.parametrize("name", DEFICIENT)
def test_a_volume_of_zero_is_minus_infinity(name: str):
    a = DEFICIENT[name]
    J = linear(a)
    assert J.logvol() == -math.inf
    assert pf.linalg.logvol(a) == -math.inf
    if a.shape[0] == a.shape[1] and name != "singular":  # LU sees a pivot of rounding there
        assert J.slogdet()[1] == -math.inf
        assert J.slogdet()[0] == 0


@pytest.mark.parametrize("name", DEFICIENT)
def test_pseudo_determinants_are_products_of_what_is_left(name: str):
    a = DEFICIENT[name]
    values = torch.linalg.svdvals(a)
    left = values[values > max(a.shape) * torch.finfo(a.dtype).eps * values.max()]
    J = linear(a)
    torch.testing.assert_close(J.pdet(), left.prod())
    torch.testing.assert_close(J.log_pdet(), left.log().sum())
    assert J.rank() == len(left)


def test_the_empty_product_is_one():
    J = linear(DEFICIENT["zero"])
    assert (J.pdet(), J.log_pdet(), J.rank()) == (1, 0, 0)
    assert (J.fro_norm(), J.spectral_norm(), J.stable_rank()) == (0, 0, 0)


def test_singular_values_not_eigenvalues():
    shear = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert torch.linalg.eigvals(shear).abs().max() == 1
    torch.testing.assert_close(linear(shear).pdet(), torch.tensor(2.0).double().sqrt())


@pytest.mark.parametrize("name", DEFICIENT)
@pytest.mark.parametrize("quantity", ["fro_norm", "pdet", "log_pdet", "logvol", "trace", "rank"])
def test_nothing_is_nan(name: str, quantity: str):
    J = linear(DEFICIENT[name])
    if quantity == "trace" and J.shape[0] != J.shape[1]:
        pytest.skip("not square")
    assert not getattr(J, quantity)().isnan()


@pytest.mark.parametrize("quantity", ["fro_norm", "pdet", "log_pdet", "spectral_norm"])
@pytest.mark.parametrize("name", DEFICIENT)
def test_gradients_are_not_nan(name: str, quantity: str):
    a = DEFICIENT[name].clone().requires_grad_()
    value = getattr(pf.jacobian(lambda x: a @ x, normal(a.shape[1])), quantity)()
    (gradient,) = torch.autograd.grad(value, a)
    assert gradient.isfinite().all()


def test_a_batch_with_a_singular_sample():
    """One singular sample leaves the others alone."""
    x = torch.tensor([[1.0, 2.0], [0.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
    J = pf.jacobian(lambda x: x**2 / 2, x, batch_dim=0)
    expected = torch.tensor([math.log(2), -math.inf, math.log(4)], dtype=torch.float64)
    torch.testing.assert_close(J.logabsdet(), expected)
    torch.testing.assert_close(J.logvol(), expected)
    log_pdet = torch.tensor([math.log(2), math.log(3), math.log(4)], dtype=torch.float64)
    torch.testing.assert_close(J.log_pdet(), log_pdet)
