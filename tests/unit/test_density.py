"""Pushforward: the law of f(z), on the whole space and on surfaces."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributions import (
    Bernoulli,
    Exponential,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    Uniform,
    constraints,
)
from torch.distributions.transforms import AffineTransform

import pushforward as pf
from pushforward.errors import (
    ConvergenceError,
    CouplingError,
    DimensionError,
    InputError,
    ShapeError,
)


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def standard(*event):
    zeros = torch.zeros(event, dtype=torch.float64)
    return Independent(Normal(zeros, torch.ones_like(zeros)), len(event))


def parabola(t):
    return torch.stack([t, t**2 / 2], -1)


def helix(t):
    return torch.stack([t.cos(), t.sin(), t / 2], -1)


def sphere(angles):
    polar, azimuth = angles.unbind(-1)
    return torch.stack([polar.sin() * azimuth.cos(), polar.sin() * azimuth.sin(), polar.cos()], -1)


def angles():
    low = torch.tensor([0.0, -math.pi], dtype=torch.float64)
    high = torch.tensor([math.pi, math.pi], dtype=torch.float64)
    return Independent(Uniform(low, high), 1)


def length_element(f, t):
    """|f'(t)| of a curve, by central differences of fourth order."""
    h = 1e-3
    difference = 8 * (f(t + h) - f(t - h)) - (f(t + 2 * h) - f(t - 2 * h))
    return (difference / (12 * h)).norm(dim=-1)


def mass_on_curve(law, f, t):
    """The integral of the density over the curve, with respect to length."""
    return torch.trapezoid(law.log_prob(f(t)).exp() * length_element(f, t), t).item()


class Residual(nn.Module):
    def __init__(self, n=3):
        super().__init__()
        self.W = nn.Parameter(0.4 * random(n, n))

    def forward(self, x):
        return x + 0.5 * torch.tanh(x @ self.W.T)


