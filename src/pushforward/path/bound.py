"""Along a network: which step makes its Jacobian large or small, and what a chain of norms says."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.boundary import Arguments
from pushforward.errors import InputError, ShapeError
from pushforward.path import assembling, show
from pushforward.path.assembling import Gains, Measured
from pushforward.path.cuts import cuts
from pushforward.path.dense import exact_norms, fits, width
from pushforward.path.findings import Findings, Layer
from pushforward.path.gains import gains, refuse_infinite, sensitivities
from pushforward.path.groups import exact_groups
from pushforward.path.norms import CERTIFIED, Spending, StepNorm, step_norm
from pushforward.path.pull import Passes
from pushforward.path.record import Call, Crossing, recorded_calls
from pushforward.path.samples import Known, separable, separable_from_output
from pushforward.path.sampling import checked_probes, estimated, log_sampled
from pushforward.path.steps import Step, borders, checked_layers, matches, steps_between
from pushforward.tape import Tape, record

RUNGS = ("frobenius", "mixed", "spectral", "segments")
EXACT_PASSES = 2048
SEGMENT_PASSES = 4096


@dataclass(frozen=True, repr=False, eq=False)
class PathBound(Findings):
    """What `path_bound` returns; tensors are ``(B,)``, or ``()`` without a batch, in nats.

    Attributes:
        log_norm: log ||J||_F of the whole map, exact; an estimate with ``probes=``.
        log_spectral_norm: log ||J||_2 of the whole map, exact; None where there are too many
            outputs and inputs for it, and with ``probes=``.
        rungs: the bounds on ``log_norm`` by name; each is at least that where it is certified.
        layers: one `Layer` per step, first step first.
        certified: by rung, whether it is a bound or an estimate of one.
        labels: by rung, the same in words: "certified", "holds with probability ...", "estimate",
            or "lower bound".
        interval: ends of a 95 % interval for ``log_norm``; None where it is exact.
        notes: what was merged, and what was estimated.
        passes: backward passes that were made.
        seed: of the random cotangents; None where nothing was estimated.
    """

    def table(self) -> str:
        """Rows, the ladder, a verdict and notes as plain text: means over the samples."""
        return show.table(self)

    def plot(self) -> Any:
        """A ``matplotlib.figure.Figure``: the gains as a waterfall, products of norms against the
        truth by depth, and the rungs; means over the samples, in decades.

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

    def verdict(self) -> str | None:
        """How large the Jacobian is and what the best certified rung proves of it, in a sentence;
        None where there is no such rung, or the Jacobian is zero."""
        return show.verdict(self)

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
    probes: int | None = None,
    exact_passes: float = EXACT_PASSES,
    segment_passes: float = SEGMENT_PASSES,
    delta: float = 0.0,
    seed: int | None = None,
) -> PathBound:
    r"""Take the norm of a network's Jacobian apart, step by step, and bound it by a ladder.

    The network falls into steps between tensors h_0 = x, h_1, ..., h_L = out that all dependence
    passes through. The gains of the steps add up to the truth, their norms to bounds:

    .. math::
        \log\|J\|_F = \sum_l \log \frac{\|\partial out/\partial h_{l-1}\|_F}
        {\|\partial out/\partial h_l\|_F} \le \sum_l \log\|J_l\|_F

    The rungs, of which each is at least the truth:

    - ``"frobenius"``: the sum of log ||J_l||_F;
    - ``"spectral"``: the sum of log ||J_l||_2, and half the logarithm of the narrowest width;
    - ``"mixed"``: one Frobenius norm, the others spectral, at the best place; at most both of
      those above, where their norms are exact;
    - ``"segments"``: the same over groups of steps whose Jacobians are taken whole, in the best
      division into groups; at most ``"mixed"``;
    - ``"sampled"``: a bound from below, by 8 orthonormal directions of the output.

    One step per call of a leaf module; functions between modules belong to the step that follows.
    A residual, concatenating or branching block is one step, named after the block. Its spectral
    norm is exact where its Jacobian is small enough to be formed; otherwise it is followed op by
    op: branches that meet add their norms, concatenated ones the squares of theirs.

    Args:
        model: a module whose output is a tensor, or a pytree of tensors.
        x: its input; ``(B, *in)`` with ``batch_dim=0``.
        batch_dim: 0 for a batch of independent samples, None for one map.
        layers: names of modules or globs ("layer*"): steps end at their outputs only. What no
            single tensor separates is merged, and ``notes`` says so. None takes every leaf.
        rungs: the bounds wanted, by name. With ``()`` only the gains are computed, which is quick.
        probes: estimate the gains from so many random cotangents, for many outputs; each gets an
            interval. None takes every output, and the gains are exact.
        exact_passes: steps that need more backward passes than this get an estimate of their
            Frobenius norm from 64 random cotangents; then ``certified["frobenius"]`` is False. The
            other rungs put their spectral bounds in its place.
        segment_passes: what ``"segments"`` may spend, in backward passes through single steps.
            A larger budget never gives a larger bound.
        delta: where a spectral norm is not exact, take a bound that fails with this probability,
            over all steps together, if it is lower; 0 leaves the rungs certified.
        seed: for what is random; a fresh one is taken and reported where none is given.

    Returns:
        `PathBound`, in float64 and detached: a diagnosis, not a training loss.

    Cost: one evaluation, and one backward pass per output for all gains together. For the norms of
    the steps a closed form (linear, convolution, pooling, elementwise, normalisation, softmax),
    otherwise min(outputs, 2.5 inputs) passes through that step alone, and singular values where
    they take no more than seconds.

    Raises:
        InputError: ``model`` is not a module, a pattern in ``layers`` matches nothing, a rung is
            unknown, ``probes``, ``delta``, ``seed`` or a budget is out of range.
        ShapeError: ``x`` or the output is empty.
        CouplingError: samples of the batch influence each other.
        DifferentiationError: a step has a Jacobian that is not finite, or is a reentrant
            checkpoint.

    The gains follow from the chain rule; the bounds from ||A B||_F <= ||A||_F ||B||_2 and
    ||A||_F^2 <= rank(A) ||A||_2^2 (Horn and Johnson, "Matrix Analysis", section 5.6).

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> for layer in (net[0], net[2]):
    ...     _ = nn.init.ones_(layer.weight)
    >>> p = path_bound(net, torch.ones(1, 2))
    >>> [(row.name, round(row.log_gain.exp().item(), 3)) for row in p.layers]
    [('0', 2.0), ('1', 1.0), ('2', 1.414)]
    >>> {name: round(bound.exp().item(), 3) for name, bound in p.rungs.items()}
    {'frobenius': 4.0, 'mixed': 2.828, 'spectral': 2.828, 'segments': 2.828}
    """
    _check(model, x, batch_dim)
    wanted = checked_rungs(rungs)
    limits = _limits(exact_passes, segment_passes, delta)
    patterns, probes = checked_layers(model, layers), checked_probes(probes)
    chosen = _checked_seed(seed)
    generator = torch.Generator().manual_seed(chosen)
    with torch.inference_mode(False), torch.no_grad():
        journey, notes = _travel(model, x, batch_dim, patterns, bool(wanted))
        found = _gains(journey, probes, bool(wanted), generator)
        measured = _measured(journey, wanted, limits, generator) if wanted else None
        whole = _log_spectral_norm(journey, found, measured is not None and probes is None)
    drew = probes is not None or (measured is not None and _drew(measured))
    return _assembled(journey, found, measured, wanted, whole, notes, chosen if drew else None)


