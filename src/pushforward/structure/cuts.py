"""Cuts of a graph: sets of tensors that everything goes through, and the cheapest way over them.

J = J_k ... J_1 at any sequence of cuts. Each factor is had by rows or by columns, or is itself a
product; dynamic programming over all pairs of cuts finds the order with the fewest operations.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property

from pushforward.structure.graph import Graph, Step, Value

# Only so many of the narrowest cuts are looked at: the search takes the cube of their number.
_MOST_CUTS = 24
# A byte moved takes about as long as this many operations.
OPERATIONS_PER_BYTE = 3.0


@dataclass(frozen=True)
class Tensors:
    """Where the tensors of a cut are made: (number of the op, which of its outputs), in order."""

    made: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]

    @property
    def width(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class Cut:
    """Tensors that all dependence goes through after some step; ``names`` are the ops around it."""

    tensors: Tensors
    after: int
    name: str

    @property
    def width(self) -> int:
        return self.tensors.width


@dataclass(frozen=True)
class Way:
    """How to get the factor from one boundary to another: by rows, by columns, or as a product."""

    start: int
    stop: int
    kind: str
    work: float
    parts: tuple[Way, ...] = ()

    @property
    def leaves(self) -> list[Way]:
        """The factors that passes are made for, last one (the output's) first."""
        if not self.parts:
            return [self]
        return [leaf for part in reversed(self.parts) for leaf in part.leaves]


@dataclass
class Chain:
    """Boundaries in order, input first and output last, and the work between them."""

    widths: tuple[int, ...]
    work: tuple[float, ...]
    _best: dict[tuple[int, int], Way] = field(default_factory=dict)

    @cached_property
    def ends(self) -> list[float]:
        """The work of one pass from the input to each boundary."""
        total, ends = 0.0, [0.0]
        for part in self.work:
            total += part
            ends.append(total)
        return ends

    def best(self, start: int, stop: int) -> Way:
        """The cheapest way from one boundary to another."""
        if (start, stop) not in self._best:
            self._best[start, stop] = self._search(start, stop)
        return self._best[start, stop]

    def _search(self, start: int, stop: int) -> Way:
        one = self.ends[stop] - self.ends[start]
        # A pass by columns stands on a graph of a pass by rows, which has to be made first.
        ways = [
            Way(start, stop, "rows", self.widths[stop] * one),
            Way(start, stop, "columns", (self.widths[start] + 1) * one),
        ]
        for middle in range(start + 1, stop):
            low, high = self.best(start, middle), self.best(middle, stop)
            product = 2.0 * self.widths[start] * self.widths[middle] * self.widths[stop]
            ways.append(Way(start, stop, "product", low.work + high.work + product, (low, high)))
        return min(ways, key=lambda way: way.work)


def cuts(graph: Graph, lead: int = 1) -> list[Cut]:
    """The narrow cuts of a graph, in order; sizes are those of one of ``lead`` samples."""
    found = _all_cuts(graph, lead)
    narrow = [
        cut
        for before, cut, after in zip([None, *found], found, [*found[1:], None], strict=False)
        if (before is None or cut.width <= before.width)
        and (after is None or cut.width <= after.width)
    ]
    chosen = sorted(narrow, key=lambda cut: cut.width)[:_MOST_CUTS]
    return sorted(chosen, key=lambda cut: cut.after)


def _all_cuts(graph: Graph, lead: int) -> list[Cut]:
    last_use = _last_uses(graph)
    made: dict[Value, tuple[int, int, int, bool]] = {}
    alive: dict[Value, None] = {value: None for value in graph.inputs if value in last_use}
    found = []
    for place, step in enumerate(graph.steps[:-1]):
        for output, (value, size) in enumerate(zip(step.writes, step.sizes, strict=True)):
            made[value] = (step.number, output, size // lead, not step.mutates)
            if last_use.get(value, -1) > place:
                alive[value] = None
        alive = {value: None for value in alive if last_use[value] > place}
        if _is_cut(graph, alive, made):
            ordered = sorted(made[value][:3] for value in alive)
            tensors = Tensors(
                tuple((number, output) for number, output, _ in ordered),
                tuple(size for *_, size in ordered),
            )
            found.append(Cut(tensors, place, f"{step.op} -> {graph.steps[place + 1].op}"))
    return found


def _last_uses(graph: Graph) -> dict[Value, int]:
    """The last step that reads each value; outputs are read after the end."""
    last: dict[Value, int] = {}
    for place, step in enumerate(graph.steps):
        for value in step.reads:
            last[value] = place
    last.update(dict.fromkeys(graph.outputs, len(graph.steps)))
    return last


def _is_cut(
    graph: Graph, alive: dict[Value, None], made: dict[Value, tuple[int, int, int, bool]]
) -> bool:
    """Whether every live tensor was made whole by an op, and none of another."""
    if not alive or any(value not in made or not made[value][3] for value in alive):
        return False
    return len(alive) == 1 or not _related(graph, alive)


def _related(graph: Graph, alive: dict[Value, None]) -> bool:
    """Whether one of some values was computed from another."""
    by_value = {value: step for step in graph.steps for value in step.writes}
    for value in alive:
        pending, seen = list(by_value[value].reads), set()
        while pending:
            source = pending.pop()
            if source in alive:
                return True
            if source not in seen and source in by_value:
                seen.add(source)
                pending += by_value[source].reads
    return False


def chain(graph: Graph, found: list[Cut], n: int, m: int, lead: int = 1) -> Chain:
    """The boundaries that some cuts make, with the work of a pass over each part."""
    bounds = [-1, *(cut.after for cut in found), len(graph.steps) - 1]
    parts = [
        sum(_work(step) for step in graph.steps[low + 1 : high + 1]) / lead
        for low, high in itertools.pairwise(bounds)
    ]
    return Chain((n, *(cut.width for cut in found), m), tuple(parts))


def _work(step: Step) -> float:
    """One pass of an op: about its operations, and what it moves."""
    return step.flops + OPERATIONS_PER_BYTE * step.moved
