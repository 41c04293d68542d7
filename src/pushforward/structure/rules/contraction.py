"""Products of matrices: an output depends on a row of one factor and a column of the other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pushforward.structure.rules.registry import Call, Numbers, rule

aten = torch.ops.aten


@rule(aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot)
def matmul(call: Call) -> list[Numbers]:
    return [contract(call, call.args[0], call.args[1])]


@rule(aten.addmm, aten.addmv, aten.baddbmm, aten._addmm_activation)
def addmm(call: Call) -> list[Numbers]:
    bias, one, other = call.args[:3]
    return [call.unite(bias, contract(call, one, other))]


@rule(aten.addr)
def addr(call: Call) -> list[Numbers]:
    one, other = call.numbers(call.args[1]), call.numbers(call.args[2])
    return [call.unite(call.args[0], call.unite(one[:, None], other[None, :]))]


@rule(aten.linear)
def linear(call: Call) -> list[Numbers]:
    hidden, weight, bias = call.args[0], call.args[1], call.arg(2, "bias")
    rows = hidden.reshape(-1, hidden.shape[-1]) if hidden.dim() != 2 else hidden
    numbers = call.numbers(hidden).reshape(-1, hidden.shape[-1])
    found = _product(
        call, numbers, call.numbers(weight).T, _kept(call, rows), _transposed(_kept(call, weight))
    )
    return [call.unite(found.reshape(call.shape), call.numbers(bias))]


def contract(call: Call, one: Tensor, other: Tensor) -> Numbers:
    """The sets of a product of vectors, matrices or batches of matrices."""
    a, b = call.numbers(one), call.numbers(other)
    keep_a, keep_b = _kept(call, one), _kept(call, other)
    if a.ndim == 3:
        return _batched(call, a, b, keep_a, keep_b)
    squeeze_row, squeeze_column = a.ndim == 1, b.ndim == 1
    a, keep_a = (a[None], _lifted(keep_a, 0)) if squeeze_row else (a, keep_a)
    b, keep_b = (b[:, None], _lifted(keep_b, 1)) if squeeze_column else (b, keep_b)
    found = _product(call, a, b, keep_a, keep_b)
    found = found[0] if squeeze_row else found
    return found[..., 0] if squeeze_column else found


def _kept(call: Call, factor: Tensor) -> np.ndarray | None:
    """Where a factor is not constantly zero; None where it is so nowhere."""
    zero = call.equals(factor, 0)
    return None if zero is None else ~zero


def _lifted(kept: np.ndarray | None, axis: int) -> np.ndarray | None:
    return None if kept is None else np.expand_dims(kept, axis)


def _transposed(kept: np.ndarray | None) -> np.ndarray | None:
    return None if kept is None else kept.T


def _batched(
    call: Call, a: Numbers, b: Numbers, keep_a: np.ndarray | None, keep_b: np.ndarray | None
) -> Numbers:
    if keep_a is None and keep_b is None:
        rows, columns = call.sets.unite_axis(a, 2), call.sets.unite_axis(b, 1)
        return call.sets.unite(rows[:, :, None], columns[:, None, :])
    done: dict[tuple[bytes, ...], Numbers] = {}
    found = []
    for i in range(len(a)):
        parts = (a[i], b[i], *(k[i] if k is not None else None for k in (keep_a, keep_b)))
        key = tuple(b"" if part is None else part.tobytes() for part in parts)
        if key not in done:
            done[key] = _product(call, *parts)
        found.append(done[key])
    return np.stack(found)


def _product(
    call: Call, a: Numbers, b: Numbers, keep_a: np.ndarray | None, keep_b: np.ndarray | None
) -> Numbers:
    """Matrices (I, K) and (K, J): what entry (i, j) depends on."""
    if keep_a is None and keep_b is None:
        rows, columns = call.sets.unite_axis(a, 1), call.sets.unite_axis(b, 0)
        return call.sets.unite(rows[:, None], columns[None, :])
    keep_a = np.ones(a.shape, bool) if keep_a is None else keep_a
    keep_b = np.ones(b.shape, bool) if keep_b is None else keep_b
    columns, where = _unique_columns(b, keep_b)
    if len(columns) <= len(a):
        parts = [_against(call, a, keep_a, b[:, j], keep_b[:, j]) for j in columns]
        return np.stack(parts, 1)[:, where] if parts else np.zeros((len(a), b.shape[1]), np.int32)
    return _product(call, b.T, a.T, keep_b.T, keep_a.T).T


def _unique_columns(b: Numbers, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both = np.concatenate([b, keep.astype(b.dtype)]).T
    _, index, inverse = np.unique(both, axis=0, return_index=True, return_inverse=True)
    return index, inverse.reshape(-1)


def _against(
    call: Call, a: Numbers, keep_a: np.ndarray, column: Numbers, keep: np.ndarray
) -> Numbers:
    """One column of the product: for each row, the union over what is not cut away."""
    rows, inner = np.nonzero(keep_a & keep)
    members = call.sets.unite(a[rows, inner], column[inner])
    starts = np.searchsorted(rows, np.arange(len(a) + 1))
    return call.sets.unite_groups(starts, members)
