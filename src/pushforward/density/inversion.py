"""The numerical inverse of a map: damped Newton with the exact Jacobian, differentiated implicitly.

For m = n it solves f(x) = y; for m > n it finds the point of the image that is nearest to y, by
Gauss-Newton, and leaves it to the caller to judge the distance. Steps are halved until the residual
falls as fast as its slope promises (Armijo). Nothing is unrolled: gradients come from the equation
that the solution satisfies, see `reattach`.

Nocedal and Wright, Numerical Optimization (2006), chapters 3, 10 and 11.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.composites import composites
from pushforward.density.events import Events, worst_index
from pushforward.errors import ConvergenceError, InputError
from pushforward.linalg import upcast

# Iterations, and halvings of a step: for a search that may go anywhere, and for one that must stay
# where solutions are wanted, which stops early at the border.
_FREE = (200, 128)
_WITHIN = (25, 10)
_ATTEMPTS = 8
_ARMIJO = 1e-4
# Of the steps that give x its derivatives: k of them make derivatives up to the k-th order exact.
_ATTACHED_STEPS = 3
# Below this cosine between the residual and the tangent space a point counts as a nearest one.
_STATIONARY = 1e-3

Judge = Callable[[Tensor], Tensor]


def invert(
    events: Events, y: Tensor, starts: Sequence[Tensor], inside: Judge | None = None
) -> Tensor:
    """Find x with f(x) = y.

    Args:
        events: the map f, with m >= n.
        y: (B, m).
        starts: points (B, n) to start from, the best ones first (see `ranked`); the others are
            tried where the first leads nowhere.
        inside: which of (B, n) are wanted, where several x may give the same y; (B, n) -> (B,).
            Where there is no other, an unwanted solution is returned.

    Returns:
        x (B, n), differentiable with respect to y and to whatever f closes over, up to the third
        order. For m > n it is the nearest point, whatever its distance.

    Raises:
        ConvergenceError: no solution was found for some sample.
        InputError: y has a NaN or an infinity.

    Cost: a handful of Jacobians, n backward passes each, for the whole batch.
    """
    with torch.inference_mode(False), torch.no_grad():
        target = y.detach().clone()
        _require_finite(events, target)
        search = _Search(events, target, inside or _all_of)
        found = search.run([x.detach().clone() for x in starts])
        _require_solution(events, target, found, min(len(starts), _ATTEMPTS))
    return reattach(events, found.x, y)


def reattach(events: Events, x: Tensor, y: Tensor) -> Tensor:
    """Give a solution x (B, n) of f(x) = y its derivatives.

    x <- x - K (f(x) - y) with K the (pseudo-)inverse of the Jacobian, held fixed: each step leaves
    the value where it is, up to rounding, and makes one more order of derivatives exact.
    """
    wanted = torch.is_grad_enabled()  # leaving inference mode would turn gradients on
    with torch.inference_mode(False), torch.set_grad_enabled(wanted):
        x, K = x.detach().clone(), _fixed_inverse(events, x.detach().clone())
        y = y.clone()
        with composites():
            for _ in range(_ATTACHED_STEPS):
                x = x - (K @ (events.evaluate(x) - y)[..., None])[..., 0]
    return x


def _fixed_inverse(events: Events, x: Tensor) -> Tensor:
    """The inverse of the Jacobian, (B, n, m), without a graph; zero where there is none."""
    with torch.no_grad():
        matrix = upcast(events.jacobian(x).matrix())
        finite = matrix.isfinite().flatten(-2).all(-1)[..., None, None]
        matrix = matrix.masked_fill(~finite, 0.0)
        if events.m == events.n:
            inverse, info = torch.linalg.inv_ex(matrix)
            finite = finite & (info == 0)[..., None, None]
        else:
            inverse = torch.linalg.pinv(matrix)
        solvable = inverse.isfinite().flatten(-2).all(-1)[..., None, None] & finite
        return torch.where(solvable, inverse, 0.0).to(x.dtype)


def ranked(events: Events, y: Tensor, starts: Sequence[Tensor]) -> list[Tensor]:
    """The starts (B, n), reordered for each sample by the residual there."""
    with torch.no_grad():
        sizes = torch.stack([_norm(events.evaluate(x) - y) for x in starts])
        order = sizes.nan_to_num(torch.inf).argsort(dim=0, stable=True)
        points = torch.stack([x.detach() for x in starts])
        return list(points.gather(0, order[..., None].expand_as(points)))


@dataclass(frozen=True)
class Found:
    """Where a search stands, for each sample.

    Whether x solves the equation, whether it is also one that is wanted, and whether it is at least
    a nearest point of the image.
    """

    x: Tensor
    residual: Tensor
    solved: Tensor
    wanted: Tensor
    nearest: Tensor
    iterations: int

    def improved_by(self, other: Found) -> Found:
        """Take the other one's points where they are better than mine."""
        nearer = other.solved | ~(other.residual >= self.residual)
        better = ~self.wanted & (other.wanted | (~self.solved & nearer))
        return Found(
            torch.where(better[:, None], other.x, self.x),
            torch.where(better, other.residual, self.residual),
            torch.where(better, other.solved, self.solved),
            torch.where(better, other.wanted, self.wanted),
            torch.where(better, other.nearest, self.nearest),
            max(self.iterations, other.iterations),
        )


