"""Where penalties draw from: a seed, a generator, or torch's default one, as dropout does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.errors import InputError
from pushforward.purity import RandomState

# Seeds that every generator of torch takes.
_SEEDS = 2**62


class Source:
    """What numbers are drawn from.

    Attributes:
        generator: None draws from torch's default generator.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Standard normal numbers, at least in single precision."""
        return self._drawn(torch.randn, shape, like)

    def signs(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Numbers +1 and -1, at least in single precision."""
        return 1 - 2 * self._drawn(torch.rand, shape, like).round()

    def state(self) -> RandomState:
        """Random numbers for a model to draw from, fresh ones at each call."""
        seed = int(torch.randint(_SEEDS, (), generator=self.generator, device=self._device("cpu")))
        cuda = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
        states = [
            torch.Generator(device).manual_seed(seed).get_state()
            for device in ("cpu", *(f"cuda:{i}" for i in range(cuda)))
        ]
        return RandomState(states[0], tuple(states[1:]))

    def _drawn(self, draw: Callable[..., Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor:
        # Half precision has too few bits to draw from, not to multiply with.
        dtype = torch.float32 if like.dtype.itemsize < 4 else like.dtype
        device = self._device(like.device)
        return draw(shape, generator=self.generator, dtype=dtype, device=device).to(like.device)

    def _device(self, default: Any) -> Any:
        return default if self.generator is None else self.generator.device


class Penalty(nn.Module):
    """What all penalties are: modules without parameters that know what to draw from.

    Args:
        seed: of a generator that belongs to this penalty; each call draws on.
        generator: one that is drawn from instead; neither draws from torch's default generator.
    """

    def __init__(self, seed: int | None = None, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self._source = source_of(seed, generator)

    def _drawing(self, seed: int | None, generator: torch.Generator | None) -> Source:
        """What one call draws from: its own seed or generator, else those of the penalty."""
        return self._source if seed is None and generator is None else source_of(seed, generator)


def source_of(seed: int | None, generator: torch.Generator | None) -> Source:
    """A source from one of the two, or from neither."""
    if seed is not None and generator is not None:
        raise InputError("expected seed= or generator=, got both; a generator holds its own seed")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator expects a torch.Generator, got {generator!r}")
    if seed is None:
        return Source(generator)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(
            f"seed expects a whole number, got {seed!r}; leave it out to draw from torch's default "
            "generator"
        )
    return Source(torch.Generator().manual_seed(seed))


def directions(count: int, y: Tensor, source: Source) -> Tensor:
    """Orthonormal directions for each sample, uniform on the sphere, ``(count, B, C)``.

    As many as there are outputs are the axes, with random signs: no direction is left out then, and
    what samples of a coupled batch send to each other cancels in the mean.
    """
    batch, outputs = len(y), math.prod(y.shape[1:])
    if count == outputs:
        signs = source.signs((count, batch), y).to(y.dtype)
        return torch.eye(count, dtype=y.dtype, device=y.device).unsqueeze(1) * signs.unsqueeze(-1)
    if count == 1:
        gauss = source.normal((1, batch, outputs), y)
        return (gauss / gauss.norm(dim=-1, keepdim=True)).to(y.dtype)
    basis, factor = torch.linalg.qr(source.normal((batch, outputs, count), y))
    # Signs that the algorithm chose would make the directions other than uniform.
    units = basis * factor.diagonal(dim1=-2, dim2=-1).sgn().unsqueeze(-2)
    return units.movedim(-1, 0).to(y.dtype)


def checked_projections(projections: int | str) -> int | None:
    """How many directions; None stands for "exact"."""
    if projections == "exact":
        return None
    if isinstance(projections, bool) or not isinstance(projections, int) or projections < 1:
        raise InputError(
            f'projections expects a whole number of at least 1, or "exact", got {projections!r}'
        )
    return projections
