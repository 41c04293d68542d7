"""Laws that every `LinearOperator` obeys, whatever it is made of."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from lawbook import EXACT, normal
from torch import Tensor

import pushforward as pf


class Diagonal(pf.LinearOperator):
    """A diagonal matrix, as a user would write it."""

    def __init__(self, entries: Tensor) -> None:
        super().__init__((len(entries), len(entries)), dtype=entries.dtype)
        self.entries = entries

    def push(self, v: Tensor) -> Tensor:
        return self.entries[:, None] * v

    def pull(self, u: Tensor) -> Tensor:
        return self.entries[:, None] * u


def _of_matrix(matrix: Tensor) -> pf.LinearOperator:
    return pf.aslinearoperator(
        tuple(matrix.shape), lambda v: matrix @ v, lambda u: matrix.mT @ u, dtype=matrix.dtype
    )


def _network(x: Tensor) -> Tensor:
    return torch.tanh(normal(3, 4, seed=1) @ x)


MATRIX = normal(3, 4).numpy()
OPERATORS: dict[str, Callable[[], pf.LinearOperator]] = {
    "jacobian_wide": lambda: pf.jacobian(_network, normal(4)),
    "jacobian_tall": lambda: pf.jacobian(lambda x: torch.cat([x, x.sin()]), normal(3)),
    "jacobian_by_columns": lambda: pf.jacobian(
        lambda x: torch.cat([x, x.sin()]), normal(3), plan="forward"
    ),
    "jacobian_one_by_one": lambda: pf.jacobian(_network, normal(4), plan="loop"),
    "jacobian_to_one": lambda: pf.jacobian(lambda x: x.prod(), normal(4)),
    "jacobian_from_one": lambda: pf.jacobian(lambda t: normal(3) * t.sin(), normal(1)),
    "jacobian_complex": lambda: pf.jacobian(lambda z: z * z, torch.complex(normal(2), normal(2))),
    "hessian": lambda: pf.hessian(lambda x: x.prod() + (x**3).sum(), normal(4)),
    "hessian_one_by_one": lambda: pf.hessian(lambda x: x.prod(), normal(4), plan="loop"),
    "of_a_matrix": lambda: pf.aslinearoperator(normal(3, 4)),
    "of_an_array": lambda: pf.aslinearoperator(normal(4, 3).numpy()),
    "of_a_sparse_matrix": lambda: pf.aslinearoperator(normal(3, 4).to_sparse()),
    "of_scipy": lambda: pf.aslinearoperator(scipy.sparse.linalg.aslinearoperator(MATRIX)),
    "of_scipy_sparse": lambda: pf.aslinearoperator(scipy.sparse.csr_array(MATRIX)),
    "sum": lambda: pf.aslinearoperator(normal(3, 4)) + pf.jacobian(_network, normal(4)),
    "difference": lambda: pf.aslinearoperator(normal(3, 4)) - _of_matrix(normal(3, 4, seed=3)),
    "negative": lambda: -pf.jacobian(_network, normal(4)),
    "scaled": lambda: 2.5 * pf.jacobian(_network, normal(4)) / 3,
    "product": lambda: pf.jacobian(_network, normal(4)) @ pf.aslinearoperator(normal(4, 2)),
    "product_of_transposes": lambda: _of_matrix(normal(3, 4)).T @ _of_matrix(normal(2, 3)).T,
    "gram": lambda: pf.jacobian(lambda x: torch.cat([x, x.sin()]), normal(3)).gram(),
    "gram_of_the_transpose": lambda: pf.jacobian(_network, normal(4)).T.gram(),
    "shifted": lambda: pf.aslinearoperator(normal(4, 4)).shifted(-0.5),
    "shifted_gram": lambda: (0.5 * _of_matrix(normal(3, 4)).gram()).shifted(2),
    "of_functions": lambda: _of_matrix(normal(3, 4)),
    "of_functions_tall": lambda: _of_matrix(normal(5, 2)),
    "subclass": lambda: Diagonal(normal(4)),
    "transpose": lambda: _of_matrix(normal(3, 4)).T,
    "transpose_of_jacobian": lambda: pf.jacobian(_network, normal(4)).T,
    "one_by_one": lambda: _of_matrix(normal(1, 1)),
    "no_rows": lambda: _of_matrix(normal(0, 3)),
    "no_columns": lambda: _of_matrix(normal(3, 0)),
    "zero": lambda: _of_matrix(torch.zeros(3, 3, dtype=torch.float64)),
}


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest) -> pf.LinearOperator:
    return OPERATORS[request.param]()


def test_adjointness(operator: pf.LinearOperator):
    m, n = operator.shape
    v, u = normal(n, 3, seed=1), normal(m, 3, seed=2)
    left, right = (u * (operator @ v)).sum(0), ((operator.T @ u) * v).sum(0)
    torch.testing.assert_close(left, right, **EXACT)


def test_linearity(operator: pf.LinearOperator):
    m, n = operator.shape
    v, w, u, z = (normal(s, 2, seed=i) for i, s in enumerate((n, n, m, m)))
    for product, a, b in ((operator.push, v, w), (operator.pull, u, z)):
        torch.testing.assert_close(product(2 * a - b), 2 * product(a) - product(b), **EXACT)


def test_columns_of_a_block(operator: pf.LinearOperator):
    m, n = operator.shape
    v, u = normal(n, 3, seed=1), normal(m, 3, seed=2)
    for k in range(3):
        torch.testing.assert_close(operator.push(v)[:, k], operator.push(v[:, [k]])[:, 0], **EXACT)
        torch.testing.assert_close(operator.pull(u)[:, k], operator.pull(u[:, [k]])[:, 0], **EXACT)


def test_unit_vectors_make_the_matrix(operator: pf.LinearOperator):
    m, n = operator.shape
    matrix = operator.matrix()
    assert matrix.shape == (m, n)
    torch.testing.assert_close(operator.push(torch.eye(n, dtype=matrix.dtype)), matrix, **EXACT)
    torch.testing.assert_close(operator.pull(torch.eye(m, dtype=matrix.dtype)), matrix.mT, **EXACT)


def test_transpose(operator: pf.LinearOperator):
    torch.testing.assert_close(operator.T.T.matrix(), operator.matrix(), **EXACT)
    assert operator.T.T.shape == operator.shape
    assert operator.T.shape == operator.shape[::-1]
    torch.testing.assert_close(operator.T.matrix(), operator.matrix().mT, **EXACT)


def test_an_empty_block_is_an_empty_block(operator: pf.LinearOperator):
    m, n = operator.shape
    assert operator.push(normal(n, 0)).shape == (m, 0)
    assert operator.pull(normal(m, 0)).shape == (n, 0)


def test_scipy_has_the_same_products(operator: pf.LinearOperator):
    m, n = operator.shape
    matrix, theirs = operator.matrix().detach().numpy(), operator.to_scipy()
    assert theirs.shape == (m, n)
    v, u = normal(n, 2, seed=1).numpy(), normal(m, 2, seed=2).numpy()
    np.testing.assert_allclose(theirs @ v, matrix @ v, atol=1e-12)
    np.testing.assert_allclose(theirs.T @ u, matrix.T @ u, atol=1e-12)
    np.testing.assert_allclose(theirs @ v[:, 0], matrix @ v[:, 0], atol=1e-12)


def test_quantities_are_those_of_the_matrix(operator: pf.LinearOperator):
    matrix = operator.matrix().detach()
    values = torch.linalg.svdvals(matrix)
    top = values.max() if values.numel() else matrix.new_zeros(())
    torch.testing.assert_close(operator.fro_norm().detach(), matrix.norm(), **EXACT)
    torch.testing.assert_close(operator.svdvals().detach(), values, **EXACT)
    torch.testing.assert_close(operator.spectral_norm().detach(), top, **EXACT)
    nonzero = values[values > max(matrix.shape) * torch.finfo(matrix.dtype).eps * top]
    assert operator.rank() == len(nonzero)
    torch.testing.assert_close(operator.pdet().detach(), nonzero.prod(), rtol=1e-9, atol=1e-12)
    assert not operator.logvol().isnan()


def test_square_operators_have_a_trace(operator: pf.LinearOperator):
    m, n = operator.shape
    if m != n:
        with pytest.raises(pf.errors.DimensionError, match="square operator, got"):
            operator.trace()
        return
    matrix = operator.matrix().detach()
    torch.testing.assert_close(operator.diagonal().detach(), matrix.diagonal(), **EXACT)
    torch.testing.assert_close(operator.trace().detach(), matrix.trace(), **EXACT)
    sign, logabsdet = torch.linalg.slogdet(matrix)
    ours = operator.slogdet()
    assert ours[0] == sign
    torch.testing.assert_close(ours[1].detach(), logabsdet, **EXACT)
    torch.testing.assert_close(operator.logabsdet().detach(), logabsdet, **EXACT)


def test_wrong_lengths_are_refused(operator: pf.LinearOperator):
    m, n = operator.shape
    with pytest.raises(pf.errors.ShapeError, match="expects"):
        _ = operator @ normal(n + 7, 2)
    with pytest.raises(pf.errors.ShapeError, match="expects"):
        _ = operator.T @ normal(m + 7, 2)


def test_the_text_names_the_shape(operator: pf.LinearOperator):
    m, n = operator.shape
    assert f"{m} x {n}" in repr(operator) or f"{n} x {m}" in repr(operator)


def test_an_operator_needs_both_products():
    class Half(pf.LinearOperator):
        def push(self, v: Tensor) -> Tensor:
            return v

    with pytest.raises(TypeError, match="pull"):
        Half((3, 3))


def test_symmetry_is_known_where_it_must_be():
    J = pf.jacobian(_network, normal(4))
    for known in (J.gram(), J.T @ J, J @ J.T, 2 * J.gram() + J.gram(), J.gram().shifted(1)):
        assert known.symmetric
        assert known.semidefinite
        assert known.T is known
    assert not (-J.gram()).semidefinite
    assert not J.gram().shifted(-1.0).semidefinite
    assert pf.hessian(lambda x: x.prod(), normal(4)).symmetric
    assert not J.symmetric


def test_expressions_are_those_of_matrices():
    J, A = pf.jacobian(_network, normal(4)), pf.aslinearoperator(normal(3, 4))
    expression = (2 * J - A / 4).T @ J + (J.T @ A).shifted(3)
    j, a = J.matrix().detach(), A.matrix()
    wanted = (2 * j - a / 4).T @ j + j.T @ a + 3 * torch.eye(4, dtype=j.dtype)
    torch.testing.assert_close(expression.matrix().detach(), wanted, **EXACT)
    torch.testing.assert_close(expression.trace().detach(), wanted.trace(), **EXACT)


def _batched() -> dict[str, pf.LinearOperator]:
    J = pf.jacobian(lambda x: torch.tanh(x @ normal(4, 3)), normal(5, 4), batch_dim=0)
    A = pf.aslinearoperator(normal(5, 3, 4))
    scales = torch.arange(5.0, dtype=torch.float64)
    return {
        "jacobian": J,
        "matrices": A,
        "functions": pf.aslinearoperator(
            (3, 4),
            lambda v: A.entries @ v,
            lambda u: A.entries.mT @ u,
            dtype=torch.float64,
            batch=5,
        ),
        "sum": J + A,
        "product": J @ A.T,
        "gram": J.gram(),
        "scaled": J * scales,
        "shifted": J.gram().shifted(scales),
        "transpose": (J - A).T,
    }


@pytest.mark.parametrize("name", _batched())
def test_batches_of_operators(name: str):
    operator = _batched()[name]
    matrices, (m, n) = operator.matrix().detach(), operator.shape
    assert matrices.shape == (5, m, n)
    assert operator.batch == 5
    v, u = normal(5, n, 2, seed=1), normal(5, m, 2, seed=2)
    torch.testing.assert_close((operator @ v).detach(), matrices @ v, **EXACT)
    torch.testing.assert_close((operator.T @ u).detach(), matrices.mT @ u, **EXACT)
    torch.testing.assert_close((operator @ v[..., 0]).detach(), (matrices @ v)[..., 0], **EXACT)
    norms = torch.linalg.matrix_norm(matrices)
    torch.testing.assert_close(operator.fro_norm().detach(), norms, **EXACT)
    with pytest.raises(pf.errors.InputError, match=r"to_scipy expects one"):
        operator.to_scipy()
    if m == n:
        diagonals = matrices.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(operator.trace().detach(), diagonals.sum(-1), **EXACT)


@pytest.mark.parametrize("make", [lambda A: A.gram(), lambda A: (2 * A + A) @ A.T, lambda A: -A])
def test_gradients_go_through(make):
    entries = normal(3, 3).requires_grad_()
    v = normal(3, 2, seed=4)
    (found,) = torch.autograd.grad((make(pf.aslinearoperator(entries)) @ v).square().sum(), entries)
    dense = make(pf.aslinearoperator(entries)).matrix() @ v
    torch.testing.assert_close(found, *torch.autograd.grad(dense.square().sum(), entries), **EXACT)


class TestRefusals:
    A = pf.aslinearoperator(normal(3, 4))

    @pytest.mark.parametrize(
        ("act", "error", "words"),
        [
            (
                lambda A: A + A.T,
                pf.errors.ShapeError,
                "operators of one shape, got 3 x 4 and 4 x 3",
            ),
            (lambda A: A @ A, pf.errors.ShapeError, "4 rows on the right, got 3 x 4"),
            (lambda A: A.shifted(1), pf.errors.DimensionError, "shifted expects a square operator"),
            (
                lambda A: A * torch.ones(2),
                pf.errors.ShapeError,
                r"expects a number, got shape \(2,\)",
            ),
            (lambda A: A * 1j, pf.errors.InputError, "expects a real number"),
            (
                lambda A: A + pf.aslinearoperator(torch.ones(3, 4)),
                pf.errors.InputError,
                "of one dtype, device and batch",
            ),
            (lambda A: pf.aslinearoperator(torch.ones(3)), pf.errors.ShapeError, "a matrix"),
            (lambda A: pf.aslinearoperator(torch.eye(3).long()), pf.errors.InputError, "int64"),
            (lambda A: pf.aslinearoperator("A"), pf.errors.InputError, "functions, got str"),
            (lambda A: pf.aslinearoperator((3, 4), lambda v: v), pf.errors.InputError, "functions"),
            (
                lambda A: pf.aslinearoperator(scipy.sparse.csr_array(MATRIX * 1j)),
                pf.errors.InputError,
                "on real numbers",
            ),
        ],
    )
    def test_of_what_does_not_fit(self, act, error, words):
        with pytest.raises(error, match=words):
            act(self.A)

    def test_of_numbers_added(self):
        with pytest.raises(TypeError, match="unsupported operand"):
            self.A + 1

    def test_of_gradients_through_scipy(self):
        theirs = pf.aslinearoperator(scipy.sparse.csr_array(MATRIX))
        with pytest.raises(pf.errors.InputError, match="without a graph"):
            theirs @ normal(4).requires_grad_()
