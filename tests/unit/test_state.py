"""What a function can reach from Python: each kind of place is found, its changes noticed."""

import collections
import dataclasses
import functools
import gc
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pushforward as pf
from oracles import loop_jacobian
from pushforward.state import State

F64 = {"dtype": torch.float64}
Changes = dict[str, Callable[[], Any]]
Made = tuple[Callable[..., Any], Changes]

CASES: dict[str, Callable[[], Made]] = {}
factor = 2.0


def case(make: Callable[[], Made]) -> Callable[[], Made]:
    CASES[make.__name__] = make
    return make


def helper(x: Tensor) -> Tensor:
    return x * 2


def put(owner: Any, key: Any, value: Any) -> Callable[[], None]:
    return lambda: owner.__setitem__(key, value)


def attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(owner, name, value)


@case
def cell() -> Made:
    scale = 2.0

    def f(x: Tensor) -> Tensor:
        return x * scale

    def change() -> None:
        nonlocal scale
        scale = 3.0

    return f, {"another value": change}


@case
def global_variable() -> Made:
    return (lambda x: x * factor), {"another value": put(globals(), "factor", factor + 1)}


@case
def global_variable_by_its_name() -> Made:
    return (lambda x: x * globals()["factor"]), {"": put(globals(), "factor", factor + 1)}


@case
def global_function() -> Made:
    def change() -> None:
        globals()["helper"] = lambda x: x * 3

    return (lambda x: helper(x)), {"another function": change}


@case
def function_inside_a_function() -> Made:
    inner = {"scale": 2.0}
    double = lambda x: x * inner["scale"]  # noqa: E731
    return (lambda x: double(x)), {"what it reads": put(inner, "scale", 3.0)}


@case
def defaults() -> Made:
    def f(x: Tensor, scale: float = 2.0, *, shift: float = 1.0) -> Tensor:
        return x * scale + shift

    return f, {
        "positional": attribute(f, "__defaults__", (3.0,)),
        "by name": attribute(f, "__kwdefaults__", {"shift": 5.0}),
    }


@case
def attribute_of_a_function() -> Made:
    def f(x: Tensor) -> Tensor:
        return x * f.scale

    f.scale = 2.0
    return f, {"another value": attribute(f, "scale", 3.0)}


@case
def code_of_a_function() -> Made:
    inner = lambda x: x * 2  # noqa: E731
    other = lambda x: x * 3  # noqa: E731
    return (lambda x: inner(x)), {"other code": attribute(inner, "__code__", other.__code__)}


@case
def containers() -> Made:
    numbers, table, queue = [1.0, [2.0]], {"a": 1.0}, collections.deque([2.0])
    kinds, data = {1}, bytearray(b"\x02")
    pair = collections.namedtuple("pair", "first second")
    held = [pair(1.0, 2.0)]

    def f(x: Tensor) -> Tensor:
        scale = numbers[0] * sum(numbers[1]) * table["a"] * queue[0] * data[0]
        return x * scale * held[0].first if 2 not in kinds else x

    return f, {
        "item of a list": put(numbers, 0, 5.0),
        "item of a list in a list": lambda: numbers[1].append(1.0),
        "longer list": lambda: numbers.append(1.0),
        "value in a dictionary": put(table, "a", 2.0),
        "key of a dictionary": put(table, "b", 2.0),
        "deque": lambda: queue.appendleft(7.0),
        "set": lambda: kinds.add(2),
        "bytes": put(data, 0, 9),
        "named tuple": put(held, 0, pair(2.0, 2.0)),
    }


@case
def dictionary_by_tensors() -> Made:
    weight = torch.ones(2)
    table = {weight: 1.0}
    return (lambda x: x * table[weight]), {"value": put(table, weight, 2.0)}


@case
def arrays() -> Made:
    small, large, scalar = np.ones(3), np.ones(20_000), [np.float32(2)]
    return (lambda x: x * small[0] * large[0] * float(scalar[0])), {
        "item": put(small, 2, 5.0),
        "item of a large one": put(large, 19_999, 5.0),
        "number": put(scalar, 0, np.float32(3)),
    }


class Scaled:
    """An object that is called."""

    shared = 1.0

    def __init__(self) -> None:
        self.scale = 2.0
        self.weight = torch.ones(3, **F64)

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.scale * self.weight

    def method(self, x: Tensor) -> Tensor:
        return x * self.scale * self.shared

    @property
    def twice(self) -> float:
        return 2 * self.shared

    @staticmethod
    def static(x: Tensor) -> Tensor:
        return x * 2

    @classmethod
    def of_the_class(cls, x: Tensor) -> Tensor:
        return x * cls.shared

    def __mul__(self, x: Tensor) -> Tensor:
        return x * self.scale


def a_class() -> type:
    """The same class made afresh, to be changed."""
    return type("Fresh", (Scaled,), dict(vars(Scaled)))


