"""What a plan relies on beside the code: is it still so?"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pushforward.boundary import Arguments
from pushforward.state import State
from pushforward.structure.follow import Guards

# Constants larger than this are not compared by value: a write to them makes the plan anew.
_COMPARED = 1 << 22


@dataclass(frozen=True, eq=False)
class Guarded:
    """A tensor whose values served as structure, and what they were.

    Its count of writes says nothing: there are ways around it, ``mask.data`` and ``mask.numpy()``
    among them.
    """

    tensor: Callable[[], Tensor | None]
    shape: tuple[int, ...]
    version: int
    trained: bool
    content: Tensor | None

    @staticmethod
    def of(tensor: Tensor, owner: Tensor | None = None) -> Guarded:
        """Guard a tensor; ``owner`` is another one that lies in the same storage and stays."""
        content = tensor.detach().clone() if tensor.numel() <= _COMPARED else None
        found = weakref.ref(tensor) if owner is None else _view_of(owner, tensor)
        version, trained = _version(owner if owner is not None else tensor), tensor.requires_grad
        return Guarded(found, tuple(tensor.shape), version, trained, content)

    def holds(self) -> bool:
        """Whether it holds the same values, and is no more trained than it was."""
        try:
            tensor = self.tensor()
        except RuntimeError:  # the owner has got a smaller storage
            return False
        # A constant that is gone was made inside of the function, of what the state covers.
        if tensor is None:
            return True
        if tensor.requires_grad and not self.trained:
            return False
        if self.content is None:
            return _version(tensor) == self.version
        return _same(self.content, tensor.detach())


def _view_of(owner: Tensor, tensor: Tensor) -> Callable[[], Tensor | None]:
    """What looks at an owner's storage as a tensor did, that is gone by then."""
    found = weakref.ref(owner)
    place = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()

    def look() -> Tensor | None:
        alive = found()
        return None if alive is None else alive.detach().as_strided(*place)

    return look


@dataclass(frozen=True, eq=False)
class Circumstances:
    """The state of Python, constants that served as structure, and integer arguments.

    ``strides`` say how the tensors among the arguments lie in memory, which a function may look at.
    ``at_point`` says that the structure holds at the point of planning only, as far as can be told
    without running the map.
    """

    state: State
    constants: tuple[Guarded, ...]
    arguments: tuple[Tensor | None, ...]
    at_point: bool
    strides: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(
        function: Callable[..., Any],
        guards: Guards,
        arguments: Arguments,
        original: Callable[[Tensor], Tensor],
    ) -> Circumstances:
        """What holds now."""
        state = State.of(function, arguments.context)
        known = [original(tensor) for tensor in guards.constants.values()]
        constants = tuple(Guarded.of(tensor, _owner(state, tensor)) for tensor in known)
        kept = [None if _differentiable(t) else t.detach().clone() for t in arguments.others]
        strides = strides_of(arguments)
        return Circumstances(state, constants, tuple(kept), guards.at_point, strides)

    def hold(
        self, function: Callable[..., Any], arguments: Arguments, guarded: bool = False
    ) -> bool:
        """Whether a plan made then may be used for a call with these arguments.

        ``guarded``: what depends on the point is compared by a program when it runs.
        """
        others = arguments.others
        return (
            (guarded or not self.at_point)
            and self.strides == strides_of(arguments)
            and self.state.holds(function, arguments.context)
            and len(others) == len(self.arguments)
            and (not self.constants or all(constant.holds() for constant in self.constants))
            and (not others or self._same_arguments(others))
        )

    def _same_arguments(self, others: Sequence[Tensor]) -> bool:
        pairs = zip(self.arguments, others, strict=True)
        return all(old is None or _same(old, new) for old, new in pairs)

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


def strides_of(arguments: Arguments) -> tuple[tuple[int, ...], ...]:
    """How the copies of the arguments that a function gets lie in memory."""
    tensors = [*arguments.tensors, *arguments.others]
    return tuple([() if _is_plain(t) else _strides(t) for t in tensors])


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.is_contiguous()


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a copy; none for the plain order, and where there are no strides."""
    if tensor.layout != torch.strided or tensor.is_contiguous():
        return ()
    copy = torch.empty_like(tensor, device="meta")
    return () if copy.is_contiguous() else copy.stride()


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _same(old: Tensor, new: Tensor) -> bool:
    if (old.shape, old.dtype, old.layout) != (new.shape, new.dtype, new.layout):
        return False
    return all(map(torch.equal, dense_parts(old), dense_parts(new)))


def dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """What a tensor is stored in: itself, or indices and values of a sparse one."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


def _owner(state: State, tensor: Tensor) -> Tensor | None:
    """What the function can reach of the storage of a tensor that it cannot reach."""
    if id(tensor) in state.tensors or tensor.layout != torch.strided:
        return None
    key = tensor.untyped_storage().data_ptr()
    for found in state.alive():
        if found.layout == torch.strided and found.untyped_storage().data_ptr() == key != 0:
            return found
    return None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
