"""Colourings whose passes hold every entry by itself: by columns, by rows, and of the diagonal."""

from __future__ import annotations

import numpy as np

from pushforward.coloring.cliques import largest_clique
from pushforward.coloring.greedy import ORDERS, by_classes, greedy
from pushforward.coloring.lattice import lattice_colors
from pushforward.coloring.scheme import UNSEEDED, Coloring, count_of, read_columns, read_rows
from pushforward.errors import DimensionError, ShapeError
from pushforward.pattern import Pattern

# How many entries the greedy orders may visit in all: two million take about half a second.
VISITS = 2_000_000
# Repeated greedy may visit this part of them, in at most so many turns.
IMPROVEMENT = 6
MOST_TURNS = 300
# Larger patterns are looked at first, at so many columns.
LARGE = 500_000
LOOKS = 4
# Fewer columns are not worth a search for lattices.
LATTICE_SIZE = 16


def by_columns(pattern: Pattern, grid: tuple[int, ...] | None = None) -> Coloring:
    """Few products J v that hold every entry: columns that share no row share a pass.

    The best of lattice colours and of greedy colours in several orders; the search stops at the
    lower bound, and is the same every time.

    Args:
        pattern: the pattern of J, (m, n).
        grid: lengths of the axes of the input if it is a grid, with product n: stencils then take
            the fewest colours. Guessed from the pattern if None.

    Returns:
        A `Coloring` with ``kind="columns"``. Cost: O(nnz) for each order that is tried.

    Raises:
        ShapeError: the product of the grid is not n.

    Example:
        >>> by_columns(Pattern.of([0, 0, 1, 1], [0, 1, 1, 2], (2, 3)))
        Coloring(columns: 2 J v + 0 J^T u, at least 2)
    """
    colors, bound = best_colors(pattern, grid)
    return Coloring("columns", colors, None, read_columns(pattern, colors), bound)


def by_rows(pattern: Pattern, grid: tuple[int, ...] | None = None) -> Coloring:
    """Few products J^T u that hold every entry: rows that share no column share a pass.

    Args:
        pattern: the pattern of J, (m, n).
        grid: lengths of the axes of the output if it is a grid, with product m; guessed if None.

    Returns:
        A `Coloring` with ``kind="rows"``; see `by_columns`.

    Raises:
        ShapeError: the product of the grid is not m.

    Example:
        >>> by_rows(Pattern.of([0, 0, 1, 1], [0, 1, 1, 2], (2, 3)))
        Coloring(rows: 0 J v + 2 J^T u, at least 2)
    """
    colors, bound = best_colors(pattern.T, grid)
    return Coloring("rows", None, colors, read_rows(pattern, colors), bound)


def diagonal(
    pattern: Pattern, grid: tuple[int, ...] | None = None, by: str = "columns"
) -> Coloring:
    """Few passes that hold the diagonal of a square matrix, and perhaps nothing else.

    Columns j and k may share a pass unless (j, k) or (k, j) is an entry. The same colours serve
    products with J and with its transpose.

    Args:
        pattern: the pattern of J, (n, n).
        grid: lengths of the axes of the input if it is a grid, with product n; guessed if None.
        by: "columns" for products J v, "rows" for products J^T u.

    Returns:
        A `Coloring` with ``kind="diagonal"`` whose ``source`` is (n,), -1 where the diagonal is
        zero.

    Raises:
        DimensionError: the pattern is not square.
        ShapeError: the product of the grid is not n.

    Example:
        >>> ring = np.arange(6)
        >>> pattern = Pattern.of([*ring, *ring], [*ring, *(ring + 1) % 6], (6, 6))
        >>> by_columns(pattern).passes, diagonal(pattern).passes
        (2, 2)
    """
    _require_square(pattern)
    places = np.arange(pattern.shape[0])
    present = pattern.find(places, places) >= 0
    meetings = _meetings(pattern, present)
    colors, bound = best_colors(meetings, grid, least=largest_clique(meetings))
    colors = np.where(present, np.maximum(colors, 0), UNSEEDED)
    source = np.where(present, colors * len(places) + places, UNSEEDED)
    both = (colors, None) if by == "columns" else (None, colors)
    return Coloring("diagonal", *both, source, max(bound, int(present.any())))


def _require_square(pattern: Pattern) -> None:
    if pattern.shape[0] != pattern.shape[1]:
        raise DimensionError(
            f"expected a square pattern, got {pattern.shape}; use by_columns or by_rows"
        )