@dataclass(frozen=True, eq=False)
class Journey:
    """A recorded evaluation, cut into steps."""

    tape: Tape
    steps: tuple[Step, ...]
    passes: Passes
    batch: int | None
    known: Known | None

    @property
    def samples(self) -> int:
        return 1 if self.batch is None else self.batch


def _travel(
    model: nn.Module,
    x: Tensor,
    batch_dim: int | None,
    patterns: tuple[str, ...] | None,
    thorough: bool,
) -> tuple[Journey, tuple[str, ...]]:
    """Evaluate a model once and cut it into steps."""
    with recorded_calls(model) as calls:
        tape = record(model, Arguments.of((x,), 0, batch_dim), batch_dim)
    _refuse_no_outputs(tape)
    start, output = Crossing.of(tape.inputs[0]), _end(tape)
    passes = Passes(batched=tape.census.vmappable)
    marks = borders(calls, cuts(output.node, start.node), patterns)
    known = None
    if batch_dim == 0 and thorough:
        marks = separable(passes, tape, start, marks, output)
    elif batch_dim == 0:
        marks, known = separable_from_output(passes, tape, start, marks, output)
    steps = tuple(steps_between(start, marks, output, calls))
    batch = x.shape[0] if batch_dim == 0 else None
    return Journey(tape, steps, passes, batch, known), _merged(patterns, calls, steps)


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


def _gains(journey: Journey, probes: int | None, ranks: bool, generator: torch.Generator) -> Gains:
    """Exact gains and singular values, or an estimate of the gains with intervals."""
    if probes is None:
        steps, samples, known = journey.steps, journey.samples, journey.known
        found = sensitivities(journey.passes, steps, samples, ranks, known)
        logs = gains(found.logs)
        return Gains(logs, logs.sum(dim=0), found.spectrum)
    guess = estimated(journey.passes, journey.steps, journey.samples, probes, generator)
    low, high = guess.interval
    total = guess.gains.sum(dim=0)
    return Gains(guess.gains, total, None, guess.gain_interval, (low[0], high[0]))


