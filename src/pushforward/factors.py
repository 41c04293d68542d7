"""A Jacobian as a product of factors, one for each part of the graph between two cuts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pushforward.boundary import Arguments, Layout
from pushforward.errors import PlanError
from pushforward.passes import Linearization, gradients_of
from pushforward.program import CannotRecord
from pushforward.purity import recording
from pushforward.structure.cuts import Cut, Way
from pushforward.structure.graph import is_counted
from pushforward.tape import Tape, record


class Tap(TorchDispatchMode):
    """Counts the ops that run inside and keeps tensors of some, by their numbers.

    The numbers are those of the run in which the structure was found.

    Args:
        cuts: (number of an op, which of its outputs) of the tensors that are cut at.
        orders: numbers of ops whose indices are kept, arguments and outputs.
        names: of ops by their numbers, as far as they are known.
    """

    def __init__(
        self,
        cuts: Sequence[tuple[int, int]] = (),
        orders: Collection[int] = (),
        names: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__()
        self._cuts = {number for number, _ in cuts}
        self._orders = frozenset(orders)
        self._names = names or {}
        self._count = 0
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.indices: list[Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise the first op imports the compiler, which takes seconds."""
        return False

    def start(self, inputs: Sequence[Tensor], arguments: Sequence[Tensor], domain: Layout) -> None:
        """A run begins."""
        self._count = 0
        self.kept, self.indices = {}, []

    @contextmanager
    def following(self) -> Iterator[None]:
        """Count what runs inside."""
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not is_counted(func):
            return result
        self._count += 1
        if self._count in self._cuts:
            for place, tensor in enumerate(_tensors(result)):
                self.kept[self._count, place] = tensor
        if self._count in self._orders:
            name = func.overloadpacket.__name__
            if self._names.get(self._count, name) != name:
                raise CannotRecord("other ops ran than when the structure was found")
            self.indices += self._indices((args, kwargs, result))
        return result

    def _indices(self, call: Any) -> list[Tensor]:
        found = [t for t in _tensors(call) if not (t.is_floating_point() or t.is_complex())]
        if not found:
            raise CannotRecord("an order among values that leaves no indices to compare")
        return found


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Split:
    """Where a graph is cut, and how each factor is had.

    Attributes:
        cuts: in order from the input to the output.
        way: the order of products, over the boundaries 0 (input), 1 to k (cuts), k + 1 (output).
        lead: how many samples the tensors of a cut hold, in front.
    """

    cuts: tuple[Cut, ...]
    way: Way
    lead: tuple[int, ...] = field(default=())

    @staticmethod
    def matrix(tall: Tensor, wide: Tensor) -> Tensor:
        """The whole matrix, the product of the factors."""
        return tall @ wide

    @staticmethod
    def diagonal(tall: Tensor, wide: Tensor) -> Tensor:
        """The diagonal of the product, without the product."""
        return (tall * wide.mT).sum(-1)

    @staticmethod
    def push(tall: Tensor, wide: Tensor, v: Tensor) -> Tensor:
        """J v by the factors, ``(k, [B,] n) -> (k, [B,] m)``."""
        return _times(tall, _times(wide, v))

    @staticmethod
    def pull(tall: Tensor, wide: Tensor, u: Tensor) -> Tensor:
        """J^T u by the factors, ``(k, [B,] m) -> (k, [B,] n)``."""
        return _times(wide.mT, _times(tall.mT, u))

    @property
    def places(self) -> list[tuple[int, int]]:
        """Where the tensors of all cuts are made."""
        return [place for cut in self.cuts for place in cut.tensors.made]

    @property
    def used(self) -> list[int]:
        """The boundaries that factors end at, output first."""
        return [leaf.start for leaf in self.way.leaves if leaf.start > 0]

    @property
    def named(self) -> str:
        """The cuts that are used, with their widths."""
        chosen = [self.cuts[place - 1] for place in sorted(self.used)]
        return ", ".join(f"width {cut.width} at {cut.name}" for cut in chosen)

    @property
    def width(self) -> int:
        """The width of the narrowest cut that is used: of the inner side of the two factors."""
        return min(self.cuts[place - 1].width for place in self.used)

    @property
    def narrowest(self) -> int:
        """Which of the factors, counted from the output's, end at or before the narrowest cut."""
        widths = [self.cuts[place - 1].width for place in self.used]
        return widths.index(min(widths)) + 1


def _times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """``([B,] m, n)`` times each of ``(k, [B,] n)``."""
    return (matrix @ vectors.movedim(0, -1)).movedim(-1, 0)


