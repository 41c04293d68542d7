"""The numbers in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from pushforward.report.measure import Measurement
from pushforward.report.summary import (
    NoiseMean,
    Step,
    alive,
    gap,
    noise_means,
    spread_over_samples,
    steps,
)
from pushforward.report.words import number, percent, readable, share

NOTABLE = 0.05  # decades below which a gain or a gap is not worth a word
LINEAR_WITHIN = 0.1  # relative curvature up to which the response to noise counts as linear


@dataclass(frozen=True)
class Verdict:
    """One sentence for those in a hurry, and the others."""

    headline: str
    details: tuple[str, ...]


def verdict(measurement: Measurement, labels: Tensor | None = None) -> Verdict:
    """What a report says in words; ``labels``, (B,), are the true classes where they are known."""
    if not alive(measurement).any():
        return Verdict(
            "The output does not answer to the input at all: every Jacobian is zero. Look for dead "
            "units, a detach, or a constant output.",
            tuple(_details(measurement, labels)),
        )
    headline = f"{largest_step(steps(measurement))}; {bound_sentence(measurement)}."
    return Verdict(headline, tuple(_details(measurement, labels)))


# --- the path -----------------------------------------------------------------------------------


def largest_step(path: tuple[Step, ...]) -> str:
    """The layer that changes the norm of the derivative most, and its share in that."""
    # The last gain is the norm of the last step itself and no ratio, so it does not compete.
    rivals = path[:-1] or path
    top = max(rivals, key=lambda step: abs(step.gain))
    if abs(top.gain) < NOTABLE:
        return "No layer gains or loses notably"
    alike = [abs(step.gain) for step in rivals if step.gain * top.gain > 0]
    name, verb = readable(top.name), "gains" if top.gain > 0 else "loses"
    amount = f"{name} {verb} {number(abs(top.gain), places=1)} decades"
    if len(alike) == 1:
        return f"{amount}, the only layer that {verb} notably"
    whole = "gained" if top.gain > 0 else "lost"
    return f"{amount}, {share(abs(top.gain) / sum(alike))} of all that is {whole}"


def bound_sentence(measurement: Measurement) -> str:
    """How far the Frobenius bound is from the truth."""
    kind = "bound" if measurement.path.certified["frobenius"] else "estimated bound"
    distance = gap(measurement)
    if abs(distance) < NOTABLE:
        return f"the Frobenius {kind} meets the truth"
    side = "above" if distance > 0 else "below"
    return f"the Frobenius {kind} is {number(abs(distance), places=1)} decades {side} the truth"


# --- the samples --------------------------------------------------------------------------------


def _details(measurement: Measurement, labels: Tensor | None) -> list[str]:
    sentences = [
        _dead(measurement),
        _norms(measurement),
        _rank(measurement),
        _radius(measurement),
        _accuracy(measurement, labels),
        linearity(noise_means(measurement)),
    ]
    return [sentence for sentence in sentences if sentence is not None]


def _dead(measurement: Measurement) -> str | None:
    living = alive(measurement)
    dead = len(living) - int(living.sum())
    if dead == 0:
        return None
    return (
        f"{dead} of {len(living)} samples have a Jacobian of zero; logarithms are averaged over "
        "the others."
    )


def _norms(measurement: Measurement) -> str:
    norms = measurement.jacobians.spectra.spectral_norm
    span = spread_over_samples(norms)
    return (
        f"A small change of the input comes out at most {number(span.middle)} times as large for "
        f"the median sample, and {number(norms.max().item())} times for the most sensitive one."
    )


def _rank(measurement: Measurement) -> str | None:
    full = min(measurement.shape)
    if full == 1:
        return None
    rank = spread_over_samples(measurement.jacobians.spectra.effective_rank).middle
    return f"Of {full} possible directions the output uses about {number(rank, places=1)}."


def _radius(measurement: Measurement) -> str:
    found = measurement.jacobians.margins
    if found is None:
        return (
            "The output is not one logit for each of several classes, so there are no margins and "
            "no robustness radii."
        )
    middle = spread_over_samples(found.radius).middle
    if not math.isfinite(middle):
        return "To first order, no small change of the input changes the class of most samples."
    relative = spread_over_samples(found.radius / measurement.input_norm).middle
    length = f", {percent(relative)} of the input's length" if math.isfinite(relative) else ""
    return (
        f"To first order, half of the samples change their class within a distance of "
        f"{number(middle)}{length}."
    )


def accuracy(measurement: Measurement, labels: Tensor | None) -> float | None:
    """The fraction of samples whose largest logit is that of their class."""
    found = measurement.jacobians.margins
    if found is None or labels is None:
        return None
    return (found.prediction.cpu() == labels.cpu()).double().mean().item()


def _accuracy(measurement: Measurement, labels: Tensor | None) -> str | None:
    right = accuracy(measurement, labels)
    if right is None:
        return None
    return f"{percent(right)} of these samples are classified rightly."


def linearity(levels: tuple[NoiseMean, ...]) -> str:
    """Up to which noise the Jacobian predicts the response."""
    good = [level for level in levels if abs(level.curvature) <= LINEAR_WITHIN]
    bad = [level for level in levels if abs(level.curvature) > LINEAR_WITHIN]
    if not bad:
        return (
            f"The Jacobian predicts the response to noise to {percent(LINEAR_WITHIN)} up to "
            f"sigma = {number(levels[-1].sigma)}, the largest that was tried."
        )
    worst = bad[-1]
    far = (
        f"at {number(worst.sigma)} the response is {_apart(worst.curvature)} what the Jacobian "
        "predicts"
    )
    if not good or good[0].sigma > bad[0].sigma:
        return f"The map is not linear even at sigma = {number(levels[0].sigma)}; {far}."
    last = max(level.sigma for level in good if level.sigma < bad[0].sigma)
    return (
        f"The Jacobian predicts the response to noise to {percent(LINEAR_WITHIN)} up to sigma = "
        f"{number(last)}; {far}."
    )


def _apart(curvature: float) -> str:
    factor = 1 + curvature
    return f"{percent(factor)} of" if factor < 1 else f"{number(factor, places=1)} times"
