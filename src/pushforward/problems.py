"""What there is to plan, and what its passes cost, counted on one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pushforward.boundary import Layout
from pushforward.errors import InputError
from pushforward.meter import Cost, measure
from pushforward.passes import Linearization, random_vectors
from pushforward.structure.detection import NOTHING, Structure

QUANTITIES = ("jacobian", "hessian", "diagonal")

# Below this many entries the choice of a mode cannot matter as much as measuring it would cost.
_SMALL = 1 << 14


@dataclass(frozen=True)
class Problem:
    """What there is to plan: a recorded map, the quantity wanted, the budget and the structure.

    ``weighed`` says that costs are to be counted however small the map is.
    """

    linear: Linearization
    quantity: str
    memory: int | None
    recorded: Cost | None
    structure: Structure = NOTHING
    weighed: bool = False

    @property
    def m(self) -> int:
        return self.linear.tape.codomain.size

    @property
    def n(self) -> int:
        return self.linear.tape.domain.size

    @property
    def samples(self) -> int:
        batch = self.linear.tape.domain.batch
        return 1 if batch is None else batch

    @property
    def entries(self) -> int:
        return self.m * self.n * self.samples

    @property
    def entry_bytes(self) -> int:
        return self.entries * self.linear.tape.domain.dtype.itemsize

    @property
    def is_small(self) -> bool:
        return self.entries <= _SMALL and self.memory is None and not self.weighed

    @cached_property
    def pull_cost(self) -> Cost:
        """What one backward pass costs, counted on one."""
        u = self.random(self.linear.tape.codomain, 1)[0]
        return _cost_of(lambda: self.linear.pull(u))

    @cached_property
    def push_cost(self) -> Cost:
        """What one transposed backward pass costs, counted on one."""
        v = self.random(self.linear.tape.domain, 1)[0]
        self.linear.push(v)
        return _cost_of(lambda: self.linear.push(v))

    def random(self, side: Layout, count: int) -> tuple[Tensor, ...]:
        """Vectors to try things on, ``(1, [B,] size)`` each, the same ones every time."""
        return random_vectors(side, count)


def _cost_of(product: Callable[[], Any]) -> Cost:
    with torch.no_grad():
        return measure(product)[1]


def check_quantity(quantity: str) -> None:
    if quantity not in QUANTITIES:
        raise InputError(f"quantity expects one of {', '.join(QUANTITIES)}, got {quantity!r}")


def check_memory(memory: int | None) -> None:
    if memory is not None and (not isinstance(memory, int) or memory <= 0):
        raise InputError(f"memory expects a positive whole number of bytes, got {memory!r}")
