"""Limits on what the Jacobian of a model may be, and how a model stands against them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pushforward import linalg
from pushforward.derivatives import jacobian
from pushforward.errors import DifferentiationError
from pushforward.path import path_bound
from pushforward.report.data import DataSet
from pushforward.report.fitting import evaluating
from pushforward.report.measure import TILE, chunk_size, jacobian_shape, one_kind_of_error

Progress = Callable[[float, float], None]

HUGE = 1e6  # nats; no float has a logarithm as large


@dataclass(frozen=True)
class Limit:
    """What may be limited: ``quantity``, from above or, where ``floor``, from below."""

    name: str
    quantity: str
    floor: bool
    meaning: str


LIMITS = (
    Limit("max-gain", "gain", False, "the largest gain of a step on any sample, a factor"),
    Limit("min-gain", "gain", True, "the smallest gain of a step on any sample"),
    Limit("max-norm", "norm", False, "the largest ||J||_F of the whole map on any sample"),
    Limit("min-norm", "norm", True, "the smallest ||J||_F on any sample"),
    Limit("max-spectral", "spectral", False, "the largest ||J||_2 on any sample"),
    Limit("max-cond", "cond", False, "the largest condition number of J on any sample"),
)


@dataclass(frozen=True)
class Measured:
    """What was measured, as logarithms: name of a step, or None for the whole map, to (B,).

    ``slack`` is what rounding can do to a logarithm.
    """

    logs: Mapping[str, Mapping[str | None, Tensor]]
    indices: tuple[int, ...]
    notes: tuple[str, ...]
    slack: float


@dataclass(frozen=True)
class Finding:
    """How the model stands against one limit.

    Attributes:
        name: of the limit, such as "max-gain".
        limit: the value allowed.
        value: the worst value measured.
        layer: the step it was measured in; None where it is of the whole map.
        sample: the number of the sample in the data.
        times: value over limit, or limit over value for a limit from below: over 1 is too much.
        passed: whether the limit holds for all steps and samples.
        layers: the worst value of each step, in the order of the network.
        beyond: the steps that are beyond the limit, worst first.
        samples_beyond: how many samples are beyond it, in one step or another.
    """

    name: str
    quantity: str
    limit: float
    value: float
    layer: str | None
    sample: int
    times: float
    passed: bool
    layers: dict[str, float]
    beyond: tuple[str, ...]
    samples_beyond: int


# --- measuring ----------------------------------------------------------------------------------


def measured(
    model: nn.Module,
    data: DataSet,
    quantities: frozenset[str],
    *,
    layers: Sequence[str] | None = None,
    memory: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Measured:
    """Measure what the limits ask for, in evaluation mode, sample by sample.

    Cost: for gains and norms one backward pass per output; for the others a Jacobian and its
    singular values.

    Raises:
        DifferentiationError: where an op has no derivative, or a number is not finite.
        MemoryBudgetError: where not even one sample fits in ``memory``.
    """
    parts, done = [], 0
    with evaluating(model), torch.no_grad(), one_kind_of_error():
        size = chunk_size(jacobian_shape(model, data.x), data.x, memory)
        for x in data.x.split(min(size, TILE)):
            parts.append(_part(model, x, quantities, layers, memory, done))
            done += len(x)
            progress(done, len(data.x))
    return Measured(
        logs=_joined([logs for logs, _ in parts]),
        indices=data.indices,
        notes=tuple(dict.fromkeys(note for _, notes in parts for note in notes)),
        slack=min(64 * torch.finfo(data.x.dtype).eps, 1e-3),
    )


Logs = dict[str, dict[str | None, Tensor]]


def _part(
    model: nn.Module,
    x: Tensor,
    quantities: frozenset[str],
    layers: Sequence[str] | None,
    memory: int | None,
    first: int,
) -> tuple[Logs, tuple[str, ...]]:
    """The logarithms for some samples, and what is to be noted of them."""
    logs, notes = {}, ()
    if layers is not None or quantities & {"gain", "norm"}:
        path = path_bound(model, x, batch_dim=0, layers=layers, rungs=())
        logs["gain"] = {row.name: row.log_gain for row in path.layers}
        logs["norm"] = {None: path.log_norm}
        notes = path.notes
    whole = quantities & set(_OF_MATRIX)
    if whole:
        matrix = jacobian(model, x, batch_dim=0, memory=memory).matrix()
        _expect_finite(matrix, first)
        logs |= {name: {None: _OF_MATRIX[name](matrix).double().log()} for name in sorted(whole)}
    return logs, notes


_OF_MATRIX: dict[str, Callable[[Tensor], Tensor]] = {
    "spectral": linalg.spectral_norm,
    "cond": lambda matrix: _cond(matrix),
}


def _cond(matrix: Tensor) -> Tensor:
    """The condition number; infinite where the smallest singular value is mere rounding."""
    deficient = linalg.rank(matrix) < min(matrix.shape[-2:])
    return linalg.cond(matrix).masked_fill(deficient, math.inf)


def _expect_finite(matrix: Tensor, first: int) -> None:
    bad = ~torch.isfinite(matrix.flatten(1)).all(1)
    if bad.any():
        raise DifferentiationError(
            f"the Jacobian of sample {first + int(bad.nonzero()[0])} must be finite, got NaN or "
            "infinity; look for a division by zero or an overflow in the model"
        )


def _joined(parts: Sequence[Logs]) -> Logs:
    """Join the samples of all parts.

    Raises:
        DifferentiationError: where samples took different paths.
    """
    first = parts[0]
    if any(part[name].keys() != rows.keys() for part in parts for name, rows in first.items()):
        raise DifferentiationError(
            "all samples must pass the same layers, got different paths; name modules that all of "
            "them pass with --layers"
        )
    return {
        name: {step: torch.cat([part[name][step] for part in parts]) for step in rows}
        for name, rows in first.items()
    }


# --- judging ------------------------------------------------------------------------------------


def judged(found: Measured, limits: Mapping[str, float]) -> tuple[Finding, ...]:
    """How the model stands against each of the limits that were set."""
    return tuple(_finding(found, each, limits[each.name]) for each in LIMITS if each.name in limits)


def _finding(found: Measured, limit: Limit, allowed: float) -> Finding:
    """Logarithms are compared, which neither overflow nor underflow."""
    sign = -1 if limit.floor else 1
    rows = found.logs[limit.quantity]
    names = list(rows)
    excess = sign * (torch.stack(list(rows.values())) - math.log(allowed))
    # Of several that rounding alone tells apart the first one is the worst.
    step, sample = (excess >= excess.max() - found.slack).nonzero()[0].tolist()
    beyond = excess > found.slack
    worst = excess.amax(1)
    order = [i for i in ranked(worst, found.slack) if beyond[i].any()]
    return Finding(
        name=limit.name,
        quantity=limit.quantity,
        limit=allowed,
        value=_exp(rows[names[step]][sample].item()),
        layer=names[step],
        sample=found.indices[sample],
        times=_exp(worst[step].item()),
        passed=not order,
        layers={
            name: _exp(sign * (sign * logs).max().item())
            for name, logs in rows.items()
            if name is not None
        },
        beyond=tuple(name for i in order if (name := names[i]) is not None),
        samples_beyond=int(beyond.any(0).sum()),
    )


def ranked(logs: Tensor, slack: float) -> list[int]:
    """Places from the largest number to the smallest; those nearly as large keep their order."""
    finite = logs.clamp(-HUGE, HUGE)
    return ((finite.max() - finite) / slack).round().argsort(stable=True).tolist()


def _exp(log: float) -> float:
    return math.exp(log) if log < 709 else math.inf