def _meetings(pattern: Pattern, present: np.ndarray) -> Pattern:
    """One row of two entries for each pair of columns that must not share a pass."""
    rows, columns = pattern.nonzero()
    apart = (rows != columns) & present[rows] & present[columns]
    rows, columns = rows[apart], columns[apart]
    pairs = Pattern.of(np.minimum(rows, columns), np.maximum(rows, columns), pattern.shape)
    ends = np.stack(pairs.nonzero(), axis=1).ravel()
    return Pattern((pairs.nnz, pattern.shape[1]), 2 * np.arange(pairs.nnz + 1), ends)


def best_colors(
    pattern: Pattern, grid: tuple[int, ...] | None = None, least: int = 0, visits: int = VISITS
) -> tuple[np.ndarray, int]:
    """Colours of columns that share no row, (n,), -1 for empty ones, and the lower bound.

    ``least`` is a lower bound that the caller knows; greedy orders visit ``visits`` entries at
    most.
    """
    _check_grid(grid, pattern.shape[1])
    bound = max(least_colors(pattern), least)
    return _search(pattern, grid, bound, visits), bound


def _check_grid(grid: tuple[int, ...] | None, size: int) -> None:
    if grid is not None and np.prod(grid, dtype=np.int64) != size:
        raise ShapeError(
            f"grid expects axes with product {size}, got {tuple(grid)}; None guesses them"
        )


def least_colors(pattern: Pattern) -> int:
    """A bound from below: the longest row, and how many columns fit into one pass.

    Columns of one colour share no row, so their lengths add up to m at most.
    """
    lengths = np.sort(pattern.column_lengths[pattern.column_lengths > 0])
    if not len(lengths):
        return 0
    at_most = int(np.searchsorted(np.cumsum(lengths), pattern.shape[0], side="right"))
    return max(int(pattern.row_lengths.max()), -(-len(lengths) // at_most))


def _search(pattern: Pattern, grid: tuple[int, ...] | None, bound: int, visits: int) -> np.ndarray:
    """Trivial colours, lattices, greedy orders, then repeated greedy, until the bound is met."""
    best = _trivial(pattern)
    if count_of(best) <= bound or _meet_all(pattern):
        return best
    if pattern.shape[1] > LATTICE_SIZE:
        found = lattice_colors(pattern, grid, bound, count_of(best))
        best = best if found is None else found
    if count_of(best) <= bound:
        return best
    best = _best_greedy(pattern, best, bound, visits)
    return _improved(pattern, best, bound, visits // IMPROVEMENT)


def _meet_all(pattern: Pattern) -> bool:
    """Whether, in a large pattern, every column looked at shares a row with every other."""
    filled = np.flatnonzero(pattern.column_lengths)
    return pattern.nnz > LARGE and all(
        len(np.unique(_columns_met(pattern, column))) == len(filled)
        for column in filled[np.linspace(0, len(filled) - 1, LOOKS).astype(np.int64)]
    )


def _columns_met(pattern: Pattern, column: int) -> np.ndarray:
    """The columns of all rows that a column has an entry in."""
    # A look through all entries costs far less than the transpose, which may never be wanted.
    entries = np.flatnonzero(pattern.indices == column)
    rows = np.searchsorted(pattern.indptr, entries, side="right") - 1
    ends = pattern.indptr[rows + 1]
    return np.concatenate(
        [pattern.indices[a:b] for a, b in zip(pattern.indptr[rows], ends, strict=True)]
    )


def _trivial(pattern: Pattern) -> np.ndarray:
    """One colour where no row has two entries, else a colour for each column with entries."""
    filled = pattern.column_lengths > 0
    if pattern.row_lengths.max(initial=0) <= 1:
        return np.where(filled, 0, UNSEEDED)
    return np.where(filled, np.cumsum(filled) - 1, UNSEEDED)


def _best_greedy(pattern: Pattern, best: np.ndarray, bound: int, visits: int) -> np.ndarray:
    affordable = max(visits // pattern.nnz, 1)
    for order in ORDERS[:affordable]:
        best = min(best, greedy(pattern.T, order(pattern)), key=count_of)
        if count_of(best) <= bound:
            break
    return best


def _improved(pattern: Pattern, best: np.ndarray, bound: int, visits: int) -> np.ndarray:
    """Greedy again and again, class after class: never more colours, often fewer."""
    turns = min(visits // max(pattern.nnz, 1), MOST_TURNS)
    if count_of(best) <= bound or not turns:
        return best
    classes = by_classes(best)
    order = next(classes)
    for _ in range(turns):
        best = greedy(pattern.T, order)
        if count_of(best) <= bound:
            break
        order = classes.send(best)
    return best
