"""Entries in the shapes that are asked for: trees of blocks, sparse matrices."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pushforward.boundary import Layout
from pushforward.compressed import Compressed
from pushforward.operators import scipy_sparse


def in_layout(compressed: Compressed, values: Tensor, layout: str) -> Any:
    """Entries in CSR order as a sparse matrix; the order is that of the pattern already."""
    shape = compressed.pattern.shape
    if layout == "scipy":
        parts = (
            values.detach().cpu().numpy(),
            compressed.pattern.indices,
            compressed.pattern.indptr,
        )
        return scipy_sparse().csr_array(parts, shape=shape)
    if layout == "csr":
        return csr(compressed.starts, compressed.columns, values, shape)
    return torch.sparse_coo_tensor(
        compressed.coordinates, values, shape, check_invariants=False, is_coalesced=True
    )


_WARNED: list[bool] = []


def csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A CSR tensor; torch says once in a process that these are in beta, and is not heard."""
    if _WARNED:
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        made = torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
    _WARNED.append(True)
    return made


def to_csr(sparse: Tensor) -> Tensor:
    with warnings.catch_warnings():  # torch says at each start that CSR is in beta
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        return sparse.to_sparse_csr()


def to_scipy_csr(sparse: Tensor) -> Any:
    rows, columns = sparse.indices().cpu().numpy()
    values = sparse.values().detach().cpu().numpy()
    return scipy_sparse().csr_array((values, (rows, columns)), shape=tuple(sparse.shape))


def arranged(matrix: Tensor, codomain: Layout, domain: Layout) -> Any:
    """Entries ([B,] m, n) as ``out.shape + in.shape``, pytrees nested output first."""
    rows = _cut(matrix, codomain, -2)
    grid = [_cut(row, domain, -1) for row in rows]
    return codomain.arrange(
        [
            domain.arrange(
                [
                    block.reshape((*block.shape[:-2], *out.real_shape, *into.real_shape))
                    for block, into in zip(blocks_of_row, domain.active, strict=True)
                ]
            )
            for blocks_of_row, out in zip(grid, codomain.active, strict=True)
        ]
    )


def _cut(matrix: Tensor, side: Layout, dim: int) -> Sequence[Tensor]:
    """One part of a matrix for each leaf of a side."""
    sizes = [leaf.size for leaf in side.active]
    return (matrix,) if len(sizes) == 1 else matrix.split(sizes, dim)
