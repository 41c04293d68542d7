"""Long rows by products with the transpose, the rest by products with the matrix, or mirrored."""

from __future__ import annotations

import numpy as np

from pushforward.coloring.direct import best_colors
from pushforward.coloring.scheme import Coloring, count_of
from pushforward.pattern import Pattern

SPLITS = 48
SPLITS_TRIED = 3
# What colouring one side of one split may cost, in entries visited.
VISITS = 30_000
NEAR = 1.1
# In large patterns only a split is tried that may halve the passes.
LARGE = 300_000
WORTH_IT = 2


def by_both(pattern: Pattern, fewer_than: int | None = None) -> Coloring | None:
    """Few products with J and J^T together that hold every entry.

    Rows longer than some length are read from products J^T u, all other rows from products J v; or
    the columns likewise. The best length is taken. An arrow of any size takes three passes in all.

    Args:
        pattern: the pattern of J, (m, n).
        fewer_than: how many passes another colouring has; give up where this one cannot have fewer.

    Returns:
        A `Coloring` with ``kind="both"``, or None where no split has fewer passes than
        ``fewer_than``, or than the longest row or column of the pattern if that is None.

    Example:
        >>> leaf = np.arange(1, 500)
        >>> hub = np.zeros_like(leaf)
        >>> arrow = Pattern.of([*leaf, *leaf, *hub], [*leaf, *hub, *leaf], (500, 500))
        >>> by_both(arrow)
        Coloring(both: 2 J v + 1 J^T u, at least 3)
    """
    limit = _longest(pattern) if fewer_than is None else fewer_than
    best: Coloring | None = None
    for mirrored in (False, True):
        found = _best_split(pattern, mirrored, limit)
        if found is not None:
            best, limit = found, found.passes
    return best


def _longest(pattern: Pattern) -> int:
    lengths = (pattern.row_lengths.max(initial=0), pattern.column_lengths.max(initial=0))
    return int(min(lengths))


def _best_split(pattern: Pattern, mirrored: bool, limit: int) -> Coloring | None:
    """The best way to take long rows (columns where mirrored) apart, below the limit."""
    tall = pattern.T if mirrored else pattern
    best: Coloring | None = None
    hoped_for = limit // WORTH_IT if pattern.nnz > LARGE else limit
    for bound, length in _promising(tall, hoped_for)[:SPLITS_TRIED]:
        if bound >= limit:
            break
        # A first look in one order; where that is far off, others would not make up for it.
        found = _split(pattern, tall, length, mirrored, visits=0)
        if bound < found.passes < NEAR * limit and pattern.nnz <= VISITS:
            found = _split(pattern, tall, length, mirrored, VISITS)
        if found.passes < limit:
            best, limit = found, found.passes
    return best


def _promising(tall: Pattern, limit: int) -> list[tuple[int, int]]:
    """Lengths to split at with a bound on the passes from below, below the limit, the best first.

    The rest has a row of that length, and the long rows meet in some column.
    """
    lengths = np.unique(tall.row_lengths)[:-1]
    lengths = lengths[(lengths > 0) & (lengths < limit)]
    if len(lengths) > SPLITS:
        lengths = lengths[np.linspace(0, len(lengths) - 1, SPLITS).astype(np.int64)]
    bounds = ((length + _most_long(tall, length), length) for length in lengths.tolist())
    return sorted(pair for pair in bounds if pair[0] < limit)


def _most_long(tall: Pattern, length: int) -> int:
    """How many rows longer than that the fullest column has."""
    columns = _restricted(tall, tall.row_lengths > length).indices
    return int(np.bincount(columns).max(initial=0))


def _restricted(pattern: Pattern, rows: np.ndarray) -> Pattern:
    """The pattern with all rows emptied but some."""
    starts = np.concatenate([[0], np.cumsum(np.where(rows, pattern.row_lengths, 0))])
    return Pattern(pattern.shape, starts, pattern.indices[np.repeat(rows, pattern.row_lengths)])


def _split(pattern: Pattern, tall: Pattern, length: int, mirrored: bool, visits: int) -> Coloring:
    long = tall.row_lengths > length
    across, _ = best_colors(_restricted(tall, ~long), visits=visits)
    down, _ = best_colors(_restricted(tall, long).T, visits=visits)
    columns, rows = (down, across) if mirrored else (across, down)
    by_row = ~long[pattern.indices] if mirrored else long[pattern.rows]
    source = _source(pattern, columns, rows, by_row)
    return Coloring("both", columns, rows, source, _least(pattern))


def _source(
    pattern: Pattern, columns: np.ndarray, rows: np.ndarray, by_row: np.ndarray
) -> np.ndarray:
    """Where each entry stands: in J^T u, behind all of J v, where ``by_row``, else in J v."""
    m, n = pattern.shape
    pulled = (count_of(columns) * m + rows[pattern.rows] * n) + pattern.indices
    return np.where(by_row, pulled, columns[pattern.indices] * m + pattern.rows)


def _least(pattern: Pattern) -> int:
    """Each pass gives max(m, n) numbers at most; one side alone is not both."""
    return max(-(-pattern.nnz // max(*pattern.shape, 1)), 2)
