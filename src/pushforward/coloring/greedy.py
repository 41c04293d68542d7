"""Colours one column after the other, the least that no row of it has seen.

A row remembers the colours of its columns as the bits of one integer, so that colouring a column
costs one operation for each of its entries, however long the rows are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np

from pushforward.coloring.scheme import UNSEEDED
from pushforward.pattern import Pattern

WORD = 64
# From this many entries a column on, numpy's gathers beat integers of Python.
LONG_COLUMN = 48
# Orders that depend on what is left are made in at most this many rounds, each O(nnz).
ROUNDS = 200
# Up to so many pairs of columns in one row, neighbours are told apart.
PAIRS = 1_000_000
VISITS = 3_000_000


def greedy(by_column: Pattern, order: np.ndarray) -> np.ndarray:
    """Colours of columns such that no two columns with an entry in one row share one.

    Args:
        by_column: the transpose of the matrix: a row here is a column there.
        order: the columns to colour, first to last. Others stay without a colour.

    Returns:
        (n,) colours. Cost: O(nnz) operations on integers of as many bits as there are colours.
    """
    longest = by_column.nnz / max(len(order), 1)
    return (_greedy_in_words if longest > LONG_COLUMN else _greedy_in_integers)(by_column, order)


def _greedy_in_integers(by_column: Pattern, order: np.ndarray) -> np.ndarray:
    starts, rows = by_column.indptr.tolist(), by_column.indices.tolist()
    seen = [0] * by_column.shape[1]
    colors = [UNSEEDED] * by_column.shape[0]
    for column in order.tolist():
        mine = rows[starts[column] : starts[column + 1]]
        taken = 0
        for row in mine:
            taken |= seen[row]
        free = ~taken & (taken + 1)
        for row in mine:
            seen[row] |= free
        colors[column] = free.bit_length() - 1
    return np.array(colors, dtype=np.int64)


def _greedy_in_words(by_column: Pattern, order: np.ndarray) -> np.ndarray:
    """The same with the bits in arrays of words, which grow by a word where all bits are taken."""
    starts, rows = by_column.indptr.tolist(), by_column.indices
    seen = np.zeros((by_column.shape[1], 1), dtype=np.uint64)
    colors = np.full(by_column.shape[0], UNSEEDED, dtype=np.int64)
    for column in order.tolist():
        mine = rows[starts[column] : starts[column + 1]]
        taken = np.bitwise_or.reduce(seen[mine], axis=0).tobytes()
        taken = int.from_bytes(taken, "little")
        color = (~taken & (taken + 1)).bit_length() - 1
        if color >= WORD * seen.shape[1]:
            seen = np.concatenate([seen, np.zeros_like(seen)], axis=1)
        seen[mine, color // WORD] |= np.uint64(1 << (color % WORD))
        colors[column] = color
    return colors


def natural(pattern: Pattern) -> np.ndarray:
    """Columns as they come."""
    return np.flatnonzero(pattern.column_lengths)


def largest_first(pattern: Pattern) -> np.ndarray:
    """Columns with the most neighbours first; ties keep their order."""
    columns = natural(pattern)
    affordable = (pattern.row_lengths**2).sum() <= PAIRS
    counts = distinct_neighbours(pattern) if affordable else neighbours(pattern)
    return columns[np.argsort(-counts[columns], kind="stable")]


def distinct_neighbours(pattern: Pattern) -> np.ndarray:
    """How many columns each column shares a row with, itself among them, (n,)."""
    lengths = pattern.row_lengths[pattern.rows]
    asking = np.repeat(np.arange(pattern.nnz), lengths)
    within = np.arange(len(asking)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    met = pattern.indices[pattern.indptr[pattern.rows[asking]] + within]
    n = pattern.shape[1]
    pairs = np.unique(pattern.indices[asking] * n + met)
    return np.bincount(pairs // max(n, 1), minlength=n)


def smallest_last(pattern: Pattern) -> np.ndarray:
    """The columns with the fewest neighbours are taken away again and again; they come last.

    A few columns go at once, so that it takes some rounds and not one for each column.
    """
    left = natural(pattern)
    alive = pattern.column_lengths > 0
    at_once = _at_once(pattern, len(left))
    gone: list[np.ndarray] = []
    while len(left):
        ranking = np.argsort(neighbours(pattern, alive)[left], kind="stable")
        leaving = left[ranking[:at_once]]
        alive[leaving] = False
        left = np.delete(left, ranking[:at_once])
        gone.append(leaving)
    return np.concatenate(gone)[::-1] if gone else left


def incidence_degree(pattern: Pattern) -> np.ndarray:
    """The columns with the most coloured neighbours come first, a few at once."""
    left = natural(pattern)
    alive = pattern.column_lengths > 0
    total = neighbours(pattern)
    at_once = _at_once(pattern, len(left))
    taken: list[np.ndarray] = []
    while len(left):
        inside = (total - neighbours(pattern, alive))[left]
        ranking = np.lexsort((-total[left], -inside))
        entering = left[ranking[:at_once]]
        alive[entering] = False
        left = np.delete(left, ranking[:at_once])
        taken.append(entering)
    return np.concatenate(taken) if taken else left


def _at_once(pattern: Pattern, columns: int) -> int:
    rounds = min(max(VISITS // max(pattern.nnz, 1), 8), ROUNDS)
    return max(columns // rounds, 1)


def neighbours(pattern: Pattern, alive: np.ndarray | None = None) -> np.ndarray:
    """How many other columns each column meets, counted once for every row, (n,)."""
    lengths = pattern.row_lengths if alive is None else _alive_lengths(pattern, alive)
    met = np.repeat(lengths - 1, pattern.row_lengths)
    return np.bincount(pattern.indices, weights=met, minlength=pattern.shape[1]).astype(np.int64)


def _alive_lengths(pattern: Pattern, alive: np.ndarray) -> np.ndarray:
    return np.bincount(
        pattern.rows, weights=alive[pattern.indices], minlength=pattern.shape[0]
    ).astype(np.int64)


# Cheap ones first: orders are tried in this order until one meets the lower bound or effort runs
# out.
ORDERS: tuple[Callable[[Pattern], np.ndarray], ...] = (
    natural,
    largest_first,
    smallest_last,
    incidence_degree,
)


def by_classes(colors: np.ndarray, seed: int = 0) -> Generator[np.ndarray, np.ndarray, None]:
    """Orders that go through one colour after the other, without end.

    Greedy in such an order never takes more colours, and often fewer (iterated greedy). The
    colours come in reverse, by size, or in a random order that is the same every time. Send the
    new colours in.
    """
    random = np.random.default_rng(seed)
    turn = 0
    while True:
        counts = np.bincount(colors[colors >= 0])
        ranks = (
            np.arange(len(counts))[::-1],
            random.permutation(len(counts)),
            np.argsort(np.argsort(-counts, kind="stable")),
            random.permutation(len(counts)),
        )[turn % 4]
        seeded = np.flatnonzero(colors >= 0)
        colors = yield seeded[np.argsort(ranks[colors[seeded]], kind="stable")]
        turn += 1
