"""The Jacobian at a point: a lazy linear operator, and the Hessian beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from pushforward import linalg
from pushforward.boundary import Arguments, Layout
from pushforward.checks import refuse_asymmetric
from pushforward.compressed import Compressed
from pushforward.errors import (
    DifferentiationError,
    InputError,
    MemoryBudgetError,
    ShapeError,
)
from pushforward.formats import arranged, in_layout, to_csr, to_scipy_csr
from pushforward.lowrank import core
from pushforward.operators import LinearOperator
from pushforward.passes import Linearization
from pushforward.planning import blocks
from pushforward.plans import Plan, function_name

# Entries beyond this many bytes are not kept for the next question about the same Jacobian.
_KEEP_BYTES = 1 << 28
# What a decomposition takes for each entry beside the entry itself: copies in double precision.
_WORK_BYTES = 128
_CHANGED = (
    "expected the parameters that this Jacobian was taken at, but they were changed in place since "
    "then; call pf.jacobian again after such a step"
)


class Jacobian(LinearOperator):
    """The Jacobian of a map at a point: lazy, exact, a linear operator.

    Made by `jacobian` and by calling a `Plan`. Entries are computed when they are asked for: by the
    program of the plan, where it has one, else through the tape of an evaluation. With
    ``batch_dim=0`` every result is per sample, batch first.

    Attributes:
        shape: ``(m, n)``, output scalars by input scalars (of one sample). A complex scalar counts
            as two real ones, real part first: J is made of real 2 x 2 blocks.
        batch: the number of samples, or None.
        plan: the `Plan` that is followed.
    """

    def __init__(self, plan: Plan, arguments: Arguments, linear: Linearization | None) -> None:
        self.shape = (plan.codomain.size, plan.domain.size)
        self.dtype, self.device, self.batch = plan.dtype, plan.device, plan.domain.batch
        self.plan = plan
        self.symmetric = plan.quantity == "hessian"
        self._arguments = arguments
        self._made = linear
        self._versions = plan.versions()
        self._kept: Tensor | None = None
        self._parts: Sequence[Tensor] | None = None

    @property
    def value(self) -> Any:
        """``f(*args)``."""
        return self._linear.tape.value

    @property
    def _linear(self) -> Linearization:
        """The tape, made when something asks for it."""
        if self._made is None:
            if self.plan.versions() != self._versions:
                raise DifferentiationError(_CHANGED)
            with self.plan.late(self._arguments):
                self._made = self.plan.linearise(self._arguments)
        return self._made

    @property
    def _domain(self) -> Layout:
        return self.plan.domain

    @property
    def _codomain(self) -> Layout:
        return self.plan.codomain

    def explain(self) -> str:
        """The plan as a table."""
        return str(self.plan)

    def push(self, v: Tensor) -> Tensor:
        """Multiply a block of columns: ``([B,] n, k) -> ([B,] m, k)``, J v."""
        return self._block(True, v, "push expects")

    def pull(self, u: Tensor) -> Tensor:
        """Multiply by the transpose: ``([B,] m, k) -> ([B,] n, k)``, J^T u."""
        return self._block(False, u, "pull expects")

    def __matmul__(self, v: Any) -> Any:
        """J v.

        Args:
            v: shaped like the input (a pytree too), or ([B,] n), or a block ([B,] n, k); or another
                operator.

        Returns:
            Shaped like the output, or ([B,] m), or ([B,] m, k). A vector that has the shape of the
            input is taken as one. For an operator the product, an operator.

        Raises:
            ShapeError: ``v`` has none of these shapes.
        """
        return super().__matmul__(v)

    def _lmatmul(self, v: Any) -> Any:
        return self._multiply(True, v, "J @ v expects v")

    def _rmatmul(self, u: Any) -> Any:
        return self._multiply(False, u, "J.T @ u expects u")

    def _sides(self, forward: bool) -> tuple[Layout, Layout]:
        """Where a product comes from and goes to."""
        sides = self.plan.domain, self.plan.codomain
        return sides if forward else sides[::-1]

    def _multiply(self, forward: bool, vector: Any, expectation: str) -> Any:
        source, target = self._sides(forward)
        packed = source.pack(vector)
        if packed is not None:
            return target.unpack(self._product(forward, packed)[0])
        if isinstance(vector, Tensor) and vector.is_complex():
            raise ShapeError(_vector_message(vector, source, expectation))
        if isinstance(vector, Tensor) and tuple(vector.shape) == (*source.lead, source.size):
            return self._product(forward, vector.unsqueeze(0))[0]
        return self._block(forward, vector, expectation)

    def _block(self, forward: bool, block: Any, expectation: str) -> Tensor:
        source, _ = self._sides(forward)
        if not isinstance(block, Tensor) or tuple(block.shape[:-1]) != (*source.lead, source.size):
            raise ShapeError(_vector_message(block, source, expectation))
        return self._product(forward, block.movedim(-1, 0)).movedim(0, -1)

    def _product(self, forward: bool, vectors: Tensor) -> Tensor:
        """``(k, [B,] size)`` of one side to the other: by entries that are there, or by passes."""
        source, target = self._sides(forward)
        vectors = vectors.to(source.dtype)
        scheme: Any = self.plan.scheme
        if scheme is not None and self._entries_serve(len(vectors)):
            product = scheme.push if forward else scheme.pull
            return product(*self._planned(), vectors).to(target.dtype)
        if forward:
            self._linear.prepare_push()
        work = self._linear.push if forward else self._linear.pull
        parts = vectors.split(max(self.plan.chunk, 1))
        done = [self._sparingly(work, part) for part in parts]
        return done[0] if len(done) == 1 else torch.cat(done)

    def _entries_serve(self, count: int) -> bool:
        """Whether entries are there, or cost no more than the passes for so many vectors."""
        if self.plan.memory is not None:
            return False
        return self._has_parts() or count >= max(self.plan.passes, 1)

    def _by_columns(self) -> bool:
        return self.plan.jvps > 0

    def _ranges(self) -> Sequence[tuple[int, int]]:
        return blocks(self.shape[1 if self._by_columns() else 0], self.plan.chunk)

    def _strips(self, reduce: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """``reduce(start, strip)`` of each strip of rows or columns, ``(k, [B,] ...)``."""
        strip = self._linear.columns if self._by_columns() else self._linear.rows

        def part(start: int, stop: int) -> Tensor:
            return reduce(start, strip(start, stop))

        if self._by_columns():
            self._linear.prepare_push()  # once, and outside of what is made again
        return [self._sparingly(part, start, stop) for start, stop in self._ranges()]

    def _sparingly(self, work: Callable[..., Tensor], *args: Any) -> Tensor:
        """Under a budget a graph is not kept but made again, part by part, when it is needed.

        Made to its end: stopping early throws an exception through the backward pass inside, which
        takes it for an op that vmap cannot do.
        """
        if self.plan.memory is None or not self._linear.keeps_graph:
            return work(*args)
        with set_checkpoint_early_stop(False):
            return checkpoint(work, *args, use_reentrant=False, preserve_rng_state=False)

    def matrix(self) -> Tensor:
        """All entries, ([B,] m, n), in the order in which the leaves are flattened.

        Raises:
            MemoryBudgetError: they do not fit in ``memory=``.
        """
        if self._kept is not None and not self._wants_graph():
            return self._kept.clone()
        entries = self._assemble()
        scheme = self.plan.scheme
        if scheme is None or (isinstance(scheme, Compressed) and scheme.is_full):
            self._parts = None  # they lie in what is handed out, and may be written to
        return entries

    def prepare(self) -> None:
        """Compute the entries now; raises where a guard of the plan does not hold."""
        self._planned()

    def _planned(self) -> Sequence[Tensor]:
        """What the scheme of the plan gives: values in the order of the pattern, or two factors."""
        if self._parts is None or not self._has_parts():
            same = self.plan.versions() == self._versions
            evaluate = self.plan.entries if same else self._entries_as_they_were
            self._parts = evaluate(self._arguments, self._made)
        return self._parts

    def _entries_as_they_were(
        self, arguments: Arguments, linear: Linearization | None
    ) -> Sequence[Tensor]:
        """Entries through the tape, which holds parameters that a program would find changed."""
        if linear is None or linear.tape.census.stale or self.plan.recipe.candidate.split:
            raise DifferentiationError(_CHANGED)
        return self.plan.taped_entries(arguments, linear)

    def _has_parts(self) -> bool:
        """Whether what the scheme gives is there, and of use to whoever asks now.

        What has a graph is not used again: whoever goes back through it frees it.
        """
        if self._parts is None or any(part.requires_grad for part in self._parts):
            return False
        return not self._wants_graph()

    def _wants_graph(self) -> bool:
        """Whether results are to be differentiable; a program tells without a tape."""
        if self.plan.recipe.evaluation is None:
            return self._linear.keeps_graph
        return torch.is_grad_enabled() and self.plan.attached(self._arguments)

    def _core(self) -> Tensor:
        """Of two factors around a narrow cut the small matrix with their singular values."""
        if not self._is_narrow():
            return self._entries()
        found = core(*self._planned())
        return self._entries() if found is None else found

    def _is_narrow(self) -> bool:
        """Whether J is a product over a width less than m and n."""
        split = self.plan.recipe.candidate.split
        return split is not None and split.width < min(self.shape)

    def _entries(self) -> Tensor:
        """`matrix` for the use of the methods here, kept while it is small and has no graph.

        A graph is not kept: whoever goes back through it frees it.
        """
        self._require_room(_WORK_BYTES)
        if self._kept is not None and not self._wants_graph():
            return self._kept
        entries = self._assemble()
        if self._bytes() <= _KEEP_BYTES and not entries.requires_grad:
            self._kept = entries
        return entries

    def _bytes(self) -> int:
        m, n = self.shape
        return m * n * (self.batch or 1) * self.dtype.itemsize

    def _assemble(self) -> Tensor:
        self._require_room()
        scheme = self.plan.scheme
        if scheme is not None:
            return self._symmetrised(scheme.matrix(*self._planned()))
        if self.plan.has_program:
            return self._symmetrised(self._planned()[0])
        axis = -1 if self._by_columns() else -2
        ranges = self._ranges()
        if len(ranges) == 0:
            return self._empty()
        if len(ranges) == 1 or self._linear.keeps_graph:
            strips = self._strips(lambda _, strip: strip)
            whole = strips[0] if len(strips) == 1 else torch.cat(strips)
            return self._symmetrised(whole.movedim(0, axis))
        result = self._empty()

        def fill(start: int, strip: Tensor) -> Tensor:
            return result.narrow(axis, start, len(strip)).copy_(strip.movedim(0, axis))

        self._strips(fill)
        return self._symmetrised(result)

    def _empty(self) -> Tensor:
        lead = () if self.batch is None else (self.batch,)
        return torch.zeros(*lead, *self.shape, dtype=self.dtype, device=self.device)

    def _symmetrised(self, matrix: Tensor) -> Tensor:
        if self.plan.quantity != "hessian":
            return matrix
        refuse_asymmetric(matrix.detach())
        return (matrix + matrix.mT) / 2

    def _require_room(self, work: int = 0) -> None:
        memory, m, n = self.plan.memory, *self.shape
        needed = self._bytes() + work * m * n * (self.batch or 1)
        if memory is not None and needed > memory:
            raise MemoryBudgetError(
                f"memory={memory} bytes expects a result that fits, got {needed} bytes of "
                "entries; raise it, or ask for fro_norm(), diagonal() or J @ v, which need less"
            )

    def _fits(self) -> bool:
        """Whether the entries of the pattern, and what they are made of, keep to the budget."""
        memory, compressed = self.plan.memory, self.plan.compressed
        return memory is None or compressed is None or compressed.room(self.batch or 1) <= memory

    def _require_room_for_values(self, compressed: Compressed, memory: int) -> None:
        indices = 8 * (compressed.pattern.nnz + self.shape[0] + 1)
        needed = compressed.room(self.batch or 1) + indices
        if needed > memory:
            raise MemoryBudgetError(
                f"memory={memory} bytes expects a result that fits, got {compressed.pattern.nnz} "
                f"entries, which take {needed} bytes with what they are made of; raise it, or ask "
                "for fro_norm(), diagonal() or J @ v, which need less"
            )

    def dense(self) -> Any:
        """All entries, ``out.shape + in.shape`` (after the batch), pytrees nested output first.

        What ``torch.func.jacrev`` returns. None stands where a leaf is not differentiated. A
        complex leaf has a last axis of two, real and imaginary part.

        Cost: ``plan.passes`` passes and m n entries.
        """
        return arranged(self.matrix(), self._codomain, self._domain)

    def sparse(self, layout: str = "csr") -> Any:
        """The entries that may be other than zero, (m, n), by the pattern of the plan.

        Those of them that are zero at this point are kept, so that the arrays have the same
        structure at every point. Where no pattern is known, the entries that are not zero here.

        Args:
            layout: "csr" or "coo" for a torch sparse tensor, "scipy" for a
                ``scipy.sparse.csr_array``.

        Raises:
            InputError: another layout, or ``batch_dim=0``.
            MissingDependencyError: scipy is not installed.
        """
        if layout not in ("csr", "coo", "scipy"):
            raise InputError(f'sparse expects layout "csr", "coo" or "scipy", got {layout!r}')
        if self.batch is not None:
            raise InputError(
                "sparse expects one map, got batch_dim=0; use batch_dim=None for the "
                "block-diagonal matrix of the batch, or matrix() for one dense matrix a sample"
            )
        compressed = self.plan.compressed
        if compressed is not None:
            if self.plan.memory is not None:
                self._require_room_for_values(compressed, self.plan.memory)
            values = self._planned()[0]
            self._parts = None  # they are handed out, and may be written to
            return in_layout(compressed, values, layout)
        sparse = self._coo()
        if layout == "coo":
            return sparse
        return to_csr(sparse) if layout == "csr" else to_scipy_csr(sparse)

    def _coo(self) -> Tensor:
        if not self._ranges():
            return self._empty().to_sparse()
        indices: dict[int, Tensor] = {}

        def nonzeros(start: int, strip: Tensor) -> Tensor:
            first, second = strip.detach().nonzero(as_tuple=True)
            pair = (second, first + start) if self._by_columns() else (first + start, second)
            indices[start] = torch.stack(pair)
            return strip[first, second]

        values = torch.cat(self._strips(nonzeros))
        places = torch.cat(list(indices.values()), 1)
        return torch.sparse_coo_tensor(
            places, values, self.shape, check_invariants=False
        ).coalesce()

    def diagonal(self) -> Tensor:
        """The diagonal of a square Jacobian, ([B,] n), without keeping the rest.

        Raises:
            DimensionError: m and n differ.
        """
        self._require_square("diagonal")
        if self.plan.strategy == "diagonal":
            scheme: Any = self.plan.recipe.candidate.scheme
            return scheme.diagonal(*self._planned())
        planned = self._planned_diagonal()
        if planned is not None:
            return planned
        if self.plan.has_program:
            return self._entries().diagonal(dim1=-2, dim2=-1).clone()

        def part(start: int, strip: Tensor) -> Tensor:
            return strip[..., start : start + len(strip)].diagonal(dim1=0, dim2=-1)

        parts = self._strips(part)
        return torch.cat(parts, dim=-1) if parts else self._empty().diagonal(dim1=-2, dim2=-1)

    def _planned_diagonal(self) -> Tensor | None:
        """The diagonal out of what the plan gives, or by a cheaper plan of its own; None where the
        plan has no scheme, or one that gives more than the budget holds.
        """
        if self._parts is None and self.plan.compressed is not None:
            cheaper = self.plan.for_diagonal(self._arguments)
            if cheaper is not None:
                return cheaper
        scheme = self.plan.scheme
        if scheme is None or not self._fits():
            return None
        return scheme.diagonal(*self._planned())

    def fro_norm(self) -> Tensor:
        """||J||_F, the root of the sum of the squared entries, ([B,]).

        Strip by strip, so that it needs no room for all entries at once.
        """
        compressed = self.plan.compressed
        if compressed is not None:
            if self._fits():
                return linalg.fro_norm(self._planned()[0].unsqueeze(-2))
            passes = compressed.passes(self._linear, self.plan.chunk)
            norms = [linalg.fro_norm(self._sparingly(work).movedim(0, -2)) for work in passes]
            return linalg.fro_norm(torch.stack(norms, dim=-1).unsqueeze(-2))
        if self._is_narrow() or (self.plan.memory is None and self._bytes() <= _KEEP_BYTES):
            return super().fro_norm()
        if 0 in self.shape:
            return self._empty().sum((-2, -1))
        norms = self._strips(lambda _, strip: linalg.fro_norm(strip.movedim(0, -2)))
        return linalg.fro_norm(torch.stack(norms, dim=-1).unsqueeze(-2))

    def logvol(self, rtol: float | None = None) -> Tensor:
        """1/2 log det(J^T J) for m >= n, 1/2 log det(J J^T) for m < n; -inf where deficient.

        So it is for every product over a width less than m and n. See `pushforward.linalg.logvol`.
        """
        if not self._is_narrow():
            return super().logvol(rtol)
        volume = linalg.logvol(self._core(), rtol).to(self.dtype)
        return volume.masked_fill(torch.ones_like(volume, dtype=torch.bool), -math.inf)

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` with the same products.

        Raises:
            InputError: ``batch_dim=0``.
            MissingDependencyError: scipy is not installed.
        """
        if self.batch is not None:
            raise InputError(
                "to_scipy expects one map, got batch_dim=0; use batch_dim=None for the whole batch"
            )
        return super().to_scipy()

    def __repr__(self) -> str:
        m, n = self.shape
        batch = "" if self.batch is None else f", {self.batch} samples"
        name = "Hessian" if self.plan.quantity == "hessian" else "Jacobian"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{name}({m} x {n}{batch}, {dtype}, {self.device}, of "
            f"{function_name(self.plan.function)}; {self.plan.strategy}, {self.plan.passes} passes)"
        )

    def _repr_html_(self) -> str:
        return self.plan._repr_html_()


def _vector_message(vector: Any, side: Layout, expectation: str) -> str:
    lead = "".join(f"{size}, " for size in side.lead)
    came = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
    return (
        f"{expectation} like {side.describe()}, or ({lead}{side.size}), or a block "
        f"({lead}{side.size}, k), got {came}"
    )
