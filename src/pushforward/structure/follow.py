"""Following a function while it runs: what each element of each tensor depends on.

The function runs as it is written, on its own tensors. Beside each storage stands an array with the
number of a set for each element; an op writes the numbers of its outputs, a view reads those of the
storage that it looks at. Where autograd says that a tensor carries no gradient, nothing depends on
anything: that covers ``detach``, ``no_grad`` and indices.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pushforward.program.recorder import READS_A_VALUE
from pushforward.purity import custom_functions
from pushforward.structure.backwards import backward_reach
from pushforward.structure.graph import Graph, Step, call_of, is_counted
from pushforward.structure.rules import RULES, Call
from pushforward.structure.rules.affine import is_affine
from pushforward.structure.rules.movement import MAKE_ZEROS
from pushforward.structure.rules.pointwise import pointwise
from pushforward.structure.rules.registry import Numbers, without_derivative
from pushforward.structure.rules.sparse import MAKERS, are_strided, sparse_rule, stored
from pushforward.structure.sets import EMPTY, FIRST, VARIES, Sets, TooManySets
from pushforward.structure.storages import Shadow, assign, look, look_sunk, sink
from pushforward.work import flops_of

aten = torch.ops.aten
T = TypeVar("T")


@dataclass
class Guards:
    """What a structure relies on beside the code: values that served as structure.

    Attributes:
        constants: tensors from outside whose values were looked at.
        orders: ops, by number, whose indices depend on the inputs: the structure holds while the
            indices are the same.
        branches: whether Python branched on values that depend on the inputs.
        elsewhere: whether such values went where they cannot be compared again.
    """

    constants: dict[int, Tensor] = field(default_factory=dict)
    orders: set[int] = field(default_factory=set)
    branches: bool = False
    elsewhere: bool = False

    @property
    def at_point(self) -> bool:
        """Whether the structure holds at this point only, and where nothing of that changes."""
        return bool(self.orders) or self.branches or self.elsewhere


class Follower(TorchDispatchMode):
    """Follows the ops that run inside, for one labelling of the inputs.

    Args:
        inputs: the tensors to differentiate with respect to.
        labels: the variable of each element of each input, shaped like it.
        count: how many variables there are.
        arguments: tensors that come with each call, and are no structure.
        budget: the most bytes that sets may take.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        labels: Sequence[np.ndarray],
        count: int,
        arguments: Sequence[Tensor] = (),
        budget: int = 1 << 28,
        parent: Follower | None = None,
    ) -> None:
        super().__init__()
        self.sets = Sets(count, budget)
        self.graph = Graph()
        self.guards = Guards()
        self.dense_ops: dict[str, int] = {}
        self.failure: str | None = None
        self._shadows: dict[int, Shadow] = {}
        self._external: dict[int, Tensor] = {}
        self._names = self._count = 0
        self._parent = parent
        for tensor, label in zip(inputs, labels, strict=True):
            self._write(tensor, np.where(label < 0, VARIES, self.sets.single(label)))
        for tensor in arguments:
            if _key(tensor) in self._shadows:  # the same tensor as an input, or a view of one
                continue
            constant = not (tensor.is_floating_point() or tensor.is_complex())
            self._add(tensor, EMPTY if constant else VARIES)
        self.graph.inputs = tuple(self.value_of(tensor) for tensor in inputs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise the first op imports the compiler, which takes seconds."""
        return False

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the ops that run inside, custom functions among them."""
        with custom_functions(self._custom), _Exits(self), self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._count += is_counted(func)
        if self.failure is not None:
            return func(*args, **kwargs)
        before = self._trying(func, lambda: self._before(func, args, kwargs))
        out = func(*args, **kwargs)
        if before is not None:
            self._trying(func, lambda: self._follow(func, args, kwargs, out, *before))
        return out

    def _trying(self, func: Any, work: Callable[[], T]) -> T | None:
        """Whatever goes wrong here ends the following, and must not stop the function."""
        try:
            return work()
        except TooManySets:
            self.failure = "its sets outgrow their budget"
        except Exception as error:
            self.failure = f"{_name(func)} could not be followed ({type(error).__name__}: {error})"
        return None

    def numbers(self, tensor: Tensor) -> Numbers:
        """The sets of a tensor's elements, shaped like it."""
        shadow = self._shadow(tensor)
        found = look(shadow, stored(tensor), self.sets)
        seen = shadow.hidden or self._parent is not None or _carries(tensor)
        return found if seen else without_derivative(found)

    def _before(
        self, func: Any, args: Any, kwargs: Any
    ) -> tuple[dict[int, Tensor], dict[int, Numbers]]:
        """The values of what a call may overwrite, and the numbers of all its arguments."""
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        copies = {id(t): t.detach().clone() for t in tensors} if func._schema.is_mutable else {}
        return copies, {id(t): self.numbers(t) for t in tensors}

    def _follow(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        out: Any,
        before: dict[int, Tensor],
        read: dict[int, Numbers],
    ) -> None:
        outputs = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func in READS_A_VALUE:
            self._branch(tensors, read)
        if func.overloadpacket in MAKERS:
            self._branch([t for t in tensors if not t.dtype.is_floating_point], read)
        written = _written(func, args, kwargs)
        if torch.Tag.inplace_view in func.tags or not (outputs or written):
            return
        if outputs and self._is_view(func, outputs):
            if is_counted(func) and any(_active(read[id(t)]) for t in tensors):
                self.graph.views.append((self._count, call_of(func, args, kwargs)))
            return
        call = Call(func, args, kwargs, outputs, self.sets, lambda t: read[id(t)], before)
        call.noted, call.returned = self._note, out
        call.sunken = lambda t: look_sunk(self._shadow(t), stored(t))
        self._register(call, func, tensors, written, read)

    def _register(
        self,
        call: Call,
        func: Any,
        tensors: list[Tensor],
        written: list[Tensor],
        read: dict[int, Numbers],
    ) -> None:
        outputs = call.outputs
        sources = frozenset().union(*(self._shadow(t).sources for t in tensors))
        reads = tuple(dict.fromkeys(self.value_of(t) for t in tensors if _active(read[id(t)])))
        found = self._found(call, func, tensors, read)
        changed = {id(t) for t in written}
        for tensor, numbers in zip(outputs, found, strict=True):
            if id(tensor) in changed:
                numbers = self._kept(tensor, numbers)
            self._write(tensor, numbers, sources)
        if call.sinks is not None:
            sink(self._shadow(outputs[0]), outputs[0], call.sinks)
        returned = {id(t) for t in outputs}
        for tensor in written:
            if id(tensor) not in returned:
                self._write(tensor, self._changed(call, tensor), sources)
        if func is aten.clone.default and (tensors[0].is_conj() or tensors[0].is_neg()):
            self._shadow(outputs[0]).hidden = True
        if reads:
            self._step(call, func, reads, outputs)

    def _kept(self, tensor: Tensor, numbers: Numbers) -> Numbers:
        """What is written where autograd does not look leaves the derivatives of before."""
        if torch.is_grad_enabled() and _carries(tensor):
            return numbers
        old = look(self._shadow(tensor), stored(tensor), self.sets)
        if not _active(old):
            return numbers
        return self.sets.unite(numbers, np.where(old >= FIRST, old, EMPTY))

    def _changed(self, call: Call, tensor: Tensor) -> Numbers:
        """An argument that a call changes without returning it: statistics, or lists of tensors."""
        if call.outputs:
            return np.maximum(call.read(tensor), VARIES)
        old = look(self._shadow(tensor), stored(tensor), self.sets)
        return self.sets.unite(self._dense(call, call.func, 1)[0], old)

    def _found(
        self, call: Call, func: Any, tensors: list[Tensor], read: dict[int, Numbers]
    ) -> list[Numbers]:
        """The sets of each output: by rule, or dense."""
        if torch.Tag.nondeterministic_seeded in func.tags and not any(
            _active(read[id(t)]) for t in tensors
        ):
            return call.same_everywhere(np.ones((), np.int32))
        uniform = _alike([read[id(t)] for t in tensors])
        if uniform == EMPTY or (uniform == VARIES and not self._makes_constants(call, tensors)):
            return call.same_everywhere(np.full((), uniform, np.int32))
        rule = rule_of(func) if are_strided((*tensors, *call.outputs)) else sparse_rule(call)
        return list(rule(call) if rule is not None else self._dense(call, func))

    def _makes_constants(self, call: Call, tensors: list[Tensor]) -> bool:
        """Whether some of what comes of values that vary may be constant."""
        return call.op in MAKE_ZEROS or any(self._shadow(t).sunk is not None for t in tensors)

    def _dense(self, call: Call, func: Any, count: int | None = None) -> list[Numbers]:
        numbers = call.everything()
        if _active(numbers):
            name = _name(func)
            self.dense_ops[name] = self.dense_ops.get(name, 0) + 1
        return [numbers] * (len(call.outputs) if count is None else count)

    def _step(self, call: Call, func: Any, reads: tuple[Any, ...], outputs: list[Tensor]) -> None:
        writes = tuple(self.value_of(t) for t in outputs)
        flops = flops_of(func, call.args, call.kwargs, call.returned)
        moved = sum(t.numel() * t.element_size() for t in outputs)
        sizes = tuple(t.numel() for t in outputs)
        mutates = bool(func._schema.is_mutable)
        said = call_of(func, call.args, call.kwargs)
        step = Step(_name(func), said, self._count, reads, writes, sizes, flops, moved, mutates)
        self.graph.steps.append(step)
        self.graph.affine = self.graph.affine and is_affine(func, call.args, self._depends)

    def _depends(self, tensor: Tensor) -> bool:
        return _active(self.numbers(tensor))

    def _is_view(self, func: Any, outputs: list[Tensor]) -> bool:
        """Whether the outputs only look at storages that are known already."""
        if func._schema.is_mutable:
            return False
        return all(_key(t) in self._shadows for t in outputs)

    def _branch(self, tensors: list[Tensor], read: dict[int, Numbers]) -> None:
        """Python looks at a value: constant ones are guarded, others hold at this point only."""
        for tensor in tensors:
            self.guards.branches |= self._look_at(tensor, read[id(tensor)])

    def leaves(self, tensor: Tensor) -> None:
        """A tensor is handed to code that is not torch's: as if Python looked at all of it."""
        if self.failure is None:
            self.guards.elsewhere |= self._look_at(tensor, self.numbers(tensor))

    def _look_at(self, tensor: Tensor, numbers: Numbers) -> bool:
        """Note constants that are looked at; whether any of the values varies."""
        if self._parent is not None and _active(numbers):
            self.failure = "its backward looks at values of gradients"
        self._note(tensor, False)
        return not bool((numbers == EMPTY).all())

    def _note(self, tensor: Tensor, varying: bool) -> None:
        if varying:
            self.guards.orders.add(self._count)
        for source in self._shadow(tensor).sources:
            self.guards.constants[source] = self._external[source]

    def _custom(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """A custom function ran: its outputs depend on its inputs as its backward says."""
        if self.failure is not None:
            return
        ins = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
        outs = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and _carries(t)]
        try:
            self._write_custom(ins, outs)
        except TooManySets:
            self.failure = "its sets outgrow their budget"

    def _write_custom(self, ins: list[Tensor], outs: list[Tensor]) -> None:
        given = [t for t in ins if _carries(t)]
        numbers = [self.numbers(t) for t in given]
        if not outs or not any(_active(n) for n in numbers):
            return
        everything = self.sets.unite_all([self.sets.unite_axis(n.reshape(-1)) for n in numbers])
        name = type(outs[0].grad_fn).__name__
        reached = backward_reach(self, given, outs)
        if reached is None:
            self.dense_ops[name] = self.dense_ops.get(name, 0) + 1
        reads = tuple(dict.fromkeys(self.value_of(t) for t in given))
        for place, tensor in enumerate(outs):
            found = everything if reached is None else reached(place, numbers)
            self._write(tensor, np.broadcast_to(found, tensor.shape))
        writes = tuple(self.value_of(t) for t in outs)
        sizes = tuple(t.numel() for t in outs)
        moved = sum(t.numel() * t.element_size() for t in outs)
        self.graph.steps.append(Step(name, name, self._count, reads, writes, sizes, 0, moved, True))
        self.graph.affine = False

    def _shadow(self, tensor: Tensor) -> Shadow:
        known = self._shadows.get(_key(tensor))
        return known if known is not None else self._meet(tensor)

    def _meet(self, tensor: Tensor) -> Shadow:
        """A tensor from outside: parameters vary, other constants are structure."""
        if self._parent is not None:
            if not (self._parent.knows(tensor) or isinstance(tensor, torch.nn.Parameter)):
                # It may come of gradients by ways outside of torch.
                self.failure = "its backward takes tensors from elsewhere"
            return self._add(tensor, VARIES)
        varies = isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad
        shadow = self._add(tensor, VARIES if varies else EMPTY)
        if not varies:
            name = len(self._external)
            self._external[name] = tensor
            shadow.sources = frozenset({name})
        return shadow

    def within(
        self, inputs: Sequence[Tensor], labels: Sequence[np.ndarray], count: int
    ) -> Follower:
        """A follower of a backward pass of what this one follows."""
        return Follower(inputs, labels, count, parent=self)

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor was met before."""
        return _key(tensor) in self._shadows

    def _add(self, tensor: Tensor, number: int) -> Shadow:
        self._names += 1
        shadow = Shadow(number, tensor.element_size(), name=self._names)
        key = _key(tensor)
        self._shadows[key] = shadow
        # Held by the shadow, and holding nothing: a follower must not outlive its run.
        gone = partial(_forget, weakref.ref(self), key)
        shadow.alive = weakref.ref(stored(tensor).untyped_storage(), gone)
        return shadow

    def forget(self, key: int, alive: Any) -> None:
        """A storage is gone, and another one may get its place."""
        shadow = self._shadows.get(key)
        if shadow is not None and shadow.alive is alive:
            del self._shadows[key]

    def _write(
        self, tensor: Tensor, numbers: Numbers, sources: frozenset[int] = frozenset()
    ) -> None:
        tensor = stored(tensor)
        shadow = self._shadows.get(_key(tensor))
        fresh = shadow is None
        if shadow is None:
            shadow = self._add(tensor, EMPTY)
        shadow.sources |= sources
        shadow.sunk = None
        shadow.version += not fresh
        shadow.refine(tensor.element_size())
        whole = tensor.untyped_storage().nbytes()
        count = whole // max(shadow.unit, 1)
        first = _alike([numbers])
        if first is not None and tensor.numel() * tensor.element_size() == whole:
            shadow.numbers = first
            return
        assign(shadow.spread(count), shadow.unit, tensor, numbers)

    def value_of(self, tensor: Tensor) -> tuple[int, int]:
        """What stands for the present content of a tensor's storage."""
        shadow = self._shadow(tensor)
        return (shadow.name, shadow.version)


# By these a tensor leaves torch, with no op that tells of it.
_EXITS = frozenset({Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__dlpack__})


class _Exits(TorchFunctionMode):
    """Tells a follower of tensors that leave torch."""

    def __init__(self, follower: Follower) -> None:
        super().__init__()
        self._follower = follower

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _EXITS:
            self._follower.leaves(args[0])
        return func(*args, **(kwargs or {}))


def _forget(follower: Callable[[], Follower | None], key: int, alive: Any) -> None:
    found = follower()
    if found is not None:
        found.forget(key, alive)


def rule_of(func: Any) -> Any:
    """The rule of an overload: its own, that of its plain form, or that of all pointwise ops."""
    packet = func.overloadpacket
    found = RULES.get(func) or RULES.get(packet) or RULES.get(_plain(packet))
    return pointwise if found is None and _is_pointwise(func) else found


def _is_pointwise(func: Any) -> bool:
    """Whether torch marks an overload, or its plain form, as elementwise."""
    plain = getattr(_plain(func.overloadpacket), func._overloadname, func)
    return torch.Tag.pointwise in func.tags or torch.Tag.pointwise in plain.tags


def _plain(packet: Any) -> Any:
    """``aten.relu`` for ``aten.relu_``."""
    name = packet.__name__
    return getattr(aten, name[:-1], packet) if name.endswith("_") else packet


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among the arguments that a call changes."""
    schema = func._schema
    if not schema.is_mutable:
        return []
    found: list[Tensor] = []
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
    return found


def _name(func: Any) -> str:
    return func.overloadpacket.__name__


def _key(tensor: Tensor) -> int:
    return stored(tensor).untyped_storage()._cdata


def _carries(tensor: Tensor) -> bool:
    return tensor.requires_grad


def _active(numbers: Numbers) -> bool:
    return bool(numbers.size) and int(numbers.max()) >= FIRST


def _alike(arrays: Sequence[Numbers]) -> int | None:
    """The one number that all elements of some arrays have, if they have."""
    found: int | None = None
    for array in arrays:
        if array.size == 0:
            continue
        first = int(array.flat[0])
        same = array.strides == (0,) * array.ndim or bool((array == first).all())
        if not same or found not in (None, first):
            return None
        found = first
    return EMPTY if found is None else found
