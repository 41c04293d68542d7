"""Solvers of z = f(z) for a batch of flat samples, each with its own history and its own end.

A solver proposes the next point; `search` evaluates, judges, and keeps the samples that have
arrived where they are. Linear maps, those of backward passes, have their fixed points found alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.errors import CouplingError, InputError

Evaluate = Callable[[Tensor], Tensor]


class Solver(ABC):
    """What proposes the next point from the last ones; one object for one search."""

    # A residual that has grown by so much, beside the best, sends a sample back to its best point.
    lost_at = 1e3

    @abstractmethod
    def propose(self, z: Tensor, value: Tensor, restarted: Tensor) -> Tensor:
        """The next points, (B, n), after f(z) = value; ``restarted`` (B,) begin a new history."""


class Iteration(Solver):
    """z <- f(z), or z <- z + mixing (f(z) - z)."""

    lost_at = torch.inf

    def __init__(self, history: int, mixing: float) -> None:
        self.mixing = mixing

    def propose(self, z: Tensor, value: Tensor, restarted: Tensor) -> Tensor:
        return value if self.mixing == 1 else z + self.mixing * (value - z)


class Anderson(Solver):
    """The combination of the last steps whose residual is least (Anderson 1965; type II).

    With g = f(z) - z and differences D of the last ones, c minimises |g - D c|. The columns of D
    have length one and their Gram matrix is regularised by a multiple of eps, so that neither the
    scale of f nor the progress made changes what regularisation does.
    """

    def __init__(self, history: int, mixing: float) -> None:
        self.history, self.mixing = history, mixing
        self._steps: list[Tensor] = []  # differences of g, (B, n) each
        self._moves: list[Tensor] = []  # differences of z
        self._last: tuple[Tensor, Tensor] | None = None

    def propose(self, z: Tensor, value: Tensor, restarted: Tensor) -> Tensor:
        g = value - z
        self._remember(z, g, restarted)
        forward = z + self.mixing * g
        if not self._steps:
            return forward
        steps, moves = torch.stack(self._steps, dim=1), torch.stack(self._moves, dim=1)
        weights = _least_squares(steps, g)
        return forward - _combined(weights, moves + self.mixing * steps)

    def _remember(self, z: Tensor, g: Tensor, restarted: Tensor) -> None:
        keep = ~restarted[:, None]
        self._steps = [step * keep for step in self._steps]
        self._moves = [move * keep for move in self._moves]
        if self._last is not None:
            self._steps.append(_kept(g - self._last[1], keep))
            self._moves.append(_kept(z - self._last[0], keep))
        self._steps = self._steps[-self.history :]
        self._moves = self._moves[-self.history :]
        self._last = (z, g)


def _kept(tensor: Tensor, keep: Tensor) -> Tensor:
    """Zero in the rows that are not kept, whatever stands there."""
    return torch.where(keep, tensor, torch.zeros_like(tensor))


def _combined(weights: Tensor, rows: Tensor) -> Tensor:
    """(B, k), (B, k, n) -> (B, n)."""
    return torch.einsum("bk,bkn->bn", weights, rows)


def _least_squares(columns: Tensor, target: Tensor) -> Tensor:
    """c of least |target - sum_k c_k columns_k|, (B, k, n), (B, n) -> (B, k)."""
    lengths = columns.norm(dim=-1)
    empty = lengths == 0
    lengths = torch.where(empty, 1.0, lengths)
    units = columns / lengths[..., None]
    gram = units @ units.mT
    ridge = 10 * gram.shape[-1] * torch.finfo(gram.dtype).eps
    gram = gram + torch.diag_embed(empty.to(gram.dtype) + ridge)
    weights, _ = torch.linalg.solve_ex(gram, (units @ target[..., None]))
    weights = torch.where(weights.isfinite(), weights, 0.0)
    return weights[..., 0] / lengths


class Broyden(Solver):
    """Broyden's good method on f(z) - z = 0, the inverse kept as -1 + sum_i u_i v_i^T (1965)."""

    lost_at = 1e8  # on its way to a solution it may well grow by far

    def __init__(self, history: int, mixing: float) -> None:
        self.history, self.mixing = history, mixing
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []
        self._last: tuple[Tensor, Tensor] | None = None

    def propose(self, z: Tensor, value: Tensor, restarted: Tensor) -> Tensor:
        g = value - z
        keep = ~restarted[:, None]
        self._left = [u * keep for u in self._left]
        if self._last is not None:
            if len(self._left) >= self.history:
                self._left, self._right = [], []
            self._update(z - self._last[0], g - self._last[1], keep)
        self._last = (z, g)
        return z - self._inverse(g)

    def _update(self, move: Tensor, step: Tensor, keep: Tensor) -> None:
        """The inverse that takes step to move, and changes least otherwise (Sherman-Morrison)."""
        guess, row = self._inverse(step), self._inverse_transposed(move)
        scale = (move * guess).sum(-1, keepdim=True)
        least = torch.finfo(scale.dtype).eps ** 0.5 * _length(move) * _length(guess)
        keep = keep & (scale.abs() > least)
        self._left.append(_kept((move - guess) / torch.where(keep, scale, 1.0), keep))
        self._right.append(_kept(row, keep))

    def _inverse(self, g: Tensor) -> Tensor:
        return self._applied(g, self._left, self._right)

    def _inverse_transposed(self, g: Tensor) -> Tensor:
        return self._applied(g, self._right, self._left)

    def _applied(self, g: Tensor, left: list[Tensor], right: list[Tensor]) -> Tensor:
        result = -self.mixing * g
        if left:
            rows, columns = torch.stack(right, dim=1), torch.stack(left, dim=1)
            result = result + _combined(torch.einsum("bkn,bn->bk", rows, g), columns)
        return result


