"""The norms of the Jacobian of one step: exact where that is affordable, else bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pushforward.errors import DifferentiationError
from pushforward.path.dense import cost, exact_norms, fits, width
from pushforward.path.follow import Reach, log_spectral_by_ops
from pushforward.path.lanczos import log_probable
from pushforward.path.leaves import Leaf, log_norm_of_leaf
from pushforward.path.pull import PUSH_COST, Passes, blocks, sample_norms, unit_vectors
from pushforward.path.rescue import is_tiny, pulled_safely
from pushforward.path.steps import Step

PROBES = 64
CERTIFIED, PROBABLE, ESTIMATE = "certified", "probable", "estimate"


@dataclass(frozen=True, eq=False)
class StepNorm:
    """The norms of a step per sample, and what they are.

    ``log_fro`` is exact or an estimate. ``log_spectral`` is None where nobody asked for it;
    ``label`` says whether it is certified, probable or an estimate. ``log_fro_bound`` is
    ``log_fro`` where that is exact, and what the spectral norm says of it where not.
    """

    log_fro: Tensor
    exact: bool
    log_spectral: Tensor | None = None
    log_fro_bound: Tensor | None = None
    label: str = CERTIFIED


@dataclass(frozen=True)
class Spending:
    """What may be spent on a step, and the probability with which a bound may fail."""

    passes: float
    spectral: bool
    delta: float


def step_norm(
    passes: Passes, step: Step, samples: int, spending: Spending, generator: torch.Generator
) -> StepNorm:
    """Find the norms of a step; the spectral one op by op, or from all entries."""
    if not spending.spectral:
        return log_norm(passes, step, samples, spending.passes, generator)
    by_ops = log_spectral_by_ops(passes, step, samples)
    if (by_ops is None or not by_ops.exact) and _may_be_dense(step, samples, spending.passes):
        norms = exact_norms(passes, [step], samples)
        whole = StepNorm(norms.log_fro, True, norms.log_spectral, norms.log_fro)
        return _without_underflow(whole, step, samples, by_ops)
    fro = log_norm(passes, step, samples, spending.passes, generator)
    return _with_spectral(passes, step, samples, fro, by_ops, spending, generator)


def _may_be_dense(step: Step, samples: int, budget: float) -> bool:
    entering, leaving = width(step.start, samples), width(step.stop, samples)
    return cost(entering, leaving) <= budget and fits(entering, leaving, samples)


def _with_spectral(
    passes: Passes,
    step: Step,
    samples: int,
    fro: StepNorm,
    by_ops: Reach | None,
    spending: Spending,
    generator: torch.Generator,
) -> StepNorm:
    """Take the least of what is certified; where that is not exact, what probably holds."""
    log = None if by_ops is None else by_ops.log
    if fro.exact:
        log = fro.log_fro if log is None else torch.minimum(log, fro.log_fro)
    label = CERTIFIED
    if spending.delta > 0 and not (by_ops is not None and by_ops.exact):
        found = log_probable(passes, step, samples, spending.delta, generator)
        if found is not None and bool((found == -torch.inf).any()):
            found = None  # a product that was too small, or one that the ops explain
        if found is not None and (log is None or bool((found < log).any())):
            log, label = found if log is None else torch.minimum(log, found), PROBABLE
    if log is None:
        return replace(fro, log_spectral=fro.log_fro, log_fro_bound=fro.log_fro, label=ESTIMATE)
    bound = fro.log_fro if fro.exact else log + _half_log_rank(step, samples)
    found = replace(fro, log_spectral=log, log_fro_bound=bound, label=label)
    return _without_underflow(found, step, samples, by_ops)


def _half_log_rank(step: Step, samples: int) -> float:
    narrow = min(width(step.start, samples), width(step.stop, samples))
    return math.log(max(1, narrow)) / 2


def _without_underflow(norm: StepNorm, step: Step, samples: int, by_ops: Reach | None) -> StepNorm:
    """A zero that the ops do not explain may be a product that was too small for its dtype: their
    bound takes its place, and the Frobenius norm counts as an estimate."""
    zero = norm.log_fro == -torch.inf
    if by_ops is not None:
        zero = zero & (by_ops.log > -torch.inf)
    if not bool(zero.any()):
        return norm
    if by_ops is None:
        wide = step.start.dtype.itemsize >= 8
        return norm if wide else replace(norm, exact=False, label=ESTIMATE)
    assert norm.log_spectral is not None
    assert norm.log_fro_bound is not None
    spectral = torch.where(zero, by_ops.log, norm.log_spectral)
    bound = torch.where(zero, by_ops.log + _half_log_rank(step, samples), norm.log_fro_bound)
    return replace(norm, exact=False, log_spectral=spectral, log_fro_bound=bound)


def log_norm(
    passes: Passes,
    step: Step,
    samples: int,
    budget: float,
    generator: torch.Generator,
) -> StepNorm:
    """Find the Frobenius norm by a rule, by all rows or columns, or by random cotangents."""
    if step.call is not None and step.call.state is not None and step.call.state.lasts():
        leaf = Leaf(step.call.module, step.start, step.stop, samples, passes)
        found = log_norm_of_leaf(leaf)
        if found is not None:
            return StepNorm(found, True)
    return _log_norm_of_any(passes, step, samples, budget, generator)


def _log_norm_of_any(
    passes: Passes, step: Step, samples: int, budget: float, generator: torch.Generator
) -> StepNorm:
    rows = math.prod(step.stop.shape) // samples
    columns = PUSH_COST * (math.prod(step.start.shape) // samples)
    if columns < rows and columns <= budget:
        found = _by_columns(passes, step, samples)
        if found is not None:
            return StepNorm(found, True)
    if rows <= budget:
        return StepNorm(_by_rows(passes, step, samples), True)
    return StepNorm(_estimated(passes, step, samples, generator), False)


def _by_rows(passes: Passes, step: Step, samples: int) -> Tensor:
    count = math.prod(step.stop.shape) // samples
    spans = blocks(count, step.start, step.stop)
    seeds = (unit_vectors(step.stop, samples, first, last) for first, last in spans)
    return _log_norm_of_rows(passes, step, samples, seeds)


def _log_norm_of_rows(passes: Passes, step: Step, samples: int, seeds: Iterable[Tensor]) -> Tensor:
    total = torch.full_like(_nothing(step, samples), -torch.inf)
    for each in seeds:
        rows, lost = pulled_safely(passes, step, each, samples)
        total = torch.logaddexp(total, 2 * (lost + sample_norms(rows, samples).log()))
    return total / 2


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
    tiny = is_tiny(squares.sqrt(), step.stop.dtype)
    return None if bool(tiny.any()) else squares.log() / 2  # rows are looked at more closely


def _estimated(passes: Passes, step: Step, samples: int, generator: torch.Generator) -> Tensor:
    """E |J^T u|^2 = ||J||_F^2 for random signs u; the mean over `PROBES` of them."""

    def signs() -> Iterator[Tensor]:
        for first, last in blocks(PROBES, step.start, step.stop):
            shape = (last - first, *step.stop.shape)
            drawn = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1
            yield drawn.to(step.stop.device, step.stop.dtype)

    return _log_norm_of_rows(passes, step, samples, signs()) - math.log(PROBES) / 2


def _nothing(step: Step, samples: int) -> Tensor:
    return torch.zeros(samples, dtype=torch.float64, device=step.stop.device)
