"""Exact gains: how much of the norm of the whole Jacobian each step contributes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pushforward.errors import DifferentiationError
from pushforward.path.pull import Passes, blocks, sample_norms, unit_vectors
from pushforward.path.record import Crossing
from pushforward.path.steps import Step


def log_sensitivities(passes: Passes, steps: Sequence[Step], samples: int) -> Tensor:
    """Return log ||d out / d h_l||_F for the tensor before each step, ``(steps, samples)``.

    One backward pass per output, which all tensors take their gradients from. Where these leave
    the range in which their dtype is accurate, the passes are repeated step by step.
    """
    found = _at_once(passes, steps, samples)
    return _step_by_step(passes, steps, samples) if found is None else found


def _at_once(passes: Passes, steps: Sequence[Step], samples: int) -> Tensor | None:
    output, places = steps[-1].stop, [step.start for step in steps]
    squares = torch.zeros(len(steps), samples, dtype=torch.float64, device=output.device)
    like = torch.empty(0, dtype=output.dtype, device=output.device)
    size = passes.rows_per_pass(output.shape, *(place.shape for place in places), like=like)
    count = math.prod(output.shape) // samples
    for first in range(0, count, size):
        seeds = unit_vectors(output, samples, first, min(first + size, count))
        rows = passes.pull_to_all(output, places, seeds)
        norms = torch.stack([sample_norms(part, samples) for part in rows])
        squares += norms.square()
        if not _accurate(squares.sqrt(), places):
            return None
    return squares.log() / 2


def _accurate(norms: Tensor, places: Sequence[Crossing]) -> bool:
    """Whether gradients of these norms are far from underflow and overflow; 0 may have been one."""
    for row, place in zip(norms, places, strict=True):
        tiny = torch.finfo(place.dtype).tiny ** 0.5
        if place.dtype.itemsize < 4 or not bool(((row > tiny) & (row < 1 / tiny)).all()):
            return False
    return True


def _step_by_step(passes: Passes, steps: Sequence[Step], samples: int) -> Tensor:
    """The same for networks of any depth: all outputs are pulled back through one step at a time.

    Each sample is brought back to size one on the way, and its logarithm kept in float64.
    """
    output = steps[-1].stop
    count = math.prod(output.shape) // samples
    places = [output, *(step.start for step in steps)]
    total = torch.full((len(steps), samples), -torch.inf, dtype=torch.float64, device=output.device)
    for first, last in blocks(count, *places):
        seeds = unit_vectors(output, samples, first, last)
        found = _follow(passes, steps, samples, seeds)
        total = torch.logaddexp(2 * total, 2 * found) / 2
    return total


def _follow(passes: Passes, steps: Sequence[Step], samples: int, rows: Tensor) -> Tensor:
    """Pull one block of cotangents back through all steps."""
    scale = torch.zeros(samples, dtype=torch.float64, device=rows.device)
    logs = []
    for step in reversed(steps):
        rows = passes.pull(step.stop, step.start, rows)
        norms = sample_norms(rows, samples)
        refuse_infinite(norms.log(), step)
        logs.append(scale + norms.log())
        powers = _power_near(norms)
        rows = _divided(rows, powers, samples)
        scale = scale + powers.log()
    return torch.stack(logs[::-1])


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


def gains(sensitivities: Tensor) -> Tensor:
    """Return log N_l - log N_(l+1) for each step, the last one undivided; ``(steps, samples)``.

    Behind a step that kills everything N is 0 already: those steps have gain 0, so that the sum
    is -inf and not NaN.
    """
    after = torch.cat([sensitivities[1:], torch.zeros_like(sensitivities[:1])])
    return torch.where(after == -torch.inf, 0.0, sensitivities - after)