class Lift(nn.Module):
    """(z, z A^T, sum of squares): an embedding of R^2 in R^4."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(random(1, 2))

    def forward(self, z):
        return torch.cat([z, z @ self.A.T, z.square().sum(-1, keepdim=True)], -1)

    def log_prob(self, y):
        """In closed form: det(J^T J) = det(I + a a^T + 4 z z^T)."""
        z = y[..., :2]
        eye = torch.eye(2, dtype=z.dtype)
        gram = eye + self.A.T @ self.A + 4 * z[..., :, None] * z[..., None, :]
        return standard(2).log_prob(z) - 0.5 * torch.linalg.slogdet(gram).logabsdet


TIME = torch.linspace(-9, 9, 1801, dtype=torch.float64)
NORMAL = Normal(torch.zeros((), dtype=torch.float64), 1.0)


class TestWholeSpace:
    @pytest.mark.parametrize("given", [True, False])
    def test_affine_maps_are_normal(self, given):
        A = random(3, 3) + 2 * torch.eye(3)
        b = random(3, seed=1)
        inverse = (lambda y: (y - b) @ torch.linalg.inv(A).T) if given else None
        law = pf.Pushforward(standard(3), lambda z: z @ A.T + b, inverse)
        y = law.sample((5,))
        torch.testing.assert_close(law.log_prob(y), MultivariateNormal(b, A @ A.T).log_prob(y))

    def test_one_dimension_integrates_to_one(self):
        law = pf.Pushforward(NORMAL, lambda z: z + 0.9 * torch.sin(z))
        grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
        assert abs(torch.trapezoid(law.log_prob(grid).exp(), grid).item() - 1) < 1e-6

    def test_two_dimensions_integrate_to_one(self):
        law = pf.Pushforward(standard(2), Residual(2))
        line = torch.linspace(-8, 8, 161, dtype=torch.float64)
        mass = law.log_prob(torch.cartesian_prod(line, line)).exp().sum() * 0.1**2
        assert abs(mass.item() - 1) < 1e-10

    def test_a_base_on_half_of_the_line(self):
        law = pf.Pushforward(Exponential(torch.tensor(1.0).double()), torch.sqrt, torch.square)
        grid = torch.linspace(1e-9, 7, 4001, dtype=torch.float64)
        torch.testing.assert_close(law.log_prob(grid).exp(), 2 * grid * (-grid.square()).exp())

    def test_the_side_of_a_square_where_the_base_is(self):
        law = pf.Pushforward(Exponential(torch.tensor(1.0).double()), torch.square)
        y = torch.tensor([1e-4, 0.5, 4.0, 25.0], dtype=torch.float64)
        expected = (-y.sqrt()).exp() / (2 * y.sqrt())
        torch.testing.assert_close(law.log_prob(y).exp(), expected)

    def test_agrees_with_transformed_distribution(self):
        transform = AffineTransform(1.0, 3.0, event_dim=1)
        ours = pf.Pushforward(standard(2), transform, transform.inv)
        theirs = TransformedDistribution(standard(2), [transform])
        y = random(4, 2)
        torch.testing.assert_close(ours.log_prob(y), theirs.log_prob(y))

    def test_the_shape_of_the_event_may_change(self):
        law = pf.Pushforward(standard(6), lambda z: 2 * z.reshape(*z.shape[:-1], 2, 3))
        assert law.event_shape == (2, 3)
        y = law.sample((4,))
        expected = standard(6).log_prob(y.reshape(4, 6) / 2) - 6 * math.log(2)
        torch.testing.assert_close(law.log_prob(y), expected)

    def test_a_base_that_does_not_say_where_it_lives(self):
        class Homemade(torch.distributions.Distribution):
            arg_constraints = {}  # noqa: RUF012

            def sample(self, sample_shape=()):
                return NORMAL.sample(sample_shape)

            def log_prob(self, value):
                return NORMAL.log_prob(value)

        law = pf.Pushforward(Homemade(), lambda z: 2 * z)
        y = random(4)
        torch.testing.assert_close(law.log_prob(y), NORMAL.log_prob(y / 2) - math.log(2))
        assert not law.has_rsample

    def test_a_singular_point_has_infinite_density(self):
        law = pf.Pushforward(NORMAL, lambda z: z**3)
        assert law.log_prob(torch.zeros((), dtype=torch.float64)) == math.inf


class TestSurfaces:
    @pytest.mark.parametrize("curve", [parabola, helix])
    def test_curves_integrate_to_one(self, curve):
        law = pf.Pushforward(NORMAL, curve)
        assert abs(mass_on_curve(law, curve, TIME) - 1) < 1e-9

    def test_a_curve_in_closed_form(self):
        law = pf.Pushforward(NORMAL, parabola, lambda y: y[..., 0])
        t = torch.linspace(-3, 3, 7, dtype=torch.float64)
        expected = NORMAL.log_prob(t) - 0.5 * torch.log1p(t * t)
        torch.testing.assert_close(law.log_prob(parabola(t)), expected)

    def test_a_chart_of_the_sphere_integrates_to_one(self):
        law = pf.Pushforward(angles(), sphere)
        polar = (torch.arange(40, dtype=torch.float64) + 0.5) / 40 * math.pi
        azimuth = -math.pi + (torch.arange(40, dtype=torch.float64) + 0.5) / 40 * 2 * math.pi
        points = torch.cartesian_prod(polar, azimuth)
        area = points[:, 0].sin() * (math.pi / 40) * (2 * math.pi / 40)
        density = law.log_prob(sphere(points)).exp()
        assert abs((density * area).sum().item() - 1) < 1e-10
        torch.testing.assert_close(density, 1 / (2 * math.pi**2 * points[:, 0].sin()))

    @pytest.mark.parametrize("given", [True, False])
    def test_an_embedding_in_closed_form(self, given):
        lift = Lift()
        law = pf.Pushforward(standard(2), lift, (lambda y: y[..., :2]) if given else None)
        assert law.event_shape == (4,)
        y = law.sample((6,))
        torch.testing.assert_close(law.log_prob(y), lift.log_prob(y))

    def test_float32(self):
        law = pf.Pushforward(Normal(0.0, 1.0), helix)
        t = torch.linspace(-3, 3, 7)
        expected = Normal(0.0, 1.0).log_prob(t) - 0.5 * math.log(1.25)
        torch.testing.assert_close(law.log_prob(helix(t)), expected, rtol=1e-5, atol=1e-5)

    def test_off_the_surface(self):
        strict = pf.Pushforward(NORMAL, helix)
        lax = pf.Pushforward(NORMAL, helix, validate_args=False)
        y = helix(torch.tensor([0.5, 1.0], dtype=torch.float64))
        y[1, 0] += 1e-3
        with pytest.raises(InputError, match=r"points of the image of helix, got 1 of 2.*\(1,\)"):
            strict.log_prob(y)
        values = lax.log_prob(y)
        assert values[1] == -math.inf
        torch.testing.assert_close(values[0], strict.log_prob(y[0]))

    def test_off_the_surface_with_a_given_inverse(self):
        law = pf.Pushforward(NORMAL, parabola, lambda y: y[..., 0], validate_args=False)
        y = torch.tensor([[1.0, 0.5], [1.0, 0.6]], dtype=torch.float64)
        assert law.log_prob(y).isfinite().tolist() == [True, False]


class TestChains:
    """After a map that raises the dimension log-volumes do not add up."""

    def bend(self, y):
        return y * torch.tensor([2.0, 0.5], dtype=y.dtype) + 0.3 * y.flip(-1).tanh()

    @pytest.mark.parametrize("given", [True, False])
    def test_a_law_on_a_curve_pushed_on_integrates_to_one(self, given):
        scale = torch.tensor([1.0, 3.0], dtype=torch.float64)
        inner = pf.Pushforward(NORMAL, parabola, (lambda y: y[..., 0]) if given else None)
        outer = pf.Pushforward(inner, lambda y: scale * y, (lambda y: y / scale) if given else None)
        assert abs(mass_on_curve(outer, lambda t: scale * parabola(t), TIME) - 1) < 1e-9

    def test_the_sum_of_log_volumes_is_another_number(self):
        scale = torch.tensor([1.0, 3.0], dtype=torch.float64)
        inner = pf.Pushforward(NORMAL, parabola)
        outer = pf.Pushforward(inner, lambda y: scale * y)
        y = scale * parabola(torch.tensor(0.5, dtype=torch.float64))
        summed = inner.log_prob(y / scale) - math.log(3)
        assert abs(outer.log_prob(y) - summed) > 0.5

    def test_three_maps(self):
        curve = pf.Pushforward(NORMAL, parabola)
        lifted = pf.Pushforward(curve, lambda y: torch.cat([y, y.prod(-1, keepdim=True)], -1))
        law = pf.Pushforward(lifted, lambda y: y + 0.2 * y.flip(-1).sin())

        def whole(t):
            return law.f(lifted.f(parabola(t)))

        t = torch.linspace(-6, 6, 2401, dtype=torch.float64)
        assert abs(mass_on_curve(law, whole, t) - 1) < 1e-7

    def test_a_bent_curve(self):
        law = pf.Pushforward(pf.Pushforward(NORMAL, parabola), self.bend)
        t = torch.linspace(-6, 6, 1201, dtype=torch.float64)
        assert abs(mass_on_curve(law, lambda t: self.bend(parabola(t)), t) - 1) < 1e-7

    def test_a_composed_function(self):
        law = pf.Pushforward(NORMAL, lambda t: self.bend(parabola(t)))
        chained = pf.Pushforward(pf.Pushforward(NORMAL, parabola), self.bend)
        y = self.bend(parabola(torch.linspace(-2, 2, 5, dtype=torch.float64)))
        torch.testing.assert_close(law.log_prob(y), chained.log_prob(y))

    def test_up_and_down_again(self):
        up = pf.Pushforward(standard(2), Lift())
        law = pf.Pushforward(up, lambda y: 2 * y[..., :2])
        y = random(4, 2)
        torch.testing.assert_close(law.log_prob(y), standard(2).log_prob(y / 2) - 2 * math.log(2))

    def test_square_maps(self):
        first, second = Residual(), Residual()
        chained = pf.Pushforward(pf.Pushforward(standard(3), first), second)
        whole = pf.Pushforward(standard(3), nn.Sequential(first, second))
        y = chained.sample((4,))
        torch.testing.assert_close(chained.log_prob(y), whole.log_prob(y))

    def test_a_surface_law_inside_another_distribution_is_refused(self):
        surface = pf.Pushforward(Normal(torch.zeros(3).double(), 1.0), parabola)
        with pytest.raises(DimensionError, match="log-volumes do not add up after it: compose"):
            pf.Pushforward(Independent(surface, 1), lambda y: 2 * y)
        inner = TransformedDistribution(surface, [AffineTransform(0.0, 2.0)])
        with pytest.raises(DimensionError, match="made of a Pushforward that raises"):
            pf.Pushforward(inner, lambda y: 2 * y)


class TestShapes:
    @pytest.mark.parametrize(
        ("base", "f", "batch_shape", "event_shape"),
        [
            (Normal(0.0, 1.0), torch.sinh, (), ()),
            (Normal(0.0, 1.0), parabola, (), (2,)),
            (Normal(torch.zeros(3), 1.0), torch.sinh, (3,), ()),
            (Normal(torch.zeros(3), 1.0), helix, (3,), (3,)),
            (Independent(Normal(torch.zeros(3), 1.0), 1), torch.sinh, (), (3,)),
            (Independent(Normal(torch.zeros(2, 3), 1.0), 1), torch.sinh, (2,), (3,)),
            (Independent(Normal(torch.zeros(2, 3), 1.0), 2), torch.sinh, (), (2, 3)),
        ],
    )
    def test_of_laws_samples_and_densities(self, base, f, batch_shape, event_shape):
        law = pf.Pushforward(base, f)
        assert law.batch_shape == batch_shape
        assert law.event_shape == event_shape
        assert law.support is constraints.real or law.support.event_dim == len(event_shape)
        for sample_shape in ((), (4,), (2, 5)):
            y = law.sample(sample_shape)
            assert y.shape == (*sample_shape, *batch_shape, *event_shape)
            assert law.log_prob(y).shape == (*sample_shape, *batch_shape)

    def test_values_broadcast_with_the_batch(self):
        base = Independent(Normal(torch.tensor([[0.0, 0.0], [3.0, 3.0]]).double(), 1.0), 1)
        law = pf.Pushforward(base, lambda z: 2 * z)
        y = random(2)
        expected = base.log_prob(y / 2) - 2 * math.log(2)
        torch.testing.assert_close(law.log_prob(y), expected)
        torch.testing.assert_close(law.log_prob(y.expand(4, 1, 2)), expected.expand(4, 2))

    def test_parameters_of_the_shape_of_the_batch(self):
        scale = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
        law = pf.Pushforward(Normal(torch.zeros(3).double(), 1.0), lambda z: scale * z)
        y = law.sample((5,))
        expected = Normal(torch.zeros(3).double(), scale).log_prob(y)
        torch.testing.assert_close(law.log_prob(y), expected)

    def test_expand(self):
        law = pf.Pushforward(standard(2), Residual(2), validate_args=False)
        wide = law.expand((5,))
        assert wide.batch_shape == (5,)
        assert wide.sample((3,)).shape == (3, 5, 2)
        y = random(5, 2)
        torch.testing.assert_close(wide.log_prob(y), law.log_prob(y))
        assert not wide._validate_args

    def test_an_empty_batch(self):
        law = pf.Pushforward(standard(2), Residual(2))
        assert law.log_prob(torch.zeros(0, 2, dtype=torch.float64)).shape == (0,)
        assert law.sample((0,)).shape == (0, 2)

    def test_independent_of_a_law(self):
        law = Independent(pf.Pushforward(Normal(torch.zeros(3).double(), 1.0), parabola), 1)
        t = random(3)
        y = parabola(t)
        expected = (NORMAL.log_prob(t) - 0.5 * torch.log1p(t * t)).sum()
        torch.testing.assert_close(law.log_prob(y), expected)

    def test_as_components_of_a_mixture(self):
        components = pf.Pushforward(
            Independent(Normal(torch.zeros(2, 1).double(), 1.0), 1), lambda z: 2 * z
        )
        weights = torch.distributions.Categorical(probs=torch.tensor([0.5, 0.5]).double())
        mixture = MixtureSameFamily(weights, components)
        expected = Normal(torch.zeros(1).double(), 2.0).log_prob(torch.ones(1).double())[0]
        torch.testing.assert_close(mixture.log_prob(torch.ones(1).double()), expected)


class TestSampling:
    def test_follows_the_density(self):
        law = pf.Pushforward(NORMAL, lambda z: torch.sinh(z) + 1)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        y = law.sample((4000,))
        torch.set_rng_state(state)
        levels = NORMAL.cdf(torch.asinh(y - 1)).sort().values
        gap = (levels - (torch.arange(4000) + 0.5) / 4000).abs().max()
        assert gap < 1.63 / math.sqrt(4000)

    def test_rsample_is_differentiable(self):
        residual = Residual()
        law = pf.Pushforward(standard(3), residual)
        assert law.has_rsample
        (gradient,) = torch.autograd.grad(law.rsample((4,)).sum(), residual.W)
        assert gradient.abs().min() > 0
        assert not law.sample((4,)).requires_grad

    def test_nothing_else_draws(self):
        state = torch.get_rng_state()
        law = pf.Pushforward(standard(3), Residual().double())
        law.log_prob(torch.zeros(2, 3, dtype=torch.float64))
        copied = copy.deepcopy(law).expand((2,))
        repr(copied)
        assert torch.equal(torch.get_rng_state(), state)

    def test_values_are_the_same_every_time(self):
        law = pf.Pushforward(NORMAL, helix)
        y = helix(torch.linspace(-3, 3, 7, dtype=torch.float64))
        assert torch.equal(law.log_prob(y), law.log_prob(y))


class Learned(nn.Module):
    """A normal law whose parameters are found by the law made of it."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2, dtype=torch.float64))


