"""Colours that repeat: the colour of a column follows from its coordinates modulo small numbers.

Columns of a stencil meet only if they differ by one of a few offsets. A lattice that contains none
of these offsets colours all columns at once, with as many colours as it has cosets. Boxes are
tried, i_1 mod m_1, i_2 mod m_2, ..., and cyclic lattices, (a_1 i_1 + a_2 i_2 + ...) mod p, the
latter also within a box on the first axis.

The offsets are read from a few rows. A lattice found for them is checked on all rows, and where it
fails, the offsets of the rows that refute it are added, and the search goes on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from pushforward.coloring.scheme import UNSEEDED
from pushforward.pattern import Pattern

# Offsets are read from so many rows, until their columns make so many pairs.
FIRST_ROWS = 12
PAIRS = 400_000
REFUTATIONS = 6
# How many products of a lattice and an offset one search may try.
WORK = 4_000_000
# Rows of a stencil have together hardly more offsets than the longest alone.
ALIKE = 4


class Lattice(NamedTuple):
    """Colours ``box number * modulus + (multipliers . coordinates) mod modulus``."""

    box: tuple[int, ...]
    multipliers: tuple[int, ...]
    modulus: int

    def colors(self, grid: tuple[int, ...]) -> np.ndarray:
        """The colour of each place of the grid, flattened."""
        residue = np.zeros((1,) * len(grid), dtype=np.int64)
        number = np.zeros((1,) * len(grid), dtype=np.int64)
        for axis, coordinate in enumerate(np.ogrid[tuple(map(slice, grid))]):
            number = number * self.box[axis] + coordinate % self.box[axis]
            residue = residue + self.multipliers[axis] * coordinate
        return np.broadcast_to(number * self.modulus + residue % self.modulus, grid).ravel()


class Ring(NamedTuple):
    """Colours along one axis in blocks of ``count`` and of ``count - 1``."""

    count: int

    def colors(self, grid: tuple[int, ...]) -> np.ndarray:
        """The colour of each place: the longer blocks come first."""
        short = self.count - 1
        longer = grid[0] % short
        places = np.arange(grid[0])
        in_short = (places - longer * self.count) % short
        return np.where(places < longer * self.count, places % self.count, in_short)


def lattice_colors(
    pattern: Pattern, grid: tuple[int, ...] | None, lowest: int, fewer_than: int
) -> np.ndarray | None:
    """The colours of the best lattice with ``lowest`` colours or more, but ``fewer_than`` that."""
    rows = _first_rows(pattern)
    if not _repeats(pattern, rows):
        return None
    best: np.ndarray | None = None
    fewer_than = min(fewer_than, 4 * lowest + 16)
    shapes = _grids(pattern, grid, rows)
    for family, shape in itertools.product((_boxes, _cyclic, _rings), shapes):
        found = _search(pattern, family, shape, rows, lowest, fewer_than)
        if found is not None:
            best, fewer_than = found, int(found.max()) + 1
        if fewer_than <= lowest:
            break
    return best


def clashing_rows(pattern: Pattern, colors: np.ndarray) -> np.ndarray:
    """The rows that have two columns of one colour. Cost: O(nnz)."""
    count = int(colors.max(initial=-1)) + 1
    keys = pattern.rows * count + colors[pattern.indices]
    if pattern.shape[0] * count > 32 * pattern.nnz + 1024:
        keys = np.sort(keys)
        return np.unique(keys[1:][keys[1:] == keys[:-1]] // max(count, 1))
    seen = np.zeros((pattern.shape[0], count), dtype=bool)
    seen.ravel()[keys] = True
    return np.flatnonzero(seen.sum(1) < pattern.row_lengths)


def _search(
    pattern: Pattern,
    family: Family,
    grid: tuple[int, ...],
    rows: np.ndarray,
    lowest: int,
    fewer_than: int,
) -> np.ndarray | None:
    """Propose a lattice, let all rows try to refute it, learn, until one stands or none is left."""
    offsets = _offsets(pattern, grid, rows)
    for _ in range(REFUTATIONS):
        lattice = next(family(offsets, grid, lowest, fewer_than), None)
        if lattice is None:
            return None
        colors = _of_filled(pattern, lattice.colors(grid))
        clashing = clashing_rows(pattern, colors)
        if not len(clashing):
            return colors
        learned = _offsets(pattern, grid, clashing[_spread(len(clashing), FIRST_ROWS)])
        offsets = np.unique(np.concatenate([offsets, learned]), axis=0)
    return None


def _repeats(pattern: Pattern, rows: np.ndarray) -> bool:
    """Whether rows have most of their offsets in common, or else no lattice has few colours."""
    flat = (pattern.shape[1],)
    single = max((len(_offsets(pattern, flat, row)) for row in rows[:, None]), default=0)
    return len(_offsets(pattern, flat, rows)) <= ALIKE * single


def _of_filled(pattern: Pattern, colors: np.ndarray) -> np.ndarray:
    """Colours of the columns that have entries, those that none of them has left out."""
    filled = pattern.column_lengths > 0
    used = np.bincount(colors[filled], minlength=int(colors.max()) + 1) > 0
    return np.where(filled, (np.cumsum(used) - 1)[colors], UNSEEDED)


def _first_rows(pattern: Pattern) -> np.ndarray:
    """Rows spread over the matrix, and the longest: their offsets are usually all offsets."""
    filled = np.flatnonzero(pattern.row_lengths)
    longest = filled[np.argsort(-pattern.row_lengths[filled], kind="stable")[:1]]
    return np.unique(np.concatenate([filled[_spread(len(filled), FIRST_ROWS)], longest]))


def _spread(count: int, wanted: int) -> np.ndarray:
    return np.unique(np.linspace(0, max(count - 1, 0), min(wanted, count)).astype(np.int64))


def _offsets(pattern: Pattern, grid: tuple[int, ...], rows: np.ndarray) -> np.ndarray:
    """The distinct differences (k, axes) of the coordinates of columns that share a row."""
    sides = np.array([2 * size + 1 for size in grid])
    weights = np.append(np.cumprod(sides[:0:-1])[::-1], 1)
    codes: list[np.ndarray] = []
    work = 0
    for row in rows.tolist():
        columns = pattern.indices[pattern.indptr[row] : pattern.indptr[row + 1]]
        work += len(columns) ** 2
        if codes and work > PAIRS:
            break
        places = np.stack(np.unravel_index(columns, grid), axis=1) @ weights
        codes.append(np.unique(np.abs(places[:, None] - places)))
    distinct = np.unique(np.concatenate(codes)) if codes else np.zeros(0, dtype=np.int64)
    return _decoded(distinct[distinct > 0], weights)


def _decoded(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Differences from their codes, digit by digit, each the nearest multiple of its weight."""
    digits = []
    for weight in weights.tolist():
        digit = (codes + weight // 2) // weight
        codes = codes - digit * weight
        digits.append(digit)
    return np.stack(digits, axis=1)


def _extents(offsets: np.ndarray) -> list[int]:
    """Moduli along each axis beyond which nothing changes: the largest difference and one more."""
    return (np.abs(offsets).max(axis=0, initial=0) + 1).tolist()


def _boxes(
    offsets: np.ndarray, grid: tuple[int, ...], lowest: int, fewer_than: int
) -> Iterator[Lattice]:
    """Boxes that avoid the offsets, fewest colours first."""
    axes = len(grid)
    avoided = [
        [offsets[:, axis] % modulus == 0 for modulus in _moduli(extent, size, fewer_than)]
        for axis, (extent, size) in enumerate(zip(_extents(offsets), grid, strict=True))
    ]
    sizes = [range(1, len(hits) + 1) for hits in avoided]
    if math.prod(map(len, sizes)) * max(len(offsets), 1) > WORK:
        sizes = [_few(extent) for extent in _extents(offsets)]
    boxes = [box for box in itertools.product(*sizes) if lowest <= math.prod(box) < fewer_than]
    for box in sorted(boxes, key=math.prod):
        hits = (avoided[axis][box[axis] - 1] for axis in range(axes))
        if not np.logical_and.reduce(list(hits)).any():
            yield Lattice(box, (0,) * axes, 1)


def _moduli(extent: int, size: int, fewer_than: int) -> range:
    return range(1, max(min(extent, size, fewer_than), 1) + 1)


def _few(extent: int) -> tuple[int, ...]:
    return tuple(sorted({1, extent}))


def _cyclic(
    offsets: np.ndarray, grid: tuple[int, ...], lowest: int, fewer_than: int
) -> Iterator[Lattice]:
    """Cyclic lattices that avoid the offsets, with and without a box on the first axis."""
    axes = len(grid)
    counts = range(lowest, min(fewer_than, lowest + lowest // 2 + 8))
    for count in counts:
        for first in dict.fromkeys([1, *_extents(offsets)[:1]]):
            modulus, rest = divmod(count, first)
            if rest or (first > 1 and axes == 1):
                continue
            meeting = offsets[offsets[:, 0] % first == 0] if first > 1 else offsets
            multipliers = _multipliers(meeting[:, first > 1 :], modulus, WORK // len(counts))
            if multipliers is not None:
                head = (0,) if first > 1 else ()
                yield Lattice((first,) + (1,) * (axes - 1), head + multipliers, modulus)


def _multipliers(offsets: np.ndarray, modulus: int, work: int) -> tuple[int, ...] | None:
    """Numbers a with a . d not 0 modulo the modulus for all offsets d; None if too many to try."""
    axes = offsets.shape[1]
    # Units of the modulus only rename the colours: the last multiplier may be taken as a divisor.
    last = [divisor for divisor in range(1, modulus + 1) if modulus % divisor == 0]
    if modulus ** (axes - 1) * len(last) * max(len(offsets), 1) > work:
        return None
    axes_of_choices = [range(modulus)] * (axes - 1) + [last]
    choices = np.array(list(itertools.product(*axes_of_choices)), dtype=np.int64)
    good = np.flatnonzero(((choices @ offsets.T) % modulus != 0).all(axis=1))
    return tuple(choices[good[0]].tolist()) if len(good) else None


def _rings(
    offsets: np.ndarray, grid: tuple[int, ...], lowest: int, fewer_than: int
) -> Iterator[Ring]:
    """Blocks of q or q + 1 colours around a ring, whose length q need not divide."""
    n = grid[0]
    if len(grid) == 1 and len(offsets) and offsets.max() > n // 2:
        for count in range(lowest, min(fewer_than, lowest + 3)):
            if count > 1 and n // (count - 1) >= n % (count - 1):
                yield Ring(count)


def _grids(
    pattern: Pattern, grid: tuple[int, ...] | None, rows: np.ndarray
) -> list[tuple[int, ...]]:
    """Shapes to read the columns in: as given, or with axes that the offsets suggest, and flat."""
    n = pattern.shape[1]
    given = tuple(size for size in grid if size > 1) if grid else ()
    if len(given) > 1:
        return [given, (n,)]
    strides = _strides(_offsets(pattern, (n,), rows)[:, 0], n)
    chains = [strides[length:] for length in range(len(strides))]
    return [(n,), *(tuple(a // b for a, b in itertools.pairwise((n, *c, 1))) for c in chains)]


def _strides(offsets: np.ndarray, n: int) -> list[int]:
    """Likely lengths of inner axes, nested, largest first.

    The offsets of a stencil come in clusters around the multiples of the stride; clusters of
    clusters around those of the next.
    """
    known = np.sort(offsets)
    strides: list[int] = []
    gap = 1
    while len(cuts := np.flatnonzero(np.diff(known) > gap) + 1):
        cluster = known[cuts[0] : cuts[1]] if len(cuts) > 1 else known[cuts[0] :]
        stride = _nearest_divisor(cluster, n, strides[0] if strides else 1)
        if stride is None:
            break
        strides.insert(0, stride)
        gap = 2 * stride
    return strides


def _nearest_divisor(cluster: np.ndarray, n: int, unit: int) -> int | None:
    """The divisor of n and multiple of the unit that is closest to the middle of the cluster."""
    middle = (int(cluster[0]) + int(cluster[-1])) / 2
    fitting = [value for value in cluster.tolist() if n % value == 0 and value % unit == 0]
    return min(fitting, key=lambda value: abs(value - middle)) if fitting else None


Family = Callable[[np.ndarray, tuple[int, ...], int, int], Iterator[Lattice] | Iterator[Ring]]
