"""How a map answers to Gaussian noise of a finite size, beside what its Jacobian predicts."""

from __future__ import annotations

import html
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pushforward.boundary import Layout, as_real
from pushforward.errors import InputError, ShapeError
from pushforward.estimate import Estimate, student_quantile
from pushforward.jacobians import Jacobian, jacobian
from pushforward.purity import RandomState, modules_of, untouched

CONFIDENCE = 0.95
DEFAULT_SAMPLES = 128
# Both limits depend on shapes alone, so that a seed gives the same bits on every run.
STACKED_SCALARS = 2**18  # input scalars that go through f in one call
MATRIX_SCALARS = 2**25  # entries of the Jacobian up to which it is held whole


@dataclass(frozen=True, repr=False, eq=False)
class NoiseResponse:
    """What `noise_response` returns; every tensor is ``()``, or ``(B,)`` with ``batch_dim=0``.

    Attributes:
        ratio: the estimate of E|f(x+e) - f(x)|^2 / E|e|^2.
        linear: ||J||_F^2 / n, what the ratio tends to as sigma -> 0; exact.
        curvature: ratio / linear - 1. Where ``linear`` is 0 it is 0 if the ratio is 0 too,
            otherwise inf; never NaN.
        sigma: the standard deviation of each coordinate of e.
    """

    ratio: Estimate
    linear: Tensor
    curvature: Tensor
    sigma: float

    def __repr__(self) -> str:
        return (
            f"NoiseResponse(sigma={self.sigma:g}, ratio={self.ratio}, "
            f"linear={_summary(self.linear)}, curvature={_summary(self.curvature)})"
        )

    def _repr_html_(self) -> str:
        rows = {
            "sigma": html.escape(f"{self.sigma:g}"),
            "ratio": self.ratio._repr_html_(),
            "linear": html.escape(_summary(self.linear)),
            "curvature": html.escape(_summary(self.curvature)),
        }
        cells = "".join(f"<tr><th>{name}</th><td>{cell}</td></tr>" for name, cell in rows.items())
        return f"<table>{cells}</table>"


def _summary(numbers: Tensor) -> str:
    if numbers.numel() == 1:
        return f"{numbers.item():.4g}"
    if numbers.numel() == 0:
        return "none"
    return f"{numbers.min().item():.4g} to {numbers.max().item():.4g}"


