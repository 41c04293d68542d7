"""JacobianPenalty against plain autograd, one output at a time, in float64."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import pushforward as pf
from pushforward.regularizers import ContractivePenalty, EquilibriumPenalty, JacobianPenalty
from pushforward.regularizers.graph import Affine, Between, Convolution, first_layer
from pushforward.regularizers.kinks import Evaluated
from pushforward.regularizers.products import (
    pulled_by_taps,
    squared_norm_of_product,
    squared_norm_of_transposed,
)
from pushforward.regularizers.randomness import directions, source_of


class Attending(nn.Module):
    """Layer norm, attention and GELU on (B, 4, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.head(F.gelu(x + self.mix(h, h, h, need_weights=False)[0]).mean(1))


class Twice(nn.Module):
    """Uses its input in two places, so that no single layer comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).tanh() * self.b(x).relu()


class Distances(nn.Module):
    """An op that torch cannot differentiate twice."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.centres)


def images() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2)), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.ReLU(inplace=True), nn.Flatten()),
        nn.LazyLinear(3),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tanh": (lambda: nn.Sequential(nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3)), (9,)),
    "wide first layer": (
        lambda: nn.Sequential(nn.Linear(3, 30), nn.Softplus(), nn.Linear(30, 3)),
        (3,),
    ),
    "relu": (
        lambda: nn.Sequential(
            nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)
        ),
        (9,),
    ),
    "no bias, tokens": (
        lambda: nn.Sequential(
            nn.Linear(5, 4, bias=False), nn.SiLU(), nn.Flatten(), nn.Linear(8, 3)
        ),
        (2, 5),
    ),
    "convolutions": (images, (2, 9, 8)),
    "grouped convolution": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)
        ),
        (4, 7),
    ),
    "many channels": (
        lambda: nn.Sequential(nn.Conv1d(6, 3, 2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)),
        (6, 4),
    ),
    "used twice": (Twice, (5,)),
    "attention": (Attending, (4, 6)),
    "evaluated batch norm": (
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)
        ).eval(),
        (4,),
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh()),
        (4,),
    ),
    "images out": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Unflatten(1, (2, 2))),
        (3,),
    ),
    "one output": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), (4,)),
    "a number out": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)),
        (4,),
    ),
}
BATCH = 3


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model, x = make(), torch.randn(BATCH, *shape)
    model(x)  # lazy layers take their sizes
    model = model.double()
    return model, x.double().requires_grad_()


