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
from pushforward.derivatives import jacobian
from pushforward.errors import InputError, ShapeError
from pushforward.estimate import Estimate, student_quantile
from pushforward.jacobians import Jacobian
from pushforward.purity import RandomState, untouched

CONFIDENCE = 0.95
DEFAULT_SAMPLES = 256
# Below this many pairs the measured coverage of the interval falls short of 95 %.
ENOUGH_PAIRS = 32
# Both limits depend on shapes alone, so that a seed gives the same bits on every run.
STACKED_SCALARS = 2**18  # input scalars that go through f in one call
MATRIX_SCALARS = 2**24  # entries of the Jacobian up to which it is held whole


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
    Tikhonov regularization", 1995). The ratio is the mean of |f(x+e) - f(x)|^2 / |e|^2 over noise
    drawn with density proportional to |e|^2 times the Gaussian one, which has no heavy tail and is
    exactly ||J u||^2, u a random direction, where f is linear. Noise comes in pairs e, -e. The
    control variate |J e|^2 / |e|^2, whose mean ||J||_F^2 / n is known, takes away the spread that
    a linear map would have; its coefficient is fitted on one half of the pairs and used on the
    other, so that the ratio stays unbiased. The interval is the hull of Student's and of Hall's,
    which allows for skewness (Hall, "On the removal of skewness by transformation", 1992), and is
    widened by what rounding of f's results can do.

    Args:
        f: a map from one tensor to a tensor or pytree of tensors. Where it draws random numbers
            (dropout), every evaluation sees the same ones.
        x: the point, ``in.shape``, or ``(B, *in)`` with ``batch_dim=0``; real floating point.
        sigma: standard deviation of each coordinate of the noise, in the units of ``x``.
        samples: how often f is evaluated at a noisy point; even, at least 4; 256 if None. Below 64
            the interval falls short of its promise, and ``ratio.converged`` is False.
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
    count = _pairs(samples)
    sigma = _checked_sigma(sigma)
    _check_point(x, batch_dim)
    source, seed = _source(seed, generator, x.device)
    point = x.detach()
    derivative = _Derivative.at(f, point, batch_dim)
    probe = _Probe.of(f, point, batch_dim)
    seen, control = _measure(probe, derivative, sigma, source, count)
    value, stderr, interval = _controlled(
        seen, control, derivative.linear, 100 * torch.finfo(x.dtype).eps
    )
    rounding = probe.rounding(value, derivative.inputs * sigma**2)
    ratio = Estimate(
        value=value,
        stderr=stderr,
        interval=((interval[0] - rounding).clamp(min=0), interval[1] + rounding),
        passes=2 * count + 1,
        probes=2 * count,
        method="antithetic pairs, linear control variate",
        converged=count >= ENOUGH_PAIRS and bool((rounding <= 0.5 * value).all()),
        seed=seed,
        confidence=CONFIDENCE,
    )
    curvature = _curvature(value, derivative.linear)
    return NoiseResponse(ratio, derivative.linear, curvature, sigma)


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
    try:
        number = float(sigma)
    except (TypeError, ValueError):
        number = math.nan
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
    if seed is not None and not isinstance(seed, int):
        raise InputError(f"seed expects a whole number, got {seed!r}; leave it out for a fresh one")
    chosen = secrets.randbits(32) if seed is None else seed
    return torch.Generator(device=device).manual_seed(chosen), chosen


def _draw(
    point: Tensor, sigma: float, source: torch.Generator, batched: bool
) -> tuple[Tensor, Tensor]:
    """Return x + e and x - e, with e of density |e|^2 times the Gaussian one."""
    # Half precision has too few bits to draw from, not to add.
    dtype = torch.float32 if point.dtype.itemsize < 4 else point.dtype
    gauss = torch.randn(point.shape, generator=source, dtype=dtype, device=point.device)
    more = torch.randn((2, *point.shape[:1]), generator=source, dtype=dtype, device=point.device)
    if not batched:
        more = more.reshape(2, -1)[:, 0]
    # Two more degrees of freedom for the length turn chi^2_n into its size-biased law.
    square = _squares(gauss, batched)
    stretch = ((square + more.square().sum(dim=0)) / square).sqrt()
    noise = gauss * sigma * stretch.reshape(-1, *(1 for _ in point.shape[1:]) if batched else ())
    return (point + noise).to(point.dtype), (point - noise).to(point.dtype)


