"""A program: a recorded computation as one plain Python function of a few calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions import Distribution

from pushforward.program.recorder import CannotRecord, Instruction, Recorder, Recording, Slot
from pushforward.program.shortcuts import shortened
from pushforward.program.tally import tally
from pushforward.work import Op

aten = torch.ops.aten


class Stale(Exception):
    """A value that a program relies on is another one at this point."""


@contextmanager
def _validation_kept() -> Iterator[None]:
    """The first use of torch's compiler turns off, for good, what distributions check."""
    checks = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checks)


@dataclass(frozen=True, eq=False)
class Program:
    """A computation on tensors, flat: no autograd, no branches, constants folded.

    Attributes:
        run: from the inputs to the outputs; raises `Stale` where a guard does not hold.
        externals: give the tensors from outside, which are read anew at each run; None for one that
            is gone.
        length: the number of ops.
        guards: how many values are compared with what they were.
        source: the function as text.
        varies: whether any output depends on the inputs; where none does, one run serves all.
        ops: what each op does, to predict costs by.
    """

    run: Callable[..., tuple[Tensor, ...]]
    externals: tuple[Callable[[], Tensor | None], ...]
    length: int
    guards: int
    source: str = field(repr=False)
    varies: bool = True
    ops: tuple[Op, ...] = field(default=(), repr=False)
    traceable: dict[str, Any] = field(default_factory=dict, repr=False)

    def compiled(self) -> Program:
        """The same program, handed to ``torch.compile``; what that makes is made at the first run.

        Raises:
            CannotRecord: it compares values with what they were, which a compiler cannot.
        """
        if self.guards:
            raise CannotRecord("it has guards, which torch.compile cannot look at")
        names = dict(self.traceable)
        exec(compile(self.source, "<program>", "exec"), names)
        with _validation_kept():
            run = torch.compile(names["run"], fullgraph=True, dynamic=False)
        return replace(self, run=run)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.run(*inputs, *self.outside())

    def outside(self) -> list[Tensor]:
        """The tensors from outside, as they are now.

        Raises:
            Stale: one of them is gone.
        """
        found = [external() for external in self.externals]
        if any([tensor is None for tensor in found]):  # noqa: C419 (at each evaluation)
            raise Stale
        return cast(list[Tensor], found)


def program(
    work: Callable[[], Sequence[Tensor]],
    recorder: Recorder,
    original: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    owned: Callable[[Tensor], bool] = lambda tensor: False,
) -> Program:
    """Record ``work`` and make a program of it.

    ``original`` gives for a tensor from outside the one that it is a copy of, once work is done;
    ``owned`` says whether somebody else keeps it, so that the program need not.

    Raises:
        CannotRecord: it draws random numbers, writes to tensors from outside, or has shapes that
            depend on values.
    """
    with recorder:
        results = list(work())
    outputs = [recorder.slot(result) for result in results]
    recording = recorder.recording
    _refuse_outside(recording)
    recording.externals = {slot: original(t) for slot, t in recording.externals.items()}
    recording, outs = shortened(recording, outputs)
    return _compiled(recording, outs, owned)


def _refuse_outside(recording: Recording) -> None:
    outside = {recording.groups[s] for s in (*recording.externals, *recording.inputs)}
    if any(i.writes & outside for i in recording.instructions):
        raise CannotRecord("a tensor from outside is written to")


def _compiled(
    recording: Recording, outputs: Sequence[Slot], owned: Callable[[Tensor], bool]
) -> Program:
    """Write the instructions as a function and make it."""
    writer = _Writer(recording)
    for place, instruction in enumerate(recording.instructions):
        writer.write(place, instruction)
    writer.finish(outputs)
    source = writer.text([*recording.inputs, *writer.used_externals])
    names = writer.names
    exec(compile(source, "<program>", "exec"), names)  # our own text, from ops that ran
    externals = tuple(_holder(recording.externals[slot], owned) for slot in writer.used_externals)
    guards = sum(not i.outs for i in recording.instructions)
    varies, ops = _depends(recording, outputs), tally(recording)
    run, traceable = names["run"], {**names, **writer.overloads}
    return Program(run, externals, len(ops), guards, source, varies, ops, traceable)


