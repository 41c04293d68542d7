"""The numbers in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from pushforward.report.measure import Measurement
from pushforward.report.summary import (
    NoiseMean,
    Step,
    alive,
    best_rung,
    gap,
    noise_means,
    spread_over_samples,
    steps,
)
from pushforward.report.words import number, percent, readable, share

SMALL_SHARE = 0.075  # of all gains, below which a layer does not stand out
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
            _of_all([_radius(measurement), _accuracy(measurement, labels)]),
        )
    headline = f"{path_sentence(steps(measurement))}; {bound_sentence(measurement)}."
    return Verdict(headline, _details(measurement, labels))


# --- the path -----------------------------------------------------------------------------------


def path_sentence(path: tuple[Step, ...]) -> str:
    """The layer that changes the size of the derivative most, and its share in that."""
    if len(path) == 1:
        return f"The model is a single step, {layer(path[0])}, of {_amount(path[0].gain)}"
    top, whole = leader(path)
    if whole < NOTABLE:
        return "No layer gains or loses notably"
    if abs(top.gain) < SMALL_SHARE * whole:
        return f"{crowd(path)}, the largest {number(abs(top.gain), places=1)} in {layer(top)}"
    verb = "gained" if top.gain > 0 else "lost"
    part = share(abs(top.gain) / whole)
    of_whole = f"all that is {verb}" if part == "all" else f"{part} of all that is {verb}"
    return f"{change(top)} {_amount(abs(top.gain))}, {of_whole}"


def path_title(path: tuple[Step, ...]) -> str:
    """`path_sentence` in few words."""
    top, whole = leader(path)
    if len(path) == 1 or whole < NOTABLE:
        return "The size of the derivative, layer by layer"
    if abs(top.gain) < SMALL_SHARE * whole:
        return crowd(path)
    return f"{change(top)} most on the way back from the output"


def leader(path: tuple[Step, ...]) -> tuple[Step, float]:
    """The step that changes most, and how much all that go its way change together, in decades."""
    # The last gain is the norm of the last step itself and no ratio, so it does not compete.
    ratios = path[:-1] or path
    top = max(ratios, key=lambda step: abs(step.gain))
    return top, sum(abs(step.gain) for step in ratios if step.gain * top.gain > 0)


def crowd(path: tuple[Step, ...]) -> str:
    """What the steps do together where none stands out."""
    top, whole = leader(path)
    alike = sum(step.gain * top.gain > 0 for step in path[:-1])
    verb = "gain" if top.gain > 0 else "lose"
    return f"{alike} layers together {verb} {_amount(whole)} in small steps"


def change(step: Step) -> str:
    """The step and its verb, at the beginning of a sentence."""
    name = f"Layer {step.name}" if step.name.isdigit() else readable(step.name)
    return f"{name} {'gains' if step.gain > 0 else 'loses'}"


def layer(step: Step) -> str:
    """A layer's name as it stands in a sentence."""
    return f"layer {step.name}" if step.name.isdigit() else readable(step.name)


def _amount(decades: float) -> str:
    return f"{number(decades, places=1)} decades"


def bound_sentence(measurement: Measurement) -> str:
    """How far the Frobenius bound, and the best of the ladder, are from the truth."""
    certified = measurement.path.certified["frobenius"]
    bound = "the Frobenius bound" if certified else "the estimated Frobenius bound"
    distance = gap(measurement)
    if abs(distance) < NOTABLE:
        return f"{bound} meets the truth"
    side = "above" if distance > 0 else "below"
    return f"{bound} is {_amount(abs(distance))} {side} the truth{_best_words(measurement)}"


def _best_words(measurement: Measurement) -> str:
    """The best of the certified rungs, where it is another one."""
    best = best_rung(measurement)
    if best in (None, "frobenius"):
        return ""
    distance = gap(measurement, best)
    if distance < NOTABLE:
        return f", and the {best} rung meets it"
    return f", the {best} rung {_amount(distance)}"


