"""From a run of a function to the structure of its Jacobian, tier by tier.

Three labellings of the inputs are followed, from cheap to fine: one variable for each sample of a
batch, a few dozen variables drawn at random, which tell whether anything is sparse at all, and one
for each input scalar.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from pushforward.boundary import Layout
from pushforward.pattern import Pattern
from pushforward.structure.follow import Follower, Guards
from pushforward.structure.graph import Graph
from pushforward.structure.rules.registry import Numbers
from pushforward.tape import inside_a_transform

# Up to this many input scalars the finest tier is followed at once.
_FEW = 1 << 13
# How many input scalars are followed to see whether anything is sparse.
_DRAWN = 64
# Below this share of nonzeros among inputs drawn at random, all are followed.
_PROMISING = 0.5
# A pattern as full as this is of no use, unless it is small enough to be shown.
_FULL = 0.75
_SHOWN = 1 << 22
# More entries than this are not listed.
_MOST_ENTRIES = 1 << 27


@dataclass(frozen=True)
class Structure:
    """What is known of a Jacobian without differentiating.

    Attributes:
        pattern: where it may be nonzero, (m, n) of one sample where there is a batch; None where
            nothing was detected.
        samples: the number of independent samples along dimension 0, wherever the map is evaluated;
            None where that is not known.
        graph: the ops in order, for cuts and costs.
        guards: what all this relies on beside the code.
        dense_ops: ops without a rule, taken as dense, and how often each was met.
        tiers: which labellings were followed.
        note: why nothing was detected; empty where something was.
    """

    pattern: Pattern | None
    samples: int | None
    graph: Graph
    guards: Guards
    dense_ops: tuple[tuple[str, int], ...]
    tiers: tuple[str, ...]
    note: str = ""


NOTHING = Structure(None, None, Graph(), Guards(), (), (), "not looked for")


@dataclass
class Detector:
    """Follows a function on the tiers that are due; `following` is entered around its run.

    Args:
        fine: follow every input scalar; None where their number decides.
    """

    fine: bool | None = None
    followers: dict[str, Follower] = field(default_factory=dict)

    def start(self, inputs: Sequence[Tensor], arguments: Sequence[Tensor], domain: Layout) -> None:
        """Make the followers for a run that is about to begin."""
        self.followers = {}
        if inside_a_transform((*inputs, *arguments)):
            return
        labels, count = _fine_labels(inputs, domain)
        fine = count <= _FEW if self.fine is None else self.fine
        tiers = {"elements": (labels, count)} if fine else {"drawn": _drawn(labels, count)}
        samples = _sample_labels(inputs, domain)
        if samples is not None and self.fine is not True:
            tiers["samples"] = samples
        self.followers = {
            name: Follower(inputs, *tier, arguments=arguments) for name, tier in tiers.items()
        }

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the ops that run inside."""
        with ExitStack() as stack:
            # The first one innermost: what a follower itself runs is seen by those around it, and
            # the ops that the graph numbers are those of the function alone.
            for follower in reversed(self.followers.values()):
                stack.enter_context(follower.following())
            yield

    def promises(self, outputs: Sequence[Tensor], codomain: Layout) -> bool:
        """Whether the finest tier, not followed yet, can be expected to find zeros."""
        follower = self.followers.get("drawn")
        if follower is None or follower.failure is not None:
            return False
        return drawn_density(follower, outputs, codomain) < _PROMISING

    def structure(self, outputs: Sequence[Tensor], domain: Layout, codomain: Layout) -> Structure:
        """What was found, once the run is over."""
        if not self.followers:
            return NOTHING
        return _Findings(self.followers, outputs, domain, codomain).structure()


