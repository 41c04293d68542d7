"""Products with a Jacobian: cotangents pulled back and tangents pushed forward, in batches.

Both run over one recorded tape. Pulling back is one backward pass for a batch of cotangents.
Pushing forward differentiates the linear map u -> J^T u once more, so that no forward-mode rule of
torch is ever used: nested ones are silently wrong for several ops, and some ops have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pushforward.boundary import Layout
from pushforward.composites import UNFIT_THIRD
from pushforward.errors import DifferentiationError
from pushforward.purity import outside_inference, quiet_vmap, recording
from pushforward.tape import LinearHead, Tape, explained, linear_head, record_again, refuse_stale

Source = Tensor | GradientEdge
T = TypeVar("T")

# Rows that are held at a time where J v is made of them.
_ROWS = 64
# None that people draw their points by: vectors that are the point can hide a mistake.
_SEED = 577_215_664


@dataclass(eq=False)
class Linearization:
    """The two products of one tape, on flat batches ``(k, [B,] m)`` and ``(k, [B,] n)``.

    ``batched`` says that several vectors may go through one backward pass; it turns itself off
    where an op cannot do that, and the vectors then go one by one through plain ``autograd.grad``.
    ``graph_wanted`` makes every result differentiable, for derivatives of higher order.
    ``by_rows`` says that J v is made of rows, since J^T u cannot be differentiated once more: an op
    lacks the formula, or a custom backward hides from autograd what it does.
    """

    tape: Tape
    batched: bool = True
    graph_wanted: bool = False
    by_rows: bool = False
    _transparent: bool | None = None
    _transposed: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = field(default=None)

    def __post_init__(self) -> None:
        self.batched = self.batched and self.tape.census.vmappable

    @property
    def keeps_graph(self) -> bool:
        """Whether results are to be differentiable: somebody wants gradients, and can get them."""
        return self.graph_wanted or (self.tape.census.attached and torch.is_grad_enabled())

    def pull(self, cotangents: Tensor) -> Tensor:
        """``(k, [B,] m) -> (k, [B,] n)``: the rows ``u^T J``."""
        return self._retrying(lambda: self._pull(cotangents))

    def push(self, tangents: Tensor) -> Tensor:
        """``(k, [B,] n) -> (k, [B,] m)``: the products ``J v``."""
        pushed = self.push_at_once(tangents)
        return self._push_by_rows(tangents) if pushed is None else pushed

    def push_at_once(self, tangents: Tensor) -> Tensor | None:
        """The products ``J v``; None where they have to be made of rows."""
        if not self.prepare_push():
            return None
        try:
            return self._retrying(lambda: self._push(tangents))
        except DifferentiationError:
            refuse_stale(self.tape)
            self.by_rows = True
            return None

    def prepare_push(self) -> bool:
        """Make the graph of J^T u, once; False where J v is made of rows instead."""
        if not self.by_rows:
            try:
                self.by_rows = not self._is_transparent()
                self._retrying(self.transpose)
            except DifferentiationError:
                refuse_stale(self.tape)
                self.by_rows = True
        return not self.by_rows

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the Jacobian, ``(k, [B,] n)``."""
        return self._retrying(lambda: self._rows(start, stop))

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns ``start`` to ``stop`` of the Jacobian, ``(k, [B,] m)``."""
        domain = self.tape.domain
        return self.push(_unit_vectors(start, stop, domain.size, domain.lead, self.tape.inputs))

    def pull_from(self, value: Tensor, cotangents: Tensor) -> Tensor:
        """Pull ``(k, *value)`` back from any tensor that was computed from the inputs."""
        gradients = self._grad((value,), self.tape.inputs, [cotangents], len(cotangents))
        return self.tape.domain.join(gradients)

    def _pull(self, cotangents: Tensor) -> Tensor:
        parts = self.tape.codomain.split(cotangents)
        gradients = self._grad(self.tape.outputs, self.tape.inputs, parts, len(cotangents))
        return self.tape.domain.join(gradients)

    def _push(self, tangents: Tensor) -> Tensor:
        cotangents, pulled = self.transpose()
        parts = self.tape.domain.split(tangents)
        gradients = self._grad(pulled, cotangents, parts, len(tangents))
        return self.tape.codomain.join(gradients)

    def _push_by_rows(self, tangents: Tensor) -> Tensor:
        m = self.tape.codomain.size
        strips = [self.rows(i, min(i + _ROWS, m)) for i in range(0, m, _ROWS)]
        parts = [torch.einsum("r...n,k...n->k...r", rows, tangents) for rows in strips]
        return torch.cat(parts, -1) if parts else tangents[..., :0]

    def _is_transparent(self) -> bool:
        """Whether J^T u holds the whole graph of u, as <u, J v> = <J^T u, v> tells.

        Ops of torch raise where they have no second derivative; a custom backward may say nothing.
        """
        if self._transparent is None:
            self._transparent = not self.tape.census.custom or self._is_adjoint()
        return self._transparent

    def _is_adjoint(self) -> bool:
        v, u = (random_vectors(side, 1)[0] for side in (self.tape.domain, self.tape.codomain))
        with torch.no_grad():
            pushed, pulled = self._retrying(lambda: self._push(v)), self.pull(u)
        one, other = (u * pushed).sum(-1), (pulled * v).sum(-1)
        scale = (u * pushed).abs().sum(-1) + (pulled * v).abs().sum(-1)
        close = (one - other).abs() <= 1e3 * torch.finfo(one.dtype).eps * scale
        return bool((close | ~torch.isfinite(scale)).all())

    def _rows(self, start: int, stop: int) -> Tensor:
        head = linear_head(self.tape) if self.batched else None
        if head is not None:
            return self._pull_from(head, start, stop)
        codomain = self.tape.codomain
        units = _unit_vectors(start, stop, codomain.size, codomain.lead, self.tape.outputs)
        return self._pull(units)

    def _pull_from(self, head: LinearHead, start: int, stop: int) -> Tensor:
        weight = head.weight if self.keeps_graph else head.weight.detach()
        seeds = weight[start:stop].unsqueeze(1).expand(stop - start, *head.hidden_shape)
        gradients = self._grad((head.edge,), self.tape.inputs, [seeds], stop - start)
        return self.tape.domain.join(gradients)

    def transpose(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The cotangent u and the linear map J^T u of it, as a graph."""
        if self._transposed is None:
            tape = self._tape_to_transpose()
            with recording():
                u = tuple(torch.zeros_like(y).requires_grad_() for y in tape.outputs)
                live, seeds = _live(tape.outputs, u)
                pulled = _backward(live, tape.inputs, seeds, True) if live else _zeros(tape.inputs)
            self._transposed = (u, tuple(pulled))
        return self._transposed

    def _tape_to_transpose(self) -> Tape:
        """The tape, or one made of ops that can be differentiated once more, if that is wanted."""
        tape = self.tape
        if tape.order > 1 or not tape.census.attached or not tape.census.ops & UNFIT_THIRD:
            return tape
        with torch.enable_grad():  # it was attached when it was made, whatever holds now
            return record_again(tape, order=2)

    def _grad(
        self,
        outputs: Sequence[Source],
        inputs: Sequence[Tensor],
        seeds: Sequence[Tensor],
        count: int,
    ) -> list[Tensor]:
        """Gradients ``(k, *input)`` for ``k`` seeds, in one pass where possible."""
        create = self.keeps_graph or (
            torch.is_grad_enabled() and any(seed.requires_grad for seed in seeds)
        )
        gradients, self.batched = gradients_of(outputs, inputs, seeds, count, create, self.batched)
        return gradients

    def _retrying(self, product: Callable[[], T]) -> T:
        """Record the tape again where somebody's backward pass has freed its graph."""
        with outside_inference():
            try:
                return product()
            except RuntimeError as error:
                if "inplace operation" in str(error):
                    refuse_stale(self.tape)
                if not _freed(error):
                    raise explained(error) from error
            return self._afresh(product)

    def _afresh(self, product: Callable[[], T]) -> T:
        refuse_stale(self.tape)
        self.tape = record_again(self.tape)
        self._transposed = None
        return product()


