"""What a paper claims, and how that is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pushforward.report.canvas import Picture
from pushforward.report.words import number
from pushforward.reproduce.data import Images

Progress = Callable[[float, float], None]


@dataclass(frozen=True)
class Outcome:
    """What was measured for one seed: numbers by name, and what the figures draw."""

    numbers: Mapping[str, float]
    drawn: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Criterion:
    """An interval that the mean over seeds must lie in; NaN lies in none."""

    low: float = -math.inf
    high: float = math.inf

    def met(self, mean: float) -> bool:
        """Whether ``mean`` lies in the interval, ends included."""
        return self.low <= mean <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"at least {number(self.low)}"
        if self.low == -math.inf:
            return f"at most {number(self.high)}"
        return f"{number(self.low)} to {number(self.high)}"


def at_least(low: float) -> Criterion:
    """The mean must not be below ``low``."""
    return Criterion(low=low)


def at_most(high: float) -> Criterion:
    """The mean must not be above ``high``."""
    return Criterion(high=high)


def between(low: float, high: float) -> Criterion:
    """The mean must lie from ``low`` to ``high``."""
    return Criterion(low, high)


@dataclass(frozen=True)
class Claim:
    """A statement about one number.

    ``published`` is what the paper reports and where it stands there, ``value`` takes the number
    out of those measured for a seed, and ``shown`` names those that it is made of.
    """

    text: str
    published: str
    value: Callable[[Mapping[str, float]], float]
    criterion: Criterion
    unit: str = ""
    shown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Paper:
    """A paper and the experiment that stands for it; the package says how to write one."""

    name: str
    title: str
    authors: str
    source: str
    summary: str
    data: str
    settings: Any
    quick: Any
    measure: Callable[[Images, Any, Progress], Outcome]
    figures: Callable[[Sequence[Outcome]], tuple[Picture, ...]]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()
    seeds: int = 3
