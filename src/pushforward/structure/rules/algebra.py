"""Linear algebra: an output depends on the whole matrix of its own batch, and on its own column."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pushforward.structure.rules.reductions import prefixes
from pushforward.structure.rules.registry import Call, Numbers, rule, without_derivative

aten = torch.ops.aten

# How many of the last axes belong to one problem, where it is not two.
_VECTORS = {"linalg_householder_product": (2, 1), "ormqr": (2, 1, 2)}


@rule(aten.linalg_inv_ex, aten.linalg_matrix_exp, aten._linalg_svd, aten._linalg_eigh)
@rule(aten.linalg_eig, aten._linalg_eigvals, aten.linalg_lu_factor_ex, aten.cholesky_inverse)
@rule(aten.linalg_householder_product, aten.ormqr, aten.geqrf, aten.linalg_ldl_factor_ex)
@rule(aten._linalg_det)
def whole(call: Call) -> list[Numbers]:
    """Every output by every entry of the matrices of the same batch."""
    return _spread(call, _problem(call))


@rule(aten.linalg_pinv)
def pinv(call: Call) -> list[Numbers]:
    tolerances = [without_derivative(call.numbers(call.kwargs.get(k))) for k in ("atol", "rtol")]
    return _spread(call, call.unite(_united(call, call.args[0]), *tolerances))


@rule(aten._linalg_slogdet)
def slogdet(call: Call) -> list[Numbers]:
    sign, *rest = _spread(call, _problem(call))
    return [sign if call.outputs[0].is_complex() else without_derivative(sign), *rest]


@rule(aten.linalg_cholesky_ex, aten.cholesky)
def cholesky(call: Call) -> list[Numbers]:
    """A triangle; what lies outside of it is a constant zero."""
    found, *rest = _spread(call, _problem(call))
    upper = bool(call.arg(1, "upper", False))
    return [_triangle(found, call.shape, upper), *rest]


@rule(aten.linalg_qr)
def qr(call: Call) -> list[Numbers]:
    q, r = _spread(call, _problem(call))
    return [q, _triangle(r, tuple(call.outputs[1].shape), True)]


@rule(aten.linalg_lu)
def lu(call: Call) -> list[Numbers]:
    order, lower, upper = _spread(call, _problem(call))
    shapes = [tuple(t.shape) for t in call.outputs]
    below = _triangle(lower, shapes[1], False, -1)
    return [without_derivative(order), below, _triangle(upper, shapes[2], True)]


@rule(aten.lu_unpack)
def lu_unpack(call: Call) -> list[Numbers]:
    """Two triangles of one matrix."""
    numbers, order = call.numbers(call.args[0]), call.numbers(call.args[1])
    shapes = [tuple(t.shape) for t in call.outputs]
    order = call.sets.unite_axis(order)[..., None, None]
    cut = [numbers[..., : s[-2], : s[-1]] if len(s) > 1 else numbers for s in shapes]
    if not call.arg(2, "unpack_data", True):
        return [order, np.zeros((), np.int32), np.zeros((), np.int32)]
    below = _triangle(cut[1], shapes[1], False, -1)
    return [without_derivative(order), below, _triangle(cut[2], shapes[2], True)]


def _triangle(numbers: Numbers, shape: tuple[int, ...], upper: bool, shift: int = 0) -> Numbers:
    cut = np.triu if upper else np.tril
    return cut(np.broadcast_to(numbers, shape), shift)


@rule(aten._linalg_solve_ex)
def solve(call: Call) -> list[Numbers]:
    """Each column of the result by the whole matrix and its own right-hand side."""
    matrix, right = call.args[:2]
    own = _united(call, matrix)
    if right.dim() == 1 or tuple(right.shape) == tuple(matrix.shape[:-1]):
        found = call.unite(own, call.sets.unite_axis(call.numbers(right)))[..., None]
    else:
        found = _by_column(call, own, right, call.arg(2, "left", True))
    return [found, *_spread(call, own)[1:]]


@rule(aten.linalg_lu_solve, aten.linalg_ldl_solve)
def factored_solve(call: Call) -> list[Numbers]:
    factors, pivots, right = call.args[:3]
    own = call.unite(_united(call, factors), _united(call, pivots, 1))
    return [_by_column(call, own, right, call.kwargs.get("left", True))]


@rule(aten.cholesky_solve)
def cholesky_solve(call: Call) -> list[Numbers]:
    right, factor = call.args[:2]
    return [_by_column(call, _united(call, factor), right, True)]


@rule(aten.linalg_lstsq)
def lstsq(call: Call) -> list[Numbers]:
    """Solutions and residuals column by column; the rank has no derivative."""
    matrix, right = call.args[:2]
    own = _united(call, matrix)
    solution = _by_column(call, own, right, True)
    residuals = solution[..., 0, :] if call.outputs[1].numel() else np.zeros((), np.int32)
    rank, values = _spread(call, own)[2:]
    return [solution, residuals, without_derivative(rank), values]


@rule(aten.linalg_solve_triangular)
def solve_triangular(call: Call) -> list[Numbers]:
    """Row i of the result by the rows up to i, of the matrix and of the right-hand side."""
    upper, left = call.kwargs["upper"], call.kwargs.get("left", True)
    unit = bool(call.kwargs.get("unitriangular", False))
    return [_substituted(call, call.args[0], call.args[1], upper, left, unit)]


@rule(aten.triangular_solve)
def triangular_solve(call: Call) -> list[Numbers]:
    right, matrix = call.args[:2]
    upper, transposed = call.arg(2, "upper", True), call.arg(3, "transpose", False)
    unit = bool(call.arg(4, "unitriangular", False))
    if transposed:  # A^T X = B is X^T A = B^T
        found = _substituted(call, matrix, right, upper, False, unit, turned=True)
    else:
        found = _substituted(call, matrix, right, upper, True, unit)
    return [found, call.numbers(matrix)]


def _substituted(
    call: Call,
    matrix: Tensor,
    right: Tensor,
    upper: bool,
    left: bool,
    unit: bool,
    turned: bool = False,
) -> Numbers:
    """Forward substitution, with everything turned into A X = B with a lower triangle.

    ``turned`` says that a right-hand side of X A = B is given transposed.
    """
    a, b = call.numbers(matrix), call.numbers(right)
    zero = call.equals(matrix, 0)
    kept = np.ones(a.shape, bool) if zero is None else ~zero
    if not left:
        a, kept, upper = a.swapaxes(-1, -2), kept.swapaxes(-1, -2), not upper
        b = b if turned else b.swapaxes(-1, -2)
    if upper:
        a, kept, b = a[..., ::-1, ::-1], kept[..., ::-1, ::-1], b[..., ::-1, :]
    own = call.sets.unite_axis(np.tril(a, -1 if unit else 0))
    found = _downwards(call, call.unite(own[..., None], b), kept)
    found = found[..., ::-1, :] if upper else found
    return found if left or turned else found.swapaxes(-1, -2)


def _downwards(call: Call, rows: Numbers, kept: np.ndarray) -> Numbers:
    """Each row joined by the rows above it that its row of the matrix reaches."""
    if kept[..., *np.tril_indices(kept.shape[-1], -1)].all():
        return prefixes(call, np.moveaxis(rows, -2, 0), -2)
    found = np.array(rows)
    for i in range(1, found.shape[-2]):
        reached = kept[..., i, :i]
        if reached.all():
            above = found[..., :i, :]
        else:
            above = np.where(reached[..., None], found[..., :i, :], 0)
        above = call.sets.unite_axis(above, -2)
        found[..., i, :] = call.sets.unite(above, found[..., i, :])
    return found


@rule(aten._cdist_forward, aten._euclidean_dist)
def distances(call: Call) -> list[Numbers]:
    """Between two rows."""
    one, other = (call.sets.unite_axis(call.numbers(x)) for x in call.args[:2])
    return [call.sets.unite(one[..., :, None], other[..., None, :])]


@rule(aten._pdist_forward)
def pair_distances(call: Call) -> list[Numbers]:
    rows = call.sets.unite_axis(call.numbers(call.args[0]))
    one, other = np.triu_indices(len(rows), 1)
    return [call.sets.unite(rows[one], rows[other])]


def _united(call: Call, tensor: Tensor, rank: int = 2) -> Numbers:
    """One set for each batch: of all entries along the last axes."""
    numbers = call.numbers(tensor)
    return call.unite_axes(numbers, range(numbers.ndim - rank, numbers.ndim))


def _problem(call: Call) -> Numbers:
    """One set for each batch, of all tensors together."""
    ranks = _VECTORS.get(call.op, (2,))
    parts = [_united(call, t, rank) for t, rank in zip(call.tensors, ranks, strict=True)]
    return call.unite(*parts)


def _spread(call: Call, batch: Numbers) -> list[Numbers]:
    """The sets of each output from those of the batches."""
    return [batch.reshape((*batch.shape, *[1] * _extra(t, batch))) for t in call.outputs]


def _extra(output: Tensor, batch: Any) -> int:
    return max(0, output.dim() - batch.ndim)


def _by_column(call: Call, own: Numbers, right: Tensor, left: bool) -> Numbers:
    """What a solution depends on: the columns of what stands on the right, or its rows."""
    columns = call.unite_axes(call.numbers(right), [-2 if left else -1], True)
    return call.unite(own[..., None, None], columns)
