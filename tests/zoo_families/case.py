"""What a case of the zoo is, and the list into which the families enter theirs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TAGS = {
    "batched": "dimension 0 of the only input and of the output holds independent samples",
    "coupled": "dimension 0 looks like a batch, but its samples influence each other",
    "square": "as many outputs as inputs",
    "symmetric": "the Jacobian equals its transpose",
    "tree": "pytrees, several arguments or integer leaves",
    "complex": "complex numbers go in or come out",
    "random": "draws random numbers",
    "stateful": "updates its own buffers",
    "surrogate": "autograd's derivative is defined on purpose to differ from the limit",
    "empty": "no inputs or no outputs",
    "network": "an nn.Module with parameters",
}


@dataclass(frozen=True)
class Problem:
    """A function at a point, and what is known about its Jacobian there.

    ``jacobian()`` is the closed form and ``pattern()`` the exact nonzeros, both (m, n), where they
    are known. ``reference`` is the same map out of simpler operations, for those whose own second
    derivative PyTorch lacks. ``parameters`` are the tensors that a training loss would reach.
    """

    f: Callable[..., Any]
    args: tuple[Any, ...]
    argnums: int | tuple[int, ...] = 0
    jacobian: Callable[[], Tensor] | None = None
    pattern: Callable[[], np.ndarray] | None = None
    reference: Callable[..., Any] | None = None
    parameters: tuple[Tensor, ...] = ()

    @property
    def x(self) -> Any:
        """The first argument."""
        return self.args[0]

    @property
    def oracle_map(self) -> Callable[..., Any]:
        """What the oracles differentiate."""
        return self.reference or self.f


@dataclass(frozen=True)
class Case:
    """A name, a recipe that makes the problem afresh, and tags out of ``TAGS``."""

    name: str
    make: Callable[[], Problem]
    tags: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return self.name


CASES: list[Case] = []


def case(name: str, *tags: str) -> Callable[[Callable[[], Problem]], Callable[[], Problem]]:
    """Enter a recipe into the zoo."""
    unknown = set(tags) - set(TAGS)
    if unknown or any(known.name == name for known in CASES):
        raise ValueError(f"zoo case {name!r}: unknown tags {sorted(unknown)} or a name used twice")

    def enter(make: Callable[[], Problem]) -> Callable[[], Problem]:
        CASES.append(Case(name, make, frozenset(tags)))
        return make

    return enter


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Uniform numbers in (0, 1) that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def module(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A float64 module whose weights depend on the seed alone; the global state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double()


def of_module(build: Callable[[], nn.Module], x: Tensor, train: bool = False) -> Problem:
    """The problem of a network at ``x``."""
    net = module(build).train(train)
    return Problem(net, (x,), parameters=tuple(net.parameters()))


def block_diagonal(blocks: Tensor) -> Tensor:
    """(B m, B n) out of (B, m, n): the Jacobian of a batch whose samples do not meet."""
    return torch.block_diag(*blocks)


def positions(movement: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """(m, n) with a one where a map that only moves entries takes each of them from."""
    count = torch.Size(shape).numel()
    taken = movement(torch.arange(count, dtype=torch.float64).reshape(shape)).reshape(-1).long()
    return torch.eye(count, dtype=torch.float64)[taken]