def _squares(tensor: Tensor, batched: bool) -> Tensor:
    """|tensor|^2 per sample, ``(B,)``; ``(1,)`` without a batch."""
    return _rows(tensor, 1).square().sum(dim=-1) if batched else tensor.square().sum()[None]


def _rows(tensor: Tensor, lead: int) -> Tensor:
    """Flatten all but the first ``lead`` dimensions, which may be all there are, or be empty."""
    return tensor.reshape(*tensor.shape[:lead], math.prod(tensor.shape[lead:]))


def _measure(
    probe: _Probe, derivative: _Derivative, sigma: float, source: torch.Generator, count: int
) -> tuple[Tensor, Tensor]:
    """Per pair, the mean of |f(x+-e) - f(x)|^2 / |e|^2, and |J e|^2 / |e|^2; ``(pairs, [B])``."""
    group = max(1, STACKED_SCALARS // max(1, 2 * probe.point.numel()))
    stacks: bool | None = None
    parts = []
    for first in range(0, count, group):
        wanted = range(first, min(first + group, count))
        pairs = [_draw(probe.point, sigma, source, probe.batched) for _ in wanted]
        if stacks is None:
            stacks = group > 1 and probe.stacks(pairs[0])
        parts.append(_measured(probe, derivative, pairs, stacks))
    seen, control = zip(*parts, strict=True)
    return torch.cat(seen), torch.cat(control)


def _measured(
    probe: _Probe, derivative: _Derivative, pairs: list[tuple[Tensor, Tensor]], stacks: bool
) -> tuple[Tensor, Tensor]:
    """The same for a group of pairs."""
    noisy = torch.stack([point for pair in pairs for point in pair])
    values = probe.stacked(noisy) if stacks else torch.stack([probe.at(one) for one in noisy])
    changes = (values - probe.value).square().sum(dim=-1)
    # The noise that f saw, which rounding of x + e made differ from what was drawn.
    noise = probe.flat(noisy - probe.point)
    ratios = changes / noise.square().sum(dim=-1)
    middle = (noise[0::2] - noise[1::2]) / 2
    control = derivative.squared_products(middle) / middle.square().sum(dim=-1)
    return ratios.unflatten(0, (-1, 2)).mean(dim=1), control


def _controlled(
    seen: Tensor, control: Tensor, mean: Tensor, accuracy: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return mean, standard error and interval after the control variate is taken out."""
    pairs = len(seen)
    surplus = control - mean
    if pairs < 8:  # too few to fit a coefficient; 1 is right for a linear map, unbiased for all
        adjusted = seen - surplus
    else:
        halves = [slice(0, None, 2), slice(1, None, 2)]
        slopes = [_slope(seen[half], control[half], accuracy) for half in halves]
        adjusted = torch.cat(
            [
                seen[half] - slope * surplus[half]
                for half, slope in zip(halves, reversed(slopes), strict=True)
            ]
        )
    return _mean_with_interval(adjusted)


def _mean_with_interval(draws: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Mean over dimension 0, its standard error, and the hull of two intervals."""
    count, centre = len(draws), draws.mean(dim=0)
    spread = ((draws - centre).square().sum(dim=0) / (count - 1)).sqrt()
    stderr = spread / math.sqrt(count)
    cubes = ((draws - centre) ** 3).mean(dim=0)
    skewness = torch.where(spread > 0, cubes / spread**3, 0.0)
    reach = student_quantile((1 + CONFIDENCE) / 2, count - 1)
    ends = [centre - stderr * _unskewed(sign * reach, skewness, count) for sign in (1, -1)]
    low = torch.minimum(centre - reach * stderr, ends[0])
    return centre, stderr, (low, torch.maximum(centre + reach * stderr, ends[1]))


def _unskewed(quantile: float, skewness: Tensor, count: int) -> Tensor:
    """Turn a quantile of a symmetric law into one of the studentised mean of skewed draws."""
    tilt = skewness / math.sqrt(count)
    inner = 1 + tilt * (quantile - tilt / 6)
    bent = 3 / torch.where(tilt == 0, 1.0, tilt) * (inner.sign() * inner.abs() ** (1 / 3) - 1)
    return torch.where(tilt.abs() < 1e-6, quantile, bent)


def _slope(response: Tensor, control: Tensor, accuracy: float) -> Tensor:
    """Return the regression coefficient over dimension 0; 0 where only rounding varies."""
    centred = control - control.mean(dim=0)
    spread = centred.square().sum(dim=0)
    flat = spread <= accuracy**2 * control.square().sum(dim=0)
    together = (centred * (response - response.mean(dim=0))).sum(dim=0)
    return torch.where(flat, 0.0, together / torch.where(flat, 1.0, spread))


@dataclass(frozen=True)
class _Derivative:
    """J at the point, whole where it is small enough."""

    operator: Jacobian
    matrix: Tensor | None
    linear: Tensor
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
        linear = norm.detach().double().square() / inputs
        return _Derivative(operator, matrix, linear, inputs, batch_dim == 0)

    def squared_products(self, directions: Tensor) -> Tensor:
        """|J e|^2 for each direction, ``(draws, [B], n) -> (draws, [B])``."""
        columns = directions.movedim(0, -1)
        with torch.no_grad():
            matrix = self.operator if self.matrix is None else self.matrix
            product = matrix @ columns.to(self.operator.dtype if self.matrix is None else None)
        return product.double().square().sum(dim=-2).movedim(-1, 0)


def _joined(tree: Any, batched: bool) -> Tensor:
    """All scalars of an output in float64, ``(m,)``, or ``(B, m)``; complex ones as two reals."""
    values, layout = Layout.of(tree, 0 if batched else None, "output")
    parts = [as_real(value).detach().double() for value in layout.select(values)]
    return torch.cat([_rows(part, 1 if batched else 0) for part in parts], dim=-1)


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

    def flat(self, noise: Tensor) -> Tensor:
        """``(draws, *x.shape) -> (draws, [B], n)``, in float64."""
        return _rows(noise.double(), 2 if self.batched else 1)

    def at(self, noisy: Tensor) -> Tensor:
        return _evaluate(self.function, noisy, self.batched, self.state)

    def stacked(self, noisy: Tensor) -> Tensor:
        """All draws in one call, ``(draws, B, *in) -> (draws, B, m)``."""
        return self.at(noisy.flatten(0, 1)).unflatten(0, noisy.shape[:2])

    def stacks(self, pair: tuple[Tensor, Tensor]) -> bool:
        """Whether f treats the rows of a longer batch as it treats them here."""
        if not self.batched or not len(self.point) or self._draws_random_numbers():
            return False
        apart = torch.stack([self.at(noisy) for noisy in pair])
        try:
            together = self.stacked(torch.stack(pair))
        except Exception:  # a map written for one size of batch may fail in any way it likes
            return False
        slack = 100 * torch.finfo(self.point.dtype).eps * apart.abs().amax()
        return together.shape == apart.shape and bool(((together - apart).abs() <= slack).all())

    def _draws_random_numbers(self) -> bool:
        """Whether f draws: a longer batch would get other numbers than f(x) got."""
        with untouched(self.function, self.state), torch.no_grad():
            self.function(self.point.clone())
            after = RandomState.now()
        before = (self.state.cpu, *self.state.cuda)
        pairs = zip(before, (after.cpu, *after.cuda), strict=False)
        return not all(torch.equal(one, other) for one, other in pairs)

    def rounding(self, ratio: Tensor, scale: float) -> Tensor:
        """How far rounding of f's results alone can move the ratio."""
        error = self.value.norm(dim=-1) * torch.finfo(self.point.dtype).eps / math.sqrt(scale)
        return error * (2 * ratio.clamp(min=0).sqrt() + error)


def _evaluate(
    f: Callable[[Tensor], Any], point: Tensor, batched: bool, state: RandomState
) -> Tensor:
    """f at a point without a graph, ``(m,)``, or ``(B, m)``; nothing of it stays visible."""
    with untouched(f, state), torch.no_grad():
        value = _joined(f(point.clone()), batched)
    if not value.isfinite().all():
        raise InputError(
            f"noise_response expects f to be finite at x + e, got {_worst(value)}; take a smaller "
            "sigma, or an x further from the border of f's domain"
        )
    return value


def _worst(value: Tensor) -> str:
    return "NaN" if bool(value.isnan().any()) else "inf"
