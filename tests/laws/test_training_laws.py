"""Results train: their gradients are those of reverse mode over reverse mode, one row at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lawbook import drawn, jacobian, normal
from torch import Tensor

import pushforward as pf
from oracles import leaves, loop_hessian, loop_jacobian, loop_laplacian, reverse_over_reverse
from zoo import Case, Problem, cases, named, over

RIGHT = {"rtol": 1e-8, "atol": 1e-8}
SMOOTH = cases(without=("tree", "complex", "empty"))


def attached(problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The point as a leaf that wants gradients, and everything that a loss would reach."""
    x = problem.x.detach().clone().requires_grad_()
    return x, (x, *problem.parameters)


def functional(problem: Problem) -> Callable[[Tensor], Tensor]:
    """A scalar of a Jacobian, with a different weight for each entry."""

    def of(jacobian: Tensor) -> Tensor:
        weight = normal(jacobian.numel(), seed=5).reshape(jacobian.shape)
        return (weight * jacobian).sum() + 0.5 * (jacobian**2).sum()

    return of


def gradients(loss: Tensor, wanted: tuple[Tensor, ...]) -> list[Tensor]:
    """d loss / d wanted, zeros where nothing connects them."""
    if not loss.requires_grad:
        return [torch.zeros_like(w) for w in wanted]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


def assert_gradients(actual: list[Tensor], expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **RIGHT)


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_gradients_through_dense(case: Case):
    problem = case.make()
    x, wanted = attached(problem)
    of = functional(problem)
    expected = drawn(
        lambda: reverse_over_reverse(of, problem.oracle_map, problem.x, problem.parameters)
    )
    actual = _or_refused(problem, lambda: gradients(of(jacobian(_at(problem, x)).dense()), wanted))
    if actual is not None:
        assert_gradients(actual, expected)


def _at(problem: Problem, x: Tensor) -> Problem:
    return Problem(problem.f, (x,), parameters=problem.parameters)


def _or_refused(problem: Problem, compute: Callable[[], Any]) -> Any:
    """Gradients, or None where torch has no second derivative and says so."""
    if problem.reference is None:
        return compute()
    try:
        return compute()
    except (pf.errors.DifferentiationError, RuntimeError) as error:
        if "not implemented" not in str(error):
            raise
        return None


@over("batched", without=("complex", "random"))
def test_gradients_through_matrix_per_sample(case: Case):
    problem = case.make()
    x, wanted = attached(problem)

    def whole(z: Tensor) -> Tensor:
        return torch.stack(
            [loop_jacobian(lambda s: problem.oracle_map(s[None])[0], s, True) for s in z]
        ).flatten(2 - z.dim() if z.dim() < 2 else 1)

    def per_sample(z: Tensor) -> Tensor:
        return pf.jacobian(problem.f, z, batch_dim=0).dense()

    weight = normal(*per_sample(problem.x).shape, seed=5)
    actual = _or_refused(problem, lambda: gradients((weight * per_sample(x)).sum(), wanted))
    reference, again = attached(problem)
    rows = whole(reference)
    expected = gradients((weight.reshape(rows.shape) * rows).sum(), again)
    if actual is not None:
        assert_gradients(actual, tuple(expected))


QUANTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "diagonal": lambda J: J.diagonal(dim1=-2, dim2=-1).square().sum(),
    "trace": lambda J: J.diagonal(dim1=-2, dim2=-1).sum(),
    "logabsdet": lambda J: torch.linalg.slogdet(J).logabsdet,
    "logvol": lambda J: torch.linalg.svdvals(J).log().sum(),
    "fro_norm": lambda J: (J**2).sum().sqrt(),
    "spectral_norm": lambda J: torch.linalg.svdvals(J).max(),
    "svdvals": lambda J: torch.linalg.svdvals(J).sum(),
    "log_pdet": lambda J: torch.linalg.svdvals(J).log().sum(),
    "pdet": lambda J: torch.linalg.svdvals(J).prod(),
}
OURS: dict[str, Callable[[pf.Jacobian], Tensor]] = {
    name: lambda J, name=name: getattr(J, name)() for name in QUANTITIES
}
OURS["diagonal"] = lambda J: J.diagonal().square().sum()
OURS["svdvals"] = lambda J: J.svdvals().sum()
ROUND = ("spherical_coordinates", "matrix_exponential", "inverse")


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", ROUND)
def test_gradients_through_quantities(name: str, quantity: str):
    problem = named(name)
    x, wanted = attached(problem)
    n = problem.x.numel()
    expected = reverse_over_reverse(
        lambda J: QUANTITIES[quantity](J.reshape(n, n)), problem.f, problem.x
    )
    actual = gradients(OURS[quantity](pf.jacobian(problem.f, x)), wanted)
    assert_gradients(actual, expected)


