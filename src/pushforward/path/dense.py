"""Exact norms of a step, or of several on end, from all entries of their Jacobian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.errors import DifferentiationError
from pushforward.path.gains import refuse_infinite, scaled_down
from pushforward.path.pull import PUSH_COST, Passes, blocks, sample_norms, unit_vectors
from pushforward.path.record import Crossing
from pushforward.path.rescue import is_tiny, pulled_safely, scaled_by
from pushforward.path.spectrum import gram, log_root
from pushforward.path.steps import Step

# Of the entries in float64, and of the products and eigenvalues: some seconds.
MOST_BYTES = 2**28
MOST_WORK = 2e10
EIGENVALUES = 5


@dataclass(frozen=True, eq=False)
class Norms:
    """log ||J||_F and log ||J||_2 per sample."""

    log_fro: Tensor
    log_spectral: Tensor


def width(place: Crossing, samples: int) -> int:
    """Numbers of one sample at a place."""
    return math.prod(place.shape) // samples


def fits(entering: int, leaving: int, samples: int) -> bool:
    """Whether all entries between places of two widths, and their singular values, can be had."""
    short, long = sorted((entering, leaving))
    work = short**2 * (2 * long + EIGENVALUES * short)
    return 8 * samples * short * long <= MOST_BYTES and samples * work <= MOST_WORK


def cost(entering: int, leaving: int) -> float:
    """Backward passes that the entries take, a pass forward counted as `PUSH_COST`."""
    return min(leaving, PUSH_COST * entering)


def exact_norms(passes: Passes, steps: Sequence[Step], samples: int) -> Norms:
    """Take the norms of the Jacobian of steps on end, by rows, or by columns where that is less."""
    start, stop = steps[0].start, steps[-1].stop
    entering, leaving = width(start, samples), width(stop, samples)
    if cost(entering, leaving) < leaving and len(steps) == 1:
        columns = _columns(passes, steps[0], samples)
        if columns is not None:
            return _norms(columns, torch.zeros(samples, dtype=torch.float64, device=stop.device))
    return _norms(*_rows(passes, steps, samples))


def _rows(passes: Passes, steps: Sequence[Step], samples: int) -> tuple[Tensor, Tensor]:
    """All rows, ``(m, samples, n)``, each sample up to a factor whose logarithm stands beside."""
    stop = steps[-1].stop
    scale = torch.zeros(samples, dtype=torch.float64, device=stop.device)
    rows = unit_vectors(stop, samples, 0, width(stop, samples))
    for step in reversed(steps):
        rows, lost = _by_blocks(passes, step, rows, samples)
        scale = scale + lost
        norms = sample_norms(rows, samples)
        refuse_infinite(norms.log(), step)
        rows, powers = scaled_down(rows, norms, samples)
        scale = scale + powers
    return rows.reshape(len(rows), samples, -1), scale


def _by_blocks(passes: Passes, step: Step, rows: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Rows before the step, and the logarithm of a factor for each sample."""
    spans = blocks(len(rows), step.start, step.stop)
    parts = [pulled_safely(passes, step, rows[first:last], samples) for first, last in spans]
    if len(parts) == 1:
        return parts[0]
    most = torch.stack([lost for _, lost in parts]).amax(dim=0)
    return torch.cat([scaled_by(part, lost - most, samples) for part, lost in parts]), most


def _columns(passes: Passes, step: Step, samples: int) -> Tensor | None:
    """All columns, ``(n, samples, m)``; None where an op has no second derivative."""
    count = width(step.start, samples)
    try:
        push = passes.transposed(step.stop, step.start)
        spans = blocks(count, step.start, step.stop)
        parts = [
            push(unit_vectors(step.start, samples, first, last)).reshape(last - first, samples, -1)
            for first, last in spans
        ]
    except (RuntimeError, DifferentiationError):
        return None
    columns = torch.cat(parts)
    tiny = is_tiny(sample_norms(columns, samples), step.stop.dtype)
    return None if bool(tiny.any()) else columns  # rows are looked at more closely


def _norms(entries: Tensor, scale: Tensor) -> Norms:
    """The norms of ``(rows, samples, columns)`` or of its transpose; both are the same."""
    matrices = entries.transpose(0, 1).double()
    sizes = torch.linalg.vector_norm(matrices, dim=(1, 2))
    if not bool(sizes.isfinite().all()):  # which the caller refuses, with the name of the step
        return Norms(sizes.log(), sizes.log())
    unit = matrices / torch.where(sizes > 0, sizes, 1.0)[:, None, None]
    log_fro = sizes.log() + scale
    spectral = log_root(gram(unit)) + log_fro
    return Norms(log_fro, torch.minimum(spectral, log_fro))
