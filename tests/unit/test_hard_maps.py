"""Maps on which something of torch, or of a user's code, stands in the way."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import LowerCholeskyTransform, SigmoidTransform, TanhTransform
from torch.utils.checkpoint import checkpoint

import pushforward as pf
from oracles import loop_hessian, loop_jacobian, loop_laplacian
from pushforward.errors import (
    CouplingError,
    DifferentiationError,
    InputError,
    ShapeError,
)

F64 = {"dtype": torch.float64}


def point(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), **F64)


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()).double()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
class TestNormalisationOutOfReach:
    @pytest.fixture
    def traced(self) -> tuple[nn.Module, nn.Module]:
        net = normed()
        return net, torch.jit.trace(net, point(4))

    def test_what_is_right_is_given(self, traced: tuple[nn.Module, nn.Module]):
        net, hidden = traced
        torch.testing.assert_close(
            pf.jacobian(hidden, point(4)).matrix(), pf.jacobian(net, point(4)).matrix()
        )
        expected = loop_hessian(lambda x: net(x).sum(), point(4))
        with torch.no_grad():
            H = pf.hessian(lambda x: hidden(x).sum(), point(4)).matrix()
        torch.testing.assert_close(H, expected)

    def test_what_would_be_wrong_is_refused(self, traced: tuple[nn.Module, nn.Module]):
        _, hidden = traced
        for call in (
            lambda: pf.laplacian(hidden, point(4)),
            lambda: pf.hessian(lambda x: hidden(x).sum(), point(4)),
        ):
            with pytest.raises(DifferentiationError, match="native_layer_norm inside of code"):
                call()

    def test_products_that_train_come_from_rows(self, traced: tuple[nn.Module, nn.Module]):
        net, hidden = traced
        found = []
        for f in (net, hidden):
            product = pf.jacobian(f, point(4)) @ point(4)
            weights = [p for p in f.parameters() if p.dim() == 2]
            found.append(torch.autograd.grad(product.square().sum(), weights)[0])
        torch.testing.assert_close(*found)

    def test_scripted_buffers_stay(self):
        net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
        scripted = torch.jit.script(net)
        before = {name: b.clone() for name, b in scripted.named_buffers()}
        assert pf.jacobian(scripted, point(5, 3)).shape == (15, 15)
        assert all(torch.equal(b, before[name]) for name, b in scripted.named_buffers())


class TestLogcumsumexp:
    def test_products_and_curvature(self):
        z, v = point(4), point(4).flip(0)
        reference = lambda x: torch.stack([x[: i + 1].logsumexp(0) for i in range(4)])  # noqa: E731
        f = lambda x: torch.logcumsumexp(x, 0)  # noqa: E731
        torch.testing.assert_close(pf.jacobian(f, z) @ v, loop_jacobian(reference, z) @ v)
        torch.testing.assert_close(pf.laplacian(f, z), loop_laplacian(reference, z))

    def test_along_any_axis(self):
        x = point(2, 3, 4)
        for dim in (0, 1, -1):
            J = pf.jacobian(lambda x, d=dim: x.logcumsumexp(d), x)
            torch.testing.assert_close(J.value, torch.logcumsumexp(x, dim))
            torch.testing.assert_close(
                J.dense(), loop_jacobian(lambda x, d=dim: torch.logcumsumexp(x, d), x)
            )

    def test_a_tall_map(self):
        x = point(1, 3)
        J = pf.jacobian(lambda x: torch.logcumsumexp(x * torch.ones(400, 1, **F64), 0), x)
        assert torch.isfinite(J.matrix()).all()


class TestHardsigmoid:
    """torch has its first derivative alone; a network for phones has it in every block."""

    net = nn.Sequential(nn.Linear(4, 5), nn.Hardsigmoid(), nn.Linear(5, 3)).double()

    def test_a_jacobian_can_be_trained(self):
        x = 4 * point(6, 4)
        loss = pf.jacobian(self.net, x, batch_dim=0).fro_norm().square().sum()
        (found,) = torch.autograd.grad(loss, self.net[0].weight)
        first, last = self.net[0].weight, self.net[2].weight
        slopes = (self.net[0](x).abs() < 3).double() / 6
        wanted = sum(((last * slope) @ first).square().sum() for slope in slopes)
        torch.testing.assert_close(found, *torch.autograd.grad(wanted, first))

    def test_values_and_slopes_are_those_of_torch(self):
        x = torch.tensor([-4.0, -3.0, -1.0, 2.9, 3.0, 5.0], **F64)
        J = pf.jacobian(lambda x: nn.functional.hardsigmoid(x.clone(), inplace=True) ** 2, x)
        value = nn.functional.hardsigmoid(x)
        slope = (x.abs() < 3).double() / 6
        torch.testing.assert_close(J.value, value**2)
        torch.testing.assert_close(J.diagonal(), 2 * value * slope)
        curved = pf.hessian(lambda x: (nn.functional.hardsigmoid(x) ** 2).sum(), x)
        torch.testing.assert_close(curved.diagonal(), 2 * slope**2)


class TestCheckpoints:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4)).double()

    def test_not_reentrant(self):
        x = point(3, 4)
        f = lambda x: checkpoint(self.net, x, use_reentrant=False)  # noqa: E731
        torch.testing.assert_close(pf.jacobian(f, x) @ x, pf.jacobian(self.net, x) @ x)
        torch.testing.assert_close(pf.jacobian(f, x).matrix(), pf.jacobian(self.net, x).matrix())
        with pytest.raises(DifferentiationError, match="take the checkpoint away"):
            pf.hessian(lambda x: f(x).pow(3).sum(), x).matrix()

    def test_reentrant(self):
        f = lambda x: checkpoint(self.net, x, use_reentrant=True)  # noqa: E731
        with pytest.raises(DifferentiationError, match="use_reentrant=False"):
            pf.jacobian(f, point(3, 4)).matrix()


def test_hessians_in_inference_mode():
    x = point(4)
    with torch.inference_mode():
        H = pf.hessian(lambda x: x.pow(3).sum(), x).matrix()
    torch.testing.assert_close(H.clone(), torch.diag(6 * x))


@pytest.mark.parametrize(
    ("f", "dtype"),
    [(lambda x: (x * 1e-3).sin() * 2e-4, torch.float16), (lambda x: x * 1e-42, torch.float32)],
)
def test_gradients_below_the_normal_numbers_are_no_coupling(f, dtype: torch.dtype):
    assert pf.jacobian(f, point(64, 6).to(dtype), batch_dim=0).shape == (6, 6)


def test_a_backward_that_is_not_linear_is_not_called_coupling_of_an_op():
    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return gradient.clamp(-1, 1)

    with pytest.raises(CouplingError, match="through clip do not: its backward is not linear"):
        pf.jacobian(Clip.apply, point(8, 3), batch_dim=0)


def test_sparse_points_are_refused():
    with pytest.raises(InputError, match="dense tensors to differentiate, got a sparse one"):
        pf.jacobian(torch.sin, point(3, 3).to_sparse())


def test_complex_vectors_of_real_maps_are_refused():
    J = pf.jacobian(torch.sin, point(3))
    for vector in (point(3) + 1j, torch.stack((point(3), point(3)), 1) + 1j):
        with pytest.raises(ShapeError, match="J @ v expects v like"):
            J @ vector


def test_a_number_of_singular_values_is_whole():
    with pytest.raises(InputError, match=r"whole number k between 0 and min\(m, n\) = 3"):
        pf.jacobian(torch.sin, point(3)).svdvals(1.5)


def test_an_operator_is_made_of_functions():
    with pytest.raises(InputError, match="a shape with two functions, got tuple"):
        pf.aslinearoperator((2, 2), None, None)


def test_ops_without_second_derivative_are_named_on_existing_tensors():
    x = point(5, 3).requires_grad_()
    y = torch.cdist(x[:, None], point(2, 3)[None]).sum((-1, -2))[:, None]
    with pytest.raises(DifferentiationError, match="_cdist_backward"):
        pf.autograd.laplacian(y, x)


@pytest.mark.parametrize(
    "transform", [SigmoidTransform(), TanhTransform()], ids=["sigmoid", "tanh"]
)
def test_saturated_transforms_of_torch_are_right(transform):
    assert pf.logdetcheck(transform, torch.linspace(-13, 13, 200)) < 1e-2


def test_a_transform_without_a_log_determinant():
    with pytest.raises(InputError, match="has no log_abs_det_jacobian"):
        pf.logdetcheck(LowerCholeskyTransform(), point(3, 3))


def test_vmap_around_it_is_refused():
    with pytest.raises(InputError, match="batch_dim=0 instead of vmap"):
        torch.func.vmap(lambda x: pf.jacobian(torch.sin, x).dense())(point(4, 3))


def test_gradients_of_torch_func_around_it():
    def f(x: Tensor) -> Tensor:
        return torch.tanh(x * x.sum())

    for loss in (
        lambda x: pf.jacobian(f, x).fro_norm(),
        lambda x: (pf.jacobian(f, x) @ x.detach()).square().sum(),
    ):
        x = point(3).requires_grad_()
        (expected,) = torch.autograd.grad(loss(x), x)
        torch.testing.assert_close(torch.func.grad(loss)(point(3)), expected)


def test_arguments_of_another_kind():
    with pytest.raises(InputError, match="positive finite number, got 'a'"):
        pf.noise_response(torch.sin, point(3), "a")
    with pytest.raises(InputError, match="seed expects a whole number, got 'a'"):
        pf.noise_response(torch.sin, point(3), 0.1, seed="a")
    with pytest.raises(InputError, match="names of modules or globs, got 3"):
        pf.path_bound(normed(), point(2, 4), layers=3)
