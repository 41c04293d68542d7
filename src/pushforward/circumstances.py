"""What a plan relies on beside the code: is it still so?"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pushforward.state import State
from pushforward.structure.follow import Guards

# Constants larger than this are not compared by value: a write to them makes the plan anew.
_COMPARED = 1 << 22


@dataclass(frozen=True, eq=False)
class Guarded:
    """A tensor whose values served as structure, and what they were."""

    tensor: Callable[[], Tensor | None]
    shape: tuple[int, ...]
    version: int
    content: Tensor | None

    @staticmethod
    def of(tensor: Tensor) -> Guarded:
        content = tensor.detach().clone() if tensor.numel() <= _COMPARED else None
        return Guarded(weakref.ref(tensor), tuple(tensor.shape), _version(tensor), content)

    def holds(self) -> bool:
        """Whether it was not written to, or holds the same values again."""
        tensor = self.tensor()
        # A constant that is gone was made inside of the function, of what the state covers.
        if tensor is None or _version(tensor) == self.version:
            return True
        return self.content is not None and _same(self.content, tensor.detach())


@dataclass(frozen=True, eq=False)
class Circumstances:
    """The state of Python, constants that served as structure, and integer arguments.

    ``at_point`` says that the structure holds at the point of planning only, as far as can be told
    without running the map.
    """

    state: State
    constants: tuple[Guarded, ...]
    arguments: tuple[Tensor | None, ...]
    at_point: bool

    @staticmethod
    def of(
        function: Callable[..., Any],
        guards: Guards,
        others: Sequence[Tensor],
        original: Callable[[Tensor], Tensor],
    ) -> Circumstances:
        """What holds now."""
        known = [original(tensor) for tensor in guards.constants.values()]
        kept = tuple(None if _differentiable(t) else t.detach().clone() for t in others)
        constants = tuple(Guarded.of(tensor) for tensor in known)
        return Circumstances(State.of(function), constants, kept, guards.at_point)

    def hold(
        self, function: Callable[..., Any], others: Sequence[Tensor], guarded: bool = False
    ) -> bool:
        """Whether a plan made then may be used for a call with these other arguments.

        ``guarded``: what depends on the point is compared by a program when it runs.
        """
        return (
            (guarded or not self.at_point)
            and self.state.holds(function)
            and all(constant.holds() for constant in self.constants)
            and len(others) == len(self.arguments)
            and all(
                old is None or _same(old, new)
                for old, new in zip(self.arguments, others, strict=True)
            )
        )

    def describe(self) -> str:
        """The guards in words, for the table of a plan."""
        parts = ["shapes, dtypes, devices, training mode, Python state"]
        if self.constants:
            shapes = ", ".join(str(c.shape) for c in self.constants[:4])
            more = ", ..." if len(self.constants) > 4 else ""
            parts.append(f"values of constants that serve as masks or indices: {shapes}{more}")
        if any(old is not None for old in self.arguments):
            parts.append("values of integer arguments")
        if self.at_point:
            parts.append("indices or branches that depend on the input, compared at each run")
        return "; ".join(parts)


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _same(old: Tensor, new: Tensor) -> bool:
    return old.shape == new.shape and old.dtype == new.dtype and torch.equal(old, new)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
