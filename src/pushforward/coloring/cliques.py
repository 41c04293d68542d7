"""Cliques: columns of which any two meet, so that each needs a colour of its own."""

from __future__ import annotations

import numpy as np

from pushforward.pattern import Pattern

# So many candidates are compared each time.
SAMPLE = 16


def largest_clique(pairs: Pattern) -> int:
    """The size of a large clique of the graph whose edges are the rows, two entries each.

    Grown from a vertex with few and from one with many neighbours, always by the vertex that keeps
    the most candidates. Cost: O(nnz) and the neighbourhood of each vertex of the clique.
    """
    if not pairs.nnz:
        return 0
    vertices = len(np.unique(pairs.indices))
    if pairs.shape[0] == vertices * (vertices - 1) // 2:
        return vertices
    one, other = pairs.indices.reshape(-1, 2).T
    n = pairs.shape[1]
    graph = Pattern.of(np.concatenate([one, other]), np.concatenate([other, one]), (n, n))
    degrees = graph.row_lengths
    starts = {int(np.where(degrees > 0, degrees, n).argmin()), int(degrees.argmax())}
    return max(_grown(graph, start) for start in starts)


def _grown(graph: Pattern, start: int) -> int:
    candidates = _neighbours(graph, start)
    inside = np.zeros(graph.shape[1], dtype=bool)
    size = 1
    while len(candidates):
        inside[:] = False
        inside[candidates] = True
        best = max(candidates[:SAMPLE].tolist(), key=lambda v: inside[_neighbours(graph, v)].sum())
        candidates = np.intersect1d(candidates, _neighbours(graph, best), assume_unique=True)
        size += 1
    return size


def _neighbours(graph: Pattern, vertex: int) -> np.ndarray:
    return graph.indices[graph.indptr[vertex] : graph.indptr[vertex + 1]]
