"""What was found about the steps, put together: rows, rungs and what they are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pushforward.path import rungs as ladder
from pushforward.path.dense import Norms
from pushforward.path.findings import Layer
from pushforward.path.groups import Groups, without_underflow
from pushforward.path.norms import CERTIFIED, ESTIMATE, PROBABLE, PROBES, StepNorm
from pushforward.path.spectra import Spectrum

LOWER_BOUND = "lower bound"
ROUNDING = 1e-3  # nats; what float32 can do to a norm, and float16 hardly

Interval = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Gains:
    """Gains of the steps, ``(steps, samples)``, and what came with them."""

    logs: Tensor
    log_norm: Tensor
    spectrum: Spectrum | None = None
    intervals: Interval | None = None
    interval: Interval | None = None


@dataclass(frozen=True, eq=False)
class Measured:
    """The norms of all steps, the groups of them that were taken whole, and a bound from below.

    ``widths`` are numbers per sample at the places between steps, both ends included.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    norms: list[StepNorm]
    groups: Groups
    sampled: Tensor | None
    delta: float


def layers(names: Sequence[str], gains: Gains, measured: Measured | None) -> list[Layer]:
    """One row per step; tensors are ``(samples,)``."""
    rows = [_row(place, name, gains) for place, name in enumerate(names)]
    if measured is None:
        return rows
    so_far = torch.stack([norm.log_fro for norm in measured.norms]).flip(0).cumsum(0).flip(0)
    last = len(rows) - 1
    return [
        _measured_row(row, norm, sum_, measured.widths[place + 1], place == last)
        for place, (row, norm, sum_) in enumerate(zip(rows, measured.norms, so_far, strict=True))
    ]


def _row(place: int, name: str, gains: Gains) -> Layer:
    ranks = None if gains.spectrum is None else gains.spectrum.effective_rank
    rank = ranks[place] if ranks is not None and len(ranks) == len(gains.logs) else None
    ends = gains.intervals
    interval = None if ends is None else (ends[0][place], ends[1][place])
    return Layer(
        name, gains.logs[place], None, None, None, True, effective_rank=rank, gain_interval=interval
    )


def _measured_row(row: Layer, norm: StepNorm, so_far: Tensor, width: int, last: bool) -> Layer:
    independent = norm.log_fro if last else norm.log_fro - math.log(max(1, width)) / 2
    return replace(
        row,
        log_fro=norm.log_fro,
        log_spectral=norm.log_spectral,
        log_bound_so_far=so_far,
        exact=norm.exact,
        spectral_label=None if norm.log_spectral is None else norm.label,
        alignment=_difference(row.log_gain, independent),
        slack=_difference(norm.log_fro, row.log_gain),
    )


def _difference(one: Tensor, other: Tensor) -> Tensor:
    """A difference of logarithms; of two norms that are 0 it is 0."""
    return torch.where(one == other, 0.0, one - other)


def rungs(wanted: Sequence[str], measured: Measured, log_norm: Tensor | None) -> dict[str, Tensor]:
    """The bounds in the order in which they were asked for; ``log_norm`` is the truth, if known."""
    table = {name: RUNGS[name](measured) for name in wanted if name not in ("segments", "sampled")}
    # Each rung is at most those above it, up to the rounding of sums.
    if "segments" in wanted:
        table["segments"] = torch.minimum(_segments(measured), _mixed(measured))
    if measured.sampled is not None:
        table["sampled"] = measured.sampled
    if log_norm is not None:
        table = {name: _settled(name, log, measured, log_norm) for name, log in table.items()}
    return {name: table[name] for name in wanted}


def _settled(name: str, log: Tensor, measured: Measured, truth: Tensor) -> Tensor:
    """Where a bound is equal to the truth, as for a single step, rounding must not turn them."""
    label = _label(name, measured)
    if label == LOWER_BOUND:
        return torch.minimum(log, truth)
    near = (truth - log).abs() < ROUNDING
    return log if label == ESTIMATE else torch.where(near, torch.maximum(log, truth), log)


def _frobenius(measured: Measured) -> Tensor:
    return ladder.log_frobenius(torch.stack([norm.log_fro for norm in measured.norms]))


def _mixed(measured: Measured) -> Tensor:
    mixed = torch.minimum(ladder.log_mixed(_singles(measured)), _spectral(measured))
    exact = all(norm.exact for norm in measured.norms)
    return torch.minimum(mixed, _frobenius(measured)) if exact else mixed


def _spectral(measured: Measured) -> Tensor:
    return ladder.log_spectral(_singles(measured), max(1, min(measured.widths)))


def _segments(measured: Measured) -> Tensor:
    singles = _singles(measured)
    return ladder.log_segments(singles, without_underflow(measured.groups, singles))


def _singles(measured: Measured) -> list[Norms]:
    return [Norms(_given(norm.log_fro_bound), _given(norm.log_spectral)) for norm in measured.norms]


def _given(log: Tensor | None) -> Tensor:
    assert log is not None, "rungs other than frobenius come with spectral norms"
    return log


RUNGS = {"frobenius": _frobenius, "mixed": _mixed, "spectral": _spectral, "segments": _segments}


def labels(wanted: Sequence[str], measured: Measured) -> dict[str, str]:
    """What each rung is: certified, probable, an estimate, or a bound from below."""
    return {name: _label(name, measured) for name in wanted}


def _label(name: str, measured: Measured) -> str:
    if name == "sampled":
        return LOWER_BOUND
    if name == "frobenius":
        return CERTIFIED if all(norm.exact for norm in measured.norms) else ESTIMATE
    found = {norm.label for norm in measured.norms}
    if ESTIMATE in found:
        return ESTIMATE
    return f"holds with probability {1 - measured.delta:g}" if PROBABLE in found else CERTIFIED


def notes(measured: Measured) -> tuple[str, ...]:
    """Name what is an estimate."""
    steps = zip(measured.names, measured.norms, strict=True)
    named = [name for name, norm in steps if not norm.exact]
    if not named:
        return ()
    return (
        f"log_fro is an estimate from {PROBES} random cotangents in {', '.join(named)}; "
        "raise exact_passes= to have it exact",
    )
