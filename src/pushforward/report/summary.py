"""Means and quantiles over samples, which the pictures, the verdict and the JSON share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.report.measure import Measurement, Noise
from pushforward.report.words import DECADE


@dataclass(frozen=True)
class Range:
    """The middle of some numbers and the borders of their inner four fifths."""

    low: float
    middle: float
    high: float


def spread_over_samples(values: Tensor) -> Range:
    """The median of (B,) numbers with their first and last tenth; infinities count at their end."""
    ordered = values.double().sort().values
    return Range(*(_quantile(ordered, level) for level in (0.1, 0.5, 0.9)))


def _quantile(ordered: Tensor, level: float) -> float:
    """Linear between neighbours; the lower of them where the upper is infinite."""
    place = level * (len(ordered) - 1)
    below, above = ordered[math.floor(place)].item(), ordered[math.ceil(place)].item()
    if not math.isfinite(above) or not math.isfinite(below):
        return below if place % 1 < 0.5 else above
    return below + (above - below) * (place % 1)


def alive(measurement: Measurement) -> Tensor:
    """Which samples have a Jacobian that is not zero, (B,); logs are averaged over these."""
    return torch.isfinite(measurement.path.log_norm)


def mean_log(measurement: Measurement, values: Tensor) -> float:
    """The mean of (B,) logarithms over the samples that are `alive`; -inf where none is."""
    kept = values[alive(measurement)]
    return kept.mean().item() if len(kept) else -math.inf


@dataclass(frozen=True)
class Step:
    """A layer's means in decades. ``level`` is log10 ||d out/d h|| of the tensor before it.

    ``bound`` is the product of Frobenius norms from there to the output; ``mixed`` has one of them
    and spectral norms otherwise, and is None where not all of them are exact.
    """

    name: str
    gain: float
    level: float
    bound: float
    exact: bool
    mixed: float | None = None


def steps(measurement: Measurement) -> tuple[Step, ...]:
    """The layers from the input to the output."""
    layers = measurement.path.layers
    mixed = _mixed(measurement) if all(layer.exact for layer in layers) else None
    found: list[Step] = []
    level = 0.0
    for place in reversed(range(len(layers))):
        layer = layers[place]
        gain = mean_log(measurement, layer.log_gain) / DECADE
        level += gain
        bound = mean_log(measurement, layer.log_bound_so_far) / DECADE
        best = None if mixed is None else mixed[place]
        found.append(Step(layer.name, gain, level, bound, layer.exact, best))
    return tuple(reversed(found))


def _mixed(measurement: Measurement) -> list[float]:
    """From each layer to the output, one Frobenius norm at its best place, in decades."""
    spectral = torch.zeros_like(measurement.path.log_norm)
    least = torch.full_like(spectral, torch.inf)
    found: list[float] = []
    for layer in reversed(measurement.path.layers):
        least = torch.minimum(layer.log_fro + spectral, layer.log_spectral + least)
        spectral = spectral + layer.log_spectral
        found.append(mean_log(measurement, least) / DECADE)
    return found[::-1]


def best_rung(measurement: Measurement) -> str | None:
    """The certified rung that is nearest to the truth; None where none is certified."""
    certified = [name for name, is_bound in measurement.path.certified.items() if is_bound]
    return min(certified, key=lambda name: gap(measurement, name), default=None)


def gap(measurement: Measurement, rung: str = "frobenius") -> float:
    """Decades between a rung and the truth, the mean over samples; NaN where none is alive."""
    if not alive(measurement).any():
        return math.nan
    difference = measurement.path.rungs[rung] - measurement.path.log_norm
    return mean_log(measurement, difference) / DECADE


@dataclass(frozen=True)
class NoiseMean:
    """The response to noise at one sigma, the mean over samples and its interval."""

    sigma: float
    ratio: float
    low: float
    high: float
    linear: float

    @property
    def resolved(self) -> bool:
        """Whether the response is seen through what noise and rounding leave unsure."""
        return self.high - self.low <= self.ratio

    @property
    def curvature(self) -> float:
        """How far from linear the map is at this sigma: ratio / linear - 1."""
        if self.linear == 0:
            return 0.0 if self.ratio == 0 else math.inf
        return self.ratio / self.linear - 1


def noise_means(measurement: Measurement) -> tuple[NoiseMean, ...]:
    """One row for each sigma."""
    return tuple(_noise_mean(level) for level in measurement.noise)


def _noise_mean(level: Noise) -> NoiseMean:
    # The draws of different samples are independent, so that their errors add up in squares;
    # rounding may push all of them the same way.
    rounding = _rounding(level)
    above = _together(level.high - level.ratio - rounding)
    below = _together(level.ratio - level.low - rounding)
    ratio, shift = level.ratio.mean().item(), rounding.mean().item()
    return NoiseMean(
        level.sigma,
        ratio,
        max(0.0, ratio - below - shift),
        ratio + above + shift,
        level.linear.mean().item(),
    )


def _rounding(level: Noise) -> Tensor:
    """What widens both ends of an interval, (B,): skewness widens one, and 0 may cut the lower."""
    above = level.high - level.ratio - level.spread
    below = level.ratio - level.low - level.spread
    return torch.where(level.low > 0, torch.minimum(above, below), above).clamp_min(0)


def _together(reaches: Tensor) -> float:
    return reaches.clamp_min(0).square().sum().sqrt().item() / len(reaches)
