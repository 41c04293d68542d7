"""Greedy acyclic colouring: the vertices of any two colours form a forest."""

from __future__ import annotations

from collections import Counter

import numpy as np

from pushforward.coloring.scheme import UNSEEDED
from pushforward.pattern import Pattern

Node = tuple[int, int]


def acyclic_colors(pattern: Pattern, order: np.ndarray, largest: int) -> np.ndarray:
    """Acyclic colours of the graph of a symmetric pattern, its diagonal left aside.

    Args:
        pattern: symmetric, (n, n).
        order: the vertices to colour, first to last.
        largest: no tree of two colours has more vertices than this, which keeps trees shallow.

    Returns:
        (n,) colours, -1 for vertices that are not in the order. Cost: O(nnz) look-ups for each
        colour.
    """
    starts, ends = pattern.indptr.tolist(), pattern.indices.tolist()
    colors = [UNSEEDED] * pattern.shape[0]
    trees = _Trees()
    for vertex in order.tolist():
        mine = ends[starts[vertex] : starts[vertex + 1]]
        near = [(other, colors[other]) for other in mine if other != vertex and colors[other] >= 0]
        colors[vertex] = color = _least_fitting(trees, near, largest)
        for other, theirs in near:
            trees.join((vertex, theirs), (other, color))
    return np.array(colors, dtype=np.int64)


def _least_fitting(trees: _Trees, near: list[Node], largest: int) -> int:
    """The least colour that closes no circle and makes no tree too large."""
    taken = {theirs for _, theirs in near}
    color = 0
    while color in taken or not _fits(trees, near, color, largest):
        color += 1
    return color


def _fits(trees: _Trees, near: list[Node], color: int, largest: int) -> bool:
    """Whether the neighbours of each colour lie in different trees, small enough to join."""
    sizes: Counter[int] = Counter()
    roots: set[Node] = set()
    for other, theirs in near:
        root = trees.root((other, color))
        sizes[theirs] += trees.size(root)
        if root in roots or sizes[theirs] >= largest:
            return False
        roots.add(root)
    return True


class _Trees:
    """Disjoint sets of (vertex, colour): the vertex in the forest of its own and that colour."""

    def __init__(self) -> None:
        self._parent: dict[Node, Node] = {}
        self._size: dict[Node, int] = {}

    def root(self, node: Node) -> Node:
        while (parent := self._parent.get(node, node)) != node:
            self._parent[node] = self._parent.get(parent, parent)
            node = parent
        return node

    def size(self, root: Node) -> int:
        return self._size.get(root, 1)

    def join(self, one: Node, other: Node) -> None:
        """Make one tree of two, of which neither node lies in the other's."""
        small, large = sorted((self.root(one), self.root(other)), key=self.size)
        self._size[large] = self.size(small) + self.size(large)
        self._parent[small] = large
