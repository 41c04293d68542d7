"""Linear operators: a matrix known by its products, and what sums and products of them are.

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
from pushforward.errors import DimensionError, InputError, ShapeError
from pushforward.operators.exchange import scipy_operator


class LinearOperator(ABC):
    """An m x n matrix known by its products with blocks of columns.

    Subclass it with two methods::

        push(v)    ([B,] n, k) -> ([B,] m, k)    the product A v
        pull(u)    ([B,] m, k) -> ([B,] n, k)    the product A^T u

    and give the shape to ``super().__init__``. Operators are added, subtracted, scaled, multiplied
    and transposed as matrices are (``A + B``, ``2 * A``, ``A @ B``, ``A.T``), without being formed.

    Args:
        shape: the pair (m, n).
        dtype: of the entries; torch's default dtype if None.
        device: of the entries; the CPU if None.
        batch: the number of operators, one for each sample; None for a single one.

    Attributes:
        symmetric: whether A = A^T is known.
        semidefinite: whether x^T A x >= 0 for all x is known, as it is of Gram operators.

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
        batch: int | None = None,
    ) -> None:
        if len(shape) != 2 or any(not isinstance(size, int) or size < 0 for size in shape):
            raise ShapeError(
                f"shape expects a pair of sizes (m, n), got {shape!r}; outputs come first"
            )
        self.shape: tuple[int, int] = (shape[0], shape[1])
        self.dtype: torch.dtype = dtype or torch.get_default_dtype()
        self.device: torch.device = torch.device(device or "cpu")
        self.batch = batch

    batch: int | None = None
    symmetric: bool = False
    semidefinite: bool = False

    @abstractmethod
    def push(self, v: Tensor) -> Tensor:
        """Multiply a block of columns: ``([B,] n, k) -> ([B,] m, k)``, A v."""

    @abstractmethod
    def pull(self, u: Tensor) -> Tensor:
        """Multiply by the transpose: ``([B,] m, k) -> ([B,] n, k)``, A^T u."""

    @property
    def T(self) -> LinearOperator:
        """The transpose, an operator too; ``A.T.T`` is ``A``, and so is ``A.T`` where A = A^T."""
        return self if self.symmetric else _Transpose(self)

    def __matmul__(self, v: Any) -> Any:
        """A v for v of shape ([B,] n) or ([B,] n, k); A B, an operator, for another one.

        Raises:
            ShapeError: ``v`` has none of these shapes, or B has not n rows.
        """
        return _Product.of(self, v) if isinstance(v, LinearOperator) else self._lmatmul(v)

    def _lmatmul(self, v: Any) -> Any:
        return self._multiply_columns(self.push, v, self.shape[1], "@ expects")

    def _rmatmul(self, u: Any) -> Any:
        return self._multiply_columns(self.pull, u, self.shape[0], ".T @ expects")

    def _multiply_columns(
        self, product: Callable[[Tensor], Tensor], vector: Any, size: int, expectation: str
    ) -> Tensor:
        lead = () if self.batch is None else (self.batch,)
        shape = tuple(vector.shape) if isinstance(vector, Tensor) else None
        if shape == (*lead, size):
            return product(vector.unsqueeze(-1)).squeeze(-1)
        if shape is not None and shape[:-1] == (*lead, size):
            return product(vector)
        came = type(vector).__name__ if shape is None else shape
        inside = "".join(f"{length}, " for length in lead)
        raise ShapeError(
            f"{expectation} a vector ({inside}{size}{'' if lead else ','}) or a block "
            f"({inside}{size}, k), got {came}; vectors are columns"
        )

    def __add__(self, other: LinearOperator) -> LinearOperator:
        """A + B. ``A.shifted(c)`` adds a multiple of the identity."""
        return _Sum.of(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        """A - B."""
        return self + -other if isinstance(other, LinearOperator) else NotImplemented

    def __neg__(self) -> LinearOperator:
        """-A."""
        return _Scaled.of(self, -1)

    def __mul__(self, factor: float | Tensor) -> LinearOperator:
        """c A for a number c; for one number a sample, ([B],), where there is a batch."""
        return _Scaled.of(self, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> LinearOperator:
        """A / c for a number c, or one a sample."""
        return _Scaled.of(self, 1 / divisor)

    def gram(self) -> LinearOperator:
        """A^T A, (n, n), symmetric and positive semidefinite; ``A.T.gram()`` is A A^T."""
        return _Gram(self)

    def shifted(self, shift: float | Tensor) -> LinearOperator:
        """A + c I for a square A; c a number, or one a sample.

        Raises:
            DimensionError: m and n differ.
        """
        self._require_square("shifted")
        return _Shifted(self, _factor(self, shift, "shifted"))

    def matrix(self) -> Tensor:
        """All entries, ([B,] m, n). Cost: min(m, n) products."""
        m, n = self.shape
        return self.pull(self._unit_vectors(m)).mT if m < n else self.push(self._unit_vectors(n))

    def _unit_vectors(self, size: int) -> Tensor:
        units = torch.eye(size, dtype=self.dtype, device=self.device)
        return units if self.batch is None else units.expand(self.batch, size, size)

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
        """The diagonal of a square operator, ([B,] n).

        Raises:
            DimensionError: m and n differ.
        """
        self._require_square("diagonal")
        return self.matrix().diagonal(dim1=-2, dim2=-1)

    def trace(self) -> Tensor:
        """The sum of the diagonal of a square operator, ([B]).

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
            InputError: it is a batch of operators.
            MissingDependencyError: scipy is not installed.
        """
        return scipy_operator(self)

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
        lead = "" if self.batch is None else f"{self.batch} x "
        return f"{kind}({lead}{m} x {n}, {str(self.dtype).removeprefix('torch.')}, {self.device})"


class _Transpose(LinearOperator):
    """A^T, made of A."""

    def __init__(self, parent: LinearOperator) -> None:
        m, n = parent.shape
        super().__init__((n, m), dtype=parent.dtype, device=parent.device, batch=parent.batch)
        self.parent = parent

    def push(self, v: Tensor) -> Tensor:
        return self.parent.pull(v)

    def pull(self, u: Tensor) -> Tensor:
        return self.parent.push(u)

    @property
    def T(self) -> LinearOperator:
        return self.parent

    def _lmatmul(self, v: Any) -> Any:
        return self.parent._rmatmul(v)

    def _rmatmul(self, u: Any) -> Any:
        return self.parent._lmatmul(u)

    def matrix(self) -> Tensor:
        return self.parent.matrix().mT

    def diagonal(self) -> Tensor:
        return self.parent.diagonal()

    def __repr__(self) -> str:
        return f"{self.parent!r}.T"


class _Combined(LinearOperator):
    """What is made of operators of the same kind."""

    def __init__(self, shape: tuple[int, int], *parts: LinearOperator) -> None:
        first = parts[0]
        super().__init__(shape, dtype=first.dtype, device=first.device, batch=first.batch)


class _Sum(_Combined):
    """A + B."""

    def __init__(self, one: LinearOperator, other: LinearOperator) -> None:
        super().__init__(one.shape, one, other)
        self.one, self.other = one, other
        self.symmetric = one.symmetric and other.symmetric
        self.semidefinite = one.semidefinite and other.semidefinite

    @staticmethod
    def of(one: LinearOperator, other: LinearOperator) -> LinearOperator:
        _require_same_kind(one, other, "+")
        if one.shape != other.shape:
            raise ShapeError(
                f"+ expects operators of one shape, got {_sizes(one)} and {_sizes(other)}"
            )
        return _Sum(one, other)

    def push(self, v: Tensor) -> Tensor:
        return self.one.push(v) + self.other.push(v)

    def pull(self, u: Tensor) -> Tensor:
        return self.one.pull(u) + self.other.pull(u)

    def matrix(self) -> Tensor:
        return self.one.matrix() + self.other.matrix()

    def diagonal(self) -> Tensor:
        return self.one.diagonal() + self.other.diagonal()


class _Product(_Combined):
    """A B."""

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        super().__init__((outer.shape[0], inner.shape[1]), outer, inner)
        self.outer, self.inner = outer, inner

    @staticmethod
    def of(outer: LinearOperator, inner: LinearOperator) -> LinearOperator:
        _require_same_kind(outer, inner, "@")
        if outer.shape[1] != inner.shape[0]:
            raise ShapeError(
                f"@ expects an operator with {outer.shape[1]} rows on the right, got "
                f"{_sizes(inner)}; transpose one of the two with .T"
            )
        if isinstance(outer, _Transpose) and outer.parent is inner:
            return inner.gram()
        if isinstance(inner, _Transpose) and inner.parent is outer:
            return inner.gram()
        return _Product(outer, inner)

    def push(self, v: Tensor) -> Tensor:
        return self.outer.push(self.inner.push(v))

    def pull(self, u: Tensor) -> Tensor:
        return self.inner.pull(self.outer.pull(u))


class _Gram(_Combined):
    """A^T A."""

    symmetric = True
    semidefinite = True

    def __init__(self, root: LinearOperator) -> None:
        super().__init__((root.shape[1], root.shape[1]), root)
        self.root = root

    def push(self, v: Tensor) -> Tensor:
        return self.root.pull(self.root.push(v))

    def pull(self, u: Tensor) -> Tensor:
        return self.push(u)

    def matrix(self) -> Tensor:
        entries = self.root.matrix()
        return entries.mT @ entries

    def trace(self) -> Tensor:
        return self.root.fro_norm().square()


class _Scaled(_Combined):
    """c A."""

    def __init__(self, parent: LinearOperator, factor: Tensor) -> None:
        super().__init__(parent.shape, parent)
        self.parent, self.factor = parent, factor
        self.symmetric = parent.symmetric
        self.semidefinite = parent.semidefinite and bool((factor.detach() >= 0).all())

    @staticmethod
    def of(parent: LinearOperator, factor: float | Tensor) -> LinearOperator:
        return _Scaled(parent, _factor(parent, factor, "*"))

    def push(self, v: Tensor) -> Tensor:
        return self.parent.push(v) * self.factor

    def pull(self, u: Tensor) -> Tensor:
        return self.parent.pull(u) * self.factor

    def matrix(self) -> Tensor:
        return self.parent.matrix() * self.factor

    def diagonal(self) -> Tensor:
        return self.parent.diagonal() * self.factor.reshape(self.factor.shape[:-1])


class _Shifted(_Combined):
    """A + c I."""

    def __init__(self, parent: LinearOperator, shift: Tensor) -> None:
        super().__init__(parent.shape, parent)
        self.parent, self.shift = parent, shift
        self.symmetric = parent.symmetric
        self.semidefinite = parent.semidefinite and bool((shift.detach() >= 0).all())

    def push(self, v: Tensor) -> Tensor:
        return self.parent.push(v) + self.shift * v

    def pull(self, u: Tensor) -> Tensor:
        return self.parent.pull(u) + self.shift * u

    def matrix(self) -> Tensor:
        return self.parent.matrix() + self.shift * self._unit_vectors(self.shape[0])

    def diagonal(self) -> Tensor:
        return self.parent.diagonal() + self.shift.reshape(self.shift.shape[:-1])


def _factor(operator: LinearOperator, number: float | Tensor, what: str) -> Tensor:
    """A number, or one a sample, as it multiplies blocks: () or (B, 1, 1)."""
    factor = torch.as_tensor(number, device=operator.device)
    if factor.is_complex() or factor.dtype == torch.bool:
        raise InputError(f"{what} expects a real number, got {factor.dtype}")
    factor = factor.to(operator.dtype)
    if factor.dim() == 0:
        return factor
    if operator.batch is not None and tuple(factor.shape) == (operator.batch,):
        return factor.reshape(-1, 1, 1)
    one = "" if operator.batch is None else f", or one a sample, ({operator.batch},)"
    raise ShapeError(f"{what} expects a number{one}, got shape {tuple(factor.shape)}")


def _require_same_kind(one: LinearOperator, other: LinearOperator, what: str) -> None:
    kinds = [(o.dtype, o.device, o.batch) for o in (one, other)]
    if kinds[0] != kinds[1]:
        raise InputError(
            f"{what} expects operators of one dtype, device and batch, got {one!r} and {other!r}"
        )


def _sizes(operator: LinearOperator) -> str:
    return f"{operator.shape[0]} x {operator.shape[1]}"
