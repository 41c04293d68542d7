"""The part of an autograd graph that leads from an input to an output, and its first layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

# Ops that hand on the same numbers in the same order.
RESHAPES = frozenset(
    {
        *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0"),
        *("UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1", "CloneBackward0"),
    }
)

_FEW_CHANNELS = 4


@dataclass(frozen=True, eq=False)
class Between:
    """The nodes on the ways from ``x`` to ``y``.

    Attributes:
        users: for each place, a node and the number of its result, the nodes that use it with the
            position at which they do.
        names: of the nodes.
    """

    source: GradientEdge
    users: dict[tuple[Node, int], list[tuple[Node, int]]] = field(repr=False)
    names: dict[Node, str] = field(repr=False)

    @staticmethod
    def of(y: Tensor, x: Tensor) -> Between:
        source = get_gradient_edge(x)
        if not y.requires_grad:
            return Between(source, {}, {})
        users, names = _users(get_gradient_edge(y).node, source.node)
        return Between(source, *_leading_from(source, users, names))

    @property
    def connects(self) -> bool:
        """Whether y depends on x."""
        return bool(self.names)

    def sole_user(self, place: tuple[Node, int]) -> tuple[Node, int] | None:
        """The one node that uses a place, and at which position."""
        found = self.users.get(place, [])
        return found[0] if len(found) == 1 else None


Users = dict[tuple[Node, int], list[tuple[Node, int]]]


def _users(root: Node, source: Node) -> tuple[Users, dict[Node, str]]:
    """Who uses what, behind a node and not past the source."""
    users: Users = defaultdict(list)
    names = {root: root.name()}
    pending = [root]
    while pending:
        node = pending.pop()
        if node is source:
            continue
        for position, (parent, number) in enumerate(node.next_functions):
            if parent is None:
                continue
            users[parent, number].append((node, position))
            if parent not in names:
                names[parent] = parent.name()
                pending.append(parent)
    return users, names


def _leading_from(
    source: GradientEdge, users: Users, names: dict[Node, str]
) -> tuple[Users, dict[Node, str]]:
    """The same without what does not depend on the source."""
    results = defaultdict(list)
    for node, number in users:
        results[node].append(number)
    start = (source.node, source.output_nr)
    kept: Users = {}
    reached = {source.node: names[source.node]} if source.node in names else {}
    pending = [start]
    while pending:
        place = pending.pop()
        kept[place] = users.get(place, [])
        for node, _ in kept[place]:
            if node not in reached:
                reached[node] = names[node]
                pending.extend((node, number) for number in results[node])
    return kept, reached


@dataclass(frozen=True, eq=False)
class Affine:
    """A first layer ``h = x W^T + b``, seen from the graph: all that y knows of x goes through h.

    Attributes:
        edge: where the gradient of h arrives, ``(rows, h)``.
        weight: ``(h, n)``, with its graph.
        rows: so many rows hold one batch; each belongs to one sample, in their order.
    """

    edge: GradientEdge
    weight: Tensor
    rows: int


@dataclass(frozen=True, eq=False)
class Convolution:
    """A first layer that is a convolution; ``arguments`` are what torch.convolution takes next."""

    edge: GradientEdge
    weight: Tensor
    input_shape: tuple[int, ...]
    arguments: tuple[Any, ...]

    @property
    def has_few_inputs(self) -> bool:
        """Whether it has few input channels, on a CPU: an image."""
        *_, transposed, _, groups = self.arguments
        few = self.weight.shape[1] * groups <= _FEW_CHANNELS
        return few and not transposed and self.weight.device.type == "cpu"


def first_layer(between: Between, batch: int) -> Affine | Convolution | None:
    """The layer that x goes into, and nothing else; None where that is no such layer."""
    place = (between.source.node, between.source.output_nr)
    while (user := between.sole_user(place)) is not None:
        node, position = user
        if between.names[node] not in RESHAPES:
            rule = _LAYERS.get(between.names[node])
            return None if rule is None else rule(node, position, between, batch)
        place = (node, 0)
    return None


def _affine(saved: str, input_at: int, node: Any, position: int, batch: int) -> Affine | None:
    """A product of a matrix of samples with a weight; not of a weight with samples."""
    if position != input_at or getattr(node, "_saved_alpha", 1) != 1:
        return None
    weight = getattr(node, saved).t()
    rows = getattr(node, f"_saved_{'mat1' if input_at else 'self'}_sym_sizes")[0]
    return Affine(GradientEdge(node, 0), weight, rows) if rows % batch == 0 else None


def _addmm(node: Any, position: int, between: Between, batch: int) -> Affine | None:
    return _affine("_saved_mat2", 1, node, position, batch)


def _mm(node: Any, position: int, between: Between, batch: int) -> Affine | None:
    return _affine("_saved_mat2", 0, node, position, batch)


def _convolution(node: Any, position: int, between: Between, batch: int) -> Convolution | None:
    if position != 0:
        return None
    weight = node._saved_weight
    arguments = (
        node._saved_stride,
        node._saved_padding,
        node._saved_dilation,
        node._saved_transposed,
        node._saved_output_padding,
        node._saved_groups,
    )
    shape = tuple(node._saved_input.shape)
    return (
        Convolution(GradientEdge(node, 0), weight, shape, arguments) if shape[0] == batch else None
    )


Layer = Callable[[Any, int, Between, int], Affine | Convolution | None]
_LAYERS: dict[str, Layer] = {
    "AddmmBackward0": _addmm,
    "MmBackward0": _mm,
    "ConvolutionBackward0": _convolution,
}
