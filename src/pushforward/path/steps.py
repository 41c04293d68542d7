"""How a network falls into steps: from one tensor that everything passes through to the next."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn
from torch.autograd.graph import Node

from pushforward.errors import InputError
from pushforward.path.record import Call, Crossing, module_names


@dataclass(frozen=True, eq=False)
class Step:
    """A part of a network between two places that all dependence passes through.

    Attributes:
        name: what stands in its row.
        leaves: numbers of the leaf calls inside, first and one past the last.
        start, stop: the places before and after it, in the order of the forward pass.
        call: the one leaf call that the step consists of, if it is nothing else.
    """

    name: str
    leaves: tuple[int, int]
    start: Crossing
    stop: Crossing
    call: Call | None


@dataclass(frozen=True, eq=False)
class Border:
    """A place where one step may end, and the call that ends there."""

    place: Crossing
    call: Call


def borders(
    calls: Sequence[Call], cut_nodes: set[Node], layers: Sequence[str] | None
) -> list[Border]:
    """Where steps may end, in the order of the forward pass: each is one tensor wide.

    By default outputs of leaf calls, and of containers that close over leaf calls which are none
    (a residual block); with ``layers`` outputs of the modules that match.
    """
    found: list[Border] = []
    taken: set[Node] = set()
    covered = 0
    for call in calls:
        place = next((o for o in call.outputs if o.node in cut_nodes - taken), None)
        if place is None or not _ends_step(call, covered, layers):
            continue
        found.append(Border(place, call))
        taken.add(place.node)
        covered = call.leaves[1]
    return found


def _ends_step(call: Call, covered: int, layers: Sequence[str] | None) -> bool:
    if layers is not None:
        return matches(call.module_name, layers)
    return call.leaf or call.leaves[1] > covered


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def checked_layers(model: nn.Module, layers: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the patterns, each of which names at least one module."""
    if layers is None:
        return None
    several = isinstance(layers, Sequence) and not isinstance(layers, str)
    patterns = tuple(layers) if several else (layers,)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(
            f"layers expects names of modules or globs, got {layers!r}; None takes every leaf"
        )
    names = [name for name in module_names(model).values() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(_no_such_layer(pattern, names))
    return patterns


def _no_such_layer(pattern: str, names: list[str]) -> str:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
    hint = f"near it are {', '.join(near)}" if near else "the model has no submodules"
    return f"layers expects names of modules or globs, got {pattern!r}, which matches none; {hint}"


def steps_between(
    start: Crossing, marks: Sequence[Border], output: Crossing, calls: Sequence[Call]
) -> list[Step]:
    """Cut the network at ``marks``; what comes after the last of them goes into the last step.

    A mark is dropped in favour of the output where no leaf call stands between the two.
    """
    total = max((call.leaves[1] for call in calls), default=0)
    inner = [mark for mark in marks if mark.place.node is not output.node]
    if inner and inner[-1].call.leaves[1] == total:
        inner.pop()
    ends = [(mark.place, mark.call.leaves[1]) for mark in inner] + [(output, total)]
    begins = [(start, 0), *ends[:-1]]
    return _named(
        [
            _step(first, last, place, end, calls)
            for (place, first), (end, last) in zip(begins, ends, strict=True)
        ],
        calls,
    )


def _step(first: int, last: int, start: Crossing, stop: Crossing, calls: Sequence[Call]) -> Step:
    inside = [call for call in calls if call.leaf and first <= call.leaves[0] < last]
    alone = len(inside) == 1 and _is_whole(inside[0], start, stop)
    return Step("", (first, last), start, stop, inside[0] if alone else None)


def _is_whole(call: Call, start: Crossing, stop: Crossing) -> bool:
    """Whether a call takes the tensor before the step and returns the one after it."""
    return call.ends_at(stop) and start.is_seen_by(call.source)


def _named(steps: Sequence[Step], calls: Sequence[Call]) -> list[Step]:
    named, times = [], Counter()
    for step in steps:
        name = _name(step, calls)
        times[name] += 1
        shown = name if times[name] == 1 else f"{name}:{times[name]}"
        named.append(replace(step, name=shown))
    return named


def _name(step: Step, calls: Sequence[Call]) -> str:
    """The leaf; or the innermost container of just these leaf calls; or first and last block."""
    spanning = [call for call in calls if call.leaves == step.leaves]
    if spanning:
        return spanning[0].name
    first, last = step.leaves
    inside = [call for call in calls if first <= call.leaves[0] < call.leaves[1] <= last]
    if not inside:  # functions alone, at the end of a container that was asked for
        ending = [call.name for call in calls if call.ends_at(step.stop)]
        return ending[0] if ending else "(scripted)"
    # Calls stand in the order in which they ended: the outermost block comes last.
    opening = [call.name for call in inside if call.leaves[0] == first]
    closing = [call.name for call in inside if call.leaves[1] == last]
    return f"{opening[-1]} … {closing[-1]}"
