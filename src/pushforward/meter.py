"""What a computation costs, counted rather than timed: floating-point operations and bytes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pushforward.work import Op, op_of

# A byte moved takes about as long as this many operations on the machines that run networks.
OPERATIONS_PER_BYTE = 3.0


@dataclass(frozen=True)
class Cost:
    """What a computation does: operations, bytes written and held, and what each op does."""

    flops: int
    moved: int
    peak: int
    held: int
    ops: tuple[Op, ...] = field(default=(), repr=False)

    @property
    def work(self) -> float:
        """One number to compare by: operations, with bytes moved turned into operations."""
        return self.flops + OPERATIONS_PER_BYTE * self.moved


class _Meter(TorchDispatchMode):
    """Counts what each op below autograd does and what it allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.held = self.peak = 0
        self.ops: list[Op] = []
        self._known: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise the first op imports the compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads = _tensors((args, kwargs))
        self._known.update(_storage_key(tensor) for tensor in reads)
        result = func(*args, **kwargs)
        outs = _tensors(result)
        self.ops.append(self._counted(func, args, kwargs, reads, outs))
        for tensor in outs:
            self._take(tensor)
        return result

    def _counted(self, func: Any, args: Any, kwargs: Any, reads: Any, outs: Any) -> Op:
        if any(tensor.layout != torch.strided for tensor in (*reads, *outs)):
            return Op()
        looked_at = {_storage_key(tensor) for tensor in reads}
        only_looks = all(_storage_key(tensor) in looked_at for tensor in outs)
        if not outs or (only_looks and not func._schema.is_mutable):
            return Op()
        return op_of(func, args, kwargs, reads, outs)

    def _take(self, tensor: Tensor) -> None:
        key = _storage_key(tensor)
        if key in self._known:
            return
        self._known.add(key)
        size = tensor.untyped_storage().nbytes()
        self.moved += size
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(tensor.untyped_storage(), self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def measure(work: Callable[[], Any]) -> tuple[Any, Cost]:
    """Run ``work`` and count what it did; its result is held while ``held`` is read."""
    with _Meter() as meter:
        result = work()
    flops = sum(op.flops for op in meter.ops)
    return result, Cost(flops, meter.moved, meter.peak, meter.held, tuple(meter.ops))
