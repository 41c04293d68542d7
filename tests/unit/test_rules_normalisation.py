"""Normalisations and their gradients: who shares a mean, forwards and backwards."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detected import detect, draw, exact
from oracles import loop_hessian


def double(layer: nn.Module, training: bool = True) -> nn.Module:
    return layer.double().train(training)


LAYERS = {
    "layer": (double(nn.LayerNorm(4)), (2, 3, 4)),
    "layer of two axes": (double(nn.LayerNorm((3, 4))), (2, 3, 4)),
    "layer, plain": (double(nn.LayerNorm(4, elementwise_affine=False)), (2, 4)),
    "rms": (double(nn.RMSNorm(4)), (2, 3, 4)),
    "group": (double(nn.GroupNorm(2, 4)), (2, 4, 3)),
    "group of each": (double(nn.GroupNorm(4, 4, affine=False)), (2, 4, 3)),
    "batch": (double(nn.BatchNorm1d(3)), (4, 3)),
    "batch of images": (double(nn.BatchNorm2d(2, affine=False)), (2, 2, 2, 3)),
    "batch, running": (double(nn.BatchNorm1d(3), training=False), (4, 3)),
    "batch, unrecorded": (double(nn.BatchNorm1d(3, track_running_stats=False)), (4, 3)),
    "instance": (double(nn.InstanceNorm1d(2)), (2, 2, 4)),
    "instance, running": (
        double(nn.InstanceNorm1d(2, track_running_stats=True), training=False),
        (2, 2, 4),
    ),
    "local response": (double(nn.LocalResponseNorm(3)), (2, 5, 2)),
    "weight": (lambda x: F.normalize(x, dim=1), (3, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_exact(name: str):
    layer, shape = LAYERS[name]
    exact(layer, draw(*shape))


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives(name: str):
    layer, shape = LAYERS[name]

    def energy(x: Tensor) -> Tensor:
        return layer(x).pow(3).sum()

    structure = detect(energy, draw(*shape), hessian=True)
    size = int(np.prod(shape))
    hessians = [
        loop_hessian(energy, draw(*shape, seed=seed)).reshape(size, size) for seed in (1, 2)
    ]
    # Second derivatives of what was normalised away are zero up to rounding.
    met = np.any([h.abs().numpy() > 1e-12 * float(h.abs().max()) for h in hessians], 0)
    assert structure.dense_ops == ()
    assert (structure.pattern.todense() == met).all()


def test_in_weight_and_bias_too():
    exact(
        lambda x, w, b: F.layer_norm(x, (3,), w, b), draw(2, 3), draw(3), draw(3), argnums=(0, 1, 2)
    )
    exact(
        lambda x, w, b: F.group_norm(x, 2, w, b), draw(2, 4, 2), draw(4), draw(4), argnums=(0, 1, 2)
    )
    exact(
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        *(draw(3, 2), draw(2), draw(2)),
        argnums=(0, 1, 2),
    )


def test_gradients_of_weight_and_bias():
    """From the input, the weight and the cotangent to the gradients of all three arguments."""

    def gradients(x: Tensor, weight: Tensor, bias: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        y = F.layer_norm(x, (3,), weight, bias)
        return torch.autograd.grad(y, (x, weight, bias), cotangent, create_graph=True)

    exact(gradients, draw(2, 3), draw(3), draw(3), draw(2, 3, seed=1), argnums=(0, 1, 2, 3))


def test_running_statistics_of_the_input_pass_no_derivative():
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)

    def both(x: Tensor) -> Tensor:
        F.batch_norm(x, mean.clone(), var.clone(), training=True)
        return F.batch_norm(x, mean, var)

    exact(both, draw(4, 3))


def test_one_number_alone_is_normalised_away():
    assert detect(nn.LayerNorm(1).double(), draw(3, 1)).pattern.nnz == 0


@pytest.mark.parametrize("shape", [(0, 3), (1, 3)], ids=str)
def test_sizes(shape: tuple[int, ...]):
    exact(nn.LayerNorm(3).double(), draw(*shape))
