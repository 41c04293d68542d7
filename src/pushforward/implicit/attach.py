"""The derivatives of a fixed point, without unrolling the search that found it.

z = f(z, w) gives dz = (1 - J)^-1 f_w dw. A gate stands behind a copy of f's value: what comes in as
the cotangent v goes on as u = (1 - J^T)^-1 v, itself the fixed point of u = J^T u + v. It is a node
of its own: a hook on f's value would act on every product with J^T too, for these begin there.

For higher orders gates are stacked as z_k = z_{k-1} - (1 - J)^-1 (z_{k-1} - f(z_{k-1})), J held
fixed: each one makes one more order of derivatives exact. In a first pass nothing but rounding
reaches the gates below the last, which then do no work.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pushforward.composites import UNFIT, UNFIT_THIRD, composites
from pushforward.errors import DifferentiationError
from pushforward.implicit.solvers import Evaluate, Found
from pushforward.tape import Census, take_census

# Solves u = map(u) from a start, and says so where it does not.
Search = Callable[[Evaluate, Tensor], Found]

# Times eps: what may be left of a sum of vectors that cancel.
_ROUNDING = 100


@dataclass(eq=False)
class Backward:
    """What the backward passes through a fixed point took so far.

    Attributes:
        evaluations: products with J^T (or J, for higher derivatives), of the whole batch.
        counts: the same for each sample in the last pass, ``(B,)``.
        residual: the largest |J^T u + v - u| / |u| of the last pass.
        converged: whether every sample of every pass reached the tolerance.
    """

    evaluations: int = 0
    counts: Tensor | None = None
    residual: float = 0.0
    converged: bool = True

    def note(self, found: Found) -> None:
        """Add what one search took."""
        self.evaluations += found.evaluations
        self.counts = found.counts
        self.residual = float(found.relative.max()) if len(found.relative) else 0.0
        self.converged = self.converged and bool(found.converged.all())


class _Start(torch.autograd.Function):
    """A point that J is taken at; what flows back to it belongs to nobody."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        return None


@dataclass(eq=False)
class Linearised:
    """f near a fixed point, and (1 - J)^-1 by a search of its own."""

    point: Tensor
    value: Tensor
    search_for: Search
    name: str
    order: int
    # |J^T u + v - u| after the last search, and the sum of these in the pass that goes on, (B,).
    _residual: Tensor | float = 0.0
    _left: Tensor | None = None
    _forward: tuple[Tensor, Tensor] | None = None

    def pull(self, u: Tensor) -> Tensor:
        """J^T u."""
        return _gradient(self.value, self.point, u)

    def push(self, v: Tensor) -> Tensor:
        """J v, the derivative of <J^T u, v> in u."""
        if self._forward is None:
            with torch.enable_grad():
                u = torch.zeros_like(v, requires_grad=True)
                self._forward = u, _gradient(self.value, self.point, u, create_graph=True)
        u, pulled = self._forward
        return _gradient(pulled, u, v)

    def solve(self, cotangent: Tensor, transposed: bool) -> Tensor:
        """(1 - J^T)^-1 v, or (1 - J)^-1 v; rows that are not finite stay as they are."""
        finite = cotangent.isfinite().all(-1, keepdim=True)
        v = torch.where(finite, cotangent, 0.0)
        product = self.pull if transposed else self.push
        found = self.search_for(lambda u: product(u) + v, v)
        self._residual = found.residual
        return torch.where(finite, found.z, cotangent)

    def is_nothing(self, cotangent: Tensor, number: int) -> bool:
        """Whether what comes to a gate is what the searches of the gates above left over."""
        left = self._left if number < self.order else None
        if number in (1, self.order):  # the last gate of a pass, or the first
            self._left = None
        lengths = cotangent.norm(dim=-1)
        if left is None:
            return not lengths.any()
        return not (lengths > left).any()

    def let_pass(self, v: Tensor, u: Tensor) -> None:
        """Note what a search left of its equation, and rounding."""
        with torch.no_grad():
            rounding = _ROUNDING * torch.finfo(v.dtype).eps * (v.norm(dim=-1) + u.norm(dim=-1))
            left = rounding + 2 * self._residual
        self._left = left if self._left is None else self._left + left


def _gradient(y: Tensor, x: Tensor, cotangent: Tensor, create_graph: bool = False) -> Tensor:
    """J^T cotangent, zero where y does not depend on x."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(
        y, x, cotangent, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return torch.zeros_like(x) if gradient is None else gradient


class _Solved(torch.autograd.Function):
    """v -> (1 - J^T)^-1 v with J held fixed, or (1 - J)^-1 v; each is the backward of the other.

    Where v is nothing, up to rounding, it stays as it is.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, system: Linearised, transposed: bool, nothing: bool) -> Tensor:
        ctx.system, ctx.transposed = system, transposed
        return v.clone() if nothing else system.solve(v, transposed)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (w,) = cotangents
        return _Solved.apply(w, ctx.system, not ctx.transposed, False), None, None, None


class _Gate(torch.autograd.Function):
    """The value z, with the derivatives of below - (1 - J)^-1 (below - f(below)).

    ``number`` counts gates from the lowest, 1, to the highest, ``order``.
    """

    @staticmethod
    def forward(
        ctx: Any, below: Tensor, value: Tensor, z: Tensor, system: Linearised, number: int
    ) -> Tensor:
        ctx.system, ctx.number = system, number
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (v,) = cotangents
        system, number = ctx.system, ctx.number
        nothing, with_graph = system.is_nothing(v, number), torch.is_grad_enabled()
        if nothing and not with_graph:
            return None, torch.zeros_like(v), None, None, None  # hooks in f are to see a tensor
        if number == 1 and with_graph and not nothing:
            raise DifferentiationError(_order_message(system))
        # What is nothing has derivatives all the same.
        u = _Solved.apply(v, system, True, nothing)
        system.let_pass(v, u)
        return v - u, u, None, None, None


def _order_message(system: Linearised) -> str:
    return (
        f"expected at most {system.order} derivatives in a row of this fixed point of "
        f"{system.name}, but a graph of the last one was asked for (create_graph=True); pass "
        f"order={system.order + 1} to fixed_point"
    )


def attached(evaluate: Evaluate, z: Tensor, search_for: Search, name: str, order: int) -> Tensor:
    """z (B, n) with its derivatives up to the order, by all that f closes over.

    Returns z as it is where f depends on nothing that requires a gradient.
    """
    with torch.enable_grad():
        point, value, census = _evaluated(evaluate, z)
        if not census.attached:
            return z
        unfit = UNFIT if order <= 2 else UNFIT | UNFIT_THIRD
        fit = order == 1 or census.ops.isdisjoint(unfit)
        with nullcontext() if fit else composites():
            if not fit:
                point, value, census = _evaluated(evaluate, z)
            system = Linearised(point, value, search_for, name, order)
            result = _Gate.apply(z, value, z, system, 1)
            for number in range(2, order + 1):
                result = _Gate.apply(result, evaluate(result), z, system, number)
        return result


def _evaluated(evaluate: Evaluate, z: Tensor) -> tuple[Tensor, Tensor, Census]:
    """A point with a graph, the value of f there, and what is in its graph."""
    leaf = z.detach().requires_grad_()
    point = _Start.apply(leaf)
    value = evaluate(point)
    return point, value, take_census((value,), (leaf,))
