"""A number that was estimated, together with how far it can be trusted."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

from torch import Tensor

from pushforward.errors import InputError


@dataclass(frozen=True, repr=False, eq=False)
class Estimate:
    """An estimate, its standard error and an interval that covers the truth.

    Attributes:
        value: the estimate; ``()`` for one map, ``(B,)`` for a batch.
        stderr: standard error of ``value``, of the same shape.
        interval: lower and upper end, each shaped like ``value``; they hold the truth with
            probability ``confidence``, entry by entry, where ``converged`` is true.
        passes: how often the map or one of its derivatives was evaluated.
        probes: the number of independent draws behind the estimate.
        method: how it was made.
        unbiased: whether the mean of ``value`` over all draws is the truth.
        converged: False where the interval does not keep its promise.
        seed: reproduces the same bits; None where the caller passed a generator.
        confidence: of the interval.

    >>> import torch
    >>> ends = (torch.tensor(22.16), torch.tensor(22.68))
    >>> Estimate(torch.tensor(22.42), torch.tensor(0.13), ends, 65, 64, "hutchinson", seed=7)
    22.42 ± 0.13 (95 % in [22.16, 22.68]; 64 probes, hutchinson, seed 7)
    """

    value: Tensor
    stderr: Tensor
    interval: tuple[Tensor, Tensor]
    passes: int
    probes: int
    method: str
    unbiased: bool = True
    converged: bool = True
    seed: int | None = None
    confidence: float = 0.95

    def __repr__(self) -> str:
        return f"{self._number()} ({self._trust()}; {self._origin()})"

    def _repr_html_(self) -> str:
        text = f"<b>{html.escape(self._number())}</b>"
        return f"{text} <small>{html.escape(f'({self._trust()}; {self._origin()})')}</small>"

    def _number(self) -> str:
        if self.value.numel() == 1:
            return with_error(self.value.item(), self.stderr.item())
        if self.value.numel() == 0:
            return f"no samples, shape {tuple(self.value.shape)}"
        low, high, worst = self.value.min(), self.value.max(), self.stderr.max()
        count = "×".join(str(size) for size in self.value.shape)
        return f"{count} values from {_short(low)} to {_short(high)}, each ± {worst:.2g} or less"

    def _trust(self) -> str:
        confidence = f"{100 * self.confidence:g} %"
        if not self.converged:
            return f"not converged, no {confidence} interval"
        if self.value.numel() != 1:
            return f"{confidence} intervals"
        digits = _decimals(self.stderr.item())
        low, high = (_fixed(end.item(), digits) for end in self.interval)
        return f"{confidence} in [{low}, {high}]"

    def _origin(self) -> str:
        parts = [f"{self.probes} probes", self.method]
        parts += [] if self.unbiased else ["biased"]
        parts += [] if self.seed is None else [f"seed {self.seed}"]
        return ", ".join(parts)


def with_error(value: float, error: float) -> str:
    """Write a number with as many decimals as its standard error has two digits for."""
    digits = _decimals(error)
    return f"{_fixed(value, digits)} ± {_fixed(error, digits)}"


def _decimals(error: float) -> int | None:
    """Decimals that show two digits of an error; None where fixed notation does not suit."""
    if not math.isfinite(error) or error <= 0:
        return None
    decimals = 1 - math.floor(math.log10(error))
    return decimals if 0 <= decimals <= 6 else None


def _fixed(number: float, decimals: int | None) -> str:
    if decimals is None or not math.isfinite(number) or abs(number) >= 1e9:
        return _short(number)
    return f"{number:.{decimals}f}"


def _short(number: Tensor | float) -> str:
    return f"{float(number):.4g}"


def student_quantile(probability: float, freedom: float) -> float:
    """Return the quantile of Student's t distribution, to about 1e-10 in probability.

    Found by bisection on the distribution function, which is monotone, so that it cannot fail.

    Raises:
        InputError: a probability outside (0, 1), or ``freedom`` that is not positive.

    >>> round(student_quantile(0.975, 10), 6)
    2.228139
    """
    if not 0 < probability < 1:
        raise InputError(
            f"a quantile needs a probability between 0 and 1, got {probability}; "
            "a confidence of 95 % is written 0.95"
        )
    if not freedom > 0:
        raise InputError(f"Student's t needs positive degrees of freedom, got {freedom}")
    if probability < 0.5:
        return -student_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while student_upper_tail(high, freedom) > 1 - probability:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        too_low = student_upper_tail(middle, freedom) > 1 - probability
        low, high = (middle, high) if too_low else (low, middle)
    return high


def student_upper_tail(t: float, freedom: float) -> float:
    """Return P(T > t) for t >= 0: half of the incomplete beta function I_z(freedom/2, 1/2)."""
    return 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def _incomplete_beta(a: float, b: float, z: float) -> float:
    """Return the regularised I_z(a, b), from the side where its continued fraction is quick."""
    if z in (0.0, 1.0):
        return z
    if z > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - z)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(z) + b * math.log1p(-z)
    return math.exp(log_front) / (a * _beta_fraction(a, b, z))


def _beta_fraction(a: float, b: float, z: float) -> float:
    """Evaluate 1 + d1/(1 + d2/(1 + ...)) by Lentz's method (NIST DLMF 8.17.22)."""
    value = numerator = 1.0
    denominator = 0.0
    for step in range(1, 10_000):
        term = _beta_term(a, b, z, step)
        denominator = 1 / (1 + term * denominator)
        numerator = 1 + term / numerator
        value *= numerator * denominator
        if abs(numerator * denominator - 1) < 1e-15:
            break
    return value


def _beta_term(a: float, b: float, z: float, step: int) -> float:
    half, odd = divmod(step, 2)
    if odd:
        return -(a + half) * (a + b + half) * z / ((a + step - 1) * (a + step))
    return half * (b - half) * z / ((a + step - 1) * (a + step))
