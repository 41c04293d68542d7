"""What a colouring is: seeds for a few passes, and where in their results each entry stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pushforward.errors import InputError, ShapeError
from pushforward.pattern import Pattern

UNSEEDED = -1


class Step(NamedTuple):
    """One level of a substitution: subtract what is known from what is not known yet.

    Both arrays have one element for each subtraction and hold positions in the list of entries::

        values[targets] -= values[operands]         a target stands once for each of its operands

    No target of a step is an operand of it, so that a step is one gather and one scattered sum::

        values = values.index_add(-1, targets, values.index_select(-1, operands), alpha=-1)
    """

    targets: np.ndarray
    operands: np.ndarray


@dataclass(frozen=True, eq=False)
class Coloring:
    """Few products with J or its transpose that hold all wanted entries of J, and where they stand.

    Pass c of J v takes for v the sum of the unit vectors of the columns with colour c; pass c of
    J^T u likewise the rows. With

        pushed = J @ seeds_of_columns.T, transposed     (jvps, m)
        pulled = seeds_of_rows @ J                      (vjps, n)

    entry k (in the order of the pattern) is element ``source[k]`` of ``pushed`` and ``pulled``,
    both flattened, one behind the other. Where ``steps`` is given, that element is the entry plus
    others, which the steps subtract in their order; see `Step`.

    Args:
        kind: "columns", "rows", "both", "star", "acyclic" or "diagonal".
        column_colors: (n,) integers, -1 for a column in no pass; None if no pass is J v.
        row_colors: (m,) integers, -1 for a row in no pass; None if no pass is J^T u.
        source: (nnz,) integers. For "diagonal" (n,): one for each place on the diagonal, -1 where
            the pattern has no entry and the value is zero.
        lower_bound: no colouring of this kind has fewer passes than this.
        steps: what "acyclic" subtracts; None for the others.
    """

    kind: str
    column_colors: np.ndarray | None
    row_colors: np.ndarray | None
    source: np.ndarray
    lower_bound: int
    steps: tuple[Step, ...] | None = None

    @property
    def jvps(self) -> int:
        """How many passes are products J v."""
        return count_of(self.column_colors)

    @property
    def vjps(self) -> int:
        """How many passes are products J^T u."""
        return count_of(self.row_colors)

    @property
    def passes(self) -> int:
        """All passes: jvps + vjps."""
        return self.jvps + self.vjps

    def __repr__(self) -> str:
        return (
            f"Coloring({self.kind}: {self.jvps} J v + {self.vjps} J^T u, "
            f"at least {self.lower_bound})"
        )


def count_of(colors: np.ndarray | None) -> int:
    """How many colours there are: one more than the largest."""
    return 0 if colors is None else int(colors.max(initial=UNSEEDED)) + 1


def seeds(colors: np.ndarray, count: int | None = None) -> np.ndarray:
    """The vectors that the passes are made with.

    Args:
        colors: (size,) integers, -1 for what is in no pass.
        count: how many passes; as many as there are colours if None.

    Returns:
        A boolean array (count, size), True where an element has the colour of the pass.

    Raises:
        InputError: some colour is not below count.

    Example:
        >>> seeds(np.array([0, 1, 0, -1])).astype(int)
        array([[1, 0, 1, 0],
               [0, 1, 0, 0]])
    """
    colors = np.asarray(colors)
    needed = count_of(colors)
    count = needed if count is None else count
    if needed > count:
        raise InputError(f"seeds expects at least {needed} passes for these colours, got {count}")
    return colors == np.arange(count)[:, None]


def recover(coloring: Coloring, pushed: Any = None, pulled: Any = None) -> np.ndarray:
    """The entries from the results of the passes: the reference for faster ways to gather.

    Args:
        coloring: how the passes were made.
        pushed: (jvps, m), the products J v; None if there are none.
        pulled: (vjps, n), the products J^T u; None if there are none.

    Returns:
        (nnz,) entries in CSR order; (n,) for "diagonal", with zeros where there is no entry.

    Raises:
        ShapeError: the numbers of products are not those of the colouring.

    Example:
        >>> from pushforward.coloring import by_columns
        >>> J = np.array([[1.0, 2.0, 0.0], [0.0, 3.0, 4.0]])
        >>> coloring = by_columns(Pattern.of_dense(J))
        >>> recover(coloring, seeds(coloring.column_colors) @ J.T)
        array([1., 2., 3., 4.])
    """
    flat = np.concatenate(
        [
            _flat("pushed", pushed, coloring.jvps, coloring.column_colors),
            _flat("pulled", pulled, coloring.vjps, coloring.row_colors),
            [0.0],  # where -1 points
        ]
    )
    values = flat[coloring.source]
    for step in coloring.steps or ():
        np.subtract.at(values, step.targets, values[step.operands])
    return values


def _flat(name: str, results: Any, count: int, colors: np.ndarray | None) -> np.ndarray:
    results = np.zeros((0, 0)) if results is None else np.asarray(results)
    if results.ndim != 2 or results.shape[0] != count:
        raise ShapeError(
            f"{name} expects ({count}, size) results, one row for each pass, got {results.shape}"
        )
    return results.ravel()


def read_columns(pattern: Pattern, colors: np.ndarray) -> np.ndarray:
    """Where J v holds each entry: row i of the pass of the column's colour."""
    return colors[pattern.indices] * pattern.shape[0] + pattern.rows


def read_rows(pattern: Pattern, colors: np.ndarray) -> np.ndarray:
    """Where J^T u holds each entry: column j of the pass of the row's colour."""
    return colors[pattern.rows] * pattern.shape[1] + pattern.indices
