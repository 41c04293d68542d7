"""Following a model while it runs: the codes of its piecewise linear units, and nothing smooth.

Beside each storage stands how its content depends on the input: not at all, in steps, or piecewise
linearly. An op that would make it anything else is refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from pushforward.errors import CouplingError, InputError, NotAvailableError, PushforwardError
from pushforward.purity import untouched
from pushforward.sensitivity import pieces
from pushforward.sensitivity.calls import Call, Dependence, Kind, tensors_of


@dataclass(frozen=True, eq=False)
class Codes:
    """The codes of one run in the order in which they arose, and the output."""

    units: tuple[Tensor, ...]
    output: Any


def codes_of(model: Callable[[Tensor], Any], x: Tensor, pooling: bool) -> Codes:
    """Run a model on a batch and read off the codes of its units; leaves no trace.

    Raises:
        InputError: a unit that is not piecewise linear, or one that draws random numbers.
        CouplingError: batch normalisation in training mode.
        NotAvailableError: an op of which that is not known, or a branch in Python.
    """
    x = x.detach().clone()
    watch = Watch(x, pooling)
    with untouched(model), torch.no_grad(), _modules_told(model, watch), watch:
        output = model(x)
    watch.close(output)
    return Codes(tuple(watch.units), output)


@contextmanager
def _modules_told(model: Any, watch: Watch) -> Iterator[None]:
    """Tell a watch which module is running."""
    names = {m: n for n, m in model.named_modules()} if isinstance(model, nn.Module) else {}

    def enter(module: nn.Module, _: Any) -> None:
        name = names.get(module)
        watch.running.append(type(module).__name__ + (f" {name!r}" if name else ""))

    def leave(*_: Any) -> None:
        watch.running.pop()

    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Watch(TorchDispatchMode):
    """Follows the ops of one run on ``x``.

    Attributes:
        units: the codes seen so far.
        running: the modules that are running, the innermost last.
    """

    def __init__(self, x: Tensor, pooling: bool) -> None:
        super().__init__()
        self.units: list[Tensor] = []
        self.running: list[str] = []
        self._pooling = pooling
        self._known: weakref.WeakKeyDictionary[Any, Dependence] = weakref.WeakKeyDictionary()
        self._comparisons: list[Tensor] = []
        self._counted: frozenset[int] = frozenset()
        self._known[x.untyped_storage()] = Dependence(Kind.LINEAR)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise the first op imports the compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = Call(func, args, kwargs, {id(t): self._of(t) for t in tensors_of((args, kwargs))})
        self._check(call)
        linear = call.given.kind == Kind.LINEAR
        if linear and call.unit is not None:
            self.units.append(call.code)
        out = func(*args, **kwargs)
        if linear and self._pooling and call.op in pieces.POOLS:
            self.units.append(pieces.winners(func, args, out))
        self._note(call, out)
        return out

    def close(self, output: Any) -> None:
        """Count what an output is made of that is piecewise constant."""
        for tensor in tensors_of(output):
            self._count(self._of(tensor))

    def _of(self, tensor: Tensor) -> Dependence:
        return self._known.get(tensor.untyped_storage(), Dependence())

    def _check(self, call: Call) -> None:
        """Refuse what does not keep a model piecewise linear."""
        given = call.given
        if call.draws:
            raise InputError(
                f"linear_regions expects no random numbers, got {call.name}{self._place()}; "
                "call .eval() first"
            )
        if given.kind and call.reads_a_value:
            raise NotAvailableError(
                f"linear_regions expects no branches on values, but Python reads one"
                f"{self._place()}; take the branches one by one"
            )
        if given.kind == Kind.ENDED and not call.is_move:
            raise self._refusal(f"{given.ended_by} that is not the last op", call)
        if given.kind == Kind.LINEAR and not _keeps_pieces(call):
            raise self._refusal(call.name, call)

    def _refusal(self, name: str, call: Call) -> PushforwardError:
        if call.op in pieces.BATCH_NORMS:
            return CouplingError(
                f"linear_regions expects points that do not influence each other, got {name} in "
                f"training mode{self._place()}; call .eval() first (instance normalisation has no "
                "linear pieces in either mode)"
            )
        if call.is_pointwise or call.op in pieces.BENT or call.given.ended_by:
            return InputError(
                f"linear_regions expects piecewise linear units, such as ReLU, got {name}"
                f"{self._place()}; where the pieces are not linear there are no regions to count"
            )
        return NotAvailableError(
            f"linear_regions expects ops that are known to be piecewise linear, got {name}"
            f"{self._place()}, which is not among them; write it with other ops"
        )

    def _place(self) -> str:
        return f" (in {self.running[-1]})" if self.running else ""

    def _note(self, call: Call, out: Any) -> None:
        """Write down what the results of a call depend on."""
        found = self._found(call, out)
        if not found.kind:
            return
        for tensor in (*tensors_of(out), *call.written):
            known = [self._of(tensor), found]
            self._known[tensor.untyped_storage()] = Dependence.joined(known)

    def _found(self, call: Call, out: Any) -> Dependence:
        given = call.given
        if not given.kind or call.op in pieces.FILLS:
            return Dependence()
        if given.kind == Kind.LINEAR and call.op in pieces.COMPARISONS:
            self._comparisons.append(out.clone())
            return Dependence(Kind.STEPS, frozenset({len(self._comparisons) - 1}))
        if given.kind == Kind.LINEAR and call.op in pieces.ENDS:
            return Dependence(Kind.ENDED, ended_by=call.name)
        if given.kind == Kind.LINEAR:
            self._count(given)
            return Dependence(Kind.LINEAR)
        return given

    def _count(self, dependence: Dependence) -> None:
        """A comparison becomes a unit, once, where it makes pieces."""
        for number in sorted(dependence.comparisons - self._counted):
            self.units.append(self._comparisons[number])
        self._counted |= dependence.comparisons


def _keeps_pieces(call: Call) -> bool:
    """Whether a call of what is piecewise linear gives such things, steps, or an end."""
    known = (pieces.COMPARISONS, pieces.ENDS, pieces.POOLS, pieces.FILLS)
    return call.unit is not None or call.is_affine or any(call.op in each for each in known)