@dataclass(frozen=True)
class _Search:
    """f(x) = y, to be solved by damped Newton (m = n) or Gauss-Newton (m > n) steps."""

    events: Events
    target: Tensor
    inside: Judge

    def run(self, starts: Sequence[Tensor]) -> Found:
        """One start after the other, until every sample has a solution that is wanted.

        The first run may leave the wanted region; later ones turn back at its border, so that they
        reach solutions there which the first one stepped over.
        """
        found = self.newton(starts[0], _FREE, _all_of)
        for start in starts[1:_ATTEMPTS]:
            if found.wanted.all():
                break
            start = torch.where(found.wanted[:, None], found.x, start)
            found = found.improved_by(self.newton(start, _WITHIN, self.inside))
        return found

    def newton(self, x: Tensor, limits: tuple[int, int], allowed: Judge) -> Found:
        """Newton steps from one start, at points that are allowed."""
        iterations, halvings = limits
        stuck = ~_all_of(x)
        for iteration in range(iterations + 1):
            look = _look(self.events, self.target, x)
            moving = ~(look.arrived | (look.level & ~look.rounded) | stuck)
            if iteration == iterations or not moving.any():
                break
            x, moved = self.backtrack(look, x, moving, allowed, halvings)
            stuck = stuck | (moving & ~moved)
        solved = ~look.off & (look.arrived | (stuck & look.rounded))
        nearest = look.arrived | (look.slope <= _STATIONARY * look.size)
        return Found(x, look.size, solved, solved & self.inside(x), nearest, iteration)

    def backtrack(
        self, look: _Look, x: Tensor, moving: Tensor, allowed: Judge, halvings: int
    ) -> tuple[Tensor, Tensor]:
        """Shorten steps until |f(x) - y|^2 falls enough; say which samples moved."""
        pending, length = moving, torch.ones_like(look.size)
        for _ in range(halvings):
            trial = torch.where(pending[:, None], x - length[:, None].to(x.dtype) * look.step, x)
            reached = _norm(self.events.evaluate(trial) - self.target)
            promised = 1 - 2 * _ARMIJO * length * (look.slope / look.size).square()
            falls = (reached / look.size).square() <= promised
            # Below rounding the residual no longer tells which step is better: small coordinates
            # beside large ones still have their way to go.
            accepted = pending & (falls | (reached <= look.rounding)) & allowed(trial)
            x, pending = torch.where(accepted[:, None], trial, x), pending & ~accepted
            length = length * torch.where(reached.isfinite(), 0.5, 0.1)
            if not (pending & (length >= look.shortest)).any():
                break
        return x, moving & ~pending


@dataclass(frozen=True)
class _Look:
    """The equation linearised at a point, per sample.

    The Newton step, |f(x) - y|, the part of it in the tangent space, the shortest part of the step
    that moves x at all; whether the step is negligible; the residual that rounding leaves; whether
    the residual is too large for a solution, or at right angles to the tangent space.
    """

    step: Tensor
    size: Tensor
    slope: Tensor
    shortest: Tensor
    arrived: Tensor
    rounding: Tensor
    off: Tensor
    level: Tensor

    @property
    def rounded(self) -> Tensor:
        return self.size <= self.rounding


