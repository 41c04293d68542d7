"""ContractivePenalty and TiedAutoencoder against plain autograd in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pushforward as pf
from pushforward.regularizers import ContractivePenalty, TiedAutoencoder
from pushforward.regularizers.onelayer import OneLayer
from pushforward.regularizers.pair import Pair
from pushforward.regularizers.randomness import directions, source_of


def linear(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A linear layer and an activation that are functions, not modules."""
    torch.manual_seed(1)
    weight, bias = torch.randn(5, 4).double().requires_grad_(), torch.randn(5).double()
    return lambda x: activation(F.linear(x, weight, bias))


def modules(*layers: nn.Module) -> Callable[[Tensor], Tensor]:
    return nn.Sequential(*layers).double()


# Encoders with a closed form, and the shape of a sample.
CLOSED: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], tuple[int, ...]]] = {
    "sigmoid": (lambda: modules(nn.Linear(4, 5), nn.Sigmoid()), (4,)),
    "tanh": (lambda: modules(nn.Linear(4, 5), nn.Tanh()), (4,)),
    "relu in place": (lambda: modules(nn.Linear(4, 5), nn.ReLU(inplace=True)), (4,)),
    "softplus": (lambda: modules(nn.Linear(4, 5), nn.Softplus()), (4,)),
    "no activation": (lambda: modules(nn.Linear(4, 5)), (4,)),
    "no bias": (lambda: modules(nn.Linear(4, 5, bias=False), nn.Tanh()), (4,)),
    "learned slope": (lambda: modules(nn.Linear(4, 5), nn.PReLU(5)), (4,)),
    "two paths": (lambda: modules(nn.Linear(4, 5), nn.Softsign()), (4,)),
    "a function": (lambda: linear(torch.tanh), (4,)),
    "written out": (lambda: linear(lambda a: a * torch.sigmoid(a) + a**2 / 3), (4,)),
    "images": (lambda: modules(nn.Flatten(), nn.Linear(6, 5), nn.Sigmoid()), (2, 3)),
    "tokens": (lambda: modules(nn.Linear(3, 5), nn.Sigmoid()), (2, 3)),
    "unflattened": (lambda: modules(nn.Linear(4, 6), nn.Tanh(), nn.Unflatten(1, (2, 3))), (4,)),
    "convolution": (
        lambda: modules(nn.Conv2d(2, 3, (2, 3), (2, 1), (1, 2), (1, 2)), nn.Tanh()),
        (2, 4, 5),
    ),
    "groups": (lambda: modules(nn.Conv1d(4, 6, 2, groups=2), nn.Sigmoid()), (4, 3)),
    "transposed": (lambda: modules(nn.ConvTranspose1d(2, 3, 3, 2, 1), nn.Sigmoid()), (2, 3)),
}
OTHERS: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], tuple[int, ...]]] = {
    "two layers": (
        lambda: modules(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Sigmoid()),
        (4,),
    ),
    "softmax": (lambda: modules(nn.Linear(4, 5), nn.Softmax(1)), (4,)),
    "a sum": (lambda: linear(lambda a: a - a.sum(1, keepdim=True)), (4,)),
    "spread": (lambda: linear(lambda a: a[:, :1].tanh() + a.new_zeros(3)), (4,)),
    "one number spread": (
        lambda: modules(nn.Linear(4, 1), Spread()),
        (4,),
    ),
    "transposed codes": (lambda: linear(lambda a: a + a.unflatten(1, (5, 1)).mT[:, 0]), (4,)),
    "an image padded by its border": (
        lambda: modules(nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), nn.Tanh()),
        (2, 4),
    ),
    "nonlinear first": (lambda: lambda x: torch.tanh(x.sin() @ torch.eye(4).double()), (4,)),
}


