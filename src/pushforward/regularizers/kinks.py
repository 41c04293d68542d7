"""Ops that are linear between their kinks, with derivatives that are known to be constant there.

Torch differentiates the derivative of relu or of max pooling with respect to the input too, to
zeros, and a backward pass carries those zeros through all of the network that came before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Evaluated:
    """A model with the rectifiers and the max pooling of this module, and nothing compiled.

    ``__self__`` says, as it does for a method, which module it is that runs.
    """

    def __init__(self, model: Callable[[Tensor], Any], owner: nn.Module | None = None) -> None:
        self.model = model
        itself = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
        self.__self__ = itself if owner is None else owner

    def __call__(self, x: Tensor) -> Any:
        with _uncompiled(self.__self__), _Kinks():
            return self.model(x)


def _uncompiled(owner: Any) -> AbstractContextManager[Any]:
    """Compiled code cannot be differentiated twice."""
    compiled = isinstance(owner, nn.Module) and any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in owner.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


class _Kinks(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = _TABLE.get(func)
        found = None if replacement is None else replacement(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is None else found


def _relu(input: Tensor, inplace: bool = False) -> Tensor | None:
    return None if inplace else _Relu.apply(input)


def _max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    if return_indices:
        return None
    sizes = (kernel_size, stride or kernel_size, padding, dilation)
    pairs = [[size, size] if isinstance(size, int) else list(size) for size in sizes]
    return _MaxPool2d.apply(input, (*pairs, ceil_mode))


class _Relu(torch.autograd.Function):
    """max(x, 0)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x.relu()
        ctx.save_for_backward(result)
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Tensor | None:
        (result,), (gradient,) = ctx.saved_tensors, gradients
        if gradient is None:
            return None
        return torch.ops.aten.threshold_backward(gradient, result.detach(), 0)


class _MaxPool2d(torch.autograd.Function):
    """The largest value in each window."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: tuple[Any, ...]) -> Tensor:
        result, indices = torch.ops.aten.max_pool2d_with_indices(x, *how)
        ctx.how = how
        ctx.save_for_backward(x, indices)
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        (x, indices), (gradient,) = ctx.saved_tensors, gradients
        if gradient is None:
            return None, None
        how = x.detach(), *ctx.how, indices
        return torch.ops.aten.max_pool2d_with_indices_backward(gradient, *how), None


_TABLE: dict[Any, Callable[..., Tensor | None]] = {
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
}
