"""What stands beside a storage: a set for each element, read and written through a geometry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pushforward.structure.rules.registry import Numbers
from pushforward.structure.sets import Sets


@dataclass
class Shadow:
    """The sets of a storage's elements, counted in elements of ``unit`` bytes.

    ``numbers`` is a plain number where all elements are alike. ``sources`` are the constants from
    outside that the values were made of. ``hidden`` says that autograd does not know of the
    storage, and yet derivatives pass: a conjugate or negative, looked at lazily so far, is copied
    below it. ``sunk`` says which elements are minus infinity whatever the inputs are, derivatives
    or not.
    """

    numbers: np.ndarray | int
    unit: int
    sources: frozenset[int] = frozenset()
    name: int = 0
    version: int = 0
    hidden: bool = False
    sunk: np.ndarray | None = None
    alive: Any = None

    def spread(self, count: int) -> np.ndarray:
        """The numbers as an array that can be written to."""
        if isinstance(self.numbers, int):
            self.numbers = np.full(count, self.numbers, np.int32)
        return self.numbers

    def refine(self, size: int) -> None:
        """Count in elements of ``size`` bytes from now on, where that is finer."""
        if size < self.unit:
            if not isinstance(self.numbers, int):
                self.numbers = np.repeat(self.numbers, self.unit // size)
            self.unit, self.sunk = size, None


def look(shadow: Shadow, tensor: Tensor, sets: Sets) -> Numbers:
    """Read the numbers of a storage through the geometry of a tensor."""
    shape = tuple(tensor.shape)
    if isinstance(shadow.numbers, int):
        return np.broadcast_to(np.int32(shadow.numbers), shape)
    numbers, size = shadow.numbers, tensor.element_size()
    if size < shadow.unit:
        numbers = np.repeat(numbers, shadow.unit // size)
    elif size > shadow.unit:
        ratio = size // shadow.unit
        numbers = sets.unite_axis(numbers[: len(numbers) // ratio * ratio].reshape(-1, ratio))
    return _through(numbers, tensor)


def _through(numbers: np.ndarray, tensor: Tensor) -> np.ndarray:
    """An array over a storage, seen with a tensor's offset, shape and strides."""
    if tensor.numel() == 0:
        return np.zeros(tuple(tensor.shape), numbers.dtype)
    item = numbers.itemsize
    strides = [stride * item for stride in tensor.stride()]
    start = numbers[tensor.storage_offset() :]
    return np.lib.stride_tricks.as_strided(start, tuple(tensor.shape), strides)


def assign(shadow: np.ndarray, unit: int, tensor: Tensor, numbers: Numbers) -> None:
    """Write numbers into the array of a storage, counted in parts of a tensor's elements."""
    size = tensor.element_size()
    if tensor.numel() == 0:
        return
    if size == unit:
        _through(shadow, tensor)[...] = numbers
        return
    ratio = size // unit
    places = _through(np.arange(len(shadow) // ratio), tensor)
    for part in range(ratio):
        shadow[places * ratio + part] = numbers


def look_sunk(shadow: Shadow, tensor: Tensor) -> np.ndarray | None:
    """Which elements of a tensor are sunk; None where none is known to be."""
    if shadow.sunk is None or tensor.element_size() != shadow.unit:
        return None
    return _through(shadow.sunk, tensor)


def sink(shadow: Shadow, tensor: Tensor, mask: np.ndarray) -> None:
    """Note which elements of a tensor that was just written are sunk."""
    if tensor.element_size() == shadow.unit and mask.any():
        count = tensor.untyped_storage().nbytes() // shadow.unit
        shadow.sunk = np.zeros(count, bool)
        assign(shadow.sunk, shadow.unit, tensor, mask)
