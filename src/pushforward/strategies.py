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
    return _by_rows(problem, "reverse")


def loop(problem: Problem) -> Candidate | str:
    """Row by row through plain ``autograd.grad``, with nothing of ``torch.func``."""
    return _by_rows(problem, "loop", penalty=4.0)


def _by_rows(problem: Problem, name: str, penalty: float = 1.0) -> Candidate:
    passes = problem.m
    if problem.is_small or problem.m * _PASS_RATIO <= problem.n:
        return Candidate(name, 0, passes, passes * penalty)
    cost = problem.pull_cost
    return Candidate(name, 0, passes, passes * cost.work * penalty, cost)


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
    if problem.is_small or problem.n * _PASS_RATIO <= problem.m:
        return Candidate("forward", problem.n, 0, problem.n)
    cost = problem.push_cost
    return Candidate("forward", problem.n, 0, (problem.n + 1) * cost.work, cost)


Strategy = Callable[[Problem], Candidate | str]
STRATEGIES: dict[str, Strategy] = {"reverse": reverse, "forward": forward, "loop": loop}
