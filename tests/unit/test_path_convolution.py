"""Norms of convolutions against the singular values of their matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pushforward.path import convolution
from pushforward.path.convolution import Convolution, log_norm
from pushforward.path.spectrum import log_greatest, log_inequality, log_norms

APPLY = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d}


@st.composite
def convolutions(draw):
    """A convolution in one or two dimensions whose kernel fits its padded input."""
    dims, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation, padding = each(1, 4), each(1, 3), each(1, 2), each(0, 3)
    least = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = tuple(draw(st.integers(max(1, low), max(8, low))) for low in least)
    leaving, entering = groups * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    weight = torch.randn(leaving, entering, *kernel, generator=seed, dtype=torch.float64)
    return Convolution(weight, size, stride, padding, dilation, groups)


def matrix(conv: Convolution) -> Tensor:
    entering = conv.weight.shape[1] * conv.groups
    count = entering * math.prod(conv.size)
    units = torch.eye(count, dtype=torch.float64).reshape(count, entering, *conv.size)
    window = conv.stride, conv.padding, conv.dilation, conv.groups
    return APPLY[len(conv.size)](units, conv.weight, None, *window).flatten(1).T


@settings(max_examples=150, deadline=None)
@given(convolutions())
def test_each_of_the_three_is_a_bound(conv):
    truth = torch.linalg.matrix_norm(matrix(conv), ord=2).log()
    parts = [
        convolution._by_taps(conv),
        convolution._by_unfolding(conv),
        convolution._by_frequencies(conv),
    ]
    assert all(part >= truth - 1e-10 for part in parts)
    assert log_norm(conv) == min(parts)


def plain(weight, size, stride=1, padding=0):
    dims = len(size)
    return Convolution(weight, size, (stride,) * dims, (padding,) * dims, (1,) * dims, 1)


def test_a_circular_convolution_is_met_exactly():
    """Zeros of the padding are all that separates a convolution from the circular one."""
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 3, dtype=torch.float64)
    x = torch.eye(2 * 8, dtype=torch.float64).reshape(16, 2, 8)
    padded = torch.nn.functional.pad(x, (0, 2), mode="circular")
    circular = torch.nn.functional.conv1d(padded, weight).flatten(1)
    exact = torch.linalg.matrix_norm(circular, ord=2).log().item()
    found = convolution._by_frequencies(plain(weight, (8,)))
    assert found == pytest.approx(exact, abs=1e-12)


def test_wide_images_are_met_closely():
    torch.manual_seed(0)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    conv = plain(weight, (16, 16), padding=1)
    truth = torch.linalg.matrix_norm(matrix(conv), ord=2).log().item()
    assert 0 <= log_norm(conv) - truth < 0.03


@pytest.mark.parametrize("stride", [2, 3])
def test_a_stride_is_not_ignored(stride):
    """A convolution that keeps every s-th of the inputs apart is a matrix product."""
    torch.manual_seed(0)
    weight = torch.randn(2, 2, stride, dtype=torch.float64)
    conv = plain(weight, (4 * stride,), stride=stride)
    truth = torch.linalg.matrix_norm(weight.flatten(1), ord=2).log().item()
    assert log_norm(conv) == pytest.approx(truth, abs=1e-12)


def test_a_convolution_of_zeros():
    assert log_norm(plain(torch.zeros(2, 2, 3, dtype=torch.float64), (5,))) == -math.inf


def test_what_takes_too_long_by_frequencies_is_bounded_by_the_others(monkeypatch):
    torch.manual_seed(0)
    conv = plain(torch.randn(2, 2, 3, dtype=torch.float64), (5,))
    best = log_norm(conv)
    monkeypatch.setattr(convolution, "MOST_WORK", 0)
    assert convolution._by_frequencies(conv) == math.inf
    assert best < log_norm(conv) < math.inf


# Matrices


@pytest.mark.parametrize("shape", [(5, 3, 4), (40, 6, 2), (7, 1, 5), (3, 30, 30)])
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_greatest_of_many_norms(shape, scale, dtype):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=dtype) * scale
    truth = torch.linalg.svdvals(matrices / scale).amax().log() + math.log(scale)
    assert log_greatest(matrices) == pytest.approx(truth.item(), abs=1e-11)
    assert log_greatest(matrices) >= truth - 1e-15 * abs(truth)


def test_most_candidates_are_decided_without_eigenvalues(monkeypatch):
    asked = []
    original = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda g: asked.append(len(g)) or original(g))
    torch.manual_seed(0)
    matrices = torch.randn(300, 40, 40, dtype=torch.float64)
    matrices[17] *= 3
    truth = torch.linalg.matrix_norm(matrices[17], ord=2).log()
    assert log_greatest(matrices) == pytest.approx(truth.item(), abs=1e-12)
    assert sum(asked) < 10


def test_the_greatest_of_nothing_and_of_zeros():
    assert log_greatest(torch.zeros(4, 2, 3)) == -math.inf
    assert log_greatest(torch.zeros(0, 2, 3)) == -math.inf
    some = torch.zeros(4, 2, 3, dtype=torch.float64)
    some[2, 1, 1] = 5
    assert log_greatest(some) == pytest.approx(math.log(5))


def test_norms_one_by_one_and_inequalities():
    torch.manual_seed(0)
    scales = torch.tensor([1, 0, 1e-150, 1e150], dtype=torch.float64)
    matrices = torch.randn(4, 5, 3, dtype=torch.float64) * scales[:, None, None]
    truth = torch.linalg.matrix_norm(matrices, ord=2).log()
    torch.testing.assert_close(log_norms(matrices), truth, atol=1e-11, rtol=1e-14)
    assert (log_inequality(matrices) >= truth).all()
    assert (log_norms(torch.zeros(2, 0, 3)) == -math.inf).all()