class Spread(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return torch.tanh(a) * torch.tensor([1.0, 2.0, 3.0], dtype=a.dtype)


def encoder(name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    make, shape = (CLOSED | OTHERS)[name]
    torch.manual_seed(0)
    f = make()
    return f, torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)


def rows(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Per sample, (B, C, n), one output at a time, with a graph."""
    return torch.stack(
        [
            torch.stack(
                [
                    torch.autograd.grad(out, x, create_graph=True, materialize_grads=True)[0][b]
                    for out in f(x)[b].reshape(-1)
                ]
            ).flatten(1)
            for b in range(len(x))
        ]
    )


def gradients(value: Tensor, f: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    wanted = [*(f.parameters() if isinstance(f, nn.Module) else ()), x]
    how = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    return list(torch.autograd.grad(value, wanted, **how)) if value.requires_grad else []


def assert_same(value: Tensor, expected: Tensor, f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    pairs = zip(gradients(value, f, x), gradients(expected, f, x), strict=True)
    for came, wanted in pairs:
        torch.testing.assert_close(came, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [*CLOSED, *OTHERS])
def test_values_and_gradients(name: str):
    f, x = encoder(name)
    expected = rows(f, x).square().sum() / 3
    assert_same(ContractivePenalty()(f, x), expected, f, x)
    assert_same(ContractivePenalty()(x, f(x)), expected, f, x)


@pytest.mark.parametrize("name", CLOSED)
def test_what_has_a_closed_form(name: str):
    f, x = encoder(name)
    assert OneLayer.of(Pair.given(x, f(x))) is not None


@pytest.mark.parametrize("name", OTHERS)
def test_what_has_none(name: str):
    f, x = encoder(name)
    assert OneLayer.of(Pair.given(x, f(x))) is None


@pytest.mark.parametrize("name", ["sigmoid", "convolution", "two layers"])
def test_the_second_term(name: str):
    f, x = encoder(name)
    source = source_of(5, None)
    source.state()
    noise = [0.3 * source.normal(tuple(x.shape), x) for _ in range(2)]
    distances = [(rows(f, x) - rows(f, x + e)).square().sum() / 3 for e in noise]
    expected = rows(f, x).square().sum() / 3 + 0.7 * torch.stack(distances).mean()
    penalty = ContractivePenalty(0.3, hessian_weight=0.7, corruptions=2, seed=5)
    assert_same(penalty(f, x), expected, f, x)


def test_the_second_term_tends_to_the_squared_hessian():
    f, x = encoder("tanh")
    sigma = 1e-3
    penalty = ContractivePenalty(sigma, corruptions=400, seed=0)
    second = (penalty(f, x) - ContractivePenalty()(f, x)).item() / sigma**2
    hessians = [
        torch.autograd.functional.hessian(lambda x, j=j, b=b: f(x[None])[0, j], x[b])
        for b in range(3)
        for j in range(5)
    ]
    expected = torch.stack(hessians).square().sum().item() / 3
    assert second == pytest.approx(expected, rel=0.1)


def test_random_projections():
    f, x = encoder("two layers")
    expected = rows(f, x).square().sum().item() / 3
    penalty = ContractivePenalty(projections=1, seed=0)
    draws = torch.stack([penalty(f, x).detach() for _ in range(200)])
    assert abs(draws.mean() - expected) < 4 * draws.std() / math.sqrt(200)


def test_as_many_projections_as_outputs_leave_nothing_out():
    f, x = encoder("two layers")
    source = source_of(3, None)
    source.state()
    directions(3, f(x), source)
    noise = 0.2 * source.normal(tuple(x.shape), x)
    expected = (rows(f, x).square() + (rows(f, x) - rows(f, x + noise)).square()).sum() / 3
    assert_same(ContractivePenalty(0.2, projections=3, seed=3)(f, x), expected, f, x)


def test_dropout_is_the_same_at_both_points():
    model = nn.Sequential(nn.Linear(4, 60), nn.Dropout()).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    second = ContractivePenalty(0.5, seed=0)(model, x) - ContractivePenalty(seed=0)(model, x)
    assert abs(second.item()) < 1e-12  # J is W times the mask, whatever the point


def test_batch_norm_in_training_mode_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Sigmoid())
    with pytest.raises(pf.errors.CouplingError, match=r"batch norm in training mode \(1\)"):
        ContractivePenalty()(model, torch.randn(3, 4))
    assert ContractivePenalty()(model.eval(), torch.randn(3, 4)) > 0


def test_a_tied_autoencoder():
    torch.manual_seed(0)
    model = TiedAutoencoder(6, 4, output=torch.sigmoid).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    h = torch.sigmoid(x @ model.weight.t() + model.encoder.bias)
    torch.testing.assert_close(model.encode(x), h)
    torch.testing.assert_close(model(x), torch.sigmoid(h @ model.weight + model.bias))
    by_hand = ((h * (1 - h)).square() @ model.weight.square().sum(1)).mean()
    torch.testing.assert_close(ContractivePenalty()(model.encode, x), by_hand)
    assert {name for name, _ in model.named_parameters()} == {
        "encoder.weight",
        "encoder.bias",
        "bias",
    }
    logits = TiedAutoencoder(6, 4)
    torch.testing.assert_close(logits(x.float()), logits.decode(logits.encode(x.float())))


def test_training_contracts():
    torch.manual_seed(0)
    x, penalty = torch.rand(64, 12), ContractivePenalty()

    def trained(weight: float) -> tuple[float, float]:
        torch.manual_seed(0)
        model = TiedAutoencoder(12, 8)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            fit = F.binary_cross_entropy_with_logits(model(x), x)
            (fit + weight * penalty(model.encode, x)).backward()
            optimizer.step()
        return fit.item(), penalty(model.encode, x).item()

    free, bound = trained(0.0), trained(0.02)
    assert bound[1] < free[1] / 1.3
    assert bound[0] < free[0] + 0.1


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "noise of 0": (lambda: ContractivePenalty(0.0), "hessian_noise expects a positive finite"),
    "no number": (lambda: ContractivePenalty("much"), "got 'much'"),
    "corruptions": (lambda: ContractivePenalty(0.1, corruptions=0), "corruptions expects"),
    "projections": (lambda: ContractivePenalty(projections=-1), "projections expects"),
    "noise on a pair": (
        lambda: ContractivePenalty(0.1)(torch.zeros(1), torch.zeros(1)),
        r"hessian_noise expects penalty\(encoder, x\)",
    ),
    "tuple": (
        lambda: ContractivePenalty()(lambda x: (x,), torch.randn(2, 4)),
        "one output tensor, got a tuple",
    ),
    "inputs": (lambda: TiedAutoencoder(0, 3), "inputs expects a whole number"),
    "units": (lambda: TiedAutoencoder(3, 1.5), "units expects a whole number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str):
    call, message = REFUSED[case]
    with pytest.raises(pf.errors.InputError, match=message):
        call()


def test_it_says_what_it_is():
    text = repr(ContractivePenalty(0.1))
    assert text == "ContractivePenalty(hessian_noise=0.1, projections='exact')"
