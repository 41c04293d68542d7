"""Layers that subtract a mean and divide by a deviation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo_families.case import Problem, block_diagonal, case, module, of_module, randn


def composite_layer_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last axis, out of simple operations."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred**2).mean(-1, keepdim=True) + eps)


@case("layer_norm", "batched", "square", "symmetric")
def layer_norm() -> Problem:
    x = randn(3, 4)

    def jacobian() -> Tensor:
        y = composite_layer_norm(x)
        deviation = torch.sqrt(x.var(-1, unbiased=False) + 1e-5)[:, None, None]
        centring = torch.eye(4, dtype=torch.float64) - 0.25
        return block_diagonal((centring - y[:, :, None] * y[:, None, :] / 4) / deviation)

    return Problem(
        lambda x: functional.layer_norm(x, (4,)),
        (x,),
        jacobian=jacobian,
        reference=composite_layer_norm,
    )


@case("layer_norm_affine", "batched", "square", "network")
def layer_norm_affine() -> Problem:
    net = module(lambda: nn.LayerNorm(4))
    with torch.no_grad():
        net.weight.copy_(randn(4, seed=5))
    return Problem(
        net,
        (randn(3, 4),),
        reference=lambda x: composite_layer_norm(x) * net.weight + net.bias,
        parameters=tuple(net.parameters()),
    )


@case("rms_norm", "batched", "square", "symmetric")
def rms_norm() -> Problem:
    return Problem(lambda x: functional.rms_norm(x, (4,)), (randn(3, 4),))


@case("group_norm", "batched", "square", "network")
def group_norm() -> Problem:
    return of_module(lambda: nn.GroupNorm(2, 4), randn(2, 4, 3))


def _over_axes(axes: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    def normalise(x: Tensor) -> Tensor:
        centred = x - x.mean(axes, keepdim=True)
        return centred * torch.rsqrt((centred**2).mean(axes, keepdim=True) + 1e-5)

    return normalise


@case("instance_norm", "batched", "square", "symmetric")
def instance_norm() -> Problem:
    return Problem(
        lambda x: functional.instance_norm(x), (randn(2, 3, 4),), reference=_over_axes((2,))
    )


@case("batch_norm_train", "coupled", "square", "stateful", "network")
def batch_norm_train() -> Problem:
    problem = of_module(lambda: nn.BatchNorm1d(4), randn(5, 4), train=True)
    weight, bias = problem.parameters
    normalised = _over_axes((0,))
    return Problem(
        problem.f,
        problem.args,
        reference=lambda x: normalised(x) * weight + bias,
        parameters=problem.parameters,
    )


@case("batch_norm_eval", "batched", "square", "network")
def batch_norm_eval() -> Problem:
    net = module(lambda: nn.BatchNorm2d(3)).eval()
    net.running_mean.copy_(randn(3, seed=3))
    net.running_var.copy_(randn(3, seed=4) ** 2 + 0.5)
    scale = (1 / torch.sqrt(net.running_var + 1e-5)).repeat_interleave(4).repeat(2)
    return Problem(
        net,
        (randn(2, 3, 2, 2),),
        jacobian=lambda: torch.diag(scale),
        pattern=lambda: torch.diag(scale).numpy() != 0,
        parameters=tuple(net.parameters()),
    )
