"""Greedy star colouring: no path of four vertices has only two colours.

Colour sets are the bits of integers. For each vertex w:

    seen[w]     colours of its neighbours
    twice[w]    colours that two or more of its neighbours have
    locked[w]   colours that it may not see again, since the edge to the one neighbour of that
    colour is
                read at w and nowhere else
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pushforward.coloring.scheme import UNSEEDED, count_of
from pushforward.errors import InputError
from pushforward.pattern import Pattern


def star_colors(pattern: Pattern, order: np.ndarray, patient: bool) -> np.ndarray:
    """Star colours of the graph of a symmetric pattern, its diagonal left aside.

    Args:
        pattern: symmetric, (n, n).
        order: the vertices to colour, first to last.
        patient: whether neighbours of a vertex without a colour may share one; its own colour is
            then less free. Neither is better always.

    Returns:
        (n,) colours, -1 for vertices that are not in the order. Cost: O(nnz).
    """
    state = _State.of(pattern)
    for vertex in order.tolist():
        _assign(state, vertex, _free(state, vertex, patient))
    return np.array(state.colors, dtype=np.int64)


@dataclass(frozen=True)
class _State:
    starts: list[int]
    ends: list[int]
    colors: list[int]
    seen: list[int]
    twice: list[int]
    locked: list[int]
    first: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def of(cls, pattern: Pattern) -> _State:
        n = pattern.shape[0]
        seen, twice, locked = ([0] * n for _ in range(3))
        starts, ends = pattern.indptr.tolist(), pattern.indices.tolist()
        return cls(starts, ends, [UNSEEDED] * n, seen, twice, locked)

    def neighbours(self, vertex: int) -> list[int]:
        mine = self.ends[self.starts[vertex] : self.starts[vertex + 1]]
        return [other for other in mine if other != vertex]


def _free(state: _State, vertex: int, patient: bool) -> int:
    """The bit of the least colour that the vertex may take."""
    taken, mine = state.seen[vertex], state.twice[vertex]
    for other in state.neighbours(vertex):
        color = state.colors[other]
        if color < 0:
            taken |= 0 if patient else state.seen[other]
        else:
            taken |= state.seen[other] if mine >> color & 1 else state.locked[other]
    return ~taken & (taken + 1)


def _assign(state: _State, vertex: int, bit: int) -> None:
    """Give the vertex its colour and note what its neighbours see now."""
    state.colors[vertex] = color = bit.bit_length() - 1
    mine = state.twice[vertex]
    for other in state.neighbours(vertex):
        theirs = state.colors[other]
        if not state.seen[other] & bit:
            state.seen[other] |= bit
            state.first[other, color] = vertex
        else:
            _crowd(state, other, vertex, bit)
        if theirs >= 0 and mine >> theirs & 1:
            state.locked[other] |= bit


def _crowd(state: _State, hub: int, newcomer: int, bit: int) -> None:
    """The hub sees a colour again: edges of that colour are read at their other ends now."""
    color = state.colors[hub]
    if not state.twice[hub] & bit:
        state.twice[hub] |= bit
        if color >= 0:
            state.locked[state.first[hub, bit.bit_length() - 1]] |= 1 << color
    if color >= 0:
        state.locked[newcomer] |= 1 << color


def read_either_end(pattern: Pattern, colors: np.ndarray) -> np.ndarray:
    """Where H v holds (i, j) alone: in row i of the pass of j, else in row j of the pass of i.

    Raises:
        InputError: the colours are no star colouring.
    """
    n, count = pattern.shape[0], count_of(colors)
    rows, columns = pattern.nonzero()
    here, there = rows * count + colors[columns], columns * count + colors[rows]
    crowd = np.bincount(here, minlength=n * count)
    alone = crowd[here] == 1
    if not (alone | (crowd[there] == 1)).all():
        raise InputError(
            "expected a star colouring, got colours that leave an entry in company at both ends"
        )
    return np.where(alone, colors[columns] * n + rows, colors[rows] * n + columns)
