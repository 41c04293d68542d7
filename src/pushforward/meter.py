"""What a computation costs, counted rather than timed: floating-point operations and bytes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# A byte moved takes about as long as this many operations on the machines that run networks.
OPERATIONS_PER_BYTE = 3.0


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, bytes written, the most bytes held at once, and calls of ops."""

    flops: int
    moved: int
    peak: int
    held: int
    ops: int = 0

    @property
    def work(self) -> float:
        """One number to compare by: operations, with bytes moved turned into operations."""
        return self.flops + OPERATIONS_PER_BYTE * self.moved


class _Meter(TorchDispatchMode):
    """Counts what each op below autograd does and what it allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.moved = self.held = self.peak = self.ops = 0
        self._known: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise the first op imports the compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._known.add(_storage_key(tensor))
        result = func(*args, **kwargs)
        self.flops += flops_of(func, args, kwargs, result)
        self.ops += 1
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._take(tensor)
        return result

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


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """The floating-point operations of a product of matrices or a convolution; 0 for other ops."""
    count = flop_registry.get(func._overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def measure(work: Callable[[], Any]) -> tuple[Any, Cost]:
    """Run ``work`` and count what it did; its result is held while ``held`` is read."""
    with _Meter() as meter:
        result = work()
    return result, Cost(meter.flops, meter.moved, meter.peak, meter.held, meter.ops)
