"""Gains and bounds from below, from a few random cotangents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.errors import InputError
from pushforward.estimate import student_quantile
from pushforward.path.dense import width
from pushforward.path.gains import accurate, followed
from pushforward.path.gains import gains as telescoped
from pushforward.path.pull import Passes, sample_norms
from pushforward.path.steps import Step

CONFIDENCE = 0.95
# From that many on, the spread of the probes says how far a gain is from its mean.
ENOUGH_FOR_SPREAD = 16
DIRECTIONS = 8


@dataclass(frozen=True, eq=False)
class Estimated:
    """log N_l = log ||d out / d h_l||_F and log gains, with intervals; ``(steps, samples)``.

    The squares of N_l are unbiased.
    """

    logs: Tensor
    gains: Tensor
    interval: tuple[Tensor, Tensor]
    gain_interval: tuple[Tensor, Tensor]


def estimated(
    passes: Passes,
    steps: Sequence[Step],
    samples: int,
    probes: int,
    generator: torch.Generator,
) -> Estimated:
    """Estimate all norms by E |J^T u|^2 = ||J||_F^2, u ~ N(0, I), with the same u at each place."""
    output = steps[-1].stop
    draw = torch.randn(probes, *output.shape, generator=generator, dtype=torch.float64)
    seeds = draw.to(output.device, output.dtype)
    logs = _rows_at_all(passes, steps, samples, seeds)
    norms = (2 * logs).logsumexp(dim=0).sub(math.log(probes)) / 2
    gains = telescoped(norms)
    # The last gain is the norm of the last step: undivided, and with an interval of its own.
    return Estimated(norms, gains, _interval(norms, probes), _gain_interval(logs, gains, norms))


def _rows_at_all(passes: Passes, steps: Sequence[Step], samples: int, seeds: Tensor) -> Tensor:
    """log |u^T J| by probe, place and sample: one backward pass for all, if numbers allow it."""
    places = [step.start for step in steps]
    rows = passes.pull_to_all(steps[-1].stop, places, seeds)
    norms = torch.stack([_row_norms(part, samples) for part in rows], dim=1)
    if accurate(norms, places):
        return norms.log()
    each = [followed(passes, steps, samples, seed[None]) for seed in seeds]
    return torch.stack(each)


def _row_norms(rows: Tensor, samples: int) -> Tensor:
    return torch.stack([sample_norms(row[None], samples) for row in rows])


def _interval(logs: Tensor, probes: int, confidence: float = CONFIDENCE) -> tuple[Tensor, Tensor]:
    """Where the truth lies: |J^T u|^2 is chi-squared of one degree for a J of rank one, which
    spreads most; the mean over the probes has one degree for each."""
    tail = (1 - confidence) / 2
    low, high = (chi_squared_quantile(p, probes) / probes for p in (tail, 1 - tail))
    return logs - math.log(high) / 2, logs - math.log(low) / 2


def _gain_interval(logs: Tensor, gains: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    if len(logs) < ENOUGH_FOR_SPREAD:
        return _from_both_ends(norms, len(logs))
    return _by_jackknife(logs, gains)


def _from_both_ends(norms: Tensor, probes: int) -> tuple[Tensor, Tensor]:
    """The intervals of both norms at once, whatever their dependence."""
    low, high = _interval(norms, probes, 1 - (1 - CONFIDENCE) / 2)
    one = torch.zeros_like(norms[:1])
    after_low, after_high = torch.cat([low[1:], one]), torch.cat([high[1:], one])
    return _without_nan(low - after_high), _without_nan(high - after_low)


def _without_nan(numbers: Tensor) -> Tensor:
    return torch.where(numbers.isnan(), 0.0, numbers)


def _by_jackknife(logs: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """Each gain without one of the probes, for all of them: their spread, times Student's t."""
    probes = len(logs)
    others = ~torch.eye(probes, dtype=torch.bool, device=logs.device)
    left_out = [(2 * logs[rest]).logsumexp(dim=0) / 2 for rest in others]
    values = torch.stack([telescoped(each - math.log(probes - 1) / 2) for each in left_out])
    spread = _without_nan(values - gains).square().sum(dim=0) * (probes - 1) / probes
    reach = student_quantile((1 + CONFIDENCE) / 2, probes - 1) * spread.sqrt()
    return gains - reach, gains + reach


def chi_squared_quantile(probability: float, freedom: int) -> float:
    """Invert the regularised incomplete gamma function by bisection."""

    def below(x: float) -> float:
        half = torch.tensor(freedom / 2, dtype=torch.float64)
        return float(torch.special.gammainc(half, torch.tensor(x / 2, dtype=torch.float64)))

    low, high = 0.0, 1.0
    while below(high) < probability:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if below(middle) < probability else (low, middle)
    return high


def log_sampled(
    passes: Passes, steps: Sequence[Step], samples: int, generator: torch.Generator
) -> Tensor:
    """A bound from below: the rows of J along a few orthonormal directions of the output.

    ||J||_F >= ||U^T J||_F for U^T U = I, whatever U is; with as many columns as there are outputs
    it is the norm.
    """
    output = steps[-1].stop
    size = width(output, samples)
    draw = torch.randn(size, min(size, DIRECTIONS), generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(draw).Q.T.to(output.device, output.dtype)
    seeds = directions[:, None, :].expand(-1, samples, -1).reshape(-1, *output.shape)
    return followed(passes, steps, samples, seeds)[0]


def checked_probes(probes: int | None) -> int | None:
    """Return the number of probes, which is positive; None is for the exact gains."""
    if probes is None or (isinstance(probes, int) and not isinstance(probes, bool) and probes > 0):
        return probes
    raise InputError(
        f"probes expects a positive number of random cotangents, got {probes!r}; None takes every "
        "output, and the gains are exact"
    )