def record_with_taps(
    function: Callable[..., Any],
    arguments: Arguments,
    batch_dim: int | None,
    split: Split,
    tap: Tap | None = None,
) -> tuple[Tape, list[tuple[Tensor, ...]]]:
    """Evaluate a map and keep the tensors of its cuts, input's side first."""
    tap = tap or Tap(split.places)
    tape = record(function, arguments, batch_dim, watch=tap)
    try:
        kept = [tuple(tap.kept[place] for place in cut.tensors.made) for cut in split.cuts]
    except KeyError as error:
        raise PlanError("expected the ops that were planned for, but others ran") from error
    if any(not t.requires_grad for tensors in kept for t in tensors):
        raise PlanError("expected cuts that gradients go through, but they do not")
    return tape, kept


def factors(
    linear: Linearization, kept: Sequence[tuple[Tensor, ...]], split: Split, chunk: int
) -> tuple[Tensor, Tensor]:
    """The two factors ``([B,] m, w)`` and ``([B,] w, n)`` around the narrowest cut that is used.

    ``chunk`` passes go together.
    """
    bounds = [linear.tape.inputs, *kept, linear.tape.outputs]
    parts = [_factor(linear, bounds, leaf, split.lead, chunk) for leaf in split.way.leaves]
    place = split.narrowest
    return _product(parts[:place]), _product(parts[place:])


def _product(parts: Sequence[Tensor]) -> Tensor:
    """The product of a chain, shortest inner loops first."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].dim() == 2:
        return torch.linalg.multi_dot(list(parts))
    product = parts[-1]
    for part in reversed(parts[:-1]):
        product = part @ product
    return product


def pulled_through(
    linear: Linearization, kept: Sequence[tuple[Tensor, ...]], split: Split, u: Tensor
) -> Tensor:
    """J^T u from cut to cut: J^T u itself, if everything goes through the cuts."""
    bounds = [linear.tape.inputs, *kept, linear.tape.outputs]
    cotangents = linear.tape.codomain.split(u)
    for leaf in split.way.leaves:
        low, high = bounds[leaf.start], bounds[leaf.stop]
        cotangents, _ = gradients_of(high, low, cotangents, len(u), False, linear.batched)
    return linear.tape.domain.join(cotangents)


def _factor(
    linear: Linearization,
    bounds: Sequence[Sequence[Tensor]],
    leaf: Way,
    lead: tuple[int, ...],
    chunk: int,
) -> Tensor:
    low, high = bounds[leaf.start], bounds[leaf.stop]
    part = _Part(linear, low, high, lead, chunk)
    if leaf.kind == "rows":
        return part.rows().movedim(0, -2)
    return part.columns().movedim(0, -1)


@dataclass(frozen=True)
class _Part:
    """The graph between two boundaries, each one or several tensors."""

    linear: Linearization
    low: Sequence[Tensor]
    high: Sequence[Tensor]
    lead: tuple[int, ...]
    chunk: int

    def rows(self) -> Tensor:
        """All rows at once, ``(rows, [B,] width of low)``."""
        seeds = self._units(self.high)
        return self._joined(self._pull(self.high, self.low, seeds), self.low)

    def columns(self) -> Tensor:
        """All columns at once, ``(columns, [B,] width of high)``."""
        seeds = self._units(self.low)
        with recording():
            u = [torch.zeros_like(t).requires_grad_() for t in self.high]
            pulled = torch.autograd.grad(
                list(self.high),
                list(self.low),
                u,
                retain_graph=True,
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        return self._joined(self._pull(pulled, u, seeds), self.high)

    def _pull(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: list[Tensor]
    ) -> list[Tensor]:
        create, batched = self.linear.keeps_graph, self.linear.batched
        chunks = zip(*(seed.split(max(self.chunk, 1)) for seed in seeds), strict=True)
        parts = [
            gradients_of(outputs, inputs, list(some), len(some[0]), create, batched)[0]
            for some in chunks
        ]
        return (
            parts[0] if len(parts) == 1 else [torch.cat(each) for each in zip(*parts, strict=True)]
        )

    def _units(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Unit vectors of a boundary, each ``(width, *tensor)``, the same for each sample."""
        sizes = [self._size(t) for t in tensors]
        whole = torch.eye(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
        parts = whole.split(sizes, 1)
        return [self._shaped(part, t) for part, t in zip(parts, tensors, strict=True)]

    def _shaped(self, part: Tensor, tensor: Tensor) -> Tensor:
        own = tuple(tensor.shape[len(self.lead) :])
        shaped = part.reshape(len(part), *(1 for _ in self.lead), *own)
        return shaped.expand(len(part), *self.lead, *own)

    def _size(self, tensor: Tensor) -> int:
        return tensor.numel() // (self.lead[0] if self.lead else 1)

    def _joined(self, parts: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        flat = [
            part.reshape(len(part), *self.lead, self._size(t))
            for part, t in zip(parts, tensors, strict=True)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat, -1)
