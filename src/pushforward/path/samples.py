"""Which tensors of a forward pass keep the samples of a batch apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pushforward.checks import coupling_message
from pushforward.errors import CouplingError
from pushforward.path.pull import Passes
from pushforward.path.record import Crossing
from pushforward.path.steps import Border
from pushforward.tape import Tape


def separable(
    passes: Passes, tape: Tape, start: Crossing, marks: Sequence[Border], output: Crossing
) -> list[Border]:
    """Return the marks between which sample b depends on sample b alone.

    A random cotangent is pulled back, and again with each sample scaled by a power of two of its
    own: the gradient must scale alike, sample by sample. At a mark where it does, a fresh
    cotangent takes over, so that each step is checked for itself; a mark where it does not is left
    out.

    Raises:
        CouplingError: samples influence each other even from input to output.
    """
    samples = start.shape[0]
    marks = [mark for mark in marks if _leading(mark.place) == samples]
    if samples == 1:
        return marks
    kept: list[Border] = []
    place, seeds = output, scaled_seeds(output)
    for mark in reversed(marks):
        gradient = passes.pull(place, mark.place, seeds)
        apart = kept_apart(gradient, scales(mark.place))
        kept += [mark] if apart else []
        place, seeds = mark.place, scaled_seeds(mark.place) if apart else _of_size_one(gradient)
    if kept_apart(passes.pull(place, start, seeds), scales(start)):
        return kept[::-1]
    if kept_apart(passes.pull(output, start, scaled_seeds(output)), scales(start)):
        return []  # samples meet on the way, and part again or are forgotten before the output
    raise CouplingError(coupling_message(tape))


def _leading(place: Crossing) -> int | None:
    return place.shape[0] if place.shape else None


def scales(place: Crossing | Tensor) -> Tensor:
    """Signed powers of two, ``(rounds, B, 1, ...)``: in one round or another no two are the same.

    Exact to multiply by. Samples get the digits of their number.
    """
    reach = 20 if place.dtype.itemsize >= 4 else 4
    digits = [sign * 2.0**power for power in range(-reach, reach + 1) for sign in (1, -1)]
    table = torch.tensor(digits, dtype=place.dtype, device=place.device)
    left, rounds = torch.arange(place.shape[0], device=place.device), []
    while not rounds or left.any():
        rounds.append(table[left % len(digits)])
        left = left // len(digits)
    return torch.stack(rounds).reshape(len(rounds), -1, *(1 for _ in place.shape[1:]))


def scaled_seeds(place: Crossing) -> Tensor:
    """A cotangent of random numbers, and the same scaled sample by sample in a few ways."""
    source = torch.Generator().manual_seed(0)
    plain = torch.rand(place.shape, generator=source).add_(0.5).to(place.device, place.dtype)
    signs = torch.rand(place.shape, generator=source).to(place.device) < 0.5
    plain = torch.where(signs, plain, -plain)
    return torch.cat([plain[None], plain * scales(place)])


def kept_apart(gradients: Tensor, factors: Tensor) -> bool:
    """Whether all gradients are the first one scaled sample by sample, up to rounding.

    One that is not finite tells nothing of samples; the gains name the step where it arose.
    """
    expected = gradients[0] * factors
    if not expected.isfinite().all():
        return True
    slack = min(1e3 * torch.finfo(gradients.dtype).eps, 0.02)
    error = _sample_norms(gradients[1:] - expected)
    return bool((error <= slack * _sample_norms(expected)).all())


def _sample_norms(rounds: Tensor) -> Tensor:
    return rounds.reshape(*rounds.shape[:2], math.prod(rounds.shape[2:])).double().norm(dim=-1)


def _of_size_one(gradient: Tensor) -> Tensor:
    size = gradient.abs().amax()
    return gradient / torch.where(size > 0, size, torch.ones_like(size))
