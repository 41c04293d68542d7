"""Which tensors of a forward pass keep the samples of a batch apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pushforward.checks import coupling_message
from pushforward.errors import CouplingError
from pushforward.path.pull import TINY, Passes
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


@dataclass(frozen=True, eq=False)
class Known:
    """One direction of the output, ``(m,)``, and its products with d out / d h at some nodes.

    Who uses the products takes them out: they are as large as all activations together.
    """

    direction: Tensor
    rows: dict[Node, Tensor]


def separable_from_output(
    passes: Passes, tape: Tape, start: Crossing, marks: Sequence[Border], output: Crossing
) -> tuple[list[Border], Known | None]:
    """Return the marks at which the gradient of the output keeps the samples apart.

    That is all that gains need, and takes two passes, of which they can use the first; what steps
    do that the output forgets goes unseen. Where gradients leave the range of their dtype, the
    steps are checked one by one.

    Raises:
        CouplingError: samples influence each other even from input to output.
    """
    samples = start.shape[0]
    inside = [mark for mark in marks if _leading(mark.place) == samples]
    if samples == 1:
        return inside, None
    places = [start, *(mark.place for mark in inside)]
    direction = _direction(math.prod(output.shape) // samples)
    plain = direction.to(output.device, output.dtype).expand(samples, -1).reshape(output.shape)
    rows = passes.pull_to_all(output, places, plain[None])
    scaled = passes.pull_to_all(output, places, plain * scales(output))
    found = zip(rows, scaled, places, strict=True)
    apart = [_clearly_apart(row * scales(place), other) for row, other, place in found]
    if None in apart:
        return separable(passes, tape, start, marks, output), None
    if not apart[0]:
        raise CouplingError(coupling_message(tape))
    known = {place.node: row for place, row in zip(places, rows, strict=True)}
    kept = [mark for mark, fits in zip(inside, apart[1:], strict=True) if fits]
    return kept, Known(direction, known)


def _direction(size: int) -> Tensor:
    """A unit vector without small entries."""
    draw = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    draw = draw + draw.sign() / 2
    return draw / draw.norm()


def orthonormal(place: Crossing, samples: int, direction: Tensor, first: int, last: int) -> Tensor:
    """Rows ``first`` to ``last`` of an orthogonal matrix that starts with ``direction``.

    It reflects the first unit vector to ``direction`` (Householder), the same in each sample.
    """
    size = len(direction)
    rows = torch.zeros(last - first, size, dtype=torch.float64)
    rows.diagonal(first).fill_(1)
    normal = -direction
    normal[0] += 1
    length = normal.square().sum()
    if length > 0:
        rows = rows - torch.outer(normal[first:last] * (2 / length), normal)
    rows = rows.to(place.device, place.dtype)
    return rows.unsqueeze(1).expand(-1, samples, -1).reshape(last - first, *place.shape)


def _clearly_apart(expected: Tensor, found: Tensor) -> bool | None:
    """Whether gradients are as expected, sample by sample; None where some are so small or large
    that nothing is clear."""
    size = _sample_norms(expected)
    tiny = torch.finfo(found.dtype).tiny ** 0.5
    if not bool(((size > tiny) & (size < 1 / tiny)).all()):
        return None
    return bool((_sample_norms(expected.sub_(found)) <= _slack(found) * size).all())


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
    draw = torch.rand(place.shape, generator=source).sub_(0.5)
    plain = (draw + draw.sign() / 2).to(place.device, place.dtype)
    return torch.cat([plain[None], plain * scales(place)])


def kept_apart(gradients: Tensor, factors: Tensor) -> bool:
    """Whether all gradients are the first one scaled sample by sample, up to rounding.

    One that is not finite tells nothing of samples; the gains name the step where it arose.
    """
    expected = gradients[0] * factors
    if not expected.isfinite().all():
        return True
    size = _sample_norms(expected)
    return bool((_sample_norms(expected.sub_(gradients[1:])) <= _slack(gradients) * size).all())


def _slack(gradients: Tensor) -> float:
    return min(1e3 * torch.finfo(gradients.dtype).eps, 0.02)


def _sample_norms(rounds: Tensor) -> Tensor:
    """In the dtype itself where squares neither underflow nor overflow in it."""
    flat = rounds.reshape(*rounds.shape[:2], math.prod(rounds.shape[2:]))
    if rounds.dtype == torch.float32:
        norms = torch.linalg.vector_norm(flat, dim=-1)
        if bool(((norms > TINY) & (norms < 1 / TINY)).all()):
            return norms.double()
    return torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float64)


def _of_size_one(gradient: Tensor) -> Tensor:
    size = gradient.abs().amax()
    return gradient / torch.where(size > 0, size, torch.ones_like(size))
