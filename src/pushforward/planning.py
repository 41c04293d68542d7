"""The choice: ask the strategies, take the cheapest, verify it, size its chunks, remember it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from pushforward.checks import check_batching, check_samples, why_not_forward
from pushforward.circumstances import Circumstances
from pushforward.errors import MemoryBudgetError, PlanError
from pushforward.evaluations import Evaluation
from pushforward.problems import Problem
from pushforward.strategies import PLAIN, STRATEGIES, WORTHWHILE, Candidate
from pushforward.structure.detection import NOTHING, Structure

# Ops that, whatever constants they hold, leave samples apart where they did before.
_KEEPING = (
    "Add Sub Mul Div Neg Clone ToCopy Tanh Relu Sigmoid Gelu Silu Elu Softplus LeakyRelu Hardtanh"
    " Threshold Exp Log Sin Cos Sqrt Rsqrt Pow Abs Erf Clamp Convolution MaxPool2DWithIndices"
    " AvgPool2D AdaptiveAvgPool2D NativeLayerNorm NativeGroupNorm NativeBatchNorm Addmm View"
    " UnsafeView ReshapeAlias T Transpose Permute Squeeze Unsqueeze Expand Alias Unbind Split Slice"
    " Select Cat Stack"
)
_KEEPS_APART = frozenset(f"{op}Backward{i}" for op in _KEEPING.split() for i in range(5))
# What one chunk of passes may hold when no budget is given: large enough to keep the cores busy.
_DEFAULT_CHUNK_BYTES = 1 << 28


@dataclass(frozen=True)
class Recipe:
    """A choice, free of the function it was made for.

    Attributes:
        candidate: the strategy and its scheme; ``chunk`` passes go together.
        rejected: the other strategies, and why they were not taken.
        notes: what was checked, and what was found doing so.
        batched: whether several vectors go through one backward pass.
        structure: what is known of the Jacobian.
        circumstances: what all this relies on; None where only the tape was looked at.
        evaluation: the flat program of the entries, where there is one.
        ops: the nodes of the graph that was planned for.
    """

    candidate: Candidate
    chunk: int
    rejected: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    batched: bool
    structure: Structure = NOTHING
    circumstances: Circumstances | None = None
    evaluation: Evaluation | None = None
    ops: frozenset[str] = frozenset()
    uses: Iterator[int] = field(default_factory=lambda: count(1), compare=False, repr=False)

    @property
    def is_followed(self) -> bool:
        """Whether all that the function reads is known, so that a change would be noticed."""
        return self.circumstances is not None and self.circumstances.state.known


def choose(problem: Problem, wanted: str) -> Recipe:
    """Check the map, ask the strategies, take the cheapest and size its chunks."""
    if wanted == "split":  # asked for by name it is looked for in small maps too
        problem = replace(problem, weighed=True)
    notes = check_samples(problem) + check_batching(problem)
    asked = _asked(problem, wanted)
    asked = {name: _within_budget(problem, c) for name, c in asked.items()}
    candidates = [c for c in asked.values() if isinstance(c, Candidate)]
    if not candidates:
        reasons = "; ".join(f"{name}: {why}" for name, why in asked.items())
        raise PlanError(
            f"expected a strategy that applies to this map, got {wanted!r} ({reasons}); "
            'use plan="auto", or "loop", which always applies'
        )
    best = _best(candidates)
    rejected = [(name, _why_rejected(c, best)) for name, c in asked.items() if c is not best]
    batched = problem.linear.batched and best.strategy != "loop"
    chunk = chunk_size(problem, best)
    return Recipe(best, chunk, tuple(rejected), notes, batched, problem.structure)


def _within_budget(problem: Problem, found: Candidate | str) -> Candidate | str:
    """A candidate, or that its entries do not fit in the budget, nor go by in a stream."""
    scheme = found.compressed if isinstance(found, Candidate) else None
    if problem.memory is None or scheme is None or scheme.streams:
        return found
    room = scheme.room(problem.samples)
    return f"its entries take {room} bytes" if room > problem.memory else found


def _best(candidates: Sequence[Candidate]) -> Candidate:
    """The cheapest; a plain route unless another is cheaper by more than a little."""
    best = min(candidates, key=lambda candidate: candidate.work)
    plain = [c for c in candidates if c.strategy in PLAIN]
    if best.strategy in PLAIN or not plain:
        return best
    simple = min(plain, key=lambda candidate: candidate.work)
    gain = simple.work > WORTHWHILE * best.work
    return best if gain or best.passes < simple.passes <= 3 else simple


def plain_again(problem: Problem, recipe: Recipe, why: str) -> Recipe:
    """The plain route, where what was planned turned out to be wrong."""
    plain = [STRATEGIES[name](problem) for name in PLAIN]
    best = min((c for c in plain if isinstance(c, Candidate)), key=lambda c: c.work)
    return replace(
        recipe,
        candidate=best,
        chunk=chunk_size(problem, best),
        rejected=((recipe.candidate.strategy, why), *recipe.rejected),
        notes=(*recipe.notes, why),
        batched=problem.linear.batched and best.strategy != "loop",
        structure=replace(problem.structure, pattern=None, note=why),
    )


def check_again(problem: Problem, recipe: Recipe) -> None:
    """Verify a plan that is used again: now and then, or always where constants may couple samples.

    The first uses are checked more densely than later ones: number 1, 4, 16, 64 and so on.

    Raises:
        CouplingError: samples influence each other at this point.
    """
    if due(recipe) or may_couple(recipe, problem.linear.tape.census.ops):
        check_samples(problem)


def may_couple(recipe: Recipe, ops: frozenset[str]) -> bool:
    """Whether samples that were apart at one point may influence each other at another one."""
    apart = recipe.structure.samples is not None and recipe.is_followed
    return not apart and not ops <= _KEEPS_APART


def as_views(ops: frozenset[str]) -> frozenset[str]:
    """With the one name for a reshape that it has where a mode looks on."""
    return frozenset(op.replace("ReshapeAlias", "View") for op in ops)


def due(recipe: Recipe) -> bool:
    """Whether this use of a plan is one at which it is verified again."""
    use = next(recipe.uses)
    return use & (use - 1) == 0 and use.bit_length() % 2 == 1


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
    if not best.work:
        return f"{candidate.passes} passes where none is needed"
    return f"{candidate.passes} passes, {candidate.work / best.work:.2g}x the work"


def chunk_size(problem: Problem, candidate: Candidate) -> int:
    """How many passes go together, so that a chunk keeps to the budget."""
    passes = max(candidate.passes, 1)
    if problem.is_small:
        return passes
    cost = problem.push_cost if candidate.jvps > candidate.vjps else problem.pull_cost
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
