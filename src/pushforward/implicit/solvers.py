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
    def propose(self, z: Tensor, value: Tensor, restarted: Tensor | None) -> Tensor:
        """The next points, (B, n), after f(z) = value; ``restarted`` (B,) begin a new history."""


class Iteration(Solver):
    """z <- f(z), or z <- z + mixing (f(z) - z)."""

    lost_at = torch.inf

    def __init__(self, history: int, mixing: float) -> None:
        self.mixing = mixing

    def propose(self, z: Tensor, value: Tensor, restarted: Tensor | None) -> Tensor:
        return value if self.mixing == 1 else torch.lerp(z, value, self.mixing)


class Anderson(Solver):
    """The combination of the last steps whose residual is least (Anderson 1965; type II).

    With g = f(z) - z and differences D of the last ones, c minimises |g - D c|. The columns of D
    have length one and their Gram matrix is regularised by a multiple of eps, so that neither the
    scale of f nor the progress made changes what regularisation does.
    """

    def __init__(self, history: int, mixing: float) -> None:
        self.mixing = mixing
        self._steps = _Rows(history)  # differences of g
        self._moves = _Rows(history)  # how the plain step differs after them
        self._last: tuple[Tensor, Tensor] | None = None

    def propose(self, z: Tensor, value: Tensor, restarted: Tensor | None) -> Tensor:
        g = value - z
        plain = value if self.mixing == 1 else torch.lerp(z, value, self.mixing)
        if restarted is not None:
            self._steps.clear(restarted)
            self._moves.clear(restarted)
        if self._last is not None:
            self._steps.add(_dropped(g - self._last[0], restarted))
            self._moves.add(_dropped(plain - self._last[1], restarted))
        self._last = (g, plain)
        if not len(self._steps):
            return plain
        weights = _least_squares(self._steps.kept, g)
        return plain - _combined(weights, self._moves.kept)


class _Rows:
    """The last few of the (B, n) that were added, as (B, k, n)."""

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0
        self._space: Tensor | None = None

    def __len__(self) -> int:
        return min(self._count, self._most)

    @property
    def kept(self) -> Tensor:
        assert self._space is not None
        return self._space[:, : len(self)]

    def add(self, rows: Tensor) -> None:
        """Add one row per sample, in the place of the oldest where there is no more space."""
        place = self._count % self._most
        space = self._space
        if space is None or place >= space.shape[1]:
            space = self._space = self._larger(rows)
        space[:, place] = rows
        self._count += 1

    def _larger(self, rows: Tensor) -> Tensor:
        size = min(self._most, max(8, 2 * len(self)))
        space = rows.new_zeros((len(rows), size, rows.shape[1]))
        if self._space is not None:
            space[:, : len(self)] = self.kept
        return space

    def clear(self, samples: Tensor) -> None:
        """Zero for some samples."""
        if self._space is not None:
            self._space[samples] = 0

    def forget(self) -> None:
        self._count = 0


def _dropped(rows: Tensor, samples: Tensor | None) -> Tensor:
    """Zero in the rows of some samples, whatever stands there."""
    return rows if samples is None else rows.masked_fill(samples[:, None], 0.0)


def _combined(weights: Tensor, rows: Tensor) -> Tensor:
    """(B, k), (B, k, n) -> (B, n)."""
    return (weights[:, None] @ rows)[:, 0]


def _products(rows: Tensor, vector: Tensor) -> Tensor:
    """(B, k, n), (B, n) -> (B, k)."""
    return (rows @ vector[..., None])[..., 0]


def _least_squares(columns: Tensor, target: Tensor) -> Tensor:
    """c of least |target - sum_k c_k columns_k|, (B, k, n), (B, n) -> (B, k)."""
    lengths = torch.linalg.vector_norm(columns, dim=-1)
    empty = lengths == 0
    lengths = lengths.masked_fill(empty, 1.0)
    units = columns / lengths[..., None]
    gram = units @ units.mT
    ridge = 10 * gram.shape[-1] * torch.finfo(gram.dtype).eps
    gram.diagonal(dim1=-2, dim2=-1).add_(empty + ridge)
    weights, _ = torch.linalg.solve_ex(gram, _products(units, target))
    return weights.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) / lengths


