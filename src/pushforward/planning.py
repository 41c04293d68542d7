"""The choice: ask the strategies, take the cheapest, size its chunks, remember it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from pushforward.checks import check_batching, check_samples, why_not_forward
from pushforward.errors import MemoryBudgetError, PlanError
from pushforward.problems import Problem
from pushforward.strategies import STRATEGIES, Candidate

# Ops that, whatever constants they hold, leave samples apart where they did before.
_KEEPING = (
    "Add Sub Mul Div Neg Clone ToCopy Tanh Relu Sigmoid Gelu Silu Elu Softplus LeakyRelu Hardtanh"
    " Threshold Exp Log Sin Cos Sqrt Rsqrt Pow Abs Erf Clamp Convolution MaxPool2DWithIndices"
    " AvgPool2D AdaptiveAvgPool2D NativeLayerNorm NativeGroupNorm NativeBatchNorm Addmm View"
    " UnsafeView ReshapeAlias T Transpose Permute Squeeze Unsqueeze Expand Alias Unbind Split Slice"
    " Select Cat Stack"
)
_KEEPS_APART = frozenset(f"{op}Backward{i}" for op in _KEEPING.split() for i in range(5))
# How many plans are remembered for one function: one for each signature.
_REMEMBERED = 32
# What one chunk of passes may hold when no budget is given: large enough to keep the cores busy.
_DEFAULT_CHUNK_BYTES = 1 << 28


@dataclass(frozen=True)
class Recipe:
    """A choice, free of the function it was made for."""

    candidate: Candidate
    chunk: int
    rejected: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    batched: bool
    uses: Iterator[int] = field(default_factory=lambda: count(1), compare=False, repr=False)


def choose(problem: Problem, wanted: str) -> Recipe:
    """Check the map, ask the strategies, take the cheapest and size its chunks."""
    notes = check_samples(problem) + check_batching(problem)
    asked = _asked(problem, wanted)
    candidates = [c for c in asked.values() if isinstance(c, Candidate)]
    if not candidates:
        reasons = "; ".join(f"{name}: {why}" for name, why in asked.items())
        raise PlanError(
            f"expected a strategy that applies to this map, got {wanted!r} ({reasons}); "
            'use plan="auto", or "loop", which always applies'
        )
    best = min(candidates, key=lambda candidate: candidate.work)
    rejected = [(name, _why_rejected(c, best)) for name, c in asked.items() if c is not best]
    batched = problem.linear.batched and best.strategy != "loop"
    return Recipe(best, chunk_size(problem, best), tuple(rejected), notes, batched)


def check_again(problem: Problem, recipe: Recipe) -> None:
    """Verify a plan that is used again: now and then, or always where constants may couple samples.

    The first uses are checked more densely than later ones: number 1, 4, 16, 64 and so on.

    Raises:
        CouplingError: samples influence each other at this point.
    """
    use = next(recipe.uses)
    census = problem.linear.tape.census
    due = use & (use - 1) == 0 and use.bit_length() % 2 == 1
    if due or census.custom or not census.ops <= _KEEPS_APART:
        check_samples(problem)


def _asked(problem: Problem, wanted: str) -> dict[str, Candidate | str]:
    if wanted == "auto":
        return {name: strategy(problem) for name, strategy in STRATEGIES.items()}
    if wanted not in STRATEGIES:
        raise PlanError(
            f'plan= expects "auto", a Plan or one of {", ".join(STRATEGIES)}, got {wanted!r}'
        )
    if wanted == "forward" and problem.quantity == "jacobian":
        refusal = why_not_forward(problem)
        return {wanted: refusal or Candidate(wanted, problem.n, 0, problem.n)}
    return {wanted: STRATEGIES[wanted](problem)}


def _why_rejected(candidate: Candidate | str, best: Candidate) -> str:
    if isinstance(candidate, str):
        return candidate
    ratio = candidate.work / best.work if best.work else 1.0
    return f"{candidate.passes} passes, {ratio:.2g}x the work"


def chunk_size(problem: Problem, candidate: Candidate) -> int:
    """How many passes go together, so that a chunk keeps to the budget."""
    passes = max(candidate.passes, 1)
    if problem.is_small:
        return passes
    cost = problem.push_cost if candidate.strategy == "forward" else problem.pull_cost
    side = problem.m + problem.n
    one = cost.peak + side * problem.samples * problem.linear.tape.domain.dtype.itemsize
    if problem.memory is None:
        return max(1, min(passes, _DEFAULT_CHUNK_BYTES // max(one, 1)))
    held = problem.recorded.held if problem.recorded else 0
    room = problem.memory - held
    if room < one:
        raise MemoryBudgetError(
            f"memory={problem.memory} bytes expects at least {held + one}: {held} to hold the "
            f"graph and {one} for a single pass; raise it, or take fewer samples at a time"
        )
    # Half of the room for the passes of a chunk, the other half for what is made of them.
    return max(1, min(passes, room // (2 * max(one, 1))))


def blocks(passes: int, chunk: int) -> Sequence[tuple[int, int]]:
    """Cut ``passes`` into ranges of at most ``chunk``."""
    return [(start, min(start + chunk, passes)) for start in range(0, passes, max(chunk, 1))]


_CACHE: MutableMapping[Any, dict[Any, Recipe]] = weakref.WeakKeyDictionary()


def cached_recipe(function: Callable[..., Any], key: Any) -> Recipe | None:
    """The recipe made earlier for the same function under the same circumstances."""
    try:
        return _CACHE.get(function, {}).get(key)
    except TypeError:  # not hashable, or no weak references
        return None


def store_recipe(function: Callable[..., Any], key: Any, recipe: Recipe) -> None:
    """Remember a recipe for as long as the function lives."""
    try:
        recipes = _CACHE.setdefault(function, {})
        if len(recipes) >= _REMEMBERED:
            del recipes[next(iter(recipes))]
        recipes[key] = recipe
    except TypeError:
        return
