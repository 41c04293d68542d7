"""What a model would return had its last places got no noise: clean twins of noisy tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

_MOVE_NAMES = (
    *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "squeeze"),
    *("unsqueeze", "t", "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims"),
    *("adjoint", "select", "narrow", "__getitem__", "unbind", "split", "split_with_sizes", "chunk"),
    *("tensor_split", "hsplit", "vsplit", "dsplit", "expand", "expand_as", "broadcast_to", "roll"),
    *("diagonal", "as_strided", "unfold", "contiguous", "clone", "detach", "to", "type", "type_as"),
    *("float", "double", "half", "bfloat16", "cpu", "cuda", "flip", "fliplr", "flipud", "rot90"),
    *(
        "index_select",
        "gather",
        "take",
        "take_along_dim",
        "masked_select",
        "cat",
        "concat",
        "stack",
    ),
    *("concatenate", "hstack", "vstack", "dstack", "column_stack", "row_stack", "tile", "repeat"),
    *("repeat_interleave", "pad", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
    *("atleast_1d", "atleast_2d", "atleast_3d", "__iter__", "alias", "broadcast_tensors"),
)
_MOVES = frozenset(
    [getattr(home, n) for home in (F, torch, Tensor) for n in _MOVE_NAMES if hasattr(home, n)]
    + [getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")]
)
_UNCOUNTED = -1
_WRITES = frozenset(
    ["__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "pow"))]
)
_RANDOM = ("dropout", "bernoulli", "normal", "uniform", "random", "exponential", "cauchy")


@dataclass(eq=False)
class _Memory:
    """What a noisy tensor and its views share: a clean root, and how often they were written to."""

    root: Tensor
    version: int


@dataclass(eq=False)
class _Twin:
    reference: weakref.ref
    clean: Tensor
    memory: _Memory


class Twins:
    """For each tensor that got noise, what it would be without.

    Moves, copies and writes in place are repeated for the twin, so that one is there for what they
    make of the tensor. Other arithmetic has no twin: it uses the tensor, which is hidden then.
    """

    def __init__(self) -> None:
        self._table: dict[int, _Twin] = {}

    def clear(self) -> None:
        self._table.clear()

    def note(self, noisy: Tensor, clean: Tensor) -> None:
        """Remember what stood in a place."""
        known = self.of(clean)
        root = _dense(clean if known is None else known)
        self._enter(noisy, root, _Memory(root, _version(noisy)))

    def of(self, tensor: Tensor) -> Tensor | None:
        """The twin, unless there is none or it was left behind."""
        twin = self._find(tensor)
        if twin is not None:
            return twin.clean if twin.clean.shape == tensor.shape else None
        base = tensor._base
        twin = None if base is None else self._find(base)
        if base is None or twin is None or not _same_layout(base, twin.clean):
            return None
        return _same_view(tensor, base, twin.clean)

    def run(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call a function of torch, and repeat it for twins where it moves or writes to them."""
        tensors = list(_tensors(args, kwargs)) if self._table else []
        twins = {id(t): twin for t in tensors if (twin := self._find(t)) is not None}
        if not twins:
            return func(*args, **kwargs)
        before = [(t, _version(t)) for t in tensors]
        result = func(*args, **kwargs)
        target = _target(func, args, kwargs)
        written = [t for t, v in before if _version(t) != v or (v == _UNCOUNTED and t is target)]
        if written:
            self._rewrite(func, args, kwargs, [twins.get(id(t)) for t in written], twins)
        elif func in _MOVES:
            clean = func(*_exchanged(args, twins), **_exchanged(kwargs, twins))
            self._moved(result, clean, [t for t in tensors if id(t) in twins])
        return result

    def overwrite(self, target: Tensor, noisy: Tensor, clean: Tensor) -> None:
        """Write to a tensor, to its twin something else."""
        twin = self._find(target)
        base = target._base
        if twin is None and base is None:
            target.copy_(noisy)
            self.note(target, clean)
            return
        if twin is None:
            twin = self._view_of(base, target)
        target.copy_(noisy)
        if twin is not None:
            self._repeat([twin.memory], {id(target): twin}, lambda views: views[0].copy_(clean))

    def _view_of(self, base: Any, target: Tensor) -> _Twin | None:
        """A twin for a view, and for what it is a view of."""
        if self._find(base) is None:
            self.note(base, base.clone())
        whole = self._find(base)
        if whole is None or not _same_layout(base, whole.clean):
            return None
        return self._enter(target, _same_view(target, base, whole.clean), whole.memory)

    def _enter(self, noisy: Tensor, clean: Tensor, memory: _Memory) -> _Twin:
        key, table = id(noisy), self._table
        twin = _Twin(weakref.ref(noisy, lambda _: table.pop(key, None)), clean, memory)
        table[key] = twin
        return twin

    def _find(self, tensor: Tensor) -> _Twin | None:
        """A twin that is up to date; a write that nobody saw leaves it behind."""
        twin = self._table.get(id(tensor))
        if twin is None or twin.reference() is not tensor:
            return None
        return twin if twin.memory.version == _version(tensor) else None

    def _moved(self, result: Any, clean: Any, sources: Sequence[Tensor]) -> None:
        """Enter what a move made, as views where it made views."""
        for noisy, twin in zip(pytree.tree_leaves(result), pytree.tree_leaves(clean), strict=True):
            if not isinstance(noisy, Tensor) or any(noisy is source for source in sources):
                continue
            source = next((s for s in sources if _share(s, noisy)), None)
            if source is None:
                root = _dense(twin)
                self._enter(noisy, root, _Memory(root, _version(noisy)))
                continue
            memory = self._table[id(source)].memory
            if _share(memory.root, twin):
                self._enter(noisy, twin, memory)

    def _rewrite(
        self,
        func: Callable,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        written: Sequence[_Twin | None],
        twins: dict[int, _Twin],
    ) -> None:
        """Repeat a write for the twins, unless that would write to something else once more."""
        memories = list({id(t.memory): t.memory for t in written if t is not None}.values())
        random = any(part in getattr(func, "__name__", "") for part in _RANDOM)
        if random or any(twin is None for twin in written):
            self._forget(memories)
            return
        # What is written from is used, with its noise; what is written to is its twin.
        targets = {key: twin for key, twin in twins.items() if twin.memory in memories}

        def repeat(exchange: Sequence[Tensor]) -> None:
            by_key = dict(zip(targets, exchange, strict=True))
            func(*_replaced(args, by_key), **_replaced(kwargs, by_key))

        self._repeat(memories, targets, repeat)

    def _repeat(
        self,
        memories: Sequence[_Memory],
        targets: dict[int, _Twin],
        write: Callable[[Sequence[Tensor]], Any],
    ) -> None:
        """Write to copies of the roots, so that nothing saved for gradients is lost."""
        fresh = {id(memory): memory.root.clone() for memory in memories}
        if not all(_same_layout(memory.root, fresh[id(memory)]) for memory in memories):
            self._forget(memories)
            return
        views = {key: _repeated(twin, fresh[id(twin.memory)]) for key, twin in targets.items()}
        write(list(views.values()))
        for key, twin in list(self._table.items()):
            if id(twin.memory) in fresh:
                twin.clean = views.get(key, _repeated(twin, fresh[id(twin.memory)]))
        for twin in targets.values():
            twin.memory.version = _version(twin.reference())
        for memory in memories:
            memory.root = fresh[id(memory)]

    def _forget(self, memories: Sequence[_Memory]) -> None:
        for key, twin in list(self._table.items()):
            if twin.memory in memories:
                self._table.pop(key, None)