class Broyden(Solver):
    """Broyden's good method on f(z) - z = 0, the inverse kept as -1 + sum_i u_i v_i^T (1965)."""

    lost_at = 1e8  # on its way to a solution it may well grow by far

    def __init__(self, history: int, mixing: float) -> None:
        self.history, self.mixing = history, mixing
        self._left, self._right = _Rows(history), _Rows(history)
        self._last: tuple[Tensor, Tensor] | None = None

    def propose(self, z: Tensor, value: Tensor, restarted: Tensor | None) -> Tensor:
        g = value - z
        if restarted is not None:
            self._left.clear(restarted)
        if self._last is not None:
            if len(self._left) == self.history:
                self._left.forget()
                self._right.forget()
            self._update(z - self._last[0], g - self._last[1], restarted)
        self._last = (z, g)
        return z - self._inverse(g)

    def _update(self, move: Tensor, step: Tensor, restarted: Tensor | None) -> None:
        """The inverse that takes step to move, and changes least otherwise (Sherman-Morrison)."""
        guess, row = self._inverse(step), self._inverse_transposed(move)
        scale = (move * guess).sum(-1)
        least = torch.finfo(scale.dtype).eps ** 0.5 * _length(move) * _length(guess)
        unfit = ~(scale.abs() > least)
        unfit = unfit if restarted is None else unfit | restarted
        left = (move - guess) / scale.masked_fill(unfit, 1.0)[:, None]
        self._left.add(_dropped(left, unfit))
        self._right.add(_dropped(row, unfit))

    def _inverse(self, g: Tensor) -> Tensor:
        return self._applied(g, self._left, self._right)

    def _inverse_transposed(self, g: Tensor) -> Tensor:
        return self._applied(g, self._right, self._left)

    def _applied(self, g: Tensor, left: _Rows, right: _Rows) -> Tensor:
        plain = -self.mixing * g
        if not len(left):
            return plain
        return plain + _combined(_products(right.kept, g), left.kept)


SOLVERS: dict[str, Callable[[int, float], Solver]] = {
    "anderson": Anderson,
    "broyden": Broyden,
    "iteration": Iteration,
}


@dataclass(frozen=True)
class Limits:
    """When a search ends: |f(z) - z| <= max(tol, rtol |f(z)|), or max_evals evaluations.

    ``tol=None`` is ``rounding`` times the first residual or 1, whichever is less: zero is a fixed
    point like others, in any units.
    """

    tol: float | None
    rtol: float
    rounding: float
    max_evals: int

    def least(self, first: Tensor) -> Tensor | float:
        """What is small enough in any case, after the first residuals."""
        return self.rounding * first.clamp(max=1) if self.tol is None else self.tol


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
    """A point, its value, the length of their difference, and that of the value."""

    z: Tensor
    value: Tensor
    residual: Tensor
    size: Tensor

    @staticmethod
    def at(z: Tensor, value: Tensor) -> _Point:
        return _Point(z, value, _length(value - z), _length(value))

    def where(self, chosen: Tensor, other: _Point) -> _Point:
        """My samples where they are chosen, else the other's."""
        rows = chosen[:, None]
        return _Point(
            torch.where(rows, self.z, other.z),
            torch.where(rows, self.value, other.value),
            torch.where(chosen, self.residual, other.residual),
            torch.where(chosen, self.size, other.size),
        )


def search(
    evaluate: Evaluate, start: Tensor, solver: Solver, limits: Limits, name: str = "f"
) -> Found:
    """Look for z = f(z) from ``start`` (B, n).

    Raises:
        InputError: f is not finite at the start.
        CouplingError: the residual of a sample changes though the sample does not move.
    """
    best = _Point.at(start, evaluate(start))
    _require_finite(best, name)
    run = _Run(best, limits.least(best.residual), limits.rtol)
    while run.goes_on and len(run.trace) < limits.max_evals:
        z = run.next(solver)
        run.see(_Point.at(z, evaluate(z)), solver.lost_at, name)
    best = run.best
    counts = torch.where(run.moving, len(run.trace), run.counts)
    return Found(
        best.z,
        best.residual,
        best.size,
        ~run.moving,
        len(run.trace),
        counts,
        torch.stack(run.trace),
    )


