"""Along a network: which step makes its Jacobian large or small, and what a chain of norms says."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.boundary import Arguments
from pushforward.errors import InputError, NotAvailableError, ShapeError
from pushforward.path import show
from pushforward.path.cuts import cuts
from pushforward.path.findings import Findings, Layer
from pushforward.path.gains import gains, log_sensitivities, refuse_infinite
from pushforward.path.norms import PROBES, StepNorm, log_norm
from pushforward.path.pull import Passes
from pushforward.path.record import Call, Crossing, recorded_calls
from pushforward.path.samples import separable
from pushforward.path.steps import Step, borders, checked_layers, matches, steps_between
from pushforward.tape import Tape, record

RUNGS = ("frobenius",)
PLANNED_RUNGS = ("mixed", "spectral", "segments")
EXACT_PASSES = 2048
ROUNDING = 1e-3  # nats; what float32 can do to a norm, and float16 hardly


@dataclass(frozen=True, repr=False, eq=False)
class PathBound(Findings):
    """What `path_bound` returns; tensors are ``(B,)``, or ``()`` without a batch, in nats.

    Attributes:
        log_norm: log ||J||_F of the whole map, exact.
        rungs: the bounds on it by name; each is at least ``log_norm`` where it is certified.
        layers: one `Layer` per step, first step first.
        certified: by rung, whether it is a bound or an estimate of one.
        notes: what was merged, and what was estimated.
        passes: backward passes that were made.
        seed: of the random cotangents; None where nothing was estimated.
    """

    def table(self) -> str:
        """Rows, totals and notes as plain text: means over the samples, in nats and decades."""
        return show.table(self)

    def plot(self) -> Any:
        """A ``matplotlib.figure.Figure``: the gains as a waterfall, and the bound against the
        truth by depth; means over the samples, in decades.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        return show.plot(self)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, lists and strings alone, ready for strict JSON.

        Each quantity is ``{"mean": ..., "per_sample": [...]}``; what is not finite stands as a
        string that ``float()`` reads ("-inf").
        """
        return show.to_dict(self)

    def __repr__(self) -> str:
        return show.one_line(self)

    def _repr_html_(self) -> str:
        return show.as_html(self)


def path_bound(
    model: nn.Module,
    x: Tensor,
    batch_dim: int | None = 0,
    layers: str | Sequence[str] | None = None,
    rungs: str | Sequence[str] = RUNGS,
    *,
    exact_passes: int = EXACT_PASSES,
    seed: int | None = None,
) -> PathBound:
    r"""Take the norm of a network's Jacobian apart, step by step.

    The network falls into steps between tensors h_0 = x, h_1, ..., h_L = out that all dependence
    passes through. The gains of the steps add up to the truth, their norms to a bound:

    .. math::
        \log\|J\|_F = \sum_l \log \frac{\|\partial out/\partial h_{l-1}\|_F}
        {\|\partial out/\partial h_l\|_F} \le \sum_l \log\|J_l\|_F

    One step per call of a leaf module; functions between modules belong to the step that follows.
    A residual, concatenating or branching block is one step, named after the block, and its
    Jacobian is taken whole.

    Args:
        model: a module whose output is a tensor, or a pytree of tensors.
        x: its input; ``(B, *in)`` with ``batch_dim=0``.
        batch_dim: 0 for a batch of independent samples, None for one map.
        layers: names of modules or globs ("layer*"): steps end at their outputs only. What no
            single tensor separates is merged, and ``notes`` says so. None takes every leaf.
        rungs: the bounds wanted; "frobenius" is there so far. With ``()`` only the gains are
            computed, which is quick.
        exact_passes: steps that need more backward passes than this get an estimate of their norm
            from 64 random cotangents; then ``certified["frobenius"]`` is False.
        seed: for these cotangents; a fresh one is taken and reported where none is given.

    Returns:
        `PathBound`, in float64 and detached: a diagnosis, not a training loss.

    Cost: one evaluation, and one backward pass per output for all gains together. For the norms of
    the steps a closed form (linear, convolution, pooling, elementwise, normalisation), otherwise
    min(outputs, 2.5 inputs) passes through that step alone.

    Raises:
        InputError: ``model`` is not a module, a pattern in ``layers`` matches nothing, a rung is
            unknown.
        NotAvailableError: a rung that this version does not have.
        ShapeError: ``x`` is empty.
        CouplingError: samples of the batch influence each other.
        DifferentiationError: a step has a Jacobian that is not finite.

    The gains follow from the chain rule; the bound is the submultiplicativity of the norm
    (Horn and Johnson, "Matrix Analysis", section 5.6).

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> for layer in (net[0], net[2]):
    ...     _ = nn.init.ones_(layer.weight)
    >>> p = path_bound(net, torch.ones(1, 2))
    >>> [(row.name, round(row.log_gain.exp().item(), 3)) for row in p.layers]
    [('0', 2.0), ('1', 1.0), ('2', 1.414)]
    """
    _check(model, x, batch_dim)
    wanted = checked_rungs(rungs)
    patterns = checked_layers(model, layers)
    with torch.inference_mode(False), torch.no_grad():
        journey, notes = _travel(model, x, batch_dim, patterns)
        found = log_sensitivities(journey.passes, journey.steps, journey.samples)
        chosen = secrets.randbits(32) if seed is None else int(seed)
        norms = _norms(journey, exact_passes, chosen) if wanted else None
    return _assembled(journey, gains(found), norms, notes, chosen)


@dataclass(frozen=True, eq=False)
class Journey:
    """A recorded evaluation, cut into steps."""

    tape: Tape
    steps: tuple[Step, ...]
    passes: Passes
    batch: int | None

    @property
    def samples(self) -> int:
        return 1 if self.batch is None else self.batch


def _travel(
    model: nn.Module, x: Tensor, batch_dim: int | None, patterns: tuple[str, ...] | None
) -> tuple[Journey, tuple[str, ...]]:
    """Evaluate a model once and cut it into steps."""
    with recorded_calls(model) as calls:
        tape = record(model, Arguments.of((x,), 0, batch_dim), batch_dim)
    start, output = Crossing.of(tape.inputs[0]), _end(tape)
    passes = Passes(batched=tape.census.vmappable)
    marks = borders(calls, cuts(output.node, start.node), patterns)
    if batch_dim == 0:
        marks = separable(passes, tape, start, marks, output)
    steps = tuple(steps_between(start, marks, output, calls))
    batch = x.shape[0] if batch_dim == 0 else None
    return Journey(tape, steps, passes, batch), _merged(patterns, calls, steps)


def _end(tape: Tape) -> Crossing:
    """The output as one tensor; several leaves are joined."""
    with torch.inference_mode(False), torch.enable_grad():
        whole = tape.outputs[0] if len(tape.outputs) == 1 else _joined(tape)
        # An output that depends on nothing has no place in the graph; it gets one at its edge.
        return Crossing.of(whole if whole.requires_grad else whole.clone().requires_grad_())


def _joined(tape: Tape) -> Tensor:
    lead = tape.domain.lead
    # Times one: the gradient that arrives at a view of a complex tensor must not be a slice itself.
    parts = [
        part.reshape(*lead, part[0].numel() if lead else part.numel()) * 1 for part in tape.outputs
    ]
    return torch.cat(parts, dim=-1)


def _merged(
    patterns: tuple[str, ...] | None, calls: Sequence[Call], steps: Sequence[Step]
) -> tuple[str, ...]:
    """Say which of the modules that were asked for are no end of a step."""
    ends = {step.stop.node for step in steps}
    last = max((call.leaves[1] for call in calls), default=0)
    inside = [
        call.name
        for call in calls
        if patterns is not None
        and matches(call.module_name, patterns)
        and call.leaves[1] != last
        and not any(output.node in ends for output in call.outputs)
    ]
    if not inside:
        return ()
    return (f"merged, since other paths lead around them: {', '.join(inside)}",)


def _norms(journey: Journey, exact_passes: int, seed: int) -> list[StepNorm]:
    generator = torch.Generator().manual_seed(seed)
    norms = []
    for step in journey.steps:
        norm = log_norm(journey.passes, step, journey.samples, exact_passes, generator)
        refuse_infinite(norm.log, step)
        norms.append(norm)
    return norms


def _assembled(
    journey: Journey,
    log_gains: Tensor,
    norms: list[StepNorm] | None,
    notes: tuple[str, ...],
    seed: int,
) -> PathBound:
    def shaped(rows: Tensor) -> Tensor:
        return rows[0] if journey.batch is None else rows

    log_whole = log_gains.sum(dim=0)
    rows = [
        Layer(step.name, shaped(gain), None, None, None, exact=True)
        for step, gain in zip(journey.steps, log_gains, strict=True)
    ]
    if norms is None:
        return PathBound(shaped(log_whole), {}, tuple(rows), {}, notes, journey.passes.count, None)
    logs = torch.stack([norm.log for norm in norms])
    so_far = logs.flip(0).cumsum(0).flip(0)
    rows = [
        replace(row, log_fro=shaped(log), log_bound_so_far=shaped(sum_), exact=norm.exact)
        for row, log, sum_, norm in zip(rows, logs, so_far, norms, strict=True)
    ]
    exact = all(norm.exact for norm in norms)
    bound = _not_below(so_far[0], log_whole) if exact else so_far[0]
    return PathBound(
        log_norm=shaped(log_whole),
        rungs={"frobenius": shaped(bound)},
        layers=tuple(rows),
        certified={"frobenius": exact},
        notes=notes + _estimates(journey.steps, norms),
        passes=journey.passes.count,
        seed=None if exact else seed,
    )


def _not_below(bound: Tensor, truth: Tensor) -> Tensor:
    """Where the two are equal, as for a single step, rounding must not turn them around."""
    return torch.where((truth - bound).abs() < ROUNDING, torch.maximum(bound, truth), bound)


def _estimates(steps: Sequence[Step], norms: Sequence[StepNorm]) -> tuple[str, ...]:
    named = [step.name for step, norm in zip(steps, norms, strict=True) if not norm.exact]
    if not named:
        return ()
    return (
        f"log_fro is an estimate from {PROBES} random cotangents in {', '.join(named)}; "
        "raise exact_passes= to have it exact",
    )


def _check(model: nn.Module, x: Tensor, batch_dim: int | None) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(
            f"path_bound expects an nn.Module, got {type(model).__name__}; its steps are the calls "
            "of its submodules"
        )
    if not isinstance(x, Tensor):
        raise InputError(
            f"path_bound expects one input tensor, got {type(x).__name__}; wrap the model in a "
            "module that takes one"
        )
    if x.numel() == 0 or (batch_dim == 0 and x.dim() == 0):
        raise ShapeError(
            f"path_bound expects an input that holds something, got shape {tuple(x.shape)}"
            + (" with batch_dim=0; give at least one sample" if batch_dim == 0 else "")
        )


def checked_rungs(rungs: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of the rungs, all of which are there."""
    wanted = (rungs,) if isinstance(rungs, str) else tuple(rungs)
    for name in wanted:
        if name in PLANNED_RUNGS:
            raise NotAvailableError(
                f"this version does not have the rung {name!r}; available: {', '.join(RUNGS)}"
            )
        if name not in RUNGS:
            raise InputError(
                f"rungs expects names among {', '.join(RUNGS)}, got {name!r}; "
                "() computes the gains alone"
            )
    return wanted
