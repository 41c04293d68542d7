"""Derivatives of tensors that already exist: helpers for code that works on ``(y, x)`` pairs.

Physics-informed networks compute ``y`` from ``x`` once and then ask for several derivatives. Every
function here creates a graph, so that derivatives nest and losses made of them train. ``x`` must
require gradients before ``y`` is computed from it.

The leading dimensions of `divergence` and `laplacian` are points, each computed from its own ``x``
alone; a network that mixes points (batch norm in training mode) has no such derivative.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from pushforward.checks import sample_scales, scaled_alike
from pushforward.composites import UNFIT, UNFIT_AGAIN, UNFIT_THIRD
from pushforward.errors import (
    CouplingError,
    DifferentiationError,
    GraphError,
    InputError,
    ShapeError,
)
from pushforward.passes import gradients_of
from pushforward.tape import explained, op_name, take_census

__all__ = ["divergence", "gradient", "jacobian", "laplace", "laplacian"]


def gradient(y: Tensor, x: Tensor, grad_outputs: Tensor | None = None) -> Tensor:
    """The vector-Jacobian product u^T dy/dx.

    Args:
        y: computed from ``x``, any shape.
        x: requires gradients, any shape.
        grad_outputs: u, shaped like ``y``; ones if None, which is the gradient of ``y.sum()``.

    Returns:
        Shaped like ``x``, with a graph.

    Raises:
        GraphError: no graph leads from ``y`` to ``x``.
        ShapeError: ``grad_outputs`` is not shaped like ``y``.

    Cost: one backward pass.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gradient((x**2).sum(), x).detach()
        tensor([2., 4.])
    """
    _require_graph(y, x)
    if grad_outputs is None:
        grad_outputs = torch.ones_like(y)
    if grad_outputs.shape != y.shape:
        raise ShapeError(
            f"grad_outputs expects the shape of y, {tuple(y.shape)}, got "
            f"{tuple(grad_outputs.shape)}; it holds one weight for each output"
        )
    found = _pull(y, x, grad_outputs)
    return _refuse_unconnected() if found is None else _guarded(found, y, UNFIT_AGAIN)


def jacobian(y: Tensor, x: Tensor, batch_dim: int | None = None) -> Tensor:
    """The Jacobian dy/dx of tensors that already exist.

    Args:
        y: computed from ``x``; with ``batch_dim=0``, row by row.
        x: requires gradients.
        batch_dim: None for all of ``y`` by all of ``x``; 0 where dimension 0 of both is a batch of
            independent samples.

    Returns:
        ``y.shape + x.shape``, or ``(B, *y, *x)`` with ``batch_dim=0``; with a graph.

    Raises:
        GraphError: no graph leads from ``y`` to ``x``.
        ShapeError: ``batch_dim=0`` and dimensions 0 that differ.
        CouplingError: ``batch_dim=0`` and samples that influence each other.
        InputError: another ``batch_dim``.

    Cost: one backward pass for each scalar of ``y`` (of one sample).

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> jacobian(x * x.sum(), x).detach()
        tensor([[4., 1.],
                [2., 5.]])
    """
    _require_graph(y, x)
    if batch_dim not in (None, 0):
        raise InputError(f"batch_dim expects None or 0, got {batch_dim!r}")
    if batch_dim is None:
        return _rows(y.reshape(-1), y, x).reshape(*y.shape, *x.shape)
    if y.dim() == 0 or x.dim() == 0 or len(y) != len(x):
        raise ShapeError(
            "batch_dim=0 expects the same batch as dimension 0 of y and x, got shapes "
            f"{tuple(y.shape)} and {tuple(x.shape)}"
        )
    _refuse_coupled(y, x)
    totals = y.reshape(len(y), -1).sum(0)
    return _rows(totals, y, x).movedim(0, 1).reshape(len(y), *y.shape[1:], *x.shape[1:])


def divergence(y: Tensor, x: Tensor) -> Tensor:
    """The divergence sum_i dy_i/dx_i over the last axis, at each point.

    Args:
        y: (..., d), computed from ``x`` point by point.
        x: (..., d), requires gradients.

    Returns:
        (..., 1), with a graph.

    Raises:
        GraphError: no graph leads from ``y`` to ``x``.
        ShapeError: ``y`` and ``x`` are not shaped alike.

    Cost: d backward passes.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> divergence(x**2, x).detach()
        tensor([[6.]])
    """
    if y.shape != x.shape or y.dim() == 0:
        raise ShapeError(
            "divergence expects as many outputs as inputs, (..., d) and (..., d), got shapes "
            f"{tuple(y.shape)} and {tuple(x.shape)}"
        )
    _require_graph(y, x)
    total, found = _diagonal_sum(y, x)
    if not found and x.shape[-1] > 0:
        _refuse_unconnected()
    return _guarded(total, y, UNFIT_AGAIN)


def laplacian(y: Tensor, x: Tensor) -> Tensor:
    """The Laplacian sum_i d^2 y/dx_i^2 over the last axis of ``x``, at each point.

    Args:
        y: (..., 1), a scalar field computed from ``x`` point by point.
        x: (..., d), requires gradients.

    Returns:
        (..., 1), with a graph; 0 for an affine map.

    Raises:
        GraphError: no graph leads from ``y`` to ``x``.
        ShapeError: ``y`` has more than one output at a point, or other points than ``x``.
        DifferentiationError: in the backward pass of a loss made of the result, where ``y`` went
            through a fused normalisation, whose third derivative torch gets wrong. The value itself
            is right, and `pushforward.laplacian` trains.

    Cost: d + 1 backward passes.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> laplacian((x**3).sum(-1, keepdim=True), x).detach()
        tensor([[18.]])
    """
    if x.dim() == 0 or tuple(y.shape) != (*x.shape[:-1], 1):
        raise ShapeError(
            "laplacian expects a scalar field, (..., 1) on points (..., d), got shapes "
            f"{tuple(y.shape)} and {tuple(x.shape)}; take one component at a time, y[..., i:i+1]"
        )
    total = _diagonal_sum(gradient(y, x), x)[0]
    return _guarded(total, y, UNFIT_THIRD | UNFIT_AGAIN)


laplace = laplacian


def _diagonal_sum(field: Tensor, x: Tensor) -> tuple[Tensor, bool]:
    """sum_i d field_i / d x_i, (..., 1), and whether the field depends on x at all."""
    total, found = torch.zeros_like(x[..., :1]), False
    for i in range(x.shape[-1]):
        component = field[..., i]
        row = _pull(component, x, torch.ones_like(component)) if component.requires_grad else None
        if row is not None:
            total, found = total + row[..., i : i + 1], True
    return total, found


def _rows(scalars: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Gradients of each of some scalars, (k, *x)."""
    census = take_census((y,), (x,))
    if not census.reaches_inputs:
        _refuse_unconnected()
    count = len(scalars)
    seeds = torch.eye(count, dtype=scalars.dtype, device=scalars.device)
    batched = census.vmappable and census.ops.isdisjoint(UNFIT)
    (rows,), _ = gradients_of((scalars,), (x,), [seeds], count, True, batched)
    return _guarded(rows, y, UNFIT_AGAIN)


