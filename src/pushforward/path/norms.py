"""The Frobenius norm of the Jacobian of one step: exact where that is affordable."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.errors import DifferentiationError
from pushforward.path.leaves import Leaf, log_norm_of_leaf
from pushforward.path.pull import Passes, blocks, sample_norms, unit_vectors
from pushforward.path.steps import Step

# Pushing forward differentiates a backward pass once more: about two and a half times its work.
PUSH_COST = 2.5
PROBES = 64


@dataclass(frozen=True, eq=False)
class StepNorm:
    """log ||J||_F of a step per sample, whether it is exact, and how it was found."""

    log: Tensor
    exact: bool
    method: str


def log_norm(
    passes: Passes,
    step: Step,
    samples: int,
    budget: int,
    generator: torch.Generator,
) -> StepNorm:
    """Find the norm by a rule for the module, by all rows or columns, or by random cotangents."""
    if step.call is not None:
        leaf = Leaf(step.call.module, step.start, step.stop, samples, passes)
        found = log_norm_of_leaf(leaf)
        if found is not None:
            return StepNorm(found, True, "rule")
    return _log_norm_of_any(passes, step, samples, budget, generator)


def _log_norm_of_any(
    passes: Passes, step: Step, samples: int, budget: int, generator: torch.Generator
) -> StepNorm:
    rows = math.prod(step.stop.shape) // samples
    columns = PUSH_COST * (math.prod(step.start.shape) // samples)
    if columns < rows and columns <= budget:
        found = _by_columns(passes, step, samples)
        if found is not None:
            return StepNorm(found, True, "columns")
    if rows <= budget:
        return StepNorm(_by_rows(passes, step, samples), True, "rows")
    return StepNorm(_estimated(passes, step, samples, generator), False, f"{PROBES} probes")


def _by_rows(passes: Passes, step: Step, samples: int) -> Tensor:
    squares = _nothing(step, samples)
    count = math.prod(step.stop.shape) // samples
    for first, last in blocks(count, step.start, step.stop):
        seeds = unit_vectors(step.stop, samples, first, last)
        rows = passes.pull(step.stop, step.start, seeds)
        squares += sample_norms(rows, samples).square()
    return squares.log() / 2


def _by_columns(passes: Passes, step: Step, samples: int) -> Tensor | None:
    """None where an op has no second derivative."""
    squares = _nothing(step, samples)
    count = math.prod(step.start.shape) // samples
    try:
        push = passes.transposed(step.stop, step.start)
        for first, last in blocks(count, step.start, step.stop):
            seeds = unit_vectors(step.start, samples, first, last)
            squares += sample_norms(push(seeds), samples).square()
    except (RuntimeError, DifferentiationError):
        return None
    return squares.log() / 2


def _estimated(passes: Passes, step: Step, samples: int, generator: torch.Generator) -> Tensor:
    """E |J^T u|^2 = ||J||_F^2 for random signs u; the mean over `PROBES` of them."""
    squares = _nothing(step, samples)
    for first, last in blocks(PROBES, step.start, step.stop):
        shape = (last - first, *step.stop.shape)
        signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1
        seeds = signs.to(step.stop.device, step.stop.dtype)
        squares += sample_norms(passes.pull(step.stop, step.start, seeds), samples).square()
    return (squares / PROBES).log() / 2


def _nothing(step: Step, samples: int) -> Tensor:
    return torch.zeros(samples, dtype=torch.float64, device=step.stop.device)
