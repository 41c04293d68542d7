"""Traps 1 and 2: forward mode over forward mode, and reverse over forward, are silently wrong.

On this build: ``jvp(jvp)`` and ``grad(jvp)`` are wrong for layer_norm, batch_norm in training,
instance_norm, linalg.solve, det, slogdet and logdet. ``grad(vjp)`` and ``jvp(grad)`` are right for
all of them, and so are nested forward modes of composites, QR, LU and singular values. The library
never uses forward mode.
"""

from collections.abc import Callable

import pytest
import torch
from pins import forward_mode, normal, pinned, relative_error, second_derivative
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.nn import functional

import pushforward as pf
from oracles import loop_divergence, loop_hessian, loop_laplacian, reverse_over_reverse

pytestmark = forward_mode
REVISIT = "pushforward.passes, which avoids forward mode for this reason"


def composite_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred**2).mean(-1, keepdim=True) + 1e-5)


def triple_product(x: Tensor) -> Tensor:
    """The determinant of a 3 x 3 matrix without linear algebra."""
    return (x[0] * torch.linalg.cross(x[1], x[2])).sum()


def square() -> Tensor:
    return normal(3, 3, seed=3) * 0.5 + 2 * torch.eye(3, dtype=torch.float64)


Maps = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]
B = normal(3, seed=9)
WRONG: dict[str, Maps] = {
    "layer_norm": (lambda x: functional.layer_norm(x, (4,)), composite_norm, normal(3, 4)),
    "batch_norm": (
        lambda x: functional.batch_norm(x, None, None, training=True),
        lambda x: composite_norm(x.T).T,
        normal(5, 4),
    ),
    "instance_norm": (functional.instance_norm, composite_norm, normal(2, 3, 4)),
    "solve": (lambda x: torch.linalg.solve(x, B), lambda x: torch.linalg.inv(x) @ B, square()),
    "det": (torch.linalg.det, triple_product, square()),
    "slogdet": (
        lambda x: torch.linalg.slogdet(x).logabsdet,
        lambda x: triple_product(x).log(),
        square(),
    ),
    "logdet": (torch.logdet, lambda x: triple_product(x).log(), square()),
}
RIGHT: dict[str, Maps] = {
    "composite_norm": (composite_norm, composite_norm, normal(3, 4)),
    "qr": (
        lambda x: torch.linalg.qr(x).R.diagonal().abs().log().sum(),
        lambda x: triple_product(x).log(),
        square(),
    ),
    "lu": (
        lambda x: torch.linalg.lu_factor(x).LU.diagonal().abs().log().sum(),
        lambda x: triple_product(x).log(),
        square(),
    ),
    "singular_values": (
        lambda x: torch.linalg.svdvals(x).log().sum(),
        lambda x: triple_product(x).log(),
        square(),
    ),
}