def _holder(tensor: Tensor, owned: Callable[[Tensor], bool]) -> Callable[[], Tensor | None]:
    """What gives a tensor from outside; a weak reference where somebody else keeps it."""
    return weakref.ref(tensor) if owned(tensor) else lambda: tensor


def _depends(recording: Recording, outputs: Sequence[Slot]) -> bool:
    """Whether any output depends on an input."""
    reached = {recording.groups[slot] for slot in recording.inputs}
    for i in recording.instructions:
        if not i.outs or any(recording.groups[slot] in reached for slot in _values_read(i)):
            reached |= {recording.groups[slot] for slot in i.outs if slot is not None} | i.writes
            if not i.outs:
                return True
    return any(recording.groups[slot] in reached for slot in outputs)


def _values_read(instruction: Instruction) -> list[Slot]:
    """The slots whose values, and not only shapes, an instruction needs."""
    if instruction.func is aten.convolution_backward.default and not instruction.args[10][1]:
        return [instruction.args[0], instruction.args[2]]
    if instruction.func.overloadpacket in _SHAPE_OF_SECOND:
        return [instruction.args[0]]
    return instruction.reads


# Their second argument is there for its shape.
_SHAPE_OF_SECOND = (
    aten.avg_pool2d_backward,
    aten.avg_pool3d_backward,
    aten._adaptive_avg_pool2d_backward,
    aten._adaptive_avg_pool3d_backward,
)