@dataclass(frozen=True)
class _Findings:
    """The followers of a run that is over, and its outputs."""

    followers: dict[str, Follower]
    outputs: Sequence[Tensor]
    domain: Layout
    codomain: Layout

    def structure(self) -> Structure:
        samples = self._samples()
        first = next(iter(self.followers.values()))
        first.graph.outputs = tuple(first.value_of(y) for y in self.outputs)
        pattern, note = self._pattern(samples if self.domain.batch is None else None)
        dense = tuple(sorted(first.dense_ops.items()))
        tiers = tuple(name for name, f in self.followers.items() if f.failure is None)
        return Structure(pattern, samples, first.graph, first.guards, dense, tiers, note)

    def _samples(self) -> int | None:
        """The size of the batch, where each output depends on one sample at most, its own."""
        follower = self.followers.get("samples")
        if follower is None or follower.failure is not None:
            return None
        count = follower.sets.count
        if any(y.dim() == 0 or len(y) != count for y in self.outputs):
            return None
        own = follower.sets.single(np.arange(count))
        for y in self.outputs:
            numbers = follower.numbers(y).reshape(count, -1)
            if not ((numbers == own[:, None]) | (numbers < 2)).all():
                return None
        return count

    def _pattern(self, samples: int | None) -> tuple[Pattern | None, str]:
        follower = self.followers.get("elements")
        if follower is None:
            return self._by_samples(samples, self._drawn_note())
        if follower.failure is not None:
            return self._by_samples(samples, follower.failure)
        numbers = np.concatenate([rows_of(follower, y, self.codomain) for y in self.outputs])
        m, n = self.codomain.size, self.domain.size
        entries = int(follower.sets.sizes(numbers).sum())
        if entries > _MOST_ENTRIES or (entries > _FULL * m * n and m * n > _SHOWN):
            density = entries / (m * n)
            return self._by_samples(samples, f"{density:.0%} of the entries: as good as dense")
        starts, members = follower.sets.members(numbers)
        return Pattern((m, n), starts, members), ""

    def _drawn_note(self) -> str:
        follower = self.followers["drawn"]
        if follower.failure is not None:
            return follower.failure
        density = drawn_density(follower, self.outputs, self.codomain)
        return f"about {density:.0%} of the entries, by inputs at random"

    def _by_samples(self, samples: int | None, note: str) -> tuple[Pattern | None, str]:
        """Full blocks, one a sample, where no more is known."""
        m, n = self.codomain.size, self.domain.size
        if samples is None or m * n // samples > _MOST_ENTRIES:
            return None, note
        return _block_pattern(self.outputs, self.domain, samples), ""


def rows_of(follower: Follower, y: Tensor, codomain: Layout) -> Numbers:
    """The sets of one output, flat; of all samples together where there is a batch."""
    numbers = np.ascontiguousarray(follower.numbers(y))
    if codomain.batch is None:
        return numbers.reshape(-1)
    own = math.prod(numbers.shape[1:])
    return follower.sets.unite_axis(numbers.reshape(codomain.batch, own), 0)


def drawn_density(follower: Follower, outputs: Sequence[Tensor], codomain: Layout) -> float:
    """The share of entries that are nonzero, among the inputs drawn."""
    numbers = np.concatenate([rows_of(follower, y, codomain) for y in outputs])
    drawn = np.maximum(follower.sets.sizes(numbers) - 1, 0)
    return float(drawn.sum()) / max(len(numbers) * (follower.sets.count - 1), 1)


def _fine_labels(inputs: Sequence[Tensor], domain: Layout) -> tuple[list[np.ndarray], int]:
    """One variable for each input scalar; the same ones for every sample of a batch."""
    labels, start = [], 0
    for x, leaf in zip(inputs, domain.active, strict=True):
        label = np.arange(start, start + leaf.size).reshape(leaf.real_shape)
        labels.append(np.broadcast_to(label, tuple(x.shape)))
        start += leaf.size
    return labels, start


def _drawn(labels: list[np.ndarray], count: int) -> tuple[list[np.ndarray], int]:
    """A few variables at random, and one more for all others together."""
    chosen = np.random.default_rng(0).choice(count, min(_DRAWN, count), replace=False)
    place = np.full(count, len(chosen))
    place[np.sort(chosen)] = np.arange(len(chosen))
    return [place[label] for label in labels], len(chosen) + 1


def _sample_labels(inputs: Sequence[Tensor], domain: Layout) -> tuple[list[np.ndarray], int] | None:
    """One variable for each index along dimension 0, where that can be a batch."""
    sizes = {len(x) if x.dim() else 1 for x in inputs}
    if len(sizes) != 1 or sizes & {0, 1}:
        return None
    (count,) = sizes
    if domain.batch is None and domain.size <= count:
        return None
    rows = np.arange(count)
    return [
        np.broadcast_to(rows.reshape(-1, *[1] * (x.dim() - 1)), tuple(x.shape)) for x in inputs
    ], count


def _block_pattern(outputs: Sequence[Tensor], domain: Layout, samples: int) -> Pattern:
    """Every output of a sample by every input of the same sample."""
    owners, start = [], 0
    for leaf in domain.active:
        owners.append(np.arange(start, start + leaf.size).reshape(samples, -1))
        start += leaf.size
    columns = np.concatenate(owners, 1)
    width = columns.shape[1]
    rows = [columns.repeat(y.numel() // samples, 0).reshape(-1) for y in outputs]
    m = sum(y.numel() for y in outputs)
    return Pattern((m, domain.size), np.arange(m + 1) * width, np.concatenate(rows))


def merged(first: Structure, finer: Structure) -> Structure:
    """What two runs found together: the finer pattern where there is one."""
    tiers = tuple(dict.fromkeys((*first.tiers, *finer.tiers)))
    chosen = finer if finer.pattern is not None else first
    return replace(chosen, samples=first.samples, graph=first.graph, tiers=tiers)
