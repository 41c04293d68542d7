"""A bound on the spectral norm of a step, followed op by op through its branches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from pushforward.path.cuts import between
from pushforward.path.local import MOVES, POINTWISE, Bound, Op, bound_of, kind_of, signed
from pushforward.path.places import Samples, dtype_of, place_of, shape_of
from pushforward.path.pull import Passes
from pushforward.path.rescue import is_tiny
from pushforward.path.steps import Step

# Beyond that, so many layouts and local norms take longer than they tell.
MOST_NODES = 4000

# By node and number, the inputs that lead back to the start of a step.
Inputs = dict[Node, dict[int, GradientEdge]]


@dataclass(frozen=True, eq=False)
class Reach:
    """log of a bound on ||d v / d h||_2 for a tensor v inside the step, (samples,).

    ``exact`` says that it is the norm itself, ``rigid`` that d v / d h has orthonormal rows, which
    leave the norm of what is multiplied on the left as it is.
    """

    log: Tensor
    exact: bool = False
    rigid: bool = False


def log_spectral_by_ops(passes: Passes, step: Step, samples: int) -> Reach | None:
    """Bound ||d h_stop / d h_start||_2 by the norms of the ops between; None where one is lacking.

    Where branches meet, triangles: ||d(a + b)|| <= ||da|| + ||db||, and a product is a sum of two;
    rows that do not overlap add their squares. Elementwise ops upon each other are one.
    """
    order = between(step.stop.node, step.start.node)[::-1]
    if not order:  # nothing leads back
        never = torch.full((samples,), -torch.inf, dtype=torch.float64, device=step.stop.device)
        return Reach(never, exact=True)
    if len(order) > MOST_NODES:
        return None
    walk = _Walk.along(passes, step, order, samples)
    return None if walk is None else walk.end()


@dataclass(eq=False)
class _Walk:
    passes: Passes
    step: Step
    order: Sequence[Node]
    samples: Samples
    inputs: Inputs
    reach: dict[Node, Reach]
    roots: dict[Node, GradientEdge]

    @staticmethod
    def along(passes: Passes, step: Step, order: Sequence[Node], samples: int) -> _Walk | None:
        inputs = _inputs(order)
        edges = list({edge for found in inputs.values() for edge in found.values()})
        edges.append(GradientEdge(step.stop.node, step.stop.edge.output_nr))
        if not all(dtype_of(edge).is_floating_point for edge in edges):
            return None
        apart = Samples(samples, passes, step.stop, edges)
        zero = torch.zeros(samples, dtype=torch.float64, device=step.stop.device)
        start = {step.start.node: Reach(zero, exact=True, rigid=True)}
        return _Walk(passes, step, order, apart, inputs, start, {})

    def end(self) -> Reach | None:
        for node in self.order[1:]:
            found = self._reach(node)
            if found is None:
                return None
            self.reach[node] = found
        return self.reach[self.step.stop.node]

    def _reach(self, node: Node) -> Reach | None:
        found = self._by_ops(node)
        root = self._root(node)
        if root is None:
            return found
        self.roots[node] = root
        if list(self.inputs[node].values()) == [root]:
            return found
        collapsed = self._collapsed(node, root)
        return found if collapsed is None else _less(found, collapsed)

    def _by_ops(self, node: Node) -> Reach | None:
        special = self._normalised(node)
        if special is not None:
            return special
        op = Op(node, self.inputs[node], self.samples, self.step.stop.device)
        parts: list[tuple[Bound, Reach]] = []
        for number, edge in op.inputs.items():
            bound = bound_of(op, number)
            if bound is None:
                return None
            parts.append((bound, self.reach[edge.node]))
        if len(parts) == 1:
            return _through(op, *parts[0])
        logs = torch.stack([bound.log + reach.log for bound, reach in parts])
        return Reach(_root_of_squares(logs) if op.kind in DISJOINT else logs.logsumexp(dim=0))

    def _root(self, node: Node) -> GradientEdge | None:
        """The one tensor that a node depends on element by element, if there is one."""
        edges = self.inputs[node].values()
        if kind_of(node) not in POINTWISE or len(node._input_metadata) != 1:
            return None
        roots = {self.roots.get(edge.node, edge) for edge in edges}
        shapes = {shape_of(edge) for edge in edges} | {shape_of(GradientEdge(node, 0))}
        return roots.pop() if len(roots) == 1 and len(shapes) == 1 else None

    def _collapsed(self, node: Node, root: GradientEdge) -> Reach | None:
        """One diagonal for all elementwise ops since the root; None where it may have become too
        small for its dtype."""
        stop = place_of(GradientEdge(node, 0), self.step.stop.device)
        start = place_of(root, self.step.stop.device)
        ones = torch.ones(1, *stop.shape, dtype=stop.dtype, device=stop.device)
        diagonal = self.passes.pull(stop, start, ones)[0].abs()
        before = self.reach[root.node]
        largest = self.samples.most(diagonal, root)
        exact = before.rigid and self.samples.tells_apart(root)
        if bool(is_tiny(largest, stop.dtype).any()):
            return None
        return Reach(before.log + largest.log(), exact)

    def _normalised(self, node: Node) -> Reach | None:
        """x times rsqrt(mean(x^2) + c): at most that factor, where ops would say twice as much."""
        if node.name() != "MulBackward0" or len(self.inputs[node]) != 2:
            return None
        for x, factor in itertools.permutations(self.inputs[node].values()):
            inverse = _inverse_rms(factor.node, x, self.inputs)
            if inverse is not None:
                return Reach(self.reach[x.node].log + self.samples.most(inverse, factor).log())
        return None


# Ops with rows of their own for each input, or that choose one of their inputs for each row; the
# rules of the last two are such that it holds for ties as well.
DISJOINT = frozenset({"Cat", "Stack", "Where", "Maximum", "Minimum"})


def _inputs(order: Sequence[Node]) -> Inputs:
    """The inputs of each node that lead back to the start, by their number."""
    inside = set(order)
    return {
        node: {
            number: GradientEdge(parent, output)
            for number, (parent, output) in enumerate(node.next_functions)
            if parent in inside
        }
        for node in order[1:]
    }


def _through(op: Op, bound: Bound, reach: Reach) -> Reach:
    """One op after what came before: exact where either leaves norms as they are."""
    log = bound.log + reach.log
    entering, leaving = _numel(op.shape(next(iter(op.inputs)))), _numel(shape_of(op.output))
    if op.kind not in MOVES and not (op.kind == "Expand" and leaving == entering):
        return Reach(log, bound.exact and reach.rigid)
    keeps_norms = op.outputs == 1 and leaving >= entering
    rigid = reach.rigid and leaving <= entering
    return Reach(log, reach.exact and (keeps_norms or reach.rigid), rigid)


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _less(one: Reach | None, other: Reach) -> Reach:
    if one is None or other.exact:
        return other
    if one.exact:
        return one
    return Reach(torch.minimum(one.log, other.log))


def _root_of_squares(logs: Tensor) -> Tensor:
    return (2 * logs).logsumexp(dim=0) / 2


def _inverse_rms(node: Any, x: GradientEdge, inputs: Inputs) -> Tensor | None:
    """The value of a node that is rsqrt(mean(x^2) + c) of the tensor at an edge; c >= 0 does not
    depend on the start of the step, nor does it make the value larger than the mean."""
    mean = _without_constant(_only_input(node, "RsqrtBackward0", inputs), inputs)
    power = _only_input(mean, "MeanBackward1", inputs)
    if _only_input(power, "PowBackward0", inputs) is None or _only_edge(power, inputs) != x:
        return None
    if power._saved_exponent != 2 or not mean._saved_keepdim:
        return None
    squares = power._saved_self.double().square().mean(dim=_dims(mean), keepdim=True)
    inverse = node._saved_result.double()
    if inverse.shape != squares.shape:
        return None
    return inverse if bool((inverse.square() * squares <= 1 + 1e-3).all()) else None


def _only_edge(node: Any, inputs: Inputs) -> GradientEdge | None:
    """The one input of a node that leads back to the start, if it is one."""
    edges = list(inputs.get(node, {}).values())
    return edges[0] if len(edges) == 1 else None


def _only_input(node: Any, name: str, inputs: Inputs) -> Any:
    """The node of that input, if the node is of this kind."""
    edge = _only_edge(node, inputs) if node is not None and node.name() == name else None
    return None if edge is None else edge.node


def _without_constant(node: Any, inputs: Inputs) -> Any:
    """What a constant is added to; a node that adds nothing is returned as it is."""
    if node is None or not node.name().startswith("AddBackward"):
        return node
    plain = 0 in inputs.get(node, {}) or getattr(node, "_saved_alpha", 1) == 1
    return _only_input(node, node.name(), inputs) if plain else None


def _dims(node: Any) -> list[int]:
    return [signed(dim) for dim in node._saved_dim]
