"""Sparse tensors: what they store has sets, and where they store it is structure."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from pushforward.structure.rules.registry import Call, Numbers, Rule
from pushforward.structure.rules.scattering import joined

aten = torch.ops.aten

# These make a sparse tensor of values that stay where they are; the other tensors are indices.
MAKERS = frozenset(
    {
        *(aten._sparse_coo_tensor_with_dims_and_tensors, aten._sparse_coo_tensor_unsafe),
        *(aten._sparse_compressed_tensor_unsafe, aten._sparse_compressed_tensor_with_dims),
    }
)
_COMPRESSED = {
    torch.sparse_csr: (Tensor.crow_indices, Tensor.col_indices),
    torch.sparse_csc: (Tensor.ccol_indices, Tensor.row_indices),
}


def stored(tensor: Tensor) -> Tensor:
    """What a tensor keeps in its storage: itself, or the values of a sparse one."""
    if tensor.layout is torch.strided:
        return tensor
    return tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()


def are_strided(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor is sparse."""
    return all(t.layout is torch.strided for t in tensors)


def sparse_rule(call: Call) -> Rule | None:
    """The rule of a call where plain matrices meet sparse ones; None where there is none."""
    given = [t for t in call.tensors if t.layout is not torch.strided]
    plain = len(given) == 1 and _is_matrix(given[0])
    known = plain and are_strided(call.outputs)
    return _SPARSE.get(call.func.overloadpacket) if known else None


def _is_matrix(tensor: Tensor) -> bool:
    layouts = (torch.sparse_coo, *_COMPRESSED)
    return tensor.layout in layouts and tensor.dim() == 2 and stored(tensor).dim() == 1


def _product(call: Call, one: Tensor, other: Tensor) -> Numbers:
    """A product of two matrices, or of a matrix and a vector, one of them sparse."""
    if one.layout is torch.strided:
        return _gathered(call, other, call.numbers(one).T, _zeros(call, one), True).T
    rows = call.numbers(other)
    zero = call.equals(other, 0)
    if rows.ndim == 2:
        return _gathered(call, one, rows, zero, False)
    zero = None if zero is None else zero[:, None]
    return _gathered(call, one, rows[:, None], zero, False)[:, 0]


def _zeros(call: Call, tensor: Tensor) -> np.ndarray | None:
    zero = call.equals(tensor, 0)
    return None if zero is None else zero.T


def _gathered(
    call: Call, matrix: Tensor, rows: Numbers, zero: np.ndarray | None, transposed: bool
) -> Numbers:
    """The sets of a sparse matrix, transposed or not, times a plain one."""
    size = matrix.shape[1 if transposed else 0]
    targets, sources, values = _entries(call, matrix)
    if transposed:
        targets, sources = sources, targets
    members = call.sets.unite(values[:, None], rows[sources])
    if zero is not None:
        members = np.where(zero[sources], 0, members)
    room = np.zeros((size, rows.shape[1]), np.int32)
    places = np.arange(room.size).reshape(room.shape)[targets]
    return joined(call, room, places, members, True)


def _entries(call: Call, matrix: Tensor) -> tuple[np.ndarray, np.ndarray, Numbers]:
    """Rows, columns and sets of what is stored and not constantly zero."""
    call.noted(matrix, False)
    rows, columns = _coordinates(matrix)
    values = call.numbers(matrix)
    kept = (values != 0) | (stored(matrix).detach() != 0).cpu().numpy()
    return rows[kept], columns[kept], values[kept]


def _coordinates(matrix: Tensor) -> tuple[np.ndarray, np.ndarray]:
    if matrix.layout is torch.sparse_coo:
        rows, columns = matrix._indices().cpu().numpy()
        return rows, columns
    bounds, inner = (read(matrix).cpu().numpy() for read in _COMPRESSED[matrix.layout])
    outer = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    return (outer, inner) if matrix.layout is torch.sparse_csr else (inner, outer)


def _matmul(call: Call) -> list[Numbers]:
    return [_product(call, call.args[0], call.args[1])]


def _addmm(call: Call) -> list[Numbers]:
    bias, one, other = call.args[:3]
    found = _product(call, one, other)
    return [found if call.kwargs.get("beta", 1) == 0 else call.unite(bias, found)]


def _to_dense(call: Call) -> list[Numbers]:
    rows, columns, values = _entries(call, call.args[0])
    places = rows * call.shape[1] + columns
    return [joined(call, np.zeros(call.shape, np.int32), places, values, True)]


_SPARSE: dict[object, Rule] = {
    **dict.fromkeys((aten.mm, aten.mv), _matmul),
    **dict.fromkeys((aten.addmm, aten.addmv, aten._sparse_addmm), _addmm),
    aten._to_dense: _to_dense,
}
