"""The numbers of a report: every sample through the Jacobian, along the path, and through noise.

Samples are taken in tiles of a fixed size, which are what random draws depend on, and a tile in
chunks that fit in the memory allowed, so that a budget changes no draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pushforward.boundary import Structure
from pushforward.derivatives import jacobian
from pushforward.errors import (
    DifferentiationError,
    InputError,
    MemoryBudgetError,
    PushforwardError,
)
from pushforward.estimate import student_quantile
from pushforward.noise import noise_response
from pushforward.path import path_bound
from pushforward.report.data import DataSet
from pushforward.report.fitting import evaluating
from pushforward.report.margins import Margins, margins
from pushforward.report.spectra import Spectra, spectra

TILE = 16
DEFAULT_MEMORY = 2**30
COPIES = 4  # of a Jacobian alive at once: itself, for its decomposition, its differences
SIGMAS = (0.01, 0.03, 0.1, 0.3, 1.0)  # in units of the spread of the data
NOISE_SAMPLES = 64
PATH_EFFORT = 6  # about how long the path takes, in units of a Jacobian or of noise at one sigma

Progress = Callable[[float, float], None]


T = TypeVar("T")


@dataclass(frozen=True)
class Jacobians:
    """What the Jacobian of each sample says.

    ``margins`` is None where the output is not one logit for each of several classes, and
    ``heat``, (B, H, W), the root of the summed squared derivatives by each pixel, where a sample is
    no picture.
    """

    spectra: Spectra
    margins: Margins | None
    heat: Tensor | None


@dataclass(frozen=True)
class Layer:
    """A step of the path, with the names and units of `pf.path_bound`: nats, (B,).

    ``exact`` says whether ``log_fro`` is exact, not an estimate; ``spectral_label`` whether
    ``log_spectral`` is certified.
    """

    name: str
    exact: bool
    spectral_label: str | None
    log_gain: Tensor
    log_fro: Tensor
    log_spectral: Tensor
    log_bound_so_far: Tensor


@dataclass(frozen=True)
class Path:
    """What `pf.path_bound` says, over all samples."""

    log_norm: Tensor
    rungs: dict[str, Tensor]
    certified: dict[str, bool]
    labels: dict[str, str]
    layers: tuple[Layer, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Noise:
    """What `pf.noise_response` says at one ``sigma``; tensors are (B,).

    ``spread`` is the half-width of Student's interval around ``ratio``; beyond it ``low`` and
    ``high`` allow for skewed draws and for rounding.
    """

    sigma: float
    ratio: Tensor
    low: Tensor
    high: Tensor
    spread: Tensor
    linear: Tensor


@dataclass(frozen=True)
class Measurement:
    """All that a report shows of a model on data; ``shape`` is (m, n) of one sample's Jacobian.

    ``noise`` lacks the sigmas in ``unbearable``, at which noise led out of the model's domain.
    """

    shape: tuple[int, int]
    jacobians: Jacobians
    path: Path
    noise: tuple[Noise, ...]
    unbearable: tuple[float, ...]
    input_norm: Tensor
    spread: float


def measure(
    model: nn.Module,
    data: DataSet,
    *,
    layers: Sequence[str] | None = None,
    seed: int = 0,
    memory: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Measurement:
    """Measure ``model`` in evaluation mode on the samples of ``data``, which must fit it.

    Cost: per sample min(m, n) passes for the Jacobian, what `pf.path_bound` costs, and
    ``NOISE_SAMPLES`` evaluations for each of the ``SIGMAS``.

    Raises:
        DifferentiationError: where an op has no derivative, or an output is not finite.
        MemoryBudgetError: where not even one sample fits in ``memory``.
    """
    spread = spread_of(data.x)
    with evaluating(model), torch.no_grad(), one_kind_of_error():
        shape = jacobian_shape(model, data.x)
        chunk = chunk_size(shape, data.x, memory)
        tiles = list(_tiles(_Work(model, data, layers, seed, memory, chunk, spread), progress))
    levels = list(zip(*(tile.noise for tile in tiles), strict=True))
    return Measurement(
        shape=shape,
        jacobians=joined([tile.jacobians for tile in tiles]),
        path=joined_paths([tile.path for tile in tiles]),
        noise=tuple(joined(level) for level in levels if None not in level),
        unbearable=tuple(
            factor * spread for factor, level in zip(SIGMAS, levels, strict=True) if None in level
        ),
        input_norm=torch.linalg.vector_norm(data.x.flatten(1).double(), dim=1),
        spread=spread,
    )


def spread_of(x: Tensor) -> float:
    """The standard deviation of all entries of the inputs; 1 where they are all the same."""
    spread = x.double().std(correction=0).item()
    return spread if spread > 0 else 1.0


def jacobian_shape(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """(m, n) of the Jacobian of one sample.

    Raises:
        DifferentiationError: where the output is not real or complex numbers.
    """
    try:
        m, n = jacobian(model, x[:1], batch_dim=0).shape
    except InputError as error:
        raise DifferentiationError(f"the model's output has no derivative: {error}") from error
    return m, n


def chunk_size(shape: tuple[int, int], x: Tensor, memory: int | None) -> int:
    """How many samples' Jacobians fit in ``memory``, at most a tile.

    Raises:
        MemoryBudgetError: where not even one fits.
    """
    needed = COPIES * math.prod(shape) * x.dtype.itemsize
    if memory is not None and needed > memory:
        raise MemoryBudgetError(
            f"the Jacobian of one sample is {shape[0]} x {shape[1]} and takes about {needed} bytes "
            f"to work with, more than --memory {memory}; allow more, or measure a smaller model"
        )
    return min(TILE, max(1, (memory or DEFAULT_MEMORY) // max(1, needed)))


@contextmanager
def one_kind_of_error() -> Iterator[None]:
    """Errors that torch raises under way mean that this map cannot be differentiated."""
    try:
        yield
    except PushforwardError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise DifferentiationError(
            f"the model cannot be differentiated here: {type(error).__name__}: {error}"
        ) from error


# --- tile by tile -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    model: nn.Module
    data: DataSet
    layers: Sequence[str] | None
    seed: int
    memory: int | None
    chunk: int
    spread: float


@dataclass(frozen=True)
class _Tile:
    jacobians: Jacobians
    path: Path
    noise: tuple[Noise | None, ...]


def _tiles(work: _Work, progress: Progress) -> Iterator[_Tile]:
    """Measure tile after tile."""
    x, done = work.data.x, 0.0

    def step(rows: Tensor, effort: int) -> None:
        nonlocal done
        done += len(rows) * effort / (1 + PATH_EFFORT + len(SIGMAS))
        progress(done, float(len(x)))

    for number, rows in enumerate(x.split(TILE)):
        yield _tile(work, number, rows, partial(step, rows))


def _tile(work: _Work, number: int, rows: Tensor, step: Callable[[int], None]) -> _Tile:
    chunks = rows.split(work.chunk)
    starts = range(number * TILE, number * TILE + len(rows), work.chunk)
    numbers = joined([_jacobians(work, x, i) for x, i in zip(chunks, starts, strict=True)])
    step(1)
    path = joined_paths([_path(work, x) for x in chunks])
    step(PATH_EFFORT)
    levels = []
    for place, sigma in enumerate(SIGMAS):
        levels.append(_noise(work, rows, sigma * work.spread, number * len(SIGMAS) + place))
        step(1)
    return _Tile(numbers, path, tuple(levels))


def _jacobians(work: _Work, x: Tensor, first: int) -> Jacobians:
    """Everything that needs the entries of the Jacobians of a chunk."""
    operator = jacobian(work.model, x, batch_dim=0, memory=work.memory)
    _expect_finite(operator.value, "output", first)
    matrix = operator.matrix().detach()
    _expect_finite(matrix, "Jacobian", first)
    logits = logits_of(operator.value)
    return Jacobians(
        spectra=spectra(matrix),
        margins=None if logits is None else margins(logits, matrix),
        heat=heat(matrix, work.data.image_shape),
    )


def _expect_finite(values: Any, what: str, first: int) -> None:
    leaves = [leaf for leaf in Structure.of(values)[0] if isinstance(leaf, Tensor)]
    for leaf in leaves:
        bad = ~torch.isfinite(leaf.flatten(1)).all(1)
        if bad.any():
            raise DifferentiationError(
                f"the {what} of sample {first + int(bad.nonzero()[0])} must be finite, got NaN or "
                "infinity; look for a division by zero or an overflow in the model"
            )


def logits_of(value: Any) -> Tensor | None:
    """The output as logits (B, C) of several classes, None where it is something else."""
    if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] > 1:
        return value.detach() if value.is_floating_point() else None
    return None


def heat(matrix: Tensor, image_shape: tuple[int, int, int] | None) -> Tensor | None:
    """How much the output moves with each pixel, (B, H, W), all channels together."""
    if image_shape is None or matrix.shape[2] != math.prod(image_shape):
        return None
    columns = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64)
    return torch.linalg.vector_norm(columns.unflatten(1, image_shape), dim=1)


def _path(work: _Work, x: Tensor) -> Path:
    bound = path_bound(work.model, x, batch_dim=0, layers=work.layers, seed=work.seed)
    return Path(
        log_norm=bound.log_norm.double(),
        rungs={name: rung.double() for name, rung in bound.rungs.items()},
        certified=dict(bound.certified),
        labels=dict(bound.labels),
        layers=tuple(_layer(row) for row in bound.layers),
        notes=bound.notes,
    )


_LOGS = ("log_gain", "log_fro", "log_spectral", "log_bound_so_far")


def _layer(row: Any) -> Layer:
    logs = (getattr(row, name).double() for name in _LOGS)
    return Layer(row.name, row.exact, row.spectral_label, *logs)


def _noise(work: _Work, x: Tensor, sigma: float, draw: int) -> Noise | None:
    """The response at one sigma; each tile and sigma draws noise of its own."""
    seed = (work.seed * 1_000_003 + draw) % 2**63
    try:
        response = noise_response(
            work.model, x, sigma, samples=NOISE_SAMPLES, batch_dim=0, seed=seed
        )
    except InputError:  # the model is finite at x, which was seen, and not at x + e
        return None
    estimate = response.ratio
    low, high = estimate.interval
    spread = student_quantile((1 + estimate.confidence) / 2, NOISE_SAMPLES // 2 - 1)
    return Noise(
        sigma, estimate.value, low, high, spread * estimate.stderr, response.linear.double()
    )


# --- joining ------------------------------------------------------------------------------------


def joined(parts: Sequence[T]) -> T:
    """Join tensors per sample end to end, in dataclasses too; all else is the same in all parts."""
    first: Any = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))  # type: ignore
    if not is_dataclass(first):
        return first
    names = [field.name for field in fields(first)]
    columns = {name: joined([getattr(part, name) for part in parts]) for name in names}
    return replace(first, **columns)  # type: ignore


def joined_paths(parts: Sequence[Path]) -> Path:
    """Join paths over samples.

    Raises:
        DifferentiationError: where samples took different paths.
    """
    first = parts[0]
    names = [[layer.name for layer in part.layers] for part in parts]
    if any(other != names[0] for other in names):
        raise DifferentiationError(
            "all samples must pass the same layers, got different paths; name modules that all of "
            "them pass with --layers"
        )
    return Path(
        log_norm=torch.cat([part.log_norm for part in parts]),
        rungs={name: torch.cat([part.rungs[name] for part in parts]) for name in first.rungs},
        certified={name: all(part.certified[name] for part in parts) for name in first.certified},
        labels={name: _weakest([part.labels[name] for part in parts]) for name in first.labels},
        layers=tuple(joined(rows) for rows in zip(*(part.layers for part in parts), strict=True)),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def _weakest(labels: Sequence[str]) -> str:
    """What a rung is over all samples: certified where it is for each of them."""
    return next((label for label in labels if label != "certified"), "certified")
