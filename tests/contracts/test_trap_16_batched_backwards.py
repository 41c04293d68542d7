"""A trap beyond the list: some backward passes are wrong, or fail, under vmap.

On this build ``torch.func.jacrev`` of ``torch.cdist`` (any p, up to 25 points) is silently wrong,
unless it runs one row at a time; a loop of plain gradients and ``is_grads_batched`` are right. The
second derivative of det under vmap is NaN where singular values repeat. ``is_grads_batched`` fails
on the second derivative of group_norm. masked_select with a broadcast mask fails under vmap.
"""

import pytest
import torch
from pins import normal, pinned
from torch import Tensor
from torch.func import jacrev
from torch.nn import functional

import pushforward as pf
from oracles import loop_jacobian, reverse_over_reverse

REVISIT = "pushforward.composites and Census.vmappable in pushforward.tape"
CENTRES = normal(4, 3, seed=3)


def vmapped_rows(f, x: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of the Jacobian by vmap over a backward pass, and the point they were taken at."""
    x = x.clone().requires_grad_()
    y = f(x)

    def row(u: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, u, retain_graph=True, create_graph=create_graph)[0]

    units = torch.eye(y.numel(), dtype=y.dtype).reshape(-1, *y.shape)
    return torch.func.vmap(row)(units), x


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_distances_under_vmap_are_wrong(p: float):
    def f(x: Tensor) -> Tensor:
        return torch.cdist(x, CENTRES, p=p)

    x = normal(5, 3)
    truth = loop_jacobian(f, x)
    pinned((jacrev(f)(x) - truth).abs().max() > 0.1, "a wrong jacrev of cdist", REVISIT)
    torch.testing.assert_close(jacrev(f, chunk_size=1)(x), truth)
    for plan in ("auto", "reverse", "forward", "loop"):
        torch.testing.assert_close(pf.jacobian(f, x, plan=plan).dense(), truth)
    per_sample = pf.jacobian(f, x, batch_dim=0).dense()
    own = torch.stack([truth[b, :, b] for b in range(5)])
    torch.testing.assert_close(per_sample, own)


def test_training_on_distances():
    x = normal(5, 3).requires_grad_()
    J = pf.jacobian(lambda x: torch.cdist(x, CENTRES), x).dense()
    (actual,) = torch.autograd.grad((J * normal(*J.shape, seed=2)).sum(), x)
    (expected,) = reverse_over_reverse(
        lambda J: (J * normal(*J.shape, seed=2)).sum(),
        lambda x: ((x[:, None] - CENTRES) ** 2).sum(-1).sqrt(),
        x.detach(),
    )
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def test_det_under_vmap_has_a_nan_in_its_second_derivative():
    eye = torch.eye(3, dtype=torch.float64)
    rows, x = vmapped_rows(torch.linalg.det, eye, create_graph=True)
    (gradient,) = torch.autograd.grad(rows.square().sum(), x)
    pinned(gradient.isnan().any(), "a NaN in the second derivative of det", REVISIT)
    leaf = eye.clone().requires_grad_()
    loss = pf.jacobian(torch.linalg.det, leaf).matrix().square().sum()
    (actual,) = torch.autograd.grad(loss, leaf)
    (expected,) = reverse_over_reverse(
        lambda J: J.square().sum(),
        lambda x: (x[0] * torch.linalg.cross(x[1], x[2])).sum(),
        eye,
    )
    torch.testing.assert_close(actual, expected)


def test_batched_gradients_of_group_norm():
    def f(x: Tensor) -> Tensor:
        return functional.group_norm(x, 2)

    x = normal(2, 4, 3).requires_grad_()
    units = torch.eye(24, dtype=torch.float64).reshape(24, 2, 4, 3)
    with pytest.raises(RuntimeError, match="size of tensor"):
        torch.autograd.grad(f(x), x, units, is_grads_batched=True, create_graph=True)
    J = pf.jacobian(f, x).dense()
    (actual,) = torch.autograd.grad(J.square().sum(), x)
    (expected,) = reverse_over_reverse(lambda J: J.square().sum(), f, x.detach())
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def test_what_fails_under_vmap_goes_one_by_one():
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    x = normal(4)

    def f(x: Tensor) -> Tensor:
        return x.masked_select(mask)

    with pytest.raises(RuntimeError, match="size of tensor"):
        vmapped_rows(f, x)
    torch.testing.assert_close(pf.jacobian(f, x).dense(), loop_jacobian(f, x))
