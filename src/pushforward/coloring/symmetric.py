"""Colourings of symmetric matrices, which read an entry or its mirror image: Hessians."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pushforward.coloring.direct import best_colors
from pushforward.coloring.forests import acyclic_colors
from pushforward.coloring.greedy import ORDERS
from pushforward.coloring.scheme import UNSEEDED, Coloring, Step, count_of
from pushforward.coloring.stars import read_either_end, star_colors
from pushforward.errors import InputError
from pushforward.pattern import Pattern

LEVELS = 64
# Trees of so many vertices are shallow; without a limit they may take fewer colours.
TREES = (2 * LEVELS, 8)
VISITS = 2_000_000
MOST_ENTRIES = 300_000


def star(pattern: Pattern, grid: tuple[int, ...] | None = None) -> Coloring:
    """Few products H v with a symmetric H that hold every entry or its mirror image.

    Neighbours have different colours, and no path of four vertices has only two (a star colouring):
    then entry (i, j) stands alone in row i of the pass of j, or in row j of the pass of i.

    Args:
        pattern: the pattern of H, (n, n), symmetric.
        grid: lengths of the axes of the input if it is a grid, with product n; guessed if None.

    Returns:
        A `Coloring` with ``kind="star"``. Cost: O(nnz) for each order that is tried.

    Raises:
        InputError: the pattern is not symmetric.
        ShapeError: the product of the grid is not n.

    Example:
        >>> star(Pattern.of_dense(np.eye(9) + np.eye(9, k=1) + np.eye(9, k=-1)))
        Coloring(star: 3 J v + 0 J^T u, at least 2)
    """
    _require_symmetric(pattern)
    bound = least_forest_colors(pattern)
    best, _ = best_colors(pattern, grid)
    for order in _orders(pattern, bound):
        for patient in (True, False):
            found = star_colors(pattern, order(pattern), patient)
            best = min(best, found, key=count_of)
        if count_of(best) <= bound:
            break
    return Coloring("star", best, None, read_either_end(pattern, best), bound)


def acyclic(pattern: Pattern) -> Coloring | None:
    """Few products H v with a symmetric H from which every entry follows by subtraction.

    Neighbours have different colours, and no circle has only two (an acyclic colouring): the
    vertices of two colours form trees, and the entries of a tree follow from its leaves inwards.
    That takes fewer passes than `star`, and rounding errors add up along the way.

    Args:
        pattern: the pattern of H, (n, n), symmetric.

    Returns:
        A `Coloring` with ``kind="acyclic"`` and `Step`s, one for each level of the trees but the
        first; None where there are more than 64 levels, or too many entries to search in.

    Raises:
        InputError: the pattern is not symmetric.

    Example:
        >>> acyclic(Pattern.of_dense(np.eye(9) + np.eye(9, k=1) + np.eye(9, k=-1)))
        Coloring(acyclic: 2 J v + 0 J^T u, at least 2)
    """
    _require_symmetric(pattern)
    if pattern.nnz > MOST_ENTRIES:
        return None
    bound = least_forest_colors(pattern)
    best: Coloring | None = None
    for order in _orders(pattern, bound):
        for largest in (pattern.shape[0], *TREES):
            colors = acyclic_colors(pattern, order(pattern), largest)
            if best is None or count_of(colors) <= best.passes:
                best = _better(best, _substituted(pattern, colors, bound))
        if best is not None and best.passes <= bound:
            break
    return best


def _better(one: Coloring | None, other: Coloring | None) -> Coloring | None:
    """The one with fewer passes, then with fewer steps."""
    present = [coloring for coloring in (one, other) if coloring is not None]
    return min(present, key=lambda coloring: (coloring.passes, _depth(coloring)), default=None)


def _depth(coloring: Coloring) -> int:
    return len(coloring.steps or ())


def _require_symmetric(pattern: Pattern) -> None:
    if not pattern.is_symmetric:
        raise InputError(
            f"expected a symmetric pattern, got {pattern!r}; unite it with its transpose first: "
            "pattern.union(pattern.T)"
        )


def least_forest_colors(pattern: Pattern) -> int:
    """A bound from below, from the number of edges.

    Any two of k colours make a forest: together (k - 1) n - k (k - 1) / 2 edges at most.
    """
    off_diagonal = pattern.rows != pattern.indices
    edges = int(off_diagonal.sum()) // 2
    vertices = len(np.unique(pattern.rows[off_diagonal]))
    counts = np.arange(1, vertices + 1)
    room = (counts - 1) * vertices - counts * (counts - 1) // 2
    return int(np.searchsorted(room, edges)) + 1 if edges else int(pattern.nnz > 0)


def _by_degree(pattern: Pattern) -> np.ndarray:
    filled = np.flatnonzero(pattern.row_lengths)
    return filled[np.argsort(-pattern.row_lengths[filled], kind="stable")]


def _orders(pattern: Pattern, bound: int) -> list[Callable[[Pattern], np.ndarray]]:
    affordable = max(VISITS // max(pattern.nnz, 1), 1)
    return [_by_degree, *ORDERS][:affordable]


def _substituted(pattern: Pattern, colors: np.ndarray, bound: int) -> Coloring | None:
    """The colouring with its substitution: all edges that are alone in a row, again and again."""
    n, count = pattern.shape[0], count_of(colors)
    rows, columns = pattern.nonzero()
    mirror = pattern.find(columns, rows)
    group = rows * count + colors[columns]
    members = _Groups(group, n * count)
    left = members.sizes.copy()
    open_ = np.ones(pattern.nnz, dtype=bool)
    source = np.full(pattern.nnz, UNSEEDED)
    steps: list[Step] = []
    while open_.any():
        alone = np.flatnonzero(open_ & (left[group] == 1))
        twice = left[group[mirror[alone]]] == 1
        alone = alone[~(twice & (rows[alone] > columns[alone]))]
        if not len(alone) or len(steps) > LEVELS:
            return None
        source[alone] = source[mirror[alone]] = colors[columns[alone]] * n + rows[alone]
        steps.append(_subtraction(members, group, alone, mirror))
        both = np.unique(np.concatenate([alone, mirror[alone]]))
        open_[both] = False
        left -= np.bincount(group[both], minlength=n * count)
    return Coloring("acyclic", colors, None, source, bound, tuple(steps[1:]))


class _Groups:
    """The entries of each row and colour."""

    def __init__(self, group: np.ndarray, count: int) -> None:
        self.order = np.argsort(group, kind="stable")
        self.sizes = np.bincount(group, minlength=count)
        self.starts = np.cumsum(self.sizes) - self.sizes

    def of(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For all members of the groups, one after the other: which group asked, and the entry."""
        sizes = self.sizes[groups]
        asking = np.repeat(np.arange(len(groups)), sizes)
        within = np.arange(len(asking)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return asking, self.order[self.starts[groups][asking] + within]


def _subtraction(
    members: _Groups, group: np.ndarray, alone: np.ndarray, mirror: np.ndarray
) -> Step:
    """Take all else in the row and colour of each entry from it and from its mirror image."""
    asking, operands = members.of(group[alone])
    targets = alone[asking]
    others = operands != targets
    targets, operands = targets[others], operands[others]
    off_diagonal = mirror[targets] != targets
    return Step(
        np.concatenate([targets, mirror[targets][off_diagonal]]),
        np.concatenate([operands, operands[off_diagonal]]),
    )