def gradients_of(
    outputs: Sequence[Source],
    inputs: Sequence[Tensor],
    seeds: Sequence[Tensor],
    count: int,
    create: bool,
    batched: bool,
) -> tuple[list[Tensor], bool]:
    """Gradients ``(k, *input)`` for ``k`` seeds ``(k, *output)``, and whether one pass did it."""
    if batched and count > 1:
        try:
            return _many(outputs, inputs, seeds, count, create), True
        except Exception as error:  # a backward in Python can object to vmap in any way
            if _freed(error):
                raise
            batched = False
    return _each(outputs, inputs, seeds, count, create), batched


def _many(
    outputs: Sequence[Source],
    inputs: Sequence[Tensor],
    seeds: Sequence[Tensor],
    count: int,
    create: bool,
) -> list[Tensor]:
    """All seeds through one backward pass under vmap.

    Not ``is_grads_batched``: it runs on an older vmap, which lacks the rules of many ops (the
    backward of tanh among them) and loops over the seeds there.
    """
    live, cotangents = _live(outputs, seeds)
    if not live:
        return [x.new_zeros(count, *x.shape) for x in inputs]

    def pull(*each: Tensor) -> tuple[Tensor, ...]:
        return _backward(live, inputs, each, create)

    with quiet_vmap():
        return list(torch.func.vmap(pull)(*cotangents))


