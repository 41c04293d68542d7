"""Which tensors of a forward pass keep the samples of a batch apart."""

from __future__ import annotations

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

    A random cotangent is pulled back twice, once with sample b scaled by a power of two: the
    gradient must scale alike, sample by sample. At a mark where it does, a fresh cotangent takes
    over, so that each step is checked for itself; a mark where it does not is left out.

    Raises:
        CouplingError: samples influence each other even from input to output.
    """
    samples = start.shape[0]
    marks = [mark for mark in marks if _leading(mark.place) == samples]
    if samples == 1:
        return marks
    kept: list[Border] = []
    place, seeds = output, _seeds(output)
    for mark in reversed(marks):
        gradient = passes.pull(place, mark.place, seeds)
        apart = _scales(gradient)
        kept += [mark] if apart else []
        place, seeds = mark.place, _seeds(mark.place) if apart else _of_size_one(gradient)
    if _scales(passes.pull(place, start, seeds)):
        return kept[::-1]
    if _scales(passes.pull(output, start, _seeds(output))):
        return []  # samples meet on the way, and part again or are forgotten before the output
    raise CouplingError(coupling_message(tape))


def _leading(place: Crossing) -> int | None:
    return place.shape[0] if place.shape else None


def _powers(place_shape: Sequence[int], like: Tensor) -> Tensor:
    """1, 2, 4, ..., 64, 1, 2, ... along dimension 0: exact to multiply by."""
    exponents = torch.arange(place_shape[0], device=like.device) % 7
    powers = torch.ldexp(torch.ones(place_shape[0], device=like.device), exponents)
    return powers.to(like.dtype).reshape(-1, *(1 for _ in place_shape[1:]))


def _seeds(place: Crossing) -> Tensor:
    """A cotangent of plain random numbers, and the same scaled sample by sample."""
    source = torch.Generator().manual_seed(0)
    plain = torch.randn(place.shape, generator=source).to(place.device, place.dtype)
    return torch.stack([plain, plain * _powers(place.shape, plain)])


def _scales(gradient: Tensor) -> bool:
    """Whether the second gradient is the first one scaled sample by sample, up to rounding.

    One that is not finite tells nothing of samples; the gains name the step where it arose.
    """
    plain, scaled = gradient.flatten(2) if gradient.dim() > 2 else gradient.unsqueeze(-1)
    expected = plain * _powers(plain.shape, plain)
    if not expected.isfinite().all():
        return True
    error = (scaled - expected).double().norm(dim=-1)
    slack = min(1e3 * torch.finfo(gradient.dtype).eps, 0.02)
    return bool((error <= slack * expected.double().norm(dim=-1)).all())


def _of_size_one(gradient: Tensor) -> Tensor:
    size = gradient.abs().amax()
    return gradient / torch.where(size > 0, size, torch.ones_like(size))
