"""Divergence and Laplacian of a map at a point, exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pushforward.boundary import Arguments
from pushforward.checks import check_batching, check_samples
from pushforward.derivatives import jacobian
from pushforward.errors import DimensionError, InputError
from pushforward.passes import Linearization
from pushforward.planning import blocks
from pushforward.problems import Problem
from pushforward.purity import recording
from pushforward.tape import Tape, record, record_gradient

# How many second-order passes go together, and how many entries their cotangents may have.
_CHUNK = 64
_CHUNK_ENTRIES = 1 << 22


def divergence(
    f: Callable[..., Any], x: Any, batch_dim: int | None = None, *, memory: int | None = None
) -> Tensor:
    """The divergence sum_i d f_i / d x_i, exact.

    Args:
        f: a map with as many outputs as inputs (per sample).
        x: the point; a tensor or a pytree of tensors.
        batch_dim: None for one map, 0 for independent samples along dimension 0.
        memory: a budget in bytes for what is allocated.

    Returns:
        (), or (B,) with ``batch_dim=0``; differentiable with respect to ``x`` and parameters.

    Raises:
        DimensionError: as many outputs as inputs were expected, and others came.
        PushforwardError: for the reasons that `pushforward.jacobian` has.

    Cost: n passes, or as few as keep the diagonal apart where a pattern is known.

    Example:
        >>> divergence(lambda x: x**2, torch.tensor([1.0, 2.0]))
        tensor(6.)
    """
    J = jacobian(f, x, batch_dim=batch_dim, memory=memory)
    m, n = J.shape
    if m != n:
        raise DimensionError(
            f"divergence expects as many outputs as inputs, got {m} outputs and {n} inputs; "
            "take pf.jacobian for other maps"
        )
    return J.trace()


def laplacian(f: Callable[..., Any], x: Any, batch_dim: int | None = None) -> Any:
    """The Laplacian sum_i d^2 f / d x_i^2 of each output, exact.

    Args:
        f: a map with any number of outputs.
        x: the point; a tensor or a pytree of tensors.
        batch_dim: None for one map, 0 for independent samples along dimension 0.

    Returns:
        Shaped like the output; differentiable with respect to ``x`` and parameters. An affine map
        has the Laplacian 0.

    Raises:
        InputError: complex input or output, where this Laplacian is not defined.
        PushforwardError: for the reasons that `pushforward.jacobian` has.

    Cost: n Hessian-vector products where there is one output (per sample). With more outputs, n
    passes of third order, which serve all outputs at once. Reverse mode throughout: nested forward
    modes of torch are silently wrong for several ops.

    Example:
        >>> laplacian(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
        tensor(18.)
    """
    arguments = Arguments.of((x,), 0, batch_dim)
    tape = record(f, arguments, batch_dim, order=2)
    _refuse_complex(tape)
    linear = Linearization(tape)
    problem = Problem(linear, "jacobian", None, None)
    check_samples(problem)
    check_batching(problem)
    if tape.codomain.size == 1:
        return _scalar_laplacian(f, arguments, batch_dim, tape)
    tape = record(f, arguments, batch_dim, tape.state, order=3) if tape.composed else tape
    return tape.codomain.unpack(_vector_laplacian(tape, linear.batched))


def _refuse_complex(tape: Tape) -> None:
    if any(leaf.is_complex for leaf in (*tape.domain.active, *tape.codomain.active)):
        raise InputError(
            "laplacian expects real inputs and outputs, got complex ones "
            f"({tape.domain.describe()} to {tape.codomain.describe()}); write the map on real and "
            "imaginary parts"
        )


def _scalar_laplacian(
    f: Callable[..., Any], arguments: Arguments, batch_dim: int | None, tape: Tape
) -> Any:
    """The trace of the Hessian, from Hessian-vector products with unit vectors."""
    linear = Linearization(record_gradient(f, arguments, batch_dim, tape.state))
    total = torch.zeros(tape.domain.lead, dtype=tape.codomain.dtype, device=tape.domain.device)
    for start, stop in blocks(tape.domain.size, _CHUNK):
        strip = linear.rows(start, stop)
        total = total + strip[..., start:stop].diagonal(dim1=0, dim2=-1).sum(-1)
    return tape.codomain.unpack(total.unsqueeze(-1))


def _vector_laplacian(tape: Tape, batched: bool) -> Tensor:
    """All outputs at once, ([B,] m).

    t_i = J e_i depends on x; w_i -> d<t_i, w_i>/dx is linear, and differentiating its i-th entry
    with respect to w_i leaves d t_i / d x_i = d^2 f / d x_i^2, whatever the number of outputs.
    """
    m, n, samples = tape.codomain.size, tape.domain.size, tape.domain.batch or 1
    linear = Linearization(tape, batched, graph_wanted=True)
    wanted = tape.census.attached and torch.is_grad_enabled()
    total = tape.inputs[0].new_zeros(*tape.domain.lead, m, dtype=tape.codomain.dtype)
    chunk = max(1, min(_CHUNK, math.isqrt(_CHUNK_ENTRIES // max(m * samples, 1))))
    for start, stop in blocks(n, chunk):
        total = total + _second_derivatives(linear, start, stop, wanted)
    return total


def _second_derivatives(linear: Linearization, start: int, stop: int, wanted: bool) -> Tensor:
    """The sum of d^2 f_j / d x_i^2 over i from ``start`` to ``stop``, ``([B,] m)``."""
    with recording():
        tangents = linear.columns(start, stop)
        if not tangents.requires_grad:
            return torch.zeros_like(tangents[0])
        w = torch.zeros_like(tangents).requires_grad_()
        each = torch.eye(len(w), dtype=w.dtype, device=w.device)
        gradients = linear.pull_from(tangents, each.reshape(*each.shape, *(1,) * (w.dim() - 1)) * w)
        diagonal = gradients[..., start:stop].diagonal(dim1=0, dim2=-1)
        if not diagonal.requires_grad:
            return torch.zeros_like(tangents[0])
        (second,) = torch.autograd.grad(
            diagonal.sum(), w, create_graph=wanted, retain_graph=True, materialize_grads=True
        )
    return second.sum(0)
