"""Spectral norms of convolutions, from above."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.path.spectrum import affordable, log_greatest, log_inequality, log_norms

# Frequencies times channels cubed: some seconds of one core.
MOST_WORK = 5e9
MOST_BYTES = 2**29


@dataclass(frozen=True, eq=False)
class Convolution:
    """What a convolution does, in one dimension or more.

    ``weight`` is (out, in / groups, *kernel); ``size`` the extent of its input.
    """

    weight: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    def grouped(self) -> Tensor:
        """The weight as (groups, out / groups, in / groups, *kernel)."""
        return self.weight.detach().double().unflatten(0, (self.groups, -1))


def log_norm(conv: Convolution) -> float:
    """Return log of a bound on ||J||_2: the least of three.

    Zero padding and the cutting off at the border make a convolution a part (a compression) of the
    circular one on a torus that is larger by the padding, so its norm is at most that of the
    torus, where the discrete Fourier transform takes it apart into one small matrix per frequency
    (Sedghi, Gupta and Long 2019, "The Singular Values of Convolutional Layers"). A stride s folds
    s^d frequencies into one. Beside it sqrt(||J||_1 ||J||_inf) from the taps, and the norm of the
    unfolded kernel times the root of how often a number enters.
    """
    if not conv.weight.any():
        return -math.inf
    return min(_by_taps(conv), _by_unfolding(conv), _by_frequencies(conv))


def _by_taps(conv: Convolution) -> float:
    sizes = conv.grouped().abs()
    rows = sizes.flatten(2).sum(dim=-1).max()
    # Under a stride an input meets only the taps of its own phase.
    phases = _phases(conv, sizes).sum(dim=(1, 3))
    return float(rows.log() + phases.max().log()) / 2


def _phases(conv: Convolution, taps: Tensor) -> Tensor:
    """Taps by the phase of the input that they meet: (groups, out, in, taps, phases)."""
    groups, leaving, entering = taps.shape[:3]
    numbers = _phase_numbers(conv).to(taps.device)
    table = torch.nn.functional.one_hot(numbers, math.prod(conv.stride)).to(taps.dtype)
    return taps.reshape(groups, leaving, entering, -1, 1) * table


def _phase_numbers(conv: Convolution) -> Tensor:
    """Which inputs, modulo the stride, each tap meets; flat over the kernel."""
    number = torch.zeros(1, dtype=torch.long)
    for taps, stride, dilation in zip(conv.kernel, conv.stride, conv.dilation, strict=True):
        phase = torch.arange(taps) * dilation % stride
        number = (number[:, None] * stride + phase).reshape(-1)
    return number


def _by_unfolding(conv: Convolution) -> float:
    """||J|| <= ||W|| ||unfold||, with W as (out, in * taps), and the same for the adjoint."""
    weight = conv.grouped()
    here = weight.flatten(2)
    there = weight.transpose(1, 2).flatten(2)
    counts = torch.bincount(_phase_numbers(conv), minlength=math.prod(conv.stride))
    often = math.log(int(counts.max())) / 2
    taps = math.log(math.prod(conv.kernel)) / 2
    return min(_greatest(here) + often, _greatest(there) + taps)


def _greatest(matrices: Tensor) -> float:
    fits = affordable(*matrices.shape[-2:])
    return float((log_norms(matrices) if fits else log_inequality(matrices)).max())


def _by_frequencies(conv: Convolution) -> float:
    torus = _torus(conv)
    _, leaving, entering = conv.grouped().shape[:3]
    side = min(leaving, entering * math.prod(conv.stride))
    frequencies = math.prod(torus) / math.prod(conv.stride)
    work = conv.groups * frequencies * side**2 * max(leaving, entering)
    bytes_ = 16 * conv.groups * math.prod(torus) * leaving * entering
    if work > MOST_WORK or bytes_ > MOST_BYTES:
        return math.inf
    return log_greatest(_symbols(conv, torus))


def _torus(conv: Convolution) -> tuple[int, ...]:
    """The least extent, a multiple of the stride, on which nothing wraps onto an input.

    Taps reach ``padding`` beyond both ends; both margins may share the same zeros.
    """
    extents = zip(conv.size, conv.padding, conv.stride, strict=True)
    return tuple(math.ceil((size + padding) / stride) * stride for size, padding, stride in extents)


def _symbols(conv: Convolution, torus: Sequence[int]) -> Tensor:
    """One matrix per folded frequency and group: (groups * frequencies, out, in * folds)."""
    dims = tuple(range(3, 3 + len(torus)))
    spread = _spread(conv, torus)
    symbol = torch.fft.fftn(spread, dim=dims)
    for dim, (extent, stride) in enumerate(zip(torus, conv.stride, strict=True)):
        # Frequencies f, f + N/s, f + 2N/s, ... are the same after every s-th row is kept.
        symbol = symbol.unflatten(3 + 2 * dim, (stride, extent // stride))
    # The kernel is real: what belongs to -f is the conjugate of what belongs to f.
    symbol = symbol[..., : symbol.shape[-1] // 2 + 1]
    folds = [3 + 2 * dim for dim in range(len(torus))]
    kept = [4 + 2 * dim for dim in range(len(torus))]
    symbol = symbol.permute(0, *kept, 1, 2, *folds)
    symbol = symbol.flatten(-len(torus) - 1).flatten(0, len(torus))
    return symbol / math.sqrt(math.prod(conv.stride))


def _spread(conv: Convolution, torus: Sequence[int]) -> Tensor:
    """The kernel on the torus, taps apart by the dilation; what wraps around adds up."""
    weight = conv.grouped()
    image = torch.zeros(*weight.shape[:3], *torus, dtype=torch.float64, device=weight.device)
    for tap in itertools.product(*(range(size) for size in conv.kernel)):
        at = tuple(t * d % n for t, d, n in zip(tap, conv.dilation, torus, strict=True))
        image[(..., *at)] += weight[(..., *tap)]
    return image