def _look(events: Events, target: Tensor, x: Tensor) -> _Look:
    J = events.jacobian(x)
    matrix, difference = J.matrix(), J.value - target
    (step, singular), size = _step(matrix, difference), _norm(difference)
    eps, slope = torch.finfo(x.dtype).eps, _norm((upcast(matrix) @ upcast(step)[..., None])[..., 0])
    rounding = 1e3 * eps * (1 + _norm(target))
    negligible = _norm(step) <= _tolerance(x.dtype) * (1 + _norm(x))
    return _Look(
        step,
        size,
        slope,
        shortest=eps * (1 + _norm(x)) / _norm(step),
        # Where J is singular, a short step does not mean that f(x) is near y.
        arrived=size.isfinite() & negligible & ((size <= rounding) | ~singular),
        rounding=rounding,
        off=is_off(J.value, matrix, target),
        # The squared residual changes by less than its rounding from here on.
        level=slope <= 10 * eps**0.5 * size,
    )


def is_off(reached: Tensor, matrix: Tensor, y: Tensor) -> Tensor:
    """Whether f(x) is not y, on the scale of y and of what a unit of x moves: (B,)."""
    miss, scale = distance(reached, y), _norm(y) + _norm(matrix.flatten(1))
    return ~(miss <= surface_tolerance(y.dtype) * scale) | ~miss.isfinite()


def distance(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|: (B, n) -> (B,)."""
    return _norm(x - y)


def _all_of(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.bool, device=x.device)


def _step(matrix: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """J^+ (f(x) - y), 0 where it is NaN, and whether J is singular.

    By LU or QR; by singular values where J is singular.
    """
    A, b = upcast(matrix), upcast(difference)
    broken = ~(A.isfinite().flatten(1).all(-1) & b.isfinite().all(-1))
    A = A.masked_fill(broken[:, None, None], 0.0)
    b = b.masked_fill(broken[:, None], 0.0)
    step = _solve(A, b)
    singular = ~step.isfinite().all(-1)
    if singular.any():
        inverse = torch.linalg.pinv(A[singular], rtol=1e-8)
        step[singular] = (inverse @ b[singular][..., None])[..., 0]
    return step.to(matrix.dtype), singular


def _solve(A: Tensor, b: Tensor) -> Tensor:
    if A.shape[-2] == A.shape[-1]:
        return torch.linalg.solve_ex(A, b[..., None])[0][..., 0]
    Q, R = torch.linalg.qr(A)
    return torch.linalg.solve_triangular(R, Q.mT @ b[..., None], upper=True)[..., 0]


def _norm(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(upcast(vectors), dim=-1)


def _tolerance(dtype: torch.dtype) -> float:
    """How small the last step must be: 1e-10 in float64, some eps in the shorter ones."""
    return max(1e-10, 64 * torch.finfo(dtype).eps)


def surface_tolerance(dtype: torch.dtype) -> float:
    """How far from y, relative to |y| + |J|, f(x) may be and still count as y."""
    return 10 * torch.finfo(dtype).eps ** 0.5


def _require_finite(events: Events, target: Tensor) -> None:
    finite = target.isfinite().all(-1)
    if not finite.all():
        index = worst_index((~finite).double(), events.batch)
        raise InputError(
            f"the inverse of {events.name} expects finite values, got "
            f"{_shown(target[~finite][0])} at index {index} of the batch"
        )


def _require_solution(events: Events, target: Tensor, found: Found, attempts: int) -> None:
    failed = ~found.solved
    if events.m > events.n:
        failed &= ~found.nearest
    if not failed.any():
        return
    worst = torch.where(failed, found.residual.nan_to_num(torch.inf), -1.0)
    index = worst_index(worst, events.batch)
    size, wanted = worst.max().item(), _norm(target)[worst.argmax()].item()
    raise ConvergenceError(
        f"the numerical inverse of {events.name} expected f(x) = y, but "
        f"{int(failed.sum())} of {len(failed)} samples found no solution; the worst, at index "
        f"{index}, was left at |f(x) - y| = {size:.3g} with |y| = {wanted:.3g} after "
        f"{found.iterations} iterations from {attempts} starting points; y may lie outside the "
        "image of f, or f may not be one-to-one; otherwise give inverse="
    )


def _shown(vector: Tensor) -> str:
    values = ", ".join(f"{value:.4g}" for value in vector[:6].tolist())
    return f"({values}, ...)" if len(vector) > 6 else f"({values})"