SOLVERS: dict[str, Callable[[int, float], Solver]] = {
    "anderson": Anderson,
    "broyden": Broyden,
    "iteration": Iteration,
}


@dataclass(frozen=True)
class Limits:
    """When a search ends: |f(z) - z| <= max(tol, rtol |f(z)|), or max_evals evaluations.

    ``tol=None`` is rtol times the first residual or 1, whichever is less: zero is a fixed point
    like others, in any units.
    """

    tol: float | None
    rtol: float
    max_evals: int

    def reach(self, size: Tensor, first: Tensor) -> Tensor:
        """The residual that counts as arrived, per sample."""
        absolute = self.rtol * first.clamp(max=1) if self.tol is None else self.tol
        return (self.rtol * size).clamp(min=absolute)


@dataclass(frozen=True)
class Found:
    """Where a search ended.

    Attributes:
        z: (B, n), for a sample that has not arrived the best point that was seen.
        residual, size: |f(z) - z| and |f(z)| there, (B,).
        converged: (B,).
        evaluations: of the whole batch; ``counts`` (B,) of each sample until it arrived.
        trace: residuals at every evaluation, (evaluations, B).
    """

    z: Tensor
    residual: Tensor
    size: Tensor
    converged: Tensor
    evaluations: int
    counts: Tensor
    trace: Tensor

    @property
    def relative(self) -> Tensor:
        """|f(z) - z| / |f(z)|, 0 for 0/0, (B,)."""
        return torch.where(self.residual == 0, self.residual, self.residual / self.size)


@dataclass(frozen=True)
class _Point:
    """A point, its value, and the length of their difference."""

    z: Tensor
    value: Tensor
    residual: Tensor

    @staticmethod
    def at(z: Tensor, value: Tensor) -> _Point:
        residual = _length(value - z)[:, 0]
        return _Point(z, value, residual.masked_fill(residual.isnan(), torch.inf))

    def lost(self, limit: Tensor) -> Tensor:
        return ~(self.residual.isfinite() & (self.residual <= limit))

    def replaced(self, where: Tensor, other: _Point) -> _Point:
        """Take the other's samples where it says so."""
        rows = where[:, None]
        return _Point(
            torch.where(rows, other.z, self.z),
            torch.where(rows, other.value, self.value),
            torch.where(where, other.residual, self.residual),
        )


def search(
    evaluate: Evaluate, start: Tensor, solver: Solver, limits: Limits, name: str = "f"
) -> Found:
    """Look for z = f(z) from ``start`` (B, n).

    Raises:
        InputError: f is not finite at the start.
        CouplingError: the residual of a sample changes though the sample does not move.
    """
    point = best = _Point.at(start, evaluate(start))
    _require_finite(point, name)
    first, trace, evaluations = point.residual, [point.residual], 1
    moving = torch.ones_like(first, dtype=torch.bool)
    counts, losses = torch.ones_like(first, dtype=torch.long), torch.zeros_like(first)
    while True:
        best = best.replaced(moving & (point.residual < best.residual), point)
        reach = limits.reach(_length(best.value)[:, 0], first)
        moving = moving & ~(best.residual <= reach)
        if not moving.any() or evaluations >= limits.max_evals:
            break
        lost = moving & point.lost(solver.lost_at * best.residual)
        losses = losses + lost
        point = point.replaced(lost | ~moving, best)
        proposed = solver.propose(point.z, point.value, lost)
        proposed = torch.where(lost[:, None], _shortened(best, losses), proposed)
        z = torch.where(moving[:, None], proposed, best.z)
        point = _Point.at(z, evaluate(z))
        _require_apart(point, ~moving, reach, best, name)
        evaluations, counts = evaluations + 1, counts + moving
        trace.append(point.residual)
    size = _length(best.value)[:, 0]
    return Found(best.z, best.residual, size, ~moving, evaluations, counts, torch.stack(trace))


def _shortened(best: _Point, losses: Tensor) -> Tensor:
    """A step from the best point, half as long after each time that a sample was lost."""
    part = 0.5 ** losses.clamp(max=10)[:, None]
    return best.z + part * (best.value - best.z)


def _length(rows: Tensor) -> Tensor:
    """(B, n) -> (B, 1)."""
    return rows.norm(dim=-1, keepdim=True)


def _require_finite(point: _Point, name: str) -> None:
    broken = ~point.residual.isfinite()
    if broken.any():
        came = "NaN" if point.value.isnan().any() else "an infinite value"
        raise InputError(
            f"expected {name} to be finite where the search starts, got {came} in sample "
            f"{int(broken.nonzero()[0])}; start elsewhere, or look at the parameters of {name}"
        )


def _require_apart(point: _Point, still: Tensor, reach: Tensor, best: _Point, name: str) -> None:
    """Refuse a map whose residual at the same sample is another one now."""
    slack = 1e3 * torch.finfo(reach.dtype).eps * _length(best.value)[:, 0]
    changed = still & ~(point.residual <= best.residual + reach + slack)
    if changed.any():
        raise CouplingError(
            f"batch_dim=0 expects {name} to treat each sample by itself, but sample "
            f"{int(changed.nonzero()[0])} is no fixed point any more although only others moved: "
            "samples influence each other (batch norm in training mode?), or the map is not the "
            "same at each call; use batch_dim=None for one state of the whole batch"
        )