# --- the samples --------------------------------------------------------------------------------


def _details(measurement: Measurement, labels: Tensor | None) -> tuple[str, ...]:
    sentences = [
        _dead(measurement),
        _underflow(measurement),
        _norms(measurement),
        _rank(measurement),
        _radius(measurement),
        _accuracy(measurement, labels),
        linearity(noise_means(measurement)),
        _unbearable(measurement),
    ]
    return _of_all(sentences)


def _of_all(sentences: Iterable[str | None]) -> tuple[str, ...]:
    """The sentences that there is something to say in."""
    return tuple(sentence for sentence in sentences if sentence is not None)


def _dead(measurement: Measurement) -> str | None:
    living = alive(measurement)
    dead = len(living) - int(living.sum())
    if dead == 0:
        return None
    return (
        f"{dead} of {len(living)} samples have a Jacobian of zero; logarithms are averaged over "
        "the others."
    )


def _underflow(measurement: Measurement) -> str | None:
    lost = alive(measurement) & (measurement.jacobians.spectra.fro_norm == 0)
    if not lost.any():
        return None
    return (
        f"The derivatives of {int(lost.sum())} samples are too small for the model's dtype: their "
        "singular values appear as 0, and only the gains of the layers are right; use float64."
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
    return (
        f"To first order, half of the samples change their class within a distance of "
        f"{number(middle)}{_beside_length(relative)}."
    )


def _beside_length(relative: float) -> str:
    if not math.isfinite(relative):
        return ""
    if relative < 2:
        return f", {percent(relative)} of the input's length"
    return f", {_factor(relative)} times the input's length"


def accuracy(measurement: Measurement, labels: Tensor | None) -> float | None:
    """The fraction of samples whose largest logit is that of their class."""
    found = measurement.jacobians.margins
    # Labels of a data set with more classes than logits are not the model's own.
    if found is None or labels is None or not bool((labels < measurement.shape[0]).all()):
        return None
    return (found.prediction.cpu() == labels.cpu()).double().mean().item()


def _accuracy(measurement: Measurement, labels: Tensor | None) -> str | None:
    right = accuracy(measurement, labels)
    if right is None:
        return None
    return f"{percent(right)} of these samples are classified rightly."


def _unbearable(measurement: Measurement) -> str | None:
    if not measurement.unbearable:
        return None
    smallest = number(min(measurement.unbearable))
    return f"From sigma = {smallest} on, noise leads to inputs where the model is not finite."


def linearity(levels: tuple[NoiseMean, ...]) -> str | None:
    """Up to which noise the Jacobian predicts the response, on average over samples."""
    if not levels:
        return None
    seen = [level for level in levels if level.resolved]
    if not seen:
        return "The response to noise drowns in rounding, so that nothing can be said of it."
    apart = [level for level in seen if departs(level)]
    predicts = f"The Jacobian predicts the response to noise to {percent(LINEAR_WITHIN)} up to"
    if not apart:
        return f"{predicts} sigma = {number(seen[-1].sigma)}, the largest that was tried."
    far = f"at {number(apart[-1].sigma)} it is {_times(apart[-1].curvature)} the prediction."
    good = [level.sigma for level in seen if level.sigma < apart[0].sigma]
    if not good:
        return f"Even little noise is not answered as the Jacobian predicts: {far}"
    return f"{predicts} sigma = {number(good[-1])}; {far}"


def departs(level: NoiseMean) -> bool:
    """Whether the response is surely not what the Jacobian predicts."""
    return (
        level.low > (1 + LINEAR_WITHIN) * level.linear
        or level.high < (1 - LINEAR_WITHIN) * level.linear
    )


def _times(curvature: float) -> str:
    factor = 1 + curvature
    if not math.isfinite(factor):
        return "infinitely many times"
    return f"{percent(factor)} of" if factor < 1 else f"{_factor(factor)} times"


def _factor(factor: float) -> str:
    return number(factor, places=1) if factor < 100 else number(factor)
