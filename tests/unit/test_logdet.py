"""value_and_logabsdet, and the check of log-determinants written by hand."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import transforms

import pushforward as pf
from pushforward.errors import CouplingError, DimensionError, InputError, LogDetError, ShapeError


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Coupling(nn.Module):
    """An affine coupling with its log-determinant written by hand, rightly or wrongly."""

    def __init__(self, mistake=None):
        super().__init__()
        self.net = nn.Linear(1, 2).double()
        self.mistake = mistake

    def forward(self, x):
        first, rest = x[:, :1], x[:, 1:]
        scale = torch.tanh(self.net(first))
        y = torch.cat([first, rest * scale.exp()], 1)
        logabsdet = {
            None: scale.sum(-1),
            "sign": -scale.sum(-1),
            "sum": torch.cat([torch.zeros_like(first), scale], 1),
            "half": scale[:, 0],
            "nan": scale.sum(-1) * torch.nan,
            "one point": scale.sum(-1) + (x[:, 0] == 0.5),
        }[self.mistake]
        return y, logabsdet


class TestValueAndLogabsdet:
    def test_batches(self):
        A = random(3, 3)
        x = random(5, 3, seed=1)
        y, logabsdet = pf.value_and_logabsdet(lambda x: (x @ A.T).sinh(), x)
        torch.testing.assert_close(y, (x @ A.T).sinh())
        expected = torch.linalg.slogdet(A).logabsdet + (x @ A.T).cosh().log().sum(-1)
        torch.testing.assert_close(logabsdet, expected)

    def test_one_map(self):
        x = random(2, 3)
        y, logabsdet = pf.value_and_logabsdet(torch.exp, x, batch_dim=None)
        assert y.shape == (2, 3)
        torch.testing.assert_close(logabsdet, x.sum())

    def test_pytrees(self):
        x = {"a": random(4, 2), "b": random(4, seed=1)}
        y, logabsdet = pf.value_and_logabsdet(lambda x: (3 * x["a"], x["b"].exp()), x)
        torch.testing.assert_close(y[0], 3 * x["a"])
        torch.testing.assert_close(logabsdet, 2 * math.log(3) + x["b"])

    def test_singular_samples_are_minus_infinity(self):
        x = torch.tensor([[1.0, 2.0], [0.0, 1.0]], requires_grad=True)
        _, logabsdet = pf.value_and_logabsdet(lambda x: x**2, x)
        assert logabsdet[1] == -math.inf
        (gradient,) = torch.autograd.grad(logabsdet[0], x)
        torch.testing.assert_close(gradient, torch.tensor([[1.0, 0.5], [0.0, 0.0]]))

    def test_trains(self):
        A = random(3, 3).requires_grad_()
        x = random(5, 3, seed=1).requires_grad_()
        _, logabsdet = pf.value_and_logabsdet(lambda x: (x @ A.T).sinh(), x)
        expected = torch.linalg.slogdet(A).logabsdet + (x @ A.T).cosh().log().sum(-1)
        got = torch.autograd.grad(logabsdet.sum(), [x, A])
        want = torch.autograd.grad(expected.sum(), [x, A])
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)

    def test_dimensions(self):
        with pytest.raises(DimensionError, match=r"keeps the dimension, got R\^3 to R\^2.*logvol"):
            pf.value_and_logabsdet(lambda x: x[:, :2], random(4, 3))


class TestRightOnes:
    @pytest.mark.parametrize(
        ("transform", "shape"),
        [
            (transforms.AffineTransform(1.0, -2.0), (4, 3)),
            (transforms.AffineTransform(1.0, 2.0, event_dim=1), (4, 3)),
            (transforms.ExpTransform(), (4, 3)),
            (transforms.SigmoidTransform(), (2, 4, 3)),
            (transforms.TanhTransform(cache_size=1), ()),
            (transforms.SoftplusTransform(), (4,)),
            (transforms.ReshapeTransform((6,), (2, 3)), (4, 6)),
            (transforms.IndependentTransform(transforms.ExpTransform(), 2), (4, 2, 3)),
            (transforms.ExpTransform().inv, (3,)),
        ],
        ids=repr,
    )
    def test_those_of_torch(self, transform, shape):
        assert pf.logdetcheck(transform, random(*shape).abs() + 0.1) < 1e-12

    def test_a_callable(self):
        assert pf.logdetcheck(Coupling(), random(6, 3)) < 1e-12

    def test_our_own(self):
        transform = pf.AutoTransform(lambda x: x.sinh() + x.flip(-1))
        assert pf.logdetcheck(transform, random(6, 3)) == 0.0

    def test_float32(self):
        assert 0 < pf.logdetcheck(transforms.TanhTransform(), random(5, 3).float()) < 1e-4

    def test_both_infinite_is_no_error(self):
        def flat(x):
            return 0 * x, torch.full(x.shape[:1], -math.inf)

        assert pf.logdetcheck(flat, random(4, 2)) == 0.0

    def test_an_empty_batch(self):
        assert pf.logdetcheck(Coupling(), random(0, 3)) == 0.0

    def test_nothing_is_left_behind(self):
        x = random(6, 3).requires_grad_()
        module = Coupling()
        state = torch.get_rng_state()
        pf.logdetcheck(module, x)
        assert torch.equal(torch.get_rng_state(), state)
        assert x.grad is None
        assert module.net.weight.grad is None


class TestWrongOnes:
    @pytest.mark.parametrize("mistake", ["sign", "half", "nan"])
    def test_wrong_values(self, mistake):
        with pytest.raises(LogDetError, match=r"Coupling expects log\|det J\| = .* 6 of 6 points"):
            pf.logdetcheck(Coupling(mistake), random(6, 3))

    def test_the_sign_is_recognised(self):
        with pytest.raises(LogDetError, match="it is that of the inverse: change its sign"):
            pf.logdetcheck(Coupling("sign"), random(6, 3))

    def test_the_worst_point_is_named(self):
        x = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.5, 0.25, -8.0]])
        expected = (
            r"off by 1, at index \(3,\) with x = \(0\.5, 0\.25, -8\); 1 of 4 points are wrong"
        )
        with pytest.raises(LogDetError, match=expected):
            pf.logdetcheck(Coupling("one point"), x.double())

    def test_a_missing_sum(self):
        with pytest.raises(
            ShapeError, match=r"shape \(6,\).*got \(6, 3\).*the sum over the last 1"
        ):
            pf.logdetcheck(Coupling("sum"), random(6, 3))

    def test_another_wrong_shape(self):
        def transform(x):
            return x, torch.zeros(())

        with pytest.raises(
            ShapeError, match=r"got \(\); one number for each event of shape \(3,\)"
        ):
            pf.logdetcheck(transform, random(6, 3))

    def test_a_transform_with_the_sum_missing(self):
        class Unsummed(transforms.ExpTransform):
            domain = transforms.constraints.real_vector
            codomain = transforms.constraints.positive

        with pytest.raises(ShapeError, match="the sum over the last 1 dimensions is missing"):
            pf.logdetcheck(Unsummed(), random(6, 3))

    def test_tolerances(self):
        def sloppy(x):
            return 2 * x, torch.full(x.shape[:1], 3 * math.log(2) + 1e-3, dtype=x.dtype)

        x = random(4, 3)
        with pytest.raises(LogDetError, match=r"off by 0\.001"):
            pf.logdetcheck(sloppy, x)
        assert abs(pf.logdetcheck(sloppy, x, atol=1e-2) - 1e-3) < 1e-9
        assert abs(pf.logdetcheck(sloppy, x, rtol=1e-2, atol=0.0) - 1e-3) < 1e-9

    def test_long_points_are_shortened(self):
        def wrong(x):
            return x, torch.ones(x.shape[0])

        with pytest.raises(LogDetError, match=r", \.\.\.\); 2 of 2"):
            pf.logdetcheck(wrong, random(2, 20))

    def test_events_that_influence_each_other(self):
        class Mixing(transforms.ExpTransform):
            def _call(self, x):
                return x + x.softmax(-1)

        with pytest.raises(CouplingError, match="Mixing expects to act on each event"):
            pf.logdetcheck(Mixing(), random(3))


class TestErrors:
    def test_dimensions(self):
        with pytest.raises(DimensionError, match=r"from \(3,\) to \(4,\); there is no determinant"):
            pf.logdetcheck(transforms.StickBreakingTransform(), random(5, 3))

    def test_arguments(self):
        with pytest.raises(InputError, match="expects a transform or a callable, got int"):
            pf.logdetcheck(3, random(3))
        with pytest.raises(InputError, match="expects a floating point tensor x, got list"):
            pf.logdetcheck(Coupling(), [1.0])
        with pytest.raises(InputError, match=r"tensor x, got torch\.int64"):
            pf.logdetcheck(Coupling(), torch.ones(2, 3, dtype=torch.int64))

    @pytest.mark.parametrize("result", [None, (1, 2), (torch.ones(2),)])
    def test_what_a_callable_returns(self, result):
        with pytest.raises(InputError, match=r"pair of tensors \(y, logabsdet\), got "):
            pf.logdetcheck(lambda x: result, random(2, 3))

    def test_too_few_dimensions(self):
        with pytest.raises(ShapeError, match="events of 2 dimensions"):
            pf.logdetcheck(pf.AutoTransform(torch.sinh, event_dim=2), random(3))
