"""What a function would read from Python besides its arguments, and whether it is still the same.

A plan holds for the code that ran: the branches that it took, the modules, parameters and constants
that it found. They are found again by what can be reached from the function: closures, globals that
its code names, attributes of modules, classes and objects, items of containers.

Nothing here keeps what it found alive: a plan that is remembered for a model does not hold it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# More places than this are not looked through; then the state counts as unknown.
_MOST = 50_000
_PLAIN = (
    *(int, float, complex, str, bytes, bool, type(None), np.generic),
    *(torch.dtype, torch.device, torch.Size),
)
# Code of these packages does not change between calls, and is not looked through.
_SETTLED = frozenset(
    ["torch", "numpy", "scipy", "builtins", "functools", "math", "operator", "typing", "logging"]
)
# Nor does that of the standard library, but for the environment that ``os`` shows.
_STANDARD = sys.stdlib_module_names - {"os"}
# What is made anew at each call may still be the same: it is compared by what it holds.
_BY_CONTENT = (types.FunctionType, types.MethodType, functools.partial, dict, list, tuple, deque)
_BYTES = (np.ndarray, bytearray)
# Contents longer than this are kept as a hash.
_LONG = 1 << 12
# What a module consists of, each in a mapping of its own that may grow.
_PARTS = (
    *("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"),
    *("_backward_hooks", "_backward_pre_hooks"),
)
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)

# What autograd calls of a custom function that only its ``apply`` is named of.
_OF_FUNCTIONS = {"forward", "backward", "setup_context", "jvp", "vjp"}

Reader = Callable[[Any], Any]


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """Where something was found: how to read it from an earlier find, and what it was.

    One of four says what is expected there: ``number``, the identity of the find (``alive`` gives
    it back as long as it lives, ``plain`` is the kind of a tensor); ``kind``, the type of what is
    compared by its contents; ``same``, an earlier find that it is; else ``plain``, a value to
    compare by equality.
    """

    parent: int
    read: Reader
    plain: Any = None
    number: int | None = None
    alive: Callable[[], Any] | None = None
    kind: type | None = None
    same: int | None = None

    def fits(self, now: Any, finds: list[Any]) -> bool:
        """Whether what is found now is what was found then."""
        if self.number is not None:
            same = id(now) == self.number and (self.alive is None or self.alive() is now)
            return same and (self.plain is None or self._alike(now))
        if self.kind is not None:
            return type(now) is self.kind
        if self.same is not None:
            return now is finds[self.same]
        return now is self.plain or (type(now) is type(self.plain) and now == self.plain)

    def _alike(self, now: Any) -> bool:
        """Whether a tensor is of the kind that it was: ``module.double()`` changes it in place."""
        dtype, shape, device = self.plain
        return now.dtype is dtype and now.shape == shape and now.device == device


@dataclass(frozen=True, eq=False)
class State:
    """Places in the order in which they were found, from the function and its other arguments on.

    ``tensors`` are the identities of the tensors that were found.
    """

    places: tuple[Place, ...]
    settings: tuple[Any, ...]
    tensors: frozenset[int]
    known: bool

    @staticmethod
    def of(function: Callable[..., Any], arguments: Any = ()) -> State:
        """The state that a function, and arguments that are no tensors, can reach now."""
        search = _Search(function, arguments)
        search.run()
        return search.state()

    def alive(self) -> Iterator[Tensor]:
        """The tensors that were found, as far as they live."""
        for place in self.places:
            found = place.alive() if place.number in self.tensors and place.alive else None
            if isinstance(found, Tensor):
                yield found

    def holds(self, function: Callable[..., Any], arguments: Any = ()) -> bool:
        """Whether the same is found from a function, or from one made anew of the same code."""
        if not self.known or self.settings != _settings():
            return False
        finds = [function, arguments]
        try:
            for place in self.places:
                now = place.read(finds[place.parent])
                if not place.fits(now, finds):
                    return False
                finds.append(now)
        except (LookupError, AttributeError, ValueError, TypeError):
            return False
        return True


def _settings() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
    )


class _Search:
    """Goes through what can be reached from a function, each thing once."""

    def __init__(self, function: Any, arguments: Any) -> None:
        self._places: list[Place] = []
        self._tensors: set[int] = set()
        self._met: dict[int, tuple[Any, int]] = {}
        self._pending: list[tuple[Any, int]] = []
        # Names that code looks up, and the modules and classes in which it may look.
        self._names = {"forward"}
        self._spaces: list[tuple[Any, int, set[str]]] = []
        self._known = True
        for number, thing in enumerate((function, arguments)):
            self._met[id(thing)] = thing, number
            self._pending.append((thing, number))

    def run(self) -> None:
        self._root()
        while self._pending or self._look_around():
            if len(self._places) >= _MOST:
                self._known = False
                return
            self._open(*self._pending.pop())

    def _root(self) -> None:
        """Note the function itself where nothing that is looked through would tell it."""
        function, place = self._pending[0]
        builtin = not isinstance(function, _OPENED) and _settled_name(type(function).__module__)
        if builtin or (isinstance(function, types.FunctionType) and _settled(function)):
            self._places.append(Place(place, _same, None, id(function), _reference(function)))

    def state(self) -> State:
        return State(tuple(self._places), _settings(), frozenset(self._tensors), self._known)

    def _open(self, thing: Any, place: int) -> None:
        for kind, opened in _OPENERS:
            if isinstance(thing, kind):
                opened(self, thing, place)
                return
        if hasattr(type(thing), "__next__"):  # each look at it changes it
            self._known = False
        self._object(thing, place)

    def _find(self, parent: int, read: Reader, found: Any) -> int:
        """Note a place and what is found there; look through that later."""
        number = len(self._places) + 2
        if isinstance(found, _PLAIN):
            self._places.append(Place(parent, read, plain=found))
        elif id(found) in self._met:
            self._places.append(Place(parent, read, same=self._met[id(found)][1]))
        else:
            self._met[id(found)] = found, number
            self._places.append(_place_of(parent, read, found))
            if isinstance(found, Tensor):
                self._tensors.add(id(found))
            else:
                self._pending.append((found, number))
        return number

    def _look_around(self) -> bool:
        """Find what modules and classes have under the names met so far; whether that is more."""
        for space, place, done in self._spaces:
            names = _visible(space) & self._names
            if isinstance(space, type):
                names |= _implied(space)
            for name in sorted(names - done):
                done.add(name)
                read = _class_reader(name) if isinstance(space, type) else _global_reader(name)
                self._find(place, read, read(space))
        return bool(self._pending)

    def _function(self, function: types.FunctionType, place: int) -> None:
        if _settled(function):
            return
        self._find(place, attrgetter("__code__"), function.__code__)
        for name in ("__defaults__", "__kwdefaults__", "__dict__"):
            found = getattr(function, name)
            if found:
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
        self._names |= names
        for name in sorted(names):
            if name in space:
                self._find(place, _own_global_reader(name), space[name])
            elif name in sys.modules and not _settled_space(name):
                self._find(place, lambda _, name=name: sys.modules[name], sys.modules[name])

    def _space(self, space: Any, place: int) -> None:
        """A module of Python or a class, of which the names that code looks up count."""
        if isinstance(space, type) or not _settled_space(space.__name__):
            self._spaces.append((space, place, set()))

    def _attributes(self, thing: Any, place: int, *names: str) -> None:
        for name in names:
            self._find(place, attrgetter(name), getattr(thing, name))

    def _method(self, method: types.MethodType, place: int) -> None:
        self._attributes(method, place, "__self__", "__func__")

    def _partial(self, partial: functools.partial, place: int) -> None:
        self._attributes(partial, place, "func", "args", "keywords")

    def _property(self, found: property, place: int) -> None:
        self._attributes(found, place, "fget")

    def _wrapper(self, found: Any, place: int) -> None:
        self._attributes(found, place, "__wrapped__")

    def _cached(self, found: functools.cached_property, place: int) -> None:
        self._attributes(found, place, "func")

    def _context(self, found: Any, place: int) -> None:
        """What a decorator makes anew at each call; once entered it has none of these."""
        if hasattr(found, "func"):
            self._attributes(found, place, "func", "args", "kwds")
        else:
            self._known = False

    def _module(self, module: nn.Module, place: int) -> None:
        if isinstance(module, torch.jit.ScriptModule):  # its parts are made anew at each look
            self._known = False
            return
        own, settled = module.__dict__, _settled_name(type(module).__module__)
        self._find(place, _extent_of, _extent_of(module))
        for name, value in own.items():
            if name in _PARTS:
                self._items(value, place, _attribute_reader(name))
            elif name not in _OF_EVERY_MODULE and not (settled and name.startswith("_")):
                self._find(place, _attribute_reader(name), value)
        self._attributes(module, place, "training")
        self._class_of(module, place)

    def _object(self, thing: Any, place: int) -> None:
        if _settled_name(type(thing).__module__):
            return
        if isinstance(getattr(thing, "__dict__", None), dict):
            self._find(place, attrgetter("__dict__"), thing.__dict__)
        for name in _slots(type(thing)):
            if hasattr(thing, name):
                self._attributes(thing, place, name)
        self._class_of(thing, place)

    def _class_of(self, thing: Any, place: int) -> None:
        if not _settled_name(type(thing).__module__):
            self._find(place, type, type(thing))

    def _mapping(self, mapping: Any, place: int) -> None:
        if all(isinstance(key, _PLAIN) for key in mapping):
            self._find(place, _keys_of, _keys_of(mapping))
            self._items(mapping, place, _same)
        else:  # a key is not to be kept alive
            self._find(place, lambda owner: list(owner.items()), list(mapping.items()))
        self._object(mapping, place)

    def _items(self, mapping: Any, place: int, read: Reader) -> None:
        # Past what a class of mappings makes of a lookup, which may be something new each time.
        for key, value in dict.items(mapping):
            self._find(place, lambda owner, key=key: dict.__getitem__(read(owner), key), value)

    def _sequence(self, sequence: Any, place: int) -> None:
        self._find(place, len, len(sequence))
        for number, value in enumerate(sequence):
            self._find(place, itemgetter(number), value)
        self._object(sequence, place)

    def _set(self, found: Any, place: int) -> None:
        self._find(place, _members_of, _members_of(found))
        if not all(isinstance(member, (*_PLAIN, type)) for member in found):
            self._known = False  # there is no way to find a member again

    def _bytes(self, array: Any, place: int) -> None:
        self._find(place, _content_of, _content_of(array))

    def _nothing(self, _: Any, __: int) -> None:
        """Code is compared by its identity alone."""


_OPENERS: tuple[tuple[Any, Callable[[_Search, Any, int], None]], ...] = (
    (types.FunctionType, _Search._function),
    (types.MethodType, _Search._method),
    (functools.partial, _Search._partial),
    (nn.Module, _Search._module),
    (dict, _Search._mapping),
    ((list, tuple, deque), _Search._sequence),
    (_BYTES, _Search._bytes),
    ((set, frozenset), _Search._set),
    ((types.ModuleType, type), _Search._space),
    (property, _Search._property),
    ((staticmethod, classmethod, functools._lru_cache_wrapper), _Search._wrapper),
    (functools.cached_property, _Search._cached),
    (contextlib._GeneratorContextManager, _Search._context),
    (types.CodeType, _Search._nothing),
)


_OPENED = tuple(
    kind for kinds, _ in _OPENERS for kind in (kinds if isinstance(kinds, tuple) else (kinds,))
)


def _place_of(parent: int, read: Reader, found: Any) -> Place:
    opened = isinstance(found, (*_BY_CONTENT, *_BYTES, set, frozenset))
    if opened and not (isinstance(found, types.FunctionType) and _settled(found)):
        return Place(parent, read, kind=type(found))
    kind = _kind_of(found) if isinstance(found, Tensor) else None
    return Place(parent, read, kind, id(found), _reference(found))


def _reference(found: Any) -> Callable[[], Any] | None:
    try:
        return weakref.ref(found)
    except TypeError:
        return None


def _same(owner: Any) -> Any:
    return owner


def _cell_reader(number: int) -> Reader:
    return lambda function: function.__closure__[number].cell_contents


def _own_global_reader(name: str) -> Reader:
    return lambda function: function.__globals__[name]


def _global_reader(name: str) -> Reader:
    return lambda module: module.__dict__[name]


def _attribute_reader(name: str) -> Reader:
    return lambda module: module.__dict__[name]


def _class_reader(name: str) -> Reader:
    return lambda found: next(vars(c)[name] for c in found.__mro__ if name in vars(c))


def _keys_of(mapping: Any) -> str:
    return repr(list(mapping))


def _extent_of(module: nn.Module) -> int:
    """How many attributes, parts and hooks a module has: what was added later shows."""
    own = module.__dict__
    return len(own) + sum([len(own[name]) for name in _PARTS])


def _kind_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.device


def _members_of(found: Any) -> bytes:
    """The members of a set; those that are no plain values by their identities."""
    kept = {m if isinstance(m, _PLAIN) else id(m) for m in found}
    return repr(sorted(map(repr, kept))).encode()


def _content_of(array: Any) -> bytes | tuple[Any, ...]:
    content = bytes(array) if isinstance(array, bytearray) else array.tobytes()
    kept = content if len(content) <= _LONG else str(hash(content)).encode()
    layout = "" if isinstance(array, bytearray) else f"{array.dtype} {array.shape} "
    return layout.encode() + kept


def _visible(space: Any) -> set[str]:
    """The names that a module or class has, but for those of settled base classes."""
    if not isinstance(space, type):
        return set(vars(space))
    own = [c for c in space.__mro__ if not _settled_name(c.__module__)]
    return set().union(*(vars(c) for c in own))


def _implied(space: type) -> set[str]:
    """The methods of a class that operators, and Python itself, call without naming them."""
    return {
        name
        for c in space.__mro__
        if not _settled_name(c.__module__)
        for name, value in vars(c).items()
        if name.startswith("__") and isinstance(value, types.FunctionType)
    } | (_visible(space) & _OF_FUNCTIONS if issubclass(space, torch.autograd.Function) else set())


def _slots(kind: type) -> Iterator[str]:
    for c in kind.__mro__:
        slots = vars(c).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else tuple(slots)
        yield from (name for name in names if name not in ("__dict__", "__weakref__"))


def _names(code: types.CodeType) -> frozenset[str]:
    """Every name that code, or code inside of it, looks up, and strings that may be names."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            found.add(constant)
    return frozenset(found)


def _settled(function: types.FunctionType) -> bool:
    """Whether a function, and whatever it wraps, is of a package that does not change."""
    home = str(function.__globals__.get("__name__", ""))
    settled = _settled_name if function.__closure__ else _settled_space
    return settled(function.__module__ or home) and settled(home)


def _settled_space(name: str) -> bool:
    """Whether a module of Python, and the functions it defines, stay as they are."""
    return _settled_name(name) or name.partition(".")[0] in _STANDARD


def _settled_name(name: str) -> bool:
    return name.partition(".")[0] in _SETTLED
