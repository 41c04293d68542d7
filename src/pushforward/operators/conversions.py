"""Operators out of what there is: matrices, scipy's operators, pairs of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pushforward.errors import InputError, ShapeError
from pushforward.operators.base import LinearOperator


class _Products(LinearOperator):
    """An operator made of two functions."""

    def __init__(
        self,
        shape: tuple[int, int],
        push: Callable[[Tensor], Tensor],
        pull: Callable[[Tensor], Tensor],
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        batch: int | None,
    ) -> None:
        super().__init__(shape, dtype=dtype, device=device, batch=batch)
        self._push, self._pull = push, pull

    def push(self, v: Tensor) -> Tensor:
        return self._push(v)

    def pull(self, u: Tensor) -> Tensor:
        return self._pull(u)


class _Matrix(LinearOperator):
    """A matrix that is there, dense or sparse; or one a sample."""

    def __init__(self, entries: Tensor) -> None:
        m, n = entries.shape[-2:]
        batch = entries.shape[0] if entries.dim() == 3 else None
        super().__init__((m, n), dtype=entries.dtype, device=entries.device, batch=batch)
        self.entries = entries

    def push(self, v: Tensor) -> Tensor:
        return self.entries @ v

    def pull(self, u: Tensor) -> Tensor:
        return self.entries.mT @ u

    def matrix(self) -> Tensor:
        return self.entries if self.entries.layout == torch.strided else self.entries.to_dense()


class _OfScipy(LinearOperator):
    """An operator or a sparse matrix of scipy, which knows numpy arrays alone: no gradients."""

    def __init__(self, theirs: Any, dtype: torch.dtype) -> None:
        super().__init__((int(theirs.shape[0]), int(theirs.shape[1])), dtype=dtype)
        self._theirs, self._transposed = theirs, theirs.T

    def push(self, v: Tensor) -> Tensor:
        return self._product(self._theirs, v)

    def pull(self, u: Tensor) -> Tensor:
        return self._product(self._transposed, u)

    def _product(self, theirs: Any, block: Tensor) -> Tensor:
        if block.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "an operator of scipy expects vectors without a graph, since it has no gradients; "
                "detach them, or pass the entries as a tensor"
            )
        if not block.shape[-1]:
            return block.new_zeros(theirs.shape[0], 0)
        return torch.as_tensor(np.ascontiguousarray(theirs @ block.numpy()), dtype=self.dtype)


def aslinearoperator(
    shape: Any,
    push: Callable[[Tensor], Tensor] | None = None,
    pull: Callable[[Tensor], Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    batch: int | None = None,
) -> LinearOperator:
    """Make an operator of a matrix, of an operator of scipy, or of two functions on blocks.

    Args:
        shape: the pair (m, n), with two functions. Without functions the matrix itself: a tensor
            ([B,] m, n), dense or sparse; an array of numpy; a sparse matrix or a ``LinearOperator``
            of scipy; an operator, which is returned as it is.
        push: ``([B,] n, k) -> ([B,] m, k)``, the product A v.
        pull: ``([B,] m, k) -> ([B,] n, k)``, the product A^T u.
        dtype: of the entries of two functions; torch's default dtype if None.
        device: of the entries of two functions; the CPU if None.
        batch: the number of operators, where the functions work on one a sample.

    Returns:
        A `LinearOperator`.

    Raises:
        InputError: none of these, or only one of the functions.
        ShapeError: the matrix or the shape has not two dimensions.

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [0.0, 1.0], [0.0, 0.0]])
        >>> aslinearoperator((3, 2), lambda v: A @ v, lambda u: A.T @ u).fro_norm()
        tensor(2.4495)
        >>> (aslinearoperator(A).T @ aslinearoperator(A)).trace()
        tensor(6.)
    """
    if push is not None or pull is not None:
        if not callable(push) or not callable(pull):
            raise InputError(
                f"push and pull expect functions of blocks, got {push!r} and {pull!r}; "
                "see LinearOperator"
            )
        return _Products(shape, push, pull, dtype, device, batch)
    if isinstance(shape, LinearOperator):
        return shape
    matrix = torch.as_tensor(shape) if isinstance(shape, np.ndarray) else shape
    return _of_matrix(matrix) if isinstance(matrix, Tensor) else _of_scipy(matrix)


def _of_matrix(entries: Tensor) -> LinearOperator:
    if entries.dim() not in (2, 3):
        raise ShapeError(
            f"expected a matrix (m, n), or one a sample, (B, m, n), got {tuple(entries.shape)}"
        )
    if not entries.dtype.is_floating_point:
        raise InputError(f"expected a matrix of real floating-point numbers, got {entries.dtype}")
    return _Matrix(entries)


def _of_scipy(source: Any) -> LinearOperator:
    known = all(hasattr(source, name) for name in ("shape", "dtype", "T", "__matmul__"))
    if not known or len(source.shape) != 2:
        raise InputError(
            "expected a matrix, an operator of scipy, a LinearOperator, or a shape with two "
            f"functions, got {type(source).__name__}"
        )
    kind = np.dtype(source.dtype)
    if kind.kind == "c":
        raise InputError(f"expected an operator on real numbers, got {kind}")
    dtype = torch.float32 if kind == np.float32 else torch.float64
    return _OfScipy(source, dtype)
