"""What the laws have in common: problems under one draw of random numbers, and comparisons."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pushforward as pf
from oracles import as_real, leaves, loop_dense, loop_jacobian
from zoo import Problem

EXACT = {"rtol": 1e-10, "atol": 1e-10}
# What a strategy says, asked for by name, where it is none for a map.
REFUSED = re.compile("applies to this map|cannot be told to be")


def drawn(compute: Callable[[], Any]) -> Any:
    """Compute under a fixed state of the global generator, so that noise is the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(17)
        return compute()


def jacobian(problem: Problem, **options: Any) -> pf.Jacobian:
    """The library's Jacobian of a problem."""
    return drawn(lambda: pf.jacobian(problem.f, *problem.args, argnums=problem.argnums, **options))


def oracle(problem: Problem) -> Any:
    """The Jacobian by the row loop, nested like ``dense()``."""
    return drawn(lambda: _oracle(problem))


def _oracle(problem: Problem) -> Any:
    if isinstance(problem.x, Tensor) and problem.x.is_complex():
        return loop_jacobian(as_real(problem.oracle_map), torch.view_as_real(problem.x))
    return loop_dense(problem.oracle_map, *problem.args, argnums=problem.argnums)


def flat_oracle(problem: Problem, shape: tuple[int, int]) -> Tensor:
    """The Jacobian by the row loop as a matrix, for maps between single tensors."""
    return oracle(problem).reshape(shape)


def assert_same(actual: Any, expected: Any, **tolerance: float) -> None:
    """Two nests with equal leaves; None stands for None."""
    ours, theirs = leaves(actual), leaves(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.detach(), b.detach(), **(tolerance or EXACT))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)