@case
def called_object() -> Made:
    f = a_class()()
    return f, {
        "attribute": attribute(f, "scale", 3.0),
        "tensor": attribute(f, "weight", torch.zeros(3, **F64)),
        "new attribute": attribute(f, "more", 3.0),
        "how it is called": attribute(type(f), "__call__", lambda self, x: x),
    }


@case
def method() -> Made:
    thing = a_class()()
    return thing.method, {
        "attribute": attribute(thing, "scale", 3.0),
        "attribute of the class": attribute(type(thing), "shared", 3.0),
    }


@case
def methods_by_name() -> Made:
    thing = a_class()()
    kind = type(thing)

    def f(x: Tensor) -> Tensor:
        return kind.static(x) + kind.of_the_class(x) + thing.method(x) * thing.twice + thing * x

    return f, {
        "static": attribute(kind, "static", staticmethod(lambda x: x)),
        "of the class": attribute(kind, "of_the_class", classmethod(lambda cls, x: x)),
        "method": attribute(kind, "method", lambda self, x: x),
        "property": attribute(kind, "twice", property(lambda self: 7.0)),
        "operator": attribute(kind, "__mul__", lambda self, x: x),
        "what they read": attribute(kind, "shared", 9.0),
    }


@case
def method_that_is_overridden() -> Made:
    base = a_class()
    thing = type("Below", (base,), {})()
    return (lambda x: thing.method(x)), {"below": attribute(type(thing), "shared", 3.0)}


@case
def object_with_slots() -> Made:
    class Slotted:
        __slots__ = ("scale",)

    thing = Slotted()
    thing.scale = 2.0
    return (lambda x: x * thing.scale), {"slot": attribute(thing, "scale", 3.0)}


@case
def data_class() -> Made:
    @dataclasses.dataclass
    class Options:
        scale: float = 2.0

    options = Options()
    return (lambda x: x * options.scale), {"field": attribute(options, "scale", 3.0)}


@case
def partial() -> Made:
    numbers = [2.0]
    f = functools.partial(lambda items, x, shift=1.0: x * items[0] + shift, numbers)
    return f, {
        "what is held": put(numbers, 0, 3.0),
        "by name": lambda: f.keywords.update(shift=3.0),
    }


@case
def remembered_results() -> Made:
    inner = [2.0]
    scale = functools.lru_cache(lambda: inner[0])
    return (lambda x: x * scale()), {"what they were made of": put(inner, 0, 3.0)}


@case
def wrapped_function() -> Made:
    inner = [2.0]

    @torch.enable_grad()
    def f(x: Tensor) -> Tensor:
        return x * inner[0]

    return f, {"what is inside": put(inner, 0, 3.0)}


@case
def python_module() -> Made:
    module = types.ModuleType("a_module_for_a_test")
    module.scale, module.inner = 2.0, types.SimpleNamespace(scale=2.0)
    return (lambda x: x * module.scale * module.inner.scale), {
        "variable": attribute(module, "scale", 3.0),
        "below": attribute(module.inner, "scale", 3.0),
    }


