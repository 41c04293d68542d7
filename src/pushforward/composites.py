"""Ops of torch that lack a derivative or have a wrong one, written out in ops that have theirs.

A tape is recorded with the composites only where one of these ops was met and its own formulas do
not do: the fused ops are faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pushforward.purity import one_at_a_time, without_mkldnn

# No second derivative, or a wrong first one under vmap: cdist's backward gives each row of the
# Jacobian the entries of others there.
# weight_norm's second derivative is wrong, that of logcumsumexp is NaN. The derivative of
# as_strided_scatter by its first argument is where it should not be. Layer norm with a bias and no
# weight loses the second derivative by the bias. hardsigmoid has no second derivative at all.
UNFIT = frozenset(
    {
        "CdistBackward0",
        "PdistBackward0",
        "MkldnnRnnLayerBackward0",
        "WeightNormInterfaceBackward0",
        "LogcumsumexpBackward0",
        "AsStridedScatterBackward0",
        "HardsigmoidBackward0",
        "NativeLayerNormBackward0 of a bias alone",
    }
)
# Right twice, wrong the third time: the second derivative takes the saved mean for a constant.
UNFIT_THIRD = frozenset({"NativeLayerNormBackward0", "NativeBatchNormBackward0"})

# Their first derivatives: a graph that holds one has already been differentiated once.
UNFIT_AGAIN = frozenset({"NativeLayerNormBackwardBackward0", "NativeBatchNormBackwardBackward0"})


@contextmanager
def composites() -> Iterator[None]:
    """Run these ops, and recurrent layers, as compositions of ops with all their derivatives."""
    with one_at_a_time(), _Composites(), without_mkldnn():
        yield


class _Composites(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _TABLE.get(func, func)(*args, **(kwargs or {}))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last axes, times weight, plus bias."""
    axes = tuple(range(-len(tuple(normalized_shape)), 0))
    return _affine(_standardised(input, axes, eps), weight, bias)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Each channel with the mean and variance of the batch, or with the running ones."""
    axes = tuple(i for i in range(input.dim()) if i != 1)
    return _normalised(input, axes, running_mean, running_var, weight, bias, training, eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Each channel of each sample with its own mean and variance, or with the running ones."""
    axes = tuple(range(2, input.dim()))
    return _normalised(input, axes, running_mean, running_var, weight, bias, use_input_stats, eps)


def _normalised(
    input: Tensor,
    axes: tuple[int, ...],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    own: bool,
    eps: float,
) -> Tensor:
    shape = (-1, *(1,) * (input.dim() - 2))
    scale, shift = (None if t is None else t.reshape(shape) for t in (weight, bias))
    if own or running_mean is None or running_var is None:
        return _affine(_standardised(input, axes, eps), scale, shift)
    centred = input - running_mean.reshape(shape)
    return _affine(centred * (running_var.reshape(shape) + eps).rsqrt(), scale, shift)


def _standardised(input: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = input - input.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()


def _affine(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = normal if weight is None else normal * weight
    return scaled if bias is None else scaled + bias


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / |v|, with the norm over all axes but ``dim`` (over all of them for -1)."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def logcumsumexp(input: Tensor, dim: int) -> Tensor:
    """log of the running sum of exp along an axis, as one logsumexp for each end of the sum."""
    if input.dim() == 0:
        return input.clone()
    rows = input.movedim(dim, -1)
    n = rows.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool, device=input.device).triu(1)
    running = rows.unsqueeze(-2).expand(*rows.shape[:-1], n, n).masked_fill(later, -math.inf)
    return running.logsumexp(-1).movedim(-1, dim)


def as_strided_scatter(
    input: Tensor,
    src: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Tensor:
    """``input`` with ``src`` written into a view of it."""
    written = input.clone()
    offset = written.storage_offset() if storage_offset is None else storage_offset
    written.as_strided(size, stride, offset).copy_(src)
    return written


def cdist(
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor:
    """|x1_i - x2_j|_p; its derivative is 0 where two points coincide."""
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """|x_i - x_j|_p for i < j."""
    rows, columns = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _norm(input[rows] - input[columns], p)


def _norm(offset: Tensor, p: float) -> Tensor:
    if p == math.inf:
        return offset.abs().amax(-1)
    return torch.linalg.vector_norm(offset, p, dim=-1)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """x / 6 + 1/2 between -3 and 3, with no slope at the ends and beyond."""
    beyond = torch.nn.functional.hardsigmoid(input.detach())
    found = torch.where((input > -3) & (input < 3), input / 6 + 0.5, beyond)
    return input.copy_(found) if inplace else found


_TABLE: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    torch.nn.functional.batch_norm: batch_norm,
    torch.batch_norm: batch_norm,
    torch.nn.functional.instance_norm: instance_norm,
    torch.instance_norm: instance_norm,
    torch._weight_norm: weight_norm,
    torch.logcumsumexp: logcumsumexp,
    torch.Tensor.logcumsumexp: logcumsumexp,
    torch.as_strided_scatter: as_strided_scatter,
    torch.Tensor.as_strided_scatter: as_strided_scatter,
    torch.nn.functional.hardsigmoid: hardsigmoid,
    torch._C._nn.hardsigmoid: hardsigmoid,
    torch._C._nn.hardsigmoid_: partial(hardsigmoid, inplace=True),
    torch.cdist: cdist,
    torch.pdist: pdist,
    torch.nn.functional.pdist: pdist,
}
