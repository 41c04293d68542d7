"""Exact gains: how much of the norm of the whole Jacobian each step contributes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.errors import DifferentiationError
from pushforward.path.pull import Passes, blocks, sample_norms, unit_vectors
from pushforward.path.record import Crossing
from pushforward.path.rescue import pulled_safely
from pushforward.path.samples import Known, orthonormal
from pushforward.path.spectra import MOST_ROWS, Spectrum, joined, spectrum
from pushforward.path.steps import Step

# What all rows at all places may take, for their singular values.
MOST_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """log ||d out / d h_l||_F for the tensor before each step, ``(steps, samples)``.

    ``spectrum`` is None where outputs are too many for it; it holds the input alone, (1, samples),
    where that was all that was asked for.
    """

    logs: Tensor
    spectrum: Spectrum | None


def sensitivities(
    passes: Passes,
    steps: Sequence[Step],
    samples: int,
    ranks: bool = True,
    known: Known | None = None,
) -> Sensitivities:
    """Find the norms of d out / d h at every place, and singular values there or at the input.

    One backward pass per output, which all tensors take their gradients from; where one is
    ``known``, the others go through directions orthogonal to it. Where gradients leave the range
    in which their dtype is accurate, the passes are repeated step by step.
    """
    found = _at_once(passes, steps, samples, ranks, known)
    return _step_by_step(passes, steps, samples) if found is None else found


def _at_once(
    passes: Passes, steps: Sequence[Step], samples: int, ranks: bool, known: Known | None
) -> Sensitivities | None:
    places = [step.start for step in steps]
    squares = torch.zeros(len(steps), samples, dtype=torch.float64, device=steps[-1].stop.device)
    count = math.prod(steps[-1].stop.shape) // samples
    several = ranks and _can_keep(count, places)
    kept = [] if several or _can_keep(count, places[:1]) else None
    for rows in _all_rows(passes, steps, samples, known):
        norms = torch.stack([sample_norms(part, samples) for part in rows])
        squares += norms.square()
        if not accurate(squares.sqrt(), places):
            return None
        if kept is not None:
            kept.append(rows if several else rows[:1])
    logs = squares.log() / 2
    return Sensitivities(logs, None if kept is None else _spectra(kept, squares.sqrt(), samples))


def _all_rows(
    passes: Passes, steps: Sequence[Step], samples: int, known: Known | None
) -> Iterator[list[Tensor]]:
    """Rows of d out / d h at every place, in some orthonormal basis of the output, by blocks."""
    output, places = steps[-1].stop, [step.start for step in steps]
    like = torch.empty(0, dtype=output.dtype, device=output.device)
    size = passes.rows_per_pass(output.shape, *(place.shape for place in places), like=like)
    count = math.prod(output.shape) // samples
    if known is not None:
        yield [known.rows.pop(place.node) for place in places]
    for first in range(0 if known is None else 1, count, size):
        last = min(first + size, count)
        if known is None:
            seeds = unit_vectors(output, samples, first, last)
        else:
            seeds = orthonormal(output, samples, known.direction, first, last)
        yield passes.pull_to_all(output, places, seeds)


def _can_keep(count: int, places: Sequence[Crossing]) -> bool:
    """Whether all rows at all places can be held, and taken apart."""
    sizes = [math.prod(place.shape) * place.dtype.itemsize for place in places]
    return 0 < count <= MOST_ROWS and count * sum(sizes) <= MOST_BYTES


def _spectra(kept: list[list[Tensor]], norms: Tensor, samples: int) -> Spectrum:
    places = zip(zip(*kept, strict=True), norms, strict=False)
    return joined([spectrum(torch.cat(parts), row, samples) for parts, row in places])


def accurate(norms: Tensor, places: Sequence[Crossing]) -> bool:
    """Whether gradients of these norms, ``(..., places, samples)``, are far from underflow and
    overflow; 0 may have been one."""
    if any(place.dtype.itemsize < 4 for place in places):
        return False
    tiny = [torch.finfo(place.dtype).tiny ** 0.5 for place in places]
    bounds = torch.tensor(tiny, dtype=norms.dtype, device=norms.device)[:, None]
    return bool(((norms > bounds) & (norms < 1 / bounds)).all())


def _step_by_step(passes: Passes, steps: Sequence[Step], samples: int) -> Sensitivities:
    """The same for networks of any depth: all outputs are pulled back through one step at a time.

    Each sample is brought back to size one on the way, and its logarithm kept in float64.
    """
    output = steps[-1].stop
    count = math.prod(output.shape) // samples
    places = [output, *(step.start for step in steps)]
    total = torch.full((len(steps), samples), -torch.inf, dtype=torch.float64, device=output.device)
    found: list[Spectrum] = []
    spans = list(blocks(count, *places))
    whole = found if len(spans) == 1 and count <= MOST_ROWS else None
    for first, last in spans:
        seeds = unit_vectors(output, samples, first, last)
        logs = followed(passes, steps, samples, seeds, whole)
        total = torch.logaddexp(2 * total, 2 * logs) / 2
    return Sensitivities(total, joined(found[::-1]) if found else None)


def followed(
    passes: Passes,
    steps: Sequence[Step],
    samples: int,
    rows: Tensor,
    spectra: list[Spectrum] | None = None,
) -> Tensor:
    """Pull one block of cotangents back through all steps; ``(steps, samples)``.

    ``spectra`` gets the singular values at each place, from the last one on.
    """
    scale = torch.zeros(samples, dtype=torch.float64, device=rows.device)
    logs = []
    for step in reversed(steps):
        rows, lost = pulled_safely(passes, step, rows, samples)
        scale = scale + lost
        norms = sample_norms(rows, samples)
        refuse_infinite(norms.log(), step)
        logs.append(scale + norms.log())
        if spectra is not None:
            spectra.append(spectrum(rows, norms, samples))
        rows, powers = scaled_down(rows, norms, samples)
        scale = scale + powers
    return torch.stack(logs[::-1])


def scaled_down(rows: Tensor, norms: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Bring the rows of each sample to about size one; beside them the logarithm taken out."""
    powers = _power_near(norms)
    return _divided(rows, powers, samples), powers.log()