class TestModule:
    def test_parameters(self):
        law = pf.Pushforward(standard(3), Residual(), Residual())
        assert [name for name, _ in law.named_parameters()] == ["f.W", "inverse.W"]
        outer = pf.Pushforward(law, Residual())
        assert len(list(outer.parameters())) == 3

    def test_parameters_of_the_base(self):
        rate = nn.Parameter(torch.tensor(2.0))
        law = pf.Pushforward(Exponential(rate), torch.sqrt)
        assert any(parameter is rate for parameter in law.parameters()) or not isinstance(
            law.base.rate, nn.Parameter
        )
        inner = TransformedDistribution(standard(3), [pf.AutoTransform(Residual())])
        assert len(list(pf.Pushforward(inner, torch.sinh).parameters())) == 1

    def test_to_moves_map_and_base(self):
        inner = TransformedDistribution(standard(3), [pf.AutoTransform(Residual())])
        law = pf.Pushforward(pf.Pushforward(inner, Residual()), Residual())
        assert law.to(torch.float32) is law
        y = law.sample((4,))
        assert y.dtype is torch.float32
        assert law.log_prob(y).dtype is torch.float32
        assert all(parameter.dtype is torch.float32 for parameter in law.parameters())

    def test_to_leaves_the_callers_base_alone(self):
        base = standard(3)
        law = pf.Pushforward(base, Residual()).float()
        assert base.base_dist.loc.dtype is torch.float64
        assert law.base.base_dist.loc.dtype is torch.float32

    def test_deep_copies_are_independent(self):
        law = pf.Pushforward(standard(3), Residual())
        y = law.sample((2,))
        before = law.log_prob(y)
        copied = copy.deepcopy(law)
        with torch.no_grad():
            copied.f.W.zero_()
        torch.testing.assert_close(copied.log_prob(y), standard(3).log_prob(y))
        torch.testing.assert_close(law.log_prob(y), before)

    def test_pickles(self):
        law = pf.Pushforward(standard(3), Residual())
        y = law.sample((2,))
        law.log_prob(y)
        torch.testing.assert_close(pickle.loads(pickle.dumps(law)).log_prob(y), law.log_prob(y))

    def test_hash_is_that_of_the_object(self):
        law = pf.Pushforward(standard(3), torch.sinh)
        assert len({law, law, copy.deepcopy(law)}) == 2

    def test_state_dict(self):
        law = pf.Pushforward(standard(3), Residual())
        other = pf.Pushforward(standard(3), Residual())
        with torch.no_grad():
            other.f.W.zero_()
        other.load_state_dict(law.state_dict())
        assert torch.equal(other.f.W, law.f.W)

    def test_repr(self):
        law = pf.Pushforward(Normal(0.0, 1.0), helix)
        assert repr(law) == (
            "Pushforward(Normal(loc: 0.0, scale: 1.0), helix, inverse=numerical, event_shape=(3,))"
        )
        assert "inverse=asinh" in repr(pf.Pushforward(Normal(0.0, 1.0), torch.sinh, torch.asinh))


