"""Where an autograd graph is one node wide: the nodes that all paths to the input go through."""

from __future__ import annotations

from collections.abc import Iterator

from torch.autograd.graph import Node


def cuts(output: Node | None, source: Node) -> set[Node]:
    """Return the nodes that all dependence of ``output`` on ``source`` passes through.

    Both ends are among them; where nothing connects them the set is empty. In a topological order
    of the nodes between the two, a node is a cut exactly where no edge spans over it. One walk,
    without recursion: O(nodes + edges).
    """
    order = between(output, source)
    position = {node: place for place, node in enumerate(order)}
    found, reach = set(), 0
    for place, node in enumerate(order):
        if reach <= place:
            found.add(node)
        ahead = [position[parent] for parent in _parents(node) if parent in position]
        reach = max([reach, *ahead]) if node is not source else reach
    return found


def between(output: Node | None, source: Node) -> list[Node]:
    """Return the nodes on the paths from ``output`` back to ``source``, each before its parents."""
    if output is None:
        return []
    leads = {source}
    finished = []
    for node in _postorder(output, source):
        if node is source or any(parent in leads for parent in _parents(node)):
            leads.add(node)
            finished.append(node)
    return finished[::-1]


def _postorder(output: Node, source: Node) -> Iterator[Node]:
    """Visit every node behind ``output``, parents first, and nothing behind ``source``."""
    seen = {output}
    pending = [(output, iter(_parents(output)))]
    while pending:
        node, rest = pending[-1]
        parent = next(rest, None)
        if parent is None:
            pending.pop()
            yield node
        elif parent not in seen:
            seen.add(parent)
            pending.append((parent, iter(() if parent is source else _parents(parent))))


def _parents(node: Node) -> list[Node]:
    return [parent for parent, _ in node.next_functions if parent is not None]
