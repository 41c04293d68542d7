"""Rules: what each element of an op's outputs depends on, given what those of its inputs do.

A rule is one decorated function from a `Call` to the sets of each output, as arrays of numbers
that broadcast to the outputs' shapes. Views and in-place ops need no rule of their own: a view
shares the storage that it looks at, and an in-place op is the rule of its plain form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pushforward.structure.sets import EMPTY, FIRST, VARIES, Sets

Numbers = np.ndarray
Rule = Callable[["Call"], Sequence[Numbers]]

RULES: dict[Any, Rule] = {}


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Enter a function as the rule of some ops: packets such as ``aten.mul``, or overloads."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return enter


@dataclass
class Call:
    """One call of an op, as a rule sees it.

    Attributes:
        func: the overload that was called; ``args`` and ``kwargs`` as they came.
        outputs: the tensors that it returned, flat.
        sets: the table of sets.
        read: the sets of a tensor's elements, shaped like it.
        values: the value of a tensor before the call, where the call changes it in place.
        noted: called with a tensor whose values the result relies on.
        sunken: where a tensor is minus infinity whatever the inputs are, as far as was noted.
        returned: what the op returned, before it was made flat.
        sinks: left by a rule: where its first output is so, though derivatives pass.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    sets: Sets
    read: Callable[[Tensor], Numbers]
    values: dict[int, Tensor] = field(default_factory=dict)
    noted: Callable[[Tensor, bool], None] = lambda tensor, varying: None
    sunken: Callable[[Tensor], np.ndarray | None] = lambda tensor: None
    sinks: np.ndarray | None = None
    returned: Any = None

    @property
    def op(self) -> str:
        """The name of the op, that of its plain form where it works in place."""
        return self.func.overloadpacket.__name__.rstrip("_")

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def named(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the schema of the op."""
        names = [argument.name for argument in self.func._schema.arguments]
        return self.arg(names.index(name), name, default) if name in names else default

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, lists opened."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return tuple(self.outputs[0].shape)

    def numbers(self, value: Any) -> Numbers:
        """The sets of a tensor's elements; a plain number is constant."""
        return self.read(value) if isinstance(value, Tensor) else np.zeros((), np.int32)

    def value(self, tensor: Tensor) -> Tensor:
        """The value that a tensor had before the call."""
        return self.values.get(id(tensor), tensor).detach()

    def is_constant(self, value: Any) -> bool:
        """Whether no element of a tensor varies, so that its values are structure."""
        return not isinstance(value, Tensor) or bool((self.numbers(value) == EMPTY).all())

    def constant(self, tensor: Tensor) -> np.ndarray:
        """The values of a tensor that serves as structure; where it varies, at this point only."""
        self.noted(tensor, not self.is_constant(tensor))
        return self.value(tensor).cpu().numpy()

    def equals(self, value: Any, number: float) -> np.ndarray | None:
        """Where a tensor is constantly ``number``; None where it is so nowhere."""
        if not isinstance(value, Tensor):
            return np.asarray(value == number) if value == number else None
        return self._constantly(value, lambda tensor: tensor == number)

    def sunk(self, value: Any) -> np.ndarray | None:
        """Where a tensor is so low, whatever the inputs are, that its exponential is zero."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        low = torch.finfo(value.dtype).min / 2
        masks = (self._constantly(value, lambda tensor: tensor < low), self.sunken(value))
        known = [mask for mask in masks if mask is not None]
        return np.logical_or(known[0], known[-1]) if known else None

    def _constantly(self, value: Tensor, holds: Callable[[Tensor], Tensor]) -> np.ndarray | None:
        """Where something holds of a value that is constant; None where it does nowhere."""
        numbers = self.read(value)
        if numbers.strides == (0,) * numbers.ndim and numbers.size and numbers.flat[0] != EMPTY:
            return None
        constant = numbers == EMPTY
        if not constant.any():
            return None
        found = constant & holds(self.value(value)).cpu().numpy()
        if not found.any():
            return None
        self.noted(value, False)
        return found

    def unite(self, *values: Any) -> Numbers:
        """The unions of what several tensors (or arrays of sets) depend on, broadcast."""
        arrays = [v if isinstance(v, np.ndarray) else self.numbers(v) for v in values]
        return self.sets.unite_all(arrays)

    def unite_axes(self, numbers: Numbers, axes: Sequence[int], keepdim: bool = False) -> Numbers:
        """The unions along some axes."""
        if numbers.ndim == 0:
            return numbers
        normal = sorted({axis % numbers.ndim for axis in axes}, reverse=True)
        for axis in normal:
            numbers = self.sets.unite_axis(numbers, axis)
        return np.expand_dims(numbers, tuple(normal)) if keepdim and normal else numbers

    def everything(self) -> Numbers:
        """One set for all elements of all arguments: dense."""
        parts = [self.sets.unite_axis(self.numbers(t).reshape(-1)) for t in self.tensors]
        return self.unite(*parts) if parts else np.zeros((), np.int32)

    def same_everywhere(self, numbers: Numbers) -> list[Numbers]:
        """The same sets for each output."""
        return [numbers] * len(self.outputs)


def without_derivative(numbers: Numbers) -> Numbers:
    """What is left of some sets where no derivative passes: constant, or varying."""
    return np.minimum(numbers, VARIES)


def depends(numbers: Numbers) -> bool:
    """Whether any element depends on a variable."""
    return bool(numbers.size) and int(numbers.max()) >= FIRST


def dims(value: Any, rank: int) -> list[int]:
    """An argument that names axes, as a list; None names all."""
    if value is None or (not isinstance(value, int) and len(value) == 0):
        return list(range(rank))
    return [value] if isinstance(value, int) else list(value)


def positions(shape: Sequence[int], start: int) -> Tensor:
    """Consecutive numbers in a shape, as floating-point numbers that every op takes."""
    count = int(np.prod(shape, dtype=np.int64))
    return torch.arange(start, start + count, dtype=torch.float64).reshape(tuple(shape))
