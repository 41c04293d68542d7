"""How long a planned evaluation takes, from what it does and what this device does in a second.

A device is timed once in a process for each dtype and number of threads, each kind of work when it
is first met: small ops, which are all overhead, products of matrices and copies of several sizes,
convolutions of few and of many channels, elements made by tanh and elements picked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pushforward.boundary import Layout
from pushforward.planning import Recipe
from pushforward.work import Op

aten = torch.ops.aten

# Sizes of the square matrices, and of the copies in elements, that a device is timed on.
_SIDES = (8, 32, 96, 192)
_LENGTHS = (1 << 12, 1 << 16, 1 << 19)
# Copies longer than these, in bytes, meet memory that was not touched before.
_LONG = 1 << 23
_ELEMENTS = 1 << 13
_TRIES = 6
# Seconds; what takes longer is tried half as often.
_SLOW = 1e-3
# What one call spends outside of its ops, in ops: arguments are looked at, guards are checked.
_OPS_OF_A_CALL, _OPS_OF_AN_EXTERNAL = 20, 6
# What an op of a backward pass spends on autograd and vmap, and a convolution on its layouts.
_OPS_OF_A_TAPED_OP, _OPS_OF_A_CONVOLUTION = 8, 16
# How much longer than the least of several tries a call usually takes.
_TYPICAL = 1.2
# Fewer channels than these leave the units of a processor empty.
_FEW_CHANNELS = 16

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Prediction:
    """What one planned evaluation does, and how long that should take here.

    Attributes:
        flops: of products of matrices and convolutions.
        bytes: read and written.
        ops: how many operations of torch run.
        seconds: predicted for this device and number of threads.
    """

    flops: int
    bytes: int
    ops: int
    seconds: float


def prediction(ops: Sequence[Op], domain: Layout, externals: int = 0) -> Prediction:
    """What some ops take together, in one call that reads so many tensors from outside."""
    device = device_of(domain)
    around = device.op * (_OPS_OF_A_CALL + _OPS_OF_AN_EXTERNAL * externals)
    return Prediction(
        sum(op.flops * op.repeats for op in ops),
        sum(op.moved * op.repeats for op in ops),
        sum(op.repeats for op in ops),
        _TYPICAL * (around + math.fsum(device.seconds(op) * op.repeats for op in ops)),
    )


def evaluation_ops(recipe: Recipe, domain: Layout, codomain: Layout) -> tuple[Op, ...] | None:
    """The ops of one planned evaluation: all entries, in the layout that they come in.

    None where nothing was counted: a plan through the tape whose passes are too small to matter.
    """
    evaluation = recipe.evaluation
    ops = _taped(recipe) if evaluation is None else evaluation.program.ops
    split = recipe.candidate.split
    if ops is None or split is None:
        return ops
    return (*ops, _product_of_factors(split.width, domain, codomain))


def _taped(recipe: Recipe) -> tuple[Op, ...] | None:
    """One forward run, which is about half of a pass, and the passes in their chunks."""
    cost = recipe.candidate.cost
    if cost is None or not cost.ops:
        return None
    passes = max(recipe.candidate.passes, 1)
    chunks = -(-passes // max(recipe.chunk, 1)) if recipe.batched else passes
    forward = [op.times(1) for op in cost.ops[::2]]
    return (*forward, *[op.times(passes / chunks, chunks) for op in cost.ops])


def _product_of_factors(width: int, domain: Layout, codomain: Layout) -> Op:
    m, n, samples = codomain.size, domain.size, domain.batch or 1
    elements = samples * (m * width + width * n + m * n)
    return Op(2 * samples * m * width * n, samples, moved=elements * domain.dtype.itemsize)


def device_of(side: Layout) -> Device:
    """The device of a side of a map, in its dtype and with the present number of threads."""
    return _device(str(side.device), side.dtype, torch.get_num_threads())


@cache
def _device(name: str, dtype: torch.dtype, threads: int) -> Device:
    return Device(torch.device(name), dtype)


@dataclass(frozen=True)
class Device:
    """What a device does, timed when it is first asked for; all in seconds."""

    device: torch.device
    dtype: torch.dtype

    def seconds(self, op: Op) -> float:
        """How long one op takes."""
        own = self.op * (_OPS_OF_A_TAPED_OP if op.taped else 1)
        arithmetic, copied = self._arithmetic(op), self._copied(op.moved)
        # A convolution reorders what it reads and writes before it begins, and afterwards.
        work = arithmetic + 2 * copied if op.channels else max(arithmetic, copied)
        return own + work + self._apiece(op)

    def _arithmetic(self, op: Op) -> float:
        if not op.flops:
            return 0.0
        if op.channels:
            rate = self._convolution(op.channels >= _FEW_CHANNELS, op.transposed)
            return self.op * _OPS_OF_A_CONVOLUTION + op.flops * op.padding * rate
        return op.pieces * _on_a_line(self.products, op.flops / op.pieces)

    def _copied(self, moved: int) -> float:
        if not moved:
            return 0.0
        return _on_a_line(self.copies if moved <= _LONG else self.long_copies, moved)

    def _apiece(self, op: Op) -> float:
        curved = op.curved * self.curved if op.curved else 0.0
        return curved + (op.picked * self.picked if op.picked else 0.0)

    @cached_property
    def op(self) -> float:
        """An op on next to nothing."""
        tiny = self._ones(8)
        return self._clock(lambda: tiny + tiny)

    @cached_property
    def products(self) -> Points:
        """(flops, seconds) of products of matrices, ascending."""
        made = [(n, self._ones(n, n)) for n in _SIDES]
        return self._beyond([(2.0 * n**3, self._clock(lambda a=a: a @ a)) for n, a in made])

    @cached_property
    def copies(self) -> Points:
        """(bytes, seconds) of elementwise ops, ascending."""
        made = [(2.0 * n * self.dtype.itemsize, self._ones(n)) for n in _LENGTHS]
        return self._beyond([(size, self._clock(lambda a=a: -a)) for size, a in made])

    @cached_property
    def long_copies(self) -> Points:
        """The same for tensors that do not fit in what is at hand."""
        long = self._ones(2 * _LONG // self.dtype.itemsize)
        return (*self.copies[:-1], (4.0 * _LONG, self._clock(lambda: -long)))

    @cached_property
    def curved(self) -> float:
        """An element made by tanh."""
        many = self._ones(_ELEMENTS)
        return self._clock(many.tanh) / _ELEMENTS

    @cached_property
    def picked(self) -> float:
        """An element picked by its index."""
        many = self._ones(_ELEMENTS)
        order = torch.arange(_ELEMENTS, device=self.device).flip(0)
        return self._clock(lambda: many.index_select(0, order)) / _ELEMENTS

    @cached_property
    def _convolutions(self) -> dict[tuple[bool, bool], float]:
        return {}

    def _convolution(self, many: bool, transposed: bool) -> float:
        """A flop of a convolution of few or many channels, forwards or backwards."""
        if (many, transposed) not in self._convolutions:
            self._convolutions[many, transposed] = self._time_convolution(many, transposed)
        return self._convolutions[many, transposed]

    def _time_convolution(self, many: bool, transposed: bool) -> float:
        samples, channels, side = (4, 32, 16) if many else (16, 8, 32)
        x, weight = self._ones(samples, channels, side, side), self._ones(channels, channels, 4, 4)
        y = torch.conv2d(x, weight, stride=2, padding=1)
        how: tuple[Any, ...] = (None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1)
        wanted = [True, False, False]

        def work() -> Tensor:
            if transposed:
                return aten.convolution_backward(y, x, weight, *how, wanted)[0]
            return torch.conv2d(x, weight, stride=2, padding=1)

        return self._clock(work) / (2 * y.numel() * channels * 16)

    def _ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, device=self.device, dtype=self.dtype)

    def _beyond(self, points: Sequence[tuple[float, float]]) -> Points:
        """Without what any op takes; a sixteenth is left where that is nearly all."""
        return tuple((size, max(spent - self.op, spent / 16)) for size, spent in points)

    def _clock(self, work: Callable[[], Tensor]) -> float:
        """Seconds of one call: the least of several tries, as others only add to it."""
        with torch.no_grad():
            once = min(self._timed(work, 1) for _ in range(2))
            repeats = max(1, min(32, int(1e-4 / max(once, 1e-7))))
            tries = _TRIES if once < _SLOW else _TRIES // 2
            return min(self._timed(work, repeats) / repeats for _ in range(tries))

    def _timed(self, work: Callable[[], Tensor], repeats: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type in ("cuda", "mps", "xpu"):
            getattr(torch, self.device.type).synchronize()


def _on_a_line(points: Points, amount: float) -> float:
    """On the line from nothing, then from point to point, and on at the last rate."""
    for (low, start), (high, stop) in pairwise(((0.0, 0.0), *points)):
        if amount <= high:
            return start + (stop - start) * (amount - low) / (high - low)
    size, seconds = points[-1]
    return seconds * amount / size
