"""AutoTransform: any bijection as a transform of torch.distributions."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, TransformedDistribution, constraints
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    TanhTransform,
)

import pushforward as pf
from pushforward.errors import CouplingError, InputError, ShapeError


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def standard(*event):
    zeros = torch.zeros(event, dtype=torch.float64)
    return Independent(Normal(zeros, torch.ones_like(zeros)), len(event))


class Residual(nn.Module):
    """x + 0.5 tanh(W x), a bijection where the norm of W is under 2."""

    def __init__(self, n=3, dtype=torch.float64):
        super().__init__()
        self.W = nn.Parameter(0.4 * random(n, n).to(dtype))

    def forward(self, x):
        return x + 0.5 * torch.tanh(x @ self.W.T)

    def logabsdet(self, x):
        slopes = 0.5 * (1 - torch.tanh(x @ self.W.T) ** 2)
        J = torch.eye(len(self.W), dtype=x.dtype) + slopes[..., None] * self.W
        return torch.linalg.slogdet(J).logabsdet


class SinhArcsinh(nn.Module):
    """sinh(tail (asinh x + skew)), number by number."""

    def __init__(self):
        super().__init__()
        self.skew = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.tail = nn.Parameter(torch.tensor(1.2, dtype=torch.float64))

    def forward(self, x):
        return torch.sinh(self.tail * (torch.asinh(x) + self.skew))

    def inverse(self, y):
        return torch.sinh(torch.asinh(y) / self.tail - self.skew)

    def logabsdet(self, x):
        inner = self.tail * (torch.asinh(x) + self.skew)
        return (self.tail * torch.cosh(inner) / torch.sqrt(1 + x * x)).log()

    def log_prob(self, y):
        """The density of f(z) for a standard normal z, in closed form."""
        x = self.inverse(y)
        return Normal(torch.zeros_like(x), torch.ones_like(x)).log_prob(x) - self.logabsdet(x)


def shear(x):
    """A triangular map of R^3 with log|det| = x_0 + 0.5."""
    first, second, third = x.unbind(-1)
    return torch.stack([first, second * first.exp(), third * 0.5**-1 + second.sin()], -1) * 1.0


class TestShapes:
    @pytest.mark.parametrize(
        ("shape", "event_dim"),
        [((), 0), ((4,), 0), ((2, 3), 0), ((3,), 1), ((5, 3), 1), ((2, 4, 3), 1), ((2, 3, 2), 2)],
    )
    def test_round_trip_and_shapes(self, shape, event_dim):
        dims = tuple(range(-event_dim, 0))

        def f(x):
            return x.sinh() + (0.1 * x.sum(dims, keepdim=True).tanh() if dims else 0.0)

        transform = pf.AutoTransform(f, event_dim=event_dim)
        x = random(*shape)
        y = transform(x)
        torch.testing.assert_close(transform.inv(y), x)
        logabsdet = transform.log_abs_det_jacobian(x, y)
        assert logabsdet.shape == shape[: len(shape) - event_dim]
        torch.testing.assert_close(transform.inv.log_abs_det_jacobian(y, x), -logabsdet)

    def test_an_empty_batch(self):
        transform = pf.AutoTransform(Residual())
        x = torch.zeros(0, 3, dtype=torch.float64)
        assert transform.log_abs_det_jacobian(x, transform(x)).shape == (0,)
        assert transform.inv(x).shape == (0, 3)

    def test_the_function_sees_batches_as_they_are(self):
        seen = []

        def f(x):
            seen.append(tuple(x.shape))
            return 2 * x

        transform = pf.AutoTransform(f)
        x = random(2, 4, 3)
        transform.inv(transform(x))
        transform.log_abs_det_jacobian(x, x)
        assert set(seen) == {(2, 4, 3)}

    def test_parameters_of_the_shape_of_the_batch(self):
        scale = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
        transform = pf.AutoTransform(lambda x: scale * x)
        x = random(5, 3, 2)
        torch.testing.assert_close(transform.inv(scale * x), x)
        expected = (2 * scale.log()[:, 0]).expand(5, 3)
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, x), expected)


class TestValues:
    @pytest.mark.parametrize("module", [Residual(), SinhArcsinh()], ids=["residual", "elementwise"])
    def test_closed_forms(self, module):
        event_dim = 1 if isinstance(module, Residual) else 0
        transform = pf.AutoTransform(module, event_dim=event_dim)
        x = random(6, 3)
        got = transform.log_abs_det_jacobian(x, transform(x))
        torch.testing.assert_close(got, module.logabsdet(x), rtol=1e-12, atol=1e-12)

    def test_a_triangular_map(self):
        transform = pf.AutoTransform(shear)
        x = random(6, 3)
        expected = x[:, 0] + torch.tensor(2.0).double().log()
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, None), expected)
        torch.testing.assert_close(transform.inv(shear(x)), x)

    @pytest.mark.parametrize(
        "theirs", [ExpTransform(), TanhTransform(), AffineTransform(1.0, -2.0)]
    )
    def test_agrees_with_torch(self, theirs):
        ours = pf.AutoTransform(theirs, event_dim=0)
        x = 0.5 * random(4, 2)
        y = ours(x)
        expected = theirs.log_abs_det_jacobian(x, y).expand(4, 2)
        torch.testing.assert_close(ours.log_abs_det_jacobian(x, y), expected)
        torch.testing.assert_close(ours.inv(y), x)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_short_dtypes(self, dtype):
        transform = pf.AutoTransform(Residual(dtype=dtype))
        x = random(5, 3).to(dtype)
        y = transform(x)
        assert transform.inv(y).dtype is dtype
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(transform.inv(y), x, rtol=tolerance, atol=tolerance)
        assert transform.log_abs_det_jacobian(x, y).dtype is dtype


class TestDistributions:
    @pytest.mark.parametrize("given", [True, False])
    @pytest.mark.parametrize("cache_size", [0, 1])
    def test_log_prob_in_a_transformed_distribution(self, given, cache_size):
        module = SinhArcsinh()
        inverse = module.inverse if given else None
        transform = pf.AutoTransform(module, inverse, event_dim=0, cache_size=cache_size)
        law = TransformedDistribution(Normal(torch.zeros(3).double(), 1.0), [transform])
        y = law.rsample((4,))
        torch.testing.assert_close(law.log_prob(y), module.log_prob(y), rtol=1e-10, atol=1e-10)

    def test_it_integrates_to_one(self):
        law = TransformedDistribution(
            Normal(torch.zeros(()).double(), 1.0), [pf.AutoTransform(SinhArcsinh(), event_dim=0)]
        )
        grid = torch.linspace(-200, 200, 40001, dtype=torch.float64)
        assert abs(torch.trapezoid(law.log_prob(grid).exp(), grid).item() - 1) < 1e-6

    def test_in_two_dimensions(self):
        law = TransformedDistribution(standard(2), [pf.AutoTransform(Residual(2))])
        line = torch.linspace(-8, 8, 161, dtype=torch.float64)
        grid = torch.cartesian_prod(line, line)
        mass = law.log_prob(grid).exp().sum() * 0.1**2
        assert abs(mass.item() - 1) < 1e-10

    def test_composed_with_transforms_of_torch(self):
        ours = pf.AutoTransform(Residual())
        exp = IndependentTransform(ExpTransform(), 1)
        composed = ComposeTransform([ours, exp])
        x = random(4, 3)
        y = composed(x)
        torch.testing.assert_close(composed.inv(y), x)
        expected = ours.log_abs_det_jacobian(x, None) + ours(x).sum(-1)
        torch.testing.assert_close(composed.log_abs_det_jacobian(x, y), expected)

    def test_cache(self):
        transform = pf.AutoTransform(Residual(), cache_size=1)
        x = random(4, 3)
        y = transform(x)
        assert transform.inv(y) is x
        assert transform(x) is y
        assert transform.with_cache(1) is transform
        uncached = transform.with_cache(0)
        assert uncached.f is transform.f
        assert uncached.inv(y) is not x

    def test_domains(self):
        transform = pf.AutoTransform(torch.sinh, event_dim=0)
        assert transform.domain is transform.codomain is constraints.real
        assert pf.AutoTransform(torch.sinh, event_dim=2).domain.event_dim == 2
        assert transform.bijective


class TestModule:
    def test_parameters_and_to(self):
        transform = pf.AutoTransform(Residual())
        assert [name for name, _ in transform.named_parameters()] == ["f.W"]
        assert transform.to(torch.float32) is transform
        assert transform.f.W.dtype is torch.float32
        assert transform.inv(torch.zeros(2, 3)).dtype is torch.float32

    def test_identity_is_that_of_the_object(self):
        f = Residual()
        one, other = pf.AutoTransform(f), pf.AutoTransform(f)
        assert one != other
        assert one == one
        assert len({one, other, one}) == 2
        assert one.inv.inv is one

    def test_deep_copies_are_independent(self):
        transform = pf.AutoTransform(Residual(), cache_size=1)
        x = random(4, 3)
        y = transform(x)
        transform.log_abs_det_jacobian(x, y)
        copied = copy.deepcopy(transform)
        with torch.no_grad():
            copied.f.W.zero_()
        torch.testing.assert_close(copied.log_abs_det_jacobian(x, None), torch.zeros(4).double())
        assert transform.log_abs_det_jacobian(x, y).abs().min() > 1e-3
        torch.testing.assert_close(copied(x), x)

    @pytest.mark.parametrize("cache_size", [0, 1])
    def test_pickles(self, cache_size):
        transform = pf.AutoTransform(Residual(), cache_size=cache_size)
        x = random(2, 3)
        transform(x)
        again = pickle.loads(pickle.dumps(transform))
        torch.testing.assert_close(again(x), transform(x))

    def test_repr(self):
        assert repr(pf.AutoTransform(Residual())) == (
            "AutoTransform(Residual, inverse=numerical, event_dim=1)"
        )
        assert "inverse=asinh" in repr(pf.AutoTransform(torch.sinh, torch.asinh, event_dim=0))

    def test_nothing_is_left_behind(self):
        module = nn.Sequential(Residual(), nn.BatchNorm1d(3).double().eval())
        transform = pf.AutoTransform(module)
        before = copy.deepcopy(module.state_dict())
        state = torch.get_rng_state()
        y = transform(random(4, 3))
        transform.log_abs_det_jacobian(transform.inv(y), y).sum()
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert all(parameter.grad is None for parameter in module.parameters())


def derivatives(value, variables, orders):
    """All derivatives up to an order, of the sums of the ones before, flattened in one list."""
    levels = [[value]]
    for _ in range(orders):
        levels.append(
            [
                gradient
                for one in levels[-1]
                for gradient in torch.autograd.grad(
                    one.sum(), variables, create_graph=True, materialize_grads=True
                )
            ]
        )
    return [tensor.detach() for level in levels for tensor in level]


class TestTraining:
    @pytest.mark.parametrize("inverse", ["numerical", "given", "detached"])
    def test_derivatives_up_to_the_third_order(self, inverse):
        module = SinhArcsinh()
        choices = {
            "numerical": None,
            "given": module.inverse,
            "detached": lambda y: module.inverse(y).detach(),
        }
        transform = pf.AutoTransform(module, choices[inverse], event_dim=0)
        law = TransformedDistribution(Normal(torch.zeros(()).double(), 1.0), [transform])
        y = torch.linspace(-2, 2, 5).double().requires_grad_()
        variables = [y, module.skew, module.tail]
        got = derivatives(law.log_prob(y), variables, 3)
        expected = derivatives(module.log_prob(y), variables, 3)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)

    def test_the_inverse_of_an_affine_map(self):
        A = (random(3, 3) + 2 * torch.eye(3)).requires_grad_()
        b = random(3, seed=1).requires_grad_()
        y = random(4, 3, seed=2).requires_grad_()
        transform = pf.AutoTransform(lambda x: x @ A.T + b)
        got = derivatives(transform.inv(y).square(), [A, b, y], 2)
        expected = derivatives(((y - b) @ torch.linalg.inv(A).T).square(), [A, b, y], 2)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)

    def test_log_determinants_train(self):
        module = Residual()
        transform = pf.AutoTransform(module)
        x = random(5, 3).requires_grad_()
        got = derivatives(transform.log_abs_det_jacobian(x, None), [x, module.W], 2)
        expected = derivatives(module.logabsdet(x), [x, module.W], 2)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)

    def test_maximum_likelihood_finds_the_parameters(self):
        module = SinhArcsinh()
        transform = pf.AutoTransform(module, event_dim=0)
        law = TransformedDistribution(Normal(torch.zeros(()).double(), 1.0), [transform])
        y = law.sample((400,))
        with torch.no_grad():
            truth = law.log_prob(y).mean().item()
            module.skew.fill_(0.0)
            module.tail.fill_(1.0)
        optimizer = torch.optim.Adam(transform.parameters(), lr=0.05)
        for _ in range(40):
            optimizer.zero_grad()
            loss = -law.log_prob(y).mean()
            loss.backward()
            optimizer.step()
        assert -loss.item() > truth - 0.02


class TestErrors:
    def test_f_and_inverse_must_be_callable(self):
        with pytest.raises(
            InputError, match="f expects a function or module of one tensor, got int"
        ):
            pf.AutoTransform(3)
        with pytest.raises(InputError, match=r"inverse expects a function.*got str"):
            pf.AutoTransform(torch.sinh, "asinh")

    @pytest.mark.parametrize("event_dim", [-1, 1.0])
    def test_event_dim(self, event_dim):
        with pytest.raises(InputError, match="event_dim expects an integer >= 0"):
            pf.AutoTransform(torch.sinh, event_dim=event_dim)

    def test_a_change_of_shape_points_to_pushforward(self):
        with pytest.raises(ShapeError, match=r"keep the shape \(2, 3\), got \(2, 4\).*Pushforward"):
            pf.AutoTransform(lambda x: torch.cat([x, x[:, :1]], -1))(random(2, 3))
        with pytest.raises(ShapeError, match=r"got tuple.*Pushforward"):
            pf.AutoTransform(lambda x: (x, x))(random(2, 3))

    def test_too_few_dimensions(self):
        transform = pf.AutoTransform(torch.sinh, event_dim=2)
        for call in (transform, transform.inv, lambda x: transform.log_abs_det_jacobian(x, x)):
            with pytest.raises(ShapeError, match=r"event_dim=2 expects tensors.*got \(3,\)"):
                call(random(3))

    def test_events_that_influence_each_other(self):
        transform = pf.AutoTransform(lambda x: x + x.softmax(0), event_dim=0)
        with pytest.raises(CouplingError, match=r"shape \(\) of a batch \(3,\).*event_dim="):
            transform.log_abs_det_jacobian(random(3), None)

    def test_an_inverse_that_is_not_one(self):
        transform = pf.AutoTransform(lambda x: 2 * x, lambda y: torch.where(y > 1, y, y / 2))
        y = torch.tensor([[0.5, 0.5], [0.5, 4.0]])
        with pytest.raises(InputError, match=r"inverse expects to undo f.*index \(1,\).*= 4 with"):
            transform.inv(y)

    def test_an_inverse_of_another_shape(self):
        transform = pf.AutoTransform(lambda x: 2 * x, lambda y: y[..., :1])
        with pytest.raises(
            ShapeError, match=r"inverse is expected to return \(2, 3\).*got \(2, 1\)"
        ):
            transform.inv(random(2, 3))
        with pytest.raises(ShapeError, match="got NoneType"):
            pf.AutoTransform(lambda x: 2 * x, lambda y: None).inv(random(2, 3))

    def test_cache_size(self):
        with pytest.raises(ValueError, match="cache_size must be 0 or 1"):
            pf.AutoTransform(torch.sinh, cache_size=2)
