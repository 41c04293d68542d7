"""Where pytrees, complex numbers and batches become flat real vectors, and back.

A `Layout` describes one side of a map: the tree, the shapes and the dtypes of its leaves. Behind
it everything is flat: a vector of one side has ``size`` real scalars, and a batch of samples comes
before them. A complex leaf counts as two real scalars per entry (real part, imaginary part); a leaf
that is not a floating-point tensor is not differentiated and takes no place.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pushforward.errors import InputError, ShapeError


def _is_plain_dataclass(tree: Any) -> bool:
    return (
        dataclasses.is_dataclass(tree)
        and not isinstance(tree, type)
        and type(tree) not in pytree.SUPPORTED_NODES
    )


@dataclass(frozen=True)
class Structure:
    """The shape of a tree without its leaves; dataclasses need no registration."""

    spec: Any
    records: tuple[tuple[Any, Structure] | None, ...]

    @staticmethod
    def of(tree: Any) -> tuple[list[Any], Structure]:
        """Return the leaves of a tree and its structure."""
        if isinstance(tree, Tensor):
            return [tree], _SINGLE
        tops, spec = pytree.tree_flatten(tree, is_leaf=_is_plain_dataclass)
        leaves: list[Any] = []
        records: list[tuple[Any, Structure] | None] = []
        for top in tops:
            below, record = _open_record(top)
            leaves.extend(below)
            records.append(record)
        return leaves, Structure(spec, tuple(records))

    @cached_property
    def signature(self) -> str:
        """What two structures have in common when they are alike."""
        return repr(self)

    def leaves_of(self, tree: Any) -> list[Any] | None:
        """The leaves of another tree in the order of this one; None where it is built otherwise."""
        try:
            tops = self.spec.flatten_up_to(tree)
        except (ValueError, TypeError, KeyError):
            return None
        leaves: list[Any] = []
        for top, record in zip(tops, self.records, strict=True):
            below = [top] if record is None else _fields_of(top, *record)
            if below is None:
                return None
            leaves += below
        return leaves

    def rebuild(self, leaves: Sequence[Any]) -> Any:
        """Put leaves, in order, in the places that the original ones had."""
        return leaves[0] if self is _SINGLE else self._fill(iter(leaves))

    def _fill(self, leaves: Iterator[Any]) -> Any:
        tops = [
            next(leaves) if record is None else _close_record(record[0], record[1]._fill(leaves))
            for record in self.records
        ]
        return pytree.tree_unflatten(tops, self.spec)


def _fields_of(top: Any, kind: Any, inner: Structure) -> list[Any] | None:
    if type(top) is not kind:
        return None
    return inner.leaves_of(
        {field.name: getattr(top, field.name) for field in dataclasses.fields(kind)}
    )


def _open_record(top: Any) -> tuple[list[Any], tuple[Any, Structure] | None]:
    if not _is_plain_dataclass(top):
        return [top], None
    fields = {field.name: getattr(top, field.name) for field in dataclasses.fields(top)}
    leaves, inner = Structure.of(fields)
    return leaves, (type(top), inner)


def _close_record(kind: Any, fields: dict[str, Any]) -> Any:
    record = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(record, name, value)
    return record


_SINGLE = Structure(pytree.tree_flatten(0)[1], (None,))


@dataclass(frozen=True)
class Leaf:
    """One leaf of a side: its shape (of one sample, where there is a batch) and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    device: torch.device | None

    @property
    def differentiable(self) -> bool:
        return self.dtype is not None and (self.dtype.is_floating_point or self.dtype.is_complex)

    @property
    def is_complex(self) -> bool:
        return self.dtype is not None and self.dtype.is_complex

    @property
    def real_dtype(self) -> torch.dtype:
        assert self.dtype is not None
        return self.dtype.to_real()

    @property
    def real_shape(self) -> tuple[int, ...]:
        return (*self.shape, 2) if self.is_complex else self.shape

    @property
    def size(self) -> int:
        return math.prod(self.real_shape) if self.differentiable else 0


