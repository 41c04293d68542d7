"""Convolution: the detected pattern against the Jacobian of autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detected import detect, draw, exact

W1, W2, W3 = draw(4, 2, 3, seed=1), draw(4, 2, 3, 2, seed=2), draw(2, 2, 2, 1, 3, seed=3)
HALVES = draw(4, 1, 3, seed=4)
BIAS = draw(4, seed=5)

PLAIN = {
    "1d": (lambda x: F.conv1d(x, W1, BIAS), (2, 2, 5)),
    "stride": (lambda x: F.conv1d(x, W1, stride=2), (1, 2, 6)),
    "padding": (lambda x: F.conv1d(x, W1, padding=2), (1, 2, 4)),
    "same": (lambda x: F.conv1d(x, W1, padding="same", dilation=2), (1, 2, 4)),
    "valid": (lambda x: F.conv1d(x, W1, padding="valid"), (1, 2, 4)),
    "dilation": (lambda x: F.conv1d(x, W1, padding=1, dilation=2), (1, 2, 6)),
    "groups": (lambda x: F.conv1d(x, HALVES, BIAS, groups=2), (2, 2, 4)),
    "depthwise": (lambda x: F.conv1d(x, HALVES, groups=4, padding=1), (1, 4, 3)),
    "unbatched": (lambda x: F.conv1d(x, W1), (2, 5)),
    "one by one": (lambda x: F.conv1d(x, W1[..., :1]), (1, 2, 3)),
    "no batch": (lambda x: F.conv1d(x, W1), (0, 2, 4)),
    "2d": (lambda x: F.conv2d(x, W2, BIAS), (1, 2, 4, 3)),
    "2d, everything": (
        lambda x: F.conv2d(x, W2[:, :1], BIAS, (2, 1), (1, 2), (1, 2), groups=2),
        (1, 2, 5, 4),
    ),
    "2d, unbatched": (lambda x: F.conv2d(x, W2, padding=(1, 0)), (2, 3, 4)),
    "3d": (lambda x: F.conv3d(x, W3, padding=(0, 1, 1), stride=(1, 2, 1)), (1, 2, 3, 2, 3)),
    "padded in circles": (
        lambda x: F.conv1d(F.pad(x, (1, 1), mode="circular"), W1),
        (1, 2, 4),
    ),
    "two": (lambda x: F.conv1d(F.conv1d(x, W1).tanh(), W1.mT.reshape(2, 4, 3)), (1, 2, 7)),
}

TRANSPOSED = {
    "1d": (lambda x: F.conv_transpose1d(x, W1, BIAS[:2]), (2, 4, 3)),
    "stride": (lambda x: F.conv_transpose1d(x, W1, stride=2), (1, 4, 3)),
    "padding": (lambda x: F.conv_transpose1d(x, W1, stride=2, padding=1), (1, 4, 3)),
    "much padding": (lambda x: F.conv_transpose1d(x, W1[..., :1], padding=1), (1, 4, 4)),
    "output padding": (
        lambda x: F.conv_transpose1d(x, W1, stride=3, padding=1, output_padding=2),
        (1, 4, 3),
    ),
    "dilation": (lambda x: F.conv_transpose1d(x, W1, dilation=2, stride=3), (1, 4, 2)),
    "groups": (lambda x: F.conv_transpose1d(x, W1, stride=2, groups=2), (1, 4, 3)),
    "unbatched": (lambda x: F.conv_transpose1d(x, W1), (4, 3)),
    "2d": (
        lambda x: F.conv_transpose2d(x, W2, None, (2, 1), (1, 0), (1, 0), 2, (1, 2)),
        (1, 4, 2, 3),
    ),
    "3d": (lambda x: F.conv_transpose3d(x, W3, stride=2, output_padding=1), (1, 2, 1, 2, 1)),
}

_masked = W1.clone()
_masked[0] = 0
_masked[1, 0] = 0
_masked[2, :, 1] = 0
CAUSAL = W1 * torch.tensor([1.0, 1.0, 0.0]).double()
CROSS = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]]).double()
ZEROS = {
    "taps": (lambda x: F.conv1d(x, _masked, BIAS), (1, 2, 5)),
    "causal": (lambda x: F.conv1d(x, CAUSAL, padding=1), (1, 2, 4)),
    "five points": (lambda x: F.conv2d(x, CROSS[None, None], padding=1), (1, 1, 3, 4)),
    "groups": (lambda x: F.conv1d(x, _masked[:, :1], groups=2, padding=1), (1, 2, 4)),
    "stride and dilation": (
        lambda x: F.conv1d(x, _masked, stride=2, padding=2, dilation=2),
        (2, 2, 5),
    ),
    "transposed": (lambda x: F.conv_transpose1d(x, _masked, stride=2, padding=1), (1, 4, 3)),
    "transposed groups": (
        lambda x: F.conv_transpose1d(x, _masked, stride=2, groups=2, dilation=2),
        (1, 4, 3),
    ),
    "transposed 2d": (lambda x: F.conv_transpose2d(x, CROSS[None, None]), (1, 1, 2, 3)),
    "unbatched": (lambda x: F.conv1d(x, _masked), (2, 4)),
}

IMAGE = draw(2, 2, 3, 4, seed=6)
WEIGHTS = {
    "1d": (lambda w: F.conv1d(IMAGE[0], w), (3, 3, 2)),
    "padded": (lambda w: F.conv1d(IMAGE[0], w, padding=2), (2, 3, 2)),
    "padded, strided and dilated": (
        lambda w: F.conv1d(IMAGE[0], w, padding=3, stride=2, dilation=2),
        (2, 3, 3),
    ),
    "groups": (lambda w: F.conv1d(IMAGE[:, 0], w, groups=3), (3, 1, 2)),
    "2d": (lambda w: F.conv2d(IMAGE, w, padding=(1, 0), groups=2), (4, 1, 2, 3)),
    "transposed": (lambda w: F.conv_transpose1d(IMAGE[0], w, stride=2, padding=1), (3, 2, 3)),
    "transposed groups": (
        lambda w: F.conv_transpose1d(IMAGE[0, :, :2], w, stride=2, groups=2, output_padding=1),
        (2, 2, 3),
    ),
    "masked": (lambda w: F.conv1d(IMAGE[0], w * _masked[:, :1]), (4, 3, 3)),
    "unbatched": (lambda w: F.conv1d(IMAGE[0, 0], w, padding=1), (2, 3, 3)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain(name):
    f, shape = PLAIN[name]
    exact(f, draw(*shape))


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed(name):
    f, shape = TRANSPOSED[name]
    exact(f, draw(*shape))


@pytest.mark.parametrize("name", ZEROS)
def test_constant_taps_of_zero_are_structure(name):
    f, shape = ZEROS[name]
    exact(f, draw(*shape))


@pytest.mark.parametrize("name", WEIGHTS)
def test_by_the_weights(name):
    f, shape = WEIGHTS[name]
    exact(f, draw(*shape))


def test_by_the_bias():
    exact(lambda b: F.conv1d(IMAGE[0], W1[:, :1].expand(4, 3, 3), b), draw(4))
    exact(lambda b: F.conv_transpose1d(IMAGE[:, :, 0], W1[:2], b), draw(2))


def test_by_image_weights_and_bias():
    exact(lambda *a: F.conv1d(*a, padding=1), draw(1, 2, 3), W1, BIAS, argnums=(0, 1, 2))


def test_weights_made_of_the_input():
    def dynamic(x):
        return F.conv1d(x[None, None, :], x[:2].exp()[None, None, :])

    exact(dynamic, draw(4))


def test_parameters_are_no_structure():
    layer = nn.Conv1d(1, 1, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.zero_()
    assert detect(layer, draw(1, 1, 4)).pattern.nnz == 6
