"""The strategies, each exact: what each would cost, or why it does not apply.

A strategy is one function from a `Problem` to a `Candidate`, or to the reason why it does not
apply. All stand in `STRATEGIES`; the cheapest candidate wins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pushforward.checks import why_not_forward
from pushforward.meter import Cost
from pushforward.problems import Problem

# How much dearer one kind of pass can be than the other: beyond it the count of passes decides.
_PASS_RATIO = 8
# Beyond this many bytes held by one pass, passes run faster one by one than in a batch.
_LARGE_PASS = 1 << 21


@dataclass(frozen=True)
class Candidate:
    """A strategy that applies, and its cost."""

    strategy: str
    jvps: int
    vjps: int
    work: float
    cost: Cost | None = None

    @property
    def passes(self) -> int:
        return self.jvps + self.vjps


def reverse(problem: Problem) -> Candidate | str:
    """Row by row: one backward pass for each output, many in one batch."""
    if not problem.linear.batched:
        return "not all of its ops can run under vmap"
    return _by_rows(problem, "reverse", small=1.0, large=1.3)


def loop(problem: Problem) -> Candidate | str:
    """Row by row through plain ``autograd.grad``, with nothing of ``torch.func``."""
    return _by_rows(problem, "loop", small=4.0, large=1.0)


def _by_rows(problem: Problem, name: str, small: float, large: float) -> Candidate:
    """Rows at what they cost, times how badly this way suits passes of that size.

    A small pass is mostly overhead, which a batch shares; a large one falls out of the cache when
    others run beside it.
    """
    passes = problem.m
    if problem.is_small:
        return Candidate(name, 0, passes, passes * small)
    cost = problem.pull_cost
    suits = large if cost.peak > _LARGE_PASS and problem.m > 1 else small
    return Candidate(name, 0, passes, passes * cost.work * suits, cost)


def forward(problem: Problem) -> Candidate | str:
    """Column by column: the transposed backward pass for each input, many in one batch."""
    if problem.quantity == "hessian":
        return "a Hessian is symmetric: its columns are its rows"
    # A forward pass stands on a second derivative, and has a graph of its own to build first.
    hopeless = problem.m <= problem.n if problem.is_small else problem.m * _PASS_RATIO <= problem.n
    if hopeless:
        return f"{problem.n} passes where rows take {problem.m}"
    refusal = why_not_forward(problem)
    if refusal is not None:
        return refusal
    if problem.is_small:
        return Candidate("forward", problem.n, 0, problem.n)
    cost = problem.push_cost
    return Candidate("forward", problem.n, 0, (problem.n + 1) * cost.work, cost)


Strategy = Callable[[Problem], Candidate | str]
STRATEGIES: dict[str, Strategy] = {"reverse": reverse, "forward": forward, "loop": loop}