def as_real(tensor: Tensor) -> Tensor:
    """View a complex tensor as pairs of reals; leave a real one alone."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


@dataclass(frozen=True)
class Layout:
    """One side of a map: a tree of leaves, and the number of samples where there is a batch."""

    structure: Structure
    leaves: tuple[Leaf, ...]
    batch: int | None

    @staticmethod
    def of(tree: Any, batch_dim: int | None, side: str) -> tuple[list[Any], Layout]:
        """Flatten one side; ``side`` ("input" or "output") is for the messages."""
        values, structure = Structure.of(tree)
        batch = _batch_size(values, side) if batch_dim == 0 else None
        return values, Layout(structure, tuple(_leaf(value, batch) for value in values), batch)

    @cached_property
    def active(self) -> tuple[Leaf, ...]:
        """The leaves that are differentiated."""
        return tuple(leaf for leaf in self.leaves if leaf.differentiable)

    @cached_property
    def size(self) -> int:
        """The number of real scalars, of one sample where there is a batch."""
        return sum(leaf.size for leaf in self.active)

    @property
    def dtype(self) -> torch.dtype:
        first, *others = self.active
        return reduce(torch.promote_types, [leaf.real_dtype for leaf in others], first.real_dtype)

    @property
    def device(self) -> torch.device:
        device = self.active[0].device
        assert device is not None
        return device

    @property
    def lead(self) -> tuple[int, ...]:
        """The batch axis, if there is one."""
        return () if self.batch is None else (self.batch,)

    def select(self, values: Sequence[Any]) -> list[Any]:
        """Keep what belongs to the leaves that are differentiated."""
        return [v for v, leaf in zip(values, self.leaves, strict=True) if leaf.differentiable]

    def split(self, flat: Tensor) -> list[Tensor]:
        """Cut ``(k, [B,] size)`` into one real tensor ``(k, [B,] *leaf)`` per active leaf."""
        if len(self.active) == 1:
            leaf = self.active[0]
            return [flat.reshape((*flat.shape[:-1], *leaf.real_shape)).to(leaf.real_dtype)]
        parts = flat.split([leaf.size for leaf in self.active], dim=-1)
        # A slice may start at an odd place, where torch cannot view pairs of reals as complex.
        parts = [
            part.clone(memory_format=torch.contiguous_format) if leaf.is_complex else part
            for part, leaf in zip(parts, self.active, strict=True)
        ]
        return [
            part.reshape((*flat.shape[:-1], *leaf.real_shape)).to(leaf.real_dtype)
            for part, leaf in zip(parts, self.active, strict=True)
        ]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Undo `split`."""
        flat = [
            part.reshape(*part.shape[: part.dim() - len(leaf.real_shape)], leaf.size)
            for part, leaf in zip(parts, self.active, strict=True)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)

    def pack(self, tree: Any) -> Tensor | None:
        """Flatten a tree shaped like this side to ``(1, [B,] size)``; None where it is not one."""
        if isinstance(tree, Tensor) and len(self.active) == 1:
            chosen: list[Any] | None = [tree]
        else:
            values = self.structure.leaves_of(tree)
            chosen = None if values is None else self.select(values)
        if chosen is None:
            return None
        parts = [self._as_part(v, leaf) for v, leaf in zip(chosen, self.active, strict=True)]
        if any(part is None for part in parts):
            return None
        return self.join([part.unsqueeze(0) for part in parts if part is not None])

    def _as_part(self, value: Any, leaf: Leaf) -> Tensor | None:
        if not isinstance(value, Tensor):
            return None
        if value.is_complex() and not leaf.is_complex:
            return None
        if leaf.is_complex and tuple(value.shape) == (*self.lead, *leaf.shape):
            value = as_real(value.to(leaf.dtype))
        return value if tuple(value.shape) == (*self.lead, *leaf.real_shape) else None

    def unpack(self, flat: Tensor) -> Any:
        """Turn ``([B,] size)`` into a tree shaped like this side; None for what has no place."""
        return self.arrange(
            [
                torch.view_as_complex(part.contiguous()) if leaf.is_complex else part
                for part, leaf in zip(self.split(flat), self.active, strict=True)
            ]
        )

    def arrange(self, active: Sequence[Any]) -> Any:
        """Put one value per active leaf in place; None stands where nothing is differentiated."""
        rest = iter(active)
        return self.structure.rebuild(
            [next(rest) if leaf.differentiable else None for leaf in self.leaves]
        )

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a plan depends on: tree, shapes, dtypes, devices, batch."""
        return (self.structure.signature, self.leaves, self.batch)

    def describe(self) -> str:
        """Shapes and dtypes, for messages and tables."""
        shown = [
            f"{str(leaf.dtype).removeprefix('torch.')}{[*self.lead, *leaf.shape]}"
            for leaf in self.leaves
            if leaf.dtype is not None
        ]
        return ", ".join(shown) or "nothing"


def _batch_size(values: Sequence[Any], side: str) -> int:
    floats = [v for v in values if isinstance(v, Tensor) and _floats(v)]
    sizes = {v.shape[0] if v.dim() else None for v in floats}
    if None in sizes or len(sizes) > 1:
        shapes = ", ".join(str(tuple(v.shape)) for v in floats)
        raise ShapeError(
            f"batch_dim=0 expects every floating-point {side} to have the batch as dimension 0, "
            f"got shapes {shapes}; reshape them, or use batch_dim=None for one map"
        )
    return sizes.pop() or 0 if sizes else 0


def _floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _leaf(value: Any, batch: int | None) -> Leaf:
    if not isinstance(value, Tensor):
        return Leaf((), None, None)
    shape = tuple(value.shape) if batch is None or not _floats(value) else tuple(value.shape[1:])
    return Leaf(shape, value.dtype, value.device)


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call, and which of them are differentiated."""

    args: tuple[Any, ...]
    argnums: int | tuple[int, ...]
    domain: Layout
    leaves: tuple[Any, ...]

    @staticmethod
    def of(args: tuple[Any, ...], argnums: int | Sequence[int], batch_dim: int | None) -> Arguments:
        """Check and flatten the arguments of a call."""
        if batch_dim not in (None, 0):
            raise InputError(
                f"batch_dim expects None or 0, got {batch_dim!r}; move the batch to dimension 0"
            )
        chosen = _normalise_argnums(args, argnums)
        picked = args[chosen] if isinstance(chosen, int) else tuple(args[i] for i in chosen)
        values, domain = Layout.of(picked, batch_dim, "input")
        if not domain.active:
            raise InputError(
                "expected at least one floating-point or complex tensor to differentiate, got "
                f"{_kinds(values)}; convert it, or choose another argument with argnums="
            )
        if any(v.layout != torch.strided for v in domain.select(values)):
            raise InputError(
                f"expected dense tensors to differentiate, got a sparse one ({domain.describe()}); "
                "differentiate with respect to its values"
            )
        return Arguments(args, chosen, domain, tuple(values))

    @staticmethod
    def like(
        domain: Layout, args: tuple[Any, ...], argnums: int | tuple[int, ...]
    ) -> Arguments | None:
        """The arguments of another call, where it is plain to see that they are like those before.

        One tensor with the shape, dtype and device of the only leaf; None where more is to be
        looked at.
        """
        if len(args) != 1 or argnums != 0 or domain.structure is not _SINGLE:
            return None
        (x,), leaf = args, domain.leaves[0]
        if (
            type(x) is not Tensor
            or x.shape != (leaf.shape if domain.batch is None else (domain.batch, *leaf.shape))
            or x.dtype is not leaf.dtype
            or x.device != leaf.device
            or x.layout is not torch.strided
        ):
            return None
        made = object.__new__(Arguments)  # at each evaluation: nothing is to be looked at later
        made.__dict__.update(
            args=args, argnums=0, domain=domain, leaves=args, others=(), context=()
        )
        return made

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors to differentiate with respect to."""
        if len(self.domain.active) == len(self.leaves):
            return list(self.leaves)
        return self.domain.select(self.leaves)

    def snapshot(self) -> Arguments:
        """The same arguments as they are now, whatever is written to them later."""
        leaves = tuple([v.clone() if isinstance(v, Tensor) else v for v in self.leaves])
        made = object.__new__(Arguments)  # at each evaluation: without the frozen constructor
        made.__dict__.update(self.__dict__)
        made.__dict__["leaves"] = leaves
        return made

    @cached_property
    def others(self) -> tuple[Tensor, ...]:
        """The tensors among all arguments that are not differentiated."""
        return tuple([leaf for leaf in self._rest[0] if isinstance(leaf, Tensor)])

    @cached_property
    def context(self) -> tuple[Any, ...]:
        """What comes with a call and is no tensor, and how the arguments are built."""
        leaves, built = self._rest
        return (built, *[None if isinstance(v, Tensor) else v for v in leaves]) if built else ()

    @cached_property
    def _rest(self) -> tuple[list[Any], str]:
        """The leaves that are not differentiated, and how the other arguments are built."""
        if len(self.args) == 1 and len(self.domain.active) == len(self.leaves):
            return [], ""
        chosen = (self.argnums,) if isinstance(self.argnums, int) else self.argnums
        rest = [arg for i, arg in enumerate(self.args) if i not in chosen]
        own = [
            v
            for v, leaf in zip(self.leaves, self.domain.leaves, strict=True)
            if not leaf.differentiable
        ]
        leaves, structure = Structure.of(rest)
        return [*leaves, *own], structure.signature

    def substitute(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Return all arguments with the chosen ones rebuilt from ``leaves``, the rest copied."""
        picked = self.domain.structure.rebuild(leaves)
        chosen = (self.argnums,) if isinstance(self.argnums, int) else self.argnums
        values = [picked] if isinstance(self.argnums, int) else list(picked)
        args = [None if i in chosen else _copied(arg) for i, arg in enumerate(self.args)]
        for position, value in zip(chosen, values, strict=True):
            args[position] = value
        return tuple(args)


