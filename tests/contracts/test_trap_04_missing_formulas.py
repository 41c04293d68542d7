"""Trap 4: ops without forward mode, without a second derivative, or without both.

On this build flash attention on the CPU has neither (float32 and float64), the float32 LSTM
(mkldnn) has no forward mode but a right second derivative, cdist (at up to 25 points), pdist and
ctc_loss have neither, embedding_bag and grid_sample have no forward mode, sparse.mm has no batched
derivative. hardsigmoid and multi_margin_loss have no second derivative either.
"""

from collections.abc import Callable

import pytest
import torch
from pins import forward_mode, normal, pinned_raise
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import pushforward as pf
from oracles import loop_jacobian, reverse_over_reverse
from zoo import named

pytestmark = forward_mode
REVISIT = "pushforward.composites and math_attention in pushforward.purity"
NO_FORWARD = "forward AD"
NO_SECOND = "not implemented"


def attention(x: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(x, x, x)


def ctc(x: Tensor) -> Tensor:
    target, length = torch.tensor([[1, 2]]), torch.tensor([2])
    return functional.ctc_loss(x.log_softmax(-1), target, torch.tensor([5]), length)


def bag(table: Tensor) -> Tensor:
    return functional.embedding_bag(
        torch.tensor([0, 2, 1]), table, torch.tensor([0, 2]), mode="sum"
    )


def sampled(image: Tensor) -> Tensor:
    grid = torch.tensor([[[[0.1, -0.3], [0.5, 0.2]]]], dtype=image.dtype)
    return functional.grid_sample(image, grid, align_corners=False)


def distances(x: Tensor) -> Tensor:
    return torch.cdist(x, normal(4, 3, seed=3))


WITHOUT_FORWARD: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "attention": (attention, normal(1, 1, 3, 4)),
    "cdist": (distances, normal(5, 3)),
    "pdist": (torch.pdist, normal(4, 3)),
    "ctc_loss": (ctc, normal(5, 1, 4)),
    "embedding_bag": (bag, normal(4, 3)),
    "grid_sample": (sampled, normal(1, 1, 4, 4)),
}
WITHOUT_SECOND = ("attention", "cdist", "pdist", "ctc_loss")


@pytest.mark.parametrize("name", WITHOUT_FORWARD)
def test_no_forward_mode(name: str):
    f, x = WITHOUT_FORWARD[name]
    with pinned_raise(NO_FORWARD, f"without forward mode for {name}", REVISIT, NotImplementedError):
        jvp(f, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("name", WITHOUT_SECOND)
def test_no_second_derivative(name: str):
    f, x = WITHOUT_FORWARD[name]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((f(leaf) ** 2).sum(), leaf, create_graph=True)
    with pinned_raise(NO_SECOND, f"without a second derivative for {name}", REVISIT):
        torch.autograd.grad(gradient.square().sum(), leaf)


def test_the_math_backend_of_attention_has_both():
    x = normal(1, 1, 3, 4)
    with sdpa_kernel(SDPBackend.MATH):
        jvp(attention, (x,), (x,))
        reverse_over_reverse(lambda J: (J**2).sum(), attention, x)


def test_lstm_in_single_precision_has_no_forward_mode():
    layer, x = nn.LSTM(4, 5, batch_first=True), torch.ones(2, 3, 4)
    with pinned_raise(
        NO_FORWARD, "mkldnn's LSTM without forward mode", REVISIT, NotImplementedError
    ):
        jvp(lambda x: layer(x)[0], (x,), (x,))


@pytest.mark.parametrize("name", WITHOUT_FORWARD)
def test_jacobians_are_right(name: str):
    f, x = WITHOUT_FORWARD[name]
    J = pf.jacobian(f, x)
    expected = loop_jacobian(f, x)
    torch.testing.assert_close(J.dense(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["attention", "attention_causal", "distances", "pairwise_distances"]
)
def test_products_and_training_are_right_by_composites(name: str):
    problem = named(name)
    x = problem.x.clone().requires_grad_()
    J = pf.jacobian(problem.f, x)
    matrix = loop_jacobian(problem.reference, problem.x).reshape(J.shape)
    v = normal(J.shape[1], 2, seed=5)
    torch.testing.assert_close((J @ v).detach(), matrix @ v, rtol=1e-9, atol=1e-9)
    (expected,) = reverse_over_reverse(lambda J: (J**2).sum(), problem.reference, problem.x)
    (actual,) = torch.autograd.grad(J.dense().square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_in_single_precision(layer: type[nn.Module]):
    torch.manual_seed(0)
    net = layer(4, 5, batch_first=True)
    x = torch.randn(2, 3, 4)
    J = pf.jacobian(lambda x: net(x)[0], x, batch_dim=0)
    expected = pf.jacobian(lambda x: net.double()(x)[0], x.double(), batch_dim=0).matrix()
    v = torch.ones(2, 12, 1)
    torch.testing.assert_close(J.matrix().double(), expected, rtol=1e-4, atol=1e-5)
    net.float()
    J = pf.jacobian(lambda x: net(x)[0], x, batch_dim=0)
    torch.testing.assert_close((J @ v).double(), expected @ v.double(), rtol=1e-4, atol=1e-5)


def test_what_has_no_second_derivative_is_refused():
    f, x = WITHOUT_FORWARD["ctc_loss"]
    with pytest.raises(pf.errors.DifferentiationError, match="expected ops that can be diff"):
        pf.hessian(f, x).matrix()
