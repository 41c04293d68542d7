"""The squared Frobenius norm of a product of two matrices, without the product where that pays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def squared_norm_of_product(left: Tensor, right: Tensor) -> Tensor:
    """||A B||_F^2 for A, (m, h), and B, (h, n): by B B^T where that takes fewer products."""
    (m, h), n = left.shape, right.shape[1]
    if h * (n + m) < 1.5 * m * n:
        return _ByGram.apply(left, right)
    return (left @ right).square().sum()


class _ByGram(torch.autograd.Function):
    """<A^T A, B B^T>, with its gradients 2 A (B B^T) and 2 (A^T A) B.

    Autograd does not know that B B^T is symmetric, and would take twice as many products.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        product = left @ (right @ right.t())
        ctx.save_for_backward(left, right, product.detach())
        return (product * left).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,), (left, right, product) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of this one is wanted: it needs its graph
            product = left @ (right @ right.t())
        by_left = 2 * gradient * product if ctx.needs_input_grad[0] else None
        by_right = None
        if ctx.needs_input_grad[1]:
            by_right = 2 * gradient * ((left.t() @ left) @ right)
        return by_left, by_right
