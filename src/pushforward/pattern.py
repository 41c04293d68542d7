"""Where a sparse matrix may be nonzero, as compressed rows, for machines and for the eye."""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from pushforward.errors import InputError, MissingDependencyError, ShapeError
from pushforward.operators import scipy_sparse

DOTS_ACROSS, DOTS_DOWN = 120, 120
# The bit of each dot of a braille character, 4 rows by 2 columns.
BRAILLE = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
CELLS_SHOWN_EXACTLY = 300
MARKERS_SHOWN = 5000
INK = "#1f3b73"


class Block(NamedTuple):
    """Rows and columns that only have entries among themselves, each in ascending order."""

    rows: np.ndarray
    columns: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class Pattern:
    """The places of an m x n matrix that may hold something other than zero.

    Stored as compressed rows: row i has the columns ``indices[indptr[i]:indptr[i + 1]]``,
    ascending and each once. That order, row after row, is what "CSR order" means everywhere in the
    library.

    Args:
        shape: the pair (m, n).
        indptr: (m + 1,) integers, where each row starts.
        indices: (nnz,) integers, the columns of the entries.

    Raises:
        ShapeError: the arrays do not belong to a matrix of this shape.
        InputError: the columns of some row are not strictly ascending.

    Example:
        >>> pattern = Pattern.of([0, 1, 1], [0, 0, 2], (2, 3))
        >>> pattern
        Pattern(2 x 3, nnz=3, density=50%)
        >>> pattern.indices
        array([0, 0, 2])
        >>> print(pattern)
        2 x 3, 3 entries, density 50%
        ⠃⠂
    """

    shape: tuple[int, int]
    indptr: np.ndarray
    indices: np.ndarray

    def __post_init__(self) -> None:
        for name in ("indptr", "indices"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int64))
        object.__setattr__(self, "shape", _sizes(self.shape))
        _check_arrays(self)

    @classmethod
    def of(cls, rows: Any, columns: Any, shape: tuple[int, int]) -> Pattern:
        """The pattern of entries in any order, repeated ones taken once.

        Args:
            rows: (k,) integers in [0, m).
            columns: (k,) integers in [0, n).
            shape: the pair (m, n).

        Raises:
            ShapeError: rows and columns differ in length, or the shape is no pair of sizes.
            InputError: a coordinate lies outside of the shape.
        """
        m, n = _sizes(shape)
        rows, columns = _coordinates("rows", rows, m), _coordinates("columns", columns, n)
        if len(rows) != len(columns):
            raise ShapeError(
                f"Pattern.of expects one column for each row, got {len(rows)} rows and "
                f"{len(columns)} columns; pass both coordinates of every entry"
            )
        places = rows * n + columns
        if not _ascending(places):
            places = _sorted_once(places)
            rows = places // max(n, 1)
            columns = places - rows * n
        return cls((m, n), _starts(rows, m), columns)

    @classmethod
    def of_dense(cls, mask: Any) -> Pattern:
        """The pattern of the nonzeros of a matrix (m, n).

        Raises:
            ShapeError: the mask does not have two dimensions.
        """
        mask = np.asarray(mask)
        if mask.ndim != 2:
            raise ShapeError(f"Pattern.of_dense expects a matrix, got shape {mask.shape}")
        rows, columns = np.nonzero(mask)
        return cls(mask.shape, _starts(rows, mask.shape[0]), columns)

    @property
    def nnz(self) -> int:
        """How many entries may be nonzero."""
        return len(self.indices)

    @property
    def density(self) -> float:
        """nnz / (m n); 0 for a matrix without places."""
        places = self.shape[0] * self.shape[1]
        return self.nnz / places if places else 0.0

    @cached_property
    def row_lengths(self) -> np.ndarray:
        """How many entries each row has, (m,)."""
        return np.diff(self.indptr)

    @cached_property
    def column_lengths(self) -> np.ndarray:
        """How many entries each column has, (n,)."""
        return np.bincount(self.indices, minlength=self.shape[1])

    @cached_property
    def rows(self) -> np.ndarray:
        """The row of each entry in CSR order, (nnz,)."""
        return np.repeat(np.arange(self.shape[0]), self.row_lengths)

    def nonzero(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the entries in CSR order, each (nnz,)."""
        return self.rows, self.indices

    def transposed(self) -> tuple[Pattern, np.ndarray]:
        """The transpose and an order: entry k of the transpose is entry ``order[k]`` here."""
        return self._transposed

    @cached_property
    def _transposed(self) -> tuple[Pattern, np.ndarray]:
        m, n = self.shape
        order = _stable_order(self.indices, n)
        starts = np.concatenate([[0], np.cumsum(self.column_lengths)])
        return Pattern((n, m), starts, self.rows[order]), order

    @property
    def T(self) -> Pattern:
        """The pattern of the transpose."""
        return self.transposed()[0]

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether (j, i) is an entry wherever (i, j) is."""
        return self.shape[0] == self.shape[1] and self.same_as(self.T)

    @cached_property
    def _places(self) -> np.ndarray:
        """Row-major positions of the entries, ascending."""
        return self.rows * self.shape[1] + self.indices

    def find(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The CSR position of each (row, column), or -1 where that is no entry."""
        wanted = np.asarray(rows, np.int64) * self.shape[1] + np.asarray(columns, np.int64)
        if not self.nnz:
            return np.full(wanted.shape, -1)
        found = np.searchsorted(self._places, wanted).clip(max=self.nnz - 1)
        return np.where(self._places[found] == wanted, found, -1)

    def covers(self, other: Pattern) -> bool:
        """Whether every entry of ``other`` is an entry here; False for another shape."""
        if self.shape != other.shape or other.nnz > self.nnz:
            return False
        return bool((self.find(other.rows, other.indices) >= 0).all())

    def union(self, other: Pattern) -> Pattern:
        """The pattern of what is an entry of either.

        Raises:
            ShapeError: the shapes differ.
        """
        if self.shape != other.shape:
            raise ShapeError(f"union expects a pattern of shape {self.shape}, got {other.shape}")
        places = _sorted_once(np.concatenate([self._places, other._places]))
        rows = places // max(self.shape[1], 1)
        return Pattern(self.shape, _starts(rows, self.shape[0]), places - rows * self.shape[1])

    def same_as(self, other: Pattern) -> bool:
        """Whether shape and entries are the same."""
        return (
            self.shape == other.shape
            and np.array_equal(self.indptr, other.indptr)
            and np.array_equal(self.indices, other.indices)
        )

    def todense(self) -> np.ndarray:
        """A boolean matrix (m, n), True at the entries."""
        mask = np.zeros(self.shape, dtype=bool)
        mask[self.rows, self.indices] = True
        return mask

    def to_scipy(self) -> Any:
        """A boolean ``scipy.sparse.csr_array`` that is True at the entries.

        Raises:
            MissingDependencyError: scipy is not installed.
        """
        entries = (np.ones(self.nnz, dtype=bool), self.indices.copy(), self.indptr.copy())
        return scipy_sparse().csr_array(entries, shape=self.shape)

    @cached_property
    def block_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """The number of the block of each row (m,) and column (n,), -1 for those without entries.

        Blocks are the connected components of the graph that joins row i and column j at every
        entry (i, j), counted in the order of their first rows. Cost: O(nnz) for each of a few
        rounds.
        """
        filled = self.row_lengths > 0
        first = self.indices[self.indptr[:-1][filled]]
        column_roots = _components(
            self.shape[1], np.repeat(first, self.row_lengths[filled]), self.indices
        )
        rows = np.full(self.shape[0], -1)
        roots, rows_of_roots = np.unique(column_roots[first], return_index=True)
        number = np.full(self.shape[1], -1)
        number[roots[np.argsort(rows_of_roots)]] = np.arange(len(roots))
        rows[filled] = number[column_roots[first]]
        return rows, number[column_roots]

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks that the matrix falls into, by their first rows; see `block_labels`."""
        rows, columns = (_grouped(labels) for labels in self.block_labels)
        return tuple(map(Block, rows, columns))

    def __repr__(self) -> str:
        m, n = self.shape
        return f"Pattern({m} x {n}, nnz={self.nnz}, density={_percent(self.density)})"

    def __str__(self) -> str:
        return "\n".join([_header(self), *_braille(self)])

    def _repr_html_(self) -> str:
        style = "line-height: 1; font-family: monospace"
        picture = html.escape("\n".join(_braille(self)))
        return f'<div>{html.escape(_header(self))}<pre style="{style}">{picture}</pre></div>'

    def plot(self, ax: Any = None) -> Any:
        """Draw the entries: cells, markers, or an image of densities where there are too many.

        Args:
            ax: axes of matplotlib; new ones if None.

        Returns:
            The axes.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        return _plot(self, ax)


def _sizes(shape: Any) -> tuple[int, int]:
    sizes = tuple(int(size) for size in shape)
    if len(sizes) != 2 or min(sizes) < 0:
        raise ShapeError(
            f"a pattern expects a pair of sizes (m, n), got {tuple(shape)!r}; rows come first"
        )
    return sizes


def _check_arrays(pattern: Pattern) -> None:
    (m, n), indptr, indices = pattern.shape, pattern.indptr, pattern.indices
    lengths = np.diff(indptr)
    if indptr.shape != (m + 1,) or indptr[0] != 0 or (lengths < 0).any():
        raise ShapeError(
            f"indptr expects {m + 1} ascending integers from 0 for {m} rows, got shape "
            f"{indptr.shape}"
        )
    if indices.shape != (indptr[-1],):
        raise ShapeError(
            f"indices expects {indptr[-1]} columns, as indptr says, got {indices.shape}"
        )
    if len(indices) and (indices.min() < 0 or indices.max() >= n):
        raise InputError(
            f"indices expects columns in [0, {n}), got {indices.min()} to {indices.max()}"
        )
    steps_back = np.count_nonzero(indices[1:] <= indices[:-1])
    starts = indptr[1:-1][(indptr[1:-1] > 0) & (indptr[1:-1] < len(indices)) & (lengths[1:] > 0)]
    if steps_back != np.count_nonzero(indices[starts] <= indices[starts - 1]):
        raise InputError(
            "indices expects the columns of each row ascending and once each; use Pattern.of, "
            "which sorts"
        )


def _coordinates(name: str, values: Any, size: int) -> np.ndarray:
    values = np.asarray(values)
    values = values.astype(np.int64, copy=False).ravel()
    if len(values) and (values.min() < 0 or values.max() >= size):
        raise InputError(
            f"{name} expects integers in [0, {size}), got {values.min()} to {values.max()}; "
            "is the shape that of the matrix?"
        )
    return values


def _ascending(places: np.ndarray) -> bool:
    return bool((places[1:] > places[:-1]).all())


def _sorted_once(places: np.ndarray) -> np.ndarray:
    places = np.sort(places)
    return places[np.diff(places, prepend=-1) > 0]


def _starts(rows: np.ndarray, m: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=m))])


def _stable_order(keys: np.ndarray, bound: int) -> np.ndarray:
    """A stable argsort of integers in [0, bound), 16 bits at a time: numpy sorts those by radix."""
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    for shift in range(16, max(bound - 1, 1).bit_length(), 16):
        digits = ((keys >> shift) & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order


def _components(size: int, tails: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """The least vertex that each one is connected with: hook to the least neighbour, contract."""
    root = np.arange(size)
    while len(tails):
        np.minimum.at(root, np.maximum(tails, heads), np.minimum(tails, heads))
        root = _flattened(root)
        tails, heads = root[tails], root[heads]
        apart = tails != heads
        tails, heads = tails[apart], heads[apart]
    return root


def _flattened(parent: np.ndarray) -> np.ndarray:
    """Parents replaced by roots; every parent is at most its child, so there are no circles."""
    while True:
        grandparent = parent[parent]
        if np.array_equal(grandparent, parent):
            return parent
        parent = grandparent


def _grouped(labels: np.ndarray) -> list[np.ndarray]:
    """The positions of each label 0, 1, ..., ascending; -1 belongs nowhere."""
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels + 1)).tolist()
    return [order[start:end] for start, end in pairwise(ends)]


def _percent(density: float) -> str:
    return f"{100 * density:.3g}%"


def _header(pattern: Pattern) -> str:
    m, n = pattern.shape
    entries = "entry" if pattern.nnz == 1 else "entries"
    return f"{m} x {n}, {pattern.nnz} {entries}, density {_percent(pattern.density)}"


def _binned(pattern: Pattern, down: int, across: int) -> np.ndarray:
    """How many entries fall in each cell when the shape is scaled into (down, across) cells."""
    scale = _scale(pattern, down, across)
    height, width = (max(int(np.ceil(size / scale)), 1) for size in pattern.shape)
    rows = (pattern.rows / scale).astype(np.int64)
    columns = (pattern.indices / scale).astype(np.int64)
    return np.bincount(rows * width + columns, minlength=height * width).reshape(height, width)


def _scale(pattern: Pattern, down: int, across: int) -> float:
    """How many rows and columns of the pattern fall into one cell."""
    return max(pattern.shape[0] / down, pattern.shape[1] / across, 1.0)


def _braille(pattern: Pattern) -> list[str]:
    if 0 in pattern.shape:
        return []
    dots = _binned(pattern, DOTS_DOWN, DOTS_ACROSS) > 0
    height, width = dots.shape
    dots = np.pad(dots, ((0, -height % 4), (0, -width % 2)))
    cells = dots.reshape(dots.shape[0] // 4, 4, dots.shape[1] // 2, 2)
    codes = 0x2800 + np.einsum("ajbk,jk->ab", cells, BRAILLE)
    return ["".join(map(chr, line)) for line in codes]


def _plot(pattern: Pattern, ax: Any) -> Any:
    ax = ax or _new_axes()
    m, n = pattern.shape
    if max(m, n) <= CELLS_SHOWN_EXACTLY:
        _draw_image(ax, pattern, pattern.todense().astype(float))
    elif pattern.nnz <= MARKERS_SHOWN:
        _draw_markers(ax, pattern)
    else:
        _draw_image(ax, pattern, _binned(pattern, CELLS_SHOWN_EXACTLY, CELLS_SHOWN_EXACTLY) ** 0.5)
    _frame(ax, pattern)
    return ax


def _new_axes() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingDependencyError(
            "expected matplotlib for a plot, but it is not installed; pip install matplotlib, or "
            "print the pattern for a picture in text"
        ) from error
    return pyplot.figure(figsize=(5.2, 5.2), layout="constrained").add_subplot()


def _draw_image(ax: Any, pattern: Pattern, shades: np.ndarray) -> None:
    scale = _scale(pattern, CELLS_SHOWN_EXACTLY, CELLS_SHOWN_EXACTLY)
    height, width = shades.shape
    extent = (-0.5, max(width, 1) * scale - 0.5, max(height, 1) * scale - 0.5, -0.5)
    ax.imshow(
        shades,
        cmap=_shades(),
        vmin=0,
        vmax=max(shades.max(initial=0), 1e-9),
        extent=extent,
        interpolation="nearest",
    )


def _shades() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("ink", ["white", "#9db4dd", INK])


def _draw_markers(ax: Any, pattern: Pattern) -> None:
    ax.plot(pattern.indices, pattern.rows, "s", ms=1.6, mew=0, color=INK, rasterized=True)


def _frame(ax: Any, pattern: Pattern) -> None:
    from matplotlib.ticker import MaxNLocator

    m, n = pattern.shape
    # Entries in the first and last rows and columns stay clear of the frame.
    across, down = (0.5 + 0.01 * size for size in (n, m))
    ax.set_xlim(-across, max(n, 1) - 1 + across)
    ax.set_ylim(max(m, 1) - 1 + down, -down)
    # A sliver of a thousand by three would be a line: beyond 1:8 the axes fill the space instead.
    ax.set_aspect("equal" if max(m, n) <= 8 * max(min(m, n), 1) else "auto")
    ax.set_title(_header(pattern), fontsize=10)
    ax.set(xlabel="input", ylabel="output")
    for axis, count in ((ax.xaxis, 5), (ax.yaxis, 6)):
        axis.set_major_locator(MaxNLocator(count, integer=True))
    ax.tick_params(labelsize=8, length=3)
    for side in ax.spines.values():
        side.set(color="#999999", linewidth=0.8)