def _refuse_unconnected() -> NoReturn:
    raise GraphError(
        "expected y to be computed from x, but no graph leads from one to the other; compute y "
        "from this very x, not from a copy or a slice taken before"
    )


def _pull(y: Tensor, x: Tensor, u: Tensor) -> Tensor | None:
    try:
        (found,) = torch.autograd.grad(y, x, u, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise explained(error) from error
    return found


class _RefuseBackward(torch.autograd.Function):
    """The identity, whose derivative is refused."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, reason: str) -> Tensor:
        ctx.reason = reason
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise DifferentiationError(ctx.reason)


def _guarded(result: Tensor, y: Tensor, unfit: frozenset[str]) -> Tensor:
    """Refuse to differentiate once more what torch would get wrong; the result itself is right."""
    met = take_census((y,), ()).ops & unfit
    return _RefuseBackward.apply(result, _why_refused(met)) if met else result


def _refuse_coupled(y: Tensor, x: Tensor) -> None:
    """Scale a cotangent sample by sample: gradients of independent samples scale likewise."""
    samples = len(y)
    u = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.device, y.dtype)

    def pulled(cotangent: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(
            y, x, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return found.reshape(samples, -1)

    if samples < 2 or x.numel() == 0:
        return
    plain = pulled(u)
    for scale in sample_scales(samples):
        factor = scale.to(u.device, u.dtype)
        scaled = pulled(u * factor.reshape(-1, *(1,) * (y.dim() - 1)))
        if not scaled_alike(plain * factor.reshape(-1, 1), scaled):
            raise CouplingError(
                "batch_dim=0 expects rows of y that depend on their own rows of x, but they "
                "influence each other; call .eval() on the model first, or use batch_dim=None"
            )


def _why_refused(ops: frozenset[str]) -> str:
    names = ", ".join(sorted(op_name(op) for op in ops))
    return (
        f"expected ops whose third derivative torch gets right, got {names}; train on "
        "pf.laplacian(f, x), which replaces them, or write the normalisation out"
    )


def _require_graph(y: Tensor, x: Tensor) -> None:
    if not x.requires_grad:
        raise GraphError(
            "expected x to require gradients, but it does not; call x.requires_grad_() before "
            "computing y from it"
        )
    if not y.requires_grad:
        raise GraphError(
            "expected y to have a graph that leads to x, but it has none; compute it with "
            "gradients enabled, without detach()"
        )
