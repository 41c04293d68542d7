"""Derivatives of tensors that already exist."""

import pytest
import torch
from torch import Tensor, nn

import pushforward as pf
from oracles import loop_hessian, loop_jacobian, loop_laplacian
from pushforward.errors import (
    CouplingError,
    DifferentiationError,
    GraphError,
    InputError,
    ShapeError,
)

F64 = {"dtype": torch.float64}


def points(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=generator, **F64).requires_grad_()


def field(x: Tensor) -> Tensor:
    """A scalar field, (..., 3) -> (..., 1)."""
    return (x[..., :1] ** 3 * x[..., 1:2].sin() + x[..., 2:].exp()).tanh()


def swirl(x: Tensor) -> Tensor:
    """A vector field, (..., 3) -> (..., 3)."""
    return torch.stack((x[..., 0] ** 2 * x[..., 1], x[..., 1].sin(), x[..., 0] * x[..., 2]), -1)


def test_gradient_is_the_vector_jacobian_product():
    x, u = points(4), torch.arange(3.0, **F64)
    y = torch.stack((x.prod(), x.sum(), x[0] ** 3))
    expected = u @ loop_jacobian(lambda x: torch.stack((x.prod(), x.sum(), x[0] ** 3)), x)
    torch.testing.assert_close(pf.autograd.gradient(y, x, u), expected)
    torch.testing.assert_close(
        pf.autograd.gradient(y, x), pf.autograd.gradient(y, x, torch.ones_like(y))
    )


def test_jacobian_of_all_by_all():
    x = points(2, 3)
    y = (x.T @ x).sin()
    torch.testing.assert_close(
        pf.autograd.jacobian(y, x), loop_jacobian(lambda x: (x.T @ x).sin(), x)
    )


def test_jacobian_of_a_scalar():
    x = points(2, 3)
    torch.testing.assert_close(pf.autograd.jacobian((x**2).sum(), x), 2 * x)


def test_jacobian_per_sample():
    x = points(5, 3)
    expected = torch.stack([loop_jacobian(swirl, sample) for sample in x])
    torch.testing.assert_close(pf.autograd.jacobian(swirl(x), x, batch_dim=0), expected)


def test_jacobian_where_det_cannot_run_under_vmap_trains():
    x = points(3, 2, 2)
    rows = pf.autograd.jacobian(torch.linalg.det(x), x, batch_dim=0)
    (second,) = torch.autograd.grad(rows.square().sum(), x)
    torch.testing.assert_close(second, 2 * x.detach())  # |adj A| = |A| for 2 x 2


@pytest.mark.parametrize("lead", [(), (5,), (2, 4), (0,)])
def test_divergence_and_laplacian_point_by_point(lead: tuple[int, ...]):
    x = points(*lead, 3)
    flat = x.detach().reshape(-1, 3)
    divergence = torch.tensor([loop_jacobian(swirl, p).trace() for p in flat], **F64)
    laplacian = torch.tensor([loop_laplacian(field, p).sum() for p in flat], **F64)
    torch.testing.assert_close(pf.autograd.divergence(swirl(x), x), divergence.reshape(*lead, 1))
    torch.testing.assert_close(pf.autograd.laplacian(field(x), x), laplacian.reshape(*lead, 1))


def test_laplace_is_another_name():
    assert pf.autograd.laplace is pf.autograd.laplacian


def test_affine_map_has_the_laplacian_zero():
    x = points(5, 3)
    weight = points(3, 1)
    assert torch.equal(pf.autograd.laplacian(x @ weight, x), torch.zeros(5, 1, **F64))


def test_they_nest():
    """The gradient of a Laplacian is one of third derivatives."""
    x = points(1, 3)
    third = pf.autograd.gradient(pf.autograd.laplacian(field(x), x), x)
    expected = loop_jacobian(lambda x: loop_hessian_trace(x), x.detach())
    torch.testing.assert_close(third, expected)


def loop_hessian_trace(x: Tensor) -> Tensor:
    inner = x.requires_grad_()
    (g,) = torch.autograd.grad(field(inner).sum(), inner, create_graph=True)
    return sum(torch.autograd.grad(g[0, i], inner, create_graph=True)[0][0, i] for i in range(3))