def entries(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """All of d y_b / d x_c as (B C, B n), row by row, with a graph."""
    y = f(x)
    rows = [
        torch.autograd.grad(out, x, create_graph=True, materialize_grads=True)[0].reshape(-1)
        for out in y.reshape(-1)
    ]
    return torch.stack(rows)


def oracle(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return entries(f, x).square().sum() / (2 * len(x))


def gradients(value: Tensor, model: nn.Module, x: Tensor) -> list[Tensor]:
    wanted = [*model.parameters(), x]
    how = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    return list(torch.autograd.grad(value, wanted, **how))


def assert_same(value: Tensor, expected: Tensor, model: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    pairs = zip(gradients(value, model, x), gradients(expected, model, x), strict=True)
    for came, wanted in pairs:
        torch.testing.assert_close(came, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("all_of_them", ["exact", "as many as outputs"])
def test_exact_values_and_gradients_of_both_forms(name: str, all_of_them: str):
    model, x = network(name)
    with sdpa_kernel(SDPBackend.MATH):  # the only one that can be differentiated twice
        expected, y = oracle(model, x), model(x)
    penalty = JacobianPenalty("exact" if all_of_them == "exact" else y[0].numel())
    assert_same(penalty(model, x), expected, model, x)
    assert_same(penalty(x, y), expected, model, x)


@pytest.mark.parametrize("name", ["tanh", "convolutions", "many channels"])
def test_one_projection_is_that_of_the_direction_drawn(name: str):
    model, x = network(name)
    y = model(x)
    penalty = JacobianPenalty(seed=5)
    (u,) = directions(1, y, source_of(5, None))
    (row,) = torch.autograd.grad(y, x, u * math.sqrt(y.shape[1]), create_graph=True)
    assert_same(penalty(x, y), row.square().sum() / (2 * len(x)), model, x)


def test_projections_are_unbiased():
    model, x = network("relu")
    expected, y = oracle(model, x).item(), model(x)
    for k in (1, 2):
        penalty = JacobianPenalty(k, seed=0)
        draws = torch.stack([penalty(x, y).detach() for _ in range(250)])
        error = draws.std() / math.sqrt(len(draws))
        assert abs(draws.mean() - expected) < 4 * error
        assert error < expected / 20


@pytest.mark.parametrize("count", [1, 2, 4])
def test_directions_are_orthonormal_and_uniform(count: int):
    u = directions(count, torch.zeros(4000, 4, dtype=torch.float64), source_of(0, None))
    gram = torch.einsum("ibc,jbc->bij", u, u)
    torch.testing.assert_close(gram, torch.eye(count).double().expand_as(gram))
    second = torch.einsum("kbc,kbd->cd", u, u) / (4000 * count)
    torch.testing.assert_close(second, torch.eye(4).double() / 4, atol=0.02, rtol=0)
    assert u.mean(dim=(0, 1)).abs().amax() < 0.04


def test_half_precision_draws_in_single():
    u = directions(2, torch.zeros(5, 3, dtype=torch.bfloat16), source_of(0, None))
    assert u.dtype == torch.bfloat16
    assert (u.float().norm(dim=-1) - 1).abs().amax() < 0.02


@pytest.mark.parametrize("name", ["tanh", "images out"])
def test_probabilities(name: str):
    model, x = network(name)
    expected = oracle(lambda x: model(x).softmax(1), x)
    penalty = JacobianPenalty("exact", of="probabilities")
    assert_same(penalty(model, x), expected, model, x)
    assert_same(penalty(x, model(x)), expected, model, x)


@pytest.mark.parametrize("of", ["logits", "probabilities"])
def test_more_outputs_than_inputs_go_by_a_plan(of: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 9), nn.Sigmoid()).double()
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    expected = oracle((lambda x: model(x).softmax(1)) if of == "probabilities" else model, x)
    assert_same(JacobianPenalty("exact", of=of)(model, x), expected, model, x)
    coupled = nn.Sequential(nn.Linear(2, 9), nn.BatchNorm1d(9)).double()
    with pytest.raises(pf.errors.CouplingError, match=r"batch norm in training mode \(1\)"):
        JacobianPenalty("exact")(coupled, x)


def test_many_outputs_without_structure_go_row_by_row():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(140, 4), nn.Tanh(), nn.Linear(4, 130)).double()
    x = torch.randn(2, 140, dtype=torch.float64, requires_grad=True)
    assert_same(JacobianPenalty("exact")(model, x), oracle(model, x), model, x)


def test_an_op_without_a_second_derivative():
    torch.manual_seed(0)
    model, x = Distances().double(), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    expected = oracle(lambda x: (x[:, None] - model.centres).norm(dim=-1), x)
    assert_same(JacobianPenalty("exact")(model, x), expected, model, x)
    with pytest.raises(pf.errors.DifferentiationError, match="got cdist between x and y"):
        JacobianPenalty()(x, model(x))


def test_fused_attention_is_refused_in_a_pair():
    x = torch.randn(2, 4, 6, requires_grad=True)
    y = F.scaled_dot_product_attention(*(x.unsqueeze(1),) * 3)
    if "flash" not in str(type(y.grad_fn)).lower():
        pytest.skip("torch chose another kernel")
    with pytest.raises(pf.errors.DifferentiationError, match="flash_attention"):
        JacobianPenalty()(x, y)


def test_compiled_models_run_uncompiled():
    model, x = network("tanh")
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(JacobianPenalty("exact")(compiled, x), oracle(model, x))


def test_second_derivatives_of_the_penalty():
    model, x = network("tanh")
    weight = model[0].weight

    def curvature(value: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(value, weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    torch.testing.assert_close(
        curvature(JacobianPenalty("exact")(model, x)), curvature(oracle(model, x))
    )


@pytest.mark.parametrize("shapes", [((30, 4), (4, 9)), ((2, 4), (4, 9))], ids=["gram", "product"])
def test_norms_of_products(shapes: tuple):
    torch.manual_seed(0)
    A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    torch.testing.assert_close(squared_norm_of_product(A, B), (A @ B).square().sum())
    assert torch.autograd.gradcheck(squared_norm_of_product, (A, B))
    assert torch.autograd.gradgradcheck(squared_norm_of_product, (A, B))


def test_norms_through_convolutions():
    torch.manual_seed(0)
    weight = torch.randn(4, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, weight, None, (2, 1), (1, 0), (1, 2), groups=2)
    layer = first_layer(Between.of(y, x), 2)
    assert isinstance(layer, Convolution)
    u = torch.randn_like(y).requires_grad_()
    (expected,) = torch.autograd.grad(y, x, u, create_graph=True)
    pulled = pulled_by_taps(u, weight, layer.input_shape[1:], *layer.arguments)
    torch.testing.assert_close(pulled, expected)

    def norm(u: Tensor, weight: Tensor) -> Tensor:
        y = F.conv2d(x, weight, None, (2, 1), (1, 0), (1, 2), groups=2)
        return squared_norm_of_transposed(u, first_layer(Between.of(y, x), 2))

    assert torch.autograd.gradcheck(norm, (u, weight))
    assert torch.autograd.gradgradcheck(norm, (u, weight))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_products_compute_no_gradient_that_nobody_wants(wanted: tuple[bool, bool]):
    A, B = torch.randn(30, 4), torch.randn(4, 9)
    operands = [t.requires_grad_(needs) for t, needs in zip((A, B), wanted, strict=True)]
    (gradient,) = torch.autograd.grad(
        squared_norm_of_product(A, B), [t for t in operands if t.requires_grad]
    )
    by_hand = 2 * A @ B @ B.t() if wanted[0] else 2 * A.t() @ A @ B
    torch.testing.assert_close(gradient, by_hand.detach(), rtol=1e-4, atol=1e-4)


def first_of(f: Callable[[Tensor], Tensor], *shape: int) -> object:
    x = torch.randn(*shape, requires_grad=True)
    return first_layer(Between.of(f(x), x), shape[0])


def test_which_layer_comes_first():
    W, square = torch.randn(4, 5), torch.randn(4, 4)
    assert isinstance(first_of(lambda x: F.linear(x, W).tanh(), 2, 5), Affine)
    assert isinstance(first_of(lambda x: F.linear(x.flatten(1), W).tanh(), 2, 1, 5), Affine)
    assert first_of(lambda x: x.sin() @ W.t(), 2, 5) is None
    assert first_of(lambda x: torch.addmm(W.new_zeros(2, 4), x, W.t(), alpha=2), 2, 5) is None
    assert first_of(lambda x: square @ x, 4, 4) is None  # samples are mixed
    assert first_of(lambda x: x @ x.t(), 4, 4) is None
    assert first_of(lambda x: torch.addmm(x, x, square), 4, 4) is None
    assert first_of(lambda x: F.linear(x.reshape(1, 10), torch.randn(2, 10)), 2, 5) is None
    assert first_of(lambda x: F.conv1d(x.unsqueeze(0), torch.randn(3, 2, 2)), 2, 5) is None
    assert first_of(lambda x: F.conv1d(torch.randn(2, 3, 5), x), 4, 3, 2) is None
    assert first_of(lambda x: x, 2, 5) is None


def test_kinks_are_those_of_torch():
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    maps: list[Callable[[Tensor], Tensor]] = [
        *(F.relu, torch.relu, Tensor.relu, lambda x: F.relu(x * 1, inplace=True), nn.MaxPool2d(2)),
        lambda x: F.max_pool2d(x, (3, 2), stride=(2, 1), padding=1, ceil_mode=True),
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        lambda x: torch.max_pool2d(x, 3, dilation=2),
    ]
    for f in maps:
        ours, theirs = Evaluated(f)(x), f(x)
        assert torch.equal(ours, theirs)
        u = torch.randn_like(ours)
        assert torch.equal(*(torch.autograd.grad(y, x, u)[0] for y in (ours, theirs)))


def test_a_map_that_does_not_depend_on_its_input():
    weight = torch.randn(3, requires_grad=True)
    value = JacobianPenalty()(lambda x: weight.expand(len(x), 3), torch.randn(4, 2))
    assert value == 0


def coupled(*, training: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    return model.train(training), x


@pytest.mark.parametrize("k", [1, 2])
def test_random_projections_of_a_coupled_batch_estimate_the_whole_jacobian(k: int):
    model, x = coupled(training=True)
    expected = oracle(model, x).item()
    per_sample = sum(
        entries(model, x).detach().unflatten(1, (3, 4)).unflatten(0, (3, 2))[b, :, b].square().sum()
        for b in range(3)
    )
    assert abs(per_sample / 6 - expected) > 0.2 * expected
    penalty, y = JacobianPenalty(k, seed=0), model(x)
    draws = torch.stack([penalty(x, y).detach() for _ in range(300)])
    assert abs(draws.mean() - expected) < 4 * draws.std() / math.sqrt(len(draws))


def test_exact_refuses_coupled_samples_by_name():
    model, x = coupled(training=True)
    penalty = JacobianPenalty("exact")
    with pytest.raises(pf.errors.CouplingError, match=r"batch norm in training mode \(1\); call"):
        penalty(model, x)
    with pytest.raises(pf.errors.CouplingError, match="native_batch_norm"):
        penalty(x, model(x))
    with pytest.raises(pf.errors.CouplingError, match="through an op; take random projections"):
        penalty(lambda x: x - x.mean(0), x)
    with pytest.raises(pf.errors.CouplingError, match=r"training mode \(BatchNorm1d\)"):
        penalty(model[1], torch.randn(3, 5, dtype=torch.float64))
    assert penalty(model.eval(), x) > 0


class Autocast(nn.Module):
    """A model whose arithmetic is coarser than the dtype of what it returns."""

    def __init__(self, couples: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 40), nn.Tanh())
        self.head, self.couples = nn.Linear(40, 6), couples

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.head(self.net(x))
            return (y - y.mean(0) if self.couples else y).float()


@pytest.mark.parametrize("penalty", [JacobianPenalty, ContractivePenalty, EquilibriumPenalty])
def test_exact_takes_arithmetic_coarser_than_the_output(penalty: type[nn.Module]):
    penalty = penalty(projections="exact")
    model, x = Autocast(), torch.randn(16, 6).requires_grad_()
    fine = nn.Sequential(model.net, model.head)
    expected = penalty(fine, x)
    torch.testing.assert_close(penalty(model, x), expected, rtol=0.03, atol=0)
    torch.testing.assert_close(penalty(x, model(x)), expected, rtol=0.03, atol=0)
    point = x.detach().double().requires_grad_()

    def mixed(x: Tensor) -> Tensor:
        return fine(x.float()).double()

    torch.testing.assert_close(penalty(mixed, point), expected.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(penalty(point, mixed(point)), expected.double(), rtol=1e-5, atol=0)
    with pytest.raises(pf.errors.CouplingError, match="expects independent samples"):
        penalty(Autocast(couples=True), x)
    with pytest.raises(pf.errors.CouplingError, match="expects independent samples"):
        penalty(lambda x: (x.float() - x.float().mean(0)).double(), point)


class Clipped(torch.autograd.Function):
    """Hands on gradients that are not linear in what arrives."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g.clamp(-0.5, 0.5)


def test_exact_refuses_a_backward_that_is_not_linear():
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(pf.errors.CouplingError, match="expects independent samples"):
        JacobianPenalty("exact")(x, Clipped.apply(x.sin()))


def test_a_pair_of_another_result_of_the_same_split():
    t, layer = torch.randn(10, 6, requires_grad=True), nn.Linear(6, 3)
    for one, other in (t.split(5), t.sin().chunk(2), t.unbind(1)[:2]):
        for y in (other.sin(), other):
            with pytest.raises(pf.errors.GraphError, match="no graph leads from one to the other"):
                JacobianPenalty()(one, y)
    _, x = t.split(5)
    expected = oracle(layer, x.detach().clone().requires_grad_())
    torch.testing.assert_close(JacobianPenalty("exact")(x, layer(x)), expected)
    assert JacobianPenalty("exact")(x, x) == 3


def test_nothing_of_the_model_stays_visible():
    model, x = coupled(training=True)
    model.append(nn.Dropout())
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    JacobianPenalty(seed=3)(model, x).backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    model.zero_grad()
    JacobianPenalty()(model, x.detach())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_seeds_and_generators():
    model, x = network("tanh")
    y = model(x)
    torch.manual_seed(4)
    first = [JacobianPenalty()(x, y) for _ in range(2)]
    torch.manual_seed(4)
    assert [JacobianPenalty()(x, y) for _ in range(2)] == first
    assert first[0] != first[1]
    seeded = JacobianPenalty(seed=1)
    drawn = [seeded(x, y), seeded(x, y)]
    assert drawn[0] != drawn[1]
    again = JacobianPenalty(generator=torch.Generator().manual_seed(1))
    assert [again(x, y), again(x, y)] == drawn
    assert seeded(x, y, seed=1) == drawn[0]
    assert seeded(x, y, generator=torch.Generator().manual_seed(1)) == drawn[0]
    twin = copy.deepcopy(seeded)
    assert twin(x, y) == seeded(x, y)


def test_dropout_is_drawn_anew_unless_seeded():
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(), nn.Linear(50, 2))
    x, penalty = torch.randn(3, 4), JacobianPenalty("exact")
    assert penalty(model, x) != penalty(model, x)
    assert penalty(model, x, seed=1) == penalty(model, x, seed=1)


def test_without_gradients():
    model, x = network("tanh")
    with torch.no_grad():
        value = JacobianPenalty("exact", of="probabilities")(model, x)
    assert not value.requires_grad
    assert value > 0
    with torch.inference_mode():
        assert JacobianPenalty("exact", of="probabilities")(model, x) == value
    frozen = JacobianPenalty("exact")(model.requires_grad_(False), x.detach())
    assert not frozen.requires_grad


def test_under_autocast():
    model, x = network("relu")
    model, x = model.float(), x.detach().float()
    expected = JacobianPenalty("exact")(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = JacobianPenalty("exact")(model, x)
    torch.testing.assert_close(value.float(), expected, rtol=0.05, atol=0)


def test_training_with_it_makes_the_jacobian_smaller():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, penalty = torch.randn(32, 6), JacobianPenalty()
    start = penalty(model, x, seed=0)
    for _ in range(20):
        optimizer.zero_grad()
        data = x.clone().requires_grad_()
        penalty(data, model(data)).backward(inputs=list(model.parameters()))
        optimizer.step()
    assert data.grad is None
    assert penalty(model, x, seed=0) < start / 2


X = torch.randn(3, 4, requires_grad=True)
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "projections": (lambda: JacobianPenalty(0), pf.errors.InputError, "at least 1, or"),
    "projections, a word": (lambda: JacobianPenalty("all"), pf.errors.InputError, "got 'all'"),
    "of": (lambda: JacobianPenalty(of="classes"), pf.errors.InputError, "of expects"),
    "two sources": (
        lambda: JacobianPenalty(seed=1, generator=torch.Generator()),
        *(pf.errors.InputError, "seed= or generator=, got both"),
    ),
    "seed": (lambda: JacobianPenalty(seed=0.5), pf.errors.InputError, "seed expects a whole"),
    "generator": (lambda: JacobianPenalty(generator=3), pf.errors.InputError, "torch.Generator"),
    "too many": (
        lambda: JacobianPenalty(5)(X, X * 2),
        *(pf.errors.InputError, "at most the number of outputs, 4, got 5"),
    ),
    "no model": (lambda: JacobianPenalty()(3, X), pf.errors.InputError, "got int first"),
    "x no tensor": (
        lambda: JacobianPenalty()(torch.sin, [X]),
        *(pf.errors.InputError, "one tensor, got list"),
    ),
    "integers": (
        lambda: JacobianPenalty()(torch.sin, torch.ones(2, 2, dtype=torch.long)),
        *(pf.errors.InputError, "real floating-point x, got torch.int64"),
    ),
    "integers out": (
        lambda: JacobianPenalty()(X, torch.ones(3, 2, dtype=torch.long)),
        *(pf.errors.InputError, "real floating-point output, got torch.int64"),
    ),
    "tuple": (
        lambda: JacobianPenalty()(lambda x: (x, x), X),
        *(pf.errors.InputError, "one output tensor, got a tuple"),
    ),
    "tuple in a pair": (
        lambda: JacobianPenalty()(X, (X * 2, X)),
        *(pf.errors.InputError, "one output tensor, got a tuple"),
    ),
    "no batch": (
        lambda: JacobianPenalty()(torch.sin, torch.zeros(0, 2)),
        *(pf.errors.ShapeError, "at least one sample"),
    ),
    "another batch": (
        lambda: JacobianPenalty()(X, (X * 2)[:2]),
        *(pf.errors.ShapeError, "the batch of the input, 3"),
    ),
    "no outputs": (
        lambda: JacobianPenalty()(X, X[:, :0]),
        *(pf.errors.ShapeError, "at least one output"),
    ),
    "probabilities of numbers": (
        lambda: JacobianPenalty(of="probabilities")(X, X.sum(1)),
        *(pf.errors.ShapeError, r"expects logits \(B, classes, ...\), got shape \(3,\)"),
    ),
    "x without gradients": (
        lambda: JacobianPenalty()(X.detach(), X * 2),
        *(pf.errors.GraphError, "call x.requires_grad_"),
    ),
    "y without graph": (
        lambda: JacobianPenalty()(X, (X * 2).detach()),
        *(pf.errors.GraphError, "y to have a graph that leads to x"),
    ),
    "y of another x": (
        lambda: JacobianPenalty()(X, torch.randn(3, 4, requires_grad=True) * 2),
        *(pf.errors.GraphError, "compute y from this very x"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_it_says_what_it_is():
    assert repr(JacobianPenalty(2)) == "JacobianPenalty(projections=2, of='logits')"