def noise_response(
    f: Callable[[Tensor], Any],
    x: Tensor,
    sigma: float,
    samples: int | None = None,
    batch_dim: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> NoiseResponse:
    r"""Measure how much a map amplifies Gaussian noise, and how far from linear it is there.

    .. math::
        \frac{E|f(x+e) - f(x)|^2}{E|e|^2}, \quad e \sim N(0, \sigma^2 I_n), \quad E|e|^2 = n\sigma^2

    It tends to ||J||_F^2 / n as sigma -> 0 (Bishop, "Training with noise is equivalent to
    Tikhonov regularization", 1995). Noise comes in pairs e, -e. The control variate
    |J e|^2 / (n sigma^2), whose mean is known, takes away the spread that a linear map would
    have; its coefficient is fitted on one half of the pairs and used on the other, so that the
    ratio stays unbiased. The interval is Student's, widened by what rounding in f can do.

    Args:
        f: a map from one tensor to a tensor or pytree of tensors. Where it draws random numbers
            (dropout), every evaluation sees the same ones.
        x: the point, ``in.shape``, or ``(B, *in)`` with ``batch_dim=0``; real floating point.
        sigma: standard deviation of each coordinate of the noise, in the units of ``x``.
        samples: how often f is evaluated at a noisy point; even, at least 4; 128 if None.
        batch_dim: None for one map, 0 for a batch of independent samples. A batch goes through f
            in stacks of several draws where f allows that, otherwise draw by draw.
        seed: same seed, same bits. Without one a fresh seed is drawn and stands in ``ratio.seed``.
        generator: instead of ``seed``; on the device of ``x``.

    Returns:
        `NoiseResponse` with ``.ratio``, ``.linear`` and ``.curvature``, in float64 and detached:
        this is a measurement, not a training loss.

    Cost: ``samples + 1`` evaluations of f without a graph (three more to see whether a batch may
    be stacked) and the Jacobian: min(m, n) backward passes.

    Raises:
        InputError: ``x`` is not a real floating-point tensor, ``sigma`` or ``samples`` is out of
            range, both ``seed`` and ``generator`` were given, or f is not finite near ``x``.
        ShapeError: ``x`` holds no scalars.
        CouplingError: samples of a batch influence each other.

    >>> weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> response = noise_response(lambda x: weight @ x, torch.zeros(2), sigma=0.1, seed=0)
    >>> round(response.linear.item(), 4), round(response.ratio.value.item(), 4)
    (12.5, 12.5)
    """
    pairs = _pairs(samples)
    sigma = _checked_sigma(sigma)
    _check_point(x, batch_dim)
    source, seed = _source(seed, generator, x.device)
    point = x.detach()
    derivative = _Derivative.at(f, point, batch_dim)
    probe = _Probe.of(f, point, batch_dim)
    directions = [_draw(point, sigma, source) for _ in range(pairs)]
    scale = derivative.inputs * sigma**2
    seen, linear_part = _measure(probe, derivative, directions)
    value, stderr = _controlled(seen / scale, linear_part / scale, derivative.mean_square)
    rounding = probe.rounding(value, scale)
    reach = student_quantile((1 + CONFIDENCE) / 2, pairs - 1) * stderr + rounding
    ratio = Estimate(
        value=value,
        stderr=stderr,
        interval=((value - reach).clamp(min=0), value + reach),
        passes=2 * pairs + 1,
        probes=2 * pairs,
        method="antithetic pairs, linear control variate",
        converged=bool((rounding <= 0.5 * value).logical_or(value == 0).all()),
        seed=seed,
        confidence=CONFIDENCE,
    )
    linear = derivative.mean_square
    return NoiseResponse(ratio, linear, _curvature(value, linear), sigma)


def _curvature(ratio: Tensor, linear: Tensor) -> Tensor:
    """ratio / linear - 1, with 0 for 0/0 and inf for a response that J does not see at all."""
    flat = torch.where(ratio == 0, torch.zeros_like(ratio), torch.full_like(ratio, math.inf))
    return torch.where(linear == 0, flat, ratio / torch.where(linear == 0, 1.0, linear) - 1)


def _pairs(samples: int | None) -> int:
    if samples is None:
        return DEFAULT_SAMPLES // 2
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 4 or samples % 2:
        raise InputError(
            f"samples expects an even number of at least 4, got {samples!r}; noise is drawn in "
            "pairs e, -e, and one pair shows no spread"
        )
    return samples // 2


def _checked_sigma(sigma: float) -> float:
    number = float(sigma)
    if not (math.isfinite(number) and number > 0):
        raise InputError(
            f"sigma expects a positive finite number, got {sigma!r}; for the limit sigma -> 0 "
            "take the exact .linear of any sigma"
        )
    return number


def _check_point(x: Tensor, batch_dim: int | None) -> None:
    if not isinstance(x, Tensor):
        raise InputError(
            f"noise_response expects x to be one tensor, got {type(x).__name__}; "
            "wrap f so that it takes one tensor, for instance its inputs joined"
        )
    if not x.is_floating_point():
        raise InputError(
            f"noise_response expects a real floating-point x, got {x.dtype}; convert it, "
            "or view complex numbers as pairs of reals"
        )
    sample = x.shape[1:] if batch_dim == 0 else x.shape
    if math.prod(sample) == 0:
        raise ShapeError(
            f"noise_response expects at least one scalar to add noise to, got {tuple(x.shape)}"
        )


def _source(
    seed: int | None, generator: torch.Generator | None, device: torch.device
) -> tuple[torch.Generator, int | None]:
    """Return the generator to draw from, and the seed to report."""
    if seed is not None and generator is not None:
        raise InputError("expected seed= or generator=, got both; a generator holds its own seed")
    if generator is not None:
        return generator, None
    chosen = secrets.randbits(32) if seed is None else int(seed)
    return torch.Generator(device=device).manual_seed(chosen), chosen


def _draw(point: Tensor, sigma: float, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return x + e and x - e."""
    # Half precision has too few bits to draw from, not to add.
    drawn = torch.float32 if point.dtype.itemsize < 4 else point.dtype
    noise = torch.randn(point.shape, generator=source, dtype=drawn, device=point.device) * sigma
    return (point + noise).to(point.dtype), (point - noise).to(point.dtype)


def _measure(
    probe: _Probe, derivative: _Derivative, directions: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Per pair, the mean of |f(x+-e) - f(x)|^2, and |J e|^2; both ``(pairs, [B])``."""
    flat = [noisy for pair in directions for noisy in pair]
    squares = probe.squared_changes(flat).unflatten(0, (-1, 2)).mean(dim=1)
    # The noise that f saw, which rounding of x + e made differ from what was drawn.
    effective = [(plus - minus) / 2 for plus, minus in directions]
    return squares, derivative.squared_products(effective)


def _controlled(seen: Tensor, control: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard error over pairs after the control variate is taken out."""
    pairs = len(seen)
    surplus = control - mean
    if pairs < 4:  # too few to fit a coefficient; 1 is right for a linear map and unbiased for all
        adjusted = seen - surplus
    else:
        halves = [slice(0, None, 2), slice(1, None, 2)]
        coefficients = [_slope(seen[half], control[half]) for half in halves]
        adjusted = torch.cat(
            [
                seen[half] - other * surplus[half]
                for half, other in zip(halves, reversed(coefficients), strict=True)
            ]
        )
    return adjusted.mean(dim=0), adjusted.std(dim=0) / math.sqrt(pairs)


def _slope(response: Tensor, control: Tensor) -> Tensor:
    """Return the regression coefficient over dimension 0; 0 where the control does not vary."""
    centred = control - control.mean(dim=0)
    spread = centred.square().sum(dim=0)
    flat = spread == 0
    together = (centred * (response - response.mean(dim=0))).sum(dim=0)
    return torch.where(flat, 0.0, together / torch.where(flat, 1.0, spread))


@dataclass(frozen=True)
class _Derivative:
    """J at the point, whole where it is small enough."""

    operator: Jacobian
    matrix: Tensor | None
    mean_square: Tensor
    inputs: int
    batched: bool

    @staticmethod
    def at(f: Callable[[Tensor], Any], point: Tensor, batch_dim: int | None) -> _Derivative:
        with torch.no_grad():
            operator = jacobian(f, point, batch_dim=batch_dim)
            outputs, inputs = operator.shape
            samples = len(point) if batch_dim == 0 else 1
            whole = samples * outputs * inputs <= MATRIX_SCALARS
            matrix = operator.matrix().detach().double() if whole else None
            norm = operator.fro_norm() if matrix is None else matrix.norm(dim=(-2, -1))
        mean_square = norm.detach().double().square() / inputs
        return _Derivative(operator, matrix, mean_square, inputs, batch_dim == 0)

    def squared_products(self, directions: list[Tensor]) -> Tensor:
        """|J e|^2 for each direction, ``(draws, [B])``."""
        if self.matrix is None:
            return torch.stack([self._one(direction) for direction in directions])
        start = 1 if self.batched else 0
        flat = torch.stack([d.double().flatten(start) for d in directions], dim=-1)
        return (self.matrix @ flat).square().sum(dim=-2).movedim(-1, 0)

    def _one(self, direction: Tensor) -> Tensor:
        with torch.no_grad():
            product = self.operator @ direction
        return _joined(product, self.batched).square().sum(dim=-1)


def _joined(tree: Any, batched: bool) -> Tensor:
    """All scalars of an output in float64, ``(m,)``, or ``(B, m)``; complex ones as two reals."""
    values, layout = Layout.of(tree, 0 if batched else None, "output")
    parts = [as_real(value).detach().double() for value in layout.select(values)]
    return torch.cat([part.flatten(1 if batched else 0) for part in parts], dim=-1)


@dataclass(frozen=True)
class _Probe:
    """A map that is evaluated beside a point, each time with the same random numbers inside."""

    function: Callable[[Tensor], Any]
    point: Tensor
    batched: bool
    state: RandomState
    value: Tensor

    @staticmethod
    def of(f: Callable[[Tensor], Any], point: Tensor, batch_dim: int | None) -> _Probe:
        batched, state = batch_dim == 0, RandomState.now()
        return _Probe(f, point, batched, state, _evaluate(f, point, batched, state))

    def at(self, noisy: Tensor) -> Tensor:
        return _evaluate(self.function, noisy, self.batched, self.state)

    def squared_changes(self, noisy: list[Tensor]) -> Tensor:
        """|f(x + e) - f(x)|^2 for each noisy point, ``(draws, [B])``."""
        draws = self._draws_per_stack(noisy[:2])
        parts = [
            self._stacked(noisy[i : i + draws]) if draws > 1 else self.at(noisy[i]).unsqueeze(0)
            for i in range(0, len(noisy), draws)
        ]
        return torch.cat([(part - self.value).square().sum(dim=-1) for part in parts])

    def _stacked(self, noisy: list[Tensor]) -> Tensor:
        return self.at(torch.cat(noisy)).unflatten(0, (len(noisy), -1))

    def _draws_per_stack(self, trial: list[Tensor]) -> int:
        """How many draws go through f in one call; 1 where f does not treat rows one by one."""
        fits = STACKED_SCALARS // max(1, self.point.numel())
        if not self.batched or fits < 2 or not len(self.point) or self._draws_random_numbers():
            return 1
        return fits if self._stacks(trial) else 1

    def _draws_random_numbers(self) -> bool:
        """Whether f draws: a longer batch would get other numbers than f(x) got."""
        with untouched(modules_of(self.function), self.state), torch.no_grad():
            self.function(self.point.clone())
            return not torch.equal(RandomState.now().cpu, self.state.cpu)

    def _stacks(self, trial: list[Tensor]) -> bool:
        apart = torch.stack([self.at(noisy) for noisy in trial])
        try:
            together = self._stacked(trial)
        except Exception:  # a map written for one size of batch may fail in any way it likes
            return False
        slack = 1e3 * torch.finfo(self.point.dtype).eps * (1 + apart.abs().amax())
        return together.shape == apart.shape and bool(((together - apart).abs() <= slack).all())

    def rounding(self, ratio: Tensor, scale: float) -> Tensor:
        """How far rounding of f's results alone can move the ratio."""
        error = self.value.norm(dim=-1) * torch.finfo(self.point.dtype).eps / math.sqrt(scale)
        return error * (2 * ratio.clamp(min=0).sqrt() + error)


def _evaluate(
    f: Callable[[Tensor], Any], point: Tensor, batched: bool, state: RandomState
) -> Tensor:
    """f at a point without a graph, ``(m,)``, or ``(B, m)``; nothing of it stays visible."""
    with untouched(modules_of(f), state), torch.no_grad():
        value = _joined(f(point.clone()), batched)
    if not value.isfinite().all():
        raise InputError(
            f"noise_response expects f to be finite at x + e, got {_worst(value)}; take a smaller "
            "sigma, or an x further from the border of f's domain"
        )
    return value


def _worst(value: Tensor) -> str:
    return "NaN" if bool(value.isnan().any()) else "inf"