class TestTraining:
    @pytest.mark.parametrize("inverse", ["numerical", "given", "detached"])
    def test_gradients_on_a_surface(self, inverse):
        lift = Lift()
        choices = {
            "numerical": None,
            "given": lambda y: y[..., :2],
            "detached": lambda y: y[..., :2].detach(),
        }
        law = pf.Pushforward(standard(2), lift, choices[inverse])
        z = random(5, 2).requires_grad_()

        def loss(log_prob):
            # y moves along the surface with z, and the surface with A.
            return log_prob(lift(z)).square().sum()

        got = torch.autograd.grad(loss(law.log_prob), [z, lift.A], create_graph=True)
        expected = torch.autograd.grad(loss(lift.log_prob), [z, lift.A], create_graph=True)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        for one, other in zip(got, expected, strict=True):
            second = torch.autograd.grad(one.square().sum(), [z, lift.A], retain_graph=True)
            reference = torch.autograd.grad(other.square().sum(), [z, lift.A], retain_graph=True)
            for a, b in zip(second, reference, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)

    def test_gradients_of_base_and_map(self):
        loc = random(3).requires_grad_()
        A = (random(3, 3) + 2 * torch.eye(3)).requires_grad_()
        y = random(4, 3, seed=1).requires_grad_()
        law = pf.Pushforward(Independent(Normal(loc, 1.0), 1), lambda z: z @ A.T)
        variables = [loc, A, y]
        got = torch.autograd.grad(law.log_prob(y).sum(), variables, create_graph=True)
        closed = MultivariateNormal(A @ loc, A @ A.T).log_prob(y).sum()
        expected = torch.autograd.grad(closed, variables, create_graph=True)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
            second = torch.autograd.grad(one.sum(), variables, retain_graph=True)
            reference = torch.autograd.grad(other.sum(), variables, retain_graph=True)
            for a, b in zip(second, reference, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)

    def test_points_without_density_do_not_poison_gradients(self):
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        law = pf.Pushforward(
            NORMAL, lambda z: (scale * z).exp(), lambda y: y.log() / scale, validate_args=False
        )
        y = torch.tensor([1.5, -1.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
        values = law.log_prob(y)
        assert values.isfinite().tolist() == [True, False, False, True]
        assert (values[1:3] == -math.inf).all()
        got = torch.autograd.grad(values[[0, 3]].sum(), [scale, y])
        good = y.detach()[[0, 3]].requires_grad_()
        expected = torch.autograd.grad(
            torch.distributions.LogNormal(0.0, scale).log_prob(good).sum(), [scale, good]
        )
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[1][[0, 3]], expected[1])
        assert not got[1][1:3].any()

    def test_outside_of_the_support_of_the_base(self):
        law = pf.Pushforward(
            Uniform(torch.zeros(()).double(), 1.0), lambda z: 2 * z + z**3, validate_args=False
        )
        values = law.log_prob(torch.tensor([1.0, 4.0, -1.0], dtype=torch.float64))
        assert values.isfinite().tolist() == [True, False, False]
        assert (values[1:] == -math.inf).all()
        strict = pf.Pushforward(law.base, law.f)
        with pytest.raises(InputError, match=r"x in the support of the base.*index \(1,\) is not"):
            strict.log_prob(torch.tensor([1.0, 4.0], dtype=torch.float64))


class TestErrors:
    def test_arguments(self):
        with pytest.raises(InputError, match="base expects a distribution, got int"):
            pf.Pushforward(3, torch.sinh)
        with pytest.raises(InputError, match="f expects a function or module"):
            pf.Pushforward(NORMAL, None)
        with pytest.raises(InputError, match="inverse expects a function or module"):
            pf.Pushforward(NORMAL, torch.sinh, 3)

    def test_a_discrete_base(self):
        with pytest.raises(InputError, match="with a density, got the discrete Bernoulli"):
            pf.Pushforward(Bernoulli(0.5), torch.sinh)

    def test_lowering_the_dimension_is_explained(self):
        with pytest.raises(DimensionError, match=r"R\^3 to R\^2.*integral.*over the fibre"):
            pf.Pushforward(standard(3), lambda z: z[..., :2])
        up = pf.Pushforward(standard(2), Lift())
        with pytest.raises(DimensionError, match=r"R\^2 to R\^1"):
            pf.Pushforward(up, lambda y: y[..., :1])

    def test_what_belongs_to_the_event(self):
        base = Normal(torch.zeros(3), 1.0)
        with pytest.raises(ShapeError, match=r"\(1, 3\).*got \(1, 5\).*Independent\(base, 1\)"):
            pf.Pushforward(base, nn.Linear(3, 5))
        mixing = pf.Pushforward(base, nn.Linear(3, 3))
        with pytest.raises(CouplingError, match=r"Linear expects.*Independent\(base, k\)"):
            mixing.log_prob(torch.zeros(3))

    def test_a_map_that_is_no_map_of_batches(self):
        with pytest.raises(ShapeError, match=r"keep the dimensions before the event, \(1,\)"):
            pf.Pushforward(NORMAL, lambda t: torch.stack([t.cos(), t.sin()]))
        with pytest.raises(ShapeError, match="got tuple"):
            pf.Pushforward(NORMAL, lambda t: (t, t))
        changing = pf.Pushforward(
            NORMAL, lambda t: t[..., None].expand(*t.shape, 2 if t.numel() == 1 else 3)
        )
        with pytest.raises(ShapeError, match=r"expected to keep the batch.*\(4, 2\).*got \(4, 3\)"):
            changing.sample((4,))

    def test_values(self):
        law = pf.Pushforward(Normal(torch.zeros(3), 1.0), helix)
        with pytest.raises(ShapeError, match=r"expects a tensor \(\.\.\., \*\(3,\)\), got \(2,\)"):
            law.log_prob(torch.zeros(2))
        with pytest.raises(ShapeError, match="got list"):
            law.log_prob([1.0])
        with pytest.raises(ShapeError, match=r"broadcasts with batch_shape \(3,\)"):
            law.log_prob(torch.zeros(2, 3))
        with pytest.raises(InputError, match="finite values, got NaN or infinity"):
            law.log_prob(torch.full((3,), torch.nan))

    def test_no_solution(self):
        law = pf.Pushforward(NORMAL, torch.tanh)
        with pytest.raises(ConvergenceError, match="numerical inverse of tanh"):
            law.log_prob(torch.tensor(2.0, dtype=torch.float64))

    def test_an_inverse_that_is_not_one(self):
        law = pf.Pushforward(NORMAL, torch.sinh, torch.atan)
        with pytest.raises(InputError, match="inverse expects to undo f"):
            law.log_prob(torch.tensor(2.0, dtype=torch.float64))