def _copied(tree: Any) -> Any:
    """Copy the tensors of an argument, so that an in-place op in the map leaves it alone."""
    if isinstance(tree, Tensor):
        return tree.clone()
    leaves, structure = Structure.of(tree)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return copy.copy(tree)
    return structure.rebuild([v.clone() if isinstance(v, Tensor) else v for v in leaves])


def _kinds(values: Sequence[Any]) -> str:
    """What leaves are, for a message: dtypes of tensors, types of everything else."""
    kinds = [
        f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}"
        if isinstance(v, Tensor)
        else type(v).__name__
        for v in values
    ]
    return ", ".join(dict.fromkeys(kinds)) or "nothing"


def _normalise_argnums(
    args: tuple[Any, ...], argnums: int | Sequence[int]
) -> int | tuple[int, ...]:
    single = isinstance(argnums, int)
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    count = len(args)
    if not numbers or any(not isinstance(i, int) or not -count <= i < count for i in numbers):
        raise InputError(
            f"argnums expects positions of the {count} arguments given, got {argnums!r}; "
            "count from 0"
        )
    chosen = tuple(i % count for i in numbers)
    if len(set(chosen)) < len(chosen):
        raise InputError(f"argnums expects distinct positions, got {argnums!r}; name each once")
    return chosen[0] if single else chosen