def test_a_network_trains_on_its_residual():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = points(6, 2)
    loss = pf.autograd.laplacian(net(x), x).square().sum()
    actual = torch.autograd.grad(loss, net[0].weight)[0]

    def total(weight: Tensor) -> Tensor:
        def f(p: Tensor) -> Tensor:
            hidden = torch.tanh(p @ weight.T + net[0].bias)
            return (hidden @ net[2].weight.T + net[2].bias).sum()

        traces = [torch.func.jacrev(torch.func.jacrev(f))(p).trace() for p in x.detach()]
        return torch.stack(traces).square().sum()

    torch.testing.assert_close(actual, torch.func.grad(total)(net[0].weight.detach()))


def test_second_derivatives_agree_with_the_loop():
    x = points(3)
    expected = loop_hessian(lambda x: field(x).sum(), x.detach())
    gradient = pf.autograd.gradient(field(x), x)
    torch.testing.assert_close(pf.autograd.jacobian(gradient, x), expected)


def test_fused_normalisation_gives_values_and_refuses_to_train():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = points(5, 3)
    value = pf.autograd.laplacian(net(x), x)
    torch.testing.assert_close(value, pf.laplacian(net, x, batch_dim=0))
    with pytest.raises(DifferentiationError, match=r"third derivative.*native_layer_norm"):
        value.sum().backward()


class TestRefusals:
    def test_x_without_gradients(self):
        x = torch.ones(3)
        with pytest.raises(GraphError, match=r"x to require gradients.*requires_grad_"):
            pf.autograd.gradient(x**2, x)

    def test_y_without_a_graph(self):
        x = points(3)
        with pytest.raises(GraphError, match="y to have a graph"):
            pf.autograd.laplacian((x.detach() ** 2).sum(-1, keepdim=True), x)

    @pytest.mark.parametrize("name", ["gradient", "jacobian", "divergence"])
    def test_y_of_another_x(self, name: str):
        x, other = points(3), points(3)
        with pytest.raises(GraphError, match=r"y to be computed from x.*not from a copy"):
            getattr(pf.autograd, name)(other**2, x)

    def test_weights_of_another_shape(self):
        x = points(3)
        with pytest.raises(ShapeError, match=r"shape of y, \(3,\), got \(2,\)"):
            pf.autograd.gradient(x**2, x, torch.ones(2, **F64))

    def test_divergence_between_dimensions(self):
        x = points(5, 3)
        with pytest.raises(ShapeError, match=r"as many outputs as inputs.*\(5, 2\) and \(5, 3\)"):
            pf.autograd.divergence(x[:, :2], x)

    def test_laplacian_of_a_vector(self):
        x = points(5, 3)
        with pytest.raises(ShapeError, match=r"scalar field.*one component at a time"):
            pf.autograd.laplacian(x**2, x)

    def test_another_batch_dimension(self):
        x = points(5, 3)
        with pytest.raises(InputError, match="None or 0, got 1"):
            pf.autograd.jacobian(x**2, x, batch_dim=1)

    def test_batches_that_differ(self):
        x = points(5, 3)
        with pytest.raises(ShapeError, match="the same batch as dimension 0"):
            pf.autograd.jacobian(x[:4] ** 2, x, batch_dim=0)


def test_ops_that_vmap_gets_wrong_go_one_by_one():
    x, centres = points(5, 3), points(4, 3).detach()
    expected = loop_jacobian(lambda x: (x[:, None] - centres).norm(dim=-1), x)
    torch.testing.assert_close(pf.autograd.jacobian(torch.cdist(x, centres), x), expected)


@pytest.mark.parametrize("second", ["gradient", "divergence", "jacobian"])
def test_composed_third_derivatives_are_refused_too(second: str):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = points(5, 3)
    value = getattr(pf.autograd, second)(pf.autograd.gradient(net(x), x), x)
    assert torch.isfinite(value).all()
    with pytest.raises(DifferentiationError, match="third derivative"):
        value.sum().backward()


def test_coupled_rows_are_refused():
    x = points(6, 3)
    with pytest.raises(CouplingError, match=r"rows of y that depend on their own.*\.eval\(\)"):
        pf.autograd.jacobian(x - x.mean(0), x, batch_dim=0)
