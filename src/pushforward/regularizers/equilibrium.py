"""The penalty that keeps equilibrium models near a contraction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import InputError, ShapeError
from pushforward.regularizers.jacobian import mean_squared_norm, pair_of
from pushforward.regularizers.pair import Pair
from pushforward.regularizers.randomness import Penalty, Source, checked_projections


class EquilibriumPenalty(Penalty):
    r"""The squared Frobenius norm of the Jacobian of an equilibrium map, per dimension.

    .. math::
        \frac{1}{B} \sum_b \frac{\|J_f(z_b)\|_F^2}{d}
        = \frac{1}{B} \sum_b E\, \frac{|\epsilon^\top J_f(z_b)|^2}{d}, \quad
        J_f = \frac{\partial f}{\partial z}

    with z held fixed, d scalars per sample. The spectral radius of J_f, which says whether and how
    fast z = f(z) can be solved, is at most its Frobenius norm.

    Args:
        projections: k orthonormal directions per sample, uniform on the sphere, at most d; k = d
            leaves nothing out. "exact" takes all d, and sees to it that samples are independent.
        probability: with which a call counts; else it returns 0 and does nothing. What counts is
            not scaled up, as in the paper: 0.5 halves the penalty in the mean, and its cost.
        schedule: step -> weight, where steps are the calls of this penalty, from 0, those that do
            not count among them. None is weight 1. The step is part of ``state_dict()``.
        seed: of a generator that belongs to this penalty.
        generator: drawn from instead; with neither of them torch's default generator is.

    The penalty is called in one of two ways, and returns ``()``; it trains the parameters of f and
    what else f closes over, never z:

    - ``penalty(f, z)`` with ``z``, ``(B, *state)``: evaluates f once; nothing of it stays visible
      (running statistics, modes, gradients). The cheaper way, if f(z) is not at hand.
    - ``penalty(z, f(z))`` with a ``z`` that requires gradients. What would reach z is taken away
      again, for one more backward pass.

    Cost: k backward passes with a graph, all at once, and one through them later.

    Raises:
        InputError: arguments that are neither of the two pairs, or out of range; more projections
            than d.
        ShapeError: f(z) is not laid out like z, or the batch is empty.
        GraphError: ``penalty(z, y)`` without a graph from ``z`` to ``y``.
        CouplingError: "exact" and samples that influence each other.
        DifferentiationError: an op in f that torch cannot differentiate twice.

    From Bai, Koltun and Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization", 2021,
    where epsilon is Gaussian; on the sphere of radius sqrt(d) the mean is the same and the variance
    is less.

    Example:
        >>> f = lambda z: 0.5 * z
        >>> round(EquilibriumPenalty()(f, torch.zeros(3, 4)).item(), 4)
        0.25
    """

    def __init__(
        self,
        projections: int | str = 1,
        probability: float = 1.0,
        schedule: Callable[[int], float] | None = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(seed, generator)
        checked_projections(projections)
        _check(probability, schedule)
        self.projections, self.probability, self.schedule = projections, probability, schedule
        self.step = 0

    def forward(
        self,
        f: Tensor | Callable[[Tensor], Any],
        z: Any,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The penalty on ``(f, z)``, or on a pair ``(z, f(z))``."""
        source = self._drawing(seed, generator)
        weight, counts = self._weight(), _happens(self.probability, source)
        if weight == 0 or not counts:
            return _zero_like(f if isinstance(f, Tensor) else z)
        detached = z.detach() if isinstance(z, Tensor) and not isinstance(f, Tensor) else z
        pair = pair_of(f, detached, source)
        _require_alike(pair)
        mean = mean_squared_norm(pair, checked_projections(self.projections), source)
        value = weight / pair.outputs * mean
        return _held_fixed(value, pair.x) if isinstance(f, Tensor) else value

    def _weight(self) -> float:
        step, self.step = self.step, self.step + 1
        if self.schedule is None:
            return 1.0
        weight = self.schedule(step)
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise InputError(
                f"schedule expects a function from the step to a finite number, got {weight!r} at "
                f"step {step}"
            )
        return float(weight)

    def get_extra_state(self) -> int:
        """How often the penalty was called, for ``state_dict()``."""
        return self.step

    def set_extra_state(self, state: int) -> None:
        """Go on from there."""
        self.step = state

    def extra_repr(self) -> str:
        return f"projections={self.projections!r}, probability={self.probability:g}"


def _check(probability: float, schedule: Any) -> None:
    if not (isinstance(probability, int | float) and 0 <= probability <= 1):
        raise InputError(f"probability expects a number between 0 and 1, got {probability!r}")
    if schedule is not None and not callable(schedule):
        raise InputError(
            f"schedule expects a function from the step to a weight, got {schedule!r}; multiply "
            "the penalty by a constant weight yourself"
        )


def _happens(probability: float, source: Source) -> bool:
    """Draw whether a call counts; where that is sure, nothing is drawn."""
    if probability in (0, 1):
        return probability == 1
    generator = source.generator
    device = "cpu" if generator is None else generator.device
    return bool(torch.rand((), generator=generator, device=device) < probability)


def _zero_like(z: Any) -> Tensor:
    if not isinstance(z, Tensor):
        raise InputError(f"expected z to be one tensor, got {type(z).__name__}")
    return torch.zeros((), dtype=z.dtype, device=z.device)


def _require_alike(pair: Pair) -> None:
    if pair.y.shape != pair.x.shape:
        raise ShapeError(
            f"expected f to return a state like z, {tuple(pair.x.shape)}, got "
            f"{tuple(pair.y.shape)}; for maps between different spaces take JacobianPenalty"
        )


def _held_fixed(value: Tensor, z: Tensor) -> Tensor:
    """The same value with no derivative by z, whatever z was computed from."""
    if not value.requires_grad:
        return value
    (by_z,) = torch.autograd.grad(value, z, retain_graph=True, allow_unused=True)
    return value if by_z is None else value - (by_z * (z - z.detach())).sum()