@case
def module_imported_inside() -> Made:
    module = types.ModuleType("another_module_for_a_test")
    module.scale = 2.0
    sys.modules[module.__name__] = module

    def f(x: Tensor) -> Tensor:
        import another_module_for_a_test

        return x * another_module_for_a_test.scale

    return f, {"variable": attribute(module, "scale", 3.0)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.layers = nn.ModuleList([nn.Tanh()])
        self.register_buffer("mask", torch.eye(3))
        self.flag, self._private, self.sizes = False, 2.0, [3]

    def forward(self, x: Tensor) -> Tensor:
        y = (self.mask * self.linear.weight) @ x * self._private
        for layer in self.layers:
            y = layer(y)
        return y.flip(0) if self.flag else y


@case
def module() -> Made:
    net = Net()
    return (lambda x: net(x)), {
        "attribute": attribute(net, "flag", True),
        "private attribute": attribute(net, "_private", 3.0),
        "list": lambda: net.sizes.append(4),
        "training flag": net.eval,
        "training flag of a part": lambda: net.linear.train(not net.linear.training),
        "parameter": lambda: setattr(net.linear, "weight", nn.Parameter(torch.ones(3, 3))),
        "buffer": lambda: setattr(net, "mask", torch.ones(3, 3)),
        "submodule": lambda: setattr(net, "linear", nn.Linear(3, 3)),
        "more submodules": lambda: net.layers.append(nn.Tanh()),
        "fewer submodules": lambda: net.layers.__delitem__(0),
        "hook": lambda: net.linear.register_forward_hook(lambda *_: None),
        "hook before": lambda: net.register_forward_pre_hook(lambda *_: None),
        "precision": net.double,
        "forward of the object": attribute(net, "forward", lambda x: x),
    }


@case
def forward_of_a_class() -> Made:
    kind = type("Fresh", (Net,), dict(vars(Net)))
    net = kind()
    return net, {"forward": attribute(kind, "forward", lambda self, x: x)}


@case
def hook() -> Made:
    net, scale = nn.Linear(3, 3), [2.0]
    handle = net.register_forward_hook(lambda module, inputs, output: output * scale[0])
    return (lambda x: net(x)), {"what it reads": put(scale, 0, 3.0), "removed": handle.remove}


ALL = [(name, change) for name, make in CASES.items() for change in make()[1]]


@pytest.mark.parametrize("name", CASES)
def test_an_unchanged_state_holds(name: str):
    f, _ = CASES[name]()
    state = State.of(f)
    assert state.known
    assert state.holds(f)


@pytest.mark.parametrize(("name", "change"), ALL)
def test_a_change_is_noticed(name: str, change: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "factor", 2.0)
    monkeypatch.setitem(globals(), "helper", helper)
    f, changes = CASES[name]()
    state = State.of(f)
    changes[change]()
    assert not state.holds(f)


def test_a_change_that_is_taken_back_is_none():
    table = {"scale": 2.0}
    f = lambda x: x * table["scale"]  # noqa: E731
    state = State.of(f)
    table["scale"] = 3.0
    table["scale"] = 2.0
    assert state.holds(f)


def test_settings_of_torch_are_part_of_it():
    state = State.of(helper)
    torch.set_default_dtype(torch.float64)
    try:
        assert not state.holds(helper)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu"):
        assert not state.holds(helper)
    assert state.holds(helper)


def made_anew(weight: Tensor, scale: float, power: int) -> Callable[[Tensor], Tensor]:
    """The same code each time, with containers and functions of its own."""
    options, table = (1, scale), {"powers": [power], "names": {"a"}}
    raised = lambda x: x ** table["powers"][0]  # noqa: E731
    times = functools.partial(torch.mul, options[1])
    return lambda x: times(raised(weight @ x))


def test_a_function_made_anew_is_the_same_where_it_reads_the_same():
    weight = torch.ones(3, 3)
    state = State.of(made_anew(weight, 2.0, 2))
    assert state.holds(made_anew(weight, 2.0, 2))
    assert not state.holds(made_anew(weight, 3.0, 2))
    assert not state.holds(made_anew(weight, 2.0, 3))
    assert not state.holds(made_anew(torch.ones(3, 3), 2.0, 2))


def test_two_places_that_held_one_thing_must_hold_one_thing_again():
    def make(one: list[float], other: list[float]) -> Callable[[Tensor], Tensor]:
        return lambda x: x * one[0] * other[0]

    numbers = [2.0]
    state = State.of(make(numbers, numbers))
    assert state.holds(make(numbers, numbers))
    assert not state.holds(make(numbers, [5.0]))


def test_arguments_are_part_of_it():
    state = State.of(helper, ("a", 2, [1.0]))
    assert state.holds(helper, ("a", 2, [1.0]))
    for others in (("b", 2, [1.0]), ("a", 3, [1.0]), ("a", 2.0, [1.0]), ("a", 2, [2.0]), ()):
        assert not state.holds(helper, others)


@pytest.mark.parametrize("held", [iter([1, 2, 3]), {object()}], ids=["iterator", "set"])
def test_what_cannot_be_compared_makes_it_unknown(held: Any):
    f = lambda x: (x, held)[0]  # noqa: E731
    assert not State.of(f).known
    assert not State.of(f).holds(f)


def test_torch_itself_is_not_looked_through():
    # Which function it is, and how many arguments there are.
    assert len(State.of(torch.sin).places) <= 2
    assert len(State.of(lambda x: torch.nn.functional.gelu(torch.sin(x))).places) < 6


def test_the_tensors_of_a_module_are_found():
    net = Net()
    state = State.of(net)
    assert state.tensors == {id(t) for t in (*net.parameters(), *net.buffers())}
    assert {id(t) for t in state.alive()} == state.tensors


def test_nothing_is_kept_alive():
    """Not the model, not its tensors, not what a closure held, once a plan is remembered."""

    def planned() -> list[weakref.ref]:
        net, thing = Net().double(), a_class()()
        x = torch.ones(3, **F64)
        f = lambda x: net(x) * thing.weight + thing.method(x)  # noqa: E731
        for _ in range(2):
            torch.testing.assert_close(pf.jacobian(f, x).dense(), loop_jacobian(f, x))
            pf.jacobian(f, x, plan="sparse").sparse()
            pf.jacobian(net, torch.ones(3, **F64)).matrix()
        pf.hessian(lambda x: f(x).square().sum(), x).matrix()
        return [weakref.ref(o) for o in (net, thing, net.linear.weight, net.mask, thing.weight)]

    references = planned()
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_planning_leaves_no_tensors_behind():
    def count() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    def work() -> None:
        net = Net()
        pf.jacobian(net, torch.ones(3)).sparse()
        pf.jacobian(net.linear, torch.ones(5, 3)).sparse()

    work()
    before = count()
    for _ in range(3):
        work()
    assert count() <= before
