"""`fixed_point`: the state that a map leaves as it is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import ConvergenceError, InputError
from pushforward.implicit.attach import Backward, attached
from pushforward.implicit.maps import BatchDim, StateMap, evaluations
from pushforward.implicit.solvers import SOLVERS, Evaluate, Found, Limits, Solver, search

# Steps of long ago mislead where f is curved, and help where it is linear.
_HISTORY = {"anderson": 10, "broyden": 60, "iteration": 0}
_LINEAR_HISTORY = {"anderson": 20, "broyden": 60, "iteration": 0}
_UNCONVERGED = ("warn", "raise", "allow")


class ConvergenceWarning(UserWarning):
    """A fixed point, or its backward pass, that did not reach its tolerance."""


@dataclass(frozen=True, repr=False, eq=False)
class FixedPoint:
    """What `fixed_point` returns. Where there is a batch, what is per sample has it first.

    Attributes:
        z: the state, laid out like ``z0``; differentiable with respect to all that f closes over.
        residual: |f(z) - z|, Euclidean, ``(B,)`` or ``()``.
        relative_residual: the same over |f(z)|; 0 where both are 0.
        converged: whether the tolerance was reached, ``(B,)`` or ``()``, boolean.
        evaluations: of f by the search, for the whole batch together.
        counts: evaluations that each sample took until it arrived, ``(B,)`` or ``()``.
        trace: |f(z) - z| at each evaluation, ``(evaluations, B)`` or ``(evaluations,)``.
        solver: the name of the solver.
        backward: the `Backward` that the passes through ``z`` fill in.
    """

    z: Any
    residual: Tensor
    relative_residual: Tensor
    converged: Tensor
    evaluations: int
    counts: Tensor
    trace: Tensor
    solver: str
    backward: Backward

    def __repr__(self) -> str:
        arrived, samples = int(self.converged.sum()), self.converged.numel()
        worst = float(self.relative_residual.max()) if samples else 0.0
        return (
            f"FixedPoint({arrived} of {samples} converged, relative residual at most {worst:.2g}, "
            f"{self.evaluations} evaluations, {self.solver})"
        )


def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    *,
    solver: str = "anderson",
    tol: float | None = None,
    rtol: float | None = None,
    max_evals: int = 500,
    batch_dim: BatchDim = "auto",
    history: int | None = None,
    mixing: float = 1.0,
    order: int = 2,
    unconverged: str = "warn",
    backward_solver: str | None = None,
    backward_rtol: float | None = None,
    backward_max_evals: int | None = None,
) -> FixedPoint:
    r"""Find z with f(z) = z, and differentiate it without unrolling the search.

    .. math::
        z = f(z, w), \qquad \frac{dz}{dw} = (1 - J)^{-1} \frac{\partial f}{\partial w},
        \qquad J = \frac{\partial f}{\partial z}

    Each sample of a batch has a history of its own and stays where it is once it has arrived. A
    backward pass solves u = J^T u + v by the same solvers. What f draws at random (dropout) is
    drawn once per call and is the same at every evaluation; buffers (the running statistics of
    batch norm) stay as they are.

    Args:
        f: a map from a state to a state laid out alike: a tensor, or a pytree of tensors. What else
            it depends on (parameters, the input of the layer) it closes over.
        z0: where to start, ``(B, *state)``, or ``state`` without a batch. It gets no gradient.
        solver: ``"anderson"`` (Anderson 1965; Walker and Ni 2011), ``"broyden"`` (Broyden's good
            method, 1965), or ``"iteration"``, z <- f(z), which needs a contraction.
        tol, rtol: a sample has arrived where |f(z) - z| <= max(tol, rtol |f(z)|), Euclidean.
            ``rtol`` is 1e-10 in double, 1e-5 in single precision; with ``tol`` alone it is 0.
            ``tol`` is for solutions near zero: 64 eps times the first residual, or times 1 where
            that is more.
        max_evals: of f, for the whole batch.
        batch_dim: 0, or None for one state; ``"auto"`` is 0 where every tensor of the state has two
            dimensions or more.
        history: how many steps are remembered. Where None, Anderson keeps 10, and 20 in backward
            passes, Broyden 60. Memory: twice as many states.
        mixing: how far along f(z) - z the plain step goes.
        order: how many derivatives in a row are exact; another evaluation of f for each.
        unconverged: ``"warn"``, ``"raise"``, or ``"allow"``: what happens where a search ends
            short of the tolerance, a backward one too. The result is the best point that was seen.
        backward_solver, backward_rtol, backward_max_evals: for backward passes, else the same.

    Returns:
        `FixedPoint` with ``.z``, ``.residual``, ``.converged``, ``.evaluations``, ``.counts``.

    Cost: ``evaluations`` of f without a graph and ``order`` with one, if gradients are wanted;
    then ``backward.evaluations`` vector-Jacobian products of f.

    Raises:
        InputError: an argument is out of range, or f is not finite at ``z0``.
        ShapeError: f returns something laid out otherwise than ``z0``.
        CouplingError: samples of a batch influence each other; with ``batch_dim=None`` they may.
        ConvergenceError: no solution was found, and ``unconverged="raise"``.
        DifferentiationError: more than ``order`` derivatives in a row were asked for.

    The backward pass is that of Bai, Kolter and Koltun, "Deep Equilibrium Models" (2019).

    >>> weight = torch.tensor(0.5, requires_grad=True)
    >>> found = fixed_point(lambda z: weight * z + 1.0, torch.zeros(1, 1))
    >>> round(found.z.item(), 4), bool(found.converged)
    (2.0, True)
    >>> found.z.sum().backward()  # z = 1 / (1 - weight)
    >>> round(weight.grad.item(), 3)
    4.0
    """
    state_map = StateMap.of(f, z0, batch_dim)
    limits = _limits(state_map, tol, rtol, max_evals)
    later = _limits(
        state_map,
        None,
        (limits.rtol or None) if backward_rtol is None else backward_rtol,
        max_evals if backward_max_evals is None else backward_max_evals,
    )
    forth = _solver(solver, history, mixing, _HISTORY)
    back = _solver(backward_solver or solver, history, mixing, _LINEAR_HISTORY)
    judge = _Judge(state_map.name, _one_of(unconverged, "unconverged", _UNCONVERGED))
    order, report, wanted = _whole(order, "order"), Backward(), torch.is_grad_enabled()
    with evaluations(state_map) as evaluate, torch.no_grad():
        found = search(evaluate, state_map.flatten(z0), forth(), limits, state_map.name)
        judge(found, limits, "the search")
        z = found.z
        if wanted:
            search_for = partial(_backward, back, later, report, judge)
            z = attached(evaluate, z, search_for, state_map.name, order)
    return _result(state_map, found, z, solver, report)


def _backward(
    solver: Callable[[], Solver],
    limits: Limits,
    report: Backward,
    judge: _Judge,
    evaluate: Evaluate,
    start: Tensor,
) -> Found:
    found = search(evaluate, start, solver(), limits, f"the backward of {judge.name}")
    report.note(found)
    judge(found, limits, "a backward pass")
    return found


def _result(
    state_map: StateMap, found: Found, z: Tensor, solver: str, report: Backward
) -> FixedPoint:
    each = state_map.per_sample
    with torch.set_grad_enabled(z.requires_grad):
        state = state_map.unflatten(z)
    return FixedPoint(
        z=state,
        residual=each(found.residual),
        relative_residual=each(found.relative),
        converged=each(found.converged),
        evaluations=found.evaluations,
        counts=each(found.counts),
        trace=each(found.trace),
        solver=solver,
        backward=report,
    )


@dataclass(frozen=True)
class _Judge:
    """What happens where a search ends short of its tolerance."""

    name: str
    way: str

    def __call__(self, found: Found, limits: Limits, what: str) -> None:
        if self.way == "allow" or bool(found.converged.all()):
            return
        message = _unconverged_message(self.name, found, limits, what)
        if self.way == "raise":
            raise ConvergenceError(message)
        warnings.warn(message, ConvergenceWarning, stacklevel=3)


def _unconverged_message(name: str, found: Found, limits: Limits, what: str) -> str:
    failed = ~found.converged
    worst = torch.where(failed, found.relative, -1.0)
    return (
        f"{what} for the fixed point of {name} expected a relative residual of {limits.rtol:.3g}, "
        f"but {int(failed.sum())} of {len(failed)} samples fell short of it in "
        f"{found.evaluations} evaluations; the worst, number {int(worst.argmax())}, was left at "
        f"{float(worst.max()):.3g}. Raise max_evals or rtol, try another solver, or make f more "
        "of a contraction; unconverged= says what happens here"
    )


def _solver(
    name: str, history: int | None, mixing: float, usual: dict[str, int]
) -> Callable[[], Solver]:
    made = SOLVERS[_one_of(name, "solver", tuple(SOLVERS))]
    memory = usual[name] if history is None else _whole(history, "history")
    return partial(made, memory, _within(mixing, "mixing", 0.0, 2.0))


def _limits(state_map: StateMap, tol: float | None, rtol: float | None, max_evals: int) -> Limits:
    dtype = state_map.layout.dtype
    if rtol is None:
        rtol = 0.0 if tol is not None else _default_rtol(dtype)
    return Limits(
        None if tol is None else _at_least_zero(tol, "tol"),
        _at_least_zero(rtol, "rtol"),
        min(rtol, 64 * torch.finfo(dtype).eps),
        _whole(max_evals, "max_evals"),
    )


def _default_rtol(dtype: torch.dtype) -> float:
    return {8: 1e-10, 4: 1e-5}.get(dtype.itemsize, 8 * torch.finfo(dtype).eps)


def _one_of(value: str, name: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        listed = ", ".join(f'"{each}"' for each in allowed)
        raise InputError(f"{name} expects one of {listed}, got {value!r}; choose one of these")
    return value


def _whole(value: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} expects a whole number of at least 1, got {value!r}; raise it")
    return value


def _at_least_zero(value: float, name: str) -> float:
    if not (isinstance(value, int | float) and 0 <= value < math.inf):
        raise InputError(
            f"{name} expects a number of at least 0, got {value!r}; leave it out for the default"
        )
    return float(value)


def _within(value: float, name: str, low: float, high: float) -> float:
    if not (isinstance(value, int | float) and low < value <= high):
        raise InputError(
            f"{name} expects a number over {low:g} and up to {high:g}, got {value!r}; "
            "1 is the plain step"
        )
    return float(value)
