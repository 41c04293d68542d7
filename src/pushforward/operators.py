"""Linear operators: a matrix known by its products.

A subclass has two methods, `LinearOperator.push` and `LinearOperator.pull`, on blocks of columns;
everything else follows from them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pushforward import linalg
from pushforward.errors import (
    DimensionError,
    InputError,
    MissingDependencyError,
    ShapeError,
)


class LinearOperator(ABC):
    """An m x n matrix known by its products with blocks of columns.

    Subclass it with two methods::

        push(v)    (n, k) -> (m, k)    the product A v
        pull(u)    (m, k) -> (n, k)    the product A^T u

    and give the shape to ``super().__init__``.

    Args:
        shape: the pair (m, n).
        dtype: of the entries; torch's default dtype if None.
        device: of the entries; the CPU if None.

    Raises:
        ShapeError: the shape is not a pair of sizes.

    Example:
        >>> class Doubling(LinearOperator):
        ...     def push(self, v):
        ...         return 2 * v
        ...     def pull(self, u):
        ...         return 2 * u
        >>> Doubling((3, 3)).trace()
        tensor(6.)
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if len(shape) != 2 or any(not isinstance(size, int) or size < 0 for size in shape):
            raise ShapeError(
                f"shape expects a pair of sizes (m, n), got {shape!r}; outputs come first"
            )
        self.shape: tuple[int, int] = (shape[0], shape[1])
        self.dtype: torch.dtype = dtype or torch.get_default_dtype()
        self.device: torch.device = torch.device(device or "cpu")

    batch: int | None = None

    @abstractmethod
    def push(self, v: Tensor) -> Tensor:
        """Multiply a block of columns: ``(n, k) -> (m, k)``, A v."""

    @abstractmethod
    def pull(self, u: Tensor) -> Tensor:
        """Multiply by the transpose: ``(m, k) -> (n, k)``, A^T u."""

    @property
    def T(self) -> LinearOperator:
        """The transpose, an operator too; ``A.T.T`` is ``A``."""
        return _Transpose(self)

    def __matmul__(self, v: Any) -> Any:
        """A v for v of shape (n,) or (n, k)."""
        return _multiply(self.push, v, self.shape[1], "@ expects")

    def _rmatmul(self, u: Any) -> Any:
        return _multiply(self.pull, u, self.shape[0], ".T @ expects")

    def matrix(self) -> Tensor:
        """All entries, (m, n). Cost: min(m, n) products."""
        m, n = self.shape
        if m < n:
            return self.pull(torch.eye(m, dtype=self.dtype, device=self.device)).mT
        return self.push(torch.eye(n, dtype=self.dtype, device=self.device))

    def _entries(self) -> Tensor:
        """`matrix` for the use of the methods here."""
        return self.matrix()

    def _core(self) -> Tensor:
        """A matrix with the same singular values, but perhaps for zeros."""
        return self._entries()

    def _rank_rtol(self, rtol: float | None) -> float:
        """Up to which multiple of the largest a singular value counts as zero."""
        return max(self.shape) * torch.finfo(self.dtype).eps if rtol is None else rtol

    def dense(self) -> Any:
        """All entries in the shape that the operator's spaces have; (m, n) here."""
        return self.matrix()

    def diagonal(self) -> Tensor:
        """The diagonal of a square operator, (n,).

        Raises:
            DimensionError: m and n differ.
        """
        self._require_square("diagonal")
        return self.matrix().diagonal(dim1=-2, dim2=-1)

    def trace(self) -> Tensor:
        """The sum of the diagonal of a square operator, ().

        Raises:
            DimensionError: m and n differ.
        """
        self._require_square("trace")
        return self.diagonal().sum(-1)

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """(sign, log|det A|) of a square operator; a singular one has sign 0 and -inf.

        Raises:
            DimensionError: m and n differ.
        """
        self._require_square("slogdet")
        return linalg.slogdet(self._entries())

    def logabsdet(self) -> Tensor:
        """log|det A| of a square operator; -inf where it is singular.

        Raises:
            DimensionError: m and n differ.
        """
        self._require_square("logabsdet")
        return linalg.slogdet(self._entries())[1]

    def logvol(self, rtol: float | None = None) -> Tensor:
        """1/2 log det(A^T A) for m >= n, 1/2 log det(A A^T) for m < n; -inf where deficient.

        See `pushforward.linalg.logvol`.
        """
        return linalg.logvol(self._entries(), rtol)

    def pdet(self, rtol: float | None = None) -> Tensor:
        """The product of the nonzero singular values; see `pushforward.linalg.pdet`."""
        return linalg.pdet(self._core(), self._rank_rtol(rtol)).to(self.dtype)

    def log_pdet(self, rtol: float | None = None) -> Tensor:
        """The logarithm of `pdet`; see `pushforward.linalg.log_pdet`."""
        return linalg.log_pdet(self._core(), self._rank_rtol(rtol)).to(self.dtype)

    def fro_norm(self) -> Tensor:
        """The Frobenius norm, the root of the sum of the squared entries."""
        return linalg.fro_norm(self._core()).to(self.dtype)

    def spectral_norm(self) -> Tensor:
        """The largest singular value; 0 for an empty operator."""
        return linalg.spectral_norm(self._core()).to(self.dtype)

    def svdvals(self, k: int | None = None) -> Tensor:
        """The singular values, largest first; the first ``k`` of them if ``k`` is given.

        Raises:
            InputError: ``k`` is not between 0 and min(m, n).
        """
        most = min(self.shape)
        if k is not None and (not isinstance(k, int) or not 0 <= k <= most):
            raise InputError(
                f"svdvals expects a whole number k between 0 and min(m, n) = {most}, got {k!r}"
            )
        values = linalg.svdvals(self._core()).to(self.dtype)
        values = torch.nn.functional.pad(values, (0, most - values.shape[-1]))
        return values if k is None else values[..., :k]

    def rank(self, rtol: float | None = None) -> Tensor:
        """The number of singular values over ``rtol`` (max(m, n) eps) times the largest."""
        return linalg.rank(self._core(), self._rank_rtol(rtol))

    def stable_rank(self) -> Tensor:
        """The squared Frobenius norm over the squared spectral norm; 0 for the zero operator."""
        return linalg.stable_rank(self._core()).to(self.dtype)

    def cond(self) -> Tensor:
        """The largest singular value over the smallest; inf where it is singular."""
        return linalg.cond(self._entries())

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` with the same products, on numpy arrays.

        Raises:
            MissingDependencyError: scipy is not installed.
        """
        sparse = scipy_sparse()

        def product(multiply: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
            def apply(block: Any) -> Any:
                tensor = torch.as_tensor(block, dtype=self.dtype, device=self.device)
                columns = tensor.unsqueeze(1) if tensor.dim() == 1 else tensor
                product = multiply(columns).detach().cpu()
                return product.reshape(len(product), *tensor.shape[1:]).numpy()

            return apply

        push, pull = product(self.push), product(self.pull)
        return sparse.linalg.LinearOperator(
            self.shape,
            matvec=push,
            rmatvec=pull,
            matmat=push,
            rmatmat=pull,
            dtype=torch.empty(0, dtype=self.dtype).numpy().dtype,
        )

    def _require_square(self, what: str) -> None:
        m, n = self.shape
        if m != n:
            raise DimensionError(
                f"{what} expects a square operator, got {m} x {n}; use logvol or pdet for the "
                "volume of a map between spaces of different dimension"
            )

    def __repr__(self) -> str:
        m, n = self.shape
        kind = type(self).__name__.lstrip("_")
        return f"{kind}({m} x {n}, {str(self.dtype).removeprefix('torch.')}, {self.device})"


class _Transpose(LinearOperator):
    """A^T, made of A."""

    def __init__(self, parent: LinearOperator) -> None:
        m, n = parent.shape
        super().__init__((n, m), dtype=parent.dtype, device=parent.device)
        self.parent = parent
        self.batch = parent.batch

    def push(self, v: Tensor) -> Tensor:
        return self.parent.pull(v)

    def pull(self, u: Tensor) -> Tensor:
        return self.parent.push(u)

    @property
    def T(self) -> LinearOperator:
        return self.parent

    def __matmul__(self, v: Any) -> Any:
        return self.parent._rmatmul(v)

    def _rmatmul(self, u: Any) -> Any:
        return self.parent @ u

    def matrix(self) -> Tensor:
        return self.parent.matrix().mT

    def diagonal(self) -> Tensor:
        return self.parent.diagonal()

    def __repr__(self) -> str:
        return f"{self.parent!r}.T"


class _Products(LinearOperator):
    """An operator made of two functions."""

    def __init__(
        self,
        shape: tuple[int, int],
        push: Callable[[Tensor], Tensor],
        pull: Callable[[Tensor], Tensor],
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__(shape, dtype=dtype, device=device)
        self._push, self._pull = push, pull

    def push(self, v: Tensor) -> Tensor:
        return self._push(v)

    def pull(self, u: Tensor) -> Tensor:
        return self._pull(u)


def aslinearoperator(
    shape: tuple[int, int],
    push: Callable[[Tensor], Tensor],
    pull: Callable[[Tensor], Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LinearOperator:
    """Make an operator of two functions on blocks of columns.

    Args:
        shape: the pair (m, n).
        push: ``(n, k) -> (m, k)``, the product A v.
        pull: ``(m, k) -> (n, k)``, the product A^T u.
        dtype: of the entries; torch's default dtype if None.
        device: of the entries; the CPU if None.

    Returns:
        A `LinearOperator`.

    Raises:
        ShapeError: the shape is not a pair of sizes.

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [0.0, 1.0], [0.0, 0.0]])
        >>> aslinearoperator((3, 2), lambda v: A @ v, lambda u: A.T @ u).fro_norm()
        tensor(2.4495)
    """
    if not callable(push) or not callable(pull):
        raise InputError(
            f"push and pull expect functions of blocks, got {push!r} and {pull!r}; "
            "see LinearOperator"
        )
    return _Products(shape, push, pull, dtype, device)


def _multiply(
    product: Callable[[Tensor], Tensor], vector: Any, size: int, expectation: str
) -> Tensor:
    if not isinstance(vector, Tensor) or vector.dim() not in (1, 2) or vector.shape[0] != size:
        came = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise ShapeError(
            f"{expectation} a vector ({size},) or a block ({size}, k), got {came}; "
            "vectors are columns"
        )
    return product(vector) if vector.dim() == 2 else product(vector.unsqueeze(1)).squeeze(1)


def scipy_sparse() -> Any:
    """Import ``scipy.sparse`` with ``linalg``, or say how to get it."""
    try:
        import scipy.sparse
        import scipy.sparse.linalg
    except ImportError as error:
        raise MissingDependencyError(
            "expected scipy for this conversion, but it is not installed; pip install scipy"
        ) from error
    return scipy.sparse