def _power_near(norms: Tensor) -> Tensor:
    """The power of two next to each norm, 1 for a norm of 0: exact to divide by."""
    exponents = torch.where(norms > 0, norms.log2().round(), 0.0)
    return torch.exp2(exponents)


def _divided(rows: Tensor, powers: Tensor, samples: int) -> Tensor:
    """Divide the rows of each sample; twice by a root, which the dtype of the rows can hold."""
    if bool((powers == 1).all()):
        return rows
    flat = rows.reshape(len(rows), samples, -1)
    exponents = powers.log2()
    half = torch.floor(exponents / 2)
    for part in (half, exponents - half):
        flat = flat * torch.exp2(-part).to(rows.dtype).unsqueeze(-1)
    return flat.reshape(rows.shape)


def refuse_infinite(logs: Tensor, step: Step) -> None:
    """Raise where the logarithm of a norm is NaN or inf; -inf is the one of a norm of 0."""
    kind = "NaN" if bool(logs.isnan().any()) else "inf"
    if kind == "NaN" or bool((logs == torch.inf).any()):
        raise DifferentiationError(
            f"path_bound expects a finite Jacobian, but its products become {kind} in step "
            f"{step.name!r}; look for a root, a logarithm or a division there, or use float64"
        )


def gains(logs: Tensor) -> Tensor:
    """Return log N_l - log N_(l+1) for each step, the last one undivided; ``(steps, samples)``.

    Behind a step that kills everything N is 0 already: those steps have gain 0, so that the sum
    is -inf and not NaN.
    """
    after = torch.cat([logs[1:], torch.zeros_like(logs[:1])])
    return torch.where(after == -torch.inf, 0.0, logs - after)