@pytest.mark.parametrize("quantity", ["logvol", "log_pdet", "pdet", "fro_norm", "spectral_norm"])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5)], ids=["tall", "wide"])
def test_gradients_through_volumes_of_maps_between_dimensions(quantity: str, shape):
    m, n = shape
    a = normal(m, n, seed=3).requires_grad_()
    x = normal(n).requires_grad_()

    def f(z: Tensor) -> Tensor:
        return torch.tanh(a @ z) + a @ z

    expected = reverse_over_reverse(QUANTITIES[quantity], f, x, (a,))
    actual = gradients(OURS[quantity](pf.jacobian(f, x)), (x, a))
    assert_gradients(actual, expected)


@pytest.mark.parametrize(
    "strategy", ["forward", *(pytest.param(s, marks=pytest.mark.slow) for s in ("reverse", "loop"))]
)
@over(without=("tree", "random", "complex", "empty"))
def test_every_plan_trains(case: Case, strategy: str):
    problem = case.make()
    x, wanted = attached(problem)
    try:
        J = pf.jacobian(problem.f, x, plan=strategy)
    except pf.errors.PlanError as refusal:
        pytest.skip(str(refusal)[:100])
    of = functional(problem)
    shape = problem.oracle_map(problem.x).shape + problem.x.shape
    expected = reverse_over_reverse(of, problem.oracle_map, problem.x, problem.parameters)
    assert_gradients(gradients(of(J.matrix().reshape(shape)), wanted), expected)


@over("square", "network", without=("tree", "random", "coupled"))
def test_divergence_trains(case: Case):
    problem = case.make()
    x, wanted = attached(problem)
    n = problem.x.numel()
    expected = reverse_over_reverse(
        lambda J: J.reshape(n, n).trace(), problem.oracle_map, problem.x, problem.parameters
    )
    actual = gradients(pf.divergence(problem.f, x), wanted)
    assert_gradients(actual, expected)


SCALARS = [
    case
    for case in SMOOTH
    if "random" not in case.tags and case.make().f(case.make().x).numel() == 1
]


@pytest.mark.parametrize("case", SCALARS, ids=str)
def test_hessian_equals_the_loop(case: Case):
    problem = case.make()
    H = pf.hessian(problem.f, problem.x)
    expected = loop_hessian(problem.oracle_map, problem.x)
    torch.testing.assert_close(H.dense(), expected, **RIGHT)
    assert torch.equal(H.matrix(), H.matrix().mT)


SMALL = [
    case
    for case in cases(without=("tree", "complex", "empty", "random", "surrogate", "coupled"))
    if case.make().x.numel() <= 12
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_laplacian_equals_the_loop(case: Case):
    problem = case.make()
    expected = loop_laplacian(problem.oracle_map, problem.x)
    actual = _or_refused(problem, lambda: pf.laplacian(problem.f, problem.x).detach())
    if actual is not None:
        torch.testing.assert_close(actual, expected, **RIGHT)


@over("batched", "network", without=("random",))
def test_nothing_is_attached_where_gradients_are_off(case: Case):
    problem = case.make()
    with torch.no_grad():
        J = pf.jacobian(problem.f, problem.x.clone().requires_grad_(), batch_dim=0)
        results = [J.matrix(), J.fro_norm(), J.value]
    assert not any(r.requires_grad for r in leaves(results))


@over("batched", "network", without=("random",))
def test_parameters_without_gradients_are_left_out(case: Case):
    """Frozen parameters and a plain point: nothing to train, so nothing attached."""
    problem = case.make()
    for parameter in problem.parameters:
        parameter.requires_grad_(False)
    assert not pf.jacobian(problem.f, problem.x).matrix().requires_grad
