"""Entries of a sparse Jacobian from a few passes: seeds go in, entries are read off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from pushforward.coloring import Coloring, seeds
from pushforward.passes import Linearization
from pushforward.pattern import Pattern
from pushforward.purity import outside_inference

# How many products of an entry and an element are held at once.
_TERMS = 1 << 24


@dataclass(frozen=True, eq=False)
class Compressed:
    """A coloured pattern, ready for passes on one device in one dtype.

    Attributes:
        pattern: where entries stand, (m, n).
        coloring: the seeds, and where to read each entry.
    """

    pattern: Pattern
    coloring: Coloring
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def column_seeds(self) -> Tensor:
        """(jvps, n), the vectors of the products J v."""
        return self._seeds(self.coloring.column_colors, self.coloring.jvps)

    @cached_property
    def row_seeds(self) -> Tensor:
        """(vjps, m), the vectors of the products J^T u."""
        return self._seeds(self.coloring.row_colors, self.coloring.vjps)

    def _seeds(self, colors: np.ndarray | None, count: int) -> Tensor:
        assert colors is not None
        with outside_inference():  # a plan made there is used elsewhere too
            made = torch.from_numpy(np.ascontiguousarray(seeds(colors, count)))
            return made.to(self.device, self.dtype)

    @cached_property
    def source(self) -> Tensor:
        """Where each entry stands in what the passes give, (nnz,)."""
        return self._numbers(self.coloring.source)

    @cached_property
    def starts(self) -> Tensor:
        """Where each row of entries begins, (m + 1,)."""
        return self._numbers(self.pattern.indptr)

    @cached_property
    def columns(self) -> Tensor:
        """The column of each entry, (nnz,)."""
        return self._numbers(self.pattern.indices)

    @cached_property
    def coordinates(self) -> Tensor:
        """Rows and columns of all entries, (2, nnz)."""
        with outside_inference():
            return torch.stack([self.rows, self.columns])

    @cached_property
    def places(self) -> Tensor:
        """Where each entry stands in the whole matrix, row after row, (nnz,)."""
        rows, columns = self.pattern.nonzero()
        return self._numbers(rows * self.pattern.shape[1] + columns)

    @cached_property
    def steps(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """What is subtracted from what, where entries are found by substitution."""
        steps = self.coloring.steps or ()
        return tuple((self._numbers(a), self._numbers(b)) for a, b in steps)

    def _numbers(self, values: np.ndarray) -> Tensor:
        with outside_inference():
            return torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(self.device)

    @property
    def constants(self) -> list[Tensor]:
        """The tensors that evaluations use and never change."""
        made = [self.source, *(part for step in self.steps for part in step)]
        if self.coloring.jvps:
            made.append(self.column_seeds)
        if self.coloring.vjps:
            made.append(self.row_seeds)
        if self.coloring.kind in ("star", "acyclic"):
            made.append(self.mirrored)
        return made

    @property
    def streams(self) -> bool:
        """Whether what a pass gives are entries and zeros, each entry in one pass."""
        return self.coloring.kind in ("rows", "columns")

    def room(self, samples: int) -> int:
        """Bytes that all entries take while they are made: the passes, copies of them, the rest."""
        m, n = self.pattern.shape
        passed = self.coloring.jvps * m + self.coloring.vjps * n
        return samples * self.dtype.itemsize * (3 * passed + self.pattern.nnz)

    def passes(self, linear: Linearization, chunk: int) -> Iterator[Callable[[], Tensor]]:
        """The passes in chunks: each call gives ``(k, [B,] size)``."""
        lead = linear.tape.domain.lead
        if self.coloring.jvps:
            linear.prepare_push()
            for v in _spread(self.column_seeds, lead, chunk):
                yield partial(linear.push, v)
        if self.coloring.vjps:
            for u in _spread(self.row_seeds, lead, chunk):
                yield partial(linear.pull, u)

    def values(self, linear: Linearization, chunk: int) -> Tensor:
        """All entries in the order of the pattern, ``([B,] nnz)``."""
        lead = linear.tape.domain.lead
        parts = [work() for work in self.passes(linear, chunk)]
        if not parts:
            return torch.zeros(*lead, 0, dtype=self.dtype, device=self.device)
        return self.read(parts, lead)

    def read(self, parts: list[Tensor], lead: tuple[int, ...]) -> Tensor:
        """Pick the entries out of what the passes gave, each ``(k, [B,] size)``."""
        flat = [part.movedim(0, -2).reshape(*lead, -1) for part in parts]
        whole = flat[0] if len(flat) == 1 else torch.cat(flat, -1)
        found = self._picked(whole)
        for targets, operands in self.steps:
            found = found.index_add(-1, targets, found.index_select(-1, operands), alpha=-1)
        return found

    def _picked(self, whole: Tensor) -> Tensor:
        """Entries by their places; a plain copy where these are evenly spaced on every axis."""
        if self.spacing is None or whole.dim() > 1 or torch.is_grad_enabled():
            return whole.index_select(-1, self.source)
        shape, strides = self.spacing
        lying = whole.contiguous()
        start = lying.storage_offset() + int(self.coloring.source[0])
        return lying.as_strided(shape, strides, start).reshape(-1)

    @cached_property
    def spacing(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Shape and strides of the places of all entries, where these are a regular grid."""
        return even_spacing(self.coloring.source)

    def push(self, values: Tensor, v: Tensor) -> Tensor:
        """J v from the entries: ``([B,] nnz)`` and ``(k, [B,] n)`` to ``(k, [B,] m)``."""
        return self._product(values, v, self.columns, self.rows, self.pattern.shape[0])

    def pull(self, values: Tensor, u: Tensor) -> Tensor:
        """J^T u from the entries: ``([B,] nnz)`` and ``(k, [B,] m)`` to ``(k, [B,] n)``."""
        return self._product(values, u, self.rows, self.columns, self.pattern.shape[1])

    def _product(
        self, values: Tensor, vectors: Tensor, source: Tensor, target: Tensor, size: int
    ) -> Tensor:
        """Each entry times what stands at its source, added up at its target."""
        together = max(1, _TERMS // max(values.numel(), 1))
        done = []
        for some in vectors.split(together) or (vectors,):
            terms = values * some.index_select(-1, source)
            zeros = terms.new_zeros(*terms.shape[:-1], size)
            done.append(zeros.index_add(-1, target, terms))
        return done[0] if len(done) == 1 else torch.cat(done)

    @cached_property
    def rows(self) -> Tensor:
        """The row of each entry, (nnz,)."""
        return self._numbers(self.pattern.rows)

    def matrix(self, values: Tensor) -> Tensor:
        """The whole matrix, ``([B,] m, n)``, of its entries ``([B,] nnz)``."""
        m, n = self.pattern.shape
        lead = values.shape[:-1]
        if self.is_full:
            return values.reshape(*lead, m, n)
        whole = values.new_zeros(*lead, m * n)
        return whole.index_copy(-1, self.places, values).reshape(*lead, m, n)

    @cached_property
    def mirrored(self) -> Tensor:
        """For each entry the place of its mirror image, where the pattern is symmetric."""
        return self._numbers(self.pattern.transposed()[1])

    def symmetrised(self, values: Tensor) -> Tensor:
        """The mean of each entry and its mirror image."""
        return (values + values.index_select(-1, self.mirrored)) / 2

    @cached_property
    def is_full(self) -> bool:
        """Whether every place holds an entry."""
        return self.pattern.nnz == self.pattern.shape[0] * self.pattern.shape[1]

    @cached_property
    def diagonal_places(self) -> tuple[Tensor, Tensor]:
        """Which rows have an entry on the diagonal, and which entries those are."""
        rows, columns = self.pattern.nonzero()
        (entries,) = np.nonzero(rows == columns)
        return self._numbers(rows[entries]), self._numbers(entries)

    def diagonal(self, values: Tensor) -> Tensor:
        """The diagonal, ``([B,] n)``, of the entries ``([B,] nnz)``."""
        rows, entries = self.diagonal_places
        zeros = values.new_zeros(*values.shape[:-1], self.pattern.shape[0])
        return zeros.index_copy(-1, rows, values.index_select(-1, entries))


def _spread(vectors: Tensor, lead: tuple[int, ...], chunk: int) -> list[Tensor]:
    """Seeds in chunks, the same ones for each sample."""
    shaped = vectors.reshape(len(vectors), *(1 for _ in lead), -1)
    return list(shaped.expand(-1, *lead, -1).split(max(chunk, 1)))


def even_spacing(places: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shape and strides of numbers that are those of a strided array of up to four axes."""
    shape: list[int] = []
    strides: list[int] = []
    rest = places
    while len(rest) > 1:
        if len(shape) == 4:
            return None
        step = int(rest[1] - rest[0])
        breaks = np.flatnonzero(np.diff(rest) != step)
        run = int(breaks[0]) + 1 if len(breaks) else len(rest)
        if step < 0 or len(rest) % run:
            return None
        grid = rest.reshape(-1, run)
        if not (grid == grid[:, :1] + step * np.arange(run)).all():
            return None
        shape.insert(0, run)
        strides.insert(0, step)
        rest = grid[:, 0]
    return (tuple(shape), tuple(strides)) if shape else None