def _measured(
    journey: Journey, wanted: Sequence[str], limits: _Limits, generator: torch.Generator
) -> Measured:
    """The norms of the steps, and what else the rungs ask for."""
    steps, samples = journey.steps, journey.samples
    spectral = bool({"mixed", "spectral", "segments"} & set(wanted))
    spending = Spending(limits.exact_passes, spectral, limits.delta / len(steps))
    norms = _norms(journey, spending, generator)
    budget = limits.segment_passes if "segments" in wanted else 0
    groups = exact_groups(journey.passes, steps, samples, budget)
    sampled = None
    if "sampled" in wanted:
        sampled = log_sampled(journey.passes, steps, samples, generator)
    places = (steps[0].start, *(step.stop for step in steps))
    widths = tuple(width(place, samples) for place in places)
    names = tuple(step.name for step in steps)
    return Measured(names, widths, norms, groups, sampled, limits.delta)


def _norms(journey: Journey, spending: Spending, generator: torch.Generator) -> list[StepNorm]:
    norms = []
    for step in journey.steps:
        norm = step_norm(journey.passes, step, journey.samples, spending, generator)
        refuse_infinite(norm.log_fro, step)
        norms.append(norm)
    return norms


def _drew(measured: Measured) -> bool:
    """Whether anything random went into the result."""
    certain = all(norm.exact and norm.label == CERTIFIED for norm in measured.norms)
    return not certain or measured.sampled is not None


def _log_spectral_norm(journey: Journey, found: Gains, may_form: bool) -> Tensor | None:
    """log ||J||_2: from the rows that the gains came from, or from all rows taken again."""
    if found.spectrum is not None:
        return found.log_norm + found.spectrum.log_share[0]
    steps, samples = journey.steps, journey.samples
    ends = width(steps[0].start, samples), width(steps[-1].stop, samples)
    if not may_form or not fits(*ends, samples):
        return None
    return exact_norms(journey.passes, steps, samples).log_spectral


def _assembled(
    journey: Journey,
    found: Gains,
    measured: Measured | None,
    wanted: Sequence[str],
    whole: Tensor | None,
    notes: tuple[str, ...],
    seed: int | None,
) -> PathBound:
    names = [step.name for step in journey.steps]
    truth = found.log_norm if found.interval is None else None
    labels = {} if measured is None else assembling.labels(wanted, measured)
    result = PathBound(
        log_norm=found.log_norm,
        rungs={} if measured is None else assembling.rungs(wanted, measured, truth),
        layers=tuple(assembling.layers(names, found, measured)),
        certified={name: label == CERTIFIED for name, label in labels.items()},
        notes=notes + (() if measured is None else assembling.notes(measured)),
        passes=journey.passes.count,
        seed=seed,
        labels=labels,
        log_spectral_norm=whole,
        interval=found.interval,
    )
    return result if journey.batch is not None else _first(result)


def _first(found: Any) -> Any:
    """What was found of the one sample of a map that is no batch, ``()`` for ``(1,)``."""
    match found:
        case Tensor():
            return found[0]
        case dict():
            return {name: _first(value) for name, value in found.items()}
        case tuple():
            return tuple(_first(value) for value in found)
        case Layer() | PathBound():
            return replace(found, **{f.name: _first(getattr(found, f.name)) for f in fields(found)})
    return found


@dataclass(frozen=True)
class _Limits:
    exact_passes: float
    segment_passes: float
    delta: float


def _limits(exact_passes: float, segment_passes: float, delta: float) -> _Limits:
    """Return the budgets, none of which is negative, and a probability."""
    for name, budget in (("exact_passes", exact_passes), ("segment_passes", segment_passes)):
        if not (_is_number(budget) and budget >= 0):
            raise InputError(f"{name} expects a number of passes, 0 or more, got {budget!r}")
    if not (_is_number(delta) and 0 <= delta < 1):
        raise InputError(
            f"delta expects a probability from 0 to below 1, got {delta!r}; 0 leaves the rungs "
            "certified, 0.01 lets them fail in one of a hundred calls"
        )
    return _Limits(exact_passes, segment_passes, delta)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _checked_seed(seed: int | None) -> int:
    """Return the seed, or a fresh one where none is given."""
    if seed is None:
        return secrets.randbits(32)
    if isinstance(seed, Integral) and not isinstance(seed, bool) and -(2**63) <= seed < 2**64:
        return int(seed)
    raise InputError(
        f"seed expects a whole number of 64 bits, got {seed!r}; None takes a fresh one"
    )


def _refuse_no_outputs(tape: Tape) -> None:
    if not any(output.numel() for output in tape.outputs):
        shapes = ", ".join(str(tuple(output.shape)) for output in tape.outputs) or "no tensor"
        raise ShapeError(
            f"path_bound expects a model with outputs, got {shapes}; there is no Jacobian to bound"
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
    """Return the names of the rungs, each once."""
    known = (*RUNGS, "sampled")
    if not isinstance(rungs, Iterable):
        raise InputError(
            f"rungs expects names among {', '.join(known)}, got {rungs!r}; () computes the gains "
            "alone"
        )
    wanted = (rungs,) if isinstance(rungs, str) else tuple(rungs)
    for name in wanted:
        if name not in known:
            raise InputError(
                f"rungs expects names among {', '.join(known)}, got {name!r}; "
                "() computes the gains alone"
            )
    return tuple(dict.fromkeys(wanted))