class _Writer:
    """Writes instructions as lines of Python, and drops tensors after their last use."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.names: dict[str, Any] = {"Stale": Stale}
        self.overloads: dict[str, Any] = {}
        self.used_externals: dict[Slot, None] = {}
        self._lines: list[str] = []
        self._last = self._last_uses()

    def _last_uses(self) -> dict[Slot, int]:
        last = {}
        for place, instruction in enumerate(self.recording.instructions):
            for slot in (*instruction.reads, *(s for s in instruction.outs if s is not None)):
                last[slot] = place
        return last

    def write(self, place: int, instruction: Instruction) -> None:
        call = self._call(instruction)
        if not instruction.outs:
            expected = self._constant(instruction.expected)
            self._lines.append(f"if {call} != {expected}: raise Stale")
        else:
            targets = ", ".join("_" if s is None else f"v{s.number}" for s in instruction.outs)
            several = len(instruction.outs) > 1 or _returns_a_list(instruction.func)
            self._lines.append(f"{targets}{',' if several and ',' not in targets else ''} = {call}")
        self._drop(place, instruction)

    def _call(self, instruction: Instruction) -> str:
        special = _SPELLINGS.get(instruction.func)
        if special is not None and not instruction.kwargs:
            return special(self, *instruction.args)
        return f"{self._function(instruction.func)}({self._arguments(instruction)})"

    def spelled(self, value: Any) -> str:
        """A value as it stands in the text."""
        return self._value(value)

    def _drop(self, place: int, instruction: Instruction) -> None:
        slots = [*instruction.reads, *(s for s in instruction.outs if s is not None)]
        done = [s for s in dict.fromkeys(slots) if self._last[s] == place and self._is_local(s)]
        if done:
            self._lines.append("del " + ", ".join(f"v{s.number}" for s in done))

    def _is_local(self, slot: Slot) -> bool:
        known = (self.recording.constants, self.recording.externals, self.recording.inputs)
        return not any(slot in group for group in known)

    def finish(self, outputs: Sequence[Slot]) -> None:
        borrowed = _borrowed(self.recording)
        results = ", ".join(
            f"{self._value(slot)}.clone()" if slot in borrowed else self._value(slot)
            for slot in outputs
        )
        self._lines.append(f"return ({results},)")
        kept = {f"v{slot.number}" for slot in outputs}
        self._lines = [_without(line, kept) for line in self._lines]

    def text(self, inputs: Sequence[Slot]) -> str:
        arguments = ", ".join(f"v{slot.number}" for slot in inputs)
        body = "\n    ".join(line for line in self._lines if line)
        return f"def run({arguments}):\n    {body}\n"

    def _arguments(self, instruction: Instruction) -> str:
        positional = [self._value(value) for value in instruction.args]
        named = [f"{name}={self._value(value)}" for name, value in instruction.kwargs.items()]
        return ", ".join(positional + named)

    def _value(self, value: Any) -> str:
        if isinstance(value, Slot):
            return self._slot(value)
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(self._value(part) for part in value) + "]"
        if value is None or isinstance(value, (bool, int)):
            return repr(value)
        return self._constant(value)

    def _slot(self, slot: Slot) -> str:
        if slot in self.recording.constants:
            return self._named(f"c{slot.number}", self.recording.constants[slot])
        if slot in self.recording.externals:
            self.used_externals[slot] = None
        return f"v{slot.number}"

    def _constant(self, value: Any) -> str:
        return self._named(f"k{len(self.names)}", value)

    def named(self, value: Any) -> str:
        """A name for a constant."""
        return self._constant(value)

    def _named(self, name: str, value: Any) -> str:
        self.names[name] = value
        return name

    def _function(self, func: Any) -> str:
        name = func.overloadpacket.__name__
        if name in _DIRECT and func._overloadname in ("default", "Tensor", "int"):
            return self._named(name, getattr(torch, name))
        name = f"{name}_{func._overloadname}"
        self.overloads[name] = func  # what a compiler can look into
        return self._named(name, func._op)


# Functions of torch with the arguments of the op, called in half the time.
_DIRECT = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "neg",
        "roll",
        "mm",
        "bmm",
        "mv",
        "addmm",
        "addcmul",
        "tanh",
        "sigmoid",
        "relu",
        "exp",
        "log",
        "sin",
        "cos",
        "sqrt",
        "rsqrt",
        "abs",
        "index_select",
        "cat",
        "flip",
        "square",
        "reciprocal",
        "cumsum",
        "where",
        "clone",
        "gather",
        "constant_pad_nd",
        "unbind",
        "stack",
    ]
)


def _slice(writer: _Writer, tensor: Slot, dim: int = 0, *bounds: int | None) -> str:
    start, stop, step = (*bounds, *(None, None, None)[len(bounds) :])
    stop = None if stop is None or stop > _END else stop
    place = (slice(None),) * dim + (slice(start, stop, step),)
    return f"{writer.spelled(tensor)}[{writer.named(place)}]"


def _view(writer: _Writer, tensor: Slot, shape: list[int]) -> str:
    # Fused calls may lie in memory in another order than what they stand for.
    return f"{writer.spelled(tensor)}.reshape({writer.spelled(list(shape))})"


# The largest index that slices of torch go to.
_END = 1 << 62
_SPELLINGS: dict[Any, Callable[..., str]] = {
    aten.slice.Tensor: _slice,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
}


def _borrowed(recording: Recording) -> set[Slot]:
    """Slots in storages that are not the run's own: whoever gets a result may write to it."""
    borrowed = {*recording.constants, *recording.externals, *recording.inputs}
    for i in recording.instructions:
        if _shares(i.func) and any(slot in borrowed for slot in i.reads):
            borrowed.update(slot for slot in i.outs if slot is not None)
    return borrowed


def _shares(func: Any) -> bool:
    """Whether results of an op may lie in a storage of its arguments."""
    returns = func._schema.returns
    return func is aten._unsafe_view.default or any(r.alias_info is not None for r in returns)


def _returns_a_list(func: Any) -> bool:
    """Whether an op returns a list of tensors."""
    returns = func._schema.returns
    return len(returns) == 1 and str(returns[0].type).startswith("List")


def _without(line: str, kept: set[str]) -> str:
    """A line that drops tensors, without those that are returned."""
    if not line.startswith("del "):
        return line
    names = [name for name in line[4:].split(", ") if name not in kept]
    return "del " + ", ".join(names) if names else ""
