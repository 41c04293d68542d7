"""Which elements of the tensors inside a step belong to which sample of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pushforward.path.pull import Passes
from pushforward.path.record import Crossing
from pushforward.path.samples import kept_apart, scaled_seeds, scales


@dataclass(frozen=True)
class Layout:
    """Samples lie along dimension ``dim``, in blocks one after another or in turns.

    (B, T) flattened to B * T is in blocks, (T, B) in turns.
    """

    dim: int
    samples: int
    blocks: bool

    def first(self, values: Tensor, dim: int) -> Tensor:
        """Split ``dim`` and bring the samples to the front; (samples, ...)."""
        shape = (self.samples, -1) if self.blocks else (-1, self.samples)
        return values.unflatten(dim, shape).movedim(dim if self.blocks else dim + 1, 0)


@dataclass(eq=False)
class Samples:
    """How many samples there are, and how they lie at each edge inside a step.

    The layouts are found when the first of them is asked for, by one random cotangent at the end
    of the step and copies of it. In the copies each sample is scaled by a power of two of its own.
    Where the gradient scales alike under some way to share it out, elements belong to samples in
    that way; those without a gradient do not matter to any.
    """

    count: int
    passes: Passes
    stop: Crossing
    edges: Sequence[GradientEdge]

    def most(self, values: Tensor, edge: GradientEdge) -> Tensor:
        """The largest of ``values``, which lie as the tensor at ``edge`` does, for each sample.

        Dimensions of ``values`` may be missing at the end or be 1. Where the samples cannot be
        told apart it is the largest of all: what bounds the whole batch bounds each of its parts.
        """
        layout = self._layouts.get(edge) if values.numel() > 1 else None
        extent = shape_of(edge)[layout.dim] if layout is not None else 0
        if layout is None or layout.dim >= values.dim() or values.shape[layout.dim] != extent:
            return values.double().amax().expand(self.count)
        return layout.first(values, layout.dim).flatten(1).double().amax(dim=1)

    def tells_apart(self, edge: GradientEdge) -> bool:
        return self.count == 1 or edge in self._layouts

    @cached_property
    def _layouts(self) -> dict[GradientEdge, Layout]:
        if self.count == 1:
            return {}
        places = [place_of(edge, self.stop.device) for edge in self.edges]
        gradients = self.passes.pull_to_all(self.stop, places, scaled_seeds(self.stop))
        found = zip(self.edges, gradients, strict=True)
        layouts = {edge: _layout(gradient, self.count) for edge, gradient in found}
        return {edge: layout for edge, layout in layouts.items() if layout is not None}


def shape_of(edge: GradientEdge) -> tuple[int, ...]:
    """The shape of the tensor at an edge."""
    return tuple(int(size) for size in _metadata(edge).shape)


def dtype_of(edge: GradientEdge) -> torch.dtype:
    return _metadata(edge).dtype


def _metadata(edge: GradientEdge) -> torch.Tensor:
    return edge.node._input_metadata[edge.output_nr]


def place_of(edge: GradientEdge, device: torch.device) -> Crossing:
    return Crossing(edge, shape_of(edge), dtype_of(edge), device)


def _layout(rounds: Tensor, samples: int) -> Layout | None:
    if not rounds[0].any():
        return None
    for dim in range(rounds.dim() - 1):
        if rounds.shape[dim + 1] % samples == 0:
            for blocks in (True, False):
                layout = Layout(dim, samples, blocks)
                if _fits(rounds, layout):
                    return layout
    return None


def _fits(rounds: Tensor, layout: Layout) -> bool:
    arranged = torch.stack([layout.first(each, layout.dim) for each in rounds])
    return kept_apart(arranged, scales(arranged[0]))
