"""What the structure engine detects, against the Jacobians that autograd computes.

    detect(f, *args, argnums=0)       the structure found, from one run
    exact(f, *args)                   asserts: every entry that is detected is met, and none else
    sound(f, *args)                   asserts: no entry is missed
    overs(f, *args)                   how many entries are detected and never met
    followed(f, x)                    the pattern of the ops themselves, without a tape

Where an entry may vanish by chance, several points are tried.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oracles import loop_matrix
from pushforward.boundary import Arguments
from pushforward.pattern import Pattern
from pushforward.structure.detection import Detector, Structure
from pushforward.structure.follow import Follower
from pushforward.tape import record, record_gradient

# Where an entry vanishes by chance at one point, it does not at another.
_POINTS = 3


def detect(f: Callable, *args: Any, argnums: Any = 0, hessian: bool = False) -> Structure:
    """The structure of the Jacobian of ``f``, or of its Hessian, with every scalar followed."""
    detector = Detector(fine=True)
    recorded = record_gradient if hessian else record
    tape = recorded(f, Arguments.of(args, argnums, None), None, watch=detector)
    return detector.structure(tape.outputs, tape.domain, tape.codomain)


def exact(f: Callable, *args: Any, argnums: Any = 0, at_point: bool = False) -> Structure:
    """Assert that the pattern is the set of entries that are met, and return the structure.

    ``at_point`` says whether the pattern is expected to hold at this point only.
    """
    structure, found, met = _compared(f, args, argnums, at_point)
    assert not (found & ~met).any(), _difference("too much", found & ~met)
    assert structure.dense_ops == ()
    return structure


def sound(f: Callable, *args: Any, argnums: Any = 0, at_point: bool = False) -> Structure:
    """Assert that no entry is missed, and return the structure."""
    return _compared(f, args, argnums, at_point)[0]


def overs(f: Callable, *args: Any, argnums: Any = 0, at_point: bool = False) -> int:
    """Assert that no entry is missed, and count those that are detected and never met."""
    _, found, met = _compared(f, args, argnums, at_point)
    return int((found & ~met).sum())


def followed(f: Callable, x: Tensor) -> np.ndarray:
    """(m, n): what one run depends on, where no op is replaced by others."""
    x = x.detach().clone().requires_grad_()
    follower = Follower([x], [np.arange(x.numel()).reshape(x.shape)], x.numel())
    with follower.following():
        y = f(x)
    assert follower.failure is None, follower.failure
    assert not follower.dense_ops
    starts, members = follower.sets.members(follower.numbers(y).reshape(-1))
    return Pattern((y.numel(), x.numel()), starts, members).todense()


def _compared(
    f: Callable, args: tuple, argnums: Any, at_point: bool
) -> tuple[Structure, np.ndarray, np.ndarray]:
    structure = detect(f, *args, argnums=argnums)
    assert structure.pattern is not None, structure.note
    found = structure.pattern.todense()
    met = np.zeros_like(found)
    for point in _points(args, argnums, 1 if at_point else _POINTS):
        met |= _nonzero(f, point, argnums)
        assert not (met & ~found).any(), _difference("missed", met & ~found)
    assert bool(structure.guards.at_point) == at_point, structure.guards.at_point
    return structure, found, met


def _points(args: tuple, argnums: Any, count: int) -> list[tuple]:
    """The arguments given, and others of the same shapes with new values where differentiated."""
    numbers = [argnums] if isinstance(argnums, int) else list(argnums)
    points = [args]
    for seed in range(1, count):
        generator = torch.Generator().manual_seed(seed)
        points.append(
            tuple(_moved(arg, generator) if i in numbers else arg for i, arg in enumerate(args))
        )
    return points


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + torch.randn(x.shape, dtype=x.dtype, generator=generator)


def _nonzero(f: Callable, args: tuple, argnums: Any) -> np.ndarray:
    matrix = loop_matrix(f, *args, argnums=argnums)
    return (matrix != 0).numpy()


def _difference(what: str, entries: np.ndarray) -> str:
    rows, columns = np.nonzero(entries)
    places = ", ".join(f"({r}, {c})" for r, c in list(zip(rows, columns, strict=True))[:8])
    return f"{what}: {len(rows)} of {entries.size} entries, at {places}"


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def spd(n: int, *batch: int, seed: int = 0) -> Tensor:
    """Symmetric positive definite matrices."""
    root = draw(*batch, n, n, seed=seed)
    return root @ root.mT + n * torch.eye(n, dtype=torch.float64)
