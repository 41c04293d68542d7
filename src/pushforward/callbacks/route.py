"""Where the steps of a network end, found from its graph, and found again by hooks alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pushforward.boundary import Arguments, Structure
from pushforward.callbacks.wrapped import uncompiled
from pushforward.path.cuts import cuts
from pushforward.path.record import Call, Crossing, recorded_calls
from pushforward.path.steps import Border, borders, steps_between
from pushforward.tape import Tape, named_nodes, record, source_node

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

    tape: Tape
    output: Tensor
    edges: tuple[GradientEdge, ...]
    graph: tuple[str, ...]

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
    """The steps of a network: their names, and the places where all but the first begin."""

    names: tuple[str, ...]
    places: tuple[Place, ...]

    def follow(self, model: nn.Module, rows: Tensor) -> Passage | None:
        """Pass rows through the model; None where its modules are not called as they were."""
        with uncompiled(model), _hooked(model, self.places) as edges:
            tape = _record(model, rows)
        if len(edges) < len(self.places):
            return None
        return _passage(tape, [edges[place] for place in self.places])


def _record(model: nn.Module, rows: Tensor) -> Tape:
    return record(model, Arguments.of((rows,), 0, 0), 0)


def _passage(tape: Tape, edges: Sequence[GradientEdge]) -> Passage:
    output = _whole(tape)
    start = get_gradient_edge(tape.inputs[0])
    walked = named_nodes([output.grad_fn], {source_node(tape.inputs[0])})
    return Passage(tape, output, (start, *edges), tuple(name for _, name in walked))


def _whole(tape: Tape) -> Tensor:
    """The output as one matrix, (rows, numbers)."""
    rows = tape.outputs[0].shape[0]
    with torch.inference_mode(False), torch.enable_grad():
        flat = [part.reshape(rows, -1) for part in tape.outputs]
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
    calls: tuple[Call, ...]
    marks: tuple[Border, ...]

    @property
    def ends(self) -> list[str]:
        """What ends at each edge of the passage: a call, and first of all the input."""
        return ["", *(mark.call.name for mark in self.marks)]

    def route(self, chosen: Sequence[int]) -> tuple[Route, list[int]]:
        """The steps between some of the edges, given by their numbers; at which ones they begin."""
        start = Crossing.of(self.passage.tape.inputs[0])
        marks = [self.marks[number - 1] for number in chosen]
        steps = steps_between(start, marks, Crossing.of(self.passage.output), self.calls)
        places = [_place(step.start, self.calls) for step in steps[1:]]
        route = Route(tuple(step.name for step in steps), tuple(places))
        return route, [self.passage.edges.index(step.start.edge) for step in steps]


def survey(model: nn.Module, rows: Tensor, layers: Sequence[str] | None) -> Survey:
    """Pass rows through the model and find where everything goes through one tensor."""
    with recorded_calls(model) as calls:
        tape = _record(model, rows)
    start, output = Crossing.of(tape.inputs[0]), _whole(tape)
    found = borders(calls, cuts(Crossing.of(output).node, start.node), layers)
    marks = tuple(mark for mark in found if mark.place.shape[:1] == (len(rows),))
    passage = _passage(tape, [mark.place.edge for mark in marks])
    return Survey(passage, tuple(calls), marks)


def _place(crossing: Crossing, calls: Sequence[Call]) -> Place:
    """The first call that returns a tensor."""
    times: Counter[nn.Module] = Counter()
    for call in calls:
        times[call.module] += 1
        for number, output in enumerate(call.outputs):
            if output.edge == crossing.edge:
                return Place(call.module, times[call.module], number)
    raise AssertionError("every mark is the output of a call")


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
