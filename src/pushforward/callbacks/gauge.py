"""The gains of a batch by one forward and one backward pass, once the steps are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pushforward.callbacks.route import Route, Survey, all_between, survey
from pushforward.callbacks.wrapped import plain_name
from pushforward.errors import CouplingError, DifferentiationError
from pushforward.path import path_bound
from pushforward.purity import modes_set

# Outputs up to which all of them are taken, and directions taken where there are more.
FEW_OUTPUTS, DIRECTIONS = 16, 8
SAMPLES = 8
ROWS = 4  # most rows in one pass, in batches


@dataclass(frozen=True, eq=False)
class Reading:
    """Gains of the steps, ``(steps, samples)`` in nats; ``exact`` where all outputs were taken."""

    names: tuple[str, ...]
    log_gains: Tensor
    exact: bool


@dataclass(frozen=True)
class Effort:
    """How many samples to take, and how many directions at the output."""

    samples: int
    directions: int


def effort(batch: int, outputs: int, samples: int | None, directions: int | None) -> Effort:
    """What was asked for; else what stays below about half of a training step on the batch.

    A step costs three forward passes over the batch, a measurement two over samples times
    directions.
    """
    if directions is None:
        few = outputs <= min(FEW_OUTPUTS, 2 * batch)
        directions = outputs if few else min(DIRECTIONS, batch)
    if samples is None:
        samples = min(SAMPLES, batch // (2 * max(directions, 1)))
    return Effort(min(max(samples, 1), batch), min(directions, outputs))


class Gauge:
    """Measures one model again and again; what it learns of the model is kept in between.

    ``alone`` is whether a call of the model needs this process only.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None,
        samples: int | None,
        directions: int | None,
        alone: bool,
    ) -> None:
        self.model, self.layers, self.alone = model, layers, alone
        self.samples, self.directions = samples, directions
        self._route: Route | None = None
        self._graph: tuple[str, ...] = ()
        self._names: tuple[str, ...] = ()
        self._outputs = 0
        self._in_range = True

    def read(self, x: Tensor, batch: int, seed: int) -> Reading:
        """The gains on the first samples ``x`` of a batch, in evaluation mode.

        Raises:
            CouplingError: samples influence each other.
            DifferentiationError: a gradient is not finite.
        """
        training = [module for module in self.model.modules() if module.training]
        with (
            modes_set([(module, False) for module in training]),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            found = None if self._route is None else self._again(x, batch, seed)
            return self._anew(x, batch, seed) if found is None else found

    def _again(self, x: Tensor, batch: int, seed: int) -> Reading | None:
        """Measure by what is known; None where the model takes another way than it did."""
        plan = effort(batch, self._outputs, self.samples, self.directions)
        samples, cotangents = x[: plan.samples], directions(self._outputs, plan.directions, seed)
        self._in_range = True
        size = max(1, ROWS * batch // len(samples))
        parts = cotangents.chunk(math.ceil(len(cotangents) / size))
        found = [self._pass(samples, part) for part in parts]
        norms = [each for each in found if each is not None]
        if len(norms) < len(parts):
            return None
        return self._reading(torch.cat(norms, dim=1), samples, cotangents)

    def _pass(self, samples: Tensor, cotangents: Tensor) -> Tensor | None:
        """Norms at the beginning of each step, (steps, cotangents, samples)."""
        assert self._route is not None
        rows, seeds = paired(samples, cotangents)
        passage = self._route.follow(self.model, rows)
        if passage is None or passage.graph != self._graph or passage.output.shape != seeds.shape:
            return None
        norms, dtype = passage.norms(seeds)
        self._in_range &= in_range(norms, dtype)
        return norms.unflatten(1, (len(cotangents), len(samples)))

    def _reading(self, norms: Tensor, samples: Tensor, cotangents: Tensor) -> Reading:
        if not self._in_range:
            return self._carefully(samples)
        logs = torch.linalg.vector_norm(norms, dim=1).log()
        return Reading(self._names, gains(logs), len(cotangents) == self._outputs)

    def _carefully(self, samples: Tensor) -> Reading:
        """Where gradients leave the range of their dtype: step by step."""
        if not self.alone:
            raise DifferentiationError(
                "expected gradients that their dtype can hold, got some that underflow, overflow "
                "or are not finite; look for a layer that grows or shrinks by decades"
            )
        path = path_bound(self.model, samples, batch_dim=0, layers=self.layers, rungs=())
        names = tuple(plain_name(row.name, self.model) for row in path.layers)
        return Reading(names, torch.stack([row.log_gain for row in path.layers]), True)

    # --- finding the steps ----------------------------------------------------------------------

    def _anew(self, x: Tensor, batch: int, seed: int) -> Reading:
        """Find the steps, see that samples stay apart, and that hooks find the steps again."""
        self._outputs = survey(self.model, x[:1], self.layers).passage.output.shape[1]
        plan = effort(batch, self._outputs, self.samples, self.directions)
        samples, cotangents = x[: plan.samples], directions(self._outputs, plan.directions, seed)
        rows, seeds = paired(samples, cotangents[: max(1, ROWS * batch // len(samples))])
        whole = survey(self.model, rows, self.layers)
        norms, dtype = whole.passage.norms(seeds)
        if not in_range(norms, dtype):
            return self._carefully(samples)
        chosen = self._apart(whole, norms, rows, seeds)
        route, begins = whole.route(chosen)
        passage = route.follow(self.model, rows)
        if passage is None or not alike(passage.norms(seeds)[0], norms[begins], dtype):
            self._route = None
            return self._carefully(samples)
        self._route, self._graph = route, passage.graph
        self._names = tuple(plain_name(name, self.model) for name in route.names)
        found = self._again(x, batch, seed)
        return self._carefully(samples) if found is None else found

    def _apart(self, whole: Survey, norms: Tensor, rows: Tensor, seeds: Tensor) -> list[int]:
        """Which of the edges keep samples apart: a row alone has the same gradients there.

        Raises:
            CouplingError: not even the input does.
        """
        row = int(norms[0].argmax())
        single = survey(self.model, rows[row : row + 1], self.layers)
        found, dtype = single.passage.norms(seeds[row : row + 1])
        alone = dict(zip(single.ends, found, strict=True))
        same = [
            number
            for number, end in enumerate(whole.ends)
            if end in alone and alike(alone[end], norms[number, row : row + 1], dtype)
        ]
        if same[:1] != [0]:
            raise CouplingError(
                "expected samples that do not influence each other in evaluation mode, got "
                "gradients of one sample that change with the others; look for an operation over "
                "dimension 0, or watch the part of the model behind it"
            )
        return same[1:]


# --- numbers ------------------------------------------------------------------------------------


def directions(outputs: int, count: int, seed: int) -> Tensor:
    """Cotangents (count, outputs) whose squares sum to ||J||_F^2: all unit vectors, or on average.

    Fewer than all are orthonormal, uniformly distributed, and scaled by the root of outputs over
    count.
    """
    if count >= outputs:
        return torch.eye(outputs, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(outputs, count, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(random).Q.T * math.sqrt(outputs / count)


def paired(samples: Tensor, cotangents: Tensor) -> tuple[Tensor, Tensor]:
    """Every sample with every cotangent, (cotangents * samples, ...), samples running fastest."""
    rows = samples.repeat(len(cotangents), *(1 for _ in samples.shape[1:]))
    return rows, cotangents.repeat_interleave(len(samples), dim=0).to(samples.device)


def gains(logs: Tensor) -> Tensor:
    """Of log ||d out/d h|| before each step, (steps, samples), what each step adds.

    Behind a step that kills everything it is -inf already: those steps have gain 0.
    """
    after = torch.cat([logs[1:], torch.zeros_like(logs[:1])])
    return torch.where(after == -torch.inf, 0.0, logs - after)


def in_range(norms: Tensor, dtype: torch.dtype) -> bool:
    """Whether gradients of these norms are far from underflow and overflow."""
    tiny = torch.finfo(dtype).tiny ** 0.5
    if all_between(norms, tiny, 1 / tiny):
        return True
    return bool(((norms == 0) | ((norms > tiny) & (norms < 1 / tiny))).all())


def alike(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether norms are the same up to rounding, which differs with the size of a batch.

    In short numbers generously: kernels change with the size, and units change sides.
    """
    slack = {8: 1e-6, 4: 1e-2}.get(dtype.itemsize, 5e-2)
    least = torch.finfo(dtype).eps * float(expected.max())
    return found.shape == expected.shape and torch.allclose(found, expected, slack, least)