def _each(
    outputs: Sequence[Source],
    inputs: Sequence[Tensor],
    seeds: Sequence[Tensor],
    count: int,
    create: bool,
) -> list[Tensor]:
    if count == 0:
        return [x.new_zeros(0, *x.shape) for x in inputs]
    each = [_one(outputs, inputs, seeds, i, create) for i in range(count)]
    if count == 1:
        return [part.unsqueeze(0) for part in each[0]]
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


def _one(
    outputs: Sequence[Source],
    inputs: Sequence[Tensor],
    seeds: Sequence[Tensor],
    i: int,
    create: bool,
) -> list[Tensor]:
    live, cotangents = _live(outputs, [seed[i] for seed in seeds])
    return list(_backward(live, inputs, cotangents, create)) if live else _zeros(inputs)


def _zeros(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) for x in inputs]


def _backward(
    outputs: Sequence[Any], inputs: Sequence[Tensor], seeds: Sequence[Tensor], create: bool
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        outputs,
        inputs,
        seeds,
        retain_graph=True,
        create_graph=create,
        allow_unused=True,
        materialize_grads=True,
    )


def random_vectors(side: Layout, count: int) -> tuple[Tensor, ...]:
    """Vectors to try things on, ``(1, [B,] size)`` each, the same ones every time."""
    generator = torch.Generator().manual_seed(_SEED)
    shape = (1, *side.lead, side.size)
    draws = [torch.randn(shape, generator=generator) for _ in range(count)]
    return tuple(v.to(side.device, side.dtype) for v in draws)


def _freed(error: Exception) -> bool:
    return "a second time" in str(error)


def _live(outputs: Sequence[Source], seeds: Sequence[Tensor]) -> tuple[list[Source], list[Tensor]]:
    """The outputs that depend on anything, with their seeds."""
    pairs = [
        (y, u)
        for y, u in zip(outputs, seeds, strict=True)
        if not isinstance(y, Tensor) or y.requires_grad
    ]
    return [y for y, _ in pairs], [u for _, u in pairs]


def _unit_vectors(
    start: int, stop: int, size: int, lead: tuple[int, ...], like: Sequence[Tensor]
) -> Tensor:
    """Unit vectors ``start`` to ``stop``, the same for each sample, ``(k, [B,] size)``."""
    dtype = like[0].dtype
    for tensor in like[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    units = torch.zeros(stop - start, size, dtype=dtype, device=like[0].device)
    units.diagonal(start).fill_(1)
    return units.reshape(stop - start, *(1 for _ in lead), size).expand(-1, *lead, -1)
