"""Products of matrices: an output depends on a row of one factor and a column of the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pushforward.structure.rules.reductions import prefixes
from pushforward.structure.rules.registry import Call, Numbers, rule

aten = torch.ops.aten


@rule(aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot)
def matmul(call: Call) -> list[Numbers]:
    return [contract(call, call.args[0], call.args[1])]


@rule(aten.addmm, aten.addmv, aten.baddbmm, aten._addmm_activation)
def addmm(call: Call) -> list[Numbers]:
    return [_added(call, contract(call, call.args[1], call.args[2]))]


@rule(aten.addbmm)
def addbmm(call: Call) -> list[Numbers]:
    """The sum of a batch of products."""
    products = contract(call, call.args[1], call.args[2])
    return [_added(call, call.sets.unite_axis(products, 0))]


@rule(aten.addr)
def addr(call: Call) -> list[Numbers]:
    one, other = (_factor(call, t) for t in call.args[1:3])
    return [_added(call, _times(call, _at(one, np.s_[:, None]), _at(other, np.s_[None])))]


def _added(call: Call, product: Numbers) -> Numbers:
    """beta bias + alpha product: a factor of zero leaves nothing of its term."""
    bias = call.numbers(call.args[0])
    if call.kwargs.get("alpha", 1) == 0:
        return bias
    if call.kwargs.get("beta", 1) == 1:
        sunk = call.sunk(call.args[0])
        call.sinks = None if sunk is None else np.broadcast_to(sunk, call.shape)
    return product if call.kwargs.get("beta", 1) == 0 else call.unite(bias, product)


# What a tensor depends on, and where it is not constantly zero (None: everywhere).
Factor = tuple[Numbers, np.ndarray | None]


def _factor(call: Call, tensor: Tensor) -> Factor:
    return call.numbers(tensor), _kept(call, tensor)


def _at(factor: Factor, index: Any) -> Factor:
    numbers, kept = factor
    return numbers[index], None if kept is None else kept[index]


def _times(call: Call, *factors: Factor) -> Numbers:
    """Element by element: nothing where a factor is constantly zero."""
    numbers = call.sets.unite_all([numbers for numbers, _ in factors])
    for _, kept in factors:
        if kept is not None:
            numbers = np.where(kept, numbers, 0)
    return numbers


@rule(aten.linalg_cross)
def cross(call: Call) -> list[Numbers]:
    """Entry i is a_j b_k - a_k b_j, the three in a ring."""
    one, other = (_broadcast(_factor(call, t), call.shape) for t in call.args[:2])
    axis = call.arg(2, "dim", -1)
    terms = [
        _times(call, _rolled(one, -near, axis), _rolled(other, -far, axis))
        for near, far in ((1, 2), (2, 1))
    ]
    return [call.unite(*terms)]


def _broadcast(factor: Factor, shape: Sequence[int]) -> Factor:
    numbers, kept = factor
    wide = np.broadcast_to(numbers, shape)
    return wide, None if kept is None else np.broadcast_to(kept, shape)


def _rolled(factor: Factor, shift: int, axis: int) -> Factor:
    numbers, kept = factor
    return np.roll(numbers, shift, axis), None if kept is None else np.roll(kept, shift, axis)


@rule(aten._trilinear)
def trilinear(call: Call) -> list[Numbers]:
    """The product of three, each with axes put in, summed over some axes."""
    factors = [_factor(call, t) for t in call.args[:3]]
    wide = [_expanded(f, axes) for f, axes in zip(factors, call.args[3:6], strict=True)]
    if all(kept is None for _, kept in wide):
        parts = [call.unite_axes(n, call.args[6], True) for n, _ in wide]
        summed = np.squeeze(call.unite(*parts), tuple(call.args[6]))
    else:
        summed = call.unite_axes(_times(call, *wide), call.args[6])
    return [summed]


def _expanded(factor: Factor, axes: Sequence[int]) -> Factor:
    numbers, kept = factor
    for axis in sorted(axes):
        numbers = np.expand_dims(numbers, axis)
        kept = _lifted(kept, axis)
    return numbers, kept


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
    if len(columns) > len(a):
        return _product(call, b.T, a.T, keep_b.T, keep_a.T).T
    if len(columns) == 0:
        return np.zeros((len(a), b.shape[1]), np.int32)
    cuts: dict[bytes, tuple[Cut, Numbers]] = {}
    parts = []
    for j in columns:
        key = keep_b[:, j].tobytes()
        if key not in cuts:
            kept = keep_a & keep_b[:, j]
            cuts[key] = _cut(kept), _cut_rows(call, a, kept)
        cut, left = cuts[key]
        parts.append(call.sets.unite(left, _below(call, cut, b[:, j])))
    return np.stack(parts, 1)[:, where]


@dataclass(frozen=True)
class Cut:
    """Which inner places each row keeps: those from one start to the next.

    Where each row keeps what the one before it does (a causal mask), only what is new is listed.
    """

    starts: np.ndarray
    inner: np.ndarray
    grows: bool


def _cut(kept: np.ndarray) -> Cut:
    grows = len(kept) > 1 and bool((kept[1:] >= kept[:-1]).all())
    new = kept & ~np.concatenate([kept[:1] & False, kept[:-1]]) if grows else kept
    rows, inner = np.nonzero(new)
    return Cut(np.searchsorted(rows, np.arange(len(kept) + 1)), inner, grows)


def _below(call: Call, cut: Cut, column: Numbers) -> Numbers:
    """For each row the union of what it keeps of a column."""
    found = call.sets.unite_groups(cut.starts, column[cut.inner])
    return prefixes(call, found, 0) if cut.grows else found


def _cut_rows(call: Call, a: Numbers, kept: np.ndarray) -> Numbers:
    """For each row the union of what is kept of itself."""
    return call.sets.unite_axis(np.where(kept, a, 0), 1)


def _unique_columns(b: Numbers, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both = np.concatenate([b, keep.astype(b.dtype)]).T
    _, index, inverse = np.unique(both, axis=0, return_index=True, return_inverse=True)
    return index, inverse.reshape(-1)
