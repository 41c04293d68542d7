"""How long a planned evaluation takes, from what it does and what this device does in a second.

The device is timed once in a process, in a few milliseconds: small ops, which are all overhead,
products of matrices of several sizes, bytes moved, elements made by tanh and elements picked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from pushforward.boundary import Layout
from pushforward.planning import Recipe
from pushforward.program.tally import Op

# Sizes of the square matrices, and of the copies in elements, that the device is timed on.
_SIDES = (8, 32, 96, 192)
_LENGTHS = (1 << 12, 1 << 16, 1 << 19)
_ELEMENTS = 1 << 13
_TRIES = 6
# What one call spends outside of its ops, in ops: arguments are looked at, guards are checked.
_OPS_OF_A_CALL = 24
# An op of a backward pass, which autograd and perhaps vmap stand behind, in plain ops.
_OPS_OF_A_TAPED_OP = 4


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


@dataclass(frozen=True)
class Rates:
    """What a device does, in seconds.

    Attributes:
        op: of an op on next to nothing.
        products: (flops, seconds) of products of matrices, ascending, the op included.
        copies: (bytes, seconds) of elementwise ops, ascending, the op included.
        curved, picked: of an element made by tanh, and of one picked by its index.
    """

    op: float
    products: tuple[tuple[float, float], ...]
    copies: tuple[tuple[float, float], ...]
    curved: float
    picked: float

    def seconds(self, op: Op) -> float:
        """How long one op takes."""
        product = self._product(op.flops / max(op.pieces, 1)) * op.pieces if op.flops else 0.0
        copy = self._beyond(self.copies, op.moved)
        own = self.op * (_OPS_OF_A_TAPED_OP if op.taped else 1)
        return own + max(product, copy) + op.curved * self.curved + op.picked * self.picked

    def _product(self, flops: float) -> float:
        return self._beyond(self.products, flops)

    def _beyond(self, points: tuple[tuple[float, float], ...], amount: float) -> float:
        """Seconds beside the op itself, on the line through the points nearby."""
        spent = [(size, max(seconds - self.op, seconds / 16)) for size, seconds in points]
        return _interpolated(spent, amount)


def _interpolated(points: list[tuple[float, float]], amount: float) -> float:
    """On a line from the origin, then from point to point, and on at the last rate."""
    below = [(0.0, 0.0), *points]
    for (low, start), (high, stop) in pairwise(below):
        if amount <= high:
            return start + (stop - start) * (amount - low) / (high - low)
    size, seconds = points[-1]
    return seconds * amount / size


def predicted(ops: Iterable[Op], device: torch.device, dtype: torch.dtype, calls: int = 1) -> Prediction:
    """What ops do together, and how long they take with ``calls`` calls of the library around."""
    counted, known = list(ops), rates(device, dtype)
    overhead = calls * _OPS_OF_A_CALL * known.op
    return Prediction(
        sum(op.flops for op in counted),
        sum(op.moved for op in counted),
        len(counted),
        overhead + math.fsum(known.seconds(op) for op in counted),
    )


def of_recipe(recipe: Recipe, domain: Layout, codomain: Layout) -> Prediction | None:
    """What one planned evaluation takes: all entries, in the layout that they come in.

    None where nothing was counted: a plan through the tape whose passes are too small to matter.
    """
    evaluation = recipe.evaluation
    ops = _taped(recipe) if evaluation is None else list(evaluation.program.ops)
    if ops is None:
        return None
    split = recipe.candidate.split
    if split is not None:
        ops.append(_product_of_factors(split.width, domain, codomain))
    return predicted(ops, domain.device, domain.dtype)


def _taped(recipe: Recipe) -> list[Op] | None:
    """The ops of one evaluation through the tape: one forward run, and the passes."""
    one = recipe.candidate.cost
    graph = recipe.structure.graph
    if one is None and not graph.steps:
        return None
    if one is None:
        flops, moved, ops = (
            2 * sum(step.flops for step in graph.steps),
            2 * sum(step.moved for step in graph.steps),
            2 * len(graph.steps),
        )
    else:
        flops, moved, ops = one.flops, one.moved, one.ops
    passes = max(recipe.candidate.passes, 1)
    together = recipe.chunk if recipe.batched else 1
    chunks = -(-passes // max(together, 1))
    size = passes / chunks
    count = max(ops, 1)
    forward = [_share(flops / 2, moved, count, 1)] * (count // 2)
    return forward + [_share(flops, moved, count, size)] * (count * chunks)


def _share(flops: float, moved: float, ops: int, size: float) -> Op:
    """One of ``ops`` like ones that do some work together, ``size`` times."""
    return Op(int(flops * size / ops), 1, int(2 * moved * size / ops), taped=True)


def _product_of_factors(width: int, domain: Layout, codomain: Layout) -> Op:
    m, n, samples = codomain.size, domain.size, domain.batch or 1
    elements = samples * (m * width + width * n + m * n)
    return Op(2 * samples * m * width * n, samples, elements * domain.dtype.itemsize)


def rates(device: torch.device, dtype: torch.dtype = torch.float32) -> Rates:
    """What a device does in this dtype with the present number of threads; timed once."""
    return _rates(device.type, device.index, dtype, torch.get_num_threads())


@cache
def _rates(kind: str, index: int | None, dtype: torch.dtype, threads: int) -> Rates:
    place = {"device": torch.device(kind, index) if index is not None else kind, "dtype": dtype}
    clock = _Clock(torch.device(kind))
    with torch.no_grad():
        tiny = torch.ones(8, **place)
        products = [(2.0 * n**3, torch.ones(n, n, **place)) for n in _SIDES]
        copies = [(2.0 * n * dtype.itemsize, torch.ones(n, **place)) for n in _LENGTHS]
        many = torch.ones(_ELEMENTS, **place)
        order = torch.arange(_ELEMENTS, device=tiny.device).flip(0)
        op = clock(lambda: tiny + tiny)
        return Rates(
            op,
            tuple((flops, clock(lambda a=a: a @ a)) for flops, a in products),
            tuple((size, clock(lambda a=a: -a)) for size, a in copies),
            clock(lambda: many.tanh()) / _ELEMENTS,
            clock(lambda: many.index_select(0, order)) / _ELEMENTS,
        )


@dataclass(frozen=True)
class _Clock:
    device: torch.device

    def __call__(self, work: Callable[[], Tensor]) -> float:
        """Seconds of one call: of several tries the second least, since others only add to it."""
        once = min(self._timed(work, 1) for _ in range(2))
        repeats = max(1, min(32, int(1e-4 / max(once, 1e-7))))
        return sorted(self._timed(work, repeats) / repeats for _ in range(_TRIES))[1]

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
