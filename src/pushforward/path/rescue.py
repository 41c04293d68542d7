"""Cotangents pulled back through one step, so that what underflows on the way is not lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pushforward.path.cuts import between, cuts
from pushforward.path.places import dtype_of, place_of
from pushforward.path.pull import Passes, sample_norms
from pushforward.path.record import Crossing
from pushforward.path.steps import Step

# A cotangent of size one that arrives as zero is tried again at this power of the largest number.
LIFT = 0.6
# Rows of one sample each that go through the pieces at once.
AT_ONCE = 256


def pulled_safely(passes: Passes, step: Step, rows: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """``(k, *stop.shape) -> (k, *start.shape)``, each sample up to a factor whose logarithm stands
    beside, (samples,).

    Where a sample comes out as zero, or so small that squares of its dtype are zero, it is pulled
    back again through pieces of the step, and brought back to size one after each.
    """
    found = passes.pull(step.stop, step.start, rows)
    lost = torch.zeros(samples, dtype=torch.float64, device=rows.device)
    arriving, leaving = sample_norms(rows, samples), sample_norms(found, samples)
    doubtful = is_tiny(leaving, step.start.dtype) & (arriving > 0)
    if not bool(doubtful.any()):
        return found, lost
    places = _pieces(step)
    for sample in doubtful.nonzero()[:, 0].tolist():
        if _is_zero(passes, places, rows, samples, sample):
            continue
        alone = [_pulled_alone(passes, places, row, samples, sample) for row in rows.split(AT_ONCE)]
        values, logs = (torch.cat(parts) for parts in zip(*alone, strict=True))
        lost[sample] = logs.max()
        factors = (logs - logs.max()).exp().to(values.dtype)
        found = found.clone(memory_format=torch.contiguous_format)
        _of(found, samples, sample).copy_(values * factors[:, None])
    return found, lost


def scaled_by(rows: Tensor, logs: Tensor, samples: int) -> Tensor:
    """Multiply each sample of rows by e^log, (samples,)."""
    if not bool(logs.any()):
        return rows
    flat = rows.reshape(len(rows), samples, -1)
    return (flat * logs.exp().to(rows.dtype)[:, None]).reshape(rows.shape)


def is_tiny(norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether norms are so small that an underflow may have had part in them; 0 is."""
    return norms < torch.finfo(dtype).tiny ** 0.5


def _of(rows: Tensor, samples: int, sample: int) -> Tensor:
    """The numbers of one sample in each row, a view."""
    return rows.view(len(rows), samples, -1)[:, sample]


def _pieces(step: Step) -> list[Crossing]:
    """The places inside the step that everything passes through, from its end to its start."""
    narrow = cuts(step.stop.node, step.start.node)
    order = between(step.stop.node, step.start.node)
    inner = [node for node in order[1:-1] if node in narrow and len(node._input_metadata) == 1]
    edges = [GradientEdge(node, 0) for node in inner]
    real = [edge for edge in edges if dtype_of(edge).is_floating_point]
    return [step.stop, *(place_of(edge, step.stop.device) for edge in real), step.start]


def _is_zero(
    passes: Passes, places: Sequence[Crossing], rows: Tensor, samples: int, sample: int
) -> bool:
    """Whether a random sum of all rows of a sample is zero, which is cheaper to see."""
    source = torch.Generator().manual_seed(0)
    weights = torch.rand(len(rows), generator=source, dtype=torch.float64) + 0.5
    weights = weights.to(rows.device, rows.dtype)
    mixed = (rows.reshape(len(rows), -1) * weights[:, None]).sum(dim=0).reshape(1, *rows.shape[1:])
    values, _ = _pulled_alone(passes, places, mixed, samples, sample)
    return not bool(values.any())


def _pulled_alone(
    passes: Passes, places: Sequence[Crossing], rows: Tensor, samples: int, sample: int
) -> tuple[Tensor, Tensor]:
    """The rows of one sample, ``(k, n)``, each up to a factor of its own, ``(k,)`` logarithms."""
    mine = torch.zeros(rows.shape, dtype=rows.dtype, device=rows.device)
    _of(mine, samples, sample).copy_(_of(rows.contiguous(), samples, sample))
    logs = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for start, stop in pairwise(places):
        mine, exponents = _of_size_one(mine)
        logs = logs + exponents
        mine, lifts = _lifted(passes, start, stop, mine)
        logs = logs - lifts
    mine, exponents = _of_size_one(mine)
    return _of(mine.contiguous(), samples, sample), logs + exponents


def _lifted(passes: Passes, start: Crossing, stop: Crossing, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Pull rows of size one back; those that become tiny start once more from a large size."""
    found = passes.pull(start, stop, rows)
    sizes = found.reshape(len(rows), -1).abs().amax(dim=1).double()
    again = is_tiny(sizes, stop.dtype) & rows.reshape(len(rows), -1).any(dim=1)
    lifts = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    if bool(again.any()):
        power = int(LIFT * math.log2(torch.finfo(start.dtype).max))
        larger = passes.pull(start, stop, rows[again] * 2.0**power)
        fine = larger.reshape(len(larger), -1).isfinite().all(dim=1)
        chosen = again.nonzero()[:, 0][fine]
        found = found.clone()
        found[chosen] = larger[fine]
        lifts[chosen] = power * math.log(2)
    return found, lifts


def _of_size_one(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row by the power of two next to its largest number; logarithms beside."""
    sizes = rows.reshape(len(rows), -1).abs().amax(dim=1).double()
    usable = (sizes > 0) & sizes.isfinite()
    exponents = torch.where(usable, sizes.log2().round(), 0.0)
    half = torch.floor(exponents / 2)
    for part in (half, exponents - half):  # one factor may be beyond the dtype
        factor = torch.exp2(-part).to(rows.dtype)
        rows = rows * factor.reshape(-1, *(1 for _ in rows.shape[1:]))
    return rows, exponents * math.log(2)
