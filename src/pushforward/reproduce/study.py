"""A paper's experiment run for several seeds, and what that says about its claims."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pushforward.report.payload import strict
from pushforward.report.randomness import one_thread, seeded
from pushforward.report.words import number
from pushforward.reproduce.data import Images
from pushforward.reproduce.paper import Claim, Outcome, Paper, Progress


@dataclass(frozen=True)
class Spread:
    """Numbers for seeds: their mean, and their standard deviation, None for a single seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The arithmetic mean."""
        return math.fsum(self.values) / len(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds, with n - 1; NaN where a value is no finite number."""
        if len(self.values) < 2:
            return None
        finite = all(map(math.isfinite, self.values))
        return statistics.stdev(self.values) if finite else math.nan

    def __str__(self) -> str:
        deviation = self.deviation
        return number(self.mean) + ("" if deviation is None else f" ± {_two_digits(deviation)}")


def _two_digits(value: float) -> str:
    """A spread is not known to more digits."""
    return number(float(f"{value:.2g}"))


@dataclass(frozen=True)
class Finding:
    """A claim beside what was measured."""

    claim: Claim
    measured: Spread
    parts: Mapping[str, Spread]

    @property
    def holds(self) -> bool:
        """Whether the mean over seeds meets the criterion."""
        return self.claim.criterion.met(self.measured.mean)


@dataclass(frozen=True)
class Study:
    """All findings on one paper, every number by name, and the outcomes that figures draw."""

    paper: Paper
    images: Images
    settings: Any
    outcomes: tuple[Outcome, ...]
    findings: tuple[Finding, ...]
    numbers: Mapping[str, Spread]
    seconds: float


def study(
    paper: Paper,
    images: Images,
    seeds: int,
    settings: Any,
    progress: Progress = lambda done, total: None,
) -> Study:
    """Run ``paper`` for the seeds 0, 1, ...; the same numbers each time.

    ``progress(done, total)`` hears of the whole, in seeds.
    """
    started = time.monotonic()
    outcomes = tuple(
        _outcome(paper, images, settings, seed, _part(progress, seed, seeds))
        for seed in range(seeds)
    )
    numbers = {name: _spread(outcomes, _picked(name)) for name in outcomes[0].numbers}
    findings = tuple(_finding(claim, outcomes, numbers) for claim in paper.claims)
    seconds = time.monotonic() - started
    return Study(paper, images, settings, outcomes, findings, numbers, seconds)


def _outcome(paper: Paper, images: Images, settings: Any, seed: int, progress: Progress) -> Outcome:
    with seeded(seed), one_thread(), torch.enable_grad():
        return paper.measure(images, settings, progress)


def _part(progress: Progress, seed: int, seeds: int) -> Progress:
    return lambda done, total: progress(seed + done / total, seeds)


def _picked(name: str) -> Callable[[Mapping[str, float]], float]:
    return lambda numbers: numbers[name]


def _spread(outcomes: Sequence[Outcome], value: Callable[[Mapping[str, float]], float]) -> Spread:
    return Spread(tuple(float(value(outcome.numbers)) for outcome in outcomes))


def _finding(claim: Claim, outcomes: Sequence[Outcome], numbers: Mapping[str, Spread]) -> Finding:
    parts = {name: numbers[name] for name in claim.shown}
    return Finding(claim, _spread(outcomes, claim.value), parts)


# --- for machines -------------------------------------------------------------------------------


def payload(found: Study) -> dict[str, Any]:
    """The study as nested dicts, strict JSON once written."""
    return strict(
        {
            "title": found.paper.title,
            "data": found.images.name,
            "seeds": len(found.outcomes),
            "claims": [_claim(finding) for finding in found.findings],
            "numbers": {name: _values(spread) for name, spread in found.numbers.items()},
        }
    )


def _claim(finding: Finding) -> dict[str, Any]:
    return {
        "claim": finding.claim.text,
        "published": finding.claim.published,
        "measured": finding.measured.mean,
        "holds": finding.holds,
        "spread": finding.measured.deviation,
        "per_seed": finding.measured.values,
        "unit": finding.claim.unit,
        "criterion": str(finding.claim.criterion),
    }


def _values(spread: Spread) -> dict[str, Any]:
    return {"mean": spread.mean, "spread": spread.deviation, "per_seed": spread.values}