def _version(tensor: Any) -> int:
    """How often a tensor was written to; inference mode does not count."""
    return _UNCOUNTED if tensor.is_inference() else tensor._version


def _target(func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a function writes to by its name, or is told to."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and (not name.endswith("__") or name in _WRITES)
    if in_place or kwargs.get("inplace"):
        return args[0] if args else kwargs.get("input")
    return kwargs.get("out")


def _dense(tensor: Tensor) -> Tensor:
    """The same numbers without gaps, so that a copy of them has the same layout."""
    return tensor if tensor.is_contiguous() else tensor.clone()


def _share(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _same_layout(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.stride() == other.stride()


def _repeated(twin: _Twin, root: Tensor) -> Tensor:
    return _same_view(twin.clean, twin.memory.root, root)


def _same_view(view: Tensor, base: Tensor, other: Tensor) -> Tensor:
    """The view of another base, of the same layout, that a tensor is of its own."""
    offset = view.storage_offset() - base.storage_offset()
    if _same_layout(view, base) and not offset:
        return other
    if view.numel() == base.numel() and view.is_contiguous() and base.is_contiguous():
        return other.view(view.shape)
    return other.as_strided(view.shape, view.stride(), other.storage_offset() + offset)


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (part for part in value if isinstance(part, Tensor))


def _exchanged(values: Any, twins: dict[int, _Twin]) -> Any:
    return _replaced(values, {key: twin.clean for key, twin in twins.items()})


def _replaced(values: Any, by_key: dict[int, Tensor]) -> Any:
    """Arguments with other tensors in place of some."""
    return pytree.tree_map(lambda leaf: by_key.get(id(leaf), leaf), values)
