"""`EquilibriumPenalty` against dense Jacobians, and what it leaves alone."""

import math

import pytest
import torch
from torch import Tensor, nn

from pushforward.errors import CouplingError, GraphError, InputError, ShapeError
from pushforward.implicit import fixed_point
from pushforward.regularizers.equilibrium import EquilibriumPenalty

B, D = 4, 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Layer(nn.Module):
    """z -> tanh(W z + x)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(D, D) * 0.5 / D**0.5)
        self.x = nn.Parameter(normal(B, D, seed=1))

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.T + self.x)


def exactly(layer: Layer, z: Tensor) -> Tensor:
    """||diag(1 - tanh^2) W||_F^2 / d, averaged over the batch."""
    slopes = 1 - layer(z) ** 2
    return (slopes[..., None] * layer.weight).square().sum() / (B * D)


def gradients(value: Tensor, layer: Layer) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(layer.parameters()), retain_graph=True))


def assert_close(ours: list[Tensor], theirs: list[Tensor], atol: float = 1e-12) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("projections", [D, "exact"])
@pytest.mark.parametrize("form", ["map", "pair"])
def test_all_directions_give_the_exact_value_and_gradient(projections, form: str):
    layer, z = Layer(), normal(B, D, seed=2)
    penalty = EquilibriumPenalty(projections)
    if form == "map":
        value = penalty(layer, z)
    else:
        point = z.clone().requires_grad_()
        value = penalty(point, layer(point))
    torch.testing.assert_close(value, exactly(layer, z))
    assert value.shape == ()
    assert_close(gradients(value, layer), gradients(exactly(layer, z), layer))


@pytest.mark.parametrize("projections", [1, 3])
def test_the_mean_over_directions_is_exact(projections: int):
    layer, z = Layer(), normal(B, D, seed=2)
    penalty = EquilibriumPenalty(projections, seed=0)
    draws = torch.stack([penalty(layer, z).detach() for _ in range(400)])
    error = draws.std() / math.sqrt(len(draws))
    assert (draws.mean() - exactly(layer, z)).abs() < 4 * error
    assert error < 0.04 * draws.mean()


def test_what_samples_send_to_each_other_counts_too():
    """Of a batch whose samples are coupled, the Jacobian of the whole is penalised."""
    mixing = normal(B, B) * 0.3
    penalty = EquilibriumPenalty(2, seed=0)
    draws = torch.stack([penalty(lambda z: mixing @ z, normal(B, D)) for _ in range(400)])
    truth = mixing.square().sum() * D / (B * D)
    assert (draws.mean() - truth).abs() < 4 * draws.std() / math.sqrt(len(draws))
    with pytest.raises(CouplingError, match="independent samples"):
        EquilibriumPenalty("exact")(lambda z: mixing @ z, normal(B, D))


@pytest.mark.parametrize("form", ["map", "pair"])
def test_z_is_held_fixed(form: str):
    """The gradient is that of ||J(z, w)||^2 by w alone, though z depends on w as well."""
    layer = Layer()
    z = fixed_point(layer, torch.zeros(B, D, dtype=torch.float64), rtol=1e-13).z
    penalty = EquilibriumPenalty(D)
    value = penalty(layer, z) if form == "map" else penalty(z, layer(z))
    assert_close(gradients(value, layer), gradients(exactly(layer, z.detach()), layer))
    moving = gradients(exactly(layer, z), layer)
    assert (moving[1] - gradients(exactly(layer, z.detach()), layer)[1]).abs().max() > 1e-4


def test_a_leaf_gets_no_gradient_from_the_pair():
    layer, z = Layer(), normal(B, D, seed=2).requires_grad_()
    EquilibriumPenalty(seed=0)(z, layer(z)).backward()
    assert z.grad.abs().max() < 1e-15
    assert layer.weight.grad.abs().max() > 1e-4
    other = normal(B, D, seed=2).requires_grad_()
    EquilibriumPenalty(seed=0)(layer, other).backward()
    assert other.grad is None


def test_states_of_any_shape():
    conv = nn.Conv2d(2, 2, 3, padding=1).double()
    z = normal(3, 2, 4, 4)
    J = torch.func.jacrev(conv)(z[0]).reshape(32, 32)
    value = EquilibriumPenalty(32)(conv, z)
    torch.testing.assert_close(value, J.square().sum() / 32)
    torch.testing.assert_close(EquilibriumPenalty("exact")(conv, z), J.square().sum() / 32)


def test_probability_skips_calls_and_scales_nothing_up():
    layer, z = Layer(), normal(B, D, seed=2)
    evaluations = []

    def f(z: Tensor) -> Tensor:
        evaluations.append(1)
        return layer(z)

    penalty = EquilibriumPenalty(D, probability=0.3, seed=0)
    values = torch.stack([penalty(f, z).detach() for _ in range(400)])
    counted = values != 0
    assert len(evaluations) == counted.sum()
    assert 0.2 < counted.double().mean() < 0.4
    torch.testing.assert_close(values[counted], exactly(layer, z).detach().expand(counted.sum()))
    assert EquilibriumPenalty(probability=0.0)(f, z) == 0
    point = z.clone().requires_grad_()
    assert EquilibriumPenalty(probability=0)(point, layer(point)) == 0


def test_schedule_gives_the_weight_of_each_step():
    layer, z = Layer(), normal(B, D, seed=2)
    steps = []

    def schedule(step: int) -> float:
        steps.append(step)
        return 0.1 * step

    penalty = EquilibriumPenalty(D, schedule=schedule)
    values = torch.stack([penalty(layer, z).detach() for _ in range(4)])
    assert steps == [0, 1, 2, 3]
    torch.testing.assert_close(values, exactly(layer, z).detach() * 0.1 * torch.arange(4).double())
    again = EquilibriumPenalty(D, schedule=schedule)
    again.load_state_dict(penalty.state_dict())
    again(layer, z)
    assert steps[-1] == 4


def test_random_numbers():
    layer, z = Layer(), normal(B, D, seed=2)
    penalty = EquilibriumPenalty(probability=0.7)
    torch.manual_seed(0)
    first = [penalty(layer, z).item() for _ in range(5)]
    torch.manual_seed(0)
    assert first == [penalty(layer, z).item() for _ in range(5)]
    assert len(set(first)) > 2
    seeded = [EquilibriumPenalty(seed=3)(layer, z).item() for _ in range(2)]
    assert seeded[0] == seeded[1]
    generator = torch.Generator().manual_seed(3)
    state = torch.get_rng_state()
    drawn = EquilibriumPenalty(probability=0.5, generator=generator)
    assert len({drawn(layer, z).item() for _ in range(6)}) > 1
    assert drawn(layer, z, seed=5) == drawn(layer, z, seed=5)
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_of_the_map_stays_visible():
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Dropout(0.5)).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    value = EquilibriumPenalty(seed=0)(model, normal(B, D))
    assert value > 0
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(CouplingError, match="batch norm in training mode"):
        EquilibriumPenalty("exact")(model, normal(B, D))


def test_a_constant_map_has_no_penalty():
    assert EquilibriumPenalty()(lambda z: torch.ones_like(z), normal(B, D)) == 0


def test_under_no_grad_it_is_a_measurement():
    layer, z = Layer(), normal(B, D, seed=2)
    with torch.no_grad():
        value = EquilibriumPenalty(D)(layer, z)
    assert not value.requires_grad
    torch.testing.assert_close(value, exactly(layer, z).detach())
    point = z.clone().requires_grad_()
    plain = EquilibriumPenalty(D)(point, 0.5 * point)  # nothing in it to train
    torch.testing.assert_close(plain.item(), 0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"projections": 0}, "projections expects a whole number of at least 1"),
        ({"probability": 1.5}, "probability expects a number between 0 and 1, got 1.5"),
        ({"schedule": 0.1}, "schedule expects a function from the step to a weight, got 0.1"),
        ({"seed": 1, "generator": torch.Generator()}, "expected seed= or generator=, got both"),
    ],
)
def test_arguments_out_of_range(arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        EquilibriumPenalty(**arguments)


def test_what_cannot_be_penalised():
    z = normal(B, D)
    with pytest.raises(ShapeError, match=r"a state like z, \(4, 6\), got \(4, 3\)"):
        EquilibriumPenalty()(nn.Linear(D, 3).double(), z)
    with pytest.raises(GraphError, match="require gradients"):
        EquilibriumPenalty()(z, z.sin())
    with pytest.raises(InputError, match="at most the number of outputs, 6, got 7"):
        EquilibriumPenalty(7)(torch.sin, z)
    with pytest.raises(InputError, match="finite number, got nan at step 0"):
        EquilibriumPenalty(schedule=lambda step: math.nan)(torch.sin, z)
    with pytest.raises(InputError, match="one tensor, got int"):
        EquilibriumPenalty(probability=0.0)(torch.sin, 3)
    with pytest.raises(InputError, match="one tensor, got list"):
        EquilibriumPenalty()(torch.sin, [z])


def test_it_names_itself():
    assert repr(EquilibriumPenalty(2, 0.5)) == "EquilibriumPenalty(projections=2, probability=0.5)"


def test_training_with_it_makes_the_map_contract():
    """The point of it all: a map whose iteration runs away ends with a radius below one."""
    layer = Layer()
    with torch.no_grad():
        layer.weight.mul_(6)
    z = normal(B, D, seed=2)
    penalty = EquilibriumPenalty(seed=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    before = exactly(layer, z).item()
    for _ in range(50):
        optimizer.zero_grad()
        penalty(layer, z).backward()
        optimizer.step()
    assert exactly(layer, z).item() < before / 5