def directions(f: Callable, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return normal(*f(x).shape, seed=4) if f(x).dim() else torch.ones(()).double(), *(
        normal(*x.shape, seed=seed) for seed in (5, 6)
    )


def forward_over_forward(f: Callable, x: Tensor, c: Tensor, v: Tensor, u: Tensor) -> Tensor:
    return (jvp(lambda z: jvp(f, (z,), (v,))[1], (x,), (u,))[1] * c).sum()


def reverse_over_forward(f: Callable, x: Tensor, c: Tensor, v: Tensor) -> Tensor:
    return grad(lambda z: (jvp(f, (z,), (v,))[1] * c).sum())(x)


def reverse_over_vjp(f: Callable, x: Tensor, c: Tensor, v: Tensor) -> Tensor:
    return grad(lambda z: (vjp(f, z)[1](c)[0] * v).sum())(x)


@pytest.mark.parametrize("name", WRONG)
def test_nested_forward_mode_is_wrong(name: str):
    f, reference, x = WRONG[name]
    c, v, u = directions(f, x)
    truth = second_derivative(reference, x, c, v)
    scalar = (truth * u).sum()
    twice = forward_over_forward(f, x, c, v, u)
    pinned((twice - scalar).abs() > 0.1 * scalar.abs(), f"jvp(jvp) wrong for {name}", REVISIT)
    mixed = reverse_over_forward(f, x, c, v)
    pinned(relative_error(mixed, truth) > 0.1, f"grad(jvp) wrong for {name}", REVISIT)


@pytest.mark.parametrize("name", WRONG | RIGHT)
def test_reverse_over_reverse_is_right(name: str):
    f, reference, x = (WRONG | RIGHT)[name]
    c, v, _ = directions(f, x)
    truth = second_derivative(reference, x, c, v)
    assert relative_error(reverse_over_vjp(f, x, c, v), truth) < 1e-10
    assert relative_error(second_derivative(f, x, c, v), truth) < 1e-10


@pytest.mark.parametrize("name", RIGHT)
def test_nested_forward_mode_of_these_is_right(name: str):
    f, reference, x = RIGHT[name]
    c, v, u = directions(f, x)
    truth = (second_derivative(reference, x, c, v) * u).sum()
    torch.testing.assert_close(forward_over_forward(f, x, c, v, u), truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["slogdet", "logdet"])
def test_second_derivative_of_a_log_determinant_is_zero_in_forward_mode(name: str):
    f, _, x = WRONG[name]
    for outer in (jacfwd, jacrev):
        pinned(not outer(jacfwd(f))(x).any(), f"a zero Hessian of {name} over jacfwd", REVISIT)


def test_hessian_of_det_at_the_identity_is_nan():
    eye = torch.eye(3, dtype=torch.float64)
    pinned(
        hessian(torch.linalg.det)(eye).isnan().any(),
        "a NaN in torch.func.hessian(det) at the identity",
        "Census.vmappable in pushforward.tape, which keeps det away from vmap",
    )


@pytest.mark.parametrize("name", [n for n in WRONG if WRONG[n][0](WRONG[n][2]).dim() == 0])
@pytest.mark.parametrize("at_identity", [False, True], ids=["general", "identity"])
def test_hessian_is_right(name: str, at_identity: bool):
    f, reference, x = WRONG[name]
    x = torch.eye(3, dtype=torch.float64) if at_identity else x
    expected = loop_hessian(reference, x)
    torch.testing.assert_close(pf.hessian(f, x).dense(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pf.laplacian(f, x), loop_laplacian(reference, x))


@pytest.mark.parametrize("name", WRONG)
def test_training_on_a_jacobian_is_right(name: str):
    f, reference, x = WRONG[name]
    leaf = x.clone().requires_grad_()
    weight = normal(*f(x).shape, *x.shape, seed=7)
    (expected,) = reverse_over_reverse(lambda J: (weight * J + J**2).sum(), reference, x)
    J = pf.jacobian(f, leaf).dense()
    (actual,) = torch.autograd.grad((weight * J + J**2).sum(), leaf)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["layer_norm", "batch_norm", "instance_norm"])
def test_training_on_a_divergence_is_right(name: str):
    f, reference, x = WRONG[name]
    leaf = x.clone().requires_grad_()

    def bent(g: Callable) -> Callable:
        return lambda z: torch.sin(3 * g(z))

    divergence = pf.divergence(bent(f), leaf)
    torch.testing.assert_close(divergence.detach(), loop_divergence(bent(reference), x))
    (actual,) = torch.autograd.grad(divergence, leaf)
    size = x.numel()
    (expected,) = reverse_over_reverse(lambda J: J.reshape(size, size).trace(), bent(reference), x)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def test_local_energy_of_a_slater_determinant():
    """Three fermions in a plane harmonic trap: they fill 1, x and y, so that E = 1 + 2 + 2."""
    x = normal(3, 2, seed=11)

    def log_psi(x: Tensor) -> Tensor:
        orbitals = torch.cat([torch.ones(3, 1, dtype=x.dtype), x], dim=1)
        return torch.linalg.slogdet(orbitals).logabsdet - 0.5 * (x**2).sum()

    laplacian = pf.laplacian(log_psi, x)
    (gradient,) = torch.autograd.grad(log_psi(leaf := x.clone().requires_grad_()), leaf)
    energy = -0.5 * (laplacian + (gradient**2).sum()) + 0.5 * (x**2).sum()
    torch.testing.assert_close(energy, torch.tensor(5.0, dtype=torch.float64))
    forward = jacfwd(jacfwd(log_psi))(x).reshape(6, 6).trace()
    wrong = -0.5 * (forward + (gradient**2).sum()) + 0.5 * (x**2).sum()
    pinned((wrong - 5).abs() > 0.1, "wrong local energies from nested forward mode", REVISIT)
