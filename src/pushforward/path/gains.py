"""Exact gains: how much of the norm of the whole Jacobian each step contributes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.errors import DifferentiationError
from pushforward.path.pull import Passes, blocks, sample_norms, unit_vectors
from pushforward.path.record import Crossing
from pushforward.path.spectra import MOST_ROWS, Spectrum, joined, spectrum
from pushforward.path.steps import Step

# What all rows at all places may take, for their singular values.
MOST_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """log ||d out / d h_l||_F for the tensor before each step, ``(steps, samples)``.

    ``spectrum`` is None where outputs are too many for it.
    """

    logs: Tensor
    spectrum: Spectrum | None


def sensitivities(passes: Passes, steps: Sequence[Step], samples: int) -> Sensitivities:
    """Find the norms and singular values of d out / d h at every place.

    One backward pass per output, which all tensors take their gradients from. Where these leave
    the range in which their dtype is accurate, the passes are repeated step by step.
    """
    found = _at_once(passes, steps, samples)
    return _step_by_step(passes, steps, samples) if found is None else found


def _at_once(passes: Passes, steps: Sequence[Step], samples: int) -> Sensitivities | None:
    output, places = steps[-1].stop, [step.start for step in steps]
    squares = torch.zeros(len(steps), samples, dtype=torch.float64, device=output.device)
    like = torch.empty(0, dtype=output.dtype, device=output.device)
    size = passes.rows_per_pass(output.shape, *(place.shape for place in places), like=like)
    count = math.prod(output.shape) // samples
    kept = [] if _can_keep(count, places) else None
    for first in range(0, count, size):
        seeds = unit_vectors(output, samples, first, min(first + size, count))
        rows = passes.pull_to_all(output, places, seeds)
        norms = torch.stack([sample_norms(part, samples) for part in rows])
        squares += norms.square()
        if not _accurate(squares.sqrt(), places):
            return None
        if kept is not None:
            kept.append(rows)
    logs = squares.log() / 2
    return Sensitivities(logs, None if kept is None else _spectra(kept, squares.sqrt(), samples))


def _can_keep(count: int, places: Sequence[Crossing]) -> bool:
    """Whether all rows at all places can be held, and taken apart."""
    sizes = [math.prod(place.shape) * place.dtype.itemsize for place in places]
    return 0 < count <= MOST_ROWS and count * sum(sizes) <= MOST_BYTES


def _spectra(kept: list[list[Tensor]], norms: Tensor, samples: int) -> Spectrum:
    places = zip(zip(*kept, strict=True), norms, strict=True)
    return joined([spectrum(torch.cat(parts), row, samples) for parts, row in places])


def _accurate(norms: Tensor, places: Sequence[Crossing]) -> bool:
    """Whether gradients of these norms are far from underflow and overflow; 0 may have been one."""
    for row, place in zip(norms, places, strict=True):
        tiny = torch.finfo(place.dtype).tiny ** 0.5
        if place.dtype.itemsize < 4 or not bool(((row > tiny) & (row < 1 / tiny)).all()):
            return False
    return True


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
        rows = passes.pull(step.stop, step.start, rows)
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
