"""What a function would read from Python besides its arguments, and whether it is still the same.

A plan holds for the code that ran: the branches that it took, the modules, parameters and constants
that it found. They are found again by what can be reached from the function: closures, globals that
its code names, attributes of modules and objects, items of containers.

Nothing here keeps what it found alive: a plan that is remembered for a model does not hold it.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# More places than this are not looked through; then the state counts as unknown.
_MOST = 50_000
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)
# Code of these packages does not change between calls, and is not looked through.
_SETTLED = ("torch", "numpy", "scipy", "builtins", "functools", "math", "operator", "typing")
_ARRAY_BYTES = 1 << 16

Reader = Callable[[Any], Any]


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """Where something was found: how to read it from an earlier find, and what it was.

    ``plain`` is a value to compare by equality; else ``number`` is the identity of the find and
    ``alive`` gives it back as long as it lives.
    """

    parent: int
    read: Reader
    plain: Any
    number: int | None
    alive: Callable[[], Any] | None


@dataclass(frozen=True, eq=False)
class State:
    """Places in the order in which they were found, the function itself first.

    ``tensors`` are the identities of the tensors that were found.
    """

    places: tuple[Place, ...]
    settings: tuple[Any, ...]
    tensors: frozenset[int]
    known: bool

    @staticmethod
    def of(function: Callable[..., Any]) -> State:
        """The state that a function can reach now."""
        search = _Search(function)
        search.run()
        return search.state()

    def holds(self, function: Callable[..., Any]) -> bool:
        """Whether the same is found from a function, or from one made anew of the same code."""
        if not self.known or self.settings != _settings():
            return False
        finds = [function]
        try:
            for place in self.places:
                now = place.read(finds[place.parent])
                finds.append(now)
                if place.number is None:
                    if now is not place.plain and not _alike(now, place.plain):
                        return False
                elif id(now) != place.number or (
                    place.alive is not None and place.alive() is not now
                ):
                    return False
        except (KeyError, IndexError, AttributeError, ValueError, TypeError):
            return False
        return True


def _alike(one: Any, other: Any) -> bool:
    return type(one) is type(other) and isinstance(one, (*_PLAIN, tuple)) and one == other


def _settings() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
    )


class _Search:
    """Goes through what can be reached from a function, each thing once."""

    def __init__(self, function: Any) -> None:
        self._places: list[Place] = []
        self._tensors: set[int] = set()
        self._met: dict[int, Any] = {}
        self._hidden = False
        self._pending: list[tuple[Any, int]] = [(function, 0)]

    def run(self) -> None:
        while self._pending and len(self._places) < _MOST:
            thing, place = self._pending.pop()
            if id(thing) not in self._met and not isinstance(thing, (*_PLAIN, Tensor)):
                self._met[id(thing)] = thing
                self._open(thing, place)

    def state(self) -> State:
        done = not self._pending and not self._hidden
        return State(tuple(self._places), _settings(), frozenset(self._tensors), done)

    def _open(self, thing: Any, place: int) -> None:
        for kind, opened in _OPENERS:
            if isinstance(thing, kind):
                opened(self, thing, place)
                return
        if isinstance(getattr(thing, "__dict__", None), dict):
            self._object(thing, place)

    def _find(self, parent: int, read: Reader, found: Any) -> int:
        """Note a place and what is found there; look through that later."""
        if isinstance(found, _PLAIN):
            self._places.append(Place(parent, read, found, None, None))
        else:
            self._places.append(Place(parent, read, None, id(found), _reference(found)))
            if isinstance(found, Tensor):
                self._tensors.add(id(found))
                here = len(self._places)
                self._places.append(Place(here, _kind_of, _kind_of(found), None, None))
                return here
            self._pending.append((found, len(self._places)))
        return len(self._places)

    def _function(self, function: types.FunctionType, place: int) -> None:
        if _settled(function):
            return
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            found = getattr(function, name)
            if name == "__code__" or found is not None:
                self._find(place, attrgetter(name), found)
        for number, cell in enumerate(function.__closure__ or ()):
            self._cell(cell, number, place)
        self._globals(function, place)

    def _cell(self, cell: types.CellType, number: int, place: int) -> None:
        try:
            found = cell.cell_contents
        except ValueError:  # empty as yet
            return
        self._find(place, _cell_reader(number), found)

    def _globals(self, function: types.FunctionType, place: int) -> None:
        names, space = set(_names(function.__code__)), function.__globals__
        for name in sorted(names):
            if name in space:
                where = self._find(place, _global_reader(name), space[name])
                self._module_names(space[name], names, where)

    def _module_names(self, module: Any, names: set[str], place: int) -> None:
        """The attributes of a Python module that code may read by name."""
        if not isinstance(module, types.ModuleType) or _settled_name(module.__name__):
            return
        for name in sorted(names & set(module.__dict__)):
            self._find(place, attrgetter(name), module.__dict__[name])

    def _method(self, method: types.MethodType, place: int) -> None:
        self._find(place, attrgetter("__self__"), method.__self__)
        self._find(place, attrgetter("__func__"), method.__func__)

    def _partial(self, partial: functools.partial, place: int) -> None:
        self._find(place, attrgetter("func"), partial.func)
        for number, value in enumerate(partial.args):
            self._find(place, _argument_reader(number), value)
        for name, value in partial.keywords.items():
            self._find(place, _keyword_reader(name), value)

    def _module(self, module: nn.Module, place: int) -> None:
        if isinstance(module, torch.jit.ScriptModule):  # its parts are made anew at each look
            self._hidden = True
            return
        own = module.__dict__
        for name, value in own.items():
            if name in ("_parameters", "_buffers", "_modules"):
                if value:
                    self._mapping(value, place, attrgetter(name))
            elif not name.startswith("_") or (name.endswith("_hooks") and value):
                self._find(place, _attribute_reader(name), value)
        if not _settled_name(type(module).__module__):
            self._find(place, _forward_of, type(module).forward)

    def _object(self, thing: Any, place: int) -> None:
        if _settled_name(type(thing).__module__) or isinstance(thing, type):
            return
        self._mapping(thing.__dict__, place, attrgetter("__dict__"))
        call = type(thing).__dict__.get("__call__")
        if isinstance(call, types.FunctionType):
            self._find(place, _call_of, call)

    def _mapping(self, mapping: Any, place: int, within: Reader | None = None) -> None:
        read = within or _same
        self._find(place, lambda owner: len(read(owner)), len(mapping))
        for key in list(mapping):
            self._find(place, lambda owner, key=key: read(owner)[key], mapping[key])

    def _sequence(self, sequence: Any, place: int) -> None:
        self._find(place, len, len(sequence))
        for number, value in enumerate(sequence):
            self._find(place, itemgetter(number), value)

    def _array(self, array: np.ndarray, place: int) -> None:
        if array.nbytes <= _ARRAY_BYTES:
            self._find(place, _content_of, array.tobytes())

    def _nothing(self, _: Any, __: int) -> None:
        """Modules of Python, classes and sets are not looked through."""


_OPENERS: tuple[tuple[Any, Callable[[_Search, Any, int], None]], ...] = (
    (types.FunctionType, _Search._function),
    (types.MethodType, _Search._method),
    (functools.partial, _Search._partial),
    (nn.Module, _Search._module),
    (dict, _Search._mapping),
    ((list, tuple), _Search._sequence),
    (np.ndarray, _Search._array),
    ((types.ModuleType, types.CodeType, set, frozenset), _Search._nothing),
)


def _reference(found: Any) -> Callable[[], Any] | None:
    try:
        return weakref.ref(found)
    except TypeError:  # containers: what they hold is compared
        return None


def _kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """What ``module.double()`` and the like change in a parameter that stays the same object."""
    return tensor.dtype, tensor.shape, tensor.device


def _same(owner: Any) -> Any:
    return owner


def _cell_reader(number: int) -> Reader:
    return lambda function: function.__closure__[number].cell_contents


def _global_reader(name: str) -> Reader:
    return lambda function: function.__globals__[name]


def _attribute_reader(name: str) -> Reader:
    return lambda module: module.__dict__[name]


def _argument_reader(number: int) -> Reader:
    return lambda partial: partial.args[number]


def _keyword_reader(name: str) -> Reader:
    return lambda partial: partial.keywords[name]


def _forward_of(module: nn.Module) -> Any:
    return type(module).forward


def _call_of(thing: Any) -> Any:
    return type(thing).__call__


def _content_of(array: np.ndarray) -> bytes:
    return array.tobytes()


def _names(code: types.CodeType) -> Iterator[str]:
    """Every name that code, or code inside of it, looks up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _settled(function: types.FunctionType) -> bool:
    return _settled_name(function.__module__ or "")


def _settled_name(name: str) -> bool:
    return name.split(".")[0] in _SETTLED
