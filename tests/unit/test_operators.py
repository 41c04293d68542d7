"""Operators: what is asked of them, and what they refuse."""

import sys

import pytest
import torch
from torch import Tensor

import pushforward as pf
from pushforward.errors import (
    DimensionError,
    InputError,
    MissingDependencyError,
    ShapeError,
)

A = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]], dtype=torch.float64)


def operator(matrix: Tensor = A) -> pf.LinearOperator:
    return pf.aslinearoperator(
        (matrix.shape[0], matrix.shape[1]),
        lambda v: matrix @ v,
        lambda u: matrix.T @ u,
        dtype=matrix.dtype,
    )


def test_entries_come_from_the_shorter_side():
    for matrix in (A, A.T):
        torch.testing.assert_close(operator(matrix).matrix(), matrix)
        torch.testing.assert_close(operator(matrix).dense(), matrix)
        torch.testing.assert_close(operator(matrix).T.matrix(), matrix.T)


def test_the_transpose_of_the_transpose_is_the_operator():
    op = operator()
    assert op.T.T is op
    assert op.T.shape == (3, 2)
    torch.testing.assert_close(op.T @ torch.ones(2, dtype=A.dtype), A.sum(0))
    torch.testing.assert_close(op.T._rmatmul(torch.ones(3, dtype=A.dtype)), A.sum(1))


def test_the_diagonal_of_a_transpose_is_the_diagonal():
    square = operator(A[:, :2])
    torch.testing.assert_close(square.T.diagonal(), square.diagonal())
    torch.testing.assert_close(square.T.trace(), square.trace())


def test_quantities_are_those_of_the_matrix():
    op = operator()
    values = torch.linalg.svdvals(A)
    torch.testing.assert_close(op.svdvals(), values)
    torch.testing.assert_close(op.svdvals(1), values[:1])
    torch.testing.assert_close(op.logvol(), values.log().sum())
    torch.testing.assert_close(op.pdet(), values.prod())
    torch.testing.assert_close(op.log_pdet(), values.log().sum())
    torch.testing.assert_close(op.fro_norm(), A.norm())
    torch.testing.assert_close(op.spectral_norm(), values[0])
    torch.testing.assert_close(op.cond(), values[0] / values[1])
    torch.testing.assert_close(op.stable_rank(), (A.norm() / values[0]) ** 2)
    assert op.rank() == 2


def test_they_have_a_text():
    assert repr(operator()) == "Products(2 x 3, float64, cpu)"
    assert repr(operator().T) == "Products(2 x 3, float64, cpu).T"


@pytest.mark.parametrize("shape", [(3,), (2, -1), (2.0, 3), (1, 2, 3)])
def test_a_shape_is_a_pair_of_sizes(shape):
    with pytest.raises(ShapeError, match=r"pair of sizes \(m, n\)"):
        pf.aslinearoperator(shape, torch.sin, torch.sin)


@pytest.mark.parametrize("v", [torch.ones(2), torch.ones(2, 2), torch.ones(3, 1, 1), 3.0])
def test_vectors_are_columns(v):
    with pytest.raises(ShapeError, match=r"@ expects a vector \(3,\) or a block \(3, k\), got"):
        operator() @ v


@pytest.mark.parametrize("what", ["diagonal", "trace", "slogdet", "logabsdet"])
def test_what_wants_a_square(what: str):
    for op in (operator(), pf.jacobian(lambda x: x[:2], torch.ones(3))):
        with pytest.raises(DimensionError, match=rf"{what} expects a square operator, got 2 x 3"):
            getattr(op, what)()


@pytest.mark.parametrize("k", [-1, 3])
def test_there_are_only_so_many_singular_values(k: int):
    with pytest.raises(InputError, match=r"between 0 and min\(m, n\) = 2"):
        operator().svdvals(k)


class TestOfJacobians:
    def test_layouts_that_are_none(self):
        with pytest.raises(InputError, match=r'"csr", "coo" or "scipy", got \'bsr\''):
            pf.jacobian(torch.sin, torch.ones(3)).sparse("bsr")

    def test_no_layout_and_no_scipy_operator_of_a_batch(self):
        J = pf.jacobian(torch.sin, torch.ones(4, 3), batch_dim=0)
        with pytest.raises(InputError, match="sparse expects one map, got batch_dim=0"):
            J.sparse()
        with pytest.raises(InputError, match="to_scipy expects one map, got batch_dim=0"):
            J.to_scipy()

    def test_scipy_is_optional(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "scipy.sparse", None)
        J = pf.jacobian(torch.sin, torch.ones(3))
        with pytest.raises(MissingDependencyError, match="pip install scipy"):
            J.to_scipy()
        with pytest.raises(MissingDependencyError, match="pip install scipy"):
            J.sparse("scipy")
        assert J.sparse("coo").shape == (3, 3)
