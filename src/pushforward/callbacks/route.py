"""Where the steps of a network end, found from its graph, and found again by hooks alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pushforward.boundary import Arguments, Structure, as_real
from pushforward.callbacks.wrapped import interpreted, is_compiled
from pushforward.composites import composites
from pushforward.path.cuts import cuts
from pushforward.path.record import Call, Crossing, recorded_calls
from pushforward.path.steps import Border, borders, steps_between
from pushforward.purity import recording, untouched
from pushforward.tape import named_nodes, record

# Between this and its inverse the squares of a float32 vector neither underflow nor overflow.
TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Place:
    """A tensor of the forward pass, as what a module returns: which call of it, which output."""

    module: nn.Module
    call: int
    output: int


@dataclass(frozen=True, eq=False)
class Passage:
    """A forward pass over rows; ``edges`` are where gradients are wanted, the input first.

    ``graph`` are the names of the nodes, in the order of a walk: two passes with the same ones took
    the same way.
    """

    output: Tensor
    edges: tuple[GradientEdge, ...]
    graph: tuple[str, ...]

    @staticmethod
    def of(source: Tensor, output: Tensor, edges: Sequence[GradientEdge]) -> Passage:
        start = get_gradient_edge(source)
        walked = named_nodes([output.grad_fn], {start.node})
        return Passage(output, (start, *edges), tuple(name for _, name in walked))

    def norms(self, cotangents: Tensor) -> tuple[Tensor, torch.dtype]:
        """Norms of the rows of the gradients at each edge, (edges, rows), in float64.

        And the shortest dtype on the way, which says how accurate they are.
        """
        gradients = torch.autograd.grad(
            self.output, self.edges, cotangents.to(self.output), allow_unused=True
        )
        dtypes = [self.output.dtype, *(each.dtype for each in gradients if each is not None)]
        norms = torch.stack([_row_norms(each, self.output) for each in gradients]).double()
        if not all_between(norms, TINY, 1 / TINY):
            wide = [_row_norms(each, self.output, torch.float64) for each in gradients]
            norms = torch.stack(wide)
        return norms, min(dtypes, key=lambda dtype: dtype.itemsize)


@dataclass(frozen=True, eq=False)
class Route:
    """The steps of a network: their names, and the places where all but the first begin.

    ``composed`` is whether ops had to be written out, ``compiled`` whether parts are compiled.
    """

    names: tuple[str, ...]
    places: tuple[Place, ...]
    composed: bool
    compiled: bool

    def follow(self, model: nn.Module, rows: Tensor) -> Passage | None:
        """Pass rows through the model; None where it does not go as it went."""
        source = rows.detach().requires_grad_()
        with (
            interpreted() if self.compiled else nullcontext(),
            composites() if self.composed else nullcontext(),
            untouched(model),
            _hooked(model, self.places) as edges,
        ):
            value = model(source.clone())
            outputs = [as_real(leaf) for leaf in Structure.of(value)[0] if _is_real(leaf)]
        lengths = {each.shape[:1] for each in outputs}
        if len(edges) < len(self.places) or lengths != {rows.shape[:1]}:
            return None
        return Passage.of(source, _whole(outputs), [edges[place] for place in self.places])


def _is_real(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _whole(outputs: Sequence[Tensor]) -> Tensor:
    """The outputs as one matrix, (rows, numbers)."""
    rows = outputs[0].shape[0]
    with recording():
        flat = [part.reshape(rows, -1) for part in outputs]
        whole = flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)
        # An output that depends on nothing has no place in the graph; it gets one at its edge.
        return whole if whole.requires_grad else whole.clone().requires_grad_()


def _row_norms(gradient: Tensor | None, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The norm of each row, (rows,), computed in at least ``dtype``."""
    if gradient is None:
        return torch.zeros(len(like), dtype=dtype, device=like.device)
    flat = gradient.reshape(len(like), -1)
    wide = torch.promote_types(flat.dtype, dtype)
    return torch.linalg.vector_norm(flat, dim=1, dtype=wide)


def all_between(norms: Tensor, low: float, high: float) -> bool:
    """Whether all numbers are; NaN is not."""
    least, most = torch.stack(norms.aminmax()).tolist()
    return low < least and most < high


# --- finding the steps --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Survey:
    """A forward pass with every call of every module written down."""

    passage: Passage
    start: Crossing
    calls: tuple[Call, ...]
    marks: tuple[Border, ...]
    composed: bool
    compiled: bool

    @property
    def ends(self) -> list[str]:
        """What ends at each edge of the passage: a call, and first of all the input."""
        return ["", *(mark.call.name for mark in self.marks)]

    def route(self, chosen: Sequence[int]) -> tuple[Route, list[int]]:
        """The steps between some of the edges, given by their numbers; at which ones they begin."""
        marks = [self.marks[number - 1] for number in chosen]
        steps = steps_between(self.start, marks, Crossing.of(self.passage.output), self.calls)
        names = tuple(step.name for step in steps)
        places = _places(self.calls)
        begins = tuple(places[step.start.edge] for step in steps[1:])
        route = Route(names, begins, self.composed, self.compiled)
        return route, [self.passage.edges.index(step.start.edge) for step in steps]


def survey(model: nn.Module, rows: Tensor, layers: Sequence[str] | None) -> Survey:
    """Pass rows through the model and find where everything goes through one tensor."""
    with recorded_calls(model) as calls:
        tape = record(model, Arguments.of((rows,), 0, 0), 0)
    start, output = Crossing.of(tape.inputs[0]), _whole(tape.outputs)
    found = borders(calls, cuts(Crossing.of(output).node, start.node), layers)
    marks = tuple(mark for mark in found if mark.place.shape[:1] == (len(rows),))
    passage = Passage.of(tape.inputs[0], output, [mark.place.edge for mark in marks])
    return Survey(passage, start, tuple(calls), marks, tape.composed, is_compiled(model))


def _places(calls: Sequence[Call]) -> dict[GradientEdge, Place]:
    """The first call that returns each tensor."""
    times: Counter[nn.Module] = Counter()
    found: dict[GradientEdge, Place] = {}
    for call in calls:
        times[call.module] += 1
        for number, output in enumerate(call.outputs):
            found.setdefault(output.edge, Place(call.module, times[call.module], number))
    return found


# --- finding them again -------------------------------------------------------------------------


@contextmanager
def _hooked(model: nn.Module, places: Sequence[Place]) -> Iterator[dict[Place, GradientEdge]]:
    """Note the edges at the places, of the last evaluation while the context lasts."""
    edges: dict[Place, GradientEdge] = {}
    times: Counter[nn.Module] = Counter()
    wanted: dict[nn.Module, list[Place]] = {}
    for place in places:
        wanted.setdefault(place.module, []).append(place)

    def begin(*_: object) -> None:
        edges.clear()
        times.clear()

    def note(module: nn.Module, _: object, output: object) -> None:
        times[module] += 1
        values = [value for value in Structure.of(output)[0] if _has_edge(value)]
        for place in wanted[module]:
            if place.call == times[module] and place.output < len(values):
                edges[place] = get_gradient_edge(values[place.output])

    handles = [model.register_forward_pre_hook(begin)]
    handles += [module.register_forward_hook(note) for module in wanted]
    try:
        yield edges
    finally:
        for handle in handles:
            handle.remove()


def _has_edge(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.requires_grad
        and value.is_floating_point()
        and value.layout == torch.strided
    )