class _Run:
    """Where a search stands. Most steps see every sample move and improve, and cost little."""

    def __init__(self, first: _Point, least: Tensor | float, rtol: float) -> None:
        self.best = self.point = first
        self.least, self.rtol = least, rtol
        self.trace = [first.residual]
        self.moving = torch.ones_like(first.residual, dtype=torch.bool)
        self.counts = torch.ones_like(self.moving, dtype=torch.long)
        self.losses = torch.zeros_like(first.residual)
        self.lost: Tensor | None = None
        self.all_move = True
        self._judge()

    @property
    def reach(self) -> Tensor:
        """The residual that counts as arrived, per sample."""
        return (self.rtol * self.best.size).clamp(min=self.least)

    def _judge(self) -> None:
        """Stop the samples that have arrived."""
        arrived = self.moving & (self.best.residual <= self.reach)
        if arrived.any() or not len(arrived):
            self.counts = torch.where(arrived, len(self.trace), self.counts)
            self.moving, self.all_move = self.moving & ~arrived, False
        self.goes_on = self.all_move or bool(self.moving.any())

    def next(self, solver: Solver) -> Tensor:
        """Points to look at next, (B, n); samples that have arrived stay."""
        point, best = self.point, self.best
        if not self.all_move:
            point = point.where(self.moving, best)
        if self.lost is None:
            z = solver.propose(point.z, point.value, None)
        else:
            point = best.where(self.lost, point)
            z = solver.propose(point.z, point.value, self.lost)
            z = torch.where(self.lost[:, None], _shortened(best, self.losses), z)
        return z if self.all_move else torch.where(self.moving[:, None], z, best.z)

    def see(self, point: _Point, lost_at: float, name: str) -> None:
        """Take a new point in."""
        self.point = point
        self.trace.append(point.residual)
        if not self.all_move:
            self._require_apart(name)
        better = self.moving & (point.residual < self.best.residual)
        if better.all():
            self.best, self.lost = point, None
        else:
            self._lose(lost_at)
            self.best = point.where(better, self.best)
        self._judge()

    def _lose(self, lost_at: float) -> None:
        """Note the samples that have gone too far from their best point."""
        residual = self.point.residual
        lost = self.moving & ~(residual.isfinite() & (residual <= lost_at * self.best.residual))
        self.lost = lost if lost.any() else None
        if self.lost is not None:
            self.losses = self.losses + lost

    def _require_apart(self, name: str) -> None:
        """Refuse a map whose residual at the same sample is another one now."""
        best = self.best
        slack = self.reach + 1e3 * torch.finfo(best.size.dtype).eps * best.size
        changed = ~self.moving & ~(self.point.residual <= best.residual + slack)
        if changed.any():
            raise CouplingError(
                f"batch_dim=0 expects {name} to treat each sample by itself, but sample "
                f"{int(changed.nonzero()[0])} is no fixed point any more although only others "
                "moved: samples influence each other (batch norm in training mode?), or the map "
                "is not the same at each call; use batch_dim=None for one state of the whole batch"
            )


def _shortened(best: _Point, losses: Tensor) -> Tensor:
    """A step from the best point, a quarter as long after each time that a sample was lost."""
    part = 0.25 ** losses.clamp(max=25)[:, None]
    return best.z + part * (best.value - best.z)


def _length(rows: Tensor) -> Tensor:
    """(B, n) -> (B,)."""
    return torch.linalg.vector_norm(rows, dim=-1)


def _require_finite(point: _Point, name: str) -> None:
    broken = ~point.residual.isfinite()
    if broken.any():
        came = "NaN" if point.value.isnan().any() else "an infinite value"
        raise InputError(
            f"expected {name} to be finite where the search starts, got {came} in sample "
            f"{int(broken.nonzero()[0])}; start elsewhere, or look at the parameters of {name}"
        )
