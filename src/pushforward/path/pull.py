"""Cotangents pulled back from one place of the graph to another, several in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pushforward.errors import DifferentiationError
from pushforward.path.record import Crossing
from pushforward.purity import quiet_vmap
from pushforward.tape import explained

Source = Tensor | GradientEdge

# What a block of cotangents may take, with the gradients on its way.
BLOCK_BYTES = 2**28
# Several cotangents share a pass to save on calls. On a CPU that pays while they stay in its cache;
# beyond, vmap's reorderings of memory cost more than the calls (measured on a ResNet-20: half the
# speed at twice the cache).
CACHE_BYTES = {"cpu": 2**20}
ELSEWHERE_BYTES = 2**26
FEW = 8
# Pushing forward differentiates a backward pass once more: about two and a half times its work.
PUSH_COST = 2.5
# Between this and its inverse the squares of a float32 vector neither underflow nor overflow.
TINY = 1e-12


@dataclass(eq=False)
class Passes:
    """Backward passes over one retained graph, counted.

    ``batched`` turns itself off where an op cannot take several cotangents at once; they then go
    one by one through plain ``autograd.grad``.
    """

    batched: bool = True
    count: int = 0

    def pull(self, start: Crossing, stop: Crossing, cotangents: Tensor) -> Tensor:
        """``(k, *start.shape) -> (k, *stop.shape)``: rows u^T J between two places."""
        self.count += len(cotangents)
        if start.edge == stop.edge:
            return cotangents
        return self._grad(start.edge, (stop.edge,), cotangents, (stop.shape,))[0]

    def pull_to_all(
        self, start: Crossing, stops: Sequence[Crossing], cotangents: Tensor
    ) -> list[Tensor]:
        """``(k, *start.shape) -> (k, *stop.shape)`` for several places in one backward pass."""
        self.count += len(cotangents)
        sources, shapes = [stop.edge for stop in stops], [stop.shape for stop in stops]
        return self._grad(start.edge, sources, cotangents, shapes)

    def transposed(self, start: Crossing, stop: Crossing) -> Callable[[Tensor], Tensor]:
        """Return v -> J v, ``(k, *stop.shape) -> (k, *start.shape)``, by differentiating
        u -> J^T u once more.

        Raises:
            RuntimeError: an op on the way has no second derivative, and says so.
            DifferentiationError: it says nothing, but <u, J v> = <J^T u, v> does not hold.
        """
        cotangent = torch.zeros(start.shape, dtype=start.dtype, device=start.device)
        cotangent.requires_grad_()
        with torch.enable_grad():
            (pulled,) = torch.autograd.grad(
                (start.edge,), (stop.edge,), (cotangent,), create_graph=True, allow_unused=True
            )
        if pulled is None:
            return lambda tangents: tangents.new_zeros(len(tangents), *start.shape)

        def push(tangents: Tensor) -> Tensor:
            return self._push(pulled, cotangent, tangents, start)

        self._compare(push, start, stop)
        return push

    def _compare(self, push: Callable[[Tensor], Tensor], start: Crossing, stop: Crossing) -> None:
        u, v = _random(start), _random(stop)
        pushed, pulled = push(v).double(), self.pull(start, stop, u).double()
        error = ((u * pushed).sum() - (pulled * v).sum()).abs()
        scale = u.double().norm() * pushed.norm() + pulled.norm() * v.double().norm()
        if not error <= scale * torch.finfo(start.dtype).eps ** 0.5:
            raise DifferentiationError("an op's backward pass cannot be differentiated again")

    def _push(self, pulled: Tensor, cotangent: Tensor, tangents: Tensor, start: Crossing) -> Tensor:
        self.count += len(tangents)
        return self._grad(pulled, (cotangent,), tangents, (start.shape,))[0]

    def _grad(
        self,
        output: Source,
        sources: Sequence[Source],
        seeds: Tensor,
        shapes: Sequence[tuple[int, ...]],
    ) -> list[Tensor]:
        def one(seed: Tensor) -> tuple[Tensor, ...]:
            gradients = torch.autograd.grad(
                cast(Any, output), cast(Any, sources), seed, retain_graph=True, allow_unused=True
            )
            return tuple(
                seed.new_zeros(shape) if gradient is None else gradient
                for gradient, shape in zip(gradients, shapes, strict=True)
            )

        size = self.rows_per_pass(seeds.shape[1:], *shapes, like=seeds)
        if size > 1 and len(seeds) > 1:
            try:
                with quiet_vmap():
                    parts = [torch.func.vmap(one)(part) for part in seeds.split(size)]
                return [_whole(torch.cat, pieces) for pieces in zip(*parts, strict=True)]
            except RuntimeError:
                self.batched = False
        with _plain_gradients():
            each = [one(seed) for seed in seeds]
        return [_whole(torch.stack, pieces) for pieces in zip(*each, strict=True)]

    def rows_per_pass(self, *shapes: Sequence[int], like: Tensor) -> int:
        """How many cotangents to send through one pass, given the tensors on the way."""
        row = max(math.prod(shape) for shape in shapes) * like.dtype.itemsize
        size = CACHE_BYTES.get(like.device.type, ELSEWHERE_BYTES) // max(1, row)
        return size if self.batched and size >= FEW else 1


@contextmanager
def _plain_gradients() -> Iterator[None]:
    """Say what to do about a reentrant checkpoint, which has no gradients of single tensors."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise explained(error) from error


def _whole(join: Callable[..., Tensor], pieces: Sequence[Tensor]) -> Tensor:
    """Join pieces; a single one that is whole already is not copied."""
    if len(pieces) == 1:
        return pieces[0] if join is torch.cat else pieces[0].unsqueeze(0)
    return join(pieces)


def _random(place: Crossing) -> Tensor:
    source = torch.Generator().manual_seed(0)
    return torch.randn(1, *place.shape, generator=source).to(place.device, place.dtype)


def blocks(total: int, *places: Crossing) -> Iterator[tuple[int, int]]:
    """Cut ``total`` cotangents into blocks that keep to `BLOCK_BYTES` at the widest place."""
    widest = max(math.prod(place.shape) * place.dtype.itemsize for place in places)
    size = max(1, BLOCK_BYTES // max(1, 4 * widest))
    for first in range(0, total, size):
        yield first, min(first + size, total)


def unit_vectors(place: Crossing, samples: int, first: int, last: int) -> Tensor:
    """Unit vectors ``first`` to ``last`` of a place, the same in each sample."""
    size = math.prod(place.shape) // samples
    units = torch.zeros(last - first, size, dtype=place.dtype, device=place.device)
    units.diagonal(first).fill_(1)
    return units.unsqueeze(1).expand(-1, samples, -1).reshape(last - first, *place.shape)


def sample_norms(rows: Tensor, samples: int) -> Tensor:
    """Frobenius norm over ``(k, *shape)`` for each sample, in float64; ``(samples,)``."""
    flat = rows.reshape(len(rows), samples, math.prod(rows.shape[1:]) // samples)
    if rows.dtype == torch.float32:
        norms = _norms_of_rows(flat, torch.float32)
        if norms.numel():
            low, high = norms.aminmax()
            if low > TINY and high < 1 / TINY:
                return norms[0] if len(norms) == 1 else norms.norm(dim=0)
        zero = norms == 0
        safe = zero | ((norms > TINY) & (norms < 1 / TINY))
        if safe.all() and not flat[zero].any():
            return norms.norm(dim=0)
    return _norms_of_rows(flat, torch.float64).norm(dim=0)


def _norms_of_rows(flat: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(flat, dim=-1, dtype=dtype).double()
